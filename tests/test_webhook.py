"""The door: what is answered 200 is stored, what is not stored is not answered 200, and nothing counts twice."""

import json
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from decimal import Decimal
from pathlib import Path
from typing import Any

import httpx
import pytest
from door import SECRET, Door, paid, signature
from psycopg.conninfo import make_conninfo
from servers import CONF, Database, until

from pgcredits import db, embedded, migrate, webhook


class Shop:
    """A database that sells the starter package."""

    def __init__(self, database: Database) -> None:
        self.database, self.dsn = database, database.dsn
        with database.connect("credits_owner", autocommit=True) as conn:
            db.call(conn, "load_demo_catalog")
            (self.starter,) = [row for row in db.call(conn, "list_packages") if row["code"] == "starter"]
            db.call(conn, "open_account", account_id="buyer")

    def paid(self, event_id: str = "evt_1", session: str = "cs_1", **changes: Any) -> bytes:
        price = {"amount_subtotal": self.starter["price"], "amount_total": self.starter["price"]}
        return paid("buyer", event_id, session, **{**price, "currency": self.starter["currency"], **changes})

    def available(self) -> Decimal:
        with self.database.connect(autocommit=True) as conn:
            (row,) = db.call(conn, "get_balance", account_id="buyer")
            available: Decimal = row["available"]
            return available

    def events(self) -> int:
        with self.database.admin() as admin:
            row = admin.execute("select count(*) from credits.stripe_events").fetchone()
            assert row
            return int(row[0])

    def sold(self, times: int) -> bool:
        expected: Decimal = times * self.starter["credits"]
        return self.available() == expected

    def sound(self) -> bool:
        with self.database.connect("credits_owner", autocommit=True) as conn:
            return db.call(conn, "audit") == []


@pytest.fixture
def shop(database: Database) -> Shop:
    return Shop(database)


@pytest.fixture
def door(shop: Shop) -> Iterator[Door]:
    with Door(shop.dsn) as door:
        yield door


def assert_refused(answer: httpx.Response, status: int, message: str, case: object = "") -> None:
    assert answer.status_code == status, (case, answer.text)
    body = answer.json()
    assert set(body) == {"code", "message", "details", "hint"}, case
    assert (body["code"], body["message"]) == (f"PT{status}", message), case
    assert body["hint"], case


def test_a_paid_checkout_becomes_credits_once(shop: Shop, door: Door) -> None:
    answer = door.post(shop.paid())
    assert (answer.status_code, answer.json()) == (200, {"event_id": "evt_1", "outcome": "applied"})
    assert shop.sold(1)
    again = door.post(shop.paid())
    assert (again.status_code, again.json()) == (200, {"event_id": "evt_1", "outcome": "duplicate"})
    assert shop.sold(1)
    assert shop.events() == 1
    assert shop.sound()


def test_the_same_event_from_many_clients_at_once(shop: Shop, door: Door) -> None:
    clients = 16
    barrier, body = threading.Barrier(clients), shop.paid()

    def post(_: int) -> tuple[int, str]:
        barrier.wait()
        answer = door.post(body)
        return answer.status_code, answer.json()["outcome"]

    with ThreadPoolExecutor(clients) as pool:
        answers = list(pool.map(post, range(clients)))
    assert sorted(answers) == [(200, "applied")] + [(200, "duplicate")] * (clients - 1)
    assert shop.sold(1)
    assert shop.sound()


def test_many_sales_at_once_all_count(shop: Shop, door: Door) -> None:
    bodies = [shop.paid(f"evt_{number}", f"cs_{number}") for number in range(40)]
    with ThreadPoolExecutor(8) as pool:
        answers = [answer.json()["outcome"] for answer in pool.map(door.post, bodies)]
    assert answers == ["applied"] * 40
    assert shop.sold(40)
    assert shop.sound()


