-- The verbs as far as the bearer of a token may call them: for an account of his own. Each begins with _my_account().
-- Keeps: whoever is not linked to an account learns nothing of it, not even that it exists.
-- They run as the owner and are granted to credits_user, who has no right on the schema and reaches them by credits_api alone.

-- What I have -----------------------------------------------------------------------------------------------------------

create or replace function credits._my_balance(account_id text)
returns credits.balance_result
language plpgsql
stable
security definer
set search_path = pg_catalog, pg_temp
as $$
begin
  return credits.get_balance(credits._my_account(_my_balance.account_id));
end $$;

create or replace function credits._my_grants(account_id text)
returns setof credits.free_credits
language plpgsql
stable
security definer
set search_path = pg_catalog, pg_temp
as $$
declare
  v_account_id text := credits._my_account(_my_grants.account_id);
begin
  return query
    select g.account_id, g.grant_id, g.kind::text, trim_scale(g.amount), trim_scale(l.remaining), trim_scale(l.held),
           g.effective_at, g.expires_at, g.scope, g.description, g.created_at
      from credits._lots_at(credits._balance(v_account_id), credits.now()) l
      join credits.grants g on g.account_id = v_account_id and g.grant_id = l.grant_id
     where l.remaining > 0 or l.held > 0;
end $$;

create or replace function credits._my_history(
  before_seq bigint,
  max_rows   integer,
  kinds      text[],
  account_id text
)
returns setof credits.history_result
language plpgsql
stable
security definer
set search_path = pg_catalog, pg_temp
as $$
begin
  return query
    select h.*
      from credits.history(credits._my_account(_my_history.account_id), _my_history.before_seq, _my_history.max_rows,
                           _my_history.kinds) h;
end $$;

create or replace function credits._my_reservations(
  max_rows   integer,
  account_id text
)
returns setof credits.reservations
language plpgsql
stable
security definer
set search_path = pg_catalog, pg_temp
as $$
declare
  v_account_id text    := credits._my_account(_my_reservations.account_id);
  v_max_rows   integer := credits._check_rows(coalesce(_my_reservations.max_rows, 50), 'max_rows');
  v_now        timestamptz := credits.now();
begin
  return query
    select r.*
      from credits.reservations r
     where r.account_id = v_account_id and r.expires_at > v_now and r.status = 'open'
     order by r.expires_at, r.reservation_id
     limit v_max_rows;
end $$;

create or replace function credits._my_proof(account_id text)
returns credits.proof_result
language plpgsql
stable
security definer
set search_path = pg_catalog, pg_temp
as $$
begin
  return credits.prove_balance(credits._my_account(_my_proof.account_id));
end $$;

create or replace function credits._my_members(account_id text)
returns setof credits.member_result
language plpgsql
stable
security definer
set search_path = pg_catalog, pg_temp
as $$
begin
  return query select m.* from credits.list_members(credits._my_account(_my_members.account_id)) m;
end $$;

-- What I may use ----------------------------------------------------------------------------------------------------------

create or replace function credits._my_subscription(account_id text)
returns credits.subscription_state_result
language plpgsql
stable
security definer
set search_path = pg_catalog, pg_temp
as $$
begin
  return credits.get_subscription_state(credits._my_account(_my_subscription.account_id));
end $$;

create or replace function credits._my_limits(
  member_id  text,
  account_id text
)
returns setof credits.limit_result
language plpgsql
stable
security definer
set search_path = pg_catalog, pg_temp
as $$
begin
  return query select l.* from credits.get_limits(credits._my_account(_my_limits.account_id), _my_limits.member_id) l;
end $$;

create or replace function credits._my_usage(
  group_by   text,
  since      timestamptz,
  until      timestamptz,
  account_id text
)
returns setof credits.usage_summary
language plpgsql
stable
security definer
set search_path = pg_catalog, pg_temp
as $$
begin
  return query
    select u.*
      from credits.get_usage(credits._my_account(_my_usage.account_id), coalesce(_my_usage.group_by, 'day'),
                             _my_usage.since, _my_usage.until) u;
