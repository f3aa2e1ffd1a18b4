-- Opening balances: what accounts had in the system before. Rows are booked together, one statement per table; those of
-- accounts with debt or scoped credits go one by one. Each row is a grant with a key of its own, so all may be brought again.
-- Keeps what grant_credits() keeps. Lock order: all accounts by account_id first.

create or replace function credits.import_opening_balances(
  balances jsonb,
  dry_run  boolean default false
)
returns setof credits.import_result
language plpgsql
security definer
set search_path = pg_catalog, pg_temp
as $$
declare
  v_results credits.import_result[];
begin
  if (case jsonb_typeof(import_opening_balances.balances) when 'array'
           then jsonb_array_length(import_opening_balances.balances) <= 10000 end) is not true then
    perform credits._fail(400, 'invalid_request', jsonb_build_object('argument', 'balances'),
      'balances is a JSON array of at most 10000 objects.');
  end if;
  begin
    v_results := array(select i from credits._import_rows(credits._read_import(import_opening_balances.balances)) i);
    if import_opening_balances.dry_run then
      raise exception using errcode = 'CRDRY';
    end if;
  exception when sqlstate 'CRDRY' then
    null;  -- what was done is undone, what was found out is not
  end;
  return query select r.* from unnest(v_results) r order by r.position;
end $$;
comment on function credits.import_opening_balances(jsonb, boolean) is
'Brings balances in from another system: one grant per row, one result per row, in their order.

balances is an array of at most 10,000 objects with key (the row''s id in the old system, once per account), account_id, amount,
and if wanted kind (bonus; or plan, trial, promo, gift, purchase), expires_at, cost and cost_currency (what was paid, in the
minor unit), description. An account that is not there is opened, with email, account_kind (user, organization) and plan of its
first row. A row that is refused does not stop the others: its status, code, detail and hint say why; 200 is booked. Rows that
were brought before are replayed. dry_run answers the same and changes nothing.
Errors: 400 invalid_request, for the whole call.';

-- Helpers -----------------------------------------------------------------------------------------------------------

create or replace function credits._import_rows(input credits.import_row[])
returns setof credits.import_result
language plpgsql
as $$
declare
  v_rows credits.import_row[];
  v_at   timestamptz;
begin
  perform credits._open_imported(_import_rows.input);
  perform credits._lock_accounts(array(select distinct r.account_id from unnest(_import_rows.input) r where r.problem is null));
  v_at   := credits.now();
  v_rows := credits._mark_import(_import_rows.input, v_at);
  perform credits._book_import(v_rows, v_at);
  perform credits._grant(r.account_id, r.amount, r.kind, r.expires_at, description => r.description, source => 'import',
                         cost => r.cost, cost_currency => r.cost_currency, key => 'import:' || r.key,
                         fingerprint => r.fingerprint)
     from unnest(v_rows) r
    where r.state = 'alone';
  perform credits._watch_balance(b.account_id)
     from (select distinct r.account_id from unnest(v_rows) r where r.state = 'fresh') r
     join credits.balances b on b.account_id = r.account_id
    where b.low_at is not null;
  return query
    select r.position, r.account_id, r.key, x.status, x.code,
           case x.status when 400 then jsonb_build_object('argument', r.argument)
                         when 409 then jsonb_build_object('key', r.key, 'first', g.fingerprint, 'now', r.fingerprint) end,
           case x.status when 400 then r.problem when 409 then 'This key was brought in before with other values.'
                         when 423 then 'A closed account receives nothing.' end,
           case x.status when 200 then g.grant_id end, case x.status when 200 then b.balance::numeric end,
           case x.status when 200 then r.state = 'known' end
      from unnest(v_rows) r
      left join credits.grants g on g.account_id = r.account_id and g.key = 'import:' || r.key
      left join credits.balances b on b.account_id = r.account_id,
           lateral (select case when r.state = 'wrong'                     then 400
                                when r.state = 'closed'                    then 423
                                when g.fingerprint is distinct from r.fingerprint then 409 else 200 end as status) s,
           lateral (select s.status, case s.status when 400 then 'invalid_request' when 409 then 'idempotency_conflict'
                                                   when 423 then 'account_closed' end as code) x;
end $$;

