-- What stands of a payment brought to what it has bought: grants, purchases, and the account while it is disputed.
-- Keeps invariant 9: what was clawed back equals its target. The caller holds the lock of the account.

insert into credits.settings as s (name, value, summary) values
  ('dispute_freezes', '"credits"',
   'What an open dispute freezes: credits (what is unspent of those the payment bought) or account.')
on conflict (name) do update set summary = excluded.summary;

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
      _settle_source.source_id, credits._firm_share(v_totals), credits._full_share(v_totals));
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

-- What is disputed of the invoice that a payment paid, if it is known to have paid one.
create or replace function credits._disputed_of_invoice(payment_id text)
returns bigint
language sql
stable
as $$
  select t.lost + t.open
    from credits.stripe_payments p, credits._payment_totals('invoice', p.source_id) t
   where p.payment_id = _disputed_of_invoice.payment_id and p.source_kind = 'invoice'
$$;

-- Purchases see it by themselves: see _settle_purchase(). The caller holds the account, if it is known.
create or replace function credits._pause_if_risen(
  payment_id text,
  before     bigint
)
returns void
language sql
as $$
  select credits._pause_top_up(p.account_id, 'disputed')
    from credits.stripe_payments p
   where p.payment_id = _pause_if_risen.payment_id
     and credits._disputed_of_invoice(p.payment_id) > coalesce(_pause_if_risen.before, 0)
$$;

-- The dispute may come first, and its payment turn out to be the invoice's later. The caller holds the account.
create or replace function credits._pause_if_disputed(
  invoice_id text,
  account_id text
)
returns void
language sql
as $$
  select credits._pause_top_up(_pause_if_disputed.account_id, 'disputed')
    from credits._payment_totals('invoice', _pause_if_disputed.invoice_id) t
   where t.lost + t.open > 0
$$;

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

-- What has gone back for good.
create or replace function credits._firm_share(totals credits.payment_totals)
returns numeric
language sql
immutable
as $$
  select credits._share((_firm_share.totals).refunded + (_firm_share.totals).lost, (_firm_share.totals).captured)
$$;

-- The same with what open disputes ask for, unless they freeze the account instead.
create or replace function credits._full_share(totals credits.payment_totals)
returns numeric
language sql
stable
as $$
  select credits._share((_full_share.totals).refunded + (_full_share.totals).lost
                        + case when credits._setting('dispute_freezes') = '"account"' then 0 else (_full_share.totals).open end,
                        (_full_share.totals).captured)
$$;

drop function if exists credits._is_refunded(text, text);
create or replace function credits._is_refunded(invoice_id text)
returns boolean
language sql
stable
as $$
  select credits._firm_share(t) >= 1
    from credits._payment_totals('invoice', _is_refunded.invoice_id) t
$$;

-- Accounts that are closed -------------------------------------------------------------------------------------------

-- Whether an event failed because of that: its money is to be given back, and stays to be seen until it is.
create or replace function credits._is_of_closed(error text)
returns boolean
language sql
immutable
as $$
  select coalesce(_is_of_closed.error = 'PT423 account_closed', false)
$$;

-- Without a charge that was refunded in full, for each payment that is known, the verdict stands.
create or replace function credits._unless_given_back(
  notice  credits.stripe_notice,
  verdict credits.event_verdict
)
returns credits.event_verdict
language plpgsql
stable
as $$
declare
  v_object jsonb := (_unless_given_back.notice).object;
  v_result credits.event_verdict := _unless_given_back.verdict;
begin
  if credits._is_of_closed(v_result.error) and (
       select bool_and(exists (
                select from credits.stripe_objects o, credits._shape_charge(o.snapshot) c
                 where o.kind = 'charge' and o.ref = p.payment_id and c.captured > 0 and c.refunded >= c.captured))
         from (select coalesce(k.payment_intent_id, k.charge_id)
                 from credits._known_payments(v_object, (_unless_given_back.notice).object_id) k
                where (_unless_given_back.notice).kind = 'invoice'
               union all
               select case (_unless_given_back.notice).kind
                        when 'payment_intent' then (_unless_given_back.notice).object_id
                        else (credits._shape_session(v_object)).payment_intent_id end
                where (_unless_given_back.notice).kind in ('checkout.session', 'payment_intent')) p (payment_id)) then
    v_result.status := 'ignored';
    v_result.reason := 'refunded';
    v_result.error  := null;
  end if;
  return v_result;
end $$;

-- Something became known of a payment or an invoice that such an event names: it is judged anew.
create or replace function credits._judge_closed(object_id text)
returns void
language sql
as $$
  select credits._make_due(array(
    select e.event_id
      from credits.stripe_events e
     where e.status = 'failed' and e.next_attempt_at is null and credits._is_of_closed(e.error)
       and credits._mentions(e.payload, array[_judge_closed.object_id], null)
       for no key update skip locked))
$$;
