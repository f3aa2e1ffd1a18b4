"""What commands have in common: which database, and how they show that they work."""

import contextlib
import time
from collections.abc import Iterator
from typing import Annotated, Any

import psycopg
import typer
from rich.console import Console

from pgcredits.settings import Settings, SettingsError

console = Console()
Dsn = Annotated[str, typer.Option("--dsn", help="Database, as postgresql://… or key=value. Default: PGCREDITS_DSN.")]
Yes = Annotated[bool, typer.Option("--yes", help="Do not ask.")]
ReleaseHolds = Annotated[bool, typer.Option("--release-holds", help="Give back what reservations hold.")]


@contextlib.contextmanager
def database(dsn: str, settings: Settings, *, make: bool = False) -> Iterator[str]:
    """The database to work on: the one given, or the embedded one (made only by `up`), used until the block ends."""
    if dsn or settings.dsn:
        yield dsn or settings.dsn
        return
    if not make and not (settings.data / "passwords.json").exists():
        raise SettingsError("which database? Give --dsn, set PGCREDITS_DSN, or start one with `pgcredits up`")
    from pgcredits import embedded  # its locks exist on POSIX only, the rest runs anywhere

    with progress("PostgreSQL runs") if make else contextlib.nullcontext():
        server = embedded.start(settings.data, port=settings.embedded_port)
    if make and server.data.parent != settings.data.resolve():
        console.print(f"Its data are in {server.data}: the user who runs it for root cannot reach {settings.data}")
    with server:
        yield server.dsn


@contextlib.contextmanager
def connected(dsn: str, *, autocommit: bool = False) -> Iterator[psycopg.Connection[Any]]:
    """A connection to it, in the role that belongs to PGCREDITS_DSN."""
    settings = Settings.from_environment()
    with database(dsn, settings) as target, psycopg.connect(target, autocommit=autocommit) as conn:
        if settings.role and not dsn:
            conn.execute("select set_config('role', %s, %s)", [settings.role, not autocommit])
        yield conn


@contextlib.contextmanager
def progress(done: str) -> Iterator[None]:
    began = time.monotonic()
    with console.status(f"{done} …"):
        yield
    console.print(f"[green]✓[/green] {done} [dim]({time.monotonic() - began:.1f} s)[/dim]")
