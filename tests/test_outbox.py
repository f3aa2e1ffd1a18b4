"""The outbox: who may send a request to Stripe, and what becomes of it by each answer. In SQL alone."""

import json
from collections.abc import Callable
from datetime import datetime, timedelta
from email.utils import format_datetime
from typing import Any

import pytest
from ledger_support import DAY, HOUR, MINUTE, NOON, SECOND, Ledger, assert_sound, refused, together
from psycopg import Connection
from servers import Database

LEASE = 2 * MINUTE
CUSTOMER = {"id": "cus_1", "object": "customer", "metadata": {"account_id": "alpha"}}


@pytest.fixture
def ledger(conn: Connection[Any]) -> Ledger:
    ledger = Ledger(conn)
    ledger.open("alpha")
    ledger.open("beta")
    return ledger


def ask(
    ledger: Ledger, method: str = "post", ref: str = "alpha", purpose: str = "customer", path: str = "/v1/customers"
) -> int:
    """Let SQL ask something of Stripe; the number of the request."""
    with ledger.as_owner():
        (row,) = ledger.query("select credits._request(%s, %s, %s, %s) as request_id", purpose, ref, method, path)
    request_id: int = row.request_id
    return request_id


def retrieve(ledger: Ledger, product: str = "prod_1") -> int:
    return ask(ledger, "get", f"product:{product}", "retrieve", f"/v1/products/{product}")


def kept(ledger: Ledger, request_id: int) -> Any:
    """The request as it stands."""
    (row,) = ledger.table("stripe_requests", "request_id = %s", request_id)
    return row


def claimed(ledger: Ledger, max_rows: int = 10, **more: Any) -> list[int]:
    """The numbers of the requests that a worker gets, in their order."""
    return sorted(row.request_id for row in ledger.claim_stripe_requests(max_rows, **more))


def answer(ledger: Ledger, request_id: int, status: int | None, body: Any = "", **more: Any) -> Any:
    """Answer a request; what became of it."""
    ledger.complete_stripe_request(request_id, status, body if isinstance(body, str) else json.dumps(body), **more)
    return kept(ledger, request_id)


def told(ledger: Ledger) -> list[tuple[str, str | None]]:
    """The notifications, by type and account, in their order."""
    rows = ledger.table("notifications", "true order by notification_id")
    return [(row.type, row.account_id) for row in rows]


def wait(request_id: int, base: timedelta) -> timedelta:
    """How long a request waits, where the table says base."""
    return base * (100 + request_id % 21) / 100


def moment(at: datetime) -> str:
    return format_datetime(at, usegmt=True)


# Claims --------------------------------------------------------------------------------------------------------------


def test_a_worker_gets_all_that_it_needs_once(ledger: Ledger) -> None:
    request = ledger.row("get_or_create_stripe_customer", user_id="alpha", email="alpha@example.com").request_id
    (row,) = ledger.claim_stripe_requests(5, "one", stripe_version="2026-10-28.endive")
    assert row._asdict() == {
        "request_id": request, "attempt": 1, "method": "post", "path": "/v1/customers",
        "params": {"email": "alpha@example.com", "metadata": {"account_id": "alpha"}},
        "idempotency_key": f"pgc-{request}", "stripe_version": "2026-10-28.endive", "stripe_account": None,
        "locked_until": NOON + LEASE,
    }  # fmt: skip
    sent = kept(ledger, request)
    assert (sent.state, sent.attempts, sent.worker) == ("sent", 1, "one")
    assert (sent.first_sent_at, sent.last_sent_at, sent.locked_until) == (NOON, NOON, NOON + LEASE)
    with ledger.unchanged():
        assert ledger.claim_stripe_requests(5, "two") == []


def test_only_a_post_has_an_idempotency_key(ledger: Ledger) -> None:
    numbers = [retrieve(ledger), ask(ledger, "delete", "sub_1", "cancel_plan", "/v1/subscriptions/sub_1"), ask(ledger)]
    keys = {row.request_id: row.idempotency_key for row in ledger.claim_stripe_requests()}
    assert keys == dict(zip(numbers, [None, None, f"pgc-{numbers[2]}"], strict=True))


