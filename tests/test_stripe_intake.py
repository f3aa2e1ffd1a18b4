"""What Stripe delivers is kept once, tried until it succeeds or is given up, and never lost on the way."""

import json
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime, timedelta
from email.utils import format_datetime
from functools import partial
from typing import Any

import pytest
from ledger_support import (
    DAY,
    HOUR,
    MINUTE,
    NOON,
    SECOND,
    Ledger,
    assert_sound,
    committed,
    refused,
    session,
    together,
    told,
)
from psycopg import Connection
from psycopg.types.json import Jsonb
from servers import Database

COMPLETED = "checkout.session.completed"
PRODUCT = {"id": "prod_1", "object": "product", "name": "Pack"}


@pytest.fixture
def ledger(conn: Connection[Any]) -> Ledger:
    """A shop that alpha may buy from."""
    ledger = Ledger(conn)
    prepare(ledger)
    return ledger


def prepare(ledger: Ledger) -> None:
    """The demo catalogue with a price, and an account without credits."""
    ledger.load_demo_catalog()
    ledger.change("update credits.packages set stripe_price_id = 'price_starter' where code = 'starter'")
    ledger.open("alpha")


@contextmanager
def failing(ledger: Ledger, how: str = "perform 1 / 0", handler: str = "_on_product") -> Iterator[None]:
    """Within, a handler fails after it has written something."""
    function = f"credits.{handler}(notice credits.stripe_notice)"
    with ledger.as_owner():
        (working,) = ledger.query(
            f"select pg_get_functiondef('credits.{handler}(credits.stripe_notice)'::regprocedure) as text"
        )
        ledger.conn.execute(
            f"create or replace function {function} returns credits.handler_result language plpgsql as $$ begin "
            f"perform credits._notify('alpha', 'half', '1'); {how}; return null; end $$".encode()
        )
    yield
    with ledger.as_owner():
        ledger.conn.execute(working.text.encode())


def set_value(ledger: Ledger, name: str, value: Any) -> None:
    """Change a setting."""
    ledger.change("update credits.settings set value = %s where name = %s", Jsonb(value), name)


def process(ledger: Ledger, max_events: int = 100) -> list[tuple[str, str]]:
    """Try what is due; which events those were, and their outcomes."""
    return [tuple(row) for row in ledger.process_stripe_events(max_events=max_events)]


def asked(ledger: Ledger) -> Any:
    """The one request to Stripe that waits."""
    (request,) = ledger.table("stripe_requests", "state = 'queued'")
    return request


def answer(ledger: Ledger, body: Any, status: int | None = 200, headers: dict[str, str] | None = None) -> Any:
    """Answer the request that waits; what became of it."""
    request = asked(ledger)
    text = body if isinstance(body, str) else json.dumps(body)
    ledger.complete_stripe_request(request.request_id, status, text, headers=headers)
    (request,) = ledger.table("stripe_requests", "request_id = %s", request.request_id)
    return request


# Failures ------------------------------------------------------------------------------------------------------------


def test_a_failed_event_is_kept_and_tried_again_when_its_time_has_come(ledger: Ledger) -> None:
    with failing(ledger):
        with ledger.unchanged("stripe_events"):
            assert ledger.tell("product.created", PRODUCT, "evt_1") == "failed"
        kept = ledger.event("evt_1")
        assert (kept.attempts, kept.next_attempt_at, kept.applied_at) == (1, NOON + MINUTE, None)
        assert kept.error == "22012 division by zero"
        ledger.now = NOON + MINUTE - SECOND
        assert process(ledger) == []
        ledger.now = NOON + MINUTE
        assert process(ledger) == [("evt_1", "failed")]
        assert ledger.event("evt_1").next_attempt_at == ledger.now + 2 * MINUTE
    ledger.now += 2 * MINUTE
    assert process(ledger) == [("evt_1", "applied")]
    kept = ledger.event("evt_1")
    assert (kept.error, kept.attempts, kept.next_attempt_at, kept.applied_at) == (None, 3, None, ledger.now)
    assert process(ledger) == []
    assert ledger.table("notifications") == []


def test_the_longest_wait_is_a_setting(ledger: Ledger) -> None:
    set_value(ledger, "stripe_event_max_wait", "3 minutes")
    with failing(ledger):
        ledger.tell("product.created", PRODUCT, "evt_1")
        waits = []
        for _ in range(4):
            waits.append(ledger.event("evt_1").next_attempt_at - ledger.now)
            ledger.now += waits[-1]
            process(ledger)
    assert waits == [MINUTE, 2 * MINUTE, 3 * MINUTE, 3 * MINUTE]


def test_the_longest_due_come_first_and_at_most_as_many_as_are_asked_for(ledger: Ledger) -> None:
    names = ["evt_c", "evt_a", "evt_d", "evt_b"]
    with failing(ledger):
        for name in names:
            ledger.tell("product.created", PRODUCT, name)
            ledger.now += SECOND
    ledger.now += HOUR
    assert [name for name, _ in process(ledger, 3)] == names[:3]
    assert [name for name, _ in process(ledger, 3)] == names[3:]
    assert process(ledger, 3) == []


def test_one_that_fails_again_does_not_stop_the_others(ledger: Ledger) -> None:
    with failing(ledger), failing(ledger, handler="_on_price"):
        ledger.tell("price.created", {"id": "price_1", "object": "price"}, "evt_1")
        ledger.tell("product.created", PRODUCT, "evt_2")
        ledger.tell("price.updated", {"id": "price_2", "object": "price"}, "evt_3")
    ledger.now += HOUR
    with failing(ledger):
        assert process(ledger) == [("evt_1", "applied"), ("evt_2", "failed"), ("evt_3", "applied")]


