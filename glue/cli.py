"""The command line: the door, deploys, a look at how things are, and what an operator does."""

import asyncio
import contextlib
import json
import logging
import re
import secrets
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import psycopg
import typer
from psycopg.types.json import Jsonb
from rich.console import Console
from rich.markup import escape
from rich.table import Column, Table

from pgcredits import __version__, balances, catalog, db, demo, migrate, status
from pgcredits.outbox import process_name
from pgcredits.settings import Settings, SettingsError

# The door and the workers are imported by the commands that run them: their libraries take longer to load than most
# other commands to work.

cli = typer.Typer(
    help="Prepaid credits inside your own Postgres.", no_args_is_help=True, add_completion=False,
    pretty_exceptions_enable=False,
)  # fmt: skip
catalog_cli = typer.Typer(help="The catalogue as a document: docs/catalog.md.", no_args_is_help=True)
cli.add_typer(catalog_cli, name="catalog")
stripe_cli = typer.Typer(help="Requests to Stripe: docs/stripe.md.", no_args_is_help=True)
cli.add_typer(stripe_cli, name="stripe")
events_cli = typer.Typer(help="Events of Stripe: docs/stripe.md.", no_args_is_help=True)
cli.add_typer(events_cli, name="events")
import_cli = typer.Typer(help="From another system: docs/migration-from-existing.md.", no_args_is_help=True)
cli.add_typer(import_cli, name="import")
settings_cli = typer.Typer(help="Settings of the database: docs/operations.md.", no_args_is_help=True)
cli.add_typer(settings_cli, name="settings")
notify_cli = typer.Typer(help="Notifications: docs/notifications.md.", no_args_is_help=True)
cli.add_typer(notify_cli, name="notify")
jobs_cli = typer.Typer(help="What runs by itself: docs/jobs.md.", no_args_is_help=True)
cli.add_typer(jobs_cli, name="jobs")
console = Console()
Dsn = Annotated[str, typer.Option("--dsn", help="Database, as postgresql://… or key=value. Default: PGCREDITS_DSN.")]
CronDsn = Annotated[
    str, typer.Option("--cron-dsn", help="Where pg_cron lives, if in another database. Default: PGCREDITS_CRON_DSN.")
]
CatalogFile = Annotated[str, typer.Argument(metavar="FILE", help="YAML or JSON; - is standard input.")]


def main() -> None:
    """Entry point: errors that an operator can understand are one sentence, not a traceback."""
    from pgcredits.embedded import EmbeddedError  # see _database

    known = (
        migrate.DeployError,
        SettingsError,
        EmbeddedError,
        demo.DemoError,
        catalog.CatalogError,
        balances.BalancesError,
        psycopg.Error,
    )
    try:
        cli()
    except known as error:
        _complain(error)
        sys.exit(1)


def _complain(error: Exception) -> None:
    text = str(error).strip()
    if isinstance(error, catalog.CatalogError | balances.BalancesError):
        print(text, file=sys.stderr, flush=True)  # its lines begin with the file, for editors to jump to
        return
    if isinstance(error, psycopg.Error) and error.diag.message_primary:
        parts = (error.diag.message_primary, error.diag.message_hint, error.diag.message_detail)
        text = " · ".join(part for part in parts if part)
    print(f"pgcredits: {text}", file=sys.stderr, flush=True)


@cli.command()
def up(dsn: Dsn = "", *, tour: bool = True) -> None:
    """Everything at once: a database (embedded unless one is given), the schema, a demo catalogue, the door, a tour."""
    settings = Settings.from_environment()
    with contextlib.suppress(KeyboardInterrupt), _database(dsn, settings, make=True) as target:
        with _progress("The schema is deployed"):
            migrate.migrate(target)
        with _progress("The demo catalogue is loaded"), psycopg.connect(target) as conn:
            db.call(conn, "load_demo_catalog")
        if not settings.webhook_secrets:
            settings = replace(settings, webhook_secrets={"": (_development_secret(settings.data),)})
            console.print(f"A development signing secret is kept in {settings.data / 'webhook_secret'}")

        def show(url: str) -> None:
            if tour:
                _tour(target, url, settings)
            console.print(f"\n[bold green]pgcredits serves on {url}[/bold green]   Ctrl-C stops it")
            console.print(f"Webhooks: {url}/webhooks/stripe/{demo.ENDPOINT}   Again: pgcredits demo")
            if not (dsn or settings.dsn):
                console.print(f'SQL: psql "$(cat {settings.data / "dsn"})"', highlight=False)

        _serve(replace(settings, dsn=target), show)
    console.print("Stopped.")


