-- Notifications: written in the transaction of their cause, once per cause.

create or replace function credits._notify(
  account_id text,
  type       text,
  key        text,
  data       jsonb default '{}'
)
returns void
language sql
as $$
  insert into credits.notifications (account_id, type, key, data, created_at)
  values (_notify.account_id, _notify.type, _notify.key, coalesce(_notify.data, '{}'), credits.now())
  on conflict on constraint notifications_one_per_cause do nothing
$$;
