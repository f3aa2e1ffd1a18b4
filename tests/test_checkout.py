"""Checkout and the portal: what Stripe is asked, once per key, and a purchase that its answer and its events meet."""

import json
from functools import partial
from itertools import permutations
from typing import Any

import pytest
from client import CreditsError
from ledger_support import HOUR, MINUTE, Ledger, assert_sound, committed, refused, same, session, together
from psycopg import Connection
from psycopg.types.json import Jsonb
from servers import Database
from stripe_params import problems

Json = dict[str, Any]
BACK = "http://localhost:3000/thanks?session={CHECKOUT_SESSION_ID}"
COMPLETED, SUCCEEDED = "checkout.session.completed", "checkout.session.async_payment_succeeded"
FAILED, EXPIRED = "checkout.session.async_payment_failed", "checkout.session.expired"
WORDS = ("answer", COMPLETED, SUCCEEDED)
URL = "https://checkout.stripe.com/c/pay/cs_1"


def prepare(ledger: Ledger) -> None:
    """The demo catalogue with a plan that Stripe sells at two prices, and two accounts."""
    ledger.load_demo_catalog()
    ledger.change("update credits.plans set stripe_price_ids = '{price_old,price_team}' where code = 'team'")
    ledger.open_account("alpha", email="alpha@example.com")
    ledger.open("beta")


@pytest.fixture
def ledger(conn: Connection[Any]) -> Ledger:
    """A shop, and nobody has bought anything."""
    ledger = Ledger(conn)
    prepare(ledger)
    return ledger


def bind(ledger: Ledger, customer_id: str = "cus_1") -> None:
    """Alpha has a customer at Stripe."""
    shown = {"id": customer_id, "object": "customer", "metadata": {"account_id": "alpha"}}
    assert ledger.tell("customer.created", shown) == "applied"


def check_out(ledger: Ledger, **more: Any) -> Any:
    """Alpha wants the starter package, or what is named, under one key."""
    what = {} if "plan" in more else {"package": "starter"}
    return ledger.create_checkout("alpha", **{"success_url": BACK, "key": "k", **what, **more})


def requests(ledger: Ledger) -> list[Any]:
    """What Stripe was asked."""
    return ledger.table("stripe_requests", "true order by request_id")


def asked(ledger: Ledger, **more: Any) -> Json:
    """The parameters of the one request that a checkout has made, checked against Stripe's own types."""
    row = check_out(ledger, **more)
    (request,) = [request for request in requests(ledger) if request.purpose == "checkout"]
    assert (row.request_id, row.state, row.url, row.replayed) == (request.request_id, "queued", None, False)
    assert (request.method, request.path, request.account_id) == ("post", "/v1/checkout/sessions", "alpha")
    assert problems(request.method, request.path, request.params) == []
    params: Json = request.params
    return params


def named(ledger: Ledger) -> Json:
    """The metadata that Stripe was given."""
    metadata: Json = requests(ledger)[0].params["metadata"]
    return metadata


def opened(ledger: Ledger, **changes: Any) -> Json:
    """The session as Stripe answers it at first."""
    ends = int((ledger.now + 24 * HOUR).timestamp())
    return session(
        **{"status": "open", "payment_status": "unpaid", "payment_intent": None, "customer": None, "url": URL,
           "expires_at": ends, "metadata": named(ledger), **changes}
    )  # fmt: skip


def paid(ledger: Ledger, **changes: Any) -> Json:
    """The session when the buyer is through."""
    return session(**{"url": None, "metadata": named(ledger), **changes})


def answer(ledger: Ledger, body: Json, status: int = 200) -> str:
    """Stripe answers the request for a session; its state afterwards."""
    request = requests(ledger)[0]
    state: str = ledger.complete_stripe_request(request.request_id, status, json.dumps(body)).state
    return state


# What is asked ------------------------------------------------------------------------------------------------------