@cli.command()
def serve(dsn: Dsn = "") -> None:
    """Serve the door: webhooks, calls, health checks, jobs, notifications and, with a key, requests to Stripe."""
    from pgcredits import observe

    settings = Settings.from_environment()
    observe.configure_logging(settings)
    with contextlib.suppress(KeyboardInterrupt), _database(dsn, settings) as target:
        _serve(replace(settings, dsn=target), lambda url: print(f"pgcredits {__version__} serves on {url}", flush=True))


@cli.command("migrate")
def migrate_(dsn: Dsn = "") -> None:
    """Bring a database to this version, wholly or not at all. Safe to repeat, and from several places at once."""
    with _database(dsn, Settings.from_environment()) as target:
        applied = migrate.migrate(target)
    print(f"Applied: {', '.join(applied)}." if applied else "No migration was pending.", end=" ")
    print("Functions, rows that are code, and rights are those of this version.")


@cli.command()
def rollback(
    dsn: Dsn = "",
    steps: Annotated[int, typer.Option(min=1, help="How many migrations to take back.")] = 1,
    *,
    all_: Annotated[bool, typer.Option("--all", help="All of them.")] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
) -> None:
    """Take the last migrations back. Destroys what their tables hold."""
    with _database(dsn, Settings.from_environment()) as target:
        what = "all migrations" if all_ else f"the last {steps} migration(s)"
        if not yes:
            typer.confirm(f"Take back {what} and destroy what their tables hold?", abort=True)
        undone = migrate.rollback(target, None if all_ else steps)
    print(
        f"Taken back: {', '.join(undone)}. `pgcredits migrate` brings it back, empty."
        if undone
        else "Nothing is applied."
    )


@cli.command("sql")
def sql_() -> None:
    """Print one file that installs this version with psql alone."""
    sys.stdout.writelines(migrate.script())


@cli.command("demo")
def demo_(
    dsn: Dsn = "", url: Annotated[str, typer.Option(help="Where the door is. Default: PGCREDITS_HOST and _PORT.")] = ""
) -> None:
    """Take the tour on a running instance. Needs its database, and its signing secret in the environment."""
    settings = Settings.from_environment()
    with _database(dsn, settings) as target:
        _tour(target, url or f"http://{settings.host}:{settings.port}", settings)


@cli.command("status")
def status_(dsn: Dsn = "") -> None:
    """How everything is, and what to do about what is not well. Exit code 1 if anything fails."""
    with _database(dsn, Settings.from_environment()) as target, psycopg.connect(target) as conn:
        checks, figures = db.call(conn, "health"), db.call(conn, "metrics")
    if status.show(console, checks, figures):
        raise typer.Exit(1)


@cli.command()
def erase(
    account_id: str,
    dsn: Dsn = "",
    *,
    release_holds: Annotated[bool, typer.Option("--release-holds", help="Give back what reservations hold.")] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
) -> None:
    """Erase the personal data of an account and close it, for good. The ledger stays: docs/operations.md."""
    if not yes:
        typer.confirm(f"Erase the personal data of {account_id}, take back its credits and close it?", abort=True)
    with _database(dsn, Settings.from_environment()) as target, psycopg.connect(target) as conn:
        (done,) = db.call(conn, "erase_account", account_id=account_id, release_holds=release_holds)
    print(
        f"Erased. {done['forfeited']} credits were forfeited; {done['objects']} objects, {done['events']} events and "
        f"{done['requests']} answers of Stripe were emptied."
    )


