-- Charges, refunds, disputes and cards as Stripe sends them, read into shapes.

create or replace function credits._shape_charge(object jsonb)
returns credits.charge_shape
language plpgsql
immutable
as $$
begin
  return (
    select row(o ->> 'id', credits._ref(o -> 'payment_intent'), credits._ref(o -> 'invoice'), credits._ref(o -> 'customer'),
               coalesce(credits._whole(o -> 'amount_captured'),
                        case when credits._flag(o -> 'captured') then credits._whole(o -> 'amount') else 0 end),
               coalesce(credits._whole(o -> 'amount_refunded'), 0), lower(o ->> 'currency'))::credits.charge_shape
      from (select _shape_charge.object) x (o));
end $$;

create or replace function credits._shape_refund(object jsonb)
returns credits.refund_shape
language sql
immutable
as $$
  select row(o ->> 'id', credits._ref(o -> 'charge'), credits._ref(o -> 'payment_intent'), credits._whole(o -> 'amount'),
             lower(o ->> 'currency'), o ->> 'status',
             nullif(o #>> '{metadata,refund_request_id}', ''))::credits.refund_shape
    from (select _shape_refund.object) x (o)
$$;

create or replace function credits._shape_dispute(object jsonb)
returns credits.dispute_shape
language sql
immutable
as $$
  select row(o ->> 'id', credits._ref(o -> 'charge'), credits._ref(o -> 'payment_intent'), credits._whole(o -> 'amount'),
             lower(o ->> 'currency'), o ->> 'status')::credits.dispute_shape
    from (select _shape_dispute.object) x (o)
$$;

-- A payment. What our metadata say of it: whose it is, and which attempt of automatic top-up asked for it.
create or replace function credits._shape_intent(object jsonb)
returns credits.intent_shape
language sql
immutable
as $$
  select row(o ->> 'id', o ->> 'status', credits._whole(o -> 'amount_received'), lower(o ->> 'currency'),
             credits._ref(o -> 'customer'), credits._flag(o -> 'livemode'), nullif(o #>> '{metadata,account_id}', ''),
             nullif(o #>> '{metadata,top_up_id}', ''), o #>> '{last_payment_error,code}',
             o #>> '{last_payment_error,decline_code}', o #>> '{last_payment_error,advice_code}')::credits.intent_shape
    from (select _shape_intent.object) x (o)
$$;

-- The payment inside an answer that says that it was declined.
create or replace function credits._declined_payment(answer jsonb)
returns jsonb
language sql
immutable
as $$
  select case when jsonb_typeof(p) = 'object' then p end from (select _declined_payment.answer #> '{error,payment_intent}') x (p)
$$;

create or replace function credits._shape_declined(answer credits.stripe_notice)
returns credits.stripe_notice
language sql
immutable
as $$
  select credits._shape_part(_shape_declined.answer, 'payment_intent',
                             credits._declined_payment((_shape_declined.answer).object))
$$;

create or replace function credits._default_card(customer jsonb)
returns text
language sql
immutable
as $$
  select coalesce(credits._ref(_default_card.customer #> '{invoice_settings,default_payment_method}'),
                  credits._ref(_default_card.customer -> 'default_source'))
$$;

-- When Stripe made it, in seconds. A card is attached as it is made, or soon after, and once.
create or replace function credits._made_at(object jsonb)
returns bigint
language sql
immutable
as $$
  select credits._whole(_made_at.object -> 'created')
$$;

-- Whose card it is, or was: a detached one names its customer only in what it was before.
create or replace function credits._card_customer(notice credits.stripe_notice)
returns text
language sql
immutable
as $$
  select coalesce(credits._ref((_card_customer.notice).object -> 'customer'),
                  credits._ref((_card_customer.notice).previous -> 'customer'))
$$;
