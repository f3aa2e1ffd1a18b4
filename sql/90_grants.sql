-- Who may call what, on one page: take everything away, then give.
-- credits_service is a trusted backend. Functions with a leading underscore and tables are granted to nobody.

revoke all on all routines in schema credits, credits_api from public, credits_service, credits_user;
revoke all on all tables in schema credits, credits_api from public, credits_service, credits_user;
revoke all on schema credits, credits_api from public;

grant usage on schema credits to credits_service;
grant usage on schema credits_api to credits_user;

grant execute on function
  credits.open_account, credits.freeze_account, credits.unfreeze_account, credits.set_debt_limit,
  credits.get_balance, credits.balance_at, credits.history, credits.prove_balance, credits.audit,
  credits.grant_credits, credits.adjust, credits.revoke_grant, credits.transfer_credits,
  credits.spend, credits.spend_many, credits.refund_spend,
  credits.reserve, credits.capture, credits.settle, credits.release, credits.extend, credits.get_reservation,
  credits.set_member, credits.remove_member, credits.list_members,
  credits.quote, credits.check_access, credits.authorize_usage, credits.settle_usage, credits.get_limits, credits.get_usage,
  credits.grant_plan_credits, credits.initialize_plan_credits,
  credits.list_packages, credits.apply_catalog, credits.get_catalog, credits.load_demo_catalog,
  credits.get_subscription_state, credits.change_plan, credits.cancel_plan, credits.resume_plan, credits.set_time_zone,
  credits.get_user_subscription_state, credits.update_subscription_cache, credits.clear_expired_subscription_cache,
  credits.clear_all_subscription_cache, credits.get_subscription_cache_status, credits.get_cache_cleanup_history,
  credits.use_credits_validated, credits.add_subscription_credits, credits.get_or_create_stripe_customer,
  credits.receive_stripe_event, credits.process_stripe_events, credits.replay_stripe_event, credits.list_stripe_events,
  credits.archive_stripe_events, credits.set_stripe_endpoint,
  credits.claim_stripe_requests, credits.complete_stripe_request, credits.retry_stripe_request,
  credits.create_checkout, credits.get_checkout, credits.create_portal_session,
  credits.set_low_balance_alert, credits.warn_expiring_credits,
  credits.set_notification_endpoint, credits.remove_notification_endpoint, credits.list_notification_endpoints,
  credits.claim_notifications, credits.complete_notification, credits.list_notifications, credits.replay_notification,
  credits.retry_notifications, credits.purge_notifications,
  credits.set_auto_topup, credits.get_auto_topup, credits.remove_auto_topup, credits.run_auto_topups,
  credits.request_refund, credits.list_purchases, credits.purchase_totals, credits.refresh_subscription,
  credits.reconcile_stripe, credits.get_reconciliation, credits.list_stripe_gaps,
  credits.health, credits.ready, credits.metrics, credits.refresh_totals, credits.run_audit, credits.get_stripe_event,
  credits.list_settings, credits.set_setting, credits.erase_account, credits.repeat_erasures, credits.import_opening_balances,
  credits.publish_catalog, credits.sync_catalog, credits.get_catalog_sync, credits.stripe_catalog_differences,
  credits.list_jobs, credits.set_job, credits.list_job_runs, credits.claim_job, credits.run_job, credits.run_due_jobs,
  credits.schedule_jobs, credits.unschedule_jobs, credits.cron_statements
to credits_service;

grant execute on procedure credits.work_jobs to credits_service;

grant select on credits.trial_balance, credits.stripe_prices, credits.stripe_invoices, credits.stripe_refunds,
  credits.stripe_disputes to credits_service;
grant select on credits.report_event_processing, credits.report_failed_events, credits.report_stripe_requests,
  credits.report_unexpected_moves, credits.report_integrity, credits.report_subscriptions,
  credits.report_revenue, credits.report_liability, credits.report_breakage, credits.report_credit_flow,
  credits.report_reservations to credits_service;
