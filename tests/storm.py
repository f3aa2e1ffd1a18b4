"""What a storm is made of: a clock that runs fast, a server and doors that are killed, Stripe and its post.

Stripe keeps books of its own and misbehaves. Its post comes late, twice, in any order, and again until it is answered.
"""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from collections import Counter, defaultdict
from collections.abc import Callable
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from random import Random
from typing import Any

import httpx
import psycopg
from door import SECRET, signature
from psycopg.conninfo import conninfo_to_dict, make_conninfo
from psycopg.rows import namedtuple_row
from servers import CONF, CONF_18, INITDB_18, until
from standardwebhooks.webhooks import Webhook
from stripe_fake import KEY, Call, StripeFake, error
from stripe_world import CATALOGUE, Act, Event, Json, Offer, Shape, World, later

from pgcredits import embedded, migrate

FAULTS = ("cut before", "cut after", "no json", "500", "503 html", "429", "409", "slow", "hang after")
OFFERS = {  # with days that turn while a storm is on
    **CATALOGUE,
    "day": Offer(300, (1, "day"), price={"credits": "100"}),
    "large_day": Offer(900, (1, "day"), price={"credits": "300"}),
}
NOTIFY_SECRET = "whsec_" + "c3Rvcm0" * 6
DECLINED = {"type": "card_error", "code": "card_declined", "decline_code": "insufficient_funds"}
SESSIONS = (
    "select pid from pg_stat_activity where backend_type = 'client backend' and datname = current_database()"
    " and pid <> pg_backend_pid() and application_name <> 'deploy'"
)
# In the server's log an error has its SQLSTATE in front. Refusals are PT and three digits; what kills bring is known.
LOG = "log_line_prefix = '%e '\n"
KNOWN = re.compile(r"(PT\d{3}|57P0[1-3]|53300|08006|08P01|57014|00000) ")


class Clock:
    """Stripe's time, and the engine's by its function: it runs fast, and can be set on."""

    def __init__(self, speed: int) -> None:
        self.speed, self.began, self.offset = speed, time.time(), 0.0

    def now(self) -> float:
        """Seconds since 1970."""
        return self.began + (time.time() - self.began) * self.speed + self.offset

    def slow_down(self) -> None:
        """From now on a second lasts a second."""
        now, self.began = self.now(), time.time()
        self.offset, self.speed = now - self.began, 1

    def moment(self) -> str:
        """The same in SQL."""
        return (
            f"to_timestamp({self.began} + (extract(epoch from clock_timestamp())::float8 - {self.began})"
            f" * {self.speed} + {self.offset})"
        )

    def function(self) -> str:
        """credits.now(), which says it."""
        body = f"select {self.moment()}"
        return f"create or replace function credits.now() returns timestamptz language sql as $$ {body} $$"


