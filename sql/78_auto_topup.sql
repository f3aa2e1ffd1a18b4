-- Automatic top-up: the rule of an account, and the decision to buy. A debit that leaves too little asks for a payment in its
-- own transaction; what becomes of it is in 79_top_up_answers.sql.
-- Keeps invariant 11: one open attempt per account. All is decided and counted from rows under the lock of the account, and a
-- reason not to buy is told, never raised: no debit fails because of it. Lock order: the account, then its rule and attempts.

insert into credits.settings as s (name, value, summary) values
  ('top_up_max_declines', '3', 'How often in a row a card may be declined by automatic top-up until it is asked no more.'),
  ('top_up_decline_wait', '"1 day"', 'How long automatic top-up lets a card rest that was declined.')
on conflict (name) do update set summary = excluded.summary;

create or replace function credits.set_auto_topup(
  account_id  text,
  threshold   numeric,
  package     text,
  monthly_cap bigint,
  daily_cap   bigint   default null,
  cool_down   interval default '10 minutes'
)
returns credits.auto_topup_result
language plpgsql
security definer
set search_path = pg_catalog, pg_temp
as $$
declare
  v_threshold numeric := credits._check_amount(set_auto_topup.threshold);
  v_now       timestamptz := credits.now();
  v_currency  text;
  v_card      text;
begin
  perform credits._lock_account(set_auto_topup.account_id);
  perform credits._check_open(set_auto_topup.account_id);
  v_currency := credits._check_auto_topup(set_auto_topup.package, set_auto_topup.monthly_cap, set_auto_topup.daily_cap,
                                          set_auto_topup.cool_down);
  v_card := credits._check_card(set_auto_topup.account_id);
  insert into credits.auto_topups as r (account_id, threshold, package, currency, monthly_cap, daily_cap, cool_down,
    created_at, updated_at)
  values (set_auto_topup.account_id, v_threshold, set_auto_topup.package, v_currency, set_auto_topup.monthly_cap,
          set_auto_topup.daily_cap, coalesce(set_auto_topup.cool_down, '10 minutes'), v_now, v_now)
  on conflict on constraint auto_topups_pkey do update
    set enabled = true, threshold = excluded.threshold, package = excluded.package, currency = excluded.currency,
        monthly_cap = excluded.monthly_cap, daily_cap = excluded.daily_cap, cool_down = excluded.cool_down,
        check_at = null,
        updated_at    = case when (r.enabled, r.threshold, r.package, r.currency, r.monthly_cap, r.daily_cap, r.cool_down)
                                  is distinct from (true, excluded.threshold, excluded.package, excluded.currency,
                                                    excluded.monthly_cap, excluded.daily_cap, excluded.cool_down)
                             then excluded.updated_at else r.updated_at end,
        paused_reason = credits._pause_left(r, v_card),
        paused_at     = case when r.paused_card = v_card then r.paused_at end,
        paused_card   = case when r.paused_card = v_card then r.paused_card end;
  perform credits._let_go(set_auto_topup.account_id);
  perform credits._arm_top_up(set_auto_topup.account_id);
  perform credits._after_debit(set_auto_topup.account_id);
  return credits._auto_topup_result(set_auto_topup.account_id);
end $$;
comment on function credits.set_auto_topup(text, numeric, text, bigint, bigint, interval) is
'Turns automatic top-up on: whenever less than threshold credits are available, a package is bought with the saved card.

States the whole rule; the same call again changes nothing. So many packages are bought in one payment that more than
threshold is available afterwards, debt included; if a cap does not allow that, none. monthly_cap is over any 30 days, daily_cap
over any 24 hours, both in the minor unit of the package''s currency; cool_down is the shortest time between two attempts. Where
too little is available already, it buys at once. Ends a pause, but for that of a card that was declined: only another card
does. The card is the default one of the customer at Stripe, else the last one that was attached.
Errors: 400 invalid_request, 404 account_not_found, package_not_found, customer_not_found, 409 card_missing, 422 invalid_amount,
423 account_closed.';

create or replace function credits.get_auto_topup(account_id text)
returns credits.auto_topup_result
language plpgsql
stable
security definer
set search_path = pg_catalog, pg_temp
as $$
begin
  perform credits._account(get_auto_topup.account_id);
  return credits._auto_topup_result(get_auto_topup.account_id);
end $$;
comment on function credits.get_auto_topup(text) is
'The rule of automatic top-up of an account and how it stands.

state is off, active, or paused with paused_reason: card_missing, declined, do_not_try_again, authentication_required (another
card ends these), request_failed, refunded, disputed (set_auto_topup does). top_up_state tells of an attempt in flight: queued,
sent, processing, requires_action, or unknown, if Stripe''s answer is lost. month_used and day_used count towards the caps.
check_at is when it looks again without a debit, and before which it buys nothing.
Errors: 400 invalid_request, 404 account_not_found.';

