"""Whoever looks first books it: the same work ends in the same books if jobs run each week, only reads look, or nobody.

Random work on one account: plans, holds that run out, debt, gifts that start later, time zones, catalogues that change.
Each answer and each read on the way is the same, too.
"""

import random
from collections.abc import Callable
from datetime import timedelta
from decimal import Decimal
from typing import Any

import pytest
from client import CreditsError
from ledger_support import DAY, HOUR, NOON, Ledger, assert_sound, undone
from psycopg import Connection

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
        from credits.subscriptions""",
    "history": "select from_state, to_state, plan, cause from credits.subscription_history order by history_id",
}


@pytest.fixture(scope="module")
def scene(stage: Callable[..., Connection[Any]]) -> Ledger:
    ledger = Ledger(stage())
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
        self.wait(100 * DAY)
        ledger.book()
        while ledger.initialize_plan_credits():
            pass
        self.look()
        with ledger.as_owner():
            self.told += [(name, ledger.query(query)) for name, query in BOOKS.items()]
        return self.told

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


@pytest.mark.parametrize("seed", [*range(8), 53])  # 53: a plan that came with a boundary was asked for what had ended
def test_the_same_work_ends_in_the_same_books(scene: Ledger, seed: int) -> None:
    told = []
    for each_week in (None, reads, jobs):
        with undone(scene):
            told.append(Work(scene, seed, each_week).done())
            assert_sound(scene)
    alone, *watched = told
    for other in watched:
        for mine, theirs in zip(alone, other, strict=True):
            assert mine == theirs
