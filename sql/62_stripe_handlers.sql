-- What each family of Stripe's events does, and the rows that name its function. object.* are answers that tell of an object;
-- answer.<purpose> takes the answers to our requests of a purpose, failed.<purpose> hears of those that came to nothing,
-- again.<purpose> of those that are asked anew.
-- A handler takes a notice and answers applied or ignored with a reason and its effects, or parks. It acts on the object,
-- not on the name of the event: several types tell of one fact, and each may come late.

with listed (event_type, handler) as (values
  ('checkout.session.completed',                  '_on_checkout_session'),
  ('checkout.session.async_payment_succeeded',    '_on_checkout_session'),
  ('checkout.session.async_payment_failed',       '_on_checkout_session'),
  ('checkout.session.expired',                    '_on_checkout_session'),
  ('object.checkout.session',                     '_on_checkout_session'),
  ('object.billing_portal.session',               '_on_portal_session'),
  ('invoice.created',                             '_on_invoice'),
  ('invoice.updated',                             '_on_invoice'),
  ('invoice.finalized',                           '_on_invoice'),
  ('invoice.finalization_failed',                 '_on_invoice'),
  ('invoice.sent',                                '_on_invoice'),
  ('invoice.paid',                                '_on_invoice'),
  ('invoice.payment_succeeded',                   '_on_invoice'),
  ('invoice.payment_failed',                      '_on_invoice'),
  ('invoice.payment_action_required',             '_on_invoice'),
  ('invoice.payment_attempt_required',            '_on_invoice'),
  ('invoice.overdue',                             '_on_invoice'),
  ('invoice.overpaid',                            '_on_invoice'),
  ('invoice.will_be_due',                         '_on_invoice'),
  ('invoice.voided',                              '_on_invoice'),
  ('invoice.marked_uncollectible',                '_on_invoice'),
  ('invoice.deleted',                             '_on_invoice'),
  ('object.invoice',                              '_on_invoice'),
  ('invoice_payment.paid',                        '_on_invoice_payment'),
  ('customer.subscription.created',               '_on_subscription'),
  ('customer.subscription.updated',               '_on_subscription'),
  ('customer.subscription.deleted',               '_on_subscription'),
  ('customer.subscription.paused',                '_on_subscription'),
  ('customer.subscription.resumed',               '_on_subscription'),
  ('customer.subscription.trial_will_end',        '_on_subscription'),
  ('customer.subscription.pending_update_applied', '_on_subscription'),
  ('customer.subscription.pending_update_expired', '_on_subscription'),
  ('object.subscription',                         '_on_subscription'),
  ('subscription_schedule.created',               '_on_schedule'),
  ('subscription_schedule.updated',               '_on_schedule'),
  ('subscription_schedule.released',              '_on_schedule'),
  ('subscription_schedule.completed',             '_on_schedule'),
  ('subscription_schedule.canceled',              '_on_schedule'),
  ('subscription_schedule.aborted',               '_on_schedule'),
  ('subscription_schedule.expiring',              '_on_schedule'),
  ('object.subscription_schedule',                '_on_schedule'),
  ('payment_intent.created',                      '_on_payment_intent'),
  ('payment_intent.succeeded',                    '_on_payment_intent'),
  ('payment_intent.payment_failed',               '_on_payment_intent'),
  ('payment_intent.requires_action',              '_on_payment_intent'),
  ('payment_intent.processing',                   '_on_payment_intent'),
  ('payment_intent.canceled',                     '_on_payment_intent'),
  ('payment_intent.amount_capturable_updated',    '_on_payment_intent'),
  ('payment_intent.partially_funded',             '_on_payment_intent'),
  ('object.payment_intent',                       '_on_payment_intent'),
  ('charge.succeeded',                            '_on_charge'),
  ('charge.updated',                              '_on_charge'),
  ('charge.captured',                             '_on_charge'),
  ('charge.refunded',                             '_on_charge'),
  ('object.charge',                               '_on_charge'),
  ('refund.created',                              '_on_refund'),
  ('refund.updated',                              '_on_refund'),
  ('refund.failed',                               '_on_refund'),
  ('charge.refund.updated',                       '_on_refund'),
  ('object.refund',                               '_on_refund'),
  ('charge.dispute.created',                      '_on_dispute'),
  ('charge.dispute.updated',                      '_on_dispute'),
  ('charge.dispute.closed',                       '_on_dispute'),
  ('charge.dispute.funds_withdrawn',              '_on_dispute'),
  ('charge.dispute.funds_reinstated',             '_on_dispute'),
  ('object.dispute',                              '_on_dispute'),
  ('product.created',                             '_on_product'),
  ('product.updated',                             '_on_product'),
  ('product.deleted',                             '_on_product'),
  ('object.product',                              '_on_product'),
  ('price.created',                               '_on_price'),
  ('price.updated',                               '_on_price'),
  ('price.deleted',                               '_on_price'),
  ('object.price',                                '_on_price'),
  ('customer.created',                            '_on_customer'),
  ('customer.updated',                            '_on_customer'),
  ('customer.deleted',                            '_on_customer'),
  ('object.customer',                             '_on_customer'),
  ('payment_method.attached',                     '_on_payment_method'),
  ('payment_method.updated',                      '_on_payment_method'),
  ('payment_method.automatically_updated',        '_on_payment_method'),
  ('payment_method.detached',                     '_on_payment_method'),
  ('object.payment_method',                       '_on_payment_method'),
  ('object.invoice_lines',                        '_on_list'),
  ('object.line_items',                           '_on_list'),
  ('object.invoice_payments',                     '_on_list'),
  ('v2.core.event',                               '_on_thin_event'),
  ('account.application.authorized',              '_on_authorized'),
  ('account.application.deauthorized',            '_on_deauthorized'),
  ('failed.checkout',                             '_on_failed_checkout'),
  ('failed.top_up',                               '_on_failed_top_up'),
  ('failed.change_plan',                          '_on_failed_plan'),
  ('failed.schedule_plan',                        '_on_failed_plan'),
  ('failed.schedule_phases',                      '_on_failed_plan'),
  ('failed.release_plan',                         '_on_failed_plan'),
  ('failed.cancel_plan',                          '_on_failed_plan'),
  ('failed.resume_plan',                          '_on_failed_plan'),
  ('again.checkout',                              '_on_checkout_again'),
  ('again.portal',                                '_on_checkout_again'),
  ('again.refund',                                '_on_refund_again'),
  ('answer.lookup',                               '_on_lookup'),
  ('failed.lookup',                               '_on_failed_lookup'),
  ('answer.reconcile',                            '_on_page'),
  ('failed.reconcile',                            '_on_failed_page'),
  ('answer.publish',                              '_on_published'),
  ('failed.publish',                              '_on_failed_publish'),
  ('answer.sync',                                 '_on_catalog_page')
), summed (event_type, handler, summary) as (
  select l.event_type, l.handler, s.summary
    from listed l
    join (values
      ('_on_checkout_session', 'Grants a package that is paid, binds the customer, closes a purchase that failed or expired.'),
      ('_on_portal_session',   'Keeps where the customer goes.'),
      ('_on_invoice',          'Mirrors the invoice; grants by its lines once it is paid.'),
      ('_on_invoice_payment',  'Remembers which payment paid which invoice.'),
      ('_on_subscription',     'Mirrors the subscription and moves its state. Grants nothing by itself.'),
      ('_on_schedule',         'Mirrors it; the plan that comes next is shown as pending.'),
      ('_on_payment_intent',   'Mirrors it; one of ours completes or closes its top-up.'),
      ('_on_charge',           'Mirrors it; takes back what it refunds.'),
      ('_on_refund',           'Mirrors it; takes back, or gives back if it failed.'),
      ('_on_dispute',          'Mirrors it; freezes what is unspent, takes back if lost, gives back if won.'),
      ('_on_product',          'Mirrors it.'),
      ('_on_price',            'Mirrors it.'),
      ('_on_customer',         'Mirrors it; binds it to the account that its metadata names.'),
      ('_on_payment_method',   'Mirrors it; keeps the default card of its customer.'),
      ('_on_list',             'Keeps the rest of a list that did not fit into an event.'),
      ('_on_thin_event',       'Retrieves the object that it names.'),
      ('_on_authorized',       'Asks about what lives in that connected account again.'),
      ('_on_deauthorized',     'Asks about what lives in that connected account no more, and tells.'),
      ('_on_failed_checkout',  'Closes the purchase that was to be paid there.'),
      ('_on_failed_top_up',    'Closes the attempt; lets the card rest, or pauses the rule.'),
      ('_on_failed_plan',      'Asks how the subscription stands.'),
      ('_on_checkout_again',   'Opens that purchase again.'),
      ('_on_refund_again',     'Holds its amount back again.'),
      ('_on_lookup',           'Finds what an unknown request has made, or that it never did.'),
      ('_on_failed_lookup',    'Leaves the unknown request to a person.'),
      ('_on_page',             'Compares what is listed with what is known.'),
      ('_on_failed_page',      'Ends the run.'),
      ('_on_published',        'Mirrors it, keeps its id in the catalogue, and goes on with what it sells.'),
      ('_on_failed_publish',   'Looks for a product that is there already.'),
      ('_on_catalog_page',     'Mirrors each product or price, and asks for the next page.')) s (handler, summary)
      on s.handler = l.handler
), kept as (
  insert into credits.stripe_handlers as h (event_type, handler, summary)
  select s.event_type, s.handler, s.summary from summed s
  on conflict (event_type) do update set handler = excluded.handler, summary = excluded.summary
)
delete from credits.stripe_handlers h where h.event_type not in (select s.event_type from summed s);

