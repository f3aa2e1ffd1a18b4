"""Both official clients get from the forwarder what they get from PostgREST itself, and psql gets the same."""

from pathlib import Path
from typing import Any

import pytest
from five_ways import SERVICE, Case, check
from ledger_support import committed
from psycopg.types.json import Jsonb
from servers import Database, Engine

PINNED = "set search_path = pg_catalog, pg_temp"
OBJECTS = f"""
create type credits_api.pair as (a numeric, b text);
create view credits_api.numbers with (security_invoker = on) as
  select n::bigint as n, 'row ' || n as name, nullif(n % 5, 0) as rest, n % 2 = 0 as even, n * 0.5 as half,
         jsonb_build_object('n', n) as more, array[n, n + 1] as list, left('abcd', (n % 5)::integer) as letters
    from generate_series(1, 1500) n;
grant select on credits_api.numbers to credits_user, credits_service;
create view credits_api.hidden with (security_invoker = on) as select 1 as one;
create function credits_api.add(a numeric, b numeric default 10) returns numeric language sql immutable {PINNED}
  as 'select add.a + add.b';
create function credits_api.nothing() returns text language sql stable {PINNED} as 'select null::text';
create function credits_api.words(list text[], n integer default null, flag boolean default null) returns jsonb
  language sql stable {PINNED}
  as 'select jsonb_build_object(''list'', words.list, ''n'', words.n, ''flag'', words.flag)';
create function credits_api.keep(given jsonb, at timestamptz default null) returns jsonb language sql {PINNED}
  as 'select keep.given';
create function credits_api.one(a numeric, b text default 'none') returns credits_api.pair language sql stable {PINNED}
  as 'select one.a, one.b';
create function credits_api.no_row() returns credits_api.pair language sql stable {PINNED}
  as 'select null::credits_api.pair';
create function credits_api.many(count integer) returns setof credits_api.pair language sql stable {PINNED}
  as 'select i, ''row '' || i from generate_series(1, many.count) i';
create function credits_api.counted(up_to integer) returns setof integer language sql stable {PINNED}
  as 'select generate_series(1, counted.up_to)';
create function credits_api.listed(up_to integer) returns table (i integer, twice integer) language sql stable {PINNED}
  as 'select i, 2 * i from generate_series(1, listed.up_to) i';
create function credits_api.silent(a integer default 1) returns void language plpgsql {PINNED} as 'begin end';
create function credits_api.poor(a numeric) returns numeric language plpgsql {PINNED} as $$ begin
  raise exception using errcode = 'PT402', message = 'insufficient_credits',
    detail = jsonb_build_object('required', poor.a, 'available', 2)::text, hint = 'Buy some.';
end $$;
create function credits_api.fails(state text) returns void language plpgsql {PINNED} as $$ begin
  raise exception using errcode = fails.state, message = 'as asked', hint = 'none', detail = '{{}}';
end $$;
create function credits_api.teapot() returns text language plpgsql {PINNED} as $$ begin
  perform set_config('response.status', '418', true);
  perform set_config('response.headers', '[{{"X-Kind": "tea"}}]', true);
  return 'short and stout';
end $$;
create function credits_api.slow() returns void language plpgsql {PINNED} as 'begin perform pg_sleep(30); end';
create table credits.written (n integer);
create function credits_api.write(n integer) returns integer language plpgsql security definer {PINNED}
  as 'begin insert into credits.written values (write.n); return write.n; end';
create function credits_api.write_many(n integer) returns setof integer language plpgsql security definer {PINNED}
  as 'begin insert into credits.written values (write_many.n); return query select 1 union all select 2; end';
create function credits_api.who() returns jsonb language sql stable {PINNED}
  as 'select current_setting(''request.jwt.claims'')::jsonb || jsonb_build_object(''user'', current_user)';
create function credits_api.secret() returns integer language sql stable {PINNED} as 'select 1';
grant execute on all functions in schema credits_api to credits_user;
revoke execute on function credits_api.secret from credits_user;
"""


def prepare(database: Database) -> None:
    """Functions and views of every shape, and a ledger."""
    with database.connect("credits_owner") as conn:
        conn.execute(OBJECTS.encode())
    with committed(database) as ledger:
        ledger.rows("apply_catalog", catalog=Jsonb(CATALOG))
        ledger.open_account("alpha", plan="team")
        ledger.grant(100)
        ledger.open("frozen", 5)
        ledger.freeze_account("frozen", reason="as the test wants")


CATALOG = {
    "capabilities": {"chapter": {"name": "Chapter", "unit": "words"}},
    "plans": {"team": {"name": "Team", "capabilities": {"chapter": {"limits": [{"calls": 1, "per": "day"}]}}}},
    "rates": [{"capability": "chapter", "price": {"credits": 1, "block": 10}}],
}


def row(n: int) -> dict[str, Any]:
    """A row of the view numbers."""
    return {"n": n, "name": f"row {n}", "rest": n % 5 or None, "even": n % 2 == 0, "half": n / 2, "more": {"n": n}}


