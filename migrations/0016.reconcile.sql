-- What Stripe has and we have not, run by run; and how a request whose outcome is not known is looked for at Stripe.
set local role credits_owner;

create table credits.stripe_reconciliations (
  run_id      bigint      generated always as identity primary key,
  since       timestamptz not null,
  repair      boolean     not null,
  state       text        not null default 'running',
  checked     bigint      not null default 0,
  error       text,
  started_at  timestamptz not null,
  finished_at timestamptz,
  constraint stripe_reconciliations_state_is_known check (state in ('running', 'done', 'failed')),
  constraint stripe_reconciliations_end_when_finished check ((state = 'running') = (finished_at is null)),
  constraint stripe_reconciliations_say_why_they_failed check ((state = 'failed') = (error is not null))
);
create unique index stripe_reconciliations_one_at_a_time on credits.stripe_reconciliations (state) where state = 'running';
comment on table credits.stripe_reconciliations is
  'Runs that compared what Stripe lists with what is known here. One runs at a time; they are kept for 90 days.';
comment on column credits.stripe_reconciliations.since is 'What Stripe made since then was compared.';
comment on column credits.stripe_reconciliations.checked is 'How many objects were compared.';

create table credits.stripe_gaps (
  run_id     bigint      not null references credits.stripe_reconciliations on delete cascade,
  kind       text        not null,
  object_id  text        not null,
  gap        text        not null,
  object     jsonb       not null,
  request_id bigint,
  found_at   timestamptz not null,
  primary key (run_id, object_id)
);
comment on table credits.stripe_gaps is
  'Objects of Stripe that a run found, and that had not arrived here or differed. How each stands now is computed.';
comment on column credits.stripe_gaps.gap is 'What was missing when it was found.';
comment on column credits.stripe_gaps.object is 'The object as it was listed, without secrets.';
comment on column credits.stripe_gaps.request_id is 'The retrieve that repairs it. Null where nothing was to be repaired.';

create table credits.stripe_lookups (
  purpose text   primary key,
  path    text,
  narrow  text[] not null default '{}',
  mark    text,
  missing text   not null,
  constraint stripe_lookups_know_a_mark check ((path is null) = (mark is null)),
  constraint stripe_lookups_missing_is_known check (missing in ('again', 'failed'))
);
comment on table credits.stripe_lookups is
  'How a post is looked for whose outcome is unknown when Stripe may have forgotten its key. Others are left to a person.';
comment on column credits.stripe_lookups.path is 'The list that would hold what it made. Null where nothing lasting is made.';
comment on column credits.stripe_lookups.narrow is 'Parameters of the request that narrow the list.';
comment on column credits.stripe_lookups.mark is 'What it made has the same value under this name in its metadata.';
comment on column credits.stripe_lookups.missing is 'What follows if Stripe never did it: again, under a new key, or failed.';

create type credits.reconciliation_result as (
  run_id bigint, state text, since timestamptz, repair boolean, checked bigint, found bigint, repaired bigint, repairing bigint,
  remaining bigint, foreign_objects bigint, error text, started_at timestamptz, finished_at timestamptz);
create type credits.stripe_gap_result as (
  run_id bigint, kind text, object_id text, gap text, state text, reason text, account_id text, amount bigint, currency text,
  request_id bigint, created_at timestamptz, found_at timestamptz);

alter table credits.stripe_reconciliations enable row level security;
alter table credits.stripe_gaps enable row level security;
alter table credits.stripe_lookups enable row level security;
