-- What each family of Stripe events does, and the rows that name its function.
-- A handler returns applied or ignored with a reason, or parks. Keeps invariant 7: one purchase, one grant.

with listed (event_type, handler, summary) as (values
  ('checkout.session.completed',               '_on_checkout_session', 'A session was completed; it may be paid or wait.'),
  ('checkout.session.async_payment_succeeded', '_on_checkout_session', 'A payment that was waited for has come.')
), kept as (
  insert into credits.stripe_handlers as h (event_type, handler, summary)
  select l.event_type, l.handler, l.summary from listed l
  on conflict (event_type) do update set handler = excluded.handler, summary = excluded.summary
)
delete from credits.stripe_handlers h where h.event_type not in (select l.event_type from listed l);

-- Acts on the object, not on the name of the event: both types may come for one session, in any order.
create or replace function credits._on_checkout_session(event credits.stripe_events)
returns credits.handler_result
language plpgsql
as $$
declare
  v_session    credits.session_shape := credits._shape_session((_on_checkout_session.event).payload);
  v_account_id text;
  v_package    credits.packages;
begin
  if v_session.mode is distinct from 'payment' then
    return row('ignored', 'mode_not_handled')::credits.handler_result;
  elsif v_session.session_id is null then
    perform credits._park('session_unknown');
  end if;

  if exists (select from credits.stripe_facts f
              where f.kind = 'checkout_session' and f.ref = v_session.session_id) then
    return row('applied', 'granted_before')::credits.handler_result;
  end if;
  v_account_id := credits._account_of_session(v_session);
  v_package    := credits._package_of_session(v_session);
  if v_session.payment_status in ('paid', 'no_payment_required') then
    perform credits._complete_purchase(v_session, v_account_id, v_package);
  else
    perform credits._record_purchase(v_session, v_account_id, v_package, 'processing');
  end if;
  return row('applied', null)::credits.handler_result;
end $$;

-- What we wrote into the session names the account. A customer that is bound to one is never bound to another.
create or replace function credits._account_of_session(session credits.session_shape)
returns text
language plpgsql
stable
as $$
declare
  v_account_id text := coalesce((_account_of_session.session).account_id,
                                (_account_of_session.session).client_reference_id);
begin
  if v_account_id is null or not exists (select from credits.accounts a where a.account_id = v_account_id) then
    perform credits._park('account_unknown', jsonb_build_object('account_id', v_account_id));
  elsif exists (select from credits.purchases p
                 where p.stripe_customer_id = (_account_of_session.session).customer_id
                   and p.account_id <> v_account_id) then
    perform credits._park('customer_of_another_account',
      jsonb_build_object('account_id', v_account_id, 'customer', (_account_of_session.session).customer_id));
  end if;
  return v_account_id;
end $$;

-- Tax and discounts change what is paid, never what is bought: the amount before them is that of the package.
create or replace function credits._package_of_session(session credits.session_shape)
returns credits.packages
language plpgsql
stable
as $$
declare
  v_session credits.session_shape := _package_of_session.session;
  v_package credits.packages;
begin
  select p.* into v_package from credits.packages p where p.code = v_session.package;
  if not found then
    perform credits._park('package_unknown', jsonb_build_object('package', v_session.package));
  elsif v_session.quantity is null then
    perform credits._park('quantity_unknown');
  elsif v_session.amount_total is null or v_session.currency is distinct from v_package.currency
        or v_session.amount_before is distinct from v_package.price * v_session.quantity then
    perform credits._park('amount_unknown', jsonb_build_object(
      'amount', v_session.amount_before, 'currency', v_session.currency,
      'expected', v_package.price * v_session.quantity, 'expected_currency', v_package.currency));
  end if;
  return v_package;
end $$;

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
  insert into credits.purchases as p (account_id, package, quantity, credits, amount, currency, status, livemode,
    stripe_session_id, stripe_payment_intent_id, stripe_customer_id, created_at)
  values (_record_purchase.account_id, (_record_purchase.package).code, v_session.quantity, (_record_purchase.package).credits * v_session.quantity,
    v_session.amount_total, v_session.currency, _record_purchase.status, coalesce(v_session.livemode, false),
    v_session.session_id, v_session.payment_intent_id, v_session.customer_id, credits.now())
  on conflict on constraint purchases_one_per_session do update
    set stripe_payment_intent_id = coalesce(excluded.stripe_payment_intent_id, p.stripe_payment_intent_id),
        stripe_customer_id       = coalesce(excluded.stripe_customer_id, p.stripe_customer_id)
  returning p.* into v_purchase;
  return v_purchase;
end $$;

-- The fact is taken first: it is unique over all accounts, so no order or number of deliveries grants twice.
create or replace function credits._complete_purchase(
  session    credits.session_shape,
  account_id text,
  package    credits.packages
)
returns void
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
    return;
  end if;

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
end $$;
