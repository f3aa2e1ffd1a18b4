"""`pgcredits.usage`: authorize, work, settle; release when the work fails, extend while it lasts.

The functions of SQL decide everything. Here is only when each is called, and on which connection.
"""

import asyncio
import json
import logging
import threading
from collections.abc import AsyncIterator, Coroutine, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from datetime import datetime, timedelta
from decimal import Decimal
from functools import partial
from types import TracebackType
from typing import Any, ClassVar, Generic, Literal, NamedTuple, Self, TypeVar
from uuid import uuid4

import psycopg
from psycopg import AsyncConnection, AsyncCursor, Connection, Cursor
from psycopg.pq import PipelineStatus, TransactionStatus
from psycopg.rows import dict_row
from psycopg.types.json import Jsonb, set_json_loads
from psycopg_pool import AsyncConnectionPool, ConnectionPool

from pgcredits.db import Row, statement

Number = int | Decimal
Units = Number | Mapping[str, Number]
Overage = Literal["cap", "overflow", "reject"]

CONNECT_WAIT = 5  # seconds for a connection beside the given one
SETTLE_WAIT = 5  # seconds that a settle goes on after its task is cancelled: the work is done, and is to be charged
LOCK_WAIT = "3s"  # there, for the account: the body's own open transaction may hold it, and waits for us

_SET_LOCK_WAIT = "select set_config('lock_timeout', %s, true)"
_busy: dict[int, object] = {}  # connections, by id, that are in a call
_loads = partial(json.loads, parse_float=Decimal)

log = logging.getLogger("pgcredits.client")


class CreditsError(Exception):
    """A refusal: HTTP status, stable code, detail (decoded JSON, numbers exact), hint; __cause__ is psycopg's error."""

    def __init__(self, status: int, code: str, detail: Any = None, hint: str | None = None) -> None:
        super().__init__(status, code, detail, hint)  # all of them, so that it can be pickled
        self.status, self.code, self.detail, self.hint = status, code, detail, hint

    def __str__(self) -> str:
        return f"{self.status} {self.code} {self.detail} {self.hint}"


@contextmanager
def ours() -> Iterator[None]:
    """Turn SQLSTATE PTnnn into CreditsError; every other error of the database passes."""
    try:
        yield
    except psycopg.Error as error:
        state = error.sqlstate or ""
        if not state.startswith("PT"):
            raise
        detail = _loads(error.diag.message_detail or "null")
        raise CreditsError(int(state[2:]), error.diag.message_primary or "", detail, error.diag.message_hint) from error


class Authorized(NamedTuple):
    """The answer of authorize_usage: what is held, until when, and with which quality and model to work."""

    usage_id: str
    account_id: str
    status: str
    capability: str
    quality: str | None
    model: str | None
    amount: Decimal
    rate_id: int
    expires_at: datetime
    available: Decimal
    replayed: bool


class Settled(NamedTuple):
    """The answer of settle_usage: actual = charged + uncollected, and the rest of the hold released."""

    usage_id: str
    account_id: str
    status: str
    capability: str
    quality: str | None
    model: str | None
    units: Decimal
    unit_counts: dict[str, Number]
    actual: Decimal
    charged: Decimal
    uncollected: Decimal
    released: Decimal
    late: bool
    rate_id: int
    explanation: Any
    entry_seq: int | None
    balance: Decimal
    available: Decimal
    replayed: bool


class Released(NamedTuple):
    """The answer of release. status is released, or expired where the hold had run out before."""

    reservation_id: str
    account_id: str
    status: str
    charged: Decimal | None
    released: Decimal | None
    balance: Decimal
    available: Decimal
    replayed: bool


Source = TypeVar("Source")
Result = TypeVar("Result", bound=NamedTuple)


