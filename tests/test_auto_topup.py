"""Automatic top-up: when it buys, what it asks Stripe for, and that no order of answers and events grants twice."""

import asyncio
import json
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from functools import partial
from itertools import permutations
from typing import Any

import pytest
from ledger_support import DAY, HOUR, MINUTE, SECOND, Ledger, assert_sound, committed, refused, session, together
from psycopg import Connection
from psycopg.types.json import Jsonb
from servers import ONE_ENGINE, Database
from stripe_fake import KEY, StripeFake
from stripe_params import problems

from pgcredits import worker
from pgcredits.db import Database as Pool
from pgcredits.settings import Settings

Json = dict[str, Any]
SUCCEEDED, FAILED, CREATED = "payment_intent.succeeded", "payment_intent.payment_failed", "payment_intent.created"
ASKED_FOR = "authentication_required"
CARD = {"type": "card_error", "code": "card_declined", "decline_code": "insufficient_funds"}


def customer(card: str | None = "pm_1", **more: Any) -> Json:
    """Alpha's customer at Stripe, with its default card."""
    return {
        "id": "cus_1", "object": "customer", "metadata": {"account_id": "alpha"},
        "invoice_settings": {"default_payment_method": card}, **more,
    }  # fmt: skip


def prepare(ledger: Ledger, amount: int = 1000) -> None:
    """Alpha has some credits and a saved card; a starter package is 1000 credits for 1000 cents."""
    ledger.load_demo_catalog()
    ledger.open("alpha", amount)
    ledger.tell("customer.created", customer())


@pytest.fixture
def ledger(conn: Connection[Any]) -> Ledger:
    ledger = Ledger(conn)
    prepare(ledger)
    return ledger


def change_card(ledger: Ledger, card: str | None = "pm_2", **more: Any) -> None:
    """A second later Alpha has another default card."""
    ledger.now += SECOND
    assert ledger.tell("customer.updated", customer(card, **more)) == "applied"


def rule(ledger: Ledger, threshold: Any = 100, cap: int = 10000, **more: Any) -> Any:
    """Alpha's rule: below the threshold, starter packages."""
    return ledger.set_auto_topup("alpha", threshold, more.pop("package", "starter"), cap, **more)


def started(ledger: Ledger, amount: Any = 950, **more: Any) -> Any:
    """A rule, and a spend that crosses it; the request."""
    rule(ledger, **more)
    ledger.use(amount)
    return request(ledger)


def requests(ledger: Ledger) -> list[Any]:
    """Payments that Stripe was asked for."""
    return ledger.table("stripe_requests", "purpose = 'top_up' order by request_id")


def request(ledger: Ledger) -> Any:
    """The last of them."""
    return requests(ledger)[-1]


def intent(ledger: Ledger, status: str = "succeeded", number: int = -1, **changes: Any) -> Json:
    """The payment of an attempt as Stripe shows it."""
    asked = requests(ledger)[number]
    paid = asked.params["amount"] if status == "succeeded" else 0
    return {
        "id": f"pi_{asked.request_id}", "object": "payment_intent", "status": status, "amount_received": paid,
        "currency": "usd", "customer": "cus_1", "metadata": asked.params["metadata"], **changes,
    }  # fmt: skip


def answer(ledger: Ledger, body: Json, status: int = 200, number: int = -1) -> str:
    """Stripe answers the request of an attempt; its state afterwards."""
    state: str = ledger.complete_stripe_request(requests(ledger)[number].request_id, status, json.dumps(body)).state
    return state


def decline(ledger: Ledger, **error: Any) -> str:
    """The card is declined."""
    said = {**CARD, **error}
    payment = intent(ledger, "requires_payment_method", last_payment_error=said)
    return answer(ledger, {"error": {**said, "payment_intent": payment}}, 402)


def declined_event(ledger: Ledger, **error: Any) -> str:
    """The same, told by an event."""
    return ledger.tell(FAILED, intent(ledger, "requires_payment_method", last_payment_error={**CARD, **error}))


def told(ledger: Ledger) -> list[str]:
    """What alpha hears of it, without the prefix."""
    rows = ledger.table("notifications", "type like 'top_up%%' order by notification_id")
    return [row.type.removeprefix("top_up_") for row in rows]


def how(ledger: Ledger) -> tuple[str, str | None, str | None]:
    """State of the rule, why it is paused, and the state of its attempt."""
    row = ledger.get_auto_topup("alpha")
    return row.state, row.paused_reason, row.top_up_state


def purchases(ledger: Ledger) -> list[str]:
    """The states of purchases, the oldest first."""
    return [row.status for row in reversed(ledger.list_purchases(account_id="alpha"))]


# The rule ------------------------------------------------------------------------------------------------------------


def test_it_is_off_until_a_rule_says_otherwise(ledger: Ledger) -> None:
    assert how(ledger) == ("off", None, None)
    ledger.use(1000)
    assert requests(ledger) == []
    first = rule(ledger, threshold="100.50", daily_cap=5000, cap=20000)
    assert (first.state, first.threshold, first.package) == ("active", Decimal("100.5"), "starter")
    assert (first.monthly_cap, first.daily_cap, first.currency) == (20000, 5000, "usd")
    assert (first.cool_down, first.payment_method) == (10 * MINUTE, "pm_1")
    assert len(requests(ledger)) == 1, "too little is there already: it buys at once"
    assert (first.month_used, first.day_used, first.top_up_state) == (1000, 1000, "queued")
    with ledger.conn.transaction(force_rollback=True):
        assert ledger.remove_auto_topup("alpha").top_up_state is None
        assert (ledger.claim_stripe_requests(), purchases(ledger)) == ([], ["failed"]), "nobody has sent it yet"
        assert_sound(ledger)
    ledger.claim_stripe_requests()
    ledger.remove_auto_topup("alpha")
    with ledger.unchanged():
        assert ledger.remove_auto_topup("alpha").state == "off"
        assert ledger.remove_auto_topup("alpha").top_up_state == "sent"
        assert ledger.get_auto_topup("alpha").threshold == Decimal("100.5")
    assert answer(ledger, intent(ledger)) == "done"
    assert (ledger.available(), how(ledger)) == (1000, ("off", None, None))
    ledger.now += HOUR
    ledger.use(1000)
    assert len(requests(ledger)) == 1
    assert_sound(ledger)


