-- The rules of the house, as a view that must be empty: migrate refuses to finish while it has rows.

create or replace view credits.house_rule_violations as
with functions as (
  select p.*, n.nspname as schema, p.oid::pg_catalog.regprocedure::text as object,
         n.nspname = 'credits' and p.proname like E'\\_my\\_%' as is_mine
    from pg_catalog.pg_proc p
    join pg_catalog.pg_namespace n on n.oid = p.pronamespace
   where n.nspname in ('credits', 'credits_api')
), relations as (
  select c.*, n.nspname as schema, c.oid::pg_catalog.regclass::text as object
    from pg_catalog.pg_class c
    join pg_catalog.pg_namespace n on n.oid = c.relnamespace
   where n.nspname in ('credits', 'credits_api')
), granted as (
  select f.*, r.role
    from functions f, (values ('credits_service'), ('credits_user')) r (role)
   where pg_catalog.has_function_privilege(r.role, f.oid, 'execute')
)
-- A body that is bound to its names when it is made looks nothing up later.
select 'search_path is not pinned' as finding, f.object
  from functions f
 where (f.prosecdef or f.prokind = 'f' and f.prosqlbody is null  -- a procedure could not commit
                       and f.object in (select g.object from granted g))
   and not coalesce('search_path=pg_catalog, pg_temp' = any (f.proconfig), false)
union all
select 'definer in the exposed schema', f.object from functions f where f.prosecdef and f.schema = 'credits_api'
union all
select 'executable by everyone', f.object from functions f where pg_catalog.has_function_privilege('public', f.oid, 'execute')
union all
select 'not bound to its names in the exposed schema', f.object from functions f
 where f.schema = 'credits_api' and f.prosqlbody is null
union all
select 'internal but granted', g.object from granted g
 where g.proname like E'\\_%' and not (g.is_mine and g.role = 'credits_user')
union all
select 'a verb of the backend in reach of end users', g.object from granted g
 where g.role = 'credits_user' and g.schema = 'credits' and not g.is_mine
union all
select 'for end users but not run as the owner', f.object from functions f where f.is_mine and not f.prosecdef
union all
select 'granted but without a comment', g.object from granted g
 where not g.is_mine and pg_catalog.obj_description(g.oid, 'pg_proc') is null
union all
select 'overloaded', f.schema || '.' || f.proname from functions f group by f.schema, f.proname having count(*) > 1
union all
select 'not owned by credits_owner', f.object from functions f
 where pg_catalog.pg_get_userbyid(f.proowner) <> 'credits_owner'
union all
select 'table without row level security', r.object from relations r where r.relkind in ('r', 'p') and not r.relrowsecurity
union all
select 'table without a comment', r.object from relations r
 where r.relkind in ('r', 'p', 'v') and pg_catalog.obj_description(r.oid, 'pg_class') is null
union all
select 'may be written by ' || w.role, r.object
  from relations r, (values ('credits_service'), ('credits_user')) w (role)
 where r.relkind in ('r', 'p', 'v')
   and pg_catalog.has_table_privilege(w.role, r.oid, 'insert, update, delete, truncate, references, trigger')
union all
select 'table in the exposed schema', r.object from relations r where r.relkind in ('r', 'p', 'f', 'm') and r.schema = 'credits_api'
union all
select 'view of the exposed schema without security_invoker', r.object from relations r
 where r.relkind = 'v' and r.schema = 'credits_api'
   and not coalesce(r.reloptions && '{security_invoker=on,security_invoker=true}', false)
union all
select 'handler does not exist', h.event_type || ': ' || h.handler
  from credits.stripe_handlers h
 where not exists (select from functions f where f.schema = 'credits' and f.proname = h.handler)
union all
select 'effect does not exist', t.from_state || ' to ' || t.to_state || ': ' || t.effect
  from credits.subscription_transitions t
 where not exists (select from functions f where f.schema = 'credits' and f.proname = t.effect)
union all
select 'column of an erasure does not exist', e.table_name || '.' || e.column_name
  from credits.erasure_rules e
 where not exists (select from pg_catalog.pg_attribute a
                    where a.attrelid = pg_catalog.to_regclass('credits.' || e.table_name) and a.attname = e.column_name
                      and not a.attisdropped)
union all
select 'function of a job does not exist', j.name || ': ' || j.function
  from credits.jobs j
 where not exists (select from functions f where f.schema = 'credits' and f.proname = j.function)
union all
select 'schedule of a job is none', j.name || ': ' || j.schedule from credits.jobs j
 where credits._next_run(j.schedule, 'epoch') is null
union all
select 'key of the catalogue is no column', s.section || '.' || c.name
  from unnest(array['capabilities', 'quality_levels', 'models', 'packages', 'plans']) s (section)
  cross join unnest(credits._catalog_columns(s.section) || array['code', 'active']) c (name)
 where not exists (select from pg_catalog.pg_attribute a
                    where a.attrelid = pg_catalog.to_regclass('credits.' || s.section) and a.attname = c.name and not a.attisdropped);
comment on view credits.house_rule_violations is
  'Breaches of the rules of the house. Must be empty: migrate refuses to finish while it has rows.';