class _Usage(Generic[Source]):
    """What both kinds share: the arguments, the answers, and what is known of the outcome."""

    _kinds: ClassVar[tuple[type, type]]

    def __init__(
        self,
        conn: Source,
        account_id: str,
        capability: str,
        units: Units | None = None,
        *,
        quality: str | None = None,
        model: str | None = None,
        usage_id: str | None = None,
        ttl: timedelta = timedelta(minutes=15),
        subject: str | None = None,
        member_id: str | None = None,
        rate_id: int | None = None,
        metadata: Mapping[str, Any] | None = None,
    ) -> None:
        if not isinstance(conn, self._kinds):
            names = " or ".join(kind.__name__ for kind in self._kinds)
            raise TypeError(f"conn must be a {names} of psycopg, not {type(conn).__name__}")
        if not isinstance(account_id, str):  # PostgreSQL would miss a function
            raise TypeError(f"account_id must be a str, not {type(account_id).__name__}")
        self.account_id, self.usage_id = account_id, usage_id or uuid4().hex
        self.authorized: Authorized
        self.settled: Settled | None = None
        self.released: Released | None = None
        self._chosen_here = not usage_id
        self._conn, self._ttl, self._renew_every = conn, ttl, ttl.total_seconds() / 2
        self._request = {
            "account_id": account_id, "capability": capability, **_counted(units), "quality": quality,
            "usage_id": self.usage_id, "ttl": ttl, "subject": subject, "member_id": member_id, "model": model,
            "rate_id": rate_id, "metadata": None if metadata is None else dict(metadata),
        }  # fmt: skip
        self._address: dict[str, Any] = {}
        self._joined = False  # the outcome stands in a transaction of the caller, and goes with it
        self._unknown = False  # a settle was sent, and whether it took place cannot be told

    @property
    def quality(self) -> str | None:
        """The quality to work at: the one asked for, or the plan's lowest."""
        return self.authorized.quality

    @property
    def model(self) -> str | None:
        """The model to work with: the one asked for, or the plan's best for the quality."""
        return self.authorized.model

    @property
    def amount(self) -> Decimal:
        """The credits that are held."""
        return self.authorized.amount

    @property
    def replayed(self) -> bool:
        """Whether usage_id was authorized before: by an attempt that ended early, or one that still runs."""
        return self.authorized.replayed

    @property
    def _open(self) -> bool:
        return self.settled is None and self.released is None and not self._unknown

    def _settlement(
        self, units: Units | None, on_overage: Overage, metadata: Mapping[str, Any] | None
    ) -> dict[str, Any]:
        return {
            "account_id": self.account_id, "usage_id": self.usage_id, **_counted(units), "on_overage": on_overage,
            "metadata": None if metadata is None else dict(metadata),
        }  # fmt: skip

    def _hold(self, **more: Any) -> dict[str, Any]:
        return {"account_id": self.account_id, "reservation_id": self.usage_id, **more}

    @contextmanager
    def _settling(self, conn: Connection[Any] | AsyncConnection[Any]) -> Iterator[None]:
        self._unknown, joins = True, _status(conn) == TransactionStatus.INTRANS
        try:
            yield
        except Exception:
            self._unknown = conn.closed  # on a connection that lives it was answered, and undone
            raise
        self._unknown, self._joined = False, joins

    def _may_be_held(self, error: BaseException) -> bool:
        """Whether entering was interrupted, perhaps after the commit, and nobody will come back under this usage_id."""
        return self._chosen_here and bool(self._address) and not isinstance(error, Exception)

    def _may_release(self) -> bool:
        """Whether there may be a hold to give back.

        It is open, or was closed in a transaction that is over and perhaps undone; if it was not, release refuses.
        """
        over = _status(self._conn) in {TransactionStatus.IDLE, TransactionStatus.INERROR}
        return self._open or (self._joined and over and not self._unknown)

    def _given_back(self, row: Row) -> None:
        """Keep the answer. A settle that was answered before was undone, or nothing could have been released."""
        self.settled, self.released = None, _result(Released, row)

    def _try_again(self, error: Exception) -> bool:
        """Whether a renewal that failed may succeed later: a refusal is final."""
        if self._open:
            self._complain("extend", error)
        return not isinstance(error, CreditsError)

    def _complain(self, what: str, error: Exception) -> None:
        """Log what could not be done about the hold."""
        if isinstance(error, CreditsError) and error.code in ("reservation_closed", "reservation_not_found"):
            log.info("usage %s of %s holds nothing: %s", self.usage_id, self.account_id, error)
        else:
            log.warning(
                "could not %s the hold of usage %s of %s, which runs out by itself: %s: %s",
                what, self.usage_id, self.account_id, type(error).__name__, error,
            )  # fmt: skip


