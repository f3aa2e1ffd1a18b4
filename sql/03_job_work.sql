-- What jobs do whose verbs are elsewhere: a batch of each, answering with how many rows it did. The ones that book
-- accounts are in 13_due_accounts, the cache's in 52_cache_cleanup.

create or replace function credits._retry_stripe_events(max_rows integer)
returns bigint
language sql
as $$
  select count(*) from credits.process_stripe_events(_retry_stripe_events.max_rows)
$$;

create or replace function credits._archive_stripe_events(max_rows integer)
returns bigint
language sql
as $$
  select credits.archive_stripe_events(max_events => _archive_stripe_events.max_rows)
$$;

create or replace function credits._run_auto_topups(max_rows integer)
returns bigint
language sql
as $$
  select credits.run_auto_topups(_run_auto_topups.max_rows)::bigint
$$;

create or replace function credits._warn_expiring_credits(max_rows integer)
returns bigint
language sql
as $$
  select credits.warn_expiring_credits(_warn_expiring_credits.max_rows)::bigint
$$;

create or replace function credits._purge_notifications(max_rows integer)
returns bigint
language sql
as $$
  select credits.purge_notifications(_purge_notifications.max_rows)::bigint
$$;

-- Asks only; workers do the rest. A run that is not through yet goes on.
create or replace function credits._reconcile_stripe(max_rows integer)
returns bigint
language sql
as $$
  select count(*) from credits.reconcile_stripe()
$$;

-- Live subscriptions of Stripe of which nothing was heard for long, or not since a boundary that they have passed. One for
-- which a request is open is left alone, so a batch finds what the last one has left.
create or replace function credits._refresh_stale_subscriptions(max_rows integer)
returns bigint
language plpgsql
as $$
declare
  v_now   timestamptz := credits.now();
  v_after interval := (credits._setting('subscription_refresh_after') #>> '{}')::interval;
  v_asked bigint;
begin
  select count(credits._request_object('subscription', f.subscription_id)) into v_asked
    from (select s.subscription_id
            from credits.subscriptions s
            join credits.subscription_states t on t.state = s.state and not t.terminal
            join credits.stripe_objects o on o.kind = 'subscription' and o.object_id = s.subscription_id and not o.deleted
           where s.source = 'stripe'
             and (to_timestamp(o.as_of) <= v_now - v_after
                  or (select max(b.at) from unnest(array[s.period_end, s.pending_at, s.cancel_at, s.trial_end]) b (at)
                       where b.at <= v_now) > to_timestamp(o.as_of))
             and credits._open_request('retrieve', 'subscription:' || s.subscription_id) is null
             and not credits._is_disconnected(credits._home_of('subscription', s.subscription_id))
           order by o.as_of
           limit _refresh_stale_subscriptions.max_rows) f;
  return v_asked;
end $$;

-- Purchases that nobody has heard the end of a day after they began, when an unpaid session has expired; once a day, as long as a
-- payment may take.
create or replace function credits._refresh_stale_purchases(max_rows integer)
returns bigint
language sql
as $$
  select count(credits._request_object('checkout.session', p.stripe_session_id))
    from credits.purchases p
   where p.status in ('pending', 'processing') and p.stripe_session_id is not null
     and p.created_at between credits.now() - interval '90 days' and credits.now() - interval '25 hours'
     and credits._turned_away(jsonb_build_object('object', 'checkout.session', 'id', p.stripe_session_id,
                                                 'livemode', p.livemode)) is null
$$;

-- Each invariant that is violated is told once a day. Answers with how many findings there are.
create or replace function credits._audit_all(max_rows integer)
returns bigint
language plpgsql
as $$
declare
  v_found record;
  v_all   bigint := 0;
begin
  for v_found in
    select f.invariant, count(*) as findings, min(f.account_id) as account_id
      from (select a.* from credits.run_audit() a limit _audit_all.max_rows) f
     group by f.invariant
  loop
    v_all := v_all + v_found.findings;
    perform credits._notify(null, 'audit_violation',
      format('audit:%s:%s', v_found.invariant, (credits.now() at time zone 'UTC')::date),
      jsonb_build_object('invariant', v_found.invariant, 'findings', v_found.findings, 'first_account_id', v_found.account_id));
  end loop;
  return v_all;
end $$;

create or replace function credits._purge_job_history(max_rows integer)
returns bigint
language plpgsql
as $$
declare
  v_before  timestamptz := credits.now() - (credits._setting('job_history') #>> '{}')::interval;
  v_removed bigint;
begin
  delete from credits.job_runners r where r.seen_at < v_before;
  delete from credits.job_runs r
   where r.run_id in (select o.run_id
                        from credits.job_runs o
                       where o.finished_at < v_before
                       order by o.run_id
                       limit _purge_job_history.max_rows);
  get diagnostics v_removed = row_count;
  return v_removed;
end $$;
