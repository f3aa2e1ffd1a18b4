-- Stripe events: stored once, applied once, kept whatever becomes of them.
-- Keeps invariant 8: the row and its effect commit together. Lock order: the event row first, then what its handler locks.

insert into credits.settings as s (name, value, summary) values
  ('stripe_event_max_attempts', '20', 'How often an event that fails or is parked is tried before it is left to a person.'),
  ('stripe_event_max_wait', '"4 hours"', 'The longest wait between two attempts; the first is a minute, and each doubles.')
on conflict (name) do update set summary = excluded.summary;

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
  v_id    := coalesce(credits._event_id(v_event),
                      'sha256:' || encode(sha256(convert_to(receive_stripe_event.payload, 'UTF8')), 'hex'));

  insert into credits.stripe_events as e (event_id, endpoint, type, livemode, api_version, stripe_account, created_at,
    object_id, received_at, payload)
  select v_id, receive_stripe_event.endpoint, s.type, s.livemode, s.api_version, s.stripe_account, s.created_at,
         s.object_id, credits.now(), receive_stripe_event.payload
    from credits._shape_event(v_event) s
  -- What another endpoint turned away may be meant for this one. What one saw in shadow mode waits for it to be live.
  on conflict on constraint stripe_events_pkey do update
    set endpoint = excluded.endpoint, status = 'received', reason = null, payload = excluded.payload, archived_at = null
    where e.endpoint <> excluded.endpoint and e.status = 'ignored'
      and (e.reason in ('livemode_mismatch', 'account_mismatch')
           or e.reason = 'shadow' and (credits._gate(excluded)).status is null);

  return row(v_id, credits._apply_stripe_event(v_id))::credits.stripe_event_result;
end $$;
comment on function credits.receive_stripe_event(text, text) is
'Stores an event that Stripe delivered, once, and applies it in the same transaction.

endpoint is the label of the webhook endpoint whose secret signed it, payload the raw text of the body. outcome is applied,
duplicate (done before), ignored (nothing to do for this type, state, livemode or account, or the endpoint is in shadow
mode), parked (something that it needs is not known; it changed nothing and is tried again as soon as that becomes known)
or failed (kept with its error, and retried). Whatever the outcome, the event is safe: answer 2xx.
Errors: 400 invalid_request, for a text that is not a JSON object.';

create or replace function credits.replay_stripe_event(event_id text)
returns credits.stripe_event_result
language plpgsql
security definer
set search_path = pg_catalog, pg_temp
as $$
declare
  v_archived_at timestamptz;
begin
  select e.archived_at into v_archived_at from credits.stripe_events e where e.event_id = replay_stripe_event.event_id;
  if not found then
    perform credits._fail(404, 'event_not_found', jsonb_build_object('event_id', replay_stripe_event.event_id));
  elsif v_archived_at is not null then
    perform credits._fail(410, 'event_archived',
      jsonb_build_object('event_id', replay_stripe_event.event_id, 'archived_at', v_archived_at),
      'Its payload is gone; Stripe may still have it.');
  end if;
  return row(replay_stripe_event.event_id,
             credits._apply_stripe_event(replay_stripe_event.event_id, again => true))::credits.stripe_event_result;
end $$;
comment on function credits.replay_stripe_event(text) is
'Applies a stored event again. What it did before it does not do twice, so this is safe for any event.

An event that was recorded in shadow mode is applied once its endpoint is live.
Errors: 404 event_not_found, 410 event_archived.';

create or replace function credits.process_stripe_events(max_events integer default 100)
returns setof credits.stripe_event_result
language plpgsql
security definer
set search_path = pg_catalog, pg_temp
as $$
declare
  v_id text;
begin
  perform credits._check_rows(process_stripe_events.max_events, 'max_events', 10000);
  for v_id in
    select e.event_id
      from credits.stripe_events e
     where e.status in ('parked', 'failed') and e.next_attempt_at <= credits.now()
     order by e.next_attempt_at, e.event_id
     limit process_stripe_events.max_events
       for no key update skip locked
  loop
    return next row(v_id, credits._apply_stripe_event(v_id))::credits.stripe_event_result;
  end loop;
end $$;
comment on function credits.process_stripe_events(integer) is
'Tries the parked and failed events again whose time has come, the longest due first.

Several workers may call it at once; each event is taken by one. max_events is 1 to 10000, 100 by default. An event that
fails stripe_event_max_attempts times stays as it is, with a notification: fix the cause and replay it.
Errors: 400 invalid_request.';

create or replace function credits.archive_stripe_events(
  older_than interval default '90 days',
  max_events integer  default 10000
)
returns bigint
language plpgsql
security definer
set search_path = pg_catalog, pg_temp
as $$
declare
  v_archived bigint;
