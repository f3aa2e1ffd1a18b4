"""Jobs: what each does, batch by batch; one runner at a time; what fails, and what is killed."""

import asyncio
import random
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import Any, Literal

import psycopg
import pytest
from client import Client
from door import Door
from ledger_support import DAY, HOUR, MINUTE, NOON, SECOND, Ledger, assert_sound, committed, refused, session, together
from psycopg import Connection
from servers import Database
from typer.testing import CliRunner, Result

from pgcredits import ticker
from pgcredits.cli import cli
from pgcredits.db import Database as Pool
from pgcredits.migrate import HOME

JOBS = {
    "expire_grants", "expire_reservations", "grant_plan_credits", "apply_scheduled_changes", "retry_stripe_events",
    "refresh_stale_subscriptions", "subscription_cache_cleanup", "archive_stripe_events", "audit", "purge_job_history",
    "run_auto_topups", "warn_expiring_credits", "purge_notifications", "reconcile_stripe", "refresh_totals",
    "repeat_erasures", "refresh_stale_purchases",
}  # fmt: skip
SCHEDULES = [  # 31 January 2030 is a Thursday
    ("* * * * *", "2030-01-31 12:00:00", "2030-01-31 12:01"),
    ("* * * * *", "2030-01-31 12:00:59.9", "2030-01-31 12:01"),
    ("*/5 * * * *", "2030-01-31 12:58:00", "2030-01-31 13:00"),
    ("10-30/10,45 * * * *", "2030-01-31 12:30:00", "2030-01-31 12:45"),
    ("43 3 * * *", "2030-01-31 03:43:00", "2030-02-01 03:43"),
    ("0 0 1 * *", "2030-12-01 00:00:00", "2031-01-01 00:00"),
    ("0 9 * * 1-5", "2030-02-01 09:00:00", "2030-02-04 09:00"),
    ("0 9 * * 0", "2030-01-31 12:00:00", "2030-02-03 09:00"),
    ("0 9 * * 7", "2030-01-31 12:00:00", "2030-02-03 09:00"),
    ("0 9 13 * 5", "2030-02-08 10:00:00", "2030-02-13 09:00"),  # the 13th, and each Friday
    ("0 9 */2 * 5", "2030-02-01 10:00:00", "2030-02-15 09:00"),  # a Friday with an odd day
    ("0 0 29 2 *", "2097-03-01 00:00:00", "2104-02-29 00:00"),
    ("  0 0 * * *", "2030-01-31 12:00:00", None),
    ("0 0 31 4 *", "2030-01-31 12:00:00", None),
    ("5/10 * * * *", "2030-01-31 12:00:00", None),
    ("*/0 * * * *", "2030-01-31 12:00:00", None),
    ("20-10 * * * *", "2030-01-31 12:00:00", None),
    ("0 24 * * *", "2030-01-31 12:00:00", None),
    ("0 0 0 * *", "2030-01-31 12:00:00", None),
    ("0 0 * 13 *", "2030-01-31 12:00:00", None),
    ("0 0 * * 8", "2030-01-31 12:00:00", None),
    ("1, * * * *", "2030-01-31 12:00:00", None),
    ("0 0 * * mon", "2030-01-31 12:00:00", None),
    ("@daily", "2030-01-31 12:00:00", None),
]
BROKEN = "create or replace function credits._expire_grants(max_rows integer) returns bigint language plpgsql as "
CALL = "call credits.work_jobs()"


@pytest.fixture
def ledger(conn: Connection[Any]) -> Ledger:
    """A ledger at noon, with the demo catalogue; the jobs were run a moment ago."""
    ledger = Ledger(conn)
    ledger.load_demo_catalog()
    ledger.change("update credits.jobs set next_run_at = credits._next_run(schedule, credits.now())")
    return ledger


def job(ledger: Ledger, name: str) -> Any:
    """How a job stands."""
    (row,) = [row for row in ledger.list_jobs() if row.name == name]
    return row