def test_what_is_due_first_is_claimed_first_and_no_more_than_asked_for(ledger: Ledger) -> None:
    numbers = [retrieve(ledger, f"prod_{n}") for n in range(5)]
    ledger.change("update credits.stripe_requests set run_at = %s where request_id = %s", NOON - SECOND, numbers[4])
    ledger.change("update credits.stripe_requests set run_at = %s where request_id = %s", NOON + SECOND, numbers[0])
    assert claimed(ledger, 2) == [numbers[1], numbers[4]]
    assert claimed(ledger) == numbers[2:4]
    ledger.now += SECOND
    assert claimed(ledger) == numbers[:1]


def test_a_request_whose_worker_did_not_come_back_is_sent_again_as_it_was(ledger: Ledger) -> None:
    ask(ledger)
    (first,) = ledger.claim_stripe_requests(1, "one", stripe_version="2026-10-28.endive")
    ledger.now += LEASE - SECOND
    assert ledger.claim_stripe_requests(1, "two") == []
    ledger.now += SECOND
    (again,) = ledger.claim_stripe_requests(1, "two", stripe_version="2027-04-01.later")
    assert again == first._replace(attempt=2, locked_until=ledger.now + LEASE)
    sent = kept(ledger, first.request_id)
    assert (sent.first_sent_at, sent.last_sent_at, sent.worker) == (NOON, ledger.now, "two")


def test_one_request_is_claimed_by_whoever_waits_for_it(ledger: Ledger) -> None:
    first, second, other = ask(ledger), ask(ledger, "post", "sub_1", "cancel_plan"), retrieve(ledger)
    resume = ask(ledger, "post", "sub_1", "resume_plan")
    (row,) = ledger.claim_stripe_request(second, worker="one", stripe_version="2026-10-28.endive")
    assert (row.request_id, row.attempt, row.locked_until) == (second, 1, NOON + LEASE)
    assert (kept(ledger, second).worker, kept(ledger, second).stripe_version) == ("one", "2026-10-28.endive")
    with ledger.unchanged():
        for nothing in (second, resume, 0, None):  # another has it, it waits for an older one, there is none
            assert ledger.claim_stripe_request(nothing) == []
    ledger.change("update credits.stripe_requests set run_at = %s where request_id = %s", NOON + SECOND, first)
    assert ledger.claim_stripe_request(first) == []
    assert claimed(ledger) == [other]
    ledger.now += LEASE
    assert [row.attempt for row in ledger.claim_stripe_request(second)] == [2]
    answer(ledger, second, 401, {"error": ERROR})
    with ledger.unchanged():
        assert ledger.claim_stripe_request(first) == []
    ledger.change("delete from credits.stripe_queue_stop")
    ledger.now += timedelta(hours=23)
    assert ledger.claim_stripe_request(second) == []
    assert (kept(ledger, second).state, kept(ledger, second).error_type) == ("failed", "outcome_unknown")


def test_the_lease_is_a_setting(ledger: Ledger) -> None:
    ledger.change("update credits.settings set value = '\"30 seconds\"' where name = 'stripe_request_lease'")
    ask(ledger)
    assert ledger.claim_stripe_requests()[0].locked_until == NOON + 30 * SECOND


def test_of_the_writes_about_one_thing_the_oldest_goes_first(ledger: Ledger) -> None:
    cancel = ask(ledger, "post", "sub_1", "cancel_plan", "/v1/subscriptions/sub_1")
    ledger.claim_stripe_requests()
    resume = ask(ledger, "post", "sub_1", "resume_plan", "/v1/subscriptions/sub_1")
    other = ask(ledger, "post", "sub_2", "resume_plan", "/v1/subscriptions/sub_2")
    look = ask(ledger, "get", "sub_1", "retrieve", "/v1/subscriptions/sub_1")
    assert claimed(ledger) == [other, look]
    answer(ledger, cancel, None)
    assert claimed(ledger) == []
    ledger.now += 2 * SECOND
    assert claimed(ledger) == [cancel]
    answer(ledger, cancel, 200, {"id": "sub_1", "object": "unheard.of"})
    assert claimed(ledger) == [resume]


