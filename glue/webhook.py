"""The door for Stripe: verify the signature over the raw bytes, hand the text to SQL, answer.

200 says one thing only: the event is stored and committed. Whatever keeps it from that is 503, and Stripe retries.
"""

import asyncio
import logging
import time

import psycopg
from psycopg_pool import PoolTimeout
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from stripe import SignatureVerificationError, WebhookSignature

from pgcredits.answers import Refused, not_now, read
from pgcredits.db import Database
from pgcredits.settings import Settings

TOLERANCE = 300  # seconds, as in Stripe's own libraries; the function that verifies checks no age unless told to
PATIENCE = 9  # seconds for the database: Checkout makes the buyer wait 10 for this answer

log = logging.getLogger("pgcredits.webhook")


async def receive(request: Request) -> Response:
    """POST /webhooks/stripe/{endpoint}."""
    settings: Settings = request.app.state.settings
    database: Database = request.app.state.database
    endpoint: str = request.path_params["endpoint"]
    secrets = settings.secrets_of(endpoint)
    if not secrets:
        log.error("endpoint %s has no secret: set STRIPE_WEBHOOK_SECRET; Stripe will try again", endpoint)
        raise not_now("webhook_secret_missing", "No signing secret is configured for this endpoint.")
    body = await read(request, settings)
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
