-- The document of a price, as docs/prices.md describes it: what is wrong with one, and its canonical form.
-- _price_problems() takes any JSON and never raises; all else is given documents without problems.

-- The keys of each part of the document, and what their values must be (_value_problem).
create or replace function credits._price_keys(part text)
returns jsonb
language sql
immutable
as $$
  select case _price_keys.part
    when 'price' then '{"minimum": "amount", "maximum": "amount", "qualities": "object", "models": "object"}'
    when 'line'  then '{"flat": "amount", "credits": "amount", "tiers": "list", "per": "size", "block": "size",
                        "mode": "mode", "unit": "unit", "rounding": "rounding", "decimals": "decimals"}'
    when 'tier'  then '{"up_to": "size", "credits": "amount", "flat": "amount"}'
  end::jsonb
$$;

-- Every problem of a price, at path and below it.
create or replace function credits._price_problems(
  price jsonb,
  path  jsonb
)
returns setof credits.catalog_problem
language plpgsql
immutable
as $$
declare
  v_price jsonb := _price_problems.price;
  v_path  jsonb := _price_problems.path;
begin
  if jsonb_typeof(v_price) = 'number' then
    return query select v_path, p from credits._value_problem('amount', v_price) p where p is not null;
    return;
  elsif jsonb_typeof(v_price) is distinct from 'object' then
    return query select v_path, 'A price is a number of credits, a line, or an object with lines.';
    return;
  elsif v_price ? 'lines' then
    return query select * from credits._key_problems(v_price, credits._price_keys('price') || '{"lines": "list"}', v_path);
    return query select p.*
                   from jsonb_array_elements(credits._list(v_price -> 'lines')) with ordinality l (line, number),
                        credits._line_problems(l.line, '{}', v_path || jsonb_build_array('lines', l.number - 1)) p;
  else
    return query select * from credits._line_problems(v_price, credits._price_keys('price'), v_path);
  end if;
  return query select p.*
                 from (values ('qualities'), ('models')) f (key)
                 cross join credits._factor_problems(v_price -> f.key, v_path || to_jsonb(f.key)) p;
  if credits._amount_in(v_price -> 'minimum') > credits._amount_in(v_price -> 'maximum') then
    return query select v_path || '["minimum"]', 'The minimum is at most the maximum.';
  end if;
end $$;

-- more: further keys that may stand here, those of a price that is one line.
create or replace function credits._line_problems(
  line jsonb,
  more jsonb,
  path jsonb
)
returns setof credits.catalog_problem
language plpgsql
immutable
as $$
declare
  v_line  jsonb   := _line_problems.line;
  v_path  jsonb   := _line_problems.path;
  v_kinds integer := (v_line ? 'flat')::integer + (v_line ? 'credits')::integer + (v_line ? 'tiers')::integer;
begin
  if jsonb_typeof(v_line) is distinct from 'object' then
    return query select v_path, 'A line is an object.';
    return;
  end if;
  return query select * from credits._key_problems(v_line, credits._price_keys('line') || _line_problems.more, v_path);
  if v_kinds <> 1 then
    return query select v_path, 'A line has exactly one of flat, credits and tiers.';
  elsif v_line ? 'flat' then
    return query select v_path || to_jsonb(k), 'A flat line has none.'
                   from unnest(array['per', 'block', 'mode']) k where v_line ? k;
  elsif v_line ? 'credits' and v_line ? 'mode' then
    return query select v_path || '["mode"]', 'Only tiers have a mode.';
  end if;
  if v_line ? 'per' and v_line ? 'block' then
    return query select v_path || '["block"]', 'A line has per or block, not both.';
  end if;
  return query select * from credits._tier_problems(credits._list(v_line -> 'tiers'), v_path || '["tiers"]');
end $$;

create or replace function credits._tier_problems(
  tiers jsonb,
  path  jsonb
)
returns setof credits.catalog_problem
language sql
immutable
as $$
  with tiers as (
    select e.tier, _tier_problems.path || to_jsonb(e.number - 1) as path,
           e.number = jsonb_array_length(_tier_problems.tiers) as is_last, e.tier ? 'up_to' as has_end,
           credits._amount_in(e.tier -> 'up_to') as up_to,
           credits._amount_in(lag(e.tier) over (order by e.number) -> 'up_to') as below
      from jsonb_array_elements(_tier_problems.tiers) with ordinality e (tier, number)
  )
  select t.path, 'A tier is an object.' from tiers t where jsonb_typeof(t.tier) <> 'object'
  union all
  select p.path, p.problem from tiers t, credits._key_problems(t.tier, credits._price_keys('tier'), t.path) p
  union all
  select t.path || '["credits"]', 'Every tier has credits.'
    from tiers t where jsonb_typeof(t.tier) = 'object' and not t.tier ? 'credits'
  union all
  select t.path || '["up_to"]', 'Every tier but the last says up to where it goes.'
    from tiers t where jsonb_typeof(t.tier) = 'object' and not t.is_last and not t.has_end
  union all
  select t.path || '["up_to"]', 'The last tier is open.' from tiers t where t.is_last and t.has_end
  union all
  select t.path || '["up_to"]', 'Each tier goes further than the one before it.' from tiers t where t.up_to <= t.below
