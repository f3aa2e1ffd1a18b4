-- One event, applied once: the gate of its endpoint, its handler in a subtransaction, what became of it, and whom it wakes.
-- A handler that fails is undone and its event is kept; so one bug never loses what Stripe said.

-- Applies an event unless that was done. again is a replay; woken says that what it waited for has come, which is no attempt.
create or replace function credits._apply_stripe_event(
  event_id text,
  again    boolean default false,
  woken    boolean default false
)
returns text
language plpgsql
as $$
declare
  v_event  credits.stripe_events;
  v_notice credits.stripe_notice;
  v_result credits.event_verdict;
begin
  select e.* into v_event
    from credits.stripe_events e
   where e.event_id = _apply_stripe_event.event_id
     and (e.status in ('received', 'parked', 'failed') or _apply_stripe_event.again)
     for no key update;
  if not found then
    return 'duplicate';
  elsif v_event.status <> 'received' then
    v_event.endpoint := credits._endpoint_for(v_event);
  end if;
  v_result := credits._gate(v_event);
  if v_result.status is null then
    v_notice := credits._shape_notice(v_event);
    perform credits._keep_homes(v_event.stripe_account, v_notice.object) where not v_result.shadow;
    if credits._lives_elsewhere(v_notice.kind, v_notice.object_id, v_event.stripe_account) then
      v_result.status := 'ignored';
      v_result.reason := 'account_mismatch';
    else
      v_result := credits._unless_given_back(v_notice, credits._try(v_notice, v_result.shadow));
    end if;
  end if;
  perform credits._close_event(v_event, v_result, case when _apply_stripe_event.woken then 0 else 1 end);

  if v_result.status = 'parked' and not v_result.shadow then
    perform credits._request_missing(v_result.waits_for);
    perform credits._request_missing('customer:' || o.customer_id)  -- a client_reference_id that is no account may hide it
       from credits._shape_owner(v_notice.object) o
      where v_result.reason = 'account_unknown' and o.account_id is null;
  elsif v_result.status = 'applied' and not _apply_stripe_event.woken then
    perform credits._apply_waiting(v_notice);
  end if;
  return v_result.status;
end $$;

-- What can be said of an event before its handler is asked: whether it is for us at all, and whether its endpoint only looks.
create or replace function credits._gate(event credits.stripe_events)
returns credits.event_verdict
language plpgsql
stable
as $$
declare
  v_event    credits.stripe_events := _gate.event;
  v_endpoint credits.stripe_endpoints;
  v_result   credits.event_verdict;
begin
  select p.* into v_endpoint from credits.stripe_endpoints p where p.endpoint = v_event.endpoint;
  v_result.shadow := coalesce(v_endpoint.mode = 'shadow', false);
  if v_event.type is null then
    v_result.status := 'failed';
    v_result.error  := 'The payload cannot be read: it has no type.';
  elsif v_endpoint.livemode <> v_event.livemode then
    v_result.status := 'ignored';
    v_result.reason := 'livemode_mismatch';
  elsif v_endpoint.stripe_account is distinct from v_event.stripe_account then
    v_result.status := 'ignored';
    v_result.reason := 'account_mismatch';
  end if;
  return v_result;
end $$;

-- Who takes an event that is tried again: if its endpoint is no longer meant for it, a live one that is.
create or replace function credits._endpoint_for(event credits.stripe_events)
returns text
language sql
stable
as $$
  select coalesce(case when (credits._gate(_endpoint_for.event)).reason is not null then (
           select p.endpoint
             from credits.stripe_endpoints p
            where p.mode = 'live' and p.stripe_account is not distinct from (_endpoint_for.event).stripe_account
              and coalesce(p.livemode = (_endpoint_for.event).livemode, true)
            order by p.endpoint
            limit 1) end, (_endpoint_for.event).endpoint)
$$;

-- A handler that fails is undone and leaves its error; one that lacks something is undone and leaves what; one in shadow
-- mode is undone and leaves what it did. What is left here survives, since variables are no part of the transaction.
create or replace function credits._try(
  notice credits.stripe_notice,
  shadow boolean
)
returns credits.event_verdict
language plpgsql
as $$
declare
  v_result  credits.event_verdict;
  v_handler text;
begin
  v_result.shadow := _try.shadow;
  select h.handler into v_handler from credits.stripe_handlers h where h.event_type = (_try.notice).type;
  if not found then
    v_result.status := 'ignored';
    v_result.reason := 'type_not_handled';
    return v_result;
  end if;
  begin
    execute format('select * from credits.%I($1)', v_handler)
       into v_result.status, v_result.reason, v_result.effects using _try.notice;
    if _try.shadow then
      raise exception using errcode = 'CRSHD', message = 'shadow';
    end if;
  exception
    when sqlstate 'CRSHD' then
      v_result.status := 'ignored';
      v_result.reason := 'shadow';
    when sqlstate 'CRPRK' then
      get stacked diagnostics v_result.waits_for = pg_exception_hint;
      v_result.status    := 'parked';
      v_result.reason    := sqlerrm;
      v_result.waits_for := nullif(v_result.waits_for, '');
      v_result.effects   := null;
    when serialization_failure or deadlock_detected or lock_not_available then
      v_result.status := 'failed';
      v_result.busy   := true;
      v_result.error  := format('%s %s', sqlstate, sqlerrm);
    when others then
      v_result.status := 'failed';
      v_result.error  := format('%s %s', sqlstate, sqlerrm);
  end;
  if v_result.shadow and v_result.status <> 'ignored' then
    v_result.effects   := jsonb_build_array(jsonb_strip_nulls(jsonb_build_object(
                            'effect', v_result.status, 'reason', v_result.reason, 'error', v_result.error)));
    v_result.status    := 'ignored';
    v_result.reason    := 'shadow';
    v_result.error     := null;
    v_result.waits_for := null;
  end if;
  return v_result;
