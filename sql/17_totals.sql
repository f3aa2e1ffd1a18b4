-- Sums over all accounts, counted now and then: what metrics() must not read whole tables for.

create or replace function credits.refresh_totals()
returns setof credits.totals
language plpgsql
security definer
set search_path = pg_catalog, pg_temp
as $$
declare
  v_now timestamptz := credits.now();
begin
  insert into credits.totals as t (name, label, value, counted_at)
    select c.name, c.label, trim_scale(c.value), v_now
      from (select b.name, b.label, b.value from credits._count_balances(v_now) b
            union all
            select 'pgcredits_credits_unspent', g.kind::text, sum(g.remaining + g.held)
              from (select n.* from credits.grants n where n.status = 'active'
                    union all
                    select n.* from credits.balances b  -- on hold since before their grant ended
                      join credits.grants n on n.account_id = b.account_id
                     where b.held > 0 and n.held > 0 and n.status not in ('pending', 'active')) g
             group by g.kind
            union all
            select 'pgcredits_subscriptions', s.state, count(*) from credits.subscriptions s group by s.state) c
     order by c.name, c.label
  on conflict on constraint totals_pkey do update set value = excluded.value, counted_at = excluded.counted_at;
  delete from credits.totals t where t.counted_at <> v_now;
  return query select t.* from credits.totals t order by t.name, t.label;
end $$;
comment on function credits.refresh_totals() is
'Counts the sums over all accounts that metrics() shows, and answers them.

Reads all balances, live grants and subscriptions: meant for a job every quarter of an hour. It locks no account.';

-- The job refresh_totals.
create or replace function credits._count_totals(max_rows integer)
returns bigint
language sql
as $$
  select count(*) from credits.refresh_totals()
$$;

-- One pass over the balances. Open reservations are looked up where credits are held, and nowhere else.
create or replace function credits._count_balances(at timestamptz)
returns setof credits.totals
language plpgsql
stable
as $$
begin
  return query
    with counted as materialized (
      select b.status, count(*) as accounts, sum(b.balance) as balance, sum(b.held) as held, sum(b.debt) as debt,
             count(*) filter (where b.debt > 0) as in_debt,
             count(*) filter (where b.next_due_at < _count_balances.at - interval '1 hour') as overdue
        from credits.balances b
       group by b.status
    )
    select 'pgcredits_accounts', c.status, c.accounts, _count_balances.at from counted c
    union all
    select v.name, '', v.value, _count_balances.at
      from (select coalesce(sum(c.balance), 0) as balance, coalesce(sum(c.held), 0) as held, coalesce(sum(c.debt), 0) as debt,
                   coalesce(sum(c.in_debt), 0) as in_debt, coalesce(sum(c.overdue), 0) as overdue
              from counted c) s,
           lateral (values ('pgcredits_credits_balance', s.balance), ('pgcredits_credits_held', s.held),
                           ('pgcredits_credits_debt', s.debt), ('pgcredits_accounts_in_debt', s.in_debt),
                           ('pgcredits_accounts_overdue', s.overdue)) v (name, value)
    union all
    select 'pgcredits_reservations_open', '', count(*), _count_balances.at
      from credits.balances b
      join credits.reservations r
        on r.account_id = b.account_id and r.expires_at > _count_balances.at and r.status = 'open'
     where b.held > 0;
end $$;

create or replace function credits._total_metrics(at timestamptz)
returns setof credits.metric
language sql
stable
as $$
  with named (name, label, help) as (values
    ('pgcredits_accounts',          'status', 'Accounts.'),
    ('pgcredits_accounts_in_debt',  null,     'Accounts that owe credits.'),
    ('pgcredits_accounts_overdue',  null,     'Accounts of which something fell due over an hour ago and is not booked.'),
    ('pgcredits_credits_balance',   null,     'Credits on all accounts, as booked.'),
    ('pgcredits_credits_held',      null,     'Credits that reservations hold.'),
    ('pgcredits_credits_debt',      null,     'Credits that are owed.'),
    ('pgcredits_credits_unspent',   'kind',   'Credits that are not used; of grants that ended those on hold.'),
    ('pgcredits_reservations_open', null,     'Reservations that are open and not run out.'),
    ('pgcredits_subscriptions',     'state',  'Subscriptions.')
  )
  select n.name, 'gauge', n.help, case when n.label is null then '{}' else jsonb_build_object(n.label, t.label) end, t.value
    from named n
    join credits.totals t on t.name = n.name
  union all
  select 'pgcredits_totals_age_seconds', 'gauge', 'Since refresh_totals() counted the sums over all accounts.', '{}',
         extract(epoch from _total_metrics.at - max(t.counted_at))
    from credits.totals t
$$;
