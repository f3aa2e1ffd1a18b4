-- Reservations as they stand: one, or those that hold something; and what the verbs answer with.

drop function if exists credits.get_reservation(text, text);
create or replace function credits.get_reservation(
  account_id     text,
  reservation_id text
)
returns credits.reservation_row
language plpgsql
stable
security definer
set search_path = pg_catalog, pg_temp
as $$
begin
  perform credits._account(get_reservation.account_id);
  return credits._reservation_row(credits._reservation(get_reservation.account_id, get_reservation.reservation_id));
end $$;
comment on function credits.get_reservation(text, text) is
'A reservation and its outcome: status open, settled, released or expired; closed ones are kept.

held is what it holds now: amount less what was captured, and nothing once it is closed or its time is over. An open one whose
time is over is shown as expired, which it is for everybody. balance and available are those right after it was closed.
Errors: 400 invalid_request, 404 account_not_found, reservation_not_found.';

create or replace function credits.list_reservations(
  account_id text,
  after      timestamptz default null,
  max_rows   integer     default 50
)
returns setof credits.reservation_row
language plpgsql
stable
security definer
set search_path = pg_catalog, pg_temp
as $$
declare
  v_rows  integer     := credits._check_rows(coalesce(list_reservations.max_rows, 50), 'max_rows');
  v_after timestamptz := greatest(list_reservations.after, credits.now());
begin
  perform credits._account(list_reservations.account_id);
  return query
    select r.*
      from (select h as hold
              from credits.reservations h
             where h.account_id = list_reservations.account_id and h.expires_at > v_after and h.status = 'open'
             order by h.expires_at
             fetch first (v_rows) rows with ties) o,
           lateral credits._reservation_row(o.hold) r
     order by r.expires_at, r.reservation_id;
end $$;
comment on function credits.list_reservations(text, timestamptz, integer) is
'The open reservations of an account, the first to run out first; closed ones are found by history() and get_reservation().

What they hold is the held of get_balance(). Page on with after = the last expires_at seen. max_rows is 1 to 1000, 50 by
default; those that run out at one moment come together, so that none is left between two pages.
Errors: 400 invalid_request, 404 account_not_found.';

create or replace function credits._reservation_row(hold credits.reservations)
returns credits.reservation_row
language sql
stable
as $$
  select o.*, trim_scale(h.amount), trim_scale(h.captured),
         case o.status when 'open' then trim_scale(h.amount - h.captured) else 0 end,
         h.created_at, h.expires_at, h.closed_at, h.subject, h.member_id, h.capability, h.description, h.metadata
    from (select (_reservation_row.hold).*) h,
         credits._settle_result(_reservation_row.hold, false) o
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

create or replace function credits._reserve_result(
  hold     credits.reservations,
  replayed boolean
)
returns credits.reserve_result
language plpgsql
stable
as $$
declare
  v_hold credits.reservations := _reserve_result.hold;
begin
  return row(v_hold.reservation_id, v_hold.account_id, v_hold.amount, v_hold.created_at + v_hold.ttl,
             v_hold.available_after, _reserve_result.replayed)::credits.reserve_result;
end $$;

create or replace function credits._reservation_result(hold credits.reservations)
returns credits.reservation_result
language plpgsql
stable
as $$
declare
  v_hold credits.reservations := _reservation_result.hold;
begin
  return row(v_hold.reservation_id, v_hold.account_id, v_hold.status, v_hold.amount, v_hold.captured,
             v_hold.amount - v_hold.captured, v_hold.expires_at,
             (credits.get_balance(v_hold.account_id)).available)::credits.reservation_result;
end $$;

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
  v_result.balance        := (v_hold.closing ->> 'balance')::numeric;
  v_result.available      := (v_hold.closing ->> 'available')::numeric;
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
