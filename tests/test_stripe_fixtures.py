"""Payloads that other projects have recorded go through the intake without an unhandled error.

They cannot be kept here, so PGCREDITS_STRIPE_FIXTURES names a folder of JSON files, each an event or a bare object of
Stripe, of any API version. Without it these tests are skipped.
"""

import json
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from ledger_support import Ledger, assert_sound
from psycopg import Connection
from stripe_world import prepare

FOLDER = os.environ.get("PGCREDITS_STRIPE_FIXTURES")
pytestmark = pytest.mark.skipif(not FOLDER, reason="PGCREDITS_STRIPE_FIXTURES names no folder of recorded payloads")

TYPES = {  # the event that a bare object comes with, where it is not <object>.updated
    "checkout.session": "checkout.session.completed",
    "dispute": "charge.dispute.updated",
    "invoice": "invoice.paid",
    "invoice_payment": "invoice_payment.paid",
    "payment_intent": "payment_intent.succeeded",
    "subscription": "customer.subscription.updated",
}


def sign(value: Any) -> None:
    """Make all metadata say that this is alpha's and sells credits."""
    if isinstance(value, dict):
        if isinstance(value.get("metadata"), dict):
            value["metadata"] |= {"account_id": "alpha", "credits": "100", "trial_credits": "10"}
        for inner in value.values():
            sign(inner)
    elif isinstance(value, list):
        for inner in value:
            sign(inner)


def events(*, named: bool) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each file as an event with an id of its own."""
    for number, path in enumerate(sorted(Path(FOLDER or ".").rglob("*.json"))):
        event = json.loads(path.read_text())
        if not isinstance(event, dict):
            continue  # a table of contents
        if event.get("object") != "event":
            kind = event.get("object", "unknown")
            event = {
                "object": "event", "type": TYPES.get(kind, f"{kind}.updated"), "created": 1893456000 + number,
                "livemode": False, "api_version": None, "pending_webhooks": 1,
                "request": {"id": None, "idempotency_key": None}, "data": {"object": event},
            }  # fmt: skip
        if named:
            sign(event["data"]["object"])
        yield str(path), {**event, "id": f"evt_{number}"}


@pytest.mark.parametrize("named", [False, True], ids=["as they are", "of a known account"])
def test_recorded_payloads_never_fail(conn: Connection[Any], *, named: bool) -> None:
    ledger = Ledger(conn)
    prepare(ledger, "alpha")
    outcomes: dict[str, str] = {}
    for path, event in events(named=named):
        first = ledger.receive_stripe_event("default", json.dumps(event)).outcome
        assert first in {"applied", "ignored", "parked"}, (path, ledger.list_stripe_events(status="failed"))
        outcomes[path] = first
    assert Counter(outcomes.values())["applied"] > 10
    ledger.rows("process_stripe_events", max_events=1000)
    for path, event in events(named=named):
        again = ledger.receive_stripe_event("default", json.dumps(event)).outcome
        assert again == "duplicate" or (outcomes[path] == "parked" and again != "failed"), path
    assert_sound(ledger)
