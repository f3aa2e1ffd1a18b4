"""A product that lives on pgcredits: database, door, Stripe, a clock for all of them, and the page that it follows.

Only what such a product has is used: webhooks over HTTP, verbs as credits_service, /rpc with tokens, the command line.
"""

import json
import os
import re
import shlex
import sys
from collections.abc import Mapping
from contextlib import ExitStack
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any, Self
from unittest.mock import patch

import httpx
import pytest
from conftest import stop_clock
from door import SECRET
from five_ways import fits, forwarder
from ledger_support import Ledger, assert_sound
from servers import Database
from stripe_fake import KEY, Call
from stripe_shop import Shop
from stripe_world import Event, Offer, World

from pgcredits import cli

BLOCKS = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
EXAMPLES = Path(__file__).resolve().parents[1] / "docs/examples"


class Till(Shop):
    """Stripe at the time of a world. What happens at it is told by the product; what it lacks, the world knows."""

    def __init__(self, world: World) -> None:
        super().__init__("", SECRET)
        self.world, self.clock = world, lambda: float(world.now)

    def _execute(self, call: Call) -> tuple[int, dict[str, Any]]:
        status, said = super()._execute(call)
        if call.method == "GET" and status == 404:
            return self.world.get(call.path, call.params, self.world.now)
        return status, said

    def add(self, about: str, kind: str, **more: Any) -> None:
        """Something that was made in the Dashboard."""
        known = {"id": about, "object": kind, "created": self.world.now, "active": True, "metadata": {}}
        self.objects[about] = {**known, "livemode": False, **more}

    def bought(self, session_id: str) -> list[tuple[str, dict[str, Any]]]:
        """A buyer pays at the page of a session: types and objects of what there is to tell."""
        session = self.objects[session_id]
        session["customer"] = self.world.customer(session["client_reference_id"])
        self._buy(session, "paid")
        told, self._told = self._told, []
        return [(event_type, self.objects[about]) for event_type, about in told]


