set local role credits_owner;
drop index credits.stripe_events_to_archive, credits.reservations_by_expiry, credits.grants_by_due, credits.subscriptions_by_turn;
create index subscriptions_by_turn on credits.subscriptions (period_end) where source = 'internal';
drop type credits.cron_statement, credits.job_status, credits.job_result, credits.claimed_job;
drop table credits.job_runners, credits.job_runs, credits.jobs;
