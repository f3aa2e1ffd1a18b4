-- What any function costs that keeps a balance, lots and a ledger: only the writes, on narrow tables. No key is looked for,
-- nothing is checked, hashed or priced, no lot ends, and the first lot always pays.
create table floor.lots (
  account_id text    not null,
  lot        integer not null,
  remaining  numeric not null,
  held       numeric not null default 0,
  consumed   numeric not null default 0,
  primary key (account_id, lot)
) with (fillfactor = 50);
create table floor.moves (
  account_id    text        not null,
  seq           bigint      not null,
  created_at    timestamptz not null default now(),
  operation     text        not null,
  key           text        not null,
  amount        numeric     not null,
  balance_after numeric     not null,
  lots          integer[]   not null,
  primary key (account_id, seq),
  unique (account_id, operation, key)
);
create table floor.holds (
  account_id text        not null,
  hold_id    text        not null,
  status     text        not null default 'open',
  amount     numeric     not null,
  lot        integer     not null,
  expires_at timestamptz not null,
  primary key (account_id, hold_id)
) with (fillfactor = 70);
create index holds_by_deadline on floor.holds (account_id, expires_at);
create index holds_by_expiry on floor.holds (expires_at);

insert into floor.lots (account_id, lot, remaining)
select b.account_id, n, 1000000000
  from floor.balances b, generate_series(1, 3) n;
insert into floor.holds (account_id, hold_id, status, amount, lot, expires_at)
select b.account_id, 'past_' || n, 'settled', 1, 1, now()
  from floor.balances b, generate_series(1, 10) n;

create function floor.spend(
  account_id text,
  amount     numeric,
  key        text
)
returns numeric
language plpgsql
security definer
set search_path = pg_catalog, pg_temp
as $$
declare
  v_seq     bigint;
  v_balance numeric;
begin
  update floor.balances b
     set balance = b.balance - spend.amount, seq = b.seq + 1
   where b.account_id = spend.account_id
  returning b.seq, b.balance into v_seq, v_balance;
  update floor.lots l
     set remaining = l.remaining - spend.amount, consumed = l.consumed + spend.amount
   where l.account_id = spend.account_id and l.lot = 1;
  insert into floor.moves (account_id, seq, operation, key, amount, balance_after, lots)
  values (spend.account_id, v_seq, 'spend', spend.key, -spend.amount, v_balance, '{1}');
  return v_balance;
end $$;

create function floor.reserve(
  account_id text,
  amount     numeric,
  hold_id    text
)
returns numeric
language plpgsql
security definer
set search_path = pg_catalog, pg_temp
as $$
declare
  v_balance numeric;
begin
  update floor.balances b
     set balance = b.balance - reserve.amount
   where b.account_id = reserve.account_id
  returning b.balance into v_balance;
  update floor.lots l
     set remaining = l.remaining - reserve.amount, held = l.held + reserve.amount
   where l.account_id = reserve.account_id and l.lot = 1;
  insert into floor.holds (account_id, hold_id, amount, lot, expires_at)
  values (reserve.account_id, reserve.hold_id, reserve.amount, 1, now() + interval '15 minutes');
  return v_balance;
end $$;

create function floor.settle(
  account_id text,
  hold_id    text,
  amount     numeric
)
returns numeric
language plpgsql
security definer
set search_path = pg_catalog, pg_temp
as $$
declare
  v_held    numeric;
  v_lot     integer;
  v_seq     bigint;
  v_balance numeric;
begin
  update floor.holds h
     set status = 'settled'
   where h.account_id = settle.account_id and h.hold_id = settle.hold_id
  returning h.amount, h.lot into v_held, v_lot;
  update floor.balances b
     set balance = b.balance + v_held - settle.amount, seq = b.seq + 1
   where b.account_id = settle.account_id
  returning b.seq, b.balance into v_seq, v_balance;
  update floor.lots l
     set remaining = l.remaining + v_held - settle.amount, held = l.held - v_held, consumed = l.consumed + settle.amount
   where l.account_id = settle.account_id and l.lot = v_lot;
  insert into floor.moves (account_id, seq, operation, key, amount, balance_after, lots)
  values (settle.account_id, v_seq, 'settle', settle.hold_id, -settle.amount, v_balance, array[v_lot]);
  return v_balance;
end $$;
