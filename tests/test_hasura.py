"""Hasura: its functions as its login calls them, and the check that its metadata fits the database."""

import json
import runpy
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest
from api_support import ISSUER, furnish
from ledger_support import committed
from psycopg import Connection, sql
from psycopg.conninfo import make_conninfo
from psycopg.rows import namedtuple_row
from servers import ONE_ENGINE, Database, Engine

from pgcredits import migrate

FOLDER = Path(__file__).resolve().parents[1] / "deploy/hasura"
SCRIPT = (FOLDER / "credits_hasura.sql").read_text()
CHECKER = runpy.run_path(str(FOLDER / "check.py"))
check: Callable[..., list[str]] = CHECKER["check"]
LOGIN = "hasura_of_the_tests"
USER = {"x-hasura-role": "user", "x-hasura-issuer": ISSUER, "x-hasura-user-id": "user-alpha"}
ORG = {**USER, "x-hasura-role": "org", "x-hasura-user-id": "user-of-acme", "x-hasura-org-id": "acme"}


@pytest.fixture(scope="module")
def hasura(server: Engine) -> Iterator[Database]:
    """A database with Hasura's functions, installed by its owner, and somebody to call them for."""
    with server.database() as database:
        with psycopg.connect(server.server.admin_dsn, autocommit=True) as admin:
            admin.execute("select pg_advisory_lock(1)")  # the role is the cluster's, and other workers make it, too
            if not admin.execute("select 1 from pg_roles where rolname = %s", [LOGIN]).fetchone():
                admin.execute(f"create role {LOGIN} login password 'of-the-tests'".encode())
        install(database)
        with psycopg.connect(database.dsn) as conn:
            conn.execute("select credits_hasura._enable_login(%s)", [LOGIN])
        with committed(database) as ledger:
            furnish(ledger)
            ledger.open_account("acme")
            ledger.grant(7, "acme")
            ledger.link_identity("acme", ISSUER, "acme", kind="org")
        yield database


def install(database: Database) -> None:
    with psycopg.connect(database.dsn, autocommit=True) as conn:
        conn.execute(SCRIPT.encode())


def login(database: Database) -> str:
    return make_conninfo(database.dsn, user=LOGIN, password="of-the-tests")


@pytest.fixture
def conn(hasura: Database) -> Iterator[Connection[Any]]:
    with psycopg.connect(login(hasura), row_factory=namedtuple_row) as conn:
        yield conn
        conn.rollback()


def call(conn: Connection[Any], function: str, session: Any = USER, **arguments: Any) -> list[Any]:
    """A call as Hasura makes it: the session as json, and the row filter of the role on what comes back."""
    given = {"hasura_session": json.dumps(session), **arguments}
    named = [sql.SQL("{} => {}").format(sql.Identifier(name), sql.Placeholder(name)) for name in given]
    query = sql.SQL("select * from credits_hasura.{}({})").format(sql.Identifier(function), sql.SQL(", ").join(named))
    with conn.transaction():
        return conn.execute(query, given).fetchall()


def refusal(conn: Connection[Any], function: str, session: Any = USER, **arguments: Any) -> tuple[str, str]:
    """The SQLSTATE and the code of an error in the form that Hasura shows."""
    with pytest.raises(psycopg.Error) as caught:
        call(conn, function, session, **arguments)
    code, _, detail = str(caught.value.diag.message_primary).partition(" ")
    json.loads(detail)
    return str(caught.value.sqlstate), code


