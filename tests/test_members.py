"""Members: roles, seats, and limits: what counts towards them, in which month, and for many at once."""

from collections import Counter
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from decimal import Decimal
from functools import partial
from typing import Any
from zoneinfo import ZoneInfo

import psycopg
import pytest
from client import CreditsError
from ledger_support import DAY, HOUR, MINUTE, NOON, TICK, Ledger, assert_sound, committed, refused, same, together
from psycopg import Connection
from servers import Database

THREADS = 20


@pytest.fixture
def ledger(conn: Connection[Any]) -> Iterator[Ledger]:
    """An account with 1000 credits and a member with a limit of 100, sound when the test is over."""
    ledger = Ledger(conn)
    ledger.open("alpha", 1000)
    ledger.set_member("alpha", "m1", monthly_limit=100)
    yield ledger
    assert_sound(ledger)
    ledger.book()
    assert_sound(ledger)


def used(ledger: Ledger, member_id: str = "m1", account_id: str = "alpha") -> Any:
    """What a member has used this month, as list_members shows it."""
    (row,) = [row for row in ledger.list_members(account_id) if row.member_id == member_id]
    return row.used


def plan(ledger: Ledger, seats: int | None, code: str = "crew", *, is_default: bool = False) -> None:
    """A plan with so many seats."""
    ledger.change(
        "insert into credits.plans (code, name, seats, is_default) values (%s, %s, %s, %s)",
        code, code, seats, is_default,
    )  # fmt: skip


# The verbs ---------------------------------------------------------------------------------------------------------


def test_a_member_is_added_changed_and_shown(ledger: Ledger) -> None:
    row = ledger.set_member("alpha", "m2", role="admin", monthly_limit="12.50")
    assert (row.account_id, row.member_id, row.role, row.active) == ("alpha", "m2", "admin", True)
    assert (row.monthly_limit, str(row.monthly_limit), row.used, row.created_at) == (Decimal("12.5"), "12.5", 0, NOON)
    ledger.now += HOUR
    changed = ledger.set_member("alpha", "m2", role="owner", monthly_limit=0)
    assert changed == row._replace(role="owner", monthly_limit=0)
    assert [(r.member_id, r.role, r.monthly_limit) for r in ledger.list_members("alpha")] == [
        ("m1", "member", 100), ("m2", "owner", 0),
    ]  # fmt: skip


def test_setting_a_member_states_all_of_it(ledger: Ledger) -> None:
    ledger.set_member("alpha", "m1", role="admin", monthly_limit=5)
    for arguments in ({}, {"role": None, "monthly_limit": None}):
        row = ledger.set_member("alpha", "m1", **arguments)
        assert (row.role, row.monthly_limit) == ("member", None)
    ledger.use(900, member_id="m1")


def test_the_same_call_again_changes_nothing(ledger: Ledger) -> None:
    ledger.use(10, member_id="m1")
    ledger.now += HOUR
    with ledger.unchanged():
        assert ledger.set_member("alpha", "m1", monthly_limit=100).used == 10
    first = ledger.remove_member("alpha", "m1")
    with ledger.unchanged():
        assert ledger.remove_member("alpha", "m1") == first


def test_an_account_that_does_not_exist_has_no_members(ledger: Ledger) -> None:
    for call in (
        lambda: ledger.set_member("beta", "m1"),
        lambda: ledger.remove_member("beta", "m1"),
        lambda: ledger.list_members("beta"),
    ):
        with ledger.unchanged(), refused(404, "account_not_found", account_id="beta"):
            call()


def test_bad_values_are_refused(ledger: Ledger) -> None:
    with ledger.unchanged():
        with refused(400, "invalid_request", argument="role"):
            ledger.set_member("alpha", "m2", role="guest")
        with refused(400, "invalid_request", argument="member_id"):
            ledger.set_member("alpha", "m" * 201)
        with refused(422, "invalid_amount", amount="-1"):
            ledger.set_member("alpha", "m2", monthly_limit=-1)
        with refused(404, "member_not_found", member_id="m2"):
            ledger.remove_member("alpha", "m2")


