"""Many connections at once: nothing is spent twice, nothing deadlocks, and the books are sound afterwards."""

from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from functools import partial
from random import Random
from typing import Any

import psycopg
import pytest
from client import CreditsError
from conftest import stop_clock
from ledger_support import DAY, HOUR, NOON, SECOND, Ledger, assert_sound, committed, together
from servers import EVERY_VERSION, Database, until

THREADS = 20


@pytest.fixture
def ledger(database: Database) -> Iterator[Ledger]:
    """Commits what it does, and proves the books when the test is over."""
    with committed(database) as ledger:
        yield ledger
        assert_sound(ledger)


def outcomes(results: list[Any]) -> Counter[str]:
    """How often each outcome came: done, replayed, or the code of a refusal."""
    return Counter(
        result.code if isinstance(result, CreditsError) else "replayed" if result.replayed else "done"
        for result in results
    )


Verb = Callable[[Ledger], Any]

ONCE: dict[str, tuple[Verb, Verb]] = {  # what a test prepares, what all threads do then
    "open_account": (lambda _: None, lambda on: on.open_account("beta")),
    "freeze_account": (lambda _: None, lambda on: on.freeze_account("alpha")),
    "grant_credits": (lambda _: None, lambda on: on.grant_credits("alpha", 7, key="k")),
    "spend": (lambda _: None, lambda on: on.spend("alpha", 7, key="k")),
    "adjust": (lambda _: None, lambda on: on.adjust("alpha", -7, key="k")),
    "transfer_credits": (lambda on: on.open("beta"), lambda on: on.transfer_credits("alpha", "beta", 7, key="k")),
    "refund_spend": (lambda on: on.spend("alpha", 7, key="s"), lambda on: on.refund_spend("alpha", "s", key="k")),
    "revoke_grant": (
        lambda _: None,
        lambda on: on.revoke_grant("alpha", on.history("alpha", kinds=["grant"])[0].grants[0]["grant_id"], key="k"),
    ),
    "reserve": (lambda _: None, lambda on: on.reserve("alpha", 7, "r")),
    "capture": (lambda on: on.reserve("alpha", 7, "r"), lambda on: on.capture("alpha", "r", 5, key="k")),
    "settle": (lambda on: on.reserve("alpha", 7, "r"), lambda on: on.settle("alpha", "r", 5)),
    "release": (lambda on: on.reserve("alpha", 7, "r"), lambda on: on.release("alpha", "r")),
}


@pytest.mark.parametrize("verb", ONCE)
def test_one_key_from_many_threads_is_done_once(ledger: Ledger, database: Database, verb: str) -> None:
    prepare, do = ONCE[verb]
    ledger.open("alpha", 100)
    prepare(ledger)
    entries = ledger.get_balance("alpha").entry_seq
    results = together(database, [do] * THREADS)
    assert outcomes(results) == {"done": 1, "replayed": THREADS - 1}
    assert len({result._replace(replayed=False) for result in results}) == 1
    assert ledger.get_balance("alpha").entry_seq <= entries + 1


def test_one_key_with_many_arguments_is_done_once(ledger: Ledger, database: Database) -> None:
    ledger.open("alpha", 1000)
    results = together(
        database, [partial(Ledger.spend, account_id="alpha", amount=n + 1, key="k") for n in range(THREADS)]
    )
    assert outcomes(results) == {"done": 1, "idempotency_conflict": THREADS - 1}
    (spent,) = [result.amount for result in results if not isinstance(result, CreditsError)]
    assert ledger.available() == 1000 + spent


RUSH: dict[str, tuple[Verb, Callable[..., Any], str]] = {  # of 100, each takes 10 under its own key
    "spend": (lambda _: None, lambda on, n: on.spend("alpha", 10, key=f"k{n}"), "insufficient_credits"),
    "reserve": (lambda _: None, lambda on, n: on.reserve("alpha", 10, f"r{n}"), "insufficient_credits"),
    "adjust": (lambda _: None, lambda on, n: on.adjust("alpha", -10, key=f"k{n}"), "insufficient_credits"),
    "transfer_credits": (
        lambda on: on.open("beta"),
        lambda on, n: on.transfer_credits("alpha", "beta", 10, key=f"k{n}"),
        "insufficient_credits",
    ),
    "capture": (
        lambda on: on.reserve("alpha", 100, "r"),
        lambda on, n: on.capture("alpha", "r", 10, key=f"k{n}"),
        "insufficient_credits",
    ),
    "refund_spend": (
        lambda on: on.spend("alpha", 100, key="s"),
        lambda on, n: on.refund_spend("alpha", "s", amount=10, key=f"k{n}"),
        "invalid_amount",
    ),
    "revoke_grant": (
        lambda _: None,
        lambda on, n: on.revoke_grant(
            "alpha", on.history("alpha", kinds=["grant"])[0].grants[0]["grant_id"], amount=10, key=f"k{n}"
        ),
        "invalid_amount",
    ),
}


