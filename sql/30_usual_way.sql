-- What reserve() and settle() write in the usual case, for uses as well: the caller has locked the row of a plain account and
-- found its place, where it stays while it is locked. Whatever else there is goes the general way, in 31_general_way.sql.
-- Keeps: invariant 4 (held is the sum of the open reservations' slices).

-- Mostly the first grant can hold it all. If it cannot, or the id is known, nothing has happened, and the answer is null.
create or replace function credits._hold(
  account_id     text,
  place          tid,
  amount         numeric,
  free           numeric,
  low            boolean,
  reservation_id text,
  ttl            interval,
  usage          boolean,
  description    text,
  subject        text,
  member_id      text,
  capability     text,
  metadata       jsonb
)
returns credits.reserve_result
language plpgsql
as $$
declare
  v_ttl    interval := credits._exact(_hold.ttl);
  v_grants bigint[];
  v_at     timestamptz;
  v_result credits.reserve_result;
begin
  update credits.grants g
     set remaining = g.remaining - _hold.amount, held = g.held + _hold.amount
   where g.account_id = _hold.account_id
     and g.ctid = (select p.place from credits._payers(_hold.account_id, _hold.capability) p limit 1)
     and g.remaining >= _hold.amount
     and not exists (select from credits.reservations r
                      where r.account_id = _hold.account_id and r.reservation_id = _hold.reservation_id)
  returning array[g.grant_id], credits.now() into v_grants, v_at;
  if not found then
    return null;
  end if;
  update credits.balances b
     set held = b.held + _hold.amount, next_due_at = least(b.next_due_at, v_at + v_ttl)
   where b.account_id = _hold.account_id and b.ctid = _hold.place;
  insert into credits.reservations as r (account_id, reservation_id, requested, amount, available_after, ttl, created_at,
    expires_at, grant_ids, grant_amounts, counted, description, subject, member_id, capability, metadata)
  values (_hold.account_id, _hold.reservation_id, _hold.amount, _hold.amount, _hold.free, v_ttl, v_at,
    v_at + v_ttl, v_grants, array[_hold.amount], _hold.usage, _hold.description, _hold.subject, _hold.member_id,
    _hold.capability, coalesce(_hold.metadata, '{}'))
  returning r.reservation_id, r.account_id, r.amount, r.expires_at, r.available_after, false
    into v_result;
  if _hold.low then
    perform credits._after_debit(_hold.account_id);
  end if;
  return v_result;
end $$;

-- Mostly one grant was pinned, it goes on, the hold suffices, and nobody counts it but the use that settles it. If not, nothing
-- has happened, and the answer is null. balance is what will be left.
create or replace function credits._charge_hold(
  account_id     text,
  place          tid,
  amount         numeric,
  balance        numeric,
  reservation_id text,
  on_overage     text,
  usage          boolean,
  metadata       jsonb
)
returns credits.settle_result
language plpgsql
as $$
declare
  v_hold   record;
  v_at     timestamptz;
  v_seq    bigint;
  v_free   numeric;
  v_head   bytea;
  v_result credits.settle_result;
begin
  select r.ctid as place, r.grant_ids, r.grant_amounts[1] as held, trim_scale(r.grant_amounts[1] - _charge_hold.amount) as rest,
         r.subject, r.member_id, r.capability, r.description, coalesce(_charge_hold.metadata, r.metadata) as metadata,
         jsonb_build_object('settle', credits._fingerprint(jsonb_build_object(
           'amount', _charge_hold.amount, 'on_overage', coalesce(_charge_hold.on_overage, 'cap')),
           _charge_hold.metadata)) as request
    into v_hold
    from credits.reservations r
   where r.account_id = _charge_hold.account_id and r.reservation_id = _charge_hold.reservation_id and r.status = 'open'
     and cardinality(r.grant_ids) = 1 and r.grant_amounts[1] >= _charge_hold.amount
     and r.counted = _charge_hold.usage and not (_charge_hold.usage and (r.captured > 0 or r.member_id is not null));
  update credits.grants g
     set held = g.held - v_hold.held, consumed = g.consumed + _charge_hold.amount, remaining = g.remaining + v_hold.rest
   where g.account_id = _charge_hold.account_id and g.grant_id = v_hold.grant_ids[1] and g.status = 'active'
     and g.remaining + v_hold.rest > 0
  returning credits.now() into v_at;
  if not found then
    return null;
  end if;
  update credits.balances b
     set balance   = _charge_hold.balance,
         held      = b.held - v_hold.held,
         entry_seq = b.entry_seq + 1,
         hash      = credits._entry_hash(b.hash, row(
                       b.entry_seq + 1, v_at, null, 'settle', 'settle', _charge_hold.reservation_id, -_charge_hold.amount, 0,
                       _charge_hold.balance, trim_scale(_charge_hold.balance - b.held + v_hold.held), v_hold.grant_ids,
                       array[_charge_hold.amount], null, _charge_hold.reservation_id,
                       null, null, null, null, null, null, null)::credits.entries)
   where b.account_id = _charge_hold.account_id and b.ctid = _charge_hold.place
  returning b.entry_seq, trim_scale(b.balance - b.held), b.hash into v_seq, v_free, v_head;
  insert into credits.entries as e (entry_seq, created_at, account_id, kind, operation, key, amount, balance_after,
    available_after, grant_ids, grant_amounts, hash, reservation_id, subject, member_id, capability, description,
    fingerprint, metadata)
  values (v_seq, v_at, _charge_hold.account_id, 'settle', 'settle', _charge_hold.reservation_id, -_charge_hold.amount,
    _charge_hold.balance, v_free, v_hold.grant_ids, array[_charge_hold.amount], v_head, _charge_hold.reservation_id,
    v_hold.subject, v_hold.member_id, v_hold.capability, v_hold.description, v_hold.request, v_hold.metadata);
  update credits.reservations r
     set status = 'settled', closed_at = v_at, actual = _charge_hold.amount, charged = _charge_hold.amount, uncollected = 0,
         settle_seq = v_seq, grant_ids = '{}', grant_amounts = '{}',
         closing = jsonb_build_object('request', v_hold.request, 'balance', _charge_hold.balance, 'available', v_free)
   where r.account_id = _charge_hold.account_id and r.ctid = v_hold.place
  returning r.reservation_id, r.account_id, r.status, r.actual, r.charged, r.uncollected, v_hold.rest, r.late,
            r.settle_seq, _charge_hold.balance, v_free, false
    into v_result;
  return v_result;
end $$;
