-- How every deploy begins, inside its one transaction: alone, patient within limits, with books to write in.
-- What the database or the login has set for its own traffic does not count here. Who waited for another deploy must see
-- what that one did, which a snapshot of before would hide.
set transaction isolation level read committed;
set local statement_timeout = 0;
set local lock_timeout = 0;
set local quote_all_identifiers = off;
do $$ begin perform pg_catalog.pg_advisory_xact_lock(pg_catalog.hashtextextended('pgcredits.deploy', 0)); end $$;

-- What a deploy may wait for running traffic: whoever comes after us waits for us.
set local lock_timeout = '30s';
set local search_path = pg_catalog, pg_temp;
-- A file of sql/ reads top-down, so a function may stand above those it calls. check.sql looks at every body at the end.
set local check_function_bodies = off;

-- psql prints notices. What is dropped if it is there, or made if it is not, is no news to an operator.
set local client_min_messages = warning;

-- A schema that is not ours, or no longer, would fail later, in words about one of its tables.
do $$
declare
  v_owner text := (select n.nspowner::regrole from pg_catalog.pg_namespace n where n.nspname = 'credits');
  v_books boolean := pg_catalog.to_regnamespace('credits_migrations') is not null;
begin
  if v_owner <> 'credits_owner' and v_books then
    raise 'the schema credits belongs to %, not to credits_owner: it was restored without the roles of pgcredits', v_owner
      using hint = 'Make the roles, then restore the dump into an empty database, with owners and privileges: '
                || 'docs/operations.md, "Back up and restore".';
  elsif v_owner is not null and not v_books then
    raise 'there is a schema credits, but no schema credits_migrations, which says what pgcredits has made of it'
      using hint = 'A dump needs both: pg_dump --schema=''credits*''. A schema credits of your own needs another name.';
  end if;
end $$;

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
