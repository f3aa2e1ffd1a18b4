-- Notifications: written in the transaction of their cause, once per cause, with a delivery for each who is to hear of it.
-- How they get there is 83_notification_delivery.sql; what an e-mail says, 84_notification_texts.sql.

insert into credits.settings as s (name, value, summary) values
  ('customer_email', 'false',
   'Which kinds of notifications customers get by e-mail: true is all that are for customers, an array some, false none.'),
  ('operator_email', '""', 'The address that gets the notifications for the operator; empty is none.')
on conflict (name) do update set summary = excluded.summary;

with listed (kind, audience, summary) as (values
  ('low_balance',                     'customer', 'The balance fell below the account''s threshold. Once, until it was above again.'),
  ('credits_expiring',                'customer', 'A grant ends within expiring_soon_days and something is left of it.'),
  ('purchase_receipt',                'customer', 'A purchase is paid, and its credits are there.'),
  ('payment_failed',                  'customer', 'The payment of a purchase failed after all.'),
  ('refund',                          'customer', 'Money went back to the customer.'),
  ('top_up_done',                     'customer', 'An automatic top-up was paid, and its credits are there.'),
  ('top_up_failed',                   'customer', 'An automatic top-up could not be paid.'),
  ('top_up_action_required',          'customer', 'The bank wants the customer to confirm an automatic top-up.'),
  ('top_up_paused',                   'customer', 'Automatic top-up stopped: the card, a refund or a dispute. data has the reason.'),
  ('top_up_refused',                  'customer', 'An automatic top-up was due, but a cap or the package does not allow it.'),
  ('top_up_started',                  'product',  'An automatic top-up is on its way.'),
  ('top_up_resumed',                  'product',  'Automatic top-up goes on with another card.'),
  ('invoice_payment_failed',          'customer', 'The payment of a subscription''s invoice failed; Stripe tries again.'),
  ('invoice_payment_action_required', 'customer', 'The bank wants the customer to confirm the payment of an invoice.'),
  ('invoice_finalization_failed',     'operator', 'Stripe could not make an invoice final.'),
  ('invoice_overdue',                 'customer', 'An invoice was not paid in time.'),
  ('subscription_incomplete',         'product',  'A subscription waits for its first payment.'),
  ('subscription_started',            'product',  'A subscription began.'),
  ('subscription_canceling',          'product',  'A subscription ends with its period.'),
  ('subscription_resumed',            'product',  'A subscription goes on.'),
  ('subscription_past_due',           'product',  'A subscription was not paid; it may spend until the grace ends.'),
  ('subscription_recovered',          'product',  'A subscription that was past due is paid.'),
  ('subscription_stopped',            'product',  'A subscription is unpaid or paused.'),
  ('subscription_ended',              'product',  'A subscription is over.'),
  ('dispute',                         'operator', 'A customer''s bank disputes a payment, or the dispute went on.'),
  ('refund_failed',                   'operator', 'A refund did not reach the customer.'),
  ('job_failed',                      'operator', 'A job failed.'),
  ('booking_failed',                  'operator', 'What fell due on an account cannot be booked. Once a day and account.'),
  ('erasure_failed',                  'operator', 'What came in of an erased account cannot be erased. Once a day and account.'),
  ('audit_violation',                 'operator', 'The audit found an invariant violated. Once a day and invariant.'),
  ('stripe_gaps_found',               'operator', 'Stripe has payments or refunds that never arrived here.'),
  ('reconciliation_failed',           'operator', 'A look at what Stripe has could not be ended.'),
  ('stripe_event_given_up',           'operator', 'An event of Stripe could not be applied and is not tried again.'),
  ('stripe_key_refused',              'operator', 'Stripe refuses our key; nothing is sent until it is right.'),
  ('stripe_account_disconnected',     'operator', 'A connected account took away our access; what lives there is not asked about any more.'),
  ('stripe_request_failed',           'operator', 'Stripe refused a request.'),
  ('stripe_request_given_up',         'operator', 'A request to Stripe had no answer that helps, and is not sent again.'),
  ('stripe_request_unknown',          'operator', 'Nobody knows whether Stripe did what it was asked. Look there, then decide.'),
  ('notification_given_up',           'operator', 'A notification could not be delivered. At most once a day and target.')
), kept as (
  insert into credits.notification_kinds as k (kind, audience, summary)
  select l.kind, l.audience, l.summary from listed l
  on conflict (kind) do update set audience = excluded.audience, summary = excluded.summary
)
delete from credits.notification_kinds k where k.kind not in (select l.kind from listed l);

