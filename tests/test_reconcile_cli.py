"""pgcredits stripe reconcile, against a server that speaks as Stripe does."""

from collections.abc import Iterator
from typing import Any

import pytest
from ledger_support import assert_sound, committed, session
from servers import ONE_ENGINE, Database
from stripe_fake import KEY, StripeFake
from typer.testing import CliRunner, Result

from pgcredits.cli import cli

pytestmark = ONE_ENGINE  # it is the command that is tested


@pytest.fixture
def fake() -> Iterator[StripeFake]:
    with StripeFake() as running:
        yield running


def command(database: Database, fake: StripeFake, *arguments: str) -> Result:
    """Run the command as the service would."""
    environment = {
        "PGCREDITS_DSN": database.dsn, "PGCREDITS_ROLE": "credits_service", "STRIPE_API_BASE": fake.url,
        "STRIPE_SECRET_KEY": KEY, "COLUMNS": "200",
    }  # fmt: skip
    return CliRunner().invoke(cli, ["stripe", "reconcile", *arguments], env=environment)


def sell(fake: StripeFake, number: int, **changes: Any) -> None:
    """Somebody has paid, and Stripe has told nobody."""
    sold = session(f"cs_{number}", payment_intent=f"pi_{number}", **changes)
    fake.objects[sold["id"]] = {"created": 2_000_000_000, **sold}


def test_what_never_arrived_is_shown_and_then_repaired(database: Database, fake: StripeFake) -> None:
    with committed(database) as ledger:
        ledger.load_demo_catalog()
        ledger.open("alpha")
        fake.page = 2
        for number in range(5):
            sell(fake, number)
        sell(fake, 9, metadata={}, customer="cus_9")
        fake.objects["re_1"] = {
            "id": "re_1", "object": "refund", "created": 2_000_000_000, "amount": 500, "currency": "usd",
            "charge": "ch_1", "payment_intent": "pi_1", "status": "succeeded", "metadata": {},
        }  # fmt: skip
        fake.objects["ch_1"] = {
            "id": "ch_1", "object": "charge", "created": 2_000_000_000, "amount": 1000, "amount_captured": 1000,
            "amount_refunded": 500, "currency": "usd", "payment_intent": "pi_1",
        }  # fmt: skip
        shown = command(database, fake, "--since", "7d")
        assert shown.exit_code == 1, shown.output
        assert "7 compared, 7 had not arrived; 0 repaired, 0 under way, 5 remain, 2 of others." in shown.output
        assert ledger.available() == 0
        fake.script("500", None, "cut after")
        repaired = command(database, fake, "--since", "7d", "--repair")
        assert repaired.exit_code == 0, repaired.output
        assert "7 compared, 7 had not arrived; 6 repaired, 0 under way, 0 remain, 1 of others." in repaired.output
        assert "cs_4" in repaired.output
        assert ledger.available() == 4500
        assert_sound(ledger)
        again = command(database, fake)
        assert again.exit_code == 0
        assert "1 had not arrived; 0 repaired, 0 under way, 0 remain, 1 of others." in again.output


def test_what_cannot_be_done_is_said(database: Database, fake: StripeFake) -> None:
    for none in ("yesterday", "999999d", "0001-01-01"):
        wrong = command(database, fake, "--since", none)
        assert (wrong.exit_code, "--since is 7d" in str(wrong.exception)) == (1, True), none
    with committed(database) as ledger:
        ledger.load_demo_catalog()
        sell(fake, 1, metadata={"account_id": "nobody", "package": "starter"})
        late = command(database, fake, "--repair", "--patience", "2")
        assert late.exit_code == 1
        assert "1 under way" in late.output
