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
  v_ttl    interval := coalesce(reserve.ttl, '15 minutes');
  v_amount numeric;
  v_free   numeric;
  v_below  numeric;
  v_place  tid;
  v_result credits.reserve_result;
begin
  select trim_scale(reserve.amount), trim_scale(b.balance - b.held - reserve.amount), b.topup_below, b.ctid
    into v_amount, v_free, v_below, v_place
    from credits.balances b
   where b.account_id = reserve.account_id and b.status = 'active' and credits._is_plain(b)
     and credits._is_request(reserve.amount, reserve.reservation_id, reserve.metadata)
     and reserve.min_amount is null and extract(epoch from v_ttl) > 0 and extract(epoch from v_ttl) <= 900
     for no key update;

  -- What listed members use is counted, and goes the general way.
  if found and (reserve.member_id is null or not credits._is_listed(reserve.account_id, reserve.member_id)) then
    v_result := credits._hold(reserve.account_id, v_place, v_amount, v_free, v_free < v_below, reserve.reservation_id, v_ttl,
      false, reserve.description, reserve.subject, reserve.member_id, reserve.capability, reserve.metadata);
    if v_result.reservation_id is not null then
      return v_result;
    end if;
  end if;
  return credits._reserve(reserve.account_id, reserve.amount, reserve.reservation_id, v_ttl, reserve.min_amount,
    reserve.description, reserve.subject, reserve.member_id, reserve.capability, reserve.metadata);
end $$;
comment on function credits.reserve(text, numeric, text, interval, numeric, text, text, text, text, jsonb) is
'Holds credits for work in flight, until it is settled or released, or its ttl has run out.

All or nothing, unless min_amount says how little will do: then what is available, up to amount, is held. ttl is 15
minutes by default. reservation_id is chosen by the caller and is the key: the same call answers with the first result,
marked replayed. With a capability, grants that are scoped to it pay too. A member_id that set_member has added is held to
its monthly limit: the hold counts in full at once, and is corrected when it ends.
Errors: 400 invalid_request, 402 insufficient_credits, 403 forbidden, 404 account_not_found, 409 idempotency_conflict,
422 invalid_amount, 423 account_frozen, account_closed, 429 member_limit_reached.';

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
  v_amount  numeric;
  v_balance numeric;
  v_place   tid;
  v_result  credits.settle_result;
begin
  select trim_scale(settle.amount), trim_scale(b.balance - settle.amount), b.ctid
    into v_amount, v_balance, v_place
    from credits.balances b
   where b.account_id = settle.account_id and credits._is_plain(b)
     and credits._would_be_low(b, settle.amount) is not true
     and credits._is_request(settle.amount, settle.reservation_id, settle.metadata)
     and coalesce(settle.on_overage, 'cap') in ('cap', 'overflow', 'reject')
     for no key update;
  if found then
    v_result := credits._charge_hold(settle.account_id, v_place, v_amount, v_balance, settle.reservation_id, settle.on_overage,
                                     false, settle.metadata);
    if v_result.reservation_id is not null then
      return v_result;
    end if;
  end if;
  return credits._settle(settle.account_id, settle.reservation_id, settle.amount, settle.on_overage, settle.metadata);
end $$;
comment on function credits.settle(text, text, numeric, text, jsonb) is
'Books the last part of a reservation and returns the rest.

amount is of this call, beside what was captured; 0 books nothing. Above the hold, on_overage decides: cap (default) takes
the hold, then what is available, never below zero, and records the rest as uncollected; overflow goes on into debt, up to
the account''s debt_limit; reject refuses and leaves the hold open. Always actual = charged + uncollected. A reservation
that has run out is charged afresh under the same policy and marked late. Works on frozen accounts, and past the limit of a
member: the work is done.
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
  v_max_age interval := credits._exact((credits._setting('reservation_max_age') #>> '{}')::interval);
  v_ttl     interval := credits._check_ttl(least(coalesce(extend.ttl, '15 minutes'), v_max_age));
  v_hold    credits.reservations;
begin
  perform credits._lock_account(extend.account_id);
  v_hold := credits._reservation(extend.account_id, extend.reservation_id);
  if v_hold.status <> 'open' then
    perform credits._fail_closed(v_hold);
  end if;
  update credits.reservations r
     set expires_at = greatest(r.expires_at, least(credits.now() + v_ttl, r.created_at + v_max_age))
   where r.account_id = extend.account_id and r.reservation_id = extend.reservation_id
  returning r.* into v_hold;
  return credits._reservation_result(v_hold);
end $$;
comment on function credits.extend(text, text, interval) is
'Gives a reservation more time: ttl from now, 15 minutes by default. The heartbeat of long work.

Answers with the new deadline, which is never earlier than the old one and never later than 24 hours after the reserve
(setting reservation_max_age), however long the ttl.
Errors: 400 invalid_request, 404 account_not_found, reservation_not_found, 409 reservation_closed,
410 reservation_expired.';
