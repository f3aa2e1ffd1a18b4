-- Checkout sessions: packages that are bought, and customers that are bound.
-- Keeps invariant 7: one completed purchase, one grant. Lock order: the payment's row, then the account.

create or replace function credits._on_checkout_session(notice credits.stripe_notice)
returns credits.handler_result
language plpgsql
as $$
declare
  v_session    credits.session_shape := credits._shape_session((_on_checkout_session.notice).object);
  v_account_id text;
begin
  if v_session.session_id is null then
    perform credits._park('session_unknown');
  elsif v_session.mode in ('payment', 'subscription', 'setup') is not true then
    return credits._ignored('mode_not_handled');
  elsif v_session.status = 'open' then  -- nobody has paid: the answer to create_checkout()
    perform credits._note_checkout(v_session);
    return credits._applied();
  elsif v_session.mode = 'payment' and credits._is_fact('checkout_session', v_session.session_id) then
    return credits._applied(null, 'granted_before');
  end if;

  v_account_id := credits._account_of(_on_checkout_session.notice);
  if v_session.mode <> 'payment' then  -- the invoice of a subscription grants, the session binds
    perform credits._note_checkout(v_session, v_account_id);
    return credits._applied();
  end if;
  return credits._applied(credits._purchase(v_session, v_account_id,
                                            (_on_checkout_session.notice).type = 'checkout.session.async_payment_failed'
                                            or credits._payment_failed((_on_checkout_session.notice).object)));
end $$;

create or replace function credits._purchase(
  session    credits.session_shape,
  account_id text,
  failed     boolean
)
returns jsonb
language plpgsql
as $$
declare
  v_session credits.session_shape := _purchase.session;
  v_package credits.packages := credits._package_of_session(v_session);
  v_ours    credits.purchases := credits._purchase_of_checkout(v_session, _purchase.account_id);
  v_known   credits.purchases;
begin
  v_session.quantity := credits._quantity_of_session(v_session);
  if v_session.quantity is null then
    perform credits._park('quantity_unknown');
  elsif v_session.amount_total is null
        or v_session.currency is distinct from coalesce(v_ours.currency, v_package.currency)
        or v_session.amount_before is distinct from coalesce(v_ours.amount_subtotal, v_package.price * v_session.quantity) then
    perform credits._park('amount_unknown', null, jsonb_build_object(
      'amount', v_session.amount_before, 'currency', v_session.currency,
      'expected', coalesce(v_ours.amount_subtotal, v_package.price * v_session.quantity),
      'expected_currency', coalesce(v_ours.currency, v_package.currency)));
  end if;

  if v_session.payment_status in ('paid', 'no_payment_required') then
    return credits._complete_purchase(v_session, _purchase.account_id, v_package);
  end if;
  v_known := credits._record_purchase(v_session, _purchase.account_id, v_package,
    case when v_session.status = 'expired' then 'expired' when _purchase.failed then 'failed' else 'processing' end);
  perform credits._tell_purchase(v_known, v_package, 'payment_failed') where _purchase.failed and v_known.status = 'failed';
  return null;
end $$;

-- Our own metadata names the package; else the one line of the session does, which an event never carries.
-- Tax and discounts change what is paid, never what is bought: the amount before them is that of the package.
create or replace function credits._package_of_session(session credits.session_shape)
returns credits.packages
language plpgsql
stable
as $$
declare
  v_session credits.session_shape := _package_of_session.session;
  v_items   jsonb := credits._snapshot('line_items', v_session.session_id);
  v_package credits.packages;
  v_price   text;
begin
  if v_session.package is not null then
    select p.* into v_package from credits.packages p where p.code = v_session.package;
  elsif v_items is null or credits._has_more(v_items) then
    perform credits._park('package_unknown', 'line_items:' || v_session.session_id);
  else
    select i.price_id into v_price
      from credits._shape_line_items(v_items) i
     where (select count(*) from credits._shape_line_items(v_items)) = 1;
    select p.* into v_package
      from credits.packages p
     where p.stripe_price_id = v_price
        or p.code = (select s.package from credits.sold_prices s where s.stripe_price_id = v_price)
     order by p.stripe_price_id is not distinct from v_price desc
     limit 1;
  end if;
  if v_package.code is null then
    perform credits._park('package_unknown', null, jsonb_build_object('package', v_session.package));
  end if;
  return credits._package_as_sold(v_package, v_session, v_price);
end $$;

create or replace function credits._quantity_of_session(session credits.session_shape)
returns integer
language sql
stable
as $$
  select case when (_quantity_of_session.session).package is not null then (_quantity_of_session.session).quantity
              else (select i.quantity::integer
                      from credits._shape_line_items(credits._snapshot('line_items',
                                                       (_quantity_of_session.session).session_id)) i
                     where i.quantity between 1 and 999999) end
