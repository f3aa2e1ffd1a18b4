"""The worker of the outbox: claims requests that SQL wrote, sends them to Stripe, brings back what became of each.

It knows no purpose and decides nothing: when a request is due, what an answer means and whether to send again is SQL's.
It may be killed at any moment: what it had claimed is sent again, under the same idempotency key, after its lease.
"""

import asyncio
import logging
import os
import signal
import socket
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import asdict, dataclass, field
from decimal import Decimal
from typing import Any

import psycopg
import stripe
from psycopg_pool import PoolTimeout

from pgcredits.db import Database, Row
from pgcredits.settings import Settings

IN_FLIGHT = 10  # requests of one worker at a time
VERSION = stripe.api_version  # of Stripe's API; a request keeps that of its first worker
POLL = 1.0  # seconds between looks at the outbox
PATIENCE = 30.0  # seconds for Stripe, connecting and all; the lease (stripe_request_lease) is longer
TROUBLE = 5.0  # seconds before the database is asked again
TRIES = 6  # at bringing an answer back; what is lost then is sent again after its lease
# What raw_request takes out of the parameters as options of its own, and the names of its own arguments.
OPTIONS = frozenset(
    {"api_key", "stripe_version", "stripe_account", "stripe_context", "max_network_retries", "idempotency_key",
     "content_type", "headers", "base", "usage", "method_", "url_", "self"}
)  # fmt: skip
HEADERS = ("Date", "Request-Id", "Idempotent-Replayed")  # those of an answer that SQL reads

log = logging.getLogger("pgcredits.worker")


@dataclass(frozen=True)
class Outcome:
    """What became of a request: status is None if no answer came, not_sent says why nothing went out."""

    status: int | None = None
    body: str | None = None
    headers: dict[str, str] = field(default_factory=dict)
    not_sent: str | None = None


class Worker:
    """Sends what is due, IN_FLIGHT requests at a time. Belongs to the event loop that runs it."""

    def __init__(self, database: Database, settings: Settings) -> None:
        self._database = database
        self._key, self._base = settings.stripe_key, settings.stripe_api_base
        self._name = f"{socket.gethostname()}:{os.getpid()}"
        self._running: set[asyncio.Task[None]] = set()
        self._client: stripe.StripeClient | None = None

    async def run(self, stop: asyncio.Event, *, once: bool = False) -> None:
        """Work until stop is set, or with once until nothing is due; then finish what is in flight."""
        for name in ("httpx", "stripe"):
            logging.getLogger(name).setLevel(logging.WARNING)  # each address, with what is asked for, is not for a log
        stopping = asyncio.create_task(stop.wait())
        async with self._stripe() as client:
            self._client = client
            while not stop.is_set():
                rows = await self._claim(IN_FLIGHT - len(self._running), must=once)
                for row in rows or []:
                    self._start(client, row)
                if once and not self._running:
                    break
                pause = TROUBLE if rows is None else POLL
                await asyncio.wait({stopping, *self._running}, timeout=pause, return_when=asyncio.FIRST_COMPLETED)
            self._client = None
            await asyncio.gather(*self._running)
        stopping.cancel()

    async def execute(self, request_id: int, seconds: float) -> bool:
        """Send one request at once, for somebody who waits so long at most. False: it is not due, or there is no room.

        Raises psycopg.Error or psycopg_pool.PoolTimeout. What takes longer goes on by itself.
        """
        client = self._client
        if client is None or len(self._running) >= 2 * IN_FLIGHT:
            return False
        rows = await self._database.call(
            "claim_stripe_request", request_id=request_id, worker=self._name, stripe_version=VERSION
        )
        tasks = {self._start(client, row) for row in rows}
        if tasks:
            await asyncio.wait(tasks, timeout=seconds)
        return bool(tasks)

    def _start(self, client: stripe.StripeClient, row: Row) -> asyncio.Task[None]:
        task = asyncio.create_task(self._work(client, row))
        self._running.add(task)
        task.add_done_callback(self._running.discard)
        return task

    @asynccontextmanager
    async def _stripe(self) -> AsyncIterator[stripe.StripeClient]:
        http = stripe.HTTPXClient(timeout=PATIENCE)
        addresses: dict[str, Any] = {"base_addresses": {"api": self._base}} if self._base else {}
        try:
            yield stripe.StripeClient(self._key, http_client=http, max_network_retries=0, **addresses)
        finally:
            await http.close_async()  # type: ignore[no-untyped-call]

    async def _claim(self, free: int, *, must: bool) -> list[Row] | None:
        """What is due, or None if the database cannot say; where it must, that is an error."""
        if free <= 0:
            return []
        try:
            return await self._database.call(
                "claim_stripe_requests", max_rows=free, worker=self._name, stripe_version=VERSION
            )
        except (psycopg.Error, PoolTimeout, OSError) as error:
            if must:
                raise
            log.warning("nothing claimed: %s: %s", type(error).__name__, error)
            return None

    async def _work(self, client: stripe.StripeClient, row: Row) -> None:
        try:
            outcome = await send(client, row)
        except Exception:
            log.exception("request %s: the worker failed; it is sent again after its lease", row["request_id"])
            return
        for _ in range(TRIES):
            try:
                (result,) = await self._database.call(
                    "complete_stripe_request", request_id=row["request_id"], attempt=row["attempt"], **asdict(outcome)
                )
            except (psycopg.Error, PoolTimeout, OSError) as error:
                log.warning("request %s: not recorded: %s: %s", row["request_id"], type(error).__name__, error)
                await asyncio.sleep(TROUBLE)
            else:
                if result["state"] != "done":
                    log.warning("request %s: %s, answer %s", row["request_id"], result["state"], outcome.status)
                return
        log.error("request %s: its answer is lost; it is sent again after its lease", row["request_id"])


