"""The subscription cache: served while it is true, never a moment longer, and nobody waits for it."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from email.utils import format_datetime
from functools import partial
from itertools import count
from typing import Any

import psycopg
import pytest
from client import Client
from ledger_support import DAY, HOUR, MINUTE, NOON, SECOND, TICK, Ledger, committed, refused, together
from psycopg import Connection
from psycopg.types.json import Jsonb
from servers import Database

Json = dict[str, Any]
MOMENTS = {"period_start", "period_end", "trial_end", "cancel_at", "pending_at", "grace_until", "as_of"}
BEGAN = int(NOON.timestamp())
NUMBERS = count(1)
WAITING = "select 1 from pg_stat_activity where datname = current_database() and wait_event_type = 'Lock'"
IMPATIENT = "set lock_timeout = '2 s'"


def state(ledger: Client, account_id: str | None = "alpha") -> Json:
    """What the cache says."""
    value: Json = ledger.row("get_user_subscription_state", user_id=account_id)[0]
    return value


def cached(ledger: Client) -> bool:
    """Whether it is served from the cache."""
    value: bool = state(ledger)["cached"]
    return value


def truth(ledger: Client) -> Json:
    """The state as it is computed."""
    ((row,),) = ledger.conn.execute("select to_jsonb(s) from credits.get_subscription_state('alpha') s").fetchall()
    value: Json = row
    return value


def assert_true(ledger: Client, *, cached: bool) -> Json:
    """The cache says what is so; answers it."""
    found = state(ledger)
    assert found["cached"] is cached
    assert {name: value for name, value in found.items() if name not in {"cached", "refreshed_at"}} == truth(ledger)
    return found


def rows(ledger: Ledger) -> list[Any]:
    """The rows of the cache."""
    return ledger.table("subscription_cache")


def requests(ledger: Ledger) -> list[Any]:
    """What Stripe is asked."""
    return ledger.table("stripe_requests", "true order by request_id")


def subscription(status: str = "active", **changes: Any) -> Json:
    """A subscription of Stripe, monthly, which alpha pays for."""
    return {
        "id": "sub_1", "object": "subscription", "status": status, "customer": "cus_alpha", "livemode": False,
        "created": BEGAN, "billing_cycle_anchor": BEGAN, "current_period_start": BEGAN,
        "current_period_end": BEGAN + 28 * 86400, "cancel_at_period_end": False, "cancel_at": None, "trial_end": None,
        "ended_at": None, "pause_collection": None, "schedule": None, "metadata": {"account_id": "alpha"},
        "items": {"data": [{"id": "si_1", "quantity": 1, "price": "price_1"}]},
        **changes,
    }  # fmt: skip


def tell(ledger: Client, shown: Json, after: timedelta = timedelta(0), kind: str = "updated") -> str:
    """Stripe tells of it, some time after noon; the outcome."""
    family = "customer.subscription" if shown["object"] == "subscription" else shown["object"]
    event = {
        "id": f"evt_{next(NUMBERS)}", "object": "event", "type": f"{family}.{kind}", "livemode": False,
        "created": BEGAN + int(after.total_seconds()), "data": {"object": shown},
    }  # fmt: skip
    outcome: str = ledger.receive_stripe_event("default", json.dumps(event)).outcome
    return outcome


def prepare(ledger: Ledger, plan: str | None = None) -> None:
    """Plans, one of them sold by Stripe, and the account alpha."""
    ledger.conn.execute(IMPATIENT)
    ledger.load_demo_catalog()
    ledger.change("update credits.plans set stripe_price_ids = '{price_1}' where code = 'team'")
    ledger.open_account("alpha", plan=plan)


@pytest.fixture
def ledger(conn: Connection[Any]) -> Ledger:
    """The account alpha without a subscription."""
    ledger = Ledger(conn)
    prepare(ledger)
    return ledger


@pytest.fixture
def team(conn: Connection[Any]) -> Ledger:
    """The account alpha with a plan of our own."""
    ledger = Ledger(conn)
    prepare(ledger, "team")
    return ledger


@pytest.fixture
def stripe(ledger: Ledger) -> Ledger:
    """The account alpha with a subscription of Stripe."""
    assert tell(ledger, subscription(), kind="created") == "applied"
    return ledger


def test_a_state_is_computed_once_and_then_served(team: Ledger) -> None:
    first = assert_true(team, cached=False)
    assert (first["account_id"], first["state"], first["plan"], first["may_spend"]) == ("alpha", "active", "team", True)
    team.now += 2 * MINUTE
    again = assert_true(team, cached=True)
    assert again == {**first, "cached": True}


def test_an_account_without_a_subscription_has_a_state_too(ledger: Ledger) -> None:
    assert assert_true(ledger, cached=False)["state"] == "none"
    assert assert_true(ledger, cached=True)["state"] == "none"


def test_it_is_computed_anew_after_five_minutes(team: Ledger) -> None:
    state(team)
    team.now = NOON + 5 * MINUTE - TICK
    assert cached(team)
    team.now += TICK
    assert not cached(team)
    assert cached(team)


@pytest.mark.parametrize(("ttl", "after", "served"), [("1 hour", 59, True), ("1 minute", 1, False), ("0", 0, False)])
def test_the_time_is_a_setting(team: Ledger, ttl: str, after: int, served: bool) -> None:
    team.change("update credits.settings set value = to_jsonb(%s::text) where name = 'subscription_cache_ttl'", ttl)
    state(team)
    team.now += after * MINUTE
    assert cached(team) is served


@pytest.mark.parametrize("verb", ["get_user_subscription_state", "update_subscription_cache"])
def test_unknown_accounts_are_refused_and_not_counted(ledger: Ledger, verb: str) -> None:
    before = ledger.row("get_subscription_cache_status")
    with ledger.unchanged():
        with refused(404, "account_not_found", account_id="nobody"):
            ledger.row(verb, user_id="nobody")
        for wrong in (None, "", "a" * 201):
            with refused(400, "invalid_request", argument="account_id"):
                ledger.row(verb, user_id=wrong)
    assert ledger.row("get_subscription_cache_status") == before


def test_update_computes_now_and_stores(team: Ledger) -> None:
    state(team)
    team.now += 4 * MINUTE
    found: Json = team.row("update_subscription_cache", user_id="alpha")[0]
    assert (found["cached"], found["plan"]) == (False, "team")
    team.now += 4 * MINUTE
    assert state(team) == {**found, "cached": True}


def test_a_reader_in_another_time_zone_is_served_the_same_moments(team: Ledger) -> None:
    state(team)
    team.conn.execute("set local time zone 'Asia/Tokyo'")
    found = assert_true(team, cached=True)
    assert found["period_end"].endswith("+09:00")


def test_a_read_only_transaction_is_served_and_leaves_no_trace(database: Database) -> None:
    with committed(database) as ledger:
        prepare(ledger, "team")
        status = ledger.row("get_subscription_cache_status")
        ledger.conn.execute("set default_transaction_read_only = on")
        assert [cached(ledger), cached(ledger)] == [False, False]
        ledger.conn.execute("set default_transaction_read_only = off")
        assert ledger.row("get_subscription_cache_status") == status
        assert not cached(ledger)
        ledger.conn.execute("set default_transaction_read_only = on")
        assert cached(ledger)


# What changes a state ------------------------------------------------------------------------------------------------

CHANGES: dict[str, Callable[[Ledger], Any]] = {
    "another plan now": lambda ledger: ledger.change_plan("alpha", "free"),
    "another plan later": lambda ledger: ledger.change_plan("alpha", "free", at="period_end"),
    "canceled at the period's end": lambda ledger: ledger.cancel_plan("alpha"),
    "canceled now": lambda ledger: ledger.cancel_plan("alpha", at="now"),
    "a subscription of Stripe": lambda ledger: tell(ledger, subscription(), kind="created"),
    "a row changed by hand": lambda ledger: ledger.change("update credits.subscriptions set plan = 'free'"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_of_our_own_plan_shows_at_once(team: Ledger, change: str) -> None:
    before = state(team)
    CHANGES[change](team)
    after = assert_true(team, cached=False)
    assert after != {**before, "cached": False}
    assert_true(team, cached=True)


@pytest.mark.parametrize("change", [name for name in CHANGES if "hand" not in name])
def test_the_row_goes_in_the_transaction_of_the_change(team: Ledger, change: str) -> None:
    state(team)
    CHANGES[change](team)
    assert rows(team) == []


def test_resuming_and_a_first_plan_show_at_once(ledger: Ledger) -> None:
    assert state(ledger)["state"] == "none"
    ledger.change_plan("alpha", "team")
    assert assert_true(ledger, cached=False)["state"] == "active"
    ledger.cancel_plan("alpha")
    assert assert_true(ledger, cached=False)["state"] == "canceling"
    ledger.resume_plan("alpha")
    assert assert_true(ledger, cached=False)["state"] == "active"


def test_a_change_that_is_undone_leaves_the_row(team: Ledger) -> None:
    state(team)
    with team.unchanged(), refused(404, "plan_not_found"):
        team.change_plan("alpha", "platinum")
    with team.conn.transaction(force_rollback=True):
        team.change_plan("alpha", "free")
        assert state(team)["plan"] == "free"
    assert assert_true(team, cached=True)["plan"] == "team"


def test_a_change_of_another_account_changes_nothing_here(team: Ledger) -> None:
    team.open_account("beta", plan="team")
    assert not state(team, "beta")["cached"]
    assert not cached(team)
    team.change_plan("beta", "free")
    assert cached(team)


EVENTS: dict[str, Json] = {
    "past due": {"status": "past_due"},
    "unpaid": {"status": "unpaid"},
    "paused": {"status": "paused"},
    "to end": {"cancel_at_period_end": True, "cancel_at": BEGAN + 28 * 86400},
    "canceled": {"status": "canceled", "ended_at": BEGAN + 60},
    "renewed": {"current_period_start": BEGAN + 28 * 86400, "current_period_end": BEGAN + 59 * 86400},
    "not billed": {"pause_collection": {"behavior": "void"}},
    "the same again": {},
}


@pytest.mark.parametrize("event", EVENTS)
def test_an_event_shows_at_once(stripe: Ledger, event: str) -> None:
    before = state(stripe)
    assert tell(stripe, subscription(**EVENTS[event]), after=MINUTE) == "applied"
    after = assert_true(stripe, cached=False)
    assert (after["as_of"], after["status"]) == ("2030-01-31T12:01:00+00:00", EVENTS[event].get("status", "active"))
    assert after["as_of"] != before["as_of"]
    assert_true(stripe, cached=True)


def test_a_late_event_that_only_moves_the_grace_shows_at_once(stripe: Ledger) -> None:
    stripe.now += HOUR
    tell(stripe, subscription("past_due", latest_invoice="in_2"), after=HOUR)
    assert state(stripe)["grace_until"] == "2030-02-07T13:00:00+00:00"
    tell(stripe, subscription("past_due"), after=MINUTE)
    assert assert_true(stripe, cached=False)["grace_until"] == "2030-02-07T12:01:00+00:00"


def test_a_schedule_that_says_what_is_pending_shows_at_once(stripe: Ledger) -> None:
    stripe.change("update credits.plans set stripe_price_ids = '{price_free}' where code = 'free'")
    tell(stripe, subscription(schedule="sub_sched_1"), after=MINUTE)
    assert state(stripe)["pending_plan"] is None
    ends = BEGAN + 28 * 86400
    schedule = {
        "id": "sub_sched_1", "object": "subscription_schedule", "subscription": "sub_1", "customer": "cus_alpha",
        "status": "active", "current_phase": {"start_date": BEGAN, "end_date": ends},
        "phases": [
            {"start_date": BEGAN, "end_date": ends, "items": [{"price": "price_1"}]},
            {"start_date": ends, "items": [{"price": "price_free"}]},
        ],
    }  # fmt: skip
    assert tell(stripe, schedule, after=MINUTE, kind="created") == "applied"
    assert assert_true(stripe, cached=False)["pending_plan"] == "free"


# What time changes ---------------------------------------------------------------------------------------------------


def test_the_end_of_the_grace_is_not_outlived(stripe: Ledger) -> None:
    stripe.now += HOUR
    tell(stripe, subscription("past_due"), after=HOUR)
    stripe.now += 7 * DAY - MINUTE
    assert assert_true(stripe, cached=False)["may_spend"] is True
    stripe.now += MINUTE - TICK
    assert assert_true(stripe, cached=True)["may_spend"] is True
    stripe.now += TICK
    assert assert_true(stripe, cached=False)["may_spend"] is False
    assert assert_true(stripe, cached=True)["may_spend"] is False


@pytest.mark.parametrize(
    ("verb", "after"),
    [
        (None, {"state": "active", "plan": "team", "period_end": "2030-03-31T12:00:00+00:00"}),
        ("cancel_plan", {"state": "canceled", "plan": "team"}),
        ("change_plan", {"state": "active", "plan": "free", "pending_plan": None}),
    ],
    ids=["goes on", "ends", "changes"],
)
def test_the_end_of_a_period_is_not_outlived(team: Ledger, verb: str | None, after: Json) -> None:
    if verb:
        team.row(verb, account_id="alpha", **({"plan": "free"} if verb == "change_plan" else {}), at="period_end")
    team.now = NOON + 28 * DAY - SECOND
    before = assert_true(team, cached=False)
    team.now += SECOND - TICK
    assert assert_true(team, cached=True) == {**before, "cached": True}
    team.now += TICK
    found = assert_true(team, cached=False)
    assert {name: found[name] for name in after} == after
    assert assert_true(team, cached=True) == {**found, "cached": True}
    team.book()  # what was foreseen is booked now, and says the same
    assert_true(team, cached=False)


def test_knowledge_of_stripe_grows_old_to_the_moment(stripe: Ledger) -> None:
    stripe.now += 4 * MINUTE
    assert state(stripe)["stale"] is False
    stripe.now = NOON + 5 * MINUTE - TICK
    assert assert_true(stripe, cached=True)["stale"] is False
    stripe.now += TICK
    assert assert_true(stripe, cached=True)["stale"] is False
    stripe.now += TICK
    assert assert_true(stripe, cached=False)["stale"] is True


def test_a_stale_state_is_served_and_stripe_is_asked_once(stripe: Ledger) -> None:
    stripe.now += 6 * MINUTE
    assert [(state(stripe)["stale"], state(stripe)["cached"]) for _ in range(2)] == [(True, True)] * 2
    stripe.now += 6 * MINUTE
    assert assert_true(stripe, cached=False)["stale"] is True
    (request,) = requests(stripe)
    assert (request.purpose, request.ref, request.method) == ("retrieve", "subscription:sub_1", "get")
    assert (request.path, request.run_at) == ("/v1/subscriptions/sub_1", NOON + 6 * MINUTE)

    date = Jsonb({"Date": format_datetime(stripe.now, usegmt=True)})
    answer = {"request_id": request.request_id, "status": 200, "body": json.dumps(subscription()), "headers": date}
    assert stripe.row("complete_stripe_request", **answer).state == "done"
    fresh = assert_true(stripe, cached=False)
    assert (fresh["stale"], fresh["state"]) == (False, "active")
    stripe.now += 4 * MINUTE
    assert assert_true(stripe, cached=True)["stale"] is False
    stripe.now += 2 * MINUTE
    assert state(stripe)["stale"] is True
    assert [row.state for row in requests(stripe)] == ["done", "queued"]


def test_an_answer_that_stripe_does_not_know_it_is_not_asked_for_by_every_reader(stripe: Ledger) -> None:
    stripe.now += 6 * MINUTE
    state(stripe)
    (request,) = requests(stripe)
    stripe.row("complete_stripe_request", request_id=request.request_id, status=404, body='{"error": {}}')
    for _ in range(3):
        assert state(stripe)["stale"] is True
    assert len(requests(stripe)) == 1
    stripe.now += 6 * MINUTE
    state(stripe)
    assert len(requests(stripe)) == 2


@pytest.mark.parametrize("plan", [None, "team"])
def test_what_stripe_does_not_bill_is_never_stale(conn: Connection[Any], plan: str | None) -> None:
    ledger = Ledger(conn)
    prepare(ledger, plan)
    ledger.now += DAY
    assert assert_true(ledger, cached=False)["stale"] is False
    assert requests(ledger) == []


def test_a_subscription_that_is_over_is_never_stale(stripe: Ledger) -> None:
    tell(stripe, subscription("canceled", ended_at=BEGAN + 60), after=MINUTE, kind="deleted")
    stripe.now += DAY
    assert assert_true(stripe, cached=False)["stale"] is False
    assert requests(stripe) == []


# Others at the same time ---------------------------------------------------------------------------------------------

SLOW = """create or replace function credits._may_write() returns boolean language plpgsql as $$ begin
  perform pg_advisory_xact_lock(7);
  return true;
