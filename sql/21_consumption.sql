-- Which grants pay, and what happens to credits that become free. All other files take and return credits through here.
-- Keeps: the order of consumption, and that free credits pay a debt first. The caller holds the lock of the account.

-- Which grants pay: the order of consumption is here and nowhere else.
create or replace function credits._choose(
  account_id text,
  amount     numeric,
  capability text default null
)
returns credits.slices
language sql
stable
as $$
  with live as (
    select g.grant_id, g.remaining, g.scope is null as free,
           g.scope is null or _choose.capability = any (g.scope) as payable,
           row_number() over consumption as place,
           sum(g.remaining) filter (where g.scope is null or _choose.capability = any (g.scope)) over consumption as upto
      from credits.grants g
     where g.account_id = _choose.account_id and g.status = 'active' and g.remaining > 0
    window consumption as (order by g.priority, g.expires_at nulls last, g.effective_at, g.grant_id)
  ), taken as (
    select l.*, case when l.payable
                     then greatest(0, least(l.remaining, _choose.amount - (l.upto - l.remaining))) else 0 end as amount
      from live l
  )
  select row(array_agg(t.grant_id order by t.place) filter (where t.amount > 0),
             array_agg(t.amount order by t.place) filter (where t.amount > 0),
             coalesce(sum(t.amount), 0),
             coalesce(sum(t.remaining) filter (where t.payable), 0),
             coalesce(sum(t.remaining - t.amount) filter (where t.free), 0))::credits.slices
    from taken t
$$;

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

create or replace function credits._consume(
  account_id text,
  slices     credits.slices
)
returns void
language sql
as $$
  update credits.grants g
     set remaining = g.remaining - s.amount,
         consumed  = g.consumed + s.amount,
         status    = case when g.remaining = s.amount and g.held = 0 then 'exhausted' else g.status end
    from unnest((_consume.slices).grant_ids, (_consume.slices).amounts) s (grant_id, amount)
   where g.account_id = _consume.account_id and g.grant_id = s.grant_id
$$;

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

-- Slices return from where they were, consumed or held, to what remains of their grants.
create or replace function credits._give_back(
  account_id text,
  slices     credits.slices,
  part       text
)
returns void
language sql
as $$
  update credits.grants g
     set remaining = g.remaining + s.amount,
         consumed  = g.consumed - case _give_back.part when 'consumed' then s.amount else 0 end,
         held      = g.held - case _give_back.part when 'held' then s.amount else 0 end,
         status    = 'active'
    from unnest((_give_back.slices).grant_ids, (_give_back.slices).amounts) s (grant_id, amount)
   where g.account_id = _give_back.account_id and g.grant_id = s.grant_id
$$;

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
