-- What happens to the grants of a subscription when their time turns: the next is planned, unspent credits roll over, refunds
-- take their share, and what came after the end goes again.

-- Months that have begun and turn out to be worth less, because the subscription had ended before them, or a line had given
-- back before them, and that became known late: what is unspent of the difference goes again, from the latest grant first.
create or replace function credits._take_back_slices(account_id text)
returns void
language plpgsql
as $$
declare
  v_slice record;
  v_entry credits.entries;
  v_plan  credits.plan_grants;
begin
  loop
    select p.grant_id, least(g.remaining + coalesce(c.taken, 0), g.amount - p.moved, w.granted - w.credits) as excess, p.moved
      into v_slice
      from credits.plan_grants p
      join credits.grants g on g.account_id = p.account_id and g.grant_id = p.grant_id
      join credits.allowances a on a.account_id = p.account_id and a.allowance_id = p.allowance_id
      left join credits.clawbacks c on c.account_id = p.account_id and c.grant_id = p.grant_id
      left join credits.subscriptions s on s.account_id = p.account_id and s.subscription_id = p.subscription_id,
           lateral (select case when p.period_start >= s.ended_at then 0
                                else credits._slice_credits(a, p.period_start) end as credits,
                           (select sum(h.amount - n.moved)
                              from credits.plan_grants n
                              join credits.grants h on h.account_id = n.account_id and h.grant_id = n.grant_id
                             where n.account_id = p.account_id and n.allowance_id = p.allowance_id and n.slice = p.slice
                               and h.status <> 'pending') as granted) w
     where p.account_id = _take_back_slices.account_id and p.slice > 0 and g.expires_at > credits.now()
       and g.status <> 'pending' and g.remaining + coalesce(c.taken, 0) > 0 and g.amount > p.moved and w.granted > w.credits
     order by p.grant_id desc
     limit 1;
    exit when not found;
    update credits.plan_grants p
       set moved = p.moved + v_slice.excess
     where p.account_id = _take_back_slices.account_id and p.grant_id = v_slice.grant_id
    returning p.* into v_plan;
    perform credits._claw_slice(_take_back_slices.account_id, v_plan);  -- of what is no longer bought nothing is clawed back
    v_entry.account_id  := _take_back_slices.account_id;
    v_entry.operation   := 'take_back';
    v_entry.key         := format('take_back:%s:%s', v_slice.grant_id, trim_scale(v_slice.moved + v_slice.excess));
    v_entry.fingerprint := jsonb_build_object('grant_id', v_slice.grant_id);
    perform credits._revoke(credits._balance(_take_back_slices.account_id), v_entry, v_slice.grant_id, v_slice.excess);
    perform credits._grant_period(v_plan.account_id, v_plan.subscription_id, v_plan.period_end);  -- others may have room now
  end loop;
end $$;

-- Unspent credits of a period that has ended come again with the next one, as far as the plan lets them: what expired at the
-- boundary is the measure, so late bookings add to it.
create or replace function credits._roll_over(
  account_id      text,
  subscription_id text,
  at              timestamptz
)
returns void
language plpgsql
as $$
declare
  v_plan   credits.plans;
  v_next   timestamptz;
  v_target numeric;
  v_done   numeric;
