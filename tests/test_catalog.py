"""The catalogue as a document: what it may say, what it makes of the tables, and what it leaves alone."""

import copy
import json
import time
from collections.abc import Iterator
from datetime import datetime
from decimal import Decimal
from typing import Any

import psycopg
import pytest
from catalog_support import CATALOG, GONE, changed, problems_of
from client import Client, CreditsError
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from ledger_support import DAY, NOON, Ledger, committed, together
from psycopg import Connection
from servers import Database


@pytest.fixture
def ledger(conn: Connection[Any]) -> Ledger:
    return Ledger(conn)


@pytest.fixture
def stored(ledger: Ledger) -> Ledger:
    ledger.apply_catalog(CATALOG)
    return ledger


def differences(ledger: Ledger, catalog: Any) -> list[tuple[str, str, Any, Any]]:
    """What a dry run says, which changes nothing, and what applying it says: the same, and then nothing more."""
    with ledger.unchanged():
        announced = ledger.apply_catalog(catalog, dry_run=True)
    changes = ledger.apply_catalog(catalog)
    assert changes == announced
    assert ledger.apply_catalog(catalog) == []
    exported = ledger.get_catalog()
    assert ledger.conn.execute("select * from credits.apply_catalog(credits.get_catalog())").fetchall() == []
    assert ledger.get_catalog() == exported
    return [tuple(row) for row in changes]


def names(changes: list[tuple[str, str, Any, Any]]) -> list[str]:
    return [f"{change} {path}" for change, path, _, _ in changes]


# The document --------------------------------------------------------------------------------------------------------


def test_a_document_becomes_the_catalogue_and_the_catalogue_a_document(ledger: Ledger) -> None:
    assert names(differences(ledger, CATALOG)) == [
        "added capabilities.chapter", "added capabilities.outline", "added quality_levels.best",
        "added quality_levels.draft", "added models.large", "added models.small", "added packages.bulk",
        "added packages.starter", "added plans.free", "added plans.pro", "added rates.chapter.best.large",
        "added rates.outline",
    ]  # fmt: skip
    exported = ledger.get_catalog()
    expected = changed(
        ("plans.pro.capabilities.outline", {}),
        ("packages.bulk.credits", Decimal("0.5")),
        ("rates", [{**rate, "price": price} for rate, price in zip(CATALOG["rates"], prices(ledger), strict=True)]),
    )
    assert exported == expected
    assert [rate["capability"] for rate in exported["rates"]] == ["outline", "chapter"]
    assert [row.code for row in ledger.list_packages()] == ["bulk", "starter"]


def prices(ledger: Ledger) -> list[Any]:
    return [
        ledger.query(
            "select credits._normal_price(%s, %s) as price", json.dumps(rate["price"]),
            CATALOG["capabilities"][rate["capability"]].get("unit", "unit"),
        )[0].price
        for rate in CATALOG["rates"]
        for _ in [ledger.conn.execute("set role credits_owner")]
    ]  # fmt: skip


def test_what_is_not_given_is_what_the_tables_say(ledger: Ledger) -> None:
    """The document's shape repeats the defaults of the tables: of rows that were made with them nothing is shown."""
    package: dict[str, Any] = {"name": "N", "credits": 1, "price": 1, "currency": "usd"}
    for section in ("capabilities", "quality_levels", "models", "plans", "packages"):
        record = package if section == "packages" else {"name": "N"}
        values = ["%s"] * (len(record) + 1)
        ledger.change(
            f"insert into credits.{section} (code, {', '.join(record)}) values ({', '.join(values)})",
            "n",
            *record.values(),
        )
        assert ledger.get_catalog()[section] == {"n": record}


def test_a_name_may_be_the_code_and_numbers_are_trimmed(ledger: Ledger) -> None:
    ledger.conn.execute(
        """select credits.apply_catalog('{"models": {"m": null}, "packages":
           {"p": {"name": "P", "credits": 10.50, "price": 1.0, "currency": "usd"}}}')"""
    )
    assert ledger.table("models")[0].name == "m"
    assert json.dumps(ledger.get_catalog()["packages"]["p"], default=str, sort_keys=True) == (
        '{"credits": "10.5", "currency": "usd", "name": "P", "price": 1}'
    )


def test_a_section_that_is_absent_is_left_alone(stored: Ledger) -> None:
    assert differences(stored, {}) == []
    for section in CATALOG:
        assert differences(stored, {section: CATALOG[section]}) == []
    assert names(differences(stored, {"packages": {}})) == ["deactivated packages.bulk", "removed packages.starter"]