def test_a_package_is_asked_for_with_all_that_its_events_will_need(ledger: Ledger) -> None:
    params = asked(ledger, cancel_url="http://localhost:3000/shop", quantity=2, metadata=Jsonb({"campaign": "may"}))
    (checkout,) = ledger.table("checkouts")
    (purchase,) = ledger.table("purchases")
    metadata = {
        "campaign": "may", "account_id": "alpha", "package": "starter", "quantity": "2",
        "checkout_id": checkout.checkout_id, "purchase_id": str(purchase.purchase_id),
    }  # fmt: skip
    assert params == {
        "mode": "payment",
        "success_url": BACK,
        "cancel_url": "http://localhost:3000/shop",
        "client_reference_id": "alpha",
        "customer_email": "alpha@example.com",
        "line_items": [
            {"price_data": {"currency": "usd", "unit_amount": 1000, "product_data": {"name": "Starter"}}, "quantity": 2}
        ],
        "metadata": metadata,
        "payment_intent_data": {"metadata": metadata},
    }
    assert (purchase.status, purchase.quantity, purchase.credits, purchase.amount) == ("pending", 2, 2000, 2000)
    assert (checkout.purchase_id, checkout.session_id) == (purchase.purchase_id, None)


def test_a_card_is_kept_and_codes_are_taken_if_the_caller_says_so(ledger: Ledger) -> None:
    params = asked(ledger, save_card=True, allow_promotion_codes=True)
    assert (params["customer_creation"], params["allow_promotion_codes"]) == ("always", True)
    assert params["payment_intent_data"]["setup_future_usage"] == "off_session"


def test_the_bound_customer_is_named_and_no_other_is_made(ledger: Ledger) -> None:
    bind(ledger)
    params = asked(ledger, save_card=True)
    assert params["customer"] == "cus_1"
    assert not {"customer_email", "customer_creation"} & set(params)


@pytest.mark.parametrize(
    ("columns", "item"),
    [
        ("stripe_price_id = 'price_1'", {"price": "price_1"}),
        (
            "stripe_product_id = 'prod_1'",
            {"price_data": {"currency": "usd", "unit_amount": 1000, "product": "prod_1"}},
        ),
    ],
    ids=["price", "product"],
)
def test_what_stripe_knows_of_a_package_is_named(ledger: Ledger, columns: str, item: Json) -> None:
    ledger.change(f"update credits.packages set {columns} where code = 'starter'")
    assert asked(ledger)["line_items"] == [{**item, "quantity": 1}]


@pytest.mark.parametrize(("more", "price"), [({}, "price_team"), ({"price_id": "price_old"}, "price_old")])
def test_a_plan_is_asked_for_at_its_price(ledger: Ledger, more: Json, price: str) -> None:
    params = asked(ledger, plan="team", save_card=True, **more)
    (checkout,) = ledger.table("checkouts")
    metadata = {"account_id": "alpha", "plan": "team", "quantity": "1", "checkout_id": checkout.checkout_id}
    assert params == {
        "mode": "subscription",
        "success_url": BACK,
        "client_reference_id": "alpha",
        "customer_email": "alpha@example.com",
        "line_items": [{"price": price, "quantity": 1}],
        "metadata": metadata,
        "subscription_data": {"metadata": metadata},
    }
    assert ledger.table("purchases") == []


def test_what_is_not_for_sale_is_not_found(ledger: Ledger) -> None:
    ledger.change("update credits.packages set active = false where code = 'pro'")
    with ledger.unchanged():
        with refused(404, "package_not_found", package="pro"):
            check_out(ledger, package="pro")
        with refused(404, "price_not_found", plan="free"):
            check_out(ledger, plan="free")
        with refused(404, "price_not_found", plan="team", price_id="price_other"):
            check_out(ledger, plan="team", price_id="price_other")


def test_nothing_is_sold_at_a_price_that_the_catalogue_has_withdrawn(ledger: Ledger) -> None:
    plan = {"name": "Team", "prices": [{"amount": 900, "currency": "usd"}]}
    ledger.apply_catalog({"plans": {"team": plan}})
    ledger.change("update credits.plan_prices set stripe_price_id = 'price_900' where plan = 'team'")  # as published
    ledger.change("update credits.plans set stripe_price_ids = '{price_900}' where code = 'team'")
    ledger.create_checkout("alpha", plan="team", price_id="price_900", success_url=BACK, key="before")
    ledger.apply_catalog({"plans": {"team": {**plan, "prices": []}}})
    for price in ({}, {"price_id": "price_900"}):
        with ledger.unchanged(), refused(404, "price_not_found", plan="team", **price):
            check_out(ledger, plan="team", **price)


