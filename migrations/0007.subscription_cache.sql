-- What an account's subscription allows, remembered for some minutes; and what the names that existing systems call answer.
set local role credits_owner;

create table credits.subscription_cache (
  account_id   text        primary key references credits.accounts,
  state        jsonb       not null,
  version      bigint      not null,
  refreshed_at timestamptz not null,
  expires_at   timestamptz not null
) with (fillfactor = 70);
comment on table credits.subscription_cache is
  'The state of each account''s subscription as it was last computed. Nothing is lost with a row: it is computed anew.';
comment on column credits.subscription_cache.state is 'A subscription_state_result.';
comment on column credits.subscription_cache.version is
  'credits._subscription_version() of what it was computed from. It is served only while that is still the same.';
comment on column credits.subscription_cache.expires_at is
  'subscription_cache_ttl after refreshed_at, or the moment at which the state changes by itself, if that is earlier.';

-- Counted outside of transactions, so that readers never wait for each other.
create sequence credits.subscription_cache_hits;
comment on sequence credits.subscription_cache_hits is 'How often a state was served from the cache.';
create sequence credits.subscription_cache_misses;
comment on sequence credits.subscription_cache_misses is 'How often a state was asked for and had to be computed.';

create table credits.subscription_cache_cleanups (
  cleanup_id  bigint      generated always as identity primary key,
  scope       text        not null,
  started_at  timestamptz not null,
  finished_at timestamptz not null,
  removed     bigint      not null,
  constraint subscription_cache_cleanups_scope_is_known check (scope in ('expired', 'all')),
  constraint subscription_cache_cleanups_end_after_they_start check (finished_at >= started_at)
);
comment on table credits.subscription_cache_cleanups is 'Each cleanup of the subscription cache, and the rows that it removed.';

create type credits.subscription_cache_entry as (
  state credits.subscription_state_result, refreshed_at timestamptz, cached boolean);
create type credits.subscription_cache_status as (
  entries bigint, fresh bigint, expired bigint, oldest timestamptz, hits bigint, misses bigint, hit_rate numeric);
create type credits.validated_spend_result as (
  entry_seq bigint, account_id text, amount numeric, debt numeric, balance numeric, available numeric,
  created_at timestamptz, replayed boolean, key text, state text, subscription jsonb);
create type credits.subscription_credits_result as (
  account_id text, invoice_id text, subscription_id text, amount numeric, grant_ids bigint[], expires_at timestamptz,
  replayed boolean);
create type credits.stripe_customer_result as (account_id text, customer_id text, status text, request_id bigint);

alter table credits.subscription_cache enable row level security;
alter table credits.subscription_cache_cleanups enable row level security;
