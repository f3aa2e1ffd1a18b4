-- Stripe's objects, mirrored, and whose they are. Stripe delivers in no order, so which snapshot is the latest is decided
-- here, for every kind of object, under the lock of its row. Ties are settled by asking Stripe: one retrieve per object.

-- Keeps the notice if it is the latest that is known of its object; says whether it is. ref is what the object hangs on.
create or replace function credits._mirror(
  notice credits.stripe_notice,
  ref    text default null
)
returns boolean
language plpgsql
as $$
declare
  v_notice  credits.stripe_notice := _mirror.notice;
  v_stored  credits.stripe_objects;
  v_deleted boolean := credits._is_deleted(v_notice);
  v_verdict text;
begin
  insert into credits.stripe_objects (kind, object_id, ref, snapshot, as_of, seen_by, previous, deleted, updated_at)
  values (v_notice.kind, v_notice.object_id, _mirror.ref, v_notice.object, v_notice.at, v_notice.type, v_notice.previous,
          v_deleted, credits.now())
  on conflict on constraint stripe_objects_pkey do nothing;
  if found then
    return true;
  end if;

  select o.* into v_stored
    from credits.stripe_objects o
   where o.kind = v_notice.kind and o.object_id = v_notice.object_id
     for no key update;
  v_verdict := credits._order(v_stored, v_notice, v_deleted);
  if v_verdict like 'apply%' then
    update credits.stripe_objects o
       set ref        = coalesce(_mirror.ref, o.ref),
           snapshot   = v_notice.object,
           as_of      = v_notice.at,
           seen_by    = v_notice.type,
           previous   = v_notice.previous,
           deleted    = v_deleted,
           updated_at = credits.now()
     where o.kind = v_notice.kind and o.object_id = v_notice.object_id;
  end if;
  if v_verdict like '%retrieve' then
    perform credits._request_object(v_notice.kind, v_notice.object_id,
                                    to_timestamp(greatest(v_notice.at, v_stored.as_of) + 2));
  end if;
  return v_verdict like 'apply%';
end $$;

-- The second of an event does not order it: several share one. Then what an update says it changed tells which came first,
-- mostly; so every tie is settled by a retrieve. An answer speaks for the second in which it was asked for.
create or replace function credits._order(
  stored  credits.stripe_objects,
  notice  credits.stripe_notice,
  deleted boolean
)
returns text
language plpgsql
immutable
as $$
declare
  v_old     credits.stripe_objects := _order.stored;
  v_new     credits.stripe_notice := _order.notice;
  v_old_end boolean;
  v_new_end boolean;
begin
  if v_old.snapshot is null or v_old.seen_by = 'embedded' then
    return 'apply';
  end if;
  v_old_end := v_old.deleted or credits._is_final(v_old.kind, v_old.snapshot);
  v_new_end := _order.deleted or credits._is_final(v_new.kind, v_new.object);
  return case
    when v_old_end and not v_new_end                      then 'drop'
    when v_new_end and not v_old_end                      then 'apply'
    when v_new.at > v_old.as_of                           then 'apply'
    when v_new.object = v_old.snapshot and v_new.at = v_old.as_of
                                                          then 'apply'
    when v_new.retrieved and v_new.object <> v_old.snapshot
                                                          then 'drop+retrieve'
    when v_new.at < v_old.as_of                           then 'drop'
    when v_old.seen_by like '%.created'                   then 'apply+retrieve'
    when v_new.type like '%.created'                      then 'drop+retrieve'
    when coalesce(v_old.snapshot @> nullif(v_new.previous, '{}'), false)
         and not coalesce(v_new.object @> nullif(v_old.previous, '{}'), false)
                                                          then 'apply+retrieve'
    else                                                       'drop+retrieve'
  end;
end $$;

-- A row for an object that is only known to exist. Two that each know a half of something meet at its lock.
create or replace function credits._touch(
  kind      text,
  object_id text,
  ref       text default null
)
returns credits.stripe_objects
language plpgsql
as $$
declare
  v_object credits.stripe_objects;
begin
  insert into credits.stripe_objects as o (kind, object_id, ref, updated_at)
  values (_touch.kind, _touch.object_id, _touch.ref, credits.now())
  on conflict on constraint stripe_objects_pkey do update set ref = coalesce(o.ref, excluded.ref)
  returning o.* into v_object;
  return v_object;
end $$;

-- An object inside another one is better than none, and gives way to any notice about itself. Looked up before it is
-- written: a price is in the events of all its subscribers, and none of them shall wait for its row.
create or replace function credits._mirror_embedded(
  kind      text,
  object_id text,
  object    jsonb,
  at        bigint,
  ref       text default null
)
returns void
language plpgsql
as $$
begin
  if _mirror_embedded.object_id is null or _mirror_embedded.object is null
     or exists (select from credits.stripe_objects o
                 where o.kind = _mirror_embedded.kind and o.object_id = _mirror_embedded.object_id
                   and o.snapshot is not null
                   and (o.seen_by <> 'embedded' or o.as_of >= _mirror_embedded.at or o.snapshot = _mirror_embedded.object)) then
    return;
  end if;
  insert into credits.stripe_objects as o (kind, object_id, ref, snapshot, as_of, seen_by, updated_at)
  values (_mirror_embedded.kind, _mirror_embedded.object_id, _mirror_embedded.ref, _mirror_embedded.object,
          _mirror_embedded.at, 'embedded', credits.now())
  on conflict on constraint stripe_objects_pkey do update
    set ref = coalesce(excluded.ref, o.ref), snapshot = excluded.snapshot, as_of = excluded.as_of,
        seen_by = excluded.seen_by, updated_at = excluded.updated_at
    where o.snapshot is null or (o.seen_by = 'embedded' and o.as_of < excluded.as_of);
