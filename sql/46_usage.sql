-- Uses of capabilities: authorize_usage admits, prices and holds in one transaction, settle_usage charges what was really
-- used. The hold is the reservation of the same id, so release(), extend() and capture() work on it too. Here is the usual
-- case; whatever else there is goes the general way, in 46_usage_general.sql.
-- Keeps: a use is priced by the rate that it pinned, and counted once in each window that limits it. Lock order: see
-- 10_accounts.sql, then usages, usage_windows, usage_admissions.

create or replace function credits.authorize_usage(
  account_id  text,
  capability  text,
  units       numeric  default null,
  quality     text     default null,
  usage_id    text     default null,
  ttl         interval default null,
  subject     text     default null,
  member_id   text     default null,
  model       text     default null,
  unit_counts jsonb    default null,
  rate_id     bigint   default null,
  metadata    jsonb    default null
)
returns credits.usage_result
language plpgsql
security definer
set search_path = pg_catalog, pg_temp
as $$
declare
  v_ttl    interval := coalesce(authorize_usage.ttl, '15 minutes');
  v_print  jsonb := credits._fingerprint(jsonb_build_object(
                      'capability', authorize_usage.capability, 'units', authorize_usage.units,
                      'unit_counts', authorize_usage.unit_counts, 'quality', authorize_usage.quality,
                      'model', authorize_usage.model, 'ttl', credits._interval_text(authorize_usage.ttl),
                      'subject', authorize_usage.subject,
                      'member_id', authorize_usage.member_id, 'rate_id', authorize_usage.rate_id), authorize_usage.metadata);
  v_plan   text;
  v_free   numeric;
  v_below  numeric;
  v_place  tid;
  v_use    credits.use;
  v_hold   credits.reserve_result;
begin
  select b.plan, b.balance - b.held, b.topup_below, b.ctid
    into v_plan, v_free, v_below, v_place
    from credits.balances b
   where b.account_id = authorize_usage.account_id and b.status = 'active' and credits._is_plain(b)
     and credits._is_request(coalesce(authorize_usage.units, 1), authorize_usage.usage_id, authorize_usage.metadata)
     and authorize_usage.member_id is null
     and extract(epoch from v_ttl) > 0 and extract(epoch from v_ttl) <= 900
     for no key update;

  -- Mostly the plan offers it, and its limits have room.
  if found then
    select authorize_usage.account_id, null, null, o.offered_by, o.capability, o.unit, o.quality, o.model, null,
           case when n.units is null then '{}' else jsonb_build_object(o.unit, n.units) end, coalesce(n.units, 0), o.rate_id,
           a.amount, trim_scale(v_free - coalesce(a.amount, 0)), case when o.limited then jsonb '[]' end,
           null, null::integer, null, null::jsonb, o.price, null::credits.use_window[]
      into v_use
      from credits._offered(v_plan, authorize_usage.capability, authorize_usage.quality, authorize_usage.model,
                            authorize_usage.units, authorize_usage.unit_counts) o,
           lateral credits._offered_amount(o, authorize_usage.units, authorize_usage.unit_counts) a (amount),
           lateral trim_scale(authorize_usage.units) n (units)
     where coalesce(authorize_usage.rate_id, o.rate_id) = o.rate_id;
    if v_use.amount is null and v_use.price is not null then
      v_use := credits._price_offered(v_use, authorize_usage.unit_counts);
    end if;
    if v_use.amount > 0 and v_use.limits is not null then
      v_use.windows := credits._windows_with_room(v_use, credits.now());
    end if;
    if v_use.amount > 0 and (v_use.limits is null or v_use.windows is not null) then
      v_hold := credits._hold(authorize_usage.account_id, v_place, v_use.amount, v_use.available, v_use.available < v_below,
        authorize_usage.usage_id, v_ttl, true, null, authorize_usage.subject, null, v_use.capability,
        authorize_usage.metadata);
      if v_hold.reservation_id is not null then
        return credits._open_usage(v_use, v_hold, v_print);
      end if;
    end if;
  end if;
  return credits._authorize_usage(authorize_usage.account_id, authorize_usage.usage_id,
    row(authorize_usage.capability, authorize_usage.units, authorize_usage.unit_counts, authorize_usage.quality,
        authorize_usage.model, authorize_usage.member_id, authorize_usage.rate_id)::credits.use_request,
    v_ttl, authorize_usage.subject, authorize_usage.metadata, v_print);
end $$;
comment on function credits.authorize_usage(text, text, numeric, text, text, interval, text, text, text, jsonb, bigint, jsonb) is
'Admits a use of a capability, or refuses it: access, limits, choice of model, price and hold, in one transaction.

