-- Plans of our own: an account has at most one, beside its subscriptions of Stripe. Its months are counted from the day it
-- began, in the account's time zone. While a subscription of Stripe is live, its credits rest.

create or replace function credits.change_plan(
  account_id text,
  plan       text,
  at         text default 'now'
)
returns credits.subscription_state_result
language plpgsql
security definer
set search_path = pg_catalog, pg_temp
as $$
declare
  v_at  text := coalesce(credits._check_word(change_plan.at, 'at', '{now,period_end}'), 'now');
  v_sub credits.subscriptions;
begin
  perform credits._lock_account(change_plan.account_id);
  perform credits._check_open(change_plan.account_id);
  v_sub := credits._own_subscription(change_plan.account_id);
  if not exists (select from credits.plans p
                  where p.code = change_plan.plan and (p.active or p.code = v_sub.plan)) then  -- who stays takes nothing
    perform credits._fail(404, 'plan_not_found', jsonb_build_object('plan', change_plan.plan));
  end if;

  if v_sub.source = 'stripe' then
    perform credits._request_plan(v_sub, change_plan.plan, v_at);
  elsif v_sub.subscription_id is null then
    perform credits._start_internal(change_plan.account_id, change_plan.plan, 'change_plan');
  else
    perform credits._change_own(v_sub, change_plan.plan, v_at);
  end if;
  perform credits._refresh_plan(change_plan.account_id);
  return credits.get_subscription_state(change_plan.account_id);
end $$;
comment on function credits.change_plan(text, text, text) is
'Changes the plan of an account, or gives it its first one.

at is now or period_end. Now grants the difference to a larger plan for the rest of the period, once: going down and up again
refills nothing, and nothing is taken back. At period_end the new plan is pending until then; a change back to the present
plan withdraws it, also where that is sold no more. A plan that was canceled to the end of its period and gets another one for
then goes on. The subscription of a Stripe customer is changed at Stripe: the request waits in stripe_requests, and the state
follows when Stripe says so. Of several words before Stripe was asked the last one counts; while it is being asked another one
is refused.
Errors: 400 invalid_request, 404 account_not_found, plan_not_found, price_not_found, 409 illegal_transition,
plan_change_in_progress, 423 account_closed.';

create or replace function credits.cancel_plan(
  account_id text,
  at         text default 'period_end'
)
returns credits.subscription_state_result
language plpgsql
security definer
set search_path = pg_catalog, pg_temp
as $$
declare
  v_at  text := coalesce(credits._check_word(cancel_plan.at, 'at', '{now,period_end}'), 'period_end');
  v_sub credits.subscriptions;
begin
  perform credits._lock_account(cancel_plan.account_id);
  v_sub := credits._check_own_subscription(cancel_plan.account_id);
  if v_sub.state = 'canceled' then
    return credits.get_subscription_state(cancel_plan.account_id);
  elsif v_sub.source = 'stripe' then
    perform credits._request_cancel(v_sub, v_at);
  elsif v_at = 'period_end' then
    perform credits._advance(v_sub, 'canceling', 'cancel_plan');
    update credits.subscriptions s
       set cancel_at = s.period_end, cancel_at_period_end = true, pending_plan = null, pending_at = null
     where s.account_id = v_sub.account_id and s.subscription_id = v_sub.subscription_id;
  else
    perform credits._end_internal(v_sub, credits.now(), 'cancel_plan');
  end if;
  perform credits._refresh_plan(cancel_plan.account_id);
  return credits.get_subscription_state(cancel_plan.account_id);
end $$;
comment on function credits.cancel_plan(text, text) is
'Cancels the plan of an account, at period_end or now.

Credits stay: paid ones for good, those of the plan until they expire with the period. Canceling again changes nothing, also
when the plan is over. The subscription of a Stripe customer is canceled at Stripe: the request waits in stripe_requests, behind
one that lets go of its schedule, if it has one. A plan that was to come at the period''s end is not pending any more.
Errors: 400 invalid_request, 404 account_not_found, subscription_not_found, 409 plan_change_in_progress.';

create or replace function credits.resume_plan(account_id text)
returns credits.subscription_state_result
language plpgsql
security definer
set search_path = pg_catalog, pg_temp
as $$
declare
  v_sub credits.subscriptions;