@pytest.mark.parametrize("what", ["failed", "parked"])
def test_an_event_is_given_up_after_enough_attempts_and_somebody_hears_of_it(ledger: Ledger, what: str) -> None:
    set_value(ledger, "stripe_event_max_attempts", 3)
    about = session(metadata={"account_id": "beta" if what == "parked" else "alpha", "package": "starter"})
    with failing(ledger, handler="_on_checkout_session" if what == "failed" else "_on_product"):
        ledger.tell(COMPLETED, about, "evt_1")
        for _ in range(2):
            assert (ledger.table("notifications"), ledger.event("evt_1").status) == ([], what)
            ledger.now += DAY
            process(ledger)
        given_up = ledger.event("evt_1")
        assert (given_up.status, given_up.attempts, given_up.next_attempt_at) == (what, 3, None)
        (told_of,) = ledger.table("notifications")
        assert (told_of.type, told_of.key, told_of.account_id) == ("stripe_event_given_up", "evt_1", None)
        assert {"event_id": "evt_1", "type": COMPLETED, "status": what, "attempts": 3}.items() <= told_of.data.items()
        ledger.now += DAY
        assert process(ledger) == []
        assert ledger.replay_stripe_event("evt_1").outcome == what
        assert (ledger.event("evt_1").attempts, len(ledger.table("notifications"))) == (4, 1)
    ledger.open("beta")
    if what == "parked":  # what it waited for has come
        assert process(ledger) == [("evt_1", "applied")]
    else:
        assert ledger.replay_stripe_event("evt_1").outcome == "applied"
    kept = ledger.event("evt_1")
    assert (kept.status, kept.error, kept.reason, kept.waits_for) == ("applied", None, None, None)
    assert_sound(ledger)


@pytest.mark.parametrize("sqlstate", ["40P01", "40001", "55P03"])
def test_an_event_that_met_others_at_work_is_tried_again_at_once_and_that_is_no_attempt(
    ledger: Ledger, sqlstate: str
) -> None:
    set_value(ledger, "stripe_event_max_attempts", 1)
    with failing(ledger, f"raise exception using errcode = '{sqlstate}', message = 'busy'"):
        for _ in range(3):
            assert ledger.tell("product.created", PRODUCT, "evt_1") == "failed"
            kept = ledger.event("evt_1")
            assert (kept.attempts, kept.error, kept.next_attempt_at) == (0, f"{sqlstate} busy", ledger.now + SECOND)
            ledger.now += SECOND
    assert process(ledger) == [("evt_1", "applied")]
    assert ledger.event("evt_1").attempts == 1
    assert ledger.table("notifications") == []


def test_two_workers_at_once_take_different_events(database: Database) -> None:
    with committed(database) as ledger:
        prepare(ledger)
        with failing(ledger):
            for n in range(6):
                ledger.tell("product.created", {**PRODUCT, "id": f"prod_{n}"}, f"evt_{n}")
        ledger.change("update credits.stripe_events set next_attempt_at = received_at")
        with database.connect() as conn:  # this one is not done yet
            first = process(Ledger(conn, at=None), 3)
            second = process(ledger, 100)
            conn.commit()
        assert first == [(f"evt_{n}", "applied") for n in range(3)]
        assert second == [(f"evt_{n}", "applied") for n in range(3, 6)]
        assert {row.attempts for row in ledger.table("stripe_events")} == {2}


def test_many_workers_take_each_event_once(database: Database) -> None:
    with committed(database) as ledger:
        prepare(ledger)
        with failing(ledger, handler="_on_checkout_session"):
            for n in range(24):
                ledger.tell(COMPLETED, session(f"cs_{n}", payment_intent=f"pi_{n}"), f"evt_{n}")
        ledger.change("update credits.stripe_events set next_attempt_at = received_at")
        taken = together(database, [partial(process, max_events=24)] * 4)
        assert Counter(one for batch in taken for one in batch) == {(f"evt_{n}", "applied"): 1 for n in range(24)}
        assert ledger.available() == 24_000
        assert_sound(ledger)


# Waiting -------------------------------------------------------------------------------------------------------------

CUSTOMER = {"id": "cus_1", "object": "customer", "metadata": {"account_id": "alpha"}}
PRICE = {
    "id": "price_1",
    "object": "price",
    "product": "prod_1",
    "unit_amount": 500,
    "recurring": {"interval": "month"},
}
CREDITS = {"metadata": {"credits": "500"}}


def line(number: int = 1) -> dict[str, Any]:
    """A line of an invoice for a month of price_1."""
    period = {"start": int(NOON.timestamp()), "end": int((NOON + 28 * DAY).timestamp())}
    parent = {"type": "subscription_item_details", "subscription_item_details": {"subscription": "sub_1"}}
    pricing = {"price_details": {"price": "price_1", "product": "prod_1"}}
    return {
        "id": f"il_{number}",
        "amount": 500,
        "quantity": 1,
        "period": period,
        "parent": parent,
        "pricing": pricing,
    }


def invoice(*lines: dict[str, Any], more: bool = False) -> dict[str, Any]:
    """An invoice of sub_1 that is paid."""
    details = {"subscription": "sub_1", "metadata": {"account_id": "alpha"}}
    return {
        "id": "in_1", "object": "invoice", "status": "paid", "customer": "cus_1", "total": 500, "currency": "usd",
        "parent": {"type": "subscription_details", "subscription_details": details},
        "lines": {"object": "list", "data": list(lines), "has_more": more},
    }  # fmt: skip


def test_a_session_waits_for_its_customer_and_goes_on_with_its_event(ledger: Ledger) -> None:
    assert ledger.tell(COMPLETED, session(metadata={"package": "starter"}), "evt_1") == "parked"
    assert (ledger.event("evt_1").reason, ledger.event("evt_1").waits_for) == ("account_unknown", "customer:cus_1")
    assert (asked(ledger).purpose, asked(ledger).method, asked(ledger).path) == (
        "retrieve", "get", "/v1/customers/cus_1",
    )  # fmt: skip
    assert ledger.tell("customer.updated", CUSTOMER, "evt_2") == "applied"
    kept = ledger.event("evt_1")
    assert (kept.status, kept.waits_for, kept.attempts, kept.next_attempt_at) == ("applied", None, 1, None)
    assert ledger.available() == 1000


def test_a_session_waits_for_its_customer_and_goes_on_with_the_answer(ledger: Ledger) -> None:
    ledger.tell(COMPLETED, session(metadata={"package": "starter"}), "evt_1")
    assert answer(ledger, CUSTOMER).state == "done"
    assert ledger.event("evt_1").status == "applied"
    assert ledger.available() == 1000


