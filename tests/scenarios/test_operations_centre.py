"""An operations centre sells packages: bought, canceled, refunded, given away, expired, bought by themselves."""

from functools import partial
from typing import Any

from five_ways import token
from ledger_support import refused
from product import APRIL, Product, mail_server
from servers import Database, until
from test_notifier import Mailbox

ISSUER = "https://id.example.com"
PAID, EXPIRED = "checkout.session.completed", "checkout.session.expired"
CENTS = {"starter": 1000, "standard": 4500, "pro": 8000, "enterprise": 35000}


def checkout(shop: Product, who: str, package: str, key: str, **more: Any) -> str:
    """A user asks for a page to pay at; its session."""
    asked = {"package": package, "key": key, "success_url": "http://localhost:3000/thanks", **more}
    answer = shop.ask(who, "create_checkout", **asked)
    assert answer["state"] == "done", answer
    session_id: str = answer["url"].rpartition("/")[2]
    assert shop.till.objects[session_id]["amount_total"] == CENTS[package]
    return session_id


def session_of_nobody(number: int, customer: str | None) -> dict[str, Any]:
    """A session that was made without us, by a Payment Link that names no user."""
    return {
        "id": f"cs_nobody_{number}", "object": "checkout.session", "mode": "payment", "status": "complete",
        "payment_status": "paid", "amount_subtotal": 1000, "amount_total": 1000, "currency": "usd", "livemode": False,
        "customer": customer, "payment_intent": f"pi_nobody_{number}", "metadata": {"package": "starter"},
    }  # fmt: skip


def subjects(mailbox: Mailbox, to: str) -> list[str]:
    """What somebody got by e-mail, in any order."""
    return sorted(mail["Subject"] for receivers, mail in mailbox.mails if receivers == [f"{to}@example.com"])


def test_the_days_of_an_operations_centre(database: Database) -> None:
    with mail_server() as (mailbox, mail), Product(database, "operations-centre", APRIL, **mail) as shop:
        set_up(shop)
        buys(shop, mailbox)
        goes_away_or_pays_less(shop)
        strange_webhooks(shop)
        spends_and_gives(shop)
        gets_money_back(shop)
        credits_end(shop)
        buys_without_being_asked(shop)
        shop.follow("Look at it all")
        until(lambda: len(mailbox.mails) == 8)
        assert subjects(mailbox, "user_1") == [
            "200 of your credits end on 2 May 2030", "Receipt: 1000 credits for 9.00 USD",
            "Receipt: 5000 credits for 45.00 USD", "You get 9.00 USD back", "You get 9.00 USD back",
            "Your credits were topped up",
        ]  # fmt: skip
        assert subjects(mailbox, "user_2") == [
            "Receipt: 1000 credits for 10.00 USD", "Receipt: 10000 credits for 80.00 USD",
        ]  # fmt: skip
        assert shop.backend.sums("user_1") == (1400, 0, 1400, 0)
        assert shop.backend.sums("user_2") == (11500, 0, 11500, 0)
        shop.end("user_1", "user_2", parked=1)


def set_up(shop: Product) -> None:
    """Packages are published, their ids stored; who is who is known."""
    shop.follow("Set up")
    sold = {row.code: row for row in shop.backend.list_packages()}
    assert {code: row.price for code, row in sold.items()} == CENTS
    assert [int(row.discount_percent) for row in sold.values()] == [0, 10, 20, 30]
    assert all(row.price == row.credits * (100 - row.discount_percent) / 100 for row in sold.values())
    for row in sold.values():
        price = shop.till.objects[row.stripe_price_id]
        assert (price["unit_amount"], price["product"]) == (row.price, row.stripe_product_id)
        assert price["metadata"] == {"package": row.code, "credits": str(row.credits)}
    made = len(shop.till.objects)
    shop.command("pgcredits catalog apply docs/examples/operations-centre.yaml")
    shop.command("pgcredits stripe publish")
    assert (len(shop.till.objects), shop.backend.publish_catalog(dry_run=True)) == (made, [])
    for number in (1, 2):
        shop.tokens[f"USER_{number}"] = token(iss=ISSUER, sub=f"auth0|{number}")