def test_a_rule_needs_a_customer_with_a_card_and_a_package_that_is_sold(ledger: Ledger) -> None:
    ledger.change("update credits.packages set active = false where code = 'pro'")
    ledger.open("beta", 5)
    with ledger.unchanged():
        with refused(404, "package_not_found", package="pro"):
            rule(ledger, package="pro")
        for more in ({"cap": 999}, {"daily_cap": 999}, {"cool_down": 30 * SECOND}, {"cool_down": 31 * DAY}):
            with refused(400, "invalid_request", argument="monthly_cap" if "cap" in more else next(iter(more))):
                rule(ledger, **more)
        with refused(404, "customer_not_found", account_id="beta"):
            ledger.set_auto_topup("beta", 1, "starter", 1000)
    change_card(ledger, None)
    with ledger.unchanged(), refused(409, "card_missing", customer_id="cus_1"):
        rule(ledger)
    kept = {"id": "pm_9", "object": "payment_method", "customer": "cus_1"}
    ledger.tell("payment_method.attached", kept)
    assert rule(ledger).payment_method == "pm_9", "a card that Checkout has kept is no default one"
    ledger.now += SECOND
    ledger.tell("payment_method.detached", {**kept, "customer": None})
    assert ledger.get_auto_topup("alpha").payment_method is None
    ledger.use(1000)
    assert (how(ledger), told(ledger)) == (("paused", "card_missing", None), ["paused"])
    change_card(ledger)
    assert how(ledger) == ("active", None, "queued")
    assert request(ledger).params["payment_method"] == "pm_2"


# When it buys --------------------------------------------------------------------------------------------------------


def test_a_debit_that_leaves_too_little_asks_for_one_payment(ledger: Ledger) -> None:
    rule(ledger)
    ledger.use(900)
    assert (ledger.available(), requests(ledger)) == (100, [])
    ledger.use(1)
    asked = request(ledger)
    (top_up,) = ledger.table("top_ups")
    (purchase,) = ledger.table("purchases")
    assert (asked.method, asked.path, asked.account_id, asked.ref) == (
        "post", "/v1/payment_intents", "alpha", top_up.top_up_id,
    )  # fmt: skip
    assert problems("post", asked.path, asked.params) == []
    assert asked.params == {
        "amount": 1000, "currency": "usd", "customer": "cus_1", "payment_method": "pm_1", "description": "Starter",
        "automatic_payment_methods": {"enabled": True, "allow_redirects": "never"},
        "confirm": True, "off_session": True, "error_on_requires_action": True,
        "metadata": {
            "account_id": "alpha", "top_up_id": top_up.top_up_id, "purchase_id": str(purchase.purchase_id),
            "package": "starter", "quantity": "1",
        },
    }  # fmt: skip
    assert (purchase.status, purchase.credits, purchase.amount) == ("pending", 1000, 1000)
    with ledger.unchanged("balances", "entries", "grants"):
        ledger.use(1)
    with ledger.unchanged():
        assert rule(ledger).top_up_id == top_up.top_up_id
    assert told(ledger) == ["started"]
    assert_sound(ledger)


@pytest.mark.parametrize("general", [False, True])
def test_every_way_to_use_credits_looks(ledger: Ledger, general: bool) -> None:
    """The usual case, and the general way."""
    ledger.open("beta")
    ledger.set_member("alpha", "m1")
    rule(ledger)
    if general:
        ledger.grant(1, scope=["songs"])
    ledger.reserve("alpha", 500, "early")
    ledger.set_debt_limit("alpha", 2000)
    ways: list[Callable[[], Any]] = [
        lambda: ledger.use(450),
        lambda: ledger.use(450, member_id="m1"),
        lambda: ledger.spend_many([{"account_id": "alpha", "amount": n, "key": str(n)} for n in (300, 150)]),
        lambda: ledger.spend_many([{"account_id": "alpha", "amount": 450, "key": "k", "capability": "songs"}]),
        lambda: ledger.reserve("alpha", 450, "r"),
        lambda: ledger.reserve("alpha", 450, "r", min_amount=1),
        lambda: ledger.settle("alpha", "early", 950),
        lambda: ledger.settle("alpha", "early", 2000, on_overage="overflow"),
        lambda: ledger.transfer_credits("alpha", "beta", 450, key="gift"),
    ]
    for way in ways:
        with ledger.conn.transaction(force_rollback=True):
            assert requests(ledger) == []
            way()
            (asked,) = requests(ledger)
            packs = asked.params["amount"] // 1000
            assert packs == (2 if ledger.available() < -900 else 1)
            assert_sound(ledger)
    ledger.capture("alpha", "early", 500, key="c")
    ledger.settle("alpha", "early", 0)
    assert requests(ledger) == [], "what was held is not available before or after"


def test_the_gap_is_closed_in_one_payment_debt_included(ledger: Ledger) -> None:
    ledger.set_debt_limit("alpha", 5000)
    ledger.reserve("alpha", 1000, "r")
    rule(ledger, threshold=1000)
    assert request(ledger).params["amount"] == 2000, "1000 would end at the threshold, not above it"
    ledger.settle("alpha", "r", 3500, on_overage="overflow")
    answer(ledger, intent(ledger))
    assert (ledger.available(), how(ledger)) == (-500, ("active", None, None))
    ledger.now += 10 * MINUTE
    assert ledger.run_auto_topups() == 1
    assert request(ledger).params["amount"] == 2000
    answer(ledger, intent(ledger))
    assert ledger.available() == 1500
    assert_sound(ledger)


def test_the_price_is_that_of_the_moment_it_was_asked_for(ledger: Ledger) -> None:
    started(ledger)
    ledger.change("update credits.packages set price = 9000, credits = 1, active = false where code = 'starter'")
    answer(ledger, intent(ledger))
    (purchase,) = ledger.table("purchases")
    assert (purchase.amount, purchase.credits, purchase.status) == (1000, 1000, "completed")
    assert ledger.available() == 1050
    ledger.now += HOUR
    ledger.use(1000)
    assert (len(requests(ledger)), told(ledger)) == (1, ["started", "done", "refused"])
    ledger.change("update credits.packages set price = 1500, credits = 1000, active = true where code = 'starter'")
    ledger.now += HOUR
    ledger.run_auto_topups()
    assert request(ledger).params["amount"] == 1500


