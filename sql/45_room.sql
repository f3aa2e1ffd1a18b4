-- Limits in the usual case: nothing is due, all windows are of the calendar, and none is ahead. Where there are others, or one has
-- no room, nothing is answered here, and _ask_limits() says it all.

-- As _ask_limits() shows them.
create or replace function credits._room(
  account_id text,
  plan       text,
  capability text,
  units      numeric,
  amount     numeric
)
returns jsonb
language plpgsql
stable
set plan_cache_mode = force_generic_plan
as $$
declare
  v_now    timestamptz := credits.now();
  v_limits jsonb;
  v_room   boolean;
begin
  select jsonb_agg(jsonb_build_object(
           'gate', case l.measure when 'calls' then 'rate_limit' else 'monthly_cap' end, 'capability', l.capability,
           'measure', l.measure, 'period', l.period, 'rolling', false, 'maximum', l.maximum, 'used', trim_scale(l.used),
           'left', trim_scale(l.maximum - l.used), 'resets_at', credits._window_end(l.period, v_now, l.time_zone))
           order by l.measure <> 'calls', l.capability nulls first, l.measure, l.period),
         bool_and(l.has_room)
    into v_limits, v_room
    from credits._limits_asked(_room.account_id, _room.plan, _room.capability, _room.units, _room.amount, v_now) l;
  return case when v_room then v_limits end;
end $$;

-- The windows that a use is to be counted in.
create or replace function credits._windows_with_room(
  use credits.use,
  at  timestamptz
)
returns credits.use_window[]
language plpgsql
stable
set plan_cache_mode = force_generic_plan
as $$
declare
  v_use     credits.use := _windows_with_room.use;
  v_windows credits.use_window[];
begin
  select case when bool_and(l.has_room)
              then array_agg(distinct row(coalesce(l.capability, ''), l.period, l.since)::credits.use_window) end
    into v_windows
    from credits._limits_asked(v_use.account_id, v_use.plan, v_use.capability, v_use.units, v_use.amount,
                               _windows_with_room.at) l;
  return v_windows;
end $$;

-- The limits of a plan for a capability, and whether they have room for a use. Part of the plan of whoever calls it.
create or replace function credits._limits_asked(
  account_id text,
  plan       text,
  capability text,
  units      numeric,
  amount     numeric,
  at         timestamptz
)
returns setof credits.limit_asked
language sql
stable
as $$
  select l.capability, l.measure, l.period, l.maximum, a.time_zone, p.since, u.used,
         not l.rolling and (w.window_start > p.since) is not true
         and u.used + case l.measure when 'calls' then 1 when 'units' then _limits_asked.units else _limits_asked.amount end
             <= l.maximum
    from credits.accounts a
    join credits.plan_limits l
      on l.plan = _limits_asked.plan and (l.capability is null or l.capability = _limits_asked.capability)
   cross join lateral (  -- once, not where it is used
           select credits._window(l.period, _limits_asked.at, a.time_zone) as since offset 0) p
    left join credits.usage_windows w
      on w.account_id = _limits_asked.account_id and w.capability = coalesce(l.capability, '') and w.period = l.period,
         lateral (select case when w.window_start is distinct from p.since then 0 when l.measure = 'calls' then w.calls
                              when l.measure = 'units' then w.units else w.credits end as used) u
   where a.account_id = _limits_asked.account_id
$$;
