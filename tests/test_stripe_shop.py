"""docs/stripe.md from "Try it without Stripe" alone: its own lines, run as a newcomer would, but for the ports."""

import os
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
from door import Door
from ledger_support import Ledger, assert_sound, committed
from servers import ONE_ENGINE, Database
from stripe_fake import KEY

ROOT = Path(__file__).resolve().parents[1]
SECTION = (ROOT / "docs/stripe.md").read_text().split("## Try it without Stripe")[1].split("\n## ")[0]
SECRET = "whsec_to_try"
SHOP, DOOR = "127.0.0.1:12111", "127.0.0.1:8080"
pytestmark = ONE_ENGINE


@contextmanager
def shop(webhook: str) -> Iterator[str]:
    """The server that the page starts, on a port of its own; where it is."""
    (line,) = re.findall(r"^\.venv/bin/python (tests/stripe_shop.py .*) &$", SECTION, re.MULTILINE)
    command = shlex.split(line.replace(DOOR, webhook).replace("12111", "0"))
    with subprocess.Popen(
        [sys.executable, *command], cwd=ROOT, env={**os.environ, "STRIPE_WEBHOOK_SECRET": SECRET}, text=True,
        stdout=subprocess.PIPE,
    ) as running:  # fmt: skip
        assert running.stdout
        told = re.search(r"http://(\S+); its key is (\S+)", running.stdout.readline())
        assert told
        assert told[2] == KEY
        try:
            yield told[1]
        finally:
            running.terminate()


def shown(ledger: Ledger, statement: str) -> str:
    row = ledger.query(statement)[0]
    return " | ".join(str(value) for value in row)


def test_a_newcomer_gets_through_with_the_page_alone(database: Database) -> None:
    settings = dict(re.findall(r"(STRIPE_\w+)=(\S+)", SECTION))
    assert settings == {"STRIPE_SECRET_KEY": KEY, "STRIPE_API_BASE": f"http://{SHOP}", "STRIPE_WEBHOOK_SECRET": SECRET}
    lines = re.findall(r"^(select .*;) +-- (.*)$|^curl -d (\S+) (http://\S+)$", SECTION, re.MULTILINE)
    assert len(lines) > 15
    with committed(database) as ledger:
        ledger.load_demo_catalog()
        # The shop must know a door, and the door that works the shop: here they are two doors of one database.
        with (
            Door(database.dsn, webhook_secrets={"": (SECRET,)}) as probe,
            shop(f"127.0.0.1:{probe.port}") as at,
            Door(database.dsn, role="credits_service", stripe_key=KEY, stripe_api_base=f"http://{at}"),
        ):
            for statement, expected, form, url in lines:
                if url:
                    page = url.replace(SHOP, at)
                    assert "Pay by a method that takes days" in httpx.get(page).text
                    name, _, value = form.partition("=")
                    assert httpx.post(page, data={name: value}).headers["location"] == "http://localhost:3000/thanks"
                    continue
                deadline, said = time.monotonic() + 15, ""
                while (said := shown(ledger, statement).replace(at, SHOP)) != expected:
                    assert time.monotonic() < deadline, f"{statement} says {said}"
                    time.sleep(0.1)
            assert_sound(ledger)

            for number, (how, status) in enumerate([("unpaid", "processing"), ("expired", "expired")]):
                key = f"cart_2{number}"
                checkout = {"package": "starter", "success_url": "http://localhost:3000/thanks", "key": key}
                ledger.create_checkout("user_1", **checkout)
                while not (url := ledger.get_checkout("user_1", key).url):
                    time.sleep(0.1)
                httpx.post(url, data={"how": how})
                assert ledger.list_purchases(account_id="user_1")[0].status == status
                assert "closed" in httpx.get(url).text
            portal = ledger.create_portal_session("user_1", "http://localhost:3000/account", key="visit_1")
            assert "http://localhost:3000/account" in httpx.get(portal.url).text
