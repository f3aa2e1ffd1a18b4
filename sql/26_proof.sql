-- Proof: everything recomputed from the entries and compared with what is stored. No rows means sound.
-- The names of the findings are the invariants of the ledger; docs/concepts.md explains each.

create or replace function credits._next_hash(
  state    bytea,
  head     bytea,
  content  text
)
returns bytea
language plpgsql
stable
as $$
begin
  return sha256(coalesce(_next_hash.state, _next_hash.head) || convert_to(_next_hash.content, 'UTF8'));
end $$;

create or replace aggregate credits._hash_chain(head bytea, content text) (
  sfunc = credits._next_hash,
  stype = bytea
);

create or replace function credits.prove_balance(account_id text)
returns credits.proof_result
language plpgsql
stable
security definer
set search_path = pg_catalog, pg_temp
as $$
declare
  v_account  credits.accounts := credits._account(prove_balance.account_id);
  v_findings jsonb;
  v_result   credits.proof_result;
begin
  select coalesce(jsonb_agg(jsonb_build_object('invariant', f.invariant, 'detail', f.detail)), '[]') into v_findings
    from credits._audit_ledger(v_account.account_id) f;
  select v_account.account_id, v_findings = '[]', b.balance, b.held, b.debt, e.entries, e.amount, g.amount, r.amount,
         encode(b.hash, 'hex'), v_findings
    into v_result
    from credits.balances b,
         lateral (select count(*) as entries, coalesce(sum(n.amount), 0) as amount
                    from credits.entries n where n.account_id = b.account_id) e,
         lateral (select coalesce(sum(n.remaining + n.held), 0) as amount
                    from credits.grants n where n.account_id = b.account_id and n.status <> 'pending') g,
         lateral (select coalesce(sum(n.amount - n.captured), 0) as amount
                    from credits.reservations n where n.account_id = b.account_id and n.status = 'open') r
   where b.account_id = v_account.account_id;
  return v_result;
end $$;
comment on function credits.prove_balance(text) is
'Recomputes an account from its entries and compares it with everything that is stored.

ok is true when nothing is found: entries are numbered without a gap, their running sum is balance_after, their hashes
chain up to the head, and balance, grants and reservations agree. hash is the head of the chain: whoever keeps it can tell
later whether history was rewritten. It speaks of what is booked; get_balance adds what fell due since.
Errors: 400 invalid_request, 404 account_not_found.';

create or replace function credits.audit()
returns setof credits.audit_finding
language plpgsql
stable
security definer
set search_path = pg_catalog, pg_temp
as $$
begin
  return query select f.* from credits._audit_ledger(null) f;
  return query select f.* from credits._audit_books() f;
  return query select f.* from credits._audit_purchases() f;
  return query select f.* from credits._audit_stripe() f;
  return query select f.* from credits._audit_usages() f;
  return query select f.* from credits._audit_histories() f;
  return query select f.* from credits._audit_zones() f;
end $$;
comment on function credits.audit() is
'Checks every invariant over the whole database; no rows means sound.

Each row names an invariant, the account and what differs. Reads everything: meant for a job at night, or after a restore.';

