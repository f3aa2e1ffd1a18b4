-- Notifications are delivered: to endpoints as signed webhooks, and by e-mail. Low balances and ending credits are told.
set local role credits_owner;

create table credits.notification_kinds (
  kind     text primary key,
  audience text not null,
  summary  text not null,
  constraint notification_kinds_audience_is_known check (audience in ('customer', 'operator', 'product'))
);
comment on table credits.notification_kinds is
  'The kinds of notifications. One that is not listed is kept and delivered all the same, as a kind for the operator.';
comment on column credits.notification_kinds.audience is
  'Who gets an e-mail: the account''s address, or the setting operator_email, or nobody. Webhooks get all.';

create table credits.notification_texts (
  kind    text primary key,
  subject text not null,
  body    text not null
);
comment on table credits.notification_texts is 'What e-mails to customers say. A name in braces stands for a value of the notification.';

create index notifications_by_account on credits.notifications (account_id, notification_id) where account_id is not null;
comment on column credits.notifications.type is 'Its kind; see notification_kinds.';

create table credits.notification_endpoints (
  name       text        primary key,
  url        text        not null,
  kinds      text[],
  account_id text        references credits.accounts,
  enabled    boolean     not null default true,
  created_at timestamptz not null,
  updated_at timestamptz not null,
  constraint notification_endpoints_name_is_plain check (name ~ '^[a-z][a-z0-9_]{0,62}$'),
  constraint notification_endpoints_kinds_are_some check (cardinality(kinds) > 0)
);
comment on table credits.notification_endpoints is 'Where notifications are sent as webhooks. The secrets that sign them are not in the database.';
comment on column credits.notification_endpoints.name is 'Also the name of its secret: PGCREDITS_NOTIFY_SECRET_<NAME> in the environment of the worker.';
comment on column credits.notification_endpoints.kinds is 'The kinds that it gets; null is all of them, also those to come.';
comment on column credits.notification_endpoints.account_id is 'The account that it hears of; null is all of them, and what concerns no account.';
comment on column credits.notification_endpoints.enabled is 'While it is false, its deliveries are kept and none is sent.';

create table credits.notification_deliveries (
  delivery_id     bigint      generated always as identity primary key,
  notification_id bigint      not null references credits.notifications on delete cascade,
  channel         text        not null,
  target          text        not null,
  state           text        not null default 'pending',
  attempts        integer     not null default 0,
  next_attempt_at timestamptz not null,
  locked_until    timestamptz,
  worker          text,
  last_status     integer,
  last_error      text,
  finished_at     timestamptz,
  constraint deliveries_one_per_target unique (notification_id, channel, target),
  constraint deliveries_channel_is_known check (channel in ('webhook', 'email')),
  constraint deliveries_state_is_known check (state in ('pending', 'sent', 'delivered', 'dead')),
  constraint deliveries_sent_are_locked check ((state = 'sent') = (locked_until is not null)),
  constraint deliveries_end_when_finished check ((state in ('delivered', 'dead')) = (finished_at is not null))
);
create index deliveries_due on credits.notification_deliveries (channel, next_attempt_at) where state = 'pending';
create index deliveries_in_flight on credits.notification_deliveries (locked_until) where state = 'sent';
create index deliveries_open on credits.notification_deliveries (target, delivery_id) where state in ('pending', 'sent', 'dead');
comment on table credits.notification_deliveries is 'What is to be sent: one row for a notification and each endpoint or reader. Written with the notification.';
comment on column credits.notification_deliveries.target is 'The name of the endpoint; or customer or operator, whose address is looked up when it is sent.';
comment on column credits.notification_deliveries.locked_until is 'Until then it is its worker''s. Later anybody may claim it again.';
comment on column credits.notification_deliveries.last_status is 'The last HTTP or SMTP status; null if there was no answer.';
comment on column credits.notification_deliveries.last_error is 'What went wrong last: at most 500 characters of the answer, or why nothing could be sent.';

-- Low balances: compared where the row is locked anyway. No index mentions them.
alter table credits.balances
  add column low_at credits.part,
  add column is_low boolean not null default false;
comment on column credits.balances.low_at is 'Below this many credits the account is low; null is never.';
comment on column credits.balances.is_low is 'It is below, and that was told. False again as soon as it is not.';

alter table credits.grants add column end_told boolean not null default false;
comment on column credits.grants.end_told is 'Its owner was told that it ends soon.';
create index grants_ending on credits.grants (expires_at)
  where status = 'active' and not end_told and kind <> 'plan' and expires_at is not null;

create type credits.notification_target as (channel text, target text);
create type credits.notification_endpoint_result as (
  name text, url text, kinds text[], account_id text, enabled boolean, pending bigint, dead bigint);
create type credits.notification_summary as (
  notification_id bigint, kind text, audience text, account_id text, key text, data jsonb, created_at timestamptz,
  deliveries jsonb);
create type credits.claimed_delivery as (
  delivery_id bigint, attempt integer, channel text, target text, message_id text, address text, subject text, body text,
  locked_until timestamptz);
create type credits.delivery_result as (
  delivery_id bigint, notification_id bigint, channel text, target text, state text, attempts integer,
  next_attempt_at timestamptz, last_status integer, last_error text);
create type credits.low_balance_result as (account_id text, threshold numeric, is_low boolean);

alter table credits.notification_texts enable row level security;
alter table credits.notification_kinds enable row level security;
alter table credits.notification_endpoints enable row level security;
alter table credits.notification_deliveries enable row level security;
