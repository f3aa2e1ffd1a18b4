"""A Stripe that somebody else wrote, on loopback: what it sends us and what it makes of our requests. One long life.

It is GPL-3.0 and runs as a process of its own; nothing of ours imports it.
"""

import socket
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from door import SECRET, Door, paid
from ledger_support import Ledger, assert_sound, committed
from psycopg.types.json import Jsonb
from servers import ONE_ENGINE, Database, until

KEY = "sk_test_12345"
ROLE = "credits_service"
# Its own command listens on all interfaces and keeps its state in a file that it unpickles at its next start.
PROGRAM = """
import sys
from aiohttp import web
from localstripe import resources, server
resources.store.dump_to_disk = lambda *a, **k: None
web.run_app(server.app, host="127.0.0.1", port=int(sys.argv[1]), print=None)
"""


@pytest.fixture
def peer() -> Iterator[httpx.Client]:
    """The merchant at the other Stripe."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    running = subprocess.Popen([sys.executable, "-c", PROGRAM, str(port)], stderr=subprocess.DEVNULL)
    with httpx.Client(base_url=f"http://127.0.0.1:{port}", auth=(KEY, ""), timeout=10) as client:
        try:
            until(lambda: answers(port))
            yield client
        finally:
            running.terminate()
            running.wait(10)


def answers(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def post(peer: httpx.Client, path: str, **form: str) -> Any:
    answer = peer.post(
        path, data={name.replace("__", "[", 1) + ("]" if "__" in name else ""): form[name] for name in form}
    )
    assert answer.status_code == 200, answer.text
    return answer.json()


def done(ledger: Ledger, request_id: int) -> Any:
    """The answer to a request of ours."""

    def finished() -> Any:
        (row,) = ledger.table("stripe_requests", "request_id = %s", request_id)
        assert row.state in {"queued", "sent", "done"}, row
        return row.response if row.state == "done" else None

    return until(finished)


def ask(ledger: Ledger, statement: str, *values: Any) -> Any:
    """Let SQL write a request down; its answer."""
    with ledger.as_owner():
        (row,) = ledger.query(f"select credits.{statement} as request_id", *values)
    return done(ledger, row.request_id)


def state(ledger: Ledger) -> Any:
    return ledger.get_subscription_state("alpha").state


@ONE_ENGINE
def test_the_life_of_a_customer_at_another_stripe(database: Database, peer: httpx.Client) -> None:
    with (
        committed(database) as ledger,
        Door(database.dsn, role=ROLE, stripe_key=KEY, stripe_api_base=str(peer.base_url).rstrip("/")) as door,
    ):
        ledger.load_demo_catalog()
        ledger.change(
            "insert into credits.plans (code, name, monthly_credits, stripe_price_ids) "
            "values ('basic', 'Basic', 0, '{plan_basic}')"
        )
        ledger.open_account("alpha", email="alpha@example.com")
        peer.post(
            "/_config/webhooks/door",
            data={"url": f"http://127.0.0.1:{door.port}/webhooks/stripe/default", "secret": SECRET},
        )

        customer = done(ledger, ledger.row("get_or_create_stripe_customer", user_id="alpha").request_id)["id"]
        assert ledger.row("get_or_create_stripe_customer", user_id="alpha").customer_id == customer
        card = post(
            peer, "/v1/payment_methods", type="card", card__number="4242424242424242", card__exp_month="12",
            card__exp_year="2040", card__cvc="123",
        )["id"]  # fmt: skip
        post(peer, f"/v1/payment_methods/{card}/attach", customer=customer)
        post(peer, f"/v1/customers/{customer}", invoice_settings__default_payment_method=card)

        # It subscribes. The events come in the order in which this peer sends them: what is paid before what is sold.
        product = post(peer, "/v1/products", name="Basic", type="service")["id"]
        post(
            peer, "/v1/plans", id="plan_basic", amount="1000", currency="usd", interval="month", product=product,
            metadata__credits="1000",
        )  # fmt: skip
        subscription = peer.post(
            "/v1/subscriptions",
            data={"customer": customer, "items[0][plan]": "plan_basic", "metadata[account_id]": "alpha"},
        ).json()
        assert subscription["status"] == "active"
        until(lambda: state(ledger) == "active" and ledger.available() == 1000)
        assert ledger.get_subscription_state("alpha").plan == "basic"
        types = [row.type for row in ledger.table("stripe_events", "true order by received_at")]
        assert {"invoice.payment_succeeded", "customer.subscription.created", "payment_intent.succeeded"} <= {*types}
        ledger.spend("alpha", 300, key="use")

        # It cancels, changes its mind, is charged off session for more, and gets some of that back.
        ledger.cancel_plan("alpha")
        until(lambda: state(ledger) == "canceling")
        ledger.resume_plan("alpha")
        until(lambda: state(ledger) == "active")
        charge = {"customer": customer, "payment_method": card, "amount": 1000, "currency": "usd", "confirm": True}
        intent = ask(
            ledger,
            "_request('test', 'alpha', 'post', '/v1/payment_intents', %s)",
            Jsonb({**charge, "off_session": True}),
        )
        assert intent["status"] == "succeeded"
        bought = paid(
            "alpha",
            customer=customer,
            payment_intent=intent["id"],
            amount_total=1000,
            amount_subtotal=1000,
            currency="usd",
        )
        assert door.post(bought).json()["outcome"] == "applied"
        assert ledger.available() == 1700
        (purchase,) = ledger.list_purchases(account_id="alpha")
        asked = ledger.request_refund("alpha", purchase.purchase_id, amount=400, reason="half of it failed", key="r")
        assert done(ledger, asked.request_id)["amount"] == 400
        (purchase,) = ledger.list_purchases(account_id="alpha")
        assert (purchase.status, purchase.amount_refunded, ledger.available()) == ("partially_refunded", 400, 1300)

        # Its month is given back in the Dashboard, of which this peer tells nobody, and it leaves.
        invoice = ask(ledger, "_request_object('invoice', %s)", subscription["latest_invoice"])
        payment = invoice["payment_intent"]
        payment = payment if isinstance(payment, str) else payment["id"]
        refund = post(peer, "/v1/refunds", payment_intent=payment)["id"]
        ask(ledger, "_request_object('refund', %s)", refund)
        until(
            lambda: ledger.sums() == (300, 0, 300, 0)
        )  # 700 of the month; the 300 spent are owed, and paid by the rest
        ledger.cancel_plan("alpha", at="now")
        until(lambda: state(ledger) in {"canceled", "none"})
        until(
            lambda: (
                "customer.subscription.deleted"
                in {row.type for row in ledger.table("stripe_events", "status = 'applied'")}
            )
        )

        assert ledger.table("stripe_events", "status in ('parked', 'failed')") == []
        assert {row.state for row in ledger.table("stripe_requests")} == {"done"}
        assert ledger.sums() == (300, 0, 300, 0)
        assert_sound(ledger)