def buys(shop: Product, mailbox: Mailbox) -> None:
    """A user buys a package; all that Stripe tells comes twice, and the receipt once."""
    shop.follow("Buy", 0)
    (session_id,) = [about for about, one in shop.till.objects.items() if one["object"] == "checkout.session"]
    assert shop.till.objects[session_id]["line_items"][0]["price"] == shop.backend.list_packages()[1].stripe_price_id
    assert shop.backend.sums("user_1") == (0, 0, 0, 0)
    assert shop.visit(session_id) == [PAID, "payment_intent.succeeded", "charge.succeeded"]
    shop.follow("Buy", 1)
    until(lambda: len(mailbox.mails) == 1)
    ((_, mail),) = mailbox.mails
    assert "You bought 5000 credits (Standard) for 45.00 USD" in " ".join(mail.get_content().split())


def goes_away_or_pays_less(shop: Product) -> None:
    """A payment that is canceled brings nothing; a coupon changes what is paid, and not what is bought."""
    assert shop.visit(checkout(shop, "USER_1", "pro", "cart_2"), "expired") == [EXPIRED]
    (row,) = shop.ask("USER_1", "list_purchases", status="expired")
    assert (row["package"], row["credits"], row["completed_at"]) == ("pro", 10000, None)
    coupon = {"amount_total": 900, "total_details": {"amount_discount": 100, "amount_tax": 0}}
    coupon |= {"discounts": [{"coupon": "SPRING", "promotion_code": "promo_1"}]}
    shop.visit(checkout(shop, "USER_1", "starter", "cart_3", allow_promotion_codes=True), "paid", **coupon)
    (bought, *_) = shop.backend.list_purchases(account_id="user_1")
    assert (bought.amount, bought.amount_discount, bought.coupons, bought.credits) == (900, 100, ["SPRING"], 1000)
    shop.visit(checkout(shop, "USER_2", "pro", "cart_1"))
    assert (shop.backend.sums("user_1"), shop.backend.sums("user_2")) == ((6000, 0, 6000, 0), (10000, 0, 10000, 0))
    assert len(shop.ask("USER_2", "list_purchases")) == 1
    assert shop.refusal("USER_2", "get_balance", account_id="user_1") == (404, "account_not_found")
    assert shop.door.http.post("/rpc/list_purchases", json={}).status_code == 401


def strange_webhooks(shop: Product) -> None:
    """What is not signed is refused; what names no user is kept, and credited once somebody says whose it is."""
    forged = shop.event(PAID, session_of_nobody(0, None))
    for header in ("t=1,v1=00", "", None):
        body = forged.replace("pi_nobody_0", "pi_nobody_x").encode()
        answer = (
            shop.door.post(body, header)
            if header is not None
            else shop.door.http.post("/webhooks/stripe/default", content=body)
        )
        assert answer.status_code == 400
    known = len(shop.backend.list_stripe_events(max_rows=1000))
    for number, customer in enumerate(("cus_walk_in", None), 1):
        shop.post(PAID, session_of_nobody(number, customer), "parked")
    kept = shop.backend.list_stripe_events(status="parked")
    assert [(row.type, row.reason) for row in kept] == [(PAID, "account_unknown")] * 2
    assert len(shop.backend.list_stripe_events(max_rows=1000)) == known + 2
    assert shop.backend.sums("user_2") == (10000, 0, 10000, 0)
    whose = {"id": "cus_walk_in", "object": "customer", "metadata": {"account_id": "user_2"}, "livemode": False}
    shop.post("customer.updated", whose)
    shop.job("retry_stripe_events")
    assert len(shop.backend.list_stripe_events(status="parked")) == 1
    assert shop.backend.sums("user_2") == (11000, 0, 11000, 0)


