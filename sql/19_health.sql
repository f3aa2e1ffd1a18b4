-- Health: figures of metrics() that are judged, as rows; and the audits that were run. A check is one more row.

with listed (name, metric, warn_at, fail_at, blocking, meaning, advice) as (values
  ('database_takes_writes',    'pgcredits_database_read_only',            null::numeric, 1::numeric, true,
   'The server takes no writes: it is a standby, or was set read-only.',
   'Point PGCREDITS_DSN at the primary.'),
  ('database_freezes',         'pgcredits_database_transaction_age',      1e9, 1.8e9, false,
   'Old transactions are not frozen; at 2.1e9 PostgreSQL stops taking writes.',
   'Let autovacuum run; end transactions, slots and prepared transactions that are old; vacuum freeze.'),
  ('events_given_up',          'pgcredits_stripe_events_given_up',        1, 100, false,
   'Events of Stripe failed or waited so often that they are not tried again by themselves.',
   'pgcredits events list --status failed (and parked), mend the cause, pgcredits events replay ID.'),
  ('events_wait',              'pgcredits_stripe_events_oldest_seconds',  3600, 86400, false,
   'An event of Stripe has been waiting for what it lacks, or failing.',
   'pgcredits events list --status parked shows the reason and what each waits for.'),
  ('events_are_retried',       'pgcredits_stripe_events_retry_late_seconds', 600, 3600, false,
   'Events are due to be tried again and nobody does it.',
   'See that process_stripe_events() is called every minute.'),
  ('requests_are_sent',        'pgcredits_stripe_requests_late_seconds',  300, 3600, false,
   'Requests to Stripe are due and no worker sends them.',
   'Set STRIPE_SECRET_KEY for the door, or run pgcredits stripe work.'),
  ('requests_succeed',         'pgcredits_stripe_requests_failed',        1, 100, false,
   'Stripe refused requests in the last day.',
   'report_stripe_requests has the errors; mend the cause, then retry_stripe_request(request_id).'),
  ('requests_are_known',       'pgcredits_stripe_requests_unknown',       1, 10, false,
   'Nobody knows whether Stripe did some requests.',
   'Look in Stripe''s dashboard whether it was done; if not, retry_stripe_request(request_id).'),
  ('stripe_takes_our_key',     'pgcredits_stripe_stopped',                null, 1, false,
   'Stripe refuses our key, so nothing is sent.',
   'Set a valid STRIPE_SECRET_KEY and restart; one request tries it every 5 minutes.'),
  ('stripe_accounts_are_connected', 'pgcredits_stripe_accounts_disconnected', 1, null, false,
   'A connected account took away our access: what is asked of it is refused.',
   'Have it connected again, then call set_stripe_endpoint() with it again; or change its endpoint if it is not coming back.'),
  ('connected_endpoints_know_their_mode', 'pgcredits_stripe_endpoints_of_any_livemode', 1, null, false,
   'A live endpoint of a connected account is sent test events as well: whoever pays with a test card there is granted credits.',
   'Call set_stripe_endpoint() with its livemode: true in production, false where only test money counts.'),
  ('jobs_run',                 'pgcredits_job_late_seconds',              900, 7200, false,
   'Jobs are due and nobody runs them. Balances are right without them.',
   'pgcredits jobs list; then pgcredits jobs schedule where there is pg_cron, or let pgcredits serve run.'),
  ('jobs_succeed',             'pgcredits_job_failures',                  3, 20, false,
   'A job fails again and again.',
   'pgcredits jobs list shows the error; mend the cause, then pgcredits jobs run NAME.'),
  ('notifications_are_sent',   'pgcredits_notifications_late_seconds',    600, 7200, false,
   'Notifications are due and no worker sends them.',
   'Run pgcredits serve or pgcredits notify work with the secrets of the endpoints.'),
  ('notifications_arrive',     'pgcredits_notifications_dead',            1, 1000, false,
   'Notifications were given up: their receiver failed for too long.',
   'list_notifications(state => ''dead'') has the errors; mend the receiver, then retry_notifications(target).'),
  ('subscriptions_move_as_foreseen', 'pgcredits_subscription_unexpected_moves_recent', 1, null, false,
   'Stripe moved subscriptions in a way that no rule foresees; it was followed.',
   'report_unexpected_moves shows them; see that all events are selected at the endpoint.'),
  ('audit_is_clean',           'pgcredits_audit_violations',              null, 1, false,
   'The last audit found invariants violated.',
   'pgcredits audit shows them anew; docs/concepts.md explains each. Freeze the accounts named until it is clear.'),
  ('audit_is_run',             'pgcredits_audit_age_seconds',             172800, null, false,
   'The audit was not run for two days.',
   'Run pgcredits audit every night.'),
  ('totals_are_counted',       'pgcredits_totals_age_seconds',            7200, null, false,
   'The sums over all accounts are old.',
   'See that refresh_totals() is called every quarter of an hour.'),
  ('due_is_booked',            'pgcredits_accounts_overdue',              1000, null, false,
   'What fell due on many accounts is not booked. Balances are right without it.',
   'See that the jobs run that expire grants and reservations.')
), kept as (
  insert into credits.health_checks as h (name, metric, warn_at, fail_at, blocking, meaning, advice)
  select l.* from listed l
  on conflict (name) do update
    set metric = excluded.metric, warn_at = excluded.warn_at, fail_at = excluded.fail_at, blocking = excluded.blocking,
        meaning = excluded.meaning, advice = excluded.advice
)
delete from credits.health_checks h where h.name not in (select l.name from listed l);

