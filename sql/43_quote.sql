-- What a use of a capability would be: by which plan, at which quality, run by which model, and at what price.
-- Keeps: the price that is shown is the price that is charged, since both come from _price_use().

create or replace function credits.quote(
  account_id  text,
  capability  text,
  units       numeric default null,
  quality     text    default null,
  model       text    default null,
  unit_counts jsonb   default null
)
returns credits.quote_result
language plpgsql
stable
security definer
set search_path = pg_catalog, pg_temp
as $$
declare
  v_now     timestamptz := credits.now();
  v_request credits.use_request := row(quote.capability, quote.units, quote.unit_counts, quote.quality,
                                       quote.model, null, null);
  v_use     credits.use;
  v_rate    credits.rates;
  v_priced  credits.priced;
begin
  v_use := credits._choose(credits._caller(credits._account(quote.account_id), v_now), v_request);
  if v_use.gate is not null then
    v_use.quality := credits._check_code('quality', quote.quality);
    v_use.model   := credits._check_code('model', quote.model);
  end if;
  v_use    := credits._price_use(v_use, v_request, v_now);
  v_rate   := credits._rate_of(v_use.rate_id);
  v_priced := credits._price(v_rate.price, v_use.counts, v_use.quality, v_use.model);
  return row(v_use.account_id, v_use.capability, v_use.quality, v_use.model, v_use.units, v_use.counts,
             v_priced.amount, v_rate.rate_id, nullif(v_rate.valid_from, '-infinity'),
             v_priced.explanation)::credits.quote_result;
end $$;
comment on function credits.quote(text, text, numeric, text, text, jsonb) is
'What a use of a capability would cost, in credits, and how the price comes about. Holds nothing.

units counts the capability''s own unit; unit_counts gives several units by name, {"input_tokens": 1200, "output_tokens": 300}.
Without a quality or a model it is those that authorize_usage would choose. The price is computed by the code that charges.
rate_id names the rate, in force since valid_from (null: always): authorize_usage(rate_id => ...) charges by it for 15 minutes
more (setting quote_ttl) if another one comes. What the plan does not include is quoted too.
Errors: 400 invalid_request, 404 account_not_found, capability_not_found, quality_not_found, model_not_found,
rate_not_found, 422 invalid_amount.';

-- Helpers -------------------------------------------------------------------------------------------------------------

insert into credits.settings as s (name, value, summary) values
  ('quote_ttl', '"15 minutes"', 'How long authorize_usage() honours the rate of a quote after a new one is in force.')
on conflict (name) do update set summary = excluded.summary;

-- Who asks, and by which plan. An account without one has what the default plan says.
create or replace function credits._caller(
  account credits.accounts,
  at      timestamptz,
  balance credits.balances default null
)
returns credits.use
language plpgsql
stable
as $$
declare
  v_use credits.use;
begin
  v_use.account_id := (_caller.account).account_id;
  v_use.kind       := (_caller.account).kind;
  v_use.time_zone  := (_caller.account).time_zone;
  v_use.plan       := case when (_caller.balance).next_due_at > _caller.at then (_caller.account).plan
                           else credits._plan_at(_caller.account, _caller.at) end;
  if v_use.plan is null then
    select p.code into v_use.plan from credits.plans p where p.is_default;
  end if;
  return v_use;
end $$;

-- The capability by the plan, and the quality and the model that run it.
create or replace function credits._choose(
  use     credits.use,
  request credits.use_request
)
returns credits.use
language plpgsql
stable
as $$
declare
  v_use    credits.use := _choose.use;
  v_plan   text;
  v_listed boolean;
begin
  select c.code, c.unit, p.plan, q.quality, q.model, q.listed
    into v_use.capability, v_use.unit, v_plan, v_use.quality, v_use.model, v_listed
    from credits.capabilities c
    left join credits.plan_capabilities p on p.plan = v_use.plan and p.capability = c.code
    left join lateral credits._plan_choice(p.plan, c.code, (_choose.request).quality, (_choose.request).model) q on true
   where c.code = (_choose.request).capability and c.active;
  if not found then
    perform credits._fail(404, 'capability_not_found', jsonb_build_object('capability', (_choose.request).capability),
      'The catalogue has no such capability, or none that is active.');
  elsif v_plan is null then
    return credits._refuse(v_use, 'plan', 403, 'plan_required', jsonb_build_object(
      'plan', v_use.plan, 'capability', v_use.capability, 'plans', credits._plans_with(v_use.capability)));
  elsif v_listed is null and (num_nonnulls((_choose.request).quality, (_choose.request).model) > 0
                              or credits._has_qualities(v_plan, v_use.capability)) then
    return credits._refuse_choice(v_use, _choose.request);
  end if;
  return v_use;
end $$;

-- The lowest quality that is not refused, and the plan's best model for it. A capability may have neither.
create or replace function credits._plan_choice(
  plan       text,
  capability text,
  quality    text,
  model      text
)
returns setof credits.plan_choice
language sql
stable
as $$
  select q.quality, q.model, true
    from credits.plan_qualities q
    join credits.quality_levels l on l.code = q.quality and l.active
    left join credits.models m on m.code = q.model
   where q.plan = _plan_choice.plan
     and q.capability is not distinct from (
           select o.capability from credits.plan_qualities o
            where o.plan = _plan_choice.plan and o.capability = _plan_choice.capability limit 1)
     and (q.model is null or m.active)
     and (_plan_choice.quality is null or q.quality = _plan_choice.quality)
     and (_plan_choice.model is null or q.model = _plan_choice.model)
   order by l.display_order, l.code, q.rank
   limit 1
