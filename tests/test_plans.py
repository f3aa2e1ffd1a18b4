"""Plans of our own: months that come on time without any job, changes that grant what is due once, ends that keep."""

import json
import random
from collections.abc import Callable
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from functools import partial
from itertools import pairwise
from typing import Any
from zoneinfo import ZoneInfo

import pytest
from client import CreditsError
from ledger_support import DAY, HOUR, MINUTE, NOON, SECOND, TICK, Ledger, assert_sound, committed, refused, together
from psycopg import Connection
from servers import Database
from stripe_params import problems
from stripe_world import World, settle
from stripe_world import prepare as prepare_shop

PLANS = """
  insert into credits.plans (code, name, monthly_credits, rollover, rollover_cap, stripe_price_ids) values
    ('basic', 'Basic', 300,  'none', null, '{price_basic}'),
    ('pro',   'Pro',   900,  'none', null, '{price_old, price_pro}'),
    ('max',   'Max',   2000, 'none', null, '{}'),
    ('zero',  'Zero',  0,    'none', null, '{}'),
    ('all',   'All',   100,  'all',  null, '{}'),
    ('cap',   'Cap',   100,  'cap',  150,  '{}'),
    ('old',   'Old',   50,   'none', null, '{}')"""
MONTHS = [  # anniversaries of NOON, 31 January
    datetime(2030, 2, 28, 12, tzinfo=UTC), datetime(2030, 3, 31, 12, tzinfo=UTC), datetime(2030, 4, 30, 12, tzinfo=UTC),
    datetime(2030, 5, 31, 12, tzinfo=UTC), datetime(2030, 6, 30, 12, tzinfo=UTC), datetime(2030, 7, 31, 12, tzinfo=UTC),
]  # fmt: skip
FEBRUARY = MONTHS[0]
HALF = NOON + 14 * DAY  # of the first month


def prepare(ledger: Ledger) -> None:
    """Plans of every kind; one is sold no more."""
    ledger.change(PLANS)
    ledger.change("update credits.plans set active = false where code = 'old'")


@pytest.fixture
def ledger(conn: Connection[Any]) -> Ledger:
    ledger = Ledger(conn)
    prepare(ledger)
    return ledger


def state(ledger: Ledger, account_id: str = "alpha") -> Any:
    """How the account's subscription stands."""
    return ledger.get_subscription_state(account_id)


def lots(ledger: Ledger, account_id: str = "alpha") -> list[tuple[Any, ...]]:
    """Every grant that has started: when, until when, and what became of it."""
    return sorted(
        (g.effective_at, g.expires_at, g.amount, g.remaining, g.held, g.consumed, g.expired)
        for g in ledger.table("grants", "account_id = %s and status <> 'pending'", account_id)
    )


# Months --------------------------------------------------------------------------------------------------------------


def test_a_month_ends_and_the_next_one_begins_at_the_very_instant(ledger: Ledger) -> None:
    ledger.open_account("alpha", plan="pro")
    ledger.use(200)
    for end, next_end in pairwise(MONTHS):
        ledger.now = end - TICK
        assert (ledger.available(), state(ledger).period_end) == (700, end)
        ledger.now = end
        row = ledger.get_balance("alpha")
        assert (row.available, row.by_kind, row.next_expiry_at, row.pending) == (900, {"plan": 900}, next_end, 0)
        assert (state(ledger).period_start, state(ledger).period_end) == (end, next_end)
        ledger.use(200)
    assert ledger.kinds()[:5] == [("grant", 900), ("spend", -200), ("grant", 900), ("expire", -700), ("spend", -200)]
    assert_sound(ledger)


@pytest.mark.parametrize("months", [1, 2, 3, 6])
def test_the_first_look_after_months_of_silence_is_right(ledger: Ledger, months: int) -> None:
    ledger.open_account("alpha", plan="pro")
    ledger.use(200)
    ledger.now = MONTHS[months - 1] + DAY
    with ledger.unchanged():
        read, seen = ledger.get_balance("alpha"), state(ledger)
    assert (read.available, read.balance, read.plan) == (900, 900, "pro")
    assert (seen.state, seen.plan, seen.period_start) == ("active", "pro", MONTHS[months - 1])
    ledger.book()
    assert ledger.get_balance("alpha")._replace(entry_seq=0) == read._replace(entry_seq=0)
    assert state(ledger) == seen
    assert ledger.kinds().count(("grant", 900)) == months + 1
    ledger.use(900)
    assert_sound(ledger)


@pytest.mark.parametrize("plan", ["basic", "all"])
def test_a_look_after_years_of_silence_takes_a_moment(ledger: Ledger, plan: str) -> None:
    """It took as long as the square of the months: 20 seconds for these five years."""
    ledger.open_account("alpha", plan=plan)
    bought = ledger.grant(5000, kind="promo")
    ledger.use(5000)
    ledger.revoke_grant("alpha", bought.grant_id, key="back")  # each month pays a part of the debt
    ledger.now = nth_month(NOON, 60, "UTC")
    ledger.conn.execute("set local statement_timeout = '6s'")
    seen = ledger.available()
    ledger.conn.execute("set local statement_timeout = 0")
    ledger.book()
    assert seen == ledger.available() == {"basic": 300, "all": 61 * 100 - 5000}[plan]
    assert_sound(ledger)


def nth_month(anchor: datetime, number: int, zone: str) -> datetime:
    """The nth anniversary in a time zone, clamped to the end of its month."""
    local = anchor.astimezone(ZoneInfo(zone))
    years, month = divmod(local.month - 1 + number, 12)
    first = local.replace(year=local.year + years, month=month + 1, day=1, tzinfo=None)
    days = ((first + 31 * DAY).replace(day=1) - first).days
    return first.replace(day=min(local.day, days), tzinfo=ZoneInfo(zone)).astimezone(UTC)


@pytest.mark.parametrize(
    ("zone", "anchor"),
    [
        ("UTC", NOON),
        ("Europe/Berlin", NOON),  # summer begins on 31 March 2030
        ("Europe/Berlin", datetime(2030, 1, 31, 1, 30, tzinfo=UTC)),  # 2:30, which that day does not have
        ("America/New_York", datetime(2031, 8, 31, 3, tzinfo=UTC)),  # the 30th there
        ("Pacific/Auckland", datetime(2031, 12, 31, 11, 30, tzinfo=UTC)),  # New Year there; a leap year follows
    ],
)
def test_anniversaries_are_counted_from_the_first_day_in_the_time_zone_of_the_account(
    ledger: Ledger, zone: str, anchor: datetime
) -> None:
    ledger.now = anchor
    ledger.open("alpha")
    assert ledger.set_time_zone("alpha", zone) == zone
    ledger.change_plan("alpha", "basic")
    for number in range(1, 15):
        end = nth_month(anchor, number, zone)
        assert state(ledger).period_end == end
        ledger.now = end
        assert ledger.available() == 300
        ledger.use(number)
    assert_sound(ledger)


def test_a_new_time_zone_counts_from_the_next_month_on(ledger: Ledger) -> None:
    ledger.open_account("alpha", plan="basic")
    ledger.set_time_zone("alpha", "Europe/Berlin")
    assert state(ledger).period_end == FEBRUARY
    ledger.now = FEBRUARY
    assert state(ledger).period_end == MONTHS[1] - HOUR
    ledger.now = MONTHS[1] - HOUR
    assert ledger.available() == 300
    assert_sound(ledger)


