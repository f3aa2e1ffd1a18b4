"""Thousands of random operations on the ledger, each compared with a small model of it that knows no database."""

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from functools import partial
from typing import Any
from zoneinfo import ZoneInfo

import pytest
from client import CreditsError
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test
from ledger_support import DAY, HOUR, MINUTE, NOON, TICK, Ledger, assert_sound
from servers import Database

NEVER = datetime.max.replace(tzinfo=UTC)
PRIORITY = {"plan": 10, "trial": 15, "promo": 20, "bonus": 20, "gift": 25, "purchase": 30}
ZERO = Decimal(0)


class RefusalError(Exception):
    """What the model refuses, and with which numbers."""

    def __init__(self, status: int, code: str, **numbers: Decimal) -> None:
        super().__init__(f"{status} {code} {numbers}")
        self.status, self.code, self.numbers = status, code, numbers


@dataclass(eq=False)
class Lot:
    """Credits that came together. Before it starts and after it ended it is not spendable."""

    number: int
    kind: str
    priority: int
    effective: datetime
    expires: datetime
    scope: frozenset[str] | None
    amount: Decimal
    remaining: Decimal
    grant_id: int = 0
    started: bool = False
    ended: bool = False
    expired: Decimal = ZERO
    revoked: Decimal = ZERO
    owed: Decimal = ZERO

    def pays_for(self, capability: str | None) -> bool:
        return self.scope is None or capability in self.scope


Slice = tuple[Lot, Decimal]


def total(slices: list[Slice]) -> Decimal:
    return sum((amount for _, amount in slices), ZERO)


def cut(slices: list[Slice], amount: Decimal) -> tuple[list[Slice], list[Slice]]:
    """The first amount of them, and the rest."""
    first, rest = [], []
    for lot, size in slices:
        part = min(size, amount)
        amount -= part
        first.append((lot, part))
        rest.append((lot, size - part))
    return [one for one in first if one[1]], [one for one in rest if one[1]]


@dataclass
class Hold:
    """A reservation."""

    slices: list[Slice]
    amount: Decimal
    created: datetime
    expires: datetime
    capability: str | None
    member: str | None
    captured: Decimal = ZERO
    status: str = "open"


@dataclass
class Charge:
    """Something that can be refunded, and what it left as debt."""

    slices: list[Slice]
    member: str | None
    made: datetime
    refunded: Decimal = ZERO
    debt: Decimal = ZERO


