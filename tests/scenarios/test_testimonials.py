"""A testimonials platform: organisations, plans and models; every call of a model held, settled or given back."""

from typing import Any

import pytest
import yaml
from client import CreditsError
from five_ways import token
from ledger_support import DAY, MINUTE, committed, refused
from product import APRIL, EXAMPLES, Product
from servers import Database

from pgcredits import migrate

ISSUER = "https://id.example.com"
PLANS = {"org_1": "pro", "org_2": "free", "org_3": "team"}
MAPPINGS = 48


class ModelError(Exception):
    """The model does not answer."""


def fails(*_: Any) -> str:
    """A model that breaks."""
    raise ModelError


def words(count: int) -> str:
    """So many words."""
    return "word " * count


def test_the_months_of_a_testimonials_platform(database: Database) -> None:
    with Product(database, "testimonials", APRIL) as platform:
        organisations_come(platform)
        the_catalogue_is_what_the_document_says(platform)
        platform.follow("Members and their tokens")
        platform.tokens["SOMEBODY"] = token(iss=ISSUER, sub="org_1")
        assert platform.refusal("SOMEBODY", "get_balance") == (404, "account_not_found")
        platform.follow("Ask before")
        models_are_called(platform)
        models_fail(platform)
        limits_hold(platform)
        the_balance_runs_low(platform)
        packages_are_bought(platform)
        plans_change(platform)
        platform.end(*PLANS)


def organisations_come(platform: Product) -> None:
    """Organisations that were there before get their credits when their plans do."""
    catalogue = yaml.safe_load(platform.catalogue.read_text())
    for plan in catalogue["plans"].values():
        del plan["monthly_credits"]
    platform.backend.apply_catalog(catalogue)
    with platform.database.admin() as admin:
        admin.execute("create table organizations (id text primary key, plan text not null, email text)")
        admin.execute("grant select on organizations to credits_service")
        for organization, plan in PLANS.items():
            admin.execute("insert into organizations (id, plan) values (%s, %s)", [organization, plan])
    for number in (1, 2):
        platform.tokens[f"ORG_{number}"] = token(iss=ISSUER, sub=f"auth0|{number}", org_id=f"org_{number}")
    platform.follow("Set up")


def the_catalogue_is_what_the_document_says(platform: Product) -> None:
    """Each combination of plan, capability, quality and model that it names is allowed, and no other."""
    written, stored = yaml.safe_load(platform.catalogue.read_text()), platform.backend.get_catalog()
    sizes = {"capabilities": 3, "quality_levels": 3, "models": 7, "packages": 3, "plans": 3}
    assert {section: len(stored[section]) for section in sizes} == sizes
    monthly = {code: plan["monthly_credits"] for code, plan in stored["plans"].items()}
    assert monthly == {"free": 10, "pro": 500, "team": 2000}
    named = {
        (plan, capability, quality, model)
        for plan, content in written["plans"].items()
        for capability in content["capabilities"]
        for quality, models in content["qualities"].items()
        for model in models
    }
    allowed = set()
    for organization, plan in PLANS.items():
        for capability in written["capabilities"]:
            for quality in written["quality_levels"]:
                for model in written["models"]:
                    found = platform.backend.check_access(organization, capability, 1, quality=quality, model=model)
                    if found.gate not in {"plan", "quality", "model"}:
                        allowed.add((plan, capability, quality, model))
    assert len(named) == MAPPINGS
    assert allowed == named


def models_are_called(platform: Product) -> None:
    """What was used is charged, by the best model of the quality."""
    platform.follow("Reserve, execute, settle")
    draft, polish = platform.names["draft"], platform.names["polish"]
    assert draft(platform.conn, "org_1", "user_1", 1, lambda model: f"by {model}") == "by plus"
    assert platform.backend.sums("org_1") == (590, 0, 590, 0)

    def shorter(model: str, _: str) -> str:
        assert (model, platform.backend.sums("org_1")) == ("mini", (570, 20, 590, 0))
        return words(430)

    polish(platform.conn, "org_1", "user_1", words(500), shorter)
    assert platform.backend.sums("org_1") == (581, 0, 581, 0)


def models_fail(platform: Product) -> None:
    """Work that breaks, and work that never comes back, cost nothing."""
    for function in ("draft", "polish"):
        with pytest.raises(ModelError):
            platform.names[function](platform.conn, "org_1", "user_1", "12", fails)
    with pytest.raises(CreditsError) as caught:
        platform.names["draft"](platform.conn, "org_1", "user_1", 2, fails, quality="premium")
    assert (caught.value.status, caught.value.code) == (403, "quality_not_in_plan")
    assert platform.backend.sums("org_1") == (581, 0, 581, 0)
    platform.backend.authorize_usage(
        "org_1", "draft", quality="fast", usage_id="lost", ttl=5 * MINUTE, member_id="user_1"
    )
    assert platform.backend.sums("org_1") == (576, 5, 581, 0)
    assert [row["reservation_id"] for row in platform.ask("ORG_1", "list_reservations")] == ["lost"]
    platform.wait(minutes=6)
    assert platform.ask("ORG_1", "get_balance")["available"] == 581
    assert platform.job("expire_reservations") == 1
    assert platform.job("expire_reservations") == 0
    assert platform.backend.get_reservation("org_1", "lost").status == "expired"
    assert platform.backend.sums("org_1") == (581, 0, 581, 0)


