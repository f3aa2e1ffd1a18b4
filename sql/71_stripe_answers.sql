-- What becomes of a request to Stripe when its answer is here, or will not come. What an answer tells goes through the same
-- handlers as an event. Answer and event may come in either order, and so may the answers of two attempts: both have one key.

drop function if exists credits.complete_stripe_request(bigint, integer, text, jsonb);
create or replace function credits.complete_stripe_request(
  request_id bigint,
  status     integer,
  body       text,
  headers    jsonb   default null,
  attempt    integer default null,
  not_sent   text    default null
)
returns credits.stripe_request_result
language plpgsql
security definer
set search_path = pg_catalog, pg_temp
as $$
declare
  v_request credits.stripe_requests;
  v_answer  jsonb := credits._read_answer(complete_stripe_request.body);
  v_outcome text;
  v_late    boolean;
  v_verdict credits.event_verdict;
begin
  select r.* into v_request
    from credits.stripe_requests r
   where r.request_id = complete_stripe_request.request_id
     for no key update;
  if not found then
    perform credits._fail(404, 'request_not_found', jsonb_build_object('request_id', complete_stripe_request.request_id));
  end if;
  v_late := coalesce(complete_stripe_request.attempt < v_request.attempts, false);
  v_outcome := credits._judge_answer(v_request, complete_stripe_request.status, v_answer, complete_stripe_request.not_sent);
  if v_request.state in ('done', 'declined', 'failed')
     or v_outcome in ('again', 'refused', 'unknown') and (v_late or v_request.state = 'unknown') then
    return credits._request_result(v_request);
  end if;

  v_request.as_of       := credits._answered_at(v_request, complete_stripe_request.headers, v_late);
  v_request.http_status := complete_stripe_request.status;
  v_request.error_type  := coalesce(complete_stripe_request.not_sent, credits._error_of(v_answer, 'type'));
  perform credits._mind_the_key(v_request, v_outcome);
  perform credits._mind_the_account(v_request, v_answer);
  if v_outcome = 'done' and complete_stripe_request.status < 300 then
    v_verdict := credits._apply_answer(v_request, v_answer);
    if v_verdict.status in ('failed', 'parked') then
      v_outcome := 'again';
      v_request.error_type := coalesce(v_verdict.error, v_verdict.reason);
    end if;
    perform credits._request_missing(v_verdict.waits_for);
  elsif v_outcome = 'declined' and v_request.purpose <> 'retrieve'
        and not exists (select from credits.stripe_handlers h where h.event_type = 'failed.' || v_request.purpose)
        and credits._declined_payment(v_answer) is not null then
    perform credits._apply_answer(v_request, credits._declined_payment(v_answer));
  end if;
  return credits._request_result(credits._close_request(v_request, v_outcome, v_answer, complete_stripe_request.headers));
end $$;
comment on function credits.complete_stripe_request(bigint, integer, text, jsonb, integer, text) is
'Takes Stripe''s answer to a request and applies what it says through the same functions as events.

status is the HTTP status, null if no answer came; body the raw text; headers an object with Date, Request-Id,
Idempotent-Replayed and Retry-After; attempt that of the claim, which tells a late answer from the one that is waited for;
not_sent says why a request could not be sent at all. 2xx: done. 402: declined, for good. Other 4xx and not_sent: failed, for good, told as
stripe_request_failed; but 404 is done for a retrieve, and for a delete that was sent before, and 403 or an idempotency_error
leaves a post unknown that was sent before, as claim_stripe_requests says. 401: back in the queue, which stops,
told as stripe_key_refused. No answer, one that is neither an object nor an error of Stripe''s, 409, 429, 5xx, and what cannot be
applied yet: sent again under the same key after 1 s, 4 s, 15 s, 1 min, 5 min, then every 15 min, each up to a fifth longer by its
request_id, after 429 from 15 s on, and not before a Retry-After. After stripe_event_max_attempts of them a request fails, told as
stripe_request_given_up; a post goes on as claim_stripe_requests says, and is unknown rather than failed. An answer to what is
done already changes nothing.
Errors: 404 request_not_found.';

