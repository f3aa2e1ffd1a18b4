"""Stripe Connect: what is asked about an object is asked in the account in which it lives, and nowhere else."""

import asyncio
import json
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
from door import SECRET, Door, signature
from ledger_support import DAY, HOUR, NOON, SECOND, Ledger, assert_sound, committed, refused, session, together, told
from psycopg import Connection
from servers import ONE_ENGINE, Database
from stripe_fake import KEY, StripeFake

from pgcredits import worker
from pgcredits.db import Database as Pool
from pgcredits.settings import Settings

Json = dict[str, Any]
SHOP, OTHER = "acct_1", "acct_2"
URL = "http://localhost:3000/back"
COMPLETED = "checkout.session.completed"
CUSTOMER: Json = {
    "id": "cus_1", "object": "customer", "metadata": {"account_id": "alpha"},
    "invoice_settings": {"default_payment_method": "pm_1"},
}  # fmt: skip


def prepare(ledger: Ledger) -> None:
    """Alpha, the demo catalogue, and an endpoint for the events of a connected account."""
    ledger.load_demo_catalog()
    ledger.open("alpha")
    ledger.set_stripe_endpoint("shop", stripe_account=SHOP)


@pytest.fixture
def ledger(conn: Connection[Any]) -> Ledger:
    ledger = Ledger(conn)
    prepare(ledger)
    return ledger


def tell(
    ledger: Ledger, event_type: str, about: Any, account: str | None = SHOP, event_id: str | None = None, **more: Any
) -> str:
    """Deliver an event of a connected account, or of the own one."""
    says = {"created": int(ledger.now.timestamp()), **({"account": account} if account else {}), **more}
    payload = told(event_id or ledger.key(), event_type, about, **says)
    outcome: str = ledger.receive_stripe_event("shop" if account else "default", payload).outcome
    return outcome


def asked(ledger: Ledger, where: str = "true", *parameters: Any) -> list[tuple[str, str, str | None]]:
    """What Stripe is asked for: the purpose, of which path, and in which account."""
    rows = ledger.table("stripe_requests", f"{where} order by request_id", *parameters)
    return [(row.purpose, row.path, row.stripe_account) for row in rows]


def answer(ledger: Ledger, body: Json, status: int = 200) -> Any:
    """Stripe answers the last request."""
    last = ledger.table("stripe_requests", "true order by request_id")[-1]
    return ledger.complete_stripe_request(last.request_id, status, json.dumps(body))


def subscription(price: str = "price_basic", **changes: Any) -> Json:
    """A subscription of alpha's, from now on."""
    start, end = int(NOON.timestamp()), int((NOON + 28 * DAY).timestamp())
    known = {"id": price, "object": "price", "product": "prod_1", "unit_amount": 1000, "currency": "usd",
             "recurring": {"interval": "month"}, "active": True}  # fmt: skip
    item = {"id": "si_1", "price": known, "quantity": 1, "current_period_start": start, "current_period_end": end}
    return {
        "id": "sub_1", "object": "subscription", "status": "active", "customer": "cus_1", "created": start,
        "metadata": {"account_id": "alpha"}, "items": {"data": [item]}, "billing_cycle_anchor": start, **changes,
    }  # fmt: skip


# What an event lacks -------------------------------------------------------------------------------------------------

CHARGE: Json = {"id": "ch_1", "object": "charge", "amount_captured": 1000, "amount_refunded": 500, "currency": "usd"}
DISPUTE: Json = {"id": "dp_1", "object": "dispute", "charge": "ch_1", "amount": 5, "currency": "usd", "status": "lost"}
LINE: Json = {
    "id": "il_1", "amount": 1000, "quantity": 1, "period": {"start": 1, "end": 2},
    "parent": {"type": "subscription_item_details", "subscription_item_details": {"subscription": "sub_1"}},
    "pricing": {"price_details": {"price": "price_9", "product": "prod_9"}},
}  # fmt: skip
INVOICE: Json = {
    "id": "in_1", "object": "invoice", "status": "paid", "customer": "cus_1", "amount_paid": 1000, "currency": "usd",
    "parent": {"subscription_details": {"subscription": "sub_1", "metadata": {"account_id": "alpha"}}},
}  # fmt: skip
LACKING: dict[str, tuple[str, Json, str]] = {  # what comes, and what it makes SQL ask for
    "a customer": (COMPLETED, session(metadata={}), "customers/cus_1"),
    "its lines": (COMPLETED, session(metadata={"account_id": "alpha"}), "checkout/sessions/cs_1/line_items"),
    "more lines": ("invoice.paid", {**INVOICE, "lines": {"has_more": True, "data": [LINE]}}, "invoices/in_1/lines"),
    "a price": ("invoice.paid", {**INVOICE, "lines": {"data": [LINE]}}, "prices/price_9"),
    "what was paid": ("charge.refunded", {**CHARGE, "payment_intent": "pi_1"}, "invoice_payments"),
    "a payment": ("charge.dispute.created", DISPUTE, "charges/ch_1"),
    "a schedule": (
        "customer.subscription.updated", subscription(schedule="sub_sched_1"), "subscription_schedules/sub_sched_1",
    ),
}  # fmt: skip


