"""`pgcredits catalog`: the catalogue as a document."""

from functools import partial
from typing import Annotated, Any

import psycopg
import typer

from pgcredits import catalog, db
from pgcredits.commands.shared import Dsn, connected

cli = typer.Typer(help="The catalogue as a document: docs/catalog.md.", no_args_is_help=True)
CatalogFile = Annotated[str, typer.Argument(metavar="FILE", help="YAML or JSON; - is standard input.")]


@cli.command("apply")
def apply(file: CatalogFile, dsn: Dsn = "") -> None:
    """Make the catalogue what a document says, wholly or not at all, and print what that changed.

    Months of plans that have begun are booked first, by the catalogue under which they began. Afterwards accounts
    whose plan got other credits are brought up to date. Both a batch at a time.
    """
    document = catalog.read(file)
    with connected(dsn, autocommit=True) as conn:
        _until_none(conn, "grant_plan_credits")
    _show_changes(document, dsn, dry_run=False)
    with connected(dsn, autocommit=True) as conn:
        if accounts := _until_none(conn, "initialize_plan_credits"):
            print(f"Accounts brought to the credits that their plan says now: {accounts}.")


@cli.command("diff")
def diff(
    file: CatalogFile,
    dsn: Dsn = "",
    *,
    check: Annotated[bool, typer.Option("--check", help="Exit code 1 if anything would change.")] = False,
) -> None:
    """Print what applying a document would change, and change nothing."""
    if _show_changes(catalog.read(file), dsn, dry_run=True) and check:
        raise typer.Exit(1)


@cli.command("export")
def export(
    file: Annotated[str, typer.Argument(metavar="[FILE]", help="Default: standard output.")] = "-", dsn: Dsn = ""
) -> None:
    """Write the catalogue as a document that, applied again, changes nothing."""
    with connected(dsn) as conn:
        text = catalog.export(conn)
    catalog.write(file, text)


def _until_none(conn: psycopg.Connection[Any], function: str) -> int:
    """Call a function that does a batch of accounts, until it says that none is left; how many there were."""
    return sum(iter(partial(_batch, conn, function), 0))


def _batch(conn: psycopg.Connection[Any], function: str) -> int:
    (row,) = db.call(conn, function)
    accounts: int = row[function]
    return accounts


def _show_changes(document: catalog.Document, dsn: str, *, dry_run: bool) -> bool:
    with connected(dsn) as conn:
        changes = catalog.apply(conn, document, dry_run=dry_run)
    print("\n".join(changes) or "Nothing to change.")
    return bool(changes)
