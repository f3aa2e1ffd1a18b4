-- Delivery of notifications: what becomes of each. A worker claims what is due (83_notification_claims.sql), sends it outside of
-- any transaction, and brings back what came of it. At least once: what its worker did not bring back is sent again after its
-- lease, under the same message id.

insert into credits.settings as s (name, value, summary) values
  ('notification_lease', '"2 minutes"', 'How long a worker may take over a notification before another one sends it again.'),
  ('notification_max_attempts', '12', 'How often a notification is sent to one target before it is given up.'),
  ('notification_target_places', '3', 'How many of the places of a worker one target may take while others wait.'),
  ('notifications_keep', '"90 days"', 'How long notifications are kept that nobody waits for.')
on conflict (name) do update set summary = excluded.summary;

create or replace function credits.complete_notification(
  delivery_id bigint,
  status      integer,
  answer      text    default null,
  attempt     integer default null
)
returns credits.delivery_result
language plpgsql
security definer
set search_path = pg_catalog, pg_temp
as $$
declare
  v_delivery credits.notification_deliveries;
  v_state    text;
begin
  select d.* into v_delivery
    from credits.notification_deliveries d
   where d.delivery_id = complete_notification.delivery_id
     for no key update;
  if not found then
    perform credits._fail(404, 'delivery_not_found', jsonb_build_object('delivery_id', complete_notification.delivery_id));
  end if;
  v_state := credits._judge_delivery(v_delivery, complete_notification.status);
  if v_delivery.state = 'delivered' or v_state <> 'delivered'
     and (v_delivery.state <> 'sent' or complete_notification.attempt < v_delivery.attempts) then
    return credits._delivery_result(v_delivery);  -- the answer of an attempt that is no longer waited for
  end if;
  return credits._delivery_result(credits._close_delivery(
    v_delivery, v_state, complete_notification.status, complete_notification.answer));
end $$;
comment on function credits.complete_notification(bigint, integer, text, integer) is
'Takes what became of a delivery: its HTTP or SMTP status, null if there was none, and what was answered or went wrong.

2xx: delivered. 410 of a webhook and 5xx of a mail server: dead, for good. All else, redirects among it: sent again after 5 s,
30 s, 2 min, 10 min, 1 h, 3 h, 6 h, 12 h, then every day, each up to a fifth longer; after notification_max_attempts it is dead. What
is dead is told as notification_given_up, and sent again by replay_notification or retry_notifications. Of the answer 500
characters are kept. attempt is that of the claim: a late failure changes nothing, a late success counts.
Errors: 404 delivery_not_found.';

create or replace function credits.replay_notification(
  notification_id bigint,
  target          text default null
)
returns setof credits.delivery_result
language plpgsql
security definer
set search_path = pg_catalog, pg_temp
as $$
declare
  v_told credits.notifications;
begin
  select n.* into v_told from credits.notifications n where n.notification_id = replay_notification.notification_id;
  if not found then
    perform credits._fail(404, 'notification_not_found',
      jsonb_build_object('notification_id', replay_notification.notification_id));
  end if;
  perform credits._address(v_told, replay_notification.target);
  return query
    select (credits._delivery_result(credits._reopen_delivery(d))).*
      from credits.notification_deliveries d
     where d.notification_id = v_told.notification_id
       and (replay_notification.target is null or d.target = replay_notification.target)
       and credits._is_heard(d, v_told)
     order by d.delivery_id;
end $$;
comment on function credits.replay_notification(bigint, text) is
'Sends a notification again, whatever became of it, to all who are to hear of it now.

Those are the endpoints and the settings of e-mails as they are now. target limits it to one endpoint, or to customer or
operator, who get e-mails. What is on its way already stays so. The message id is that of the first time, so
a receiver that remembers ids sees that it is the same.
Errors: 404 notification_not_found.';

create or replace function credits.retry_notifications(
  target   text,
  max_rows integer default 1000
)
returns integer
language plpgsql
security definer
set search_path = pg_catalog, pg_temp
as $$
declare
  v_count integer;
begin
  perform credits._check_key(retry_notifications.target, 'target');
  perform credits._check_rows(retry_notifications.max_rows, 'max_rows');
  with dead as (
    select d.*
      from credits.notification_deliveries d
     where d.state = 'dead' and d.target = retry_notifications.target
     order by d.delivery_id
     limit retry_notifications.max_rows
       for no key update skip locked
  )
  select count(credits._reopen_delivery(d)) into v_count from dead d;
  return v_count;
end $$;
comment on function credits.retry_notifications(text, integer) is
'Sends the dead deliveries of one target again, the oldest first; answers how many.

target is the name of an endpoint, or customer or operator, who get e-mails. Call it until it answers 0.
Errors: 400 invalid_request.';

