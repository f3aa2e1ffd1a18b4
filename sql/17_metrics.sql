-- Figures for operators. metrics() reads indexes and small tables only, so that it may be scraped every few seconds beside
-- millions of accounts; what would read whole tables is counted by refresh_totals(), now and then. A figure is one more row.

create or replace function credits.metrics()
returns setof credits.metric
language plpgsql
stable
security definer
set search_path = pg_catalog, pg_temp
as $$
begin
  return query select m.* from credits._database_metrics() m;
  return query select m.* from credits._event_metrics(credits.now()) m;
  return query select m.* from credits._request_metrics(credits.now()) m;
  return query select m.* from credits._notification_metrics(credits.now()) m;
  return query select m.* from credits._job_metrics(credits.now()) m;
  return query select m.* from credits._subscription_metrics(credits.now()) m;
  return query select m.* from credits._audit_metrics(credits.now()) m;
  return query select m.* from credits._total_metrics(credits.now()) m;
end $$;
comment on function credits.metrics() is
'Figures of the instance, for Prometheus and for people: one row per name and labels, with type and help.

Cheap at any size: events and requests by their indexes, an hour or a day back; sums over all accounts as refresh_totals() left
them, with their age. A value that is not known yet is null.';

-- Helpers -----------------------------------------------------------------------------------------------------------

create or replace function credits._database_metrics()
returns setof credits.metric
language sql
stable
as $$
  select m.name, 'gauge', m.help, '{}'::jsonb, m.value
    from (values
      ('pgcredits_database_read_only', '1 while this server takes no writes.',
       current_setting('transaction_read_only')::boolean::integer::numeric),
      ('pgcredits_database_transaction_age', 'Transactions since the oldest one that is not frozen; at 2.1e9 the server stops.',
       (select age(d.datfrozenxid)::numeric from pg_catalog.pg_database d where d.datname = current_database()))
    ) m (name, help, value)
$$;

create or replace function credits._event_metrics(at timestamptz)
returns setof credits.metric
language plpgsql
stable
as $$
begin
  return query
    with recent as materialized (
      select e.status, count(*) as events, avg(e.lag) as mean, max(e.lag) as longest
        from (select n.status, extract(epoch from n.applied_at - n.created_at) as lag
                from credits.stripe_events n
               where n.received_at > _event_metrics.at - interval '1 hour') e
       group by e.status
    ), waiting as materialized (
      select e.status, count(*) as events, count(*) filter (where e.next_attempt_at is null) as given_up,
             extract(epoch from _event_metrics.at - min(e.received_at) filter (where e.next_attempt_at is not null)) as oldest,
             extract(epoch from _event_metrics.at - min(e.next_attempt_at)) as late
        from credits.stripe_events e
       where e.status in ('parked', 'failed')
       group by e.status
    )
    select 'pgcredits_stripe_events_recent', 'gauge', 'Events that were received in the last hour, by what became of them.',
           jsonb_build_object('status', s.status), coalesce(r.events, 0)::numeric
      from unnest(array['applied', 'ignored', 'parked', 'failed']) s (status) left join recent r on r.status = s.status
    union all
    select 'pgcredits_stripe_events_waiting', 'gauge', 'Events that wait to be tried again, or for a person.',
           jsonb_build_object('status', s.status), coalesce(w.events, 0)
      from unnest(array['parked', 'failed']) s (status) left join waiting w on w.status = s.status
    union all
    select v.name, 'gauge', v.help, '{}', v.value
      from (select coalesce(sum(w.given_up), 0) as given_up, greatest(max(w.oldest), 0) as oldest,
                   greatest(max(w.late), 0) as late
              from waiting w) w,
           (select (select r.mean from recent r where r.status = 'applied') as mean,
                   (select r.longest from recent r where r.status = 'applied') as longest) r,
           (select extract(epoch from _event_metrics.at - max(e.received_at)) as seconds from credits.stripe_events e) l,
           lateral (values
             ('pgcredits_stripe_events_given_up', 'Events that are not tried again by themselves.', w.given_up),
             ('pgcredits_stripe_events_oldest_seconds', 'Age of the oldest event that is still tried.', coalesce(w.oldest, 0)),
             ('pgcredits_stripe_events_retry_late_seconds', 'How long the next retry of an event is overdue.',
              coalesce(w.late, 0)),
             ('pgcredits_stripe_event_lag_mean_seconds', 'From Stripe''s event to its effect, mean of the last hour.', r.mean),
             ('pgcredits_stripe_event_lag_max_seconds', 'From Stripe''s event to its effect, longest of the last hour.',
              r.longest),
             ('pgcredits_stripe_event_age_seconds', 'Since the last event was received.', l.seconds)) v (name, help, value);
end $$;
comment on function credits._event_metrics(timestamptz) is
  'By stripe_events_by_time and stripe_events_to_retry: one hour of events, and those that wait.';

