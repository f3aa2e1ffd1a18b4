-- Grants: lots of credits come in, start and end.
-- Keeps invariant 3: amount = remaining + held + consumed + expired + revoked. Lock order: see 10_accounts.sql.

create or replace function credits.grant_credits(
  account_id   text,
  amount       numeric,
  kind         text        default 'bonus',
  expires_at   timestamptz default null,
  effective_at timestamptz default null,
  priority     integer     default null,
  description  text        default null,
  scope        text[]      default null,
  key          text        default null,
  metadata     jsonb       default null
)
returns credits.grant_result
language plpgsql
security definer
set search_path = pg_catalog, pg_temp
as $$
declare
  v_amount numeric := credits._check_amount(grant_credits.amount);
  v_print  jsonb   := credits._fingerprint(jsonb_build_object(
                        'amount', v_amount, 'kind', grant_credits.kind,
                        'expires_at', extract(epoch from grant_credits.expires_at),
                        'effective_at', extract(epoch from grant_credits.effective_at), 'priority', grant_credits.priority,
                        'description', grant_credits.description, 'scope', grant_credits.scope),
                        grant_credits.metadata);
begin
  perform credits._check_key(grant_credits.key, 'key');
  perform credits._lock_account(grant_credits.account_id);
  return credits._grant(
    account_id   => grant_credits.account_id,
    amount       => v_amount,
    kind         => coalesce(grant_credits.kind, 'bonus'),
    expires_at   => grant_credits.expires_at,
    effective_at => grant_credits.effective_at,
    priority     => grant_credits.priority,
    description  => grant_credits.description,
    scope        => grant_credits.scope,
    key          => grant_credits.key,
    fingerprint  => v_print,
    metadata     => grant_credits.metadata);
end $$;
comment on function credits.grant_credits(text, numeric, text, timestamptz, timestamptz, integer, text, text[], text, jsonb) is
'Adds a grant of credits to an account.

kind is plan, trial, promo, bonus, gift or purchase and sets the default priority (10, 15, 20, 20, 25, 30; lower is spent
first). The credits are usable in [effective_at, expires_at); effective_at defaults to now, expires_at to never. scope
limits them to some capabilities. An open debt is paid from them first. key is required.
Errors: 400 invalid_request, 404 account_not_found, 409 idempotency_conflict, 422 invalid_amount, 423 account_closed.';

create or replace function credits.adjust(
  account_id text,
  amount     numeric,
  reason     text default null,
  key        text default null
)
returns credits.entry_result
language plpgsql
security definer
set search_path = pg_catalog, pg_temp
as $$
declare
  v_amount  numeric := credits._check_amount(abs(adjust.amount)) * sign(adjust.amount);
  v_print   jsonb   := jsonb_strip_nulls(jsonb_build_object('amount', v_amount, 'reason', adjust.reason));
  v_balance credits.balances;
  v_entry   credits.entries;
  v_slices  credits.slices;
  v_grant   credits.grants;
begin
  perform credits._check_key(adjust.key, 'key');
  v_balance := credits._lock_account(adjust.account_id);
  v_entry   := credits._first_entry(adjust.account_id, 'adjust', adjust.key, v_print);
  if v_entry.entry_seq is not null then
    return credits._entry_result(v_entry, true);
  end if;

  if v_amount > 0 then
    v_grant  := credits._insert_grant(adjust.account_id, v_amount, 'bonus', credits.now(),
                                      description => adjust.reason, source => 'adjust');
    v_slices := credits._slice(v_grant.grant_id, v_amount);
  else
    v_slices := credits._take(adjust.account_id, -v_amount);
    if v_slices.taken < -v_amount or v_balance.debt > 0 then
      perform credits._fail_short(-v_amount, v_slices.taken, v_balance.debt);
    end if;
  end if;
  v_entry.account_id  := adjust.account_id;
  v_entry.kind        := 'adjust';
  v_entry.operation   := 'adjust';
  v_entry.key         := adjust.key;
  v_entry.fingerprint := v_print;
  v_entry.amount      := v_amount;
  v_entry.description := adjust.reason;
  v_entry := credits._post(v_balance, v_entry, v_slices);
  perform credits._tidy(v_entry.account_id);
  return credits._entry_result(v_entry, false);
end $$;
comment on function credits.adjust(text, numeric, text, text) is
'Corrects a balance by a signed amount, in an operator''s name.

A positive amount becomes a grant of kind bonus without expiry; a negative one is taken in the order of consumption and
never goes below what is available. key is required.
Errors: 400 invalid_request, 402 insufficient_credits, 404 account_not_found, 409 idempotency_conflict, 422 invalid_amount.';

-- Helpers -------------------------------------------------------------------------------------------------------------

create or replace function credits._default_priority(kind text)
returns integer
language sql
immutable
as $$
  select case kind when 'plan' then 10 when 'trial' then 15 when 'promo' then 20 when 'bonus' then 20
                   when 'gift' then 25 when 'purchase' then 30 end
$$;

create or replace function credits._check_grant(
  kind         text,
  effective_at timestamptz,
  expires_at   timestamptz,
  scope        text[]
)
returns void
language plpgsql
immutable
as $$
declare
  v_wrong text := case
    when credits._default_priority(_check_grant.kind) is null then 'kind'
    when not credits._is_moment(_check_grant.effective_at) then 'effective_at'
    when not credits._is_moment(_check_grant.expires_at) or _check_grant.expires_at <= _check_grant.effective_at then 'expires_at'
    when array_ndims(_check_grant.scope) > 1 or cardinality(_check_grant.scope) = 0
         or array_position(_check_grant.scope, null) is not null then 'scope' end;
