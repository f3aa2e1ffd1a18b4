"""Requests to Stripe have parameters that Stripe's own package knows. Requests for plans are checked in test_plans."""

from typing import Any

import pytest
from ledger_support import Ledger
from psycopg import Connection
from stripe_params import addresses, problems

ITEM: dict[str, Any] = {"price": "price_1", "quantity": 1}
SUBSCRIBE: dict[str, Any] = {"customer": "cus_1", "items": [ITEM]}


@pytest.mark.parametrize(
    ("method", "path", "params", "found"),
    [
        ("post", "/v1/subscriptions", SUBSCRIBE, []),
        ("post", "/v1/subscriptions", {**SUBSCRIBE, "metadata": {"account_id": "alpha"}}, []),
        ("post", "/v1/subscriptions", {**SUBSCRIBE, "metadata": {"account_id": 5}}, ["metadata[account_id] is no str"]),
        ("post", "/v1/subscriptions", {**SUBSCRIBE, "colour": "red"}, ["has an unknown colour"]),
        ("post", "/v1/subscriptions", {**SUBSCRIBE, "items": [{**ITEM, "qty": 1}]}, ["items[0] has an unknown qty"]),
        ("post", "/v1/subscriptions", {**SUBSCRIBE, "items": [{**ITEM, "quantity": 1.0}]}, ["quantity is no int"]),
        ("post", "/v1/subscriptions", {**SUBSCRIBE, "items": ITEM}, ["items is no list"]),
        ("post", "/v1/subscriptions", {**SUBSCRIBE, "off_session": "true"}, ["off_session is no bool"]),
        ("post", "/v1/payment_intents", {"currency": "usd"}, ["has no amount"]),
        ("post", "/v1/payment_intents", {"currency": "usd", "amount": True}, ["amount is no int"]),
        ("post", "/v1/subscription", SUBSCRIBE, ["is unknown"]),
        ("delete", "/v1/prices/price_1", {}, ["is unknown"]),
    ],
)
def test_the_check_sees_what_is_wrong(method: str, path: str, params: dict[str, Any], found: list[str]) -> None:
    assert len(addresses()) > 600
    said = problems(method, path, params)
    assert len(said) == len(found)
    assert all(one.endswith(end) for one, end in zip(said, found, strict=True)), said


def test_every_retrieve_is_one_that_stripe_knows(conn: Connection[Any]) -> None:
    ledger = Ledger(conn)
    kinds = (
        "customer", "product", "price", "subscription", "subscription_schedule", "invoice", "charge", "refund",
        "dispute", "payment_intent", "payment_method", "checkout.session", "invoice_lines", "line_items",
        "invoice_payments",
    )  # fmt: skip
    with ledger.as_owner():
        for kind in kinds:
            ledger.query("select credits._request_object(%s, 'x_1')", kind)
    rows = ledger.table("stripe_requests")
    assert len(rows) == len(kinds)
    for row in rows:
        assert problems(row.method, row.path, row.params) == []


def test_a_customer_is_made_as_stripe_wants_it(conn: Connection[Any]) -> None:
    ledger = Ledger(conn)
    ledger.open("alpha")
    ledger.row("get_or_create_stripe_customer", user_id="alpha", email="alpha@example.com")
    (row,) = ledger.table("stripe_requests")
    assert problems(row.method, row.path, row.params) == []
