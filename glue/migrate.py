"""Deploys migrations/ and sql/ in one transaction, takes them back, and prints them as one file for psql.

The files, their order and the books are yoyo's (its tables, in the schema credits_migrations), so its own
command line understands them. The transaction and the lock are ours: yoyo commits after each migration.
"""

import re
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import psycopg
from psycopg import Connection
from psycopg.pq import TransactionStatus
from psycopg.rows import TupleRow
from yoyo import read_migrations
from yoyo.migrations import topological_sort

from pgcredits import __version__

_PACKAGE = Path(__file__).resolve().parent
HOME = _PACKAGE if (_PACKAGE / "migrations").is_dir() else _PACKAGE.parent  # an installed wheel, or a checkout
SCHEMA = "credits_migrations"
OLDEST_SERVER = 150000

LOCK = "select pg_catalog.pg_advisory_xact_lock(pg_catalog.hashtextextended('pgcredits.deploy', 0));"
# What a deploy may wait for a lock of running traffic: beyond it, all of us would queue behind it.
# Bodies are checked at the end: a file reads top-down, so a function may stand above those that it calls.
SESSION = """\
set local lock_timeout = '30s';
set local search_path = pg_catalog, pg_temp;
set local check_function_bodies = off;"""
BOOKS = f"""\
create schema if not exists {SCHEMA};
create table if not exists {SCHEMA}._yoyo_migration (
  migration_hash varchar(64) primary key, migration_id varchar(255), applied_at_utc timestamp);
create table if not exists {SCHEMA}._yoyo_log (
  id varchar(36) primary key, migration_hash varchar(64), migration_id varchar(255), operation varchar(10),
  username varchar(255), hostname varchar(255), comment varchar(255), created_at_utc timestamp);
create table if not exists {SCHEMA}._yoyo_version (version int primary key, installed_at_utc timestamp);
create table if not exists {SCHEMA}.yoyo_lock (locked int default 1 primary key, ctime timestamp, pid int not null);
insert into {SCHEMA}._yoyo_version select 2, now() at time zone 'utc'
  where not exists (select from {SCHEMA}._yoyo_version);"""
CHECK = """\
set local check_function_bodies = on;
do $$
declare
  v_function record;
  v_rows     text;
begin
  for v_function in
    select p.oid, p.oid::regprocedure as name, l.lanvalidator::regproc as validator
    from pg_catalog.pg_proc p
    join pg_catalog.pg_language l on l.oid = p.prolang
    where p.pronamespace::regnamespace::text in ('credits', 'credits_api', 'credits_hasura')
      and p.prokind in ('f', 'p')
  loop
    begin
      execute pg_catalog.format('select %s(%s)', v_function.validator, v_function.oid);
    exception when others then
      raise exception using message = v_function.name || ' does not compile: ' || sqlerrm;
    end;
  end loop;
  if pg_catalog.to_regclass('credits.house_rule_violations') is not null then
    execute 'select pg_catalog.string_agg(v::text, e''\\n'') from credits.house_rule_violations v' into v_rows;
    if v_rows is not null then
      raise exception using message = 'house rules are violated', detail = v_rows;
    end if;
  end if;
end $$;"""
NOTIFY = "notify pgrst, 'reload schema';"
AS_OWNER = "set local role credits_owner;"
AS_OURSELVES = "reset role;"
ENDS_TRANSACTION = re.compile(r"^\s*(begin|commit|rollback|abort)(\s+(work|transaction))?\s*;", re.I | re.M)


class DeployError(Exception):
    """A deploy or a rollback failed and changed nothing. The text names the file and the reason."""


class Migration:
    """One file of migrations/ with its way back."""

    def __init__(self, name: str, hash_: str, path: Path) -> None:
        self.name, self.hash, self.path = name, hash_, path
        self.rollback_path = path.with_suffix(".rollback.sql")

    def mark(self) -> str:
        """SQL that enters the migration into yoyo's books."""
        return (
            f"insert into {SCHEMA}._yoyo_migration values ('{self.hash}', '{self.name}', now() at time zone 'utc');\n"
            + self._log("apply")
        )

    def unmark(self) -> str:
        """SQL that takes it out again."""
        return f"delete from {SCHEMA}._yoyo_migration where migration_hash = '{self.hash}';\n" + self._log("rollback")

    def _log(self, operation: str) -> str:
        return (
            f"insert into {SCHEMA}._yoyo_log (id, migration_hash, migration_id, operation, username, created_at_utc)\n"
            f"  values (gen_random_uuid()::text, '{self.hash}', '{self.name}', '{operation}', session_user,"
            " now() at time zone 'utc');"
        )