create or replace function credits.health()
returns setof credits.health_check
language plpgsql
stable
security definer
set search_path = pg_catalog, pg_temp
as $$
begin
  return query
    select c.name,
           case when m.value >= c.fail_at then 'fail' when m.value >= c.warn_at then 'warn' else 'ok' end,
           trim_scale(m.value), c.blocking, c.meaning, c.advice
      from credits.health_checks c
      left join (select n.name, max(n.value) as value from credits.metrics() n group by n.name) m on m.name = c.metric
     order by coalesce(m.value >= c.fail_at, false) desc, coalesce(m.value >= c.warn_at, false) desc, c.name;
end $$;
comment on function credits.health() is
'What is well and what is not: one row per check, the worst first, with what it means and what to do.

status is ok, warn or fail; value is the figure of metrics() that was judged, null while it is not known, which is ok. blocking
says that a door in this state can do no work. As cheap as metrics().';

create or replace function credits.ready()
returns setof text
language plpgsql
stable
security definer
set search_path = pg_catalog, pg_temp
as $$
begin
  return query
    select c.meaning || ' ' || c.advice
      from credits.health_checks c
      join credits._database_metrics() m on m.name = c.metric
     where c.blocking and m.value >= c.fail_at;
end $$;
comment on function credits.ready() is
'Why a door on this database can do no work, a sentence each; no rows when it can. For /readyz.

A backlog or a finding of the audit is not among them: to take the doors away would lose what comes in, and mend nothing.';

create or replace function credits.run_audit()
returns setof credits.audit_finding
language plpgsql
security definer
set search_path = pg_catalog, pg_temp
as $$
declare
  v_started  timestamptz := credits.now();
  v_findings credits.audit_finding[] := array(select a from credits.audit() a);
begin
  delete from credits.audit_runs r where r.started_at < v_started - interval '1 year';
  insert into credits.audit_runs (started_at, finished_at, findings, sample)
  values (v_started, credits.now(), cardinality(v_findings), coalesce(to_jsonb(v_findings[1:20]), '[]'));
  return query select f.* from unnest(v_findings) f;
end $$;
comment on function credits.run_audit() is
'Runs audit() and keeps a record of the run for health() and metrics(): no rows means sound.

Reads everything: meant for a job at night, or after a restore.';