def test_members_of_one_account_are_none_of_another(ledger: Ledger) -> None:
    ledger.open("beta", 1000)
    ledger.use(900, "beta", member_id="m1")
    assert (used(ledger), ledger.list_members("beta")) == (0, [])


def test_a_removed_member_may_use_nothing_and_is_remembered(ledger: Ledger) -> None:
    ledger.use(60, member_id="m1")
    first = ledger.reserve("alpha", 10, "r", member_id="m1")
    row = ledger.remove_member("alpha", "m1")
    assert (row.active, row.used, ledger.list_members("alpha")) == (False, 70, [])
    with ledger.unchanged():
        with refused(403, "forbidden", member_id="m1"):
            ledger.use(1, member_id="m1")
        with refused(403, "forbidden", member_id="m1"):
            ledger.reserve("alpha", 1, "q", member_id="m1", min_amount=1)
        (answer,) = ledger.spend_many([{"account_id": "alpha", "amount": 1, "key": "k", "member_id": "m1"}])
        assert (answer.status, answer.code, answer.detail) == (403, "forbidden", {"member_id": "m1"})
        assert same(first, ledger.reserve("alpha", 10, "r", member_id="m1"))
    assert ledger.settle("alpha", "r", 15).charged == 15
    assert ledger.set_member("alpha", "m1", monthly_limit=100).used == 75


def test_what_the_name_used_before_it_was_added_counts(ledger: Ledger) -> None:
    ledger.use(7, member_id="m2")
    ledger.spend("alpha", 20, key="s", member_id="m2")
    ledger.refund_spend("alpha", "s", amount=5, key="f")
    for name in ("open", "settled"):
        ledger.reserve("alpha", 30, name, member_id="m2")
        ledger.capture("alpha", name, 4, key=f"c-{name}")
    ledger.settle("alpha", "settled", 1)
    assert ledger.set_member("alpha", "m2", monthly_limit=60).used == 7 + 15 + 30 + 5
    ledger.settle("alpha", "open", 0)
    assert used(ledger, "m2") == 7 + 15 + 4 + 5
    with refused(429, "member_limit_reached", limit=60, used=31, required=30):
        ledger.use(30, member_id="m2")


def test_a_clock_that_is_set_back_over_the_months_end_gives_nothing_anew(ledger: Ledger) -> None:
    before, after = datetime(2030, 1, 31, 23, 50, tzinfo=UTC), datetime(2030, 2, 1, 0, 10, tzinfo=UTC)
    ledger.now = before
    ledger.use(50, member_id="m1")
    ledger.now = after
    ledger.use(30, member_id="m1")
    ledger.now = before + MINUTE
    assert used(ledger) == 50
    ledger.reserve("alpha", 20, "left", ttl=5 * MINUTE, member_id="m1")
    ledger.spend("alpha", 25, key="s", member_id="m1")
    with ledger.unchanged():
        with refused(429, "member_limit_reached", used=95, required=6):
            ledger.use(6, member_id="m1")
        (answer,) = ledger.spend_many([{"account_id": "alpha", "amount": 6, "key": "k", "member_id": "m1"}])
        assert answer.code == "member_limit_reached"
    assert_sound(ledger)
    ledger.refund_spend("alpha", "s", amount=5, key="f")
    assert used(ledger) == 90
    ledger.now += 5 * MINUTE
    assert used(ledger) == 70  # the hold has run out, and is not booked
    ledger.book()
    assert used(ledger) == 70
    assert_sound(ledger)
    ledger.now = after
    assert used(ledger) == 30
    ledger.use(70, member_id="m1")


def test_what_the_name_used_last_month_does_not(ledger: Ledger) -> None:
    ledger.use(7, member_id="m2")
    ledger.reserve("alpha", 30, "r", member_id="m2", ttl="24 hours")
    ledger.now = datetime(2030, 2, 1, tzinfo=UTC)
    ledger.use(2, member_id="m2")
    assert ledger.set_member("alpha", "m2").used == 2
    ledger.settle("alpha", "r", 30)
    assert used(ledger, "m2") == 2


