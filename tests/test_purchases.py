"""Purchases in lists and sums, refunds that never exceed what was paid, and a subscription asked for anew."""

import json
from datetime import timedelta
from functools import partial
from itertools import permutations
from typing import Any

import pytest
from client import CreditsError
from ledger_support import DAY, NOON, SECOND, Ledger, assert_sound, committed, refused, same, session, together
from psycopg import Connection
from servers import Database
from stripe_params import problems

Json = dict[str, Any]
PAID, EXPIRED = "checkout.session.completed", "checkout.session.expired"


def buy(ledger: Ledger, number: int = 1, account_id: str = "alpha", package: str = "starter", **more: Any) -> None:
    """A session that Stripe tells of, paid by a payment of its own."""
    named = {"account_id": account_id, "package": package}
    ids = {"session_id": f"cs_{number}", "payment_intent": f"pi_{number}", "customer": f"cus_{account_id}"}
    assert ledger.tell(more.pop("told", PAID), session(**{**ids, "metadata": named, **more})) == "applied"


def prepare(ledger: Ledger) -> None:
    """The demo packages, two accounts, and a purchase of 1000 cents and credits by alpha."""
    ledger.load_demo_catalog()
    ledger.open("alpha")
    ledger.open("beta")
    buy(ledger)


@pytest.fixture
def ledger(conn: Connection[Any]) -> Ledger:
    """A shop where alpha has bought."""
    ledger = Ledger(conn)
    prepare(ledger)
    return ledger


def purchase(ledger: Ledger) -> Any:
    """The purchase that is refunded here."""
    (row,) = ledger.table("purchases", "stripe_session_id = 'cs_1'")
    return row


def refund(ledger: Ledger, amount: int | None = None, key: str | None = None, **more: Any) -> Any:
    """An operator gives money back."""
    bought = purchase(ledger).purchase_id
    return ledger.request_refund("alpha", bought, amount=amount, key=key or ledger.key(), **more)


def requested(ledger: Ledger, row: Any) -> Any:
    """The request to Stripe behind a result."""
    (request,) = ledger.table("stripe_requests", "request_id = %s", row.request_id)
    return request


def made(ledger: Ledger, row: Any, refund_id: str = "re_1", **changes: Any) -> Json:
    """The refund that Stripe makes of a request."""
    params = requested(ledger, row).params
    return {
        "id": refund_id, "object": "refund", "charge": "ch_1", "payment_intent": params["payment_intent"],
        "amount": params["amount"], "currency": "usd", "status": "succeeded", "metadata": params["metadata"], **changes,
    }  # fmt: skip


def answer(ledger: Ledger, row: Any, body: Json, status: int = 200) -> str:
    """Stripe answers the request; its state."""
    state: str = ledger.complete_stripe_request(row.request_id, status, json.dumps(body)).state
    return state


def charge(refunded: int) -> Json:
    """The charge that paid, after so much of it went back."""
    return {
        "id": "ch_1", "object": "charge", "payment_intent": "pi_1", "amount": 1000, "amount_captured": 1000,
        "captured": True, "amount_refunded": refunded, "currency": "usd", "customer": "cus_alpha",
    }  # fmt: skip


# Refunds -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("reason", "told"),
    [
        (None, ({}, None)),
        ("duplicate", ({"reason": "duplicate"}, None)),
        ("it was slow", ({}, "it was slow")),
        ("x" * 600, ({}, "x" * 500)),
    ],
    ids=["none", "a word of Stripe", "another", "long"],
)
def test_a_refund_is_asked_for_with_all_that_its_events_will_need(ledger: Ledger, reason: Any, told: Any) -> None:
    row = refund(ledger, 400, reason=reason)
    assert (row.state, row.amount, row.currency, row.refundable) == ("queued", 400, "usd", 600)
    assert (row.purchase_id, row.refund_id, row.error) == (purchase(ledger).purchase_id, None, None)
    request = requested(ledger, row)
    assert (request.purpose, request.method, request.path) == ("refund", "post", "/v1/refunds")
    assert problems(request.method, request.path, request.params) == []
    (kept,) = ledger.table("refund_requests")
    ours = {"account_id": "alpha", "purchase_id": str(row.purchase_id), "refund_request_id": kept.refund_request_id}
    word, text = told
    metadata = ours | ({"reason": text} if text else {})
    assert request.params == {"payment_intent": "pi_1", "amount": 400, "metadata": metadata, **word}
    assert (purchase(ledger).status, ledger.available()) == ("completed", 1000)


WORDS = ("answer", "refund.created", "charge.refunded")
ORDERS = [order for count in (1, 2, 3) for order in permutations(WORDS, count) if order != ("charge.refunded",)]


