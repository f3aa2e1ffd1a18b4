set local role credits_owner;
alter table credits.jobs drop column reached_at, drop column reached_id;
drop index credits.grants_by_due;
create index grants_by_due on credits.grants ((case when status = 'pending' then effective_at else expires_at end))
  where status in ('pending', 'active') and (case when status = 'pending' then effective_at else expires_at end) is not null;