def test_a_frozen_account_may_buy_and_a_closed_one_may_not(ledger: Ledger) -> None:
    ledger.freeze_account("alpha")
    assert check_out(ledger).state == "queued"
    ledger.set_status("closed", "alpha")
    assert check_out(ledger).replayed is True
    with ledger.unchanged(), refused(423, "account_closed"):
        check_out(ledger, key="another")


def test_whoever_has_a_subscription_at_stripe_changes_it(ledger: Ledger) -> None:
    shown = {"id": "sub_1", "object": "subscription", "customer": "cus_1", "metadata": {"account_id": "alpha"}}
    ledger.tell("customer.subscription.created", {**shown, "status": "incomplete"})
    assert check_out(ledger, plan="team", key="first").state == "queued"
    ledger.tell("customer.subscription.updated", {**shown, "status": "active"})
    with refused(409, "already_subscribed", state="active"):
        check_out(ledger, plan="team", key="second")


@pytest.mark.parametrize(
    ("allowed", "url", "passes"),
    [
        (None, "http://localhost:8080/", True),
        (None, "http://127.0.0.1:3000", True),
        (None, "http://localhost/done", True),
        (None, "https://example.com/done", False),
        (None, "http://localhost.example.com/", False),
        (None, "http://localhost-80.example.com/", False),
        ([], "http://localhost:8080/", False),
        (["https://example.com"], "https://example.com/a?b={CHECKOUT_SESSION_ID}#c", True),
        (["https://example.com"], "https://example.com", True),
        (["https://example.com"], "https://example.com.evil.test/", False),
        (["https://example.com"], "https://example.com:8443/", False),
        (["https://example.com"], "http://example.com/", False),
        (["https://example.com/shop"], "https://example.com/shop/done", True),
        (["https://example.com/shop"], "https://example.com/shopping", False),
        (["https://example.com/shop/"], "https://example.com/shop/done", True),
        (["https://example.com:*/shop"], "https://example.com:8443/shop", True),
        (["https://", "", 1, None, {}], "https://example.com/", False),
        ("https://example.com", "https://example.com/", False),
    ],
)
def test_people_are_sent_back_to_allowed_addresses_only(
    ledger: Ledger, allowed: Any, url: str, *, passes: bool
) -> None:
    if allowed is not None:
        ledger.change("update credits.settings set value = %s where name = 'allowed_redirect_urls'", Jsonb(allowed))
    if passes:
        assert check_out(ledger, success_url=url).state == "queued"
        return
    with ledger.unchanged():
        for argument in ("success_url", "cancel_url"):
            with refused(400, "redirect_not_allowed", setting="allowed_redirect_urls"):
                check_out(ledger, **{"success_url": url, argument: url})


# Once per key -------------------------------------------------------------------------------------------------------


def test_the_same_key_is_the_same_session(ledger: Ledger) -> None:
    first = check_out(ledger)
    with ledger.unchanged():
        assert same(first, check_out(ledger))
        assert ledger.get_checkout("alpha", "k") == first._replace(replayed=True)
    assert answer(ledger, opened(ledger)) == "done"
    done = check_out(ledger)
    assert (done.state, done.session_id, done.url) == ("done", "cs_1", URL)
    assert (done.purchase_id, done.expires_at) == (first.purchase_id, ledger.now + 24 * HOUR)
    assert ledger.get_checkout("alpha", "k") == done
    ledger.change("update credits.packages set active = false")
    assert check_out(ledger) == done


def test_a_key_with_other_arguments_is_a_conflict(ledger: Ledger) -> None:
    check_out(ledger)
    other = ({"quantity": 2}, {"package": "pro"}, {"save_card": True}, {"metadata": Jsonb({"a": "b"})})
    with ledger.unchanged():
        for more in other:
            with refused(409, "idempotency_conflict", key="k"):
                check_out(ledger, **more)
    assert ledger.create_checkout("beta", package="pro", success_url=BACK, key="k").replayed is False


def test_an_account_asks_for_so_many_sessions_an_hour(ledger: Ledger) -> None:
    bind(ledger)
    ledger.set_setting("checkouts_per_hour", 2)
    start = ledger.now
    first = check_out(ledger)
    ledger.now += MINUTE
    portal(ledger)
    full = {"limit": 2, "used": 2, "required": 1, "resets_at": (start + HOUR).isoformat()}
    for asks in (partial(check_out, key="2"), partial(check_out, key="2", plan="team"), partial(portal, key="2")):
        with ledger.unchanged(), refused(429, "rate_limited", **full):
            asks(ledger)
    assert same(first, check_out(ledger))  # what it was given is still there
    ledger.create_checkout("beta", package="starter", success_url=BACK, key="2")
    ledger.now = start + HOUR
    check_out(ledger, key="2")
    ledger.set_setting("checkouts_per_hour", 0)
    with refused(429, "rate_limited", used=2, resets_at=None):
        check_out(ledger, key="3")


