-- Who may call what, on one page: take everything away, then give.
-- credits_service is a trusted backend: verbs. credits_user is a browser: the schema credits_api, and what its views and
-- functions stand on, which it cannot name, having no right on the schema credits. Nobody may write into a table.

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
  credits.list_reservations,
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
  credits.list_settings, credits.set_setting, credits.import_opening_balances,
  credits.erase_account, credits.erase_member, credits.repeat_erasures, credits.resume_after_restore,
  credits.publish_catalog, credits.sync_catalog, credits.get_catalog_sync, credits.stripe_catalog_differences,
  credits.list_jobs, credits.set_job, credits.list_job_runs, credits.claim_job, credits.run_job, credits.run_due_jobs,
  credits.schedule_jobs, credits.unschedule_jobs, credits.cron_statements,
  credits.set_issuer, credits.remove_issuer, credits.link_identity, credits.unlink_identity, credits.list_identities,
  credits.claim_stripe_request, credits.get_portal_session
to credits_service;

grant execute on procedure credits.work_jobs to credits_service;

grant select on credits.trial_balance, credits.report_event_processing, credits.report_failed_events, credits.report_stripe_requests,
  credits.report_unexpected_moves, credits.report_integrity, credits.report_subscriptions,
  credits.report_revenue, credits.report_liability, credits.report_breakage, credits.report_credit_flow,
  credits.report_reservations to credits_service;

-- End users -----------------------------------------------------------------------------------------------------------

grant execute on function
  credits_api.get_balance, credits_api.history, credits_api.list_reservations, credits_api.prove_balance,
  credits_api.list_members, credits_api.get_subscription_state, credits_api.get_limits, credits_api.get_usage,
  credits_api.quote, credits_api.check_access, credits_api.list_packages, credits_api.list_plans,
  credits_api.list_purchases, credits_api.create_checkout, credits_api.get_checkout, credits_api.create_portal_session,
  credits_api.get_portal_session
to credits_user;

grant select on credits_api.accounts, credits_api.balances, credits_api.grants, credits_api.history, credits_api.reservations,
  credits_api.purchases, credits_api.subscriptions, credits_api.members, credits_api.packages, credits_api.plans
to credits_user;

grant execute on function
  credits._my_accounts, credits._my_account, credits._my_token_counts, credits._my_now, credits._my_balance,
  credits._my_grants, credits._my_history, credits._my_reservations, credits._my_proof, credits._my_members,
  credits._my_subscription, credits._my_limits, credits._my_usage, credits._my_quote, credits._my_access,
  credits._my_packages, credits._my_plans, credits._my_purchases, credits._my_checkout, credits._my_checkout_state,
  credits._my_portal_session, credits._my_portal_state
to credits_user;

grant select (account_id, kind, status, created_at) on credits.accounts to credits_user;
grant select (account_id, entry_seq, created_at, kind, amount, debt, balance_after, available_after, description, subject,
              member_id, capability, reservation_id) on credits.entries to credits_user;
grant select (account_id, reservation_id, status, amount, captured, charged, created_at, expires_at, closed_at, subject,
              member_id, capability, description) on credits.reservations to credits_user;
grant select (account_id, purchase_id, status, package, quantity, credits, amount, currency, amount_subtotal,
              amount_discount, amount_tax, amount_refunded, created_at, completed_at) on credits.purchases to credits_user;
grant select (code, name, description, credits, price, currency, discount_percent, popular, display_order)
  on credits.packages to credits_user;
grant select (code, name, description, monthly_credits, trial_credits, rollover, rollover_cap, seats, display_order,
              stripe_price_ids) on credits.plans to credits_user;

-- A platform's own roles ----------------------------------------------------------------------------------------------

create or replace function credits._enable_role(
  role text,
  kind text
)
returns void
language plpgsql
as $$
declare
  v_role pg_catalog.pg_roles;
begin
  select r.* into v_role from pg_catalog.pg_roles r where r.rolname = _enable_role.role;
  if not found then
    perform credits._fail(404, 'role_not_found', jsonb_build_object('role', _enable_role.role));
  elsif _enable_role.kind in ('user', 'service') is not true or v_role.rolname like E'credits\\_%'
        or _enable_role.kind = 'user' and (v_role.rolsuper or v_role.rolbypassrls) then
    perform credits._fail(400, 'invalid_request', jsonb_build_object('role', _enable_role.role, 'kind', _enable_role.kind),
      'kind is user or service. End users act as a role that row level security binds, and none of ours.');
  end if;
  insert into credits.enabled_roles as e (role, kind)
  values (_enable_role.role, _enable_role.kind)
  on conflict on constraint enabled_roles_pkey do update set kind = excluded.kind;
  perform credits._grant_like(_enable_role.role, _enable_role.kind);
end $$;
comment on function credits._enable_role(text, text) is
'Gives a role of a platform (authenticated, service_role) the rights of credits_user (kind user) or credits_service (service),
now and after every deploy. For the owner of the database. Membership would not do: a role that does not inherit gets nothing.';

create or replace function credits._disable_role(role text)
returns void
language plpgsql
as $$
begin
  delete from credits.enabled_roles e where e.role = _disable_role.role;
  if found then  -- one that was dropped meanwhile has nothing left
    perform credits._grant_like(r.rolname, null) from pg_catalog.pg_roles r where r.rolname = _disable_role.role;
  end if;
end $$;
comment on function credits._disable_role(text) is 'Takes back what _enable_role() gave.';

-- Everything away, then what the role of ours has; with a kind of null nothing more.
create or replace function credits._grant_like(
  role text,
  kind text
)
returns void
language plpgsql
as $$
declare
  v_model    oid  := pg_catalog.to_regrole('credits_' || _grant_like.kind);
  v_schema   name;
  v_function regprocedure;
  v_relation regclass;
  v_column   name;
begin
  execute format('revoke all on all routines in schema credits, credits_api from %I', _grant_like.role);
  execute format('revoke all on all tables in schema credits, credits_api from %I', _grant_like.role);
  execute format('revoke all on schema credits, credits_api from %I', _grant_like.role);
  for v_schema in
    select n.nspname from pg_catalog.pg_namespace n, pg_catalog.aclexplode(n.nspacl) a
     where n.nspname in ('credits', 'credits_api') and a.grantee = v_model
  loop
    execute format('grant usage on schema %I to %I', v_schema, _grant_like.role);
  end loop;
  for v_function in
    select p.oid from pg_catalog.pg_proc p, pg_catalog.aclexplode(p.proacl) a
     where p.pronamespace::regnamespace::text in ('credits', 'credits_api') and a.grantee = v_model
  loop
    execute format('grant execute on routine %s to %I', v_function, _grant_like.role);
  end loop;
  for v_relation in
    select c.oid from pg_catalog.pg_class c, pg_catalog.aclexplode(c.relacl) a
     where c.relnamespace::regnamespace::text in ('credits', 'credits_api') and a.grantee = v_model
  loop
    execute format('grant select on %s to %I', v_relation, _grant_like.role);
  end loop;
  for v_relation, v_column in
    select c.oid, t.attname
      from pg_catalog.pg_class c, pg_catalog.pg_attribute t, pg_catalog.aclexplode(t.attacl) a
     where c.relnamespace::regnamespace::text = 'credits' and t.attrelid = c.oid and a.grantee = v_model
  loop
    execute format('grant select (%I) on %s to %I', v_column, v_relation, _grant_like.role);
  end loop;
end $$;

do $$
begin
  perform credits._grant_like(e.role, e.kind)
     from credits.enabled_roles e
     join pg_catalog.pg_roles r on r.rolname = e.role;
end $$;
