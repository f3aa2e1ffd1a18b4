-- Which grants pay, and what happens to credits that become free. All other files take and return credits through here.
-- Keeps: the order of consumption, and that free credits pay a debt first. The caller holds the lock of the account.

-- Which grants pay: the order of consumption is here, in _choose_for_debt() and in spend_many's window, and the index
-- grants_live is built for it. A loop, since it was measured to cost a third of the same thing with window functions.
create or replace function credits._choose(
  account_id text,
  amount     numeric,
  capability text default null
)
returns credits.slices
language plpgsql
stable
as $$
declare
  v_slices credits.slices;
  v_open   numeric := _choose.amount;
  v_free   numeric := 0;
  v_use    numeric;
  v_lot    record;
begin
  v_slices.payable := 0;
  for v_lot in
    select g.grant_id, g.remaining, g.scope
      from credits.grants g
     where g.account_id = _choose.account_id and g.status = 'active' and g.remaining > 0
     order by g.priority, g.expires_at, g.effective_at, g.grant_id
  loop
    if v_lot.scope is null or _choose.capability = any (v_lot.scope) then
      v_slices.payable := v_slices.payable + v_lot.remaining;
      if v_open > 0 then
        v_use              := least(v_open, v_lot.remaining);
        v_open             := v_open - v_use;
        v_slices.grant_ids := v_slices.grant_ids || v_lot.grant_id;
        v_slices.amounts   := v_slices.amounts || v_use;
        v_lot.remaining    := v_lot.remaining - v_use;
      end if;
    end if;
    if v_lot.scope is null then
      v_free := v_free + v_lot.remaining;
    end if;
  end loop;
  v_slices.taken     := _choose.amount - v_open;
  v_slices.left_free := v_free;
  return v_slices;
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
             coalesce(sum(least(f.remaining, _choose_for_debt.amount - f.before)), 0),
             null, null)::credits.slices
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

-- Slices leave what remains of their grants and become consumed or held. One update per slice, and mostly there is one:
-- an update of all by a list of ids would be planned anew on every call.
create or replace function credits._consume(
  account_id text,
  slices     credits.slices,
  part       text default 'consumed'
)
returns void
language plpgsql
as $$
declare
  v_ids     bigint[]  := (_consume.slices).grant_ids;
  v_amounts numeric[] := (_consume.slices).amounts;
begin
  for v_place in 1 .. cardinality(v_ids) loop
    if _consume.part = 'held' then
      update credits.grants g
         set remaining = g.remaining - v_amounts[v_place],
             held      = g.held + v_amounts[v_place]
       where g.account_id = _consume.account_id and g.grant_id = v_ids[v_place];
    else
      update credits.grants g
         set remaining = g.remaining - v_amounts[v_place],
             consumed  = g.consumed + v_amounts[v_place],
             status    = case when g.remaining = v_amounts[v_place] and g.held = 0 then 'exhausted' else g.status end
       where g.account_id = _consume.account_id and g.grant_id = v_ids[v_place];
    end if;
  end loop;
end $$;

-- All or nothing: chooses and consumes.
create or replace function credits._take(
  balance    credits.balances,
  amount     numeric,
  capability text default null
)
returns credits.slices
language plpgsql
as $$
declare
  v_slices credits.slices := credits._choose((_take.balance).account_id, _take.amount, _take.capability);
begin
  if v_slices.taken < _take.amount or (_take.balance).debt > 0 then
    perform credits._fail_short(_take.amount, v_slices.payable - (_take.balance).debt);
  end if;
  perform credits._consume((_take.balance).account_id, v_slices);
  return v_slices;
end $$;

create or replace function credits._fail_short(
  required  numeric,
  available numeric
)
returns void
language sql
immutable
as $$
  select credits._fail(402, 'insufficient_credits',
    jsonb_build_object('required', trim_scale(required), 'available', trim_scale(available)),
    'Top up, or use less.')
$$;

-- Consumed slices return to what remains of their grants.
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
end $$;

-- After credits became free: they pay the debt first, and what is left in a grant whose time is over expires.
create or replace function credits._tidy(account_id text)
returns credits.balances
language plpgsql
as $$
declare
  v_balance credits.balances := credits._balance(_tidy.account_id);
  v_now     timestamptz := credits.now();
  v_slices  credits.slices;
  v_entry   credits.entries;
  v_grant   bigint;
begin
  if v_balance.debt > 0 then
    v_slices := credits._choose_for_debt(_tidy.account_id, v_balance.debt);
    if v_slices.taken > 0 then
      perform credits._consume(_tidy.account_id, v_slices);
      v_entry.account_id := _tidy.account_id;
      v_entry.kind       := 'debt_paid';
      v_entry.operation  := 'debt_paid';
      v_entry.amount     := -v_slices.taken;
      v_entry.debt       := -v_slices.taken;
      perform credits._post(v_balance, v_entry, v_slices);
      v_balance := credits._balance(_tidy.account_id);
    end if;
  end if;

  for v_grant in
    select g.grant_id
      from credits.grants g
     where g.account_id = _tidy.account_id and g.status = 'active' and g.remaining > 0 and g.expires_at <= v_now
     order by g.expires_at, g.grant_id
  loop
    v_balance := credits._expire_grant(v_balance, v_grant);
  end loop;
  return v_balance;
end $$;
