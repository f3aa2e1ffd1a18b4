-- What has rolled over, as far as nobody has booked it: reads, which say what _roll_over() will make of it.

-- Into the present month of each subscription of an account.
drop function if exists credits._rolled_over_lines(credits.balances, timestamptz);
drop function if exists credits._returned_late(credits.subscriptions, credits.freed_slice[]);
drop function if exists credits._returned_late(credits.balances, credits.subscriptions, timestamptz);
drop function if exists credits._goes_on(credits.subscriptions);
create or replace function credits._rolled_over(
  balance credits.balances,
  at      timestamptz
)
returns setof credits.lot
language plpgsql
stable
as $$
declare
  v_silent credits.wanted_slice[];
  v_freed  credits.freed_slice[];
begin
  if (_rolled_over.balance).next_due_at > _rolled_over.at or not exists (select from credits.plans p where p.rollover <> 'none') then
    return;
  end if;
  v_silent := array(select w from credits._silent_months(_rolled_over.balance, _rolled_over.at) w where w.kind = 'plan');
  v_freed  := array(select d from credits._freed_at(_rolled_over.balance, _rolled_over.at) d);
  return query
    select c.*
      from credits.subscriptions s
      join credits.accounts a on a.account_id = s.account_id and a.status <> 'closed',
           lateral credits._carried(s, v_freed, array(select w from unnest(v_silent) w where w.subscription_id = s.subscription_id),
                                    (_rolled_over.balance).next_due_at, _rolled_over.at) c
     where s.account_id = (_rolled_over.balance).account_id and c.remaining > 0 and c.expires_at > _rolled_over.at;
end $$;

-- What rolls over into the last month of a subscription by a moment and is not booked: from each month to the next, beginning
-- with the first of which a hold has come back, or that began when more was due, with what nobody has booked of them. Lines
-- may overlap, and their months end at different times: each rolls over into that which begins when it ends.
drop function if exists credits._carried(credits.subscriptions, credits.freed_slice[], credits.wanted_slice[], timestamptz, timestamptz);
create or replace function credits._carried(
  subscription credits.subscriptions,
  freed        credits.freed_slice[],
  silent       credits.wanted_slice[],
  due_at       timestamptz,
  at           timestamptz
)
returns setof credits.lot
language plpgsql
stable
as $$
declare
  v_sub   credits.subscriptions := _carried.subscription;
  v_back  timestamptz[] := array(select b.ended_at from credits._back_from(v_sub, _carried.freed) b (ended_at));
  v_month record;
  v_plan  credits.plans;
  v_lots  credits.lot[];  -- what rolls over into each month
  v_carry numeric;
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
    v_carry := coalesce((select sum(l.remaining) from unnest(v_lots) l where l.expires_at = v_month.period_start), 0);
    if v_carry > 0 or v_month.period_start >= _carried.due_at or v_month.period_start = any (v_back) then
      v_carry := v_carry + credits._unspent(v_sub, v_month.period_start, _carried.freed)
                 + credits._unspent_silent(_carried.silent, v_month.period_start, _carried.freed);
      v_plan  := credits._plan_until(v_sub, v_month.period_start);
      v_carry := case coalesce(v_plan.rollover, 'none')
                   when 'none' then 0
                   else greatest(0, least(v_carry, v_plan.rollover_cap) - v_month.carried) end;
      v_lots  := v_lots || row(null, 'plan', null, v_month.period_end, v_carry, 0)::credits.lot;
    end if;
  end loop;
  return query select l.* from unnest(v_lots) l;
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
  select coalesce(sum(greatest(0, w.amount - coalesce(d.paid, 0) - credits._claimed(w.invoice_id, w.amount, false))), 0)
    from unnest(_unspent_silent.silent) w
    left join unnest(_unspent_silent.freed) d on d.month_key = w.key
   where w.period_end = _unspent_silent.ends
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
  select coalesce(sum(g.expired + greatest(0, g.remaining + coalesce(f.free, 0)
                                              - case g.status when 'pending' then credits._claim_ahead(g, false) else 0 end)), 0)
    from credits.plan_grants p
    join credits.grants g on g.account_id = p.account_id and g.grant_id = p.grant_id and g.kind = 'plan'
    left join (select d.grant_id, sum(case when d.returned then d.amount else 0 end - d.paid) as free
                 from unnest(_unspent.freed) d
                group by d.grant_id) f on f.grant_id = g.grant_id
   where p.account_id = (_unspent.subscription).account_id and p.subscription_id = (_unspent.subscription).subscription_id
     and p.period_end = _unspent.ends
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
