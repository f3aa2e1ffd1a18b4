-- Reading Stripe's JSON, in any API version, and nothing else: events and lists here, their objects in 61_stripe_objects.sql.
-- No other file knows a path.
-- A field that moved is read at its new place, then at its old one; the version is never asked. References may be expanded.
-- The larger functions are PL/pgSQL around one expression: a session keeps their plans, while those of SQL functions that
-- cannot be inlined are made anew in every transaction, which was measured to be a fifth of the time of an event.

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

create or replace function credits._moment(seconds jsonb)
returns timestamptz
language sql
immutable
as $$
  select case when s between 0 and 253402300799 then to_timestamp(s) end from (select credits._whole(_moment.seconds)) x (s)
$$;

-- Thin notifications write moments in ISO form.
create or replace function credits._iso_moment(value text)
returns timestamptz
language plpgsql
stable
as $$
begin
  return case when _iso_moment.value ~ E'^\\d{4}-\\d\\d-\\d\\dT\\d\\d:\\d\\d:\\d\\d(\\.\\d+)?Z$' then _iso_moment.value::timestamptz end;
exception when data_exception then
  return null;
end $$;

create or replace function credits._flag(value jsonb)
returns boolean
language sql
immutable
as $$
  select case _flag.value #>> '{}' when 'true' then true when 'false' then false end
$$;

-- Quantities and unit amounts may come as decimal texts.
create or replace function credits._decimal(value jsonb)
returns numeric
language sql
immutable
as $$
  select case when _decimal.value #>> '{}' ~ E'^-?[0-9]{1,18}(\\.[0-9]{1,12})?$' then (_decimal.value #>> '{}')::numeric end
$$;

-- Elements of a list, which may be a list object, an array, or not there.
create or replace function credits._elements(list jsonb)
returns setof jsonb
language sql
immutable
as $$
  select e
    from jsonb_array_elements(case when jsonb_typeof(_elements.list -> 'data') = 'array' then _elements.list -> 'data'
                                   when jsonb_typeof(_elements.list) = 'array' then _elements.list
                                   else '[]' end) e
$$;

-- Events ------------------------------------------------------------------------------------------------------------

create or replace function credits._event_id(event jsonb)
returns text
language sql
immutable
as $$
  select nullif(_event_id.event ->> 'id', '')
$$;

-- What an answer that is none says of the reason.
create or replace function credits._error_of(
  answer jsonb,
  field  text
)
returns text
language sql
immutable
as $$
  select _error_of.answer #>> array['error', _error_of.field]
$$;

