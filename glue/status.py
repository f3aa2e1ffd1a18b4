"""One screen that says how everything is, and what to do about what is not well. What is well is decided by SQL."""

from collections import Counter
from decimal import Decimal

from rich.console import Console
from rich.table import Table
from rich.text import Text

from pgcredits.db import Row

MARKS = {"ok": ("ok  ", "green"), "warn": ("warn", "yellow"), "fail": ("FAIL", "bold red")}


def show(console: Console, checks: list[Row], figures: list[Row]) -> bool:
    """Print the screen; whether anything fails."""
    counts = Counter(check["status"] for check in checks)
    console.print(f"pgcredits: {counts['ok']} ok, {counts['warn']} to look at, {counts['fail']} failing\n")
    table = Table(box=None, show_header=False, pad_edge=False)
    for check in checks:
        mark, style = MARKS[check["status"]]
        table.add_row(Text(mark, style=style), check["name"], Text(_value(check["value"]), justify="right"))
    console.print(table)
    for check in checks:
        if check["status"] != "ok":
            console.print(f"\n{check['name']}: {check['meaning']}", style=MARKS[check["status"]][1], highlight=False)
            console.print(f"  To do: {check['advice']}", highlight=False)
    console.print("\nFigures", style="bold")
    table = Table(box=None, show_header=False, pad_edge=False)
    for row in figures:
        labels = ", ".join(str(value) for value in row["labels"].values())
        name = row["name"].removeprefix("pgcredits_").replace("_", " ")
        table.add_row(f"{name} {labels}".strip(), Text(_value(row["value"]), justify="right"))
    console.print(table)
    return bool(counts["fail"])


def _value(value: Decimal | None) -> str:
    if value is None:
        return "not known"
    return f"{value:,.0f}" if value == value.to_integral_value() else f"{value:,.2f}"
