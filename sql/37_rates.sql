-- What a call is priced by: the rate in force, and its units, counted. Nothing here is written.

-- The rate in force for a call, the most specific one: quality and model, model, quality, neither. A row of nulls if none.
-- A rate ends where the next of its key begins, also where that one has left the catalogue since: so each key is asked for
-- its latest rate alone. The branches are read in their order, up to the first that has one.
create or replace function credits._rate(
  capability text,
  quality    text,
  model      text,
  at         timestamptz
)
returns credits.rates
language plpgsql
stable
as $$
declare
  v_rate credits.rates;
begin
  select f.* into v_rate
    from ((select r.* from credits.rates r
            where r.capability = _rate.capability and r.quality = _rate.quality and r.model = _rate.model
              and r.valid_from <= _rate.at
            order by r.quality desc, r.model desc, r.valid_from desc limit 1)
          union all
          (select r.* from credits.rates r
            where r.capability = _rate.capability and r.quality is null and r.model = _rate.model
              and r.valid_from <= _rate.at
            order by r.quality desc, r.model desc, r.valid_from desc limit 1)
          union all
          (select r.* from credits.rates r
            where r.capability = _rate.capability and r.quality = _rate.quality and r.model is null
              and r.valid_from <= _rate.at
            order by r.quality desc, r.model desc, r.valid_from desc limit 1)
          union all
          (select r.* from credits.rates r
            where r.capability = _rate.capability and r.quality is null and r.model is null
              and r.valid_from <= _rate.at
            order by r.quality desc, r.model desc, r.valid_from desc limit 1)) f
   where f.valid_until > _rate.at
   limit 1;
  return v_rate;
end $$;

-- What is counted: `units` of the capability's own unit, or `unit_counts` of several by their names. Nothing given is {}.
create or replace function credits._counts(
  unit        text,
  units       numeric,
  unit_counts jsonb
)
returns jsonb
language plpgsql
immutable
as $$
declare
  v_counts jsonb := jsonb '{}';
  v_unit   text;
  v_units  jsonb;
begin
  if _counts.units is not null and _counts.unit_counts is not null then
    perform credits._fail(400, 'invalid_request', '{"argument": "unit_counts"}',
      'Give units or unit_counts, not both.');
  elsif _counts.units is not null then
    return jsonb_build_object(_counts.unit, credits._check_units(_counts.unit, _counts.units));
  elsif jsonb_typeof(_counts.unit_counts) <> 'object' then
    perform credits._fail(400, 'invalid_request', '{"argument": "unit_counts"}',
      'unit_counts is a JSON object of units and their numbers.');
  elsif _counts.unit_counts is not null then
    for v_unit, v_units in select e.key, e.value from jsonb_each(_counts.unit_counts) e loop
      if jsonb_typeof(v_units) <> 'number' then
        perform credits._fail(400, 'invalid_request', jsonb_build_object('argument', 'unit_counts', 'unit', v_unit),
          'unit_counts is a JSON object of units and their numbers.');
      end if;
      v_counts := v_counts || jsonb_build_object(v_unit, credits._check_units(v_unit, v_units::numeric));
    end loop;
  end if;
  return v_counts;
end $$;

-- Counts that a price can use. A price of flat lines alone needs none, and may be told those of the capability's unit.
create or replace function credits._check_counts(
  price  jsonb,
  counts jsonb
)
returns jsonb
language plpgsql
immutable
as $$
declare
  v_lines   jsonb   := _check_counts.price -> 'lines';
  v_unknown jsonb   := _check_counts.counts;
  v_counts  boolean := false;
begin
  for i in 0 .. jsonb_array_length(v_lines) - 1 loop
    v_unknown := v_unknown - (v_lines -> i ->> 'unit');
    v_counts  := v_counts or not (v_lines -> i) ? 'flat';
  end loop;
  if v_unknown <> '{}' or (v_counts and _check_counts.counts = '{}') then
    perform credits._fail(400, 'invalid_request',
      jsonb_build_object('argument', 'units', 'units', credits._units_of(v_lines),
                         'unknown', array(select jsonb_object_keys(v_unknown))),
      case when v_unknown = '{}' then 'The price counts units: say how many.'
           else 'The price does not count such units.' end);
  end if;
  return _check_counts.counts;
end $$;

-- Whether some line of a price is of a unit: that is what a call may be told in.
create or replace function credits._knows_unit(
  price jsonb,
  unit  text
)
returns boolean
language sql
stable
as $$
  select _knows_unit.price -> 'lines' @> jsonb_build_array(jsonb_build_object('unit', _knows_unit.unit))
$$;

-- The units that lines count; of flat lines alone, the one they may be told.
create or replace function credits._units_of(lines jsonb)
returns text[]
language plpgsql
immutable
as $$
begin
  return (
    select coalesce(array_agg(distinct l ->> 'unit') filter (where not l ? 'flat'), array_agg(distinct l ->> 'unit'))
      from jsonb_array_elements(_units_of.lines) l);
end $$;

-- Capabilities of a document that count another unit than the stored ones, while a price, now or to come, goes on counting the one
-- before, and no other: nobody could tell it how much was used.
create or replace function credits._unit_problems(
  catalog jsonb,
  stored  jsonb,
  at      timestamptz
)
returns setof credits.catalog_problem
language sql
stable
as $$
  with units as (
    select c.key as capability, o.value ->> 'unit' as before, credits._unit_in(_unit_problems.catalog, c.key) as unit
      from jsonb_each(credits._object(_unit_problems.catalog -> 'capabilities')) c
      join jsonb_each(_unit_problems.stored -> 'capabilities') o on o.key = c.key
  ), rates as (
    select u.*, r.value -> 'price' as price, f.valid_from,
           max(f.valid_from) filter (where f.valid_from <= _unit_problems.at)
             over (partition by u.capability, r.value ->> 'quality', r.value ->> 'model') as present_from
      from units u
      join jsonb_array_elements(credits._list((_unit_problems.stored || _unit_problems.catalog) -> 'rates')) r
        on r.value ->> 'capability' = u.capability,
           lateral (select coalesce(credits._catalog_moment(r.value ->> 'valid_from'), '-infinity') as valid_from) f
     where u.before <> u.unit
  )
  select distinct jsonb_build_array('capabilities', r.capability, 'unit'),
         format('its price counts %s: give it one that counts %s', r.before, r.unit)
    from rates r
   where r.valid_from >= coalesce(r.present_from, '-infinity')
     and case when not exists (select from credits._price_problems(r.price, '[]'))
              then credits._units_of(credits._normal_price(r.price, r.unit) -> 'lines') = array[r.before] end
$$;

create or replace function credits._check_units(
  unit  text,
  units numeric
)
returns numeric
language plpgsql
immutable
as $$
begin
  if credits._is_amount(_check_units.units) is not true then
    perform credits._fail(422, 'invalid_amount',
      jsonb_build_object('unit', _check_units.unit, 'units', _check_units.units::text),
      'Units are a number from 0 to below 1e12 with at most 6 decimals.');
  end if;
  return trim_scale(_check_units.units);
end $$;