def runs(ledger: Ledger, name: str) -> list[Any]:
    """The runs of a job, the latest first: outcome, rows, batches."""
    return [(run.outcome, run.rows_done, run.batches) for run in ledger.list_job_runs(name=name)]


def finish(ledger: Ledger, name: str) -> int:
    """Run a job to its end; how many rows it did."""
    rows: int = 0
    while True:
        result = ledger.run_job(name)
        assert result.outcome in {"running", "done"}, result
        rows += result.rows_done
        if not result.more:
            return rows


def told(ledger: Ledger, kind: str) -> list[Any]:
    """Notifications of a kind."""
    return ledger.table("notifications", "type = %s", kind)


def test_schedules(owner: Connection[Any]) -> None:
    owner.execute("set timezone = 'Asia/Tokyo'")  # which must not matter
    for schedule, after, expected in SCHEDULES:
        row = owner.execute("select credits._next_run(%s, %s)", [schedule, f"{after}+00"]).fetchone()
        assert row
        assert row[0] == (datetime.fromisoformat(f"{expected}+00:00") if expected else None), (schedule, after)


def test_a_job_goes_batch_by_batch(ledger: Ledger) -> None:
    assert {row.name for row in ledger.list_jobs()} == JOBS
    ledger.change("update credits.jobs set batch_size = 2 where name = 'expire_grants'")
    for account in ("alpha", "beta", "gamma"):
        ledger.open(account, 10, 20, expires_at=NOON + HOUR)
        ledger.grant(40, account)
        ledger.grant(5, account, effective_at=NOON + HOUR)  # with it they are booked one by one
    assert ledger.claim_job() == []
    ledger.now += HOUR
    first = ledger.run_job("expire_grants")
    assert (first.outcome, first.rows_done, first.more) == ("running", 2, True)
    assert runs(ledger, "expire_grants") == [("running", 2, 1)]
    assert job(ledger, "expire_grants").state == "due"
    last = ledger.run_job("expire_grants")
    assert (last.outcome, last.rows_done, last.more) == ("done", 1, False)
    assert last.next_run_at == ledger.now + MINUTE
    assert runs(ledger, "expire_grants") == [("done", 3, 2)]
    assert job(ledger, "expire_grants").state == "waiting"
    assert job(ledger, "expire_grants").last_success_at == ledger.now
    assert [kind for kind, _ in ledger.kinds("gamma")] == ["grant", "grant", "grant", "grant", "expire", "expire"]
    assert ledger.run_job("expire_grants").rows_done == 0
    assert [row.name for row in ledger.claim_job()] == ["apply_scheduled_changes"]
    with ledger.unchanged("job_runs", "jobs"):  # run at the same moment, everything is done
        assert finish(ledger, "expire_grants") == 0
    assert_sound(ledger)


