"""A product that lives on pgcredits: database, door, Stripe, mail, one clock for all, and the page that it follows.

Only what such a product has is used: webhooks over HTTP, verbs as credits_service, /rpc with tokens, the command line.
"""

import json
import os
import re
import socket
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, chdir, contextmanager
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any, Self
from unittest.mock import patch

import httpx
import psycopg
import pytest
from aiosmtpd.controller import Controller
from conftest import stop_clock
from door import SECRET, as_curl
from five_ways import SERVICE, fits, forwarder, token
from ledger_support import Ledger, assert_sound
from psycopg import Connection
from servers import Database, until
from stripe_fake import KEY, Call
from stripe_shop import Shop
from stripe_world import START, Event, Offer, World
from test_notifier import Mailbox

from pgcredits import cli, outbox

Json = dict[str, Any]
BLOCKS = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = ROOT / "docs/examples"
CRON_TURN = 240  # seconds: a minute until it wakes, what the jobs take, and on a busy machine some more turns
QUIET = range(5, 50)  # seconds of a minute: pg_cron has begun what this one brings, and the next is not near
TURN = """
select d.jobid, d.status, d.return_message from cron.job_run_details d join cron.job j using (jobid)
 where j.database = %s"""
LAUNCHER = (
    "select state, wait_event, backend_start, xact_start from pg_stat_activity where backend_type = 'pg_cron launcher'"
)
ENTRIES = "select from cron.job where jobname like 'pgcredits %% of ' || %s"
WORKERS = "select from pg_stat_activity where datname = current_database() and backend_type = 'pg_cron'"
APRIL = datetime(2030, 4, 1, 12, tzinfo=UTC)  # which has 30 days


class Till(Shop):
    """Stripe at the time of a world. What happens at it is told by the product; what it lacks, the world knows."""

    def __init__(self, world: World) -> None:
        super().__init__("", SECRET)
        self.world, self.clock = world, lambda: float(world.now)

    def _execute(self, call: Call) -> tuple[int, Json]:
        status, said = super()._execute(call)
        if call.method == "GET" and status == 404:
            return self.world.get(call.path, call.params, self.world.now)
        return status, said

    def _buy(self, session: Json, how: str) -> None:
        if how != "expired":
            session["customer"] = self.world.customer(session["client_reference_id"])
        super()._buy(session, how)

    def add(self, about: str, kind: str, **more: Any) -> None:
        """Something that was made in the Dashboard."""
        known = {"id": about, "object": kind, "created": self.world.now, "active": True, "metadata": {}}
        self.objects[about] = {**known, "livemode": False, **more}

    def visit(self, session_id: str, how: str, **changes: Any) -> None:
        """A buyer at the page of a session pays, or lets it expire."""
        session = self.objects[session_id]
        session |= changes
        self._buy(session, how)

    def news(self) -> list[tuple[str, Json]]:
        """Types and objects of what happened since the last time."""
        told, self._told = self._told, []
        return [(event_type, self.objects[about]) for event_type, about in told]


