-- What happens to the grants of a subscription when their time turns: the next is planned, unspent credits roll over, refunds
-- take their share, and what came after the end goes again.

-- Months that have begun and turn out to be worth less, because the subscription had ended or stood still before them, or a line
-- had given back before them, and that became known late: what is unspent of the difference goes again, from the latest grant
-- first. If it goes on after all, _make_up_slices() brings them.
create or replace function credits._take_back_slices(account_id text)
returns void
language plpgsql
as $$
declare
  v_slice record;
  v_entry credits.entries;
  v_plan  credits.plan_grants;
begin
  loop
    select p.grant_id, least(g.remaining + coalesce(c.taken, 0), g.amount - p.moved, w.granted - w.credits) as excess, p.moved
      into v_slice
      from credits.plan_grants p
      join credits.grants g on g.account_id = p.account_id and g.grant_id = p.grant_id
      join credits.allowances a on a.account_id = p.account_id and a.allowance_id = p.allowance_id
      left join credits.clawbacks c on c.account_id = p.account_id and c.grant_id = p.grant_id
      left join credits.subscriptions s on s.account_id = p.account_id and s.subscription_id = p.subscription_id,
           lateral (select case when p.period_start >= s.ended_at or p.period_start > s.still_words[1] then 0
                                else credits._slice_credits(a, p.period_start) end as credits,
                           (select sum(h.amount - n.moved)
                              from credits.plan_grants n
                              join credits.grants h on h.account_id = n.account_id and h.grant_id = n.grant_id
                             where n.account_id = p.account_id and n.allowance_id = p.allowance_id and n.slice = p.slice
                               and h.status <> 'pending') as granted) w
     where p.account_id = _take_back_slices.account_id and p.slice > 0 and g.expires_at > credits.now()
       and g.status <> 'pending' and g.remaining + coalesce(c.taken, 0) > 0 and g.amount > p.moved and w.granted > w.credits
     order by p.grant_id desc
     limit 1;
    exit when not found;
    update credits.plan_grants p
       set moved = p.moved + v_slice.excess
     where p.account_id = _take_back_slices.account_id and p.grant_id = v_slice.grant_id
    returning p.* into v_plan;
    perform credits._claw_slice(_take_back_slices.account_id, v_plan);  -- of what is no longer bought nothing is clawed back
    v_entry.account_id  := _take_back_slices.account_id;
    v_entry.operation   := 'take_back';
    v_entry.key         := format('take_back:%s:%s', v_slice.grant_id, trim_scale(v_slice.moved + v_slice.excess));
    v_entry.fingerprint := jsonb_build_object('grant_id', v_slice.grant_id);
    perform credits._revoke(credits._balance(_take_back_slices.account_id), v_entry, v_slice.grant_id, v_slice.excess);
    perform credits._grant_period(v_plan.account_id, v_plan.subscription_id, v_plan.period_end);  -- others may have room now
  end loop;
end $$;

drop function if exists credits._stood_still(credits.subscriptions, timestamptz);

-- The plan of the month that ended at a moment, which says what of it rolls over, whatever plan has come since: of Stripe's
-- that of the newest line that was paid for it, since what else is known depends on the order of events.
create or replace function credits._plan_until(
  subscription credits.subscriptions,
  ends         timestamptz
)
returns credits.plans
language sql
stable
as $$
  select p.*
    from (select (_plan_until.subscription).*) s
    left join lateral (select a.plan
                         from credits.allowances a
                        where a.account_id = s.account_id and a.subscription_id = s.subscription_id and s.source = 'stripe'
                          and a.sign = 1 and a.plan is not null
                          and a.period_start < _plan_until.ends and a.period_end >= _plan_until.ends
                        order by a.invoiced_at desc, a.item_id, a.allowance_id
                        limit 1) l on true
    left join lateral (select n.plan
                         from credits.subscription_history n
                        where n.account_id = s.account_id and n.subscription_id = s.subscription_id and s.source = 'internal'
                          and n.created_at < _plan_until.ends
                        order by n.history_id desc
                        limit 1) h on true
    join credits.plans p on p.code = coalesce(l.plan, case when s.pending_at < _plan_until.ends then s.pending_plan end, h.plan, s.plan)
$$;

-- Unspent credits of a period that has ended come again with the next one, as far as the plan lets them: what expired at the
-- boundary is the measure, so late bookings add to it.
create or replace function credits._roll_over(
  account_id      text,
  subscription_id text,
  at              timestamptz
)
returns void
language plpgsql
as $$
declare
  v_plan   credits.plans;
  v_next   timestamptz;
  v_target numeric;
  v_done   numeric;
