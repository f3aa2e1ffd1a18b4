"""Clawbacks: what is left is taken, what was used becomes debt, and the next credits pay it, visibly."""

from collections.abc import Callable
from typing import Any

import pytest
from ledger_support import HOUR, NOON, Ledger, assert_sound, refused, same
from psycopg import Connection


@pytest.fixture
def ledger(conn: Connection[Any]) -> Ledger:
    ledger = Ledger(conn)
    ledger.open("alpha")
    return ledger


def revoke(ledger: Ledger, lot: Any, **more: Any) -> Any:
    """Claw back a grant of alpha."""
    return ledger.revoke_grant("alpha", lot.grant_id, **{"key": ledger.key(), **more})


def indebted(ledger: Ledger, debt: int) -> None:
    """Give alpha a debt."""
    lot = ledger.grant(debt, kind="plan")
    ledger.use(debt)
    revoke(ledger, lot)
    assert ledger.sums() == (-debt, 0, 0, debt)


def test_an_unused_grant_is_taken_whole_and_without_debt(ledger: Ledger) -> None:
    lot = ledger.grant(10)
    result = revoke(ledger, lot, reason="refund")
    assert (result.amount, result.debt, result.balance, result.available) == (-10, 0, 0, 0)
    assert ledger.kinds() == [("grant", 10), ("revoke", -10)]
    assert ledger.history("alpha")[0].description == "refund"
    (stored,) = ledger.table("grants")
    assert (stored.status, stored.revoked, stored.owed) == ("revoked", 10, 0)


def test_what_was_used_becomes_debt_and_stops_spending(ledger: Ledger) -> None:
    lot = ledger.grant(10)
    ledger.use(7)
    result = revoke(ledger, lot)
    assert (result.amount, result.debt, result.balance, result.available) == (-3, 7, 0, -7)
    assert ledger.kinds()[-2:] == [("revoke", -3), ("clawback", 7)]
    refusals: list[Callable[[], Any]] = [
        lambda: ledger.use(1),
        lambda: ledger.reserve("alpha", 1, "r"),
        lambda: ledger.adjust("alpha", -1, key="a"),
    ]
    for refuse in refusals:
        with refused(402, "insufficient_credits", required=1, available=-7):
            refuse()
    assert_sound(ledger)


def test_debt_is_paid_at_once_from_other_free_credits(ledger: Ledger) -> None:
    lot = ledger.grant(10, kind="plan")
    ledger.use(10)
    ledger.grant(25)
    result = revoke(ledger, lot)
    assert (result.amount, result.debt) == (0, 10)
    assert ledger.sums() == (15, 0, 15, 0)
    assert ledger.kinds()[-2:] == [("clawback", 10), ("debt_paid", -10)]


@pytest.mark.parametrize("coming", [30, 100, 150])
def test_the_next_grant_pays_the_debt_as_its_own_entry(ledger: Ledger, coming: int) -> None:
    indebted(ledger, 100)
    ledger.grant(coming)
    paid = min(coming, 100)
    assert ledger.kinds()[-2:] == [("grant", coming), ("debt_paid", -paid)]
    assert ledger.history("alpha")[0].debt == -paid
    assert ledger.sums() == (coming - 100, 0, coming - paid, 100 - paid)
    assert_sound(ledger)


def test_a_release_pays_the_debt_first(ledger: Ledger) -> None:
    lot = ledger.grant(30)
    ledger.reserve("alpha", 20, "r")
    revoke(ledger, lot)
    assert ledger.sums() == (-20, 20, 20, 20)
    ledger.release("alpha", "r")
    assert ledger.sums() == (0, 0, 0, 0)
    assert ledger.kinds() == [("grant", 30), ("revoke", -10), ("clawback", 20), ("debt_paid", -20)]


def test_a_refund_pays_the_debt_first(ledger: Ledger) -> None:
    lot = ledger.grant(30)
    ledger.spend("alpha", 30, key="s")
    revoke(ledger, lot, amount=20)
    ledger.refund_spend("alpha", "s", amount=25, key="f")
    assert ledger.sums() == (5, 0, 5, 0)
    assert ledger.kinds()[-2:] == [("refund", 25), ("debt_paid", -20)]


def test_a_refund_to_an_expired_grant_pays_the_debt_before_the_rest_expires(ledger: Ledger) -> None:
    ledger.grant(30, expires_at=NOON + HOUR, kind="plan")
    ledger.spend("alpha", 30, key="s")
    indebted(ledger, 20)
    ledger.now = NOON + 2 * HOUR
    ledger.refund_spend("alpha", "s", key="f")
    assert ledger.sums() == (0, 0, 0, 0)
    assert ledger.kinds()[-3:] == [("refund", 30), ("debt_paid", -20), ("expire", -10)]


def test_adjustments_and_transfers_pay_the_debt_first(ledger: Ledger) -> None:
    ledger.open("beta", 50)
    indebted(ledger, 30)
    ledger.adjust("alpha", 10, key="a")
    ledger.transfer_credits("beta", "alpha", 25, key="t")
    assert ledger.sums() == (5, 0, 5, 0)
    paid = [row.debt for row in ledger.history("alpha", kinds=["debt_paid"])]
    assert paid == [-20, -10]