def test_what_expires_is_looked_at_by_the_job_and_a_spend_takes_the_whole_gap(ledger: Ledger) -> None:
    ledger.grant(2000, expires_at=ledger.now + HOUR)
    rule(ledger, threshold=1500)
    ledger.now += HOUR
    assert ledger.run_auto_topups() == 0, "nobody has booked it yet"
    with ledger.conn.transaction(force_rollback=True):
        ledger.use(990)
        assert request(ledger).params["amount"] == 2000, "one payment for what expired and what was spent"
    ledger.book()
    assert requests(ledger) == []
    assert ledger.run_auto_topups() == 1
    assert request(ledger).params["amount"] == 1000
    assert ledger.run_auto_topups() == 0
    assert_sound(ledger)


@pytest.mark.parametrize(
    ("reason", "more", "change"),
    [
        ("monthly_cap", {"cap": 1999, "threshold": 1000}, "select"),
        ("daily_cap", {"daily_cap": 1999, "threshold": 1000}, "select"),
        ("amount_too_large", {"cap": 10**15, "threshold": 100_000_000}, "select"),
        ("package_not_sold", {}, "update credits.packages set active = false"),
        ("currency_changed", {}, "update credits.packages set currency = 'eur'"),
        ("account_frozen", {}, "update credits.balances set status = 'frozen' where account_id = 'alpha'"),
    ],
)
def test_what_a_rule_forbids_is_not_bought_and_no_debit_fails_for_it(
    ledger: Ledger, reason: str, more: Json, change: str
) -> None:
    ledger.reserve("alpha", 10, "r")
    ledger.grant(10**9, key="much")
    rule(ledger, **more)
    ledger.change(change)
    (much,) = ledger.table("grants", "key = 'much'")
    ledger.revoke_grant("alpha", much.grant_id, key="back")
    ledger.settle("alpha", "r", 1000)
    assert (ledger.available(), requests(ledger), told(ledger)) == (0, [], ["refused"])
    (row,) = ledger.table("notifications", "type = 'top_up_refused'")
    assert (row.data["reason"], row.account_id) == (reason, "alpha")
    assert ledger.get_auto_topup("alpha").check_at == ledger.now + HOUR
    ledger.now += HOUR
    assert ledger.run_auto_topups() == 1
    if reason not in ("package_not_sold", "currency_changed"):
        assert rule(ledger, **more).month_used == 0
    assert (requests(ledger), told(ledger)) == ([], ["refused"]), "told once"


@ONE_ENGINE
def test_a_refusal_is_told_once_in_whatever_time_zone_a_session_is(ledger: Ledger) -> None:
    started(ledger, cap=1000)
    answer(ledger, intent(ledger))
    ledger.use(1000)
    ledger.now += HOUR
    assert ledger.run_auto_topups() == 1
    assert told(ledger) == ["started", "done", "refused"]
    ledger.conn.execute("set local time zone 'Asia/Tokyo'")
    ledger.now += HOUR
    assert ledger.run_auto_topups() == 1
    assert told(ledger) == ["started", "done", "refused"]


def test_caps_and_cool_down_are_counted_from_rows_over_a_moving_window(ledger: Ledger) -> None:
    rule(ledger, cap=3000, daily_cap=2000)
    started_at: list[timedelta] = []
    first = ledger.now
    while ledger.now < first + 31 * DAY:
        if how(ledger)[2]:
            answer(ledger, intent(ledger))
        if ledger.available() >= 950:
            ledger.use(ledger.available() - 50)
        ledger.run_auto_topups()
        if len(requests(ledger)) > len(started_at):
            started_at.append(ledger.now - first)
        ledger.now += 5 * MINUTE if ledger.now < first + HOUR else 6 * HOUR
    assert started_at[:2] == [SECOND * 0, 10 * MINUTE]
    assert len(started_at) == 5
    assert DAY <= started_at[2] <= DAY + 7 * HOUR
    assert 30 * DAY <= started_at[3] <= 30 * DAY + 7 * HOUR
    assert ledger.get_auto_topup("alpha").month_used <= 3000
    assert_sound(ledger)


# What becomes of it --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "steps",
    [
        *permutations(("created", "answer", "event")),
        ("event",), ("answer",), ("event", "event", "answer", "answer"), ("processing", "event"),
        ("requires_action", "answer"), ("failed", "event"), ("canceled", "answer"),
    ],
    ids=" ".join,
)  # fmt: skip
def test_answer_and_events_grant_once_in_any_order(ledger: Ledger, steps: tuple[str, ...]) -> None:
    started(ledger)
    ledger.claim_stripe_requests()
    for step in steps:
        if step == "answer":
            assert answer(ledger, intent(ledger)) == "done"
        elif step == "event":
            assert ledger.tell(SUCCEEDED, intent(ledger)) == "applied"
        elif step == "failed":
            assert declined_event(ledger) == "applied"
        elif step == "created":
            assert ledger.tell(CREATED, intent(ledger, "requires_payment_method")) == "applied"
        else:
            assert ledger.tell(f"payment_intent.{step}", intent(ledger, step)) == "applied"
            ledger.change("delete from credits.stripe_objects where kind = 'payment_intent'")
    (purchase,) = ledger.table("purchases")
    assert (purchase.status, purchase.stripe_payment_intent_id) == ("completed", f"pi_{request(ledger).request_id}")
    assert (ledger.available(), how(ledger)) == (1050, ("active", None, None))
    assert told(ledger).count("done") == 1
    assert ("failed" in told(ledger)) == ({"failed", "canceled"} & {*steps} != set())
    (paid,) = ledger.table("stripe_payments")
    assert (paid.source_kind, paid.source_id, paid.account_id) == ("top_up", paid.payment_id, "alpha")
    (grant,) = ledger.table("grants", "kind = 'purchase'")
    assert (grant.cost, grant.cost_currency) == (1000, "usd")
    ledger.use(900)
    assert len(requests(ledger)) == 1
    assert_sound(ledger)


def test_money_that_does_not_fit_waits_for_somebody_to_look(ledger: Ledger) -> None:
    started(ledger)
    for changes in ({"amount_received": 999}, {"currency": "eur"}, {"customer": "cus_2"}):
        with ledger.conn.transaction(force_rollback=True):
            assert ledger.tell(SUCCEEDED, intent(ledger, **changes)) == "parked"
            assert how(ledger) == ("active", None, "queued")
    for metadata in ({"account_id": "alpha", "top_up_id": "of another database"}, {"account_id": "alpha"}):
        assert ledger.tell(SUCCEEDED, intent(ledger, id="pi_other", metadata=metadata)) == "applied"
    assert ledger.available() == 50
    assert ledger.tell(SUCCEEDED, intent(ledger)) == "applied"
    assert ledger.tell(SUCCEEDED, intent(ledger, id="pi_again"), "evt_again") == "parked"
    assert ledger.event("evt_again").reason == "top_up_paid_twice"
    assert ledger.available() == 1050
    assert_sound(ledger)


