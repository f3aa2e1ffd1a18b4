-- What it means that an object of Stripe has not arrived here: computed from the object and what is known, whenever somebody looks.

-- What of an object has not arrived here, or differs. The sessions listed are complete; a subscription's session only binds.
create or replace function credits._gap_in(
  kind   text,
  object jsonb
)
returns text
language plpgsql
stable
as $$
declare
  v_session credits.session_shape;
  v_invoice credits.invoice_shape;
  v_refund  credits.refund_shape;
begin
  if _gap_in.kind = 'checkout.session' then
    v_session := credits._shape_session(_gap_in.object);
    return case when v_session.mode = 'subscription'
                then case when credits._bound_account(credits._shape_owner(_gap_in.object)) is null then 'binding_missing' end
                when v_session.mode is distinct from 'payment'
                     or v_session.payment_status in ('paid', 'no_payment_required') is not true then null
                when not credits._is_fact('checkout_session', v_session.session_id) then 'purchase_missing'
                when not exists (select from credits.purchases p
                                  where p.stripe_session_id = v_session.session_id and p.grant_id is not null
                                    and p.amount = v_session.amount_total and p.currency = v_session.currency)
                then 'purchase_differs' end;
  elsif _gap_in.kind = 'invoice' then
    v_invoice := credits._shape_invoice(_gap_in.object);
    return case when v_invoice.paid and v_invoice.subscription_id is not null
                     and not credits._is_fact('invoice', v_invoice.invoice_id) then 'grant_missing' end;
  end if;
  v_refund := credits._shape_refund(_gap_in.object);
  return case when not exists (select from credits.stripe_objects o, credits._shape_refund(o.snapshot) s
                                where o.kind = 'refund' and o.object_id = v_refund.refund_id
                                  and credits._stage_of_refund(s.status) >= credits._stage_of_refund(v_refund.status)
                                  and s.amount = v_refund.amount) then 'refund_missing' end;
end $$;

-- A refund goes on, never back: what is known of one may be later than the list in which it was found.
create or replace function credits._stage_of_refund(status text)
returns integer
language sql
immutable
as $$
  select case when _stage_of_refund.status in ('failed', 'canceled') then 3
              when _stage_of_refund.status = 'succeeded'            then 2
              else                                                       1 end
$$;

-- The account as handlers would find it, but binding nothing.
create or replace function credits._account_in(
  kind   text,
  object jsonb
)
returns text
language plpgsql
stable
as $$
declare
  v_owner  credits.owner_shape := credits._shape_owner(_account_in.object);
  v_refund credits.refund_shape;
begin
  if _account_in.kind = 'refund' then
    v_refund := credits._shape_refund(_account_in.object);
    return (select p.account_id
              from credits.stripe_payments p
             where p.payment_id in (v_refund.payment_intent_id, v_refund.charge_id) and p.source_kind is not null
             order by p.payment_id <> v_refund.payment_intent_id
             limit 1);
  end if;
  return coalesce(credits._bound_account(v_owner), (
    select a.account_id
      from unnest(array[v_owner.account_id, v_owner.client_reference_id,
                        (credits._shape_owner(credits._snapshot('customer', v_owner.customer_id))).account_id])
             with ordinality n (account_id, place)
      join credits.accounts a on a.account_id = n.account_id
     order by n.place
     limit 1));
end $$;

-- Nothing says that it is ours, and no account is found: several products may share one account at Stripe.
drop function if exists credits._is_foreign(text, jsonb);
create or replace function credits._is_foreign(
  kind       text,
  object     jsonb,
  account_id text
)
returns boolean
language sql
stable
as $$
  select _is_foreign.account_id is null
         and (_is_foreign.kind = 'refund' or (credits._shape_owner(_is_foreign.object)).account_id is null
                                             and (credits._shape_session(_is_foreign.object)).package is null)
$$;

-- What no endpoint would apply, a repair does not apply either: another handler may be at work. What one saw in shadow mode
-- as it had to be applied was another handler's, and is in the balances that were brought in; an operator may replay it.
create or replace function credits._turned_away(object jsonb)
returns text
language sql
stable
as $$
  select case when exists (select from credits.stripe_events v
                            where v.object_id = _turned_away.object ->> 'id' and v.reason = 'shadow'
                              and (v.payload is null or credits._gap_in(_turned_away.object ->> 'object',
                                                                        (credits._shape_notice(v)).object) is not null)) then 'shadow'
              when count(*) = 0                                then null
              when count(*) filter (where e.mode = 'live') = 0 then 'shadow'
              when bool_and(coalesce(e.livemode <> credits._flag(_turned_away.object -> 'livemode'), false))
                     filter (where e.mode = 'live')            then 'livemode_mismatch' end
    from credits.stripe_endpoints e
   where e.stripe_account is not distinct from credits._home_of(_turned_away.object ->> 'object', _turned_away.object ->> 'id')
$$;

-- How the gaps of a run stand now, in order. That takes a millisecond each: the offsets see to it that it is computed once, and of
-- no more than are asked for.
create or replace function credits._gaps(run_id bigint)
returns setof credits.stripe_gap_result
language sql
stable
as $$
  select g.run_id, g.kind, g.object_id, g.gap, s.state,
         case when s.state = 'failed' then coalesce(r.error_code, r.error_type)
              when s.state = 'open' then coalesce(credits._turned_away(g.object),
                                                  case when x.account_id is null then 'account_unknown' end) end,
         x.account_id, coalesce(credits._whole(g.object -> 'amount_total'), credits._whole(g.object -> 'amount_paid'),
                                credits._whole(g.object -> 'amount')),
         lower(g.object ->> 'currency'), g.request_id, credits._moment(g.object -> 'created'), g.found_at
    from (select n.* from credits.stripe_gaps n where n.run_id = _gaps.run_id order by n.object_id offset 0) g
    left join lateral (select q.state, q.error_code, q.error_type
                         from credits.stripe_requests q where q.request_id = g.request_id offset 0) r on true,
         lateral (select credits._account_in(g.kind, g.object), credits._gap_in(g.kind, g.object) is null
                  offset 0) x (account_id, closed),
         lateral (select case when credits._is_foreign(g.kind, g.object, x.account_id) then 'foreign'
                              when x.closed and g.request_id is not null               then 'repaired'
                              when x.closed                                            then 'arrived'
                              when r.state in ('queued', 'sent')                       then 'repairing'
                              when g.request_id is not null                            then 'failed'
                              else                                                          'open' end
                  offset 0) s (state)
$$;

create or replace function credits._reconciliation(run credits.stripe_reconciliations)
returns credits.reconciliation_result
language sql
stable
as $$
  select row(r.run_id, r.state, r.since, r.repair, r.checked, g.found, g.mended, g.mending, g.remaining, g.others, r.error,
             r.started_at, r.finished_at)::credits.reconciliation_result
    from (select (_reconciliation.run).*) r,
         lateral (select count(*) as found, count(*) filter (where g.state in ('repaired', 'arrived')) as mended,
                         count(*) filter (where g.state = 'repairing') as mending,
                         count(*) filter (where g.state in ('open', 'failed')) as remaining,
                         count(*) filter (where g.state = 'foreign') as others
                    from credits._gaps(r.run_id) g) g
$$;
