"""The story app: plans at Stripe, a state validated before each use, a handler that is replaced while it runs."""

import json
import re
import time
from collections import Counter
from collections.abc import Sequence
from datetime import UTC, datetime
from email.utils import format_datetime
from statistics import median
from typing import Any

import httpx
from five_ways import AUDIENCE, token
from ledger_support import DAY, refused, same
from product import Product
from psycopg import sql
from psycopg.types.json import Jsonb
from servers import Database
from stripe_world import START, Event, Offer, World

PLANS = {"individual": (999, 30), "team": (2999, 200), "custom": (4999, 500)}
ISSUER = "https://story.example"


class Days(Product):
    """The app, its users and operators; all of Stripe is a world, and the clock runs from where it is turned to."""

    endpoint = "stories"

    def __init__(self, database: Database) -> None:
        super().__init__(database, "story-app", stripe_key="")  # the door asks nothing: see answer
        offers = {name: Offer(amount, price={"credits": str(credits_)}) for name, (amount, credits_) in PLANS.items()}
        self.world = World("old", offers=offers)  # which tells what an app asked for years ago
        self.world.untold ^= {"invoice.paid", "invoice.payment_succeeded", "customer.created"}
        self.ahead = 0.0
        self.calls: list[float] = []

    def _at(self, second: int) -> None:
        """Forward to a second; from there the clock runs, so that what is stored tells how long it took."""
        ahead = second - time.time()
        if ahead > self.ahead:
            self.ahead = ahead
            self.owner.execute(
                sql.SQL("create or replace function credits.now() returns timestamptz language sql as {}").format(
                    sql.Literal(f"select clock_timestamp() + interval '{ahead} seconds'")
                )
            )

    def wait(self, **span: float) -> None:
        """Time passes, the jobs run, and Stripe answers what it is asked."""
        super().wait(**span)
        self.work()

    def work(self) -> None:
        """What is due by the world's clock is done."""
        self.turn()
        for _ in range(20):
            self.jobs()
            if not self.answer():
                return
        raise AssertionError("this never comes to rest")

    def hear(self, lost: Sequence[Event] = ()) -> Counter[str]:
        """Stripe posts its news, but for what gets lost: how many had which outcome."""
        self.turn()
        outcomes = Counter(self.deliver(event.payload) for event in self.news() if event not in lost)
        self.work()
        return outcomes

    def answer(self) -> int:
        """Stripe answers what is due; how much that was."""
        requests = self.backend.claim_stripe_requests(100)
        for request in requests:
            status, body = self.show(request)
            date = Jsonb({"Date": format_datetime(self.world.moment, usegmt=True), "Request-Id": "req_1"})
            self.backend.complete_stripe_request(
                request.request_id, status, httpx.Response(200, json=body).text, headers=date
            )
        return len(requests)

    def show(self, request: Any) -> tuple[int, Any]:
        if (request.method, request.path) == ("post", "/v1/customers"):
            return 200, self.world.show(self.world.customer(request.params["metadata"]["account_id"], named=True))
        return self.world.get(request.path, request.params, self.world.now)

    def use(self, account: str, credits_: int, story: str) -> Any:
        """A story is generated: the state is validated, credits are spent, once."""
        began = time.perf_counter()
        row = self.backend.use_credits_validated(
            account, credits_, description="story", metadata=Jsonb({"idempotency_key": story})
        )
        self.calls.append(time.perf_counter() - began)
        return row

    def state(self, account: str) -> Any:
        return self.backend.get_user_subscription_state(account)

    def events(self, **which: Any) -> list[Any]:
        return self.backend.list_stripe_events(**{"max_rows": 1000, **which})


def test_a_story_app(database: Database) -> None:
    with Days(database) as days:
        days.command("pgcredits catalog apply docs/examples/story-app.yaml")
        days.backend.set_issuer(ISSUER, audiences=[AUDIENCE])
        subscriptions = beside_the_old_handler(days)
        the_switch(days, subscriptions)
        stories(days)
        load(days)
        renewals(days, subscriptions)
        new_users(days)
        ends(days, subscriptions)
        operators(days)
        the_page_is_understood(days)
        days.sound("alpha", "beta", "gamma", "delta", "epsilon")


