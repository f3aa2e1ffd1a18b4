-- authorize_usage() and settle_usage() in the general way: whatever the account, the plan, the price and the call are like. The
-- usual case is in 46_usage.sql.

create or replace function credits._authorize_usage(
  account_id text,
  usage_id   text,
  request    credits.use_request,
  ttl        interval,
  subject    text,
  metadata   jsonb,
  print      jsonb
)
returns credits.usage_result
language plpgsql
as $$
declare
  v_balance credits.balances;
  v_usage   credits.usages;
  v_use     credits.use;
  v_hold    credits.reserve_result;
begin
  perform credits._check_key(_authorize_usage.usage_id, 'usage_id');
  v_balance := credits._lock_account(_authorize_usage.account_id);
  v_usage   := credits._usage(_authorize_usage.account_id, _authorize_usage.usage_id);
  if v_usage.usage_id is not null then
    perform credits._check_same(v_usage.fingerprint, _authorize_usage.print, 'authorize_usage', _authorize_usage.usage_id);
    return credits._replayed(v_usage);
  end if;

  v_use := credits._decide(v_balance, _authorize_usage.request, _authorize_usage.account_id);
  if v_use.gate is not null then
    perform credits._fail(v_use.status, v_use.code, v_use.detail, credits._gate_hint(v_use.gate, v_use.detail));
  end if;
  v_hold := credits._reserve(_authorize_usage.account_id, v_use.amount, _authorize_usage.usage_id,
    _authorize_usage.ttl, null, null, _authorize_usage.subject, v_use.member_id, v_use.capability, _authorize_usage.metadata,
    usage => true);
  if v_hold.replayed then
    perform credits._fail(409, 'idempotency_conflict',
      jsonb_build_object('operation', 'reserve', 'key', _authorize_usage.usage_id),
      'reserve() has made a reservation of this id. A new use takes a new one.');
  end if;
  v_use.available := credits._available(credits._balance(v_use.account_id), v_use.capability, credits.now());
  return credits._open_usage(v_use, v_hold, _authorize_usage.print);
end $$;

create or replace function credits._settle_usage(
  account_id  text,
  usage_id    text,
  units       numeric,
  on_overage  text,
  unit_counts jsonb,
  metadata    jsonb,
  print       jsonb
)
returns credits.settle_usage_result
language plpgsql
as $$
declare
  v_usage  credits.usages;
  v_hold   credits.reservations;
  v_priced credits.priced;
begin
  perform credits._lock_account(_settle_usage.account_id);
  v_usage := credits._usage(_settle_usage.account_id, _settle_usage.usage_id);
  if v_usage.usage_id is null then
    perform credits._check_key(_settle_usage.usage_id, 'usage_id');
    perform credits._fail(404, 'usage_not_found', jsonb_build_object('usage_id', _settle_usage.usage_id));
  elsif v_usage.closing is not null then
    perform credits._check_same(v_usage.closing -> 'request', _settle_usage.print, 'settle_usage', _settle_usage.usage_id);
    return jsonb_populate_record(null::credits.settle_usage_result, v_usage.closing -> 'result' || '{"replayed": true}');
  end if;

  v_hold := credits._reservation(_settle_usage.account_id, _settle_usage.usage_id);
  if v_hold.status in ('settled', 'released') then
    perform credits._fail_closed(v_hold);
  end if;
  v_usage  := credits._announce(v_usage, _settle_usage.units, _settle_usage.unit_counts);
  v_priced := credits._price((credits._rate_of(v_usage.rate_id)).price, v_usage.counts, v_usage.quality, v_usage.model);
  return credits._close_settled(v_usage, v_priced, _settle_usage.print, v_hold.captured,
    credits._settle(_settle_usage.account_id, _settle_usage.usage_id, greatest(v_priced.amount - v_hold.captured, 0),
                    _settle_usage.on_overage, _settle_usage.metadata));
end $$;

