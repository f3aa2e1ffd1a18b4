-- What operators look at and do: health, figures, audits that were run, erasure, opening balances.
set local role credits_owner;

create table credits.audit_runs (
  audit_run_id bigint      generated always as identity primary key,
  started_at   timestamptz not null,
  finished_at  timestamptz not null,
  findings     bigint      not null,
  sample       jsonb       not null default '[]'
);
comment on table credits.audit_runs is 'Each run of audit() by run_audit(). Kept for a year.';
comment on column credits.audit_runs.findings is 'How many rows audit() had; 0 is sound.';
comment on column credits.audit_runs.sample is 'The first 20 of them.';

create table credits.totals (
  name        text        not null,
  label       text        not null default '',
  value       numeric     not null,
  counted_at  timestamptz not null,
  primary key (name, label)
);
comment on table credits.totals is
  'Sums over all accounts, as refresh_totals() counted them last: too much to read at each look at metrics().';
comment on column credits.totals.label is 'What the sum is of: a status, a kind of grant. Empty where there is but one.';

create table credits.health_checks (
  name     text    primary key,
  metric   text    not null,
  warn_at  numeric,
  fail_at  numeric,
  blocking boolean not null default false,
  meaning  text    not null,
  advice   text    not null
);
comment on table credits.health_checks is
  'What health() judges: a figure of metrics(), and from which value on it is a warning or a failure.';
comment on column credits.health_checks.metric is 'Of several rows of that name the highest value counts.';
comment on column credits.health_checks.blocking is 'Whether a door in that state can do no work, so that /readyz says no.';

create table credits.erasure_rules (
  table_name  text not null,
  column_name text not null,
  treatment   text not null,
  primary key (table_name, column_name),
  constraint erasure_rules_treatment_is_known check (treatment in ('keep', 'null', 'empty', 'mark', 'remove'))
);
comment on table credits.erasure_rules is
  'What erase_account() does to each column of text or JSON of the tables that have an account_id.';
comment on column credits.erasure_rules.treatment is
  'keep: it tells of nobody. null, empty ({}), mark ({"erased": true}): what is there then. remove: the whole row goes.';

create table credits.erasures (
  account_id text        primary key references credits.accounts,
  erased_at  timestamptz not null,
  last_at    timestamptz not null,
  times      integer     not null default 1,
  forfeited  numeric     not null
);
create index erasures_by_time on credits.erasures (erased_at);
comment on table credits.erasures is 'Accounts whose personal data were erased, as the record that it was done.';
comment on column credits.erasures.last_at is
  'When it was last repeated: what came after the first time is erased by the next.';
comment on column credits.erasures.forfeited is 'Credits that were left, and taken back.';

create index stripe_requests_troubled on credits.stripe_requests (finished_at) where state in ('failed', 'unknown');
create index subscription_history_unexpected on credits.subscription_history (created_at) where unexpected;

create type credits.metric as (name text, type text, help text, labels jsonb, value numeric);
create type credits.health_check as (
  name text, status text, value numeric, blocking boolean, meaning text, advice text);
create type credits.erase_result as (
  account_id text, erased_at timestamptz, times integer, forfeited numeric, objects bigint, events bigint,
  requests bigint);
create type credits.import_row as (
  position bigint, account_id text, key text, amount numeric, kind text, expires_at timestamptz, cost bigint,
  cost_currency text, description text, email text, account_kind text, plan text, fingerprint jsonb, argument text,
  problem text, state text);
create type credits.import_result as (
  position bigint, account_id text, key text, status integer, code text, detail jsonb, hint text, grant_id bigint,
  balance numeric, replayed boolean);

do $$
declare
  v_table text;
begin
  foreach v_table in array array['audit_runs', 'totals', 'health_checks', 'erasure_rules', 'erasures'] loop
    execute format('alter table credits.%I enable row level security', v_table);
  end loop;
end $$;
