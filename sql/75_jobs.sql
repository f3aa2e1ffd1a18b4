-- Jobs: what has to be done again and again, as rows; how they stand, and what an operator may choose.
-- A job is idempotent and does one batch per call of its function, so that a batch can be a transaction.
-- Lock order: the row of the job first, then whatever its function locks.

insert into credits.settings as s (name, value, summary) values
  ('job_lease', '"1 minute"', 'How long after its start the batch of a job whose runner was killed is taken again by another.'),
  ('job_max_wait', '"15 minutes"', 'The longest wait of a job that fails; the first is a minute, and each doubles.'),
  ('job_standby', '"3 minutes"', 'How long nobody else must have asked for jobs before `pgcredits serve` does them.'),
  ('job_history', '"30 days"', 'How long runs of jobs are kept.'),
  ('subscription_refresh_after', '"1 day"', 'Stripe is asked anew for a subscription that it has told nothing of for so long.')
on conflict (name) do update set summary = excluded.summary;

-- A row that stays as it is is not touched, so that a deploy waits for no batch that is being done.
with listed (name, schedule, batch_size, function, summary) as (values
  ('expire_grants',               '* * * * *',    50,    '_expire_grants',               'Books grants that start or end.'),
  ('expire_reservations',         '* * * * *',    50,    '_expire_reservations',         'Returns what lapsed holds pinned.'),
  ('grant_plan_credits',          '*/5 * * * *',  50,    '_turn_plans',                  'Books new months of our own plans.'),
  ('apply_scheduled_changes',     '*/5 * * * *',  50,    '_apply_scheduled_changes',     'Changes plans whose day has come.'),
  ('run_auto_topups',             '* * * * *',    50,    '_run_auto_topups',             'Looks at top-ups that wait.'),
  ('warn_expiring_credits',       '7 * * * *',    500,   '_warn_expiring_credits',       'Tells of credits that end soon.'),
  ('retry_stripe_events',         '* * * * *',    10,    '_retry_stripe_events',         'Tries parked and failed events.'),
  ('refresh_stale_subscriptions', '17 * * * *',   500,   '_refresh_stale_subscriptions', 'Asks Stripe where it fell silent.'),
  ('refresh_stale_purchases',     '37 4 * * *',   null,  '_refresh_stale_purchases',     'Asks Stripe what purchases wait for.'),
  ('subscription_cache_cleanup',  '*/10 * * * *', 1000,  '_clean_subscription_cache',    'Clears expired rows of the cache.'),
  ('reconcile_stripe',            '33 3 * * *',   null,  '_reconcile_stripe',            'Asks what Stripe has and we have not.'),
  ('purge_notifications',         '5 2 * * *',    1000,  '_purge_notifications',         'Removes old notifications.'),
  ('purge_job_history',           '11 2 * * *',   10000, '_purge_job_history',           'Removes old runs of jobs.'),
  ('archive_stripe_events',       '23 2 * * *',   1000,  '_archive_stripe_events',       'Drops payloads done 90 days ago.'),
  ('refresh_totals',              '*/15 * * * *', null,  '_count_totals',                'Counts the sums of metrics().'),
  ('repeat_erasures',             '51 4 * * 0',   null,  '_repeat_erasures',             'Erases what came in since.'),
  ('audit',                       '43 3 * * *',   null,  '_audit_all',                   'Checks and tells all invariants.')
), added as (
  insert into credits.jobs as j (name, schedule, batch_size, function, summary, next_run_at)
  select l.name, l.schedule, l.batch_size, l.function, l.summary, credits._next_run(l.schedule, credits.now())
    from listed l
  on conflict (name) do nothing
), changed as (
  update credits.jobs j
     set schedule = l.schedule, batch_size = l.batch_size, function = l.function, summary = l.summary,
         next_run_at = least(j.next_run_at, credits._next_run(coalesce(j.own_schedule, l.schedule), credits.now()))
    from listed l
   where l.name = j.name
     and (l.schedule, l.batch_size, l.function, l.summary) is distinct from (j.schedule, j.batch_size, j.function, j.summary)
)
delete from credits.jobs j where j.name not in (select l.name from listed l);

