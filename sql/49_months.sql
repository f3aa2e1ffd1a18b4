-- Time and plans of our own: anniversaries, and how a plan stands at a moment, before or after that is booked.
-- Boundaries are counted by their number from the anchor, clamped to the end of the month, in a time zone; never from the one
-- before.

create or replace function credits._plan_credits(plan text)
returns numeric
language sql
stable
as $$
  select coalesce((select p.monthly_credits from credits.plans p where p.code = _plan_credits.plan), 0)
$$;

-- The nth anniversary, clamped to the end of its month, counted from the anchor in a time zone.
create or replace function credits._month(
  anchor_at timestamptz,
  number    integer,
  time_zone text default 'UTC'
)
returns timestamptz
language sql
stable
as $$
  select (_month.anchor_at at time zone _month.time_zone + _month.number * interval '1 month') at time zone _month.time_zone
$$;

create or replace function credits._internal_at(
  subscription credits.subscriptions,
  at           timestamptz
)
returns credits.subscriptions
language plpgsql
stable
as $$
declare
  v_sub  credits.subscriptions := _internal_at.subscription;
  v_zone text;
begin
  select a.time_zone into v_zone from credits.accounts a where a.account_id = v_sub.account_id;
  while v_sub.period_end <= _internal_at.at and v_sub.state in ('active', 'canceling') loop
    if v_sub.cancel_at <= v_sub.period_end then
      v_sub.state        := 'canceled';
      v_sub.ended_at     := v_sub.cancel_at;
      v_sub.pending_plan := null;
      v_sub.pending_at   := null;
    else
      if v_sub.pending_at <= v_sub.period_end then
        v_sub.plan         := v_sub.pending_plan;
        v_sub.pending_plan := null;
        v_sub.pending_at   := null;
      end if;
      v_sub.period_start    := v_sub.period_end;
      v_sub.period_end      := credits._next_anniversary(v_sub.anchor_at, v_sub.period_start, v_zone);
      v_sub.highest_credits := null;
    end if;
  end loop;
  return v_sub;
end $$;

-- Months of an internal plan that have come and gone without anybody booking them.
drop function if exists credits._missed_months(text, timestamptz);
create or replace function credits._missed_months(
  account_id text,
  at         timestamptz
)
returns setof credits.wanted_slice
language plpgsql
stable
as $$
declare
  v_sub credits.subscriptions;
begin
  select s.* into v_sub
    from credits.subscriptions s
    join credits.accounts a on a.account_id = s.account_id and a.status <> 'closed'
   where s.account_id = _missed_months.account_id and s.source = 'internal' and s.state in ('active', 'canceling')
     and not credits._is_resting(s);
  while v_sub.period_end <= _missed_months.at and v_sub.state in ('active', 'canceling') loop
    return query
      select m.*
        from credits._month_of(v_sub, v_sub.plan, v_sub.period_start, v_sub.period_end) m
       where m.amount > 0 and not credits._granted_for(v_sub);
    v_sub := credits._internal_at(v_sub, v_sub.period_end);
  end loop;
end $$;

create or replace function credits._month_of(
  subscription credits.subscriptions,
  plan         text,
  period_start timestamptz,
  period_end   timestamptz
)
returns credits.wanted_slice
language sql
stable
as $$
  select row((_month_of.subscription).subscription_id, 'plan', null, 0, credits._plan_credits(_month_of.plan), 'plan',
             _month_of.plan, _month_of.period_start, _month_of.period_end,
             format('plan:%s:%s', (_month_of.subscription).subscription_id,
                    floor(extract(epoch from _month_of.period_start))))::credits.wanted_slice
$$;

-- The credits that a month came with, if nothing has changed it yet.
create or replace function credits._month_granted(subscription credits.subscriptions)
returns numeric
language sql
stable
as $$
  select max(g.amount)
    from credits.plan_grants p
    join credits.grants g on g.account_id = p.account_id and g.grant_id = p.grant_id
   where p.account_id = (_month_granted.subscription).account_id
     and p.allowance_id = 'plan' and p.period_end = (_month_granted.subscription).period_end
$$;

-- The anniversary after the one at a moment, counted by its number: the moment may be that of another time zone.
create or replace function credits._next_anniversary(
  anchor_at timestamptz,
  at        timestamptz,
  time_zone text
)
returns timestamptz
language sql
stable
as $$
  select credits._month(_next_anniversary.anchor_at, n.number + 1, _next_anniversary.time_zone)
    from (select m.number
            from (select ((extract(year from _next_anniversary.at) - extract(year from _next_anniversary.anchor_at)) * 12
                          + extract(month from _next_anniversary.at) - extract(month from _next_anniversary.anchor_at))::integer) x (near),
                 generate_series(greatest(x.near - 1, 0), x.near + 1) m (number)
           order by abs(extract(epoch from credits._month(_next_anniversary.anchor_at, m.number, _next_anniversary.time_zone)
                                           - _next_anniversary.at))
           limit 1) n
$$;

-- A plan of our own rests while a subscription of Stripe is live: an account has one source of plan credits at a time.
drop function if exists credits._is_resting(credits.subscriptions, timestamptz);
create or replace function credits._is_resting(subscription credits.subscriptions)
returns boolean
language sql
stable
as $$
  select exists (select from credits.subscriptions s
                   join credits.subscription_states t on t.state = s.state
                  where s.account_id = (_is_resting.subscription).account_id and s.source = 'stripe'
                    and (t.may_receive or s.state = 'past_due'))
$$;
