"""Rate limits and monthly caps: windows of the calendar and rolling ones, exact under concurrency, given back."""

from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import Any
from zoneinfo import ZoneInfo

import pytest
from client import CreditsError
from ledger_support import (
    DAY,
    HOUR,
    MINUTE,
    NOON,
    SECOND,
    TICK,
    Ledger,
    assert_sound,
    committed,
    refused,
    together,
)
from psycopg import Connection
from psycopg.types.json import Jsonb
from servers import Database

Json = dict[str, Any]


def catalogue(*limits: Json, everywhere: tuple[Json, ...] = ()) -> Json:
    """The plan team may write chapters (a credit a word) and outlines (5 credits), within these limits on chapters."""
    return {
        "capabilities": {"chapter": {"name": "Chapter", "unit": "words"}, "outline": {"name": "Outline"}},
        "plans": {
            "team": {
                "name": "Team", "limits": list(everywhere),
                "capabilities": {"chapter": {"limits": list(limits)}, "outline": {}},
            },
        },
        "rates": [{"capability": "chapter", "price": {"credits": 1}}, {"capability": "outline", "price": 5}],
    }  # fmt: skip


def offer(ledger: Ledger, *limits: Json, everywhere: tuple[Json, ...] = (), account_id: str = "alpha") -> None:
    """Put the catalogue in force, with an account on its plan."""
    ledger.rows("apply_catalog", catalog=Jsonb(catalogue(*limits, everywhere=everywhere)))
    ledger.open_account(account_id, plan="team")
    ledger.grant(1_000_000, account_id)


@pytest.fixture
def ledger(conn: Connection[Any]) -> Ledger:
    return Ledger(conn)


def call(ledger: Ledger, units: Any = 1, capability: str = "chapter", **more: Any) -> str:
    """A use; its id."""
    usage_id: str = ledger.authorize_usage("alpha", capability, units, **{"usage_id": ledger.key(), **more}).usage_id
    return usage_id


def used(ledger: Ledger) -> list[Any]:
    """How much is used of each limit."""
    return [row.used for row in ledger.get_limits("alpha")]


def calls(ledger: Ledger, times: int) -> list[str]:
    """That many calls at the same moment."""
    return [call(ledger) for _ in range(times)]


LENGTHS = {"minute": MINUTE, "hour": HOUR, "day": DAY, "month": 30 * DAY}


@pytest.mark.parametrize("period", LENGTHS)
def test_a_rolling_window_admits_again_when_a_call_leaves_it(ledger: Ledger, period: str) -> None:
    offer(ledger, {"calls": 3, "per": period, "rolling": True})
    length = LENGTHS[period]
    call(ledger)
    ledger.now += length / 4
    calls(ledger, 2)
    ledger.now = NOON + length - TICK
    with ledger.unchanged(), refused(429, "rate_limited", limit=3, used=3, resets_at=stamp(NOON + length)):
        call(ledger)
    ledger.now += TICK
    call(ledger)
    with refused(429, "rate_limited", limit=3, used=3, resets_at=stamp(NOON + length / 4 + length)):
        call(ledger)
    ledger.now = NOON + length / 4 + length
    calls(ledger, 2)
    assert used(ledger) == [3]
    assert_sound(ledger)


def test_a_rolling_day_is_24_hours_in_every_time_zone_of_a_session(ledger: Ledger) -> None:
    offer(ledger, {"calls": 1, "per": "day", "rolling": True})
    saturday = datetime(2030, 3, 30, 12, tzinfo=UTC)  # in the night to Sunday, Berlin's clocks are put forward
    ledger.now = saturday
    call(ledger)
    for zone in ("Europe/Berlin", "UTC"):
        ledger.conn.execute("select set_config('timezone', %s, true)", [zone])
        ledger.now = saturday + DAY - TICK
        assert [row.resets_at for row in ledger.get_limits("alpha")] == [saturday + DAY]
        with refused(429, "rate_limited", limit=1, used=1):
            call(ledger)


def stamp(at: datetime) -> str:
    """A moment as jsonb shows it in a session whose time zone is UTC."""
    text = at.astimezone(UTC).isoformat()
    return text.rstrip("0").rstrip(".") if "." in text else text


