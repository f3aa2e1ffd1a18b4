-- The catalogue from Stripe: all its products and prices, page by page, each bound to what it sells; what became of publishing;
-- and how far both have come.
-- Keeps: a price that has ever sold something is known for it for ever (sold_prices). Whoever binds locks the table plans first.

create or replace function credits.sync_catalog()
returns credits.catalog_progress
language plpgsql
security definer
set search_path = pg_catalog, pg_temp
as $$
begin
  lock table credits.plans in share row exclusive mode;
  perform credits._begin_run('sync');
  perform credits._request('sync', k.kind || ':' || a.active, 'get', '/v1/' || k.kind,
                           jsonb_build_object('limit', 100, 'active', a.active))
     from unnest(array['products', 'prices']) k (kind)
     cross join unnest(array[true, false]) a (active)
    where credits._open_request('sync', k.kind || ':' || a.active) is null;
  return credits._progress('sync');
end $$;
comment on function credits.sync_catalog() is
'Asks Stripe for all its products and prices, active or not, page by page, and binds them to what they sell.

Each is mirrored as by its event. A price whose metadata, or whose product''s, name a package or a plan sells it from then on;
one of the amount, currency and interval that the catalogue wants becomes the one that it is sold at, if it has none. Nothing is
changed at Stripe. Answers how far it has come, as get_catalog_sync() does; stripe_catalog_differences() tells what it found. May
be called at any time; while one runs, another call only looks at it.';

create or replace function credits.get_catalog_sync()
returns setof credits.catalog_progress
language sql
stable
security definer
set search_path = pg_catalog, pg_temp
as $$
  select p.* from unnest(array['publish', 'sync']) r (run), credits._progress(r.run) p where p.run is not null
$$;
comment on function credits.get_catalog_sync() is
'How far the last publish_catalog() and sync_catalog() have come: a row for each, none for what was never called.

open, done and failed count what Stripe is asked for, requests their sum; of what was asked twice about one thing the last one
counts. It is finished when nothing is open, or while Stripe refuses our key. errors has of each that failed its ref, state and Stripe''s
status, code and message: mend that, and publish or sync again.';

create or replace function credits.stripe_catalog_differences()
returns setof credits.catalog_difference
language sql
stable
security definer
set search_path = pg_catalog, pg_temp
as $$
  select d.* from credits._catalog_differences() d
  union all
  select d.* from credits._odd_prices() d
   order by 1, 2, 9
$$;
comment on function credits.stripe_catalog_differences() is
'Where Stripe, as it is known, differs from the catalogue: what publish_catalog() would do, and what a person should look at.

change is what publishing would do, null if nothing. difference is product_ or price_ with missing, differs, archived, active (and
should not be), deleted or not_seen; price_unknown (it is active, and nothing of ours is known to be sold at it), credits_missing or
credits_malformed (of a price that sells a plan: see the metadata of prices in docs/stripe.md).';

-- A price of a plan that is sold elsewhere too is known by its listing; others by the product that they are of.
create or replace function credits._odd_prices()
returns setof credits.catalog_difference
language sql
stable
as $$
  with prices as materialized (
    select o.object_id, p.shown, s.package, credits._plan_of_price(o.object_id, p.shown ->> 'product') as plan,
           coalesce((credits._shape_price(o.snapshot)).credits,
                    (credits._shape_price(credits._snapshot('product', p.shown ->> 'product'))).credits) as credits
      from credits.stripe_objects o
      left join credits.sold_prices s on s.stripe_price_id = o.object_id
      cross join lateral (select credits._shown_price(o.snapshot)) p (shown)
     where o.kind = 'price' and o.snapshot is not null and not o.deleted and p.shown -> 'active' = 'true'
  )
  select case when p.plan is not null then 'plan' end, p.plan, 'price', p.object_id, d.difference, null,
         p.shown - array['metadata', 'active', 'lookup_key', 'tax_behavior'], null::jsonb, concat_ws(':', 'price', p.object_id)
    from prices p
    cross join lateral (
      select case when p.plan is null and p.package is null
                       and not exists (select from credits.packages k where k.stripe_price_id = p.object_id) then 'price_unknown'
                  when p.plan is null                                                then null
                  when p.credits is null                                             then 'credits_missing'
                  when p.credits !~ E'^[0-9]{1,12}(\\.[0-9]{1,6})?$'                   then 'credits_malformed' end) d (difference)
   where d.difference is not null
