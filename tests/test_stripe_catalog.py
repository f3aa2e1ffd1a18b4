"""The catalogue at Stripe: published, changed, interrupted, read back; what was sold at old prices is known."""

import asyncio
import json
import random
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from catalog_support import problems_of
from ledger_support import Ledger, assert_sound, committed, session, together
from servers import ONE_ENGINE, Database
from stripe_fake import KEY, StripeFake
from stripe_params import problems

from pgcredits import cli, worker
from pgcredits.db import Database as Pool
from pgcredits.settings import Settings

Json = dict[str, Any]
CATALOG: Json = {
    "packages": {
        "starter": {"name": "Starter", "credits": 1000, "price": 999, "currency": "usd"},
        "big-one": {"name": "Big", "description": "Much.", "credits": 2.5, "price": 1, "currency": "eur"},
        "gone": {"name": "Gone", "credits": 1, "price": 1, "currency": "usd", "active": False},
    },
    "plans": {
        "pro": {
            "name": "Professional", "monthly_credits": 100,
            "prices": [
                {"amount": 1000, "currency": "usd"}, {"amount": 10000, "currency": "usd", "interval": "year"},
            ],
        },
        "free": {"name": "Free", "monthly_credits": 10},
    },
}  # fmt: skip


@pytest.fixture
def fake() -> Iterator[StripeFake]:
    with StripeFake() as running:
        yield running


@pytest.fixture
def ledger(database: Database) -> Iterator[Ledger]:
    with committed(database) as ledger:
        ledger.apply_catalog(CATALOG)
        yield ledger
        for row in ledger.table("stripe_requests"):
            assert problems(row.method, row.path, whole(row.params)) == []


def whole(params: Any) -> Any:
    """Params as the worker sends them."""
    return worker.encodable(params)


def work(database: Database, fake: StripeFake) -> None:
    """Do what is due, and what follows from it."""

    async def once() -> None:
        pool = Pool(database.dsn, role="credits_service")
        await pool.open()
        try:
            settings = Settings(dsn=database.dsn, stripe_key=KEY, stripe_api_base=fake.url)
            await worker.Worker(pool, settings).run(asyncio.Event(), once=True)
        finally:
            await pool.close()

    asyncio.run(once())


def time_passes(ledger: Ledger) -> None:
    """What is known of Stripe is some seconds old, what waits is due, what was claimed is nobody's."""
    ledger.change("update credits.stripe_objects set as_of = as_of - 10")
    ledger.change(
        "update credits.stripe_requests set run_at = credits.now() - interval '1 second', locked_until = "
        "credits.now() - interval '1 second' where state in ('queued', 'sent')"
    )


def publish(database: Database, ledger: Ledger, fake: StripeFake) -> list[tuple[str, str, str]]:
    """Publish all of it; what that was."""
    rows = ledger.publish_catalog()
    for _ in range(3):  # two answers about one object in one second are settled by a retrieve
        work(database, fake)
        time_passes(ledger)
        if progress(ledger, "publish")[1] == 0:
            break
    assert progress(ledger, "publish")[1:] == (0, 0)
    return brief(rows)


def brief(rows: list[Any]) -> list[tuple[str, str, str]]:
    return sorted((row.ref, row.difference, row.change) for row in rows)


def progress(ledger: Ledger, run: str) -> tuple[int, int, int]:
    """Done, open, failed."""
    (row,) = [row for row in ledger.get_catalog_sync() if row.run == run]
    assert row.requests == row.done + row.open + row.failed
    return row.done, row.open, row.failed


def of(fake: StripeFake, kind: str, **having: Any) -> list[Json]:
    """Objects of a kind, the oldest first."""
    return [one for one in fake.objects.values() if one["object"] == kind and having.items() <= one.items()]


def package(ledger: Ledger, code: str = "starter") -> Any:
    (row,) = ledger.table("packages", "code = %s", code)
    return row


def plan(ledger: Ledger, code: str = "pro") -> Any:
    (row,) = ledger.table("plans", "code = %s", code)
    return row


def change(ledger: Ledger, section: str, code: str, **keys: Any) -> None:
    """The same catalogue but for some keys of one record."""
    ledger.apply_catalog({section: {**CATALOG[section], code: {**CATALOG[section][code], **keys}}})


