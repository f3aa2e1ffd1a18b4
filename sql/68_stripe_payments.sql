-- What refunds and disputes take back. The target follows from what is known of a payment, never from one event, so order,
-- repeats, partial refunds, failed refunds and late wins need no case of their own.
-- Keeps invariant 9: what was clawed back equals its target. Lock order: the charge's row, the payment's row, the account, then
-- the row of the refund or the dispute.

create or replace function credits._on_charge(notice credits.stripe_notice)
returns credits.handler_result
language plpgsql
as $$
declare
  v_charge  credits.charge_shape := credits._shape_charge((_on_charge.notice).object);
  v_payment text := coalesce(v_charge.payment_intent_id, v_charge.charge_id);
  v_before  bigint := credits._before_payment(v_payment, v_charge.charge_id);
  v_current boolean := credits._mirror(_on_charge.notice, v_payment);
  v_effects jsonb := credits._payment_changed(v_payment, v_charge.refunded > 0);
begin
  perform credits._pause_if_risen(v_payment, v_before);
  return credits._applied(v_effects, case when not v_current then 'superseded' end);
end $$;

create or replace function credits._on_refund(notice credits.stripe_notice)
returns credits.handler_result
language plpgsql
as $$
declare
  v_refund  credits.refund_shape := credits._shape_refund((_on_refund.notice).object);
  v_payment text := credits._payment_of_charge(v_refund.charge_id, v_refund.payment_intent_id);
  v_current boolean;
  v_effects jsonb;
begin
  perform credits._before_payment(v_payment);
  v_current := credits._mirror(_on_refund.notice, coalesce(v_refund.charge_id, v_refund.payment_intent_id));
  v_effects := credits._payment_changed(v_payment, true);
  perform credits._note_refund(v_refund);
  perform credits._tell_payment(v_payment, case v_refund.status when 'succeeded' then 'refund' else 'refund_failed' end,
                                v_refund.refund_id, v_refund.amount, v_refund.currency, v_refund.status)
    where v_current and v_refund.status in ('succeeded', 'failed');
  return credits._applied(v_effects, case when not v_current then 'superseded' end);
end $$;

create or replace function credits._on_dispute(notice credits.stripe_notice)
returns credits.handler_result
language plpgsql
as $$
declare
  v_dispute credits.dispute_shape := credits._shape_dispute((_on_dispute.notice).object);
  v_payment text := credits._payment_of_charge(v_dispute.charge_id, v_dispute.payment_intent_id);
  v_before  bigint := credits._before_payment(v_payment);
  v_current boolean := credits._mirror(_on_dispute.notice, coalesce(v_dispute.charge_id, v_dispute.payment_intent_id));
  v_effects jsonb := credits._payment_changed(v_payment, true);
begin
  perform credits._tell_payment(v_payment, 'dispute', v_dispute.dispute_id || ':' || v_dispute.status, v_dispute.amount,
                                v_dispute.currency, v_dispute.status)
    where v_current;
  perform credits._pause_if_risen(v_payment, v_before);
  return credits._applied(v_effects, case when not v_current then 'superseded' end);
end $$;

-- Of an account, as far as it is known whose payment it is.
create or replace function credits._tell_payment(
  payment_id text,
  type       text,
  key        text,
  amount     bigint,
  currency   text,
  status     text
)
returns void
language sql
as $$
  select credits._notify(
           (select p.account_id from credits.stripe_payments p where p.payment_id = _tell_payment.payment_id),
           _tell_payment.type, _tell_payment.key, jsonb_build_object(
             'payment_id', _tell_payment.payment_id, 'id', split_part(_tell_payment.key, ':', 1), 'amount', _tell_payment.amount,
             'currency', _tell_payment.currency, 'status', _tell_payment.status))
   where _tell_payment.key is not null
$$;

-- The payment that a charge belongs to. A dispute may know the charge alone: then the charge's own event, or a retrieve,
-- tells the rest, and whoever comes second at the row of the charge sees what the first has written.
create or replace function credits._payment_of_charge(
  charge_id         text,
  payment_intent_id text
)
returns text
language plpgsql
as $$
declare
  v_charge credits.stripe_objects;