class Usage(_Usage[Connection[Any] | ConnectionPool[Any]]):
    """A use of a capability: authorized on entering, settled in the body, released if the body fails.

    conn is a psycopg Connection or a ConnectionPool. On a connection that is in a transaction, entering raises
    psycopg.errors.ActiveSqlTransaction: the hold is committed before the body runs, and no lock is kept meanwhile.

    units is what will be used at most: an int or a Decimal, or a mapping of unit names to them; floats raise TypeError.
    usage_id is the key, chosen here if not given; the other arguments are those of authorize_usage. The answer is in
    authorized, and in model, quality and amount.

    Leaving the body without settle settles what was announced. Leaving by an exception, of whatever kind, releases,
    unless it was settled or the outcome of a settle is unknown; the exception goes on in any case. While the body runs,
    the hold is extended every ttl/2, over a connection of its own. Enter it once.

    Raises CreditsError for a refusal: 402, 403, 429 and the other errors of authorize_usage.
    """

    _kinds = (Connection, ConnectionPool)

    def __enter__(self) -> Self:
        try:
            with self._given() as conn:
                self._address = _address(conn)
                self.authorized = _result(Authorized, _call(conn, "authorize_usage", self._request))
        except BaseException as error:
            if self._may_be_held(error):
                self._give_back(type(error).__name__)
            raise
        self._left = threading.Event()
        self._renewal = threading.Thread(target=self._renew, name=f"usage {self.usage_id}", daemon=True)
        self._renewal.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._left.set()
        self._renewal.join()
        if error is None:
            if self._open:
                self.settle()
        elif self._may_release():
            self._give_back(type(error).__name__)

    def settle(
        self, units: Units | None = None, *, on_overage: Overage = "cap", metadata: Mapping[str, Any] | None = None
    ) -> Settled:
        """Charge what was really used (without units what was announced); see settle_usage.

        On a connection that is in a transaction it joins that, and is committed or rolled back with it; else it is
        committed when this returns. Raises CreditsError.
        """
        arguments = self._settlement(units, on_overage, metadata)
        with self._given() as conn, self._settling(conn):
            self.settled = _result(Settled, _call(conn, "settle_usage", arguments))
        return self.settled

    def release(self, reason: str | None = None) -> Released:
        """Charge nothing and return the hold; joins a transaction as settle does. Raises CreditsError."""
        with self._given() as conn:
            self._joined = _status(conn) == TransactionStatus.INTRANS
            self.released = _result(Released, _call(conn, "release", self._hold(reason=reason)))
        return self.released

    @contextmanager
    def _given(self) -> Iterator[Connection[Any]]:
        if isinstance(self._conn, ConnectionPool):
            with self._conn.connection() as conn:
                yield conn
        else:
            yield self._conn

    @contextmanager
    def _beside(self) -> Iterator[Connection[Any]]:
        if isinstance(self._conn, ConnectionPool):
            with self._conn.connection(CONNECT_WAIT) as conn:
                yield conn
        else:
            with Connection[Any].connect(**self._address) as conn:
                yield conn

    def _usable(self) -> bool:
        """Whether the given connection is idle and answers."""
        if isinstance(self._conn, ConnectionPool) or _status(self._conn) != TransactionStatus.IDLE:
            return False
        try:
            ConnectionPool.check_connection(self._conn)
        except psycopg.Error:
            return False
        return True

    def _give_back(self, reason: str) -> None:
        try:
            with self._given() if self._usable() else self._beside() as conn:
                row = _call(conn, "release", self._hold(reason=reason), LOCK_WAIT)
            self._given_back(row)
        except Exception as error:  # noqa: BLE001 - the body's own exception must go on, whatever happens here
            self._complain("release", error)

    def _renew(self) -> None:
        wait = 0.0 if self.replayed else self._renew_every  # an earlier attempt's hold is older
        while not self._left.wait(wait):
            wait = self._renew_every
            try:
                if self._open:
                    with self._beside() as conn:
                        _call(conn, "extend", self._hold(ttl=self._ttl), LOCK_WAIT)
            except Exception as error:  # noqa: BLE001 - logged; nobody waits for this thread
                if not self._try_again(error):
                    return
                wait /= 4


