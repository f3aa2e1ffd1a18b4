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

value is JSON of the kind that the setting has: a duration is a text such as "10 minutes", of at most 1000 years (leases of
requests and notifications, and the longest waits, of a minute at least), a number a whole one from 0 to 1000000
(low_balance_threshold: to below 1e12, with the decimals of amounts), a list a list. customer_email is true, false, or a list
of kinds. Deploys leave it as it is.
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
  v_name text  := (_setting_problem.setting).name;
  v_old  jsonb := (_setting_problem.setting).value;
  v_kind text  := case v_name when 'low_balance_threshold' then 'number' else jsonb_typeof(v_old) end;
begin
  if v_name = 'low_balance_threshold' and _setting_problem.value = 'null' then
    return null;
  elsif v_name = 'customer_email' then
    return credits._mailed_problem(_setting_problem.value);
  elsif v_kind <> 'null' and jsonb_typeof(_setting_problem.value) is distinct from v_kind then
    return format('%s is a JSON %s, such as %s.', v_name, v_kind, v_old);
  elsif v_kind = 'number' then
    return credits._number_problem(v_name, _setting_problem.value::numeric);
  elsif v_kind = 'string' then
    return credits._text_problem(v_name, v_old, _setting_problem.value);
  elsif v_kind = 'array' and jsonb_path_exists(_setting_problem.value, '$[*] ? (@.type() != "string")') then
    return format('%s is a list of texts.', v_name);
  end if;
  return null;
end $$;

-- With no attempt at all a notification would be given up unsent.
create or replace function credits._number_problem(
  name  text,
  value numeric
)
returns text
language sql
immutable
as $$
  select case when _number_problem.value between n.least and n.most
                   and scale(trim_scale(_number_problem.value)) <= n.decimals then null
              else format('%s is a number from %s to %s, with %s decimals at most.', _number_problem.name, n.least, n.most,
                          n.decimals) end
    from (select case _number_problem.name when 'notification_max_attempts' then 1 else 0 end,
                 case _number_problem.name when 'low_balance_threshold' then 999999999999 else 1000000 end,
                 case _number_problem.name when 'low_balance_threshold' then 6 else 0 end) n (least, most, decimals)
$$;

-- A worker may take half a minute over what it has claimed: if that were anybody's again by then, it would be done twice. And
-- what fails is not tried again at once, for ever.
create or replace function credits._text_problem(
  name  text,
  old   jsonb,
  value jsonb
)
returns text
language plpgsql
stable
as $$
declare
  v_text  text     := _text_problem.value #>> '{}';
  v_least interval := case when _text_problem.name
                             in ('notification_lease', 'stripe_request_lease', 'job_max_wait', 'stripe_event_max_wait')
                           then interval '1 minute' else interval '0 minutes' end;
begin
  return case
    when _text_problem.name in ('product_name', 'stripe_id_prefix') then null
    when _text_problem.name = 'operator_email' then
      case when v_text <> '' and not credits._is_mail_address(v_text)
           then 'operator_email is one e-mail address, such as "ops@example.com", or empty.' end
    when _text_problem.name = 'dispute_freezes' then
      case when v_text not in ('credits', 'account') then 'dispute_freezes is one of credits, account.' end
    when credits._duration(_text_problem.value) is null then
      format('%s is a duration of at most 1000 years, such as %s.', _text_problem.name, _text_problem.old)
    when credits._duration(_text_problem.value) < v_least then
      format('%s is a duration of at least %s.', _text_problem.name, v_least) end;
end $$;

create or replace function credits._mailed_problem(value jsonb)
returns text
language plpgsql
stable
as $$
declare
  v_kinds text[] := array(select k.kind from credits.notification_kinds k where k.audience = 'customer' order by k.kind);
begin
  return case
    when jsonb_typeof(_mailed_problem.value) = 'boolean' then null
    when jsonb_typeof(_mailed_problem.value) is distinct from 'array' or not _mailed_problem.value <@ to_jsonb(v_kinds) then
      format('customer_email is true, false, or a list of some of %s.', array_to_string(v_kinds, ', ')) end;
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
