set local role credits_owner;
comment on table credits.entries is
  'The ledger: append-only, numbered per account from 1 without a gap. Written by credits._post(), by spend() and settle() where one statement does all, and by credits._spend_together() for many at once.';
alter table credits.reservations alter column min_amount type credits.amount;
alter table credits.reservations
  add constraint reservations_actual_is_charged_or_uncollected check (actual = charged + uncollected);
drop type credits.payer;
