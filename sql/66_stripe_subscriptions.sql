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
    perform credits._note_words(v_account_id, v_notice, v_shape)
       from credits.stripe_objects o  -- of two words of the same second the mirror has taken the other one
      where o.kind = v_notice.kind and o.object_id = v_notice.object_id and o.as_of > v_notice.at;
    perform credits._refresh_plan(v_account_id);
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
  perform credits._note_words(_write_subscription.account_id, _write_subscription.notice, v_shape, true);
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

-- Grace counts from the first word of it since the last word of anything else; so does the time in which no month begins, from
-- the first word that nothing may be received since the last one that it may. Each of them may come late.
drop function if exists credits._note_past_due(text, credits.subscription_shape, bigint);
create or replace function credits._note_words(
  account_id text,
  notice     credits.stripe_notice,
  shape      credits.subscription_shape,
  latest     boolean default false
)
returns void
language sql
as $$
  update credits.subscriptions s
     set past_due_words = w.past_due_words,
         well_at        = greatest(s.well_at, case when not w.past_due then w.at end),
         past_due_at    = case when s.state = 'past_due' then coalesce(w.past_due_words[1], s.past_due_at) end,
         still_words    = w.still_words,
         receiving_at   = greatest(s.receiving_at, case when not w.still then w.at end)
    from (select n.*, credits._words_with(o.past_due_words, o.well_at, n.past_due, n.at, n.how) as past_due_words,
                 credits._words_with(o.still_words, o.receiving_at, n.still, n.at, n.how) as still_words
            from credits.subscriptions o
            join credits.subscription_states t on t.state = credits._state_of(_note_words.shape, o.state),
                 lateral (select to_timestamp((_note_words.notice).at) as at,
                                 (_note_words.shape).status is not distinct from 'past_due' as past_due,
                                 not t.may_receive or (_note_words.shape).collection_paused as still,
                                 case when (_note_words.notice).retrieved then 'asked'
                                      when _note_words.latest then 'latest' else 'late' end as how) n
           where o.account_id = _note_words.account_id
             and o.subscription_id = (_note_words.shape).subscription_id) w
   where s.account_id = _note_words.account_id and s.subscription_id = (_note_words.shape).subscription_id
$$;

-- The moments of all words of a kind since the last word against it, with one word more, for it or against it. In the same
-- second the word against it holds, unless the other one is known to be the latest. What an answer to us repeats is not kept:
-- there may be one every few minutes.
create or replace function credits._words_with(
  words      timestamptz[],
  against_at timestamptz,
  is_for     boolean,
  at         timestamptz,
  how        text
)
returns timestamptz[]
language sql
immutable
as $$
  select case when not _words_with.is_for
              then array(select w from unnest(_words_with.words) w where w > _words_with.at order by w)
              when _words_with.at < _words_with.against_at or _words_with.at = _words_with.against_at and _words_with.how = 'late'
                or _words_with.how = 'asked' and _words_with.words <> '{}' then _words_with.words
              else array(select distinct w from unnest(_words_with.words || _words_with.at) w order by w) end
$$;
