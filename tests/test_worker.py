"""The worker of the outbox against a server that speaks as Stripe does: every fault, and killed again and again."""

import asyncio
import json
import logging
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
import stripe
from door import Door
from ledger_support import SECOND, Ledger, assert_sound, committed
from psycopg.types.json import Jsonb
from servers import ONE_ENGINE, Database, until
from stripe_fake import KEY, StripeFake

from pgcredits import outbox, worker
from pgcredits.db import Database as Pool
from pgcredits.settings import Settings

ROLE = "credits_service"
KILLS = int(os.environ.get("PGCREDITS_TEST_KILLS", "25"))  # and ten requests for each


@pytest.fixture
def fake() -> Iterator[StripeFake]:
    with StripeFake() as running:
        yield running


@pytest.fixture
def ledger(database: Database) -> Iterator[Ledger]:
    with committed(database) as ledger:
        ledger.open("alpha")
        ledger.open("beta")
        yield ledger


def settings(database: Database, fake: StripeFake, **more: Any) -> Settings:
    return Settings(dsn=database.dsn, role=ROLE, **{"stripe_key": KEY, "stripe_api_base": fake.url, **more})


def work(database: Database, fake: StripeFake, **more: Any) -> None:
    """Do what is due, as `pgcredits stripe work --once` does."""

    async def once() -> None:
        pool = Pool(database.dsn, role=ROLE)
        await pool.open()
        try:
            await worker.Worker(pool, settings(database, fake, **more)).run(asyncio.Event(), once=True)
        finally:
            await pool.close()

    asyncio.run(once())


def ask(ledger: Ledger, method: str, path: str, params: Any = None, ref: str | None = None) -> int:
    """Write a request down; its number."""
    with ledger.as_owner():
        (row,) = ledger.query(
            "select credits._request('test', %s, %s, %s, %s::jsonb) as request_id",
            ref or ledger.key(), method, path, params if isinstance(params, str) else json.dumps(params or {}),
        )  # fmt: skip
    request_id: int = row.request_id
    return request_id


def customer(ledger: Ledger, account_id: str = "alpha") -> int:
    request_id: int = ledger.row("get_or_create_stripe_customer", user_id=account_id).request_id
    return request_id


def kept(ledger: Ledger, request_id: int) -> Any:
    (row,) = ledger.table("stripe_requests", "request_id = %s", request_id)
    return row


def due_now(ledger: Ledger) -> None:
    """Time passes: what waits is due, what was claimed is nobody's."""
    ledger.change(
        "update credits.stripe_requests set run_at = credits.now() - interval '1 second', locked_until = "
        "credits.now() - interval '1 second' where state in ('queued', 'sent')"
    )
    ledger.change("update credits.stripe_queue_stop set until = credits.now()")


# One request ---------------------------------------------------------------------------------------------------------


def test_a_request_is_sent_as_it_was_written(database: Database, ledger: Ledger, fake: StripeFake) -> None:
    number = ask(
        ledger, "post", "/v1/payment_intents",
        '{"amount": 500.00, "currency": "usd", "confirm": true, "off_session": true, "description": null,'
        ' "big": 9007199254740993, "rate": 0.1000000000000000055, "empty": "",'
        ' "on": [true, null, {"no": false, "price": 7.0}], "metadata": {"account_id": "alpha", "note": "a&b=c[d] ä"}}',
    )  # fmt: skip
    ledger.change("update credits.stripe_requests set stripe_account = 'acct_1'")
    work(database, fake)
    (call,) = fake.calls
    assert (call.method, call.path, call.key) == ("POST", "/v1/payment_intents", f"pgc-{number}")
    assert (call.version, call.account) == (stripe.api_version, "acct_1")
    assert call.params == {
        "amount": "500", "currency": "usd", "confirm": "true", "off_session": "true", "big": "9007199254740993",
        "rate": "0.1000000000000000055", "on": ["true", "", {"no": "false", "price": "7"}], "empty": "",
        "metadata": {"account_id": "alpha", "note": "a&b=c[d] ä"},
    }  # fmt: skip
    row = kept(ledger, number)
    assert (row.state, row.http_status, row.attempts, row.error_type) == ("done", 200, 1, None)
    assert row.stripe_request.startswith("req_")
    assert (row.response["status"], "client_secret" in row.response) == ("succeeded", False)
    assert row.as_of == pytest.approx(time.time(), abs=30)