@pytest.mark.parametrize("verb", RUSH)
def test_a_rush_of_twenty_for_ten_portions_serves_exactly_ten(ledger: Ledger, database: Database, verb: str) -> None:
    prepare, do, refusal = RUSH[verb]
    ledger.open("alpha", 100)
    prepare(ledger)
    results = together(database, [partial(do, n=n) for n in range(THREADS)])
    assert outcomes(results) == {"done": 10, refusal: 10}


def test_a_rush_with_min_amount_holds_every_credit_and_none_twice(ledger: Ledger, database: Database) -> None:
    ledger.open("alpha", 95)
    results = together(
        database,
        [
            partial(Ledger.reserve, account_id="alpha", amount=10, reservation_id=f"r{n}", min_amount=1)
            for n in range(THREADS)
        ],
    )
    held = [result.amount for result in results if not isinstance(result, CreditsError)]
    assert sorted(held) == [5] + [10] * 9
    assert ledger.sums() == (0, 95, 95, 0)


@pytest.mark.parametrize("seed", range(4))
def test_one_reservation_is_closed_once_whoever_comes_first(ledger: Ledger, database: Database, seed: int) -> None:
    ledger.open("alpha", 100)
    ledger.reserve("alpha", 60, "r")
    verbs: list[Verb] = [
        lambda on: on.settle("alpha", "r", 50),
        lambda on: on.release("alpha", "r"),
        *[partial(Ledger.capture, account_id="alpha", reservation_id="r", amount=5, key=f"c{n}") for n in range(4)],
        lambda on: on.extend("alpha", "r", ttl="1 hour"),
    ] * 3
    Random(seed).shuffle(verbs)
    results = together(database, verbs)
    hold = ledger.get_reservation("alpha", "r")
    assert hold.status in {"settled", "released"}
    refused = {result.code for result in results if isinstance(result, CreditsError)}
    assert refused <= {"reservation_closed"}
    charges = sum((-row.amount for row in ledger.history("alpha", kinds=["capture", "settle"])), Decimal(0))
    assert ledger.sums() == (100 - charges, 0, 100 - charges, 0)


def any_verb(ledger: Ledger, random: Random, account_id: str, others: list[str]) -> Any:
    """One verb with random arguments on an account."""
    name, amount = f"n{random.randrange(12)}", Decimal(random.randrange(1, 40))
    key = f"k{random.randrange(10**9)}"
    verbs: list[Callable[[], Any]] = [
        lambda: ledger.grant_credits(account_id, amount, key=key),
        lambda: ledger.grant_credits(account_id, amount, key=name, kind="promo", scope=["image"]),
        lambda: ledger.spend(account_id, amount, key=key),
        lambda: ledger.spend(account_id, amount, key=name, capability="image"),
        lambda: ledger.refund_spend(account_id, name, amount=1, key=key),
        lambda: ledger.adjust(account_id, random.choice((1, -1)) * amount, key=key),
        lambda: ledger.reserve(account_id, amount, name, min_amount=1),
        lambda: ledger.capture(account_id, name, amount / 4, key=key),
        lambda: ledger.settle(account_id, name, amount, on_overage=random.choice(("cap", "overflow", "reject"))),
        lambda: ledger.release(account_id, name),
        lambda: ledger.revoke_grant(account_id, random.choice(grants(ledger, account_id)), amount=amount, key=key),
        lambda: ledger.get_balance(account_id),
        lambda: ledger.set_member(account_id, random.choice(("m1", "m2")), monthly_limit=200),
        lambda: ledger.spend(account_id, amount, key=key, member_id=random.choice(("m1", "m2"))),
        lambda: ledger.reserve(account_id, amount, name, min_amount=1, member_id=random.choice(("m1", "m2"))),
        *[partial(ledger.transfer_credits, account_id, other, amount, key=key) for other in others],
    ]
    try:
        return random.choice(verbs)()
    except CreditsError as error:
        return error


def grants(ledger: Ledger, account_id: str) -> list[int]:
    """Ids of the grants that the account's history names."""
    return [lot["grant_id"] for row in ledger.history(account_id, kinds=["grant"]) for lot in row.grants] or [0]


