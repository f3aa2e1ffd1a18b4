-- Reservations as they stand: one, or those that hold something.

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
