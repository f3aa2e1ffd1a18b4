-- Moves a grant to where its payment stands, in either direction. A target, not a delta.
-- Keeps invariant 9: what was clawed back equals its target. The caller holds the lock of the account.

-- Moves one grant to its target, in either direction: firm is taken in full, into debt if it was spent; the rest of the
-- target, which open disputes ask for, only as far as it is unspent. Debt goes before credits come back.
create or replace function credits._claw_back(
  account_id  text,
  grant_id    bigint,
  source_kind text,
  source_id   text,
  firm_share  numeric,
  full_share  numeric
)
returns jsonb
language plpgsql
as $$
declare
  v_grant  credits.grants;
  v_row    credits.clawbacks;
  v_before credits.clawbacks;
  v_round  credits.clawbacks;
  v_bought numeric;
begin
  select g.* into v_grant from credits.grants g where g.account_id = _claw_back.account_id and g.grant_id = _claw_back.grant_id;
  select c.* into v_row from credits.clawbacks c where c.account_id = _claw_back.account_id and c.grant_id = _claw_back.grant_id;
  if not found then
    if _claw_back.full_share = 0 then
      return jsonb '[]';
    end if;
    insert into credits.clawbacks as c (account_id, grant_id, source_kind, source_id, updated_at)
    values (_claw_back.account_id, _claw_back.grant_id, _claw_back.source_kind, _claw_back.source_id, credits.now())
    returning c.* into v_row;
  end if;
  v_before := v_row;
  v_bought := credits._bought(v_grant);
  v_row.firm   := trim_scale(round(v_bought * _claw_back.firm_share, 6));
  v_row.target := trim_scale(round(v_bought * _claw_back.full_share, 6));

  loop
    v_round := v_row;
    select g.* into v_grant from credits.grants g where g.account_id = v_row.account_id and g.grant_id = v_row.grant_id;
    v_row := credits._reinstate_owed(v_row,
               v_row.owed - greatest(0, v_row.firm - least(v_row.target, v_row.taken + v_grant.remaining)));
    v_row := credits._reinstate_taken(v_row, v_row.taken - v_row.target);
    v_row := credits._claw(v_row, v_row.target - v_row.taken - v_row.owed, false);
    v_row := credits._claw(v_row, v_row.firm - v_row.taken - v_row.owed, true);
    exit when v_row is not distinct from v_round or v_row.number > v_before.number + 20;  -- what came back may be taken
  end loop;
  if v_row is not distinct from v_before then
    return jsonb '[]';
  end if;
  update credits.clawbacks c
     set firm = v_row.firm, target = v_row.target, taken = v_row.taken, owed = v_row.owed, number = v_row.number,
         updated_at = credits.now()
   where c.account_id = v_row.account_id and c.grant_id = v_row.grant_id;
  return jsonb_build_array(credits._effect('clawback', v_row.account_id,
    (v_row.taken + v_row.owed) - (v_before.taken + v_before.owed),
    jsonb_build_object('source', v_row.source_id, 'taken', trim_scale(v_row.taken), 'owed', trim_scale(v_row.owed))));
end $$;

-- What of a grant its payment has bought: a line of an invoice may have had to leave a part to another one.
create or replace function credits._bought(lot credits.grants)
returns numeric
language sql
stable
as $$
  select (_bought.lot).amount
         - coalesce((select p.moved from credits.plan_grants p
                      where p.account_id = (_bought.lot).account_id and p.grant_id = (_bought.lot).grant_id), 0)
$$;

-- What refunds and disputes take of a month as soon as it begins, for reads of what nobody has booked: firm, before it pays a
-- debt; else with what open disputes take of the rest.
create or replace function credits._claimed(
  invoice_id text,
  amount     numeric,
  firm       boolean
)
returns numeric
language plpgsql
stable
as $$
declare
  v_totals credits.payment_totals;
begin
  if _claimed.invoice_id is null then
    return 0;
  end if;
  v_totals := credits._payment_totals('invoice', _claimed.invoice_id);
  return round(_claimed.amount * case when _claimed.firm then credits._firm_share(v_totals) else credits._full_share(v_totals) end, 6);
end $$;

