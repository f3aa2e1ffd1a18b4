-- What becomes of each column when its account is erased, as rows, and the statements that they make.

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
