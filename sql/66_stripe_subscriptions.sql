-- Subscriptions of Stripe: mirrored, and their state advanced. They never grant credits: paid invoices do.

insert into credits.settings as s (name, value, summary) values
  ('subscription_refresh_wait', '"10 seconds"', 'How long refresh_subscription() takes the last answer of Stripe for good.')
on conflict (name) do update set summary = excluded.summary;

create or replace function credits.refresh_subscription(account_id text)
returns credits.subscription_state_result
language plpgsql
security definer
set search_path = pg_catalog, pg_temp
as $$
declare
  v_account_id text := (credits._account(refresh_subscription.account_id)).account_id;
  v_sub        credits.subscriptions := credits._own_subscription(v_account_id);
begin
  if v_sub.source is distinct from 'stripe' then
    perform credits._fail(404, 'subscription_not_found', jsonb_build_object('account_id', v_account_id),
      'The account has no subscription at Stripe that lives.');
  end if;
  perform credits._ask_anew(v_sub.subscription_id)
    where not exists (
      select from credits.stripe_objects o
       where o.kind = 'subscription' and o.object_id = v_sub.subscription_id and o.seen_by = 'object.subscription'
         and to_timestamp(o.as_of) > credits.now() - (credits._setting('subscription_refresh_wait') #>> '{}')::interval);
  return credits.get_subscription_state(v_account_id);
end $$;
comment on function credits.refresh_subscription(text) is
'Asks Stripe anew for the subscription of an account, and answers with its state as it is known now.

The answer moves the state when it comes. Calls at the same time share one request, and an answer that is not older than the
setting subscription_refresh_wait is not asked for again.
Errors: 400 invalid_request, 404 account_not_found, subscription_not_found.';

create or replace function credits._on_subscription(notice credits.stripe_notice)
returns credits.handler_result
language plpgsql
as $$
declare
  v_notice     credits.stripe_notice := _on_subscription.notice;
  v_shape      credits.subscription_shape := credits._shape_subscription(v_notice.object);
  v_account_id text := credits._account_of(v_notice);
  v_current    boolean;
begin
  perform credits._mirror_embedded('price', i.price_id, i.price, v_notice.at, i.product_id)
     from (select s.* from credits._shape_items(v_notice.object) s order by s.price_id) i;
  v_current := credits._mirror(v_notice, v_shape.customer_id);
  perform credits._lock_account(v_account_id);
  if not v_current then
    perform credits._note_past_due(v_account_id, v_shape, v_notice.at);
    perform credits._forget_subscription(v_account_id);
    return credits._mirrored(false);
  end if;
  return credits._applied(credits._write_subscription(v_account_id, v_notice, v_shape));
end $$;

create or replace function credits._write_subscription(
  account_id text,
  notice     credits.stripe_notice,
  shape      credits.subscription_shape
)
returns jsonb
language plpgsql
as $$
declare
  v_shape   credits.subscription_shape := _write_subscription.shape;
  v_sub     credits.subscriptions;
  v_effects jsonb;
begin
  insert into credits.subscriptions as s (account_id, subscription_id, source, status, anchor_at, created_at)
  values (_write_subscription.account_id, v_shape.subscription_id, 'stripe', coalesce(v_shape.status, 'unknown'),
          coalesce(v_shape.anchor_at, v_shape.period_start, credits.now()), credits.now())
  on conflict on constraint subscriptions_pkey do nothing;
  perform credits._write_items(_write_subscription.account_id, v_shape.subscription_id, (_write_subscription.notice).object);

  update credits.subscriptions s
     set status               = coalesce(v_shape.status, s.status),
         customer_id          = v_shape.customer_id,
         livemode             = v_shape.livemode,
         anchor_at            = coalesce(v_shape.anchor_at, s.anchor_at),
         period_start         = v_shape.period_start,
         period_end           = v_shape.period_end,
         trial_end            = v_shape.trial_end,
         cancel_at            = v_shape.cancel_at,
         cancel_at_period_end = v_shape.cancel_at_period_end,
         ended_at             = v_shape.ended_at,
         collection_paused    = v_shape.collection_paused,
         plan                 = i.plan,
         price_id             = i.price_id,
         quantity             = i.quantity
    from (values (1)) x  -- its plan is that of the first item whose price or product sells one
    left join lateral (
      select p.code as plan, t.price_id, t.quantity
        from credits.subscription_items t
        left join credits.plans p on p.code = credits._plan_of_price(t.price_id, t.product_id)
       where t.account_id = _write_subscription.account_id and t.subscription_id = v_shape.subscription_id
       order by p.code is null, t.item_id
       limit 1) i on true
   where s.account_id = _write_subscription.account_id and s.subscription_id = v_shape.subscription_id
  returning s.* into v_sub;

  v_effects := credits._advance(v_sub, credits._state_of(v_shape, v_sub.state), (_write_subscription.notice).event_id,
                                to_timestamp((_write_subscription.notice).at));
  perform credits._note_past_due(_write_subscription.account_id, v_shape, (_write_subscription.notice).at);
  if v_shape.schedule_id is not null or v_sub.pending_plan is not null then
    perform credits._refresh_pending(_write_subscription.account_id, v_shape.subscription_id);
  end if;
  perform credits._refresh_plan(_write_subscription.account_id);
  return v_effects;
end $$;

create or replace function credits._write_items(
  account_id      text,
  subscription_id text,
  object          jsonb
)
returns void
language plpgsql
as $$
begin
  with seen as (
    select i.* from credits._shape_items(_write_items.object) i where i.item_id is not null
  ), kept as (
    insert into credits.subscription_items as t (account_id, subscription_id, item_id, price_id, product_id, quantity,
      period_start, period_end)
    select _write_items.account_id, _write_items.subscription_id, i.item_id, i.price_id, i.product_id, i.quantity,
           i.period_start, i.period_end
      from seen i
    on conflict on constraint subscription_items_pkey do update
      set price_id = excluded.price_id, product_id = excluded.product_id, quantity = excluded.quantity,
          period_start = excluded.period_start, period_end = excluded.period_end
  )
  delete from credits.subscription_items t
   where t.account_id = _write_items.account_id and t.subscription_id = _write_items.subscription_id
     and t.item_id not in (select i.item_id from seen i);
end $$;

-- Our state of Stripe's status. A word that we do not know changes nothing.
create or replace function credits._state_of(
  shape credits.subscription_shape,
  state text
)
returns text
language sql
immutable
as $$
  select case
    when (_state_of.shape).status in ('canceled', 'incomplete_expired') or (_state_of.shape).ended_at is not null then 'canceled'
    when (_state_of.shape).status = 'active'
      then case when (_state_of.shape).cancel_at_period_end or (_state_of.shape).cancel_at is not null then 'canceling'
                else 'active' end
    when (_state_of.shape).status in ('incomplete', 'trialing', 'past_due', 'unpaid', 'paused') then (_state_of.shape).status
    else _state_of.state end
$$;

-- Grace counts from the first word of it since the last word of anything else, and each of them may come late.
create or replace function credits._note_past_due(
  account_id text,
  shape      credits.subscription_shape,
  at         bigint
)
returns void
language plpgsql
as $$
declare
  v_at    timestamptz := to_timestamp(_note_past_due.at);
  v_words timestamptz[];
  v_well  timestamptz;
begin
  select s.past_due_words, s.well_at into v_words, v_well
    from credits.subscriptions s
   where s.account_id = _note_past_due.account_id and s.subscription_id = (_note_past_due.shape).subscription_id;
  if (_note_past_due.shape).status = 'past_due' then
    v_words := array(select distinct w from unnest(v_words || v_at) w where w > coalesce(v_well, '-infinity') order by w);
  elsif v_at <= v_well then
    return;
  else
    v_well  := v_at;
    v_words := array(select w from unnest(v_words) w where w > v_well);
  end if;
  update credits.subscriptions s
     set past_due_words = v_words, well_at = v_well,
         past_due_at = case when s.state = 'past_due' then coalesce(v_words[1], s.past_due_at) end
   where s.account_id = _note_past_due.account_id and s.subscription_id = (_note_past_due.shape).subscription_id;
end $$;
