"""The rules of the house, as tests: what the catalogue shows, and what the files may hold."""

import re
from pathlib import Path
from typing import Any

import pytest
from pglast import ast, parse_sql
from psycopg import Connection
from servers import Database, missing

from pgcredits import migrate

SQL = migrate.code_files()
MIGRATIONS = migrate.migrations()


def violations(owner: Connection[Any]) -> list[tuple[str, str]]:
    return owner.execute("select finding, object from credits.house_rule_violations").fetchall()


def test_no_rule_is_broken(owner: Connection[Any]) -> None:
    assert violations(owner) == []


FUNCTION = "create function credits.f() returns int language sql"
PINNED = "set search_path = pg_catalog, pg_temp"
BREACHES = {
    "no pinned path": (f"{FUNCTION} security definer as 'select 1'", "search_path"),
    "another path": (f"{FUNCTION} security definer set search_path = '' as 'select 1'", "search_path"),
    "definer in the exposed schema": (
        f"create function credits_api.f() returns int language sql security definer {PINNED} as 'select 1'",
        "definer in the exposed schema",
    ),
    "everyone may call it": (f"{FUNCTION} as 'select 1'; grant execute on function credits.f to public", "everyone"),
    "granted without a comment": (
        f"{FUNCTION} {PINNED} as 'select 1'; grant execute on function credits.f to credits_service",
        "without a comment",
    ),
    "an internal function is granted": ("grant execute on function credits._fail to credits_service", "internal"),
    "a verb is granted to end users": ("grant execute on function credits.spend to credits_user", "of the backend"),
    "what is for end users is granted to the backend": (
        "grant execute on function credits._my_balance to credits_service",
        "internal",
    ),
    "what is for end users runs as they do": (
        "create function credits._my_f() returns int language sql as 'select 1'",
        "not run as the owner",
    ),
    "a body of the exposed schema looks names up": (
        "create function credits_api.f() returns int language sql as 'select 1'",
        "not bound",
    ),
    "a table that the backend may write": ("grant insert on credits.entries to credits_service", "may be written"),
    "a view that end users may write": ("grant update on credits_api.accounts to credits_user", "may be written"),
    "overloaded": (f"{FUNCTION} as 'select 1'; create function credits.f(a int) returns int return 1", "overloaded"),
    "a table without row level security": ("create table credits.t ()", "row level security"),
    "a table in the exposed schema": (
        "create table credits_api.t (); alter table credits_api.t enable row level security",
        "exposed schema",
    ),
    "a view that runs as its owner": ("create view credits_api.v as select 1 as one", "security_invoker"),
}  # fmt: skip


@pytest.mark.parametrize("breach", BREACHES)
def test_a_breach_is_seen(owner: Connection[Any], breach: str) -> None:
    statements, finding = BREACHES[breach]
    owner.execute(statements.encode())
    assert any(finding in found for found, _ in violations(owner)), violations(owner)


@pytest.mark.parametrize("role", ["credits_service", "credits_user"])
def test_a_view_that_is_granted_can_be_read(owner: Connection[Any], role: str) -> None:
    """A view calls functions with the rights of its reader."""
    views = owner.execute(
        "select c.oid::regclass::text from pg_class c"
        " where c.relkind = 'v' and has_table_privilege(%s, c.oid, 'select')"
        " and c.relnamespace in ('credits'::regnamespace, 'credits_api'::regnamespace)",
        [role],
    ).fetchall()
    owner.execute(f"set role {role}".encode())
    assert views
    for (view,) in views:
        owner.execute(f"select * from {view} limit 1".encode())


def test_every_granted_function_is_described(owner: Connection[Any]) -> None:
    granted = owner.execute(
        """
        select p.proname, coalesce(obj_description(p.oid, 'pg_proc'), ''), p.proconfig, p.prosqlbody is not null
          from pg_proc p
         where p.proname not like '\\_my\\_%'
           and p.pronamespace in ('credits'::regnamespace, 'credits_api'::regnamespace) and p.prokind = 'f'
           and (has_function_privilege('credits_service', p.oid, 'execute')
                or has_function_privilege('credits_user', p.oid, 'execute'))
        """
    ).fetchall()
    assert len(granted) > 20
    for name, comment, config, is_bound in granted:
        assert re.match(r"[A-Z].+\.(\n|$)", comment), f"{name}: the first line is a summary"
        assert config == (None if is_bound else ["search_path=pg_catalog, pg_temp"]), name


