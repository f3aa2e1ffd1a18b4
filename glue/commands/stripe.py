"""`pgcredits stripe`: requests to Stripe, its catalogue, and what it has that never arrived."""

import asyncio
import logging
import re
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Annotated

import psycopg
import typer
from rich.table import Table

from pgcredits import db
from pgcredits.commands.shared import Dsn, connected, console, database
from pgcredits.settings import Settings, SettingsError

cli = typer.Typer(help="Requests to Stripe: docs/stripe.md.", no_args_is_help=True)


@cli.command("work")
def work(
    dsn: Dsn = "", *, once: Annotated[bool, typer.Option("--once", help="Until nothing is due, then end.")] = False
) -> None:
    """Send to Stripe what SQL asks of it, and bring the answers back. Several may run, beside the door or not."""
    from pgcredits import observe, worker

    settings = _with_stripe_key()
    observe.configure_logging(settings)
    with database(dsn, settings) as target:
        asyncio.run(worker.work(replace(settings, dsn=target), once=once))


@cli.command("publish")
def publish(
    dsn: Dsn = "",
    *,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print what would change, and change nothing.")] = False,
) -> None:
    """Make Stripe's products and prices what the catalogue says. Exit code 1 if anything failed or differs still."""
    if dry_run:
        with connected(dsn) as conn:
            _show_differences(db.call(conn, "publish_catalog", dry_run=True))
        return
    left = _run_catalog(dsn, "publish_catalog", _show_differences)
    if any(row["change"] for row in left):
        print("Still different:")
        _show_differences(left)
        raise typer.Exit(1)


@cli.command("sync")
def sync(dsn: Dsn = "") -> None:
    """Read all products and prices of Stripe, and print where they differ. Exit code 1 if it failed."""
    _show_differences(_run_catalog(dsn, "sync_catalog", lambda _: None))


@cli.command("reconcile")
def reconcile(
    dsn: Dsn = "",
    since: Annotated[str, typer.Option(help="How far back: 7d, 12h, or a moment. Default: reconcile_window.")] = "",
    *,
    repair: Annotated[bool, typer.Option("--repair", help="Apply what never arrived.")] = False,
    patience: Annotated[int, typer.Option(min=1, help="Seconds to wait for Stripe.")] = 300,
) -> None:
    """Compare what Stripe has with what arrived here, and print what differs; exit code 1 if anything remains.

    It executes what is due, as `pgcredits stripe work --once` does.
    """
    settings = _with_stripe_key()
    with database(dsn, settings) as target:
        run, gaps = _reconcile(replace(settings, dsn=target), _moment(since), repair=repair, patience=patience)
    table = Table("object", "what", "state", "account", "amount", "made", "why")
    for gap in gaps:
        amount = "" if gap["amount"] is None else f"{gap['amount']} {gap['currency']}"
        names = ("object_id", "gap", "state", "account_id", "created_at", "reason")
        object_id, gap_, state, account_id, made, why = (str(gap[name] or "") for name in names)
        table.add_row(object_id, gap_, state, account_id, amount, made, why)
    if gaps:
        console.print(table)
    print(
        f"Run {run['run_id']} is {run['state']}: {run['checked']} compared, {run['found']} had not arrived; "
        f"{run['repaired']} repaired, {run['repairing']} under way, {run['remaining']} remain, "
        f"{run['foreign_objects']} of others."
    )
    if run["error"]:
        print(run["error"], file=sys.stderr)
    if run["state"] != "done" or run["remaining"] or run["repairing"]:
        raise typer.Exit(1)


def _run_catalog(dsn: str, function: str, show: Callable[[list[db.Row]], None]) -> list[db.Row]:
    from pgcredits import stripe_catalog, worker

    settings = _with_stripe_key()
    logging.getLogger(worker.log.name).setLevel(logging.ERROR)  # what failed is told at the end
    with database(dsn, settings) as target:
        progress, left = asyncio.run(stripe_catalog.run(replace(settings, dsn=target), function, show))
    for error in progress["errors"]:
        print(f"pgcredits: {stripe_catalog.complaint(error)}", file=sys.stderr)
    if progress["errors"]:
        raise typer.Exit(1)
    print(f"Asked Stripe {progress['done']} times.")
    return left


def _show_differences(differences: list[db.Row]) -> None:
    from pgcredits import stripe_catalog

    print("\n".join(stripe_catalog.line(row) for row in differences) or "No difference.", flush=True)


def _with_stripe_key() -> Settings:
    settings = Settings.from_environment()
    if not settings.stripe_key:
        raise SettingsError("set STRIPE_SECRET_KEY to the key of Stripe's API")
    return settings


def _reconcile(
    settings: Settings, since: datetime | None, *, repair: bool, patience: int
) -> tuple[db.Row, list[db.Row]]:
    """Start a run, or join the one that runs, work until it is through or patience ends; the run and all it found."""
    from pgcredits import worker

    deadline = time.monotonic() + patience
    with psycopg.connect(settings.dsn, autocommit=True) as conn, console.status("Stripe is asked …") as status:
        (run,) = db.call(conn, "reconcile_stripe", since=since, repair=repair)
        while (run["state"] == "running" or run["repairing"]) and time.monotonic() < deadline:
            asyncio.run(worker.work(settings, once=True))
            (run,) = db.call(conn, "get_reconciliation", run_id=run["run_id"])
            status.update(f"{run['checked']} compared, {run['found']} had not arrived, {run['repairing']} under way …")
            if run["state"] == "running" or run["repairing"]:
                time.sleep(1)
        gaps: list[db.Row] = []
        while page := db.call(
            conn, "list_stripe_gaps", run_id=run["run_id"], after=gaps[-1]["object_id"] if gaps else None
        ):
            gaps += page
    return run, gaps


def _moment(text: str) -> datetime | None:
    """7d, 12h or 30m ago, or a moment as ISO text."""
    try:
        if ago := re.fullmatch(r"([0-9]{1,6})([dhm])", text):
            unit = {"d": "days", "h": "hours", "m": "minutes"}[ago[2]]
            return datetime.now(UTC) - timedelta(**{unit: int(ago[1])})
        return datetime.fromisoformat(text).astimezone() if text else None
    except (ValueError, OverflowError):  # none, or before the year 1
        raise SettingsError(f"--since is 7d, 12h, or a moment such as 2026-11-21T08:00Z, not {text!r}") from None