def test_a_pending_grant_pays_the_debt_when_it_starts(ledger: Ledger) -> None:
    indebted(ledger, 30)
    ledger.grant(40, effective_at=NOON + HOUR)
    assert ledger.sums() == (-30, 0, 0, 30)
    ledger.now = NOON + HOUR
    assert ledger.sums() == (10, 0, 10, 0)
    ledger.book()
    assert ledger.sums() == (10, 0, 10, 0)


def test_debt_is_paid_by_what_would_be_lost_first(ledger: Ledger) -> None:
    lot = ledger.grant(10, kind="plan")
    ledger.use(10)
    ledger.grant(10, kind="promo")
    losing = ledger.grant(10, kind="purchase", expires_at=NOON + HOUR)
    revoke(ledger, lot)
    assert ledger.history("alpha")[0].grants == [{"grant_id": losing.grant_id, "amount": 10}]


def test_scoped_credits_pay_no_debt_and_cannot_be_used_while_there_is_one(ledger: Ledger) -> None:
    indebted(ledger, 10)
    ledger.grant(50, scope=["image"])
    assert ledger.sums() == (-10, 0, 50, 10)
    with refused(402, "insufficient_credits", required=5):
        ledger.use(5, capability="image")
    ledger.grant(10)
    ledger.use(5, capability="image")


def test_a_grant_is_revoked_in_parts_and_never_beyond_what_it_was(ledger: Ledger) -> None:
    lot = ledger.grant(10)
    ledger.use(4)
    assert revoke(ledger, lot, amount=3).amount == -3
    assert (revoke(ledger, lot, amount=5).debt, ledger.available()) == (2, -2)
    with refused(422, "invalid_amount", amount=3, revocable=2):
        revoke(ledger, lot, amount=3)
    assert revoke(ledger, lot).debt == 2
    with refused(422, "invalid_amount"):
        revoke(ledger, lot)
    assert_sound(ledger)


def test_what_expired_cannot_be_revoked_and_what_was_used_before_can(ledger: Ledger) -> None:
    lot = ledger.grant(10, expires_at=NOON + HOUR)
    ledger.use(3)
    ledger.now = NOON + HOUR
    with refused(422, "invalid_amount", revocable=3):
        revoke(ledger, lot, amount=4)
    assert revoke(ledger, lot).debt == 3


def test_a_pending_grant_is_cut_before_it_starts(ledger: Ledger) -> None:
    lot = ledger.grant(10, effective_at=NOON + HOUR)
    assert revoke(ledger, lot, amount=4).amount == -4
    assert ledger.sums() == (0, 0, 0, 0)
    assert ledger.get_balance("alpha").pending == 6
    ledger.now = NOON + HOUR
    ledger.book()
    assert ledger.sums() == (6, 0, 6, 0)
    assert_sound(ledger)


def test_a_pending_grant_that_was_revoked_whole_never_starts(ledger: Ledger) -> None:
    lot = ledger.grant(10, effective_at=NOON + HOUR)
    revoke(ledger, lot)
    ledger.now = NOON + HOUR
    ledger.book()
    assert ledger.sums() == (0, 0, 0, 0)
    assert ledger.get_balance("alpha").pending == 0
    assert ledger.kinds() == [("grant", 10), ("revoke", -10)]
    assert_sound(ledger)


def test_a_hold_keeps_its_credits_when_its_grant_is_revoked(ledger: Ledger) -> None:
    lot = ledger.grant(10)
    ledger.reserve("alpha", 6, "r")
    result = revoke(ledger, lot)
    assert (result.amount, result.debt) == (-4, 6)
    assert ledger.settle("alpha", "r", 6).charged == 6
    assert ledger.sums() == (-6, 0, 0, 6)


def test_a_revoke_replays_and_refuses_other_arguments(ledger: Ledger) -> None:
    lot = ledger.grant(10)
    ledger.use(7)
    first = revoke(ledger, lot, amount=5, key="v")
    ledger.grant(50)
    assert same(first, revoke(ledger, lot, amount="5.0", key="v"))
    for change in ({"amount": 6}, {"amount": None}, {"reason": "fraud"}):
        with refused(409, "idempotency_conflict", operation="revoke_grant", key="v"):
            revoke(ledger, lot, **{"amount": 5, "key": "v", **change})


def test_a_grant_of_another_account_cannot_be_revoked(ledger: Ledger) -> None:
    ledger.open("beta")
    lot = ledger.grant(10)
    with refused(404, "grant_not_found", grant_id=lot.grant_id):
        ledger.revoke_grant("beta", lot.grant_id, key="v")


def test_a_frozen_account_can_be_clawed_back(ledger: Ledger) -> None:
    lot = ledger.grant(10)
    ledger.freeze_account("alpha")
    assert revoke(ledger, lot).amount == -10