@pytest.mark.parametrize("account", [SHOP, None])
@pytest.mark.parametrize("what", LACKING)
def test_what_an_event_lacks_is_asked_for_where_it_came_from(ledger: Ledger, what: str, account: str | None) -> None:
    event_type, about, path = LACKING[what]
    assert tell(ledger, event_type, about, account) in {"parked", "applied"}
    assert ("retrieve", f"/v1/{path}", account) in asked(ledger)
    assert {row[2] for row in asked(ledger)} == {account}


def test_ties_and_thin_events_are_settled_where_they_came_from(ledger: Ledger) -> None:
    for name in ("One", "Two"):
        tell(ledger, "product.updated", {"id": "prod_1", "object": "product", "name": name})
    thin: Json = {
        "id": "evt_1", "object": "v2.core.event", "type": "v1.product.updated", "created": "2030-01-31T12:00:00.000Z",
        "context": SHOP, "related_object": {"id": "prod_2", "type": "product", "url": "/v1/products/prod_2"},
    }  # fmt: skip
    assert ledger.receive_stripe_event("default", json.dumps(thin)).outcome == "ignored"
    assert ledger.receive_stripe_event("shop", json.dumps(thin)).outcome == "applied"
    assert asked(ledger) == [("retrieve", f"/v1/products/prod_{number}", SHOP) for number in (1, 2)]
    for kind, status in ((GONE, "warn"), (BACK, "ok")):  # what names no object that can be asked for
        thin |= {"id": f"evt_{kind}", "type": f"v1.{kind}", "related_object": None}
        assert ledger.receive_stripe_event("shop", json.dumps(thin)).outcome == "applied"
        assert health(ledger) == status
    assert news(ledger) == [SHOP]


def test_what_an_answer_names_is_where_it_was_asked_for(ledger: Ledger) -> None:
    tell(ledger, COMPLETED, session(metadata={}))
    answer(ledger, CUSTOMER)
    assert {(row.kind, row.object_id) for row in ledger.table("stripe_homes")} >= {
        ("customer", "cus_1"), ("payment_method", "pm_1"), ("payment_intent", "pi_1"), ("checkout.session", "cs_1"),
    }  # fmt: skip


def test_what_people_write_moves_nothing(ledger: Ledger) -> None:
    tell(ledger, "customer.created", CUSTOMER, None)
    written = {"customer": "cus_1", "id": "cus_1", "subscription": "cus_1", "price": "cus_1"}
    about = {"id": "prod_1", "object": "product", "name": "cus_1", "description": "cus_1", "metadata": written}
    tell(ledger, "product.created", about)
    tell(ledger, COMPLETED, session(client_reference_id="cus_1", metadata=written, customer=None))
    ledger.create_portal_session("alpha", return_url=URL, key="p")
    assert asked(ledger, "purpose = 'portal'") == [("portal", "/v1/billing_portal/sessions", None)]


def test_what_nobody_asks_about_is_not_remembered(ledger: Ledger) -> None:
    with ledger.unchanged("stripe_events"):
        tell(ledger, "payout.paid", {"id": "po_1", "object": "payout", "destination": "ba_1", "type": "bank_account"})
        tell(ledger, "balance.available", {"object": "balance", "available": [{"amount": 1}]})


def test_events_that_name_the_same_objects_wait_for_nobody(database: Database) -> None:
    with committed(database) as ledger:
        prepare(ledger)

    def paid(number: int) -> Callable[[Ledger], str]:
        charge = {
            **CHARGE,
            "customer": f"cus_{number % 3}",
            "payment_intent": f"pi_{-number % 4}",
            "id": f"ch_{number % 2}",
        }
        return lambda ledger: tell(ledger, "charge.updated", {**charge, "amount_refunded": 0}, event_id=f"evt_{number}")

    assert together(database, [paid(number) for number in range(12)]) == ["applied"] * 12


def test_shadow_mode_remembers_nothing(ledger: Ledger) -> None:
    ledger.set_stripe_endpoint("shop", mode="shadow", stripe_account=SHOP)
    with ledger.unchanged("stripe_events"):
        assert tell(ledger, COMPLETED, session()) == "ignored"
    ledger.set_stripe_endpoint("shop", stripe_account=SHOP)
    assert ledger.replay_stripe_event(ledger.table("stripe_events")[0].event_id).outcome == "applied"
    assert ledger.table("stripe_homes", "object_id = 'cus_1'")[0].stripe_account == SHOP


