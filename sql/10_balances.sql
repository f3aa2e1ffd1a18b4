-- The balance of an account: as it is at this instant, and as the ledger knew it at a moment.
-- Keeps: invariant 1, a balance is the sum of its entries.

create or replace function credits.get_balance(account_id text)
returns credits.balance_result
language plpgsql
stable
security definer
set search_path = pg_catalog, pg_temp
as $$
declare
  v_now     timestamptz := credits.now();
  v_account credits.accounts := credits._account(get_balance.account_id);
  v_balance credits.balances := credits._balance(get_balance.account_id);
  v_debt    numeric := credits._debt_at(v_balance, v_now);
  v_result  credits.balance_result;
begin
  with lots as (
    select l.*, l.remaining + l.held as live
      from credits._lots_at(v_balance, v_now) l
  ), next_expiry as (
    select l.expires_at, sum(l.live) as amount
      from lots l
     where l.live > 0 and l.expires_at > v_now
     group by l.expires_at
     order by l.expires_at
     limit 1
  ), totals as (
    select coalesce(sum(l.live), 0)                                   as balance,
           coalesce(sum(l.held), 0)                                   as held,
           coalesce(sum(l.remaining) filter (where l.scope is null), 0) as free
      from lots l
  )
  select get_balance.account_id,
         trim_scale(t.free - v_debt),
         trim_scale(t.held),
         trim_scale(t.balance),
         trim_scale(v_debt),
         v_account.status,
         case when v_balance.next_due_at > v_now then v_account.plan
              else credits._plan_at(v_account, v_now) end,
         n.expires_at,
         trim_scale(n.amount),
         coalesce((select jsonb_object_agg(k.kind, trim_scale(k.live))
                     from (select l.kind, sum(l.live) as live from lots l where l.live > 0 group by l.kind) k), '{}'),
         coalesce((select jsonb_object_agg(c.capability, trim_scale(c.free))
                     from (select u.capability, sum(l.remaining) as free
                             from lots l, unnest(l.scope) u (capability)
                            where l.remaining > 0
                            group by u.capability) c), '{}'),
         trim_scale(coalesce((select sum(g.remaining) from credits.grants g
                               where g.account_id = get_balance.account_id
                                 and g.status = 'pending' and g.effective_at > v_now
                                 and not exists (select from credits.plan_grants p
                                                  where p.account_id = g.account_id and p.grant_id = g.grant_id)), 0)),
         v_balance.entry_seq
    into v_result
    from totals t left join next_expiry n on true;
  return v_result;
end $$;
comment on function credits.get_balance(text) is
'The balance of an account at this instant, in credits.

available is what can be spent now: balance - held - debt, without the credits that are scoped to capabilities. It is
negative while there is debt. balance counts credits that are effective and not expired, exactly, however late the jobs
run. by_kind splits balance by kind of grant, scoped shows the free credits of each capability, pending what starts later, but for
the coming months of a plan.
Errors: 400 invalid_request, 404 account_not_found.';

create or replace function credits.balance_at(
  account_id text,
  at         timestamptz
)
returns numeric
language plpgsql
stable
security definer
set search_path = pg_catalog, pg_temp
as $$
begin
  perform credits._account(balance_at.account_id);
  if balance_at.at is null then
    perform credits._fail(400, 'invalid_request', jsonb_build_object('argument', 'at'), 'at is a moment.');
  end if;
  return coalesce((select e.balance_after from credits.entries e
                    where e.account_id = balance_at.account_id
                      and e.entry_seq = credits._seq_at(balance_at.account_id, balance_at.at)), 0);
end $$;
comment on function credits.balance_at(text, timestamptz) is
'The balance as the ledger knew it at a moment: balance_after of the last entry that was written by then, else 0.

An expiry counts from when it was booked; get_balance is exact about the present.
Errors: 400 invalid_request, 404 account_not_found.';

-- Helpers ------------------------------------------------------------------------------------------------------------

-- The last entry not later than a moment; 0 is before all. Entries are numbered without a gap and their moments follow their
-- numbers, so halving finds the place.
create or replace function credits._seq_at(
  account_id text,
  at         timestamptz
)
returns bigint
language plpgsql
stable
as $$
declare
  v_after  bigint := 0;  -- the last entry known not to be later than at
  v_beyond bigint;       -- the first entry known to be later
  v_middle bigint;
begin
  select b.entry_seq + 1 into v_beyond from credits.balances b where b.account_id = _seq_at.account_id;
  while v_beyond - v_after > 1 loop
    v_middle := (v_after + v_beyond) / 2;
    if exists (select from credits.entries e
                where e.account_id = _seq_at.account_id and e.entry_seq = v_middle and e.created_at <= _seq_at.at) then
      v_after := v_middle;
    else
      v_beyond := v_middle;
    end if;
  end loop;
  return v_after;
end $$;

-- The row as it is now, for whoever holds its lock.
create or replace function credits._balance(account_id text)
returns credits.balances
language plpgsql
stable
as $$
declare
  v_balance credits.balances;
begin
  select b.* into v_balance from credits.balances b where b.account_id = _balance.account_id;
  return v_balance;
end $$;
