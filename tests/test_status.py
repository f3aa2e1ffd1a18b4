"""The screen of `pgcredits status`, as it looks."""

import io
import os
import re
import subprocess
import sys
from decimal import Decimal
from typing import Any

from ledger_support import committed
from rich.console import Console
from servers import Database

from pgcredits import db, status

CHECKS: list[dict[str, Any]] = [
    {"name": "audit_is_clean", "status": "fail", "value": Decimal(2), "meaning": "The last audit found violations.",
     "advice": "pgcredits audit shows them."},
    {"name": "events_wait", "status": "warn", "value": Decimal("4000.5"), "meaning": "An event waits.",
     "advice": "pgcredits events list"},
    {"name": "requests_are_sent", "status": "ok", "value": None, "meaning": "m", "advice": "a"},
]  # fmt: skip
FIGURES: list[dict[str, Any]] = [
    {"name": "pgcredits_accounts", "labels": {"status": "active"}, "value": Decimal(1234567)},
    {"name": "pgcredits_credits_held", "labels": {}, "value": Decimal("0.25")},
    {"name": "pgcredits_audit_age_seconds", "labels": {}, "value": None},
]
SCREEN = """\
pgcredits: 1 ok, 1 to look at, 1 failing

FAIL  audit_is_clean             2
warn  events_wait         4,000.50
ok    requests_are_sent  not known

audit_is_clean: The last audit found violations.
  To do: pgcredits audit shows them.

events_wait: An event waits.
  To do: pgcredits events list

Figures
accounts active    1,234,567
credits held            0.25
audit age seconds  not known
"""


def test_the_screen_says_what_is_red_and_what_to_do() -> None:
    screen = io.StringIO()
    assert status.show(Console(file=screen, width=80, color_system=None), CHECKS, FIGURES)
    assert "\n".join(line.rstrip() for line in screen.getvalue().splitlines()) + "\n" == SCREEN
    assert not status.show(Console(file=screen, width=80), CHECKS[1:], FIGURES)


def test_the_command_exits_with_1_when_something_fails(database: Database) -> None:
    with committed(database) as ledger:
        ledger.change("update credits.jobs set next_run_at = credits.now()")
    with database.connect() as conn:
        assert status.show(Console(file=io.StringIO()), db.call(conn, "health"), db.call(conn, "metrics")) is False
    with committed(database) as ledger:
        ledger.open("alpha", 5)
        ledger.change("update credits.balances set balance = 6")
        ledger.run_audit()
    command = [sys.executable, "-m", "pgcredits", "status", "--dsn", database.dsn]
    env = {**os.environ, "COLUMNS": "100", "NO_COLOR": "1"}
    ill = subprocess.run(command, capture_output=True, text=True, env=env, check=False, timeout=60)
    assert (ill.returncode, ill.stderr) == (1, "")
    assert re.match(r"pgcredits: \d\d ok, 0 to look at, 1 failing\n\nFAIL  audit_is_clean ", ill.stdout)
    assert "To do: pgcredits audit" in ill.stdout
