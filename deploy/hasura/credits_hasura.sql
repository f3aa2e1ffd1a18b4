-- Hasura's way in: functions over the same _my_ functions as credits_api, for the caller whom Hasura names in its session.
-- Optional. Run after `pgcredits migrate`, and again after each upgrade, as the owner of the database; any client will do.
-- Keeps: the schema is for Hasura's login alone. Whoever may call these functions may claim to be anybody.
begin;

-- All of it is made anew, and the logins that had it have it again.
select set_config('credits_hasura.logins', coalesce(
  (select string_agg(distinct r.rolname, e'\n')
     from pg_namespace n, aclexplode(n.nspacl) a, pg_roles r
    where n.nspname = 'credits_hasura' and r.oid = a.grantee and r.oid <> n.nspowner), ''), true);
drop schema if exists credits_hasura cascade;
create schema credits_hasura authorization credits_owner;
comment on schema credits_hasura is 'pgcredits: what Hasura tracks. For its login alone, and for no other gateway.';
set local role credits_owner;

-- Whom a session speaks for, and the account that its call is about.
create type credits_hasura.caller as (issuer text, user_id text, org_id text, account_id text);

-- Shapes: what the functions return. Hasura wants a relation for that; no row is ever stored in one ---------------------

create table credits_hasura.balances (
  account_id text, available numeric, held numeric, balance numeric, debt numeric, status text, plan text,
  next_expiry_at timestamptz, next_expiry_amount numeric, by_kind jsonb, scoped jsonb, pending numeric, entry_seq bigint,
  issuer text, user_id text, org_id text,
  check (false) no inherit
);
comment on table credits_hasura.balances is 'What can be spent, and what the balance is made of.';

create table credits_hasura.entries (
  account_id text, entry_seq bigint, created_at timestamptz, kind text, amount numeric, debt numeric, balance_after numeric,
  available_after numeric, description text, subject text, member_id text, capability text, reservation_id text,
  issuer text, user_id text, org_id text,
  check (false) no inherit
);
comment on table credits_hasura.entries is 'Movements of credits.';

create table credits_hasura.packages (
  code text, name text, description text, credits numeric, price bigint, currency text, discount_percent numeric,
  popular boolean, display_order integer,
  issuer text, user_id text, org_id text,
  check (false) no inherit
);
comment on table credits_hasura.packages is 'What is for sale.';

create table credits_hasura.plans (
  code text, name text, description text, monthly_credits numeric, trial_credits numeric, rollover text, rollover_cap numeric,
  seats integer, display_order integer,
  issuer text, user_id text, org_id text,
  check (false) no inherit
);
comment on table credits_hasura.plans is 'The plans that there are.';

create table credits_hasura.purchases (
  account_id text, purchase_id bigint, status text, package text, quantity integer, credits numeric, amount bigint,
  currency text, amount_subtotal bigint, amount_discount bigint, amount_tax bigint, amount_refunded bigint,
  created_at timestamptz, completed_at timestamptz,
  issuer text, user_id text, org_id text,
  check (false) no inherit
);
comment on table credits_hasura.purchases is 'What was bought.';

create table credits_hasura.stripe_sessions (
  request_id bigint, state text, purchase_id bigint, session_id text, url text, expires_at timestamptz, error jsonb,
  replayed boolean,
  issuer text, user_id text, org_id text,
  check (false) no inherit
);
comment on table credits_hasura.stripe_sessions is 'A session of Stripe Checkout or of the customer portal.';

create table credits_hasura.access (
  account_id text, allowed boolean, gate text, status integer, code text, capability text, quality text, model text,
  plan text, amount numeric, available numeric, rate_id bigint, detail jsonb, limits jsonb,
  issuer text, user_id text, org_id text,
  check (false) no inherit
);
comment on table credits_hasura.access is 'Allowed, or the gate that refuses.';

create table credits_hasura.quotes (
  account_id text, capability text, quality text, model text, units numeric, unit_counts jsonb, amount numeric,
  rate_id bigint, valid_from timestamptz, explanation jsonb,
  issuer text, user_id text, org_id text,
  check (false) no inherit
);
comment on table credits_hasura.quotes is 'A price, and how it comes about.';

