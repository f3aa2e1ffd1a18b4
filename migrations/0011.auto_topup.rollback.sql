set local role credits_owner;
drop type credits.auto_topup_result, credits.top_up_plan, credits.intent_shape;
update credits.stripe_payments p
   set source_kind = null, source_id = null, account_id = null
 where p.source_kind = 'top_up';
alter table credits.stripe_payments drop constraint stripe_payments_source_is_known;
alter table credits.stripe_payments add constraint stripe_payments_source_is_known
  check (source_kind in ('session', 'invoice'));
comment on table credits.stripe_payments is
  'What each payment paid for: a Checkout session or an invoice; nulls while unknown.';
alter table credits.balances drop column topup_below;
drop table credits.top_ups, credits.auto_topups;