@pytest.mark.parametrize(("amount", "status"), [(400, "partially_refunded"), (None, "refunded")])
@pytest.mark.parametrize("order", [*ORDERS, ("answer", "answer", *WORDS[1:], WORDS[1])], ids=" ".join)
def test_answer_and_events_of_a_refund_end_alike_in_any_order(
    ledger: Ledger, order: tuple[str, ...], amount: int | None, status: str
) -> None:
    row = refund(ledger, amount, key="k")
    for word in order:
        if word == "answer":
            assert answer(ledger, row, made(ledger, row)) == "done"
        else:
            shown = charge(row.amount) if word == "charge.refunded" else made(ledger, row)
            assert ledger.tell(word, shown) == "applied"
    done = refund(ledger, amount, key="k")
    assert (done.state, done.refund_id, done.refundable) == ("done", "re_1", 1000 - row.amount)
    assert (purchase(ledger).status, purchase(ledger).amount_refunded) == (status, row.amount)
    assert ledger.available() == 1000 - row.amount
    assert_sound(ledger)


def test_refunds_open_made_and_disputed_are_never_more_than_was_paid(ledger: Ledger) -> None:
    first = refund(ledger, 300)
    second = refund(ledger, 300)
    with ledger.unchanged(), refused(422, "invalid_amount", refundable=400, amount=401):
        refund(ledger, 401)
    answer(ledger, first, made(ledger, first))
    ledger.tell("charge.refunded", charge(300))
    with refused(422, "invalid_amount", refundable=400):
        refund(ledger, 401)
    dispute = {"id": "dp_1", "object": "dispute", "charge": "ch_1", "payment_intent": "pi_1", "currency": "usd"}
    ledger.tell("charge.dispute.created", {**dispute, "amount": 100, "status": "needs_response"})
    assert refund(ledger).amount == 300
    assert answer(ledger, second, {"error": {"type": "invalid_request_error", "message": "No"}}, 400) == "failed"
    assert refund(ledger, 300).refundable == 0
    with refused(422, "invalid_amount", refundable=0):
        refund(ledger)


def test_a_refund_that_fails_after_all_is_free_again(ledger: Ledger) -> None:
    row = refund(ledger, key="k")
    answer(ledger, row, made(ledger, row))
    assert ledger.available() == 0
    ledger.now += DAY
    ledger.tell("refund.failed", made(ledger, row, status="failed"))
    again = refund(ledger, key="k")
    assert (again.state, again.refundable, again.error) == ("failed", 1000, None)
    assert (purchase(ledger).status, ledger.available()) == ("completed", 1000)
    assert refund(ledger).amount == 1000
    assert_sound(ledger)


def test_what_stripe_refuses_is_told(ledger: Ledger) -> None:
    row = refund(ledger, 400, key="k")
    error = {"type": "invalid_request_error", "code": "charge_already_refunded", "message": "Already refunded"}
    answer(ledger, row, {"error": error}, 400)
    again = refund(ledger, 400, key="k")
    assert (again.state, again.error, again.refundable) == ("failed", {**error, "status": 400}, 1000)


def test_the_same_key_is_the_same_refund(ledger: Ledger) -> None:
    first = refund(ledger, 400, key="k")
    with ledger.unchanged():
        assert same(first, refund(ledger, 400, key="k"))
        for more in ({"amount": 300}, {"amount": 400, "reason": "other"}, {}):
            with refused(409, "idempotency_conflict", key="k"):
                refund(ledger, key="k", **more)


def test_what_was_not_paid_is_not_refunded(ledger: Ledger) -> None:
    buy(ledger, 2, payment_status="unpaid", payment_intent=None)
    buy(ledger, 3, payment_status="no_payment_required", payment_intent=None, amount_total=0)
    for number in (2, 3):
        (row,) = ledger.table("purchases", "stripe_session_id = %s", f"cs_{number}")
        with refused(422, "invalid_amount", refundable=0):
            ledger.request_refund("alpha", row.purchase_id, key="k")
    with refused(404, "purchase_not_found"):
        ledger.request_refund("beta", row.purchase_id, key="k")


def test_a_refund_that_names_a_request_of_another_payment_is_not_taken_for_it(ledger: Ledger) -> None:
    buy(ledger, 2)
    row = refund(ledger, 400, key="k")
    ledger.tell("refund.created", made(ledger, row, payment_intent="pi_2", charge="ch_2"))
    assert (refund(ledger, 400, key="k").state, purchase(ledger).status) == ("queued", "completed")


