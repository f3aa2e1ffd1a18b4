-- How a price (35_price_document.sql) becomes an amount, and explains itself.
-- Amounts are exact: each line is one fraction, rounded once. _price_amount() and _price() share all of the arithmetic.

-- Sum of the lines, then minimum, then maximum. The price is in its canonical form, counts is what _counts() makes.
create or replace function credits._price_amount(
  price   jsonb,
  counts  jsonb,
  quality text,
  model   text
)
returns numeric
language plpgsql
immutable
as $$
declare
  v_lines      jsonb   := _price_amount.price -> 'lines';
  v_multiplier numeric := credits._multiplier(_price_amount.price, _price_amount.quality, _price_amount.model);
  v_amount     numeric := 0;
begin
  for i in 0 .. jsonb_array_length(v_lines) - 1 loop
    v_amount := v_amount + credits._line_amount(v_lines -> i, _price_amount.counts, v_multiplier);
  end loop;
  return credits._bounded(v_amount, _price_amount.price);
end $$;

-- The same amount, and how it comes about.
create or replace function credits._price(
  price   jsonb,
  counts  jsonb,
  quality text,
  model   text
)
returns credits.priced
language plpgsql
immutable
as $$
declare
  v_lines      jsonb   := _price.price -> 'lines';
  v_multiplier numeric := trim_scale(credits._multiplier(_price.price, _price.quality, _price.model));
  v_explained  jsonb   := jsonb '[]';
  v_sum        numeric := 0;
  v_line       jsonb;
  v_amount     numeric;
begin
  for i in 0 .. jsonb_array_length(v_lines) - 1 loop
    v_line      := credits._explain_line(v_lines -> i, _price.counts, v_multiplier);
    v_explained := v_explained || v_line;
    v_sum       := v_sum + (v_line -> 'amount')::numeric;
  end loop;
  v_amount := credits._bounded(v_sum, _price.price);
  return (v_amount,
          jsonb_build_object('lines', v_explained, 'amount', v_amount)
          || case when v_amount > v_sum then jsonb_build_object('minimum', v_amount)
                  when v_amount < v_sum then jsonb_build_object('maximum', v_amount)
                  else '{}' end);
end $$;

-- The arithmetic. Functions of one expression are inlined, so that a call costs what the expression does. -------------

create or replace function credits._multiplier(
  price   jsonb,
  quality text,
  model   text
)
returns numeric
language sql
immutable
as $$
  select coalesce((_multiplier.price -> 'qualities' -> _multiplier.quality)::numeric, 1)
         * coalesce((_multiplier.price -> 'models' -> _multiplier.model)::numeric, 1)
$$;

create or replace function credits._bounded(
  amount numeric,
  price  jsonb
)
returns numeric
language sql
immutable
as $$
  select trim_scale(least(greatest(_bounded.amount, (_bounded.price -> 'minimum')::numeric),
                          (_bounded.price -> 'maximum')::numeric))
$$;

-- The credits of a line are cost * multiplier / per, rounded to whole steps: numerator and denominator are exact.
create or replace function credits._line_amount(
  line       jsonb,
  counts     jsonb,
  multiplier numeric
)
returns numeric
language plpgsql
immutable
as $$
declare
  v_per  numeric := coalesce(_line_amount.line -> 'per', _line_amount.line -> 'block', '1')::numeric;
  v_step numeric := ('{1,0.1,0.01,0.001,0.0001,0.00001,0.000001}'::numeric[])[(_line_amount.line -> 'decimals')::integer + 1];
  v_cost numeric;
begin
  if _line_amount.line ? 'flat' then
    v_cost := (_line_amount.line -> 'flat')::numeric;
  elsif _line_amount.line ? 'credits' then
    v_cost := (_line_amount.line -> 'credits')::numeric * credits._billed(_line_amount.line, _line_amount.counts);
  else
    v_cost := credits._tiers_cost(_line_amount.line, credits._billed(_line_amount.line, _line_amount.counts), v_per);
  end if;
  v_cost := v_cost * _line_amount.multiplier;
  v_per  := v_per * v_step;
  return v_step * credits._quotient(v_cost, v_per, _line_amount.line ->> 'rounding');
end $$;

