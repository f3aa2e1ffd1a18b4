"""Uses of capabilities from authorize_usage to settle_usage: prices pinned, charged once, reported."""

from collections.abc import Callable
from datetime import timedelta
from decimal import Decimal
from functools import partial
from typing import Any

import pytest
from client import CreditsError
from ledger_support import (
    DAY,
    HOUR,
    MINUTE,
    NOON,
    TICK,
    Ledger,
    assert_sound,
    committed,
    refused,
    same,
    together,
)
from psycopg import Connection
from psycopg.types.json import Jsonb
from servers import Database

Json = dict[str, Any]
CATALOG: Json = {
    "capabilities": {
        "chapter": {"name": "Chapter", "unit": "words"},
        "outline": {"name": "Outline"},
        "chat": {"name": "Chat", "unit": "input_tokens"},
        "search": {"name": "Search"},
    },
    "quality_levels": {
        "good": {"name": "Good", "display_order": 1},
        "best": {"name": "Best", "display_order": 2},
    },
    "models": {"small": {"name": "Small"}, "large": {"name": "Large"}},
    "plans": {
        "team": {
            "name": "Team",
            "capabilities": {
                "chapter": {"qualities": {"good": ["small"], "best": ["large", "small"]}},
                "outline": {},
                "chat": {},
                "search": {"limits": [{"calls": 2, "per": "day"}]},
            },
        }
    },
    "rates": [
        {"capability": "chapter", "price": {"credits": 1, "block": 10, "qualities": {"best": 2}}},
        {"capability": "outline", "price": 50},
        {
            "capability": "chat",
            "price": {
                "lines": [
                    {"unit": "input_tokens", "credits": 3, "per": 1000},
                    {"unit": "output_tokens", "credits": 15, "per": 1000},
                ],
                "minimum": 1,
            },
        },
        {"capability": "search", "price": 0},
    ],
}


def apply(ledger: Ledger, catalog: Json) -> None:
    """Put a catalogue in force."""
    ledger.rows("apply_catalog", catalog=Jsonb(catalog))


@pytest.fixture
def ledger(conn: Connection[Any]) -> Ledger:
    ledger = Ledger(conn)
    apply(ledger, CATALOG)
    ledger.open_account("alpha", plan="team")
    ledger.grant(1000)
    return ledger


def write(ledger: Ledger, words: Any = 1000, **more: Any) -> Any:
    """Authorize a chapter under the id u."""
    return ledger.authorize_usage("alpha", "chapter", words, **{"usage_id": "u", **more})


def test_a_use_is_priced_held_and_charged_for_what_it_used(ledger: Ledger) -> None:
    usage = write(ledger, subject="book:42", quality="best")
    assert (usage.status, usage.quality, usage.model, usage.amount) == ("open", "best", "large", 200)
    assert (usage.available, usage.expires_at) == (800, NOON + 15 * MINUTE)
    assert ledger.sums() == (800, 200, 1000, 0)
    settled = ledger.settle_usage("alpha", "u", 995)
    assert (settled.status, settled.units, settled.actual, settled.charged, settled.released) == (
        "settled",
        995,
        200,
        200,
        0,
    )
    settled = ledger.history("alpha")[0]
    assert (settled.amount, settled.subject, settled.capability) == (-200, "book:42", "chapter")
    assert_sound(ledger)


