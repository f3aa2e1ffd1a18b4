-- What is sold, what plans may use and what it costs: one document, applied whole or not at all, and shown again.
-- What a document may say: 38_catalog_document.sql, 39_catalog_rules.sql. How it is written: 41_catalog_sections.sql.
-- Lock order: whoever writes the catalogue locks the table plans first.

create or replace function credits.apply_catalog(
  catalog jsonb,
  dry_run boolean default false
)
returns setof credits.catalog_change
language sql
security definer
set search_path = pg_catalog, pg_temp
as $$
  select c.* from credits._apply_catalog(apply_catalog.catalog, apply_catalog.dry_run) c
$$;
comment on function credits.apply_catalog(jsonb, boolean) is
'Makes the catalogue what a document says, wholly or not at all, and returns the differences: none if it was that already.

The document is the one that get_catalog() shows and docs/catalog.md describes. A section that it lacks is left alone. One
that it has is the whole truth: what it does not name is removed, or deactivated if something refers to it. A rate that has
been in force is never edited, a new one follows it. dry_run says what would change and changes nothing. change is added,
changed, removed, deactivated or ended; before and after are the values at path. DETAIL of invalid_catalog has all problems,
each with its path.

Months of our own plans that have begun and are not booked yet are worth what the catalogue says when they are booked. Where
jobs may have stood still for a month, call grant_plan_credits() first, until it says 0, and when a plan got other credits
initialize_plan_credits() afterwards; `pgcredits catalog apply` does both.
Errors: 400 invalid_catalog.';

create or replace function credits.get_catalog()
returns jsonb
language sql
stable
security definer
set search_path = pg_catalog, pg_temp
as $$
  select credits._shaped('"catalog"', credits._stored_catalog(credits.now()), plain => true)
$$;
comment on function credits.get_catalog() is
'The catalogue as a document: applied to the same database it changes nothing.

Of rates it has those in force and those to come. What is as if it were not given (active: true, no description) is left out.';

create or replace function credits.list_packages()
returns setof credits.packages
language sql
stable
security definer
set search_path = pg_catalog, pg_temp
as $$
  select p.*
    from credits.packages p
   where p.active
   order by p.display_order, p.code
$$;
comment on function credits.list_packages() is
'The packages on sale, in the order of display. price is in the minor unit of currency.';

create or replace function credits.load_demo_catalog()
returns void
language plpgsql
security definer
set search_path = pg_catalog, pg_temp
as $$
begin
  insert into credits.packages as p (code, name, description, credits, price, currency, discount_percent, popular, display_order)
  values ('starter',    'Starter',    'To try things out.',  1000,  1000,  'usd', 0,  false, 1),
         ('standard',   'Standard',   'For regular use.',    5000,  4500,  'usd', 10, true,  2),
         ('pro',        'Pro',        'For daily work.',     10000, 8000,  'usd', 20, false, 3),
         ('enterprise', 'Enterprise', 'For a whole team.',   50000, 35000, 'usd', 30, false, 4)
  on conflict (code) do nothing;

  insert into credits.plans as p (code, name, description, monthly_credits)
  values ('free', 'Free', 'Ten credits a month.',  10),
         ('team', 'Team', 'For a team of people.', 2000)
  on conflict (code) do nothing;

  if not exists (select from credits.capabilities) then
    perform credits._load_demo_uses();
    perform credits._work_out_offers();
  end if;
end $$;
comment on function credits.load_demo_catalog() is
'Loads four demo packages and two demo plans, and where there are no capabilities, some for these plans with their rates.

What exists already stays as it is.';

-- Helpers -------------------------------------------------------------------------------------------------------------

-- jit: the planner takes documents for millions of rows, and would compile for longer than all of it takes.
create or replace function credits._apply_catalog(
  catalog jsonb,
  dry_run boolean
)
returns setof credits.catalog_change
language plpgsql
set jit = off
as $$
declare
  v_catalog jsonb := coalesce(_apply_catalog.catalog, 'null');
  v_now     timestamptz;
  v_before  jsonb;
  v_after   jsonb;
  v_changes credits.catalog_change[];
begin
  lock table credits.plans in share row exclusive mode;  -- accounts can still be opened, catalogues wait for one another
  v_now    := credits.now();
  v_before := credits._stored_catalog(v_now);
  perform credits._refuse_catalog(array(select p from credits._catalog_problems(v_catalog, v_before, v_now) p));
  begin
    perform credits._write_catalog(v_catalog, v_before, v_now);
    perform credits._work_out_offers();
    v_after := credits._stored_catalog(v_now);
    if v_catalog ?| array['capabilities', 'quality_levels', 'models', 'plans', 'rates'] then
      perform credits._refuse_catalog(array(select p from credits._unpriced(v_after, v_now) p));  -- plans that stay in use
    end if;
    v_changes := array(select c from credits._catalog_changes(v_before, v_after, v_now) c);
    if _apply_catalog.dry_run then
      raise sqlstate 'DRYRN';
    end if;
  exception when sqlstate 'DRYRN' then
    null;  -- all of it is undone, and known
  end;
  return query select c.* from unnest(v_changes) c;
