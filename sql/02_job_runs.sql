-- Running jobs: a batch is claimed, then done. One runner at a time: the claim is a guarded UPDATE under a lease, and
-- whoever does the batch holds the row of the job, so that a slow one is not taken for a dead one.
-- A killed runner loses nothing: its batch is undone, its run is lost, and after the lease the job runs again.

create or replace function credits.claim_job(
  runner  text,
  standby boolean default false
)
returns setof credits.claimed_job
language plpgsql
security definer
set search_path = pg_catalog, pg_temp
as $$
declare
  v_now   timestamptz := credits.now();
  v_name  text;
  v_claim credits.claimed_job;
begin
  perform credits._check_key(claim_job.runner, 'runner', 200);
  if not credits._is_called_for(claim_job.runner, coalesce(claim_job.standby, false), v_now) then
    return;
  end if;
  for v_name in
    select j.name
      from credits.jobs j
     where j.enabled and credits._is_due(j, v_now)
     order by j.claimed_at nulls first, j.name
  loop
    v_claim := credits._claim_job(v_name, claim_job.runner, v_now);
    if v_claim.name is not null then
      return next v_claim;
      return;
    end if;
  end loop;
end $$;
comment on function credits.claim_job(text, boolean) is
'Takes a batch of the job that is due and has waited longest, for run_job(name, run_id => run_id) to do; no row if none is due.

Commit between the two, so that a runner that is killed is seen. runner is a name for the history. With standby it takes
nothing while anybody else has asked within the setting job_standby: so the door leaves the work to pg_cron, and does it
where there is none. CALL credits.work_jobs() does all of this.
Errors: 400 invalid_request.';

create or replace function credits.run_job(
  name   text,
  runner text   default 'somebody',
  run_id bigint default null
)
returns credits.job_result
language plpgsql
security definer
set search_path = pg_catalog, pg_temp
as $$
declare
  v_job    credits.jobs := credits._job(run_job.name);
  v_run_id bigint := run_job.run_id;
begin
  if v_run_id is null then
    perform credits._check_key(run_job.runner, 'runner', 200);
    v_run_id := (credits._claim_job(v_job.name, run_job.runner, credits.now())).run_id;
  end if;
  -- Waits: whoever looked for work when this was claimed may hold the row until the end of his transaction.
  select j.* into v_job
    from credits.jobs j
   where j.name = run_job.name and j.run_id = v_run_id and j.locked_until is not null
     for no key update;
  if not found then
    return row(run_job.name, v_run_id, 'busy', 0, false, null, null)::credits.job_result;
  end if;
  return credits._work_job(v_job);
end $$;
comment on function credits.run_job(text, text, bigint) is
'Does one batch of a job in the caller''s transaction, whether it is due, enabled, or neither.

outcome is running (more is true: there is more to do, call again), done, failed (with its error; what the batch did is
undone, and nothing is raised), or busy: another runner is at it. rows_done is of this batch. run_id is that of claim_job();
if somebody does a batch of that very run, this one waits for it.
Errors: 400 invalid_request, 404 job_not_found.';

create or replace function credits.run_due_jobs(runner text default 'somebody')
returns setof credits.job_result
language plpgsql
security definer
set search_path = pg_catalog, pg_temp
as $$
declare
  v_name   text;
  v_result credits.job_result;
begin
  perform credits._check_key(run_due_jobs.runner, 'runner', 200);
  perform credits._is_called_for(run_due_jobs.runner, false, credits.now());
  for v_name in
    select j.name
      from credits.jobs j
     where j.enabled and credits._is_due(j, credits.now())
     order by j.claimed_at nulls first, j.name
  loop
    v_result := credits.run_job(v_name, run_due_jobs.runner);
    return next v_result;
  end loop;
end $$;
comment on function credits.run_due_jobs(text) is
'Does one batch of each job that is due, all in the caller''s transaction; a row for each, as run_job() answers.

Call again while a row says more. For callers that can do no better: CALL credits.work_jobs() commits after each batch.
Errors: 400 invalid_request.';

-- No definer and no pinned path, since a procedure with either cannot commit. It reaches nothing but the two verbs.
create or replace procedure credits.work_jobs(
  time_limit interval default '50 seconds',
  runner     text     default 'somebody'
)
language plpgsql
as $$
declare
  v_until timestamptz := pg_catalog.clock_timestamp() + work_jobs.time_limit;  -- real time, also where the clock is turned
  v_claim credits.claimed_job;
begin
  loop
    select c.* into v_claim from credits.claim_job(work_jobs.runner) c;
    commit;
    exit when v_claim.name is null;
    perform credits.run_job(v_claim.name, run_id => v_claim.run_id);
    commit;
    exit when (pg_catalog.clock_timestamp() < v_until) is not true;
  end loop;
end $$;
comment on procedure credits.work_jobs(interval, text) is
'Does what is due, a batch at a time, and commits after each: until nothing is due any more or time_limit is over.

Call it every minute, from one place or several: CALL credits.work_jobs(). Not inside of a transaction. A batch that has
begun is finished, so it may take longer than time_limit.
Errors: 400 invalid_request.';

-- Helpers -----------------------------------------------------------------------------------------------------------

-- Also if it was last claimed at a moment that is still to come: the clock was set back, and what it said then counts no more.
create or replace function credits._is_due(
  job credits.jobs,
  at  timestamptz
)
returns boolean
language sql
immutable
as $$
  select (_is_due.job).next_run_at <= _is_due.at or (_is_due.job).claimed_at > _is_due.at + interval '1 minute'