def test_a_session_that_has_expired_says_so(ledger: Ledger) -> None:
    check_out(ledger)
    answer(ledger, opened(ledger))
    ledger.now += 24 * HOUR
    late = check_out(ledger)
    assert (late.state, late.url, late.session_id) == ("expired", None, "cs_1")
    ledger.tell(EXPIRED, opened(ledger, status="expired", url=None))
    assert check_out(ledger).state == "expired"
    assert [row.status for row in ledger.table("purchases")] == ["expired"]
    assert check_out(ledger, key="another").state == "queued"


def test_what_stripe_refuses_is_told_and_the_purchase_has_failed(ledger: Ledger) -> None:
    check_out(ledger)
    error = {"type": "invalid_request_error", "code": "url_invalid", "param": "success_url", "message": "Not a URL"}
    assert answer(ledger, {"error": error}, 400) == "failed"
    row = check_out(ledger)
    assert (row.state, row.url, row.error) == ("failed", None, {**error, "status": 400})
    assert [row.status for row in ledger.table("purchases")] == ["failed"]


def test_a_customer_that_was_deleted_unheard_is_named_once_more_and_never_again(ledger: Ledger) -> None:
    bind(ledger)
    assert asked(ledger)["customer"] == "cus_1"
    refusal = {"type": "invalid_request_error", "code": "resource_missing", "param": "customer"}
    ledger.complete_stripe_request(requests(ledger)[-1].request_id, 400, json.dumps({"error": refusal}))
    assert check_out(ledger).state == "failed"
    ledger.now += MINUTE
    (look,) = ledger.claim_stripe_requests()
    assert (look.method, look.path) == ("get", "/v1/customers/cus_1")
    gone = {"id": "cus_1", "object": "customer", "deleted": True}
    ledger.complete_stripe_request(look.request_id, 200, json.dumps(gone))
    check_out(ledger, key="another", save_card=True)
    params = requests(ledger)[-1].params
    assert ("customer" in params, params["customer_creation"]) == (False, "always")


def test_a_request_that_is_tried_again_is_still_queued(ledger: Ledger) -> None:
    check_out(ledger)
    assert answer(ledger, {"error": {"type": "api_error"}}, 500) == "queued"
    assert (check_out(ledger).state, check_out(ledger).error) == ("queued", None)


def test_a_checkout_that_was_never_asked_for_is_not_found(ledger: Ledger) -> None:
    with refused(404, "checkout_not_found", key="k"):
        ledger.get_checkout("alpha", "k")


# Answers and events -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "steps",
    [
        *(order for n in (1, 2, 3) for order in permutations(WORDS, n) if order != ("answer",)),
        ("answer", COMPLETED, COMPLETED, "answer"),
        ("answer", EXPIRED, COMPLETED),
        (FAILED, "answer", SUCCEEDED),
    ],
    ids=" ".join,
)
def test_answer_and_events_end_in_one_purchase_in_any_order(ledger: Ledger, steps: tuple[str, ...]) -> None:
    first = check_out(ledger)
    unpaid = {"payment_status": "unpaid", "payment_intent": None}
    for step in steps:
        if step == "answer":
            answer(ledger, opened(ledger))
        elif step == EXPIRED:
            assert ledger.tell(step, opened(ledger, status="expired", url=None)) == "applied"
        else:
            assert ledger.tell(step, paid(ledger, **unpaid if step == FAILED else {})) == "applied"
    (purchase,) = ledger.table("purchases")
    assert (purchase.purchase_id, purchase.status) == (first.purchase_id, "completed")
    assert (purchase.stripe_session_id, purchase.stripe_payment_intent_id, purchase.stripe_customer_id) == (
        "cs_1", "pi_1", "cus_1",
    )  # fmt: skip
    assert ledger.available() == 1000
    last = ledger.get_checkout("alpha", "k")
    assert (last.state, last.url, last.session_id) == ("complete", None, "cs_1")
    assert_sound(ledger)