end $$"""


def test_a_state_computed_before_a_change_and_stored_after_it_is_not_served(database: Database) -> None:
    with committed(database) as ledger, database.admin() as admin:
        prepare(ledger, "team")
        admin.execute("select pg_advisory_lock(7)")  # a reader stops between computing and storing
        ledger.change(SLOW)

        def change(other: Ledger) -> None:
            while not admin.execute(WAITING).fetchone():
                pass
            other.change_plan("alpha", "free")
            admin.execute("select pg_advisory_unlock(7)")

        found, _ = together(database, [state, change])
        assert (found["plan"], found["cached"]) == ("team", False)
        assert [row.state["plan"] for row in rows(ledger)] == ["team"]
        assert assert_true(ledger, cached=False)["plan"] == "free"
        assert assert_true(ledger, cached=True)["plan"] == "free"


@contextmanager
def open_transaction(database: Database) -> Iterator[Ledger]:
    """A ledger whose calls are committed when it says so."""
    with database.connect() as conn:
        conn.execute(IMPATIENT)  # and begins the transaction, else the client would commit each call
        yield Ledger(conn, at=None)


def test_a_state_stored_while_a_change_is_not_yet_committed_is_not_served_after_it(database: Database) -> None:
    with committed(database) as ledger, open_transaction(database) as writer:
        prepare(ledger, "team")
        writer.change_plan("alpha", "free")
        assert state(writer)["plan"] == "free"
        assert [cached(ledger), cached(ledger)] == [False, False]  # the writer's row is in the way, and nobody waits
        assert state(ledger)["plan"] == "team"
        writer.conn.commit()
        assert assert_true(ledger, cached=True)["plan"] == "free"


@pytest.mark.parametrize("stored", [True, False])
def test_the_same_without_a_row_of_the_writer(database: Database, stored: bool) -> None:
    with committed(database) as ledger, open_transaction(database) as writer:
        prepare(ledger, "team")
        if stored:
            state(ledger)
        writer.change_plan("alpha", "free")
        assert cached(ledger) is stored  # what is committed is true until the change is
        writer.conn.commit()
        assert assert_true(ledger, cached=False)["plan"] == "free"


def test_an_old_snapshot_stores_nothing_that_others_are_served(database: Database) -> None:
    with committed(database) as ledger, open_transaction(database) as reader:
        prepare(ledger, "team")
        reader.conn.rollback()
        reader.conn.execute("set transaction isolation level repeatable read")
        assert truth(reader)["plan"] == "team"
        ledger.change_plan("alpha", "free")
        for known in (False, True):
            assert assert_true(reader, cached=known)["plan"] == "team"
        reader.conn.commit()
        assert assert_true(ledger, cached=False)["plan"] == "free"


def test_an_old_snapshot_knows_no_news_of_stripe(database: Database) -> None:
    with committed(database) as ledger, open_transaction(database) as reader:
        prepare(ledger)
        tell(ledger, subscription(), kind="created")
        reader.conn.rollback()
        reader.conn.execute("set transaction isolation level repeatable read")
        before = truth(reader)
        tell(ledger, subscription(), after=MINUTE)  # nothing is new but that it was said again
        assert assert_true(reader, cached=False)["as_of"] == before["as_of"]
        reader.conn.commit()
        assert assert_true(ledger, cached=False)["as_of"] > before["as_of"]


def test_nobody_waits_for_a_reader_in_a_long_transaction(database: Database) -> None:
    with committed(database) as ledger, open_transaction(database) as reader, open_transaction(database) as other:
        prepare(ledger, "team")
        assert not cached(reader)  # fills, and stays in its transaction
        assert not cached(other)
        ledger.spend("alpha", 1, key="k")
        ledger.change_plan("alpha", "free")
        assert state(ledger)["plan"] == "free"
        assert state(reader)["plan"] == "free"
        reader.spend("alpha", 1, key="k2")
        with pytest.raises(psycopg.errors.LockNotAvailable):
            ledger.spend("alpha", 1, key="k3")  # that is the lock of the account, as ever
        assert state(ledger)["plan"] == "free"
        reader.conn.commit()
        assert_true(ledger, cached=True)


def read_and_spend(ledger: Ledger, number: int) -> None:
    """Transactions that do both, in either order."""
    for turn in range(10):
        with ledger.conn.transaction():
            if number % 2:
                state(ledger)
            ledger.spend("alpha", 1, key=f"{number}-{turn}")
            state(ledger)


def change_often(ledger: Ledger) -> None:
    for turn in range(20):
        ledger.change_plan("alpha", "free" if turn % 2 else "team")


def clean_often(ledger: Ledger) -> None:
    for _ in range(10):
        ledger.row("clear_expired_subscription_cache")


def test_readers_changes_and_spends_at_once_never_block_and_end_true(database: Database) -> None:
    with committed(database) as ledger:
        prepare(ledger, "team")

        jobs: list[Callable[[Ledger], None]] = [partial(read_and_spend, number=number) for number in range(6)]
        jobs += [change_often, clean_often]
        assert together(database, jobs) == [None] * len(jobs)
        state(ledger)
        assert_true(ledger, cached=True)
        assert truth(ledger)["plan"] == "free"


# Upkeep --------------------------------------------------------------------------------------------------------------


def test_every_reader_is_counted_and_none_waits_for_another(database: Database) -> None:
    with committed(database) as ledger:
        prepare(ledger, "team")
        empty = ledger.row("get_subscription_cache_status")
        assert (empty.entries, empty.fresh, empty.expired, empty.oldest) == (0, 0, 0, None)
        assert (empty.hits, empty.misses, empty.hit_rate) == (0, 0, None)
        state(ledger)

        def read(other: Ledger) -> bool:
            with other.conn.transaction():
                return [cached(other) for _ in range(5)] == [True] * 5

        assert together(database, [read] * 8) == [True] * 8
        ledger.row("update_subscription_cache", user_id="alpha")
        status = ledger.row("get_subscription_cache_status")
        assert (status.entries, status.fresh, status.expired) == (1, 1, 0)
        assert (status.hits, status.misses) == (40, 1)
        assert float(status.hit_rate) == 0.9756
        ledger.row("clear_all_subscription_cache")
        assert ledger.row("get_subscription_cache_status") == status._replace(entries=0, fresh=0, oldest=None)


def test_the_status_tells_fresh_from_expired(team: Ledger) -> None:
    team.open_account("beta")
    state(team)
    team.now += 3 * MINUTE
    state(team, "beta")
    team.now += 3 * MINUTE
    status = team.row("get_subscription_cache_status")
    assert (status.entries, status.fresh, status.expired, status.oldest) == (2, 1, 1, NOON)


def test_a_cleanup_removes_what_is_expired_and_leaves_its_trace(team: Ledger) -> None:
    team.open_account("beta")
    state(team)
    team.now += 3 * MINUTE
    state(team, "beta")
    assert team.row("clear_expired_subscription_cache")[0] == 0
    team.now += 3 * MINUTE
    assert team.row("clear_expired_subscription_cache")[0] == 1
    assert [row.account_id for row in rows(team)] == ["beta"]
    assert state(team, "beta")["cached"]
    assert team.row("clear_all_subscription_cache")[0] == 1
    assert rows(team) == []
    assert not state(team, "beta")["cached"]
    history = team.rows("get_cache_cleanup_history")
    assert [(row.scope, row.removed, row.started_at, row.finished_at) for row in history] == [
        ("all", 1, NOON + 6 * MINUTE, NOON + 6 * MINUTE),
        ("expired", 1, NOON + 6 * MINUTE, NOON + 6 * MINUTE),
        ("expired", 0, NOON + 3 * MINUTE, NOON + 3 * MINUTE),
    ]
    assert team.rows("get_cache_cleanup_history", n=1) == history[:1]


def test_a_cleanup_leaves_a_row_that_is_being_renewed(database: Database) -> None:
    with committed(database) as ledger, open_transaction(database) as reader:
        prepare(ledger, "team")
        state(ledger)
        ledger.change("update credits.subscription_cache set expires_at = refreshed_at")
        assert not cached(reader)
        assert ledger.row("clear_expired_subscription_cache")[0] == 0
        reader.conn.commit()
        assert cached(ledger)


def test_the_job_cleans_up_and_keeps_its_history_for_a_month(team: Ledger) -> None:
    state(team)
    team.row("clear_expired_subscription_cache")
    for after, removed in ((HOUR, 1), (30 * DAY - HOUR, 0), (SECOND, 0)):
        team.now += after
        with team.as_owner():
            assert team.row("_clean_subscription_cache", max_rows=1000)[0] == removed
    assert [row.started_at for row in team.rows("get_cache_cleanup_history")] == [
        NOON + 30 * DAY + SECOND, NOON + 30 * DAY, NOON + HOUR,
    ]  # fmt: skip


@pytest.mark.parametrize("n", [0, -1, 1001])
def test_the_history_has_a_limit(ledger: Ledger, n: int) -> None:
    with refused(400, "invalid_request", argument="n"):
        ledger.rows("get_cache_cleanup_history", n=n)
