-- Invoices of Stripe: a paid one grants by its lines, each line once, frozen.
-- Keeps invariant 7, and that the lines of one period never grant more than the largest full allowance that it reached.
-- Lock order: rows of stripe_objects and stripe_payments, then the account.

create or replace function credits._on_invoice(notice credits.stripe_notice)
returns credits.handler_result
language plpgsql
as $$
declare
  v_notice  credits.stripe_notice := _on_invoice.notice;
  v_invoice credits.invoice_shape := credits._shape_invoice(v_notice.object);
  v_current boolean;
begin
  if v_invoice.invoice_id is null then
    return credits._ignored('no_id');
  end if;
  v_current := credits._mirror(v_notice, v_invoice.customer_id);
  if v_invoice.paid and v_invoice.subscription_id is not null then
    return credits._applied(credits._pay_invoice(v_notice, v_invoice));
  elsif v_current and v_notice.type in ('invoice.payment_failed', 'invoice.payment_action_required',
                                        'invoice.finalization_failed', 'invoice.overdue') then
    perform credits._notify(
      credits._bound_account(credits._shape_owner(v_notice.object)), replace(v_notice.type, '.', '_'),
      concat_ws(':', v_invoice.invoice_id, v_invoice.attempt_count),
      jsonb_build_object('invoice_id', v_invoice.invoice_id, 'subscription_id', v_invoice.subscription_id,
                         'amount', v_invoice.total, 'currency', v_invoice.currency, 'attempt', v_invoice.attempt_count));
  end if;
  return credits._applied(null, case when v_invoice.paid then 'no_subscription' when not v_current then 'superseded' end);
end $$;

-- invoice_payment.paid is the only link between an invoice and its payment since 2025-03-31.basil.
create or replace function credits._on_invoice_payment(notice credits.stripe_notice)
returns credits.handler_result
language plpgsql
as $$
declare
  v_notice     credits.stripe_notice := _on_invoice_payment.notice;
  v_payment    credits.charge_shape := credits._shape_invoice_payment(v_notice.object);
  v_payment_id text := coalesce(v_payment.payment_intent_id, v_payment.charge_id);
  v_current    boolean := credits._mirror(v_notice, v_payment.invoice_id);
  v_account    text;
  v_linked     boolean;
begin
  if v_payment.invoice_id is null then
    return credits._ignored('no_invoice');
  end if;
  perform credits._touch('invoice', v_payment.invoice_id);  -- whoever pays the invoice now, comes before us or sees us
  select f.account_id into v_account
    from credits.stripe_facts f
   where f.kind = 'invoice' and f.ref = v_payment.invoice_id;
  if v_account is null or v_payment.captured is null then
    perform credits._judge_closed(v_payment.invoice_id);
    return credits._mirrored(v_current);
  end if;
  perform credits._touch_payment(v_payment_id)
    where v_payment_id is not null;
  perform credits._lock_account(v_account);  -- what has fallen due is booked before what is known of the payment counts here
  v_linked := credits._link_payment(v_payment_id, 'invoice', v_payment.invoice_id, v_account, v_payment.captured,
                                    v_payment.currency);
  perform credits._check_bought(v_payment_id, 'invoice', v_payment.invoice_id)
    where not v_linked;
  perform credits._pause_if_disputed(v_payment.invoice_id, v_account) where v_linked;
  return credits._applied(credits._settle_source('invoice', v_payment.invoice_id, v_account));
end $$;

create or replace function credits._pay_invoice(
  notice  credits.stripe_notice,
  invoice credits.invoice_shape
)
returns jsonb
language plpgsql
as $$
declare
  v_invoice    credits.invoice_shape := _pay_invoice.invoice;
  v_account_id text := credits._account_of(_pay_invoice.notice);
  v_lines      jsonb := credits._lines_of_invoice((_pay_invoice.notice).object, v_invoice);
  v_effects    jsonb := jsonb '[]';
  v_linked     boolean;
begin
  perform credits._mirror_embedded('price', l.price_id, l.price, (_pay_invoice.notice).at, l.product_id)
     from (select s.* from credits._shape_lines(v_lines) s order by s.price_id) l;
  v_linked := credits._link_invoice_payments((_pay_invoice.notice).object, v_invoice, v_account_id);
  perform credits._check_bought(coalesce(p.payment_intent_id, p.charge_id), 'invoice', v_invoice.invoice_id)
     from credits._known_payments((_pay_invoice.notice).object, v_invoice.invoice_id) p;
  perform credits._lock_account(v_account_id);
  perform credits._pause_if_disputed(v_invoice.invoice_id, v_account_id) where v_linked;

  insert into credits.stripe_facts (kind, ref, account_id, created_at)
  values ('invoice', v_invoice.invoice_id, v_account_id, credits.now())
  on conflict (kind, ref) do nothing;
  if found then
    perform credits._insert_allowance(v_account_id, v_invoice, l)
       from credits._shape_lines(v_lines) l
      where l.line_id is not null and coalesce(l.subscription_id, v_invoice.subscription_id) is not null;
    perform credits._net_allowances(v_account_id, v_invoice.invoice_id);
    v_effects := credits._grant_allowances(v_account_id, v_invoice.invoice_id);
    perform credits._refresh_plan(v_account_id);
  end if;
  return v_effects || credits._settle_source('invoice', v_invoice.invoice_id, v_account_id);
end $$;

-- An event holds the first lines only; of a longer invoice all of them are asked for.
create or replace function credits._lines_of_invoice(
  object  jsonb,
  invoice credits.invoice_shape
)
returns jsonb
language plpgsql
stable
as $$
declare
  v_list jsonb;
begin
  if (_lines_of_invoice.invoice).lines_complete then
    return _lines_of_invoice.object;
  end if;
  v_list := credits._snapshot('invoice_lines', (_lines_of_invoice.invoice).invoice_id);
  if v_list is null or credits._has_more(v_list) then
    perform credits._park('lines_incomplete', 'invoice_lines:' || (_lines_of_invoice.invoice).invoice_id);
  end if;
  return v_list;
end $$;

-- Answers whether any of them was not known to have paid it.
drop function if exists credits._link_invoice_payments(jsonb, credits.invoice_shape, text);
create or replace function credits._link_invoice_payments(
  object     jsonb,
  invoice    credits.invoice_shape,
  account_id text
)
returns boolean
language plpgsql
as $$
begin
  return coalesce((
    select bool_or(credits._link_payment(coalesce(p.payment_intent_id, p.charge_id), 'invoice',
                                         (_link_invoice_payments.invoice).invoice_id, _link_invoice_payments.account_id,
                                         p.captured, p.currency))
      from (select k.*
              from credits._known_payments(_link_invoice_payments.object, (_link_invoice_payments.invoice).invoice_id) k
             order by coalesce(k.payment_intent_id, k.charge_id)) p), false);
end $$;

-- What is known to have paid an invoice: what it names itself, and what was told of it.
create or replace function credits._known_payments(
  object     jsonb,
  invoice_id text
)
returns setof credits.charge_shape
language sql
stable
as $$
  select p.*
    from (select i.* from credits._payments_of_invoice(_known_payments.object) i
          union all
          select s.* from credits.stripe_objects o, credits._shape_invoice_payment(o.snapshot) s
           where o.kind = 'invoice_payment' and o.ref = _known_payments.invoice_id) p
   where p.captured is not null
$$;
