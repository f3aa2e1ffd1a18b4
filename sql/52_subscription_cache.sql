-- The subscription cache: what get_subscription_state() says of an account, remembered for subscription_cache_ttl.
-- It is never wrong about our own data. A row is served only while the rows that it was computed from are the same
-- (version) and nothing has changed by itself (expires_at); so it does not matter which of two transactions stores first,
-- nor who forgets to drop a row. Its age only bounds how old our knowledge of Stripe is.
-- Lock order: nobody waits for a row of the cache, and a row that is served is not locked. So it may be read and filled
-- before, after and without the lock of an account.

insert into credits.settings as s (name, value, summary) values
  ('subscription_cache_ttl', '"5 minutes"', 'How old our knowledge of a subscription of Stripe may be before it is called stale.')
on conflict (name) do update set summary = excluded.summary;

create or replace function credits.get_user_subscription_state(user_id text)
returns json
language plpgsql
security definer
set search_path = pg_catalog, pg_temp
as $$
begin
  return credits._entry_json(credits._cached_state(get_user_subscription_state.user_id));
end $$;
comment on function credits.get_user_subscription_state(text) is
'The state of an account''s subscription, as get_subscription_state() gives it, from a cache.

user_id is the account_id. The object has the fields of get_subscription_state(), cached (whether it was served from the
cache) and refreshed_at (when it was computed). It is always true to our own data, whoever changed it and however recently;
only what Stripe has not told us yet may be missing, for subscription_cache_ttl (5 minutes) at most. Then a live subscription
of Stripe is served with stale = true, and one refresh is queued.
Errors: 400 invalid_request, 404 account_not_found.';

create or replace function credits.update_subscription_cache(user_id text)
returns json
language plpgsql
security definer
set search_path = pg_catalog, pg_temp
as $$
begin
  return credits._entry_json(credits._remember_state(update_subscription_cache.user_id));
end $$;
comment on function credits.update_subscription_cache(text) is
'Computes the state of an account''s subscription now and caches it; answers as get_user_subscription_state() does.

It is never needed for the cache to be right, and counts neither as a hit nor as a miss.
Errors: 400 invalid_request, 404 account_not_found.';

create or replace function credits.get_subscription_cache_status()
returns credits.subscription_cache_status
language sql
stable
security definer
set search_path = pg_catalog, pg_temp
as $$
  select count(c.account_id), count(*) filter (where c.expires_at > t.at), count(*) filter (where c.expires_at <= t.at),
         min(c.refreshed_at), t.hits, t.misses, round(t.hits::numeric / nullif(t.hits + t.misses, 0), 4)
    from (select credits.now() as at,
                 (select case when h.is_called then h.last_value else 0 end from credits.subscription_cache_hits h) as hits,
                 (select case when m.is_called then m.last_value else 0 end from credits.subscription_cache_misses m) as misses) t
    left join credits.subscription_cache c on true
   group by t.at, t.hits, t.misses
$$;
comment on function credits.get_subscription_cache_status() is
'How the subscription cache does: its rows, the fresh and the expired ones, the oldest, hits, misses and hit_rate.

oldest is when the oldest row was computed. hit_rate is hits / (hits + misses) since the installation, from 0 to 1; null while
nobody has asked. Calls whose transaction was undone count too, and a crash of the server may add up to 32 to either count.';

-- Helpers -----------------------------------------------------------------------------------------------------------

create or replace function credits._entry_json(entry credits.subscription_cache_entry)
returns json
language plpgsql
stable
as $$
begin
  return to_jsonb((_entry_json.entry).state)
         || jsonb_build_object('cached', (_entry_json.entry).cached, 'refreshed_at', (_entry_json.entry).refreshed_at);
end $$;

-- What is cached if it holds, else what is computed now. The counters are sequences: a row would be locked until its reader's
-- transaction ends, and readers would stand in line for it.
create or replace function credits._cached_state(account_id text)
returns credits.subscription_cache_entry
language plpgsql
as $$
declare
  v_entry credits.subscription_cache_entry;
begin
  select jsonb_populate_record(null::credits.subscription_state_result, c.state), c.refreshed_at, true
    into v_entry.state, v_entry.refreshed_at, v_entry.cached
    from credits.subscription_cache c
   where c.account_id = _cached_state.account_id and c.expires_at > credits.now()
     and c.version = credits._subscription_version(c.account_id);
  if not found then
    v_entry := credits._remember_state(_cached_state.account_id);
  end if;
  if credits._may_write() then
    perform nextval(case when v_entry.cached then 'credits.subscription_cache_hits'
                         else 'credits.subscription_cache_misses' end);
  end if;
  return v_entry;
