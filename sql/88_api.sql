-- What a browser may read: the way from its token to its accounts, the rows that it may see of these, and the views of them.
-- 89_api_calls.sql has the functions. Version 1 is frozen: new columns come last, none goes (tests/contract_v1.txt).
-- Keeps: an account of somebody else and one that does not exist look alike. A view reads as its caller, through the policies.

create or replace function credits._my_accounts()
returns setof text
language plpgsql
stable
security definer
set search_path = pg_catalog, pg_temp
as $$
begin
  return query
    select distinct i.account_id
      from credits._subjects() s
      join credits.identities i on i.issuer = s.issuer and i.kind = s.kind and i.subject = s.subject;
end $$;

-- The account that is meant: the one that is named, if it is the caller's, or the only one.
create or replace function credits._my_account(account_id text)
returns text
language plpgsql
stable
security definer
set search_path = pg_catalog, pg_temp
as $$
declare
  v_mine       text[] := array(select credits._my_accounts());
  v_account_id text   := case when _my_account.account_id = any (v_mine)                       then _my_account.account_id
                              when _my_account.account_id is null and cardinality(v_mine) = 1 then v_mine[1] end;
begin
  if v_account_id is null then
    perform credits._fail_not_mine(_my_account.account_id, cardinality(v_mine));
  end if;
  return v_account_id;
end $$;

-- The same for what costs money.
create or replace function credits._my_account_to_buy(account_id text)
returns text
language plpgsql
stable
security definer
set search_path = pg_catalog, pg_temp
as $$
declare
  v_account_id text := credits._my_account(_my_account_to_buy.account_id);
begin
  if not exists (select from credits._subjects() s
                   join credits.identities i on i.issuer = s.issuer and i.kind = s.kind and i.subject = s.subject
                  where i.account_id = v_account_id and i.may_buy) then
    perform credits._fail(403, 'forbidden', jsonb_build_object('account_id', v_account_id),
      'Your token may look at this account, but not buy for it: link_identity(..., may_buy => true) lets it.');
  end if;
  return v_account_id;
end $$;

create or replace function credits._my_token_counts()
returns boolean
language plpgsql
stable
security definer
set search_path = pg_catalog, pg_temp
as $$
begin
  return exists (select from credits._subjects());
end $$;

create or replace function credits._my_now()
returns timestamptz
language plpgsql
stable
security definer
set search_path = pg_catalog, pg_temp
as $$
begin
  return credits.now();
end $$;

create or replace function credits._fail_token()
returns void
language sql
stable
as $$
  select credits._fail(401, 'not_authenticated', null,
    'Send a token that is valid, of an issuer that is trusted here, and meant for this service.')
$$;

-- The same words, whether there is such an account or not.
create or replace function credits._fail_not_mine(
  account_id text,
  mine       integer
)
returns void
language plpgsql
stable
as $$
begin
  if not credits._my_token_counts() then
    perform credits._fail_token();
  elsif _fail_not_mine.account_id is null and _fail_not_mine.mine > 1 then
    perform credits._fail(400, 'invalid_request', jsonb_build_object('argument', 'account_id'),
      'Your token speaks for several accounts: name one in account_id. The view accounts lists them.');
  end if;
  perform credits._fail(404, 'account_not_found',
    jsonb_strip_nulls(jsonb_build_object('account_id', _fail_not_mine.account_id)),
    'None of your accounts. The backend links a user to an account with credits.link_identity().');
end $$;

-- Rows ----------------------------------------------------------------------------------------------------------------

-- The rows that the views may read. Written without TO, so that it holds for every role; the array is made once per query, so
-- that an index finds the rows. A policy that is there is left alone, since a new one would lock its table on every deploy.
do $$
declare
  v_policy record;
begin
  for v_policy in
    select p.table_name, p.condition
      from (values ('accounts',     'account_id = any (array(select credits._my_accounts()))'),
                   ('entries',      'account_id = any (array(select credits._my_accounts()))'),
                   ('reservations', 'account_id = any (array(select credits._my_accounts()))'),
                   ('purchases',    'account_id = any (array(select credits._my_accounts()))'),
                   ('packages',     'active and (select credits._my_token_counts())'),
                   ('plans',        'active and (select credits._my_token_counts())')) p (table_name, condition)
     where not exists (select from pg_catalog.pg_policy o
                        where o.polrelid = ('credits.' || p.table_name)::regclass and o.polname = 'mine')
  loop
    execute format('create policy mine on credits.%I for select using (%s)', v_policy.table_name, v_policy.condition);
  end loop;
