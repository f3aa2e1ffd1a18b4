-- What a line of a paid invoice entitles to, looked at alone and frozen: credits of its price, its quantity, its time.
-- A month at most is one slice; longer lines are paid out month by month (53_allowances.sql).

-- What a line entitles to, as far as it can be said without the others. Nothing for metered items, which are paid after
-- use, for prices that sell no credits, and for a change that comes to nothing: in a trial, or when its period ends.
create or replace function credits._insert_allowance(
  account_id text,
  invoice    credits.invoice_shape,
  line       credits.line_shape
)
returns void
language plpgsql
as $$
declare
  v_line  credits.line_shape := _insert_allowance.line;
  v_price credits.price_shape;
  v_kind  text;
  v_unit  numeric;
  v_row   credits.allowances;
begin
  v_price := credits._price_of_line(v_line);
  if v_price.price_id is null or v_price.metered or coalesce(v_line.quantity, 0) = 0
     or v_line.amount is null and coalesce(v_price.unit_amount, 1) > 0 then
    return;
  end if;
  v_kind := case when v_price.interval_unit is null then 'purchase'
                 when v_line.amount = 0 and coalesce(v_price.unit_amount, 1) > 0 then 'trial'
                 else 'plan' end;
  v_unit := credits._unit_credits(v_price, v_line.product_id, v_kind = 'trial');
  if coalesce(v_unit, 0) = 0 then
    return;
  end if;

  v_row.account_id      := _insert_allowance.account_id;
  v_row.subscription_id := coalesce(v_line.subscription_id, (_insert_allowance.invoice).subscription_id);
  v_row.invoice_id      := (_insert_allowance.invoice).invoice_id;
  v_row.line_id         := v_line.line_id;
  v_row.allowance_id    := v_row.invoice_id || ':' || v_row.line_id;
  v_row.invoiced_at     := coalesce((_insert_allowance.invoice).created_at, 0);
  v_row.item_id         := coalesce(v_line.item_id, 'price:' || v_price.price_id);
  v_row.price_id        := v_price.price_id;
  v_row.plan            := credits._plan_of_price(v_price.price_id, coalesce(v_price.product_id, v_line.product_id));
  v_row.kind            := v_kind;
  v_row.sign            := case when coalesce(v_line.amount, v_line.quantity) < 0 then -1 else 1 end;
  v_row.unit_credits    := v_unit;
  v_row.quantity        := abs(v_line.quantity);
  v_row.credits         := round(v_unit * v_row.quantity, 6);
  v_row.period_start    := v_line.period_start;
  v_row.period_end      := greatest(v_line.period_end, v_line.period_start + interval '1 second');
  v_row.created_at      := credits.now();
  v_row := credits._cut_allowance(v_row, v_price);
  insert into credits.allowances values (v_row.*) on conflict on constraint allowances_pkey do nothing;
end $$;

-- How much of a full interval a line covers (stripe.com/docs/billing/subscriptions/prorations), and whether it is paid out month
-- by month. A period that is shorter by a day at most, or by 2 %, is a full one: anchors are clamped at the end of months.
create or replace function credits._cut_allowance(
  allowance credits.allowances,
  price     credits.price_shape
)
returns credits.allowances
language plpgsql
stable
as $$
declare
  v_row   credits.allowances := _cut_allowance.allowance;
  v_price credits.price_shape := _cut_allowance.price;
  v_full  interval;
  v_whole boolean;
  v_first credits.slice;
