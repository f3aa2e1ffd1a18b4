-- Accounts on which nothing but the end of grants is due, booked together: a statement for each table, however many they are.
-- Lock order: any, since nobody is waited for.

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
       and not exists (select from credits._turns(b.account_id) t (turns_at) where t.turns_at <= _plain_ends.at);
end $$;