create or replace function credits._usage(
  account_id text,
  usage_id   text
)
returns credits.usages
language plpgsql
stable
as $$
declare
  v_usage credits.usages;
begin
  select u.* into v_usage
    from credits.usages u
   where u.account_id = _usage.account_id and u.usage_id = _usage.usage_id;
  return v_usage;
end $$;

create or replace function credits._replayed(usage credits.usages)
returns credits.usage_result
language sql
stable
as $$
  select jsonb_populate_record(null::credits.usage_result, (_replayed.usage).result || '{"replayed": true}')
$$;

drop function if exists credits._gate_hint(text);
create or replace function credits._gate_hint(
  gate   text,
  detail jsonb
)
returns text
language sql
immutable
as $$
  select case case when (_gate_hint.detail ->> 'required')::numeric > (_gate_hint.detail ->> 'limit')::numeric
                   then 'never' else _gate_hint.gate end
           when 'never'        then 'The limit in detail.limit is less than this use takes, so that waiting does not help.'
           when 'account'      then 'The account may not use credits in this status.'
           when 'subscription' then 'The subscription allows no use in this state.'
           when 'plan'         then 'One of the plans in detail.plans includes it.'
           when 'quality'      then 'The plan has the qualities in detail.qualities.'
           when 'model'        then 'The plan has the models in detail.models.'
           when 'member'       then 'Only members of the organisation may use its credits: see set_member.'
           when 'rate_limit'   then 'Try again at detail.resets_at.'
           when 'monthly_cap'  then 'The plan allows no more until detail.resets_at.'
           when 'member_limit' then 'The member has no more until detail.resets_at, unless the limit is raised.'
           when 'balance'      then 'Top up, or use less.'
         end
$$;

-- Books the admission: counted, and kept with the answer for whoever asks again.
create or replace function credits._open_usage(
  use         credits.use,
  hold        credits.reserve_result,
  fingerprint jsonb
)
returns credits.usage_result
language plpgsql
as $$
declare
  v_use    credits.use := _open_usage.use;
  v_now    timestamptz := credits.now();
  v_result credits.usage_result := row((_open_usage.hold).reservation_id, v_use.account_id, 'open', v_use.capability,
             v_use.quality, v_use.model, v_use.amount, v_use.rate_id, (_open_usage.hold).expires_at, v_use.available, false);
begin
  insert into credits.usages (authorized_at, account_id, usage_id, capability, quality, model, plan, rate_id, counts, units,
    amount, counted_in, counted_units, counted_credits, fingerprint, result)
  values (v_now, v_use.account_id, v_result.usage_id, v_use.capability, v_use.quality, v_use.model, v_use.plan, v_use.rate_id,
    v_use.counts, v_use.units, v_use.amount,
    case when v_use.limits is null then '{}' else credits._count_use(v_use, v_now) end, v_use.units, v_use.amount,
    _open_usage.fingerprint, to_jsonb(v_result));
  return v_result;
end $$;

-- What was really used takes the place of what was announced.
create or replace function credits._announce(
  usage       credits.usages,
  units       numeric,
  unit_counts jsonb
)
returns credits.usages
language plpgsql
as $$
declare
  v_usage  credits.usages := _announce.usage;
  v_price  jsonb;
  v_unit   text;
  v_counts jsonb;
begin
  if num_nonnulls(_announce.units, _announce.unit_counts) = 0 then
    return v_usage;
  end if;
  v_price  := (credits._rate_of(v_usage.rate_id)).price;
  v_unit   := credits._unit_of_usage(v_usage, v_price);
  v_counts := credits._check_counts(v_price, credits._counts(v_unit, _announce.units, _announce.unit_counts));
  update credits.usages u
     set counts = v_counts,
         units  = coalesce((v_counts ->> v_unit)::numeric, 0)
   where u.account_id = v_usage.account_id and u.usage_id = v_usage.usage_id
  returning u.* into v_usage;
  return v_usage;