def test_a_shop_s_own_number_of_a_session_does_not_hide_whose_customer_it_is(ledger: Ledger) -> None:
    ledger.tell(COMPLETED, session(client_reference_id="order-9", metadata={"package": "starter"}), "evt_1")
    assert ledger.event("evt_1").waits_for == "account:order-9"
    assert asked(ledger).path == "/v1/customers/cus_1"
    answer(ledger, CUSTOMER)
    ledger.now += MINUTE
    assert process(ledger) == [("evt_1", "applied")]
    assert ledger.available() == 1000


def test_a_session_waits_for_its_customer_to_be_bound_by_another_object(ledger: Ledger) -> None:
    ledger.tell(COMPLETED, session(metadata={"package": "starter"}), "evt_1")
    metadata = {"account_id": "alpha"}
    subscription = {
        "id": "sub_1", "object": "subscription", "customer": "cus_1", "status": "active", "metadata": metadata,
    }  # fmt: skip
    assert ledger.tell("customer.subscription.created", subscription) == "applied"
    assert ledger.event("evt_1").status == "applied"
    assert ledger.available() == 1000


def test_what_waits_is_woken_also_when_it_was_given_up(ledger: Ledger) -> None:
    set_value(ledger, "stripe_event_max_attempts", 1)
    ledger.tell(COMPLETED, session(metadata={"package": "starter"}), "evt_1")
    assert ledger.event("evt_1").next_attempt_at is None
    ledger.tell("customer.updated", CUSTOMER)
    assert ledger.available() == 1000


def test_a_session_without_our_metadata_waits_for_its_line_items(ledger: Ledger) -> None:
    ledger.tell(COMPLETED, session(metadata={"account_id": "alpha"}), "evt_1")
    assert (asked(ledger).path, asked(ledger).params) == ("/v1/checkout/sessions/cs_1/line_items", {"limit": 100})
    item = {"id": "li_1", "object": "item", "price": {"id": "price_starter"}, "quantity": 1}
    assert answer(ledger, {"object": "list", "data": [item], "has_more": False}).state == "done"
    assert ledger.event("evt_1").status == "applied"
    assert ledger.available() == 1000


def test_an_invoice_waits_for_its_price_then_for_the_product(ledger: Ledger) -> None:
    assert ledger.tell("invoice.paid", invoice(line()), "evt_1") == "parked"
    assert (ledger.event("evt_1").reason, ledger.event("evt_1").waits_for) == ("price_unknown", "price:price_1")
    assert asked(ledger).path == "/v1/prices/price_1"
    answer(ledger, PRICE)
    assert (ledger.event("evt_1").reason, ledger.event("evt_1").waits_for) == ("product_unknown", "product:prod_1")
    answer(ledger, {**PRODUCT, **CREDITS})
    assert ledger.event("evt_1").status == "applied"
    assert ledger.available() == 500
    assert_sound(ledger)


@pytest.mark.parametrize("first", ["price", "product"])
def test_an_invoice_goes_on_with_the_events_of_its_price_and_product(ledger: Ledger, first: str) -> None:
    ledger.tell("invoice.paid", invoice(line()), "evt_1")
    events = {"price": PRICE, "product": {**PRODUCT, **CREDITS}}
    for kind in sorted(events, key=lambda kind: kind != first):
        assert ledger.tell(f"{kind}.created", events[kind]) == "applied"
    assert ledger.event("evt_1").status == "applied"
    assert ledger.available() == 500


def test_an_invoice_waits_until_credits_that_are_no_number_are_put_right(ledger: Ledger) -> None:
    ledger.tell("price.created", {**PRICE, "metadata": {"credits": "1,000"}})
    assert ledger.tell("invoice.paid", invoice(line()), "evt_1") == "parked"
    assert ledger.event("evt_1").reason == "credits_malformed"
    ledger.now += SECOND
    ledger.tell("price.updated", {**PRICE, "metadata": {"credits": "1000"}})
    assert ledger.available() == 1000


def test_a_long_invoice_waits_for_all_pages_of_its_lines(ledger: Ledger) -> None:
    ledger.tell("price.created", {**PRICE, **CREDITS})
    lines = [{**line(n), "subscription_item": f"si_{n}"} for n in range(3)]
    assert ledger.tell("invoice.paid", invoice(lines[0], more=True), "evt_1") == "parked"
    for known in (0, 1):
        assert asked(ledger).path == "/v1/invoices/in_1/lines"
        assert asked(ledger).params == {"limit": 100, **({"starting_after": f"il_{known - 1}"} if known else {})}
        answer(ledger, {"object": "list", "data": lines[known : known + 1], "has_more": True})
        assert (ledger.available(), ledger.event("evt_1").status) == (0, "parked")
    answer(ledger, {"object": "list", "data": lines[2:], "has_more": False})
    assert ledger.event("evt_1").status == "applied"
    assert ledger.available() == 1500


@pytest.mark.parametrize("item", [{}, {"subscription_item": "si_1"}])
def test_each_tier_of_a_price_is_a_line_of_its_own(ledger: Ledger, item: dict[str, str]) -> None:
    ledger.tell("price.created", {**PRICE, **CREDITS, "unit_amount": None, "tiers_mode": "graduated"})
    tiers = [{**line(1), **item, "quantity": 5}, {**line(2), **item, "quantity": 3, "amount": 240}]
    assert ledger.tell("invoice.paid", invoice(*tiers)) == "applied"
    assert ledger.available() == 4000
    assert_sound(ledger)


def multiply(ledger: Ledger, event_id: str, count: int) -> None:
    """As many parked events as that, with ids of their own, that were tried long ago and will be tried late."""
    ledger.change(
        "insert into credits.stripe_events (event_id, endpoint, type, status, reason, waits_for, created_at, "
        "  received_at, object_id, attempts, next_attempt_at, payload) "
        "select e.event_id || '_' || n, endpoint, type, status, reason, waits_for, created_at, received_at, "
        "  e.object_id || '_' || n, 9, received_at + interval '4 hours', "
        "  replace(replace(payload, '\"' || e.object_id || '\"', '\"' || e.object_id || '_' || n || '\"'), "
        "          '\"' || e.event_id || '\"', '\"' || e.event_id || '_' || n || '\"') "
        "  from credits.stripe_events e, generate_series(1, %s) n where e.event_id = %s",
        count,
        event_id,
    )