def test_what_was_seen_in_shadow_mode_waits_for_it_whoever_else_is_told(ledger: Ledger) -> None:
    ledger.set_stripe_endpoint("shop", mode="shadow", stripe_account=SHOP)
    ledger.set_stripe_endpoint("other", stripe_account=OTHER)
    ledger.set_stripe_endpoint("live_only", livemode=True, stripe_account=SHOP)
    payload = told("evt_1", COMPLETED, session(), account=SHOP, livemode=False)
    for endpoint in ("other", "shop", "other", "live_only", "default"):
        assert ledger.receive_stripe_event(endpoint, payload).outcome in {"ignored", "duplicate"}
    (event,) = ledger.table("stripe_events")
    assert (event.endpoint, event.reason, event.effects[0]["effect"]) == ("shop", "shadow", "grant")
    ledger.set_stripe_endpoint("shop", stripe_account=SHOP)
    assert (ledger.replay_stripe_event("evt_1").outcome, ledger.available()) == ("applied", 1000)


def test_what_was_seen_in_shadow_mode_is_applied_by_the_endpoint_that_is_live(ledger: Ledger) -> None:
    ledger.set_stripe_endpoint("look", mode="shadow", stripe_account=SHOP)
    payload = told("evt_1", COMPLETED, session(), account=SHOP)
    assert ledger.receive_stripe_event("look", payload).outcome == "ignored"
    assert ledger.receive_stripe_event("shop", payload).outcome == "applied"


def test_what_waits_is_taken_by_whoever_is_meant_for_it_now(ledger: Ledger) -> None:
    about = session(metadata={"package": "starter"})
    assert tell(ledger, COMPLETED, about, event_id="evt_1") == "parked"
    ledger.set_stripe_endpoint("shop", stripe_account=OTHER)
    ledger.set_stripe_endpoint("live", livemode=True, stripe_account=SHOP)
    ledger.set_stripe_endpoint("look", mode="shadow", stripe_account=SHOP)
    assert ledger.replay_stripe_event("evt_1").outcome == "parked"  # its livemode is not known: any will do
    ledger.set_stripe_endpoint("live", livemode=True, stripe_account=OTHER)
    assert (ledger.replay_stripe_event("evt_1").outcome, ledger.event("evt_1").reason) == (
        "ignored",
        "account_mismatch",
    )
    ledger.set_stripe_endpoint("second", stripe_account=SHOP)
    assert ledger.replay_stripe_event("evt_1").outcome == "parked"
    ledger.set_stripe_endpoint("second", stripe_account=OTHER)
    ledger.set_stripe_endpoint("third", stripe_account=SHOP)
    answer(ledger, CUSTOMER)
    assert (ledger.event("evt_1").endpoint, ledger.available()) == ("third", 1000)


# What is done there --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("account", [SHOP, None])
def test_a_buyer_is_served_where_its_customer_is(ledger: Ledger, account: str | None) -> None:
    tell(ledger, "customer.created", CUSTOMER, account)
    tell(ledger, COMPLETED, session(), account)
    purchase = ledger.list_purchases(account_id="alpha")[0].purchase_id
    ledger.request_refund("alpha", purchase, key="r")
    ledger.create_portal_session("alpha", return_url=URL, key="p")
    ledger.create_checkout("alpha", package="starter", success_url=URL, key="c")
    ledger.set_auto_topup("alpha", 100, "starter", 100000)
    ledger.use(950)
    assert asked(ledger) == [
        ("refund", "/v1/refunds", account), ("portal", "/v1/billing_portal/sessions", account),
        ("checkout", "/v1/checkout/sessions", account), ("top_up", "/v1/payment_intents", account),
    ]  # fmt: skip
    intent = {"id": "pi_2", "object": "payment_intent", "status": "requires_action", "customer": "cus_1",
              "metadata": ledger.table("stripe_requests", "purpose = 'top_up'")[0].params["metadata"]}  # fmt: skip
    assert answer(ledger, intent).state == "done"
    ledger.now += 2 * DAY
    ledger.run_auto_topups()
    ledger.remove_auto_topup("alpha")
    assert asked(ledger)[4:] == [
        ("retrieve", "/v1/payment_intents/pi_2", account), ("cancel_top_up", "/v1/payment_intents/pi_2/cancel", account)
    ]  # fmt: skip
    assert_sound(ledger)


def test_a_guest_is_given_its_money_back_where_it_paid(ledger: Ledger) -> None:
    tell(ledger, COMPLETED, session(customer=None))
    ledger.request_refund("alpha", ledger.list_purchases(account_id="alpha")[0].purchase_id, key="r")
    ledger.create_checkout("alpha", package="starter", success_url=URL, key="c")
    assert asked(ledger) == [("refund", "/v1/refunds", SHOP), ("checkout", "/v1/checkout/sessions", None)]


