-- Each of Stripe's objects as the parts of it that we read, in any API version. How a part is read: 61_stripe_shapes.sql.

-- Checkout ----------------------------------------------------------------------------------------------------------

-- amount_before is what the goods cost: without it, the total with discounts put back and tax and shipping taken out.
create or replace function credits._shape_session(object jsonb)
returns credits.session_shape
language sql
immutable
as $$
  select row(o ->> 'id', o ->> 'mode', o ->> 'status', o ->> 'payment_status',
             credits._whole(o -> 'amount_total'),
             coalesce(credits._whole(o -> 'amount_subtotal'),
                      credits._whole(o -> 'amount_total')
                        + coalesce(credits._whole(o #> '{total_details,amount_discount}'), 0)
                        - coalesce(credits._whole(o #> '{total_details,amount_tax}'), 0)
                        - coalesce(credits._whole(o #> '{total_details,amount_shipping}'), 0)),
             lower(o ->> 'currency'), credits._flag(o -> 'livemode'),
             nullif(o #>> '{metadata,package}', ''),
             case when o #> '{metadata,quantity}' is null then 1
                  when o #>> '{metadata,quantity}' ~ '^[1-9][0-9]{0,5}$' then (o #>> '{metadata,quantity}')::integer end,
             credits._ref(o -> 'payment_intent'), credits._ref(o -> 'customer'),
             credits._ref(o -> 'subscription'),
             nullif(o #>> '{metadata,checkout_id}', ''), nullif(o ->> 'url', ''), credits._moment(o -> 'expires_at'),
             coalesce(credits._whole(o #> '{total_details,amount_discount}'), 0),
             coalesce(credits._whole(o #> '{total_details,amount_tax}'), 0),
             credits._discounts_of(o, 'coupon'), credits._discounts_of(o, 'promotion_code'))::credits.session_shape
    from (select _shape_session.object) x (o)
$$;

-- Whether its payment came to nothing, where that was expanded: the session itself stays complete and unpaid.
create or replace function credits._payment_failed(session jsonb)
returns boolean
language sql
immutable
as $$
  select coalesce(_payment_failed.session #>> '{payment_intent,status}' in ('requires_payment_method', 'canceled'), false)
$$;

-- Ids of the coupons or promotion codes of a session: beside it, and where they were expanded, inside its totals.
create or replace function credits._discounts_of(
  session jsonb,
  field   text
)
returns text[]
language sql
immutable
as $$
  select coalesce(array_agg(distinct r.id order by r.id) filter (where r.id is not null), '{}')
    from (select e from credits._elements(_discounts_of.session -> 'discounts') e
          union all
          select e -> 'discount' from credits._elements(_discounts_of.session #> '{total_details,breakdown,discounts}') e) d (e),
         lateral (select coalesce(credits._ref(d.e #> array['source', _discounts_of.field]),
                                  credits._ref(d.e -> _discounts_of.field))) r (id)
$$;

-- What a session sells, where we did not say so ourselves: its one line.
create or replace function credits._shape_line_items(list jsonb)
returns setof credits.item_shape
language sql
immutable
as $$
  select i ->> 'id', credits._ref(i -> 'price'), credits._ref(i #> '{price,product}'), credits._whole(i -> 'quantity'),
         false, i -> 'price', null::timestamptz, null::timestamptz
    from credits._elements(_shape_line_items.list) i
$$;

-- Prices and subscriptions -------------------------------------------------------------------------------------------

-- The credits of a price or product, as text: whoever reads a number out of it must say what is wrong with it.
create or replace function credits._credits_in(metadata jsonb)
returns text
language sql
immutable
as $$
  select coalesce(m ->> 'credits', m ->> 'includedCredits', m ->> 'credits_included', m ->> 'monthly_credits')
    from (select _credits_in.metadata) x (m)
$$;

-- A price, or a plan of the older API. Of a product only the metadata matters here.
create or replace function credits._shape_price(object jsonb)
returns credits.price_shape
language plpgsql
immutable
as $$
begin
  return (
    select row(o ->> 'id', credits._ref(o -> 'product'),
               coalesce(credits._decimal(o -> 'unit_amount'), credits._decimal(o -> 'unit_amount_decimal'),
                        credits._decimal(o -> 'amount')),
               coalesce(o #>> '{recurring,interval}', o ->> 'interval'),
               coalesce(credits._whole(o #> '{recurring,interval_count}'), credits._whole(o -> 'interval_count'), 1)::integer,
               coalesce(o #>> '{recurring,usage_type}', o ->> 'usage_type') = 'metered',
               credits._credits_in(o -> 'metadata'),
               o #>> '{metadata,trial_credits}')::credits.price_shape
      from (select _shape_price.object) x (o));
end $$;

-- What publish_catalog() writes and compares. "every" is null for a price that is paid once.
create or replace function credits._shown_product(object jsonb)
returns jsonb
language sql
immutable
as $$
  select jsonb_build_object('name', o -> 'name', 'description', o -> 'description', 'active', o -> 'active',
                            'metadata', coalesce(o -> 'metadata', '{}'))
    from (select _shown_product.object) x (o)
$$;

create or replace function credits._shown_price(object jsonb)
returns jsonb
language plpgsql
immutable
as $$
declare
  v_shape credits.price_shape := credits._shape_price(_shown_price.object);
begin
  return (
    select jsonb_build_object('product', v_shape.product_id, 'currency', o -> 'currency', 'unit_amount', v_shape.unit_amount,
                              'every', case when v_shape.metered then 'metered ' else '' end
                                       || case when v_shape.interval_count > 1 then v_shape.interval_count || ' ' else '' end
                                       || v_shape.interval_unit,
                              'active', o -> 'active', 'metadata', coalesce(o -> 'metadata', '{}'),
                              'lookup_key', o -> 'lookup_key', 'tax_behavior', nullif(o ->> 'tax_behavior', 'unspecified'))
      from (select _shown_price.object) x (o));
end $$;

-- The period is that of the item which renews first.
create or replace function credits._shape_subscription(object jsonb)
returns credits.subscription_shape
language plpgsql
immutable
as $$
begin
  return (
    select row(o ->> 'id', o ->> 'status', credits._ref(o -> 'customer'), credits._flag(o -> 'livemode'),
               coalesce(i.period_start, credits._moment(o -> 'current_period_start')),
               coalesce(i.period_end, credits._moment(o -> 'current_period_end')),
               coalesce(credits._moment(o -> 'billing_cycle_anchor'), credits._moment(o -> 'start_date'),
                        credits._moment(o -> 'created')),
               credits._moment(o -> 'trial_end'), credits._moment(o -> 'cancel_at'),
               coalesce(credits._flag(o -> 'cancel_at_period_end'), false),
               credits._moment(o -> 'ended_at'),
               coalesce(jsonb_typeof(o -> 'pause_collection') = 'object', false),
               credits._ref(o -> 'schedule'))::credits.subscription_shape
      from (select _shape_subscription.object) x (o),
           lateral (select min(s.period_start) as period_start, min(s.period_end) as period_end
                      from credits._shape_items(o) s) i);
end $$;

create or replace function credits._shape_items(object jsonb)
returns setof credits.item_shape
language sql
immutable
as $$
  select i ->> 'id',
         coalesce(credits._ref(i -> 'price'), credits._ref(i -> 'plan')),
         coalesce(credits._ref(i #> '{price,product}'), credits._ref(i #> '{plan,product}')),
         credits._whole(i -> 'quantity'),
         coalesce((credits._shape_price(i -> 'price')).metered, (credits._shape_price(i -> 'plan')).metered, false),
         case when jsonb_typeof(i -> 'price') = 'object' then i -> 'price'
              when jsonb_typeof(i -> 'plan') = 'object' then i -> 'plan' end,
         credits._moment(i -> 'current_period_start'), credits._moment(i -> 'current_period_end')
    from credits._elements(_shape_items.object -> 'items') i
$$;

-- A schedule, with the phase that comes after the present one.
create or replace function credits._shape_schedule(object jsonb)
returns credits.schedule_shape
language sql
immutable
as $$
  select row(o ->> 'id', credits._ref(o -> 'subscription'), o ->> 'status', n.starts, n.price_id)::credits.schedule_shape
    from (select _shape_schedule.object) x (o)
    left join lateral (
      select credits._moment(p -> 'start_date') as starts,
             coalesce(credits._ref(p #> '{items,0,price}'), credits._ref(p #> '{items,0,plan}')) as price_id
        from credits._elements(o -> 'phases') p
       where credits._whole(p -> 'start_date') >= coalesce(credits._whole(o #> '{current_phase,end_date}'), 0)
       order by credits._whole(p -> 'start_date')
       limit 1) n on true
$$;

-- Invoices -----------------------------------------------------------------------------------------------------------

create or replace function credits._shape_invoice(object jsonb)
returns credits.invoice_shape
language plpgsql
immutable
as $$
begin
  return (
    select row(o ->> 'id', o ->> 'status',
               coalesce(o ->> 'status' = 'paid', false) or coalesce(credits._flag(o -> 'paid'), false),
               credits._whole(o -> 'created'), credits._ref(o -> 'customer'),
               coalesce(credits._ref(o #> '{parent,subscription_details,subscription}'), credits._ref(o -> 'subscription'),
                        (select min(l.subscription_id) from credits._shape_lines(o) l)),
               credits._whole(o -> 'amount_paid'), credits._whole(o -> 'total'), lower(o ->> 'currency'),
               credits._whole(o -> 'attempt_count'),
               coalesce(credits._ref(o -> 'payment_intent'), credits._ref(o -> 'charge')),
               coalesce(credits._flag(o #> '{lines,has_more}'), false) is false)::credits.invoice_shape
      from (select _shape_invoice.object) x (o));
end $$;

-- Lines of an invoice. The details of a line stand under the name of its parent's type. The price is whole in the older
-- shape, in the newer only its id. A proration that comes to nothing has no amount here, since nothing says a sign: one that
-- gives back names what it credits, and its quantity is negative.
create or replace function credits._shape_lines(object jsonb)
returns setof credits.line_shape
language sql
immutable
as $$
  select l ->> 'id',
         coalesce(credits._ref(l #> '{pricing,price_details,price}'), credits._ref(l -> 'price'), credits._ref(l -> 'plan')),
         coalesce(credits._ref(l #> '{pricing,price_details,product}'), credits._ref(l #> '{price,product}'),
                  credits._ref(l #> '{plan,product}')),
         coalesce(credits._decimal(l -> 'quantity_decimal'), credits._decimal(l -> 'quantity'))
           * case when p.comes_to_nothing and coalesce(d -> 'proration_details', l -> 'proration_details')
                                              -> 'credited_items' <> 'null' then -1 else 1 end,
         case when not p.comes_to_nothing then credits._whole(l -> 'amount') end,
         coalesce(d ->> 'subscription_item', credits._ref(l -> 'subscription_item')),
         coalesce(credits._ref(d -> 'subscription'), credits._ref(l -> 'subscription')),
         credits._moment(l #> '{period,start}'), credits._moment(l #> '{period,end}'),
         coalesce(case when jsonb_typeof(l #> '{pricing,price_details,price}') = 'object'
                       then l #> '{pricing,price_details,price}' end,
                  case when jsonb_typeof(l -> 'price') = 'object' then l -> 'price' end,
                  case when jsonb_typeof(l -> 'plan') = 'object' then l -> 'plan' end)
    from credits._elements(coalesce(_shape_lines.object -> 'lines', _shape_lines.object)) l,
         lateral (select l #> array['parent', l #>> '{parent,type}']) x (d),
         lateral (select coalesce(credits._flag(d -> 'proration'), credits._flag(l -> 'proration'), false)
                         and coalesce(credits._whole(l -> 'amount') = 0, false)) p (comes_to_nothing)
$$;

-- Which payments paid an invoice: an invoice_payment, or the payments inside an expanded invoice.
create or replace function credits._shape_invoice_payment(object jsonb)
returns credits.charge_shape
language sql
immutable
as $$
  select row(credits._ref(o #> '{payment,charge}'), credits._ref(o #> '{payment,payment_intent}'),
             credits._ref(o -> 'invoice'), null, case when o ->> 'status' = 'paid' then credits._whole(o -> 'amount_paid') end,
             null, lower(o ->> 'currency'))::credits.charge_shape
    from (select _shape_invoice_payment.object) x (o)
$$;

-- All payments that an invoice names itself: one in the older shape, expanded ones in the newer.
create or replace function credits._payments_of_invoice(object jsonb)
returns setof credits.charge_shape
language sql
immutable
as $$
  select s.*
    from credits._elements(_payments_of_invoice.object -> 'payments') p, credits._shape_invoice_payment(p) s
  union all
  select credits._ref(o -> 'charge'), credits._ref(o -> 'payment_intent'), o ->> 'id', null,
         credits._whole(o -> 'amount_paid'), null, lower(o ->> 'currency')
    from (select _payments_of_invoice.object) x (o)
   where coalesce(credits._ref(o -> 'charge'), credits._ref(o -> 'payment_intent')) is not null
$$;
