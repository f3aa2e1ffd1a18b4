"""What the service `migrate` of docker-compose.yml does at each start: the schema, the logins, the jobs.

Everything may be done again. PGCREDITS_DSN is the owner of the database, PGCREDITS_CRON_DSN its way to pg_cron.
"""

import os
import subprocess
import sys
from pathlib import Path

import psycopg
from psycopg import Connection, sql
from psycopg.rows import TupleRow

from pgcredits import migrate

HASURA = Path(__file__).with_name("credits_hasura.sql")


def main() -> None:
    """Prepare the database for the other services, whose logins may do no more than they need."""
    dsn = os.environ["PGCREDITS_DSN"]
    migrate.migrate(dsn)
    with psycopg.connect(dsn, autocommit=True) as conn:
        set_password(conn, "credits_forwarder", os.environ["PGCREDITS_FORWARDER_PASSWORD"])
        if password := os.environ.get("PGCREDITS_HASURA_PASSWORD"):
            let_hasura_in(conn, "hasura", password)
    subprocess.run([sys.executable, "-m", "pgcredits", "jobs", "schedule"], check=True)
    print("The database is prepared.", flush=True)


def set_password(conn: Connection[TupleRow], login: str, password: str) -> None:
    """Without its clear text in any log of the server."""
    hashed = conn.pgconn.encrypt_password(password.encode(), login.encode(), b"scram-sha-256")
    conn.execute(sql.SQL("alter role {} login password {}").format(sql.Identifier(login), sql.Literal(hashed.decode())))


def let_hasura_in(conn: Connection[TupleRow], login: str, password: str) -> None:
    """Hasura's functions, its login, and the schema in which it keeps its own books."""
    conn.execute(HASURA.read_bytes())
    role = sql.Identifier(login)
    if not conn.execute("select 1 from pg_catalog.pg_roles r where r.rolname = %s", [login]).fetchone():
        conn.execute(sql.SQL("create role {} login").format(role))
    set_password(conn, login, password)
    conn.execute("select credits_hasura._enable_login(%s)", [login])
    conn.execute(sql.SQL("grant {} to current_user").format(role))
    conn.execute(sql.SQL("create schema if not exists hdb_catalog authorization {}").format(role))
    conn.execute("create extension if not exists pgcrypto")


if __name__ == "__main__":
    main()