def is_published(ledger: Ledger, fake: StripeFake) -> None:
    """Everything is there once, and nothing else is on sale."""
    assert ledger.stripe_catalog_differences() == []
    assert {one["id"] for one in of(fake, "product")} == {
        "pgc_package_starter", package(ledger, "big-one").stripe_product_id, "pgc_plan_pro",
    }  # fmt: skip
    on_sale = {one["lookup_key"]: one["id"] for one in of(fake, "price", active=True)}
    assert len(on_sale) == len(of(fake, "price", active=True)) == 4
    assert on_sale["pgc_package_starter"] == package(ledger).stripe_price_id
    assert {on_sale["pgc_plan_pro_usd_month"], on_sale["pgc_plan_pro_usd_year"]} <= {*plan(ledger).stripe_price_ids}


ALL = [
    ("package:big-one:price", "price_missing", "create"), ("package:big-one:product", "product_missing", "create"),
    ("package:starter:price", "price_missing", "create"), ("package:starter:product", "product_missing", "create"),
    ("plan:pro:price:usd:month", "price_missing", "create"), ("plan:pro:price:usd:year", "price_missing", "create"),
    ("plan:pro:product", "product_missing", "create"),
]  # fmt: skip


def test_a_life_of_a_catalogue(database: Database, ledger: Ledger, fake: StripeFake) -> None:
    with ledger.unchanged():
        assert brief(ledger.publish_catalog(dry_run=True)) == ALL
    assert publish(database, ledger, fake) == ALL
    is_published(ledger, fake)
    first = package(ledger).stripe_price_id
    price = fake.objects[first]
    assert (price["product"], price["unit_amount"], price["currency"]) == ("pgc_package_starter", 999, "usd")
    assert price["metadata"] == {"package": "starter", "credits": "1000"}
    (month,) = of(fake, "price", lookup_key="pgc_plan_pro_usd_month")
    assert month["recurring"] == {"interval": "month"}
    assert month["metadata"] == {"plan": "pro", "credits": "100", "trial_credits": "0"}
    assert fake.objects["pgc_plan_pro"]["metadata"] == {"plan": "pro"}

    calls = len(fake.calls)
    assert publish(database, ledger, fake) == []
    assert len(fake.calls) == calls

    sold_at_a_new_price_and_still_at_the_old_one(database, ledger, fake)
    what_was_changed_at_stripe_is_restored(database, ledger, fake)
    what_is_not_sold_is_deactivated(database, ledger, fake)
    assert_sound(ledger)


def sold_at_a_new_price_and_still_at_the_old_one(database: Database, ledger: Ledger, fake: StripeFake) -> None:
    first = package(ledger).stripe_price_id
    change(ledger, "packages", "starter", price=1299, credits=1200)
    (row,) = ledger.publish_catalog(dry_run=True)
    assert (row.difference, row.change, row.before, row.after) == (
        "price_differs", "create", {"unit_amount": 999}, {"unit_amount": 1299},
    )  # fmt: skip
    publish(database, ledger, fake)
    second = package(ledger).stripe_price_id
    assert (fake.objects[second]["unit_amount"], fake.objects[second]["active"]) == (1299, True)
    assert (fake.objects[first]["active"], fake.objects[first]["lookup_key"]) == (False, None)
    is_published(ledger, fake)

    ledger.open_account("alpha")
    for number, (paid, at, metadata) in enumerate(
        [
            (999, first, {}),
            (999, None, {"package": "starter"}),
            (1299, second, {}),
            (1299, None, {"package": "starter"}),
        ]
    ):
        buy(ledger, f"cs_{number}", paid, at, metadata)
    assert [row.credits for row in ledger.table("purchases", "true order by purchase_id")] == [1000, 1000, 1200, 1200]
    buy(ledger, "cs_odd", 5, None, {"package": "starter"}, "parked")


def buy(
    ledger: Ledger, session_id: str, paid: int, price_id: str | None, metadata: Json, outcome: str = "applied"
) -> None:
    """Alpha pays for one of something: named by its metadata, or sold at a price."""
    if price_id:
        items = {
            "object": "list",
            "has_more": False,
            "data": [{"id": "li_1", "price": {"id": price_id}, "quantity": 1}],
        }
        ledger.change(
            "insert into credits.stripe_objects (kind, object_id, snapshot, as_of, updated_at) values "
            "('line_items', %s, %s::jsonb, 0, now())", session_id, json.dumps(items),
        )  # fmt: skip
    about = session(
        session_id, amount_subtotal=paid, amount_total=paid, payment_intent=f"pi_{session_id}",
        metadata={"account_id": "alpha", **metadata},
    )  # fmt: skip
    assert ledger.tell("checkout.session.completed", about, f"evt_{session_id}") == outcome