-- Accounts that are not there, as open_account() would open them with what their first row says.
create or replace function credits._open_imported(input credits.import_row[])
returns void
language plpgsql
as $$
declare
  v_now    timestamptz := credits.now();
  v_low_at numeric := (credits._setting('low_balance_threshold') #>> '{}')::numeric;
  v_opened text[];
begin
  perform credits.open_account(n.account_id, n.account_kind, n.plan, n.email)
     from credits._not_open(_open_imported.input) n
    where n.plan is not null;
  with opened as (
    insert into credits.accounts as a (account_id, kind, email, fingerprint, created_at)
    select n.account_id, coalesce(n.account_kind, 'user'), n.email,
           '{"kind": "user"}' || credits._fingerprint(jsonb_build_object('kind', n.account_kind, 'email', n.email), null), v_now
      from credits._not_open(_open_imported.input) n
    on conflict on constraint accounts_pkey do nothing
    returning a.account_id
  )
  select array_agg(o.account_id) into v_opened from opened o;
  insert into credits.balances (account_id, hash, low_at, is_low)
  select o.account_id, sha256(convert_to(o.account_id, 'UTF8')), v_low_at, coalesce(v_low_at > 0, false)
    from unnest(v_opened) o (account_id);
  perform credits._wake('account:' || o.account_id) from unnest(v_opened) o (account_id);
end $$;

create or replace function credits._not_open(input credits.import_row[])
returns setof credits.import_row
language plpgsql
stable
as $$
begin
  return query
    select distinct on (r.account_id collate "C") r.*
      from unnest(_not_open.input) r
     where r.problem is null and not exists (select from credits.accounts a where a.account_id = r.account_id)
     order by r.account_id collate "C", r.position;
end $$;

-- wrong and closed are refused, and what ended while the locks were waited for; known was brought in before, or earlier in this
-- call, whatever its end or its plan is by now; alone is an account with debt or scoped credits, which a grant has to look at;
-- all others are fresh.
drop function if exists credits._mark_import(credits.import_row[]);
create or replace function credits._mark_import(
  input credits.import_row[],
  at    timestamptz
)
returns credits.import_row[]
language plpgsql
stable
as $$
begin
  return array(
    select row(r.position, r.account_id, r.key, r.amount, r.kind, r.expires_at, r.cost, r.cost_currency, r.description, r.email,
               r.account_kind, r.plan, r.fingerprint, l.argument, coalesce(r.problem, credits._import_hint(l.argument)),
               case when l.argument is not null                           then 'wrong'
                    when g.grant_id is not null                           then 'known'
                    when b.status = 'closed'                              then 'closed'
                    when row_number() over (partition by r.account_id, r.key, l.argument is null
                                            order by r.position) > 1      then 'known'
                    when b.debt > 0 or b.has_scoped                       then 'alone'
                    else                                                       'fresh' end)::credits.import_row
      from unnest(_mark_import.input) r
      left join credits.grants g on g.account_id = r.account_id and g.key = 'import:' || r.key
      left join credits.balances b on b.account_id = r.account_id,
           lateral (select r.expires_at <= _mark_import.at and credits._is_moment(r.expires_at) as ended) t,
           lateral (select case when g.grant_id is not null and (r.argument = 'plan' or r.argument = 'expires_at' and t.ended)
                                then null
                                else coalesce(r.argument, case when t.ended and g.grant_id is null then 'expires_at' end)
                           end as argument) l
     order by r.position);
end $$;

create or replace function credits._book_import(
  input credits.import_row[],
  at    timestamptz
)
returns void
language sql
as $$
  with fresh as materialized (
    select r.*, nextval('credits.grants_grant_id_seq') as grant_id  -- now: to join them again would compare all with all
      from unnest(_book_import.input) r
     where r.state = 'fresh'
  ), made as (
    insert into credits.grants (grant_id, account_id, kind, status, priority, amount, remaining, effective_at, expires_at,
      created_at, source, cost, cost_currency, description, key, fingerprint)
    overriding system value
    select f.grant_id, f.account_id, f.kind, 'active', credits._default_priority(f.kind), f.amount, f.amount, _book_import.at,
           f.expires_at, _book_import.at, 'import', f.cost, f.cost_currency, f.description, 'import:' || f.key, f.fingerprint
      from fresh f
  ), drafts as (
    select b.hash as head, f.expires_at, lead(f.position) over by_account is null as is_last, row(
             b.entry_seq + row_number() over by_account, _book_import.at, f.account_id, 'grant', 'grant', 'import:' || f.key,
             f.amount, 0, trim_scale(b.balance + sum(f.amount) over by_account),
             trim_scale(b.balance - b.held + sum(f.amount) over by_account), array[f.grant_id], array[f.amount],
             null, null, null, null, null, null, f.description, f.fingerprint, '{}')::credits.entries as entry
      from fresh f
      join credits.balances b on b.account_id = f.account_id
    window by_account as (partition by f.account_id order by f.position)
  ), chained as (
    select d.*, credits._hash_chain(d.head, credits._entry_text(d.entry)) over by_number as hash,
           min(d.expires_at) over (partition by (d.entry).account_id) as first_expiry
      from drafts d
    window by_number as (partition by (d.entry).account_id order by (d.entry).entry_seq)
  ), booked as (
    insert into credits.entries (entry_seq, created_at, account_id, kind, operation, key, amount, debt, balance_after,
      available_after, grant_ids, grant_amounts, hash, description, fingerprint)
    select (c.entry).entry_seq, (c.entry).created_at, (c.entry).account_id, (c.entry).kind, (c.entry).operation, (c.entry).key,
           (c.entry).amount, (c.entry).debt, (c.entry).balance_after, (c.entry).available_after, (c.entry).grant_ids,
           (c.entry).grant_amounts, c.hash, (c.entry).description, (c.entry).fingerprint
      from chained c
  )
  update credits.balances b
     set balance = (c.entry).balance_after, entry_seq = (c.entry).entry_seq, hash = c.hash,
         next_due_at = least(b.next_due_at, c.first_expiry)
    from chained c
   where b.account_id = (c.entry).account_id and c.is_last
$$;
