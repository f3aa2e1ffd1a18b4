"""Commands of the command line, run in the test's own process: each start of Python would cost a second."""

import sys
from unittest.mock import patch

import pytest
from servers import Database

from pgcredits import cli


def pgcredits(database: Database, capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    """Exit code, output and errors of a command."""
    with (
        patch.object(sys, "argv", ["pgcredits", *arguments, "--dsn", database.dsn]),
        pytest.raises(SystemExit) as ended,
    ):
        cli.main()
    out, err = capsys.readouterr()
    return int(ended.value.code or 0), out, err
