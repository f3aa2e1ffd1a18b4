-- Offers: what plans let their accounts use at a simple price, worked out whenever the catalogue changes, and by each deploy (at
-- the end of 44_access.sql, when all that they are made of is there). They only answer check_access() and authorize_usage()
-- sooner; what is not offered is found the general way.

comment on table credits.offers is
'What plans offer at a simple price, worked out of the catalogue by _work_out_offers(). A shortcut of check_access() and authorize_usage(), which ask for limits themselves: what is not here is found the general way.';

-- What a plan offers to a call of one number of units, or none. Part of the plan of whoever calls it.
create or replace function credits._offered(
  plan       text,
  capability text,
  quality    text,
  model      text,
  units      numeric
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
     and (o.flat is not null and _offered.units is null or credits._is_amount(_offered.units))
     and o.valid_until > credits.now()
$$;

create or replace function credits._offered_amount(
  offer credits.offers,
  units numeric
)
returns numeric
language sql
immutable
as $$
  select coalesce((_offered_amount.offer).flat,
                  trim_scale(round((_offered_amount.offer).unit_price * _offered_amount.units, 6)))
$$;

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
           credits._rate_until(r, c.quality, c.model, _offers_at.at)
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
     where x.plan is not null and num_nonnulls(s.flat, s.unit_price) = 1;
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