def test_a_quote_is_the_price_that_is_charged(ledger: Ledger) -> None:
    for words in (1, 9, 10, 11, 999, 1000, 1001):
        quote = ledger.quote("alpha", "chapter", words)
        usage = write(ledger, words, usage_id=f"u{words}")
        settled = ledger.settle_usage("alpha", f"u{words}", words)
        assert quote.amount == usage.amount == settled.charged == -(-words // 10)
        assert quote.explanation == settled.explanation
        assert (quote.rate_id, quote.quality, quote.model) == (usage.rate_id, usage.quality, usage.model)


def test_a_quote_explains_itself(ledger: Ledger) -> None:
    quote = ledger.quote("alpha", "chapter", 1005, quality="best")
    (line,) = quote.explanation["lines"]
    assert (line["units"], line["billed"], line["multiplier"], line["amount"]) == (1005, 1010, 2, 202)
    assert (quote.units, quote.unit_counts, quote.amount) == (1005, {"words": 1005}, 202)


def test_input_and_output_are_counted_apart(ledger: Ledger) -> None:
    counts = Jsonb({"input_tokens": 1200, "output_tokens": 300})
    assert ledger.quote("alpha", "chat", unit_counts=counts).amount == Decimal("8.1")
    assert ledger.quote("alpha", "chat", 1200).amount == Decimal("3.6")
    assert ledger.quote("alpha", "chat", 1).amount == 1
    ledger.authorize_usage("alpha", "chat", usage_id="c", unit_counts=counts)
    settled = ledger.settle_usage("alpha", "c", unit_counts=Jsonb({"input_tokens": 1200, "output_tokens": 100}))
    assert (settled.charged, settled.released) == (Decimal("5.1"), 3)
    assert settled.unit_counts == {"input_tokens": 1200, "output_tokens": 100}
    with refused(400, "invalid_request"):
        ledger.quote("alpha", "chat", unit_counts=Jsonb({"tokens": 1}))
    with refused(400, "invalid_request"):
        ledger.quote("alpha", "chat")
    assert_sound(ledger)


def test_what_is_not_in_the_plan_is_quoted_too(ledger: Ledger) -> None:
    ledger.open("beta")
    assert ledger.quote("beta", "chapter", 100, quality="best").amount == 20
    assert ledger.check_access("beta", "chapter", 100).gate == "plan"


@pytest.mark.parametrize("units", [-1, "0.0000001", "NaN", 10**12])
def test_units_are_amounts(ledger: Ledger, units: Any) -> None:
    with ledger.unchanged(), pytest.raises(CreditsError) as caught:
        write(ledger, units)
    assert caught.value.status in {400, 422}
    write(ledger, 1)
    with pytest.raises(CreditsError):
        ledger.settle_usage("alpha", "u", units)


def test_the_same_call_again_is_a_replay(ledger: Ledger) -> None:
    arguments = {"quality": "best", "subject": "s", "metadata": Jsonb({"a": 1}), "ttl": HOUR}
    first = write(ledger, **arguments)
    ledger.now += DAY
    ledger.book()
    with ledger.unchanged():
        assert same(first, write(ledger, **arguments))
    for change in ({"quality": "good"}, {"subject": None}, {"metadata": None}, {"model": "small"}, {"ttl": MINUTE}):
        with refused(409, "idempotency_conflict"):
            write(ledger, **{**arguments, **change})
    with refused(409, "idempotency_conflict"):
        write(ledger, 999, **arguments)


def test_a_replay_does_not_depend_on_how_the_session_writes_intervals(ledger: Ledger) -> None:
    first = write(ledger, ttl="90 minutes")
    ledger.conn.execute("select set_config('intervalstyle', 'iso_8601', true)")  # Rails does
    assert same(first, write(ledger, ttl="90 minutes"))


def test_settling_again_is_a_replay(ledger: Ledger) -> None:
    write(ledger)
    first = ledger.settle_usage("alpha", "u", 500, metadata=Jsonb({"tokens": 7}))
    ledger.use(10)
    with ledger.unchanged():
        assert same(first, ledger.settle_usage("alpha", "u", 500, metadata=Jsonb({"tokens": 7})))
    with ledger.unchanged(), refused(409, "idempotency_conflict"):
        ledger.settle_usage("alpha", "u", 501, metadata=Jsonb({"tokens": 7}))


def test_without_units_what_was_announced_is_charged(ledger: Ledger) -> None:
    write(ledger, 300)
    assert ledger.settle_usage("alpha", "u").charged == 30
    assert ledger.available() == 970


def test_settling_what_is_not_there(ledger: Ledger) -> None:
    with refused(404, "usage_not_found", usage_id="u"):
        ledger.settle_usage("alpha", "u", 1)
    ledger.reserve("alpha", 10, "r")
    with refused(404, "usage_not_found"):
        ledger.settle_usage("alpha", "r", 1)
    with refused(400, "invalid_request"):
        ledger.settle_usage("alpha", None, 1)
    write(ledger)
    ledger.release("alpha", "u")
    with refused(409, "reservation_closed"):
        ledger.settle_usage("alpha", "u", 1)


def test_an_id_of_a_reservation_is_taken(ledger: Ledger) -> None:
    ledger.reserve("alpha", 10, "u")
    with ledger.unchanged(), refused(409, "idempotency_conflict"):
        write(ledger)


def test_nor_is_a_reservation_a_use_that_looks_just_like_it(ledger: Ledger) -> None:
    ledger.reserve("alpha", 50, "open", capability="outline")
    ledger.reserve("alpha", 50, "over", capability="outline")
    ledger.settle("alpha", "over", 50)
    for usage_id in ("open", "over"):
        with ledger.unchanged(), refused(409, "idempotency_conflict", operation="reserve", key=usage_id):
            ledger.authorize_usage("alpha", "outline", usage_id=usage_id)
    assert_sound(ledger)


def test_what_was_released_costs_nothing(ledger: Ledger) -> None:
    write(ledger)
    ledger.release("alpha", "u")
    assert ledger.sums() == (1000, 0, 1000, 0)
    assert_sound(ledger)


@pytest.mark.parametrize(
    ("policy", "charged", "uncollected", "debt"), [("cap", 1000, 200, 0), ("overflow", 1150, 50, 150)]
)
def test_more_than_was_held(ledger: Ledger, policy: str, charged: int, uncollected: int, debt: int) -> None:
    ledger.set_debt_limit("alpha", 150)
    write(ledger, 5000)
    settled = ledger.settle_usage("alpha", "u", 12000, on_overage=policy)
    assert (settled.actual, settled.charged, settled.uncollected) == (1200, charged, uncollected)
    assert ledger.sums()[3] == debt
    assert_sound(ledger)


def test_more_than_was_held_may_be_refused(ledger: Ledger) -> None:
    write(ledger, 5000)
    with ledger.unchanged(), refused(402, "insufficient_credits", required=1200, available=1000):
        ledger.settle_usage("alpha", "u", 12000, on_overage="reject")
    assert ledger.settle_usage("alpha", "u", 5000, on_overage="reject").charged == 500


def test_what_was_captured_is_a_part_of_the_price(ledger: Ledger) -> None:
    write(ledger, 1000)
    ledger.capture("alpha", "u", 60, key="c")
    settled = ledger.settle_usage("alpha", "u", 900)
    assert (settled.actual, settled.charged, settled.released, settled.entry_seq) == (90, 90, 10, 3)
    assert ledger.sums() == (910, 0, 910, 0)
    assert_sound(ledger)


def test_more_was_captured_than_it_came_to(ledger: Ledger) -> None:
    write(ledger, 1000)
    ledger.capture("alpha", "u", 60, key="c")
    settled = ledger.settle_usage("alpha", "u", 100)
    assert (settled.charged, settled.released) == (60, 40)
    assert_sound(ledger)


def test_a_late_settle_is_charged_afresh(ledger: Ledger) -> None:
    write(ledger, 1000)
    ledger.now += 15 * MINUTE
    assert ledger.available() == 1000
    settled = ledger.settle_usage("alpha", "u", 1000)
    assert (settled.late, settled.charged, settled.available) == (True, 100, 900)
    assert_sound(ledger)


def test_the_reservation_of_a_usage_may_be_settled_itself(ledger: Ledger) -> None:
    write(ledger, 1000)
    ledger.settle("alpha", "u", 40)
    with refused(409, "reservation_closed"):
        ledger.settle_usage("alpha", "u", 400)
    assert_sound(ledger)


def test_what_costs_nothing_is_a_use_too(ledger: Ledger) -> None:
    for number in range(2):
        usage = ledger.authorize_usage("alpha", "search", usage_id=f"s{number}")
        assert (usage.amount, usage.available) == (0, 1000)
    with refused(429, "rate_limited"):
        ledger.authorize_usage("alpha", "search", usage_id="s2")
    ledger.release("alpha", "s0")
    ledger.authorize_usage("alpha", "search", usage_id="s2")
    ledger.extend("alpha", "s2", ttl=HOUR)
    assert ledger.settle_usage("alpha", "s1").charged == 0
    assert ledger.settle_usage("alpha", "s2").status == "settled"
    assert ledger.kinds() == [("grant", 1000)]
    ledger.now += DAY
    assert_sound(ledger)


def test_what_costs_nothing_needs_no_credits(ledger: Ledger) -> None:
    ledger.open_account("beta", plan="team")
    ledger.authorize_usage("beta", "search", usage_id="s")
    ledger.now += HOUR
    ledger.book("beta")
    assert ledger.settle_usage("beta", "s").late
    assert_sound(ledger)


# Rates over time -----------------------------------------------------------------------------------------------------


def dearer(price: Any) -> Json:
    """A catalogue in which outlines have another price."""
    return {"rates": [*(rate for rate in CATALOG["rates"] if rate["capability"] != "outline"),
                      {"capability": "outline", "price": price}]}  # fmt: skip


def test_a_new_price_leaves_work_in_flight_alone(ledger: Ledger) -> None:
    ledger.authorize_usage("alpha", "outline", 1, usage_id="old")
    ledger.now += TICK
    apply(ledger, dearer(70))
    ledger.authorize_usage("alpha", "outline", 1, usage_id="new")
    assert ledger.settle_usage("alpha", "old", 1).charged == 50
    assert ledger.settle_usage("alpha", "new", 1).charged == 70


def test_a_quote_is_honoured_for_a_while(ledger: Ledger) -> None:
    quote = ledger.quote("alpha", "outline", 1)
    ledger.now += MINUTE
    apply(ledger, dearer(70))
    pinned = {"rate_id": quote.rate_id}
    assert ledger.authorize_usage("alpha", "outline", 1, usage_id="a", **pinned).amount == 50
    ledger.now += 15 * MINUTE - TICK
    assert ledger.authorize_usage("alpha", "outline", 1, usage_id="b", **pinned).amount == 50
    ledger.now += TICK
    with ledger.unchanged(), refused(409, "quote_expired", rate_id=quote.rate_id):
        ledger.authorize_usage("alpha", "outline", 1, usage_id="c", **pinned)
    with refused(409, "quote_expired"):
        ledger.authorize_usage("alpha", "chapter", 1, usage_id="c", **pinned)
    assert ledger.quote("alpha", "outline", 1).amount == 70


def test_a_quote_is_honoured_however_often_the_price_changes_meanwhile(ledger: Ledger) -> None:
    apply(ledger, dearer(60))
    quote = ledger.quote("alpha", "outline", 1)
    ledger.now += MINUTE
    apply(ledger, dearer(70))
    ledger.now += MINUTE
    apply(ledger, dearer(80))
    pinned = {"rate_id": quote.rate_id}
    assert ledger.authorize_usage("alpha", "outline", 1, usage_id="a", **pinned).amount == 60
    ledger.now += 14 * MINUTE - TICK
    assert ledger.authorize_usage("alpha", "outline", 1, usage_id="b", **pinned).amount == 60
    ledger.now += TICK
    with refused(409, "quote_expired", rate_id=quote.rate_id):
        ledger.authorize_usage("alpha", "outline", 1, usage_id="c", **pinned)


def test_a_quote_is_honoured_when_a_more_exact_rate_comes(ledger: Ledger) -> None:
    ledger.now += HOUR
    quote = ledger.quote("alpha", "chapter", 100, quality="best")
    exact = {"capability": "chapter", "quality": "best", "price": 7}
    ledger.now += MINUTE
    apply(ledger, {"rates": [*CATALOG["rates"], exact]})  # which says of no time that it was not in force
    use: Callable[..., Any] = partial(ledger.authorize_usage, "alpha", "chapter", 100, quality="best")
    assert use(usage_id="a", rate_id=quote.rate_id).amount == quote.amount == 20
    assert use(usage_id="b").amount == 7
    ledger.now += 15 * MINUTE
    with refused(409, "quote_expired"):
        use(usage_id="c", rate_id=quote.rate_id)


def test_a_quote_of_a_price_to_come_is_none(ledger: Ledger) -> None:
    coming = (ledger.now + MINUTE).isoformat()
    apply(ledger, {"rates": [*CATALOG["rates"], {"capability": "outline", "price": 7, "valid_from": coming}]})
    with ledger.as_owner():
        (rate,) = ledger.query("select r.rate_id from credits.rates r where r.valid_from > %s", ledger.now)
    with refused(409, "quote_expired", rate_id=rate.rate_id):
        ledger.authorize_usage("alpha", "outline", 1, usage_id="a", rate_id=rate.rate_id)


def test_work_in_flight_is_settled_in_the_unit_that_it_was_priced_in(ledger: Ledger) -> None:
    ledger.authorize_usage("alpha", "chapter", 1000, usage_id="words")
    ledger.authorize_usage("alpha", "chat", 1000, usage_id="one of two")
    ledger.authorize_usage("alpha", "outline", usage_id="flat")
    units = {name: {**CATALOG["capabilities"][name], "unit": "pages"} for name in ("chapter", "chat", "outline")}
    apply(ledger, {"capabilities": CATALOG["capabilities"] | units, "rates": CATALOG["rates"]})
    row = ledger.settle_usage("alpha", "words", 500)
    assert (row.charged, row.units, row.unit_counts) == (50, 500, {"words": 500})
    assert ledger.settle_usage("alpha", "one of two", 500).unit_counts == {"input_tokens": 500}
    assert ledger.settle_usage("alpha", "flat", 3).charged == 50
    assert ledger.authorize_usage("alpha", "chapter", 10, usage_id="pages").amount == 1
    assert ledger.settle_usage("alpha", "pages", 10).unit_counts == {"pages": 10}
    assert_sound(ledger)


# Many at once --------------------------------------------------------------------------------------------------------


def job(number: int, **more: Any) -> Callable[[Ledger], Any]:
    """One of many parallel uses."""
    return lambda one: one.authorize_usage("alpha", "chapter", 1000, **{"usage_id": f"u{number}", **more})


def test_parallel_uses_hold_no_more_than_there_is(database: Database) -> None:
    with committed(database) as ledger:
        apply(ledger, CATALOG)
        ledger.open_account("alpha", plan="team")
        ledger.grant(750)
        results = together(database, [job(number) for number in range(20)])
        held = [one for one in results if not isinstance(one, CreditsError)]
        assert len(held) == 7
        assert {one.code for one in results if isinstance(one, CreditsError)} == {"insufficient_credits"}
        use = partial(partial, Ledger.settle_usage, account_id="alpha", units=500)
        settle = [use(usage_id=one.usage_id) for one in held * 2]
        charged = together(database, settle)
        assert sum(one.charged for one in charged if not one.replayed) == 350
        assert sum(one.replayed for one in charged) == 7
        assert ledger.available() == 400
        assert_sound(ledger)


def test_parallel_calls_of_one_id_are_one_use(database: Database) -> None:
    with committed(database) as ledger:
        apply(ledger, CATALOG)
        ledger.open_account("alpha", plan="team")
        ledger.grant(1000)
        results = together(database, [job(0)] * 12)
        assert sum(not one.replayed for one in results) == 1
        assert ledger.sums()[1] == 100
        ends: list[Callable[[Ledger], Any]] = [
            lambda one: one.settle_usage("alpha", "u0", 1000), lambda one: one.release("alpha", "u0"),
        ] * 4  # fmt: skip
        together(database, ends)
        assert ledger.sums() in [(900, 0, 900, 0), (1000, 0, 1000, 0)]
        assert_sound(ledger)


# Reports -------------------------------------------------------------------------------------------------------------


def test_usage_is_reported_by_day_subject_capability_quality_model_and_member(ledger: Ledger) -> None:
    write(ledger, 1000, usage_id="a", subject="book:1", quality="best")
    ledger.settle_usage("alpha", "a", 900)
    ledger.use(5, subject="book:1", key="s1")
    ledger.refund_spend("alpha", "s1", amount=2, key="r1")
    ledger.now += DAY
    write(ledger, 100, usage_id="b", subject="book:2", member_id="m")
    ledger.settle_usage("alpha", "b", 100)
    write(ledger, 500, usage_id="c", subject="book:2")
    ledger.set_time_zone("alpha", "Pacific/Auckland")

    def report(group_by: str, **more: Any) -> dict[str | None, tuple[Any, ...]]:
        return {row.name: tuple(row)[1:] for row in ledger.get_usage("alpha", group_by=group_by, since=NOON, **more)}

    assert report("subject") == {"book:1": (183, 0, 2), "book:2": (10, 50, 2)}
    assert report("day") == {"2030-02-01": (183, 0, 2), "2030-02-02": (10, 50, 2)}
    assert report("capability") == {"chapter": (190, 50, 3), None: (3, 0, 1)}
    assert report("model") == {"large": (180, 0, 1), "small": (10, 50, 2), None: (3, 0, 1)}
    assert report("quality") == {"best": (180, 0, 1), "good": (10, 50, 2), None: (3, 0, 1)}
    assert report("member") == {"m": (10, 0, 1), None: (183, 50, 3)}
    assert report("subject", until=NOON + DAY) == {"book:1": (183, 0, 2)}
    ledger.now += 15 * MINUTE
    assert report("subject")["book:2"] == (10, 0, 1)
    with refused(400, "invalid_request"):
        ledger.get_usage("alpha", group_by="hour")
    with refused(404, "account_not_found"):
        ledger.get_usage("nobody")


def test_usage_since_is_exact(ledger: Ledger) -> None:
    for number in range(5):
        ledger.now = NOON + number * HOUR
        ledger.use(1)
    for number in range(5):
        at = NOON + number * HOUR
        (row,) = ledger.get_usage("alpha", group_by="capability", since=at)
        assert row.credits == 5 - number
        if number:
            (row,) = ledger.get_usage("alpha", group_by="capability", since=NOON, until=at)
            assert row.credits == number
    assert [row.credits for row in ledger.get_usage("alpha", since=NOON + timedelta(days=40))] == []


# Credits of plans ----------------------------------------------------------------------------------------------------


def team(credits_: Any) -> Json:
    """The plans, with monthly credits for the team."""
    return {"plans": {"team": {**CATALOG["plans"]["team"], "monthly_credits": credits_}}}


def test_a_plan_that_gets_credits_gives_them_to_its_accounts_once(ledger: Ledger) -> None:
    ledger.open_account("beta", plan="team")
    ledger.open("gamma")
    apply(ledger, team(200))
    assert ledger.available("beta") == 0
    assert ledger.initialize_plan_credits() == 2
    assert (ledger.available("alpha"), ledger.available("beta"), ledger.available("gamma")) == (1200, 200, 0)
    with ledger.unchanged():
        assert ledger.initialize_plan_credits() == 0
    assert ledger.get_balance("beta").next_expiry_at == NOON + 28 * DAY
    assert_sound(ledger)


def test_other_credits_of_a_plan_come_with_the_next_month(ledger: Ledger) -> None:
    apply(ledger, team(200))
    ledger.open_account("beta", plan="team")
    assert ledger.initialize_plan_credits() == 1  # alpha
    apply(ledger, team(300))
    assert ledger.initialize_plan_credits() == 2
    assert ledger.available("beta") == 200
    ledger.now = NOON + 28 * DAY
    assert ledger.available("beta") == 300
    apply(ledger, team(0))
    ledger.initialize_plan_credits()
    assert ledger.available("beta") == 300
    ledger.now = NOON + 59 * DAY
    assert ledger.available("beta") == 0
    assert ledger.initialize_plan_credits() == 0
    assert_sound(ledger)


def test_accounts_are_brought_up_in_batches(ledger: Ledger) -> None:
    for number in range(5):
        ledger.open_account(f"a{number}", plan="team")
    apply(ledger, team(10))
    assert [ledger.initialize_plan_credits(max_accounts=4) for _ in range(3)] == [4, 2, 0]
    ledger.now = NOON + 28 * DAY
    assert [ledger.grant_plan_credits(max_accounts=4) for _ in range(3)] == [4, 2, 0]
    assert {ledger.available(f"a{number}") for number in range(5)} == {10}
    for verb in (ledger.initialize_plan_credits, ledger.grant_plan_credits):
        for wrong in (0, 10001, None):
            with refused(400, "invalid_request"):
                verb(max_accounts=wrong)
    assert_sound(ledger)
