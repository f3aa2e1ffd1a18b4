"""`pgcredits settings`: those of the database."""

import json
from typing import Annotated, Any

import typer
from psycopg.types.json import Jsonb

from pgcredits import db
from pgcredits.commands.shared import Dsn, connected

cli = typer.Typer(help="Settings of the database: docs/operations.md.", no_args_is_help=True)


@cli.command("list")
def list_(dsn: Dsn = "") -> None:
    """Every setting with its value."""
    with connected(dsn) as conn:
        for row in db.call(conn, "list_settings"):
            print(f"{row['name']} = {json.dumps(row['value'])}\n    {row['summary']}")


@cli.command("set")
def set_(
    name: str,
    value: Annotated[str, typer.Argument(help="JSON, or a text as it is: 10, '2 minutes', '[\"https://a.example\"]'.")],
    dsn: Dsn = "",
) -> None:
    """Change a setting, for every call from now on."""
    with connected(dsn) as conn:
        (row,) = db.call(conn, "set_setting", name=name, value=Jsonb(_json_or_text(value)))
    print(f"{row['name']} = {json.dumps(row['value'])}")


def _json_or_text(value: str) -> Any:
    try:
        found = json.loads(value)
        json.dumps(found, allow_nan=False)  # Python reads NaN, Infinity and 1e999, which are no JSON
    except (ValueError, RecursionError):
        return value
    return found