begin
  select p.* into v_plan
    from credits.subscriptions s
    join credits.plans p on p.code = s.plan
    join credits.accounts a on a.account_id = s.account_id and a.status <> 'closed'
   where s.account_id = _roll_over.account_id and s.subscription_id = _roll_over.subscription_id and p.rollover <> 'none';
  if not found then
    return;
  end if;
  select min(p.period_end) into v_next
    from credits.plan_grants p
    join credits.grants g on g.account_id = p.account_id and g.grant_id = p.grant_id
   where p.account_id = _roll_over.account_id and p.subscription_id = _roll_over.subscription_id
     and p.period_start = _roll_over.at and p.allowance_id <> 'rollover' and g.status <> 'pending' and g.kind = 'plan';
  select least(coalesce(sum(g.expired) filter (where p.period_end = _roll_over.at and g.kind = 'plan'), 0), v_plan.rollover_cap),
         coalesce(sum(g.amount) filter (where p.period_start = _roll_over.at and p.allowance_id = 'rollover'), 0)
    into v_target, v_done
    from credits.plan_grants p
    join credits.grants g on g.account_id = p.account_id and g.grant_id = p.grant_id
   where p.account_id = _roll_over.account_id and p.subscription_id = _roll_over.subscription_id
     and _roll_over.at in (p.period_end, p.period_start);
  if v_target > v_done and v_next is not null then  -- what is too much for one grant comes with the next: a grant asks again
    perform credits._grant_slice(_roll_over.account_id, _roll_over.subscription_id, 'rollover', null, 0,
      least(v_target - v_done, 999999999999.999999), 'plan', v_plan.code, _roll_over.at, v_next, v_next,
      format('rollover:%s:%s:%s', _roll_over.subscription_id, floor(extract(epoch from _roll_over.at)), trim_scale(v_done)));
  end if;
end $$;

-- What has rolled over into the present month of an account's own plan, as far as nobody has booked it: month by month, since
-- what is left of one is the measure of the next.
create or replace function credits._rolled_over(
  balance credits.balances,
  at      timestamptz
)
returns setof credits.lot
language plpgsql
stable
as $$
declare
  v_at    timestamptz := _rolled_over.at;
  v_sub   credits.subscriptions;
  v_next  credits.subscriptions;
  v_plan  credits.plans;
  v_month credits.wanted_slice;
  v_freed credits.freed_slice[];  -- asked for once: it goes through all the months itself
  v_carry numeric := 0;
begin
  if (_rolled_over.balance).next_due_at > v_at then
    return;
  end if;
  select s.* into v_sub
    from credits.subscriptions s
    join credits.accounts a on a.account_id = s.account_id and a.status <> 'closed'
   where s.account_id = (_rolled_over.balance).account_id and s.source = 'internal' and s.state in ('active', 'canceling');
  if not found then
    return;
  end if;
  v_freed := array(select d from credits._freed_at(_rolled_over.balance, v_at) d);
  v_carry := credits._returned_late(v_sub, v_freed);
  while v_sub.period_end <= v_at and v_sub.state in ('active', 'canceling') loop
    select p.* into v_plan from credits.plans p where p.code = v_sub.plan;
    v_next  := credits._internal_at(v_sub, v_sub.period_end);
    v_carry := v_carry + credits._unspent(v_sub, v_sub.period_end, v_freed);
    if not credits._granted_for(v_sub) and not credits._is_resting(v_sub, v_at) then
      v_month := credits._month_of(v_sub, v_sub.plan, v_sub.period_start, v_sub.period_end);
      v_carry := v_carry + v_month.amount
                 - coalesce((select sum(d.paid) from unnest(v_freed) d where d.month_key = v_month.key), 0);
    end if;
    v_carry := case when v_plan.rollover = 'none' or not credits._goes_on(v_next) then 0
                    else least(v_carry, v_plan.rollover_cap) end;
    v_sub := v_next;
  end loop;
  if v_carry > 0 then
    return next row(null, 'plan', null, v_sub.period_end, v_carry, 0)::credits.lot;
  end if;
end $$;

-- Whether a month that has begun has credits, with which others can roll over into it.
create or replace function credits._goes_on(subscription credits.subscriptions)
returns boolean
language sql
stable
as $$
  select (_goes_on.subscription).state in ('active', 'canceling')
         and (credits._granted_for(_goes_on.subscription)
              or credits._plan_credits((_goes_on.subscription).plan) > 0
                 and not credits._is_resting(_goes_on.subscription, (_goes_on.subscription).period_start))
$$;

