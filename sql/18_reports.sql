-- What operators look at by the day, the week and the month. Days and months are those of UTC; money is in the minor unit of
-- its currency and of different currencies never added up.
-- A view calls functions as its reader, who may not call credits.now(): hence now().
-- Where a comment says so a view reads a whole table: give it a WHERE, or a replica.

create or replace view credits.report_event_processing as
select date_trunc('day', e.received_at at time zone 'UTC')::date as day, e.endpoint, count(*) as events,
       count(*) filter (where e.status = 'applied')              as applied,
       count(*) filter (where e.status = 'ignored')              as ignored,
       count(*) filter (where e.status = 'parked')               as parked,
       count(*) filter (where e.status = 'failed')               as failed,
       round(count(*) filter (where e.status in ('applied', 'ignored'))::numeric / count(*), 4) as success_rate,
       avg(e.applied_at - e.created_at)                          as mean_lag,
       percentile_disc(0.95) within group (order by e.applied_at - e.created_at) as lag_95,
       max(e.applied_at - e.created_at)                          as longest_lag
  from credits.stripe_events e
 where e.received_at > now() - interval '31 days'
 group by 1, 2;
comment on view credits.report_event_processing is
  'Every day: events of the last 31 days by day and endpoint, how many succeeded, and the lag from event to effect.';

create or replace view credits.report_failed_events as
select e.event_id, e.endpoint, e.type, e.status, e.reason, e.error, e.waits_for, e.attempts, e.received_at, e.next_attempt_at,
       e.next_attempt_at is null as given_up, e.object_id
  from credits.stripe_events e
 where e.status in ('parked', 'failed');
comment on view credits.report_failed_events is
  'Every day: events that failed or wait, with the reason. given_up: not tried again by itself; mend the cause and replay it.';

create or replace view credits.report_stripe_requests as
select r.request_id, r.purpose, r.ref, r.account_id, r.state, r.attempts, r.http_status, r.error_type, r.error_code,
       r.decline_code, r.created_at, r.run_at, r.finished_at
  from credits.stripe_requests r
 where r.state in ('queued', 'sent', 'failed', 'unknown') and r.error_type is distinct from 'withdrawn';
comment on view credits.report_stripe_requests is
  'Every day: requests to Stripe that are not answered, failed, or of which nobody knows. See retry_stripe_request().';

create or replace view credits.report_unexpected_moves as
select h.created_at, h.account_id, h.subscription_id, h.from_state, h.to_state, h.plan, h.cause
  from credits.subscription_history h
 where h.unexpected;
comment on view credits.report_unexpected_moves is
  'Every day: moves of subscriptions that Stripe made and no row foresees, with the event that told of them.';

create or replace view credits.report_integrity as
select r.audit_run_id, r.started_at, r.finished_at - r.started_at as took, r.findings, r.findings = 0 as sound, r.sample
  from credits.audit_runs r;
comment on view credits.report_integrity is
  'Every day: runs of the audit and what they found, the first 20 findings as sample.';

create or replace view credits.report_subscriptions as
select s.state, s.source, s.plan, count(*) as subscriptions, count(*) filter (where s.cancel_at_period_end) as ending
  from credits.subscriptions s
 group by s.state, s.source, s.plan;
comment on view credits.report_subscriptions is
  'Every week: subscriptions by state, source and plan; ending: those that end with their period. Reads all subscriptions.';

create or replace view credits.report_revenue as
select (p.completed_at at time zone 'UTC')::date as day, p.package, p.currency, p.livemode, count(*) as purchases,
       trim_scale(sum(p.credits)) as credits, sum(p.amount)::bigint as amount, sum(p.amount_tax)::bigint as tax,
       sum(p.amount_refunded)::bigint as refunded, sum(p.amount_disputed)::bigint as disputed,
       sum(coalesce(round((p.amount - p.amount_refunded - p.amount_disputed) * (1 - p.amount_tax::numeric / nullif(p.amount, 0))),
                    0))::bigint as net
  from credits.purchases p
 where p.completed_at is not null
 group by 1, 2, 3, 4;
comment on view credits.report_revenue is
  'Every day: what packages brought, by day and package; what plans brought is not in it. net is what of amount did not go back '
  'and is not asked back by now, without its share of the tax.';

create or replace view credits.report_liability as
select g.kind::text as kind, g.cost_currency as currency, count(*) as grants, trim_scale(sum(g.remaining + g.held)) as credits,
       round(sum(g.cost * (g.remaining + g.held) / g.amount), 2) as cost,
       trim_scale(sum(g.remaining + g.held) filter (where g.cost is null)) as credits_without_cost,
       trim_scale(sum(g.remaining + g.held) filter (where g.expires_at < now() + interval '30 days')) as expire_in_30_days
  from (select n.* from credits.grants n where n.status in ('pending', 'active')
        union all
        select n.* from credits.balances b  -- what a hold has of a grant that ended may still be charged
          join credits.grants n on n.account_id = b.account_id
         where b.held > 0 and n.held > 0 and n.status not in ('pending', 'active')) g
 group by g.kind, g.cost_currency;
comment on view credits.report_liability is
  'Every month: credits owed to customers, by kind, and their share of what was paid: deferred revenue. Reads live grants '
  'and balances.';

create or replace view credits.report_breakage as
select date_trunc('month', e.created_at at time zone 'UTC')::date as month, g.kind::text as kind, g.cost_currency as currency,
       trim_scale(sum(s.amount)) as credits, round(sum(g.cost * s.amount / g.amount), 2) as cost
  from credits.entries e, unnest(e.grant_ids, e.grant_amounts) s (grant_id, amount), credits.grants g
 where e.kind = 'expire' and g.account_id = e.account_id and g.grant_id = s.grant_id
 group by 1, 2, 3;
comment on view credits.report_breakage is
  'Every month: credits that ran out unused, by kind, and what was paid for them. Reads all entries.';

create or replace view credits.report_credit_flow as
select date_trunc('month', e.created_at at time zone 'UTC')::date as month, e.kind, count(*) as entries,
       trim_scale(sum(e.amount)) as credits, trim_scale(sum(e.debt)) as debt
  from credits.entries e
 group by 1, 2;
comment on view credits.report_credit_flow is
  'Every month: what came and went, by kind of entry. All months together are the balances of today. Reads all entries.';

create or replace view credits.report_reservations as
select (r.created_at at time zone 'UTC')::date as day, r.status::text as status, count(*) as reservations,
       trim_scale(sum(r.requested)) as requested, trim_scale(sum(r.captured + coalesce(r.charged, 0))) as charged,
       trim_scale(sum(coalesce(r.uncollected, 0))) as uncollected, count(*) filter (where r.late) as late
  from credits.reservations r
 group by 1, 2;
comment on view credits.report_reservations is
  'Every week: what became of reservations, by day. Many expired: work that never reports back. Reads all reservations.';
