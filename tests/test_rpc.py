"""The forwarder by itself: every header, what it refuses, what the database never hears, and the wait for Stripe."""

import json
import os
import re
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from door import Door, as_curl
from five_ways import JWT_SECRET, ROOT, SERVICE, fits, forwarder, login, postgrest, token
from ledger_support import Ledger, committed
from servers import ONE_ENGINE, Database, Engine
from stripe_fake import KEY, StripeFake
from test_official_clients import prepare

from pgcredits import rpc
from pgcredits.settings import Issuer

USER = {"Authorization": f"Bearer {token(sub='alice')}"}
BACKEND = {
    "Authorization": f"Bearer {token(**SERVICE)}", "Content-Profile": "credits", "Accept-Profile": "credits",
}  # fmt: skip


@pytest.fixture(scope="module")
def shapes(server: Engine) -> Iterator[Database]:
    """A database with functions and views of every shape."""
    with server.database() as database:
        prepare(database)
        yield database


@pytest.fixture(scope="module")
def door(shapes: Database) -> Iterator[Door]:
    with forwarder(shapes) as door:
        yield door


def rpc_(door: Door, function: str, content: Any = b"{}", **headers: str) -> httpx.Response:
    """A call by a user, of text or of what becomes JSON."""
    body = content if isinstance(content, bytes) else json.dumps(content).encode()
    names = {name.replace("_", "-"): value for name, value in headers.items()}
    return door.http.post(
        f"/rpc/{function}", content=body, headers={**USER, "Content-Type": "application/json", **names}
    )


def get(door: Door, path: str, **headers: str) -> httpx.Response:
    return door.http.get(path, headers={**USER, **{name.replace("_", "-"): value for name, value in headers.items()}})


def error(answer: httpx.Response) -> tuple[int, str]:
    """Status and code of a refusal, which has the four keys and names itself."""
    body = answer.json()
    assert list(body) == ["code", "message", "details", "hint"], body
    assert answer.headers["proxy-status"] == f"PostgREST; error={body['code']}"
    return answer.status_code, body["code"]


def written(database: Database) -> list[int]:
    with database.connect("credits_owner") as conn:
        return [n for (n,) in conn.execute("select n from credits.written order by n").fetchall()]


# The dialect ---------------------------------------------------------------------------------------------------------


def test_what_an_answer_says_besides_its_body(door: Door) -> None:
    one = rpc_(door, "add", {"a": 1}, Content_Profile="credits_api")
    assert (one.status_code, one.text) == (200, "11")
    assert one.headers["content-type"] == "application/json; charset=utf-8"
    assert (one.headers["content-range"], one.headers["content-profile"]) == ("0-0/*", "credits_api")
    assert "preference-applied" not in one.headers
    counted = get(door, "/rpc/many?count=4&limit=2&offset=1", Prefer="count=exact")
    assert (counted.status_code, counted.headers["content-range"]) == (206, "1-2/4")
    assert counted.headers["preference-applied"] == "count=exact"
    assert "content-profile" not in counted.headers
    assert get(door, "/rpc/many?count=0").headers["content-range"] == "*/*"
    assert get(door, "/rpc/many?count=0", Prefer="count=exact").headers["content-range"] == "*/0"
    single = rpc_(door, "one", {"a": 1}, Accept="application/vnd.pgrst.object+json")
    assert single.headers["content-type"] == "application/vnd.pgrst.object+json; charset=utf-8"
    assert single.json() == {"a": 1, "b": "none"}
    void = rpc_(door, "silent")
    assert (void.status_code, void.content, "content-type" in void.headers) == (204, b"", False)
    tea = rpc_(door, "teapot")
    assert (tea.status_code, tea.headers["x-kind"], tea.json()) == (418, "tea", "short and stout")
    assert rpc_(door, "nothing").text == "null"
    head = door.http.head("/rpc/many?count=3", headers={**USER, "Prefer": "count=exact"})
    assert (head.status_code, head.headers["content-range"], head.content) == (200, "0-2/3", b"")
    ranged = get(door, "/numbers?select=n&order=n", Range="5-6")
    assert (ranged.json(), ranged.headers["content-range"]) == ([{"n": 6}, {"n": 7}], "5-6/*")
    assert [row["n"] for row in get(door, "/numbers?select=n&order=n", Range="1498-").json()] == [1499, 1500]
    assert len(get(door, "/numbers").json()) == 1000
    assert len(get(door, "/numbers?limit=1200").json()) == 1000
    assert error(get(door, "/numbers", Range="6-5")) == (416, "PGRST103")
    assert error(get(door, "/numbers?limit=-1")) == (416, "PGRST103")


