"""The database of the benchmark: a private server, or a given one, with the product installed and accounts in it."""

import itertools
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psycopg
from psycopg import Connection, sql
from psycopg.conninfo import conninfo_to_dict, make_conninfo
from psycopg.types.json import Jsonb
from stream import Shape, steps

from pgcredits import embedded, migrate

HERE = Path(__file__).resolve().parent
ROLE = "credits_service"
CONF = """
fsync = on
synchronous_commit = on
shared_buffers = '512MB'
max_wal_size = '4GB'
checkpoint_timeout = '30min'
"""
# Sessions keep the plans that they made while a table was empty, so no table is when they come.
HISTORY = (
    "select credits.spend('acct_' || n, 1, key => 'past_{i}') from generate_series(1, {accounts}) n",
    "select credits.reserve('acct_' || n, 2, 'past_{i}') from generate_series(1, {accounts}) n",
    "select credits.settle('acct_' || n, 'past_{i}', 1) from generate_series(1, {accounts}) n",
)
USED = "from generate_series(1, {accounts}) n, unnest(array['chapter', 'image']) name"
USES = (  # a table that was empty when it was vacuumed is scanned as a whole
    f"select credits.authorize_usage('user_' || n, name, 10, 'best', 'past_' || name) {USED}",
    f"select credits.settle_usage('user_' || n, 'past_' || name, 10) {USED}",
)
SHOWN = (
    "fsync", "synchronous_commit", "full_page_writes", "shared_buffers", "max_wal_size", "checkpoint_timeout",
    "wal_compression", "wal_sync_method", "data_checksums", "autovacuum", "max_connections", "jit",
)  # fmt: skip


class BenchError(Exception):
    """The benchmark cannot go on; the text says why."""


@dataclass(frozen=True)
class Database:
    """Where to measure. dsn logs in as the owner, admin_dsn as a superuser where there is one."""

    dsn: str
    admin_dsn: str
    pgbench: Path
    where: str
    wal_folder: Path | None = None  # of a server on this machine whose files we may read
    waldump: Path | None = None

    def connect(self, role: str | None = ROLE) -> Connection[Any]:
        """The owner's connection, acting as role; each statement is its own transaction."""
        return psycopg.connect(self.dsn, autocommit=True, options=f"-c role={role}" if role else "")

    def admin(self) -> Connection[Any]:
        """The most powerful connection there is."""
        return psycopg.connect(self.admin_dsn, autocommit=True)

    def environment(self) -> dict[str, str]:
        """What tells libpq's programs to log in as the owner and to act as credits_service."""
        names = {"host", "hostaddr", "port", "user", "password", "sslmode"}
        given = conninfo_to_dict(self.dsn)
        known = {f"PG{name.upper()}": str(value) for name, value in given.items() if name in names}
        return known | {"PGDATABASE": str(given.get("dbname", "")), "PGOPTIONS": f"-c role={ROLE}"}


def find_install(wanted: str | None) -> Path:
    """The folder that has bin/postgres: wanted, or the system's (15 before others), or the packaged one."""
    system = Path("/usr/lib/postgresql")
    if wanted and wanted != "packaged":
        install = Path(wanted)
        if not (install / "bin" / "postgres").is_file():
            raise BenchError(f"there is no bin/postgres in {install}")
        return install
    for install in (system / "15", *sorted(system.glob("1[6-9]"))):
        if not wanted and (install / "bin" / "postgres").is_file():
            return install
    return embedded.packaged()


def find_pgbench(install: Path | None) -> Path:
    """The server's own pgbench, else that of the path."""
    own = install / "bin" / "pgbench" if install else None
    if own and own.is_file():
        return own
    found = shutil.which("pgbench")
    if not found:
        raise BenchError("pgbench was not found. It comes with PostgreSQL (Debian: postgresql-15); put it on the PATH")
    return Path(found)


@contextmanager
def private(install: Path, data: Path | None) -> Iterator[Database]:
    """A server of our own in a new folder below data, stopped and removed at the end."""
    pgbench = find_pgbench(install)
    folder = Path(tempfile.mkdtemp(prefix="pgcredits-bench-", dir=data))
    folder.chmod(0o711)  # the unprivileged user that runs the server for root has to pass
    socket = folder / "postgres"
    try:
        with embedded.start(folder, install, conf=f"{CONF}unix_socket_directories = '{socket}'\n") as server:
            dsn, admin_dsn = (make_conninfo(dsn, host=str(server.data)) for dsn in (server.dsn, server.admin_dsn))
            if server.data != socket:
                raise BenchError(f"the user that runs the server cannot enter {folder}; see --data")
            admin_dsn = make_conninfo(admin_dsn, dbname=conninfo_to_dict(dsn)["dbname"])
            where = f"private server, Unix socket, data on {_filesystem(folder)}"
            waldump = install / "bin" / "pg_waldump"
            wal_folder = server.data / "pg_wal" if waldump.is_file() else None
            yield Database(dsn, admin_dsn, pgbench, where, wal_folder, waldump)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def given(dsn: str) -> Database:
    """A database that somebody else runs. It must be empty, and stays as it is afterwards."""
    with psycopg.connect(dsn, autocommit=True) as conn:
        if conn.execute("select to_regclass('credits.accounts') is not null").fetchone() == (True,):
            raise BenchError("this database has pgcredits in it; the benchmark wants an empty one")
    return Database(dsn, dsn, find_pgbench(None), "given database")


