-- What Stripe is asked to do with a subscription, and what its schedules say is to come. The state follows when Stripe says so.

-- Now: the price of the leading item changes and is invoiced at once; what cannot be paid does not come into effect.
-- At the period's end: a schedule, made in two steps, since Stripe lets a schedule be made of a subscription only as it is.
create or replace function credits._request_plan(
  subscription credits.subscriptions,
  plan         text,
  at           text
)
returns void
language plpgsql
as $$
declare
  v_sub      credits.subscriptions := _request_plan.subscription;
  v_price    text := credits._price_of_plan(_request_plan.plan, v_sub.price_id,
                                                credits._home_of('subscription', v_sub.subscription_id));
  v_item     text := (select i.item_id
                        from credits.subscription_items i
                       where i.account_id = v_sub.account_id and i.subscription_id = v_sub.subscription_id
                       order by i.price_id is distinct from v_sub.price_id, i.item_id
                       limit 1);
  v_schedule text := credits._schedule_of(v_sub.subscription_id);
begin
  if (v_price is null or v_item is null) and _request_plan.plan is distinct from v_sub.plan then
    perform credits._fail(404, 'price_not_found', jsonb_build_object('plan', _request_plan.plan),
      'Publish the plan, or give it its stripe_price_ids: without a price it cannot be sold at Stripe.');
  end if;
  perform credits._withdraw(v_sub.subscription_id, array_remove(
    array['change_plan', 'schedule_plan', 'schedule_phases', 'release_plan'],
    case when _request_plan.plan = v_sub.plan then 'release_plan' when _request_plan.at = 'now' then 'change_plan'
         when v_schedule is null then 'schedule_plan' else 'schedule_phases' end));
  if _request_plan.plan = v_sub.plan then
    perform credits._fail_in_progress(v_sub.subscription_id)
      where credits._open_request('change_plan', v_sub.subscription_id) is not null;
    perform credits._request_release(v_sub, v_schedule) where v_schedule is not null;
    update credits.subscriptions s
       set pending_plan = null, pending_at = null
     where s.account_id = v_sub.account_id and s.subscription_id = v_sub.subscription_id;
  elsif _request_plan.at = 'now' then
    perform credits._request_change('change_plan', v_sub, 'post', '/v1/subscriptions/' || v_sub.subscription_id,
      jsonb_build_object('items', jsonb_build_array(jsonb_build_object('id', v_item, 'price', v_price)),
                         'proration_behavior', 'always_invoice', 'payment_behavior', 'pending_if_incomplete'));
  else
    update credits.subscriptions s
       set pending_plan = _request_plan.plan, pending_at = s.period_end
     where s.account_id = v_sub.account_id and s.subscription_id = v_sub.subscription_id
    returning s.* into v_sub;
    if v_schedule is null then
      perform credits._request_change('schedule_plan', v_sub, 'post', '/v1/subscription_schedules',
        jsonb_build_object('from_subscription', v_sub.subscription_id));
    else
      perform credits._request_phases(v_sub, v_schedule);
    end if;
  end if;
end $$;

-- Of several words before Stripe was asked the last one counts: other ones of its family are withdrawn. What was sent stands.
create or replace function credits._withdraw(
  subscription_id text,
  purposes        text[]
)
returns void
language sql
as $$
  update credits.stripe_requests r
     set state = 'failed', error_type = 'withdrawn', finished_at = credits.now()
   where r.ref = _withdraw.subscription_id and r.purpose = any (_withdraw.purposes)
     and r.state = 'queued' and r.first_sent_at is null
$$;

-- What was sent stands, and what Stripe makes of it is not known: another word now would be answered with success and never said.
-- Whoever brings back its answer holds its row and wants the account, so it is only looked at here.
drop function if exists credits._request_change(text, credits.subscriptions, text, jsonb);
create or replace function credits._request_change(
  purpose      text,
  subscription credits.subscriptions,
  method       text,
  path         text,
  params       jsonb
)
returns void
language plpgsql
as $$
declare
  v_sub     credits.subscriptions := _request_change.subscription;
  v_request bigint := credits._open_request(_request_change.purpose, v_sub.subscription_id);
