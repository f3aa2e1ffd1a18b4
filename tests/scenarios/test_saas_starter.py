"""A SaaS starter: credits and prices read from Stripe, months and years, short tokens, and keys that spend once."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from typing import Any

import pytest
from five_ways import JWT_SECRET
from product import Product
from servers import EVERY_VERSION, Database

PACKS = {"pack_100": 500, "pack_500": 2000, "pack_2000": 7000}


@pytest.fixture
def starter(database: Database) -> Iterator[Product]:
    with Product(database, "saas-starter") as starter:
        for code, price in PACKS.items():
            starter.till.add(f"prod_{code}", "product", name=code, metadata={"package": code})
            starter.till.add(f"price_{code}", "price", product=f"prod_{code}", unit_amount=price, currency="usd")
        starter.till.add("prod_pro", "product", name="Pro", metadata={"plan": "pro", "includedCredits": "1000"})
        for name, amount, interval in (("monthly", 2000, "month"), ("yearly", 20000, "year")):
            recurring = {"interval": interval, "interval_count": 1, "usage_type": "licensed"}
            sold = {"product": "prod_pro", "unit_amount": amount, "currency": "usd", "recurring": recurring}
            starter.till.add(f"price_{name}", "price", **sold)
        yield starter


def sign_in(starter: Product) -> None:
    """Fresh tokens, for ten minutes."""
    for name, user in (("USER_1", "user_1"), ("USER_2", "beta")):
        now = starter.world.moment
        starter.tokens[name] = starter.names["session_token"](user, now, JWT_SECRET)


def at_once(starter: Product, who: str, call: str, schema: str, **arguments: Any) -> list[Any]:
    """The same call ten times at the same time; the answers."""
    with ThreadPoolExecutor(10) as pool:
        return list(pool.map(lambda _: starter.rpc(who, call, schema, **arguments).json(), range(10)))


@EVERY_VERSION
def test_the_days_of_a_saas_starter(starter: Product) -> None:
    prices_come_from_stripe(starter)
    tokens_are_short(starter)
    packs_are_sold_and_spent(starter)
    months_and_a_year(starter)
    starter.jobs()
    starter.end("user_1", "beta")


def prices_come_from_stripe(starter: Product) -> None:
    starter.command(f"pgcredits catalog apply {starter.catalogue}")
    starter.command("pgcredits stripe sync")
    assert {call.method for call in starter.till.calls} == {"GET"}
    catalogue = starter.backend.get_catalog()
    assert {code: package["stripe_price_id"] for code, package in catalogue["packages"].items()} == {
        code: f"price_{code}" for code in PACKS
    }
    assert catalogue["plans"]["pro"]["stripe_price_ids"] == ["price_monthly", "price_yearly"]
    odd = {row.difference for row in starter.backend.stripe_catalog_differences()}
    assert odd.isdisjoint({"price_unknown", "credits_missing", "credits_malformed", "price_missing"})


def tokens_are_short(starter: Product) -> None:
    starter.follow("Tokens")
    sign_in(starter)
    starter.backend.open_account("beta")
    starter.backend.link_identity("beta", "https://app.example.com", "beta")
    assert starter.ask("USER_1", "get_balance")["available"] == 0
    starter.wait(minutes=11)
    assert starter.refusal("USER_1", "get_balance") == (401, "not_authenticated")
    past = starter.names["session_token"]("user_1", datetime(2020, 1, 1, tzinfo=UTC), JWT_SECRET)
    starter.tokens["PAST"] = past
    assert starter.rpc("PAST", "get_balance").json()["code"] == "PGRST303"
    sign_in(starter)
    assert starter.ask("USER_1", "get_balance")["available"] == 0
    assert starter.rpc("USER_1", "get_balance", account_id="beta").status_code == 404


def packs_are_sold_and_spent(starter: Product) -> None:
    starter.follow("Sell packs")
    session = starter.ask("USER_1", "get_checkout", key="cart_1")["session_id"]
    (item,) = starter.till.objects[session]["line_items"]
    assert (item["price"], starter.till.objects[session]["amount_total"]) == ("price_pack_500", 2000)
    assert "checkout.session.completed" in starter.visit(session)
    assert starter.backend.sums("user_1") == (500, 0, 500, 0)
    starter.follow("Spend")
    starter.follow("An administrator gives credits")
    starter.follow("What the user sees")

    spent = {"account_id": "user_1", "amount": 20, "subject": "image:2", "key": "submit_3"}
    answers = at_once(starter, "BACKEND", "spend", "credits", **spent)
    assert sorted(answer["replayed"] for answer in answers) == [False, *[True] * 9]
    assert {answer["available"] for answer in answers} == {500}
    given = {"account_id": "user_1", "amount": 5, "kind": "gift", "description": "A birthday", "key": "ticket_8"}
    answers = at_once(starter, "BACKEND", "grant_credits", "credits", **given)
    assert sum(not answer["replayed"] for answer in answers) == 1
    assert starter.ask("USER_1", "get_balance")["available"] == 505
    (newest, before) = starter.ask("USER_1", "history", max_rows=2)
    assert (newest["description"], newest["amount"], before["subject"]) == ("A birthday", 5, "image:2")
    assert starter.rpc("USER_1", "grant_credits", "credits", **given).status_code == 403

    bought = {"package": "pack_2000", "success_url": "http://localhost:3000/billing", "key": "twice"}
    answers = at_once(starter, "USER_2", "create_checkout", "credits_api", **bought)
    assert len({answer["session_id"] for answer in answers}) == 1
    starter.visit(answers[0]["session_id"])
    assert starter.backend.sums("beta") == (2000, 0, 2000, 0)


def months_and_a_year(starter: Product) -> None:
    starter.offer("price_monthly", 2000, "month")
    starter.offer("price_yearly", 20000, "year")
    starter.wait(minutes=1)
    starter.follow("Subscribe")
    monthly = starter.subscribe(starter.ask("USER_1", "get_checkout", key="sub_1")["session_id"])
    starter.follow("By the year")
    yearly = starter.subscribe(starter.ask("USER_2", "get_checkout", key="sub_1")["session_id"])
    starter.follow("The portal")
    assert starter.ask("USER_1", "get_balance")["by_kind"] == {"gift": 5, "plan": 1000, "promo": 30, "purchase": 470}
    assert starter.backend.sums("beta") == (3000, 0, 3000, 0)

    # Somebody changes the credits in Stripe: what was granted stays, the next invoice brings the new ones.
    starter.till.objects["prod_pro"]["metadata"]["includedCredits"] = "1200"
    starter.world.put("product", "prod_pro", "product.updated", metadata=starter.till.objects["prod_pro"]["metadata"])
    starter.tell()
    assert starter.backend.sums("user_1") == (1505, 0, 1505, 0)
    assert starter.backend.use(300, "user_1").available == 1205
    starter.world.renew(monthly)
    starter.tell()
    sign_in(starter)
    assert starter.ask("USER_1", "get_balance")["by_kind"]["plan"] == 1200
    assert starter.backend.sums("user_1") == (1705, 0, 1705, 0)

    # Beta's year goes on month by month, as it was sold, without an event and before any job.
    assert starter.ask("USER_2", "get_balance")["by_kind"] == {"plan": 1000, "purchase": 2000}
    assert starter.backend.use(1500, "beta").available == 1500
    for days in (31, 30, 31):
        starter.wait(days=days)
        sign_in(starter)
        assert starter.ask("USER_2", "get_balance")["by_kind"]["plan"] == 1000
    assert starter.scheduled()["expire_grants"] == 2
    assert starter.backend.sums("beta") == (2500, 0, 2500, 0)

    starter.command("pgcredits stripe sync")
    starter.world.cancel(yearly, at_period_end=True)
    starter.tell()
    assert starter.ask("USER_2", "get_subscription_state")["state"] == "canceling"
    starter.world.finish(yearly)
    starter.tell()
    assert starter.backend.sums("beta") == (1500, 0, 1500, 0)
    kinds = [entry for entry in starter.backend.kinds("beta") if entry[0] == "grant"]
    assert kinds == [("grant", 2000), *[("grant", 1000)] * 12]
