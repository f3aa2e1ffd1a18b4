-- The monthly credits of internal plans, for all accounts: the month that turned, and plans whose credits have changed.
-- Balances are exact without either, since the next month always waits as a pending grant: these book what is due, and bring
-- what waits to what the catalogue says now. Lock order: one account after the other, by account_id.

create or replace function credits.grant_plan_credits(max_accounts integer default 1000)
returns integer
language plpgsql
security definer
set search_path = pg_catalog, pg_temp
as $$
declare
  v_now    timestamptz := credits.now();
  v_turned text[];
begin
  v_turned := array(select s.account_id
                      from credits.subscriptions s
                     where s.source = 'internal' and s.state in ('active', 'canceling') and s.period_end <= v_now
                     order by s.period_end
                     limit credits._check_rows(grant_plan_credits.max_accounts, 'max_accounts', 10000));
  perform credits._lock_accounts(v_turned);
  return cardinality(v_turned);
end $$;
comment on function credits.grant_plan_credits(integer) is
'Books the new month of internal plans whose period has ended: credits, rollover, scheduled changes. For a job.

At most max_accounts (1 to 10,000) in one transaction; answers with how many there were, so call it until it says 0. Balances
show the new month on time even if nobody calls this.
Errors: 400 invalid_request.';

create or replace function credits.initialize_plan_credits(max_accounts integer default 1000)
returns integer
language plpgsql
security definer
set search_path = pg_catalog, pg_temp
as $$
declare
  v_now      timestamptz := credits.now();
  v_accounts text[];
begin
  v_accounts := array(select c.account_id
                        from credits._plans_to_bring_up(v_now) c
                       order by c.account_id
                       limit credits._check_rows(initialize_plan_credits.max_accounts, 'max_accounts', 10000));
  perform credits._lock_accounts(v_accounts);
  perform credits._refresh_plan(a.account_id) from unnest(v_accounts) a (account_id);
  return cardinality(v_accounts);
end $$;
comment on function credits.initialize_plan_credits(integer) is
'Gives accounts the credits that their internal plan says now: after a plan got its credits, or others.

An account that had nothing this month gets the month at once; one that had its month keeps it, and the next month, which
waits as a pending grant, is changed. At most max_accounts (1 to 10,000) in one transaction; answers with how many accounts
it brought up to date, so call it until it says 0. Calling again gives nothing twice. `pgcredits catalog apply` calls it.
Errors: 400 invalid_request.';

-- Helpers -------------------------------------------------------------------------------------------------------------

drop function if exists credits._check_max(integer);

-- Accounts whose grants are not those that their plan says. First what is cheap to ask and mostly says no.
create or replace function credits._plans_to_bring_up(at timestamptz)
returns setof credits.subscriptions
language sql
stable
as $$
  select s.*
    from credits.subscriptions s
    join credits.plans p on p.code = s.plan
   where s.source = 'internal' and s.state in ('active', 'canceling')
     and (s.pending_plan is not null or s.period_end <= _plans_to_bring_up.at
          or (p.monthly_credits > 0 and not credits._granted_for(s))
          or (p.monthly_credits > 0 and s.state = 'active') is distinct from exists (
               select from credits.plan_grants m
                 join credits.grants g on g.account_id = m.account_id and g.grant_id = m.grant_id
                where m.account_id = s.account_id and m.allowance_id = 'plan' and g.status = 'pending'
                  and g.amount = p.monthly_credits))
     and (exists (select from credits._wanted_slices(s.account_id, _plans_to_bring_up.at) w
                   where not exists (select from credits.grants g
                                      where g.account_id = s.account_id and g.key = w.key
                                        and (g.amount = w.amount or g.status <> 'pending')))
          or exists (select from credits.plan_grants m
                       join credits.grants g on g.account_id = m.account_id and g.grant_id = m.grant_id
                      where m.account_id = s.account_id and m.allowance_id = 'plan' and g.status = 'pending'
                        and not exists (select from credits._wanted_slices(s.account_id, _plans_to_bring_up.at) w
                                         where w.key = g.key)))
$$;