begin
  if v_request is null
     or exists (select from credits.stripe_requests r where r.request_id = v_request and r.first_sent_at is null) then
    v_request := credits._request(_request_change.purpose, v_sub.subscription_id, _request_change.method, _request_change.path,
                                  _request_change.params, v_sub.account_id,
                                  stripe_account => credits._home_of('subscription', v_sub.subscription_id));
  end if;
  perform credits._fail_in_progress(v_sub.subscription_id)
     from credits.stripe_requests r
    where r.request_id = v_request
      and (r.method, r.path, r.params) <> (_request_change.method, _request_change.path, _request_change.params);
end $$;

create or replace function credits._fail_in_progress(subscription_id text)
returns void
language sql
stable
as $$
  select credits._fail(409, 'plan_change_in_progress',
                       jsonb_build_object('subscription_id', _fail_in_progress.subscription_id),
                       'Stripe is being asked for another change. Once it has answered, ask again.')
$$;

-- The second step: what runs stays until the period's end, then the pending plan takes over and the schedule lets go.
create or replace function credits._request_phases(
  subscription credits.subscriptions,
  schedule_id  text
)
returns void
language sql
as $$
  select credits._request_change('schedule_phases', _request_phases.subscription, 'post',
           '/v1/subscription_schedules/' || _request_phases.schedule_id,
           jsonb_build_object('end_behavior', 'release', 'phases', jsonb_build_array(
             jsonb_build_object('start_date', extract(epoch from s.period_start)::bigint,
                                'end_date', extract(epoch from s.period_end)::bigint,
                                'items', jsonb_build_array(jsonb_strip_nulls(jsonb_build_object('price', s.price_id, 'quantity', s.quantity)))),
             jsonb_build_object('items', jsonb_build_array(jsonb_strip_nulls(jsonb_build_object(
               'price', credits._price_of_plan(p.code, s.price_id, credits._home_of('subscription', s.subscription_id)),
               'quantity', s.quantity)))))))
    from (select (_request_phases.subscription).*) s
    join credits.plans p on p.code = s.pending_plan
$$;

-- Stripe lets nobody announce the end of a subscription that a schedule manages, so that is let go first: requests about one
-- subscription go one after the other. What was planned for after the end is not wanted any more.
create or replace function credits._request_cancel(
  subscription credits.subscriptions,
  at           text
)
returns void
language plpgsql
as $$
declare
  v_sub      credits.subscriptions := _request_cancel.subscription;
  v_schedule text := credits._schedule_of(v_sub.subscription_id);
begin
  perform credits._withdraw(v_sub.subscription_id, array['resume_plan', 'schedule_plan', 'schedule_phases']);
  if _request_cancel.at = 'now' then
    perform credits._request_change('cancel_plan', v_sub, 'delete', '/v1/subscriptions/' || v_sub.subscription_id, '{}');
  else
    perform credits._fail_in_progress(v_sub.subscription_id)
      where v_schedule is null and credits._is_asked('schedule_plan', v_sub.subscription_id);
    if v_schedule is not null and not credits._is_asked('release_plan', v_sub.subscription_id) then
      perform credits._withdraw(v_sub.subscription_id, array['cancel_plan']);
      perform credits._request_release(v_sub, v_schedule);
    end if;
    perform credits._request_change('cancel_plan', v_sub, 'post', '/v1/subscriptions/' || v_sub.subscription_id,
                                    '{"cancel_at_period_end": true}');
  end if;
  update credits.subscriptions s
     set pending_plan = null, pending_at = null
   where s.account_id = v_sub.account_id and s.subscription_id = v_sub.subscription_id and s.pending_plan is not null;
end $$;

create or replace function credits._request_release(
  subscription credits.subscriptions,
  schedule_id  text
)
returns void
language sql
as $$
  select credits._request_change('release_plan', _request_release.subscription, 'post',
                                 '/v1/subscription_schedules/' || _request_release.schedule_id || '/release', '{}')
$$;

-- Whether Stripe is being asked at this time.
create or replace function credits._is_asked(
  purpose text,
  ref     text
)
returns boolean
language sql
stable
as $$
  select exists (select from credits.stripe_requests r
                  where r.purpose = _is_asked.purpose and r.ref = _is_asked.ref and r.state in ('queued', 'sent'))
$$;

create or replace function credits._request_resume(subscription credits.subscriptions)
returns void
language sql
as $$
  select credits._withdraw((_request_resume.subscription).subscription_id, array['cancel_plan']);
  select credits._request_change('resume_plan', s, 'post', '/v1/subscriptions/' || s.subscription_id,
                                 '{"cancel_at_period_end": false}')
    from (select (_request_resume.subscription).*) s