def what_was_changed_at_stripe_is_restored(database: Database, ledger: Ledger, fake: StripeFake) -> None:
    product = fake.objects["pgc_package_starter"]
    product.update(name="By hand", metadata={"package": "starter", "theirs": "stays"})
    event = {**product, "active": True}
    assert ledger.tell("product.updated", event, "evt_by_hand") == "applied"
    (row,) = ledger.stripe_catalog_differences()
    assert (row.section, row.code, row.difference, row.change) == ("package", "starter", "product_differs", "update")
    assert (row.before, row.after) == ({"name": "By hand"}, {"name": "Starter"})
    time_passes(ledger)
    publish(database, ledger, fake)
    assert (product["name"], product["metadata"]) == ("Starter", {"package": "starter", "theirs": "stays"})
    is_published(ledger, fake)


def what_is_not_sold_is_deactivated(database: Database, ledger: Ledger, fake: StripeFake) -> None:
    month, year = (of(fake, "price", lookup_key=f"pgc_plan_pro_usd_{every}")[0]["id"] for every in ("month", "year"))
    asked = {"success_url": "http://localhost", "plan": "pro"}
    ledger.create_checkout("alpha", key="k1", **asked)
    change(ledger, "plans", "pro", prices=CATALOG["plans"]["pro"]["prices"][1:], monthly_credits=120)
    assert publish(database, ledger, fake) == [
        (f"plan:pro:price:{month}", "price_active", "deactivate"),
        ("plan:pro:price:usd:year", "price_differs", "update"),
    ]
    ledger.create_checkout("alpha", key="k2", **asked)
    sold = [row.params["line_items"][0]["price"] for row in ledger.table("stripe_requests", "purpose = 'checkout'")]
    assert sorted(sold) == sorted([month, year])
    assert fake.objects[year]["metadata"]["credits"] == "120"
    with ledger.as_owner():
        assert ledger.query("select credits._plan_of_price(%s, null) as plan", month) == [("pro",)]

    change(ledger, "plans", "pro", active=False)
    publish(database, ledger, fake)
    assert [fake.objects[about]["active"] for about in ("pgc_plan_pro", month, year)] == [False, False, False]
    change(ledger, "plans", "pro")  # the price that was withdrawn is found by its lookup key, and taken again
    publish(database, ledger, fake)
    assert ledger.stripe_catalog_differences() == []
    assert fake.objects[month]["active"]
    assert fake.objects[year]["active"]
    assert len(of(fake, "price")) == 5


@ONE_ENGINE
def test_a_document_may_go_back_to_an_old_price(database: Database, ledger: Ledger, fake: StripeFake) -> None:
    """It names the ids that were written back: publishing activated that price and then deactivated it, each time."""
    publish(database, ledger, fake)
    first = package(ledger).stripe_price_id
    change(ledger, "packages", "starter", price=1299)
    publish(database, ledger, fake)
    assert not fake.objects[first]["active"]
    change(ledger, "packages", "starter", stripe_price_id=first, stripe_product_id="pgc_package_starter")
    assert publish(database, ledger, fake) == [("package:starter:price", "price_archived", "update")]
    assert fake.objects[first]["active"]
    assert (package(ledger).stripe_price_id, ledger.stripe_catalog_differences()) == (first, [])
    change(ledger, "packages", "starter", active=False, stripe_price_id=first, stripe_product_id="pgc_package_starter")
    publish(database, ledger, fake)
    assert not fake.objects[first]["active"]
    assert publish(database, ledger, fake) == []


def test_an_empty_description_is_none(ledger: Ledger) -> None:
    change(ledger, "packages", "starter", description="", stripe_product_id="prod_1")
    product = {"id": "prod_1", "object": "product", "active": True, "name": "Starter", "description": None,
               "metadata": {"package": "starter"}}  # fmt: skip
    ledger.tell("product.created", product)
    assert [row for row in ledger.stripe_catalog_differences() if row.ref == "package:starter:product"] == []


