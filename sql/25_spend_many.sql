-- Thousands of spends in one call. Requests of accounts that can pay all of theirs are booked together, one statement
-- per table; all others go one by one through spend(), which knows every error.
-- Keeps what spend() keeps. Lock order: all accounts by account_id first.

create or replace function credits.spend_many(requests jsonb)
returns setof credits.spend_many_result
language plpgsql
security definer
set search_path = pg_catalog, pg_temp
as $$
declare
  v_requests credits.spend_request[];
begin
  if (case jsonb_typeof(spend_many.requests) when 'array' then jsonb_array_length(spend_many.requests) <= 10000 end)
     is not true then
    perform credits._fail(400, 'invalid_request', jsonb_build_object('argument', 'requests'),
      'requests is a JSON array of at most 10000 objects.');
  end if;
  v_requests := credits._read_requests(spend_many.requests);
  perform credits._lock_accounts(array(select distinct r.account_id from unnest(v_requests) r));
  v_requests := credits._mark_simple(v_requests);
  return query
    select t.*
      from credits._spend_together(v_requests) t
    union all
    select o.*
      from unnest(v_requests) r, lateral credits._spend_alone(r) o
     where not r.simple
     order by 1;
end $$;
comment on function credits.spend_many(jsonb) is
'Uses credits for many requests in one transaction, one result per request, in their order.

requests is an array of at most 10,000 objects with the arguments of spend: account_id, amount, key, and if wanted
description, subject, member_id, capability, metadata. A request that is refused does not stop the others: its result has
the status and code of the error that spend would raise, a booked one has status 200.
Errors: 400 invalid_request, for the whole call.';

create or replace function credits._read_requests(requests jsonb)
returns credits.spend_request[]
language sql
immutable
as $$
  select coalesce(array_agg(row(
           r.position, r.request ->> 'account_id',
           case when r.request ->> 'amount' ~ E'^[-+]?[0-9]{1,40}(\\.[0-9]{0,40})?$'
                then trim_scale((r.request ->> 'amount')::numeric) end,
           r.request ->> 'description', r.request ->> 'subject', r.request ->> 'member_id',
           r.request ->> 'capability', r.request ->> 'key', nullif(r.request -> 'metadata', 'null'), false
         )::credits.spend_request order by r.position), '{}')
    from jsonb_array_elements(_read_requests.requests) with ordinality r (request, position)
$$;

-- Simple: all requests of the account are well formed with new keys, it is active and can pay them all, and so may each
-- member. So an account's requests are served in their order: together, or one by one.
create or replace function credits._mark_simple(requests credits.spend_request[])
returns credits.spend_request[]
language plpgsql
stable
as $$
declare
  v_now      timestamptz := credits.now();
  v_requests credits.spend_request[];
begin
  with plain as (
    select r.account_id, r.amount,
           r.capability is null
             and credits._is_request(r.amount, r.key, r.metadata)
             and count(*) over (partition by r.account_id, r.key) = 1
             and e.entry_seq is null as ok
      from unnest(_mark_simple.requests) r
      left join credits.entries e on e.account_id = r.account_id and e.operation = 'spend' and e.key = r.key
  ), wanted as (
    select p.account_id, sum(p.amount) as total
      from plain p
     group by p.account_id
    having bool_and(coalesce(p.ok, false))
  ), payers as (
    select w.account_id
      from wanted w
      join credits.balances b on b.account_id = w.account_id
     where b.status = 'active' and b.debt = 0 and w.total <= credits._free(b)
       and (credits._would_be_low(b, w.total) or b.has_scoped and b.low_at is not null) is not true
  ), refused as (
    select u.account_id
      from (select r.account_id, r.member_id, sum(r.amount) as amount
              from unnest(_mark_simple.requests) r
             where r.member_id is not null
             group by r.account_id, r.member_id) u,
           lateral credits._members_at(u.account_id, v_now) m
     where m.member_id = u.member_id and (not m.active or m.month_used + u.amount > m.monthly_limit)
  )
  select coalesce(array_agg(row(r.position, r.account_id, r.amount, r.description, r.subject, r.member_id, r.capability,
           r.key, r.metadata, p.account_id is not null and r.account_id not in (select f.account_id from refused f)
           )::credits.spend_request order by r.position), '{}')
    into v_requests
    from unnest(_mark_simple.requests) r
    left join payers p on p.account_id = r.account_id;
  return v_requests;
end $$;

-- Lays the requests of each account and the credits of its grants along one line of credits: where a request and a grant
-- overlap, the one is paid by the other.
drop function if exists credits._spend_together(credits.spend_request[]);
create or replace function credits._spend_together(requests credits.spend_request[])
returns setof credits.spend_many_result
language plpgsql
as $$
declare
  v_now timestamptz := credits.now();
