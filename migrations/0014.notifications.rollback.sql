set local role credits_owner;
drop type credits.low_balance_result, credits.delivery_result, credits.claimed_delivery, credits.notification_summary,
  credits.notification_endpoint_result, credits.notification_target;
drop index credits.grants_ending;
alter table credits.grants drop column end_told;
alter table credits.balances drop column low_at, drop column is_low;
drop table credits.notification_deliveries, credits.notification_endpoints, credits.notification_kinds,
  credits.notification_texts;
drop index credits.notifications_by_account;
comment on column credits.notifications.type is null;
