set local role credits_owner;
drop type credits.claimed_stripe_request;
drop table credits.stripe_queue_stop;
drop index credits.stripe_requests_in_flight, credits.stripe_requests_in_order;
alter table credits.stripe_requests drop column worker;
comment on column credits.stripe_requests.attempts is null;
comment on column credits.stripe_requests.locked_until is null;
comment on column credits.stripe_requests.stripe_version is null;
comment on column credits.stripe_requests.response is null;
