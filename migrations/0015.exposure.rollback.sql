do $$
begin
  execute format('alter role credits_user in database %I reset statement_timeout', current_database());
  execute format('alter role credits_user in database %I reset lock_timeout', current_database());
  execute format('alter role credits_service in database %I reset statement_timeout', current_database());
exception when insufficient_privilege then null;
end $$;

set local role credits_owner;
do $$
declare
  v_role text;
begin
  for v_role in
    select r.role from credits.enabled_roles r join pg_catalog.pg_roles p on p.rolname = r.role
  loop
    execute format('revoke all on all tables in schema credits, credits_api from %I', v_role);
    execute format('revoke all on schema credits, credits_api from %I', v_role);
  end loop;
end $$;
revoke all on all tables in schema credits from credits_user;
drop type credits.subject, credits.free_credits;
drop table credits.enabled_roles, credits.identities, credits.issuers;
