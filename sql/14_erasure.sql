-- Erasure: what tells of a person goes, the books stay. What becomes of each column is a row; what Stripe sent keeps the fields
-- that the ledger is checked against, and nothing else. Keeps every invariant: audit() is empty afterwards.
-- Lock order: the account's balances row first, then the rest.

with listed (table_name, treatment, columns) as (values
  ('accounts',             'keep',   array['kind', 'status', 'plan', 'time_zone']),
  ('accounts',             'null',   array['email']),
  ('accounts',             'empty',  array['settings', 'metadata']),
  ('accounts',             'mark',   array['fingerprint']),
  ('allowances',           'keep',   array['allowance_id', 'subscription_id', 'invoice_id', 'line_id', 'item_id', 'price_id',
                                           'plan']),
  ('auto_topups',          'remove', array['package', 'currency', 'paused_reason', 'paused_card']),
  ('balances',             'keep',   array['status', 'plan']),
  ('checkouts',            'keep',   array['checkout_id', 'kind', 'key', 'session_id', 'status']),
  ('checkouts',            'mark',   array['fingerprint']),
  ('checkouts',            'null',   array['url']),
  ('clawbacks',            'keep',   array['source_kind', 'source_id']),
  ('entries',              'keep',   array['kind', 'operation', 'key', 'reservation_id', 'capability']),
  ('entries',              'null',   array['subject', 'member_id', 'description']),
  ('entries',              'mark',   array['fingerprint']),
  ('entries',              'empty',  array['metadata']),
  ('grants',               'keep',   array['scope', 'source', 'cost_currency', 'key']),
  ('grants',               'null',   array['description']),
  ('grants',               'mark',   array['fingerprint']),
  ('grants',               'empty',  array['metadata']),
  ('identities',           'remove', array['issuer', 'kind', 'subject']),
  ('members',              'remove', array['member_id', 'role']),
  ('notifications',        'keep',   array['type', 'key']),
  ('notifications',        'empty',  array['data']),
  ('notification_endpoints', 'remove', array['name', 'url', 'kinds']),
  ('plan_grants',          'keep',   array['subscription_id', 'allowance_id', 'invoice_id']),
  ('purchases',            'keep',   array['package', 'currency', 'status', 'stripe_session_id', 'stripe_payment_intent_id',
                                           'stripe_customer_id', 'coupons', 'promotion_codes']),
  ('refund_requests',      'keep',   array['refund_request_id', 'key', 'refund_id']),
  ('refund_requests',      'mark',   array['fingerprint']),
  ('refund_requests',      'null',   array['reason']),
  ('reservations',         'keep',   array['reservation_id', 'capability']),
  ('reservations',         'null',   array['subject', 'member_id', 'description']),
  ('reservations',         'mark',   array['closing']),
  ('reservations',         'empty',  array['metadata']),
  ('stripe_customers',     'keep',   array['customer_id', 'bound_by']),
  ('stripe_customers',     'null',   array['default_payment_method']),
  ('stripe_facts',         'keep',   array['kind', 'ref']),
  ('stripe_payments',      'keep',   array['payment_id', 'source_kind', 'source_id', 'currency']),
  ('stripe_requests',      'keep',   array['purpose', 'ref', 'method', 'path', 'idempotency_key', 'stripe_version',
                                           'stripe_account', 'state', 'error_type', 'error_code', 'decline_code', 'advice_code',
                                           'stripe_request', 'worker']),
  ('stripe_requests',      'empty',  array['params']),
  ('stripe_requests',      'null',   array['response']),
  ('subscription_cache',   'remove', array['state']),
  ('subscription_history', 'keep',   array['subscription_id', 'from_state', 'to_state', 'plan', 'foreseen_from', 'cause']),
  ('subscription_items',   'keep',   array['subscription_id', 'item_id', 'price_id', 'product_id']),
  ('subscriptions',        'keep',   array['subscription_id', 'source', 'state', 'status', 'plan', 'customer_id', 'price_id',
                                           'pending_plan']),
  ('top_ups',              'keep',   array['top_up_id', 'state', 'customer_id', 'payment_method', 'payment_intent_id',
                                           'error_code', 'decline_code', 'advice_code']),
  ('usage_admissions',     'keep',   array['capability']),
  ('usage_windows',        'keep',   array['capability', 'period']),
  ('usages',               'keep',   array['usage_id', 'capability', 'quality', 'model', 'plan', 'counts', 'counted_in']),
  ('usages',               'mark',   array['fingerprint', 'result', 'closing'])
), rules as (
  select l.table_name, c.column_name, l.treatment from listed l, unnest(l.columns) c (column_name)
), kept as (
  insert into credits.erasure_rules as r (table_name, column_name, treatment)
  select n.* from rules n
  on conflict (table_name, column_name) do update set treatment = excluded.treatment
)
delete from credits.erasure_rules r
 where not exists (select from rules n where n.table_name = r.table_name and n.column_name = r.column_name);