def test_what_each_job_does(ledger: Ledger) -> None:
    ledger.open("alpha", 100)
    ledger.reserve("alpha", 30, "r1", ttl=HOUR)
    ledger.reserve("alpha", 10, "r2", ttl=2 * HOUR)
    ledger.settle("alpha", "r2", 10)
    assert finish(ledger, "expire_reservations") == 0
    ledger.now += 3 * HOUR
    assert finish(ledger, "expire_reservations") == 1
    assert {row.reservation_id: row.status for row in ledger.table("reservations")} == {
        "r1": "expired",
        "r2": "settled",
    }
    ledger.change("update credits.jobs set through_at = %s where name = 'expire_reservations'", ledger.now + HOUR)
    ledger.reserve("alpha", 5, "late", ttl=SECOND)  # committed when the job has looked further already
    ledger.now += HOUR
    assert finish(ledger, "expire_reservations") == 0
    ledger.now += DAY
    assert finish(ledger, "expire_reservations") == 1

    ledger.open_account("beta", plan="team")
    turn = ledger.get_subscription_state("beta").period_end
    assert finish(ledger, "grant_plan_credits") == 0
    ledger.change_plan("beta", "free", at="period_end")
    ledger.now = turn
    assert finish(ledger, "apply_scheduled_changes") == 1
    assert finish(ledger, "grant_plan_credits") == 0
    assert ledger.table("subscriptions")[0].plan == "free"
    ledger.now = ledger.get_subscription_state("beta").period_end
    assert finish(ledger, "grant_plan_credits") == 1
    assert ledger.table("subscriptions")[0].period_end > ledger.now

    ledger.get_user_subscription_state("beta")
    assert finish(ledger, "subscription_cache_cleanup") == 0
    ledger.now += DAY
    assert finish(ledger, "subscription_cache_cleanup") == 1
    assert [row.removed for row in ledger.get_cache_cleanup_history()] == [1, 0]

    unknown = session(metadata={"account_id": "nobody", "package": "starter"})
    assert ledger.tell("checkout.session.completed", unknown, "evt_1") == "parked"
    assert ledger.tell("unheard.of", {}, "evt_2") == "ignored"
    assert finish(ledger, "retry_stripe_events") == 0
    ledger.now += HOUR
    assert finish(ledger, "retry_stripe_events") == 1
    assert ledger.event("evt_1").attempts == 2
    assert finish(ledger, "archive_stripe_events") == 0
    ledger.now += 90 * DAY
    assert finish(ledger, "archive_stripe_events") == 1

    assert finish(ledger, "audit") == 0
    ledger.change("update credits.balances set balance = balance + 1 where account_id = 'alpha'")
    assert finish(ledger, "audit") > 0
    assert finish(ledger, "audit") > 0
    assert len(told(ledger, "audit_violation")) == len(
        {row.data["invariant"] for row in told(ledger, "audit_violation")}
    )

    assert finish(ledger, "purge_job_history") > 5
    assert {row.started_at for row in ledger.list_job_runs(max_rows=100)} == {ledger.now}


def test_stripe_is_asked_for_subscriptions_of_which_nothing_was_heard(ledger: Ledger) -> None:
    ledger.open("alpha")
    seconds = int(NOON.timestamp())
    lives = {
        "id": "sub_1", "object": "subscription", "status": "active", "metadata": {"account_id": "alpha"},
        "customer": "cus_1", "items": {"data": [{"id": "si_1", "price": {"id": "price_1"}, "quantity": 1,
        "current_period_start": seconds, "current_period_end": seconds + 7200}]},
    }  # fmt: skip
    ledger.tell("customer.subscription.created", lives)
    assert finish(ledger, "refresh_stale_subscriptions") == 0
    ledger.now += 3 * HOUR  # its period is over
    assert finish(ledger, "refresh_stale_subscriptions") == 1
    assert finish(ledger, "refresh_stale_subscriptions") == 0  # a request is open
    ledger.change("delete from credits.stripe_requests")
    ledger.tell("customer.subscription.updated", lives)
    assert finish(ledger, "refresh_stale_subscriptions") == 0
    ledger.now += DAY
    assert finish(ledger, "refresh_stale_subscriptions") == 1
    assert [row.path for row in ledger.table("stripe_requests")] == ["/v1/subscriptions/sub_1"]
    ledger.change("delete from credits.stripe_requests")
    ledger.tell("customer.subscription.deleted", {**lives, "status": "canceled"})
    ledger.now += 2 * DAY
    assert finish(ledger, "refresh_stale_subscriptions") == 0