-- What has expired, or will have, of the plan credits that end at a boundary, with the holds that come back.
drop function if exists credits._unspent(credits.balances, credits.subscriptions, timestamptz, timestamptz);
create or replace function credits._unspent(
  subscription credits.subscriptions,
  ends         timestamptz,
  freed        credits.freed_slice[]
)
returns numeric
language sql
stable
as $$
  select coalesce(sum(g.expired + g.remaining + coalesce(f.free, 0)), 0)
    from credits.plan_grants p
    join credits.grants g on g.account_id = p.account_id and g.grant_id = p.grant_id and g.kind = 'plan'
    left join (select d.grant_id, sum(case when d.returned then d.amount else 0 end - d.paid) as free
                 from unnest(_unspent.freed) d
                group by d.grant_id) f on f.grant_id = g.grant_id
   where p.account_id = (_unspent.subscription).account_id and p.subscription_id = (_unspent.subscription).subscription_id
     and p.period_end = _unspent.ends
$$;

-- Holds of months before the present one that have run out: more of these months rolls over than was booked.
drop function if exists credits._returned_late(credits.balances, credits.subscriptions, timestamptz);
create or replace function credits._returned_late(
  subscription credits.subscriptions,
  freed        credits.freed_slice[]
)
returns numeric
language sql
stable
as $$
  select coalesce((
    select c.remaining
      from (select (_returned_late.subscription).*) s,
           lateral credits._carried(_returned_late.subscription, _returned_late.freed, '{}', 'infinity', s.period_start) c
     where c.expires_at = s.period_end), 0)
$$;

-- The ends of the months of which holds have come back, the first one first.
create or replace function credits._back_from(
  subscription credits.subscriptions,
  freed        credits.freed_slice[]
)
returns setof timestamptz
language sql
stable
as $$
  select distinct p.period_end
    from unnest(_back_from.freed) d
    join credits.plan_grants p on p.account_id = (_back_from.subscription).account_id and p.grant_id = d.grant_id
   where p.subscription_id = (_back_from.subscription).subscription_id and d.returned and d.amount > d.paid
   order by p.period_end
$$;

-- A grant has started or ended at its time: if a subscription made it, the next slice is planned, refunds of what paid for it
-- take their share, and what is left rolls over. Says whether more may fall due now.
create or replace function credits._after_turn(
  account_id text,
  grant_id   bigint,
  at         timestamptz
)
returns boolean
language plpgsql
as $$
declare
  v_slice credits.plan_grants;
  v_next  boolean;
begin
  select p.* into v_slice
    from credits.plan_grants p
   where p.account_id = _after_turn.account_id and p.grant_id = _after_turn.grant_id;
  if not found then
    return false;
  end if;
  v_next := v_slice.period_start = _after_turn.at and v_slice.slice > 0;
  if v_next then
    perform credits._refresh_plan(_after_turn.account_id, _after_turn.at);
  end if;
  if v_slice.period_start = _after_turn.at and v_slice.invoice_id is not null then
    perform credits._claw_slice(_after_turn.account_id, v_slice);
  end if;
  if not credits._ends_with_others(_after_turn.account_id, v_slice.subscription_id, _after_turn.at) then
    perform credits._roll_over(_after_turn.account_id, v_slice.subscription_id, _after_turn.at);
  end if;
  return v_next;
end $$;

-- Whether more of a subscription's plan credits are about to end at the same moment. The last ones roll over together: one by one
-- there would be a grant more each month.
create or replace function credits._ends_with_others(
  account_id      text,
  subscription_id text,
  at              timestamptz
)
returns boolean
language sql
stable
as $$
  select exists (
    select from credits.grants g
      join credits.plan_grants p on p.account_id = g.account_id and p.grant_id = g.grant_id
     where g.account_id = _ends_with_others.account_id and g.status = 'active' and g.kind = 'plan' and g.remaining > 0
       and g.expires_at <= _ends_with_others.at
       and p.subscription_id = _ends_with_others.subscription_id and p.period_end = _ends_with_others.at)
$$;

create or replace function credits._claw_slice(
  account_id text,
  slice      credits.plan_grants
)
returns jsonb
language sql
as $$
  select credits._claw_back(_claw_slice.account_id, (_claw_slice.slice).grant_id, 'invoice', (_claw_slice.slice).invoice_id,
                            credits._share(t.refunded + t.lost, t.captured), credits._share(t.refunded + t.lost + t.open, t.captured))
    from credits._payment_totals('invoice', (_claw_slice.slice).invoice_id) t
$$;
