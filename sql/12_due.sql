-- What has fallen due: grants that start or end, reservations that ran out.
-- Keeps exact expiry: whoever locks an account first books it, whoever reads computes it, and both come to the same.

-- Books what fell due, in the order in which it fell due, so that a late booking ends where a punctual one would. What
-- is booked may bring more that is due: the next month of a plan.
create or replace function credits._book_due(balance credits.balances)
returns credits.balances
language plpgsql
as $$
declare
  v_now     timestamptz := credits.now();
  v_balance credits.balances := _book_due.balance;
  v_until   timestamptz;
begin
  while v_balance.next_due_at <= v_now loop
    v_until := credits._book_until(v_balance, v_now);
    update credits.balances b
       set next_due_at = credits._next_due_at(b.account_id, v_until)
     where b.account_id = v_balance.account_id
    returning b.* into v_balance;
  end loop;
  if credits._free(v_balance) - v_balance.debt < v_balance.topup_below then
    perform credits._look_at_top_up(v_balance.account_id);
  end if;
  return case when v_balance.low_at is null then v_balance else credits._watch_balance(v_balance.account_id) end;
end $$;

-- Up to a moment, or to the first one at which a plan has turned: then there may be more to book before what comes next.
create or replace function credits._book_until(
  balance credits.balances,
  at      timestamptz
)
returns timestamptz
language plpgsql
as $$
declare
  v_account_id text := (_book_until.balance).account_id;
  v_due        record;
  v_turned     timestamptz;
begin
  for v_due in
    select r.expires_at as due_at, 1 as step, r.reservation_id, null::bigint as grant_id
      from credits.reservations r
     where r.account_id = v_account_id and r.status = 'open'
       and r.expires_at between (_book_until.balance).next_due_at and _book_until.at
    union all
    select g.effective_at, 2, null, g.grant_id
      from credits.grants g
     where g.account_id = v_account_id and g.status = 'pending' and g.effective_at <= _book_until.at
    union all
    select g.expires_at, 3, null, g.grant_id
      from credits.grants g
     where g.account_id = v_account_id and g.status in ('pending', 'active') and g.expires_at <= _book_until.at
    union all
    select min(t.turns_at), 4, null, null
      from credits._turns(v_account_id) t (turns_at)
    having min(t.turns_at) <= _book_until.at
    order by due_at, step, reservation_id, grant_id
  loop
    exit when v_due.due_at > v_turned;
    if v_due.step = 1 then
      perform credits._return_hold(credits._reservation(v_account_id, v_due.reservation_id), 'expired', at => v_due.due_at);
    elsif v_due.step = 2 then
      perform credits._start_grant(credits._balance(v_account_id), v_due.grant_id, v_due.due_at);
      if credits._after_turn(v_account_id, v_due.grant_id, v_due.due_at) then
        v_turned := v_due.due_at;
      end if;
    elsif v_due.step = 3 then
      perform credits._expire_grant(credits._balance(v_account_id), v_due.grant_id);
    else
      perform credits._refresh_plan(v_account_id, v_due.due_at);
      v_turned := v_due.due_at;
    end if;
  end loop;
  return coalesce(v_turned, _book_until.at);
end $$;

-- The plan is the same for all accounts, and to make it anew for each would take six times as long as the rest. Without the
-- bitmap, reservations are read in their order, and only as far as they are asked for.
create or replace function credits._next_due_at(
  account_id text,
  after      timestamptz
)
returns timestamptz
language plpgsql
stable
set plan_cache_mode = force_generic_plan
set enable_bitmapscan = off
as $$
begin
  return (select coalesce(min(c.due_at), 'infinity')
            from credits._coming(_next_due_at.account_id, _next_due_at.after) c (due_at));
end $$;

-- When a grant that is not over starts, or ends. Inlined, and then found by the index grants_by_due.
create or replace function credits._due_at(lot credits.grants)
returns timestamptz
language sql
immutable
as $$
  select case when (_due_at.lot).status = 'pending' then (_due_at.lot).effective_at else (_due_at.lot).expires_at end
$$;

-- When the account's own plans turn. Part of the plan of whoever calls it.
drop function if exists credits._next_turn(text);
create or replace function credits._turns(account_id text)
returns setof timestamptz
language sql
stable
as $$
  select s.period_end
    from credits.subscriptions s
   where s.account_id = _turns.account_id and s.source = 'internal' and s.state in ('active', 'canceling')
$$;

-- The moments to come, part of the plan of whoever calls it. Reservations are looked at in the order of their deadlines, at
-- most a hundred: the first open one, else the last of them, is early enough, and an account with a long tail of settled ones
-- does not pay for it.
create or replace function credits._coming(
  account_id text,
  after      timestamptz
)
returns setof timestamptz
language sql
stable
as $$
  select credits._due_at(g)
    from credits.grants g
   where g.account_id = _coming.account_id and g.status in ('pending', 'active')
  union all
  select coalesce(min(r.expires_at) filter (where r.status = 'open'), max(r.expires_at) filter (where r.place = 100))
    from (select t.expires_at, t.status, row_number() over (order by t.expires_at) as place
            from credits.reservations t
           where t.account_id = _coming.account_id and t.expires_at > _coming.after
           order by t.expires_at
           limit 100) r
  union all
  select t.turns_at from credits._turns(_coming.account_id) t (turns_at)
$$;

