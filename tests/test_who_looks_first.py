"""Whoever looks first books it: the same work ends in the same books if jobs run each week, only reads look, or nobody.

Random work on one account: plans, holds that run out, debt, gifts that start later, time zones, catalogues that change;
and beside it what Stripe tells of purchases and subscriptions. Each answer and each read on the way is the same, too.
"""

import random
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from functools import partial
from typing import Any

import pytest
from client import CreditsError
from ledger_support import DAY, HOUR, NOON, Ledger, assert_sound, undone
from psycopg import Connection
from scenarios.chance import Years
from servers import ONE_ENGINE
from stripe_world import START, World, prepare, settle

PLANS = ["none", "more", "zero", "all", "cap"]
ZONES = ["UTC", "Europe/Berlin", "America/Sao_Paulo", "Pacific/Kiritimati", "Australia/Lord_Howe"]
STEPS = [HOUR, DAY, 10 * DAY, 30 * DAY, 70 * DAY]
WEEK = 7 * DAY
BOOKING = {"expire_grants", "expire_reservations", "grant_plan_credits", "apply_scheduled_changes"}  # of the jobs

BOOKS = {  # all but our own ids, and how many grants it took
    "grants": """
      select kind, effective_at, expires_at, sum(amount - revoked) as amount, sum(remaining) as remaining,
             sum(held) as held, sum(consumed) as consumed, sum(expired) as expired, sum(owed) as owed
        from credits.grants where status <> 'pending' group by 1, 2, 3 having sum(amount - revoked) > 0
       order by 1, 2, 3""",
    "pending": """
      select kind, effective_at, expires_at, amount from credits.grants where status = 'pending' order by 1, 2, 3, 4""",
    "entries": "select kind, sum(amount) as amount, sum(debt) as debt from credits.entries group by 1 order by 1",
    "plans": """
      select state, plan, period_start, period_end, anchor_at, pending_plan, highest_credits
        from credits.subscriptions order by subscription_id""",
    "history": """
      select from_state, to_state, plan, split_part(cause, ':', 1) as cause
        from credits.subscription_history order by subscription_id, history_id""",
    "purchases": """
      select stripe_session_id, status, amount_refunded, amount_disputed from credits.purchases order by 1""",
}


@pytest.fixture(scope="module")
def scene(stage: Callable[..., Connection[Any]]) -> Ledger:
    ledger = Ledger(stage())
    prepare(ledger)
    ledger.change(
        "insert into credits.plans (code, name, monthly_credits, rollover, rollover_cap) values "
        "('none', 'None', 300, 'none', null), ('more', 'More', 900, 'none', null), ('zero', 'Zero', 0, 'none', null), "
        "('all', 'All', 100, 'all', null), ('cap', 'Cap', 100, 'cap', 150)"
    )
    ledger.change("update credits.settings set value = '\"100 days\"' where name = 'reservation_max_age'")
    for job in ledger.list_jobs():
        ledger.set_job(job.name, enabled=job.name in BOOKING)
    return ledger


