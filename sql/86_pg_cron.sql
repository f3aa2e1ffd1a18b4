-- pg_cron: entries that call work_jobs() each minute. Which job is due is decided here, so a schedule that changes needs no
-- new entry. pg_cron lives in one database of a server: in this one, or in another, where the statements are carried.
-- What every version since 1.4 takes: five fields, minutes, no word of time zones.

create or replace function credits.schedule_jobs()
returns setof text
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
-- What is executed comes from cron_statements() alone. @plpgsql_check_options: security_warnings = off
declare
  v_row credits.cron_statement;
begin
  for v_row in select s.* from credits.cron_statements() s loop
    execute v_row.statement;
    if v_row.entry is not null then
      return next v_row.entry;
    end if;
  end loop;
end $$;
comment on function credits.schedule_jobs() is
'Has pg_cron do the jobs, where it is in this database; answers with the entries it made. Again changes nothing.

The entries run as the role that calls this, which must be able to log in and be a member of credits_service: the owner of
the database is. Where pg_cron is in another database, `pgcredits jobs schedule --cron-dsn` carries cron_statements() there.
Errors: 409 cron_unavailable, with the reason in DETAIL and what to do in HINT.';

create or replace function credits.unschedule_jobs()
returns void
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
-- What is executed comes from cron_statements() alone. @plpgsql_check_options: security_warnings = off
declare
  v_row credits.cron_statement;
begin
  for v_row in select s.* from credits.cron_statements(remove => true) s loop
    execute v_row.statement;
  end loop;
end $$;
comment on function credits.unschedule_jobs() is
'Takes the entries of schedule_jobs() out of pg_cron, and what pg_cron remembers of their runs. Runs of jobs are kept.

Only those that the calling role has made. Where none is left, nothing happens.
Errors: 409 cron_unavailable.';

create or replace function credits.cron_statements(
  remove    boolean default false,
  elsewhere boolean default false
)
returns setof credits.cron_statement
language plpgsql
stable
security definer
set search_path = pg_catalog, pg_temp
as $$
begin
  return next row(null, credits._cron_check(cron_statements.elsewhere))::credits.cron_statement;
  return next row(null, credits._cron_clear(cron_statements.remove))::credits.cron_statement;
  if not cron_statements.remove then
    return query select e.* from credits._cron_entries(cron_statements.elsewhere) e;
  end if;
end $$;
comment on function credits.cron_statements(boolean, boolean) is
'What schedule_jobs() executes, or with remove unschedule_jobs(), in this order and one transaction.

With elsewhere they are for the database in which pg_cron lives, and make entries for this one. entry is the name of the
entry that a statement makes.';

-- Helpers -----------------------------------------------------------------------------------------------------------

-- What keeps pg_cron from doing our work, with what to do about it. Executed where pg_cron should be.
create or replace function credits._cron_check(elsewhere boolean)
returns text
language sql
stable
as $$
  select format($check$
do $do$
declare
  v_elsewhere boolean := %L; v_reason text; v_hint text;
begin
  if not exists (select from pg_catalog.pg_extension e where e.extname = 'pg_cron') then
    v_reason := 'pg_cron is not in the database ' || pg_catalog.current_database();
    v_hint := 'It lives in one database of a server, mostly postgres. If it is there: pgcredits jobs schedule --cron-dsn, with '
      'a login to that database. If nowhere: put it into shared_preload_libraries, then create extension pg_cron. '
      'Without it pgcredits serve does the jobs.';
  elsif pg_catalog.to_regrole('credits_service') is null then
    v_reason := 'this is not the server that has pgcredits';
    v_hint := 'pg_cron must be on the same server as the database of pgcredits.';
  elsif not pg_catalog.has_schema_privilege('cron', 'usage') then
    v_reason := pg_catalog.format('%%I may not use the schema cron', current_user);
    v_hint := pg_catalog.format('A superuser says here: grant usage on schema cron to %%I.', current_user);
  elsif v_elsewhere and not pg_catalog.has_function_privilege(
    'cron.schedule_in_database(text, text, text, text, text, boolean)', 'execute') then
    v_reason := pg_catalog.format('%%I may not execute cron.schedule_in_database', current_user);
    v_hint := 'A superuser says here: grant execute on function cron.schedule_in_database to ' || quote_ident(current_user) || '.';
  elsif not (select r.rolcanlogin from pg_catalog.pg_roles r where r.rolname = current_user) then
    v_reason := pg_catalog.format('%%I cannot log in, and pg_cron runs entries as the role that makes them', current_user);
    v_hint := 'Call it as a login that is a member of credits_service, without set role.';
  elsif not pg_catalog.pg_has_role('credits_service', 'usage') and not pg_catalog.pg_has_role('credits_owner', 'usage') then
    v_reason := pg_catalog.format('%%I may not call credits.work_jobs()', current_user);
    v_hint := pg_catalog.format('The owner of the roles says: grant credits_service to %%I', current_user);
  end if;
  if v_reason is not null then
    raise exception using errcode = 'PT409', message = 'cron_unavailable',
      detail = pg_catalog.jsonb_build_object('reason', v_reason)::text, hint = v_hint;
  end if;
end $do$
$check$, _cron_check.elsewhere)
$$;

-- Takes away the entries of this database that the role has made, and their history: all, or those that are no longer made.
create or replace function credits._cron_clear(everything boolean)
returns text
language sql
stable
as $$
  select format($clear$
with ours as (
  select j.jobid
    from cron.job j
   where left(j.jobname::text, 10) = 'pgcredits ' and right(j.jobname::text, %1$s) = %2$L and j.username = current_user
     and j.jobname::text <> all (%3$L::text[])
), forgotten as (
  delete from cron.job_run_details d where d.jobid in (select o.jobid from ours o)
)
select cron.unschedule(o.jobid) from ours o$clear$, length(' of ' || current_database()), ' of ' || current_database(),
    case when _cron_clear.everything then '{}' else array(select e.entry from credits._cron_entries(false) e) end)
$$;

-- Two, so that a long job does not stop the others: pg_cron starts no entry anew while it runs. And one that clears
-- pg_cron's own history of them, which nobody else does.
create or replace function credits._cron_entries(elsewhere boolean)
returns setof credits.cron_statement
language sql
stable
as $$
  select format('pgcredits %s of %s', w.worker, current_database()),
         format(case when _cron_entries.elsewhere then 'select cron.schedule_in_database(%L, %L, %L, %L)'
                     else 'select cron.schedule(%L, %L, %L)' end,
                format('pgcredits %s of %s', w.worker, current_database()), '* * * * *',
                format('call credits.work_jobs(runner => %L)', 'pg_cron ' || w.worker), current_database())
    from generate_series(1, 2) w (worker)
  union all
  select n.name,
         format('select cron.schedule(%L, %L, %L)', n.name, '37 1 * * *',
           format('delete from cron.job_run_details d using cron.job j where j.jobid = d.jobid'
                  ' and left(j.jobname::text, 10) = %L and right(j.jobname, %s) = %L and d.end_time < now() - interval %L',
                  'pgcredits ', length(' of ' || current_database()), ' of ' || current_database(), '7 days'))
    from (select 'pgcredits history of ' || current_database() as name) n
$$;
