"""A year alone: jobs run by themselves, things break now and then, and at the end nothing is left open.

PGCREDITS_TEST_YEAR_ACCOUNTS=10000 is the full size. What it took is printed: run it with -s.
"""

import json
import os
import random
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from decimal import Decimal
from email.utils import format_datetime
from typing import Any

import psycopg
import pytest
from ledger_support import DAY, HOUR, MINUTE, SETTABLE_CLOCK, Ledger, assert_sound
from psycopg.types.json import Jsonb
from servers import ONE_ENGINE, Database
from stripe_world import START, World, later, prepare

ACCOUNTS = int(os.environ.get("PGCREDITS_TEST_YEAR_ACCOUNTS", "120"))
STEP = 1 if ACCOUNTS >= 10000 else 5  # days after which somebody looks
OPENING = 14  # of them on which accounts are opened, as many on each
STEPS = 365 // STEP + OPENING
MORNING = START.replace(
    hour=5
)  # months of our own plans turn at five, people work at six, and some more is done at night
PLANS = {"small": (100, 0), "some": (150, 200), "all": (50, 10**9)}  # credits of a month, and how many roll over
ROLLOVER = {0: "none", 200: "cap", 10**9: "all"}
OPEN = """
select (select count(*) from credits.grants g where g.status in ('pending', 'active')
           and case when g.status = 'pending' then g.effective_at else g.expires_at end <= credits.now()) as grants,
       (select count(*) from credits.reservations r where r.status = 'open' and r.expires_at <= credits.now()) as holds,
       (select count(*) from credits.subscriptions s where s.source = 'internal' and s.state <> 'canceled'
           and least(s.period_end, s.pending_at) <= credits.now()) as months,
       (select count(*) from credits.stripe_requests
         where state in ('queued', 'sent', 'failed', 'unknown')) as requests,
       (select count(*) from credits.stripe_events where status in ('parked', 'failed')) as events,
       (select count(*) from credits.notification_deliveries where state in ('pending', 'sent')) as notifications,
       (select count(*) from credits.notification_deliveries
         where state = 'dead' and target <> 'gone' and attempts < 12) as dead"""


@dataclass
class Model:
    """An account with a plan of our own, simply: this month's credits, and others, which are spent last."""

    plan: str | None
    anchor: datetime
    month: int = 0
    pending: str | None = None
    ends: bool = False
    left: Decimal = field(init=False)
    other: Decimal = Decimal(0)

    def __post_init__(self) -> None:
        self.left = Decimal(PLANS[self.plan][0]) if self.plan else Decimal(0)

    @property
    def available(self) -> Decimal:
        return self.left + self.other

    def live(self, now: datetime) -> None:
        """Months turn: what is left stays as far as the plan lets it, and the next one brings its credits."""
        while self.plan and later(int(self.anchor.timestamp()), (1, "month"), self.month + 1) <= now.timestamp():
            self.month += 1
            if self.ends:
                self.plan, self.left = None, Decimal(0)
                return
            stays = min(self.left, Decimal(PLANS[self.plan][1]))
            self.plan, self.pending = self.pending or self.plan, None
            self.left = stays + PLANS[self.plan][0]

    def use(self, amount: Decimal) -> bool:
        if amount > self.available:
            return False
        first = min(amount, self.left)
        self.left -= first
        self.other -= amount - first
        return True


