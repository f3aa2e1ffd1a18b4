"""The ticker: does the jobs of the database while nobody else does them.

Which job is due, and whether somebody else is at it, is SQL's to decide: the ticker stands by and asks.
It may be killed at any moment: a batch that was not committed is undone, and done again after the lease.
"""

import asyncio
import logging
from contextlib import AbstractAsyncContextManager, suppress
from functools import partial

import psycopg
from psycopg_pool import PoolTimeout

from pgcredits.db import Database
from pgcredits.outbox import beside, process_name
from pgcredits.settings import Settings

POLL = 15.0  # seconds between questions; schedules count minutes
PATIENCE = 10.0  # seconds that a batch may take to finish when we are told to stop; then it is undone

log = logging.getLogger("pgcredits.ticker")


async def work(database: Database, stop: asyncio.Event) -> None:
    """Do what is due, batch after batch, each in transactions of its own."""
    while not stop.is_set():
        claimed = await database.call("claim_job", runner=process_name(), standby=True)
        if not claimed:
            return
        (result,) = await database.call("run_job", name=claimed[0]["name"], run_id=claimed[0]["run_id"])
        if result["error"]:
            log.warning("job %s failed: %s", result["name"], result["error"])


async def run(database: Database, stop: asyncio.Event) -> None:
    """Do so until stop is set."""
    while not stop.is_set():
        try:
            await work(database, stop)
        except (psycopg.Error, PoolTimeout, OSError) as error:
            log.warning("no jobs done: %s", await database.explain(error))
        with suppress(TimeoutError):
            await asyncio.wait_for(stop.wait(), POLL)


def running(database: Database, settings: Settings) -> AbstractAsyncContextManager[None]:
    """Tick beside the block, if the settings want it."""
    return beside(partial(run, database) if settings.jobs else None, patience=PATIENCE)