EXPECTED = {
    "insufficient_credits",
    "idempotency_conflict",
    "spend_not_found",
    "grant_not_found",
    "reservation_not_found",
    "reservation_closed",
    "invalid_amount",
    "member_limit_reached",
}


@EVERY_VERSION
@pytest.mark.parametrize("accounts", [["alpha"], ["alpha", "beta"], ["alpha", "beta", "Cy", "dee"]], ids=len)
def test_any_verbs_at_once_neither_deadlock_nor_break_an_invariant(
    ledger: Ledger, database: Database, accounts: list[str]
) -> None:
    for account_id in accounts:
        ledger.open(account_id, 100, kind="plan", key=f"first-{account_id}")
        ledger.set_debt_limit(account_id, 50)

    def work(on: Ledger, seed: int) -> Counter[str]:
        random = Random(seed)
        done = []
        for _ in range(60):
            account_id = random.choice(accounts)
            done.append(any_verb(on, random, account_id, [other for other in accounts if other != account_id]))
        return Counter(result.code if isinstance(result, CreditsError) else "done" for result in done)

    def audit(on: Ledger) -> Counter[str]:
        findings = [on.audit() for _ in range(10)]
        assert findings == [[]] * 10
        return Counter()

    total: Counter[str] = sum(together(database, [partial(work, seed=n) for n in range(8)] + [audit]), Counter())
    assert set(total) - {"done"} <= EXPECTED
    assert total["done"] > 100


def test_transfers_in_both_directions_at_once_lose_nothing(ledger: Ledger, database: Database) -> None:
    for account_id in ("alpha", "beta"):
        ledger.open(account_id, 500, key=f"first-{account_id}")

    def give(on: Ledger, giver: str, taker: str, n: int) -> int:
        for turn in range(20):
            on.transfer_credits(giver, taker, turn + 1, key=f"{n}-{turn}")
        return 20

    jobs = [
        partial(give, giver=giver, taker=taker, n=n)
        for n, (giver, taker) in enumerate([("alpha", "beta"), ("beta", "alpha")] * 4)
    ]
    assert together(database, jobs) == [20] * 8
    assert (ledger.available("alpha"), ledger.available("beta")) == (500, 500)


def test_batches_and_single_spends_on_the_same_accounts_take_each_credit_once(
    ledger: Ledger, database: Database
) -> None:
    accounts = [f"a{n}" for n in range(10)]
    for account_id in accounts:
        ledger.open(account_id, 100, key=f"first-{account_id}")

    def batch(on: Ledger, seed: int) -> int:
        shuffled = Random(seed).sample(accounts, len(accounts))
        requests = [{"account_id": a, "amount": 3, "key": f"b{seed}-{turn}"} for turn in range(4) for a in shuffled]
        return sum(row.status == 200 for row in on.spend_many(requests))

    def single(on: Ledger, seed: int) -> int:
        served = 0
        for turn in range(40):
            try:
                on.spend(Random(seed + turn).choice(accounts), 3, key=f"s{seed}-{turn}")
                served += 1
            except CreditsError as error:
                assert error.code == "insufficient_credits"
        return served

    results = together(database, [partial(job, seed=n) for n in range(8) for job in (batch, single)])
    served = sum(result for result in results if isinstance(result, int))
    left = sum(ledger.available(account_id) for account_id in accounts)
    assert left == 1000 - 3 * served
    assert all(ledger.available(account_id) >= 0 for account_id in accounts)


def test_one_batch_from_many_threads_is_booked_once(ledger: Ledger, database: Database) -> None:
    for n in range(5):
        ledger.open(f"a{n}", 10, key=f"first-{n}")
    requests = [{"account_id": f"a{n % 5}", "amount": 1, "key": f"k{n}"} for n in range(25)]
    results = together(database, [lambda on: on.spend_many(requests)] * 10)
    rows = [row for result in results if isinstance(result, list) for row in result]
    assert Counter((row.status, row.replayed) for row in rows) == {(200, False): 25, (200, True): 225}
    assert {ledger.available(f"a{n}") for n in range(5)} == {5}


def test_what_fell_due_is_booked_once_however_many_look(ledger: Ledger, database: Database) -> None:
    with database.connect("credits_owner", autocommit=True) as owner:
        stop_clock(owner, NOON)
        ledger.open("alpha")
        for n in range(10):
            ledger.grant(10, expires_at=NOON + HOUR + timedelta(minutes=n))
            ledger.grant(10, effective_at=NOON + HOUR + timedelta(minutes=n), expires_at=NOON + 3 * DAY)
            ledger.reserve("alpha", 5, f"r{n}", ttl="30 minutes")
        stop_clock(owner, NOON + DAY)
        expected = ledger.get_balance("alpha")
        together(database, [lambda on: on.use(1), *[Ledger.book] * THREADS])
    totals: Counter[str] = Counter()
    for kind, amount in ledger.kinds():
        totals[kind] += amount
    assert totals == {"grant": 200, "expire": -100, "spend": -1}
    assert ledger.sums() == (expected.available - 1, 0, expected.balance - 1, 0)
    assert {ledger.get_reservation("alpha", f"r{n}").status for n in range(10)} == {"expired"}