create or replace function credits.set_notification_endpoint(
  name       text,
  url        text,
  kinds      text[]  default null,
  enabled    boolean default true,
  account_id text    default null
)
returns credits.notification_endpoint_result
language plpgsql
security definer
set search_path = pg_catalog, pg_temp
as $$
begin
  perform credits._check_endpoint(set_notification_endpoint.name, set_notification_endpoint.url,
                                  set_notification_endpoint.kinds);
  perform credits._account(set_notification_endpoint.account_id) where set_notification_endpoint.account_id is not null;
  insert into credits.notification_endpoints as e (name, url, kinds, enabled, account_id, created_at, updated_at)
  values (set_notification_endpoint.name, set_notification_endpoint.url, set_notification_endpoint.kinds,
          coalesce(set_notification_endpoint.enabled, true), set_notification_endpoint.account_id, credits.now(), credits.now())
  on conflict on constraint notification_endpoints_pkey do update
    set url = excluded.url, kinds = excluded.kinds, enabled = excluded.enabled, account_id = excluded.account_id,
        updated_at = excluded.updated_at;
  delete from credits.notification_deliveries d
   using credits.notification_endpoints e, credits.notifications n
   where d.channel = 'webhook' and d.target = set_notification_endpoint.name and d.state = 'pending' and e.name = d.target
     and n.notification_id = d.notification_id and not credits._hears(e, n);
  update credits.notification_deliveries d
     set next_attempt_at = credits._send_at(d.channel, d.target, credits.now())
   where d.channel = 'webhook' and d.target = set_notification_endpoint.name and d.state = 'pending'
     and (d.next_attempt_at = 'infinity') = coalesce(set_notification_endpoint.enabled, true);
  return credits._endpoint_result(set_notification_endpoint.name);
end $$;
comment on function credits.set_notification_endpoint(text, text, text[], boolean, text) is
'Makes an endpoint what the arguments say: where notifications are sent as signed webhooks, from now on.

name is lower case letters, digits and _, and names its secret, PGCREDITS_NOTIFY_SECRET_<NAME> in the worker''s environment. url
is https, or http on this machine (localhost, 127.0.0.1). kinds are those it gets, null is all; account_id is the one account
that it hears of, null is all; what waits and is no longer for it is not sent. While enabled is false its deliveries are kept,
and sent when it is true again.
Errors: 400 invalid_request, 404 account_not_found.';

create or replace function credits.remove_notification_endpoint(name text)
returns boolean
language plpgsql
security definer
set search_path = pg_catalog, pg_temp
as $$
begin
  delete from credits.notification_endpoints e where e.name = remove_notification_endpoint.name;
  if not found then
    return false;
  end if;
  delete from credits.notification_deliveries d
   where d.channel = 'webhook' and d.target = remove_notification_endpoint.name and d.state <> 'delivered';
  return true;
end $$;
comment on function credits.remove_notification_endpoint(text) is
'Forgets an endpoint and what was not yet delivered to it. Answers whether there was one.
Errors: none.';

create or replace function credits.list_notification_endpoints()
returns setof credits.notification_endpoint_result
language sql
stable
security definer
set search_path = pg_catalog, pg_temp
as $$
  select r.*
    from credits.notification_endpoints e, lateral credits._endpoint_result(e.name) r
   order by e.name
$$;
comment on function credits.list_notification_endpoints() is
'The endpoints, and how many of their deliveries wait and how many are dead. Their secrets are not in the database.
Errors: none.';

create or replace function credits.list_notifications(
  state      text    default null,
  kind       text    default null,
  account_id text    default null,
  before     bigint  default null,
  max_rows   integer default 50
)
returns setof credits.notification_summary
language plpgsql
stable
security definer
set search_path = pg_catalog, pg_temp
as $$
begin
  perform credits._check_rows(list_notifications.max_rows, 'max_rows');
  perform credits._check_word(list_notifications.state, 'state', '{pending,sent,delivered,dead}');
  return query
    select n.notification_id, n.type, coalesce(k.audience, 'operator'), n.account_id, n.key, n.data, n.created_at,
           (select coalesce(jsonb_agg(to_jsonb(credits._delivery_result(d)) - 'notification_id' order by d.delivery_id), '[]')
              from credits.notification_deliveries d where d.notification_id = n.notification_id)
      from credits.notifications n
      left join credits.notification_kinds k on k.kind = n.type
     where n.notification_id < coalesce(list_notifications.before, 9223372036854775807)
       and (list_notifications.kind is null or n.type = list_notifications.kind)
       and (list_notifications.account_id is null or n.account_id = list_notifications.account_id)
       and (list_notifications.state is null or n.notification_id in (
             select d.notification_id from credits.notification_deliveries d where d.state = list_notifications.state))
     order by n.notification_id desc
     limit list_notifications.max_rows;
end $$;
comment on function credits.list_notifications(text, text, text, bigint, integer) is
'The notifications, the latest first, each with its deliveries.

state keeps those with a delivery that is pending, sent (on its way), delivered or dead. Page on with before = the last
notification_id seen. max_rows is 1 to 1000, 50 by default.
Errors: 400 invalid_request.';

