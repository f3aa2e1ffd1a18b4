"""Bad input of every kind, for every argument of every public verb: the documented error, and nothing has changed."""

from collections.abc import Callable, Iterator
from datetime import timedelta
from decimal import Decimal
from typing import Any

import psycopg
import pytest
from ledger_support import DAY, NOON, Ledger, refused, session, undone
from psycopg import Connection
from psycopg.types.json import Jsonb

Wrong = dict[tuple[int, str], list[Any]]  # values by the error that they get

LONG = "k" * 10_000
TOO_SMALL = [
    -1,
    Decimal("NaN"),
    Decimal("Infinity"),
    Decimal("-Infinity"),
    Decimal("0.0000001"),
    Decimal("1e12"),
    Decimal("1e30"),
]

INVALID = (400, "invalid_request")
NO_AMOUNT = (422, "invalid_amount")
AMOUNT: Wrong = {NO_AMOUNT: [None, 0, *TOO_SMALL]}
AMOUNT_OR_ZERO: Wrong = {NO_AMOUNT: [None, *TOO_SMALL]}
AMOUNT_OR_NULL: Wrong = {NO_AMOUNT: [0, *TOO_SMALL]}
SIGNED_AMOUNT: Wrong = {NO_AMOUNT: [None, 0, *TOO_SMALL[1:], Decimal("-0.0000001"), Decimal("-1e12")]}
KEY: Wrong = {INVALID: [None, "", LONG, "k" * 256]}
ACCOUNT: Wrong = {INVALID: [None, "", LONG, "a" * 201], (404, "account_not_found"): ["nobody", "Alpha", "alpha "]}
NEW_ACCOUNT: Wrong = {INVALID: ACCOUNT[INVALID]}
RESERVATION: Wrong = {INVALID: KEY[INVALID], (404, "reservation_not_found"): ["unknown", "R"]}
METADATA: Wrong = {INVALID: [Jsonb([]), Jsonb([{}]), Jsonb("text"), Jsonb(1), Jsonb(True), Jsonb(None)]}
NO_TIME: Wrong = {INVALID: [timedelta(0), -DAY, "-12 months 360 days 10 minutes"]}
TTL: Wrong = {INVALID: [*NO_TIME[INVALID], DAY + timedelta(microseconds=1), timedelta(days=10_000), "178000000 years"]}

USES = ("quote", "check_access", "authorize_usage")
NO_CAPABILITY: Wrong = {(404, "capability_not_found"): [None, "", "dance", LONG]}
MISCOUNTED: list[Any] = [{"words": 1}, [], 1, "words", {"words": "1"}]
COUNTS: Wrong = {INVALID: [Jsonb(value) for value in MISCOUNTED]}  # beside units
NO_CATALOG: list[Any] = [None, [], 1, "plans", {"plan": {}}]
ADDRESS: Wrong = {
    INVALID: [
        None, "", "localhost", "//localhost", "javascript:alert(1)", "ftp://localhost", "http://", "http:localhost",
        "http://user@localhost", "http://localhost:3000@example.com", "http://localhost\\@example.com",
        "http://local host", "http://localhost/a b", "http://localhost/\n", "http://localhost/../a",
        "http://localhost/%2E./a", LONG, "http://localhost/" + LONG,
    ],
    (400, "redirect_not_allowed"): ["https://localhost", "http://example.com", "http://localhost.example.com"],
}  # fmt: skip

