"""What the tests of the ledger share: a clock to turn, refusals to expect, threads that start together.

Amounts come back as Any: mypy would not let a Decimal be compared with an int.
"""

import json
import re
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from functools import partial
from threading import Barrier
from typing import Any

import pytest
from client import Client, CreditsError
from psycopg import Connection, sql
from psycopg.rows import namedtuple_row
from psycopg.types.json import set_json_loads
from servers import Database

NOON = datetime(2030, 1, 31, 12, tzinfo=UTC)
SECOND, MINUTE, HOUR, DAY = (timedelta(**{unit: 1}) for unit in ("seconds", "minutes", "hours", "days"))
TICK = timedelta(microseconds=1)
SETTABLE_CLOCK = (
    "create or replace function credits.now() returns timestamptz language sql as "
    "$$ select coalesce(nullif(current_setting('tests.now', true), '')::timestamptz, clock_timestamp()) $$"
)


class Ledger(Client):
    """The client with the verbs it lacks, a clock that stands still until it is turned, and a look at the tables."""

    def __init__(self, conn: Connection[Any], at: datetime | None = NOON) -> None:
        super().__init__(conn)
        set_json_loads(partial(json.loads, parse_float=Decimal), conn)
        self._keys = 0
        self._now = at or datetime.now(UTC)
        if at:
            if "tests.now" not in self.query("select prosrc from pg_proc where oid = 'credits.now'::regproc")[0].prosrc:
                with self.as_owner():
                    conn.execute(SETTABLE_CLOCK)
            self.now = at

    @property
    def now(self) -> datetime:
        """The engine's time; assigning it is time travel."""
        return self._now

    @now.setter
    def now(self, at: datetime) -> None:
        self._now = at
        self.conn.execute("select set_config('tests.now', %s, true)", [at.isoformat()])

    @contextmanager
    def as_owner(self) -> Iterator[None]:
        """Act as credits_owner, then as before."""
        (role,) = self.query("select current_user as name")
        self.conn.execute("set role credits_owner")
        yield
        self.conn.execute(sql.SQL("set role {}").format(sql.Identifier(role.name)))

    def query(self, text: str, *parameters: Any) -> list[Any]:
        """Rows of a query, in the role that the connection has."""
        with self.conn.cursor(row_factory=namedtuple_row) as cursor:
            return cursor.execute(text.encode(), parameters).fetchall()

    def table(self, name: str, where: str = "true", *parameters: Any) -> list[Any]:
        """Rows of a table, as its owner sees them."""
        with self.as_owner():
            return self.query(f"select * from credits.{name} t where {where}", *parameters)

    def change(self, text: str, *parameters: Any) -> None:
        """Write into tables as their owner."""
        with self.as_owner():
            self.conn.execute(text.encode(), parameters)

    def set_status(self, status: str, account_id: str | None = None) -> None:
        """Give an account, or all of them, a status as an operator would: it stands in two tables."""
        for table in ("accounts", "balances"):
            self.change(
                f"update credits.{table} t set status = %s where t.account_id = coalesce(%s, t.account_id)",
                status,
                account_id,
            )

    def key(self) -> str:
        """A key that was not used before."""
        self._keys += 1
        return f"key-{self._keys}"

    def open(self, account_id: str = "alpha", *amounts: Any, **grant: Any) -> str:
        """Open an account with a grant of each amount."""
        self.open_account(account_id)
        for amount in amounts:
            self.grant(amount, account_id, **grant)
        return account_id

    def grant(self, amount: Any, account_id: str = "alpha", **more: Any) -> Any:
        """A grant under a key of its own."""
        return self.grant_credits(account_id, amount, **{"key": self.key(), **more})

    def use(self, amount: Any, account_id: str = "alpha", **more: Any) -> Any:
        """A spend under a key of its own."""
        return self.spend(account_id, amount, **{"key": self.key(), **more})

    def kinds(self, account_id: str = "alpha") -> list[tuple[str, Any]]:
        """Kind and amount of each entry, the oldest first; what is only debt shows its debt."""
        return [(row.kind, row.amount or row.debt) for row in reversed(self.history(account_id, max_rows=1000))]

    def available(self, account_id: str = "alpha") -> Any:
        """What can be spent now."""
        return self.get_balance(account_id).available

    def sums(self, account_id: str = "alpha") -> tuple[Any, ...]:
        """Available, held, balance, debt."""
        row = self.get_balance(account_id)
        return row.available, row.held, row.balance, row.debt

    def book(self, account_id: str = "alpha") -> None:
        """Make the ledger book what has fallen due, as every verb does first, and nothing else."""
        self.unfreeze_account(account_id)

    def tell(self, event_type: str, about: Any, event_id: str | None = None, endpoint: str = "default") -> str:
        """Deliver an event of Stripe about an object, happening now; its outcome."""
        payload = told(event_id or self.key(), event_type, about, created=int(self.now.timestamp()))
        outcome: str = self.receive_stripe_event(endpoint, payload).outcome
        return outcome

    def event(self, event_id: str) -> Any:
        """What is kept of an event of Stripe."""
        (row,) = self.table("stripe_events", "event_id = %s", event_id)
        return row

    def snapshot(self) -> dict[str, list[str]]:
        """Every row of every table of the schema, as sorted JSON."""
        with self.as_owner():
            names = self.query(
                "select c.relname as name from pg_class c where c.relnamespace = 'credits'::regnamespace "
                "and c.relkind in ('r', 'p')"
            )
            tables = (f"select '{row.name}', to_jsonb(t)::text from credits.{row.name} t" for row in names)
            rows: dict[str, list[str]] = {row.name: [] for row in names}
            for row in self.query(f"select * from ({' union all '.join(tables)}) a (name, row) order by 1, 2"):
                rows[row.name].append(row.row)
            return rows

    @contextmanager
    def unchanged(self, *but: str) -> Iterator[None]:
        """Nothing in any table differs afterwards, but for the tables that are named."""
        before = self.snapshot()
        yield
        after = self.snapshot()
        changed = [name for name in after if name not in but and after[name] != before[name]]
        assert not changed, {name: sorted(set(before[name]) ^ set(after[name])) for name in changed}


