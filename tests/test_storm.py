"""The whole product at once, under fire: nothing is oversold, nothing is done twice, nothing is lost.

A server, two doors with their workers and tickers, a Stripe that misbehaves, customers who ask again until they are
answered; and a hand that kills sessions, doors and the server. When it is calm again, what Stripe knows, what customers
were told and what the books say must be the same.

PGCREDITS_TEST_STORM=SEED:SECONDS:SPEED makes another one; a minute lasts a second at speed 60.
"""

import json
import logging
import os
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, suppress
from decimal import Decimal
from pathlib import Path
from random import Random
from typing import Any

import psycopg
from five_ways import JWT_SECRET
from servers import until
from storm import FAULTS, Bank, Clock, Doors, Post, Receiver, Server, Street
from storm_customers import DAILY_CAP, PACKAGES, URLS, Customer, RefusedError, Way

from pgcredits.migrate import DeployError

SEED, SECONDS, SPEED = (int(word) for word in os.environ.get("PGCREDITS_TEST_STORM", "1:10:60").split(":"))
ACCOUNTS = ["plain_1", "plain_2", "auto_1", "auto_2", "auto_3", "stripe_1", "stripe_2", "stripe_3", "team_1", "team_2",
            "gone_1", "gone_2"]  # fmt: skip
BOOKED = {  # what a customer's verb writes: the argument that names the account, and the sign of the amount
    "spend": ("account_id", -1), "capture": ("account_id", -1), "settle": ("account_id", 0),
    "refund_spend": ("account_id", 1), "transfer_credits": ("from_account_id", -1), "grant_credits": ("account_id", 1),
    "revoke_grant": ("account_id", 0), "settle_usage": ("account_id", 0),
}  # fmt: skip
BREAKS = ("connection", "terminat", "shut", "recovery", "starting up", "cannot reach")  # of a deploy
# Health may warn of what Stripe refused, and of nothing else.
WARNED = {("requests_succeed", "warn"), ("requests_succeed", "fail")}
TAKEN = ("spend", "capture", "settle", "transfer_out")

log = logging.getLogger(__name__)