GOOD: dict[str, dict[str, Any]] = {
    "open_account": {"account_id": "new", "kind": "user"},
    "set_low_balance_alert": {"account_id": "alpha", "threshold": 5},
    "warn_expiring_credits": {"max_rows": 5},
    "set_notification_endpoint": {"name": "shop", "url": "https://example.com/hook", "kinds": ["low_balance"]},
    "claim_notifications": {"max_rows": 5, "worker": "one"},
    "complete_notification": {"delivery_id": 0, "status": 200},
    "list_notifications": {"max_rows": 5},
    "replay_notification": {"notification_id": 0},
    "retry_notifications": {"target": "shop", "max_rows": 5},
    "purge_notifications": {"max_rows": 5},
    "freeze_account": {"account_id": "alpha"},
    "unfreeze_account": {"account_id": "alpha"},
    "get_balance": {"account_id": "alpha"},
    "balance_at": {"account_id": "alpha", "at": NOON},
    "history": {"account_id": "alpha"},
    "prove_balance": {"account_id": "alpha"},
    "grant_credits": {"account_id": "alpha", "amount": 5, "key": "k"},
    "adjust": {"account_id": "alpha", "amount": 5, "key": "k"},
    "spend": {"account_id": "alpha", "amount": 5, "key": "k"},
    "refund_spend": {"account_id": "alpha", "spend_key": "spent", "amount": 5, "key": "k"},
    "revoke_grant": {"account_id": "alpha", "grant_id": 0, "amount": 5, "key": "k"},
    "transfer_credits": {"from_account_id": "alpha", "to_account_id": "beta", "amount": 5, "key": "k"},
    "reserve": {"account_id": "alpha", "amount": 5, "reservation_id": "new"},
    "capture": {"account_id": "alpha", "reservation_id": "r", "amount": 5, "key": "k"},
    "settle": {"account_id": "alpha", "reservation_id": "r", "amount": 5},
    "release": {"account_id": "alpha", "reservation_id": "r"},
    "extend": {"account_id": "alpha", "reservation_id": "r"},
    "get_reservation": {"account_id": "alpha", "reservation_id": "r"},
    "list_reservations": {"account_id": "alpha", "max_rows": 5},
    "set_debt_limit": {"account_id": "alpha", "debt_limit": 5},
    "set_member": {"account_id": "alpha", "member_id": "m2", "role": "admin", "monthly_limit": 5},
    "remove_member": {"account_id": "alpha", "member_id": "m1"},
    "list_members": {"account_id": "alpha"},
    "quote": {"account_id": "beta", "capability": "chapter", "units": 5},
    "check_access": {"account_id": "beta", "capability": "chapter", "units": 5},
    "authorize_usage": {"account_id": "beta", "capability": "chapter", "units": 5, "usage_id": "new"},
    "settle_usage": {"account_id": "beta", "usage_id": "u", "units": 5},
    "get_limits": {"account_id": "beta"},
    "get_usage": {"account_id": "beta", "group_by": "day"},
    "grant_plan_credits": {"max_accounts": 5},
    "initialize_plan_credits": {"max_accounts": 5},
    "apply_catalog": {"catalog": Jsonb({})},
    "spend_many": {"requests": Jsonb([{"account_id": "alpha", "amount": 5, "key": "k"}])},
    "receive_stripe_event": {"endpoint": "default", "payload": '{"id": "evt_1", "type": "unheard.of"}'},
    "replay_stripe_event": {"event_id": "evt_0"},
    "process_stripe_events": {"max_events": 5},
    "list_stripe_events": {"max_rows": 5},
    "archive_stripe_events": {"older_than": DAY, "max_events": 5},
    "set_stripe_endpoint": {"endpoint": "default", "mode": "shadow", "livemode": True},
    "claim_stripe_requests": {"max_rows": 5, "worker": "one"},
    "claim_stripe_request": {"request_id": 0},
    "complete_stripe_request": {"request_id": 0, "status": 200, "body": "{}"},
    "retry_stripe_request": {"request_id": 0},
    "get_subscription_state": {"account_id": "beta"},
    "change_plan": {"account_id": "alpha", "plan": "free"},
    "cancel_plan": {"account_id": "beta"},
    "resume_plan": {"account_id": "beta"},
    "set_time_zone": {"account_id": "alpha", "time_zone": "Europe/Berlin"},
    "use_credits_validated": {"user_id": "alpha", "amount": 5},
    "add_subscription_credits": {
        "customer_id": "cus_2", "invoice_id": "in_1", "subscription_id": "sub_2", "credits": 5,
    },
    "get_or_create_stripe_customer": {"user_id": "beta"},
    "create_checkout": {"account_id": "alpha", "package": "starter", "success_url": "http://localhost", "key": "k"},
    "get_checkout": {"account_id": "alpha", "key": "checkout"},
    "create_portal_session": {"account_id": "alpha", "return_url": "http://localhost", "key": "k"},
    "get_portal_session": {"account_id": "alpha", "key": "portal"},
    "request_refund": {"account_id": "gamma", "purchase_id": 0, "amount": 5, "key": "k"},
    "list_purchases": {"account_id": "alpha", "max_rows": 5},
    "purchase_totals": {"group_by": "package"},
    "refresh_subscription": {"account_id": "gamma"},
    "set_auto_topup": {
        "account_id": "delta", "threshold": 5, "package": "starter", "monthly_cap": 5000, "daily_cap": 2000,
    },
    "get_auto_topup": {"account_id": "delta"},
    "remove_auto_topup": {"account_id": "delta"},
    "run_auto_topups": {"max_accounts": 5},
    "reconcile_stripe": {"since": NOON - DAY},
    "get_reconciliation": {"run_id": 0},
    "list_stripe_gaps": {"run_id": 0, "max_rows": 5},
    "get_user_subscription_state": {"user_id": "alpha"},
    "update_subscription_cache": {"user_id": "alpha"},
    "get_cache_cleanup_history": {"n": 5},
    "get_stripe_event": {"event_id": "evt_0"},
    "set_setting": {"name": "past_due_grace", "value": Jsonb("3 days")},
    "erase_account": {"account_id": "beta", "release_holds": True},
    "erase_member": {"account_id": "alpha", "member_id": "m1", "release_holds": True},
    "import_opening_balances": {"balances": Jsonb([{"key": "1", "account_id": "new", "amount": 5}])},
    "set_job": {"name": "audit", "schedule": "0 5 * * *"},
    "list_job_runs": {"name": "audit", "max_rows": 5},
    "claim_job": {"runner": "one"},
    "run_job": {"name": "purge_job_history", "runner": "one"},
    "run_due_jobs": {"runner": "one"},
    "set_issuer": {"issuer": "https://issuer.example", "audiences": ["credits"], "org_claim": ["o", "id"]},
    "remove_issuer": {"issuer": "https://issuer.example"},
    "link_identity": {"account_id": "alpha", "issuer": "https://issuer.example", "subject": "u1", "kind": "org"},
    "unlink_identity": {"account_id": "alpha", "issuer": "https://issuer.example", "subject": "u1", "kind": "org"},
    "list_identities": {"account_id": "alpha"},
}  # fmt: skip