begin
  if _payment_of_charge.charge_id is null then
    return _payment_of_charge.payment_intent_id;
  end if;
  v_charge := credits._touch('charge', _payment_of_charge.charge_id, _payment_of_charge.payment_intent_id);
  if v_charge.ref is null then
    perform credits._request_object('charge', _payment_of_charge.charge_id);
  end if;
  return v_charge.ref;
end $$;

-- Says what a payment paid for. The first word stands; answers whether it was this one.
drop function if exists credits._link_payment(text, text, text, text, bigint, text);
create or replace function credits._link_payment(
  payment_id  text,
  source_kind text,
  source_id   text,
  account_id  text,
  amount      bigint,
  currency    text
)
returns boolean
language plpgsql
as $$
begin
  insert into credits.stripe_payments as p (payment_id, source_kind, source_id, account_id, amount, currency, created_at)
  select _link_payment.payment_id, _link_payment.source_kind, _link_payment.source_id, _link_payment.account_id,
         _link_payment.amount, _link_payment.currency, credits.now()
   where _link_payment.payment_id is not null
  on conflict on constraint stripe_payments_pkey do update
    set source_kind = excluded.source_kind, source_id = excluded.source_id, account_id = excluded.account_id,
        amount = excluded.amount, currency = excluded.currency
    where p.source_kind is null;
  return found;
end $$;

-- The same for whoever grants by it.
create or replace function credits._claim_payment(
  payment_id  text,
  source_kind text,
  source_id   text,
  account_id  text,
  amount      bigint,
  currency    text
)
returns void
language plpgsql
as $$
begin
  if not credits._link_payment(_claim_payment.payment_id, _claim_payment.source_kind, _claim_payment.source_id,
                               _claim_payment.account_id, _claim_payment.amount, _claim_payment.currency) then
    perform credits._check_bought(_claim_payment.payment_id, _claim_payment.source_kind, _claim_payment.source_id);
  end if;
end $$;

-- A payment buys once, and its row says what. What comes second waits for somebody to look. Invoices may share one.
create or replace function credits._check_bought(
  payment_id  text,
  source_kind text,
  source_id   text
)
returns void
language sql
as $$
  select credits._park('payment_granted_before', null, jsonb_build_object(
           'payment_id', p.payment_id, 'bought', concat_ws(':', p.source_kind, p.source_id)))
    from credits.stripe_payments p
   where p.payment_id = _check_bought.payment_id
     and (p.source_kind, p.source_id) <> (_check_bought.source_kind, _check_bought.source_id)
     and (p.source_kind, _check_bought.source_kind) <> ('invoice', 'invoice')
$$;

-- Before something becomes known of a payment: what has fallen due is booked by what was known until now, or a month that had
-- begun would not come after all, and nothing roll over into it. Answers what is disputed of the invoice that it paid. The row of
-- a charge is locked first, and not said to be of this payment yet: its disputes would count as known.
create or replace function credits._before_payment(
  payment_id text,
  charge_id  text default null
)
returns bigint
language plpgsql
as $$
begin
  perform credits._touch('charge', _before_payment.charge_id)
    where _before_payment.charge_id is not null;
  perform credits._lock_account((credits._touch_payment(_before_payment.payment_id)).account_id)
    from credits.stripe_payments p
   where p.payment_id = _before_payment.payment_id and p.source_kind is not null;
  return credits._disputed_of_invoice(_before_payment.payment_id);
end $$;

create or replace function credits._touch_payment(payment_id text)
returns credits.stripe_payments
language sql
as $$
  insert into credits.stripe_payments as p (payment_id, created_at)
  values (_touch_payment.payment_id, credits.now())
  on conflict on constraint stripe_payments_pkey do update set payment_id = excluded.payment_id
  returning p.*
$$;

