"""The worker of notifications: sends what SQL wrote as signed webhooks and e-mails, and brings back what came of it.

It decides nothing: what is due, to whom, in which words, and what an answer means is SQL's. It may be killed at any
moment: what it had claimed is sent again, under the same id, after its lease.
"""

import asyncio
import logging
from collections.abc import Sequence
from contextlib import AbstractAsyncContextManager
from datetime import UTC, datetime
from functools import partial
from uuid import uuid4

import httpx
from standardwebhooks.webhooks import EmptyWebhookSecretError, Webhook

from pgcredits.db import Database, Row
from pgcredits.mail import Outcome, mail
from pgcredits.outbox import Crew, alone, beside, bring_back, claim, process_name
from pgcredits.settings import Settings

PATIENCE = 15.0  # seconds for a receiver, connecting and all; the lease (notification_lease) is longer
KEPT = 500  # characters of an answer, and no more is read of it than that takes

log = logging.getLogger("pgcredits.notifier")


class Notifier:
    """Sends what is due. Belongs to the event loop that runs it."""

    def __init__(self, database: Database, settings: Settings) -> None:
        self._database, self._settings = database, settings
        self._channels = ["webhook", *(["email"] if settings.smtp_url else [])]
        # Not that of a worker before, even in a container whose process has the same number again: what that one had on
        # its way, until its lease is over, counts against nobody's share of a target.
        self._name = f"{process_name()}:{uuid4().hex[:8]}"

    async def run(self, stop: asyncio.Event, *, once: bool = False) -> None:
        """Work until stop is set, or with once until nothing is due; then finish what is in flight."""
        logging.getLogger("httpx").setLevel(logging.WARNING)  # an address may hold a secret of its receiver
        async with httpx.AsyncClient(follow_redirects=False, trust_env=False, timeout=PATIENCE) as http:

            async def due(free: int) -> list[Row] | None:
                return await claim(
                    self._database, "claim_notifications", must=once, max_rows=free, worker=self._name,
                    channels=self._channels,
                )  # fmt: skip

            async def deliver(row: Row) -> None:
                outcome = await self._send(http, row)
                result = await bring_back(
                    self._database, "complete_notification", f"delivery {row['delivery_id']}",
                    delivery_id=row["delivery_id"], attempt=row["attempt"], status=outcome.status,
                    answer=outcome.answer,
                )  # fmt: skip
                if result and result["state"] != "delivered":
                    log.warning(
                        "delivery %s to %s: %s, answer %s", row["delivery_id"], row["target"], result["state"],
                        outcome.status,
                    )  # fmt: skip

            await Crew(deliver).drain(due, stop, once=once)

    async def _send(self, http: httpx.AsyncClient, row: Row) -> Outcome:
        if row["channel"] == "email":
            return await asyncio.to_thread(mail, self._settings, row)
        return await post(http, row, self._settings.notify_secrets_of(row["target"]))


async def post(http: httpx.AsyncClient, row: Row, secrets: Sequence[str]) -> Outcome:
    """Post a notification to its endpoint, signed by each secret. Every answer, and none, is an outcome."""
    try:
        headers = signed(row["message_id"], row["body"], secrets)
    except (ValueError, EmptyWebhookSecretError):
        return Outcome(None, f"not sent: set PGCREDITS_NOTIFY_SECRET_{row['target'].upper()} to a secret (whsec_…)")
    try:
        async with (
            asyncio.timeout(PATIENCE),
            http.stream("POST", row["address"], content=row["body"].encode(), headers=headers) as answer,
        ):
            return Outcome(answer.status_code, await _beginning(answer))
    except (httpx.HTTPError, httpx.InvalidURL, TimeoutError, UnicodeError) as error:
        return Outcome(None, f"no answer: {type(error).__name__}")


def signed(message_id: str, body: str, secrets: Sequence[str]) -> dict[str, str]:
    """The headers of Standard Webhooks, with a signature for each secret. Raises ValueError without any."""
    if not secrets:
        raise ValueError("no secret")
    now = datetime.now(UTC)
    return {
        "webhook-id": message_id,
        "webhook-timestamp": str(int(now.timestamp())),
        "webhook-signature": " ".join(Webhook(secret).sign(message_id, now, body) for secret in secrets),
        "content-type": "application/json",
        "user-agent": "pgcredits",
    }


async def _beginning(answer: httpx.Response) -> str:
    """The first characters of an answer. How it goes on, or breaks off, changes nothing: its status is here."""
    begun = bytearray()
    try:
        async for piece in answer.aiter_raw():
            begun += piece[: 4 * KEPT]
            if len(begun) >= 4 * KEPT:
                break
    except (httpx.HTTPError, TimeoutError):
        pass
    return begun.decode(errors="replace").replace("\0", "")[:KEPT]


def configured(settings: Settings) -> bool:
    """Whether there is anything that notifications could be sent with."""
    return bool(settings.notify_secrets or settings.smtp_url)


def running(database: Database, settings: Settings) -> AbstractAsyncContextManager[None]:
    """Work beside the block, if anything is configured. At its end what is in flight is finished."""
    return beside(Notifier(database, settings).run if configured(settings) else None)


async def work(settings: Settings, *, once: bool = False) -> None:
    """Work as a process of its own until SIGINT or SIGTERM, or with once until nothing is due."""
    await alone(settings, lambda database: partial(Notifier(database, settings).run, once=once))
