-- The catalogue to Stripe: what there should be, how that differs from what is known of Stripe, and the requests that make it so.
-- A product goes first, then its prices, then what they replace: each answer's handler writes the next request. What has no id
-- yet is looked for before it is made, under a name that follows from its code, so nothing is made twice.

insert into credits.settings as s (name, value, summary) values
  ('stripe_id_prefix', '"pgc"', 'How the ids of products and the lookup keys of prices begin that publish_catalog() makes.')
on conflict (name) do update set summary = excluded.summary;

create or replace function credits.publish_catalog(dry_run boolean default false)
returns setof credits.catalog_difference
language plpgsql
security definer
set search_path = pg_catalog, pg_temp
as $$
declare
  v_differences credits.catalog_difference[];
begin
  lock table credits.plans in share row exclusive mode;
  begin
    update credits.stripe_requests r  -- publishing looks before it makes anything
       set state = 'failed', finished_at = credits.now()
     where r.purpose = 'publish' and r.state = 'unknown';
    perform credits._begin_run('publish');
    perform credits._note_sold_prices();
    perform credits._bind_known();
    v_differences := array(select d from credits._catalog_differences() d where d.change is not null order by d.section, d.code, d.ref);
    perform credits._publish_next();
    if publish_catalog.dry_run then
      raise sqlstate 'DRYRN';
    end if;
  exception when sqlstate 'DRYRN' then
    null;  -- all of it is undone, and known
  end;
  return query select d.* from unnest(v_differences) d;
end $$;
comment on function credits.publish_catalog(boolean) is
'Makes Stripe''s products and prices what the catalogue says: answers each difference, and writes the requests that end it.

change is create, update, deactivate, or check (an id that the catalogue names and that was never seen is read first); before and
after are what differs. A price whose amount, currency or interval differs is replaced: a new one is made, the catalogue sells at
it, and the old one is deactivated. What is not active is deactivated. Ids are written back by the answers. Compared is what
Stripe last told: sync_catalog() reads all of it. May be called at any time, also twice at once: what is open stays as it is.
get_catalog_sync() tells how far it has come. dry_run writes nothing.';

-- What should be at Stripe --------------------------------------------------------------------------------------------

-- A name at Stripe that follows from the code.
create or replace function credits._stripe_name(
  section text,
  code    text,
  part    text default ''
)
returns text
language sql
stable
as $$
  select concat_ws('_', credits._setting('stripe_id_prefix') #>> '{}', _stripe_name.section,
                   case when _stripe_name.code ~ '^[A-Za-z0-9_]{1,100}$' then _stripe_name.code
                        else regexp_replace(left(_stripe_name.code, 60), '[^A-Za-z0-9]+', '_', 'g')
                             || '_' || left(md5(_stripe_name.code), 8) end,
                   nullif(_stripe_name.part, ''))
$$;

-- Products and prices as the catalogue wants them: `wanted` can be updated, `fixed` never. chosen are ids that we give.
create or replace function credits._catalog_targets()
returns setof credits.catalog_target
language sql
stable
as $$
  with things as (
    select 'package' as section, p.code, p.name, p.description, p.active as on_sale, p.stripe_product_id as product_id,
           credits._stripe_name('package', p.code) as chosen_id,
           (select count(*) from credits.packages o where o.stripe_product_id = p.stripe_product_id) > 1 as shared
      from credits.packages p
    union all
    select 'plan', p.code, p.name, p.description, p.active and exists (select from credits.plan_prices c where c.plan = p.code),
           p.stripe_product_id, credits._stripe_name('plan', p.code), false
      from credits.plans p
     where p.stripe_product_id = credits._stripe_name('plan', p.code)
        or exists (select from credits.plan_prices c where c.plan = p.code)
  ), prices as (
    select 'package' as section, p.code, '' as part, p.stripe_price_id as price_id, p.price as amount, p.currency, null as every,
           jsonb_build_object('credits', trim_scale(p.credits)::text) as credits
      from credits.packages p
    union all
    select 'plan', c.plan, c.currency || ':' || c."interval", c.stripe_price_id, c.amount, c.currency, c."interval",
           jsonb_build_object('credits', trim_scale(p.monthly_credits)::text, 'trial_credits', trim_scale(p.trial_credits)::text)
      from credits.plan_prices c
      join credits.plans p on p.code = c.plan
  )
  select t.section, t.code, 'product', concat_ws(':', t.section, t.code, 'product'), coalesce(t.product_id, t.chosen_id),
         coalesce(t.product_id = t.chosen_id, true), t.on_sale,
         case when t.shared then '{}' when not t.on_sale then '{"active": false}'
              else jsonb_strip_nulls(jsonb_build_object('name', t.name, 'description', nullif(t.description, ''), 'active', true,
                                                        'metadata', jsonb_build_object(t.section, t.code))) end, null
    from things t
   where t.on_sale or t.product_id is not null
  union all
  select t.section, t.code, 'price', concat_ws(':', t.section, t.code, 'price', nullif(p.part, '')), p.price_id, false, t.on_sale,
         case when not t.on_sale then '{"active": false}'
              else jsonb_build_object('active', true, 'metadata', jsonb_build_object(t.section, t.code) || p.credits) end,
         jsonb_build_object('currency', p.currency, 'unit_amount', p.amount, 'every', p.every)
    from things t
    join prices p on p.section = t.section and p.code = t.code
  union all
  select case when s.plan is null then 'package' else 'plan' end, coalesce(s.package, s.plan), 'price',
         concat_ws(':', case when s.plan is null then 'package' else 'plan' end, coalesce(s.package, s.plan), 'price', s.stripe_price_id),
         s.stripe_price_id, false, false, '{"active": false}', null
    from credits.sold_prices s
   where s.retired_at is not null
     and s.stripe_price_id not in (select p.price_id from prices p where p.price_id is not null)  -- a document may go back to it
