set local role credits_owner;
drop type credits.subscription_state_result, credits.stripe_request_result, credits.event_verdict, credits.payment_totals, credits.line_share, credits.slice, credits.wanted_slice,
  credits.event_shape, credits.stripe_notice,
  credits.owner_shape, credits.session_shape, credits.subscription_shape, credits.item_shape, credits.schedule_shape, credits.invoice_shape,
  credits.line_shape, credits.price_shape, credits.charge_shape, credits.refund_shape, credits.dispute_shape;
drop table credits.plan_grants, credits.allowances, credits.subscription_history, credits.subscription_items,
  credits.subscriptions, credits.subscription_transitions, credits.subscription_states, credits.notifications,
  credits.stripe_requests, credits.clawbacks, credits.stripe_payments, credits.stripe_customers, credits.stripe_objects,
  credits.stripe_endpoints;
alter table credits.plans
  drop column trial_credits, drop column rollover, drop column rollover_cap, drop column stripe_product_id,
  drop column stripe_price_ids;
alter table credits.accounts drop column time_zone;
alter table credits.purchases drop column amount_refunded, drop column amount_disputed;
drop index credits.stripe_events_waiting, credits.stripe_events_by_time;
-- An archived event has no payload any more, which the older schema cannot hold.
update credits.stripe_events set payload = '', archived_at = null where payload is null;
alter table credits.stripe_events
  drop constraint stripe_events_archive_has_no_payload,
  drop constraint stripe_events_archive_is_done,
  drop column object_id, drop column waits_for, drop column effects, drop column archived_at,
  alter column payload set not null;
alter type credits.handler_result drop attribute effects;
alter type credits.stripe_event_summary
  drop attribute object_id, drop attribute waits_for, drop attribute effects, drop attribute archived_at;
create type credits.event_shape as (
  type text, livemode boolean, api_version text, stripe_account text, created_at timestamptz);
create type credits.session_shape as (
  session_id text, mode text, payment_status text, amount_total bigint, amount_before bigint, currency text,
  livemode boolean, account_id text, client_reference_id text, package text, quantity integer,
  payment_intent_id text, customer_id text);
