"""The verbs do the usual case in one statement and all else the general way. Both ways write the same."""

from collections.abc import Callable
from decimal import Decimal
from random import Random
from typing import Any

import pytest
from client import CreditsError
from ledger_support import HOUR, MINUTE, SECOND, Ledger, assert_sound
from psycopg import Connection

GENERAL_ONLY = """
    create or replace function credits._is_plain(balance credits.balances) returns boolean language sql
    as $$ select false $$
"""


def outcome(verb: Callable[..., Any], *arguments: Any, **named: Any) -> str:
    """What a call answers, or what it is refused with."""
    try:
        return str(verb(*arguments, **named))
    except CreditsError as error:
        return str(error)


def work(ledger: Ledger, seed: int) -> list[str]:
    """Four accounts with spends and holds: mostly what is usual, now and then what is not."""
    random = Random(seed)
    names = ["plain", "many", "scoped", "poor"]
    ledger.open("plain", 500)
    ledger.open("many", 5, Decimal("7.25"), 9, 400, expires_at=ledger.now + 2 * HOUR)
    ledger.open("scoped", 200)
    ledger.grant(50, "scoped", scope=["songs"])
    ledger.open("poor", 12)
    for name, threshold in (("plain", 450), ("many", 380), ("scoped", 150), ("poor", 8)):
        ledger.set_low_balance_alert(name, threshold)
    ledger.set_member("plain", "m1", monthly_limit=60)
    ledger.set_member("many", "m1")
    holds = [("plain", "k0")]
    answers = []
    for i in range(200):
        ledger.now += random.choice((SECOND, SECOND, MINUTE, 9 * MINUTE))
        account_id, key = random.choice(names), f"k{random.choice((i, i, i, i - 3))}"
        amount = random.choice((1, 2, Decimal("0.50"), Decimal("3.000001"), 12, 0, 200))
        said: dict[str, Any] = {"metadata": {"a": 1}, "subject": "book:1"}
        more = random.choice(({}, {}, {"capability": "songs"}, said, {"member_id": "m1"}, {"member_id": "m2"}))
        policy = random.choice(({}, {"on_overage": "overflow"}, {"on_overage": "reject", "metadata": {"b": 2}}))
        match random.choice(("spend", "spend", "reserve", "reserve", "settle", "settle", "again", "rest")):
            case "spend":
                answers.append(outcome(ledger.spend, account_id, amount, key=key, **more))
            case "reserve":
                answers.append(outcome(ledger.reserve, account_id, amount, key, **more))
                holds.append((account_id, key))
            case "settle":
                answers.append(outcome(ledger.settle, *holds[-1], amount, **policy))
            case "again":
                answers.append(outcome(ledger.settle, *random.choice(holds), amount, **policy))
            case "rest":
                answers.append(outcome(ledger.capture, *holds[-1], 1, key=key))
                answers.append(outcome(ledger.release, *random.choice(holds)))
                random.choice((ledger.freeze_account, *[ledger.unfreeze_account] * 4))(account_id)
    return answers


@pytest.mark.parametrize("seed", range(4))
def test_one_statement_and_the_general_way_write_the_same(conn: Connection[Any], seed: int) -> None:
    runs = []
    for preparation in ("select", GENERAL_ONLY):
        with conn.transaction(force_rollback=True):
            ledger = Ledger(conn)
            ledger.change("alter table credits.grants alter column grant_id restart with 1000000")
            ledger.change(preparation)
            ledger.change("alter table credits.notifications alter column notification_id restart with 1000000")
            runs.append((work(ledger, seed), ledger.snapshot()))
            assert ledger.list_notifications(kind="low_balance")
            assert_sound(ledger)
    (answers, tables), (general_answers, general_tables) = runs
    assert answers == general_answers
    assert tables == general_tables
