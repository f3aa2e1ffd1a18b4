"""PostgreSQL servers for the tests: started once per run, shared by its workers, with a migrated template."""

import fcntl
import itertools
import os
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psycopg
import pytest
from psycopg import Connection, sql
from psycopg.conninfo import make_conninfo

from pgcredits import embedded, migrate

OWNER = embedded.DATABASE  # no superuser, owns its databases, may create roles
TEMPLATE = "pgcredits_template"
# A vacuum in the middle of a long test would change its plans to those for an empty table.
CONF = """
fsync = off
full_page_writes = off
max_connections = 200
shared_buffers = 256MB
autovacuum = off
jit = off
"""
# Of PostgreSQL 18 alone: reads by other processes and the checksums of all pages cost a quarter of its time.
CONF_18 = "io_method = sync\n"
INITDB_18 = ["--no-data-checksums"]
DEBIAN = Path("/usr/lib/postgresql/15")
PG_CRON = Path("/usr/share/postgresql/15/extension/pg_cron.control")
# Its launcher stays in this one database, which therefore is none that tests make and drop.
CRON = """
shared_preload_libraries = 'pg_cron'
cron.database_name = 'postgres'
cron.use_background_workers = on
max_worker_processes = 20
"""
ENGINES = ["pg18", "pg15"]
WHEELS = Path(__file__).parent.parent / ".postgresql"  # where .ci/run puts the versions between
ONE_ENGINE = pytest.mark.parametrize("server", ["pg18"], indirect=True)  # where the server makes no difference
EVERY_VERSION = pytest.mark.parametrize("server", [*ENGINES, "pg16", "pg17"], indirect=True)
_numbers = itertools.count(1)


def missing(what: str, reason: str) -> None:
    """Skip the test, or fail it where the environment says that this must be there."""
    if what in os.environ.get("PGCREDITS_TEST_REQUIRE", "").split(","):
        pytest.fail(f"{what} is required here: {reason}")
    pytest.skip(reason)


def until(holds: Callable[[], Any], patience: float = 20, tells: Callable[[], Any] = str) -> Any:
    """Wait for what happens beside the test, and answer with what holds() says once it is true; or tells() why not."""
    deadline = time.monotonic() + patience
    while not (found := holds()):
        if time.monotonic() > deadline:
            pytest.fail(f"waited {patience:g} s in vain {tells()}")
        time.sleep(0.02)
    return found


def has_cron(install: Path) -> bool:
    """Whether servers of these programs preload pg_cron."""
    return install == DEBIAN and PG_CRON.exists()


def need_cron() -> None:
    """What comes next needs the real pg_cron."""
    if not has_cron(DEBIAN):
        missing("pg_cron", "postgresql-15-cron is not installed")


@dataclass
class Database:
    """One database of a test. dsn logs in as its owner, admin_dsn as the superuser."""

    engine: "Engine"
    name: str
    dsn: str = field(init=False)
    admin_dsn: str = field(init=False)

    def __post_init__(self) -> None:
        self.dsn = make_conninfo(self.engine.server.dsn, dbname=self.name)
        self.admin_dsn = make_conninfo(self.engine.server.admin_dsn, dbname=self.name)

    def connect(self, role: str = "credits_service", *, autocommit: bool = False) -> Connection[Any]:
        """A connection that acts as role; with autocommit each call of a verb is a transaction of its own."""
        return psycopg.connect(self.dsn, autocommit=autocommit, options=f"-c role={role}")

    def admin(self) -> Connection[Any]:
        """A superuser's connection, each statement its own transaction."""
        return psycopg.connect(self.admin_dsn, autocommit=True)

    def dump(self) -> str:
        """pg_dump of the schema, without the lines that differ in every dump."""
        text = self.program("pg_dump", "--schema-only", "--dbname", self.admin_dsn).stdout
        return "\n".join(line for line in text.splitlines() if not line.startswith(("\\restrict", "\\unrestrict")))

    def program(self, name: str, *arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Run a program of the server's own version."""
        return subprocess.run(
            [self.engine.install / "bin" / name, *arguments], capture_output=True, text=True, check=check
        )


@dataclass
class Engine:
    """A server of one major version."""

    name: str
    install: Path
    server: embedded.Server

    @property
    def cron_dsn(self) -> str | None:
        """The owner's login to the database in which pg_cron lives; none on the embedded server, which is without."""
        if self.install != DEBIAN:
            return None
        need_cron()
        return make_conninfo(self.server.dsn, dbname="postgres")

    @contextmanager
    def database(self, template: str = TEMPLATE) -> Iterator[Database]:
        """A fresh database made from template, dropped afterwards."""
        name = f"t_{os.getpid()}_{next(_numbers)}"
        with psycopg.connect(self.server.admin_dsn, autocommit=True) as admin:
            admin.execute(
                sql.SQL("create database {} template {} owner {} strategy file_copy").format(
                    *map(sql.Identifier, (name, template, OWNER))
                )
            )
            try:
                yield Database(self, name)
            finally:
                admin.execute(sql.SQL("drop database if exists {} with (force)").format(sql.Identifier(name)))

    def prepare(self) -> None:
        """Make the template, once per server, the way an owner without superuser's rights installs the product."""
        with psycopg.connect(self.server.admin_dsn, autocommit=True) as admin:
            if admin.execute("select 1 from pg_database where datname = %s", [TEMPLATE]).fetchone():
                return
            unfinished = Database(self, f"{TEMPLATE}_unfinished")
            name = sql.Identifier(unfinished.name)
            admin.execute(sql.SQL("drop database if exists {} with (force)").format(name))
            admin.execute(sql.SQL("create database {} owner {}").format(name, sql.Identifier(OWNER)))
            migrate.migrate(unfinished.dsn)
            if has_cron(self.install):  # beside, with the rights that the manual gives
                admin.execute("create extension if not exists pg_cron")
                admin.execute(f"grant usage on schema cron to {OWNER}".encode())
                admin.execute(f"grant execute on function cron.schedule_in_database to {OWNER}".encode())
            # Tests act as each of these; in production nobody is a member of all.
            options = " with set true, inherit true" if admin.info.server_version >= 160000 else ""
            for role in ("credits_service", "credits_user"):
                admin.execute(f"grant {role} to {OWNER}{options}".encode())
            admin.execute(sql.SQL("alter database {} rename to {}").format(name, sql.Identifier(TEMPLATE)))


def find_install(version: str) -> Path:
    """The folder with the programs of a major version, or the test is skipped."""
    if version == "18":
        return embedded.packaged()
    found = [DEBIAN] if version == "15" else list((WHEELS / version).glob("*/pginstall"))
    if not found or not (found[0] / "bin" / "postgres").exists():
        missing(f"postgresql{version}", f"PostgreSQL {version} is not installed; .ci/run says how")
    return found[0]


@contextmanager
def engine(name: str, folder: Path) -> Iterator[Engine]:
    """Start or join the server called name of this test run."""
    install = find_install(name.removeprefix("pg"))
    conf = CONF + (CRON if has_cron(install) else "") + (CONF_18 if name == "pg18" else "")
    initdb = INITDB_18 if name == "pg18" else ()
    with (
        embedded.start(folder / name, install, conf=conf, initdb=initdb) as server,
        (folder / f"{name}.template").open("w") as lock,
    ):
        running = Engine(name, install, server)
        fcntl.flock(lock, fcntl.LOCK_EX)
        running.prepare()
        fcntl.flock(lock, fcntl.LOCK_UN)
        yield running