BAD: dict[tuple[str, str], Wrong] = {
    **{(verb, "account_id"): ACCOUNT for verb in GOOD if "account_id" in GOOD[verb] and verb != "open_account"},
    **{(verb, "user_id"): ACCOUNT for verb in GOOD if "user_id" in GOOD[verb]},
    **{(verb, "key"): KEY for verb in GOOD if "key" in GOOD[verb]},
    **{(verb, "amount"): AMOUNT for verb in ("grant_credits", "spend", "transfer_credits", "reserve", "capture")},
    **{(verb, "amount"): AMOUNT_OR_NULL for verb in ("refund_spend", "revoke_grant")},
    **{(verb, "reservation_id"): RESERVATION for verb in ("capture", "settle", "release", "extend", "get_reservation")},
    **{
        (v, "metadata"): METADATA
        for v in (
            "open_account",
            "grant_credits",
            "spend",
            "transfer_credits",
            "reserve",
            "settle",
            "authorize_usage",
            "settle_usage",
        )
    },
    ("adjust", "amount"): SIGNED_AMOUNT,
    ("set_low_balance_alert", "threshold"): {NO_AMOUNT: TOO_SMALL},
    **{
        (verb, "max_rows"): {INVALID: [None, 0, -1, 1001, 2**31 - 1]}
        for verb in (
            "warn_expiring_credits",
            "claim_notifications",
            "list_notifications",
            "retry_notifications",
            "purge_notifications",
        )
    },
    ("set_notification_endpoint", "name"): {
        INVALID: [None, "", "Shop", "1shop", "my-shop", "customer", "operator", LONG]
    },
    ("set_notification_endpoint", "url"): {
        INVALID: [
            None,
            "",
            "example.com",
            "http://example.com",
            "ftp://example.com",
            "https://user@example.com",
            "http://127.0.0.1@x.com",
            "http://localhost.example.com",
            "http://127.0.0.1.example.com",
            "https://example.com/a b",
            "https://" + LONG,
        ]
    },
    ("set_notification_endpoint", "account_id"): {
        INVALID: ACCOUNT[INVALID][1:],
        **{e: v for e, v in ACCOUNT.items() if e != INVALID},
    },
    ("set_notification_endpoint", "kinds"): {INVALID: [[], [None], ["low"], ["low_balance", ""]]},
    ("complete_notification", "delivery_id"): {(404, "delivery_not_found"): [None, 0, -1, 2**63 - 1]},
    ("replay_notification", "notification_id"): {(404, "notification_not_found"): [None, 0, -1, 2**63 - 1]},
    ("retry_notifications", "target"): KEY,
    ("settle", "amount"): AMOUNT_OR_ZERO,
    ("set_debt_limit", "debt_limit"): AMOUNT_OR_ZERO,
    ("set_member", "member_id"): {INVALID: ACCOUNT[INVALID]},
    ("set_member", "role"): {INVALID: ["", "guest", "Owner", LONG]},
    ("set_member", "monthly_limit"): {NO_AMOUNT: TOO_SMALL},
    ("remove_member", "member_id"): {INVALID: ACCOUNT[INVALID], (404, "member_not_found"): ["m2", "M1"]},
    **{(verb, "on_overage"): {INVALID: ["", "CAP", "debt"]} for verb in ("settle", "settle_usage")},
    **{(verb, "capability"): NO_CAPABILITY for verb in USES},
    **{(verb, "units"): {NO_AMOUNT: TOO_SMALL} for verb in (*USES, "settle_usage")},
    **{(verb, "unit_counts"): COUNTS for verb in (*USES, "settle_usage")},
    ("quote", "quality"): {(404, "quality_not_found"): ["", "platinum", LONG]},
    ("quote", "model"): {(404, "model_not_found"): ["", "gigantic", LONG]},
    ("authorize_usage", "quality"): {(403, "quality_not_in_plan"): ["", "platinum", LONG]},
    ("authorize_usage", "model"): {(403, "model_not_in_plan"): ["", "gigantic", LONG]},
    ("authorize_usage", "usage_id"): KEY,
    ("authorize_usage", "ttl"): TTL,
    ("authorize_usage", "rate_id"): {(409, "quote_expired"): [0, -1, 2**63 - 1]},
    ("settle_usage", "usage_id"): {INVALID: KEY[INVALID], (404, "usage_not_found"): ["unknown", "U"]},
    ("get_usage", "group_by"): {INVALID: ["", "hour", "Day", LONG]},
    ("grant_plan_credits", "max_accounts"): {INVALID: [None, 0, -1, 10_001]},
    ("initialize_plan_credits", "max_accounts"): {INVALID: [None, 0, -1, 10_001]},
    ("apply_catalog", "catalog"): {(400, "invalid_catalog"): [None, *map(Jsonb, NO_CATALOG)]},
    ("reserve", "reservation_id"): {INVALID: KEY[INVALID]},
    ("reserve", "min_amount"): AMOUNT_OR_NULL,
    ("reserve", "ttl"): TTL,
    ("extend", "ttl"): NO_TIME,
    ("open_account", "account_id"): NEW_ACCOUNT,
    ("open_account", "kind"): {INVALID: ["", "robot", LONG]},
    ("open_account", "plan"): {(404, "plan_not_found"): ["", "platinum", LONG]},
    ("balance_at", "at"): {INVALID: [None]},
    ("history", "max_rows"): {INVALID: [0, -1, 1001, 2**31 - 1]},
    ("grant_credits", "kind"): {INVALID: ["", "salary", LONG]},
    ("grant_credits", "expires_at"): {INVALID: [NOON, NOON - DAY, "infinity", "-infinity", "10000-01-01Z"]},
    ("grant_credits", "effective_at"): {INVALID: ["infinity", "-infinity", "294276-12-31Z", "0001-12-31Z BC"]},
    ("grant_credits", "scope"): {INVALID: [[], [None], ["image", None], [["image"]]]},
    ("refund_spend", "spend_key"): {INVALID: KEY[INVALID], (404, "spend_not_found"): ["unknown"]},
    ("revoke_grant", "grant_id"): {(404, "grant_not_found"): [None, 0, -1, 2**63 - 1]},
    ("transfer_credits", "from_account_id"): ACCOUNT,
    ("transfer_credits", "to_account_id"): {**ACCOUNT, INVALID: [*ACCOUNT[INVALID], "alpha"]},
    ("spend_many", "requests"): {INVALID: [None, Jsonb(None), Jsonb({}), Jsonb(1), Jsonb("[]"), Jsonb([{}] * 10_001)]},
    ("receive_stripe_event", "endpoint"): NEW_ACCOUNT,
    ("receive_stripe_event", "payload"): {
        INVALID: [None, "", " ", "null", "1", '"text"', "[]", '{"id": ', "{}{}", "{'id': 1}", '{"id": "\x01"}', LONG]
    },
    ("get_stripe_event", "event_id"): {(404, "event_not_found"): [None, "", "evt_unknown", LONG]},
    ("set_setting", "name"): {(404, "setting_not_found"): [None, "", "Past_due_grace", LONG]},
    ("set_setting", "value"): {
        INVALID: [None, *map(Jsonb, (None, 7, "", "7", "-1 days", "soon", "infinity", ["7 days"], {}))]
    },
    ("import_opening_balances", "balances"): {
        INVALID: [None, Jsonb(None), Jsonb({}), Jsonb(1), Jsonb("[]"), Jsonb([{}] * 10_001)]
    },
    ("replay_stripe_event", "event_id"): {(404, "event_not_found"): [None, "", "evt_unknown", LONG]},
    ("process_stripe_events", "max_events"): {INVALID: [None, 0, -1, 10_001, 2**31 - 1]},
    ("list_stripe_events", "max_rows"): {INVALID: [0, -1, 1001, 2**31 - 1]},
    ("archive_stripe_events", "older_than"): {INVALID: [None, -DAY, timedelta(microseconds=-1)]},
    ("archive_stripe_events", "max_events"): {INVALID: [None, 0, -1, 1_000_001]},
    ("set_stripe_endpoint", "endpoint"): NEW_ACCOUNT,
    ("set_stripe_endpoint", "mode"): {INVALID: [None, "", "LIVE", "test", LONG]},
    ("claim_stripe_requests", "max_rows"): {INVALID: [None, 0, -1, 1001, 2**31 - 1]},
    ("complete_stripe_request", "request_id"): {(404, "request_not_found"): [None, 0, -1, 2**63 - 1]},
    ("reconcile_stripe", "since"): {INVALID: [NOON + DAY, "infinity", "-infinity", "1969-12-31"]},
    ("get_reconciliation", "run_id"): {(404, "reconciliation_not_found"): [-1, 2**63 - 1]},
    ("list_stripe_gaps", "run_id"): {(404, "reconciliation_not_found"): [-1, 2**63 - 1]},
    ("list_stripe_gaps", "max_rows"): {INVALID: [None, 0, -1, 1001, 2**31 - 1]},
    ("retry_stripe_request", "request_id"): {(404, "request_not_found"): [None, 0, -1, 2**63 - 1]},
    ("change_plan", "plan"): {(404, "plan_not_found"): [None, "", "platinum", LONG]},
    ("change_plan", "at"): {INVALID: ["", "later", "NOW", LONG]},
    ("cancel_plan", "at"): {INVALID: ["", "later", "NOW", LONG]},
    ("use_credits_validated", "amount"): AMOUNT,
    ("use_credits_validated", "metadata"): {
        INVALID: [*METADATA[INVALID], Jsonb({"key": ""}), Jsonb({"idempotency_key": LONG})]
    },
    ("add_subscription_credits", "customer_id"): {INVALID: KEY[INVALID], (404, "customer_not_found"): ["cus_9"]},
    ("add_subscription_credits", "invoice_id"): KEY,
    ("add_subscription_credits", "subscription_id"): KEY,
    ("add_subscription_credits", "credits"): AMOUNT,
    ("get_cache_cleanup_history", "n"): {INVALID: [0, -1, 1001, 2**31 - 1]},
    **{(verb, "name"): {(404, "job_not_found"): [None, "", "Audit", LONG]} for verb in ("set_job", "run_job")},
    ("set_job", "schedule"): {INVALID: ["", "hourly", "* * * *", "* * * * * *", "60 * * * *", "0 0 30 2 *", LONG]},
    ("list_job_runs", "name"): {(404, "job_not_found"): ["", "Audit", LONG]},
    ("list_job_runs", "max_rows"): {INVALID: [None, 0, -1, 1001, 2**31 - 1]},
    **{(verb, "runner"): {INVALID: ACCOUNT[INVALID]} for verb in ("claim_job", "run_job", "run_due_jobs")},
    ("create_checkout", "package"): {
        INVALID: [None],
        (404, "package_not_found"): ["", "gold", "Starter", LONG],
    },
    ("create_checkout", "plan"): {INVALID: ["", "team", LONG]},  # beside a package
    ("create_checkout", "price_id"): {INVALID: ["", "price_1", LONG]},  # likewise
    ("create_checkout", "quantity"): {INVALID: [0, -1, 1_000_000, 2**31 - 1]},
    ("create_checkout", "metadata"): {
        INVALID: [
            *METADATA[INVALID],
            *(
                Jsonb(bad)
                for bad in ({"a": 1}, {"a": None}, {"": "a"}, {"k" * 41: "a"}, {"a": "v" * 501}, {"a[b]": "c"})
            ),
            *(Jsonb({name: "mine"}) for name in ("account_id", "package", "checkout_id")),
            Jsonb({str(n): "a" for n in range(41)}),
        ]
    },
    ("create_checkout", "success_url"): ADDRESS,
    ("create_checkout", "cancel_url"): {**ADDRESS, INVALID: ADDRESS[INVALID][1:]},
    ("create_portal_session", "return_url"): ADDRESS,
    ("get_checkout", "key"): {INVALID: KEY[INVALID], (404, "checkout_not_found"): ["unknown", "Checkout"]},
    ("set_auto_topup", "threshold"): AMOUNT,
    ("set_auto_topup", "package"): {(404, "package_not_found"): [None, "", "unknown", "Starter", LONG]},
    ("set_auto_topup", "monthly_cap"): {INVALID: [None, 0, -1, 999]},
    ("set_auto_topup", "daily_cap"): {INVALID: [0, -1, 999]},
    ("set_auto_topup", "cool_down"): {INVALID: [timedelta(0), -DAY, timedelta(seconds=59), 31 * DAY]},
    ("run_auto_topups", "max_accounts"): {INVALID: [None, 0, -1, 10_001, 2**31 - 1]},
    ("get_portal_session", "key"): {INVALID: KEY[INVALID], (404, "checkout_not_found"): ["unknown", "checkout"]},
    ("request_refund", "purchase_id"): {(404, "purchase_not_found"): [None, 0, -1, 2**63 - 1]},
    ("request_refund", "amount"): {NO_AMOUNT: [0, -1, 1001, 2**63 - 1]},
    ("list_purchases", "account_id"): {
        INVALID: ACCOUNT[INVALID][1:],
        **{e: v for e, v in ACCOUNT.items() if e != INVALID},
    },
    ("list_purchases", "max_rows"): {INVALID: [0, -1, 1001, 2**31 - 1]},
    ("list_reservations", "max_rows"): {INVALID: [0, -1, 1001, 2**31 - 1]},
    ("purchase_totals", "group_by"): {INVALID: ["", "month", "Day", LONG]},
    **{(verb, "issuer"): KEY for verb in ("set_issuer", "remove_issuer", "unlink_identity")},
    ("link_identity", "issuer"): {INVALID: KEY[INVALID], (404, "issuer_not_found"): ["https://other.example", "x"]},
    **{(verb, "subject"): KEY for verb in ("link_identity", "unlink_identity")},
    **{(verb, "kind"): {INVALID: ["", "User", "organization", LONG]} for verb in ("link_identity", "unlink_identity")},
    ("set_issuer", "audiences"): {INVALID: [None, [], [""], [None], ["credits", None], [["credits"]]]},
    ("set_issuer", "org_claim"): {INVALID: [[], [None], [["o", "id"]]]},
    ("set_time_zone", "time_zone"): {INVALID: [None, "", "Mars/Olympus", "europe/berlin", "+02:00", LONG]},
}