@pytest.mark.parametrize("zones", [("Europe/Berlin", "UTC"), ("Pacific/Kiritimati", "Pacific/Pago_Pago")])
def test_a_new_time_zone_makes_no_month_of_an_hour(ledger: Ledger, zones: tuple[str, str]) -> None:
    before, after = zones
    ledger.open("alpha")
    ledger.set_time_zone("alpha", before)
    ledger.change_plan("alpha", "basic")
    ledger.now = state(ledger).period_end
    ledger.book()
    ledger.set_time_zone("alpha", after)
    for _ in range(3):
        ledger.now = state(ledger).period_end
        ledger.book()
        assert state(ledger).period_end - state(ledger).period_start > 27 * DAY
    assert_sound(ledger)


def test_a_plan_without_credits_has_months_all_the_same(ledger: Ledger) -> None:
    ledger.open_account("alpha", plan="zero")
    ledger.now = MONTHS[1]
    ledger.book()
    assert (state(ledger).state, state(ledger).period_start) == ("active", MONTHS[1])
    assert ledger.kinds() == []
    ledger.now += (MONTHS[2] - MONTHS[1]) / 2
    ledger.change_plan("alpha", "basic")
    assert ledger.available() == 150
    ledger.change_plan("alpha", "zero")
    assert ledger.available() == 150
    ledger.now = MONTHS[2]
    ledger.book()
    assert ledger.available() == 0
    assert_sound(ledger)


@pytest.mark.parametrize("plan", ["pro", "all", "cap"])
def test_a_punctual_and_a_late_look_end_in_the_same(ledger: Ledger, plan: str) -> None:
    for account_id in ("late", "punctual"):
        ledger.now = NOON
        ledger.open_account(account_id, plan=plan)
        ledger.use(30, account_id)
        ledger.grant(1000, account_id, effective_at=NOON + 20 * DAY, expires_at=NOON + 100 * DAY, kind="promo")
        ledger.reserve(account_id, 20, "r", ttl=DAY)
        ledger.change_plan(account_id, "basic", at="period_end")
    while ledger.now < NOON + 70 * DAY:
        ledger.now += 10 * HOUR
        ledger.book("punctual")
    ledger.book("late")
    assert lots(ledger, "late") == lots(ledger, "punctual")
    late, punctual = (state(ledger, name)._replace(account_id="") for name in ("late", "punctual"))
    assert late == punctual
    assert (late.plan, late.pending_plan) == ("basic", None)
    rows = [ledger.get_balance(name)._replace(account_id="", entry_seq=0) for name in ("late", "punctual")]
    assert rows[0] == rows[1]
    assert_sound(ledger)