class Work:
    """What happens to alpha: the same whenever it is done with the same seed, however the books stand meanwhile."""

    def __init__(self, ledger: Ledger, seed: int, each_week: Callable[[Ledger], None] | None) -> None:
        self.ledger, self.dice, self.each_week = ledger, random.Random(seed), each_week
        self.holds, self.spends = ["none"], ["none"]
        self.told: list[Any] = []  # every answer and every read

    def done(self) -> list[Any]:
        """Do all of it, and tell what was seen."""
        ledger, dice = self.ledger, self.dice
        ledger.now = NOON - dice.random() * 40 * DAY
        ledger.open_account("alpha", plan=dice.choice(PLANS))
        plans, uses = [self.change_plan] * 3 + [self.cancel_plan, self.resume_plan], [self.spend, self.refund]
        holds = [self.reserve] * 2 + [self.settle] * 2 + [self.release, self.capture, self.extend]
        others = [self.promise, self.owe, self.move] + [self.change_catalog] * 2
        for number in range(14):
            self.wait(dice.choice(STEPS) * dice.random())
            happens = dice.choice([*plans, *uses, *holds, *others])
            try:
                self.told.append(happens(str(number)))
            except CreditsError as refusal:  # not all of it can be had
                self.told.append(refusal.code)
            self.look()
        self.end()
        return self.told

    def end(self) -> None:
        """Book all of it, and tell what the books are."""
        self.wait(100 * DAY)
        self.ledger.book()
        while self.ledger.initialize_plan_credits():
            pass
        self.look()
        with self.ledger.as_owner():
            self.told += [(name, self.ledger.query(query)) for name, query in BOOKS.items()]

    def wait(self, span: timedelta) -> None:
        """Turn the clock, with what is done each week, and look."""
        until = self.ledger.now + span
        while self.each_week and self.ledger.now + WEEK < until:
            self.ledger.now += WEEK
            self.each_week(self.ledger)
        self.ledger.now = until
        self.look()

    def look(self) -> None:
        balance, plan = self.ledger.get_balance("alpha"), self.ledger.get_subscription_state("alpha")
        self.told.append((self.ledger.now, balance._replace(entry_seq=0), plan))

    def some(self) -> Decimal:
        """An amount that can be had, mostly."""
        share = Decimal(self.dice.randrange(1, 100)) / 100
        available: Decimal = self.ledger.available()
        return max(Decimal(1), round(abs(available) * share, 2))

    # What may happen; each draws the same whatever the ledger answers.

    def change_plan(self, _key: str) -> Any:
        return self.ledger.change_plan(
            "alpha", self.dice.choice(PLANS), at=self.dice.choice(["now", "period_end"])
        ).state

    def cancel_plan(self, _key: str) -> Any:
        return self.ledger.cancel_plan("alpha", at=self.dice.choice(["now", "period_end"])).state

    def resume_plan(self, _key: str) -> Any:
        return self.ledger.resume_plan("alpha").state

    def spend(self, key: str) -> Any:
        self.spends.append(key)
        return self.ledger.spend("alpha", self.some(), key=key).balance

    def refund(self, key: str) -> Any:
        return self.ledger.refund_spend("alpha", self.dice.choice(self.spends), amount=1, key=key).amount

    def reserve(self, key: str) -> Any:
        self.holds.append(key)
        return self.ledger.reserve("alpha", self.some(), key, ttl=self.dice.random() * 70 * DAY).amount

    def settle(self, _key: str) -> Any:
        hold, policy = self.dice.choice(self.holds), self.dice.choice(["cap", "overflow", "reject"])
        row = self.ledger.settle("alpha", hold, self.dice.choice([0, 50, 120, 1000]), on_overage=policy)
        return row.charged, row.uncollected

    def release(self, _key: str) -> Any:
        return self.ledger.release("alpha", self.dice.choice(self.holds)).status

    def capture(self, key: str) -> Any:
        return self.ledger.capture("alpha", self.dice.choice(self.holds), 7, key=key).amount

    def extend(self, _key: str) -> Any:
        return self.ledger.extend("alpha", self.dice.choice(self.holds), ttl=self.dice.random() * 70 * DAY).held

    def promise(self, key: str) -> Any:
        """Give credits that start later."""
        begins = self.ledger.now + self.dice.random() * 60 * DAY
        ends = begins + self.dice.random() * 90 * DAY + DAY
        return self.ledger.grant(60, key=key, kind="promo", effective_at=begins, expires_at=ends).amount

    def owe(self, key: str) -> Any:
        """Take credits back that were used: a debt, which the next ones pay."""
        made = self.ledger.grant(self.dice.choice([30, 120, 1000]), key=key)
        self.ledger.spend("alpha", min(made.amount, self.ledger.available()), key=key)
        return self.ledger.revoke_grant("alpha", made.grant_id, key=f"{key}-back").debt

    def move(self, _key: str) -> Any:
        return self.ledger.set_time_zone("alpha", self.dice.choice(ZONES))

    def change_catalog(self, _key: str) -> Any:
        """The same as catalog apply: what has begun is booked first."""
        while self.ledger.grant_plan_credits():
            pass
        plan = self.ledger.get_subscription_state("alpha").plan or self.dice.choice(PLANS)
        monthly = self.dice.choice([0, 50, 120, 1000])
        self.ledger.change("update credits.plans set monthly_credits = %s where code = %s", monthly, plan)


