set local role credits_owner;
comment on column credits.stripe_requests.stripe_account is null;
drop table credits.stripe_disconnections;
drop table credits.stripe_homes;
