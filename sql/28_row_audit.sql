-- What single rows must say: a hold its slices, a grant what was asked for, a member what was used, a subscription where its
-- history left it, an account a time zone that there is. Part of audit(); the first three also of prove_balance().

-- The slices of a hold are what it holds, of grants that are there. What pinned too much would be charged from nowhere.
create or replace function credits._audit_holds(account_id text)
returns setof credits.audit_finding
language sql
stable
as $$
  select 'reservations_hold_their_slices', r.account_id,
         jsonb_build_object('reservation_id', r.reservation_id, 'held', r.amount - r.captured, 'slices', s.amount)
    from credits.reservations r,
         lateral (select coalesce(sum(p.amount), 0) as amount,
                         coalesce(bool_and(p.amount > 0 and g.grant_id is not null), true) as sound
                    from unnest(r.grant_ids, r.grant_amounts) p (grant_id, amount)
                    left join credits.grants g on g.account_id = r.account_id and g.grant_id = p.grant_id) s
   where r.status = 'open' and (_audit_holds.account_id is null or r.account_id = _audit_holds.account_id)
     and (s.amount <> r.amount - r.captured or not s.sound)
$$;

-- A grant of grant_credits() or of an import keeps the arguments of its call, and credits that were bought or corrected never
-- end. Not of one whose account was erased, nor of plans and gifts, whose time is that of a period or of what was given.
create or replace function credits._audit_terms(account_id text)
returns setof credits.audit_finding
language sql
stable
as $$
  select 'grants_are_what_was_asked_for', g.account_id,
         jsonb_build_object('grant_id', g.grant_id, 'expires_at', g.expires_at, 'effective_at', g.effective_at,
                            'priority', g.priority, 'asked', g.fingerprint - 'description' - 'metadata')
    from credits.grants g
   where (_audit_terms.account_id is null or g.account_id = _audit_terms.account_id)
     and case when g.source ~ '^(adjust$|checkout:|top_up:)' then g.expires_at is not null
              when g.source <> 'import' or g.key is null or g.fingerprint ? 'erased' then false
              else (g.fingerprint -> 'amount', coalesce(g.fingerprint ->> 'kind', 'bonus'), g.fingerprint -> 'expires_at',
                    g.fingerprint -> 'scope')
                   is distinct from
                   (to_jsonb(g.amount::numeric), g.kind::text, to_jsonb(extract(epoch from g.expires_at)), to_jsonb(g.scope))
                   or g.fingerprint -> 'effective_at' <> to_jsonb(extract(epoch from g.effective_at))
                   or g.fingerprint -> 'priority' <> to_jsonb(g.priority) end
$$;

-- What each member has used in the present month, counted anew. Months that are over are not kept, nor is the present one
-- where the clock was set back.
create or replace function credits._audit_members(account_id text)
returns setof credits.audit_finding
language plpgsql
stable
as $$
declare
  v_now timestamptz := credits.now();
begin
  return query
    select 'member_use_is_what_entries_say', m.account_id,
           jsonb_build_object('member_id', m.member_id, 'month_start', m.month_start, 'month_used', m.month_used,
                              'entries_month', c.month_start, 'entries_used', c.month_used)
      from credits._members_counted(_audit_members.account_id, v_now) c
      join credits.members m on m.account_id = c.account_id and m.member_id = c.member_id
     where m.month_start <= c.month_start
       and case m.month_start when c.month_start then m.month_used else 0 end <> c.month_used;
end $$;

create or replace function credits._audit_histories()
returns setof credits.audit_finding
language sql
stable
as $$
  select 'subscriptions_are_as_their_history', s.account_id,
         jsonb_build_object('subscription_id', s.subscription_id, 'state', s.state, 'history', h.to_state)
    from credits.subscriptions s
    left join lateral (select n.to_state
                         from credits.subscription_history n
                        where n.account_id = s.account_id and n.subscription_id = s.subscription_id
                          and n.from_state <> n.to_state
                        order by n.history_id desc
                        limit 1) h on true
   where s.state <> coalesce(h.to_state, 'none')
$$;

-- A server may come to know fewer time zones, as when the old names are left out of its packages. Whatever counts by the
-- account's days and months fails from then on.
create or replace function credits._audit_zones()
returns setof credits.audit_finding
language sql
stable
as $$
  with zones as materialized (
    select distinct a.time_zone from credits.accounts a
  ), unknown as materialized (
    select z.time_zone from zones z where not credits._is_zone(z.time_zone)
  )
  select 'time_zones_are_known', a.account_id, jsonb_build_object('time_zone', a.time_zone)
    from credits.accounts a
    join unknown u on u.time_zone = a.time_zone
$$;

-- Tried, since the list of all zones is read from as many files.
create or replace function credits._is_zone(time_zone text)
returns boolean
language plpgsql
stable
as $$
begin
  return date_trunc('day', timestamptz 'epoch', _is_zone.time_zone) is not null;
exception when invalid_parameter_value then
  return false;
end $$;
