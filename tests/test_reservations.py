"""Reservations: held, captured, settled under each policy, released, extended, run out."""

from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any

import pytest
from ledger_support import DAY, HOUR, MINUTE, NOON, TICK, Ledger, assert_sound, refused, same
from psycopg import Connection


@pytest.fixture
def ledger(conn: Connection[Any]) -> Ledger:
    ledger = Ledger(conn)
    ledger.open("alpha", 100)
    return ledger


def run_out(ledger: Ledger) -> None:
    """Go to the deadline of a reservation with the default time."""
    ledger.now += 15 * MINUTE


def test_a_reservation_holds_credits_without_an_entry(ledger: Ledger) -> None:
    result = ledger.reserve("alpha", 30, "r")
    assert (result.amount, result.available, result.expires_at) == (30, 70, NOON + 15 * MINUTE)
    assert ledger.sums() == (70, 30, 100, 0)
    assert ledger.kinds() == [("grant", 100)]
    with refused(402, "insufficient_credits", required=71, available=70):
        ledger.use(71)


def test_reserve_is_all_or_nothing(ledger: Ledger) -> None:
    with ledger.unchanged(), refused(402, "insufficient_credits", required=101, available=100):
        ledger.reserve("alpha", 101, "r")
    ledger.reserve("alpha", 100, "r")


@pytest.mark.parametrize(("amount", "least", "held"), [(150, 50, 100), (150, 100, 100), (80, 50, 80), (80, 90, 80)])
def test_with_min_amount_what_is_there_is_held(ledger: Ledger, amount: int, least: int, held: int) -> None:
    assert ledger.reserve("alpha", amount, "r", min_amount=least).amount == held
    assert ledger.sums() == (100 - held, held, 100, 0)


def test_below_min_amount_nothing_is_held(ledger: Ledger) -> None:
    with ledger.unchanged(), refused(402, "insufficient_credits", required=101, available=100):
        ledger.reserve("alpha", 150, "r", min_amount=101)


def test_a_refused_reserve_leaves_no_trace_and_passes_after_a_top_up(ledger: Ledger) -> None:
    with refused(402, "insufficient_credits"):
        ledger.reserve("alpha", 150, "r")
    with refused(404, "reservation_not_found", reservation_id="r"):
        ledger.get_reservation("alpha", "r")
    ledger.grant(50)
    assert not ledger.reserve("alpha", 150, "r").replayed


@pytest.mark.parametrize("then", ["nothing", "capture", "settle", "release", "extend", "run out", "freeze"])
def test_reserve_replays_its_first_result_whatever_came_after(ledger: Ledger, then: str) -> None:
    arguments = {"min_amount": 10, "ttl": "15 minutes", "subject": "book:1", "metadata": {"n": 1}}
    first = ledger.reserve("alpha", 50, "r", **arguments)
    match then:
        case "capture":
            ledger.capture("alpha", "r", 5, key="c")
        case "settle":
            ledger.settle("alpha", "r", 80)
        case "release":
            ledger.release("alpha", "r")
        case "extend":
            ledger.extend("alpha", "r", ttl="5 hours")
        case "run out":
            run_out(ledger)
        case "freeze":
            ledger.freeze_account("alpha")
    assert same(first, ledger.reserve("alpha", "50.00", "r", **{**arguments, "min_amount": "10.0"}))


@pytest.mark.parametrize(
    "change",
    [{"amount": 6}, {"ttl": "1 hour"}, {"min_amount": 1}, {"description": "x"}, {"subject": "x"}, {"member_id": "x"},
     {"capability": "x"}, {"metadata": {"x": 1}}],
    ids=str,
)  # fmt: skip
def test_reserve_refuses_its_id_with_other_arguments(ledger: Ledger, change: dict[str, Any]) -> None:
    ledger.reserve("alpha", 5, "r")
    with ledger.unchanged(), refused(409, "idempotency_conflict", operation="reserve", key="r"):
        ledger.reserve("alpha", **{"amount": 5, "reservation_id": "r", **change})


def test_captures_book_parts_and_the_balance_is_true_all_along(ledger: Ledger) -> None:
    ledger.reserve("alpha", 30, "r", subject="job:7")
    for n in range(1, 4):
        result = ledger.capture("alpha", "r", "7.5", key=f"c{n}")
        assert (result.amount, result.balance, result.available) == (Decimal("-7.5"), 100 - n * Decimal("7.5"), 70)
        assert ledger.sums() == (70, 30 - n * Decimal("7.5"), 100 - n * Decimal("7.5"), 0)
    with refused(402, "insufficient_credits", required=8, available=7.5):
        ledger.capture("alpha", "r", 8, key="c4")
    assert ledger.settle("alpha", "r", 2).released == Decimal("5.5")
    assert {row.subject for row in ledger.history("alpha", kinds=["capture", "settle"])} == {"job:7"}
    assert ledger.sums() == (Decimal("75.5"), 0, Decimal("75.5"), 0)