class AsyncUsage(_Usage[AsyncConnection[Any] | AsyncConnectionPool[Any]]):
    """Usage for `async with`, on an AsyncConnection or an AsyncConnectionPool; settle and release are awaited.

    A cancelled body releases too, however often it is cancelled meanwhile, and so does a cancelled entering, unless it
    is of a usage_id that was given: whoever tries that again finds the hold.
    """

    _kinds = (AsyncConnection, AsyncConnectionPool)

    async def __aenter__(self) -> Self:
        try:
            async with self._given() as conn:
                self._address = _address(conn)
                self.authorized = _result(Authorized, await _call_async(conn, "authorize_usage", self._request))
        except BaseException as error:
            if self._may_be_held(error):
                await _to_its_end(self._give_back(type(error).__name__))
            raise
        self._renewal = asyncio.create_task(self._renew(), name=f"usage {self.usage_id}")
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        cancelled = await _to_its_end(self._leave(error))
        if error is None and self._open:
            await self.settle()
        if cancelled and not isinstance(error, asyncio.CancelledError):
            raise cancelled

    async def settle(
        self, units: Units | None = None, *, on_overage: Overage = "cap", metadata: Mapping[str, Any] | None = None
    ) -> Settled:
        """Charge what was really used, as Usage.settle does, also if the task is cancelled meanwhile."""
        arguments = self._settlement(units, on_overage, metadata)
        if cancelled := await _to_its_end(self._settle(arguments), SETTLE_WAIT):
            raise cancelled
        assert self.settled  # noqa: S101 - what _settle has just kept
        return self.settled

    async def _settle(self, arguments: dict[str, Any]) -> None:
        async with self._given() as conn:
            with self._settling(conn):
                self.settled = _result(Settled, await _call_async(conn, "settle_usage", arguments))

    async def release(self, reason: str | None = None) -> Released:
        """Charge nothing and return the hold, as Usage.release does."""
        async with self._given() as conn:
            self._joined = _status(conn) == TransactionStatus.INTRANS
            self.released = _result(Released, await _call_async(conn, "release", self._hold(reason=reason)))
        return self.released

    @asynccontextmanager
    async def _given(self) -> AsyncIterator[AsyncConnection[Any]]:
        if isinstance(self._conn, AsyncConnectionPool):
            async with self._conn.connection() as conn:
                yield conn
        else:
            yield self._conn

    @asynccontextmanager
    async def _beside(self) -> AsyncIterator[AsyncConnection[Any]]:
        if isinstance(self._conn, AsyncConnectionPool):
            async with self._conn.connection(CONNECT_WAIT) as conn:
                yield conn
        else:
            async with await AsyncConnection.connect(**self._address) as conn:
                yield conn

    async def _usable(self) -> bool:
        if isinstance(self._conn, AsyncConnectionPool) or _status(self._conn) != TransactionStatus.IDLE:
            return False
        try:
            await AsyncConnectionPool.check_connection(self._conn)
        except psycopg.Error:
            return False
        return True

    async def _leave(self, error: BaseException | None) -> None:
        self._renewal.cancel()
        await asyncio.wait([self._renewal])
        if error is not None and self._may_release():
            await self._give_back(type(error).__name__)

    async def _give_back(self, reason: str) -> None:
        try:
            async with self._given() if await self._usable() else self._beside() as conn:
                row = await _call_async(conn, "release", self._hold(reason=reason), LOCK_WAIT)
            self._given_back(row)
        except Exception as error:  # noqa: BLE001 - the body's own exception must go on, whatever happens here
            self._complain("release", error)

    async def _renew(self) -> None:
        wait = 0.0 if self.replayed else self._renew_every  # an earlier attempt's hold is older
        while True:
            await asyncio.sleep(wait)
            wait = self._renew_every
            try:
                if self._open:
                    async with self._beside() as conn:
                        await _call_async(conn, "extend", self._hold(ttl=self._ttl), LOCK_WAIT)
            except Exception as error:  # noqa: BLE001 - logged; nobody waits for this task
                if not self._try_again(error):
                    return
                wait /= 4