create or replace function credits.erase_account(
  account_id    text,
  release_holds boolean default false
)
returns credits.erase_result
language plpgsql
security definer
set search_path = pg_catalog, pg_temp
as $$
declare
  v_result credits.erase_result;
begin
  perform credits._lock_account(erase_account.account_id);
  perform credits.release(r.account_id, r.reservation_id)
     from credits.reservations r
    where r.account_id = erase_account.account_id and r.status = 'open' and erase_account.release_holds;
  perform credits.remove_auto_topup(erase_account.account_id);  -- or it would buy what is forfeited
  perform credits._check_idle(erase_account.account_id);
  perform credits._end_internal(s, credits.now(), 'erase_account')
     from credits.subscriptions s
    where s.account_id = erase_account.account_id and s.source = 'internal' and s.state in ('active', 'canceling');
  perform credits._refresh_plan(erase_account.account_id);
  v_result.forfeited := credits._forfeit(erase_account.account_id);
  perform credits._close_account(erase_account.account_id);

  select x.* into v_result.objects, v_result.events, v_result.requests
    from credits._erase_stripe(erase_account.account_id) x;
  perform credits._erase_columns(erase_account.account_id);
  update credits.notification_deliveries d
     set last_error = null
    from credits.notifications n
   where n.account_id = erase_account.account_id and d.notification_id = n.notification_id;

  insert into credits.erasures as e (account_id, erased_at, last_at, forfeited)
  values (erase_account.account_id, credits.now(), credits.now(), v_result.forfeited)
  on conflict on constraint erasures_pkey do update
    set last_at = excluded.last_at, times = e.times + 1, forfeited = e.forfeited + excluded.forfeited
  returning e.account_id, e.erased_at, e.times, e.forfeited
    into v_result.account_id, v_result.erased_at, v_result.times, v_result.forfeited;
  return v_result;
end $$;
comment on function credits.erase_account(text, boolean) is
'Erases the personal data of an account for good, and closes it. The ledger stays, and stays sound.

Gone are e-mail, metadata, descriptions, subjects, members, notifications'' data, and what Stripe sent of its customer but for
ids, amounts, moments and states. The account_id, keys, reservation ids and Stripe''s ids stay: they are what the books and
their hashes refer to. What credits are left is taken back (forfeited). Its plan of our own ends. While reservations are open
(unless release_holds), a subscription of Stripe lives, a request to Stripe waits or a top-up is on its way it is refused. Safe to repeat, which erases
what came in since. Reads all stored events and objects of Stripe.
Errors: 400 invalid_request, 404 account_not_found, 409 account_in_use.';

create or replace function credits.erase_member(
  account_id    text,
  member_id     text,
  release_holds boolean default false
)
returns bigint
language plpgsql
security definer
set search_path = pg_catalog, pg_temp
as $$
declare
  v_id   text := credits._check_key(erase_member.member_id, 'member_id', 200);
  v_open bigint;
begin
  perform credits._lock_account(erase_member.account_id);
  perform credits.release(r.account_id, r.reservation_id)
     from credits.reservations r
    where r.account_id = erase_member.account_id and r.member_id = v_id and r.status = 'open' and erase_member.release_holds;
  select count(*) into v_open
    from credits.reservations r
   where r.account_id = erase_member.account_id and r.member_id = v_id and r.status = 'open';
  if v_open > 0 then
    perform credits._fail(409, 'account_in_use', jsonb_build_object('reservations', v_open),
      'Settle or release what the member has reserved (or release_holds => true).');
  end if;
  return credits._erase_columns(erase_member.account_id, v_id);
end $$;
comment on function credits.erase_member(text, text, boolean) is
'Erases one member of an account, and what tells of the person in what the member has used. Answers with how many rows did.

Gone are the member with its seat and limit, and of its entries, reservations and usages the member_id, description, subject,
metadata and arguments. Amounts, keys, hashes and all other members stay; get_usage counts the credits under no member. While the
member has open reservations (unless release_holds) it is refused. Safe to repeat, also for a member_id that set_member never saw.
Errors: 400 invalid_request, 404 account_not_found, 409 account_in_use.';

create or replace function credits.repeat_erasures()
returns bigint
language plpgsql
security definer
set search_path = pg_catalog, pg_temp
as $$
declare
  v_repeated bigint;
begin
  select count(*) filter (where credits._erased_again(o.account_id)) into v_repeated
    from (select e.account_id
            from credits.erasures e
           where e.erased_at > credits.now() - interval '180 days'
           order by e.account_id) o
   where credits._is_idle(o.account_id);
  return v_repeated;
end $$;
comment on function credits.repeat_erasures() is
'Erases once more what came in since of the accounts that were erased in the last 180 days; answers how many.

Stripe tells of refunds, disputes and the end of a customer long after. Meant for a job every week. An account on which it
fails is passed over; the notification erasure_failed names it.';

-- The job repeat_erasures.
create or replace function credits._repeat_erasures(max_rows integer)
returns bigint
language sql
as $$
  select credits.repeat_erasures()
