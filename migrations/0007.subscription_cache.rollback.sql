set local role credits_owner;
drop type credits.subscription_cache_entry, credits.subscription_cache_status, credits.validated_spend_result,
  credits.subscription_credits_result, credits.stripe_customer_result;
drop table credits.subscription_cache, credits.subscription_cache_cleanups;
drop sequence credits.subscription_cache_hits, credits.subscription_cache_misses;
