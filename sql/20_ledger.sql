-- The ledger: the chart of accounts, the entries and their chain of hashes. Entries are written by _post(), in the
-- usual case by spend() and _charge_hold(), by _spend_together() of 25_spend_many.sql for many requests at once, by
-- _expire_together() of 13_due_together.sql for many accounts, and by _book_import() of 16_import.sql.
-- Keeps: invariants 1 to 3 and 6 (sums, numbers, identity of a lot, one use of a key). Lock order: see 10_accounts.sql.

-- The chart of accounts. Every kind touches the customer's credits or debt on one side, which gives it its sign.
with listed (kind, debit, credit, summary) as (values
  ('grant',          'issued',           'customer_credits', 'Credits came in.'),
  ('spend',          'customer_credits', 'used',             'Credits were used at once.'),
  ('capture',        'customer_credits', 'used',             'A part of a reservation was used.'),
  ('settle',         'customer_credits', 'used',             'The last part of a reservation was used.'),
  ('overdraft',      'customer_debt',    'used',             'A reservation used more than there was, on credit.'),
  ('refund',         'used',             'customer_credits', 'Used credits were given back.'),
  ('expire',         'customer_credits', 'breakage',         'Credits ran out of time.'),
  ('revoke',         'customer_credits', 'clawed_back',      'Granted credits were taken back.'),
  ('clawback',       'customer_debt',    'clawed_back',      'Granted credits were to be taken back, but were used.'),
  ('reinstate',      'clawed_back',      'customer_credits', 'Credits that had been taken back came again.'),
  ('reinstate_debt', 'customer_debt',    'clawed_back',      'Debt of a clawback was let go of.'),
  ('reinstate_paid', 'customer_debt',    'customer_credits', 'Credits that had paid a debt which is let go of came again.'),
  ('debt_paid',      'customer_credits', 'customer_debt',    'Credits paid a debt.'),
  ('transfer_out',   'customer_credits', 'transfers',        'Credits were given to another account.'),
  ('transfer_in',    'transfers',        'customer_credits', 'Credits came from another account.'),
  ('adjust',         'adjustments',      'customer_credits', 'An operator corrected the balance, up or down.')
), kept as (
  insert into credits.entry_kinds as k (kind, debit, credit, summary)
  select l.kind, l.debit, l.credit, l.summary from listed l
  on conflict (kind) do update set debit = excluded.debit, credit = excluded.credit, summary = excluded.summary
)
delete from credits.entry_kinds k where k.kind not in (select l.kind from listed l);

create or replace view credits.trial_balance as
with posted as (
  select k.debit, k.credit,
         case 'customer_credits' when k.credit then e.amount when k.debit then -e.amount else e.debt end as amount
    from credits.entries e
    join credits.entry_kinds k on k.kind = e.kind
), sides as (
  select p.debit as account, p.amount as debit, 0 as credit from posted p
  union all
  select p.credit, 0, p.amount from posted p
)
select s.account, sum(s.debit) as debit, sum(s.credit) as credit, sum(s.debit) - sum(s.credit) as balance
  from sides s
 group by s.account;
comment on view credits.trial_balance is
  'Debits and credits of each ledger account over all entries, in credits. The balances always sum to zero.';

create or replace function credits.history(
  account_id text,
  before_seq bigint  default null,
  max_rows   integer default 50,
  kinds      text[]  default null
)
returns setof credits.history_result
language plpgsql
stable
security definer
set search_path = pg_catalog, pg_temp
as $$
declare
  v_rows integer := credits._check_rows(coalesce(history.max_rows, 50), 'max_rows');
begin
  perform credits._account(history.account_id);
  return query
    select e.entry_seq, e.created_at, e.kind, e.amount, e.debt, e.balance_after, e.available_after,
           e.description, e.subject, e.member_id, e.capability, e.reservation_id, e.operation, e.key,
           (select coalesce(jsonb_agg(jsonb_build_object('grant_id', s.grant_id, 'amount', s.amount) order by s.place), '[]')
              from unnest(e.grant_ids, e.grant_amounts) with ordinality s (grant_id, amount, place)),
           e.metadata
      from credits.entries e
     where e.account_id = history.account_id
       and e.entry_seq < coalesce(history.before_seq, 9223372036854775807)
       and (history.kinds is null or e.kind = any (history.kinds))
     order by e.entry_seq desc
     limit v_rows;
end $$;
comment on function credits.history(text, bigint, integer, text[]) is
'A page of an account''s entries, the latest first.

Page on with before_seq = the last entry_seq seen. kinds limits it to some kinds of entries (see entry_kinds). max_rows is
1 to 1000, 50 by default.
Errors: 400 invalid_request, 404 account_not_found.';

-- Helpers -------------------------------------------------------------------------------------------------------------

-- The writer of entries. The caller holds the lock of the account, has moved its grants, and passes its row.
create or replace function credits._post(
  balance credits.balances,
  entry   credits.entries,
  slices  credits.slices,
  held    numeric default 0
)
returns credits.entries
language plpgsql
as $$
declare
  v_balance credits.balances := _post.balance;
  v_slices  credits.slices   := _post.slices;
  v_entry   credits.entries  := _post.entry;