DIFFERENCES: list[Any] = [
    ("plans.pro.monthly_credits", 150.25, ("changed", "plans.pro.monthly_credits", 100, Decimal("150.25"))),
    ("plans.pro.monthly_credits", GONE, ("changed", "plans.pro.monthly_credits", 100, 0)),
    ("plans.pro.description", "New", ("changed", "plans.pro.description", None, "New")),
    ("plans.pro.active", False, ("deactivated", "plans.pro", True, False)),
    ("plans.pro.capabilities.chapter", GONE, "removed plans.pro.capabilities.chapter"),
    ("plans.free.capabilities.chapter", {"qualities": {"best": ["large"]}},
     "added plans.free.capabilities.chapter"),
    ("plans.pro.qualities.best", ["small", "large"],
     ("changed", "plans.pro.qualities.best", ["large", "small"], ["small", "large"])),
    ("plans.pro.qualities.draft", [], ("changed", "plans.pro.qualities.draft", ["small"], [])),
    ("plans.pro.qualities.draft", GONE, ("removed", "plans.pro.qualities.draft", ["small"], None)),
    ("plans.pro.limits", [],
     ("changed", "plans.pro.limits", [{"calls": 100, "per": "minute", "rolling": False}], [])),
    ("capabilities.chapter.display_order", 7, ("changed", "capabilities.chapter.display_order", 2, 7)),
    ("packages.starter", GONE, "removed packages.starter"),
    ("packages.starter.active", False, ("deactivated", "packages.starter", True, False)),
    ("models.third", None, "added models.third"),
    ("plans.team", {"name": "Team"}, "added plans.team"),
]  # fmt: skip


def test_the_differences_are_told(stored: Ledger) -> None:
    for path, value, expected in DIFFERENCES:
        with stored.conn.transaction(force_rollback=True):
            (change,) = differences(stored, changed((path, value)))
            assert (f"{change[0]} {change[1]}" if isinstance(expected, str) else change) == expected
            assert stored.apply_catalog(CATALOG)  # and back


# Everything that can be wrong ----------------------------------------------------------------------------------------

