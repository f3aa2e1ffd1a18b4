"""A request whose outcome stayed unknown: found at Stripe, made anew, or closed, and never done twice."""

import json
from typing import Any

import pytest
from ledger_support import DAY, HOUR, NOON, SECOND, Ledger, assert_sound, refused, session
from psycopg import Connection
from stripe_params import problems

Json = dict[str, Any]
BACK = "http://localhost/thanks"


@pytest.fixture
def ledger(conn: Connection[Any]) -> Ledger:
    """Alpha has bought the starter package for 1000 cents."""
    ledger = Ledger(conn)
    ledger.load_demo_catalog()
    ledger.open("alpha")
    assert ledger.tell("checkout.session.completed", session()) == "applied"
    return ledger


def refund(ledger: Ledger, key: str = "r", amount: int = 400) -> Any:
    (purchase,) = ledger.list_purchases(account_id="alpha")
    return ledger.request_refund("alpha", purchase.purchase_id, amount=amount, key=key)


def lose(ledger: Ledger, request_id: int) -> Any:
    """A request is sent and never answered, for a day; what is asked of Stripe then."""
    assert request_id in {row.request_id for row in ledger.claim_stripe_requests(100)}
    ledger.now += DAY
    claimed = ledger.claim_stripe_requests(100)
    assert kept(ledger, request_id).state == "unknown" or not claimed
    for row in claimed:
        assert (row.method, problems(row.method, row.path, row.params)) == ("get", [])
    return claimed[0] if claimed else None


def kept(ledger: Ledger, request_id: int) -> Any:
    (row,) = ledger.table("stripe_requests", "request_id = %s", request_id)
    return row


def answer(ledger: Ledger, request_id: int, *found: Json, status: int = 200, has_more: bool = False) -> str:
    body = (
        {"object": "list", "data": [*found], "has_more": has_more}
        if status == 200
        else {"error": {"type": "api_error"}}
    )
    state: str = ledger.complete_stripe_request(request_id, status, json.dumps(body)).state
    return state


def made(ledger: Ledger, request_id: int, refund_id: str = "re_1") -> Json:
    """The refund that a request made."""
    asked = kept(ledger, request_id).params
    return {"id": refund_id, "object": "refund", "status": "succeeded", "currency": "usd", **asked}


def told(ledger: Ledger) -> list[str]:
    return [row.type for row in ledger.table("notifications", "type ~ '^stripe_' order by notification_id")]


def test_what_was_done_is_found_and_is_the_answer(ledger: Ledger) -> None:
    number = refund(ledger).request_id
    look = lose(ledger, number)
    created = {"gte": int((NOON - HOUR).timestamp())}
    assert (look.path, look.params) == ("/v1/refunds", {"payment_intent": "pi_1", "limit": 100, "created": created})
    assert refund(ledger).state == "queued"
    other = {**made(ledger, number, "re_0"), "metadata": {"refund_request_id": "another"}}
    assert answer(ledger, look.request_id, other, has_more=True) == "done"
    (more,) = ledger.claim_stripe_requests()
    assert (more.path, more.params) == (look.path, {**look.params, "starting_after": "re_0"})
    assert answer(ledger, more.request_id, {"id": "re_2", "object": "refund"}, made(ledger, number)) == "done"
    row = kept(ledger, number)
    assert (row.state, row.http_status, row.response["id"], row.attempts) == ("done", 200, "re_1", 1)
    done = refund(ledger)
    assert (done.state, done.refund_id, done.refundable) == ("done", "re_1", 600)
    assert (ledger.available(), told(ledger)) == (600, [])
    with ledger.unchanged():
        assert answer(ledger, more.request_id) == "done"
        ledger.complete_stripe_request(number, 200, json.dumps(made(ledger, number)))
    assert_sound(ledger)