# Seats -------------------------------------------------------------------------------------------------------------


def test_active_members_take_the_seats_of_the_plan(ledger: Ledger) -> None:
    plan(ledger, 3)
    ledger.open_account("beta", plan="crew")
    for n in range(3):
        ledger.set_member("beta", f"m{n}")
    with ledger.unchanged(), refused(403, "seat_limit_reached", seats=3, used=3, plan="crew"):
        ledger.set_member("beta", "m3")
    ledger.set_member("beta", "m2", role="admin")
    ledger.remove_member("beta", "m0")
    ledger.set_member("beta", "m3")
    with ledger.unchanged(), refused(403, "seat_limit_reached", seats=3, used=3):
        ledger.set_member("beta", "m0")
    ledger.set_member("beta", "m1", monthly_limit=5)


def test_without_seats_in_the_plan_there_is_no_limit(ledger: Ledger) -> None:
    plan(ledger, None)
    ledger.open_account("beta", plan="crew")
    for account_id in ("alpha", "beta"):
        for n in range(30):
            ledger.set_member(account_id, f"n{n}")


def test_an_account_without_a_plan_has_the_seats_of_the_default_one(ledger: Ledger) -> None:
    plan(ledger, 2, is_default=True)
    plan(ledger, 5, "large")
    ledger.set_member("alpha", "m2")
    with refused(403, "seat_limit_reached", seats=2, used=2, plan="crew"):
        ledger.set_member("alpha", "m3")
    ledger.change_plan("alpha", "large")
    ledger.set_member("alpha", "m3")


def test_the_plan_is_that_of_the_very_instant(ledger: Ledger) -> None:
    plan(ledger, 3)
    plan(ledger, 1, "solo")
    ledger.open_account("beta", plan="crew")
    ledger.set_member("beta", "m0")
    ledger.set_member("beta", "m1")
    ledger.change_plan("beta", "solo", at="period_end")
    ledger.set_member("beta", "m2")
    ledger.now += 40 * DAY
    ledger.remove_member("beta", "m2")
    with refused(403, "seat_limit_reached", seats=1, used=2, plan="solo"):
        ledger.set_member("beta", "m2")
    ledger.set_member("beta", "m1", role="owner")


# Limits ------------------------------------------------------------------------------------------------------------


def test_a_member_may_spend_up_to_the_limit_and_nothing_more(ledger: Ledger) -> None:
    ledger.use("99.5", member_id="m1")
    with ledger.unchanged(), refused(
        429, "member_limit_reached", member_id="m1", limit=100, used=99.5, required=0.500001,
        resets_at="2030-02-01T00:00:00+00:00",
    ):  # fmt: skip
        ledger.use("0.500001", member_id="m1")
    ledger.use("0.5", member_id="m1")
    assert (used(ledger), str(used(ledger))) == (100, "100")
    with refused(429, "member_limit_reached"):
        ledger.reserve("alpha", "0.000001", "r", member_id="m1")


def test_others_are_not_held_to_it(ledger: Ledger) -> None:
    ledger.set_member("alpha", "m2")
    ledger.use(100, member_id="m1")
    for more in ({}, {"member_id": "m2"}, {"member_id": "free text"}, {"member_id": ""}):
        ledger.use(101, **more)
        ledger.reserve("alpha", 101, ledger.key(), **more)
    assert [(row.member_id, row.used) for row in ledger.list_members("alpha")] == [("m1", 100), ("m2", 202)]
    assert [row.member_id for row in ledger.table("reservations", "counted")] == ["m2"]


def test_a_limit_of_zero_lets_a_member_use_nothing(ledger: Ledger) -> None:
    ledger.set_member("alpha", "m1", monthly_limit=0)
    with refused(429, "member_limit_reached", limit=0, used=0, required=1):
        ledger.use(1, member_id="m1")


