-- What an account may use: the gates, one after the other. check_access shows the answer, authorize_usage of 46_usage.sql
-- asks the same under the lock of the account and acts on it.

create or replace function credits.check_access(
  account_id  text,
  capability  text,
  units       numeric default null,
  quality     text    default null,
  member_id   text    default null,
  model       text    default null,
  unit_counts jsonb   default null
)
returns credits.access_result
language plpgsql
stable
security definer
set search_path = pg_catalog, pg_temp
as $$
declare
  v_use    credits.use;
  v_result credits.access_result;
begin
  -- Mostly one row of the account and one of the catalogue say it all; whatever else there is goes the general way.
  select b.account_id, not o.limited, null, null::integer, null, o.capability, o.quality, o.model, o.offered_by, x.amount,
         trim_scale(b.balance - b.held), o.rate_id, null::jsonb, null::jsonb
    into v_result
    from credits.balances b
   cross join credits._offered(b.plan, check_access.capability, check_access.quality, check_access.model, check_access.units,
                               check_access.unit_counts) o,
         lateral credits._offered_amount(o, check_access.units, check_access.unit_counts) x (amount)
   where b.account_id = check_access.account_id and b.status = 'active' and credits._is_plain(b)
     and check_access.member_id is null
     and b.balance - b.held >= x.amount;
  if not v_result.allowed then
    v_result.limits  := credits._room(v_result.account_id, v_result.plan, v_result.capability,
                                      coalesce(check_access.units, 0), v_result.amount);
    v_result.allowed := v_result.limits is not null;
  end if;
  if v_result.allowed then
    return v_result;
  end if;

  v_use := credits._decide(
    credits._balance(check_access.account_id),
    row(check_access.capability, check_access.units, check_access.unit_counts, check_access.quality, check_access.model,
        check_access.member_id, null)::credits.use_request,
    check_access.account_id);
  return row(v_use.account_id, v_use.gate is null, v_use.gate, v_use.status, v_use.code, v_use.capability, v_use.quality,
             v_use.model, v_use.plan, v_use.amount, v_use.available, v_use.rate_id, v_use.detail,
             v_use.limits)::credits.access_result;
end $$;
comment on function credits.check_access(text, text, numeric, text, text, text, jsonb) is
'Whether an account may use a capability now, and if not, the first gate that refuses. Never raises for that.

The gates, in their order: account (status), subscription, plan (has the capability), quality, model, member, rate_limit,
monthly_cap, member_limit, balance. status, code and detail are those of the error that authorize_usage would raise. Shows
the price (amount), the quality and model that would be used, available, and each limit of the capability with used, left
and resets_at. It is a look: only authorize_usage decides, under the lock of the account.
Errors: 400 invalid_request, 404 account_not_found, capability_not_found, rate_not_found, 422 invalid_amount.';

-- Helpers -------------------------------------------------------------------------------------------------------------

-- Gate after gate, in the order that is promised. What is not reached stays null.
create or replace function credits._decide(
  balance    credits.balances,
  request    credits.use_request,
  account_id text
)
returns credits.use
language plpgsql
stable
as $$
declare
  v_now     timestamptz := credits.now();
  v_account credits.accounts := credits._account(_decide.account_id);
  v_use     credits.use := credits._caller(v_account, v_now, _decide.balance);
begin
  v_use.member_id := (_decide.request).member_id;
  v_use.available := credits._available(_decide.balance, (_decide.request).capability, v_now);
  if v_account.status <> 'active' then
    return credits._refuse(v_use, 'account', 423, 'account_' || v_account.status,
      jsonb_build_object('status', v_account.status));
  end if;
  v_use := credits._ask_subscription(v_use);
  if v_use.gate is null then
    v_use := credits._choose(v_use, _decide.request);
  end if;
  if v_use.gate is null then
    v_use := credits._price_use(v_use, _decide.request, v_now);
    v_use := credits._ask_limits(v_use, _decide.balance, v_now);
  end if;
  if v_use.gate is null and v_use.available < v_use.amount then
    return credits._refuse(v_use, 'balance', 402, 'insufficient_credits',
      jsonb_build_object('required', v_use.amount, 'available', v_use.available));
  end if;
  return v_use;
