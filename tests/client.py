"""The verbs as Python methods: one method per verb, named arguments, one named tuple per row. Nothing else."""

from datetime import datetime
from decimal import Decimal
from typing import Any

import psycopg
from psycopg import Connection
from psycopg.rows import namedtuple_row

from pgcredits.client import CreditsError, ours
from pgcredits.db import statement

__all__ = ["Amount", "Client", "CreditsError", "ours"]

Amount = Decimal | int | str


class Client:
    """Calls verbs on one connection. Each call is a savepoint (or a transaction), so an error leaves it usable."""

    def __init__(self, conn: Connection[Any]) -> None:
        self.conn = conn

    def rows(self, function: str, **arguments: Any) -> list[Any]:
        query, parameters = statement(function, arguments)
        with ours(), self.conn.transaction(), self.conn.cursor(row_factory=namedtuple_row) as cursor:
            return cursor.execute(query, parameters).fetchall()

    def row(self, function: str, **arguments: Any) -> Any:
        (row,) = self.rows(function, **arguments)
        return row

    def open_account(self, account_id: str | None, **more: Any) -> Any:
        return self.row("open_account", account_id=account_id, **more)

    def freeze_account(self, account_id: str | None, **more: Any) -> Any:
        return self.row("freeze_account", account_id=account_id, **more)

    def unfreeze_account(self, account_id: str | None) -> Any:
        return self.row("unfreeze_account", account_id=account_id)

    def set_debt_limit(self, account_id: str | None, debt_limit: Amount | None) -> Decimal:
        value: Decimal = self.row("set_debt_limit", account_id=account_id, debt_limit=debt_limit)[0]
        return value

    def set_time_zone(self, account_id: str | None, time_zone: str | None) -> str:
        value: str = self.row("set_time_zone", account_id=account_id, time_zone=time_zone)[0]
        return value

    def set_low_balance_alert(self, account_id: str | None, threshold: Amount | None = None) -> Any:
        return self.row("set_low_balance_alert", account_id=account_id, threshold=threshold)

    def warn_expiring_credits(self, **more: Any) -> int:
        value: int = self.row("warn_expiring_credits", **more)[0]
        return value

    def get_balance(self, account_id: str | None) -> Any:
        return self.row("get_balance", account_id=account_id)

    def balance_at(self, account_id: str | None, at: datetime | None) -> Decimal:
        value: Decimal = self.row("balance_at", account_id=account_id, at=at)[0]
        return value

    def grant_credits(self, account_id: str | None, amount: Amount | None, **more: Any) -> Any:
        return self.row("grant_credits", account_id=account_id, amount=amount, **more)

    def spend(self, account_id: str | None, amount: Amount | None, **more: Any) -> Any:
        return self.row("spend", account_id=account_id, amount=amount, **more)

    def spend_many(self, requests: list[dict[str, Any]]) -> list[Any]:
        return self.rows("spend_many", requests=psycopg.types.json.Jsonb(requests))

    def refund_spend(self, account_id: str | None, spend_key: str | None, **more: Any) -> Any:
        return self.row("refund_spend", account_id=account_id, spend_key=spend_key, **more)

    def revoke_grant(self, account_id: str | None, grant_id: int | None, **more: Any) -> Any:
        return self.row("revoke_grant", account_id=account_id, grant_id=grant_id, **more)

    def transfer_credits(
        self, from_account_id: str | None, to_account_id: str | None, amount: Amount | None, **more: Any
    ) -> Any:
        return self.row(
            "transfer_credits", from_account_id=from_account_id, to_account_id=to_account_id, amount=amount, **more
        )

    def adjust(self, account_id: str | None, amount: Amount | None, **more: Any) -> Any:
        return self.row("adjust", account_id=account_id, amount=amount, **more)

    def history(self, account_id: str | None, **more: Any) -> list[Any]:
        return self.rows("history", account_id=account_id, **more)

    def prove_balance(self, account_id: str | None) -> Any:
        return self.row("prove_balance", account_id=account_id)

    def audit(self) -> list[Any]:
        return self.rows("audit")

    def reserve(self, account_id: str | None, amount: Amount | None, reservation_id: str | None, **more: Any) -> Any:
        return self.row("reserve", account_id=account_id, amount=amount, reservation_id=reservation_id, **more)

    def capture(self, account_id: str | None, reservation_id: str | None, amount: Amount | None, **more: Any) -> Any:
        return self.row("capture", account_id=account_id, reservation_id=reservation_id, amount=amount, **more)

    def settle(self, account_id: str | None, reservation_id: str | None, amount: Amount | None, **more: Any) -> Any:
        return self.row("settle", account_id=account_id, reservation_id=reservation_id, amount=amount, **more)

    def release(self, account_id: str | None, reservation_id: str | None, **more: Any) -> Any:
        return self.row("release", account_id=account_id, reservation_id=reservation_id, **more)

    def extend(self, account_id: str | None, reservation_id: str | None, **more: Any) -> Any:
        return self.row("extend", account_id=account_id, reservation_id=reservation_id, **more)

    def get_reservation(self, account_id: str | None, reservation_id: str | None) -> Any:
        return self.row("get_reservation", account_id=account_id, reservation_id=reservation_id)

    def list_reservations(self, account_id: str | None, **options: Any) -> list[Any]:
        return self.rows("list_reservations", account_id=account_id, **options)

    def set_member(self, account_id: str | None, member_id: str | None, **more: Any) -> Any:
        return self.row("set_member", account_id=account_id, member_id=member_id, **more)

    def remove_member(self, account_id: str | None, member_id: str | None) -> Any:
        return self.row("remove_member", account_id=account_id, member_id=member_id)

    def list_members(self, account_id: str | None) -> list[Any]:
        return self.rows("list_members", account_id=account_id)

    def quote(self, account_id: str | None, capability: str | None, units: Amount | None = None, **more: Any) -> Any:
        return self.row("quote", account_id=account_id, capability=capability, units=units, **more)

    def check_access(
        self, account_id: str | None, capability: str | None, units: Amount | None = None, **more: Any
    ) -> Any:
        return self.row("check_access", account_id=account_id, capability=capability, units=units, **more)

    def authorize_usage(
        self, account_id: str | None, capability: str | None, units: Amount | None = None, **more: Any
    ) -> Any:
        return self.row("authorize_usage", account_id=account_id, capability=capability, units=units, **more)

    def settle_usage(
        self, account_id: str | None, usage_id: str | None, units: Amount | None = None, **more: Any
    ) -> Any:
        return self.row("settle_usage", account_id=account_id, usage_id=usage_id, units=units, **more)

    def get_limits(self, account_id: str | None, **more: Any) -> list[Any]:
        return self.rows("get_limits", account_id=account_id, **more)

    def get_usage(self, account_id: str | None, **more: Any) -> list[Any]:
        return self.rows("get_usage", account_id=account_id, **more)

    def grant_plan_credits(self, **more: Any) -> int:
        value: int = self.row("grant_plan_credits", **more)[0]
        return value

    def initialize_plan_credits(self, **more: Any) -> int:
        value: int = self.row("initialize_plan_credits", **more)[0]
        return value

    def list_packages(self, **more: Any) -> list[Any]:
        return self.rows("list_packages", **more)

    def apply_catalog(self, catalog: Any, **more: Any) -> list[Any]:
        return self.rows("apply_catalog", catalog=psycopg.types.json.Jsonb(catalog), **more)

    def get_catalog(self) -> Any:
        return self.row("get_catalog")[0]

    def publish_catalog(self, **more: Any) -> list[Any]:
        return self.rows("publish_catalog", **more)

    def sync_catalog(self) -> Any:
        return self.row("sync_catalog")

    def get_catalog_sync(self) -> list[Any]:
        return self.rows("get_catalog_sync")

    def stripe_catalog_differences(self) -> list[Any]:
        return self.rows("stripe_catalog_differences")

    def load_demo_catalog(self) -> None:
        self.row("load_demo_catalog")

    def get_subscription_state(self, account_id: str | None) -> Any:
        return self.row("get_subscription_state", account_id=account_id)

    def change_plan(self, account_id: str | None, plan: str | None, **more: Any) -> Any:
        return self.row("change_plan", account_id=account_id, plan=plan, **more)

    def cancel_plan(self, account_id: str | None, **more: Any) -> Any:
        return self.row("cancel_plan", account_id=account_id, **more)

    def resume_plan(self, account_id: str | None) -> Any:
        return self.row("resume_plan", account_id=account_id)

    def receive_stripe_event(self, endpoint: str | None, payload: str | None) -> Any:
        return self.row("receive_stripe_event", endpoint=endpoint, payload=payload)

    def replay_stripe_event(self, event_id: str | None) -> Any:
        return self.row("replay_stripe_event", event_id=event_id)

    def process_stripe_events(self, **more: Any) -> list[Any]:
        return self.rows("process_stripe_events", **more)

    def list_stripe_events(self, **more: Any) -> list[Any]:
        return self.rows("list_stripe_events", **more)

    def archive_stripe_events(self, **more: Any) -> int:
        value: int = self.row("archive_stripe_events", **more)[0]
        return value

    def set_stripe_endpoint(self, endpoint: str | None, **more: Any) -> Any:
        return self.row("set_stripe_endpoint", endpoint=endpoint, **more)

    def claim_stripe_requests(self, max_rows: int | None = 10, worker: str | None = "test", **more: Any) -> list[Any]:
        return self.rows("claim_stripe_requests", max_rows=max_rows, worker=worker, **more)

    def claim_stripe_request(self, request_id: int | None, **more: Any) -> list[Any]:
        return self.rows("claim_stripe_request", request_id=request_id, **more)

    def complete_stripe_request(self, request_id: int | None, status: int | None, body: str | None, **more: Any) -> Any:
        return self.row("complete_stripe_request", request_id=request_id, status=status, body=body, **more)

    def retry_stripe_request(self, request_id: int | None) -> Any:
        return self.row("retry_stripe_request", request_id=request_id)

    def get_user_subscription_state(self, user_id: str | None) -> Any:
        return self.row("get_user_subscription_state", user_id=user_id)[0]

    def update_subscription_cache(self, user_id: str | None) -> Any:
        return self.row("update_subscription_cache", user_id=user_id)[0]

    def clear_expired_subscription_cache(self) -> int:
        value: int = self.row("clear_expired_subscription_cache")[0]
        return value

    def clear_all_subscription_cache(self) -> int:
        value: int = self.row("clear_all_subscription_cache")[0]
        return value

    def get_subscription_cache_status(self) -> Any:
        return self.row("get_subscription_cache_status")

    def get_cache_cleanup_history(self, **more: Any) -> list[Any]:
        return self.rows("get_cache_cleanup_history", **more)

    def use_credits_validated(self, user_id: str | None, amount: Amount | None, **more: Any) -> Any:
        return self.row("use_credits_validated", user_id=user_id, amount=amount, **more)

    def add_subscription_credits(
        self,
        customer_id: str | None,
        invoice_id: str | None,
        subscription_id: str | None,
        credits_: Amount | None,
        **more: Any,
    ) -> Any:
        return self.row(
            "add_subscription_credits",
            customer_id=customer_id,
            invoice_id=invoice_id,
            subscription_id=subscription_id,
            credits=credits_,
            **more,
        )

    def get_or_create_stripe_customer(self, user_id: str | None, **more: Any) -> Any:
        return self.row("get_or_create_stripe_customer", user_id=user_id, **more)

    def create_checkout(self, account_id: str | None, **more: Any) -> Any:
        return self.row("create_checkout", account_id=account_id, **more)

    def get_checkout(self, account_id: str | None, key: str | None) -> Any:
        return self.row("get_checkout", account_id=account_id, key=key)

    def request_refund(self, account_id: str | None, purchase_id: int | None, **more: Any) -> Any:
        return self.row("request_refund", account_id=account_id, purchase_id=purchase_id, **more)

    def list_purchases(self, **more: Any) -> list[Any]:
        return self.rows("list_purchases", **more)

    def purchase_totals(self, **more: Any) -> list[Any]:
        return self.rows("purchase_totals", **more)

    def set_auto_topup(
        self,
        account_id: str | None,
        threshold: Amount | None,
        package: str | None,
        monthly_cap: int | None,
        **more: Any,
    ) -> Any:
        return self.row(
            "set_auto_topup",
            account_id=account_id,
            threshold=threshold,
            package=package,
            monthly_cap=monthly_cap,
            **more,
        )

    def get_auto_topup(self, account_id: str | None) -> Any:
        return self.row("get_auto_topup", account_id=account_id)

    def remove_auto_topup(self, account_id: str | None) -> Any:
        return self.row("remove_auto_topup", account_id=account_id)

    def run_auto_topups(self, **more: Any) -> int:
        value: int = self.row("run_auto_topups", **more)[0]
        return value

    def refresh_subscription(self, account_id: str | None) -> Any:
        return self.row("refresh_subscription", account_id=account_id)

    def create_portal_session(self, account_id: str | None, return_url: str | None, **more: Any) -> Any:
        return self.row("create_portal_session", account_id=account_id, return_url=return_url, **more)

    def metrics(self) -> list[Any]:
        return self.rows("metrics")

    def health(self) -> list[Any]:
        return self.rows("health")

    def ready(self) -> list[Any]:
        return self.rows("ready")

    def refresh_totals(self) -> list[Any]:
        return self.rows("refresh_totals")

    def run_audit(self) -> list[Any]:
        return self.rows("run_audit")

    def get_stripe_event(self, event_id: str | None) -> Any:
        return self.row("get_stripe_event", event_id=event_id)

    def list_settings(self) -> list[Any]:
        return self.rows("list_settings")

    def set_setting(self, name: str | None, value: Any) -> Any:
        return self.row("set_setting", name=name, value=psycopg.types.json.Jsonb(value))

    def erase_account(self, account_id: str | None, **more: Any) -> Any:
        return self.row("erase_account", account_id=account_id, **more)

    def erase_member(self, account_id: str | None, member_id: str | None, **more: Any) -> Any:
        return self.row("erase_member", account_id=account_id, member_id=member_id, **more)[0]

    def repeat_erasures(self) -> int:
        value: int = self.row("repeat_erasures")[0]
        return value

    def resume_after_restore(self) -> int:
        value: int = self.row("resume_after_restore")[0]
        return value

    def import_opening_balances(self, balances: list[Any], **more: Any) -> list[Any]:
        return self.rows("import_opening_balances", balances=psycopg.types.json.Jsonb(balances), **more)

    def set_notification_endpoint(self, name: str | None, url: str | None, **more: Any) -> Any:
        return self.row("set_notification_endpoint", name=name, url=url, **more)

    def remove_notification_endpoint(self, name: str | None) -> bool:
        value: bool = self.row("remove_notification_endpoint", name=name)[0]
        return value

    def list_notification_endpoints(self) -> list[Any]:
        return self.rows("list_notification_endpoints")

    def claim_notifications(self, max_rows: int | None = 10, worker: str | None = "test", **more: Any) -> list[Any]:
        return self.rows("claim_notifications", max_rows=max_rows, worker=worker, **more)

    def complete_notification(self, delivery_id: int | None, status: int | None, **more: Any) -> Any:
        return self.row("complete_notification", delivery_id=delivery_id, status=status, **more)

    def list_notifications(self, **more: Any) -> list[Any]:
        return self.rows("list_notifications", **more)

    def replay_notification(self, notification_id: int | None, **more: Any) -> list[Any]:
        return self.rows("replay_notification", notification_id=notification_id, **more)

    def retry_notifications(self, target: str | None, **more: Any) -> int:
        value: int = self.row("retry_notifications", target=target, **more)[0]
        return value

    def purge_notifications(self, **more: Any) -> int:
        value: int = self.row("purge_notifications", **more)[0]
        return value

    def reconcile_stripe(self, **more: Any) -> Any:
        return self.row("reconcile_stripe", **more)

    def get_reconciliation(self, **more: Any) -> Any:
        return self.row("get_reconciliation", **more)

    def list_stripe_gaps(self, **more: Any) -> list[Any]:
        return self.rows("list_stripe_gaps", **more)

    def list_jobs(self) -> list[Any]:
        return self.rows("list_jobs")

    def set_job(self, name: str | None, **more: Any) -> Any:
        return self.row("set_job", name=name, **more)

    def list_job_runs(self, **more: Any) -> list[Any]:
        return self.rows("list_job_runs", **more)

    def claim_job(self, runner: str | None = "test", **more: Any) -> list[Any]:
        return self.rows("claim_job", runner=runner, **more)

    def run_job(self, name: str | None, **more: Any) -> Any:
        return self.row("run_job", name=name, **more)

    def run_due_jobs(self, **more: Any) -> list[Any]:
        return self.rows("run_due_jobs", **more)

    def schedule_jobs(self) -> list[str]:
        return [row[0] for row in self.rows("schedule_jobs")]

    def unschedule_jobs(self) -> None:
        self.row("unschedule_jobs")

    def cron_statements(self, **more: Any) -> list[Any]:
        return self.rows("cron_statements", **more)

    def set_issuer(self, issuer: str | None, **more: Any) -> Any:
        return self.row("set_issuer", issuer=issuer, **more)

    def remove_issuer(self, issuer: str | None) -> int:
        value: int = self.row("remove_issuer", issuer=issuer)[0]
        return value

    def link_identity(self, account_id: str | None, issuer: str | None, subject: str | None, **more: Any) -> Any:
        return self.row("link_identity", account_id=account_id, issuer=issuer, subject=subject, **more)

    def unlink_identity(self, account_id: str | None, issuer: str | None, subject: str | None, **more: Any) -> bool:
        row = self.row("unlink_identity", account_id=account_id, issuer=issuer, subject=subject, **more)
        value: bool = row[0]
        return value

    def list_identities(self, account_id: str | None) -> list[Any]:
        return self.rows("list_identities", account_id=account_id)

    def get_portal_session(self, account_id: str | None, key: str | None) -> Any:
        return self.row("get_portal_session", account_id=account_id, key=key)