def test_a_purchase_goes_from_pending_over_processing_to_its_end(ledger: Ledger) -> None:
    check_out(ledger)
    seen = []
    for step in ("", "answer", COMPLETED, "answer again", FAILED):
        if step.startswith("answer"):
            answer(ledger, opened(ledger))
        elif step:
            ledger.tell(step, paid(ledger, payment_status="unpaid"))
        seen += [row.status for row in ledger.table("purchases")]
    assert seen == ["pending", "pending", "processing", "processing", "failed"]
    assert ledger.available() == 0


def test_the_price_that_was_shown_is_the_price_that_counts(ledger: Ledger) -> None:
    check_out(ledger)
    ledger.change("update credits.packages set price = 2000, credits = 1 where code = 'starter'")
    assert ledger.tell(COMPLETED, paid(ledger)) == "applied"
    assert ledger.available() == 1000


def test_a_session_of_another_account_meets_no_purchase_of_ours(ledger: Ledger) -> None:
    check_out(ledger)
    metadata = {**named(ledger), "account_id": "beta"}
    assert ledger.tell(COMPLETED, paid(ledger, metadata=metadata)) == "applied"
    rows = [(row.account_id, row.status) for row in ledger.table("purchases", "true order by account_id")]
    assert rows == [("alpha", "pending"), ("beta", "completed")]


def test_a_second_session_of_one_checkout_is_a_purchase_of_its_own(ledger: Ledger) -> None:
    check_out(ledger)
    ledger.tell(COMPLETED, paid(ledger))
    ledger.tell(COMPLETED, paid(ledger, session_id="cs_2", payment_intent="pi_2"))
    assert sorted(row.stripe_session_id for row in ledger.table("purchases")) == ["cs_1", "cs_2"]
    assert ledger.get_checkout("alpha", "k").session_id == "cs_1"
    assert_sound(ledger)


def test_what_stripe_reports_of_discounts_and_tax_is_kept(ledger: Ledger) -> None:
    check_out(ledger, allow_promotion_codes=True)
    details: Json = {"amount_discount": 300, "amount_tax": 133}
    discounts = [{"coupon": "co_1", "promotion_code": {"id": "promo_1", "object": "promotion_code"}}]
    ledger.tell(COMPLETED, paid(ledger, amount_total=833, total_details=details, discounts=discounts))
    (row,) = ledger.table("purchases")
    assert (row.amount_subtotal, row.amount_discount, row.amount_tax, row.amount) == (1000, 300, 133, 833)
    assert (row.coupons, row.promotion_codes) == (["co_1"], ["promo_1"])
    expanded = {"discounts": [{"amount": 300, "discount": {"source": {"coupon": "co_2"}, "promotion_code": None}}]}
    details = {**details, "breakdown": expanded}
    ledger.tell(COMPLETED, session("cs_2", amount_total=833, total_details=details, payment_intent="pi_2"))
    (row,) = ledger.table("purchases", "stripe_session_id = 'cs_2'")
    assert (row.coupons, row.promotion_codes, row.amount_discount) == (["co_2"], [], 300)


def test_a_subscription_is_complete_when_its_session_is(ledger: Ledger) -> None:
    check_out(ledger, plan="team")
    answer(ledger, opened(ledger, mode="subscription"))
    assert check_out(ledger, plan="team").state == "done"
    shown = paid(ledger, mode="subscription", subscription="sub_1", payment_intent=None)
    assert ledger.tell(COMPLETED, shown) == "applied"
    assert (check_out(ledger, plan="team").state, ledger.table("purchases")) == ("complete", [])


def awaited(ledger: Ledger) -> Any:
    """What the transaction tells whoever holds the connection to wait for."""
    (row,) = ledger.query("select nullif(current_setting('credits.await', true), '')::jsonb as told")
    return row.told


def test_a_call_tells_what_to_wait_for_until_stripe_has_answered(ledger: Ledger) -> None:
    assert awaited(ledger) is None
    first = check_out(ledger)
    told = {
        "request_id": first.request_id, "function": "get_checkout", "arguments": {"account_id": "alpha", "key": "k"},
    }  # fmt: skip
    for call in (partial(check_out, ledger), partial(ledger.get_checkout, "alpha", "k")):
        assert awaited(ledger) == told
        ledger.query("select set_config('credits.await', '', true)")
        call()
    assert awaited(ledger) == told
    ledger.query("select set_config('credits.await', '', true)")
    assert answer(ledger, opened(ledger)) == "done"
    check_out(ledger)
    ledger.get_checkout("alpha", "k")
    assert awaited(ledger) is None


