"""The door for Stripe: verify the signature over the raw bytes, hand the text to SQL, answer.

200 says one thing only: the event is stored and committed. Whatever keeps it from that is 503, and Stripe retries.
"""

import asyncio
import logging
import time

import psycopg
from psycopg_pool import PoolTimeout
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from stripe import SignatureVerificationError, WebhookSignature

from pgcredits.db import Database
from pgcredits.settings import Settings

TOLERANCE = 300  # seconds, as in Stripe's own libraries; the function that verifies checks no age unless told to
PATIENCE = 9  # seconds for the database: Checkout makes the buyer wait 10 for this answer

log = logging.getLogger("pgcredits.webhook")


class Refused(Exception):  # noqa: N818 - it says what the answer will be
    """A request is answered with status and the four keys of PostgREST's errors."""

    def __init__(self, status: int, message: str, hint: str, headers: dict[str, str] | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.hint, self.headers = status, message, hint, headers

    def response(self) -> Response:
        """The answer."""
        return JSONResponse(
            {"code": f"PT{self.status}", "message": self.message, "details": None, "hint": self.hint},
            self.status,
            self.headers,
        )


def not_now(message: str, hint: str) -> Refused:
    """503: try again; nothing was acknowledged."""
    return Refused(503, message, hint, {"Retry-After": "5"})


async def receive(request: Request) -> Response:
    """POST /webhooks/stripe/{endpoint}."""
    settings: Settings = request.app.state.settings
    database: Database = request.app.state.database
    endpoint: str = request.path_params["endpoint"]
    secrets = settings.secrets_of(endpoint)
    if not secrets:
        log.error("endpoint %s has no secret: set STRIPE_WEBHOOK_SECRET; Stripe will try again", endpoint)
        raise not_now("webhook_secret_missing", "No signing secret is configured for this endpoint.")
    body = await read(request, settings.max_body)
    text = verified(body, request.headers.get("stripe-signature"), secrets)
    try:
        async with asyncio.timeout(PATIENCE):
            (row,) = await database.call("receive_stripe_event", endpoint=endpoint, payload=text)
    except (psycopg.Error, PoolTimeout, OSError, TimeoutError) as error:
        if isinstance(error, psycopg.Error) and error.sqlstate == "PT400":
            raise Refused(400, "invalid_request", "The body must be a JSON object.") from error
        log.error("endpoint %s: not stored; Stripe will try again: %s: %s", endpoint, type(error).__name__, error)  # noqa: TRY400 - one line per event, not a page
        raise not_now("not_stored", "The event could not be stored. Send it again.") from error
    return JSONResponse({"event_id": row["event_id"], "outcome": row["outcome"]})


async def read(request: Request, limit: int) -> bytes:
    """The raw body, refused as soon as it is known to be longer than limit."""
    # Not read to its end, so nothing can follow it on this connection.
    too_large = Refused(
        413, "payload_too_large", f"The body may have {limit} bytes (PGCREDITS_MAX_BODY).", {"Connection": "close"}
    )
    announced = request.headers.get("content-length", "0")
    if announced.isdecimal() and int(announced) > limit:
        raise too_large
    body = bytearray()
    try:
        async for chunk in request.stream():
            body += chunk
            if len(body) > limit:
                raise too_large
    except ClientDisconnect as error:
        raise Refused(400, "invalid_request", "The body ended early.") from error
    return bytes(body)


def verified(body: bytes, header: str | None, secrets: tuple[str, ...]) -> str:
    """The body's text, if one of the secrets signed it and its timestamp is fresh. Raises Refused."""
    refused = Refused(400, "invalid_signature", "No configured secret signed this body at a time near now.")
    for secret in secrets:
        try:
            WebhookSignature.verify_header(body, header, secret, tolerance=TOLERANCE)
            signed_at = next(int(part[2:]) for part in (header or "").split(",") if part.startswith("t="))
            text = body.decode()
        except UnicodeDecodeError as error:
            raise Refused(400, "invalid_request", "The body must be UTF-8.") from error
        except (SignatureVerificationError, TypeError, ValueError):
            continue
        if signed_at > time.time() + TOLERANCE:
            raise refused  # Stripe's library lets the future pass
        if "\0" in text:
            raise Refused(400, "invalid_request", "The body must be a JSON object.")
        return text
    raise refused
