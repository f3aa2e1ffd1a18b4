-- What may be asked of Checkout, and how: the arguments, the addresses that a buyer may be sent back to, and the parameters.
-- Amounts are integers and references ids, so that nothing in the parameters depends on how a client writes numbers.

insert into credits.settings as s (name, value, summary) values
  ('checkouts_per_hour', '100',
   'How many sessions of Checkout and of the customer portal one account may ask for within an hour.'),
  ('allowed_redirect_urls', '["http://localhost:*", "http://127.0.0.1:*"]',
   'Where Stripe may send people back to: a list of origins, or of addresses whose beginning it is. A port * is any.')
on conflict (name) do update set summary = excluded.summary;

create or replace function credits._check_checkout(asked jsonb)
returns void
language plpgsql
immutable
as $$
declare
  v_bad text := case
    when num_nonnulls(_check_checkout.asked ->> 'package', _check_checkout.asked ->> 'plan') <> 1
      then 'package, plan'
    when (credits._whole(_check_checkout.asked -> 'quantity') between 1 and 999999) is not true
      then 'quantity'
    when _check_checkout.asked ->> 'price_id' is not null and _check_checkout.asked ->> 'plan' is null
      then 'price_id'
    when not credits._is_stripe_metadata(_check_checkout.asked -> 'metadata')
      then 'metadata' end;
begin
  if v_bad is not null then
    perform credits._fail(400, 'invalid_request', jsonb_build_object('argument', v_bad), case v_bad
      when 'package, plan' then 'Name a package or a plan, and not both.'
      when 'quantity'      then 'quantity is from 1 to 999999.'
      when 'price_id'      then 'price_id chooses one of several prices of a plan.'
      else 'metadata is an object of at most 40 texts: names of up to 40 characters, values of up to 500; '
           'account_id, package, plan, quantity, purchase_id, checkout_id and top_up_id are ours.' end);
  end if;
end $$;

-- A browser may ask under any number of keys, and each is a request to Stripe. Counted under the lock of the account.
create or replace function credits._check_checkouts(account_id text)
returns void
language plpgsql
stable
as $$
declare
  v_limit  integer := credits._setting('checkouts_per_hour')::integer;
  v_used   bigint;
  v_resets timestamptz;
begin
  select count(*), (array_agg(c.created_at order by c.created_at desc))[v_limit] + interval '1 hour'
    into v_used, v_resets
    from credits.checkouts c
   where c.account_id = _check_checkouts.account_id and c.created_at > credits.now() - interval '1 hour';
  if v_used >= v_limit then
    perform credits._fail(429, 'rate_limited',
      jsonb_build_object('limit', v_limit, 'used', v_used, 'required', 1, 'resets_at', v_resets),
      'The setting checkouts_per_hour says how many sessions an account may ask for. What it was given may still be used.');
  end if;
end $$;