def test_a_purchase_cannot_pass_for_an_attempt(ledger: Ledger) -> None:
    """What a buyer says of a checkout goes on to its payment: one payment would be granted twice."""
    started(ledger)
    decline(ledger)
    (attempt,) = ledger.table("top_ups")
    forged = Jsonb({"top_up_id": attempt.top_up_id})
    with refused(400, "invalid_request", argument="metadata"):
        ledger.create_checkout("alpha", package="starter", success_url="http://localhost", key="k", metadata=forged)


def copied(ledger: Ledger) -> dict[str, tuple[str, Json]]:
    """A checkout whose payment carries the metadata of an attempt, in the words of both."""
    payment = intent(ledger, id="pi_1")
    return {"session": ("checkout.session.completed", session()), "payment": (SUCCEEDED, payment)}


@pytest.mark.parametrize("order", list(permutations(("session", "payment", "refund"))), ids=" ".join)
def test_a_payment_that_two_claim_buys_once_whichever_comes_first(ledger: Ledger, order: tuple[str, ...]) -> None:
    started(ledger)
    about = {"id": "re_1", "object": "refund", "payment_intent": "pi_1", "charge": None, "currency": "usd"}
    said = copied(ledger) | {"refund": ("refund.created", {**about, "amount": 400, "status": "succeeded"})}
    for name in order:
        ledger.tell(*said[name], f"evt_{name}")
    for name in order[::-1]:
        ledger.replay_stripe_event(f"evt_{name}")
    first, second = (name for name in order if name != "refund")
    assert [ledger.event(f"evt_{name}").status for name in (first, second)] == ["applied", "parked"]
    assert ledger.event(f"evt_{second}").reason == "payment_granted_before"
    (purchase,) = ledger.table("purchases", "grant_id is not null")
    assert (purchase.status, purchase.amount_refunded, purchase.stripe_payment_intent_id) == (
        "partially_refunded", 400, "pi_1",
    )  # fmt: skip
    assert (purchase.stripe_session_id is None) == (first == "payment")
    assert ledger.available() == 650
    assert_sound(ledger)


def test_a_payment_that_two_claim_at_once_buys_once(database: Database) -> None:
    with committed(database) as ledger:
        prepare(ledger)
        started(ledger)
        said = [*copied(ledger).values()]
        told_at_once = together(
            database,
            [
                partial(Ledger.tell, event_type=said[n % 2][0], about=said[n % 2][1], event_id=f"evt_{n}")
                for n in range(12)
            ],
        )
        assert {*told_at_once} == {"applied", "parked"}
        assert ledger.available() == 1050
        assert_sound(ledger)


def test_a_decline_lets_the_card_rest_for_a_day_and_the_third_one_for_good(ledger: Ledger) -> None:
    started(ledger)
    for number in (1, 2, 3):
        assert len(requests(ledger)) == number
        assert decline(ledger) == "declined"
        with ledger.unchanged("stripe_events", "stripe_objects"):
            declined_event(ledger)
        assert purchases(ledger) == ["failed"] * number
        ledger.now += DAY - SECOND
        ledger.use(1)
        ledger.run_auto_topups()
        assert len(requests(ledger)) == number
        ledger.now += SECOND
        ledger.run_auto_topups()
    assert how(ledger) == ("paused", "declined", None)
    assert told(ledger) == ["started", "failed"] * 3 + ["paused"]
    assert ledger.get_auto_topup("alpha").month_used == 0
    with ledger.unchanged("auto_topups"):
        assert rule(ledger).state == "paused", "the same card is not asked again"
    change_card(ledger)
    assert (how(ledger), told(ledger)[-2:]) == (("active", None, "queued"), ["resumed", "started"])
    decline(ledger)
    assert how(ledger) == ("active", None, None), "of the new card it was the first"
    (row,) = ledger.table("notifications", "type = 'top_up_failed' order by notification_id desc limit 1")
    assert (row.data["code"], row.data["decline_code"], row.data["payment_method"]) == (
        "card_declined", "insufficient_funds", "pm_2",
    )  # fmt: skip
    assert_sound(ledger)


@pytest.mark.parametrize("tell", [decline, declined_event])
@pytest.mark.parametrize(
    ("error", "reason", "heard"),
    [
        ({"code": ASKED_FOR}, ASKED_FOR, ["failed", "action_required", "paused"]),
        ({"decline_code": ASKED_FOR}, ASKED_FOR, ["failed", "action_required", "paused"]),
        ({"advice_code": "do_not_try_again"}, "do_not_try_again", ["failed", "paused"]),
    ],
)  # fmt: skip
def test_a_hard_decline_pauses_until_the_card_changes(
    ledger: Ledger, tell: Any, error: Json, reason: str, heard: list[str]
) -> None:
    started(ledger)
    tell(ledger, **error)
    assert (how(ledger), told(ledger)) == (("paused", reason, None), ["started", *heard])
    change_card(ledger, "pm_1", name="Alpha")
    ledger.now += 40 * DAY
    ledger.use(1)
    rule(ledger)
    ledger.run_auto_topups()
    assert (how(ledger), len(requests(ledger))) == (("paused", reason, None), 1)
    change_card(ledger)
    assert (how(ledger), len(requests(ledger))) == (("active", None, "queued"), 2)


def test_news_of_an_older_card_do_not_make_it_the_one_that_is_charged(ledger: Ledger) -> None:
    change_card(ledger, None)
    for name in ("pm_old", "pm_new"):
        ledger.now += DAY
        made = int(ledger.now.timestamp())
        card = {"id": name, "object": "payment_method", "customer": "cus_1", "created": made}
        ledger.tell("payment_method.attached", card)
        if name == "pm_old":
            old = card
    started(ledger)
    decline(ledger, advice_code="do_not_try_again")
    ledger.now += DAY
    ledger.tell("payment_method.automatically_updated", {**old, "card": {"exp_year": 2040}})
    assert (ledger.get_auto_topup("alpha").payment_method, len(requests(ledger))) == ("pm_new", 1)
    assert how(ledger) == ("paused", "do_not_try_again", None)
    ledger.now += SECOND
    ledger.tell("payment_method.detached", {**card, "customer": None})
    change_card(ledger, None, name="Alpha")
    assert (how(ledger), request(ledger).params["payment_method"]) == (("active", None, "queued"), "pm_old")


