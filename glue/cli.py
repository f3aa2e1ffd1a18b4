"""The command line: the door, deploys, a look at how things are, and what an operator does."""

import contextlib
import errno
import os
import secrets
import shutil
import socket
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import psycopg
import typer
from rich.table import Table

from pgcredits import __version__, balances, catalog, db, demo, migrate, status
from pgcredits.commands.catalog import cli as catalog_cli
from pgcredits.commands.events import cli as events_cli
from pgcredits.commands.imports import cli as imports_cli
from pgcredits.commands.jobs import cli as jobs_cli
from pgcredits.commands.notify import cli as notify_cli
from pgcredits.commands.settings import cli as settings_cli
from pgcredits.commands.shared import Dsn, ReleaseHolds, Yes, connected, console, database, progress
from pgcredits.commands.stripe import cli as stripe_cli
from pgcredits.settings import Settings, SettingsError

# The door and the workers are imported by the commands that run them: their libraries take longer to load than most
# other commands to work.

cli = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
cli.add_typer(catalog_cli, name="catalog")
cli.add_typer(events_cli, name="events")
cli.add_typer(imports_cli, name="import")
cli.add_typer(settings_cli, name="settings")
cli.add_typer(stripe_cli, name="stripe")
cli.add_typer(notify_cli, name="notify")
cli.add_typer(jobs_cli, name="jobs")


def _show_version(asked: bool) -> None:
    if asked:
        print(f"pgcredits {__version__}")
        raise typer.Exit


@cli.callback()
def options(
    *,
    _: Annotated[
        bool, typer.Option("--version", help="Show the version and exit.", is_eager=True, callback=_show_version)
    ] = False,
) -> None:
    """Prepaid credits inside your own Postgres."""


def main() -> None:
    """Entry point: errors that an operator can understand are one sentence, not a traceback."""
    from pgcredits.embedded import EmbeddedError  # see shared.database

    known = (
        migrate.DeployError,
        SettingsError,
        EmbeddedError,
        demo.DemoError,
        catalog.CatalogError,
        balances.BalancesError,
        psycopg.Error,
    )
    # For every connection of this process: the driver reads moments in no other style, and a database may have one of
    # its own. It travels with the login, which poolers understand too.
    os.environ["PGDATESTYLE"] = "ISO"
    try:
        cli()
    except known as error:
        _complain(error)
        sys.exit(1)
    except UnicodeEncodeError as error:  # Python keeps bytes that are no text as halves of characters
        if error.encoding != "utf-8":
            raise  # what is printed to
        print(f"pgcredits: not UTF-8, in an argument or a variable: {error.object!a}", file=sys.stderr, flush=True)
        sys.exit(1)


def _complain(error: Exception) -> None:
    text = str(error).strip()
    if isinstance(error, catalog.CatalogError | balances.BalancesError):
        print(text, file=sys.stderr, flush=True)  # its lines begin with the file, for editors to jump to
        return
    if isinstance(error, psycopg.Error):
        text = " · ".join(_parts(error))
    print(f"pgcredits: {text}", file=sys.stderr, flush=True)


def _parts(error: psycopg.Error) -> list[str]:
    """What the database or its driver says, and what to do where that is known better here."""
    said, hint, detail = error.diag.message_primary, error.diag.message_hint, error.diag.message_detail
    if isinstance(error, psycopg.errors.UndefinedFunction | psycopg.errors.InvalidSchemaName):
        hint = f"This is pgcredits {__version__}; to bring the database to it: pgcredits migrate"
    elif isinstance(error, psycopg.errors.InsufficientPrivilege):
        hint = "Log in as a member of credits_service, or set PGCREDITS_ROLE=credits_service if the login may become it"
    elif isinstance(error, psycopg.ProgrammingError) and not said:
        hint = "--dsn or PGCREDITS_DSN must be an address such as postgresql://user@host/database"
    elif said and hint == f"{said.capitalize().replace('_', ' ')}.":
        hint = None  # the code once more, as a sentence
    return [part for part in (said or " ".join(str(error).split()), hint, detail) if part]


@cli.command()
def up(dsn: Dsn = "", *, tour: bool = True) -> None:
    """Everything at once: a database (embedded unless one is given), the schema, a demo catalogue, the door, a tour."""
    settings = Settings.from_environment()
    with contextlib.suppress(KeyboardInterrupt), database(dsn, settings, make=True) as target:
        with progress("The schema is deployed"):
            migrate.migrate(target)
        with progress("The demo catalogue is loaded"), psycopg.connect(target) as conn:
            db.call(conn, "load_demo_catalog")
        own = not (dsn or settings.dsn)
        if own:
            from pgcredits import embedded

            embedded.let_it_act_for_callers(target)
        if not settings.webhook_secrets:
            settings = replace(settings, webhook_secrets={"": (_development_secret(settings.data),)})
            console.print(f"A development signing secret is kept in {settings.data / 'webhook_secret'}")

        def show(url: str) -> None:
            if tour:
                _tour(target, url, settings)
            console.print(f"\n[bold green]pgcredits serves on {url}[/bold green]   Ctrl-C stops it")
            again = f"{_program('pgcredits', Path(sys.argv[0]))} demo --url {url}"
            console.print(f"Webhooks: {url}/webhooks/stripe/{demo.ENDPOINT}   Again: {again}", soft_wrap=True)
            if own:
                psql = _program("psql", embedded.packaged() / "bin" / "psql")
                console.print(f'SQL: {psql} "$(cat {settings.data / "dsn"})"', highlight=False, soft_wrap=True)

        _serve(replace(settings, dsn=target), show)
    console.print("Stopped.")


