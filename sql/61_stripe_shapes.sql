-- Reading Stripe's JSON, in any API version, and nothing else: no other file knows a path.

-- A reference is an id, or the expanded object.
create or replace function credits._ref(reference jsonb)
returns text
language sql
immutable
as $$
  select case jsonb_typeof(_ref.reference) when 'string' then _ref.reference #>> '{}'
                                           when 'object' then _ref.reference ->> 'id' end
$$;

-- A number that may be missing or of another type is null, never an error.
create or replace function credits._whole(value jsonb)
returns bigint
language sql
immutable
as $$
  select case when _whole.value #>> '{}' ~ '^-?[0-9]{1,18}$' then (_whole.value #>> '{}')::bigint end
$$;

create or replace function credits._shape_event(event jsonb)
returns credits.event_shape
language sql
immutable
as $$
  select row(_shape_event.event ->> 'type',
             case _shape_event.event ->> 'livemode' when 'true' then true when 'false' then false end,
             _shape_event.event ->> 'api_version',
             _shape_event.event ->> 'account',
             to_timestamp(credits._whole(_shape_event.event -> 'created')))::credits.event_shape
$$;

-- amount_before is what the goods cost: without it, the total with discounts put back and tax and shipping taken out.
create or replace function credits._shape_session(payload text)
returns credits.session_shape
language sql
immutable
as $$
  select row(o ->> 'id', o ->> 'mode', o ->> 'payment_status',
             credits._whole(o -> 'amount_total'),
             coalesce(credits._whole(o -> 'amount_subtotal'),
                      credits._whole(o -> 'amount_total')
                        + coalesce(credits._whole(o #> '{total_details,amount_discount}'), 0)
                        - coalesce(credits._whole(o #> '{total_details,amount_tax}'), 0)
                        - coalesce(credits._whole(o #> '{total_details,amount_shipping}'), 0)),
             lower(o ->> 'currency'), (o ->> 'livemode') = 'true',
             nullif(o #>> '{metadata,account_id}', ''), nullif(o ->> 'client_reference_id', ''),
             nullif(o #>> '{metadata,package}', ''),
             case when o #> '{metadata,quantity}' is null then 1
                  when o #>> '{metadata,quantity}' ~ '^[1-9][0-9]{0,5}$' then (o #>> '{metadata,quantity}')::integer end,
             credits._ref(o -> 'payment_intent'), credits._ref(o -> 'customer'))::credits.session_shape
    from (select credits._read_payload(_shape_session.payload) #> '{data,object}') x (o)
$$;