def test_who_has_no_token_learns_nothing(door: Door) -> None:
    for path in ("/numbers", "/nosuch", "/rpc/add?a=1", "/rpc/nosuch", "/rpc/secret"):
        answer = door.http.get(path)
        assert error(answer) == (401, "PGRST302")
        assert answer.headers["www-authenticate"] == "Bearer"
        bad = door.http.get(path, headers={"Authorization": "Bearer a.b.c"})
        assert error(bad) == (401, "PGRST301")
        assert bad.headers["www-authenticate"].startswith('Bearer error="invalid_token", error_description="')
    assert door.http.get("/healthz").json() == {"status": "alive"}
    assert door.http.get("/readyz").json() == {"status": "ready"}


def test_numbers_keep_their_digits(door: Door) -> None:
    exact = b'{"given": {"n": 9007199254740993.10000000000000000000000000001, "m": 1e400}}'
    assert b"9007199254740993.10000000000000000000000000001" in rpc_(door, "keep", exact).content
    assert rpc_(door, "add", b'{"a": 9007199254740993, "b": 0.000000000000000001}').text == (
        "9007199254740993.000000000000000001"
    )


def test_bodies_that_are_no_arguments(door: Door) -> None:
    bodies: list[Any] = [
        b"[]", b"[{}]", b'[{"a": 1}]', b'"a"', b"5", b"null", b"{", b"{}{}", b"{'a': 1}", b'{"a": NaN}', b'{"a": 01}',
        b'{"a": Infinity}', b'{"a": -Infinity}', b"\xef\xbb\xbf{}", b'{"a": "\xff"}', b'{"a": "\0"}', b'{"\\ud83d": 1}',
        b'{"a": ' + b"[" * 101 + b"]" * 101 + b"}", b'{"a":' * 5000, b"[" * 900_000, b'{"a": "\n"}', b' "',
        b'"' * 900_000, b'\\"' * 400_000, b'{"a": "' + b'\\"' * 400_000,
    ]  # fmt: skip
    began = time.monotonic()
    for body in bodies:
        answer = rpc_(door, "add", body)
        assert error(answer) == (400, "PGRST102"), body[:50]
    assert time.monotonic() - began < 20
    for kind in ("text/plain", "application/x-www-form-urlencoded", "text/csv", "multipart/form-data; boundary=x"):
        assert error(rpc_(door, "add", b'{"a": 1}', Content_Type=kind)) == (400, "PGRST102")
    assert error(rpc_(door, "keep", b'{"given": "\\u0000"}'))[0] == 400
    assert error(rpc_(door, "keep", b'{"given": "\\ud800"}'))[0] == 400
    assert rpc_(door, "keep", b'{"given": ' + b"[" * 98 + b"]" * 98 + b"}").status_code == 200
    assert rpc_(door, "silent", b"").status_code == 204
    assert rpc_(door, "add", b'{"a": 1, "a": 2}').json() == 12
    assert rpc_(door, "add", b'\n{"a" : 1}\t', Content_Type="application/json; charset=utf-8").json() == 11


