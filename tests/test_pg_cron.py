"""The real pg_cron: entries that it runs each minute, in its own database and in another; killed, renewed, gone."""

import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest
from client import Client
from ledger_support import Ledger, assert_sound, refused
from psycopg import Connection
from psycopg.conninfo import make_conninfo
from servers import CONF, CRON, DEBIAN, need_cron
from typer.testing import CliRunner

from pgcredits import embedded, migrate
from pgcredits.cli import cli

NAMES = [f"pgcredits {which} of pgcredits" for which in ("1", "2", "history")]
OTHERS = ["mine", "pgcredits 1 of another"]  # which are none of ours
ASLEEP = "select pid from pg_stat_activity where wait_event = 'PgSleep' and backend_type <> 'client backend'"
HANGING = """
create or replace function credits._expire_reservations(max_rows integer) returns bigint language plpgsql as $$
begin
  perform credits.spend('alpha', 1, key => 'undone');
  perform pg_sleep(600);
  return 0;
end $$"""
COUNTING = """
create or replace function credits._expire_reservations(max_rows integer) returns bigint language plpgsql as $$
begin
  perform credits.spend('alpha', 1, key => 'done');
  return 0;
end $$"""


@pytest.fixture(scope="module")
def server() -> Iterator[embedded.Server]:
    """A server with pg_cron in the database postgres and pgcredits in its own."""
    need_cron()
    folder = Path(os.environ["PGCREDITS_TEST_RUN"]) / f"cron-{os.getpid()}"
    with embedded.start(folder, DEBIAN, conf=CONF + CRON + "restart_after_crash = on\n") as server:
        migrate.migrate(server.dsn)
        with connect(server.admin_dsn) as admin:
            admin.execute("create extension pg_cron")
        yield server


def connect(dsn: str) -> Connection[Any]:
    return psycopg.connect(dsn, autocommit=True)


def jobs(command: str, server: embedded.Server, *arguments: str) -> str:
    """`pgcredits jobs …`; what it prints."""
    return CliRunner().invoke(cli, ["jobs", command, "--dsn", server.dsn, *arguments], catch_exceptions=False).stdout


def entries(admin: Connection[Any]) -> list[Any]:
    """What pg_cron has: name, schedule, database, role."""
    return admin.execute("select jobname, schedule, database, username from cron.job order by 1").fetchall()


def eventually(found: Callable[[], Any], seconds: float = 75) -> Any:
    """What is found in the end: the scheduler turns with the minute. A server that is recovering is asked again."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            if value := found():
                return value
        except psycopg.OperationalError:
            pass
        time.sleep(0.2)
    raise AssertionError(found)


@pytest.fixture(scope="module")
def elsewhere(server: embedded.Server) -> str:
    """The owner's login to the database in which pg_cron lives, which it gets the rights for as the advice says."""
    dsn = make_conninfo(server.dsn, dbname="postgres")
    with connect(server.admin_dsn) as admin, connect(server.dsn) as conn:
        role = conn.info.user
        for reason, remedy in (
            ("pg_cron is not in the database", None),
            ("may not use the schema cron", f"grant usage on schema cron to {role}"),
            ("may not execute", f"grant execute on function cron.schedule_in_database to {role}"),
        ):
            with pytest.raises(psycopg.Error, match="cron_unavailable") as caught:
                jobs("schedule", server, *([] if remedy is None else ["--cron-dsn", dsn]))
            assert reason in str(caught.value.diag.message_detail)
            if remedy:
                assert str(caught.value.diag.message_hint).endswith(f": {remedy}.")
                admin.execute(remedy.encode())
        assert entries(admin) == []
    return dsn


def test_entries_are_made_once_and_renewed(server: embedded.Server, elsewhere: str) -> None:
    with connect(server.admin_dsn) as admin, connect(elsewhere) as cron:
        role = cron.info.user
        printed = jobs("schedule", server, "--cron-dsn", elsewhere)
        assert printed.splitlines() == [f"Scheduled: {name}" for name in NAMES]
        assert entries(admin) == [
            (NAMES[0], "* * * * *", "pgcredits", role),
            (NAMES[1], "* * * * *", "pgcredits", role),
            (NAMES[2], "37 1 * * *", "postgres", role),
        ]
        # Deployed again: entries of an older version go, the others keep their numbers and so their history.
        numbers = admin.execute("select jobname, jobid from cron.job order by 1").fetchall()
        for name in ("pgcredits old of pgcredits", *OTHERS):
            cron.execute("select cron.schedule(%s, '0 0 1 1 *', 'select 1')", [name])
        jobs("schedule", server, "--cron-dsn", elsewhere)
        now = admin.execute("select jobname, jobid from cron.job order by 1").fetchall()
        assert [row for row in now if row in numbers] == numbers
        assert {name for name, *_ in entries(admin)} == {*NAMES, *OTHERS}