def test_a_lower_limit_counts_what_was_used_and_a_higher_one_lets_go_on(ledger: Ledger) -> None:
    ledger.use(50, member_id="m1")
    assert ledger.set_member("alpha", "m1", monthly_limit=40).used == 50
    with refused(429, "member_limit_reached", limit=40, used=50):
        ledger.use(1, member_id="m1")
    ledger.set_member("alpha", "m1", monthly_limit=60)
    ledger.use(10, member_id="m1")


def test_a_replay_is_answered_whatever_the_limit_says(ledger: Ledger) -> None:
    first = ledger.spend("alpha", 100, key="k", member_id="m1")
    ledger.remove_member("alpha", "m1")
    with ledger.unchanged():
        assert same(first, ledger.spend("alpha", 100, key="k", member_id="m1"))


def test_the_account_comes_before_the_member_and_the_member_before_the_credits(ledger: Ledger) -> None:
    with refused(429, "member_limit_reached", required=5000):
        ledger.use(5000, member_id="m1")
    ledger.set_member("alpha", "m1", monthly_limit=5000)
    with refused(402, "insufficient_credits", required=5000, available=1000):
        ledger.use(5000, member_id="m1")
    ledger.remove_member("alpha", "m1")
    ledger.freeze_account("alpha")
    with refused(423, "account_frozen"):
        ledger.use(1, member_id="m1")


def test_a_refused_spend_counts_nothing(ledger: Ledger) -> None:
    ledger.set_member("alpha", "m1")
    with ledger.unchanged(), refused(402, "insufficient_credits"):
        ledger.use(1001, member_id="m1")


def test_a_hold_counts_in_full_until_it_ends(ledger: Ledger) -> None:
    ledger.reserve("alpha", 80, "r", member_id="m1")
    assert used(ledger) == 80
    with refused(429, "member_limit_reached", used=80, required=21):
        ledger.use(21, member_id="m1")
    ledger.capture("alpha", "r", 30, key="c")
    assert used(ledger) == 80
    ledger.settle("alpha", "r", 10)
    assert used(ledger) == 40
    ledger.use(60, member_id="m1")


@pytest.mark.parametrize("captured", [0, 30])
@pytest.mark.parametrize("actual", [0, 20, 50, 70])
def test_a_settled_hold_counts_what_it_charged(ledger: Ledger, captured: int, actual: int) -> None:
    ledger.use(30, member_id="m1")
    ledger.reserve("alpha", 70, "r", member_id="m1")
    if captured:
        ledger.capture("alpha", "r", captured, key="c")
    assert ledger.settle("alpha", "r", actual).charged == actual
    assert used(ledger) == 30 + captured + actual


def test_a_settle_is_never_refused_for_a_limit_and_its_overage_counts(ledger: Ledger) -> None:
    ledger.reserve("alpha", 100, "r", member_id="m1")
    ledger.settle("alpha", "r", 250)
    assert used(ledger) == 250
    with refused(429, "member_limit_reached", limit=100, used=250, required=1):
        ledger.use(1, member_id="m1")


def test_what_was_charged_into_debt_counts_and_what_was_not_collected_does_not(ledger: Ledger) -> None:
    ledger.set_debt_limit("alpha", 50)
    ledger.reserve("alpha", 100, "r", member_id="m1")
    result = ledger.settle("alpha", "r", 1100, on_overage="overflow")
    assert (result.charged, result.uncollected) == (1050, 50)
    assert used(ledger) == 1050
    ledger.refund_spend("alpha", "r", key="f")
    assert used(ledger) == 50


def test_a_released_hold_counts_what_was_captured(ledger: Ledger) -> None:
    ledger.reserve("alpha", 80, "r", member_id="m1")
    ledger.capture("alpha", "r", 5, key="c")
    for _ in range(2):
        ledger.release("alpha", "r")
        assert used(ledger) == 5


def test_a_hold_that_ran_out_counts_no_longer_whoever_looks_first(ledger: Ledger) -> None:
    ledger.use(10, member_id="m1")
    ledger.reserve("alpha", 80, "r", member_id="m1")
    ledger.capture("alpha", "r", 5, key="c")
    ledger.now += 15 * MINUTE - TICK
    assert used(ledger) == 90
    ledger.now += TICK
    with ledger.unchanged():
        assert used(ledger) == 15
        assert ledger.prove_balance("alpha").ok
    ledger.use(85, member_id="m1")
    assert used(ledger) == 100