begin
  perform credits._lock_account(resume_plan.account_id);
  v_sub := credits._check_own_subscription(resume_plan.account_id);
  if v_sub.source = 'stripe' then
    perform credits._request_resume(v_sub);
  else
    perform credits._advance(v_sub, 'active', 'resume_plan');
    update credits.subscriptions s
       set cancel_at = null, cancel_at_period_end = false
     where s.account_id = v_sub.account_id and s.subscription_id = v_sub.subscription_id;
  end if;
  perform credits._refresh_plan(resume_plan.account_id);
  return credits.get_subscription_state(resume_plan.account_id);
end $$;
comment on function credits.resume_plan(text) is
'Takes back a cancellation that has not come into effect. Resuming an active plan changes nothing.

A plan that is over starts anew with change_plan. The subscription of a Stripe customer is resumed at Stripe: the request
waits in stripe_requests.
Errors: 400 invalid_request, 404 account_not_found, subscription_not_found, 409 illegal_transition.';

create or replace function credits.set_time_zone(
  account_id text,
  time_zone  text
)
returns text
language plpgsql
security definer
set search_path = pg_catalog, pg_temp
as $$
begin
  if not exists (select from pg_timezone_names z where z.name = set_time_zone.time_zone) then
    perform credits._fail(400, 'invalid_request', jsonb_build_object('argument', 'time_zone'),
      'time_zone is a name such as Europe/Berlin.');
  end if;
  perform credits._lock_account(set_time_zone.account_id);
  update credits.accounts a set time_zone = set_time_zone.time_zone where a.account_id = set_time_zone.account_id;
  perform credits._refresh_plan(set_time_zone.account_id);
  perform credits._count_anew(set_time_zone.account_id);
  perform credits._move_windows(set_time_zone.account_id, set_time_zone.time_zone, credits.now());
  return set_time_zone.time_zone;
end $$;
comment on function credits.set_time_zone(text, text) is
'Sets the time zone in which the months of an account''s own plan begin and end. UTC by default.

It counts from the next month on; the present one ends as it was announced. The calendar months in which
members have limits follow at once: what each has used is counted anew.
Errors: 400 invalid_request, 404 account_not_found.';

-- Helpers -----------------------------------------------------------------------------------------------------------

drop function if exists credits._check_when(text);

-- What change_plan and its like are about: the live subscription of Stripe, else the plan of our own.
create or replace function credits._own_subscription(account_id text)
returns credits.subscriptions
language sql
stable
as $$
  select s.*
    from credits.subscriptions s
    join credits.subscription_states t on t.state = s.state
   where s.account_id = _own_subscription.account_id and not t.terminal
   order by s.source = 'internal', t.rank, s.created_at desc
   limit 1
$$;

-- Without a live one, the account's own plan that was the last to end: it can be told that it is over.
create or replace function credits._check_own_subscription(account_id text)
returns credits.subscriptions
language plpgsql
stable
as $$
declare
  v_sub credits.subscriptions := credits._own_subscription(_check_own_subscription.account_id);
begin
  if v_sub.subscription_id is null then
    select s.* into v_sub
      from credits.subscriptions s
     where s.account_id = _check_own_subscription.account_id and s.source = 'internal'
     order by s.created_at desc, s.subscription_id desc
     limit 1;
  end if;
  if v_sub.subscription_id is null then
    perform credits._fail(404, 'subscription_not_found',
      jsonb_build_object('account_id', _check_own_subscription.account_id), 'The account has no plan that could be changed.');
  end if;
  return v_sub;
end $$;

-- A plan that starts in a period that an ended one has paid out already goes on with that period, as if the plan had been
-- changed: otherwise canceling and starting again would be a well.
create or replace function credits._start_internal(
  account_id text,
  plan       text,
  cause      text
)
returns void
language plpgsql
as $$
declare
  v_now  timestamptz := credits.now();
  v_sub  credits.subscriptions;
  v_last credits.subscriptions;