NOT_A_NUMBER = "22P02"
NOT_A_TIME = "22007"
MISTYPED: dict[tuple[str, str], str] = {
    **{(verb, "amount"): NOT_A_NUMBER for verb in GOOD if "amount" in GOOD[verb]},
    ("reserve", "min_amount"): NOT_A_NUMBER,
    **{(verb, "units"): NOT_A_NUMBER for verb in (*USES, "settle_usage")},
    **{(verb, "unit_counts"): NOT_A_NUMBER for verb in (*USES, "settle_usage")},
    ("authorize_usage", "rate_id"): NOT_A_NUMBER,
    ("authorize_usage", "ttl"): NOT_A_TIME,
    ("get_usage", "since"): NOT_A_TIME,
    ("get_usage", "until"): NOT_A_TIME,
    ("grant_plan_credits", "max_accounts"): NOT_A_NUMBER,
    ("apply_catalog", "catalog"): NOT_A_NUMBER,
    ("set_debt_limit", "debt_limit"): NOT_A_NUMBER,
    ("set_member", "monthly_limit"): NOT_A_NUMBER,
    ("revoke_grant", "grant_id"): NOT_A_NUMBER,
    ("history", "before_seq"): NOT_A_NUMBER,
    ("history", "max_rows"): NOT_A_NUMBER,
    ("grant_credits", "priority"): NOT_A_NUMBER,
    ("grant_credits", "scope"): NOT_A_NUMBER,
    ("spend", "metadata"): NOT_A_NUMBER,
    ("spend_many", "requests"): NOT_A_NUMBER,
    ("grant_credits", "expires_at"): NOT_A_TIME,
    ("balance_at", "at"): NOT_A_TIME,
    ("reserve", "ttl"): NOT_A_TIME,
    ("extend", "ttl"): NOT_A_TIME,
    ("process_stripe_events", "max_events"): NOT_A_NUMBER,
    ("list_stripe_events", "max_rows"): NOT_A_NUMBER,
    ("list_stripe_events", "before"): NOT_A_TIME,
    ("archive_stripe_events", "older_than"): NOT_A_TIME,
    ("archive_stripe_events", "max_events"): NOT_A_NUMBER,
    ("set_stripe_endpoint", "livemode"): NOT_A_NUMBER,
    ("claim_stripe_requests", "max_rows"): NOT_A_NUMBER,
    ("claim_stripe_request", "request_id"): NOT_A_NUMBER,
    ("complete_stripe_request", "request_id"): NOT_A_NUMBER,
    ("complete_stripe_request", "attempt"): NOT_A_NUMBER,
    ("retry_stripe_request", "request_id"): NOT_A_NUMBER,
    ("reconcile_stripe", "since"): NOT_A_TIME,
    ("list_stripe_gaps", "run_id"): NOT_A_NUMBER,
    ("complete_stripe_request", "status"): NOT_A_NUMBER,
    ("complete_stripe_request", "headers"): NOT_A_NUMBER,
    ("add_subscription_credits", "credits"): NOT_A_NUMBER,
    ("use_credits_validated", "metadata"): NOT_A_NUMBER,
    ("get_cache_cleanup_history", "n"): NOT_A_NUMBER,
    ("set_job", "enabled"): NOT_A_NUMBER,
    ("list_job_runs", "max_rows"): NOT_A_NUMBER,
    ("claim_job", "standby"): NOT_A_NUMBER,
    ("run_job", "run_id"): NOT_A_NUMBER,
    ("request_refund", "purchase_id"): NOT_A_NUMBER,
    ("list_purchases", "before"): NOT_A_NUMBER,
    ("list_purchases", "max_rows"): NOT_A_NUMBER,
    ("list_reservations", "max_rows"): NOT_A_NUMBER,
    ("purchase_totals", "since"): NOT_A_TIME,
    ("purchase_totals", "until"): NOT_A_TIME,
    ("set_setting", "value"): NOT_A_NUMBER,
    ("erase_account", "release_holds"): NOT_A_NUMBER,
    ("erase_member", "release_holds"): NOT_A_NUMBER,
    ("import_opening_balances", "balances"): NOT_A_NUMBER,
    ("import_opening_balances", "dry_run"): NOT_A_NUMBER,
    ("set_auto_topup", "threshold"): NOT_A_NUMBER,
    ("set_auto_topup", "monthly_cap"): NOT_A_NUMBER,
    ("set_auto_topup", "daily_cap"): NOT_A_NUMBER,
    ("set_auto_topup", "cool_down"): NOT_A_TIME,
    ("run_auto_topups", "max_accounts"): NOT_A_NUMBER,
    ("create_checkout", "quantity"): NOT_A_NUMBER,
    ("set_low_balance_alert", "threshold"): NOT_A_NUMBER,
    ("complete_notification", "status"): NOT_A_NUMBER,
    ("complete_notification", "attempt"): NOT_A_NUMBER,
    ("set_notification_endpoint", "enabled"): NOT_A_NUMBER,
    ("list_notifications", "before"): NOT_A_NUMBER,
    ("create_checkout", "save_card"): NOT_A_NUMBER,
    ("create_checkout", "allow_promotion_codes"): NOT_A_NUMBER,
    ("create_checkout", "metadata"): NOT_A_NUMBER,
    ("set_issuer", "audiences"): NOT_A_NUMBER,
    ("set_issuer", "require_aud"): NOT_A_NUMBER,
    ("set_issuer", "org_claim"): NOT_A_NUMBER,
    ("set_issuer", "allow_anonymous"): NOT_A_NUMBER,
    ("link_identity", "may_buy"): NOT_A_NUMBER,
}

