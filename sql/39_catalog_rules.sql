-- The rules between the parts of a catalogue's document (38_catalog_document.sql): keys that need or exclude each other,
-- codes that must exist, Stripe's ids, rates that were in force, and a price for everything that can be used.

-- Of one record: keys that are not known or missing, and what its kind asks for. Null is the same as not given.
create or replace function credits._record_problems(
  kind  text,
  value jsonb,
  path  jsonb
)
returns setof credits.catalog_problem
language plpgsql
stable
as $$
declare
  v_shape jsonb := credits._catalog_shape() -> _record_problems.kind;
  v_keys  text[] := array(select k from jsonb_object_keys(v_shape) k order by k);
  v_given jsonb := jsonb_strip_nulls(_record_problems.value);
begin
  return query
    select _record_problems.path || to_jsonb(k),
           'unknown key' || coalesce(nullif(credits._did_you_mean(k, v_keys), ''), '; known are ' || array_to_string(v_keys, ', '))
      from jsonb_object_keys(_record_problems.value) k
     where not v_shape ? k
    union all
    select _record_problems.path, k.key || ' is required'
      from jsonb_each(v_shape) k
     where jsonb_array_length(k.value) = 1 and not v_given ? k.key;
  if _record_problems.kind = 'limit' then
    return query select * from credits._limit_problems(v_given, _record_problems.path);
  elsif _record_problems.kind = 'rate' and v_given ? 'price' then
    return query select * from credits._price_problems(_record_problems.value -> 'price', _record_problems.path || '["price"]');
  elsif _record_problems.kind = 'plan' and v_given ->> 'rollover' = 'cap' and not v_given ? 'rollover_cap' then
    return query select _record_problems.path || '["rollover"]', 'needs a rollover_cap';
  elsif _record_problems.kind = 'plan' and v_given ->> 'rollover' is distinct from 'cap' and v_given ? 'rollover_cap' then
    return query select _record_problems.path || '["rollover_cap"]', 'only goes with rollover: cap';
  end if;
end $$;

create or replace function credits._limit_problems(
  value jsonb,
  path  jsonb
)
returns setof credits.catalog_problem
language sql
immutable
as $$
  select _limit_problems.path || p.at, p.problem
    from (values
      (jsonb '[]', 'a limit has exactly one of calls, units and credits',
       (_limit_problems.value ? 'calls')::integer + (_limit_problems.value ? 'units')::integer
         + (_limit_problems.value ? 'credits')::integer <> 1),
      ('["per"]', 'units and credits are limited per month',
       _limit_problems.value ?| array['units', 'credits'] and _limit_problems.value ->> 'per' in ('minute', 'hour', 'day')),
      ('["rolling"]', 'only calls are limited in a rolling window',
       _limit_problems.value ?| array['units', 'credits'] and _limit_problems.value -> 'rolling' = 'true'),
      ('["units"]', 'units are those of one capability: limit them there',
       _limit_problems.value ? 'units' and _limit_problems.path ->> 2 <> 'capabilities')) p (at, problem, holds)
   where p.holds
$$;

-- Of a map or a list: codes, and what may be there only once.
create or replace function credits._collection_problems(
  type  jsonb,
  value jsonb,
  path  jsonb,
  whole jsonb
)
returns setof credits.catalog_problem
language sql
stable
as $$
  select _collection_problems.path || to_jsonb(k.code), p.problem
    from jsonb_object_keys(credits._object(_collection_problems.value)) k (code)
    cross join lateral (values
      (case when length(k.code) not between 1 and 200 then 'a code has 1 to 200 characters' end),
      (credits._no_such_code(_collection_problems.type ->> 'of', k.code, _collection_problems.whole))) p (problem)
   where p.problem is not null
  union all
  select _collection_problems.path || to_jsonb(e.number - 1),
         case e.type when 'limit' then 'the same window is limited above'
                     when 'rate'  then 'the same rate is given above'
                     when 'plan_price' then 'the price for this interval and currency is given above' else 'is given above' end
    from (select l.number, _collection_problems.type ->> 'list' as type,
                 row_number() over (partition by credits._identity(_collection_problems.type ->> 'list', l.value)
                                    order by l.number) as times
            from jsonb_array_elements(credits._list(_collection_problems.value)) with ordinality l (value, number)) e
   where e.times > 1
  union all
  select _collection_problems.path || jsonb_build_array(e.code, 'is_default'), 'the default plan is already ' || e.first
    from (select p.key as code, min(p.key) over () as first
            from jsonb_each(credits._object(_collection_problems.value)) p
           where _collection_problems.type ->> 'map' = 'plan' and p.value -> 'is_default' = 'true') e
   where e.code <> e.first