def jobs(ledger: Ledger) -> None:
    while any(row.more for row in ledger.run_due_jobs()):
        pass


def reads(ledger: Ledger) -> None:
    ledger.get_balance("alpha")
    ledger.get_subscription_state("alpha")


def assert_all_the_same(scene: Ledger, work: Callable[[Callable[[Ledger], None] | None], Work]) -> None:
    told = []
    for each_week in (None, reads, jobs):
        with undone(scene):
            told.append(work(each_week).done())
            assert_sound(scene)
    alone, *watched = told
    for other in watched:
        for mine, theirs in zip(alone, other, strict=True):
            assert mine == theirs


@pytest.mark.parametrize("seed", [*range(8), 53])  # 53: a plan that came with a boundary was asked for what had ended
def test_the_same_work_ends_in_the_same_books(scene: Ledger, seed: int) -> None:
    assert_all_the_same(scene, partial(Work, scene, seed))


# Beside Stripe -------------------------------------------------------------------------------------------------------


class Beside(Work):
    """What happens to alpha beside what Stripe tells of it, as soon as that happens."""

    def __init__(
        self, ledger: Ledger, world: World, seed: int | None, each_week: Callable[[Ledger], None] | None, plan: str = ""
    ) -> None:
        super().__init__(ledger, seed or 0, each_week)
        self.world, self.busy = world, seed is not None
        self.plan = plan or self.dice.choice([None, *PLANS])

    def done(self) -> list[Any]:
        self.ledger.now = START
        self.ledger.open_account("alpha", plan=self.plan)
        kind = self.dice.choice(["none", "all", "cap"]) if self.busy else "all"
        self.ledger.change(
            "update credits.plans set rollover = %s, rollover_cap = %s where stripe_price_ids <> '{}'",
            kind,
            700 if kind == "cap" else None,
        )
        span = self.world.moment - START
        uses = [self.spend, self.reserve, self.settle, self.release, self.refund, self.promise, self.owe]
        own = [(START + self.dice.random() * span, self.dice.choice([*uses, self.change_plan])) for _ in range(8)]
        happens = [(moment, partial(what, str(n))) for n, (moment, what) in enumerate(own) if self.busy]
        tells = [(datetime.fromtimestamp(e.created, UTC), partial(self.hear, e.payload)) for e in self.world.events]
        for moment, what in sorted([*tells, *happens], key=lambda one: one[0]):
            self.wait(moment - self.ledger.now)
            try:
                self.told.append(what())
            except CreditsError as refusal:
                self.told.append(refusal.code)
            self.look()
        self.wait(self.world.moment - self.ledger.now)
        self.end()
        return self.told

    def wait(self, span: timedelta) -> None:
        """The same, while Stripe answers what it is asked."""
        until = self.ledger.now + span
        while self.ledger.now < until:
            stop = min(until, self.ledger.now + WEEK)
            settle(self.ledger, self.world, patience=stop - self.ledger.now)
            self.ledger.now = stop
            if self.each_week and stop < until:
                self.each_week(self.ledger)
        self.look()

    def hear(self, payload: str) -> Any:
        outcome = self.ledger.receive_stripe_event("default", payload).outcome
        assert outcome in {"applied", "ignored", "parked"}, self.ledger.list_stripe_events(status="failed")
        settle(self.ledger, self.world, patience=timedelta(0))
        return outcome


