-- What a browser may call to buy, and to see what was bought. The rules are those of 89_api_calls.sql.

create or replace function credits_api.list_packages()
returns setof credits_api.packages
language sql
stable
begin atomic
  select p.code, p.name, p.description, p.credits, p.price, p.currency, p.discount_percent, p.popular, p.display_order
    from credits._my_packages() p;
end;
comment on function credits_api.list_packages() is
'The packages on sale, in the order of display. price is in the minor unit of currency.
Errors: 401 not_authenticated.';

create or replace function credits_api.list_plans()
returns setof credits_api.plans
language sql
stable
begin atomic
  select p.code, p.name, p.description, p.monthly_credits, p.trial_credits, p.rollover, p.rollover_cap, p.seats,
         p.display_order, p.stripe_price_ids
    from credits._my_plans() p;
end;
comment on function credits_api.list_plans() is
'The plans that there are, in the order of display, with the credits that each gives a month.
Errors: 401 not_authenticated.';

create or replace function credits_api.list_purchases(
  status     text    default null,
  max_rows   integer default 50,
  before     bigint  default null,
  account_id text    default null
)
returns setof credits_api.purchases
language sql
stable
begin atomic
  select p.account_id, p.purchase_id, p.status, p.package, p.quantity, p.credits, p.amount, p.currency, p.amount_subtotal,
         p.amount_discount, p.amount_tax, p.amount_refunded, p.created_at, p.completed_at
    from credits._my_purchases(list_purchases.status, list_purchases.max_rows, list_purchases.before,
                               list_purchases.account_id) p;
end;
comment on function credits_api.list_purchases(text, integer, bigint, text) is
'What your account has bought, the latest first.

Page on with before = the last purchase_id seen. max_rows is 1 to 1000, 50 by default.
Errors: 400 invalid_request, 401 not_authenticated, 404 account_not_found.';

create or replace function credits_api.create_checkout(
  package               text    default null,
  plan                  text    default null,
  success_url           text    default null,
  cancel_url            text    default null,
  key                   text    default null,
  quantity              integer default 1,
  save_card             boolean default false,
  allow_promotion_codes boolean default false,
  price_id              text    default null,
  metadata              jsonb   default null,
  account_id            text    default null
)
returns credits.stripe_session_result
language sql
volatile
begin atomic
  select r.*
    from credits._my_checkout(create_checkout.package, create_checkout.plan, create_checkout.success_url,
                              create_checkout.cancel_url, create_checkout.key, create_checkout.quantity,
                              create_checkout.save_card, create_checkout.allow_promotion_codes,
                              create_checkout.price_id, create_checkout.metadata, create_checkout.account_id) r;
end;
comment on function credits_api.create_checkout(text, text, text, text, text, integer, boolean, boolean, text, jsonb, text) is
'Starts a Stripe Checkout in which you buy a package or subscribe to a plan, once per key.

Name one of the two. state is queued until Stripe has answered: ask get_checkout with the same key until it is done, then go
to url. The addresses must be in the setting allowed_redirect_urls. A retry repeats the key, a new purchase takes a new one.
Errors: 400 invalid_request, redirect_not_allowed, 401 not_authenticated, 403 forbidden, 404 account_not_found,
package_not_found, plan_not_found, price_not_found, 409 idempotency_conflict, already_subscribed, 423 account_closed,
429 rate_limited.';

create or replace function credits_api.get_checkout(
  key        text,
  account_id text default null
)
returns credits.stripe_session_result
language sql
stable
begin atomic
  select r.*
    from credits._my_checkout_state(get_checkout.key, get_checkout.account_id) r;
end;
comment on function credits_api.get_checkout(text, text) is
'How the session stands that create_checkout asked for under a key. Changes nothing.
Errors: 400 invalid_request, 401 not_authenticated, 403 forbidden, 404 account_not_found, checkout_not_found.';

create or replace function credits_api.create_portal_session(
  return_url text,
  key        text,
  account_id text default null
)
returns credits.stripe_session_result
language sql
volatile
begin atomic
  select r.*
    from credits._my_portal_session(create_portal_session.return_url, create_portal_session.key,
                                    create_portal_session.account_id) r;
end;
comment on function credits_api.create_portal_session(text, text, text) is
'Asks for a session of Stripe''s customer portal, where you change cards, see invoices and cancel; once per key.

Call again with the same key until state is done, then go to url, within five minutes. return_url must be in the setting
allowed_redirect_urls.
Errors: 400 invalid_request, redirect_not_allowed, 401 not_authenticated, 403 forbidden, 404 account_not_found,
customer_not_found, 409 idempotency_conflict, 429 rate_limited.';

create or replace function credits_api.get_portal_session(
  key        text,
  account_id text default null
)
returns credits.stripe_session_result
language sql
stable
begin atomic
  select r.*
    from credits._my_portal_state(get_portal_session.key, get_portal_session.account_id) r;
end;
comment on function credits_api.get_portal_session(text, text) is
'How the session stands that create_portal_session asked for under a key. Changes nothing.
Errors: 400 invalid_request, 401 not_authenticated, 403 forbidden, 404 account_not_found, checkout_not_found.';
