"""pgcredits stripe publish and sync: the worker in this process, until the run is through, and what differs as text."""

import asyncio
from collections.abc import Callable
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from pgcredits import catalog
from pgcredits.db import Database, Row
from pgcredits.settings import Settings
from pgcredits.worker import Worker

LOOK = 0.1  # seconds between looks at how far it has come


async def run(settings: Settings, function: str, show: Callable[[list[Row]], None]) -> tuple[Row, list[Row]]:
    """Begin a run by its function, show what that answers, work until it is finished: how it ended, what differs."""
    database = Database(settings.dsn, role=settings.role, size=settings.pool_size, wait=settings.pool_timeout)
    await database.open()
    stop = asyncio.Event()
    try:
        show(await database.call(function))
        working = asyncio.create_task(Worker(database, settings).run(stop))
        try:
            progress = await _watch(database, function.removesuffix("_catalog"), working)
        finally:
            stop.set()
            await working
        return progress, await database.call("stripe_catalog_differences")
    finally:
        await database.close()


async def _watch(database: Database, name: str, working: asyncio.Task[None]) -> Row:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, transient=True, disable=not Console().is_terminal) as bar:
        task = bar.add_task(name)
        while True:
            (progress,) = [row for row in await database.call("get_catalog_sync") if row["run"] == name]
            bar.update(task, completed=progress["done"] + progress["failed"], total=progress["requests"])
            if progress["finished"] or working.done():
                return progress
            await asyncio.sleep(LOOK)


def line(difference: Row) -> str:
    """`update      packages.starter  product pgc_package_starter: name: Old -> Starter`."""
    thing = f"{difference['section']}s.{difference['code']}" if difference["section"] else "-"
    about = " ".join(part for part in (difference["object"], difference["stripe_id"]) if part)
    before, after = difference["before"] or {}, difference["after"] or {}
    parts = [_part(name, before.get(name), after.get(name)) for name in sorted({*before, *after})]
    head = f"{difference['change'] or difference['difference']:<17}  {thing}  {about}"
    return f"{head}: {', '.join(parts)}" if parts else head


def _part(name: str, before: Any, after: Any) -> str:
    shown = [catalog.short(value) for value in (before, after) if value not in (None, {})]
    return f"{name} {' -> '.join(shown)}"


def complaint(error: Row) -> str:
    """What one request came to."""
    return " ".join(str(error[name]) for name in ("ref", "status", "code", "message") if error.get(name))
