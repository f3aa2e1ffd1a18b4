"""The forwarder: functions and views over HTTP, in PostgREST's dialect, in the role of the caller's token.

Each call is one transaction, read only unless a function that writes is called by POST. Nothing of it outlives the
transaction, so poolers in transaction mode are fine. Arguments go to PostgreSQL as the text that came; rights are the
database's to refuse.
"""

import asyncio
import json
import logging
import re
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import psycopg
from psycopg import AsyncConnection, sql
from psycopg_pool import PoolTimeout
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

from pgcredits.answers import Refused, not_now, read
from pgcredits.auth import Caller, Verifier
from pgcredits.db import Database, Row
from pgcredits.dialect import NAME, OBJECT, SCALAR, Part, Reading, keys, out_of_range, reading
from pgcredits.settings import Settings
from pgcredits.worker import Worker

SCHEMAS = ("credits_api", "credits")  # the first is meant where none is named
OURS = 500  # errors from here on are for our log, too
METHODS = ["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"]
READING = 10.0  # seconds that a look at the functions may take
STALE = 3.0  # seconds after which a function that is not known is looked for again,
OLD = 60.0  # and those that are known
GRACE = 2.0  # seconds that the database may take beside its statement
PAUSES = (0.1, 0.2, 0.4, 0.8, *(1.6,) * 40)  # seconds between looks at a request that somebody else sends
REQUEST_HEADERS = (
    "authorization apikey content-type accept-profile content-profile prefer range x-client-info x-retry-count"
)
HTTP = (  # by SQLSTATE, the first that fits
    ("23503|23505", 409), ("25006", 405), ("42501", 403), ("42883|42P01", 404), ("57P01", 503), ("P0001", 400),
    ("53400|21000|42P17", 500), ("08...|53...", 503), ("(0L|0P|28)...", 403),
    ("(09|25|2D|38|39|3B|40|54|55|57|58|F0|HV|P0|XX)...", 500),
)  # fmt: skip

PREPARE = """
select set_config('search_path', %s, true), set_config('statement_timeout', %s, true), set_config('role', %s, true),
       set_config('request.jwt.claims', %s, true), set_config('transaction_read_only', %s, true)
"""
FUNCTIONS = """
select p.proname as name, p.provolatile = 'v' as writes, p.proretset as is_set,
       t.typtype <> 'c' and t.oid <> 'pg_catalog.record'::regtype as is_scalar,
       t.oid = 'pg_catalog.void'::regtype as is_void,
       p.pronargs - p.pronargdefaults as required,
       array(select coalesce(p.proargnames[a.n], '')
               from generate_series(1, coalesce(array_length(p.proallargtypes, 1), p.pronargs)) a (n)
              where coalesce(p.proargmodes[a.n], 'i') in ('i', 'b') order by a.n) as names,
       array(select format_type(a.type, null)
               from unnest(p.proargtypes::oid[]) with ordinality a (type, n) order by a.n) as types
  from pg_catalog.pg_proc p
  join pg_catalog.pg_type t on t.oid = p.prorettype
  join pg_catalog.pg_namespace n on n.oid = p.pronamespace
 where n.nspname = %s and p.prokind = 'f' and t.typname <> 'trigger' and p.provariadic = 0
"""

log = logging.getLogger("pgcredits.rpc")


def routes(settings: Settings) -> list[BaseRoute]:
    """The routes. That of the views takes every path of one word, so it comes last."""
    cors = Middleware(
        CORSMiddleware,
        allow_origins=settings.cors_origins,
        allow_methods=["GET", "HEAD", "POST"],
        allow_headers=REQUEST_HEADERS.split(),
        expose_headers=["Content-Range", "Content-Profile", "Preference-Applied", "Proxy-Status"],
        max_age=86400,
    )
    middleware = [cors] if settings.cors_origins else []
    return [
        Route("/rpc/{function}", call, methods=METHODS, middleware=middleware),
        Route("/{view}", view, methods=["GET", "HEAD", "OPTIONS"], middleware=middleware),
    ]


