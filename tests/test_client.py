"""`pgcredits.usage`: the hold is there while the work runs, and afterwards never more than what it should be."""

import asyncio
import logging
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any

import asyncpg
import psycopg
import pytest
import sqlalchemy
from ledger_support import Ledger, assert_sound, committed, refused
from psycopg import AsyncConnection, Connection
from psycopg.conninfo import conninfo_to_dict, make_conninfo
from psycopg_pool import AsyncConnectionPool, ConnectionPool
from servers import Database, Engine, until

import pgcredits
from pgcredits import CreditsError, client

SERVICE = "-c role=credits_service"
SHORT = timedelta(seconds=1)
CATALOGUE = """
insert into credits.plans (code, name, monthly_credits) values ('pro', 'Pro', 0), ('free', 'Free', 0);
insert into credits.capabilities (code, name, unit) values
  ('chapter', 'Chapter', 'words'), ('outline', 'Outline', 'unit');
insert into credits.quality_levels (code, name, display_order) values ('draft', 'Draft', 1), ('best', 'Best', 2);
insert into credits.models (code, name) values ('small', 'Small'), ('large', 'Large');
insert into credits.plan_capabilities values ('pro', 'chapter'), ('free', 'outline');
insert into credits.plan_qualities values
  ('pro', 'chapter', 'draft', 'small', 1), ('pro', 'chapter', 'best', 'large', 1);
insert into credits.plan_limits (plan, capability, measure, period, maximum) values
  ('free', 'outline', 'calls', 'day', 1);
insert into credits.rates (capability, price) values
  ('chapter', '{"lines":[{"unit":"words","credits":0.1,"rounding":"half_up","decimals":6}]}'),
  ('outline', '{"lines":[{"flat":5,"rounding":"half_up","decimals":6}]}');
"""

# Much faster than a database for each test, or a truncate. As replica no foreign key is asked.
EMPTY = """
set session_replication_role = replica;
do $$ declare v_table regclass; begin
  for v_table in
    select c.oid from pg_class c join pg_attribute a on a.attrelid = c.oid and a.attname = 'account_id'
     where c.relnamespace = 'credits'::regnamespace and c.relkind in ('r', 'p') and not c.relispartition
  loop
    execute format('delete from %s', v_table);
  end loop;
end $$;
delete from chapters;
"""


@pytest.fixture(scope="module")
def market(server: Engine) -> Iterator[Database]:
    """A database with a small catalogue and a table of the product's own."""
    with server.database() as database:
        with database.connect("credits_owner") as owner:
            owner.execute(CATALOGUE)
        with psycopg.connect(database.dsn) as product:
            product.execute("create table chapters (book_id integer, body text)")
            product.execute("grant all on chapters to credits_service")
        yield database


@pytest.fixture
def shop(market: Database) -> Iterator[Ledger]:
    """Two accounts: alpha on pro with 500 credits, beta on free with 20.

    Afterwards nothing is left open, and all is sound.
    """
    threads = set(threading.enumerate())
    with market.admin() as admin:
        admin.execute(EMPTY)
    with committed(market) as ledger:
        for account_id, plan, amount in (("alpha", "pro", 500), ("beta", "free", 20)):
            ledger.open_account(account_id, plan=plan)
            ledger.grant(amount, account_id)
        yield ledger
        assert set(threading.enumerate()) <= threads
        assert_sound(ledger)
        deadline, others = time.monotonic() + 5, [()]
        while others and time.monotonic() < deadline:  # a session ends a moment after its connection is closed
            others = ledger.query(
                "select query from pg_stat_activity where datname = current_database()"
                " and backend_type = 'client backend' and pid <> pg_backend_pid()"
            )
        assert not others


@pytest.fixture(params=[True, False], ids=["autocommit", "transactions"])
def given(request: pytest.FixtureRequest, shop: Ledger, market: Database) -> Iterator[Connection[Any]]:
    """The product's connection, of both kinds."""
    with market.connect(autocommit=request.param) as conn:
        yield conn


@pytest.fixture
def plain(shop: Ledger, market: Database) -> Iterator[Connection[Any]]:
    """The product's connection, as psycopg makes it."""
    with market.connect() as conn:
        yield conn


async def connected(database: Database, *, autocommit: bool = False) -> AsyncConnection[Any]:
    return await AsyncConnection.connect(database.dsn, autocommit=autocommit, options=SERVICE)


def status(ledger: Ledger, usage_id: str) -> str:
    text: str = ledger.get_reservation("alpha", usage_id).status
    return text


def runs_out(ledger: Ledger, usage_id: str) -> Any:
    return ledger.table("reservations", "reservation_id = %s", usage_id)[0].expires_at


def held(ledger: Ledger) -> Any:
    return ledger.get_balance("alpha").held


