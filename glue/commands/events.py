"""`pgcredits events`: what Stripe delivered, and what became of it."""

import json
from typing import Annotated

import typer

from pgcredits import db
from pgcredits.commands.shared import Dsn, connected

cli = typer.Typer(help="Events of Stripe: docs/stripe.md.", no_args_is_help=True)


@cli.command("list")
def list_(
    dsn: Dsn = "",
    state: Annotated[str, typer.Option("--status", help="received, applied, ignored, parked or failed.")] = "",
    type_: Annotated[str, typer.Option("--type", help="Such as invoice.paid.")] = "",
    before: Annotated[str, typer.Option(help="Page on: the last received_at seen.")] = "",
    limit: Annotated[int, typer.Option(min=1, max=1000)] = 50,
) -> None:
    """The events received, the latest first, one a line: tab-separated, for eyes and for other programs."""
    asked = {"status": state or None, "type": type_ or None, "before": before or None, "max_rows": limit}
    with connected(dsn) as conn:
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


@cli.command("show")
def show(event_id: str, dsn: Dsn = "") -> None:
    """All that is kept of an event, as JSON. Its payload tells of a customer."""
    with connected(dsn) as conn:
        (event,) = db.call(conn, "get_stripe_event", event_id=event_id)
    print(json.dumps(event, indent=2, default=str))


@cli.command("replay")
def replay(event_ids: list[str], dsn: Dsn = "") -> None:
    """Apply stored events again, each in a transaction of its own. Exit code 1 if one is not done then."""
    undone = False
    with connected(dsn, autocommit=True) as conn:
        for event_id in event_ids:
            (answer,) = db.call(conn, "replay_stripe_event", event_id=event_id)
            print(f"{event_id}\t{answer['outcome']}")
            undone |= answer["outcome"] in {"parked", "failed"}
    if undone:
        raise typer.Exit(1)