AMOUNT = "must be a number from 0 to below 1e12 with at most 6 decimals"
MINOR = "must be a whole number from 0, in the minor unit of the currency"
POSITIVE = "must be a number above 0 and below 1e12 with at most 6 decimals"
PROBLEMS: list[Any] = [  # what is changed, to what, what is said of it, and where if not there
    ("planz", {}, "unknown key; did you mean plans?"),
    ("plans", None, "must be an object; {} is an empty one"),
    ("plans", [], "must be an object"),
    ("rates", None, "must be a list; [] is an empty one"),
    ("rates", {}, "must be a list"),
    ("models.small", "Small", "must be an object"),
    ("models.small.nmae", "x", "unknown key; did you mean name?"),
    ("models.small.colour", "x", "unknown key; known are active, description, display_order, name"),
    ("models." + "x" * 201, {}, "a code has 1 to 200 characters"),
    ("models.", {}, "a code has 1 to 200 characters"),
    ("capabilities.chapter.unit", "", "must be a text of 1 to 200 characters"),
    ("capabilities.chapter.display_order", 1.5, "must be a whole number"),
    ("capabilities.chapter.display_order", 2**31, "must be a whole number"),
    ("capabilities.chapter.active", "yes", "must be true or false"),
    ("capabilities.chapter.description", 5, "must be a text"),
    ("quality_levels.draft.name", 5, "must be a text of 1 to 200 characters"),
    ("packages.starter", None, "price is required"),
    ("packages.starter.name", GONE, "name is required", "packages.starter"),
    ("packages.starter.name", None, "name is required", "packages.starter"),
    ("packages.starter.credits", "1000", POSITIVE),
    ("packages.starter.credits", 0, POSITIVE),
    ("packages.starter.credits", 0.0000001, POSITIVE),
    ("packages.starter.credits", 10**12, POSITIVE),
    ("packages.starter.price", -1, MINOR),
    ("packages.starter.price", 9.99, MINOR),
    ("packages.starter.price", 2**63, MINOR),
    ("packages.starter.currency", "USD", "must be three lower-case letters, such as usd"),
    ("packages.starter.discount_percent", 100, "must be a number from 0 to below 100"),
    ("packages.starter.stripe_price_id", "price_bulk", "is already that of packages.bulk"),
    ("packages.starter.stripe_price_id", "price_free",
     "is already that of packages.starter", "plans.free.stripe_price_ids.0"),
    ("plans.pro.name", GONE, "name is required", "plans.pro"),
    ("plans.pro.monthly_creditz", 1, "unknown key; did you mean monthly_credits?"),
    ("plans.pro.monthlyCredits", 1, "unknown key; did you mean monthly_credits?"),
    ("plans.pro.monthly", 1, "unknown key; did you mean monthly_credits?"),
    ("plans.pro.monthly_credits", -1, AMOUNT),
    ("plans.pro.trial_credits", 1.0000001, AMOUNT),
    ("plans.pro.rollover", "some", "must be one of none, all, cap"),
    ("plans.pro.rollover", "cap", "needs a rollover_cap"),
    ("plans.pro.rollover_cap", 5, "only goes with rollover: cap"),
    ("plans.pro.seats", 0, "must be a whole number above 0"),
    ("plans.pro.is_default", True, "the default plan is already free"),
    ("plans.pro.stripe_price_ids", "price_1", "must be a list"),
    ("plans.pro.stripe_price_ids", [1], "must be a text of 1 to 200 characters", "plans.pro.stripe_price_ids.0"),
    ("plans.pro.stripe_price_ids", ["p", "p"], "is given above", "plans.pro.stripe_price_ids.1"),
    ("plans.pro.stripe_price_ids", ["price_free"], "is already that of plans.free", "plans.pro.stripe_price_ids.0"),
    ("plans.pro.qualities", ["draft"], "must be an object"),
    ("plans.pro.qualities.bets", [], "there is no quality level bets; did you mean best?"),
    ("plans.pro.qualities.best", "large", "must be a list"),
    ("plans.pro.qualities.best", None, "must be a list; [] is an empty one"),
    ("plans.pro.qualities.best", ["huge"], "there is no model huge", "plans.pro.qualities.best.0"),
    ("plans.pro.qualities.best", [7], "must be the code of a model", "plans.pro.qualities.best.0"),
    ("plans.pro.qualities.best", ["large", "large"], "is given above", "plans.pro.qualities.best.1"),
    ("plans.pro.capabilities.chaptr", {}, "there is no capability chaptr; did you mean chapter?"),
    ("plans.pro.capabilities.chapter.limit", [], "unknown key; did you mean limits?"),
    ("plans.pro.limits.0.per", "minuet", "must be one of minute, hour, day, month; did you mean minute?"),
    ("plans.pro.limits.0.per", GONE, "per is required", "plans.pro.limits.0"),
    ("plans.pro.limits.0.calls", GONE, "a limit has exactly one of calls, units and credits", "plans.pro.limits.0"),
    ("plans.pro.limits.0.credits", 5, "a limit has exactly one of calls, units and credits", "plans.pro.limits.0"),
    ("plans.pro.limits.0.calls", 1.5, "must be a whole number from 0 to below 1e12"),
    ("plans.pro.limits.0", {"credits": 5, "per": "day"},
     "units and credits are limited per month", "plans.pro.limits.0.per"),
    ("plans.pro.limits.0", {"credits": 5, "per": "month", "rolling": True},
     "only calls are limited in a rolling window", "plans.pro.limits.0.rolling"),
    ("plans.pro.limits.0", {"units": 5, "per": "month"},
     "units are those of one capability: limit them there", "plans.pro.limits.0.units"),
    ("plans.pro.limits.1", {"calls": 7, "per": "minute", "rolling": False}, "the same window is limited above"),
    ("plans.pro.limits.1", None, "must be an object; {} is an empty one"),
    ("rates.0.capability", GONE, "capability is required", "rates.0"),
    ("rates.0.capability", "outlin", "there is no capability outlin; did you mean outline?"),
    ("rates.0.quality", "poor", "there is no quality level poor"),
    ("rates.0.model", "smal", "there is no model smal; did you mean small?"),
    ("rates.0.price", GONE, "price is required", "rates.0"),
    ("rates.0.price", "50", None),
    ("rates.0.valid_from", 5, "must be a date, or a time with its zone, such as 2026-01-01T00:00:00Z"),
    ("rates.0.valid_from", "2026-02-30", None),
    ("rates.0.valid_from", "2026-01-01T00:00:00", None),
    ("rates.0.valid_from", "infinity", None),
    ("rates.0.valid_from", "9999-12-31T23:59:59-01", None),
    ("rates.0.valid_from", "0001-01-01T00:00:00+01", None),
    ("rates.2", {"capability": "outline", "price": 7}, "the same rate is given above"),
    ("rates", [], "has no rate in force", "plans.free.capabilities.outline"),
    ("rates", [],
     "has no rate in force for best by large, best by small, draft by small", "plans.pro.capabilities.outline"),
    ("rates.1", GONE, "has no rate in force for best by large", "plans.pro.capabilities.chapter"),
    ("rates.1.model", "small", "has no rate in force for best by large", "plans.pro.capabilities.chapter"),
    ("rates.0.valid_from", "2030-02-01", "has no rate in force", "plans.free.capabilities.outline"),
]  # fmt: skip