$$;

-- Differences ---------------------------------------------------------------------------------------------------------

-- Those of the catalogue's own products and prices. change is what publish_catalog() does about it, null where it can do nothing.
-- A product is made only where a price needs one.
create or replace function credits._catalog_differences()
returns setof credits.catalog_difference
language sql
stable
as $$
  with compared as materialized (
    select t.*, o.snapshot is not null as seen, coalesce(o.deleted, false) as deleted, s.shown,
           credits._differing(s.shown, t.wanted) as changed, credits._differing(s.shown, t.fixed) as replaced
      from credits._catalog_targets() t
      left join credits.stripe_objects o
        on o.kind = t.object and o.object_id = t.stripe_id
       and not (t.chosen and credits._home_of('product', t.stripe_id) is not null)  -- a connected account may publish as we do
      cross join lateral (select case t.object when 'product' then credits._shown_product(o.snapshot)
                                               else credits._shown_price(o.snapshot) end) s (shown)
  ), judged as (
    select c.*, case
        when c.stripe_id is null                                           then case when c.on_sale then 'missing' end
        when not c.seen and c.object = 'product' and c.chosen and c.on_sale then case when n.needed then 'missing' end
        when not c.seen                                                    then case when c.fixed is not null or c.object = 'product'
                                                                                     then 'not_seen' end
        when c.deleted                                                     then case when c.on_sale then 'deleted' end
        when c.on_sale and c.replaced <> '{}'                              then 'differs'
        when c.changed = '{}'                                              then null
        when c.wanted -> 'active' = 'false'                                then 'active'
        when c.changed -> 'active' = 'true'                                then 'archived'
        else                                                                    'differs' end as judgement
      from compared c
      cross join lateral (select exists (select from compared p
                                          where p.section = c.section and p.code = c.code and p.object = 'price' and p.on_sale
                                            and (p.stripe_id is null or p.deleted or p.seen and p.replaced <> '{}'))) n (needed)
  )
  select j.section, j.code, j.object, j.stripe_id, j.object || '_' || j.judgement,
         case when j.judgement = 'missing' or j.object = 'price' and (j.judgement = 'deleted' or j.replaced <> '{}' and j.on_sale and j.seen)
                                            then 'create'
              when j.judgement = 'not_seen' then 'check'
              when j.judgement = 'active'   then 'deactivate'
              when j.judgement <> 'deleted' then 'update' end,
         case when j.seen then credits._parts_of(j.shown, v.after) end, v.after, j.ref
    from judged j
    cross join lateral (select case when j.judgement in ('missing', 'deleted') then j.wanted || coalesce(jsonb_strip_nulls(j.fixed), '{}')
                                    when j.judgement = 'not_seen'              then null
                                    when j.on_sale and j.replaced <> '{}'      then j.replaced
                                    else j.changed end) v (after)
   where j.judgement is not null
  union all
  select 'plan', p.code, 'price', i.id, 'price_not_seen', 'check', null, null, concat_ws(':', 'plan', p.code, 'price', i.id)
    from credits.plans p
    cross join unnest(p.stripe_price_ids) i (id)
   where exists (select from credits.plan_prices c where c.plan = p.code and c.stripe_price_id is null)
     and not exists (select from credits.plan_prices c where c.stripe_price_id = i.id)
     and credits._snapshot('price', i.id) is null
$$;

-- What of `wanted` is shown otherwise. Metadata that are not wanted are not ours.
create or replace function credits._differing(
  shown  jsonb,
  wanted jsonb
)
returns jsonb
language sql
immutable
as $$
  select coalesce(jsonb_object_agg(w.key, case when jsonb_typeof(w.value) = 'object'
                                               then credits._differing(_differing.shown -> w.key, w.value) else w.value end), '{}')
    from jsonb_each(_differing.wanted) w
   where case when jsonb_typeof(w.value) = 'object' then not coalesce(_differing.shown -> w.key @> w.value, false)
              else coalesce(_differing.shown -> w.key, 'null') <> w.value end