$$;

-- What makes two members of a list the same.
create or replace function credits._identity(
  type  text,
  value jsonb
)
returns jsonb
language sql
stable
as $$
  select case _identity.type
    when 'limit' then
      jsonb_build_array(jsonb_strip_nulls(_identity.value) ? 'calls', jsonb_strip_nulls(_identity.value) ? 'units',
                        _identity.value -> 'per', coalesce(_identity.value -> 'rolling', 'false'))
    when 'rate' then
      jsonb_build_array(_identity.value -> 'capability', _identity.value ->> 'quality', _identity.value ->> 'model',
                        coalesce(credits._catalog_moment(_identity.value ->> 'valid_from')::text, _identity.value ->> 'valid_from'))
    when 'plan_price' then
      jsonb_build_array(_identity.value -> 'currency', coalesce(_identity.value ->> 'interval', 'month'))
    else _identity.value
  end
$$;

-- Two things that are sold under one id of Stripe. What the document does not name but Stripe's ids refer to stays, and so
-- do they.
create or replace function credits._stripe_problems(
  catalog jsonb,
  stored  jsonb
)
returns setof credits.catalog_problem
language sql
stable
as $$
  with sold as (
    select s.section, code, n.value is not null as named, credits._with_stripe_ids(n.value, o.value) as value,
           jsonb_build_array(s.section, code) as path
      from unnest(array['packages', 'plans']) s (section)
      cross join (jsonb_each(credits._object(_stripe_problems.catalog -> s.section)) n (code, value)
                  full join jsonb_each(_stripe_problems.stored -> s.section) o (code, value) using (code))
  ), ids as (
    select s.section, s.code, s.named, i.kind, i.id, s.path || i.at as path
      from sold s
      cross join lateral (
        select 'price', s.value ->> 'stripe_price_id', jsonb '["stripe_price_id"]'
        union all
        select 'product', s.value ->> 'stripe_product_id', jsonb '["stripe_product_id"]' where s.section = 'plans'
        union all
        select 'price', l.value #>> '{}', jsonb_build_array('stripe_price_ids', l.number - 1)
          from jsonb_array_elements(credits._list(s.value -> 'stripe_price_ids')) with ordinality l (value, number)) i (kind, id, at)
  )
  select i.path, format('is already that of %s.%s%s', o.section, o.code,
                        case when not o.named then ', which is not in the document but stays, for it was sold at Stripe' else '' end)
    from ids i
    join lateral (
      select o.section, o.code, o.named from ids o
       where o.kind = i.kind and o.id = i.id and (o.section, o.code) <> (i.section, i.code)
         and (not o.named or (o.section, o.code) < (i.section, i.code))
       order by o.named limit 1) o on true
   where i.named and _stripe_problems.catalog #> array[i.section, i.code] ? (i.path ->> 2)
$$;

-- A record as the document gives it, with the ids of Stripe that it does not give as they are stored.
create or replace function credits._with_stripe_ids(
  given  jsonb,
  stored jsonb
)
returns jsonb
language sql
immutable
as $$
  select coalesce((select jsonb_object_agg(e.key, e.value)
                     from jsonb_each(credits._object(_with_stripe_ids.stored)) e
                    where e.key like E'stripe\\_%'), '{}') || credits._object(_with_stripe_ids.given)
$$;

create or replace function credits._history_problems(
  rates jsonb,
  whole jsonb,
  at    timestamptz
)
returns setof credits.catalog_problem
language sql
stable
as $$
  select jsonb_build_array('rates', e.number - 1, 'valid_from'),
         'a rate that has been in force is never edited: give a new valid_from'
    from jsonb_array_elements(_history_problems.rates) with ordinality e (value, number)
    join credits.rates r on r.capability = e.value ->> 'capability'
                        and r.quality is not distinct from e.value ->> 'quality'
                        and r.model is not distinct from e.value ->> 'model'
                        and r.valid_from = credits._catalog_moment(e.value ->> 'valid_from')
   where r.valid_from <= _history_problems.at
     and case when not exists (select from credits._price_problems(e.value -> 'price', '[]'))
              then r.price <> credits._normal_price(e.value -> 'price', credits._unit_in(_history_problems.whole, r.capability)) end