begin
  v_row.sliced := false;
  v_row.anchor_at := v_row.period_start;
  v_row.slice_end := v_row.period_end;
  v_row.first_credits := v_row.credits;
  if v_row.kind <> 'plan' then
    v_row.expires_at := case v_row.kind when 'trial' then v_row.period_end end;
    return v_row;
  end if;

  v_full  := (v_row.period_start at time zone 'UTC' + v_price.interval_count * ('1 ' || v_price.interval_unit)::interval)
             - v_row.period_start at time zone 'UTC';
  v_whole := v_row.period_end - v_row.period_start >= v_full - least(interval '1 day', v_full / 50);
  v_row.sliced := v_price.interval_unit = 'year' or (v_price.interval_unit = 'month' and v_price.interval_count > 1);
  if v_row.sliced then
    if not v_whole then
      v_row.anchor_at := (v_row.period_end at time zone 'UTC' - v_price.interval_count * ('1 ' || v_price.interval_unit)::interval)
                         at time zone 'UTC';
    end if;
    v_first := s from credits._slices(v_row) s where s.slice = 0;
    v_row.slice_end := v_first.period_end;
    v_whole := v_whole or v_row.period_start = v_row.anchor_at;
    v_full  := v_row.slice_end - credits._month_before(v_row.anchor_at, v_row.slice_end);
  end if;
  if not v_whole then
    v_row.first_credits := least(v_row.credits, round(v_row.credits * extract(epoch from v_row.slice_end - v_row.period_start)
                                                      / extract(epoch from v_full), 6));
  end if;
  return v_row;
end $$;

-- The anniversary before another one.
create or replace function credits._month_before(
  anchor_at timestamptz,
  at        timestamptz
)
returns timestamptz
language sql
stable
as $$
  select max(m)
    from generate_series(0, 36) n, credits._month(_month_before.anchor_at, n) m
   where m < _month_before.at
$$;

-- The price of a line as it is known; without one the line sells nothing that we know of.
create or replace function credits._price_of_line(line credits.line_shape)
returns credits.price_shape
language plpgsql
stable
as $$
declare
  v_snapshot jsonb := credits._snapshot('price', (_price_of_line.line).price_id);
begin
  if (_price_of_line.line).price_id is not null and v_snapshot is null then
    perform credits._park('price_unknown', 'price:' || (_price_of_line.line).price_id);
  end if;
  return credits._shape_price(v_snapshot);
end $$;

-- Credits of one unit: what the price says, else its product, else the plan that it sells. What is said but is no number is
-- never passed over. A product that was never seen is asked for, unless the plan has an answer, or
-- price or plan sell credits and say nothing of a trial.
create or replace function credits._unit_credits(
  price      credits.price_shape,
  product_id text,
  trial      boolean
)
returns numeric
language plpgsql
stable
as $$
declare
  v_product_id text := coalesce((_unit_credits.price).product_id, _unit_credits.product_id);
  v_object     jsonb := credits._snapshot('product', v_product_id);
  v_product    credits.price_shape := credits._shape_price(v_object);
  v_plan       credits.plans;
  v_plan_says  numeric;
  v_said       text := case when _unit_credits.trial
                            then coalesce((_unit_credits.price).trial_credits, v_product.trial_credits)
                            else coalesce((_unit_credits.price).credits, v_product.credits) end;
begin
  if v_said ~ E'^[0-9]{1,12}(\\.[0-9]{1,6})?$' then
    return v_said::numeric;
  elsif v_said is not null then
    perform credits._park('credits_malformed', 'price:' || (_unit_credits.price).price_id,
                          jsonb_build_object('price', (_unit_credits.price).price_id, 'credits', v_said));
  end if;
  select p.* into v_plan
    from credits.plans p
   where p.code = credits._plan_of_price((_unit_credits.price).price_id, v_product_id);
  v_plan_says := case when _unit_credits.trial then v_plan.trial_credits else v_plan.monthly_credits end;
  if v_product_id is not null and v_object is null
     and not coalesce(v_plan_says > 0 or _unit_credits.trial and coalesce((_unit_credits.price).credits, v_plan.code) is not null,
                      false) then
    perform credits._park('product_unknown', 'product:' || v_product_id);
  end if;
  return v_plan_says;
end $$;

-- What has rolled over into the present months of subscriptions of Stripe, as far as nobody has booked it: their lines may be
-- longer than a month, and what was on hold comes back after the next month was paid.
create or replace function credits._rolled_over_lines(
  balance credits.balances,
  at      timestamptz
)
returns setof credits.lot
language plpgsql
stable
as $$
declare
  v_sub   credits.subscriptions;
  v_freed credits.freed_slice[];