@pytest.mark.parametrize(
    ("period", "ends"),
    [
        ("minute", NOON + MINUTE),
        ("hour", NOON + HOUR),
        ("day", NOON + 12 * HOUR),
        ("month", NOON + 12 * HOUR),
    ],
)
def test_a_window_of_the_calendar_ends_with_it(ledger: Ledger, period: str, ends: datetime) -> None:
    offer(ledger, {"calls": 2, "per": period})
    calls(ledger, 2)
    ledger.now = ends - TICK
    with ledger.unchanged(), refused(429, "rate_limited", limit=2, used=2, period=period, resets_at=stamp(ends)):
        call(ledger)
    ledger.now = ends
    calls(ledger, 2)
    with refused(429, "rate_limited"):
        call(ledger)
    assert_sound(ledger)


@pytest.mark.parametrize(
    ("zone", "period", "at", "ends"),
    [  # the first two days have 23 and 25 hours; in the third the hour from one to two comes twice
        ("America/New_York", "day", (2030, 3, 10, 0, 0), (2030, 3, 11, 0, 0)),
        ("America/New_York", "day", (2030, 11, 3, 0, 0), (2030, 11, 4, 0, 0)),
        ("America/New_York", "month", (2030, 3, 1, 0, 0), (2030, 4, 1, 0, 0)),
        ("Pacific/Auckland", "month", (2030, 4, 1, 0, 0), (2030, 5, 1, 0, 0)),
        ("Asia/Kolkata", "hour", (2030, 5, 5, 13, 0), (2030, 5, 5, 14, 0)),
    ],
)
def test_windows_are_those_of_the_accounts_time_zone(
    ledger: Ledger, zone: str, period: str, at: tuple[int, ...], ends: tuple[int, ...]
) -> None:
    local = partial(datetime, tzinfo=ZoneInfo(zone))
    offer(ledger, {"calls": 1, "per": period})
    ledger.set_time_zone("alpha", zone)
    ledger.now = local(*at).astimezone(UTC)
    call(ledger)
    (limit,) = ledger.get_limits("alpha")
    assert limit.resets_at == local(*ends)
    ledger.now = local(*ends).astimezone(UTC) - TICK
    with refused(429, "rate_limited"):
        call(ledger)
    ledger.now += TICK
    call(ledger)


def test_an_hour_that_comes_twice_is_two_windows(ledger: Ledger) -> None:
    offer(ledger, {"calls": 1, "per": "hour"})
    ledger.set_time_zone("alpha", "America/New_York")
    ledger.now = datetime(2030, 11, 3, 5, 30, tzinfo=UTC)  # 01:30, daylight saving time
    call(ledger)
    ledger.now += 30 * MINUTE - TICK
    with refused(429, "rate_limited", resets_at="2030-11-03T06:00:00+00:00"):
        call(ledger)
    ledger.now += TICK  # 01:00 again, standard time
    call(ledger)


@pytest.mark.parametrize(
    ("zone", "midnight"),
    [("Atlantic/Azores", datetime(2030, 10, 27, tzinfo=UTC)), ("America/Havana", datetime(2026, 11, 1, 4, tzinfo=UTC))],
)
def test_a_day_that_has_two_midnights_begins_with_the_first(ledger: Ledger, zone: str, midnight: datetime) -> None:
    ledger.now = midnight - DAY
    offer(ledger, {"calls": 2, "per": "day"}, {"units": 10, "per": "month"})
    ledger.set_time_zone("alpha", zone)
    ledger.set_member("alpha", "m", monthly_limit=10)
    ledger.now = midnight - TICK
    calls(ledger, 2)
    with refused(429, "rate_limited", resets_at=midnight.isoformat()):
        call(ledger)
    ledger.now = midnight
    assert used(ledger)[0] == 0
    released = call(ledger, 5, member_id="m", ttl=2 * HOUR)  # at 00:00
    ledger.settle_usage("alpha", call(ledger, 2), 1)
    ledger.now += 70 * MINUTE  # at 00:10 again; what was called the day before has run out
    with refused(429, "rate_limited", resets_at=(midnight + 25 * HOUR).isoformat()):
        call(ledger)
    assert_sound(ledger)
    ledger.release("alpha", released)
    assert used(ledger) == [1, 1]
    (total,) = ledger.get_usage("alpha", group_by="capability")
    assert total.credits == 1
    assert_sound(ledger)


