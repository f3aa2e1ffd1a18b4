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
  v_ttl     interval := credits._check_ttl(coalesce(reserve.ttl, '15 minutes'));
  v_balance credits.balances;
  v_slices  credits.slices;
  v_first   credits.reservations;
  v_now     timestamptz;
begin
  perform credits._check_key(reserve.reservation_id, 'reservation_id');
  perform credits._check_metadata(reserve.metadata);
  v_balance := credits._lock_account(reserve.account_id);
  select r.* into v_first
    from credits.reservations r
   where r.account_id = reserve.account_id and r.reservation_id = reserve.reservation_id;
  if found then
    perform credits._check_same(
      credits._reserve_print(v_first.requested, v_first.ttl, v_first.min_amount, v_first.description,
        v_first.subject, v_first.member_id, v_first.capability, v_first.metadata),
      credits._reserve_print(v_amount, v_ttl, reserve.min_amount, reserve.description, reserve.subject,
        reserve.member_id, reserve.capability, reserve.metadata),
      'reserve', reserve.reservation_id);
    return credits._reserve_result(v_first, true);
  end if;

  perform credits._check_active(reserve.account_id);
  v_slices := credits._choose(reserve.account_id, v_amount, reserve.capability);
  if v_slices.taken < least(v_amount, credits._check_min_amount(reserve.min_amount)) or v_balance.debt > 0 then
    perform credits._fail_short(least(v_amount, reserve.min_amount), v_slices.payable - v_balance.debt);
  end if;
  perform credits._consume(reserve.account_id, v_slices, 'held');

  v_now := credits.now();
  insert into credits.reservations as r (account_id, reservation_id, requested, amount, available_after, ttl, min_amount,
    created_at, expires_at, grant_ids, grant_amounts, description, subject, member_id, capability, metadata)
  values (reserve.account_id, reserve.reservation_id, v_amount, trim_scale(v_slices.taken),
    trim_scale(v_slices.left_free - v_balance.debt), v_ttl, reserve.min_amount, v_now, v_now + v_ttl,
    v_slices.grant_ids, v_slices.amounts, reserve.description, reserve.subject, reserve.member_id, reserve.capability,
    coalesce(reserve.metadata, '{}'))
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
  v_print   jsonb   := jsonb_strip_nulls(jsonb_build_object('settle', jsonb_build_object(
                         'amount', v_amount, 'on_overage', v_policy, 'metadata', settle.metadata)));
  v_balance credits.balances;
  v_hold    credits.reservations;
begin
  perform credits._check_metadata(settle.metadata);
  v_balance := credits._lock_account(settle.account_id);
  v_hold    := credits._reservation(settle.account_id, settle.reservation_id);
  if v_hold.status = 'settled' then
    perform credits._check_same(v_hold.closing -> 'request', v_print, 'settle', settle.reservation_id);
    return credits._settle_result(v_hold, true);
  elsif v_hold.status = 'released' then
    perform credits._fail_closed(v_hold);
  end if;
  v_hold := credits._settle(v_balance, v_hold, v_amount, v_policy, v_print, settle.metadata);
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
  select jsonb_strip_nulls(jsonb_build_object(
           'amount', _reserve_print.amount, 'ttl', _reserve_print.ttl, 'min_amount', _reserve_print.min_amount,
           'description', _reserve_print.description, 'subject', _reserve_print.subject,
           'member_id', _reserve_print.member_id, 'capability', _reserve_print.capability,
           'metadata', coalesce(_reserve_print.metadata, '{}')))
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


-- The held slices, cut at an amount: the first ones are used, the rest stay.
create or replace function credits._split(
  hold   credits.reservations,
  amount numeric
)
returns credits.split
language plpgsql
immutable
as $$
declare
  v_ids     bigint[]  := (_split.hold).grant_ids;
  v_amounts numeric[] := (_split.hold).grant_amounts;
  v_open    numeric   := _split.amount;
  v_use     numeric;
  v_used    credits.slices;
  v_rest    credits.slices;