end $$;

create or replace function credits._my_quote(
  capability  text,
  units       numeric,
  quality     text,
  model       text,
  unit_counts jsonb,
  account_id  text
)
returns credits.quote_result
language plpgsql
stable
security definer
set search_path = pg_catalog, pg_temp
as $$
begin
  return credits.quote(credits._my_account(_my_quote.account_id), _my_quote.capability, _my_quote.units, _my_quote.quality,
                       _my_quote.model, _my_quote.unit_counts);
end $$;

create or replace function credits._my_access(
  capability  text,
  units       numeric,
  quality     text,
  member_id   text,
  model       text,
  unit_counts jsonb,
  account_id  text
)
returns credits.access_result
language plpgsql
stable
security definer
set search_path = pg_catalog, pg_temp
as $$
begin
  return credits.check_access(credits._my_account(_my_access.account_id), _my_access.capability, _my_access.units,
                              _my_access.quality, _my_access.member_id, _my_access.model, _my_access.unit_counts);
end $$;

-- What I can buy, and have bought -----------------------------------------------------------------------------------------

create or replace function credits._my_packages()
returns setof credits.packages
language plpgsql
stable
security definer
set search_path = pg_catalog, pg_temp
as $$
begin
  if not credits._my_token_counts() then
    perform credits._fail_token();
  end if;
  return query select p.* from credits.list_packages() p;
end $$;

create or replace function credits._my_plans()
returns setof credits.plans
language plpgsql
stable
security definer
set search_path = pg_catalog, pg_temp
as $$
begin
  if not credits._my_token_counts() then
    perform credits._fail_token();
  end if;
  return query select p.* from credits.plans p where p.active order by p.display_order, p.code;
end $$;

create or replace function credits._my_purchases(
  status     text,
  max_rows   integer,
  before     bigint,
  account_id text
)
returns setof credits.purchases
language plpgsql
stable
security definer
set search_path = pg_catalog, pg_temp
as $$
begin
  return query
    select p.*
      from credits.list_purchases(credits._my_account(_my_purchases.account_id), _my_purchases.status,
                                  _my_purchases.max_rows, _my_purchases.before) p;
end $$;

create or replace function credits._my_checkout(
  package               text,
  plan                  text,
  success_url           text,
  cancel_url            text,
  key                   text,
  quantity              integer,
  save_card             boolean,
  allow_promotion_codes boolean,
  price_id              text,
  metadata              jsonb,
  account_id            text
)
returns credits.stripe_session_result
language plpgsql
security definer
set search_path = pg_catalog, pg_temp
as $$
begin
  return credits.create_checkout(
    credits._my_account_to_buy(_my_checkout.account_id), _my_checkout.package, _my_checkout.plan, _my_checkout.success_url,
    _my_checkout.cancel_url, _my_checkout.key, _my_checkout.quantity, _my_checkout.save_card,
    _my_checkout.allow_promotion_codes, _my_checkout.price_id, _my_checkout.metadata);
end $$;

create or replace function credits._my_checkout_state(
  key        text,
  account_id text
)
returns credits.stripe_session_result
language plpgsql
stable
security definer
set search_path = pg_catalog, pg_temp
as $$
begin
  return credits.get_checkout(credits._my_account_to_buy(_my_checkout_state.account_id), _my_checkout_state.key);
end $$;

create or replace function credits._my_portal_session(
  return_url text,
  key        text,
  account_id text
)
returns credits.stripe_session_result
language plpgsql
security definer
set search_path = pg_catalog, pg_temp
as $$
begin
  return credits.create_portal_session(credits._my_account_to_buy(_my_portal_session.account_id),
                                       _my_portal_session.return_url, _my_portal_session.key);
end $$;

create or replace function credits._my_portal_state(
  key        text,
  account_id text
)
returns credits.stripe_session_result
language plpgsql
stable
security definer
set search_path = pg_catalog, pg_temp
as $$
begin
  return credits.get_portal_session(credits._my_account_to_buy(_my_portal_state.account_id), _my_portal_state.key);
end $$;