def test_an_amount_that_is_not_whole_is_sent_as_it_is_and_refused(
    database: Database, ledger: Ledger, fake: StripeFake
) -> None:
    number = ask(ledger, "post", "/v1/prices", {"unit_amount": 10.5})
    work(database, fake)
    assert fake.calls[0].params == {"unit_amount": "10.5"}
    assert (kept(ledger, number).state, kept(ledger, number).error_code) == ("failed", "parameter_invalid_integer")


def test_reading_listing_and_deleting(database: Database, ledger: Ledger, fake: StripeFake) -> None:
    ask(ledger, "post", "/v1/products", {"name": "Starter"})
    work(database, fake)
    (product,) = fake.objects
    numbers = [
        ask(ledger, "get", f"/v1/products/{product}", {"expand": ["default_price"]}),
        ask(ledger, "get", "/v1/products", {"limit": 100}),
        ask(ledger, "delete", f"/v1/products/{product}"),
        ask(ledger, "get", "/v1/prices/price_unknown"),
    ]
    work(database, fake)
    assert [kept(ledger, number).state for number in numbers] == ["done", "done", "done", "failed"]
    assert {call.key for call in fake.calls if call.method != "POST"} == {None}
    assert fake.objects[product]["deleted"]


def test_an_answer_is_applied(database: Database, ledger: Ledger, fake: StripeFake) -> None:
    customer(ledger)
    work(database, fake)
    (known,) = fake.objects
    assert ledger.row("get_or_create_stripe_customer", user_id="alpha").customer_id == known


def test_a_parameter_that_would_be_an_option_is_never_sent(fake: StripeFake) -> None:
    async def send(name: str) -> worker.Outcome:
        client = stripe.StripeClient(KEY, base_addresses={"api": fake.url}, http_client=stripe.HTTPXClient())
        row = {"method": "post", "path": "/v1/customers", "params": {name: "x", "email": "alpha@example.com"}}
        return await worker.send(
            client, {**row, "idempotency_key": "k", "stripe_version": None, "stripe_account": None}
        )

    for name in sorted(worker.OPTIONS):
        assert asyncio.run(send(name)) == worker.Outcome(not_sent=f"ValueError: no parameter may be called {name}")
    assert fake.calls == []


def test_what_cannot_be_sent_failed(database: Database, ledger: Ledger, fake: StripeFake) -> None:
    number = ask(ledger, "post", "/v1/customers", {"api_key": "sk_live_of_somebody_else"})
    work(database, fake)
    row = kept(ledger, number)
    assert (row.state, row.error_type) == ("failed", "ValueError: no parameter may be called api_key")
    assert [told.type for told in ledger.table("notifications")] == ["stripe_request_failed"]


def test_numbers_of_jsonb_stay_exact() -> None:
    value = json.loads('{"a": [1, 1.50, 1e2, {"b": 0.30}], "c": true, "d": null}', parse_float=Decimal)
    assert worker.encodable(value) == {"a": [1, "1.50", 100, {"b": "0.30"}], "c": True, "d": None}


# Faults --------------------------------------------------------------------------------------------------------------

# What happens to a request once, its state then, and what its effect was by then.
LOST: dict[str, tuple[str, int | None, int]] = {
    "cut before": ("queued", None, 0),
    "cut after": ("queued", None, 1),
    "hang after": ("queued", None, 1),
    "no json": ("queued", 200, 1),
    "500": ("queued", 500, 0),
    "503 html": ("queued", 503, 0),
    "503 gateway": ("queued", None, 0),
    "404 gateway": ("queued", None, 0),
    "409": ("queued", 409, 0),
    "429": ("queued", 429, 0),
    "401": ("queued", 401, 0),
    "slow": ("done", 200, 1),
}