def test_what_a_declined_payment_names_is_known_there(ledger: Ledger) -> None:
    tell(ledger, "customer.created", CUSTOMER)
    ledger.grant(100)
    ledger.set_auto_topup("alpha", 100, "starter", 100000)
    ledger.use(50)
    declined = {"type": "card_error", "code": "card_declined"}
    payment = {"id": "pi_5", "object": "payment_intent", "status": "requires_payment_method", "customer": "cus_1"}
    assert answer(ledger, {"error": {**declined, "payment_intent": payment}}, 402).state == "declined"
    assert ledger.table("stripe_homes", "object_id = 'pi_5'")[0].stripe_account == SHOP


def test_a_customer_is_made_in_a_connected_account(ledger: Ledger) -> None:
    pending = ledger.get_or_create_stripe_customer("alpha", stripe_account=SHOP)
    assert ledger.get_or_create_stripe_customer("alpha", stripe_account=SHOP) == pending
    assert asked(ledger) == [("customer", "/v1/customers", SHOP)]
    assert answer(ledger, CUSTOMER).state == "done"
    assert ledger.get_or_create_stripe_customer("alpha").customer_id == "cus_1"
    ledger.create_checkout("alpha", package="starter", success_url=URL, key="c")
    assert asked(ledger)[1:] == [("checkout", "/v1/checkout/sessions", SHOP)]


def test_no_customer_is_made_where_nobody_would_hear_of_it(ledger: Ledger) -> None:
    for account in (OTHER, "", "acct"):
        with ledger.unchanged(), refused(400, "invalid_request", argument="stripe_account"):
            ledger.get_or_create_stripe_customer("alpha", stripe_account=account)
    tell(ledger, "account.application.deauthorized", {"id": "ca_1", "object": "application"})
    with ledger.unchanged(), refused(400, "invalid_request", argument="stripe_account"):
        ledger.get_or_create_stripe_customer("alpha", stripe_account=SHOP)


def test_what_became_of_an_unknown_request_is_looked_for_there(ledger: Ledger) -> None:
    number = ledger.get_or_create_stripe_customer("alpha", stripe_account=SHOP).request_id
    ledger.claim_stripe_requests()
    ledger.now += DAY
    ledger.claim_stripe_requests()
    assert asked(ledger)[1:] == [("lookup", "/v1/customers", SHOP)]
    empty = {"object": "list", "data": [], "has_more": False}
    assert answer(ledger, empty).state == "done"
    assert asked(ledger)[2:] == [("customer", "/v1/customers", SHOP)]
    assert ledger.table("stripe_requests", "request_id = %s", number)[0].state == "failed"


# Prices --------------------------------------------------------------------------------------------------------------


def known_price(ledger: Ledger, price: str, account: str | None) -> None:
    """Stripe has told of a price in an account."""
    price_object = {"id": price, "object": "price", "product": "prod_1", "unit_amount": 1000, "currency": "usd",
                    "active": True, "recurring": {"interval": "month"}, "metadata": {}}  # fmt: skip
    assert tell(ledger, "price.created", price_object, account) == "applied"


def item(ledger: Ledger, account_id: str, **what: Any) -> Json:
    """The one line that a checkout of an account asks for."""
    request = ledger.create_checkout(account_id, success_url=URL, key=ledger.key(), **what).request_id
    (line,) = ledger.table("stripe_requests", "request_id = %s", request)[0].params["line_items"]
    return {**line}


def test_what_the_catalogue_sells_at_a_price_of_its_own_is_named_elsewhere(ledger: Ledger) -> None:
    tell(ledger, "customer.created", CUSTOMER)
    ledger.open("beta")
    ledger.change(
        "update credits.packages set stripe_price_id = 'price_1', stripe_product_id = 'prod_1' where code = 'starter'"
    )
    data = {"currency": "usd", "unit_amount": 1000, "product_data": {"name": "Starter"}}
    for account in (None, SHOP):
        if account:
            known_price(ledger, "price_1", account)
        by_price, by_name = ("alpha", "beta") if account else ("beta", "alpha")
        assert item(ledger, by_price, package="starter") == {"price": "price_1", "quantity": 1}
        assert item(ledger, by_name, package="starter") == {"price_data": data, "quantity": 1}


