-- Jobs, their runs, and indexes by which they find their work without a look at everything.
set local role credits_owner;

create table credits.jobs (
  name             text        primary key,
  summary          text        not null,
  function         text        not null,
  schedule         text        not null,
  batch_size       integer,
  own_schedule     text,
  enabled          boolean     not null default true,
  next_run_at      timestamptz not null,
  run_id           bigint,
  runner           text,
  claimed_at       timestamptz,
  locked_until     timestamptz,
  last_started_at  timestamptz,
  last_finished_at timestamptz,
  last_success_at  timestamptz,
  through_at       timestamptz,
  failures         integer     not null default 0,
  failing_since    timestamptz,
  last_error       text,
  constraint jobs_batch_is_positive check (batch_size > 0),
  constraint jobs_claim_is_of_a_run check (locked_until is null or run_id is not null and claimed_at is not null),
  constraint jobs_streak_has_its_error check ((failures > 0) = (failing_since is not null)
                                              and (failures > 0) = (last_error is not null))
) with (fillfactor = 50);
comment on table credits.jobs is
  'What has to be done again and again. name, summary, function, schedule and batch_size are code; enabled and own_schedule the operator''s.';
comment on column credits.jobs.function is 'Does one batch: takes batch_size, answers how many rows it did; fewer than that means that nothing is left.';
comment on column credits.jobs.schedule is 'Five fields as of cron, in UTC.';
comment on column credits.jobs.batch_size is 'Null: its function does everything at once.';
comment on column credits.jobs.own_schedule is 'What set_job() has put in the place of schedule.';
comment on column credits.jobs.run_id is 'The run that is not over. It may be waiting for somebody to do its next batch.';
comment on column credits.jobs.claimed_at is 'When a batch of it was last taken. Of the jobs that are due the one that has waited longest is next.';
comment on column credits.jobs.locked_until is
  'A batch is taken. Whoever does it locks this row; if it does not and this moment has passed, its runner is gone.';
comment on column credits.jobs.through_at is 'All that was due at this moment has been done.';
comment on column credits.jobs.failures is 'Runs that failed or were lost since the last success.';

create table credits.job_runs (
  run_id      bigint      generated always as identity primary key,
  name        text        not null references credits.jobs on delete cascade,
  started_at  timestamptz not null,
  finished_at timestamptz,
  outcome     text        not null default 'running',
  rows_done   bigint      not null default 0,
  batches     integer     not null default 0,
  error       text,
  error_state text,
  runner      text        not null,
  constraint job_runs_outcome_is_known check (outcome in ('running', 'done', 'failed', 'lost')),
  constraint job_runs_end_with_an_outcome check ((outcome = 'running') = (finished_at is null)),
  constraint job_runs_failure_has_its_error check ((outcome in ('failed', 'lost')) = (error is not null))
) with (fillfactor = 70);
create index job_runs_of on credits.job_runs (name, run_id);
comment on table credits.job_runs is 'Each run of each job: one batch after the other until nothing is left, or one has failed.';
comment on column credits.job_runs.rows_done is 'What its batches answered: accounts, events or rows, whatever the job counts.';
comment on column credits.job_runs.outcome is 'lost: its runner was killed. What it had committed stays, the rest is undone and done again.';
comment on column credits.job_runs.error_state is 'SQLSTATE of the error.';

create table credits.job_runners (
  runner  text        primary key,
  seen_at timestamptz not null
);
comment on table credits.job_runners is
  'Who asked for jobs to do, and when last; but for those that stand by. They do nothing while somebody is seen here.';

create type credits.claimed_job as (name text, run_id bigint, locked_until timestamptz);
create type credits.job_result as (
  name text, run_id bigint, outcome text, rows_done bigint, more boolean, error text, next_run_at timestamptz);
create type credits.job_status as (
  name text, state text, schedule text, next_run_at timestamptz, last_started_at timestamptz, last_finished_at timestamptz,
  last_success_at timestamptz, failures integer, failing_since timestamptz, last_error text, runner text, batch_size integer,
  summary text);
create type credits.cron_statement as (entry text, statement text);

-- When a grant has to be booked next. Its status changes once or twice in its life, so this does not stop HOT updates of
-- amounts; what was booked leaves the index.
create index grants_by_due on credits.grants ((case when status = 'pending' then effective_at else expires_at end))
  where status in ('pending', 'active') and (case when status = 'pending' then effective_at else expires_at end) is not null;

-- Not only the open ones: status in the index would end HOT updates by settle(). The job looks at what ran out lately.
create index reservations_by_expiry on credits.reservations (expires_at);

-- Plans that have ended leave it.
drop index credits.subscriptions_by_turn;
create index subscriptions_by_turn on credits.subscriptions (period_end)
  where source = 'internal' and state in ('active', 'canceling');

create index stripe_events_to_archive on credits.stripe_events (received_at)
  where status in ('applied', 'ignored') and archived_at is null;

alter table credits.jobs enable row level security;
alter table credits.job_runs enable row level security;
alter table credits.job_runners enable row level security;
