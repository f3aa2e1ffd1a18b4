"""What workers of an outbox do: claim what is due, do it, a few at a time, and bring back what became of it."""

import asyncio
import logging
import os
import signal
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from typing import Any

import psycopg
from psycopg_pool import PoolTimeout

from pgcredits.db import Database, Row
from pgcredits.settings import Settings

IN_FLIGHT = 10  # of one worker at a time
POLL = 1.0  # seconds between looks at the outbox
TROUBLE = 5.0  # seconds before the database is asked again
TRIES = 6  # at bringing something back; what is lost then is done again after its lease
NAME = f"{socket.gethostname()}:{os.getpid()}"

log = logging.getLogger("pgcredits.outbox")
Run = Callable[[asyncio.Event], Awaitable[None]]


@dataclass(frozen=True)
class Outcome:
    """What became of a delivery: its HTTP or SMTP status, None if there was none, and what was said or went wrong."""

    status: int | None
    answer: str


async def drain(
    due: Callable[[int], Awaitable[list[Row] | None]],
    do: Callable[[Row], Awaitable[None]],
    stop: asyncio.Event,
    *,
    once: bool,
) -> None:
    """Do what is due until stop is set, or with once until nothing is; then finish what is in flight."""
    running: set[asyncio.Task[None]] = set()
    stopping = asyncio.create_task(stop.wait())
    while not stop.is_set():
        rows = await due(IN_FLIGHT - len(running)) if len(running) < IN_FLIGHT else []
        for row in rows or []:
            task = asyncio.create_task(_guarded(do, row))
            running.add(task)
            task.add_done_callback(running.discard)
        if once and not running:
            break
        pause = TROUBLE if rows is None else POLL
        await asyncio.wait({stopping, *running}, timeout=pause, return_when=asyncio.FIRST_COMPLETED)
    await asyncio.gather(*running)
    stopping.cancel()


async def _guarded(do: Callable[[Row], Awaitable[None]], row: Row) -> None:
    try:
        await do(row)
    except Exception:
        log.exception("the worker failed; what it had is done again after its lease")


async def claim(database: Database, function: str, *, must: bool, **arguments: Any) -> list[Row] | None:
    """What is due, or None if the database cannot say; where it must, that is an error."""
    try:
        return await database.call(function, **arguments)
    except (psycopg.Error, PoolTimeout, OSError) as error:
        if must:
            raise
        log.warning("nothing claimed: %s: %s", type(error).__name__, error)
        return None


async def bring_back(database: Database, function: str, what: str, **arguments: Any) -> Row | None:
    """Tell the database what became of something, patiently; its answer, or None if it never gave one."""
    for _ in range(TRIES):
        try:
            (row,) = await database.call(function, **arguments)
        except (psycopg.Error, PoolTimeout, OSError) as error:
            log.warning("%s: not recorded: %s: %s", what, type(error).__name__, error)
            await asyncio.sleep(TROUBLE)
        else:
            return row
    log.error("%s: what became of it is lost; it is done again after its lease", what)
    return None


@asynccontextmanager
async def beside(run: Run | None) -> AsyncIterator[None]:
    """Run beside the block, if there is anything to run. At its end what is in flight is finished."""
    if not run:
        yield
        return
    stop = asyncio.Event()
    task = asyncio.ensure_future(run(stop))
    try:
        yield
    finally:
        stop.set()
        await task


async def alone(settings: Settings, make: Callable[[Database], Run]) -> None:
    """Run as a process of its own until SIGINT or SIGTERM, or until it ends."""
    stop = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        with suppress(NotImplementedError):  # where there are no signals of this kind, being killed does no harm either
            asyncio.get_running_loop().add_signal_handler(number, stop.set)
    database = Database(settings.dsn, role=settings.role, size=settings.pool_size, wait=settings.pool_timeout)
    await database.open()
    try:
        await make(database)(stop)
    finally:
        await database.close()