def test_each_account_has_its_own_price_of_a_plan(ledger: Ledger) -> None:
    tell(ledger, "customer.created", CUSTOMER)
    ledger.open("beta")
    ledger.change(
        "insert into credits.plans (code, name, stripe_price_ids) values ('own', 'Own', '{price_own}'),"
        " ('both', 'Both', '{price_own_2, price_shop, price_other}'), ('new', 'New', '{price_new}')"
    )
    for price, account in [("price_own", None), ("price_own_2", None), ("price_shop", SHOP)]:
        known_price(ledger, price, account)
    ledger.change("insert into credits.stripe_homes values ('price', 'price_other', %s)", OTHER)
    assert item(ledger, "alpha", plan="both")["price"] == "price_shop"
    assert item(ledger, "beta", plan="both")["price"] == "price_own_2"
    assert item(ledger, "beta", plan="own")["price"] == "price_own"
    for account_id in ("alpha", "beta"):
        assert item(ledger, account_id, plan="new")["price"] == "price_new"  # nobody knows of which account it is
    for account_id, price in [("alpha", "price_own_2"), ("beta", "price_shop")]:
        with refused(404, "price_not_found"):
            ledger.create_checkout(account_id, plan="both", price_id=price, success_url=URL, key="c")
    with refused(404, "price_not_found"):
        ledger.create_checkout("alpha", plan="own", success_url=URL, key="c")


def test_a_subscription_is_changed_where_it_is(ledger: Ledger) -> None:
    ledger.change(
        "insert into credits.plans (code, name, stripe_price_ids) values ('basic', 'Basic', '{price_basic}'),"
        " ('pro', 'Pro', '{price_pro, price_own}'), ('own', 'Own', '{price_own_2}')"
    )
    known_price(ledger, "price_pro", SHOP)
    known_price(ledger, "price_own", None)
    known_price(ledger, "price_own_2", None)
    assert tell(ledger, "customer.subscription.created", subscription()) == "applied"
    with refused(404, "price_not_found"):
        ledger.change_plan("alpha", "own")
    ledger.change_plan("alpha", "pro")
    (change,) = ledger.table("stripe_requests")
    assert (change.stripe_account, change.params["items"][0]["price"]) == (SHOP, "price_pro")
    ledger.cancel_plan("alpha")
    ledger.now += HOUR
    ledger.refresh_subscription("alpha")
    assert {row[2] for row in asked(ledger)} == {SHOP}
    assert {row[0] for row in asked(ledger)} == {"change_plan", "cancel_plan", "retrieve"}


def test_the_catalogue_takes_no_price_of_a_connected_account_for_its_own(ledger: Ledger) -> None:
    for account, price in [(SHOP, "price_shop"), (None, "price_own")]:
        found = {"id": price, "object": "price", "product": "prod_1", "unit_amount": 1000, "currency": "usd",
                 "active": True, "type": "one_time", "metadata": {"package": "starter", "credits": "1000"}}  # fmt: skip
        tell(ledger, "price.created", found, account)
        with ledger.as_owner():
            ledger.query("select credits._note_sold_prices(), credits._bind_known()")
        bound = ledger.table("packages", "code = 'starter'")[0].stripe_price_id
        assert bound == (None if account else price)


def test_a_price_that_is_sold_no_more_is_archived_where_it_is(ledger: Ledger) -> None:
    for price, account in [("price_shop", SHOP), ("price_own", None)]:
        known_price(ledger, price, account)
        ledger.change("insert into credits.plans (code, name, stripe_price_ids) values (%s, 'X', %s)", price, [price])
    ledger.change("update credits.packages set active = false")
    with ledger.as_owner():
        ledger.query("select credits._note_sold_prices()")
    ledger.change("update credits.sold_prices set retired_at = credits.now()")
    ledger.publish_catalog()
    assert sorted(asked(ledger)) == [
        ("publish", "/v1/prices/price_own", None), ("publish", "/v1/prices/price_shop", SHOP)
    ]  # fmt: skip


def test_a_product_of_the_same_id_in_a_connected_account_is_another_one(ledger: Ledger) -> None:
    ledger.change("update credits.packages set stripe_product_id = 'gold' where code = 'starter'")
    own: Json = {"id": "gold", "object": "product", "name": "Own", "active": True, "metadata": {"credits": "5"}}
    theirs: Json = {**own, "name": "Theirs", "metadata": {"credits": "999"}}
    later = int(ledger.now.timestamp()) + 60

    def known() -> Any:
        return ledger.table("stripe_objects", "kind = 'product'")[0].snapshot["name"], len(ledger.table("stripe_homes"))

    assert tell(ledger, "product.created", own, None) == "applied"
    with ledger.unchanged("stripe_events"):
        assert tell(ledger, "product.updated", theirs, created=later) == "ignored"
    assert ledger.table("stripe_events", "reason = 'account_mismatch'")
    ledger.publish_catalog()
    assert ("publish", "/v1/products/gold", None) in asked(ledger)

    theirs["id"] = own["id"] = "silver"  # now they are first, and even later in Stripe's time
    ledger.change("delete from credits.stripe_objects")
    assert tell(ledger, "product.created", theirs, created=later) == "applied"
    assert known() == ("Theirs", 1)
    assert tell(ledger, "product.created", own, None) == "applied"
    assert known() == ("Own", 0)
    assert tell(ledger, "product.updated", theirs, created=later) == "ignored"
    assert known() == ("Own", 0)


