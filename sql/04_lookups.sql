-- A post whose outcome stayed unknown for 23 hours is looked for at Stripe before anybody is troubled with it: the lists of what
-- such posts make are complete at once, so what they do not hold was never made. Found, it is the answer that was lost.
-- Lock order: the request that looks, then the one it looks for, then what the handlers lock.

with listed (purpose, path, narrow, mark, missing) as (values
  ('refund',   '/v1/refunds',           '{payment_intent}'::text[], 'refund_request_id', 'again'),
  ('customer', '/v1/customers',         '{}',                       'account_id',        'again'),
  ('top_up',   '/v1/payment_intents',   '{customer}',               'top_up_id',         'failed'),
  ('checkout', '/v1/checkout/sessions', '{}',                       'checkout_id',       'failed'),
  ('portal',   null,                    '{}',                       null,                'failed'),
  ('change_plan',     null, '{}', null, 'failed'),  -- what is done to a subscription shows in it: it is retrieved
  ('schedule_plan',   null, '{}', null, 'failed'),
  ('schedule_phases', null, '{}', null, 'failed'),
  ('release_plan',    null, '{}', null, 'failed'),
  ('cancel_plan',     null, '{}', null, 'failed'),
  ('resume_plan',     null, '{}', null, 'failed')
), kept as (
  insert into credits.stripe_lookups as k (purpose, path, narrow, mark, missing)
  select l.purpose, l.path, l.narrow, l.mark, l.missing from listed l
  on conflict (purpose) do update
    set path = excluded.path, narrow = excluded.narrow, mark = excluded.mark, missing = excluded.missing
)
delete from credits.stripe_lookups k where k.purpose not in (select l.purpose from listed l);

create or replace function credits.resume_after_restore()
returns bigint
language plpgsql
security definer
set search_path = pg_catalog, pg_temp
as $$
declare
  v_request_id bigint;
  v_aside      bigint := 0;
begin
  perform setval(s.name, nextval(s.name) + 1000000000)
     from (select pg_get_serial_sequence('credits.' || quote_ident(t.relname), a.attname)::regclass as name
             from pg_catalog.pg_class t
             join pg_catalog.pg_attribute a on a.attrelid = t.oid and a.attidentity <> ''
            where t.relnamespace = 'credits'::regnamespace) s;
  for v_request_id in
    select r.request_id
      from credits.stripe_requests r
     where r.state in ('queued', 'sent') and r.method = 'post'
     order by r.request_id
       for no key update
  loop
    perform credits._leave_unknown(v_request_id);
    v_aside := v_aside + 1;
  end loop;
  return v_aside;
end $$;
comment on function credits.resume_after_restore() is
'For a database that was restored to an earlier moment, before its workers run: what it did since is not done again.

Posts to Stripe that wait may have been made since. They become unknown, and are looked for as such before anything is asked anew;
answers how many. All numbers go on a thousand million further, so that no id that others know (an idempotency key, a purchase in
Stripe''s metadata, the message id of a notification) is given to something else. Safe to repeat.
Errors: none.';

-- Helpers -------------------------------------------------------------------------------------------------------------

-- Whether an unknown request is settled without a person: by what it made, which is looked for, or because it made nothing lasting.
create or replace function credits._look_up(
  request credits.stripe_requests,
  after   text default null
)
returns boolean
language plpgsql
as $$
declare
  v_request credits.stripe_requests := _look_up.request;
  v_lookup  credits.stripe_lookups;
begin
  select k.* into v_lookup from credits.stripe_lookups k where k.purpose = v_request.purpose;
  if not found or v_lookup.path is not null and v_request.params #>> array['metadata', v_lookup.mark] is null then
    return false;
  elsif v_lookup.path is null then
    perform credits._end_missing(v_request, v_lookup.missing, 'outcome_unknown');
  else
    perform credits._request('lookup', v_request.request_id::text, 'get', v_lookup.path,
      (select coalesce(jsonb_object_agg(p.key, p.value), '{}')
         from jsonb_each(v_request.params) p
        where p.key = any (v_lookup.narrow))
      || jsonb_strip_nulls(jsonb_build_object(
           'limit', 100, 'starting_after', _look_up.after, 'created', jsonb_build_object(
             'gte', floor(extract(epoch from v_request.first_sent_at - interval '1 hour'))::bigint))),  -- clocks differ
      v_request.account_id, stripe_account => v_request.stripe_account);
  end if;
  return true;
end $$;

create or replace function credits._on_lookup(notice credits.stripe_notice)
returns credits.handler_result
language plpgsql
as $$
declare
  v_list    jsonb := (_on_lookup.notice).object;
  v_lookup  credits.stripe_lookups;
  v_request credits.stripe_requests;
  v_made    jsonb;
begin
  select r.* into v_request
    from credits.stripe_requests r
   where r.request_id = (credits._answered(_on_lookup.notice)).ref::bigint
     for no key update;
  if v_request.state <> 'unknown' then  -- its own answer has come, or somebody has decided
    return credits._applied();
  end if;
  select k.* into v_lookup from credits.stripe_lookups k where k.purpose = v_request.purpose;
  select e into v_made
    from credits._elements(v_list) e
   where e #>> array['metadata', v_lookup.mark] = v_request.params #>> array['metadata', v_lookup.mark]
   limit 1;
  if found then
    perform credits._answer_found(v_request, v_made, (_on_lookup.notice).at);
  elsif credits._has_more(v_list) and credits._last_id(v_list) is not null then
    perform credits._look_up(v_request, credits._last_id(v_list));
  else
    perform credits._end_missing(v_request, v_lookup.missing, 'never_done');
  end if;
  return credits._applied();
end $$;

-- What cannot be applied yet is looked up again later.
create or replace function credits._answer_found(
  request credits.stripe_requests,
  made    jsonb,
  at      bigint
)
returns void
language plpgsql
as $$
declare
  v_request credits.stripe_requests := _answer_found.request;
  v_verdict credits.event_verdict;
begin
  v_request.as_of       := _answer_found.at;
  v_request.http_status := 200;
  v_request.error_type  := null;
  v_request.state       := 'sent';
  v_verdict := credits._apply_answer(v_request, _answer_found.made);
  if v_verdict.status in ('failed', 'parked') then
    perform credits._park(coalesce(v_verdict.reason, v_verdict.error), v_verdict.waits_for);
  end if;
  perform credits._close_request(v_request, 'done', _answer_found.made, null);
end $$;

drop function if exists credits._end_missing(credits.stripe_requests, text);
create or replace function credits._end_missing(
  request credits.stripe_requests,
  missing text,
  error   text
)
returns void
language plpgsql
as $$
declare
  v_request credits.stripe_requests;
begin
  update credits.stripe_requests r
     set state = 'failed', error_type = _end_missing.error, finished_at = credits.now()
   where r.request_id = (_end_missing.request).request_id
  returning r.* into v_request;
  if _end_missing.missing = 'again' then
    perform credits._ask_again(v_request);
  else
    perform credits._tell_request(v_request, 'stripe_request_failed');
    perform credits._tell_asker(v_request, 'failed', null);
  end if;
end $$;

create or replace function credits._on_failed_lookup(notice credits.stripe_notice)
returns credits.handler_result
language plpgsql
as $$
begin
  perform credits._tell_request(r, 'stripe_request_unknown')
     from credits.stripe_requests r
    where r.request_id = (credits._answered(_on_failed_lookup.notice)).ref::bigint and r.state = 'unknown';
  return credits._applied();
end $$;