create table credits_hasura.limits (
  gate text, capability text, member_id text, measure text, period text, rolling boolean, maximum numeric, used numeric,
  "left" numeric, resets_at timestamptz,
  issuer text, user_id text, org_id text,
  check (false) no inherit
);
comment on table credits_hasura.limits is 'Limits, and what is left of each.';

create table credits_hasura.usage (
  name text, credits numeric, held numeric, uses bigint,
  issuer text, user_id text, org_id text,
  check (false) no inherit
);
comment on table credits_hasura.usage is 'What credits were used for.';

create table credits_hasura.subscriptions (
  account_id text, state text, status text, plan text, may_spend boolean, may_receive boolean, source text,
  subscription_id text, period_start timestamptz, period_end timestamptz, trial_end timestamptz, cancel_at timestamptz,
  pending_plan text, pending_at timestamptz, grace_until timestamptz, as_of timestamptz, stale boolean,
  issuer text, user_id text, org_id text,
  check (false) no inherit
);
comment on table credits_hasura.subscriptions is 'How a subscription stands.';

-- Functions ----------------------------------------------------------------------------------------------------------

create function credits_hasura.get_balance(
  hasura_session json,
  account_id     text default null
)
returns setof credits_hasura.balances
language plpgsql
stable
security definer
set search_path = pg_catalog, pg_temp
as $$
declare
  v_caller credits_hasura.caller;
  v_detail text;
begin
  v_caller := credits_hasura._enter_for(get_balance.hasura_session, get_balance.account_id);
  return query
    select r.account_id, r.available, r.held, r.balance, r.debt, r.status, r.plan, r.next_expiry_at, r.next_expiry_amount,
           r.by_kind, r.scoped, r.pending, r.entry_seq, v_caller.issuer, v_caller.user_id, v_caller.org_id
      from credits._my_balance(v_caller.account_id) r;
exception when others then
  get stacked diagnostics v_detail = pg_exception_detail;
  perform credits_hasura._tell(sqlstate, sqlerrm, v_detail);
  raise;
end $$;
comment on function credits_hasura.get_balance is 'credits_api.get_balance() for the caller of a session.';

create function credits_hasura.history(
  hasura_session json,
  before_seq     bigint  default null,
  max_rows       integer default 50,
  kinds          text[]  default null,
  account_id     text    default null
)
returns setof credits_hasura.entries
language plpgsql
stable
security definer
set search_path = pg_catalog, pg_temp
as $$
declare
  v_caller credits_hasura.caller;
  v_detail text;
begin
  v_caller := credits_hasura._enter_for(history.hasura_session, history.account_id);
  return query
    select v_caller.account_id, r.entry_seq, r.created_at, r.kind, r.amount, r.debt, r.balance_after, r.available_after,
           r.description, r.subject, r.member_id, r.capability, r.reservation_id, v_caller.issuer, v_caller.user_id,
           v_caller.org_id
      from credits._my_history(history.before_seq, history.max_rows, history.kinds, v_caller.account_id) r;
exception when others then
  get stacked diagnostics v_detail = pg_exception_detail;
  perform credits_hasura._tell(sqlstate, sqlerrm, v_detail);
  raise;
end $$;
comment on function credits_hasura.history is 'credits_api.history() for the caller of a session.';

create function credits_hasura.get_subscription_state(
  hasura_session json,
  account_id     text default null
)
returns setof credits_hasura.subscriptions
language plpgsql
stable
security definer
set search_path = pg_catalog, pg_temp
as $$
declare
  v_caller credits_hasura.caller;
  v_detail text;
begin
  v_caller := credits_hasura._enter_for(get_subscription_state.hasura_session, get_subscription_state.account_id);
  return query
    select r.account_id, r.state, r.status, r.plan, r.may_spend, r.may_receive, r.source, r.subscription_id, r.period_start,
           r.period_end, r.trial_end, r.cancel_at, r.pending_plan, r.pending_at, r.grace_until, r.as_of, r.stale,
           v_caller.issuer, v_caller.user_id, v_caller.org_id
      from credits._my_subscription(v_caller.account_id) r;
exception when others then
  get stacked diagnostics v_detail = pg_exception_detail;
  perform credits_hasura._tell(sqlstate, sqlerrm, v_detail);
  raise;