def test_a_reservation_captured_whole_settles_at_zero(ledger: Ledger) -> None:
    ledger.reserve("alpha", 30, "r")
    ledger.capture("alpha", "r", 30, key="c")
    result = ledger.settle("alpha", "r", 0)
    assert (result.status, result.charged, result.released, result.entry_seq) == ("settled", 0, 0, None)
    assert ledger.sums() == (70, 0, 70, 0)


def test_a_capture_replays_and_refuses_other_arguments(ledger: Ledger) -> None:
    for name in ("r", "q"):
        ledger.reserve("alpha", 30, name)
    first = ledger.capture("alpha", "r", 5, key="c")
    ledger.settle("alpha", "r", 5)
    assert same(first, ledger.capture("alpha", "r", "5.0", key="c"))
    for name, amount in (("r", 6), ("q", 5)):
        with refused(409, "idempotency_conflict", operation="capture", key="c"):
            ledger.capture("alpha", name, amount, key="c")


@pytest.mark.parametrize("policy", ["cap", "overflow", "reject", None])
@pytest.mark.parametrize("actual", [0, "12.5", 30])
def test_settling_within_the_hold_returns_the_rest(ledger: Ledger, actual: Any, policy: str | None) -> None:
    ledger.reserve("alpha", 30, "r")
    result = ledger.settle("alpha", "r", actual, on_overage=policy)
    actual = Decimal(actual)
    assert (result.status, result.actual, result.charged, result.uncollected) == ("settled", actual, actual, 0)
    assert (result.released, result.late, result.balance, result.available) == (
        30 - actual,
        False,
        100 - actual,
        100 - actual,
    )
    assert ledger.sums() == (100 - actual, 0, 100 - actual, 0)


@pytest.mark.parametrize("hours", [0, 1], ids=["in time", "late"])
@pytest.mark.parametrize(
    ("policy", "limit", "actual", "charged", "sums"),
    [
        ("cap", 50, 60, 60, (40, 0, 40, 0)),
        ("cap", 50, 130, 100, (0, 0, 0, 0)),
        ("overflow", 50, 100, 100, (0, 0, 0, 0)),
        ("overflow", 50, 130, 130, (-30, 0, 0, 30)),
        ("overflow", 50, 170, 150, (-50, 0, 0, 50)),
        ("overflow", 0, 130, 100, (0, 0, 0, 0)),
        ("reject", 50, 100, 100, (0, 0, 0, 0)),
    ],
)
def test_above_the_hold_the_policy_decides(
    ledger: Ledger, policy: str, limit: int, actual: int, charged: int, sums: tuple[int, ...], hours: int
) -> None:
    ledger.set_debt_limit("alpha", limit)
    ledger.reserve("alpha", 30, "r")
    ledger.now += hours * HOUR
    result = ledger.settle("alpha", "r", actual, on_overage=policy)
    assert (result.actual, result.charged, result.uncollected) == (actual, charged, actual - charged)
    assert (result.status, result.late, result.released) == ("settled", bool(hours), 0)
    assert result.available == sums[0]
    assert ledger.sums() == sums
    assert ledger.get_reservation("alpha", "r")[: len(result)] == result
    assert same(result, ledger.settle("alpha", "r", actual, on_overage=policy))
    assert_sound(ledger)


@pytest.mark.parametrize("hours", [0, 1], ids=["in time", "late"])
def test_reject_leaves_everything_as_it_was(ledger: Ledger, hours: int) -> None:
    ledger.reserve("alpha", 30, "r")
    ledger.now += hours * HOUR
    with ledger.unchanged(), refused(402, "insufficient_credits", required=101, available=100):
        ledger.settle("alpha", "r", 101, on_overage="reject")
    ledger.grant(1)
    assert ledger.settle("alpha", "r", 101, on_overage="reject").charged == 101


def test_other_holds_are_not_touched_by_an_overage(ledger: Ledger) -> None:
    ledger.reserve("alpha", 30, "r")
    ledger.reserve("alpha", 50, "q")
    assert ledger.settle("alpha", "r", 80).charged == 50
    assert ledger.sums() == (0, 50, 50, 0)
    assert ledger.settle("alpha", "q", 50).charged == 50