-- What is refused by name is what we read in events. The payment of a checkout has its metadata: one that called itself a
-- top-up would be paid once and granted twice.
create or replace function credits._is_stripe_metadata(metadata jsonb)
returns boolean
language sql
immutable
as $$
  select case when _is_stripe_metadata.metadata is null then true
              when jsonb_typeof(_is_stripe_metadata.metadata) <> 'object' then false
              else (select count(*) <= 40
                           and coalesce(bool_and(jsonb_typeof(m.value) = 'string' and length(m.key) between 1 and 40
                                                 and length(m.value #>> '{}') <= 500 and m.key !~ '[][]'
                                                 and m.key not in ('account_id', 'package', 'plan', 'quantity', 'purchase_id',
                                                                   'checkout_id', 'top_up_id')), true)
                      from jsonb_each(_is_stripe_metadata.metadata) m) end
$$;

-- Redirects ---------------------------------------------------------------------------------------------------------

create or replace function credits._check_redirect(
  url      text,
  argument text
)
returns void
language plpgsql
stable
as $$
declare
  v_allowed jsonb := credits._setting('allowed_redirect_urls');
begin
  if not credits._is_address(_check_redirect.url) then
    perform credits._fail(400, 'invalid_request', jsonb_build_object('argument', _check_redirect.argument),
      format('%s is an address such as https://example.com/thanks: http or https, no user name, no .. in its path.',
             _check_redirect.argument));
  elsif not exists (select from jsonb_array_elements(case jsonb_typeof(v_allowed) when 'array' then v_allowed else '[]' end) a
                     where credits._begins_with(_check_redirect.url, a #>> '{}')) then
    perform credits._fail(400, 'redirect_not_allowed',
      jsonb_build_object('argument', _check_redirect.argument, 'url', _check_redirect.url,
                         'setting', 'allowed_redirect_urls', 'allowed', v_allowed),
      'Add its origin, such as "https://example.com", to the list in the setting allowed_redirect_urls.');
  end if;
end $$;

-- Strict, since browsers are lenient: what could be read in two ways (a backslash, a user name, a blank) is no address.
create or replace function credits._is_address(url text)
returns boolean
language sql
immutable
as $$
  select coalesce(length(_is_address.url) <= 2000
                  and _is_address.url ~ E'^https?://[a-z0-9]([a-z0-9.-]*[a-z0-9])?(:[0-9]{1,5})?([/?#][!-[\\]-~]*)?$'
                  and _is_address.url !~* E'^[^?#]*/(\\.|%2e){2}([/?#]|$)', false)
$$;

-- An entry ends where a part of the address ends: https://example.com is not the beginning of https://example.com.evil.
create or replace function credits._begins_with(
  url   text,
  entry text
)
returns boolean
language sql
immutable
as $$
  select coalesce(e.entry <> '' and left(u.url, length(e.entry)) = e.entry
                  and (right(e.entry, 1) in ('/', '?', '#') and e.entry !~ '^https?://$'
                       or substr(u.url, length(e.entry) + 1, 1) in ('', '/', '?', '#')), false)
    from (select case when _begins_with.entry ~ E'^https?://[^/:]+:\\*'  -- a port of any kind is as if there were none
                      then regexp_replace(_begins_with.entry, E'^(https?://[^/:]+):\\*', E'\\1') else _begins_with.entry end) e (entry),
         lateral (select case when _begins_with.entry ~ E'^https?://[^/:]+:\\*'
                              then regexp_replace(_begins_with.url, '^(https?://[^/:?#]+):[0-9]+', E'\\1')
                              else _begins_with.url end) u (url)
$$;

-- What is sold ------------------------------------------------------------------------------------------------------

create or replace function credits._sell_package(
  checkout credits.checkouts,
  asked    jsonb
)
returns credits.checkouts
language plpgsql
as $$
declare
  v_checkout credits.checkouts := _sell_package.checkout;
  v_quantity integer := (_sell_package.asked ->> 'quantity')::integer;
  v_home     text := credits._home_of_buyer(v_checkout.account_id);
  v_package  credits.packages;
begin
  select p.* into v_package from credits.packages p where p.code = _sell_package.asked ->> 'package' and p.active;
  if not found then
    perform credits._fail(404, 'package_not_found', jsonb_build_object('package', _sell_package.asked ->> 'package'));
  elsif v_package.credits * v_quantity >= 1e12 or v_package.price::numeric * v_quantity >= 1e15 then
    perform credits._fail(400, 'invalid_request', jsonb_build_object('argument', 'quantity'), 'That is too much at once.');
  end if;
  insert into credits.purchases as p (account_id, package, quantity, credits, amount, amount_subtotal, currency, created_at)
  values (v_checkout.account_id, v_package.code, v_quantity, v_package.credits * v_quantity, v_package.price * v_quantity,
          v_package.price * v_quantity, v_package.currency, credits.now())
  returning p.purchase_id into v_checkout.purchase_id;

  if credits._home_of('price', v_package.stripe_price_id) is distinct from v_home then
    v_package.stripe_price_id := null;
  end if;
  if credits._home_of('product', v_package.stripe_product_id) is distinct from v_home then
    v_package.stripe_product_id := null;
  end if;
  v_checkout.request_id := credits._request('checkout', v_checkout.checkout_id, 'post', '/v1/checkout/sessions',
    credits._checkout_params(v_checkout, _sell_package.asked, 'payment',
      case when v_package.stripe_price_id is not null then jsonb_build_object('price', v_package.stripe_price_id)
           else jsonb_build_object('price_data', jsonb_strip_nulls(jsonb_build_object(
             'currency', v_package.currency, 'unit_amount', v_package.price, 'product', v_package.stripe_product_id,
             'product_data', case when v_package.stripe_product_id is null
                                  then jsonb_build_object('name', v_package.name) end))) end),
    v_checkout.account_id, stripe_account => v_home);
  return credits._keep_checkout(v_checkout);
end $$;

-- A plan is sold once: an account that has one at Stripe changes it there, or would pay for two.
create or replace function credits._sell_plan(
  checkout credits.checkouts,
  asked    jsonb
)
returns credits.checkouts
language plpgsql
as $$
declare
  v_checkout credits.checkouts := _sell_plan.checkout;
  v_current  credits.subscriptions := credits._own_subscription(v_checkout.account_id);
  v_home     text := credits._home_of_buyer(v_checkout.account_id);
  v_plan     credits.plans;
  v_price    text := _sell_plan.asked ->> 'price_id';
begin
  select p.* into v_plan from credits.plans p where p.code = _sell_plan.asked ->> 'plan' and p.active;
  if not found then
    perform credits._fail(404, 'plan_not_found', jsonb_build_object('plan', _sell_plan.asked ->> 'plan'));
  elsif v_current.source = 'stripe' and v_current.state <> 'incomplete' then
    perform credits._fail(409, 'already_subscribed',
      jsonb_build_object('account_id', v_checkout.account_id, 'plan', v_current.plan, 'state', v_current.state),
      'change_plan() changes the subscription that there is.');
  elsif v_price is null then
    v_price := credits._price_of_plan(v_plan.code, null, v_home);
  elsif credits._is_retired(v_price) or not credits._is_price_of(v_price, v_home)
        or credits._plan_of_price(v_price, (select o.ref from credits.stripe_objects o
                                             where o.kind = 'price' and o.object_id = v_price)) is distinct from v_plan.code then
    v_price := null;
  end if;
  if v_price is null then
    perform credits._fail(404, 'price_not_found',
      jsonb_strip_nulls(jsonb_build_object('plan', v_plan.code, 'price_id', _sell_plan.asked ->> 'price_id')),
      'Publish the plan, or give it its stripe_price_ids: without a price it cannot be sold at Stripe.');
  end if;
  v_checkout.request_id := credits._request('checkout', v_checkout.checkout_id, 'post', '/v1/checkout/sessions',
    credits._checkout_params(v_checkout, _sell_plan.asked, 'subscription', jsonb_build_object('price', v_price)),
    v_checkout.account_id, stripe_account => v_home);
  return credits._keep_checkout(v_checkout);
end $$;

-- Metadata do not travel from one object of Stripe to another, so each gets its own. A customer that is bound is named;
-- otherwise Stripe makes one where there is something to keep.
create or replace function credits._checkout_params(
  checkout credits.checkouts,
  asked    jsonb,
  mode     text,
  item     jsonb
)
returns jsonb
language sql
stable
as $$
  select jsonb_strip_nulls(jsonb_build_object(
    'mode',                  _checkout_params.mode,
    'success_url',           q.asked -> 'success_url',
    'cancel_url',            q.asked -> 'cancel_url',
    'client_reference_id',   a.account_id,
    'customer',              c.customer_id,
    'customer_creation',     case when c.customer_id is null and s.saves and _checkout_params.mode = 'payment' then 'always' end,
    'customer_email',        case when c.customer_id is null then nullif(a.email, '') end,
    'line_items',            jsonb_build_array(_checkout_params.item || jsonb_build_object('quantity', q.asked -> 'quantity')),
    'metadata',              m.metadata,
    'allow_promotion_codes', nullif(q.asked -> 'allow_promotion_codes', 'false'),
    'payment_intent_data',   case _checkout_params.mode when 'payment' then jsonb_build_object(
                               'metadata', m.metadata, 'setup_future_usage', case when s.saves then 'off_session' end) end,
    'subscription_data',     case _checkout_params.mode when 'subscription'
                               then jsonb_build_object('metadata', m.metadata) end))
    from (select _checkout_params.asked) q (asked)
    join credits.accounts a on a.account_id = (_checkout_params.checkout).account_id,
         lateral (select credits._customer_of(a.account_id)) c (customer_id),
         lateral (select (q.asked -> 'save_card')::boolean) s (saves),
         lateral (select coalesce(q.asked -> 'metadata', '{}') || jsonb_strip_nulls(jsonb_build_object(
                           'account_id', a.account_id, 'package', q.asked ->> 'package', 'plan', q.asked ->> 'plan',
                           'quantity', q.asked ->> 'quantity', 'checkout_id', (_checkout_params.checkout).checkout_id,
                           'purchase_id', (_checkout_params.checkout).purchase_id::text)) as metadata) m
$$;

-- What failed before it had a session may still be sold: by another request, under the same checkout.
create or replace function credits._on_checkout_again(notice credits.stripe_notice)
returns credits.handler_result
language plpgsql
as $$
declare
  v_request credits.stripe_requests := credits._answered(_on_checkout_again.notice);
begin
  perform credits._lock_account(v_request.account_id);
  update credits.checkouts c set request_id = v_request.request_id where c.checkout_id = v_request.ref;
  update credits.purchases p
     set status = 'pending'
    from credits.checkouts c
   where c.checkout_id = v_request.ref and p.account_id = c.account_id and p.purchase_id = c.purchase_id
     and p.status = 'failed' and p.stripe_session_id is null;
  return credits._applied();
end $$;