end $$;

create or replace function credits._refuse(
  use    credits.use,
  gate   text,
  status integer,
  code   text,
  detail jsonb
)
returns credits.use
language plpgsql
immutable
as $$
declare
  v_use credits.use := _refuse.use;
begin
  v_use.gate   := _refuse.gate;
  v_use.status := _refuse.status;
  v_use.code   := _refuse.code;
  v_use.detail := jsonb_build_object('account_id', v_use.account_id, 'gate', _refuse.gate) || _refuse.detail;
  return v_use;
end $$;

-- Most subscriptions let their account spend at first sight; the others are asked in full.
create or replace function credits._ask_subscription(use credits.use)
returns credits.use
language plpgsql
stable
as $$
declare
  v_state credits.subscription_state_result;
begin
  if credits._must_ask_subscription((_ask_subscription.use).account_id) then
    v_state := credits.get_subscription_state((_ask_subscription.use).account_id);
    if not v_state.may_spend then
      return credits._refuse(_ask_subscription.use, 'subscription', 403, 'subscription_inactive',
        jsonb_build_object('state', v_state.state, 'status', v_state.status, 'plan', v_state.plan,
                           'grace_until', v_state.grace_until));
    end if;
  end if;
  return _ask_subscription.use;
end $$;

-- Nothing fits: either the quality is not in the plan, or the model is not in it at that quality.
create or replace function credits._refuse_choice(
  use     credits.use,
  request credits.use_request
)
returns credits.use
language plpgsql
stable
as $$
declare
  v_use       credits.use := _refuse_choice.use;
  v_request   credits.use_request := _refuse_choice.request;
  v_qualities jsonb;
  v_models    jsonb;
begin
  select coalesce(jsonb_agg(l.code order by l.display_order, l.code), '[]') into v_qualities
    from credits.quality_levels l, lateral credits._plan_choice(v_use.plan, v_use.capability, l.code, null);
  if v_request.model is null or v_request.quality is not null and not v_qualities ? v_request.quality then
    return credits._refuse(v_use, 'quality', 403, 'quality_not_in_plan', jsonb_build_object(
      'plan', v_use.plan, 'capability', v_use.capability, 'quality', v_request.quality, 'qualities', v_qualities));
  end if;
  select coalesce(jsonb_agg(m.code order by m.display_order, m.code), '[]') into v_models
    from credits.models m, lateral credits._plan_choice(v_use.plan, v_use.capability, v_request.quality, m.code);
  return credits._refuse(v_use, 'model', 403, 'model_not_in_plan', jsonb_build_object(
    'plan', v_use.plan, 'capability', v_use.capability, 'quality', v_request.quality, 'model', v_request.model,
    'models', v_models));
end $$;

create or replace function credits._plans_with(capability text)
returns jsonb
language sql
stable
as $$
  select coalesce(jsonb_agg(p.code order by p.display_order, p.code), '[]')
    from credits.plan_capabilities c
    join credits.plans p on p.code = c.plan and p.active
   where c.capability = _plans_with.capability
$$;

-- What can be used of a capability: with the credits that are scoped to it. While there is debt, nothing.
create or replace function credits._available(
  balance    credits.balances,
  capability text,
  at         timestamptz
)
returns numeric
language plpgsql
stable
as $$
declare
  v_debt numeric;
begin
  if (_available.balance).next_due_at > _available.at and not (_available.balance).has_scoped then
    return trim_scale((_available.balance).balance - (_available.balance).held - (_available.balance).debt);
  end if;
  v_debt := credits._debt_at(_available.balance, _available.at);
  if v_debt > 0 then
    return trim_scale(-v_debt);
  end if;
  return trim_scale(coalesce((select sum(l.remaining) from credits._lots_at(_available.balance, _available.at) l
                               where l.scope is null or _available.capability = any (l.scope)), 0));
end $$;

-- What is offered is what this version makes of the catalogue, and not what the one before did.
do $$
begin
  lock table credits.plans in share row exclusive mode;
  perform credits._work_out_offers();
end $$;
