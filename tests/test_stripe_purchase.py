"""A Checkout session that was paid becomes credits, once, however its events come; what cannot be applied waits."""

import json
from collections import Counter
from collections.abc import Callable
from decimal import Decimal
from functools import partial
from typing import Any

import pytest
from client import CreditsError
from ledger_support import HOUR, MINUTE, NOON, Ledger, assert_sound, committed, refused, together
from psycopg import Connection
from servers import Database

COMPLETED, SUCCEEDED = "checkout.session.completed", "checkout.session.async_payment_succeeded"
Change = dict[str, Any]


def session(session_id: str = "cs_1", **changes: Any) -> Change:
    """A Checkout session as Stripe describes it: the starter package, bought by alpha, paid."""
    return {
        "id": session_id, "object": "checkout.session", "mode": "payment", "status": "complete",
        "payment_status": "paid", "amount_subtotal": 1000, "amount_total": 1000, "currency": "usd",
        "livemode": False, "customer": "cus_1", "client_reference_id": None,
        "payment_intent": session_id.replace("cs_", "pi_"),
        "metadata": {"account_id": "alpha", "package": "starter"}, **changes,
    }  # fmt: skip


def event(event_id: str = "evt_1", event_type: str = COMPLETED, **changes: Any) -> str:
    """An event of Stripe about such a session, as text."""
    return json.dumps(
        {"id": event_id, "object": "event", "type": event_type, "api_version": "2026-06-30", "created": 1893456000,
         "livemode": False, "data": {"object": session(**changes)}}
    )  # fmt: skip


def prepare(ledger: Ledger) -> None:
    """The demo catalogue, and an account without credits."""
    ledger.rows("load_demo_catalog")
    ledger.open("alpha")


@pytest.fixture
def ledger(conn: Connection[Any]) -> Ledger:
    """A shop that alpha may buy from."""
    ledger = Ledger(conn)
    prepare(ledger)
    return ledger


def deliver(ledger: Ledger, payload: str) -> str:
    """Receive an event; its outcome."""
    outcome: str = ledger.receive_stripe_event("default", payload).outcome
    return outcome


def stored(ledger: Ledger, event_id: str = "evt_1") -> Any:
    """What is kept of an event."""
    (row,) = ledger.table("stripe_events", "event_id = %s", event_id)
    return row


def test_a_paid_session_becomes_a_purchase_a_grant_and_a_balance(ledger: Ledger) -> None:
    assert ledger.receive_stripe_event("shop", event()) == ("evt_1", "applied")
    assert ledger.sums() == (1000, 0, 1000, 0)
    (purchase,) = ledger.table("purchases")
    (grant,) = ledger.table("grants")
    assert (purchase.account_id, purchase.package, purchase.quantity, purchase.credits) == ("alpha", "starter", 1, 1000)
    assert (purchase.amount, purchase.currency, purchase.status) == (1000, "usd", "completed")
    assert (purchase.stripe_session_id, purchase.stripe_payment_intent_id, purchase.stripe_customer_id) == (
        "cs_1", "pi_1", "cus_1",
    )  # fmt: skip
    assert (purchase.grant_id, purchase.completed_at) == (grant.grant_id, NOON)
    assert (grant.kind, grant.priority, grant.amount, grant.cost, grant.cost_currency) == (
        "purchase",
        30,
        1000,
        1000,
        "usd",
    )
    assert grant.expires_at is None
    kept = stored(ledger)
    assert (kept.endpoint, kept.type, kept.status, kept.attempts) == ("shop", COMPLETED, "applied", 1)
    assert (kept.payload, kept.livemode, kept.applied_at) == (event(), False, NOON)
    assert_sound(ledger)


def test_a_second_delivery_is_a_duplicate_and_changes_nothing(ledger: Ledger) -> None:
    deliver(ledger, event())
    with ledger.unchanged():
        assert deliver(ledger, event()) == "duplicate"


def test_a_replay_of_an_applied_event_grants_nothing_more(ledger: Ledger) -> None:
    deliver(ledger, event())
    assert ledger.replay_stripe_event("evt_1") == ("evt_1", "applied")
    assert ledger.available() == 1000
    assert_sound(ledger)