async def send(client: stripe.StripeClient, row: Row) -> Outcome:
    """Send a claimed request to Stripe. Every answer, and none, is an outcome."""
    pinned = {name: row[name] for name in ("idempotency_key", "stripe_version", "stripe_account") if row[name]}
    try:
        if taken := OPTIONS & row["params"].keys():
            raise ValueError(f"no parameter may be called {', '.join(sorted(taken))}")
        parameters = {name: encodable(value) for name, value in row["params"].items()}
        async with asyncio.timeout(PATIENCE):
            answer = await client.raw_request_async(row["method"], row["path"], **parameters, **pinned)
    except stripe.StripeError as error:
        return _outcome(error.http_status, error.http_body, error.headers)
    except (TimeoutError, UnicodeError):
        return Outcome()
    except (ValueError, TypeError) as error:
        return Outcome(not_sent=f"{type(error).__name__}: {error}")
    return _outcome(answer.code, answer.body, answer.headers)


def _outcome(status: int | None, body: Any, headers: Mapping[str, str] | None) -> Outcome:
    if status is None:
        return Outcome()
    text = body.decode(errors="replace") if isinstance(body, bytes) else str(body or "")
    said = {name: value for name in HEADERS if (value := (headers or {}).get(name))}
    return Outcome(status, text.replace("\0", ""), said)  # PostgreSQL holds no NUL, and no JSON does


def encodable(value: Any, *, listed: bool = False) -> Any:
    """A parameter as stripe's encoder sends it rightly: whole numbers whole, others exact, no words of Python."""
    match value:
        case dict():
            return {name: encodable(one) for name, one in value.items()}
        case list():
            return [encodable(one, listed=True) for one in value]
        case Decimal():
            return int(value) if value == value.to_integral_value() else str(value)
        case bool() if listed:
            return "true" if value else "false"
        case None if listed:
            return ""
    return value


@asynccontextmanager
async def running(database: Database, settings: Settings) -> AsyncIterator[Worker | None]:
    """Work beside the block, if there is a key. At its end what is in flight is finished."""
    if not settings.stripe_key:
        yield None
        return
    stop, worker = asyncio.Event(), Worker(database, settings)
    task = asyncio.create_task(worker.run(stop))
    try:
        yield worker
    finally:
        stop.set()
        await task


async def work(settings: Settings, *, once: bool = False) -> None:
    """Work as a process of its own until SIGINT or SIGTERM, or with once until nothing is due."""
    stop = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        with suppress(NotImplementedError):  # where there are no signals of this kind, being killed does no harm either
            asyncio.get_running_loop().add_signal_handler(number, stop.set)
    database = Database(settings.dsn, role=settings.role, size=settings.pool_size, wait=settings.pool_timeout)
    await database.open()
    try:
        await Worker(database, settings).run(stop, once=once)
    finally:
        await database.close()
