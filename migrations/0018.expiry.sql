-- The job that books grants goes on where its last batch ended. What was booked stays in the index as long as any snapshot is
-- older, such as that of a backup, and each batch would look at all of it again.
set local role credits_owner;

drop index credits.grants_by_due;
create index grants_by_due on credits.grants ((case when status = 'pending' then effective_at else expires_at end), grant_id)
  where status in ('pending', 'active') and (case when status = 'pending' then effective_at else expires_at end) is not null;

alter table credits.jobs
  add column reached_at timestamptz,
  add column reached_id bigint;
comment on column credits.jobs.reached_at is 'How far the run has come, if its function goes on from there; null at its beginning.';
comment on column credits.jobs.reached_id is 'Which of those of that moment was the last.';