end $$;

-- What the units of a use are, by its price. Of one line there is no doubt.
create or replace function credits._unit_of_usage(
  usage credits.usages,
  price jsonb
)
returns text
language plpgsql
stable
as $$
declare
  v_unit text;
begin
  if jsonb_array_length(_unit_of_usage.price -> 'lines') = 1 then
    return _unit_of_usage.price #>> '{lines,0,unit}';
  end if;
  select c.unit into v_unit from credits.capabilities c where c.code = (_unit_of_usage.usage).capability;
  if not credits._knows_unit(_unit_of_usage.price, v_unit) then  -- the catalogue has another unit since
    v_unit := (select min(k) from jsonb_object_keys(nullif((_unit_of_usage.usage).counts, '{}')) k having count(*) = 1);
    v_unit := coalesce(v_unit, (credits._units_of(_unit_of_usage.price -> 'lines'))[1]);
  end if;
  return v_unit;
end $$;

drop function if exists credits._close_settled(credits.usages, credits.priced, jsonb, credits.settle_result, numeric);
create or replace function credits._close_settled(
  usage    credits.usages,
  priced   credits.priced,
  request  jsonb,
  captured numeric,
  settled  credits.settle_result
)
returns credits.settle_usage_result
language plpgsql
as $$
declare
  v_usage   credits.usages := _close_settled.usage;
  v_settled credits.settle_result := _close_settled.settled;
  v_result  credits.settle_usage_result := row(v_usage.usage_id, v_usage.account_id, v_settled.status, v_usage.capability,
              v_usage.quality, v_usage.model, v_usage.units, v_usage.counts,
              trim_scale(v_settled.actual + _close_settled.captured),
              trim_scale(v_settled.charged + _close_settled.captured), v_settled.uncollected, v_settled.released, v_settled.late,
              v_usage.rate_id, (_close_settled.priced).explanation, v_settled.entry_seq, v_settled.balance,
              v_settled.available, false);
begin
  update credits.usages u
     set counts = v_usage.counts, units = v_usage.units, status = v_result.status, closed_at = credits.now(),
         counted_units = v_usage.units, counted_credits = v_result.charged,
         closing = jsonb_build_object('request', _close_settled.request, 'result', to_jsonb(v_result))
   where u.account_id = v_usage.account_id and u.usage_id = v_usage.usage_id;
  return v_result;
end $$;

-- The end of a hold that a usage counts, whoever ended it. What was released has not taken place; what ran out may have, so
-- the call stays counted and its credits are given back, until a late settle says how many it took.
create or replace function credits._close_usage(
  hold    credits.reservations,
  status  text,
  charged numeric
)
returns void
language plpgsql
as $$
declare
  v_usage   credits.usages := credits._usage((_close_usage.hold).account_id, (_close_usage.hold).reservation_id);
  v_settled boolean := _close_usage.status = 'settled';
  v_units   numeric := case when v_settled or (_close_usage.hold).captured > 0 then v_usage.units else 0 end;
  v_credits numeric := (_close_usage.hold).captured + coalesce(_close_usage.charged, 0);
  v_unused  boolean := _close_usage.status = 'released' and (_close_usage.hold).captured = 0;
begin
  if v_usage.usage_id is null then
    return;
  end if;
  perform credits._correct_windows(v_usage, case when v_unused then -1 else 0 end, v_units - v_usage.counted_units,
                                   v_credits - v_usage.counted_credits);
  if v_unused then
    perform credits._unadmit(v_usage.account_id, left(n.name, -length('/rolling')), v_usage.authorized_at)
       from unnest(v_usage.counted_in) n (name)
      where n.name like '%/rolling';
  end if;
  update credits.usages u
     set status = _close_usage.status, closed_at = credits.now(), counted_units = v_units, counted_credits = v_credits
   where u.account_id = v_usage.account_id and u.usage_id = v_usage.usage_id;
end $$;
