"""The stream of Stripe events: what two customers cause, one whose subscription renews and one who signs up.

Objects have all the fields that Stripe sends, in both shapes of the API, so that reading them costs what it costs.
Texts hold <old>, <new> and <n>: the two accounts, and the number of the pair, which makes ids unique.
"""

import json
import time
from typing import Any, Literal, NamedTuple

Json = dict[str, Any]
Shape = Literal["old", "new"]

VERSIONS: dict[Shape, str] = {"old": "2024-06-20", "new": "2026-10-28.endive"}
MONTH = 30 * 86400
PRICES = {"basic": 1000, "pro": 3000}  # cents; each sells as many credits
CARD: Json = {"request_three_d_secure": "automatic"} | dict.fromkeys(("installments", "mandate_options", "network"))
ADDRESS = {"country": "DE", "postal_code": "10115"} | dict.fromkeys(("city", "line1", "line2", "state"))


class Step(NamedTuple):
    """One event: what the table calls it, and its text."""

    name: str
    payload: str


def _list(url: str, *data: Json) -> Json:
    return {"object": "list", "data": list(data), "has_more": False, "total_count": len(data), "url": url}


def _fields(names: str) -> Json:
    return dict.fromkeys(names.split())


class Pair:
    """Two customers of one shape. Each verb tells of what it does by the events that the manual says to select."""

    def __init__(self, shape: Shape, now: int) -> None:
        self.shape, self.now = shape, now
        self.steps: list[Step] = []

    def tell(self, event_type: str, shown: Json, before: Json | None = None, name: str = "") -> None:
        """An event about an object, a second after the last one."""
        self.now += 1
        event = {
            "id": f"evt_<n>_{self.now}_{event_type}", "object": "event", "api_version": VERSIONS[self.shape],
            "created": self.now, "data": {"object": shown} | ({"previous_attributes": before} if before else {}),
            "livemode": False, "pending_webhooks": 1, "request": {"id": "req_1", "idempotency_key": None},
            "type": event_type,
        }  # fmt: skip
        self.steps.append(Step(name or event_type, json.dumps(event, indent=2)))

    # What happens ----------------------------------------------------------------------------------------------------

    def catalogue(self) -> None:
        """The prices become known."""
        for price in PRICES:
            self.tell("product.created", self.product(price))
            self.tell("price.created", self.price(price))

    def past(self) -> None:
        """The subscription that will be renewed began a month ago."""
        now, self.now = self.now, self.now - MONTH
        self.tell("customer.subscription.created", self.subscription("old", "basic", self.now))
        line = self.line("old", "1a", "basic", self.now, now)
        self.tell("invoice.paid", self.invoice("old", "1", "subscription_create", [line], 1000, paid=True))
        self.now = now

    def present(self) -> None:
        """A sign-up, a purchase and an upgrade of one customer; a renewal, a purchase and a refund of the other."""
        now, end = self.now, self.now + MONTH
        self.tell("customer.updated", self.customer("new"), {"invoice_settings": {"default_payment_method": None}})
        self.tell("payment_method.attached", self.card("new"))
        incomplete = self.subscription("new", "basic", now, status="incomplete")
        self.tell("customer.subscription.created", incomplete)
        self.tell("customer.subscription.updated", self.subscription("old", "basic", now), _fields("latest_invoice"))
        self.pay("new", "2", "subscription_create", [self.line("new", "2a", "basic", now, end)], 1000)
        started = {"status": "incomplete"}
        self.tell("customer.subscription.updated", self.subscription("new", "basic", now), started)
        checkout = self.session("new", "3", "subscription", subscription="sub_<n>_new", invoice="in_<n>_2")
        self.tell("checkout.session.completed", checkout, name="checkout.session.completed, subscription")
        self.pay("old", "4", "subscription_cycle", [self.line("old", "4a", "basic", now, end)], 1000)
        self.buy("new", "5")
        self.buy("old", "6")

        half = now + MONTH // 2
        changed = {"items": {"data": [{"price": self.price("basic")}]}}
        self.tell("customer.subscription.updated", self.subscription("new", "pro", now), changed)
        back = self.line("new", "7a", "basic", half, end, amount=-500)
        self.pay("new", "7", "subscription_update", [back, self.line("new", "7b", "pro", half, end, amount=1500)], 1000)
        self.refund("old", "6", 400)

    def pay(self, who: str, number: str, reason: str, lines: list[Json], amount: int) -> None:
        """An invoice is finalized and paid by card."""
        invoice = self.invoice(who, number, reason, lines, amount, paid=False)
        self.tell("invoice.finalized", invoice)
        self.charge_card(who, number, amount, invoice=f"in_<n>_{number}")
        invoice = self.invoice(who, number, reason, lines, amount, paid=True)
        self.tell("invoice.paid", invoice)
        self.tell("invoice.payment_succeeded", invoice)
        if self.shape == "new":
            self.tell("invoice_payment.paid", self.invoice_payment(number, amount))

    def buy(self, who: str, number: str) -> None:
        """A package is bought."""
        self.charge_card(who, number, 1000)
        session = self.session(who, number, "payment", payment_intent=f"pi_<n>_{number}")
        self.tell("checkout.session.completed", session, name="checkout.session.completed, package")

    def charge_card(self, who: str, number: str, amount: int, invoice: str | None = None) -> None:
        """A card is charged."""
        self.tell("charge.succeeded", self.charge(who, number, amount, invoice=invoice))
        self.tell("payment_intent.succeeded", self.intent(who, number, amount, invoice))

    def refund(self, who: str, number: str, amount: int) -> None:
        """A part of a purchase is given back."""
        shown = self.refunded(number, amount)
        self.tell("refund.created", shown)
        before = {"amount_refunded": 0, "receipt_url": None}
        self.tell("charge.refunded", self.charge(who, number, 1000, refunded=amount), before)
        self.tell("refund.updated", shown | {"receipt_number": "1234-5678"}, {"receipt_number": None})

    # What Stripe shows -----------------------------------------------------------------------------------------------

    def product(self, price: str) -> Json:
        """A product; the price says the credits."""
        return {
            "id": f"prod_{price}", "object": "product", "active": True, "attributes": [], "created": self.now,
            "default_price": f"price_{price}", "images": [], "livemode": False, "marketing_features": [],
            "metadata": {}, "name": price.title(), "type": "service", "updated": self.now, "url": None,
        } | _fields("description package_dimensions shippable statement_descriptor tax_code unit_label")  # fmt: skip

    def price(self, price: str) -> Json:
        """A monthly price."""
        return {
            "id": f"price_{price}", "object": "price", "active": True, "billing_scheme": "per_unit",
            "created": self.now, "currency": "usd", "livemode": False, "metadata": {"credits": str(PRICES[price])},
            "product": f"prod_{price}", "tax_behavior": "unspecified", "type": "recurring",
            "recurring": {"interval": "month", "interval_count": 1, "usage_type": "licensed",
                          **_fields("aggregate_usage meter trial_period_days")},
            "unit_amount": PRICES[price], "unit_amount_decimal": str(PRICES[price]),
        } | _fields("custom_unit_amount lookup_key nickname tiers_mode transform_quantity")  # fmt: skip

    def customer(self, who: str) -> Json:
        """A customer who has just given a card."""
        return {
            "id": f"cus_<n>_{who}", "object": "customer", "balance": 0, "created": self.now, "currency": "usd",
            "delinquent": False, "email": "somebody@example.com", "invoice_prefix": "D78833AC",
            "invoice_settings": {"default_payment_method": f"pm_<n>_{who}",
                                 **_fields("custom_fields footer rendering_options")},
            "livemode": False, "metadata": {"account_id": f"<{who}>"}, "name": "Some Body", "next_invoice_sequence": 2,
            "preferred_locales": ["de-DE"], "tax_exempt": "none",
        } | _fields("address default_source description discount phone shipping test_clock")  # fmt: skip

    def card(self, who: str) -> Json:
        """A customer's card."""
        return {
            "id": f"pm_<n>_{who}", "object": "payment_method", "allow_redisplay": "limited", "billing_details":
            {"address": ADDRESS, "email": "somebody@example.com", "name": "Some Body", "phone": None, "tax_id": None},
            "card": {"brand": "visa", "checks": _fields("address_line1_check address_postal_code_check cvc_check"),
                     "country": "US", "display_brand": "visa", "exp_month": 12, "exp_year": 2034, "funding": "credit",
                     "fingerprint": "Xt5EWLLDS7FJjR1c", "generated_from": None, "last4": "4242",
                     "networks": {"available": ["visa"], "preferred": None}, "regulated_status": "unregulated",
                     "three_d_secure_usage": {"supported": True}, "wallet": None},
            "created": self.now, "customer": f"cus_<n>_{who}", "livemode": False, "metadata": {}, "type": "card",
        }  # fmt: skip

    def subscription(self, who: str, price: str, start: int, status: str = "active") -> Json:
        """A subscription to one price."""
        period = {"current_period_start": start, "current_period_end": start + MONTH}
        item = {
            "id": f"si_<n>_{who}", "object": "subscription_item", "billing_thresholds": None, "created": start,
            "discounts": [], "metadata": {}, "price": self.price(price), "quantity": 1,
            "subscription": f"sub_<n>_{who}", "tax_rates": [], **(period if self.shape == "new" else {}),
        }  # fmt: skip
        return {
            "id": f"sub_<n>_{who}", "object": "subscription", "automatic_tax": {"enabled": False, "liability": None},
            "billing_cycle_anchor": start, "billing_mode": {"type": "flexible"}, "cancel_at_period_end": False,
            "cancellation_details": _fields("comment feedback reason"), "collection_method": "charge_automatically",
            "created": start, "currency": "usd", "customer": f"cus_<n>_{who}",
            "default_payment_method": f"pm_<n>_{who}", "default_tax_rates": [], "discounts": [],
            "invoice_settings": {"account_tax_ids": None, "issuer": {"type": "self"}},
            "items": _list(f"/v1/subscription_items?subscription=sub_<n>_{who}", item),
            "latest_invoice": f"in_<n>_{who}", "livemode": False, "metadata": {"account_id": f"<{who}>"},
            "payment_settings": {"payment_method_options": None, "payment_method_types": None,
                                 "save_default_payment_method": "off"},
            "start_date": start, "status": status,
            "trial_settings": {"end_behavior": {"missing_payment_method": "create_invoice"}},
            **(period if self.shape == "old" else {}),
        } | _fields(
            "application application_fee_percent billing_thresholds cancel_at canceled_at days_until_due default_source"
            " description ended_at next_pending_invoice_item_invoice on_behalf_of pause_collection pending_update"
            " pending_invoice_item_interval pending_setup_intent schedule test_clock transfer_data trial_end"
            " trial_start"
        )  # fmt: skip

    def line(self, who: str, number: str, price: str, start: int, end: int, amount: int | None = None) -> Json:
        """A line of an invoice; one with an amount of its own is a proration."""
        amount, proration = (PRICES[price], False) if amount is None else (amount, True)
        shown: Json = {
            "id": f"il_<n>_{number}", "object": "line_item", "amount": amount, "currency": "usd",
            "description": f"1 x {price.title()} (at ${PRICES[price] / 100:.2f} / month)", "discount_amounts": [],
            "discountable": True, "discounts": [], "livemode": False, "metadata": {},
            "period": {"start": start, "end": end}, "quantity": 1,
        }  # fmt: skip
        if self.shape == "old":
            return shown | {
                "plan": None, "price": self.price(price), "proration": proration,
                "proration_details": {"credited_items": None}, "subscription": f"sub_<n>_{who}",
                "subscription_item": f"si_<n>_{who}", "tax_amounts": [], "tax_rates": [], "type": "subscription",
            }  # fmt: skip
        details = {
            "invoice_item": None, "proration": proration, "proration_details": {"credited_items": None},
            "subscription": f"sub_<n>_{who}", "subscription_item": f"si_<n>_{who}",
        }  # fmt: skip
        parent = {"type": "subscription_item_details", "subscription_item_details": details}
        return shown | {
            "parent": parent | {"invoice_item_details": None}, "pretax_credit_amounts": [], "quantity_decimal": "1",
            "pricing": {"type": "price_details", "unit_amount_decimal": str(PRICES[price]),
                        "price_details": {"price": f"price_{price}", "product": f"prod_{price}"}},
            "subtotal": amount, "taxes": [],
        }  # fmt: skip

    def invoice(self, who: str, number: str, reason: str, lines: list[Json], amount: int, *, paid: bool) -> Json:
        """An invoice of a subscription, open or paid."""
        shown: Json = {
            "id": f"in_<n>_{number}", "object": "invoice", "account_country": "DE", "account_name": "Example",
            "amount_due": amount, "amount_paid": amount * paid, "amount_remaining": amount * (not paid),
            "amount_shipping": 0, "attempt_count": int(paid), "attempted": paid, "auto_advance": False,
            "automatic_tax": {"enabled": False, **_fields("disabled_reason liability provider status")},
            "billing_reason": reason, "collection_method": "charge_automatically", "created": self.now,
            "currency": "usd", "customer": f"cus_<n>_{who}", "customer_email": "somebody@example.com",
            "customer_name": "Some Body", "customer_tax_exempt": "none", "customer_tax_ids": [],
            "default_tax_rates": [], "discounts": [], "effective_at": self.now, "ending_balance": 0,
            "hosted_invoice_url": "https://invoice.stripe.com/i/acct_1/test_YWNjdF8x", "issuer": {"type": "self"},
            "invoice_pdf": "https://pay.stripe.com/invoice/acct_1/test_YWNjdF8x/pdf",
            "lines": _list(f"/v1/invoices/in_<n>_{number}/lines", *lines), "livemode": False, "metadata": {},
            "number": f"D78833AC-<n>-{number}", "payment_settings": _fields(
                "default_mandate payment_method_options payment_method_types"),
            "period_end": self.now, "period_start": self.now, "post_payment_credit_notes_amount": 0,
            "pre_payment_credit_notes_amount": 0, "starting_balance": 0, "status": "paid" if paid else "open",
            "status_transitions": {"finalized_at": self.now, "paid_at": self.now if paid else None,
                                   **_fields("marked_uncollectible_at voided_at")},
            "subtotal": amount, "subtotal_excluding_tax": amount, "total": amount, "total_discount_amounts": [],
            "total_excluding_tax": amount, "webhooks_delivered_at": self.now,
        } | _fields(
            "account_tax_ids application custom_fields customer_address customer_phone customer_shipping"
            " default_payment_method default_source description due_date footer from_invoice last_finalization_error"
            " latest_revision next_payment_attempt on_behalf_of receipt_number rendering shipping_cost shipping_details"
            " statement_descriptor test_clock"
        )  # fmt: skip
        told = {"account_id": f"<{who}>"}
        if self.shape == "old":
            return shown | {
                "charge": f"ch_<n>_{number}" if paid else None, "paid": paid, "paid_out_of_band": False,
                "payment_intent": f"pi_<n>_{number}", "subscription": f"sub_<n>_{who}",
                "subscription_details": {"metadata": told}, "tax": None, "total_tax_amounts": [],
            }  # fmt: skip
        source = {"metadata": told, "subscription": f"sub_<n>_{who}"}
        return shown | {
            "amount_overpaid": 0, "automatically_finalizes_at": None, "confirmation_secret": None,
            "parent": {"type": "subscription_details", "quote_details": None, "subscription_details": source},
            "total_pretax_credit_amounts": [], "total_taxes": [],
        }  # fmt: skip

    def invoice_payment(self, number: str, amount: int) -> Json:
        """What says which payment paid an invoice."""
        return {
            "id": f"inpay_<n>_{number}", "object": "invoice_payment", "amount_paid": amount,
            "amount_requested": amount, "created": self.now, "currency": "usd", "invoice": f"in_<n>_{number}",
            "is_default": True, "livemode": False, "status": "paid",
            "payment": {"type": "payment_intent", "payment_intent": f"pi_<n>_{number}"},
            "status_transitions": {"canceled_at": None, "paid_at": self.now},
        }  # fmt: skip

    def intent(self, who: str, number: str, amount: int, invoice: str | None) -> Json:
        """A payment that has succeeded."""
        return {
            "id": f"pi_<n>_{number}", "object": "payment_intent", "amount": amount, "amount_capturable": 0,
            "amount_details": {"tip": {}}, "amount_received": amount, "automatic_payment_methods": None,
            "capture_method": "automatic", "client_secret": f"pi_<n>_{number}_secret", "created": self.now,
            "confirmation_method": "automatic", "currency": "usd", "customer": f"cus_<n>_{who}",
            "latest_charge": f"ch_<n>_{number}", "livemode": False, "metadata": {}, "payment_method": f"pm_<n>_{who}",
            "payment_method_options": {"card": CARD}, "payment_method_types": ["card"], "status": "succeeded",
            **({"invoice": invoice} if self.shape == "old" else {}),
        } | _fields(
            "application application_fee_amount canceled_at cancellation_reason description last_payment_error"
            " next_action on_behalf_of processing receipt_email review setup_future_usage shipping statement_descriptor"
            " statement_descriptor_suffix transfer_data transfer_group"
        )  # fmt: skip

    def charge(self, who: str, number: str, amount: int, *, refunded: int = 0, invoice: str | None = None) -> Json:
        """A charge that has succeeded."""
        checks = {"address_line1_check": None, "address_postal_code_check": "pass", "cvc_check": "pass"}
        card = {
            "amount_authorized": amount, "brand": "visa", "checks": checks, "country": "US", "exp_month": 12,
            "exp_year": 2034, "fingerprint": "Xt5EWLLDS7FJjR1c", "funding": "credit", "last4": "4242",
            "network": "visa", "network_token": {"used": False}, "overcapture": {"maximum_amount_capturable": amount},
            **_fields("authorization_code installments mandate three_d_secure wallet"),
        }  # fmt: skip
        return {
            "id": f"ch_<n>_{number}", "object": "charge", "amount": amount, "amount_captured": amount,
            "amount_refunded": refunded, "balance_transaction": f"txn_<n>_{number}", "billing_details":
            {"address": ADDRESS, "email": "somebody@example.com", "name": "Some Body", "phone": None, "tax_id": None},
            "calculated_statement_descriptor": "EXAMPLE", "captured": True, "created": self.now, "currency": "usd",
            "customer": f"cus_<n>_{who}", "disputed": False, "fraud_details": {}, "livemode": False, "metadata": {},
            "outcome": {"network_status": "approved_by_network", "reason": None, "risk_level": "normal",
                        "risk_score": 12, "seller_message": "Payment complete.", "type": "authorized"},
            "paid": True, "payment_intent": f"pi_<n>_{number}", "payment_method": f"pm_<n>_{who}",
            "payment_method_details": {"card": card, "type": "card"}, "refunded": False, "status": "succeeded",
            "receipt_url": "https://pay.stripe.com/receipts/payment/CAcaFwoVYWNjdF8x",
            **({"invoice": invoice} if self.shape == "old" else {}),
        } | _fields(
            "application application_fee application_fee_amount description destination dispute failure_code"
            " failure_balance_transaction failure_message on_behalf_of order receipt_email receipt_number review"
            " shipping source source_transfer statement_descriptor statement_descriptor_suffix transfer_data"
            " transfer_group"
        )  # fmt: skip

    def refunded(self, number: str, amount: int) -> Json:
        """A refund."""
        card = {"reference_status": "pending", "reference_type": "acquirer_reference_number", "type": "refund"}
        return {
            "id": f"re_<n>_{number}", "object": "refund", "amount": amount,
            "balance_transaction": f"txn_<n>_re{number}",
            "charge": f"ch_<n>_{number}", "created": self.now, "currency": "usd", "metadata": {},
            "destination_details": {"card": card, "type": "card"}, "payment_intent": f"pi_<n>_{number}",
            "status": "succeeded",
        } | _fields("reason receipt_number source_transfer_reversal transfer_reversal")  # fmt: skip

    def session(self, who: str, number: str, mode: str, **made: str) -> Json:
        """A Checkout session that is complete and paid, of a package or of a subscription."""
        package = {"package": "starter"} if mode == "payment" else {}
        return {
            "id": f"cs_test_<n>_{number}", "object": "checkout.session", "adaptive_pricing": {"enabled": True},
            "amount_subtotal": 1000, "amount_total": 1000, "automatic_tax": {"enabled": False, **_fields(
                "liability provider status")}, "cancel_url": "https://example.com/credits",
            "client_reference_id": f"<{who}>", "created": self.now, "currency": "usd", "custom_fields": [],
            "custom_text": _fields("after_submit shipping_address submit terms_of_service_acceptance"),
            "customer": f"cus_<n>_{who}", "customer_details": {"address": ADDRESS, "email": "somebody@example.com",
            "name": "Some Body", "phone": None, "tax_exempt": "none", "tax_ids": []}, "discounts": [],
            "expires_at": self.now + 86400, "livemode": False, "metadata": {"account_id": f"<{who}>", **package},
            "mode": mode, "payment_method_collection": "if_required", "payment_method_options": {"card": CARD},
            "payment_method_types": ["card"], "payment_status": "paid", "phone_number_collection": {"enabled": False},
            "shipping_options": [], "status": "complete", "success_url": "https://example.com/thanks",
            "total_details": {"amount_discount": 0, "amount_shipping": 0, "amount_tax": 0}, "ui_mode": "hosted_page",
        } | _fields(
            "after_expiration allow_promotion_codes billing_address_collection client_secret collected_information"
            " consent consent_collection currency_conversion customer_creation customer_email invoice invoice_creation"
            " locale origin_context payment_intent payment_link permissions recovered_from saved_payment_method_options"
            " setup_intent shipping_address_collection shipping_cost submit_type subscription url wallet_options"
        ) | made  # fmt: skip


def steps(shape: Shape, *verbs: Literal["catalogue", "past", "present"]) -> list[Step]:
    """The events of some verbs of a pair of customers."""
    pair = Pair(shape, int(time.time()) - 3600)
    for verb in verbs:
        getattr(pair, verb)()
    return pair.steps
