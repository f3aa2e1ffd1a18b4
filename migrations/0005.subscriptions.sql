-- What Stripe tells, mirrored; subscriptions, what they entitle to, and what refunds and disputes take back.
-- Lock order: the event row, then rows of stripe_objects and stripe_payments, then the account's balances row, then the
-- rest of the account.
set local role credits_owner;

-- Functions of an earlier sql/ whose signature changes with this one.
drop function if exists credits._on_checkout_session(credits.stripe_events);
drop function if exists credits._apply_stripe_event(text, boolean);
drop function if exists credits._park(text, jsonb);
drop function if exists credits._grant_plan_credits(text, text, timestamptz);
drop function if exists credits._grant(text, numeric, text, timestamptz, timestamptz, integer, text, text[], text, bigint,
  text, text, jsonb, jsonb);
drop function if exists credits._insert_grant(text, numeric, text, timestamptz, timestamptz, integer, text, text[], text,
  bigint, text, text, jsonb, jsonb);

-- Events ------------------------------------------------------------------------------------------------------------

create table credits.stripe_endpoints (
  endpoint       text        primary key,
  mode           text        not null default 'live',
  livemode       boolean,
  stripe_account text,
  updated_at     timestamptz not null default clock_timestamp(),
  constraint stripe_endpoints_mode_is_known check (mode in ('live', 'shadow')),
  constraint stripe_endpoints_label_is_short check (endpoint <> '' and length(endpoint) <= 200)
);
comment on table credits.stripe_endpoints is
  'What is expected of a webhook endpoint, by its label. One without a row is live and takes events of either livemode.';
comment on column credits.stripe_endpoints.mode is
  'live applies events; shadow records what they would have done and changes nothing.';
comment on column credits.stripe_endpoints.livemode is 'Events of the other livemode are ignored; null takes both.';
comment on column credits.stripe_endpoints.stripe_account is
  'The connected account whose events it takes; null takes those without one, which are the own account''s.';

alter table credits.stripe_events
  alter column payload drop not null,
  add column object_id   text,
  add column waits_for   text,
  add column effects     jsonb,
  add column archived_at timestamptz,
  add constraint stripe_events_archive_has_no_payload check ((payload is null) = (archived_at is not null)),
  add constraint stripe_events_archive_is_done check (archived_at is null or status in ('applied', 'ignored'));
create index stripe_events_waiting on credits.stripe_events (waits_for) where status = 'parked' and waits_for is not null;
create index stripe_events_by_time on credits.stripe_events (received_at);
comment on column credits.stripe_events.object_id is 'The object that the event is about.';
comment on column credits.stripe_events.waits_for is
  'What a parked event lacks, such as customer:cus_1. It is tried again as soon as that becomes known.';
comment on column credits.stripe_events.effects is
  'What the event did, or would have done if it came to an endpoint in shadow mode.';
comment on column credits.stripe_events.archived_at is 'When its payload was dropped. Ids are kept for ever.';

alter type credits.handler_result add attribute effects jsonb;
alter type credits.stripe_event_summary
  add attribute object_id text, add attribute waits_for text, add attribute effects jsonb, add attribute archived_at timestamptz;
drop type credits.session_shape cascade;  -- and the functions of an earlier sql/ that read it; sql/ makes them anew
drop type credits.event_shape cascade;

-- Stripe's objects as they were last seen. One row decides for every kind of object which snapshot is the latest.
create table credits.stripe_objects (
  kind        text        not null,
  object_id   text        not null,
  ref         text,
  snapshot    jsonb,
  as_of       bigint,
  seen_by     text,
  previous    jsonb,
  deleted     boolean     not null default false,
  updated_at  timestamptz not null,
  primary key (kind, object_id)
);
create index stripe_objects_by_ref on credits.stripe_objects (kind, ref) where ref is not null;
comment on table credits.stripe_objects is
  'The latest snapshot known of each object of Stripe, whatever the order in which events came.';
comment on column credits.stripe_objects.ref is
  'What it hangs on: a refund or dispute on its charge, a charge on its payment, a price on its product, a subscription or invoice on its customer.';
