-- A verb in its usual case finds rows by their place, once it holds the lock.
set local role credits_owner;

-- What is left of a grant that can pay, and where its row is: good for as long as the account is locked.
create type credits.payer as (grant_id bigint, remaining numeric, place tid);

-- A CHECK is read anew by every statement that writes the table; what this one said is computed by whoever writes it, and
-- audit() looks after it.
alter table credits.reservations drop constraint reservations_actual_is_charged_or_uncollected;
-- reserve() checks it, as it checks amount.
alter table credits.reservations alter column min_amount type numeric;
comment on table credits.entries is
  'The ledger: append-only, numbered per account from 1 without a gap. Written by credits._post(), by spend() and settle() in their usual case, and by credits._spend_together() for many at once.';