$$;

-- Runs ----------------------------------------------------------------------------------------------------------------

-- A run counts from the oldest request that is still open, so that it reports what it found under way.
create or replace function credits._begin_run(run text)
returns void
language sql
as $$
  insert into credits.catalog_runs as c (run, started_at, first_request_id)
  select _begin_run.run, credits.now(), coalesce(
           (select min(r.request_id) from credits.stripe_requests r
             where r.purpose = _begin_run.run and r.state in ('queued', 'sent')),
           (select max(r.request_id) + 1 from credits.stripe_requests r), 1)
  on conflict on constraint catalog_runs_pkey
    do update set started_at = excluded.started_at, first_request_id = excluded.first_request_id
$$;

-- A retrieve that settles a tie of products or prices belongs to whatever runs.
create or replace function credits._progress(run text)
returns credits.catalog_progress
language sql
stable
as $$
  with asked as (
    select distinct on (r.purpose, r.ref) r.*
      from credits.stripe_requests r
      join credits.catalog_runs c on c.run = _progress.run
     where r.request_id >= c.first_request_id
       and (r.purpose = _progress.run
            or r.purpose = 'retrieve' and r.ref ~ '^(product|price):' and r.state in ('queued', 'sent'))
     order by r.purpose, r.ref, r.request_id desc
  ), counted as (
    select count(*) as requests, count(*) filter (where a.state in ('queued', 'sent')) as open,
           count(*) filter (where a.state = 'done') as done,
           count(*) filter (where a.state in ('failed', 'declined', 'unknown')) as failed,
           jsonb_agg(jsonb_strip_nulls(jsonb_build_object(
             'ref', a.ref, 'state', a.state, 'request_id', a.request_id, 'status', a.http_status,
             'code', coalesce(a.error_code, a.error_type), 'message', credits._error_of(a.response, 'message')))
             order by a.request_id) filter (where a.state in ('failed', 'declined', 'unknown')) as errors
      from asked a
  ), stop as (
    select jsonb_build_object('code', 'stripe_key_refused', 'state', 'queued', 'status', 401, 'message',
                              'Stripe refuses our key: see STRIPE_SECRET_KEY.') as error
      from credits.stripe_queue_stop
  )
  select row(c.run, c.started_at, n.requests, n.open, n.done, n.failed, n.open = 0 or s.error is not null,
             coalesce(n.errors, '[]') || case when n.open > 0 and s.error is not null then jsonb_build_array(s.error) else '[]' end
            )::credits.catalog_progress
    from credits.catalog_runs c
    cross join counted n
    left join stop s on true
   where c.run = _progress.run
$$;

-- Answers -------------------------------------------------------------------------------------------------------------

create or replace function credits._on_catalog_page(notice credits.stripe_notice)
returns credits.handler_result
language plpgsql
as $$
declare
  v_notice  credits.stripe_notice := _on_catalog_page.notice;
  v_request credits.stripe_requests := credits._answered(v_notice);
begin
  perform credits._mirror_sold(credits._shape_part(v_notice, case v_request.path when '/v1/products' then 'product' else 'price' end, e))
     from credits._elements(v_notice.object) e;
  if credits._has_more(v_notice.object) then
    perform credits._request('sync', v_request.ref, 'get', v_request.path,
                             v_request.params || jsonb_build_object('starting_after', credits._last_id(v_notice.object)));
  else
    lock table credits.plans in share row exclusive mode;
    perform credits._note_sold_prices();
    perform credits._bind_known();
  end if;
  return credits._applied();
end $$;

create or replace function credits._on_published(notice credits.stripe_notice)
returns credits.handler_result
language plpgsql
as $$
declare
  v_notice  credits.stripe_notice := _on_published.notice;
  v_request credits.stripe_requests := credits._answered(v_notice);
  v_listed  boolean := v_notice.kind = 'list';
  v_parts   credits.stripe_notice[] := array[v_notice];
  v_part    credits.stripe_notice;