-- Of one account, or of all.
create or replace function credits._audit_ledger(account_id text)
returns setof credits.audit_finding
language plpgsql
stable
as $$
begin
  return query
    select 'balance_is_the_sum_of_entries', b.account_id,
           jsonb_build_object('balance', b.balance, 'entries', coalesce(e.amount, 0),
                              'debt', b.debt, 'entries_debt', coalesce(e.debt, 0))
      from credits.balances b
      left join (select n.account_id, sum(n.amount) as amount, sum(n.debt) as debt
                   from credits.entries n
                  where _audit_ledger.account_id is null or n.account_id = _audit_ledger.account_id
                  group by n.account_id) e on e.account_id = b.account_id
     where (_audit_ledger.account_id is null or b.account_id = _audit_ledger.account_id)
       and (b.balance <> coalesce(e.amount, 0) or b.debt <> coalesce(e.debt, 0));

  return query select f.* from credits._audit_chain(_audit_ledger.account_id) f;
  return query select f.* from credits._audit_grants(_audit_ledger.account_id) f;
  return query select f.* from credits._audit_members(_audit_ledger.account_id) f;
  return query select f.* from credits._audit_holds(_audit_ledger.account_id) f;
  return query select f.* from credits._audit_terms(_audit_ledger.account_id) f;

  return query
    select 'held_is_the_sum_of_open_reservations', b.account_id,
           jsonb_build_object('held', b.held, 'reservations', coalesce(r.amount, 0))
      from credits.balances b
      left join (select n.account_id, sum(n.amount - n.captured) as amount
                   from credits.reservations n
                  where n.status = 'open'
                    and (_audit_ledger.account_id is null or n.account_id = _audit_ledger.account_id)
                  group by n.account_id) r on r.account_id = b.account_id
     where (_audit_ledger.account_id is null or b.account_id = _audit_ledger.account_id)
       and b.held <> coalesce(r.amount, 0);

  return query
    select 'balance_knows_its_account', b.account_id,
           jsonb_build_object('status', b.status, 'account_status', a.status, 'has_scoped', b.has_scoped, 'plan', b.plan,
                              'account_plan', a.plan)
      from credits.balances b
      join credits.accounts a on a.account_id = b.account_id
     where (_audit_ledger.account_id is null or b.account_id = _audit_ledger.account_id)
       and (b.status <> a.status
            or b.plan is distinct from case when not credits._must_ask_subscription(b.account_id) then coalesce(a.plan, '') end
            or not b.has_scoped and exists (select from credits.grants g
                                             where g.account_id = b.account_id and g.scope is not null));

  return query
    select 'nothing_falls_due_unseen', b.account_id, jsonb_build_object('next_due_at', b.next_due_at, 'due_at', min(d.due_at))
      from credits.balances b
      join (select g.account_id, credits._due_at(g) as due_at
              from credits.grants g
             where g.status = 'pending' or (g.status = 'active' and g.remaining > 0)
            union all
            select r.account_id, r.expires_at from credits.reservations r where r.status = 'open') d
        on d.account_id = b.account_id
     where (_audit_ledger.account_id is null or b.account_id = _audit_ledger.account_id)
     group by b.account_id
    having b.next_due_at > min(d.due_at);
end $$;

-- Numbers without a gap, running sums, and the hash chain up to the head.
create or replace function credits._audit_chain(account_id text)
returns setof credits.audit_finding
language plpgsql
stable
as $$
begin
  return query
    with entries as (
      select e.account_id, e.entry_seq, e.balance_after, e.hash,
             row_number() over by_number as number,
             sum(e.amount) over by_number as balance,
             credits._hash_chain(sha256(convert_to(e.account_id, 'UTF8')), credits._entry_text(e)) over by_number as proof,
             lead(e.entry_seq) over by_number is null as is_last
        from credits.entries e
       where _audit_chain.account_id is null or e.account_id = _audit_chain.account_id
      window by_number as (partition by e.account_id order by e.entry_seq)
    )
    select 'entries_are_numbered_and_chained', e.account_id,
           jsonb_build_object('entry_seq', e.entry_seq, 'expected_seq', e.number, 'balance_after', e.balance_after,
                              'running_sum', e.balance, 'hash_ok', e.hash = e.proof)
      from entries e
     where e.entry_seq <> e.number or e.balance_after <> e.balance or e.hash <> e.proof
    union all
    select 'balance_holds_the_head', b.account_id,
           jsonb_build_object('entry_seq', b.entry_seq, 'last_entry', e.entry_seq)
      from credits.balances b
      left join entries e on e.account_id = b.account_id and e.is_last
     where (_audit_chain.account_id is null or b.account_id = _audit_chain.account_id)
       and (b.entry_seq <> coalesce(e.entry_seq, 0)
            or b.hash <> coalesce(e.hash, sha256(convert_to(b.account_id, 'UTF8'))));
end $$;