def test_many_workers_share_what_there_is(database: Database) -> None:
    with database.connect(autocommit=True) as conn:
        ledger = Ledger(conn, at=None)
        numbers = [retrieve(ledger, f"prod_{n}") for n in range(60)]
        jobs: list[Callable[[Ledger], Any]] = [lambda ledger: [claimed(ledger, 5) for _ in range(3)]] * 8
        got = [number for batches in together(database, jobs) for batch in batches for number in batch]
        got += claimed(ledger, 100)
        assert sorted(got) == numbers


# Answers -------------------------------------------------------------------------------------------------------------

ERROR = {"type": "invalid_request_error", "code": "parameter_unknown"}
DECLINED = {
    "type": "card_error", "code": "card_declined", "decline_code": "insufficient_funds",
    "advice_code": "try_again_later",
    "payment_intent": {"id": "pi_1", "object": "payment_intent", "status": "requires_payment_method",
                       "client_secret": "pi_1_secret"},
}  # fmt: skip
POST, GET, DELETE = "post", "get", "delete"
# What came back from what; state, notification, wait. Each was claimed twice before.
OUTCOMES: list[tuple[str, int | None, Any, str, str | None, timedelta | None]] = [
    (POST, 200, CUSTOMER, "done", None, None),
    (GET, 200, {"id": "prod_1", "object": "product"}, "done", None, None),
    (DELETE, 200, {"id": "sub_1", "object": "unheard.of"}, "done", None, None),
    (POST, 402, {"error": DECLINED}, "declined", None, None),
    (POST, 400, {"error": ERROR}, "failed", "stripe_request_failed", None),
    (GET, 403, {"error": ERROR}, "failed", "stripe_request_failed", None),
    (POST, 404, {"error": ERROR}, "failed", "stripe_request_failed", None),
    (GET, 404, {"error": ERROR}, "done", None, None),
    (DELETE, 404, {"error": ERROR}, "done", None, None),
    (DELETE, 400, {"error": ERROR}, "failed", "stripe_request_failed", None),
    (POST, 401, {"error": ERROR}, "queued", "stripe_key_refused", SECOND),
    (POST, 409, {"error": {"type": "idempotency_error"}}, "queued", None, 4 * SECOND),
    (POST, 429, {"error": {"type": "rate_limit_error"}}, "queued", None, MINUTE),
    (POST, 500, {"error": {"type": "api_error"}}, "queued", None, 4 * SECOND),
    (POST, 502, "<html>", "queued", None, 4 * SECOND),
    (POST, 200, "<html>", "queued", None, 4 * SECOND),
    (POST, 200, "{}", "queued", None, 4 * SECOND),
    (POST, 200, {"status": "ok"}, "queued", None, 4 * SECOND),
    (POST, 200, {"object": {}}, "queued", None, 4 * SECOND),
    (POST, 400, {"error": "Bad Request"}, "queued", None, 4 * SECOND),
    (POST, 402, {"message": "Your proxy has expired"}, "queued", None, 4 * SECOND),
    (POST, 403, {"message": "Forbidden"}, "queued", None, 4 * SECOND),
    (GET, 404, {"message": "no Route matched with those values"}, "queued", None, 4 * SECOND),
    (DELETE, 404, {"error": None}, "queued", None, 4 * SECOND),
    (POST, 400, "<html>", "queued", None, 4 * SECOND),
    (POST, 302, "", "queued", None, 4 * SECOND),
    (POST, None, None, "queued", None, 4 * SECOND),
]
ASKED = {
    POST: ("post", "alpha", "customer", "/v1/customers"),
    GET: ("get", "product:prod_1", "retrieve", "/v1/products/prod_1"),
    DELETE: ("delete", "sub_1", "cancel_plan", "/v1/subscriptions/sub_1"),
}