$$;

-- Whoever asks is noted, but for those that stand by, who are not called for while anybody else was seen.
create or replace function credits._is_called_for(
  runner  text,
  standby boolean,
  at      timestamptz
)
returns boolean
language plpgsql
as $$
begin
  if _is_called_for.standby then
    return not exists (select from credits.job_runners r
                        where r.seen_at > _is_called_for.at - (credits._setting('job_standby') #>> '{}')::interval
                          and r.seen_at < _is_called_for.at + interval '1 minute');
  end if;
  insert into credits.job_runners as r (runner, seen_at)
  values (_is_called_for.runner, _is_called_for.at)
  on conflict on constraint job_runners_pkey do update set seen_at = excluded.seen_at
    where r.seen_at not between excluded.seen_at - interval '10 seconds' and excluded.seen_at + interval '1 minute';
  return true;
end $$;

-- Null if another has it. A run that has more to do goes on; one whose runner did not come back is lost.
create or replace function credits._claim_job(
  name   text,
  runner text,
  at     timestamptz
)
returns credits.claimed_job
language plpgsql
as $$
declare
  v_job     credits.jobs;
  v_started timestamptz;
begin
  select j.* into v_job
    from credits.jobs j
   where j.name = _claim_job.name
     and (j.locked_until is null or j.locked_until <= _claim_job.at or j.claimed_at > _claim_job.at + interval '1 minute')
     for no key update skip locked;
  if not found then
    return null;
  end if;
  if v_job.locked_until is not null then
    v_job := credits._end_run(v_job, 'lost', format('%s took a batch and did not come back.', v_job.runner));
  end if;
  if v_job.run_id is null then
    v_started := _claim_job.at;
    insert into credits.job_runs as r (name, started_at, runner)
    values (v_job.name, v_started, _claim_job.runner)
    returning r.run_id into v_job.run_id;
  end if;
  update credits.jobs j
     set run_id = v_job.run_id, runner = _claim_job.runner, claimed_at = _claim_job.at,
         last_started_at = coalesce(v_started, j.last_started_at),
         locked_until = _claim_job.at + (credits._setting('job_lease') #>> '{}')::interval
   where j.name = v_job.name
  returning j.* into v_job;
  return row(v_job.name, v_job.run_id, v_job.locked_until)::credits.claimed_job;
end $$;

create or replace function credits._work_job(job credits.jobs)
returns credits.job_result
language plpgsql
as $$
declare
  v_job     credits.jobs := _work_job.job;
  v_rows    bigint  := 0;
  v_more    boolean := false;
  v_outcome text := 'done';
  v_error   text;
  v_state   text;
begin
  begin
    execute format('select credits.%I($1)', v_job.function) into v_rows using v_job.batch_size;
    v_more := coalesce(v_rows >= v_job.batch_size, false);
  exception when others then
    v_outcome := 'failed';
    v_error   := sqlerrm;
    v_state   := sqlstate;
  end;
  update credits.job_runs r
     set batches = r.batches + 1, rows_done = r.rows_done + coalesce(v_rows, 0), runner = v_job.runner
   where r.run_id = v_job.run_id;
  if v_more then
    update credits.jobs j set locked_until = null where j.name = v_job.name;
    return row(v_job.name, v_job.run_id, 'running', v_rows, true, null, v_job.next_run_at)::credits.job_result;
  end if;
  v_job.next_run_at := (credits._end_run(v_job, v_outcome, v_error, v_state)).next_run_at;
  return row(v_job.name, v_job.run_id, v_outcome, coalesce(v_rows, 0), false, v_error, v_job.next_run_at)::credits.job_result;
end $$;

-- A run is over: when is the next. After a failure sooner than the schedule says, or later, the longer it lasts.
create or replace function credits._end_run(
  job     credits.jobs,
  outcome text,
  error   text,
  state   text default null
)
returns credits.jobs
language plpgsql
as $$
declare
  v_job  credits.jobs := _end_run.job;
  v_now  timestamptz := credits.now();
  v_well boolean := _end_run.outcome = 'done';
begin
  update credits.job_runs r
     set finished_at = v_now, outcome = _end_run.outcome, error = _end_run.error, error_state = _end_run.state
   where r.run_id = v_job.run_id;
  update credits.jobs j
     set run_id = null, locked_until = null, reached_at = null, reached_id = null, last_finished_at = v_now,
         last_success_at = case when v_well then v_now else j.last_success_at end,
         through_at      = case when v_well then j.last_started_at else j.through_at end,
         failures        = case when v_well then 0 else j.failures + 1 end,
         failing_since   = case when not v_well then coalesce(j.failing_since, v_now) end,
         last_error      = _end_run.error,
         next_run_at     = case when v_well then credits._next_run(coalesce(j.own_schedule, j.schedule), v_now)
                                else v_now + credits._job_wait(j.failures) end
   where j.name = v_job.name
  returning j.* into v_job;
  if _end_run.outcome = 'failed' or v_job.failures > 1 then
    perform credits._notify(null, 'job_failed', format('job:%s:%s', v_job.name, extract(epoch from v_job.failing_since)),
      jsonb_build_object('job', v_job.name, 'error', _end_run.error, 'sqlstate', _end_run.state, 'failures', v_job.failures));
  end if;
  return v_job;
end $$;

create or replace function credits._job_wait(failures integer)
returns interval
language sql
stable
as $$
  select least((credits._setting('job_max_wait') #>> '{}')::interval, interval '1 minute' * 2 ^ least(_job_wait.failures, 20))
$$;