@ONE_ENGINE
def test_an_interrupted_run_ends_the_same_when_it_is_run_again(
    database: Database, ledger: Ledger, fake: StripeFake
) -> None:
    luck = random.Random(7)
    faults = ("cut before", "cut after", "500", "429", "409", "no json")
    fake.fault = lambda: luck.choice(faults) if luck.random() < 0.4 else None
    for turn in range(40):
        ledger.publish_catalog()
        if luck.random() < 0.3:
            ledger.claim_stripe_requests(2, "killed before it could send")
        work(database, fake)
        if turn % 3 == 2:  # longer than Stripe keeps a key
            ledger.change("update credits.stripe_requests set first_sent_at = first_sent_at - interval '1 day'")
        time_passes(ledger)
        if not ledger.publish_catalog(dry_run=True) and progress(ledger, "publish")[1] == 0:
            break
    is_published(ledger, fake)
    assert len(of(fake, "price")) == 4
    assert any(row.state == "failed" and row.attempts for row in ledger.table("stripe_requests")), "none was unknown"


def test_several_at_once_ask_once(database: Database, ledger: Ledger, fake: StripeFake) -> None:
    together(database, [lambda ledger: ledger.publish_catalog(), lambda ledger: ledger.sync_catalog()] * 2)
    refs = [(row.purpose, row.ref) for row in ledger.table("stripe_requests")]
    assert len(refs) == len(set(refs)) == 3 + 4
    work(database, fake)
    is_published(ledger, fake)
    assert all(count == 1 for count in fake.effects.values())


@ONE_ENGINE
def test_a_product_that_somebody_made_meanwhile_is_taken(database: Database, ledger: Ledger, fake: StripeFake) -> None:
    def made_meanwhile() -> None:
        if fake.calls:  # after the first look
            fake.objects.setdefault(
                "pgc_plan_pro",
                {"id": "pgc_plan_pro", "object": "product", "name": "Theirs", "active": True, "metadata": {}},
            )

    ledger.apply_catalog({"packages": {}})
    fake.fault = made_meanwhile
    ledger.publish_catalog()
    work(database, fake)
    assert [row.error_code for row in ledger.table("stripe_requests", "state = 'failed'")] == [
        "resource_already_exists"
    ]
    assert progress(ledger, "publish")[2] == 0
    assert fake.objects["pgc_plan_pro"]["name"] == "Professional"
    assert len(of(fake, "price", active=True)) == 2


@ONE_ENGINE
def test_an_id_that_this_key_does_not_know_is_an_error_and_never_replaced(
    database: Database, ledger: Ledger, fake: StripeFake
) -> None:
    change(ledger, "packages", "starter", stripe_price_id="price_of_the_other_mode")
    assert ("package:starter:price", "price_not_seen", "check") in brief(ledger.publish_catalog())
    work(database, fake)
    (row,) = ledger.get_catalog_sync()
    assert (row.failed, row.open, row.finished) == (1, 0, True)
    (error,) = row.errors
    assert (error["ref"], error["status"], error["code"]) == ("package:starter:price", 404, "resource_missing")
    assert package(ledger).stripe_price_id == "price_of_the_other_mode"
    assert "pgc_package_starter" not in fake.objects
    change(ledger, "packages", "starter", stripe_price_id=None)
    publish(database, ledger, fake)
    is_published(ledger, fake)


def add(fake: StripeFake, about: str, kind: str, **more: Any) -> None:
    """Something that was made in the Dashboard."""
    known = {"id": about, "object": kind, "created": int(time.time()), "active": True, "metadata": {}}
    fake.objects[about] = {**known, **more}


def test_everything_is_read_page_by_page_and_bound(database: Database, ledger: Ledger, fake: StripeFake) -> None:
    add(fake, "prod_1", "product", name="Professional", metadata={"plan": "pro", "includedCredits": "100"})
    add(fake, "prod_2", "product", name="Others")
    monthly = {"currency": "usd", "recurring": {"interval": "month", "interval_count": 1, "usage_type": "licensed"}}
    add(fake, "price_month", "price", product="prod_1", unit_amount=1000, **monthly)
    add(fake, "price_odd", "price", product="prod_1", unit_amount=7, **monthly, metadata={"credits": "1,000"})
    add(
        fake,
        "price_starter",
        "price",
        product="prod_2",
        unit_amount=999,
        currency="usd",
        metadata={"package": "starter"},
    )
    for number in range(270):
        add(fake, f"price_{number}", "price", product="prod_2", unit_amount=number, currency="usd", active=number < 130)
    assert ledger.sync_catalog().finished is False
    work(database, fake)
    assert progress(ledger, "sync") == (4, 0, 0)
    assert len(fake.calls) == 1 + 1 + 2 + 2
    assert len(ledger.table("stripe_objects", "kind = 'price'")) == 273
    assert package(ledger).stripe_price_id == "price_starter"
    assert plan(ledger).stripe_price_ids == ["price_month"]
    found = {
        row.stripe_id: (row.difference, row.change) for row in ledger.stripe_catalog_differences() if row.stripe_id
    }
    assert found["price_5"] == ("price_unknown", None)
    assert "price_200" not in found
    assert found["price_odd"] == ("credits_malformed", None)
    assert found["price_starter"] == ("price_differs", "update")
    with ledger.as_owner():
        assert ledger.query("select credits._plan_of_price('price_odd', null) as plan") == [("pro",)]
    time_passes(ledger)
    publish(database, ledger, fake)
    assert not [row for row in ledger.stripe_catalog_differences() if row.change]
    assert fake.objects["price_month"]["metadata"]["credits"] == "100"
    assert all(fake.objects[f"price_{number}"]["active"] == (number < 130) for number in range(270))