class Product:
    """The product, while the block lasts. backend calls the verbs as credits_service."""

    def __init__(self, database: Database, name: str, **settings: Any) -> None:
        self.database, self.settings = database, settings
        self.catalogue = EXAMPLES / f"{name}.yaml"
        self.page = (EXAMPLES / f"{name}.md").read_text()
        self.world = World(offers={})
        self.tokens: dict[str, str] = {}  # what $NAME in a command of the page stands for
        self.names: dict[str, Any] = {}  # what the page's Python defines
        self.heard: set[str] = set()  # types of the events that were posted
        self._told = self._numbers = self._shown = 0
        self._sections = dict(re.findall(r"^## (.*)\n((?:(?!^## ).*\n?)*)", self.page, re.MULTILINE))

    def __enter__(self) -> Self:
        self._stack = ExitStack()
        self.conn = self._stack.enter_context(self.database.connect(autocommit=True))
        self._owner = self._stack.enter_context(self.database.connect("credits_owner", autocommit=True))
        self.backend = Ledger(self.conn, at=None)
        self.turn()
        self.till = self._stack.enter_context(Till(self.world))
        stripe = {"stripe_key": KEY, "stripe_api_base": self.till.url, "pool_size": 4}
        self.door = self._stack.enter_context(forwarder(self.database, **stripe, **self.settings))
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._stack.close()

    # Time ------------------------------------------------------------------------------------------------------------

    def turn(self) -> None:
        """The database's clock shows what the world's does."""
        self._at(self.world.now)

    def _at(self, second: int) -> None:
        if second != self._shown:  # a new clock makes every connection plan anew
            stop_clock(self._owner, datetime.fromtimestamp(second, UTC))
            self._shown = second

    def wait(self, **span: float) -> None:
        """Days, hours or seconds pass, for everybody."""
        self.world.wait(**span)
        self.turn()

    def jobs(self) -> None:
        """All that is due, to its end."""
        ran = self.backend.run_due_jobs()
        while ran:
            assert {row.outcome for row in ran} <= {"running", "done"}, ran
            ran = self.backend.run_due_jobs() if any(row.more for row in ran) else []

    # Stripe ----------------------------------------------------------------------------------------------------------

    def command(self, *words: str) -> int:
        """A command line of the product's developer, in this process; its exit code."""
        stripe = {"STRIPE_API_BASE": self.till.url, "STRIPE_SECRET_KEY": KEY}
        argv = ["pgcredits", *words, "--dsn", self.database.dsn]
        with patch.dict(os.environ, stripe), patch.object(sys, "argv", argv), pytest.raises(SystemExit) as left:
            cli.main()
        return int(left.value.code or 0)

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

    def post(self, event_type: str, about: Mapping[str, Any]) -> str:
        """An event of Stripe, signed, over HTTP; its outcome."""
        self._numbers += 1
        event = {"id": f"evt_shop_{self._numbers}", "object": "event", "type": event_type, "created": self.world.now}
        return self.deliver(json.dumps({**event, "livemode": False, "data": {"object": about}}))

    def deliver(self, payload: str) -> str:
        """A webhook; its outcome. Every one comes twice, as Stripe may have it, and counts once."""
        self.heard.add(json.loads(payload)["type"])
        first, again = self.door.post(payload.encode()), self.door.post(payload.encode())
        assert (first.status_code, again.status_code) == (200, 200), first.text
        assert again.json()["outcome"] == "duplicate", again.text
        outcome: str = first.json()["outcome"]
        return outcome

    def pay(self, session_id: str) -> list[str]:
        """A buyer pays a package at the page of a session; the outcomes of what is told of it."""
        return [self.post(event_type, about) for event_type, about in self.till.bought(session_id)]

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
        assert self.post("checkout.session.completed", session) == "applied"
        return subscription

    def tell(self) -> list[Event]:
        """The webhooks of what has happened in the world since the last time, each at its own time."""
        events = self.world.events[self._told :]
        self._told += len(events)
        for event in events:
            self._at(event.created)
            outcome = self.deliver(event.payload)
            assert outcome in {"applied", "ignored"}, (event.type, outcome)
        self.turn()
        return events

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

    def end(self, *accounts: str) -> None:
        """Every number can be proved, and all that the page shows was done."""
        for account in accounts:
            assert self.backend.prove_balance(account).ok
        assert not self.backend.list_stripe_events(status="failed")
        assert not self.backend.list_stripe_events(status="parked")
        assert_sound(self.backend)
        left = [heading for heading, section in self._sections.items() if BLOCKS.search(section)]
        assert not left, f"nobody followed {left}"

    # The page --------------------------------------------------------------------------------------------------------

    def follow(self, heading: str) -> None:
        """Do what a section of the page says, in its order, and compare what it shows."""
        done = 0
        for language, block in BLOCKS.findall(self._sections.pop(heading)):
            done += {"sql": self._sql, "sh": self._curl, "python": self._python}[language](block)
        assert done, heading

    def _sql(self, block: str) -> int:
        statements = re.findall(r"^(\w[^;]*;)\s+-- (.*)$", block, re.MULTILINE)
        assert len(statements) == block.count(";\n") + len(re.findall(r"; +--", block)), block
        for statement, expected in statements:
            rows = self.conn.execute(statement).fetchall()
            shown = " / ".join(
                " | ".join(str(value)[0].lower() if isinstance(value, bool) else str(value) for value in row)
                for row in rows
            )
            assert shown == expected, statement
        return len(statements)

    def _curl(self, block: str) -> int:
        calls = re.findall(r"^(curl .*)\n# (\d+) (.*)$", block.replace("\\\n", ""), re.MULTILINE)
        assert len(calls) == block.count("curl "), block
        for command, status, body in calls:
            words = shlex.split(re.sub(r"\$(?!DOOR)(\w+)", lambda name: self.tokens[name[1]], command))
            assert words[1].startswith("$DOOR/"), command
            given = [*zip(words[2::2], words[3::2], strict=True)]
            headers = {
                "Content-Type": "application/json",
                **dict(value.split(": ", 1) for flag, value in given if flag == "-H"),
            }
            data = dict(given).get("-d")
            path = words[1].removeprefix("$DOOR")
            answer = self.door.http.request("GET" if data is None else "POST", path, content=data, headers=headers)
            assert answer.status_code == int(status), (command, answer.text)
            assert fits(json.loads(body), answer.json()), (command, answer.text)
        return len(calls)

    def _python(self, block: str) -> int:
        exec(compile(block, self.catalogue.stem, "exec"), self.names)  # noqa: S102 - our own page
        return 1