begin
  select p.* into v_plan
    from credits.subscriptions s
    join credits.accounts a on a.account_id = s.account_id and a.status <> 'closed',
         lateral credits._plan_until(s, _roll_over.at) p
   where s.account_id = _roll_over.account_id and s.subscription_id = _roll_over.subscription_id and p.rollover <> 'none';
  if not found then
    return;
  end if;
  select min(p.period_end) into v_next
    from credits.plan_grants p
    join credits.grants g on g.account_id = p.account_id and g.grant_id = p.grant_id
   where p.account_id = _roll_over.account_id and p.subscription_id = _roll_over.subscription_id
     and p.period_start = _roll_over.at and p.allowance_id <> 'rollover' and g.status <> 'pending' and g.kind = 'plan';
  select least(coalesce(sum(g.expired) filter (where p.period_end = _roll_over.at and g.kind = 'plan'), 0), v_plan.rollover_cap),
         coalesce(sum(g.amount) filter (where p.period_start = _roll_over.at and p.allowance_id = 'rollover'), 0)
    into v_target, v_done
    from credits.plan_grants p
    join credits.grants g on g.account_id = p.account_id and g.grant_id = p.grant_id
   where p.account_id = _roll_over.account_id and p.subscription_id = _roll_over.subscription_id
     and _roll_over.at in (p.period_end, p.period_start);
  if v_target > v_done and v_next is not null then  -- what is too much for one grant comes with the next: a grant asks again
    perform credits._grant_slice(_roll_over.account_id, _roll_over.subscription_id, 'rollover', null, 0,
      least(v_target - v_done, 999999999999.999999), 'plan', v_plan.code, _roll_over.at, v_next, v_next,
      format('rollover:%s:%s:%s', _roll_over.subscription_id, floor(extract(epoch from _roll_over.at)), trim_scale(v_done)),
      _roll_over.at);  -- or all that has ended since would end now, and nothing be taken of it at its time
  end if;
end $$;

-- A grant has started or ended at its time: if a subscription made it, the next slice is planned, refunds of what paid for it
-- take their share, and what is left rolls over. Says whether more may fall due now.
create or replace function credits._after_turn(
  account_id text,
  grant_id   bigint,
  at         timestamptz
)
returns boolean
language plpgsql
as $$
declare
  v_slice credits.plan_grants;
  v_next  boolean;
begin
  select p.* into v_slice
    from credits.plan_grants p
   where p.account_id = _after_turn.account_id and p.grant_id = _after_turn.grant_id;
  if not found then
    return false;
  end if;
  v_next := v_slice.period_start = _after_turn.at and v_slice.slice > 0;
  if v_next then
    perform credits._refresh_plan(_after_turn.account_id, _after_turn.at);
  end if;
  if v_slice.period_start = _after_turn.at and v_slice.invoice_id is not null then
    perform credits._claw_slice(_after_turn.account_id, v_slice);
  end if;
  if not credits._ends_with_others(_after_turn.account_id, v_slice.subscription_id, _after_turn.at) then
    perform credits._roll_over(_after_turn.account_id, v_slice.subscription_id, _after_turn.at);
  end if;
  return v_next;
end $$;

-- Whether more of a subscription's plan credits are about to end at the same moment. The last ones roll over together: one by one
-- there would be a grant more each month.
create or replace function credits._ends_with_others(
  account_id      text,
  subscription_id text,
  at              timestamptz
)
returns boolean
language sql
stable
as $$
  select exists (
    select from credits.grants g
      join credits.plan_grants p on p.account_id = g.account_id and p.grant_id = g.grant_id
     where g.account_id = _ends_with_others.account_id and g.status = 'active' and g.kind = 'plan' and g.remaining > 0
       and g.expires_at <= _ends_with_others.at
       and p.subscription_id = _ends_with_others.subscription_id and p.period_end = _ends_with_others.at)
$$;

create or replace function credits._claw_slice(
  account_id text,
  slice      credits.plan_grants
)
returns jsonb
language sql
as $$
  select credits._claw_back(_claw_slice.account_id, (_claw_slice.slice).grant_id, 'invoice', (_claw_slice.slice).invoice_id,
                            credits._firm_share(t), credits._full_share(t))
    from credits._payment_totals('invoice', (_claw_slice.slice).invoice_id) t
$$;
