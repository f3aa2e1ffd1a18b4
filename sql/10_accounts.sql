-- Accounts: open, freeze, lock.
-- Lock order: the balances row, then grants in consumption order, then the rest of the account.

create or replace function credits.open_account(
  account_id text,
  kind       text  default null,
  plan       text  default null,
  email      text  default null,
  metadata   jsonb default null
)
returns credits.account_result
language plpgsql
security definer
set search_path = pg_catalog, pg_temp
as $$
declare
  v_print   jsonb := credits._fingerprint(jsonb_build_object(
                       'kind', open_account.kind, 'plan', open_account.plan, 'email', open_account.email),
                       open_account.metadata);
  v_now     timestamptz := credits.now();
  v_low_at  numeric := (credits._setting('low_balance_threshold') #>> '{}')::numeric;
  v_account credits.accounts;
begin
  perform credits._check_key(open_account.account_id, 'account_id', 200);
  perform credits._check_metadata(open_account.metadata);
  perform credits._check_word(open_account.kind, 'kind', '{user,organization}');
  if open_account.plan is not null
     and not exists (select from credits.plans p where p.code = open_account.plan and p.active) then
    perform credits._fail(404, 'plan_not_found', jsonb_build_object('plan', open_account.plan));
  end if;

  insert into credits.accounts as a (account_id, kind, plan, email, metadata, fingerprint, created_at)
  values (open_account.account_id, coalesce(open_account.kind, 'user'), open_account.plan, open_account.email,
          coalesce(open_account.metadata, '{}'), '{"kind": "user"}' || v_print, v_now)
  on conflict on constraint accounts_pkey do nothing
  returning a.* into v_account;

  if not found then
    select a.* into v_account from credits.accounts a where a.account_id = open_account.account_id;
    if not v_account.fingerprint @> v_print then
      perform credits._check_same(v_account.fingerprint, v_print, 'open_account', open_account.account_id);
    end if;
    return credits._account_result(v_account, true);
  end if;

  insert into credits.balances (account_id, hash, low_at, is_low)
  values (open_account.account_id, sha256(convert_to(open_account.account_id, 'UTF8')), v_low_at, coalesce(v_low_at > 0, false));
  if open_account.plan is not null then
    perform credits._start_internal(open_account.account_id, open_account.plan, 'open_account');
    perform credits._refresh_plan(open_account.account_id);
  end if;
  perform credits._wake('account:' || open_account.account_id);
  return credits._account_result(v_account, false);
end $$;
comment on function credits.open_account(text, text, text, text, jsonb) is
'Opens an account, once, and starts its plan.

account_id is the product''s own key of a user or an organisation (1 to 200 characters), kind is user or organization.
Opening it again returns the account as it is, marked replayed, as long as the arguments that are given are those of the
first call.
Errors: 400 invalid_request, 404 plan_not_found, 409 idempotency_conflict.';

create or replace function credits.freeze_account(
  account_id text,
  reason     text default null
)
returns credits.account_result
language sql
security definer
set search_path = pg_catalog, pg_temp
as $$
  select credits._set_account_status(freeze_account.account_id, 'frozen', freeze_account.reason)
$$;
comment on function credits.freeze_account(text, text) is
'Stops an account from spending, reserving and giving credits away.

Credits may still arrive, work in flight may still be settled, and operators may still correct. Freezing twice changes
nothing. The reason is kept in the account''s settings.
Errors: 400 invalid_request, 404 account_not_found, 423 account_closed.';

create or replace function credits.unfreeze_account(account_id text)
returns credits.account_result
language sql
security definer
set search_path = pg_catalog, pg_temp
as $$
  select credits._set_account_status(unfreeze_account.account_id, 'active', null)
$$;
comment on function credits.unfreeze_account(text) is
'Lets a frozen account spend again. Unfreezing an active account changes nothing.
Errors: 400 invalid_request, 404 account_not_found, 423 account_closed.';

create or replace function credits.set_debt_limit(
  account_id text,
  debt_limit numeric
)
returns numeric
language plpgsql
security definer
set search_path = pg_catalog, pg_temp
as $$
declare
  v_limit numeric := credits._check_amount(set_debt_limit.debt_limit, zero => true);
begin
  perform credits._lock_account(set_debt_limit.account_id);
  update credits.accounts a set debt_limit = v_limit where a.account_id = set_debt_limit.account_id;
  return v_limit;
end $$;
comment on function credits.set_debt_limit(text, numeric) is
'Sets how far settle with on_overage => overflow may take an account into debt, in credits.

0 by default. Debt that is there already stays.
Errors: 400 invalid_request, 404 account_not_found, 422 invalid_amount.';

-- Helpers -----------------------------------------------------------------------------------------------------------

create or replace function credits._account_result(
  account  credits.accounts,
  replayed boolean
)
returns credits.account_result
language sql
immutable
as $$
  select row((_account_result.account).account_id, (_account_result.account).kind, (_account_result.account).status,
             (_account_result.account).plan, (_account_result.account).email, (_account_result.account).created_at,
             _account_result.replayed)::credits.account_result
$$;

create or replace function credits._account(account_id text)
returns credits.accounts
language plpgsql
stable
as $$
declare
  v_account credits.accounts;
begin
  select a.* into v_account from credits.accounts a where a.account_id = _account.account_id;
  if not found then
    perform credits._fail_account(_account.account_id);
  end if;
  return v_account;
end $$;

create or replace function credits._fail_account(account_id text)
returns void
language plpgsql
immutable
as $$
begin
  perform credits._check_key(_fail_account.account_id, 'account_id', 200);
  perform credits._fail(404, 'account_not_found', jsonb_build_object('account_id', _fail_account.account_id),
    'Open it first: credits.open_account(account_id).');
end $$;

create or replace function credits._fail_status(
  account_id text,
  status     text
)
returns void
language sql
immutable
as $$
  select credits._fail(423, 'account_' || _fail_status.status,
    jsonb_build_object('account_id', _fail_status.account_id, 'status', _fail_status.status),
    'The account may not use credits while it is ' || _fail_status.status || '.')
$$;

create or replace function credits._set_account_status(
  account_id text,
  status     text,
  reason     text
)
returns credits.account_result
language plpgsql
as $$
declare
  v_account credits.accounts;
begin
  perform credits._lock_account(_set_account_status.account_id);
  v_account := credits._account(_set_account_status.account_id);
  if v_account.status = 'closed' then
    perform credits._fail_status(_set_account_status.account_id, v_account.status);
  elsif v_account.status = _set_account_status.status then
    return credits._account_result(v_account, true);
  end if;
  update credits.accounts a
     set status   = _set_account_status.status,
         settings = case when _set_account_status.reason is null then a.settings - 'status_reason'
                         else a.settings || jsonb_build_object('status_reason', _set_account_status.reason) end
   where a.account_id = _set_account_status.account_id
  returning a.* into v_account;
  update credits.balances b set status = v_account.status where b.account_id = v_account.account_id;
  return credits._account_result(v_account, false);
end $$;

-- The lock of everything that belongs to the account. "No key update" lets foreign-key checks of others pass.
create or replace function credits._lock_account(account_id text)
returns credits.balances
language plpgsql
as $$
declare
  v_balance credits.balances;
begin
  select b.* into v_balance
    from credits.balances b
   where b.account_id = _lock_account.account_id
     for no key update;
  if not found then
    perform credits._fail_account(_lock_account.account_id);
  end if;
  if v_balance.next_due_at <= credits.now() then
    v_balance := credits._book_due(v_balance);
  end if;
  return v_balance;
end $$;

-- Several, in the order of account_id, before anything of them is booked.
create or replace function credits._lock_accounts(account_ids text[])
returns void
language plpgsql
as $$
declare
  v_balance credits.balances;
  v_now     timestamptz;
begin
  perform
    from credits.balances b
   where b.account_id = any (_lock_accounts.account_ids)
   order by b.account_id collate "C"
     for no key update;
  v_now := credits.now();
  for v_balance in
    select b.*
      from credits.balances b
     where b.account_id = any (_lock_accounts.account_ids) and b.next_due_at <= v_now
  loop
    perform credits._book_due(v_balance);
  end loop;
end $$;

-- Whether credits can move without a look at anything else, which is the usual case: nothing is due, nothing is owed, and
-- what is free is balance - held. The verbs ask while they lock the row; whatever else there is goes the general way.
create or replace function credits._is_plain(balance credits.balances)
returns boolean
language sql
as $$
  select (_is_plain.balance).next_due_at > credits.now() and (_is_plain.balance).debt = 0
         and not (_is_plain.balance).has_scoped
$$;

-- May receive credits: a frozen account may, a closed one not.
create or replace function credits._check_open(account_id text)
returns void
language plpgsql
stable
as $$
begin
  if exists (select from credits.accounts a where a.account_id = _check_open.account_id and a.status = 'closed') then
    perform credits._fail_status(_check_open.account_id, 'closed');
  end if;
end $$;
