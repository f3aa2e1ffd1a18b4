-- What is sold: packages of credits, and the demo catalogue.

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
language sql
security definer
set search_path = pg_catalog, pg_temp
as $$
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
$$;
comment on function credits.load_demo_catalog() is
'Loads four demo packages and two demo plans. Those that exist already stay as they are.';