begin
  v_used.taken := 0;
  v_rest.taken := 0;
  for v_place in 1 .. cardinality(v_ids) loop
    v_use  := least(v_open, v_amounts[v_place]);
    v_open := v_open - v_use;
    if v_use > 0 then
      v_used.grant_ids := v_used.grant_ids || v_ids[v_place];
      v_used.amounts   := v_used.amounts || v_use;
      v_used.taken     := v_used.taken + v_use;
    end if;
    if v_use < v_amounts[v_place] then
      v_rest.grant_ids := v_rest.grant_ids || v_ids[v_place];
      v_rest.amounts   := v_rest.amounts || (v_amounts[v_place] - v_use);
      v_rest.taken     := v_rest.taken + v_amounts[v_place] - v_use;
    end if;
  end loop;
  return row(v_used, v_rest)::credits.split;
end $$;

create or replace function credits._use_held(
  account_id text,
  slices     credits.slices
)
returns void
language plpgsql
as $$
begin
  for v_place in 1 .. cardinality((_use_held.slices).grant_ids) loop
    update credits.grants g
       set held     = g.held - (_use_held.slices).amounts[v_place],
           consumed = g.consumed + (_use_held.slices).amounts[v_place],
           status   = case when g.status = 'active' and g.remaining = 0 and g.held = (_use_held.slices).amounts[v_place]
                           then 'exhausted' else g.status end
     where g.account_id = _use_held.account_id and g.grant_id = (_use_held.slices).grant_ids[v_place];
  end loop;
end $$;

create or replace function credits._reservation_entry(
  hold        credits.reservations,
  kind        text,
  key         text,
  fingerprint jsonb,
  amount      numeric,
  metadata    jsonb default null
)
returns credits.entries
language plpgsql
immutable
as $$
declare
  v_entry credits.entries;
begin
  v_entry.account_id     := (_reservation_entry.hold).account_id;
  v_entry.kind           := _reservation_entry.kind;
  v_entry.operation      := _reservation_entry.kind;
  v_entry.key            := _reservation_entry.key;
  v_entry.fingerprint    := _reservation_entry.fingerprint;
  v_entry.amount         := _reservation_entry.amount;
  v_entry.reservation_id := (_reservation_entry.hold).reservation_id;
  v_entry.subject        := (_reservation_entry.hold).subject;
  v_entry.member_id      := (_reservation_entry.hold).member_id;
  v_entry.capability     := (_reservation_entry.hold).capability;
  v_entry.description    := (_reservation_entry.hold).description;
  v_entry.metadata       := coalesce(_reservation_entry.metadata, (_reservation_entry.hold).metadata);
  return v_entry;
end $$;

-- An open hold pays first; above it the policy decides. An expired one holds nothing, so all of it is overage.
create or replace function credits._settle(
  balance  credits.balances,
  hold     credits.reservations,
  amount   numeric,
  policy   text,
  request  jsonb,
  metadata jsonb
)
returns credits.reservations
language plpgsql
as $$
declare
  v_hold    credits.reservations := _settle.hold;
  v_balance credits.balances := _settle.balance;
  v_held    numeric := 0;
  v_debt    numeric := 0;
  v_slices  credits.slices;
  v_entry   credits.entries;