class Server:
    """A PostgreSQL of its own, which is killed and started again on the same port."""

    def __init__(self, base: Path, clock: Clock) -> None:
        self._base, self._clock = base, clock
        self._started = [embedded.start(base, conf=CONF + CONF_18 + LOG, initdb=INITDB_18)]
        self.dsn = self._started[0].dsn
        self._port = int(conninfo_to_dict(self.dsn)["port"] or 0)
        self._admin_dsn = make_conninfo(self._started[0].admin_dsn, dbname=conninfo_to_dict(self.dsn)["dbname"])
        migrate.migrate(self.dsn)
        embedded.let_it_act_for_callers(self.dsn)
        self.set_on(0)

    def query(self, text: str, *parameters: Any) -> list[Any]:
        """Rows of a query that the superuser makes."""
        with psycopg.connect(self._admin_dsn, autocommit=True, row_factory=namedtuple_row, connect_timeout=30) as conn:
            cursor = conn.execute(text.encode(), parameters or None)
            return cursor.fetchall() if cursor.description is not None else []  # there may be rows of no column

    def set_on(self, seconds: float) -> None:
        """Let time pass at once."""
        self._clock.offset += seconds
        self.query(self._clock.function())

    def deploy(self) -> None:
        """Deploy the same version again, with this clock."""
        copy = self._base.with_suffix(".deploy")
        if not copy.exists():
            shutil.copytree(migrate.HOME / "migrations", copy / "migrations")
            shutil.copytree(migrate.HOME / "sql", copy / "sql")
            clock = copy / "sql" / "00_clock_and_errors.sql"
            clock.write_text(clock.read_text().replace("select clock_timestamp()", f"select {self._clock.moment()}", 1))
        migrate.migrate(make_conninfo(self.dsn, application_name="deploy"), copy)

    def errors(self) -> list[str]:
        """What its log tells that nobody expected."""
        lines = (self._started[-1].data / "server.log").read_text(errors="replace").splitlines()
        return [
            line for line in lines if re.match(r"\w{5} (ERROR|FATAL|PANIC): ", line) and not KNOWN.match(line)
        ]  # fmt: skip

    def end_sessions(self, luck: Random) -> int:
        """End some sessions, as an operator would."""
        pids = [row.pid for row in self.query(SESSIONS)]
        for pid in (some := luck.sample(pids, min(len(pids), luck.randint(1, 4)))):
            self.query("select pg_terminate_backend(%s)", pid)
        return len(some)

    def kill_session(self, luck: Random) -> int:
        """Kill the process of a session: the server ends all the others, and recovers."""
        pids = [row.pid for row in self.query(SESSIONS)]
        for pid in (some := luck.sample(pids, min(len(pids), 1))):
            os.kill(pid, signal.SIGKILL)
        return len(some)

    def kill(self, _: Random) -> int:
        """Kill the server itself, and start it again."""
        os.kill(int((self._started[-1].data / "postmaster.pid").read_text().split()[0]), signal.SIGKILL)
        until(self._start, 60)
        return 1

    def _start(self) -> bool:
        with suppress(embedded.EmbeddedError):  # while processes of the old one are still there
            self._started.append(embedded.start(self._base, port=self._port))
            return True
        return False

    def close(self) -> None:
        """Stop it, and remove its data."""
        for one in self._started:
            one.stop()
        shutil.rmtree(self._base, ignore_errors=True)
        shutil.rmtree(self._base.with_suffix(".deploy"), ignore_errors=True)


# Opens doors by fork, so that one is there within milliseconds. Nobody waits for those that are killed.
NURSERY = """
import logging, os, signal, sys
import uvicorn
from pgcredits import notifier, outbox, ticker
from pgcredits.app import create_app
from pgcredits.settings import Settings
signal.signal(signal.SIGCHLD, signal.SIG_IGN)
outbox.POLL, outbox.TROUBLE, ticker.POLL, notifier.PATIENCE = 0.1, 0.3, 0.5, 0.5
for line in sys.stdin:
    if child := os.fork():
        print(child, flush=True)
    else:
        os.close(0)
        app = create_app(Settings.from_environment())
        uvicorn.run(app, port=int(line), log_config=None, timeout_graceful_shutdown=3)
        os._exit(0)
"""


class Doors:
    """Two doors with their workers and tickers, each on a port of its own."""

    def __init__(self, dsn: str, stripe: str, jwt_secret: str, log: Path) -> None:
        environment = {
            "PGCREDITS_DSN": dsn, "PGCREDITS_JWT_SECRET": jwt_secret, "PGCREDITS_JWT_AUDIENCE": "credits",
            "PGCREDITS_POOL_TIMEOUT": "2", "PGCREDITS_STRIPE_WAIT": "2",
            "PGCREDITS_NOTIFY_SECRET": NOTIFY_SECRET,
            "STRIPE_API_BASE": stripe, "STRIPE_SECRET_KEY": KEY, "STRIPE_WEBHOOK_SECRET": SECRET,
        }  # fmt: skip
        with log.open("w") as said:
            self._nursery = subprocess.Popen(
                [sys.executable, "-c", NURSERY], env={**os.environ, **environment}, text=True,
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=said,
            )  # fmt: skip
        self.ports = []
        for _ in range(2):
            with socket.create_server(("127.0.0.1", 0)) as probe:
                self.ports.append(probe.getsockname()[1])
        self._pids = [self._open(port) for port in self.ports]

    def _open(self, port: int) -> int:
        assert self._nursery.stdin
        assert self._nursery.stdout
        self._nursery.stdin.write(f"{port}\n")
        self._nursery.stdin.flush()
        return int(self._nursery.stdout.readline())

    def kill(self, luck: Random) -> int:
        """Kill one, and open it again."""
        number = luck.randrange(2)
        os.kill(self._pids[number], signal.SIGKILL)
        time.sleep(0.05)
        self._pids[number] = self._open(self.ports[number])
        return 1

    def close(self) -> None:
        """Close them in order."""
        for pid in self._pids:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGTERM)
        self._nursery.communicate()