@cli.command()
def audit(dsn: Dsn = "") -> None:
    """Check every invariant over the whole database. Prints what is violated; exit code 1 if anything is."""
    with _database(dsn, Settings.from_environment()) as target, psycopg.connect(target) as conn:
        findings = db.call(conn, "run_audit")
    if not findings:
        print("Sound: no invariant is violated.")
        return
    table = Table(*findings[0])
    for row in findings:
        table.add_row(*(str(value) for value in row.values()))
    console.print(table)
    raise typer.Exit(1)


@catalog_cli.command("apply")
def catalog_apply(file: CatalogFile, dsn: Dsn = "") -> None:
    """Make the catalogue what a document says, wholly or not at all, and print what that changed.

    Then accounts whose plan got other credits are brought up to date, a batch at a time.
    """
    _show_changes(file, dsn, dry_run=False)
    with _database(dsn, Settings.from_environment()) as target, psycopg.connect(target, autocommit=True) as conn:
        if accounts := sum(iter(partial(_initialize_plan_credits, conn), 0)):
            print(f"Accounts brought to the credits that their plan says now: {accounts}.")


@catalog_cli.command("diff")
def catalog_diff(
    file: CatalogFile,
    dsn: Dsn = "",
    *,
    check: Annotated[bool, typer.Option("--check", help="Exit code 1 if anything would change.")] = False,
) -> None:
    """Print what applying a document would change, and change nothing."""
    if _show_changes(file, dsn, dry_run=True) and check:
        raise typer.Exit(1)


@catalog_cli.command("export")
def catalog_export(
    file: Annotated[str, typer.Argument(metavar="[FILE]", help="Default: standard output.")] = "-", dsn: Dsn = ""
) -> None:
    """Write the catalogue as a document that, applied again, changes nothing."""
    with _database(dsn, Settings.from_environment()) as target, psycopg.connect(target) as conn:
        text = catalog.export(conn)
    catalog.write(file, text)


@events_cli.command("list")
def events_list(
    dsn: Dsn = "",
    state: Annotated[str, typer.Option("--status", help="received, applied, ignored, parked or failed.")] = "",
    type_: Annotated[str, typer.Option("--type", help="Such as invoice.paid.")] = "",
    before: Annotated[str, typer.Option(help="Page on: the last received_at seen.")] = "",
    limit: Annotated[int, typer.Option(min=1, max=1000)] = 50,
) -> None:
    """The events received, the latest first, one a line: tab-separated, for eyes and for other programs."""
    asked = {"status": state or None, "type": type_ or None, "before": before or None, "max_rows": limit}
    with _database(dsn, Settings.from_environment()) as target, psycopg.connect(target) as conn:
        events = db.call(conn, "list_stripe_events", **asked)
    for event in events:
        why = event["error"] or event["reason"] or ""
        told = (
            event["received_at"].isoformat(),
            event["event_id"],
            event["type"] or "",
            event["status"],
            " ".join(why.split()),
        )
        print("\t".join(told))


@events_cli.command("show")
def events_show(event_id: str, dsn: Dsn = "") -> None:
    """All that is kept of an event, as JSON. Its payload tells of a customer."""
    with _database(dsn, Settings.from_environment()) as target, psycopg.connect(target) as conn:
        (event,) = db.call(conn, "get_stripe_event", event_id=event_id)
    print(json.dumps(event, indent=2, default=str))


@events_cli.command("replay")
def events_replay(event_ids: list[str], dsn: Dsn = "") -> None:
    """Apply stored events again, each in a transaction of its own. Exit code 1 if one is not done then."""
    undone = False
    with _database(dsn, Settings.from_environment()) as target, psycopg.connect(target, autocommit=True) as conn:
        for event_id in event_ids:
            (answer,) = db.call(conn, "replay_stripe_event", event_id=event_id)
            print(f"{event_id}\t{answer['outcome']}")
            undone |= answer["outcome"] in {"parked", "failed"}
    if undone:
        raise typer.Exit(1)