begin
  v_slices := credits._end_hold(v_hold, _settle.amount);
  if v_hold.status = 'open' then
    v_held := v_hold.amount - v_hold.captured;
  end if;
  if _settle.amount > v_slices.taken then
    v_slices := credits._take_overage(v_balance, v_hold, v_slices, _settle.amount - v_slices.taken, _settle.policy);
    v_debt   := credits._overdraft(v_balance, _settle.amount - v_slices.taken, _settle.policy);
  end if;

  if v_slices.taken > 0 then
    v_entry := credits._reservation_entry(v_hold, 'settle', v_hold.reservation_id, _settle.request, -v_slices.taken,
                                          _settle.metadata);
    v_entry := credits._post(v_balance, v_entry, v_slices, held => -v_held);
  elsif v_held > 0 then
    update credits.balances b set held = b.held - v_held where b.account_id = v_hold.account_id;
  end if;
  if v_debt > 0 then
    v_entry := credits._post_overdraft(v_hold, v_debt, _settle.request, v_entry.key is null);
  end if;
  if v_held > _settle.amount then
    v_balance := credits._tidy(v_hold.account_id);
  else
    v_balance := credits._balance(v_hold.account_id);
  end if;
  return credits._close(v_hold, 'settled', v_balance, _settle.request, _settle.amount, v_slices.taken + v_debt, v_entry);
end $$;

-- The first slices of a hold are used up to an amount, the others return. Answers with what was used.
create or replace function credits._end_hold(
  hold   credits.reservations,
  amount numeric
)
returns credits.slices
language plpgsql
as $$
declare
  v_hold   credits.reservations := _end_hold.hold;
  v_open   numeric := _end_hold.amount;
  v_use    numeric;
  v_slices credits.slices;
begin
  v_slices.taken := 0;
  for v_place in 1 .. cardinality(v_hold.grant_ids) loop
    v_use  := least(v_open, v_hold.grant_amounts[v_place]);
    v_open := v_open - v_use;
    update credits.grants g
       set held      = g.held - v_hold.grant_amounts[v_place],
           consumed  = g.consumed + v_use,
           remaining = g.remaining + v_hold.grant_amounts[v_place] - v_use,
           status    = case when v_use < v_hold.grant_amounts[v_place] then 'active'
                            when g.status = 'active' and g.remaining = 0 and g.held = v_use then 'exhausted'
                            else g.status end
     where g.account_id = v_hold.account_id and g.grant_id = v_hold.grant_ids[v_place];
    if v_use > 0 then
      v_slices.grant_ids := v_slices.grant_ids || v_hold.grant_ids[v_place];
      v_slices.amounts   := v_slices.amounts || v_use;
      v_slices.taken     := v_slices.taken + v_use;
    end if;
  end loop;
  return v_slices;
end $$;

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
  v_more   credits.slices := credits._choose((_take_overage.hold).account_id, _take_overage.overage, (_take_overage.hold).capability);
begin
  if (_take_overage.balance).debt > 0 then
    v_more.taken := 0;
  end if;
  if _take_overage.policy = 'reject' and v_more.taken < _take_overage.overage then
    perform credits._fail_short(_take_overage.overage + v_slices.taken,
      v_more.payable - (_take_overage.balance).debt + v_slices.taken);
  elsif v_more.taken > 0 then
    perform credits._consume((_take_overage.hold).account_id, v_more);
    select array_agg(m.grant_id order by m.place), array_agg(m.amount order by m.place), sum(m.amount)
      into v_slices.grant_ids, v_slices.amounts, v_slices.taken
      from (select s.grant_id, sum(s.amount) as amount, min(s.place) as place
              from unnest(v_slices.grant_ids || v_more.grant_ids, v_slices.amounts || v_more.amounts)
                   with ordinality s (grant_id, amount, place)
             group by s.grant_id) m;
  end if;
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

-- All of a hold returns: released by its owner, or run out.
create or replace function credits._return_hold(
  hold    credits.reservations,
  status  text,
  request jsonb default null
)
returns credits.balances
language plpgsql
as $$
declare
  v_hold    credits.reservations := _return_hold.hold;
  v_balance credits.balances;
begin
  perform credits._end_hold(v_hold, 0);
  update credits.balances b set held = b.held - (v_hold.amount - v_hold.captured) where b.account_id = v_hold.account_id;
  v_balance := credits._tidy(v_hold.account_id);
  perform credits._close(v_hold, _return_hold.status, v_balance, _return_hold.request);
  return v_balance;
