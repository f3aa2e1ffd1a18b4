-- How a document that has no problems becomes rows, section by section.
-- Rates keep their past: what has been in force stays as it was, only its end is written.

create or replace function credits._write_catalog(
  catalog jsonb,
  stored  jsonb,
  at      timestamptz
)
returns void
language plpgsql
as $$
declare
  v_wanted  jsonb := jsonb '{}';
  v_section text;
begin
  foreach v_section in array array['capabilities', 'quality_levels', 'models', 'packages', 'plans'] loop
    if _write_catalog.catalog ? v_section then
      v_wanted := v_wanted || jsonb_build_object(v_section, (
        select coalesce(jsonb_object_agg(e.key, credits._with_stripe_ids(e.value, _write_catalog.stored -> v_section -> e.key)), '{}')
          from jsonb_each(_write_catalog.catalog -> v_section) e));
    end if;
  end loop;
  v_wanted := credits._shaped('"catalog"', v_wanted, plain => false);
  perform credits._note_sold_prices();
  perform credits._free_unique(credits._object(v_wanted -> 'packages'), credits._object(v_wanted -> 'plans'),
                               _write_catalog.catalog ? 'plans');
  foreach v_section in array array['capabilities', 'quality_levels', 'models', 'packages', 'plans'] loop
    perform credits._write_section(v_section, credits._object(v_wanted -> v_section), _write_catalog.stored -> v_section);
  end loop;
  perform credits._write_plan_prices(credits._object(v_wanted -> 'plans'));
  perform credits._write_uses(credits._object(v_wanted -> 'plans'), _write_catalog.stored -> 'plans');
  if _write_catalog.catalog ? 'rates' then
    perform credits._write_rates(_write_catalog.catalog -> 'rates', _write_catalog.at);
  end if;
  foreach v_section in array array['plans', 'packages', 'capabilities', 'quality_levels', 'models'] loop  -- plans refer to the last
    if _write_catalog.catalog ? v_section then
      perform credits._drop_unnamed(v_section, v_wanted -> v_section);
    end if;
  end loop;
end $$;

-- What only one row may have is taken from those that lose it first, so that rows can swap it.
create or replace function credits._free_unique(
  packages  jsonb,
  plans     jsonb,
  all_plans boolean
)
returns void
language sql
as $$
  update credits.packages p
     set stripe_price_id = null
   where _free_unique.packages ? p.code
     and p.stripe_price_id is distinct from _free_unique.packages -> p.code ->> 'stripe_price_id';
  update credits.plans p
     set stripe_product_id = null
   where _free_unique.plans ? p.code
     and p.stripe_product_id is distinct from _free_unique.plans -> p.code ->> 'stripe_product_id';
  update credits.plans p
     set is_default = false
   where p.is_default and _free_unique.all_plans
     and (_free_unique.plans -> p.code -> 'is_default') is distinct from 'true'
$$;

create or replace function credits._write_section(
  section text,
  wanted  jsonb,
  stored  jsonb
)
returns void
language plpgsql
as $$
declare
  v_columns text[] := credits._catalog_columns(_write_section.section);
begin
  execute format(
    'insert into credits.%I as t (code, %s)
     select r.code, %s
       from jsonb_each($1) e
       cross join jsonb_populate_record(null::credits.%I, e.value || jsonb_build_object(''code'', e.key)) r
      where e.value is distinct from $2 -> e.key
     on conflict (code) do update set (%s) = row(%s)',
    _write_section.section,
    (select string_agg(format('%I', c), ', ') from unnest(v_columns) c),
    (select string_agg(format('r.%I', c), ', ') from unnest(v_columns) c),
    _write_section.section,
    (select string_agg(format('%I', c), ', ') from unnest(v_columns) c),
    (select string_agg(format('excluded.%I', c), ', ') from unnest(v_columns) c))
  using _write_section.wanted, _write_section.stored;
end $$;

-- Removes the rows that are not named. Those that something refers to, be it a foreign key or an id of Stripe, under which
-- money may still come, are deactivated; a plan that stays for its accounts keeps what they may use.
create or replace function credits._drop_unnamed(
  section text,
  named   jsonb
)
returns void
language plpgsql
as $$
declare
  v_code text;
  v_sold text;
