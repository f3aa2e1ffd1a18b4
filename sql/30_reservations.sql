-- Reservations: credits held for work in flight. reserve holds, capture books a part, settle the last part, release none.
-- Keeps: invariant 4 (held is the sum of the open reservations' slices). A reservation pins its slices: nobody else can
-- spend them, and they outlive the expiry of their grant. Lock order: see 10_accounts.sql.

create or replace function credits.reserve(
  account_id     text,
  amount         numeric,
  reservation_id text,
  ttl            interval default null,
  min_amount     numeric  default null,
  description    text     default null,
  subject        text     default null,
  member_id      text     default null,
  capability     text     default null,
  metadata       jsonb    default null
)
returns credits.reserve_result
language plpgsql
security definer
set search_path = pg_catalog, pg_temp
as $$
declare
  v_amount  numeric  := credits._check_amount(reserve.amount);
  v_least   numeric  := least(v_amount, credits._check_min_amount(reserve.min_amount));
  v_ttl     interval := credits._check_ttl(coalesce(reserve.ttl, '15 minutes'));
  v_id      text     := credits._check_key(reserve.reservation_id, 'reservation_id');
  v_meta    jsonb    := credits._check_metadata(reserve.metadata);
  v_balance credits.balances;
  v_slices  credits.slices;
  v_first   credits.reservations;
  v_found   record;
  v_now     timestamptz;
begin
  v_balance := credits._lock_account(reserve.account_id);
  select a.status, r as reservation into v_found
    from credits.accounts a
    left join credits.reservations r
      on r.account_id = reserve.account_id and r.reservation_id = reserve.reservation_id
   where a.account_id = reserve.account_id;
  v_first := v_found.reservation;
  if v_first.reservation_id is not null then
    perform credits._check_same(
      credits._reserve_print(v_first.requested, v_first.ttl, v_first.min_amount, v_first.description,
        v_first.subject, v_first.member_id, v_first.capability, v_first.metadata),
      credits._reserve_print(v_amount, v_ttl, reserve.min_amount, reserve.description, reserve.subject,
        reserve.member_id, reserve.capability, reserve.metadata),
      'reserve', reserve.reservation_id);
    return credits._reserve_result(v_first, true);
  end if;

  if v_found.status <> 'active' then
    perform credits._fail_status(reserve.account_id, v_found.status);
  end if;
  v_slices := credits._take(reserve.account_id, v_amount, reserve.capability, 'held');
  if v_slices.taken < v_least or v_balance.debt > 0 then
    perform credits._fail_short(v_least, v_slices.taken, v_balance.debt);
  end if;

  v_now := credits.now();
  insert into credits.reservations as r (account_id, reservation_id, requested, amount, available_after, ttl, min_amount,
    created_at, expires_at, grant_ids, grant_amounts, description, subject, member_id, capability, metadata)
  values (reserve.account_id, v_id, v_amount, trim_scale(v_slices.taken),
    trim_scale(v_slices.left_free - v_balance.debt), v_ttl, reserve.min_amount, v_now, v_now + v_ttl,
    v_slices.grant_ids, v_slices.amounts, reserve.description, reserve.subject, reserve.member_id, reserve.capability,
    coalesce(v_meta, '{}'))
  returning r.* into v_first;

  update credits.balances b
     set held = b.held + v_first.amount, next_due_at = least(b.next_due_at, v_first.expires_at)
   where b.account_id = reserve.account_id;
  return credits._reserve_result(v_first, false);
end $$;
comment on function credits.reserve(text, numeric, text, interval, numeric, text, text, text, text, jsonb) is
'Holds credits for work in flight, until it is settled or released, or its ttl has run out.

All or nothing, unless min_amount says how little will do: then what is available, up to amount, is held. ttl is 15
minutes by default. reservation_id is chosen by the caller and is the key: the same call answers with the first result,
marked replayed. With a capability, grants that are scoped to it pay too.
Errors: 400 invalid_request, 402 insufficient_credits, 404 account_not_found, 409 idempotency_conflict,
422 invalid_amount, 423 account_frozen, account_closed.';

create or replace function credits.capture(
  account_id     text,
  reservation_id text,
  amount         numeric,
  key            text default null
)
returns credits.entry_result
language plpgsql
security definer
set search_path = pg_catalog, pg_temp
as $$
declare
  v_amount  numeric := credits._check_amount(capture.amount);
  v_print   jsonb   := jsonb_build_object('amount', v_amount, 'reservation_id', capture.reservation_id);
  v_balance credits.balances;
  v_entry   credits.entries;
  v_hold    credits.reservations;
  v_split   credits.split;
begin
  perform credits._check_key(capture.key, 'key');
  v_balance := credits._lock_account(capture.account_id);
  v_entry   := credits._first_entry(capture.account_id, 'capture', capture.key, v_print);
  if v_entry.entry_seq is not null then
    return credits._entry_result(v_entry, true);
  end if;

  v_hold := credits._reservation(capture.account_id, capture.reservation_id);
  if v_hold.status <> 'open' then
    perform credits._fail_closed(v_hold);
  elsif v_amount > v_hold.amount - v_hold.captured then
    perform credits._fail_short(v_amount, v_hold.amount - v_hold.captured);
  end if;

  v_split := credits._split(v_hold, v_amount);
  perform credits._use_held(capture.account_id, v_split.used);
  update credits.reservations r
     set captured      = r.captured + v_amount,
         grant_ids     = coalesce((v_split.rest).grant_ids, '{}'),
         grant_amounts = coalesce((v_split.rest).amounts, '{}')
   where r.account_id = capture.account_id and r.reservation_id = capture.reservation_id;

  v_entry := credits._reservation_entry(v_hold, 'capture', capture.key, v_print, -v_amount);
  return credits._entry_result(credits._post(v_balance, v_entry, v_split.used, held => -v_amount), false);
end $$;
comment on function credits.capture(text, text, numeric, text) is
'Books a part of a reservation and keeps the rest held: for work that streams.

amount is of this call, at most what is still held. The deadline does not move; see extend. key is required.
Errors: 400 invalid_request, 402 insufficient_credits, 404 account_not_found, reservation_not_found,
409 idempotency_conflict, reservation_closed, 410 reservation_expired, 422 invalid_amount.';

create or replace function credits.settle(
  account_id     text,
  reservation_id text,
  amount         numeric,
  on_overage     text  default 'cap',
  metadata       jsonb default null
)
returns credits.settle_result
language plpgsql
security definer
set search_path = pg_catalog, pg_temp
as $$
declare
  v_amount  numeric := credits._check_amount(settle.amount, zero => true);
  v_policy  text    := credits._check_overage(settle.on_overage);
  v_print   jsonb   := jsonb_build_object('settle', credits._fingerprint(
                         jsonb_build_object('amount', v_amount, 'on_overage', v_policy), settle.metadata));
  v_meta    jsonb   := credits._check_metadata(settle.metadata);
  v_balance credits.balances;
  v_hold    credits.reservations;
begin
  v_balance := credits._lock_account(settle.account_id);
  v_hold    := credits._reservation(settle.account_id, settle.reservation_id);
  if v_hold.status = 'settled' then
    perform credits._check_same(v_hold.closing -> 'request', v_print, 'settle', settle.reservation_id);
    return credits._settle_result(v_hold, true);
  elsif v_hold.status = 'released' then
    perform credits._fail_closed(v_hold);
  end if;
  v_hold := credits._settle(v_balance, v_hold, v_amount, v_policy, v_print, v_meta);
  return credits._settle_result(v_hold, false);
end $$;
comment on function credits.settle(text, text, numeric, text, jsonb) is
'Books the last part of a reservation and returns the rest.

amount is of this call, beside what was captured; 0 books nothing. Above the hold, on_overage decides: cap (default) takes
the hold, then what is available, never below zero, and records the rest as uncollected; overflow goes on into debt, up to
the account''s debt_limit; reject refuses and leaves the hold open. Always actual = charged + uncollected. A reservation
that has run out is charged afresh under the same policy and marked late. Works on frozen accounts too: the work is done.
The same call again answers with the first result, marked replayed.
Errors: 400 invalid_request, 402 insufficient_credits, 404 account_not_found, reservation_not_found,
409 idempotency_conflict, reservation_closed, 422 invalid_amount.';

create or replace function credits.release(
  account_id     text,
  reservation_id text,
  reason         text default null
)
returns credits.settle_result
language plpgsql
security definer
set search_path = pg_catalog, pg_temp
as $$
declare
  v_print   jsonb := jsonb_strip_nulls(jsonb_build_object('release', jsonb_build_object('reason', release.reason)));
  v_hold    credits.reservations;
begin
  perform credits._lock_account(release.account_id);
  v_hold := credits._reservation(release.account_id, release.reservation_id);
  if v_hold.status = 'settled' then
    perform credits._fail_closed(v_hold);
  elsif v_hold.status = 'released' then
    perform credits._check_same(v_hold.closing -> 'request', v_print, 'release', release.reservation_id);
    return credits._settle_result(v_hold, true);
  elsif v_hold.status = 'open' then
    perform credits._return_hold(v_hold, 'released', v_print);
  end if;
  return credits._settle_result(credits._reservation(release.account_id, release.reservation_id), false);
end $$;
comment on function credits.release(text, text, text) is
'Returns all that a reservation still holds.

What returns pays an open debt first; what belongs to a grant that has expired meanwhile expires at once. A reservation
that has already run out answers with status expired: its credits are back.
Errors: 400 invalid_request, 404 account_not_found, reservation_not_found, 409 idempotency_conflict, reservation_closed.';

create or replace function credits.extend(
  account_id     text,
  reservation_id text,
  ttl            interval default null
)
returns credits.reservation_result
language plpgsql
security definer
set search_path = pg_catalog, pg_temp
as $$
declare
  v_ttl     interval := credits._check_ttl(coalesce(extend.ttl, '15 minutes'));
  v_hold    credits.reservations;
begin
  perform credits._lock_account(extend.account_id);
  v_hold := credits._reservation(extend.account_id, extend.reservation_id);
  if v_hold.status <> 'open' then
    perform credits._fail_closed(v_hold);
  end if;
  update credits.reservations r
     set expires_at = greatest(r.expires_at,
           least(credits.now() + v_ttl, r.created_at + (credits._setting('reservation_max_age') #>> '{}')::interval))
   where r.account_id = extend.account_id and r.reservation_id = extend.reservation_id
  returning r.* into v_hold;
  return credits._reservation_result(v_hold);
end $$;
comment on function credits.extend(text, text, interval) is
'Gives a reservation more time: ttl from now, 15 minutes by default. The heartbeat of long work.

Answers with the new deadline, which is never earlier than the old one and never later than 24 hours after the reserve
(setting reservation_max_age).
Errors: 400 invalid_request, 404 account_not_found, reservation_not_found, 409 reservation_closed,
410 reservation_expired.';

create or replace function credits.get_reservation(
  account_id     text,
  reservation_id text
)
returns credits.settle_result
language plpgsql
stable
security definer
set search_path = pg_catalog, pg_temp
as $$
begin
  perform credits._account(get_reservation.account_id);
  return credits._settle_result(credits._reservation(get_reservation.account_id, get_reservation.reservation_id), false);
end $$;
comment on function credits.get_reservation(text, text) is
'A reservation and its outcome: status open, settled, released or expired; closed ones are kept.

An open one whose time is over is shown as expired, which it is for everybody.
Errors: 400 invalid_request, 404 account_not_found, reservation_not_found.';

-- Helpers ------------------------------------------------------------------------------------------------------------

create or replace function credits._check_ttl(ttl interval)
returns interval
language plpgsql
stable
as $$
begin
  -- The default needs no look at the settings.
  if (_check_ttl.ttl > interval '0' and (_check_ttl.ttl <= interval '15 minutes'
      or _check_ttl.ttl <= (credits._setting('reservation_max_age') #>> '{}')::interval)) is not true then
    perform credits._fail(400, 'invalid_request', jsonb_build_object('argument', 'ttl', 'ttl', _check_ttl.ttl::text),
      'ttl is above zero and at most the setting reservation_max_age (24 hours).');
  end if;
  return _check_ttl.ttl;
end $$;

create or replace function credits._check_min_amount(min_amount numeric)
returns numeric
language plpgsql
immutable
as $$
begin
  return case when _check_min_amount.min_amount is not null then credits._check_amount(_check_min_amount.min_amount) end;
end $$;

create or replace function credits._check_overage(on_overage text)
returns text
language plpgsql
immutable
as $$
begin
  if coalesce(_check_overage.on_overage, 'cap') not in ('cap', 'overflow', 'reject') then
    perform credits._fail(400, 'invalid_request', jsonb_build_object('argument', 'on_overage'),
      'on_overage is cap, overflow or reject.');
  end if;
  return coalesce(_check_overage.on_overage, 'cap');
end $$;

create or replace function credits._reserve_print(
  amount      numeric,
  ttl         interval,
  min_amount  numeric,
  description text,
  subject     text,
  member_id   text,
  capability  text,
  metadata    jsonb
)
returns jsonb
language sql
stable
as $$
  select credits._fingerprint(jsonb_build_object(
           'amount', _reserve_print.amount, 'ttl', _reserve_print.ttl, 'min_amount', _reserve_print.min_amount,
           'description', _reserve_print.description, 'subject', _reserve_print.subject,
           'member_id', _reserve_print.member_id, 'capability', _reserve_print.capability),
           coalesce(_reserve_print.metadata, '{}'))
$$;

create or replace function credits._reservation(
  account_id     text,
  reservation_id text
)
returns credits.reservations
language plpgsql
stable
as $$
declare
  v_hold credits.reservations;
begin
  select r.* into v_hold
    from credits.reservations r
   where r.account_id = _reservation.account_id and r.reservation_id = _reservation.reservation_id;
  if not found then
    perform credits._check_key(_reservation.reservation_id, 'reservation_id');
    perform credits._fail(404, 'reservation_not_found',
      jsonb_build_object('reservation_id', _reservation.reservation_id));
  end if;
  return v_hold;
end $$;

create or replace function credits._fail_closed(hold credits.reservations)
returns void
language plpgsql
immutable
as $$
begin
  if (_fail_closed.hold).status = 'expired' then
    perform credits._fail(410, 'reservation_expired',
      jsonb_build_object('reservation_id', (_fail_closed.hold).reservation_id, 'status', 'expired'),
      'Its time is over and its credits are back. settle still charges it, marked late.');
  end if;
  perform credits._fail(409, 'reservation_closed',
    jsonb_build_object('reservation_id', (_fail_closed.hold).reservation_id, 'status', (_fail_closed.hold).status));
end $$;