def test_every_problem_is_named_with_its_path(ledger: Ledger) -> None:
    """One connection for all: its functions are compiled once."""
    missed = []
    for path, value, problem, *where in PROBLEMS:
        found = problems_of(lambda path=path, value=value: ledger.apply_catalog(changed((path, value))))  # type: ignore[misc]
        said = found.get((where or [path])[0])
        if said is None or problem not in (None, said):
            missed.append((path, value, problem, found))
    assert not missed, missed


def test_all_problems_are_found_at_once_and_nothing_is_written(stored: Ledger) -> None:
    wrong = changed(
        ("planz", {}), ("plans.pro.seats", 0), ("plans.pro.limits.0.per", "week"), ("packages.bulk.credits", -1),
        ("rates.0.model", "smal"), ("models.third", {"name": 3}), ("plans.pro.capabilities.chaptr", {}),
    )  # fmt: skip
    with stored.unchanged():
        found = problems_of(lambda: stored.apply_catalog(wrong))
    assert set(found) >= {
        "planz", "plans.pro.seats", "plans.pro.limits.0.per", "packages.bulk.credits", "rates.0.model",
        "models.third.name", "plans.pro.capabilities.chaptr",
    }  # fmt: skip


@pytest.mark.parametrize("catalog", ["null", "[]", "5", '"x"', None])
def test_a_catalogue_is_an_object(ledger: Ledger, catalog: str | None) -> None:
    found = problems_of(lambda: ledger.rows("apply_catalog", catalog=catalog))
    assert set(found) == {""}


def test_codes_are_looked_up_in_the_document_or_where_it_is_silent_in_the_database(stored: Ledger) -> None:
    team = {"name": "Team", "capabilities": {"chapter": {"qualities": {"best": ["large"]}}}}
    plans = {**CATALOG["plans"], "team": team}
    assert names(differences(stored, {"plans": plans})) == ["added plans.team"]
    found = problems_of(lambda: stored.apply_catalog({"plans": plans, "models": {"small": None}}))
    assert "plans.team.capabilities.chapter.qualities.best.0" in found


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 5) | st.sampled_from(["x", "chapter", "2026-01-01", "month"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from([*CATALOG, "chapter", "pro", "limits", "price", "lines"]), inner, max_size=4)
    ),
    max_leaves=12,
)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(catalog=json_values)
def test_any_json_is_refused_properly_or_applied(client: Client, catalog: Any) -> None:
    with client.conn.transaction(force_rollback=True):
        try:
            client.apply_catalog(catalog)
        except CreditsError as error:
            assert error.code == "invalid_catalog"


NEW_PRICE = {"credits": 1, "block": 10, "unit": "pages"}
WORDS = {"flat": 5, "unit": "words"}
UNPRICED = {"capabilities.chapter.unit": "its price counts words: give it one that counts pages"}


@pytest.mark.parametrize(
    ("rates", "expected"),
    [
        (None, UNPRICED),
        ([{"price": {**NEW_PRICE, "unit": "words"}}], UNPRICED),
        ([{"price": 5, "valid_from": "2000-01-01"}, {"price": WORDS, "valid_from": "2001-01-01"}], UNPRICED),
        ([{"price": {**NEW_PRICE, "unit": "words"}, "valid_from": "2100-01-01"}, {"price": 5}], UNPRICED),
        ([{"price": NEW_PRICE}], {}),
        ([{"price": 5}], {}),
        ([{"price": WORDS, "valid_from": "2000-01-01"}, {"price": 5, "valid_from": "2001-01-01"}], {}),
        ([{"price": {"lines": [{"credits": 1, "unit": "input"}, {"credits": 2, "unit": "output"}]}}], {}),
        ([{"price": {"lines": [{"credits": 1, "unit": "words"}, {"credits": 2, "unit": "pages"}]}}], {}),
    ],
)  # fmt: skip
def test_another_unit_comes_with_prices_that_count_it(client: Client, rates: Any, expected: dict[str, str]) -> None:
    """Or each use of it would be refused until somebody gives it a price."""
    client.apply_catalog(CATALOG)
    catalog = {"capabilities": changed(("capabilities.chapter.unit", "pages"))["capabilities"]}
    if rates is not None:
        catalog["rates"] = [
            {"capability": "outline", "price": 50},
            *({"capability": "chapter", **one} for one in rates),
        ]
    if expected:
        assert problems_of(lambda: client.apply_catalog(catalog)) == expected
    else:
        assert client.apply_catalog(catalog)
        again = client.conn.execute("select * from credits.apply_catalog(credits.get_catalog())")
        assert again.fetchall() == []


# What stays ----------------------------------------------------------------------------------------------------------