def test_a_job_that_fails_is_recorded_and_does_not_stop_the_rest(ledger: Ledger) -> None:
    ledger.open("alpha", 10, expires_at=NOON + MINUTE)
    with ledger.as_owner():
        (body,) = ledger.query("select pg_get_functiondef('credits._expire_grants'::regproc) as body")
    ledger.change(BROKEN + "$$ begin perform credits.grant_credits('alpha', 1, key => 'undone'); return 1 / 0; end $$")
    ledger.now += 5 * MINUTE
    results = {row.name: row for row in ledger.run_due_jobs()}
    assert set(results) == {
        "apply_scheduled_changes", "expire_grants", "expire_reservations", "grant_plan_credits", "retry_stripe_events",
        "run_auto_topups",
    }  # fmt: skip
    assert (results["expire_grants"].outcome, results["expire_grants"].error) == ("failed", "division by zero")
    assert {row.outcome for name, row in results.items() if name != "expire_grants"} == {"done"}
    (run,) = ledger.list_job_runs(name="expire_grants")
    assert (run.outcome, run.error, run.error_state) == ("failed", "division by zero", "22012")
    assert ledger.table("entries", "key = 'undone'") == []
    for minutes in (1, 2, 4, 8, 15, 15):
        standing = job(ledger, "expire_grants")
        assert (standing.state, standing.last_error) == ("failing", "division by zero")
        assert standing.next_run_at == ledger.now + minutes * MINUTE
        ledger.now += minutes * MINUTE - SECOND
        assert "expire_grants" not in {row.name for row in ledger.run_due_jobs()}
        ledger.now += SECOND
        assert "expire_grants" in {row.name for row in ledger.run_due_jobs()}
    assert [row.data["job"] for row in told(ledger, "job_failed")] == ["expire_grants"]
    ledger.change(body.body)
    assert ledger.run_job("expire_grants").rows_done == 1
    assert (job(ledger, "expire_grants").failures, job(ledger, "expire_grants").last_error) == (0, None)
    ledger.now += MINUTE
    ledger.change(BROKEN + "$$ begin return 1 / 0; end $$")
    ledger.run_job("expire_grants")
    assert len(told(ledger, "job_failed")) == 2  # a new streak
    assert_sound(ledger)


def test_an_account_that_cannot_be_booked_does_not_stop_the_others(ledger: Ledger) -> None:
    for account in ("alpha", "beta", "gamma"):
        ledger.open(account, 10, expires_at=NOON + MINUTE)
    ledger.change(
        "update credits.balances set balance = 1 where account_id = 'beta'"
    )  # so that the expiry is below zero
    ledger.now += HOUR
    assert finish(ledger, "expire_grants") == 2
    assert finish(ledger, "expire_grants") == 0
    assert [row.account_id for row in told(ledger, "booking_failed")] == ["beta"]
    assert ledger.kinds("gamma")[-1] == ("expire", -10)


def test_those_on_which_it_fails_are_found_among_many(ledger: Ledger) -> None:
    names = [f"a{number}" for number in range(11)]
    for name in names:
        ledger.open(name, 10, expires_at=NOON + MINUTE)
    ledger.change("update credits.balances set balance = 1 where account_id in ('a3', 'a10')")
    ledger.now += HOUR
    with ledger.as_owner():
        (booked,) = ledger.query("select credits._try_together(%s) as accounts", names)
    assert sorted(booked.accounts) == sorted({*names} - {"a3", "a10"})
    assert finish(ledger, "expire_grants") == 0
    assert {row.account_id for row in told(ledger, "booking_failed")} == {"a3", "a10"}


def test_a_batch_is_many_that_only_end_and_few_others(ledger: Ledger) -> None:
    ledger.change("update credits.jobs set batch_size = 4 where name = 'expire_grants'")
    for number in range(30):
        ledger.open(f"a{number}", 10, expires_at=NOON + MINUTE + number * SECOND)
        if number % 6 == 0:
            ledger.reserve(f"a{number}", 1, "r", ttl=HOUR)
    ledger.now += DAY
    reached = []
    while ledger.run_job("expire_grants").more:
        reached += [row.reached_id for row in ledger.table("jobs", "name = 'expire_grants'")]
    assert len(reached) == 2
    assert reached == sorted({*reached} - {None})  # each batch goes on where the one before has ended
    assert ledger.table("jobs", "reached_at is not null or reached_id is not null") == []
    # Four times four are looked at: those that only end, and up to four of the others.
    assert [run.rows_done for run in ledger.list_job_runs(name="expire_grants")] == [30]
    assert [run.batches for run in ledger.list_job_runs(name="expire_grants")] == [3]
    assert_sound(ledger)


