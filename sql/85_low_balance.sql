-- Low balances and ending credits, told in time. The threshold stands in the row that every verb locks, so the usual spend
-- only compares: one that would cross it goes the general way, which tells.
-- Counted is what the account owns, balance - debt, without what is scoped to capabilities. Credits on hold count until they
-- are used: else each piece of work near the threshold would cross it twice.

insert into credits.settings as s (name, value, summary) values
  ('low_balance_threshold', 'null',
   'Below how many credits accounts that are opened from now on are low; null is never. set_low_balance_alert changes one.'),
  ('expiring_soon_days', '7', 'How many days before their end customers hear of credits that expire.')
on conflict (name) do update set summary = excluded.summary;

create or replace function credits.set_low_balance_alert(
  account_id text,
  threshold  numeric default null
)
returns credits.low_balance_result
language plpgsql
security definer
set search_path = pg_catalog, pg_temp
as $$
declare
  v_threshold numeric;
  v_balance   credits.balances;
begin
  if set_low_balance_alert.threshold is not null then
    v_threshold := credits._check_amount(set_low_balance_alert.threshold, zero => true);
  end if;
  v_balance := credits._lock_account(set_low_balance_alert.account_id);
  update credits.balances b
     set low_at = v_threshold, is_low = coalesce(credits._owned(v_balance) < v_threshold, false)
   where b.account_id = v_balance.account_id
  returning b.* into v_balance;
  return row(v_balance.account_id, v_balance.low_at, v_balance.is_low)::credits.low_balance_result;
end $$;
comment on function credits.set_low_balance_alert(text, numeric) is
'Sets below how many credits an account is low, and told so as low_balance; null is never.

Told once when the balance falls below, by whatever made it fall, and again only after it was at the threshold or above. This
call tells nothing: is_low answers whether the account is below already. What counts is balance - debt, without scoped
credits; credits on hold count until they are used. Accounts get the setting low_balance_threshold when they are opened.
Errors: 400 invalid_request, 404 account_not_found, 422 invalid_amount.';

create or replace function credits.warn_expiring_credits(max_rows integer default 1000)
returns integer
language plpgsql
security definer
set search_path = pg_catalog, pg_temp
as $$
declare
  v_now   timestamptz := credits.now();
  v_until timestamptz := v_now + credits._setting('expiring_soon_days')::integer * interval '1 day';
  v_lots  record;
  v_lot   credits.grants;
  v_count integer := 0;
begin
  perform credits._check_rows(warn_expiring_credits.max_rows, 'max_rows');
  select array_agg(e.account_id) as account_ids, array_agg(e.grant_id) as grant_ids into v_lots
    from credits._ending(v_now, v_until, warn_expiring_credits.max_rows) e;
  perform
    from credits.balances b
   where b.account_id = any (v_lots.account_ids)
   order by b.account_id collate "C"
     for no key update;
  for v_lot in
    update credits.grants g
       set end_told = true
     where g.account_id = any (v_lots.account_ids) and g.grant_id = any (v_lots.grant_ids)
       and g.status = 'active' and g.remaining > 0 and not g.end_told
    returning g.*
  loop
    perform credits._notify(v_lot.account_id, 'credits_expiring', v_lot.grant_id::text, jsonb_build_object(
      'grant_id', v_lot.grant_id, 'kind', v_lot.kind, 'amount', trim_scale(v_lot.remaining), 'expires_at', v_lot.expires_at,
      'description', v_lot.description));
    v_count := v_count + 1;
  end loop;
  return v_count;
end $$;
comment on function credits.warn_expiring_credits(integer) is
'Tells of grants that end within expiring_soon_days and have something left, each once; answers how many.

A job calls it until it answers 0. Not of plan credits, which end and begin with every month.
Errors: 400 invalid_request.';

-- Helpers ------------------------------------------------------------------------------------------------------------

-- Whether using an amount would cross the threshold. For the usual case, where nothing is owed and nothing has a scope.
create or replace function credits._would_be_low(
  balance credits.balances,
  amount  numeric
)
returns boolean
language sql
as $$
  select (_would_be_low.balance).balance - _would_be_low.amount < (_would_be_low.balance).low_at
         and not (_would_be_low.balance).is_low
$$;

-- Compares and tells, after anything that moved the credits of an account that has a threshold. The caller holds its lock.
-- Only entries move what is compared, so the number of the last one names the fall.
create or replace function credits._watch_balance(account_id text)
returns credits.balances
language plpgsql
as $$
declare
  v_balance credits.balances := credits._balance(_watch_balance.account_id);
  v_owned   numeric := credits._owned(v_balance);
begin
  if v_balance.is_low is not distinct from v_owned < v_balance.low_at or v_balance.low_at is null then
    return v_balance;
  end if;
  update credits.balances b
     set is_low = not v_balance.is_low
   where b.account_id = v_balance.account_id
  returning b.* into v_balance;
  if v_balance.is_low then
    perform credits._notify(v_balance.account_id, 'low_balance', concat_ws(':', v_balance.account_id, v_balance.entry_seq),
      jsonb_build_object('balance', trim_scale(v_owned), 'threshold', trim_scale(v_balance.low_at)));
  end if;
  return v_balance;
end $$;

create or replace function credits._owned(balance credits.balances)
returns numeric
language plpgsql
stable
as $$
begin
  if not (_owned.balance).has_scoped then
    return (_owned.balance).balance - (_owned.balance).debt;
  end if;
  return coalesce((select sum(g.remaining + g.held)
                     from credits.grants g
                    where g.account_id = (_owned.balance).account_id and g.scope is null
                      and (g.status = 'active' or g.held > 0)), 0) - (_owned.balance).debt;
end $$;

-- The first grants that end within a time and have not been told of.
create or replace function credits._ending(
  after    timestamptz,
  until    timestamptz,
  max_rows integer
)
returns setof credits.grants
language sql
stable
as $$
  select g.*
    from credits.grants g
   where g.status = 'active' and not g.end_told and g.kind <> 'plan' and g.remaining > 0
     and g.expires_at > _ending.after and g.expires_at <= _ending.until
   order by g.expires_at, g.account_id, g.grant_id
   limit _ending.max_rows
$$;