def terminate(ledger: Ledger, conn: Connection[Any] | AsyncConnection[Any]) -> None:
    """End the session of a connection, and wait until it has ended."""
    with ledger.as_owner():
        ledger.conn.execute("set role none")
        ledger.conn.execute("select pg_terminate_backend(%s, 5000)", [conn.info.backend_pid])


def chapters(ledger: Ledger) -> list[str]:
    return [row.body for row in ledger.query("select body from chapters")]


@contextmanager
def left_by(error: type[BaseException]) -> Iterator[None]:
    """The block is left by this error."""
    with pytest.raises(error):
        yield


@contextmanager
def locked(database: Database) -> Iterator[None]:
    """Another session has alpha's account locked."""
    with database.connect() as other:
        other.execute("select credits.spend('alpha', 1, key => 'other')")
        yield
        other.rollback()


# Settled -------------------------------------------------------------------------------------------------------------


def test_what_was_used_is_charged(given: Connection[Any], shop: Ledger) -> None:
    with pgcredits.usage(given, "alpha", "chapter", 1200, quality="best", subject="book:42") as u:
        assert (u.model, u.quality, u.replayed) == ("large", "best", False)
        assert u.amount == 120
        assert shop.sums() == (380, 120, 500, 0)  # committed: another session sees it
        assert given.info.transaction_status == psycopg.pq.TransactionStatus.IDLE
        settled: Any = u.settle(1000)
        assert (settled.charged, settled.released, settled.units, settled.model) == (100, 20, 1000, "large")
        assert shop.sums() == (400, 0, 400, 0)
        assert u.settled is settled
    assert shop.sums() == (400, 0, 400, 0)
    assert [(row.kind, row.subject) for row in shop.history("alpha", max_rows=1)] == [("settle", "book:42")]


def test_two_threads_at_once_on_one_connection_are_told_so(
    plain: Connection[Any], shop: Ledger, market: Database
) -> None:
    waiting = "select 1 from pg_stat_activity where datname = current_database() and wait_event_type = 'Lock'"
    with (
        ThreadPoolExecutor(1) as pool,
        pgcredits.usage(plain, "alpha", "chapter", 1200) as u,
        pgcredits.usage(plain, "alpha", "chapter", 1200) as v,
    ):
        with locked(market):
            settling = pool.submit(u.settle, 1000)
            with market.admin() as admin:
                until(lambda: admin.execute(waiting).fetchone())
            with pytest.raises(psycopg.errors.ActiveSqlTransaction, match="another thread"):
                v.settle(500)
        assert settling.result().charged == 100
        assert plain.info.transaction_status == psycopg.pq.TransactionStatus.IDLE
        assert v.settle(500).charged == 50
    assert shop.sums() == (350, 0, 350, 0)


@pytest.mark.parametrize("end", ["commit", "roll back"])
def test_the_charge_is_committed_or_rolled_back_with_the_rows_of_the_product(
    end: str, given: Connection[Any], shop: Ledger
) -> None:
    def work() -> None:
        with pgcredits.usage(given, "alpha", "chapter", 1200) as u, given.transaction():
            given.execute("insert into chapters (body) values ('once upon a time')")
            u.settle(1000)
            assert held(shop) == 120
            if end == "roll back":
                raise LookupError

    if end == "commit":
        work()
        assert (chapters(shop), shop.sums()) == (["once upon a time"], (400, 0, 400, 0))
    else:
        with pytest.raises(LookupError):
            work()
        assert (chapters(shop), shop.sums()) == ([], (500, 0, 500, 0))  # and the hold was given back


def test_a_charge_that_was_committed_stays_when_the_body_fails_later(plain: Connection[Any], shop: Ledger) -> None:
    with left_by(LookupError), pgcredits.usage(plain, "alpha", "chapter", 1200) as u:
        with plain.transaction():
            u.settle(1000)
        raise LookupError
    assert shop.sums() == (400, 0, 400, 0)


def test_a_charge_that_was_rolled_back_can_be_made_again(plain: Connection[Any], shop: Ledger) -> None:
    with pgcredits.usage(plain, "alpha", "chapter", 1200) as u:
        with plain.transaction():
            u.settle(1000)
            raise psycopg.Rollback
        assert u.settle(1000).replayed is False
    assert shop.sums() == (400, 0, 400, 0)


def test_leaving_without_settle_charges_what_was_announced(given: Connection[Any], shop: Ledger) -> None:
    with pgcredits.usage(given, "alpha", "chapter", 1200) as u:
        assert u.settled is None
    assert u.settled
    assert u.settled.charged == 120
    assert shop.sums() == (380, 0, 380, 0)


def test_leaving_with_an_open_transaction_settles_in_it(plain: Connection[Any], shop: Ledger) -> None:
    with pgcredits.usage(plain, "alpha", "chapter", 1200):
        plain.execute("insert into chapters (body) values ('open')")
    assert held(shop) == 120
    plain.commit()
    assert (chapters(shop), shop.sums()) == (["open"], (380, 0, 380, 0))


