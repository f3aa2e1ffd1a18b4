"""Prices: what a document costs, proven against exact fractions; what is wrong with one; which rate is in force."""

import json
import re
from collections.abc import Callable
from datetime import datetime
from decimal import Decimal
from fractions import Fraction
from functools import partial
from math import ceil, floor
from pathlib import Path
from typing import Any

import pytest
from client import ours
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from ledger_support import DAY, NOON, TICK, refused
from psycopg import Connection
from psycopg.rows import namedtuple_row
from psycopg.types.json import Jsonb, set_json_loads

PAGE = (Path(__file__).resolve().parents[1] / "docs/prices.md").read_text()
BIG = Decimal("999999999999.999999")
OUTER = ("minimum", "maximum", "qualities", "models")
often = settings(
    max_examples=30, deadline=None, database=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@pytest.fixture
def db(owner: Connection[Any]) -> Connection[Any]:
    set_json_loads(partial(json.loads, parse_float=Decimal), owner)
    owner.row_factory = namedtuple_row
    return owner


def encode(value: Any) -> str:
    """JSON that keeps every digit of a Decimal."""
    match value:
        case Decimal():
            return format(value, "f")
        case dict():
            return "{" + ", ".join(f"{json.dumps(key)}: {encode(part)}" for key, part in value.items()) + "}"
        case list():
            return "[" + ", ".join(map(encode, value)) + "]"
    return json.dumps(value)


def ask(db: Connection[Any], text: str, *parameters: Any) -> list[Any]:
    """Rows of a query; an error of ours leaves the transaction usable."""
    given = [Jsonb(p, encode) if isinstance(p, dict | list) else p for p in parameters]
    with ours(), db.transaction():
        return db.execute(text.encode(), given).fetchall()


def price_all(db: Connection[Any], cases: list[Any]) -> list[Any]:
    """Amount and explanation of each case, and the amount of the way that does not explain."""
    return ask(
        db,
        "select p.amount, p.explanation,"
        "       credits._price_amount(n.price, c -> 'counts', c ->> 'quality', c ->> 'model') as plain"
        "  from jsonb_array_elements(%s) with ordinality e (c, number),"
        "       credits._normal_price(c -> 'price', 'unit') n (price),"
        "       credits._price(n.price, c -> 'counts', c ->> 'quality', c ->> 'model') p order by number",
        cases,
    )


def price(db: Connection[Any], document: Any, units: Any = None, quality: str | None = None) -> Any:
    """Amount and explanation of one price for a number of units."""
    counts = {} if units is None else units if isinstance(units, dict) else {"unit": Decimal(str(units))}
    (row,) = price_all(db, [{"price": document, "counts": counts, "quality": quality}])
    assert row.amount == row.plain
    assert str(row.amount) == format(row.amount.normalize(), "f"), "amounts are trimmed"
    return row


# The document, read a second time -----------------------------------------------------------------------------------


def rounded(amount: Fraction, rounding: str, decimals: int) -> Fraction:
    scaled = amount * 10**decimals
    whole: dict[str, Callable[[Fraction], int]] = {
        "down": floor,
        "up": ceil,
        "half_up": lambda x: floor(x + Fraction(1, 2)),
        "half_even": round,
    }
    return Fraction(whole[rounding](scaled), 10**decimals)


def tiers_cost(line: dict[str, Any], units: Fraction, per: Fraction) -> Fraction:
    cost, below = Fraction(0), Fraction(0)
    for tier in line["tiers"]:
        end = Fraction(tier["up_to"]) if "up_to" in tier else units
        if units > below and (line.get("mode", "graduated") == "graduated" or units <= end):
            taken = min(units, end) - below if line.get("mode", "graduated") == "graduated" else units
            cost += Fraction(tier["credits"]) * taken / per + Fraction(tier.get("flat", 0))
        below = end
    return cost


def line_amount(line: dict[str, Any], counts: dict[str, Any], multiplier: Fraction) -> Fraction:
    units = Fraction(counts.get(line.get("unit", "unit"), 0))
    per = Fraction(line.get("per", line.get("block", 1)))
    if "block" in line:
        units = ceil(units / per) * per
    if "flat" in line:
        cost = Fraction(line["flat"])
    elif "credits" in line:
        cost = Fraction(line["credits"]) * units / per
    else:
        cost = tiers_cost(line, units, per)
    return rounded(cost * multiplier, line.get("rounding", "half_up"), int(line.get("decimals", 6)))


def expected(case: dict[str, Any]) -> tuple[Fraction, list[Fraction]]:
    """Amount and lines of a case, in exact fractions."""
    document = case["price"] if isinstance(case["price"], dict) else {"flat": case["price"]}
    multiplier = Fraction(document.get("qualities", {}).get(case["quality"], 1))
    multiplier *= Fraction(document.get("models", {}).get(case["model"], 1))
    lines = [line_amount(line, case["counts"], multiplier) for line in document.get("lines", [document])]
    total = max(sum(lines, Fraction(0)), Fraction(document.get("minimum", 0)))
    return (min(total, Fraction(document["maximum"])) if "maximum" in document else total), lines


def numbers(low: int) -> st.SearchStrategy[Decimal]:
    """Mostly small ones, with decimals and with zeros at their end, up to the largest."""
    small, large = st.integers(low, 2000), st.integers(low, 10**18 - 1)
    digits = st.tuples(small, st.integers(0, 6)) | st.tuples(large, st.just(6))
    return digits.map(lambda pair: Decimal(pair[0]).scaleb(-pair[1]))


# Strategies are made once: making them takes far longer than drawing from them.
NUMBERS, SIZES = numbers(0), numbers(1)
UNITS = st.sampled_from(["unit", "a", "b"])
ROUNDINGS = st.sampled_from(["half_up", "half_even", "up", "down"])
DECIMALS = st.integers(0, 6)
ENDS = st.lists(SIZES, unique=True, max_size=4).map(sorted)
CHANCE, NUMBER_OF_LINES = st.integers(0, 3), st.integers(1, 3)
FACTORS = st.dictionaries(st.sampled_from(["best", "x"]), SIZES, max_size=2)
CODES = st.sampled_from([None, "best", "x"])
KINDS = st.sampled_from(["flat", "credits", "tiers", "tiers"])
MODES = st.sampled_from(["graduated", "volume"])


def draw_line(draw: st.DrawFn, *, volume: bool) -> dict[str, Any]:
    """A line of every kind."""

    def sometimes(key: str, values: st.SearchStrategy[Any]) -> dict[str, Any]:
        return {key: draw(values)} if draw(CHANCE) == 0 else {}

    kind = draw(KINDS)
    line = {**sometimes("unit", UNITS), **sometimes("rounding", ROUNDINGS), **sometimes("decimals", DECIMALS)}
    if kind == "tiers":
        ends = [*({"up_to": end} for end in draw(ENDS)), {}]
        line["tiers"] = [{**end, "credits": draw(NUMBERS), **sometimes("flat", NUMBERS)} for end in ends]
        line |= {"mode": draw(MODES)} if volume else {}
    else:
        line[kind] = draw(NUMBERS)
    return line if kind == "flat" else {**line, **(sometimes("per", SIZES) or sometimes("block", SIZES))}


@st.composite
def prices(draw: st.DrawFn, *, volume: bool = True) -> Any:
    """A price without problems, in each of its forms."""
    form = draw(st.integers(0, 9))
    if form == 0:
        return draw(NUMBERS)
    lines = [draw_line(draw, volume=volume) for _ in range(draw(NUMBER_OF_LINES))]
    price = lines[0] if form < 4 else {"lines": lines}
    price |= {key: draw(FACTORS) for key in ("qualities", "models") if draw(CHANCE) == 0}
    bounds = sorted([draw(NUMBERS), draw(NUMBERS)])
    return price | {key: n for key, n in zip(("minimum", "maximum"), bounds, strict=True) if draw(CHANCE) == 0}


def cases(*, volume: bool = True) -> st.SearchStrategy[list[dict[str, Any]]]:
    """A batch of prices with what they are asked for."""
    asked = {"price": prices(volume=volume), "counts": st.dictionaries(UNITS, NUMBERS)}
    return st.lists(st.fixed_dictionaries({**asked, "quality": CODES, "model": CODES}), min_size=1, max_size=12)


@often
@given(batch=cases())
def test_amounts_are_exact(db: Connection[Any], batch: list[dict[str, Any]]) -> None:
    for case, row in zip(batch, price_all(db, batch), strict=True):
        amount, amounts = expected(case)
        assert Fraction(row.amount) == amount
        assert row.plain == row.amount == row.explanation["amount"]
        assert [Fraction(line["amount"]) for line in row.explanation["lines"]] == amounts
        bound = {name: Fraction(row.explanation[name]) for name in OUTER if name in row.explanation}
        total = sum(amounts, Fraction(0))
        assert bound == {} if amount == total else {"minimum" if amount > total else "maximum": amount}


@often
@given(batch=cases(volume=False), more=NUMBERS)
def test_more_units_never_cost_less_but_by_volume(
    db: Connection[Any], batch: list[dict[str, Any]], more: Decimal
) -> None:
    further = [{**case, "counts": {u: case["counts"].get(u, 0) + more for u in ("unit", "a", "b")}} for case in batch]
    for before, after in zip(price_all(db, batch), price_all(db, further), strict=True):
        assert before.amount <= after.amount


@often
@given(batch=st.lists(prices(), min_size=1, max_size=12))
def test_the_canonical_form_says_the_same_and_is_its_own(db: Connection[Any], batch: list[Any]) -> None:
    rows = ask(
        db,
        "select c.price, credits._normal_price(c.price, 'other') as again,"
        "       array(select p::text from credits._price_problems(p.given, '[]') p"
        "             union all select p::text from credits._price_problems(c.price, '[]') p) as problems"
        "  from jsonb_array_elements(%s) with ordinality p (given, number),"
        "       credits._normal_price(p.given, 'unit') c (price) order by p.number",
        batch,
    )
    asked = {"counts": {"unit": Decimal(7), "a": Decimal("0.5")}, "quality": "best", "model": "x"}
    for document, row in zip(batch, rows, strict=True):
        assert row.problems == []
        assert row.again == row.price
        assert set(row.price) <= {"lines", *OUTER}
        assert all({"unit", "rounding", "decimals"} <= set(line) for line in row.price["lines"])
        assert all("mode" in line for line in row.price["lines"] if "tiers" in line)
        assert expected({"price": row.price, **asked}) == expected({"price": document, **asked})


def test_the_canonical_form(db: Connection[Any]) -> None:
    def normal(text: str) -> Any:
        return ask(db, "select credits._normal_price(%s::jsonb, 'word')::text as price", text)[0].price

    filled = '"unit": "word", "decimals": 6, "rounding": "half_up"'
    assert normal("50.00") == f'{{"lines": [{{"flat": 50, {filled}}}]}}'
    assert normal('{"credits": 1.50, "per": 10.0, "minimum": 2.0, "qualities": {"best": 2.50}, "models": {}}') == (
        '{"lines": [{"per": 10, "unit": "word", "credits": 1.5, "decimals": 6, "rounding": "half_up"}], '
        '"minimum": 2, "qualities": {"best": 2.5}}'
    )
    assert json.loads(normal('{"unit": "page", "tiers": [{"credits": 1.0}], "decimals": 2.0}')) == {
        "lines": [
            {"tiers": [{"credits": 1}], "mode": "graduated", "unit": "page", "decimals": 2, "rounding": "half_up"}
        ]
    }


# Boundaries ---------------------------------------------------------------------------------------------------------

TIERS = [{"up_to": 100, "credits": 3}, {"up_to": 1000, "credits": 2}, {"credits": 1}]
FLAT_TIERS = [{"up_to": 10, "credits": 0, "flat": 5}, {"up_to": 20, "credits": 1, "flat": 7}, {"credits": 0}]
TICKS = Decimal("0.000001")
BOUNDARIES: dict[str, tuple[Any, dict[Any, Any]]] = {
    "flat": (50, {None: 50, 0: 50, 1: 50, "999999999999.999999": 50}),
    "free": (0, {0: 0, 7: 0}),
    "per unit": ({"credits": "0.5"}, {None: 0, 0: 0, "0.000001": "0.000001", 1: "0.5", 3: "1.5"}),
    "per units": ({"credits": 3, "per": 10**6}, {0: 0, 1: "0.000003", 999999: "2.999997", 10**6: 3, 1500000: "4.5"}),
    "block": (
        {"credits": 1, "block": 10},
        {0: 0, "0.000001": 1, "9.999999": 1, 10: 1, "10.000001": 2, 1005: 101, 1010: 101, 1011: 102},
    ),
    "fraction of a block": ({"credits": 1, "block": "0.1"}, {0: 0, "0.1": 1, "0.100001": 2, "0.3": 3}),
    "graduated": ({"tiers": TIERS}, {0: 0, 1: 3, 99: 297, 100: 300, 101: 302, 1000: 2100, 1001: 2101, 1005: 2105}),
    "volume": (
        {"tiers": TIERS, "mode": "volume"},
        {0: 0, 1: 3, "99.5": "298.5", 100: 300, "100.5": 201, 101: 202, 1000: 2000, 1001: 1001},
    ),
    "graduated, flat": ({"tiers": FLAT_TIERS}, {0: 0, "0.000001": 5, 10: 5, "10.5": "12.5", 20: 22, 21: 22}),
    "volume, flat": (
        {"tiers": FLAT_TIERS, "mode": "volume"},
        {0: 0, "0.000001": 5, 10: 5, "10.5": "17.5", 20: 27, 21: 0},
    ),
    "tiers of blocks": (
        {"tiers": [{"up_to": 20, "credits": 3, "flat": 1}, {"credits": 1, "flat": 100}], "block": 10},
        {0: 0, 1: 4, 10: 4, 11: 7, 20: 7, "20.000001": 108, 30: 108, 31: 109},
    ),
    "a tier ends within a block": (
        {"tiers": [{"up_to": 15, "credits": 4}, {"credits": 2}], "block": 10},
        {10: 4, 11: 7, 20: 7, 21: 9},
    ),
    "tiers per units": (
        {"tiers": [{"up_to": 1000, "credits": 5, "flat": 1}, {"credits": 1}], "per": 1000},
        {0: 0, 500: "3.5", 1000: 6, 1001: "6.001"},
    ),
    "minimum": ({"credits": 1, "minimum": 5}, {0: 5, 4: 5, 5: 5, "5.000001": "5.000001"}),
    "maximum": ({"credits": 1, "maximum": 5}, {0: 0, "4.999999": "4.999999", 5: 5, "5.000001": 5, 10**9: 5}),
    "always the same": ({"credits": 1, "minimum": 5, "maximum": 5}, {0: 5, 5: 5, 6: 5}),
    "half_up": (
        {"credits": 1, "decimals": 0},
        {0: 0, "0.499999": 0, "0.5": 1, "1.499999": 1, "1.5": 2, "2.5": 3, "2.500001": 3},
    ),
    "half_even": (
        {"credits": 1, "decimals": 0, "rounding": "half_even"},
        {0: 0, "0.5": 0, "0.500001": 1, "1.499999": 1, "1.5": 2, "2.499999": 2, "2.5": 2, "2.500001": 3, "3.5": 4},
    ),
    "up": ({"credits": 1, "decimals": 0, "rounding": "up"}, {0: 0, "0.000001": 1, 1: 1, "1.000001": 2}),
    "down": ({"credits": 1, "decimals": 0, "rounding": "down"}, {0: 0, "0.999999": 0, 1: 1, "1.999999": 1}),
    "ties of a quotient": ({"credits": 1, "per": 8, "decimals": 2}, {1: "0.13", 3: "0.38", 5: "0.63"}),
    "even ties of a quotient": (
        {"credits": 1, "per": 8, "decimals": 2, "rounding": "half_even"},
        {1: "0.12", 3: "0.38", 5: "0.62"},
    ),
    "thirds": ({"credits": 1, "per": 3}, {1: "0.333333", 2: "0.666667", 3: 1}),
    "thirds up": ({"credits": 1, "per": 3, "decimals": 1, "rounding": "up"}, {1: "0.4", 2: "0.7", 3: 1}),
    "large": ({"credits": BIG}, {1: BIG, "999999999999.999999": "999999999999999998000000"}),
}  # fmt: skip


def exact(value: Any) -> Any:
    """Numbers that a table writes as text."""
    match value:
        case str() if re.fullmatch(r"[\d.]+", value):
            return Decimal(value)
        case dict():
            return {key: exact(part) for key, part in value.items()}
    return value


@pytest.mark.parametrize("name", BOUNDARIES)
def test_boundaries(db: Connection[Any], name: str) -> None:
    document, amounts = BOUNDARIES[name]
    document = exact(document)
    assert {units: price(db, document, units).amount for units in amounts} == {
        units: Decimal(str(amount)) for units, amount in amounts.items()
    }


def test_multipliers_come_before_the_one_rounding(db: Connection[Any]) -> None:
    document = {
        "lines": [{"flat": Decimal("0.4"), "decimals": 0}, {"credits": 1, "per": 3, "decimals": 0, "unit": "word"}],
        "qualities": {"best": 3}, "models": {"large": Decimal("1.5")}, "minimum": 1, "maximum": 9,
    }  # fmt: skip
    asked = {"price": document, "counts": {"word": 2}}
    rows = price_all(
        db,
        [
            {**asked, "quality": quality, "model": model}
            for quality in (None, "best", "other")
            for model in (None, "large", "other")
        ],
    )
    # The lines are 0.4 and 0.666666, times 1, 1.5, 3 and 4.5: rounded 0 + 1, 1 + 1, 1 + 2, 2 + 3.
    assert [int(row.amount) for row in rows] == [1, 2, 1, 3, 5, 3, 1, 2, 1]
    assert [row.explanation["lines"][1]["multiplier"] for row in rows[:5]] == [1, Decimal("1.5"), 1, 3, Decimal("4.5")]


def test_a_price_explains_itself(db: Connection[Any]) -> None:
    row = price(db, {"lines": [{"flat": 2}, {"credits": 1, "block": 10}], "minimum": 200, "qualities": {"q": 1}}, 1005)
    rounding = {"multiplier": 1, "rounding": "half_up", "decimals": 6}
    assert row.explanation == {
        "lines": [
            {"flat": 2, **rounding, "amount": 2},
            {"unit": "unit", "units": 1005, "billed": 1010, "credits": 1, "block": 10, **rounding, "amount": 101},
        ],
        "minimum": 200,
        "amount": 200,
    }
    row = price(db, {"tiers": TIERS, "unit": "word", "decimals": 0, "maximum": 100}, {"word": 150})
    assert row.explanation == {
        "lines": [
            {
                "unit": "word", "units": 150, "billed": 150, "mode": "graduated", **rounding, "decimals": 0,
                "tiers": [{**tier, "units": units} for tier, units in zip(TIERS, (100, 50, 0), strict=True)],
                "amount": 400,
            }
        ],
        "maximum": 100,
        "amount": 100,
    }  # fmt: skip
    row = price(db, {"tiers": TIERS, "mode": "volume"}, 150)
    assert [tier["units"] for tier in row.explanation["lines"][0]["tiers"]] == [0, 150, 0]


def test_the_figures_of_the_manual(db: Connection[Any]) -> None:
    rows = re.findall(r"^\| `(.+?)` \| `(.+?)` \| (\S*) \| (\S+) \|", PAGE, re.MULTILINE)
    assert len(rows) > 20
    for document, counts, level, amount in rows:
        (row,) = ask(
            db,
            "select p.amount, array(select x.problem from credits._price_problems(%s::jsonb, '[]') x) as problems"
            "  from credits._price(credits._normal_price(%s::jsonb, 'words'), %s::jsonb, %s, %s) p",
            document, document, counts if counts[0] == "{" else f'{{"words": {counts}}}', level or None, level or None,
        )  # fmt: skip
        assert (format(row.amount, ","), row.problems) == (amount, []), document


def test_the_explanation_of_the_manual(db: Connection[Any]) -> None:
    (document,) = re.findall(r"^The price `(.*)` of 1005 words:$", PAGE, re.MULTILINE)
    (shown,) = re.findall(r"```json\n(.*?)```", PAGE, re.DOTALL)
    text = "select (credits._price(credits._normal_price(%s::jsonb, 'words'), '{\"words\": 1005}', null, null)).*"
    assert ask(db, text, document)[0].explanation == json.loads(shown)
    number, canonical = re.findall(r"canonical form.*`(\d+)` becomes\s`(.*?)`", PAGE, re.DOTALL)[0]
    (row,) = ask(db, "select credits._normal_price(%s::jsonb, 'words') as price", number)
    assert row.price == json.loads(canonical)


# Problems -----------------------------------------------------------------------------------------------------------

T = {"credits": 1}
PROBLEMS: list[tuple[Any, list[list[Any]]]] = [
    *((value, [[]]) for value in (None, True, "50", [], [50], -1, BIG + TICKS, Decimal("0.0000001"), 10**12)),
    ({}, [[]]),
    ({"minimum": 1}, [[]]),
    ({"lines": []}, [["lines"]]),
    ({"lines": {}}, [["lines"]]),
    ({"lines": None}, [["lines"]]),
    ({"lines": [50, T, None]}, [["lines", 0], ["lines", 2]]),
    ({"lines": [T], "credits": 1}, [["credits"]]),
    ({"lines": [T], "unit": "word"}, [["unit"]]),
    ({"lines": [{**T, "minimum": 1}]}, [["lines", 0, "minimum"]]),
    ({"lines": [{**T, "per": 0}]}, [["lines", 0, "per"]]),
    ({"lines": [{"flat": 1}, {**T, "lines": [T]}]}, [["lines", 1, "lines"]]),
    ({"flat": 1, "credits": 1}, [[]]),
    ({"lines": [{"flat": 1, "credits": 1}, {"unit": "word"}]}, [["lines", 0], ["lines", 1]]),
    ({"price": 1, "credits": 1}, [["price"]]),
    ({"credits": "1"}, [["credits"]]),
    ({"credits": None}, [["credits"]]),
    ({"credits": -1}, [["credits"]]),
    ({"flat": Decimal("1.0000001")}, [["flat"]]),
    ({"flat": 10**12}, [["flat"]]),
    ({**T, "per": 0}, [["per"]]),
    ({**T, "per": -5}, [["per"]]),
    ({**T, "block": "10"}, [["block"]]),
    ({**T, "block": 10, "per": 10}, [["block"]]),
    ({"flat": 1, "block": 10, "mode": "volume", "per": 1}, [["block"], ["block"], ["mode"], ["per"]]),
    ({**T, "mode": "volume"}, [["mode"]]),
    ({"tiers": [T], "mode": "both"}, [["mode"]]),
    ({**T, "rounding": "floor"}, [["rounding"]]),
    ({**T, "rounding": None}, [["rounding"]]),
    ({**T, "decimals": 7}, [["decimals"]]),
    ({**T, "decimals": -1}, [["decimals"]]),
    ({**T, "decimals": Decimal("1.5")}, [["decimals"]]),
    ({**T, "decimals": "2"}, [["decimals"]]),
    ({**T, "unit": ""}, [["unit"]]),
    ({**T, "unit": 5}, [["unit"]]),
    ({**T, "unit": "x" * 201}, [["unit"]]),
    ({**T, "minimum": -1}, [["minimum"]]),
    ({**T, "minimum": 6, "maximum": 5}, [["minimum"]]),
    ({**T, "minimum": 6, "maximum": "5"}, [["maximum"]]),
    ({**T, "qualities": {"best": 0}}, [["qualities", "best"]]),
    ({**T, "models": {"a": -1, "b": 1, "c": "2", "d": Decimal("1.0000001")}}, [["models", x] for x in "acd"]),
    ({**T, "qualities": []}, [["qualities"]]),
    ({**T, "models": None}, [["models"]]),
    ({"lines": [T], "models": {"a": None}}, [["models", "a"]]),
    ({"tiers": []}, [["tiers"]]),
    ({"tiers": 5}, [["tiers"]]),
    ({"tiers": [5]}, [["tiers", 0]]),
    ({"tiers": [None, T]}, [["tiers", 0]]),
    ({"tiers": [{"flat": 1}]}, [["tiers", 0, "credits"]]),
    ({"tiers": [{**T, "up_to": 10}]}, [["tiers", 0, "up_to"]]),
    ({"tiers": [T, T]}, [["tiers", 0, "up_to"]]),
    ({"tiers": [{**T, "up_to": 10}, {**T, "up_to": 10}, T]}, [["tiers", 1, "up_to"]]),
    ({"tiers": [{**T, "up_to": 0}, T]}, [["tiers", 0, "up_to"]]),
    ({"tiers": [{**T, "up_to": 10}, {**T, "up_to": "x"}, {**T, "to": 1}]}, [["tiers", 1, "up_to"], ["tiers", 2, "to"]]),
    ({"lines": [T, {"tiers": [{"credits": -1}]}]}, [["lines", 1, "tiers", 0, "credits"]]),
    ({"tiers": [{"credits": 1, "flat": -1}]}, [["tiers", 0, "flat"]]),
]  # fmt: skip


def problems(db: Connection[Any], document: Any, path: list[Any]) -> list[Any]:
    """Problems of a document, which a parameter would make SQL's null where it is JSON's."""
    return ask(
        db,
        "select p.* from jsonb_array_elements(%s) d, credits._price_problems(d, %s) p order by p.path, p.problem",
        [document],
        path,
    )


@pytest.mark.parametrize(("document", "paths"), PROBLEMS, ids=lambda value: encode(value)[:60])
def test_problems(db: Connection[Any], document: Any, paths: list[list[Any]]) -> None:
    found = problems(db, document, ["rates", 3, "price"])
    assert sorted((row.path for row in found), key=str) == sorted((["rates", 3, "price", *p] for p in paths), key=str)
    assert all(re.fullmatch(r"[A-Z].+\.", row.problem) for row in found)


def test_problems_say_what_is_asked_for(db: Connection[Any]) -> None:
    known = "block, credits, decimals, flat, maximum, minimum, mode, models, per, qualities, rounding, tiers, unit"
    found = problems(db, {"price": 1, "flat": -1, "decimals": 9}, [])
    assert [(row.path, row.problem) for row in found] == [
        (["decimals"], "A whole number from 0 to 6."),
        (["flat"], "A number from 0 to below 1e12 with at most 6 decimals."),
        (["price"], f"Not known here. Known are {known}."),
    ]
    assert ask(db, "select count(*) as n from credits._price_problems(null, '[]')")[0].n == 1


KEYS = st.sampled_from(
    [*OUTER, "lines", "flat", "credits", "per", "block", "tiers", "mode", "up_to", "unit", "rounding", "decimals", "x"]
)
LEAVES = (
    st.none() | st.booleans() | st.integers(-2, 12) | st.integers(-(10**400), 10**400) | NUMBERS
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.sampled_from(["half_up", "volume", "word", "", "1", "1e999999"])
    | st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=3)
)  # fmt: skip
ANYTHING = st.recursive(
    LEAVES,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=5),
    max_leaves=12,
)


