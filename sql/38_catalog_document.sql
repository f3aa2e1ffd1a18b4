-- The catalogue's document: what it is made of, and everything that is wrong with one. Nothing here is written.
-- Checks take any JSON and never raise, so that all problems are found at once.

-- For each kind of record its keys, what each must be, and what it is if it is not given; a key without that must be given.
-- A map goes by codes, "of" a section where they must be in it; the name of a section is one of its codes.
create or replace function credits._catalog_shape()
returns jsonb
language sql
immutable
as $$
  select jsonb '{
    "catalog": {
      "capabilities":     [{"map": "capability"}, null],
      "quality_levels":   [{"map": "quality_level"}, null],
      "models":           [{"map": "model"}, null],
      "packages":         [{"map": "package"}, null],
      "plans":            [{"map": "plan"}, null],
      "rates":            [{"list": "rate"}, null]},
    "capability": {
      "name":             ["name", null],
      "description":      ["text", null],
      "unit":             ["name", "unit"],
      "display_order":    ["integer", 0],
      "active":           ["boolean", true]},
    "quality_level": {
      "name":             ["name", null],
      "description":      ["text", null],
      "display_order":    ["integer", 0],
      "active":           ["boolean", true]},
    "model": {
      "name":             ["name", null],
      "description":      ["text", null],
      "display_order":    ["integer", 0],
      "active":           ["boolean", true]},
    "package": {
      "name":             ["name"],
      "description":      ["text", null],
      "credits":          ["positive"],
      "price":            ["minor units"],
      "currency":         ["currency"],
      "discount_percent": ["percentage", 0],
      "popular":          ["boolean", false],
      "display_order":    ["integer", 0],
      "active":           ["boolean", true],
      "stripe_product_id": ["name", null],
      "stripe_price_id":  ["name", null]},
    "plan": {
      "name":             ["name"],
      "description":      ["text", null],
      "monthly_credits":  ["amount", 0],
      "trial_credits":    ["amount", 0],
      "prices":           [{"list": "plan_price"}, []],
      "rollover":         ["none|all|cap", "none"],
      "rollover_cap":     ["positive", null],
      "seats":            ["seats", null],
      "is_default":       ["boolean", false],
      "display_order":    ["integer", 0],
      "active":           ["boolean", true],
      "stripe_product_id": ["name", null],
      "stripe_price_ids": [{"list": "name"}, []],
      "qualities":        [{"map": {"list": "models"}, "of": "quality_levels"}, {}],
      "limits":           [{"list": "limit"}, []],
      "capabilities":     [{"map": "use", "of": "capabilities"}, {}]},
    "plan_price": {
      "amount":           ["minor units"],
      "currency":         ["currency"],
      "interval":         ["month|year", "month"]},
    "use": {
      "qualities":        [{"map": {"list": "models"}, "of": "quality_levels"}, {}],
      "limits":           [{"list": "limit"}, []]},
    "limit": {
      "calls":            ["whole amount", null],
      "units":            ["amount", null],
      "credits":          ["amount", null],
      "per":              ["minute|hour|day|month"],
      "rolling":          ["boolean", false]},
    "rate": {
      "capability":       ["capabilities"],
      "quality":          ["quality_levels", null],
      "model":            ["models", null],
      "valid_from":       ["moment", null],
      "price":            ["price"]}
  }'
$$;