LOST = """{"id": "evt_0", "type": "customer.subscription.updated", "created": 1893456000, "data": {"object": {
  "id": "sub_1", "object": "subscription", "customer": "cus_1", "status": "active"}}}"""


@pytest.fixture(scope="module")
def scene(stage: Callable[..., Connection[Any]]) -> Ledger:
    """Accounts with a little of everything, which bad input must leave alone."""
    ledger = Ledger(stage())
    ledger.load_demo_catalog()
    ledger.set_notification_endpoint("other", "http://localhost/")
    ledger.open("alpha", 100)
    ledger.open_account("beta", plan="team")
    ledger.receive_stripe_event("default", LOST)
    ledger.tell("customer.updated", {"id": "cus_2", "object": "customer", "metadata": {"account_id": "alpha"}})
    ledger.spend("alpha", 10, key="spent")
    ledger.reserve("alpha", 10, "r")
    ledger.authorize_usage("beta", "chapter", 5, usage_id="u")
    ledger.set_member("alpha", "m1")
    refused_request = ledger.row("get_or_create_stripe_customer", user_id="beta").request_id
    ledger.complete_stripe_request(refused_request, 400, '{"error": {}}')
    ledger.open("gamma")
    bought = {"account_id": "gamma", "package": "starter"}
    ledger.tell("checkout.session.completed", session(customer="cus_3", metadata=bought))
    lives = {"id": "sub_3", "object": "subscription", "status": "active", "metadata": {"account_id": "gamma"}}
    ledger.tell("customer.subscription.created", lives)
    ledger.create_checkout("alpha", package="pro", success_url="http://localhost", key="checkout")
    ledger.claim_notifications(1)
    ledger.open("delta", 100)
    card = {"default_payment_method": "pm_4"}
    named = {"id": "cus_4", "object": "customer", "metadata": {"account_id": "delta"}, "invoice_settings": card}
    ledger.tell("customer.created", named)
    ledger.reconcile_stripe()
    ledger.set_issuer("https://issuer.example", audiences=["credits"])
    ledger.create_portal_session("alpha", "http://localhost", key="portal")
    return ledger