def test_what_an_operator_chooses_stays(ledger: Ledger) -> None:
    code = (HOME / "sql/75_jobs.sql").read_text()
    changed = ledger.set_job("audit", enabled=False, schedule="0 5 * * 1")
    assert (changed.state, changed.schedule) == ("disabled", "0 5 * * 1")
    assert changed.next_run_at == datetime(2030, 2, 4, 5, tzinfo=UTC)
    ledger.change("update credits.jobs set batch_size = 1 where name = 'expire_grants'")
    ledger.change(
        "insert into credits.jobs (name, summary, function, schedule, next_run_at) values ('old', '', '', '', now())"
    )
    with ledger.as_owner():
        ledger.conn.execute(code.encode())
    assert job(ledger, "audit") == changed
    assert job(ledger, "expire_grants").batch_size == 50
    assert {row.name for row in ledger.list_jobs()} == JOBS
    ledger.now += 7 * DAY
    ledger.set_job("expire_grants", enabled=False)
    names = {row.name for row in ledger.run_due_jobs()}
    assert names == JOBS - {"audit", "expire_grants"}
    assert ledger.run_job("audit").outcome == "done"  # by hand it runs
    back = ledger.set_job("audit", enabled=True, schedule="default")
    assert (back.state, back.schedule) == ("waiting", "43 3 * * *")
    with refused(404, "job_not_found", name="nope"):
        ledger.set_job("nope")
    with refused(404, "job_not_found"):
        ledger.list_job_runs(name="nope")


def test_who_stands_by_does_nothing_while_another_does(ledger: Ledger) -> None:
    ledger.now += MINUTE
    assert len(ledger.claim_job("door", standby=True)) == 1
    assert len(ledger.claim_job("pg_cron 1")) == 1
    assert ledger.claim_job("door", standby=True) == []
    ledger.now += 3 * MINUTE - SECOND
    assert ledger.claim_job("door", standby=True) == []
    ledger.now += SECOND
    assert len(ledger.claim_job("door", standby=True)) == 1
    assert [row.runner for row in ledger.table("job_runners")] == ["pg_cron 1"]


def test_a_run_whose_runner_does_not_come_back_is_lost_after_its_lease(ledger: Ledger) -> None:
    ledger.now += MINUTE
    (claim,) = ledger.claim_job("one")
    assert job(ledger, claim.name).state == "running"
    assert claim.name not in {row.name for row in ledger.claim_job("two")}
    assert ledger.run_job(claim.name).outcome == "busy"
    ledger.now += MINUTE
    again = ledger.run_job(claim.name, runner="two")
    assert (again.outcome, again.run_id > claim.run_id) == ("done", True)
    assert ledger.run_job(claim.name, run_id=claim.run_id).outcome == "busy"  # the first one, late
    last, lost = ledger.list_job_runs(name=claim.name)
    assert (last.outcome, lost.outcome, lost.error) == ("done", "lost", "one took a batch and did not come back.")
    assert told(ledger, "job_failed") == []
    for _ in range(2):  # again and again: somebody should look
        ledger.now += 5 * MINUTE
        ledger.change("update credits.jobs set next_run_at = credits.now() where name = %s", claim.name)
        while claim.name not in {row.name for row in ledger.claim_job("one")}:
            pass
        ledger.now += 5 * MINUTE
    ledger.run_job(claim.name)
    assert [row.data["job"] for row in told(ledger, "job_failed")] == [claim.name]


