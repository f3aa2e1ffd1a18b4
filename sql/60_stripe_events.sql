-- Stripe events: stored once, applied once, kept whatever becomes of them.
-- Keeps invariant 8: the row and its effect commit together. Lock order: the event row first, then the account.

create or replace function credits.receive_stripe_event(
  endpoint text,
  payload  text
)
returns credits.stripe_event_result
language plpgsql
security definer
set search_path = pg_catalog, pg_temp
as $$
declare
  v_event jsonb;
  v_id    text;
begin
  perform credits._check_key(receive_stripe_event.endpoint, 'endpoint', 200);
  v_event := credits._read_payload(receive_stripe_event.payload);
  v_id    := coalesce(nullif(v_event ->> 'id', ''),
                      'sha256:' || encode(sha256(convert_to(receive_stripe_event.payload, 'UTF8')), 'hex'));

  insert into credits.stripe_events (event_id, endpoint, type, livemode, api_version, stripe_account, created_at,
    received_at, payload)
  select v_id, receive_stripe_event.endpoint, s.type, s.livemode, s.api_version, s.stripe_account, s.created_at,
         credits.now(), receive_stripe_event.payload
    from credits._shape_event(v_event) s
  on conflict on constraint stripe_events_pkey do nothing;

  return row(v_id, credits._apply_stripe_event(v_id))::credits.stripe_event_result;
end $$;
comment on function credits.receive_stripe_event(text, text) is
'Stores an event that Stripe delivered, once, and applies it in the same transaction.

endpoint is the label of the webhook endpoint whose secret signed it, payload the raw text of the body. outcome is applied,
duplicate (done before), ignored (nothing to do for this type or state), parked (something that it needs is not known; it
changed nothing) or failed (kept with its error). Whatever the outcome, the event is safe: answer 2xx. A parked or failed
event that is delivered again is tried again.
Errors: 400 invalid_request, for a text that is not a JSON object.';

create or replace function credits.replay_stripe_event(event_id text)
returns credits.stripe_event_result
language plpgsql
security definer
set search_path = pg_catalog, pg_temp
as $$
begin
  if not exists (select from credits.stripe_events e where e.event_id = replay_stripe_event.event_id) then
    perform credits._fail(404, 'event_not_found', jsonb_build_object('event_id', replay_stripe_event.event_id));
  end if;
  return row(replay_stripe_event.event_id,
             credits._apply_stripe_event(replay_stripe_event.event_id, again => true))::credits.stripe_event_result;
end $$;
comment on function credits.replay_stripe_event(text) is
'Applies a stored event again. What it did before it does not do twice, so this is safe for any event.
Errors: 404 event_not_found.';

create or replace function credits.list_stripe_events(
  status   text        default null,
  type     text        default null,
  before   timestamptz default null,
  max_rows integer     default 50
)
returns setof credits.stripe_event_summary
language sql
stable
security definer
set search_path = pg_catalog, pg_temp
as $$
  select e.event_id, e.endpoint, e.type, e.status, e.reason, e.error, e.attempts, e.next_attempt_at, e.created_at,
         e.received_at, e.applied_at
    from credits.stripe_events e
   where (list_stripe_events.status is null or e.status = list_stripe_events.status)
     and (list_stripe_events.type is null or e.type = list_stripe_events.type)
     and e.received_at < coalesce(list_stripe_events.before, 'infinity')
   order by e.received_at desc, e.event_id
   limit least(coalesce(list_stripe_events.max_rows, 50), 1000)
$$;
comment on function credits.list_stripe_events(text, text, timestamptz, integer) is
'The events received, the latest first, with what became of them. Page on with before = the last received_at seen.';

-- Helpers ------------------------------------------------------------------------------------------------------------

-- jsonb holds no NUL character and no half of a surrogate pair: they become the replacement character in what we read,
-- never in what we keep. An object that cannot be read even so is an empty one, which is stored and fails visibly.
create or replace function credits._read_payload(payload text)
returns jsonb
language plpgsql
immutable
as $$
begin
  if json_typeof(_read_payload.payload::json) is distinct from 'object' then
    return credits._fail_payload();
  end if;
  begin
    return _read_payload.payload::jsonb;
  exception when data_exception then
    return regexp_replace(replace(_read_payload.payload, '\u0000', '\ufffd'),
      '\\ud[89ab][0-9a-f]{2}(?!\\ud[c-f][0-9a-f]{2})|(?<!\\ud[89ab][0-9a-f]{2})\\ud[c-f][0-9a-f]{2}',
      '\\ufffd', 'gi')::jsonb;
  end;
exception
  when invalid_text_representation or statement_too_complex then
    return credits._fail_payload();
  when data_exception then
    return '{}'::jsonb;
end $$;

create or replace function credits._fail_payload()
returns jsonb
language plpgsql
as $$
begin
  perform credits._fail(400, 'invalid_request', jsonb_build_object('argument', 'payload'),
    'The payload is a JSON object, as Stripe sent it.');
  return null;
end $$;

-- A handler that fails is undone and leaves its error; one that lacks something is undone and leaves the reason.
create or replace function credits._apply_stripe_event(
  event_id text,
  again    boolean default false
)
returns text
language plpgsql
as $$
declare
  v_event   credits.stripe_events;
  v_handler text;
  v_status  text;
  v_reason  text;
  v_error   text;
begin
  select e.* into v_event
    from credits.stripe_events e
   where e.event_id = _apply_stripe_event.event_id
     and (e.status in ('received', 'parked', 'failed') or _apply_stripe_event.again)
     for no key update;
  if not found then
    return 'duplicate';
  end if;

  select h.handler into v_handler from credits.stripe_handlers h where h.event_type = v_event.type;
  if v_event.type is null then
    v_status := 'failed';
    v_error  := 'The payload cannot be read: it has no type.';
  elsif v_handler is null then
    v_status := 'ignored';
    v_reason := 'type_not_handled';
  else
    begin
      execute format('select * from credits.%I($1)', v_handler) into v_status, v_reason using v_event;
    exception
      when sqlstate 'CRPRK' then
        v_status := 'parked';
        v_reason := sqlerrm;
      when others then
        v_status := 'failed';
        v_error  := format('%s %s', sqlstate, sqlerrm);
    end;
  end if;

  update credits.stripe_events e
     set status          = v_status,
         reason          = v_reason,
         error           = v_error,
         attempts        = e.attempts + 1,
         applied_at      = case when v_status = 'applied' then coalesce(e.applied_at, credits.now()) end,
         next_attempt_at = case when v_status in ('parked', 'failed')
                                then credits.now() + interval '1 minute' * 2 ^ least(e.attempts, 8) end
   where e.event_id = v_event.event_id;
  return v_status;
end $$;

-- Ends a handler whose event needs something that is not known. Its effects are undone and the event waits.
create or replace function credits._park(
  reason text,
  detail jsonb default null
)
returns void
language plpgsql
as $$
begin
  raise exception using
    errcode = 'CRPRK', message = _park.reason, detail = coalesce(_park.detail, '{}')::text;
end $$;
