"""What the products of tests/scenarios live on: a door, a Stripe and a mail server, one clock, users, and their page.

Only what a product has is used: webhooks over HTTP, verbs as credits_service, /rpc with tokens, jobs, the command line.
"""

import json
import re
import shlex
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime, timedelta
from email.utils import formatdate
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import httpx
import pytest
from aiosmtpd.controller import Controller
from conftest import stop_clock
from door import SECRET
from five_ways import SERVICE, fits, forwarder, token
from ledger_support import Ledger, assert_sound
from servers import Database
from starlette.requests import Request
from starlette.responses import Response
from stripe_fake import KEY, Call
from stripe_shop import Shop
from test_notifier import Mailbox

from pgcredits import cli, outbox

Json = dict[str, Any]
ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = ROOT / "docs/examples"
START = datetime(2030, 4, 1, 12, tzinfo=UTC)  # April has 30 days


class Till(Shop):
    """Stripe at the product's time. What its buyers do is told by the product, when it likes."""

    def __init__(self) -> None:
        super().__init__("", SECRET)
        self.now = START

    async def _serve(self, request: Request) -> Response:
        answer = await super()._serve(request)
        answer.headers["Date"] = formatdate(self.now.timestamp(), usegmt=True)
        return answer

    def _new(self, kind: str, prefix: str, new: Json, chosen: str | None = None) -> str:
        about = super()._new(kind, prefix, new, chosen)
        self.objects[about]["created"] = int(self.now.timestamp())
        return about

    def _execute(self, call: Call) -> tuple[int, Json]:
        status, said = super()._execute(call)
        if said.get("object") == "checkout.session":
            said["expires_at"] = self.objects[said["id"]]["expires_at"] = int(self.now.timestamp()) + 86400
        return status, said

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
    """The product, while the block lasts. backend calls the verbs, each a transaction of its own."""

    def __init__(self, database: Database, name: str, monkeypatch: pytest.MonkeyPatch, **settings: Any) -> None:
        self.database, self.settings, self._monkeypatch = database, settings, monkeypatch
        self.catalogue = EXAMPLES / f"{name}.yaml"
        self.page = (EXAMPLES / f"{name}.md").read_text()
        self.tokens = {"BACKEND": token(**SERVICE)}  # what $NAME in a command of the page stands for
        self.names: Json = {}  # what the Python of the page defines
        self.now = START
        self._events = 0

    def __enter__(self) -> Self:
        self._monkeypatch.setattr(outbox, "POLL", 0.1)  # the door sends soon what it is to send
        self._stack = ExitStack()
        self.conn = self._stack.enter_context(self.database.connect(autocommit=True))
        self.owner = self._stack.enter_context(self.database.connect("credits_owner", autocommit=True))
        self.backend = Ledger(self.conn, at=None)
        self.till = self._stack.enter_context(Till())
        self.wait()
        stripe = {"stripe_key": KEY, "stripe_api_base": self.till.url}
        self.door = self._stack.enter_context(forwarder(self.database, **stripe, **self.settings))
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._stack.close()

    def wait(self, span: timedelta = timedelta()) -> None:
        """Time passes, for everybody; what is on its way arrives before, or it would be late and sent again."""
        until(lambda: not any(self.backend.list_notifications(state=state) for state in ("pending", "sent")))
        self.now += span
        self.till.now = self.now
        stop_clock(self.owner, self.now)

    def command(self, line: str) -> None:
        """The product's developer gives a command; it succeeds."""
        patch = self._monkeypatch
        patch.chdir(ROOT)
        patch.setenv("PGCREDITS_DSN", self.database.dsn)
        patch.setenv("STRIPE_API_BASE", self.till.url)
        patch.setenv("STRIPE_SECRET_KEY", KEY)
        patch.setattr("sys.argv", line.split())
        with pytest.raises(SystemExit) as left:
            cli.main()
        assert left.value.code in (0, None), line

    def job(self, name: str) -> int:
        """Run a job to its end; how much it did."""
        done = 0
        while True:
            row = self.backend.run_job(name)
            assert row.outcome in ("done", "running"), row
            done += int(row.rows_done)
            if not row.more:
                return done

    # Stripe ----------------------------------------------------------------------------------------------------------

    def event(self, event_type: str, about: Mapping[str, Any]) -> bytes:
        """An event of Stripe as it is posted."""
        self._events += 1
        event = {"id": f"evt_{self._events}", "object": "event", "type": event_type, "livemode": False}
        return json.dumps({**event, "created": int(self.now.timestamp()), "data": {"object": about}}).encode()

    def tell(self, event_type: str, about: Mapping[str, Any], outcome: str = "applied") -> None:
        """A webhook, signed, which Stripe delivers twice; what is parked is tried again by that."""
        body = self.event(event_type, about)
        for expected in (outcome, "duplicate" if outcome == "applied" else outcome):
            answer = self.door.post(body)
            assert (answer.status_code, answer.json()["outcome"]) == (200, expected), answer.text

    def tell_news(self) -> list[str]:
        """All that happened at the till; the types."""
        news = self.till.news()
        for event_type, about in news:
            self.tell(event_type, about)
        return [event_type for event_type, _ in news]

    # Users -----------------------------------------------------------------------------------------------------------

    def rpc(self, who: str, function: str, schema: str = "credits_api", **arguments: Any) -> httpx.Response:
        """A call by the bearer of a token."""
        headers = {"Authorization": f"Bearer {self.tokens[who]}", "Content-Profile": schema}
        return self.door.http.post(f"/rpc/{function}", json=arguments, headers=headers)

    def ask(self, who: str, function: str, **arguments: Any) -> Any:
        """The answer to a call that is not refused."""
        answer = self.rpc(who, function, **arguments)
        assert answer.status_code == 200, answer.text
        return answer.json()

    def refusal(self, who: str, function: str, **arguments: Any) -> tuple[int, str]:
        """Status and code of one that is."""
        answer = self.rpc(who, function, **arguments)
        return answer.status_code, answer.json()["message"]

    def told(self, kind: str) -> list[Any]:
        """Notifications of a kind, the oldest first."""
        return list(reversed(self.backend.list_notifications(kind=kind)))

    def end(self, *accounts: str) -> None:
        """Every balance can be proved, and nothing is wrong anywhere."""
        for account in accounts:
            assert self.backend.prove_balance(account).ok
        assert self.job("audit") == 0
        assert_sound(self.backend)

    # The page --------------------------------------------------------------------------------------------------------

    def follow(self, heading: str, number: int | None = None) -> None:
        """Do what a section of the page says, or one block of it, and compare what it shows."""
        section = self.page.split(f"\n## {heading}\n")[1].split("\n## ")[0]
        ways = {"sql": self._sql, "sh": self._curl, "python": self._python, "console": self._console}
        blocks = re.findall(r"^```(\w+)\n(.*?)^```$", section, re.MULTILINE | re.DOTALL)
        assert blocks, heading
        for language, block in blocks if number is None else [blocks[number]]:
            ways[language](block)

    def _sql(self, block: str) -> None:
        statements = re.findall(r"^(\w[^;]*;)(?:\s+-- (.*))?$", block, re.MULTILINE)
        assert len(statements) == len(re.findall(r"^\w", block, re.MULTILINE)), block
        for statement, expected in statements:
            conn = self.owner if "credits.settings" in statement else self.conn
            cursor = conn.execute(statement)
            rows = cursor.fetchall() if cursor.description else []
            shown = " / ".join(" | ".join(map(as_shown, row)) for row in rows)
            assert shown == (expected or ""), statement

    def _curl(self, block: str) -> None:
        calls = re.findall(r"^(curl .*)\n# (\d+) (.*)$", block.replace("\\\n", ""), re.MULTILINE)
        assert len(calls) == block.count("curl "), block
        for command, status, body in calls:
            words = shlex.split(re.sub(r"\$(?!DOOR)(\w+)", lambda name: self.tokens[name[1]], command))
            given = [*zip(words[2::2], words[3::2], strict=True)]
            headers = dict(value.split(": ", 1) for flag, value in given if flag == "-H")
            data, path = dict(given).get("-d"), words[1].removeprefix("$DOOR")
            method = "GET" if data is None else "POST"
            headers |= {} if data is None else {"Content-Type": "application/json"}
            answer = self.door.http.request(method, path, content=data, headers=headers)
            assert answer.status_code == int(status), (command, answer.text)
            assert fits(json.loads(body), answer.json()), (command, answer.text)

    def _console(self, block: str) -> None:
        for line in block.splitlines():
            self.command(line)

    def _python(self, block: str) -> None:
        exec(compile(block, self.catalogue.stem, "exec"), self.names)  # noqa: S102 - our own page


def as_shown(value: Any) -> str:
    """A value as the page prints it."""
    return str(value)[0].lower() if isinstance(value, bool) else str(value)


def until(condition: Callable[[], bool], seconds: float = 20) -> None:
    """Wait for the door, which does its errands beside."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it never came"
        time.sleep(0.05)


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