create or replace function credits.remove_auto_topup(account_id text)
returns credits.auto_topup_result
language plpgsql
security definer
set search_path = pg_catalog, pg_temp
as $$
begin
  perform credits._lock_account(remove_auto_topup.account_id);
  update credits.auto_topups r
     set enabled = false, check_at = null, updated_at = credits.now()
   where r.account_id = remove_auto_topup.account_id and r.enabled;
  perform credits._withdraw_top_up(remove_auto_topup.account_id);
  perform credits._let_go(remove_auto_topup.account_id);
  perform credits._arm_top_up(remove_auto_topup.account_id);
  return credits._auto_topup_result(remove_auto_topup.account_id);
end $$;
comment on function credits.remove_auto_topup(text) is
'Turns automatic top-up off.

A payment that no worker has sent to Stripe yet is not sent; one that was sent is still credited if it succeeds.
Errors: 400 invalid_request, 404 account_not_found.';

create or replace function credits.run_auto_topups(max_accounts integer default 100)
returns integer
language plpgsql
security definer
set search_path = pg_catalog, pg_temp
as $$
declare
  v_now      timestamptz := credits.now();
  v_accounts text[];
begin
  perform credits._check_rows(run_auto_topups.max_accounts, 'max_accounts', 10000);
  perform credits._ask_about_open(v_now);
  v_accounts := array(select r.account_id from credits.auto_topups r
                       where r.check_at <= v_now order by r.check_at, r.account_id limit run_auto_topups.max_accounts);
  v_accounts := array(select b.account_id from credits.balances b where b.account_id = any (v_accounts)
                       order by b.account_id collate "C" for no key update skip locked);
  for v_place in 1 .. cardinality(v_accounts) loop
    perform credits._lock_account(v_accounts[v_place]);
    perform credits._after_debit(v_accounts[v_place]);
  end loop;
  return cardinality(v_accounts);
end $$;
comment on function credits.run_auto_topups(integer) is
'Looks at automatic top-ups that wait for a moment: after a decline, a cool-down, a cap, or an expiry. A job for every minute.

An account without credits has no debits that could look. Answers how many accounts were looked at. Stripe is asked once a day
about payments that are on their way, since the event that tells their end may be lost.
Errors: 400 invalid_request.';

-- Payments on their way of which nothing was heard for a day. That they are asked about is news, whatever the answer.
create or replace function credits._ask_about_open(at timestamptz)
returns void
language sql
as $$
  with silent as (
    update credits.stripe_objects o
       set updated_at = _ask_about_open.at
      from credits.top_ups t
     where t.state in ('processing', 'requires_action') and o.kind = 'payment_intent' and o.object_id = t.payment_intent_id
       and o.updated_at <= _ask_about_open.at - interval '24 hours'
       and credits._open_request('retrieve', 'payment_intent:' || t.payment_intent_id) is null
    returning o.object_id)
  select credits._request_object('payment_intent', s.object_id) from silent s
$$;

-- The decision ------------------------------------------------------------------------------------------------------

-- Called by whatever has taken credits if what it left is below balances.topup_below. The caller holds the account.
create or replace function credits._after_debit(account_id text)
returns void
language plpgsql
as $$
declare
  v_rule      credits.auto_topups;
  v_plan      credits.top_up_plan;
  v_available numeric;
begin
  select r.* into v_rule
    from credits.auto_topups r
   where r.account_id = _after_debit.account_id and r.enabled and r.paused_reason is null
     and coalesce(r.check_at, '-infinity') <= credits.now();
  if not found then
    return;
  end if;
  select trim_scale(credits._free(b) - b.debt) into v_available from credits.balances b where b.account_id = v_rule.account_id;
  if v_available >= v_rule.threshold or credits._open_top_up(v_rule.account_id) is not null then
    update credits.auto_topups r set check_at = null where r.account_id = v_rule.account_id and r.check_at is not null;
    return;
  end if;

  v_plan := credits._plan_top_up(v_rule, v_available);
  if v_plan.reason is null then
    perform credits._start_top_up(v_rule, v_plan, v_available);
  elsif v_plan.reason = 'card_missing' then
    perform credits._pause_top_up(v_rule.account_id, v_plan.reason);
  else
    perform credits._put_off(v_rule, v_plan, v_available);
  end if;
end $$;

-- What closes the gap in one payment, or the reason why it is not made. Failed attempts cost nothing, all others count.
create or replace function credits._plan_top_up(
  rule      credits.auto_topups,
  available numeric
)
returns credits.top_up_plan
language plpgsql
stable
as $$
declare
  v_rule    credits.auto_topups := _plan_top_up.rule;
  v_package credits.packages;
  v_status  text;
  v_packs   numeric;
  v_plan    credits.top_up_plan;