class Storm:
    """All that takes part in it."""

    def __init__(self, made: ExitStack) -> None:
        folder = Path(os.environ["PGCREDITS_TEST_RUN"]) / f"storm-{os.getpid()}"
        luck = self.luck = Random(SEED)
        self.clock = Clock(SPEED)
        self.server = made.enter_context(closing(Server(folder, self.clock)))
        self.street = Street(self.clock, Random(luck.random()), luck.choice(["old", "new"]))
        self.bank = made.enter_context(Bank(self.street))
        self.doors = made.enter_context(
            closing(Doors(self.server.dsn, self.bank.url, JWT_SECRET, folder.with_suffix(".log")))
        )
        self.post = made.enter_context(closing(Post(self.doors.ports, Random(luck.random()))))
        self.bank.tells = self.post.take
        self.receiver = made.enter_context(closing(Receiver(Random(luck.random()))))
        self.stop = threading.Event()
        self.deploying = False
        self.deploys: Counter[str] = Counter()
        self.operator = made.enter_context(closing(Way(self.server.dsn, self.doors.ports, Random(luck.random()))))
        self.kills: Counter[str] = Counter()
        self.customers = [self.customer(account, number) for account in ACCOUNTS for number in (1, 2)]
        for customer in self.customers:
            made.enter_context(closing(customer.way))

    def customer(self, account: str, number: int) -> Customer:
        """One of those who work with an account."""
        others = [other for other in ACCOUNTS if other != account]
        way = Way(self.server.dsn, self.doors.ports, Random(f"{SEED} {account} {number}"))
        return Customer(f"{account}-{number}", account, others, way, self.clock)

    def prepare(self) -> None:
        """Accounts of all kinds, and months that will turn while the storm is on."""
        call = self.customers[0].way.call
        call("load_demo_catalog")
        self.server.query(
            "insert into credits.plans (code, name, monthly_credits, stripe_product_id, stripe_price_ids) values "
            "('basic', 'Basic', 0, null, '{price_basic}'), ('seat', 'Seats', 100, 'prod_seat', '{}'),"
            "('day', 'By the day', 0, null, '{price_day}'), ('large_day', 'More', 0, null, '{price_large_day}')"
        )
        self.change_catalog(self.luck)
        call("set_notification_endpoint", name="all", url=self.receiver.url)
        self.server.query("select credits.set_setting('allowed_redirect_urls', %s)", json.dumps([URLS["cancel_url"]]))
        for account in ACCOUNTS:
            call("open_account", account_id=account, **({"plan": "team"} if "team" in account else {"plan": "free"}
                 if account in ("plain_2", "gone_1") else {}))  # fmt: skip
            for member, limit in (("ann", 300), ("bob", None)) if "team" in account else ():
                call("set_member", account_id=account, member_id=member, monthly_limit=limit)
            if "stripe" in account:
                prices = self.luck.choice([["basic"], ["seat"], ["basic", "seat"], ["day"], ["large_day"]])
                quantity = self.luck.randint(1, 3)
                self.bank.happen(lambda: self.street.subscribe(account, *prices, quantity=quantity))  # noqa: B023
            else:
                self.bank.happen(lambda: self.street.card(account))  # noqa: B023
            if "gone" in account:
                self.bank.happen(lambda: self.street.buy(account))  # noqa: B023
            self.server.set_on(120)
        until(self.at_rest, 60)
        for customer in self.customers[::2]:
            call("grant_credits", account_id=customer.account, amount=500, key="start")
            if "auto" in customer.account:
                customer.set_top_up()
        first = min(self.street.facts[name]["end"] for name in self.street.named("subscription"))
        self.server.set_on(first - self.clock.now() - 60)

    def rage(self) -> None:
        """Until the time is over, all at once."""
        luck = Random(self.luck.random())
        self.post.calm = False
        self.bank.latency = lambda: luck.random() / 20
        self.bank.fault = lambda: luck.choice(FAULTS) if luck.random() < 0.15 else None
        beside = [self.kill, self.let_things_happen, self.run_jobs, self.operate, self.deploy]
        with ThreadPoolExecutor(len(self.customers) + len(beside)) as pool:
            running = [pool.submit(customer.work, self.stop) for customer in self.customers]
            running += [pool.submit(work, Random(self.luck.random())) for work in beside]
            end = time.monotonic() + SECONDS
            while time.monotonic() < end and not any(one.done() for one in running):
                time.sleep(0.1)
            self.stop.set()
            for one in running:
                one.result()

    def every(self, seconds: float, luck: Random) -> Iterator[float]:
        """A random number now and then, until the storm is over."""
        while not self.stop.wait(luck.random() * 2 * seconds):
            yield luck.random()

    def kill(self, luck: Random) -> None:
        """The hand that kills: mostly sessions, now and then a door, rarely the server."""
        ways: dict[Callable[[Random], int], int] = {
            self.server.end_sessions: 70, self.doors.kill: 17, self.server.kill_session: 5, self.server.kill: 8,
        }  # fmt: skip
        for _ in self.every(0.3, luck):
            (way,) = luck.choices([*ways], [*ways.values()])
            way = self.server.end_sessions if self.deploying else way  # or none would ever come to its end
            with suppress(psycopg.OperationalError):
                self.kills[way.__qualname__] += way(luck)

    def let_things_happen(self, luck: Random) -> None:
        """People and banks go on."""
        for _ in self.every(0.1, luck):
            self.bank.happen(lambda: self.street.go_on([name for name in ACCOUNTS if "gone" not in name]))

    def operate(self, luck: Random) -> None:
        """An operator's day: other prices, accounts that are frozen or go, figures, an endpoint switched off and on."""
        call, url = self.operator.call, self.receiver.url
        figures = ["refresh_totals", "run_audit", "health", "metrics", "repeat_erasures", "get_catalog_sync"]
        things: dict[Callable[[], Any], int] = {
            lambda: self.change_catalog(luck): 4,
            lambda: call("freeze_account", account_id=luck.choice(ACCOUNTS), reason="storm"): 4,
            lambda: call("set_notification_endpoint", name="all", url=url, enabled=luck.random() < 0.5): 2,
            lambda: call("set_member", account_id="team_1", member_id="ann", monthly_limit=luck.randint(300, 500)): 2,
            lambda: call(luck.choice(figures)): 3,
            lambda: call("erase_account", account_id=luck.choice(["gone_1", "gone_2"]), release_holds=True): 1,
            lambda: call("set_time_zone", account_id="team_2", time_zone=luck.choice(["Europe/Berlin", "UTC"])): 1,
        }
        for _ in self.every(0.5, luck):
            for thing in (self.unfreeze, *luck.choices([*things], [*things.values()])):
                with suppress(RefusedError, psycopg.OperationalError):
                    thing()

    def unfreeze(self) -> None:
        """Nobody is frozen any more."""
        for row in self.server.query("select account_id from credits.accounts where status = 'frozen'"):
            self.operator.call("unfreeze_account", account_id=row.account_id)

    def change_catalog(self, luck: Random) -> None:
        """Other prices: what was quoted, ordered and pinned before stays as it was."""
        (said,) = self.operator.call("get_catalog")
        catalog = said.get("get_catalog", said)
        catalog["packages"]["standard"] |= {"price": 4500 + (more := luck.randint(0, 500)), "credits": 5000 + more}
        refill = {"name": "Refill", "currency": "usd", "price": (price := luck.randint(1000, 1100)), "credits": price}
        catalog["packages"]["refill"] = refill
        catalog["plans"]["team"]["monthly_credits"] = luck.randint(1900, 2100)
        catalog["rates"] = [
            {"capability": rate["capability"], "price": {"credits": luck.randint(1, 9), "block": 100}}
            if rate["capability"] == "chapter" and "model" not in rate else rate
            for rate in catalog["rates"]
        ]  # fmt: skip
        self.operator.call("apply_catalog", catalog=json.loads(json.dumps(catalog, default=float)))

    def deploy(self, luck: Random) -> None:
        """The same version again, beside all that goes on."""
        for _ in self.every(SECONDS / 4, luck):
            try:
                self.deploying = luck.random() < 0.8
                self.server.deploy()
                self.deploys["done"] += 1
            except (DeployError, psycopg.Error) as error:
                self.deploys["broken off"] += 1
                if not any(word in str(error) for word in BREAKS):
                    self.operator.odd.append(f"deploy: {error}")
            self.deploying = False

    def run_jobs(self, luck: Random) -> None:
        """Jobs beside those of the doors, an audit, and an operator who repairs what has not come yet."""
        for chance in self.every(1, luck):
            with suppress(psycopg.OperationalError):
                self.server.query("call credits.work_jobs('1 second', 'storm')")
                assert self.server.query("select * from credits.audit()") == []
                if chance < 0.3:
                    self.server.query("select credits.process_stripe_events(max_events => 20)")
                    with suppress(psycopg.ProgrammingError):  # one is under way
                        self.server.query("select credits.reconcile_stripe(repair => true)")

    def calm_down(self) -> None:
        """No more faults. What was begun ends, what was asked is answered, what was told arrives."""
        self.bank.fault, self.bank.latency, self.post.calm = None, lambda: 0.0, True
        self.receiver.calm = True
        log.warning("calm: %s to post", self.waiting()[:1])
        self.clock.slow_down()
        self.server.set_on(0)
        self.unfreeze()
        self.operator.call("set_notification_endpoint", name="all", url=self.receiver.url)
        self.bank.happen(self.street.settle_down)
        until(self.at_rest, 100, self.waiting)
        self.server.set_on(1200)  # longer than any hold
        self.server.query("call credits.work_jobs('10 seconds', 'calm')")
        until(self.at_rest, 100, self.waiting)
        until(self.all_told, 30)
        self.server.query("call credits.work_jobs('10 seconds', 'calm')")
        self.server.query("select credits.run_audit(), credits.refresh_totals()")

    def all_told(self) -> bool:
        """Whether no notification waits. What would be sent again later is sent now."""
        self.server.query(
            "update credits.notification_deliveries set next_attempt_at = credits.now() where state = 'pending'"
        )
        self.server.query("select credits.retry_notifications('all')")
        return not self.server.query("select from credits.notification_deliveries where state <> 'delivered'")

    def waiting(self) -> list[Any]:
        """Requests and events that are not done."""
        posted = [(left, self.post.answers)] if (left := self.post.left()) else []
        return (
            posted
            + self.bank.odd
            + self.server.query(
                "select r.request_id::text as id, r.purpose as what, r.state, r.error_type as error"
                "  from credits.stripe_requests r where r.state not in ('done', 'failed', 'declined') union all "
                "select e.event_id, e.type, e.status, e.error"
                "  from credits.stripe_events e where e.status not in ('applied', 'ignored')"
            )
        )

    def at_rest(self) -> bool:
        """Whether nothing moves any more. What would be tried again later is tried now."""
        self.server.query("update credits.stripe_requests set run_at = credits.now() where state = 'queued'")
        self.server.query("select credits.process_stripe_events(max_events => 100)")
        return not self.waiting()

    # The end ---------------------------------------------------------------------------------------------------------

    def findings(self) -> Iterator[Any]:
        """What is not as it must be."""
        query = self.server.query
        yield from (error for customer in self.customers for error in customer.way.odd)
        # A catalogue waits for a deploy, at a door not for ever.
        yield from (error for error in self.operator.odd if "57014" not in error)
        yield from self.bank.odd + self.receiver.odd + self.server.errors()
        yield from (row for row in query("select * from credits.health()")
                    if row.status != "ok" and (row.name, row.status) not in WARNED)  # fmt: skip
        yield from query("select * from credits.audit()")
        yield from query("select p.* from credits.accounts a, credits.prove_balance(a.account_id) p where not p.ok")
        yield from query("select sum(t.balance) from credits.trial_balance t having sum(t.balance) <> 0")
        yield from query("select * from credits.reservations where status = 'open'")
        yield from query("select * from credits.balances where held <> 0")
        yield from query("select * from credits.job_runs where outcome = 'failed'")
        yield from (self.post.told ^ {row.event_id for row in query("select event_id from credits.stripe_events")})
        yield from self.asked_twice()
        yield from self.money()
        yield from self.calls()
        yield from self.used()
        yield from self.subscriptions()
        yield from self.notifications()
        yield from self.figures()

    def sizes(self) -> dict[str, int]:
        """Rows of tables that grow."""
        tables = ["stripe_events", "stripe_requests", "job_runs", "notifications", "entries", "subscription_history"]
        return {table: self.server.query(f"select count(*) as n from credits.{table}")[0].n for table in tables}

    def used(self) -> Iterator[Any]:
        """Uses that cost something else than the rate says that they began with, and members beyond their limit."""
        query = self.server.query
        lines = {row.rate_id: row.price["lines"][0] for row in query("select rate_id, price from credits.rates")}
        pinned: dict[str, int] = {}
        for answer in (answer for customer in self.customers for answer in customer.answers if "usage" in answer.verb):
            for row in answer.rows:
                line = lines[row["rate_id"]]
                cost = -(-answer.arguments["units"] // line["block"]) * line["credits"]
                told = row["amount"] if answer.verb == "authorize_usage" else row["actual"]
                odd = told < cost or (told > cost and answer.verb == "authorize_usage")  # more may have been captured
                if odd or pinned.setdefault(row["usage_id"], row["rate_id"]) != row["rate_id"]:
                    yield answer
        # What was done is charged, also beyond its hold, or after it. The operator sets one limit, up to 500.
        yield from query(
            "select m.account_id, m.member_id, m.month_used from credits.members m, lateral ("
            "  select sum(case when r.late then r.charged else greatest(r.captured + r.charged - r.amount, 0) end)"
            "    from credits.reservations r where r.account_id = m.account_id and r.member_id = m.member_id"
            ") r (beyond) where m.month_used - coalesce(r.beyond, 0)"
            "  > case m.account_id when 'team_1' then 500 else m.monthly_limit end"
        )

    def subscriptions(self) -> Iterator[Any]:
        """Subscriptions that are not what they are at Stripe."""
        found = {
            row.subscription_id: row
            for row in self.server.query(
                "select s.subscription_id, s.status, s.price_id, s.cancel_at_period_end as ends,"
                " extract(epoch from s.period_end)::bigint as until, 'price_' || s.pending_plan as pending"
                " from credits.subscriptions s where s.source = 'stripe'"
            )
        }
        for name in self.street.named("subscription"):
            fact, row = self.street.facts[name], found.pop(name, None)
            price, schedule = fact["items"][0]["price"], self.street.facts.get(fact["schedule"] or "", {"phases": []})
            following = [phase["items"][0]["price"] for phase in schedule["phases"][1:]]
            at_stripe = (fact["status"], price, fact["cancel_at_period_end"], fact["end"])
            if row is None or at_stripe != (row.status, row.price_id, row.ends, row.until):
                yield fact, row
            elif fact["status"] != "canceled" and (row.pending or price) not in (following or [price]):
                yield fact, schedule, row
        yield from found.values()

    def notifications(self) -> Iterator[Any]:
        """Notifications that were not heard, or were another one when they were sent again."""
        told = self.server.query("select 'ntf_' || n.notification_id as message_id, n.* from credits.notifications n")
        yield from (one for one in told if one.message_id not in self.receiver.heard)
        heard = {
            name: {body for body in bodies if '"gone_' not in body} for name, bodies in self.receiver.heard.items()
        }
        yield from (
            (name, bodies) for name, bodies in heard.items() if len(bodies) > 1
        )  # of who is erased, less is told

    def figures(self) -> Iterator[Any]:
        """Figures for operators that are not the sums over the tables."""
        yield from self.server.query(
            "select m.name, m.value, s.value as sum from credits.metrics() m join ("
            "select 'pgcredits_credits_balance' as name, sum(balance) as value from credits.balances union all "
            "select 'pgcredits_credits_debt', sum(debt) from credits.balances union all "
            "select 'pgcredits_stripe_events_given_up', 0 union all select 'pgcredits_notifications_dead', 0"
            ") s using (name) where m.value <> s.value"
        )

    def asked_twice(self) -> Iterator[Any]:
        """Things that Stripe was asked for under several keys, or did several times."""
        keys = defaultdict(set)
        for call in self.bank.calls:
            if call.method == "POST":
                about = call.params.get("metadata", {})
                named = [about.get(name) for name in ("top_up_id", "refund_request_id", "checkout_id")]
                if any(named) or call.path == "/v1/customers":  # what else is asked, may be asked again
                    keys[next(filter(None, named), f"{call.path} {about}")].add(call.key)
        yield from ((thing, asked) for thing, asked in keys.items() if len(asked) > 1)
        yield from ((key, times) for key, times in self.bank.effects.items() if times > 1)

    def money(self) -> Iterator[Any]:
        """Payments, refunds and disputes that are not what they should be in credits; and credits nobody paid for."""
        lots = defaultdict(list)
        for lot in self.server.query(
            "select g.source, g.account_id, g.amount, coalesce(c.taken + c.owed, 0) as back, c.target,"
            " p.amount_refunded, p.amount_disputed from credits.grants g"
            " left join credits.clawbacks c using (account_id, grant_id)"
            " left join credits.purchases p using (account_id, grant_id)"
            " where g.source ~ '^(checkout|top_up|invoice):'"
        ):
            lots[lot.source.partition(":")[2]].append(lot)
        topped_up: Counter[str] = Counter()
        for paid in self.street.paid():
            about, charge = self.street.facts[paid], self.street.charge_of(paid)
            found, (refunded, lost) = lots.pop(paid, []), self.street.given_back(paid)
            share = min(Decimal(1), Decimal(refunded + lost) / charge["amount"])
            if about["object"] == "invoice":
                odd = any((lot.target or 0) != round(lot.amount * share, 6) for lot in found)
                if odd or not (found or about["billing_reason"] == "subscription_update"):
                    yield about, found
                continue
            account, quantity = about["metadata"]["account_id"], int(about["metadata"].get("quantity", 1))
            bought = quantity * PACKAGES[about["metadata"]["package"]](charge["amount"] // quantity)
            expected = [(account, bought, round(bought * share, 6), refunded, lost)]
            if expected != [
                (lot.account_id, lot.amount, expected[0][2] if "gone" in account else lot.back, lot.amount_refunded,
                 lot.amount_disputed) for lot in found
            ]:  # fmt: skip
                yield about, expected, found
            topped_up[account] += charge["amount"] if "top_up_id" in about["metadata"] else 0
        free = self.street.named("invoice", status="paid", payment_intent=None)  # of a few seconds of a plan, say
        yield from (found for paid, found in lots.items() if paid not in free)
        days = 2 + (self.clock.now() - self.clock.began) // 86400
        yield from ((account, spent) for account, spent in topped_up.items() if spent > DAILY_CAP * days)

    def calls(self) -> Iterator[Any]:
        """Calls that were answered and are not in the books once, or are in the books and were never answered."""
        entries = {(row.account_id, row.entry_seq): row for row in self.server.query("select * from credits.entries")}
        answered: Counter[tuple[str, int]] = Counter()
        for answer in (answer for customer in self.customers for answer in customer.answers):
            # Keys of an erased account are known, but not what they stood for.
            erased = "gone" in answer.arguments.get("account_id", "")
            if answer.error == "invalid_request" or ("conflict" in answer.error and not erased):
                yield answer
            for account, seq, amount in booked(answer.verb, answer.arguments, answer.rows):
                answered[account, seq] += 1
                if (entry := entries.get((account, seq))) is None or amount not in (None, entry.amount):
                    yield answer, entry
        yield from (entries[place] for place, times in answered.items() if times > 1)
        granted = {  # one that starts later has no entry yet
            (answer.arguments["account_id"], answer.arguments["key"])
            for customer in self.customers for answer in customer.answers
            if answer.verb == "grant_credits" and answer.rows
        }  # fmt: skip
        lots = self.server.query("select account_id, key from credits.grants where source is null and key <> 'start'")
        yield from granted ^ {(lot.account_id, lot.key) for lot in lots}
        for place, entry in entries.items():
            if place not in answered and entry.kind in {*TAKEN, "refund"}:
                yield "never answered", entry
            left = entry.available_after if entry.kind == "spend" else entry.balance_after
            if entry.kind in TAKEN and left < 0:
                yield "oversold", entry


def booked(verb: str, arguments: dict[str, Any], rows: list[dict[str, Any]]) -> Iterator[tuple[str, int, Any]]:
    """Account, number and amount of the entries that an answer tells of."""
    if verb == "spend_many":
        yield from ((row["account_id"], row["entry_seq"], row["amount"]) for row in rows if row["status"] == 200)
    elif verb in BOOKED:
        account, sign = BOOKED[verb]
        amount = sign * arguments["amount"] if sign else None
        yield from ((arguments[account], row["entry_seq"], amount) for row in rows if row["entry_seq"])


def test_a_storm_breaks_no_promise() -> None:
    log.warning("seed %s, %s seconds", SEED, SECONDS)
    with ExitStack() as made:
        storm = Storm(made)
        storm.prepare()
        storm.rage()
        storm.calm_down()
        calls = sum(len(customer.answers) for customer in storm.customers)
        broken = sum(customer.way.broken for customer in storm.customers)
        log.warning("%s calls, %s broken off, %s to Stripe", calls, broken, len(storm.bank.calls))
        log.warning("deploys: %s, notifications: %s", dict(storm.deploys), len(storm.receiver.heard))
        log.warning("done: %s", Counter(a.verb for c in storm.customers for a in c.answers if a.rows))
        log.warning("refused: %s", Counter(a.error for c in storm.customers for a in c.answers if a.error))
        log.warning("sizes: %s", storm.sizes())
        log.warning("killed: %s, answers to events: %s", dict(storm.kills), dict(storm.post.answers))
        findings = [*storm.findings()]
        for finding in findings:
            log.error("%s", finding)
        assert not findings, (len(findings), findings[:5])
        assert min(calls / 5, broken, storm.kills.total(), len(storm.post.told)) > 5
