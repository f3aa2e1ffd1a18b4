-- Names that existing systems call, thin over the verbs: each does what it did there, by the rules of here. The cached
-- state is in 52_subscription_cache.sql, its upkeep in 52_cache_cleanup.sql.
-- Lock order: as everywhere, rows of stripe_objects and stripe_payments, then the account.

create or replace function credits.use_credits_validated(
  user_id     text,
  amount      numeric,
  description text  default null,
  metadata    jsonb default null
)
returns credits.validated_spend_result
language plpgsql
security definer
set search_path = pg_catalog, pg_temp
as $$
declare
  v_key   text := coalesce(use_credits_validated.metadata ->> 'idempotency_key', use_credits_validated.metadata ->> 'key',
                           gen_random_uuid()::text);
  v_entry credits.subscription_cache_entry;
  v_state credits.subscription_state_result;
  v_spend credits.entry_result;
begin
  perform credits._lock_account(use_credits_validated.user_id);
  v_entry := credits._cached_state(use_credits_validated.user_id);
  v_state := v_entry.state;
  if not v_state.may_spend
     and not exists (select from credits.entries e
                      where e.account_id = use_credits_validated.user_id and e.operation = 'spend' and e.key = v_key) then
    perform credits._fail(403, 'subscription_inactive',
      jsonb_build_object('account_id', v_state.account_id, 'state', v_state.state, 'status', v_state.status,
                         'plan', v_state.plan, 'grace_until', v_state.grace_until),
      'The subscription allows no spending in this state.');
  end if;

  v_spend := credits.spend(use_credits_validated.user_id, use_credits_validated.amount,
                           description => use_credits_validated.description, key => v_key,
                           metadata => use_credits_validated.metadata);
  return row(v_spend.*, v_key, v_state.state, credits._entry_json(v_entry)::jsonb)::credits.validated_spend_result;
end $$;
comment on function credits.use_credits_validated(text, numeric, text, jsonb) is
'Uses credits as spend() does, if the account''s subscription lets it: not while it is unpaid or paused, nor past its grace.

user_id is the account_id. The key of the spend is metadata.idempotency_key or metadata.key: a retry with it answers with the
first result, marked replayed, also if the subscription has become inactive since. Without one every call gets a key of its own,
which it returns, and then a retry is a second spend. An account without a subscription may spend what it has. state and
subscription are those at the time of the call.
Errors: 400 invalid_request, 402 insufficient_credits, 403 subscription_inactive, 404 account_not_found,
409 idempotency_conflict, 422 invalid_amount, 423 account_frozen, account_closed.';

create or replace function credits.add_subscription_credits(
  customer_id     text,
  invoice_id      text,
  subscription_id text,
  credits         numeric,
  description     text default null
)
returns credits.subscription_credits_result
language plpgsql
security definer
set search_path = pg_catalog, pg_temp
as $$
declare
  v_amount     numeric := credits._check_amount(add_subscription_credits.credits);
  v_account_id text := credits._account_of_customer(add_subscription_credits.customer_id);
  v_grant      credits.grant_result;
  v_linked     boolean;
begin
  perform credits._check_key(add_subscription_credits.invoice_id, 'invoice_id');
  perform credits._check_key(add_subscription_credits.subscription_id, 'subscription_id');
  v_linked := credits._take_invoice(v_account_id, add_subscription_credits.invoice_id, add_subscription_credits.subscription_id);
  perform credits._lock_account(v_account_id);
  perform credits._pause_if_disputed(add_subscription_credits.invoice_id, v_account_id) where v_linked;
  if not exists (select from credits.allowances a
                  where a.account_id = v_account_id and a.invoice_id = add_subscription_credits.invoice_id) then
    v_grant := credits._grant_for_invoice(v_account_id, add_subscription_credits.invoice_id,
      add_subscription_credits.subscription_id, v_amount, add_subscription_credits.description);
    perform credits._settle_source('invoice', add_subscription_credits.invoice_id, v_account_id);
  end if;
  return credits._granted_by_invoice(v_account_id, add_subscription_credits.invoice_id,
    add_subscription_credits.subscription_id, coalesce(v_grant.replayed, true));
end $$;
comment on function credits.add_subscription_credits(text, text, text, numeric, text) is
'Grants credits of kind plan for a paid invoice of a subscription, once, to the account that the Stripe customer is bound to.

