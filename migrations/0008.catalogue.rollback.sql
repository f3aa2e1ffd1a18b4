set local role credits_owner;
drop type credits.catalog_change, credits.catalog_problem, credits.quote_result, credits.access_result, credits.usage_result,
  credits.settle_usage_result, credits.limit_result, credits.usage_summary, credits.member_result, credits.priced, credits.use_request, credits.plan_choice, credits.askable, credits.simple_price, credits.usage_move, credits.window_use, credits.use;
drop index credits.subscriptions_by_turn;
alter table credits.members drop column active, drop column month_start, drop column month_used;
delete from credits.reservations r where r.requested = 0 or r.amount = 0;
alter table credits.reservations
  alter column requested type credits.amount,
  alter column amount    type credits.amount,
  drop column counted;
alter table credits.balances drop column plan;
drop table credits.offers, credits.usage_admissions, credits.usage_windows, credits.usages, credits.rates, credits.plan_limits,
  credits.plan_qualities, credits.plan_capabilities, credits.models, credits.quality_levels, credits.capabilities;
alter table credits.plans drop column seats, drop column display_order, drop column is_default;
