-- What Stripe is asked for on behalf of a buyer: Checkout, the portal, refunds; and what a purchase came to.
-- Lock order: as before, rows of stripe_objects and stripe_payments, then the account, then what belongs to it.
set local role credits_owner;

alter table credits.purchases
  add column amount_subtotal bigint,
  add column amount_discount bigint not null default 0,
  add column amount_tax      bigint not null default 0,
  add column coupons         text[] not null default '{}',
  add column promotion_codes text[] not null default '{}';
comment on column credits.purchases.amount_subtotal is
  'What the goods cost before discounts, tax and shipping: frozen. Null for purchases older than this column.';
comment on column credits.purchases.amount_discount is 'As Stripe reports it, in the minor unit of currency; likewise amount_tax.';
comment on column credits.purchases.coupons is 'Ids of the coupons that were used, as far as Stripe names them; likewise promotion_codes.';
create index purchases_by_number on credits.purchases (purchase_id);
create index purchases_by_completion on credits.purchases (completed_at) where completed_at is not null;

create table credits.checkouts (
  checkout_id text        primary key,
  account_id  text        not null references credits.accounts,
  kind        text        not null,
  key         text        not null,
  fingerprint jsonb       not null,
  request_id  bigint      not null,
  purchase_id bigint,
  session_id  text        constraint checkouts_one_per_session unique,
  status      text,
  url         text,
  expires_at  timestamptz,
  created_at  timestamptz not null,
  constraint checkouts_one_per_key unique (account_id, kind, key),
  constraint checkouts_one_per_request unique (request_id),
  constraint checkouts_kind_is_known check (kind in ('checkout', 'portal')),
  constraint checkouts_portal_buys_nothing check (kind = 'checkout' or purchase_id is null),
  foreign key (account_id, purchase_id) references credits.purchases (account_id, purchase_id)
);
create index checkouts_by_purchase on credits.checkouts (account_id, purchase_id) where purchase_id is not null;
comment on table credits.checkouts is 'Sessions of Checkout and of the customer portal that Stripe was asked for, each once per key.';
comment on column credits.checkouts.checkout_id is 'In the metadata of the session, so that its events find this row before its answer does.';
comment on column credits.checkouts.status is 'Stripe''s word of the session: open, complete, expired. Null until it is known.';
comment on column credits.checkouts.url is 'Where the buyer goes. No secret, but it ends at expires_at.';

create table credits.refund_requests (
  refund_request_id text        primary key,
  account_id        text        not null references credits.accounts,
  purchase_id       bigint      not null,
  key               text        not null,
  fingerprint       jsonb       not null,
  request_id        bigint      not null,
  amount            bigint      not null,
  reason            text,
  refund_id         text,
  created_at        timestamptz not null,
  constraint refund_requests_one_per_key unique (account_id, key),
  constraint refund_requests_one_per_request unique (request_id),
  constraint refund_requests_amount_is_positive check (amount > 0),
  foreign key (account_id, purchase_id) references credits.purchases (account_id, purchase_id)
);
create index refund_requests_by_purchase on credits.refund_requests (account_id, purchase_id);
comment on table credits.refund_requests is 'Refunds of purchases that Stripe was asked for, each once per key.';
comment on column credits.refund_requests.amount is 'In the minor unit of the purchase''s currency.';
comment on column credits.refund_requests.refund_id is
  'Stripe''s refund, once its answer or its event is known. Until then the amount is held back from other refunds.';

create type credits.stripe_session_result as (
  request_id bigint, state text, purchase_id bigint, session_id text, url text, expires_at timestamptz, error jsonb,
  replayed boolean);
create type credits.refund_request_result as (
  request_id bigint, state text, purchase_id bigint, amount bigint, currency text, refundable bigint, refund_id text,
  error jsonb, replayed boolean);
create type credits.purchase_total as (
  name text, currency text, livemode boolean, purchases bigint, credits numeric, amount bigint, amount_discount bigint,
  amount_tax bigint, amount_refunded bigint, amount_disputed bigint);

alter type credits.session_shape
  add attribute checkout_id text, add attribute url text, add attribute expires_at timestamptz,
  add attribute amount_discount bigint, add attribute amount_tax bigint, add attribute coupons text[],
  add attribute promotion_codes text[];
alter type credits.refund_shape add attribute refund_request_id text;

alter table credits.checkouts enable row level security;
alter table credits.refund_requests enable row level security;