def test_extended_holds_go_on_counting(ledger: Ledger) -> None:
    ledger.reserve("alpha", 80, "r", member_id="m1")
    ledger.extend("alpha", "r", ttl="2 hours")
    ledger.now += HOUR
    assert used(ledger) == 80


def test_a_late_settle_counts_for_whoever_was_added_after_the_hold_had_run_out(ledger: Ledger) -> None:
    ledger.reserve("alpha", 5, "r", member_id="m2")
    ledger.now += HOUR
    ledger.book()
    ledger.set_member("alpha", "m2", monthly_limit=100)
    assert ledger.settle("alpha", "r", 3).late
    assert used(ledger, "m2") == 3
    ledger.refund_spend("alpha", "r", key="back")
    assert used(ledger, "m2") == 0
    assert_sound(ledger)


@pytest.mark.parametrize("captured", [0, 30])
@pytest.mark.parametrize("booked", [False, True])
def test_a_late_settle_counts_what_it_charges(ledger: Ledger, captured: int, *, booked: bool) -> None:
    ledger.reserve("alpha", 80, "r", member_id="m1")
    if captured:
        ledger.capture("alpha", "r", captured, key="c")
    ledger.now += HOUR
    if booked:
        ledger.book()
    assert used(ledger) == captured
    assert ledger.settle("alpha", "r", 90).late
    assert used(ledger) == captured + 90


@pytest.mark.parametrize(("amount", "least", "held"), [(150, 10, 40), (150, 40, 40), (30, 10, 30), (30, 90, 30)])
def test_with_min_amount_what_the_member_has_left_is_held(ledger: Ledger, amount: int, least: int, held: int) -> None:
    ledger.use(60, member_id="m1")
    first = ledger.reserve("alpha", amount, "r", min_amount=least, member_id="m1")
    assert (first.amount, used(ledger)) == (held, 60 + held)
    assert same(first, ledger.reserve("alpha", amount, "r", min_amount=least, member_id="m1"))


def test_below_min_amount_nothing_is_held(ledger: Ledger) -> None:
    ledger.use(60, member_id="m1")
    with ledger.unchanged(), refused(429, "member_limit_reached", used=60, required=41):
        ledger.reserve("alpha", 150, "r", min_amount=41, member_id="m1")
    ledger.use(930)
    with ledger.unchanged(), refused(402, "insufficient_credits", required=11, available=10):
        ledger.reserve("alpha", 150, "r", min_amount=11, member_id="m1")


def test_refunds_give_back_to_the_member(ledger: Ledger) -> None:
    ledger.spend("alpha", 60, key="s", member_id="m1")
    ledger.reserve("alpha", 40, "r", member_id="m1")
    ledger.capture("alpha", "r", 10, key="c")
    ledger.settle("alpha", "r", 20)
    assert used(ledger) == 90
    for name, amount, left in (("s", 25, 65), ("s", 35, 30), ("c", 10, 20), ("r", 5, 15)):
        ledger.refund_spend("alpha", name, amount=amount, key=f"f{left}")
        assert used(ledger) == left
    ledger.refund_spend("alpha", "r", amount=5, key="f15")
    assert used(ledger) == 15


def test_a_batch_that_passes_a_limit_is_served_one_by_one(ledger: Ledger) -> None:
    ledger.open("beta", 1000)
    wanted = [("alpha", 60, "m1"), ("beta", 60, "m1"), ("alpha", 60, "m1"), ("alpha", 60, None), ("alpha", 40, "m1"),
              ("alpha", 1, "m1"), ("beta", 60, "m1"), ("alpha", 60, "free text")]  # fmt: skip
    rows = ledger.spend_many(
        [{"account_id": a, "amount": n, "key": ledger.key(), "member_id": m} for a, n, m in wanted]
    )
    assert [row.code or row.status for row in rows] == [
        200, 200, "member_limit_reached", 200, 200, "member_limit_reached", 200, 200,
    ]  # fmt: skip
    assert (rows[2].detail["used"], rows[2].detail["required"], used(ledger)) == (60, 60, 100)


