-- How often and how much: what rate limits and monthly caps leave. No look reads history: a window of the calendar is one row,
-- a rolling one the difference of two numbers. 29_use_windows.sql counts.

create or replace function credits.get_limits(
  account_id text,
  member_id  text default null
)
returns setof credits.limit_result
language plpgsql
stable
security definer
set search_path = pg_catalog, pg_temp
as $$
declare
  v_now     timestamptz := credits.now();
  v_balance credits.balances := credits._balance(get_limits.account_id);
  v_caller  credits.use := credits._caller(credits._account(get_limits.account_id), v_now, v_balance);
begin
  return query
    select l.*
      from credits._limits(v_caller, v_balance.next_due_at, v_now) l
    union all
    select 'member_limit', null, m.member_id, 'credits', 'month', false, m.monthly_limit, trim_scale(m.month_used),
           greatest(trim_scale(m.monthly_limit - m.month_used), 0), credits._window_end('month', v_now, v_caller.time_zone)
      from credits._member(get_limits.account_id, get_limits.member_id) m
     where m.monthly_limit is not null
     order by 1 desc, 2 nulls first, 4, 5, 6;
end $$;
comment on function credits.get_limits(text, text) is
'Each limit that the account''s plan sets, with what is used of it, what is left, and when there is more again.

gate is rate_limit (calls per minute, hour, day or month), monthly_cap (units or credits a month) or member_limit (credits a
month, of member_id). A capability of null counts all of them together. Windows are those of the calendar in the account''s
time zone, or rolling: the time just before now (a month is 30 days then), and resets_at is when the next call leaves it.
Errors: 400 invalid_request, 404 account_not_found.';

-- Helpers -------------------------------------------------------------------------------------------------------------

-- The gates of the member, the rate limits, the monthly caps and the member's limit, in this order.
create or replace function credits._ask_limits(
  use     credits.use,
  balance credits.balances,
  at      timestamptz
)
returns credits.use
language plpgsql
stable
as $$
declare
  v_use    credits.use := _ask_limits.use;
  v_found  record;
  v_full   credits.limit_result;
  v_member credits.members;
begin
  if exists (select from credits.plan_limits l
              where l.plan = v_use.plan and (l.capability = v_use.capability or l.capability is null)) then
    select jsonb_agg(to_jsonb(l) - 'member_id' order by l.gate desc, l.capability nulls first, l.measure, l.period, l.rolling)
             as limits,
           (array_agg(l order by l.gate desc, l.resets_at desc)
              filter (where l.used + credits._weight(l.measure, v_use) > l.maximum))[1] as exceeded
      into v_found
      from credits._limits(v_use, (_ask_limits.balance).next_due_at, _ask_limits.at) l;
    v_use.limits := v_found.limits;
    v_full       := v_found.exceeded;
  end if;

  if v_use.member_id is not null then
    v_member := credits._member(v_use.account_id, v_use.member_id);
    if not coalesce(v_member.active, v_use.kind <> 'organization') then
      return credits._refuse(v_use, 'member', 403, 'forbidden', jsonb_build_object('member_id', v_use.member_id));
    end if;
  end if;
  if v_full.gate is not null then
    return credits._refuse(v_use, v_full.gate, 429,
      case v_full.gate when 'rate_limit' then 'rate_limited' else 'monthly_cap_reached' end,
      jsonb_build_object('capability', v_full.capability, 'measure', v_full.measure, 'period', v_full.period,
        'rolling', v_full.rolling, 'limit', v_full.maximum, 'used', v_full.used,
        'required', credits._weight(v_full.measure, v_use), 'resets_at', v_full.resets_at));
  elsif v_member.month_used + v_use.amount > v_member.monthly_limit then
    return credits._refuse(v_use, 'member_limit', 429, 'member_limit_reached', jsonb_build_object(
      'member_id', v_use.member_id, 'limit', v_member.monthly_limit, 'used', trim_scale(v_member.month_used),
      'required', v_use.amount, 'resets_at', credits._window_end('month', _ask_limits.at, v_use.time_zone)));
  end if;
  return v_use;
end $$;

-- What a use adds to a limit.
create or replace function credits._weight(
  measure text,
  use     credits.use
)
returns numeric
language sql
immutable
as $$
  select case _weight.measure when 'calls' then 1 when 'units' then (_weight.use).units else (_weight.use).amount end
$$;

-- Where clocks are put back at midnight there are two, an hour apart: the day begins with the first, while date_trunc()
-- answers with the second. One expression, which is inlined.
create or replace function credits._window(
  period    text,
  at        timestamptz,
  time_zone text
)
returns timestamptz
language sql
stable
as $$
  select date_trunc(_window.period, _window.at, _window.time_zone)
         - case when date_trunc(_window.period, date_trunc(_window.period, _window.at, _window.time_zone) - interval '1 hour',
                                _window.time_zone)
                     = date_trunc(_window.period, _window.at, _window.time_zone)
                then interval '1 hour' else interval '0' end
$$;

-- A day has 23 to 25 hours where clocks are put forward and back, and ends when the next one begins.
create or replace function credits._window_end(
  period    text,
  at        timestamptz,
  time_zone text
)
returns timestamptz
language sql
stable
as $$
  select case when _window_end.period in ('minute', 'hour')
              then date_trunc(_window_end.period, _window_end.at, _window_end.time_zone)
                   + ('1 ' || _window_end.period)::interval
              else credits._window(_window_end.period,
                     (date_trunc(_window_end.period, _window_end.at at time zone _window_end.time_zone)
                      + ('1 ' || _window_end.period)::interval) at time zone _window_end.time_zone, _window_end.time_zone) end
