-- What becomes of a top-up: Stripe's answer and the events of its payment meet in the same functions, in any order, and grant
-- once. Money that was paid is credited whatever was thought before.
-- Keeps invariants 7 and 11. Lock order: the rows of the payment, then the account, then its rule and attempts.

create or replace function credits._on_payment_intent(notice credits.stripe_notice)
returns credits.handler_result
language plpgsql
as $$
declare
  v_current boolean := credits._mirror(_on_payment_intent.notice);
  v_intent  credits.intent_shape := credits._shape_intent((_on_payment_intent.notice).object);
  v_top_up  credits.top_ups;
  v_effects jsonb;
begin
  if v_intent.top_up_id is not null then
    select t.* into v_top_up
      from credits.top_ups t
     where t.account_id = v_intent.account_id and t.top_up_id = v_intent.top_up_id;
    if found and v_intent.status = 'succeeded' then  -- if not, it is of another database at the same Stripe account
      v_effects := credits._complete_top_up(v_top_up, v_intent);
    elsif found and v_current then
      perform credits._move_top_up(v_top_up, v_intent);
    end if;
  end if;
  return credits._applied(v_effects, case when not v_current then 'superseded' end);
end $$;

-- A request that was declined, or that Stripe would not take.
create or replace function credits._on_failed_top_up(notice credits.stripe_notice)
returns credits.handler_result
language plpgsql
as $$
declare
  v_request credits.stripe_requests := credits._answered(_on_failed_top_up.notice);
  v_payment credits.stripe_notice := credits._shape_declined(_on_failed_top_up.notice);
  v_top_up  credits.top_ups;
begin
  if v_payment.object_id is not null then
    perform credits._mirror(v_payment);
  end if;
  perform credits._lock_account(v_request.account_id);
  select t.* into v_top_up
    from credits.top_ups t
   where t.account_id = v_request.account_id and t.top_up_id = v_request.ref;
  v_top_up.payment_intent_id := coalesce(v_payment.object_id, v_top_up.payment_intent_id);
  v_top_up.declined     := v_request.state = 'declined';
  v_top_up.error_code   := coalesce(v_request.error_code, v_request.error_type);
  v_top_up.decline_code := v_request.decline_code;
  v_top_up.advice_code  := v_request.advice_code;
  perform credits._fail_top_up(v_top_up, case when not v_top_up.declined then 'request_failed' end);
  return credits._applied();
end $$;

-- A payment that is new has not failed: only one with an error has.
create or replace function credits._move_top_up(
  top_up credits.top_ups,
  intent credits.intent_shape
)
returns void
language plpgsql
as $$
declare
  v_top_up credits.top_ups := _move_top_up.top_up;
  v_intent credits.intent_shape := _move_top_up.intent;
begin
  perform credits._lock_account(v_top_up.account_id);
  if v_intent.status in ('processing', 'requires_action') then
    update credits.top_ups t
       set state = v_intent.status, payment_intent_id = v_intent.payment_intent_id
     where t.account_id = v_top_up.account_id and t.top_up_id = v_top_up.top_up_id and t.finished_at is null
    returning t.* into v_top_up;
    if found then
      update credits.purchases p
         set status = 'processing', stripe_payment_intent_id = v_intent.payment_intent_id
       where p.account_id = v_top_up.account_id and p.purchase_id = v_top_up.purchase_id;
      perform credits._tell_top_up(v_top_up, 'top_up_action_required') where v_intent.status = 'requires_action';
      perform credits._let_go(v_top_up.account_id) where not credits._is_wanted(v_top_up);
    end if;
  elsif v_intent.status = 'canceled' or v_intent.status = 'requires_payment_method' and v_intent.error_code is not null then
    v_top_up.payment_intent_id := v_intent.payment_intent_id;
    v_top_up.declined     := v_intent.status <> 'canceled';
    v_top_up.error_code   := coalesce(v_intent.error_code, v_intent.status);
    v_top_up.decline_code := v_intent.decline_code;
    v_top_up.advice_code  := v_intent.advice_code;
    perform credits._fail_top_up(v_top_up, null);
  end if;
end $$;

-- The fact is taken first, as of every purchase. A second payment of one attempt is money that bought nothing: it waits for
-- somebody to look.
create or replace function credits._complete_top_up(
  top_up credits.top_ups,
  intent credits.intent_shape
)
returns jsonb
language plpgsql
as $$
declare
  v_intent   credits.intent_shape := _complete_top_up.intent;
  v_top_up   credits.top_ups := _complete_top_up.top_up;
  v_purchase credits.purchases;
  v_effects  jsonb;
