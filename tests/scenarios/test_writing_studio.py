"""A writing studio: packages, plans, jobs charged for what they wrote, and tokens of a provider of identities."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jwt
import pytest
from five_ways import LATER
from product import Product
from servers import Database
from test_auth import ISSUER, OTHER, RSA, Jwks

from pgcredits.settings import Issuer

EVENTS = {
    "checkout.session.completed", "invoice.paid", "invoice.payment_failed",
    "customer.subscription.created", "customer.subscription.updated", "customer.subscription.deleted",
}  # fmt: skip


def provided(subject: str, key: Any = RSA, **claims: Any) -> str:
    """A token of the provider."""
    whole = {"iss": ISSUER, "aud": "studio", "sub": subject, "exp": LATER, **claims}
    return jwt.encode(whole, key, "RS256", {"kid": "rsa"})


@pytest.fixture
def studio(database: Database) -> Iterator[Product]:
    provider = Jwks()
    issuers = {ISSUER: Issuer(provider.url, ("studio",))}
    with Product(database, "writing-studio", jwt_issuers=issuers) as studio:
        studio.tokens |= {"USER_1": provided("auth|1"), "BETA": provided("auth|2")}
        yield studio
    provider.close()


def write(studio: Product, job_id: str, words: int, capability: str, subject: str, written: int | None) -> Any:
    """The page's function for a job whose text has so many words; without any the generation fails."""
    job = {"id": job_id, "capability": capability, "words": words, "subject": subject}

    def generate(of: Any) -> tuple[str, int]:
        if written is None:
            raise TimeoutError
        return f"the text of {of['id']}", written

    return studio.names["run_job"](studio.conn, "user_1", job, generate)


def test_the_days_of_a_writing_studio(studio: Product) -> None:
    studio_opens(studio)
    a_writer_buys(studio)
    a_book_is_written(studio)
    somebody_else_looks(studio)
    a_year_by_subscription(studio)
    assert studio.heard >= EVENTS
    studio.jobs()
    studio.end("user_1", "beta")


def studio_opens(studio: Product) -> None:
    studio.command(f"pgcredits catalog apply {studio.catalogue}")
    studio.command(f"pgcredits catalog diff --check {studio.catalogue}")
    studio.command("pgcredits stripe publish")
    assert not studio.backend.stripe_catalog_differences()
    sold = [one for one in studio.till.objects.values() if one["object"] == "price"]
    assert sorted(one["unit_amount"] for one in sold) == [999, 1999, 3999, 9999, 9999, 29999]
    studio.follow("Set up")


def a_writer_buys(studio: Product) -> None:
    studio.follow("A writer signs up")
    assert studio.rpc("USER_1", "spend", account_id="user_1", amount=1, key="mine").status_code == 404
    assert studio.rpc("USER_1", "spend", "credits", account_id="user_1", amount=1, key="mine").status_code == 403
    studio.follow("Buy credits")
    bought = {"package": "writer", "success_url": "http://localhost:3000/thanks", "key": "cart_1"}
    session = studio.ask("USER_1", "create_checkout", **bought)
    assert session["url"] == f"{studio.till.url}/pay/{session['session_id']}"
    assert studio.backend.sums("user_1") == (0, 0, 0, 0)
    assert "checkout.session.completed" in studio.visit(session["session_id"])
    studio.follow("After the payment")


def a_book_is_written(studio: Product) -> None:
    studio.follow("Write")
    assert write(studio, "job_1", 1, "outline", "book:1", 1) == {
        "status": 200, "text": "the text of job_1", "cost": 50, "charged": 50,
    }  # fmt: skip
    chapter = write(studio, "job_2", 2000, "chapter", "book:1/chapter:1", 1834)
    assert (chapter["cost"], chapter["charged"]) == (200, 184)
    again = write(studio, "job_2", 2000, "chapter", "book:1/chapter:1", 1834)
    assert (again["cost"], again["charged"]) == (200, 184)
    better = write(studio, "job_3", 1834, "enhance", "book:1/chapter:1", 1834)
    assert (better["cost"], better["charged"]) == (92, 92)
    with pytest.raises(TimeoutError):
        write(studio, "job_4", 2500, "chapter", "book:1/chapter:2", None)
    assert studio.backend.sums("user_1") == (4674, 0, 4674, 0)

    held = {"account_id": "user_1", "capability": "chapter", "units": 3000, "subject": "book:1/chapter:2"}
    opened = studio.rpc("BACKEND", "authorize_usage", "credits", usage_id="job_5", **held)  # and its process dies
    assert (opened.status_code, opened.json()["available"]) == (200, 4374)
    studio.follow("What a book has cost")
    studio.wait(minutes=16)
    assert studio.ask("USER_1", "get_balance")["available"] == 4674  # before any job has looked
    assert studio.scheduled()["expire_reservations"] == 1
    assert studio.ask("USER_1", "list_reservations") == []

    studio.follow("Not enough credits")
    assert write(studio, "job_6", 100_000, "chapter", "book:1", 100_000) == {
        "status": 402, "required": 10_000, "available": 4674, "missing": 5326,
    }  # fmt: skip
    assert studio.backend.sums("user_1") == (4674, 0, 4674, 0)


