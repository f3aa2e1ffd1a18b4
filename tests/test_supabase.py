"""Supabase: installed by psql alone without superuser's rights, as docs/supabase.md says, used by its roles."""

import json
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psycopg
import pytest
from client import Client
from ledger_support import refused
from psycopg import Connection
from psycopg.conninfo import make_conninfo
from psycopg.rows import namedtuple_row
from servers import Database

from pgcredits import migrate
from pgcredits.client import ours

PAGE = (Path(__file__).resolve().parents[1] / "docs/supabase.md").read_text()
ISSUER = "https://PROJECT.supabase.co/auth/v1"
ALPHA, BETA = "11111111-1111-4111-8111-111111111111", "22222222-2222-4222-8222-222222222222"
ROLES = {
    "anon": "nologin noinherit",
    "authenticated": "nologin noinherit",
    "service_role": "nologin noinherit bypassrls",
    "authenticator": "login noinherit password 'authenticator'",
}


def prepare(database: Database) -> None:
    """The roles of Supabase, which belong to the cluster, and the table of its users."""
    with database.admin() as admin:
        for role, options in ROLES.items():
            try:
                admin.execute(f"create role {role} {options}".encode())
            except (psycopg.errors.DuplicateObject, psycopg.errors.UniqueViolation):
                continue
        with admin.transaction():
            admin.execute("select pg_advisory_xact_lock(1)")
            admin.execute("grant anon, authenticated, service_role to authenticator")
    with psycopg.connect(database.dsn) as conn:
        conn.execute("create schema auth; create table auth.users (id uuid primary key)")
        conn.execute("insert into auth.users values (%s)", [ALPHA])


@pytest.fixture(scope="module")
def supabase(server: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Database]:
    """A database set up by the page, statement by statement, as an owner without superuser's rights."""
    with server.database("template0") as database:
        prepare(database)
        file = tmp_path_factory.mktemp("supabase") / "pgcredits.sql"
        file.write_text("".join(migrate.script()))
        database.program("psql", "--no-psqlrc", "--quiet", "-f", str(file), "--dbname", database.dsn)
        with psycopg.connect(database.dsn) as conn:
            for block in re.findall(r"```sql\n(.*?)```", PAGE, re.DOTALL):
                conn.execute(block.encode())
            conn.execute("insert into auth.users values (%s)", [BETA])
        yield database


@contextmanager
def acting(database: Database, role: str, **claims: Any) -> Iterator[Connection[Any]]:
    """A request as Supabase makes it: the login authenticator becomes a role for one transaction."""
    with psycopg.connect(make_conninfo(database.dsn, user="authenticator", password="authenticator")) as conn:
        conn.row_factory = namedtuple_row
        token = {"iss": ISSUER, "aud": "authenticated", "role": role, "exp": time.time() + 600, "is_anonymous": False}
        conn.execute("select set_config('request.jwt.claims', %s, true)", [json.dumps({**token, **claims})])
        conn.execute(f"set local role {role}".encode())
        yield conn


def available(conn: Connection[Any]) -> list[Any]:
    return conn.execute("select account_id, available from credits_api.balances").fetchall()


def test_users_see_their_own(supabase: Database) -> None:
    with acting(supabase, "service_role") as service:
        client = Client(service)
        for number, account in enumerate((ALPHA, BETA), 1):
            client.grant_credits(account, 100 * number, key="welcome")
        client.spend(ALPHA, 5, key="first")
    with acting(supabase, "authenticated", sub=ALPHA) as conn:
        assert available(conn) == [(ALPHA, 95)]
        assert [row.amount for row in conn.execute("select * from credits_api.history()")] == [-5, 100]
        assert {row.account_id for row in conn.execute("select * from credits_api.history")} == {ALPHA}
        with refused(404, "account_not_found"):
            call(conn, "select * from credits_api.get_balance(%s)", BETA)
    with acting(supabase, "authenticated", sub=BETA) as conn:
        assert available(conn) == [(BETA, 200)]
    for claims in ({"sub": ALPHA, "is_anonymous": True}, {"sub": ALPHA, "aud": "anon"}, {"iss": "x", "sub": ALPHA}, {}):
        with acting(supabase, "authenticated", **claims) as conn:
            assert available(conn) == []