@import_cli.command("balances")
def import_balances(
    file: Annotated[str, typer.Argument(metavar="FILE.csv", help="With a header; - is standard input.")],
    dsn: Dsn = "",
    batch: Annotated[int, typer.Option(min=1, max=10_000, help="Rows of one transaction.")] = 5000,
    *,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would come of it, and change nothing.")] = False,
) -> None:
    """Bring in opening balances, a grant per row. Safe to repeat, so a run that ended early is simply started again.

    Each row that is refused is printed with its line; exit code 1 if any is.
    """
    rows = balances.read(file)
    with _database(dsn, Settings.from_environment()) as target, psycopg.connect(target, autocommit=True) as conn:
        counted = balances.bring_in(conn, file, rows, batch, dry_run=dry_run)
    done = "Would be booked" if dry_run else "Booked"
    print(f"{done}: {counted.booked}. Known before: {counted.known}. Refused: {counted.refused}.")
    if counted.refused:
        raise typer.Exit(1)


@settings_cli.command("list")
def settings_list(dsn: Dsn = "") -> None:
    """Every setting with its value."""
    with _database(dsn, Settings.from_environment()) as target, psycopg.connect(target) as conn:
        for row in db.call(conn, "list_settings"):
            print(f"{row['name']} = {json.dumps(row['value'])}\n    {row['summary']}")


@settings_cli.command("set")
def settings_set(
    name: str,
    value: Annotated[str, typer.Argument(help="JSON, or a text as it is: 10, '2 minutes', '[\"https://a.example\"]'.")],
    dsn: Dsn = "",
) -> None:
    """Change a setting, for every call from now on."""
    with _database(dsn, Settings.from_environment()) as target, psycopg.connect(target) as conn:
        (row,) = db.call(conn, "set_setting", name=name, value=Jsonb(_json_or_text(value)))
    print(f"{row['name']} = {json.dumps(row['value'])}")


def _json_or_text(value: str) -> Any:
    try:
        return json.loads(value)
    except ValueError:
        return value


@stripe_cli.command("work")
def stripe_work(
    dsn: Dsn = "", *, once: Annotated[bool, typer.Option("--once", help="Until nothing is due, then end.")] = False
) -> None:
    """Send to Stripe what SQL asks of it, and bring the answers back. Several may run, beside the door or not."""
    from pgcredits import observe, worker

    settings = _with_stripe_key()
    observe.configure_logging(settings)
    with _database(dsn, settings) as target:
        asyncio.run(worker.work(replace(settings, dsn=target), once=once))


@stripe_cli.command("publish")
def stripe_publish(
    dsn: Dsn = "",
    *,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print what would change, and change nothing.")] = False,
) -> None:
    """Make Stripe's products and prices what the catalogue says. Exit code 1 if anything failed or differs still."""
    if dry_run:
        with _database(dsn, Settings.from_environment()) as target, psycopg.connect(target) as conn:
            _show_differences(db.call(conn, "publish_catalog", dry_run=True))
        return
    left = _run_catalog(dsn, "publish_catalog", _show_differences)
    if any(row["change"] for row in left):
        print("Still different:")
        _show_differences(left)
        raise typer.Exit(1)


@stripe_cli.command("sync")
def stripe_sync(dsn: Dsn = "") -> None:
    """Read all products and prices of Stripe, and print where they differ. Exit code 1 if it failed."""
    _show_differences(_run_catalog(dsn, "sync_catalog", lambda _: None))


def _run_catalog(dsn: str, function: str, show: Callable[[list[db.Row]], None]) -> list[db.Row]:
    from pgcredits import stripe_catalog, worker

    settings = _with_stripe_key()
    logging.getLogger(worker.log.name).setLevel(logging.ERROR)  # what failed is told at the end
    with _database(dsn, settings) as target:
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


@notify_cli.command("work")
def notify_work(
    dsn: Dsn = "", *, once: Annotated[bool, typer.Option("--once", help="Until nothing is due, then end.")] = False
) -> None:
    """Send notifications as webhooks and e-mails. Several may run, beside the door or not."""
    from pgcredits import notifier, observe

    settings = Settings.from_environment()
    observe.configure_logging(settings)
    if not notifier.configured(settings):
        raise SettingsError("set PGCREDITS_NOTIFY_SECRET_<NAME> for an endpoint, or PGCREDITS_SMTP_URL for e-mail")
    with _database(dsn, settings) as target:
        asyncio.run(notifier.work(replace(settings, dsn=target), once=once))


