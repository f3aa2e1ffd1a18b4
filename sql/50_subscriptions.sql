-- Subscriptions: the machine is two tables of rows and one function that advances. Stripe's word is mirrored beside our
-- state. Lock order: the account's balances row, then its subscriptions.

insert into credits.settings as s (name, value, summary) values
  ('past_due_grace', '"7 days"', 'How long a subscription that is past due may still spend.')
on conflict (name) do update set summary = excluded.summary;

with listed (state, may_spend, may_receive, terminal, rank, summary) as (values
  ('active',     true,  true,  false, 10, 'Paid; credits come with every period.'),
  ('canceling',  true,  true,  false, 15, 'Active, and ends with the period.'),
  ('trialing',   true,  true,  false, 20, 'In its trial.'),
  ('past_due',   true,  false, false, 30, 'A payment failed; it may spend until the grace ends.'),
  ('unpaid',     false, false, false, 40, 'Payment was given up; nothing comes or goes until it is made.'),
  ('paused',     false, false, false, 50, 'Stopped on purpose, or by a trial without a card.'),
  ('incomplete', true,  false, false, 80, 'The first payment is being waited for.'),
  ('canceled',   true,  false, true,  85, 'Over. Credits stay until they expire.'),
  ('none',       true,  false, false, 90, 'There is no subscription.')
), kept as (
  insert into credits.subscription_states as s (state, may_spend, may_receive, terminal, rank, summary)
  select l.* from listed l
  on conflict (state) do update
    set may_spend = excluded.may_spend, may_receive = excluded.may_receive, terminal = excluded.terminal,
        rank = excluded.rank, summary = excluded.summary
)
delete from credits.subscription_states s where s.state not in (select l.state from listed l);

-- Between live states Stripe may make any move; those that are no surprise are listed.
with listed (from_state, to_state, effect) as (values
  ('none',       'incomplete', '_await_payment'),
  ('none',       'trialing',   '_start_plan'),
  ('none',       'active',     '_start_plan'),
  ('none',       'canceling',  '_start_plan'),
  ('none',       'past_due',   '_start_grace'),
  ('none',       'unpaid',     '_stop_plan'),
  ('none',       'paused',     '_stop_plan'),
  ('none',       'canceled',   '_end_plan'),
  ('incomplete', 'trialing',   '_start_plan'),
  ('incomplete', 'active',     '_start_plan'),
  ('incomplete', 'canceling',  '_start_plan'),
  ('incomplete', 'canceled',   '_end_plan'),
  ('trialing',   'active',     '_start_plan'),
  ('trialing',   'canceling',  '_end_later'),
  ('trialing',   'past_due',   '_start_grace'),
  ('trialing',   'unpaid',     '_stop_plan'),
  ('trialing',   'paused',     '_stop_plan'),
  ('trialing',   'canceled',   '_end_plan'),
  ('active',     'trialing',   '_start_plan'),
  ('active',     'canceling',  '_end_later'),
  ('active',     'past_due',   '_start_grace'),
  ('active',     'unpaid',     '_stop_plan'),
  ('active',     'paused',     '_stop_plan'),
  ('active',     'canceled',   '_end_plan'),
  ('canceling',  'active',     '_resume_plan'),
  ('canceling',  'trialing',   '_resume_plan'),
  ('canceling',  'past_due',   '_start_grace'),
  ('canceling',  'unpaid',     '_stop_plan'),
  ('canceling',  'paused',     '_stop_plan'),
  ('canceling',  'canceled',   '_end_plan'),
  ('past_due',   'active',     '_end_grace'),
  ('past_due',   'canceling',  '_end_grace'),
  ('past_due',   'unpaid',     '_stop_plan'),
  ('past_due',   'paused',     '_stop_plan'),
  ('past_due',   'canceled',   '_end_plan'),
  ('unpaid',     'active',     '_resume_plan'),
  ('unpaid',     'canceling',  '_resume_plan'),
  ('unpaid',     'canceled',   '_end_plan'),
  ('paused',     'active',     '_resume_plan'),
  ('paused',     'trialing',   '_resume_plan'),
  ('paused',     'canceling',  '_resume_plan'),
  ('paused',     'past_due',   '_start_grace'),
  ('paused',     'unpaid',     '_stop_plan'),
  ('paused',     'canceled',   '_end_plan')
), kept as (
  insert into credits.subscription_transitions as t (from_state, to_state, effect)
  select l.* from listed l
  on conflict (from_state, to_state) do update set effect = excluded.effect
)
delete from credits.subscription_transitions t
 where (t.from_state, t.to_state) not in (select l.from_state, l.to_state from listed l);