def test_with_debt_an_overage_takes_only_the_hold(ledger: Ledger) -> None:
    ledger.reserve("alpha", 30, "r")
    lot = ledger.table("grants")[0]
    ledger.revoke_grant("alpha", lot.grant_id, key="v")
    assert ledger.sums() == (-30, 30, 30, 30)
    result = ledger.settle("alpha", "r", 50)
    assert (result.charged, result.uncollected, result.available) == (30, 20, -30)


def test_overflow_counts_the_debt_that_is_there(ledger: Ledger) -> None:
    ledger.set_debt_limit("alpha", 50)
    for name, amount in (("a", 90), ("b", 5), ("c", 5)):
        ledger.reserve("alpha", amount, name)
    for name, actual, charged in (("a", 130, 130), ("b", 20, 15), ("c", 20, 5)):
        assert ledger.settle("alpha", name, actual, on_overage="overflow").charged == charged
    assert ledger.sums() == (-50, 0, 0, 50)
    assert_sound(ledger)


def test_a_lower_debt_limit_leaves_the_debt_and_allows_no_more(ledger: Ledger) -> None:
    assert ledger.set_debt_limit("alpha", "50.0") == 50
    for name in ("a", "b"):
        ledger.reserve("alpha", 50, name)
    ledger.settle("alpha", "a", 80, on_overage="overflow")
    ledger.set_debt_limit("alpha", 10)
    assert ledger.settle("alpha", "b", 80, on_overage="overflow").charged == 50
    assert ledger.sums() == (-30, 0, 0, 30)


def test_an_overdraft_is_an_entry_of_its_own(ledger: Ledger) -> None:
    ledger.set_debt_limit("alpha", 50)
    ledger.reserve("alpha", 100, "r")
    ledger.settle("alpha", "r", 120, on_overage="overflow")
    assert ledger.kinds()[-2:] == [("settle", -100), ("overdraft", 20)]
    ledger.grant(30)
    assert ledger.kinds()[-1] == ("debt_paid", -20)


def test_settle_refuses_other_arguments(ledger: Ledger) -> None:
    ledger.reserve("alpha", 30, "r")
    ledger.settle("alpha", "r", 10, metadata={"n": 1})
    changes: list[dict[str, Any]] = [
        {"amount": 11},
        {"on_overage": "reject"},
        {"metadata": {"n": 2}},
        {"metadata": None},
    ]
    for change in changes:
        with refused(409, "idempotency_conflict", operation="settle", key="r"):
            ledger.settle("alpha", "r", **{"amount": 10, "metadata": {"n": 1}, **change})


def test_release_returns_all_and_replays(ledger: Ledger) -> None:
    ledger.reserve("alpha", 30, "r")
    ledger.capture("alpha", "r", 10, key="c")
    first = ledger.release("alpha", "r", reason="cancelled")
    assert (first.status, first.released, first.available, first.actual) == ("released", 20, 90, None)
    ledger.use(50)
    assert same(first, ledger.release("alpha", "r", reason="cancelled"))
    with refused(409, "idempotency_conflict", operation="release", key="r"):
        ledger.release("alpha", "r", reason="other")
    assert ledger.kinds() == [("grant", 100), ("capture", -10), ("spend", -50)]


@pytest.mark.parametrize("closed", ["settled", "released"])
def test_a_closed_reservation_refuses_every_other_verb(ledger: Ledger, closed: str) -> None:
    ledger.reserve("alpha", 30, "r")
    if closed == "settled":
        ledger.settle("alpha", "r", 10)
    else:
        ledger.release("alpha", "r")
    verbs: list[Callable[[], Any]] = [
        lambda: ledger.capture("alpha", "r", 1, key="c"),
        lambda: ledger.extend("alpha", "r"),
    ]
    verbs.append(
        (lambda: ledger.release("alpha", "r")) if closed == "settled" else (lambda: ledger.settle("alpha", "r", 1))
    )
    for verb in verbs:
        with ledger.unchanged(), refused(409, "reservation_closed", reservation_id="r", status=closed):
            verb()


def test_a_reservation_ends_at_the_very_instant_of_its_deadline(ledger: Ledger) -> None:
    ledger.reserve("alpha", 30, "r", ttl="1 hour")
    ledger.now = NOON + HOUR - TICK
    assert (ledger.available(), ledger.get_reservation("alpha", "r").status) == (70, "open")
    ledger.capture("alpha", "r", 5, key="c")
    ledger.now = NOON + HOUR
    with ledger.unchanged():
        assert (ledger.available(), ledger.get_reservation("alpha", "r").status) == (95, "expired")
    ledger.use(95)