create or replace function credits._request_metrics(at timestamptz)
returns setof credits.metric
language sql
stable
as $$
  with open as materialized (
    select r.state, count(*) as requests,
           extract(epoch from _request_metrics.at
                              - min(case r.state when 'queued' then r.run_at else r.locked_until end)) as late
      from credits.stripe_requests r
     where r.state in ('queued', 'sent')
     group by r.state
  )
  select 'pgcredits_stripe_requests', 'gauge', 'Requests to Stripe that wait to be sent, or for their answer.',
         jsonb_build_object('state', s.state), coalesce(o.requests, 0)::numeric
    from unnest(array['queued', 'sent']) s (state) left join open o on o.state = s.state
  union all
  select v.name, 'gauge', v.help, '{}', v.value
    from (values
      ('pgcredits_stripe_requests_late_seconds', 'How long the first request to Stripe is overdue.',
       coalesce((select greatest(max(o.late), 0) from open o), 0)),
      ('pgcredits_stripe_requests_failed', 'Requests that Stripe refused in the last day.',
       (select count(*) from credits.stripe_requests r
         where r.state in ('failed', 'unknown') and r.state = 'failed' and r.error_type is distinct from 'withdrawn'
           and r.finished_at > _request_metrics.at - interval '1 day')),
      ('pgcredits_stripe_requests_unknown', 'Requests of which nobody knows whether Stripe did them.',
       (select count(*) from credits.stripe_requests r where r.state in ('failed', 'unknown') and r.state = 'unknown')),
      ('pgcredits_stripe_stopped', '1 while Stripe refuses our key and nothing is sent.',
       (select count(*) from credits.stripe_queue_stop)),
      ('pgcredits_stripe_accounts_disconnected', 'Connected accounts of our endpoints that took away our access.',
       (select count(distinct e.stripe_account) from credits.stripe_endpoints e
         where credits._is_disconnected(e.stripe_account))),
      ('pgcredits_stripe_endpoints_of_any_livemode', 'Live endpoints of connected accounts that take test and live events alike.',
       (select count(*) from credits.stripe_endpoints e
         where e.mode = 'live' and e.livemode is null and e.stripe_account is not null))
    ) v (name, help, value)
$$;
comment on function credits._request_metrics(timestamptz) is
  'By the partial indexes over requests that are open or went wrong.';

create or replace function credits._notification_metrics(at timestamptz)
returns setof credits.metric
language sql
stable
as $$
  with open as materialized (  -- what waits for an endpoint that is switched off is not late
    select d.state, count(*) as deliveries, extract(epoch from _notification_metrics.at
             - min(case d.state when 'pending' then d.next_attempt_at else d.locked_until end)
               filter (where e.name is null)) as late
      from credits.notification_deliveries d
      left join credits.notification_endpoints e on d.channel = 'webhook' and e.name = d.target and not e.enabled
     where d.state in ('pending', 'sent', 'dead')
     group by d.state
  )
  select 'pgcredits_notifications', 'gauge', 'Deliveries of notifications that are not done, or were given up.',
         jsonb_build_object('state', s.state), coalesce(o.deliveries, 0)::numeric
    from unnest(array['pending', 'sent', 'dead']) s (state) left join open o on o.state = s.state
  union all
  select v.name, 'gauge', v.help, '{}', v.value
    from (values
      ('pgcredits_notifications_late_seconds', 'How long the first delivery of a notification is overdue.',
       coalesce((select greatest(max(o.late), 0) from open o where o.state <> 'dead'), 0)),
      ('pgcredits_notifications_dead', 'Deliveries that were given up.',
       coalesce((select o.deliveries from open o where o.state = 'dead'), 0))
    ) v (name, help, value)
$$;

create or replace function credits._job_metrics(at timestamptz)
returns setof credits.metric
language sql
stable
as $$
  select v.name, 'gauge', v.help, jsonb_build_object('job', j.name), v.value
    from credits.jobs j,
         lateral (values
           ('pgcredits_job_last_success_timestamp_seconds', 'When a job last did all that it had to do.',
            extract(epoch from j.last_success_at)),
           ('pgcredits_job_failures', 'Runs of a job that failed since its last success.', j.failures),
           ('pgcredits_job_late_seconds', 'How long a job is overdue.',
            greatest(extract(epoch from _job_metrics.at - j.next_run_at), 0))) v (name, help, value)
   where j.enabled
$$;

create or replace function credits._subscription_metrics(at timestamptz)
returns setof credits.metric
language sql
stable
as $$
  select v.name, v.type, v.help, '{}'::jsonb, v.value
    from (select case when h.is_called then h.last_value else 0 end as hits from credits.subscription_cache_hits h) h,
         (select case when m.is_called then m.last_value else 0 end as misses from credits.subscription_cache_misses m) m,
         (select count(*) as moves, count(*) filter (where s.created_at > _subscription_metrics.at - interval '1 day') as recent
            from credits.subscription_history s where s.unexpected) u,
         lateral (values
           ('pgcredits_subscription_cache_hits_total', 'counter', 'States of subscriptions that came from the cache.',
            h.hits::numeric),
           ('pgcredits_subscription_cache_misses_total', 'counter', 'States of subscriptions that were computed.', m.misses),
           ('pgcredits_subscription_cache_hit_ratio', 'gauge', 'Hits of all, since the installation.',
            round(h.hits::numeric / nullif(h.hits + m.misses, 0), 4)),
           ('pgcredits_subscription_unexpected_moves_total', 'counter', 'Moves of Stripe that no row foresees.', u.moves),
           ('pgcredits_subscription_unexpected_moves_recent', 'gauge', 'Such moves of the last day.', u.recent)
         ) v (name, type, help, value)
$$;

create or replace function credits._audit_metrics(at timestamptz)
returns setof credits.metric
language sql
stable
as $$
  select v.name, 'gauge', v.help, '{}'::jsonb, v.value
    from (select 1) one
    left join (select r.* from credits.audit_runs r order by r.audit_run_id desc limit 1) r on true,
         lateral (values
           ('pgcredits_audit_violations', 'What the last run of the audit found.', r.findings::numeric),
           ('pgcredits_audit_age_seconds', 'Since the last run of the audit.',
            extract(epoch from _audit_metrics.at - r.finished_at))
         ) v (name, help, value)
$$;