def test_questions_that_are_not_understood(door: Door) -> None:
    for query in (
        "or=(n.eq.1,n.eq.2)", "and=(n.eq.1)", "not.or=(n.eq.1)", "n=1", "n=eq", "n=fts.a", "n=cs.{1}", "n=eq(any).{1}",
        "n=in.1", 'n=in.("a)', "n=is.5", "more->n=eq.1", "more->>n=eq.1", "numbers.n=eq.1", "n=eq.%00", "n%22=eq.1",
        "select=n::text", "select=more->n", "select=a:n", "select=n.sum()", "select=other(*)", "select=n%22",
        "select=,", "order=n.up", "order=n.asc.first", 'order=n"', "order=more->n", "limit=x", "offset=x",
        "limit=1e3", "s.n=eq.1", "n)=eq.1", "n%20or%20true=eq.1", "%25s=eq.1", "select=%25s", "order=%25(a)s",
        "select=n;select",
    ):  # fmt: skip
        assert error(get(door, f"/numbers?{query}")) == (400, "PGRST100"), query
        assert error(rpc_(door, f"many?{query}", {"count": 1})) == (400, "PGRST100"), query
    for view in ("nu%22mbers", "numbers;", "%25s", "numbers%20n", "pg_class", "credits.balances", "_fail"):
        assert error(get(door, f"/{view}")) == (404, "PGRST205"), view
    for function in ("a%22dd", "add()", "%25s", "pg_sleep", "_fail", "set_config"):
        assert error(rpc_(door, function, {"a": 1})) == (404, "PGRST202"), function
    unstripped = "application/vnd.pgrst.object+json;nulls=stripped"
    for accept in ("text/csv", "application/xml", "application/geo+json", "image/png, text/html", "", unstripped):
        assert error(get(door, "/numbers", Accept=accept)) == (406, "PGRST107"), accept
    for accept in ("*/*", "text/html, application/json;q=0.9", "application/*", "APPLICATION/JSON; charset=utf-8"):
        assert get(door, "/numbers?limit=1", Accept=accept).status_code == 200
    for profile in ("public", "pg_catalog", "", "credits_api, credits", 'credits"'):
        assert error(get(door, "/numbers", Accept_Profile=profile)) == (406, "PGRST106"), profile
        assert error(rpc_(door, "add", {"a": 1}, Content_Profile=profile)) == (406, "PGRST106"), profile
    for method in ("PUT", "PATCH", "DELETE"):
        assert error(door.http.request(method, "/rpc/add", headers=USER)) == (405, "PGRST101")
        assert door.http.request(method, "/numbers", headers=USER).status_code == 405
    assert door.http.post("/numbers", headers=USER, json={}).status_code == 405


def test_values_are_never_statements(door: Door) -> None:
    for value in ("' or true --", '"', "\\", "%s", "%(a)s", "$1", "row 1'; drop table credits.written; --", "é", "*"):
        found = door.http.get("/numbers", params={"name": f"eq.{value}", "select": "n"}, headers=USER)
        assert (found.status_code, found.json()) == (200, []), value
        listed = door.http.get("/numbers", params={"name": f"in.({json.dumps(value)},x)"}, headers=USER)
        assert (listed.status_code, listed.json()) == (200, []), value
        assert rpc_(door, "keep", {"given": {value: value}}).json() == {value: value}
        assert rpc_(door, "one", {"a": 1, "b": value}).json()["b"] == value
        assert door.http.get("/rpc/one", params={"a": 1, "b": value}, headers=USER).json()["b"] == value
        assert error(rpc_(door, "one", {"a": 1, value: 1})) == (404, "PGRST202")
    names = get(door, "/numbers?name=in.(%22row%201%22,row%202,%22a%5C%22,b%22)&select=n").json()
    assert names == [{"n": 1}, {"n": 2}]


