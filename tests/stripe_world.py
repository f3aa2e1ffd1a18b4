"""Stripe's side, as far as tests need it: objects that change, and events that tell of it, in either shape of the API.

A story plays on a World by its verbs: buy, subscribe, renew, change, refund. Each writes facts down, shows them in the
world's shape and tells of them by events. Time passes only where a verb says so, hence several events share a second.
"""

import json
from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from typing import Any, Literal

from ledger_support import DAY, Ledger

Json = dict[str, Any]
Shape = Literal["old", "new"]

VERSIONS: dict[Shape, str] = {"old": "2024-06-20", "new": "2026-10-28.endive"}
START = datetime(2030, 1, 31, 12, tzinfo=UTC)  # months from here end on the 28th, 31st, 30th
MONTHS = {"month": 1, "year": 12}
DAYS = {"day": 1, "week": 7}


@dataclass(frozen=True)
class Offer:
    """A price and its product: what one unit costs in cents, how often, and what their metadata say of credits."""

    amount: int
    every: tuple[int, str] | None = (1, "month")
    price: dict[str, str] = field(default_factory=dict)
    product: dict[str, str] = field(default_factory=dict)
    metered: bool = False


CATALOGUE = {
    "basic": Offer(1000, price={"credits": "1000"}),
    "pro": Offer(3000, price={"trial_credits": "200"}, product={"includedCredits": "3000"}),
    "seat": Offer(500),  # 100 credits each, which only the plan says
    "week": Offer(400, (1, "week"), price={"credits": "250.5"}),
    "quarter": Offer(2700, (3, "month"), price={"credits": "1000"}),
    "year": Offer(10000, (1, "year"), price={"monthly_credits": "1000"}),
    "large_year": Offer(30000, (1, "year"), price={"monthly_credits": "3000"}),
    "free": Offer(0, price={"credits_included": "50"}),
    "calls": Offer(2, metered=True, price={"credits": "7"}),
    "setup": Offer(5000, None, price={"credits": "500"}),
    "odd": Offer(1000, price={"credits": "1,000"}),
}

REFERENCES = {"customer", "charge", "payment_intent", "subscription", "invoice", "latest_charge", "product"}

RESOURCES = {
    "customer": "customers", "product": "products", "price": "prices", "subscription": "subscriptions",
    "invoice": "invoices", "charge": "charges", "refund": "refunds", "dispute": "disputes",
    "payment_intent": "payment_intents", "checkout.session": "checkout/sessions", "invoice_payment": "invoice_payments",
    "subscription_schedule": "subscription_schedules",
}  # fmt: skip

LISTS = {"/v1/checkout/sessions": "checkout.session", "/v1/invoices": "invoice", "/v1/refunds": "refund"}

GOSSIP = {  # what a quiet world does not tell: it repeats other events, or SQL can ask
    "customer.created", "invoice.created", "invoice.finalized", "invoice.payment_succeeded",
    "payment_intent.succeeded", "payment_intent.processing", "payment_intent.payment_failed",
    "charge.succeeded", "charge.updated", "refund.updated", "charge.refund.updated",
    "charge.dispute.funds_withdrawn", "charge.dispute.funds_reinstated",
    "subscription_schedule.created", "subscription_schedule.completed",
}  # fmt: skip


@dataclass(frozen=True)
class Event:
    """What Stripe would post."""

    event_id: str
    type: str
    created: int
    payload: str


def thin(event: Event) -> Event:
    """The same, told by an event of v2: it names its object and does not hold it."""
    about = json.loads(event.payload)["data"]["object"]
    notice: Json = {
        "id": f"{event.event_id}_thin", "object": "v2.core.event", "type": f"v1.{event.type}", "livemode": False,
        "created": datetime.fromtimestamp(event.created, UTC).isoformat(timespec="milliseconds"),
        "related_object": {"id": about["id"], "type": about["object"], "url": f"/v1/objects/{about['id']}"},
    }  # fmt: skip
    return Event(notice["id"], event.type, event.created, json.dumps(notice))


@dataclass
class Act:
    """Events that may come in any order. What ends the act happens when all of them have come."""

    events: list[Event] = field(default_factory=list)
    spend: tuple[str, int] | None = None


