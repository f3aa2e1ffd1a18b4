"""What the manual says is what the database does."""

import re
import runpy
from pathlib import Path
from typing import Any

import pytest
from client import Client
from psycopg import Connection

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()
STATEMENTS = re.findall(r"^(select .*;)\s+-- (.*)$", README, re.MULTILINE)


def test_the_statements_of_the_readme_answer_what_it_prints(client: Client, conn: Connection[Any]) -> None:
    client.open_account(account_id="user_1")
    assert len(STATEMENTS) >= 5
    for statement, expected in STATEMENTS:
        row = conn.execute(statement).fetchone()
        assert row
        assert " | ".join({True: "t", False: "f"}.get(value, str(value)) for value in row) == expected, statement


def test_the_reference_is_what_the_comments_say(owner: Connection[Any]) -> None:
    page = runpy.run_path(str(ROOT / "docs/reference.py"))["reference"](owner)
    assert page == (ROOT / "docs/reference.md").read_text(), "run: python docs/reference.py DSN > docs/reference.md"


def test_the_readme_names_every_error_that_the_functions_raise() -> None:
    sources = "".join(path.read_text() for path in (ROOT / "sql").glob("*.sql"))
    raised = set(re.findall(r"_fail\((\d{3}), '(\w+[a-z])'", sources))
    raised |= {("423", "account_frozen"), ("423", "account_closed")}  # put together from the status
    rows = re.findall(r"^\| `PT(\d{3})` \| (.*?) \|", README, re.MULTILINE)
    listed = {(status, code) for status, codes in rows for code in re.findall(r"`(\w+)`", codes)}
    assert listed == raised


def test_the_readme_names_every_verb(owner: Connection[Any]) -> None:
    granted = {
        name
        for (name,) in owner.execute(
            "select proname from pg_proc where pronamespace = 'credits'::regnamespace"
            " and has_function_privilege('credits_service', oid, 'execute')"
        )
    }
    assert granted - set(re.findall(r"`(\w+)\(", README)) == {"load_demo_catalog"}


def test_the_concepts_name_every_finding_of_the_audit() -> None:
    source = (ROOT / "sql/26_proof.sql").read_text()
    found = set(re.findall(r"^    select '(\w+)'", source, re.MULTILINE))
    section = (ROOT / "docs/concepts.md").read_text().split("## What audit() finds")[1]
    assert set(re.findall(r"`(\w+_\w+)`", section)) == found


@pytest.mark.parametrize("page", sorted(path.name for path in (ROOT / "docs").glob("*.md")))
def test_every_link_of_the_manual_leads_somewhere(page: str) -> None:
    text = (ROOT / "docs" / page).read_text()
    for target in re.findall(r"\]\(([^)#]+)", text):
        assert (ROOT / "docs" / target).exists(), target
