"""`pgcredits import`: what another system has."""

from typing import Annotated

import typer

from pgcredits import balances
from pgcredits.commands.shared import Dsn, connected

cli = typer.Typer(help="From another system: docs/migration-from-existing.md.", no_args_is_help=True)


@cli.command("balances")
def balances_(
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
    with connected(dsn, autocommit=True) as conn:
        counted = balances.bring_in(conn, file, rows, batch, dry_run=dry_run)
    done = "Would be booked" if dry_run else "Booked"
    print(f"{done}: {counted.booked}. Known before: {counted.known}. Refused: {counted.refused}.")
    if counted.refused:
        raise typer.Exit(1)