def beside_the_old_handler(days: Days) -> dict[str, str]:
    """Ten days in shadow: everything is seen and nothing is changed."""
    ledger, world = days.backend, days.world
    ledger.set_stripe_endpoint(days.endpoint, mode="shadow")
    users = dict(zip(("alpha", "beta", "gamma"), PLANS, strict=True))
    for account in users:
        ledger.open_account(account)
        ledger.link_identity(account, ISSUER, f"user-{account}")
        days.tokens[account] = token(iss=ISSUER, sub=f"user-{account}")
    subscriptions = {account: world.subscribe(account, plan) for account, plan in users.items()}
    assert set(days.hear()) == {"ignored"}
    assert {row.reason for row in days.events()} == {"shadow"}
    would = [row.effects for row in days.events(type="invoice.payment_succeeded")]
    granted = [one["amount"] for effects in would for one in effects if one["effect"] == "grant"]
    assert sorted(granted) == [30, 200, 500]
    assert [ledger.available(account) for account in users] == [0, 0, 0]
    assert days.events(status="failed") == days.events(status="parked") == []
    return subscriptions


def the_switch(days: Days, subscriptions: dict[str, str]) -> None:
    """The balances of the old system, then its endpoint, then what lives on."""
    ledger, world = days.backend, days.world
    days.wait(days=10)
    for account, left in (("alpha", 18), ("beta", 145), ("gamma", 500)):
        ends = datetime.fromtimestamp(world.facts[subscriptions[account]]["end"], UTC)
        ledger.grant_credits(account, left, kind="plan", expires_at=ends, description="Moved", key="opening")
    ledger.set_stripe_endpoint(days.endpoint, mode="live")
    kinds = ("customer.created", "customer.subscription.created", "customer.subscription.updated")
    known = [row for kind in kinds for row in reversed(days.events(type=kind))]
    assert {ledger.replay_stripe_event(row.event_id).outcome for row in known} == {"applied"}
    days.work()
    assert [ledger.available(account) for account in subscriptions] == [18, 145, 500]
    for account, plan in zip(subscriptions, PLANS, strict=True):
        state = days.state(account)
        assert (state["state"], state["plan"], state["may_spend"]) == ("active", plan, True)


def stories(days: Days) -> None:
    """A story costs credits, a double click costs them once, one that fails costs nothing."""
    ledger = days.backend
    first = days.use("alpha", 10, "story:1")
    assert (first.state, first.available, first.subscription["plan"]) == ("active", 8, "individual")
    assert days.use("alpha", 10, "story:1").replayed
    with refused(402, "insufficient_credits", required=10, available=8):
        days.use("alpha", 10, "story:2")
    days.use("alpha", 8, "story:3")
    back = ledger.refund_spend("alpha", "story:3", reason="The pictures failed.", key="story:3")
    assert (back.amount, back.available) == (8, 8)
    assert same(back, ledger.refund_spend("alpha", "story:3", reason="The pictures failed.", key="story:3"))

    assert days.ask("alpha", "get_balance")["available"] == 8
    assert days.ask("alpha", "get_subscription_state")["plan"] == "individual"
    assert days.rpc("alpha", "get_balance", account_id="beta").status_code == 404
    assert days.door.http.post("/rpc/get_balance", json={}).status_code == 401


def load(days: Days) -> None:
    """Half an hour of readers and writers: each page asks for the state, each story validates it."""
    ledger = days.backend
    before = ledger.get_subscription_cache_status()
    for minute in range(0, 30, 2):
        for account in ("alpha", "beta", "gamma"):
            for page in range(6):
                assert days.state(account)["state"] == "active"
                if page == 0 and account != "alpha":
                    days.use(account, 1, f"load:{minute}")
        days.wait(minutes=2)
    after = ledger.get_subscription_cache_status()
    hits, misses = after.hits - before.hits, after.misses - before.misses
    assert hits + misses == 15 * 3 * 6 + 2 * 15
    assert hits / (hits + misses) > 0.8, (hits, misses)
    for account in ("alpha", "beta", "gamma"):
        days.state(account)
    assert ledger.get_subscription_cache_status().entries == 3
    earlier = len(ledger.get_cache_cleanup_history(n=100))
    Product.wait(days, minutes=20)  # and nobody but the schedule does the jobs
    assert days.scheduled()["subscription_cache_cleanup"] == 3
    days.work()
    assert ledger.get_subscription_cache_status().entries == 0
    cleanups = ledger.get_cache_cleanup_history(n=100)[:-earlier]
    assert (sum(row.removed for row in cleanups), {row.scope for row in cleanups}) == (3, {"expired"})
    assert [ledger.available(account) for account in ("alpha", "beta", "gamma")] == [8, 130, 485]


