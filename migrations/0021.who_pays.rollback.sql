set local role credits_owner;
comment on table credits.entries is
  'The ledger: append-only, numbered per account from 1 without a gap. Written by credits._post(), by spend() and settle() where one statement does all, and by credits._spend_together() for many at once.';
drop type credits.payer;
