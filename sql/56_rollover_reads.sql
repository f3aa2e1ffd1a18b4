-- What has rolled over, as far as nobody has booked it: reads, which say what _roll_over() will make of it. Plans of our own are
-- followed month by month as they turn; of Stripe's the months are those that lines and late returns tell of.

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

-- What has rolled over into the present months of subscriptions of Stripe, as far as nobody has booked it: their lines may be
-- longer than a month, and what was on hold comes back after the next month was paid.
create or replace function credits._rolled_over_lines(
  balance credits.balances,
  at      timestamptz
)
returns setof credits.lot
language plpgsql
stable
as $$
declare
  v_sub   credits.subscriptions;
  v_freed credits.freed_slice[];
begin
  if (_rolled_over_lines.balance).next_due_at > _rolled_over_lines.at then
    return;
  end if;
  for v_sub in
    select s.*
      from credits.subscriptions s
      join credits.plans p on p.code = s.plan and p.rollover <> 'none'
      join credits.accounts a on a.account_id = s.account_id and a.status <> 'closed'
     where s.account_id = (_rolled_over_lines.balance).account_id and s.source = 'stripe'
  loop
    v_freed := coalesce(v_freed, array(select d from credits._freed_at(_rolled_over_lines.balance, _rolled_over_lines.at) d));
    return query
      select c.*
        from credits._carried(v_sub, v_freed, array(
               select w from credits._silent_months(_rolled_over_lines.balance, _rolled_over_lines.at) w
                where w.subscription_id = v_sub.subscription_id and w.kind = 'plan'),
               (_rolled_over_lines.balance).next_due_at, _rolled_over_lines.at) c
       where c.remaining > 0 and c.expires_at > _rolled_over_lines.at;
  end loop;
end $$;

-- What rolls over into the last month of a subscription by a moment and is not booked: from each month to the next, beginning
-- with the first of which a hold has come back, or that began when more was due, with what nobody has booked of them.
create or replace function credits._carried(
  subscription credits.subscriptions,
  freed        credits.freed_slice[],
  silent       credits.wanted_slice[],
  due_at       timestamptz,
  at           timestamptz
)
returns credits.lot
language plpgsql
stable
as $$
declare
  v_sub   credits.subscriptions := _carried.subscription;
  v_back  timestamptz[] := array(select b.ended_at from credits._back_from(v_sub, _carried.freed) b (ended_at));
  v_month record;
  v_plan  credits.plans;
  v_until timestamptz;  -- the end of the month before
  v_carry numeric := 0;
begin
  for v_month in
    select m.period_start, min(m.period_end) filter (where not m.rolled) as period_end,
           coalesce(sum(m.amount) filter (where m.rolled), 0) as carried
      from (select p.period_start, p.period_end, p.allowance_id = 'rollover' as rolled, g.amount
              from credits.plan_grants p
              join credits.grants g on g.account_id = p.account_id and g.grant_id = p.grant_id and g.kind = 'plan'
             where p.account_id = v_sub.account_id and p.subscription_id = v_sub.subscription_id
            union all
            select w.period_start, w.period_end, false, 0 from unnest(_carried.silent) w) m
     where m.period_start between least(_carried.due_at, v_back[1]) and _carried.at
     group by m.period_start
     order by m.period_start
  loop
    v_carry := case v_until when v_month.period_start then v_carry else 0 end;
    if v_carry > 0 or v_month.period_start >= _carried.due_at or v_month.period_start = any (v_back) then
      v_carry := v_carry + credits._unspent(v_sub, v_month.period_start, _carried.freed)
                 + credits._unspent_silent(_carried.silent, v_month.period_start, _carried.freed);
      v_plan  := credits._plan_until(v_sub, v_month.period_start);
      v_carry := case v_plan.rollover when 'none' then 0
                                      else greatest(0, least(v_carry, v_plan.rollover_cap) - v_month.carried) end;
    end if;
    v_until := v_month.period_end;
  end loop;
  return row(null, 'plan', null, v_until, v_carry, 0)::credits.lot;
end $$;

-- What is left of months that nobody has booked and that end at a boundary.
create or replace function credits._unspent_silent(
  silent credits.wanted_slice[],
  ends   timestamptz,
  freed  credits.freed_slice[]
)
returns numeric
language sql
stable
as $$
  select coalesce(sum(w.amount - coalesce(d.paid, 0)), 0)
    from unnest(_unspent_silent.silent) w
    left join unnest(_unspent_silent.freed) d on d.month_key = w.key
   where w.period_end = _unspent_silent.ends
$$;