class Year:
    """A database that is left alone, Stripe, and what goes wrong by the dice."""

    def __init__(self, database: Database, ledger: Ledger, owner: psycopg.Connection[Any]) -> None:
        self.database, self.ledger, self.owner = database, ledger, owner
        self.dice = random.Random(6)
        self.fates: dict[str, random.Random] = {}  # one for each fault, so that none depends on how often others ask
        self.world = World()
        self.world.page = 100
        self.models: dict[str, Model] = {}
        self.subscriptions: dict[str, str] = {}  # of Stripe, by account
        self.told = 0
        self.faults: Counter[str] = Counter()
        self.took: Counter[str] = Counter()
        self.held_back: list[str] = []
        self.calm = False

    @contextmanager
    def measured(self, what: str) -> Iterator[None]:
        began = time.perf_counter()
        yield
        self.took[what] += round(1000 * (time.perf_counter() - began))

    def now(self, at: datetime, *others: psycopg.Connection[Any]) -> None:
        """Turn the clock of the session, and of others. Functions stay as they are, and so do their plans."""
        self.at = at
        for conn in (self.ledger.conn, *others):
            conn.execute("select set_config('tests.now', %s, false)", [at.isoformat()])

    def chance(self, what: str, one_in: int) -> bool:
        """Whether it goes wrong this time."""
        fate = self.fates.setdefault(what, random.Random(what))
        wrong = not self.calm and fate.randrange(one_in) == 0
        self.faults[what] += wrong
        return wrong

    # What happens ----------------------------------------------------------------------------------------------------

    def open(self, day: int) -> None:
        """Accounts of a day: most with a plan of our own, each tenth with a subscription of Stripe."""
        for number in range(day, ACCOUNTS, OPENING):
            account = f"y{number}"
            if number % 10:
                plan = [*PLANS][number % 3]
                self.ledger.open_account(account, plan=plan)
                self.models[account] = Model(plan, self.at)
            else:
                late = self.chance("an event before its account", 5)
                if not late:
                    self.ledger.open_account(account)
                self.world.now = int(self.at.timestamp())
                self.subscriptions[account] = self.world.subscribe(account, "basic")
                if late:
                    self.deliver()
                    self.ledger.open_account(account)

    def subscribe(self, until: datetime) -> None:
        """Subscriptions of Stripe that end before a moment begin anew; of some the payment comes a day later."""
        for subscription in self.subscriptions.values():
            if self.world.facts[subscription]["end"] < until.timestamp() - 7200:
                invoice = self.world.renew(subscription, paid=not (fails := self.chance("a card", 15)))
                if fails:
                    self.world.wait(minutes=30)
                    self.world.pay(invoice)
        self.deliver()

    def deliver(self) -> None:
        """Stripe's news, in any order, some twice, some a day later."""
        news = [event.payload for event in self.world.events[self.told :]]
        self.told += len(news)
        news += [payload for payload in news if self.chance("an event twice", 20)]
        self.dice.shuffle(news)
        payloads, self.held_back = self.held_back, []
        for payload in news:
            (self.held_back if self.chance("an event a day late", 20) else payloads).append(payload)
        for payload in payloads:
            self.ledger.receive_stripe_event("default", payload)

    def work(self) -> None:
        """People use credits, hold some, get some, and change their minds."""
        accounts = [*self.models, *self.subscriptions]
        some = self.dice.sample(accounts, max(10, len(accounts) // 20)) if len(accounts) > 10 else accounts
        asked = [(account, Decimal(self.dice.randint(1, 60))) for account in some]
        requests = [
            {"account_id": account, "amount": str(amount), "key": f"{account}:{self.at}"} for account, amount in asked
        ]
        results = self.ledger.spend_many(requests)
        for (account, amount), result in zip(asked, results, strict=True):
            if model := self.models.get(account):
                assert (result.status == 200) == model.use(amount), (account, self.at, amount, model, result)
        for account, model in self.dice.sample([*self.models.items()], min(4, len(self.models))):
            if model.available >= 3:
                self.ledger.reserve(account, 3, f"r:{self.at}", ttl=self.dice.randint(1, 12) * HOUR)
                if self.dice.random() < 0.5:
                    self.ledger.settle(account, f"r:{self.at}", 2)
                    assert model.use(Decimal(2))
            self.ledger.grant_credits(account, 5, kind="bonus", key=f"bonus:{self.at}")
            model.other += 5
            if model.plan and not model.ends and not model.pending:
                if self.dice.random() < 0.3:
                    model.pending = self.dice.choice([name for name in PLANS if name != model.plan])
                    self.ledger.change_plan(account, model.pending, at="period_end")
                elif self.dice.random() < 0.05:
                    model.ends = True
                    self.ledger.cancel_plan(account)

    # What runs by itself ---------------------------------------------------------------------------------------------

    def jobs(self) -> None:
        if self.chance("a runner is killed", 20):
            self.kill()
        self.ledger.conn.execute("call credits.work_jobs(time_limit => '1 hour', runner => 'year')")

    def kill(self) -> None:
        """A batch is done and not committed when its runner dies; after the lease another one does it."""
        with self.database.connect(autocommit=True) as runner, self.database.admin() as admin:
            self.now(self.at, runner)
            claims = runner.execute("select * from credits.claim_job('victim')").fetchall()
            if not claims:
                return
            runner.execute("begin")
            runner.execute("select credits.run_job(%s, run_id => %s)", claims[0][:2])
            admin.execute("select pg_terminate_backend(%s)", [runner.info.backend_pid])
            with pytest.raises(psycopg.OperationalError):
                runner.execute("select 1")
        self.now(self.at + 2 * MINUTE)

    def outbox(self) -> None:
        """Stripe answers, but for a worker that dies, and for an hour that is none of its best."""
        while requests := self.ledger.claim_stripe_requests(100):
            for request in requests:
                if self.chance("a worker is killed", 30):
                    continue
                date = Jsonb({"Date": format_datetime(self.at, usegmt=True), "Request-Id": "req_1"})
                status, body = self.world.get(request.path, request.params, int(self.at.timestamp()))
                if self.chance("Stripe answers 500", 30):
                    status, body = 500, {"error": {"type": "api_error"}}
                self.ledger.complete_stripe_request(request.request_id, status, json.dumps(body), headers=date)

    def notices(self) -> None:
        """Receivers: one that fails every third time, one that is gone for good."""
        while claimed := self.ledger.claim_notifications(100):
            for delivery in claimed:
                if self.chance("a notifier is killed", 50):
                    continue
                flaky = 500 if self.chance("a receiver answers 500", 3) else 204
                self.ledger.complete_notification(delivery.delivery_id, 410 if delivery.target == "gone" else flaky)

    def rest(self) -> None:
        """One evening of all that runs by itself."""
        with self.measured("jobs"):
            self.jobs()
        with self.measured("outbox"):
            self.outbox()
        with self.measured("notifications"):
            self.notices()

    def vacuum(self) -> None:
        """As autovacuum would, which is off in tests."""
        with self.measured("vacuum"), self.database.admin() as admin:
            admin.execute("vacuum analyze")

    def day(self, number: int) -> None:
        broken = self.chance("a bad deploy", 40)
        if broken:
            self.owner.execute("alter table credits.allowances add constraint of_a_bad_deploy check (false) not valid")
        self.now(MORNING + number * STEP * DAY)
        if number < OPENING:
            with self.measured("opening"):
                self.open(number)
        for model in self.models.values():
            model.live(self.at)
        self.rest()
        self.now(self.at.replace(hour=6))
        with self.measured("use"):
            self.work()
        self.now(self.at.replace(hour=20))
        with self.measured("events"):
            self.subscribe(self.at)
        if broken:
            self.owner.execute("alter table credits.allowances drop constraint of_a_bad_deploy")
        self.rest()


@ONE_ENGINE  # what differs between engines, other tests see
def test_a_year_alone(database: Database) -> None:
    with (
        database.connect(autocommit=True) as conn,
        database.connect("credits_owner", autocommit=True) as owner,
    ):
        ledger = Ledger(conn, at=None)
        owner.execute(SETTABLE_CLOCK)
        year = Year(database, ledger, owner)
        year.now(MORNING - timedelta(hours=1))
        furnish(ledger)
        for number in range(STEPS):
            year.day(number)
            if number % 14 == 0:
                year.vacuum()
        for name in ("audit", "reconcile_stripe"):
            ledger.set_job(name, schedule="default")
        for _ in range(4):  # nobody does anything any more
            year.now(year.at + DAY)
            year.rest()
        year.calm = True  # nor does anything go wrong
        for _ in range(6):
            year.now(year.at + 4 * HOUR)
            year.rest()
        check(year)


def furnish(ledger: Ledger) -> None:
    prepare(ledger)
    for code, (credits_, stays) in PLANS.items():
        rollover = ROLLOVER[stays]
        ledger.change(
            "insert into credits.plans (code, name, monthly_credits, rollover, rollover_cap)"
            " values (%s, %s, %s, %s, %s)",
            code, code, credits_, rollover, stays if rollover == "cap" else None,
        )  # fmt: skip
    ledger.change("update credits.settings set value = '20' where name = 'low_balance_threshold'")
    ledger.change("update credits.settings set value = '\"20 days\"' where name = 'subscription_refresh_after'")
    ledger.set_notification_endpoint("flaky", "http://127.0.0.1:1/flaky")
    ledger.set_notification_endpoint("gone", "http://127.0.0.1:1/gone", kinds=["low_balance"])
    ledger.set_job("audit", schedule="43 3 1 * *")  # it reads everything: each month is enough here
    ledger.set_job("reconcile_stripe", schedule="33 3 * * 1")


def check(year: Year) -> None:
    """Nothing is left open, and each account has what it should."""
    ledger = year.ledger
    with year.measured("audit"):
        assert_sound(ledger)
    with ledger.as_owner():
        assert set(ledger.query(OPEN)[0]) == {0}, ledger.query(OPEN)
    jobs = ledger.list_jobs()
    assert {(job.state, job.failures) for job in jobs} == {("waiting", 0)}, jobs
    assert min(job.last_success_at for job in jobs) > year.at - 8 * DAY  # one job is weekly
    for account, model in year.models.items():
        model.live(year.at)
        assert ledger.get_balance(account)[1:4] == (model.available, 0, model.available), (account, model)
    with ledger.as_owner():
        (seen,) = ledger.query(
            "select (select count(*) from credits.entries) as entries,"
            " (select count(*) from credits.stripe_events) as events,"
            " (select count(*) from credits.stripe_events where attempts > 1) as events_tried_again,"
            " (select count(*) from credits.notification_deliveries where state = 'delivered') as delivered,"
            " (select count(*) from credits.notification_deliveries where state = 'dead') as dead"
        )
    assert min(year.faults.values()) > 0, year.faults
    assert min(seen) > 0, seen
    print(f"\n{ACCOUNTS} accounts: {seen}\nfaults: {dict(year.faults)}\nms: {dict(year.took)}")  # noqa: T201 - figures