comment on column credits.stripe_objects.snapshot is 'Null while the object is only known to exist.';
comment on column credits.stripe_objects.as_of is 'The second of the snapshot, unix time.';
comment on column credits.stripe_objects.seen_by is 'Type of the event that brought it, or retrieve, or embedded.';
comment on column credits.stripe_objects.previous is 'previous_attributes of that event.';

create table credits.stripe_customers (
  customer_id            text        primary key,
  account_id             text        not null references credits.accounts,
  default_payment_method text,
  deleted                boolean     not null default false,
  bound_by               text        not null,
  created_at             timestamptz not null
);
create index stripe_customers_by_account on credits.stripe_customers (account_id);
comment on table credits.stripe_customers is 'Which account a customer of Stripe is. The first binding stands for ever.';
comment on column credits.stripe_customers.bound_by is 'What bound it: an event, or a request of ours.';

-- A payment is named by its PaymentIntent, or by its charge where there is none. Whoever learns something about one
-- writes its row first, so that of two who learn the halves at the same time the second sees both.
create table credits.stripe_payments (
  payment_id  text        primary key,
  source_kind text,
  source_id   text,
  account_id  text,
  amount      bigint,
  currency    text,
  created_at  timestamptz not null,
  constraint stripe_payments_source_is_whole check (num_nulls(source_kind, source_id, account_id) in (0, 3)),
  constraint stripe_payments_source_is_known check (source_kind in ('session', 'invoice'))
);
create index stripe_payments_by_account on credits.stripe_payments (account_id) where account_id is not null;
create index stripe_payments_by_source on credits.stripe_payments (source_kind, source_id);
comment on table credits.stripe_payments is 'What each payment paid for: a Checkout session or an invoice; nulls while unknown.';
comment on column credits.stripe_payments.amount is 'What was paid, in the minor unit of currency; the charge knows better.';

create table credits.clawbacks (
  account_id  text           not null,
  grant_id    bigint         not null,
  source_kind text           not null,
  source_id   text           not null,
  firm        numeric        not null default 0,
  target      numeric        not null default 0,
  taken       credits.part   not null default 0,
  owed        credits.part   not null default 0,
  number      integer        not null default 0,
  updated_at  timestamptz    not null,
  primary key (account_id, grant_id),
  foreign key (account_id, grant_id) references credits.grants (account_id, grant_id),
  constraint clawbacks_firm_is_part_of_target check (firm >= 0 and firm <= target)
);
comment on table credits.clawbacks is
  'What refunds and disputes of a payment have taken of a grant that it bought, beside what they shall take.';
comment on column credits.clawbacks.firm is 'Credits refunded or lost in a dispute: taken in full, into debt if spent.';
comment on column credits.clawbacks.target is 'firm and what open disputes ask for, which is taken only as far as it is unspent.';
comment on column credits.clawbacks.taken is 'Credits taken out of the grant.';
comment on column credits.clawbacks.owed is 'Credits that had been spent and were turned into debt.';

alter table credits.purchases
  add column amount_refunded bigint not null default 0,
  add column amount_disputed bigint not null default 0;

-- The outbox. Workers claim and execute it.
create table credits.stripe_requests (
  request_id      bigint      generated always as identity primary key,
  purpose         text        not null,
  ref             text        not null,
  account_id      text,
  method          text        not null,
  path            text        not null,
  params          jsonb       not null default '{}',
  idempotency_key text        generated always as ('pgc-' || request_id) stored,
  stripe_version  text,
  stripe_account  text,
  state           text        not null default 'queued',
  attempts        integer     not null default 0,
  created_at      timestamptz not null,
  run_at          timestamptz not null,
  locked_until    timestamptz,
  first_sent_at   timestamptz,
  last_sent_at    timestamptz,
  finished_at     timestamptz,
  http_status     integer,
  error_type      text,
  error_code      text,
  decline_code    text,
  advice_code     text,
  response        jsonb,
  stripe_request  text,
  as_of           bigint,
  constraint stripe_requests_method_is_known check (method in ('get', 'post', 'delete')),
  constraint stripe_requests_path_is_local check (path ~ '^/v[12]/' and path !~ '//'),
  constraint stripe_requests_params_is_an_object check (jsonb_typeof(params) = 'object'),
  constraint stripe_requests_state_is_known check (
    state in ('queued', 'sent', 'processing', 'requires_action', 'done', 'declined', 'failed', 'unknown'))
);
create unique index stripe_requests_one_open on credits.stripe_requests (purpose, ref)
  where state in ('queued', 'sent', 'processing', 'requires_action', 'unknown');
