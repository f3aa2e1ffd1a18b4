-- Stand-ins.
create or replace function credits._price_problems(
  price jsonb,
  path  jsonb
)
returns setof credits.catalog_problem
language sql
immutable
as $$
  select _price_problems.path, 'A price is a number of credits, a line, or an object with lines.'
   where (jsonb_typeof(_price_problems.price) in ('number', 'object')) is not true
$$;

create or replace function credits._normal_price(
  price jsonb,
  unit  text
)
returns jsonb
language sql
immutable
as $$
  select case when jsonb_typeof(_normal_price.price) = 'number'
              then jsonb_build_object('lines', jsonb_build_array(jsonb_build_object('flat', _normal_price.price)))
              else _normal_price.price end
$$;

create or replace function credits._list(value jsonb)
returns jsonb
language sql
immutable
as $$
  select case when jsonb_typeof(_list.value) = 'array' then _list.value else '[]' end
$$;

create or replace function credits._object(value jsonb)
returns jsonb
language sql
immutable
as $$
  select case when jsonb_typeof(_object.value) = 'object' then _object.value else '{}' end
$$;

create or replace function credits._trimmed(value jsonb)
returns jsonb
language sql
immutable
as $$
  select case jsonb_typeof(_trimmed.value)
    when 'number' then to_jsonb(trim_scale(_trimmed.value::numeric))
    when 'array'  then (select coalesce(jsonb_agg(credits._trimmed(e.value) order by e.number), '[]')
                          from jsonb_array_elements(_trimmed.value) with ordinality e (value, number))
    when 'object' then (select coalesce(jsonb_object_agg(e.key, credits._trimmed(e.value)), '{}')
                          from jsonb_each(_trimmed.value) e)
    else _trimmed.value
  end
$$;
