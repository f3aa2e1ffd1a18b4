"""Stripe's API as a server of our own: its idempotency, counted effects, and faults by script."""

import asyncio
import itertools
import json
import re
import socket
import threading
import time
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from email.utils import formatdate
from types import TracebackType
from typing import Any, Self
from urllib.parse import parse_qsl

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

KEY = "sk_test_of_the_tests"
HTML = "<html><body>Bad gateway</body></html>"
# Path, kind of object, prefix of its id, and what a new one holds besides its parameters.
KINDS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "customers": ("customer", "cus", {"email": None}),
    "products": ("product", "prod", {"active": True}),
    "prices": ("price", "price", {"active": True, "type": "one_time"}),
    "checkout/sessions": ("checkout.session", "cs_test", {"status": "open", "payment_status": "unpaid"}),
    "billing_portal/sessions": ("billing_portal.session", "bps", {}),
    "payment_intents": ("payment_intent", "pi", {"status": "requires_confirmation", "client_secret": "pi_secret"}),
    "invoices": ("invoice", "in", {"status": "draft"}),
    "charges": ("charge", "ch", {"captured": True}),
    "refunds": ("refund", "re", {"status": "succeeded", "currency": "usd"}),
    "subscriptions": ("subscription", "sub", {"status": "active", "cancel_at_period_end": False}),
}
# Cards that are declined, and how. All others pay.
CARDS: dict[str, dict[str, Any]] = {
    "pm_declined": {"code": "card_declined", "decline_code": "insufficient_funds"},
    "pm_never": {"code": "card_declined", "decline_code": "stolen_card", "advice_code": "do_not_try_again"},
    "pm_authentication": {"code": "authentication_required", "decline_code": "authentication_required"},
}
WHOLE = {"amount", "unit_amount", "quantity", "limit", "expires_at", "trial_end", "start_date", "end_date"}


@dataclass
class Call:
    """A request as it came."""

    method: str
    path: str
    params: dict[str, Any]
    key: str | None
    version: str | None
    account: str | None
    fault: str | None = None


@dataclass
class Kept:
    """The first result of an idempotency key."""

    call: Call
    status: int
    body: dict[str, Any]


