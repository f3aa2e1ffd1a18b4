"""What workers of an outbox do: claim what is due, do it, a few at a time, and bring back what became of it."""

import asyncio
import logging
import os
import signal
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from typing import Any

import psycopg
from psycopg_pool import PoolTimeout

from pgcredits.db import Database, Row
from pgcredits.settings import Settings

IN_FLIGHT = 10  # of one worker at a time
POLL = 1.0  # seconds between looks at the outbox
TROUBLE = 5.0  # seconds before the database is asked again
TRIES = 6  # at bringing something back; what is lost then is done again after its lease

log = logging.getLogger("pgcredits.outbox")
Run = Callable[[asyncio.Event], Awaitable[None]]


def process_name() -> str:
    """What this process is called in the database."""
    return f"{socket.gethostname()}:{os.getpid()}"


class Crew:
    """Tasks of one worker, each doing one thing that was claimed."""

    def __init__(self, do: Callable[[Row], Awaitable[None]]) -> None:
        self._do = do
        self._running: set[asyncio.Task[None]] = set()
        self._over = False

    def start(self, row: Row) -> asyncio.Task[None]:
        """Begin with it."""
        task = asyncio.create_task(self._guarded(row))
        self._running.add(task)
        task.add_done_callback(self._running.discard)
        return task

    def has_room(self, most: int) -> bool:
        """Whether fewer are at work than that, and more may begin."""
        return not self._over and len(self._running) < most

    async def drain(
        self, due: Callable[[int], Awaitable[list[Row] | None]], stop: asyncio.Event, *, once: bool
    ) -> None:
        """Do what is due until stop is set, or with once until nothing is; then finish what is in flight."""
        stopping = asyncio.create_task(stop.wait())
        while not stop.is_set():
            idle = not self._running  # what ends while the database is asked may have written more
            rows = await due(IN_FLIGHT - len(self._running)) if self.has_room(IN_FLIGHT) else []
            for row in rows or []:
                self.start(row)
            if once and idle and not self._running:
                break
            pause = TROUBLE if rows is None else POLL
            await asyncio.wait({stopping, *self._running}, timeout=pause, return_when=asyncio.FIRST_COMPLETED)
        self._over = True
        await asyncio.gather(*self._running)
        stopping.cancel()

    async def _guarded(self, row: Row) -> None:
        try:
            await self._do(row)
        except Exception:
            log.exception("the worker failed; what it had is done again after its lease")


async def claim(database: Database, function: str, *, must: bool, **arguments: Any) -> list[Row] | None:
    """What is due, or None if the database cannot say; where it must, that is an error."""
    try:
        return await database.call(function, **arguments)
    except (psycopg.Error, PoolTimeout, OSError) as error:
        if must:
            raise
        log.warning("nothing claimed: %s", await database.explain(error))
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
async def beside(run: Run | None, *, patience: float | None = None) -> AsyncIterator[None]:
    """Run beside the block, if there is anything to run. At its end what is in flight is finished, within patience."""
    if not run:
        yield
        return
    stop = asyncio.Event()
    task = asyncio.ensure_future(run(stop))
    try:
        yield
    finally:
        stop.set()
        with suppress(TimeoutError):
            await asyncio.wait_for(task, patience)


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