-- The keys of a section's records that are columns of its table, which bears the section's name.
create or replace function credits._catalog_columns(section text)
returns text[]
language sql
immutable
as $$
  select array_agg(k.key order by k.key)
    from credits._catalog_shape() s (shape)
    cross join jsonb_each(s.shape -> (s.shape #>> array['catalog', _catalog_columns.section, '0', 'map'])) k
   where k.key not in ('prices', 'qualities', 'limits', 'capabilities')
$$;

-- A part of a catalogue that has no problems, with all its keys: defaults filled in, numbers trimmed, what is unknown left
-- out. Or plain: without what is default. A name that may be left out is the code.
create or replace function credits._shaped(
  type  jsonb,
  value jsonb,
  plain boolean
)
returns jsonb
language plpgsql
immutable
as $$
declare
  v_record text  := coalesce(_shaped.type -> 'map', _shaped.type -> 'list', _shaped.type) #>> '{}';
  v_shape  jsonb := credits._catalog_shape() -> v_record;
  v_whole  jsonb;
begin
  if v_shape is null then
    return _shaped.value;
  elsif _shaped.type ? 'map' then
    return (select coalesce(jsonb_object_agg(e.key, credits._shaped(_shaped.type -> 'map', case
                     when v_shape -> 'name' -> 1 = 'null' and e.value ->> 'name' is null
                     then credits._object(e.value) || jsonb_build_object('name', e.key) else e.value end, _shaped.plain)), '{}')
              from jsonb_each(_shaped.value) e);
  elsif _shaped.type ? 'list' then
    return (select coalesce(jsonb_agg(credits._shaped(_shaped.type -> 'list', e.value, _shaped.plain) order by e.number), '[]')
              from jsonb_array_elements(_shaped.value) with ordinality e (value, number));
  end if;
  v_whole := (
    select jsonb_object_agg(k.key, case
             when jsonb_typeof(g.value) = 'number' then to_jsonb(trim_scale(g.value::numeric))
             when jsonb_typeof(k.value -> 0) = 'object' and g.value <> 'null'
             then credits._shaped(k.value -> 0, g.value, _shaped.plain)
             else g.value end)
      from jsonb_each(v_shape) k
      cross join lateral (select coalesce(nullif(_shaped.value -> k.key, 'null'), k.value -> 1)) g (value));
  return case when _shaped.plain
              then (select coalesce(jsonb_object_agg(e.key, e.value), '{}')
                      from jsonb_each(v_whole) e
                     where e.value is distinct from v_shape -> e.key -> 1)
              else v_whole end;
end $$;

-- What is wrong ------------------------------------------------------------------------------------------------------

-- All problems of a document, beside the catalogue that is stored (whole, as credits._stored_catalog shows it) at a moment.
create or replace function credits._catalog_problems(
  catalog jsonb,
  stored  jsonb,
  at      timestamptz
)
returns setof credits.catalog_problem
language plpgsql
stable
as $$
declare
  v_catalog jsonb := credits._object(_catalog_problems.catalog);
  v_whole   jsonb := _catalog_problems.stored || v_catalog;
begin
  return query select * from credits._document_problems(_catalog_problems.catalog, v_whole);
  return query select * from credits._stripe_problems(v_catalog, _catalog_problems.stored);
  return query select * from credits._unit_problems(v_catalog, _catalog_problems.stored, _catalog_problems.at);
  return query select * from credits._history_problems(credits._list(v_catalog -> 'rates'), v_whole, _catalog_problems.at);
  if v_catalog ?| array['capabilities', 'quality_levels', 'models', 'plans', 'rates'] then
    return query select * from credits._unpriced(v_whole, _catalog_problems.at);
  end if;
end $$;

-- Walks down the document. `whole` is all that it may refer to: its own sections, and those that it leaves alone.
create or replace function credits._document_problems(
  catalog jsonb,
  whole   jsonb
)
returns setof credits.catalog_problem
language sql
stable
as $$
  with recursive nodes (path, type, value) as (
    select jsonb '[]', jsonb '"catalog"', _document_problems.catalog
    union all
    select n.path || c.key, c.type, c.value
      from nodes n
      cross join lateral (
        select to_jsonb(k.key), k.value -> 0, n.value -> k.key
          from jsonb_each(credits._catalog_shape() -> (n.type #>> '{}')) k
         where n.value -> k.key <> 'null' or (n.type = '"catalog"' and n.value ? k.key)
        union all
        select to_jsonb(e.key), n.type -> 'map',
               case when e.value = 'null' and jsonb_typeof(n.type -> 'map') = 'string' then '{}' else e.value end
          from jsonb_each(credits._object(n.value)) e
         where n.type ? 'map'
        union all
        select to_jsonb(e.number - 1), n.type -> 'list', e.value
          from jsonb_array_elements(credits._list(n.value)) with ordinality e (value, number)
         where n.type ? 'list') c (key, type, value)
  )
  select p.path, p.problem
    from nodes n
    cross join lateral (
      select n.path, credits._value_of_wrong_type(n.type, n.value, _document_problems.whole) as problem
      union all
      select w.path, w.problem from credits._record_problems(n.type #>> '{}', n.value, n.path) w
       where jsonb_typeof(n.value) = 'object' and credits._catalog_shape() ? (n.type #>> '{}')
      union all
      select w.path, w.problem from credits._collection_problems(n.type, n.value, n.path, _document_problems.whole) w
       where jsonb_typeof(n.type) = 'object') p
   where p.problem is not null
$$;

-- What a value must be and is not, or null.
create or replace function credits._value_of_wrong_type(
  type  jsonb,
  value jsonb,
  whole jsonb
)
returns text
language plpgsql
immutable
as $$
declare
  v_type   text    := _value_of_wrong_type.type #>> '{}';
  v_typeof text    := coalesce(jsonb_typeof(_value_of_wrong_type.value), 'null');
  v_text   text    := case when v_typeof = 'string' then _value_of_wrong_type.value #>> '{}' end;
begin
  if credits._catalog_shape() -> 'catalog' ? v_type then
    return case when v_text is null then 'must be the code of a ' || credits._catalog_noun(v_type)
                when not _value_of_wrong_type.whole -> v_type ? v_text
                then credits._no_such_code(v_type, v_text, _value_of_wrong_type.whole) end;
  elsif _value_of_wrong_type.type ? 'map' or credits._catalog_shape() ? v_type then
    return case v_typeof when 'object' then null when 'null' then 'must be an object; {} is an empty one'
                         else 'must be an object' end;
  elsif _value_of_wrong_type.type ? 'list' then
    return case v_typeof when 'array' then null when 'null' then 'must be a list; [] is an empty one' else 'must be a list' end;
  elsif v_type like '%|%' then
    return case when (v_text = any (string_to_array(v_type, '|'))) is not true
                then 'must be one of ' || replace(v_type, '|', ', ') || credits._did_you_mean(v_text, string_to_array(v_type, '|')) end;
  elsif credits._fits(v_type, v_typeof, v_text,
          case when v_typeof = 'number' then _value_of_wrong_type.value::numeric end) is not true then
    return 'must be ' || (jsonb '{
      "name":         "a text of 1 to 200 characters",
      "text":         "a text",
      "boolean":      "true or false",
      "integer":      "a whole number",
      "seats":        "a whole number above 0",
      "minor units":  "a whole number from 0, in the minor unit of the currency",
      "percentage":   "a number from 0 to below 100",
      "amount":       "a number from 0 to below 1e12 with at most 6 decimals",
      "positive":     "a number above 0 and below 1e12 with at most 6 decimals",
      "whole amount": "a whole number from 0 to below 1e12",
      "currency":     "three lower-case letters, such as usd",
      "moment":       "a date, or a time with its zone, such as 2026-01-01T00:00:00Z"}' ->> v_type);
  end if;
  return null;
end $$;

create or replace function credits._fits(
  type      text,
  type_of   text,
  as_text   text,
  as_number numeric
)
returns boolean
language plpgsql
immutable
as $$
begin
  return case _fits.type
    when 'name'         then length(_fits.as_text) between 1 and 200
    when 'text'         then _fits.as_text is not null
    when 'boolean'      then _fits.type_of = 'boolean'
    when 'integer'      then _fits.as_number = trunc(_fits.as_number) and abs(_fits.as_number) < 2147483648
    when 'seats'        then _fits.as_number = trunc(_fits.as_number) and _fits.as_number between 1 and 2147483647
    when 'minor units'  then _fits.as_number = trunc(_fits.as_number) and _fits.as_number between 0 and 9223372036854775807
    when 'percentage'   then _fits.as_number >= 0 and _fits.as_number < 100
    when 'amount'       then credits._is_amount(_fits.as_number)
    when 'positive'     then credits._is_amount(_fits.as_number) and _fits.as_number > 0
    when 'whole amount' then credits._is_amount(_fits.as_number) and _fits.as_number = trunc(_fits.as_number)
    when 'currency'     then _fits.as_text ~ '^[a-z]{3}$'
    when 'moment'       then credits._catalog_moment(_fits.as_text) is not null
    else true end;
end $$;

-- A time in a document, or null if it is none. A date is its first moment in UTC. The year has four digits in UTC too, where
-- the export writes it.
create or replace function credits._catalog_moment(value text)
returns timestamptz
language plpgsql
stable
as $$
begin
  if _catalog_moment.value ~ E'^\\d{4}-\\d\\d-\\d\\d$' then
    return (_catalog_moment.value || ' 00:00Z')::timestamptz;
  elsif _catalog_moment.value ~ E'^\\d{4}-\\d\\d-\\d\\d[T ]\\d\\d:\\d\\d(:\\d\\d(\\.\\d+)?)?(Z|[+-]\\d\\d(:?\\d\\d)?)$' then
    return (select m.at
              from (select _catalog_moment.value::timestamptz) m (at)
             where credits._is_moment(m.at));
  end if;
  return null;
exception when datetime_field_overflow or invalid_datetime_format or invalid_time_zone_displacement_value then
  return null;
end $$;
