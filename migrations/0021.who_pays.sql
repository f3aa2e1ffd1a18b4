-- A verb in its usual case finds rows by their place, once it holds the lock.
set local role credits_owner;

-- What is left of a grant that can pay, and where its row is: good for as long as the account is locked.
create type credits.payer as (grant_id bigint, remaining numeric, place tid);

comment on table credits.entries is
  'The ledger: append-only, numbered per account from 1 without a gap. Written by credits._post(), by spend() and settle() in their usual case, and by credits._spend_together() for many at once.';