def test_a_batch_that_fits_is_booked_together_and_counted(ledger: Ledger) -> None:
    ledger.open("beta", 1000)
    ledger.set_member("alpha", "m2")
    ledger.set_member("beta", "m1", monthly_limit=21)
    ledger.use(1, member_id="m1")
    for account_id, member_id in (("alpha", "m1"), ("beta", "m1"), ("alpha", "m2"), ("alpha", "m3")) * 2:
        said = {"account_id": account_id, "amount": "3.50", "member_id": member_id}
        rows = ledger.spend_many([{**said, "key": ledger.key()} for _ in range(3)])
        assert {row.status for row in rows} == {200}
    assert (used(ledger), used(ledger, "m2"), used(ledger, account_id="beta")) == (22, 21, 21)
    (row,) = ledger.spend_many([{"account_id": "beta", "amount": 1, "key": "k", "member_id": "m1"}])
    assert (row.code, row.detail["used"], row.detail["limit"]) == ("member_limit_reached", 21, 21)
    ledger.now = datetime(2030, 2, 1, tzinfo=UTC)
    ledger.spend_many([{"account_id": "beta", "amount": 20, "key": "k", "member_id": "m1"}])
    assert (used(ledger), used(ledger, account_id="beta")) == (0, 20)


def test_a_batch_of_free_text_members_is_booked_together(ledger: Ledger) -> None:
    rows = ledger.spend_many([{"account_id": "alpha", "amount": 1, "key": "k", "member_id": "m2"}])
    assert (rows[0].status, ledger.history("alpha")[0].member_id) == (200, "m2")


# Months ------------------------------------------------------------------------------------------------------------

TURNS = [  # a time zone, and the first instant of a month there
    ("UTC", datetime(2030, 3, 1, tzinfo=UTC)),
    ("America/New_York", datetime(2030, 3, 1, 5, tzinfo=UTC)),
    ("America/New_York", datetime(2030, 4, 1, 4, tzinfo=UTC)),  # summer time began in March
    ("America/New_York", datetime(2030, 12, 1, 5, tzinfo=UTC)),  # and ended in November
    ("Pacific/Auckland", datetime(2030, 3, 31, 11, tzinfo=UTC)),
    ("Pacific/Auckland", datetime(2030, 4, 30, 12, tzinfo=UTC)),
]


@pytest.mark.parametrize(("zone", "turn"), TURNS)
def test_a_month_begins_in_the_time_zone_of_the_account(ledger: Ledger, zone: str, turn: datetime) -> None:
    assert turn.astimezone(ZoneInfo(zone)).timetuple()[2:6] == (1, 0, 0, 0)
    ledger.set_time_zone("alpha", zone)
    ledger.now = turn - 20 * DAY
    ledger.use(60, member_id="m1")
    ledger.now = turn - TICK
    ledger.use(40, member_id="m1")
    with ledger.unchanged(), refused(429, "member_limit_reached", used=100):
        ledger.use(1, member_id="m1")
    ledger.now = turn
    with ledger.unchanged():
        assert used(ledger) == 0
    ledger.use(100, member_id="m1")
    with refused(429, "member_limit_reached", used=100):
        ledger.use(1, member_id="m1")


@pytest.mark.parametrize(("zone", "turn"), TURNS)
def test_a_refusal_tells_when_the_month_is_over(ledger: Ledger, zone: str, turn: datetime) -> None:
    ledger.set_time_zone("alpha", zone)
    ledger.now = turn - 27 * DAY
    with pytest.raises(CreditsError) as caught:
        ledger.use(101, member_id="m1")
    detail: Any = caught.value.detail
    assert datetime.fromisoformat(detail["resets_at"]) == turn


