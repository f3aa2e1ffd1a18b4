-- What must hold between Stripe's objects, as they are mirrored, and the ledger. Part of audit().

create or replace function credits._audit_stripe()
returns setof credits.audit_finding
language plpgsql
stable
as $$
begin
  return query
    select 'paid_invoices_have_granted', null::text, jsonb_build_object('invoice_id', i.invoice_id)
      from credits.stripe_invoices i
     where i.paid and i.subscription_id is not null
       and not exists (select from credits.stripe_facts f where f.kind = 'invoice' and f.ref = i.invoice_id);
  return query
    select 'paid_lines_have_their_grant', a.account_id,
           jsonb_build_object('allowance_id', a.allowance_id, 'entitled', s.target, 'granted', s.granted)
      from credits.allowances a
      left join lateral credits._line_shares(a.account_id, a.subscription_id, a.slice_end, a.kind) s
        on s.allowance_id = a.allowance_id
     where a.sign = 1 and a.kind <> 'purchase' and s.granted is distinct from s.target;
  return query
    select 'paid_lines_have_their_grant', a.account_id,
           jsonb_build_object('allowance_id', a.allowance_id, 'entitled', a.first_credits, 'granted', sum(g.amount))
      from credits.allowances a
      left join credits.plan_grants p on p.account_id = a.account_id and p.allowance_id = a.allowance_id
      left join credits.grants g on g.account_id = p.account_id and g.grant_id = p.grant_id
     where a.sign = 1 and a.kind = 'purchase'
     group by a.account_id, a.allowance_id, a.first_credits
    having a.first_credits <> coalesce(sum(g.amount), 0);
  return query
    select 'subscriptions_are_as_mirrored', s.account_id,
           jsonb_build_object('subscription_id', s.subscription_id, 'status', s.status)
      from credits.subscriptions s
      left join credits.stripe_objects o on o.kind = 'subscription' and o.object_id = s.subscription_id
     where s.source = 'stripe' and s.status is distinct from coalesce((credits._shape_subscription(o.snapshot)).status, 'unknown');
  return query
    select 'one_plan_of_our_own', s.account_id, jsonb_build_object('plans', count(*))
      from credits.subscriptions s
     where s.source = 'internal' and s.state in ('active', 'canceling')
     group by s.account_id
    having count(*) > 1;
  return query
    select 'payments_have_bought_once', min(p.account_id),
           jsonb_build_object('payment_id', p.stripe_payment_intent_id,
                              'purchases', array_agg(p.purchase_id order by p.purchase_id))
      from credits.purchases p
     where p.grant_id is not null and p.stripe_payment_intent_id is not null
     group by p.stripe_payment_intent_id
    having count(*) > 1;
  return query select f.* from credits._audit_clawbacks() f;
  return query select f.* from credits._audit_top_ups() f;
end $$;

create or replace function credits._audit_top_ups()
returns setof credits.audit_finding
language sql
stable
as $$
  select 'one_open_top_up', t.account_id, jsonb_build_object('open', count(*))
    from credits.top_ups t
   where t.finished_at is null
   group by t.account_id
  having count(*) > 1
  union all
  select 'top_ups_have_their_grant', t.account_id, jsonb_build_object('top_up_id', t.top_up_id, 'state', t.state)
    from credits.top_ups t
    left join credits.purchases p on p.account_id = t.account_id and p.purchase_id = t.purchase_id
   where (t.state = 'succeeded') is distinct from (p.grant_id is not null)
      or t.state = 'succeeded' and t.payment_intent_id is distinct from p.stripe_payment_intent_id
  union all
  select 'top_ups_are_armed', b.account_id, jsonb_build_object('topup_below', b.topup_below, 'expected', r.threshold)
    from credits.balances b
    left join credits.auto_topups r on r.account_id = b.account_id and r.enabled and r.paused_reason is null
                                   and credits._open_top_up(r.account_id) is null
   where b.topup_below is distinct from r.threshold
$$;

-- Every grant that a payment has bought stands where the payment says: nothing refunded is forgotten, and as much was taken as
-- there was to take.
create or replace function credits._audit_clawbacks()
returns setof credits.audit_finding
language sql
stable
as $$
  with sources as (
    select c.source_kind, c.source_id from credits.clawbacks c
    union
    select p.source_kind, p.source_id
      from credits.stripe_objects o
      left join credits.stripe_objects h on o.kind <> 'charge' and h.kind = 'charge' and h.object_id = o.ref
      join credits.stripe_payments p on p.payment_id = coalesce(h.ref, o.ref)
     where p.source_kind is not null
       and (o.kind in ('refund', 'dispute') or o.kind = 'charge' and (credits._shape_charge(o.snapshot)).refunded > 0)
  ), bought as (
    select s.source_kind, s.source_id, p.account_id, p.grant_id
      from sources s
      join credits.purchases p on s.source_kind <> 'invoice' and p.grant_id is not null
                              and coalesce(p.stripe_session_id, p.stripe_payment_intent_id) = s.source_id
    union all
    select s.source_kind, s.source_id, p.account_id, p.grant_id
      from sources s
      join credits.plan_grants p on s.source_kind = 'invoice' and p.invoice_id = s.source_id
  )
  select 'clawbacks_reach_their_target', b.account_id,
         jsonb_build_object('grant_id', b.grant_id, 'source', b.source_id, 'firm', c.firm, 'target', c.target, 'taken', c.taken,
                            'owed', c.owed, 'expected_firm', t.firm)
    from bought b
    join credits.grants g on g.account_id = b.account_id and g.grant_id = b.grant_id and g.status <> 'pending'
    left join credits.clawbacks c on c.account_id = b.account_id and c.grant_id = b.grant_id,
         lateral (select trim_scale(round(credits._bought(g) * credits._firm_share(p), 6)) as firm
                    from credits._payment_totals(b.source_kind, b.source_id) p) t
   where coalesce(c.firm, 0) <> t.firm
      or c.taken > c.target
      or c.owed > greatest(0, c.firm - c.taken)
      or c.taken > g.revoked
      or c.owed > g.owed
      or c.taken + c.owed < c.firm and g.amount > g.expired + g.revoked + g.owed
$$;

create or replace function credits._audit_purchases()
returns setof credits.audit_finding
language plpgsql
stable
as $$
begin
  return query
    select 'completed_purchases_have_their_grant', p.account_id,
           jsonb_build_object('purchase_id', p.purchase_id, 'status', p.status, 'credits', p.credits, 'granted', g.amount)
      from credits.purchases p
      left join credits.grants g on g.account_id = p.account_id and g.grant_id = p.grant_id
     where p.completed_at is not null and (g.amount is distinct from p.credits
           or not exists (select from credits.stripe_facts f
                           where f.kind = case when p.stripe_session_id is null then 'top_up' else 'checkout_session' end
                             and f.ref = coalesce(p.stripe_session_id, p.stripe_payment_intent_id)
                             and f.account_id = p.account_id));
  return query
    select 'facts_have_their_purchase', f.account_id, jsonb_build_object('kind', f.kind, 'ref', f.ref)
      from credits.stripe_facts f
     where f.kind in ('checkout_session', 'top_up')
       and not exists (select from credits.purchases p
                        where p.account_id = f.account_id and p.completed_at is not null
                          and coalesce(p.stripe_session_id, p.stripe_payment_intent_id) = f.ref);
end $$;