@often
@given(batch=st.lists(ANYTHING | st.dictionaries(KEYS, ANYTHING), min_size=1, max_size=20))
def test_no_json_makes_it_raise(db: Connection[Any], batch: list[Any]) -> None:
    """Neither looking for problems, nor pricing what has none."""
    ask(
        db,
        "select case when p.n = 0 then credits._price(credits._normal_price(d, 'word'), '{\"word\": 7}', 'x', 'x') end"
        "  from jsonb_array_elements(%s) d,"
        "       lateral (select count(*) from credits._price_problems(d, '[]')) p (n)",
        batch,
    )


@pytest.mark.parametrize("number", ["1e100000", "-1e100000", "1e-16000", "1e131071"])
def test_huge_numbers_are_problems(db: Connection[Any], number: str) -> None:
    for document in (f'{{"lines": [{{"tiers": [{{"up_to": {number}, "credits": 1}}, {{"credits": 1}}]}}]}}', number):
        assert ask(db, "select count(*) as n from credits._price_problems(%s::jsonb, '[]')", document)[0].n > 0


# Counts -------------------------------------------------------------------------------------------------------------


def counts(db: Connection[Any], units: Any = None, unit_counts: Any = None) -> Any:
    """Counts of a capability that counts words."""
    return ask(db, "select credits._counts('word', %s, %s)::text as counts", units, unit_counts)[0].counts