-- A thin notification names its object beside the event, its moment as ISO text, and a connected account as its context.
create or replace function credits._shape_event(event jsonb)
returns credits.event_shape
language plpgsql
stable
as $$
begin
  return (
    select row(e ->> 'type', e ->> 'object' = 'v2.core.event', credits._flag(e -> 'livemode'), e ->> 'api_version',
               case when e ->> 'object' = 'v2.core.event' then substring(e ->> 'context' from '^acct_[A-Za-z0-9]+$')
                    else e ->> 'account' end,
               case when jsonb_typeof(e -> 'created') = 'number' then credits._moment(e -> 'created')
                    else credits._iso_moment(e ->> 'created') end,
               coalesce(e #>> '{data,object,id}', e #>> '{related_object,id}'))::credits.event_shape
      from (select _shape_event.event) x (e));
end $$;

create or replace function credits._shape_notice(event credits.stripe_events)
returns credits.stripe_notice
language plpgsql
stable
as $$
declare
  v_event jsonb := credits._read_payload((_shape_notice.event).payload);
begin
  return row((_shape_notice.event).event_id,
             case when v_event ->> 'object' = 'v2.core.event' then 'v2.core.event' else (_shape_notice.event).type end,
             coalesce(v_event #>> '{data,object,object}', v_event #>> '{related_object,type}'),
             (_shape_notice.event).object_id,
             floor(extract(epoch from (_shape_notice.event).created_at)),
             coalesce(v_event #> '{data,object}', v_event -> 'related_object'),
             case when jsonb_typeof(v_event #> '{data,previous_attributes}') = 'object'
                  then v_event #> '{data,previous_attributes}' end,
             false)::credits.stripe_notice;
end $$;

-- An answer to a request of ours. A list has no id of its own: it is known by what was asked for.
create or replace function credits._shape_answer(
  request credits.stripe_requests,
  answer  jsonb
)
returns credits.stripe_notice
language sql
stable
as $$
  select row('request:' || (_shape_answer.request).request_id, coalesce(h.event_type, k.ref[3], 'object.' || k.ref[1]),
             k.ref[1], k.ref[2], (_shape_answer.request).as_of, _shape_answer.answer, null, true)::credits.stripe_notice
    from (select case (_shape_answer.request).purpose when 'retrieve' then string_to_array((_shape_answer.request).ref, ':')
                 else array[_shape_answer.answer ->> 'object', _shape_answer.answer ->> 'id'] end) k (ref)
    left join credits.stripe_handlers h on h.event_type = 'answer.' || (_shape_answer.request).purpose
$$;

-- One element of a list as a notice of its own.
create or replace function credits._shape_part(
  list   credits.stripe_notice,
  kind   text,
  object jsonb
)
returns credits.stripe_notice
language sql
immutable
as $$
  select row((_shape_part.list).event_id, 'object.' || _shape_part.kind, _shape_part.kind, _shape_part.object ->> 'id',
             (_shape_part.list).at, _shape_part.object, null, true)::credits.stripe_notice
$$;

-- Gone for good: customers, products, prices. A deleted subscription is one that was canceled.
create or replace function credits._is_deleted(notice credits.stripe_notice)
returns boolean
language sql
immutable
as $$
  select coalesce(credits._flag((_is_deleted.notice).object -> 'deleted'), false)
         or (_is_deleted.notice).type in ('customer.deleted', 'product.deleted', 'price.deleted')
$$;

-- States that an object never leaves. Disputes have none: a lost one may still be won.
create or replace function credits._is_final(
  kind   text,
  object jsonb
)
returns boolean
language sql
immutable
as $$
  select coalesce(case _is_final.kind
    when 'subscription'   then _is_final.object ->> 'status' in ('canceled', 'incomplete_expired')
    when 'invoice'        then _is_final.object ->> 'status' in ('paid', 'void')
                               or credits._flag(_is_final.object -> 'paid')
    when 'payment_intent' then _is_final.object ->> 'status' in ('succeeded', 'canceled')
    when 'refund'         then _is_final.object ->> 'status' in ('failed', 'canceled') end, false)
$$;

-- Whose an object is, as far as it says itself. An invoice carries the metadata of its subscription.
create or replace function credits._shape_owner(object jsonb)
returns credits.owner_shape
language plpgsql
immutable
as $$
begin
  return (
    select row(case when o ->> 'object' = 'customer' then o ->> 'id' else credits._ref(o -> 'customer') end,
               coalesce(nullif(o #>> '{metadata,account_id}', ''),
                        nullif(o #>> '{parent,subscription_details,metadata,account_id}', ''),
                        nullif(o #>> '{subscription_details,metadata,account_id}', '')),
               nullif(o ->> 'client_reference_id', ''),
               case when o ->> 'object' = 'subscription' then o ->> 'id'
                    else coalesce(credits._ref(o #> '{parent,subscription_details,subscription}'),
                                  credits._ref(o -> 'subscription')) end)::credits.owner_shape
      from (select _shape_owner.object) x (o));
end $$;

-- What an object names that we may ask Stripe about, itself first, by the account that it came from. Only places where ids of
-- Stripe's own stand: what people wrote, in names and metadata, may look like one.
create or replace function credits._shape_homes(
  object         jsonb,
  stripe_account text
)
returns setof credits.stripe_homes
language sql
immutable
as $$
  select distinct n.kind, n.id, _shape_homes.stripe_account
    from (values ('$', true), ('$.data[*]', true), ('$.error.payment_intent', true),
                 ('$.lines.data[*]', false), ('$.items.data[*]', false), ('$.payments.data[*]', false)) w (path, itself),
         lateral jsonb_path_query(_shape_homes.object, w.path::jsonpath) p (part),
         lateral (
           select coalesce(p.part ->> 'object', p.part ->> 'type'), p.part ->> 'id' where w.itself  -- the latter in a thin event
           union all
           select r.kind, credits._ref(v.value)
             from (values
                    ('customer', '$.customer'), ('subscription', '$.subscription'), ('subscription', '$.parent.*.subscription'),
                    ('subscription_schedule', '$.schedule'), ('invoice', '$.invoice'), ('invoice', '$.latest_invoice'),
                    ('payment_intent', '$.payment_intent'), ('payment_intent', '$.payment.payment_intent'),
                    ('charge', '$.charge'), ('charge', '$.latest_charge'), ('charge', '$.payment.charge'),
                    ('payment_method', '$.payment_method'), ('payment_method', '$.default_payment_method'),
                    ('payment_method', '$.default_source'), ('payment_method', '$.invoice_settings.default_payment_method'),
                    ('price', '$.price'), ('price', '$.plan'), ('price', '$.pricing.price_details.price'),
                    ('product', '$.product'), ('product', '$.price.product'), ('product', '$.plan.product'),
                    ('product', '$.pricing.price_details.product')) r (kind, path),
                  lateral jsonb_path_query(p.part, r.path::jsonpath) v (value)) n (kind, id)
   where n.id is not null
     and n.kind in ('charge', 'checkout.session', 'customer', 'dispute', 'invoice', 'payment_intent', 'payment_method', 'price',
                    'product', 'refund', 'subscription', 'subscription_schedule')
$$;

-- What a notice makes known: its object, the customer behind it, the prices inside it.
create or replace function credits._known_by(notice credits.stripe_notice)
returns text[]
language plpgsql
immutable
as $$
begin
  return (select array[n.kind || ':' || n.object_id, 'customer:' || (credits._shape_owner(n.object)).customer_id]
         || array(select 'price:' || i.price_id from credits._shape_items(n.object) i where i.price is not null)
         || array(select 'price:' || l.price_id from credits._shape_lines(n.object) l
                   where l.price is not null and n.kind in ('invoice', 'invoice_lines'))
    from (select (_known_by.notice).*) n);
end $$;

-- Lists -------------------------------------------------------------------------------------------------------------

create or replace function credits._has_more(list jsonb)
returns boolean
language sql
immutable
as $$
  select coalesce(credits._flag(_has_more.list -> 'has_more'), false)
$$;

create or replace function credits._last_id(list jsonb)
returns text
language sql
immutable
as $$
  select _last_id.list #>> '{data,-1,id}'
$$;

-- A page added to those before it.
create or replace function credits._join_pages(
  pages jsonb,
  page  jsonb
)
returns jsonb
language sql
immutable
as $$
  select case when credits._has_more(_join_pages.pages)
              then _join_pages.page || jsonb_build_object('data', (_join_pages.pages -> 'data') || (_join_pages.page -> 'data'))
              else _join_pages.page end
$$;