-- Mirrors -----------------------------------------------------------------------------------------------------------

create or replace function credits._on_product(notice credits.stripe_notice)
returns credits.handler_result
language sql
as $$
  select credits._mirrored(credits._mirror(_on_product.notice))
$$;

create or replace function credits._on_price(notice credits.stripe_notice)
returns credits.handler_result
language sql
as $$
  select credits._mirrored(credits._mirror(_on_price.notice,
                                           (credits._shape_price((_on_price.notice).object)).product_id))
$$;

create or replace function credits._on_customer(notice credits.stripe_notice)
returns credits.handler_result
language plpgsql
as $$
declare
  v_owner   credits.owner_shape := credits._shape_owner((_on_customer.notice).object);
  v_current boolean := credits._mirror(_on_customer.notice);
begin
  if exists (select from credits.accounts a where a.account_id = v_owner.account_id)
     and credits._bound_account(v_owner) is null then
    perform credits._bind(v_owner, v_owner.account_id, (_on_customer.notice).event_id);
  end if;
  perform credits._refresh_customer(v_owner.customer_id);
  return credits._mirrored(v_current);
end $$;

create or replace function credits._on_payment_method(notice credits.stripe_notice)
returns credits.handler_result
language plpgsql
as $$
declare
  v_customer text := coalesce(credits._card_customer(_on_payment_method.notice),
                              credits._customer_of_card((_on_payment_method.notice).object_id));
  v_current  boolean := credits._mirror(_on_payment_method.notice, v_customer);
