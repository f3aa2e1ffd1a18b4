-- Automatic top-up: what its rule and its attempts say at a moment, and how a rule is armed, paused and checked.
-- All of it is read from rows; the caller holds the lock of the account.

create or replace function credits._open_top_up(account_id text)
returns text
language sql
stable
as $$
  select t.top_up_id
    from credits.top_ups t
   where t.account_id = _open_top_up.account_id and t.state in ('queued', 'processing', 'requires_action')
$$;

-- The card that is charged without the buyer: the default one, else the last one that was attached, which is where Checkout
-- leaves it. News of an older one, as when its bank renews it, do not make it that.
create or replace function credits._card_of(customer_id text)
returns text
language sql
stable
as $$
  select coalesce(
    (select c.default_payment_method from credits.stripe_customers c where c.customer_id = _card_of.customer_id),
    (select o.object_id
       from credits.stripe_objects o
      where o.kind = 'payment_method' and o.ref = _card_of.customer_id
        and (credits._shape_owner(o.snapshot)).customer_id = _card_of.customer_id
      order by coalesce(credits._made_at(o.snapshot), o.as_of) desc, o.object_id
      limit 1))
$$;

-- What was asked of cards within a time before now, in the currency of the rule; what came to nothing does not count.
create or replace function credits._topped_up(
  account_id text,
  within     interval
)
returns numeric
language sql
stable
as $$
  select coalesce(sum(p.amount), 0)
    from credits.top_ups t
    join credits.auto_topups r on r.account_id = t.account_id
    join credits.purchases p on p.account_id = t.account_id and p.purchase_id = t.purchase_id and p.currency = r.currency
   where t.account_id = _topped_up.account_id and t.state <> 'failed'
     and t.created_at > credits.now() - credits._exact(_topped_up.within)
$$;

