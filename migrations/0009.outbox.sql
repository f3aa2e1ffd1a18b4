-- Requests to Stripe are claimed by workers and executed.
set local role credits_owner;

alter table credits.stripe_requests add column worker text;
comment on column credits.stripe_requests.worker is 'Who claimed it last.';
comment on column credits.stripe_requests.attempts is 'How often it was sent and answered, or lost. An answer that the key is wrong does not count.';
comment on column credits.stripe_requests.locked_until is 'Until then it is its worker''s. Later anybody may claim it again, under the same idempotency key.';
comment on column credits.stripe_requests.stripe_version is 'The version of Stripe''s API that its first worker spoke; later ones repeat it.';
comment on column credits.stripe_requests.response is 'Stripe''s answer, without secrets and what tells of cards and bank accounts.';

create index stripe_requests_in_flight on credits.stripe_requests (locked_until) where state = 'sent';
create index stripe_requests_in_order on credits.stripe_requests (ref, request_id)
  where state in ('queued', 'sent') and method <> 'get';

create table credits.stripe_queue_stop (
  only_row   boolean     primary key default true,
  stopped_at timestamptz not null,
  until      timestamptz not null,
  request_id bigint      not null,
  constraint stripe_queue_stop_is_one_row check (only_row)
);
comment on table credits.stripe_queue_stop is
  'There while Stripe refuses our key: nothing is sent until the moment it names, then one request, to try. No row, no stop.';
comment on column credits.stripe_queue_stop.request_id is 'The request whose answer said so last.';
alter table credits.stripe_queue_stop enable row level security;

create type credits.claimed_stripe_request as (
  request_id bigint, attempt integer, method text, path text, params jsonb, idempotency_key text, stripe_version text,
  stripe_account text, locked_until timestamptz);