def test_settling_twice_is_for_sql_to_judge(plain: Connection[Any], shop: Ledger) -> None:
    with pgcredits.usage(plain, "alpha", "chapter", 1200) as u:
        first = u.settle(1000)
        assert u.settle(1000) == first._replace(replayed=True)
        with refused(409, "idempotency_conflict"):
            u.settle(1001)
        with refused(409, "reservation_closed"):
            u.release()
    assert shop.sums() == (400, 0, 400, 0)


def test_a_settle_that_is_refused_leaves_the_transaction_and_the_hold(plain: Connection[Any], shop: Ledger) -> None:
    with pgcredits.usage(plain, "alpha", "chapter", 1000) as u, plain.transaction():
        plain.execute("insert into chapters (body) values ('long')")
        with refused(402, "insufficient_credits"):
            u.settle(9000, on_overage="reject")
        settled: Any = u.settle(9000, metadata={"attempt": 2})
        assert (settled.actual, settled.charged, settled.uncollected) == (900, 500, 400)
    assert (chapters(shop), shop.sums()) == (["long"], (0, 0, 0, 0))


def test_units_are_exact_by_number_and_by_name(plain: Connection[Any], shop: Ledger) -> None:
    with pgcredits.usage(plain, "alpha", "chapter", {"words": Decimal("0.3")}, metadata={"of": [1]}) as u:
        assert u.amount == Decimal("0.03")
        settled: Any = u.settle({"words": Decimal("1E+2")})
    assert (settled.charged, settled.unit_counts) == (10, {"words": 100})
    with pgcredits.usage(plain, "alpha", "chapter", Decimal("0.1")) as u:
        settled = u.settle({"words": Decimal("0.2")})
    assert (settled.charged, settled.unit_counts) == (Decimal("0.02"), {"words": Decimal("0.2")})


def test_units_that_are_not_exact_are_refused(plain: Connection[Any], shop: Ledger) -> None:
    inexact: list[Any] = [1.5, True, "12", {"words": 1.5}]
    for units in inexact:
        with pytest.raises(TypeError, match="units must be an int or a Decimal"):
            pgcredits.usage(plain, "alpha", "chapter", units)
        with left_by(TypeError), pgcredits.usage(plain, "alpha", "chapter", 1) as u:
            u.settle(units)
    assert shop.sums() == (500, 0, 500, 0)


def test_a_usage_that_was_authorized_before_goes_on(plain: Connection[Any], shop: Ledger) -> None:
    shop.conn.execute("select credits.authorize_usage('alpha', 'chapter', 1200, usage_id => 'job_1', ttl => '900 s')")
    with pgcredits.usage(plain, "alpha", "chapter", 1200, usage_id="job_1") as u:
        assert (u.replayed, u.usage_id) == (True, "job_1")
        u.settle(1000)
    assert shop.sums() == (400, 0, 400, 0)


# Released ------------------------------------------------------------------------------------------------------------


def test_any_exception_gives_the_hold_back(given: Connection[Any], shop: Ledger) -> None:
    for kind in (LookupError, KeyboardInterrupt, SystemExit, GeneratorExit, asyncio.CancelledError):
        error = kind()
        with pytest.raises(kind) as caught, pgcredits.usage(given, "alpha", "chapter", 1200) as u:
            raise error
        assert caught.value is error
        released: Any = u.released
        assert (released.status, released.released, status(shop, u.usage_id)) == ("released", 120, "released")
    assert shop.sums() == (500, 0, 500, 0)


def test_a_stream_that_nobody_reads_on_gives_the_hold_back(plain: Connection[Any], shop: Ledger) -> None:
    def stream() -> Generator[str, None, None]:
        with pgcredits.usage(plain, "alpha", "chapter", 1200) as u:
            yield u.usage_id
            yield "never read"

    words = stream()
    usage_id = next(words)
    words.close()
    assert status(shop, usage_id) == "released"


def test_release_in_the_body_ends_it(plain: Connection[Any], shop: Ledger) -> None:
    with pgcredits.usage(plain, "alpha", "chapter", 1200) as u:
        released: Any = u.release("nothing was written")
        assert (released.status, released.released) == ("released", 120)
        assert u.released is released
    with left_by(LookupError), pgcredits.usage(plain, "alpha", "chapter", 1200) as u, plain.transaction():
        u.release("the transaction is rolled back")
        raise LookupError
    assert status(shop, u.usage_id) == "released"
    assert shop.sums() == (500, 0, 500, 0)


def test_a_failed_transaction_is_no_obstacle(plain: Connection[Any], shop: Ledger) -> None:
    with left_by(psycopg.errors.DivisionByZero), pgcredits.usage(plain, "alpha", "chapter", 1200):
        plain.execute("select 1 / 0")
    assert plain.info.transaction_status == psycopg.pq.TransactionStatus.INERROR
    plain.rollback()
    with left_by(psycopg.errors.DivisionByZero), pgcredits.usage(plain, "alpha", "chapter", 1200) as u:
        plain.execute("insert into chapters (body) values ('lost')")
        u.settle(1000)
        plain.execute("select 1 / 0")
    assert (u.settled, bool(u.released)) == (None, True)  # the charge was undone
    assert shop.sums() == (500, 0, 500, 0)


