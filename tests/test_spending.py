"""Spending at once, and giving back to the very grants that paid."""

from decimal import Decimal
from typing import Any

import pytest
from ledger_support import HOUR, NOON, Ledger, assert_sound, refused, same
from psycopg import Connection


@pytest.fixture
def ledger(conn: Connection[Any]) -> Ledger:
    ledger = Ledger(conn)
    ledger.open("alpha", 100)
    return ledger


def test_a_spend_is_an_entry_with_everything_that_was_said(ledger: Ledger) -> None:
    said = {"description": "A picture", "subject": "book:42", "member_id": "m1", "capability": "image"}
    result = ledger.spend("alpha", "12.5", key="k", metadata={"n": 1}, **said)
    assert (result.account_id, result.amount, result.debt) == ("alpha", Decimal("-12.5"), 0)
    assert (result.balance, result.available, result.created_at) == (Decimal("87.5"), Decimal("87.5"), NOON)
    row = ledger.history("alpha")[0]
    assert (row.entry_seq, row.kind, row.operation, row.key) == (result.entry_seq, "spend", "spend", "k")
    assert {name: getattr(row, name) for name in said} == said
    assert row.metadata == {"n": 1}
    assert_sound(ledger)


def test_amounts_are_shown_trimmed(ledger: Ledger) -> None:
    ledger.spend("alpha", "50.000000", key="k")
    row = ledger.history("alpha")[0]
    assert [str(value) for value in (row.amount, row.balance_after, row.grants[0]["amount"])] == ["-50", "50", "50"]
    assert str(ledger.available()) == "50"


def test_the_smallest_amount_is_exact(ledger: Ledger) -> None:
    for n in range(3):
        ledger.spend("alpha", "0.000001", key=f"k{n}")
    assert ledger.available() == Decimal("99.999997")


def test_all_of_it_can_be_spent_and_nothing_more(ledger: Ledger) -> None:
    ledger.use(100)
    with ledger.unchanged(), refused(402, "insufficient_credits", required=0.000001, available=0):
        ledger.use("0.000001")
    (grant,) = ledger.table("grants")
    assert (grant.status, grant.consumed) == ("exhausted", 100)


def test_a_refused_spend_leaves_no_trace_and_its_key_passes_after_a_top_up(ledger: Ledger) -> None:
    for _ in range(2):
        with ledger.unchanged(), refused(402, "insufficient_credits", required=150, available=100):
            ledger.spend("alpha", 150, key="k")
    ledger.grant(50)
    result = ledger.spend("alpha", 150, key="k")
    assert (result.replayed, result.balance) == (False, 0)


def test_a_spend_replays_its_first_result(ledger: Ledger) -> None:
    first = ledger.spend("alpha", 5, key="k", metadata={"a": 1, "b": [2]})
    ledger.use(90)
    ledger.freeze_account("alpha")
    ledger.now += HOUR
    with ledger.unchanged():
        assert same(first, ledger.spend("alpha", "5.0", key="k", metadata={"b": [2], "a": 1.0}))


@pytest.mark.parametrize(
    "change",
    [{"amount": 6}, {"description": "x"}, {"subject": "x"}, {"member_id": "x"}, {"capability": "x"},
     {"metadata": {"x": 1}}, {"metadata": {}}],
    ids=str,
)  # fmt: skip
def test_a_used_key_refuses_other_arguments(ledger: Ledger, change: dict[str, Any]) -> None:
    ledger.spend("alpha", 5, key="k")
    with ledger.unchanged(), refused(409, "idempotency_conflict", operation="spend", key="k"):
        ledger.spend("alpha", **{"amount": 5, "key": "k", **change})


def test_a_key_belongs_to_its_account_and_operation(ledger: Ledger) -> None:
    ledger.open("beta", 50)
    for account_id in ("alpha", "beta"):
        assert not ledger.spend(account_id, 5, key="k").replayed
        assert not ledger.adjust(account_id, -5, key="k").replayed
        assert not ledger.refund_spend(account_id, "k", key="k").replayed
        assert not ledger.grant_credits(account_id, 5, key="k").replayed
    ledger.transfer_credits("alpha", "beta", 5, key="k")
    assert_sound(ledger)


@pytest.mark.parametrize(("status", "code"), [("frozen", "account_frozen"), ("closed", "account_closed")])
def test_an_account_that_may_not_spend_is_refused_before_its_balance_matters(
    ledger: Ledger, status: str, code: str
) -> None:
    ledger.set_status(status)
    for amount in (5, 500):
        with ledger.unchanged(), refused(423, code, account_id="alpha", status=status):
            ledger.use(amount)