def test_a_time_zone_that_changes_gives_nothing_anew(ledger: Ledger) -> None:
    offer(ledger, {"calls": 2, "per": "day"})
    calls(ledger, 2)
    for zone in ("Pacific/Honolulu", "UTC", "Europe/Berlin"):
        ledger.set_time_zone("alpha", zone)
        with refused(429, "rate_limited"):
            call(ledger)
    assert_sound(ledger)


@pytest.mark.parametrize("period", LENGTHS)
def test_a_clock_that_is_set_back_over_a_boundary_gives_nothing_anew(ledger: Ledger, period: str) -> None:
    offer(ledger, {"calls": 3, "per": period}, everywhere=({"credits": 100, "per": "month"},))
    before, after = datetime(2030, 1, 31, 23, 59, 59, tzinfo=UTC), datetime(2030, 2, 1, 0, 0, 1, tzinfo=UTC)
    counted = {before: 0, after: 0}
    ledger.now = before
    for at, admitted in ((before, 2), (after, 1), (before, 1), (after, 1), (before, 0), (after, 1), (before, 0)):
        ledger.now = at
        assert [row.used for row in ledger.get_limits("alpha")] == [counted[at]] * 2
        calls(ledger, admitted)
        counted[at] += admitted
        if counted[at] == 3:
            assert not ledger.check_access("alpha", "chapter", 1).allowed
            with ledger.unchanged(), refused(429, "rate_limited", used=3):
                call(ledger)
        assert_sound(ledger)
    ledger.set_time_zone("alpha", "Europe/Berlin")
    assert_sound(ledger)


def test_what_ends_while_the_clock_is_set_back_counts_in_its_own_window(ledger: Ledger) -> None:
    offer(ledger, {"units": 100, "per": "month"})
    before, after = datetime(2030, 1, 31, 23, 50, tzinfo=UTC), datetime(2030, 2, 1, 0, 10, tzinfo=UTC)
    ledger.now = before
    settled = call(ledger, 40, ttl=HOUR)
    ledger.now = after
    later = call(ledger, 50)
    ledger.now = before + MINUTE
    left = call(ledger, 30, ttl=5 * MINUTE)
    ledger.settle_usage("alpha", settled, 45)
    assert used(ledger) == [75]
    with refused(429, "monthly_cap_reached", used=75, required=26, resets_at="2030-02-01T00:00:00+00:00"):
        call(ledger, 26)
    ledger.release("alpha", later)
    ledger.now += 5 * MINUTE
    assert used(ledger) == [45]  # what is left has run out, and is not booked
    assert_sound(ledger)
    ledger.book()
    assert used(ledger) == [45]
    call(ledger, 55)
    assert_sound(ledger)
    ledger.now = after
    assert used(ledger) == [0]
    assert ledger.settle_usage("alpha", left, 10).late
    assert used(ledger) == [0]
    assert_sound(ledger)


def test_a_time_zone_set_while_the_clock_is_set_back_gives_nothing_anew(ledger: Ledger) -> None:
    offer(ledger, {"calls": 2, "per": "day"})
    calls(ledger, 2)
    ledger.now -= DAY
    ledger.set_time_zone("alpha", "Europe/Berlin")
    assert used(ledger) == [0]
    ledger.now += DAY
    with refused(429, "rate_limited"):
        call(ledger)
    assert_sound(ledger)


def test_all_windows_must_have_room(ledger: Ledger) -> None:
    offer(ledger, {"calls": 2, "per": "minute"}, {"calls": 3, "per": "day", "rolling": True})
    calls(ledger, 2)
    with refused(429, "rate_limited", period="minute"):
        call(ledger)
    ledger.now += MINUTE
    call(ledger)
    with refused(429, "rate_limited", period="day", rolling=True, limit=3):
        call(ledger)
    assert sorted(used(ledger)) == [1, 3]
    assert_sound(ledger)


