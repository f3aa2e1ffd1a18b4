-- How every deploy ends: all bodies are looked at, and the house rules must hold.
set local check_function_bodies = on;
do $$
declare
  v_function record;
  v_rows     text;
begin
  for v_function in
    select p.oid, p.oid::regprocedure as name, l.lanvalidator::regproc as validator
    from pg_catalog.pg_proc p
    join pg_catalog.pg_language l on l.oid = p.prolang
    where p.pronamespace::regnamespace::text in ('credits', 'credits_api', 'credits_hasura')
      and p.prokind in ('f', 'p')
  loop
    begin
      execute pg_catalog.format('select %s(%s)', v_function.validator, v_function.oid);
    exception when others then
      raise exception using message = v_function.name || ' does not compile: ' || sqlerrm;
    end;
  end loop;
  if pg_catalog.to_regclass('credits.house_rule_violations') is not null then
    execute 'select pg_catalog.string_agg(v::text, e''\n'') from credits.house_rule_violations v' into v_rows;
    if v_rows is not null then
      raise exception using message = 'house rules are violated', detail = v_rows;
    end if;
  end if;
end $$;