class Product:
    """The product, while the block lasts. backend calls the verbs as credits_service, each a transaction of its own."""

    endpoint = "default"

    def __init__(self, database: Database, name: str, start: datetime = START, **settings: Any) -> None:
        self.database, self.settings = database, settings
        self.cron_dsn = database.engine.cron_dsn
        self.catalogue = EXAMPLES / f"{name}.yaml"
        self.page = (EXAMPLES / f"{name}.md").read_text()
        self.world = World(offers={})
        self.world.now = int(start.timestamp())
        self.tokens = {"BACKEND": token(**SERVICE)}  # what $NAME in a command of the page stands for
        self.names: Json = {}  # what the page's Python defines
        self.heard: set[str] = set()  # types of the events that were posted
        self._followed: set[str] = set()
        self._told = self._numbers = self._shown = 0

    def __enter__(self) -> Self:
        self._stack = ExitStack()
        self._stack.enter_context(patch.object(outbox, "POLL", 0.1))  # the door sends soon what it is to send
        self.conn = self._stack.enter_context(self.database.connect(autocommit=True))
        self.owner = self._stack.enter_context(self.database.connect("credits_owner", autocommit=True))
        self.backend = Ledger(self.conn, at=None)
        self.turn()
        self.till = self._stack.enter_context(Till(self.world))
        stripe = {"stripe_key": KEY, "stripe_api_base": self.till.url, "pool_size": 4}
        self.door = self._stack.enter_context(forwarder(self.database, **{**stripe, **self.settings}))
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._stack.close()

    # Time ------------------------------------------------------------------------------------------------------------

    def turn(self) -> None:
        """The database's clock shows what the world's does."""
        self._at(self.world.now)

    def _at(self, second: int) -> None:
        if second != self._shown:  # a new clock makes every connection plan anew
            stop_clock(self.owner, datetime.fromtimestamp(second, UTC))
            self._shown = second

    def wait(self, **span: float) -> None:
        """Time passes, for everybody; what is on its way arrives before, or it would be late and sent again."""
        until(lambda: not any(self.backend.list_notifications(state=state) for state in ("pending", "sent")))
        self.world.wait(**span)
        self.turn()

    def jobs(self) -> None:
        """All that is due, to its end."""
        ran = self.backend.run_due_jobs()
        while ran:
            assert {row.outcome for row in ran} <= {"running", "done"}, ran
            ran = self.backend.run_due_jobs() if any(row.more for row in ran) else []

    def scheduled(self) -> dict[str, int]:
        """All that is due is done, on PostgreSQL 15 by the real pg_cron; how many rows each job did."""
        last = max((row.run_id for row in self.backend.list_job_runs(max_rows=1)), default=0)
        if self.cron_dsn:
            self.cron(self.cron_dsn)
        else:
            self.jobs()
        runs = [row for row in self.backend.list_job_runs(max_rows=1000) if row.run_id > last]
        assert {row.outcome for row in runs} == {"done"}, runs
        assert {row.runner for row in runs} <= ({"pg_cron 1", "pg_cron 2"} if self.cron_dsn else {"somebody"}), runs
        done: Counter[str] = Counter()
        for row in runs:
            done[row.name] += row.rows_done
        return done

    def cron(self, dsn: str) -> None:
        """pg_cron has the jobs for one turn: it wakes with the next minute, and nobody else does any of them."""
        scheduled: list[float] = []
        with psycopg.connect(dsn, autocommit=True) as cron, self.database.admin() as admin:

            def turned() -> bool:
                # An entry that is made while pg_cron 1.4 reads its table may be overlooked until another one changes
                # (RefreshTaskHash): made again, it is read.
                if not scheduled or time.monotonic() > scheduled[-1] + CRON_TURN / 3:
                    self.command("pgcredits jobs schedule")
                    scheduled.append(time.monotonic())
                return self.turned(cron, admin)

            try:
                until(
                    turned,
                    CRON_TURN,
                    tells=lambda: [
                        cron.execute(TURN, [self.database.name]).fetchall(),
                        *admin.execute(LAUNCHER).fetchall(),
                    ],
                )
            finally:
                self.command("pgcredits jobs unschedule")
            assert not cron.execute(ENTRIES, [self.database.name]).fetchall()
            until(lambda: not admin.execute(WORKERS).fetchall())

    def turned(self, cron: Connection[Any], admin: Connection[Any]) -> bool:
        """Whether both of its workers have been through, and no other turn is near: it would be cut off.

        The history alone does not say so. A run that ended may stay running in it: pg_cron 1.4 reads what its worker
        answers while that still runs, and then takes it for no end (GetBgwTaskFeedback).
        """
        runs = cron.execute(TURN, [self.database.name]).fetchall()
        assert "failed" not in {status for _, status, _ in runs}, runs
        through = len({entry for entry, status, _ in runs if status == "succeeded"}) == 2
        return through and int(time.time() % 60) in QUIET and not admin.execute(WORKERS).fetchall()

    def job(self, name: str) -> int:
        """Run a job to its end; how much it did."""
        done = 0
        while True:
            row = self.backend.run_job(name)
            assert row.outcome in {"running", "done"}, row
            done += int(row.rows_done)
            if not row.more:
                return done

    def command(self, line: str) -> None:
        """The product's developer gives a command; it succeeds."""
        known = {"PGCREDITS_DSN": self.database.dsn, "STRIPE_API_BASE": self.till.url, "STRIPE_SECRET_KEY": KEY}
        known |= {"PGCREDITS_CRON_DSN": self.cron_dsn} if self.cron_dsn else {}
        argv = patch.object(sys, "argv", line.split())
        with chdir(ROOT), patch.dict(os.environ, known), argv, pytest.raises(SystemExit) as left:
            cli.main()
        assert left.value.code in {0, None}, line

    # Stripe ----------------------------------------------------------------------------------------------------------

    def offer(self, price_id: str, amount: int, interval: str) -> None:
        """Let the world sell at a price that there is at Stripe."""
        price = self.till.objects[price_id]
        product = self.till.objects[price["product"]]
        assert (price["unit_amount"], price["recurring"]["interval"]) == (amount, interval)
        self.world.offers[price_id.removeprefix("price_")] = Offer(
            amount, (1, interval), price["metadata"], product["metadata"]
        )
        for one in (product, price):
            facts = {key: value for key, value in one.items() if key not in {"id", "object", "created", "livemode"}}
            self.world.put(one["object"], one["id"], **facts)
        recurring = {"interval": interval, "interval_count": 1, "usage_type": "licensed"}  # a form knows only texts
        self.world.put("price", price_id, recurring=recurring)

    def event(self, event_type: str, about: Mapping[str, Any]) -> str:
        """An event of Stripe as it is posted."""
        self._numbers += 1
        event = {"id": f"evt_shop_{self._numbers}", "object": "event", "type": event_type, "created": self.world.now}
        return json.dumps({**event, "livemode": False, "data": {"object": about}})

    def deliver(self, payload: str) -> str:
        """A webhook; its outcome. Every one comes twice, as Stripe may have it; what did not go well is tried again."""
        self.heard.add(json.loads(payload)["type"])
        first, again = (self.door.post(payload.encode(), endpoint=self.endpoint) for _ in range(2))
        assert (first.status_code, again.status_code) == (200, 200), first.text
        outcome: str = first.json()["outcome"]
        assert again.json()["outcome"] == (outcome if outcome in {"parked", "failed"} else "duplicate"), again.text
        return outcome

    def post(self, event_type: str, about: Mapping[str, Any], outcome: str = "applied") -> None:
        """An event about an object, of which the outcome is known."""
        assert self.deliver(self.event(event_type, about)) == outcome, event_type

    def tell(self) -> list[str]:
        """The webhooks of what happened since the last time, in the world, each at its time, and at the till; types."""
        events = self.news()
        for event in events:
            self._at(event.created)
            outcome = self.deliver(event.payload)
            assert outcome in {"applied", "ignored"}, (event.type, outcome)
        self.turn()
        sold = self.till.news()
        for event_type, about in sold:
            self.post(event_type, about)
        return [event.type for event in events] + [event_type for event_type, _ in sold]

    def news(self) -> list[Event]:
        """What the world has told since the last time."""
        events = self.world.events[self._told :]
        self._told += len(events)
        return events

    def visit(self, session_id: str, how: str = "paid", **changes: Any) -> list[str]:
        """A buyer pays at the page of a session, or lets it expire; types of what is told of it."""
        self.till.visit(session_id, how, **changes)
        return self.tell()

    def subscribe(self, session_id: str) -> str:
        """A buyer takes a plan at the page of a session; the subscription, of which all is told."""
        session = self.till.objects[session_id]
        account, (item,) = session["client_reference_id"], session["line_items"]
        assert session["subscription_data"]["metadata"]["account_id"] == account
        subscription = self.world.subscribe(account, item["price"].removeprefix("price_"), paid=False)
        invoice = self.world.first_invoice(subscription)
        self.world.pay(invoice)
        session |= {"status": "complete", "payment_status": "paid", "customer": self.world.customer(account)}
        session |= {"subscription": subscription, "invoice": invoice}
        self.tell()
        self.post("checkout.session.completed", session)
        return subscription

    # Users -----------------------------------------------------------------------------------------------------------

    def rpc(self, who: str, call: str, schema: str = "credits_api", **arguments: Any) -> httpx.Response:
        """A call of the bearer of a token."""
        headers = {"Authorization": f"Bearer {self.tokens[who]}", "Content-Profile": schema}
        return self.door.http.post(f"/rpc/{call}", json=arguments, headers=headers)

    def ask(self, who: str, call: str, **arguments: Any) -> Any:
        """The answer of a call that is not refused."""
        answer = self.rpc(who, call, **arguments)
        assert answer.status_code == 200, answer.text
        return answer.json()

    def refusal(self, who: str, call: str, schema: str = "credits_api", **arguments: Any) -> tuple[int, str]:
        """Status and code of one that is."""
        answer = self.rpc(who, call, schema, **arguments)
        return answer.status_code, answer.json()["message"]

    def told(self, kind: str) -> list[Any]:
        """Notifications of a kind, the oldest first."""
        return list(reversed(self.backend.list_notifications(kind=kind)))

    def sound(self, *accounts: str, parked: int = 0) -> None:
        """Every number can be proved, and nothing is wrong anywhere."""
        for account in accounts:
            assert self.backend.prove_balance(account).ok
        assert not self.backend.list_stripe_events(status="failed")
        assert len(self.backend.list_stripe_events(status="parked")) == parked
        assert self.job("audit") == 0
        assert_sound(self.backend)

    def end(self, *accounts: str, parked: int = 0) -> None:
        """It is sound, and all that the page shows was done."""
        self.sound(*accounts, parked=parked)
        left = [block for _, block in BLOCKS.findall(self.page) if block not in self._followed]
        assert not left, f"nobody followed {left}"

    # The page --------------------------------------------------------------------------------------------------------

    def follow(self, heading: str, number: int | None = None) -> None:
        """Do what a section of the page says, in its order, or one block of it, and compare what it shows."""
        section = self.page.split(f"\n## {heading}\n")[1].split("\n## ")[0]
        ways = {"sql": self._sql, "sh": self._curl, "python": self._python, "console": self._console}
        blocks = BLOCKS.findall(section)
        assert blocks, heading
        for language, block in blocks if number is None else [blocks[number]]:
            ways[language](block)
            self._followed.add(block)

    def _sql(self, block: str) -> None:
        statements = re.findall(r"^(\w[^;]*;)(?:\s+-- (.*))?$", block, re.MULTILINE)
        assert len(statements) == len(re.findall(r"^\w", block, re.MULTILINE)) > 0, block
        for statement, expected in statements:
            cursor = self.conn.execute(statement)
            rows = cursor.fetchall() if cursor.description else []
            shown = " / ".join(" | ".join(map(as_shown, row)) for row in rows)
            assert shown == expected, statement

    def _curl(self, block: str) -> None:
        calls = re.findall(r"^(curl .*)\n# (\d+) (.*)$", block.replace("\\\n", ""), re.MULTILINE)
        assert len(calls) == block.count("curl ") > 0, block
        for command, status, body in calls:
            named = re.sub(r"\$(?!DOOR)(\w+)", lambda name: self.tokens[name[1]], command)
            answer = as_curl(self.door.http, named)
            assert answer.status_code == int(status), (command, answer.text)
            assert fits(json.loads(body), answer.json()), (command, answer.text)

    def _console(self, block: str) -> None:
        for line in block.splitlines():
            self.command(line)

    def _python(self, block: str) -> None:
        exec(compile(block, self.catalogue.stem, "exec"), self.names)  # noqa: S102 - our own page


def as_shown(value: Any) -> str:
    """A value as the page prints it."""
    return "null" if value is None else str(value)[0].lower() if isinstance(value, bool) else str(value)


@contextmanager
def mail_server() -> Iterator[tuple[Mailbox, Json]]:
    """A mail server on this machine: what it got, and the settings by which the door uses it."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    mailbox = Mailbox()
    server = Controller(mailbox, hostname="127.0.0.1", port=port)
    server.start()
    try:
        yield mailbox, {"smtp_url": f"smtp://127.0.0.1:{port}", "mail_from": "credits@example.com"}
    finally:
        server.stop()