def test_nothing_is_written_by_reading_or_by_what_is_refused(door: Door, shapes: Database) -> None:
    assert error(get(door, "/rpc/write?n=1")) == (405, "25006")
    assert door.http.head("/rpc/write?n=1", headers=USER).status_code == 405
    assert error(rpc_(door, "write_many", {"n": 2}, Accept="application/vnd.pgrst.object+json")) == (406, "PGRST116")
    assert error(rpc_(door, "write_many?offset=5", {"n": 3}, Prefer="count=exact")) == (416, "PGRST103")
    assert written(shapes) == []
    assert rpc_(door, "write?limit=0", {"n": 4}).status_code == 200
    assert rpc_(door, "write?pgrst_scalar=eq.0", {"n": 5}).text == "null"
    assert rpc_(door, "write_many", {"n": 6}).json() == [1, 2]
    assert written(shapes) == [4, 5, 6]


# The process ---------------------------------------------------------------------------------------------------------


@ONE_ENGINE
def test_nothing_of_a_call_reaches_the_next_one(shapes: Database) -> None:
    with forwarder(shapes, pool_size=1, max_body=1000) as door:
        for headers, sub in ((USER, "alice"), ({"Authorization": f"Bearer {token(sub='bob')}"}, "bob")):
            assert door.http.post("/rpc/get_balance", json={"account_id": "alpha"}, headers=BACKEND).status_code == 200
            assert rpc_(door, "fails", {"state": "PT409"}).status_code == 409
            who = door.http.post("/rpc/who", headers=headers).json()
            assert (who["sub"], who["user"], who["role"]) == (sub, "credits_user", "credits_user")
        refused = door.http.post("/rpc/get_balance", json={"account_id": "alpha"}, headers={**BACKEND, **USER})
        assert error(refused) == (403, "42501")
        assert door.http.get("/trial_balance", headers=BACKEND).status_code == 200
        assert error(rpc_(door, "add", b" " * 1001)) == (413, "PT413")


@ONE_ENGINE
def test_a_slow_call_ends_and_the_others_are_told(shapes: Database) -> None:
    with forwarder(shapes, pool_size=1, pool_timeout=1, statement_timeout=3) as door:
        slow: list[httpx.Response] = []
        thread = threading.Thread(target=lambda: slow.append(rpc_(door, "slow")))
        thread.start()
        time.sleep(0.3)
        assert error(rpc_(door, "add", {"a": 1})) == (504, "PGRST003")
        thread.join()
        assert error(slow[0]) == (500, "57014")
        assert rpc_(door, "add", {"a": 1}).json() == 11


@ONE_ENGINE
def test_a_database_that_is_gone_is_503_for_all_at_once(shapes: Database) -> None:
    with Door("host=127.0.0.1 port=1 user=x", jwt_secret=JWT_SECRET, pool_timeout=1) as door:
        began, found = time.monotonic(), [(504, "PGRST003"), (503, "PGRST000")]
        with ThreadPoolExecutor(10) as pool:  # one after the other they would wait ten times as long
            answers = [pool.submit(rpc_, door, "add", {"a": 1}) for _ in range(10)]
            assert all(error(answer.result()) in found for answer in answers)
        assert time.monotonic() - began < 5


@ONE_ENGINE
def test_a_server_that_takes_no_writes_is_said_to_be_one(database: Database) -> None:
    with database.admin() as admin:  # as a platform does where the disk is full
        admin.execute(f"alter database {database.name} set default_transaction_read_only = on")
    with forwarder(database) as door:
        refused = door.http.post("/rpc/open_account", json={"account_id": "a"}, headers=BACKEND)
        assert (error(refused), refused.json()["message"]) == ((503, "PT503"), "not_ready")
        assert "takes no writes" in refused.json()["hint"]
        assert refused.headers["retry-after"] == "5"
        assert door.http.post("/rpc/list_packages", json={}, headers=BACKEND).status_code == 200