def test_counts(db: Connection[Any]) -> None:
    assert counts(db) == "{}"
    assert counts(db, Decimal(0)) == '{"word": 0}'
    assert counts(db, Decimal("5.50")) == '{"word": 5.5}'
    assert counts(db, BIG) == '{"word": 999999999999.999999}'
    assert counts(db, None, {}) == "{}"
    assert counts(db, None, {"in": Decimal("1.0"), "out": 0}) == '{"in": 1, "out": 0}'


@pytest.mark.parametrize("units", ["-0.000001", "1000000000000", "0.0000001", "NaN", "Infinity", "-Infinity"])
def test_units_are_amounts(db: Connection[Any], units: str) -> None:
    with refused(422, "invalid_amount", unit="word", units=units):
        counts(db, Decimal(units))
    if Decimal(units).is_finite():
        with refused(422, "invalid_amount", unit="in", units=units):
            counts(db, None, {"in": Decimal(units)})


@pytest.mark.parametrize("unit_counts", [[], [{}], Jsonb("in"), Jsonb(5), Jsonb(None), {"in": "5"}, {"in": None}])
def test_unit_counts_are_numbers_by_name(db: Connection[Any], unit_counts: Any) -> None:
    with refused(400, "invalid_request", argument="unit_counts"):
        counts(db, None, unit_counts)