-- In the order of this list. An answer that is no JSON does not come from Stripe, whatever its status; nor does JSON that is
-- neither an object nor an error of Stripe's: what stands between may have words of its own.
create or replace function credits._judge_answer(
  request  credits.stripe_requests,
  status   integer,
  answer   jsonb,
  not_sent text
)
returns text
language sql
immutable
as $$
  select case
    when _judge_answer.not_sent is not null                               then 'failed'
    when _judge_answer.status is null or _judge_answer.answer is null     then 'again'
    when s between 200 and 299                                            then
      case when 'string' in (jsonb_typeof(_judge_answer.answer -> 'object'), jsonb_typeof(_judge_answer.answer -> 'id'))
           then 'done' else 'again' end
    when s = 401                                                          then 'refused'
    when jsonb_typeof(_judge_answer.answer -> 'error') is distinct from 'object'
                                                                          then 'again'
    when s = 402                                                          then 'declined'
    when s = 404 and (_judge_answer.request).purpose = 'retrieve'         then 'done'    -- the object is gone
    when s = 404 and (_judge_answer.request).method = 'delete'
                 and (_judge_answer.request).attempts > 1                 then 'done'    -- by the attempt before
    when s in (409, 429)                                                  then 'again'
    when (_judge_answer.request).method = 'post' and (_judge_answer.request).attempts > 1
         and (s = 403 or credits._error_of(_judge_answer.answer, 'type') = 'idempotency_error')
                                                                          then 'unknown'  -- the attempt before may have done it
    when s between 400 and 499                                            then 'failed'
    else                                                                       'again' end
    from (select _judge_answer.status) x (s)
$$;

-- 401 says that the key is wrong, not the request: all of them wait, and one tries it from time to time. The first other answer
-- to a request that was sent after the stop ends it.
create or replace function credits._mind_the_key(
  request credits.stripe_requests,
  outcome text
)
returns void
language plpgsql
as $$
declare
  v_request credits.stripe_requests := _mind_the_key.request;
  v_now     timestamptz := credits.now();
begin
  if _mind_the_key.outcome = 'refused' then
    insert into credits.stripe_queue_stop as q (stopped_at, until, request_id)
    values (v_now, v_now + interval '5 minutes', v_request.request_id)
    on conflict on constraint stripe_queue_stop_pkey do update set until = excluded.until, request_id = excluded.request_id
      where q.stopped_at <= v_request.last_sent_at;
    perform credits._notify(null, 'stripe_key_refused', extract(epoch from q.stopped_at)::text,
                            jsonb_build_object('request_id', q.request_id, 'since', q.stopped_at))
       from credits.stripe_queue_stop q;
  elsif v_request.http_status is not null then
    delete from credits.stripe_queue_stop q where q.stopped_at <= v_request.last_sent_at;
  end if;
end $$;

create or replace function credits._close_request(
  request credits.stripe_requests,
  outcome text,
  answer  jsonb,
  headers jsonb
)
returns credits.stripe_requests
language plpgsql
as $$
declare
  v_request  credits.stripe_requests := _close_request.request;
  -- A claim has counted the attempt already; one that only found the key refused was none.
  v_attempts integer := v_request.attempts + case when v_request.state = 'sent' then 0 else 1 end
                                           - case when _close_request.outcome = 'refused' then 1 else 0 end;
  v_state    text := credits._state_after(v_request, _close_request.outcome, v_attempts);
begin
  update credits.stripe_requests r
     set state          = v_state,
         http_status    = v_request.http_status,
         as_of          = v_request.as_of,
         error_type     = v_request.error_type,
         error_code     = credits._error_of(_close_request.answer, 'code'),
         decline_code   = credits._error_of(_close_request.answer, 'decline_code'),
         advice_code    = credits._error_of(_close_request.answer, 'advice_code'),
         response       = credits._without_secrets(_close_request.answer),
         stripe_request = credits._header(_close_request.headers, 'Request-Id'),
         attempts       = v_attempts,
         first_sent_at  = case when v_attempts > 0 then r.first_sent_at end,
         locked_until   = null,
         run_at         = case when v_state <> 'queued' then r.run_at
                               else credits.now() + credits._wait_before(v_request, v_attempts, _close_request.headers) end,
         finished_at    = case when v_state in ('done', 'declined', 'failed') then credits.now() end
   where r.request_id = v_request.request_id
  returning r.* into v_request;
  perform credits._tell_request(v_request, case
      when v_state = 'unknown'                                        then 'stripe_request_unknown'
      when _close_request.outcome = 'again'                           then 'stripe_request_given_up'
      else                                                                 'stripe_request_failed' end)
    where v_state = 'failed' or v_state = 'unknown' and (_close_request.outcome = 'again' or not credits._look_up(v_request));
  perform credits._tell_asker(v_request, 'failed', _close_request.answer) where v_state in ('failed', 'declined');
  perform credits._look_at_named(v_request) where v_state = 'failed';
  -- What was asked for again while it was on its way may be newer than this answer. The next page of a list is asked for anyway.
  perform credits._request(v_request.purpose, v_request.ref, 'get', v_request.path, v_request.params,
                           run_at => v_request.run_at, stripe_account => v_request.stripe_account)
    where v_state = 'done' and v_request.purpose = 'retrieve' and not v_request.params ? 'limit'
      and v_request.run_at > v_request.last_sent_at;
  return v_request;