def test_a_card_that_changed_while_the_old_one_was_declined_is_tried(ledger: Ledger) -> None:
    started(ledger)
    change_card(ledger)
    decline(ledger, code="authentication_required")
    assert (how(ledger), len(requests(ledger))) == (("active", None, None), 1)
    ledger.now += 10 * MINUTE
    ledger.run_auto_topups()
    assert request(ledger).params["payment_method"] == "pm_2"


def test_no_detour_ends_a_pause_or_asks_a_card_again(ledger: Ledger) -> None:
    started(ledger)
    ledger.claim_stripe_requests()
    with ledger.conn.transaction(force_rollback=True):
        ledger.change("select credits._pause_top_up('alpha', 'disputed')")
        decline(ledger, code=ASKED_FOR)
        change_card(ledger)
        assert how(ledger) == ("paused", "disputed", None)
    ledger.remove_auto_topup("alpha")
    decline(ledger, code=ASKED_FOR)
    ledger.now += 2 * DAY
    assert (how(ledger)[0], rule(ledger).paused_reason, len(requests(ledger))) == ("off", ASKED_FOR, 1)
    change_card(ledger)
    assert (how(ledger), len(requests(ledger))) == (("active", None, "queued"), 2)


@pytest.mark.parametrize("first", ["card", "dispute"])
def test_a_dispute_does_not_make_a_card_forget_that_it_said_no(ledger: Ledger, first: str) -> None:
    started(ledger)
    ledger.claim_stripe_requests()
    for step in (first, *{"card", "dispute"} - {first}):
        if step == "card":
            decline(ledger, advice_code="do_not_try_again")
        else:
            ledger.change("select credits._pause_top_up('alpha', 'disputed')")
    assert how(ledger) == ("paused", "disputed", None)
    ledger.now += 2 * DAY
    assert (rule(ledger).paused_reason, rule(ledger).state, len(requests(ledger))) == ("do_not_try_again", "paused", 1)
    change_card(ledger)
    assert (how(ledger), request(ledger).params["payment_method"]) == (("active", None, "queued"), "pm_2")


def test_another_card_does_not_end_a_dispute(ledger: Ledger) -> None:
    started(ledger)
    decline(ledger, code=ASKED_FOR)
    ledger.change("select credits._pause_top_up('alpha', 'disputed')")
    change_card(ledger)
    assert how(ledger) == ("paused", "disputed", None)
    assert (rule(ledger).state, len(requests(ledger))) == ("active", 1), "it cools down"
    ledger.now += 10 * MINUTE
    ledger.run_auto_topups()
    assert request(ledger).params["payment_method"] == "pm_2"


def test_a_card_rests_its_day_whatever_other_cards_were_asked_since(ledger: Ledger) -> None:
    started(ledger)
    decline(ledger)
    since = ledger.now
    for card in ("pm_2", "pm_1"):
        ledger.now += HOUR
        change_card(ledger, card)
        if card == "pm_2":
            decline(ledger)
    assert len(requests(ledger)) == 2, "the first card was asked this very day"
    assert ledger.get_auto_topup("alpha").check_at == since + DAY
    ledger.now = since + DAY
    ledger.run_auto_topups()
    assert [row.params["payment_method"] for row in requests(ledger)] == ["pm_1", "pm_2", "pm_1"]


def test_a_card_that_was_never_asked_does_not_rest(ledger: Ledger) -> None:
    started(ledger)
    ledger.now += MINUTE
    ledger.remove_auto_topup("alpha")
    assert purchases(ledger) == ["failed"]
    assert rule(ledger).check_at == ledger.now + 9 * MINUTE, "the cool-down alone"
    ledger.now += 9 * MINUTE
    ledger.run_auto_topups()
    assert (how(ledger), purchases(ledger)) == (("active", None, "queued"), ["failed", "pending"])


def test_a_cap_and_a_rest_are_as_long_in_every_time_zone(ledger: Ledger) -> None:
    ledger.now = datetime(2030, 3, 15, 12, tzinfo=UTC)
    started(ledger, cap=1000)
    answer(ledger, intent(ledger))
    ledger.now += 30 * DAY - SECOND
    for zone in ("UTC", "Europe/Berlin", "America/New_York"):  # summer time began in between
        ledger.conn.execute(f"set local time zone '{zone}'")
        assert ledger.get_auto_topup("alpha").month_used == 1000, zone
    ledger.now = datetime(2030, 3, 30, 12, tzinfo=UTC)
    ledger.conn.execute("set local time zone 'Europe/Berlin'")
    rule(ledger, threshold=1500)
    decline(ledger)
    ledger.run_auto_topups()
    assert ledger.get_auto_topup("alpha").check_at == ledger.now + DAY


def test_what_stripe_does_not_take_pauses_until_somebody_has_looked(ledger: Ledger) -> None:
    started(ledger)
    assert answer(ledger, {"error": {"type": "invalid_request_error", "code": "amount_too_small"}}, 400) == "failed"
    assert (how(ledger), purchases(ledger)) == (("paused", "request_failed", None), ["failed"])
    with refused(409, "request_not_failed"):
        ledger.retry_stripe_request(request(ledger).request_id)
    change_card(ledger)
    assert how(ledger)[0] == "paused"
    ledger.now += DAY
    assert (rule(ledger).state, len(requests(ledger))) == ("active", 2)


def test_a_card_that_was_detached_unheard_is_found_out(ledger: Ledger) -> None:
    started(ledger)
    refusal = {"type": "invalid_request_error", "code": "resource_missing", "param": "payment_method"}
    answer(ledger, {"error": refusal}, 400)
    assert how(ledger) == ("paused", "request_failed", None)
    ledger.now += MINUTE
    (look,) = ledger.claim_stripe_requests()
    assert look.path == "/v1/payment_methods/pm_1"
    card = {"id": "pm_1", "object": "payment_method", "customer": None}
    ledger.complete_stripe_request(look.request_id, 200, json.dumps(card))
    with refused(409, "card_missing"):
        rule(ledger)