create index stripe_requests_to_run on credits.stripe_requests (run_at) where state = 'queued';
comment on table credits.stripe_requests is
  'Requests to Stripe that SQL decided on, in an outbox; and what Stripe answered.';
comment on column credits.stripe_requests.purpose is 'What it is for: retrieve, change_plan, customer.';
comment on column credits.stripe_requests.ref is 'What it is about. One request is open per purpose and ref.';
comment on column credits.stripe_requests.stripe_request is 'Stripe''s own id of the request, for its log.';
comment on column credits.stripe_requests.as_of is 'The second of which the answer speaks, unix time.';

create table credits.notifications (
  notification_id bigint      generated always as identity primary key,
  account_id      text,
  type            text        not null,
  key             text        not null,
  data            jsonb       not null default '{}',
  created_at      timestamptz not null,
  constraint notifications_one_per_cause unique (type, key)
);
comment on table credits.notifications is 'What somebody should hear of, written in the transaction of its cause, once per cause.';
comment on column credits.notifications.key is 'The cause, such as an invoice and its attempt.';

-- What purchases know already.
insert into credits.stripe_customers (customer_id, account_id, bound_by, created_at)
select distinct on (p.stripe_customer_id) p.stripe_customer_id, p.account_id, coalesce(p.stripe_session_id, 'purchase'), p.created_at
  from credits.purchases p
 where p.stripe_customer_id is not null
 order by p.stripe_customer_id, p.purchase_id;
insert into credits.stripe_payments (payment_id, source_kind, source_id, account_id, amount, currency, created_at)
select p.stripe_payment_intent_id, 'session', p.stripe_session_id, p.account_id, p.amount, p.currency, p.created_at
  from credits.purchases p
 where p.stripe_payment_intent_id is not null and p.completed_at is not null
on conflict do nothing;

-- Subscriptions -----------------------------------------------------------------------------------------------------

alter table credits.accounts
  add column time_zone text not null default 'UTC';
comment on column credits.accounts.time_zone is 'Where its months begin and end: anniversaries of internal plans.';

alter table credits.plans
  add column trial_credits     numeric not null default 0,
  add column rollover          text    not null default 'none',
  add column rollover_cap      numeric,
  add column stripe_product_id text    constraint plans_one_per_product unique,
  add column stripe_price_ids  text[]  not null default '{}',
  add constraint plans_trial_credits_is_an_amount check (
    trial_credits >= 0 and trial_credits < 1e12 and trial_credits = round(trial_credits, 6)),
  add constraint plans_rollover_is_known check (rollover in ('none', 'all', 'cap')),
  add constraint plans_rollover_cap_is_an_amount check (
    rollover_cap > 0 and rollover_cap < 1e12 and rollover_cap = round(rollover_cap, 6)),
  add constraint plans_rollover_has_its_cap check ((rollover = 'cap') = (rollover_cap is not null));
comment on column credits.plans.trial_credits is 'Credits for a trial, once; they end with it.';
comment on column credits.plans.rollover is
  'What becomes of unspent plan credits at the end of a month: none expire, all stay, or as much as rollover_cap stays.';
comment on column credits.plans.stripe_price_ids is 'Prices of Stripe that sell this plan, current and former ones.';

create table credits.subscription_states (
  state       text    primary key,
  may_spend   boolean not null,
  may_receive boolean not null,
  terminal    boolean not null,
  rank        integer not null,
  summary     text    not null
);
comment on table credits.subscription_states is 'The states of a subscription and what they allow.';
comment on column credits.subscription_states.may_receive is 'Whether the monthly credits of the plan go on.';
comment on column credits.subscription_states.rank is
  'Of several subscriptions of an account the one with the lowest rank speaks for it.';

