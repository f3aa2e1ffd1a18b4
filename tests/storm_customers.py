"""Customers in a storm: each asks again under the same key until he is answered, and writes down what he was told."""

import json
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from decimal import Decimal
from functools import partial
from random import Random
from typing import Any

import httpx
import psycopg
from five_ways import JWT_SECRET, SERVICE, token
from psycopg.rows import dict_row
from psycopg.types.json import set_json_loads
from storm import Clock

from pgcredits.db import statement

Json = dict[str, Any]
PATIENCE = 90  # seconds
GONE = {None, "57P01", "57P02", "57P03", "53300"}  # SQLSTATEs of a connection or a server that went away
NOT_NOW = {503, 504}
DAILY_CAP = 6000  # cents
PACKAGES: dict[str, Callable[[int], int]] = {  # credits for a price
    "starter": lambda _: 1000, "standard": lambda price: price + 500, "refill": lambda price: price,
}  # fmt: skip
PLANS = ["basic", "day", "large_day"]
URLS = {"success_url": "https://shop.example.com/thanks", "cancel_url": "https://shop.example.com/"}


class RefusedError(Exception):
    """The answer is no."""


@dataclass
class Answer:
    """A call, and what came of it at last: rows, or the error."""

    verb: str
    arguments: Json
    rows: list[Json]
    error: str = ""


@dataclass
class Way:
    """How verbs are called: at the database or through a door, whichever chance takes."""

    dsn: str
    ports: list[int]
    luck: Random
    broken: int = 0
    odd: list[str] = field(default_factory=list)  # errors that no kill explains
    _conn: psycopg.Connection[Any] | None = None

    def __post_init__(self) -> None:
        headers = {"Authorization": f"Bearer {token(JWT_SECRET, **SERVICE)}", "Content-Profile": "credits"}
        self._http = httpx.Client(timeout=20, headers={**headers, "Content-Type": "application/json"})

    def call(self, verb: str, **arguments: Any) -> list[Json]:
        """Ask until there is an answer. Raises RefusedError."""
        deadline = time.monotonic() + PATIENCE
        while (rows := self.luck.choice([self._ask, self._post])(verb, arguments)) is None:
            self.broken += 1
            assert time.monotonic() < deadline, f"never answered: {verb} {arguments}"
            time.sleep(self.luck.random() * 0.2)
        return rows

    def _ask(self, verb: str, arguments: Json) -> list[Json] | None:
        try:
            if not self._conn:
                self._conn = psycopg.connect(
                    self.dsn, autocommit=True, connect_timeout=5, row_factory=dict_row,
                    options="-c role=credits_service",
                )  # fmt: skip
                set_json_loads(partial(json.loads, parse_float=Decimal), self._conn)
            found: list[Json] = self._conn.execute(*statement(verb, arguments)).fetchall()
        except psycopg.Error as error:
            if (error.sqlstate or "").startswith("PT"):
                raise RefusedError(error.diag.message_primary) from None
            if error.sqlstate not in GONE:
                self.odd.append(f"{verb}: {error.sqlstate} {error}")
            self.disconnect()
            return None
        return found

    def _post(self, verb: str, arguments: Json) -> list[Json] | None:
        address = f"http://127.0.0.1:{self.luck.choice(self.ports)}/rpc/{verb}"
        try:
            answer = self._http.post(address, content=json.dumps(arguments, default=str).encode())
        except httpx.HTTPError:
            return None
        said = json.loads(answer.text or "[]", parse_float=Decimal)
        if answer.status_code < 300:
            return said if isinstance(said, list) else [said]
        if answer.status_code < 500:
            raise RefusedError(said["message"])
        if answer.status_code not in NOT_NOW:
            self.odd.append(f"{verb} at a door: {answer.status_code} {said}")
        return None

    def disconnect(self) -> None:
        """Connect anew for the next call."""
        if self._conn:
            self._conn.close()
            self._conn = None

    def close(self) -> None:
        """No more calls."""
        self.disconnect()
        self._http.close()