@pytest.mark.parametrize("order", [(COMPLETED, SUCCEEDED), (SUCCEEDED, COMPLETED)], ids=["in order", "reversed"])
@pytest.mark.parametrize("first_status", ["paid", "unpaid"])
def test_both_events_of_one_session_grant_once(ledger: Ledger, order: tuple[str, str], first_status: str) -> None:
    status = {COMPLETED: first_status, SUCCEEDED: "paid"}
    outcomes = [deliver(ledger, event(f"evt_{kind}", kind, payment_status=status[kind])) for kind in order]
    assert outcomes == ["applied", "applied"]
    assert ledger.available() == 1000
    (purchase,) = ledger.table("purchases")
    assert purchase.status == "completed"
    assert_sound(ledger)


def test_an_unpaid_session_waits_as_a_purchase_in_processing(ledger: Ledger) -> None:
    assert deliver(ledger, event(payment_status="unpaid", payment_intent=None)) == "applied"
    (waiting,) = ledger.table("purchases")
    assert (waiting.status, waiting.grant_id, waiting.stripe_payment_intent_id) == ("processing", None, None)
    assert ledger.available() == 0
    assert deliver(ledger, event("evt_2", SUCCEEDED)) == "applied"
    (done,) = ledger.table("purchases")
    assert (done.purchase_id, done.status, done.stripe_payment_intent_id) == (waiting.purchase_id, "completed", "pi_1")
    assert ledger.available() == 1000


def test_two_sessions_are_two_purchases(ledger: Ledger) -> None:
    deliver(ledger, event())
    deliver(ledger, event("evt_2", session_id="cs_2"))
    assert ledger.available() == 2000
    assert_sound(ledger)


def test_one_session_under_another_event_id_grants_once(ledger: Ledger) -> None:
    deliver(ledger, event())
    assert deliver(ledger, event("evt_2")) == "applied"
    assert stored(ledger, "evt_2").reason == "granted_before"
    assert ledger.available() == 1000


@pytest.mark.parametrize(
    "change",
    [
        {"metadata": {"account_id": "alpha", "package": "starter"}, "client_reference_id": None},
        {"metadata": {"package": "starter"}, "client_reference_id": "alpha"},
        {"metadata": {"account_id": "", "package": "starter"}, "client_reference_id": "alpha"},
        {"metadata": {"account_id": "alpha", "package": "starter"}, "client_reference_id": "nobody"},
        {
            "customer": {"id": "cus_1", "object": "customer"},
            "payment_intent": {"id": "pi_1", "object": "payment_intent"},
        },
        {"customer": None},
        {"payment_status": "no_payment_required"},
    ],
    ids=[
        "metadata",
        "client reference",
        "empty metadata",
        "metadata goes first",
        "expanded",
        "guest",
        "nothing to pay",
    ],
)
def test_the_account_is_found_by_metadata_or_client_reference(ledger: Ledger, change: Change) -> None:
    assert deliver(ledger, event(**change)) == "applied"
    assert ledger.available() == 1000


PARKED: dict[str, tuple[str, Change]] = {
    "no account named": ("account_unknown", {"metadata": {"package": "starter"}}),
    "an unknown account": ("account_unknown", {"metadata": {"account_id": "beta", "package": "starter"}}),
    "no metadata at all": ("account_unknown", {"metadata": None}),
    "no package": ("package_unknown", {"metadata": {"account_id": "alpha"}}),
    "an unknown package": ("package_unknown", {"metadata": {"account_id": "alpha", "package": "gold"}}),
    "another amount": ("amount_unknown", {"amount_subtotal": 999, "amount_total": 999}),
    "the price of another package": ("amount_unknown", {"amount_subtotal": 4500, "amount_total": 4500}),
    "another currency": ("amount_unknown", {"currency": "eur"}),
    "no currency": ("amount_unknown", {"currency": None}),
    "no amount": ("amount_unknown", {"amount_subtotal": None, "amount_total": None}),
    "no total": ("amount_unknown", {"amount_total": None}),
    "an amount that is text": ("amount_unknown", {"amount_subtotal": "a lot", "amount_total": "a lot"}),
    "quantity zero": ("quantity_unknown", {"metadata": {"account_id": "alpha", "package": "starter", "quantity": "0"}}),
    "quantity many": (
        "quantity_unknown",
        {"metadata": {"account_id": "alpha", "package": "starter", "quantity": "many"}},
    ),
    "two of them paid as one": (
        "amount_unknown",
        {"metadata": {"account_id": "alpha", "package": "starter", "quantity": "2"}},
    ),
    "no session id": ("session_unknown", {"id": None}),
}
ASKED = {  # what Stripe can tell, it is asked
    "no account named": "customer:cus_1",
    "no metadata at all": "customer:cus_1",
    "no package": "line_items:cs_1",
}