class Cut(Response):
    """An answer that breaks off."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:  # noqa: ARG002 - ASGI's signature
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"1000")]})
        await send({"type": "http.response.body", "body": b'{"id": ', "more_body": True})
        raise ConnectionAbortedError("the answer breaks off, as the script says")


@dataclass
class StripeFake:
    """The server, while the block lasts. Its attributes are looked at and changed by the test at any time."""

    latency: Callable[[], float] = lambda: 0.0  # seconds before each effect, during which its key is in use
    page: int = 100  # objects that a list shows at once at most
    hang: float = 5.0  # seconds of an answer that comes too late
    clock: Callable[[], float] = time.time
    calls: list[Call] = field(default_factory=list)
    effects: Counter[str] = field(default_factory=Counter)  # how often each idempotency key had its effect
    objects: dict[str, dict[str, Any]] = field(default_factory=dict)
    homes: dict[str, str] = field(default_factory=dict)  # the connected account of an object; others are the own one's
    revoked: set[str] = field(default_factory=set)  # connected accounts that took away our access
    fault: Callable[[], str | None] | None = None  # asked once for each request; script() goes first

    def __post_init__(self) -> None:
        self._script: deque[str | None] = deque()
        self._kept: dict[str, Kept] = {}
        self._in_use: set[str] = set()
        self._numbers = itertools.count(1)

    def script(self, *faults: str | None) -> None:
        """What happens to the next requests, one after the other; None is nothing. Then all goes well."""
        assert FAULTS.issuperset({*faults} - {None})
        self._script.extend(faults)

    def __enter__(self) -> Self:
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        app = Starlette(routes=[Route("/{path:path}", self._serve, methods=["GET", "POST", "DELETE"])])
        config = uvicorn.Config(app, log_config=None, log_level="critical", timeout_graceful_shutdown=1)
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._server.run, kwargs={"sockets": [self._listener]})
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._server.should_exit = True
        self._thread.join()
        self._listener.close()

    async def _serve(self, request: Request) -> Response:
        headers = request.headers
        body = (await request.body()).decode() if request.method == "POST" else request.url.query
        fault = self._script.popleft() if self._script else self.fault() if self.fault else None
        key = headers.get("idempotency-key") if request.method == "POST" else None
        call = Call(
            request.method, request.url.path, nested(body), key, headers.get("stripe-version"),
            headers.get("stripe-account"), fault,
        )  # fmt: skip
        self.calls.append(call)
        if headers.get("authorization") != f"Bearer {KEY}":
            call.fault = fault = "401"
        elif key in self._in_use:
            call.fault = fault = "409"
        if fault in BEFORE:
            return BEFORE[fault]()
        status, said, replayed = await self._once(call)
        await asyncio.sleep(self.hang if fault == "hang after" else 0.3 if fault == "slow" else 0)
        if fault in AFTER:
            return AFTER[fault]()
        answer = JSONResponse(
            said, status, {"Request-Id": f"req_{next(self._numbers)}", "Date": formatdate(self.clock(), usegmt=True)}
        )
        if replayed:
            answer.headers["Idempotent-Replayed"] = "true"
        return answer

    async def _once(self, call: Call) -> tuple[int, dict[str, Any], bool]:
        """Status and body of a request, executed once per idempotency key; and whether that was before."""
        if call.key and (kept := self._kept.get(call.key)):
            if (kept.call.path, kept.call.params) != (call.path, call.params):
                return 400, {"error": {"type": "idempotency_error"}}, False
            return kept.status, kept.body, True
        if call.key:
            self._in_use.add(call.key)
        await asyncio.sleep(self.latency())
        status, said = self._execute(call)
        if call.key:
            self._in_use.discard(call.key)
            if status not in (400, 404):  # what is not valid is not kept
                self.effects[call.key] += 1
                self._kept[call.key] = Kept(call, status, said)
        return status, said, False

    def _execute(self, call: Call) -> tuple[int, dict[str, Any]]:
        found = re.fullmatch(rf"/v1/({'|'.join(KINDS)})(?:/(\w+))?(?:/cancel)?", call.path)
        if call.account in self.revoked:
            return error(403, "invalid_request_error", code="account_invalid", message="Access may have been revoked.")
        if wrong := invalid(call.params):
            return error(400, "invalid_request_error", code="parameter_invalid_integer", param=wrong)
        if stranger := self._stranger(call.params, call.account):
            return error(400, "invalid_request_error", code="resource_missing", param=stranger)
        if not found:
            return error(404, "invalid_request_error", message="Unrecognized request URL")
        if call.fault in ("402", "500 kept"):
            intent = {"id": "pi_declined", "object": "payment_intent", "status": "requires_payment_method"}
            declined = error(402, "card_error", code="card_declined", payment_intent=intent)
            return declined if call.fault == "402" else error(500, "api_error")
        return self._touch(call, found[1], found[2])

    def _touch(self, call: Call, path: str, about: str | None) -> tuple[int, dict[str, Any]]:
        """An object made, read, changed or deleted, or a page of them."""
        kind, prefix, new = KINDS[path]
        if not about and call.method != "POST":
            return 200, self._list(kind, call)
        if not about and (refused := self._conflict(call.params)):
            return refused
        about = about or self._new(kind, prefix, new, call.params.get("id"), call.account)
        if about not in self.objects or self.homes.get(about) != call.account:
            return error(404, "invalid_request_error", code="resource_missing")
        known = self.objects[about]
        if call.method == "DELETE":
            known.update({"status": "canceled"} if kind == "subscription" else {"deleted": True})
        elif call.method == "POST":
            if metadata := call.params.get("metadata"):  # which are merged
                metadata = {**known["metadata"], **metadata}
            known.update(typed(call.params) | ({"metadata": metadata} if metadata else {}))
            if kind == "price":
                known["type"] = "recurring" if "recurring" in known else "one_time"
                known.pop("transfer_lookup_key", None)
            if call.path.endswith("/cancel"):
                known["status"] = "canceled"
        return confirmed(known) if kind == "payment_intent" and "confirm" in call.params else (200, dict(known))

    def _list(self, kind: str, call: Call) -> dict[str, Any]:
        """A page of the objects of a kind, the latest first, narrowed by the parameters that are fields of them."""
        asked = dict(call.params)
        limit, after = int(asked.pop("limit", 10)), asked.pop("starting_after", None)
        since = int(asked.pop("created", {}).get("gte", 0))
        found = [
            one for one in reversed(self.objects.values())
            if one["object"] == kind and self.homes.get(one["id"]) == call.account
            and one.get("created", since) >= since and all(fits(one, *wanted) for wanted in asked.items())
        ]  # fmt: skip
        first = 1 + [one["id"] for one in found].index(after) if after else 0
        page = found[first : first + min(limit, self.page)]
        data = [dict(one) for one in page]
        return {"object": "list", "url": call.path, "has_more": first + len(page) < len(found), "data": data}

    def _stranger(self, params: Any, account: str | None) -> str | None:
        """The parameter that names an object of another account."""
        for name, value in params.items() if isinstance(params, dict) else enumerate(params):
            if isinstance(value, dict | list):
                inner = self._stranger(value, account) if name != "metadata" else None
                if inner:
                    return inner
            elif value in self.objects and self.homes.get(value) != account:
                return str(name)
        return None

    def _conflict(self, params: dict[str, Any]) -> tuple[int, dict[str, Any]] | None:
        """An id or a lookup key that is taken; of the latter, unless it is to move."""
        if params.get("id") in self.objects:
            return error(400, "invalid_request_error", code="resource_already_exists", message="It exists already.")
        key = params.get("lookup_key")
        holders = [one for one in self.objects.values() if key and one.get("lookup_key") == key]
        if holders and params.get("transfer_lookup_key") != "true":
            return error(400, "invalid_request_error", message="A price already uses that lookup key.")
        for one in holders:
            one["lookup_key"] = None
        if "unit_amount" in params and params.get("product") not in self.objects:
            return error(400, "invalid_request_error", code="resource_missing", message="No such product.")
        return None

    def _new(
        self, kind: str, prefix: str, new: dict[str, Any], chosen: str | None = None, account: str | None = None
    ) -> str:
        about = chosen or f"{prefix}_{next(self._numbers)}"
        if account:
            self.homes[about] = account
        self.objects[about] = {
            "id": about, "object": kind, "created": int(self.clock()), "livemode": False, "metadata": {}, **new,
            **({"url": f"{self.url}/pay/{about}"} if kind.endswith("session") else {}),
        }  # fmt: skip
        return about


def fits(one: dict[str, Any], name: str, wanted: Any) -> bool:
    """Whether an object has what is asked for: a value, or one of several."""
    if isinstance(wanted, list):
        return one.get(name.removesuffix("s")) in wanted
    has = one.get(name)
    return bool((str(has).lower() if isinstance(has, bool) else has) == wanted)


def confirmed(intent: dict[str, Any]) -> tuple[int, dict[str, Any]]:
    """A payment that is tried with its card."""
    if refused := CARDS.get(intent.get("payment_method", "")):
        intent.update(status="requires_payment_method", amount_received=0, last_payment_error=refused)
        return error(402, "card_error", **refused, payment_intent=dict(intent))
    intent.update(status="succeeded", amount_received=intent.get("amount", 0))
    return 200, dict(intent)


def error(status: int, kind: str, **more: Any) -> tuple[int, dict[str, Any]]:
    """An error as Stripe words it."""
    return status, {"error": {"type": kind, **more}}


def refusal(status: int, kind: str, wait: int = 0, **more: str) -> Callable[[], Response]:
    """The same as an answer, perhaps with a word on how many seconds to wait."""
    _, body = error(status, kind, **more)
    headers = {"Request-Id": "req_refused"} | ({"Retry-After": str(wait)} if wait else {})
    return lambda: JSONResponse(body, status, headers)


# Faults that come instead of the effect, and those that come after it. Others: hang after, slow, and the results that
# are kept under the key, 402 and "500 kept".
BEFORE: dict[str | None, Callable[[], Response]] = {
    "401": refusal(401, "invalid_request_error", message="Invalid API Key provided"),
    "409": refusal(409, "idempotency_error", code="idempotency_key_in_use"),
    "429": refusal(429, "rate_limit_error", wait=40, code="rate_limit"),
    "500": refusal(500, "api_error"),
    "503 html": lambda: HTMLResponse(HTML, 503),
    "503 gateway": lambda: JSONResponse({"error": "upstream connect error"}, 503),
    "404 gateway": lambda: JSONResponse({"error": "no route"}, 404),
    "cut before": Cut,
}
AFTER: dict[str | None, Callable[[], Response]] = {"no json": lambda: HTMLResponse(HTML, 200), "cut after": Cut}
FAULTS = {*BEFORE, *AFTER, "hang after", "slow", "402", "500 kept"}


def nested(form: str) -> dict[str, Any]:
    """a[b][0][c]=v as dicts and lists; values are text."""
    root: dict[str, Any] = {}
    for name, value in parse_qsl(form, keep_blank_values=True):
        first, *rest = [part.rstrip("]") for part in name.split("[")]
        at = root
        for here, _ in itertools.pairwise([first, *rest]):
            at = at.setdefault(here, {})
        at[[first, *rest][-1]] = value
    listed: dict[str, Any] = json.loads(json.dumps(root), object_hook=as_list)
    return listed


def as_list(found: dict[str, Any]) -> Any:
    """A dict whose keys are 0, 1, 2, … is a list."""
    return list(found.values()) if found and list(found) == [str(n) for n in range(len(found))] else found


def invalid(params: Any) -> str | None:
    """The parameter that should be a whole number and is none."""
    for name, value in params.items() if isinstance(params, dict) else enumerate(params):
        if name in WHOLE and not re.fullmatch(r"-?\d+", str(value)):
            return str(name)
        if isinstance(value, dict | list) and (inner := invalid(value)):
            return inner
    return None


def typed(params: dict[str, Any]) -> dict[str, Any]:
    """Parameters as the object shows them."""
    words = {"true": True, "false": False}
    return {
        name: int(value) if name in WHOLE else words.get(value, value) if isinstance(value, str) else value
        for name, value in params.items()
    }
