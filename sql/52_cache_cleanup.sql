-- Clearing the subscription cache, and the record of it. Nothing is lost by it: what is gone is computed anew.

create or replace function credits.clear_expired_subscription_cache()
returns bigint
language plpgsql
security definer
set search_path = pg_catalog, pg_temp
as $$
begin
  return credits._clear_expired(null);
end $$;
comment on function credits.clear_expired_subscription_cache() is
'Removes the rows of the subscription cache whose time is over; answers how many.

They are not served any more, so this only frees space. A row that is being renewed is left alone. Each run is in
get_cache_cleanup_history(); the job subscription_cache_cleanup does the same.';

create or replace function credits.clear_all_subscription_cache()
returns bigint
language plpgsql
security definer
set search_path = pg_catalog, pg_temp
as $$
declare
  v_started timestamptz := credits.now();
  v_removed bigint;
begin
  delete from credits.subscription_cache;
  get diagnostics v_removed = row_count;
  return credits._note_cleanup('all', v_started, v_removed);
end $$;
comment on function credits.clear_all_subscription_cache() is
'Empties the subscription cache; answers how many rows that were. Every state is computed anew when it is next asked for.

Of use after plans or settings were changed by hand. The counts of hits and misses go on. Each run is in
get_cache_cleanup_history().';

create or replace function credits.get_cache_cleanup_history(n integer default 20)
returns setof credits.subscription_cache_cleanups
language plpgsql
stable
security definer
set search_path = pg_catalog, pg_temp
as $$
declare
  v_rows integer := credits._check_rows(coalesce(get_cache_cleanup_history.n, 20), 'n');
begin
  return query
    select c.*
      from credits.subscription_cache_cleanups c
     order by c.cleanup_id desc
     limit v_rows;
end $$;
comment on function credits.get_cache_cleanup_history(integer) is
'The last n cleanups of the subscription cache, the latest first: when each started and finished, and the rows it removed.

scope is expired or all. The history is kept for 30 days.
Errors: 400 invalid_request.';

-- The job subscription_cache_cleanup.
drop function if exists credits._clean_subscription_cache();
create or replace function credits._clean_subscription_cache(max_rows integer)
returns bigint
language plpgsql
as $$
begin
  delete from credits.subscription_cache_cleanups c where c.started_at < credits.now() - interval '30 days';
  return credits._clear_expired(_clean_subscription_cache.max_rows);
end $$;

-- All of them, where max_rows is null.
create or replace function credits._clear_expired(max_rows integer)
returns bigint
language plpgsql
as $$
declare
  v_started timestamptz := credits.now();
  v_removed bigint;
begin
  delete from credits.subscription_cache c
   using (select e.account_id
            from credits.subscription_cache e
           where e.expires_at <= v_started
           limit _clear_expired.max_rows
             for update skip locked) e
   where c.account_id = e.account_id;
  get diagnostics v_removed = row_count;
  return credits._note_cleanup('expired', v_started, v_removed);
end $$;

create or replace function credits._note_cleanup(
  scope      text,
  started_at timestamptz,
  removed    bigint
)
returns bigint
language sql
as $$
  insert into credits.subscription_cache_cleanups (scope, started_at, finished_at, removed)
  values (_note_cleanup.scope, _note_cleanup.started_at, credits.now(), _note_cleanup.removed)
  returning removed
$$;
