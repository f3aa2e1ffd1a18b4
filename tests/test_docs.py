"""What the manual says is what the database does."""

import itertools
import re
import runpy
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psycopg
import pytest
from client import Client
from product import as_shown
from psycopg import Connection
from servers import Database

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()
STRIPE = (ROOT / "docs/stripe.md").read_text()
SOURCES = {path.stem: path.read_text() for path in sorted((ROOT / "sql").glob("*.sql"))}
WITH_A_CARD = """{"id": "evt_0", "type": "customer.created", "created": 1893456000, "data": {"object": {
  "id": "cus_1", "object": "customer", "metadata": {"account_id": "user_1"},
  "invoice_settings": {"default_payment_method": "pm_1"}}}}"""
TABLES = runpy.run_path(str(ROOT / "docs/tables.py"))


@pytest.mark.parametrize(
    "page", ["README.md", "docs/subscriptions.md", "docs/access.md", "docs/auto-topup.md", "docs/exposure.md"]
)
def test_the_statements_of_the_manual_answer_what_it_prints(page: str, client: Client, conn: Connection[Any]) -> None:
    client.open_account(account_id="user_1")
    conn.execute("select credits.load_demo_catalog()")
    client.receive_stripe_event("default", WITH_A_CARD)
    statements = re.findall(r"^(select .*;)\s+-- (.*)$", (ROOT / page).read_text(), re.MULTILINE)
    assert len(statements) >= 5
    for statement, expected in statements:
        row = conn.execute(statement).fetchone()
        assert row
        shown = " | ".join(map(as_shown, row))
        assert shown == expected, statement


def test_the_reference_is_what_the_comments_say(owner: Connection[Any]) -> None:
    page = runpy.run_path(str(ROOT / "docs/reference.py"))["reference"](owner)
    assert page == (ROOT / "docs/reference.md").read_text(), "run: python docs/reference.py DSN > docs/reference.md"


def test_the_reference_has_each_comment_whole(owner: Connection[Any]) -> None:
    page = (ROOT / "docs/reference.md").read_text()
    comments = owner.execute(
        "select d.description from pg_description d"
        "  join pg_class c on c.oid = d.objoid and d.classoid = 'pg_class'::regclass"
        " where c.relnamespace = any (array['credits'::regnamespace, 'credits_api'::regnamespace]) and d.objsubid > 0"
        " and c.relkind in ('r', 'v')"
    ).fetchall()
    assert len(comments) > 100
    assert [comment for (comment,) in comments if comment not in page] == []


@pytest.mark.parametrize("page", TABLES["PAGES"])
def test_what_the_manual_shows_of_rows_is_what_they_are(page: str, owner: Connection[Any]) -> None:
    text = (ROOT / page).read_text()
    assert "<!-- rows: " in text
    assert TABLES["filled"](text, owner) == text, "run: python docs/tables.py DSN"


def test_all_that_can_be_shown_of_rows_is_shown() -> None:
    pages = "".join((ROOT / page).read_text() for page in TABLES["PAGES"])
    assert set(re.findall(r"<!-- rows: (\w+) -->", pages)) == set(TABLES["BLOCKS"])


def test_the_manual_names_the_events_to_select(owner: Connection[Any]) -> None:
    """All of them are handled, and of every family that is, some are selected."""
    rows = owner.execute("select event_type from credits.stripe_handlers where event_type !~ %s", [TABLES["UNASKED"]])
    handled = {event_type for (event_type,) in rows}
    block = STRIPE.split("Select these events")[1].split("```")[1]
    selected = block.split()
    assert len(set(selected)) == len(selected)
    assert set(selected) <= handled
    assert {name.rpartition(".")[0] for name in selected} == {name.rpartition(".")[0] for name in handled}


def test_the_manual_names_every_reason_to_park_or_ignore_an_event() -> None:
    sources = "".join(SOURCES.values())
    given = {("parked", reason) for reason in re.findall(r"_park\('(\w+)'", sources)}
    given |= {("ignored", reason) for reason in re.findall(r"(?:_ignored\(|\.reason\s+:= )'(\w+)'", sources)}
    rows = re.findall(r"^\| (`.*?) \| (parked|ignored) \|", STRIPE, re.MULTILINE)
    assert {(outcome, reason) for reasons, outcome in rows for reason in re.findall(r"`(\w+)`", reasons)} == given


def test_the_manual_names_every_purpose_of_a_request_to_stripe() -> None:
    section = STRIPE.split("## Requests to Stripe")[1].split("\n## ")[0]
    rows = re.findall(r"^\| (`\w+`.*?) \|", section, re.MULTILINE)[1:]
    purposes = {purpose for row in rows for purpose in re.findall(r"`(\w+)`", row)}
    asked = r"_request(?:_change)?\('(\w+)'"
    assert purposes == {purpose for text in SOURCES.values() for purpose in re.findall(asked, text)}