def forged() -> dict[str, str | None]:
    now = time.time()
    return {
        "no header": None,
        "empty header": "",
        "no parts": "nonsense",
        "no number": "t=now,v1=00",
        "no timestamp": "v1=00",
        "no signature": f"t={now:.0f}",
        "foreign secret": signature(b"{}", "whsec_of_somebody_else"),
        "signature of another body": signature(b"{} "),
        "unknown scheme only": signature(b"{}").replace("v1", "v2"),
        "too old": signature(b"{}", at=now - 330),
        "from the future": signature(b"{}", at=now + 900),
        "not ASCII": f"t={now:.0f},v1=\xe9\xe9",
        "absurd timestamp": "t=" + "9" * 400 + ",v1=00",
    }


def test_what_nobody_signed_is_refused(shop: Shop, door: Door) -> None:
    for how, header in forged().items():
        sent = [] if header is None else [(b"stripe-signature", header.encode("latin-1"))]
        answer = door.http.post("/webhooks/stripe/default", content=b"{}", headers=sent)
        assert_refused(answer, 400, "invalid_signature", how)
    assert shop.events() == 0


def test_the_tolerance_is_five_minutes(shop: Shop, door: Door) -> None:
    for number, age in enumerate((-290, 290)):
        body = shop.paid(f"evt_{number}", f"cs_{number}")
        assert door.post(body, signature(body, at=time.time() + age)).status_code == 200, age


def test_what_is_no_json_object_is_refused(shop: Shop, door: Door) -> None:
    for body in (
        b"",
        b"[]",
        b'"text"',
        b"1",
        b"null",
        b'{"id": ',
        b'{"id": "evt_\x00"}',
        b"{}{}",
        b"{}\x00",
        b"\xff{}",
    ):
        assert_refused(door.post(body), 400, "invalid_request", body)
    assert shop.events() == 0


def test_text_is_passed_on_as_it_came(shop: Shop, door: Door) -> None:
    body = shop.paid(custom_text="naïve 🙂 \\u0000 ' \" %s %(x)s").replace(b": ", b" :  ")
    assert door.post(body).json()["outcome"] == "applied"
    assert shop.sold(1)


def test_secrets_can_be_rotated_and_belong_to_endpoints(shop: Shop) -> None:
    secrets = {"": ("whsec_new", "whsec_old"), "EU_SHOP": ("whsec_eu",)}
    with Door(shop.dsn, webhook_secrets=secrets) as door:
        tries = [("default", "whsec_new", 200), ("default", "whsec_old", 200), ("default", "whsec_eu", 400),
                 ("eu-shop", "whsec_eu", 200), ("eu-shop", "whsec_new", 400)]  # fmt: skip
        for number, (endpoint, secret, status) in enumerate(tries):
            body = shop.paid(f"evt_{number}", f"cs_{number}")
            assert door.post(body, signature(body, secret), endpoint).status_code == status, (endpoint, secret)
        body = shop.paid("evt_both", "cs_both")
        both = signature(body, "whsec_unknown") + "," + signature(body, "whsec_old").partition(",")[2]
        assert door.post(body, both).status_code == 200  # Stripe signs with both while it rotates


def test_without_a_secret_nothing_is_acknowledged(shop: Shop, caplog: pytest.LogCaptureFixture) -> None:
    with Door(shop.dsn, webhook_secrets={"EU": (SECRET,)}) as door:
        assert_refused(door.post(shop.paid()), 503, "webhook_secret_missing")
    assert "STRIPE_WEBHOOK_SECRET" in caplog.text
    assert shop.events() == 0


def test_a_body_beyond_the_limit_is_refused(shop: Shop) -> None:
    body = shop.paid()
    with Door(shop.dsn, max_body=len(body)) as door:
        assert_refused(door.post(body + b" "), 413, "payload_too_large")
        assert_refused(
            door.http.post(
                "/webhooks/stripe/default",
                content=(bytes(100) for _ in range(1000)),  # no Content-Length: it is counted
                headers={"Stripe-Signature": "t=1,v1=00"},
            ),
            413,
            "payload_too_large",
        )
        assert shop.events() == 0
        assert door.post(body).status_code == 200