begin
  perform credits._refresh_customer(v_customer);
  return credits._mirrored(v_current);
end $$;

-- An answer about a card that is detached names nobody: whose it was is what is known of it.
create or replace function credits._customer_of_card(payment_method text)
returns text
language sql
stable
as $$
  select coalesce(
    (select o.ref from credits.stripe_objects o
      where o.kind = 'payment_method' and o.object_id = _customer_of_card.payment_method),
    (select min(c.customer_id) from credits.stripe_customers c
      where c.default_payment_method = _customer_of_card.payment_method))
$$;

-- What we keep of a customer follows from the snapshots of it and of its card, whichever came last.
create or replace function credits._refresh_customer(customer_id text)
returns void
language plpgsql
as $$
begin
  update credits.stripe_customers c
     set deleted = o.deleted,
         default_payment_method = case when m.snapshot is null or (credits._shape_owner(m.snapshot)).customer_id is not null then d.card end
    from credits.stripe_objects o,
         lateral (select credits._default_card(o.snapshot) as card) d
         left join credits.stripe_objects m on m.kind = 'payment_method' and m.object_id = d.card
   where o.kind = 'customer' and o.object_id = _refresh_customer.customer_id and o.snapshot is not null
     and c.customer_id = o.object_id;
  perform credits._card_changed(_refresh_customer.customer_id);
end $$;

-- Answers come page by page; the last one wakes whoever waits for the whole.
create or replace function credits._on_list(notice credits.stripe_notice)
returns credits.handler_result
language plpgsql
as $$
declare
  v_list    credits.stripe_notice := _on_list.notice;
  v_known   credits.stripe_objects;
  v_request bigint;
begin
  v_known := credits._touch(v_list.kind, v_list.object_id);
  update credits.stripe_objects o
     set snapshot = credits._join_pages(v_known.snapshot, v_list.object), as_of = v_list.at, seen_by = v_list.type,
         updated_at = credits.now()
   where o.kind = v_list.kind and o.object_id = v_list.object_id;
  if credits._has_more(v_list.object) then
    v_request := credits._request_object(v_list.kind, v_list.object_id);
    update credits.stripe_requests r
       set params = r.params || jsonb_build_object('starting_after', credits._last_id(v_list.object))
     where r.request_id = v_request;
  elsif v_list.kind = 'invoice_payments' then
    perform credits._on_invoice_payment(credits._shape_part(v_list, 'invoice_payment', e))
       from credits._elements(credits._snapshot(v_list.kind, v_list.object_id)) e;
  end if;
  return credits._applied();
end $$;

-- Some names tell what the object does not show: then the answer speaks under that name. Those of Connect tell of the account.
create or replace function credits._on_thin_event(notice credits.stripe_notice)
returns credits.handler_result
language plpgsql
as $$
declare
  v_told text;
begin
  select substr(e.type, 4) into v_told
    from credits.stripe_events e
   where e.event_id = (_on_thin_event.notice).event_id
     and e.type in ('v1.checkout.session.async_payment_failed', 'v1.invoice.payment_failed', 'v1.invoice.payment_action_required',
                    'v1.invoice.finalization_failed', 'v1.invoice.overdue', 'v1.account.application.authorized',
                    'v1.account.application.deauthorized');
  if v_told = 'account.application.authorized' then
    return credits._on_authorized(_on_thin_event.notice);
  elsif v_told = 'account.application.deauthorized' then
    return credits._on_deauthorized(_on_thin_event.notice);
  elsif credits._request_object((_on_thin_event.notice).kind, (_on_thin_event.notice).object_id, told => v_told) is null then
    return credits._ignored('type_not_handled');
  end if;
  return credits._applied(null, 'retrieve_queued');
end $$;

create or replace function credits._mirrored(current boolean)
returns credits.handler_result
language sql
immutable
as $$
  select credits._applied(null, case when not _mirrored.current then 'superseded' end)
$$;
