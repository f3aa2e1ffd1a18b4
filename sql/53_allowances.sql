-- Credits that subscriptions entitle to, slice by slice: a month of an internal plan, the time of an invoice line, or a month
-- of a line that is longer. One slice is always granted ahead, as a pending grant, so that it starts on time however late
-- any job runs; it is taken away again if the subscription stops before.

-- One grant of a subscription, and what it is a slice of.
create or replace function credits._grant_slice(
  account_id      text,
  subscription_id text,
  allowance_id    text,
  invoice_id      text,
  slice           integer,
  amount          numeric,
  kind            text,
  plan            text,
  period_start    timestamptz,
  period_end      timestamptz,
  expires_at      timestamptz,
  key             text,
  at              timestamptz default credits.now()
)
returns jsonb
language plpgsql
as $$
declare
  v_grant credits.grant_result;
  v_slice credits.plan_grants;
begin
  v_grant := credits._grant(
    account_id   => _grant_slice.account_id,
    amount       => trim_scale(_grant_slice.amount),
    kind         => _grant_slice.kind,
    effective_at => _grant_slice.period_start,
    expires_at   => _grant_slice.expires_at,
    description  => (select p.name from credits.plans p where p.code = _grant_slice.plan),
    source       => coalesce('invoice:' || _grant_slice.invoice_id, 'plan:' || _grant_slice.plan),
    key          => _grant_slice.key,
    fingerprint  => jsonb_build_object('slice', _grant_slice.key),
    as_of        => _grant_slice.at);
  insert into credits.plan_grants (account_id, grant_id, subscription_id, allowance_id, invoice_id, slice, period_start,
    period_end)
  values (_grant_slice.account_id, v_grant.grant_id, _grant_slice.subscription_id, _grant_slice.allowance_id,
          _grant_slice.invoice_id, _grant_slice.slice, _grant_slice.period_start, _grant_slice.period_end)
  on conflict on constraint plan_grants_pkey do update set slice = excluded.slice
  returning * into v_slice;
  if _grant_slice.slice > 0 and _grant_slice.period_start <= _grant_slice.at then
    perform credits._claw_slice(_grant_slice.account_id, v_slice);
  end if;
  perform credits._roll_over(_grant_slice.account_id, _grant_slice.subscription_id, _grant_slice.period_start);
  if _grant_slice.expires_at <= _grant_slice.at then  -- it comes after its time: what is left of it goes on as well
    perform credits._roll_over(_grant_slice.account_id, _grant_slice.subscription_id, _grant_slice.expires_at);
  end if;
  perform credits._tidy(_grant_slice.account_id, _grant_slice.at)
    where _grant_slice.period_start < _grant_slice.at;  -- what rolled over may have ended as well
  return credits._effect('grant', _grant_slice.account_id, v_grant.amount, jsonb_build_object('key', _grant_slice.key));
end $$;

-- Sees to the slices of an account as they should be at a moment: the present one granted, the next one pending, none that
-- nobody is entitled to. Ended ones that were missed while a subscription stood still do not come back.
create or replace function credits._plan_ahead(
  account_id text,
  at         timestamptz default credits.now()
)
returns void
language plpgsql
as $$
declare
  v_sub   credits.subscriptions;
  v_slice record;
begin
  for v_sub in
    select s.*
      from credits.subscriptions s
     where s.account_id = _plan_ahead.account_id and s.source = 'internal' and s.state in ('active', 'canceling')
  loop
    perform credits._turn_internal(v_sub, _plan_ahead.at);
  end loop;

  perform credits._take_back_slices(_plan_ahead.account_id);
  perform credits._drop_pending(_plan_ahead.account_id, d.key)
     from (select g.key
             from credits.grants g
             join credits.plan_grants p on p.account_id = g.account_id and p.grant_id = g.grant_id
            where g.account_id = _plan_ahead.account_id and g.status = 'pending' and g.effective_at > _plan_ahead.at
              and (p.allowance_id = 'plan' or p.slice > 0)
              and not exists (select from credits._wanted_slices(_plan_ahead.account_id, _plan_ahead.at) w
                               where w.key = g.key and w.amount = g.amount and w.period_end = g.expires_at)) d;
  for v_slice in
    select w.*
      from credits._wanted_slices(_plan_ahead.account_id, _plan_ahead.at) w
     where not exists (select from credits.grants g where g.account_id = _plan_ahead.account_id and g.key = w.key)
     order by w.period_start, w.key
  loop
    perform credits._grant_slice(_plan_ahead.account_id, v_slice.subscription_id, v_slice.allowance_id,
      v_slice.invoice_id, v_slice.slice, v_slice.amount, v_slice.kind, v_slice.plan, v_slice.period_start,
      v_slice.period_end, v_slice.period_end, v_slice.key, _plan_ahead.at);
  end loop;
  perform credits._make_up_slices(_plan_ahead.account_id, _plan_ahead.at);