@dataclass
class Book:
    """One account. Everything happens at its very moment, unlike in the database, which books it later."""

    debt_limit: Decimal
    zone: ZoneInfo
    lots: list[Lot] = field(default_factory=list)
    holds: dict[str, Hold] = field(default_factory=dict)
    charges: dict[str, Charge] = field(default_factory=dict)
    limits: dict[str, Decimal | None] = field(default_factory=dict)
    removed: set[str] = field(default_factory=set)
    debt: Decimal = ZERO
    frozen: bool = False

    # Time ----------------------------------------------------------------------------------------------------------

    def next_event(self) -> tuple[datetime, int, str, Callable[[], None]]:
        events = [
            *[(h.expires, 1, rid, lambda h=h: self.close(h, "expired", h.expires)) for rid, h in self.open().items()],
            *[(t.effective, 2, f"{t.number:09}", lambda t=t: self.start(t)) for t in self.lots if not t.started],
            *[(t.expires, 3, f"{t.number:09}", lambda t=t: self.end(t)) for t in self.lots if not t.ended],
        ]
        return min([*events, (NEVER, 9, "", lambda: None)], key=lambda event: event[:3])

    def advance(self, to: datetime) -> None:
        while (event := self.next_event())[0] <= to:
            event[3]()

    def start(self, lot: Lot) -> None:
        lot.started = True
        self.tidy(lot.effective)

    def end(self, lot: Lot) -> None:
        lot.ended = True
        self.tidy(lot.expires)

    def tidy(self, now: datetime) -> None:
        """Free credits pay the debt; what is left in a lot whose time is over is lost."""
        losing = sorted(self.free(None), key=lambda t: (t.expires, t.priority, t.effective, t.number))
        for lot in losing:
            paid = min(lot.remaining, self.debt)
            lot.remaining -= paid
            self.debt -= paid
        for lot in self.lots:
            if lot.expires <= now:
                lot.expired += lot.remaining
                lot.remaining = ZERO

    # What there is -------------------------------------------------------------------------------------------------

    def open(self) -> dict[str, Hold]:
        return {name: hold for name, hold in self.holds.items() if hold.status == "open"}

    def free(self, capability: str | None) -> list[Lot]:
        lots = [lot for lot in self.lots if lot.started and lot.remaining and lot.pays_for(capability)]
        return sorted(lots, key=lambda lot: (lot.priority, lot.expires, lot.effective, lot.number))

    def payable(self, capability: str | None) -> Decimal:
        return sum((lot.remaining for lot in self.free(capability)), ZERO) - self.debt

    def held(self) -> dict[Lot, Decimal]:
        held: dict[Lot, Decimal] = defaultdict(Decimal)
        for hold in self.open().values():
            for lot, amount in hold.slices:
                held[lot] += amount
        return held

    def balance(self, now: datetime) -> dict[str, Any]:
        held = self.held()
        live = {lot: lot.remaining + held[lot] for lot in self.lots if lot.started and lot.remaining + held[lot]}
        coming = min((lot.expires for lot in live if now < lot.expires < NEVER), default=None)
        by_kind: dict[str, Decimal] = defaultdict(Decimal)
        scoped: dict[str, Decimal] = defaultdict(Decimal)
        for lot, amount in live.items():
            by_kind[lot.kind] += amount
            for capability in lot.scope or () if lot.remaining else ():
                scoped[capability] += lot.remaining
        return {
            "available": self.payable(None),
            "held": sum(held.values(), ZERO),
            "balance": sum(live.values(), ZERO),
            "debt": self.debt,
            "status": "frozen" if self.frozen else "active",
            "next_expiry_at": coming,
            "next_expiry_amount": sum((n for lot, n in live.items() if lot.expires == coming), ZERO)
            if coming
            else None,
            "by_kind": dict(by_kind),
            "scoped": dict(scoped),
            "pending": sum((lot.remaining for lot in self.lots if not lot.started), ZERO),
        }

    # Members -------------------------------------------------------------------------------------------------------

    def month(self, at: datetime) -> tuple[int, int]:
        local = at.astimezone(self.zone)
        return local.year, local.month

    def used(self, member: str, now: datetime) -> Decimal:
        """What was charged and is held of what the member began in this month."""
        charges = [(c.made, total(c.slices) + c.debt - c.refunded) for c in self.charges.values() if c.member == member]
        holds = [(h.created, total(h.slices)) for h in self.open().values() if h.member == member]
        return sum((amount for made, amount in charges + holds if self.month(made) == self.month(now)), ZERO)

    def left(self, member: str | None, least: Decimal, now: datetime) -> Decimal | None:
        """What the member may use, which is that much at least."""
        if member in self.removed:
            raise RefusalError(403, "forbidden")
        limit = self.limits.get(member or "")
        if member is None or limit is None:
            return None
        used = self.used(member, now)
        if used + least > limit:
            raise RefusalError(429, "member_limit_reached", limit=limit, used=used, required=least)
        return limit - used

    # Moving credits ------------------------------------------------------------------------------------------------

    def check_active(self) -> None:
        if self.frozen:
            raise RefusalError(423, "account_frozen")

    def spend(self, key: str, amount: Decimal, capability: str | None, member: str | None, now: datetime) -> None:
        self.check_active()
        self.left(member, amount, now)
        self.charges[key] = Charge(self.take(amount, capability), member, now)

    def choose(self, amount: Decimal, capability: str | None) -> list[Slice]:
        return cut([(lot, lot.remaining) for lot in self.free(capability)], amount)[0]

    def take(self, amount: Decimal, capability: str | None = None, least: Decimal | None = None) -> list[Slice]:
        required = min(amount, amount if least is None else least)
        slices = self.choose(amount, capability)
        if total(slices) < required or self.debt:
            raise self.short(required, self.payable(capability))
        for lot, part in slices:
            lot.remaining -= part
        return slices

    def short(self, required: Decimal, available: Decimal) -> RefusalError:
        """How much is missing. Where a debt alone stands in the way of scoped credits, no number says that."""
        scoped = self.debt and any(lot.scope and lot.remaining for lot in self.lots)
        numbers = {} if scoped else {"available": available}
        return RefusalError(402, "insufficient_credits", required=required, **numbers)

    def give_back(self, slices: list[Slice], now: datetime) -> None:
        for lot, part in slices:
            lot.remaining += part
        self.tidy(now)

    def close(self, hold: Hold, status: str, now: datetime) -> None:
        slices, hold.slices, hold.status = hold.slices, [], status
        self.give_back(slices, now)

    def hold(self, name: str) -> Hold:
        if name not in self.holds:
            raise RefusalError(404, "reservation_not_found")
        return self.holds[name]

    def open_hold(self, name: str) -> Hold:
        hold = self.hold(name)
        if hold.status != "open":
            raise RefusalError(
                *(410, "reservation_expired") if hold.status == "expired" else (409, "reservation_closed")
            )
        return hold

    def settle(self, name: str, amount: Decimal, policy: str, now: datetime) -> tuple[Decimal, Decimal, bool]:
        """Charged, uncollected, late."""
        hold = self.hold(name)
        if hold.status in {"settled", "released"}:
            raise RefusalError(409, "reservation_closed")
        late = hold.status == "expired"
        used, rest = cut(hold.slices, amount)
        over = amount - total(used)
        more = [] if self.debt else self.choose(over, hold.capability)
        if policy == "reject" and total(more) < over:
            raise self.short(amount, self.payable(hold.capability) + total(used))
        for lot, part in more:
            lot.remaining -= part
        unpaid = over - total(more)
        debt = max(ZERO, min(unpaid, self.debt_limit - self.debt)) if policy == "overflow" else ZERO
        self.debt += debt
        hold.slices = rest
        self.close(hold, "settled", now)
        charged = merged(used + more)
        if charged or debt:
            self.charges[name] = Charge(charged, hold.member, hold.created, debt=debt)
        return total(charged) + debt, unpaid - debt, late

    def refund(self, name: str, amount: Decimal | None, now: datetime) -> Decimal:
        if name not in self.charges or not self.charges[name].slices:
            raise RefusalError(404, "spend_not_found")
        charge = self.charges[name]
        left = total(charge.slices) - charge.refunded
        amount = left if amount is None else amount
        if amount > left or not amount:
            raise RefusalError(422, "invalid_amount")
        _, returning = cut(charge.slices[::-1], charge.refunded)
        charge.refunded += amount
        self.give_back(cut(returning, amount)[0], now)
        return amount

    def revoke(self, lot: Lot, amount: Decimal | None, now: datetime) -> tuple[Decimal, Decimal]:
        left = max(ZERO, lot.amount - lot.expired - lot.revoked - lot.owed)
        amount = left if amount is None else amount
        if amount > left or not amount:
            raise RefusalError(422, "invalid_amount")
        taken = min(amount, lot.remaining)
        lot.remaining -= taken
        lot.revoked += taken
        lot.owed += amount - taken
        self.debt += amount - taken
        if lot.started or not lot.remaining:
            lot.started = True
        self.tidy(now)
        return -taken, amount - taken