def test_an_open_transaction_is_no_obstacle(plain: Connection[Any], shop: Ledger) -> None:
    with left_by(LookupError), pgcredits.usage(plain, "alpha", "chapter", 1200):
        plain.execute("insert into chapters (body) values ('open')")
        raise LookupError
    assert held(shop) == 0
    plain.commit()
    assert chapters(shop) == ["open"]


def test_an_open_charge_is_the_callers_to_commit(plain: Connection[Any], shop: Ledger) -> None:
    with left_by(LookupError), pgcredits.usage(plain, "alpha", "chapter", 1200) as u:
        plain.execute("insert into chapters (body) values ('open')")
        u.settle(1000)
        raise LookupError
    plain.commit()
    assert (chapters(shop), shop.sums()) == (["open"], (400, 0, 400, 0))


def test_a_broken_connection_is_no_obstacle(given: Connection[Any], shop: Ledger) -> None:
    with left_by(LookupError), pgcredits.usage(given, "alpha", "chapter", 1200) as u:
        terminate(shop, given)  # which the client has not noticed yet
        raise LookupError
    assert status(shop, u.usage_id) == "released"


def test_a_connection_that_breaks_in_the_body_is_no_obstacle(plain: Connection[Any], shop: Ledger) -> None:
    with left_by(psycopg.OperationalError), pgcredits.usage(plain, "alpha", "chapter", 1200) as u:
        terminate(shop, plain)
        plain.execute("select 1")
    assert status(shop, u.usage_id) == "released"
    assert plain.closed


def test_a_connection_that_the_body_closed_is_no_obstacle(plain: Connection[Any], shop: Ledger) -> None:
    with left_by(LookupError), pgcredits.usage(plain, "alpha", "chapter", 1200) as u:
        plain.close()
        raise LookupError
    assert status(shop, u.usage_id) == "released"


def test_a_settle_whose_outcome_is_unknown_is_not_undone(
    plain: Connection[Any], shop: Ledger, market: Database
) -> None:
    with (
        left_by(psycopg.OperationalError),
        pgcredits.usage(plain, "alpha", "chapter", 1200) as u,
        locked(market),
    ):
        threading.Timer(0.3, terminate, [shop, plain]).start()
        u.settle(1000)
    assert status(shop, u.usage_id) == "open"
    with market.connect() as again:  # whoever finds out may settle it still
        assert Ledger(again, at=None).row("settle_usage", account_id="alpha", usage_id=u.usage_id).charged == 120


