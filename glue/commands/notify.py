"""`pgcredits notify`: what is told to the product and to people."""

import asyncio
from dataclasses import replace
from typing import Annotated

import typer
from rich.markup import escape
from rich.table import Table

from pgcredits import db
from pgcredits.commands.shared import Dsn, connected, console, database
from pgcredits.settings import Settings, SettingsError

cli = typer.Typer(help="Notifications: docs/notifications.md.", no_args_is_help=True)


@cli.command("work")
def work(
    dsn: Dsn = "", *, once: Annotated[bool, typer.Option("--once", help="Until nothing is due, then end.")] = False
) -> None:
    """Send notifications as webhooks and e-mails. Several may run, beside the door or not."""
    from pgcredits import notifier, observe

    settings = Settings.from_environment()
    observe.configure_logging(settings)
    if not notifier.configured(settings):
        raise SettingsError("set PGCREDITS_NOTIFY_SECRET_<NAME> for an endpoint, or PGCREDITS_SMTP_URL for e-mail")
    with database(dsn, settings) as target:
        asyncio.run(notifier.work(replace(settings, dsn=target), once=once))


@cli.command("list")
def list_(
    dsn: Dsn = "",
    state: Annotated[
        str | None, typer.Option(help="Only with a delivery that is pending, sent, delivered, dead.")
    ] = None,
    kind: Annotated[str | None, typer.Option(help="Only of this kind.")] = None,
    rows: Annotated[int, typer.Option(min=1, max=1000, help="How many, the latest first.")] = 50,
) -> None:
    """Print notifications and what became of their deliveries."""
    with connected(dsn) as conn:
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