def spends_and_gives(shop: Product) -> None:
    """A double submit spends once, too much is refused and says what is missing, a gift arrives."""
    shop.wait(days=1)
    shop.follow("Spend and give")
    with refused(402, "insufficient_credits", required=4301, available=4300):
        shop.backend.spend("user_1", 4301, key="operation:8")
    with refused(402, "insufficient_credits"):
        shop.backend.transfer_credits("user_1", "user_2", 4301, key="gift:2")
    assert (shop.backend.sums("user_1"), shop.backend.sums("user_2")) == ((4300, 0, 4300, 0), (11500, 0, 11500, 0))
    assert [row["kind"] for row in shop.ask("USER_1", "history", max_rows=2)] == ["transfer_out", "spend"]
    assert shop.ask("USER_2", "history", max_rows=1)[0]["amount"] == 500


def gets_money_back(shop: Product) -> None:
    """A part of a payment, then all of another one; the credits go in proportion, once."""
    _, first = shop.backend.list_purchases(account_id="user_1", status="completed")
    shop.follow("Give money back")
    again = partial(shop.backend.request_refund, "user_1", first.purchase_id)
    until(lambda: bool(again(amount=900, reason="it was late", key="ticket_1").state == "done"))
    assert shop.backend.sums("user_1") == (3300, 0, 3300, 0)
    assert shop.tell() == ["refund.created", "charge.refunded"]
    assert shop.backend.sums("user_1") == (3300, 0, 3300, 0)
    (bought,) = shop.backend.list_purchases(account_id="user_1", status="completed")
    with refused(422, "invalid_amount", refundable=900):
        shop.backend.request_refund("user_1", bought.purchase_id, amount=901, key="ticket_2")
    whole = partial(shop.backend.request_refund, "user_1", bought.purchase_id, key="ticket_3")
    until(lambda: bool(whole().state == "done"))
    shop.tell()
    assert shop.backend.sums("user_1") == (2300, 0, 2300, 0)
    statuses = [row["status"] for row in shop.ask("USER_1", "list_purchases")]
    assert statuses == ["refunded", "expired", "partially_refunded"]


def credits_end(shop: Product) -> None:
    """Credits with an end are spent first; of what is left the user hears in time, and it goes in time."""
    shop.follow("Credits that end")
    assert shop.job("warn_expiring_credits") == 0
    shop.wait(days=24)
    shop.backend.spend("user_1", 100, key="operation:9")
    assert shop.job("warn_expiring_credits") == 1
    assert shop.job("warn_expiring_credits") == 0
    (told,) = shop.told("credits_expiring")
    assert (told.account_id, told.data["amount"]) == ("user_1", 200)
    assert shop.backend.available("user_1") == 2500
    shop.wait(days=6)
    assert shop.ask("USER_1", "get_balance")["available"] == 2300
    assert shop.scheduled()["expire_grants"] == 1
    assert shop.backend.history("user_1", max_rows=1)[0].kind == "expire"


def buys_without_being_asked(shop: Product) -> None:
    """The spend that leaves too little buys a package; once, however often Stripe tells of it."""
    customer = shop.backend.list_purchases(account_id="user_1", status="refunded")[0].stripe_customer_id
    card = {"id": customer, "object": "customer", "livemode": False, "metadata": {"account_id": "user_1"}}
    shop.post("customer.updated", {**card, "invoice_settings": {"default_payment_method": "pm_1"}})
    shop.follow("Buy before it runs out")
    shop.backend.spend("user_1", 1800, key="operation:10")
    assert shop.backend.get_auto_topup("user_1").top_up_state is None
    shop.backend.spend("user_1", 100, key="operation:11")
    until(lambda: shop.backend.available("user_1") != 400)
    assert shop.backend.sums("user_1") == (1400, 0, 1400, 0)
    (paid,) = [one for one in shop.till.objects.values() if one.get("metadata", {}).get("top_up_id")]
    shop.post("payment_intent.succeeded", paid)
    rule = shop.backend.get_auto_topup("user_1")
    assert (shop.backend.available("user_1"), rule.state, rule.month_used) == (1400, "active", 1000)
    assert len(shop.told("top_up_done")) == 1
