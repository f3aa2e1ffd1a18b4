-- Requests to Stripe: SQL writes them down, a worker claims and executes them outside of any transaction, and brings the answer
-- to 71_stripe_answers. Of one purpose and ref at most one request is open, and what it may have done it never does twice: a
-- claim is repeated under the same idempotency key, and not at all once Stripe may have forgotten that key.

insert into credits.settings as s (name, value, summary) values
  ('stripe_request_lease', '"2 minutes"', 'How long a worker may take over a request to Stripe before another one sends it again.')
on conflict (name) do update set summary = excluded.summary;

create or replace function credits.claim_stripe_requests(
  max_rows       integer default 10,
  worker         text    default null,
  stripe_version text    default null
)
returns setof credits.claimed_stripe_request
language plpgsql
security definer
set search_path = pg_catalog, pg_temp
as $$
declare
  v_now     timestamptz := credits.now();
  v_until   timestamptz := v_now + (credits._setting('stripe_request_lease') #>> '{}')::interval;
  v_stopped boolean     := exists (select from credits.stripe_queue_stop);
begin
  perform credits._check_rows(claim_stripe_requests.max_rows, 'max_rows');
  perform credits._give_up_unknown(v_now);
  if v_stopped then
    update credits.stripe_queue_stop q set until = v_until where q.until <= v_now;
    if not found then
      return;
    end if;
  end if;
  return query
    select c.*
      from credits._claim_due(case when v_stopped then 1 else claim_stripe_requests.max_rows end, v_now, v_until,
                              claim_stripe_requests.worker, claim_stripe_requests.stripe_version) c;
  if not found and v_stopped then
    update credits.stripe_queue_stop q set until = v_now;
  end if;
end $$;
comment on function credits.claim_stripe_requests(integer, text, text) is
'Requests to Stripe that are due, for a worker to send: they are its for stripe_request_lease. Safe for many workers at once.

Commit, then send each outside of any transaction, within the lease, under its idempotency_key (which only a post has) and at
its stripe_version, and hand every outcome, also none, to complete_stripe_request with its attempt. stripe_version is what the
worker speaks; a request keeps the one of its first worker. Requests whose worker did not come back are claimed again. Of those
that change something about one ref the oldest goes first and the others wait for its outcome. A post whose outcome is not known
23 hours after it was first sent becomes unknown and is never sent again. If Stripe can list what it would have made, that is looked
for (stripe_lookups): found, it is the answer; not found, it is asked anew or has failed. The others are told as
stripe_request_unknown. After a 401 nothing is claimed for 5 minutes, then one request, to try the key.
Errors: 400 invalid_request.';

create or replace function credits.claim_stripe_request(
  request_id     bigint,
  worker         text default null,
  stripe_version text default null
)
returns setof credits.claimed_stripe_request
language plpgsql
security definer
set search_path = pg_catalog, pg_temp
as $$
declare
  v_now   timestamptz := credits.now();
  v_until timestamptz := v_now + (credits._setting('stripe_request_lease') #>> '{}')::interval;
begin
  perform credits._give_up_unknown(v_now);
  if exists (select from credits.stripe_queue_stop) then
    return;
  end if;
  return query
    select c.*
      from credits._claim_due(1, v_now, v_until, claim_stripe_request.worker, claim_stripe_request.stripe_version,
                              coalesce(claim_stripe_request.request_id, 0)) c;
end $$;
comment on function credits.claim_stripe_request(bigint, text, text) is
'One request to Stripe, for somebody who waits for its answer: as claim_stripe_requests(), or no row if it is not due.

Not due is also what another worker has, what has had its answer, what waits for an older request, and everything after a 401.
Errors: none.';

create or replace function credits.retry_stripe_request(request_id bigint)
returns credits.stripe_request_result
language plpgsql
security definer
set search_path = pg_catalog, pg_temp
as $$
declare
  v_request credits.stripe_requests;
begin
  select r.* into v_request
    from credits.stripe_requests r
   where r.request_id = retry_stripe_request.request_id
     for no key update;
  if not found then
    perform credits._fail(404, 'request_not_found', jsonb_build_object('request_id', retry_stripe_request.request_id));
  elsif v_request.state not in ('failed', 'declined', 'unknown')
        or v_request.purpose = 'top_up' and v_request.state <> 'unknown'  -- its attempt is closed: the next one is a new one
        or v_request.error_type = 'withdrawn'  -- nobody wants it any more
        or exists (select from credits.stripe_requests l
                    where l.purpose = v_request.purpose and l.ref = v_request.ref and l.request_id > v_request.request_id) then
    perform credits._fail(409, 'request_not_failed',
      jsonb_build_object('request_id', v_request.request_id, 'state', v_request.state),
      'Only the last request of its purpose and ref can be made again, and only if it failed, was declined or is unknown, '
      'and was not withdrawn before it was sent.');
  end if;
  update credits.stripe_requests r
     set state = 'failed', finished_at = credits.now()
   where r.request_id = v_request.request_id and r.state = 'unknown';
  return credits._request_result(credits._ask_again(v_request));
end $$;
comment on function credits.retry_stripe_request(bigint) is
'Makes a request to Stripe again that failed, was declined or is unknown: a new one, under an idempotency key of its own.

Look at Stripe first whether an unknown one was done: this does it again. It then counts as failed. One that was withdrawn
before it was sent is not made again. Answers the new request, by which a checkout, a portal session or a refund goes from now on.
Errors: 404 request_not_found, 409 request_not_failed, 422 invalid_amount, for a refund of more than is left.';

drop function if exists credits._claim_due(integer, timestamptz, timestamptz, text, text);
-- Of the writes about one ref the oldest is first: while it may still be sent, a later one would be undone by it.
create or replace function credits._claim_due(
  max_rows       integer,
  at             timestamptz,
  until          timestamptz,
  worker         text,
  stripe_version text,
  request_id     bigint default null
)
returns setof credits.claimed_stripe_request
language sql
as $$
  with due as (
    select r.request_id
      from credits.stripe_requests r
     where (r.state = 'queued' and r.run_at <= _claim_due.at or r.state = 'sent' and r.locked_until <= _claim_due.at)
       and r.request_id = coalesce(_claim_due.request_id, r.request_id)
       and (r.method = 'get' or not exists (
             select from credits.stripe_requests e
              where e.ref = r.ref and e.request_id < r.request_id and e.method <> 'get' and e.state in ('queued', 'sent')))
     order by r.run_at, r.request_id
     limit _claim_due.max_rows
       for no key update skip locked)
  update credits.stripe_requests r
     set state          = 'sent',
         attempts       = r.attempts + 1,
         worker         = _claim_due.worker,
         stripe_version = coalesce(r.stripe_version, _claim_due.stripe_version),
         locked_until   = _claim_due.until,
         first_sent_at  = coalesce(r.first_sent_at, _claim_due.at),
         last_sent_at   = _claim_due.at
    from due d
   where r.request_id = d.request_id
  returning r.request_id, r.attempts, r.method, r.path, r.params, case r.method when 'post' then r.idempotency_key end,
            r.stripe_version, r.stripe_account, r.locked_until
$$;

-- Stripe keeps an idempotency key for 24 hours at least; what is sent after that may be done twice.
create or replace function credits._give_up_unknown(at timestamptz)
returns void
language plpgsql
as $$
declare
  v_request_id bigint;
begin
  for v_request_id in
    select o.request_id
      from credits.stripe_requests o
     where (o.state = 'queued' and o.run_at <= _give_up_unknown.at
            or o.state = 'sent' and o.locked_until <= _give_up_unknown.at)
       and o.method = 'post' and o.first_sent_at < _give_up_unknown.at - interval '23 hours'
       for no key update skip locked
  loop
    perform credits._leave_unknown(v_request_id);
  end loop;
end $$;

-- Looked for, or told to somebody who can look.
create or replace function credits._leave_unknown(request_id bigint)
returns void
language plpgsql
as $$
declare
  v_request credits.stripe_requests;
begin
  update credits.stripe_requests r
     set state = 'unknown', locked_until = null, first_sent_at = coalesce(r.first_sent_at, r.created_at)
   where r.request_id = _leave_unknown.request_id
  returning r.* into v_request;
  perform credits._tell_request(v_request, 'stripe_request_unknown') where not credits._look_up(v_request);
end $$;

-- A new request in the place of one that came to nothing. Who asked goes by the new one from now on.
create or replace function credits._ask_again(request credits.stripe_requests)
returns credits.stripe_requests
language plpgsql
as $$
declare
  v_before  credits.stripe_requests := _ask_again.request;
  v_request credits.stripe_requests;
begin
  insert into credits.stripe_requests as r (purpose, ref, account_id, method, path, params, stripe_account, created_at, run_at)
  values (v_before.purpose, v_before.ref, v_before.account_id, v_before.method, v_before.path, v_before.params,
          v_before.stripe_account, credits.now(), credits.now())
  returning r.* into v_request;
  perform credits._tell_asker(v_request, 'again', null);
  return v_request;
end $$;

-- Asks again later rather than twice: of a request that waits only the last word counts, one that was sent stands.
drop function if exists credits._request(text, text, text, text, jsonb, text, timestamptz);
create or replace function credits._request(
  purpose        text,
  ref            text,
  method         text,
  path           text,
  params         jsonb       default '{}',
  account_id     text        default null,
  run_at         timestamptz default null,
  stripe_account text        default null
)
returns bigint
language sql
as $$
  insert into credits.stripe_requests as r (purpose, ref, account_id, method, path, params, stripe_account, created_at, run_at)
  values (_request.purpose, _request.ref, _request.account_id, _request.method, _request.path,
          coalesce(_request.params, '{}'), _request.stripe_account, credits.now(), greatest(_request.run_at, credits.now()))
  on conflict (purpose, ref) where state in ('queued', 'sent', 'processing', 'requires_action', 'unknown')
    do update set run_at = greatest(r.run_at, excluded.run_at),
                  method = case when r.first_sent_at is null then excluded.method else r.method end,
                  path   = case when r.first_sent_at is null then excluded.path else r.path end,
                  params = case when r.first_sent_at is null then excluded.params else r.params end,
                  stripe_account = case when r.first_sent_at is null then excluded.stripe_account else r.stripe_account end
  returning r.request_id
$$;

-- The request that is open for a purpose and ref, whoever is at work on it.
create or replace function credits._open_request(
  purpose text,
  ref     text
)
returns bigint
language sql
stable
as $$
  select r.request_id
    from credits.stripe_requests r
   where r.purpose = _open_request.purpose and r.ref = _open_request.ref
     and r.state in ('queued', 'sent', 'processing', 'requires_action', 'unknown')
$$;

-- A retrieve of something that Stripe can tell, where it lives, and the type of event that its answer is, if any. What has no
-- address, or an id that is none, is left alone, and so is what lives where we are let in no more: it would be refused each time.
drop function if exists credits._request_object(text, text, timestamptz);
create or replace function credits._request_object(
  kind      text,
  object_id text,
  run_at    timestamptz default null,
  told      text        default null
)
returns bigint
language sql
as $$
  select credits._request('retrieve',
                          concat_ws(':', _request_object.kind, _request_object.object_id, _request_object.told), 'get',
                          replace(p.path, '*', _request_object.object_id),
                          case when p.list then '{"limit": 100}'
                               when _request_object.kind = 'invoice_payments' then jsonb_build_object('limit', 100, 'payment',
                                 jsonb_build_object('type', 'payment_intent', 'payment_intent', _request_object.object_id))
                               when _request_object.kind = 'checkout.session' then '{"expand": ["payment_intent"]}'
                               else '{}' end::jsonb,
                          run_at => _request_object.run_at, stripe_account => h.stripe_account)
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
                 ('invoice_payments', '/v1/invoice_payments',               false)) p (kind, path, list),
         lateral (select credits._home_of(case p.kind when 'invoice_lines'    then 'invoice'
                                                      when 'line_items'       then 'checkout.session'
                                                      when 'invoice_payments' then 'payment_intent'
                                                      else p.kind end, _request_object.object_id)) h (stripe_account)
   where p.kind = _request_object.kind and _request_object.object_id ~ '^[A-Za-z0-9_]{1,255}$'
     and not credits._is_disconnected(h.stripe_account)
$$;