end $$;
comment on function credits_hasura.get_subscription_state is 'credits_api.get_subscription_state() for the caller of a session.';

create function credits_hasura.get_limits(
  hasura_session json,
  member_id      text default null,
  account_id     text default null
)
returns setof credits_hasura.limits
language plpgsql
stable
security definer
set search_path = pg_catalog, pg_temp
as $$
declare
  v_caller credits_hasura.caller;
  v_detail text;
begin
  v_caller := credits_hasura._enter_for(get_limits.hasura_session, get_limits.account_id);
  return query
    select r.gate, r.capability, r.member_id, r.measure, r.period, r.rolling, r.maximum, r.used, r."left", r.resets_at,
           v_caller.issuer, v_caller.user_id, v_caller.org_id
      from credits._my_limits(get_limits.member_id, v_caller.account_id) r;
exception when others then
  get stacked diagnostics v_detail = pg_exception_detail;
  perform credits_hasura._tell(sqlstate, sqlerrm, v_detail);
  raise;
end $$;
comment on function credits_hasura.get_limits is 'credits_api.get_limits() for the caller of a session.';

create function credits_hasura.get_usage(
  hasura_session json,
  group_by       text        default 'day',
  since          timestamptz default null,
  until          timestamptz default null,
  account_id     text        default null
)
returns setof credits_hasura.usage
language plpgsql
stable
security definer
set search_path = pg_catalog, pg_temp
as $$
declare
  v_caller credits_hasura.caller;
  v_detail text;
begin
  v_caller := credits_hasura._enter_for(get_usage.hasura_session, get_usage.account_id);
  return query
    select r.name, r.credits, r.held, r.uses, v_caller.issuer, v_caller.user_id, v_caller.org_id
      from credits._my_usage(get_usage.group_by, get_usage.since, get_usage.until, v_caller.account_id) r;
exception when others then
  get stacked diagnostics v_detail = pg_exception_detail;
  perform credits_hasura._tell(sqlstate, sqlerrm, v_detail);
  raise;
end $$;
comment on function credits_hasura.get_usage is 'credits_api.get_usage() for the caller of a session.';

create function credits_hasura.quote(
  hasura_session json,
  capability     text,
  units          numeric default null,
  quality        text    default null,
  model          text    default null,
  unit_counts    jsonb   default null,
  account_id     text    default null
)
returns setof credits_hasura.quotes
language plpgsql
stable
security definer
set search_path = pg_catalog, pg_temp
as $$
declare
  v_caller credits_hasura.caller;
  v_detail text;
begin
  v_caller := credits_hasura._enter_for(quote.hasura_session, quote.account_id);
  return query
    select r.account_id, r.capability, r.quality, r.model, r.units, r.unit_counts, r.amount, r.rate_id, r.valid_from,
           r.explanation, v_caller.issuer, v_caller.user_id, v_caller.org_id
      from credits._my_quote(quote.capability, quote.units, quote.quality, quote.model, quote.unit_counts,
                             v_caller.account_id) r;
exception when others then
  get stacked diagnostics v_detail = pg_exception_detail;
  perform credits_hasura._tell(sqlstate, sqlerrm, v_detail);
  raise;
end $$;
comment on function credits_hasura.quote is 'credits_api.quote() for the caller of a session.';

create function credits_hasura.check_access(
  hasura_session json,
  capability     text,
  units          numeric default null,
  quality        text    default null,
  member_id      text    default null,
  model          text    default null,
  unit_counts    jsonb   default null,
  account_id     text    default null
)
returns setof credits_hasura.access
language plpgsql
stable
security definer
set search_path = pg_catalog, pg_temp
as $$
declare
  v_caller credits_hasura.caller;
  v_detail text;
begin
  v_caller := credits_hasura._enter_for(check_access.hasura_session, check_access.account_id);
  return query
    select r.account_id, r.allowed, r.gate, r.status, r.code, r.capability, r.quality, r.model, r.plan, r.amount,
           r.available, r.rate_id, r.detail, r.limits, v_caller.issuer, v_caller.user_id, v_caller.org_id
      from credits._my_access(check_access.capability, check_access.units, check_access.quality, check_access.member_id,
                              check_access.model, check_access.unit_counts, v_caller.account_id) r;
