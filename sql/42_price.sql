-- stand-in
create or replace function credits._counts(unit text, units numeric, unit_counts jsonb) returns jsonb language sql immutable as $$
 select coalesce(_counts.unit_counts, case when _counts.units is null then '{}'::jsonb else jsonb_build_object(_counts.unit, _counts.units) end) $$;
create or replace function credits._check_counts(price jsonb, counts jsonb) returns jsonb language sql immutable as $$ select _check_counts.counts $$;
create or replace function credits._price(price jsonb, counts jsonb, quality text, model text) returns credits.priced language sql immutable as $$
 select row(coalesce((_price.price->'lines'->0->>'flat')::numeric, (select sum(value::numeric) from jsonb_each_text(_price.counts)) * (_price.price->'lines'->0->>'credits')::numeric), '{}')::credits.priced $$;
create or replace function credits._rate(capability text, quality text, model text, at timestamptz) returns credits.rates language sql stable as $$
 select r from credits.rates r where r.capability = _rate.capability and r.valid_from <= _rate.at and _rate.at < r.valid_until
  and (r.quality is null or r.quality = _rate.quality) and (r.model is null or r.model = _rate.model)
  order by r.model is null, r.quality is null, r.valid_from desc limit 1 $$;
