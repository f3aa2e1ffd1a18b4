"""The API of end users by all five ways in: the same answers to its owner, nothing to anybody else."""

from pathlib import Path
from typing import Any

import pytest
from api_support import ISSUER, furnish
from five_ways import Case, check, postgrest
from ledger_support import committed
from servers import Database, Engine

ALPHA = {"iss": ISSUER, "sub": "user-alpha"}
STRANGER = {"iss": ISSUER, "sub": "user-gamma"}
FOREIGN = {"iss": "https://elsewhere.example", "sub": "user-alpha"}
SESSION: dict[str, Any] = {"success_url": "http://localhost/done", "key": "k2"}


def prepare(database: Database) -> None:
    """Two accounts, of which the callers see one."""
    with committed(database) as ledger:
        furnish(ledger)


def mine(call: str, status: int = 200, body: Any = None, **more: Any) -> Case:
    """A call of alpha's user."""
    how = {name: more.pop(name) for name in ("how", "steps", "count", "counted", "select") if name in more}
    return Case(call, more, status, body, ALPHA, **how)


OWN = [
    mine("get_balance", body={"account_id": "alpha", "available": 1089, "held": 10, "balance": 1099, "debt": 0}),
    mine("get_balance", account_id="alpha", body={"account_id": "alpha"}),
    mine("get_balance", how="get", body={"available": 1089}),
    mine("history", max_rows=2, body=[{"entry_seq": 3}, {"entry_seq": 2, "kind": "spend", "amount": -1}]),
    mine("history", before_seq=2, body=[{"entry_seq": 1, "amount": 100, "balance_after": 100}]),
    mine("history", kinds=["spend"], body=[{"subject": "book:1"}]),
    mine("list_reservations", body=[{"reservation_id": "r1", "amount": 10, "status": "open"}]),
    mine("list_packages", body=[{"code": "starter", "credits": 1000, "price": 1000, "currency": "usd"}]),
    mine("list_plans", body=[{"code": "team"}]),
    mine("list_members", body=[{"member_id": "m1", "monthly_limit": 50}]),
    Case("list_purchases", {"status": "completed"}, body=[{"credits": 1000, "amount": 1000}], claims=ALPHA),
    mine("get_subscription_state", body={"state": "active", "plan": "team", "may_spend": True}),
    mine("prove_balance", body={"ok": True, "balance": 1099}),
    mine("quote", capability="chapter", units=95, body={"amount": 10}),
    mine("check_access", capability="chapter", units=95, body={"allowed": True}),
    mine("check_access", capability="chapter", units=10**6, body={"allowed": False, "code": "insufficient_credits"}),
    mine("create_checkout", package="starter", **SESSION, body={"state": "queued", "replayed": False}),
    mine("create_checkout", package="starter", **SESSION, body={"state": "queued", "replayed": True}),
    mine("get_checkout", key="k2", body={"state": "queued", "replayed": True}),
]
REFUSED = [
    mine("create_checkout", 409, "idempotency_conflict", package="starter", quantity=2, **SESSION),
    mine("create_checkout", 404, "package_not_found", package="none", success_url="http://localhost", key="k3"),
    mine(
        "create_checkout", 400, "redirect_not_allowed", package="starter", success_url="https://evil.example", key="k4"
    ),
    mine("get_checkout", 404, "checkout_not_found", key="none"),
    mine("quote", 404, "capability_not_found", capability="none", units=1),
    mine("quote", 422, "invalid_amount", capability="chapter", units=-1),
    mine("history", 400, "invalid_request", max_rows=0),
]
VIEWS = [
    mine("balances", how="view", body=[{"account_id": "alpha", "available": 1089}]),
    mine("accounts", how="view", body=[{"account_id": "alpha", "status": "active"}]),
    mine(
        "history", 206, how="view", select="entry_seq,amount", count="exact", counted=3,
        steps=[("order", "entry_seq", "desc"), ("limit", 1)], body=[{"entry_seq": 3, "amount": 1000}],
    ),
    mine("history", how="view", steps=[("eq", "account_id", "beta")], body=[]),
    mine("grants", how="view", steps=[("eq", "kind", "purchase")], body=[{"remaining": 1000}]),
    mine("purchases", how="view", steps=[("eq", "status", "completed")], body=[{"package": "starter"}]),
    mine("members", how="view", select="member_id", body=[{"member_id": "m1"}]),
    mine("subscriptions", how="view", select="state", body=[{"state": "active"}]),
]  # fmt: skip
NOT_THEIRS = [
    *(
        Case(call, {**given, "account_id": account_id}, 404, "account_not_found", ALPHA)
        for call, given in {"get_balance": {}, "history": {}, "quote": {"capability": "chapter", "units": 1}}.items()
        for account_id in ("beta", "nobody")
    ),
    Case("get_balance", {}, 404, "account_not_found", STRANGER),
    *(Case("get_balance", {}, 401, "not_authenticated", claims) for claims in (FOREIGN, {"iss": ISSUER})),
    *(
        Case(view, {}, 200, [], claims, how="view", count="exact", counted=0)
        for view in ("balances", "history", "purchases", "packages", "accounts")
        for claims in (FOREIGN, {})
    ),
    Case("balances", {}, 200, [], STRANGER, how="view", count="exact", counted=0),
    Case("spend", {"account_id": "alpha", "amount": 1, "key": "k"}, 404, claims=ALPHA, code="PGRST202"),
]


@pytest.mark.parametrize("cases", [OWN + REFUSED, VIEWS + NOT_THEIRS], ids=["calls", "views and strangers"])
def test_all_ways_answer_alike(server: Engine, tmp_path: Path, cases: list[Case]) -> None:
    check(server, tmp_path, prepare, cases)


def test_the_description_shows_our_comments(database: Database, tmp_path: Path) -> None:
    """PostgREST describes the API in OpenAPI: every function and view with the first line of its comment."""
    with database.connect("credits_owner") as conn:
        described = conn.execute(
            "select '/rpc/' || p.proname, split_part(obj_description(p.oid, 'pg_proc'), e'\\n', 1) from pg_proc p "
            "where p.pronamespace = 'credits_api'::regnamespace union all "
            "select '/' || c.relname, split_part(obj_description(c.oid, 'pg_class'), e'\\n', 1) from pg_class c "
            "where c.relnamespace = 'credits_api'::regnamespace and c.relkind = 'v'"
        ).fetchall()
    with postgrest(database, tmp_path) as client:
        page = client.get("/", headers={"Accept": "application/openapi+json"}).json()
    paths = {path: {said["summary"] for said in told.values()} for path, told in page["paths"].items() if path != "/"}
    assert paths == {path: {summary} for path, summary in described}
