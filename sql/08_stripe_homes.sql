-- In which account of Stripe an object lives. Stripe knows it in that one alone: what concerns it is asked there. Ids are unique over
-- all accounts, but for those of products and prices that somebody chose. Events and answers of a connected account say so of all that
-- they name, before anything is asked because of them; what nobody said it of is in the own account. An account that took away our
-- access is left alone.

create or replace function credits._home_of(
  kind      text,
  object_id text
)
returns text
language sql
stable
as $$
  select h.stripe_account from credits.stripe_homes h where h.kind = _home_of.kind and h.object_id = _home_of.object_id
$$;

-- Where a buyer pays: where its customer is.
create or replace function credits._home_of_buyer(account_id text)
returns text
language sql
stable
as $$
  select credits._home_of('customer', credits._customer_of(_home_of_buyer.account_id))
$$;

-- The first word stands, and the own account's is above all: a connected account may have made a product of the same id, and what it
-- said of that is forgotten. In the order of the key, so that of two that name the same ones neither waits for the other.
create or replace function credits._keep_homes(
  stripe_account text,
  object         jsonb
)
returns void
language plpgsql
as $$
begin
  if _keep_homes.stripe_account is not null then
    insert into credits.stripe_homes (kind, object_id, stripe_account)
    select n.kind, n.object_id, n.stripe_account
      from credits._shape_homes(_keep_homes.object, _keep_homes.stripe_account) n
     where not credits._lives_elsewhere(n.kind, n.object_id, n.stripe_account)
     order by n.kind, n.object_id
    on conflict on constraint stripe_homes_pkey do nothing;
  elsif _keep_homes.object ->> 'object' in ('product', 'price', 'list') then
    with ours as (
      delete from credits.stripe_homes h
       using credits._shape_homes(_keep_homes.object, null) n
       where n.kind in ('product', 'price') and h.kind = n.kind and h.object_id = n.object_id
      returning h.kind, h.object_id)
    update credits.stripe_objects o
       set snapshot = null, deleted = false
      from ours
     where o.kind = ours.kind and o.object_id = ours.object_id;
  end if;
end $$;

-- Whether an account tells of what is another one's. What is known, and nobody said where it is, is the own account's.
create or replace function credits._lives_elsewhere(
  kind           text,
  object_id      text,
  stripe_account text
)
returns boolean
language sql
stable
as $$
  select _lives_elsewhere.stripe_account is not null and _lives_elsewhere.kind in ('product', 'price')
         and coalesce(credits._home_of(_lives_elsewhere.kind, _lives_elsewhere.object_id) <> _lives_elsewhere.stripe_account,
                      credits._snapshot(_lives_elsewhere.kind, _lives_elsewhere.object_id) is not null)
$$;

-- What an answer says of the account in which it was asked for.
create or replace function credits._mind_the_account(
  request credits.stripe_requests,
  answer  jsonb
)
returns void
language plpgsql
as $$
declare
  v_account text := (_mind_the_account.request).stripe_account;
begin
  if v_account is null then
    perform credits._keep_homes(null, _mind_the_account.answer);
    return;
  elsif (_mind_the_account.request).http_status = 403
        and credits._error_of(_mind_the_account.answer, 'code') = 'account_invalid' then
    perform credits._disconnect(v_account, to_timestamp((_mind_the_account.request).as_of));
  elsif (_mind_the_account.request).http_status between 200 and 299 and credits._is_disconnected(v_account) then
    perform credits._reconnect(v_account, to_timestamp((_mind_the_account.request).as_of));
  end if;
  perform credits._keep_homes(v_account, _mind_the_account.answer);
end $$;

-- Accounts that are reached no more ----------------------------------------------------------------------------------

create or replace function credits._is_disconnected(stripe_account text)
returns boolean
language sql
stable
as $$
  select exists (select from credits.stripe_disconnections d
                  where d.stripe_account = _is_disconnected.stripe_account and d.resumed_at is null)
$$;

-- What happens in an account whose events nobody takes would be lost.
create or replace function credits._check_connected(stripe_account text)
returns void
language plpgsql
stable
as $$
begin
  if _check_connected.stripe_account is not null
     and (credits._is_disconnected(_check_connected.stripe_account)
          or not exists (select from credits.stripe_endpoints e where e.stripe_account = _check_connected.stripe_account)) then
    perform credits._fail(400, 'invalid_request',
      jsonb_build_object('argument', 'stripe_account', 'stripe_account', _check_connected.stripe_account),
      'stripe_account is a connected account whose events an endpoint takes, and that lets us in: see set_stripe_endpoint().');
  end if;
end $$;

-- What was said before it was connected again is over.
create or replace function credits._disconnect(
  stripe_account text,
  at             timestamptz
)
returns void
language plpgsql
as $$
begin
  insert into credits.stripe_disconnections as d (stripe_account, stopped_at)
  values (_disconnect.stripe_account, _disconnect.at)
  on conflict on constraint stripe_disconnections_pkey do update set stopped_at = excluded.stopped_at, resumed_at = null
    where d.resumed_at < excluded.stopped_at;
  if found then
    perform credits._notify(null, 'stripe_account_disconnected',
      concat_ws(':', _disconnect.stripe_account, extract(epoch from _disconnect.at)),
      jsonb_build_object('stripe_account', _disconnect.stripe_account, 'since', _disconnect.at));
  end if;
end $$;

-- Kept also of an account of which nobody knows that it was gone: that may be told later, as having been before. What its events
-- lacked was not asked for meanwhile.
create or replace function credits._reconnect(
  stripe_account text,
  at             timestamptz
)
returns void
language sql
as $$
  insert into credits.stripe_disconnections as d (stripe_account, resumed_at)
  values (_reconnect.stripe_account, _reconnect.at)
  on conflict on constraint stripe_disconnections_pkey do update set resumed_at = excluded.resumed_at
    where coalesce(d.stopped_at <= excluded.resumed_at, true) and coalesce(d.resumed_at < excluded.resumed_at, true);
  select credits._make_due(array(
    select e.event_id
      from credits.stripe_events e
     where e.status = 'parked' and e.waits_for is not null and e.stripe_account = _reconnect.stripe_account
       and coalesce(e.next_attempt_at > credits.now(), true)
       for no key update skip locked))
   where not credits._is_disconnected(_reconnect.stripe_account)
$$;

create or replace function credits._on_deauthorized(notice credits.stripe_notice)
returns credits.handler_result
language plpgsql
as $$
begin
  perform credits._disconnect(e.stripe_account, e.created_at)
     from credits.stripe_events e
    where e.event_id = (_on_deauthorized.notice).event_id and e.stripe_account is not null;
  return credits._applied();
end $$;

create or replace function credits._on_authorized(notice credits.stripe_notice)
returns credits.handler_result
language plpgsql
as $$
begin
  perform credits._reconnect(e.stripe_account, e.created_at)
     from credits.stripe_events e
    where e.event_id = (_on_authorized.notice).event_id and e.stripe_account is not null;
  return credits._applied();
end $$;