def somebody_else_looks(studio: Product) -> None:
    """Beta is another writer: sees nothing of the first, nor does who is not linked, or whose token is no good."""
    assert studio.rpc("BETA", "get_balance").status_code == 404
    studio.backend.open_account("beta")
    studio.backend.link_identity("beta", ISSUER, "auth|2")
    assert studio.ask("BETA", "get_balance")["available"] == 0
    assert studio.rpc("BETA", "get_balance", account_id="user_1").status_code == 404
    assert studio.ask("BETA", "history") == []
    for name, bad in {
        "FORGED": provided("auth|1", OTHER), "ELSEWHERE": provided("auth|1", aud="shop"),
        "OVER": provided("auth|1", exp=1), "SERVICE": provided("auth|1", role="credits_service"),
    }.items():  # fmt: skip
        studio.tokens[name] = bad
        assert studio.rpc(name, "get_balance").status_code == (403 if name == "SERVICE" else 401), name

    session = studio.ask("BETA", "create_checkout", package="starter", success_url="http://localhost", key="b1")
    studio.visit(session["session_id"])
    spent = {"account_id": "beta", "amount": 700, "key": "twelve at once", "subject": "book:9"}
    with ThreadPoolExecutor(12) as pool:
        answers = list(pool.map(lambda _: studio.rpc("BACKEND", "spend", "credits", **spent).json(), range(12)))
    assert sorted(answer["replayed"] for answer in answers) == [False, *[True] * 11]
    assert {answer["available"] for answer in answers} == {300}
    assert studio.backend.sums("beta") == (300, 0, 300, 0)
    assert studio.backend.sums("user_1") == (4674, 0, 4674, 0)


def a_year_by_subscription(studio: Product) -> None:
    studio.wait(days=1)
    for price in [one for one in studio.till.objects.values() if "recurring" in one]:
        studio.offer(price["id"], price["unit_amount"], "month")
    studio.follow("Subscribe")
    subscription = studio.subscribe(studio.ask("USER_1", "get_checkout", key="plan_1")["session_id"])
    studio.follow("With a plan")
    asked = {"plan": "enterprise", "success_url": "http://localhost", "key": "plan_2"}
    assert studio.refusal("USER_1", "create_checkout", **asked) == (409, "already_subscribed")
    assert write(studio, "job_7", 1000, "chapter", "book:2/chapter:1", 1000)["charged"] == 100
    assert studio.ask("USER_1", "get_balance")["by_kind"] == {"plan": 2400, "purchase": 4674}

    studio.world.renew(subscription)
    studio.tell()
    assert studio.ask("USER_1", "get_balance")["by_kind"] == {"plan": 2500, "purchase": 4674}

    unpaid = studio.world.renew(subscription, paid=False)
    assert "invoice.payment_failed" in studio.tell()
    studio.follow("When a payment fails")
    assert studio.ask("USER_1", "get_balance")["by_kind"] == {"purchase": 4674}
    assert write(studio, "job_8", 500, "enhance", "book:2/chapter:1", 480)["charged"] == 24
    studio.wait(days=8)
    refusal = studio.ask("USER_1", "check_access", capability="enhance", units=1)
    assert (refusal["allowed"], refusal["code"]) == (False, "subscription_inactive")
    studio.world.pay(unpaid)
    studio.tell()
    assert studio.ask("USER_1", "get_balance")["by_kind"] == {"plan": 2500, "purchase": 4650}

    studio.follow("Cards, invoices, canceling")
    studio.world.cancel(subscription, at_period_end=True)
    studio.tell()
    assert studio.ask("USER_1", "get_subscription_state")["state"] == "canceling"
    assert write(studio, "job_9", 1000, "chapter", "book:2/chapter:2", 995)["charged"] == 100
    studio.world.finish(subscription)
    studio.tell()
    state = studio.ask("USER_1", "get_subscription_state")
    assert (state["state"], state["may_receive"]) == ("canceled", False)
    assert studio.backend.sums("user_1") == (4650, 0, 4650, 0)
    assert write(studio, "job_10", 1, "outline", "book:3", 1)["charged"] == 50  # pays as it goes again

    bigger = studio.ask("BETA", "create_checkout", plan="enterprise", success_url="http://localhost", key="e1")
    studio.subscribe(bigger["session_id"])
    assert studio.ask("BETA", "get_balance")["by_kind"] == {"plan": 15000, "purchase": 300}
    history = [(row["kind"], row["amount"]) for row in reversed(studio.ask("USER_1", "history", max_rows=100))]
    assert history == [
        ("grant", 5000), ("settle", -50), ("settle", -184), ("settle", -92), ("grant", 2500), ("settle", -100),
        ("expire", -2400), ("grant", 2500), ("expire", -2500), ("settle", -24), ("grant", 2500), ("settle", -100),
        ("expire", -2400), ("settle", -50),
    ]  # fmt: skip
    assert sum(amount for _, amount in history) == 4600
