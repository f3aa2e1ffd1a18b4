-- Which price of Stripe sells what, now and ever. Whoever writes here locks the table plans first.

-- The price that a plan is sold at, if no other is asked for. Who pays at another price already stays with its currency, since Stripe
-- takes no other one of a subscription, and with its interval, where the plan is sold so. Each account of Stripe has prices of its own.
drop function if exists credits._price_of_plan(text);
drop function if exists credits._price_of_plan(text, text);
create or replace function credits._price_of_plan(
  plan           text,
  paid           text default null,
  stripe_account text default null
)
returns text
language sql
stable
as $$
  select n.price_id
    from credits.plans p
    cross join lateral (select credits._shown_price(credits._snapshot('price', _price_of_plan.paid)) as shown) o
    cross join lateral (
      select c.stripe_price_id, c.currency, c."interval", 1, c.rank
        from credits.plan_prices c
       where c.plan = p.code and credits._is_price_of(c.stripe_price_id, _price_of_plan.stripe_account)
      union all
      select i.id, w.shown ->> 'currency', w.shown ->> 'every', 2, -i.place
        from (select u.id, u.place, max(u.place) over () as last
                from unnest(p.stripe_price_ids) with ordinality u (id, place)
               where credits._is_price_of(u.id, _price_of_plan.stripe_account)) i
        cross join lateral (select credits._shown_price(credits._snapshot('price', i.id))) w (shown)
       where (i.place = i.last or w.shown -> 'active' = 'true')
         and not credits._is_retired(i.id)) n (price_id, currency, every, kind, place)
   where p.code = _price_of_plan.plan
   order by coalesce((n.currency, n.every) = (o.shown ->> 'currency', o.shown ->> 'every'), false) desc,
            coalesce(n.currency = o.shown ->> 'currency', false) desc, n.kind, n.place
   limit 1
$$;

create or replace function credits._plan_of_price(
  price_id   text,
  product_id text
)
returns text
language plpgsql
stable
as $$
begin
  return coalesce(
    (select p.code from credits.plans p where _plan_of_price.price_id = any (p.stripe_price_ids) order by p.code limit 1),
    (select s.plan from credits.sold_prices s where s.stripe_price_id = _plan_of_price.price_id),
    (select p.code from credits.plans p where p.stripe_product_id = _plan_of_price.product_id));
end $$;

-- Whether something can be sold at it in an account of Stripe. One that nobody has told of may be of any.
create or replace function credits._is_price_of(
  price_id       text,
  stripe_account text
)
returns boolean
language sql
stable
as $$
  select case when h.home is null and credits._snapshot('price', _is_price_of.price_id) is null then true
              else h.home is not distinct from _is_price_of.stripe_account end
    from (select credits._home_of('price', _is_price_of.price_id)) h (home)
   where _is_price_of.price_id is not null
$$;

-- The catalogue sells nothing at it any more, whether Stripe has heard of that or not.
create or replace function credits._is_retired(price_id text)
returns boolean
language plpgsql
stable
as $$
begin
  return exists (select from credits.sold_prices s
                  where s.stripe_price_id = _is_retired.price_id and s.retired_at is not null);
end $$;

create or replace function credits._stored_prices(plan text)
returns jsonb
language sql
stable
as $$
  select coalesce(jsonb_agg(jsonb_build_object('amount', c.amount, 'currency', c.currency, 'interval', c."interval")
                            order by c.rank), '[]')
    from credits.plan_prices c
   where c.plan = _stored_prices.plan
$$;

-- A package as it was sold to whoever pays another amount than it costs now: by the price, else by the amount.
create or replace function credits._package_as_sold(
  package  credits.packages,
  session  credits.session_shape,
  price_id text
)
returns credits.packages
language plpgsql
stable
as $$
declare
  v_package  credits.packages := _package_as_sold.package;
  v_quantity integer := credits._quantity_of_session(_package_as_sold.session);
  v_sold     record;