def something(ledger: Ledger, dice: random.Random, plans: list[str]) -> None:
    """Something happens to the account."""
    match dice.randrange(6):
        case 0:
            ledger.change_plan("alpha", dice.choice(plans), at=dice.choice(["now", "period_end"]))
        case 1:
            ledger.cancel_plan("alpha") if dice.random() < 0.3 else ledger.change_plan("alpha", plans[0])
        case 2:
            ledger.reserve("alpha", max(1, ledger.available() // 2), ledger.key(), ttl=DAY)
        case 3:
            made = ledger.grant(dice.randrange(100, 900), kind="promo", expires_at=ledger.now + 40 * DAY)
            ledger.use(made.amount)
            ledger.revoke_grant("alpha", made.grant_id, key=ledger.key())
        case 4:
            ledger.grant(50, effective_at=ledger.now + dice.random() * 60 * DAY, kind="gift")
        case _:
            ledger.use(1)


SEEDS = [*range(20), 117, 132, 153]  # the last ones: months, gifts and holds that pay a debt in turn


@pytest.mark.parametrize("plans", [["basic", "pro", "zero"], ["all", "cap"], ["cap", "basic", "all", "zero"]])
def test_a_read_is_what_a_booking_makes_of_it_after_any_silence(ledger: Ledger, plans: list[str]) -> None:
    for seed in SEEDS:
        dice = random.Random(seed)
        with ledger.conn.transaction(force_rollback=True):
            ledger.now = NOON
            ledger.open_account("alpha", plan=dice.choice(plans))
            for _ in range(8):
                ledger.now += dice.random() * 12 * DAY
                with suppress(CreditsError):  # not all of it can be had
                    something(ledger, dice, plans)
            for _ in range(6):
                ledger.now += dice.random() * 80 * DAY
                read, seen = ledger.get_balance("alpha"), state(ledger)
                if dice.random() < 0.5:
                    ledger.book()
                    assert ledger.get_balance("alpha")._replace(entry_seq=0) == read._replace(entry_seq=0), seed
                    assert state(ledger) == seen, seed
            assert_sound(ledger)


# Changes -------------------------------------------------------------------------------------------------------------


def test_a_larger_plan_brings_the_difference_for_the_rest_of_the_month_once(ledger: Ledger) -> None:
    ledger.open_account("alpha", plan="basic")
    ledger.now = HALF
    assert ledger.change_plan("alpha", "pro").plan == "pro"
    assert ledger.available() == 300 + 300
    ledger.change_plan("alpha", "pro")
    assert ledger.available() == 600
    ledger.use(600)
    for plan in ("basic", "pro", "zero", "pro", "basic", "pro"):
        assert ledger.change_plan("alpha", plan).plan == plan
        assert ledger.available() == 0
    ledger.change_plan("alpha", "max")
    assert ledger.available() == 550
    ledger.change_plan("alpha", "zero")
    ledger.now = FEBRUARY - TICK
    ledger.change_plan("alpha", "max")
    assert ledger.available() == 550
    ledger.now = FEBRUARY
    assert ledger.available() == 2000
    assert_sound(ledger)


def test_the_difference_is_rounded_once(ledger: Ledger) -> None:
    ledger.open_account("alpha", plan="basic")
    ledger.now = NOON + 9 * DAY + 7 * HOUR + 11 * MINUTE + 13 * SECOND
    ledger.change_plan("alpha", "pro")
    left = (FEBRUARY - ledger.now) / SECOND
    assert float(ledger.available()) == pytest.approx(300 + 600 * left / (28 * 86400), abs=1e-6)
    assert ledger.table("grants", "status = 'active' and amount <> round(amount, 6)") == []


def test_a_smaller_plan_takes_nothing_back_and_counts_from_the_next_month_on(ledger: Ledger) -> None:
    ledger.open_account("alpha", plan="pro")
    ledger.now = HALF
    assert ledger.change_plan("alpha", "basic").plan == "basic"
    assert (ledger.available(), ledger.get_balance("alpha").plan) == (900, "basic")
    ledger.now = FEBRUARY
    assert ledger.available() == 300
    ledger.change_plan("alpha", "pro")
    assert ledger.available() == 900
    ledger.now = MONTHS[1]
    assert ledger.available() == 900
    assert_sound(ledger)


def test_a_change_at_the_end_of_the_period_waits_is_shown_and_comes(ledger: Ledger) -> None:
    ledger.open_account("alpha", plan="pro")
    ledger.now = HALF
    row = ledger.change_plan("alpha", "basic", at="period_end")
    assert (row.plan, row.pending_plan, row.pending_at, row.state) == ("pro", "basic", FEBRUARY, "active")
    ledger.now = FEBRUARY - TICK
    assert (ledger.available(), state(ledger).plan) == (900, "pro")
    ledger.now = FEBRUARY
    seen, read = state(ledger), ledger.get_balance("alpha")
    assert (read.available, read.plan) == (300, "basic")
    assert (seen.plan, seen.pending_plan, seen.pending_at) == ("basic", None, None)
    ledger.book()
    assert state(ledger) == seen
    assert ledger.get_balance("alpha")._replace(entry_seq=0) == read._replace(entry_seq=0)
    assert [(row.plan, row.cause) for row in ledger.table("subscription_history", "true order by history_id")] == [
        ("pro", "open_account"), ("basic", "period_end"),
    ]  # fmt: skip
    assert_sound(ledger)


@pytest.mark.parametrize("how", ["the present plan", "another now", "another later", "cancel", "cancel now"])
def test_a_pending_change_can_be_withdrawn(ledger: Ledger, how: str) -> None:
    ledger.open_account("alpha", plan="pro")
    ledger.change_plan("alpha", "basic", at="period_end")
    verbs: dict[str, tuple[Callable[[], Any], str | None, Any]] = {  # the verb, what is pending then, and what comes
        "the present plan": (lambda: ledger.change_plan("alpha", "pro", at="period_end"), None, 900),
        "another now": (lambda: ledger.change_plan("alpha", "max"), None, 2000),
        "another later": (lambda: ledger.change_plan("alpha", "max", at="period_end"), "max", 2000),
        "cancel": (lambda: ledger.cancel_plan("alpha"), None, 0),
        "cancel now": (lambda: ledger.cancel_plan("alpha", at="now"), None, 0),
    }
    verb, pending, then = verbs[how]
    assert verb().pending_plan == pending
    ledger.now = FEBRUARY
    ledger.book()
    assert ledger.available() == then
    assert_sound(ledger)


@pytest.mark.parametrize("at", ["now", "period_end"])
def test_who_stays_on_a_plan_that_is_sold_no_more_does_not_choose_it(ledger: Ledger, at: str) -> None:
    ledger.open_account("alpha", plan="pro")
    ledger.change_plan("alpha", "basic", at="period_end")
    ledger.change("update credits.plans set active = false where code = 'pro'")
    assert ledger.change_plan("alpha", "pro", at=at).pending_plan is None
    ledger.now = FEBRUARY
    assert ledger.available() == 900
    with refused(404, "plan_not_found", plan="old"):
        ledger.change_plan("alpha", "old", at=at)
    assert_sound(ledger)


def test_a_plan_that_is_sold_no_more_goes_on_and_cannot_be_chosen(ledger: Ledger) -> None:
    ledger.open_account("alpha", plan="basic")
    ledger.change("update credits.plans set active = false where code = 'basic'")
    with refused(404, "plan_not_found", plan="old"):
        ledger.change_plan("alpha", "old")
    with refused(404, "plan_not_found", plan="old"):
        ledger.open_account("beta", plan="old")
    ledger.now = FEBRUARY
    assert ledger.available() == 300


def test_other_credits_of_a_plan_count_from_the_next_month_on(ledger: Ledger) -> None:
    ledger.open_account("alpha", plan="basic")
    ledger.change("update credits.plans set monthly_credits = 500 where code = 'basic'")
    ledger.use(1)
    ledger.now = MONTHS[1]
    ledger.book()
    assert ledger.available() == 500
    assert_sound(ledger)


@pytest.mark.parametrize("instead", ["a larger one", "another plan", "none"])
def test_a_month_that_was_cut_before_it_began_gives_way_like_any_other(ledger: Ledger, instead: str) -> None:
    ledger.open_account("alpha", plan="pro")
    (month,) = ledger.table("grants", "status = 'pending'")
    ledger.revoke_grant("alpha", month.grant_id, amount=5, key="cut")
    match instead:
        case "a larger one":
            ledger.change("update credits.plans set monthly_credits = 950 where code = 'pro'")
            assert [ledger.initialize_plan_credits() for _ in range(2)] == [1, 0]
        case "another plan":
            ledger.change_plan("alpha", "basic", at="period_end")
        case _:
            ledger.cancel_plan("alpha")
    assert_sound(ledger)
    ledger.now = FEBRUARY
    seen = ledger.available()
    ledger.book()
    assert seen == ledger.available() == {"a larger one": 950, "another plan": 300, "none": 0}[instead]
    assert ledger.revoke_grant("alpha", month.grant_id, amount=5, key="cut").replayed
    assert_sound(ledger)


@pytest.mark.parametrize(
    ("now_has", "plan", "brought"),
    [(100, "basic", 0), (100, "max", 550), (2000, "max", 550), (5000, "max", 550)],  # (2000 - 900) for half a month
)
def test_a_change_is_measured_by_what_the_month_came_with(
    ledger: Ledger, now_has: int, plan: str, brought: int
) -> None:
    ledger.open_account("alpha", plan="pro")
    ledger.change("update credits.plans set monthly_credits = %s where code = 'pro'", now_has)
    ledger.now = HALF
    ledger.change_plan("alpha", plan)
    assert ledger.available() == 900 + brought
    assert_sound(ledger)


def test_a_plan_that_is_larger_the_second_time_brings_what_it_has_more(ledger: Ledger) -> None:
    ledger.open_account("alpha", plan="basic")
    ledger.now = HALF
    ledger.change_plan("alpha", "pro")
    ledger.change_plan("alpha", "basic")
    ledger.change("update credits.plans set monthly_credits = 1300 where code = 'pro'")
    for _ in range(2):
        ledger.change_plan("alpha", "pro")
        assert ledger.available() == 300 + 300 + 200
        ledger.change_plan("alpha", "basic")
    assert_sound(ledger)


def test_credits_that_a_plan_gets_within_the_month_are_read_as_they_are_booked(ledger: Ledger) -> None:
    ledger.open_account("alpha", plan="zero")
    ledger.grant(10)
    ledger.reserve("alpha", 5, "r")
    ledger.change("update credits.plans set monthly_credits = 100 where code = 'zero'")
    ledger.now += HOUR  # the hold has run out, and nobody has booked it
    seen = ledger.sums()
    ledger.book()
    assert seen == ledger.sums() == (10, 0, 10, 0)
    ledger.now = FEBRUARY
    seen = ledger.sums()
    ledger.book()
    assert seen == ledger.sums() == (110, 0, 110, 0)
    assert_sound(ledger)


def test_a_change_at_the_very_boundary_is_of_the_new_month(ledger: Ledger) -> None:
    ledger.open_account("alpha", plan="basic")
    ledger.now = FEBRUARY
    ledger.change_plan("alpha", "pro")
    assert ledger.available() == 900
    assert_sound(ledger)


# Ends ----------------------------------------------------------------------------------------------------------------


def test_a_canceled_plan_keeps_its_credits_until_the_period_ends(ledger: Ledger) -> None:
    ledger.open_account("alpha", plan="pro")
    ledger.grant(50, kind="purchase")
    ledger.now = HALF
    row = ledger.cancel_plan("alpha")
    assert (row.state, row.may_spend, row.may_receive, row.cancel_at) == ("canceling", True, True, FEBRUARY)
    with ledger.unchanged("accounts", "subscription_cache"):
        assert ledger.cancel_plan("alpha") == row
    assert ledger.available() == 950
    ledger.now = FEBRUARY - TICK
    assert (ledger.available(), state(ledger).state) == (950, "canceling")
    ledger.now = FEBRUARY
    seen = state(ledger)
    assert (ledger.available(), seen.state, seen.may_spend, seen.may_receive) == (50, "canceled", True, False)
    ledger.book()
    assert state(ledger) == seen
    assert ledger.get_balance("alpha").plan is None
    ledger.use(50)
    ledger.now = MONTHS[1]
    assert ledger.available() == 0
    assert_sound(ledger)


def test_a_plan_canceled_now_is_over_and_keeps_its_credits_until_they_expire(ledger: Ledger) -> None:
    ledger.open_account("alpha", plan="pro")
    ledger.now = HALF
    row = ledger.cancel_plan("alpha", at="now")
    assert (row.state, row.may_receive) == ("canceled", False)
    assert (ledger.available(), ledger.get_balance("alpha").plan) == (900, None)
    ledger.now = FEBRUARY
    assert ledger.available() == 0
    assert_sound(ledger)


@pytest.mark.parametrize("moment", [HALF, FEBRUARY], ids=["in its period", "later"])
def test_a_plan_that_is_over_is_canceled_again_and_not_resumed(ledger: Ledger, moment: datetime) -> None:
    ledger.open_account("alpha", plan="basic")
    ledger.change_plan("alpha", "pro")
    ledger.now = HALF
    row = ledger.cancel_plan("alpha", at="now")
    ledger.now = moment
    for at in ("now", "period_end"):
        with ledger.unchanged("accounts", "balances", "grants", "entries", "subscription_cache", "plan_grants"):
            assert ledger.cancel_plan("alpha", at=at).state == row.state == "canceled"
    with ledger.unchanged(), refused(409, "illegal_transition", **{"from": "canceled", "to": "active"}):
        ledger.resume_plan("alpha")
    assert ledger.change_plan("alpha", "pro").state == "active"
    assert_sound(ledger)


def test_a_cancellation_is_taken_back(ledger: Ledger) -> None:
    ledger.open_account("alpha", plan="pro")
    ledger.cancel_plan("alpha")
    row = ledger.resume_plan("alpha")
    assert (row.state, row.cancel_at, row.may_receive) == ("active", None, True)
    with ledger.unchanged("accounts", "subscription_cache"):
        assert ledger.resume_plan("alpha") == row
    ledger.now = FEBRUARY
    assert (ledger.available(), state(ledger).state) == (900, "active")
    assert_sound(ledger)


def test_a_cancellation_is_hurried(ledger: Ledger) -> None:
    ledger.open_account("alpha", plan="pro")
    ledger.cancel_plan("alpha")
    assert ledger.cancel_plan("alpha", at="now").state == "canceled"
    assert ledger.available() == 900


def test_a_canceling_plan_changes_and_still_ends(ledger: Ledger) -> None:
    ledger.open_account("alpha", plan="basic")
    ledger.cancel_plan("alpha")
    ledger.now = HALF
    row = ledger.change_plan("alpha", "pro")
    assert (row.state, row.plan, ledger.available()) == ("canceling", "pro", 600)
    ledger.now = FEBRUARY
    ledger.book()
    assert (ledger.available(), state(ledger).state) == (0, "canceled")


def test_without_a_plan_there_is_nothing_to_cancel_and_a_first_one_begins_now(ledger: Ledger) -> None:
    ledger.open("alpha")
    assert (state(ledger).state, state(ledger).plan) == ("none", None)
    for verb in (ledger.cancel_plan, ledger.resume_plan):
        with refused(404, "subscription_not_found", account_id="alpha"):
            verb("alpha")
    ledger.now = HALF
    row = ledger.change_plan("alpha", "basic", at="period_end")
    assert (row.state, row.plan, row.period_start) == ("active", "basic", HALF)
    assert ledger.available() == 300


def test_a_new_plan_after_the_old_one_has_ended_begins_its_own_months(ledger: Ledger) -> None:
    ledger.open_account("alpha", plan="basic")
    ledger.cancel_plan("alpha")
    ledger.now = FEBRUARY + 5 * DAY
    row = ledger.change_plan("alpha", "pro")
    assert (row.state, row.period_start, ledger.available()) == ("active", ledger.now, 900)
    ledger.now = datetime(2030, 4, 5, 12, tzinfo=UTC)
    assert ledger.available() == 900
    assert len(ledger.table("subscriptions")) == 2
    assert_sound(ledger)


def test_canceling_now_and_beginning_anew_refills_nothing(ledger: Ledger) -> None:
    ledger.open_account("alpha", plan="pro")
    ledger.use(900)
    ledger.now = HALF
    for plan in ("pro", "basic", "zero", "pro"):
        ledger.cancel_plan("alpha", at="now")
        ledger.change_plan("alpha", plan)
        assert ledger.available() == 0
    ledger.cancel_plan("alpha", at="now")
    ledger.change_plan("alpha", "max")
    assert ledger.available() == 550
    changes = ledger.table("subscription_history", "from_state = to_state")
    assert {(row.to_state, row.cause) for row in changes} == {("active", "change_plan")}
    ledger.now = FEBRUARY
    assert ledger.available() == 2000
    assert_sound(ledger)


# Rollover ------------------------------------------------------------------------------------------------------------


def test_what_is_left_of_a_plan_that_rolls_over_stays(ledger: Ledger) -> None:
    ledger.open_account("alpha", plan="all")
    ledger.use(40)
    left = 60
    for month in MONTHS[:4]:
        ledger.now = month
        ledger.book()
        left += 100
        assert ledger.available() == left
        ledger.use(10)
        left -= 10
    assert_sound(ledger)


def test_as_much_stays_as_the_cap_lets(ledger: Ledger) -> None:
    ledger.open_account("alpha", plan="cap")
    ledger.use(40)
    for month, expected in zip(MONTHS, (160, 250, 250, 250), strict=False):
        ledger.now = month
        ledger.book()
        assert ledger.available() == expected
    ledger.use(240)
    ledger.now = MONTHS[4]
    ledger.book()
    assert ledger.available() == 110
    assert_sound(ledger)


@pytest.mark.parametrize(("plan", "expected"), [("all", 700), ("cap", 250), ("basic", 300)])
def test_months_of_silence_roll_over_one_after_the_other(ledger: Ledger, plan: str, expected: int) -> None:
    ledger.open_account("alpha", plan=plan)
    ledger.now = MONTHS[5]
    assert ledger.available() == expected
    ledger.book()
    assert ledger.available() == expected
    assert_sound(ledger)


@pytest.mark.parametrize("how", ["release", "run out", "refund"])
def test_what_comes_back_after_the_month_rolls_over_too(ledger: Ledger, how: str) -> None:
    ledger.open_account("alpha", plan="cap")
    ledger.spend("alpha", 30, key="spent")
    ledger.now = FEBRUARY - MINUTE
    ledger.reserve("alpha", 50, "r", ttl=2 * MINUTE)
    ledger.now = FEBRUARY
    ledger.book()
    assert ledger.sums() == (120, 50, 170, 0)
    if how == "release":
        ledger.release("alpha", "r")
    elif how == "run out":
        ledger.now += MINUTE
        ledger.book()
    else:
        ledger.refund_spend("alpha", "spent", key="back")
    assert ledger.available() == (150 if how == "refund" else 170)
    assert_sound(ledger)


@pytest.mark.parametrize("plan", ["all", "cap"])
@pytest.mark.parametrize("how", ["release", "run out", "refund", "silence"])
def test_what_comes_back_months_later_rolls_over_from_each_to_the_next(ledger: Ledger, how: str, plan: str) -> None:
    """It ended with the first of them: a read found it after a silence, and a booking did not."""
    ledger.set_setting("reservation_max_age", "100 days")
    ledger.open_account("alpha", plan=plan)
    ledger.now = HALF
    ledger.spend("alpha", 30, key="spent")
    ledger.reserve("alpha", 60, "r", ttl=70 * DAY)
    for month in MONTHS[: 0 if how == "silence" else 2]:
        ledger.now = month
        ledger.book()
    came = 30 if how == "refund" else 60
    if how == "refund":
        ledger.refund_spend("alpha", "spent", key="back")
    elif how == "release":
        ledger.release("alpha", "r")
    else:
        ledger.now = HALF + 70 * DAY
    seen = ledger.available()
    ledger.book()
    assert seen == ledger.available() == (210 + came if plan == "all" else 210 + min(came, 40))
    assert_sound(ledger)


@pytest.mark.parametrize("silent", [False, True])
@pytest.mark.parametrize(
    ("before", "after", "expected"), [("basic", "all", 100), ("all", "basic", 400), ("cap", "basic", 400)]
)
def test_the_plan_of_the_month_that_ended_says_what_rolls_over(
    ledger: Ledger, before: str, after: str, expected: int, silent: bool
) -> None:
    """The plan that came with the boundary was asked for what came back after it, and a read said something else."""
    ledger.open_account("alpha", plan=before)
    ledger.change_plan("alpha", after, at="period_end")
    ledger.now = FEBRUARY - HOUR
    ledger.reserve("alpha", 60, "r", ttl=2 * HOUR)
    if not silent:
        ledger.now = FEBRUARY
        ledger.book()
    ledger.now = FEBRUARY + DAY
    seen = ledger.available()
    ledger.book()
    assert seen == ledger.available() == expected
    assert_sound(ledger)


@pytest.mark.parametrize("silence", [27, 29, 70, 100, 400])
@pytest.mark.parametrize("debt", [0, 1250])
@pytest.mark.parametrize(("cap", "price"), [(None, "year"), (1500, "year"), (None, "basic")])
def test_what_rolls_over_in_a_subscription_of_stripe_is_read_as_it_is_booked(
    conn: Connection[Any], silence: int, debt: int, cap: int | None, price: str
) -> None:
    """Until a job came, balances lacked what had rolled over into months of a year, and what was on hold."""
    ledger = Ledger(conn)
    prepare_shop(ledger, "alpha")
    ledger.change(
        "update credits.plans set rollover = %s, rollover_cap = %s where code = %s", "cap" if cap else "all", cap, price
    )
    world = World()
    subscription = world.subscribe("alpha", price)
    deliver(ledger, world)
    ledger.use(100)
    if debt:
        bought = ledger.grant(debt, priority=1)
        ledger.use(debt)
    ledger.now = NOON + 27 * DAY + 20 * HOUR
    ledger.reserve("alpha", 300, "r", ttl=10 * HOUR)
    if debt:
        ledger.revoke_grant("alpha", bought.grant_id, key="back")
    if price == "basic":
        world.renew(subscription)
        deliver(ledger, world)
    ledger.now = max(ledger.now, NOON + silence * DAY)
    seen = ledger.get_balance("alpha")
    ledger.book()
    assert ledger.get_balance("alpha")._replace(entry_seq=0) == seen._replace(entry_seq=0)
    assert_sound(ledger)


def deliver(ledger: Ledger, world: World) -> None:
    """What Stripe tells, when it happens."""
    for event in world.events:
        ledger.now = max(ledger.now, datetime.fromtimestamp(event.created, UTC))
        ledger.receive_stripe_event("default", event.payload)
        settle(ledger, world, patience=timedelta(0))


@pytest.mark.parametrize("plan", ["all", "cap"])
def test_what_rolls_over_is_one_grant_however_many_it_was(ledger: Ledger, plan: str) -> None:
    ledger.open_account("alpha", plan=plan)
    for number, month in enumerate(MONTHS, start=1):
        ledger.now = month
        ledger.book()
        carried = min(100 * number, 150 if plan == "cap" else 1000)
        assert [lot[2] for lot in lots(ledger) if lot[0] == month] == [100, carried]
    assert_sound(ledger)


def test_more_than_a_grant_can_hold_rolls_over(ledger: Ledger) -> None:
    ledger.change("update credits.plans set monthly_credits = 600000000000 where code = 'all'")
    ledger.open_account("alpha", plan="all")
    for number, month in enumerate(MONTHS, start=2):
        ledger.now = month
        seen = ledger.available()
        ledger.book()
        assert seen == ledger.available() == number * 600000000000
    assert_sound(ledger)


def test_other_credits_never_roll_over(ledger: Ledger) -> None:
    ledger.open_account("alpha", plan="all")
    ledger.grant(500, kind="promo", expires_at=FEBRUARY)
    ledger.grant(70, kind="purchase")
    ledger.now = FEBRUARY
    ledger.book()
    assert ledger.available() == 270


def test_nothing_rolls_over_the_end_of_a_plan(ledger: Ledger) -> None:
    ledger.open_account("alpha", plan="all")
    ledger.cancel_plan("alpha")
    ledger.now = FEBRUARY
    ledger.book()
    assert ledger.available() == 0
    assert_sound(ledger)


def test_what_an_upgrade_has_brought_rolls_over_as_well(ledger: Ledger) -> None:
    ledger.open_account("alpha", plan="zero")
    ledger.now = HALF
    ledger.change_plan("alpha", "all")
    assert ledger.available() == 50
    ledger.now = FEBRUARY
    ledger.book()
    assert ledger.available() == 150
    assert_sound(ledger)


# Beside a subscription of Stripe -------------------------------------------------------------------------------------


def subscription(status: str = "active", **changes: Any) -> dict[str, Any]:
    """A subscription of Stripe of alpha, of plan basic, from HALF on."""
    start, end = int(HALF.timestamp()), int((HALF + 28 * DAY).timestamp())
    price = {"id": "price_basic", "product": "prod_1", "unit_amount": 1000, "recurring": {"interval": "month"}}
    item = {"id": "si_1", "price": price, "quantity": 1, "current_period_start": start, "current_period_end": end}
    return {
        "id": "sub_1", "object": "subscription", "status": status, "customer": "cus_1", "created": start,
        "metadata": {"account_id": "alpha"}, "items": {"data": [item]}, "billing_cycle_anchor": start, **changes,
    }  # fmt: skip


@pytest.mark.parametrize("status", ["active", "trialing", "past_due"])
def test_a_plan_of_our_own_rests_while_a_subscription_of_stripe_is_live(ledger: Ledger, status: str) -> None:
    ledger.open_account("alpha", plan="cap")
    ledger.now = HALF
    ledger.tell("customer.subscription.created", subscription(status))
    assert (ledger.available(), ledger.get_balance("alpha").plan, state(ledger).source) == (100, "basic", "stripe")
    for month in MONTHS[:2]:
        ledger.now = month
        ledger.book()
        assert ledger.available() == 0
    ledger.now += DAY
    ledger.tell("customer.subscription.deleted", subscription("canceled", ended_at=int(ledger.now.timestamp())))
    assert (ledger.available(), ledger.get_balance("alpha").plan, state(ledger).source) == (100, "cap", "internal")
    ledger.now = MONTHS[2]
    ledger.book()
    assert ledger.available() == 200
    assert_sound(ledger)


def test_a_month_that_was_granted_before_is_not_granted_again_after_a_short_subscription(ledger: Ledger) -> None:
    ledger.open_account("alpha", plan="pro")
    ledger.use(900)
    for n in range(3):
        ledger.now += DAY
        ledger.tell("customer.subscription.created", subscription(id=f"sub_{n}"))
        ledger.now += HOUR
        ledger.tell("customer.subscription.deleted", subscription("canceled", id=f"sub_{n}"))
        assert ledger.available() == 0
    ledger.now = FEBRUARY
    assert ledger.available() == 900
    assert_sound(ledger)


@pytest.mark.parametrize("months", [1, 2, 5])
def test_months_of_a_year_that_is_paid_at_once_are_seen_after_silence_too(ledger: Ledger, months: int) -> None:
    ledger.open("alpha")
    start, end = int(NOON.timestamp()), int((NOON + 365 * DAY).timestamp())
    price = {"id": "price_year", "recurring": {"interval": "year"}, "unit_amount": 9000, "metadata": {"credits": "70"}}
    line = {"id": "il_1", "amount": 9000, "quantity": 1, "price": price, "period": {"start": start, "end": end}}
    paid = {
        "id": "in_1", "object": "invoice", "status": "paid", "customer": "cus_1", "subscription": "sub_1",
        "lines": {"data": [line]},
    }  # fmt: skip
    ledger.tell("customer.subscription.created", subscription())
    ledger.tell("invoice.paid", paid)
    ledger.now = MONTHS[months - 1] + DAY
    read = ledger.get_balance("alpha")
    assert (read.available, read.next_expiry_at) == (70, MONTHS[months])
    ledger.book()
    assert ledger.get_balance("alpha")._replace(entry_seq=0) == read._replace(entry_seq=0)
    assert ledger.kinds().count(("grant", 70)) == months + 1
    assert_sound(ledger)


@pytest.fixture
def subscriber(ledger: Ledger) -> Ledger:
    """Alpha has a subscription of Stripe."""
    ledger.open("alpha")
    ledger.now = HALF
    ledger.tell("customer.subscription.created", subscription())
    return ledger


def wanted(ledger: Ledger) -> list[tuple[Any, ...]]:
    """What Stripe shall be asked to do, in its order."""
    rows = ledger.table("stripe_requests", "state = 'queued' and purpose <> 'retrieve' order by run_at, request_id")
    assert [problem for row in rows for problem in problems(row.method, row.path, row.params)] == []
    return [(row.purpose, row.method, row.path, row.params) for row in rows]


SUBSCRIPTION = "/v1/subscriptions/sub_1"


def test_verbs_on_a_subscription_of_stripe_ask_stripe_and_change_nothing_else(subscriber: Ledger) -> None:
    ledger = subscriber
    changed = {
        "items": [{"id": "si_1", "price": "price_pro"}], "payment_behavior": "pending_if_incomplete",
        "proration_behavior": "always_invoice",
    }  # fmt: skip
    requests: list[tuple[Callable[[], Any], tuple[Any, ...]]] = [
        (lambda: ledger.change_plan("alpha", "pro"), ("change_plan", "post", SUBSCRIPTION, changed)),
        (lambda: ledger.cancel_plan("alpha"), ("cancel_plan", "post", SUBSCRIPTION, {"cancel_at_period_end": True})),
        (lambda: ledger.cancel_plan("alpha", at="now"), ("cancel_plan", "delete", SUBSCRIPTION, {})),
        (lambda: ledger.resume_plan("alpha"), ("resume_plan", "post", SUBSCRIPTION, {"cancel_at_period_end": False})),
    ]
    before = state(ledger)
    for verb, request in requests:
        with ledger.conn.transaction(force_rollback=True):
            with ledger.unchanged("stripe_requests", "subscription_cache"):
                assert verb() == before
                assert verb() == before
            assert wanted(ledger) == [request]
            (row,) = ledger.table("stripe_requests", "purpose <> 'retrieve' and state = 'queued'")
            assert (row.account_id, row.ref, row.idempotency_key) == ("alpha", "sub_1", f"pgc-{row.request_id}")


def test_a_change_at_the_end_of_a_period_of_stripe_is_scheduled_there_and_shown_as_pending(subscriber: Ledger) -> None:
    ledger = subscriber
    row = ledger.change_plan("alpha", "pro", at="period_end")
    assert (row.plan, row.pending_plan, row.pending_at) == ("basic", "pro", HALF + 28 * DAY)
    asked = ("schedule_plan", "post", "/v1/subscription_schedules", {"from_subscription": "sub_1"})
    assert wanted(ledger) == [asked]
    assert ledger.available() == 0


def test_of_several_words_before_stripe_was_asked_the_last_one_counts(subscriber: Ledger) -> None:
    ledger = subscriber
    ledger.change("update credits.plans set stripe_price_ids = '{price_max}' where code = 'max'")
    cancel, resume = partial(ledger.cancel_plan, "alpha"), partial(ledger.resume_plan, "alpha")
    stories: list[tuple[list[Callable[[], Any]], Callable[[Any], bool]]] = [
        (
            [partial(ledger.change_plan, "alpha", "max"), partial(ledger.change_plan, "alpha", "pro")],
            lambda last: last[3]["items"][0]["price"] == "price_pro",
        ),
        ([cancel, partial(cancel, at="now")], lambda last: last[1] == "delete"),
        ([cancel, resume, cancel], lambda last: last[3] == {"cancel_at_period_end": True}),
        ([resume, cancel, resume], lambda last: last[3] == {"cancel_at_period_end": False}),
    ]  # fmt: skip
    for verbs, counts in stories:
        with ledger.conn.transaction(force_rollback=True):
            for verb in verbs:
                verb()
                ledger.now += SECOND
            assert counts(wanted(ledger)[-1]), wanted(ledger)


def test_what_stripe_is_being_asked_stands_and_another_word_is_refused(subscriber: Ledger) -> None:
    """Until it has answered: or the second word would be taken, answered with success, and never said to Stripe."""
    ledger = subscriber
    ledger.change("update credits.plans set stripe_price_ids = '{price_max}' where code = 'max'")
    requests = "update credits.stripe_requests"
    stories: list[tuple[Callable[[], Any], list[Callable[[], Any]]]] = [
        (
            partial(ledger.change_plan, "alpha", "pro"),
            [partial(ledger.change_plan, "alpha", "max"), partial(ledger.change_plan, "alpha", "basic")],
        ),
        (partial(ledger.cancel_plan, "alpha"), [partial(ledger.cancel_plan, "alpha", at="now")]),
    ]
    for first, others in stories:
        with ledger.conn.transaction(force_rollback=True):
            first()
            ledger.change(f"{requests} set state = 'sent', first_sent_at = run_at where state = 'queued'")
            for other in others:
                with ledger.unchanged(), refused(409, "plan_change_in_progress"):
                    other()
            with ledger.unchanged("stripe_requests", "subscription_cache"):
                first()
            ledger.change(f"{requests} set state = 'done' where state = 'sent'")
            others[0]()
            assert len(wanted(ledger)) == 1


def scheduled(status: str = "active", **more: Any) -> dict[str, Any]:
    """A schedule of Alpha's subscription: another plan when the period ends."""
    end = int((HALF + 28 * DAY).timestamp())
    return {
        "id": "sub_sched_1", "object": "subscription_schedule", "subscription": "sub_1", "status": status,
        "current_phase": {"start_date": 1, "end_date": end},
        "phases": [{"start_date": 1, "items": [{"price": "price_basic"}]},
                   {"start_date": end, "items": [{"price": "price_pro"}]}],
        **more,
    }  # fmt: skip


RELEASE: tuple[Any, ...] = ("release_plan", "post", "/v1/subscription_schedules/sub_sched_1/release", {})
CANCEL = ("cancel_plan", "post", SUBSCRIPTION, {"cancel_at_period_end": True})


@pytest.mark.parametrize("told", ["by both", "by the schedule alone"])
def test_a_schedule_is_let_go_before_the_end_is_announced(subscriber: Ledger, told: str) -> None:
    """Stripe refuses the end of a subscription that a schedule manages: the buyer would go on paying."""
    ledger = subscriber
    ledger.now += SECOND
    if told == "by both":
        ledger.tell("customer.subscription.updated", subscription(schedule="sub_sched_1"))
    ledger.tell("subscription_schedule.created", scheduled())
    assert state(ledger).pending_plan == "pro"
    for _ in range(2):
        assert ledger.cancel_plan("alpha").pending_plan is None
        assert wanted(ledger) == [RELEASE, CANCEL]
    (release,) = ledger.table("stripe_requests", "purpose = 'release_plan'")
    assert len(ledger.table("stripe_requests", "purpose <> 'retrieve'")) == 2, "to cancel again changes nothing"
    ledger.now += SECOND
    assert [row.path for row in ledger.claim_stripe_requests() if row.method == "post"] == [release.path]
    ledger.complete_stripe_request(release.request_id, 200, json.dumps(scheduled("released", subscription=None)))
    ledger.cancel_plan("alpha")
    assert wanted(ledger) == [CANCEL], "the schedule is gone already"


def answer_retrieve(ledger: Ledger) -> None:
    """Stripe tells how the subscription stands: as ever."""
    (asked,) = ledger.table("stripe_requests", "purpose = 'retrieve'")
    assert asked.ref == "subscription:sub_1"
    assert ledger.complete_stripe_request(asked.request_id, 200, json.dumps(subscription())).state == "done"


@pytest.mark.parametrize("status", [400, 402, 403])
@pytest.mark.parametrize("step", ["schedule_plan", "schedule_phases"])
def test_a_plan_that_stripe_refuses_to_schedule_is_pending_no_more(subscriber: Ledger, step: str, status: int) -> None:
    ledger = subscriber
    assert ledger.change_plan("alpha", "pro", at="period_end").pending_plan == "pro"
    ledger.now += SECOND
    if step == "schedule_phases":
        ledger.claim_stripe_requests()
        (first,) = ledger.table("stripe_requests", "purpose = 'schedule_plan'")
        single = scheduled(phases=[{"start_date": 1, "items": [{"price": "price_basic"}]}])
        ledger.complete_stripe_request(first.request_id, 200, json.dumps(single))
        assert state(ledger).pending_plan == "pro"
    (asked,) = ledger.table("stripe_requests", "purpose = %s", step)
    ledger.claim_stripe_requests()
    ledger.complete_stripe_request(asked.request_id, status, json.dumps({"error": {"type": "invalid_request_error"}}))
    ledger.now += SECOND
    answer_retrieve(ledger)
    assert (state(ledger).pending_plan, state(ledger).pending_at) == (None, None)


UNKNOWN: dict[str, Callable[[Ledger], Any]] = {
    "change_plan": lambda ledger: ledger.change_plan("alpha", "pro"),
    "schedule_plan": lambda ledger: ledger.change_plan("alpha", "pro", at="period_end"),
    "cancel_plan": lambda ledger: ledger.cancel_plan("alpha"),
}


@pytest.mark.parametrize("purpose", UNKNOWN)
def test_a_word_of_which_nobody_knows_what_came_is_not_in_the_way(subscriber: Ledger, purpose: str) -> None:
    """Or the same call is answered with success for ever, and nothing is said to Stripe."""
    ledger = subscriber
    UNKNOWN[purpose](ledger)
    (asked,) = ledger.table("stripe_requests", "purpose = %s", purpose)
    ledger.claim_stripe_requests()
    ledger.complete_stripe_request(asked.request_id, None, None)
    ledger.now += 24 * HOUR
    ledger.claim_stripe_requests(100)
    (asked,) = ledger.table("stripe_requests", "purpose = %s", purpose)
    assert (asked.state, asked.error_type) == ("failed", "outcome_unknown")
    answer_retrieve(ledger)
    assert state(ledger).pending_plan is None
    UNKNOWN[purpose](ledger)
    (again,) = ledger.table("stripe_requests", "purpose = %s and state = 'queued'", purpose)
    assert again.params == asked.params


def test_what_was_withdrawn_is_no_refusal_of_stripe_and_not_made_again(subscriber: Ledger) -> None:
    ledger = subscriber
    ledger.cancel_plan("alpha")
    ledger.resume_plan("alpha")
    (cancel,) = ledger.table("stripe_requests", "purpose = 'cancel_plan'")
    assert (cancel.state, cancel.error_type) == ("failed", "withdrawn")
    (health,) = [row for row in ledger.health() if row.name == "requests_succeed"]
    assert (health.status, health.value) == ("ok", 0)
    assert [row.purpose for row in ledger.query("select * from credits.report_stripe_requests")] == ["resume_plan"]
    with ledger.unchanged(), refused(409, "request_not_failed"):
        ledger.retry_stripe_request(cancel.request_id)


def test_what_is_planned_for_after_the_end_is_not_asked_for(subscriber: Ledger) -> None:
    ledger = subscriber
    for at, last in (("period_end", CANCEL), ("now", ("cancel_plan", "delete", SUBSCRIPTION, {}))):
        with ledger.conn.transaction(force_rollback=True):
            ledger.change_plan("alpha", "pro", at="period_end")
            assert ledger.cancel_plan("alpha", at=at).pending_plan is None
            assert wanted(ledger) == [last]
    ledger.now += SECOND
    ledger.change_plan("alpha", "pro", at="period_end")
    ledger.claim_stripe_requests()
    with ledger.unchanged(), refused(409, "plan_change_in_progress"):
        ledger.cancel_plan("alpha")
    (asked,) = ledger.table("stripe_requests", "purpose = 'schedule_plan'")
    ledger.complete_stripe_request(asked.request_id, 200, json.dumps(scheduled()))
    ledger.cancel_plan("alpha")
    assert wanted(ledger) == [RELEASE, CANCEL]


def test_a_plan_for_the_end_of_the_period_that_stripe_is_being_told_stands(subscriber: Ledger) -> None:
    ledger = subscriber
    ledger.change("update credits.plans set stripe_price_ids = '{price_max}' where code = 'max'")
    ledger.now += SECOND
    ledger.tell("subscription_schedule.created", scheduled())
    ledger.change_plan("alpha", "pro", at="period_end")
    ledger.claim_stripe_requests()
    with ledger.unchanged(), refused(409, "plan_change_in_progress"):
        ledger.change_plan("alpha", "max", at="period_end")
    with ledger.unchanged("stripe_requests", "subscription_cache"):
        ledger.change_plan("alpha", "pro", at="period_end")


@pytest.mark.parametrize(
    ("first", "again"),
    [
        (lambda ledger: ledger.change_plan("alpha", "pro"), lambda ledger: ledger.change_plan("alpha", "pro")),
        (
            lambda ledger: ledger.change_plan("alpha", "pro", at="period_end"),
            lambda ledger: ledger.cancel_plan("alpha"),
        ),
        (lambda ledger: ledger.cancel_plan("alpha"), lambda ledger: ledger.cancel_plan("alpha", at="now")),
        (lambda ledger: ledger.resume_plan("alpha"), lambda ledger: ledger.resume_plan("alpha")),
    ],
    ids=["change", "schedule", "cancel", "resume"],
)
def test_a_word_while_the_answer_to_another_is_brought_back_waits_for_nobody(
    database: Database, first: Callable[[Ledger], Any], again: Callable[[Ledger], Any]
) -> None:
    """The worker holds the request and wants the account, the caller the account: they must not wait for each other."""
    with committed(database) as ledger, database.connect("credits_owner") as worker:
        prepare(ledger)
        ledger.open("alpha")
        ledger.tell("customer.subscription.created", subscription())
        first(ledger)
        (request,) = ledger.table("stripe_requests", "purpose <> 'retrieve'")
        ledger.claim_stripe_requests()
        worker.execute("select from credits.stripe_requests where request_id = %s for update", [request.request_id])
        ledger.conn.execute("set lock_timeout = '5s'")
        with suppress(CreditsError):  # 409 plan_change_in_progress
            again(ledger)


@pytest.mark.parametrize("listed", ["prices", "ids"])
def test_who_changes_stays_with_the_currency_and_interval_that_is_paid(subscriber: Ledger, listed: str) -> None:
    """Stripe takes no other currency of a subscription, and nobody has asked for another interval."""
    ledger = subscriber
    sold = [("usd", "month"), ("usd", "year"), ("eur", "month"), ("eur", "year")]
    for rank, (currency, every) in enumerate(sold):
        name = f"price_{currency}_{every}"
        shown = {"id": name, "currency": currency, "unit_amount": 100, "active": True, "recurring": {"interval": every}}
        ledger.tell("price.created", {"object": "price", **shown})
        if listed == "prices":
            ledger.change(
                "insert into credits.plan_prices values ('pro', %s, %s, 100, %s, %s)", currency, every, rank, name
            )
        else:
            ledger.change(
                "update credits.plans set stripe_price_ids = stripe_price_ids || %s::text where code = 'pro'", name
            )
    others = {"prices": ("price_usd_month", "price_usd_month"), "ids": ("price_usd_year", "price_eur_year")}[listed]
    pays = [*sold, ("usd", "week"), ("gbp", "month")]
    chosen = []
    for currency, every in pays:
        ledger.now += SECOND
        with ledger.conn.transaction(force_rollback=True):
            now = {"id": "price_basic", "currency": currency, "unit_amount": 5, "recurring": {"interval": every}}
            ledger.tell("price.updated", {"object": "price", **now})
            ledger.change_plan("alpha", "pro")
            (asked,) = ledger.table("stripe_requests", "purpose = 'change_plan'")
            chosen.append(asked.params["items"][0]["price"])
    assert dict(zip(pays, chosen, strict=True)) == dict(
        zip(pays, [*(f"price_{currency}_{every}" for currency, every in sold), *others], strict=True)
    )


def test_who_stays_on_a_plan_that_stripe_sells_no_more_withdraws_what_is_pending(subscriber: Ledger) -> None:
    subscriber.change_plan("alpha", "pro", at="period_end")
    subscriber.change("update credits.plans set stripe_price_ids = '{}', active = false where code = 'basic'")
    assert subscriber.change_plan("alpha", "basic", at="period_end").pending_plan is None
    assert wanted(subscriber) == []


def test_a_plan_that_stripe_does_not_sell_cannot_be_asked_for(subscriber: Ledger) -> None:
    for at in ("now", "period_end"):
        with subscriber.unchanged(), refused(404, "price_not_found", plan="max"):
            subscriber.change_plan("alpha", "max", at=at)


# Accounts that may not -----------------------------------------------------------------------------------------------


def test_a_frozen_account_keeps_its_months(ledger: Ledger) -> None:
    ledger.open_account("alpha", plan="basic")
    ledger.freeze_account("alpha")
    ledger.now = FEBRUARY
    assert ledger.available() == 300
    ledger.change_plan("alpha", "pro")
    assert ledger.available() == 900
    with refused(423, "account_frozen"):
        ledger.use(1)
    ledger.unfreeze_account("alpha")
    ledger.use(900)
    assert_sound(ledger)


def test_a_closed_account_gets_no_more_months_and_what_was_open_still_ends(ledger: Ledger) -> None:
    ledger.open_account("alpha", plan="basic")
    ledger.reserve("alpha", 100, "r", ttl=HOUR)
    ledger.reserve("alpha", 50, "s", ttl=DAY)
    ledger.set_status("closed")
    with refused(423, "account_closed"):
        ledger.change_plan("alpha", "pro")
    assert ledger.settle("alpha", "r", 100).charged == 100
    ledger.now = MONTHS[1]
    assert ledger.available() == 0
    ledger.release("alpha", "s")
    assert ledger.cancel_plan("alpha", at="now").state == "canceled"
    assert_sound(ledger)


# Together ------------------------------------------------------------------------------------------------------------


def test_threads_that_want_one_plan_get_it_once(database: Database) -> None:
    with committed(database) as ledger:
        prepare(ledger)
        for account_id in ("alpha", "beta"):
            ledger.open(account_id)
        ledger.change_plan("beta", "zero")
        ledger.change("update credits.subscriptions set anchor_at = anchor_at")
        jobs = [partial(Ledger.change_plan, account_id=name, plan="pro") for name in ("alpha", "beta")] * 8
        assert {row.plan for row in together(database, jobs)} == {"pro"}
        assert ledger.available("alpha") == 900
        assert 899 < ledger.available("beta") <= 900
        assert len(ledger.table("subscriptions")) == 2
        assert_sound(ledger)


def test_threads_that_go_up_and_down_refill_nothing(database: Database) -> None:
    verbs: list[Callable[[Ledger], Any]] = [
        *(partial(Ledger.change_plan, account_id="alpha", plan=plan) for plan in ("basic", "pro", "zero") * 4),
        *(partial(Ledger.change_plan, account_id="alpha", plan="basic", at="period_end") for _ in range(2)),
        *(partial(Ledger.cancel_plan, account_id="alpha") for _ in range(2)),
        *(partial(Ledger.resume_plan, account_id="alpha") for _ in range(2)),
        *(partial(Ledger.spend, account_id="alpha", amount=10, key=f"k{n}") for n in range(4)),
    ]
    with committed(database) as ledger:
        prepare(ledger)
        ledger.open_account("alpha", plan="basic")
        random.Random(7).shuffle(verbs)
        results = together(database, verbs)
        assert not [one for one in results if isinstance(one, CreditsError)]
        assert 858 < ledger.available() <= 860
        assert_sound(ledger)


def test_opening_with_a_plan_again_is_a_replay(ledger: Ledger) -> None:
    first = ledger.open_account("alpha", plan="basic")
    ledger.change_plan("alpha", "pro")
    ledger.now = HALF
    again = ledger.open_account("alpha", plan="basic")
    assert (first.replayed, again.replayed, again.plan) == (False, True, "pro")
    assert ledger.available() == 900
    assert len(ledger.table("subscriptions")) == 1


def test_three_years_of_one_account(ledger: Ledger) -> None:
    dice = random.Random(2030)
    plans = {"basic": 300, "pro": 900, "max": 2000, "zero": 0}
    plan, pending, left, bought = "basic", "", 300, 0
    ledger.open_account("alpha", plan=plan)
    for number in range(1, 37):
        start, end = ledger.now, nth_month(NOON, number, "UTC")
        for day in sorted(dice.sample(range(1, 27), 4)):
            ledger.now = start + timedelta(days=day)
            match dice.randrange(4):
                case 0:
                    bought += 40
                    ledger.grant(40, kind="purchase")
                case 1:
                    pending = dice.choice(list(plans))
                    ledger.change_plan("alpha", pending, at="period_end")
                case _:
                    amount = dice.randrange(1, 400)
                    if amount > left + bought:
                        with refused(402, "insufficient_credits", available=left + bought):
                            ledger.use(amount)
                    else:
                        ledger.use(amount)
                        left, bought = max(0, left - amount), bought - max(0, amount - left)
            assert ledger.available() == left + bought
        ledger.now = end
        plan, pending = pending or plan, ""
        left = plans[plan]
        assert (ledger.available(), state(ledger).plan) == (left + bought, plan)
        if number % 6 == 0:
            assert_sound(ledger)