def test_a_reservation_says_what_it_holds(ledger: Ledger) -> None:
    about = {"subject": "book:1", "capability": "chapter", "description": "a chapter", "metadata": {"n": 1}}
    ledger.reserve("alpha", 30, "r", ttl="1 hour", **about)
    ledger.capture("alpha", "r", 10, key="c")
    row = ledger.get_reservation("alpha", "r")
    assert (row.status, row.amount, row.captured, row.held) == ("open", 30, 10, 20)
    assert (row.created_at, row.expires_at, row.closed_at) == (NOON, NOON + HOUR, None)
    assert {name: getattr(row, name) for name in about} == about
    ledger.settle("alpha", "r", 5)
    row = ledger.get_reservation("alpha", "r")
    assert (row.status, row.charged, row.released, row.held, row.closed_at) == ("settled", 5, 15, 0, NOON)


def test_open_reservations_are_listed_the_first_to_run_out_first(ledger: Ledger) -> None:
    for name, minutes in [("late", 9), ("closed", 4), ("soon", 1), ("twin", 5), ("same", 5)]:
        ledger.reserve("alpha", 10, name, ttl=f"{minutes} minutes")
    ledger.release("alpha", "closed")
    ledger.capture("alpha", "twin", 3, key="c")
    rows = ledger.list_reservations("alpha")
    assert [row.reservation_id for row in rows] == ["soon", "same", "twin", "late"]
    assert sum(row.held for row in rows) == ledger.get_balance("alpha").held == 37
    pages, after = [], None
    while page := ledger.list_reservations("alpha", after=after, max_rows=2):
        pages.append([row.reservation_id for row in page])
        after = page[-1].expires_at
    assert pages == [["soon", "same", "twin"], ["late"]]
    ledger.now = rows[0].expires_at
    assert [row.reservation_id for row in ledger.list_reservations("alpha")] == ["same", "twin", "late"]
    assert sum(row.held for row in ledger.list_reservations("alpha")) == ledger.get_balance("alpha").held


def test_a_run_out_reservation_refuses_captures_and_more_time(ledger: Ledger) -> None:
    ledger.reserve("alpha", 30, "r")
    run_out(ledger)
    verbs: list[Callable[[], Any]] = [
        lambda: ledger.capture("alpha", "r", 1, key="c"),
        lambda: ledger.extend("alpha", "r"),
    ]
    for verb in verbs:
        with refused(410, "reservation_expired", reservation_id="r"):
            verb()


def test_releasing_a_run_out_reservation_answers_expired(ledger: Ledger) -> None:
    ledger.reserve("alpha", 30, "r")
    ledger.capture("alpha", "r", 10, key="c")
    run_out(ledger)
    for _ in range(2):
        result = ledger.release("alpha", "r")
        assert (result.status, result.released) == ("expired", 20)
    assert ledger.get_reservation("alpha", "r").status == "expired"


def test_a_late_settle_after_captures_charges_its_own_amount_only(ledger: Ledger) -> None:
    ledger.reserve("alpha", 30, "r")
    ledger.capture("alpha", "r", 10, key="c")
    run_out(ledger)
    result = ledger.settle("alpha", "r", 15)
    assert (result.charged, result.late, result.balance) == (15, True, 75)


def test_extend_moves_the_deadline_and_never_back(ledger: Ledger) -> None:
    ledger.reserve("alpha", 30, "r")
    assert ledger.extend("alpha", "r", ttl="1 hour").expires_at == NOON + HOUR
    assert ledger.extend("alpha", "r", ttl="1 minute").expires_at == NOON + HOUR
    ledger.now = NOON + 59 * MINUTE
    result = ledger.extend("alpha", "r")
    assert (result.expires_at, result.held, result.available) == (NOON + 74 * MINUTE, 30, 70)
    ledger.now = NOON + 74 * MINUTE - TICK
    assert ledger.available() == 70
    ledger.now += TICK
    assert ledger.available() == 100


def test_extend_ends_a_day_after_the_reserve(ledger: Ledger) -> None:
    ledger.reserve("alpha", 30, "r", ttl="24 hours")
    ledger.now = NOON + 23 * HOUR
    for ttl in ("24 hours", "25 hours", "100000 years"):
        assert ledger.extend("alpha", "r", ttl=ttl).expires_at == NOON + DAY
    ledger.now = NOON + DAY
    with refused(410, "reservation_expired"):
        ledger.extend("alpha", "r")