@cli.command()
def serve(dsn: Dsn = "") -> None:
    """Serve the door: webhooks, calls, health checks, jobs, notifications and, with a key, requests to Stripe."""
    from pgcredits import observe

    settings = Settings.from_environment()
    observe.configure_logging(settings)
    with contextlib.suppress(KeyboardInterrupt), database(dsn, settings) as target:
        _serve(replace(settings, dsn=target), lambda url: print(f"pgcredits {__version__} serves on {url}", flush=True))


@cli.command("migrate")
def migrate_(dsn: Dsn = "") -> None:
    """Bring a database to this version, wholly or not at all. Safe to repeat, and from several places at once."""
    with database(dsn, Settings.from_environment()) as target:
        applied = migrate.migrate(target)
    print(f"Applied: {', '.join(applied)}." if applied else "No migration was pending.", end=" ")
    print("Functions, rows that are code, and rights are those of this version.")


@cli.command()
def rollback(
    dsn: Dsn = "",
    steps: Annotated[int, typer.Option(min=1, help="How many migrations to take back.")] = 1,
    *,
    all_: Annotated[bool, typer.Option("--all", help="All of them.")] = False,
    yes: Yes = False,
) -> None:
    """Take the last migrations back. Destroys what their tables hold."""
    with database(dsn, Settings.from_environment()) as target:
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
    with database(dsn, settings) as target:
        _tour(target, url or settings.door(settings.port), settings)


@cli.command("status")
def status_(dsn: Dsn = "") -> None:
    """How everything is, and what to do about what is not well. Exit code 1 if anything fails."""
    with connected(dsn) as conn:
        checks, figures = db.call(conn, "health"), db.call(conn, "metrics")
    if status.show(console, checks, figures):
        raise typer.Exit(1)


@cli.command()
def erase(
    account_id: str,
    dsn: Dsn = "",
    *,
    release_holds: ReleaseHolds = False,
    yes: Yes = False,
) -> None:
    """Erase the personal data of an account and close it, for good. The ledger stays: docs/operations.md."""
    if not yes:
        typer.confirm(f"Erase the personal data of {account_id}, take back its credits and close it?", abort=True)
    with connected(dsn) as conn:
        (done,) = db.call(conn, "erase_account", account_id=account_id, release_holds=release_holds)
    print(
        f"Erased. {done['forfeited']} credits were forfeited; {done['objects']} objects, {done['events']} events and "
        f"{done['requests']} answers of Stripe were emptied."
    )


@cli.command("erase-member")
def erase_member(
    account_id: str, member_id: str, dsn: Dsn = "", *, release_holds: ReleaseHolds = False, yes: Yes = False
) -> None:
    """Erase what tells of one member of an organisation, for good. All others, and the ledger, stay."""
    if not yes:
        typer.confirm(f"Erase what tells of {member_id} in {account_id}?", abort=True)
    with connected(dsn) as conn:
        (done,) = db.call(conn, "erase_member", account_id=account_id, member_id=member_id, release_holds=release_holds)
    print(f"Erased. {done['erase_member']} rows told of {member_id}.")


@cli.command("resume-after-restore")
def resume_after_restore(dsn: Dsn = "") -> None:
    """Make a database that was restored fit to go on, before the workers run: docs/operations.md."""
    with connected(dsn) as conn:
        (done,) = db.call(conn, "resume_after_restore")
    print(
        f"{done['resume_after_restore']} requests to Stripe are unknown now, and looked for before any is made again."
    )


@cli.command()
def audit(dsn: Dsn = "") -> None:
    """Check every invariant over the whole database. Prints what is violated; exit code 1 if anything is."""
    with connected(dsn) as conn:
        findings = db.call(conn, "run_audit")
    if not findings:
        print("Sound: no invariant is violated.")
        return
    table = Table(*findings[0])
    for row in findings:
        table.add_row(*(str(value) for value in row.values()))
    console.print(table)
    raise typer.Exit(1)


def _program(name: str, otherwise: Path) -> str:
    """How to call a program from this shell: many a path has neither a checkout's programs nor psql."""
    return name if shutil.which(name) else str(otherwise)


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


def _listener(settings: Settings) -> socket.socket:
    if ":" not in settings.host:
        return socket.create_server((settings.host, settings.port))
    both = socket.has_dualstack_ipv6()  # then :: is every address of this machine
    return socket.create_server((settings.host, settings.port), family=socket.AF_INET6, dualstack_ipv6=both)


def _serve(settings: Settings, when_ready: Callable[[str], None]) -> None:
    import uvicorn

    from pgcredits.app import create_app

    try:
        listener = _listener(settings)
    except OSError as error:
        reason = (error.strerror or str(error)).partition(" (while")[0]  # the rest says the address once more
        remedy = "PGCREDITS_PORT to another port" if error.errno == errno.EADDRINUSE else "PGCREDITS_HOST"
        raise SettingsError(f"cannot listen on {settings.door(settings.port)} ({reason}); set {remedy}") from error
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
            when_ready(settings.door(listener.getsockname()[1]))
        except (demo.DemoError, SettingsError, psycopg.Error) as error:
            _complain(error)

    threading.Thread(target=announce, daemon=True).start()
    with listener:
        server.run(sockets=[listener])