$$;

-- Helpers -----------------------------------------------------------------------------------------------------------

create or replace function credits._erased_again(account_id text)
returns boolean
language plpgsql
as $$
begin
  perform credits.erase_account(_erased_again.account_id);
  return true;
exception when others then
  perform credits._notify_failure('erasure_failed', _erased_again.account_id, sqlerrm, sqlstate);
  return false;
end $$;

create or replace function credits._in_use(account_id text)
returns jsonb
language sql
stable
as $$
  select jsonb_build_object(
           'reservations', (select count(*) from credits.reservations r
                             where r.account_id = _in_use.account_id and r.status = 'open'),
           'subscriptions', (select count(*) from credits.subscriptions s
                               join credits.subscription_states t on t.state = s.state
                              where s.account_id = _in_use.account_id and s.source = 'stripe' and not t.terminal),
           'requests', (select count(*) from credits.stripe_requests r
                         where r.account_id = _in_use.account_id and r.state in ('queued', 'sent')),
           'top_ups', (select count(*) from credits.top_ups t
                        where t.account_id = _in_use.account_id and t.state in ('queued', 'processing', 'requires_action')))
$$;

create or replace function credits._is_idle(account_id text)
returns boolean
language sql
stable
as $$
  select not jsonb_path_exists(credits._in_use(_is_idle.account_id), '$.* ? (@ > 0)')
$$;

create or replace function credits._check_idle(account_id text)
returns void
language plpgsql
stable
as $$
begin
  if not credits._is_idle(_check_idle.account_id) then
    perform credits._fail(409, 'account_in_use', credits._in_use(_check_idle.account_id),
      'Settle or release its reservations (or release_holds => true), cancel its subscription at Stripe and wait for the '
      'event, and let its requests to Stripe be answered and its top-up be paid or fail.');
  end if;
end $$;

-- A dispute that is won, or a refund that fails, after the first time brings credits back, which are taken again.
create or replace function credits._forfeit(account_id text)
returns numeric
language sql
as $$
  select coalesce(sum(-(r.result).amount), 0)
    from (select credits.revoke_grant(g.account_id, g.grant_id, g.remaining, null,
                                      concat_ws(':', 'erase', g.grant_id, g.times)) as result
            from (select l.*, e.times
                    from credits.grants l left join credits.erasures e on e.account_id = l.account_id
                   where l.account_id = _forfeit.account_id and l.status in ('pending', 'active') and l.remaining > 0
                   order by l.grant_id offset 0) g) r
$$;

create or replace function credits._close_account(account_id text)
returns void
language sql
as $$
  update credits.accounts a set status = 'closed' where a.account_id = _close_account.account_id;
  update credits.balances b set status = 'closed' where b.account_id = _close_account.account_id;
$$;

-- Each table once, whatever the number of its columns: all rows of the account, or those of one member. Names are quoted where
-- the rules are read, which plpgsql_check cannot see. Reservations say whose a usage is, so usages come before them.
drop function if exists credits._erase_columns(text);
create or replace function credits._erase_columns(
  account_id text,
  member_id  text default null
)
returns bigint
language plpgsql
as $$
-- @plpgsql_check_options: security_warnings = false
declare
  v_rule   record;
  v_rows   bigint;
  v_erased bigint := 0;
begin
  for v_rule in
    select r.table_name, bool_or(r.treatment = 'remove') as removed, credits._rows_of_member(r.table_name) as of_member,
           string_agg(format(case r.treatment
             when 'null'  then '%1$I = null'
             when 'empty' then '%1$I = ''{}'''
             when 'mark'  then '%1$I = case when t.%1$I is not null then jsonb ''{"erased": true}'' end' end, r.column_name),
             ', ' order by r.column_name) filter (where r.treatment <> 'remove') as changes
      from credits.erasure_rules r
     where r.treatment <> 'keep'
     group by r.table_name
     order by r.table_name = 'reservations', r.table_name
  loop
    continue when _erase_columns.member_id is not null and v_rule.of_member is null;
    execute case when v_rule.removed then format('delete from credits.%I t', v_rule.table_name)
                 else format('update credits.%I t set %s', v_rule.table_name, v_rule.changes) end
            || ' where t.account_id = $1' || case when _erase_columns.member_id is null then '' else v_rule.of_member end
      using _erase_columns.account_id, _erase_columns.member_id;
    get diagnostics v_rows = row_count;
    v_erased := v_erased + v_rows;
  end loop;
  return v_erased;
end $$;

-- Which rows of a table are those of one member; null where none is.
create or replace function credits._rows_of_member(table_name text)
returns text
language sql
stable
as $$
  select case
    when _rows_of_member.table_name = 'usages' then
      ' and t.usage_id in (select r.reservation_id from credits.reservations r where r.account_id = $1 and r.member_id = $2)'
    when exists (select from credits.erasure_rules r
                  where r.table_name = _rows_of_member.table_name and r.column_name = 'member_id') then
      ' and t.member_id = $2' end
$$;