units is what will be used at most: its price is held until settle_usage charges what was used, or release gives it back, or
ttl (15 minutes by default) has run out; extend gives more time. Without a quality it is the plan''s lowest, without a model
the plan''s best for the quality; the answer names both. unit_counts gives several units by name. rate_id is that of a quote.
N calls at the same time at a limit of k admit k. usage_id is chosen by the caller and is the key: the same call answers with
the first result, marked replayed. Refusals carry the DETAIL of the gate: what is missing, and when there is more again.
Errors: 400 invalid_request, 402 insufficient_credits, 403 plan_required, quality_not_in_plan, model_not_in_plan,
subscription_inactive, forbidden, 404 account_not_found, capability_not_found, rate_not_found, 409 idempotency_conflict,
quote_expired, 422 invalid_amount, 423 account_frozen, account_closed, 429 rate_limited, monthly_cap_reached,
member_limit_reached.';

create or replace function credits.settle_usage(
  account_id  text,
  usage_id    text,
  units       numeric default null,
  on_overage  text    default 'cap',
  unit_counts jsonb   default null,
  metadata    jsonb   default null
)
returns credits.settle_usage_result
language plpgsql
security definer
set search_path = pg_catalog, pg_temp
as $$
declare
  v_print   jsonb := credits._fingerprint(jsonb_build_object(
                       'units', settle_usage.units, 'unit_counts', settle_usage.unit_counts,
                       'on_overage', credits._check_overage(settle_usage.on_overage)), settle_usage.metadata);
  v_balance numeric;
  v_alert   numeric;
  v_place   tid;
  v_found   record;
  v_usage   credits.usages;
  v_unit    text;
  v_priced  credits.priced;
  v_settled credits.settle_result;
begin
  select b.balance, case when not b.is_low then b.low_at end, b.ctid
    into v_balance, v_alert, v_place
    from credits.balances b
   where b.account_id = settle_usage.account_id and credits._is_plain(b)
     and credits._is_request(coalesce(settle_usage.units, 1), settle_usage.usage_id, settle_usage.metadata)
     and num_nonnulls(settle_usage.units, settle_usage.unit_counts) < 2
     for no key update;

  if found then
    select u as usage, r.price into v_found
      from credits.usages u
      join credits.rates r on r.rate_id = u.rate_id
     where u.account_id = settle_usage.account_id and u.usage_id = settle_usage.usage_id and u.status = 'open';
    if found then
      v_usage := v_found.usage;
      if num_nonnulls(settle_usage.units, settle_usage.unit_counts) > 0 then
        v_unit := credits._unit_of_usage(v_usage, v_found.price);
        v_usage.counts := case when settle_usage.units is null then credits._plain_counts(v_found.price, settle_usage.unit_counts)
                               else jsonb_build_object(v_unit, trim_scale(settle_usage.units)) end;
        v_usage.units  := coalesce((v_usage.counts -> v_unit)::numeric, 0);
      end if;
      if v_usage.counts is not null then
        v_priced := credits._price(v_found.price, v_usage.counts, v_usage.quality, v_usage.model);
      end if;
      if v_priced.amount > 0 and (v_balance - v_priced.amount < v_alert) is not true then
        v_settled := credits._charge_hold(settle_usage.account_id, v_place, v_priced.amount,
          trim_scale(v_balance - v_priced.amount), settle_usage.usage_id, settle_usage.on_overage, true, settle_usage.metadata);
      end if;
      if v_settled.reservation_id is not null then
        if v_usage.counted_in <> '{}' then
          perform credits._correct_windows(v_usage, 0, v_usage.units - v_usage.counted_units,
                                           v_priced.amount - v_usage.counted_credits);
        end if;
        return credits._close_settled(v_usage, v_priced, v_print, 0, v_settled);
      end if;
    end if;
  end if;
  return credits._settle_usage(settle_usage.account_id, settle_usage.usage_id, settle_usage.units, settle_usage.on_overage,
                               settle_usage.unit_counts, settle_usage.metadata, v_print);
end $$;
comment on function credits.settle_usage(text, text, numeric, text, jsonb, jsonb) is
'Charges what was really used, at the rate that authorize_usage pinned, and returns the rest of the hold.

units (or unit_counts) is the total of the use, what capture() has booked included; without either it is what was announced.
Above the hold on_overage decides, as in settle: cap (default), overflow or reject; actual = charged + uncollected. A hold that
has run out is charged afresh and marked late. Limits count what was used from now on, and never refuse here: the work is
done. explanation says how the price comes about. The same call again answers with the first result, marked replayed. To
charge nothing, release(account_id, usage_id): that gives the call back to the rate limits too.
Errors: 400 invalid_request, 402 insufficient_credits, 404 account_not_found, usage_not_found, 409 idempotency_conflict,
reservation_closed, 422 invalid_amount.';