end $$;

create or replace function credits._load_demo_uses()
returns void
language sql
as $$
  insert into credits.capabilities (code, name, description, unit, display_order)
  values ('outline', 'Outline', 'The plan of a book.',   'unit',  1),
         ('chapter', 'Chapter', 'A chapter, written.',   'words', 2),
         ('cover',   'Cover',   'A picture for a book.', 'image', 3)
  on conflict do nothing;
  insert into credits.quality_levels (code, name, display_order)
  values ('draft', 'Draft', 1), ('best', 'Best', 2)
  on conflict do nothing;
  insert into credits.models (code, name, display_order)
  values ('small', 'Small', 1), ('large', 'Large', 2)
  on conflict do nothing;

  insert into credits.plan_capabilities (plan, capability)
  values ('free', 'outline'), ('free', 'chapter'), ('team', 'outline'), ('team', 'chapter'), ('team', 'cover')
  on conflict do nothing;
  insert into credits.plan_qualities (plan, capability, quality, model, rank)
  values ('free', null,    'draft', 'small', 0),
         ('team', null,    'draft', 'small', 0),
         ('team', null,    'best',  'large', 0),
         ('team', null,    'best',  'small', 1),
         ('team', 'cover', 'best',  'large', 0)
  on conflict do nothing;
  insert into credits.plan_limits (plan, capability, measure, period, rolling, maximum)
  values ('free', null, 'calls', 'minute', true,  5),
         ('free', null, 'calls', 'day',    false, 20),
         ('team', null, 'calls', 'minute', true,  60)
  on conflict do nothing;

  insert into credits.rates (capability, quality, model, price)
  select r.capability, r.quality, r.model, credits._normal_price(r.price, c.unit)
    from (values ('outline', null,   null,    jsonb '1'),
                 ('chapter', null,   null,    '{"credits": 1, "block": 500}'),
                 ('chapter', 'best', 'large', '{"credits": 1, "block": 100}'),
                 ('cover',   null,   null,    '20')) r (capability, quality, model, price)
    join credits.capabilities c on c.code = r.capability
  on conflict do nothing;
$$;

create or replace function credits._refuse_catalog(problems credits.catalog_problem[])
returns void
language plpgsql
stable
as $$
begin
  if cardinality(_refuse_catalog.problems) > 0 then
    perform credits._fail(400, 'invalid_catalog',
      (select jsonb_build_object('problems', jsonb_agg(jsonb_build_object('path', p.path, 'problem', p.problem)
                                                       order by p.path::text, p.problem))
         from unnest(_refuse_catalog.problems) p),
      'Nothing was written. Each problem has the path of its place in the document.');
  end if;
end $$;