begin
  select p.* into v_package from credits.packages p where p.code = v_rule.package;
  select b.status into v_status from credits.balances b where b.account_id = v_rule.account_id;
  v_packs               := floor((v_rule.threshold - _plan_top_up.available) / v_package.credits) + 1;
  v_plan.package        := v_package.code;
  v_plan.description    := v_package.name;
  v_plan.currency       := v_package.currency;
  v_plan.customer_id    := credits._customer_of(v_rule.account_id);
  v_plan.payment_method := credits._card_of(v_plan.customer_id);
  v_plan.wait_until     := credits._wait_for_card(v_rule, v_plan.payment_method);
  v_plan.reason := case
    when v_status <> 'active'                                                then 'account_' || v_status
    when not v_package.active or v_package.price = 0                         then 'package_not_sold'
    when v_package.currency <> v_rule.currency                               then 'currency_changed'
    when v_plan.payment_method is null                                       then 'card_missing'
    when credits._is_disconnected(credits._home_of('customer', v_plan.customer_id))
                                                                             then 'stripe_account_disconnected'
    when v_plan.wait_until > credits.now()                                   then 'waits'
    -- Stripe takes amounts of eight digits.
    when v_packs * v_package.price >= 1e8 or v_packs * v_package.credits >= 1e12 or v_packs > 999999
                                                                             then 'amount_too_large'
    when credits._topped_up(v_rule.account_id, '30 days') + v_packs * v_package.price > v_rule.monthly_cap
                                                                             then 'monthly_cap'
    when credits._topped_up(v_rule.account_id, '24 hours') + v_packs * v_package.price > v_rule.daily_cap
                                                                             then 'daily_cap' end;
  v_plan.quantity       := least(v_packs, 999999);
  v_plan.credits        := v_package.credits * v_plan.quantity;
  v_plan.amount         := least(v_package.price::numeric * v_plan.quantity, 1e18);
  return v_plan;
end $$;

-- The price and the credits of this moment are frozen in the purchase.
create or replace function credits._start_top_up(
  rule      credits.auto_topups,
  plan      credits.top_up_plan,
  available numeric
)
returns void
language plpgsql
as $$
declare
  v_plan     credits.top_up_plan := _start_top_up.plan;
  v_account  text := (_start_top_up.rule).account_id;
  v_id       text := gen_random_uuid();
  v_purchase bigint;
begin
  insert into credits.purchases as p (account_id, package, quantity, credits, amount, amount_subtotal, currency,
    stripe_customer_id, created_at)
  values (v_account, v_plan.package, v_plan.quantity, v_plan.credits, v_plan.amount, v_plan.amount, v_plan.currency,
          v_plan.customer_id, credits.now())
  returning p.purchase_id into v_purchase;
  insert into credits.top_ups (account_id, top_up_id, purchase_id, available, customer_id, payment_method, created_at)
  values (v_account, v_id, v_purchase, _start_top_up.available, v_plan.customer_id, v_plan.payment_method, credits.now());
  perform credits._request('top_up', v_id, 'post', '/v1/payment_intents', jsonb_build_object(
    'amount', v_plan.amount, 'currency', v_plan.currency, 'customer', v_plan.customer_id,
    'payment_method', v_plan.payment_method, 'description', v_plan.description,
    'automatic_payment_methods', jsonb_build_object('enabled', true, 'allow_redirects', 'never'),
    'confirm', true, 'off_session', true, 'error_on_requires_action', true,
    'metadata', jsonb_build_object('account_id', v_account, 'top_up_id', v_id, 'purchase_id', v_purchase::text,
                                   'package', v_plan.package, 'quantity', v_plan.quantity::text)), v_account,
    stripe_account => credits._home_of('customer', v_plan.customer_id));
  update credits.auto_topups r set check_at = null where r.account_id = v_account;
  perform credits._arm_top_up(v_account);
  perform credits._notify(v_account, 'top_up_started', v_id, jsonb_build_object(
    'top_up_id', v_id, 'purchase_id', v_purchase, 'available', _start_top_up.available,
    'threshold', (_start_top_up.rule).threshold, 'package', v_plan.package, 'quantity', v_plan.quantity,
    'credits', trim_scale(v_plan.credits), 'amount', v_plan.amount, 'currency', v_plan.currency));
end $$;

-- Nothing is bought now: told once for each reason, until the next attempt or another rule.
create or replace function credits._put_off(
  rule      credits.auto_topups,
  plan      credits.top_up_plan,
  available numeric
)
returns void
language plpgsql
as $$
declare
  v_rule credits.auto_topups := _put_off.rule;
  v_plan credits.top_up_plan := _put_off.plan;
begin
  update credits.auto_topups r
     set check_at = case v_plan.reason when 'waits'          then v_plan.wait_until
                                       when 'account_closed' then 'infinity'
                                       else credits.now() + greatest(v_rule.cool_down, '1 hour') end
   where r.account_id = v_rule.account_id;
  if v_plan.reason <> 'waits' then
    perform credits._notify(v_rule.account_id, 'top_up_refused',
      concat_ws(':', v_rule.account_id, v_plan.reason, extract(epoch from v_rule.updated_at),
                (select extract(epoch from max(t.created_at)) from credits.top_ups t where t.account_id = v_rule.account_id)),
      jsonb_build_object('reason', v_plan.reason, 'available', _put_off.available, 'threshold', v_rule.threshold,
        'package', v_rule.package, 'quantity', v_plan.quantity, 'amount', v_plan.amount, 'currency', v_plan.currency,
        'monthly_cap', v_rule.monthly_cap, 'daily_cap', v_rule.daily_cap));
  end if;
end $$;
