-- What refunds and disputes take back. The target follows from what is known of a payment, never from one event, so order,
-- repeats, partial refunds, failed refunds and late wins need no case of their own.
-- Keeps invariant 9: what was clawed back equals its target. Lock order: the charge's row, the payment's row, then the account.

insert into credits.settings as s (name, value, summary) values
  ('dispute_freezes', '"credits"',
   'What an open dispute freezes: credits (what is unspent of those the payment bought) or account.')
on conflict (name) do update set summary = excluded.summary;

create or replace function credits._on_charge(notice credits.stripe_notice)
returns credits.handler_result
language plpgsql
as $$
declare
  v_charge  credits.charge_shape := credits._shape_charge((_on_charge.notice).object);
  v_current boolean;
begin
  v_current := credits._mirror(_on_charge.notice, coalesce(v_charge.payment_intent_id, v_charge.charge_id));
  return credits._applied(credits._payment_changed(coalesce(v_charge.payment_intent_id, v_charge.charge_id),
                                                   v_charge.refunded > 0),
                          case when not v_current then 'superseded' end);
end $$;

create or replace function credits._on_refund(notice credits.stripe_notice)
returns credits.handler_result
language plpgsql
as $$
declare
  v_refund  credits.refund_shape := credits._shape_refund((_on_refund.notice).object);
  v_payment text := credits._payment_of_charge(v_refund.charge_id, v_refund.payment_intent_id);
  v_current boolean := credits._mirror(_on_refund.notice, coalesce(v_refund.charge_id, v_refund.payment_intent_id));
  v_effects jsonb := credits._payment_changed(v_payment, true);
begin
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
  v_first   boolean := credits._snapshot('dispute', v_dispute.dispute_id) is null;
  v_current boolean := credits._mirror(_on_dispute.notice, coalesce(v_dispute.charge_id, v_dispute.payment_intent_id));
  v_effects jsonb := credits._payment_changed(v_payment, true);
begin
  perform credits._tell_payment(v_payment, 'dispute', v_dispute.dispute_id || ':' || v_dispute.status, v_dispute.amount,
                                v_dispute.currency, v_dispute.status)
    where v_current;
  if v_first and v_dispute.status in ('needs_response', 'under_review', 'lost') then  -- purchases see it by themselves
    perform credits._pause_top_up(p.account_id, 'disputed')
       from credits.stripe_payments p
      where p.payment_id = v_payment and p.source_kind = 'invoice';
  end if;
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