@pytest.fixture
def ledger(scene: Ledger) -> Iterator[Ledger]:
    with undone(scene):
        yield scene


def good(ledger: Ledger, verb: str) -> dict[str, Any]:
    """Arguments that work."""
    arguments = dict(GOOD[verb])
    if verb == "revoke_grant":
        arguments["grant_id"] = ledger.table("grants", "account_id = 'alpha'")[0].grant_id
    elif verb == "request_refund":
        arguments["purchase_id"] = ledger.table("purchases", "status = 'completed'")[0].purchase_id
    elif "run_id" in arguments:
        arguments["run_id"] = ledger.get_reconciliation().run_id
    elif verb == "complete_stripe_request":
        arguments["request_id"] = ledger.table("stripe_requests")[0].request_id
    elif verb == "replay_notification":
        arguments["notification_id"] = ledger.list_notifications()[0].notification_id
    elif verb == "complete_notification":
        arguments["delivery_id"] = ledger.table("notification_deliveries", "state = 'sent'")[0].delivery_id
    elif verb == "retry_stripe_request":
        arguments["request_id"] = ledger.table("stripe_requests", "state = 'failed'")[0].request_id
    return arguments


@pytest.mark.parametrize("verb", sorted(GOOD))
def test_the_arguments_that_are_spoilt_below_work_unspoilt(ledger: Ledger, verb: str) -> None:
    ledger.rows(verb, **good(ledger, verb))