create or replace function credits.get_subscription_state(account_id text)
returns credits.subscription_state_result
language plpgsql
stable
security definer
set search_path = pg_catalog, pg_temp
as $$
declare
  v_now    timestamptz := credits.now();
  v_account credits.accounts := credits._account(get_subscription_state.account_id);
  v_sub    credits.subscriptions := credits._leading_subscription(get_subscription_state.account_id, v_now);
  v_state  credits.subscription_states;
  v_seen   credits.stripe_objects;
  v_grace  timestamptz := (v_sub.past_due_at at time zone 'UTC' + (credits._setting('past_due_grace') #>> '{}')::interval)
                            at time zone 'UTC';  -- the same in every session
begin
  select s.* into v_state from credits.subscription_states s where s.state = coalesce(v_sub.state, 'none');
  select o.* into v_seen
    from credits.stripe_objects o
   where o.kind = 'subscription' and o.object_id = v_sub.subscription_id and v_sub.source = 'stripe';
  return row(v_account.account_id, v_state.state, v_sub.status, coalesce(v_sub.plan, v_account.plan),
    v_state.may_spend and coalesce(v_now < v_grace, true), v_state.may_receive and not coalesce(v_sub.collection_paused, false),
    v_sub.source, v_sub.subscription_id, v_sub.period_start, v_sub.period_end, v_sub.trial_end,
    coalesce(v_sub.cancel_at, case when v_sub.cancel_at_period_end then v_sub.period_end end),
    v_sub.pending_plan, v_sub.pending_at, v_grace, to_timestamp(v_seen.as_of),
    coalesce(not v_state.terminal and to_timestamp(v_seen.as_of)
               < v_now - (credits._setting('subscription_cache_ttl') #>> '{}')::interval, false)
    )::credits.subscription_state_result;
end $$;
comment on function credits.get_subscription_state(text) is
'The state of an account''s subscription at this instant: state, plan, what it allows, period, what is pending.

state is none, incomplete, trialing, active, past_due, unpaid, paused, canceling (active, ends with the period) or canceled;
status is Stripe''s own word. may_spend is false once the grace of a past due subscription is over (grace_until), and while
it is unpaid or paused; may_receive says whether monthly credits go on. stale: what Stripe said is older than
subscription_cache_ttl. Of several subscriptions the most alive one speaks, one of Stripe before an internal plan.
Errors: 400 invalid_request, 404 account_not_found.';

-- Helpers -----------------------------------------------------------------------------------------------------------

-- The subscription that speaks for an account, as it is at a moment: what falls due at a boundary of an internal plan is
-- booked by whoever looks first, and a read comes to the same.
create or replace function credits._leading_subscription(
  account_id text,
  at         timestamptz
)
returns credits.subscriptions
language plpgsql
stable
as $$
declare
  v_sub credits.subscriptions;
begin
  select s.* into v_sub
    from credits.subscriptions o,
         lateral (select i.* from credits._internal_at(o, _leading_subscription.at) i where o.source = 'internal'
                  union all
                  select o.* where o.source <> 'internal') s
    join credits.subscription_states t on t.state = s.state
   where o.account_id = _leading_subscription.account_id
   order by case when s.source = 'internal' and not t.terminal then 60 else t.rank end, s.period_end desc nulls first,
            s.created_at desc, s.subscription_id
   limit 1;
  return v_sub;
end $$;

-- The plan of an account at a moment: that of the subscription which speaks for it, as long as it lives.
create or replace function credits._plan_at(
  account credits.accounts,
  at      timestamptz
)
returns text
language plpgsql
stable
as $$
declare
  v_sub credits.subscriptions := credits._leading_subscription((_plan_at.account).account_id, _plan_at.at);
begin
  return case when v_sub.state is null then (_plan_at.account).plan
              when not (select t.terminal from credits.subscription_states t where t.state = v_sub.state) then v_sub.plan end;
end $$;

-- The one function that moves a subscription. Stripe is never refused; a move that nobody foresaw is marked. Our own plans
-- move along the rows only.
create or replace function credits._advance(
  subscription credits.subscriptions,
  to_state     text,
  cause        text,
  at           timestamptz default credits.now()
)
returns jsonb
language plpgsql
as $$
declare
  v_sub    credits.subscriptions := _advance.subscription;
  v_effect text;
begin
  if v_sub.state = _advance.to_state then
    return jsonb '[]';
  end if;
  select t.effect into v_effect
    from credits.subscription_transitions t
   where t.from_state = v_sub.state and t.to_state = _advance.to_state;
  if not found and v_sub.source = 'internal' then
    perform credits._fail(409, 'illegal_transition',
      jsonb_build_object('from', v_sub.state, 'to', _advance.to_state, 'subscription_id', v_sub.subscription_id),
      'A plan in this state cannot do that.');
  end if;

  insert into credits.subscription_history (account_id, subscription_id, from_state, to_state, plan, unexpected, cause, created_at)
  values (v_sub.account_id, v_sub.subscription_id, v_sub.state, _advance.to_state, v_sub.plan, v_effect is null,
          _advance.cause, credits.now());
  update credits.subscriptions s
     set state = _advance.to_state,
         past_due_at = case when _advance.to_state = 'past_due' then _advance.at end
   where s.account_id = v_sub.account_id and s.subscription_id = v_sub.subscription_id;
  if v_effect is not null then
    execute format('select credits.%I($1, $2)', v_effect) using v_sub, _advance.cause;
  end if;
  return jsonb_build_array(jsonb_build_object('effect', 'move', 'account_id', v_sub.account_id,
    'subscription_id', v_sub.subscription_id, 'from', v_sub.state, 'to', _advance.to_state));
end $$;

-- Effects of moves. What a state allows is read from its row, and credits follow from invoices and _plan_ahead(); so that
-- the order of events does not matter, an effect only tells.

create or replace function credits._await_payment(subscription credits.subscriptions, cause text)
returns void language sql as $$ select credits._tell_move(subscription, cause, 'subscription_incomplete') $$;

create or replace function credits._start_plan(subscription credits.subscriptions, cause text)
returns void language sql as $$ select credits._tell_move(subscription, cause, 'subscription_started') $$;

create or replace function credits._resume_plan(subscription credits.subscriptions, cause text)
returns void language sql as $$ select credits._tell_move(subscription, cause, 'subscription_resumed') $$;

create or replace function credits._end_later(subscription credits.subscriptions, cause text)
returns void language sql as $$ select credits._tell_move(subscription, cause, 'subscription_canceling') $$;

create or replace function credits._start_grace(subscription credits.subscriptions, cause text)
returns void language sql as $$ select credits._tell_move(subscription, cause, 'subscription_past_due') $$;

create or replace function credits._end_grace(subscription credits.subscriptions, cause text)
returns void language sql as $$ select credits._tell_move(subscription, cause, 'subscription_recovered') $$;

create or replace function credits._stop_plan(subscription credits.subscriptions, cause text)
returns void language sql as $$ select credits._tell_move(subscription, cause, 'subscription_stopped') $$;

create or replace function credits._end_plan(subscription credits.subscriptions, cause text)
returns void language sql as $$ select credits._tell_move(subscription, cause, 'subscription_ended') $$;

create or replace function credits._tell_move(
  subscription credits.subscriptions,
  cause        text,
  type         text
)
returns void
language sql
as $$
  select credits._notify(s.account_id, _tell_move.type, concat_ws(':', s.account_id, h.history_id),
    jsonb_build_object('subscription_id', s.subscription_id, 'plan', s.plan, 'from', s.state, 'cause', _tell_move.cause))
    from (select (_tell_move.subscription).*) s,
         lateral (select max(h.history_id) as history_id
                    from credits.subscription_history h where h.account_id = s.account_id) h
$$;

-- Whether a subscription may keep the account from spending: one that has stopped receiving, and is not over.
create or replace function credits._must_ask_subscription(account_id text)
returns boolean
language plpgsql
stable
as $$
begin
  return exists (select from credits.subscriptions s
                   join credits.subscription_states t on t.state = s.state
                  where s.account_id = _must_ask_subscription.account_id and not t.may_receive and not t.terminal);
end $$;

-- After anything about an account's subscriptions has changed: its plan, and the credits that are to come.
create or replace function credits._refresh_plan(
  account_id text,
  at         timestamptz default credits.now()
)
returns void
language plpgsql
as $$
declare
  v_account credits.accounts;
  v_plan    text;
begin
  perform credits._plan_ahead(_refresh_plan.account_id, _refresh_plan.at);
  v_account := credits._account(_refresh_plan.account_id);
  v_plan    := credits._plan_at(v_account, _refresh_plan.at);
  if v_account.plan is distinct from v_plan then
    update credits.accounts a set plan = v_plan where a.account_id = _refresh_plan.account_id;
  end if;
  v_plan := case when not credits._must_ask_subscription(_refresh_plan.account_id) then coalesce(v_plan, '') end;
  update credits.balances b set plan = v_plan where b.account_id = _refresh_plan.account_id and b.plan is distinct from v_plan;
  perform credits._forget_subscription(_refresh_plan.account_id);
end $$;