def test_a_day_is_24_hours_in_every_time_zone(ledger: Ledger) -> None:
    ledger.conn.execute("select set_config('timezone', 'Europe/Berlin', true)")
    for saturday in (datetime(2030, 3, 30, 12, tzinfo=UTC), datetime(2030, 10, 26, 12, tzinfo=UTC)):
        ledger.now = saturday  # the clocks are changed on the Sunday
        first = ledger.reserve("alpha", 5, str(saturday), ttl="1 day")
        assert first.expires_at == saturday + DAY
        assert ledger.extend("alpha", str(saturday), ttl="1 day").expires_at == saturday + DAY
        assert same(first, ledger.reserve("alpha", 5, str(saturday), ttl="24 hours"))
        assert ledger.reserve("alpha", 5, f"{saturday} short", ttl="1 day -23:50").expires_at == saturday + 10 * MINUTE


def test_the_ceiling_is_a_setting(ledger: Ledger) -> None:
    ledger.change("update credits.settings set value = '\"2 hours\"' where name = 'reservation_max_age'")
    with refused(400, "invalid_request", argument="ttl"):
        ledger.reserve("alpha", 1, "q", ttl="3 hours")
    ledger.reserve("alpha", 30, "r")
    ledger.now = NOON + 10 * MINUTE
    assert ledger.extend("alpha", "r", ttl="2 hours").expires_at == NOON + 2 * HOUR


def test_work_in_flight_goes_on_while_the_account_is_frozen(ledger: Ledger) -> None:
    for name in ("a", "b", "c"):
        ledger.reserve("alpha", 10, name)
    ledger.freeze_account("alpha")
    with refused(423, "account_frozen", account_id="alpha"):
        ledger.reserve("alpha", 1, "new")
    ledger.extend("alpha", "a", ttl="1 hour")
    ledger.capture("alpha", "a", 5, key="c")
    assert ledger.settle("alpha", "a", 5).charged == 5
    assert ledger.settle("alpha", "b", 15).charged == 15
    assert ledger.release("alpha", "c").released == 10


def test_a_closed_account_refuses_new_reservations(ledger: Ledger) -> None:
    ledger.set_status("closed")
    with refused(423, "account_closed"):
        ledger.reserve("alpha", 1, "r")


def test_a_hold_pins_its_slices_in_the_order_of_consumption(ledger: Ledger) -> None:
    plan = ledger.grant(20, kind="plan", expires_at=NOON + DAY).grant_id
    ledger.reserve("alpha", 50, "r", capability="image")
    ledger.capture("alpha", "r", 25, key="c")
    first = ledger.history("alpha")[0].grants
    assert [slice_["amount"] for slice_ in first] == [20, 5]
    assert first[0]["grant_id"] == plan
    ledger.settle("alpha", "r", 5)
    assert ledger.history("alpha")[0].grants == [{"grant_id": first[1]["grant_id"], "amount": 5}]
    assert ledger.sums() == (90, 0, 90, 0)


def test_scoped_credits_are_held_for_their_capability(ledger: Ledger) -> None:
    ledger.grant(40, kind="plan", scope=["image"])
    with refused(402, "insufficient_credits", required=140, available=100):
        ledger.reserve("alpha", 140, "r", capability="voice")
    ledger.reserve("alpha", 135, "r", capability="image")
    assert ledger.settle("alpha", "r", 150).charged == 140
    assert ledger.sums() == (0, 0, 0, 0)


def test_reservations_of_two_accounts_may_share_an_id(ledger: Ledger) -> None:
    ledger.open("beta", 50)
    ledger.reserve("alpha", 30, "r")
    ledger.reserve("beta", 20, "r")
    assert ledger.settle("beta", "r", 20).charged == 20
    assert ledger.get_reservation("alpha", "r").status == "open"


def test_a_long_tail_of_settled_reservations_hides_no_open_one(ledger: Ledger) -> None:
    ledger.reserve("alpha", 30, "open", ttl="10 hours")
    for n in range(230):
        ledger.reserve("alpha", 1, f"r{n}", ttl=timedelta(minutes=20 + n))
        ledger.settle("alpha", f"r{n}", 0)
    for hours in (1, 3, 5):
        ledger.now = NOON + hours * HOUR
        ledger.book()
        assert ledger.available() == 70
    ledger.now = NOON + 10 * HOUR
    assert ledger.available() == 100
    ledger.book()
    assert ledger.sums() == (100, 0, 100, 0)
    assert ledger.table("reservations", "status = 'open'") == []