def test_a_session_sees_its_account(conn: Connection[Any]) -> None:
    (balance,) = call(conn, "get_balance")
    assert (balance.account_id, balance.available, balance.held) == ("alpha", 1089, 10)
    assert (balance.issuer, balance.user_id, balance.org_id) == (ISSUER, "user-alpha", None)
    movements = call(conn, "history", max_rows=2)
    assert [(row.account_id, row.entry_seq) for row in movements] == [("alpha", 3), ("alpha", 2)]
    assert [row.code for row in call(conn, "list_packages")] == ["starter"]
    assert [row.code for row in call(conn, "list_plans")] == ["team"]
    bought = call(conn, "list_purchases", status="completed")
    assert [(row.account_id, row.package) for row in bought] == [("alpha", "starter")]
    assert [row.account_id for row in call(conn, "get_subscription_state")] == ["alpha"]
    assert [row.maximum for row in call(conn, "get_limits", member_id="m1")] == [9, 50]
    assert call(conn, "get_usage", group_by="subject")
    assert call(conn, "quote", capability="chapter", units=95)[0].amount == 10
    assert call(conn, "check_access", capability="chapter", units=95)[0].allowed
    asked = {"package": "starter", "success_url": "http://localhost", "key": "h1"}
    (session,) = call(conn, "create_checkout", **asked)
    assert session.state == "queued"
    assert call(conn, "get_checkout", key="h1")[0].request_id == session.request_id
    assert call(conn, "create_portal_session", return_url="http://localhost", key="p1")[0].state == "queued"
    assert call(conn, "get_portal_session", key="p1")[0].user_id == "user-alpha"


def test_an_organisation_is_kept_apart_from_its_members(conn: Connection[Any]) -> None:
    (balance,) = call(conn, "get_balance", ORG)
    assert (balance.account_id, balance.available, balance.org_id) == ("acme", 7, "acme")
    both = {**USER, "x-hasura-org-id": "acme"}
    assert [row.account_id for row in call(conn, "get_balance", both)] == ["acme"]
    assert refusal(conn, "get_balance", both, account_id="alpha") == ("22404", "account_not_found")
    assert refusal(conn, "get_balance", USER, account_id="acme") == ("22404", "account_not_found")
    assert [row.account_id for row in call(conn, "get_balance", {**USER, "x-hasura-org-id": ""})] == ["alpha"]
    buying = {"package": "starter", "success_url": "http://localhost", "key": "o1"}
    assert refusal(conn, "create_checkout", ORG, **buying) == ("22403", "forbidden")
    as_org = {**USER, "x-hasura-user-id": "acme"}
    assert refusal(conn, "get_balance", as_org) == ("22404", "account_not_found")


ARGUMENTS: dict[str, dict[str, Any]] = {
    "quote": {"capability": "chapter", "units": 1},
    "check_access": {"capability": "chapter", "units": 1},
    "create_checkout": {"package": "starter", "success_url": "http://localhost", "key": "x"},
    "get_checkout": {"key": "k1"},
    "create_portal_session": {"return_url": "http://localhost", "key": "x"},
    "get_portal_session": {"key": "x"},
}
STRANGERS: dict[str, Any] = {
    "no session": {},
    "no user": {"x-hasura-role": "user", "x-hasura-issuer": ISSUER},
    "an empty user": {**USER, "x-hasura-user-id": ""},
    "no issuer": {"x-hasura-user-id": "user-alpha"},
    "a foreign issuer": {**USER, "x-hasura-issuer": ISSUER + "/"},
    "anonymous": {**USER, "x-hasura-is-anonymous": "true"},
}


def tracked() -> dict[str, str]:
    """The functions of the metadata, and how each is exposed."""
    functions = CHECKER["load"](FOLDER / "metadata")["functions"]
    return {one["function"]["name"]: one["configuration"]["exposed_as"] for one in functions}


def test_who_is_nobody_learns_nothing(conn: Connection[Any]) -> None:
    for session in STRANGERS.values():
        for function in tracked():
            assert refusal(conn, function, session, **ARGUMENTS.get(function, {})) == ("22401", "not_authenticated")
    unlinked = {**USER, "x-hasura-user-id": "user-gamma"}
    for function in set(tracked()) - {"list_packages", "list_plans"}:
        given = ARGUMENTS.get(function, {})
        for account in ("beta", "nobody", "acme"):
            assert refusal(conn, function, USER, account_id=account, **given) == ("22404", "account_not_found")
        assert refusal(conn, function, unlinked, **given) == ("22404", "account_not_found")


