"""Opening balances from a CSV file: rows with their lines, batches with progress. SQL decides what a row may say."""

import csv
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from psycopg import Connection
from psycopg.types.json import Jsonb
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from pgcredits import db

NEEDED = ("key", "account_id", "amount")
COLUMNS = (*NEEDED, "kind", "expires_at", "cost", "cost_currency", "description", "email", "account_kind", "plan")


class BalancesError(Exception):
    """A file that cannot be read. The text starts with the file and the line."""


@dataclass(frozen=True)
class Line:
    """A row of the file, and the line that it begins in."""

    number: int
    values: dict[str, str]


@dataclass
class Counted:
    """How many rows were booked (or would be), were known before, and were refused."""

    booked: int = 0
    known: int = 0
    refused: int = 0


def read(file: str) -> list[Line]:
    """The rows of a file, or of standard input (`-`). Raises BalancesError."""
    name = "<stdin>" if file == "-" else file
    try:
        if file == "-":
            return list(_lines(sys.stdin, name))
        with Path(file).open(encoding="utf-8-sig", newline="") as source:
            return list(_lines(source, name))
    except OSError as error:
        raise BalancesError(f"{name}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise BalancesError(f"{name}: is not a text in UTF-8") from error


def _lines(source: TextIO, name: str) -> Iterator[Line]:
    reader = csv.reader(source, strict=True)
    wrong = []  # told together, or each run would tell of one more
    try:
        header = [column.strip() for column in next(reader, [])]
        _check_header(header, name)
        begins = reader.line_num + 1
        for values in reader:
            if any(values):
                if len(values) != len(header):
                    wrong.append(f"{name}:{begins}: {len(values)} values, but {len(header)} columns")
                elif "\0" in "".join(values):
                    wrong.append(f"{name}:{begins}: has a character that PostgreSQL cannot hold")
                else:
                    yield Line(begins, dict(zip(header, (value.strip() for value in values), strict=True)))
            begins = reader.line_num + 1
    except csv.Error as error:
        wrong.append(f"{name}:{reader.line_num}: {error}")
    if wrong:
        raise BalancesError("\n".join(wrong))


def _check_header(header: list[str], name: str) -> None:
    wrong = {
        "there is no column": [column for column in NEEDED if column not in header],
        "there can be no column": [column for column in header if column not in COLUMNS],
        "given twice is": sorted({column for column in header if header.count(column) > 1}),
    }
    for what, columns in wrong.items():
        if columns:
            raise BalancesError(f"{name}:1: {what} {', '.join(columns)}; known are {', '.join(COLUMNS)}")


def bring_in(conn: Connection[Any], file: str, lines: list[Line], batch: int, *, dry_run: bool) -> Counted:
    """Bring the rows in, a batch a transaction; each that is refused is a line on standard error."""
    counted = Counted()
    bar = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*bar, console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty()) as progress:
        task = progress.add_task("Rows", total=len(lines))
        for first in range(0, len(lines), batch):
            some = lines[first : first + batch]
            rows = db.call(
                conn, "import_opening_balances", balances=Jsonb([line.values for line in some]), dry_run=dry_run
            )
            for line, row in zip(some, rows, strict=True):
                _count(counted, row)
                if row["status"] != 200:  # noqa: PLR2004 - as HTTP says it
                    progress.console.print(_complaint(file, line, row), highlight=False, soft_wrap=True, markup=False)
            progress.advance(task, len(some))
    return counted


def _count(counted: Counted, row: db.Row) -> None:
    counted.booked += row["replayed"] is False
    counted.known += row["replayed"] is True
    counted.refused += row["replayed"] is None


def _complaint(file: str, line: Line, row: db.Row) -> str:
    argument = (row["detail"] or {}).get("argument", "key")
    said = repr(line.values.get(argument, ""))
    return f"{file}:{line.number}: {argument} {said}: {row['code']}: {row['hint']}"
