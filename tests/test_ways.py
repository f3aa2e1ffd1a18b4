"""The verbs, and the job that ends grants, do the usual case in few statements and all else the general way.

Both ways write the same.
"""

from collections.abc import Callable
from decimal import Decimal
from random import Random
from typing import Any

import pytest
from client import CreditsError
from ledger_support import DAY, HOUR, MINUTE, SECOND, Ledger, assert_sound
from psycopg import Connection
from psycopg.types.json import Jsonb

WRITTEN_BY_THE_CLOCK = ("capabilities", "quality_levels", "models", "plans", "rates", "settings")
Work = Callable[[Ledger, int], list[str]]
GENERAL_ONLY = """
    create or replace function credits._is_plain(balance credits.balances) returns boolean language sql
    as $$ select false $$
"""
TOGETHER = """
    select cardinality(credits._try_together(array(
             select g.account_id from unnest(credits._next_due(null, null, 1000)) g))) as accounts
"""
RESTART = """
    do $$ declare v_name text; begin
      for v_name in select c.relname from pg_class c
                     where c.relnamespace = 'credits'::regnamespace and c.relkind = 'S' loop
        execute format('alter sequence credits.%%I restart with 1000000', v_name);
      end loop;
    end $$
"""
ONE_BY_ONE = """
    create or replace function credits._try_together(account_ids text[]) returns text[] language sql
    as $$ select '{}'::text[] $$
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


LIMITS = [
    {"calls": 4, "per": "hour"},
    {"units": 2500, "per": "month"},
    {"credits": 15, "per": "month"},
    {"calls": 8, "per": "day"},
]
PRICES: dict[str, Any] = {
    "words": {"credits": 0.01, "qualities": {"best": 2}},
    "song": 3,
    "image": {"credits": 1, "block": 10},
    "chat": {"lines": [{"unit": "tokens", "credits": 0.1}, {"unit": "answers", "credits": 1}]},
    "talk": {"lines": [{"flat": 1}, {"unit": "seconds", "credits": 0.5}], "minimum": 4},
    "film": {"tiers": [{"up_to": 15, "credits": 0.2}, {"credits": 0.1, "flat": 1}], "mode": "graduated", "maximum": 20},
    "free": 0,
}


def catalogue(more: float) -> dict[str, Any]:
    """Prices of all kinds; words are limited, songs in a rolling window, and the small plan as a whole."""
    limits = {"words": LIMITS, "chat": LIMITS[1:], "song": [{"calls": 2, "per": "hour", "rolling": True}]}
    offered = {
        name: {"qualities": {"good": ["tiny"], "best": ["large"]}, "limits": limits.get(name, [])} for name in PRICES
    }
    return {
        "capabilities": {name: {"name": name, "unit": "tokens"} for name in PRICES},
        "quality_levels": {"good": {"name": "Good", "display_order": 1}, "best": {"name": "Best", "display_order": 2}},
        "models": {"tiny": {"name": "Tiny"}, "large": {"name": "Large"}},
        "plans": {
            "big": {"name": "Big", "capabilities": offered},
            "small": {
                "name": "Small", "is_default": True, "limits": [{"calls": 4, "per": "day"}],
                "capabilities": {name: {} for name in ("image", "chat", "free")},
            },
        },
        "rates": [
            {"capability": name, "price": price | {"credits": more} if name == "words" else price}
            for name, price in PRICES.items()
        ],
    }  # fmt: skip


def team(ledger: Ledger) -> list[str]:
    """Five accounts that may use something."""
    ledger.rows("apply_catalog", catalog=Jsonb(catalogue(0.01)))
    names = ["plain", "many", "scoped", "poor", "none"]
    for name in names:
        ledger.open_account(
            name, plan=None if name == "none" else "big", kind="organization" if name == "many" else "user"
        )
    ledger.open("plain", 500)
    ledger.open("many", 5, Decimal("7.25"), 9, 400, expires_at=ledger.now + 2 * HOUR)
    ledger.open("scoped", 200)
    ledger.grant(50, "scoped", scope=["song", "words"])
    ledger.open("poor", 12)
    ledger.open("none", 300)
    ledger.set_debt_limit("poor", 30)
    ledger.set_low_balance_alert("plain", 499)
    ledger.set_member("many", "m1", monthly_limit=60)
    return names


def question(random: Random) -> dict[str, Any]:
    """What a use is asked for, mostly what the plan has."""
    counted = random.choice(
        ({}, {"seconds": 2}, {"tokens": 1.50}, {"tokens": "1"}, {"tokens": 1e-7}, {"answers": 0}, [{"tokens": 1}])
    )
    several = {"tokens": random.choice((1, 20)), "answers": 2}
    counts = {"unit_counts": Jsonb(random.choice((several, several, several, counted)))}
    both = random.choice(({}, counts))
    return {
        "capability": random.choice((*PRICES, "words", "words", "chat", "song", "other")),
        "units": random.choice((1, 1, 10, 10, 100, Decimal("250.50"), None, None, 0, 2000, Decimal("0.0000001"))),
        **random.choice(({}, {}, {"quality": "good"}, {"quality": "best", "model": "large"}, {"model": "tiny"})),
        **random.choice(({}, {}, {}, {"member_id": random.choice(("m1", "m2"))}, {**counts, "units": None}, both)),
    }


def use(ledger: Ledger, seed: int) -> list[str]:
    """Uses of what a plan has and has not, with room and without, and the ends of them."""
    random = Random(seed)
    names = team(ledger)
    held = [("plain", "k0")]
    answers = []
    for i in range(120):
        ledger.now += random.choice((SECOND, SECOND, MINUTE, 9 * MINUTE))
        account_id, key, asked = (
            random.choice((*names, "plain")),
            f"k{random.choice((i, i, i, i - 3))}",
            question(random),
        )
        told = {name: value for name, value in asked.items() if name in {"units", "unit_counts"}}
        said = random.choice(({}, {}, {"ttl": 4 * MINUTE, "metadata": {"a": 1}}, {"rate_id": 1000000 + i % 6}))
        policy = random.choice(({}, {}, {"on_overage": "overflow"}, {"on_overage": "reject", "metadata": {"b": 2}}))
        match random.choice(("check", *["use"] * 4, *["settle"] * 3, "again", "rest")):
            case "check":
                answers.append(outcome(ledger.check_access, account_id, **asked))
            case "use":
                answers.append(
                    outcome(ledger.authorize_usage, account_id, usage_id=key, subject="book:1", **asked, **said)
                )
                held += [(account_id, key)] if answers[-1].startswith("Row") else []
            case "settle":
                answers.append(outcome(ledger.settle_usage, *held[-1], **told, **policy))
            case "again":
                answers.append(outcome(ledger.settle_usage, *random.choice(held), **told, **policy))
            case "rest":
                answers.append(outcome(ledger.capture, *held[-1], 1, key=key))
                answers.append(outcome(random.choice((ledger.release, ledger.extend)), *random.choice(held)))
                random.choice((ledger.freeze_account, *[ledger.unfreeze_account] * 4))(account_id)
                ledger.unfreeze_account(random.choice(names))
                ledger.rows("apply_catalog", catalog=Jsonb(catalogue(random.choice((0.01, 0.01, 0.01, 0.02)))))
    return answers


@pytest.mark.parametrize(("work", "seed"), [(work, 0), (work, 1), (work, 2), (use, 0), (use, 1)])
def test_the_usual_case_and_the_general_way_write_the_same(conn: Connection[Any], work: Work, seed: int) -> None:
    runs = []
    for preparation in ("select", GENERAL_ONLY):
        with conn.transaction(force_rollback=True):
            ledger = Ledger(conn)
            ledger.change(RESTART)
            ledger.change(preparation)
            runs.append((work(ledger, seed), ledger.snapshot()))
            assert ledger.list_notifications(kind="low_balance")
            assert_sound(ledger)
    (answers, tables), (general_answers, general_tables) = runs
    assert answers == general_answers
    assert tables == general_tables | {name: tables[name] for name in WRITTEN_BY_THE_CLOCK}


def test_uses_of_any_price_that_limits_leave_go_the_usual_way(conn: Connection[Any]) -> None:
    ledger = Ledger(conn)
    team(ledger)
    ledger.open_account("rich", plan="big")
    ledger.grant(1000, "rich")
    ledger.change("drop function credits._lock_account")  # with which each general way begins
    several = {"unit_counts": Jsonb({"tokens": 20, "answers": 2})}
    seconds = {"unit_counts": Jsonb({"seconds": 2.50})}
    tokens = {"units": Decimal("20.50")}
    told: dict[str, dict[str, Any]] = {
        "words": tokens,
        "chat": several,
        "talk": seconds,
        "film": tokens,
        "image": tokens,
    }
    charged = {}
    for name, how in told.items():
        ledger.authorize_usage("rich", capability=name, usage_id=name, **how)
        charged[name] = ledger.settle_usage("rich", name, **how).charged
    assert charged == {"words": Decimal("0.205"), "chat": 4, "talk": 4, "film": Decimal("4.55"), "image": 3}


def leave_alone(ledger: Ledger, random: Random) -> None:
    """Accounts of all kinds with grants that end at moments of their own: on most of them nothing else falls due."""
    moment = iter(random.sample(range(1, 100_000), 1000))  # ids of what booking makes are in the order of what was due
    kinds: list[dict[str, Any]] = [{}, {}, {}, {"kind": "plan"}, {"kind": "purchase", "description": "for you | me"}]
    for number in range(50):
        name, start = f"a{number:02}", ledger.now
        ledger.open_account(name, **random.choice(({}, {}, {}, {"plan": "team"}, {"plan": "bare"})))
        for amount in random.choices((5, Decimal("7.25"), Decimal("0.000001"), 40), k=random.randint(1, 4)):
            more = random.choice(kinds)
            if random.random() < 0.8:
                ends = start + random.choice((0, 0, 0, 30)) * DAY + HOUR + next(moment) * SECOND
                more = {**more, "expires_at": ends}
            if random.random() < 0.1:
                more = {**more, "effective_at": start + next(moment) * SECOND / 30}
            if random.random() < 0.05:
                more = {**more, "scope": ["songs"]}
            granted = ledger.grant(amount, name, **more)
        live(ledger, random, name, granted.grant_id)


def live(ledger: Ledger, random: Random, name: str, grant_id: int) -> None:
    """Some of what an account may have gone through before its grants end."""
    if random.random() < 0.3:
        outcome(ledger.use, random.choice((1, Decimal("0.25"), 5)), name)
    for ttl in random.choice(((), (), (), (HOUR,), (MINUTE, 20 * HOUR), (4 * DAY,))):
        outcome(ledger.reserve, name, random.choice((1, 2, 5)), f"r{ttl}", ttl=ttl)
    if random.random() < 0.1:
        outcome(ledger.use, 4, name)
        outcome(ledger.revoke_grant, name, grant_id, key=ledger.key())
    if random.random() < 0.3:
        ledger.set_low_balance_alert(name, random.choice((1, 6, 30, 2000)))
    if random.random() < 0.3 and (left := ledger.available(name)) > 1:
        card = {"invoice_settings": {"default_payment_method": f"pm_{name}"}}
        about = {"id": f"cus_{name}", "object": "customer", "metadata": {"account_id": name}, **card}
        assert ledger.tell("customer.created", about, f"evt_{name}") == "applied"
        ledger.set_auto_topup(name, random.choice((1, left)), "starter", 10000)
    if random.random() < 0.1:
        outcome(random.choice((ledger.freeze_account, ledger.cancel_plan)), name)


@pytest.mark.parametrize("seed", range(3))
def test_grants_that_end_together_and_one_by_one_leave_the_same(conn: Connection[Any], seed: int) -> None:
    tables, together = [], []
    before = Ledger(conn)
    before.load_demo_catalog()
    before.change("insert into credits.plans (code, name) values ('bare', 'Without credits; it turns nevertheless')")
    for preparation in ("select", ONE_BY_ONE):
        with conn.transaction(force_rollback=True):
            ledger = Ledger(conn)
            ledger.change(preparation)
            ledger.change(RESTART)
            random = Random(seed)
            leave_alone(ledger, random)
            for passed in (random.randint(2, 20) * HOUR, DAY, 40 * DAY):
                ledger.now += passed
                with ledger.as_owner():
                    together += ledger.query(TOGETHER)
                    while ledger.query("select credits._expire_grants(50) as booked")[0].booked:
                        pass
            tables.append(ledger.snapshot())
            assert_sound(ledger)
    differing = {name: both for name, rows in tables[0].items() if (both := set(rows) ^ set(tables[1][name]))}
    assert not differing
    assert sum(row.accounts for row in together[:3]) > 20, together
    assert {row.accounts for row in together[3:]} == {0}