def prepare(database: Database, accounts: int, home: Path) -> None:
    """Install the product, the floor's tables, and accounts with three grants each."""
    migrate.migrate(database.dsn, home)
    with database.connect(None) as conn:
        member = conn.execute("select pg_has_role(current_user, %s, 'member')", [ROLE]).fetchone()
        if member != (True,) or conn.info.server_version >= 160000:
            option = " with set true, inherit true" if conn.info.server_version >= 160000 else ""
            conn.execute(sql.SQL("grant {} to current_user" + option).format(sql.Identifier(ROLE)))
        conn.execute((HERE / "setup.sql").read_bytes())
    with database.connect() as conn:
        conn.execute("select credits.load_demo_catalog()")
        conn.execute("select credits.open_account('acct_' || n) from generate_series(1, %s) n", [accounts])
        for kind, months in (("plan", 1), ("promo", 12), ("purchase", None)):
            conn.execute(
                "select credits.grant_credits('acct_' || n, 1000000000, %s, key => %s,"
                " expires_at => now() + make_interval(months => %s)) from generate_series(1, %s) n",
                [kind, kind, months, accounts],
            )
        past = max(20, 10_000 // accounts)  # by so many spends and pairs each account has a past
        for statement, i in itertools.product(HISTORY, range(past)):
            conn.execute(statement.format(accounts=accounts, i=i).encode())
        conn.execute(
            "select credits.receive_stripe_event('bench', floor.paid_session(n, n)) from generate_series(1, %s) n",
            [accounts],
        )
        conn.execute(
            "insert into floor.balances (account_id, balance) select 'acct_' || n, 3000000000"
            " from generate_series(1, %s) n",
            [accounts],
        )
        conn.execute(
            "insert into floor.entries (account_id, seq, amount, balance_after)"
            " select 'acct_' || n, -i, -1, 3000000000 + i from generate_series(1, %s) i, generate_series(1, %s) n",
            [past, accounts],
        )
    with database.connect(None) as conn:
        conn.execute((HERE / "bare.sql").read_bytes())
    _vacuum(database)


def prepare_access(database: Database, accounts: int) -> None:
    """Lay out a catalogue of usual size, with as many accounts on its largest plan."""
    names = {
        "capabilities": [
            "chapter",
            "image",
            "outline",
            "enhance",
            "summary",
            "title",
            "cover",
            "speech",
            "video",
            "chat",
            "code",
            "search",
        ],
        "quality_levels": ["draft", "good", "best"],
        "models": ["tiny", "small", "medium", "large", "huge", "painter", "speaker"],
    }
    qualities = {"draft": ["tiny"], "good": ["small"], "best": ["large", "medium"]}
    limits = [{"calls": 1_000_000_000, "per": "minute"}, {"calls": 1_000_000_000, "per": "day"}]
    catalog = {
        **{section: {name: {"name": name} for name in listed} for section, listed in names.items()},
        "plans": {
            f"plan{number}": {
                "name": f"Plan {number}",
                "capabilities": {
                    name: {"qualities": qualities, "limits": limits if name == "image" else []}
                    for name in names["capabilities"][: 3 * number]
                },
            }
            for number in range(1, 5)
        },
        "rates": [{"capability": name, "price": {"credits": 0.001}} for name in names["capabilities"]],
    }
    with database.connect() as conn:
        conn.execute("select credits.apply_catalog(%s)", [Jsonb(catalog)])
        conn.execute(
            "select credits.open_account(x.name, plan => 'plan4'),"
            "       credits.grant_credits(x.name, 1000000000, 'purchase', key => 'bought')"
            "  from generate_series(1, %s) n, lateral (values ('user_' || n)) x (name)",
            [accounts],
        )
        for statement in USES:
            conn.execute(statement.format(accounts=accounts).encode())
    _vacuum(database)


def prepare_stream(database: Database, accounts: int) -> None:
    """Lay out the stream of events, and apply what went before it."""
    shapes: tuple[Shape, Shape] = ("old", "new")
    with database.connect(None) as conn, database.connect() as service:
        for step in steps("new", "catalogue"):
            service.execute("select credits.receive_stripe_event('bench', %s)", [step.payload])
        for parity, shape in enumerate(shapes):
            for step in steps(shape, "past"):
                service.execute(
                    "select credits.receive_stripe_event('bench', floor.event_of(%s, n, %s))"
                    " from generate_series(%s::bigint, %s, 2) n",
                    [step.payload, accounts, parity, (accounts - 1) // 2],
                )
            for number, step in enumerate(steps(shape, "present")):
                conn.execute("insert into floor.stream values (%s, %s, %s, %s)", [shape, number, *step])
        for _ in range(len(steps("new", "present")) ** 2 // 2):  # until a pair is at every step
            service.execute("select floor.apply_next(%s)", [accounts])
    _vacuum(database)


def _vacuum(database: Database) -> None:
    for role in (None, "credits_owner"):
        with database.connect(role) as conn:
            conn.execute("set client_min_messages = error")  # of tables that are not this role's own
            conn.execute("vacuum analyze")


def settings(database: Database) -> dict[str, str]:
    """The version, and the settings that matter here."""
    with database.connect() as conn:
        rows = conn.execute(
            "select s.name, current_setting(s.name) from pg_settings s where s.name = any (%s)", [list(SHOWN)]
        ).fetchall()
        version = conn.execute("select split_part(version(), ' on ', 1)").fetchone()
    return {"version": version[0] if version else ""} | dict(sorted(rows, key=lambda row: SHOWN.index(row[0])))


def _filesystem(folder: Path) -> str:
    """The type of the file system that folder lies on, where the system tells."""
    mounts = Path("/proc/mounts")
    lines = [line.split() for line in mounts.read_text().splitlines()] if mounts.exists() else []
    holding = [(len(line[1]), line[2]) for line in lines if folder.is_relative_to(line[1])]
    return max(holding)[1] if holding else "an unknown file system"