def test_the_manual_names_the_notification_of_every_effect() -> None:
    effect = r"function credits\.(\w+)\(.*\)\nreturns void .* credits\._tell_move\(.*'(\w+)'\)"
    told = dict(re.findall(effect, SOURCES["50_subscriptions"]))
    assert told
    page = (ROOT / "docs/subscriptions.md").read_text()
    assert dict(re.findall(r"^\| `(_\w+)` \| `(\w+)` \|$", page, re.MULTILINE)) == told


def test_the_map_of_sql_names_every_file() -> None:
    rows = re.findall(r"^\| (`.*?) \|", (ROOT / "sql/README.md").read_text(), re.MULTILINE)
    assert {name for row in rows for name in re.findall(r"`(\w+)`", row)} == set(SOURCES)


def test_the_readme_names_every_error_that_the_functions_raise() -> None:
    sources = "".join(SOURCES.values())
    raised = set(re.findall(r"_fail\((\d{3}), '(\w+[a-z])'", sources))
    raised |= set(re.findall(r"_refuse\(\w+, '\w+', (\d{3}), '(\w+[a-z])'", sources))
    raised |= {("429", "rate_limited"), ("429", "monthly_cap_reached")}  # chosen by the limit
    raised |= {("423", "account_frozen"), ("423", "account_closed")}  # put together from the status
    raised |= {("409", "cron_unavailable")}  # where pg_cron should be, without our functions
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
    source = "".join(text for name, text in SOURCES.items() if name.startswith(("26_", "27_", "28_")))
    found = set(re.findall(r"^ +select '(\w+)', ", source, re.MULTILINE))
    section = (ROOT / "docs/concepts.md").read_text().split("## What audit() finds")[1]
    assert set(re.findall(r"`(\w+_\w+)`", section)) == found


@pytest.mark.parametrize("page", sorted(str(path.relative_to(ROOT / "docs")) for path in ROOT.glob("docs/**/*.md")))
def test_every_link_of_the_manual_leads_somewhere(page: str) -> None:
    path = ROOT / "docs" / page
    for target in re.findall(r"\]\(([^)#]+)", path.read_text()):
        assert (path.parent / target).exists(), target


def test_what_the_examples_map_to_is_there(owner: Connection[Any]) -> None:
    """Functions are written with their brackets or as /rpc, in the column `here`; commands as `pgcredits x y`."""
    page = (ROOT / "docs/examples/README.md").read_text()
    here = "".join(re.findall(r"^\|.*\| (.*) \|$", page, re.MULTILINE))
    rows = owner.execute(
        "select pronamespace::regnamespace::text, proname from pg_proc where "
        "has_function_privilege(case pronamespace::regnamespace::text when 'credits' then 'credits_service' "
        "when 'credits_api' then 'credits_user' end, oid, 'execute')"
    ).fetchall()
    for schema, name in re.findall(r"(credits_api)?[.`/](\w+)\(", here):
        assert (schema or "credits", name) in rows, name
    for name in re.findall(r"/rpc/(\w+)", here):
        assert ("credits_api", name) in rows, name


QUESTIONS = (ROOT / "docs/questions.md").read_text()


def test_other_languages_say_what_the_database_understands(conn: Connection[Any]) -> None:
    said = re.findall(r"""['"](select available[^'"]*)['"]""", QUESTIONS)
    assert len(said) == 4
    for number, statement in enumerate(said):
        places = itertools.count(1)
        numbered = re.sub("%s", lambda _: f"${next(places)}", statement)  # noqa: B023 - used up within this turn
        conn.execute(f"prepare said_{number} as {numbered}".encode())
        row = conn.execute(f"explain (costs off) execute said_{number}('user_1', 5, 'key')".encode()).fetchone()
        assert row == ("Function Scan on spend",)


def test_the_clock_of_the_manual_can_be_turned(database: Database) -> None:
    replaced, turned = re.findall(r"```sql\n(.*?)```", QUESTIONS.split("## How do I test")[1], re.DOTALL)
    with psycopg.connect(database.dsn) as conn:
        conn.execute(replaced.encode())
        conn.execute(turned.encode())
        assert conn.execute("select credits.now()").fetchone() == (datetime(2030, 2, 1, tzinfo=UTC),)
        assert conn.execute("select count(*) from credits.house_rule_violations").fetchone() == (0,)
        conn.execute("reset tests.now")
        assert conn.execute("select credits.now() > now()").fetchone() == (True,)