def test_what_a_connected_account_has_published_is_published_here_as_well(ledger: Ledger) -> None:
    ledger.change("update credits.packages set active = (code = 'starter')")
    known = {"id": "pgc_package_starter", "object": "product", "name": "Starter", "active": True, "metadata": {}}
    tell(ledger, "product.created", known)
    ledger.publish_catalog()
    assert ("publish", "/v1/products", None) in asked(ledger)
    assert {row[2] for row in asked(ledger)} == {None}


def test_what_the_own_account_answers_about_a_product_is_its_own(ledger: Ledger) -> None:
    theirs: Json = {"id": "pgc_package_starter", "object": "product", "name": "Theirs", "active": True, "metadata": {}}
    tell(ledger, "product.created", theirs)
    price = {"id": "price_1", "object": "price", "product": theirs["id"], "metadata": {}}
    ledger.get_or_create_stripe_customer("alpha")
    answer(ledger, {"object": "list", "data": [{**theirs, "name": "Own"}, price]})
    assert ledger.table("stripe_homes") == []


# A connected account that takes its access away ----------------------------------------------------------------------

GONE, BACK = "account.application.deauthorized", "account.application.authorized"
APPLICATION: Json = {"id": "ca_1", "object": "application"}
REVOKED: Json = {"error": {"type": "invalid_request_error", "code": "account_invalid"}}


def health(ledger: Ledger, name: str = "stripe_accounts_are_connected") -> str:
    (row,) = [row for row in ledger.health() if row.name == name]
    status: str = row.status
    return status


def news(ledger: Ledger) -> list[Any]:
    return [row.data["stripe_account"] for row in ledger.table("notifications", "type = 'stripe_account_disconnected'")]


def silent(ledger: Ledger) -> bool:
    """Whether nothing is asked about a subscription there, by itself or because somebody wants to know."""
    before = len(ledger.table("stripe_requests"))
    ledger.now += 30 * DAY
    with ledger.as_owner():
        (ran,) = ledger.query("select credits._refresh_stale_subscriptions(10) as asked")
    ledger.refresh_subscription("alpha")
    after = ledger.table("stripe_requests", "true order by request_id")[before:]
    assert len(after) == ran.asked
    for row in after:
        ledger.complete_stripe_request(row.request_id, 200, json.dumps(subscription()))
    return not after


def test_an_account_that_is_disconnected_is_left_alone_until_it_is_back(ledger: Ledger) -> None:
    tell(ledger, "customer.subscription.created", subscription())
    assert (health(ledger), silent(ledger)) == ("ok", False)
    tell(ledger, GONE, APPLICATION)
    tell(ledger, GONE, APPLICATION)
    assert (health(ledger), silent(ledger), news(ledger)) == ("warn", True, [SHOP])
    tell(ledger, BACK, APPLICATION)
    assert (health(ledger), silent(ledger)) == ("ok", False)
    tell(ledger, GONE, APPLICATION)
    assert (health(ledger), silent(ledger), news(ledger)) == ("warn", True, [SHOP, SHOP])
    ledger.set_stripe_endpoint("other", stripe_account=OTHER)
    assert health(ledger) == "warn"
    ledger.set_stripe_endpoint("shop", stripe_account=SHOP)
    assert (health(ledger), silent(ledger)) == ("ok", False)


def test_what_its_events_lacked_is_asked_for_when_it_is_back(ledger: Ledger) -> None:
    ledger.change("update credits.settings set value = '2' where name = 'stripe_event_max_attempts'")
    tell(ledger, GONE, APPLICATION)
    assert tell(ledger, COMPLETED, session(metadata={"package": "starter"}), event_id="evt_1") == "parked"
    ledger.now += DAY
    ledger.process_stripe_events()
    assert (ledger.event("evt_1").next_attempt_at, asked(ledger)) == (None, [])
    tell(ledger, BACK, APPLICATION)
    assert [row.outcome for row in ledger.process_stripe_events()] == ["parked"]
    answer(ledger, CUSTOMER)
    assert (ledger.event("evt_1").status, ledger.available()) == ("applied", 1000)


def test_a_live_endpoint_there_says_which_money_counts(ledger: Ledger) -> None:
    assert health(ledger, "connected_endpoints_know_their_mode") == "warn"
    ledger.set_stripe_endpoint("shop", livemode=False, stripe_account=SHOP)
    assert health(ledger, "connected_endpoints_know_their_mode") == "ok"