create or replace function credits.list_jobs()
returns setof credits.job_status
language plpgsql
stable
security definer
set search_path = pg_catalog, pg_temp
as $$
begin
  return query select s.* from credits.jobs j, lateral credits._job_status(j) s order by j.name;
end $$;
comment on function credits.list_jobs() is
'The jobs: schedule, when each runs next, how its last run went.

state is disabled, running, failing (its last run failed or was lost; the next try is at next_run_at), due, or waiting.
schedule is in UTC. failures counts since the last success.';

create or replace function credits.set_job(
  name     text,
  enabled  boolean default null,
  schedule text    default null
)
returns credits.job_status
language plpgsql
security definer
set search_path = pg_catalog, pg_temp
as $$
declare
  v_job  credits.jobs := credits._job(set_job.name);
  v_next timestamptz;
begin
  v_next := credits._next_run(coalesce(nullif(set_job.schedule, 'default'), v_job.schedule), credits.now());
  if v_next is null then
    perform credits._fail(400, 'invalid_request', jsonb_build_object('argument', 'schedule', 'schedule', set_job.schedule),
      'schedule has five fields as of cron, in UTC: 30 2 * * 1-5. Or it is default.');
  end if;
  update credits.jobs j
     set enabled      = coalesce(set_job.enabled, j.enabled),
         own_schedule = case when set_job.schedule is null then j.own_schedule
                             else nullif(set_job.schedule, 'default') end,
         next_run_at  = case when set_job.schedule is null then j.next_run_at else v_next end
   where j.name = v_job.name
  returning j.* into v_job;
  return credits._job_status(v_job);
end $$;
comment on function credits.set_job(text, boolean, text) is
'Enables or disables a job, or gives it a schedule of its own; what is not given stays.

schedule has five fields as of cron, in UTC: * and numbers with ranges, lists and steps; default is what the job came with.
Deploys leave both as they are. Waits for a batch that is being done. A disabled job can still be run by run_job().
Errors: 400 invalid_request, 404 job_not_found.';

create or replace function credits.list_job_runs(
  name     text    default null,
  max_rows integer default 20
)
returns setof credits.job_runs
language plpgsql
stable
security definer
set search_path = pg_catalog, pg_temp
as $$
begin
  perform credits._check_rows(list_job_runs.max_rows, 'max_rows');
  if list_job_runs.name is not null then
    perform credits._job(list_job_runs.name);
  end if;
  return query
    select r.*
      from credits.job_runs r
     where list_job_runs.name is null or r.name = list_job_runs.name
     order by r.run_id desc
     limit list_job_runs.max_rows;
end $$;
comment on function credits.list_job_runs(text, integer) is
'The last runs of a job, or of all, the latest first: when, by whom, how much it did, and its error.

outcome is running, done, failed, or lost: its runner was killed, and the batch it was at has changed nothing. A run that is
running may be waiting for its next batch. Runs are kept for the setting job_history.
Errors: 400 invalid_request, 404 job_not_found.';

-- Helpers -----------------------------------------------------------------------------------------------------------

create or replace function credits._job(name text)
returns credits.jobs
language plpgsql
stable
as $$
declare
  v_job credits.jobs;
begin
  select j.* into v_job from credits.jobs j where j.name = _job.name;
  if not found then
    perform credits._fail(404, 'job_not_found', jsonb_build_object('name', _job.name), 'credits.list_jobs() names them.');
  end if;
  return v_job;
end $$;

create or replace function credits._job_status(job credits.jobs)
returns credits.job_status
language plpgsql
stable
as $$
declare
  v_job credits.jobs := _job_status.job;
begin
  return row(v_job.name,
    case when v_job.locked_until > credits.now() then 'running'
         when not v_job.enabled then 'disabled'
         when v_job.failures > 0 then 'failing'
         when credits._is_due(v_job, credits.now()) then 'due'
         else 'waiting' end,
    coalesce(v_job.own_schedule, v_job.schedule), v_job.next_run_at, v_job.last_started_at, v_job.last_finished_at,
    v_job.last_success_at, v_job.failures, v_job.failing_since, v_job.last_error, v_job.runner, v_job.batch_size,
    v_job.summary)::credits.job_status;
end $$;