$$;

-- The same keys of what is shown.
create or replace function credits._parts_of(
  shown jsonb,
  keys  jsonb
)
returns jsonb
language sql
immutable
as $$
  select coalesce(jsonb_object_agg(k.key, case when jsonb_typeof(k.value) = 'object'
                                               then credits._parts_of(credits._object(_parts_of.shown -> k.key), k.value)
                                               else coalesce(_parts_of.shown -> k.key, 'null') end), '{}')
    from jsonb_each(_parts_of.keys) k
$$;

-- Requests ------------------------------------------------------------------------------------------------------------

-- Writes what can be asked for now, of one thing or of all. looked names what was looked for and is not there, written what has
-- just been written: its answer may be of the same second as what is known, and is then settled by a retrieve. What is new is made in
-- the own account.
create or replace function credits._publish_next(
  section text default null,
  code    text default null,
  looked  text default null,
  written text default null
)
returns void
language sql
as $$
  with differences as materialized (
    select d.*
      from credits._catalog_differences() d
     where _publish_next.section is null or (d.section, d.code) = (_publish_next.section, _publish_next.code)
  )
  select credits._request('publish', c.ref, c.method, c.path, c.params,
                          stripe_account => case when d.change <> 'create' then credits._home_of(d.object, d.stripe_id) end)
    from differences d
    cross join lateral credits._publish_call(d, coalesce(d.ref = _publish_next.looked, false)) c
   where d.change is not null
     and d.stripe_id is distinct from '' and coalesce(d.stripe_id, 'none') ~ '^[A-Za-z0-9_]{1,255}$'
     and not (d.change in ('update', 'deactivate') and coalesce(d.ref = _publish_next.written, false))
     and credits._open_request('publish', d.ref) is null
     and not (d.change = 'create'
              and exists (select from differences f
                           where f.section = d.section and f.code = d.code
                             and (f.change = 'check'
                                  or d.object = 'price' and f.object = 'product'
                                     and f.difference in ('product_missing', 'product_deleted'))))
$$;

-- How a difference is ended. What is to be made is looked for first.
create or replace function credits._publish_call(
  difference credits.catalog_difference,
  looked     boolean
)
returns credits.stripe_request_result
language plpgsql
stable
as $$
declare
  v_difference credits.catalog_difference := _publish_call.difference;
  v_path       text := '/v1/' || v_difference.object || 's';
begin
  return row(null, 'publish', v_difference.ref, null,
             case when v_difference.change = 'check' or v_difference.change = 'create' and not _publish_call.looked then 'get'
                  else 'post' end,
             case when v_difference.change = 'create' then v_path else v_path || '/' || v_difference.stripe_id end,
             case when v_difference.change = 'check'      then '{}'
                  when v_difference.change <> 'create'    then v_difference.after
                  when v_difference.object = 'product'    then
                    case when _publish_call.looked then v_difference.after - 'active' || jsonb_build_object('id', v_difference.stripe_id)
                         else jsonb_build_object('ids', jsonb_build_array(v_difference.stripe_id), 'limit', 1) end
                  when _publish_call.looked               then credits._new_price(v_difference)
                  else jsonb_build_object('lookup_keys', jsonb_build_array(credits._lookup_key(v_difference)), 'limit', 1) end
            )::credits.stripe_request_result;
end $$;

-- A price takes its lookup key from the one that it replaces, and is taxed as that one was.
create or replace function credits._new_price(difference credits.catalog_difference)
returns jsonb
language sql
stable
as $$
  select jsonb_strip_nulls(jsonb_build_object(
           'product', p.stripe_id, 'currency', t.fixed -> 'currency', 'unit_amount', t.fixed -> 'unit_amount',
           'recurring', case when t.fixed ->> 'every' is not null then jsonb_build_object('interval', t.fixed -> 'every') end,
           'metadata', t.wanted -> 'metadata', 'lookup_key', credits._lookup_key(_new_price.difference),
           'transfer_lookup_key', true,
           'tax_behavior', credits._shown_price(credits._snapshot('price', t.stripe_id)) -> 'tax_behavior'))
    from credits._catalog_targets() t
    join credits._catalog_targets() p on p.section = t.section and p.code = t.code and p.object = 'product'
   where t.ref = (_new_price.difference).ref and t.object = 'price'
$$;

create or replace function credits._lookup_key(difference credits.catalog_difference)
returns text
language sql
stable
as $$
  select credits._stripe_name(d.section, d.code,
                              replace(substr(d.ref, length(concat_ws(':', d.section, d.code, 'price', ''))+ 1), ':', '_'))
    from (select (_lookup_key.difference).*) d
$$;