begin
  select p.* into v_purchase
    from credits.purchases p
   where p.account_id = v_top_up.account_id and p.purchase_id = v_top_up.purchase_id;
  if v_intent.customer_id is distinct from v_top_up.customer_id then
    perform credits._park('customer_of_another_account');
  elsif (v_intent.amount_received, v_intent.currency) is distinct from (v_purchase.amount, v_purchase.currency) then
    perform credits._park('amount_unknown', null, jsonb_build_object('amount', v_intent.amount_received,
      'currency', v_intent.currency, 'expected', v_purchase.amount, 'expected_currency', v_purchase.currency));
  end if;
  perform credits._claim_payment(v_intent.payment_intent_id, 'top_up', v_intent.payment_intent_id, v_top_up.account_id,
                                v_purchase.amount, v_purchase.currency);
  perform credits._lock_account(v_top_up.account_id);
  update credits.top_ups t
     set state = 'succeeded', payment_intent_id = v_intent.payment_intent_id, finished_at = credits.now()
   where t.account_id = v_top_up.account_id and t.top_up_id = v_top_up.top_up_id and t.state <> 'succeeded'
  returning t.* into v_top_up;
  if not found then
    if not credits._is_fact('top_up', v_intent.payment_intent_id) then
      perform credits._park('top_up_paid_twice', null, jsonb_build_object('top_up_id', (_complete_top_up.top_up).top_up_id));
    end if;
    return null;
  end if;
  v_effects := credits._grant_top_up(v_top_up, v_purchase, coalesce(v_intent.livemode, false));
  perform credits._tell_top_up(v_top_up, 'top_up_done');
  perform credits._end_attempt(v_top_up.account_id);
  return v_effects;
end $$;

create or replace function credits._grant_top_up(
  top_up   credits.top_ups,
  purchase credits.purchases,
  livemode boolean
)
returns jsonb
language plpgsql
as $$
declare
  v_top_up   credits.top_ups := _grant_top_up.top_up;
  v_purchase credits.purchases := _grant_top_up.purchase;
  v_grant    credits.grant_result;
begin
  insert into credits.stripe_facts (kind, ref, account_id, created_at)
  values ('top_up', v_top_up.payment_intent_id, v_top_up.account_id, credits.now());
  v_grant := credits._grant(
    account_id    => v_purchase.account_id,
    amount        => v_purchase.credits,
    kind          => 'purchase',
    description   => (select p.name from credits.packages p where p.code = v_purchase.package),
    source        => 'top_up:' || v_top_up.payment_intent_id,
    cost          => v_purchase.amount,
    cost_currency => v_purchase.currency,
    key           => 'top_up:' || v_top_up.top_up_id,
    fingerprint   => jsonb_build_object('top_up', v_top_up.top_up_id));
  update credits.purchases p
     set status = 'completed', grant_id = v_grant.grant_id, completed_at = credits.now(), livemode = _grant_top_up.livemode,
         stripe_payment_intent_id = v_top_up.payment_intent_id
   where p.account_id = v_purchase.account_id and p.purchase_id = v_purchase.purchase_id;
  perform credits._close_unknown(v_top_up.top_up_id);
  return jsonb_build_array(credits._effect('grant', v_purchase.account_id, v_grant.amount,
                                           jsonb_build_object('key', 'top_up:' || v_top_up.top_up_id)))
         || credits._settle_source('top_up', v_top_up.payment_intent_id, v_purchase.account_id);
end $$;

-- An event may tell what the lost answer to a request would have told: then nothing is unknown any more, and what an operator
-- has asked anew meanwhile is not sent. Whoever holds its row closes it himself.
create or replace function credits._close_unknown(top_up_id text)
returns void
language sql
as $$
  update credits.stripe_requests r
     set state = case r.state when 'unknown' then 'done' else 'failed' end, finished_at = credits.now(),
         error_type = case r.state when 'unknown' then r.error_type else 'withdrawn' end
   where r.request_id = (select u.request_id from credits.stripe_requests u
                          where u.purpose = 'top_up' and u.ref = _close_unknown.top_up_id
                            and (u.state = 'unknown' or u.state = 'queued' and u.first_sent_at is null)
                            for no key update skip locked)
