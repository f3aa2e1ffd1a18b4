-- Events that were recorded in shadow mode, by what they are about: a repair leaves that to a replay.
set local role credits_owner;
create index stripe_events_in_shadow on credits.stripe_events (object_id) where reason = 'shadow';
comment on column credits.stripe_requests.purpose is 'What it is for; docs/stripe.md names them all.';