An invoice grants once, here or by its own event, whichever comes first. If its event has granted it, this grants nothing more
and answers what that granted, marked replayed; if this came first, the event grants nothing. An event that found no credits
in the prices of the invoice leaves it to this call. Calling again with the same arguments is a replay. The credits expire
with the period that the invoice pays for, else with the present one of the subscription; never if neither is known. Refunds
and disputes of the invoice take them back.
Errors: 400 invalid_request, 404 customer_not_found, 409 idempotency_conflict, customer_of_another_account,
422 invalid_amount, 423 account_closed.';

drop function if exists credits.get_or_create_stripe_customer(text, text);
create or replace function credits.get_or_create_stripe_customer(
  user_id        text,
  email          text default null,
  stripe_account text default null
)
returns credits.stripe_customer_result
language plpgsql
security definer
set search_path = pg_catalog, pg_temp
as $$
declare
  v_email    text := (credits._account(get_or_create_stripe_customer.user_id)).email;
  v_customer text := credits._customer_of(get_or_create_stripe_customer.user_id);
  v_request  bigint;
begin
  perform credits._check_connected(get_or_create_stripe_customer.stripe_account);
  if v_customer is null then
    perform credits._lock_account(get_or_create_stripe_customer.user_id);
    -- One statement: a request that is no longer open has bound its customer.
    select credits._customer_of(get_or_create_stripe_customer.user_id),
           credits._open_request('customer', get_or_create_stripe_customer.user_id)
      into v_customer, v_request;
  end if;
  if v_customer is not null then
    return row(get_or_create_stripe_customer.user_id, v_customer, 'bound', null)::credits.stripe_customer_result;
  elsif v_request is null then
    v_request := credits._request('customer', get_or_create_stripe_customer.user_id, 'post', '/v1/customers',
      jsonb_strip_nulls(jsonb_build_object(
        'email', coalesce(nullif(get_or_create_stripe_customer.email, ''), v_email),
        'metadata', jsonb_build_object('account_id', get_or_create_stripe_customer.user_id))),
      get_or_create_stripe_customer.user_id, stripe_account => get_or_create_stripe_customer.stripe_account);
  end if;
  return row(get_or_create_stripe_customer.user_id, null, 'pending', v_request)::credits.stripe_customer_result;
end $$;
comment on function credits.get_or_create_stripe_customer(text, text, text) is
'The Stripe customer that an account is bound to; if there is none, asks Stripe to create one.

user_id is the account_id. status is bound, with customer_id; or pending, with the request_id of the request that waits in
stripe_requests: its answer binds the customer, then call again. Calls at the same time share one request. email (by default
that of the account) is what Stripe writes to; an e-mail address never binds a customer to an account. Of several customers
that of the live subscription is answered, else the first one that Stripe has not deleted. stripe_account is the connected account in
which a new one is made, null the own one: what the buyer then buys is sold there. An endpoint must take its events.
Errors: 400 invalid_request, 404 account_not_found.';

-- Helpers -----------------------------------------------------------------------------------------------------------

create or replace function credits._account_of_customer(customer_id text)
returns text
language plpgsql
stable
as $$
declare
  v_account_id text;
begin
  perform credits._check_key(_account_of_customer.customer_id, 'customer_id');
  select c.account_id into v_account_id
    from credits.stripe_customers c
   where c.customer_id = _account_of_customer.customer_id;
  if not found then
    perform credits._fail(404, 'customer_not_found', jsonb_build_object('customer_id', _account_of_customer.customer_id),
      'The customer is bound to no account: a checkout, its metadata or get_or_create_stripe_customer() binds it.');
  end if;
  return v_account_id;
end $$;

-- Takes the fact that stands for the credits of an invoice, or finds it taken. The row of the invoice is locked first, as its
-- own events do, so of two that come at the same time the second sees what the first has done. A payment that was heard of
-- before anybody knew the account is linked now, so that its refunds find the grant; answers whether there was one.
drop function if exists credits._take_invoice(text, text, text);
create or replace function credits._take_invoice(
  account_id      text,
  invoice_id      text,
  subscription_id text
)
returns boolean
language plpgsql
as $$
declare
  v_object  jsonb := (credits._touch('invoice', _take_invoice.invoice_id)).snapshot;
  v_invoice credits.invoice_shape;
