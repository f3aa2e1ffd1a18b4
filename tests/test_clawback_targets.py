"""Refunds and disputes take back a target, never a difference: in any order, in part, and back again exactly."""

import random
from collections.abc import Callable, Iterator
from contextlib import suppress
from decimal import Decimal
from functools import partial
from itertools import permutations
from typing import Any

import pytest
from client import CreditsError
from ledger_support import (
    DAY,
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
from stripe_world import World

COMPLETED = "checkout.session.completed"


def charge(refunded: int = 0, amount: int = 1000, **changes: Any) -> dict[str, Any]:
    """The charge of pi_1, and how much of it was given back in all."""
    return {
        "id": "ch_1", "object": "charge", "payment_intent": "pi_1", "customer": "cus_1", "amount": amount,
        "amount_captured": amount, "amount_refunded": refunded, "captured": True, "currency": "usd", **changes,
    }  # fmt: skip


def refund(amount: int, number: int = 1, status: str = "succeeded", **changes: Any) -> dict[str, Any]:
    """A refund of that charge."""
    return {
        "id": f"re_{number}", "object": "refund", "charge": "ch_1", "payment_intent": "pi_1", "amount": amount,
        "currency": "usd", "status": status, **changes,
    }  # fmt: skip


def dispute(status: str = "needs_response", amount: int = 1000, number: int = 1, **changes: Any) -> dict[str, Any]:
    """A dispute of that charge."""
    return {
        "id": f"dp_{number}", "object": "dispute", "charge": "ch_1", "payment_intent": "pi_1", "amount": amount,
        "currency": "usd", "status": status, **changes,
    }  # fmt: skip


@pytest.fixture
def ledger(conn: Connection[Any]) -> Iterator[Ledger]:
    """Alpha has bought 1000 credits for 1000 cents, paid by pi_1. Whatever happens, the books are sound afterwards."""
    ledger = Ledger(conn)
    ledger.load_demo_catalog()
    ledger.open("alpha")
    buy(ledger)
    yield ledger
    assert_sound(ledger)


def buy(ledger: Ledger, **changes: Any) -> None:
    """A session is paid."""
    assert ledger.tell(COMPLETED, session(**changes)) == "applied"


def say(ledger: Ledger, about: dict[str, Any]) -> None:
    """Stripe tells of a charge, refund or dispute, a second later."""
    ledger.now += SECOND
    kind = {"charge": "charge.updated", "refund": "refund.updated", "dispute": "charge.dispute.updated"}
    assert ledger.tell(kind[about["object"]], about) == "applied"


def lot(ledger: Ledger) -> tuple[Any, ...]:
    """Of what the payment bought: what is left, used, expired, taken back, and owed since it was used."""
    (row,) = ledger.table("grants", "kind <> 'bonus'")
    return row.remaining, row.consumed, row.expired, row.revoked, row.owed


def status_of_purchase(ledger: Ledger) -> tuple[Any, ...]:
    """What became of the purchase, and the cents refunded and disputed."""
    (row,) = ledger.table("purchases")
    return row.status, row.amount_refunded, row.amount_disputed


# Refunds -------------------------------------------------------------------------------------------------------------


def test_partial_refunds_add_up(ledger: Ledger) -> None:
    say(ledger, refund(300))
    assert (ledger.available(), status_of_purchase(ledger)) == (700, ("partially_refunded", 300, 0))
    say(ledger, refund(200, 2))
    assert (ledger.available(), status_of_purchase(ledger)) == (500, ("partially_refunded", 500, 0))
    say(ledger, refund(500, 3, "pending"))
    assert (ledger.available(), status_of_purchase(ledger)) == (0, ("refunded", 1000, 0))
    assert ledger.kinds() == [("grant", 1000), ("revoke", -300), ("revoke", -200), ("revoke", -500)]


def test_the_sum_of_a_charge_counts_only_while_no_refund_is_known(ledger: Ledger) -> None:
    say(ledger, charge(refunded=400))
    assert ledger.available() == 600
    say(ledger, refund(400))
    assert ledger.available() == 600
    say(ledger, refund(400, status="failed"))
    assert ledger.available() == 1000
    say(ledger, charge(refunded=400))
    assert ledger.available() == 1000


def test_a_repeated_word_takes_nothing_more(ledger: Ledger) -> None:
    for about in (refund(300), dispute(amount=200)):
        say(ledger, about)
        before = ledger.kinds()
        say(ledger, about)
        assert ledger.kinds() == before


@pytest.mark.parametrize("bonus", [0, 150, 1000])
@pytest.mark.parametrize("spent", [0, 400, 1000])
def test_a_refund_that_fails_later_gives_back_exactly_what_it_took(ledger: Ledger, spent: int, bonus: int) -> None:
    if spent:
        ledger.use(spent)
    say(ledger, refund(1000))
    assert ledger.sums() == (-spent, 0, 0, spent)
    if bonus:
        ledger.grant(bonus)
        assert ledger.sums()[3] == max(0, spent - bonus)
    say(ledger, refund(1000, status="failed"))
    assert ledger.sums() == (1000 - spent + bonus, 0, 1000 - spent + bonus, 0)
    assert lot(ledger)[2:] == (0, 0, 0)
    assert status_of_purchase(ledger) == ("completed", 0, 0)


def test_of_two_refunds_one_fails(ledger: Ledger) -> None:
    ledger.use(700)
    say(ledger, refund(600))
    say(ledger, refund(400, 2))
    ledger.grant(100)
    assert ledger.sums() == (-600, 0, 0, 600)
    say(ledger, refund(600, status="failed"))
    assert ledger.sums() == (0, 0, 0, 0)
    say(ledger, refund(400, 2, "canceled"))
    assert ledger.sums() == (400, 0, 400, 0)
    assert lot(ledger)[3:] == (0, 0)


def test_what_was_spent_is_debt_that_the_next_grant_pays_first(ledger: Ledger) -> None:
    ledger.use(900)
    say(ledger, refund(500))
    assert ledger.sums() == (-400, 0, 0, 400)
    with refused(402, "insufficient_credits"):
        ledger.use(1)
    ledger.grant(1000)
    assert ledger.sums() == (600, 0, 600, 0)
    assert ledger.kinds()[-2:] == [("grant", 1000), ("debt_paid", -400)]


def test_other_credits_pay_at_once_what_was_spent(ledger: Ledger) -> None:
    ledger.use(900)
    ledger.grant(250)
    say(ledger, refund(1000))
    assert ledger.sums() == (-650, 0, 0, 650)
    say(ledger, refund(1000, status="failed"))
    assert ledger.sums() == (350, 0, 350, 0)


@pytest.mark.parametrize("end", ["settle", "release", "run out"])
@pytest.mark.parametrize("fails", [False, True])
def test_an_open_hold_keeps_its_credits(ledger: Ledger, end: str, fails: bool) -> None:
    ledger.reserve("alpha", 400, "r", ttl=MINUTE)
    say(ledger, refund(1000))
    assert ledger.sums() == (-400, 400, 400, 400)
    if end == "settle":
        ledger.settle("alpha", "r", 400)
        assert ledger.sums() == (-400, 0, 0, 400)
    elif end == "release":
        ledger.release("alpha", "r")
        assert ledger.sums() == (0, 0, 0, 0)
    else:
        ledger.now += MINUTE
        assert ledger.sums() == (0, 0, 0, 0)
    if fails:
        say(ledger, refund(1000, status="failed"))
        left = 600 if end == "settle" else 1000
        assert ledger.sums() == (left, 0, left, 0)


def test_a_discount_changes_the_ratio_and_not_the_credits(ledger: Ledger) -> None:
    buy(ledger, session_id="cs_2", payment_intent="pi_2", amount_total=700)
    say(ledger, refund(350, charge="ch_2", payment_intent="pi_2"))
    assert ledger.available() == 1500


def test_a_capture_of_less_makes_each_cent_worth_more(ledger: Ledger) -> None:
    say(ledger, charge(amount_captured=500))
    say(ledger, refund(250))
    assert ledger.available() == 500


def test_money_without_a_minor_unit_is_a_ratio_like_any_other(ledger: Ledger) -> None:
    ledger.change(
        "insert into credits.packages (code, name, credits, price, currency) values ('yen', 'Yen', 100, 333, 'jpy')"
    )
    metadata = {"account_id": "alpha", "package": "yen"}
    yen = {"amount_total": 333, "amount_subtotal": 333, "currency": "jpy", "metadata": metadata}
    buy(ledger, session_id="cs_2", payment_intent="pi_2", **yen)
    for number, left in ((1, "66.666667"), (2, "33.333333"), (3, "0")):
        say(ledger, refund(111, number, charge="ch_2", payment_intent="pi_2", currency="jpy"))
        assert ledger.available() == 1000 + Decimal(left)


def test_a_refund_in_another_currency_counts_for_nothing(ledger: Ledger) -> None:
    say(ledger, refund(300, currency="eur"))
    assert ledger.available() == 1000


def test_a_guest_without_a_payment_has_nothing_to_give_back(ledger: Ledger) -> None:
    buy(ledger, session_id="cs_2", payment_intent=None, payment_status="no_payment_required", amount_total=0)
    say(ledger, refund(1000))
    assert ledger.available() == 1000


# Disputes ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spent", [0, 700, 1000])
def test_an_open_dispute_takes_what_is_unspent_and_no_more(ledger: Ledger, spent: int) -> None:
    if spent:
        ledger.use(spent)
    say(ledger, dispute())
    assert ledger.sums() == (0, 0, 0, 0)
    assert status_of_purchase(ledger) == ("disputed", 0, 1000)
    say(ledger, dispute("under_review"))
    assert ledger.sums() == (0, 0, 0, 0)


@pytest.mark.parametrize("bonus", [0, 200, 1000])
@pytest.mark.parametrize("spent", [0, 700])
def test_lost_takes_all_and_won_gives_back_exactly_what_was_taken_however_late(
    ledger: Ledger, spent: int, bonus: int
) -> None:
    if spent:
        ledger.use(spent)
    say(ledger, dispute())
    if bonus:
        ledger.grant(bonus)
    assert ledger.available() == bonus
    with ledger.conn.transaction(force_rollback=True):
        say(ledger, dispute("won"))
        assert ledger.sums() == (1000 - spent + bonus, 0, 1000 - spent + bonus, 0)
        assert status_of_purchase(ledger) == ("completed", 0, 0)
    say(ledger, dispute("lost"))
    assert ledger.available() == bonus - spent
    assert status_of_purchase(ledger) == ("disputed", 0, 1000)
    ledger.now += 90 * DAY
    say(ledger, dispute("won"))
    assert ledger.sums() == (1000 - spent + bonus, 0, 1000 - spent + bonus, 0)
    assert lot(ledger)[2:] == (0, 0, 0)


def test_lost_and_appealed_counts_as_lost(ledger: Ledger) -> None:
    ledger.use(300)
    for status in ("lost", "appeal_needs_response", "appeal_under_review"):
        say(ledger, dispute(status))
        assert ledger.sums() == (-300, 0, 0, 300)
    say(ledger, dispute("won"))
    assert ledger.available() == 700


@pytest.mark.parametrize("status", ["warning_needs_response", "warning_under_review", "warning_closed", "prevented"])
def test_an_inquiry_takes_nothing(ledger: Ledger, status: str) -> None:
    with ledger.unchanged("stripe_events", "stripe_objects", "notifications"):
        say(ledger, dispute(status))
    say(ledger, dispute())
    say(ledger, dispute(status))
    assert ledger.available() == 1000


def test_a_dispute_in_another_currency_stands_for_the_whole_charge(ledger: Ledger) -> None:
    say(ledger, dispute(amount=1, currency="eur"))
    assert ledger.available() == 0


def test_disputes_and_refunds_add_up_to_what_was_granted_at_most(ledger: Ledger) -> None:
    say(ledger, dispute("lost", 300))
    assert ledger.available() == 700
    say(ledger, dispute("needs_response", 200, 2))
    assert ledger.available() == 500
    say(ledger, refund(400))
    assert ledger.available() == 100
    say(ledger, refund(400, 2))
    assert ledger.sums() == (0, 0, 0, 0)
    say(ledger, dispute("won", 200, 2))
    assert ledger.sums() == (0, 0, 0, 0)
    say(ledger, dispute("won", 300))
    assert ledger.sums() == (200, 0, 200, 0)


def test_what_was_refunded_before_a_dispute_over_the_rest_is_not_taken_twice(ledger: Ledger) -> None:
    ledger.use(800)
    say(ledger, refund(500))
    assert ledger.sums() == (-300, 0, 0, 300)
    say(ledger, dispute(amount=500))
    assert ledger.sums() == (-300, 0, 0, 300)
    say(ledger, dispute("lost", 500))
    assert ledger.sums() == (-800, 0, 0, 800)
    say(ledger, refund(500, status="failed"))
    assert ledger.sums() == (-300, 0, 0, 300)


def test_a_dispute_that_knows_only_the_charge_waits_for_it(ledger: Ledger) -> None:
    say(ledger, dispute(payment_intent=None))
    assert ledger.available() == 1000
    (asked,) = ledger.table("stripe_requests", "state = 'queued'")
    assert asked.path == "/v1/charges/ch_1"
    say(ledger, charge())
    assert ledger.available() == 0


def test_an_open_dispute_leaves_credits_of_other_payments_alone(ledger: Ledger) -> None:
    buy(ledger, session_id="cs_2", payment_intent="pi_2")
    say(ledger, dispute("lost"))
    assert ledger.sums() == (1000, 0, 1000, 0)
    assert [row.status for row in ledger.table("purchases", "true order by purchase_id")] == ["disputed", "completed"]


# Beside it -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spent", [0, 500])
def test_what_an_operator_revoked_stays_revoked(ledger: Ledger, spent: int) -> None:
    (bought,) = ledger.table("grants")
    if spent:
        ledger.use(spent)
    ledger.revoke_grant("alpha", bought.grant_id, amount=300, key="operator")
    before = ledger.sums()
    say(ledger, refund(400))
    say(ledger, refund(600, 2))
    assert ledger.sums() == (-spent, 0, 0, spent)
    say(ledger, refund(400, status="failed"))
    say(ledger, refund(600, 2, status="failed"))
    assert ledger.sums() == before
    assert lot(ledger)[3:] == (300, 0)


def test_a_debt_that_an_operator_made_is_not_undone_by_stripe(ledger: Ledger) -> None:
    (bought,) = ledger.table("grants")
    ledger.use(1000)
    ledger.revoke_grant("alpha", bought.grant_id, amount=300, key="operator")
    say(ledger, refund(1000))
    assert ledger.sums() == (-1000, 0, 0, 1000)
    ledger.grant(500)
    say(ledger, refund(1000, status="failed"))
    assert ledger.sums() == (200, 0, 200, 0)


def test_a_spend_can_be_refunded_after_its_debt_came_back(ledger: Ledger) -> None:
    ledger.spend("alpha", 500, key="spent")
    say(ledger, refund(1000))
    ledger.grant(500)
    say(ledger, refund(1000, status="failed"))
    assert ledger.sums() == (1000, 0, 1000, 0)
    ledger.refund_spend("alpha", "spent", key="back")
    assert ledger.sums() == (1500, 0, 1500, 0)


def test_what_paid_a_debt_comes_back_also_when_the_spend_was_refunded(ledger: Ledger) -> None:
    ledger.spend("alpha", 400, key="spent")
    say(ledger, refund(1000))
    ledger.grant(400)
    ledger.refund_spend("alpha", "spent", key="back")
    assert ledger.sums() == (400, 0, 400, 0)
    say(ledger, refund(1000, status="failed"))
    assert ledger.sums() == (1400, 0, 1400, 0)


def test_an_open_dispute_beside_a_debt_settles_at_once(ledger: Ledger) -> None:
    ledger.spend("alpha", 259, key="spent")
    say(ledger, refund(800))
    ledger.refund_spend("alpha", "spent", key="back")
    assert ledger.sums() == (200, 0, 200, 0)
    say(ledger, dispute(amount=900))
    assert ledger.sums() == (0, 0, 0, 0)
    before = ledger.kinds()
    say(ledger, dispute("under_review", 900))
    assert ledger.kinds() == before


def something(ledger: Ledger, dice: random.Random, spends: list[str], holds: list[str]) -> int:
    """Something happens to alpha or to the money that it paid; how its credits change, but for claims of that money."""
    amount, number, key = dice.randrange(1, 500), dice.randrange(1, 3), ledger.key()
    match dice.randrange(9):
        case 0:
            ledger.grant(amount, kind=dice.choice(["bonus", "purchase", "promo"]))
            return amount
        case 1 | 2:
            ledger.spend("alpha", amount, key=key)
            spends.append(key)
            return -amount
        case 3 if spends:
            return int(ledger.refund_spend("alpha", spends.pop(dice.randrange(len(spends))), key=key).amount)
        case 4:
            ledger.reserve("alpha", amount, key, ttl=DAY)
            holds.append(key)
        case 5 | 6:
            say(ledger, refund(400 * number, number, dice.choice(["pending", "succeeded"])))
        case 7:
            say(ledger, dispute(dice.choice(["needs_response", "lost", "won"]), 450 * number, number))
        case _:
            say(ledger, charge(dice.randrange(1000)))
    return 0


def test_nothing_is_lost_when_all_claims_are_taken_back(ledger: Ledger) -> None:
    for seed in range(16):
        dice, total = random.Random(seed), 1000
        spends: list[str] = []
        holds: list[str] = []
        with ledger.conn.transaction(force_rollback=True):
            for _ in range(16):
                with suppress(CreditsError):  # not all of it can be had
                    total += something(ledger, dice, spends, holds)
            assert_sound(ledger)
            for hold in holds:
                ledger.release("alpha", hold)
            for number in (1, 2):
                say(ledger, refund(400 * number, number, "failed"))
                say(ledger, dispute("won", 450 * number, number))
            assert ledger.sums() == (total, 0, total, 0), seed
            assert_sound(ledger)


def invoice(interval: str = "month", days: int = 28) -> dict[str, Any]:
    """A subscription's first invoice, paid by pi_1, in the older shape of the API: 500 credits a month."""
    period = {"start": int(NOON.timestamp()), "end": int((NOON + days * DAY).timestamp())}
    price = {"id": "price_1", "recurring": {"interval": interval}, "metadata": {"credits": "500"}, "unit_amount": 1000}
    line = {"id": "il_1", "amount": 1000, "quantity": 1, "subscription": "sub_1", "period": period, "price": price}
    return {
        "id": "in_1", "object": "invoice", "status": "paid", "customer": "cus_1", "subscription": "sub_1",
        "payment_intent": "pi_1", "charge": "ch_1", "amount_paid": 1000, "total": 1000, "currency": "usd",
        "subscription_details": {"metadata": {"account_id": "alpha"}}, "lines": {"data": [line]},
    }  # fmt: skip


SUBSCRIPTION = {
    "id": "sub_1", "object": "subscription", "status": "active", "customer": "cus_1",
    "metadata": {"account_id": "alpha"},
    "current_period_start": int(NOON.timestamp()), "current_period_end": int((NOON + 365 * DAY).timestamp()),
    "billing_cycle_anchor": int(NOON.timestamp()),
}  # fmt: skip


@pytest.fixture
def subscriber(conn: Connection[Any]) -> Iterator[Ledger]:
    """alpha, who has paid nothing yet."""
    ledger = Ledger(conn)
    ledger.open("alpha")
    yield ledger
    assert_sound(ledger)


@pytest.mark.parametrize("days", [0, 28])
def test_what_has_expired_cannot_be_taken_and_does_not_come_back(subscriber: Ledger, days: int) -> None:
    ledger = subscriber
    ledger.tell("invoice.paid", invoice())
    ledger.use(100)
    ledger.now += days * DAY
    say(ledger, refund(1000))
    assert ledger.sums() == (-100, 0, 0, 100)
    ledger.now = NOON + 30 * DAY
    say(ledger, refund(1000, status="failed"))
    assert ledger.sums() == (0, 0, 0, 0)
    assert lot(ledger) == (0, 100, 400, 0, 0)


def test_credits_that_paid_the_debt_of_an_expired_month_come_back(subscriber: Ledger) -> None:
    ledger = subscriber
    ledger.tell("invoice.paid", invoice())
    ledger.use(100)
    say(ledger, refund(1000))
    ledger.now = NOON + 30 * DAY
    ledger.grant(30)
    assert ledger.sums() == (-70, 0, 0, 70)
    say(ledger, refund(1000, status="failed"))
    assert ledger.sums() == (30, 0, 30, 0)


def test_a_refund_stops_the_months_to_come_and_its_failure_brings_them_back(subscriber: Ledger) -> None:
    ledger = subscriber
    ledger.tell("customer.subscription.created", SUBSCRIPTION)
    ledger.tell("invoice.paid", invoice("year", 365))
    assert ledger.available() == 500
    say(ledger, refund(500))
    assert ledger.available() == 250
    ledger.now = NOON + 30 * DAY
    ledger.book()
    assert ledger.available() == 250
    say(ledger, refund(500, 2))
    assert ledger.available() == 0
    ledger.now = NOON + 65 * DAY
    ledger.book()
    assert ledger.available() == 0
    say(ledger, refund(500, 2, "failed"))
    say(ledger, refund(500, status="failed"))
    assert ledger.available() == 500
    ledger.now = NOON + 95 * DAY
    assert ledger.available() == 500


# The account frozen instead ------------------------------------------------------------------------------------------


def test_of_a_charge_without_a_payment_intent_no_invoice_is_asked_for(ledger: Ledger) -> None:
    """Stripe lists the payments of invoices by payment intent alone: it would refuse to look for a charge."""
    say(ledger, charge(400, id="ch_9", payment_intent=None))
    say(ledger, refund(400, charge="ch_9", payment_intent=None))
    say(ledger, dispute(charge="ch_9", payment_intent=None))
    assert ledger.table("stripe_requests", "path = '/v1/invoice_payments'") == []
    say(ledger, refund(400, number=2, charge="ch_8", payment_intent="pi_8"))
    (asked,) = ledger.table("stripe_requests", "path = '/v1/invoice_payments'")
    assert asked.params["payment"]["payment_intent"] == "pi_8"


@pytest.fixture
def freezing(ledger: Ledger) -> Ledger:
    """An open dispute freezes the account."""
    ledger.change("update credits.settings set value = %s where name = 'dispute_freezes'", Jsonb("account"))
    return ledger


def status(ledger: Ledger) -> str:
    """What the account may do."""
    word: str = ledger.get_balance("alpha").status
    return word


@pytest.mark.parametrize("end", ["won", "lost"])
def test_an_open_dispute_freezes_the_account_and_its_end_lets_go(freezing: Ledger, end: str) -> None:
    ledger = freezing
    say(ledger, dispute("warning_needs_response"))
    assert status(ledger) == "active"
    say(ledger, dispute())
    assert (status(ledger), ledger.available()) == ("frozen", 1000)
    with refused(423, "account_frozen"):
        ledger.use(1)
    say(ledger, dispute("under_review"))
    assert status(ledger) == "frozen"
    say(ledger, dispute(end))
    assert (status(ledger), ledger.available()) == ("active", 1000 if end == "won" else 0)


def test_a_month_that_begins_while_a_dispute_freezes_the_account_keeps_its_credits(freezing: Ledger) -> None:
    ledger, world = freezing, World("old")
    world.numbers.update(pi=1, ch=1)
    world.dispute(world.first_invoice(world.subscribe("alpha", "year")))
    for event in world.events:
        ledger.receive_stripe_event("default", event.payload)
    assert (status(ledger), ledger.available()) == ("frozen", 2000)
    ledger.now += 31 * DAY
    assert ledger.available() == 2000
    ledger.grant(1)
    assert ledger.available() == 2001


def test_what_an_operator_froze_stays_frozen(freezing: Ledger) -> None:
    ledger = freezing
    ledger.freeze_account("alpha", reason="fraud")
    say(ledger, dispute())
    say(ledger, dispute("won"))
    assert status(ledger) == "frozen"
    (account,) = ledger.table("accounts")
    assert account.settings["status_reason"] == "fraud"


@pytest.mark.parametrize("first", ["pi_1", "pi_2"])
def test_the_account_stays_frozen_until_its_last_dispute_is_over(freezing: Ledger, first: str) -> None:
    ledger = freezing
    buy(ledger, session_id="cs_2", payment_intent="pi_2")
    other = partial(dispute, number=2, charge="ch_2", payment_intent="pi_2")
    disputes: dict[str, Callable[..., dict[str, Any]]] = {"pi_1": dispute, "pi_2": other}
    for disputed in disputes.values():
        say(ledger, disputed())
    say(ledger, disputes.pop(first)("won"))
    assert status(ledger) == "frozen"
    for disputed in disputes.values():
        say(ledger, disputed("won"))
    assert status(ledger) == "active"


def test_an_account_that_a_dispute_froze_is_let_go_also_when_the_setting_has_changed(freezing: Ledger) -> None:
    ledger = freezing
    say(ledger, dispute())
    ledger.change("update credits.settings set value = %s where name = 'dispute_freezes'", Jsonb("credits"))
    say(ledger, dispute("under_review"))
    assert ledger.available() == 0
    say(ledger, dispute("won"))
    assert (status(ledger), ledger.available()) == ("active", 1000)


# Any order -----------------------------------------------------------------------------------------------------------

Story = list[tuple[str, dict[str, Any]]]
NEW_INVOICE = {
    **{name: value for name, value in invoice().items() if name not in {"charge", "payment_intent", "subscription"}},
    "parent": {"subscription_details": {"subscription": "sub_1", "metadata": {"account_id": "alpha"}}},
}
PAYMENT = {
    "id": "inpay_1", "object": "invoice_payment", "invoice": "in_1", "amount_paid": 1000, "currency": "usd",
    "status": "paid", "payment": {"type": "payment_intent", "payment_intent": "pi_1"},
}  # fmt: skip
STORIES: dict[str, tuple[Story, tuple[Any, ...]]] = {  # what happens second by second, and the lot in the end
    "two refunds and their charge": (
        [(COMPLETED, session()), ("refund.created", refund(300)), ("refund.created", refund(200, 2)),
         ("charge.refunded", charge(500))],
        (500, 0, 0, 500, 0),
    ),
    "a refund that fails": (
        [(COMPLETED, session()), ("refund.created", refund(1000)), ("charge.refunded", charge(1000)),
         ("refund.failed", refund(1000, status="failed"))],
        (1000, 0, 0, 0, 0),
    ),
    "a dispute that is won late": (
        [(COMPLETED, session()), ("charge.dispute.created", dispute()), ("charge.dispute.closed", dispute("lost")),
         ("charge.dispute.closed", dispute("won"))],
        (1000, 0, 0, 0, 0),
    ),
    "a dispute lost beside a refund": (
        [(COMPLETED, session()), ("refund.created", refund(300)), ("charge.dispute.created", dispute(amount=600)),
         ("charge.dispute.closed", dispute("lost", 600))],
        (100, 0, 0, 900, 0),
    ),
    "a dispute that knows only its charge": (
        [(COMPLETED, session()), ("charge.succeeded", charge()),
         ("charge.dispute.created", dispute(payment_intent=None)),
         ("charge.dispute.closed", dispute("lost", payment_intent=None))],
        (0, 0, 0, 1000, 0),
    ),
    "a session that is paid late": (
        [(COMPLETED, session(payment_status="unpaid")), ("checkout.session.async_payment_succeeded", session()),
         ("charge.succeeded", charge()), ("refund.created", refund(250))],
        (750, 0, 0, 250, 0),
    ),
    "an invoice of the older shape": (
        [("invoice.paid", invoice()), ("charge.succeeded", charge()), ("refund.created", refund(500)),
         ("charge.dispute.created", dispute("needs_response", 300))],
        (100, 0, 0, 400, 0),
    ),
    "an invoice of the newer shape": (
        [("invoice.paid", NEW_INVOICE), ("invoice_payment.paid", PAYMENT), ("charge.succeeded", charge()),
         ("refund.created", refund(500))],
        (250, 0, 0, 250, 0),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", STORIES)
def test_all_orders_of_a_story_end_in_one_state(conn: Connection[Any], name: str) -> None:
    ledger = Ledger(conn)
    ledger.load_demo_catalog()
    ledger.open("alpha", 50)
    story, end = STORIES[name]
    seconds = [int(NOON.timestamp()) + n for n in range(len(story))]
    events = [told(f"evt_{n}", *story[n], created=seconds[n]) for n in range(len(story))]
    ledger.now += MINUTE
    purchases = set()
    for number, order in enumerate(permutations(range(len(events)))):
        with ledger.conn.transaction(force_rollback=True):
            for n in order:
                assert ledger.receive_stripe_event("default", events[n]).outcome == "applied", order
            assert lot(ledger) == end, order
            assert ledger.sums() == (50 + end[0], 0, 50 + end[0], 0), order
            purchases.add(tuple((row.status, row.amount_refunded) for row in ledger.table("purchases")))
            if number % 8 == 0:
                assert_sound(ledger)
                with ledger.unchanged("stripe_events", "stripe_objects", "stripe_requests"):
                    for n in reversed(order):
                        assert ledger.replay_stripe_event(f"evt_{n}").outcome == "applied", order
    assert len(purchases) == 1


def test_a_refund_takes_no_month_that_nobody_has_booked_whenever_its_payment_is_linked(subscriber: Ledger) -> None:
    """Months that had begun before it was heard of have begun, also if what it refunds is heard of later."""
    ledger, booked = subscriber, []
    ledger.tell("customer.subscription.created", SUBSCRIPTION)
    ledger.tell("invoice.paid", {**NEW_INVOICE, "lines": invoice("year", 365)["lines"]})
    ledger.now += 65 * DAY
    for order in permutations([("invoice_payment.paid", PAYMENT), ("refund.created", refund(1000))]):
        with ledger.conn.transaction(force_rollback=True):
            for event in order:
                assert ledger.tell(*event) == "applied"
            booked.append([(entry.kind, entry.amount) for entry in ledger.table("entries", "true order by entry_seq")])
            assert ledger.available() == 0
            assert_sound(ledger)
    assert booked[0] == booked[1]


def test_the_halves_of_a_story_that_come_at_once_find_each_other(database: Database) -> None:
    with committed(database) as ledger:
        ledger.load_demo_catalog()
        ledger.open("alpha")
        halves = [
            told(f"evt_{kind}_{n}", *half, created=int(NOON.timestamp()))
            for n in range(8)
            for kind, half in enumerate(
                (
                    (COMPLETED, session(f"cs_{n}", payment_intent=f"pi_{n}")),
                    ("charge.succeeded", charge(id=f"ch_{n}", payment_intent=f"pi_{n}")),
                    ("charge.dispute.closed", dispute("lost", 500, number=n, charge=f"ch_{n}", payment_intent=None)),
                    ("refund.created", refund(250, n, charge=f"ch_{n}", payment_intent=f"pi_{n}")),
                )
            )
        ]
        jobs = [partial(Ledger.receive_stripe_event, endpoint="default", payload=half) for half in halves]
        assert {result.outcome for result in together(database, jobs)} == {"applied"}
        assert ledger.available() == 2000
        assert {(row.firm, row.taken) for row in ledger.table("clawbacks")} == {(750, 750)}
        assert_sound(ledger)


def test_an_invoice_and_its_payment_and_its_refund_that_come_at_once_find_each_other(database: Database) -> None:
    with committed(database) as ledger:
        ledger.open("alpha")
        events = []
        for n in range(8):
            start = {"start": int(ledger.now.timestamp()) - 60, "end": int((ledger.now + 31 * DAY).timestamp())}
            (line,) = NEW_INVOICE["lines"]["data"]
            lines = {"data": [{**line, "id": f"il_{n}", "subscription": f"sub_{n}", "period": start}]}
            details = {"subscription_details": {"subscription": f"sub_{n}", "metadata": {"account_id": "alpha"}}}
            paid = {**NEW_INVOICE, "id": f"in_{n}", "parent": details, "lines": lines}
            payment = {"type": "payment_intent", "payment_intent": f"pi_{n}"}
            events += [
                told(f"evt_in_{n}", "invoice.paid", paid),
                told(f"evt_pay_{n}", "invoice_payment.paid", {**PAYMENT, "id": f"inpay_{n}", "invoice": f"in_{n}",
                                                              "payment": payment}),
                told(f"evt_re_{n}", "refund.created", refund(1000, n, charge=f"ch_{n}", payment_intent=f"pi_{n}")),
            ]  # fmt: skip
        jobs = [partial(Ledger.receive_stripe_event, endpoint="default", payload=event) for event in events]
        results = together(database, jobs)
        assert {result.outcome for result in results} == {"applied"}, ledger.table("stripe_events", "status = 'failed'")
        assert {row.taken for row in ledger.table("clawbacks")} == {500}
        assert len(ledger.table("clawbacks")) == 8
        assert ledger.available() == 0
        assert_sound(ledger)