create table credits.subscription_transitions (
  from_state text not null references credits.subscription_states,
  to_state   text not null references credits.subscription_states,
  effect     text not null,
  primary key (from_state, to_state),
  constraint subscription_transitions_move check (from_state <> to_state)
);
comment on table credits.subscription_transitions is 'The moves that are foreseen, and the function that each of them calls.';

create table credits.subscriptions (
  account_id           text        not null references credits.accounts,
  subscription_id      text        not null,
  source               text        not null,
  state                text        not null default 'none' references credits.subscription_states,
  status               text,
  plan                 text        references credits.plans (code),
  customer_id          text,
  price_id             text,
  quantity             bigint,
  anchor_at            timestamptz not null,
  period_start         timestamptz,
  period_end           timestamptz,
  trial_end            timestamptz,
  cancel_at            timestamptz,
  cancel_at_period_end boolean     not null default false,
  ended_at             timestamptz,
  collection_paused    boolean     not null default false,
  past_due_at          timestamptz,
  past_due_words       timestamptz[] not null default '{}',
  well_at              timestamptz,
  highest_credits      numeric,
  pending_plan         text        references credits.plans (code),
  pending_at           timestamptz,
  livemode             boolean,
  created_at           timestamptz not null,
  primary key (account_id, subscription_id),
  constraint subscriptions_source_is_known check (source in ('stripe', 'internal')),
  constraint subscriptions_status_is_stripes check ((source = 'stripe') = (status is not null)),
  constraint subscriptions_pending_is_whole check (num_nulls(pending_plan, pending_at) in (0, 2)),
  constraint subscriptions_grace_is_of_past_due check (past_due_at is null or state = 'past_due')
);
create index subscriptions_by_id on credits.subscriptions (subscription_id);
create index subscriptions_pending on credits.subscriptions (pending_at) where pending_at is not null;
comment on table credits.subscriptions is
  'What an account subscribes to: the subscriptions of Stripe, and at most one plan of our own (subscription_id internal).';
comment on column credits.subscriptions.status is 'Stripe''s own word, mirrored; it may be one that we do not know.';
comment on column credits.subscriptions.anchor_at is 'The original start, from which every anniversary is counted.';
comment on column credits.subscriptions.past_due_words is
  'The moments at which Stripe said past_due since well_at, so that grace counts from the first of them in any order.';
comment on column credits.subscriptions.well_at is 'The last moment at which Stripe said anything else.';
comment on column credits.subscriptions.highest_credits is
  'Of an internal plan: the largest monthly credits that this period has seen. Only what exceeds it is granted on a change.';
comment on column credits.subscriptions.past_due_at is 'Since when it is past due, as far as is known: grace counts from here.';

create table credits.subscription_items (
  account_id      text    not null,
  subscription_id text    not null,
  item_id         text    not null,
  price_id        text,
  product_id      text,
  quantity        bigint,
  period_start    timestamptz,
  period_end      timestamptz,
  primary key (account_id, subscription_id, item_id),
  foreign key (account_id, subscription_id) references credits.subscriptions (account_id, subscription_id) on delete cascade
);
comment on table credits.subscription_items is 'The prices that a subscription of Stripe is made of.';

create table credits.subscription_history (
  account_id      text        not null,
  history_id      bigint      generated always as identity,
  subscription_id text        not null,
  from_state      text        not null references credits.subscription_states,
  to_state        text        not null references credits.subscription_states,
  plan            text,
  unexpected      boolean     not null default false,
  foreseen_from   text        generated always as (case when unexpected or from_state = to_state then null else from_state end) stored,
  cause           text,
  created_at      timestamptz not null,
  primary key (account_id, history_id),
  foreign key (account_id, subscription_id) references credits.subscriptions (account_id, subscription_id),
  constraint history_only_legal_moves foreign key (foreseen_from, to_state)
    references credits.subscription_transitions (from_state, to_state)
);
create index subscription_history_of on credits.subscription_history (account_id, subscription_id);
comment on table credits.subscription_history is 'Every move of every subscription, and every change of an internal plan (from_state = to_state).';
comment on column credits.subscription_history.unexpected is
  'Stripe made a move that no row of subscription_transitions foresees. Stripe is the truth, so it was followed.';
comment on column credits.subscription_history.cause is 'The event or the verb that made it move.';