def merged(slices: list[Slice]) -> list[Slice]:
    """One slice per lot, in the order of their first."""
    parts: dict[Lot, Decimal] = defaultdict(Decimal)
    for lot, amount in slices:
        parts[lot] += amount
    return list(parts.items())


AMOUNTS = st.one_of(
    st.integers(1, 60).map(Decimal),
    st.sampled_from([Decimal("0.000001"), Decimal("12.345678"), Decimal("7.5"), Decimal(500)]),
)
SPANS = st.sampled_from([10 * MINUTE, 30 * MINUTE, HOUR, 3 * HOUR, DAY])
ACCOUNTS = ["alpha", "beta", "Cy"]
ACCOUNT = st.sampled_from(ACCOUNTS)
NAMES = st.sampled_from(["r1", "r2", "r3", "r4", "r5"])
CAPABILITY = st.sampled_from([None, None, "image", "voice"])
MEMBERS = ["m1", "m2"]
MEMBER = st.sampled_from([None, None, "m1", "m2"])
ZONES = ["UTC", "America/New_York", "Pacific/Auckland"]
SCOPE = st.sampled_from([None, None, None, frozenset({"image"}), frozenset({"image", "voice"})])


class LedgerMachine(RuleBasedStateMachine):
    """The ledger and the model side by side: the same answers, the same refusals, the same balances."""

    def __init__(self, database: Database) -> None:
        super().__init__()
        self.conn = database.connect()
        self.ledger = Ledger(self.conn)
        self.now = NOON
        self.numbers = 0
        self.done: list[tuple[str, dict[str, Any], Any]] = []
        self.books = {name: Book(Decimal(20 * number), ZoneInfo(ZONES[number])) for number, name in enumerate(ACCOUNTS)}
        for name, book in self.books.items():
            self.ledger.open_account(name)
            self.ledger.set_debt_limit(name, book.debt_limit)
            self.ledger.set_time_zone(name, book.zone.key)

    def teardown(self) -> None:
        try:
            for name in ACCOUNTS:
                proof = self.ledger.prove_balance(name)
                assert proof.ok, proof.findings
            assert_sound(self.ledger)
            for name in ACCOUNTS:
                self.ledger.book(name)
            assert_sound(self.ledger)
        finally:
            self.conn.rollback()
            self.conn.close()

    # Helpers -------------------------------------------------------------------------------------------------------

    def number(self) -> int:
        self.numbers += 1
        return self.numbers

    def same(self, verb: str, arguments: dict[str, Any], expected: Callable[[], Any]) -> Any:
        """Call the verb and ask the model: both refuse alike, or both answer. The ledger's and the model's answers."""
        try:
            answer: Any = expected()
        except RefusalError as refusal:
            with pytest.raises(CreditsError) as caught:
                self.ledger.row(verb, **arguments)
            error = caught.value
            assert (error.status, error.code) == (refusal.status, refusal.code), (error, refusal)
            numbers = {name: Decimal(str(error.detail[name])) for name in refusal.numbers}
            assert numbers == refusal.numbers
            return None, None
        result = self.ledger.row(verb, **arguments)
        if getattr(result, "replayed", None) is False and (verb != "release" or result.status == "released"):
            self.done.append((verb, arguments, result))
        return result, answer

    def new_lot(self, account_id: str, amount: Decimal, kind: str, **more: Any) -> Lot:
        effective = more.pop("effective", self.now)
        priority = more.pop("priority", None)
        lot = Lot(
            self.number(), kind, PRIORITY[kind] if priority is None else priority, effective,
            more.pop("expires", NEVER), more.pop("scope", None), amount, amount,
        )  # fmt: skip
        self.books[account_id].lots.append(lot)
        self.books[account_id].advance(self.now)
        return lot

    # Time ----------------------------------------------------------------------------------------------------------

    def travel(self, to: datetime) -> None:
        self.now = max(to, self.now)
        self.ledger.now = self.now
        for book in self.books.values():
            book.advance(self.now)

    @rule(span=SPANS)
    def time_passes(self, span: timedelta) -> None:
        self.travel(self.now + span)

    @rule(offset=st.sampled_from([-TICK, timedelta(0), TICK]))
    def the_next_moment_comes(self, offset: timedelta) -> None:
        moment = min(book.next_event()[0] for book in self.books.values())
        if moment < NEVER:
            self.travel(moment + offset)

    @rule(account_id=ACCOUNT)
    def somebody_looks(self, account_id: str) -> None:
        self.ledger.freeze_account(account_id)
        self.books[account_id].frozen = True
        self.ledger.unfreeze_account(account_id)
        self.books[account_id].frozen = False

    @rule(account_id=ACCOUNT)
    def an_account_is_frozen(self, account_id: str) -> None:
        self.ledger.freeze_account(account_id)
        self.books[account_id].frozen = True

    # Credits come and go -------------------------------------------------------------------------------------------

    @rule(
        account_id=ACCOUNT, amount=AMOUNTS, kind=st.sampled_from(sorted(PRIORITY)), starts=st.none() | SPANS,
        lasts=st.none() | SPANS, priority=st.sampled_from([None, None, 0, 20, -5]), scope=SCOPE,
    )  # fmt: skip
    def grant(
        self, account_id: str, amount: Decimal, kind: str, starts: timedelta | None, lasts: timedelta | None,
        priority: int | None, scope: frozenset[str] | None,
    ) -> None:  # fmt: skip
        effective = self.now + starts if starts else None
        expires = (effective or self.now) + lasts if lasts else None
        lot = self.new_lot(
            account_id, amount, kind, priority=priority, scope=scope,
            effective=effective or self.now, expires=expires or NEVER,
        )  # fmt: skip
        result = self.ledger.grant_credits(
            account_id, amount, kind=kind, effective_at=effective, expires_at=expires, priority=priority,
            scope=sorted(scope) if scope else None, key=f"g{lot.number}",
        )  # fmt: skip
        lot.grant_id = result.grant_id
        assert (result.amount, result.priority) == (amount, lot.priority)

    @rule(account_id=ACCOUNT, member=st.sampled_from(MEMBERS), limit=st.none() | AMOUNTS | st.just(ZERO))
    def set_member(self, account_id: str, member: str, limit: Decimal | None) -> None:
        self.books[account_id].limits[member] = limit
        self.books[account_id].removed.discard(member)
        self.ledger.set_member(account_id, member, monthly_limit=limit)

    @precondition(lambda self: any(book.limits for book in self.books.values()))
    @rule(data=st.data())
    def remove_member(self, data: st.DataObject) -> None:
        account_id = data.draw(st.sampled_from([name for name, book in self.books.items() if book.limits]))
        member = data.draw(st.sampled_from(sorted(self.books[account_id].limits)))
        self.books[account_id].removed.add(member)
        self.ledger.remove_member(account_id, member)

    @rule(account_id=ACCOUNT, amount=AMOUNTS, capability=CAPABILITY, member=MEMBER)
    def spend(self, account_id: str, amount: Decimal, capability: str | None, member: str | None) -> None:
        book, key = self.books[account_id], f"s{self.number()}"
        arguments = {"account_id": account_id, "amount": amount, "capability": capability, "member_id": member,
                     "key": key}  # fmt: skip
        self.same("spend", arguments, lambda: book.spend(key, amount, capability, member, self.now))

    @rule(wanted=st.lists(st.tuples(ACCOUNT, AMOUNTS, MEMBER), min_size=1, max_size=8))
    def spend_many(self, wanted: list[tuple[str, Decimal, str | None]]) -> None:
        requests: list[dict[str, Any]] = []
        expected: list[tuple[Any, ...]] = []
        for account_id, amount, member in wanted:
            key = f"s{self.number()}"
            requests.append({"account_id": account_id, "amount": str(amount), "key": key, "member_id": member})
            book = self.books[account_id]
            try:
                book.spend(key, amount, None, member, self.now)
                expected.append((200, None, -amount, book.payable(None)))
            except RefusalError as refusal:
                expected.append((refusal.status, refusal.code, None, None))
        rows = self.ledger.spend_many(requests)
        assert [(row.status, row.code, row.amount, row.available) for row in rows] == expected

    @precondition(lambda self: any(book.charges for book in self.books.values()))
    @rule(data=st.data(), amount=st.none() | AMOUNTS)
    def refund(self, data: st.DataObject, amount: Decimal | None) -> None:
        account_id = data.draw(st.sampled_from([name for name, book in self.books.items() if book.charges]))
        book = self.books[account_id]
        name = data.draw(st.sampled_from(sorted(book.charges)))
        arguments = {"account_id": account_id, "spend_key": name, "amount": amount, "key": f"f{self.number()}"}
        result, returned = self.same("refund_spend", arguments, lambda: book.refund(name, amount, self.now))
        assert result is None or result.amount == returned

    @precondition(lambda self: any(lot.grant_id for book in self.books.values() for lot in book.lots))
    @rule(data=st.data(), amount=st.none() | AMOUNTS)
    def revoke(self, data: st.DataObject, amount: Decimal | None) -> None:
        lots = [(name, lot) for name, book in self.books.items() for lot in book.lots if lot.grant_id]
        account_id, lot = lots[data.draw(st.integers(0, len(lots) - 1))]
        arguments = {"account_id": account_id, "grant_id": lot.grant_id, "amount": amount, "key": f"v{self.number()}"}
        book = self.books[account_id]
        result, moved = self.same("revoke_grant", arguments, lambda: book.revoke(lot, amount, self.now))
        assert result is None or (result.amount, result.debt) == moved

    @rule(account_id=ACCOUNT, amount=AMOUNTS, down=st.booleans())
    def adjust(self, account_id: str, amount: Decimal, down: bool) -> None:
        def expected() -> None:
            if down:
                self.books[account_id].take(amount)
            else:
                self.new_lot(account_id, amount, "bonus")

        arguments = {"account_id": account_id, "amount": -amount if down else amount, "key": f"a{self.number()}"}
        self.same("adjust", arguments, expected)

    @rule(giver=ACCOUNT, taker=ACCOUNT, amount=AMOUNTS)
    def transfer(self, giver: str, taker: str, amount: Decimal) -> None:
        def expected() -> None:
            if giver == taker:
                raise RefusalError(400, "invalid_request")
            self.books[giver].check_active()
            gifts: dict[datetime, Decimal] = defaultdict(Decimal)
            for lot, part in self.books[giver].take(amount):
                gifts[lot.expires] += part
            for expires in sorted(gifts):
                lot = Lot(
                    self.number(), "gift", 25, self.now, expires, None, gifts[expires], gifts[expires], started=True
                )
                self.books[taker].lots.append(lot)
            self.books[taker].tidy(self.now)

        arguments = {"from_account_id": giver, "to_account_id": taker, "amount": amount, "key": f"t{self.number()}"}
        self.same("transfer_credits", arguments, expected)

    # Reservations --------------------------------------------------------------------------------------------------

    @rule(
        account_id=ACCOUNT, amount=AMOUNTS, name=NAMES, ttl=SPANS, least=st.none() | AMOUNTS, capability=CAPABILITY,
        member=MEMBER,
    )  # fmt: skip
    def reserve(
        self, account_id: str, amount: Decimal, name: str, ttl: timedelta, least: Decimal | None,
        capability: str | None, member: str | None,
    ) -> None:  # fmt: skip
        book = self.books[account_id]
        if name in book.holds:
            name = f"another {self.number()}"

        def expected() -> Decimal:
            book.check_active()
            required = min(amount, amount if least is None else least)
            left = book.left(member, required, self.now)
            slices = book.take(amount if left is None else min(amount, left), capability, required)
            book.holds[name] = Hold(slices, total(slices), self.now, self.now + ttl, capability, member)
            return total(slices)

        arguments = {"account_id": account_id, "amount": amount, "reservation_id": name, "ttl": ttl,
                     "min_amount": least, "capability": capability, "member_id": member}  # fmt: skip
        result, held = self.same("reserve", arguments, expected)
        assert result is None or (result.amount, result.expires_at) == (held, self.now + ttl)

    @rule(account_id=ACCOUNT, name=NAMES, amount=AMOUNTS)
    def capture(self, account_id: str, name: str, amount: Decimal) -> None:
        book, key = self.books[account_id], f"c{self.number()}"

        def expected() -> None:
            hold = book.open_hold(name)
            if amount > total(hold.slices):
                raise RefusalError(402, "insufficient_credits", required=amount, available=total(hold.slices))
            used, hold.slices = cut(hold.slices, amount)
            hold.captured += amount
            book.charges[key] = Charge(used, hold.member, hold.created)

        arguments = {"account_id": account_id, "reservation_id": name, "amount": amount, "key": key}
        self.same("capture", arguments, expected)

    @rule(
        account_id=ACCOUNT, name=NAMES, amount=AMOUNTS | st.just(ZERO),
        policy=st.sampled_from(["cap", "overflow", "reject"]),
    )  # fmt: skip
    def settle(self, account_id: str, name: str, amount: Decimal, policy: str) -> None:
        book = self.books[account_id]
        if name in book.holds and book.holds[name].status == "settled":
            return  # replays have a rule of their own
        arguments = {"account_id": account_id, "reservation_id": name, "amount": amount, "on_overage": policy}
        result, outcome = self.same("settle", arguments, lambda: book.settle(name, amount, policy, self.now))
        if result is not None:
            assert (result.charged, result.uncollected, result.late) == outcome
            assert result.actual == result.charged + result.uncollected == amount

    @rule(account_id=ACCOUNT, name=NAMES)
    def release(self, account_id: str, name: str) -> None:
        book = self.books[account_id]
        if name in book.holds and book.holds[name].status == "released":
            return

        def expected() -> str:
            hold = book.hold(name)
            if hold.status == "settled":
                raise RefusalError(409, "reservation_closed")
            if hold.status == "open":
                book.close(hold, "released", self.now)
            return hold.status

        result, status = self.same("release", {"account_id": account_id, "reservation_id": name}, expected)
        assert result is None or result.status == status

    @rule(account_id=ACCOUNT, name=NAMES, ttl=SPANS)
    def extend(self, account_id: str, name: str, ttl: timedelta) -> None:
        def expected() -> datetime:
            hold = self.books[account_id].open_hold(name)
            hold.expires = max(hold.expires, min(self.now + ttl, hold.created + DAY))
            return hold.expires

        arguments = {"account_id": account_id, "reservation_id": name, "ttl": ttl}
        result, expires = self.same("extend", arguments, expected)
        assert result is None or result.expires_at == expires

    # Again ---------------------------------------------------------------------------------------------------------

    @precondition(lambda self: self.done)
    @rule(data=st.data())
    def call_again(self, data: st.DataObject) -> None:
        verb, arguments, result = data.draw(st.sampled_from(self.done))
        assert self.ledger.row(verb, **arguments) == result._replace(replayed=True)

    @precondition(lambda self: any("amount" in arguments for _, arguments, _ in self.done))
    @rule(data=st.data())
    def call_again_with_another_amount(self, data: st.DataObject) -> None:
        verb, arguments, _ = data.draw(st.sampled_from([one for one in self.done if "amount" in one[1]]))
        with pytest.raises(CreditsError) as caught:
            self.ledger.row(verb, **{**arguments, "amount": 2 * (arguments["amount"] or 1)})
        assert (caught.value.status, caught.value.code) == (409, "idempotency_conflict")

    @invariant()
    def the_ledger_shows_what_the_model_knows(self) -> None:
        for name, book in self.books.items():
            shown, known = self.ledger.get_balance(name), book.balance(self.now)
            assert {column: getattr(shown, column) for column in known} == known
            members = {row.member_id: row.used for row in self.ledger.list_members(name)}
            assert members == {member: book.used(member, self.now) for member in book.limits.keys() - book.removed}


def test_random_operations_agree_with_the_model(shared: Database) -> None:
    run_state_machine_as_test(
        partial(LedgerMachine, shared),  # type: ignore[arg-type]  # any callable that makes one will do
        settings=settings(
            max_examples=30,
            stateful_step_count=50,
            deadline=None,
            report_multiple_bugs=False,
            suppress_health_check=list(HealthCheck),
        ),
    )
