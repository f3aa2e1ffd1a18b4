"""Accounts: opened once, frozen and thawed, their balance now and then, and their history in pages."""

from typing import Any

import pytest
from ledger_support import DAY, HOUR, NOON, TICK, Ledger, refused, same
from psycopg import Connection


@pytest.fixture
def ledger(conn: Connection[Any]) -> Ledger:
    ledger = Ledger(conn)
    ledger.rows("load_demo_catalog")
    return ledger


def test_an_account_opens_empty(ledger: Ledger) -> None:
    result = ledger.open_account("alpha", kind="organization", email="alpha@example.org", metadata={"n": 1})
    assert (result.account_id, result.kind, result.status, result.plan) == ("alpha", "organization", "active", None)
    assert (result.email, result.created_at, result.replayed) == ("alpha@example.org", NOON, False)
    row = ledger.get_balance("alpha")
    assert (row.available, row.held, row.balance, row.debt, row.pending, row.entry_seq) == (0, 0, 0, 0, 0, 0)
    assert (row.by_kind, row.scoped, row.next_expiry_at) == ({}, {}, None)


def test_opening_again_replays_as_long_as_nothing_contradicts(ledger: Ledger) -> None:
    first = ledger.open_account("alpha", plan="free", email="alpha@example.org")
    ledger.use(10)
    with ledger.unchanged():
        for repeat in ({}, {"kind": "user"}, {"plan": "free"}, {"plan": "free", "email": "alpha@example.org"}):
            assert same(first, ledger.open_account("alpha", **repeat))


@pytest.mark.parametrize(
    "change", [{"kind": "organization"}, {"plan": "team"}, {"email": "x"}, {"metadata": {"n": 2}}], ids=str
)
def test_opening_again_with_other_arguments_is_refused(ledger: Ledger, change: dict[str, Any]) -> None:
    ledger.open_account("alpha", plan="free", metadata={"n": 1})
    with ledger.unchanged(), refused(409, "idempotency_conflict", operation="open_account", key="alpha"):
        ledger.open_account("alpha", **change)


def test_opening_shows_the_account_as_it_is_now(ledger: Ledger) -> None:
    ledger.open_account("alpha")
    ledger.freeze_account("alpha")
    assert (ledger.open_account("alpha").status, ledger.open_account("alpha").replayed) == ("frozen", True)


def test_a_plan_that_is_not_offered_any_more_opens_no_account(ledger: Ledger) -> None:
    ledger.change("update credits.plans set active = false where code = 'free'")
    with ledger.unchanged(), refused(404, "plan_not_found", plan="free"):
        ledger.open_account("alpha", plan="free")


@pytest.mark.parametrize("account_id", ["a" * 200, "Ann", " ", "alpha@example.org", "Łucja 🙂", "' or true --"])
def test_an_account_id_is_any_text_and_exact(ledger: Ledger, account_id: str) -> None:
    ledger.open("alpha", 5)
    ledger.open(account_id, 7)
    assert (ledger.available("alpha"), ledger.available(account_id)) == (5, 7)


def test_freezing_twice_changes_nothing_and_keeps_the_first_reason(ledger: Ledger) -> None:
    ledger.open("alpha", 10)
    first = ledger.freeze_account("alpha", reason="chargeback")
    assert (first.status, first.replayed) == ("frozen", False)
    with ledger.unchanged():
        assert ledger.freeze_account("alpha", reason="other").replayed
    (account,) = ledger.table("accounts")
    assert account.settings == {"status_reason": "chargeback"}
    assert ledger.get_balance("alpha").status == "frozen"


def test_thawing_lets_the_account_spend_again_and_forgets_the_reason(ledger: Ledger) -> None:
    ledger.open("alpha", 10)
    ledger.freeze_account("alpha", reason="chargeback")
    with refused(423, "account_frozen", account_id="alpha", status="frozen"):
        ledger.use(1)
    assert ledger.unfreeze_account("alpha").status == "active"
    assert ledger.unfreeze_account("alpha").replayed
    ledger.use(1)
    (account,) = ledger.table("accounts")
    assert account.settings == {}


def test_a_closed_account_is_neither_frozen_nor_thawed_but_can_be_read(ledger: Ledger) -> None:
    ledger.open("alpha", 10)
    ledger.set_status("closed")
    with ledger.unchanged():
        for verb in (ledger.freeze_account, ledger.unfreeze_account):
            with refused(423, "account_closed", status="closed"):
                verb("alpha")
        assert ledger.get_balance("alpha").status == "closed"
        assert ledger.prove_balance("alpha").ok


def test_the_balance_at_a_moment_is_what_the_ledger_knew_then(ledger: Ledger) -> None:
    ledger.open("alpha")
    moments = [(NOON - TICK, 0)]
    for n in range(1, 11):
        ledger.now = NOON + n * HOUR
        ledger.grant(10)
        ledger.use(3)
        moments += [(ledger.now - TICK, 7 * (n - 1)), (ledger.now, 7 * n), (ledger.now + TICK, 7 * n)]
    for at, balance in moments:
        assert ledger.balance_at("alpha", at) == balance, at


def test_an_expiry_counts_from_when_it_was_booked(ledger: Ledger) -> None:
    ledger.open("alpha", 10, expires_at=NOON + HOUR)
    ledger.now = NOON + DAY
    ledger.book()
    assert ledger.balance_at("alpha", NOON + 2 * HOUR) == 10
    assert ledger.balance_at("alpha", NOON + DAY) == 0


def test_history_is_paged_without_gaps_or_repeats(ledger: Ledger) -> None:
    ledger.open("alpha", 100)
    for n in range(11):
        ledger.spend("alpha", n + 1, key=f"k{n}")
    seen: list[int] = []
    while page := ledger.history("alpha", before_seq=seen[-1] if seen else None, max_rows=5):
        seen += [row.entry_seq for row in page]
    assert seen == list(range(12, 0, -1))
    assert [row.balance_after for row in ledger.history("alpha", max_rows=2)] == [34, 45]
    assert len(ledger.history("alpha", max_rows=None)) == 12


def test_history_is_filtered_by_kinds(ledger: Ledger) -> None:
    ledger.open("alpha", 100, 5)
    ledger.spend("alpha", 10, key="s")
    ledger.refund_spend("alpha", "s", key="f")
    assert {row.kind for row in ledger.history("alpha")} == {"grant", "spend", "refund"}
    assert [row.amount for row in ledger.history("alpha", kinds=["refund", "spend"])] == [10, -10]
    assert ledger.history("alpha", kinds=["expire"]) == []
    assert ledger.history("alpha", kinds=[]) == []


def test_the_history_of_one_account_shows_no_other(ledger: Ledger) -> None:
    ledger.open("alpha", 100)
    ledger.open("beta", 50)
    assert [row.amount for row in ledger.history("beta")] == [50]
