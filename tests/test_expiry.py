"""Credits start and end at their very moment, whoever looks and however late it is booked."""

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from ledger_support import DAY, HOUR, MINUTE, NOON, TICK, Ledger, assert_sound, refused
from psycopg import Connection


@pytest.fixture
def ledger(conn: Connection[Any]) -> Ledger:
    ledger = Ledger(conn)
    ledger.open("alpha")
    return ledger


def test_a_grant_ends_at_the_very_instant_of_its_expiry(ledger: Ledger) -> None:
    ledger.grant(10, expires_at=NOON + HOUR)
    ledger.now = NOON + HOUR - TICK
    assert ledger.sums() == (10, 0, 10, 0)
    ledger.use(1)
    ledger.now = NOON + HOUR
    assert ledger.sums() == (0, 0, 0, 0)
    with refused(402, "insufficient_credits", required=1, available=0):
        ledger.use(1)


def test_a_grant_starts_at_the_very_instant_it_becomes_effective(ledger: Ledger) -> None:
    made = ledger.grant(10, effective_at=NOON + HOUR)
    assert (made.entry_seq, made.balance, made.available) == (None, None, None)
    ledger.now = NOON + HOUR - TICK
    assert (ledger.available(), ledger.get_balance("alpha").pending) == (0, 10)
    with refused(402, "insufficient_credits", required=1, available=0):
        ledger.use(1)
    ledger.now = NOON + HOUR
    assert (ledger.available(), ledger.get_balance("alpha").pending) == (10, 0)
    ledger.use(10)


def test_a_pending_grant_that_came_and_went_unseen_is_booked_in_and_out(ledger: Ledger) -> None:
    ledger.grant(10, effective_at=NOON + HOUR, expires_at=NOON + 2 * HOUR)
    ledger.now = NOON + DAY
    assert ledger.sums() == (0, 0, 0, 0)
    ledger.book()
    assert ledger.kinds() == [("grant", 10), ("expire", -10)]
    assert_sound(ledger)


def test_a_grant_that_started_in_the_past_is_usable_now(ledger: Ledger) -> None:
    ledger.grant(10, effective_at=NOON - DAY, expires_at=NOON + TICK)
    ledger.use(10)


def test_a_reader_books_nothing_and_a_writer_books_once(ledger: Ledger) -> None:
    ledger.grant(10, expires_at=NOON + HOUR)
    ledger.now = NOON + DAY
    with ledger.unchanged():
        ledger.get_balance("alpha")
        ledger.history("alpha")
        ledger.prove_balance("alpha")
    ledger.book()
    ledger.book()
    assert ledger.kinds() == [("grant", 10), ("expire", -10)]


def test_the_next_expiry_sums_what_ends_together(ledger: Ledger) -> None:
    ledger.grant(10, expires_at=NOON + DAY)
    ledger.grant(5, expires_at=NOON + DAY, kind="promo")
    ledger.grant(7, expires_at=NOON + 2 * DAY)
    ledger.grant(3)
    ledger.reserve("alpha", 2, "r")
    row = ledger.get_balance("alpha")
    assert (row.next_expiry_at, row.next_expiry_amount) == (NOON + DAY, 15)
    assert row.by_kind == {"bonus": 20, "promo": 5}
    ledger.now = NOON + DAY
    row = ledger.get_balance("alpha")
    assert (row.next_expiry_at, row.next_expiry_amount) == (NOON + 2 * DAY, 7)
    ledger.now = NOON + 2 * DAY
    row = ledger.get_balance("alpha")
    assert (row.next_expiry_at, row.next_expiry_amount) == (None, None)


ORDER: list[dict[str, Any]] = [  # as they are spent
    {"priority": -1},
    {"kind": "purchase", "priority": 5},
    {"kind": "plan", "expires_at": NOON + DAY},
    {"kind": "plan", "expires_at": NOON + 2 * DAY, "effective_at": NOON - 2 * HOUR},
    {"kind": "plan", "expires_at": NOON + 2 * DAY, "effective_at": NOON - HOUR},
    {"kind": "plan", "expires_at": NOON + 2 * DAY, "effective_at": NOON - HOUR},
    {"kind": "plan"},
    {"kind": "trial"},
    {"kind": "promo", "expires_at": NOON + DAY},
    {"kind": "bonus", "expires_at": NOON + 2 * DAY},
    {"kind": "promo"},
    {"kind": "gift"},
    {"kind": "purchase", "expires_at": NOON + HOUR},
    {"kind": "purchase"},
]


