set local role credits_owner;
drop type credits.metric, credits.health_check, credits.erase_result, credits.import_row, credits.import_result;
drop index credits.stripe_requests_troubled, credits.subscription_history_unexpected;
drop table credits.audit_runs, credits.totals, credits.health_checks, credits.erasure_rules, credits.erasures;