END: dict[str, Callable[[Ledger], Any]] = {
    "settle": lambda on: on.settle("alpha", "r", 50),
    "overage": lambda on: on.settle("alpha", "r", 250),
    "capture": lambda on: on.capture("alpha", "r", 5, key="c"),
    "release": lambda on: on.release("alpha", "r"),
    "refund": lambda on: on.refund_spend("alpha", "s", key="f"),
    "refund of a settle": lambda on: (on.settle("alpha", "r", 50), on.refund_spend("alpha", "r", amount=9, key="f")),
}


@pytest.mark.parametrize("first", [False, True], ids=["nothing used since", "something used since"])
@pytest.mark.parametrize("end", END)
def test_what_was_begun_last_month_counts_there(ledger: Ledger, end: str, *, first: bool) -> None:
    ledger.spend("alpha", 20, key="s", member_id="m1")
    ledger.reserve("alpha", 80, "r", member_id="m1", ttl="24 hours")
    ledger.now = datetime(2030, 2, 1, tzinfo=UTC)
    if first:
        ledger.use(30, member_id="m1")
    END[end](ledger)
    assert used(ledger) == 30 * first
    ledger.use(100 - 30 * first, member_id="m1")
    with refused(429, "member_limit_reached", used=100):
        ledger.use(1, member_id="m1")


@pytest.mark.parametrize("booked", [False, True])
def test_a_hold_of_last_month_that_runs_out_gives_nothing_to_this_one(ledger: Ledger, *, booked: bool) -> None:
    ledger.reserve("alpha", 80, "r", member_id="m1", ttl="18 hours")
    ledger.now = datetime(2030, 2, 1, tzinfo=UTC)
    ledger.reserve("alpha", 70, "q", member_id="m1", ttl="1 hour")
    assert used(ledger) == 70
    ledger.now += 7 * HOUR
    if booked:
        ledger.book()
    assert used(ledger) == 0
    ledger.settle("alpha", "r", 80)
    assert used(ledger) == 0
    ledger.settle("alpha", "q", 75)
    assert used(ledger) == 75


def test_another_time_zone_counts_the_month_anew(ledger: Ledger) -> None:
    ledger.now = datetime(2030, 2, 1, 2, tzinfo=UTC)
    ledger.use(10, member_id="m1")
    ledger.reserve("alpha", 20, "r", member_id="m1", ttl="24 hours")
    ledger.now = datetime(2030, 2, 1, 12, tzinfo=UTC)
    ledger.use(5, member_id="m1")
    for zone, expected in (("America/New_York", 5), ("Pacific/Auckland", 35), ("UTC", 35)):
        ledger.set_time_zone("alpha", zone)
        assert used(ledger) == expected, zone
        assert_sound(ledger)
    ledger.settle("alpha", "r", 1)
    assert used(ledger) == 16


# Many at once ------------------------------------------------------------------------------------------------------


@pytest.fixture
def crowd(database: Database) -> Iterator[Ledger]:
    """The same account, committed."""
    with committed(database) as ledger:
        ledger.open("alpha", 1000)
        ledger.set_member("alpha", "m1", monthly_limit=100)
        yield ledger
        assert_sound(ledger)


def codes(results: list[Any]) -> Counter[str]:
    """How often each outcome came."""
    return Counter(result.code if isinstance(result, CreditsError) else "done" for result in results)


def spend_one(on: Ledger, n: int) -> Any:
    return on.spend("alpha", 10, key=f"k{n}", member_id="m1")


def reserve_one(on: Ledger, n: int) -> Any:
    return on.reserve("alpha", 10, f"r{n}", member_id="m1")


def batch_one(on: Ledger, n: int) -> Any:
    (row,) = on.spend_many([{"account_id": "alpha", "amount": 10, "key": f"b{n}", "member_id": "m1"}])
    return row if row.status == 200 else CreditsError(row.status, row.code, row.detail, None)


@pytest.mark.parametrize(
    "jobs",
    [[spend_one], [reserve_one], [batch_one], [spend_one, reserve_one, batch_one]],
    ids=["spend", "reserve", "spend_many", "all of them"],
)
def test_a_rush_at_the_limit_admits_exactly_what_fits(
    crowd: Ledger, database: Database, jobs: list[Callable[..., Any]]
) -> None:
    results = together(database, [partial(jobs[n % len(jobs)], n=n) for n in range(THREADS)])
    assert codes(results) == {"done": 10, "member_limit_reached": 10}
    assert used(crowd) == 100
    assert sum(crowd.sums()[:2]) == 1000 - 10 * sum(isinstance(getattr(r, "entry_seq", None), int) for r in results)