def call(conn: Connection[Any], query: str, *parameters: Any) -> list[Any]:
    """Rows, or our error."""
    with ours(), conn.transaction():
        return conn.execute(query.encode(), parameters).fetchall()


FORBIDDEN = [
    ("anon", "select * from credits_api.balances"),
    ("anon", "select * from credits_api.get_balance()"),
    ("anon", "select * from credits_api.packages"),
    ("authenticated", "select * from credits.accounts"),
    ("authenticated", "select * from credits.spend('x', 1, key => 'k')"),
    ("authenticated", "select * from credits._my_balance(null)"),
    ("authenticated", "select credits._enable_role('anon', 'service')"),
    ("authenticated", "delete from credits_api.history"),
    ("authenticated", "select public.open_credits()"),
    ("service_role", "select * from credits.entries"),
    ("service_role", "update credits.balances set balance = 1"),
    ("service_role", "select credits._post(null, null, null)"),
    ("service_role", "select credits._enable_role('anon', 'user')"),
    ("service_role", "select * from credits_api.balances"),
]


def test_what_a_role_may_not(supabase: Database) -> None:
    for role, statement in FORBIDDEN:
        with acting(supabase, role, sub=ALPHA) as conn, pytest.raises(psycopg.errors.InsufficientPrivilege):
            conn.execute(statement.encode())


RIGHTS = """
select x.what, a.privilege_type
  from (select n.nspname::text, n.nspacl from pg_namespace n
        union all select p.oid::regprocedure::text, p.proacl from pg_proc p
        union all select c.oid::regclass::text, c.relacl from pg_class c
        union all select t.attrelid::regclass || '.' || t.attname, t.attacl from pg_attribute t) x (what, acl),
       aclexplode(x.acl) a
 where a.grantee = %s::text::regrole and x.what ~ '^credits(_api)?(\\.|$)'
"""


def test_platform_roles_have_what_ours_have_after_every_deploy(supabase: Database) -> None:
    with psycopg.connect(supabase.dsn) as conn:

        def rights(role: str) -> set[tuple[str, str]]:
            return set(conn.execute(RIGHTS, [role]).fetchall())

        assert len(rights("credits_user")) > 60
        assert rights("authenticated") == rights("credits_user")
        assert rights("service_role") == rights("credits_service")
        assert rights("anon") == set()

        conn.execute(
            "grant select on credits.entries to authenticated; revoke all on credits_api.history from authenticated"
        )
        conn.commit()
        migrate.migrate(supabase.dsn)
        assert rights("authenticated") == rights("credits_user")

        for arguments in ("'credits_user', 'service'", "'service_role', 'user'", "'anon', 'owner'", "'anon', null"):
            with refused(400, "invalid_request"):
                call(conn, f"select credits._enable_role({arguments})")
        with refused(404, "role_not_found"):
            call(conn, "select credits._enable_role('public', 'user')")
        conn.execute("select credits._enable_role('anon', 'user')")
        assert rights("anon") == rights("credits_user")
        conn.execute("select credits._disable_role('anon'), credits._disable_role('nobody')")
        assert rights("anon") == set()

        with supabase.admin() as admin:
            admin.execute('create role "Short lived"')
            conn.execute("select credits._enable_role('Short lived', 'user')")
            conn.commit()
            admin.execute('drop owned by "Short lived"')
            admin.execute('drop role "Short lived"')
        conn.execute("select credits._disable_role('Short lived')")  # else whoever is called so next would have it all
        assert conn.execute("select role from credits.enabled_roles where role = 'Short lived'").fetchall() == []


def test_it_goes_away_and_comes_back(supabase: Database) -> None:
    """The last test of the module: it takes the last migration back."""
    with psycopg.connect(supabase.dsn) as conn:
        migrate.rollback(supabase.dsn)
        for role in ("authenticated", "credits_user"):
            assert {what for what, _ in conn.execute(RIGHTS, [role])} <= {"credits_api"}
        conn.commit()
        assert migrate.migrate(supabase.dsn)
        assert conn.execute(RIGHTS, ["credits_user"]).fetchall()
