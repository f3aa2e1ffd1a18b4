-- Roles, schemas and the settings table: the ground that every other migration stands on.
-- Roles belong to the cluster, so another database may have made them already.
do $$
declare
  v_role text;
begin
  foreach v_role in array array['credits_owner', 'credits_service', 'credits_user', 'credits_forwarder'] loop
    begin
      execute format('create role %I %s', v_role,
        case v_role when 'credits_forwarder' then 'login noinherit' else 'nologin' end);
    exception when duplicate_object or unique_violation then null;
    end;
  end loop;
end $$;

-- May act as the owner already, by way of another database of this cluster? Then there is nothing to grant, and perhaps
-- no right to. Since 16 the creator of a role is a member that may not act as it.
do $$
declare
  v_right text := case when current_setting('server_version_num')::integer >= 160000 then 'set' else 'member' end;
begin
  if not pg_catalog.pg_has_role(current_user, 'credits_owner', v_right) then
    execute format('grant credits_owner to %I', current_user);
  end if;
  if not pg_catalog.pg_has_role('credits_forwarder', 'credits_user', v_right)
     or not pg_catalog.pg_has_role('credits_forwarder', 'credits_service', v_right) then
    grant credits_user, credits_service to credits_forwarder;
  end if;
end $$;

create schema credits authorization credits_owner;
create schema credits_api authorization credits_owner;
comment on schema credits is
  'pgcredits: the ledger and everything that decides. Verbs are granted to credits_service, tables to nobody.';
comment on schema credits_api is
  'pgcredits: what a signed-in end user may reach, and nothing else.';

set local role credits_owner;

-- Only the global form works; "in schema" would succeed and do nothing.
alter default privileges revoke execute on functions from public;

grant usage on schema credits to credits_service;
grant usage on schema credits_api to credits_user;

create table credits.settings (
  name    text  primary key,
  value   jsonb not null,
  summary text  not null
);
alter table credits.settings enable row level security;
comment on table credits.settings is
  'What an operator may tune. Read through credits._setting(name); the known names and their defaults are in sql/.';
