-- Jobs that book what has fallen due, account by account, or together where grants only end: a batch of each, answering with
-- how many accounts it booked.
-- Balances are exact without them; they only make the ledger say so in time.
-- Lock order: any, since nobody is waited for. An account that is locked is left for the next run, and whoever holds it
-- books it anyway.

-- The job expire_grants: grants that start or end. Where nothing but the end of grants is due, accounts are booked together,
-- which takes less time for a multiple of them than a batch takes one by one; the others go one by one. It goes on from where
-- the last batch of its run has ended, once all of that were tried: who was passed over is met again by the next run.
create or replace function credits._expire_grants(max_rows integer)
returns bigint
language plpgsql
set jit = off  -- its plans look dear where accounts have many reservations, and to compile one takes longer than a batch
as $$
declare
  c_together constant integer := 4;
  v_job    credits.jobs;
  v_first  credits.grants[];
  v_ended  text[];
  v_alone  bigint := 0;
  v_count  bigint := 0;
begin
  select j.* into v_job from credits.jobs j where j.name = 'expire_grants' and j.run_id is not null;
  while v_count < _expire_grants.max_rows and v_alone < _expire_grants.max_rows loop
    v_first := credits._next_due(v_job.reached_at, v_job.reached_id, c_together * _expire_grants.max_rows);
    exit when v_first = '{}';
    v_ended := credits._try_together(array(select f.account_id from unnest(v_first) f));
    v_alone := credits._book_others(v_first, v_ended, _expire_grants.max_rows);
    v_count := v_count + cardinality(v_ended) + v_alone;
    if v_alone < _expire_grants.max_rows then
      select credits._due_at(f), f.grant_id into v_job.reached_at, v_job.reached_id
        from unnest(v_first[cardinality(v_first):]) f;
    end if;
  end loop;
  update credits.jobs j
     set reached_at = v_job.reached_at, reached_id = v_job.reached_id
   where j.name = v_job.name;
  return v_count;
end $$;

-- The job expire_reservations: holds that ran out. It looks at those that did since it was last through, and ten minutes
-- before, for what was committed late; once a day at the last two days.
create or replace function credits._expire_reservations(max_rows integer)
returns bigint
language plpgsql
as $$
declare
  v_now  timestamptz := credits.now();
  v_from timestamptz := (select case when j.through_at at time zone 'UTC' >= date_trunc('day', v_now at time zone 'UTC')
                                     then j.through_at - interval '10 minutes' else j.through_at - interval '2 days' end
                           from credits.jobs j
                          where j.name = 'expire_reservations');
  v_due  refcursor;
begin
  open v_due for
    select r.account_id
      from credits.reservations r
     where r.expires_at > coalesce(v_from, '-infinity') and r.expires_at <= v_now and r.status = 'open'
     order by r.expires_at;
  return credits._book_each(v_due, _expire_reservations.max_rows);
end $$;

-- The job grant_plan_credits: plans of our own whose month has turned. As the function of that name, without waiting.
create or replace function credits._turn_plans(max_rows integer)
returns bigint
language plpgsql
as $$
declare
  v_now timestamptz := credits.now();
  v_due refcursor;
begin
  open v_due for
    select s.account_id
      from credits.subscriptions s
     where s.source = 'internal' and s.state in ('active', 'canceling') and s.period_end <= v_now
     order by s.period_end;
  return credits._book_each(v_due, _turn_plans.max_rows);
end $$;

-- The job apply_scheduled_changes: changes of plans of our own. Those of Stripe's subscriptions Stripe makes.
create or replace function credits._apply_scheduled_changes(max_rows integer)
returns bigint
language plpgsql
as $$
declare
  v_now timestamptz := credits.now();
  v_due refcursor;
begin
  open v_due for
    select s.account_id
      from credits.subscriptions s
     where s.source = 'internal' and s.pending_at <= v_now
     order by s.pending_at;
  return credits._book_each(v_due, _apply_scheduled_changes.max_rows);
end $$;

-- Helpers -----------------------------------------------------------------------------------------------------------

-- Accounts out of a cursor until so many are booked. One that comes again has nothing due any more.
create or replace function credits._book_each(
  due      refcursor,
  max_rows integer
)
returns bigint
language plpgsql
as $$
declare
  v_due        refcursor := _book_each.due;
  v_account_id text;
  v_booked     bigint := 0;
begin
  while v_booked < _book_each.max_rows loop
    fetch v_due into v_account_id;
    exit when not found;
    if credits._book_if_free(v_account_id) then
      v_booked := v_booked + 1;
    end if;
  end loop;
  close v_due;
  return v_booked;
end $$;

-- Whether it was booked. An account on which that fails must not stop the others: it is told once a day.
create or replace function credits._book_if_free(account_id text)
returns boolean
language plpgsql
as $$
declare
  v_balance credits.balances;
begin
  select b.* into v_balance
    from credits.balances b
   where b.account_id = _book_if_free.account_id and b.next_due_at <= credits.now()
     for no key update skip locked;
  if not found then
    return false;
  end if;
  perform credits._book_due(v_balance);
  return true;
exception
  when serialization_failure or deadlock_detected or lock_not_available then
    return false;
  when others then
    perform credits._notify_failure('booking_failed', _book_if_free.account_id, sqlerrm, sqlstate);
    return false;
end $$;