def test_a_body_that_does_not_arrive_is_given_up(shop: Shop) -> None:
    with (
        Door(shop.dsn, body_timeout=0.1) as door,
        socket.create_connection(("127.0.0.1", door.port), timeout=10) as sock,
    ):
        sock.sendall(b"POST /webhooks/stripe/default HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\n{")
        answer = b"".join(iter(lambda: sock.recv(65536), b""))  # until the door hangs up
    assert answer.startswith(b"HTTP/1.1 408 ")
    assert b'"message":"request_timeout"' in answer


def test_an_endless_body_is_cut_off(door: Door) -> None:
    with socket.create_connection(("127.0.0.1", door.port)) as sock:
        sock.sendall(b"POST /webhooks/stripe/default HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n")
        sent = 0
        try:
            while sent < 64 * 2**20:
                sock.sendall(b"10000\r\n" + bytes(0x10000) + b"\r\n")
                sent += 0x10000
        except OSError:
            pass
        assert sent < 64 * 2**20


def test_a_client_that_leaves_early_does_no_harm(shop: Shop, door: Door, caplog: pytest.LogCaptureFixture) -> None:
    body = shop.paid()
    head = f"POST /webhooks/stripe/default HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n"
    with socket.create_connection(("127.0.0.1", door.port)) as sock:
        sock.sendall(f"{head}Stripe-Signature: {signature(body)}\r\n\r\n".encode() + body[:-1])
    time.sleep(0.3)
    assert shop.events() == 0
    assert [record for record in caplog.records if record.levelno >= logging.ERROR] == []
    assert door.post(body).json()["outcome"] == "applied"


def test_other_addresses_are_no_redirects(door: Door) -> None:
    for method, path in (
        ("GET", "/webhooks/stripe/default"),
        ("PUT", "/healthz"),
        ("POST", "/readyz"),
        ("POST", "/webhooks"),
    ):
        assert_refused(door.http.request(method, path), 405, "method_not_allowed", path)
    for path in ("/webhooks/stripe/default/", "/webhooks/stripe/", "/webhooks/stripe", "/", "/healthz/"):
        assert_refused(door.http.post(path), 404, "not_found", path)


