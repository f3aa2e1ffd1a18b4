"""Credits come in as grants, and operators correct."""

from decimal import Decimal
from typing import Any

import pytest
from ledger_support import DAY, HOUR, NOON, Ledger, assert_sound, refused, same
from psycopg import Connection


@pytest.fixture
def ledger(conn: Connection[Any]) -> Ledger:
    ledger = Ledger(conn)
    ledger.open("alpha")
    return ledger


def test_a_grant_is_a_lot_and_an_entry(ledger: Ledger) -> None:
    result = ledger.grant_credits("alpha", "10.50", description="Welcome", key="g", metadata={"n": 1})
    assert (result.account_id, result.kind, result.amount, result.priority) == ("alpha", "bonus", Decimal("10.5"), 20)
    assert (result.effective_at, result.expires_at, result.entry_seq) == (NOON, None, 1)
    assert (result.balance, result.available) == (Decimal("10.5"), Decimal("10.5"))
    (row,) = ledger.history("alpha")
    assert (row.kind, row.description, row.key, row.metadata) == ("grant", "Welcome", "g", {"n": 1})
    assert row.grants == [{"grant_id": result.grant_id, "amount": Decimal("10.5")}]


@pytest.mark.parametrize(
    ("kind", "priority"), [("plan", 10), ("trial", 15), ("promo", 20), ("bonus", 20), ("gift", 25), ("purchase", 30)]
)
def test_the_kind_sets_the_priority_unless_one_is_given(ledger: Ledger, kind: str, priority: int) -> None:
    assert ledger.grant(1, kind=kind).priority == priority
    assert ledger.grant(1, kind=kind, priority=-7).priority == -7
    assert ledger.grant(1, kind=kind, priority=0).priority == 0


GRANT: dict[str, Any] = {
    "kind": "promo",
    "expires_at": NOON + DAY,
    "description": "x",
    "scope": ["a"],
    "metadata": {"n": 1},
}


@pytest.mark.parametrize("later", [NOON, NOON + HOUR, NOON + 2 * DAY], ids=["at once", "later", "after its end"])
def test_a_grant_replays_its_first_result(ledger: Ledger, later: Any) -> None:
    first = ledger.grant_credits("alpha", 5, key="g", **GRANT)
    ledger.grant(3)
    ledger.now = later
    ledger.book()
    assert same(first, ledger.grant_credits("alpha", "5.0", key="g", **GRANT))


@pytest.mark.parametrize("hours", [0, 1, 2], ids=["pending", "started", "ended"])
def test_a_grant_that_starts_later_replays_its_first_result(ledger: Ledger, hours: int) -> None:
    arguments = {"effective_at": NOON + HOUR, "expires_at": NOON + 2 * HOUR, "key": "g"}
    first = ledger.grant_credits("alpha", 5, **arguments)
    ledger.now = NOON + hours * HOUR
    ledger.book()
    assert same(first, ledger.grant_credits("alpha", 5, **arguments))


@pytest.mark.parametrize(
    "change",
    [{"amount": 6}, {"kind": "gift"}, {"expires_at": None}, {"effective_at": NOON}, {"priority": 20},
     {"description": None}, {"scope": None}, {"scope": ["b"]}, {"metadata": None}],
    ids=str,
)  # fmt: skip
def test_a_used_key_refuses_other_arguments(ledger: Ledger, change: dict[str, Any]) -> None:
    ledger.grant_credits("alpha", 5, key="g", **GRANT)
    with ledger.unchanged(), refused(409, "idempotency_conflict", operation="grant_credits", key="g"):
        ledger.grant_credits("alpha", **{"amount": 5, "key": "g", **GRANT, **change})


def test_the_same_moment_in_another_zone_is_the_same_argument(ledger: Ledger) -> None:
    first = ledger.grant_credits("alpha", 5, key="g", expires_at="2030-02-01T12:00:00Z")
    ledger.conn.execute("set local timezone to 'Asia/Tokyo'")
    assert ledger.grant_credits("alpha", 5, key="g", expires_at="2030-02-01T13:00:00+01:00").grant_id == first.grant_id


@pytest.mark.parametrize(("status", "works"), [("frozen", True), ("closed", False)])
def test_a_frozen_account_receives_and_a_closed_one_does_not(ledger: Ledger, status: str, works: bool) -> None:
    ledger.set_status(status)
    if works:
        assert ledger.grant(5).balance == 5
    else:
        with ledger.unchanged(), refused(423, "account_closed", account_id="alpha", status="closed"):
            ledger.grant(5)


@pytest.mark.parametrize("effective_at", [None, NOON + 2 * HOUR])
def test_a_grant_must_not_end_before_it_starts(ledger: Ledger, effective_at: Any) -> None:
    end = effective_at or NOON
    with refused(400, "invalid_request", argument="expires_at"):
        ledger.grant(5, effective_at=effective_at, expires_at=end)


def test_the_largest_amount_is_kept_exactly(ledger: Ledger) -> None:
    ledger.grant("999999999999.999999")
    ledger.grant("0.000001")
    assert ledger.available() == Decimal(1000000000000)
    ledger.use("0.000001")
    assert ledger.available() == Decimal("999999999999.999999")
    assert_sound(ledger)


def test_an_adjustment_up_is_a_grant_without_expiry(ledger: Ledger) -> None:
    result = ledger.adjust("alpha", "7.50", reason="sorry", key="a")
    assert (result.amount, result.balance, result.available) == (Decimal("7.5"), Decimal("7.5"), Decimal("7.5"))
    (lot,) = ledger.table("grants")
    assert (lot.kind, lot.expires_at, lot.amount) == ("bonus", None, Decimal("7.5"))
    assert ledger.history("alpha")[0].description == "sorry"


def test_an_adjustment_down_takes_in_the_order_of_consumption_and_never_more_than_there_is(ledger: Ledger) -> None:
    ledger.grant(10)
    plan = ledger.grant(5, kind="plan").grant_id
    ledger.reserve("alpha", 4, "r")
    assert ledger.adjust("alpha", -3, key="a").amount == -3
    assert ledger.history("alpha")[0].grants[0]["grant_id"] == plan
    with ledger.unchanged(), refused(402, "insufficient_credits", required=9, available=8):
        ledger.adjust("alpha", -9, key="b")
    ledger.adjust("alpha", -8, key="b")
    assert ledger.sums() == (0, 4, 4, 0)
    assert_sound(ledger)


@pytest.mark.parametrize("amount", [5, -5])
def test_an_adjustment_replays_and_refuses_other_arguments(ledger: Ledger, amount: int) -> None:
    ledger.grant(20)
    first = ledger.adjust("alpha", amount, reason="x", key="a")
    ledger.use(10)
    assert same(first, ledger.adjust("alpha", f"{amount}.0", reason="x", key="a"))
    for change in ({"amount": -amount}, {"amount": 2 * amount}, {"reason": None}):
        with ledger.unchanged(), refused(409, "idempotency_conflict", operation="adjust", key="a"):
            ledger.adjust("alpha", **{"amount": amount, "reason": "x", "key": "a", **change})


def test_an_operator_may_correct_a_frozen_account(ledger: Ledger) -> None:
    ledger.grant(20)
    ledger.freeze_account("alpha")
    ledger.adjust("alpha", -5, key="a")
    ledger.adjust("alpha", 3, key="b")
    assert ledger.available() == 18