def test_a_limit_of_the_plan_counts_all_capabilities(ledger: Ledger) -> None:
    offer(ledger, everywhere=({"calls": 3, "per": "hour"}, {"calls": 4, "per": "day", "rolling": True}))
    call(ledger)
    call(ledger, None, "outline")
    call(ledger)
    with refused(429, "rate_limited", capability=None, limit=3):
        call(ledger, None, "outline")
    ledger.now += HOUR
    call(ledger, None, "outline")
    with refused(429, "rate_limited", rolling=True):
        call(ledger)
    assert_sound(ledger)


def test_nothing_is_admitted_at_a_limit_of_zero(ledger: Ledger) -> None:
    offer(ledger, {"calls": 0, "per": "month", "rolling": True}, {"calls": 0, "per": "day"})
    with ledger.unchanged(), refused(429, "rate_limited", limit=0, used=0):
        call(ledger)
    assert not ledger.check_access("alpha", "chapter", 1).allowed


@pytest.mark.parametrize("limit", [{"calls": 0, "rolling": True}, {"calls": 0}, {"units": 100}, {"credits": 100}])
def test_nobody_is_told_to_wait_where_that_does_not_help(ledger: Ledger, limit: Json) -> None:
    offer(ledger, {"per": "month", **limit})
    with pytest.raises(CreditsError, match="waiting does not help"):
        call(ledger, 101)


@pytest.mark.parametrize(("measure", "cap"), [("units", 100), ("credits", 100)])
def test_a_monthly_cap_counts_what_is_used(ledger: Ledger, measure: str, cap: int) -> None:
    offer(ledger, {measure: cap, "per": "month"})
    usage_id = call(ledger, 60)
    with (
        ledger.unchanged(),
        refused(
            429,
            "monthly_cap_reached",
            measure=measure,
            limit=100,
            used=60,
            required=41,
            resets_at=stamp(NOON + 12 * HOUR),
        ),
    ):
        call(ledger, 41)
    ledger.settle_usage("alpha", usage_id, 20)
    assert used(ledger) == [20]
    usage_id = call(ledger, 80)
    with refused(429, "monthly_cap_reached", used=100, required=1):
        call(ledger, 1)
    ledger.settle_usage("alpha", usage_id, 90)  # the work is done
    assert used(ledger) == [110]
    (limit,) = ledger.get_limits("alpha")
    assert limit.left == 0
    ledger.now += 12 * HOUR
    call(ledger, 100)
    assert_sound(ledger)


@pytest.mark.parametrize("rolling", [False, True])
def test_what_is_released_is_given_back(ledger: Ledger, rolling: bool) -> None:
    offer(ledger, {"calls": 3, "per": "day", "rolling": rolling}, {"credits": 100, "per": "month"})
    first = call(ledger, 30)
    ledger.now += MINUTE
    second = call(ledger, 30)
    ledger.now += MINUTE
    call(ledger, 30)
    with refused(429, "rate_limited"):
        call(ledger)
    ledger.release("alpha", second)
    assert sorted(used(ledger)) == [2, 60]
    call(ledger, 40)
    ledger.release("alpha", first)
    if rolling:
        (limit,) = (row for row in ledger.get_limits("alpha") if row.rolling)
        assert limit.resets_at == NOON + 2 * MINUTE + DAY
    with refused(429, "monthly_cap_reached"):
        call(ledger, 31)
    assert_sound(ledger)


def test_what_is_released_is_given_back_to_its_own_capability(ledger: Ledger) -> None:
    names = ("image", "image/large", "image/large/rolling")
    uses = {"limits": [{"calls": 2, "per": "hour", "rolling": True}, {"calls": 2, "per": "day"}]}
    document = {
        "capabilities": {name: {"unit": "words"} for name in names},
        "plans": {"team": {"name": "Team", "capabilities": dict.fromkeys(names, uses)}},
        "rates": [{"capability": name, "price": {"credits": 1}} for name in names],
    }
    ledger.rows("apply_catalog", catalog=Jsonb(document))
    ledger.open_account("alpha", plan="team")
    ledger.grant(100)
    begun = {name: [call(ledger, capability=name) for _ in range(2)] for name in names}
    for left in (1, 0):
        for place, name in enumerate(names):
            ledger.release("alpha", begun[name].pop())
            assert used(ledger) == [left, left] * (place + 1) + [left + 1, left + 1] * (2 - place)
    assert_sound(ledger)


