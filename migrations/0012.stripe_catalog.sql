-- The catalogue at Stripe: the prices of plans, every price that was ever sold, and how far the last run has come.
-- Lock order: rows of stripe_requests and stripe_objects first, then the table plans, then what the catalogue consists of.
set local role credits_owner;

create table credits.plan_prices (
  plan            text    not null references credits.plans (code),
  currency        text    not null,
  "interval"      text    not null,
  amount          bigint  not null,
  rank            integer not null,
  stripe_price_id text    constraint plan_prices_one_per_price unique,
  primary key (plan, currency, "interval"),
  constraint plan_prices_amount_is_not_negative check (amount >= 0),
  constraint plan_prices_currency_is_iso check (currency ~ '^[a-z]{3}$'),
  constraint plan_prices_interval_is_known check ("interval" in ('month', 'year'))
);
comment on table credits.plan_prices is 'What a plan costs, for each currency and interval once.';
comment on column credits.plan_prices.amount is 'For one interval, in the minor unit of the currency, as Stripe counts.';
comment on column credits.plan_prices.rank is 'Their order: a plan is sold at the first one, unless another is asked for.';
comment on column credits.plan_prices.stripe_price_id is
  'The price of Stripe that sells it; of another amount until publish_catalog() has replaced it.';

create table credits.sold_prices (
  stripe_price_id text        primary key,
  package         text        references credits.packages (code),
  plan            text        references credits.plans (code),
  amount          bigint,
  currency        text,
  credits         numeric,
  retired_at      timestamptz,
  created_at      timestamptz not null,
  constraint sold_prices_sell_one_thing check (num_nonnulls(package, plan) = 1)
);
create index sold_prices_by_package on credits.sold_prices (package) where package is not null;
create index sold_prices_retired on credits.sold_prices (retired_at) where retired_at is not null;
comment on table credits.sold_prices is
  'Every price of Stripe that sells or has sold something, so that money that comes late is known for what it is.';
comment on column credits.sold_prices.amount is 'Of one, in the minor unit of currency; null where only Stripe knows.';
comment on column credits.sold_prices.credits is 'Of a package: what one of them brings at this price.';
comment on column credits.sold_prices.retired_at is 'Since when nothing shall be sold at it: publish_catalog() deactivates it.';

create table credits.catalog_runs (
  run              text        primary key,
  started_at       timestamptz not null,
  first_request_id bigint      not null,
  constraint catalog_runs_run_is_known check (run in ('publish', 'sync'))
);
comment on table credits.catalog_runs is 'The last publish_catalog() and sync_catalog(): what they ask Stripe for begins at this request.';

create type credits.catalog_target as (
  section text, code text, object text, ref text, stripe_id text, chosen boolean, on_sale boolean, wanted jsonb, fixed jsonb);
create type credits.catalog_difference as (
  section text, code text, object text, stripe_id text, difference text, change text, before jsonb, after jsonb, ref text);
create type credits.catalog_progress as (
  run text, started_at timestamptz, requests bigint, open bigint, done bigint, failed bigint, finished boolean, errors jsonb);

do $$
declare
  v_table text;
begin
  foreach v_table in array array['plan_prices', 'sold_prices', 'catalog_runs'] loop
    execute format('alter table credits.%I enable row level security', v_table);
  end loop;
end $$;
