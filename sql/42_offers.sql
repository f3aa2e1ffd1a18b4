-- Offers: what plans let their accounts use, and at what price, worked out whenever the catalogue changes, and by each deploy (at
-- the end of 44_access.sql, when all that they are made of is there). They only answer check_access() and authorize_usage()
-- sooner; what is not offered is found the general way.

-- What a plan offers to a call of one number of units, of several, or none. Part of the plan of whoever calls it.
drop function if exists credits._offered(text, text, text, text, numeric);
create or replace function credits._offered(
  plan        text,
  capability  text,
  quality     text,
  model       text,
  units       numeric,
  unit_counts jsonb
)
returns setof credits.offers
language sql
stable
as $$
  select o.*
    from credits.offers o
   where o.plan = _offered.plan and o.capability = _offered.capability
     and o.asked_quality = coalesce(_offered.quality, '') and o.asked_model = coalesce(_offered.model, '')
     and (_offered.quality = '' or _offered.model = '') is not true
     and case when _offered.unit_counts is not null then _offered.units is null
              when _offered.units is not null       then o.unit is not null and credits._is_amount(_offered.units)
              else o.flat is not null end
     and o.valid_until > credits.now()
$$;

-- Null where only the price in full says it.
drop function if exists credits._offered_amount(credits.offers, numeric);
create or replace function credits._offered_amount(
  offer       credits.offers,
  units       numeric,
  unit_counts jsonb
)
returns numeric
language sql
immutable
as $$
  select case when _offered_amount.unit_counts is null
              then coalesce((_offered_amount.offer).flat,
                            trim_scale(round((_offered_amount.offer).unit_price * _offered_amount.units, 6))) end
$$;

-- A use of an offer by its price in full. Without an amount, since the counts are not plain, it goes the general way.
create or replace function credits._price_offered(
  use         credits.use,
  unit_counts jsonb
)
returns credits.use
language plpgsql
stable
as $$
declare
  v_use credits.use := _price_offered.use;
begin
  if _price_offered.unit_counts is not null then
    v_use.counts := credits._plain_counts(v_use.price, _price_offered.unit_counts);
    if v_use.counts is null then
      return v_use;
    end if;
    v_use.units := coalesce((v_use.counts -> v_use.unit)::numeric, 0);
  end if;
  v_use.amount    := credits._price_amount(v_use.price, v_use.counts, v_use.quality, v_use.model);
  v_use.available := trim_scale(v_use.available - v_use.amount);
  return v_use;
end $$;

-- What _counts() makes of unit_counts, if there is nothing that it or _check_counts() would refuse. If there is, null.
create or replace function credits._plain_counts(
  price       jsonb,
  unit_counts jsonb
)
returns jsonb
language plpgsql
stable
as $$
begin
  if jsonb_typeof(_plain_counts.unit_counts) <> 'object' then
    return null;
  end if;
  return (
    select case when bool_and(n.units is not null) then jsonb_object_agg(e.key, n.units) end
      from jsonb_each(_plain_counts.unit_counts) e,
           lateral (select case when jsonb_typeof(e.value) = 'number' and credits._knows_unit(_plain_counts.price, e.key)
                                then case when credits._is_amount(e.value::numeric)
                                          then trim_scale(e.value::numeric) end end as units) n);
end $$;

create or replace function credits._work_out_offers()
returns void
language plpgsql
as $$
begin
  delete from credits.offers;
  insert into credits.offers select o.* from credits._offers_at(credits.now()) o;
end $$;

-- The catalogue as offers, for a write and for the audit.
create or replace function credits._offers_at(at timestamptz)
returns setof credits.offers
language plpgsql
stable
as $$
begin
  return query
    select x.plan, a.capability, a.quality, a.model, a.plan, c.quality, c.model, s.flat, s.unit_price, r.rate_id,
           credits._rate_until(r, c.quality, c.model, _offers_at.at),
           exists (select from credits.plan_limits l
                    where l.plan = a.plan and (l.capability is null or l.capability = a.capability)),
           case when credits._knows_unit(r.price, a.unit) then a.unit end, r.price
      from credits._askable() a
      join credits.plans p on p.code = a.plan,
           lateral (values (a.plan), (case when p.is_default then '' end)) x (plan),
           lateral (select f.quality, f.model
                      from credits._plan_choice(a.plan, a.capability, nullif(a.quality, ''), nullif(a.model, '')) f
                    union all
                    select null, null
                     where a.quality = '' and a.model = '' and not credits._has_qualities(a.plan, a.capability)) c,
           lateral credits._rate(a.capability, c.quality, c.model, _offers_at.at) r,
           lateral credits._simple_price(r.price, c.quality, c.model, a.unit) s
     where x.plan is not null and r.rate_id is not null;
end $$;

-- What can be asked of a plan: each capability, with or without each quality and model that it has.
create or replace function credits._askable()
returns setof credits.askable
language sql
stable
as $$
  select distinct p.plan, p.capability, c.unit, a.quality, b.model
    from credits.plan_capabilities p
    join credits.capabilities c on c.code = p.capability and c.active
    left join credits.plan_qualities q on q.plan = p.plan and (q.capability = p.capability or q.capability is null),
         lateral (values (''), (q.quality)) a (quality),
         lateral (values (''), (q.model)) b (model)
   where a.quality is not null and b.model is not null
$$;

-- Until when a rate is the one in force: until it leaves the catalogue, or another one for the same comes.
create or replace function credits._rate_until(
  rate    credits.rates,
  quality text,
  model   text,
  at      timestamptz
)
returns timestamptz
language sql
stable
as $$
  select least((_rate_until.rate).valid_until, min(n.valid_from))
    from credits.rates n
   where n.capability = (_rate_until.rate).capability and n.valid_from > _rate_until.at
     and (n.quality is null or n.quality = _rate_until.quality) and (n.model is null or n.model = _rate_until.model)
$$;

-- A price of flat lines alone, which may be told the units of the capability, is one amount; one line of plain units, rounded
-- half up to 6 decimals, is one product.
create or replace function credits._simple_price(
  price   jsonb,
  quality text,
  model   text,
  unit    text
)
returns setof credits.simple_price
language sql
stable
as $$
  select case when not jsonb_path_exists(_simple_price.price, '$.lines[*] ? (!exists (@.flat))')
                and credits._knows_unit(_simple_price.price, _simple_price.unit)
              then credits._price_amount(_simple_price.price, '{}', _simple_price.quality, _simple_price.model) end,
         case when jsonb_array_length(_simple_price.price -> 'lines') = 1 and not _simple_price.price ?| '{minimum,maximum}'
                and l.line ? 'credits' and not l.line ?| '{per,block}' and l.line ->> 'unit' = _simple_price.unit
                and l.line ->> 'rounding' = 'half_up' and l.line ->> 'decimals' = '6'
              then (l.line -> 'credits')::numeric
                   * credits._multiplier(_simple_price.price, _simple_price.quality, _simple_price.model) end
    from (select _simple_price.price -> 'lines' -> 0 as line) l
$$;
