"""Payloads that nobody has put in order go through the intake without an unhandled error.

Those of all our stories, which tell different things of objects with the same ids. What other projects have recorded
cannot be kept here: PGCREDITS_STRIPE_FIXTURES names a folder of JSON files, each an event or a bare object, of any API
version, and they go the same way.
"""

import json
import os
from collections import Counter
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
from ledger_support import Ledger, assert_sound
from psycopg import Connection
from scenarios import STORIES
from servers import ONE_ENGINE
from stripe_world import World, prepare
from test_stripe_scenarios import SHAPES  # and with it all stories

FOLDER = os.environ.get("PGCREDITS_STRIPE_FIXTURES")
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


def told(*, named: bool) -> Iterator[tuple[str, Any]]:
    """The events of our stories, and what they are about without an event; each story as one API version shapes it."""
    for number, (name, story) in enumerate(STORIES.items()):
        story(world := World(SHAPES[(number + named) % 2], chatty=True))
        for event in world.events:
            payload = json.loads(event.payload)
            yield f"{name} {event.event_id}", payload
            yield f"{name} {event.event_id} bare", payload["data"]["object"]


def recorded() -> Iterator[tuple[str, Any]]:
    """What other projects have recorded, if it is here."""
    for path in sorted(Path(FOLDER).rglob("*.json")) if FOLDER else ():
        yield str(path), json.loads(path.read_text())


def events(*, named: bool) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each as an event with an id of its own."""
    for number, (name, payload) in enumerate(chain(told(named=named), recorded())):
        if not isinstance(payload, dict):
            continue  # a table of contents
        event = payload if payload.get("object") == "event" else event_about(payload, 1893456000 + number)
        if named:
            sign(event["data"]["object"])
        yield name, {**event, "id": f"evt_{number}"}


def event_about(thing: dict[str, Any], created: int) -> dict[str, Any]:
    """An event that a bare object could have come with."""
    kind = thing.get("object", "unknown")
    return {
        "object": "event", "type": TYPES.get(kind, f"{kind}.updated"), "created": created, "livemode": False,
        "api_version": None, "pending_webhooks": 1, "request": {"id": None, "idempotency_key": None},
        "data": {"object": thing},
    }  # fmt: skip


@ONE_ENGINE  # on both the stories are told in test_stripe_scenarios
@pytest.mark.parametrize("named", [False, True], ids=["as they are", "of a known account"])
def test_payloads_in_no_order_never_fail(conn: Connection[Any], *, named: bool) -> None:
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