begin
  if v_wrong is not null then
    perform credits._fail(400, 'invalid_request', jsonb_build_object('argument', v_wrong),
      'kind is plan, trial, promo, bonus, gift or purchase; expires_at is later than now and than effective_at, and neither is '
      'beyond the year 9999 (leave expires_at out for never); scope names capabilities.');
  end if;
end $$;

-- The one way in: public grants, plans, purchases. Replays by the grant's own key, since a grant that starts later has
-- no entry yet. The caller holds the lock of the account. as_of, a moment in the books, lets in what has ended since:
-- it comes and expires.
create or replace function credits._grant(
  account_id    text,
  amount        numeric,
  kind          text,
  expires_at    timestamptz default null,
  effective_at  timestamptz default null,
  priority      integer     default null,
  description   text        default null,
  scope         text[]      default null,
  source        text        default null,
  cost          bigint      default null,
  cost_currency text        default null,
  key           text        default null,
  fingerprint   jsonb       default null,
  metadata      jsonb       default null,
  as_of         timestamptz default null
)
returns credits.grant_result
language plpgsql
as $$
declare
  v_now   timestamptz := credits.now();
  v_grant credits.grants;
begin
  select g.* into v_grant from credits.grants g where g.account_id = _grant.account_id and g.key = _grant.key;
  if found then
    perform credits._check_same(v_grant.fingerprint, _grant.fingerprint, 'grant_credits', _grant.key);
    return credits._grant_result(v_grant, true);
  end if;

  perform credits._check_metadata(_grant.metadata);
  perform credits._check_grant(_grant.kind, coalesce(_grant.effective_at, v_now), _grant.expires_at, _grant.scope);
  if _grant.expires_at <= v_now and _grant.as_of is null then
    perform credits._fail(400, 'invalid_request', jsonb_build_object('argument', 'expires_at'),
      'A grant cannot have ended before it is made.');
  end if;
  perform credits._check_open(_grant.account_id);

  v_grant := credits._insert_grant(_grant.account_id, _grant.amount, _grant.kind,
    coalesce(_grant.effective_at, v_now), _grant.expires_at, _grant.priority, _grant.description, _grant.scope,
    _grant.source, _grant.cost, _grant.cost_currency, _grant.key, _grant.fingerprint, _grant.metadata, _grant.as_of);
  if v_grant.status = 'active' then
    perform credits._start_grant(credits._balance(_grant.account_id), v_grant.grant_id, coalesce(_grant.as_of, v_now));
  end if;
  return credits._grant_result(v_grant, false);
end $$;

create or replace function credits._insert_grant(
  account_id    text,
  amount        numeric,
  kind          text,
  effective_at  timestamptz,
  expires_at    timestamptz default null,
  priority      integer     default null,
  description   text        default null,
  scope         text[]      default null,
  source        text        default null,
  cost          bigint      default null,
  cost_currency text        default null,
  key           text        default null,
  fingerprint   jsonb       default null,
  metadata      jsonb       default null,
  as_of         timestamptz default null
)
returns credits.grants
language plpgsql
as $$
declare
  v_now   timestamptz := credits.now();
  v_grant credits.grants;
begin
  insert into credits.grants as g (account_id, kind, status, priority, amount, remaining, effective_at, expires_at,
    created_at, scope, source, cost, cost_currency, description, key, fingerprint, metadata)
  values (_insert_grant.account_id, _insert_grant.kind,
    case when _insert_grant.effective_at <= coalesce(_insert_grant.as_of, v_now) then 'active' else 'pending' end,
    coalesce(_insert_grant.priority, credits._default_priority(_insert_grant.kind)),
    _insert_grant.amount, _insert_grant.amount, _insert_grant.effective_at, _insert_grant.expires_at, v_now,
    _insert_grant.scope, _insert_grant.source, _insert_grant.cost, _insert_grant.cost_currency,
    _insert_grant.description, _insert_grant.key, _insert_grant.fingerprint, coalesce(_insert_grant.metadata, '{}'))
  returning g.* into v_grant;

  -- One that starts later has no entry, and is written all the same: who began with an older snapshot (repeatable read) is
  -- not to work out without it what falls due next.
  update credits.balances b
     set next_due_at = least(b.next_due_at, v_grant.expires_at,
                             case v_grant.status when 'pending' then v_grant.effective_at end),
         has_scoped  = b.has_scoped or v_grant.scope is not null
   where b.account_id = v_grant.account_id
     and (b.next_due_at > v_grant.expires_at or v_grant.scope is not null or v_grant.status = 'pending');
  return v_grant;
end $$;

-- A grant that was to start later had no entry when it was made, and its replay says so too.
create or replace function credits._grant_result(
  lot      credits.grants,
  replayed boolean
)
returns credits.grant_result
language plpgsql
stable
as $$
declare
  v_lot   credits.grants := _grant_result.lot;
  v_entry credits.entries;
begin
  select e.* into v_entry
    from credits.entries e
   where e.account_id = v_lot.account_id and e.operation = 'grant' and e.key = v_lot.key
     and v_lot.effective_at <= v_lot.created_at;
  return row(v_lot.grant_id, v_lot.account_id, v_lot.kind, v_lot.amount, v_lot.priority, v_lot.effective_at,
             v_lot.expires_at, v_entry.entry_seq, v_entry.balance_after, v_entry.available_after,
             _grant_result.replayed)::credits.grant_result;
end $$;
