"""What the door says of itself: a line of log per request, its id, how long it took, and the figures for Prometheus.

Nothing of a request is logged but its method, route, status and time: no body, no query, no header, no address.
"""

import hmac
import json
import logging
import re
import time
import traceback
import uuid
from collections.abc import Iterable
from contextvars import ContextVar
from datetime import UTC, datetime
from typing import Any

import psycopg
from prometheus_client import (
    CONTENT_TYPE_LATEST,
    CollectorRegistry,
    Gauge,
    Histogram,
    ProcessCollector,
    generate_latest,
)
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector
from psycopg_pool import PoolTimeout
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from pgcredits.db import Database, Row
from pgcredits.settings import Settings

HEADER = "X-Request-Id"
GIVEN = re.compile(r"[\w.:=+/-]{1,128}", re.ASCII)  # what a proxy may call a request; anything else gets a name of ours
QUIET = frozenset({"/healthz", "/readyz", "/metrics"})  # asked every few seconds
BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)
TEXT = "%(asctime)s %(levelname)s %(name)s: %(message)s"

request_id: ContextVar[str | None] = ContextVar("request_id", default=None)
log = logging.getLogger("pgcredits.access")


# Logs ---------------------------------------------------------------------------------------------------------------


class JsonFormatter(logging.Formatter):
    """One JSON object a line: time, level, logger, message, request_id, what was passed as `fields`, a traceback."""

    def format(self, record: logging.LogRecord) -> str:
        """The line of a record."""
        line = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            "request_id": request_id.get(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            line["traceback"] = "".join(traceback.format_exception(*record.exc_info))
        return json.dumps({name: value for name, value in line.items() if value is not None}, default=str)


def configure_logging(settings: Settings) -> None:
    """Send every log of the process to standard error, as PGCREDITS_LOG_FORMAT says."""
    handler = logging.StreamHandler()
    handler.setFormatter(JsonFormatter() if settings.log_format == "json" else logging.Formatter(TEXT))
    logging.basicConfig(level=logging.INFO, handlers=[handler], force=True)
    for name in ("httpx", "stripe"):
        logging.getLogger(name).setLevel(logging.WARNING)  # each address, with what is asked for, is not for a log


# Requests -----------------------------------------------------------------------------------------------------------


class Figures:
    """What one door counts. Each has a registry of its own, so that several fit into a process."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        self.seconds = Histogram(
            "pgcredits_http_request_seconds", "Time from a request to the end of its answer.",
            ("method", "route", "status"), buckets=BUCKETS, registry=self.registry,
        )  # fmt: skip
        self.up = Gauge("pgcredits_up", "1 if the database answered this scrape.", registry=self.registry)


class Observer:
    """ASGI middleware: names each request, times it, and logs its end."""

    def __init__(self, app: ASGIApp, figures: Figures, routes: list[BaseRoute]) -> None:
        self._app, self._figures = app, figures
        self._routes: dict[object, str] = {route.endpoint: route.path for route in routes if isinstance(route, Route)}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve a request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = next(
            (value.decode("latin-1") for name, value in scope["headers"] if name == HEADER.lower().encode()), ""
        )
        name = given if GIVEN.fullmatch(given) else uuid.uuid4().hex
        request_id.set(name)  # for the rest of this task, which is the request's own
        began, status = time.perf_counter(), 500

        async def answer(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", []), (HEADER.encode(), name.encode())]
            await send(message)

        try:
            await self._app(scope, receive, answer)
        finally:
            self._finished(scope, status, time.perf_counter() - began)

    def _finished(self, scope: Scope, status: int, seconds: float) -> None:
        route = self._routes.get(scope.get("endpoint", self), "unknown")
        method = scope["method"] if scope["method"] in {"GET", "POST", "HEAD"} else "other"
        self._figures.seconds.labels(method, route, str(status)).observe(seconds)
        if route not in QUIET:
            fields = {"method": method, "route": route, "status": status, "seconds": round(seconds, 4)}
            log.info("%s %s %s in %.1f ms", method, route, status, seconds * 1000, extra={"fields": fields})


# Figures ------------------------------------------------------------------------------------------------------------


class _Rows(Collector):
    """Rows of credits.metrics() as families of samples. What is not known yet is left out."""

    def __init__(self, rows: Iterable[Row]) -> None:
        self._rows = rows

    def collect(self) -> Iterable[Metric]:
        families: dict[str, Metric] = {}
        for row in self._rows:
            if row["value"] is None:
                continue
            name, labels = row["name"], row["labels"]
            family = families.get(name) or families.setdefault(name, _family(row))
            family.add_metric(list(labels.values()), float(row["value"]))  # type: ignore[attr-defined]
        return families.values()


def _family(row: Row) -> Metric:
    kind: Any = CounterMetricFamily if row["type"] == "counter" else GaugeMetricFamily
    family: Metric = kind(row["name"], row["help"], labels=list(row["labels"]))
    return family


async def metrics(request: Request) -> Response:
    """GET /metrics, for whoever has PGCREDITS_METRICS_TOKEN; without one there is no such page."""
    settings: Settings = request.app.state.settings
    database: Database = request.app.state.database
    figures: Figures = request.app.state.figures
    given = request.headers.get("authorization", "").removeprefix("Bearer ")
    if not settings.metrics_token or not hmac.compare_digest(given.encode(), settings.metrics_token.encode()):
        return Response(status_code=401 if settings.metrics_token else 404)
    rows: list[Row] = []
    try:
        rows = await database.call("metrics")
        figures.up.set(1)
    except (psycopg.Error, PoolTimeout, OSError) as error:
        logging.getLogger("pgcredits.metrics").warning("no figures of the database: %s", type(error).__name__)
        figures.up.set(0)
    of_the_database = CollectorRegistry()
    of_the_database.register(_Rows(rows))
    text = generate_latest(figures.registry) + generate_latest(of_the_database)
    return Response(text, headers={"Content-Type": CONTENT_TYPE_LATEST})