def test_each_answer_has_its_state(ledger: Ledger) -> None:
    for method, status, body, state, notification, base in OUTCOMES:
        with ledger.conn.transaction(force_rollback=True):
            number = ask(ledger, *ASKED[method])
            ledger.claim_stripe_requests()
            ledger.now += LEASE
            ledger.claim_stripe_requests()
            text = body if isinstance(body, str | None) else json.dumps(body)
            ledger.complete_stripe_request(number, status, text, headers={"Request-Id": "req_1"}, attempt=2)
            row = kept(ledger, number)
            what = (method, status, body)
            assert (row.state, row.http_status, row.stripe_request) == (state, status, "req_1"), what
            assert row.attempts == (1 if status == 401 else 2), what
            assert (row.locked_until, row.finished_at) == (None, ledger.now if base is None else None), what
            assert row.run_at == (NOON if base is None else ledger.now + wait(number, base)), what
            assert [kind for kind, _ in told(ledger)] == [notification] * bool(notification), what
            error = body.get("error") if isinstance(body, dict) else None
            error = error if isinstance(error, dict) else {}
            fields = ("type", "code", "decline_code", "advice_code")
            assert (row.error_type, row.error_code, row.decline_code, row.advice_code) == tuple(
                error.get(field) for field in fields
            ), what
            if base is None:
                with ledger.unchanged():
                    assert ledger.complete_stripe_request(number, 200, json.dumps(CUSTOMER)).state == state
        ledger.now = NOON


def test_an_answer_of_a_decline_hands_over_the_payment(ledger: Ledger) -> None:
    row = answer(ledger, ask(ledger), 402, {"error": DECLINED})
    assert row.response["error"]["payment_intent"] == {
        "id": "pi_1", "object": "payment_intent", "status": "requires_payment_method",
    }  # fmt: skip
    (known,) = ledger.table("stripe_objects")
    assert (known.kind, known.object_id) == ("payment_intent", "pi_1")


def test_a_delete_that_was_sent_once_and_finds_nothing_failed(ledger: Ledger) -> None:
    number = ask(ledger, *ASKED[DELETE])
    ledger.claim_stripe_requests()
    assert answer(ledger, number, 404, {"error": ERROR}).state == "failed"


REFUSED = {403: ERROR, 400: {"type": "idempotency_error"}}  # without a look at what the key has done


@pytest.mark.parametrize("status", REFUSED)
def test_a_post_that_was_sent_before_and_is_refused_is_looked_for(ledger: Ledger, status: int) -> None:
    number = ledger.get_or_create_stripe_customer("alpha").request_id
    ledger.claim_stripe_requests()
    with ledger.conn.transaction(force_rollback=True):
        assert answer(ledger, number, status, {"error": REFUSED[status]}).state == "failed"
        assert [kind for kind, _ in told(ledger)] == ["stripe_request_failed"]
    answer(ledger, number, None)
    ledger.now += MINUTE
    ledger.claim_stripe_requests()
    row = answer(ledger, number, status, {"error": REFUSED[status]})
    assert (row.state, row.finished_at, told(ledger)) == ("unknown", None, [])
    (look,) = ledger.table("stripe_requests", "purpose = 'lookup'")
    made = {**CUSTOMER, "metadata": {"account_id": "alpha"}}
    answer(ledger, look.request_id, 200, {"object": "list", "data": [made], "has_more": False})
    assert kept(ledger, number).state == "done"
    assert ledger.get_or_create_stripe_customer("alpha").customer_id == made["id"]


def test_a_post_that_nothing_can_find_and_that_is_refused_is_told(ledger: Ledger) -> None:
    number = ask(ledger, "post", "top_up_1", "cancel_top_up", "/v1/payment_intents/pi_1/cancel")
    for status in (500, 403):
        ledger.claim_stripe_requests()
        row = answer(ledger, number, status, {"error": ERROR})
        ledger.now += MINUTE
    assert row.state == "unknown"
    assert [kind for kind, _ in told(ledger)] == ["stripe_request_unknown"]