def test_a_clock_that_is_set_back_stops_no_job(ledger: Ledger) -> None:
    ledger.now += 400 * DAY
    held = "expire_grants"
    while claimed := ledger.claim_job("pg_cron 1"):
        if claimed[0].name != held:
            ledger.run_job(claimed[0].name, run_id=claimed[0].run_id)
    ledger.now -= 400 * DAY
    assert {row.state for row in ledger.list_jobs() if row.name != held} == {"due"}
    done = set()
    while claimed := ledger.claim_job("door", standby=True):
        done.add(claimed[0].name)
        assert ledger.run_job(claimed[0].name, run_id=claimed[0].run_id).outcome == "done"
    assert done == {row.name for row in ledger.list_jobs()}
    assert max(row.next_run_at for row in ledger.list_jobs()) <= ledger.now + 7 * DAY
    assert ledger.claim_job("pg_cron 1") == []
    assert [row.seen_at for row in ledger.table("job_runners", "runner = 'pg_cron 1'")] == [ledger.now]


def waiting(conn: Connection[Any], query: str) -> int:
    """The process of a session that waits for a lock in a query like this one."""
    for _ in range(500):
        row = conn.execute(
            "select pid from pg_stat_activity where datname = current_database() and wait_event_type = 'Lock'"
            " and query like %s",
            [f"%{query}%"],
        ).fetchone()
        if row:
            return int(row[0])
        time.sleep(0.01)
    raise AssertionError(query)


def due(ledger: Ledger, accounts: int, *, batch: int) -> None:
    """Accounts with a grant whose time is over, and a small batch."""
    now = datetime.now(UTC)
    ledger.change("update credits.jobs set batch_size = %s where name = 'expire_grants'", batch)
    for number in range(accounts):
        ledger.open(f"a{number}", 10, expires_at=now + timedelta(seconds=1))
    ledger.change("update credits.jobs set next_run_at = %s", now - MINUTE)
    time.sleep(max(0, (now + timedelta(seconds=1.05) - datetime.now(UTC)).total_seconds()))


def test_one_at_a_time_killed_and_by_many(database: Database) -> None:
    """Batches commit one by one; a killed one is undone and done again; and many runners do each thing once."""
    with committed(database) as ledger, database.admin() as admin, ThreadPoolExecutor(1) as pool:
        due(ledger, 12, batch=3)
        with database.connect("credits_owner") as blocker:
            blocker.execute("lock table credits.entries in share mode")  # a batch stops at its first entry
            running = pool.submit(call_in, database, CALL)
            victim = waiting(admin, "work_jobs")
            taken = [row.name for row in ledger.list_jobs() if row.state == "running"]
            ledger.change("update credits.settings set value = '\"0 seconds\"' where name = 'job_lease'")
            assert ledger.run_job(taken[0]).outcome == "busy"  # slow is not dead, whatever its lease
            admin.execute("select pg_terminate_backend(%s)", [victim])
            assert isinstance(running.exception(), psycopg.OperationalError)
        assert taken == ["expire_grants"]
        assert ledger.table("entries", "kind = 'expire'") == []
        ledger.change("update credits.jobs set locked_until = clock_timestamp() where locked_until is not null")
        calls = [partial(call_in, database, CALL) for _ in range(3)]
        many = [
            *(ignoring(call) for call in calls),
            lambda one: [one.run_job("expire_grants").outcome for _ in range(9)],
        ]
        together(database, many)
        call_in(database, CALL)
        outcomes = [row.outcome for row in ledger.list_job_runs(name="expire_grants")]
        assert outcomes[-1] == "lost"
        assert set(outcomes[:-1]) == {"done"}
        assert sum(row.rows_done for row in ledger.list_job_runs(name="expire_grants")) == 12
        assert len(ledger.table("entries", "kind = 'expire'")) == 12
        assert {row.state for row in ledger.list_jobs()} <= {"waiting", "due"}
        assert_sound(ledger)


def test_a_claim_is_not_lost_to_who_looked_for_work_beside(database: Database) -> None:
    """His look at the row may lock it, although it is no longer free when he gets it."""
    with committed(database) as ledger, database.admin() as admin, ThreadPoolExecutor(1) as pool:
        ledger.change("update credits.jobs set next_run_at = %s", datetime.now(UTC) - MINUTE)
        (claim,) = ledger.claim_job("one")

        def run() -> Any:
            with database.connect(autocommit=True) as conn:
                return Client(conn).run_job(claim.name, run_id=claim.run_id)

        with database.connect("credits_owner") as other:
            other.execute("select from credits.jobs j where j.name = %s for no key update", [claim.name])
            running = pool.submit(run)
            waiting(admin, "run_job")
        assert running.result().outcome == "done"


