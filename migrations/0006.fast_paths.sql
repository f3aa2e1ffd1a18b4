-- What a spend has to know of an account stands in the row that it locks: one look instead of three.
set local role credits_owner;

alter table credits.balances
  add column status     text    not null default 'active',
  add column has_scoped boolean not null default false;
comment on column credits.balances.status is
  'Status of the account, here for whoever holds the lock; accounts.status says the same.';
comment on column credits.balances.has_scoped is
  'Whether some grant was ever scoped to capabilities. Where none was, what is free is simply balance - held.';

update credits.balances b
   set status     = a.status,
       has_scoped = exists (select from credits.grants g where g.account_id = b.account_id and g.scope is not null)
  from credits.accounts a
 where a.account_id = b.account_id
   and (a.status <> 'active'
        or exists (select from credits.grants g where g.account_id = b.account_id and g.scope is not null));

comment on table credits.entries is
  'The ledger: append-only, numbered per account from 1 without a gap. Written by credits._post(), by spend() and settle() where one statement does all, and by credits._spend_together() for many at once.';