@ONE_ENGINE
def test_a_login_that_may_not_act_for_callers_is_told_before_they_come(shapes: Database) -> None:
    issuers = {"https://id.example.com": Issuer("http://127.0.0.1:1/")}
    name = f"nobody_{os.getpid()}"
    dsn = login(shapes).replace("credits_forwarder", name).replace("password=of-the-tests", "password=x")
    with shapes.admin() as admin:
        admin.execute(f"create role {name} login noinherit password 'x'".encode())
        try:
            with Door(dsn, jwt_secret=JWT_SECRET) as door:
                assert error(get(door, "/numbers")) == (503, "PT503")
            admin.execute(f"grant credits_service to {name}".encode())
            for believed in ({"jwt_secret": JWT_SECRET}, {"jwt_issuers": issuers}):
                with Door(dsn, role="credits_service", **believed) as door:
                    answer = door.http.get("/readyz")
                    assert error(answer) == (503, "PT503")
                    assert "credits_forwarder" in answer.json()["hint"]
            with Door(dsn, role="credits_service") as door:  # a door for Stripe alone
                assert door.http.get("/readyz").status_code == 200
            admin.execute(f"grant credits_user to {name}".encode())
            with Door(dsn, role="credits_service", jwt_secret=JWT_SECRET) as door:
                assert door.http.get("/readyz").status_code == 200
                assert get(door, "/numbers").status_code == 200
        finally:
            admin.execute(f"drop owned by {name}; drop role {name}".encode())


@ONE_ENGINE
def test_who_waits_for_the_list_of_functions_does_not_wait_for_ever(
    shapes: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rpc, "READING", 1.0)
    monkeypatch.setattr(rpc, "STALE", 0.3)
    with forwarder(shapes) as door, shapes.admin() as admin:
        assert rpc_(door, "add", {"a": 1}).json() == 11
        with admin.transaction():
            admin.execute("lock table pg_catalog.pg_proc in access exclusive mode")  # as vacuum full does
            time.sleep(0.4)
            assert error(rpc_(door, "nosuch")) == (503, "PGRST000")
        assert error(rpc_(door, "nosuch")) == (404, "PGRST202")