def rerunnable(statement: ast.Node | None) -> bool:
    """Whether a statement may stand in sql/, which every deploy runs again."""
    match statement:
        case ast.CreateFunctionStmt() | ast.ViewStmt() | ast.CreateTrigStmt() | ast.DefineStmt():
            return bool(statement.replace)
        case ast.InsertStmt():
            return statement.onConflictClause is not None
        case ast.DropStmt():
            return bool(statement.missing_ok)
        case ast.CommentStmt() | ast.GrantStmt() | ast.DeleteStmt() | ast.UpdateStmt() | ast.DoStmt():
            return True
    return False


@pytest.mark.parametrize("path", SQL, ids=lambda path: path.name)
def test_code_can_be_run_again(path: Path) -> None:
    for statement in parse_sql(path.read_text()):
        assert rerunnable(statement.stmt), f"{path.name}, at {statement.stmt_location}: {type(statement.stmt).__name__}"


@pytest.mark.parametrize(
    "statement",
    [
        "create function f() returns int return 1",
        "create view v as select 1",
        "create table if not exists t ()",
        "alter table t add column c int",
        "insert into t values (1)",
        "drop function f()",
        "create policy p on t",
        "commit",
        "select 1",
    ],
)
def test_what_may_not_stand_in_sql(statement: str) -> None:
    assert not rerunnable(parse_sql(statement)[0].stmt)


def test_names_of_files_give_their_order() -> None:
    assert all(re.fullmatch(r"\d\d_[a-z_]+\.sql", path.name) for path in SQL)
    numbers = [migration.name[:4] for migration in MIGRATIONS]
    assert numbers == [f"{number:04}" for number in range(1, len(numbers) + 1)]
    on_disk = {path.name for path in MIGRATIONS[0].path.parent.glob("*.sql")}
    assert on_disk == {path.name for m in MIGRATIONS for path in (m.path, m.rollback_path)}


@pytest.mark.parametrize("server", ["pg15"], indirect=True)  # the embedded server ships no extensions
def test_plpgsql_check_is_silent(database: Database) -> None:
    with database.admin() as admin:
        if not admin.execute("select 1 from pg_available_extensions where name = 'plpgsql_check'").fetchone():
            missing("plpgsql_check", "plpgsql_check is not installed on this server")
        admin.execute("create extension plpgsql_check")
        checked = """
            select p.oid::regprocedure::text, c.lineno, c.level, c.message
              from pg_proc p
              join pg_language l on l.oid = p.prolang and l.lanname = 'plpgsql'
              left join pg_trigger t on t.tgfoid = p.oid
              left join plpgsql_check_function_tb(p.oid, coalesce(t.tgrelid, 0), fatal_errors => false,
                          extra_warnings => true, security_warnings => true) c on true
             where p.pronamespace in ('credits'::regnamespace, 'credits_api'::regnamespace) and p.prokind in ('f', 'p')
        """
        rows = admin.execute(checked).fetchall()
        assert len(rows) > 20
        findings = [f"{name}, line {line}: {level}: {message}" for name, line, level, message in rows if message]
        assert not findings, "\n".join(findings)
        admin.execute(  # it looks, too
            "create function credits.f() returns int language plpgsql as $$ declare v int; begin return no_such; end $$"
        )
        assert any(row[3] is not None for row in admin.execute(checked).fetchall())


@pytest.mark.parametrize("path", SQL, ids=lambda path: path.name)
def test_no_text_depends_on_how_a_session_reads_backslashes(path: Path) -> None:
    r"""With standard_conforming_strings off, '\d' is the letter d; E'\\d' is the same in every session."""
    for number, line in enumerate(path.read_text().splitlines(), 1):
        plain = re.sub(r"\bE'(?:[^'\\]|''|\\.)*'|--.*", "", line)
        assert "\\" not in plain, f"{path.name}, line {number}"
