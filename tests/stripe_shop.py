"""A Stripe to click through, on this machine: Checkout with a page to pay at, the portal, refunds, and signed webhooks.

python tests/stripe_shop.py [--port 12111] [--webhook http://127.0.0.1:8080/webhooks/stripe/default]

Signs with STRIPE_WEBHOOK_SECRET. Its key is sk_test_of_the_tests. It remembers nothing when it ends.
"""

import argparse
import html
import json
import os
import socket
import time
from typing import Any

import anyio.to_thread
import httpx
import uvicorn
from door import signature
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import HTMLResponse, RedirectResponse, Response
from starlette.routing import Route
from stripe_fake import KEY, Call, StripeFake

Json = dict[str, Any]
PAGE = """<!doctype html><meta charset="utf-8"><title>{title}</title>
<body style="font-family: sans-serif; max-width: 30em; margin: 4em auto"><h1>{title}</h1>{body}</body>"""
PAY = """<p>{amount}, for {account}.</p><form method="post"><button name="how" value="paid">Pay</button>
<button name="how" value="unpaid">Pay by a method that takes days</button>
<button name="how" value="expired">Let it expire</button></form>"""


class Shop(StripeFake):
    """The fake of the tests, with buyers: what they do changes its objects and is told to the webhook."""

    def __init__(self, webhook: str, secret: str) -> None:
        super().__init__()
        self._webhook, self._secret = webhook, secret
        self._told: list[tuple[str, str]] = []

    def app(self) -> Starlette:
        """Pages for people, everything else for the API."""
        return Starlette(routes=[
            Route("/pay/{session}", self._page, methods=["GET", "POST"]),
            Route("/{path:path}", self._answer, methods=["GET", "POST", "DELETE"]),
        ])  # fmt: skip

    async def _answer(self, request: Request) -> Response:
        answer = await self._serve(request)
        await self._tell()
        return answer

    async def _page(self, request: Request) -> Response:
        session = self.objects.get(request.path_params["session"], {})
        if session.get("object") == "billing_portal.session":
            back = html.escape(session["return_url"])
            return page("Your account", f'<p>Cards and invoices would be here.</p><a href="{back}">Back</a>')
        if session.get("status") != "open":
            return page("This page is closed", f"<p>The session is {session.get('status', 'unknown')}.</p>")
        if request.method == "GET":
            shown = f"{session['amount_total'] / 100:.2f} {session['currency'].upper()}"
            return page("Checkout", PAY.format(amount=shown, account=html.escape(session["client_reference_id"])))
        how = (await request.body()).decode().partition("how=")[2]
        self._buy(session, how)
        await self._tell()
        back = session["success_url"] if how != "expired" else session.get("cancel_url", session["success_url"])
        return RedirectResponse(back.replace("{CHECKOUT_SESSION_ID}", session["id"]), 303)

    def _buy(self, session: Json, how: str) -> None:
        if how == "expired":
            session["status"] = "expired"
            self._told.append(("checkout.session.expired", session["id"]))
            return
        session["customer"] = session.get("customer") or self._new("customer", "cus", {"metadata": session["metadata"]})
        money = {name: session[name] for name in ("customer", "metadata")}
        money |= {"amount": session["amount_total"], "currency": session["currency"]}
        intent = self._new(
            "payment_intent", "pi", {**money, "status": "processing" if how == "unpaid" else "succeeded"}
        )
        session |= {"status": "complete", "payment_status": how, "payment_intent": intent, "url": None}
        self._told.append(("checkout.session.completed", session["id"]))
        if how == "paid":
            captured = {
                "amount_captured": money["amount"],
                "amount_refunded": 0,
                "captured": True,
                "payment_intent": intent,
            }
            charge = self._new("charge", "ch", {**money, **captured, "status": "succeeded"})
            self.objects[intent]["latest_charge"] = charge
            self._told += [("payment_intent.succeeded", intent), ("charge.succeeded", charge)]

    def _execute(self, call: Call) -> tuple[int, Json]:
        status, said = super()._execute(call)
        kind = said.get("object") if call.method == "POST" else None
        if kind == "checkout.session":
            (item,) = call.params["line_items"]
            price = item.get("price_data") or self.objects.get(item["price"], {"unit_amount": 0, "currency": "usd"})
            total = int(price["unit_amount"]) * int(item["quantity"])
            sold = {"amount_subtotal": total, "amount_total": total, "currency": price["currency"]}
            self.objects[said["id"]] |= {**sold, "expires_at": int(self.clock()) + 86400}
        elif kind == "refund":
            charge = self.objects[self.objects[said["payment_intent"]]["latest_charge"]]
            charge["amount_refunded"] += said["amount"]
            self.objects[said["id"]]["charge"] = charge["id"]
            self._told += [("refund.created", said["id"]), ("charge.refunded", charge["id"])]
        return status, dict(self.objects.get(said.get("id", ""), said))

    async def _tell(self) -> None:
        """Send what happened, in the order in which it did."""
        told, self._told = self._told, []
        for number, (event_type, about) in enumerate(told):
            event = {
                "id": f"evt_{time.time_ns()}_{number}", "object": "event", "type": event_type, "livemode": False,
                "created": int(self.clock()), "data": {"object": self.objects[about]},
            }  # fmt: skip
            await anyio.to_thread.run_sync(self._post, json.dumps(event).encode())

    def _post(self, body: bytes) -> None:
        try:
            headers = {"Stripe-Signature": signature(body, self._secret)}
            answer = httpx.post(self._webhook, content=body, headers=headers, timeout=10)
        except httpx.HTTPError as error:
            print(f"webhook: {error}", flush=True)
        else:
            print(f"webhook: {json.loads(body)['type']} {answer.status_code} {answer.text}", flush=True)


def page(title: str, body: str) -> Response:
    """A page for people."""
    return HTMLResponse(PAGE.format(title=title, body=body))


def main() -> None:
    """Serve until it is stopped."""
    asked = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    asked.add_argument("--port", type=int, default=12111)
    asked.add_argument("--webhook", default="http://127.0.0.1:8080/webhooks/stripe/default")
    given = asked.parse_args()
    secret = os.environ["STRIPE_WEBHOOK_SECRET"]
    with socket.create_server(("127.0.0.1", given.port)) as listener:
        shop = Shop(given.webhook, secret)
        shop.url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        print(f"Stripe, as far as tests need it, is {shop.url}; its key is {KEY}", flush=True)
        uvicorn.Server(uvicorn.Config(shop.app(), log_level="warning")).run(sockets=[listener])


if __name__ == "__main__":
    main()