@notify_cli.command("list")
def notify_list(
    dsn: Dsn = "",
    state: Annotated[
        str | None, typer.Option(help="Only with a delivery that is pending, sent, delivered, dead.")
    ] = None,
    kind: Annotated[str | None, typer.Option(help="Only of this kind.")] = None,
    rows: Annotated[int, typer.Option(min=1, max=1000, help="How many, the latest first.")] = 50,
) -> None:
    """Print notifications and what became of their deliveries."""
    with _database(dsn, Settings.from_environment()) as target, psycopg.connect(target) as conn:
        found = db.call(conn, "list_notifications", state=state, kind=kind, max_rows=rows)
    table = Table("id", "when", "kind", "account", "deliveries")
    for row in found:
        deliveries = (
            f"{one['target']}: {one['state']} after {one['attempts']}, {one['last_error'] or one['last_status'] or ''}"
            for one in row["deliveries"]
        )
        table.add_row(
            str(row["notification_id"]), f"{row['created_at']:%Y-%m-%d %H:%M:%S}", row["kind"], row["account_id"],
            escape("\n".join(deliveries)),
        )  # fmt: skip
    console.print(table)


@stripe_cli.command("reconcile")
def stripe_reconcile(
    dsn: Dsn = "",
    since: Annotated[str, typer.Option(help="How far back: 7d, 12h, or a moment. Default: reconcile_window.")] = "",
    *,
    repair: Annotated[bool, typer.Option("--repair", help="Apply what never arrived.")] = False,
    patience: Annotated[int, typer.Option(min=1, help="Seconds to wait for Stripe.")] = 300,
) -> None:
    """Compare what Stripe has with what arrived here, and print what differs; exit code 1 if anything remains.

    It executes what is due, as `pgcredits stripe work --once` does.
    """
    settings = Settings.from_environment()
    if not settings.stripe_key:
        raise SettingsError("set STRIPE_SECRET_KEY to the key of Stripe's API")
    with _database(dsn, settings) as target:
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
    if ago := re.fullmatch(r"([0-9]{1,6})([dhm])", text):
        unit = {"d": "days", "h": "hours", "m": "minutes"}[ago[2]]
        return datetime.now(UTC) - timedelta(**{unit: int(ago[1])})
    try:
        return datetime.fromisoformat(text).astimezone() if text else None
    except ValueError:
        raise SettingsError(f"--since is 7d, 12h, or a moment such as 2026-11-21T08:00Z, not {text!r}") from None


@jobs_cli.command("list")
def jobs_list(dsn: Dsn = "") -> None:
    """Show the jobs: how each stands, when it runs next, and what went wrong. All times are UTC."""
    with _database(dsn, Settings.from_environment()) as target, psycopg.connect(target) as conn:
        rows = db.call(conn, "list_jobs")
    columns = ("name", "state", "schedule", "next_run_at", "last_success_at", "failures", "last_error")
    table = Table(Column(columns[0], no_wrap=True), *columns[1:])
    for row in rows:
        table.add_row(*(_cell(row[column]) for column in columns))
    console.print(table)


@jobs_cli.command("run")
def jobs_run(
    name: Annotated[str, typer.Argument(metavar="[NAME]", help="Default: all that are due.")] = "",
    dsn: Dsn = "",
) -> None:
    """Run a job to its end, due or not, or all that are due. Each batch is committed. Exit code 1 if one fails."""
    failed = False
    with _database(dsn, Settings.from_environment()) as target, psycopg.connect(target, autocommit=True) as conn:
        for row in _run_to_end(conn, name) if name else _run_due(conn):
            print(f"{row['name']}: {row['outcome']}, {row['rows_done']} {row['error'] or ''}".rstrip(), flush=True)
            failed |= row["outcome"] == "failed"
    if failed:
        raise typer.Exit(1)


@jobs_cli.command("schedule")
def jobs_schedule(dsn: Dsn = "", cron_dsn: CronDsn = "") -> None:
    """Have pg_cron do the jobs. Its entries run as the login that makes them. Safe to repeat."""
    for entry in _carry_to_cron(dsn, cron_dsn, remove=False):
        print(f"Scheduled: {entry}")