def test_the_bodys_own_lock_costs_a_warning_and_not_its_exception(
    plain: Connection[Any], shop: Ledger, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pgcredits.client.LOCK_WAIT", "100ms")
    with left_by(LookupError), pgcredits.usage(plain, "alpha", "chapter", 1200) as u:
        plain.execute("select credits.spend('alpha', 1, key => 'spend')")
        raise LookupError
    (record,) = caplog.records
    assert (record.name, record.levelno) == ("pgcredits.client", logging.WARNING)
    assert "could not release the hold" in record.message
    plain.rollback()
    assert status(shop, u.usage_id) == "open"  # until it runs out


def test_the_connection_beside_is_made_as_the_given_one_was(shop: Ledger, market: Database) -> None:
    """Password and role included: this login may do nothing but become credits_service."""
    login = f"{market.name}_backend"
    with market.admin() as admin:
        admin.execute(f"create role {login} login noinherit password 'secret'".encode())
        admin.execute(f"grant credits_service to {login}".encode())
    try:
        dsn = make_conninfo(market.dsn, user=login, password="secret", options=SERVICE)
        with left_by(LookupError), psycopg.connect(dsn) as conn, pgcredits.usage(conn, "alpha", "chapter", 1200) as u:
            conn.execute("select 1")
            raise LookupError
        assert status(shop, u.usage_id) == "released"
    finally:
        with market.admin() as admin:
            admin.execute(f"drop role {login}".encode())


def test_a_process_that_is_killed_leaves_a_hold_that_runs_out(shop: Ledger, market: Database) -> None:
    program = """
import sys, time, psycopg, pgcredits
from datetime import timedelta
with psycopg.connect(sys.argv[1]) as conn:
    with pgcredits.usage(conn, "alpha", "chapter", 1200, ttl=timedelta(seconds=1)) as u:
        time.sleep(0.7)
        print(u.usage_id, flush=True)
        time.sleep(60)
"""
    with subprocess.Popen([sys.executable, "-c", program, market.dsn], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        usage_id = process.stdout.readline().strip()
        os.kill(process.pid, signal.SIGKILL)
    assert (status(shop, usage_id), held(shop)) == ("open", 120)
    until(lambda: not held(shop), 5)
    assert (status(shop, usage_id), shop.sums()) == ("expired", (500, 0, 500, 0))


# Refused -------------------------------------------------------------------------------------------------------------


def test_a_refusal_says_what_is_missing_and_leaves_nothing(plain: Connection[Any], shop: Ledger) -> None:
    with pgcredits.usage(plain, "beta", "outline"):
        pass

    def work(account_id: str, capability: str, units: int | None = None, quality: str | None = None) -> None:
        with pgcredits.usage(plain, account_id, capability, units, quality=quality):
            pytest.fail("it was to be refused")

    with shop.unchanged():
        with refused(402, "insufficient_credits", required=500.1, available=500):
            work("alpha", "chapter", 5001)
        with refused(403, "plan_required", plans=["pro"]):
            work("beta", "chapter", 1)
        with pytest.raises(CreditsError) as caught:
            work("beta", "outline")
    error = caught.value
    assert (error.status, error.code) == (429, "rate_limited")
    assert (error.detail["limit"], error.detail["used"]) == (1, 1)
    assert error.detail["resets_at"]
    assert error.hint == "Try again at detail.resets_at."
    assert isinstance(error.__cause__, psycopg.Error)
    assert error.__cause__.sqlstate == "PT429"


def test_an_error_can_be_sent_to_another_process() -> None:
    error = CreditsError(402, "insufficient_credits", {"required": Decimal("0.1")}, "Top up.")
    again = pickle.loads(pickle.dumps(error))  # noqa: S301 - our own
    assert (again.status, again.code, again.detail, again.hint) == (402, error.code, error.detail, error.hint)
    assert str(again) == str(error)


def test_a_usage_cannot_begin_in_a_transaction(given: Connection[Any], shop: Ledger) -> None:
    with shop.unchanged():
        with pytest.raises(psycopg.errors.ActiveSqlTransaction, match="INTRANS"), given.transaction():
            pgcredits.usage(given, "alpha", "chapter", 1200).__enter__()
        with pytest.raises(psycopg.errors.ActiveSqlTransaction, match="pipeline"), given.pipeline():
            pgcredits.usage(given, "alpha", "chapter", 1200).__enter__()


def test_what_is_no_connection_is_refused(plain: Connection[Any], shop: Ledger) -> None:
    with pytest.raises(TypeError, match="Connection or ConnectionPool of psycopg, not str"):
        pgcredits.usage("postgresql://", "alpha", "chapter")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="AsyncConnection or AsyncConnectionPool of psycopg, not Connection"):
        pgcredits.usage_async(plain, "alpha", "chapter")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="account_id must be a str, not int"):
        pgcredits.usage(plain, 42, "chapter")  # type: ignore[arg-type]


def test_other_errors_of_the_database_pass(plain: Connection[Any], shop: Ledger) -> None:
    with left_by(psycopg.errors.DataError), pgcredits.usage(plain, "alpha", "chapter", {"words": Decimal("NaN")}):
        pytest.fail("it was to be refused")


# Extended ------------------------------------------------------------------------------------------------------------


class Unrenewed(pgcredits.Usage):
    """A usage whose renewal does nothing."""

    def _renew(self) -> None:
        pass


def test_a_hold_outlives_its_ttl_while_the_work_runs(shop: Ledger, market: Database) -> None:
    with (
        market.connect() as one,
        market.connect() as other,
        pgcredits.usage(one, "alpha", "chapter", 100, ttl=SHORT) as u,
        Unrenewed(other, "alpha", "chapter", 100, ttl=SHORT) as unrenewed,
    ):
        one.execute("select 1")  # the renewal minds no open transaction
        time.sleep(1.7)
        assert (status(shop, u.usage_id), status(shop, unrenewed.usage_id)) == ("open", "expired")
        one.rollback()
        assert (u.settle(50).late, unrenewed.settle(50).late) == (False, True)
    assert shop.sums() == (490, 0, 490, 0)


