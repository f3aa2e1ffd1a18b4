"""Does expiry stop spending? Grants expire by the jobs while others spend: p50 and p99 of a spend, alone and beside it.

    python bench/expiry.py --grants 1000000

Each grant that expires is of an account of its own, and spending goes to these very accounts: a spend may meet one that
is being booked, or one that it has to book itself. One runner is in work_jobs(), as pg_cron would be.
"""

import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
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
FILL = """
with accounts as (
  insert into credits.accounts (account_id, created_at)
  select 'acct_' || n, clock_timestamp() from generate_series({first}, {last}) n
  returning account_id
)
insert into credits.balances (account_id, hash)
select a.account_id, sha256(convert_to(a.account_id, 'UTF8')) from accounts a
"""
GRANT = """
select count(credits.grant_credits('acct_' || n, {amount}, '{kind}', expires_at => {expires_at}, key => 'bench_{kind}'))
  from generate_series({first}, {last}) n
"""
LEFT = "select count(*) from credits.grants g where g.kind = 'promo' and g.status = 'active'"


@dataclass
class Expiry:
    """A runner of jobs on a thread of its own, until everything that has to expire has."""

    database: Database
    seconds: float = 0
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
                conn.execute("call credits.work_jobs(time_limit => '1 hour', runner => 'bench')")
        except BaseException as error:  # noqa: BLE001 - told when it is joined
            self.error = error
        self.seconds = time.monotonic() - began


def fill(database: Database, grants: int, said: Callable[[str], None]) -> None:
    """Accounts with credits to spend and a grant each that is over when all are there."""
    with database.connect("credits_owner") as owner:
        owner.execute("update credits.jobs set enabled = name = 'expire_grants'")
        for first in range(1, grants + 1, 10_000):
            last = min(first + 9_999, grants)
            said(f"granting {last:,} of {grants:,}")
            place: dict[str, Any] = {"first": first, "last": last}
            owner.execute(FILL.format(first=max(first, READY + 1), last=last).encode())
            for kind, amount, expires_at in (("purchase", 1_000_000, "null"), ("promo", 5, "'2100-01-01'")):
                owner.execute(GRANT.format(**place, kind=kind, amount=amount, expires_at=expires_at).encode())
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
            batches = one(admin, "select max(batches) from credits.job_runs where name = 'expire_grants'")
            shown = settings(database)
        with database.connect() as conn:
            status.update("audit()")
            wrong = conn.execute("select a from credits.audit() a limit 20").fetchall()
    table = Table("", "clients", "spends per second", "p50 ms", "p99 ms", "slowest ms")
    for name, cell in (("beside the jobs", beside), ("alone", alone)):
        figures = (f"{cell.percentile(share):.2f}" for share in (0.5, 0.99, 1))
        table.add_row(name, str(clients), f"{cell.rate:,.0f}", *figures)
    console.print(table)
    console.print(f"{grants:,} grants expired in {expiry.seconds:.1f} s, {batches:,} batches; left: {left}")
    console.print(f"audit: {wrong or 'sound'}")
    console.print(", ".join(f"{name} {value}" for name, value in {**machine(), **shown}.items()))
    if left or wrong:
        raise typer.Exit(1)


if __name__ == "__main__":
    try:
        typer.run(main)
    except (BenchError, embedded.EmbeddedError, migrate.DeployError, psycopg.Error) as error:
        sys.exit(f"bench: {error}")
