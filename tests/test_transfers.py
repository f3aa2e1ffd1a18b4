"""Credits given to another account: what was given keeps its expiry and its cost."""

from typing import Any

import pytest
from ledger_support import DAY, HOUR, NOON, Ledger, assert_sound, refused, same
from psycopg import Connection


@pytest.fixture
def ledger(conn: Connection[Any]) -> Ledger:
    ledger = Ledger(conn)
    ledger.open("alpha", 100)
    ledger.open("beta")
    return ledger


@pytest.mark.parametrize(("giver", "taker"), [("alpha", "beta"), ("beta", "alpha")])
def test_credits_go_from_one_account_to_the_other_in_both_directions(ledger: Ledger, giver: str, taker: str) -> None:
    ledger.grant(50, "beta")
    before = {name: ledger.available(name) for name in (giver, taker)}
    result = ledger.transfer_credits(giver, taker, 30, description="lunch", key="t", metadata={"n": 1})
    assert (result.from_account_id, result.to_account_id, result.amount) == (giver, taker, 30)
    assert (result.balance, result.available) == (before[giver] - 30, before[giver] - 30)
    assert ledger.available(taker) == before[taker] + 30
    for name, kind, amount in ((giver, "transfer_out", -30), (taker, "transfer_in", 30)):
        row = ledger.history(name)[0]
        assert (row.kind, row.amount, row.description, row.metadata) == (kind, amount, "lunch", {"n": 1})
    assert_sound(ledger)


def test_a_gift_keeps_the_expiry_of_what_was_given(ledger: Ledger) -> None:
    for days in (2, 1):
        ledger.grant(10, kind="plan", expires_at=NOON + days * DAY)
    ledger.transfer_credits("alpha", "beta", 25, key="t")
    lots = ledger.table("grants", "account_id = 'beta' order by grant_id")
    assert [(lot.kind, lot.priority, lot.amount, lot.expires_at) for lot in lots] == [
        ("gift", 25, 10, NOON + DAY), ("gift", 25, 10, NOON + 2 * DAY), ("gift", 25, 5, None),
    ]  # fmt: skip
    assert {lot.source for lot in lots} == {"transfer:alpha"}
    ledger.now = NOON + 2 * DAY
    assert ledger.available("beta") == 5


def test_a_gift_keeps_its_share_of_the_cost(ledger: Ledger) -> None:
    ledger.change("update credits.grants set cost = 1000, cost_currency = 'usd'")
    ledger.grant(20, kind="promo")
    ledger.transfer_credits("alpha", "beta", 45, key="t")
    lots = {lot.cost_currency: (lot.amount, lot.cost) for lot in ledger.table("grants", "account_id = 'beta'")}
    used = ledger.history("alpha")[0].grants
    paid = sum(
        s["amount"]
        for s in used
        if s["grant_id"] == ledger.table("grants", "cost is not null and account_id = 'alpha'")[0].grant_id
    )
    assert lots["usd"] == (paid, paid * 10)
    assert sum(amount for amount, _ in lots.values()) == 45


def test_only_what_is_available_and_unscoped_can_be_given(ledger: Ledger) -> None:
    ledger.grant(50, scope=["image"])
    ledger.reserve("alpha", 30, "r")
    with ledger.unchanged(), refused(402, "insufficient_credits", required=71, available=70):
        ledger.transfer_credits("alpha", "beta", 71, key="t")
    ledger.transfer_credits("alpha", "beta", 70, key="t")


def test_a_transfer_replays_and_refuses_other_arguments(ledger: Ledger) -> None:
    ledger.open("cy")
    first = ledger.transfer_credits("alpha", "beta", 30, key="t")
    ledger.use(70)
    with ledger.unchanged():
        assert same(first, ledger.transfer_credits("alpha", "beta", "30.0", key="t"))
        changes: list[dict[str, Any]] = [
            {"amount": 31},
            {"to_account_id": "cy"},
            {"description": "x"},
            {"metadata": {"n": 1}},
        ]
        for change in changes:
            with refused(409, "idempotency_conflict", operation="transfer", key="t"):
                ledger.transfer_credits("alpha", **{"to_account_id": "beta", "amount": 30, "key": "t", **change})


def test_a_key_belongs_to_the_giver(ledger: Ledger) -> None:
    ledger.transfer_credits("alpha", "beta", 30, key="t")
    assert not ledger.transfer_credits("beta", "alpha", 30, key="t").replayed
    assert ledger.available("alpha") == 100


@pytest.mark.parametrize(
    ("account_id", "status", "code"),
    [
        ("alpha", "frozen", "account_frozen"),
        ("alpha", "closed", "account_closed"),
        ("beta", "closed", "account_closed"),
    ],
)
def test_an_account_that_may_not_give_or_take_is_refused(
    ledger: Ledger, account_id: str, status: str, code: str
) -> None:
    ledger.set_status(status, account_id)
    with ledger.unchanged(), refused(423, code, account_id=account_id):
        ledger.transfer_credits("alpha", "beta", 5, key="t")


def test_a_frozen_account_may_take(ledger: Ledger) -> None:
    ledger.freeze_account("beta")
    ledger.transfer_credits("alpha", "beta", 5, key="t")
    assert ledger.available("beta") == 5


def test_a_transfer_books_what_is_due_on_both_sides(ledger: Ledger) -> None:
    ledger.grant(7, "beta", expires_at=NOON + HOUR)
    ledger.grant(8, "alpha", expires_at=NOON + HOUR)
    ledger.now = NOON + HOUR
    ledger.transfer_credits("alpha", "beta", 100, key="t")
    assert (ledger.sums("alpha"), ledger.sums("beta")) == ((0, 0, 0, 0), (100, 0, 100, 0))
    assert ("expire", -7) in ledger.kinds("beta")