-- Every lot rebuilt from the slices of the entries and of the open reservations, and all lots against the balance.
create or replace function credits._audit_grants(account_id text)
returns setof credits.audit_finding
language plpgsql
stable
as $$
begin
  return query
    with moved as (
      select e.account_id, s.grant_id,
             coalesce(sum(s.amount) filter (where e.amount > 0
                                              and e.kind not in ('refund', 'reinstate', 'reinstate_paid')), 0) as came,
             coalesce(sum(s.amount) filter (where e.amount < 0 and e.kind not in ('expire', 'revoke')), 0)
               - coalesce(sum(s.amount) filter (where e.kind in ('refund', 'reinstate_paid')), 0)   as consumed,
             coalesce(sum(s.amount) filter (where e.kind = 'expire'), 0)                           as expired,
             coalesce(sum(s.amount) filter (where e.kind = 'revoke'), 0)
               - coalesce(sum(s.amount) filter (where e.kind = 'reinstate'), 0)                     as revoked,
             coalesce(sum(s.amount) filter (where e.kind = 'clawback'), 0)
               - coalesce(sum(s.amount) filter (where e.kind = 'reinstate_debt'), 0) as owed
        from credits.entries e, unnest(e.grant_ids, e.grant_amounts) s (grant_id, amount)
       where _audit_grants.account_id is null or e.account_id = _audit_grants.account_id
       group by e.account_id, s.grant_id
    ), pinned as (
      select r.account_id, s.grant_id, sum(s.amount) as held
        from credits.reservations r, unnest(r.grant_ids, r.grant_amounts) s (grant_id, amount)
       where r.status = 'open' and (_audit_grants.account_id is null or r.account_id = _audit_grants.account_id)
       group by r.account_id, s.grant_id
    )
    select 'grant_is_what_its_entries_say', g.account_id,
           jsonb_build_object('grant_id', g.grant_id, 'status', g.status, 'consumed', g.consumed,
             'entries_consumed', coalesce(m.consumed, 0), 'held', g.held, 'reservations_held', coalesce(p.held, 0))
      from credits.grants g
      left join moved m on m.account_id = g.account_id and m.grant_id = g.grant_id
      left join pinned p on p.account_id = g.account_id and p.grant_id = g.grant_id
     where (_audit_grants.account_id is null or g.account_id = _audit_grants.account_id)
       and (g.amount, g.consumed, g.expired, g.revoked, g.owed, g.held)
           is distinct from (case g.status when 'pending' then g.amount else coalesce(m.came, 0) end,
             coalesce(m.consumed, 0), coalesce(m.expired, 0), coalesce(m.revoked, 0), coalesce(m.owed, 0),
             coalesce(p.held, 0));

  return query
    select 'grants_sum_to_the_balance', b.account_id,
           jsonb_build_object('balance', b.balance, 'grants', coalesce(g.amount, 0), 'held', b.held,
                              'grants_held', coalesce(g.held, 0), 'free', g.free, 'debt', b.debt)
      from credits.balances b
      left join (select n.account_id, sum(n.remaining + n.held) as amount, sum(n.held) as held,
                        sum(n.remaining) filter (where n.scope is null) as free
                   from credits.grants n
                  where n.status <> 'pending'
                    and (_audit_grants.account_id is null or n.account_id = _audit_grants.account_id)
                  group by n.account_id) g on g.account_id = b.account_id
     where (_audit_grants.account_id is null or b.account_id = _audit_grants.account_id)
       and (b.balance <> coalesce(g.amount, 0) or b.held <> coalesce(g.held, 0) or b.debt > 0 and g.free > 0);
end $$;

-- What no single account can tell.
create or replace function credits._audit_books()
returns setof credits.audit_finding
language plpgsql
stable
as $$
begin
  return query
    select 'trial_balance_is_zero', null::text, jsonb_build_object('sum', sum(t.balance))
      from credits.trial_balance t
    having sum(t.balance) <> 0;
  return query
    select 'entries_are_well_formed', e.account_id, jsonb_build_object('entry_seq', e.entry_seq, 'kind', e.kind)
      from credits.entries e
     where not exists (select from credits.entry_kinds k where k.kind = e.kind)
        or (e.amount = 0 and e.debt = 0)
        or cardinality(e.grant_ids) <> cardinality(e.grant_amounts)
        or num_nonnulls(e.key, e.fingerprint) = 1;
  return query
    select 'grants_are_well_formed', g.account_id, jsonb_build_object('grant_id', g.grant_id)
      from credits.grants g
     where g.expires_at <= g.effective_at
        or g.owed + g.revoked > g.amount
        or num_nonnulls(g.cost, g.cost_currency) = 1
        or num_nonnulls(g.key, g.fingerprint) = 1;
  return query
    select 'reservations_are_well_formed', r.account_id, jsonb_build_object('reservation_id', r.reservation_id)
      from credits.reservations r
     where r.captured > r.amount
        or (r.status = 'open') <> (r.closed_at is null)
        or (r.status = 'settled') <> (r.actual is not null)
        or r.actual is distinct from r.charged + r.uncollected
        or (r.status <> 'open' and cardinality(r.grant_ids) > 0);
  return query
    select 'entries_and_reservations_have_an_account', n.account_id, '{}'::jsonb
      from (select e.account_id from credits.entries e union select r.account_id from credits.reservations r) n
     where not exists (select from credits.balances b where b.account_id = n.account_id);
  return query
    select 'accounts_have_a_balance', a.account_id, '{}'::jsonb
      from credits.accounts a
     where not exists (select from credits.balances b where b.account_id = a.account_id);
  return query
    select 'keys_are_used_once', e.account_id, jsonb_build_object('operation', e.operation, 'key', e.key)
      from credits.entries e
     where e.key is not null
     group by e.account_id, e.operation, e.key
    having count(*) > 1;
end $$;