-- What each lot would hold if everything due were booked at that moment. Debt is paid, in the order of time, by what
-- became free; a lot whose time is over loses the rest.
create or replace function credits._lots_at(
  balance credits.balances,
  at      timestamptz
)
returns setof credits.lot
language plpgsql
stable
as $$
begin
  return query
    select g.grant_id, g.kind, g.scope, g.expires_at,
           case when g.expires_at <= _lots_at.at then 0
                else greatest(0, g.remaining + coalesce(f.returned, 0) - coalesce(f.paid, 0)
                                 - case g.status when 'pending' then credits._claim_ahead(g, false) else 0 end) end,
           g.held - coalesce(f.returned, 0)
      from credits.grants g
      left join (select d.grant_id,
                        sum(d.amount) filter (where d.returned) as returned,
                        sum(d.paid)                             as paid
                   from credits._freed_at(_lots_at.balance, _lots_at.at) d
                  group by d.grant_id) f on f.grant_id = g.grant_id
     where g.account_id = (_lots_at.balance).account_id
       and g.effective_at <= _lots_at.at
       and (g.status in ('pending', 'active') or g.held > 0)
    union all
    select null, m.kind, m.scope, m.expires_at, m.remaining, m.held
      from credits._silent_month(_lots_at.balance, _lots_at.at) m
    union all
    select r.* from credits._rolled_over(_lots_at.balance, _lots_at.at) r;
end $$;

-- The present months of an account's plans that nobody has booked, less what they pay of a debt and what is claimed of them.
drop function if exists credits._paid_by_months(credits.balances, text[], timestamptz);
create or replace function credits._silent_month(
  balance credits.balances,
  at      timestamptz
)
returns setof credits.lot
language plpgsql
stable
as $$
begin
  if (_silent_month.balance).next_due_at > _silent_month.at then
    return;
  end if;
  return query
    select null::bigint, 'plan'::credits.grant_kind, null::text[], m.period_end,
           greatest(0, m.amount - coalesce(d.paid, 0) - credits._claimed(m.invoice_id, m.amount, false)), 0::numeric
      from credits._silent_months(_silent_month.balance, _silent_month.at) m
      left join credits._freed_at(_silent_month.balance, _silent_month.at) d on d.month_key = m.key
     where m.period_end > _silent_month.at;
end $$;

-- Months that have begun and that nobody has booked, also those that are over: only the next one is there as a pending grant,
-- and an account may have been silent for longer. A month that began before what is due next was booked, or its plan had no
-- credits then: those come with initialize_plan_credits().
drop function if exists credits._silent_months(text, timestamptz);
create or replace function credits._silent_months(
  balance credits.balances,
  at      timestamptz
)
returns setof credits.wanted_slice
language sql
stable
as $$
  select m.*
    from (select w.* from credits._wanted_slices((_silent_months.balance).account_id, _silent_months.at) w
          union all
          select o.* from credits._missed_months((_silent_months.balance).account_id, _silent_months.at) o
          union all
          select l.*
            from credits.accounts a,
                 lateral credits._wanted_of_lines(a.account_id, _silent_months.at, (_silent_months.balance).next_due_at) l
           where a.account_id = (_silent_months.balance).account_id and a.status <> 'closed' and l.amount > 0
             and l.period_end <= _silent_months.at) m
   where m.period_start between (_silent_months.balance).next_due_at and _silent_months.at
     and not exists (select from credits.grants g
                      where g.account_id = (_silent_months.balance).account_id and g.key = m.key)
$$;

-- The credits that become free between the last booking and the moment, and the debt that each of them pays. Those of months that
-- nobody has booked are of no grant.
create or replace function credits._freed_at(
  balance credits.balances,
  at      timestamptz
)
returns setof credits.freed_slice
language plpgsql
stable
as $$
begin
  if (_freed_at.balance).next_due_at > _freed_at.at then
    return;
  end if;
  return query
    with freed as (
      select r.expires_at as due_at, 1 as step, r.reservation_id, null::bigint as started, s.grant_id, s.amount,
             true as returned, null as month_key
        from credits.reservations r, unnest(r.grant_ids, r.grant_amounts) s (grant_id, amount)
       where r.account_id = (_freed_at.balance).account_id and r.status = 'open'
         and r.expires_at between (_freed_at.balance).next_due_at and _freed_at.at
      union all
      select g.effective_at, 2, null, g.grant_id, g.grant_id, greatest(0, g.remaining - credits._claim_ahead(g, true)),
             false, null
        from credits.grants g
       where g.account_id = (_freed_at.balance).account_id and g.status = 'pending' and g.effective_at <= _freed_at.at
      union all
      select m.period_start, 3, null, null, null, m.amount - credits._claimed(m.invoice_id, m.amount, true), false, m.key
        from credits._silent_months(_freed_at.balance, _freed_at.at) m
    )
    select f.grant_id, f.amount, f.returned,
           case when g.scope is null
                then greatest(0, least(f.amount, (_freed_at.balance).debt - coalesce(sum(f.amount)
                       filter (where g.scope is null) over (
                         order by f.due_at, f.step, f.reservation_id, f.started, g.expires_at nulls last,
                                  g.priority, g.effective_at, g.grant_id
                         rows between unbounded preceding and 1 preceding), 0)))
                else 0 end,
           f.month_key
      from freed f
      left join credits.grants g on g.account_id = (_freed_at.balance).account_id and g.grant_id = f.grant_id;
end $$;

create or replace function credits._debt_at(
  balance credits.balances,
  at      timestamptz
)
returns numeric
language plpgsql
stable
as $$
begin
  if (_debt_at.balance).debt = 0 or (_debt_at.balance).next_due_at > _debt_at.at then
    return (_debt_at.balance).debt;
  end if;
  return (_debt_at.balance).debt
         - coalesce((select sum(d.paid) from credits._freed_at(_debt_at.balance, _debt_at.at) d), 0);
end $$;
