-- What was bought: page by page, and in sums. Nothing here writes.

create or replace function credits.list_purchases(
  account_id text    default null,
  status     text    default null,
  max_rows   integer default 50,
  before     bigint  default null
)
returns setof credits.purchases
language plpgsql
stable
security definer
set search_path = pg_catalog, pg_temp
as $$
declare
  v_rows integer := credits._check_rows(coalesce(list_purchases.max_rows, 50), 'max_rows');
begin
  perform credits._check_word(list_purchases.status, 'status',
    '{pending,processing,completed,failed,expired,refunded,partially_refunded,disputed}');
  if list_purchases.account_id is not null then
    perform credits._account(list_purchases.account_id);
  end if;
  return query
    select p.*
      from credits.purchases p
     where (list_purchases.account_id is null or p.account_id = list_purchases.account_id)
       and (list_purchases.status is null or p.status = list_purchases.status)
       and p.purchase_id < coalesce(list_purchases.before, 9223372036854775807)
     order by p.purchase_id desc
     limit v_rows;
end $$;
comment on function credits.list_purchases(text, text, integer, bigint) is
'Purchases, the latest first: of one account, or for operators of all.

Page on with before = the last purchase_id seen. max_rows is 1 to 1000, 50 by default. Amounts are in the minor unit of currency:
amount is what was paid, amount_subtotal what the goods cost before discounts, tax and shipping.
Errors: 400 invalid_request, 404 account_not_found.';

create or replace function credits.purchase_totals(
  since    timestamptz default null,
  until    timestamptz default null,
  group_by text        default 'day'
)
returns setof credits.purchase_total
language plpgsql
stable
security definer
set search_path = pg_catalog, pg_temp
as $$
begin
  perform credits._check_word(purchase_totals.group_by, 'group_by', '{day,package}');
  return query
    select n.name, p.currency, p.livemode, count(*), trim_scale(sum(p.credits)), sum(p.amount)::bigint,
           sum(p.amount_discount)::bigint, sum(p.amount_tax)::bigint, sum(p.amount_refunded)::bigint,
           sum(p.amount_disputed)::bigint
      from credits.purchases p,
           lateral (select case purchase_totals.group_by when 'package' then p.package
                                else to_char(p.completed_at at time zone 'UTC', 'YYYY-MM-DD') end) n (name)
     where p.completed_at >= coalesce(purchase_totals.since, '-infinity')
       and p.completed_at < coalesce(purchase_totals.until, 'infinity')
     group by n.name, p.currency, p.livemode
     order by n.name, p.currency, p.livemode;
end $$;
comment on function credits.purchase_totals(timestamptz, timestamptz, text) is
'What purchases have brought, by day or by package: how many, their credits, and the money of each currency.

Those count that were completed from since until before until, by default all, also if they were refunded later: amount is what
was paid for them, amount_refunded and amount_disputed how much of it went back or is asked back by now. Money is in the minor
unit of currency and of different currencies never added up; livemode false is test money. Days are those of UTC.
Errors: 400 invalid_request.';