-- Helpers ------------------------------------------------------------------------------------------------------------

create or replace function credits._notify(
  account_id text,
  type       text,
  key        text,
  data       jsonb default '{}'
)
returns void
language plpgsql
as $$
declare
  v_told credits.notifications;
begin
  insert into credits.notifications as n (account_id, type, key, data, created_at)
  values (_notify.account_id, _notify.type, _notify.key, coalesce(_notify.data, '{}'), credits.now())
  on conflict on constraint notifications_one_per_cause do nothing
  returning n.* into v_told;
  if found then
    perform credits._address(v_told);
  end if;
end $$;

-- What a job could not do for one account, once a day: it goes on with the others.
create or replace function credits._notify_failure(
  type       text,
  account_id text,
  error      text,
  sqlstate   text
)
returns void
language sql
as $$
  select credits._notify(_notify_failure.account_id, _notify_failure.type,
    concat_ws(':', _notify_failure.type, _notify_failure.account_id, (credits.now() at time zone 'UTC')::date),
    jsonb_build_object('error', _notify_failure.error, 'sqlstate', _notify_failure.sqlstate))
$$;

-- A delivery for everybody who is to hear of it now.
create or replace function credits._address(
  notification credits.notifications,
  target       text default null
)
returns void
language sql
as $$
  insert into credits.notification_deliveries (notification_id, channel, target, next_attempt_at)
  select (_address.notification).notification_id, t.channel, t.target, credits._send_at(t.channel, t.target, credits.now())
    from credits._targets(_address.notification) t
   where _address.target is null or t.target = _address.target
  on conflict on constraint deliveries_one_per_target do nothing
$$;

-- Who is to hear of it: the endpoints that want to, and by e-mail those whom its kind is for. A kind that nobody has listed
-- is the operator's.
create or replace function credits._targets(notification credits.notifications)
returns setof credits.notification_target
language sql
stable
as $$
  select 'webhook', e.name
    from credits.notification_endpoints e
   where credits._hears(e, _targets.notification)
  union all
  select 'email', 'customer'
    from credits.notification_kinds k
    join credits.accounts a on a.account_id = (_targets.notification).account_id
   where k.kind = (_targets.notification).type and k.audience = 'customer' and a.email <> ''
     and credits._is_mailed('customer', k.kind)
  union all
  select 'email', 'operator'
   where credits._is_mailed('operator', (_targets.notification).type)
     and coalesce((select k.audience from credits.notification_kinds k where k.kind = (_targets.notification).type),
                  'operator') = 'operator'
$$;

-- As the endpoint is now: asked when something is told, again before each time it is sent, and when it is replayed.
create or replace function credits._hears(
  endpoint     credits.notification_endpoints,
  notification credits.notifications
)
returns boolean
language sql
immutable
as $$
  select ((_hears.endpoint).kinds is null or (_hears.notification).type = any ((_hears.endpoint).kinds))
     and ((_hears.endpoint).account_id is null
          or (_hears.endpoint).account_id is not distinct from (_hears.notification).account_id)
$$;

create or replace function credits._check_endpoint(
  name  text,
  url   text,
  kinds text[]
)
returns void
language plpgsql
stable
as $$
declare
  v_wrong text := case
    when (_check_endpoint.name ~ '^[a-z][a-z0-9_]{0,62}$' and _check_endpoint.name not in ('customer', 'operator')) is not true
      then 'name'
    when not credits._is_address(_check_endpoint.url)
         or _check_endpoint.url !~ E'^(https://|http://(localhost|127\\.[0-9.]+)([:/?#]|$))' then 'url'
    when cardinality(_check_endpoint.kinds) = 0
         or exists (select from unnest(_check_endpoint.kinds) u (kind)
                     where u.kind is null or u.kind not in (select k.kind from credits.notification_kinds k)) then 'kinds' end;
begin
  if v_wrong is not null then
    perform credits._fail(400, 'invalid_request', jsonb_build_object('argument', v_wrong),
      'name is lower case letters, digits and _, but not customer or operator; url is https, or http on this machine; '
      'kinds are some of those in notification_kinds.');
  end if;
end $$;

create or replace function credits._endpoint_result(name text)
returns credits.notification_endpoint_result
language sql
stable
as $$
  select row(e.name, e.url, e.kinds, e.account_id, e.enabled,
             count(d.delivery_id) filter (where d.state in ('pending', 'sent')),
             count(d.delivery_id) filter (where d.state = 'dead'))::credits.notification_endpoint_result
    from credits.notification_endpoints e
    left join credits.notification_deliveries d
      on d.channel = 'webhook' and d.target = e.name and d.state in ('pending', 'sent', 'dead')
   where e.name = _endpoint_result.name
   group by e.name
$$;