exception when others then
  get stacked diagnostics v_detail = pg_exception_detail;
  perform credits_hasura._tell(sqlstate, sqlerrm, v_detail);
  raise;
end $$;
comment on function credits_hasura.check_access is 'credits_api.check_access() for the caller of a session.';

create function credits_hasura.list_packages(hasura_session json)
returns setof credits_hasura.packages
language plpgsql
stable
security definer
set search_path = pg_catalog, pg_temp
as $$
declare
  v_caller credits_hasura.caller;
  v_detail text;
begin
  v_caller := credits_hasura._enter(list_packages.hasura_session);
  return query
    select r.code, r.name, r.description, r.credits, r.price, r.currency, r.discount_percent, r.popular, r.display_order,
           v_caller.issuer, v_caller.user_id, v_caller.org_id
      from credits._my_packages() r;
exception when others then
  get stacked diagnostics v_detail = pg_exception_detail;
  perform credits_hasura._tell(sqlstate, sqlerrm, v_detail);
  raise;
end $$;
comment on function credits_hasura.list_packages is 'credits_api.list_packages() for the caller of a session.';

create function credits_hasura.list_plans(hasura_session json)
returns setof credits_hasura.plans
language plpgsql
stable
security definer
set search_path = pg_catalog, pg_temp
as $$
declare
  v_caller credits_hasura.caller;
  v_detail text;
begin
  v_caller := credits_hasura._enter(list_plans.hasura_session);
  return query
    select r.code, r.name, r.description, r.monthly_credits, r.trial_credits, r.rollover, r.rollover_cap, r.seats,
           r.display_order, v_caller.issuer, v_caller.user_id, v_caller.org_id
      from credits._my_plans() r;
exception when others then
  get stacked diagnostics v_detail = pg_exception_detail;
  perform credits_hasura._tell(sqlstate, sqlerrm, v_detail);
  raise;
end $$;
comment on function credits_hasura.list_plans is 'credits_api.list_plans() for the caller of a session.';

create function credits_hasura.list_purchases(
  hasura_session json,
  status         text    default null,
  max_rows       integer default 50,
  before         bigint  default null,
  account_id     text    default null
)
returns setof credits_hasura.purchases
language plpgsql
stable
security definer
set search_path = pg_catalog, pg_temp
as $$
declare
  v_caller credits_hasura.caller;
  v_detail text;
begin
  v_caller := credits_hasura._enter_for(list_purchases.hasura_session, list_purchases.account_id);
  return query
    select r.account_id, r.purchase_id, r.status, r.package, r.quantity, r.credits, r.amount, r.currency, r.amount_subtotal,
           r.amount_discount, r.amount_tax, r.amount_refunded, r.created_at, r.completed_at, v_caller.issuer,
           v_caller.user_id, v_caller.org_id
      from credits._my_purchases(list_purchases.status, list_purchases.max_rows, list_purchases.before, v_caller.account_id) r;
exception when others then
  get stacked diagnostics v_detail = pg_exception_detail;
  perform credits_hasura._tell(sqlstate, sqlerrm, v_detail);
  raise;
end $$;
comment on function credits_hasura.list_purchases is 'credits_api.list_purchases() for the caller of a session.';

create function credits_hasura.create_checkout(
  hasura_session        json,
  package               text    default null,
  plan                  text    default null,
  success_url           text    default null,
  cancel_url            text    default null,
  key                   text    default null,
  quantity              integer default 1,
  save_card             boolean default false,
  allow_promotion_codes boolean default false,
  price_id              text    default null,
  metadata              jsonb   default null,
  account_id            text    default null
)
returns setof credits_hasura.stripe_sessions
language plpgsql
volatile
security definer
set search_path = pg_catalog, pg_temp
as $$
declare
  v_caller credits_hasura.caller;
  v_detail text;