def test_errors_have_the_form_that_hasura_shows(conn: Connection[Any], hasura: Database) -> None:
    with pytest.raises(psycopg.Error) as caught:
        call(conn, "history", max_rows=0)
    assert caught.value.sqlstate == "22400"
    assert str(caught.value.diag.message_primary).startswith('invalid_request {"argument": "max_rows"')
    with hasura.connect() as backend, pytest.raises(psycopg.Error) as plain:
        backend.execute("select * from credits.get_balance('nobody')")
    assert (plain.value.sqlstate, plain.value.diag.message_primary) == ("PT404", "account_not_found")


def test_nobody_but_the_login_gets_in(hasura: Database, conn: Connection[Any]) -> None:
    for role in ("credits_user", "credits_service"):
        with hasura.connect(role) as stranger, pytest.raises(psycopg.errors.InsufficientPrivilege):
            stranger.execute("select * from credits_hasura.get_balance('{}'::json)")
    for forbidden in (
        "select * from credits.accounts", "select * from credits_api.balances", "select credits._my_balance(null)",
        "select credits_hasura._enter('{}'::json)", "insert into credits_hasura.balances default values",
        "select credits_hasura._enable_login('x')", "set role credits_user",
    ):  # fmt: skip
        with pytest.raises(psycopg.errors.InsufficientPrivilege), conn.transaction():
            conn.execute(forbidden.encode())
    with hasura.admin() as admin:
        rows = admin.execute(
            """
            select p.proname from pg_proc p where p.pronamespace = 'credits_hasura'::regnamespace
               and (has_function_privilege('public', p.oid, 'execute') or p.proowner <> 'credits_owner'::regrole
                    or p.prosecdef is distinct from (p.proname !~ '^_')
                    or p.prosecdef and not 'search_path=pg_catalog, pg_temp' = any (p.proconfig))
            """
        ).fetchall()
        assert rows == []
        with pytest.raises(psycopg.errors.CheckViolation):
            admin.execute("insert into credits_hasura.balances default values")
    with psycopg.connect(hasura.dsn) as owner:
        for refused in ("postgres", "credits_user", "nobody"):
            with pytest.raises(psycopg.Error, match="invalid_request"), owner.transaction():
                owner.execute("select credits_hasura._enable_login(%s)", [refused])


def test_it_outlives_deploys_and_can_be_installed_again(hasura: Database, conn: Connection[Any]) -> None:
    migrate.migrate(hasura.dsn)
    assert call(conn, "get_balance")[0].account_id == "alpha"
    conn.rollback()
    before = hasura.dump()
    install(hasura)
    assert hasura.dump() == before
    assert check(login(hasura)) == []


@pytest.mark.parametrize("server", ["pg15"], indirect=True)
def test_a_rollback_takes_it_away_and_it_can_come_back(server: Engine) -> None:
    with server.database() as database:
        install(database)
        migrate.rollback(database.dsn, steps=1)
        with database.admin() as admin:
            assert admin.execute("select to_regnamespace('credits_hasura')").fetchone() == (None,)
        migrate.migrate(database.dsn)
        install(database)


def test_the_metadata_fits_and_tracks_every_function(hasura: Database) -> None:
    with hasura.admin() as admin:
        rows = admin.execute(
            "select proname, provolatile from pg_proc"
            " where pronamespace = 'credits_hasura'::regnamespace and proname !~ '^_'"
        ).fetchall()
    assert tracked() == {name: "mutation" if volatility == "v" else "query" for name, volatility in rows}
    ran = subprocess.run(
        [sys.executable, FOLDER / "check.py", "--dsn", login(hasura)], capture_output=True, text=True, check=False
    )
    assert (ran.returncode, ran.stdout) == (0, "Hasura's metadata fits the database.\n")


