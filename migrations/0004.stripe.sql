-- What is sold, and what Stripe tells about it.
set local role credits_owner;

create table credits.packages (
  code              text        primary key,
  name              text        not null,
  description       text,
  credits           numeric     not null,
  price             bigint      not null,
  currency          text        not null,
  discount_percent  numeric     not null default 0,
  popular           boolean     not null default false,
  display_order     integer     not null default 0,
  active            boolean     not null default true,
  stripe_product_id text,
  stripe_price_id   text        constraint packages_one_per_price unique,
  created_at        timestamptz not null default clock_timestamp(),
  constraint packages_code_is_short check (code <> '' and length(code) <= 200),
  constraint packages_credits_is_an_amount check (credits > 0 and credits < 1e12 and credits = round(credits, 6)),
  constraint packages_price_is_not_negative check (price >= 0),
  constraint packages_currency_is_iso check (currency ~ '^[a-z]{3}$'),
  constraint packages_discount_is_a_percentage check (discount_percent >= 0 and discount_percent < 100)
);
comment on table credits.packages is 'Top-ups: credits that are sold at once.';
comment on column credits.packages.price is 'In the minor unit of the currency, as Stripe counts: 1000 is $10.00, or 1000 yen.';
comment on column credits.packages.currency is 'Three lower-case letters, as Stripe writes it.';
comment on column credits.packages.discount_percent is 'Shown to buyers; the price is what is charged.';

create table credits.purchases (
  purchase_id       bigint      generated always as identity,
  account_id        text        not null references credits.accounts,
  package           text        not null references credits.packages (code),
  quantity          integer     not null default 1,
  credits           numeric     not null,
  amount            bigint      not null,
  currency          text        not null,
  status            text        not null default 'pending',
  livemode          boolean     not null default false,
  stripe_session_id        text,
  stripe_payment_intent_id text,
  stripe_customer_id       text,
  grant_id          bigint,
  created_at        timestamptz not null,
  completed_at      timestamptz,
  primary key (account_id, purchase_id),
  constraint purchases_one_per_session unique (account_id, stripe_session_id),
  constraint purchases_quantity_is_positive check (quantity > 0),
  constraint purchases_status_is_known check (status in (
    'pending', 'processing', 'completed', 'failed', 'expired', 'refunded', 'partially_refunded', 'disputed')),
  constraint purchases_completed_has_its_grant check (
    (status in ('completed', 'refunded', 'partially_refunded', 'disputed')) = (grant_id is not null)
    and (grant_id is null) = (completed_at is null)),
  foreign key (account_id, grant_id) references credits.grants (account_id, grant_id)
);
create index purchases_by_customer on credits.purchases (stripe_customer_id);
create index purchases_by_payment_intent on credits.purchases (stripe_payment_intent_id);
comment on table credits.purchases is 'Packages bought, from pending to what became of them.';
comment on column credits.purchases.amount is 'What was paid, tax and discounts included, in the minor unit of currency.';
comment on column credits.purchases.credits is 'Credits bought: frozen, later changes of the package do not touch it.';

-- Unique over all accounts, which the keys of the account tables are not: two deliveries that disagree about the
-- account still grant once.
create table credits.stripe_facts (
  kind       text        not null,
  ref        text        not null,
  account_id text        not null,
  created_at timestamptz not null,
  primary key (kind, ref)
);
comment on table credits.stripe_facts is
  'Each fact of money that has become credits, once: the guard that is taken before the ledger is written.';
comment on column credits.stripe_facts.ref is 'Stripe''s id of the fact, such as that of a Checkout session.';

create table credits.stripe_handlers (
  event_type text primary key,
  handler    text not null,
  summary    text not null
);
comment on table credits.stripe_handlers is
  'The function that applies each type of event. A type without a row is stored and ignored.';

create table credits.stripe_events (
  event_id        text        primary key,
  endpoint        text        not null,
  type            text,
  status          text        not null default 'received',
  reason          text,
  error           text,
  attempts        integer     not null default 0,
  next_attempt_at timestamptz,
  created_at      timestamptz,
  received_at     timestamptz not null,
  applied_at      timestamptz,
  livemode        boolean,
  api_version     text,
  stripe_account  text,
  payload         text        not null,
  constraint stripe_events_status_is_known check (status in ('received', 'applied', 'ignored', 'parked', 'failed')),
  constraint stripe_events_failure_has_its_error check ((status = 'failed') = (error is not null)),
  constraint stripe_events_parked_has_its_reason check (status <> 'parked' or reason is not null)
);
create index stripe_events_to_retry on credits.stripe_events (next_attempt_at) where status in ('parked', 'failed');
comment on table credits.stripe_events is
  'Every event that Stripe delivered, once, and what became of it. The row and its effect commit together.';
comment on column credits.stripe_events.event_id is
  'Stripe''s id; for a body that cannot be read as JSON, sha256: and the hash of its text.';
comment on column credits.stripe_events.endpoint is 'Label of the webhook endpoint whose secret signed it.';
comment on column credits.stripe_events.reason is 'Why it was ignored or parked, as a stable code.';
comment on column credits.stripe_events.created_at is 'When Stripe says it happened, to the second. It orders nothing.';
comment on column credits.stripe_events.payload is 'The raw text, exactly as delivered.';

create type credits.stripe_event_result as (event_id text, outcome text);
create type credits.stripe_event_summary as (
  event_id text, endpoint text, type text, status text, reason text, error text, attempts integer,
  next_attempt_at timestamptz, created_at timestamptz, received_at timestamptz, applied_at timestamptz);
create type credits.handler_result as (status text, reason text);

-- Stripe's objects as the handlers see them, whatever the API version.
create type credits.event_shape as (
  type text, livemode boolean, api_version text, stripe_account text, created_at timestamptz);
create type credits.session_shape as (
  session_id text, mode text, payment_status text, amount_total bigint, amount_before bigint, currency text,
  livemode boolean, account_id text, client_reference_id text, package text, quantity integer,
  payment_intent_id text, customer_id text);

do $$
declare
  v_table text;
begin
  foreach v_table in array array['packages', 'purchases', 'stripe_facts', 'stripe_handlers', 'stripe_events'] loop
    execute format('alter table credits.%I enable row level security', v_table);
  end loop;
end $$;
