-- Credits held for work in flight.
set local role credits_owner;

create table credits.reservations (
  created_at      timestamptz    not null,
  expires_at      timestamptz    not null,
  account_id      text           not null,
  reservation_id  text           not null,
  status          credits.reservation_status not null default 'open',
  requested       credits.amount not null,
  amount          credits.amount not null,
  available_after numeric        not null,
  closed_at       timestamptz,
  captured        credits.part   not null default 0,
  actual          credits.part,
  charged         credits.part,
  uncollected     credits.part,
  late            boolean        not null default false,
  grant_ids       bigint[]       not null,
  grant_amounts   numeric[]      not null,
  ttl             interval       not null,
  min_amount      credits.amount,
  settle_seq      bigint,
  closing         jsonb,
  subject         text,
  member_id       text,
  capability      text,
  description     text,
  metadata        jsonb          not null default '{}',
  primary key (account_id, reservation_id),
  constraint reservations_actual_is_charged_or_uncollected check (actual = charged + uncollected)
) with (fillfactor = 70);

-- expires_at moves only by extend(), so settling stays a HOT update.
create index reservations_by_deadline on credits.reservations (account_id, expires_at);

comment on table credits.reservations is
  'Credits held for work in flight. It pins slices of grants; closed ones stay with their outcome.';
comment on column credits.reservations.requested is 'What reserve() asked for; amount may be less, down to min_amount.';
comment on column credits.reservations.amount is 'What was held at the start.';
comment on column credits.reservations.captured is 'Booked so far by capture(), out of the hold.';
comment on column credits.reservations.actual is
  'What settle() was asked to charge, beside the captured part: charged + uncollected.';
comment on column credits.reservations.late is 'Settled after it had run out: charged afresh.';
comment on column credits.reservations.grant_ids is 'The grants that it still pins, beside grant_amounts; emptied when it closes.';
comment on column credits.reservations.settle_seq is 'entry_seq of what settle() charged.';
comment on column credits.reservations.closing is 'The arguments of the call that closed it, and its stored result.';

create type credits.reserve_result as (
  reservation_id text, account_id text, amount numeric, expires_at timestamptz, available numeric, replayed boolean);
create type credits.reservation_result as (
  reservation_id text, account_id text, status text, amount numeric, captured numeric, held numeric,
  expires_at timestamptz, available numeric);
create type credits.settle_result as (
  reservation_id text, account_id text, status text, actual numeric, charged numeric, uncollected numeric,
  released numeric, late boolean, entry_seq bigint, balance numeric, available numeric, replayed boolean);

-- The slices of a hold, cut in two.
create type credits.split as (used credits.slices, rest credits.slices);

alter table credits.reservations enable row level security;
