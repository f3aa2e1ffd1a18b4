-- Money that is given back for a purchase, because an operator says so. What it takes back of the credits, and what becomes of the
-- purchase, follows from the refund itself, whether its answer or its event comes first: 68_stripe_payments.sql.
-- Keeps: what is refunded, disputed and asked for is together never more than what was paid. Lock order: the account, then its
-- refund requests.

create or replace function credits.request_refund(
  account_id  text,
  purchase_id bigint,
  amount      bigint default null,
  reason      text   default null,
  key         text   default null
)
returns credits.refund_request_result
language plpgsql
security definer
set search_path = pg_catalog, pg_temp
as $$
declare
  v_asked    jsonb := jsonb_strip_nulls(jsonb_build_object(
                        'purchase_id', request_refund.purchase_id, 'amount', request_refund.amount,
                        'reason', request_refund.reason));
  v_refund   credits.refund_requests;
  v_purchase credits.purchases;
  v_left     bigint;
begin
  perform credits._check_key(request_refund.key, 'key');
  perform credits._lock_account(request_refund.account_id);
  select r.* into v_refund
    from credits.refund_requests r
   where r.account_id = request_refund.account_id and r.key = request_refund.key;
  if found then
    perform credits._check_same(v_refund.fingerprint, v_asked, 'request_refund', request_refund.key);
    return credits._refund_result(v_refund, true);
  end if;

  select p.* into v_purchase
    from credits.purchases p
   where p.account_id = request_refund.account_id and p.purchase_id = request_refund.purchase_id;
  if not found then
    perform credits._fail(404, 'purchase_not_found', jsonb_build_object(
      'account_id', request_refund.account_id, 'purchase_id', request_refund.purchase_id));
  end if;
  v_left := credits._refundable(v_purchase);
  if (coalesce(request_refund.amount, v_left) between 1 and v_left) is not true then
    perform credits._fail(422, 'invalid_amount',
      jsonb_build_object('amount', request_refund.amount, 'refundable', v_left, 'currency', v_purchase.currency),
      'A refund is from 1 to what is left of what was paid, in the minor unit of the currency.');
  end if;
  v_refund := credits._ask_refund(v_purchase, coalesce(request_refund.amount, v_left), request_refund.reason, request_refund.key,
                                  v_asked);
  return credits._refund_result(v_refund, false);
end $$;
comment on function credits.request_refund(text, bigint, bigint, text, text) is
'Asks Stripe to give money back for a purchase, once per key.

amount is in the minor unit of the purchase''s currency, null all that is left. state is queued until Stripe has answered; then
done, with refund_id, or failed, with Stripe''s error if it refused. refundable is what is left after this. The credits are taken back
when Stripe says that the refund is made, in proportion, into debt if they are spent. A reason that is one of Stripe''s words
(duplicate, fraudulent, requested_by_customer) is told as such, any other is kept in the metadata of the refund.
Errors: 400 invalid_request, 404 account_not_found, purchase_not_found, 409 idempotency_conflict, 422 invalid_amount.';

-- Helpers -----------------------------------------------------------------------------------------------------------

-- What is left of what was paid. What open disputes ask for is out of reach, and so is what was asked for and is not yet known:
-- a refund that Stripe has made, but whose amount only the charge tells, counts twice until its own word comes, never not at all.
-- The caller holds the account.
create or replace function credits._refundable(purchase credits.purchases)
returns bigint
language sql
stable
as $$
  select case when (_refundable.purchase).grant_id is null or (_refundable.purchase).stripe_payment_intent_id is null then 0
              else greatest(0, t.captured - t.refunded - t.lost - t.open - o.amount) end
    from credits._payment_totals(case when (_refundable.purchase).stripe_session_id is null then 'top_up' else 'session' end,
                                 coalesce((_refundable.purchase).stripe_session_id,
                                          (_refundable.purchase).stripe_payment_intent_id)) t,
         lateral (select coalesce(sum(r.amount), 0)::bigint as amount
                    from credits.refund_requests r
                    left join credits.stripe_requests q on q.request_id = r.request_id
                   where r.account_id = (_refundable.purchase).account_id and r.purchase_id = (_refundable.purchase).purchase_id
                     and r.refund_id is null and coalesce(q.state, 'failed') not in ('failed', 'declined')) o
$$;

