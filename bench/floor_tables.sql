-- What any prepaid balance needs at the least: a narrow row that changes and a row that says why.
create schema floor;
create table floor.balances (
  account_id text    primary key,
  seq        bigint  not null default 0,
  balance    numeric not null
) with (fillfactor = 50);
create table floor.entries (
  account_id    text        not null,
  seq           bigint      not null,
  created_at    timestamptz not null default now(),
  amount        numeric     not null,
  balance_after numeric     not null,
  primary key (account_id, seq)
);
grant usage on schema floor to credits_service;
grant select, insert, update on all tables in schema floor to credits_service;
