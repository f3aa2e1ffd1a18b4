"""The worker of the outbox: claims requests that SQL wrote, sends them to Stripe, brings back what became of each.

It knows no purpose and decides nothing: when a request is due, what an answer means and whether to send again is SQL's.
It may be killed at any moment: what it had claimed is sent again, under the same idempotency key, after its lease.
"""

import asyncio
import logging
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass, field
from decimal import Decimal
from functools import partial
from typing import Any

import stripe

from pgcredits.db import Database, Row
from pgcredits.outbox import IN_FLIGHT, Crew, alone, beside, bring_back, claim, process_name
from pgcredits.settings import Settings

VERSION = stripe.api_version  # of Stripe's API; a request keeps that of its first worker
PATIENCE = 30.0  # seconds for Stripe, connecting and all; the lease (stripe_request_lease) is longer
# What raw_request takes out of the parameters as options of its own, and the names of its own arguments.
OPTIONS = frozenset(
    {"api_key", "stripe_version", "stripe_account", "stripe_context", "max_network_retries", "idempotency_key",
     "content_type", "headers", "base", "usage", "method_", "url_", "self"}
)  # fmt: skip
HEADERS = ("Date", "Request-Id", "Idempotent-Replayed", "Retry-After")  # those of an answer that SQL reads

log = logging.getLogger("pgcredits.worker")


@dataclass(frozen=True)
class Outcome:
    """What became of a request: status is None if no answer came, not_sent says why nothing went out."""

    status: int | None = None
    body: str | None = None
    headers: dict[str, str] = field(default_factory=dict)
    not_sent: str | None = None


class Worker:
    """Sends what is due, a few requests at a time. Belongs to the event loop that runs it."""

    def __init__(self, database: Database, settings: Settings) -> None:
        self._database = database
        self._key, self._base = settings.stripe_key, settings.stripe_api_base
        self._crew: Crew | None = None

    async def run(self, stop: asyncio.Event, *, once: bool = False) -> None:
        """Work until stop is set, or with once until nothing is due; then finish what is in flight."""
        for name in ("httpx", "stripe"):
            logging.getLogger(name).setLevel(logging.WARNING)  # each address, with what is asked for, is not for a log
        async with self._stripe() as client:

            async def due(free: int) -> list[Row] | None:
                return await claim(
                    self._database, "claim_stripe_requests", must=once, max_rows=free, worker=process_name(),
                    stripe_version=VERSION,
                )  # fmt: skip

            self._crew = Crew(partial(self._work, client))
            await self._crew.drain(due, stop, once=once)

    async def execute(self, request_id: int, seconds: float) -> bool:
        """Send one request at once, for somebody who waits so long at most. False: it is not due, or there is no room.

        Raises psycopg.Error or psycopg_pool.PoolTimeout. What takes longer goes on by itself.
        """
        crew = self._crew
        if crew is None or not crew.has_room(2 * IN_FLIGHT):
            return False
        rows = await self._database.call(
            "claim_stripe_request", request_id=request_id, worker=process_name(), stripe_version=VERSION
        )
        tasks = {crew.start(row) for row in rows}
        if tasks:
            await asyncio.wait(tasks, timeout=seconds)
        return bool(tasks)

    @asynccontextmanager
    async def _stripe(self) -> AsyncIterator[stripe.StripeClient]:
        http = stripe.HTTPXClient(timeout=PATIENCE)
        addresses: dict[str, Any] = {"base_addresses": {"api": self._base}} if self._base else {}
        try:
            yield stripe.StripeClient(self._key, http_client=http, max_network_retries=0, **addresses)
        finally:
            await http.close_async()  # type: ignore[no-untyped-call]

    async def _work(self, client: stripe.StripeClient, row: Row) -> None:
        outcome = await send(client, row)
        result = await bring_back(
            self._database, "complete_stripe_request", f"request {row['request_id']}",
            request_id=row["request_id"], attempt=row["attempt"], **asdict(outcome),
        )  # fmt: skip
        if result and result["state"] != "done":
            log.warning("request %s: %s, answer %s", row["request_id"], result["state"], outcome.status)


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
    except (TimeoutError, UnicodeError, AttributeError):  # the last: an error in other words than Stripe's
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
    worker = Worker(database, settings) if settings.stripe_key else None
    async with beside(worker.run if worker else None):
        yield worker


async def work(settings: Settings, *, once: bool = False) -> None:
    """Work as a process of its own until SIGINT or SIGTERM, or with once until nothing is due."""
    await alone(settings, lambda database: partial(Worker(database, settings).run, once=once))
