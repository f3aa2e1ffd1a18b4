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
