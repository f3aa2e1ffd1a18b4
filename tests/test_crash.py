"""A server that is killed in the middle of its work: what was answered is there, and a retry does nothing twice."""

import os
import shutil
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psycopg
import pytest
from client import Client

from pgcredits import embedded, migrate

WORKERS, CALLS = 8, 2000


def work(dsn: str, worker: int) -> list[str]:
    """Spend and hold until the server is gone. Answers with the keys whose calls were answered."""
    answered: list[str] = []
    try:
        with psycopg.connect(dsn, autocommit=True) as conn:
            client = Client(conn)
            for number in range(CALLS):
                key = f"{worker}-{number}"
                client.spend("team", 1, key=key)
                answered.append(key)
                client.reserve("team", 2, key)
                if number % 2:
                    client.settle("team", key, 1)
    except psycopg.OperationalError:
        return answered
    pytest.fail("the server outlived the work")


def reconnected(dsn: str) -> psycopg.Connection[Any]:
    """A connection as soon as the server has recovered."""
    deadline = time.monotonic() + 60
    while True:
        try:
            return psycopg.connect(dsn, autocommit=True)
        except psycopg.OperationalError:
            assert time.monotonic() < deadline, "the server did not recover within a minute"
            time.sleep(0.1)


def test_a_killed_server_has_all_that_it_answered() -> None:
    base = Path(os.environ["PGCREDITS_TEST_RUN"]) / f"crash-{os.getpid()}"
    with embedded.start(base) as server:
        migrate.migrate(server.dsn)
        with psycopg.connect(server.dsn, autocommit=True) as conn:
            client = Client(conn)
            client.open_account("team")
            client.grant_credits("team", 1_000_000, kind="purchase", key="bought")

        with ThreadPoolExecutor(WORKERS) as pool:
            running = [pool.submit(work, server.dsn, worker) for worker in range(WORKERS)]
            with psycopg.connect(server.dsn, autocommit=True) as watcher:
                victim, deadline = 0, time.monotonic() + 60
                while not victim:  # in the middle of a call, and with some hundred behind it
                    time.sleep(0.05)
                    row = watcher.execute(
                        "select pid from pg_stat_activity where state = 'active' and query like '%spend%'"
                        " and pid <> pg_backend_pid() and wait_event_type is distinct from 'Client' limit 1"
                    ).fetchone()
                    booked = Client(watcher).get_balance("team").entry_seq
                    victim = row[0] if row and booked > 200 else 0
                    assert time.monotonic() < deadline, [worker.exception(0) for worker in running if worker.done()]
                os.kill(victim, signal.SIGKILL)  # the server ends every session and recovers from its log
            answered = [key for worker in running for key in worker.result()]
        assert len(answered) > WORKERS

        with reconnected(server.dsn) as conn:
            client = Client(conn)
            proof = client.prove_balance("team")
            assert proof.ok
            assert proof.entries >= len(answered)
            assert all(client.spend("team", 1, key=key).replayed for key in answered)
            assert client.prove_balance("team").hash == proof.hash
            assert client.audit() == []
            assert not client.spend("team", 1, key="after").replayed
    shutil.rmtree(base, ignore_errors=True)