begin
  insert into credits.stripe_facts (kind, ref, account_id, created_at)
  values ('invoice', _take_invoice.invoice_id, _take_invoice.account_id, credits.now())
  on conflict on constraint stripe_facts_pkey do nothing;
  if exists (select from credits.stripe_facts f
              where f.account_id <> _take_invoice.account_id
                and (f.kind, f.ref) in (('invoice', _take_invoice.invoice_id), ('subscription', _take_invoice.subscription_id))) then
    perform credits._fail(409, 'customer_of_another_account',
      jsonb_build_object('invoice_id', _take_invoice.invoice_id, 'subscription_id', _take_invoice.subscription_id),
      'The invoice or the subscription belongs to another account than the customer.');
  end if;
  v_invoice.invoice_id := _take_invoice.invoice_id;
  return credits._link_invoice_payments(coalesce(v_object, '{}'), v_invoice, _take_invoice.account_id);
end $$;

-- The grant, and what it is a slice of: it rolls over and is clawed back like those that events make. How much it is, the
-- caller has decided, so the cap of the period is not asked.
create or replace function credits._grant_for_invoice(
  account_id      text,
  invoice_id      text,
  subscription_id text,
  amount          numeric,
  description     text
)
returns credits.grant_result
language plpgsql
as $$
declare
  v_period tstzrange := credits._period_of_invoice(_grant_for_invoice.account_id, _grant_for_invoice.invoice_id,
                                                   _grant_for_invoice.subscription_id);
  v_grant  credits.grant_result;
begin
  v_grant := credits._grant(
    account_id  => _grant_for_invoice.account_id,
    amount      => _grant_for_invoice.amount,
    kind        => 'plan',
    expires_at  => upper(v_period),
    description => _grant_for_invoice.description,
    source      => 'invoice:' || _grant_for_invoice.invoice_id,
    key         => format('sub:%s:added', _grant_for_invoice.invoice_id),
    fingerprint => jsonb_strip_nulls(jsonb_build_object(
      'amount', _grant_for_invoice.amount, 'subscription_id', _grant_for_invoice.subscription_id,
      'description', _grant_for_invoice.description)));
  if not v_grant.replayed then
    insert into credits.plan_grants (account_id, grant_id, subscription_id, allowance_id, invoice_id, slice, period_start,
      period_end)
    values (_grant_for_invoice.account_id, v_grant.grant_id, _grant_for_invoice.subscription_id, 'added',
            _grant_for_invoice.invoice_id, 0, coalesce(lower(v_period), v_grant.effective_at),
            coalesce(upper(v_period), 'infinity'));
    perform credits._roll_over(_grant_for_invoice.account_id, _grant_for_invoice.subscription_id, lower(v_period));
  end if;
  return v_grant;
end $$;

-- The period that an invoice pays for: that of its lines, if they are known, else the present one of its subscription.
create or replace function credits._period_of_invoice(
  account_id      text,
  invoice_id      text,
  subscription_id text
)
returns tstzrange
language sql
stable
as $$
  select tstzrange(p.period_start, p.period_end)
    from (select 1 as place, l.period_start, l.period_end
            from credits._shape_lines(credits._snapshot('invoice', _period_of_invoice.invoice_id)) l
           where coalesce(l.subscription_id, _period_of_invoice.subscription_id) = _period_of_invoice.subscription_id
          union all
          select 2, s.period_start, s.period_end
            from credits.subscriptions s
           where s.account_id = _period_of_invoice.account_id and s.subscription_id = _period_of_invoice.subscription_id) p
   where p.period_start < p.period_end and p.period_end > credits.now()
   order by p.place, p.period_end desc
   limit 1
$$;

create or replace function credits._granted_by_invoice(
  account_id      text,
  invoice_id      text,
  subscription_id text,
  replayed        boolean
)
returns credits.subscription_credits_result
language sql
stable
as $$
  select row(_granted_by_invoice.account_id, _granted_by_invoice.invoice_id, _granted_by_invoice.subscription_id,
             coalesce(trim_scale(sum(g.amount)), 0), coalesce(array_agg(g.grant_id order by g.grant_id), '{}'),
             max(g.expires_at), _granted_by_invoice.replayed)::credits.subscription_credits_result
    from credits.plan_grants p
    join credits.grants g on g.account_id = p.account_id and g.grant_id = p.grant_id
   where p.account_id = _granted_by_invoice.account_id and p.invoice_id = _granted_by_invoice.invoice_id and p.slice = 0
$$;