def test_keys_and_names_are_taken_as_they_come(ledger: Ledger) -> None:
    for key in ("k" * 255, " ", "ключ-🙂", "'; drop table credits.entries; --", "a|b", "%s"):
        assert not ledger.spend("alpha", 1, key=key, subject=key, description=key).replayed
        assert ledger.spend("alpha", 1, key=key, subject=key, description=key).replayed
    assert ledger.available() == 94
    assert_sound(ledger)


def test_a_refund_returns_to_the_grants_that_paid_the_last_one_first(ledger: Ledger) -> None:
    ledger.grant(10, kind="plan")
    ledger.grant(10, kind="trial")
    ledger.spend("alpha", 25, key="s", subject="book:1", member_id="m")
    used = [slice_["grant_id"] for slice_ in ledger.history("alpha")[0].grants]
    results = []
    for n, amount in enumerate([3, 9, 6]):
        ledger.refund_spend("alpha", "s", amount=amount, reason="bad", key=f"f{n}")
        results.append([(used.index(s["grant_id"]), s["amount"]) for s in ledger.history("alpha")[0].grants])
    assert results == [[(2, 3)], [(2, 2), (1, 7)], [(1, 3), (0, 3)]]
    row = ledger.history("alpha")[0]
    assert (row.subject, row.member_id, row.description, row.kind) == ("book:1", "m", "bad", "refund")
    with ledger.unchanged(), refused(422, "invalid_amount", amount=8, refundable=7):
        ledger.refund_spend("alpha", "s", amount=8, key="f9")
    assert ledger.refund_spend("alpha", "s", key="f9").amount == 7
    assert ledger.available() == 120
    with refused(422, "invalid_amount"):
        ledger.refund_spend("alpha", "s", key="f10")
    assert_sound(ledger)


def test_a_grant_that_was_used_up_can_be_spent_again_after_a_refund(ledger: Ledger) -> None:
    ledger.spend("alpha", 100, key="s")
    ledger.refund_spend("alpha", "s", amount=40, key="f")
    ledger.use(40)
    assert ledger.available() == 0


def test_captures_and_settles_can_be_refunded(ledger: Ledger) -> None:
    ledger.reserve("alpha", 50, "r")
    ledger.capture("alpha", "r", 20, key="c")
    ledger.settle("alpha", "r", 60)
    assert ledger.refund_spend("alpha", "c", amount=5, key="f1").amount == 5
    assert ledger.refund_spend("alpha", "c", key="f2").amount == 15
    assert ledger.refund_spend("alpha", "r", key="f3").amount == 60
    assert {row.reservation_id for row in ledger.history("alpha", kinds=["refund"])} == {"r"}
    assert ledger.sums() == (100, 0, 100, 0)
    assert_sound(ledger)


def test_what_was_charged_into_debt_is_not_refunded(ledger: Ledger) -> None:
    ledger.set_debt_limit("alpha", 50)
    ledger.reserve("alpha", 100, "r")
    ledger.settle("alpha", "r", 130, on_overage="overflow")
    with refused(422, "invalid_amount", refundable=100):
        ledger.refund_spend("alpha", "r", amount=130, key="f")
    ledger.refund_spend("alpha", "r", key="f")
    assert ledger.sums() == (70, 0, 70, 0)


def test_a_refund_replays_and_refuses_other_arguments(ledger: Ledger) -> None:
    ledger.spend("alpha", 50, key="s")
    ledger.spend("alpha", 10, key="s2")
    first = ledger.refund_spend("alpha", "s", key="f")
    ledger.use(20)
    with ledger.unchanged():
        assert same(first, ledger.refund_spend("alpha", "s", key="f"))
        changes: list[dict[str, Any]] = [{"amount": 50}, {"reason": "x"}, {"spend_key": "s2"}]
        for change in changes:
            with refused(409, "idempotency_conflict", operation="refund_spend", key="f"):
                ledger.refund_spend("alpha", **{"spend_key": "s", "key": "f", **change})


def test_only_charges_can_be_refunded(ledger: Ledger) -> None:
    ledger.adjust("alpha", -5, key="a")
    ledger.reserve("alpha", 5, "open")
    ledger.reserve("alpha", 5, "nothing")
    ledger.settle("alpha", "nothing", 0)
    for name in ("a", "open", "nothing"):
        with refused(404, "spend_not_found", spend_key=name):
            ledger.refund_spend("alpha", name, key="f")