$$;

-- A purchase goes on, never back: what failed or expired after all may still be paid, but waits no more. One that
-- create_checkout() wrote is met by its session here, whether the answer came or not.
create or replace function credits._record_purchase(
  session    credits.session_shape,
  account_id text,
  package    credits.packages,
  status     text
)
returns credits.purchases
language plpgsql
as $$
declare
  v_session  credits.session_shape := _record_purchase.session;
  v_purchase credits.purchases;
begin
  perform credits._lock_account(_record_purchase.account_id);
  perform credits._note_checkout(v_session, _record_purchase.account_id);
  insert into credits.purchases as p (account_id, package, quantity, credits, amount, currency, status, livemode,
    stripe_session_id, stripe_payment_intent_id, stripe_customer_id, created_at, amount_subtotal, amount_discount,
    amount_tax, coupons, promotion_codes)
  values (_record_purchase.account_id, (_record_purchase.package).code, v_session.quantity,
    (_record_purchase.package).credits * v_session.quantity, v_session.amount_total, v_session.currency,
    _record_purchase.status, coalesce(v_session.livemode, false), v_session.session_id, v_session.payment_intent_id,
    v_session.customer_id, credits.now(), v_session.amount_before, v_session.amount_discount, v_session.amount_tax,
    v_session.coupons, v_session.promotion_codes)
  on conflict on constraint purchases_one_per_session do update
    set stripe_payment_intent_id = coalesce(excluded.stripe_payment_intent_id, p.stripe_payment_intent_id),
        stripe_customer_id       = coalesce(excluded.stripe_customer_id, p.stripe_customer_id),
        amount                   = excluded.amount,
        amount_discount          = excluded.amount_discount,
        amount_tax               = excluded.amount_tax,
        coupons                  = excluded.coupons,
        promotion_codes          = excluded.promotion_codes,
        livemode                 = excluded.livemode,
        status = case when p.status in ('pending', 'processing') then excluded.status else p.status end
  returning p.* into v_purchase;
  return v_purchase;
end $$;

-- The fact is taken first: it is unique over all accounts, so no order or number of deliveries grants twice.
create or replace function credits._complete_purchase(
  session    credits.session_shape,
  account_id text,
  package    credits.packages
)
returns jsonb
language plpgsql
as $$
declare
  v_session  credits.session_shape := _complete_purchase.session;
  v_purchase credits.purchases;
  v_grant    credits.grant_result;
begin
  insert into credits.stripe_facts (kind, ref, account_id, created_at)
  values ('checkout_session', v_session.session_id, _complete_purchase.account_id, credits.now())
  on conflict (kind, ref) do nothing;
  if not found then
    return null;
  end if;

  perform credits._claim_payment(v_session.payment_intent_id, 'session', v_session.session_id,
                                 _complete_purchase.account_id, v_session.amount_total, v_session.currency);
  v_purchase := credits._record_purchase(v_session, _complete_purchase.account_id, _complete_purchase.package, 'pending');
  v_grant := credits._grant(
    account_id    => _complete_purchase.account_id,
    amount        => v_purchase.credits,
    kind          => 'purchase',
    description   => (_complete_purchase.package).name,
    source        => 'checkout:' || v_session.session_id,
    cost          => v_purchase.amount,
    cost_currency => v_purchase.currency,
    key           => 'purchase:' || v_session.session_id,
    fingerprint   => jsonb_build_object('purchase', v_session.session_id));
  update credits.purchases p
     set status = 'completed', grant_id = v_grant.grant_id, completed_at = credits.now()
   where p.account_id = v_purchase.account_id and p.purchase_id = v_purchase.purchase_id;
  perform credits._tell_purchase(v_purchase, _complete_purchase.package, 'purchase_receipt');
  return jsonb_build_array(credits._effect('grant', v_purchase.account_id, v_grant.amount,
                                           jsonb_build_object('key', 'purchase:' || v_session.session_id)))
         || credits._settle_source('session', v_session.session_id, v_purchase.account_id);
end $$;

create or replace function credits._tell_purchase(
  purchase credits.purchases,
  package  credits.packages,
  type     text
)
returns void
language sql
as $$
  select credits._notify(p.account_id, _tell_purchase.type, p.purchase_id::text, jsonb_build_object(
           'purchase_id', p.purchase_id, 'package', (_tell_purchase.package).name, 'quantity', p.quantity,
           'credits', trim_scale(p.credits), 'amount', p.amount, 'currency', p.currency))
    from (select (_tell_purchase.purchase).*) p
$$;