end $$;

-- State and version are read by one statement, hence of one moment. Whoever stores an old pair later than it became old has
-- stored a row that is not served. Only one fills the row of an account at a time; others do not wait, they have their
-- answer. So a transaction that goes on to lock the account cannot be in anybody's way here.
create or replace function credits._remember_state(account_id text)
returns credits.subscription_cache_entry
language plpgsql
as $$
declare
  v_now     timestamptz := credits.now();
  v_entry   credits.subscription_cache_entry;
  v_version bigint;
  v_expires timestamptz;
begin
  select s, v_now, false, credits._subscription_version(s.account_id), credits._state_until(s, v_now)
    into v_entry.state, v_entry.refreshed_at, v_entry.cached, v_version, v_expires
    from credits.get_subscription_state(_remember_state.account_id) s;
  if credits._may_write()
     and pg_try_advisory_xact_lock(hashtextextended('subscription_cache:' || _remember_state.account_id, 0)) then
    insert into credits.subscription_cache as c (account_id, state, version, refreshed_at, expires_at)
    values (_remember_state.account_id, to_jsonb(v_entry.state), v_version, v_now, v_expires)
    on conflict on constraint subscription_cache_pkey do update
      set state = excluded.state, version = excluded.version, refreshed_at = excluded.refreshed_at,
          expires_at = excluded.expires_at;
    if (v_entry.state).stale then
      perform credits._ask_anew((v_entry.state).subscription_id);
    end if;
  end if;
  return v_entry;
end $$;

-- A read-only transaction, or a standby, is served without leaving a trace.
create or replace function credits._may_write()
returns boolean
language plpgsql
stable
as $$
begin
  return not current_setting('transaction_read_only')::boolean;
end $$;

-- Stripe is asked once: a request that is open is left as it is, since whoever works on it may be waiting for us.
create or replace function credits._ask_anew(subscription_id text)
returns void
language sql
as $$
  select credits._request_object('subscription', _ask_anew.subscription_id)
   where credits._open_request('retrieve', 'subscription:' || _ask_anew.subscription_id) is null
$$;

-- Everything of ours that a state is made of, but for plans and settings. Hashed by value: a text would differ with the
-- reader's time zone.
create or replace function credits._subscription_version(account_id text)
returns bigint
language plpgsql
stable
as $$
begin
  return (
    select hash_record_extended(row(a.plan, x.version), 0)
      from credits.accounts a,
           lateral (select bit_xor(hash_record_extended(row(s, o.as_of, o.updated_at), 0)) as version
                      from credits.subscriptions s
                      left join credits.stripe_objects o
                        on o.kind = 'subscription' and o.object_id = s.subscription_id and s.source = 'stripe'
                     where s.account_id = a.account_id) x
     where a.account_id = _subscription_version.account_id);
end $$;

-- Until when a state stays what it is if nobody changes anything: grace ends, a plan of our own turns, a subscription of
-- Stripe becomes stale. Moments at which nothing changes by itself cost one computation more.
create or replace function credits._state_until(
  state credits.subscription_state_result,
  at    timestamptz
)
returns timestamptz
language sql
stable
as $$
  select least(_state_until.at + t.ttl, min(m.at) filter (where m.at > _state_until.at))
    from (select (credits._setting('subscription_cache_ttl') #>> '{}')::interval as ttl) t,
         lateral (
           select to_timestamp(o.as_of) + t.ttl + interval '1 microsecond'  -- stale is later than that
             from credits.stripe_objects o
            where o.kind = 'subscription' and o.object_id = (_state_until.state).subscription_id
           union all
           select unnest(array[(_state_until.state).grace_until, (_state_until.state).period_end,
                               (_state_until.state).trial_end, (_state_until.state).cancel_at,
                               (_state_until.state).pending_at])) m (at)
   group by t.ttl
$$;

-- Whatever changes a state drops what was remembered of it, in the same transaction. A row that somebody is storing now
-- stays: it is not served, since its version is another.
create or replace function credits._forget_subscription(account_id text)
returns void
language plpgsql
as $$
begin
  delete from credits.subscription_cache c
   using (select e.account_id
            from credits.subscription_cache e
           where e.account_id = _forget_subscription.account_id
             for update skip locked) e
   where c.account_id = e.account_id;
end $$;