@pytest.mark.parametrize("payment_status", ["paid", "unpaid"])
@pytest.mark.parametrize("what", PARKED)
def test_what_is_not_known_parks_the_event_and_changes_nothing_else(
    ledger: Ledger, what: str, payment_status: str
) -> None:
    reason, change = PARKED[what]
    before = ledger.snapshot()
    assert deliver(ledger, event(**change, payment_status=payment_status)) == "parked"
    after = ledger.snapshot()
    asked = ASKED.get(what)
    assert {name for name in after if after[name] != before[name]} == {
        "stripe_events",
        *(["stripe_requests"] * bool(asked)),
    }
    assert [(row.purpose, row.ref) for row in ledger.table("stripe_requests")] == [("retrieve", asked)] * bool(asked)
    kept = stored(ledger)
    assert (kept.status, kept.reason, kept.error, kept.applied_at) == ("parked", reason, None, None)
    assert kept.next_attempt_at > NOON


@pytest.mark.parametrize("again", [lambda on: deliver(on, event()), lambda on: on.replay_stripe_event("evt_1").outcome])
def test_a_parked_event_is_applied_once_the_account_exists(
    conn: Connection[Any], again: Callable[[Ledger], str]
) -> None:
    ledger = Ledger(conn)
    ledger.rows("load_demo_catalog")
    assert deliver(ledger, event()) == "parked"
    assert again(ledger) == "parked"
    assert stored(ledger).attempts == 2
    ledger.open("alpha")
    assert again(ledger) == "applied"
    assert (stored(ledger).reason, stored(ledger).next_attempt_at) == (None, None)
    assert ledger.available() == 1000
    assert deliver(ledger, event()) == "duplicate"
    assert_sound(ledger)


def test_a_customer_of_one_account_never_pays_for_another(ledger: Ledger) -> None:
    ledger.open("beta")
    deliver(ledger, event())
    stranger = event("evt_2", session_id="cs_2", metadata={"account_id": "beta", "package": "starter"})
    assert deliver(ledger, stranger) == "parked"
    assert stored(ledger, "evt_2").reason == "customer_of_another_account"
    assert ledger.available("beta") == 0


def test_a_session_never_grants_to_a_second_account(ledger: Ledger) -> None:
    ledger.open("beta")
    deliver(ledger, event())
    deliver(ledger, event("evt_2", metadata={"account_id": "beta", "package": "starter"}, customer=None))
    assert (ledger.available("alpha"), ledger.available("beta")) == (1000, 0)


@pytest.mark.parametrize(
    "change",
    [
        {"amount_total": 700},
        {"amount_total": 0, "payment_status": "no_payment_required"},
        {"amount_total": 1190},
        {"amount_subtotal": None, "amount_total": 890, "total_details": {"amount_discount": 300, "amount_tax": 190}},
    ],
    ids=["discount", "discount of all", "tax", "only the total is told"],
)
def test_discounts_and_tax_change_the_cost_and_never_the_credits(ledger: Ledger, change: Change) -> None:
    assert deliver(ledger, event(**change)) == "applied"
    assert ledger.available() == 1000
    (grant,) = ledger.table("grants")
    assert grant.cost == change["amount_total"]


def test_a_quantity_multiplies_price_and_credits(ledger: Ledger) -> None:
    metadata = {"account_id": "alpha", "package": "standard", "quantity": "3"}
    assert deliver(ledger, event(metadata=metadata, amount_subtotal=13500, amount_total=13500)) == "applied"
    assert ledger.available() == 15000
    (purchase,) = ledger.table("purchases")
    assert (purchase.quantity, purchase.credits) == (3, 15000)