def test_what_is_released_after_it_left_its_rolling_window_takes_no_other_call_along(ledger: Ledger) -> None:
    rolling = {"per": "minute", "rolling": True}
    offer(ledger, {"calls": 5, **rolling}, everywhere=({"calls": 9, **rolling},))
    old = call(ledger)
    ledger.now += 2 * MINUTE
    calls(ledger, 5)
    ledger.release("alpha", old)
    assert used(ledger) == [5, 5]
    with refused(429, "rate_limited"):
        call(ledger)
    assert_sound(ledger)


def test_a_hold_that_runs_out_gives_its_credits_back_and_stays_a_call(ledger: Ledger) -> None:
    offer(ledger, {"calls": 5, "per": "day"}, {"units": 100, "per": "month"}, {"credits": 100, "per": "month"})
    usage_id = call(ledger, 70)
    ledger.now += 15 * MINUTE - TICK
    assert sorted(used(ledger)) == [1, 70, 70]
    ledger.now += TICK
    assert sorted(used(ledger)) == [0, 0, 1]
    ledger.book()
    assert sorted(used(ledger)) == [0, 0, 1]
    assert_sound(ledger)
    ledger.settle_usage("alpha", usage_id, 80)  # late, but the work was done
    assert sorted(used(ledger)) == [1, 80, 80]
    assert_sound(ledger)


def test_what_was_captured_of_a_hold_that_runs_out_stays_used(ledger: Ledger) -> None:
    offer(ledger, {"units": 100, "per": "month"}, {"credits": 100, "per": "month"})
    ledger.capture("alpha", call(ledger, 70), 20, key="c")
    ledger.now += 15 * MINUTE
    assert sorted(used(ledger)) == [20, 70]
    assert not ledger.check_access("alpha", "chapter", 31).allowed
    ledger.book()
    assert sorted(used(ledger)) == [20, 70]


def test_what_is_released_after_its_window_changes_the_next_one_nothing(ledger: Ledger) -> None:
    offer(ledger, {"calls": 1, "per": "minute"}, {"calls": 2, "per": "minute", "rolling": True})
    first = call(ledger)
    ledger.now += MINUTE
    call(ledger)
    ledger.release("alpha", first)
    with refused(429, "rate_limited"):
        call(ledger)
    assert_sound(ledger)


def test_old_calls_are_forgotten(ledger: Ledger) -> None:
    offer(ledger, {"calls": 4, "per": "minute", "rolling": True})
    for _ in range(50):
        call(ledger)
        ledger.now += 20 * SECOND
    assert len(ledger.table("usage_admissions")) <= 4 + 1
    assert_sound(ledger)


def test_another_plan_has_other_limits_and_forgets_nothing(ledger: Ledger) -> None:
    offer(ledger, {"calls": 2, "per": "day"})
    bigger = catalogue({"calls": 3, "per": "day"})["plans"]["team"]
    ledger.rows(
        "apply_catalog", catalog=Jsonb({"plans": {**catalogue({"calls": 2, "per": "day"})["plans"], "big": bigger}})
    )
    calls(ledger, 2)
    with refused(429, "rate_limited"):
        call(ledger)
    ledger.change_plan("alpha", "big", at="now")
    call(ledger)
    with refused(429, "rate_limited", limit=3, used=3):
        call(ledger)
    assert_sound(ledger)


def test_a_replay_counts_once(ledger: Ledger) -> None:
    offer(ledger, {"calls": 1, "per": "day"}, {"calls": 1, "per": "hour", "rolling": True})
    for _ in range(3):
        call(ledger, usage_id="u")
    assert used(ledger) == [1, 1]