def test_what_was_never_done_is_asked_anew_and_held_back_all_the_time(ledger: Ledger) -> None:
    number = refund(ledger).request_id
    look = lose(ledger, number)
    assert answer(ledger, look.request_id) == "done"
    assert (kept(ledger, number).state, kept(ledger, number).error_type) == ("failed", "never_done")
    (again,) = ledger.claim_stripe_requests()
    assert (again.method, again.params) == ("post", kept(ledger, number).params)
    assert again.idempotency_key == f"pgc-{again.request_id}" != f"pgc-{number}"
    waiting = refund(ledger)
    assert (waiting.request_id, waiting.state, waiting.refundable) == (again.request_id, "queued", 600)
    with refused(422, "invalid_amount", refundable=600):
        refund(ledger, "another", 601)
    ledger.complete_stripe_request(number, 200, json.dumps(made(ledger, number)))  # an answer that comes too late
    assert kept(ledger, number).state == "failed"
    ledger.complete_stripe_request(again.request_id, 200, json.dumps(made(ledger, again.request_id)))
    assert (refund(ledger).state, ledger.available(), told(ledger)) == ("done", 600, [])
    assert_sound(ledger)


def test_an_answer_that_comes_first_decides(ledger: Ledger) -> None:
    number = refund(ledger).request_id
    look = lose(ledger, number)
    assert ledger.complete_stripe_request(number, 200, json.dumps(made(ledger, number))).state == "done"
    with ledger.unchanged("stripe_requests"):
        assert answer(ledger, look.request_id) == "done"
    assert (kept(ledger, number).state, ledger.claim_stripe_requests()) == ("done", [])


def test_a_list_that_does_not_come_leaves_it_to_a_person(ledger: Ledger) -> None:
    number = refund(ledger).request_id
    look = lose(ledger, number)
    assert answer(ledger, look.request_id, status=500) == "queued"
    assert answer(ledger, look.request_id, status=400) == "failed"
    assert kept(ledger, number).state == "unknown"
    assert set(told(ledger)) == {"stripe_request_failed", "stripe_request_unknown"}
    assert refund(ledger).refundable == 600


def test_what_cannot_be_looked_for_is_told_at_once(ledger: Ledger) -> None:
    with ledger.as_owner():
        for purpose, metadata in (("test", {"refund_request_id": "x"}), ("refund", {})):
            ledger.query(
                "select credits._request(%s, %s, 'post', '/v1/refunds', %s::jsonb)",
                purpose, purpose, json.dumps({"payment_intent": "pi_1", "metadata": metadata}),
            )  # fmt: skip
    ledger.claim_stripe_requests()
    ledger.now += DAY
    assert ledger.claim_stripe_requests() == []
    assert told(ledger) == ["stripe_request_unknown"] * 2


def test_a_customer_is_found_by_its_account(ledger: Ledger) -> None:
    number = ledger.row("get_or_create_stripe_customer", user_id="alpha").request_id
    if number is None:  # the purchase has bound one
        ledger.open("beta")
        number = ledger.row("get_or_create_stripe_customer", user_id="beta").request_id
    look = lose(ledger, number)
    assert look.path == "/v1/customers"
    mine = {"id": "cus_2", "object": "customer", "metadata": {"account_id": "beta"}}
    assert answer(ledger, look.request_id, {**mine, "id": "cus_3", "metadata": {}}, mine) == "done"
    assert ledger.row("get_or_create_stripe_customer", user_id="beta").customer_id == "cus_2"


def test_a_checkout_is_found_or_has_failed(ledger: Ledger) -> None:
    asked = ledger.create_checkout("alpha", package="starter", success_url=BACK, key="k")
    look = lose(ledger, asked.request_id)
    assert look.path == "/v1/checkout/sessions"
    opened = session(
        "cs_2", status="open", payment_status="unpaid", url="https://pay",
        metadata=kept(ledger, asked.request_id).params["metadata"], expires_at=int((ledger.now + HOUR).timestamp()),
    )  # fmt: skip
    with ledger.conn.transaction(force_rollback=True):
        assert answer(ledger, look.request_id, opened) == "done"
        assert (ledger.get_checkout("alpha", "k").state, ledger.get_checkout("alpha", "k").url) == (
            "done",
            "https://pay",
        )
    assert answer(ledger, look.request_id) == "done"
    assert (ledger.get_checkout("alpha", "k").state, ledger.claim_stripe_requests()) == ("failed", [])
    assert [row.status for row in ledger.list_purchases(account_id="alpha")] == ["failed", "completed"]
    assert told(ledger) == ["stripe_request_failed"]
    again = ledger.retry_stripe_request(asked.request_id)  # by a person
    assert (ledger.get_checkout("alpha", "k").state, ledger.get_checkout("alpha", "k").request_id) == (
        "queued", again.request_id,
    )  # fmt: skip
    assert [row.status for row in ledger.list_purchases(account_id="alpha")] == ["pending", "completed"]