def test_after_a_freeze_has_answered_nothing_is_spent(ledger: Ledger, database: Database) -> None:
    ledger.open("alpha", 10000)

    def freeze(on: Ledger) -> int:
        on.freeze_account("alpha")
        seq: int = on.get_balance("alpha").entry_seq
        return seq

    def spend(on: Ledger) -> int:
        for _ in range(200):
            on.spend("alpha", 1, key=f"{id(on)}-{on.key()}")
        return 200

    seq, *spends = together(database, [freeze, *[spend] * 8])
    assert outcomes(spends) == {"account_frozen": 8}
    assert ledger.get_balance("alpha").entry_seq == seq


def test_readers_see_whole_operations_only(ledger: Ledger, database: Database) -> None:
    ledger.open("alpha", 1000)
    ledger.open("beta")

    def write(on: Ledger) -> None:
        for n in range(40):
            on.reserve("alpha", 10, f"{id(on)}-{n}")
            on.settle("alpha", f"{id(on)}-{n}", 4)
            on.transfer_credits("alpha", "beta", 1, key=f"{id(on)}-{n}")

    def read(on: Ledger) -> None:
        for _ in range(100):
            row = on.get_balance("alpha")
            assert row.available == row.balance - row.held - row.debt
            assert row.held % 10 == 0
            both = on.query(
                "select (credits.get_balance('alpha')).balance + (credits.get_balance('beta')).balance as sum"
            )
            assert (1000 - both[0].sum) % 4 == 0

    together(database, [write, write, write, read, read])
    assert ledger.sums("beta") == (120, 0, 120, 0)


def test_what_ends_while_a_transfer_waits_is_not_given(ledger: Ledger, database: Database) -> None:
    ledger.open("alpha", 100)
    ledger.open("beta", 1)
    with database.connect() as busy, ThreadPoolExecutor() as pool:
        busy.execute("select 1")
        Ledger(busy, at=None).spend("beta", 1, key="s")
        ledger.grant(10, expires_at=datetime.now(UTC) + SECOND)
        given = pool.submit(together, database, [lambda on: on.transfer_credits("alpha", "beta", 5, key="t")])
        until(lambda: ledger.available() == 100)
        busy.commit()
        given.result()
    assert (ledger.sums("alpha"), ledger.sums("beta")) == ((95, 0, 95, 0), (5, 0, 5, 0))


def test_what_ends_while_an_import_waits_stays_out(ledger: Ledger, database: Database) -> None:
    ledger.open("beta", 1)
    ends = datetime.now(UTC) + SECOND
    rows = [
        {"key": str(n), "account_id": "beta", "amount": 5, "expires_at": at} for n, at in enumerate([str(ends), ""])
    ]
    with database.connect() as busy, ThreadPoolExecutor() as pool:
        busy.execute("select 1")
        Ledger(busy, at=None).spend("beta", 1, key="s")
        brought = pool.submit(together, database, [lambda on: on.import_opening_balances(rows)])
        until(lambda: datetime.now(UTC) > ends)
        busy.commit()
        ((ended, kept),) = brought.result()
    assert (ended.status, ended.detail, kept.status) == (400, {"argument": "expires_at"}, 200)
    assert ledger.sums("beta") == (5, 0, 5, 0)


@pytest.mark.parametrize("level", ["read committed", "repeatable read", "serializable"])
def test_an_old_snapshot_forgets_no_grant_that_starts_later(ledger: Ledger, database: Database, level: str) -> None:
    ledger.open("alpha", 100)
    ledger.grant(10, expires_at=datetime.now(UTC) + SECOND)
    with database.connect() as early:
        early.execute(f"set transaction isolation level {level}".encode())
        early.execute("select 1")
        ledger.grant(50, effective_at=datetime.now(UTC) + 2 * SECOND)
        until(lambda: ledger.available() == 100)
        expected = nullcontext() if level == "read committed" else pytest.raises(psycopg.errors.SerializationFailure)
        with expected:
            Ledger(early, at=None).use(1)
    until(lambda: ledger.available() == (149 if level == "read committed" else 150))
    ledger.use(120)