end $$;

-- A customer or card that Stripe will not take any more, since it was deleted or detached while no event came through, is looked
-- at: else all that names it would be refused for ever.
create or replace function credits._look_at_named(request credits.stripe_requests)
returns void
language sql
as $$
  select credits._request_object(p.name, r.params ->> p.name)
    from (select (_look_at_named.request).*) r,
         lateral (select credits._error_of(r.response, 'param')) p (name)
   where p.name in ('customer', 'payment_method')
     and credits._open_request('retrieve', p.name || ':' || (r.params ->> p.name)) is null
$$;

-- A post is given up only when Stripe has done it and we cannot make use of it: what it did stays unknown, and in the way of
-- another one, until somebody has looked.
create or replace function credits._state_after(
  request  credits.stripe_requests,
  outcome  text,
  attempts integer
)
returns text
language sql
stable
as $$
  select case
    when _state_after.outcome = 'refused'                                                        then 'queued'
    when _state_after.outcome <> 'again'                                                         then _state_after.outcome
    when _state_after.attempts < credits._setting('stripe_event_max_attempts')::integer           then 'queued'
    when (_state_after.request).method <> 'post'                                                 then 'failed'
    when (_state_after.request).http_status between 200 and 299                                  then 'unknown'
    else                                                                                              'queued' end
$$;

-- No shorter than the answer asks for, as far as that is seconds, and no longer than 15 minutes.
drop function if exists credits._wait_before(credits.stripe_requests, integer);
create or replace function credits._wait_before(
  request  credits.stripe_requests,
  attempts integer,
  headers  jsonb
)
returns interval
language sql
immutable
as $$
  select least(900, greatest(
           credits._whole(to_jsonb(credits._header(_wait_before.headers, 'Retry-After'))),
           (array[1, 4, 15, 60, 300, 900])[least(greatest(_wait_before.attempts, 1)
             + case when (_wait_before.request).http_status = 429 then 2 else 0 end, 6)]))
         * (100 + (_wait_before.request).request_id % 21) / 100.0 * interval '1 second'
$$;

create or replace function credits._tell_request(
  request credits.stripe_requests,
  type    text
)
returns void
language sql
as $$
  select credits._notify(r.account_id, _tell_request.type, r.request_id::text, jsonb_build_object(
           'request_id', r.request_id, 'purpose', r.purpose, 'ref', r.ref, 'http_status', r.http_status,
           'error', r.error_type, 'code', r.error_code))
    from (select (_tell_request.request).*) r
$$;

create or replace function credits._request_result(request credits.stripe_requests)
returns credits.stripe_request_result
language sql
immutable
as $$
  select row((_request_result.request).request_id, (_request_result.request).purpose, (_request_result.request).ref,
             (_request_result.request).state, (_request_result.request).method, (_request_result.request).path,
             (_request_result.request).params)::credits.stripe_request_result
$$;

-- The request is still open here, so a tie that its answer meets would move it back instead of asking anew; it is closed
-- first. A list may have more pages.
create or replace function credits._apply_answer(
  request credits.stripe_requests,
  answer  jsonb
)
returns credits.event_verdict
language plpgsql
as $$
declare
  v_notice  credits.stripe_notice := credits._shape_answer(_apply_answer.request, _apply_answer.answer);
  v_verdict credits.event_verdict;
begin
  if v_notice.kind is null then
    return v_verdict;
  end if;
  update credits.stripe_requests r set state = 'done' where r.request_id = (_apply_answer.request).request_id;
  v_verdict := credits._try(v_notice, false);
  if v_verdict.status = 'applied' then
    perform credits._apply_waiting(v_notice);
  end if;
  return v_verdict;
end $$;

-- What asked may have to know that nothing comes of it, or that it is asked again. An error here undoes what it hears of.
create or replace function credits._tell_asker(
  request credits.stripe_requests,
  word    text,
  said    jsonb
)
returns void
language plpgsql
as $$
declare
  v_type    text := _tell_asker.word || '.' || (_tell_asker.request).purpose;
  v_handler text;
begin
  select h.handler into v_handler from credits.stripe_handlers h where h.event_type = v_type;
  if found then
    execute format('select credits.%I($1)', v_handler)
      using row('request:' || (_tell_asker.request).request_id, v_type, null, (_tell_asker.request).ref,
                (_tell_asker.request).as_of, _tell_asker.said, null, true)::credits.stripe_notice;
  end if;
end $$;
