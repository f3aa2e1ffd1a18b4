-- The windows of limits: counted in the transaction of the use that they count, corrected when its hold ends.
-- Keeps: N calls at the same time at a limit of k admit k, since the caller holds the lock of the account; what is counted is
-- the usages that were not given back, and audit() recounts it.

-- Counts a use in every window that limits it, and answers with their names. A row is the latest window that anything was
-- used in: if the clock is set back over its beginning it stays, and the window before it is counted by whoever looks.
create or replace function credits._count_use(
  use credits.use,
  at  timestamptz
)
returns text[]
language plpgsql
as $$
declare
  v_use     credits.use := _count_use.use;
  v_windows credits.use_window[] := coalesce(v_use.windows, credits._windows_of(v_use, _count_use.at));
  v_into    text[];
begin
  with counted as (
    insert into credits.usage_windows as w (account_id, capability, period, window_start, calls, units, credits)
    select v_use.account_id, n.capability, n.period, n.window_start, 1,
           case when n.capability = '' then 0 else v_use.units end, v_use.amount
      from unnest(v_windows) n
    on conflict on constraint usage_windows_pkey do update
       set window_start = excluded.window_start,
           calls   = excluded.calls   + case when w.window_start = excluded.window_start then w.calls   else 0 end,
           units   = excluded.units   + case when w.window_start = excluded.window_start then w.units   else 0 end,
           credits = excluded.credits + case when w.window_start = excluded.window_start then w.credits else 0 end
     where w.window_start <= excluded.window_start
  )
  select coalesce(array_agg(n.capability || '/' || n.period), '{}') into v_into
    from unnest(v_windows) n;
  if v_use.limits @> '[{"rolling": true}]' then
    v_into := v_into || credits._admit(v_use, _count_use.at);
  end if;
  return v_into;
end $$;

create or replace function credits._windows_of(
  use credits.use,
  at  timestamptz
)
returns credits.use_window[]
language plpgsql
stable
as $$
begin
  return (
    select array_agg(distinct row(coalesce(l.capability, ''), l.period,
                                  credits._window(l.period, _windows_of.at, a.time_zone))::credits.use_window)
      from credits.plan_limits l
      join credits.accounts a on a.account_id = (_windows_of.use).account_id
     where l.plan = (_windows_of.use).plan and (l.capability is null or l.capability = (_windows_of.use).capability)
       and not l.rolling);
end $$;

-- The same in rolling windows.
create or replace function credits._admit(
  use credits.use,
  at  timestamptz
)
returns text[]
language plpgsql
as $$
declare
  v_use        credits.use := _admit.use;
  v_capability text;
  v_into       text[];
begin
  for v_capability in
    select distinct coalesce(l.capability, '')
      from credits.plan_limits l
     where l.plan = v_use.plan and (l.capability is null or l.capability = v_use.capability) and l.rolling
  loop
    insert into credits.usage_admissions (account_id, capability, admitted_at, number)
    select v_use.account_id, v_capability, greatest(_admit.at, a.admitted_at), coalesce(a.number, 0) + 1
      from (select) one
      left join lateral credits._last_admission(v_use.account_id, v_capability) a on true;
    perform credits._forget_admissions(v_use.account_id, v_capability, _admit.at);
    v_into := v_into || (v_capability || '/rolling');
  end loop;
  return v_into;
end $$;

-- Calls that no rolling window of any plan can reach are dropped, two for each that comes.
create or replace function credits._forget_admissions(
  account_id text,
  capability text,
  at         timestamptz
)
returns void
language plpgsql
as $$
begin
  delete from credits.usage_admissions a
   where a.account_id = _forget_admissions.account_id and a.capability = _forget_admissions.capability
     and (a.admitted_at, a.number) in (
           select o.admitted_at, o.number
             from credits.usage_admissions o
            where o.account_id = _forget_admissions.account_id and o.capability = _forget_admissions.capability
              and o.admitted_at <= _forget_admissions.at - (
                    select credits._exact(max(l.span))
                      from credits.plan_limits l
                     where l.rolling and coalesce(l.capability, '') = _forget_admissions.capability)
            order by o.admitted_at, o.number
            limit 2);
end $$;

-- A usage turns out to have been more or less than was counted. Windows that are over count no more.
create or replace function credits._correct_windows(
  usage   credits.usages,
  calls   integer,
  units   numeric,
  credits numeric
)
returns void
language plpgsql
as $$
begin
  update credits.usage_windows w
     set calls   = w.calls + _correct_windows.calls,
         units   = w.units + case when w.capability = '' then 0 else _correct_windows.units end,
         credits = w.credits + _correct_windows.credits
   where w.account_id = (_correct_windows.usage).account_id and w.capability in ('', (_correct_windows.usage).capability)
     and w.capability || '/' || w.period = any ((_correct_windows.usage).counted_in)
     and w.window_start <= (_correct_windows.usage).authorized_at;
end $$;

-- A window as its usages say.
drop function if exists credits._recounted(credits.usage_windows, timestamptz);
create or replace function credits._recounted(
  counted credits.usage_windows,
  since   timestamptz,
  until   timestamptz default 'infinity'
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
   where u.account_id = (_recounted.counted).account_id
     and u.authorized_at >= _recounted.since and u.authorized_at < _recounted.until
     and (_recounted.counted).capability || '/' || (_recounted.counted).period = any (u.counted_in)
$$;

-- In another time zone the windows are others. What was used while the clock was ahead may be in one that is yet to come.
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
    from credits.usage_windows o,
         lateral (select max(u.authorized_at) as at
                    from credits.usages u
                   where u.account_id = o.account_id and o.capability || '/' || o.period = any (u.counted_in)) u,
         lateral credits._recounted(
           o, credits._window(o.period, greatest(u.at, _move_windows.at), _move_windows.time_zone)) n
   where o.account_id = _move_windows.account_id and w.account_id = o.account_id and w.capability = o.capability
     and w.period = o.period
$$;

-- A call that did not take place leaves the rolling windows: all that came after it move up by one. One that has left them
-- by itself may be forgotten, and is no longer found.
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
   where a.account_id = _unadmit.account_id and a.capability = _unadmit.capability and a.admitted_at = _unadmit.at
   order by a.number
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
