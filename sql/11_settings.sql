-- Settings, looked at and changed by name. What a value must be is told by the one that is there.

create or replace function credits.list_settings()
returns setof credits.settings
language sql
stable
security definer
set search_path = pg_catalog, pg_temp
as $$
  select s.* from credits.settings s order by s.name
$$;
comment on function credits.list_settings() is
'Every setting with its value and what it is for.';

create or replace function credits.set_setting(
  name  text,
  value jsonb
)
returns credits.settings
language plpgsql
security definer
set search_path = pg_catalog, pg_temp
as $$
declare
  v_setting credits.settings;
  v_problem text;
begin
  select s.* into v_setting from credits.settings s where s.name = set_setting.name for no key update;
  if not found then
    perform credits._fail(404, 'setting_not_found', jsonb_build_object('name', set_setting.name),
      'credits.list_settings() has them all.');
  end if;
  v_problem := credits._setting_problem(v_setting, set_setting.value);
  if v_problem is not null then
    perform credits._fail(400, 'invalid_request', jsonb_build_object('argument', 'value', 'name', set_setting.name), v_problem);
  end if;
  update credits.settings s set value = set_setting.value where s.name = set_setting.name
  returning s.* into v_setting;
  return v_setting;
end $$;
comment on function credits.set_setting(text, jsonb) is
'Changes a setting, for every call from now on.

value is JSON of the kind that the setting has: a duration is a text such as "10 minutes", of at most 1000 years, a number one
from 0 to 1000000 (low_balance_threshold: to below 1e12), a list a list. Deploys leave it as it is.
Errors: 400 invalid_request, 404 setting_not_found.';

-- Why a value cannot be that of a setting; null if it can.
create or replace function credits._setting_problem(
  setting credits.settings,
  value   jsonb
)
returns text
language plpgsql
stable
as $$
declare
  v_name  text  := (_setting_problem.setting).name;
  v_old   jsonb := (_setting_problem.setting).value;
  v_free  boolean := v_name = 'low_balance_threshold';  -- may be null
  v_kind  text  := case when v_free then 'number' else jsonb_typeof(v_old) end;
  v_most  numeric := case when v_free then 999999999999 else 1000000 end;
  v_words text[] := case v_name when 'dispute_freezes' then array['credits', 'account'] end;
begin
  if v_free and _setting_problem.value = 'null' then
    return null;
  elsif v_kind <> 'null' and jsonb_typeof(_setting_problem.value) is distinct from v_kind then
    return format('%s is a JSON %s, such as %s.', v_name, v_kind, v_old);
  elsif v_kind = 'number' and _setting_problem.value::numeric not between 0 and v_most then
    return format('%s is a number from 0 to %s.', v_name, v_most);
  elsif v_kind = 'string' and _setting_problem.value #>> '{}' <> all (v_words) then
    return format('%s is one of %s.', v_name, array_to_string(v_words, ', '));
  elsif v_kind = 'string' and v_name not in ('dispute_freezes', 'operator_email', 'product_name', 'stripe_id_prefix')
        and credits._duration(_setting_problem.value) is null then
    return format('%s is a duration of at most 1000 years, such as %s.', v_name, v_old);
  elsif v_kind = 'array' and jsonb_path_exists(_setting_problem.value, '$[*] ? (@.type() != "string")') then
    return format('%s is a list of texts.', v_name);
  end if;
  return null;
end $$;

-- Null for what is none. A bare number is none either: nobody can tell its unit. From now it reaches no moment, either way,
-- that a timestamp or a client's calendar cannot hold.
create or replace function credits._duration(value jsonb)
returns interval
language plpgsql
stable
as $$
declare
  v_text text := _duration.value #>> '{}';
begin
  return case when v_text ~ '[a-z:]' and v_text::interval between interval '0' and interval '1000 years'
              then v_text::interval end;
exception when data_exception then
  return null;
end $$;