@pytest.mark.parametrize(("verb", "argument"), BAD, ids="-".join)
def test_a_bad_value_is_refused_and_changes_nothing(ledger: Ledger, verb: str, argument: str) -> None:
    arguments = good(ledger, verb)
    with ledger.unchanged():
        for (status, code), values in BAD[verb, argument].items():
            for value in values:
                with refused(status, code):
                    ledger.rows(verb, **{**arguments, argument: value})
                    pytest.fail(f"{verb} accepted {argument} = {value!r}"[:200])


@pytest.mark.parametrize(
    ("verb", "argument"),
    [
        ("change_plan", "at"),
        ("cancel_plan", "at"),
        ("create_checkout", "quantity"),
        ("get_cache_cleanup_history", "n"),
        ("get_usage", "group_by"),
        ("grant_credits", "kind"),
        ("history", "max_rows"),
        ("list_purchases", "max_rows"),
        ("list_reservations", "max_rows"),
        ("purchase_totals", "group_by"),
        ("set_member", "role"),
        ("settle", "on_overage"),
    ],
)
def test_null_is_the_default(ledger: Ledger, verb: str, argument: str) -> None:
    arguments = {name: value for name, value in good(ledger, verb).items() if name != argument}
    answers = []
    for given in (arguments, {**arguments, argument: None}):
        with ledger.conn.transaction(force_rollback=True):
            answers.append([unnumbered(row) for row in ledger.rows(verb, **given)])
    assert answers[0] == answers[1]