def test_a_portal_that_is_a_day_old_has_failed(ledger: Ledger) -> None:
    number = ledger.create_portal_session("alpha", BACK, key="k").request_id
    assert lose(ledger, number) is None
    assert (kept(ledger, number).state, told(ledger)) == ("failed", ["stripe_request_failed"])


def test_a_refund_that_is_made_again_by_hand_counts_again(ledger: Ledger) -> None:
    number = refund(ledger).request_id
    ledger.claim_stripe_requests()
    ledger.complete_stripe_request(number, 400, '{"error": {"type": "invalid_request_error"}}')
    assert (refund(ledger).state, refund(ledger).refundable) == ("failed", 1000)
    again = ledger.retry_stripe_request(number)
    assert (refund(ledger).state, refund(ledger).request_id, refund(ledger).refundable) == (
        "queued",
        again.request_id,
        600,
    )
    ledger.claim_stripe_requests()
    ledger.complete_stripe_request(again.request_id, 400, '{"error": {"type": "invalid_request_error"}}')
    refund(ledger, "all", 700)
    with ledger.unchanged(), refused(422, "invalid_amount", amount=400, refundable=300):
        ledger.retry_stripe_request(again.request_id)


def test_a_refund_whose_event_has_come_is_not_made_again(ledger: Ledger) -> None:
    number = refund(ledger).request_id
    lose(ledger, number)
    ledger.now += SECOND
    assert ledger.tell("refund.created", made(ledger, number)) == "applied"
    with ledger.unchanged(), refused(422, "invalid_amount"):
        ledger.retry_stripe_request(number)


# After a restore -----------------------------------------------------------------------------------------------------


def test_what_waited_in_a_dump_is_looked_for_and_not_made_twice(ledger: Ledger) -> None:
    done, undone = refund(ledger, "done"), refund(ledger, "undone", 100)
    ledger.create_portal_session("alpha", BACK, key="p")
    waiting = {row.request_id for row in ledger.table("stripe_requests", "state = 'queued'")}
    assert len(waiting - {done.request_id, undone.request_id}) == 1
    ledger.now += 3 * DAY  # Stripe made the first since, and has forgotten its key
    assert ledger.resume_after_restore() == 3
    assert {kept(ledger, request_id).state for request_id in waiting} == {"unknown", "failed"}, (
        "a portal leaves nothing"
    )
    looks = ledger.claim_stripe_requests(100)
    assert {(row.method, row.path) for row in looks} == {("get", "/v1/refunds")}
    for look in looks:
        assert answer(ledger, look.request_id, made(ledger, done.request_id)) == "done"
    assert (kept(ledger, done.request_id).state, kept(ledger, undone.request_id).error_type) == ("done", "never_done")
    (again,) = ledger.claim_stripe_requests(100)
    assert (again.method, again.params["metadata"]) == ("post", kept(ledger, undone.request_id).params["metadata"])
    assert again.request_id > max(waiting) + 10**9
    assert [row.amount_refunded for row in ledger.list_purchases(account_id="alpha")] == [400]
    assert ledger.resume_after_restore() == 1, "which is not known to be undone"
    assert_sound(ledger)


def test_no_number_that_others_know_is_given_out_again(ledger: Ledger) -> None:
    def newest(table: str, number: str) -> int:
        return max(int(getattr(row, number)) for row in ledger.table(table))

    before = (
        newest("notifications", "notification_id"),
        newest("purchases", "purchase_id"),
        newest("grants", "grant_id"),
    )
    assert ledger.resume_after_restore() == 0
    assert ledger.tell("checkout.session.completed", session("cs_2", payment_intent="pi_2"), "evt_2") == "applied"
    after = newest("notifications", "notification_id"), newest("purchases", "purchase_id"), newest("grants", "grant_id")
    assert all(late > early + 10**9 for early, late in zip(before, after, strict=True)), (before, after)
    assert_sound(ledger)