def test_units_are_given_in_one_way(db: Connection[Any]) -> None:
    for unit_counts in ({}, {"word": 5}):
        with refused(400, "invalid_request", argument="unit_counts"):
            counts(db, Decimal(5), unit_counts)


TOKENS = {"lines": [{"flat": 1}, *({"credits": 1, "unit": unit} for unit in ("out", "in", "in"))]}


@pytest.mark.parametrize(
    ("document", "asked", "unknown"),
    [(TOKENS, {}, []), (TOKENS, {"in": 1, "page": 0}, ["page"]), ({"credits": 1}, {}, []), (5, {"page": 1}, ["page"])],
)
def test_counts_that_a_price_cannot_use(db: Connection[Any], document: Any, asked: Any, unknown: list[str]) -> None:
    units = ["in", "out"] if document == TOKENS else ["word"]
    with refused(400, "invalid_request", units=units, unknown=unknown):
        check_counts(db, document, asked)


@pytest.mark.parametrize(
    ("document", "asked"),
    [(TOKENS, {"in": 1}), (TOKENS, {"in": 0, "out": 2}), (TOKENS, {"word": 1}), (5, {}), (5, {"word": 7}),
     ({"credits": 1}, {"word": 0}), ({"flat": 1, "unit": "page"}, {"page": 1})],
)  # fmt: skip
def test_counts_that_a_price_can_use(db: Connection[Any], document: Any, asked: Any) -> None:
    assert check_counts(db, document, asked) == asked


