"""Answers that a route decides on: refusals in the form of PostgREST's errors, and bodies that are too long."""

import asyncio
from typing import Any

from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response

from pgcredits.settings import Settings


class Refused(Exception):  # noqa: N818 - it says what the answer will be
    """A request is answered with status and the four keys of PostgREST's errors."""

    def __init__(
        self,
        status: int,
        message: str,
        hint: str | None,
        headers: dict[str, str] | None = None,
        *,
        code: str = "",
        details: Any = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.hint, self.headers = status, message, hint, headers
        self.code, self.details = code or f"PT{status}", details

    def response(self) -> Response:
        """The answer."""
        return JSONResponse(
            {"code": self.code, "message": self.message, "details": self.details, "hint": self.hint},
            self.status,
            {"Proxy-Status": f"PostgREST; error={self.code}", **(self.headers or {})},
        )


def not_now(message: str, hint: str) -> Refused:
    """503: try again; nothing was acknowledged."""
    return Refused(503, message, hint, {"Retry-After": "5"})


async def read(request: Request, settings: Settings) -> bytes:
    """The raw body, refused as soon as it is known to be too long, or to take too long."""
    limit, patience = settings.max_body, settings.body_timeout
    # Not read to its end, so nothing can follow it on this connection.
    too_large = Refused(
        413, "payload_too_large", f"The body may have {limit} bytes (PGCREDITS_MAX_BODY).", {"Connection": "close"}
    )
    announced = request.headers.get("content-length", "0")
    if announced.isdecimal() and int(announced) > limit:
        raise too_large
    body = bytearray()
    try:
        async with asyncio.timeout(patience):
            async for chunk in request.stream():
                body += chunk
                if len(body) > limit:
                    raise too_large
    except TimeoutError as error:
        late = f"The body may take {patience:g} seconds to arrive (PGCREDITS_BODY_TIMEOUT)."
        raise Refused(408, "request_timeout", late, {"Connection": "close"}) from error
    except ClientDisconnect as error:
        raise Refused(400, "invalid_request", "The body ended early.") from error
    return bytes(body)