@pytest.mark.parametrize(
    ("payload", "reason"),
    [
        (event(mode="unheard_of"), "mode_not_handled"),
        (event(mode=None), "mode_not_handled"),
        (event(event_type="invoice.upcoming"), "type_not_handled"),
        (event(event_type="unheard.of"), "type_not_handled"),
    ],
)
def test_what_is_not_ours_to_handle_is_kept_and_ignored(ledger: Ledger, payload: str, reason: str) -> None:
    assert deliver(ledger, payload) == "ignored"
    assert (stored(ledger).status, stored(ledger).reason) == ("ignored", reason)
    assert ledger.table("purchases") == []
    assert deliver(ledger, payload) == "duplicate"


@pytest.mark.parametrize("mode", ["subscription", "setup"])
def test_a_session_that_sells_nothing_by_itself_binds_its_customer(ledger: Ledger, mode: str) -> None:
    assert deliver(ledger, event(mode=mode, subscription="sub_1" if mode == "subscription" else None)) == "applied"
    (customer,) = ledger.table("stripe_customers")
    assert (customer.customer_id, customer.account_id, customer.bound_by) == ("cus_1", "alpha", "evt_1")
    assert (ledger.table("purchases"), ledger.table("grants"), ledger.table("stripe_requests")) == ([], [], [])
    unnamed = event("evt_2", session_id="cs_2", metadata={"package": "starter"})
    assert deliver(ledger, unnamed) == "applied"
    assert ledger.available() == 1000


def test_a_package_that_is_no_longer_on_sale_is_still_delivered(ledger: Ledger) -> None:
    ledger.change("update credits.packages set active = false where code = 'starter'")
    assert deliver(ledger, event()) == "applied"
    assert ledger.available() == 1000


def test_a_frozen_account_receives_what_it_bought(ledger: Ledger) -> None:
    ledger.freeze_account("alpha")
    assert deliver(ledger, event()) == "applied"
    assert ledger.available() == 1000


def test_a_purchase_pays_the_debt_first(ledger: Ledger) -> None:
    grant = ledger.grant(300)
    ledger.use(300)
    ledger.revoke_grant("alpha", grant.grant_id, key="fraud")
    deliver(ledger, event())
    assert ledger.sums() == (700, 0, 700, 0)
    assert ledger.kinds()[-2:] == [("grant", 1000), ("debt_paid", -300)]


def broken(ledger: Ledger) -> None:
    """Make the handler fail after it has done its work."""
    ledger.change(
        "create or replace function credits._on_checkout_session(notice credits.stripe_notice) "
        "returns credits.handler_result language plpgsql as $$ begin "
        "perform credits._grant('alpha', 5, 'bonus', key => 'half', fingerprint => '{}'); "
        "perform 1 / 0; return null; end $$"
    )


def test_a_handler_that_fails_leaves_its_error_and_nothing_else(ledger: Ledger) -> None:
    broken(ledger)
    before = ledger.snapshot()
    assert deliver(ledger, event()) == "failed"
    after = ledger.snapshot()
    assert {name for name in after if after[name] != before[name]} == {"stripe_events"}
    kept = stored(ledger)
    assert (kept.status, kept.payload, kept.attempts) == ("failed", event(), 1)
    assert "22012" in kept.error
    assert kept.next_attempt_at > NOON
    assert deliver(ledger, event()) == "failed"
    later = stored(ledger)
    assert later.attempts == 2
    assert later.next_attempt_at > kept.next_attempt_at


@pytest.mark.parametrize("again", [lambda on: deliver(on, event()), lambda on: on.replay_stripe_event("evt_1").outcome])
def test_a_failed_event_is_applied_when_the_handler_works_again(ledger: Ledger, again: Callable[[Ledger], str]) -> None:
    with ledger.as_owner():
        (working,) = ledger.query(
            "select pg_get_functiondef('credits._on_checkout_session(credits.stripe_notice)'::regprocedure) as text"
        )
    broken(ledger)
    assert deliver(ledger, event()) == "failed"
    with ledger.as_owner():
        ledger.conn.execute(working.text.encode())
    assert again(ledger) == "applied"
    assert (stored(ledger).error, stored(ledger).attempts, stored(ledger).applied_at) == (None, 2, NOON)
    assert ledger.available() == 1000
    assert_sound(ledger)


def test_the_wait_between_attempts_doubles_and_is_bounded(ledger: Ledger) -> None:
    broken(ledger)
    waits = []
    for _ in range(11):
        deliver(ledger, event())
        waits.append(stored(ledger).next_attempt_at - ledger.now)
    assert waits == [MINUTE * 2**n for n in range(8)] + [4 * HOUR] * 3