end $$;

-- Months that have begun and turn out to be worth more, because an earlier line of the subscription became known late.
create or replace function credits._make_up_slices(
  account_id text,
  at         timestamptz
)
returns void
language plpgsql
as $$
declare
  v_slice record;
begin
  for v_slice in
    select w.*, p.granted, p.parts
      from credits._wanted_slices(_make_up_slices.account_id, _make_up_slices.at) w,
           lateral (select sum(g.amount - n.moved) as granted, count(*) as parts
                      from credits.plan_grants n
                      join credits.grants g on g.account_id = n.account_id and g.grant_id = n.grant_id
                     where n.account_id = _make_up_slices.account_id and n.allowance_id = w.allowance_id and n.slice = w.slice
                       and g.status <> 'pending') p
     where w.allowance_id <> 'plan' and w.period_start <= _make_up_slices.at and p.granted < w.amount
     order by w.period_start, w.key
  loop
    perform credits._grant_slice(_make_up_slices.account_id, v_slice.subscription_id, v_slice.allowance_id,
      v_slice.invoice_id, v_slice.slice, v_slice.amount - v_slice.granted, v_slice.kind, v_slice.plan, v_slice.period_start,
      v_slice.period_end, v_slice.period_end, format('%s:%s', v_slice.key, v_slice.parts), _make_up_slices.at);
    perform credits._grant_period(_make_up_slices.account_id, v_slice.subscription_id, v_slice.period_end);
  end loop;
end $$;

-- It was never in the ledger, so it leaves nothing behind. Of one that was cut before it started the cut stays, as a grant of
-- that much; its key is free for what comes instead.
create or replace function credits._drop_pending(
  account_id text,
  key        text
)
returns void
language sql
as $$
  delete from credits.grants g
   where g.account_id = _drop_pending.account_id and g.key = _drop_pending.key and g.status = 'pending'
     and g.revoked = 0;
  delete from credits.plan_grants p
   using credits.grants g
   where g.account_id = _drop_pending.account_id and g.key = _drop_pending.key and g.status = 'pending'
     and p.account_id = g.account_id and p.grant_id = g.grant_id;
  update credits.grants g
     set amount = g.revoked, remaining = 0, status = 'revoked', key = concat_ws(':', g.key, g.grant_id)
   where g.account_id = _drop_pending.account_id and g.key = _drop_pending.key and g.status = 'pending'
$$;

-- The slices that are due at a moment and the ones to come next. A closed account gets none.
create or replace function credits._wanted_slices(
  account_id text,
  at         timestamptz
)
returns setof credits.wanted_slice
language sql
stable
as $$
  select w.*
    from credits.accounts a,
         lateral (select m.* from credits._wanted_months(a.account_id, _wanted_slices.at) m
                  union all
                  select l.* from credits._wanted_of_lines(a.account_id, _wanted_slices.at) l) w
   where a.account_id = _wanted_slices.account_id and a.status <> 'closed' and w.amount > 0
$$;

-- Of the internal plan: this month, and the next one if the plan goes on.
create or replace function credits._wanted_months(
  account_id text,
  at         timestamptz
)
returns setof credits.wanted_slice
language sql
stable
as $$
  select m.*
    from credits.subscriptions o,
         lateral (select i.* from credits._internal_at(o, _wanted_months.at) i) s,
         lateral (select i.* from credits._internal_at(s, s.period_end) i) x,
         lateral (values (case when credits._granted_for(s) then null else s.plan end, s.period_start, s.period_end),
                         (case when x.state <> 'canceled' then x.plan end, s.period_end, x.period_end)
                 ) n (plan, period_start, period_end),
         lateral (select w.* from credits._month_of(s, n.plan, n.period_start, n.period_end) w) m
   where o.account_id = _wanted_months.account_id and o.source = 'internal' and o.state in ('active', 'canceling')
     and s.state in ('active', 'canceling') and n.plan is not null and not credits._is_resting(s)
$$;

-- The month was granted already, perhaps under another plan.
create or replace function credits._granted_for(subscription credits.subscriptions)
returns boolean
language sql
stable
as $$
  select exists (select from credits.plan_grants p
                  where p.account_id = (_granted_for.subscription).account_id
                    and p.allowance_id = 'plan' and p.period_end = (_granted_for.subscription).period_end)