end $$;

create or replace function credits._expire_reservation(
  account_id     text,
  reservation_id text
)
returns credits.balances
language plpgsql
as $$
begin
  return credits._return_hold(
    credits._reservation(_expire_reservation.account_id, _expire_reservation.reservation_id), 'expired');
end $$;

-- The reservation is the stored result of the call that closes it.
create or replace function credits._close(
  hold    credits.reservations,
  status  text,
  balance credits.balances,
  request jsonb           default null,
  actual  numeric         default null,
  charged numeric         default null,
  entry   credits.entries default null
)
returns credits.reservations
language plpgsql
as $$
declare
  v_hold      credits.reservations;
  v_available numeric := (_close.entry).available_after;
begin
  if (_close.entry).entry_seq is distinct from (_close.balance).entry_seq then
    v_available := trim_scale(credits._free((_close.hold).account_id) - (_close.balance).debt);
  end if;
  update credits.reservations r
     set status        = _close.status,
         closed_at     = credits.now(),
         actual        = _close.actual,
         charged       = trim_scale(_close.charged),
         uncollected   = trim_scale(_close.actual - _close.charged),
         late          = (_close.hold).status = 'expired',
         settle_seq    = (_close.entry).entry_seq,
         grant_ids     = '{}',
         grant_amounts = '{}',
         closing       = jsonb_build_object('request', _close.request, 'balance', (_close.balance).balance,
                                            'available', v_available)
   where r.account_id = (_close.hold).account_id and r.reservation_id = (_close.hold).reservation_id
  returning r.* into v_hold;
  return v_hold;
end $$;

create or replace function credits._reserve_result(
  hold     credits.reservations,
  replayed boolean
)
returns credits.reserve_result
language sql
stable
as $$
  select row((_reserve_result.hold).reservation_id, (_reserve_result.hold).account_id, (_reserve_result.hold).amount, (_reserve_result.hold).created_at + (_reserve_result.hold).ttl,
             (_reserve_result.hold).available_after, _reserve_result.replayed)::credits.reserve_result
$$;

create or replace function credits._reservation_result(hold credits.reservations)
returns credits.reservation_result
language sql
stable
as $$
  select row((_reservation_result.hold).reservation_id, (_reservation_result.hold).account_id, (_reservation_result.hold).status, (_reservation_result.hold).amount, (_reservation_result.hold).captured,
             (_reservation_result.hold).amount - (_reservation_result.hold).captured, (_reservation_result.hold).expires_at, b.available)::credits.reservation_result
    from credits.get_balance((_reservation_result.hold).account_id) b
$$;

create or replace function credits._settle_result(
  hold     credits.reservations,
  replayed boolean
)
returns credits.settle_result
language plpgsql
stable
as $$
declare
  v_hold   credits.reservations := _settle_result.hold;
  v_result credits.settle_result;
begin
  v_result.reservation_id := v_hold.reservation_id;
  v_result.account_id     := v_hold.account_id;
  v_result.status         := v_hold.status;
  v_result.actual         := v_hold.actual;
  v_result.charged        := v_hold.charged;
  v_result.uncollected    := v_hold.uncollected;
  v_result.late           := v_hold.late;
  v_result.entry_seq      := v_hold.settle_seq;
  v_result.balance        := v_hold.closing ->> 'balance';
  v_result.available      := v_hold.closing ->> 'available';
  v_result.replayed       := _settle_result.replayed;
  if v_hold.status = 'open' and v_hold.expires_at <= credits.now() then
    v_result.status := 'expired';
  end if;
  if v_hold.status = 'settled' and v_hold.late then
    v_result.released := 0;
  elsif v_result.status <> 'open' then
    v_result.released := trim_scale(greatest(0, v_hold.amount - v_hold.captured - coalesce(v_hold.actual, 0)));
  end if;
  return v_result;
end $$;
