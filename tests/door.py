"""The door for tests: served by uvicorn on a free port, and events signed as Stripe signs them."""

import hashlib
import hmac
import json
import shlex
import socket
import threading
import time
from types import TracebackType
from typing import Any, Self

import httpx
import uvicorn

from pgcredits.app import create_app
from pgcredits.settings import Settings

SECRET = "whsec_of_the_tests"


def signature(body: bytes, secret: str = SECRET, at: float | None = None) -> str:
    """The header that Stripe would send with body."""
    moment = int(time.time() if at is None else at)
    signed = hmac.new(secret.encode(), f"{moment}.".encode() + body, hashlib.sha256).hexdigest()
    return f"t={moment},v1={signed},v0=ignored"


def paid(account_id: str, event_id: str = "evt_1", session: str = "cs_1", **changes: Any) -> bytes:
    """A checkout of the demo catalogue's starter package that was paid in full."""
    checkout: dict[str, Any] = {
        "id": session, "object": "checkout.session", "mode": "payment", "payment_status": "paid", "status": "complete",
        "livemode": False, "client_reference_id": account_id, "customer": None, "payment_intent": f"pi_{session}",
        "metadata": {"account_id": account_id, "package": "starter"}, **changes,
    }  # fmt: skip
    return json.dumps(
        {"id": event_id, "object": "event", "type": "checkout.session.completed", "created": int(time.time()),
         "livemode": False, "data": {"object": checkout}}
    ).encode()  # fmt: skip


def as_curl(http: httpx.Client, command: str) -> httpx.Response:
    """What `curl $DOOR/...` would be answered, with the headers that curl sends for -d (a form) and for --json."""
    address, *words = shlex.split(command)[1:]
    given = [*zip(words[::2], words[1::2], strict=True)]
    assert {flag for flag, _ in given} <= {"-H", "-d", "--json"}, command
    assert address.startswith("$DOOR/"), command
    headers = dict(value.split(": ", 1) for flag, value in given if flag == "-H")
    for flag, kind in ("-d", "application/x-www-form-urlencoded"), ("--json", "application/json"):
        for data in (value for name, value in given if name == flag):
            return http.post(address.removeprefix("$DOOR"), content=data, headers={"Content-Type": kind, **headers})
    return http.get(address.removeprefix("$DOOR"), headers=headers)


class Door:
    """A running door. post() sends a signed event."""

    def __init__(self, dsn: str, **settings: Any) -> None:
        secrets = settings.pop("webhook_secrets", {"": (SECRET,)})
        self.app = create_app(Settings(dsn=dsn, webhook_secrets=secrets, **settings))

    def __enter__(self) -> Self:
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        config = uvicorn.Config(self.app, log_config=None, timeout_graceful_shutdown=5)
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._server.run, kwargs={"sockets": [self._listener]})
        self._thread.start()
        self.http = httpx.Client(base_url=f"http://127.0.0.1:{self.port}", timeout=30)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.http.close()
        self._server.should_exit = True
        self._thread.join()
        self._listener.close()

    def post(self, body: bytes, header: str | None = None, endpoint: str = "default") -> httpx.Response:
        signed = {"Stripe-Signature": signature(body) if header is None else header}
        return self.http.post(f"/webhooks/stripe/{endpoint}", content=body, headers=signed)
