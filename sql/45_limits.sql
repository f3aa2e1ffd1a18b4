-- How often and how much: rate limits and monthly caps, counted in the transaction of the use that they count.
-- Keeps: N calls at the same time at a limit of k admit k, since windows are counted under the lock of the account; what is
-- counted is the usages that were not given back. No count reads history: calendar windows are one row each, rolling ones
-- the difference of two numbers.

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
  select jsonb_agg(to_jsonb(l) - 'member_id') as limits,
         (array_agg(l order by l.gate desc, l.resets_at desc)
            filter (where l.used + credits._weight(l.measure, v_use) > l.maximum))[1] as exceeded
    into v_found
    from credits._limits(v_use, (_ask_limits.balance).next_due_at, _ask_limits.at) l;
  v_use.limits := v_found.limits;
  v_full       := v_found.exceeded;

  if v_use.member_id is not null then
    v_member := credits._member(v_use.account_id, v_use.member_id);
    if not coalesce(v_member.active, v_use.kind <> 'organization') then
      return credits._refuse(v_use, 'member', 403, 'forbidden', jsonb_build_object('member_id', v_use.member_id));
    end if;
  end if;
  if v_full.gate is not null then
    return credits._refuse(v_use, v_full.gate, 429, case v_full.gate when 'rate_limit' then 'rate_limited' else 'monthly_cap_reached' end,
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
              then date_trunc(_window_end.period, _window_end.at, _window_end.time_zone) + ('1 ' || _window_end.period)::interval
              else (date_trunc(_window_end.period, _window_end.at at time zone _window_end.time_zone)
                    + ('1 ' || _window_end.period)::interval) at time zone _window_end.time_zone end
$$;

-- The limits of a plan for a capability (without one, for all), as they stand.
create or replace function credits._limits(
  use    credits.use,
  due_at timestamptz,
  at     timestamptz
)
returns setof credits.limit_result
language plpgsql
stable
as $$
begin
  return query
    select case l.measure when 'calls' then 'rate_limit' else 'monthly_cap' end, l.capability, null::text, l.measure, l.period,
           l.rolling, l.maximum, trim_scale(u.used), greatest(trim_scale(l.maximum - u.used), 0), u.resets_at
      from credits.plan_limits l,
           lateral (
             select c.used, c.resets_at
               from credits._calendar_use((_limits.use).account_id, coalesce(l.capability, ''), l.measure, l.period,
                                          (_limits.use).time_zone, _limits.due_at, _limits.at) c
              where not l.rolling
             union all
             select r.used, r.resets_at
               from credits._rolling_use((_limits.use).account_id, coalesce(l.capability, ''), l.maximum, l.span,
                                         _limits.at) r
              where l.rolling) u
     where l.plan = (_limits.use).plan
       and (l.capability is null or (_limits.use).capability is null or l.capability = (_limits.use).capability);
end $$;

-- What a window of the calendar counts. A hold that has run out counts no more, even if nobody has booked that yet; such
-- ones are after due_at.
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
  select coalesce(case _calendar_use.measure when 'calls' then w.calls when 'units' then w.units else w.credits end, 0)
         - case when _calendar_use.measure = 'calls' then 0 else coalesce(x.used, 0) end,
         credits._window_end(_calendar_use.period, _calendar_use.at, _calendar_use.time_zone)
    from (select) one
    left join credits.usage_windows w
      on w.account_id = _calendar_use.account_id and w.capability = _calendar_use.capability
     and w.period = _calendar_use.period
     and w.window_start = credits._window(_calendar_use.period, _calendar_use.at, _calendar_use.time_zone)
    left join lateral (
           select sum(case _calendar_use.measure when 'units' then u.counted_units else u.counted_credits end) as used
             from credits.reservations r
             join credits.usages u on u.account_id = r.account_id and u.usage_id = r.reservation_id
            where r.account_id = _calendar_use.account_id and r.status = 'open'
              and r.expires_at between _calendar_use.due_at and _calendar_use.at
              and _calendar_use.capability || '/' || _calendar_use.period = any (u.counted_in)
              and u.authorized_at >= w.window_start) x on _calendar_use.due_at <= _calendar_use.at
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

-- Counts a use in every window that limits it, and answers with their names.
create or replace function credits._count_use(
  use credits.use,
  at  timestamptz
)
returns text[]
language plpgsql
as $$
declare
  v_use  credits.use := _count_use.use;
  v_into text[];
begin
  with limited as (
    select distinct coalesce(l.capability, '') as capability, l.period, l.rolling
      from credits.plan_limits l
     where l.plan = v_use.plan and (l.capability is null or l.capability = v_use.capability)
  ), counted as (
    insert into credits.usage_windows as w (account_id, capability, period, window_start, calls, units, credits)
    select v_use.account_id, l.capability, l.period, credits._window(l.period, _count_use.at, v_use.time_zone), 1,
           case when l.capability = '' then 0 else v_use.units end, v_use.amount
      from limited l
     where not l.rolling
    on conflict on constraint usage_windows_pkey do update
       set window_start = excluded.window_start,
           calls   = excluded.calls   + case when w.window_start = excluded.window_start then w.calls   else 0 end,
           units   = excluded.units   + case when w.window_start = excluded.window_start then w.units   else 0 end,
           credits = excluded.credits + case when w.window_start = excluded.window_start then w.credits else 0 end
    returning w.capability || '/' || w.period as name
  ), admitted as (
    insert into credits.usage_admissions (account_id, capability, admitted_at, number)
    select v_use.account_id, s.capability, greatest(_count_use.at, a.admitted_at), coalesce(a.number, 0) + 1
      from (select distinct l.capability from limited l where l.rolling) s
      left join lateral credits._last_admission(v_use.account_id, s.capability) a on true
    returning capability || '/rolling' as name
  )
  select coalesce(array_agg(n.name), '{}') into v_into from (select c.name from counted c union all select a.name from admitted a) n;
  if v_into && array['/rolling', v_use.capability || '/rolling'] then
    perform credits._forget_admissions(v_use.account_id, s.capability, _count_use.at)
       from (values (''), (v_use.capability)) s (capability);
  end if;
  return v_into;
end $$;

-- Calls that no rolling window of any plan can reach are dropped, two for each that comes.
create or replace function credits._forget_admissions(
  account_id text,
  capability text,
  at         timestamptz
)
returns void
language sql
as $$
  delete from credits.usage_admissions a
   where a.account_id = _forget_admissions.account_id and a.capability = _forget_admissions.capability
     and (a.admitted_at, a.number) in (
           select o.admitted_at, o.number
             from credits.usage_admissions o
            where o.account_id = _forget_admissions.account_id and o.capability = _forget_admissions.capability
              and o.admitted_at <= _forget_admissions.at - (
                    select max(l.span)
                      from credits.plan_limits l
                     where l.rolling and coalesce(l.capability, '') = _forget_admissions.capability)
            order by o.admitted_at, o.number
            limit 2)
$$;

-- A usage turns out to have been more or less than was counted. Windows that are over count no more.
create or replace function credits._correct_windows(
  usage   credits.usages,
  calls   integer,
  units   numeric,
  credits numeric
)
returns void
language sql
as $$
  update credits.usage_windows w
     set calls   = w.calls + _correct_windows.calls,
         units   = w.units + case when w.capability = '' then 0 else _correct_windows.units end,
         credits = w.credits + _correct_windows.credits
   where w.account_id = (_correct_windows.usage).account_id and w.capability in ('', (_correct_windows.usage).capability)
     and w.capability || '/' || w.period = any ((_correct_windows.usage).counted_in)
     and w.window_start <= (_correct_windows.usage).authorized_at
$$;

-- A window as its usages say.
create or replace function credits._recounted(
  counted credits.usage_windows,
  since   timestamptz
)
returns setof credits.usage_windows
language sql
stable
as $$
  select (_recounted.counted).account_id, (_recounted.counted).capability, (_recounted.counted).period, _recounted.since,
         count(*) filter (where u.status <> 'released' or u.counted_credits > 0),
         coalesce(sum(u.counted_units) filter (where (_recounted.counted).capability <> ''), 0),
         coalesce(sum(u.counted_credits), 0)
    from credits.usages u
   where u.account_id = (_recounted.counted).account_id and u.authorized_at >= _recounted.since
     and (_recounted.counted).capability || '/' || (_recounted.counted).period = any (u.counted_in)
$$;

-- In another time zone the windows are others.
create or replace function credits._move_windows(
  account_id text,
  time_zone  text,
  at         timestamptz
)
returns void
language sql
as $$
  update credits.usage_windows w
     set window_start = n.window_start, calls = n.calls, units = n.units, credits = n.credits
    from credits.usage_windows o, lateral credits._recounted(o, credits._window(o.period, _move_windows.at, _move_windows.time_zone)) n
   where o.account_id = _move_windows.account_id and w.account_id = o.account_id and w.capability = o.capability
     and w.period = o.period
$$;

-- A call that did not take place leaves the rolling windows: all that came after it move up by one.
create or replace function credits._unadmit(
  account_id text,
  capability text,
  at         timestamptz
)
returns void
language plpgsql
as $$
declare
  v_call credits.usage_admissions;
begin
  select a.* into v_call
    from credits.usage_admissions a
   where a.account_id = _unadmit.account_id and a.capability = _unadmit.capability and a.admitted_at >= _unadmit.at
   order by a.admitted_at, a.number
   limit 1;
  if not found then
    return;
  end if;
  with later as (
    select a.number, lead(a.admitted_at) over (order by a.admitted_at, a.number) as admitted_at
      from credits.usage_admissions a
     where a.account_id = _unadmit.account_id and a.capability = _unadmit.capability
       and (a.admitted_at, a.number) >= (v_call.admitted_at, v_call.number)
  ), gone as (
    delete from credits.usage_admissions a
     using later l
     where a.account_id = _unadmit.account_id and a.capability = _unadmit.capability and a.number = l.number
       and a.admitted_at >= v_call.admitted_at and l.admitted_at is null
  )
  update credits.usage_admissions a
     set admitted_at = l.admitted_at
    from later l
   where a.account_id = _unadmit.account_id and a.capability = _unadmit.capability and a.number = l.number
     and a.admitted_at >= v_call.admitted_at and l.admitted_at is not null;
end $$;