@pytest.mark.parametrize("batch", [False, True], ids=["spend", "spend_many"])
def test_grants_are_spent_by_priority_then_expiry_then_start_then_number(ledger: Ledger, batch: bool) -> None:
    numbers = list(range(len(ORDER)))
    twins = (4, 5)  # equal in everything but their number
    ids = {}
    for number in sorted(numbers, key=lambda n: n if n in twins else -n):
        ids[number] = ledger.grant(1, **ORDER[number]).grant_id
    if batch:
        ledger.spend_many([{"account_id": "alpha", "amount": 1, "key": f"k{n}"} for n in numbers])
    else:
        for n in numbers:
            ledger.spend("alpha", 1, key=f"k{n}")
    spent = [row.grants[0]["grant_id"] for row in reversed(ledger.history("alpha", kinds=["spend"]))]
    assert spent == [ids[number] for number in numbers]


def test_one_spend_takes_several_grants_in_order(ledger: Ledger) -> None:
    later = ledger.grant(10, kind="purchase").grant_id
    first = ledger.grant(4, kind="plan").grant_id
    ledger.use(9)
    assert ledger.history("alpha")[0].grants == [{"grant_id": first, "amount": 4}, {"grant_id": later, "amount": 5}]


def test_scoped_credits_pay_for_their_capabilities_only(ledger: Ledger) -> None:
    ledger.grant(10, kind="purchase")
    scoped = ledger.grant(5, kind="plan", scope=["image", "voice"]).grant_id
    row = ledger.get_balance("alpha")
    assert (row.available, row.balance, row.scoped) == (10, 15, {"image": 5, "voice": 5})
    with refused(402, "insufficient_credits", required=11, available=10):
        ledger.use(11, capability="text")
    ledger.use(1, capability="text")
    with refused(402, "insufficient_credits", required=15, available=14):
        ledger.use(15, capability="image")
    ledger.use(6, capability="image")
    assert ledger.history("alpha")[0].grants[0] == {"grant_id": scoped, "amount": 5}
    assert ledger.sums() == (8, 0, 8, 0)
    assert ledger.get_balance("alpha").scoped == {}


def test_a_scope_filters_and_never_changes_the_order(ledger: Ledger) -> None:
    plan = ledger.grant(5, kind="plan").grant_id
    ledger.grant(5, kind="purchase", scope=["image"])
    ledger.use(5, capability="image")
    assert ledger.history("alpha")[0].grants == [{"grant_id": plan, "amount": 5}]


def test_a_hold_outlives_the_expiry_of_its_grant_and_can_be_charged(ledger: Ledger) -> None:
    ledger.grant(10, expires_at=NOON + HOUR)
    ledger.reserve("alpha", 6, "r", ttl=3 * HOUR)
    ledger.now = NOON + 2 * HOUR
    assert ledger.sums() == (0, 6, 6, 0)
    ledger.capture("alpha", "r", 2, key="c")
    assert ledger.settle("alpha", "r", 4).charged == 4
    assert ledger.kinds() == [("grant", 10), ("expire", -4), ("capture", -2), ("settle", -4)]
    assert_sound(ledger)


@pytest.mark.parametrize("how", ["settle", "release", "run out"])
def test_what_a_hold_returns_to_an_expired_grant_is_booked_as_expired(ledger: Ledger, how: str) -> None:
    ledger.grant(10, expires_at=NOON + HOUR)
    ledger.reserve("alpha", 6, "r", ttl=3 * HOUR)
    ledger.now = NOON + 2 * HOUR
    if how == "settle":
        assert ledger.settle("alpha", "r", 0).released == 6
    elif how == "release":
        ledger.release("alpha", "r")
    else:
        ledger.now = NOON + 3 * HOUR
        assert ledger.sums() == (0, 0, 0, 0)
        ledger.book()
    assert ledger.sums() == (0, 0, 0, 0)
    assert ledger.kinds() == [("grant", 10), ("expire", -4), ("expire", -6)]
    (grant,) = ledger.table("grants")
    assert (grant.status, grant.expired, grant.held) == ("expired", 10, 0)


def test_a_refund_to_an_expired_grant_is_booked_as_expired(ledger: Ledger) -> None:
    ledger.grant(10, expires_at=NOON + HOUR)
    ledger.grant(10, kind="purchase")
    ledger.spend("alpha", 12, key="s")
    ledger.now = NOON + 2 * HOUR
    ledger.refund_spend("alpha", "s", key="f")
    assert ledger.sums() == (10, 0, 10, 0)
    assert ledger.kinds()[-2:] == [("refund", 12), ("expire", -10)]