def numbers(*ns: int) -> list[dict[str, Any]]:
    """Rows of the view, by number."""
    return [{"n": n} for n in ns]


def view(*steps: tuple[Any, ...], **more: Any) -> Case:
    """A look at the view numbers."""
    return Case("numbers", how="view", steps=steps, **more)


def verb(name: str, **arguments: Any) -> Case:
    """A call of a real verb by a trusted backend."""
    expected = {name: arguments.pop(name) for name in ("status", "body", "code") if name in arguments}
    return Case(name, {"account_id": "alpha", **arguments}, schema="credits", claims=SERVICE, **expected)


def use(usage_id: str, **more: Any) -> Case:
    """A use of a capability."""
    return verb("authorize_usage", capability="chapter", units=10, usage_id=usage_id, **more)


DENIED: Any = {"status": 403, "code": "42501"}
FUNCTIONS = [
    Case("add", {"a": 1}, body=11),
    Case("add", {"a": 0.1, "b": 0.2}, body=0.3),
    Case("add", {"a": "1e3", "b": None}, body=None),
    Case("add", {"b": 2, "a": 1}, body=3, how="get"),
    Case("add", {"a": 12}, how="head"),
    Case("nothing"),
    Case("words", {"list": ["a b", 'c,"d"', "ä"], "flag": True}, body={"list": ["a b", 'c,"d"', "ä"], "flag": True}),
    Case("words", {"list": ["a", "b"], "n": 3}, how="get", body={"list": ["a", "b"], "n": 3}),
    Case("keep", {"given": {"deep": [1.50, {"x": None}]}}, body={"deep": [1.5, {"x": None}]}),
    Case("one", {"a": 5}, body={"a": 5, "b": "none"}),
    Case("one", {"a": 5, "b": None}, body={"a": 5, "b": None}),
    Case("one", {"a": 5}, body={"b": "none"}, select="b"),
    Case("one", {"a": 5}, body={"a": 5}, steps=[("single",)]),
    Case("no_row", body={"a": None, "b": None}),
    Case("many", {"count": 2}, body=[{"a": 1, "b": "row 1"}, {"a": 2, "b": "row 2"}]),
    Case("many", {"count": 0}, body=[]),
    Case("many", {"count": 2}, body=[{"a": 2}], steps=[("gt", "a", 1)], how="get"),
    Case("many", {"count": 9}, body=[{"a": 9}, {"a": 8}], steps=[("order", "a", "desc"), ("limit", 2)]),
    Case("many", {"count": 9}, 206, [{"a": 4}, {"a": 5}], steps=[("range", 3, 4)], count="exact", counted=9),
    Case("many", {"count": 9}, 206, count="exact", counted=9, how="head", steps=[("limit", 2)]),
    Case("many", {"count": 1}, body={"a": 1}, steps=[("single",)]),
    Case("many", {"count": 2}, 406, steps=[("single",)], code="PGRST116"),
    Case("many", {"count": 0}, 406, steps=[("single",)], code="PGRST116"),
    Case("many", {"count": 3}, 400, steps=[("eq", "nope", 1)], code="42703"),
    Case("counted", {"up_to": 3}, body=[1, 2, 3]),
    Case("listed", {"up_to": 2}, body=[{"i": 1, "twice": 2}, {"i": 2, "twice": 4}]),
    Case("silent", status=204),
    Case("silent", {"a": 2}, 204, how="get"),
    Case("teapot", status=418, code="", how="head"),
    Case("write", {"n": 1}, body=1),
    Case("write", {"n": 2}, 405, how="get", code="25006"),
    Case("write_many", {"n": 3}, 406, steps=[("single",)], code="PGRST116"),
    Case("who", body={"sub": "alice", "user": "credits_user"}, claims={"sub": "alice", "role": "credits_user"}),
]
REFUSALS = [
    Case("poor", {"a": 5}, 402, "insufficient_credits"),
    Case("poor", {"a": 5}, 402, "insufficient_credits", steps=[("single",)]),
    Case("add", status=404, code="PGRST202"),
    Case("add", {"a": 1, "c": 1}, 404, code="PGRST202"),
    Case("add", {"a": 1, "c": 1}, 404, code="PGRST202", how="get"),
    Case("nosuch", status=404, code="PGRST202"),
    Case("add", {"a": "x"}, 400, code="22P02"),
    Case("words", {"list": "x"}, 400, code="22P02"),
    Case("secret", **DENIED),
    Case("get_balance", {"account_id": "alpha"}, schema="credits", **DENIED),
    Case("add", {"a": 1}, schema="elsewhere", status=406, code="PGRST106"),
    *(
        Case("fails", {"state": state}, status, "as asked", code=state)
        for state, status in {
            "PT404": 404, "PT409": 409, "PT410": 410, "PT422": 422, "PT423": 423, "PT429": 429, "PT503": 503,
            "23505": 409, "23503": 409, "P0001": 400, "40003": 500, "22000": 400, "42883": 404, "28000": 403,
        }.items()
    ),
    Case("add", {"a": 1}, 401, claims={"exp": 1}, code="PGRST303"),
    Case("add", {"a": 1}, 401, claims={"aud": "others"}, code="PGRST303"),
    Case("add", {"a": 1}, 401, claims={"secret": "another secret that is long enough"}, code="PGRST301"),
    Case("add", {"a": 1}, claims={"role": "postgres"}, **DENIED),
]  # fmt: skip
VIEWS = [
    view(("eq", "n", 7), body=[row(7)]),
    view(("eq", "n", 7), ("single",), body=row(7)),
    view(("gt", "n", 1500), ("single",), status=406, code="PGRST116"),
    view(("lt", "n", 3), select="n", body=numbers(1, 2)),
    view(("gte", "n", 1499), ("neq", "n", 1499), select="n,name", body=[{"n": 1500, "name": "row 1500"}]),
    view(("in", "n", [7, 1, 9]), ("order", "n", "desc"), select="n", body=numbers(9, 7, 1)),
    view(("in", "name", ["row 1", "a,b"]), select="n", body=numbers(1)),
    view(("in", "letters", ["", "a"]), ("lte", "n", 7), select="n", body=numbers(1, 5, 6)),
    view(("in", "letters", ["a", ""]), ("lte", "n", 7), select="n", body=numbers(1, 5, 6)),
    view(("is", "rest", None), ("lte", "n", 10), select="n", body=numbers(5, 10)),
    view(("is", "even", True), ("lte", "n", 4), select="n", body=numbers(2, 4)),
    view(("not", "rest", "is", "null"), ("not", "n", "gt", 2), select="n", body=numbers(1, 2)),
    view(("like", "name", "row 149_"), ("gt", "n", 1498), select="n", body=numbers(1499)),
    view(("ilike", "name", "ROW 15*0"), select="n", body=numbers(150, 1500)),
    view(("order", "rest", "desc", "nullsfirst"), ("order", "n"), ("limit", 2), select="n", body=numbers(5, 10)),
    view(("order", "n"), ("range", 1, 2), select="n", body=numbers(2, 3)),
    view(("order", "n"), ("range", 1, 2), select="n", body=numbers(2, 3), status=206, count="exact", counted=1500),
    view(("gt", "n", 1498), select="n", body=numbers(1499, 1500), count="exact", counted=2),
    view(("range", 1498, 1600), status=206, body=numbers(1499, 1500), select="n", count="exact", counted=1500),
    view(("range", 1600, 1700), status=416, code="PGRST103", count="exact"),
    view(("range", 1600, 1700), body=[]),
    view(select="n", body=numbers(*range(1, 1001))),
    view(select="nope", status=400, code="42703"),
    view(("eq", "n", "x"), status=400, code="22P02"),
    Case("hidden", how="view", **DENIED),
    Case("nosuch", how="view", status=404, code="PGRST205"),
    Case("trial_balance", how="view", schema="credits", **DENIED),
    Case("trial_balance", how="view", schema="credits", claims=SERVICE, steps=[("limit", 0)], body=[]),
]
VERBS = [
    verb("get_balance", body={"available": 100, "debt": 0}),
    verb("spend", amount=30, key="k", body={"available": 70, "replayed": False}),
    verb("spend", amount=30, key="k", body={"available": 70, "replayed": True}),
    verb("spend", amount=31, key="k", status=409, body="idempotency_conflict"),
    verb("spend", amount=1000, key="l", status=402, body="insufficient_credits"),
    verb("spend", amount="0.0000001", key="l", status=422, body="invalid_amount"),
    verb("spend", amount=1, key="", status=400, body="invalid_request"),
    verb("spend", account_id="nobody", amount=1, key="l", status=404, body="account_not_found"),
    verb("spend", account_id="frozen", amount=1, key="l", status=423, body="account_frozen"),
    verb("reserve", amount=10, reservation_id="r", metadata={"a": 1}, body={"available": 60}),
    verb("settle", amount=4, reservation_id="r", body={"charged": 4, "available": 66}),
    use("u", body={"amount": 1}),
    use("v", status=429, body="rate_limited"),
    verb("history", max_rows=2, body=[{"amount": -4}, {"amount": -30}]),
    verb("_fail", status=404, code="PGRST202"),
]


ONE_ENGINE = pytest.mark.parametrize("server", ["pg15"], indirect=True)  # test_ways_in.py is on both


@ONE_ENGINE
def test_functions(server: Engine, tmp_path: Path) -> None:
    check(server, tmp_path, prepare, FUNCTIONS + REFUSALS)


@ONE_ENGINE
def test_views_and_verbs(server: Engine, tmp_path: Path) -> None:
    check(server, tmp_path, prepare, VIEWS + VERBS)