def test_prices_of_plans_are_part_of_the_document(ledger: Ledger) -> None:
    assert ledger.apply_catalog(json.loads(json.dumps(ledger.get_catalog(), default=float))) == []
    prices = [{"amount": 5, "currency": "usd"}, {"amount": 6, "currency": "usd", "interval": "month"}]
    wrong = {"name": "P", "prices": [*prices, {"amount": 1.5, "currency": "US", "interval": "week", "price": 1}, 3]}
    assert problems_of(lambda: ledger.apply_catalog({"plans": {"pro": wrong}})) == {
        "plans.pro.prices.1": "the price for this interval and currency is given above",
        "plans.pro.prices.2.amount": "must be a whole number from 0, in the minor unit of the currency",
        "plans.pro.prices.2.currency": "must be three lower-case letters, such as usd",
        "plans.pro.prices.2.interval": "must be one of month, year",
        "plans.pro.prices.2.price": "unknown key; known are amount, currency, interval",
        "plans.pro.prices.3": "must be an object",
    }
    new = [{"amount": 5, "currency": "eur", "interval": "year"}]
    (row,) = ledger.apply_catalog({"plans": {**CATALOG["plans"], "pro": {**CATALOG["plans"]["pro"], "prices": new}}})
    assert (row.change, row.path, row.after) == ("changed", "plans.pro.prices", new)


# The command line ----------------------------------------------------------------------------------------------------

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(
    database: Database, fake: StripeFake, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Run:
    """The command line in this process: exit code, what it printed and what it complained about."""
    monkeypatch.setenv("PGCREDITS_DSN", database.dsn)
    monkeypatch.setenv("STRIPE_API_BASE", fake.url)
    monkeypatch.setenv("STRIPE_SECRET_KEY", KEY)

    def command(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["pgcredits", "stripe", *arguments])
        with pytest.raises(SystemExit) as left:
            cli.main()
        printed = capsys.readouterr()
        return int(left.value.code or 0), printed.out, printed.err

    return command


def test_the_commands(ledger: Ledger, fake: StripeFake, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    code, announced, _ = run("publish", "--dry-run")
    assert code == 0
    assert fake.calls == []
    lines = announced.splitlines()
    assert len(lines) == len(ALL)
    assert (
        "create             packages.starter  product pgc_package_starter: "
        "active true, metadata {package: starter}, name Starter" in lines
    )
    code, printed, _ = run("publish")
    assert (code, printed.splitlines()[:-1], printed.splitlines()[-1]) == (0, lines, "Asked Stripe 7 times.")
    is_published(ledger, fake)
    assert run("publish")[:2] == (0, "No difference.\nAsked Stripe 0 times.\n")

    time_passes(ledger)
    fake.objects["pgc_package_starter"]["name"] = "By hand"
    code, printed, _ = run("sync")
    restored = "update             packages.starter  product pgc_package_starter: name By hand -> Starter"
    assert (code, printed) == (0, f"Asked Stripe 4 times.\n{restored}\n")
    change(ledger, "packages", "starter", stripe_price_id="price_unheard_of")
    code, _, complaint = run("publish")
    assert (code, complaint) == (1, "pgcredits: package:starter:price 404 resource_missing\n")
    monkeypatch.setenv("STRIPE_SECRET_KEY", "sk_test_wrong")
    code, _, complaint = run("sync")
    assert (code, "Stripe refuses our key" in complaint) == (1, True)
    monkeypatch.setenv("STRIPE_SECRET_KEY", "")
    for command in ("publish", "sync"):
        assert run(command) == (1, "", "pgcredits: set STRIPE_SECRET_KEY to the key of Stripe's API\n")