def check_counts(db: Connection[Any], document: Any, asked: Any) -> Any:
    text = "select credits._check_counts(credits._normal_price(%s::jsonb, 'word'), %s) as counts"
    return ask(db, text, encode(document), asked)[0].counts


# Rates --------------------------------------------------------------------------------------------------------------


@pytest.fixture
def rates(db: Connection[Any]) -> Connection[Any]:
    db.execute("insert into credits.capabilities (code, name) values ('write', 'Write'), ('draw', 'Draw')")
    db.execute("insert into credits.quality_levels (code, name) values ('best', 'Best'), ('fast', 'Fast')")
    db.execute("insert into credits.models (code, name) values ('large', 'Large'), ('small', 'Small')")
    return db


def add_rate(db: Connection[Any], flat: int, *key: str | None, since: datetime = NOON, until: Any = None) -> None:
    """A rate of write; its flat price tells which one it is."""
    db.execute(
        "insert into credits.rates (capability, quality, model, valid_from, valid_until, price)"
        " values ('write', %s, %s, %s, coalesce(%s, timestamptz 'infinity'), credits._normal_price(%s, 'word'))",
        [*key, since, until, Jsonb(flat)],
    )


def rate(db: Connection[Any], quality: str | None, model: str | None, at: datetime = NOON, of: str = "write") -> Any:
    (row,) = ask(db, "select r.price from credits._rate(%s, %s, %s, %s) r", of, quality, model, at)
    return row.price and row.price["lines"][0]["flat"]


