set local role credits_owner;
drop type credits.stripe_event_result, credits.stripe_event_summary, credits.handler_result, credits.event_shape,
  credits.session_shape;
drop table credits.stripe_events, credits.stripe_handlers, credits.stripe_facts, credits.purchases, credits.packages;