end $$;

create or replace function credits._snapshot(
  kind      text,
  object_id text
)
returns jsonb
language sql
stable
as $$
  select o.snapshot from credits.stripe_objects o where o.kind = _snapshot.kind and o.object_id = _snapshot.object_id
$$;

-- Whose it is --------------------------------------------------------------------------------------------------------

-- Who an object belongs to: what is bound already, then what we wrote into it, then what we wrote into its customer. A
-- name may make the first binding and never change one; e-mail addresses are never guessed from.
create or replace function credits._account_of(notice credits.stripe_notice)
returns text
language plpgsql
as $$
declare
  v_owner credits.owner_shape := credits._shape_owner((_account_of.notice).object);
  v_named text := coalesce(v_owner.account_id, v_owner.client_reference_id);
  v_bound text := credits._bound_account(v_owner);
begin
  if v_bound is null and v_named is not null
     and not exists (select from credits.accounts a where a.account_id = v_named) then
    perform credits._park('account_unknown', 'account:' || v_named);
  elsif v_owner.account_id is null and not exists (select from credits.accounts a where a.account_id = v_named) then
    v_named := null;  -- client_reference_id may be the shop's own number of something else
  end if;
  if v_named is null and v_bound is null then
    select a.account_id into v_named
      from credits.accounts a
     where a.account_id = (credits._shape_owner(credits._snapshot('customer', v_owner.customer_id))).account_id;
  end if;
  if v_named <> v_bound then
    perform credits._park('customer_of_another_account');
  elsif coalesce(v_bound, v_named) is null then
    perform credits._park('account_unknown', 'customer:' || v_owner.customer_id);
  end if;
  return credits._bind(v_owner, coalesce(v_bound, v_named), (_account_of.notice).event_id);
end $$;

create or replace function credits._bound_account(owner credits.owner_shape)
returns text
language plpgsql
stable
as $$
begin
  return (
    select coalesce(
      (select c.account_id from credits.stripe_customers c where c.customer_id = (_bound_account.owner).customer_id),
      (select f.account_id from credits.stripe_facts f
        where f.kind = 'subscription' and f.ref = (_bound_account.owner).subscription_id)));
end $$;

-- The first binding stands: of two that come at the same time the second sees the first.
create or replace function credits._bind(
  owner      credits.owner_shape,
  account_id text,
  bound_by   text
)
returns text
language plpgsql
as $$
begin
  insert into credits.stripe_customers (customer_id, account_id, bound_by, default_payment_method, created_at)
  select (_bind.owner).customer_id, _bind.account_id, coalesce(_bind.bound_by, 'retrieve'),
         credits._default_card(credits._snapshot('customer', (_bind.owner).customer_id)), credits.now()
   where (_bind.owner).customer_id is not null
  on conflict on constraint stripe_customers_pkey do nothing;
  insert into credits.stripe_facts (kind, ref, account_id, created_at)
  select 'subscription', (_bind.owner).subscription_id, _bind.account_id, credits.now()
   where (_bind.owner).subscription_id is not null
  on conflict on constraint stripe_facts_pkey do nothing;
  if credits._bound_account(_bind.owner) <> _bind.account_id then
    perform credits._park('customer_of_another_account');
  end if;
  return _bind.account_id;
end $$;

create or replace function credits._customer_of(account_id text)
returns text
language sql
stable
as $$
  select c.customer_id
    from credits.stripe_customers c
    left join lateral credits._own_subscription(c.account_id) s on true
   where c.account_id = _customer_of.account_id and not c.deleted
   order by c.customer_id = s.customer_id desc nulls last, c.created_at, c.customer_id
   limit 1
$$;

create or replace function credits._is_fact(
  kind text,
  ref  text
)
returns boolean
language sql
stable
as $$
  select exists (select from credits.stripe_facts f where f.kind = _is_fact.kind and f.ref = _is_fact.ref)
$$;

-- What Stripe's objects say, for whoever looks ------------------------------------------------------------------------

create or replace view credits.stripe_prices as
select o.object_id as price_id, s.product_id, s.unit_amount, s.interval_unit, s.interval_count, s.metered, s.credits,
       o.deleted, o.updated_at
  from credits.stripe_objects o, credits._shape_price(o.snapshot) s
 where o.kind in ('price', 'plan') and o.snapshot is not null;
comment on view credits.stripe_prices is
  'Prices of Stripe as last seen. credits is the text in their metadata; unit_amount is in the minor unit of the currency.';

create or replace view credits.stripe_invoices as
select s.invoice_id, s.status, s.paid, s.customer_id, s.subscription_id, s.amount_paid, s.total, s.currency,
       to_timestamp(s.created_at) as created_at, o.updated_at
  from credits.stripe_objects o, credits._shape_invoice(o.snapshot) s
 where o.kind = 'invoice' and o.snapshot is not null;
comment on view credits.stripe_invoices is 'Invoices of Stripe as last seen, amounts in the minor unit of currency.';

create or replace view credits.stripe_refunds as
select s.refund_id, s.charge_id, s.payment_intent_id, s.amount, s.currency, s.status, o.updated_at
  from credits.stripe_objects o, credits._shape_refund(o.snapshot) s
 where o.kind = 'refund' and o.snapshot is not null;
comment on view credits.stripe_refunds is 'Refunds of Stripe as last seen, amounts in the minor unit of currency.';

create or replace view credits.stripe_disputes as
select s.dispute_id, s.charge_id, s.payment_intent_id, s.amount, s.currency, s.status, o.updated_at
  from credits.stripe_objects o, credits._shape_dispute(o.snapshot) s
 where o.kind = 'dispute' and o.snapshot is not null;
comment on view credits.stripe_disputes is 'Disputes of Stripe as last seen, amounts in the minor unit of currency.';