begin
  v_caller := credits_hasura._enter_for(create_checkout.hasura_session, create_checkout.account_id);
  return query
    select r.request_id, r.state, r.purchase_id, r.session_id, r.url, r.expires_at, r.error, r.replayed, v_caller.issuer,
           v_caller.user_id, v_caller.org_id
      from credits._my_checkout(create_checkout.package, create_checkout.plan, create_checkout.success_url,
                                create_checkout.cancel_url, create_checkout.key, create_checkout.quantity,
                                create_checkout.save_card, create_checkout.allow_promotion_codes, create_checkout.price_id,
                                create_checkout.metadata, v_caller.account_id) r;
exception when others then
  get stacked diagnostics v_detail = pg_exception_detail;
  perform credits_hasura._tell(sqlstate, sqlerrm, v_detail);
  raise;
end $$;
comment on function credits_hasura.create_checkout is 'credits_api.create_checkout() for the caller of a session.';

create function credits_hasura.get_checkout(
  hasura_session json,
  key            text,
  account_id     text default null
)
returns setof credits_hasura.stripe_sessions
language plpgsql
stable
security definer
set search_path = pg_catalog, pg_temp
as $$
declare
  v_caller credits_hasura.caller;
  v_detail text;
begin
  v_caller := credits_hasura._enter_for(get_checkout.hasura_session, get_checkout.account_id);
  return query
    select r.request_id, r.state, r.purchase_id, r.session_id, r.url, r.expires_at, r.error, r.replayed, v_caller.issuer,
           v_caller.user_id, v_caller.org_id
      from credits._my_checkout_state(get_checkout.key, v_caller.account_id) r;
exception when others then
  get stacked diagnostics v_detail = pg_exception_detail;
  perform credits_hasura._tell(sqlstate, sqlerrm, v_detail);
  raise;
end $$;
comment on function credits_hasura.get_checkout is 'credits_api.get_checkout() for the caller of a session.';

create function credits_hasura.create_portal_session(
  hasura_session json,
  return_url     text,
  key            text,
  account_id     text default null
)
returns setof credits_hasura.stripe_sessions
language plpgsql
volatile
security definer
set search_path = pg_catalog, pg_temp
as $$
declare
  v_caller credits_hasura.caller;
  v_detail text;
begin
  v_caller := credits_hasura._enter_for(create_portal_session.hasura_session, create_portal_session.account_id);
  return query
    select r.request_id, r.state, r.purchase_id, r.session_id, r.url, r.expires_at, r.error, r.replayed, v_caller.issuer,
           v_caller.user_id, v_caller.org_id
      from credits._my_portal_session(create_portal_session.return_url, create_portal_session.key, v_caller.account_id) r;
exception when others then
  get stacked diagnostics v_detail = pg_exception_detail;
  perform credits_hasura._tell(sqlstate, sqlerrm, v_detail);
  raise;
end $$;
comment on function credits_hasura.create_portal_session is 'credits_api.create_portal_session() for the caller of a session.';

create function credits_hasura.get_portal_session(
  hasura_session json,
  key            text,
  account_id     text default null
)
returns setof credits_hasura.stripe_sessions
language plpgsql
stable
security definer
set search_path = pg_catalog, pg_temp
as $$
declare
  v_caller credits_hasura.caller;
  v_detail text;
begin
  v_caller := credits_hasura._enter_for(get_portal_session.hasura_session, get_portal_session.account_id);
  return query
    select r.request_id, r.state, r.purchase_id, r.session_id, r.url, r.expires_at, r.error, r.replayed, v_caller.issuer,
           v_caller.user_id, v_caller.org_id
      from credits._my_portal_state(get_portal_session.key, v_caller.account_id) r;
exception when others then
  get stacked diagnostics v_detail = pg_exception_detail;
  perform credits_hasura._tell(sqlstate, sqlerrm, v_detail);
  raise;
end $$;
comment on function credits_hasura.get_portal_session is 'credits_api.get_portal_session() for the caller of a session.';

-- Helpers -------------------------------------------------------------------------------------------------------------

-- Gives the caller of a session the claims that his token would have given him. Hasura has checked its signature, aud and
-- exp; whether the issuer is trusted, and whose account it is, is decided as for everybody else.
create function credits_hasura._enter(hasura_session json)
returns credits_hasura.caller
language plpgsql
as $$
declare
  v_caller credits_hasura.caller;
  v_issuer credits.issuers;
  v_org    jsonb;