def test_a_renewal_that_fails_is_tried_again(
    plain: Connection[Any], shop: Ledger, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pgcredits.client.LOCK_WAIT", "50ms")
    with pgcredits.usage(plain, "alpha", "chapter", 100, ttl=4 * SHORT) as u:
        deadline = runs_out(shop, u.usage_id)
        plain.execute("select credits.spend('alpha', 1, key => 'spend')")  # the account is locked
        until(lambda: caplog.records)
        plain.commit()
        until(lambda: runs_out(shop, u.usage_id) > deadline)
        assert status(shop, u.usage_id) == "open"
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    assert "could not extend the hold" in caplog.text


def test_a_renewal_ends_when_the_hold_is_closed(
    plain: Connection[Any], shop: Ledger, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    with pgcredits.usage(plain, "alpha", "chapter", 100, ttl=SHORT / 4) as u:
        shop.release("alpha", u.usage_id)
        time.sleep(0.4)
        assert len(caplog.records) == 1
        with refused(409, "reservation_closed"):
            u.settle()
        u.release()


# Pools ---------------------------------------------------------------------------------------------------------------


def test_a_pool_lends_a_connection_for_each_call_only(shop: Ledger, market: Database) -> None:
    with ConnectionPool(market.dsn, min_size=1, max_size=1, kwargs={"options": SERVICE}, timeout=5, open=True) as pool:
        with pgcredits.usage(pool, "alpha", "chapter", 1200) as u, pool.connection() as conn:
            conn.execute("select 1")  # it is the only one
        assert shop.sums() == (380, 0, 380, 0)
        with left_by(LookupError), pgcredits.usage(pool, "alpha", "chapter", 1200) as u:
            raise LookupError
        assert status(shop, u.usage_id) == "released"
        with pgcredits.usage(pool, "alpha", "chapter", 100, ttl=SHORT / 2) as u:
            time.sleep(0.7)
            assert u.settle(50).late is False
        with refused(402, "insufficient_credits"), pgcredits.usage(pool, "alpha", "chapter", 9999):
            pytest.fail("it was to be refused")
    assert shop.sums() == (375, 0, 375, 0)


# Async ---------------------------------------------------------------------------------------------------------------


def test_async_settles_and_releases(shop: Ledger, market: Database) -> None:
    async def work(*, autocommit: bool) -> None:
        async with await connected(market, autocommit=autocommit) as conn:
            async with pgcredits.usage_async(conn, "alpha", "chapter", 1200, quality="best") as u:
                assert (u.model, held(shop)) == ("large", 120)
                async with conn.transaction():
                    await conn.execute("insert into chapters (body) values ('async')")
                    assert (await u.settle(100)).charged == 10
            async with pgcredits.usage_async(conn, "alpha", "chapter", {"words": 50}):
                pass
            async with pgcredits.usage_async(conn, "alpha", "chapter", 1200) as u:
                assert (await u.release("nothing written")).status == "released"
            for broken in ("select 1 / 0", "select pg_terminate_backend(pg_backend_pid())"):
                with left_by(psycopg.Error):
                    async with pgcredits.usage_async(conn, "alpha", "chapter", 1200) as u:
                        await conn.execute(broken.encode())
                assert status(shop, u.usage_id) == "released"
                if not conn.closed:
                    await conn.rollback()

    for number, autocommit in enumerate((True, False), 1):
        asyncio.run(work(autocommit=autocommit))
        available = 500 - 15 * number
        assert shop.sums() == (available, 0, available, 0)


def test_async_is_refused_as_sync_is(shop: Ledger, market: Database) -> None:
    async def work() -> None:
        async with await connected(market) as conn:
            with refused(402, "insufficient_credits", required=500.1, available=500):
                async with pgcredits.usage_async(conn, "alpha", "chapter", 5001):
                    pytest.fail("it was to be refused")
            async with conn.transaction():
                with pytest.raises(psycopg.errors.ActiveSqlTransaction):
                    await pgcredits.usage_async(conn, "alpha", "chapter", 1200).__aenter__()

    with shop.unchanged():
        asyncio.run(work())


@pytest.mark.parametrize("query", [None, b"select pg_sleep(60)"])
def test_a_cancelled_task_gives_the_hold_back_however_often_it_is_cancelled(
    query: bytes | None, shop: Ledger, market: Database
) -> None:
    async def work(begun: asyncio.Queue[str]) -> None:
        async with await connected(market) as conn, pgcredits.usage_async(conn, "alpha", "chapter", 1200) as u:
            await begun.put(u.usage_id)
            await (conn.execute(query) if query else asyncio.sleep(60))

    async def cancel(*, again: bool) -> None:
        begun: asyncio.Queue[str] = asyncio.Queue()
        task = asyncio.create_task(work(begun))
        usage_id = await begun.get()
        await asyncio.sleep(0.05)
        task.cancel()
        while again and not task.done():
            await asyncio.sleep(0.001)
            task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert status(shop, usage_id) == "released"
        assert asyncio.all_tasks() == {asyncio.current_task()}

    asyncio.run(cancel(again=False))
    if not query:  # psycopg itself needs a moment to end a statement in peace
        asyncio.run(cancel(again=True))
    assert shop.sums() == (500, 0, 500, 0)


def test_a_cancellation_that_comes_while_leaving_is_not_lost(shop: Ledger, market: Database) -> None:
    async def work(error: type[Exception] | None) -> None:
        async with await connected(market) as conn, pgcredits.usage_async(conn, "alpha", "chapter", 1200):
            task = asyncio.current_task()
            assert task
            asyncio.get_running_loop().call_soon(task.cancel)
            if error:
                raise error

    for error in (None, LookupError):
        with pytest.raises(asyncio.CancelledError):
            asyncio.run(work(error))
    assert shop.sums() == (380, 0, 380, 0)  # the work that was done is charged; the other one is given back


def test_a_settle_outlives_a_cancellation_by_so_much(
    shop: Ledger, market: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def work() -> None:
        async with await connected(market) as conn, pgcredits.usage_async(conn, "alpha", "chapter", 1200) as u:
            task = asyncio.current_task()
            assert task
            asyncio.get_running_loop().call_soon(task.cancel)
            await u.settle(1000)

    with pytest.raises(asyncio.CancelledError):
        asyncio.run(work())
    assert shop.sums() == (400, 0, 400, 0)
    monkeypatch.setattr("pgcredits.client.SETTLE_WAIT", 0.1)
    settle = client.AsyncUsage._settle  # noqa: SLF001

    async def blocked(usage: client.AsyncUsage, arguments: dict[str, Any]) -> None:
        with locked(market):
            await settle(usage, arguments)

    monkeypatch.setattr(client.AsyncUsage, "_settle", blocked)
    with pytest.raises(asyncio.CancelledError):
        asyncio.run(work())
    assert held(shop) == 120


@pytest.mark.parametrize("usage_id", [None, "job-7"])
@pytest.mark.parametrize("committed", [True, False])
def test_an_entering_that_is_interrupted_leaves_no_hold_that_nobody_knows(
    usage_id: str | None,
    committed: bool,
    plain: Connection[Any],
    shop: Ledger,
    market: Database,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    call, call_async = client._call, client._call_async  # noqa: SLF001

    def interrupted(conn: Any, function: str, *arguments: Any) -> Any:
        row = call(conn, function, *arguments) if committed or function != "authorize_usage" else None
        if function == "authorize_usage":
            raise KeyboardInterrupt
        return row

    async def cancelled(conn: Any, function: str, *arguments: Any) -> Any:
        row = await call_async(conn, function, *arguments) if committed or function != "authorize_usage" else None
        if function == "authorize_usage":
            raise asyncio.CancelledError
        return row

    async def work() -> None:
        async with (
            await connected(market) as conn,
            pgcredits.usage_async(conn, "alpha", "chapter", 1200, usage_id=usage_id),
        ):
            pytest.fail("entered")

    monkeypatch.setattr(client, "_call", interrupted)
    monkeypatch.setattr(client, "_call_async", cancelled)
    with left_by(KeyboardInterrupt), pgcredits.usage(plain, "alpha", "chapter", 1200, usage_id=usage_id):
        pytest.fail("entered")
    with left_by(asyncio.CancelledError):
        asyncio.run(work())
    assert held(shop) == (120 if committed and usage_id else 0)
    assert not caplog.records


def test_async_extends_the_hold_while_the_work_runs(shop: Ledger, market: Database) -> None:
    async def work() -> None:
        async with await connected(market) as conn:
            async with pgcredits.usage_async(conn, "alpha", "chapter", 100, ttl=SHORT) as u:
                await conn.execute("select 1")
                await asyncio.sleep(1.3)
                assert status(shop, u.usage_id) == "open"
            await conn.commit()
            assert asyncio.all_tasks() == {asyncio.current_task()}

    asyncio.run(work())
    assert shop.sums() == (490, 0, 490, 0)


def test_an_async_renewal_that_waits_for_a_lock_does_not_keep_the_body(shop: Ledger, market: Database) -> None:
    async def work() -> float:
        async with await connected(market) as conn:
            async with pgcredits.usage_async(conn, "alpha", "chapter", 100, ttl=SHORT / 2) as u:
                await conn.execute("select credits.spend('alpha', 1, key => 'spend')")
                await asyncio.sleep(0.4)
                await u.settle(50)
                left = time.monotonic()
            return time.monotonic() - left

    assert asyncio.run(work()) < 1
    assert shop.sums() == (494, 0, 494, 0)


def test_an_async_pool(shop: Ledger, market: Database) -> None:
    async def work() -> None:
        async with AsyncConnectionPool(
            market.dsn, min_size=1, max_size=1, kwargs={"options": SERVICE}, timeout=5, open=False
        ) as pool:
            async with pgcredits.usage_async(pool, "alpha", "chapter", 100, ttl=SHORT / 2) as u:
                await asyncio.sleep(0.7)
                assert (await u.settle(50)).late is False
            with left_by(LookupError):
                async with pgcredits.usage_async(pool, "alpha", "chapter", 1200) as u:
                    raise LookupError
            assert status(shop, u.usage_id) == "released"

    asyncio.run(work())
    assert shop.sums() == (495, 0, 495, 0)


# The page of the manual ----------------------------------------------------------------------------------------------

PAGE = (Path(__file__).resolve().parents[1] / "docs/usage.md").read_text()
BOOKS = [{"id": number, "owner": owner} for number, owner in enumerate(("alpha", "alpha", "beta"), 1)]


def example(section: str, number: int = 0) -> dict[str, Any]:
    """What a block of the page defines."""
    code = PAGE.split(f"## With {section}\n")[1].split("\n## ")[0].split("```python\n")[1 + number].split("```")[0]
    names: dict[str, Any] = {}
    exec(compile(code, f"docs/usage.md, {section}", "exec"), names)  # noqa: S102 - our own page
    return names


def generate(outline: str, model: str) -> tuple[str, int]:
    """The work: it fails without an outline."""
    assert model == "large"
    if not outline:
        raise LookupError
    return f"of {outline}", 1000


async def generate_later(outline: str, model: str) -> tuple[str, int]:
    return generate(outline, model)


def check_answers(shop: Ledger, answers: list[Any]) -> None:
    """One chapter was written and charged, one failed, and beta's plan has none."""
    written, refusal = answers
    assert written == {"status": 200, "charged": 100}
    assert refusal["status"] == 403
    assert refusal["why"] == "plan_required"
    assert (chapters(shop), shop.sums()) == (["of ideas"], (400, 0, 400, 0))


def test_the_page_with_psycopg(plain: Connection[Any], shop: Ledger) -> None:
    page = example("psycopg")
    write = page["write_chapter"]
    answers = [write(plain, BOOKS[0], "ideas", generate), write(plain, BOOKS[2], "ideas", generate)]
    with pytest.raises(LookupError):
        write(plain, BOOKS[1], "", generate)
    check_answers(shop, answers)
    assert answers[1]["plans"] == ["pro"]
    poor = CreditsError(402, "insufficient_credits", {"required": Decimal("2.5"), "available": 1})
    late = CreditsError(429, "rate_limited", {"resets_at": "2030-02-01T00:00:00+00:00"})
    assert page["answer"](poor)["missing"] == Decimal("1.5")
    assert page["answer"](late)["retry_at"].startswith("2030-02-01")


def test_the_page_with_psycopg_async(shop: Ledger, market: Database) -> None:
    async def work() -> None:
        write = example("psycopg", 1)["write_chapter"]
        async with AsyncConnectionPool(market.dsn, min_size=1, kwargs={"options": SERVICE}, open=False) as pool:
            assert await write(pool, BOOKS[0], "ideas", generate_later) == "of ideas"
            with refused(403, "plan_required"):
                await write(pool, BOOKS[2], "ideas", generate_later)

    asyncio.run(work())
    assert shop.sums() == (400, 0, 400, 0)


def test_the_page_with_a_stream_whose_reader_goes_away(shop: Ledger, market: Database) -> None:
    sent: list[bytes] = []
    read = asyncio.Event()

    async def generate(prompt: str, model: str | None) -> AsyncIterator[str]:
        for _ in range(10):
            yield f"{prompt} " * 100
            await asyncio.sleep(0.01)

    async def receive() -> dict[str, str]:
        await read.wait()
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        sent.append(message.get("body", b""))
        if len(sent) > 3:
            read.set()

    async def work() -> None:
        page = example("psycopg", 2)
        async with AsyncConnectionPool(market.dsn, min_size=1, kwargs={"options": SERVICE}, open=False) as pool:
            answer = await page["answer"](pool, "alpha", "word", generate)
            await answer({"type": "http"}, receive, send)
            with refused(403, "plan_required"):
                await page["answer"](pool, "beta", "word", generate)

    asyncio.run(work())
    words = b"".join(sent).count(b"word")
    assert 0 < words < 1000
    assert shop.sums() == (500 - words / 10, 0, 500 - words / 10, 0)


def test_the_page_with_sqlalchemy(shop: Ledger, market: Database) -> None:
    engine = sqlalchemy.create_engine("postgresql+psycopg://", creator=market.connect)
    write = example("SQLAlchemy")["write_chapter"]
    answers = [write(engine, BOOKS[0], "ideas", generate), write(engine, BOOKS[2], "ideas", generate)]
    with pytest.raises(LookupError):
        write(engine, BOOKS[1], "", generate)
    engine.dispose()
    check_answers(shop, answers)


def test_the_page_with_asyncpg(shop: Ledger, market: Database) -> None:
    async def work() -> list[Any]:
        write = example("asyncpg")["write_chapter"]
        where = conninfo_to_dict(market.dsn)
        async with asyncpg.create_pool(
            host=where["host"], port=where.get("port"), user=where["user"], password=where.get("password"),
            database=where["dbname"], min_size=1, server_settings={"role": "credits_service"},
        ) as pool:  # fmt: skip
            answers = [
                await write(pool, BOOKS[0], "ideas", generate_later),
                await write(pool, BOOKS[2], "ideas", generate_later),
            ]
            with pytest.raises(LookupError):
                await write(pool, BOOKS[1], "", generate_later)
        return answers

    check_answers(shop, asyncio.run(work()))


# The package ---------------------------------------------------------------------------------------------------------


def test_importing_it_brings_neither_the_door_nor_the_command_line() -> None:
    program = "import sys, pgcredits; print(*{'starlette', 'stripe', 'typer', 'uvicorn', 'yoyo'} & set(sys.modules))"
    answer = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert answer.stdout.strip() == ""