def test_many_that_wait_for_one_thing_are_applied_or_due_at_once(ledger: Ledger) -> None:
    ledger.tell("invoice.paid", invoice(line()), "evt_1")
    multiply(ledger, "evt_1", 150)
    ledger.tell("price.created", {**PRICE, **CREDITS})
    while process(ledger):
        pass
    assert Counter(row.status for row in ledger.table("stripe_events")) == {"applied": 152}
    assert_sound(ledger)


def test_a_thousand_that_wait_for_one_thing_do_not_fail(ledger: Ledger) -> None:
    ledger.tell(COMPLETED, session(metadata={"package": "starter"}), "evt_1")
    multiply(ledger, "evt_1", 1000)
    ledger.change(
        "create or replace function credits._on_checkout_session(notice credits.stripe_notice) "
        "returns credits.handler_result language sql as $$ select credits._applied() $$"
    )
    ledger.tell("customer.updated", CUSTOMER)
    assert ledger.table("stripe_events", "status = 'failed'") == []
    while process(ledger):
        pass
    assert Counter(row.status for row in ledger.table("stripe_events")) == {"applied": 1002}


def test_opening_the_account_makes_what_waits_for_it_due(ledger: Ledger) -> None:
    ledger.tell(COMPLETED, session(customer="cus_2", metadata={"account_id": "beta", "package": "starter"}), "evt_1")
    assert ledger.event("evt_1").waits_for == "account:beta"
    assert process(ledger) == []
    ledger.open("beta")
    assert process(ledger) == [("evt_1", "applied")]
    assert ledger.available("beta") == 1000


def test_what_waits_for_something_else_is_left_alone(ledger: Ledger) -> None:
    ledger.tell(COMPLETED, session(metadata={"account_id": "beta", "package": "starter"}, customer="cus_2"), "evt_1")
    ledger.tell(COMPLETED, session("cs_2", metadata={"package": "starter"}, customer="cus_3"), "evt_2")
    before = [ledger.event("evt_1"), ledger.event("evt_2")]
    ledger.tell("customer.updated", CUSTOMER)
    ledger.open_account("gamma")
    assert [ledger.event("evt_1"), ledger.event("evt_2")] == before


# Replay, list, archive -----------------------------------------------------------------------------------------------


def test_an_ignored_event_is_applied_by_a_replay_once_it_has_a_handler(ledger: Ledger) -> None:
    assert ledger.tell("product.praised", PRODUCT, "evt_1") == "ignored"
    ledger.change("insert into credits.stripe_handlers values ('product.praised', '_on_product', 'Of late.')")
    assert ledger.replay_stripe_event("evt_1") == ("evt_1", "applied")
    assert len(ledger.table("stripe_objects")) == 1


def test_replaying_everything_changes_no_credits(ledger: Ledger) -> None:
    ledger.tell("price.created", {**PRICE, **CREDITS}, "evt_1")
    ledger.tell("customer.updated", CUSTOMER, "evt_2")
    ledger.tell(COMPLETED, session(), "evt_3")
    ledger.tell("invoice.paid", invoice(line()), "evt_4")
    ledger.tell("refund.created", {"id": "re_1", "object": "refund", "payment_intent": "pi_1", "amount": 400,
                                   "currency": "usd", "status": "succeeded"}, "evt_5")  # fmt: skip
    assert ledger.available() == 1100
    ledger.now += HOUR
    with ledger.unchanged("stripe_events", "stripe_objects"):  # which say when they were last confirmed
        for n in (3, 5, 1, 4, 2):
            assert ledger.replay_stripe_event(f"evt_{n}").outcome == "applied"
    assert {row.applied_at for row in ledger.table("stripe_events")} == {NOON}


def test_the_list_pages_and_says_what_became_of_each_event(ledger: Ledger) -> None:
    for n in range(5):
        ledger.tell("product.created", {**PRODUCT, "id": f"prod_{n}"}, f"evt_{n}")
        ledger.now += SECOND
    seen: list[str] = []
    before: datetime | None = None
    while page := ledger.list_stripe_events(max_rows=2, before=before):
        seen += [row.event_id for row in page]
        before = page[-1].received_at
    assert seen == [f"evt_{n}" for n in (4, 3, 2, 1, 0)]
    ledger.tell(COMPLETED, session(), "evt_5")
    ledger.now += SECOND
    ledger.tell(
        COMPLETED, session("cs_2", customer="cus_2", metadata={"account_id": "beta", "package": "starter"}), "evt_6"
    )
    waiting, done = ledger.list_stripe_events(type=COMPLETED)
    assert (done.event_id, done.object_id, done.status, done.waits_for) == ("evt_5", "cs_1", "applied", None)
    assert done.effects == [{"effect": "grant", "account_id": "alpha", "amount": 1000, "key": "purchase:cs_1"}]
    assert (waiting.status, waiting.reason, waiting.waits_for, waiting.effects) == (
        "parked", "account_unknown", "account:beta", None,
    )  # fmt: skip
    assert [row.event_id for row in ledger.list_stripe_events(type=COMPLETED, status="parked")] == ["evt_6"]


def test_no_event_is_lost_between_two_pages(ledger: Ledger) -> None:
    for n in range(7):
        ledger.tell("product.created", {**PRODUCT, "id": f"prod_{n}"}, f"evt_{n}")
        ledger.now += SECOND if n in {0, 4} else SECOND * 0
    pages: list[list[str]] = []
    before: datetime | None = None
    while page := ledger.list_stripe_events(max_rows=2, before=before):
        pages.append([row.event_id for row in page])
        before = page[-1].received_at
    assert pages == [["evt_5", "evt_6"], ["evt_1", "evt_2", "evt_3", "evt_4"], ["evt_0"]]


