set local role credits_owner;
drop type credits.catalog_progress, credits.catalog_difference, credits.catalog_target;
drop table credits.catalog_runs, credits.sold_prices, credits.plan_prices;
