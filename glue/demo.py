"""The tour: buy credits with a signed Stripe event, hold some, use fewer, and prove the account."""

import hashlib
import hmac
import json
import secrets
import time
import urllib.error
import urllib.request
from decimal import Decimal
from typing import Any

import psycopg
from rich.console import Console
from rich.padding import Padding
from rich.table import Table

from pgcredits.db import Row, call

ENDPOINT = "default"
PACKAGE = "starter"


class DemoError(Exception):
    """The tour cannot go on; the text says why."""


def run(console: Console, dsn: str, url: str, secret: str) -> None:
    """Take the tour on a running door (url) and its database (dsn), with fresh ids. Raises DemoError, psycopg.Error."""
    with psycopg.connect(dsn, autocommit=True) as conn:
        _Tour(console, conn, url, secret).run()


class _Tour:
    def __init__(self, console: Console, conn: psycopg.Connection[Any], url: str, secret: str) -> None:
        self._console, self._conn, self._url, self._secret = console, conn, url.rstrip("/"), secret
        self._number = 0
        run = secrets.token_hex(4)
        self._account, self._job = f"demo_{run}", f"job_{run}"
        self._event_id, self._session = f"evt_demo_{run}", f"cs_test_demo_{run}"

    def run(self) -> None:
        packages = {row["code"]: row for row in self._rows("list_packages")}
        if PACKAGE not in packages:
            raise DemoError(f"there is no package '{PACKAGE}' on sale in this database; the tour buys that one")
        package = packages[PACKAGE]

        self._step("Open an account. Its id is your own key for a user or a team.")
        self._call("open_account", {"account_id": self._account}, "account_id", "status", "plan")

        event = self._paid_session(package)
        self._step("Stripe says that a checkout was paid. The event is signed, and verified before SQL sees it.")
        self._post(event, "applied")
        self._step("Stripe may send an event again. Sent twice, it counts once.")
        self._post(event, "duplicate")

        self._step(f"The {package['credits']} credits of the package are there.")
        self._call("get_balance", {"account_id": self._account}, "available", "held", "balance")
        self._step("Before a long job, hold what it may cost. Nobody else can spend it meanwhile.")
        hold = {"account_id": self._account, "amount": 30, "reservation_id": self._job}
        self._call("reserve", hold, "reservation_id", "amount", "available")
        self._step("The job took less: book 18.5, and the rest is free again.")
        actual = {"account_id": self._account, "reservation_id": self._job, "amount": Decimal("18.5")}
        self._call("settle", actual, "status", "charged", "released", "available")
        self._step("Every movement is an entry of the ledger, newest first.")
        columns = ("entry_seq", "kind", "amount", "balance_after", "reservation_id")
        self._call("history", {"account_id": self._account}, *columns)
        self._step("The proof: everything is computed anew from the entries and compared, hash chain included.")
        self._call("prove_balance", {"account_id": self._account}, "ok", "balance", "entries_sum", "grants_sum", "hash")

    def _step(self, text: str) -> None:
        self._number += 1
        self._console.print(f"\n{self._number}. {text}", style="bold", highlight=False, markup=False)

    def _rows(self, function: str, **arguments: Any) -> list[Row]:
        return call(self._conn, function, **arguments)

    def _call(self, function: str, arguments: Row, *columns: str) -> None:
        shown = ", ".join(
            f"{name} => '{value}'" if isinstance(value, str) else f"{name} => {value}"
            for name, value in arguments.items()
        )
        self._say(f"select * from credits.{function}({shown})")
        table = Table(*columns, box=None, header_style="dim", padding=(0, 3, 0, 0))
        for row in self._rows(function, **arguments):
            table.add_row(*("" if row[name] is None else str(row[name]) for name in columns))
        self._console.print(Padding(table, (0, 0, 0, 3)))

    def _say(self, text: str) -> None:
        self._console.print(f"   {text}", style="cyan", highlight=False, markup=False, soft_wrap=True)

    def _post(self, event: Row, expected: str) -> None:
        body = json.dumps(event).encode()
        now = int(time.time())
        signature = hmac.new(self._secret.encode(), f"{now}.".encode() + body, hashlib.sha256).hexdigest()
        url = f"{self._url}/webhooks/stripe/{ENDPOINT}"
        self._say(f"POST {url}   {event['type']} {event['id']}")
        headers = {"Content-Type": "application/json", "Stripe-Signature": f"t={now},v1={signature}"}
        request = urllib.request.Request(url, body, headers)  # noqa: S310 - the address is the operator's own
        try:
            with urllib.request.urlopen(request, timeout=15) as response:  # noqa: S310
                answer = json.load(response)
        except urllib.error.HTTPError as error:
            with error:
                raise DemoError(f"{url} answered {error.code}: {error.read().decode(errors='replace')}") from error
        except OSError as error:
            raise DemoError(f"nobody answers at {url}: {error}") from error
        self._console.print(f"   200 {json.dumps(answer)}", highlight=False, markup=False)
        if answer["outcome"] != expected:
            raise DemoError(f"the event should be {expected}; its row in credits.stripe_events says why it is not")

    def _paid_session(self, package: Row) -> Row:
        session = {
            "id": self._session, "object": "checkout.session", "mode": "payment", "payment_status": "paid",
            "status": "complete", "livemode": False, "client_reference_id": self._account, "customer": None,
            "metadata": {"account_id": self._account, "package": PACKAGE},
            "amount_subtotal": package["price"], "amount_total": package["price"], "currency": package["currency"],
            "payment_intent": self._session.replace("cs_test", "pi"),
        }  # fmt: skip
        return {
            "id": self._event_id, "object": "event", "type": "checkout.session.completed", "created": int(time.time()),
            "livemode": False, "pending_webhooks": 1, "data": {"object": session},
        }  # fmt: skip