def test_the_archive_drops_old_payloads_of_what_is_done_and_keeps_every_id(ledger: Ledger) -> None:
    stranger = session("cs_2", customer="cus_2", metadata={"account_id": "beta", "package": "starter"})
    with failing(ledger):
        ledger.tell("product.created", PRODUCT, "evt_failed")
    ledger.tell(COMPLETED, session(), "evt_applied")
    ledger.tell(COMPLETED, stranger, "evt_parked")
    ledger.tell("unheard.of", {}, "evt_ignored")
    ledger.now = NOON + 90 * DAY
    ledger.tell("product.updated", PRODUCT, "evt_new")
    assert ledger.archive_stripe_events() == 0
    ledger.now += SECOND
    assert ledger.archive_stripe_events() == 2
    assert ledger.archive_stripe_events() == 0
    events = {row.event_id: (row.payload is None, row.archived_at) for row in ledger.table("stripe_events")}
    assert events == {
        **dict.fromkeys(("evt_failed", "evt_parked", "evt_new"), (False, None)),
        **dict.fromkeys(("evt_applied", "evt_ignored"), (True, ledger.now)),
    }
    with ledger.unchanged():
        assert ledger.tell(COMPLETED, session(), "evt_applied") == "duplicate"
        assert ledger.tell("unheard.of", {}, "evt_ignored") == "duplicate"
        with refused(410, "event_archived", event_id="evt_applied"):
            ledger.replay_stripe_event("evt_applied")
    assert {row.event_id for row in ledger.list_stripe_events() if row.archived_at} == {"evt_applied", "evt_ignored"}
    ledger.open("beta")
    assert ledger.replay_stripe_event("evt_parked").outcome == "applied"
    assert ledger.replay_stripe_event("evt_failed").outcome == "applied"


def test_the_archive_works_in_batches_the_oldest_first(ledger: Ledger) -> None:
    for n in range(5):
        ledger.tell("unheard.of", {}, f"evt_{n}")
        ledger.now += SECOND
    archived = []
    for expected in (2, 2, 1, 0):
        assert ledger.archive_stripe_events(older_than=timedelta(0), max_events=2) == expected
        archived.append({row.event_id for row in ledger.table("stripe_events", "archived_at is not null")})
    assert archived[0] == {"evt_0", "evt_1"}
    assert archived[1] == archived[0] | {"evt_2", "evt_3"}


# Endpoints -----------------------------------------------------------------------------------------------------------

STORY = [  # a purchase that is spent and half refunded, and a subscription whose invoice is paid
    (COMPLETED, session()),
    ("refund.created", {"id": "re_1", "object": "refund", "payment_intent": "pi_1", "charge": "ch_1", "amount": 500,
                        "currency": "usd", "status": "succeeded"}),
    ("price.created", {**PRICE, **CREDITS}),
    ("customer.subscription.created", {"id": "sub_1", "object": "subscription", "customer": "cus_1",
                                       "status": "active", "items": {"data": [{"id": "si_1", "price": PRICE}]}}),
    ("invoice.paid", invoice({**line(), "pricing": {"price_details": {"price": {**PRICE, **CREDITS}}}})),
    ("customer.updated", CUSTOMER),
]  # fmt: skip


def test_an_endpoint_in_shadow_mode_says_what_it_would_do_and_changes_nothing(ledger: Ledger) -> None:
    ledger.set_stripe_endpoint("watch", mode="shadow")
    ledger.tell("customer.updated", CUSTOMER)
    ledger.grant(100)
    with ledger.unchanged("stripe_events"):
        for number, (event_type, about) in enumerate(STORY):
            assert ledger.tell(event_type, about, f"evt_{number}", endpoint="watch") == "ignored"
    rows = [ledger.event(f"evt_{number}") for number in range(len(STORY))]
    assert {(row.status, row.reason, row.applied_at, row.next_attempt_at) for row in rows} == {
        ("ignored", "shadow", None, None)
    }
    effects = [row.effects for row in rows]
    assert effects[0] == [{"effect": "grant", "account_id": "alpha", "amount": 1000, "key": "purchase:cs_1"}]
    move = {"effect": "move", "account_id": "alpha", "subscription_id": "sub_1", "from": "none", "to": "active"}
    assert effects[3] == [move]
    assert effects[4] == [{"effect": "grant", "account_id": "alpha", "amount": 500, "key": "sub:in_1:il_1"}]
    with ledger.unchanged():
        assert ledger.tell(COMPLETED, session(), "evt_0", endpoint="watch") == "duplicate"


def test_what_was_recorded_in_shadow_mode_is_applied_by_a_replay_once_its_endpoint_is_live(ledger: Ledger) -> None:
    ledger.set_stripe_endpoint("watch", mode="shadow")
    for number, (event_type, about) in enumerate(STORY):
        ledger.tell(event_type, about, f"evt_{number}", endpoint="watch")
    with ledger.unchanged("stripe_events"):
        assert ledger.replay_stripe_event("evt_0").outcome == "ignored"
    ledger.set_stripe_endpoint("watch")
    assert {ledger.replay_stripe_event(f"evt_{number}").outcome for number in range(len(STORY))} == {"applied"}
    assert ledger.available() == 1000
    assert ledger.get_subscription_state("alpha").state == "active"
    assert_sound(ledger)


@pytest.mark.parametrize("what", ["parked", "failed"])
def test_shadow_mode_asks_nobody_and_changes_nothing_where_something_is_missing_or_fails(
    ledger: Ledger, what: str
) -> None:
    ledger.set_stripe_endpoint("watch", mode="shadow")
    about = session(metadata={"package": "starter"})
    with failing(ledger, handler="_on_checkout_session" if what == "failed" else "_on_product"):
        with ledger.unchanged("stripe_events"):
            assert ledger.tell(COMPLETED, about, "evt_1", endpoint="watch") == "ignored"
        (kept,) = ledger.table("stripe_events")
        assert (kept.reason, kept.next_attempt_at, kept.effects[0]["effect"]) == ("shadow", None, what)
        ledger.now += HOUR
        assert process(ledger) == []


WRONG: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {  # the endpoint, what the event says, why it is ignored
    "shadow": ({"mode": "shadow"}, {}, "shadow"),
    "test endpoint, live event": ({"livemode": False}, {"livemode": True}, "livemode_mismatch"),
    "live endpoint, test event": ({"livemode": True}, {"livemode": False}, "livemode_mismatch"),
    "own endpoint, connected account": ({}, {"account": "acct_1"}, "account_mismatch"),
    "connected account, own event": ({"stripe_account": "acct_1"}, {}, "account_mismatch"),
    "another connected account": ({"stripe_account": "acct_1"}, {"account": "acct_2"}, "account_mismatch"),
}