def test_what_is_in_use_is_deactivated_and_the_rest_removed(stored: Ledger) -> None:
    stored.open_account("alpha", plan="pro")
    empty: dict[str, Any] = {
        "plans": {},
        "packages": {},
        "capabilities": {},
        "quality_levels": {},
        "models": {},
        "rates": [],
    }
    assert names(differences(stored, empty)) == [
        "deactivated capabilities.chapter",  # its rate was in force, and the plan of alpha has it
        "deactivated capabilities.outline",
        "deactivated quality_levels.best",
        "deactivated quality_levels.draft",
        "deactivated models.large",
        "deactivated models.small",
        "deactivated packages.bulk",  # sold at Stripe
        "removed packages.starter",
        "deactivated plans.free",  # the same
        "changed plans.free.is_default",
        "deactivated plans.pro",
        "ended rates.chapter.best.large",
        "ended rates.outline",
    ]
    assert stored.table("plan_capabilities", "t.plan = 'pro'")
    assert [row.path for row in stored.apply_catalog(CATALOG) if row.change == "added"] == [
        "packages.starter", "rates.chapter.best.large", "rates.outline",
    ]  # fmt: skip


def test_a_plan_that_stays_for_its_accounts_keeps_what_they_may_use(stored: Ledger) -> None:
    before = stored.get_catalog()["plans"]["pro"]
    stored.open_account("alpha", plan="pro")
    assert names(differences(stored, changed(("plans.pro", GONE)))) == ["deactivated plans.pro"]
    assert stored.get_catalog()["plans"]["pro"] == {**before, "active": False}
    found = problems_of(lambda: stored.apply_catalog(changed(("plans.pro", GONE), ("rates.1", GONE))))
    assert found == {"plans.pro.capabilities.chapter": "has no rate in force for best by large"}


def test_a_plan_that_nobody_is_on_goes_with_what_it_allows(stored: Ledger) -> None:
    assert names(differences(stored, changed(("plans.pro", GONE)))) == ["removed plans.pro"]
    for table in ("plan_capabilities", "plan_qualities", "plan_limits"):
        assert not stored.table(table, "t.plan = 'pro'")


def test_a_package_that_was_bought_stays(stored: Ledger) -> None:
    stored.open_account("alpha")
    stored.change(
        "insert into credits.purchases (account_id, package, credits, amount, currency, created_at)"
        " values ('alpha', 'starter', 1000, 999, 'usd', %s)",
        NOON,
    )
    assert names(differences(stored, {"packages": {}})) == ["deactivated packages.bulk", "deactivated packages.starter"]
    assert stored.list_packages() == []
    assert names(differences(stored, {"packages": CATALOG["packages"]})) == [
        "changed packages.bulk.active", "changed packages.starter.active",
    ]  # fmt: skip


def test_ids_of_stripe_stay_unless_they_are_given(stored: Ledger) -> None:
    stored.change(
        "update credits.packages set stripe_product_id = 'prod_1', stripe_price_id = 'p1' where code = 'starter'"
    )
    stored.change(
        "update credits.plans set stripe_product_id = 'prod_2', stripe_price_ids = '{p2,p3}' where code = 'pro'"
    )
    assert differences(stored, changed()) == []
    assert names(differences(stored, changed(("packages.starter.stripe_price_id", None)))) == [
        "changed packages.starter.stripe_price_id"
    ]
    assert differences(stored, changed(("plans.pro.stripe_price_ids", ["p4"]))) == [
        ("changed", "plans.pro.stripe_price_ids", ["p2", "p3"], ["p4"])
    ]
    assert stored.table("plans", "code = 'pro'")[0].stripe_product_id == "prod_2"


def test_an_id_of_stripe_that_somebody_keeps_is_not_given_twice(stored: Ledger) -> None:
    new = {"name": "New", "credits": 1, "price": 1, "currency": "usd", "stripe_price_id": "price_bulk"}
    found = problems_of(lambda: stored.apply_catalog(changed(("packages.bulk", GONE), ("packages.new", new))))
    assert found == {
        "packages.new.stripe_price_id": "is already that of packages.bulk,"
        " which is not in the document but stays, for it was sold at Stripe"
    }


def test_what_only_one_may_have_can_be_swapped(stored: Ledger) -> None:
    swapped = changed(
        ("packages.starter.stripe_price_id", "price_bulk"), ("packages.bulk.stripe_price_id", None),
        ("plans.pro.is_default", True), ("plans.free.is_default", False),
        ("plans.pro.stripe_product_id", "prod_1"), ("plans.free.stripe_product_id", "prod_2"),
    )  # fmt: skip
    assert len(differences(stored, swapped)) == 6
    back = changed(
        ("packages.starter.stripe_price_id", None), ("plans.pro.stripe_product_id", "prod_2"),
        ("plans.free.stripe_product_id", "prod_1"),
    )  # fmt: skip
    assert len(differences(stored, back)) == 6


# Rates ---------------------------------------------------------------------------------------------------------------