begin
  v_caller.issuer  := _enter.hasura_session ->> 'x-hasura-issuer';
  v_caller.user_id := _enter.hasura_session ->> 'x-hasura-user-id';
  v_caller.org_id  := nullif(_enter.hasura_session ->> 'x-hasura-org-id', '');
  select i.* into v_issuer from credits.issuers i where i.issuer = v_caller.issuer;
  v_org := to_jsonb(v_caller.org_id);
  for v_depth in reverse coalesce(cardinality(v_issuer.org_claim), 0) .. 1 loop
    v_org := jsonb_build_object(v_issuer.org_claim[v_depth], v_org);
  end loop;
  perform set_config('request.jwt.claims', (
    case when jsonb_typeof(v_org) = 'object' then v_org else '{}' end
    || jsonb_strip_nulls(jsonb_build_object(
         'iss', v_caller.issuer, 'sub', v_caller.user_id, 'aud', to_jsonb(v_issuer.audiences),
         'exp', extract(epoch from credits.now()) + 60,
         'is_anonymous', _enter.hasura_session ->> 'x-hasura-is-anonymous')))::text, true);
  return v_caller;
end $$;

-- The same, and the account that is meant: one of the organisation's, if the session names one, or else one of the user's.
create function credits_hasura._enter_for(
  hasura_session json,
  account_id     text
)
returns credits_hasura.caller
language plpgsql
as $$
declare
  v_caller credits_hasura.caller := credits_hasura._enter(_enter_for.hasura_session);
  v_kind   text   := case when v_caller.org_id is null then 'user' else 'org' end;
  v_mine   text[] := array(select i.account_id
                             from credits._subjects() s
                             join credits.identities i on i.issuer = s.issuer and i.kind = s.kind and i.subject = s.subject
                            where s.kind = v_kind);
begin
  v_caller.account_id := case when _enter_for.account_id = any (v_mine) then _enter_for.account_id
                              when _enter_for.account_id is null and cardinality(v_mine) = 1 then v_mine[1] end;
  if v_caller.account_id is null then
    perform credits._fail_not_mine(_enter_for.account_id, cardinality(v_mine));
  end if;
  return v_caller;
end $$;

-- Hasura shows its clients the errors of the classes 22 and 23, and of these the message alone. Our PT402 becomes 22402.
create function credits_hasura._tell(
  state   text,
  message text,
  detail  text
)
returns void
language plpgsql
as $$
begin
  if _tell.state ~ '^PT\d{3}$' then
    raise exception using errcode = '22' || substr(_tell.state, 3), message = concat_ws(' ', _tell.message, _tell.detail);
  end if;
end $$;

-- Rights --------------------------------------------------------------------------------------------------------------

create function credits_hasura._enable_login(login text)
returns void
language plpgsql
as $$
declare
  v_function regprocedure;
begin
  if not exists (select from pg_catalog.pg_roles r
                  where r.rolname = _enable_login.login and r.rolname !~ '^credits_' and not r.rolsuper) then
    perform credits._fail(400, 'invalid_request', jsonb_build_object('login', _enable_login.login),
      'Name a login that Hasura alone uses: there is one, it is no superuser, and none of ours.');
  end if;
  execute format('grant usage on schema credits_hasura to %I', _enable_login.login);
  execute format('grant select on all tables in schema credits_hasura to %I', _enable_login.login);
  for v_function in
    select p.oid from pg_catalog.pg_proc p
     where p.pronamespace = 'credits_hasura'::regnamespace and p.proname !~ '^_'
  loop
    execute format('grant execute on function %s to %I', v_function, _enable_login.login);
  end loop;
end $$;
comment on function credits_hasura._enable_login(text) is
'Lets Hasura''s login in: the functions and shapes of credits_hasura, and nothing else. For the owner of the database.';

do $$
declare
  v_table regclass;
begin
  for v_table in
    select c.oid from pg_catalog.pg_class c where c.relnamespace = 'credits_hasura'::regnamespace and c.relkind = 'r'
  loop
    execute format('alter table %s enable row level security', v_table);
  end loop;
  perform credits_hasura._enable_login(l.login)
     from string_to_table(nullif(current_setting('credits_hasura.logins'), ''), e'\n') l (login);
end $$;

commit;