def test_an_answer_from_there_says_that_it_is_connected(ledger: Ledger) -> None:
    tell(ledger, "customer.created", CUSTOMER)
    tell(ledger, GONE, APPLICATION)
    ledger.now += HOUR
    ledger.create_portal_session("alpha", return_url=URL, key="p")
    assert health(ledger) == "warn"
    assert answer(ledger, {"id": "bps_1", "object": "billing_portal.session", "url": URL}).state == "done"
    assert health(ledger) == "ok"


def test_what_is_over_disconnects_nothing(ledger: Ledger) -> None:
    tell(ledger, GONE, APPLICATION)
    ledger.now += HOUR
    tell(ledger, BACK, APPLICATION)
    with ledger.unchanged("stripe_events"):
        assert tell(ledger, GONE, APPLICATION, created=int(ledger.now.timestamp()) - 60) == "applied"
        ledger.replay_stripe_event(ledger.table("stripe_events", "type = %s", GONE)[0].event_id)
    tell(ledger, BACK, APPLICATION, created=int(ledger.now.timestamp()) - 3600)
    assert health(ledger) == "ok"


def test_that_it_is_back_may_be_heard_before_that_it_was_gone(ledger: Ledger) -> None:
    now = int(ledger.now.timestamp())
    for minute in (2, 4):
        tell(ledger, BACK, APPLICATION, created=now + minute * 60)
        tell(ledger, GONE, APPLICATION, created=now + (minute - 1) * 60)
        assert (health(ledger), news(ledger)) == ("ok", [])
    tell(ledger, GONE, APPLICATION, created=now + 300)
    assert (health(ledger), news(ledger)) == ("warn", [SHOP])


def test_nobody_is_charged_by_itself_where_we_are_let_in_no_more(ledger: Ledger) -> None:
    tell(ledger, "customer.created", CUSTOMER)
    ledger.grant(100)
    ledger.set_auto_topup("alpha", 50, "starter", 100000)
    tell(ledger, GONE, APPLICATION)
    ledger.use(80)
    (refusal,) = ledger.table("notifications", "type = 'top_up_refused'")
    assert (asked(ledger), refusal.data["reason"]) == ([], "stripe_account_disconnected")
    tell(ledger, BACK, APPLICATION)
    ledger.now += HOUR
    ledger.run_auto_topups()
    assert asked(ledger) == [("top_up", "/v1/payment_intents", SHOP)]


def test_an_own_endpoint_has_nothing_to_disconnect(ledger: Ledger) -> None:
    with ledger.unchanged("stripe_events"):
        assert {tell(ledger, kind, APPLICATION, None) for kind in (GONE, BACK)} == {"applied"}


def test_a_request_that_is_refused_there_ends_and_says_why(ledger: Ledger) -> None:
    tell(ledger, "customer.subscription.created", subscription())
    ledger.change("insert into credits.packages (code, name, credits, price, currency) values ('p', 'P', 1, 1, 'usd')")
    ledger.create_checkout("alpha", package="p", success_url=URL, key="c")
    ledger.now += SECOND
    ledger.claim_stripe_requests()
    assert answer(ledger, REVOKED, 403).state == "failed"
    shown = ledger.get_checkout("alpha", "c")
    assert (shown.state, shown.error["status"], shown.error["code"]) == ("failed", 403, "account_invalid")
    assert (health(ledger), silent(ledger), news(ledger)) == ("warn", True, [SHOP])
    assert_sound(ledger)


def test_that_the_own_account_is_refused_disconnects_nobody(ledger: Ledger) -> None:
    tell(ledger, "customer.subscription.created", subscription(), None)
    ledger.create_portal_session("alpha", return_url=URL, key="p")
    assert answer(ledger, REVOKED, 403).state == "failed"
    assert (health(ledger), news(ledger), ledger.table("stripe_disconnections")) == ("ok", [], [])


@pytest.mark.parametrize("status", [403, 500])
def test_a_run_goes_on_with_the_next_account_where_one_lets_us_in_no_more(ledger: Ledger, status: int) -> None:
    ledger.set_stripe_endpoint("other", stripe_account=OTHER)
    ledger.reconcile_stripe()
    empty = {"object": "list", "data": [], "has_more": False}
    for _ in range(3):
        answer(ledger, empty)
    if status == 500:  # it was heard meanwhile, and Stripe fails
        tell(ledger, GONE, APPLICATION)
    for _ in range(20):
        answer(ledger, REVOKED, status)
        if asked(ledger)[-1][2] == OTHER:
            break
    for _ in range(3):
        answer(ledger, empty)
    run = ledger.get_reconciliation()
    assert (run.state, run.error, news(ledger)) == ("done", None, [SHOP])
    assert [row[2] for row in asked(ledger)] == [None] * 3 + [SHOP] + [OTHER] * 3


