-- reserve() and settle() in the general way: whatever the account and the call are like. The usual case is in
-- 30_usual_way.sql. Called from 30_reservations.sql and from 46_usage_general.sql; the lock is taken here.

drop function if exists credits._settle(credits.balances, credits.reservations, numeric, text, jsonb, jsonb);
create or replace function credits._settle(
  account_id     text,
  reservation_id text,
  amount         numeric,
  on_overage     text,
  metadata       jsonb
)
returns credits.settle_result
language plpgsql
as $$
declare
  v_amount  numeric := credits._check_amount(_settle.amount, zero => true);
  v_policy  text    := credits._check_overage(_settle.on_overage);
  v_print   jsonb   := jsonb_build_object('settle', credits._fingerprint(
                         jsonb_build_object('amount', v_amount, 'on_overage', v_policy), _settle.metadata));
  v_meta    jsonb   := credits._check_metadata(_settle.metadata);
  v_balance credits.balances;
  v_hold    credits.reservations;
begin
  v_balance := credits._lock_account(_settle.account_id);
  v_hold    := credits._reservation(_settle.account_id, _settle.reservation_id);
  if v_hold.status = 'settled' then
    perform credits._check_same(v_hold.closing -> 'request', v_print, 'settle', _settle.reservation_id);
    return credits._settle_result(v_hold, true);
  elsif v_hold.status = 'released' then
    perform credits._fail_closed(v_hold);
  end if;
  v_hold := credits._settle_hold(v_balance, v_hold, v_amount, v_policy, v_print, v_meta);
  if v_balance.topup_below is not null and (v_hold.closing ->> 'available')::numeric < v_balance.topup_below then
    perform credits._after_debit(_settle.account_id);
  end if;
  return credits._settle_result(v_hold, false);
end $$;

create or replace function credits._reserve(
  account_id     text,
  amount         numeric,
  reservation_id text,
  ttl            interval,
  min_amount     numeric,
  description    text,
  subject        text,
  member_id      text,
  capability     text,
  metadata       jsonb,
  usage          boolean default false
)
returns credits.reserve_result
language plpgsql
as $$
declare
  v_amount  numeric  := credits._check_amount(_reserve.amount, zero => _reserve.usage);
  v_least   numeric  := least(v_amount, credits._check_min_amount(_reserve.min_amount));
  v_ttl     interval := credits._check_ttl(_reserve.ttl);
  v_id      text     := credits._check_key(_reserve.reservation_id, 'reservation_id');
  v_meta    jsonb    := credits._check_metadata(_reserve.metadata);
  v_balance credits.balances;
  v_member  credits.members;
  v_slices  credits.slices;
  v_first   credits.reservations;
  v_found   record;
  v_now     timestamptz;
begin
  v_balance := credits._lock_account(_reserve.account_id);
  select a.status, r as reservation into v_found
    from credits.accounts a
    left join credits.reservations r
      on r.account_id = _reserve.account_id and r.reservation_id = _reserve.reservation_id
   where a.account_id = _reserve.account_id;
  v_first := v_found.reservation;
  if v_first.reservation_id is not null then
    perform credits._check_same(
      credits._reserve_print(v_first.requested, v_first.ttl, v_first.min_amount, v_first.description,
        v_first.subject, v_first.member_id, v_first.capability, v_first.metadata),
      credits._reserve_print(v_amount, v_ttl, _reserve.min_amount, _reserve.description, _reserve.subject,
        _reserve.member_id, _reserve.capability, _reserve.metadata),
      'reserve', _reserve.reservation_id);
    return credits._reserve_result(v_first, true);
  end if;

  if v_found.status <> 'active' then
    perform credits._fail_status(_reserve.account_id, v_found.status);
  end if;
  if _reserve.member_id is not null then
    v_member := credits._check_member(_reserve.account_id, _reserve.member_id, v_least, credits.now());
  end if;
  v_slices.taken := 0;
  if v_amount > 0 then
    v_slices := credits._take(_reserve.account_id, least(v_amount, v_member.monthly_limit - v_member.month_used),
                              _reserve.capability, 'held');
  end if;
  if v_slices.taken < v_least or v_balance.debt > 0 then
    perform credits._fail_short(v_least, v_slices.taken, v_balance.debt);
  end if;

  v_now := credits.now();
  update credits.balances b
     set held = b.held + trim_scale(v_slices.taken), next_due_at = least(b.next_due_at, v_now + v_ttl)
   where b.account_id = _reserve.account_id
  returning b.* into v_balance;
  insert into credits.reservations as r (account_id, reservation_id, requested, amount, available_after, ttl, min_amount,
    created_at, expires_at, grant_ids, grant_amounts, counted, description, subject, member_id, capability, metadata)
  values (_reserve.account_id, v_id, v_amount, trim_scale(v_slices.taken), trim_scale(credits._free(v_balance)), v_ttl,
    _reserve.min_amount, v_now, v_now + v_ttl, coalesce(v_slices.grant_ids, '{}'), coalesce(v_slices.amounts, '{}'),
    _reserve.usage or v_member.member_id is not null, _reserve.description, _reserve.subject, _reserve.member_id,
    _reserve.capability, coalesce(v_meta, '{}'))
  returning r.* into v_first;
  if v_first.counted then
    perform credits._count_member(_reserve.account_id, _reserve.member_id, v_first.amount, v_now);
  end if;
  if v_first.available_after < v_balance.topup_below then
    perform credits._after_debit(_reserve.account_id);
  end if;
  return credits._reserve_result(v_first, false);
end $$;

create or replace function credits._check_ttl(ttl interval)
returns interval
language plpgsql
stable
as $$
declare
  v_span numeric := extract(epoch from _check_ttl.ttl);  -- as intervals compare, 365 days are longer than 12 months
begin
  -- The default needs no look at the settings.
  if (v_span > 0 and (v_span <= 900
      or v_span <= extract(epoch from (credits._setting('reservation_max_age') #>> '{}')::interval))) is not true then
    perform credits._fail(400, 'invalid_request', jsonb_build_object('argument', 'ttl', 'ttl', _check_ttl.ttl::text),
      'ttl is above zero and at most the setting reservation_max_age (24 hours).');
  end if;
  return credits._exact(_check_ttl.ttl);
end $$;

create or replace function credits._check_min_amount(min_amount numeric)
returns numeric
language plpgsql
immutable
as $$
begin
  return case when _check_min_amount.min_amount is not null then credits._check_amount(_check_min_amount.min_amount) end;
end $$;

create or replace function credits._check_overage(on_overage text)
returns text
language plpgsql
immutable
as $$
begin
  return coalesce(credits._check_word(_check_overage.on_overage, 'on_overage', '{cap,overflow,reject}'), 'cap');
end $$;

create or replace function credits._reserve_print(
  amount      numeric,
  ttl         interval,
  min_amount  numeric,
  description text,
  subject     text,
  member_id   text,
  capability  text,
  metadata    jsonb
)
returns jsonb
language sql
stable
as $$
  select credits._fingerprint(jsonb_build_object(
           'amount', _reserve_print.amount, 'ttl', credits._exact(_reserve_print.ttl),
           'min_amount', _reserve_print.min_amount,
           'description', _reserve_print.description, 'subject', _reserve_print.subject,
           'member_id', _reserve_print.member_id, 'capability', _reserve_print.capability),
           coalesce(_reserve_print.metadata, '{}'))
$$;