def test_what_could_not_be_sent_failed(ledger: Ledger) -> None:
    number = ask(ledger)
    ledger.claim_stripe_requests()
    row = answer(ledger, number, None, None, attempt=1, not_sent="ValueError: api_key is no parameter")
    assert (row.state, row.http_status, row.error_type) == ("failed", None, "ValueError: api_key is no parameter")
    assert told(ledger) == [("stripe_request_failed", None)]


def test_requests_that_failed_together_do_not_come_back_together(ledger: Ledger) -> None:
    numbers = [retrieve(ledger, f"prod_{n}") for n in range(21)]
    ledger.claim_stripe_requests(100)
    assert len({answer(ledger, number, None).run_at for number in numbers}) == 21


def test_a_request_waits_longer_each_time(ledger: Ledger) -> None:
    number = ask(ledger)
    for status, bases in ((500, [1, 4, 15, 60, 300, 900, 900]), (429, [15, 60, 300, 900, 900, 900])):
        with ledger.conn.transaction(force_rollback=True):
            for base in bases:
                assert claimed(ledger) == [number]
                row = answer(ledger, number, status, {"error": {}})
                assert row.run_at - ledger.now == wait(number, base * SECOND)
                ledger.now = row.run_at
        ledger.now = NOON


@pytest.mark.parametrize(
    ("asked", "waited"),
    [("30", 30), ("2", 15), ("99999", 900), ("-5", 15), ("Wed, 21 Oct 2026 07:28:00 GMT", 15), ("1e3", 15), ("", 15)],
)
def test_stripe_may_ask_for_more_patience(ledger: Ledger, asked: str, waited: int) -> None:
    number = ask(ledger)
    ledger.claim_stripe_requests()
    row = answer(ledger, number, 429, {"error": {}}, headers={"Retry-After": asked})
    assert row.run_at - ledger.now == wait(number, waited * SECOND)


def test_an_answer_of_an_earlier_attempt_counts(ledger: Ledger) -> None:
    number = ask(ledger)
    ledger.claim_stripe_requests()
    ledger.now += LEASE
    ledger.claim_stripe_requests()
    row = answer(ledger, number, 200, CUSTOMER, attempt=1, headers={"Date": moment(ledger.now)})
    assert (row.state, row.as_of) == ("done", int(NOON.timestamp()))
    with ledger.unchanged():
        answer(ledger, number, 200, CUSTOMER, attempt=2)


@pytest.mark.parametrize("status", [None, 401, 403, 409, 429, 500])
def test_that_an_earlier_attempt_failed_says_nothing_of_the_one_in_flight(ledger: Ledger, status: int | None) -> None:
    number = ask(ledger)
    ledger.claim_stripe_requests()
    ledger.now += LEASE
    ledger.claim_stripe_requests()
    with ledger.unchanged():
        assert answer(ledger, number, status, {"error": {}}, attempt=1).state == "sent"


def test_an_answer_that_stripe_repeats_is_as_old_as_the_first(ledger: Ledger) -> None:
    number = ask(ledger)
    ledger.claim_stripe_requests()
    ledger.now += HOUR
    ledger.claim_stripe_requests()
    ledger.now += SECOND
    for replayed, as_of in (("true", NOON), ("false", NOON + HOUR)):
        with ledger.conn.transaction(force_rollback=True):
            headers = {"date": moment(ledger.now), "idempotent-replayed": replayed}
            assert answer(ledger, number, 200, CUSTOMER, headers=headers).as_of == int(as_of.timestamp())