def test_a_payment_that_waits_for_its_buyer_is_let_go_of_when_the_card_changes(ledger: Ledger) -> None:
    started(ledger)
    assert answer(ledger, intent(ledger, "requires_action")) == "done"
    assert (how(ledger), told(ledger)) == (("active", None, "requires_action"), ["started", "action_required"])
    assert purchases(ledger) == ["processing"]
    ledger.now += DAY
    ledger.use(1)
    assert len(requests(ledger)) == 1
    change_card(ledger)
    (cancel,) = ledger.table("stripe_requests", "purpose = 'cancel_top_up'")
    assert problems(cancel.method, cancel.path, cancel.params) == []
    ledger.complete_stripe_request(cancel.request_id, 200, json.dumps(intent(ledger, "canceled")))
    assert [row.state for row in ledger.table("top_ups", "true order by created_at")] == ["failed", "queued"]
    assert (request(ledger).params["payment_method"], purchases(ledger)) == ("pm_2", ["failed", "pending"])
    assert_sound(ledger)


@pytest.mark.parametrize("change", [change_card, Ledger.remove_auto_topup, partial(rule, threshold=50)])
def test_it_is_let_go_of_too_where_that_it_waits_is_known_later(ledger: Ledger, change: Callable[..., Any]) -> None:
    started(ledger)
    ledger.claim_stripe_requests()
    ledger.now += MINUTE
    change(ledger, *(["alpha"] if change is Ledger.remove_auto_topup else []))
    assert answer(ledger, intent(ledger, "requires_action")) == "done"
    (cancel,) = ledger.table("stripe_requests", "purpose = 'cancel_top_up'")
    ledger.complete_stripe_request(cancel.request_id, 200, json.dumps(intent(ledger, "canceled", 0)))
    assert how(ledger)[2] in {None, "queued"}


def test_who_is_erased_is_not_topped_up(ledger: Ledger) -> None:
    rule(ledger)
    assert ledger.erase_account("alpha").forfeited == 1000
    assert (requests(ledger), how(ledger)) == ([], ("off", None, None))
    ledger.run_auto_topups()
    assert requests(ledger) == []
    assert_sound(ledger)


def test_a_payment_that_was_not_sent_is_let_go_with_its_account(ledger: Ledger) -> None:
    started(ledger)
    assert ledger.erase_account("alpha").forfeited == 50
    assert ledger.claim_stripe_requests() == []
    assert_sound(ledger)


def test_who_has_a_payment_on_its_way_is_not_erased(ledger: Ledger) -> None:
    started(ledger)
    answer(ledger, intent(ledger, "processing"))
    with ledger.unchanged(), refused(409, "account_in_use", requests=0, top_ups=1):
        ledger.erase_account("alpha")
    ledger.tell(SUCCEEDED, intent(ledger))
    assert ledger.erase_account("alpha").forfeited == 1050
    assert_sound(ledger)


@pytest.mark.parametrize("status", ["processing", "requires_action"])
def test_a_payment_on_its_way_whose_event_is_lost_is_asked_about(ledger: Ledger, status: str) -> None:
    started(ledger)
    ledger.claim_stripe_requests()
    answer(ledger, intent(ledger, status))
    for _ in range(2):
        ledger.now += DAY - MINUTE
        ledger.run_auto_topups()
        assert ledger.claim_stripe_requests() == [], "there was news within a day"
        ledger.now += MINUTE
        for _ in range(2):
            ledger.run_auto_topups()
        (look,) = ledger.claim_stripe_requests()
        assert (look.method, look.path) == ("get", f"/v1/payment_intents/{intent(ledger)['id']}")
        ledger.complete_stripe_request(look.request_id, 200, json.dumps(intent(ledger, status)))
    for missed in (True, False):
        ledger.now += DAY
        ledger.run_auto_topups()
        (look,) = ledger.claim_stripe_requests()
        said = {"error": {"code": "resource_missing"}} if missed else intent(ledger)
        ledger.complete_stripe_request(look.request_id, 404 if missed else 200, json.dumps(said))
        ledger.run_auto_topups()
        assert ledger.claim_stripe_requests() == []
    assert (ledger.available(), purchases(ledger)) == (1050, ["completed"])
    ledger.now += 2 * DAY
    ledger.run_auto_topups()
    assert ledger.claim_stripe_requests() == []
    assert_sound(ledger)


def test_an_outcome_that_is_not_known_keeps_the_attempt_open(ledger: Ledger) -> None:
    number = started(ledger).request_id
    ledger.claim_stripe_requests()
    assert how(ledger) == ("active", None, "sent")
    ledger.now += DAY
    ledger.claim_stripe_requests()
    ledger.now += 40 * DAY
    ledger.use(1)
    ledger.run_auto_topups()
    assert (how(ledger), len(requests(ledger))) == (("active", None, "unknown"), 1)
    with ledger.conn.transaction(force_rollback=True):
        assert ledger.tell(SUCCEEDED, intent(ledger)) == "applied"
        assert (how(ledger), request(ledger).state) == (("active", None, None), "done")
        assert_sound(ledger)
    with ledger.conn.transaction(force_rollback=True):
        declined_event(ledger)
        assert how(ledger) == ("active", None, None)
        with refused(409, "request_not_failed", state="done"):
            ledger.retry_stripe_request(number)
    assert ledger.retry_stripe_request(number).state == "queued", "an operator has looked: it was not done"
    assert how(ledger) == ("active", None, "queued")
    answer(ledger, intent(ledger))
    assert (ledger.available(), [row.state for row in requests(ledger)]) == (1049, ["failed", "done"])


@pytest.mark.parametrize("tells", [SUCCEEDED, FAILED])
def test_what_an_operator_asks_anew_is_not_sent_once_an_event_has_told(ledger: Ledger, tells: str) -> None:
    number = started(ledger).request_id
    payment = intent(ledger)
    ledger.claim_stripe_requests()
    ledger.now += DAY
    ledger.claim_stripe_requests()
    again = ledger.retry_stripe_request(number).request_id
    if tells == SUCCEEDED:
        ledger.tell(SUCCEEDED, payment)
    else:
        declined_event(ledger)
    assert (ledger.claim_stripe_requests(), [row.state for row in requests(ledger)]) == ([], ["failed", "failed"])
    assert request(ledger).error_type == "withdrawn"
    with refused(409, "request_not_failed"):
        ledger.retry_stripe_request(again)
    assert purchases(ledger) == ["completed" if tells == SUCCEEDED else "failed"]
    assert_sound(ledger)