@pytest.mark.parametrize(
    ("opened", "ends", "next_ends"),
    [
        ("2030-01-31 12:00", "2030-02-28 12:00", "2030-03-31 12:00"),
        ("2032-01-31 12:00", "2032-02-29 12:00", "2032-03-31 12:00"),
        ("2030-03-31 23:30", "2030-04-30 23:30", "2030-05-31 23:30"),
        ("2030-12-15 00:00", "2031-01-15 00:00", "2031-02-15 00:00"),
    ],
)
@pytest.mark.parametrize("zone", ["UTC", "America/New_York", "Pacific/Auckland"])
def test_plan_credits_come_with_the_opening_end_a_month_later_and_come_again(
    ledger: Ledger, opened: str, ends: str, next_ends: str, zone: str
) -> None:
    ledger.rows("load_demo_catalog")
    ledger.conn.execute("select set_config('timezone', %s, true)", [zone])
    ledger.now, end, next_end = (datetime.fromisoformat(at).replace(tzinfo=UTC) for at in (opened, ends, next_ends))
    ledger.open_account("beta", plan="team")
    ledger.open_account("beta", plan="team")
    row = ledger.get_balance("beta")
    assert (row.available, row.plan, row.by_kind, row.next_expiry_at) == (2000, "team", {"plan": 2000}, end)
    ledger.use(1500, "beta")
    ledger.now = end - TICK
    assert ledger.available("beta") == 500
    ledger.now = end
    row = ledger.get_balance("beta")
    assert (row.available, row.by_kind, row.next_expiry_at) == (2000, {"plan": 2000}, next_end)


def play(ledger: Ledger, account_id: str) -> None:
    """A day of grants, holds and debts that all fall due within a few hours."""
    ledger.open_account(account_id)
    ledger.grant(30, account_id, expires_at=NOON + 2 * HOUR)
    ledger.reserve(account_id, 12, "a", ttl=HOUR)
    ledger.reserve(account_id, 9, "b", ttl=3 * HOUR)
    spent = ledger.grant(50, account_id, kind="plan")
    ledger.use(50, account_id)
    ledger.revoke_grant(account_id, spent.grant_id, amount=45, key="v")
    ledger.grant(20, account_id, effective_at=NOON + 150 * MINUTE, expires_at=NOON + 5 * HOUR)
    ledger.grant(8, account_id, effective_at=NOON + HOUR, expires_at=NOON + 2 * HOUR, kind="promo")
    ledger.grant(4, account_id, effective_at=NOON + HOUR, expires_at=NOON + 4 * HOUR, scope=["image"])
    ledger.grant(6, account_id, effective_at=NOON + 4 * HOUR)


@pytest.mark.parametrize("hours", [1, 2, 3, 4, 5, 24])
def test_late_booking_ends_where_punctual_booking_does_and_where_the_read_said(ledger: Ledger, hours: int) -> None:
    for account_id in ("late", "punctual"):
        play(ledger, account_id)
    while ledger.now < NOON + timedelta(hours=hours):
        ledger.now += 10 * MINUTE
        ledger.book("punctual")
    read = ledger.get_balance("late")
    ledger.book("late")
    booked, punctual = ledger.get_balance("late"), ledger.get_balance("punctual")
    assert read._replace(entry_seq=0) == booked._replace(entry_seq=0)
    assert booked._replace(account_id="", entry_seq=0) == punctual._replace(account_id="", entry_seq=0)
    lots = {
        name: [
            (g.status, g.remaining, g.held, g.consumed, g.expired, g.owed)
            for g in ledger.table("grants", "account_id = %s order by grant_id", name)
        ]
        for name in ("late", "punctual")
    }
    assert lots["late"] == lots["punctual"]
    assert_sound(ledger)


def test_what_falls_due_together_is_booked_in_the_order_hold_start_end(ledger: Ledger) -> None:
    ledger.grant(10, expires_at=NOON + HOUR)
    ledger.reserve("alpha", 4, "r", ttl=HOUR)
    ledger.grant(7, effective_at=NOON + HOUR)
    ledger.now = NOON + HOUR
    ledger.book()
    assert ledger.sums() == (7, 0, 7, 0)
    assert_sound(ledger)


def test_late_booking_writes_the_entries_that_punctual_booking_writes(ledger: Ledger) -> None:
    for account_id in ("late", "punctual"):
        ledger.open(account_id, 10, expires_at=NOON + 2 * HOUR)
        for n in range(3):
            ledger.reserve(account_id, 2, f"r{n}", ttl=HOUR + n * MINUTE)
        ledger.grant(5, account_id, effective_at=NOON + 90 * MINUTE)
    while ledger.now < NOON + 3 * HOUR:
        ledger.now += MINUTE
        ledger.book("punctual")
    ledger.book("late")
    assert ledger.kinds("late") == ledger.kinds("punctual")


def test_credits_that_return_to_an_exhausted_grant_still_expire(ledger: Ledger) -> None:
    ledger.open("late")
    ledger.grant(10, "late", expires_at=NOON + DAY)
    ledger.use(10, "late", key="s")
    ledger.grant(1, "late", expires_at=NOON + HOUR)
    ledger.now = NOON + HOUR
    ledger.book("late")  # nothing is live now, so nothing more would fall due
    ledger.refund_spend("late", "s", key="f")
    ledger.now = NOON + DAY
    with refused(402, "insufficient_credits"):
        ledger.use(5, "late")