create or replace function credits.purge_notifications(max_rows integer default 1000)
returns integer
language plpgsql
security definer
set search_path = pg_catalog, pg_temp
as $$
declare
  v_before timestamptz := credits.now() - (credits._setting('notifications_keep') #>> '{}')::interval;
  v_count  integer;
begin
  perform credits._check_rows(purge_notifications.max_rows, 'max_rows');
  delete from credits.notifications n
   where n.notification_id in (
     select o.notification_id
       from credits.notifications o
      where o.created_at < v_before
        and not exists (select from credits.notification_deliveries d
                         where d.notification_id = o.notification_id and d.state <> 'delivered')
      order by o.notification_id
      limit purge_notifications.max_rows
        for update skip locked);
  get diagnostics v_count = row_count;
  return v_count;
end $$;
comment on function credits.purge_notifications(integer) is
'Deletes notifications older than notifications_keep that nobody waits for; answers how many.

A job calls it until it answers 0. What is not delivered stays, dead or not.
Errors: 400 invalid_request.';

-- Helpers ------------------------------------------------------------------------------------------------------------

create or replace function credits._judge_delivery(
  delivery credits.notification_deliveries,
  status   integer
)
returns text
language sql
stable
as $$
  select case
    when _judge_delivery.status between 200 and 299                                                   then 'delivered'
    when _judge_delivery.status = 410 and (_judge_delivery.delivery).channel = 'webhook'              then 'dead'
    when _judge_delivery.status between 500 and 599 and (_judge_delivery.delivery).channel = 'email'  then 'dead'
    when (_judge_delivery.delivery).attempts
         >= credits._setting('notification_max_attempts')::integer                                    then 'dead'
    else                                                                                                   'pending' end
$$;

create or replace function credits._close_delivery(
  delivery credits.notification_deliveries,
  state    text,
  status   integer,
  answer   text
)
returns credits.notification_deliveries
language plpgsql
as $$
declare
  v_delivery credits.notification_deliveries := _close_delivery.delivery;
  v_wait     interval := (array[5, 30, 120, 600, 3600, 10800, 21600, 43200, 86400])[least(v_delivery.attempts, 9)]
                         * (100 + v_delivery.delivery_id % 21) / 100.0 * interval '1 second';
begin
  update credits.notification_deliveries d
     set state           = _close_delivery.state,
         next_attempt_at = case when _close_delivery.state <> 'pending' then d.next_attempt_at
                                else credits._send_at(d.channel, d.target, credits.now() + v_wait) end,
         locked_until    = null,
         last_status     = _close_delivery.status,
         last_error      = case when _close_delivery.state <> 'delivered' then left(_close_delivery.answer, 500) end,
         finished_at     = case when _close_delivery.state <> 'pending' then credits.now() end
   where d.delivery_id = v_delivery.delivery_id
  returning d.* into v_delivery;
  if v_delivery.state = 'dead' then
    perform credits._tell_dead(v_delivery);
  end if;
  return v_delivery;
end $$;

-- Told once a day and target, and never of itself: an endpoint that is gone must not fill the outbox.
create or replace function credits._tell_dead(delivery credits.notification_deliveries)
returns void
language sql
as $$
  select credits._notify(null, 'notification_given_up', concat_ws(':', d.channel, d.target, (credits.now() at time zone 'UTC')::date),
           jsonb_build_object('notification_id', n.notification_id, 'kind', n.type, 'channel', d.channel, 'target', d.target,
                              'status', d.last_status, 'error', d.last_error))
    from (select (_tell_dead.delivery).*) d
    join credits.notifications n on n.notification_id = d.notification_id
   where n.type <> 'notification_given_up'
$$;

-- All over again, unless it is on its way.
create or replace function credits._reopen_delivery(delivery credits.notification_deliveries)
returns credits.notification_deliveries
language plpgsql
as $$
declare
  v_delivery credits.notification_deliveries;
begin
  update credits.notification_deliveries d
     set state = 'pending', attempts = 0, finished_at = null,
         next_attempt_at = credits._send_at(d.channel, d.target, credits.now())
   where d.delivery_id = (_reopen_delivery.delivery).delivery_id and d.state <> 'sent'
  returning d.* into v_delivery;
  return case when found then v_delivery else _reopen_delivery.delivery end;
end $$;

-- What goes to an endpoint that is switched off waits until it is on again. Its row is locked until that is committed: who
-- switches it on must find all that waits.
create or replace function credits._send_at(
  channel text,
  target  text,
  at      timestamptz
)
returns timestamptz
language plpgsql
as $$
begin
  perform
    from credits.notification_endpoints e
   where _send_at.channel = 'webhook' and e.name = _send_at.target and not e.enabled
     for share;
  return case when found then 'infinity' else _send_at.at end;
end $$;

create or replace function credits._delivery_result(delivery credits.notification_deliveries)
returns credits.delivery_result
language sql
immutable
as $$
  select row(d.delivery_id, d.notification_id, d.channel, d.target, d.state, d.attempts, nullif(d.next_attempt_at, 'infinity'),
             d.last_status, d.last_error)::credits.delivery_result
    from (select (_delivery_result.delivery).*) d
$$;