-- The same of a grant that nobody has started.
create or replace function credits._claim_ahead(
  lot  credits.grants,
  firm boolean
)
returns numeric
language sql
stable
as $$
  select coalesce(sum(credits._claimed(p.invoice_id, (_claim_ahead.lot).amount, _claim_ahead.firm)), 0)
    from credits.plan_grants p
   where p.account_id = (_claim_ahead.lot).account_id and p.grant_id = (_claim_ahead.lot).grant_id
$$;

-- Takes more of a grant; what was spent of it becomes debt if the claim is firm. Nobody can take what has expired.
create or replace function credits._claw(
  clawback credits.clawbacks,
  amount   numeric,
  firm     boolean
)
returns credits.clawbacks
language plpgsql
as $$
declare
  v_row    credits.clawbacks := _claw.clawback;
  v_grant  credits.grants;
  v_entry  credits.entries;
  v_amount numeric;
  v_taken  numeric;
begin
  select g.* into v_grant from credits.grants g where g.account_id = v_row.account_id and g.grant_id = v_row.grant_id;
  v_amount := least(_claw.amount, case when _claw.firm then v_grant.amount - v_grant.expired - v_grant.revoked - v_grant.owed
                                       else v_grant.remaining end);
  if v_amount <= 0 then
    return v_row;
  end if;
  v_taken      := least(v_amount, v_grant.remaining);
  v_row.taken  := v_row.taken + v_taken;
  v_row.owed   := v_row.owed + v_amount - v_taken;
  v_row.number := v_row.number + 1;
  v_entry := credits._clawback_entry(v_row);
  perform credits._revoke(credits._balance(v_row.account_id), v_entry, v_row.grant_id, v_amount);
  return v_row;
end $$;

-- The entry of one step, under a key counted on the clawback.
create or replace function credits._clawback_entry(clawback credits.clawbacks)
returns credits.entries
language plpgsql
stable
as $$
declare
  v_entry credits.entries;
begin
  v_entry.account_id  := (_clawback_entry.clawback).account_id;
  v_entry.operation   := 'clawback';
  v_entry.key         := format('clawback:%s:%s:%s', (_clawback_entry.clawback).source_id,
                                (_clawback_entry.clawback).grant_id, (_clawback_entry.clawback).number);
  v_entry.fingerprint := jsonb_build_object('source', (_clawback_entry.clawback).source_id,
                                            'grant_id', (_clawback_entry.clawback).grant_id);
  v_entry.metadata    := jsonb_build_object('source', (_clawback_entry.clawback).source_id);
  return v_entry;
end $$;

-- Gives back what had become debt: the debt falls; where other credits have paid it meanwhile, they come back.
create or replace function credits._reinstate_owed(
  clawback credits.clawbacks,
  amount   numeric
)
returns credits.clawbacks
language plpgsql
as $$
declare
  v_row  credits.clawbacks := _reinstate_owed.clawback;
  v_debt numeric := (credits._balance(v_row.account_id)).debt;
  v_back numeric;
begin
  if _reinstate_owed.amount <= 0 then
    return v_row;
  end if;
  v_back := least(_reinstate_owed.amount, v_debt);
  if v_back < _reinstate_owed.amount then
    v_back := v_back + credits._unpay_debt(v_row.account_id, _reinstate_owed.amount - v_back);
  end if;
  if v_back > 0 then
    v_row.owed   := v_row.owed - v_back;
    v_row.number := v_row.number + 1;
    perform credits._reinstate(credits._clawback_entry(v_row), v_row.grant_id, 'reinstate_debt', v_back);
    perform credits._tidy(v_row.account_id);
  end if;
  return v_row;
end $$;

create or replace function credits._reinstate_taken(
  clawback credits.clawbacks,
  amount   numeric
)
returns credits.clawbacks
language plpgsql
as $$
declare
  v_row credits.clawbacks := _reinstate_taken.clawback;
begin
  if _reinstate_taken.amount <= 0 then
    return v_row;
  end if;
  v_row.taken  := v_row.taken - _reinstate_taken.amount;
  v_row.number := v_row.number + 1;
  perform credits._reinstate(credits._clawback_entry(v_row), v_row.grant_id, 'reinstate', _reinstate_taken.amount);
  perform credits._tidy(v_row.account_id);
  return v_row;
end $$;