def ignoring(call: Callable[[], None]) -> Callable[[Client], None]:
    return lambda _: call()


def call_in(database: Database, statement: str) -> None:
    """A statement by the service, outside of any transaction."""
    with database.connect(autocommit=True) as conn:
        conn.execute(statement.encode())


def test_live_traffic_is_not_stopped(database: Database) -> None:
    """An account that is locked is passed over, one that a batch has locked is free with its commit."""
    with committed(database) as ledger, database.connect() as busy:
        due(ledger, 3, batch=50)
        busy.execute("select 1")  # a transaction, in which the verb is a savepoint
        Client(busy).freeze_account("a1")
        assert ledger.run_job("expire_grants").rows_done == 2
        busy.rollback()
        assert ledger.run_job("expire_grants").rows_done == 1
        # One batch, then the time is over.
        ledger.change("update credits.jobs set next_run_at = clock_timestamp() - interval '1 minute'")
        ledger.conn.execute("call credits.work_jobs(time_limit => '0 seconds', runner => 'brief')")
        assert len([row for row in ledger.list_job_runs() if row.runner == "brief"]) == 1


def test_spenders_and_runners_meet_as_grants_end(database: Database) -> None:
    """Everybody at the same accounts, before and after the moment: each grant ends once, and each spend counts once."""
    names, until = [f"a{number}" for number in range(25)], datetime.now(UTC) + timedelta(seconds=3)

    def spends(ledger: Ledger, seed: int) -> int:
        dice, done = random.Random(seed), 0
        while datetime.now(UTC) < until + timedelta(seconds=1):
            name, key = dice.choice(names), f"{seed}:{done}"
            verb = dice.choice((ledger.spend, partial(ledger.reserve, reservation_id=key)))
            verb(name, 1, **({"key": key} if verb == ledger.spend else {"ttl": dice.randint(1, 3) * SECOND}))
            done += 1
        return done

    def runs_jobs(ledger: Ledger) -> int:
        ended = 0
        while datetime.now(UTC) < until + timedelta(seconds=2):
            ended += ledger.run_job("expire_grants").rows_done
        return ended

    with committed(database) as ledger:
        ledger.change("update credits.jobs set batch_size = 2 where name = 'expire_grants'")
        for place, name in enumerate(names):
            ledger.open(name, 10_000, kind="purchase")
            ledger.grant(1000, name, kind="promo", expires_at=until - timedelta(milliseconds=40 * place))
        results = together(database, [*(partial(spends, seed=seed) for seed in range(3)), runs_jobs, runs_jobs])
        assert not [result for result in results if isinstance(result, Exception)]
        assert min(results[:3]) > 10
        assert sum(results[3:]) > 0
        ends = ledger.table("entries", "kind = 'expire'")
        assert {len(row.grant_ids) for row in ends} == {1}
        assert not ledger.table("grants", "expires_at < credits.now() and status = 'active'")
        assert_sound(ledger)


