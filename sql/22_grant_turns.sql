-- A grant starts and ends at its moment. Keeps invariant 3, as 22_grants.sql does; the caller holds the lock of the account.

-- The credits of a grant come into effect.
create or replace function credits._start_grant(
  balance  credits.balances,
  grant_id bigint,
  at       timestamptz default credits.now()
)
returns credits.balances
language plpgsql
as $$
declare
  v_grant credits.grants;
  v_entry credits.entries;
begin
  update credits.grants g
     set status = 'active'
   where g.account_id = (_start_grant.balance).account_id and g.grant_id = _start_grant.grant_id
  returning g.* into v_grant;
  v_entry.account_id  := v_grant.account_id;
  v_entry.kind        := 'grant';
  v_entry.operation   := 'grant';
  v_entry.key         := v_grant.key;
  v_entry.fingerprint := v_grant.fingerprint;
  v_entry.amount      := v_grant.remaining;
  v_entry.description := v_grant.description;
  v_entry.metadata    := v_grant.metadata;
  perform credits._post(_start_grant.balance, v_entry, credits._slice(v_grant.grant_id, v_grant.remaining));
  return credits._tidy(v_grant.account_id, _start_grant.at);
end $$;

-- The time of a grant is over: what is left of it is booked as breakage, what is held stays with its reservations.
create or replace function credits._expire_grant(
  balance  credits.balances,
  grant_id bigint
)
returns credits.balances
language plpgsql
as $$
declare
  v_grant credits.grants;
  v_entry credits.entries;
begin
  select g.* into v_grant
    from credits.grants g
   where g.account_id = (_expire_grant.balance).account_id and g.grant_id = _expire_grant.grant_id;
  update credits.grants g
     set remaining = 0, expired = g.expired + g.remaining, status = 'expired'
   where g.account_id = v_grant.account_id and g.grant_id = v_grant.grant_id and g.status = 'active';
  if v_grant.remaining = 0 then
    return _expire_grant.balance;
  end if;
  v_entry.account_id  := v_grant.account_id;
  v_entry.kind        := 'expire';
  v_entry.operation   := 'expire';
  v_entry.amount      := -v_grant.remaining;
  v_entry.description := v_grant.description;
  perform credits._post(_expire_grant.balance, v_entry, credits._slice(v_grant.grant_id, v_grant.remaining));
  if v_grant.kind = 'plan' then
    perform credits._after_turn(v_grant.account_id, v_grant.grant_id, v_grant.expires_at);
  end if;
  return credits._balance(v_grant.account_id);
end $$;
