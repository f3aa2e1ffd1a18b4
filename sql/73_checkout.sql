-- Where a buyer is sent: Checkout for a package or a plan, and the customer portal. Stripe is asked once per key, and what it
-- answers is kept for whoever asks again. Lock order: the account, then its checkouts and purchases; a request to Stripe is
-- only written here, never waited for; whoever made the call over HTTP may wait in its place (_await).

create or replace function credits.create_checkout(
  account_id            text,
  package               text    default null,
  plan                  text    default null,
  success_url           text    default null,
  cancel_url            text    default null,
  key                   text    default null,
  quantity              integer default 1,
  save_card             boolean default false,
  allow_promotion_codes boolean default false,
  price_id              text    default null,
  metadata              jsonb   default null
)
returns credits.stripe_session_result
language plpgsql
security definer
set search_path = pg_catalog, pg_temp
as $$
declare
  v_asked    jsonb := credits._fingerprint(jsonb_build_object(
                        'package', create_checkout.package, 'plan', create_checkout.plan,
                        'quantity', coalesce(create_checkout.quantity, 1),
                        'success_url', create_checkout.success_url, 'cancel_url', create_checkout.cancel_url,
                        'save_card', coalesce(create_checkout.save_card, false), 'price_id', create_checkout.price_id,
                        'allow_promotion_codes', coalesce(create_checkout.allow_promotion_codes, false)),
                        create_checkout.metadata);
  v_checkout credits.checkouts;
begin
  perform credits._check_key(create_checkout.key, 'key');
  perform credits._check_checkout(v_asked);
  perform credits._lock_account(create_checkout.account_id);
  v_checkout := credits._checkout(create_checkout.account_id, 'checkout', create_checkout.key);
  if v_checkout.checkout_id is not null then
    perform credits._check_same(v_checkout.fingerprint, v_asked, 'create_checkout', create_checkout.key);
    return credits._tell_checkout(v_checkout, true);
  end if;

  perform credits._check_redirect(create_checkout.success_url, 'success_url');
  perform credits._check_redirect(create_checkout.cancel_url, 'cancel_url') where create_checkout.cancel_url is not null;
  perform credits._check_open(create_checkout.account_id);
  v_checkout := credits._new_checkout(create_checkout.account_id, 'checkout', create_checkout.key, v_asked);
  if create_checkout.package is not null then
    v_checkout := credits._sell_package(v_checkout, v_asked);
  else
    v_checkout := credits._sell_plan(v_checkout, v_asked);
  end if;
  return credits._tell_checkout(v_checkout, false);
end $$;
comment on function credits.create_checkout(text, text, text, text, text, text, integer, boolean, boolean, text, jsonb) is
'Asks Stripe for a Checkout session in which an account buys a package or subscribes to a plan, once per key.

Name one of the two. state is queued until Stripe has answered; then done, with the url to send the buyer to until
expires_at; failed, with Stripe''s error; complete, when the buyer is through; or expired, and then a new key makes a new
session. Calling again with the same arguments, or get_checkout(), says how it stands. A package is a purchase at once, pending
until it is paid. A plan is sold at the last of its stripe_price_ids, or at price_id. save_card keeps the card for payments
without the buyer; a subscription always does. metadata is an object of texts, for your own use. success_url may hold
{CHECKOUT_SESSION_ID}; it and cancel_url must be in the setting allowed_redirect_urls.
Errors: 400 invalid_request, redirect_not_allowed, 404 account_not_found, package_not_found, plan_not_found, price_not_found,
409 idempotency_conflict, already_subscribed, 423 account_closed, 429 rate_limited.';

create or replace function credits.get_checkout(
  account_id text,
  key        text
)
returns credits.stripe_session_result
language plpgsql
stable
security definer
set search_path = pg_catalog, pg_temp
as $$
begin
  return credits._find_checkout(get_checkout.account_id, 'checkout', get_checkout.key);
end $$;
comment on function credits.get_checkout(text, text) is
'How the session stands that create_checkout() asked for under a key: the same answer, changing nothing.
Errors: 400 invalid_request, 404 account_not_found, checkout_not_found.';

create or replace function credits.create_portal_session(
  account_id text,
  return_url text,
  key        text
)
returns credits.stripe_session_result
language plpgsql
security definer
set search_path = pg_catalog, pg_temp
as $$
declare
  v_asked    jsonb := jsonb_build_object('return_url', create_portal_session.return_url);
  v_customer text;
  v_checkout credits.checkouts;
begin
  perform credits._check_key(create_portal_session.key, 'key');
  perform credits._check_redirect(create_portal_session.return_url, 'return_url');
  perform credits._lock_account(create_portal_session.account_id);
  v_checkout := credits._checkout(create_portal_session.account_id, 'portal', create_portal_session.key);
  if v_checkout.checkout_id is not null then
    perform credits._check_same(v_checkout.fingerprint, v_asked, 'create_portal_session', create_portal_session.key);
    return credits._tell_checkout(v_checkout, true);
  end if;

  v_customer := credits._customer_of(create_portal_session.account_id);
  if v_customer is null then
    perform credits._fail(404, 'customer_not_found', jsonb_build_object('account_id', create_portal_session.account_id),
      'The account has no customer at Stripe: get_or_create_stripe_customer() makes one.');
  end if;
  v_checkout := credits._new_checkout(create_portal_session.account_id, 'portal', create_portal_session.key, v_asked);
  v_checkout.request_id  := credits._request('portal', v_checkout.checkout_id, 'post', '/v1/billing_portal/sessions',
    jsonb_build_object('customer', v_customer, 'return_url', create_portal_session.return_url), v_checkout.account_id,
    stripe_account => credits._home_of('customer', v_customer));
  v_checkout := credits._keep_checkout(v_checkout);
  return credits._tell_checkout(v_checkout, false);