$$;

-- The limits of a plan for a capability (without one, for all), as they stand. Its plan holds for all plans and capabilities: to
-- make one for each call was measured to take 1.3 ms.
create or replace function credits._limits(
  use    credits.use,
  due_at timestamptz,
  at     timestamptz
)
returns setof credits.limit_result
language plpgsql
stable
set plan_cache_mode = force_generic_plan
as $$
begin
  return query
    select case l.measure when 'calls' then 'rate_limit' else 'monthly_cap' end, l.capability, null::text, l.measure,
           l.period, l.rolling, l.maximum, trim_scale(u.used), greatest(trim_scale(l.maximum - u.used), 0), u.resets_at
      from credits.plan_limits l,
           lateral (
             select c.used, c.resets_at
               from credits._calendar_use((_limits.use).account_id, coalesce(l.capability, ''), l.measure, l.period,
                                          (_limits.use).time_zone, _limits.due_at, _limits.at) c
              where not l.rolling
             union all
             select r.used, r.resets_at
               from credits._rolling_use((_limits.use).account_id, coalesce(l.capability, ''), l.maximum,
                                         credits._exact(l.span), _limits.at) r
              where l.rolling) u
     where l.plan = (_limits.use).plan
       and (l.capability is null or (_limits.use).capability is null or l.capability = (_limits.use).capability);
end $$;

-- What a window of the calendar counts. A hold that has run out counts no more but for what was captured, as
-- _close_usage() books it, even if nobody has booked that yet; such ones are after due_at. The row is of a later window if
-- the clock was set back: then the usages are counted.
create or replace function credits._calendar_use(
  account_id text,
  capability text,
  measure    text,
  period     text,
  time_zone  text,
  due_at     timestamptz,
  at         timestamptz
)
returns setof credits.window_use
language sql
stable
as $$
  select coalesce(case _calendar_use.measure when 'calls' then c.calls when 'units' then c.units else c.credits end, 0)
         - case when _calendar_use.measure = 'calls' then 0 else coalesce(x.used, 0) end,
         p.until
    from (select credits._window(_calendar_use.period, _calendar_use.at, _calendar_use.time_zone) as since,
                 credits._window_end(_calendar_use.period, _calendar_use.at, _calendar_use.time_zone) as until) p
    left join credits.usage_windows w
      on w.account_id = _calendar_use.account_id and w.capability = _calendar_use.capability
     and w.period = _calendar_use.period
    left join lateral (
           select w.calls, w.units, w.credits where w.window_start = p.since
            union all
           select n.calls, n.units, n.credits
             from credits._recounted(w, p.since, p.until) n
            where w.window_start > p.since) c on true
    left join lateral (
           select sum(case when _calendar_use.measure = 'credits' then r.amount - r.captured
                           when r.captured = 0 then u.counted_units end) as used
             from credits.reservations r
             join credits.usages u on u.account_id = r.account_id and u.usage_id = r.reservation_id
            where r.account_id = _calendar_use.account_id and r.status = 'open'
              and r.expires_at between _calendar_use.due_at and _calendar_use.at
              and _calendar_use.capability || '/' || _calendar_use.period = any (u.counted_in)
              and u.authorized_at >= p.since) x on _calendar_use.due_at <= _calendar_use.at
$$;

-- What a rolling window counts: the calls from its first one to the last. Enough of them must leave it.
create or replace function credits._rolling_use(
  account_id text,
  capability text,
  maximum    numeric,
  span       interval,
  at         timestamptz
)
returns setof credits.window_use
language sql
stable
as $$
  select coalesce(b.number - a.number + 1, 0),
         _rolling_use.span + case when b.number - a.number < _rolling_use.maximum then a.admitted_at else (
           select o.admitted_at
             from credits.usage_admissions o
            where o.account_id = _rolling_use.account_id and o.capability = _rolling_use.capability
              and o.admitted_at >= a.admitted_at
            order by o.admitted_at, o.number
           offset b.number - a.number + 1 - _rolling_use.maximum::bigint limit 1) end
    from (select) one
    left join lateral credits._admission_after(_rolling_use.account_id, _rolling_use.capability,
                                               _rolling_use.at - _rolling_use.span) a on true
    left join lateral credits._last_admission(_rolling_use.account_id, _rolling_use.capability) b on true
$$;

create or replace function credits._admission_after(
  account_id text,
  capability text,
  at         timestamptz
)
returns setof credits.usage_admissions
language sql
stable
as $$
  select a.*
    from credits.usage_admissions a
   where a.account_id = _admission_after.account_id and a.capability = _admission_after.capability
     and a.admitted_at > _admission_after.at
   order by a.admitted_at, a.number
   limit 1
$$;

create or replace function credits._last_admission(
  account_id text,
  capability text
)
returns setof credits.usage_admissions
language sql
stable
as $$
  select a.*
    from credits.usage_admissions a
   where a.account_id = _last_admission.account_id and a.capability = _last_admission.capability
   order by a.admitted_at desc, a.number desc
   limit 1
$$;