def migrations(home: Path = HOME) -> list[Migration]:
    """All migrations of this version, in the order they are applied."""
    found = []
    for one in topological_sort(read_migrations(str(home / "migrations"))):
        one.load()
        migration = Migration(one.id, one.hash, Path(one.path))
        name = migration.path.name
        if not re.fullmatch(r"[\w.-]+\.sql", name):
            raise DeployError(f"{name}: a migration is an .sql file, named with letters, digits, dots and dashes")
        if not one.use_transactions:
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
        pending = [m for m in known if m.hash not in _applied(conn, known)]
        for migration in pending:
            _run_file(conn, migration.path)
            conn.execute(AS_OURSELVES)
            conn.execute(migration.mark().encode())
        for path in code_files(home):
            conn.execute(AS_OWNER)
            _run_file(conn, path)
        conn.execute(AS_OWNER)
        _run(conn, CHECK, "the checks after sql/")
        conn.execute(AS_OURSELVES)
        conn.execute(NOTIFY)
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
            conn.execute(AS_OWNER)
            _run_file(conn, home / "sql" / "undo" / "drop_code.sql")
        for migration in undone:
            conn.execute(AS_OURSELVES)
            _run_file(conn, migration.rollback_path)
            conn.execute(AS_OURSELVES)
            conn.execute(migration.unmark().encode())
        conn.execute(NOTIFY)
    return [migration.name for migration in undone]


def script(home: Path = HOME) -> Iterator[str]:
    """Parts of one file for psql that installs this version into a database that does not have it."""
    yield f"-- pgcredits {__version__}: the whole installation, for a database that does not have it yet.\n"
    yield "-- Run as the owner of the database (with CREATEROLE, or where the four roles of pgcredits exist):\n"
    yield "--   psql --no-psqlrc -f this-file.sql 'postgresql://...'\n"
    yield "-- All or nothing. `pgcredits migrate` can take over from here at any time.\n"
    yield f"\\set ON_ERROR_STOP on\nbegin;\n{LOCK}\n{SESSION}\n{BOOKS}\n"
    yield f"do $$ begin\n  if exists (select from {SCHEMA}._yoyo_migration) then\n"
    yield "    raise exception 'pgcredits is installed here already; bring it up to date with: pgcredits migrate';\n"
    yield "  end if;\nend $$;\n"
    for migration in migrations(home):
        yield f"\n-- ==== migrations/{migration.path.name}\n{_read(migration.path)}\n{AS_OURSELVES}\n{migration.mark()}\n"
    for path in code_files(home):
        yield f"\n-- ==== sql/{path.name}\n{AS_OWNER}\n{_read(path)}\n"
    yield f"\n-- ==== the end\n{AS_OWNER}\n{CHECK}\n{AS_OURSELVES}\n{NOTIFY}\ncommit;\n"


@contextmanager
def _deploying(dsn: str) -> Iterator[Connection[TupleRow]]:
    """A connection in one transaction that holds the deploy lock. Left by an error it changes nothing."""
    try:
        conn = psycopg.connect(dsn, autocommit=True, prepare_threshold=None)
    except psycopg.OperationalError as error:
        raise DeployError(f"cannot reach the database: {str(error).strip()}") from error
    with closing(conn):
        if conn.info.server_version < OLDEST_SERVER:
            raise DeployError(f"PostgreSQL 15 or newer is needed, this is {conn.info.server_version // 10000}")
        _run(conn, f"begin; {LOCK} {SESSION} {BOOKS}", f"the books in schema {SCHEMA}")
        yield conn
        _run(conn, "commit", "commit")


def _applied(conn: Connection[TupleRow], known: list[Migration]) -> set[str]:
    rows = conn.execute(f"select migration_hash, migration_id from {SCHEMA}._yoyo_migration order by 2".encode()).fetchall()
    strangers = [name for hash_, name in rows if hash_ not in {m.hash for m in known}]
    if strangers:
        raise DeployError(
            f"the database holds migrations that pgcredits {__version__} does not have: {', '.join(strangers)}. "
            "A newer version has been here; use that one."
        )
    return {hash_ for hash_, _ in rows}


def _read(path: Path) -> str:
    text = path.read_text(encoding="utf-8")
    if found := ENDS_TRANSACTION.search(text):
        line = text.count("\n", 0, found.start(1)) + 1
        raise DeployError(f"{path.name}, line {line}: '{found.group(1)}' would break up the one transaction of a deploy")
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
        lines.append(f"  statement: {text[: at - 1].rpartition(chr(10))[2]}{text[at - 1 :].partition(chr(10))[0]}".rstrip())
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
    user, database, may_create, may_make_roles, missing, ours = conn.execute(
        """
        select current_user, current_database(), has_database_privilege(current_database(), 'create'),
               (select r.rolcreaterole or r.rolsuper from pg_catalog.pg_roles r where r.rolname = current_user),
               exists (select from unnest(array['credits_owner', 'credits_service', 'credits_user',
                 'credits_forwarder']) n where to_regrole(n) is null),
               coalesce(pg_has_role(to_regrole('credits_owner'), 'member'), false)
        """
    ).fetchone() or (conn.info.user, conn.info.dbname, True, True, False, True)
    if not may_create:
        return f'{user} may not create schemas here: alter database "{database}" owner to "{user}"'
    if missing and not may_make_roles:
        return f'{user} may not create roles: a superuser can say: alter role "{user}" createrole'
    if not missing and not ours:
        return (
            "the roles of pgcredits exist already (another database of this server has it). Whoever made them, or a "
            "superuser, can share them: grant credits_owner, credits_service, credits_user, credits_forwarder "
            f'to "{user}" with admin option'
        )
    return f"{user} lacks a right; deploy as the owner of the database, the same user every time"