-- The document of all that is stored, every key given, as of a moment.
create or replace function credits._stored_catalog(at timestamptz)
returns jsonb
language sql
stable
set jit = off
as $$
  select credits._shaped('"catalog"', jsonb_build_object(
    'capabilities',   (select coalesce(jsonb_object_agg(c.code, to_jsonb(c)), '{}') from credits.capabilities c),
    'quality_levels', (select coalesce(jsonb_object_agg(q.code, to_jsonb(q)), '{}') from credits.quality_levels q),
    'models',         (select coalesce(jsonb_object_agg(m.code, to_jsonb(m)), '{}') from credits.models m),
    'packages',       (select coalesce(jsonb_object_agg(p.code, to_jsonb(p)), '{}') from credits.packages p),
    'plans',          (select coalesce(jsonb_object_agg(p.code, to_jsonb(p) || credits._stored_uses(p.code, null)
                                || jsonb_build_object('prices', credits._stored_prices(p.code), 'capabilities', (
                                     select coalesce(jsonb_object_agg(c.capability, credits._stored_uses(p.code, c.capability)), '{}')
                                       from credits.plan_capabilities c where c.plan = p.code))), '{}')
                         from credits.plans p),
    'rates',          (select coalesce(jsonb_agg(to_jsonb(r) || jsonb_build_object('valid_from', case
                                when r.valid_from > '-infinity' then (to_jsonb(r.valid_from at time zone 'UTC') #>> '{}') || 'Z' end)
                                order by c.display_order, c.code, q.display_order nulls first, q.code,
                                         m.display_order nulls first, m.code, r.valid_from), '[]')
                         from credits._live_rates(_stored_catalog.at) r
                         join credits.capabilities c on c.code = r.capability
                         left join credits.quality_levels q on q.code = r.quality
                         left join credits.models m on m.code = r.model)), plain => false)
$$;

-- What a plan says of one capability, or of all together.
create or replace function credits._stored_uses(
  plan       text,
  capability text
)
returns jsonb
language sql
stable
as $$
  select jsonb_build_object(
    'qualities', (select coalesce(jsonb_object_agg(q.quality, q.models), '{}')
                    from (select q.quality, coalesce(jsonb_agg(q.model order by q.rank) filter (where q.model is not null), '[]') as models
                            from credits.plan_qualities q
                           where q.plan = _stored_uses.plan and q.capability is not distinct from _stored_uses.capability
                           group by q.quality) q),
    'limits',    (select coalesce(jsonb_agg(jsonb_build_object(l.measure, l.maximum, 'per', l.period, 'rolling', l.rolling)
                                            order by l.measure, array_position(array['minute', 'hour', 'day', 'month'], l.period),
                                                     l.rolling), '[]')
                    from credits.plan_limits l
                   where l.plan = _stored_uses.plan and l.capability is not distinct from _stored_uses.capability))
$$;

-- Differences --------------------------------------------------------------------------------------------------------

-- Of two whole documents, those of their parts that differ, the outermost ones. A price is one part.
create or replace function credits._catalog_changes(
  before jsonb,
  after  jsonb,
  at     timestamptz
)
returns setof credits.catalog_change
language sql
stable
as $$
  with recursive parts (path, before, after) as (
    select array[]::text[], credits._by_key(_catalog_changes.before, _catalog_changes.at),
           credits._by_key(_catalog_changes.after, _catalog_changes.at)
    union all
    select p.path || k.key, p.before -> k.key, p.after -> k.key
      from parts p
      cross join lateral (select jsonb_object_keys(credits._object(p.before))
                          union
                          select jsonb_object_keys(credits._object(p.after))) k (key)
     where jsonb_typeof(p.before) = 'object' and jsonb_typeof(p.after) = 'object'
       and (p.path[1] = 'rates' and cardinality(p.path) = 2) is not true
       and (p.before -> k.key) is distinct from (p.after -> k.key)
  )
  select case when p.before is null then 'added'
              when p.after is null then case when p.path[1] = 'rates' and p.path[2]::jsonb ->> 3 is null then 'ended' else 'removed' end
              when p.path[3] = 'active' and p.after = 'false' then 'deactivated'
              else 'changed' end,
         case when p.path[1] = 'rates' then 'rates.' || credits._rate_name(p.path[2]::jsonb)
              when p.path[3] = 'active' and p.after = 'false' then array_to_string(p.path[1:2], '.')
              else array_to_string(p.path, '.') end,
         nullif(jsonb_strip_nulls(p.before), 'null'), nullif(jsonb_strip_nulls(p.after), 'null')
    from parts p
   where cardinality(p.path) > 0
     and not (jsonb_typeof(p.before) = 'object' and jsonb_typeof(p.after) = 'object'
              and (p.path[1] = 'rates' and cardinality(p.path) = 2) is not true) is true
   order by array_position(array['capabilities', 'quality_levels', 'models', 'packages', 'plans', 'rates'], p.path[1]), 2
$$;

-- The same document, the prices of its rates by capability, quality, model and, of those to come, start.
create or replace function credits._by_key(
  catalog jsonb,
  at      timestamptz
)
returns jsonb
language sql
stable
as $$
  select _by_key.catalog || jsonb_build_object('rates', (
    select coalesce(jsonb_object_agg(
             jsonb_build_array(r -> 'capability', r -> 'quality', r -> 'model',
                               case when credits._catalog_moment(r ->> 'valid_from') > _by_key.at then r ->> 'valid_from' end)::text,
             r -> 'price'), '{}')
      from jsonb_array_elements(_by_key.catalog -> 'rates') r))
$$;

-- chapter.best.large, or chapter.*.large where the rate is that of any quality.
create or replace function credits._rate_name(key jsonb)
returns text
language sql
immutable
as $$
  select concat_ws('.', _rate_name.key ->> 0, coalesce(_rate_name.key ->> 1, case when _rate_name.key ->> 2 <> '' then '*' end),
                   _rate_name.key ->> 2) || coalesce(' from ' || (_rate_name.key ->> 3), '')
$$;
