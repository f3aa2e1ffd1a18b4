set local role credits_owner;
drop index credits.stripe_events_in_shadow;
comment on column credits.stripe_requests.purpose is 'What it is for: retrieve, change_plan, customer.';