begin
  if (v_package.price * v_quantity, v_package.currency)
     is distinct from ((_package_as_sold.session).amount_before, (_package_as_sold.session).currency) then
    select p.amount, p.currency, coalesce(credits._decimal(w.shown #> '{metadata,credits}'), s.credits) as credits into v_sold
      from credits.sold_prices s
      cross join lateral (select credits._shown_price(credits._snapshot('price', s.stripe_price_id))) w (shown)
      cross join lateral (select coalesce(credits._whole(w.shown -> 'unit_amount'), s.amount) as amount,
                                 coalesce(w.shown ->> 'currency', s.currency) as currency) p
     where s.package = v_package.code and p.amount * v_quantity = (_package_as_sold.session).amount_before
       and p.currency = (_package_as_sold.session).currency
     order by s.stripe_price_id is not distinct from _package_as_sold.price_id desc, s.created_at desc
     limit 1;
    if found then
      v_package.price    := v_sold.amount;
      v_package.currency := v_sold.currency;
      v_package.credits  := v_sold.credits;
    end if;
  end if;
  return v_package;
end $$;

-- What is sold at a price stays known. Nothing that is known is made something else here.
create or replace function credits._note_sold_prices()
returns void
language sql
as $$
  with named as (
    select p.stripe_price_id as id, 'package' as section, p.code, p.price, p.currency, 1 as rank
      from credits.packages p
    union all
    select c.stripe_price_id, 'plan', c.plan, null, null, 1 from credits.plan_prices c
    union all
    select i.id, 'plan', p.code, null, null, 2 from credits.plans p, unnest(p.stripe_price_ids) i (id)
    union all
    select o.object_id, n.section, n.code, null, null, 3
      from credits.stripe_objects o, credits._named_by(credits._shown_price(o.snapshot)) n
     where o.kind = 'price' and o.snapshot is not null
  )
  insert into credits.sold_prices as s (stripe_price_id, package, plan, amount, currency, credits, created_at)
  select distinct on (n.id) n.id, p.code, case n.section when 'plan' then n.code end,
         coalesce(credits._whole(w.shown -> 'unit_amount'), n.price), coalesce(w.shown ->> 'currency', n.currency),
         coalesce(credits._decimal(w.shown #> '{metadata,credits}'), p.credits), credits.now()
    from named n
    cross join lateral (select credits._shown_price(credits._snapshot('price', n.id))) w (shown)
    left join credits.packages p on n.section = 'package' and p.code = n.code
   where n.id is not null
   order by n.id, n.rank
  on conflict on constraint sold_prices_pkey do nothing
$$;

-- The package or plan that a price, or else its product, names in its metadata.
create or replace function credits._named_by(shown jsonb)
returns setof credits.catalog_target
language sql
stable
as $$
  select s.section, s.code, null::text, null::text, null::text, null::boolean, null::boolean, null::jsonb, null::jsonb
    from (select _named_by.shown -> 'metadata' as price,
                 credits._shown_product(credits._snapshot('product', _named_by.shown ->> 'product')) -> 'metadata' as product) m
    cross join lateral (
      select 'package' as section, p.code from credits.packages p where p.code = coalesce(m.price ->> 'package', m.product ->> 'package')
      union all
      select 'plan', p.code from credits.plans p where p.code = coalesce(m.price ->> 'plan', m.product ->> 'plan')
      limit 1) s
$$;

-- What is known of Stripe fills in what the catalogue lacks: the product of its prices, and active prices that are what it wants.
create or replace function credits._bind_known()
returns void
language plpgsql
as $$
declare
  v_known credits.catalog_target;
begin
  for v_known in
    select distinct on (t.ref) t.section, t.code, t.object, t.ref, o.object_id, t.chosen, t.on_sale, t.wanted, t.fixed
      from credits._catalog_targets() t
      join credits.sold_prices s on t.code = case t.section when 'plan' then s.plan else s.package end
      join credits.stripe_objects o on o.kind = 'price' and o.object_id = s.stripe_price_id and not o.deleted and o.snapshot is not null
      cross join lateral (select credits._shown_price(o.snapshot)) p (shown)
     where t.object = 'price' and t.on_sale and t.stripe_id is null and s.retired_at is null
       and p.shown -> 'active' = 'true' and credits._differing(p.shown, t.fixed) = '{}'
       and credits._home_of('price', o.object_id) is null  -- the catalogue is published in the own account
     order by t.ref, s.created_at desc, s.stripe_price_id
  loop
    perform credits._bind_price((v_known.section, v_known.code, 'price', v_known.ref, null, false, true, null, null)::credits.catalog_target,
                                v_known.stripe_id);
  end loop;
  update credits.packages p
     set stripe_product_id = credits._shown_price(credits._snapshot('price', p.stripe_price_id)) ->> 'product'
   where p.stripe_product_id is null and credits._snapshot('price', p.stripe_price_id) is not null;
end $$;

-- From now on it is sold at this price. The one before stays known, and is deactivated.
create or replace function credits._bind_price(
  target   credits.catalog_target,
  price_id text
)
returns void
language plpgsql
as $$
begin
  if (_bind_price.target).stripe_id is not null then
    perform credits._sold((_bind_price.target).stripe_id, (_bind_price.target).section, (_bind_price.target).code, true);
  end if;
  perform credits._sold(_bind_price.price_id, (_bind_price.target).section, (_bind_price.target).code, false);
  update credits.packages p
     set stripe_price_id = _bind_price.price_id
   where (_bind_price.target).section = 'package' and p.code = (_bind_price.target).code;
  update credits.plan_prices c
     set stripe_price_id = _bind_price.price_id
   where concat_ws(':', 'plan', c.plan, 'price', c.currency, c."interval") = (_bind_price.target).ref;
  update credits.plans p
     set stripe_price_ids = p.stripe_price_ids || _bind_price.price_id
   where (_bind_price.target).section = 'plan' and p.code = (_bind_price.target).code
     and _bind_price.price_id <> all (p.stripe_price_ids);
end $$;

create or replace function credits._sold(
  price_id text,
  section  text,
  code     text,
  retired  boolean
)
returns void
language sql
as $$
  insert into credits.sold_prices as s (stripe_price_id, package, plan, amount, currency, credits, retired_at, created_at)
  select _sold.price_id, p.code, case _sold.section when 'plan' then _sold.code end, credits._whole(n.shown -> 'unit_amount'),
         n.shown ->> 'currency', coalesce(credits._decimal(n.shown #> '{metadata,credits}'), p.credits),
         case when _sold.retired then credits.now() end, credits.now()
    from (select credits._shown_price(credits._snapshot('price', _sold.price_id))) n (shown)
    left join credits.packages p on _sold.section = 'package' and p.code = _sold.code
  on conflict on constraint sold_prices_pkey do update
    set package = excluded.package, plan = excluded.plan, amount = coalesce(excluded.amount, s.amount),
        currency = coalesce(excluded.currency, s.currency), retired_at = excluded.retired_at
$$;