create or replace function credits._ask_refund(
  purchase credits.purchases,
  amount   bigint,
  reason   text,
  key      text,
  asked    jsonb
)
returns credits.refund_requests
language plpgsql
as $$
declare
  v_id      text := gen_random_uuid();
  v_known   boolean := _ask_refund.reason in ('duplicate', 'fraudulent', 'requested_by_customer');
  v_refund  credits.refund_requests;
  v_request bigint := credits._request('refund', v_id, 'post', '/v1/refunds', jsonb_strip_nulls(jsonb_build_object(
    'payment_intent', (_ask_refund.purchase).stripe_payment_intent_id,
    'amount', _ask_refund.amount,
    'reason', case when v_known then _ask_refund.reason end,
    'metadata', jsonb_build_object(
      'account_id', (_ask_refund.purchase).account_id, 'purchase_id', (_ask_refund.purchase).purchase_id::text,
      'refund_request_id', v_id, 'reason', case when not v_known then left(nullif(_ask_refund.reason, ''), 500) end))),
    (_ask_refund.purchase).account_id,
    stripe_account => credits._home_of('payment_intent', (_ask_refund.purchase).stripe_payment_intent_id));
begin
  insert into credits.refund_requests as r (refund_request_id, account_id, purchase_id, key, fingerprint, request_id, amount,
    reason, created_at)
  values (v_id, (_ask_refund.purchase).account_id, (_ask_refund.purchase).purchase_id, _ask_refund.key, _ask_refund.asked,
          v_request, _ask_refund.amount, _ask_refund.reason, credits.now())
  returning r.* into v_refund;
  return v_refund;
end $$;

-- A refund that is made may still fail, a month later; then its amount is free again.
create or replace function credits._refund_result(
  refund   credits.refund_requests,
  replayed boolean
)
returns credits.refund_request_result
language sql
stable
as $$
  select row(r.request_id, s.state, r.purchase_id, r.amount, p.currency, credits._refundable(p), r.refund_id,
             case when s.state = 'failed' and r.refund_id is null then credits._error_told(q) end,
             _refund_result.replayed)::credits.refund_request_result
    from (select (_refund_result.refund).*) r
    join credits.purchases p on p.account_id = r.account_id and p.purchase_id = r.purchase_id
    left join credits.stripe_requests q on q.request_id = r.request_id,
         lateral (select case when (credits._shape_refund(credits._snapshot('refund', r.refund_id))).status
                                   in ('failed', 'canceled')                             then 'failed'
                              when r.refund_id is not null                               then 'done'
                              when coalesce(q.state, 'failed') in ('failed', 'declined') then 'failed'
                              else 'queued' end as state) s
$$;

-- A refund of ours is known from now on, and counts as itself.
create or replace function credits._note_refund(refund credits.refund_shape)
returns void
language plpgsql
as $$
declare
  v_account_id text;
begin
  select r.account_id into v_account_id
    from credits.refund_requests r
    join credits.purchases p on p.account_id = r.account_id and p.purchase_id = r.purchase_id
   where r.refund_request_id = (_note_refund.refund).refund_request_id and r.refund_id is null
     and p.stripe_payment_intent_id = (_note_refund.refund).payment_intent_id;
  if found then
    perform credits._lock_account(v_account_id);
    update credits.refund_requests r
       set refund_id = (_note_refund.refund).refund_id
     where r.refund_request_id = (_note_refund.refund).refund_request_id and r.refund_id is null;
  end if;
end $$;

-- Asked again, it counts again; what other refunds have taken meanwhile is gone.
create or replace function credits._on_refund_again(notice credits.stripe_notice)
returns credits.handler_result
language plpgsql
as $$
declare
  v_request credits.stripe_requests := credits._answered(_on_refund_again.notice);
  v_refund  credits.refund_requests;
  v_left    bigint;
begin
  perform credits._lock_account(v_request.account_id);
  select r.* into v_refund from credits.refund_requests r where r.refund_request_id = v_request.ref;
  select credits._refundable(p) into v_left
    from credits.purchases p
   where p.account_id = v_refund.account_id and p.purchase_id = v_refund.purchase_id;
  if v_refund.refund_id is not null or v_left < v_refund.amount then
    perform credits._fail(422, 'invalid_amount', jsonb_build_object('amount', v_refund.amount, 'refundable', v_left),
      'It was made after all, or so much is not left of what was paid.');
  end if;
  update credits.refund_requests r
     set request_id = v_request.request_id
   where r.refund_request_id = v_refund.refund_request_id;
  return credits._applied();
end $$;