@contextmanager
def undone(ledger: Ledger) -> Iterator[Ledger]:
    """What the block does to the database, and to the clock, is undone."""
    now = ledger.now
    with ledger.conn.transaction(force_rollback=True):
        yield ledger
    ledger.now = now


def told(event_id: str, event_type: str, about: Any, **more: Any) -> str:
    """An event of Stripe about an object, as it is posted."""
    event = {"id": event_id, "type": event_type, "created": int(NOON.timestamp()), "data": {"object": about}}
    return json.dumps({**event, **more})


def session(session_id: str = "cs_1", **changes: Any) -> dict[str, Any]:
    """A Checkout session: the starter package, 1000 credits for 1000 cents, bought by alpha; cs_1 is paid by pi_1."""
    return {
        "id": session_id, "object": "checkout.session", "mode": "payment", "status": "complete",
        "payment_status": "paid", "amount_subtotal": 1000, "amount_total": 1000, "currency": "usd",
        "customer": "cus_1", "payment_intent": session_id.replace("cs_", "pi_"),
        "metadata": {"account_id": "alpha", "package": "starter"},
        **changes,
    }  # fmt: skip


@contextmanager
def refused(status: int, code: str, /, **detail: Any) -> Iterator[None]:
    """The block is refused with this error; detail is part of its DETAIL, numbers compared as numbers."""
    with pytest.raises(CreditsError) as caught:
        yield
    error = caught.value
    assert (error.status, error.code) == (status, code), error
    assert isinstance(error.detail, dict)
    assert {name: as_number(error.detail.get(name)) for name in detail} == detail
    assert error.hint
    assert re.fullmatch(r".+ .+\.", error.hint, re.DOTALL), f"no sentence: {error.hint}"


def as_number(value: Any) -> Any:
    """Decimals as the floats and whole numbers that tests write."""
    return float(value) if isinstance(value, Decimal) else value


def same(first: Any, again: Any) -> bool:
    """Two results of one key: the same but for the mark."""
    assert (first.replayed, again.replayed) == (False, True)
    equal: bool = first._replace(replayed=True) == again
    return equal


def together(database: Database, jobs: Sequence[Callable[[Ledger], Any]]) -> list[Any]:
    """Run each job on its own thread and connection, all let go at once. A refusal is a result, other errors raise."""
    barrier = Barrier(len(jobs))

    def run(job: Callable[[Ledger], Any]) -> Any:
        with database.connect(autocommit=True) as conn:
            ledger = Ledger(conn, at=None)
            conn.execute("select 1")
            barrier.wait()
            try:
                return job(ledger)
            except CreditsError as error:
                return error

    with ThreadPoolExecutor(len(jobs)) as pool:
        return list(pool.map(run, jobs))


@contextmanager
def committed(database: Database) -> Iterator[Ledger]:
    """A ledger whose calls are committed, on the real clock."""
    with database.connect(autocommit=True) as conn:
        yield Ledger(conn, at=None)


def assert_sound(ledger: Client) -> None:
    """Every invariant holds and the books balance."""
    findings = ledger.audit()
    assert not findings, findings
    total = ledger.conn.execute("select coalesce(sum(balance), 0) from credits.trial_balance").fetchone()
    assert total
    assert total[0] == 0