def test_while_the_database_is_stuck_nothing_is_acknowledged(
    shop: Shop, door: Door, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(webhook, "PATIENCE", 0.5)
    with shop.database.admin() as admin, admin.transaction():
        admin.execute("lock table credits.stripe_events in access exclusive mode")
        answer = door.post(shop.paid())
        assert_refused(answer, 503, "not_stored")
        assert int(answer.headers["retry-after"]) > 0
    assert shop.events() == 0
    assert door.post(shop.paid()).json()["outcome"] == "applied"


def test_a_failing_statement_is_not_acknowledged(shop: Shop, door: Door) -> None:
    with shop.database.admin() as admin:
        admin.execute("alter table credits.stripe_events rename to elsewhere")
        assert_refused(door.post(shop.paid()), 503, "not_stored")
        admin.execute("alter table credits.elsewhere rename to stripe_events")
    assert door.post(shop.paid()).json()["outcome"] == "applied"


def test_refusals_log_no_secret(shop: Shop, door: Door, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    body = shop.paid()
    with shop.database.admin() as admin:
        admin.execute("alter table credits.stripe_events rename to elsewhere")
        door.post(body)
    door.post(body, "t=1,v1=00")
    assert "not stored" in caplog.text
    assert SECRET not in caplog.text
    assert "client_reference_id" not in caplog.text


def test_the_door_needs_no_more_than_the_forwarder(shop: Shop) -> None:
    with shop.database.admin() as admin:
        admin.execute("alter role credits_forwarder password 'forward'")
    login = make_conninfo(shop.dsn, user="credits_forwarder", password="forward")
    with Door(login, role="credits_service") as door:
        assert door.http.get("/readyz").status_code == 200
        assert door.post(shop.paid()).json()["outcome"] == "applied"
    with Door(login) as door:
        assert "PGCREDITS_ROLE" in door.http.get("/readyz").json()["hint"]
        assert_refused(door.post(shop.paid("evt_2", "cs_2")), 503, "not_stored")


def test_not_ready_before_the_schema_is_there(empty_database: Database) -> None:
    with Door(empty_database.dsn) as door:
        assert door.http.get("/healthz").json() == {"status": "alive"}
        answer = door.http.get("/readyz")
        assert_refused(answer, 503, "not_ready")
        assert "pgcredits migrate" in answer.json()["hint"]
        assert_refused(door.post(paid("buyer")), 503, "not_stored")
        migrate.migrate(empty_database.dsn)
        assert (door.http.get("/readyz").status_code, door.http.get("/readyz").json()) == (200, {"status": "ready"})


def test_the_database_goes_and_comes_back(tmp_path_factory: pytest.TempPathFactory) -> None:
    base = Path(os.environ["PGCREDITS_TEST_RUN"]) / f"stopped-{os.getpid()}"
    server = embedded.start(base, conf=CONF)
    dsn = server.dsn
    migrate.migrate(dsn)
    port = int(dsn.partition("port=")[2].split()[0])
    server.stop()
    body = paid("buyer")
    with Door(dsn, pool_timeout=1) as door:  # it starts without a database
        assert door.http.get("/healthz").status_code == 200
        assert_refused(door.http.get("/readyz"), 503, "not_ready")
        assert_refused(door.post(body), 503, "not_stored")
        for _ in range(2):
            with embedded.start(base, port=port):
                until(lambda: door.http.get("/readyz").status_code == 200)
                assert door.post(body).status_code == 200
            assert_refused(door.http.get("/readyz"), 503, "not_ready")
            assert_refused(door.post(body), 503, "not_stored")
            assert door.http.get("/healthz").status_code == 200


@contextmanager
def serving(dsn: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    environment = {**os.environ, "PGCREDITS_DSN": dsn, "PGCREDITS_PORT": port, "STRIPE_WEBHOOK_SECRET": SECRET}
    command = [sys.executable, "-m", "pgcredits", "serve"]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        assert process.stdout
        assert f"serves on http://127.0.0.1:{port}" in process.stdout.readline()
        yield process, f"http://127.0.0.1:{port}/webhooks/stripe/default"
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGINT)
        rest = process.communicate(timeout=20)[0]
        assert "Traceback" not in rest, rest


def test_a_door_killed_at_work_loses_nothing_and_doubles_nothing(shop: Shop) -> None:
    body = shop.paid()
    signed = {"Stripe-Signature": signature(body)}
    with (
        shop.database.admin() as admin,
        shop.database.admin() as locker,
        serving(shop.dsn) as (process, url),
        ThreadPoolExecutor(1) as pool,
    ):
        with locker.transaction():
            locker.execute("lock table credits.stripe_events in access exclusive mode")
            answer = pool.submit(httpx.post, url, content=body, headers=signed, timeout=20)
            waiting = "select 1 from pg_stat_activity where wait_event_type = 'Lock' and datname = current_database()"
            until(lambda: admin.execute(waiting).fetchone())
            process.kill()
            process.wait()
        with pytest.raises(httpx.HTTPError):
            answer.result()
    with serving(shop.dsn) as (_, url):
        again = httpx.post(url, content=body, headers={"Stripe-Signature": signature(body)})
        assert again.status_code == 200
        assert json.loads(again.text)["outcome"] in {"applied", "duplicate"}
    assert shop.sold(1)
    assert shop.events() == 1
    assert shop.sound()