begin
  if (archive_stripe_events.older_than >= interval '0') is not true
     or (archive_stripe_events.max_events between 1 and 1000000) is not true then
    perform credits._fail(400, 'invalid_request', jsonb_build_object('argument', 'older_than, max_events'),
      'older_than is an interval, max_events from 1 to 1000000.');
  end if;
  with old as (
    select e.event_id
      from credits.stripe_events e
     where e.received_at < credits.now() - archive_stripe_events.older_than
       and e.status in ('applied', 'ignored') and e.archived_at is null
     order by e.received_at
     limit archive_stripe_events.max_events
       for no key update skip locked
  )
  update credits.stripe_events e
     set payload = null, archived_at = credits.now()
    from old o
   where e.event_id = o.event_id;
  get diagnostics v_archived = row_count;
  return v_archived;
end $$;
comment on function credits.archive_stripe_events(interval, integer) is
'Drops the payload of events that are done and were received longer ago; answers how many.

Their ids are kept for ever, so a late delivery is still a duplicate. Events that are parked or failed stay whole. It does
at most max_events at a time; call it again while it answers that many.
Errors: 400 invalid_request.';

create or replace function credits.set_stripe_endpoint(
  endpoint       text,
  mode           text    default 'live',
  livemode       boolean default null,
  stripe_account text    default null
)
returns credits.stripe_endpoints
language plpgsql
security definer
set search_path = pg_catalog, pg_temp
as $$
declare
  v_endpoint credits.stripe_endpoints;
begin
  perform credits._check_key(set_stripe_endpoint.endpoint, 'endpoint', 200);
  perform credits._check_word(coalesce(set_stripe_endpoint.mode, ''), 'mode', '{live,shadow}');
  insert into credits.stripe_endpoints as e (endpoint, mode, livemode, stripe_account, updated_at)
  values (set_stripe_endpoint.endpoint, set_stripe_endpoint.mode, set_stripe_endpoint.livemode,
          set_stripe_endpoint.stripe_account, credits.now())
  on conflict on constraint stripe_endpoints_pkey do update
    set mode = excluded.mode, livemode = excluded.livemode, stripe_account = excluded.stripe_account,
        updated_at = excluded.updated_at
  returning e.* into v_endpoint;
  perform credits._reconnect(v_endpoint.stripe_account, credits.now()) where credits._is_disconnected(v_endpoint.stripe_account);
  return v_endpoint;
end $$;
comment on function credits.set_stripe_endpoint(text, text, boolean, text) is
'Says what is expected of a webhook endpoint, by its label.

mode live applies its events; shadow records in effects what each would have done and changes nothing, so that a team can
run beside an existing handler and then switch. livemode null takes test and live events alike; stripe_account is the
connected account whose events it takes, null the own one. Other events are stored as ignored. What lives in a connected account that
had taken away our access is asked about again from now on.
Errors: 400 invalid_request.';

create or replace function credits.list_stripe_events(
  status   text        default null,
  type     text        default null,
  before   timestamptz default null,
  max_rows integer     default 50
)
returns setof credits.stripe_event_summary
language plpgsql
stable
security definer
set search_path = pg_catalog, pg_temp
as $$
declare
  v_rows integer := credits._check_rows(coalesce(list_stripe_events.max_rows, 50), 'max_rows');
begin
  perform credits._check_word(list_stripe_events.status, 'status', '{received,applied,ignored,parked,failed}');
  return query
    select e.event_id, e.endpoint, e.type, e.status, e.reason, e.error, e.attempts, e.next_attempt_at, e.created_at,
           e.received_at, e.applied_at, e.object_id, e.waits_for, e.effects, e.archived_at
      from (select n.*
              from credits.stripe_events n
             where (list_stripe_events.status is null or n.status = list_stripe_events.status)
               and (list_stripe_events.type is null or n.type = list_stripe_events.type)
               and n.received_at < coalesce(list_stripe_events.before, 'infinity')
             order by n.received_at desc
             fetch first (v_rows) rows with ties) e
     order by e.received_at desc, e.event_id;
end $$;
comment on function credits.list_stripe_events(text, text, timestamptz, integer) is
'The events received, the latest first, with what became of them.

Page on with before = the last received_at seen. effects is what an event did; waits_for what a parked one lacks. One with
status parked or failed and no next_attempt_at was given up. max_rows is 1 to 1000, 50 by default; events that were received
at one moment come together, so that none is left between two pages.
Errors: 400 invalid_request.';

create or replace function credits.get_stripe_event(event_id text)
returns credits.stripe_events
language plpgsql
stable
security definer
set search_path = pg_catalog, pg_temp
as $$
declare
  v_event credits.stripe_events;
begin
  select e.* into v_event from credits.stripe_events e where e.event_id = get_stripe_event.event_id;
  if not found then
    perform credits._fail(404, 'event_not_found', jsonb_build_object('event_id', get_stripe_event.event_id));
  end if;
  return v_event;
end $$;
comment on function credits.get_stripe_event(text) is
'All that is kept of an event, its payload included, which is null once it is archived.
Errors: 404 event_not_found.';

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
    return regexp_replace(replace(_read_payload.payload, E'\\u0000', E'\\ufffd'),
      E'\\\\ud[89ab][0-9a-f]{2}(?!\\\\ud[c-f][0-9a-f]{2})|(?<!\\\\ud[89ab][0-9a-f]{2})\\\\ud[c-f][0-9a-f]{2}',
      E'\\\\ufffd', 'gi')::jsonb;
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