@pytest.mark.parametrize(
    "odd", ["\\u0000", "\\ud800", "\\udfff", "\\ud800\\ud800", "\\ude00\\ud83d", "\\uD83D", "a\\u0000\\udc00b"]
)
def test_text_that_jsonb_cannot_hold_neither_loses_the_event_nor_the_credits(ledger: Ledger, odd: str) -> None:
    payload = event(custom_text="ODD").replace("ODD", odd)
    assert deliver(ledger, payload) == "applied"
    assert stored(ledger).payload == payload
    assert ledger.available() == 1000


def test_a_pair_of_surrogates_stays_a_character(ledger: Ledger) -> None:
    account_id = "alpha \U0001f600"
    ledger.open(account_id)
    payload = event(metadata={"account_id": account_id, "package": "starter"}, odd="NUL").replace("NUL", "\\u0000")
    assert "\\ud83d\\ude00" in payload
    assert deliver(ledger, payload) == "applied"
    assert ledger.available(account_id) == 1000


@pytest.mark.parametrize("payload", ["{}", '{"id": "evt_1"}', '{"type": null}'])
def test_an_object_that_is_no_event_is_kept_as_failed(ledger: Ledger, payload: str) -> None:
    received = ledger.receive_stripe_event("default", payload)
    assert received.outcome == "failed"
    assert stored(ledger, received.event_id).payload == payload
    assert ledger.receive_stripe_event("default", payload) == received


def test_events_are_listed_the_latest_first_and_by_status_and_type(ledger: Ledger) -> None:
    deliver(ledger, event("evt_1"))
    ledger.now += HOUR
    deliver(ledger, event("evt_2", session_id="cs_2", currency="eur"))
    deliver(ledger, event("evt_3", "unheard.of"))
    ids = partial(map, lambda row: row.event_id)
    assert list(ids(ledger.list_stripe_events())) == ["evt_2", "evt_3", "evt_1"]
    assert list(ids(ledger.list_stripe_events(status="parked"))) == ["evt_2"]
    assert list(ids(ledger.list_stripe_events(type=COMPLETED))) == ["evt_2", "evt_1"]
    assert list(ids(ledger.list_stripe_events(before=ledger.now))) == ["evt_1"]
    assert list(ids(ledger.list_stripe_events(max_rows=1))) == ["evt_2", "evt_3"], "of one moment"


def test_replaying_an_event_that_never_came_is_refused(ledger: Ledger) -> None:
    with refused(404, "event_not_found", event_id="evt_9"):
        ledger.replay_stripe_event("evt_9")


MANY: dict[str, list[str]] = {
    "one event": [event()] * 20,
    "one session under twenty events": [event(f"evt_{n}") for n in range(20)],
    "both types of one session": [event("evt_a"), event("evt_b", SUCCEEDED)] * 10,
    "unpaid and paid": [event("evt_a", payment_status="unpaid"), event("evt_b", SUCCEEDED)] * 10,
}


@pytest.mark.parametrize("what", MANY)
def test_deliveries_from_many_threads_grant_once(database: Database, what: str) -> None:
    with database.connect("credits_owner", autocommit=True) as owner:
        prepare(Ledger(owner, at=None))
    results = together(database, [partial(deliver, payload=payload) for payload in MANY[what]])
    assert not [result for result in results if isinstance(result, CreditsError)]
    counts = Counter(results)
    distinct = len(set(MANY[what]))
    assert counts == Counter({"applied": distinct, "duplicate": 20 - distinct})
    with committed(database) as ledger:
        assert ledger.available() == 1000
        assert_sound(ledger)


def test_two_accounts_racing_for_one_session_are_granted_once(database: Database) -> None:
    names = ("alpha", "beta")
    with committed(database) as ledger:
        prepare(ledger)
        ledger.open("beta")
        payloads = [
            event(f"evt_{n}", metadata={"account_id": names[n % 2], "package": "starter"}, customer=None)
            for n in range(20)
        ]
        assert set(together(database, [partial(deliver, payload=payload) for payload in payloads])) == {"applied"}
        assert sum((ledger.available(name) for name in names), Decimal(0)) == 1000
        assert_sound(ledger)
