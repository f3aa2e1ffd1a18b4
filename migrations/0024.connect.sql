-- In which connected account an object of Stripe lives, and which of these accounts Stripe lets us reach no more.
set local role credits_owner;

create table credits.stripe_homes (
  kind           text not null,
  object_id      text not null,
  stripe_account text not null,
  primary key (kind, object_id)
);
comment on table credits.stripe_homes is
  'The connected account in which an object of Stripe lives, as its events and answers told. What has no row is the own account''s.';
comment on column credits.stripe_homes.kind is 'As in stripe_objects.';

create table credits.stripe_disconnections (
  stripe_account text        primary key,
  stopped_at     timestamptz,
  resumed_at     timestamptz
);
comment on table credits.stripe_disconnections is
  'Connected accounts that took away our access. Nothing is asked about what lives there by itself until resumed_at is known.';
comment on column credits.stripe_disconnections.stopped_at is 'Null if Stripe told only that it was connected again.';
comment on column credits.stripe_disconnections.resumed_at is
  'When it was connected again, or its endpoint set again. What Stripe said before that does not count any more.';

alter table credits.stripe_homes enable row level security;
alter table credits.stripe_disconnections enable row level security;

comment on column credits.stripe_requests.stripe_account is 'The connected account in which it is made; null in the own one.';

-- What connected accounts have told so far, if there are any: the objects of their events, and what these name. A product or price
-- of which the own account told as well is its own, since their ids may be chosen.
insert into credits.stripe_homes (kind, object_id, stripe_account)
with event as materialized (
  select e.event_id, e.object_id, e.stripe_account
    from credits.stripe_events e
   where e.stripe_account is not null and e.status = 'applied'
     and exists (select from credits.stripe_endpoints p where p.stripe_account is not null)),
told as materialized (
  select o.kind, o.object_id, o.snapshot, e.stripe_account
    from (select distinct e.object_id, e.stripe_account from event e) e
    join credits.stripe_objects o on o.object_id = e.object_id
   where o.kind in ('customer', 'product', 'price', 'subscription', 'subscription_schedule', 'invoice', 'charge', 'refund',
                    'dispute', 'payment_intent', 'payment_method'))
select distinct on (h.kind, h.object_id) h.kind, h.object_id, h.stripe_account
  from (select t.kind, t.object_id, t.stripe_account from told t
        union all
        select n.kind, coalesce(v.value ->> 'id', v.value #>> '{}'), t.stripe_account
          from told t,
               (values ('customer',       '$.customer'),
                       ('subscription',   '$.subscription'),
                       ('subscription',   '$.parent.subscription_details.subscription'),
                       ('invoice',        '$.latest_invoice'),
                       ('payment_intent', '$.payment_intent'),
                       ('charge',         '$.charge'),
                       ('charge',         '$.latest_charge'),
                       ('payment_method', '$.invoice_settings.default_payment_method'),
                       ('payment_method', '$.default_payment_method'),
                       ('price',          '$.*.data[*].price'),
                       ('price',          '$.*.data[*].plan'),
                       ('price',          '$.*.data[*].pricing.price_details.price'),
                       ('product',        '$.product'),
                       ('product',        '$.*.data[*].price.product'),
                       ('product',        '$.*.data[*].plan.product'),
                       ('product',        '$.*.data[*].pricing.price_details.product')) n (kind, path),
               lateral jsonb_path_query(t.snapshot, n.path::jsonpath) v (value)
         where jsonb_typeof(v.value) in ('string', 'object')
        union all
        select 'customer', c.customer_id, e.stripe_account
          from event e join credits.stripe_customers c on c.bound_by = e.event_id
        union all
        select i.kind, i.object_id, e.stripe_account
          from event e
          join credits.purchases p on p.stripe_session_id = e.object_id,
               lateral (values ('checkout.session', p.stripe_session_id), ('payment_intent', p.stripe_payment_intent_id),
                               ('customer', p.stripe_customer_id)) i (kind, object_id)) h
 where h.object_id is not null
   and (h.kind not in ('product', 'price')
        or h.object_id not in (select o.object_id from credits.stripe_events o
                                where o.stripe_account is null and o.object_id is not null))
 order by h.kind, h.object_id, h.stripe_account;

-- What waits to be asked is asked there.
update credits.stripe_requests r
   set stripe_account = h.stripe_account
  from credits.stripe_homes h
 where r.state = 'queued' and (r.method = 'get' or r.first_sent_at is null)
   and h.object_id = case r.purpose when 'retrieve' then split_part(r.ref, ':', 2)
                                    else coalesce(r.params ->> 'customer', r.params ->> 'payment_intent', r.ref) end;

update credits.stripe_requests r
   set stripe_account = e.stripe_account
  from credits.stripe_events e
 where r.state = 'queued' and r.purpose = 'retrieve' and r.stripe_account is null
   and e.status = 'parked' and e.waits_for = r.ref and e.stripe_account is not null;
