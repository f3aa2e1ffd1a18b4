-- The roles stay: they belong to the cluster and another database may use them.
drop schema credits_api cascade;
drop schema credits cascade;
alter default privileges for role credits_owner grant execute on functions to public;