-- Until when nothing is tried: the cool-down after the last attempt, and the rest of a card that was asked in vain, whatever other
-- cards were asked since. An attempt that was no payment at Stripe asked no card.
create or replace function credits._wait_for_card(
  rule           credits.auto_topups,
  payment_method text
)
returns timestamptz
language sql
stable
as $$
  select greatest(
    (select max(t.created_at) from credits.top_ups t where t.account_id = r.account_id) + credits._exact(r.cool_down),
    (select max(t.finished_at)
       from credits.top_ups t
      where t.account_id = r.account_id and t.payment_method = _wait_for_card.payment_method and t.state = 'failed'
        and (t.declined or t.payment_intent_id is not null))
    + credits._exact((credits._setting('top_up_decline_wait') #>> '{}')::interval))
    from (select (_wait_for_card.rule).*) r
$$;

-- The hot path looks at one column: there is nothing to look for while a rule is off, paused or at work.
create or replace function credits._arm_top_up(account_id text)
returns void
language plpgsql
as $$
declare
  v_below numeric;
begin
  select r.threshold into v_below
    from credits.auto_topups r
   where r.account_id = _arm_top_up.account_id and r.enabled and r.paused_reason is null
     and credits._open_top_up(r.account_id) is null;
  update credits.balances b
     set topup_below = v_below
   where b.account_id = _arm_top_up.account_id and b.topup_below is distinct from v_below;
end $$;

-- What was held back by an attempt, or a pause, is looked at now.
create or replace function credits._end_attempt(account_id text)
returns void
language plpgsql
as $$
begin
  perform credits._arm_top_up(_end_attempt.account_id);
  perform credits._after_debit(_end_attempt.account_id);
end $$;

-- What has expired is no debit: the job looks, or the debit that found it.
create or replace function credits._look_at_top_up(account_id text)
returns void
language sql
as $$
  update credits.auto_topups r
     set check_at = credits.now()
   where r.account_id = _look_at_top_up.account_id and r.check_at is null
$$;

-- A card that is declined says nothing of money that went back: that pause stays, and the card is kept under it. What a card said
-- counts for a rule that is off, too: else to remove and set it again would ask the card again.
create or replace function credits._pause_top_up(
  account_id text,
  reason     text,
  card       text default null
)
returns void
language plpgsql
as $$
declare
  v_now timestamptz := credits.now();
begin
  update credits.auto_topups r
     set paused_reason = _pause_top_up.reason, paused_card = coalesce(_pause_top_up.card, r.paused_card), paused_at = v_now,
         check_at = null
   where r.account_id = _pause_top_up.account_id
     and case when _pause_top_up.card is null then r.enabled
              else r.paused_reason is null or credits._came_of_card(r.paused_reason) end;
  if found then
    perform credits._notify(_pause_top_up.account_id, 'top_up_paused',
      concat_ws(':', _pause_top_up.account_id, _pause_top_up.reason, extract(epoch from v_now)),
      jsonb_build_object('reason', _pause_top_up.reason, 'payment_method', _pause_top_up.card));
  else
    update credits.auto_topups r
       set paused_card = _pause_top_up.card
     where r.account_id = _pause_top_up.account_id and r.paused_reason is not null and _pause_top_up.card is not null;
  end if;
  perform credits._withdraw_top_up(_pause_top_up.account_id);
  perform credits._arm_top_up(_pause_top_up.account_id);
end $$;

-- What no worker has sent yet is not sent any more.
create or replace function credits._withdraw_top_up(account_id text)
returns void
language plpgsql
as $$
declare
  v_top_up credits.top_ups;
begin
  select t.* into v_top_up
    from credits.top_ups t
   where t.account_id = _withdraw_top_up.account_id and t.state = 'queued';
  update credits.stripe_requests r
     set state = 'failed', finished_at = credits.now(), error_type = 'withdrawn'
   where r.request_id = (select q.request_id from credits.stripe_requests q
                          where q.purpose = 'top_up' and q.ref = v_top_up.top_up_id and q.state = 'queued'
                            and q.first_sent_at is null
                            for no key update skip locked);
  if found then
    v_top_up.error_code := 'withdrawn';
    perform credits._close_top_up(v_top_up);
  end if;
end $$;

-- Closes an attempt that came to nothing, once. Answers nothing if it was closed before.
create or replace function credits._close_top_up(top_up credits.top_ups)
returns credits.top_ups
language plpgsql
as $$
declare
  v_top_up credits.top_ups := _close_top_up.top_up;
begin
  update credits.top_ups t
     set state = 'failed', finished_at = credits.now(), payment_intent_id = v_top_up.payment_intent_id,
         declined = v_top_up.declined, error_code = v_top_up.error_code, decline_code = v_top_up.decline_code,
         advice_code = v_top_up.advice_code
   where t.account_id = v_top_up.account_id and t.top_up_id = v_top_up.top_up_id and t.finished_at is null
  returning t.* into v_top_up;
  if v_top_up.top_up_id is not null then
    update credits.purchases p
       set status = 'failed', stripe_payment_intent_id = v_top_up.payment_intent_id
     where p.account_id = v_top_up.account_id and p.purchase_id = v_top_up.purchase_id;
    perform credits._close_unknown(v_top_up.top_up_id);
    perform credits._tell_top_up(v_top_up, 'top_up_failed');
  end if;
  return v_top_up;
end $$;

-- A payment that waits for its buyer would wait for ever: Stripe is asked to let go of it.
create or replace function credits._let_go(account_id text)
returns void
language sql
as $$
  select credits._request('cancel_top_up', t.top_up_id, 'post', '/v1/payment_intents/' || t.payment_intent_id || '/cancel',
                          '{"cancellation_reason": "abandoned"}', t.account_id,
                          stripe_account => credits._home_of('payment_intent', t.payment_intent_id))
    from credits.top_ups t
   where t.account_id = _let_go.account_id and t.state = 'requires_action'
     and credits._open_request('cancel_top_up', t.top_up_id) is null
$$;

-- Card and rule are still those that it was made for. What changes them later lets go of it by itself.
create or replace function credits._is_wanted(top_up credits.top_ups)
returns boolean
language sql
stable
as $$
  select exists (
    select from credits.auto_topups r
     where r.account_id = (_is_wanted.top_up).account_id and r.enabled and r.updated_at <= (_is_wanted.top_up).created_at
       and (_is_wanted.top_up).payment_method = credits._card_of(credits._customer_of(r.account_id)))
$$;

create or replace function credits._tell_top_up(
  top_up credits.top_ups,
  type   text
)
returns void
language sql
as $$
  select credits._notify(p.account_id, _tell_top_up.type, (_tell_top_up.top_up).top_up_id, jsonb_strip_nulls(jsonb_build_object(
           'top_up_id', (_tell_top_up.top_up).top_up_id, 'purchase_id', p.purchase_id, 'package', p.package,
           'quantity', p.quantity, 'credits', trim_scale(p.credits), 'amount', p.amount, 'currency', p.currency,
           'payment_method', (_tell_top_up.top_up).payment_method,
           'payment_intent_id', (_tell_top_up.top_up).payment_intent_id, 'code', (_tell_top_up.top_up).error_code,
           'decline_code', (_tell_top_up.top_up).decline_code, 'advice_code', (_tell_top_up.top_up).advice_code)))
    from credits.purchases p
   where p.account_id = (_tell_top_up.top_up).account_id and p.purchase_id = (_tell_top_up.top_up).purchase_id
$$;

-- The currency that caps are counted in.
create or replace function credits._check_auto_topup(
  package     text,
  monthly_cap bigint,
  daily_cap   bigint,
  cool_down   interval
)
returns text
language plpgsql
stable
as $$
declare
  v_package credits.packages;
  v_bad     text;
begin
  select p.* into v_package from credits.packages p where p.code = _check_auto_topup.package and p.active;
  if not found then
    perform credits._fail(404, 'package_not_found', jsonb_build_object('package', _check_auto_topup.package));
  end if;
  v_bad := case
    when v_package.price = 0                                                               then 'package'
    when (_check_auto_topup.monthly_cap >= v_package.price) is not true                    then 'monthly_cap'
    when _check_auto_topup.daily_cap < v_package.price                                     then 'daily_cap'
    when _check_auto_topup.cool_down not between interval '1 minute' and interval '30 days' then 'cool_down' end;
  if v_bad is not null then
    perform credits._fail(400, 'invalid_request', jsonb_build_object('argument', v_bad),
      'The package has a price, a cap buys one of it at least, and cool_down is from 1 minute to 30 days.');
  end if;
  return v_package.currency;
end $$;

create or replace function credits._check_card(account_id text)
returns text
language plpgsql
stable
as $$
declare
  v_customer text := credits._customer_of(_check_card.account_id);
  v_card     text := credits._card_of(v_customer);
begin
  if v_customer is null then
    perform credits._fail(404, 'customer_not_found', jsonb_build_object('account_id', _check_card.account_id),
      'The account has no customer at Stripe: create_checkout(save_card => true) makes one and keeps its card.');
  elsif v_card is null then
    perform credits._fail(409, 'card_missing',
      jsonb_build_object('account_id', _check_card.account_id, 'customer_id', v_customer),
      'No card is saved: create_checkout(save_card => true) keeps one, and so does the customer portal.');
  end if;
  return v_card;
end $$;

create or replace function credits._auto_topup_result(account_id text)
returns credits.auto_topup_result
language sql
stable
as $$
  select row(_auto_topup_result.account_id,
             case when r.enabled is not true then 'off' when r.paused_reason is not null then 'paused' else 'active' end,
             r.paused_reason, trim_scale(r.threshold), r.package, r.monthly_cap, r.daily_cap, r.currency, r.cool_down,
             credits._topped_up(_auto_topup_result.account_id, '30 days')::bigint,
             credits._topped_up(_auto_topup_result.account_id, '24 hours')::bigint,
             credits._card_of(credits._customer_of(_auto_topup_result.account_id)), t.top_up_id,
             case t.state when 'queued' then coalesce(q.state, t.state) else t.state end, r.check_at)::credits.auto_topup_result
    from (select 1) x
    left join credits.auto_topups r on r.account_id = _auto_topup_result.account_id
    left join credits.top_ups t on t.account_id = _auto_topup_result.account_id
                               and t.top_up_id = credits._open_top_up(_auto_topup_result.account_id)
    left join credits.stripe_requests q on q.request_id = credits._open_request('top_up', t.top_up_id)
$$;