SABOTAGE = [
    ("version.yaml", "3", "2", "the version is not 3"),
    ("databases/default/tables/tables.yaml", "hasura_quotes", "hasura_qoutes", "No such file"),
    ("tables/credits_hasura_balances.yaml", "- available\n", "- availible\n", "no column availible"),
    ("tables/credits_hasura_balances.yaml", "name: balances", "name: balancse", "no such relation"),
    ("tables/credits_hasura_balances.yaml", "- user_id:", "- user_idd:", "names no column: user_idd"),
    ("tables/credits_hasura_balances.yaml", "_and:", "_or:", "does not demand"),
    ("tables/credits_hasura_balances.yaml", "_eq: X-Hasura-Issuer", "_is_null: false", "does not demand"),
    ("tables/credits_hasura_balances.yaml", "_eq: X-Hasura-User-Id", "_eq: user-1", "does not demand"),
    ("tables/credits_hasura_balances.yaml", "filter:\n", "filter: {}\n      other:\n", "does not demand"),
    ("tables/credits_hasura_balances.yaml", "limit: 1000", "offset: 1", "no limit"),
    ("tables/credits_hasura_balances.yaml", "allow_aggregations: false", "allow_aggregations: true", "aggregations"),
    ("tables/credits_hasura_balances.yaml", "query_root_fields: []", "x: []", "query_root_fields"),
    ("tables/credits_hasura_balances.yaml", "columns:\n", "columns: '*'\n      other:\n", "one by one"),
    ("tables/credits_hasura_balances.yaml", "select_permissions:", "insert_permissions:", "has insert_permissions"),
    ("tables/credits_hasura_balances.yaml", "role: org", "role: team", "org may not select"),
    ("functions/credits_hasura_get_balance.yaml", "name: get_balance", "name: get_balanec", "0 functions"),
    ("functions/credits_hasura_get_balance.yaml", "exposed_as: query", "exposed_as: mutation", "is not query"),
    ("functions/credits_hasura_create_checkout.yaml", "exposed_as: mutation", "exposed_as: query", "not mutation"),
    ("functions/credits_hasura_get_balance.yaml", "session_argument: hasura_session", "x: y", "session_argument"),
    ("functions/credits_hasura_get_balance.yaml", "nt: hasura_session", "nt: account_id", "session_argument"),
    ("functions/credits_hasura_get_balance.yaml", "permissions:", "allowed:", "no role may call"),
    ("tables/tables.yaml", '- "!include credits_hasura_balances.yaml"\n', "", "is not tracked"),
]


@ONE_ENGINE
def test_what_is_wrong_with_the_metadata_is_told(hasura: Database, tmp_path: Path) -> None:
    for number, (file, old, new, problem) in enumerate(SABOTAGE):
        folder = tmp_path / str(number)
        shutil.copytree(FOLDER / "metadata", folder)
        (path,) = (one for one in folder.rglob("*.yaml") if one.as_posix().endswith("/" + file))
        text = path.read_text()
        assert old in text, file
        path.write_text(text.replace(old, new))
        assert any(problem in line for line in check(login(hasura), folder)), (file, new)


@ONE_ENGINE
def test_what_is_wrong_with_the_database_is_told(server: Engine, hasura: Database) -> None:
    with server.database() as database:
        install(database)
        assert any("EXECUTE is not granted" in line for line in check(login(database)))
        with psycopg.connect(database.dsn) as owner:
            owner.execute("select credits_hasura._enable_login(%s)", [LOGIN])
        assert check(login(database)) == []
        for statement, problem in {
            f"revoke execute on function credits_hasura.quote from {LOGIN}": "quote(): EXECUTE is not granted",
            "grant execute on function credits_hasura.quote to public": "everybody may execute it",
            f"revoke select on credits_hasura.quotes from {LOGIN}": "SELECT is not granted",
            f"grant insert on credits_hasura.quotes to {LOGIN}": "may write into it",
            f"grant usage on schema credits to {LOGIN}": "the login: reaches credits",
            "alter table credits_hasura.quotes drop column model": "no column model",
            "create function credits_hasura.quote(x int) returns int language sql as 'select 1'": "2 functions",
        }.items():
            with database.admin() as admin:
                admin.execute(statement.encode())
            assert any(problem in line for line in check(login(database))), statement
        assert any("no right and no policy binds it" in line for line in check(database.admin_dsn))