# The portal ---------------------------------------------------------------------------------------------------------


def portal(ledger: Ledger, **more: Any) -> Any:
    """Alpha wants to see the portal, under one key."""
    return ledger.create_portal_session("alpha", **{"return_url": "http://localhost:3000", "key": "k", **more})


def test_the_portal_is_asked_for_and_open_for_five_minutes(ledger: Ledger) -> None:
    bind(ledger)
    first = portal(ledger)
    (request,) = requests(ledger)
    assert (request.purpose, request.method, request.path) == ("portal", "post", "/v1/billing_portal/sessions")
    assert request.params == {"customer": "cus_1", "return_url": "http://localhost:3000"}
    assert problems(request.method, request.path, request.params) == []
    assert (first.state, first.url, first.purchase_id) == ("queued", None, None)
    assert same(first, portal(ledger))
    assert ledger.get_portal_session("alpha", "k") == portal(ledger)
    assert awaited(ledger) == {
        "request_id": first.request_id, "function": "get_portal_session",
        "arguments": {"account_id": "alpha", "key": "k"},
    }  # fmt: skip
    shown = {
        "id": "bps_1",
        "object": "billing_portal.session",
        "customer": "cus_1",
        "url": "https://billing.stripe.com/1",
    }
    assert answer(ledger, shown) == "done"
    done = portal(ledger)
    assert ledger.get_portal_session("alpha", "k") == done
    assert (done.state, done.session_id, done.url) == ("done", "bps_1", "https://billing.stripe.com/1")
    assert done.expires_at == ledger.now + 5 * MINUTE
    with refused(409, "idempotency_conflict"):
        portal(ledger, return_url="http://localhost:3000/other")
    with refused(404, "checkout_not_found"):
        ledger.get_checkout("alpha", "k")
    ledger.now += 5 * MINUTE
    assert (portal(ledger).state, portal(ledger).url) == ("expired", None)


def test_a_portal_session_that_is_asked_for_again_is_that_of_its_key(ledger: Ledger) -> None:
    bind(ledger)
    visit = partial(ledger.create_portal_session, "alpha", "http://localhost/account", key="visit")
    number = visit().request_id
    ledger.complete_stripe_request(number, 400, json.dumps({"error": {"message": "No configuration provided"}}))
    assert visit().state == "failed"
    number = ledger.retry_stripe_request(number).request_id
    assert (visit().state, visit().request_id) == ("queued", number)
    shown = {"id": "bps_1", "object": "billing_portal.session", "url": "https://billing.stripe.com/p/1"}
    ledger.complete_stripe_request(number, 200, json.dumps(shown))
    assert (visit().state, visit().url) == ("done", shown["url"])


def test_the_portal_needs_a_customer_and_an_allowed_address(ledger: Ledger) -> None:
    with refused(404, "customer_not_found", account_id="alpha"):
        portal(ledger)
    with refused(400, "redirect_not_allowed", argument="return_url"):
        portal(ledger, return_url="https://example.com")


# Many at once -------------------------------------------------------------------------------------------------------


def test_many_that_check_out_with_one_key_ask_once(database: Database) -> None:
    with committed(database) as ledger:
        prepare(ledger)
        rows = together(database, [check_out] * 10)
        assert sorted(row.replayed for row in rows) == [False] + [True] * 9
        assert len({row[:-1] for row in rows}) == 1
        assert (len(requests(ledger)), len(ledger.table("purchases"))) == (1, 1)
        first, *_ = requests(ledger)
        shown = [json.dumps(opened(ledger)), json.dumps(paid(ledger))]
        event = {"id": "evt_1", "type": COMPLETED, "created": 1, "data": {"object": json.loads(shown[1])}}
        jobs = [
            partial(Ledger.complete_stripe_request, request_id=first.request_id, status=200, body=shown[0]),
            partial(Ledger.receive_stripe_event, endpoint="default", payload=json.dumps(event)),
        ] * 4
        assert not [row for row in together(database, jobs) if isinstance(row, CreditsError)]
        assert [row.status for row in ledger.table("purchases")] == ["completed"]
        assert ledger.available() == 1000
        assert_sound(ledger)
