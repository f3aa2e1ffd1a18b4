"""Many spends in one call: each as spend would do it, one result each, none stopped by another."""

from random import Random
from typing import Any

import pytest
from client import CreditsError
from ledger_support import HOUR, NOON, Ledger, assert_sound
from psycopg import Connection


@pytest.fixture
def ledger(conn: Connection[Any]) -> Ledger:
    ledger = Ledger(conn)
    ledger.open("alpha", 100)
    ledger.open("beta", 50)
    return ledger


def ask(account_id: str, amount: Any, key: str, **more: Any) -> dict[str, Any]:
    """One request."""
    return {"account_id": account_id, "amount": amount, "key": key, **more}


def test_results_come_in_the_order_of_the_requests(ledger: Ledger) -> None:
    rows = ledger.spend_many([ask("beta", 5, "k1"), ask("alpha", 10, "k2"), ask("beta", "7.50", "k3")])
    assert [(r.position, r.account_id, r.key, r.status, r.code) for r in rows] == [
        (1, "beta", "k1", 200, None), (2, "alpha", "k2", 200, None), (3, "beta", "k3", 200, None),
    ]  # fmt: skip
    assert [(r.entry_seq, float(r.amount), float(r.balance), float(r.available), r.replayed) for r in rows] == [
        (2, -5, 45, 45, False), (2, -10, 90, 90, False), (3, -7.5, 37.5, 37.5, False),
    ]  # fmt: skip
    assert_sound(ledger)


def test_nothing_is_done_for_no_requests(ledger: Ledger) -> None:
    with ledger.unchanged():
        assert ledger.spend_many([]) == []


def test_a_refused_request_stops_no_other(ledger: Ledger) -> None:
    ledger.open("cold", 10)
    ledger.freeze_account("cold")
    ledger.spend("alpha", 1, key="used")
    requests = [
        ask("alpha", 10, "k1"), ask("alpha", 500, "k2"), ask("nobody", 1, "k3"), ask("cold", 1, "k4"),
        ask("alpha", 2, "used"), ask("alpha", -1, "k5"), ask("alpha", 1, ""),
        ask("beta", 50, "k6"), ask("beta", 1, "k7"),
    ]  # fmt: skip
    rows = ledger.spend_many(requests)
    assert [(row.status, row.code) for row in rows] == [
        (200, None), (402, "insufficient_credits"), (404, "account_not_found"), (423, "account_frozen"),
        (409, "idempotency_conflict"), (422, "invalid_amount"), (400, "invalid_request"), (200, None),
        (402, "insufficient_credits"),
    ]  # fmt: skip
    assert (rows[1].detail["required"], rows[1].detail["available"]) == (500, 89)
    assert (ledger.available("alpha"), ledger.available("beta")) == (89, 0)
    assert_sound(ledger)


def test_a_batch_replays_as_a_whole_and_in_parts(ledger: Ledger) -> None:
    requests = [ask("alpha", n + 1, f"k{n}", metadata={"n": n}) for n in range(5)]
    first = ledger.spend_many(requests)
    ledger.use(50)
    with ledger.unchanged():
        again = ledger.spend_many(requests)
    assert again == [row._replace(replayed=True) for row in first]
    mixed = ledger.spend_many([requests[3], ask("alpha", 1, "new")])
    assert [(row.status, row.replayed) for row in mixed] == [(200, True), (200, False)]
    single = ledger.spend("alpha", 3, key="k2", metadata={"n": 2})
    assert (single.entry_seq, single.balance, single.replayed) == (first[2].entry_seq, first[2].balance, True)


def test_a_key_twice_in_one_batch_is_spent_once(ledger: Ledger) -> None:
    rows = ledger.spend_many(
        [ask("alpha", 5, "k"), ask("alpha", "5.0", "k"), ask("alpha", 6, "k"), ask("beta", 5, "k")]
    )
    assert [(row.status, row.replayed) for row in rows] == [(200, False), (200, True), (409, None), (200, False)]
    assert (ledger.available("alpha"), ledger.available("beta")) == (95, 45)