def test_a_rush_with_min_amount_holds_the_limit_and_no_more(crowd: Ledger, database: Database) -> None:
    crowd.use(5, member_id="m1")
    jobs = [
        partial(Ledger.reserve, account_id="alpha", amount=10, reservation_id=f"r{n}", min_amount=1, member_id="m1")
        for n in range(THREADS)
    ]
    held = [result.amount for result in together(database, jobs) if not isinstance(result, CreditsError)]
    assert sorted(held) == [5] + [10] * 9
    assert used(crowd) == 100


def test_holds_that_end_while_others_begin_are_counted_once(crowd: Ledger, database: Database) -> None:
    def work(on: Ledger, n: int) -> Counter[str]:
        done: Counter[str] = Counter()
        for turn in range(10):
            try:
                on.reserve("alpha", 20, f"r{n}-{turn}", member_id="m1")
                if turn % 2:
                    on.settle("alpha", f"r{n}-{turn}", 1)
                else:
                    on.release("alpha", f"r{n}-{turn}")
                done["done"] += turn % 2
            except CreditsError as error:
                done[error.code] += 1
        return done

    total = sum(together(database, [partial(work, n=n) for n in range(8)]), Counter[str]())
    assert set(total) <= {"done", "member_limit_reached"}
    assert used(crowd) == total["done"] > 0


def test_a_rush_for_seats_fills_exactly_those_there_are(crowd: Ledger, database: Database) -> None:
    plan(crowd, 8)
    crowd.change_plan("alpha", "crew")
    results = together(
        database, [partial(Ledger.set_member, account_id="alpha", member_id=f"n{n}") for n in range(THREADS)]
    )
    assert codes(results) == {"done": 7, "seat_limit_reached": 13}
    assert len(crowd.list_members("alpha")) == 8


def test_one_member_added_by_many_is_one(crowd: Ledger, database: Database) -> None:
    plan(crowd, 2)
    crowd.change_plan("alpha", "crew")
    add = partial(Ledger.set_member, account_id="alpha", member_id="m2", monthly_limit=5)
    assert len(set(together(database, [add] * THREADS))) == 1


@pytest.mark.parametrize("level", ["read committed", "repeatable read", "serializable"])
def test_whoever_waited_for_the_lock_knows_of_a_new_member(crowd: Ledger, database: Database, level: str) -> None:
    crowd.use(50, member_id="m2")
    with database.connect() as early:
        early.execute(f"set transaction isolation level {level}".encode())
        early.execute("select 1")
        crowd.set_member("alpha", "m2", monthly_limit=60)
        error = CreditsError if level == "read committed" else psycopg.errors.SerializationFailure
        with pytest.raises(error):
            Ledger(early, at=None).use(11, member_id="m2")
    assert used(crowd, "m2") == 50


@pytest.mark.parametrize("level", ["repeatable read", "serializable"])
def test_an_old_snapshot_neither_fills_a_seat_twice_nor_passes_a_limit(
    crowd: Ledger, database: Database, level: str
) -> None:
    plan(crowd, 2)
    crowd.change_plan("alpha", "crew")
    late: list[Callable[[Ledger], Any]] = [
        lambda on: on.set_member("alpha", "m3"),
        lambda on: on.use(60, member_id="m1"),
    ]
    for job in late:
        with database.connect() as early:
            early.execute(f"set transaction isolation level {level}".encode())
            early.execute("select 1")
            if job is late[0]:
                crowd.set_member("alpha", "m2")
            else:
                crowd.use(60, member_id="m1")
            with pytest.raises(psycopg.errors.SerializationFailure):
                job(Ledger(early, at=None))
    assert (used(crowd), len(crowd.list_members("alpha"))) == (60, 2)
