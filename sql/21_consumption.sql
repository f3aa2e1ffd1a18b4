-- Which grants pay, and what happens to credits that become free. All other files take and return credits through here.
-- Keeps: the order of consumption, and that free credits pay a debt first. The caller holds the lock of the account.

-- The grants that can pay, in the order of consumption, which is here and in spend_many's window; the index grants_live is
-- built for it. Part of the plan of whoever calls it.
drop function if exists credits._payers(text, text);
create or replace function credits._payers(
  account_id text,
  capability text
)
returns setof credits.payer
language sql
stable
as $$
  select g.grant_id, g.remaining::numeric, g.ctid
    from credits.grants g
   where g.account_id = _payers.account_id and g.status = 'active' and g.remaining > 0
     and (g.scope is null or _payers.capability = any (g.scope))
   order by g.priority, g.expires_at, g.effective_at, g.grant_id
$$;

-- Takes credits, up to an amount. They become consumed or held. The caller refuses if too few were taken, which undoes it.
-- A loop, since it was measured to cost less than window functions: mostly the first grants pay.
create or replace function credits._take(
  account_id text,
  amount     numeric,
  capability text default null,
  part       text default 'consumed'
)
returns credits.slices
language plpgsql
as $$
declare
  v_open   numeric := _take.amount;
  v_use    numeric;
  v_lot    record;
  v_slices credits.slices;
begin
  for v_lot in
    select p.grant_id, p.remaining from credits._payers(_take.account_id, _take.capability) p
  loop
    v_use  := credits._consume(_take.account_id, v_lot.grant_id, least(v_open, v_lot.remaining), _take.part);
    v_open := v_open - v_use;
    v_slices.grant_ids := v_slices.grant_ids || v_lot.grant_id;
    v_slices.amounts   := v_slices.amounts || v_use;
    exit when v_open = 0;
  end loop;
  v_slices.taken := _take.amount - v_open;
  return v_slices;
end $$;

-- Credits leave what remains of a grant and become consumed or held.
create or replace function credits._consume(
  account_id text,
  grant_id   bigint,
  amount     numeric,
  part       text
)
returns numeric
language plpgsql
as $$
begin
  if _consume.part = 'held' then
    update credits.grants g
       set remaining = g.remaining - _consume.amount,
           held      = g.held + _consume.amount
     where g.account_id = _consume.account_id and g.grant_id = _consume.grant_id;
  else
    update credits.grants g
       set remaining = g.remaining - _consume.amount,
           consumed  = g.consumed + _consume.amount,
           status    = case when g.remaining = _consume.amount and g.held = 0 then 'exhausted' else g.status end
     where g.account_id = _consume.account_id and g.grant_id = _consume.grant_id;
  end if;
  return _consume.amount;
end $$;

-- Debt is paid by what would be lost first. The order is independent of the moment, so late booking changes nothing.
create or replace function credits._choose_for_debt(
  account_id text,
  amount     numeric
)
returns credits.slices
language sql
stable
as $$
  with free as (
    select g.grant_id, g.remaining, row_number() over losing as place,
           sum(g.remaining) over losing - g.remaining as before
      from credits.grants g
     where g.account_id = _choose_for_debt.account_id and g.status = 'active' and g.remaining > 0 and g.scope is null
    window losing as (order by g.expires_at nulls last, g.priority, g.effective_at, g.grant_id)
  )
  select row(array_agg(f.grant_id order by f.place),
             array_agg(least(f.remaining, _choose_for_debt.amount - f.before) order by f.place),
             coalesce(sum(least(f.remaining, _choose_for_debt.amount - f.before)), 0), null, null)::credits.slices
    from free f
   where f.before < _choose_for_debt.amount
$$;

create or replace function credits._slice(
  grant_id bigint,
  amount   numeric
)
returns credits.slices
language sql
immutable
as $$
  select row(array[_slice.grant_id], array[_slice.amount], _slice.amount, null, null)::credits.slices
$$;

-- What could not be taken is refused, with what is missing. While there is debt nothing can be taken.
create or replace function credits._fail_short(
  required numeric,
  taken    numeric,
  debt     numeric default 0
)
returns void
language sql
immutable
as $$
  select credits._fail(402, 'insufficient_credits',
    jsonb_build_object('required', trim_scale(_fail_short.required), 'available',
      trim_scale(case _fail_short.debt when 0 then _fail_short.taken else -_fail_short.debt end)),
    'Top up, or use less.')
$$;

-- Consumed slices return to what remains of their grants. A grant that was exhausted had no end to look out for; it has
-- one again.
create or replace function credits._give_back(
  account_id text,
  slices     credits.slices
)
returns void
language plpgsql
as $$
begin
  for v_place in 1 .. cardinality((_give_back.slices).grant_ids) loop
    update credits.grants g
       set remaining = g.remaining + (_give_back.slices).amounts[v_place],
           consumed  = g.consumed - (_give_back.slices).amounts[v_place],
           status    = 'active'
     where g.account_id = _give_back.account_id and g.grant_id = (_give_back.slices).grant_ids[v_place];
  end loop;
  perform credits._expect_end(_give_back.account_id, (_give_back.slices).grant_ids);
end $$;

create or replace function credits._expect_end(
  account_id text,
  grant_ids  bigint[]
)
returns void
language plpgsql
as $$
begin
  update credits.balances b
     set next_due_at = least(b.next_due_at, (select min(g.expires_at) from credits.grants g
                                              where g.account_id = _expect_end.account_id
                                                and g.grant_id = any (_expect_end.grant_ids)))
   where b.account_id = _expect_end.account_id;
end $$;

-- After credits became free, at some moment: they pay the debt first, and what is left in a grant whose time was over by
-- then expires.
create or replace function credits._tidy(
  account_id text,
  at         timestamptz default credits.now()
)
returns credits.balances
language plpgsql
as $$
declare
  v_balance credits.balances := credits._balance(_tidy.account_id);
  v_slices  credits.slices;
  v_entry   credits.entries;
  v_grant   bigint;
begin
  if v_balance.debt > 0 then
    v_slices := credits._choose_for_debt(_tidy.account_id, v_balance.debt);
    if v_slices.taken > 0 then
      perform credits._consume(_tidy.account_id, t.grant_id, t.amount, 'consumed')
         from unnest(v_slices.grant_ids, v_slices.amounts) t (grant_id, amount);
      v_entry.account_id := _tidy.account_id;
      v_entry.kind       := 'debt_paid';
      v_entry.operation  := 'debt_paid';
      v_entry.amount     := -v_slices.taken;
      v_entry.debt       := -v_slices.taken;
      perform credits._post(v_balance, v_entry, v_slices);
      v_balance := credits._balance(_tidy.account_id);
    end if;
  end if;

  loop  -- what has ended may bring more that has: it rolls over
    for v_grant in
      select g.grant_id
        from credits.grants g
       where g.account_id = _tidy.account_id and g.status = 'active' and g.remaining > 0 and g.expires_at <= _tidy.at
       order by g.expires_at, g.grant_id
    loop
      v_balance := credits._expire_grant(v_balance, v_grant);
    end loop;
    exit when not found;
  end loop;
  return case when v_balance.low_at is null then v_balance else credits._watch_balance(_tidy.account_id) end;
end $$;
