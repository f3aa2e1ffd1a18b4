-- Clawback: granted credits are taken back, and what was used of them becomes debt.
-- Keeps: a grant is never clawed back twice (amount >= expired + revoked + owed). Lock order: see 10_accounts.sql.

create or replace function credits.revoke_grant(
  account_id text,
  grant_id   bigint,
  amount     numeric default null,
  reason     text    default null,
  key        text    default null
)
returns credits.entry_result
language plpgsql
security definer
set search_path = pg_catalog, pg_temp
as $$
declare
  v_print   jsonb := jsonb_strip_nulls(jsonb_build_object(
                       'grant_id', revoke_grant.grant_id, 'amount', trim_scale(revoke_grant.amount),
                       'reason', revoke_grant.reason));
  v_balance credits.balances;
  v_entry   credits.entries;
begin
  perform credits._check_key(revoke_grant.key, 'key');
  v_balance := credits._lock_account(revoke_grant.account_id);
  v_entry   := credits._first_entry(revoke_grant.account_id, 'revoke_grant', revoke_grant.key, v_print);
  if v_entry.entry_seq is not null then
    return credits._revoke_result(revoke_grant.account_id, revoke_grant.key, true);
  end if;
  v_entry.account_id  := revoke_grant.account_id;
  v_entry.operation   := 'revoke_grant';
  v_entry.key         := revoke_grant.key;
  v_entry.fingerprint := v_print;
  v_entry.description := revoke_grant.reason;
  perform credits._revoke(v_balance, v_entry, revoke_grant.grant_id, revoke_grant.amount);
  return credits._revoke_result(revoke_grant.account_id, revoke_grant.key, false);
end $$;
comment on function credits.revoke_grant(text, bigint, numeric, text, text) is
'Claws a grant back, or a part of it: first what is left of it, and what was spent or is held becomes debt.

amount defaults to all that can still be revoked: amount - expired - what was revoked or turned into debt before. Debt is
paid at once from the account''s other free credits, then by whatever comes next, each time as an entry of its own. A
pending grant is cut before it starts. amount is what was taken, as a negative number, debt what became debt. key is
required.
Errors: 400 invalid_request, 404 account_not_found, grant_not_found, 409 idempotency_conflict, 422 invalid_amount.';

-- Helpers -------------------------------------------------------------------------------------------------------------

create or replace function credits._revoke(
  balance  credits.balances,
  entry    credits.entries,
  grant_id bigint,
  amount   numeric
)
returns void
language plpgsql
as $$
declare
  v_entry  credits.entries := _revoke.entry;
  v_grant  credits.grants;
  v_left   numeric;
  v_amount numeric;
  v_taken  numeric;
begin
  select g.* into v_grant
    from credits.grants g
   where g.account_id = (_revoke.balance).account_id and g.grant_id = _revoke.grant_id;
  if not found then
    perform credits._fail(404, 'grant_not_found', jsonb_build_object('grant_id', _revoke.grant_id));
  end if;
  v_left   := v_grant.amount - v_grant.expired - v_grant.revoked - v_grant.owed;
  v_amount := credits._check_amount(coalesce(_revoke.amount, greatest(v_left, 0)));
  if v_amount > v_left then
    perform credits._fail(422, 'invalid_amount', jsonb_build_object('amount', v_amount, 'revocable', greatest(v_left, 0)),
      'At most what has not expired and was not clawed back before can be revoked.');
  end if;

  v_taken := least(v_amount, v_grant.remaining);
  if v_grant.status = 'pending' then
    perform credits._post_early(_revoke.balance, v_grant, v_taken);
  end if;
  update credits.grants g
     set remaining = g.remaining - v_taken,
         revoked   = g.revoked + v_taken,
         owed      = g.owed + v_amount - v_taken,
         status    = case when v_taken > 0 and g.remaining = v_taken and g.held = 0 then 'revoked' else g.status end
   where g.account_id = v_grant.account_id and g.grant_id = v_grant.grant_id;

  if v_taken > 0 then
    v_entry.kind   := 'revoke';
    v_entry.amount := -v_taken;
    v_entry := credits._post(credits._balance(v_grant.account_id), v_entry,
                             credits._slice(v_grant.grant_id, v_taken));
  end if;
  if v_amount > v_taken then
    perform credits._post_clawback(v_entry, v_grant.grant_id, v_amount - v_taken);
  end if;
  perform credits._tidy(v_grant.account_id);
end $$;

-- What is revoked of a grant that has not started comes in and goes out at once, so that the ledger tells of it.
create or replace function credits._post_early(
  balance credits.balances,
  lot     credits.grants,
  amount  numeric
)
returns void
language plpgsql
as $$
declare
  v_entry  credits.entries;
  v_slices credits.slices := credits._slice((_post_early.lot).grant_id, _post_early.amount);
