"""Deploys migrations/ and sql/ in one transaction, takes them back, and prints them as one file for psql.

The files, their order and the books are yoyo's (its tables, in the schema credits_migrations), so its own
command line understands them. The transaction and the lock are ours: yoyo commits after each migration.
"""

import re
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import psycopg
from psycopg import Connection
from psycopg.pq import TransactionStatus
from psycopg.rows import TupleRow
from yoyo import read_migrations
from yoyo.migrations import parse_metadata_from_sql_comments

from pgcredits import __version__

_PACKAGE = Path(__file__).resolve().parent
HOME = _PACKAGE if (_PACKAGE / "migrations").is_dir() else _PACKAGE.parent  # an installed wheel, or a checkout
_OLDEST_SERVER = 150000

_BEGIN = (_PACKAGE / "begin.sql").read_text()
_CHECK = (_PACKAGE / "check.sql").read_text()
_NOTIFY = "notify pgrst, 'reload schema';"
_AS_OWNER = "set local role credits_owner;"
_AS_OURSELVES = "reset role;"
_BODY = re.compile(r"(\$\w*\$).*?\1", re.DOTALL)  # of a routine: a procedure may commit when it is called
_ENDS_TRANSACTION = re.compile(
    r"^\s*(begin|commit|rollback|abort)(\s+(work|transaction))?\s*;", re.IGNORECASE | re.MULTILINE
)


class DeployError(Exception):
    """A deploy or a rollback failed and changed nothing. The text names the file and the reason."""


@dataclass(frozen=True)
class Migration:
    """One file of migrations/. hash is what yoyo knows it by."""

    name: str
    hash: str
    path: Path

    @property
    def rollback_path(self) -> Path:
        """Its way back."""
        return self.path.with_suffix(".rollback.sql")

    def book(self, operation: Literal["apply", "rollback"]) -> str:
        """SQL that enters it into yoyo's books, or takes it out."""
        books, now = "credits_migrations._yoyo_", "now() at time zone 'utc'"
        entry = {
            "apply": f"insert into {books}migration values ('{self.hash}', '{self.name}', {now});",
            "rollback": f"delete from {books}migration where migration_hash = '{self.hash}';",
        }[operation]
        return (
            f"{entry}\ninsert into {books}log"
            " (id, migration_hash, migration_id, operation, username, created_at_utc)\n"
            f"  values (gen_random_uuid()::text, '{self.hash}', '{self.name}', '{operation}', session_user, {now});"
        )


def migrations(home: Path = HOME) -> list[Migration]:
    """All migrations of this version, in the order they are applied, which is that of their names."""
    found = []
    for one in read_migrations(str(home / "migrations")):
        migration = Migration(one.id, one.hash, Path(one.path))
        name = migration.path.name
        if not re.fullmatch(r"[\w.-]+\.sql", name):
            raise DeployError(f"{name}: a migration is an .sql file, named with letters, digits, dots and dashes")
        # Not one.load(), which splits the whole file into statements that nobody here needs: half a second for all.
        said, _, _ = parse_metadata_from_sql_comments(_read(migration.path))
        if "depends" in said:
            raise DeployError(f"{name}: 'depends' is not read here; migrations are applied in the order of their names")
        if said.get("transactional", "true").lower() != "true":
            raise DeployError(f"{name}: 'transactional: false' does not fit a deploy that is all or nothing")
        if not migration.rollback_path.is_file():
            raise DeployError(f"{name}: {migration.rollback_path.name} is missing; every migration needs its way back")
        found.append(migration)
    if not found:
        raise DeployError(f"no migrations in {home / 'migrations'}; is the installation complete?")
    return found


def code_files(home: Path = HOME) -> list[Path]:
    """The files of sql/, in the order they are applied."""
    return sorted((home / "sql").glob("*.sql"), key=lambda path: path.name)


def migrate(dsn: str, home: Path = HOME) -> list[str]:
    """Bring the database behind dsn to this version; returns the names of the migrations it applied.

    One transaction under one lock: pending migrations, all of sql/, the house rules. Raises DeployError.
    """
    with _deploying(dsn) as conn:
        known = migrations(home)
        applied = _applied(conn, known)
        pending = [m for m in known if m.hash not in applied]
        for migration in pending:
            _run_file(conn, migration.path)
            conn.execute(_AS_OURSELVES)
            conn.execute(migration.book("apply").encode())
        for path in code_files(home):
            conn.execute(_AS_OWNER)
            _run_file(conn, path)
        conn.execute(_AS_OWNER)
        _run(conn, _CHECK, "the checks after sql/")
        conn.execute(_AS_OURSELVES)
        conn.execute(_NOTIFY)
    return [migration.name for migration in pending]


def rollback(dsn: str, steps: int | None = 1, home: Path = HOME) -> list[str]:
    """Take back the last migrations, all with steps=None, and before them every function and view.

    Destroys what their tables hold. Returns the names undone, last applied first. Raises DeployError.
    """
    with _deploying(dsn) as conn:
        known = migrations(home)
        applied = _applied(conn, known)
        undone = [m for m in reversed(known) if m.hash in applied][:steps]
        if undone:
            conn.execute(_AS_OWNER)
            _run_file(conn, home / "sql" / "undo" / "drop_code.sql")
        for migration in undone:
            conn.execute(_AS_OURSELVES)
            _run_file(conn, migration.rollback_path)
            conn.execute(_AS_OURSELVES)
            conn.execute(migration.book("rollback").encode())
        conn.execute(_NOTIFY)
    return [migration.name for migration in undone]


