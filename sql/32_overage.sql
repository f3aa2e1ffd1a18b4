-- What a settlement takes beyond its hold, by its policy. Keeps: actual = charged + uncollected.
-- The caller holds the lock of the account.

-- What is available pays the overage, after what was held.
create or replace function credits._take_overage(
  balance credits.balances,
  hold    credits.reservations,
  slices  credits.slices,
  overage numeric,
  policy  text
)
returns credits.slices
language plpgsql
as $$
declare
  v_slices credits.slices := _take_overage.slices;
  v_more   credits.slices;
begin
  v_more.taken := 0;
  if (_take_overage.balance).debt = 0 then
    v_more := credits._take((_take_overage.hold).account_id, _take_overage.overage, (_take_overage.hold).capability);
  end if;
  if _take_overage.policy = 'reject' and v_more.taken < _take_overage.overage then
    perform credits._fail_short(v_slices.taken + _take_overage.overage,
                                v_slices.taken + v_more.taken - (_take_overage.balance).debt);
  end if;

  select array_agg(m.grant_id order by m.place), array_agg(m.amount order by m.place), coalesce(sum(m.amount), 0)
    into v_slices.grant_ids, v_slices.amounts, v_slices.taken
    from (select s.grant_id, sum(s.amount) as amount, min(s.place) as place
            from unnest(v_slices.grant_ids || v_more.grant_ids, v_slices.amounts || v_more.amounts)
                 with ordinality s (grant_id, amount, place)
           group by s.grant_id) m;
  return v_slices;
end $$;

-- How much of a charge that nothing could pay becomes debt.
create or replace function credits._overdraft(
  balance credits.balances,
  unpaid  numeric,
  policy  text
)
returns numeric
language sql
stable
as $$
  select case when _overdraft.policy = 'overflow'
              then greatest(0, least(_overdraft.unpaid, a.debt_limit - (_overdraft.balance).debt)) else 0 end
    from credits.accounts a
   where a.account_id = (_overdraft.balance).account_id
$$;

create or replace function credits._post_overdraft(
  hold    credits.reservations,
  debt    numeric,
  request jsonb,
  keyed   boolean
)
returns credits.entries
language plpgsql
as $$
declare
  v_entry credits.entries := credits._reservation_entry(_post_overdraft.hold, 'overdraft',
    case when _post_overdraft.keyed then (_post_overdraft.hold).reservation_id end,
    case when _post_overdraft.keyed then _post_overdraft.request end, 0);
begin
  v_entry.operation := 'settle';
  v_entry.debt      := _post_overdraft.debt;
  return credits._post(credits._balance(v_entry.account_id), v_entry, null);
end $$;