-- A whole number. Neither argument is negative; div() and mod() are exact, while `/` would round a first time.
create or replace function credits._quotient(
  numerator   numeric,
  denominator numeric,
  rounding    text
)
returns numeric
language sql
immutable
as $$
  select case _quotient.rounding
           when 'down'    then div(_quotient.numerator, _quotient.denominator)
           when 'up'      then div(_quotient.numerator, _quotient.denominator)
                               + sign(mod(_quotient.numerator, _quotient.denominator))
           when 'half_up' then div(2 * _quotient.numerator + _quotient.denominator, 2 * _quotient.denominator)
           else div(_quotient.numerator, _quotient.denominator)   -- half_even: up above the half, on it to the even one
                + case sign(2 * mod(_quotient.numerator, _quotient.denominator) - _quotient.denominator)
                    when 1 then 1
                    when 0 then mod(div(_quotient.numerator, _quotient.denominator), 2)
                    else 0 end
         end
$$;

-- Units of a line, in whole blocks where it has blocks.
create or replace function credits._billed(
  line   jsonb,
  counts jsonb
)
returns numeric
language plpgsql
immutable
as $$
declare
  v_units numeric := coalesce((_billed.counts -> (_billed.line ->> 'unit'))::numeric, 0);
  v_block numeric := (_billed.line -> 'block')::numeric;
begin
  return coalesce(credits._quotient(v_units, v_block, 'up') * v_block, v_units);
end $$;

-- Credits of a line's tiers, times per.
create or replace function credits._tiers_cost(
  line   jsonb,
  billed numeric,
  per    numeric
)
returns numeric
language plpgsql
immutable
as $$
declare
  v_tiers jsonb   := _tiers_cost.line -> 'tiers';
  v_mode  text    := _tiers_cost.line ->> 'mode';
  v_below numeric := 0;
  v_cost  numeric := 0;
  v_tier  jsonb;
  v_units numeric;
begin
  for i in 0 .. jsonb_array_length(v_tiers) - 1 loop
    exit when _tiers_cost.billed <= v_below;
    v_tier  := v_tiers -> i;
    v_units := credits._tier_units(v_mode, _tiers_cost.billed, v_below, (v_tier -> 'up_to')::numeric);
    if v_units > 0 then
      v_cost := v_cost + (v_tier -> 'credits')::numeric * v_units
                       + coalesce((v_tier -> 'flat')::numeric * _tiers_cost.per, 0);
    end if;
    v_below := (v_tier -> 'up_to')::numeric;
  end loop;
  return v_cost;
end $$;

-- What a tier takes of the units: graduated, those above the tiers below it; volume, all of them or none.
create or replace function credits._tier_units(
  mode   text,
  billed numeric,
  below  numeric,
  up_to  numeric
)
returns numeric
language sql
immutable
as $$
  select case when _tier_units.billed <= _tier_units.below then 0
              when _tier_units.mode = 'graduated' then least(_tier_units.billed, _tier_units.up_to) - _tier_units.below
              when _tier_units.billed > _tier_units.up_to then 0
              else _tier_units.billed end
$$;

create or replace function credits._explain_line(
  line       jsonb,
  counts     jsonb,
  multiplier numeric
)
returns jsonb
language plpgsql
immutable
as $$
declare
  v_line   jsonb   := _explain_line.line || jsonb_build_object('multiplier', _explain_line.multiplier, 'amount',
                        trim_scale(credits._line_amount(_explain_line.line, _explain_line.counts, _explain_line.multiplier)));
  v_billed numeric := trim_scale(credits._billed(_explain_line.line, _explain_line.counts));
begin
  if v_line ? 'flat' then
    return v_line - 'unit';
  end if;
  return v_line
         || jsonb_build_object('units', coalesce(_explain_line.counts -> (v_line ->> 'unit'), '0'), 'billed', v_billed)
         || case when v_line ? 'tiers' then jsonb_build_object('tiers', credits._explain_tiers(v_line, v_billed))
                 else '{}' end;
end $$;

create or replace function credits._explain_tiers(
  line   jsonb,
  billed numeric
)
returns jsonb
language plpgsql
immutable
as $$
declare
  v_tiers jsonb   := _explain_tiers.line -> 'tiers';
  v_mode  text    := _explain_tiers.line ->> 'mode';
  v_taken jsonb   := jsonb '[]';
  v_below numeric := 0;
  v_up_to numeric;
  v_units numeric;
begin
  for i in 0 .. jsonb_array_length(v_tiers) - 1 loop
    v_up_to := (v_tiers -> i -> 'up_to')::numeric;
    v_units := credits._tier_units(v_mode, _explain_tiers.billed, v_below, v_up_to);
    v_taken := v_taken || (v_tiers -> i || jsonb_build_object('units', trim_scale(v_units)));
    v_below := v_up_to;
  end loop;
  return v_taken;
end $$;
