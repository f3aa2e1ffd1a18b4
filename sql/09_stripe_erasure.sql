-- What Stripe sent of an account that is erased: payloads go, objects keep the fields that the ledger is checked against.

-- Ids of Stripe that are this account's and nobody else's.
create or replace function credits._stripe_ids(account_id text)
returns text[]
language sql
stable
as $$
  select array_agg(distinct n.id)
    from (select c.customer_id from credits.stripe_customers c where c.account_id = _stripe_ids.account_id
          union all
          select unnest(array[p.stripe_session_id, p.stripe_payment_intent_id, p.stripe_customer_id])
            from credits.purchases p where p.account_id = _stripe_ids.account_id
          union all
          select p.payment_id from credits.stripe_payments p where p.account_id = _stripe_ids.account_id
          union all
          select s.subscription_id
            from credits.subscriptions s where s.account_id = _stripe_ids.account_id and s.source = 'stripe'
          union all
          select c.session_id from credits.checkouts c where c.account_id = _stripe_ids.account_id) n (id)
   where n.id ~ '^[a-z]+_.'
$$;

-- What mentions one of those ids, or was marked with the account_id.
create or replace function credits._mentions(
  document   text,
  ids        text[],
  account_id text
)
returns boolean
language sql
immutable
as $$
  select exists (select from unnest(_mentions.ids) i (id) where position('"' || i.id || '"' in _mentions.document) > 0)
         or exists (select from unnest(array['account_id', 'client_reference_id']) k (name), unnest(array['', ' ']) s (space)
                     where position(format('"%s":%s%s', k.name, s.space, to_json(_mentions.account_id))
                                    in _mentions.document) > 0)
$$;

create or replace function credits._erase_stripe(
  account_id text,
  out objects bigint, out events bigint, out requests bigint
)
language plpgsql
as $$
declare
  v_ids text[] := credits._stripe_ids(_erase_stripe.account_id);
begin
  v_ids := v_ids || array(  -- what came too late for the account has bound no customer, and paid for nothing
    select n.object_id
      from credits.stripe_events e, credits._shape_homes((credits._shape_notice(e)).object, null) n
     where (credits._is_of_closed(e.error) or e.reason = 'refunded') and e.payload is not null
       and n.kind not in ('price', 'product') and credits._mentions(e.payload, v_ids, _erase_stripe.account_id));
  v_ids := v_ids || array(  -- refunds and disputes name the payment or the charge alone
    select o.object_id
      from credits.stripe_objects o
     where o.kind in ('charge', 'payment_intent')
       and (o.ref = any (v_ids) or credits._mentions(o.snapshot::text, v_ids, _erase_stripe.account_id)));
  update credits.stripe_objects o
     set snapshot = credits._bare(o.snapshot), previous = null
   where (o.object_id = any (v_ids) or o.ref = any (v_ids)  -- a card that was detached no longer names its customer
          or credits._mentions(o.snapshot::text, v_ids, _erase_stripe.account_id))
     and (o.previous is not null or o.snapshot <> credits._bare(o.snapshot));
  get diagnostics objects = row_count;
  update credits.stripe_gaps g
     set object = credits._bare(g.object)
   where credits._mentions(g.object::text, v_ids, _erase_stripe.account_id) and g.object <> credits._bare(g.object);
  update credits.stripe_events e  -- money to be given back stays to be seen
     set payload = credits._bare(credits._read_payload(e.payload))::text
   where e.status = 'failed' and credits._is_of_closed(e.error)
     and credits._mentions(e.payload, v_ids, _erase_stripe.account_id);
  update credits.stripe_events e
     set payload = null, archived_at = credits.now(), effects = null, error = null, next_attempt_at = null, waits_for = null,
         reason = case when e.status in ('applied', 'ignored') then e.reason else 'erased' end,
         status = case when e.status in ('applied', 'ignored') then e.status else 'ignored' end
   where e.payload is not null and not (e.status = 'failed' and credits._is_of_closed(e.error))
     and credits._mentions(e.payload, v_ids, _erase_stripe.account_id);
  get diagnostics events = row_count;
  update credits.stripe_requests r
     set response = null
   where r.response is not null and r.state not in ('queued', 'sent')
     and credits._mentions(r.response::text, v_ids, _erase_stripe.account_id);
  get diagnostics requests = row_count;
end $$;

-- An object of Stripe with the fields alone that 61_stripe_shapes and its callers read: ids, amounts, moments, states.
create or replace function credits._bare(value jsonb)
returns jsonb
language plpgsql
immutable
as $$
begin
  return case jsonb_typeof(_bare.value)
    when 'array'  then (select coalesce(jsonb_agg(credits._bare(e.value) order by e.place), '[]')
                          from jsonb_array_elements(_bare.value) with ordinality e (value, place))
    when 'object' then (select coalesce(jsonb_object_agg(m.key, credits._bare(m.value)), '{}')
                          from jsonb_each(_bare.value) m
                         where m.key = any (credits._bare_names()))
    else _bare.value end;
end $$;

create or replace function credits._bare_names()
returns text[]
language sql
immutable
as $$
  select string_to_array(
    'account account_id advice_code amount amount_captured amount_discount amount_paid amount_received '
    'amount_refunded amount_shipping amount_subtotal amount_tax amount_total attempt_count billing_cycle_anchor '
    'breakdown cancel_at cancel_at_period_end captured charge checkout_id client_reference_id code coupon created '
    'credited_items credits credits_included currency current_period_end current_period_start current_phase '
    'customer data decline_code deleted discount discounts end end_date ended_at expires_at has_more id '
    'includedCredits interval interval_count invoice invoice_item_details items last_payment_error lines livemode '
    'metadata mode monthly_credits object package paid parent pause_collection payment payment_intent '
    'payment_status payments period phases plan price price_details price_id pricing product promotion_code '
    'proration proration_details quantity quantity_decimal recurring refund_request_id schedule source start '
    'start_date status subscription subscription_details subscription_item subscription_item_details top_up_id '
    'total total_details trial_credits trial_end type unit_amount unit_amount_decimal usage_type', ' ')
$$;