def rates(ledger: Ledger) -> list[tuple[Any, ...]]:
    """What was and will be in force for the outline, by its start."""
    rows = ledger.query(
        "select nullif(r.valid_from, '-infinity') as start, r.price, nullif(r.valid_until, 'infinity') as until"
        "  from credits.rates r where r.capability = 'outline' order by r.valid_from"
    )
    return [(row.start, flat(row.price), *([row.until] if row.until else [])) for row in rows]


def flat(price: Any) -> Any:
    return price["lines"][0]["flat"]


@pytest.fixture
def clock(ledger: Ledger) -> Iterator[Ledger]:
    """As the owner, who sees rates."""
    with ledger.as_owner():
        ledger.apply_catalog({"capabilities": {"outline": None}})
        yield ledger


def apply_rates(ledger: Ledger, *entries: Any) -> list[str]:
    listed = [
        {"capability": "outline", "price": price, **({"valid_from": start} if start else {})}
        for start, price in entries
    ]
    return names(differences(ledger, {"rates": listed}))


def test_a_new_price_follows_the_old_one(clock: Ledger) -> None:
    assert apply_rates(clock, (None, 50)) == ["added rates.outline"]
    assert rates(clock) == [(None, 50)]
    clock.now += DAY
    assert apply_rates(clock, (None, 50)) == []
    assert apply_rates(clock, (None, 60)) == ["changed rates.outline"]
    assert rates(clock) == [(None, 50), (NOON + DAY, 60)]
    clock.now += DAY
    assert apply_rates(clock, (None, 50)) == ["changed rates.outline"]
    assert rates(clock) == [(None, 50), (NOON + DAY, 60), (NOON + 2 * DAY, 50)]
    assert clock.get_catalog()["rates"][0]["valid_from"] == "2030-02-02T12:00:00Z"


def test_a_price_can_be_announced_changed_and_withdrawn(clock: Ledger) -> None:
    later, latest = "2030-03-01T00:00:00Z", "2030-04-01"
    assert apply_rates(clock, (None, 50), (later, 60)) == ["added rates.outline", f"added rates.outline from {later}"]
    assert apply_rates(clock, (None, 50), ("2030-03-01T02:00:00+02:00", 60)) == []
    assert apply_rates(clock, (None, 50), (later, 70)) == [f"changed rates.outline from {later}"]
    assert apply_rates(clock, (None, 50)) == [f"removed rates.outline from {later}"]
    assert len(apply_rates(clock, (None, 50), (later, 60), (latest, 80))) == 2
    clock.now = datetime.fromisoformat("2030-03-02T00:00:00+00:00")
    assert apply_rates(clock, (None, 50), (later, 60), (latest, 80)) == []  # the one without a start is past
    assert [(row["price"], row["valid_from"]) for row in clock.get_catalog()["rates"]] == [
        (rates_price(clock, 60), later), (rates_price(clock, 80), "2030-04-01T00:00:00Z"),
    ]  # fmt: skip
    assert apply_rates(clock, (later, 60), (latest, 80)) == []
    assert apply_rates(clock, (None, 65)) == [
        "changed rates.outline",
        "removed rates.outline from 2030-04-01T00:00:00Z",
    ]


def rates_price(ledger: Ledger, price: int) -> Any:
    return ledger.query("select credits._normal_price(to_jsonb(%s::int), 'unit') as price", price)[0].price


def test_a_rate_that_has_been_in_force_is_never_edited(clock: Ledger) -> None:
    start = "2030-02-01T00:00:00Z"
    apply_rates(clock, (None, 50), (start, 60))
    clock.now += 2 * DAY
    for entries in ([(start, 61)], [(start, 61), ("2030-02-02", 70)], [(start, 61), (None, 60)]):
        listed = [{"capability": "outline", "price": price, "valid_from": at} for at, price in entries]
        with clock.unchanged():
            found = problems_of(lambda listed=listed: clock.apply_catalog({"rates": listed}))  # type: ignore[misc]
        assert found == {"rates.0.valid_from": "a rate that has been in force is never edited: give a new valid_from"}
    assert apply_rates(clock, ("2030-02-02T11:00:00Z", 61)) == ["changed rates.outline"]
    assert rates(clock)[-1] == (NOON + 2 * DAY, 61)  # what begins in the past begins now: until now there was another


def test_the_first_rate_begins_when_it_says(clock: Ledger) -> None:
    assert apply_rates(clock, (None, 40), ("2029-01-01", 50), ("2029-06-01", 60)) == ["added rates.outline"]
    assert rates(clock) == [(datetime.fromisoformat("2029-06-01T00:00:00+00:00"), 60)]


