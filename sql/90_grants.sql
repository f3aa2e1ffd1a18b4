-- Who may call what, on one page: take everything away, then give.
-- credits_service is a trusted backend. Functions with a leading underscore and tables are granted to nobody.

revoke all on all functions in schema credits, credits_api from public, credits_service, credits_user;
revoke all on all tables in schema credits, credits_api from public, credits_service, credits_user;
revoke all on schema credits, credits_api from public;

grant usage on schema credits to credits_service;
grant usage on schema credits_api to credits_user;

grant execute on function
  credits.open_account, credits.freeze_account, credits.unfreeze_account, credits.set_debt_limit,
  credits.get_balance, credits.balance_at, credits.history, credits.prove_balance, credits.audit,
  credits.grant_credits, credits.adjust, credits.revoke_grant, credits.transfer_credits,
  credits.spend, credits.spend_many, credits.refund_spend,
  credits.reserve, credits.capture, credits.settle, credits.release, credits.extend, credits.get_reservation,
  credits.list_packages, credits.load_demo_catalog,
  credits.receive_stripe_event, credits.replay_stripe_event, credits.list_stripe_events
to credits_service;

grant select on credits.trial_balance to credits_service;
