-- Unless another database of the cluster uses the roles, too.
do $$
begin
  if not exists (select from pg_catalog.pg_shdepend d
                  where d.refclassid = 'pg_authid'::regclass and d.refobjid = 'credits_user'::regrole
                    and d.dbid not in (select 0 union all
                                       select b.oid from pg_catalog.pg_database b where b.datname = current_database())) then
    alter role credits_user reset statement_timeout;
    alter role credits_user reset lock_timeout;
    alter role credits_service reset statement_timeout;
  end if;
exception when insufficient_privilege or internal_error then
  raise notice 'the timeouts of the roles stay: %', sqlerrm;
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
