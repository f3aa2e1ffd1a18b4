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
  stopped_at     timestamptz not null,
  resumed_at     timestamptz
);
comment on table credits.stripe_disconnections is
  'Connected accounts that took away our access. Nothing is asked about what lives there by itself until resumed_at is known.';
comment on column credits.stripe_disconnections.resumed_at is
  'When it was connected again, or its endpoint set again. What Stripe said before that does not count any more.';

alter table credits.stripe_homes enable row level security;
alter table credits.stripe_disconnections enable row level security;

comment on column credits.stripe_requests.stripe_account is 'The connected account in which it is made; null in the own one.';

-- What connected accounts have told so far, if there are any.
insert into credits.stripe_homes (kind, object_id, stripe_account)
select distinct on (h.kind, h.object_id) h.kind, h.object_id, h.stripe_account
  from (select e.* from credits.stripe_events e
         where e.stripe_account is not null and e.status = 'applied'
           and exists (select from credits.stripe_endpoints p where p.stripe_account is not null)) e
  cross join lateral (
    select o.kind, o.object_id, e.stripe_account from credits.stripe_objects o
     where o.object_id = e.object_id
       and o.kind in ('customer', 'product', 'price', 'subscription', 'subscription_schedule', 'invoice', 'charge', 'refund',
                      'dispute', 'payment_intent', 'payment_method')
    union all
    select 'customer', c.customer_id, e.stripe_account from credits.stripe_customers c where c.bound_by = e.event_id
    union all
    select i.kind, i.object_id, e.stripe_account
      from credits.purchases p,
           lateral (values ('checkout.session', p.stripe_session_id), ('payment_intent', p.stripe_payment_intent_id))
             i (kind, object_id)
     where p.stripe_session_id = e.object_id and i.object_id is not null) h
 order by h.kind, h.object_id, h.stripe_account;
