"""The verbs through a real PostgREST: an answer has the status of our error and says what is missing."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from five_ways import postgrest
from ledger_support import committed
from psycopg.types.json import Jsonb
from servers import Database

CATALOG = {
    "capabilities": {"chapter": {"name": "Chapter", "unit": "words"}, "image": {"name": "Image"}},
    "plans": {
        "team": {"name": "Team", "capabilities": {"chapter": {"limits": [{"calls": 2, "per": "day"}]}}},
        "house": {"name": "House", "capabilities": {"image": {}}},
    },
    "rates": [{"capability": "chapter", "price": {"credits": 1, "block": 10}}, {"capability": "image", "price": 5}],
}


@pytest.fixture
def service(database: Database, tmp_path: Path) -> Iterator[httpx.Client]:
    with committed(database) as ledger:
        ledger.rows("apply_catalog", catalog=Jsonb(CATALOG))
        ledger.open_account("alpha", plan="team")
        ledger.grant(100)
    with postgrest(database, tmp_path, db_schemas="credits", db_anon_role="credits_service") as client:
        yield client


def authorize(service: httpx.Client, usage_id: str, **more: Any) -> httpx.Response:
    """A use of a capability, asked for over HTTP."""
    arguments = {"account_id": "alpha", "capability": "chapter", "units": 500, "usage_id": usage_id, **more}
    return service.post("/rpc/authorize_usage", json=arguments)


def test_refusals_carry_their_status_and_what_is_missing(service: httpx.Client) -> None:
    admitted = authorize(service, "u1")
    assert (admitted.status_code, admitted.json()["amount"]) == (200, 50)

    poor = authorize(service, "u2", units=1000)
    assert (poor.status_code, poor.json()["message"]) == (402, "insufficient_credits")
    assert detail(poor)["required"] == 100
    assert detail(poor)["available"] == 50

    for gate, arguments in {
        "plan_required": {"capability": "image"},
        "quality_not_in_plan": {"quality": "best"},
    }.items():
        turned_down = authorize(service, "u3", **arguments)
        assert (turned_down.status_code, turned_down.json()["message"]) == (403, gate)
    assert detail(authorize(service, "u3", capability="image"))["plans"] == ["house"]

    assert authorize(service, "u4", units=100).status_code == 200
    often = authorize(service, "u5", units=1)
    assert (often.status_code, often.json()["message"]) == (429, "rate_limited")
    assert (detail(often)["limit"], detail(often)["used"]) == (2, 2)
    assert detail(often)["resets_at"]
    assert often.json()["hint"]

    look = service.post("/rpc/check_access", json={"account_id": "alpha", "capability": "chapter", "units": 1})
    assert (look.status_code, look.json()["allowed"], look.json()["gate"]) == (200, False, "rate_limit")
    assert look.json()["detail"]["resets_at"] == detail(often)["resets_at"]

    settled = service.post("/rpc/settle_usage", json={"account_id": "alpha", "usage_id": "u1", "units": 123})
    assert (settled.status_code, settled.json()["charged"], settled.json()["explanation"]["amount"]) == (200, 13, 13)
    limits = service.post("/rpc/get_limits", json={"account_id": "alpha"}).json()
    assert [(row["gate"], row["used"], row["left"]) for row in limits] == [("rate_limit", 2, 0)]


def detail(answer: httpx.Response) -> dict[str, Any]:
    """DETAIL is JSON in a string."""
    found: dict[str, Any] = httpx.Response(200, text=answer.json()["details"]).json()
    return found