$$;

-- What is in no plan may still have a price, if there is such a thing at all.
create or replace function credits._check_code(
  what text,
  code text
)
returns text
language plpgsql
stable
as $$
begin
  if _check_code.what = 'quality' and _check_code.code is not null
     and not exists (select from credits.quality_levels q where q.code = _check_code.code) then
    perform credits._fail(404, 'quality_not_found', jsonb_build_object('quality', _check_code.code));
  elsif _check_code.what = 'model' and _check_code.code is not null
        and not exists (select from credits.models m where m.code = _check_code.code) then
    perform credits._fail(404, 'model_not_found', jsonb_build_object('model', _check_code.code));
  end if;
  return _check_code.code;
end $$;

create or replace function credits._has_qualities(
  plan       text,
  capability text
)
returns boolean
language plpgsql
stable
as $$
begin
  return exists (select from credits.plan_qualities q
                  where q.plan = _has_qualities.plan
                    and (q.capability = _has_qualities.capability or q.capability is null));
end $$;

-- The price of a use, by the rate in force or, for a while, by that of a quote.
create or replace function credits._price_use(
  use     credits.use,
  request credits.use_request,
  at      timestamptz
)
returns credits.use
language plpgsql
stable
as $$
declare
  v_use  credits.use := _price_use.use;
  v_rate credits.rates := credits._rate(v_use.capability, v_use.quality, v_use.model, _price_use.at);
begin
  if (_price_use.request).rate_id <> v_rate.rate_id or v_rate.rate_id is null then
    v_rate := credits._quoted_rate(v_use, (_price_use.request).rate_id, _price_use.at);
  end if;
  v_use.rate_id := v_rate.rate_id;
  v_use.counts  := credits._check_counts(v_rate.price,
                     credits._counts(v_use.unit, (_price_use.request).units, (_price_use.request).unit_counts));
  v_use.units   := coalesce((v_use.counts -> v_use.unit)::numeric, 0);
  v_use.amount  := credits._price_amount(v_rate.price, v_use.counts, v_use.quality, v_use.model);
  return v_use;
end $$;

create or replace function credits._rate_of(rate_id bigint)
returns credits.rates
language plpgsql
stable
as $$
declare
  v_rate credits.rates;
begin
  select r.* into v_rate from credits.rates r where r.rate_id = _rate_of.rate_id;
  return v_rate;
end $$;

create or replace function credits._quoted_rate(
  use     credits.use,
  rate_id bigint,
  at      timestamptz
)
returns credits.rates
language plpgsql
stable
as $$
declare
  v_use   credits.use := _quoted_rate.use;
  v_since timestamptz := _quoted_rate.at - (credits._setting('quote_ttl') #>> '{}')::interval;
begin
  if _quoted_rate.rate_id is null then
    perform credits._fail(404, 'rate_not_found',
      jsonb_build_object('capability', v_use.capability, 'quality', v_use.quality, 'model', v_use.model),
      'The catalogue says no price for this.');
  end if;
  if not credits._was_in_force(v_use, _quoted_rate.rate_id, v_since, _quoted_rate.at) then
    perform credits._fail(409, 'quote_expired',
      jsonb_build_object('rate_id', _quoted_rate.rate_id, 'capability', v_use.capability, 'quality', v_use.quality,
                         'model', v_use.model),
      'This rate is not, or no longer, the price of this. Ask for a new quote.');
  end if;
  return credits._rate_of(_quoted_rate.rate_id);
end $$;

-- Whether a rate was the price of a use at some moment of a time, as the catalogue was then: a rate that always was in force
-- may have come into it later. What is in force changes only where a rate begins, comes or ends.
create or replace function credits._was_in_force(
  use     credits.use,
  rate_id bigint,
  since   timestamptz,
  until   timestamptz
)
returns boolean
language sql
stable
as $$
  with rates as (
    select r.*, greatest(r.valid_from, r.created_at) as begins_at
      from credits.rates r
     where r.capability = (_was_in_force.use).capability
       and (r.quality is null or r.quality = (_was_in_force.use).quality)
       and (r.model is null or r.model = (_was_in_force.use).model)
  ), moments as (
    select _was_in_force.since as at
    union
    select m.at
      from rates r, lateral (values (r.begins_at), (r.valid_until)) m (at)
     where m.at > _was_in_force.since and m.at <= _was_in_force.until
  )
  select exists (
    select from moments m, lateral (
             select l.rate_id
               from (select distinct on (r.quality, r.model) r.*
                       from rates r
                      where r.begins_at <= m.at
                      order by r.quality, r.model, r.valid_from desc) l
              where l.valid_until > m.at
              order by l.model is null, l.quality is null
              limit 1) f
     where f.rate_id = _was_in_force.rate_id)
$$;