def test_the_most_specific_rate_is_in_force(rates: Connection[Any]) -> None:
    calls = [(quality, model) for quality in ("best", "fast", None) for model in ("large", "small", None)]
    expected: list[int | None] = [None] * 9
    for flat, key, new in [
        (1, (None, None), range(9)),
        (2, ("best", None), (0, 1, 2)),
        (3, (None, "large"), (0, 3, 6)),
        (4, ("best", "large"), (0,)),
    ]:
        assert [rate(rates, *call) for call in calls] == expected
        add_rate(rates, flat, *key)
        expected = [flat if number in new else old for number, old in enumerate(expected)]
    assert [rate(rates, *call) for call in calls] == expected
    assert rate(rates, None, None, of="draw") is None
    assert rate(rates, "best", "large", NOON - TICK) is None


def test_a_rate_ends_where_the_next_of_its_key_begins(rates: Connection[Any]) -> None:
    add_rate(rates, 1, None, None)
    add_rate(rates, 2, "best", None, since=NOON + DAY)
    add_rate(rates, 3, "best", None, since=NOON + 2 * DAY, until=NOON + 3 * DAY)
    add_rate(rates, 4, "best", None, since=NOON + 4 * DAY)
    begins = {0: 1, 1: 2, 2: 3, 3: 1, 4: 4}  # on the third day the second one does not come again
    for day, flat in begins.items():
        assert rate(rates, "best", "small", NOON + day * DAY) == flat
        assert rate(rates, "best", "small", NOON + (day + 1) * DAY - TICK) == flat
        assert rate(rates, "fast", None, NOON + day * DAY) == 1


