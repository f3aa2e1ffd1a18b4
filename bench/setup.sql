-- What any prepaid balance needs at the least: a narrow row that changes and a row that says why.
create schema floor;
create table floor.balances (
  account_id text    primary key,
  seq        bigint  not null default 0,
  balance    numeric not null
) with (fillfactor = 50);
create table floor.entries (
  account_id    text        not null,
  seq           bigint      not null,
  created_at    timestamptz not null default now(),
  amount        numeric     not null,
  balance_after numeric     not null,
  primary key (account_id, seq)
);

-- An event of Stripe's usual size: the checkout session of a starter package, paid.
create function floor.paid_session(account bigint, session bigint)
returns text
language sql
immutable
as $$
  select replace(replace('{
  "id": "evt_<session>", "object": "event", "api_version": "2025-08-27.basil", "created": 1760000000,
  "data": {"object": {
    "id": "cs_test_<session>", "object": "checkout.session", "adaptive_pricing": {"enabled": true},
    "after_expiration": null, "allow_promotion_codes": null, "amount_subtotal": 1000, "amount_total": 1000,
    "automatic_tax": {"enabled": false, "liability": null, "provider": null, "status": null},
    "billing_address_collection": null, "cancel_url": "https://example.com/credits",
    "client_reference_id": "acct_<account>", "client_secret": null, "collected_information": null, "consent": null,
    "consent_collection": null, "created": 1760000000, "currency": "usd", "currency_conversion": null,
    "custom_fields": [],
    "custom_text": {"after_submit": null, "shipping_address": null, "submit": null,
                    "terms_of_service_acceptance": null},
    "customer": null, "customer_creation": "if_required",
    "customer_details": {"address": {"city": null, "country": "DE", "line1": null, "line2": null,
                                     "postal_code": null, "state": null},
                         "email": "somebody@example.com", "name": "Some Body", "phone": null,
                         "tax_exempt": "none", "tax_ids": []},
    "customer_email": null, "discounts": [], "expires_at": 1760086400, "invoice": null,
    "invoice_creation": {"enabled": false, "invoice_data": {"account_tax_ids": null, "custom_fields": null,
      "description": null, "footer": null, "issuer": null, "metadata": {}, "rendering_options": null}},
    "livemode": false, "locale": null, "metadata": {"account_id": "acct_<account>", "package": "starter"},
    "mode": "payment", "origin_context": null, "payment_intent": "pi_<session>", "payment_link": null,
    "payment_method_collection": "if_required", "payment_method_configuration_details": null,
    "payment_method_options": {"card": {"request_three_d_secure": "automatic"}}, "payment_method_types": ["card"],
    "payment_status": "paid", "permissions": null, "phone_number_collection": {"enabled": false},
    "recovered_from": null, "saved_payment_method_options": null, "setup_intent": null,
    "shipping_address_collection": null, "shipping_cost": null, "shipping_options": [], "status": "complete",
    "submit_type": null, "subscription": null, "success_url": "https://example.com/thanks",
    "total_details": {"amount_discount": 0, "amount_shipping": 0, "amount_tax": 0}, "ui_mode": "hosted",
    "url": null, "wallet_options": null}},
  "livemode": false, "pending_webhooks": 1, "request": {"id": null, "idempotency_key": null},
  "type": "checkout.session.completed"
}', '<session>', session::text), '<account>', account::text)
$$;

-- The stream of Stripe's events, of stream.py. At any time as many pairs of customers are under way as there are steps, each
-- at another one, so that any stretch of the stream is the same mixture, and two events of one account are far apart.
-- timings holds how long each took inside the database, without the commit.
create table floor.stream (
  shape   text,
  step    integer,
  name    text not null,
  payload text not null,
  primary key (shape, step)
);
create unlogged table floor.timings (
  name    text,
  outcome text,
  ms      float
);
create sequence floor.position minvalue 0 start 0;

create function floor.event_of(payload text, pair bigint, accounts bigint)
returns text
language sql
immutable
as $$
  select replace(replace(replace(payload, '<n>', pair::text), '<old>', 'acct_' || 2 * pair % accounts + 1),
                 '<new>', 'acct_' || (2 * pair + 1) % accounts + 1)
$$;

create function floor.apply_next(accounts bigint)
returns text
language plpgsql
as $$
declare
  v_steps    bigint := (select count(*) from floor.stream s where s.shape = 'new');
  v_position bigint;
  v_pair     bigint;
  v_name     text;
  v_payload  text;
  v_started  timestamptz;
  v_outcome  text;
begin
  loop
    v_position := nextval('floor.position');
    v_pair     := v_position / v_steps - v_position % v_steps;
    select s.name, s.payload into v_name, v_payload
      from floor.stream s
     where s.shape = case v_pair % 2 when 0 then 'old' else 'new' end and s.step = v_position % v_steps;
    exit when found and v_pair >= 0;
  end loop;
  v_payload := floor.event_of(v_payload, v_pair, accounts);
  v_started := clock_timestamp();
  v_outcome := (credits.receive_stripe_event('bench', v_payload)).outcome;
  insert into floor.timings values (v_name, v_outcome, 1000 * extract(epoch from clock_timestamp() - v_started));
  return v_outcome;
end $$;

grant usage on schema floor to credits_service;
grant select, insert, update on all tables in schema floor to credits_service;
grant usage on sequence floor.position to credits_service;
