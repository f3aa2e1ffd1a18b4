set local role credits_owner;
drop type credits.reconciliation_result, credits.stripe_gap_result;
drop table credits.stripe_lookups, credits.stripe_gaps, credits.stripe_reconciliations;
