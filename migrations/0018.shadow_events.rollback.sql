set local role credits_owner;
drop index credits.stripe_events_in_shadow;
