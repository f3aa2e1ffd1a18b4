-- Schedules: five fields as of cron (minute, hour, day of the month, month, day of the week), in UTC. What every cron
-- understands: * and numbers, with ranges, lists and steps. No names, no @daily, no seconds.

-- The next moment of a schedule after another one; null if it is none, or has no such moment.
create or replace function credits._next_run(
  schedule text,
  after    timestamptz
)
returns timestamptz
language plpgsql
immutable
as $$
declare
  v_fields   text[]    := regexp_split_to_array(_next_run.schedule, E'\\s+');
  v_minutes  integer[] := credits._schedule_field(v_fields[1], 0, 59);
  v_hours    integer[] := credits._schedule_field(v_fields[2], 0, 23);
  v_days     integer[] := credits._schedule_field(v_fields[3], 1, 31);
  v_months   integer[] := credits._schedule_field(v_fields[4], 1, 12);
  v_weekdays integer[] := credits._schedule_field(v_fields[5], 0, 7);
  v_either   boolean   := v_fields[3] !~ E'^\\*' and v_fields[5] !~ E'^\\*';  -- two days that are named: each of them
  v_after    timestamp := _next_run.after at time zone 'UTC';
  v_day      date      := v_after::date;
  v_next     timestamp;
begin
  if cardinality(v_fields) <> 5 or num_nulls(v_minutes, v_hours, v_days, v_months, v_weekdays, v_after) > 0 then
    return null;
  end if;
  for v_ahead in 0 .. 8 * 366 loop  -- the 29th of February may be eight years away
    v_day := v_after::date + v_ahead;
    continue when not extract(month from v_day) = any (v_months);
    continue when not case when v_either
      then extract(day from v_day) = any (v_days) or credits._is_weekday(v_day, v_weekdays)
      else extract(day from v_day) = any (v_days) and credits._is_weekday(v_day, v_weekdays) end;
    select min(v_day + make_time(h.hour, m.minute, 0)) into v_next
      from unnest(v_hours) h (hour), unnest(v_minutes) m (minute)
     where v_day + make_time(h.hour, m.minute, 0) > v_after;
    if v_next is not null then
      return v_next at time zone 'UTC';
    end if;
  end loop;
  return null;
end $$;

create or replace function credits._is_weekday(
  day      date,
  weekdays integer[]
)
returns boolean
language sql
immutable
as $$
  select extract(dow from _is_weekday.day) = any (_is_weekday.weekdays)
         or extract(isodow from _is_weekday.day) = any (_is_weekday.weekdays)
$$;

-- The values of a field, or null if it is none: *, 5, 1-5, each with a step but for the lone number, and lists of these.
create or replace function credits._schedule_field(
  field text,
  low   integer,
  high  integer
)
returns integer[]
language plpgsql
immutable
as $$
declare
  v_part   text;
  v_found  text[];
  v_from   integer;
  v_to     integer;
  v_values integer[] := array[]::integer[];
begin
  foreach v_part in array string_to_array(coalesce(nullif(_schedule_field.field, ''), '?'), ',') loop
    v_found := regexp_match(v_part, E'^(?:\\*|(\\d{1,2})(?:-(\\d{1,2}))?)(?:/(\\d{1,2}))?$');
    v_from  := coalesce(v_found[1]::integer, _schedule_field.low);
    v_to    := coalesce(v_found[2]::integer, v_found[1]::integer, _schedule_field.high);
    if v_found is null or v_from < _schedule_field.low or v_to > _schedule_field.high or v_from > v_to
       or v_found[3]::integer = 0 or v_found[1] is not null and v_found[2] is null and v_found[3] is not null then
      return null;
    end if;
    v_values := v_values || array(select generate_series(v_from, v_to, coalesce(v_found[3]::integer, 1)));
  end loop;
  return v_values;
end $$;
