"""`pgcredits jobs`: what runs by itself, and who does it."""

from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Annotated, Any

import psycopg
import typer
from rich.table import Column, Table

from pgcredits import db
from pgcredits.commands.shared import Dsn, connected, console, database
from pgcredits.outbox import process_name
from pgcredits.settings import Settings

cli = typer.Typer(help="What runs by itself: docs/jobs.md.", no_args_is_help=True)
CronDsn = Annotated[
    str, typer.Option("--cron-dsn", help="Where pg_cron lives, if in another database. Default: PGCREDITS_CRON_DSN.")
]


@cli.command("list")
def list_(dsn: Dsn = "") -> None:
    """Show the jobs: how each stands, when it runs next, and what went wrong. All times are UTC."""
    with connected(dsn) as conn:
        rows = db.call(conn, "list_jobs")
    columns = ("name", "state", "schedule", "next_run_at", "last_success_at", "failures", "last_error")
    table = Table(Column(columns[0], no_wrap=True), *columns[1:])
    for row in rows:
        table.add_row(*(_cell(row[column]) for column in columns))
    console.print(table)


@cli.command("run")
def run(
    name: Annotated[str, typer.Argument(metavar="[NAME]", help="Default: all that are due.")] = "",
    dsn: Dsn = "",
) -> None:
    """Run a job to its end, due or not, or all that are due. Each batch is committed. Exit code 1 if one fails."""
    failed = False
    with connected(dsn, autocommit=True) as conn:
        for row in _run_to_end(conn, name) if name else _run_due(conn):
            print(f"{row['name']}: {row['outcome']}, {row['rows_done']} {row['error'] or ''}".rstrip(), flush=True)
            failed |= row["outcome"] == "failed"
    if failed:
        raise typer.Exit(1)


@cli.command("schedule")
def schedule(dsn: Dsn = "", cron_dsn: CronDsn = "") -> None:
    """Have pg_cron do the jobs. Its entries run as the login that makes them. Safe to repeat."""
    for entry in _carry_to_cron(dsn, cron_dsn, remove=False):
        print(f"Scheduled: {entry}")


@cli.command("unschedule")
def unschedule(dsn: Dsn = "", cron_dsn: CronDsn = "") -> None:
    """Take our entries out of pg_cron. `pgcredits serve` does the jobs from then on."""
    _carry_to_cron(dsn, cron_dsn, remove=True)
    print("pg_cron has no entries of this database any more.")


def _carry_to_cron(dsn: str, cron_dsn: str, *, remove: bool) -> list[str]:
    settings = Settings.from_environment()
    elsewhere = cron_dsn or settings.cron_dsn
    with database(dsn, settings) as target:
        with psycopg.connect(target) as conn:
            rows = db.call(conn, "cron_statements", remove=remove, elsewhere=bool(elsewhere))
        with psycopg.connect(elsewhere or target) as cron:
            for row in rows:
                cron.execute(row["statement"].encode())
    return [row["entry"] for row in rows if row["entry"]]


def _run_to_end(conn: psycopg.Connection[Any], name: str) -> Iterator[db.Row]:
    more = True
    while more:
        (row,) = db.call(conn, "run_job", name=name, runner=process_name())
        more = row["more"]
        yield row


def _run_due(conn: psycopg.Connection[Any]) -> Iterator[db.Row]:
    while claimed := db.call(conn, "claim_job", runner=process_name()):
        yield from db.call(conn, "run_job", name=claimed[0]["name"], run_id=claimed[0]["run_id"])


def _cell(value: object) -> str:
    return (
        f"{value.astimezone(UTC):%Y-%m-%d %H:%M}"
        if isinstance(value, datetime)
        else ""
        if value is None
        else str(value)
    )