begin
  select s.* into v_last
    from credits.subscriptions s
   where s.account_id = _start_internal.account_id and s.source = 'internal' and s.period_end > v_now
   order by s.created_at desc, s.subscription_id desc
   limit 1;
  insert into credits.subscriptions as s (account_id, subscription_id, source, plan, anchor_at, period_start, period_end,
    highest_credits, created_at)
  select _start_internal.account_id,
         'plan-' || (select count(*) + 1 from credits.subscriptions o
                      where o.account_id = _start_internal.account_id and o.source = 'internal'),
         'internal', coalesce(v_last.plan, _start_internal.plan), coalesce(v_last.anchor_at, v_now),
         coalesce(v_last.period_start, v_now), coalesce(v_last.period_end, credits._month(v_now, 1, a.time_zone)),
         v_last.highest_credits, v_now
    from credits.accounts a
   where a.account_id = _start_internal.account_id
  returning s.* into v_sub;
  update credits.balances b
     set next_due_at = least(b.next_due_at, v_sub.period_end)
   where b.account_id = _start_internal.account_id;
  perform credits._advance(v_sub, 'active', _start_internal.cause);
  if v_sub.plan <> _start_internal.plan then
    v_sub.state := 'active';
    perform credits._change_internal(v_sub, _start_internal.plan);
  end if;
end $$;

create or replace function credits._end_internal(
  subscription credits.subscriptions,
  at           timestamptz,
  cause        text
)
returns void
language plpgsql
as $$
begin
  perform credits._advance(_end_internal.subscription, 'canceled', _end_internal.cause);
  update credits.subscriptions s
     set ended_at = _end_internal.at, pending_plan = null, pending_at = null
   where s.account_id = (_end_internal.subscription).account_id
     and s.subscription_id = (_end_internal.subscription).subscription_id;
end $$;

-- A plan that is about to end may be changed for the time that is left; whoever wants another one after that wants it to go on.
create or replace function credits._change_own(
  subscription credits.subscriptions,
  plan         text,
  at           text
)
returns void
language plpgsql
as $$
declare
  v_sub credits.subscriptions := _change_own.subscription;
begin
  if _change_own.at = 'now' and v_sub.plan <> _change_own.plan then
    perform credits._change_internal(v_sub, _change_own.plan);
    return;
  elsif _change_own.at = 'period_end' then
    perform credits._advance(v_sub, 'active', 'change_plan');
  end if;
  update credits.subscriptions s
     set cancel_at            = case when _change_own.at = 'now' then s.cancel_at end,
         cancel_at_period_end = s.cancel_at_period_end and _change_own.at = 'now',
         pending_plan         = case when v_sub.plan <> _change_own.plan then _change_own.plan end,
         pending_at           = case when v_sub.plan <> _change_own.plan then s.period_end end
   where s.account_id = v_sub.account_id and s.subscription_id = v_sub.subscription_id;
end $$;

-- The difference to a larger plan, for the rest of the period. Larger is measured against the largest that the period has
-- seen, so a way down and up again brings nothing. What the catalogue makes of a plan meanwhile counts from the next month on:
-- this one is what was granted for it.
create or replace function credits._change_internal(
  subscription credits.subscriptions,
  plan         text
)
returns void
language plpgsql
as $$
declare
  v_sub    credits.subscriptions := _change_internal.subscription;
  v_now    timestamptz := credits.now();
  v_highest numeric := coalesce(v_sub.highest_credits, credits._month_granted(v_sub), credits._plan_credits(v_sub.plan));
  v_new     numeric := credits._plan_credits(_change_internal.plan);
  v_more    numeric := round((v_new - v_highest) * extract(epoch from v_sub.period_end - v_now)
                             / extract(epoch from v_sub.period_end - v_sub.period_start), 6);
begin
  update credits.subscriptions s
     set plan = _change_internal.plan, highest_credits = greatest(v_highest, v_new), pending_plan = null, pending_at = null
   where s.account_id = v_sub.account_id and s.subscription_id = v_sub.subscription_id;
  insert into credits.subscription_history (account_id, subscription_id, from_state, to_state, plan, unexpected, cause, created_at)
  values (v_sub.account_id, v_sub.subscription_id, v_sub.state, v_sub.state, _change_internal.plan, false, 'change_plan', v_now);
  if v_more > 0 and not credits._is_resting(v_sub) then
    perform credits._grant_slice(v_sub.account_id, v_sub.subscription_id, 'plan', null, 0, v_more, 'plan',
      _change_internal.plan, v_sub.period_start, v_sub.period_end, v_sub.period_end,
      format('plan:%s:%s:%s:%s', v_sub.subscription_id, floor(extract(epoch from v_sub.period_start)), _change_internal.plan,
             trim_scale(v_new)));  -- a plan may be reached twice, the second time with more
  end if;
end $$;