$$;

-- An attempt came to nothing. What must not be tried again with this card pauses the rule; else the card rests for a while.
create or replace function credits._fail_top_up(
  top_up credits.top_ups,
  reason text
)
returns void
language plpgsql
as $$
declare
  v_top_up credits.top_ups := credits._close_top_up(_fail_top_up.top_up);
  v_reason text := coalesce(credits._refusal(v_top_up), _fail_top_up.reason);
begin
  if v_top_up.top_up_id is null then
    return;
  end if;
  perform credits._tell_top_up(v_top_up, 'top_up_action_required') where v_reason = 'authentication_required';
  if v_reason is null or v_reason <> 'request_failed'
     and v_top_up.payment_method is distinct from credits._card_of(credits._customer_of(v_top_up.account_id)) then
    perform credits._end_attempt(v_top_up.account_id);
  else
    perform credits._pause_top_up(v_top_up.account_id, v_reason,
                                  case when v_reason <> 'request_failed' then v_top_up.payment_method end);
  end if;
end $$;

-- Why its card is not to be asked again, if so.
create or replace function credits._refusal(top_up credits.top_ups)
returns text
language sql
stable
as $$
  select case when 'authentication_required' in (t.error_code, t.decline_code)                          then 'authentication_required'
              when t.advice_code = 'do_not_try_again'                                                   then t.advice_code
              when credits._declines(t) >= credits._setting('top_up_max_declines')::integer             then 'declined' end
    from (select (_refusal.top_up).*) t
   where t.state = 'failed'
$$;

-- Another card alone ends such a pause.
create or replace function credits._came_of_card(reason text)
returns boolean
language sql
immutable
as $$
  select _came_of_card.reason in ('declined', 'do_not_try_again', 'authentication_required')
$$;

-- What is left of a pause when somebody sets the rule again: what its card said, which may have been under another reason.
create or replace function credits._pause_left(
  rule credits.auto_topups,
  card text
)
returns text
language sql
stable
as $$
  select case when credits._came_of_card(r.paused_reason) then r.paused_reason
              else coalesce((select credits._refusal(t)
                               from credits.top_ups t
                              where t.account_id = r.account_id and t.payment_method = r.paused_card
                                and credits._refusal(t) is not null
                              order by t.finished_at desc
                              limit 1), 'declined') end
    from (select (_pause_left.rule).*) r
   where r.paused_card = _pause_left.card
$$;

-- How often in a row its card was declined.
create or replace function credits._declines(top_up credits.top_ups)
returns bigint
language sql
stable
as $$
  select count(*)
    from credits.top_ups t
   where t.account_id = (_declines.top_up).account_id and t.declined
     and t.payment_method = (_declines.top_up).payment_method
     and t.created_at > coalesce((select max(s.created_at) from credits.top_ups s
                                   where s.account_id = (_declines.top_up).account_id and s.state = 'succeeded'), '-infinity')
$$;

-- Another card ends the pauses that came of one.
create or replace function credits._card_changed(customer_id text)
returns void
language plpgsql
as $$
declare
  v_account text;
  v_card    text;
begin
  select r.account_id into v_account
    from credits.stripe_customers c
    join credits.auto_topups r on r.account_id = c.account_id
   where c.customer_id = _card_changed.customer_id and r.enabled;
  if not found then
    return;
  end if;
  perform credits._lock_account(v_account);
  v_card := credits._card_of(credits._customer_of(v_account));
  if v_card is null or exists (select from credits.top_ups t
                                where t.account_id = v_account and t.finished_at is null and t.payment_method = v_card) then
    return;
  end if;
  perform credits._let_go(v_account);
  update credits.auto_topups r
     set paused_reason = null, paused_card = null, paused_at = null
   where r.account_id = v_account
     and (r.paused_reason = 'card_missing' or credits._came_of_card(r.paused_reason) and r.paused_card <> v_card);
  if found then
    perform credits._notify(v_account, 'top_up_resumed', concat_ws(':', v_account, v_card, extract(epoch from credits.now())),
                            jsonb_build_object('payment_method', v_card));
    perform credits._look_at_top_up(v_account);
  end if;
  update credits.auto_topups r set check_at = credits.now() where r.account_id = v_account and r.check_at is not null;
  if found then
    perform credits._end_attempt(v_account);
  end if;
end $$;