def test_requests_with_a_capability_use_scoped_credits(ledger: Ledger) -> None:
    ledger.grant(30, kind="plan", scope=["image"])
    rows = ledger.spend_many([ask("alpha", 120, "k1", capability="image"), ask("beta", 15, "k2", capability="image")])
    assert [row.status for row in rows] == [200, 200]
    assert (ledger.available("alpha"), ledger.available("beta")) == (10, 35)


def test_requests_of_one_account_are_served_in_their_order(ledger: Ledger) -> None:
    ledger.grant(30, kind="plan", scope=["image"])
    rows = ledger.spend_many([ask("alpha", 120, "k1", capability="image"), ask("alpha", 15, "k2")])
    assert [(row.status, row.code) for row in rows] == [(200, None), (402, "insufficient_credits")]
    assert ledger.available() == 10


def test_requests_keep_everything_that_was_said(ledger: Ledger) -> None:
    said = {"description": "A page", "subject": "book:1", "member_id": "m"}
    ledger.spend_many([ask("alpha", 5, "k", metadata={"a": [1]}, **said)])
    row = ledger.history("alpha")[0]
    assert {name: getattr(row, name) for name in said} == said
    assert (row.metadata, row.kind, row.operation, row.key, row.created_at) == ({"a": [1]}, "spend", "spend", "k", NOON)


def test_what_is_due_is_booked_first(ledger: Ledger) -> None:
    ledger.grant(30, expires_at=NOON + HOUR)
    ledger.grant(20, "beta", effective_at=NOON + HOUR)
    ledger.now = NOON + HOUR
    rows = ledger.spend_many([ask("alpha", 101, "k1"), ask("beta", 70, "k2")])
    assert [row.status for row in rows] == [402, 200]


def test_debts_refuse_a_batch_as_they_refuse_a_spend(ledger: Ledger) -> None:
    lot = ledger.grant(10, kind="plan")
    ledger.use(110)
    ledger.revoke_grant("alpha", lot.grant_id, key="v")
    (row,) = ledger.spend_many([ask("alpha", 1, "k")])
    assert (row.status, row.detail["available"]) == (402, -10)


@pytest.mark.parametrize("seed", range(10))
def test_a_batch_writes_what_single_spends_write(ledger: Ledger, seed: int) -> None:
    random = Random(seed)
    for prefix in ("one", "all"):
        random.seed(seed)
        for n in range(4):
            ledger.open_account(f"{prefix}{n}")
            for _ in range(random.randrange(6)):
                ledger.grant(
                    random.randrange(1, 30), f"{prefix}{n}", kind=random.choice(("plan", "promo", "purchase")),
                    expires_at=random.choice((None, NOON + HOUR)), scope=random.choice((None, None, ["image"])),
                )  # fmt: skip
    wanted = [(random.randrange(4), random.randrange(1, 12), f"k{n}") for n in range(40)]
    batch = [
        (row.status, row.amount, row.balance, row.available)
        for row in ledger.spend_many([ask(f"all{n}", a, k) for n, a, k in wanted])
    ]
    single = []
    for n, amount, key in wanted:
        try:
            row = ledger.spend(f"one{n}", amount, key=key)
            single.append((200, row.amount, row.balance, row.available))
        except CreditsError as error:
            single.append((error.status, None, None, None))
    assert batch == single
    for n in range(4):
        lots = [
            [
                (g.remaining, g.consumed, g.status)
                for g in ledger.table("grants", "account_id = %s order by grant_id", f"{prefix}{n}")
            ]
            for prefix in ("one", "all")
        ]
        assert lots[0] == lots[1]
        assert ledger.kinds(f"one{n}") == ledger.kinds(f"all{n}")
    assert_sound(ledger)


def test_ten_thousand_requests_are_one_call(ledger: Ledger) -> None:
    ledger.grant(10_000)
    rows = ledger.spend_many([ask("alpha", 1, f"k{n}") for n in range(10_000)])
    assert {row.status for row in rows} == {200}
    assert ledger.available() == 100
    assert ledger.prove_balance("alpha").ok