@dataclass(frozen=True)
class Function:
    """How a function is called."""

    schema: str
    name: str
    arguments: dict[str, str]  # names and types
    required: int  # how many of them
    writes: bool
    is_set: bool
    is_scalar: bool
    is_void: bool

    def takes(self, names: set[str]) -> bool:
        """Whether it can be called with these arguments and no others."""
        return names <= self.arguments.keys() and names >= set(list(self.arguments)[: self.required])

    def source(self, body: str, names: Iterable[str]) -> Part:
        """It as a query over a JSON text with these keys."""
        given = [sql.Identifier(name) for name in dict.fromkeys(names)]
        called = sql.SQL("{}({}) f").format(
            sql.Identifier(self.schema, self.name),
            sql.SQL(", ").join(sql.SQL("{} := a.{}").format(name, name) for name in given),
        )
        if self.is_scalar:
            called += sql.SQL("({})").format(sql.Identifier(SCALAR))
        if not given:
            return sql.SQL("select f.* from {}").format(called), []
        types = (sql.SQL(self.arguments[name]) for name in dict.fromkeys(names))
        typed = sql.SQL(", ").join(name + sql.SQL(" ") + type_ for name, type_ in zip(given, types, strict=True))
        return sql.SQL("select f.* from json_to_record(%s::json) a ({}), lateral {}").format(typed, called), [body]


class Catalog:
    """The functions of our schemas, as the database has them. Read anew when one is asked for that is not known."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._functions: dict[str, dict[str, list[Function]]] = {}
        self._read_at: dict[str, float] = {}
        self._doubted: set[str] = set()
        self._readings: dict[str, asyncio.Task[None]] = {}

    async def find(self, schema: str, name: str, given: set[str]) -> Function:
        """The function that takes these arguments. Raises Refused."""
        found = self._matching(schema, name, given)
        if (len(found) != 1 or schema in self._doubted or self._age(schema) >= OLD) and self._age(schema) >= STALE:
            await self._read_together(schema)
            found = self._matching(schema, name, given)
        if len(found) == 1:
            return found[0]
        asked = f"{schema}.{name}" + (f"({', '.join(sorted(given))})" if given else " without parameters")
        if found:
            raise Refused(300, f"Could not choose the best candidate function for {asked}", None, code="PGRST203")
        raise Refused(404, f"Could not find the function {asked} in the schema cache"[:500], None, code="PGRST202")

    def doubt(self, schema: str) -> None:
        """What is known may be wrong: it serves until it may be read anew."""
        self._doubted.add(schema)

    def _matching(self, schema: str, name: str, given: set[str]) -> list[Function]:
        return [one for one in self._functions.get(schema, {}).get(name, []) if one.takes(given)]

    def _age(self, schema: str) -> float:
        return time.monotonic() - self._read_at.get(schema, -OLD)

    async def _read_together(self, schema: str) -> None:
        # Who waits shares its failure, too: one after the other, each would wait anew for a database that is gone.
        if not (reading := self._readings.get(schema)):
            reading = self._readings[schema] = asyncio.create_task(self._read(schema))
            reading.add_done_callback(lambda _: self._readings.pop(schema))
        await asyncio.shield(reading)

    async def _read(self, schema: str) -> None:
        functions: dict[str, list[Function]] = defaultdict(list)
        async with asyncio.timeout(READING), self._database.transaction() as conn:
            await conn.execute("select set_config('search_path', '', true)")  # then every type of ours has its schema
            for row in await (await conn.execute(FUNCTIONS, [schema])).fetchall():
                names, types = row.pop("names"), row.pop("types")
                if all(names):
                    arguments = dict(zip(names, types, strict=True))
                    functions[row["name"]].append(Function(schema=schema, arguments=arguments, **row))
        self._functions[schema], self._read_at[schema] = dict(functions), time.monotonic()
        self._doubted.discard(schema)


@dataclass(frozen=True)
class Forwarder:
    """What answers calls. One for each process."""

    database: Database
    settings: Settings
    verifier: Verifier
    catalog: Catalog

    async def function(self, request: Request) -> Response:
        """A call of a function."""
        if request.method not in {"GET", "HEAD", "POST"}:
            raise Refused(405, f"Cannot use the {request.method} method on RPC", None, code="PGRST101")
        caller, schema = await self.verifier.caller(request), profile(request)
        posted = request.method == "POST"
        asked = reading(request, self.settings.max_rows, arguments=not posted)
        body = await arguments(request, self.settings) if posted else json.dumps(asked.arguments)
        names = keys(body)
        async with translated():
            function = await self.catalog.find(schema, request.path_params["function"], set(names))
            row = await self._call(function, body, names, asked, caller, writes=posted and function.writes)
            if row["awaits"] and posted and function.writes:
                row = await self._awaited(row, schema, asked, caller, request.app.state.worker)
        return answer(request, asked, row, one=not function.is_set, void=function.is_void)

    async def view(self, request: Request) -> Response:
        """The rows of a view."""
        caller, schema = await self.verifier.caller(request), profile(request)
        asked = reading(request, self.settings.max_rows)
        name = request.path_params["view"]
        missing = f"Could not find the table '{schema}.{name[:63]}' in the schema cache"
        if not NAME.fullmatch(name):
            raise Refused(404, missing, None, code="PGRST205")
        source = sql.SQL("select * from {}").format(sql.Identifier(schema, name))
        async with translated(missing):
            query = asked.query((source, []), scalar=False, counted=asked.count is not None)
            row = await self._run(schema, query, asked, caller, writes=False)
        return answer(request, asked, row, one=False, void=False)

    async def ready(self) -> None:
        """Refused where the door's login may not take on a role that a token can give. Raises as Database.call does."""
        for role in self.verifier.roles:
            async with self.database.transaction(role="") as conn:
                await prepare(conn, [SCHEMAS[0], f"{self.settings.statement_timeout}s", role, "", "on"])

    async def _call(
        self, function: Function, body: str, names: list[str], asked: Reading, caller: Caller, *, writes: bool
    ) -> Row:
        source = function.source(body, names)
        query = asked.query(source, scalar=function.is_scalar, void=function.is_void, counted=True)
        try:
            return await self._run(function.schema, query, asked, caller, writes=writes)
        except psycopg.errors.UndefinedFunction:
            self.catalog.doubt(function.schema)  # perhaps a deploy has changed it
            raise

    async def _run(self, schema: str, query: Part, asked: Reading, caller: Caller, *, writes: bool) -> Row:
        seconds = self.settings.statement_timeout
        prepared = [schema, f"{seconds}s", caller.role, caller.claims, "off" if writes else "on"]
        async with asyncio.timeout(self.settings.pool_timeout + seconds + GRACE):
            async with self.database.transaction(role="") as conn:
                await prepare(conn, prepared)
                row = await (await conn.execute(*query)).fetchone()
                assert row  # noqa: S101 - an aggregate without groups
                check(row, asked)  # what it refuses has not happened
            return row

    async def _awaited(self, row: Row, schema: str, asked: Reading, caller: Caller, worker: Worker | None) -> Row:
        """The answer once Stripe has answered, if SQL says what to wait for, and it comes in time; or the first one."""
        ends = time.monotonic() + self.settings.stripe_wait
        pauses = iter(PAUSES)
        latest = row
        while worker and latest["awaits"] and (left := ends - time.monotonic()) > 0:
            told = json.loads(latest["awaits"])
            try:
                if not await worker.execute(told["request_id"], left):
                    await asyncio.sleep(min(next(pauses), left))
                names = list(told["arguments"])
                function = await self.catalog.find(schema, told["function"], set(names))
                latest = await self._call(function, json.dumps(told["arguments"]), names, asked, caller, writes=False)
            except (Refused, psycopg.Error, PoolTimeout, OSError, TimeoutError) as error:
                log.warning("request %s: not waited for: %s: %s", told["request_id"], type(error).__name__, error)
                return row
        return row if latest["awaits"] else {**latest, "status": row["status"], "headers": row["headers"]}