def test_many_refunds_at_once_are_never_more_than_was_paid(database: Database) -> None:
    with committed(database) as ledger:
        prepare(ledger)
        number = purchase(ledger).purchase_id
        jobs = [
            partial(Ledger.request_refund, account_id="alpha", purchase_id=number, amount=300, key=f"k{n}")
            for n in range(8)
        ]
        rows = together(database, jobs)
        fine = [row for row in rows if not isinstance(row, CreditsError)]
        assert sorted(row.refundable for row in fine) == [100, 400, 700]
        assert {error.code for error in rows if isinstance(error, CreditsError)} == {"invalid_amount"}
        once = partial(Ledger.request_refund, account_id="alpha", purchase_id=number, key="rest")
        rows = together(database, [once] * 8)
        assert len({row.request_id for row in rows}) == 1
        words: list[Any] = []
        for place, row in enumerate([*fine, rows[0]]):
            shown = made(ledger, row, f"re_{place}")
            event = {"id": f"evt_{place}", "type": "refund.created", "created": 1, "data": {"object": shown}}
            words += [
                partial(Ledger.complete_stripe_request, request_id=row.request_id, status=200, body=json.dumps(shown)),
                partial(Ledger.receive_stripe_event, endpoint="default", payload=json.dumps(event)),
            ]
        together(database, words)
        ledger.process_stripe_events()
        assert (purchase(ledger).status, purchase(ledger).amount_refunded) == ("refunded", 1000)
        assert ledger.available() == 0
        assert_sound(ledger)


# Lists and sums ------------------------------------------------------------------------------------------------------


def test_purchases_are_listed_page_by_page_and_none_is_left_out(ledger: Ledger) -> None:
    for number in range(2, 8):  # all in one instant
        buy(ledger, number, "beta" if number % 2 else "alpha")
    buy(ledger, 8, told=EXPIRED, status="expired", payment_status="unpaid", payment_intent=None)
    everything = [row.stripe_session_id for row in ledger.list_purchases()]
    assert everything == [f"cs_{number}" for number in range(8, 0, -1)]
    seen, before = [], None
    while page := ledger.list_purchases(max_rows=3, before=before):
        seen += [row.stripe_session_id for row in page]
        before = page[-1].purchase_id
    assert seen == everything
    of_beta = ledger.list_purchases(account_id="beta", max_rows=2)
    assert [row.stripe_session_id for row in of_beta] == ["cs_7", "cs_5"]
    assert [row.stripe_session_id for row in ledger.list_purchases(status="expired")] == ["cs_8"]
    assert ledger.list_purchases(account_id="beta", status="expired") == []
    with refused(400, "invalid_request", argument="status"):
        ledger.list_purchases(status="complete")


def test_totals_are_by_currency_and_count_what_was_completed(ledger: Ledger) -> None:
    ledger.change("update credits.packages set currency = 'eur' where code = 'pro'")
    euros: Json = {"package": "pro", "amount_subtotal": 8000, "currency": "eur"}
    buy(ledger, 2, **euros, amount_total=8800, total_details={"amount_discount": 720, "amount_tax": 1520})
    buy(ledger, 3, **euros, amount_total=8000, payment_status="unpaid")
    ledger.now += DAY
    buy(ledger, 4, "beta", livemode=True)
    row = refund(ledger, 400)
    answer(ledger, row, made(ledger, row))
    by_day = ledger.purchase_totals()
    assert [tuple(found) for found in by_day] == [
        ("2030-01-31", "eur", False, 1, 10000, 8800, 720, 1520, 0, 0),
        ("2030-01-31", "usd", False, 1, 1000, 1000, 0, 0, 400, 0),
        ("2030-02-01", "usd", True, 1, 1000, 1000, 0, 0, 0, 0),
    ]
    assert ledger.purchase_totals(until=NOON + DAY) == by_day[:2]
    assert ledger.purchase_totals(since=NOON + timedelta(seconds=1)) == by_day[2:]
    by_package = [tuple(found)[:4] for found in ledger.purchase_totals(group_by="package")]
    assert by_package == [("pro", "eur", False, 1), ("starter", "usd", False, 1), ("starter", "usd", True, 1)]


# A subscription anew -------------------------------------------------------------------------------------------------


def test_a_subscription_is_asked_for_once_and_again_when_the_answer_is_old(ledger: Ledger) -> None:
    with refused(404, "subscription_not_found"):
        ledger.refresh_subscription("alpha")
    shown = {"id": "sub_1", "object": "subscription", "customer": "cus_alpha", "status": "active", "metadata": {}}
    ledger.tell("customer.subscription.created", shown)
    assert ledger.refresh_subscription("alpha").state == "active"
    ledger.refresh_subscription("alpha")
    (request,) = ledger.table("stripe_requests")
    assert (request.purpose, request.ref, request.path) == ("retrieve", "subscription:sub_1", "/v1/subscriptions/sub_1")
    ledger.now += SECOND
    date = json.dumps({"Date": ledger.now.strftime("%a, %d %b %Y %H:%M:%S GMT")})
    past_due = json.dumps({**shown, "status": "past_due"})
    ledger.complete_stripe_request(request.request_id, 200, past_due, headers=date)
    assert ledger.refresh_subscription("alpha").state == "past_due"
    assert len(ledger.table("stripe_requests")) == 1
    ledger.now += 10 * SECOND
    ledger.refresh_subscription("alpha")
    assert [row.state for row in ledger.table("stripe_requests", "true order by request_id")] == ["done", "queued"]