@ONE_ENGINE
@pytest.mark.parametrize("fault", LOST)
def test_a_fault_costs_time_and_nothing_else(
    database: Database, ledger: Ledger, fake: StripeFake, fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker, "PATIENCE", 1.0)
    fake.hang = 1.5
    number = customer(ledger)
    fake.script(fault)
    state, status, effects = LOST[fault]
    work(database, fake)
    row = kept(ledger, number)
    assert (row.state, row.http_status, fake.effects.total()) == (state, status, effects)
    due_now(ledger)
    work(database, fake)
    assert kept(ledger, number).state == "done"
    assert fake.effects == {f"pgc-{number}": 1}
    assert {call.key for call in fake.calls} == {f"pgc-{number}"}
    (known,) = fake.objects
    assert ledger.row("get_or_create_stripe_customer", user_id="alpha").customer_id == known
    assert_sound(ledger)


@ONE_ENGINE
def test_stripe_is_given_the_time_it_asks_for(database: Database, ledger: Ledger, fake: StripeFake) -> None:
    number = customer(ledger)
    fake.script("429")
    work(database, fake)
    row = kept(ledger, number)
    assert row.run_at - row.last_sent_at >= 40 * SECOND


@ONE_ENGINE
def test_an_error_that_stripe_keeps_under_the_key_stays(database: Database, ledger: Ledger, fake: StripeFake) -> None:
    number = customer(ledger)
    fake.script("500 kept")
    for _ in range(3):
        work(database, fake)
        assert (kept(ledger, number).state, kept(ledger, number).http_status) == ("queued", 500)
        due_now(ledger)
    assert (len(fake.calls), fake.effects.total(), fake.objects) == (3, 1, {})


@ONE_ENGINE
def test_a_decline_is_final(database: Database, ledger: Ledger, fake: StripeFake) -> None:
    number = ask(ledger, "post", "/v1/payment_intents", {"amount": 500, "currency": "usd", "confirm": True})
    fake.script("402")
    for _ in range(2):
        work(database, fake)
        due_now(ledger)
    row = kept(ledger, number)
    assert (row.state, row.error_code, len(fake.calls)) == ("declined", "card_declined", 1)


@ONE_ENGINE
def test_other_parameters_under_one_key_are_a_bug_that_is_told(
    database: Database, ledger: Ledger, fake: StripeFake
) -> None:
    number = customer(ledger)
    fake.script("cut after")
    work(database, fake)
    ledger.change("update credits.stripe_requests set params = %s", Jsonb({"email": "beta@example.com"}))
    due_now(ledger)
    work(database, fake)
    assert (kept(ledger, number).state, kept(ledger, number).error_type) == ("unknown", "idempotency_error")
    assert [told.type for told in ledger.table("notifications")] == ["stripe_request_unknown"], "it was done"


@ONE_ENGINE
def test_nobody_answers_at_all(database: Database, ledger: Ledger, fake: StripeFake) -> None:
    number = customer(ledger)
    work(database, fake, stripe_api_base="http://127.0.0.1:1")
    assert (kept(ledger, number).state, kept(ledger, number).http_status) == ("queued", None)