def later(start: int, every: tuple[int, str], times: int = 1) -> int:
    """So many intervals after start: the same day and hour, or the last day of that month."""
    count, unit = every
    if unit in DAYS:
        return start + times * count * DAYS[unit] * 86400
    day = datetime.fromtimestamp(start, UTC)
    month = day.month - 1 + times * count * MONTHS[unit]
    first = day.replace(year=day.year + month // 12, month=month % 12 + 1, day=1)
    last = (first.replace(day=28) + 4 * DAY).replace(day=1) - DAY
    return int(first.replace(day=min(day.day, last.day)).timestamp())


def difference(before: Any, after: Any) -> Any:
    """previous_attributes: what differed before, down to the names that changed; null for what was not there."""
    if not (isinstance(before, dict) and isinstance(after, dict)):
        return before
    names = [name for name in {**before, **after} if before.get(name) != after.get(name)]
    return {name: difference(before.get(name), after.get(name)) for name in names}


def listed(one: Json, params: Json) -> bool:
    """Whether an object is in a list that is narrowed by its status and the second in which it was made."""
    return one.get("status") == params.get("status", one.get("status")) and one["created"] >= params["created"]["gte"]


class Objects:
    """What Stripe knows, how it shows it in one shape of the API, and to whom it tells it."""

    def __init__(self, shape: Shape, *, chatty: bool, expanded: bool) -> None:
        self.shape, self.expanded = shape, expanded
        self.payments_apart = shape == "new"  # they are no longer a part of their invoice
        self.untold = set() if chatty else {*GOSSIP}
        self.now = int(START.timestamp())
        self.page = 10  # elements of a list that are shown at once
        self.account: str | None = None  # the connected account in which all of it is; it is unknown elsewhere
        self.acts = [Act()]
        self.facts: dict[str, Json] = {}
        self.versions: defaultdict[str, list[tuple[int, Json]]] = defaultdict(list)
        self.numbers: Counter[str] = Counter()

    def new(self, prefix: str) -> str:
        """An id that was not used before."""
        self.numbers[prefix] += 1
        return f"{prefix}_{self.numbers[prefix]}"

    def put(self, kind: str, object_id: str, *types: str, **facts: Any) -> str:
        """Make or change an object, and tell of it by an event of each type."""
        known = self.facts.get(object_id) or {"id": object_id, "object": kind, "created": self.now, "livemode": False}
        self.facts[object_id] = {**known, **facts}
        before = self.versions[object_id][-1][1] if self.versions[object_id] else {}
        after = self.show(object_id, expand=self.expanded)
        self.versions[object_id].append((self.now, after))
        for event_type in types:
            self.tell(event_type, after, before)
        return object_id

    def tell(self, event_type: str, after: Json, before: Json) -> None:
        """An event about an object, unless nobody is told of such."""
        if event_type in self.untold:
            return
        previous = {"previous_attributes": difference(before, after)} if event_type.endswith(".updated") else {}
        event_id = self.new("evt")
        event = {
            "id": event_id, "object": "event", "type": event_type, "created": self.now, "livemode": False,
            "api_version": VERSIONS[self.shape], "pending_webhooks": 1,
            "request": {"id": None, "idempotency_key": None}, "data": {"object": after, **previous},
            **({"account": self.account} if self.account else {}),
        }  # fmt: skip
        self.acts[-1].events.append(Event(event_id, event_type, self.now, json.dumps(event)))

    # Shapes ----------------------------------------------------------------------------------------------------------

    def show(self, object_id: str, *, expand: bool = False) -> Json:
        """An object as Stripe shows it now; expanded, its references are objects."""
        facts = self.facts[object_id]
        kind = facts["object"]
        if kind == "subscription":
            return self._show_subscription(facts, expand=expand)
        if kind == "invoice":
            return self._show_invoice(facts, expand=expand)
        moved = {"invoice"} if self.shape == "new" and kind in {"charge", "payment_intent"} else set()
        return {
            name: self._ref(value, expand=expand) if name in REFERENCES else value
            for name, value in facts.items()
            if name not in moved
        }

    def _ref(self, object_id: str | None, *, expand: bool) -> Any:
        return self.show(object_id) if expand and object_id else object_id

    def _show_subscription(self, facts: Json, *, expand: bool) -> Json:
        ours = {"items", "every", "cycle", "start", "end", "scheduled", "pending"}
        shown: Json = {name: value for name, value in facts.items() if name not in ours}
        period = {"current_period_start": facts["start"], "current_period_end": facts["end"]}
        items = [
            {**item, "object": "subscription_item", "subscription": facts["id"], "created": facts["created"],
             "metadata": {}, "price": self.show(item["price"], expand=expand),
             **(period if self.shape == "new" else {})}
            for item in facts["items"]
        ]  # fmt: skip
        shown |= {
            "customer": self._ref(facts["customer"], expand=expand), "start_date": facts["created"],
            "trial_start": facts["created"] if facts["trial_end"] else None,
            "items": {"object": "list", "data": items, "has_more": False, "url": "/v1/subscription_items"},
        }  # fmt: skip
        if self.shape == "old":
            return shown | period
        why = {"paused": {"subscription": {"type": "pause_requested"}}} if facts["status"] == "paused" else {}
        return shown | {"billing_mode": {"type": "flexible"}, "status_details": why}

    def _show_invoice(self, facts: Json, *, expand: bool) -> Json:
        ours = {"subscription", "told", "lines", "payment_intent", "charge"}
        shown: Json = {name: value for name, value in facts.items() if name not in ours}
        shown |= {
            "customer": self._ref(facts["customer"], expand=expand),
            "amount_remaining": facts["amount_due"] - facts["amount_paid"],
            "lines": self.lines(facts["id"], {}, expand=expand),
        }
        if self.shape == "old":
            paid_by = {name: self._ref(facts[name], expand=expand) for name in ("payment_intent", "charge")}
            return shown | {
                "subscription": self._ref(facts["subscription"], expand=expand),
                "subscription_details": {"metadata": facts["told"]}, "paid": facts["status"] == "paid", **paid_by,
            }  # fmt: skip
        source = {"subscription": facts["subscription"], "metadata": facts["told"]}
        shown["parent"] = {"type": "subscription_details", "quote_details": None, "subscription_details": source}
        if expand and facts["payment_intent"]:
            payment = {
                "id": f"inpay_{facts['id']}", "object": "invoice_payment", "invoice": facts["id"], "status": "paid",
                "amount_paid": facts["amount_paid"], "currency": "usd",
                "payment": {"type": "payment_intent", "payment_intent": self.show(facts["payment_intent"])},
            }  # fmt: skip
            shown["payments"] = {"object": "list", "data": [payment], "has_more": False}
        return shown

    def _show_line(self, line: Json, subscription: str, *, expand: bool) -> Json:
        sold, price = self.facts[line["price"]], self.show(line["price"], expand=expand)
        shown = {
            "id": line["id"], "object": "line_item", "amount": line["amount"], "currency": "usd", "livemode": False,
            "quantity": line["quantity"], "period": {"start": line["start"], "end": line["end"]}, "metadata": {},
            "discount_amounts": [{"amount": line["discount"], "discount": "di_1"}] if line["discount"] else [],
        }  # fmt: skip
        credited = {"invoice": "in_before", "invoice_line_items": ["il_before"]} if line["back"] else None
        proration = {"proration": line["proration"], "proration_details": {"credited_items": credited}}
        if self.shape == "old":
            return shown | {
                "type": "invoiceitem" if line["extra"] else "subscription", "price": price,
                "subscription": subscription, **proration,
                **({"subscription_item": line["item"]} if line["item"] else {}),
            }  # fmt: skip
        kind = "invoice_item_details" if line["extra"] else "subscription_item_details"
        item = {"invoice_item": f"ii_{line['id']}"} if line["extra"] else {"subscription_item": line["item"]}
        return shown | {
            "subtotal": line["amount"], "quantity_decimal": str(line["quantity"]),
            "parent": {"type": kind, kind: {"subscription": subscription, **proration, **item}},
            "pricing": {
                "type": "price_details", "unit_amount_decimal": str(price["unit_amount"]),
                "price_details": {"price": price if expand else price["id"], "product": sold["product"]},
            },
        }  # fmt: skip

    # Answers ---------------------------------------------------------------------------------------------------------

    def page_of(self, elements: list[Json], url: str, params: Json) -> Json:
        """A list object: as much of a list as Stripe shows at once."""
        ids = [element["id"] for element in elements]
        first = ids.index(params["starting_after"]) + 1 if "starting_after" in params else 0
        shown = elements[first : first + min(self.page, int(params.get("limit", 10)))]
        return {"object": "list", "data": shown, "has_more": first + len(shown) < len(elements), "url": url}

    def lines(self, invoice: str, params: Json, *, expand: bool = False) -> Json:
        """The lines of an invoice."""
        facts = self.facts[invoice]
        shown = [self._show_line(line, facts["subscription"], expand=expand) for line in facts["lines"]]
        return self.page_of(shown, f"/v1/invoices/{invoice}/lines", params)

    def current(self, object_id: str, at: int) -> Json | None:
        """An object as it was at a second; nothing before it was made."""
        versions = self.versions.get(object_id, [])
        return next((shown for second, shown in reversed(versions) if second <= at), None)

    def get(self, path: str, params: Json, at: int, account: str | None = None) -> tuple[int, Json]:
        """The status and body that GET answers at a second, to whom asks in an account."""
        if account != self.account:
            return 404, {"error": {"type": "invalid_request_error", "code": "resource_missing", "message": account}}
        if path == "/v1/invoice_payments" and self.payments_apart:
            known = [self.current(name, at) for name in self.versions if name.startswith("inpay_")]
            intent = params["payment"]["payment_intent"]
            found = [one for one in known if one and one["payment"]["payment_intent"] == intent]
            return 200, self.page_of(found, path, params)
        if kind := LISTS.get(path):
            found = [
                one for name in reversed(self.versions) if (one := self.current(name, at)) and one["object"] == kind
            ]
            return 200, self.page_of([one for one in found if listed(one, params)], path, params)
        *_, parent, last = path.split("/")
        if last == "lines" and self.current(parent, at):
            return 200, self.lines(parent, params)
        shown = self.current(last, at)
        if shown and "expand" in params:
            shown = shown | {name: self.current(shown[name], at) for name in params["expand"] if shown[name]}
        if shown and path == f"/v1/{RESOURCES[shown['object']]}/{last}":
            return 200, shown
        return 404, {"error": {"type": "invalid_request_error", "code": "resource_missing", "message": path}}


class World(Objects):
    """What happens: accounts buy and subscribe, cards fail, money goes back."""

    def __init__(
        self,
        shape: Shape = "new",
        *,
        chatty: bool = False,
        expanded: bool = False,
        offers: Mapping[str, Offer] = CATALOGUE,
    ) -> None:
        super().__init__(shape, chatty=chatty, expanded=expanded)
        self.offers = {**offers}
        for name, offer in offers.items():
            count, unit = offer.every or (None, None)
            usage = "metered" if offer.metered else "licensed"
            self.put("product", f"prod_{name}", name=name, active=True, metadata=offer.product)
            self.put(
                "price", f"price_{name}", active=True, product=f"prod_{name}", metadata=offer.price, currency="usd",
                unit_amount=offer.amount, type="recurring" if unit else "one_time",
                recurring=unit and {"interval": unit, "interval_count": count, "usage_type": usage},
            )  # fmt: skip

    @property
    def moment(self) -> datetime:
        """What the world's clock shows."""
        return datetime.fromtimestamp(self.now, UTC)

    @property
    def events(self) -> list[Event]:
        """All that was told, in the order in which it happened."""
        return [event for act in self.acts for event in act.events]

    def wait(self, **time: float) -> None:
        """Let days, hours or seconds pass."""
        self.now += int(timedelta(**time).total_seconds())

    def meanwhile(self, spend: tuple[str, int] | None = None) -> None:
        """All told so far has come, wherever it was; then credits are spent, if any; and the story goes on."""
        self.acts[-1].spend = spend
        self.acts.append(Act())

    # Purchases -------------------------------------------------------------------------------------------------------

    def customer(self, account: str, *, named: bool = False) -> str:
        """The customer of an account; named if its metadata says whose it is."""
        customer = f"cus_{account}"
        if customer not in self.facts:
            metadata = {"account_id": account} if named else {}
            card = {"default_payment_method": None}
            self.put("customer", customer, "customer.created", metadata=metadata, invoice_settings=card, email=None)
        return customer

    def buy(self, account: str, *, customer: str | None = None, paid: bool = True) -> str:
        """A checkout of the starter package for $10.00, paid at once or by a method that takes days."""
        customer = customer or self.customer(account)
        session = self._session(account, customer, "payment", amount_subtotal=1000, amount_total=1000)
        intent = self._charge(customer, 1000)["payment_intent"] if paid else self._intent(customer, 1000)
        return self.put(
            "checkout.session", session, "checkout.session.completed",
            status="complete", payment_status="paid" if paid else "unpaid", payment_intent=intent,
        )  # fmt: skip

    def pay_late(self, session: str) -> None:
        """The slow payment of a checkout arrives."""
        self._charge(self.facts[session]["customer"], 1000, intent=self.facts[session]["payment_intent"])
        self.put("checkout.session", session, "checkout.session.async_payment_succeeded", payment_status="paid")

    def fail_late(self, session: str) -> None:
        """The slow payment of a checkout does not arrive."""
        intent = self.facts[session]["payment_intent"]
        self.put("payment_intent", intent, "payment_intent.payment_failed", status="requires_payment_method")
        self.put("checkout.session", session, "checkout.session.async_payment_failed")

    def abandon(self, account: str) -> str:
        """A checkout that nobody finishes within a day."""
        session = self._session(account, self.customer(account), "payment", amount_subtotal=1000, amount_total=1000)
        self.wait(days=1)
        return self.put("checkout.session", session, "checkout.session.expired", status="expired")

    def _session(self, account: str, customer: str, mode: str, *, named: bool = True, **facts: Any) -> str:
        metadata = {"account_id": account, **({"package": "starter"} if mode == "payment" else {})}
        return self.put(
            "checkout.session", self.new("cs"), mode=mode, status="open", payment_status="unpaid", currency="usd",
            customer=customer, client_reference_id=account, metadata=metadata if named else {},
            **{"payment_intent": None, "subscription": None, "invoice": None, **facts},
        )  # fmt: skip

    # Subscriptions ---------------------------------------------------------------------------------------------------

    def subscribe(
        self,
        account: str,
        *prices: str,
        quantity: int = 1,
        trial_days: int = 0,
        coupon: int = 0,
        named: Literal["everywhere", "session", "customer"] = "everywhere",
        paid: bool = True,
    ) -> str:
        """A new subscription. A one-time price is billed once; coupon is a percentage.

        A checkout of ours names the account everywhere, a payment link in the session alone; without a checkout only
        the customer names it.
        """
        customer = self.customer(account, named=named == "customer")
        recurring = [price for price in prices if self.offers[price].every]
        items = [self._item(price, quantity) for price in recurring]
        every = self.offers[recurring[0]].every or (1, "month")
        anchor = self.now + trial_days * 86400
        subscription = self.put(
            "subscription", self.new("sub"), "customer.subscription.created",
            customer=customer, status="trialing" if trial_days else "incomplete", items=items, every=every,
            cycle=-1 if trial_days else 0, billing_cycle_anchor=anchor, start=self.now,
            end=anchor if trial_days else later(anchor, every), trial_end=anchor if trial_days else None,
            cancel_at_period_end=False, cancel_at=None, canceled_at=None, ended_at=None, pause_collection=None,
            schedule=None, scheduled=None, latest_invoice=None, pending=[],
            metadata={"account_id": account} if named == "everywhere" else {},
        )  # fmt: skip
        once = [
            self._line({"id": None, "price": f"price_{price}", "quantity": 1}, self.now, self.now)
            for price in prices
            if price not in recurring
        ]
        invoice = self._bill(subscription, "subscription_create", [*self._cycle_lines(subscription), *once], coupon)
        if not paid:
            return subscription
        self.pay(invoice)
        if named != "customer":
            session = self._session(account, customer, "subscription", named=named == "everywhere")
            made = {"subscription": subscription, "invoice": invoice, "status": "complete", "payment_status": "paid"}
            self.put("checkout.session", session, "checkout.session.completed", **made)
        return subscription

    def _item(self, price: str, quantity: int) -> Json:
        item = {"id": self.new("si"), "price": f"price_{price}"}
        return item if self.offers[price].metered else {**item, "quantity": quantity}

    def first_invoice(self, subscription: str) -> str:
        """The invoice that a subscription began with."""
        return next(name for name, facts in self.facts.items() if facts.get("subscription") == subscription)

    def renew(self, subscription: str, *, paid: bool = True) -> str:
        """Go to the end of the period, begin the next one and bill it; an hour later it is paid or not.

        Answers the invoice, "" while collection is paused.
        """
        known = self.facts[subscription]
        self.now = known["end"]
        end = later(known["billing_cycle_anchor"], known["every"], known["cycle"] + 2)
        moved = {"start": known["end"], "end": end, "cycle": known["cycle"] + 1}
        if known["status"] == "trialing":
            moved["status"] = "active"
        if known["schedule"]:
            ended = {"status": "completed", "current_phase": None}
            self.put("subscription_schedule", known["schedule"], "subscription_schedule.completed", **ended)
            moved |= {
                "items": [{**known["items"][0], "price": known["scheduled"]}, *known["items"][1:]],
                "schedule": None,
            }
        self._update(subscription, **moved)
        if known["pause_collection"]:
            return ""
        invoice = self._bill(subscription, "subscription_cycle", [*known["pending"], *self._cycle_lines(subscription)])
        self.put("subscription", subscription, pending=[])
        self.wait(hours=1)
        (self.pay if paid else self.fail)(invoice)
        return invoice

    def change(
        self,
        subscription: str,
        price: str | None = None,
        *,
        quantity: int | None = None,
        bill: Literal["now", "apart", "next"] = "now",
        reset: bool = False,
    ) -> str:
        """Change the first item now: give back the rest of its period, take that time of the new one.

        Billed at once, apart from the items as what it is, or with the next invoice. With reset, or another interval, a
        whole new period begins. Answers the invoice, "" if there is none yet.
        """
        known = self.facts[subscription]
        old, *others = known["items"]
        item = old | ({"price": f"price_{price}"} if price else {}) | ({"quantity": quantity} if quantity else {})
        every = self.offers[item["price"].removeprefix("price_")].every
        left = (known["end"] - self.now) / (known["end"] - known["start"])
        back = self._line(old, self.now, known["end"], proration=True, share=-left)
        facts: Json = {"items": [item, *others]}
        if every and (reset or every != known["every"]):
            end = later(self.now, every)
            facts |= {"billing_cycle_anchor": self.now, "cycle": 0, "every": every, "start": self.now, "end": end}
            lines = [back, self._line(item, self.now, end, proration=not reset)]
        else:
            lines = [back, self._line(item, self.now, known["end"], proration=True, share=left)]
        if bill != "now":
            lines = [{**line, "extra": True} for line in lines]
        if bill == "next":
            self._update(subscription, **facts, pending=[*known["pending"], *lines])
            return ""
        self._update(subscription, **facts)
        invoice = self._bill(subscription, "subscription_update", lines)
        self.pay(invoice)
        return invoice

    def change_trial(self, subscription: str, *, quantity: int) -> None:
        """Change the quantity of a trial: an invoice of nothing tells of the rest of it."""
        item, *others = self.facts[subscription]["items"]
        self._update(subscription, items=[{**item, "quantity": quantity}, *others])
        (line, *_) = self._cycle_lines(subscription)
        self.pay(self._bill(subscription, "subscription_update", [{**line, "start": self.now}]))

    def schedule(self, subscription: str, price: str) -> None:
        """Change to another price when the period ends."""
        known = self.facts[subscription]
        phases = [
            {"start_date": start, "end_date": later(start, known["every"]), "items": [{"price": name, "quantity": 1}]}
            for start, name in ((known["start"], known["items"][0]["price"]), (known["end"], f"price_{price}"))
        ]
        schedule = self.put(
            "subscription_schedule", self.new("sub_sched"), "subscription_schedule.created",
            subscription=subscription, customer=known["customer"], status="active", phases=phases, metadata={},
            current_phase={"start_date": known["start"], "end_date": known["end"]}, end_behavior="release",
        )  # fmt: skip
        self._update(subscription, schedule=schedule, scheduled=f"price_{price}")

    def cancel(self, subscription: str, *, at_period_end: bool = False) -> None:
        """End it now, or announce that it ends with its period."""
        if at_period_end:
            end = self.facts[subscription]["end"]
            self._update(subscription, cancel_at_period_end=True, cancel_at=end, canceled_at=self.now)
        else:
            ended = {"status": "canceled", "canceled_at": self.now, "ended_at": self.now}
            self.put("subscription", subscription, "customer.subscription.deleted", **ended)

    def uncancel(self, subscription: str) -> None:
        """Take the announced end back."""
        self._update(subscription, cancel_at_period_end=False, cancel_at=None, canceled_at=None)

    def finish(self, subscription: str) -> None:
        """Go to the end of the period, where a subscription that was to end does so."""
        self.now = self.facts[subscription]["end"]
        self.put("subscription", subscription, "customer.subscription.deleted", status="canceled", ended_at=self.now)

    def move(self, subscription: str, status: str) -> None:
        """Another status, for reasons that are not told."""
        self._update(subscription, status=status)

    def pause_collection(self, subscription: str) -> None:
        """Stop to bill."""
        self._update(subscription, pause_collection={"behavior": "void", "resumes_at": None})

    def resume_collection(self, subscription: str) -> None:
        """Bill again, from the next period on."""
        self._update(subscription, pause_collection=None)

    def pause(self, subscription: str) -> None:
        """It sleeps: nothing is billed, its period stands."""
        self.put("subscription", subscription, "customer.subscription.paused", status="paused")

    def resume(self, subscription: str) -> str:
        """It wakes: a new period begins now and is paid. Answers the invoice."""
        end = later(self.now, self.facts[subscription]["every"])
        woken = {"billing_cycle_anchor": self.now, "cycle": 0, "start": self.now, "end": end, "status": "active"}
        self.put("subscription", subscription, "customer.subscription.resumed", **woken)
        invoice = self._bill(subscription, "subscription_cycle", self._cycle_lines(subscription))
        self.pay(invoice)
        return invoice

    def _update(self, subscription: str, **facts: Any) -> None:
        self.put("subscription", subscription, "customer.subscription.updated", **facts)

    # Invoices --------------------------------------------------------------------------------------------------------

    def _cycle_lines(self, subscription: str) -> list[Json]:
        """A line for each item: licensed ones of the period that begins, metered ones of what was used before."""
        known = self.facts[subscription]
        lines = []
        for item in known["items"]:
            if "quantity" in item:
                line = self._line(item, known["start"], known["end"])
                lines.append({**line, "amount": 0} if known["status"] == "trialing" else line)
            elif known["cycle"] > 0:
                before = later(known["billing_cycle_anchor"], known["every"], known["cycle"] - 1)
                lines.append(self._line({**item, "quantity": 250}, before, known["start"]))
        return lines

    def _line(self, item: Json, start: int, end: int, *, proration: bool = False, share: float = 1) -> Json:
        amount = round(self.facts[item["price"]]["unit_amount"] * item["quantity"] * share)
        return {
            "id": self.new("il"), "item": item["id"], "price": item["price"], "quantity": item["quantity"],
            "amount": amount, "proration": proration, "back": share < 0, "extra": not item["id"],
            "start": start, "end": end,
        }  # fmt: skip

    def _bill(self, subscription: str, reason: str, lines: list[Json], coupon: int = 0) -> str:
        known = self.facts[subscription]
        subtotal = sum(line["amount"] for line in lines)
        total = subtotal - subtotal * coupon // 100
        invoice = self.put(
            "invoice", self.new("in"), "invoice.created",
            status="draft", billing_reason=reason, customer=known["customer"], subscription=subscription,
            told=known["metadata"], lines=[{**line, "discount": line["amount"] * coupon // 100} for line in lines],
            subtotal=subtotal, total=total, amount_due=max(total, 0), amount_paid=0, attempt_count=0, currency="usd",
            payment_intent=None, charge=None, period_start=self.now, period_end=self.now,
        )  # fmt: skip
        self.put("subscription", subscription, latest_invoice=invoice)
        return self.put("invoice", invoice, "invoice.finalized", status="open")

    def pay(self, invoice: str) -> None:
        """An invoice is paid, by a charge if anything is due; its subscription goes on."""
        known = self.facts[invoice]
        due = known["amount_due"]
        charge = self._charge(known["customer"], due, invoice=invoice) if due else {"payment_intent": None, "id": None}
        self.put(
            "invoice", invoice, "invoice.paid", "invoice.payment_succeeded", status="paid", amount_paid=due,
            attempt_count=known["attempt_count"] + 1, payment_intent=charge["payment_intent"], charge=charge["id"],
        )  # fmt: skip
        if due and self.payments_apart:
            self.put(
                "invoice_payment", self.new("inpay"), "invoice_payment.paid",
                invoice=invoice, amount_paid=due, amount_requested=due, currency="usd", status="paid",
                payment={"type": "payment_intent", "payment_intent": charge["payment_intent"]},
            )  # fmt: skip
        if self.facts[known["subscription"]]["status"] in {"incomplete", "past_due", "unpaid"}:
            self._update(known["subscription"], status="active")

    def fail(self, invoice: str) -> None:
        """An invoice is not paid; its subscription is past due."""
        known = self.facts[invoice]
        self.put("invoice", invoice, "invoice.payment_failed", attempt_count=known["attempt_count"] + 1)
        if self.facts[known["subscription"]]["status"] == "active":
            self._update(known["subscription"], status="past_due")

    # Payments --------------------------------------------------------------------------------------------------------

    def _intent(self, customer: str, amount: int, invoice: str | None = None) -> str:
        return self.put(
            "payment_intent", self.new("pi"), "payment_intent.processing",
            amount=amount, currency="usd", customer=customer, status="processing", latest_charge=None, invoice=invoice,
            metadata={},
        )  # fmt: skip

    def _charge(self, customer: str, amount: int, *, invoice: str | None = None, intent: str | None = None) -> Json:
        intent = intent or self._intent(customer, amount, invoice)
        charge = self.put(
            "charge", self.new("ch"), "charge.succeeded",
            amount=amount, amount_captured=amount, amount_refunded=0, captured=True, paid=True, refunded=False,
            disputed=False, currency="usd", status="succeeded", customer=customer, payment_intent=intent,
            invoice=invoice, metadata={},
        )  # fmt: skip
        self.put("payment_intent", intent, "payment_intent.succeeded", status="succeeded", latest_charge=charge)
        return self.facts[charge]

    def charge_of(self, paid: str) -> Json:
        """The charge of a session or an invoice."""
        intent = self.facts[self.facts[paid]["payment_intent"]]
        return self.facts[intent["latest_charge"]]

    def refund(self, paid: str, amount: int | None = None, *, status: str = "succeeded") -> str:
        """Give money back, the rest of it unless an amount is named; a pending refund counts."""
        charge = self.charge_of(paid)
        amount = amount or charge["amount"] - charge["amount_refunded"]
        refund = self.put(
            "refund", self.new("re"), "refund.created",
            charge=charge["id"], payment_intent=charge["payment_intent"], amount=amount, currency="usd",
            status=status, failure_reason=None, metadata={},
        )  # fmt: skip
        total = charge["amount_refunded"] + amount
        self.put(
            "charge", charge["id"], "charge.refunded", amount_refunded=total, refunded=total == charge["amount"]
        )  # fmt: skip
        return refund

    def fail_refund(self, refund: str) -> None:
        """The money could not be given back after all."""
        types = ("refund.failed", "refund.updated", "charge.refund.updated")
        self.put("refund", refund, *types, status="failed", failure_reason="expired_or_canceled_card")
        charge = self.facts[self.facts[refund]["charge"]]
        left = charge["amount_refunded"] - self.facts[refund]["amount"]
        self.put("charge", charge["id"], "charge.updated", amount_refunded=left, refunded=False)

    def dispute(self, paid: str, amount: int | None = None, **facts: Any) -> str:
        """The cardholder wants money back, all of it unless an amount is named, and Stripe takes it at once."""
        charge = self.charge_of(paid)
        self.put("charge", charge["id"], "charge.updated", disputed=True)
        return self.put(
            "dispute", self.new("dp"), "charge.dispute.created", "charge.dispute.funds_withdrawn",
            charge=charge["id"], amount=amount or charge["amount"], reason="fraudulent", balance_transactions=[],
            **{"payment_intent": charge["payment_intent"], "currency": "usd", "status": "needs_response", **facts},
        )  # fmt: skip

    def close(self, dispute: str, status: str) -> None:
        """The bank decides, perhaps anew."""
        told = ["charge.dispute.closed", *(["charge.dispute.funds_reinstated"] if status == "won" else [])]
        self.put("dispute", dispute, *told, status=status)


# The other side ------------------------------------------------------------------------------------------------------


def prepare(ledger: Ledger, *accounts: str) -> None:
    """The demo packages, the plans of the catalogue, and accounts without credits."""
    ledger.rows("load_demo_catalog")
    ledger.change(
        "insert into credits.plans (code, name, monthly_credits, stripe_product_id, stripe_price_ids) values "
        "('basic', 'Basic', 0, null, '{price_basic}'), ('pro', 'Pro', 0, 'prod_pro', '{}'), "
        "('seat', 'Seats', 100, 'prod_seat', '{}'), ('year', 'Year', 0, null, '{price_year}')"
    )
    for account in accounts:
        ledger.open(account)


def answer(ledger: Ledger, world: World) -> None:
    """Answer the requests to Stripe that are due, as Stripe would at the ledger's time."""
    due = ledger.table("stripe_requests", "state = 'queued' and run_at <= credits.now() order by request_id")
    date = json.dumps({"Date": format_datetime(ledger.now.astimezone(UTC), usegmt=True), "Request-Id": "req_1"})
    for request in due:
        status, body = world.get(request.path, request.params, int(ledger.now.timestamp()), request.stripe_account)
        arguments = {"request_id": request.request_id, "status": status, "body": json.dumps(body), "headers": date}
        ledger.row("complete_stripe_request", **arguments)


def settle(ledger: Ledger, world: World, patience: timedelta = timedelta(minutes=10)) -> None:
    """Answer what SQL asks, and let it try again what waits, until nothing moves; time goes on as far as patience."""
    limit = ledger.now + patience
    for _ in range(60):
        with ledger.as_owner():
            (waiting,) = ledger.query(
                "select least((select min(run_at) from credits.stripe_requests where state = 'queued'), "
                "(select min(next_attempt_at) from credits.stripe_events where status in ('parked', 'failed'))) until"
            )
        if waiting.until is None or waiting.until > limit:
            return
        ledger.now = max(ledger.now, waiting.until)
        answer(ledger, world)
        ledger.rows("process_stripe_events", max_events=100)
    raise AssertionError("this never comes to rest")