def test_a_rate_of_all_time(rates: Connection[Any]) -> None:
    rates.execute("insert into credits.rates (capability, price) values ('write', credits._normal_price('9', 'word'))")
    assert rate(rates, None, None, datetime.min.replace(tzinfo=NOON.tzinfo)) == 9


@given(st.data())
@settings(often, max_examples=20)
def test_rates_against_a_model(rates: Connection[Any], data: st.DataObject) -> None:
    key = st.tuples(st.sampled_from([None, "best", "fast"]), st.sampled_from([None, "large", "small"]))
    listed = data.draw(st.lists(st.tuples(key, st.integers(0, 4), st.integers(1, 5)), max_size=15))
    assume(len({row[:2] for row in listed}) == len(listed))
    rates.execute("delete from credits.rates")
    for number, ((quality, model), start, length) in enumerate(listed):
        since = NOON + start * DAY
        add_rate(rates, number, quality, model, since=since, until=since + length * DAY if length < 5 else None)
    for _ in range(5):
        (quality, model), day = data.draw(key), data.draw(st.integers(0, 6))
        latest = {k: max(s for o, s, _ in listed if o == k and s <= day) for k, s, _ in listed if s <= day}
        live = [
            ((k[1] is not None, k[0] is not None), number)
            for number, (k, start, length) in enumerate(listed)
            if latest.get(k) == start and (length == 5 or day < start + length) and k[0] in {None, quality}
            and k[1] in {None, model}
        ]  # fmt: skip
        assert rate(rates, quality, model, NOON + day * DAY) == (max(live)[1] if live else None)