# Giving up -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lost", [True, False])
def test_a_post_is_not_sent_again_once_stripe_may_have_forgotten_its_key(ledger: Ledger, lost: bool) -> None:
    ledger.change("delete from credits.stripe_lookups")  # what can be looked for: test_lookups
    number = ledger.row("get_or_create_stripe_customer", user_id="alpha").request_id
    ledger.claim_stripe_requests()
    if not lost:
        answer(ledger, number, None)
    ledger.now = NOON + 23 * HOUR
    with ledger.conn.transaction(force_rollback=True):
        assert claimed(ledger) == [number]
    ledger.now += SECOND
    assert claimed(ledger) == []
    row = kept(ledger, number)
    assert (row.state, row.locked_until, row.finished_at) == ("unknown", None, None)
    assert told(ledger) == [("stripe_request_unknown", "alpha")]
    with ledger.unchanged():
        ledger.now += DAY
        assert claimed(ledger) == []
        assert answer(ledger, number, 500, {"error": {}}).state == "unknown"
        assert ledger.row("get_or_create_stripe_customer", user_id="alpha").request_id == number
    assert answer(ledger, number, 200, CUSTOMER).state == "done"
    assert ledger.row("get_or_create_stripe_customer", user_id="alpha").customer_id == "cus_1"


@pytest.mark.parametrize("method", [GET, DELETE])
def test_what_can_be_sent_twice_is_sent_after_any_time(ledger: Ledger, method: str) -> None:
    number = ask(ledger, *ASKED[method])
    ledger.claim_stripe_requests()
    ledger.now += 3 * DAY
    assert claimed(ledger) == [number]


@pytest.mark.parametrize(("method", "end"), [(GET, "failed"), (DELETE, "failed"), (POST, "queued")])
def test_no_answer_ends_a_request_after_enough_attempts_unless_it_is_a_post(
    ledger: Ledger, method: str, end: str
) -> None:
    number = ask(ledger, *ASKED[method])
    for attempt in range(1, 21):
        assert claimed(ledger) == [number]
        row = answer(ledger, number, None, attempt=attempt)
        assert row.state == ("queued" if attempt < 20 else end)
        ledger.now = row.run_at
    assert told(ledger) == [("stripe_request_given_up", None)] * (end == "failed")


def test_what_a_post_did_and_cannot_be_applied_stays_in_the_way(ledger: Ledger) -> None:
    ledger.tell("customer.updated", {**CUSTOMER, "metadata": {"account_id": "beta"}})
    number = ask(ledger)
    for _ in range(20):
        assert claimed(ledger) == [number]
        row = answer(ledger, number, 200, "<html>")
        ledger.now = row.run_at
    assert row.state == "unknown"
    assert told(ledger) == [("stripe_request_unknown", None)]


def test_an_operator_makes_a_request_again(ledger: Ledger) -> None:
    number = ledger.row("get_or_create_stripe_customer", user_id="alpha").request_id
    for state, ending in (("queued", None), ("sent", None), ("failed", 400), ("declined", 402)):
        with ledger.conn.transaction(force_rollback=True):
            if state != "queued":
                ledger.claim_stripe_requests()
            if not ending:
                with refused(409, "request_not_failed", state=state):
                    ledger.retry_stripe_request(number)
                continue
            answer(ledger, number, ending, {"error": ERROR})
            again = ledger.retry_stripe_request(number)
            assert again.request_id > number
            assert (again.purpose, again.ref, again.state) == ("customer", "alpha", "queued")
            before, after = kept(ledger, number), kept(ledger, again.request_id)
            assert (before.method, before.path, before.params) == (after.method, after.path, after.params)
            assert (after.account_id, after.attempts, after.first_sent_at) == ("alpha", 0, None)
            with refused(409, "request_not_failed"):
                ledger.retry_stripe_request(number)


def test_an_operator_who_has_looked_makes_an_unknown_request_again(ledger: Ledger) -> None:
    number = ask(ledger)
    ledger.claim_stripe_requests()
    ledger.now += DAY
    ledger.claim_stripe_requests()
    again = ledger.retry_stripe_request(number)
    assert (kept(ledger, number).state, again.state) == ("failed", "queued")
    assert claimed(ledger) == [again.request_id]


