set local role credits_owner;
comment on table credits.entries is
  'The ledger: append-only, numbered per account from 1 without a gap. Written by credits._post(), and by credits._spend_together() for many at once.';
alter table credits.balances drop column has_scoped, drop column status;