@pytest.mark.parametrize("what", WRONG)
def test_what_is_not_meant_for_an_endpoint_is_ignored_visibly_and_applied_by_the_right_one(
    ledger: Ledger, what: str
) -> None:
    expects, says, reason = WRONG[what]
    ledger.set_stripe_endpoint("wrong", **expects)
    ledger.set_stripe_endpoint("right", livemode=says.get("livemode"), stripe_account=says.get("account"))
    payload = told("evt_1", COMPLETED, session(), **says)
    with ledger.unchanged("stripe_events"):
        assert ledger.receive_stripe_event("wrong", payload).outcome == "ignored"
    kept = ledger.event("evt_1")
    assert (kept.status, kept.reason, kept.endpoint, kept.payload) == ("ignored", reason, "wrong", payload)
    assert ledger.receive_stripe_event("right", payload).outcome == "applied"
    assert (ledger.event("evt_1").endpoint, ledger.available()) == ("right", 1000)
    with ledger.unchanged():
        for endpoint in ("wrong", "right"):
            assert ledger.receive_stripe_event(endpoint, payload).outcome == "duplicate"


@pytest.mark.parametrize("what", ["parked", "failed"])
def test_an_event_that_waits_at_an_endpoint_in_shadow_mode_is_taken_over_by_a_live_one(
    ledger: Ledger, what: str
) -> None:
    ledger.set_stripe_endpoint("watch", mode="shadow")
    about = session(customer="cus_2", metadata={"account_id": "beta", "package": "starter"})
    with failing(ledger, handler="_on_checkout_session" if what == "failed" else "_on_product"):
        assert ledger.tell(COMPLETED, about, "evt_1", endpoint="watch") == "ignored"
        assert ledger.tell(COMPLETED, about, "evt_1", endpoint="live") == what
    ledger.open("beta")
    ledger.now += HOUR
    assert process(ledger) == [("evt_1", "applied")]
    assert ledger.available("beta") == 1000


def test_an_archived_event_that_only_a_shadow_has_seen_is_applied_by_a_live_endpoint(ledger: Ledger) -> None:
    ledger.set_stripe_endpoint("watch", mode="shadow")
    ledger.tell(COMPLETED, session(), "evt_1", endpoint="watch")
    ledger.now += 91 * DAY
    assert ledger.archive_stripe_events() == 1
    assert ledger.tell(COMPLETED, session(), "evt_1", endpoint="live") == "applied"
    assert ledger.available() == 1000


def test_an_endpoint_is_set_and_set_anew(ledger: Ledger) -> None:
    first = ledger.set_stripe_endpoint("shop", mode="shadow", livemode=True, stripe_account="acct_1")
    assert first == ("shop", "shadow", True, "acct_1", NOON)
    ledger.now += SECOND
    assert ledger.set_stripe_endpoint("shop") == ("shop", "live", None, None, NOON + SECOND)
    assert len(ledger.table("stripe_endpoints")) == 1


# Thin events ---------------------------------------------------------------------------------------------------------


def thin(event_type: str, kind: str, object_id: str, event_id: str = "evt_1") -> str:
    """A notification that only names its object."""
    related = {"id": object_id, "type": kind, "url": f"/v1/{kind}/{object_id}"}
    return json.dumps({
        "id": event_id, "object": "v2.core.event", "type": event_type, "created": "2030-01-31T12:00:00.000Z",
        "livemode": False, "related_object": related,
    })  # fmt: skip


def test_a_thin_event_is_stored_and_its_object_retrieved_and_applied(ledger: Ledger) -> None:
    payload = thin("v1.checkout.session.completed", "checkout.session", "cs_1")
    assert ledger.receive_stripe_event("default", payload).outcome == "applied"
    kept = ledger.event("evt_1")
    assert (kept.type, kept.object_id, kept.created_at, kept.reason) == (
        "v1.checkout.session.completed", "cs_1", NOON, "retrieve_queued",
    )  # fmt: skip
    assert ledger.available() == 0
    assert (asked(ledger).path, asked(ledger).run_at) == ("/v1/checkout/sessions/cs_1", NOON)
    assert answer(ledger, session()).state == "done"
    assert ledger.available() == 1000
    assert_sound(ledger)


def test_what_a_thin_event_tells_while_an_answer_is_on_its_way_is_asked_for_again(ledger: Ledger) -> None:
    ledger.receive_stripe_event("default", thin("v1.checkout.session.completed", "checkout.session", "cs_1"))
    (early,) = ledger.claim_stripe_requests()
    ledger.now += SECOND
    paid = thin("v1.checkout.session.async_payment_succeeded", "checkout.session", "cs_1", "evt_2")
    ledger.receive_stripe_event("default", paid)
    ledger.complete_stripe_request(early.request_id, 200, json.dumps(session(payment_status="unpaid")))
    assert answer(ledger, session()).state == "done"
    assert (ledger.available(), ledger.table("stripe_requests", "state = 'queued'")) == (1000, [])


@pytest.mark.parametrize("told", ["checkout.session.async_payment_failed", "invoice.payment_failed"])
def test_what_only_the_name_of_a_thin_event_tells_is_done(ledger: Ledger, told: str) -> None:
    ledger.tell("customer.created", {"id": "cus_1", "object": "customer", "metadata": {"account_id": "alpha"}})
    kind = told.rpartition(".")[0]
    about = session(payment_status="unpaid") if kind == "checkout.session" else {
        "id": "cs_1", "object": "invoice", "status": "open", "customer": "cus_1", "attempt_count": 1,
    }  # fmt: skip
    ledger.receive_stripe_event("default", thin(f"v1.{told}", kind, "cs_1"))
    assert answer(ledger, about).state == "done"
    assert [row.account_id for row in ledger.table("notifications", "type like '%%payment_failed'")] == ["alpha"]
    assert [row.status for row in ledger.list_purchases()] == ["failed"] * (kind == "checkout.session")


@pytest.mark.parametrize("kind", ["v2.money_management.payout", "checkout.session.x", "../secrets"])
def test_a_thin_event_about_something_unheard_of_is_ignored(ledger: Ledger, kind: str) -> None:
    with ledger.unchanged("stripe_events"):
        assert ledger.receive_stripe_event("default", thin("v2.unheard.of", kind, "x_1")).outcome == "ignored"
        assert ledger.event("evt_1").reason == "type_not_handled"