def test_the_door_and_the_command_line(database: Database) -> None:
    with committed(database) as ledger:
        due(ledger, 2, batch=1)
        with Door(database.dsn, role="credits_service", jobs=True):
            for _ in range(500):
                ran = {row.outcome for row in ledger.list_job_runs()}
                if ran == {"done"} and runs(ledger, "expire_grants") == [("done", 2, 2)]:
                    break
                time.sleep(0.02)
            assert runs(ledger, "expire_grants") == [("done", 2, 2)]
        listed = invoke("list", database)
        assert all(name in listed.stdout for name in JOBS), listed.stdout
        assert invoke("run", database, "audit").stdout == "audit: done, 0\n"
        ledger.change(BROKEN + "$$ begin raise 'out of order'; end $$")
        ledger.change(
            "update credits.jobs set next_run_at = clock_timestamp() where name in ('expire_grants', 'audit')"
        )
        result = invoke("run", database)
        lines = set(result.stdout.splitlines())
        assert result.exit_code == 1
        assert {"audit: done, 0", "expire_grants: failed, 0 out of order"} <= lines  # and what this minute brings
        assert not [line for line in lines if "failed" in line and not line.startswith("expire_grants")]
        with pytest.raises(psycopg.Error, match="cron_unavailable") as caught:
            invoke("schedule", database)
        assert str(caught.value.diag.message_hint).startswith("It lives in one database of a server")
        with pytest.raises(psycopg.Error) as caught:
            ledger.conn.execute("select credits.schedule_jobs()")
        assert caught.value.sqlstate == "PT409"


def test_before_the_schema_is_there_the_log_says_so_in_one_line(
    empty_database: Database, caplog: pytest.LogCaptureFixture
) -> None:
    class Once(asyncio.Event):
        async def wait(self) -> Literal[True]:
            self.set()
            return True

    async def tick() -> None:
        database = Pool(empty_database.dsn)
        await database.open()
        await ticker.run(database, Once())
        await database.close()

    asyncio.run(tick())
    assert caplog.messages == ["no jobs done: the schema is not there; run: pgcredits migrate"]


def invoke(command: str, database: Database, *arguments: str) -> Result:
    """`pgcredits jobs …` in this process."""
    return CliRunner().invoke(cli, ["jobs", command, *arguments, "--dsn", database.dsn], catch_exceptions=False)


BACKLOG = """
select (select count(*) from credits.grants g where g.status in ('pending', 'active')
           and case when g.status = 'pending' then g.effective_at else g.expires_at end <= credits.now())
     + (select count(*) from credits.reservations r where r.status = 'open' and r.expires_at <= credits.now())
     + (select count(*) from credits.subscriptions s where least(s.period_end, s.pending_at) <= credits.now()) as due"""


def test_a_year_by_the_jobs_changes_no_balance_and_leaves_no_backlog(ledger: Ledger) -> None:
    dice = random.Random(8)
    ledger.change(
        "insert into credits.plans (code, name, monthly_credits, rollover)"
        " values ('small', 'Small', 100, 'none'), ('big', 'Big', 200, 'none'), ('all', 'All', 50, 'all')"
    )
    accounts = [
        ledger.open_account(f"y{number}", plan=("small", "big", "all")[number % 3]).account_id for number in range(9)
    ]
    plain = [
        account for number, account in enumerate(accounts) if number % 3 < 2
    ]  # what rolls over is seen when booked
    end = NOON + 365 * DAY
    while ledger.now < end:
        for account in dice.sample(accounts, 2):
            ledger.grant(dice.randint(1, 9), account, expires_at=ledger.now + dice.randint(1, 90) * DAY)
            ledger.grant(3, account, effective_at=ledger.now + dice.randint(1, 40) * DAY)
            ledger.reserve(account, dice.randint(1, 9), ledger.key(), ttl=dice.randint(1, 86400) * SECOND)
            ledger.use(dice.randint(1, 20), account)
        if dice.random() < 0.3:
            ledger.change_plan(dice.choice(plain), dice.choice(["small", "big"]), at="period_end")
        ledger.now += dice.choice([6 * HOUR, 30 * DAY, 45 * DAY])
        before = [ledger.get_balance(account)[:8] for account in plain]
        while any(row.more for row in ledger.run_due_jobs()):
            pass
        assert [ledger.get_balance(account)[:8] for account in plain] == before
        with ledger.as_owner():
            assert ledger.query(BACKLOG)[0].due == 0
    assert {row.failures for row in ledger.list_jobs()} == {0}
    assert told(ledger, "booking_failed") == []
    assert_sound(ledger)