def renewals(days: Days, subscriptions: dict[str, str]) -> None:
    """A month turns: one invoice comes, the webhook of one is missed, and one cannot be understood."""
    ledger, world = days.backend, days.world
    of = {world.renew(subscription): account for account, subscription in subscriptions.items()}
    paid = {
        of[invoice]: event
        for event in world.events
        if event.type == "invoice.payment_succeeded"
        and (invoice := json.loads(event.payload)["data"]["object"]["id"]) in of
    }
    days.owner.execute("alter table credits.allowances add constraint of_a_bad_deploy check (credits <> 500)")
    assert days.hear(lost=[paid["beta"]]) == {"applied": 4, "failed": 1}
    assert [ledger.available(account) for account in subscriptions] == [30, 0, 0]

    missed = next(invoice for invoice, account in of.items() if account == "beta")
    by_hand = ledger.add_subscription_credits("cus_beta", missed, subscriptions["beta"], 200, description="Missed")
    assert (by_hand.amount, by_hand.replayed, ledger.available("beta")) == (200, False, 200)
    assert days.deliver(paid["beta"].payload) == "applied"  # and grants nothing more
    assert ledger.available("beta") == 200

    (failed,) = days.events(status="failed")
    assert "of_a_bad_deploy" in failed.error
    days.wait(minutes=30)  # trying again does not help
    assert days.events(status="failed")[0].attempts > failed.attempts
    days.owner.execute("alter table credits.allowances drop constraint of_a_bad_deploy")
    assert ledger.replay_stripe_event(failed.event_id).outcome == "applied"
    assert ledger.replay_stripe_event(failed.event_id).outcome == "applied"  # and does nothing twice
    assert (days.events(status="failed"), ledger.available("gamma")) == ([], 500)


def new_users(days: Days) -> None:
    """One comes by Checkout; of another nobody told us, and the nightly comparison finds it."""
    ledger, world = days.backend, days.world
    for account in ("delta", "epsilon"):
        ledger.open_account(account, email=f"{account}@example.com")
        asked = ledger.get_or_create_stripe_customer(account)
        assert (asked.status, asked.customer_id) == ("pending", None)
        days.work()
        assert ledger.get_or_create_stripe_customer(account).customer_id == f"cus_{account}"
    world.subscribe("delta", "individual")
    assert set(days.hear()) == {"applied"}
    assert ledger.available("delta") == 30

    world.wait(hours=1)
    unheard = world.subscribe("epsilon", "team")
    days.news()  # all lost
    days.work()
    assert (ledger.available("epsilon"), days.state("epsilon")["state"]) == (0, "none")
    invoice = world.facts[unheard]["latest_invoice"]
    days.wait(days=1)
    assert [gap.object_id for gap in ledger.list_stripe_gaps(state="open") if gap.amount] == [invoice]
    ledger.reconcile_stripe(since=world.moment - 2 * DAY, repair=True)
    days.work()
    days.wait(minutes=10)
    assert (ledger.available("epsilon"), days.state("epsilon")["plan"]) == (200, "team")
    assert ledger.get_reconciliation().remaining == 0


def ends(days: Days, subscriptions: dict[str, str]) -> None:
    """Canceled but usable until the period ends; unpaid and refused, until it is paid."""
    ledger, world = days.backend, days.world
    world.cancel(subscriptions["alpha"], at_period_end=True)
    days.hear()
    assert days.state("alpha")["state"] == "canceling"
    days.use("alpha", 20, "story:4")
    world.finish(subscriptions["alpha"])
    days.hear()
    assert (days.state("alpha")["state"], ledger.available("alpha")) == ("canceled", 0)
    with refused(402, "insufficient_credits", required=1, available=0):
        days.use("alpha", 1, "story:5")

    unpaid = world.renew(subscriptions["beta"], paid=False)
    days.hear()
    ledger.grant_credits("beta", 5, description="For the trouble", key="trouble")
    assert days.use("beta", 1, "story:6").state == "past_due"  # in its grace
    world.wait(days=8)
    world.move(subscriptions["beta"], "unpaid")
    days.hear()
    with refused(403, "subscription_inactive", state="unpaid"):
        days.use("beta", 1, "story:7")
    world.pay(unpaid)
    days.hear()
    assert (days.use("beta", 1, "story:7").state, ledger.available("beta")) == ("active", 203)