begin
  v_entry.debt            := coalesce(v_entry.debt, 0);
  v_entry.entry_seq       := v_balance.entry_seq + 1;
  v_entry.created_at      := credits.now();
  v_balance.balance       := v_balance.balance + v_entry.amount;
  v_balance.held          := v_balance.held + _post.held;
  v_entry.balance_after   := trim_scale(v_balance.balance);
  v_entry.available_after := trim_scale(coalesce(v_slices.left_free, credits._free(v_balance))
                                        - v_balance.debt - v_entry.debt);
  v_entry.grant_ids       := coalesce(v_slices.grant_ids, '{}');
  v_entry.grant_amounts   := coalesce(v_slices.amounts, '{}');
  v_entry.metadata        := coalesce(v_entry.metadata, '{}');
  v_entry.hash            := credits._entry_hash(v_balance.hash, v_entry);

  insert into credits.entries values (v_entry.*);

  update credits.balances b
     set balance   = v_entry.balance_after,
         held      = v_balance.held,
         debt      = v_balance.debt + v_entry.debt,
         entry_seq = v_entry.entry_seq,
         hash      = v_entry.hash
   where b.account_id = v_entry.account_id;
  if v_balance.low_at is not null and v_entry.amount < v_entry.debt and v_entry.kind <> 'expire' then
    perform credits._watch_balance(v_entry.account_id);  -- of what expires more may be due, and come again
  end if;
  return v_entry;
end $$;

-- Credits without a scope that nothing holds. The row tells how many there are, unless some grant has a scope.
drop function if exists credits._free(text);
create or replace function credits._free(balance credits.balances)
returns numeric
language plpgsql
stable
as $$
begin
  if not (_free.balance).has_scoped then
    return (_free.balance).balance - (_free.balance).held;
  end if;
  return coalesce((select sum(g.remaining)
                     from credits.grants g
                    where g.account_id = (_free.balance).account_id and g.status = 'active' and g.scope is null), 0);
end $$;

-- What the hash covers, in a form that any language can rebuild: money, order, time, and what an entry refers to. The two
-- free texts come last, the first of them with its length, so that no two entries share a text.
-- Descriptions, subjects, members and metadata stay outside, since personal data must be erasable.
create or replace function credits._entry_text(entry credits.entries)
returns text
language sql
stable
as $$
  select concat_ws('|',
           (_entry_text.entry).entry_seq,
           extract(epoch from (_entry_text.entry).created_at),
           (_entry_text.entry).operation,
           (_entry_text.entry).kind,
           (_entry_text.entry).amount,
           (_entry_text.entry).debt,
           (_entry_text.entry).balance_after,
           (_entry_text.entry).available_after,
           (_entry_text.entry).grant_ids,
           (_entry_text.entry).grant_amounts,
           coalesce((_entry_text.entry).refunds_seq, 0),
           length(coalesce((_entry_text.entry).reservation_id, '')),
           coalesce((_entry_text.entry).reservation_id, ''),
           coalesce((_entry_text.entry).key, ''))
$$;

-- Inlined into the statement that calls it, like the text.
create or replace function credits._entry_hash(
  head  bytea,
  entry credits.entries
)
returns bytea
language sql
stable
as $$
  select sha256(_entry_hash.head || convert_to(credits._entry_text(_entry_hash.entry), 'UTF8'))
$$;

-- The entry that a key has written, if it was the same call; a row of nulls if the key is new. Where the verb uses
-- credits, a new key also needs an active account: read after the lock, so that a freeze that came first is seen.
create or replace function credits._first_entry(
  account_id  text,
  operation   text,
  key         text,
  fingerprint jsonb,
  uses        boolean default false
)
returns credits.entries
language plpgsql
stable
as $$
declare
  v_found record;
  v_entry credits.entries;
begin
  select a.status, e as entry into v_found
    from credits.accounts a
    left join credits.entries e
      on e.account_id = _first_entry.account_id and e.operation = _first_entry.operation and e.key = _first_entry.key
   where a.account_id = _first_entry.account_id;
  v_entry := v_found.entry;
  if v_entry.entry_seq is not null then
    perform credits._check_same(v_entry.fingerprint, _first_entry.fingerprint, _first_entry.operation, _first_entry.key);
  elsif _first_entry.uses and v_found.status <> 'active' then
    perform credits._fail_status(_first_entry.account_id, v_found.status);
  end if;
  return v_entry;
end $$;

create or replace function credits._entry_result(
  entry    credits.entries,
  replayed boolean
)
returns credits.entry_result
language sql
immutable
as $$
  select row((_entry_result.entry).entry_seq, (_entry_result.entry).account_id, (_entry_result.entry).amount,
             (_entry_result.entry).debt, (_entry_result.entry).balance_after, (_entry_result.entry).available_after,
             (_entry_result.entry).created_at, _entry_result.replayed)::credits.entry_result
$$;