-- What entitles to credits: each paid line of an invoice. A line of a month or less is one slice; a longer one is a slice
-- for each month. No foreign key to the subscription: an invoice may come before it.
create table credits.allowances (
  account_id      text        not null references credits.accounts,
  allowance_id    text        not null,
  subscription_id text        not null,
  invoice_id      text        not null,
  line_id         text        not null,
  invoiced_at     bigint      not null,
  item_id         text        not null,
  price_id        text,
  plan            text,
  kind            credits.grant_kind not null,
  sign            integer     not null,
  sliced          boolean     not null,
  unit_credits    numeric     not null,
  quantity        numeric     not null,
  credits         numeric     not null,
  first_credits   numeric     not null,
  anchor_at       timestamptz not null,
  period_start    timestamptz not null,
  period_end      timestamptz not null,
  slice_end       timestamptz not null,
  expires_at      timestamptz,
  created_at      timestamptz not null,
  primary key (account_id, allowance_id),
  constraint allowances_sign_is_one check (sign in (-1, 1)),
  constraint allowances_are_amounts check (credits >= 0 and first_credits >= 0 and first_credits <= credits)
);
create index allowances_of_subscription on credits.allowances (account_id, subscription_id);
create index allowances_of_invoice on credits.allowances (invoice_id);
comment on table credits.allowances is
  'What each paid line of an invoice entitles to, frozen when it was paid; lines that give back have sign -1.';
comment on column credits.allowances.unit_credits is 'Credits of one unit of the price for one interval, at most a month.';
comment on column credits.allowances.credits is 'Credits of a full slice: unit_credits x quantity.';
comment on column credits.allowances.first_credits is
  'Credits of the first slice: pro rata of its time, less the lines of the same invoice that give back.';
comment on column credits.allowances.slice_end is 'End of the first slice; later ones follow month by month, counted from anchor_at.';
comment on column credits.allowances.expires_at is 'When the first slice expires; null is never.';

create table credits.plan_grants (
  account_id      text        not null,
  grant_id        bigint      not null,
  subscription_id text        not null,
  allowance_id    text        not null,
  invoice_id      text,
  slice           integer     not null,
  period_start    timestamptz not null,
  period_end      timestamptz not null,
  moved           credits.part not null default 0,
  primary key (account_id, grant_id),
  foreign key (account_id, grant_id) references credits.grants (account_id, grant_id) on delete cascade
);
create index plan_grants_of_subscription on credits.plan_grants (account_id, subscription_id, period_end);
create index plan_grants_of_invoice on credits.plan_grants (invoice_id) where invoice_id is not null;
comment on table credits.plan_grants is
  'The grants that a subscription made: slices of allowances, months of an internal plan (allowance_id plan), and what rolled over (rollover).';
comment on column credits.plan_grants.moved is
  'What the line had to leave to an earlier line of the period, whose invoice came later.';
comment on column credits.plan_grants.period_end is 'End of the slice; the next one starts here.';

-- Accounts that were opened with a plan have it as a subscription of their own from now on. The states are rows that are
-- code; this one is needed before they are.
insert into credits.subscription_states (state, may_spend, may_receive, terminal, rank, summary)
values ('active', true, true, false, 10, '');
insert into credits.subscriptions (account_id, subscription_id, source, state, plan, anchor_at, period_start, period_end, created_at)
select a.account_id, 'plan-1', 'internal', 'active', a.plan, a.created_at, a.created_at,
       (a.created_at at time zone 'UTC' + interval '1 month') at time zone 'UTC', clock_timestamp()
  from credits.accounts a
 where a.plan is not null;
insert into credits.plan_grants (account_id, grant_id, subscription_id, allowance_id, slice, period_start, period_end)
select g.account_id, g.grant_id, s.subscription_id, 'plan', 0, s.period_start, s.period_end
  from credits.grants g
  join credits.subscriptions s on s.account_id = g.account_id and g.source = 'plan:' || s.plan and g.expires_at = s.period_end
 where g.kind = 'plan';
update credits.balances b
   set next_due_at = least(b.next_due_at, s.period_end)
  from credits.subscriptions s
 where s.account_id = b.account_id;

