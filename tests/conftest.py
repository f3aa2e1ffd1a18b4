"""Fixtures: both servers, a connection that is rolled back, databases of one's own, and a clock to turn."""

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

import psycopg
import pytest
from client import Client
from ledger_support import SETTABLE_CLOCK
from psycopg import Connection, sql
from psycopg.rows import tuple_row
from servers import ENGINES, Database, Engine, engine

RUN = "PGCREDITS_TEST_RUN"  # the folder of this run's servers; workers inherit it
MEMORY = Path("/dev/shm")
NEEDED = 4 << 30  # three servers, each with up to 1 GB of its log of changes, and their databases

# These wait more than they work. They come first, so that the other workers fill the time; at the end nobody would.
WAITING = {"test_compose", "test_embedded", "test_pg_cron"}
SLOW = {"test_ledger_model", "test_plans", "test_stripe_fixtures", "test_stripe_scenarios", "test_subscription_machine",
        "test_ways"}  # fmt: skip

TABLES_SIZE = "select sum(pg_relation_size(oid)) from pg_class where relnamespace = 'credits'::regnamespace"
MANY_DEAD = 4 << 20  # bytes
SUPERUSER = "postgres"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--fast", action="store_true", help="on PostgreSQL 18 alone, what runs in one transaction")


@pytest.hookimpl(trylast=True)  # pytest has by then brought together what runs on one server
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.path.stem not in WAITING)
    if config.getoption("fast"):
        fast = [item for item in items if is_fast(item)]
        config.hook.pytest_deselected(items=[item for item in items if item not in set(fast)])
        items[:] = fast


def is_fast(item: pytest.Item) -> bool:
    """Whether a test needs one connection to one server, and no random walk."""
    asked = set(getattr(item, "fixturenames", ()))
    return (
        asked.isdisjoint({"database", "empty_database"})
        and not asked.isdisjoint({"shared", "stage"})
        and "pg18" in item.name
        and item.path.stem not in SLOW
    )


def room() -> Path:
    """Where the servers live: in memory where there is room, since on a disk each test's database costs ten times that.

    A container has 64 MB there, and where nothing may be executed the copied programs of a server could not run.
    """
    if MEMORY.is_dir() and os.access(MEMORY, os.W_OK):
        there = os.statvfs(MEMORY)
        if there.f_bavail * there.f_frsize >= NEEDED and not there.f_flag & os.ST_NOEXEC:
            return MEMORY
    return Path("/tmp")


def pytest_configure(config: pytest.Config) -> None:
    if RUN not in os.environ:
        folder = room() / f"pgcredits-test-{os.getpid()}"
        folder.mkdir(mode=0o755)  # root's servers run as another user, who must get through
        os.environ[RUN] = str(folder)
        config.add_cleanup(lambda: shutil.rmtree(folder, ignore_errors=True))


@pytest.fixture(scope="session", params=ENGINES)
def server(request: pytest.FixtureRequest) -> Iterator[Engine]:
    """Every test that uses it, or what is built on it, runs on PostgreSQL 18 and on 15."""
    with engine(request.param, Path(os.environ[RUN])) as running:
        yield running


class Common:
    """A migrated database of tests that commit nothing, whose clock can be set: see Ledger.now.

    What they roll back stays in its tables as dead rows, which every later scan reads. Once these are many, a new
    database costs less: a tenth of a second.
    """

    def __init__(self, server: Engine) -> None:
        self._server = server
        self._made = ExitStack()
        self._idle: dict[str, Connection[Any]] = {}  # by role: a new one would read and compile every function anew
        self.database: Database = self._make()

    def _make(self) -> Database:
        made = self._made.enter_context(self._server.database())
        with made.connect("credits_owner", autocommit=True) as owner:
            owner.execute(SETTABLE_CLOCK)
        return made

    def close(self) -> None:
        """Drop it, and the connections to it."""
        for conn in self._idle.values():
            conn.close()
        self._idle.clear()
        self._made.close()

    @contextmanager
    def borrowed(self, role: str) -> Iterator[Connection[Any]]:
        """An idle connection, or a new one, in a transaction that is rolled back."""
        conn = self._idle.pop(role, None) or self._connect(role)
        conn.execute("select 1")  # or the first conn.transaction() of the test would be the outermost, and commit
        yield conn
        if not conn.closed:
            conn.rollback()
            conn.row_factory = tuple_row
            self._idle[role] = conn

    def _connect(self, role: str) -> Connection[Any]:
        return psycopg.connect(self.database.admin_dsn) if role == SUPERUSER else self.database.connect(role)

    def tidy(self) -> None:
        """Replace it if its tables have grown."""
        with self.borrowed("credits_service") as conn:
            (size,) = conn.execute(TABLES_SIZE).fetchone() or (0,)
        if size > MANY_DEAD:
            self.close()
            self.database = self._make()


@pytest.fixture(scope="session")
def common(server: Engine) -> Iterator[Common]:
    """What shared, conn, owner and superuser give out."""
    with closing(Common(server)) as common:
        yield common


@pytest.fixture
def shared(common: Common) -> Database:
    """A migrated database in which nothing is ever committed."""
    common.tidy()
    return common.database


@pytest.fixture(scope="module")
def stage(server: Engine) -> Iterator[Callable[..., Connection[Any]]]:
    """Gives connections, each to a database of its own, in a transaction that outlasts the tests of a module.

    What is prepared there costs once what it would cost each test. Tests undo what they do themselves: see undone().
    """
    with ExitStack() as made:

        def connect(role: str = "credits_service") -> Connection[Any]:
            common = made.enter_context(closing(Common(server)))
            return made.enter_context(common.borrowed(role))

        yield connect


@pytest.fixture
def database(server: Engine) -> Iterator[Database]:
    """A fresh migrated database, for tests with several connections."""
    with server.database() as database:
        yield database


@pytest.fixture
def empty_database(server: Engine) -> Iterator[Database]:
    """A fresh database without pgcredits."""
    with server.database("template0") as database:
        yield database


@pytest.fixture
def conn(shared: Database, common: Common) -> Iterator[Connection[Any]]:
    """A connection as credits_service in a transaction that is rolled back."""
    with common.borrowed("credits_service") as conn:
        yield conn


@pytest.fixture
def owner(shared: Database, common: Common) -> Iterator[Connection[Any]]:
    """The same as credits_owner, who may see and change tables."""
    with common.borrowed("credits_owner") as conn:
        yield conn


@pytest.fixture
def superuser(shared: Database, common: Common) -> Iterator[Connection[Any]]:
    """The same as a superuser, whom nothing stops."""
    with common.borrowed(SUPERUSER) as conn:
        yield conn


@pytest.fixture
def client(conn: Connection[Any]) -> Client:
    """The verbs, on conn."""
    return Client(conn)


@pytest.fixture
def set_now() -> Callable[[Connection[Any], datetime | str], None]:
    """Stop the clock of a connection's transaction (or, committed, of its database) at a moment."""
    return stop_clock


def stop_clock(conn: Connection[Any], at: datetime | str) -> None:
    """Replace credits.now() by a constant, and go on in the role that the connection had."""
    role = conn.execute("select current_user").fetchone()
    assert role
    conn.execute("set role credits_owner")
    conn.execute(
        sql.SQL("create or replace function credits.now() returns timestamptz language sql as {}").format(
            sql.Literal(f"select timestamptz '{at}'")
        )
    )
    conn.execute(sql.SQL("set role {}").format(sql.Identifier(role[0])))
