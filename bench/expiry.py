"""Does expiry stop spending? Grants expire by the jobs while others spend: p50 and p99 of a spend, alone and beside it.

    python bench/expiry.py --grants 1000000

Each grant that expires is of an account of its own, and spending goes to these very accounts: a spend may meet one that
is being booked, or one that it has to book itself. One runner does batch after batch, as work_jobs() does for pg_cron.
"""

import os
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import median
from typing import Annotated, Any, Self

import psycopg
import typer
from cluster import BenchError, Database, find_install, prepare, private, settings
from measure import Bench, Cell, Operation
from report import machine
from rich.console import Console
from rich.table import Table

from pgcredits import embedded, migrate

SPEND = Operation("spend", "spend.sql")
READY = 100  # accounts that prepare() lays out
CALL = 5_000  # accounts of one call that fills
FILL = """
select i.status, count(*)
  from credits.import_opening_balances((
         select jsonb_agg(jsonb_build_object('account_id', 'acct_' || n, 'key', l.kind, 'kind', l.kind,
                                             'amount', l.amount, 'expires_at', l.expires_at))
           from generate_series({first}, {last}) n,
                (values ('purchase', 1000000, null), ('promo', 5, '2100-01-01')) l (kind, amount, expires_at))) i
 group by i.status
"""
LEFT = "select count(*) from credits.grants g where g.kind = 'promo' and g.status = 'active'"


@dataclass
class Expiry:
    """A runner of jobs on a thread of its own, until everything that has to expire has."""

    database: Database
    seconds: float = 0
    batches: list[float] = field(default_factory=list)  # ms each, with the commit: so long accounts may be locked
    error: BaseException | None = None

    def __post_init__(self) -> None:
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._thread.join()
        if self.error:
            raise self.error

    @property
    def running(self) -> bool:
        """Whether anything is left."""
        return self._thread.is_alive()

    def _run(self) -> None:
        began = time.monotonic()
        try:
            with self.database.connect() as conn:
                while claim := conn.execute("select c.name, c.run_id from credits.claim_job('bench') c").fetchone():
                    batch = time.monotonic()
                    conn.execute("select credits.run_job(%s, run_id => %s)", claim)
                    self.batches.append(1000 * (time.monotonic() - batch))
        except BaseException as error:  # noqa: BLE001 - told when it is joined
            self.error = error
        self.seconds = time.monotonic() - began


def fill_some(database: Database, grants: int, first: int) -> int:
    """Import what so many accounts have; the last of them."""
    last = min(first + CALL - 1, grants)
    with database.connect() as service:
        results = service.execute(FILL.format(first=first, last=last).encode()).fetchall()
    if results != [(200, 2 * (last - first + 1))]:
        raise BenchError(f"the accounts were not imported: {results}")
    return last


def fill(database: Database, grants: int, said: Callable[[str], None]) -> None:
    """Accounts with credits to spend and a grant each that is over when all are there."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for last in pool.map(partial(fill_some, database, grants), range(1, grants + 1, CALL)):
            said(f"granting {last:,} of {grants:,}")
    with database.connect("credits_owner") as owner:
        owner.execute("update credits.jobs set enabled = name = 'expire_grants'")
        said("letting them run out")
        owner.execute("update credits.grants set expires_at = clock_timestamp() where kind = 'promo'")
        owner.execute("update credits.balances set next_due_at = clock_timestamp()")
        owner.execute("update credits.jobs set next_run_at = clock_timestamp()")
    with database.admin() as admin:
        admin.execute("vacuum analyze credits.grants")
        admin.execute("vacuum analyze credits.balances")


def one(conn: psycopg.Connection[Any], query: str) -> int:
    """The number that a query answers with."""
    row = conn.execute(query.encode()).fetchone()
    return int(row[0]) if row else 0


def main(
    *,
    grants: Annotated[int, typer.Option(min=1000, help="How many expire, each of its own account.")] = 100_000,
    clients: Annotated[int, typer.Option(min=1, help="Who spend at once.")] = 4,
    seconds: Annotated[int, typer.Option(min=1, help="Of each sample.")] = 10,
    install: Annotated[str | None, typer.Option(help="Folder with bin/postgres, or 'packaged'.")] = None,
    data: Annotated[Path | None, typer.Option(help="Where the private server's folder is made.")] = None,
) -> None:
    """Measure on a private server that is made for it and removed afterwards."""
    console = Console() if sys.stdout.isatty() else Console(width=120)
    with console.status("starting the server") as status, private(find_install(install), data) as database:
        prepare(database, READY, migrate.HOME)
        fill(database, grants, status.update)
        with database.admin() as admin:
            bench = Bench(database, admin, grants, seconds, 1, 1, status.update)
            beside, alone = Cell(SPEND, clients, hot=False), Cell(SPEND, clients, hot=False)
            with Expiry(database) as expiry:
                while expiry.running:
                    beside.samples.append(bench.sample(SPEND, clients))
            alone.samples.append(bench.sample(SPEND, clients))
            left = one(admin, LEFT)
            shown = settings(database)
        with database.connect() as conn:
            status.update("audit()")
            wrong = conn.execute("select a from credits.audit() a limit 20").fetchall()
    table = Table("", "clients", "spends per second", "p50 ms", "p99 ms", "slowest ms")
    for name, cell in (("beside the jobs", beside), ("alone", alone)):
        figures = (f"{cell.percentile(share):.2f}" for share in (0.5, 0.99, 1))
        table.add_row(name, str(clients), f"{cell.rate:,.0f}", *figures)
    console.print(table)
    console.print(f"{grants:,} grants expired in {expiry.seconds:.1f} s, left: {left}")
    tenth = len(expiry.batches) // 10 + 1
    times = {"first tenth": expiry.batches[:tenth], "last tenth": expiry.batches[-tenth:], "all": expiry.batches}
    shown_times = (f"{name} p50 {median(some):.0f}, slowest {max(some):.0f}" for name, some in times.items())
    console.print(f"{len(expiry.batches):,} batches, ms: {'; '.join(shown_times)}; load {os.getloadavg()[0]:.1f}")
    console.print(f"audit: {wrong or 'sound'}")
    console.print(", ".join(f"{name} {value}" for name, value in {**machine(), **shown}.items()))
    if left or wrong:
        raise typer.Exit(1)


if __name__ == "__main__":
    try:
        typer.run(main)
    except (BenchError, embedded.EmbeddedError, migrate.DeployError, psycopg.Error) as error:
        sys.exit(f"bench: {error}")
