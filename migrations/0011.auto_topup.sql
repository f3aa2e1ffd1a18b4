-- Automatic top-up: the rule of an account, and each attempt to buy by it.
set local role credits_owner;

create table credits.auto_topups (
  account_id    text        primary key references credits.accounts,
  enabled       boolean     not null default true,
  threshold     numeric     not null,
  package       text        not null references credits.packages (code),
  currency      text        not null,
  monthly_cap   bigint      not null,
  daily_cap     bigint,
  cool_down     interval    not null,
  paused_reason text,
  paused_card   text,
  paused_at     timestamptz,
  check_at      timestamptz,
  created_at    timestamptz not null,
  updated_at    timestamptz not null,
  constraint auto_topups_threshold_is_an_amount check (
    threshold > 0 and threshold < 1e12 and threshold = round(threshold, 6)),
  constraint auto_topups_caps_are_positive check (monthly_cap > 0 and daily_cap > 0),
  constraint auto_topups_pause_is_whole check ((paused_reason is null) = (paused_at is null)
                                               and (paused_card is null or paused_reason is not null))
);
create index auto_topups_to_check on credits.auto_topups (check_at) where check_at is not null;
comment on table credits.auto_topups is 'The rule by which an account buys credits before it runs out. No row, or not enabled: off.';
comment on column credits.auto_topups.threshold is 'In credits: when less is available, it buys.';
comment on column credits.auto_topups.monthly_cap is 'Over any 30 days, in the minor unit of currency; daily_cap likewise, over any 24 hours.';
comment on column credits.auto_topups.cool_down is 'The shortest time between two attempts.';
comment on column credits.auto_topups.paused_reason is 'Why it buys nothing until somebody, or another card, ends the pause.';
comment on column credits.auto_topups.paused_card is 'The card that was declined: only another one ends this pause.';
comment on column credits.auto_topups.check_at is
  'Nothing is bought before, and then run_auto_topups() looks without a debit. Null: the next debit looks.';

create table credits.top_ups (
  account_id        text        not null references credits.accounts,
  top_up_id         text        not null,
  purchase_id       bigint      not null,
  state             text        not null default 'queued',
  available         numeric     not null,
  customer_id       text        not null,
  payment_method    text        not null,
  payment_intent_id text,
  declined          boolean     not null default false,
  error_code        text,
  decline_code      text,
  advice_code       text,
  created_at        timestamptz not null,
  finished_at       timestamptz,
  primary key (account_id, top_up_id),
  constraint top_ups_one_per_purchase unique (account_id, purchase_id),
  constraint top_ups_state_is_known check (state in ('queued', 'processing', 'requires_action', 'succeeded', 'failed')),
  constraint top_ups_finished_has_its_moment check ((state in ('succeeded', 'failed')) = (finished_at is not null)),
  foreign key (account_id, purchase_id) references credits.purchases (account_id, purchase_id)
);
create unique index top_ups_one_open on credits.top_ups (account_id)
  where state in ('queued', 'processing', 'requires_action');
create index top_ups_by_time on credits.top_ups (account_id, created_at);
comment on table credits.top_ups is 'Attempts to buy by the rule of an account: one open at a time. What is bought is the purchase.';
comment on column credits.top_ups.top_up_id is 'In the metadata of the payment, and ref of its request: both find this row.';
comment on column credits.top_ups.state is
  'queued until Stripe has answered: its request says whether it was sent, or its outcome is unknown. Open until succeeded or failed.';
comment on column credits.top_ups.available is 'What was available when it was started.';
comment on column credits.top_ups.payment_method is 'The card that was asked for.';
comment on column credits.top_ups.declined is 'Whether the card was the reason that it failed.';

alter table credits.balances add column topup_below numeric;
comment on column credits.balances.topup_below is
  'A debit that leaves less available looks at the account''s top-up. Null: off, paused, or an attempt is open.';

alter table credits.stripe_payments drop constraint stripe_payments_source_is_known;
alter table credits.stripe_payments add constraint stripe_payments_source_is_known
  check (source_kind in ('session', 'invoice', 'top_up'));
comment on table credits.stripe_payments is
  'What each payment paid for: a Checkout session, an invoice or, by itself, a top-up; nulls while unknown.';

create type credits.auto_topup_result as (
  account_id text, state text, paused_reason text, threshold numeric, package text, monthly_cap bigint, daily_cap bigint,
  currency text, cool_down interval, month_used bigint, day_used bigint, payment_method text, top_up_id text,
  top_up_state text, check_at timestamptz);
create type credits.top_up_plan as (
  reason text, wait_until timestamptz, customer_id text, payment_method text, package text, description text, quantity integer,
  credits numeric, amount bigint, currency text);
create type credits.intent_shape as (
  payment_intent_id text, status text, amount_received bigint, currency text, customer_id text, livemode boolean,
  account_id text, top_up_id text, error_code text, decline_code text, advice_code text);

alter table credits.auto_topups enable row level security;
alter table credits.top_ups enable row level security;