-- Something became known of a payment. Its row is written before it is read, so of two halves the later sees both. Where it
-- claims credits and nobody has said what it paid for, Stripe is asked: the link of an invoice is an event of its own.
create or replace function credits._payment_changed(
  payment_id text,
  claims     boolean
)
returns jsonb
language plpgsql
as $$
declare
  v_payment credits.stripe_payments;
begin
  if _payment_changed.payment_id is null then
    return null;
  end if;
  v_payment := credits._touch_payment(_payment_changed.payment_id);
  perform credits._judge_closed(_payment_changed.payment_id) where _payment_changed.claims;
  if v_payment.source_kind is null then
    perform credits._request_object('invoice_payments', _payment_changed.payment_id)
      where _payment_changed.claims and not exists (  -- Stripe lists them by payment intent alone
        select from credits.stripe_objects o where o.kind = 'charge' and o.object_id = _payment_changed.payment_id);
    return null;
  end if;
  perform credits._lock_account(v_payment.account_id);
  return credits._settle_source(v_payment.source_kind, v_payment.source_id, v_payment.account_id);
end $$;

-- What is known of the payments of a session or an invoice, in the minor unit of their currency. A dispute in another
-- currency stands for the whole charge until a person decides. A charge's own sum of refunds counts only where no refund
-- is known, since a refund may fail later. Inquiries (warning_*) moved no money.
create or replace function credits._payment_totals(
  source_kind text,
  source_id   text
)
returns credits.payment_totals
language plpgsql
stable
as $$
begin
  return (
    with payments as (
      select p.payment_id, p.amount, p.currency
        from credits.stripe_payments p
       where p.source_kind = _payment_totals.source_kind and p.source_id = _payment_totals.source_id
    ), charges as (
      select p.payment_id, o.object_id as charge_id, coalesce(c.captured, 0) as captured, coalesce(c.refunded, 0) as refunded,
             coalesce(c.currency, p.currency) as currency
        from payments p
        join credits.stripe_objects o on o.kind = 'charge' and o.ref = p.payment_id
        left join lateral credits._shape_charge(o.snapshot) c on o.snapshot is not null
    ), captured as (
      select p.payment_id, coalesce(nullif(sum(c.captured), 0), p.amount, 0) as amount, coalesce(sum(c.refunded), 0) as refunded,
             coalesce(max(c.currency), p.currency) as currency,
             array_remove(array_agg(c.charge_id), null) || p.payment_id as refs
        from payments p
        left join charges c on c.payment_id = p.payment_id
       group by p.payment_id, p.amount, p.currency
    ), refunds as (
      select p.payment_id, sum(r.amount) filter (where coalesce(r.status, '') not in ('failed', 'canceled') and r.currency = p.currency) as amount,
             count(*) as known
        from captured p
        join credits.stripe_objects o on o.kind = 'refund' and o.ref = any (p.refs) and o.snapshot is not null,
             lateral credits._shape_refund(o.snapshot) r
       group by p.payment_id
    ), disputes as (
      select p.payment_id,
             sum(case when d.currency = p.currency then d.amount else p.amount end)
               filter (where d.status in ('lost', 'appeal_needs_response', 'appeal_under_review')) as lost,
             sum(case when d.currency = p.currency then d.amount else p.amount end)
               filter (where d.status in ('needs_response', 'under_review')) as open
        from captured p
        join credits.stripe_objects o on o.kind = 'dispute' and o.ref = any (p.refs) and o.snapshot is not null,
             lateral credits._shape_dispute(o.snapshot) d
       group by p.payment_id
    )
    select row(coalesce(sum(p.amount), 0)::bigint,
               coalesce(sum(case when r.known > 0 then coalesce(r.amount, 0) else p.refunded end), 0)::bigint,
               coalesce(sum(d.lost), 0)::bigint, coalesce(sum(d.open), 0)::bigint)::credits.payment_totals
      from captured p
      left join refunds r on r.payment_id = p.payment_id
      left join disputes d on d.payment_id = p.payment_id);
end $$;