def test_what_an_answer_tells_is_not_lost_where_something_is_missing(ledger: Ledger) -> None:
    ledger.receive_stripe_event("default", thin("v1.checkout.session.completed", "checkout.session", "cs_1"))
    answer(ledger, session(customer="cus_2", metadata={"account_id": "beta", "package": "starter"}))
    ledger.open("beta")
    for _ in range(3):
        ledger.now += DAY
        process(ledger)
        if ledger.table("stripe_requests", "state = 'queued'"):
            answer(ledger, session(customer="cus_2", metadata={"account_id": "beta", "package": "starter"}))
    assert ledger.available("beta") == 1000


# Answers -------------------------------------------------------------------------------------------------------------


def ask(ledger: Ledger) -> int:
    """Let SQL ask for product prod_1; the number of the request."""
    with ledger.as_owner():
        (row,) = ledger.query("select credits._request_object('product', 'prod_1') as request_id")
    request_id: int = row.request_id
    return request_id


def later(request: Any, wait: timedelta) -> timedelta:
    """A wait, longer by up to a fifth: so requests that failed together do not come back together."""
    percent: int = 100 + request.request_id % 21
    return wait * percent / 100


ANSWERS: list[tuple[int | None, Any, str]] = [
    (200, PRODUCT, "done"),
    (201, PRODUCT, "done"),
    (404, {"error": {"type": "invalid_request_error", "code": "resource_missing"}}, "done"),
    (400, {"error": {"type": "invalid_request_error", "code": "parameter_unknown"}}, "failed"),
    (403, {"error": {"type": "invalid_request_error"}}, "failed"),
    (402, {"error": {"type": "card_error", "code": "card_declined"}}, "declined"),
    (400, "", "queued"),
    (403, "<html>not Stripe's</html>", "queued"),
    (401, {"error": {"type": "invalid_request_error"}}, "queued"),
    (409, {"error": {"type": "idempotency_error"}}, "queued"),
    (429, {"error": {"type": "rate_limit_error"}}, "queued"),
    (500, {"error": {"type": "api_error"}}, "queued"),
    (503, "<html>sorry</html>", "queued"),
    (302, "", "queued"),
    (None, "", "queued"),
    (200, "<html>sorry</html>", "queued"),
    (200, "", "queued"),
    (200, "[]", "queued"),
    (200, '{"id": "prod_1"', "queued"),
]


def test_an_answer_ends_a_request_or_puts_it_back(ledger: Ledger) -> None:
    for status, body, state in ANSWERS:
        with ledger.conn.transaction(force_rollback=True):
            request_id = ask(ledger)
            done = answer(ledger, body, status)
            assert (done.state, done.http_status, done.attempts) == (state, status, int(status != 401)), body
            error = body.get("error", {}) if isinstance(body, dict) else {}
            assert (done.error_type, done.error_code) == (error.get("type"), error.get("code"))
            applied = state == "done" and not error
            assert [row.object_id for row in ledger.table("stripe_objects")] == ["prod_1"] * applied
            base = 15 * SECOND if status == 429 else SECOND
            assert done.run_at == (NOON + later(done, base) if state == "queued" else NOON)
            assert done.finished_at == (None if state == "queued" else NOON)
            if state != "queued":
                with ledger.unchanged():
                    again = ledger.complete_stripe_request(request_id, 200, json.dumps({**PRODUCT, "name": "Other"}))
                assert (again.request_id, again.state) == (request_id, state)


def test_an_answer_without_a_body_is_none(ledger: Ledger) -> None:
    assert ledger.complete_stripe_request(ask(ledger), None, None).state == "queued"
    assert ledger.complete_stripe_request(ask(ledger), 200, None).state == "queued"


def test_a_request_is_sent_again_each_time_later(ledger: Ledger) -> None:
    request_id = ask(ledger)
    waits = []
    for _ in range(8):
        answer(ledger, "", 500)
        waits.append(asked(ledger).run_at - ledger.now)
    bases = [SECOND, 4 * SECOND, 15 * SECOND, MINUTE, 5 * MINUTE, *[15 * MINUTE] * 3]
    assert waits == [later(asked(ledger), base) for base in bases]
    assert (asked(ledger).request_id, asked(ledger).idempotency_key) == (request_id, f"pgc-{request_id}")
    assert answer(ledger, PRODUCT).state == "done"


def test_an_answer_whose_handler_fails_is_asked_for_again(ledger: Ledger) -> None:
    ask(ledger)
    with failing(ledger), ledger.unchanged("stripe_requests"):
        waiting = answer(ledger, PRODUCT)
    assert (waiting.state, waiting.error_type) == ("queued", "22012 division by zero")
    assert waiting.run_at == NOON + later(waiting, SECOND)
    assert answer(ledger, PRODUCT).state == "done"
    assert len(ledger.table("stripe_objects")) == 1


def moment(at: Any) -> str:
    """A moment as HTTP writes it."""
    return format_datetime(at, usegmt=True)


def test_an_answer_speaks_for_the_second_in_which_it_was_asked_for(ledger: Ledger) -> None:
    for headers, as_of in [
        ({"Date": moment(NOON + 20 * SECOND)}, NOON + 17 * SECOND),
        ({"date": moment(NOON + 20 * SECOND)}, NOON + 17 * SECOND),
        ({"Date": moment(NOON - 20 * SECOND)}, NOON - 23 * SECOND),
        ({"Date": "yesterday"}, NOON + 7 * SECOND),
        ({}, NOON + 7 * SECOND),
    ]:
        with ledger.conn.transaction(force_rollback=True):
            ask(ledger)
            ledger.change("update credits.stripe_requests set last_sent_at = %s", NOON + 7 * SECOND)
            ledger.now = NOON + 10 * SECOND
            done = answer(ledger, PRODUCT, headers={**headers, "Request-Id": "req_1"})
            assert (done.as_of, done.stripe_request) == (int(as_of.timestamp()), "req_1"), headers
            (known,) = ledger.table("stripe_objects")
            assert (known.as_of, known.seen_by) == (done.as_of, "object.product")