async def call(request: Request) -> Response:
    """`/rpc/{function}`."""
    if request.method == "OPTIONS":
        return Response(headers={"Allow": "OPTIONS,GET,HEAD,POST"})
    forwarder: Forwarder = request.app.state.forwarder
    return await forwarder.function(request)


async def view(request: Request) -> Response:
    """`/{view}`."""
    if request.method == "OPTIONS":
        return Response(headers={"Allow": "OPTIONS,GET,HEAD"})
    forwarder: Forwarder = request.app.state.forwarder
    return await forwarder.view(request)


async def prepare(conn: AsyncConnection[Any], settings: list[str]) -> None:
    """Set the transaction's schema, timeout, role, claims, and whether it reads only. A failure here is our own."""
    try:
        await conn.execute(PREPARE, settings)
    except (psycopg.errors.InsufficientPrivilege, psycopg.errors.InvalidParameterValue) as error:
        log.error("cannot act for callers: %s", error)  # noqa: TRY400 - one line for each request, not a page
        hint = "The door's login may not take on the roles of callers; let it be credits_forwarder: docs/operations.md"
        raise not_now("not_ready", hint) from error
    except psycopg.errors.ActiveSqlTransaction as error:  # PostgreSQL's way to say that it takes no writes
        log.error("the server takes no writes: %s", error)  # noqa: TRY400 - as above
        hint = "The server takes no writes now: it is a standby, or was set read-only. Try again, with the same key."
        raise not_now("not_ready", hint) from error


