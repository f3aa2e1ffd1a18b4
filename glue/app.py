"""The routes of the door."""

import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import psycopg
from psycopg_pool import PoolTimeout
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import BaseRoute, Route

from pgcredits import notifier, observe, rpc, ticker, webhook, worker
from pgcredits.answers import Refused, not_now
from pgcredits.auth import Verifier
from pgcredits.db import Database
from pgcredits.settings import Settings

log = logging.getLogger("pgcredits.app")


def create_app(settings: Settings) -> Starlette:
    """The ASGI application. It starts without a database and answers 503 until there is one."""
    database = Database(settings.dsn, role=settings.role, size=settings.pool_size, wait=settings.pool_timeout)

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        await database.open()
        try:
            async with (
                worker.running(database, settings) as app.state.worker,
                notifier.running(database, settings),
                ticker.running(database, settings),
            ):
                yield
        finally:
            await database.close()

    figures = observe.Figures()
    routes: list[BaseRoute] = [
        Route("/webhooks/stripe/{endpoint}", webhook.receive, methods=["POST"]),
        Route("/healthz", healthz),
        Route("/readyz", readyz),
        Route("/metrics", observe.metrics),
        *rpc.routes(settings),
    ]
    app = Starlette(
        routes=routes,
        middleware=[Middleware(observe.Observer, figures=figures, routes=routes)],
        exception_handlers={Refused: refused, HTTPException: http_error, Exception: unexpected},
        lifespan=lifespan,
    )
    app.router.redirect_slashes = False  # to Stripe a redirect is a failure
    app.state.settings = settings
    app.state.database = database
    app.state.forwarder = rpc.Forwarder(database, settings, Verifier(settings), rpc.Catalog(database))
    app.state.figures = figures
    return app


async def healthz(_: Request) -> Response:
    """The process is alive, whatever the database does."""
    return JSONResponse({"status": "alive"})


async def readyz(request: Request) -> Response:
    """200 if the database answers, has the schema, takes writes, and lets this door forward; 503 says what is wrong."""
    database: Database = request.app.state.database
    forwarder: rpc.Forwarder = request.app.state.forwarder
    try:
        problem = await database.ready()
        if not problem:
            problem = " ".join([row["ready"] for row in await database.call("ready")])
        if not problem:
            await forwarder.ready()
    except psycopg.errors.UndefinedFunction:
        problem = "the schema is older than this program; run: pgcredits migrate"
    except (psycopg.Error, PoolTimeout, OSError) as error:
        log.warning("not ready: %s", error)
        problem = "the database does not answer"
    if problem:
        raise not_now("not_ready", problem)
    return JSONResponse({"status": "ready"})


async def refused(_: Request, error: Exception) -> Response:
    """An answer that a route decided on."""
    assert isinstance(error, Refused)  # noqa: S101 - Starlette's type of handlers is wider than what it calls them with
    return error.response()


async def http_error(_: Request, error: Exception) -> Response:
    """404 and 405 in the form of all other errors."""
    assert isinstance(error, HTTPException)  # noqa: S101 - as above
    message = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code, "invalid_request")
    return Refused(error.status_code, message, f"{error.detail}.", dict(error.headers or {})).response()


async def unexpected(_: Request, __: Exception) -> Response:
    """A bug of ours: nothing was acknowledged, and the log has it."""
    named = {observe.HEADER: observe.request_id.get() or ""}  # this answer is made outside of all middleware
    return Refused(500, "internal_error", "Something went wrong on our side; the log has it.", named).response()
