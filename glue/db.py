"""Calls of SQL functions by name, from a pool (async, for the door) or on one connection (the command line)."""

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from decimal import Decimal
from functools import partial
from typing import Any

import psycopg
from psycopg import AsyncConnection, Connection, sql
from psycopg.rows import DictRow, dict_row
from psycopg.types.json import Jsonb, set_json_loads
from psycopg_pool import AsyncConnectionPool, PoolTimeout

Row = dict[str, Any]
SCHEMA = "credits"


def statement(function: str, arguments: dict[str, Any]) -> tuple[sql.Composed, dict[str, Any]]:
    """`select * from credits.f(a => %(a)s, …)` and its parameters; dicts and lists of dicts travel as jsonb."""
    query = sql.SQL("select * from {}({})").format(
        sql.Identifier(SCHEMA, function),
        sql.SQL(", ").join(
            sql.SQL("{} => {}").format(sql.Identifier(name), sql.Placeholder(name)) for name in arguments
        ),
    )
    return query, {name: Jsonb(value) if _is_json(value) else value for name, value in arguments.items()}


def _is_json(value: object) -> bool:
    return isinstance(value, dict) or (isinstance(value, list) and any(isinstance(one, dict) for one in value))


def call(conn: Connection[Any], function: str, **arguments: Any) -> list[Row]:
    """Call credits.<function> with named arguments in the connection's transaction; returns its rows as dicts."""
    query, parameters = statement(function, arguments)
    with conn.cursor(row_factory=dict_row) as cursor:
        return cursor.execute(query, parameters).fetchall()


async def _exact(conn: AsyncConnection[Any]) -> None:
    set_json_loads(partial(json.loads, parse_float=Decimal), conn)  # a number in jsonb is exact, and stays so


class Database:
    """The door's pool. It opens without a database and comes back by itself when the database does."""

    def __init__(self, dsn: str, *, role: str = "", size: int = 10, wait: float = 5.0) -> None:
        self._role = role
        self._pool: AsyncConnectionPool[AsyncConnection[DictRow]] = AsyncConnectionPool(
            dsn,
            # Neither prepared statements nor session state: both break behind a pooler in transaction mode.
            kwargs={"row_factory": dict_row, "prepare_threshold": None, "connect_timeout": 5},
            min_size=0,
            max_size=size,
            timeout=wait,
            reconnect_timeout=wait,  # then the next request tries anew, not a back-off that has grown long
            check=AsyncConnectionPool.check_connection,
            configure=_exact,
            open=False,
        )

    async def open(self) -> None:
        """Start the pool's workers; needs no database."""
        await self._pool.open(wait=False)

    async def close(self) -> None:
        """Close every connection."""
        await self._pool.close()

    async def call(self, function: str, **arguments: Any) -> list[Row]:
        """Call credits.<function> in a transaction of its own; when this returns, it is committed.

        Raises psycopg.Error (its sqlstate PTnnn is ours) or psycopg_pool.PoolTimeout.
        """
        query, parameters = statement(function, arguments)
        async with self.transaction() as conn:
            cursor = await conn.execute(query, parameters)
            return await cursor.fetchall()

    async def ready(self) -> str | None:
        """None, or what keeps this process from doing its work. Raises as call does."""
        async with self.transaction() as conn:
            cursor = await conn.execute(
                "select has_schema_privilege(n.oid, 'usage') as allowed, case when has_schema_privilege(n.oid, 'usage')"
                " then to_regprocedure('credits.receive_stripe_event(text, text)') end as installed"
                " from pg_namespace n where n.nspname = 'credits'"
            )
            row = await cursor.fetchone()
        if row and not row["allowed"]:
            return "this login may not use the schema credits; see PGCREDITS_ROLE"
        return None if row and row["installed"] else "the schema is not there; run: pgcredits migrate"

    async def explain(self, error: Exception) -> str:
        """What an error of call means, in one line: what ready says of the schema, or else its own words."""
        if isinstance(error, psycopg.ProgrammingError):
            with suppress(psycopg.Error, PoolTimeout, OSError):
                if problem := await self.ready():
                    return problem
        return f"{type(error).__name__}: {' '.join(str(error).split())}"

    @asynccontextmanager
    async def transaction(self, role: str | None = None) -> AsyncIterator[AsyncConnection[DictRow]]:
        """A transaction, committed at the end unless there was an error; in our role or another ('': the login's)."""
        taken = self._role if role is None else role
        async with self._pool.connection() as conn:
            if taken:
                await conn.execute("select set_config('role', %s, true)", [taken])
            yield conn