$$;

-- Multipliers by the code of a quality or a model.
create or replace function credits._factor_problems(
  factors jsonb,
  path    jsonb
)
returns setof credits.catalog_problem
language sql
immutable
as $$
  select _factor_problems.path || to_jsonb(f.key), p
    from jsonb_each(credits._object(_factor_problems.factors)) f
    cross join credits._value_problem('size', f.value) p
   where p is not null
$$;

-- Keys that are not known here, and values that are not what their key asks for.
create or replace function credits._key_problems(
  object jsonb,
  keys   jsonb,
  path   jsonb
)
returns setof credits.catalog_problem
language sql
immutable
as $$
  select _key_problems.path || to_jsonb(e.key), p.problem
    from jsonb_each(credits._object(_key_problems.object)) e
    cross join lateral (
      select case when _key_problems.keys ? e.key then credits._value_problem(_key_problems.keys ->> e.key, e.value)
                  else format('Not known here. Known are %s.',
                              (select string_agg(k, ', ' order by k) from jsonb_object_keys(_key_problems.keys) k))
             end) p (problem)
   where p.problem is not null
$$;

-- What is wrong with a value of a kind, or null.
create or replace function credits._value_problem(
  kind  text,
  value jsonb
)
returns text
language sql
immutable
as $$
  select case _value_problem.kind
    when 'amount' then
      case when credits._amount_in(_value_problem.value) is null
           then 'A number from 0 to below 1e12 with at most 6 decimals.' end
    when 'size' then
      case when (credits._amount_in(_value_problem.value) > 0) is not true
           then 'A number above 0 and below 1e12 with at most 6 decimals.' end
    when 'decimals' then
      case when (credits._amount_in(_value_problem.value) in (0, 1, 2, 3, 4, 5, 6)) is not true
           then 'A whole number from 0 to 6.' end
    when 'unit' then
      case when (jsonb_typeof(_value_problem.value) = 'string'
                 and length(_value_problem.value #>> '{}') between 1 and 200) is not true
           then 'A text of 1 to 200 characters.' end
    when 'rounding' then
      case when (_value_problem.value in ('"half_up"', '"half_even"', '"up"', '"down"')) is not true
           then 'One of half_up, half_even, up and down.' end
    when 'mode' then
      case when (_value_problem.value in ('"graduated"', '"volume"')) is not true
           then 'One of graduated and volume.' end
    when 'list' then
      case when credits._list(_value_problem.value) = '[]' then 'A list of one at least.' end
    when 'object' then
      case when (jsonb_typeof(_value_problem.value) = 'object') is not true then 'An object of numbers by code.' end
  end
$$;

-- JSON as what it should be, so that nothing is asked of what it is not: an amount or null, a list, an object.
create or replace function credits._amount_in(value jsonb)
returns numeric
language sql
immutable
as $$
  select case when jsonb_typeof(_amount_in.value) = 'number' then
           case when credits._is_amount(_amount_in.value::numeric) then _amount_in.value::numeric end
         end
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

-- The canonical form -------------------------------------------------------------------------------------------------

-- The one form of a price that has no problems: all lines, their defaults filled in, numbers trimmed. Its own canonical form.
create or replace function credits._normal_price(
  price jsonb,
  unit  text
)
returns jsonb
language sql
immutable
as $$
  select credits._trimmed(jsonb_strip_nulls(jsonb_build_object(
           'minimum',   p.price -> 'minimum',
           'maximum',   p.price -> 'maximum',
           'qualities', nullif(p.price -> 'qualities', '{}'),
           'models',    nullif(p.price -> 'models', '{}'),
           'lines',     (select jsonb_agg(jsonb_build_object('unit', _normal_price.unit, 'rounding', 'half_up', 'decimals', 6)
                                          || case when l.line ? 'tiers' then jsonb '{"mode": "graduated"}' else '{}' end
                                          || (l.line - '{minimum,maximum,qualities,models}'::text[])
                                          order by l.number)
                           from jsonb_array_elements(coalesce(p.price -> 'lines', jsonb_build_array(p.price)))
                                with ordinality l (line, number)))))
    from (select case when jsonb_typeof(_normal_price.price) = 'number'
                      then jsonb_build_object('flat', _normal_price.price)
                      else _normal_price.price end) p (price)
$$;

-- JSON with each of its numbers trimmed: 1.50 is 1.5.
create or replace function credits._trimmed(value jsonb)
returns jsonb
language plpgsql
immutable
as $$
begin
  case jsonb_typeof(_trimmed.value)
    when 'number' then
      return to_jsonb(trim_scale(_trimmed.value::numeric));
    when 'array' then
      return (select coalesce(jsonb_agg(credits._trimmed(e.value) order by e.number), '[]')
                from jsonb_array_elements(_trimmed.value) with ordinality e (value, number));
    when 'object' then
      return (select coalesce(jsonb_object_agg(e.key, credits._trimmed(e.value)), '{}')
                from jsonb_each(_trimmed.value) e);
    else
      return _trimmed.value;
  end case;
end $$;
