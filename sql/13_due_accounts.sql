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

-- Together ----------------------------------------------------------------------------------------------------------

-- The grants that are due after one of them, in their order.
create or replace function credits._next_due(
  after_at timestamptz,
  after_id bigint,
  max_rows integer
)
returns credits.grants[]
language plpgsql
stable
as $$
declare
  v_now timestamptz := credits.now();
begin
  return array(
    select g
      from credits.grants g
     where g.status in ('pending', 'active')
       and credits._due_at(g) <= v_now
       and (credits._due_at(g), g.grant_id)
           > (coalesce(_next_due.after_at, '-infinity'), coalesce(_next_due.after_id, 0))
     order by credits._due_at(g), g.grant_id
     limit _next_due.max_rows);
end $$;

-- One by one: those that were not booked together.
create or replace function credits._book_others(
  lots     credits.grants[],
  booked   text[],
  max_rows integer
)
returns bigint
language plpgsql
as $$
declare
  v_due refcursor;
begin
  open v_due for
    select l.account_id
      from unnest(_book_others.lots) l
     where not exists (select from unnest(_book_others.booked) b (account_id) where b.account_id = l.account_id)
     order by credits._due_at(l), l.grant_id;
  return credits._book_each(v_due, _book_others.max_rows);
end $$;

-- Accounts that were booked together. One on which that fails must not hold up the others: it is looked for by halves, and
-- left to whoever books it alone, and tells.
create or replace function credits._try_together(account_ids text[])
returns text[]
language plpgsql
as $$
declare
  v_half integer := cardinality(_try_together.account_ids) / 2;
begin
  return credits._expire_together(credits._lock_due(_try_together.account_ids), credits.now());
exception when others then
  if v_half = 0 then
    return array[]::text[];
  end if;
  return credits._try_together(_try_together.account_ids[:v_half])
         || credits._try_together(_try_together.account_ids[v_half + 1:]);
end $$;

-- Those that nobody else has locked, and whose credits are simply balance - held. What the row tells is true once it is locked.
create or replace function credits._lock_due(account_ids text[])
returns text[]
language plpgsql
as $$
begin
  return array(
    select b.account_id
      from credits.balances b
     where b.account_id = any (_lock_due.account_ids)
       and b.next_due_at <= credits.now() and b.debt = 0 and not b.has_scoped
       for no key update skip locked);
end $$;

-- Ends grants of accounts that the caller has locked, as _expire_grant() does one after the other, and answers with whose.
-- Each statement sees what the one before has written, so the last one can ask when something falls due next.
create or replace function credits._expire_together(
  account_ids text[],
  at          timestamptz
)
returns text[]
language plpgsql
as $$
declare
  v_ends     credits.grants[] := array(
    select e from credits._plain_ends(_expire_together.account_ids, _expire_together.at) e);
  v_accounts text[];
begin
  update credits.grants g
     set remaining = 0, expired = g.expired + g.remaining, status = 'expired'
    from unnest(v_ends) e
   where g.account_id = e.account_id and g.grant_id = e.grant_id;

  with drafts as (
    select b.hash as head, lead(e.grant_id) over by_account is null as is_last, row(
             b.entry_seq + row_number() over by_account, _expire_together.at, e.account_id, 'expire', 'expire', null,
             -e.remaining, 0, trim_scale(b.balance - sum(e.remaining) over by_account),
             trim_scale(b.balance - b.held - sum(e.remaining) over by_account), array[e.grant_id], array[e.remaining],
             null, null, null, null, null, null, e.description, null, '{}')::credits.entries as entry
      from unnest(v_ends) e
      join credits.balances b on b.account_id = e.account_id
    window by_account as (partition by e.account_id order by e.expires_at, e.grant_id)
  ), chained as (
    select d.entry, d.is_last, credits._hash_chain(d.head, credits._entry_text(d.entry))
                                 over (partition by (d.entry).account_id order by (d.entry).entry_seq) as hash
      from drafts d
  ), booked as (
    insert into credits.entries (entry_seq, created_at, account_id, kind, operation, amount, debt, balance_after,
      available_after, grant_ids, grant_amounts, hash, description, metadata)
    select (c.entry).entry_seq, (c.entry).created_at, (c.entry).account_id, (c.entry).kind, (c.entry).operation,
           (c.entry).amount, (c.entry).debt, (c.entry).balance_after, (c.entry).available_after, (c.entry).grant_ids,
           (c.entry).grant_amounts, c.hash, (c.entry).description, (c.entry).metadata
      from chained c
  ), counted as (
    update credits.balances b
       set balance = (c.entry).balance_after, entry_seq = (c.entry).entry_seq, hash = c.hash,
           next_due_at = n.due_at
      from chained c,
           lateral (select coalesce(min(d.due_at), 'infinity') as due_at
                      from credits._coming((c.entry).account_id, _expire_together.at) d (due_at)) n
     where b.account_id = (c.entry).account_id and c.is_last
    returning b.account_id
  )
  select coalesce(array_agg(c.account_id), '{}') into v_accounts from counted c;
  return v_accounts;
end $$;

-- The grants that end, of accounts on which nothing else is due and nobody has to hear of it: no grant starts or has all of its
-- rest on hold, no hold runs out, no month turns, no credits roll over, and no threshold is passed.
create or replace function credits._plain_ends(
  account_ids text[],
  at          timestamptz
)
returns setof credits.grants
language plpgsql
stable
as $$
begin
  return query
    select g.*
      from credits.balances b
      join lateral (
             select sum(d.remaining) as lost
               from credits.grants d
              where d.account_id = b.account_id and d.status in ('pending', 'active')
                and credits._due_at(d) <= _plain_ends.at
             having bool_and(d.status = 'active' and d.remaining > 0
                             and not exists (select from credits.plan_grants p
                                              where p.account_id = d.account_id and p.grant_id = d.grant_id))) l
        on (b.balance - l.lost < b.low_at) is not distinct from case when b.low_at is not null then b.is_low end
           and (b.balance - b.held - l.lost < b.topup_below) is not true
      join credits.grants g on g.account_id = b.account_id and g.status = 'active' and g.expires_at <= _plain_ends.at
     where b.account_id = any (_plain_ends.account_ids)
       and not exists (select from credits.reservations r
                        where r.account_id = b.account_id and r.status = 'open'
                          and r.expires_at between b.next_due_at and _plain_ends.at)
       and not exists (select from credits.subscriptions s
                        where s.account_id = b.account_id and s.source = 'internal' and s.state in ('active', 'canceling')
                          and s.period_end <= _plain_ends.at);
end $$;