def operators(days: Days) -> None:
    """What the operators ask by the day, the week and the month, and what they were promised."""
    ledger = days.backend
    days.wait(hours=1)
    events = days.events()
    assert len(events) == len({row.event_id for row in events}) > 30
    well = [row for row in events if row.status in {"applied", "ignored"}]
    assert len(well) / len(events) > 0.99
    assert days.events(status="parked") == []
    assert [job.name for job in ledger.list_jobs() if job.failures] == []

    live = [row for row in well if row.applied_at and row.attempts == 1 and row.reason != "shadow"]
    assert median((row.applied_at - row.received_at).total_seconds() for row in live) < 2
    received = {one["key"]: row.received_at for row in live for one in row.effects or [] if one.get("key")}
    lags = [
        (entry.created_at - received[entry.key]).total_seconds()
        for account in ("alpha", "beta", "gamma", "delta", "epsilon")
        for entry in ledger.history(account, max_rows=1000)
        if entry.key in received
    ]
    assert len(lags) >= 3
    assert median(lags) < 0.5
    assert median(days.calls) < 0.2
    status = ledger.get_subscription_cache_status()
    assert status.hit_rate > 0.8

    ledger.reconcile_stripe(since=START)
    days.work()
    # Three invoices of before the switch were granted by the old handler; nothing else differs.
    gaps = ledger.list_stripe_gaps(state="open")
    assert [(gap.gap, gap.account_id) for gap in gaps] == [
        ("grant_missing", name) for name in ("alpha", "beta", "gamma")
    ]
    assert ledger.purchase_totals() == []
    assert ledger.get_reconciliation().remaining == 3
    reports(days, len(events))


def the_page_is_understood(days: Days) -> None:
    """Every statement of the page names what there is and what a backend may call. These days have shown the rest."""
    with days.database.admin() as admin:
        admin.execute("create table users (id text, email text)")
        admin.execute("create table old_balances (id text, credits_left numeric, period_end timestamptz)")
        admin.execute("grant select on users, old_balances to credits_service")
    blocks = re.findall(r"```sql\n(.*?)```", days.page, re.DOTALL)
    statements = re.sub(r"--.*", "", "".join(blocks)).split(";")[:-1]
    assert len(statements) > 25
    for statement in statements:
        days.conn.execute(f"explain {statement}".encode())


def reports(days: Days, events: int) -> None:
    """Every statement that the page has for operators, and what it says of these days."""
    section = days.page.split("## What operators look at")[1].split("\n## ")[0]
    blocks = re.findall(r"```sql\n(.*?)```", section, re.DOTALL)
    shown: dict[str, list[Any]] = {}
    for statement, source in re.findall(r"^(select [^;]* from credits\.(\w+)[^;]*;)", "".join(blocks), re.MULTILINE):
        days.work()
        shown[source] = days.backend.query(statement)
    assert len(shown) == "".join(blocks).count(";")
    well = ("report_failed_events", "report_stripe_requests", "list_jobs", "audit")
    assert [shown[name] for name in well] == [[]] * len(well)
    by_day = shown["report_event_processing"]
    assert sum(row.events for row in by_day) == events
    assert min(row.success_rate for row in by_day) > 0.99
    assert by_day[0].lag_95.total_seconds() < 2
    assert [row.findings for row in shown["report_integrity"]] == [0]
    assert [tuple(row) for row in shown["report_subscriptions"]] == [
        ("active", "custom", 1, 0), ("active", "individual", 1, 0), ("active", "team", 2, 0),
        ("canceled", "individual", 1, 1),
    ]  # fmt: skip
    assert sorted((row.kind, row.credits) for row in shown["report_liability"]) == [("bonus", 4), ("plan", 199)]