Limits = tuple[Json, ...]
ONE_OF_EACH: dict[str, tuple[Limits, Limits, int, int]] = {
    "calendar": (({"calls": 7, "per": "month"},), (), 1, 7),
    "rolling": (({"calls": 7, "per": "month", "rolling": True},), (), 1, 7),
    "together": ((), ({"calls": 7, "per": "month", "rolling": True},), 1, 7),
    "units": (({"units": 100, "per": "month"},), (), 14, 7),
    "credits": (({"credits": 100, "per": "month"},), (), 14, 7),
    "both": (({"calls": 9, "per": "month", "rolling": True}, {"credits": 100, "per": "month"}), (), 14, 7),
}


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_parallel_calls_at_a_limit_admit_exactly_as_many(database: Database, name: str) -> None:
    limits, everywhere, units, admitted = ONE_OF_EACH[name]
    with committed(database) as ledger:
        offer(ledger, *limits, everywhere=everywhere)

        def job(number: int) -> Callable[[Ledger], Any]:
            return lambda one: one.authorize_usage("alpha", "chapter", units, usage_id=f"u{number}")

        results = together(database, [job(number) for number in range(20)])
        turned_down = [one for one in results if isinstance(one, CreditsError)]
        assert len(results) - len(turned_down) == admitted
        assert {one.status for one in turned_down} == {429}
        assert_sound(ledger)
        # Release and admission race: what one gives back, one other gets.
        kept = [one.usage_id for one in results if not isinstance(one, CreditsError)]
        more = [lambda one, usage_id=usage_id: one.release("alpha", usage_id) for usage_id in kept[:3]]
        results = together(database, [*more, *(job(number) for number in range(100, 112))])
        again = [one for one in results if getattr(one, "usage_id", None)]
        assert len(again) <= len(more)
        assert_sound(ledger)


def test_parallel_calls_after_the_clock_was_set_back_admit_exactly_as_many(database: Database) -> None:
    clock = "create or replace function credits.now() returns timestamptz language sql as $$ select timestamptz '{}' $$"
    with committed(database) as ledger:
        for at, begun in (("2030-01-31 23:59Z", 3), ("2030-02-01 00:01Z", 5), ("2030-01-31 23:58Z", 0)):
            ledger.change(clock.format(at))
            if not ledger.table("accounts"):
                offer(ledger, {"calls": 7, "per": "month"})
            for number in range(begun):
                call(ledger, usage_id=f"{at} {number}")

        def job(number: int) -> Callable[[Ledger], Any]:
            return lambda one: one.authorize_usage("alpha", "chapter", 1, usage_id=f"u{number}")

        results = together(database, [job(number) for number in range(12)])
        assert sum(isinstance(one, CreditsError) for one in results) == 12 - (7 - 3)
        ledger.change(clock.format("2030-02-01 00:02Z"))
        assert used(ledger) == [5]
        assert_sound(ledger)


def test_limits_of_an_account_that_does_not_exist(ledger: Ledger) -> None:
    with refused(404, "account_not_found"):
        ledger.get_limits("nobody")


def test_each_limit_is_listed(ledger: Ledger) -> None:
    offer(
        ledger, {"calls": 10, "per": "minute"}, {"calls": 200, "per": "day", "rolling": True},
        {"units": 5000, "per": "month"}, everywhere=({"credits": 9000, "per": "month"},),
    )  # fmt: skip
    call(ledger, 30)
    call(ledger, None, "outline")
    shown = {
        (row.gate, row.capability, row.measure, row.period, row.rolling): row[6:] for row in ledger.get_limits("alpha")
    }
    midnight = NOON + 12 * HOUR
    assert shown == {
        ("rate_limit", "chapter", "calls", "minute", False): (10, 1, 9, NOON + MINUTE),
        ("rate_limit", "chapter", "calls", "day", True): (200, 1, 199, NOON + timedelta(days=1)),
        ("monthly_cap", "chapter", "units", "month", False): (5000, 30, 4970, midnight),
        ("monthly_cap", None, "credits", "month", False): (9000, 35, 8965, midnight),
    }
    seen = {row["capability"] for row in ledger.check_access("alpha", "outline").limits}
    assert seen == {None}