$$;

-- Nothing comes of a word, or nobody knows what came of it. The subscription tells: what was shown as pending is so no more,
-- unless a schedule says so. No account is locked here, since many may be given up at once.
create or replace function credits._on_failed_plan(notice credits.stripe_notice)
returns credits.handler_result
language plpgsql
as $$
declare
  v_payment credits.stripe_notice := credits._shape_declined(_on_failed_plan.notice);
begin
  if v_payment.object_id is not null then
    perform credits._mirror(v_payment);
  end if;
  perform credits._ask_anew((credits._answered(_on_failed_plan.notice)).ref);
  return credits._applied();
end $$;

-- Schedules ---------------------------------------------------------------------------------------------------------

create or replace function credits._on_schedule(notice credits.stripe_notice)
returns credits.handler_result
language plpgsql
as $$
declare
  v_schedule credits.schedule_shape := credits._shape_schedule((_on_schedule.notice).object);
  v_current  boolean := credits._mirror(_on_schedule.notice, v_schedule.subscription_id);
  v_sub      credits.subscriptions;
begin
  select s.* into v_sub
    from credits.stripe_facts f
    join credits.subscriptions s on s.account_id = f.account_id and s.subscription_id = f.ref
   where f.kind = 'subscription' and f.ref = v_schedule.subscription_id;
  if found then
    perform credits._lock_account(v_sub.account_id);
    if (_on_schedule.notice).retrieved and v_sub.pending_plan is not null and v_schedule.next_at is null
       and credits._open_request('schedule_phases', v_sub.subscription_id) is null then
      perform credits._request_phases(v_sub, v_schedule.schedule_id);
    end if;
    perform credits._refresh_pending(v_sub.account_id, v_sub.subscription_id);
    perform credits._forget_subscription(v_sub.account_id);
  end if;
  return credits._mirrored(v_current);
end $$;

-- What is pending follows from the subscription's schedule, whichever of them was seen last. Until Stripe has the schedule
-- that we asked for, our own word stands.
create or replace function credits._refresh_pending(
  account_id      text,
  subscription_id text
)
returns void
language plpgsql
as $$
declare
  v_schedule_id text := credits._schedule_of(_refresh_pending.subscription_id);
  v_schedule    credits.schedule_shape := credits._shape_schedule(credits._snapshot('subscription_schedule', v_schedule_id));
begin
  if v_schedule_id is not null and v_schedule.schedule_id is null then
    perform credits._request_object('subscription_schedule', v_schedule_id);
    return;
  elsif coalesce(credits._open_request('schedule_plan', _refresh_pending.subscription_id),
                 credits._open_request('schedule_phases', _refresh_pending.subscription_id)) is not null then
    return;
  end if;
  update credits.subscriptions s
     set pending_plan = n.plan, pending_at = n.at
    from (values (1)) x
    left join lateral (select credits._plan_of_price(v_schedule.next_price_id, null) as plan, v_schedule.next_at as at
                        where v_schedule.status in ('not_started', 'active')
                          and credits._plan_of_price(v_schedule.next_price_id, null) is not null) n on true
   where s.account_id = _refresh_pending.account_id and s.subscription_id = _refresh_pending.subscription_id
     and (s.pending_plan, s.pending_at) is distinct from (n.plan, n.at);
end $$;

-- The schedule that manages a subscription. Its own snapshot may be ahead of the subscription's, to say that it is made or over.
create or replace function credits._schedule_of(subscription_id text)
returns text
language sql
stable
as $$
  select coalesce(
    (select n.schedule_id
       from credits._shape_subscription(b.snapshot) n
      where coalesce(credits._is_live_schedule(credits._snapshot('subscription_schedule', n.schedule_id)), true)),
    (select o.object_id
       from credits.stripe_objects o
      where o.kind = 'subscription_schedule' and o.ref = b.object_id and o.as_of > b.as_of and credits._is_live_schedule(o.snapshot)
      order by o.as_of desc, o.object_id
      limit 1))
    from credits.stripe_objects b
   where b.kind = 'subscription' and b.object_id = _schedule_of.subscription_id
$$;

create or replace function credits._is_live_schedule(snapshot jsonb)
returns boolean
language sql
immutable
as $$
  select (credits._shape_schedule(_is_live_schedule.snapshot)).status in ('not_started', 'active')
$$;