$$;

-- Of lines that are longer than a month. The first slice comes with the invoice. Ids of lines that do not begin with il_, as
-- all did before 2019-12-03, come again on the next invoice. since: also those that ended after that moment.
drop function if exists credits._wanted_of_lines(text, timestamptz);
create or replace function credits._wanted_of_lines(
  account_id text,
  at         timestamptz,
  since      timestamptz default null
)
returns setof credits.wanted_slice
language sql
stable
as $$
  select a.subscription_id, a.allowance_id, a.invoice_id, s.slice, credits._slice_credits(a, s.period_start), a.kind::text, a.plan,
         s.period_start, s.period_end,
         format('slice:%s:%s', case when starts_with(a.line_id, 'il_') then a.line_id else a.allowance_id end, s.slice)
    from credits.allowances a
    join credits.subscriptions u on u.account_id = a.account_id and u.subscription_id = a.subscription_id,
         lateral credits._slices(a) s
   where a.account_id = _wanted_of_lines.account_id and a.sliced and a.sign = 1
     and s.period_start <= coalesce(u.still_words[1], 'infinity')
     and s.period_start < least(coalesce(u.ended_at, 'infinity'), coalesce(u.cancel_at, 'infinity'))
     and s.slice > 0 and s.period_end > coalesce(_wanted_of_lines.since, _wanted_of_lines.at)
     and (s.period_start <= _wanted_of_lines.at or s.previous_start <= _wanted_of_lines.at)
     and not credits._is_refunded(a.invoice_id)
$$;

-- The months of a line, counted from its anchor and cut to its period.
create or replace function credits._slices(allowance credits.allowances)
returns setof credits.slice
language sql
stable
as $$
  select (row_number() over (order by m.starts) - 1)::integer, greatest(m.starts, a.period_start), least(m.ends, a.period_end),
         coalesce(lag(greatest(m.starts, a.period_start)) over (order by m.starts), '-infinity')
    from (select (_slices.allowance).anchor_at, (_slices.allowance).period_start, (_slices.allowance).period_end) a,
         generate_series(0, 36) n,
         lateral (select credits._month(a.anchor_at, n) as starts, credits._month(a.anchor_at, n + 1) as ends) m
   where m.ends > a.period_start and m.starts < a.period_end
$$;

-- What a month of a line is worth, beside the other lines of the subscription that reach over it: their sum with their
-- signs, given to the newest line first, since an older one was credited back.
create or replace function credits._slice_credits(
  allowance credits.allowances,
  at        timestamptz
)
returns numeric
language sql
stable
as $$
  select greatest(0, least((_slice_credits.allowance).credits,
           sum(a.sign * a.credits)
             - coalesce(sum(a.credits) filter (where a.sign = 1
                 and (a.invoiced_at, a.allowance_id) > ((_slice_credits.allowance).invoiced_at, (_slice_credits.allowance).allowance_id)), 0)))
    from credits.allowances a
   where a.account_id = (_slice_credits.allowance).account_id
     and a.subscription_id = (_slice_credits.allowance).subscription_id
     and a.sliced and a.period_start <= _slice_credits.at and a.period_end > _slice_credits.at
$$;

-- The boundaries of an internal plan that have passed: a new period, a pending plan, the end.
create or replace function credits._turn_internal(
  subscription credits.subscriptions,
  at           timestamptz
)
returns void
language plpgsql
as $$
declare
  v_sub  credits.subscriptions := _turn_internal.subscription;
  v_turn credits.subscriptions := credits._internal_at(v_sub, _turn_internal.at);
begin
  if v_turn is not distinct from v_sub then
    return;
  elsif v_turn.state = 'canceled' then
    perform credits._end_internal(v_sub, v_turn.ended_at, 'period_end');
    return;
  end if;
  update credits.subscriptions s
     set plan = v_turn.plan, period_start = v_turn.period_start, period_end = v_turn.period_end,
         pending_plan = v_turn.pending_plan, pending_at = v_turn.pending_at, highest_credits = v_turn.highest_credits
   where s.account_id = v_sub.account_id and s.subscription_id = v_sub.subscription_id;
  if v_turn.plan <> v_sub.plan then  -- at its moment, however late it is booked: _plan_until() asks
    insert into credits.subscription_history (account_id, subscription_id, from_state, to_state, plan, cause, created_at)
    values (v_sub.account_id, v_sub.subscription_id, v_sub.state, v_sub.state, v_turn.plan, 'period_end', v_sub.period_end);
  end if;
end $$;