end $$;

-- Views ---------------------------------------------------------------------------------------------------------------

-- Those over functions show the account that is asked for, not the one that is answered: then a filter by it comes before
-- the calls, and who has many accounts waits for one alone.

create or replace view credits_api.accounts with (security_invoker = on) as
  select a.account_id, a.kind, a.status, a.created_at
    from credits.accounts a;
comment on view credits_api.accounts is
  'The accounts that your token speaks for. With one of them, calls need no account_id.';

create or replace view credits_api.balances with (security_invoker = on) as
  select a.account_id, b.available, b.held, b.balance, b.debt, b.status, b.plan, b.next_expiry_at, b.next_expiry_amount,
         b.by_kind, b.scoped, b.pending, b.entry_seq
    from credits._my_accounts() a (account_id)
   cross join lateral credits._my_balance(a.account_id) b;
comment on view credits_api.balances is
  'The balance of each of your accounts at this instant: available is what can be spent now.';

create or replace view credits_api.grants with (security_invoker = on) as
  select a.account_id, g.grant_id, g.kind, g.amount, g.remaining, g.held, g.effective_at, g.expires_at, g.scope,
         g.description, g.created_at
    from credits._my_accounts() a (account_id)
   cross join lateral credits._my_grants(a.account_id) g;
comment on view credits_api.grants is
  'Where your credits come from and when they end: each grant of which something is left, as it is at this instant.';

create or replace view credits_api.history with (security_invoker = on) as
  select e.account_id, e.entry_seq, e.created_at, e.kind, e.amount, e.debt, e.balance_after, e.available_after, e.description,
         e.subject, e.member_id, e.capability, e.reservation_id
    from credits.entries e;
comment on view credits_api.history is
  'Every movement of your credits. Numbered by entry_seq within the account; amount is signed.';

create or replace view credits_api.reservations with (security_invoker = on) as
  select r.account_id, r.reservation_id,
         case when r.status = 'open' and r.expires_at <= (select credits._my_now()) then 'expired'
              else r.status::text end as status,
         r.amount::numeric as amount, r.captured::numeric as captured, r.charged::numeric as charged, r.created_at,
         r.expires_at, r.closed_at, r.subject, r.member_id, r.capability, r.description
    from credits.reservations r;
comment on view credits_api.reservations is
  'Credits held for work in flight, and what became of earlier holds: status open, settled, released or expired.';

create or replace view credits_api.purchases with (security_invoker = on) as
  select p.account_id, p.purchase_id, p.status, p.package, p.quantity, p.credits, p.amount, p.currency, p.amount_subtotal,
         p.amount_discount, p.amount_tax, p.amount_refunded, p.created_at, p.completed_at
    from credits.purchases p;
comment on view credits_api.purchases is
  'Packages bought, from pending to what became of them. Amounts are in the minor unit of currency.';

create or replace view credits_api.subscriptions with (security_invoker = on) as
  select a.account_id, s.state, s.status, s.plan, s.may_spend, s.may_receive, s.source, s.subscription_id, s.period_start,
         s.period_end, s.trial_end, s.cancel_at, s.pending_plan, s.pending_at, s.grace_until, s.as_of, s.stale
    from credits._my_accounts() a (account_id)
   cross join lateral credits._my_subscription(a.account_id) s;
comment on view credits_api.subscriptions is
  'The subscription of each of your accounts as it stands now; state none is no subscription.';

create or replace view credits_api.members with (security_invoker = on) as
  select a.account_id, m.member_id, m.role, m.monthly_limit, m.used, m.created_at
    from credits._my_accounts() a (account_id)
   cross join lateral credits._my_members(a.account_id) m;
comment on view credits_api.members is
  'Who shares the credits of your accounts, and what each has used this month.';

create or replace view credits_api.packages with (security_invoker = on) as
  select p.code, p.name, p.description, p.credits, p.price, p.currency, p.discount_percent, p.popular, p.display_order
    from credits.packages p;
comment on view credits_api.packages is
  'The packages on sale. price is in the minor unit of currency: 1000 is $10.00.';

create or replace view credits_api.plans with (security_invoker = on) as
  select p.code, p.name, p.description, p.monthly_credits, p.trial_credits, p.rollover, p.rollover_cap, p.seats,
         p.display_order, p.stripe_price_ids
    from credits.plans p;
comment on view credits_api.plans is
  'The plans that there are, with the credits that each gives a month.';