class Customer:
    """Somebody who works with an account until he is told to stop; then he ends what he has begun."""

    def __init__(self, name: str, account: str, others: list[str], way: Way, clock: Clock) -> None:
        self.name, self.account, self.others, self.way, self.clock = name, account, others, way, clock
        self.answers: list[Answer] = []
        self.luck = way.luck
        self._keys = 0
        self._spent: list[tuple[str, Decimal]] = []
        self._holds: list[tuple[str, int]] = []
        self._grants: list[int] = []
        self._uses: list[tuple[str, int]] = []

    def work(self, stop: threading.Event) -> None:
        """One thing after the other, whatever comes to mind."""
        things: dict[Callable[[], None], int] = {
            self.spend: 25, self.hold: 25, self.take_some: 8, self.end_hold: 18, self.get_back: 4, self.give: 4,
            self.spend_many: 4, self.get_granted: 4, self.lose: 1, self.buy: 3, self.get_money_back: 2, self.look: 2,
            self.use: 12, self.end_use: 12, self.change_plan: 8,
        }  # fmt: skip
        while not stop.is_set():
            (thing,) = self.luck.choices([*things], [*things.values()])
            thing()
            time.sleep(self.luck.random() * 0.02)
        while self._holds or self._uses:
            self.end_hold()
            self.end_use()

    def do(self, verb: str, **arguments: Any) -> list[Json]:
        """Call, perhaps a second time, and remember the answer. No rows if it was no."""
        try:
            rows = self.way.call(verb, **arguments)
            if "key" in arguments and self.luck.random() < 0.1:
                rows = self.way.call(verb, **arguments)
                assert [row["replayed"] for row in rows] == [True], (verb, arguments)
        except RefusedError as no:
            self.answers.append(Answer(verb, arguments, [], str(no)))
            return []
        self.answers.append(Answer(verb, arguments, rows))
        return rows

    def key(self) -> str:
        """One that nobody has used."""
        self._keys += 1
        return f"{self.name}-{self._keys}"

    def spend(self) -> None:
        """Take credits; those who top up by themselves take more."""
        key, amount = self.key(), Decimal(self.luck.randint(1, 600)) / (2 if "auto" in self.account else 10)
        if self.do("spend", account_id=self.account, amount=amount, key=key):
            self._spent.append((key, amount))

    def hold(self) -> None:
        """Hold credits, for a short or a longer while."""
        key, amount = self.key(), self.luck.randint(1, 80)
        ttl = self.luck.choice(["20 seconds", "2 minutes", "15 minutes"])
        if self.do("reserve", account_id=self.account, amount=amount, reservation_id=key, ttl=ttl):
            self._holds.append((key, amount))

    def take_some(self) -> None:
        """Book a part of a hold."""
        if self._holds:
            key, amount = self.luck.choice(self._holds)
            self.do("capture", account_id=self.account, reservation_id=key,
                    amount=Decimal(self.luck.randint(1, amount * 3)) / 10, key=self.key())  # fmt: skip

    def end_hold(self) -> None:
        """Settle it, release it, or forget it."""
        if self._holds:
            key, amount = self._holds.pop(self.luck.randrange(len(self._holds)))
            hold = {"account_id": self.account, "reservation_id": key}
            if (how := self.luck.random()) < 0.6:
                used = Decimal(self.luck.randint(0, amount * 14)) / 10
                self.do("settle", **hold, amount=used, on_overage=self.luck.choice(["cap", "reject", "overflow"]))
            elif how < 0.9:
                self.do("release", **hold)

    def use(self) -> None:
        """Begin to use a capability; of a team's, as one of two members."""
        key, units = self.key(), self.luck.randint(1, 3000)
        more = {"member_id": self.luck.choice(["ann", "bob"])} if "team" in self.account else {}
        ttl = self.luck.choice(["20 seconds", "15 minutes"])
        if self.do("authorize_usage", account_id=self.account, capability="chapter", units=units, usage_id=key, ttl=ttl,
                   **more):  # fmt: skip
            self._uses.append((key, units))

    def end_use(self) -> None:
        """Say what was used, take longer, give it back, or forget it."""
        if self._uses:
            key, units = self._uses.pop(self.luck.randrange(len(self._uses)))
            hold = {"account_id": self.account, "reservation_id": key}
            if (how := self.luck.random()) < 0.1:
                self.do("extend", **hold, ttl="5 minutes")
            if how < 0.15:
                self.do("capture", **hold, amount=Decimal(self.luck.randint(1, 9)) / 10, key=self.key())
            if how < 0.7:
                self.do("settle_usage", account_id=self.account, usage_id=key, units=self.luck.randint(0, units))
            elif how < 0.9:
                self.do("release", **hold)

    def change_plan(self) -> None:
        """Subscribe to something else, now or later; or nothing any more."""
        team = "team" in self.account
        if not team and "stripe" not in self.account:
            return
        at, plan = self.luck.choice(["now", "period_end"]), self.luck.choice(["free", "team"] if team else PLANS)
        match self.luck.randrange(4 if team else 6):
            case 0 | 1:
                self.do("change_plan", account_id=self.account, plan=plan, at=at)
            case 2:
                self.do("cancel_plan", account_id=self.account, at=at)
            case 3:
                self.do("resume_plan", account_id=self.account)
            case 4:
                self.do("create_checkout", account_id=self.account, plan=plan, key=self.key(), **URLS)
            case 5:
                self.do("create_portal_session", account_id=self.account, return_url=URLS["cancel_url"], key=self.key())

    def get_back(self) -> None:
        """Get a part of what was spent again."""
        if self._spent:
            key, amount = self.luck.choice(self._spent)
            part = Decimal(self.luck.randint(1, int(amount * 10))) / 10
            self.do("refund_spend", account_id=self.account, spend_key=key, amount=part, key=self.key())

    def give(self) -> None:
        """Give some to another account."""
        self.do("transfer_credits", from_account_id=self.account, to_account_id=self.luck.choice(self.others),
                amount=self.luck.randint(1, 20), key=self.key())  # fmt: skip

    def spend_many(self) -> None:
        """Spend of many accounts at once."""
        self.do("spend_many", requests=[
            {"account_id": self.luck.choice(self.others), "amount": self.luck.randint(1, 9), "key": self.key()}
            for _ in range(self.luck.randint(1, 30))
        ])  # fmt: skip

    def get_granted(self) -> None:
        """Credits that start now or soon, and end soon or never."""

        def soon(least: int, most: int) -> str:
            span = self.luck.randint(least, most) * max(1, self.clock.speed / 60)
            return datetime.fromtimestamp(self.clock.now() + span, UTC).isoformat()

        times = self.luck.choice([{}, {"effective_at": soon(20, 600)}, {"expires_at": soon(700, 1500)}])
        for row in self.do("grant_credits", account_id=self.account, amount=self.luck.randint(1, 100),
                           key=self.key(), **times):  # fmt: skip
            self._grants.append(row["grant_id"])

    def lose(self) -> None:
        """What was granted is taken back."""
        if self._grants:
            grant = self.luck.choice(self._grants)
            self.do("revoke_grant", account_id=self.account, grant_id=grant, key=self.key())

    def buy(self) -> None:
        """Ask for a page to pay at. What is paid to an account that is erased meanwhile waits for a person."""
        if "gone" in self.account:
            return
        package, quantity = self.luck.choice(["starter", "standard"]), self.luck.randint(1, 2)
        self.do("create_checkout", account_id=self.account, package=package, quantity=quantity, key=self.key(), **URLS)

    def get_money_back(self) -> None:
        """Ask for money that was paid; or let the automatic top-up, which such things pause, go on."""
        if "auto" in self.account and self.luck.random() < 0.5:
            self.set_top_up()
            return
        with suppress(RefusedError):
            for bought in self.way.call("list_purchases", account_id=self.account, max_rows=5):
                if bought["status"] == "completed":
                    self.do("request_refund", account_id=self.account, purchase_id=bought["purchase_id"],
                            amount=self.luck.randint(1, 600), key=self.key())  # fmt: skip
                    return

    def set_top_up(self) -> None:
        """A refill whenever less than 300 credits are left, but for 60 dollars a day at most."""
        self.do("set_auto_topup", account_id=self.account, threshold=300, package="refill", monthly_cap=120000,
                daily_cap=DAILY_CAP, cool_down="1 minute")  # fmt: skip

    def look(self) -> None:
        """Nobody but a debtor is below zero."""
        (row,) = self.do("get_balance", account_id=self.account)
        assert row["available"] >= 0 or row["debt"] > 0, row
        assert row["available"] + row["held"] + row["debt"] == row["balance"], row