begin
  for v_code, v_sold in execute format(
    'select t.code, coalesce(j ->> ''stripe_product_id'', j ->> ''stripe_price_id'', j -> ''stripe_price_ids'' ->> 0)
       from credits.%I t
       cross join to_jsonb(t) j
      where not $1 ? t.code
      order by t.code', _drop_unnamed.section) using _drop_unnamed.named
  loop
    begin
      if v_sold is not null then
        raise foreign_key_violation;
      elsif _drop_unnamed.section = 'plans' then
        delete from credits.plan_prices p where p.plan = v_code;
        delete from credits.plan_qualities q where q.plan = v_code;
        delete from credits.plan_limits l where l.plan = v_code;
        delete from credits.plan_capabilities c where c.plan = v_code;
      end if;
      execute format('delete from credits.%I t where t.code = $1', _drop_unnamed.section) using v_code;
    exception when foreign_key_violation then
      execute format('update credits.%I t set active = false where t.code = $1 and t.active', _drop_unnamed.section)
        using v_code;
    end;
  end loop;
end $$;

-- What a document no longer names is sold no more. A price keeps its id of Stripe when only its amount changes: until it is
-- published the plan is sold at the old one.
create or replace function credits._write_plan_prices(plans jsonb)
returns void
language sql
as $$
  with wanted as (
    select p.key as plan, w.value ->> 'currency' as currency, w.value ->> 'interval' as "interval",
           (w.value ->> 'amount')::bigint as amount, w.number as rank
      from jsonb_each(_write_plan_prices.plans) p
      cross join jsonb_array_elements(p.value -> 'prices') with ordinality w (value, number)
  ), gone as (
    delete from credits.plan_prices t
     where _write_plan_prices.plans ? t.plan
       and (t.plan, t.currency, t."interval") not in (select w.plan, w.currency, w."interval" from wanted w)
    returning t.stripe_price_id
  ), retired as (
    update credits.sold_prices s
       set retired_at = credits.now()
     where s.stripe_price_id in (select g.stripe_price_id from gone g)
  )
  insert into credits.plan_prices as t (plan, currency, "interval", amount, rank)
  select w.plan, w.currency, w."interval", w.amount, w.rank from wanted w
  on conflict on constraint plan_prices_pkey do update set amount = excluded.amount, rank = excluded.rank
    where (t.amount, t.rank) <> (excluded.amount, excluded.rank)
$$;

-- What plans may use: of each plan that differs, all rows anew.
create or replace function credits._write_uses(
  plans  jsonb,
  stored jsonb
)
returns void
language plpgsql
as $$
declare
  v_uses jsonb := (
    select coalesce(jsonb_agg(u.use), '[]')
      from jsonb_each(_write_uses.plans) p
      cross join lateral (
        select p.value || jsonb_build_object('plan', p.key, 'capability', null)
        union all
        select c.value || jsonb_build_object('plan', p.key, 'capability', c.key)
          from jsonb_each(p.value -> 'capabilities') c) u (use)
     where (p.value -> 'qualities', p.value -> 'limits', p.value -> 'capabilities')
           is distinct from (_write_uses.stored -> p.key -> 'qualities', _write_uses.stored -> p.key -> 'limits',
                             _write_uses.stored -> p.key -> 'capabilities'));
  v_plans text[] := array(select distinct u ->> 'plan' from jsonb_array_elements(v_uses) u);
begin
  delete from credits.plan_qualities q where q.plan = any (v_plans);
  delete from credits.plan_limits l where l.plan = any (v_plans);
  delete from credits.plan_capabilities c where c.plan = any (v_plans);

  insert into credits.plan_capabilities (plan, capability)
  select u ->> 'plan', u ->> 'capability'
    from jsonb_array_elements(v_uses) u
   where u ->> 'capability' is not null;

  insert into credits.plan_qualities (plan, capability, quality, model, rank)
  select u ->> 'plan', u ->> 'capability', q.key, m.code, coalesce(m.number - 1, 0)
    from jsonb_array_elements(v_uses) u
    cross join jsonb_each(u -> 'qualities') q
    left join jsonb_array_elements_text(q.value) with ordinality m (code, number) on true;

  insert into credits.plan_limits (plan, capability, measure, period, rolling, maximum)
  select u ->> 'plan', u ->> 'capability', m.key, l ->> 'per', (l -> 'rolling')::boolean, m.value::numeric
    from jsonb_array_elements(v_uses) u
    cross join jsonb_array_elements(u -> 'limits') l
    cross join jsonb_each(l) m
   where m.key in ('calls', 'units', 'credits') and m.value <> 'null';
end $$;

-- Rates ---------------------------------------------------------------------------------------------------------------

-- Those in force, and those to come. A rate ends where the next of its key begins, also where that one has ended since.
create or replace function credits._live_rates(at timestamptz)
returns setof credits.rates
language sql
stable
as $$
  select r.*
    from credits.rates r
   where r.valid_until > _live_rates.at
     and not exists (
           select from credits.rates n
            where n.capability = r.capability and n.quality is not distinct from r.quality and n.model is not distinct from r.model
              and n.valid_from > r.valid_from and n.valid_from <= _live_rates.at)
$$;

-- Of each key, what the document says of now (its last entry that has begun, or the one without a start) and of the time to
-- come. What it says of the past is only checked.
create or replace function credits._write_rates(
  rates jsonb,
  at    timestamptz
)
returns void
language plpgsql
as $$
declare
  v_entries jsonb := (
    select coalesce(jsonb_agg(jsonb_build_object(
             'capability', c.code, 'quality', e ->> 'quality', 'model', e ->> 'model', 'price',
             credits._normal_price(e -> 'price', c.unit), 'valid_from', coalesce(credits._catalog_moment(e ->> 'valid_from'), '-infinity'))), '[]')
      from jsonb_array_elements(_write_rates.rates) e
      join credits.capabilities c on c.code = e ->> 'capability');
begin
  perform credits._write_rates_of_now(v_entries, _write_rates.at);

  delete from credits.rates r
   where r.valid_from > _write_rates.at
     and not exists (select from jsonb_populate_recordset(null::credits.rates, v_entries) e
                      where credits._same_key(e, r) and e.valid_from = r.valid_from);
  insert into credits.rates as r (created_at, capability, quality, model, valid_from, price)
  select _write_rates.at, e.capability, e.quality, e.model, e.valid_from, e.price
    from jsonb_populate_recordset(null::credits.rates, v_entries) e
   where e.valid_from > _write_rates.at
  on conflict on constraint rates_one_per_start do update set price = excluded.price where r.price <> excluded.price;
end $$;

-- The first rate of a key begins when it says, or always did. Others begin now: the past was priced by what there was.
create or replace function credits._write_rates_of_now(
  entries jsonb,
  at      timestamptz
)
returns void
language plpgsql
as $$
begin
  update credits.rates r
     set valid_until = _write_rates_of_now.at
   where r.rate_id in (
           select l.rate_id from credits._live_rates(_write_rates_of_now.at) l
            where l.valid_from <= _write_rates_of_now.at
              and not exists (select from jsonb_populate_recordset(null::credits.rates, _write_rates_of_now.entries) e
                               where credits._same_key(e, l) and e.valid_from <= _write_rates_of_now.at));

  insert into credits.rates as r (created_at, capability, quality, model, valid_from, price)
  select _write_rates_of_now.at, e.capability, e.quality, e.model,
         case when exists (select from credits.rates o where credits._same_key(o, e)) then _write_rates_of_now.at else e.valid_from end,
         e.price
    from (select distinct on (e.capability, e.quality, e.model) e.*
            from jsonb_populate_recordset(null::credits.rates, _write_rates_of_now.entries) e
           where e.valid_from <= _write_rates_of_now.at
           order by e.capability, e.quality, e.model, e.valid_from desc) e
   where not exists (select from credits._live_rates(_write_rates_of_now.at) l
                      where credits._same_key(l, e) and l.valid_from <= _write_rates_of_now.at and l.price = e.price)
  on conflict on constraint rates_one_per_start do update set price = excluded.price, valid_until = 'infinity';
end $$;

create or replace function credits._same_key(
  one   credits.rates,
  other credits.rates
)
returns boolean
language sql
immutable
as $$
  select (_same_key.one).capability = (_same_key.other).capability
         and (_same_key.one).quality is not distinct from (_same_key.other).quality
         and (_same_key.one).model is not distinct from (_same_key.other).model
$$;
