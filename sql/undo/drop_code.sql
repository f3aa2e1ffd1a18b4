-- Run by `pgcredits rollback`, never by a deploy: takes away what sql/ has put there (views, routines, and the
-- triggers and policies that need them), so that a migration's way back meets nothing but tables.
-- A routine that a table's constraint, default or index needs belongs to the tables and stays.
-- The schema for Hasura holds nothing but code, which no deploy brings back: deploy/hasura/credits_hasura.sql does.
drop schema if exists credits_hasura cascade;

do $$
declare
  v_drop text;
begin
  -- Names are collected first: a cascade may drop what comes later in the list.
  for v_drop in
    select pg_catalog.unnest(pg_catalog.array_agg(
             pg_catalog.format('drop %s if exists %s cascade',
               case c.relkind when 'm' then 'materialized view' else 'view' end, c.oid::regclass)))
    from pg_catalog.pg_class c
    join pg_catalog.pg_namespace n on n.oid = c.relnamespace
    where n.nspname in ('credits', 'credits_api')
      and c.relkind in ('v', 'm')
      and not exists (select from pg_catalog.pg_depend d
                      where d.classid = 'pg_class'::regclass and d.objid = c.oid and d.deptype = 'e')
  loop
    execute v_drop;
  end loop;

  for v_drop in
    select pg_catalog.unnest(pg_catalog.array_agg(
             pg_catalog.format('drop routine if exists %s cascade', p.oid::regprocedure)))
    from pg_catalog.pg_proc p
    join pg_catalog.pg_namespace n on n.oid = p.pronamespace
    where n.nspname in ('credits', 'credits_api')
      and not exists (select from pg_catalog.pg_depend d
                      where d.classid = 'pg_proc'::regclass and d.objid = p.oid and d.deptype = 'e')
      and not exists (select from pg_catalog.pg_depend d
                      where d.refclassid = 'pg_proc'::regclass and d.refobjid = p.oid
                        and d.classid in ('pg_constraint'::regclass, 'pg_attrdef'::regclass, 'pg_class'::regclass))
  loop
    execute v_drop;
  end loop;

  -- Rights on tables are given by 90_grants.sql, those on columns among them.
  for v_drop in
    select pg_catalog.format('revoke all on %s from %I', c.oid::regclass, r.rolname)
      from pg_catalog.pg_class c
      join pg_catalog.pg_roles r on r.oid in (
             select a.grantee
               from pg_catalog.pg_attribute t, pg_catalog.aclexplode(t.attacl) a
              where t.attrelid = c.oid
             union
             select a.grantee from pg_catalog.aclexplode(c.relacl) a where a.grantee <> c.relowner)
     where c.relnamespace = pg_catalog.to_regnamespace('credits') and c.relkind in ('r', 'p')
  loop
    execute v_drop;
  end loop;
end $$;