def test_an_answer_that_is_older_than_what_is_known_is_dropped_and_asked_for_again(ledger: Ledger) -> None:
    ask(ledger)
    ledger.now += MINUTE
    ledger.tell("product.updated", {**PRODUCT, "name": "New"})
    done = answer(ledger, {**PRODUCT, "name": "Old"}, headers={"Date": moment(NOON + SECOND)})
    assert done.state == "done"
    (known,) = ledger.table("stripe_objects")
    assert known.snapshot["name"] == "New"
    assert (asked(ledger).ref, asked(ledger).run_at) == ("product:prod_1", ledger.now + 2 * SECOND)
    ledger.now += MINUTE
    answer(ledger, {**PRODUCT, "name": "Newest"}, headers={"Date": moment(ledger.now)})
    assert ledger.table("stripe_objects")[0].snapshot["name"] == "Newest"
    assert ledger.table("stripe_requests", "state = 'queued'") == []


def test_one_request_is_open_for_one_object_and_a_tie_moves_it_back(ledger: Ledger) -> None:
    for name in ("One", "Two", "Three"):
        ledger.tell("product.updated", {**PRODUCT, "name": name})
    assert asked(ledger).run_at == NOON + 2 * SECOND
    ledger.now += SECOND
    ledger.tell("product.updated", {**PRODUCT, "name": "Four"})
    ledger.tell("product.updated", {**PRODUCT, "name": "Five"})
    assert asked(ledger).run_at == NOON + 3 * SECOND


# Words that Stripe owns ----------------------------------------------------------------------------------------------

ODD: dict[str, Any] = {
    "only an id": {},
    "texts": "brand_new",
    "numbers": 7,
    "negative": -1.5,
    "immense": 99999999999999,
    "nulls": None,
    "lists": [],
    "lists of objects": [{"id": "x_1"}],
    "objects": {"id": "x_1", "data": [{"id": "x_2"}]},
    "truth": True,
}
FIELDS = [
    "status", "mode", "payment_status", "amount", "amount_total", "amount_subtotal", "amount_captured", "captured",
    "amount_refunded", "amount_paid", "currency", "charge", "payment_intent", "invoice", "subscription", "customer",
    "items", "lines", "parent", "payments", "metadata", "recurring", "unit_amount", "product", "price", "quantity",
    "period", "created", "start_date", "current_period_start", "current_period_end", "billing_cycle_anchor",
    "trial_end", "cancel_at", "cancel_at_period_end", "ended_at", "pause_collection", "schedule", "phases",
    "current_phase", "payment", "invoice_settings", "deleted", "paid", "livemode", "attempt_count", "total",
    "total_details", "client_reference_id", "subscription_details",
]  # fmt: skip
KINDS = {
    "checkout.session.completed": "checkout.session", "invoice.paid": "invoice", "invoice.updated": "invoice",
    "invoice_payment.paid": "invoice_payment", "customer.subscription.updated": "subscription",
    "subscription_schedule.updated": "subscription_schedule", "payment_intent.succeeded": "payment_intent",
    "charge.refunded": "charge", "refund.updated": "refund", "charge.dispute.updated": "dispute",
    "product.updated": "product", "price.updated": "price", "customer.updated": "customer",
    "payment_method.attached": "payment_method", "account.application.authorized": "application",
    "account.application.deauthorized": "application",
}  # fmt: skip


@pytest.mark.parametrize("event_type", KINDS)
def test_no_event_fails_for_what_stripe_says_in_it(ledger: Ledger, event_type: str) -> None:
    kind = KINDS[event_type]
    for what, value in ODD.items():
        odd = dict.fromkeys(FIELDS, value) if what != "only an id" else {}
        for owner in ({}, {"customer": "cus_1", "metadata": {"account_id": "alpha"}, "subscription": "sub_1"}):
            event_id = ledger.key()
            ledger.tell(event_type, {**odd, "id": f"x_{event_id}", "object": kind, **owner}, event_id)
            kept = ledger.event(event_id)
            assert kept.error is None, (what, owner)
    assert_sound(ledger)


def test_an_event_is_stored_whatever_its_fields_hold(ledger: Ledger) -> None:
    odd: list[Any] = [None, 7, -1.5, "", "brand_new", [], {}, [{}], True, 99999999999999, "2030-99-99T00:00:00Z"]
    for field in ("created", "livemode", "api_version", "account", "context", "object", "related_object", "request"):
        for value in odd:
            event_id = ledger.key()
            payload = told(event_id, "product.updated", PRODUCT, **{field: value})
            assert ledger.receive_stripe_event("default", payload) == (event_id, ledger.event(event_id).status)
            assert ledger.event(event_id).error is None, (field, value)


def test_an_event_without_an_object_is_kept_and_changes_nothing(ledger: Ledger) -> None:
    with ledger.unchanged("stripe_events"):
        abouts: list[Any] = [None, {}, [], "text", 5, {"object": "brand_new"}]
        for about in abouts:
            for event_type in KINDS:
                event_id = ledger.key()
                assert ledger.tell(event_type, about, event_id) == ledger.event(event_id).status


def test_every_family_of_events_is_provoked_here(ledger: Ledger) -> None:
    answers = r"event_type ~ '^(object|answer|failed|again)\.' or event_type = 'v2.core.event'"
    rows = ledger.table("stripe_handlers", f"not ({answers})")
    assert {row.handler for row in rows} == {row.handler for row in rows if row.event_type in KINDS}


def test_a_word_of_stripe_that_nobody_knows_moves_no_state_and_no_money(ledger: Ledger) -> None:
    ledger.tell(COMPLETED, session())
    subscription = {"id": "sub_1", "object": "subscription", "customer": "cus_1"}
    ledger.tell("customer.subscription.created", {**subscription, "status": "active"})
    payment = {"payment_intent": "pi_1", "charge": "ch_1", "currency": "usd", "amount": 1000}
    for status in ("brand_new", "", None):
        ledger.now += SECOND
        for event_type, about in (
            ("customer.subscription.updated", {**subscription, "status": status}),
            ("invoice.updated", {**invoice(line()), "status": status}),
            ("charge.dispute.updated", {"id": "dp_1", "object": "dispute", "status": status, **payment}),
        ):
            assert ledger.tell(event_type, about) == "applied"
        assert ledger.get_subscription_state("alpha").state == "active"
        assert ledger.available() == 1000