begin
  return query
    with requests as (
      select r.*, b.entry_seq + row_number() over by_account as entry_seq,
             b.balance - sum(r.amount) over by_account       as balance_after,
             sum(r.amount) over by_account - r.amount        as before,
             sum(r.amount) over by_account                   as upto,
             b.hash                                          as head,
             lead(r.position) over by_account is null        as is_last
        from unnest(_spend_together.requests) r
        join credits.balances b on b.account_id = r.account_id
       where r.simple
      window by_account as (partition by r.account_id order by r.position)
    ), lots as (
      select g.account_id, g.grant_id, g.remaining, row_number() over consumption as place,
             sum(g.remaining) over consumption - g.remaining                      as before,
             sum(g.remaining) over consumption                                    as upto,
             sum(g.remaining) over (partition by g.account_id)                    as free
        from credits.grants g
       where g.account_id in (select r.account_id from requests r)
         and g.status = 'active' and g.remaining > 0 and g.scope is null
      window consumption as (partition by g.account_id
                             order by g.priority, g.expires_at nulls last, g.effective_at, g.grant_id)
    ), slices as (
      select r.position, r.account_id, l.grant_id, l.place, l.free,
             least(r.upto, l.upto) - greatest(r.before, l.before) as amount
        from requests r
        join lots l on l.account_id = r.account_id and l.before < r.upto and r.before < l.upto
    ), paid as (
      select s.position, min(s.free) as free, array_agg(s.grant_id order by s.place) as grant_ids,
             array_agg(trim_scale(s.amount) order by s.place) as amounts
        from slices s
       group by s.position
    ), drafts as (
      select r.position, r.account_id, r.head, r.is_last, row(
               r.entry_seq, v_now, r.account_id, 'spend', 'spend', r.key, -r.amount, 0,
               trim_scale(r.balance_after), trim_scale(p.free - r.upto), p.grant_ids, p.amounts, null, null, null,
               r.subject, r.member_id, null, r.description,
               credits._spend_print(r.amount, r.description, r.subject, r.member_id, r.capability, r.metadata),
               coalesce(r.metadata, '{}'))::credits.entries as entry
        from requests r
        join paid p on p.position = r.position
    ), chained as (
      select d.*, credits._hash_chain(d.head, credits._entry_text(d.entry))
                    over (partition by d.account_id order by (d.entry).entry_seq) as hash
        from drafts d
    ), booked as (
      insert into credits.entries (entry_seq, created_at, account_id, kind, operation, key, amount, debt, balance_after,
        available_after, grant_ids, grant_amounts, hash, subject, member_id, description, fingerprint, metadata)
      select (c.entry).entry_seq, (c.entry).created_at, (c.entry).account_id, (c.entry).kind, (c.entry).operation,
             (c.entry).key, (c.entry).amount, (c.entry).debt, (c.entry).balance_after, (c.entry).available_after,
             (c.entry).grant_ids, (c.entry).grant_amounts, c.hash, (c.entry).subject, (c.entry).member_id,
             (c.entry).description, (c.entry).fingerprint, (c.entry).metadata
        from chained c
    ), consumed as (
      update credits.grants g
         set remaining = g.remaining - s.amount,
             consumed  = g.consumed + s.amount,
             status    = case when g.remaining = s.amount and g.held = 0 then 'exhausted' else g.status end
        from (select t.account_id, t.grant_id, sum(t.amount) as amount from slices t group by t.account_id, t.grant_id) s
       where g.account_id = s.account_id and g.grant_id = s.grant_id
    ), counted as (
      update credits.balances b
         set balance = (c.entry).balance_after, entry_seq = (c.entry).entry_seq, hash = c.hash
        from chained c
       where b.account_id = c.account_id and c.is_last
    )
    select c.position, c.account_id, (c.entry).key, 200, null::text, null::jsonb, (c.entry).entry_seq, (c.entry).amount,
           (c.entry).balance_after, (c.entry).available_after, false
      from chained c;

  perform credits._count_member(u.account_id, u.member_id, u.amount, v_now)
     from (select m.account_id, m.member_id, sum(r.amount) as amount
             from unnest(_spend_together.requests) r
             join credits.members m on m.account_id = r.account_id and m.member_id = r.member_id
            where r.simple
            group by m.account_id, m.member_id) u;
  perform credits._after_debit(b.account_id)
     from credits.balances b
    where b.account_id = any (array(select distinct r.account_id from unnest(_spend_together.requests) r where r.simple))
      and b.topup_below is not null and credits._free(b) - b.debt < b.topup_below;
end $$;

create or replace function credits._spend_alone(request credits.spend_request)
returns credits.spend_many_result
language plpgsql
as $$
declare
  v_request credits.spend_request := _spend_alone.request;
  v_result  credits.entry_result;
  v_code    text;
  v_detail  text;
begin
  v_result := credits.spend(v_request.account_id, v_request.amount, v_request.description, v_request.subject,
    v_request.member_id, v_request.capability, v_request.key, v_request.metadata);
  return row(v_request.position, v_result.account_id, v_request.key, 200, null, null, v_result.entry_seq,
             v_result.amount, v_result.balance, v_result.available, v_result.replayed)::credits.spend_many_result;
exception when others then
  if sqlstate not like 'PT%' then
    raise;
  end if;
  get stacked diagnostics v_code = message_text, v_detail = pg_exception_detail;
  return row(v_request.position, v_request.account_id, v_request.key, substr(sqlstate, 3)::integer, v_code,
             v_detail::jsonb, null, null, null, null, null)::credits.spend_many_result;
end $$;