def test_what_is_spent_before_the_credits_land_waits_for_the_cool_down(ledger: Ledger) -> None:
    started(ledger)
    answer(ledger, intent(ledger))
    ledger.use(1040)
    assert len(requests(ledger)) == 1
    assert ledger.get_auto_topup("alpha").check_at == ledger.now + 10 * MINUTE
    ledger.now += 10 * MINUTE
    ledger.run_auto_topups()
    assert len(requests(ledger)) == 2


# Money that goes back ------------------------------------------------------------------------------------------------


def refund(ledger: Ledger, amount: int, status: str = "succeeded") -> str:
    """Of the first top-up."""
    return ledger.tell("refund.updated", {
        "id": "re_1", "object": "refund", "payment_intent": intent(ledger, number=0)["id"], "charge": None,
        "amount": amount, "currency": "usd", "status": status,
    })  # fmt: skip


def dispute(ledger: Ledger, payment: str, status: str = "needs_response") -> str:
    return ledger.tell("charge.dispute.created", {
        "id": "dp_1", "object": "dispute", "payment_intent": payment, "charge": None, "amount": 1000, "currency": "usd",
        "status": status,
    })  # fmt: skip


def test_a_refunded_top_up_takes_its_credits_back_and_buys_no_more(ledger: Ledger) -> None:
    started(ledger)
    answer(ledger, intent(ledger))
    ledger.use(900)
    ledger.now += HOUR
    (purchase,) = ledger.list_purchases(account_id="alpha")
    asked = ledger.request_refund("alpha", purchase.purchase_id, amount=400, key="k")
    assert (asked.state, asked.refundable) == ("queued", 600)
    assert refund(ledger, 1000) == "applied"
    assert (ledger.available(), purchases(ledger)) == (-850, ["refunded"])
    assert (how(ledger), told(ledger)[-1]) == (("paused", "refunded", None), "paused")
    ledger.now += 40 * DAY
    change_card(ledger)
    ledger.run_auto_topups()
    assert (len(requests(ledger)), how(ledger)[0]) == (1, "paused")
    assert (rule(ledger).state, len(requests(ledger))) == ("active", 2), "whoever wants it again says so"
    with ledger.unchanged("stripe_events", "stripe_objects", "refund_requests", "purchases"):
        refund(ledger, 1000)
    assert_sound(ledger)


@pytest.mark.parametrize("of", ["top_up", "session", "invoice", "refund of a session"])
def test_a_dispute_of_any_payment_ends_it(ledger: Ledger, of: str) -> None:
    if of == "top_up":
        started(ledger)
        answer(ledger, intent(ledger))
        payment = intent(ledger)["id"]
    elif of == "invoice":
        rule(ledger)
        payment = "pi_1"
        ledger.change(
            "insert into credits.stripe_payments values ('pi_1', 'invoice', 'in_1', 'alpha', 1000, 'usd', now())"
        )
    else:
        rule(ledger)
        ledger.tell("checkout.session.completed", {
            "id": "cs_1", "object": "checkout.session", "mode": "payment", "status": "complete", "currency": "usd",
            "payment_status": "paid", "amount_subtotal": 1000, "amount_total": 1000, "customer": "cus_1",
            "payment_intent": (payment := "pi_1"), "metadata": {"account_id": "alpha", "package": "starter"},
        })  # fmt: skip
    if of == "refund of a session":
        ledger.tell("refund.created", {
            "id": "re_2", "object": "refund", "payment_intent": payment, "amount": 1000, "currency": "usd",
            "status": "succeeded",
        })  # fmt: skip
        assert how(ledger) == ("active", None, None)
        return
    assert dispute(ledger, payment) == "applied"
    assert (how(ledger), told(ledger)[-1]) == (("paused", "disputed", None), "paused")
    ledger.use(ledger.available())
    assert how(ledger) == ("paused", "disputed", None)
    dispute(ledger, payment, "won")
    assert how(ledger)[0] == "paused"
    assert_sound(ledger)


INVOICE = {
    "id": "in_1", "object": "invoice", "status": "paid", "customer": "cus_1", "subscription": "sub_1",
    "currency": "usd", "amount_paid": 1000, "total": 1000, "lines": {"data": [], "has_more": False},
}  # fmt: skip
PAYMENT = {
    "id": "inpay_1", "object": "invoice_payment", "invoice": "in_1", "amount_paid": 1000, "currency": "usd",
    "status": "paid", "payment": {"type": "payment_intent", "payment_intent": "pi_1"},
}  # fmt: skip
CHARGE = {
    "id": "ch_1", "object": "charge", "payment_intent": "pi_1", "amount": 1000, "amount_captured": 1000,
    "amount_refunded": 0, "captured": True, "currency": "usd",
}  # fmt: skip
DISPUTE = {
    "id": "dp_1", "object": "dispute", "charge": "ch_1", "payment_intent": None, "amount": 1000, "currency": "usd",
    "status": "needs_response",
}  # fmt: skip
INVOICED: dict[str, tuple[str, Json]] = {
    "paid": ("invoice.paid", INVOICE), "linked": ("invoice_payment.paid", PAYMENT),
    "charge": ("charge.succeeded", CHARGE), "dispute": ("charge.dispute.created", DISPUTE),
}  # fmt: skip


@pytest.mark.parametrize("old", [False, True], ids=["new", "old"])
@pytest.mark.parametrize("order", list(permutations(INVOICED)), ids=" ".join)
def test_a_dispute_of_an_invoice_ends_it_in_any_order(ledger: Ledger, order: tuple[str, ...], old: bool) -> None:
    rule(ledger)
    for name in order:
        event_type, about = INVOICED[name]
        if old and name == "linked":
            continue
        more = {"payment_intent": "pi_1", "charge": "ch_1"} if old and name == "paid" else {}
        assert ledger.tell(event_type, {**about, **more}) == "applied"
    assert how(ledger) == ("paused", "disputed", None)
    rule(ledger)
    ledger.now += SECOND
    for name in order:
        event_type, about = INVOICED[name]
        ledger.tell(event_type, {**about, **({"payment_intent": "pi_1"} if old and name == "paid" else {})})
    assert how(ledger) == ("active", None, None), "the same dispute is heard of once"
    assert_sound(ledger)


