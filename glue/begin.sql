-- How every deploy begins, inside its one transaction: alone, patient within limits, with books to write in.
-- What the database or the login has set for its own traffic does not count here. Who waited for another deploy must see
-- what that one did, which a snapshot of before would hide.
set transaction isolation level read committed;
set local statement_timeout = 0;
set local lock_timeout = 0;
set local quote_all_identifiers = off;
select pg_catalog.pg_advisory_xact_lock(pg_catalog.hashtextextended('pgcredits.deploy', 0));

-- What a deploy may wait for running traffic: whoever comes after us waits for us.
set local lock_timeout = '30s';
set local search_path = pg_catalog, pg_temp;
-- A file of sql/ reads top-down, so a function may stand above those it calls. check.sql looks at every body at the end.
set local check_function_bodies = off;

-- psql prints notices. What is dropped if it is there, or made if it is not, is no news to an operator.
set local client_min_messages = warning;

-- The tables of yoyo-migrations 9 (its schema version 2), so that its command line understands them.
create schema if not exists credits_migrations;
create table if not exists credits_migrations._yoyo_migration (
  migration_hash varchar(64) primary key, migration_id varchar(255), applied_at_utc timestamp);
create table if not exists credits_migrations._yoyo_log (
  id varchar(36) primary key, migration_hash varchar(64), migration_id varchar(255), operation varchar(10),
  username varchar(255), hostname varchar(255), comment varchar(255), created_at_utc timestamp);
create table if not exists credits_migrations._yoyo_version (version int primary key, installed_at_utc timestamp);
create table if not exists credits_migrations.yoyo_lock (locked int default 1 primary key, ctime timestamp, pid int not null);
insert into credits_migrations._yoyo_version select 2, now() at time zone 'utc'
  where not exists (select from credits_migrations._yoyo_version);