begin
  v_slices.left_free  := credits._free(_post_early.balance);  -- none of it is free before it starts
  v_entry.account_id  := (_post_early.balance).account_id;
  v_entry.kind        := 'grant';
  v_entry.operation   := 'grant';
  v_entry.amount      := _post_early.amount;
  v_entry.description := (_post_early.lot).description;
  perform credits._post(_post_early.balance, v_entry, v_slices);
end $$;

-- The part of a clawback that was spent. It carries the key if no entry before it does.
create or replace function credits._post_clawback(
  revoked  credits.entries,
  grant_id bigint,
  debt     numeric
)
returns void
language plpgsql
as $$
declare
  v_entry credits.entries := _post_clawback.revoked;
begin
  if v_entry.entry_seq is not null then
    v_entry.key         := null;
    v_entry.fingerprint := null;
  end if;
  v_entry.kind   := 'clawback';
  v_entry.amount := 0;
  v_entry.debt   := _post_clawback.debt;
  perform credits._post(credits._balance(v_entry.account_id), v_entry,
                        credits._slice(_post_clawback.grant_id, _post_clawback.debt));
end $$;

-- Undoes a part of a clawback on the grant that it came from: reinstate returns what was taken, reinstate_debt lets go of
-- debt. The caller tidies.
create or replace function credits._reinstate(
  entry    credits.entries,
  grant_id bigint,
  kind     text,
  amount   numeric
)
returns void
language plpgsql
as $$
declare
  v_entry credits.entries := _reinstate.entry;
  v_back  numeric := case _reinstate.kind when 'reinstate' then _reinstate.amount else 0 end;
begin
  update credits.grants g
     set remaining = g.remaining + v_back,
         revoked   = g.revoked - v_back,
         owed      = g.owed - _reinstate.amount + v_back,
         status    = case when v_back > 0 then 'active' else g.status end
   where g.account_id = v_entry.account_id and g.grant_id = _reinstate.grant_id;
  perform credits._expect_end(v_entry.account_id, array[_reinstate.grant_id]);
  v_entry.kind   := _reinstate.kind;
  v_entry.amount := v_back;
  v_entry.debt   := v_back - _reinstate.amount;
  perform credits._post(credits._balance(v_entry.account_id), v_entry,
                        credits._slice(_reinstate.grant_id, _reinstate.amount));
end $$;

-- Undoes payments of debt, the latest first: the very credits that paid come back, and the debt with them, for the caller to
-- let go of. Answers how much; less than asked for only if what paid was given back in another way.
create or replace function credits._unpay_debt(
  account_id text,
  amount     numeric
)
returns numeric
language plpgsql
as $$
declare
  v_left   numeric := _unpay_debt.amount;
  v_paid   record;
  v_slices credits.slices;
  v_entry  credits.entries;
begin
  for v_paid in
    select e.entry_seq, s.grant_id,
           least(g.consumed, s.amount - coalesce((select sum(u.amount)
                                                    from credits.entries n, unnest(n.grant_ids, n.grant_amounts) u (grant_id, amount)
                                                   where n.account_id = e.account_id and n.refunds_seq = e.entry_seq
                                                     and u.grant_id = s.grant_id), 0)) as amount
      from credits.entries e, unnest(e.grant_ids, e.grant_amounts) with ordinality s (grant_id, amount, place),
           lateral (select n.consumed from credits.grants n where n.account_id = e.account_id and n.grant_id = s.grant_id) g
     where e.account_id = _unpay_debt.account_id and e.operation = 'debt_paid'
     order by e.entry_seq desc, s.place desc
  loop
    exit when v_left = 0;
    continue when v_paid.amount <= 0;
    v_slices := credits._slice(v_paid.grant_id, least(v_left, v_paid.amount));
    v_left   := v_left - v_slices.taken;
    perform credits._give_back(_unpay_debt.account_id, v_slices);
    v_entry.account_id  := _unpay_debt.account_id;
    v_entry.kind        := 'reinstate_paid';
    v_entry.operation   := 'reinstate_paid';
    v_entry.amount      := v_slices.taken;
    v_entry.debt        := v_slices.taken;
    v_entry.refunds_seq := v_paid.entry_seq;
    perform credits._post(credits._balance(_unpay_debt.account_id), v_entry, v_slices);
  end loop;
  return _unpay_debt.amount - v_left;
end $$;

-- The answer to a revoke, made from its entries alone, so that a replay says the same.
create or replace function credits._revoke_result(
  account_id text,
  key        text,
  replayed   boolean
)
returns credits.entry_result
language sql
stable
as $$
  select row(f.entry_seq, f.account_id, f.amount, coalesce(c.debt, f.debt), coalesce(c.balance_after, f.balance_after),
             coalesce(c.available_after, f.available_after), f.created_at, _revoke_result.replayed)::credits.entry_result
    from credits.entries f
    left join credits.entries c
      on c.account_id = f.account_id and c.entry_seq = f.entry_seq + 1 and c.kind = 'clawback' and c.key is null
   where f.account_id = _revoke_result.account_id and f.operation = 'revoke_grant' and f.key = _revoke_result.key
$$;