begin
  if v_listed then
    v_parts := array(select credits._shape_part(v_notice, case v_request.path when '/v1/products' then 'product' else 'price' end, e)
                       from credits._elements(v_notice.object) e);
  end if;
  foreach v_part in array v_parts loop
    perform credits._mirror_sold(v_part);
  end loop;

  lock table credits.plans in share row exclusive mode;
  foreach v_part in array v_parts loop
    perform credits._adopt(v_request, v_part);
  end loop;
  perform credits._note_sold_prices();
  perform credits._bind_known();
  perform credits._publish_next(t.section, t.code, case when v_listed then v_request.ref end,
                                case when v_request.method = 'post' then v_request.ref end)
     from credits._things_of(v_request.ref) t;
  return credits._applied();
end $$;

-- Somebody else has made it since we looked. A product that is there and cannot be found was deleted: then it failed.
create or replace function credits._on_failed_publish(notice credits.stripe_notice)
returns credits.handler_result
language plpgsql
as $$
declare
  v_request credits.stripe_requests := credits._answered(_on_failed_publish.notice);
begin
  if v_request.error_code = 'resource_already_exists' and v_request.path = '/v1/products'
     and not exists (select from credits.stripe_requests r
                       join credits.catalog_runs c on c.run = 'publish' and r.request_id >= c.first_request_id
                      where r.purpose = 'publish' and r.ref = v_request.ref and r.request_id < v_request.request_id
                        and r.error_code = v_request.error_code) then
    lock table credits.plans in share row exclusive mode;
    perform credits._publish_next(t.section, t.code) from credits._things_of(v_request.ref) t;
  end if;
  return credits._applied();
end $$;

create or replace function credits._mirror_sold(notice credits.stripe_notice)
returns void
language plpgsql
as $$
begin
  if (_mirror_sold.notice).kind = 'product' then
    perform credits._on_product(_mirror_sold.notice);
  else
    perform credits._on_price(_mirror_sold.notice);
  end if;
  perform credits._wake((_mirror_sold.notice).kind || ':' || (_mirror_sold.notice).object_id);
end $$;

create or replace function credits._things_of(ref text)
returns setof credits.catalog_target
language sql
stable
as $$
  select distinct on (t.section, t.code) t.*
    from credits._catalog_targets() t
   where starts_with(_things_of.ref, concat_ws(':', t.section, t.code, ''))
   order by t.section, t.code, t.ref
$$;

-- What an answer to publishing makes ours. A price that has our lookup key and is not what is wanted sold this before.
create or replace function credits._adopt(
  request credits.stripe_requests,
  part    credits.stripe_notice
)
returns void
language plpgsql
as $$
declare
  v_target credits.catalog_target;
  v_id     text := (_adopt.part).object_id;
  v_made   boolean := (_adopt.request).method = 'post' and (_adopt.request).path = '/v1/prices';
begin
  select t.* into v_target from credits._catalog_targets() t where t.ref = (_adopt.request).ref;
  if not found and v_made then
    perform credits._sold(v_id, m.section, m.code, true)  -- nobody wants it any more
       from credits._named_by(credits._shown_price((_adopt.part).object)) m;
  elsif v_target.object = 'product' and v_target.stripe_id = v_id then
    update credits.packages p set stripe_product_id = v_id
     where v_target.section = 'package' and p.code = v_target.code and p.stripe_product_id is null;
    update credits.plans p set stripe_product_id = v_id
     where v_target.section = 'plan' and p.code = v_target.code and p.stripe_product_id is null;
  elsif v_target.object = 'price' and v_target.stripe_id is distinct from v_id and (v_made or (_adopt.request).path = '/v1/prices') then
    if v_made or credits._differing(credits._shown_price((_adopt.part).object), v_target.fixed) = '{}' then
      perform credits._bind_price(v_target, v_id);
    else
      perform credits._sold(v_id, v_target.section, v_target.code, true);
    end if;
  end if;
end $$;