def test_a_run_ends_with_the_last_account_though_that_lets_us_in_no_more(ledger: Ledger) -> None:
    ledger.reconcile_stripe()
    for _ in range(3):
        answer(ledger, {"object": "list", "data": [], "has_more": False})
    answer(ledger, REVOKED, 403)
    assert ledger.get_reconciliation().state == "done"


# With the worker -----------------------------------------------------------------------------------------------------


@pytest.fixture
def fake() -> Iterator[StripeFake]:
    with StripeFake() as running:
        yield running


@pytest.fixture
def live(database: Database) -> Iterator[Ledger]:
    with committed(database) as ledger:
        prepare(ledger)
        yield ledger


def work(database: Database, fake: StripeFake) -> set[str | None]:
    """Do what is due, as `pgcredits stripe work --once` does; the accounts in which Stripe was asked."""

    async def once() -> None:
        pool = Pool(database.dsn, role="credits_service")
        await pool.open()
        try:
            known = Settings(dsn=database.dsn, role="credits_service", stripe_key=KEY, stripe_api_base=fake.url)
            await worker.Worker(pool, known).run(asyncio.Event(), once=True)
        finally:
            await pool.close()

    before = len(fake.calls)
    asyncio.run(once())
    return {call.account for call in fake.calls[before:]}


def has(fake: StripeFake, about: Json, account: str | None = SHOP) -> Json:
    """Stripe has an object in an account."""
    fake.objects[about["id"]] = about
    if account:
        fake.homes[about["id"]] = account
    return about


@ONE_ENGINE
def test_a_connected_account_from_its_first_event_to_refund_and_top_up(
    database: Database, live: Ledger, fake: StripeFake
) -> None:
    has(fake, CUSTOMER)
    paid = has(fake, session(metadata={"package": "starter"}))
    has(fake, {"id": "pi_1", "object": "payment_intent", "metadata": {}, "customer": "cus_1"})
    body = told("evt_1", COMPLETED, paid, object="event", account=SHOP).encode()
    secrets = {"": ("whsec_own",), "SHOP": (SECRET,)}
    with Door(database.dsn, webhook_secrets=secrets) as door:
        answered = door.post(body, signature(body), "shop")
        assert (answered.status_code, answered.json().get("outcome")) == (200, "parked"), (
            answered.text
        )  # whose customer is it?
    assert (work(database, fake), live.available()) == ({SHOP}, 1000)

    purchase = live.list_purchases(account_id="alpha")[0].purchase_id
    live.request_refund("alpha", purchase, amount=400, key="r")
    assert work(database, fake) == {SHOP}
    assert (live.request_refund("alpha", purchase, amount=400, key="r").state, live.available()) == ("done", 600)

    live.set_auto_topup("alpha", 500, "starter", 100000)
    live.use(200)
    assert (work(database, fake), live.available()) == ({SHOP}, 1400)

    live.create_checkout("alpha", package="starter", success_url=URL, key="c")
    live.create_portal_session("alpha", return_url=URL, key="p")
    assert work(database, fake) == {SHOP}
    assert (live.get_checkout("alpha", "c").state, live.get_portal_session("alpha", "p").state) == ("done", "done")
    assert {row.state for row in live.table("stripe_requests")} == {"done"}

    fake.revoked.add(SHOP)
    live.create_checkout("alpha", package="starter", success_url=URL, key="late")
    assert work(database, fake) == {SHOP}
    assert live.get_checkout("alpha", "late").error["code"] == "account_invalid"
    assert_sound(live)


@ONE_ENGINE
def test_what_never_arrived_is_found_in_every_account(database: Database, live: Ledger, fake: StripeFake) -> None:
    live.open("beta")
    live.set_stripe_endpoint("default")
    live.set_stripe_endpoint("closed", stripe_account=OTHER)
    fake.revoked.add(OTHER)
    with live.conn.transaction():
        live.change("select credits._disconnect(%s, credits.now())", OTHER)
    fake.page = 1
    made: Json = {"created": 2_000_000_000, "livemode": False}
    sold: Callable[..., Json] = partial(session, customer=None, **made)
    has(fake, sold("cs_1"))
    has(fake, sold("cs_2"))
    has(fake, sold("cs_3", metadata={"account_id": "beta", "package": "starter"}), None)
    has(fake, {**made, "id": "pi_1", "object": "payment_intent"})
    has(fake, {**made, "id": "re_1", "object": "refund", "amount": 500, "currency": "usd", "payment_intent": "pi_1",
               "status": "succeeded", "metadata": {}})  # fmt: skip
    live.reconcile_stripe(repair=True)
    assert work(database, fake) == {None, SHOP}
    run = live.get_reconciliation()
    assert (run.state, run.error, run.checked, run.found, run.remaining) == ("done", None, 4, 4, 0)
    assert (live.available("alpha"), live.available("beta")) == (1500, 1000)
    assert_sound(live)
