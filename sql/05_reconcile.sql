-- What Stripe has and we have not. A run reads Stripe's lists and only looks. What it finds is repaired, if so asked, by a retrieve
-- of each object, whose answer goes through the handler of its events: once, whoever comes first. So how a gap stands is computed
-- (06_stripe_gaps), and nothing is kept of it but that it was found.

insert into credits.settings as s (name, value, summary) values
  ('reconcile_window', '"3 days"', 'How far back reconcile_stripe() looks if it is not told.')
on conflict (name) do update set summary = excluded.summary;

create or replace function credits.reconcile_stripe(
  since  timestamptz default null,
  repair boolean     default false
)
returns credits.reconciliation_result
language plpgsql
security definer
set search_path = pg_catalog, pg_temp
as $$
declare
  v_since timestamptz := coalesce(reconcile_stripe.since,
                                  greatest(credits.now() - (credits._setting('reconcile_window') #>> '{}')::interval, 'epoch'));
  v_run   credits.stripe_reconciliations;
begin
  if not isfinite(v_since) or v_since > credits.now() or v_since < timestamptz 'epoch' then
    perform credits._fail(400, 'invalid_request', jsonb_build_object('argument', 'since'), 'since is a moment of the past.');
  end if;
  delete from credits.stripe_reconciliations r where r.finished_at < credits.now() - interval '90 days';
  insert into credits.stripe_reconciliations as r (since, repair, started_at)
  values (v_since, coalesce(reconcile_stripe.repair, false), credits.now())
  on conflict (state) where state = 'running' do nothing
  returning r.* into v_run;
  if found then
    perform credits._request_page(v_run, 'checkout.session');
  else
    select r.* into v_run from credits.stripe_reconciliations r where r.state = 'running';
  end if;
  return credits._reconciliation(v_run);
end $$;
comment on function credits.reconcile_stripe(timestamptz, boolean) is
'Compares what Stripe has made since a moment with what is known here: paid sessions, paid invoices and refunds.

It returns at once; the worker reads Stripe''s lists, get_reconciliation() says how far it is, list_stripe_gaps() what it found. The own
account is looked at first, then each connected one that an endpoint names and that lets us in.
Without repair nothing changes. With repair each object that never arrived is retrieved and applied as its event would be, once,
even if the event comes meanwhile; what an endpoint saw in shadow mode is left to replay_stripe_event(). One run at a time: while
one is running it is answered, whatever the arguments. since is by default the setting reconcile_window ago, and compared with
when Stripe made the object, not with when it was paid.
Errors: 400 invalid_request.';

create or replace function credits.get_reconciliation(run_id bigint default null)
returns credits.reconciliation_result
language plpgsql
stable
security definer
set search_path = pg_catalog, pg_temp
as $$
begin
  return credits._reconciliation(credits._run_of(get_reconciliation.run_id));
end $$;
comment on function credits.get_reconciliation(bigint) is
'How a run of reconcile_stripe() stands, by default the latest.

state is running, done or failed, with the error. found counts what had not arrived or differed, as it stands now: repaired (by the
run, or by the event after all), repairing, remaining (to be looked at), foreign_objects (none of ours).
Errors: 404 reconciliation_not_found.';

create or replace function credits.list_stripe_gaps(
  run_id   bigint  default null,
  state    text    default null,
  max_rows integer default 100,
  after    text    default null
)
returns setof credits.stripe_gap_result
language plpgsql
stable
security definer
set search_path = pg_catalog, pg_temp
as $$
declare
  v_run credits.stripe_reconciliations := credits._run_of(list_stripe_gaps.run_id);
begin
  perform credits._check_rows(list_stripe_gaps.max_rows, 'max_rows');
  perform credits._check_word(list_stripe_gaps.state, 'state', '{open,repairing,repaired,arrived,failed,foreign}');
  return query
    select g.*
      from credits._gaps(v_run.run_id) g
     where (list_stripe_gaps.state is null or g.state = list_stripe_gaps.state)
       and g.object_id > coalesce(list_stripe_gaps.after, '')
     order by g.object_id
     limit list_stripe_gaps.max_rows;
end $$;
comment on function credits.list_stripe_gaps(bigint, text, integer, text) is
'What a run of reconcile_stripe() found, by default the latest run, as it stands now.

gap says what was missing: purchase_missing, purchase_differs, binding_missing, grant_missing, refund_missing. state: open, repairing,
repaired (by the run), arrived (without it), failed, or foreign (nothing says that it is ours). reason says why one is open or failed.
amount is in the minor unit of currency. Page on with after = the last object_id seen; max_rows is 1 to 1000, 100 by default.
Errors: 400 invalid_request, 404 reconciliation_not_found.';

-- A run -------------------------------------------------------------------------------------------------------------

create or replace function credits._run_of(run_id bigint)
returns credits.stripe_reconciliations
language plpgsql
stable
as $$
declare
  v_run credits.stripe_reconciliations;
begin
  select r.* into v_run
    from credits.stripe_reconciliations r
   where r.run_id = _run_of.run_id or _run_of.run_id is null
   order by r.run_id desc
   limit 1;
  if not found then
    perform credits._fail(404, 'reconciliation_not_found', jsonb_build_object('run_id', _run_of.run_id));
  end if;
  return v_run;
end $$;

-- In the order of this list: a refund is known by the payment that a session or an invoice has made known.
drop function if exists credits._request_page(credits.stripe_reconciliations, text, text);
create or replace function credits._request_page(
  run            credits.stripe_reconciliations,
  kind           text,
  after          text default null,
  stripe_account text default null
)
returns bigint
language sql
as $$
  select credits._request('reconcile', concat_ws(':', (_request_page.run).run_id, l.kind, _request_page.stripe_account), 'get', l.path,
           l.params || jsonb_strip_nulls(jsonb_build_object(
             'limit', 100, 'created', jsonb_build_object('gte', extract(epoch from (_request_page.run).since)::bigint),
             'starting_after', _request_page.after)), stripe_account => _request_page.stripe_account)
    from (values ('checkout.session', '/v1/checkout/sessions', '{"status": "complete"}'::jsonb),
                 ('invoice',          '/v1/invoices',          '{"status": "paid"}'),
                 ('refund',           '/v1/refunds',           '{}')) l (kind, path, params)
   where l.kind = _request_page.kind
$$;

create or replace function credits._on_page(notice credits.stripe_notice)
returns credits.handler_result
language plpgsql
as $$
declare
  v_list    jsonb := (_on_page.notice).object;
  v_request credits.stripe_requests := credits._answered(_on_page.notice);
  v_account text  := v_request.stripe_account;
  v_kind    text  := split_part(v_request.ref, ':', 2);
  v_next    text  := case v_kind when 'checkout.session' then 'invoice' when 'invoice' then 'refund' end;
  v_run     credits.stripe_reconciliations;
begin
  update credits.stripe_reconciliations r
     set checked = r.checked + (select count(*) from credits._elements(v_list))
   where r.run_id = split_part(v_request.ref, ':', 1)::bigint and r.state = 'running'
  returning r.* into v_run;
  if not found then
    return credits._applied();
  end if;
  perform credits._note_gap(v_run, v_kind, e) from credits._elements(v_list) e;
  if credits._has_more(v_list) and credits._last_id(v_list) is not null then
    perform credits._request_page(v_run, v_kind, credits._last_id(v_list), v_account);
  elsif v_next is not null then
    perform credits._request_page(v_run, v_next, null, v_account);
  else
    perform credits._go_on_after(v_run, v_account);
  end if;
  return credits._applied();
end $$;

create or replace function credits._go_on_after(
  run            credits.stripe_reconciliations,
  stripe_account text
)
returns void
language plpgsql
as $$
declare
  v_next text := credits._next_account(_go_on_after.stripe_account);
begin
  if v_next is not null then
    perform credits._request_page(_go_on_after.run, 'checkout.session', null, v_next);
  else
    perform credits._end_reconciliation((_go_on_after.run).run_id, null);
  end if;
end $$;

-- After the own account those that an endpoint takes events of, one after the other.
create or replace function credits._next_account(stripe_account text)
returns text
language sql
stable
as $$
  select min(e.stripe_account collate "C")
    from credits.stripe_endpoints e
   where e.stripe_account collate "C" > coalesce(_next_account.stripe_account, '')
     and not credits._is_disconnected(e.stripe_account)
$$;

create or replace function credits._on_failed_page(notice credits.stripe_notice)
returns credits.handler_result
language plpgsql
as $$
declare
  v_request credits.stripe_requests := credits._answered(_on_failed_page.notice);
  v_run_id  bigint := split_part(v_request.ref, ':', 1)::bigint;
begin
  if credits._is_disconnected(v_request.stripe_account) then  -- that is told as such
    perform credits._go_on_after(r, v_request.stripe_account)
       from credits.stripe_reconciliations r
      where r.run_id = v_run_id and r.state = 'running';
  else
    perform credits._end_reconciliation(v_run_id,
                             concat_ws(' ', v_request.stripe_account, v_request.path, v_request.http_status,
                                       v_request.error_type, v_request.error_code));
  end if;
  return credits._applied();
end $$;

create or replace function credits._end_reconciliation(
  run_id bigint,
  error  text
)
returns void
language plpgsql
as $$
declare
  v_result credits.reconciliation_result;
begin
  update credits.stripe_reconciliations r
     set state = case when _end_reconciliation.error is null then 'done' else 'failed' end, error = _end_reconciliation.error,
         finished_at = credits.now()
   where r.run_id = _end_reconciliation.run_id and r.state = 'running';
  v_result := credits.get_reconciliation(_end_reconciliation.run_id);
  perform credits._notify(null, 'stripe_gaps_found', _end_reconciliation.run_id::text, to_jsonb(v_result))
    where v_result.remaining + v_result.repairing > 0;
  perform credits._notify(null, 'reconciliation_failed', _end_reconciliation.run_id::text, to_jsonb(v_result))
    where v_result.state = 'failed';
end $$;

create or replace function credits._note_gap(
  run    credits.stripe_reconciliations,
  kind   text,
  object jsonb
)
returns void
language plpgsql
as $$
declare
  v_gap     text := credits._gap_in(_note_gap.kind, _note_gap.object);
  v_account text := credits._account_in(_note_gap.kind, _note_gap.object);
  v_mends   boolean := (_note_gap.run).repair and v_gap <> 'purchase_differs' and credits._turned_away(_note_gap.object) is null
                       and (_note_gap.kind = 'refund' or not credits._is_foreign(_note_gap.kind, _note_gap.object, v_account));
begin
  insert into credits.stripe_gaps (run_id, kind, object_id, gap, object, request_id, found_at)
  select (_note_gap.run).run_id, _note_gap.kind, _note_gap.object ->> 'id', v_gap, credits._without_secrets(_note_gap.object),
         case when v_mends then credits._request_object(_note_gap.kind, _note_gap.object ->> 'id') end, credits.now()
   where v_gap is not null and _note_gap.object ->> 'id' is not null
  on conflict on constraint stripe_gaps_pkey do nothing;
  -- Whoever missed the invoice may have missed what its subscription has become.
  perform credits._ask_anew((credits._shape_invoice(_note_gap.object)).subscription_id)
    where v_mends and v_gap = 'grant_missing';
end $$;