def test_a_rate_ends_when_it_leaves_and_may_come_back(clock: Ledger) -> None:
    apply_rates(clock, (None, 50), ("2030-03-01", 60))
    clock.now += DAY
    assert apply_rates(clock) == ["ended rates.outline", "removed rates.outline from 2030-03-01T00:00:00Z"]
    assert rates(clock) == [(None, 50, NOON + DAY)]
    assert clock.get_catalog()["rates"] == []
    clock.now += DAY
    assert apply_rates(clock, (None, 50)) == ["added rates.outline"]
    assert rates(clock) == [(None, 50, NOON + DAY), (NOON + 2 * DAY, 50)]


def test_a_rate_that_followed_another_does_not_bring_it_back_when_it_ends(clock: Ledger) -> None:
    apply_rates(clock, (None, 50))
    clock.now += DAY
    apply_rates(clock, (None, 60))
    clock.now += DAY
    assert apply_rates(clock, ("2030-06-01", 70)) == [
        "ended rates.outline",
        "added rates.outline from 2030-06-01T00:00:00Z",
    ]
    assert [rate["valid_from"] for rate in clock.get_catalog()["rates"]] == ["2030-06-01T00:00:00Z"]


@pytest.mark.parametrize("quality", [None, "best"])
@pytest.mark.parametrize("model", [None, "large"])
def test_a_rate_of_less_detail_is_enough(ledger: Ledger, quality: str | None, model: str | None) -> None:
    rate = {"capability": "chapter", "price": 1, "quality": quality, "model": model}
    differences(ledger, changed(("rates.1", rate)))


@pytest.mark.parametrize("section", ["capabilities.chapter", "quality_levels.best", "models.large"])
def test_what_is_not_active_needs_no_rate(ledger: Ledger, section: str) -> None:
    differences(ledger, changed((f"{section}.active", False), ("rates.1", GONE)))


# All together --------------------------------------------------------------------------------------------------------

codes = st.sampled_from(["a", "b.c", "Ä d", "7", "true"])
amounts = st.decimals(0, 10**6, places=2).map(float) | st.integers(0, 10**6)
texts = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=8)


@st.composite
def catalogues(draw: st.DrawFn) -> dict[str, Any]:
    """Documents without problems: whatever a plan may use has a rate."""
    record = st.fixed_dictionaries(
        {},
        optional={
            "name": texts.filter(bool),
            "description": texts,
            "display_order": st.integers(0, 3),
            "active": st.booleans(),
        },
    )
    sections = {
        name: draw(st.dictionaries(codes, record, max_size=4)) for name in ("capabilities", "quality_levels", "models")
    }
    models = st.lists(st.sampled_from(sorted(sections["models"])), unique=True) if sections["models"] else st.just([])
    qualities = st.fixed_dictionaries({}, optional=dict.fromkeys(sections["quality_levels"], models))
    limits = st.lists(
        st.builds(
            lambda calls, per, rolling: {"calls": calls, "per": per, "rolling": rolling},
            st.integers(0, 99), st.sampled_from(["minute", "hour", "day", "month"]), st.booleans(),
        ),
        max_size=3, unique_by=lambda limit: (limit["per"], limit["rolling"]),
    )  # fmt: skip
    use = st.none() | st.fixed_dictionaries({}, optional={"qualities": qualities, "limits": limits})
    plan = st.fixed_dictionaries(
        {"name": texts.filter(bool)},
        optional={
            "monthly_credits": amounts, "rollover": st.sampled_from(["none", "all"]), "active": st.booleans(),
            "qualities": qualities, "limits": limits,
            "capabilities": st.fixed_dictionaries({}, optional=dict.fromkeys(sections["capabilities"], use)),
        },
    )  # fmt: skip
    package = st.fixed_dictionaries(
        {
            "name": texts.filter(bool),
            "credits": st.integers(1, 9),
            "price": st.integers(0, 9),
            "currency": st.just("usd"),
        },
        optional={"popular": st.booleans(), "discount_percent": st.integers(0, 99), "description": texts},
    )
    more = [{"capability": code, "price": draw(st.integers(0, 3))} for code in sections["capabilities"]]
    if more and sections["models"]:
        exact = st.sampled_from([{**more[0], "model": code, "price": 7} for code in sections["models"]])
        more += draw(st.lists(exact, max_size=2, unique_by=lambda rate: rate["model"]))
        more += draw(st.sampled_from([[], [{**more[0], "valid_from": "2030-05-05T05:05:05.123456Z", "price": 9}]]))
    return {
        **sections, "rates": more, "plans": draw(st.dictionaries(codes, plan, max_size=3)),
        "packages": draw(st.dictionaries(codes, package, max_size=2)),
    }  # fmt: skip


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(documents=st.lists(catalogues(), min_size=1, max_size=3))
def test_any_catalogues_one_after_the_other(conn: Connection[Any], documents: list[dict[str, Any]]) -> None:
    """Each is applied, exported and applied again, and never anything is left to change."""
    with conn.transaction(force_rollback=True):
        ledger = Ledger(conn)
        for document in documents:
            ledger.apply_catalog(document)
            assert ledger.apply_catalog(document) == []
            exported = ledger.conn.execute("select credits.get_catalog()::text as text").fetchone()
            assert exported
            assert ledger.rows("apply_catalog", catalog=exported[0]) == []
            ledger.now += DAY