usage, usage_async = Usage, AsyncUsage  # in a `with`, a verb reads better


async def _to_its_end(work: Coroutine[Any, Any, None], patience: float | None = None) -> asyncio.CancelledError | None:
    """Wait until work has ended, however often the waiting task is cancelled; the last cancellation, if any.

    With patience, work that has not ended so many seconds after the first cancellation is cancelled as well.
    """
    task, cancelled = asyncio.create_task(work), None
    while not task.done():
        try:
            await asyncio.wait([task])
        except asyncio.CancelledError as error:
            if patience is not None and not cancelled:
                asyncio.get_running_loop().call_later(patience, task.cancel)
            cancelled = error
    task.result()
    return cancelled


@contextmanager
def _alone(conn: object) -> Iterator[None]:
    """Refuse a second call on a connection while one is under way: each would end the transaction of the other."""
    mark = object()
    if _busy.setdefault(id(conn), mark) is not mark:
        raise psycopg.errors.ActiveSqlTransaction(
            "another thread or task uses this connection at the moment: give each one of its own, or a pool"
        )
    try:
        yield
    finally:
        del _busy[id(conn)]


def _call(conn: Connection[Any], function: str, arguments: dict[str, Any], lock_wait: str = "") -> Row:
    query, parameters = statement(function, arguments)
    with ours(), _alone(conn), conn.transaction(), Cursor(conn, row_factory=dict_row) as cursor:
        set_json_loads(_loads, cursor)
        if lock_wait:
            cursor.execute(_SET_LOCK_WAIT, [lock_wait])
        (row,) = cursor.execute(query, parameters).fetchall()
    return row


async def _call_async(conn: AsyncConnection[Any], function: str, arguments: dict[str, Any], lock_wait: str = "") -> Row:
    query, parameters = statement(function, arguments)
    with ours(), _alone(conn):
        async with conn.transaction(), AsyncCursor(conn, row_factory=dict_row) as cursor:
            set_json_loads(_loads, cursor)
            if lock_wait:
                await cursor.execute(_SET_LOCK_WAIT, [lock_wait])
            await cursor.execute(query, parameters)
            (row,) = await cursor.fetchall()
    return row


def _result(kind: type[Result], row: Row) -> Result:
    """The row as kind has it; columns of a newer version are left out."""
    return kind._make(row[name] for name in kind._fields)


def _status(conn: object) -> TransactionStatus:
    """The transaction status of a connection; a pool has none."""
    return conn.info.transaction_status if isinstance(conn, Connection | AsyncConnection) else TransactionStatus.UNKNOWN


def _address(conn: Connection[Any] | AsyncConnection[Any]) -> dict[str, Any]:
    """What it takes to connect once more as conn did. Raises ActiveSqlTransaction, where no work may begin."""
    status = _status(conn)
    if (
        status not in {TransactionStatus.IDLE, TransactionStatus.UNKNOWN}
        or conn.info.pipeline_status != PipelineStatus.OFF
    ):
        raise psycopg.errors.ActiveSqlTransaction(
            f"a usage cannot begin in a transaction or pipeline ({status.name}): the account would be locked during the"
            " work. Commit first, or give it a connection or pool of its own"
        )
    return {
        "connect_timeout": CONNECT_WAIT, **conn.info.get_parameters(), "password": conn.info.password or None,
        "autocommit": True, "prepare_threshold": None,
    }  # fmt: skip


def _counted(units: Units | None) -> dict[str, Any]:
    """The argument that announces units: a number, or a mapping as JSON with its numbers as they are."""
    if isinstance(units, Mapping):
        text = ", ".join(f"{json.dumps(name)}: {Decimal(_exact(number)):f}" for name, number in units.items())
        return {"unit_counts": Jsonb(f"{{{text}}}", dumps=str)}
    return {"units": None if units is None else _exact(units)}


def _exact(number: Number) -> Number:
    if isinstance(number, bool) or not isinstance(number, int | Decimal):
        raise TypeError(f"units must be an int or a Decimal, not a {type(number).__name__}: amounts are exact")
    return number