-- What callers get --------------------------------------------------------------------------------------------------

create type credits.subscription_state_result as (
  account_id text, state text, status text, plan text, may_spend boolean, may_receive boolean, source text,
  subscription_id text, period_start timestamptz, period_end timestamptz, trial_end timestamptz, cancel_at timestamptz,
  pending_plan text, pending_at timestamptz, grace_until timestamptz, as_of timestamptz, stale boolean);
create type credits.stripe_request_result as (
  request_id bigint, purpose text, ref text, state text, method text, path text, params jsonb);

-- What is known of the payments of one session or invoice.
create type credits.payment_totals as (captured bigint, refunded bigint, lost bigint, open bigint);

-- A month of something longer, and a slice that an account is entitled to.
create type credits.slice as (
  slice integer, period_start timestamptz, period_end timestamptz, previous_start timestamptz);
create type credits.line_share as (allowance_id text, place bigint, target numeric, granted numeric, parts bigint);
create type credits.wanted_slice as (
  subscription_id text, allowance_id text, invoice_id text, slice integer, amount numeric, kind text, plan text,
  period_start timestamptz, period_end timestamptz, key text);

-- What became of an event, before it is written down.
create type credits.event_verdict as (
  status text, reason text, error text, waits_for text, effects jsonb, shadow boolean, busy boolean);

-- Stripe's objects as the handlers see them, whatever the API version. A notice is an event, or an answer to a retrieve.
create type credits.event_shape as (
  type text, thin boolean, livemode boolean, api_version text, stripe_account text, created_at timestamptz,
  object_id text);
create type credits.stripe_notice as (
  event_id text, type text, kind text, object_id text, at bigint, object jsonb, previous jsonb, retrieved boolean);
create type credits.owner_shape as (
  customer_id text, account_id text, client_reference_id text, subscription_id text);
create type credits.session_shape as (
  session_id text, mode text, status text, payment_status text, amount_total bigint, amount_before bigint, currency text,
  livemode boolean, package text, quantity integer, payment_intent_id text, customer_id text, subscription_id text);
create type credits.subscription_shape as (
  subscription_id text, status text, customer_id text, livemode boolean, period_start timestamptz,
  period_end timestamptz, anchor_at timestamptz, trial_end timestamptz, cancel_at timestamptz,
  cancel_at_period_end boolean, ended_at timestamptz, collection_paused boolean, schedule_id text);
create type credits.item_shape as (
  item_id text, price_id text, product_id text, quantity bigint, metered boolean, price jsonb, period_start timestamptz,
  period_end timestamptz);
create type credits.schedule_shape as (
  schedule_id text, subscription_id text, status text, next_at timestamptz, next_price_id text);
create type credits.invoice_shape as (
  invoice_id text, status text, paid boolean, created_at bigint, customer_id text, subscription_id text, amount_paid bigint,
  total bigint, currency text, attempt_count bigint, payment_id text, lines_complete boolean);
create type credits.line_shape as (
  line_id text, price_id text, product_id text, quantity numeric, amount bigint, item_id text, subscription_id text,
  period_start timestamptz, period_end timestamptz, price jsonb);
create type credits.price_shape as (
  price_id text, product_id text, unit_amount numeric, interval_unit text, interval_count integer, metered boolean,
  credits text, trial_credits text);
create type credits.charge_shape as (
  charge_id text, payment_intent_id text, invoice_id text, customer_id text, captured bigint, refunded bigint, currency text);
create type credits.refund_shape as (
  refund_id text, charge_id text, payment_intent_id text, amount bigint, currency text, status text);
create type credits.dispute_shape as (
  dispute_id text, charge_id text, payment_intent_id text, amount bigint, currency text, status text);

do $$
declare
  v_table text;
begin
  foreach v_table in array array['stripe_endpoints', 'stripe_objects', 'stripe_customers', 'stripe_payments', 'clawbacks',
    'stripe_requests', 'notifications', 'subscription_states', 'subscription_transitions', 'subscriptions',
    'subscription_items', 'subscription_history', 'allowances', 'plan_grants'] loop
    execute format('alter table credits.%I enable row level security', v_table);
  end loop;
end $$;