def limits_hold(platform: Product) -> None:
    """Three calls a minute for free, forty credits a month for one member, and never more than there is."""
    platform.wait(minutes=1)
    for number in range(3):
        platform.backend.authorize_usage("org_2", "analyze", usage_id=f"a{number}")
        assert platform.backend.settle_usage("org_2", f"a{number}").charged == 1
    with refused(429, "rate_limited", limit=3, used=3):
        platform.backend.authorize_usage("org_2", "analyze", usage_id="a3")
    found = platform.ask("ORG_2", "check_access", capability="analyze")
    assert (found["gate"], found["code"], found["detail"]["used"]) == ("rate_limit", "rate_limited", 3)
    platform.wait(minutes=1)
    platform.names["draft"](platform.conn, "org_2", None, 1, str, quality="fast")
    with refused(402, "insufficient_credits", required=5, available=2):
        platform.names["draft"](platform.conn, "org_2", None, 2, str, quality="fast")
    for number in range(4):
        platform.names["draft"](platform.conn, "org_1", "user_2", number, str)
    with refused(429, "member_limit_reached", limit=40, used=40, required=10):
        platform.names["draft"](platform.conn, "org_1", "user_2", 5, str)
    with refused(403, "forbidden"):
        platform.names["draft"](platform.conn, "org_1", "user_9", 6, str)
    assert (platform.backend.available("org_1"), platform.backend.available("org_2")) == (541, 2)
    used = {row.member_id: row.used for row in platform.backend.list_members("org_1")}
    assert used == {"user_1": 19, "user_2": 40}


def the_balance_runs_low(platform: Product) -> None:
    """Told once; what the month brought goes first."""
    platform.names["polish"](
        platform.conn, "org_1", "user_1", words(5000), lambda _, text: text * 2, quality="enhanced"
    )
    platform.backend.reserve("org_1", 1, "r1")
    platform.backend.release("org_1", "r1")
    (told,) = platform.told("low_balance")
    assert (told.account_id, told.data["balance"], told.data["threshold"]) == ("org_1", 141, 150)
    assert platform.ask("ORG_1", "get_balance")["by_kind"] == {"plan": 41, "bonus": 100}


def packages_are_bought(platform: Product) -> None:
    """By sessions of the product's own; plan credits go before the bonus, and the bonus before what was bought."""
    platform.follow("More credits")
    for organization, package, amount in (
        ("org_1", "small", 900),
        ("org_2", "medium", 2900),
        ("org_2", "large", 11900),
    ):
        platform.post("checkout.session.completed", {
            "id": f"cs_{package}", "object": "checkout.session", "mode": "payment", "status": "complete",
            "payment_status": "paid", "amount_subtotal": amount, "amount_total": amount, "currency": "usd",
            "customer": f"cus_{organization}", "payment_intent": f"pi_{package}", "livemode": False,
            "client_reference_id": organization, "metadata": {"account_id": organization, "package": package},
        })  # fmt: skip
    assert (platform.backend.available("org_1"), platform.backend.available("org_2")) == (391, 6002)
    platform.names["polish"](platform.conn, "org_1", "user_1", words(1500), lambda _, text: text * 2)
    assert platform.ask("ORG_1", "get_balance")["by_kind"] == {"bonus": 81, "purchase": 250}
    assert len(platform.told("low_balance")) == 1


def plans_change(platform: Product) -> None:
    """Up at once, for the rest of the month; down when it ends; and what is left of the plan ends with it."""
    platform.wait(seconds=(APRIL + 15 * DAY - platform.world.moment).total_seconds())
    platform.follow("Up at once")
    best = platform.names["draft"](platform.conn, "org_1", "user_1", 7, str, quality="premium")
    assert best == "max"
    platform.backend.change_plan("org_1", "team")
    assert platform.backend.sums("org_1") == (1061, 0, 1061, 0)
    platform.wait(days=15, minutes=-1)
    platform.follow("Down at the end of the month", 0)
    assert platform.backend.sums("org_1") == (1061, 0, 1061, 0)
    platform.wait(minutes=1)
    platform.follow("Down at the end of the month", 1)
    done = platform.scheduled()  # of three jobs that are at it, each organisation is booked by the one that comes first
    assert sum(done[name] for name in ("apply_scheduled_changes", "grant_plan_credits", "expire_grants")) == 3, done
    platform.follow("Down at the end of the month", 1)
    assert platform.ask("ORG_1", "get_balance")["by_kind"] == {"plan": 500, "bonus": 81, "purchase": 250}
    assert platform.ask("ORG_2", "get_balance")["by_kind"] == {"plan": 10, "purchase": 6000}
    assert platform.backend.sums("org_3") == (2000, 0, 2000, 0)


def test_the_migrations_go_back_and_the_seed_comes_again(database: Database) -> None:
    document = yaml.safe_load((EXAMPLES / "testimonials.yaml").read_text())

    def seeded() -> Any:
        with committed(database) as ledger:
            assert ledger.apply_catalog(document)
            assert ledger.apply_catalog(document) == []
            assert ledger.audit() == []
            return ledger.get_catalog()

    schema, seed = database.dump(), seeded()
    migrate.rollback(database.dsn, None)
    assert "SCHEMA credits;" in schema
    assert "SCHEMA credits;" not in database.dump()
    migrate.migrate(database.dsn)
    assert (database.dump(), seeded()) == (schema, seed)