def script(home: Path = HOME) -> Iterator[str]:
    """Parts of one file for psql that installs this version into a database that does not have it."""
    yield f"-- pgcredits {__version__}: the whole installation, for a database that does not have it yet.\n"
    yield "-- Run as the owner of the database (with CREATEROLE, or where the four roles of pgcredits exist):\n"
    yield "--   psql --no-psqlrc -f this-file.sql 'postgresql://...'\n"
    yield "-- All or nothing. `pgcredits migrate` can take over from here at any time.\n"
    yield f"\\set ON_ERROR_STOP on\nbegin;\n{_BEGIN}\n"
    yield "do $$ begin\n  if exists (select from credits_migrations._yoyo_migration) then\n"
    yield "    raise exception 'pgcredits is installed here already; bring it up to date with: pgcredits migrate';\n"
    yield "  end if;\nend $$;\n"
    for migration in migrations(home):
        yield f"\n-- ==== migrations/{migration.path.name}\n{_read(migration.path)}\n{_AS_OURSELVES}\n"
        yield migration.book("apply") + "\n"
    for path in code_files(home):
        yield f"\n-- ==== sql/{path.name}\n{_AS_OWNER}\n{_read(path)}\n"
    yield f"\n-- ==== the end\n{_AS_OWNER}\n{_CHECK}\n{_AS_OURSELVES}\n{_NOTIFY}\ncommit;\n"


@contextmanager
def _deploying(dsn: str) -> Iterator[Connection[TupleRow]]:
    """A connection in one transaction that holds the deploy lock. Left by an error it changes nothing."""
    try:
        conn = psycopg.connect(dsn, autocommit=True, prepare_threshold=None)
    except psycopg.OperationalError as error:
        raise DeployError(f"cannot reach the database: {' '.join(str(error).split())}") from error
    with closing(conn):
        if conn.info.server_version < _OLDEST_SERVER:
            raise DeployError(f"PostgreSQL 15 or newer is needed, this is {conn.info.server_version // 10000}")
        _run(conn, f"begin; {_BEGIN}", "the beginning of the deploy")
        try:
            yield conn
        except psycopg.Error as error:  # between the files
            raise DeployError(f"the deploy ended early: {' '.join(str(error).split())}") from error
        _run(conn, "commit", "commit")


def _applied(conn: Connection[TupleRow], known: list[Migration]) -> set[str]:
    rows = conn.execute(
        b"select migration_hash, migration_id from credits_migrations._yoyo_migration order by 2"
    ).fetchall()
    strangers = [name for hash_, name in rows if hash_ not in {m.hash for m in known}]
    if strangers:
        raise DeployError(
            f"the database holds migrations that pgcredits {__version__} does not have: {', '.join(strangers)}. "
            "A newer version has been here; use that one."
        )
    return {hash_ for hash_, _ in rows}


def _read(path: Path) -> str:
    text = path.read_text(encoding="utf-8")
    if found := _ENDS_TRANSACTION.search(_BODY.sub(lambda body: re.sub(r"[^\n]", "", body[0]), text)):
        line = text.count("\n", 0, found.start(1)) + 1
        raise DeployError(
            f"{path.name}, line {line}: '{found.group(1)}' would break up the one transaction of a deploy"
        )
    return text


def _run_file(conn: Connection[TupleRow], path: Path) -> None:
    _run(conn, _read(path), path.name)


def _run(conn: Connection[TupleRow], text: str, where: str) -> None:
    try:
        conn.execute(text.encode())
    except psycopg.Error as error:
        raise DeployError(_explain(conn, error, text, where)) from error
    if where != "commit" and conn.info.transaction_status != TransactionStatus.INTRANS:
        raise DeployError(f"{where}: ended the transaction of the deploy")


def _explain(conn: Connection[TupleRow], error: psycopg.Error, text: str, where: str) -> str:
    diag = error.diag
    at = int(diag.statement_position or 0)
    lines = [f"{where}, line {text.count(chr(10), 0, at - 1) + 1}" if at else where]
    lines[0] += f": {diag.message_primary or str(error).strip()}"
    if at:
        lines.append(
            f"  statement: {text[: at - 1].rpartition(chr(10))[2]}{text[at - 1 :].partition(chr(10))[0]}".rstrip()
        )
    if diag.message_detail:
        lines.append(f"  detail: {diag.message_detail}")
    if diag.message_hint:
        lines.append(f"  hint: {diag.message_hint}")
    if diag.context and not at:
        lines.append(f"  where: {diag.context.splitlines()[0]}")
    if isinstance(error, psycopg.errors.InsufficientPrivilege):
        lines.append(f"  advice: {_advice(conn)}")
    return "\n".join(lines)


def _advice(conn: Connection[TupleRow]) -> str:
    conn.execute("rollback")
    user, database, may_create, may_make_roles, theirs = conn.execute(
        """
        select current_user, current_database(), has_database_privilege(current_database(), 'create'),
               (select r.rolcreaterole or r.rolsuper from pg_catalog.pg_roles r where r.rolname = current_user),
               to_regrole('credits_owner') is not null and not pg_has_role(to_regrole('credits_owner'), 'usage')
        """
    ).fetchone() or (conn.info.user, conn.info.dbname, True, True, False)
    if not may_create:
        return f'{user} may not create schemas here: alter database "{database}" owner to "{user}"'
    if not may_make_roles:
        return f'{user} may not create roles; a superuser can say: alter role "{user}" createrole'
    if theirs:
        return (
            "the roles of pgcredits belong to another user (another database of this server has it); that one or a "
            "superuser can say: grant credits_owner, credits_service, credits_user, credits_forwarder "
            f'to "{user}" with admin option'
        )
    return f"{user} lacks a right; deploy as the owner of the database, the same user every time"
