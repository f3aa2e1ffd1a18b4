-- Requests to Stripe: SQL writes them down, a worker executes them, the answer comes back here and goes through the same
-- handlers as an event. Of one purpose and ref at most one request is open.

-- Asks again later rather than twice: of a request that waits only the last word counts, one that was sent stands.
create or replace function credits._request(
  purpose    text,
  ref        text,
  method     text,
  path       text,
  params     jsonb       default '{}',
  account_id text        default null,
  run_at     timestamptz default null
)
returns bigint
language sql
as $$
  insert into credits.stripe_requests as r (purpose, ref, account_id, method, path, params, created_at, run_at)
  values (_request.purpose, _request.ref, _request.account_id, _request.method, _request.path,
          coalesce(_request.params, '{}'), credits.now(), greatest(_request.run_at, credits.now()))
  on conflict (purpose, ref) where state in ('queued', 'sent', 'processing', 'requires_action', 'unknown')
    do update set run_at = greatest(r.run_at, excluded.run_at),
                  method = case when r.first_sent_at is null then excluded.method else r.method end,
                  path   = case when r.first_sent_at is null then excluded.path else r.path end,
                  params = case when r.first_sent_at is null then excluded.params else r.params end
  returning r.request_id
$$;

-- A retrieve of something that Stripe can tell. What has no address, or an id that is none, is left alone.
create or replace function credits._request_object(
  kind      text,
  object_id text,
  run_at    timestamptz default null
)
returns bigint
language sql
as $$
  select credits._request('retrieve', _request_object.kind || ':' || _request_object.object_id, 'get',
                          replace(p.path, '*', _request_object.object_id),
                          case when p.list then '{"limit": 100}'
                               when _request_object.kind = 'invoice_payments' then jsonb_build_object('limit', 100, 'payment',
                                 jsonb_build_object('type', 'payment_intent', 'payment_intent', _request_object.object_id))
                               else '{}' end::jsonb,
                          run_at => _request_object.run_at)
    from (values ('customer',         '/v1/customers/*',                    false),
                 ('product',          '/v1/products/*',                     false),
                 ('price',            '/v1/prices/*',                       false),
                 ('subscription',     '/v1/subscriptions/*',                false),
                 ('subscription_schedule', '/v1/subscription_schedules/*',  false),
                 ('invoice',          '/v1/invoices/*',                     false),
                 ('charge',           '/v1/charges/*',                      false),
                 ('refund',           '/v1/refunds/*',                      false),
                 ('dispute',          '/v1/disputes/*',                     false),
                 ('payment_intent',   '/v1/payment_intents/*',              false),
                 ('payment_method',   '/v1/payment_methods/*',              false),
                 ('checkout.session', '/v1/checkout/sessions/*',            false),
                 ('invoice_lines',    '/v1/invoices/*/lines',               true),
                 ('line_items',       '/v1/checkout/sessions/*/line_items', true),
                 ('invoice_payments', '/v1/invoice_payments',               false)) p (kind, path, list)
   where p.kind = _request_object.kind and _request_object.object_id ~ '^[A-Za-z0-9_]{1,255}$'
$$;

-- What a parked event lacks, if it is something that can be asked for and is not known.
create or replace function credits._request_missing(waits_for text)
returns void
language sql
as $$
  select credits._request_object(split_part(_request_missing.waits_for, ':', 1), split_part(_request_missing.waits_for, ':', 2))
   where _request_missing.waits_for is not null
     and credits._snapshot(split_part(_request_missing.waits_for, ':', 1),
                           split_part(_request_missing.waits_for, ':', 2)) is null
$$;

create or replace function credits.complete_stripe_request(
  request_id bigint,
  status     integer,
  body       text,
  headers    jsonb default null
)
returns credits.stripe_request_result
language plpgsql
security definer
set search_path = pg_catalog, pg_temp
as $$
declare
  v_request credits.stripe_requests;
  v_object  jsonb := credits._read_answer(complete_stripe_request.body);
  v_verdict credits.event_verdict;