class Street(World):
    """What people and banks do at Stripe, by chance, at the time of the clock."""

    def __init__(self, clock: Clock, luck: Random, shape: Shape) -> None:
        self.clock, self.luck = clock, luck
        self.slow: list[str] = []  # sessions whose payment takes days
        self.top_ups: list[str] = []  # payments of top-ups that are on their way
        self._page: str | None = None  # the session that somebody is at
        super().__init__(shape, chatty=True, offers=OFFERS)

    @property
    def now(self) -> int:
        """The clock's second; a story that would turn it does not."""
        return int(self.clock.now())

    @now.setter
    def now(self, at: int) -> None:
        pass

    def wait(self, **time: float) -> None:
        """Time passes by itself."""

    def named(self, kind: str, **facts: Any) -> list[str]:
        """Objects of a kind that have these facts."""
        return [
            name for name, one in self.facts.items()
            if one["object"] == kind and all(one.get(fact) == value for fact, value in facts.items())
        ]  # fmt: skip

    def paid(self) -> list[str]:
        """What was paid: sessions, invoices, top-ups."""
        return [
            *self.named("checkout.session", payment_status="paid", mode="payment"),
            *(name for name in self.named("invoice", status="paid") if self.facts[name]["payment_intent"]),
            *(name for name in self.named("payment_intent", status="succeeded")
              if "top_up_id" in self.facts[name]["metadata"]),
        ]  # fmt: skip

    def charge_of(self, paid: str) -> Json:
        """The charge of a session, an invoice or a payment."""
        intent = paid if paid.startswith("pi_") else self.facts[paid]["payment_intent"]
        return self.facts[self.facts[intent]["latest_charge"]]

    def given_back(self, paid: str) -> tuple[int, int]:
        """How much of it was refunded, and lost in disputes."""
        charge = self.charge_of(paid)["id"]
        refunds = self.named("refund", charge=charge, status="succeeded")
        lost = self.named("dispute", charge=charge, status="lost")
        return sum(self.facts[name]["amount"] for name in refunds), sum(self.facts[name]["amount"] for name in lost)

    # What is asked by the API ----------------------------------------------------------------------------------------

    def checkout(self, params: Json) -> Json:
        """A page to pay at."""
        (item,) = params["line_items"]
        account = params["client_reference_id"]
        about: Json = {"url": "https://pay.example.com", "expires_at": self.now + 86400}
        if params["mode"] == "payment":
            total = int(item["price_data"]["unit_amount"]) * int(item["quantity"])
            about |= {"amount_subtotal": total, "amount_total": total}
        else:
            about |= {"price": item["price"].removeprefix("price_")}
        customer = params.get("customer") or self.customer(account)
        session = self._session(account, customer, params["mode"], **about)
        self.facts[session]["metadata"] = params["metadata"]
        return self.show(session)

    def _session(self, account: str, customer: str, mode: str, *, named: bool = True, **facts: Any) -> str:
        return self._page or super()._session(account, customer, mode, named=named, **facts)

    def live(self, customer: str) -> list[str]:
        """The subscriptions of a customer that have not ended."""
        return [
            name for name in self.named("subscription", customer=customer) if self.facts[name]["status"] != "canceled"
        ]  # fmt: skip

    def portal(self, params: Json) -> Json:
        """A page to look at."""
        return {
            "id": self.new("bps"), "object": "billing_portal.session", "created": self.now, "livemode": False,
            "customer": params["customer"], "return_url": params["return_url"], "url": "https://pay.example.com/portal",
        }  # fmt: skip

    def change_subscription(self, name: str, params: Json) -> tuple[int, Json]:
        """Another price, at once and paid; or an end that is announced, or not any more."""
        known = self.facts[name]
        if known["status"] == "canceled" or ("cancel_at_period_end" in params and known["schedule"]):
            return error(400, "invalid_request_error", message="This cannot be done with this subscription.")
        if "items" in params:
            (item,) = params["items"]
            if known["status"] != "active" or self.luck.random() < 0.1:
                return 402, {"error": DECLINED}
            if known["end"] <= self.now:
                self.renew(name)
            self.change(name, item["price"].removeprefix("price_"))
        elif params["cancel_at_period_end"] == "true":
            self.announce_end(name)
        else:
            self.uncancel(name)
        return 200, self.show(name)

    def end_subscription(self, name: str) -> tuple[int, Json]:
        """It ends now."""
        if self.facts[name]["status"] == "canceled":
            return error(404, "invalid_request_error", code="resource_missing", message="No such subscription.")
        self._release(name)
        self.cancel(name)
        return 200, self.show(name)

    def make_schedule(self, _: str, params: Json) -> tuple[int, Json]:
        """A schedule of what a subscription is."""
        known = self.facts[name := params["from_subscription"]]
        if known["schedule"] or known["status"] == "canceled" or known["cancel_at_period_end"]:
            return error(400, "invalid_request_error", message="This subscription cannot have a schedule.")
        current = known["items"][0]["price"]
        schedule = self.put(
            "subscription_schedule", self.new("sub_sched"), "subscription_schedule.created",
            subscription=name, customer=known["customer"], status="active", metadata={}, end_behavior="release",
            current_phase={"start_date": known["start"], "end_date": known["end"]},
            phases=[{"start_date": known["start"], "end_date": known["end"], "items": [{"price": current}]}],
        )  # fmt: skip
        self._update(name, schedule=schedule, scheduled=current)
        return 200, self.show(schedule)

    def change_schedule(self, schedule: str, params: Json) -> tuple[int, Json]:
        """What comes after its present phase."""
        known = self.facts[schedule]
        if known["status"] != "active":
            return error(400, "invalid_request_error", message="The schedule is over.")
        every = self.facts[known["subscription"]]["every"]
        (present, following) = params["phases"]
        if int(present["start_date"]) != known["phases"][0]["start_date"]:
            return error(400, "invalid_request_error", message="The present phase cannot be changed.")
        start = int(present["end_date"])
        phases = [
            {"start_date": int(present["start_date"]), "end_date": start, "items": present["items"]},
            {"start_date": start, "end_date": later(start, every), "items": following["items"]},
        ]
        self.put("subscription_schedule", schedule, "subscription_schedule.updated", phases=phases)
        self._update(known["subscription"], scheduled=following["items"][0]["price"])
        return 200, self.show(schedule)

    def release_schedule(self, schedule: str) -> tuple[int, Json]:
        """The subscription stays as it is."""
        known = self.facts[schedule]
        if known["status"] != "active":
            return error(400, "invalid_request_error", message="The schedule is over.")
        self._release(known["subscription"])
        return 200, self.show(schedule)

    def _release(self, subscription: str) -> None:
        if schedule := self.facts[subscription]["schedule"]:
            ended = {"status": "released", "current_phase": None, "released_subscription": subscription}
            self.put("subscription_schedule", schedule, "subscription_schedule.released", **ended)
            self._update(subscription, schedule=None)

    def make_customer(self, params: Json) -> Json:
        """A customer without a card."""
        return self.show(self.customer(params["metadata"]["account_id"], named=True))

    def card(self, account: str) -> None:
        """A customer with a card to charge."""
        card = {"default_payment_method": "pm_1"}
        self.put("customer", self.customer(account, named=True), "customer.updated", invoice_settings=card)

    def charge_card(self, params: Json) -> tuple[int, Json]:
        """A top-up: paid, declined, or neither yet."""
        intent = self.put(
            "payment_intent", self.new("pi"), "payment_intent.created", amount=int(params["amount"]), currency="usd",
            customer=params["customer"], status="processing", latest_charge=None, invoice=None, amount_received=0,
            metadata=params["metadata"],
        )  # fmt: skip
        if (how := self.luck.random()) < 0.02:
            self.decline(intent)
            return 402, {"error": {**DECLINED, "payment_intent": self.show(intent)}}
        if how < 0.2:
            self.put("payment_intent", intent, "payment_intent.processing")
            self.top_ups.append(intent)
        else:
            self.succeed(intent)
        return 200, self.show(intent)

    def decline(self, intent: str) -> None:
        """The card is declined."""
        self.put("payment_intent", intent, "payment_intent.payment_failed",
                 status="requires_payment_method", last_payment_error=DECLINED)  # fmt: skip

    def succeed(self, intent: str) -> None:
        """The payment of a top-up arrives."""
        known = self.facts[intent]
        known["amount_received"] = known["amount"]
        self._charge(known["customer"], known["amount"], intent=intent)

    def give_back(self, params: Json) -> tuple[int, Json]:
        """A refund, of what is left and is not disputed."""
        charge, amount = self.charge_of(params["payment_intent"]), int(params["amount"])
        if charge["disputed"] or charge["amount_refunded"] + amount > charge["amount"]:
            return error(400, "invalid_request_error", code="charge_already_refunded")
        refund = self.refund(params["payment_intent"], amount)
        self.put("refund", refund, "refund.updated", metadata=params["metadata"])
        return 200, self.show(refund)

    # What happens ----------------------------------------------------------------------------------------------------

    def go_on(self, accounts: list[str]) -> None:
        """What was begun goes on, and something new happens."""
        for name in self.named("checkout.session", status="open"):
            if self.luck.random() < 0.3:
                (self.visit if self.facts[name]["mode"] == "payment" else self.join)(name)
        for waiting, arrive, fail in (
            (self.slow, self.arrive, self.fail_late), (self.top_ups, self.succeed, self.decline),
        ):  # fmt: skip
            for name in [name for name in waiting if self.luck.random() < 0.1]:
                waiting.remove(name)
                (arrive if self.luck.random() < 0.7 else fail)(name)
        for name in self.named("subscription", status="active"):
            if self.facts[name]["end"] <= self.now:
                if self.facts[name]["cancel_at_period_end"]:
                    self.finish(name)
                else:
                    self.renew(name, paid=self.luck.random() < 0.8)
        for name in self.named("subscription", status="past_due"):
            if self.luck.random() < 0.2:
                self.pay(self.facts[name]["latest_invoice"])
        happens: list[Callable[[], Any]] = [
            *[lambda: self.buy(self.luck.choice(accounts))] * 6,
            lambda: self.slow.append(self.buy(self.luck.choice(accounts), paid=False)),
            *[self.refund_some] * 2, self.fail_some_refund, self.dispute_some, self.close_some, self.change_some,
        ]  # fmt: skip
        self.luck.choice(happens)()

    def change_some(self) -> None:
        """Somebody changes his subscription in the portal."""
        names = [name for name in self.named("subscription", status="active") if self.facts[name]["end"] > self.now]
        if names:
            known, how = self.facts[name := self.luck.choice(names)], self.luck.random()
            if known["schedule"]:
                self._release(name)
            elif how < 0.4:
                self.change(name, quantity=self.luck.randint(1, 3))
            elif how < 0.9:
                (self.uncancel if known["cancel_at_period_end"] else self.announce_end)(name)
            else:
                self.cancel(name)

    def announce_end(self, subscription: str) -> None:
        """It ends with its period."""
        self.cancel(subscription, at_period_end=True)

    def join(self, session: str) -> None:
        """Somebody subscribes, unless he has done so; or lets it expire."""
        known = self.facts[session]
        if self.live(known["customer"]) or self.luck.random() < 0.1:
            self.put("checkout.session", session, "checkout.session.expired", status="expired")
            return
        self._page = session
        self.subscribe(known["client_reference_id"], known["price"])
        self._page = None

    def visit(self, session: str) -> None:
        """Somebody pays, at once or by a method that takes days, or lets it expire."""
        known, how = self.facts[session], self.luck.random()
        if how < 0.1:
            self.put("checkout.session", session, "checkout.session.expired", status="expired")
            return
        slow, total = how < 0.3, known["amount_total"]
        intent = (
            self._intent(known["customer"], total) if slow else self._charge(known["customer"], total)["payment_intent"]
        )
        self.slow += [session] if slow else []
        self.put("checkout.session", session, "checkout.session.completed", status="complete",
                 payment_status="unpaid" if slow else "paid", payment_intent=intent)  # fmt: skip

    def arrive(self, session: str) -> None:
        """The slow payment of a session arrives."""
        known = self.facts[session]
        self._charge(known["customer"], known["amount_total"], intent=known["payment_intent"])
        self.put("checkout.session", session, "checkout.session.async_payment_succeeded", payment_status="paid")

    def refund_some(self) -> None:
        """Money goes back, by somebody's hand."""
        undisputed = [name for name in self.paid() if not self.charge_of(name)["disputed"]]
        if undisputed:
            charge = self.charge_of(name := self.luck.choice(undisputed))
            if left := charge["amount"] - charge["amount_refunded"]:
                self.refund(name, max(1, left * self.luck.randint(1, 4) // 4))

    def fail_some_refund(self) -> None:
        """Money that was to go back does not."""
        if made := self.named("refund", status="succeeded"):
            self.fail_refund(self.luck.choice(made))

    def dispute_some(self) -> None:
        """A cardholder wants his money back."""
        if undisputed := [name for name in self.paid() if not self.charge_of(name)["disputed"]]:
            self.dispute(self.luck.choice(undisputed))

    def close_some(self) -> None:
        """A bank decides."""
        if disputes := self.named("dispute", status="needs_response"):
            self.close(self.luck.choice(disputes), self.luck.choice(["won", "lost"]))

    def settle_down(self) -> None:
        """Whatever is open comes to its end."""
        for name in self.named("checkout.session", status="open"):
            self.put("checkout.session", name, "checkout.session.expired", status="expired")
        for name in self.slow:
            self.arrive(name)
        for name in self.top_ups:
            self.succeed(name)
        for name in self.named("subscription", status="past_due"):
            self.pay(self.facts[name]["latest_invoice"])
        while self.named("dispute", status="needs_response"):
            self.close_some()


class Bank(StripeFake):
    """Stripe's API over what is in the street."""

    def __init__(self, street: Street) -> None:
        super().__init__(clock=street.clock.now, hang=3.0)
        self.street = street
        self.tells: Callable[[list[Event]], None] = lambda _: None
        self.odd: list[str] = []
        self._lock = threading.Lock()

    def happen(self, what: Callable[[], Any]) -> Any:
        """Something happens at Stripe, and is told."""
        with self._lock:
            result = what()
            events, self.street.acts = self.street.events, [Act()]
        self.tells(events)
        return result

    def _execute(self, call: Call) -> tuple[int, Json]:
        try:
            answer: tuple[int, Json] = self.happen(lambda: self._do(call))
        except Exception:
            self.odd.append(f"{call}: {traceback.format_exc()}")
            raise
        return answer

    def _do(self, call: Call) -> tuple[int, Json]:
        street, params = self.street, call.params
        if call.method == "GET":
            since = {name: int(value) for name, value in params.get("created", {}).items()}
            return street.get(call.path, {**params, "created": since}, street.now)
        collection, name, *action = re.sub("^/v1/(checkout/|billing_portal/)?", "", call.path + "/").split("/")[:3]
        does: dict[str, Callable[[], tuple[int, Json]]] = {
            "POST customers": lambda: (200, street.make_customer(params)),
            "POST sessions": lambda: (200, street.checkout(params) if "mode" in params else street.portal(params)),
            "POST payment_intents": lambda: street.charge_card(params),
            "POST refunds": lambda: street.give_back(params),
            "POST subscriptions": lambda: street.change_subscription(name, params),
            "DELETE subscriptions": lambda: street.end_subscription(name),
            "POST subscription_schedules":
                lambda: (street.change_schedule if name else street.make_schedule)(name, params),
            "POST subscription_schedules release": lambda: street.release_schedule(name),
        }  # fmt: skip
        unknown = error(404, "invalid_request_error", message="Unrecognized request URL")
        return does.get(" ".join(filter(None, [call.method, collection, *action])), lambda: unknown)()


class Post:
    """Brings events to the doors."""

    def __init__(self, ports: list[int], luck: Random) -> None:
        self._ports, self._luck = ports, luck
        self.calm = True
        self.told: set[str] = set()
        self.answers: Counter[int] = Counter()
        self._due: list[tuple[float, int, Event]] = []  # when, how often before, what
        self._carried = 0
        self._over = threading.Event()
        self._lock = threading.Lock()
        self._threads = [threading.Thread(target=self._carry) for _ in range(4)]
        for thread in self._threads:
            thread.start()

    def take(self, events: list[Event]) -> None:
        """Each will be brought, some later than others, some twice."""
        with self._lock:
            for event in events:
                self.told.add(event.event_id)
                for _ in range(2 if self._luck.random() < 0.2 else 1):
                    longest = 0.1 if self.calm else 3 if self._luck.random() < 0.1 else 0.4
                    self._due.append((time.monotonic() + self._luck.random() * longest, 0, event))

    def left(self) -> int:
        """How many are still to be brought."""
        with self._lock:
            return len(self._due) + self._carried

    def _next(self) -> tuple[float, int, Event] | None:
        with self._lock:
            ready = [one for one in self._due if one[0] <= time.monotonic()]
            if not ready:
                return None
            self._due.remove(one := self._luck.choice(ready))
            self._carried += 1
            return one

    def _carry(self) -> None:
        with httpx.Client() as http:
            while not self._over.is_set():
                if not (one := self._next()):
                    time.sleep(0.02)
                    continue
                _, times, event = one
                status = self._bring(http, event.payload.encode())
                with self._lock:
                    self.answers[status] += 1
                    self._carried -= 1
                    if not 200 <= status < 300:
                        self._due.append((time.monotonic() + min(2, 0.2 * 2**times), times + 1, event))

    def _bring(self, http: httpx.Client, body: bytes) -> int:
        """The status that came, 0 if none did. Some do not wait for it."""
        hasty = not self.calm and self._luck.random() < 0.05
        address = f"http://127.0.0.1:{self._luck.choice(self._ports)}/webhooks/stripe/default"
        signed = {"Stripe-Signature": signature(body)}
        try:
            return http.post(address, content=body, headers=signed, timeout=0.02 if hasty else 10).status_code
        except httpx.HTTPError:
            return 0

    def close(self) -> None:
        """No more post."""
        self._over.set()
        for thread in self._threads:
            thread.join()


class Receiver(ThreadingHTTPServer):
    """Hears notifications. It refuses some, and answers others too late."""

    daemon_threads = True

    def __init__(self, luck: Random) -> None:
        super().__init__(("127.0.0.1", 0), Hearing)
        self.luck, self.calm = luck, False
        self.heard: defaultdict[str, set[str]] = defaultdict(set)  # bodies by id
        self.odd: list[str] = []
        self.url = f"http://127.0.0.1:{self.server_address[1]}/notifications"
        self._thread = threading.Thread(target=self.serve_forever)
        self._thread.start()

    def close(self) -> None:
        """Hear no more."""
        self.shutdown()
        self._thread.join()
        self.server_close()


class Hearing(BaseHTTPRequestHandler):
    """One notification."""

    server: Receiver

    def do_POST(self) -> None:
        body, hears = self.rfile.read(int(self.headers["content-length"])).decode(), self.server
        how = 1.0 if hears.calm else hears.luck.random()
        if how < 0.1 or len(body.encode()) < int(self.headers["content-length"]):  # not heard at all, or not to its end
            return
        if how < 0.25:
            self.send_error(503)
            return
        try:
            Webhook(NOTIFY_SECRET).verify(body, dict(self.headers))
        except Exception as error:  # noqa: BLE001 - whatever it is, it is told
            hears.odd.append(f"{error}: {self.headers} {body}")
        hears.heard[self.headers["webhook-id"]].add(body)
        if how < 0.35:
            time.sleep(0.7)
        with suppress(OSError):
            self.send_response(204)
            self.end_headers()

    def log_message(self, *_: Any) -> None:
        """Say nothing."""