# A wrong key ---------------------------------------------------------------------------------------------------------


def test_a_wrong_key_stops_the_queue_and_is_tried_by_one_request(ledger: Ledger) -> None:
    numbers = [retrieve(ledger, f"prod_{n}") for n in range(6)]
    assert claimed(ledger, 3) == numbers[:3]
    for number in numbers[:3]:
        row = answer(ledger, number, 401, {"error": ERROR})
        assert (row.state, row.attempts, row.first_sent_at) == ("queued", 0, None)
    assert told(ledger) == [("stripe_key_refused", None)]
    ledger.now = NOON + 5 * MINUTE - SECOND
    assert claimed(ledger) == []
    for _ in range(3):  # the key stays wrong
        ledger.now += SECOND
        (tried,) = claimed(ledger)
        with ledger.unchanged():
            assert claimed(ledger) == []
        answer(ledger, tried, 401, {"error": ERROR})
        ledger.now += 5 * MINUTE - SECOND
        assert claimed(ledger) == []
    assert told(ledger) == [("stripe_key_refused", None)]
    ledger.now += SECOND
    (tried,) = claimed(ledger)
    answer(ledger, tried, 500, {"error": {}})
    assert ledger.table("stripe_queue_stop") == []
    assert len(claimed(ledger)) == 5
    answer(ledger, numbers[-1], 401, {"error": ERROR})
    assert len(told(ledger)) == 2


def test_no_answer_leaves_the_queue_stopped(ledger: Ledger) -> None:
    numbers = [retrieve(ledger, f"prod_{n}") for n in range(3)]
    claimed(ledger, 1)
    answer(ledger, numbers[0], 401, {"error": ERROR})
    ledger.now += 5 * MINUTE
    (tried,) = claimed(ledger)
    answer(ledger, tried, None)
    assert claimed(ledger) == []
    ledger.now += LEASE
    assert len(claimed(ledger)) == 1


def test_an_answer_from_before_the_stop_does_not_end_it(ledger: Ledger) -> None:
    first, second = (retrieve(ledger, f"prod_{n}") for n in range(2))
    ledger.claim_stripe_requests()
    ledger.now += SECOND
    answer(ledger, first, 401, {"error": ERROR})
    answer(ledger, second, 404, {"error": ERROR})
    ledger.now += MINUTE
    assert claimed(ledger) == []


def test_a_stop_waits_for_something_to_try(ledger: Ledger) -> None:
    number = retrieve(ledger)
    ledger.claim_stripe_requests()
    answer(ledger, number, 401, {"error": ERROR})
    ledger.change("update credits.stripe_requests set run_at = %s", NOON + HOUR)
    ledger.now += 5 * MINUTE
    assert claimed(ledger) == []
    ledger.now = NOON + HOUR
    assert claimed(ledger) == [number]


# What is kept --------------------------------------------------------------------------------------------------------


def test_an_answer_is_kept_without_secrets(ledger: Ledger) -> None:
    card = {"brand": "visa", "last4": "4242", "exp_month": 8, "exp_year": 2031, "fingerprint": "f", "iin": "424242"}
    said = {
        "id": "x_1", "object": "unheard.of", "client_secret": "x_1_secret", "number": "INV-0001",
        "list": [], "none": None, "payment_method_details": {"card": card},
        "data": [{"id": "x_2", "number": "4242 4242 4242 4242"}, 5, {"us_bank_account": {"routing_number": "1"}}],
        "metadata": {"note": "the client_secret is elsewhere"},
    }  # fmt: skip
    row = answer(ledger, ask(ledger), 200, said)
    assert row.response == {
        "id": "x_1", "object": "unheard.of", "number": "INV-0001", "list": [], "none": None,
        "payment_method_details": {"card": {"brand": "visa"}},
        "data": [{"id": "x_2"}, 5, {"us_bank_account": {}}],
        "metadata": {"note": "the client_secret is elsewhere"},
    }  # fmt: skip
    assert_sound(ledger)