@jobs_cli.command("unschedule")
def jobs_unschedule(dsn: Dsn = "", cron_dsn: CronDsn = "") -> None:
    """Take our entries out of pg_cron. `pgcredits serve` does the jobs from then on."""
    _carry_to_cron(dsn, cron_dsn, remove=True)
    print("pg_cron has no entries of this database any more.")


def _carry_to_cron(dsn: str, cron_dsn: str, *, remove: bool) -> list[str]:
    settings = Settings.from_environment()
    elsewhere = cron_dsn or settings.cron_dsn
    with _database(dsn, settings) as target:
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


def _initialize_plan_credits(conn: psycopg.Connection[Any]) -> int:
    (row,) = db.call(conn, "initialize_plan_credits")
    accounts: int = row["initialize_plan_credits"]
    return accounts


def _show_changes(file: str, dsn: str, *, dry_run: bool) -> bool:
    document = catalog.read(file)
    with _database(dsn, Settings.from_environment()) as target, psycopg.connect(target) as conn:
        changes = catalog.apply(conn, document, dry_run=dry_run)
    print("\n".join(changes) or "Nothing to change.")
    return bool(changes)


@contextlib.contextmanager
def _database(dsn: str, settings: Settings, *, make: bool = False) -> Iterator[str]:
    """The database to work on: the one given, or the embedded one (made only by `up`), used until the block ends."""
    if dsn or settings.dsn:
        yield dsn or settings.dsn
        return
    if not make and not (settings.data / "passwords.json").exists():
        raise SettingsError("which database? Give --dsn, set PGCREDITS_DSN, or start one with `pgcredits up`")
    from pgcredits import embedded  # its locks exist on POSIX only, the rest runs anywhere

    with _progress("PostgreSQL runs") if make else contextlib.nullcontext():
        server = embedded.start(settings.data, port=settings.embedded_port)
    if make and server.data.parent != settings.data.resolve():
        console.print(f"Its data are in {server.data}: the user who runs it for root cannot reach {settings.data}")
    with server:
        yield server.dsn


@contextlib.contextmanager
def _progress(done: str) -> Iterator[None]:
    began = time.monotonic()
    with console.status(f"{done} …"):
        yield
    console.print(f"[green]✓[/green] {done} [dim]({time.monotonic() - began:.1f} s)[/dim]")


def _development_secret(data: Path) -> str:
    kept = data / "webhook_secret"
    if not kept.exists():
        data.mkdir(parents=True, exist_ok=True)
        kept.touch(mode=0o600)
        kept.write_text(f"whsec_{secrets.token_hex(24)}\n")
    return kept.read_text().strip()


def _tour(dsn: str, url: str, settings: Settings) -> None:
    configured = settings.secrets_of(demo.ENDPOINT)
    if not configured and not (settings.data / "webhook_secret").exists():
        raise SettingsError("the tour signs an event: set STRIPE_WEBHOOK_SECRET to the secret that the door knows")
    demo.run(console, dsn, url, configured[0] if configured else _development_secret(settings.data))


def _serve(settings: Settings, when_ready: Callable[[str], None]) -> None:
    import uvicorn

    from pgcredits.app import create_app

    try:
        listener = socket.create_server((settings.host, settings.port), reuse_port=False)
    except OSError as error:
        raise SettingsError(
            f"cannot listen on {settings.host}:{settings.port} ({error.strerror}); set PGCREDITS_PORT to another port"
        ) from error
    server = uvicorn.Server(
        uvicorn.Config(
            create_app(settings),
            log_config=None,
            log_level="warning",
            access_log=False,
            server_header=False,
            timeout_graceful_shutdown=10,
        )
    )

    def announce() -> None:
        while not server.started:
            if server.should_exit:
                return
            time.sleep(0.02)
        try:
            when_ready(f"http://{settings.host}:{listener.getsockname()[1]}")
        except (demo.DemoError, SettingsError, psycopg.Error) as error:
            _complain(error)

    threading.Thread(target=announce, daemon=True).start()
    with listener:
        server.run(sockets=[listener])