end $$;
comment on function credits.create_portal_session(text, text, text) is
'Asks Stripe for a session of the customer portal, where a customer changes cards, sees invoices and cancels; once per key.

The result is that of create_checkout(); call again with the same key until state is done. Stripe lets nobody in by the url
later than five minutes after it made it: then state is expired, and a new key makes a new session. return_url must be in
the setting allowed_redirect_urls.
Errors: 400 invalid_request, redirect_not_allowed, 404 account_not_found, customer_not_found, 409 idempotency_conflict,
429 rate_limited.';

create or replace function credits.get_portal_session(
  account_id text,
  key        text
)
returns credits.stripe_session_result
language plpgsql
stable
security definer
set search_path = pg_catalog, pg_temp
as $$
begin
  return credits._find_checkout(get_portal_session.account_id, 'portal', get_portal_session.key);
end $$;
comment on function credits.get_portal_session(text, text) is
'How the session stands that create_portal_session() asked for under a key: the same answer, changing nothing.
Errors: 400 invalid_request, 404 account_not_found, checkout_not_found.';

-- Helpers -----------------------------------------------------------------------------------------------------------

create or replace function credits._new_checkout(
  account_id  text,
  kind        text,
  key         text,
  fingerprint jsonb
)
returns credits.checkouts
language plpgsql
as $$
declare
  v_checkout credits.checkouts;
begin
  perform credits._check_checkouts(_new_checkout.account_id);
  v_checkout.checkout_id := gen_random_uuid();
  v_checkout.account_id  := _new_checkout.account_id;
  v_checkout.kind        := _new_checkout.kind;
  v_checkout.key         := _new_checkout.key;
  v_checkout.fingerprint := _new_checkout.fingerprint;
  return v_checkout;
end $$;

create or replace function credits._find_checkout(
  account_id text,
  kind       text,
  key        text
)
returns credits.stripe_session_result
language plpgsql
stable
as $$
declare
  v_account  credits.accounts := credits._account(_find_checkout.account_id);
  v_checkout credits.checkouts := credits._checkout(v_account.account_id, _find_checkout.kind,
                                                    credits._check_key(_find_checkout.key, 'key'));
begin
  if v_checkout.checkout_id is null then
    perform credits._fail(404, 'checkout_not_found',
      jsonb_build_object('account_id', _find_checkout.account_id, 'key', _find_checkout.key));
  end if;
  return credits._tell_checkout(v_checkout, true);
end $$;

-- While Stripe has not answered, the door may send the request at once, and ask again how it stands.
create or replace function credits._tell_checkout(
  checkout credits.checkouts,
  replayed boolean
)
returns credits.stripe_session_result
language plpgsql
as $$
declare
  v_checkout credits.checkouts := _tell_checkout.checkout;
  v_result   credits.stripe_session_result := credits._checkout_result(v_checkout, _tell_checkout.replayed);
begin
  if v_result.state = 'queued' then
    perform credits._await(v_result.request_id,
                           case v_checkout.kind when 'portal' then 'get_portal_session' else 'get_checkout' end,
                           jsonb_build_object('account_id', v_checkout.account_id, 'key', v_checkout.key));
  end if;
  return v_result;
end $$;

-- Tells whoever holds the connection, until the transaction ends: once it is committed, this request may be carried out, and
-- then this function, with these arguments, has the answer. No answer of ours depends on it.
create or replace function credits._await(
  request_id bigint,
  function   text,
  arguments  jsonb
)
returns void
language plpgsql
as $$
begin
  perform set_config('credits.await', jsonb_build_object('request_id', _await.request_id, 'function', _await.function,
                                                         'arguments', _await.arguments)::text, true);
end $$;

create or replace function credits._checkout(
  account_id text,
  kind       text,
  key        text
)
returns credits.checkouts
language sql
stable
as $$
  select c.*
    from credits.checkouts c
   where c.account_id = _checkout.account_id and c.kind = _checkout.kind and c.key = _checkout.key
$$;

create or replace function credits._keep_checkout(checkout credits.checkouts)
returns credits.checkouts
language plpgsql
as $$
declare
  v_checkout credits.checkouts := _keep_checkout.checkout;
begin
  v_checkout.created_at := credits.now();
  insert into credits.checkouts select (v_checkout).*;
  return v_checkout;
end $$;

-- What the session says counts first: its event may come although the answer to the request is lost.
create or replace function credits._checkout_result(
  checkout credits.checkouts,
  replayed boolean
)
returns credits.stripe_session_result
language sql
stable
as $$
  select row(c.request_id, s.state, c.purchase_id, c.session_id, case when s.state = 'done' then c.url end, c.expires_at,
             case when s.state = 'failed' then credits._error_told(r) end, _checkout_result.replayed)::credits.stripe_session_result
    from (select (_checkout_result.checkout).*) c
    left join credits.stripe_requests r on r.request_id = c.request_id,
         lateral (select case when c.status = 'complete'                                   then 'complete'
                              when c.status = 'expired' or c.expires_at <= credits.now()   then 'expired'
                              when c.url is not null                                       then 'done'
                              when coalesce(r.state, 'failed') in ('failed', 'declined')   then 'failed'
                              else 'queued' end as state) s
$$;

create or replace function credits._error_told(request credits.stripe_requests)
returns jsonb
language sql
immutable
as $$
  select jsonb_strip_nulls(jsonb_build_object(
    'status', (_error_told.request).http_status,
    'type', (_error_told.request).error_type,
    'code', (_error_told.request).error_code,
    'param', credits._error_of((_error_told.request).response, 'param'),
    'message', credits._error_of((_error_told.request).response, 'message')))
$$;