-- Says what a payment paid for. The first word stands.
create or replace function credits._link_payment(
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
  insert into credits.stripe_payments as p (payment_id, source_kind, source_id, account_id, amount, currency, created_at)
  select _link_payment.payment_id, _link_payment.source_kind, _link_payment.source_id, _link_payment.account_id,
         _link_payment.amount, _link_payment.currency, credits.now()
   where _link_payment.payment_id is not null
  on conflict on constraint stripe_payments_pkey do update
    set source_kind = excluded.source_kind, source_id = excluded.source_id, account_id = excluded.account_id,
        amount = excluded.amount, currency = excluded.currency
    where p.source_kind is null;
end $$;

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
  insert into credits.stripe_payments as p (payment_id, created_at)
  values (_payment_changed.payment_id, credits.now())
  on conflict on constraint stripe_payments_pkey do update set payment_id = excluded.payment_id
  returning p.* into v_payment;
  if v_payment.source_kind is null then
    if _payment_changed.claims then
      perform credits._request_object('invoice_payments', _payment_changed.payment_id);
    end if;
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

-- The share of what was captured that is to come back. A purchase without a charge has nothing to give back.
create or replace function credits._share(
  part  bigint,
  whole bigint
)
returns numeric
language sql
immutable
as $$
  select case when _share.whole > 0 then least(1, _share.part::numeric / _share.whole) else 0 end
$$;

create or replace function credits._is_refunded(
  source_kind text,
  source_id   text
)
returns boolean
language sql
stable
as $$
  select credits._share(t.refunded + t.lost, t.captured) >= 1
    from credits._payment_totals(_is_refunded.source_kind, _is_refunded.source_id) t
$$;

-- Brings everything that a session or an invoice has bought to where its payments are. The caller holds the account.
create or replace function credits._settle_source(
  source_kind text,
  source_id   text,
  account_id  text
)
returns jsonb
language plpgsql
as $$
declare
  v_totals  credits.payment_totals := credits._payment_totals(_settle_source.source_kind, _settle_source.source_id);
  v_account boolean := credits._setting('dispute_freezes') = '"account"';
  v_grant   bigint;
  v_effects jsonb := jsonb '[]';
begin
  for v_grant in
    select p.grant_id
      from credits._purchases_of(_settle_source.source_kind, _settle_source.source_id, _settle_source.account_id) p
    union all
    select p.grant_id
      from credits.plan_grants p
      join credits.grants g on g.account_id = p.account_id and g.grant_id = p.grant_id
     where _settle_source.source_kind = 'invoice' and p.account_id = _settle_source.account_id
       and p.invoice_id = _settle_source.source_id and g.status <> 'pending'
    order by 1
  loop
    v_effects := v_effects || credits._claw_back(_settle_source.account_id, v_grant, _settle_source.source_kind,
      _settle_source.source_id, credits._share(v_totals.refunded + v_totals.lost, v_totals.captured),
      credits._share(v_totals.refunded + v_totals.lost + case when v_account then 0 else v_totals.open end, v_totals.captured));
  end loop;

  perform credits._settle_purchase(p, v_totals)
     from credits._purchases_of(_settle_source.source_kind, _settle_source.source_id, _settle_source.account_id) p;
  if _settle_source.source_kind = 'invoice' and v_effects <> '[]' then
    perform credits._refresh_plan(_settle_source.account_id);  -- a line that is refunded in full pays out no more
  end if;
  if v_account or exists (select from credits.accounts a
                           where a.account_id = _settle_source.account_id and a.status = 'frozen'
                             and a.settings ->> 'status_reason' = 'dispute') then
    perform credits._freeze_disputed(_settle_source.account_id);
  end if;
  return v_effects;
end $$;

-- What a session, or the payment of a top-up, has bought.
create or replace function credits._purchases_of(
  source_kind text,
  source_id   text,
  account_id  text
)
returns setof credits.purchases
language sql
stable
as $$
  select p.*
    from credits.purchases p
   where _purchases_of.source_kind = 'session' and p.account_id = _purchases_of.account_id
     and p.stripe_session_id = _purchases_of.source_id and p.grant_id is not null
  union all
  select p.*
    from credits.purchases p
   where _purchases_of.source_kind = 'top_up' and p.account_id = _purchases_of.account_id
     and p.stripe_payment_intent_id = _purchases_of.source_id and p.stripe_session_id is null and p.grant_id is not null
$$;

-- Money that goes back ends automatic top-up, or it would buy again what was taken: a top-up's own, and any that is disputed.
drop function if exists credits._settle_purchase(text, text, credits.payment_totals);
create or replace function credits._settle_purchase(
  purchase credits.purchases,
  totals   credits.payment_totals
)
returns void
language plpgsql
as $$
declare
  v_before   credits.purchases := _settle_purchase.purchase;
  v_refunded bigint := (_settle_purchase.totals).refunded;
  v_disputed bigint := (_settle_purchase.totals).lost + (_settle_purchase.totals).open;
begin
  update credits.purchases p
     set amount_refunded = v_refunded,
         amount_disputed = v_disputed,
         status = case when v_disputed > 0 then 'disputed'
                       when v_refunded = 0 then 'completed'
                       when v_refunded >= (_settle_purchase.totals).captured then 'refunded'
                       else 'partially_refunded' end
   where p.account_id = v_before.account_id and p.purchase_id = v_before.purchase_id;
  if v_disputed > v_before.amount_disputed then
    perform credits._pause_top_up(v_before.account_id, 'disputed');
  elsif v_refunded > v_before.amount_refunded and v_before.stripe_session_id is null then
    perform credits._pause_top_up(v_before.account_id, 'refunded');
  end if;
end $$;

-- With dispute_freezes = account: frozen while any dispute of its payments is open, and only what we froze is unfrozen.
create or replace function credits._freeze_disputed(account_id text)
returns void
language plpgsql
as $$
declare
  v_account  credits.accounts := credits._account(_freeze_disputed.account_id);
  v_disputed boolean := credits._setting('dispute_freezes') = '"account"' and exists (
    select from credits.stripe_payments p, credits._payment_totals(p.source_kind, p.source_id) t
     where p.account_id = v_account.account_id and t.open > 0);
begin
  if v_disputed and v_account.status = 'active' then
    perform credits._set_account_status(v_account.account_id, 'frozen', 'dispute');
  elsif not v_disputed and v_account.status = 'frozen' and v_account.settings ->> 'status_reason' = 'dispute' then
    perform credits._set_account_status(v_account.account_id, 'active', null);
  end if;
end $$;