@ONE_ENGINE
def test_a_deploy_is_noticed(shapes: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    pinned = "language sql stable set search_path = pg_catalog, pg_temp"
    monkeypatch.setattr(rpc, "STALE", 0.3)
    with forwarder(shapes) as door, shapes.connect("credits_owner", autocommit=True) as owner:
        assert error(rpc_(door, "late", {"a": 1})) == (404, "PGRST202")
        owner.execute(f"create function credits_api.late(a integer) returns integer {pinned} as 'select 1'")
        owner.execute("grant execute on function credits_api.late to credits_user")
        time.sleep(0.4)
        assert rpc_(door, "late", {"a": 1}).json() == 1
        owner.execute("drop function credits_api.late(integer)")
        owner.execute(
            f"create function credits_api.late(a text, b text default '') returns text {pinned} as 'select a'"
        )
        owner.execute("grant execute on function credits_api.late to credits_user")
        time.sleep(0.4)
        assert error(rpc_(door, "late", {"a": "x"})) in {(404, "42883"), (400, "22P02")}
        assert rpc_(door, "late", {"a": "x", "b": "y"}).json() == "x"
        owner.execute("create function credits_api.late(a integer, b integer) returns text return 'other'")
        assert rpc_(door, "fails", {"state": "42883"}).status_code == 404  # makes it look again
        time.sleep(0.4)
        assert error(rpc_(door, "late", {"a": "x", "b": "y"})) == (300, "PGRST203")
        owner.execute("drop function credits_api.late(integer, integer)")
        time.sleep(0.4)
        assert rpc_(door, "late", {"a": "x"}).json() == "x"
        assert rpc_(door, "fails", {"state": "42883"}).status_code == 404  # makes it doubt, and goes on
        assert rpc_(door, "late", {"a": "x", "b": "y"}).json() == "x"


@ONE_ENGINE
def test_pages_that_may_call_from_a_browser(shapes: Database, door: Door) -> None:
    asks = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization,content-profile"}
    page, other = {"Origin": "https://app.example.com"}, {"Origin": "https://evil.example.com"}
    with forwarder(shapes, cors_origins=("https://app.example.com",)) as open_door:
        for path in ("/rpc/add", "/numbers"):
            may = open_door.http.options(path, headers={**page, **asks})
            assert (may.status_code, may.headers["access-control-allow-origin"]) == (200, page["Origin"])
            allowed = may.headers["access-control-allow-headers"].lower()
            assert all(name in allowed for name in rpc.REQUEST_HEADERS.split())
            assert "access-control-allow-origin" not in open_door.http.options(path, headers={**other, **asks}).headers
        for answer in (rpc_(open_door, "add", {"a": 1}, **page), rpc_(open_door, "poor", {"a": 1}, **page)):
            assert answer.headers["access-control-allow-origin"] == page["Origin"]
            assert "Content-Range" in answer.headers["access-control-expose-headers"]
            assert "access-control-allow-credentials" not in answer.headers
        assert "access-control-allow-origin" not in open_door.http.get("/healthz", headers=page).headers
    closed = door.http.options("/rpc/add", headers={**page, **asks})
    assert (closed.status_code, closed.headers["allow"]) == (200, "OPTIONS,GET,HEAD,POST")
    assert "access-control-allow-origin" not in closed.headers
    assert door.http.options("/numbers").headers["allow"] == "OPTIONS,GET,HEAD"


@ONE_ENGINE
def test_postgrest_as_it_is_deployed(shapes: Database, tmp_path: Path) -> None:
    """Without a token nobody may do more than see nothing, and its description holds our comments."""
    with postgrest(shapes, tmp_path) as http:
        assert http.post("/rpc/add", json={"a": 1}).json() == 11
        assert http.get("/hidden").status_code == 401
        assert http.post("/rpc/spend", json={}, headers=BACKEND).status_code == 406
        assert http.get("/numbers?limit=1", headers={"Prefer": "count=exact"}).headers["content-range"] == "0-0/1500"
        described = http.get("/", headers=USER).json()["paths"]
        assert "/rpc/add" in described
        assert "/rpc/secret" not in described


# Waiting for Stripe --------------------------------------------------------------------------------------------------


@contextmanager
def shop(database: Database, fake: StripeFake | None, **settings: Any) -> Iterator[tuple[Door, Ledger]]:
    """A door that may ask Stripe, and alpha, who may buy and has a customer."""
    with committed(database) as ledger:
        ledger.load_demo_catalog()
        ledger.open("alpha")
        ledger.tell("customer.created", {"id": "cus_1", "object": "customer", "metadata": {"account_id": "alpha"}})
        stripe = {"stripe_key": KEY, "stripe_api_base": fake.url} if fake else {}
        with forwarder(database, **stripe, **settings) as door:
            yield door, ledger


def check_out(door: Door, key: str = "k", path: str = "create_checkout", **more: Any) -> Any:
    """Alpha buys; the answer."""
    bought = {"account_id": "alpha", "package": "starter", "success_url": "http://localhost", "key": key, **more}
    answer = door.http.post(f"/rpc/{path}", json=bought, headers=BACKEND)
    assert answer.status_code == 200, answer.text
    return answer.json()


@ONE_ENGINE
def test_a_buyer_is_sent_on_in_the_request_that_asked(database: Database) -> None:
    with StripeFake() as fake, shop(database, fake) as (door, ledger):
        first = check_out(door)
        assert (first["state"], first["url"].startswith(fake.url)) == ("done", True)
        assert check_out(door) == {**first, "replayed": True}
        assert check_out(door, "l", "create_checkout?select=state,url")["url"].startswith(fake.url)
        asked = {"account_id": "alpha", "return_url": "http://localhost", "key": "k"}
        portal = door.http.post("/rpc/create_portal_session", json=asked, headers=BACKEND).json()
        assert (portal["state"], portal["url"].startswith(fake.url)) == ("done", True)
        assert len(fake.effects) == 3
        assert set(fake.effects.values()) == {1}
        assert ledger.get_portal_session("alpha", "k").url == portal["url"]
        keys = [f"many-{number}" for number in range(12)]
        found: list[Any] = []
        threads = [threading.Thread(target=lambda key=key: found.append(check_out(door, key))) for key in keys * 2]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert {one["state"] for one in found} == {"done"}
        assert len({one["url"] for one in found}) == 12
        assert set(fake.effects.values()) == {1}


@ONE_ENGINE
def test_who_does_not_get_an_answer_in_time_has_lost_nothing(database: Database) -> None:
    with StripeFake(latency=lambda: 1.5) as fake, shop(database, fake, stripe_wait=1) as (door, ledger):
        assert check_out(door)["state"] == "queued"
        for _ in range(100):
            if ledger.get_checkout("alpha", "k").state == "done":
                break
            time.sleep(0.05)
        assert check_out(door)["state"] == "done"
        assert list(fake.effects.values()) == [1]
        fake.latency = lambda: 0.0
        fake.script("500")
        began = time.monotonic()
        late = check_out(door, "l")
        assert (late["state"], late["url"]) == ("queued", None)
        assert time.monotonic() - began < 5
        read = {"account_id": "alpha", "key": "l"}
        began = time.monotonic()
        assert door.http.post("/rpc/get_checkout", json=read, headers=BACKEND).json()["state"] in {"queued", "done"}
        assert time.monotonic() - began < 1  # who only looks does not wait
        fake.script("402")
        assert check_out(door, "m")["state"] == "failed"


@ONE_ENGINE
def test_whoever_sends_it_the_buyer_gets_the_answer(database: Database) -> None:
    """It cannot be claimed at first, as if another process had it: this one looks until there is an answer."""
    with StripeFake() as fake, shop(database, fake) as (door, ledger):
        found: list[Any] = []
        ledger.change("insert into credits.stripe_queue_stop values (true, now(), now() + interval '1 hour', 0)")
        waiting = threading.Thread(target=lambda: found.append(check_out(door)))
        waiting.start()
        time.sleep(0.5)
        assert not found
        ledger.change("delete from credits.stripe_queue_stop")
        waiting.join()
        assert found[0]["state"] == "done"


@ONE_ENGINE
def test_without_a_key_the_answer_comes_at_once(database: Database) -> None:
    with shop(database, None) as (door, _):
        began = time.monotonic()
        assert check_out(door)["state"] == "queued"
        assert time.monotonic() - began < 5
        refused = door.http.post("/rpc/create_checkout", json={"account_id": "alpha", "key": "x"}, headers=BACKEND)
        assert error(refused) == (400, "PT400")


# The page ------------------------------------------------------------------------------------------------------------


@ONE_ENGINE
def test_the_examples_of_the_page_answer_what_it_says(database: Database) -> None:
    page = (ROOT / "docs/forwarder.md").read_text()
    examples = re.findall(r"^(curl .*)\n# (\d+) (.*)$", page, re.MULTILINE)
    assert len(examples) >= 8
    with forwarder(database) as door:
        for command, status, body in examples:
            answer = as_curl(door.http, command.replace("$BACKEND", token(**SERVICE)))
            assert answer.status_code == int(status), (command, answer.text)
            assert fits(json.loads(body), answer.json()), (command, answer.text)


def test_the_page_and_the_example_name_every_setting() -> None:
    page, example = (ROOT / "docs/forwarder.md").read_text(), (ROOT / ".env.example").read_text()
    source = (ROOT / "glue/settings.py").read_text()
    for name in re.findall(r'"((?:PGCREDITS|STRIPE)_\w+)"', source):
        assert f"#{name}=" in example or name == "STRIPE_WEBHOOK_SECRET", name
    for name in re.findall(r'"(PGCREDITS_(?:JWT|CORS)_\w+|PGCREDITS_ST\w+|PGCREDITS_MAX_\w+)"', source):
        assert f"| `{name}` |" in page, name