def profile(request: Request) -> str:
    """The schema that is meant. Raises Refused."""
    named = request.headers.get("content-profile" if request.method == "POST" else "accept-profile", SCHEMAS[0])
    if named not in SCHEMAS:
        hint = f"Only the following schemas are exposed: {', '.join(SCHEMAS)}"
        raise Refused(406, f"Invalid schema: {named[:63]}", hint, code="PGRST106")
    return named


async def arguments(request: Request, settings: Settings) -> str:
    """The body as text. Raises Refused."""
    kind = request.headers.get("content-type", "application/json").split(";")[0].strip().lower()
    if kind != "application/json":
        hint = "The body is JSON: send Content-Type: application/json."
        raise Refused(400, f"Content-Type not acceptable: {kind[:100]}", hint, code="PGRST102")
    try:
        return (await read(request, settings)).decode() or "{}"
    except UnicodeDecodeError as error:
        raise Refused(400, "Empty or invalid json", "The body must be UTF-8.", code="PGRST102") from error


def check(row: Row, asked: Reading) -> None:
    """Refuses what cannot be shown as it was asked for."""
    if asked.singular and row["shown"] != 1:
        message = "Cannot coerce the result to a single JSON object"
        raise Refused(406, message, None, code="PGRST116", details=f"The result contains {row['shown']} rows")
    if asked.count and asked.offset > row["total"]:
        raise out_of_range(f"An offset of {asked.offset} was requested, but there are only {row['total']} rows.")


def answer(request: Request, asked: Reading, row: Row, *, one: bool, void: bool) -> Response:
    """The answer with what is shown of it."""
    shown, first, total = row["shown"], asked.offset, row["total"] if asked.count else None
    part = f"{first}-{first + shown - 1}" if shown else "*"
    headers = {"Content-Range": f"{part}/{'*' if total is None else total}"}
    if asked.count:
        headers["Preference-Applied"] = "count=exact"
    if "content-profile" in request.headers or "accept-profile" in request.headers:
        headers["Content-Profile"] = profile(request)
    status = 206 if total is not None and shown < total else 200
    body = row["body"]
    if one or asked.singular:
        body = body[1:-1].strip() if shown else "null"
    if void:
        status, body = 204, ""
    else:
        headers["Content-Type"] = f"{OBJECT if asked.singular else 'application/json'}; charset=utf-8"
    headers |= {name: str(value) for each in json.loads(row["headers"] or "[]") for name, value in each.items()}
    return Response(body, int(row["status"] or status), headers)


@asynccontextmanager
async def translated(missing: str = "") -> AsyncIterator[None]:
    """The database's errors become the answers that PostgREST gives. missing is what to say of a view that is none."""
    try:
        yield
    except PoolTimeout as error:
        hint = "No connection was free in time (PGCREDITS_POOL_TIMEOUT)."
        raise Refused(504, "Timed out acquiring connection from connection pool.", hint, code="PGRST003") from error
    except psycopg.Error as error:
        if error.sqlstate is None:
            log.error("the database does not answer: %s", error)  # noqa: TRY400 - one line for each request, not a page
            raise Refused(503, "Database connection error. Retrying the connection.", None, code="PGRST000") from error
        if missing and error.sqlstate == "42P01":
            raise Refused(404, missing, None, code="PGRST205") from error
        raise refusal(error.sqlstate, error.diag) from error
    except (OSError, TimeoutError) as error:
        log.error("the database does not answer: %s", error)  # noqa: TRY400 - as above
        raise Refused(503, "Database client error. Retrying the connection.", None, code="PGRST000") from error


def refusal(sqlstate: str, said: Any) -> Refused:
    """An error of PostgreSQL, or one that our functions raise."""
    if sqlstate.startswith("PT"):
        status = int(sqlstate[2:]) if re.fullmatch(r"PT[2-5]\d\d", sqlstate, re.ASCII) else 500
    else:
        status = next((status for pattern, status in HTTP if re.fullmatch(pattern, sqlstate)), 400)
    if status >= OURS:
        log.error("%s %s: %s", status, sqlstate, said.message_primary)
    return Refused(status, said.message_primary or "", said.message_hint, code=sqlstate, details=said.message_detail)
