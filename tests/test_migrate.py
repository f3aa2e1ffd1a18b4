"""Deploying: all or nothing, twice, at once, back and forth."""

from typing import Any

from psycopg import Connection
from servers import Database

from pgcredits import migrate


def test_migrated_template_answers(conn: Connection[Any]) -> None:
    assert conn.execute("select current_user::text").fetchone() == ("credits_service",)


def test_twice_changes_nothing(database: Database) -> None:
    before = database.dump()
    assert migrate.migrate(database.dsn) == []
    assert database.dump() == before