begin
  select r.* into v_request
    from credits.stripe_requests r
   where r.request_id = complete_stripe_request.request_id
     for no key update;
  if not found then
    perform credits._fail(404, 'request_not_found', jsonb_build_object('request_id', complete_stripe_request.request_id));
  elsif v_request.state in ('done', 'declined', 'failed') then
    return credits._request_result(v_request);
  end if;

  v_request.as_of       := credits._answered_at(v_request, complete_stripe_request.headers);
  v_request.http_status := complete_stripe_request.status;
  if complete_stripe_request.status between 200 and 299 and v_object is not null then
    v_verdict := credits._apply_answer(v_request, v_object);
    v_request.state := case when v_verdict.status in ('failed', 'parked') then 'queued' else 'done' end;
    v_request.error_type := coalesce(v_verdict.error, case v_verdict.status when 'parked' then v_verdict.reason end);
    perform credits._request_missing(v_verdict.waits_for);
  elsif complete_stripe_request.status = 404 and v_request.purpose = 'retrieve' then
    v_request.state := 'done';
  elsif complete_stripe_request.status between 400 and 499 and complete_stripe_request.status not in (401, 409, 429) then
    v_request.state := 'failed';
  else
    v_request.state := 'queued';
  end if;
  return credits._request_result(credits._close_request(v_request, v_object, complete_stripe_request.headers));
end $$;
comment on function credits.complete_stripe_request(bigint, integer, text, jsonb) is
'Takes Stripe''s answer to a request and applies what it says through the same functions as events.

status is the HTTP status, null if no answer came; body the raw text; headers an object with Date and Request-Id. An answer
that is lost, not JSON, 401, 409, 429 or 5xx, or that tells of something which cannot be applied yet, puts the request back
in the queue, each time later, stripe_event_max_attempts times at most; other errors end it.
Errors: 404 request_not_found.';

create or replace function credits._read_answer(body text)
returns jsonb
language plpgsql
immutable
as $$
begin
  return nullif(credits._read_payload(_read_answer.body), '{}');
exception when sqlstate 'PT400' then
  return null;
end $$;

-- An answer speaks for the second in which it was asked for: the server's date, less the time that the call took.
create or replace function credits._answered_at(
  request credits.stripe_requests,
  headers jsonb
)
returns bigint
language sql
stable
as $$
  select floor(extract(epoch from
    coalesce(credits._http_date(coalesce(_answered_at.headers ->> 'Date', _answered_at.headers ->> 'date'))
               - coalesce(greatest(credits.now() - (_answered_at.request).last_sent_at, interval '0'), interval '0'),
             (_answered_at.request).last_sent_at, (_answered_at.request).created_at)))::bigint
$$;

-- Such as "Sat, 21 Nov 2026 08:00:00 GMT".
create or replace function credits._http_date(value text)
returns timestamptz
language sql
stable
as $$
  select make_timestamptz(d[3]::integer, array_position(array['Jan', 'Feb', 'Mar', 'Apr', 'May', 'Jun', 'Jul', 'Aug', 'Sep',
                          'Oct', 'Nov', 'Dec'], d[2]), d[1]::integer, d[4]::integer, d[5]::integer, d[6]::integer, 'UTC')
    from regexp_match(_http_date.value,
      '^\w{3}, (\d{2}) (Jan|Feb|Mar|Apr|May|Jun|Jul|Aug|Sep|Oct|Nov|Dec) (\d{4}) (\d{2}):(\d{2}):(\d{2}) GMT$') d
$$;

create or replace function credits._close_request(
  request credits.stripe_requests,
  answer  jsonb,
  headers jsonb
)
returns credits.stripe_requests
language plpgsql
as $$
declare
  v_request credits.stripe_requests := _close_request.request;
begin
  if v_request.state = 'queued' and v_request.attempts + 1 >= credits._setting('stripe_event_max_attempts')::integer then
    v_request.state := 'failed';
    perform credits._notify(v_request.account_id, 'stripe_request_given_up', v_request.request_id::text,
      jsonb_build_object('request_id', v_request.request_id, 'purpose', v_request.purpose, 'ref', v_request.ref,
                         'http_status', v_request.http_status, 'error', v_request.error_type));
  end if;
  update credits.stripe_requests r
     set state          = v_request.state,
         http_status    = v_request.http_status,
         as_of          = v_request.as_of,
         error_type     = coalesce(v_request.error_type, credits._error_of(_close_request.answer, 'type')),
         error_code     = credits._error_of(_close_request.answer, 'code'),
         response       = _close_request.answer,
         stripe_request = coalesce(_close_request.headers ->> 'Request-Id', _close_request.headers ->> 'request-id'),
         attempts       = r.attempts + 1,
         locked_until   = null,
         run_at         = case v_request.state when 'queued'
                            then credits.now() + (array[1, 4, 15, 60, 300, 900])[least(r.attempts + 1, 6)] * interval '1 second'
                            else r.run_at end,
         finished_at    = case when v_request.state in ('done', 'declined', 'failed') then credits.now() end
   where r.request_id = v_request.request_id
  returning r.* into v_request;
  return v_request;
end $$;

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
