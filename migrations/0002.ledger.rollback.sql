set local role credits_owner;
drop type credits.account_result, credits.balance_result, credits.grant_result, credits.entry_result,
  credits.transfer_result, credits.spend_many_result, credits.history_result, credits.proof_result,
  credits.audit_finding, credits.slices, credits.spend_request, credits.lot, credits.freed_slice;
drop table credits.entries, credits.entry_kinds, credits.grants, credits.balances, credits.members, credits.accounts,
  credits.plans;
drop domain credits.amount, credits.part, credits.grant_kind, credits.grant_status, credits.reservation_status;
