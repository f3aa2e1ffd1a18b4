"""The command line: `up` from nothing to a served tour and back to nothing, and errors of one line."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import psycopg
import pytest
from five_ways import JWT_SECRET, SERVICE, login, token
from servers import ONE_ENGINE, Database

from pgcredits import __version__, migrate
from pgcredits.cli import _listener
from pgcredits.settings import Settings, SettingsError

SECRET = "whsec_of_the_command_line"


def environment(**changes: str) -> dict[str, str]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    ours = ("PGCREDITS_", "STRIPE_")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
    return {**kept, "PGCREDITS_PORT": port, "COLUMNS": "120", **changes}


def pgcredits(environment: dict[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pgcredits", *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=120)


@contextmanager
def up(environment: dict[str, str]) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """`pgcredits up` until it says that it serves, and what it has printed by then."""
    command = [sys.executable, "-m", "pgcredits", "up"]
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        assert process.stdout
        printed = ""
        while "pgcredits serves on" not in printed:
            line = process.stdout.readline()
            assert line, printed
            printed += line
        try:
            yield process, printed
        finally:
            process.kill()


def assert_tour(printed: str) -> None:
    steps = ['"outcome": "applied"', '"outcome": "duplicate"', "credits.get_balance(", "credits.reserve("]
    steps += ["credits.settle(", "settled", "credits.history(", "credits.prove_balance(", "981.5"]
    at = -1
    for step in steps:
        assert printed.find(step, at + 1) > at, f"{step} is missing or out of order:\n{printed}"
        at = printed.find(step, at + 1)
    assert "False" not in printed.partition("credits.prove_balance(")[2]


def processes_in(folder: Path) -> list[str]:
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            command = (process / "cmdline").read_bytes().replace(b"\0", b" ").decode()
        except OSError:
            continue
        if str(folder) in command:
            found.append(command)
    return found


def test_up_from_nothing_and_ctrl_c(tmp_path: Path) -> None:
    data = Path(os.environ["PGCREDITS_TEST_RUN"]) / f"up-{os.getpid()}"
    env = environment(PGCREDITS_DATA=str(data), PGCREDITS_JWT_SECRET=JWT_SECRET)
    backend = {"Authorization": f"Bearer {token(**SERVICE)}", "Content-Profile": "credits"}
    for _ in range(2):  # the second time on the data of the first
        with up(env) as (process, printed):
            assert_tour(printed)
            url = f"http://127.0.0.1:{env['PGCREDITS_PORT']}"
            assert f"pgcredits serves on {url}" in printed
            assert httpx.get(f"{url}/readyz").json() == {"status": "ready"}
            opened = httpx.post(f"{url}/rpc/open_account", json={"account_id": "by_http"}, headers=backend)
            assert opened.status_code == 200, opened.text
            assert process.stdout
            assert f"demo --url {url}\n" in process.stdout.readline()
            again = pgcredits(env, "demo", "--url", url)
            assert again.returncode == 0, again.stderr
            assert_tour(again.stdout)
            assert pgcredits(env, "audit").stdout == "Sound: no invariant is violated.\n"
            process.send_signal(signal.SIGINT)
            rest = process.communicate(timeout=30)[0]
            assert process.returncode == 0, rest
            assert "Traceback" not in rest
        with pytest.raises(httpx.ConnectError):
            httpx.get(f"{url}/healthz")
        assert processes_in(data) == []
    secret = data / "webhook_secret"
    assert secret.stat().st_mode & 0o777 == 0o600
    assert secret.read_text().strip() not in printed


def test_up_that_is_killed_leaves_nothing_running() -> None:
    data = Path(os.environ["PGCREDITS_TEST_RUN"]) / f"killed-{os.getpid()}"
    with up(environment(PGCREDITS_DATA=str(data))) as (process, _):
        assert processes_in(data)
        process.kill()
    deadline = time.monotonic() + 15
    while processes_in(data):
        assert time.monotonic() < deadline, processes_in(data)
        time.sleep(0.1)


def test_up_on_a_database_of_ones_own(empty_database: Database) -> None:
    env = environment(PGCREDITS_DSN=empty_database.dsn, STRIPE_WEBHOOK_SECRET=SECRET)
    with up(env) as (process, printed):
        assert_tour(printed)
        assert "PostgreSQL runs" not in printed
        wrong = pgcredits({**env, "STRIPE_WEBHOOK_SECRET": "whsec_wrong"}, "demo")
        assert wrong.returncode == 1
        assert "invalid_signature" in wrong.stderr
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 0
    with psycopg.connect(empty_database.dsn) as conn:
        assert conn.execute("select count(*) from credits.accounts").fetchone() == (2,)
    gone = pgcredits(env, "demo")
    assert gone.returncode == 1
    assert "nobody answers at http://127.0.0.1:" in gone.stderr


def test_up_on_a_port_that_is_taken() -> None:
    data = Path(os.environ["PGCREDITS_TEST_RUN"]) / f"taken-{os.getpid()}"
    with socket.create_server(("127.0.0.1", 0)) as taken:
        env = environment(PGCREDITS_DATA=str(data), PGCREDITS_PORT=str(taken.getsockname()[1]))
        answer = pgcredits(env, "up")
    assert answer.returncode == 1
    assert answer.stderr == (
        f"pgcredits: cannot listen on http://127.0.0.1:{env['PGCREDITS_PORT']} (Address already in use); "
        "set PGCREDITS_PORT to another port\n"
    )
    assert processes_in(data) == []


def test_an_address_of_ipv6_is_served() -> None:
    settings = Settings.from_environment({"PGCREDITS_HOST": "[::1]", "PGCREDITS_PORT": "0"})
    assert (settings.door(80), Settings().door(80)) == ("http://[::1]:80", "http://127.0.0.1:80")
    if not Path("/proc/net/if_inet6").exists() or "lo" not in Path("/proc/net/if_inet6").read_text():
        pytest.skip("no IPv6 on this machine")
    with _listener(settings) as listener:
        assert listener.getsockname()[0] == "::1"


def test_audit_fails_when_something_is_wrong(database: Database) -> None:
    env = environment(PGCREDITS_DSN=database.dsn)
    assert pgcredits(env, "audit").returncode == 0
    with database.connect("credits_owner", autocommit=True) as conn:
        conn.execute("select credits.open_account(account_id => 'a')")
        conn.execute("select credits.grant_credits(account_id => 'a', amount => 5, key => 'g')")
        conn.execute("update credits.balances set balance = balance + 1")
    answer = pgcredits(env, "audit")
    assert answer.returncode == 1
    assert "a" in answer.stdout


def test_without_a_database_the_way_to_one_is_named(tmp_path: Path) -> None:
    env = environment(PGCREDITS_DATA=str(tmp_path / "none"))
    for command in ("migrate", "serve", "demo", "audit"):
        answer = pgcredits(env, command)
        assert answer.returncode == 1, command
        assert answer.stderr == (
            "pgcredits: which database? Give --dsn, set PGCREDITS_DSN, or start one with `pgcredits up`\n"
        )
    assert not (tmp_path / "none").exists()


def test_errors_of_the_database_are_one_line(empty_database: Database) -> None:
    for dsn, said, to_do in (
        (empty_database.dsn, 'schema "credits" does not exist', "pgcredits migrate"),
        ("host=127.0.0.1 port=1 dbname=x", "Connection refused Is the server running", ""),
        ("database", "--dsn or PGCREDITS_DSN must be an address such as postgresql://", ""),
    ):
        for command in ("audit", "migrate") if not to_do else ("audit",):
            answer = pgcredits(environment(PGCREDITS_DSN=dsn), command)
            assert answer.returncode == 1
            assert answer.stderr.startswith("pgcredits: ")
            assert said in answer.stderr
            assert to_do in answer.stderr
            assert answer.stderr.count("\n") == 1, answer.stderr


def test_a_database_of_another_version_is_to_be_migrated(database: Database) -> None:
    env = environment(PGCREDITS_DSN=database.dsn)
    with psycopg.connect(database.dsn, options="-c role=credits_owner") as conn:
        conn.execute("alter function credits.health() rename to health_of_another_version")
    answer = pgcredits(env, "status")
    assert answer.returncode == 1
    assert answer.stderr.endswith(f"This is pgcredits {__version__}; to bring the database to it: pgcredits migrate\n")


def test_commands_take_on_the_role_that_belongs_to_the_login(database: Database) -> None:
    env = environment(PGCREDITS_DSN=login(database))
    refused = pgcredits(env, "status")
    assert refused.returncode == 1
    assert "set PGCREDITS_ROLE=credits_service" in refused.stderr
    env["PGCREDITS_ROLE"] = "credits_service"
    for command in (["status"], ["jobs", "run", "audit"]):
        answer = pgcredits(env, *command)
        assert answer.returncode == 0, answer.stderr
    env["PGCREDITS_ROLE"] = "nobody"  # the environment's, of another login than this one
    assert pgcredits(env, "events", "list", "--dsn", database.dsn).returncode == 0


def test_dates_of_a_database_may_have_another_style(database: Database) -> None:
    with database.admin() as admin:
        admin.execute(f"alter database {database.name} set datestyle = 'German'".encode())
    env = environment(PGCREDITS_DSN=database.dsn)
    for command in (["jobs", "run", "audit"], ["jobs", "list"], ["events", "list"], ["notify", "list"], ["status"]):
        answer = pgcredits(env, *command)
        assert (answer.returncode, answer.stderr) == (0, ""), command


def test_a_word_that_is_none_finds_not_nothing_but_is_refused(database: Database) -> None:
    env = environment(PGCREDITS_DSN=database.dsn)
    for command, words in (
        (("events", "list", "--status", "fail"), "status is received, applied, ignored, parked or failed."),
        (("notify", "list", "--state", "failed"), "state is pending, sent, delivered or dead."),
    ):
        answer = pgcredits(env, *command)
        assert answer.returncode == 1
        assert words in answer.stderr
        assert pgcredits(env, *command[:3], words.split()[-1].rstrip(".")).returncode == 0


def test_what_is_not_found_is_said_once(database: Database) -> None:
    answer = pgcredits(environment(PGCREDITS_DSN=database.dsn), "events", "show", "evt_nope")
    assert answer.stderr == 'pgcredits: event_not_found · {"event_id": "evt_nope"}\n'


@ONE_ENGINE
def test_what_is_no_text_is_said_in_a_line(database: Database) -> None:
    env = environment(PGCREDITS_DSN=database.dsn)
    broken = b"M\xfcller".decode(errors="surrogateescape")  # as a terminal in Latin-1 writes it
    for command in (["erase", broken, "--yes"], ["jobs", "run", broken], ["status", "--dsn", f"host={broken}"]):
        answer = pgcredits(env, *command)
        assert answer.returncode == 1
        assert answer.stderr.startswith("pgcredits: not UTF-8, in an argument or a variable: ")
        assert "M\\udcfcller" in answer.stderr
        assert answer.stderr.count("\n") == 1, answer.stderr


@ONE_ENGINE
def test_a_setting_is_json_or_a_text(database: Database) -> None:
    env = environment(PGCREDITS_DSN=database.dsn)
    for value in ("NaN", "1e999", "[" * 10_000):  # which Python's reader takes, or breaks off at
        assert pgcredits(env, "settings", "set", "product_name", value).stdout == f'product_name = "{value}"\n'
        answer = pgcredits(env, "settings", "set", "expiring_soon_days", value)
        assert answer.returncode == 1
        assert "expiring_soon_days is a JSON number, such as 7." in answer.stderr


def test_data_that_cannot_be_kept_are_one_line(tmp_path: Path) -> None:
    (tmp_path / "a_file").touch()
    answer = pgcredits(environment(PGCREDITS_DATA=str(tmp_path / "a_file")), "up")
    assert answer.returncode == 1
    assert "set PGCREDITS_DATA to a folder of your own" in answer.stderr
    assert answer.stderr.count("\n") == 1, answer.stderr


def test_the_version_is_told() -> None:
    assert pgcredits(environment(), "--version").stdout == f"pgcredits {__version__}\n"


def test_sql_prints_everything() -> None:
    printed = pgcredits(environment(), "sql").stdout
    for path in [*(m.path for m in migrate.migrations()), *migrate.code_files()]:
        assert path.read_text() in printed, path.name


def test_the_command_line_loads_no_library_that_only_some_commands_need() -> None:
    libraries = {"httpx", "jwt", "prometheus_client", "starlette", "stripe", "uvicorn"}
    program = f"import sys, pgcredits.cli; print(*{libraries} & set(sys.modules))"
    answer = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert answer.stdout.strip() == ""


def test_settings_are_read_and_checked() -> None:
    read = Settings.from_environment(
        {
            "PGCREDITS_DSN": "postgresql://u:hunter2@h/d",
            "PGCREDITS_PORT": "9000",
            "STRIPE_WEBHOOK_SECRET": "whsec_a, whsec_b,",
            "STRIPE_WEBHOOK_SECRET_EU_SHOP": "whsec_eu",
            "STRIPE_WEBHOOK_SECRET_EMPTY": " ",
            "STRIPE_SECRET_KEY": " sk_test_a ",
            "STRIPE_API_BASE": "http://127.0.0.1:12111/",
        }
    )
    assert (read.port, read.host, read.max_body) == (9000, "127.0.0.1", 1048576)
    assert read.secrets_of("anything") == ("whsec_a", "whsec_b")
    assert read.secrets_of("eu-shop") == ("whsec_eu",)
    assert read.secrets_of("empty") == ("whsec_a", "whsec_b")
    assert "hunter2" not in repr(read)
    assert "whsec" not in repr(read)
    assert (read.stripe_key, read.stripe_api_base) == ("sk_test_a", "http://127.0.0.1:12111")
    assert "sk_test" not in repr(read)
    for bad in ("127.0.0.1:12111", "http://user@host", "http://host/v1", "ftp://host"):
        with pytest.raises(SettingsError, match="STRIPE_API_BASE must be an address"):
            Settings.from_environment({"STRIPE_API_BASE": bad})
    for bad in ("abc", "-1", "70000", "1e3"):
        with pytest.raises(SettingsError, match="PGCREDITS_PORT must be a number from 0 to 65535"):
            Settings.from_environment({"PGCREDITS_PORT": bad})


def test_the_example_names_every_setting() -> None:
    example = (migrate.HOME / ".env.example").read_text()
    source = (Path(migrate.__file__).parent / "settings.py").read_text()
    for name in (part.split('"')[0] for part in source.split('"PGCREDITS_')[1:]):
        assert f"PGCREDITS_{name}=" in example, name
    for name in ("SECRET_KEY", "API_BASE", "WEBHOOK_SECRET"):
        assert f"STRIPE_{name}=" in example, name


def test_the_worker_needs_a_key() -> None:
    done = pgcredits(environment(PGCREDITS_DSN="dbname=nowhere"), "stripe", "work")
    assert done.returncode == 1
    assert done.stderr == "pgcredits: set STRIPE_SECRET_KEY to the key of Stripe's API\n"