end $$;

-- An event that met others at work is no worse for it: it is tried again at once, and that is no attempt. What came for an
-- account that is closed is left to a person at once: no account opens again.
create or replace function credits._close_event(
  event   credits.stripe_events,
  verdict credits.event_verdict,
  counts  integer
)
returns void
language plpgsql
as $$
declare
  v_result   credits.event_verdict := _close_event.verdict;
  v_attempts integer := (_close_event.event).attempts + case when v_result.busy then 0 else _close_event.counts end;
  v_open     boolean := v_result.status in ('parked', 'failed');
  v_dead     boolean := v_open and (v_attempts >= (credits._setting('stripe_event_max_attempts'))::integer
                                    or credits._is_of_closed(v_result.error));
  v_wait     interval := least(interval '1 minute' * 2 ^ least(greatest(v_attempts - 1, 0), 16),
                               (credits._setting('stripe_event_max_wait') #>> '{}')::interval);
begin
  update credits.stripe_events e
     set endpoint        = (_close_event.event).endpoint,
         status          = v_result.status,
         reason          = v_result.reason,
         error           = v_result.error,
         effects         = v_result.effects,
         waits_for       = v_result.waits_for,
         attempts        = v_attempts,
         applied_at      = case when v_result.status = 'applied' then coalesce(e.applied_at, credits.now()) end,
         next_attempt_at = case when v_open and not v_dead
                                then credits.now() + case when v_result.busy then interval '1 second' else v_wait end end
   where e.event_id = (_close_event.event).event_id;
  if v_dead then
    perform credits._notify(null, 'stripe_event_given_up', (_close_event.event).event_id, jsonb_build_object(
      'event_id', (_close_event.event).event_id, 'type', (_close_event.event).type, 'status', v_result.status,
      'reason', v_result.reason, 'error', v_result.error, 'attempts', v_attempts));
  end if;
end $$;

-- Parked events whose missing piece has come, and those that wait for what these make known. A delivery does some of them
-- itself; the others are due at once. Whoever else works on one has it already.
create or replace function credits._apply_waiting(notice credits.stripe_notice)
returns void
language plpgsql
as $$
declare
  v_known text[];
  v_tried text[] := array[]::text[];
  v_event credits.stripe_events;
begin
  if not exists (select from credits.stripe_events e where e.status = 'parked' and e.waits_for is not null) then
    return;
  end if;
  v_known := credits._known_by(_apply_waiting.notice);
  while cardinality(v_tried) < 20 loop
    select e.* into v_event
      from credits.stripe_events e
     where e.status = 'parked' and e.waits_for is not null and e.waits_for = any (v_known) and e.event_id <> all (v_tried)
     order by e.created_at, e.event_id
     limit 1
       for no key update skip locked;
    exit when not found;
    v_tried := v_tried || v_event.event_id;
    if credits._apply_stripe_event(v_event.event_id, woken => true) = 'applied' then
      v_known := v_known || credits._known_by(credits._shape_notice(v_event));
    end if;
  end loop;
  perform credits._wake(k) from unnest(v_known) k where k is not null and cardinality(v_tried) = 20;
end $$;

-- Events that wait for something are due at once; one that was given up begins anew.
create or replace function credits._wake(waits_for text)
returns void
language sql
as $$
  select credits._make_due(array(
    select e.event_id
      from credits.stripe_events e
     where e.status = 'parked' and e.waits_for is not null and e.waits_for = _wake.waits_for
       and coalesce(e.next_attempt_at > credits.now(), true)
       for no key update skip locked))
$$;

create or replace function credits._make_due(event_ids text[])
returns void
language sql
as $$
  update credits.stripe_events e
     set next_attempt_at = credits.now(),
         attempts        = case when e.next_attempt_at is null then 0 else e.attempts end
   where e.event_id = any (_make_due.event_ids)
$$;

-- What a parked event lacks, if it is something that can be asked for and is not known.
create or replace function credits._request_missing(waits_for text)
returns void
language sql
as $$
  select credits._request_object(split_part(_request_missing.waits_for, ':', 1), split_part(_request_missing.waits_for, ':', 2))
   where _request_missing.waits_for is not null
     and credits._snapshot(split_part(_request_missing.waits_for, ':', 1),
                           split_part(_request_missing.waits_for, ':', 2)) is null
$$;

-- Ends a handler whose event needs something that is not known. Its effects are undone and the event waits.
create or replace function credits._park(
  reason    text,
  waits_for text  default null,
  detail    jsonb default null
)
returns void
language plpgsql
as $$
begin
  raise exception using
    errcode = 'CRPRK', message = _park.reason, hint = coalesce(_park.waits_for, ''),
    detail = coalesce(_park.detail, '{}')::text;
end $$;

create or replace function credits._applied(
  effects jsonb default null,
  reason  text  default null
)
returns credits.handler_result
language sql
immutable
as $$
  select row('applied', _applied.reason, nullif(_applied.effects, '[]'))::credits.handler_result
$$;

create or replace function credits._ignored(reason text)
returns credits.handler_result
language sql
immutable
as $$
  select row('ignored', _ignored.reason, null)::credits.handler_result
$$;

-- One line of what an event did, for the operator.
create or replace function credits._effect(
  effect     text,
  account_id text,
  amount     numeric,
  more       jsonb default '{}'
)
returns jsonb
language sql
immutable
as $$
  select jsonb_build_object('effect', _effect.effect, 'account_id', _effect.account_id,
                            'amount', trim_scale(_effect.amount)) || _effect.more
$$;