@pytest.mark.parametrize(
    ("first", "other", "linked"),
    [
        (True, "session", "invoice"),
        (True, "payment", "event"),
        (False, "session", "event"),
        (False, "payment", "invoice"),
    ],
)
def test_a_payment_of_an_invoice_buys_nothing_else(ledger: Ledger, first: bool, other: str, linked: str) -> None:
    """By the invoice itself, as in older versions, or by an event of its own."""
    started(ledger)
    price = {"id": "price_1", "recurring": {"interval": "month"}, "metadata": {"credits": "70"}}
    month = {"start": int(ledger.now.timestamp()), "end": int((ledger.now + 31 * DAY).timestamp())}
    line = {"id": "il_1", "amount": 1000, "quantity": 1, "price": price, "period": month}
    about = {**INVOICE, "lines": {"data": [line], "has_more": False}}
    of_invoice = [("invoice.paid", {**about, **({"payment_intent": "pi_1"} if linked == "invoice" else {})})]
    if linked == "event":
        of_invoice.insert(0, ("invoice_payment.paid", PAYMENT))
    said = [of_invoice, [copied(ledger)[other]]]
    outcomes = [ledger.tell(*event) for events in said[:: 1 if first else -1] for event in events]
    assert (outcomes[:-1], outcomes[-1]) == (["applied"] * (len(outcomes) - 1), "parked")
    assert [row.reason for row in ledger.table("stripe_events", "status = 'parked'")] == ["payment_granted_before"]
    assert [row.amount for row in ledger.table("grants", "true order by grant_id")][1:] == [70 if first else 1000]
    assert_sound(ledger)


def test_an_inquiry_that_becomes_a_dispute_ends_it(ledger: Ledger) -> None:
    rule(ledger)
    for name in ("paid", "linked", "charge"):
        ledger.tell(*INVOICED[name])
    ledger.tell("charge.dispute.created", {**DISPUTE, "status": "warning_needs_response"})
    assert how(ledger) == ("active", None, None)
    ledger.now += SECOND
    ledger.tell("charge.dispute.updated", {**DISPUTE, "status": "needs_response"})
    assert how(ledger) == ("paused", "disputed", None)


def test_a_dispute_is_heard_of_though_credits_of_its_invoice_were_added_by_hand(ledger: Ledger) -> None:
    rule(ledger)
    for name in ("charge", "linked", "dispute"):
        ledger.tell(*INVOICED[name])
    assert how(ledger) == ("active", None, None), "nobody knows whose invoice it is"
    ledger.add_subscription_credits("cus_1", "in_1", "sub_1", 500)
    assert how(ledger) == ("paused", "disputed", None)


def test_a_closed_account_buys_nothing_and_what_it_paid_is_kept_to_be_seen(ledger: Ledger) -> None:
    started(ledger)
    ledger.set_status("closed", "alpha")
    with refused(423, "account_closed"):
        rule(ledger)
    assert ledger.tell(SUCCEEDED, intent(ledger), "evt_late") == "failed"
    late = ledger.event("evt_late")
    assert (late.error, late.next_attempt_at) == ("PT423 account_closed", None)  # no account opens again
    assert [row.key for row in ledger.table("notifications", "type = 'stripe_event_given_up'")] == ["evt_late"]
    assert how(ledger)[2] == "queued"


# Many at once, and the wire ------------------------------------------------------------------------------------------


@pytest.fixture
def shop(database: Database) -> Iterator[Ledger]:
    with committed(database) as ledger:
        prepare(ledger)
        yield ledger


def test_many_debits_at_once_ask_once_and_many_answers_grant_once(database: Database, shop: Ledger) -> None:
    rule(shop, threshold=999, cap=2000)
    spent = together(database, [partial(Ledger.use, amount=1, key=f"k{n}") for n in range(8)])
    assert len({row.entry_seq for row in spent}) == 8
    assert len(requests(shop)) == 1
    about, number = intent(shop), request(shop).request_id
    jobs = [partial(Ledger.tell, event_type=SUCCEEDED, about=about, event_id=f"e{n}") for n in range(3)]
    body = json.dumps(about)
    together(database, [
        *jobs, *[lambda ledger: ledger.complete_stripe_request(number, 200, body)] * 2,
        *[partial(Ledger.use, amount=1, key=f"s{n}") for n in range(2)], Ledger.run_auto_topups,
    ])  # fmt: skip
    assert (shop.available(), purchases(shop), len(requests(shop))) == (1990, ["completed"], 1)
    changed = [partial(Ledger.tell, event_type="customer.updated", about=customer(f"pm_{n}")) for n in range(3)]
    together(database, [*changed, lambda ledger: rule(ledger, threshold=3000), Ledger.run_auto_topups])
    assert len(requests(shop)) == 1, "it cools down"
    assert_sound(shop)


def work(database: Database, fake: StripeFake) -> None:
    """Do what is due, as `pgcredits stripe work --once` does."""

    async def once() -> None:
        pool = Pool(database.dsn, role="credits_service")
        await pool.open()
        settings = Settings(dsn=database.dsn, role="credits_service", stripe_key=KEY, stripe_api_base=fake.url)
        try:
            await worker.Worker(pool, settings).run(asyncio.Event(), once=True)
        finally:
            await pool.close()

    asyncio.run(once())


def due_now(ledger: Ledger) -> None:
    """Time passes: what waits is due, what was claimed is nobody's."""
    ledger.change(
        "update credits.stripe_requests set run_at = credits.now() - interval '1 second', locked_until = "
        "credits.now() - interval '1 second' where state in ('queued', 'sent')"
    )


@ONE_ENGINE
def test_over_the_wire_nothing_is_charged_twice_and_no_decline_is_lost(database: Database, shop: Ledger) -> None:
    with StripeFake() as fake:
        fake.script("cut after", "500", None)  # charged, but the worker never hears of it
        started(shop)
        for _ in range(3):
            work(database, fake)
            due_now(shop)
        assert (shop.available(), purchases(shop)) == (1050, ["completed"])
        assert [count for key, count in fake.effects.items() if key] == [1]
        for card, reason in (("pm_declined", None), ("pm_authentication", "authentication_required")):
            shop.change("update credits.stripe_customers set default_payment_method = %s", card)
            shop.change("update credits.top_ups set created_at = created_at - interval '2 days'")
            rule(shop, threshold=2000)
            work(database, fake)
            assert how(shop)[1:] == (reason, None)
        attempts = shop.table("top_ups", "true order by created_at")
        assert [(row.error_code, row.decline_code, row.state) for row in attempts] == [
            (None, None, "succeeded"), ("card_declined", "insufficient_funds", "failed"),
            ("authentication_required", "authentication_required", "failed"),
        ]  # fmt: skip
        assert [one["status"] for one in fake.objects.values()] == ["succeeded", *["requires_payment_method"] * 2]
    assert_sound(shop)