def test_a_wrong_key_is_told_once_and_never_logged(
    database: Database, ledger: Ledger, fake: StripeFake, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    numbers = [customer(ledger), customer(ledger, "beta")]
    for _ in range(2):
        work(database, fake, stripe_key="sk_test_wrong")
    assert len(fake.calls) == 2
    assert [told.type for told in ledger.table("notifications")] == ["stripe_key_refused"]
    for _ in range(2):  # the first one only tries the key
        due_now(ledger)
        work(database, fake)
    assert [kept(ledger, number).state for number in numbers] == ["done", "done"]
    assert caplog.records
    logged = caplog.text + "".join(repr(record.args) for record in caplog.records)
    assert "sk_test" not in logged
    assert "sk_test" not in repr(settings(database, fake))


# Several, and their end ----------------------------------------------------------------------------------------------


@ONE_ENGINE
def test_workers_share_what_there_is(database: Database, ledger: Ledger, fake: StripeFake) -> None:
    fake.latency = lambda: random.random() / 50
    numbers = [ask(ledger, "post", "/v1/products", {"name": f"Product {n}"}) for n in range(60)]

    async def both() -> None:
        pool = Pool(database.dsn, role=ROLE, size=20)
        await pool.open()
        try:
            workers = [worker.Worker(pool, settings(database, fake)) for _ in range(3)]
            await asyncio.gather(*(one.run(asyncio.Event(), once=True) for one in workers))
        finally:
            await pool.close()

    asyncio.run(both())
    assert fake.effects == {f"pgc-{number}": 1 for number in numbers}
    assert len(fake.calls) == 60
    assert {row.state for row in ledger.table("stripe_requests")} == {"done"}


def test_once_sees_what_was_written_while_it_asked() -> None:
    """What answers a claim may be older than the end of the last one in flight, and than what that one wrote."""
    left, ended, done = [{"row": 1}], asyncio.Event(), []

    async def do(row: dict[str, Any]) -> None:
        done.append(row["row"])
        if row["row"] == 1:
            left.append({"row": 2})
        ended.set()

    async def due(free: int) -> list[dict[str, Any]]:
        claimed = left[:free]
        del left[:free]
        if not claimed and not ended.is_set():
            await ended.wait()
            await asyncio.sleep(0)
        return claimed

    async def drained() -> None:
        crew = outbox.Crew(do)
        crew.start(left.pop())
        await crew.drain(due, asyncio.Event(), once=True)

    asyncio.run(drained())
    assert done == [1, 2]


def test_a_lease_that_ran_out_is_taken_over(database: Database, ledger: Ledger, fake: StripeFake) -> None:
    number = customer(ledger)
    ledger.claim_stripe_requests(10, "crashed")
    work(database, fake)
    assert fake.calls == []
    due_now(ledger)
    work(database, fake)
    row = kept(ledger, number)
    assert (row.state, row.attempts, fake.effects) == ("done", 2, {f"pgc-{number}": 1})
    assert row.worker != "crashed"


@ONE_ENGINE
def test_the_door_works_beside_and_ends_what_it_began(database: Database, ledger: Ledger, fake: StripeFake) -> None:
    fake.script("slow")
    with Door(database.dsn, role=ROLE, stripe_key=KEY, stripe_api_base=fake.url) as door:
        assert door.http.get("/readyz").status_code == 200
        number = customer(ledger)
        until(lambda: fake.calls)
    assert kept(ledger, number).state == "done"


@ONE_ENGINE
def test_the_door_does_not_work_without_a_key(database: Database, ledger: Ledger, fake: StripeFake) -> None:
    number = customer(ledger)
    with Door(database.dsn, role=ROLE, stripe_api_base=fake.url) as door:
        assert door.http.get("/readyz").status_code == 200
    assert kept(ledger, number).state == "queued"


@contextmanager
def process(database: Database, fake: StripeFake, *arguments: str) -> Iterator[subprocess.Popen[str]]:
    environment = {"PGCREDITS_DSN": database.dsn, "PGCREDITS_ROLE": ROLE, "STRIPE_API_BASE": fake.url}
    command = [sys.executable, "-m", "pgcredits", "stripe", "work", *arguments]
    with subprocess.Popen(
        command, env={**os.environ, **environment, "STRIPE_SECRET_KEY": KEY}, stderr=subprocess.PIPE, text=True
    ) as running:
        yield running


@ONE_ENGINE
def test_the_command_works_once_or_until_it_is_told_to_stop(
    database: Database, ledger: Ledger, fake: StripeFake
) -> None:
    first = customer(ledger)
    with process(database, fake, "--once") as once:
        assert once.wait(30) == 0
    assert kept(ledger, first).state == "done"
    fake.script("slow")
    with process(database, fake) as running:
        second = customer(ledger, "beta")
        until(lambda: len(fake.calls) == 2)
        running.send_signal(signal.SIGTERM)
        assert running.wait(30) == 0
        assert running.stderr
        assert "Traceback" not in running.stderr.read()
    assert kept(ledger, second).state == "done"


# Killed --------------------------------------------------------------------------------------------------------------

# Starts workers by fork, so that one is at work within milliseconds. Nobody waits for those that are killed.
NURSERY = """
import asyncio, os, signal, sys
from pgcredits import outbox, worker
from pgcredits.settings import Settings
signal.signal(signal.SIGCHLD, signal.SIG_IGN)
outbox.POLL = 0.05
while sys.stdin.readline():
    if child := os.fork():
        print(child, flush=True)
    else:
        os.close(0)
        asyncio.run(worker.work(Settings.from_environment()))
        os._exit(0)
"""


@ONE_ENGINE
def test_a_worker_that_is_killed_loses_nothing_and_does_nothing_twice(
    database: Database, ledger: Ledger, fake: StripeFake
) -> None:
    luck = random.Random(5)
    faults = ("cut before", "cut after", "no json", "500", "409")
    fake.latency = lambda: luck.random() / 20
    fake.fault = lambda: luck.choice(faults) if luck.random() < 0.1 else None
    ledger.change("update credits.settings set value = '\"1 second\"' where name = 'stripe_request_lease'")
    environment = {"PGCREDITS_DSN": database.dsn, "PGCREDITS_ROLE": ROLE, "STRIPE_API_BASE": fake.url}
    accounts = [f"alpha_{n}" for n in range(KILLS * 10)]
    for account in accounts:
        ledger.open(account)
    nursery = subprocess.Popen(
        [sys.executable, "-c", NURSERY], env={**os.environ, **environment, "STRIPE_SECRET_KEY": KEY}, text=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    with nursery:
        assert nursery.stdin
        assert nursery.stdout
        begin, born = nursery.stdin, nursery.stdout

        def start() -> int:
            begin.write("\n")
            begin.flush()
            return int(born.readline())

        workers = [start(), start()]
        for n in range(KILLS):
            before = len(fake.calls)
            for account in accounts[n * 10 : n * 10 + 10]:
                customer(ledger, account)
            # On a busy machine nobody would have begun.
            until(lambda before=before: len(fake.calls) > before)  # type: ignore[misc]
            time.sleep(luck.random() / 5)
            os.kill(workers.pop(0), signal.SIGKILL)
            workers.append(start())

        def open_ones() -> list[Any]:
            ledger.change("update credits.stripe_requests set run_at = credits.now() where state = 'queued'")
            return ledger.table("stripe_requests", "state in ('queued', 'sent')")

        fake.fault = None
        until(lambda: not open_ones(), 60)
        for one in workers:
            os.kill(one, signal.SIGTERM)
        begin.close()

    requests = ledger.table("stripe_requests")
    assert len(requests) == KILLS * 10
    assert {row.state for row in requests} == {"done"}
    assert fake.effects == {row.idempotency_key: 1 for row in requests}
    made = {thing["metadata"]["account_id"]: thing["id"] for thing in fake.objects.values()}
    bound = ledger.table("stripe_customers")
    assert sorted((row.account_id, row.customer_id) for row in bound) == sorted(made.items())
    assert len(made) == len(fake.objects) == KILLS * 10
    assert max(row.attempts for row in requests) > 1, "nothing was ever interrupted"
    assert ledger.table("notifications") == []
    assert_sound(ledger)


def test_the_worker_is_no_bigger_than_its_job() -> None:
    """Nothing of Stripe's objects, and nothing of what requests are for, is in it."""
    text = Path(worker.__file__).read_text()
    assert not [word for word in ("customer", "checkout", "refund", "subscription", "invoice") if word in text.lower()]
