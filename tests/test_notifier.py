"""The worker of notifications against receivers that fail in every way, a mail server, and its own death."""

import asyncio
import logging
import os
import re
import socket
import subprocess
import sys
import threading
import time
from collections import Counter, deque
from collections.abc import Iterator
from contextlib import contextmanager
from email import message_from_bytes, policy
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import pytest
import uvicorn
from aiosmtpd.controller import Controller
from aiosmtpd.smtp import SMTP, Envelope, Session
from door import Door
from ledger_support import Ledger, committed
from servers import ONE_ENGINE, Database, until
from standardwebhooks.webhooks import Webhook
from starlette.types import Message, Receive, Scope, Send

from pgcredits import notifier, outbox
from pgcredits.db import Database as Pool
from pgcredits.settings import Settings, SettingsError

PAGE = (Path(__file__).resolve().parents[1] / "docs/notifications.md").read_text()
ROLE = "credits_service"
SECRET, OTHER = "whsec_" + "YWxwaGE" * 6, "whsec_" + "YmV0YQ" * 6
pytestmark = ONE_ENGINE  # it is the network that is tested


class Receiver:
    """The receiver of the manual, behind a network that fails as the script says."""

    def __init__(self) -> None:
        (example,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
        names: dict[str, Any] = {}
        exec(example, names)  # noqa: S102 - the manual is ours
        self.app, self.received = names["app"], names["received"]
        self.script: deque[str] = deque()
        self.calls: Counter[str] = Counter()  # by path and id
        self.present: Counter[str] = Counter()
        self.together = 0  # the most that was under way of one id at one time
        self.hold = 0.0  # seconds before it answers

    def __enter__(self) -> Self:
        listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        self._server = uvicorn.Server(uvicorn.Config(self._serve, interface="asgi3", log_config=None, lifespan="off"))
        self._thread = threading.Thread(target=self._server.run, kwargs={"sockets": [listener]})
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._server.should_exit = self._server.force_exit = True
        self._thread.join()

    async def _serve(self, scope: Scope, receive: Receive, send: Send) -> None:
        message_id = dict(scope["headers"])[b"webhook-id"].decode()
        self.calls[f"{scope['path']} {message_id}"] += 1
        self.present[message_id] += 1
        self.together = max(self.together, self.present[message_id])
        fault = self.script.popleft() if self.script else ""
        try:
            await asyncio.sleep(self.hold)
            await self._answer(fault, scope, receive, send)
        finally:
            self.present[message_id] -= 1

    async def _answer(self, fault: str, scope: Scope, receive: Receive, send: Send) -> None:
        async def quiet(_: Message) -> None:
            return

        match fault:
            case "hang":
                await asyncio.sleep(1.5)
            case "after":  # it has it, and says that it does not
                await self.app(scope, receive, quiet)
                await self._say(send, 500, b"no")
            case "slow":
                await asyncio.sleep(0.02)
                await self.app(scope, receive, send)
            case "302":
                await self._say(send, 302, b"there", (b"location", f"{self.url}/elsewhere".encode()))
            case "cut":
                raise ConnectionAbortedError("as the script says")
            case "torn":
                await send({"type": "http.response.start", "status": 503, "headers": [(b"content-length", b"9999")]})
                await send({"type": "http.response.body", "body": "größe".encode() + b"\xff\0", "more_body": True})
                raise ConnectionAbortedError("as the script says")
            case "long":
                await self._say(send, 500, b"x" * 3_000_000)
            case _:
                await self.app(scope, receive, send)

    @staticmethod
    async def _say(send: Send, status: int, body: bytes, *headers: tuple[bytes, bytes]) -> None:
        await send({"type": "http.response.start", "status": status, "headers": list(headers)})
        await send({"type": "http.response.body", "body": body})


@pytest.fixture
def receiver(monkeypatch: pytest.MonkeyPatch) -> Iterator[Receiver]:
    monkeypatch.setenv("PGCREDITS_NOTIFY_SECRET_SHOP", SECRET)
    with Receiver() as running:
        yield running


@pytest.fixture
def ledger(database: Database) -> Iterator[Ledger]:
    with committed(database) as ledger:
        ledger.open("alpha")
        yield ledger


@pytest.fixture
def shop(ledger: Ledger, receiver: Receiver) -> Receiver:
    """The receiver as an endpoint."""
    ledger.set_notification_endpoint("shop", f"{receiver.url}/hooks/credits")
    return receiver


def settings(database: Database, **more: Any) -> Settings:
    return Settings(dsn=database.dsn, role=ROLE, **{"notify_secrets": {"SHOP": (SECRET,)}, **more})


def work(database: Database, workers: int = 1, **more: Any) -> None:
    """Deliver what is due, as `pgcredits notify work --once` does."""

    async def once() -> None:
        pool = Pool(database.dsn, role=ROLE, size=20)
        await pool.open()
        try:
            made = [notifier.Notifier(pool, settings(database, **more)) for _ in range(workers)]
            await asyncio.gather(*(one.run(asyncio.Event(), once=True) for one in made))
        finally:
            await pool.close()

    asyncio.run(once())


def notify(ledger: Ledger, kind: str = "low_balance", times: int = 1) -> list[str]:
    """Tell something; the ids of the messages."""
    with ledger.as_owner():
        ledger.query(
            "select credits._notify('alpha', %s, clock_timestamp()::text || n, '{\"balance\": 5, \"threshold\": 9}')"
            " from generate_series(1, %s) n",
            kind, times,
        )  # fmt: skip
    return [f"ntf_{row.notification_id}" for row in ledger.list_notifications(kind=kind, max_rows=times)]


def outcome(ledger: Ledger) -> tuple[str, int | None, str | None]:
    """How the latest delivery stands."""
    row = ledger.table("notification_deliveries", "true order by delivery_id desc limit 1")[0]
    return row.state, row.last_status, row.last_error


def due_now(ledger: Ledger) -> None:
    ledger.change("update credits.notification_deliveries set next_attempt_at = credits.now() where state = 'pending'")


# Webhooks ------------------------------------------------------------------------------------------------------------


def test_the_receiver_of_the_manual_gets_what_was_told(database: Database, ledger: Ledger, shop: Receiver) -> None:
    (message_id,) = notify(ledger)
    work(database, notify_secrets={"SHOP": (OTHER, SECRET)})  # while the secret is being rotated
    message = shop.received[message_id]
    assert (message["type"], message["account_id"], message["data"]["balance"]) == ("low_balance", "alpha", 5)
    assert outcome(ledger) == ("delivered", 204, None)
    notify(ledger)
    work(database, notify_secrets={"": (OTHER,)})
    assert outcome(ledger)[:2] == ("pending", 401)
    assert len(shop.received) == 1


FAULTS: dict[str, tuple[int | None, str]] = {
    "hang": (None, "no answer: "),
    "after": (500, "no"),
    "302": (302, "there"),
    "cut": (500, "Internal Server Error"),
    "torn": (503, "größe\N{REPLACEMENT CHARACTER}"),
    "long": (500, "x" * 500),
}


def test_a_fault_costs_time_and_nothing_else(
    database: Database, ledger: Ledger, shop: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(notifier, "PATIENCE", 1.0)
    for fault, (status, error) in FAULTS.items():
        (message_id,) = notify(ledger)
        shop.script.append(fault)
        work(database)
        state, found, said = outcome(ledger)
        assert (state, found) == ("pending", status), fault
        assert said is not None
        assert said.startswith(error), fault
        assert len(said) <= 500
        due_now(ledger)
        work(database)
        assert outcome(ledger)[0] == "delivered"
        assert message_id in shop.received
    assert not [call for call in shop.calls if "elsewhere" in call]


def test_what_cannot_be_sent_says_why_and_no_secret_is_shown(
    database: Database, ledger: Ledger, shop: Receiver, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    for secrets in ({}, {"SHOP": ("whsec_",)}, {"SHOP": ("no base64 ä",)}):
        notify(ledger)
        work(database, notify_secrets=secrets)
        assert outcome(ledger)[:2] == ("pending", None)
        assert "PGCREDITS_NOTIFY_SECRET_SHOP" in str(outcome(ledger)[2])
    ledger.set_notification_endpoint("shop", "http://127.0.0.1:1/")
    notify(ledger)
    work(database)
    assert outcome(ledger) == ("pending", None, "no answer: ConnectError")
    assert not shop.calls
    logged = caplog.text + repr(settings(database, smtp_url="smtp://u:hunter2@h")) + ledger.snapshot().__repr__()
    assert SECRET not in logged
    assert "hunter2" not in logged


def test_workers_share_what_there_is(database: Database, ledger: Ledger, shop: Receiver) -> None:
    shop.script.extend(["slow"] * 60)
    ids = notify(ledger, times=60)
    work(database, workers=3)
    assert shop.calls == {f"/hooks/credits {message_id}": 1 for message_id in ids}
    assert {row.state for row in ledger.table("notification_deliveries")} == {"delivered"}


def test_who_answers_late_keeps_nobody_waiting_for_long(
    database: Database, ledger: Ledger, shop: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(notifier, "PATIENCE", 2.0)
    secrets = {"notify_secrets": {"": (SECRET,)}}
    with Receiver() as slow, Receiver() as slower, Door(database.dsn, role=ROLE, **secrets):
        slow.hold = slower.hold = 3600
        ledger.set_notification_endpoint("slow", f"{slow.url}/hooks/credits")
        ledger.set_notification_endpoint("slower", f"{slower.url}/hooks/credits", kinds=["low_balance"])
        ledger.set_notification_endpoint("shop", f"{shop.url}/hooks/credits", kinds=["refund"])
        notify(ledger, times=60)
        until(lambda: slow.calls.total() + slower.calls.total() == outbox.IN_FLIGHT)
        began = time.monotonic()
        ids = notify(ledger, "refund", times=30)
        until(lambda: set(ids) <= set(shop.received))
        assert time.monotonic() - began < 3 * notifier.PATIENCE  # behind the 110 before it: more than twenty
        assert max(shop.calls.values()) == 1
        states = {row.target: row.state for row in ledger.table("notification_deliveries", "state = 'delivered'")}
        assert states == {"shop": "delivered"}


def test_a_worker_that_is_killed_loses_nothing(database: Database, ledger: Ledger, shop: Receiver) -> None:
    ledger.change("update credits.settings set value = '\"1 second\"' where name = 'notification_lease'")
    shop.script.extend(["slow", "after", "slow", "cut", "hang", "slow"] * 40)
    ids = notify(ledger, times=120)
    code = (
        "import asyncio; from pgcredits import notifier, outbox; from pgcredits.settings import Settings;"
        "outbox.POLL = 0.05; asyncio.run(notifier.work(Settings.from_environment()))"
    )
    environment = {**os.environ, "PGCREDITS_DSN": database.dsn, "PGCREDITS_ROLE": ROLE}
    for _ in range(4):
        enough = shop.calls.total() + 8
        with started(code, environment):
            until(lambda enough=enough: bool(shop.calls.total() > enough))  # type: ignore[misc]
    ledger.change("update credits.notification_deliveries set locked_until = credits.now() where state = 'sent'")
    shop.script.clear()

    def all_there() -> bool:
        due_now(ledger)
        return {row.state for row in ledger.table("notification_deliveries")} == {"delivered"}

    with started(code, environment) as process:
        until(all_there)
        process.terminate()
        assert process.wait(10) == 0
    assert set(shop.received) == set(ids)
    assert 120 < shop.calls.total() < 400


@contextmanager
def started(code: str, environment: dict[str, str]) -> Iterator[subprocess.Popen[bytes]]:
    """A process, killed at the end of the block."""
    process = subprocess.Popen([sys.executable, "-c", code], env=environment, stderr=subprocess.DEVNULL)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def test_the_door_delivers_beside_its_work(database: Database, ledger: Ledger, shop: Receiver) -> None:
    notify(ledger)
    with Door(database.dsn, role=ROLE, notify_secrets={"SHOP": (SECRET,)}):
        until(lambda: outcome(ledger)[0] == "delivered")
    notify(ledger)
    with Door(database.dsn, role=ROLE):
        time.sleep(0.1)
    assert outcome(ledger)[0] == "pending"


def test_the_command_line_works_and_shows(database: Database, ledger: Ledger, shop: Receiver) -> None:
    notify(ledger)
    environment = {**os.environ, "PGCREDITS_DSN": database.dsn, "PGCREDITS_ROLE": ROLE, "COLUMNS": "200"}

    def run(*arguments: str, env: dict[str, str] = environment) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "pgcredits", "notify", *arguments]
        return subprocess.run(command, env=env, capture_output=True, text=True, check=False)

    assert run("work", "--once").returncode == 0
    assert len(shop.received) == 1
    shown = run("list", "--kind", "low_balance").stdout
    assert "shop: delivered after 1, 204" in shown
    assert "alpha" not in run("list", "--state", "dead").stdout
    del environment["PGCREDITS_NOTIFY_SECRET_SHOP"]
    answer = run("work", "--once")
    assert (answer.returncode, "PGCREDITS_SMTP_URL" in answer.stderr) == (1, True)


# E-mail --------------------------------------------------------------------------------------------------------------


class Mailbox:
    """What a mail server does with e-mails: keeps them, or refuses as told."""

    def __init__(self) -> None:
        self.mails: list[Any] = []
        self.answer = "250 ok"

    async def handle_RCPT(  # noqa: N802 - aiosmtpd's name
        self, _server: SMTP, _session: Session, envelope: Envelope, address: str, _options: list[str]
    ) -> str:
        envelope.rcpt_tos.append(address)
        return self.answer

    async def handle_DATA(self, _server: SMTP, _session: Session, envelope: Envelope) -> str:  # noqa: N802 - as above
        assert isinstance(envelope.content, bytes)
        self.mails.append((envelope.rcpt_tos, message_from_bytes(envelope.content, policy=policy.default)))
        return "250 kept"


def test_e_mails_arrive(database: Database, ledger: Ledger) -> None:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    mailbox = Mailbox()
    server = Controller(mailbox, hostname="127.0.0.1", port=port)
    post: dict[str, Any] = {"smtp_url": f"smtp://127.0.0.1:{port}", "mail_from": "credits@example.com"}
    ledger.change("update credits.accounts set email = 'alpha@example.com'")
    ledger.change("update credits.settings set value = 'true' where name = 'customer_email'")
    (message_id,) = notify(ledger)
    work(database)
    assert outcome(ledger) == ("pending", None, None)  # nobody here can send mail
    work(database, **post)
    assert outcome(ledger)[0] == "pending"  # the server is away
    due_now(ledger)
    server.start()
    try:
        work(database, **post)
        ((to, mail),) = mailbox.mails
        assert to == ["alpha@example.com"]
        assert (mail["From"], mail["To"]) == ("credits@example.com", "alpha@example.com")
        assert mail["Subject"] == "Your credits are running low"
        assert mail.get_content().startswith("You have 5 credits left, less than the 9 ")
        assert mail["Message-ID"].startswith(f"<{message_id}.")
        assert outcome(ledger) == ("delivered", 250, None)
        for mailbox.answer, status, state in (("451 later", 451, "pending"), ("550 unknown", 550, "dead")):
            notify(ledger)
            work(database, **post)
            assert outcome(ledger) == (state, status, mailbox.answer[4:])
    finally:
        server.stop()


def test_settings_are_read_and_checked(database: Database) -> None:
    read = Settings.from_environment({
        "PGCREDITS_NOTIFY_SECRET": "whsec_a", "PGCREDITS_NOTIFY_SECRET_SHOP": "whsec_b, whsec_c",
        "PGCREDITS_SMTP_URL": "smtps://u:p@mail.example.com:465", "PGCREDITS_MAIL_FROM": "credits@example.com",
    })  # fmt: skip
    assert (read.notify_secrets_of("shop"), read.notify_secrets_of("x")) == (("whsec_b", "whsec_c"), ("whsec_a",))
    for url in ("mail.example.com", "http://mail.example.com", "smtp://a b", "smtp://"):
        with pytest.raises(SettingsError, match="PGCREDITS_SMTP_URL must be"):
            Settings.from_environment({"PGCREDITS_SMTP_URL": url, "PGCREDITS_MAIL_FROM": "a@b"})
    with pytest.raises(SettingsError, match="needs PGCREDITS_MAIL_FROM"):
        Settings.from_environment({"PGCREDITS_SMTP_URL": "smtp://mail.example.com"})
    assert Webhook(SECRET)