begin
  if (_rolled_over_lines.balance).next_due_at > _rolled_over_lines.at then
    return;
  end if;
  for v_sub in
    select s.*
      from credits.subscriptions s
      join credits.plans p on p.code = s.plan and p.rollover <> 'none'
      join credits.accounts a on a.account_id = s.account_id and a.status <> 'closed'
     where s.account_id = (_rolled_over_lines.balance).account_id and s.source = 'stripe'
  loop
    v_freed := coalesce(v_freed, array(select d from credits._freed_at(_rolled_over_lines.balance, _rolled_over_lines.at) d));
    return query
      select c.*
        from credits._carried(v_sub, v_freed, array(
               select w from credits._silent_months(_rolled_over_lines.balance, _rolled_over_lines.at) w
                where w.subscription_id = v_sub.subscription_id and w.kind = 'plan'),
               (_rolled_over_lines.balance).next_due_at, _rolled_over_lines.at) c
       where c.remaining > 0 and c.expires_at > _rolled_over_lines.at;
  end loop;
end $$;

-- What rolls over into the last month of a subscription by a moment and is not booked: from each month to the next, beginning
-- with the first of which a hold has come back, or that began when more was due, with what nobody has booked of them.
create or replace function credits._carried(
  subscription credits.subscriptions,
  freed        credits.freed_slice[],
  silent       credits.wanted_slice[],
  due_at       timestamptz,
  at           timestamptz
)
returns credits.lot
language plpgsql
stable
as $$
declare
  v_sub   credits.subscriptions := _carried.subscription;
  v_back  timestamptz[] := array(select b.ended_at from credits._back_from(v_sub, _carried.freed) b (ended_at));
  v_month record;
  v_until timestamptz;  -- the end of the month before
  v_carry numeric := 0;
begin
  for v_month in
    select m.period_start, min(m.period_end) filter (where not m.rolled) as period_end, n.rollover_cap,
           coalesce(sum(m.amount) filter (where m.rolled), 0) as carried
      from (select p.period_start, p.period_end, p.allowance_id = 'rollover' as rolled, g.amount
              from credits.plan_grants p
              join credits.grants g on g.account_id = p.account_id and g.grant_id = p.grant_id and g.kind = 'plan'
             where p.account_id = v_sub.account_id and p.subscription_id = v_sub.subscription_id
            union all
            select w.period_start, w.period_end, false, 0 from unnest(_carried.silent) w) m
      join credits.plans n on n.code = v_sub.plan and n.rollover <> 'none'
     where m.period_start between least(_carried.due_at, v_back[1]) and _carried.at
     group by m.period_start, n.rollover_cap
     order by m.period_start
  loop
    v_carry := case v_until when v_month.period_start then v_carry else 0 end;
    if v_carry > 0 or v_month.period_start >= _carried.due_at or v_month.period_start = any (v_back) then
      v_carry := v_carry + credits._unspent(v_sub, v_month.period_start, _carried.freed)
                 + credits._unspent_silent(_carried.silent, v_month.period_start, _carried.freed);
      v_carry := greatest(0, least(v_carry, v_month.rollover_cap) - v_month.carried);
    end if;
    v_until := v_month.period_end;
  end loop;
  return row(null, 'plan', null, v_until, v_carry, 0)::credits.lot;
end $$;

-- What is left of months that nobody has booked and that end at a boundary.
create or replace function credits._unspent_silent(
  silent credits.wanted_slice[],
  ends   timestamptz,
  freed  credits.freed_slice[]
)
returns numeric
language sql
stable
as $$
  select coalesce(sum(w.amount - coalesce(d.paid, 0)), 0)
    from unnest(_unspent_silent.silent) w
    left join unnest(_unspent_silent.freed) d on d.month_key = w.key
   where w.period_end = _unspent_silent.ends
$$;