def unnumbered(row: Any) -> dict[str, Any]:
    """A row without the numbers that a sequence gives, which goes on in spite of a rollback."""
    numbers = {"grant_id", "purchase_id", "request_id"}
    return {name: value for name, value in row._asdict().items() if name not in numbers}


@pytest.mark.parametrize(("verb", "argument"), MISTYPED, ids="-".join)
def test_a_value_of_another_type_is_refused_by_the_database(ledger: Ledger, verb: str, argument: str) -> None:
    arguments = good(ledger, verb)
    with ledger.unchanged():
        for value in ("abc", "{"):
            with pytest.raises(psycopg.DataError) as caught:
                ledger.rows(verb, **{**arguments, argument: value})
            assert caught.value.sqlstate == MISTYPED[verb, argument]


@pytest.mark.parametrize("verb", sorted(set(GOOD) - {"history", "get_balance", "prove_balance"}))
def test_an_argument_that_does_not_exist_is_refused_by_the_database(ledger: Ledger, verb: str) -> None:
    with ledger.unchanged(), pytest.raises(psycopg.errors.UndefinedFunction):
        ledger.rows(verb, **good(ledger, verb), amuont=5)


@pytest.mark.parametrize("argument", ["account_id", "amount", "key", "metadata"])
def test_a_bad_request_of_a_batch_is_answered_as_spend_would_and_changes_nothing(ledger: Ledger, argument: str) -> None:
    bad = [(error, value) for error, values in BAD["spend", argument].items() for value in values]
    requests = [
        {
            **GOOD["spend"],
            argument: value.obj if isinstance(value, Jsonb) else str(value) if isinstance(value, Decimal) else value,
        }
        for _, value in bad
        if not isinstance(value, Jsonb) or value.obj is not None  # a JSON null is no metadata
    ]
    errors = [error for error, value in bad if not isinstance(value, Jsonb) or value.obj is not None]
    with ledger.unchanged():
        rows = ledger.spend_many(requests)
    assert [(row.status, row.code) for row in rows] == errors
    assert [row.position for row in rows] == list(range(1, len(bad) + 1))[: len(rows)]


@pytest.mark.parametrize(
    "request_", [1, "text", None, [], {}, {"amount": {}}, {"amount": "abc"}, {"amount": "1e3"}, {"amount": "1_000"}]
)
def test_a_request_that_is_no_spend_is_answered_alone(ledger: Ledger, request_: Any) -> None:
    fine = {"account_id": "alpha", "amount": 5, "key": "fine"}
    first, odd, last = ledger.rows("spend_many", requests=Jsonb([fine, request_, {**fine, "key": "too"}]))
    assert (first.status, last.status) == (200, 200)
    assert (odd.status, odd.code) == NO_AMOUNT
    assert ledger.available() == 70


def test_every_public_verb_and_argument_is_covered(ledger: Ledger) -> None:
    rows = ledger.query(
        "select p.proname as verb, unnest(p.proargnames[:p.pronargs]) as argument from pg_proc p "
        "where p.pronamespace = 'credits'::regnamespace and p.prokind = 'f' "
        "and has_function_privilege('credits_service', p.oid, 'execute')"
    )
    free = {  # any text will do, or a filter that any value only narrows
        "description", "subject", "member_id", "capability", "reason", "email", "kinds", "before_seq", "priority",
        "status", "type", "before", "livemode", "stripe_account", "body", "headers", "dry_run", "since", "until",
        "worker", "stripe_version", "attempt", "not_sent",
        "save_card", "allow_promotion_codes", "state", "target", "channels", "answer", "enabled", "release_holds",
        "repair", "after",
        "standby", "run_id", "remove", "elsewhere",
        "require_aud", "allow_anonymous", "may_buy",
    }  # fmt: skip
    known = {(row.verb, row.argument) for row in rows if row.argument not in free}
    known |= {(verb, "capability") for verb in USES}
    known -= {("claim_stripe_request", "request_id")}  # not there is not due
    known -= {("check_access", "quality"), ("check_access", "model")}  # a gate, not an error
    known |= {("reconcile_stripe", "since")}
    known |= {(verb, "run_id") for verb in ("get_reconciliation", "list_stripe_gaps")}  # run_job takes any
    known |= {(verb, "member_id") for verb in ("set_member", "remove_member")}  # there it is no free text
    known |= {("set_notification_endpoint", "kinds"), ("retry_notifications", "target")}  # likewise
    known -= {
        ("list_notifications", "account_id"),
        ("list_notifications", "kind"),
        ("remove_notification_endpoint", "name"),
    }  # nothing is found
    known |= {(verb, "subject") for verb in ("link_identity", "unlink_identity")}  # likewise
    assert known == set(BAD)