def test_a_large_catalogue_applies_in_no_time(ledger: Ledger) -> None:
    models = [f"model{n}" for n in range(7)]
    capabilities = [f"capability{n}" for n in range(12)]
    qualities = {f"quality{n}": [models[n], models[n + 1], models[n + 2], models[n + 3]] for n in range(3)}
    catalog = {
        "capabilities": dict.fromkeys(capabilities), "models": dict.fromkeys(models),
        "quality_levels": dict.fromkeys(qualities),
        "plans": {
            f"plan{n}": {"name": f"Plan {n}", "capabilities": {code: {"qualities": qualities, "limits": [
                {"calls": 10, "per": "minute"}, {"credits": 10, "per": "month"}]} for code in capabilities}}
            for n in range(4)
        },
        "rates": [
            {"capability": code, "quality": quality, "price": n}
            for n, code in enumerate(capabilities)
            for quality in qualities
        ],
    }  # fmt: skip
    began = time.monotonic()
    assert ledger.apply_catalog(catalog)
    assert time.monotonic() - began < 4  # 0.3 s, but machines are busy
    assert ledger.apply_catalog(catalog) == []
    assert len(ledger.table("plan_qualities")) == 4 * 12 * 3 * 4


def test_catalogues_that_are_applied_at_once_wait_for_one_another(database: Database) -> None:
    def apply(which: str) -> Any:
        return lambda ledger: ledger.apply_catalog(changed(("plans.pro.name", which), ("rates.0.price", int(which))))

    with committed(database) as ledger:
        ledger.apply_catalog(changed(("plans.free", GONE), ("packages", {})))
        results = together(database, [apply(str(n)) for n in range(6)])
        assert all(isinstance(result, list) and result for result in results), results
        name = ledger.get_catalog()["plans"]["pro"]["name"]
        last = [rate for rate in ledger.get_catalog()["rates"] if rate["capability"] == "outline"]
        assert [flat(rate["price"]) for rate in last] == [int(name)]
        with ledger.as_owner():
            assert ledger.query(
                "select count(*) as rates, count(*) filter (where valid_from = '-infinity') as first"
                "  from credits.rates where capability = 'outline'"
            ) == [(7, 1)]


def test_an_account_can_be_opened_while_a_catalogue_is_applied(database: Database) -> None:
    with committed(database) as ledger, database.connect() as conn:
        ledger.apply_catalog(CATALOG)
        Client(conn).apply_catalog(changed(("plans.pro.monthly_credits", 7)))
        ledger.conn.execute("set lock_timeout = '2s'")
        ledger.open_account("alpha", plan="pro")


def test_who_may_apply_a_catalogue(shared: Database) -> None:
    with shared.connect("credits_user") as conn:
        for statement in ("select credits.apply_catalog('{}')", "select credits.get_catalog()"):
            with pytest.raises(psycopg.errors.InsufficientPrivilege):
                conn.execute(statement.encode())
            conn.rollback()
    with shared.connect("credits_service") as conn:
        assert conn.execute("select count(*) from credits.apply_catalog('{}')").fetchone() == (0,)
        assert conn.execute("select credits.get_catalog() ? 'plans'").fetchone() == (True,)


def test_the_demo_catalogue_is_one_and_leaves_what_is_there(ledger: Ledger) -> None:
    ledger.load_demo_catalog()
    catalog = ledger.get_catalog()
    assert differences(ledger, copy.deepcopy(json.loads(json.dumps(catalog, default=float)))) == []
    assert set(catalog["plans"]["free"]["capabilities"]) < set(catalog["plans"]["team"]["capabilities"])
    with ledger.unchanged():
        ledger.load_demo_catalog()
    ledger.change("update credits.plans set name = 'Ours' where code = 'team'")
    ledger.apply_catalog({"rates": catalog["rates"] + [{"capability": "cover", "quality": "best", "price": 1}]})
    with ledger.unchanged():
        ledger.load_demo_catalog()


def test_the_demo_does_not_touch_a_catalogue_of_ones_own(stored: Ledger) -> None:
    stored.apply_catalog({"plans": {**CATALOG["plans"], "team": {"name": "Ours"}}})
    stored.load_demo_catalog()
    catalog = stored.get_catalog()
    assert set(catalog["capabilities"]) == {"chapter", "outline"}
    assert catalog["plans"]["team"] == {"name": "Ours"}