def test_pg_cron_does_the_jobs_and_survives_a_kill(server: embedded.Server, elsewhere: str) -> None:
    jobs("schedule", server, "--cron-dsn", elsewhere)
    with connect(server.admin_dsn) as admin, connect(server.dsn) as conn:
        ledger = Ledger(conn, at=None)
        ledger.open("alpha", 100)
        ledger.change(HANGING)
        ledger.change("update credits.jobs set next_run_at = clock_timestamp()")
        ledger.change("update credits.settings set value = '\"1 second\"' where name = 'job_lease'")
        hanging = eventually(lambda: admin.execute(ASLEEP).fetchone())
        # The others are done by the other entry.
        eventually(lambda: len([row for row in ledger.list_job_runs() if row.outcome == "done"]) >= 9, 20)
        assert {row.runner for row in ledger.list_job_runs()} <= {"pg_cron 1", "pg_cron 2"}
        assert ledger.claim_job("door", standby=True) == []
        os.kill(hanging[0], signal.SIGKILL)  # the server ends every session and recovers

    def recovered() -> bool:
        with connect(server.dsn) as conn:
            Ledger(conn, at=None).change(COUNTING)
            return True

    eventually(recovered)
    with connect(server.dsn) as conn:
        ledger = Ledger(conn, at=None)
        assert ledger.available() == 100
        time.sleep(1)  # its lease
        conn.execute("call credits.work_jobs(runner => 'after')")
        last, lost = ledger.list_job_runs(name="expire_reservations")
        assert (last.outcome, lost.outcome) == ("done", "lost")
        assert ledger.available() == 99
        assert_sound(ledger)


def test_what_is_unscheduled_leaves_nothing_behind(server: embedded.Server, elsewhere: str) -> None:
    with connect(server.admin_dsn) as admin:
        jobs("schedule", server, "--cron-dsn", elsewhere)
        for name in OTHERS:
            admin.execute("select cron.schedule(%s, '0 0 1 1 *', 'select 1')", [name])
        admin.execute(
            "insert into cron.job_run_details (jobid, runid, username) select jobid, -jobid, username from cron.job"
        )
        for _ in range(2):
            jobs("unschedule", server, "--cron-dsn", elsewhere)
            assert not {name for name, *_ in entries(admin)} & set(NAMES)
            assert set(OTHERS) <= {name for name, *_ in entries(admin)}
            left = admin.execute(
                "select j.jobname from cron.job_run_details d left join cron.job j using (jobid) where d.runid < 0"
            ).fetchall()
            assert {name for (name,) in left} == set(OTHERS)


def test_pg_cron_in_the_same_database(server: embedded.Server) -> None:
    here = make_conninfo(server.admin_dsn, dbname="postgres")
    migrate.migrate(here)
    with connect(here) as admin:
        client = Client(admin)
        names = [f"pgcredits {which} of postgres" for which in ("1", "2", "history")]
        assert client.schedule_jobs() == names
        assert client.schedule_jobs() == names
        assert [row[0] for row in entries(admin) if row[0] in names] == names
        admin.execute("set role credits_service")
        with refused(409, "cron_unavailable", reason="credits_service may not use the schema cron"):
            client.schedule_jobs()
        admin.execute("reset role")
        admin.execute("grant usage on schema cron to credits_service")
        admin.execute("set role credits_service")
        reason = "credits_service cannot log in, and pg_cron runs entries as the role that makes them"
        with refused(409, "cron_unavailable", reason=reason):
            client.schedule_jobs()
        admin.execute("reset role")
        client.unschedule_jobs()
        assert [row for row in entries(admin) if row[0] in names] == []
        # What clears pg_cron's own history.
        row = admin.execute("select statement from credits.cron_statements() where entry like '%history%'").fetchone()
        assert row
        command = row[0].split("'37 1 * * *', ")[1].rstrip(")")
        purge = admin.execute(f"select {command}".encode()).fetchone()
        assert purge
        admin.execute(purge[0].encode())