$$;

create or replace function credits._unit_in(
  whole      jsonb,
  capability text
)
returns text
language sql
immutable
as $$
  select coalesce(_unit_in.whole #>> array['capabilities', _unit_in.capability, 'unit'],
                  credits._catalog_shape() #>> '{capability,unit,1}')
$$;

-- What plans may use and no rate in force prices. A rate without quality or model is that of all which have none of their own.
create or replace function credits._unpriced(
  whole jsonb,
  at    timestamptz
)
returns setof credits.catalog_problem
language sql
stable
as $$
  with rates as (
    select distinct r ->> 'capability' as capability, r ->> 'quality' as quality, r ->> 'model' as model
      from jsonb_array_elements(credits._list(_unpriced.whole -> 'rates')) r
     where (credits._catalog_moment(r ->> 'valid_from') > _unpriced.at) is not true
  ), uses as (
    select p.key as plan, c.key as capability, q.key as quality, m.code as model
      from jsonb_each(credits._object(_unpriced.whole -> 'plans')) p
      cross join jsonb_each(credits._object(p.value -> 'capabilities')) c
      left join jsonb_each(coalesce(nullif(credits._object(c.value -> 'qualities'), '{}'),
                                    credits._object(p.value -> 'qualities'))) q on true
      left join jsonb_array_elements_text(credits._list(q.value)) m (code) on true
     where credits._is_active(_unpriced.whole -> 'capabilities' -> c.key)
       and (q.key is null or credits._is_active(_unpriced.whole -> 'quality_levels' -> q.key))
       and (m.code is null or credits._is_active(_unpriced.whole -> 'models' -> m.code))
  )
  select jsonb_build_array('plans', u.plan, 'capabilities', u.capability),
         'has no rate in force' || coalesce(' for ' || string_agg(distinct u.quality || coalesce(' by ' || u.model, ''), ', '), '')
    from uses u
   where not exists (
           select from rates r
            where r.capability = u.capability and (r.quality is null or r.quality = u.quality)
              and (r.model is null or r.model = u.model))
   group by u.plan, u.capability
$$;

create or replace function credits._is_active(value jsonb)
returns boolean
language sql
immutable
as $$
  select _is_active.value is not null and (_is_active.value -> 'active') is distinct from 'false'
$$;

-- Words ---------------------------------------------------------------------------------------------------------------

create or replace function credits._no_such_code(
  section text,
  code    text,
  whole   jsonb
)
returns text
language sql
immutable
as $$
  select format('there is no %s %s%s', credits._catalog_noun(_no_such_code.section), _no_such_code.code,
                credits._did_you_mean(_no_such_code.code, array(
                  select jsonb_object_keys(_no_such_code.whole -> _no_such_code.section))))
   where jsonb_typeof(_no_such_code.whole -> _no_such_code.section) = 'object'
     and not _no_such_code.whole -> _no_such_code.section ? _no_such_code.code
$$;

create or replace function credits._catalog_noun(section text)
returns text
language sql
immutable
as $$
  select replace(credits._catalog_shape() #>> array['catalog', _catalog_noun.section, '0', 'map'], '_', ' ')
$$;

-- Names the one word of those known that was obviously meant: written otherwise, cut short, or a letter too few, too many, wrong
-- or swapped. Two words are one such slip apart if they are the same but for at most one letter of each.
create or replace function credits._did_you_mean(
  word  text,
  known text[]
)
returns text
language sql
immutable
as $$
  select case when count(*) = 1 then format('; did you mean %s?', min(k.word)) else '' end
    from (select k, lower(regexp_replace(k, '[^[:alnum:]]', '', 'g')) from unnest(_did_you_mean.known) k) k (word, plain)
    cross join lower(regexp_replace(left(_did_you_mean.word, 100), '[^[:alnum:]]', '', 'g')) w (plain)
   where k.plain = w.plain
      or least(length(k.plain), length(w.plain)) > 3 and (starts_with(k.plain, w.plain) or starts_with(w.plain, k.plain))
      or least(length(k.plain), length(w.plain)) > 2 and length(k.plain) - length(w.plain) in (-1, 0, 1)
         and exists (select from generate_series(0, length(k.plain)) i, generate_series(0, length(w.plain)) j
                      where left(k.plain, greatest(i - 1, 0)) || substr(k.plain, i + 1)
                            = left(w.plain, greatest(j - 1, 0)) || substr(w.plain, j + 1))
$$;
