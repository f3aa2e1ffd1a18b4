-- Which deliveries a worker takes next, so that none waits long for one whose receiver answers late.

create or replace function credits.claim_notifications(
  max_rows integer default 10,
  worker   text    default null,
  channels text[]  default '{webhook,email}'
)
returns setof credits.claimed_delivery
language plpgsql
security definer
set search_path = pg_catalog, pg_temp
as $$
declare
  v_now      timestamptz := credits.now();
  v_until    timestamptz := v_now + (credits._setting('notification_lease') #>> '{}')::interval;
  v_delivery credits.notification_deliveries;
  v_message  credits.claimed_delivery;
begin
  perform credits._check_rows(claim_notifications.max_rows, 'max_rows');
  for v_delivery in
    select * from credits._take_deliveries(claim_notifications.max_rows, v_now, v_until, claim_notifications.worker,
                                           claim_notifications.channels)
  loop
    v_message := credits._compose(v_delivery);
    if v_message.delivery_id is null then
      delete from credits.notification_deliveries d where d.delivery_id = v_delivery.delivery_id;
    elsif v_message.address is null then
      perform credits._close_delivery(v_delivery, 'dead', null, 'There is no address to send it to.');
    elsif v_delivery.attempts > credits._setting('notification_max_attempts')::integer then
      perform credits._close_delivery(v_delivery, 'dead', v_delivery.last_status,
                                      coalesce(v_delivery.last_error, 'No worker came back with it.'));
    else
      return next v_message;
    end if;
  end loop;
end $$;
comment on function credits.claim_notifications(integer, text, text[]) is
'Notifications that are due, for a worker to send: they are its for notification_lease. Safe for many workers at once.

channels is what the worker can send: webhook, email. worker is its name, different from every other''s: a target that has
notification_target_places on their way under it comes after the others, so that one who answers late keeps nobody waiting
for long. Commit, send each outside of any transaction within the lease, and hand every outcome, also none, to
complete_notification with its attempt. A webhook is a POST of body to address, signed under message_id; an e-mail has
subject and body. message_id stays the same for every attempt and every target. What its worker did not bring back is
claimed again.
Errors: 400 invalid_request.';

-- Helpers ------------------------------------------------------------------------------------------------------------

-- The oldest that are due, of each target its share first. Those that a turn passed over may have kept others out of it; their
-- target has its share by then, so the next turn looks behind them. Places that nobody else wants go to whoever waits.
create or replace function credits._take_deliveries(
  max_rows integer,
  at       timestamptz,
  until    timestamptz,
  worker   text,
  channels text[]
)
returns setof credits.notification_deliveries
language plpgsql
as $$
declare
  v_share integer := greatest(credits._setting('notification_target_places')::integer, 1);
  v_left  integer := _take_deliveries.max_rows;
  v_taken integer;
begin
  while v_left > 0 loop
    return query
      with busy as (
        select s.channel, s.target, count(*) as places
          from credits.notification_deliveries s
         where s.state = 'sent' and s.locked_until > _take_deliveries.at
           and s.worker is not distinct from _take_deliveries.worker
         group by s.channel, s.target
      ), served as (
        select b.channel, b.target from busy b where b.places >= v_share
        union all  -- switched off: neither what was written meanwhile nor what nobody brought back goes out
        select 'webhook', e.name from credits.notification_endpoints e where not e.enabled
      ), waiting as (
        select w.*
          from unnest(_take_deliveries.channels) c (channel),
               lateral (select o.*
                          from credits.notification_deliveries o
                         where o.channel = c.channel and o.state = 'pending' and o.next_attempt_at <= _take_deliveries.at
                           and (o.channel, o.target) not in (select s.channel, s.target from served s)
                         order by o.next_attempt_at, o.delivery_id
                         limit v_left
                           for no key update skip locked) w
      ), lapsed as (
        select o.*
          from credits.notification_deliveries o
         where o.state = 'sent' and o.locked_until <= _take_deliveries.at and o.channel = any (_take_deliveries.channels)
           and (o.channel, o.target) not in (select s.channel, s.target from served s)
         order by o.next_attempt_at, o.delivery_id
         limit v_left
           for no key update skip locked
      ), due as (
        select w.* from waiting w
        union all
        select l.* from lapsed l
        order by next_attempt_at, delivery_id
        limit v_left
      ), placed as (
        select u.delivery_id,
               coalesce(b.places, 0) + row_number() over (
                 partition by u.channel, u.target order by u.next_attempt_at, u.delivery_id) as place
          from due u
          left join busy b on b.channel = u.channel and b.target = u.target
      )
      update credits.notification_deliveries d
         set state = 'sent', attempts = d.attempts + 1, worker = _take_deliveries.worker, locked_until = _take_deliveries.until
        from placed p
       where d.delivery_id = p.delivery_id and (p.place <= v_share) is not false
      returning d.*;
    get diagnostics v_taken = row_count;
    v_left  := v_left - v_taken;
    if v_taken = 0 then
      exit when v_share is null;
      v_share := null;
    end if;
  end loop;
end $$;