def half_is_refunded(world: World) -> None:
    """Each month of the year that begins after that is worth half."""
    invoice = world.first_invoice(world.subscribe("alpha", "year"))
    world.wait(days=10)
    world.refund(invoice, 5000)
    world.wait(days=50)


def all_is_disputed(world: World) -> None:
    """Months that begin meanwhile are frozen, and what is frozen does not roll over."""
    invoice = world.first_invoice(world.subscribe("alpha", "year"))
    world.wait(days=35)
    dispute = world.dispute(invoice)
    world.wait(days=70)
    world.close(dispute, "won")
    world.wait(days=3)


def all_is_refunded_after_months(world: World) -> None:
    """The months that had begun had begun, and what was left of those before had rolled over."""
    world.wait(days=12)
    invoice = world.first_invoice(world.subscribe("alpha", "year"))
    world.wait(days=75)
    world.refund(invoice)
    world.wait(days=3)


def months_overlap(world: World) -> None:
    """It wakes, and a new year begins in the middle of the other one's months."""
    subscription = world.subscribe("alpha", "year")
    world.wait(days=3)
    world.pause(subscription)
    world.wait(days=5)
    world.resume(subscription)
    world.wait(days=70)


STORIES = [half_is_refunded, all_is_disputed, all_is_refunded_after_months, months_overlap]


@pytest.mark.parametrize("plan", ["", "all"])
@pytest.mark.parametrize("story", STORIES)
def test_what_stripe_told_ends_in_the_same_books(scene: Ledger, story: Callable[[World], None], plan: str) -> None:
    world = World()
    story(world)
    assert_all_the_same(scene, lambda each_week: Beside(scene, world, None, each_week, plan))


def test_of_two_plans_that_are_over_the_same_one_speaks(scene: Ledger) -> None:
    with undone(scene):
        world = World()
        subscription = world.subscribe("alpha", "year")
        world.wait(days=3)
        world.cancel(subscription)
        scene.now = START
        scene.open_account("alpha", plan="all")
        scene.cancel_plan("alpha")
        for event in world.events:
            scene.receive_stripe_event("default", event.payload)
        scene.now = START + 40 * DAY
        read = scene.get_subscription_state("alpha")
        assert (read.state, read.subscription_id) == ("canceled", subscription)
        scene.book()
        assert scene.get_subscription_state("alpha") == read


def pay_no_more(world: World, subscription: str) -> None:
    world.move(subscription, "past_due")


def go_on(world: World, subscription: str) -> None:
    told = "customer.subscription.updated"
    world.put("subscription", subscription, told, status="active", pause_collection=None)


@pytest.mark.parametrize("rest", [World.pause_collection, World.pause, pay_no_more])
def test_a_month_is_as_if_its_pause_had_been_known_in_time(scene: Ledger, rest: Callable[[World, str], None]) -> None:
    world = World("old")
    subscription = world.subscribe("alpha", "year")
    for what, days in ((rest, 20), (rest, 10), (go_on, 10)):  # a month begins on the 28th day
        world.meanwhile()
        world.wait(days=days)
        what(world, subscription)
    for told in ((0, 20, 30, 40), (0, 30, 30, 40), (0, 31, 30, 40)):  # in time, late, and in the reverse order
        with undone(scene):
            scene.now = START
            scene.open_account("alpha")
            available = []
            for days, number in sorted(zip(told, range(4), strict=True)):
                scene.now = START + days * DAY
                scene.book()
                for event in world.acts[number].events:
                    scene.receive_stripe_event("default", event.payload)
                available.append(scene.available())
            assert available[2:] == [0, 1000]
            assert_sound(scene)


@ONE_ENGINE
@pytest.mark.parametrize("seed", range(4))
def test_random_work_beside_stripe_ends_in_the_same_books(scene: Ledger, seed: int) -> None:
    world = World("old" if seed % 2 else "new")
    Years(world, random.Random(seed)).play(steps=12)
    assert_all_the_same(scene, lambda each_week: Beside(scene, world, seed, each_week))
