"""Names that existing systems call do what they say: validated spends, credits for an invoice, customers of Stripe."""

import json
from calendar import monthrange
from collections.abc import Callable
from datetime import timedelta
from decimal import Decimal
from functools import partial
from typing import Any

import pytest
from client import CreditsError
from ledger_support import DAY, HOUR, MINUTE, NOON, Ledger, assert_sound, committed, refused, same, together
from psycopg import Connection
from psycopg.errors import LockNotAvailable
from psycopg.types.json import Jsonb
from servers import Database

Json = dict[str, Any]
BEGAN = int(NOON.timestamp())
WAITING = "select 1 from pg_stat_activity where datname = current_database() and wait_event_type = 'Lock'"
ENDS = NOON + 28 * DAY  # the month that the subscription has paid for


def subscription(status: str = "active", **changes: Any) -> Json:
    """A subscription of Stripe, monthly, which alpha pays for."""
    return {
        "id": "sub_1", "object": "subscription", "status": status, "customer": "cus_1", "created": BEGAN,
        "billing_cycle_anchor": BEGAN, "current_period_start": BEGAN, "current_period_end": int(ENDS.timestamp()),
        "metadata": {"account_id": "alpha"}, "items": {"data": [{"id": "si_1", "quantity": 1, "price": "price_1"}]},
        **changes,
    }  # fmt: skip


def price(says: str | None) -> Json:
    """A monthly price of $10.00, and the credits that its metadata says."""
    metadata = {"credits": says} if says else {}
    return {
        "id": "price_1", "object": "price", "unit_amount": 1000, "metadata": metadata,
        "recurring": {"interval": "month", "interval_count": 1, "usage_type": "licensed"},
    }  # fmt: skip


def end_of(month: int) -> int:
    """The last day of a month at noon, when a subscription that began on the 31st renews."""
    return int(NOON.replace(month=month, day=monthrange(NOON.year, month)[1]).timestamp())


def invoice(says: str | None = "1000", month: int = 1, **changes: Any) -> Json:
    """A paid invoice of that subscription, written in that month; its price says how many credits it brings."""
    line = {
        "id": "il_1", "object": "line_item", "amount": 1000, "quantity": 1, "price": price(says),
        "subscription": "sub_1", "subscription_item": "si_1", "proration": False,
        "period": {"start": end_of(month), "end": end_of(month + 1)},
    }  # fmt: skip
    return {
        "id": "in_1", "object": "invoice", "status": "paid", "paid": True, "customer": "cus_1", "subscription": "sub_1",
        "created": BEGAN, "total": 1000, "amount_paid": 1000, "currency": "usd", "attempt_count": 1,
        "payment_intent": "pi_1", "lines": {"data": [line], "has_more": False}, **changes,
    }  # fmt: skip


def customer(**changes: Any) -> Json:
    """A customer of Stripe that names nobody."""
    return {"id": "cus_1", "object": "customer", "email": "alpha@example.com", "metadata": {}, **changes}


def tell(ledger: Ledger, event_type: str, shown: Json, after: timedelta = timedelta(0)) -> str:
    """Stripe tells of an object; the outcome."""
    event = {
        "id": f"evt_{shown['id']}_{event_type}_{after}", "object": "event", "type": event_type, "livemode": False,
        "created": BEGAN + int(after.total_seconds()), "data": {"object": shown},
    }  # fmt: skip
    outcome: str = ledger.receive_stripe_event("default", json.dumps(event)).outcome
    return outcome


def subscribe(ledger: Ledger, status: str = "active") -> None:
    """Stripe tells of a new subscription of alpha."""
    assert tell(ledger, "customer.subscription.created", subscription(status)) == "applied"


def move(ledger: Ledger, status: str) -> None:
    """Stripe tells that its status is another."""
    assert tell(ledger, "customer.subscription.updated", subscription(status), after=MINUTE) == "applied"


def bind(ledger: Ledger, customer_id: str = "cus_1", account_id: str = "alpha") -> None:
    """Stripe tells of a customer whose metadata name the account."""
    shown = customer(id=customer_id, metadata={"account_id": account_id})
    assert tell(ledger, "customer.created", shown) == "applied"


@pytest.fixture
def ledger(conn: Connection[Any]) -> Ledger:
    """The account alpha with 100 credits, beta with none."""
    ledger = Ledger(conn)
    ledger.load_demo_catalog()
    ledger.open("alpha", 100)
    ledger.open("beta")
    return ledger


# use_credits_validated -----------------------------------------------------------------------------------------------


def use(ledger: Ledger, amount: Any = 10, account_id: str | None = "alpha", **metadata: Any) -> Any:
    """A validated spend."""
    arguments = {"description": "a story", "metadata": Jsonb(metadata or None) if metadata else None}
    return ledger.row("use_credits_validated", user_id=account_id, amount=amount, **arguments)


def test_credits_are_used_and_the_state_is_told(ledger: Ledger) -> None:
    subscribe(ledger)
    row = use(ledger, 10, book="42")
    assert (row.account_id, row.amount, row.balance, row.available, row.replayed) == ("alpha", -10, 90, 90, False)
    assert (row.state, row.subscription["status"], row.subscription["cached"]) == ("active", "active", False)
    (entry, _) = ledger.history("alpha")
    assert (entry.kind, entry.key, entry.description) == ("spend", row.key, "a story")
    assert entry.metadata == {"book": "42"}
    assert use(ledger).subscription["cached"] is True
    assert_sound(ledger)


def test_an_account_without_a_subscription_spends_what_it_has(ledger: Ledger) -> None:
    row = use(ledger)
    assert (row.state, row.available) == ("none", 90)


@pytest.mark.parametrize("name", ["key", "idempotency_key"])
def test_the_key_in_the_metadata_makes_a_retry_the_same_spend(ledger: Ledger, name: str) -> None:
    first = use(ledger, 10, **{name: "k"})
    again = use(ledger, 10, **{name: "k"})
    assert (first.key, first.subscription.pop("cached"), again.subscription.pop("cached")) == ("k", False, True)
    assert same(first, again)
    with refused(409, "idempotency_conflict", operation="spend", key="k"):
        use(ledger, 11, **{name: "k"})
    assert ledger.available() == 90


def test_of_two_keys_the_one_with_the_longer_name_counts(ledger: Ledger) -> None:
    assert use(ledger, key="feature", idempotency_key="k").key == "k"


def test_without_a_key_a_retry_is_a_second_spend(ledger: Ledger) -> None:
    assert use(ledger).key != use(ledger).key
    assert ledger.available() == 80


def test_what_the_state_allows_is_what_its_row_says(ledger: Ledger) -> None:
    subscribe(ledger)
    states = ledger.table("subscription_states")
    assert {row.may_spend for row in states} == {True, False}
    for row in states:
        ledger.change("update credits.subscriptions set state = %s", row.state)
        with ledger.conn.transaction(force_rollback=True):
            if row.may_spend:
                assert use(ledger).state == row.state
            else:
                with ledger.unchanged(), refused(403, "subscription_inactive", state=row.state, account_id="alpha"):
                    use(ledger)


@pytest.mark.parametrize("status", ["unpaid", "paused"])
def test_an_inactive_subscription_refuses_and_is_told_apart(ledger: Ledger, status: str) -> None:
    subscribe(ledger)
    first = use(ledger, key="k")
    move(ledger, status)
    with ledger.unchanged(), refused(403, "subscription_inactive", state=status, status=status, plan=None):
        use(ledger, key="another")
    again = use(ledger, key="k")
    assert (again.replayed, again.entry_seq, again.state) == (True, first.entry_seq, status)


def test_past_due_spends_until_its_grace_is_over(ledger: Ledger) -> None:
    subscribe(ledger)
    ledger.now += HOUR
    move(ledger, "past_due")
    ledger.now = NOON + MINUTE + 7 * DAY - MINUTE
    assert use(ledger).state == "past_due"
    ledger.now += MINUTE
    with refused(403, "subscription_inactive", state="past_due", grace_until="2030-02-07T12:01:00+00:00"):
        use(ledger)


def test_it_refuses_as_spend_does(ledger: Ledger) -> None:
    with ledger.unchanged():
        with refused(402, "insufficient_credits", required=101, available=100):
            use(ledger, 101)
        with refused(404, "account_not_found"):
            use(ledger, 1, "nobody")
        with refused(400, "invalid_request", argument="account_id"):
            use(ledger, 1, None)
        with refused(422, "invalid_amount"):
            use(ledger, 0)
        with refused(400, "invalid_request", argument="key"):
            use(ledger, 1, key="")
        with refused(400, "invalid_request", argument="metadata"):
            ledger.row("use_credits_validated", user_id="alpha", amount=1, metadata=Jsonb([]))
    ledger.freeze_account("alpha")
    with refused(423, "account_frozen"):
        use(ledger, 1)


def test_many_at_once_never_oversell_and_one_key_spends_once(database: Database) -> None:
    with committed(database) as ledger:
        ledger.open("alpha", 10)
        results = together(database, [partial(use, amount=1)] * 16)
        done = [row for row in results if not isinstance(row, CreditsError)]
        assert len(done) == len({row.key for row in done}) == 10
        assert {error.code for error in results if isinstance(error, CreditsError)} == {"insufficient_credits"}
        ledger.grant(100)
        results = together(database, [partial(use, amount=7, key="k")] * 8)
        assert sorted(row.replayed for row in results) == [False] + [True] * 7
        assert ledger.available() == 93
        assert_sound(ledger)


def test_a_spend_that_waits_for_the_account_sees_the_state_that_comes_out(database: Database) -> None:
    with committed(database) as ledger, database.connect() as other, database.admin() as admin:
        ledger.open("alpha", 10)
        subscribe(ledger)
        assert use(ledger, 1).state == "active"
        other.execute("select 1")  # begins the transaction, else the client would commit each call
        move(Ledger(other, at=None), "unpaid")

        def commit(_: Ledger) -> None:
            while not admin.execute(WAITING).fetchone():
                pass
            other.commit()

        refusal, _ = together(database, [partial(use, amount=1), commit])
        assert (refusal.status, refusal.code) == (403, "subscription_inactive")
        assert ledger.available() == 9


# add_subscription_credits --------------------------------------------------------------------------------------------


def add(
    ledger: Ledger, amount: Any = 500, *, customer_id: str = "cus_1", invoice_id: str = "in_1", of: str = "sub_1"
) -> Any:
    """Credits for a paid invoice."""
    return ledger.row(
        "add_subscription_credits", customer_id=customer_id, invoice_id=invoice_id, subscription_id=of,
        credits=amount, description="Pro, monthly",
    )  # fmt: skip


def test_an_invoice_brings_credits_that_end_with_the_period(ledger: Ledger) -> None:
    subscribe(ledger)
    row = add(ledger, Decimal("500.50"))
    assert (row.account_id, row.invoice_id, row.subscription_id) == ("alpha", "in_1", "sub_1")
    assert (row.amount, row.expires_at, row.replayed, len(row.grant_ids)) == (Decimal("500.5"), ENDS, False, 1)
    (grant,) = ledger.table("grants", "grant_id = %s", row.grant_ids[0])
    assert (grant.kind, grant.priority, grant.description, grant.source) == ("plan", 10, "Pro, monthly", "invoice:in_1")
    assert ledger.available() == Decimal("600.5")
    assert_sound(ledger)
    ledger.now = ENDS
    assert ledger.available() == 100


def test_the_same_call_again_is_a_replay_another_amount_a_conflict(ledger: Ledger) -> None:
    bind(ledger)
    first = add(ledger)
    with ledger.unchanged():
        assert same(first, add(ledger, Decimal("500.000")))
        with refused(409, "idempotency_conflict"):
            add(ledger, 501)
        with refused(409, "idempotency_conflict"):
            add(ledger, of="sub_2")
    assert add(ledger, invoice_id="in_2").replayed is False
    assert ledger.available() == 1100


def test_credits_of_an_unknown_period_do_not_expire(ledger: Ledger) -> None:
    bind(ledger)
    row = add(ledger)
    assert (row.amount, row.expires_at) == (500, None)
    subscribe(ledger)
    ledger.now += 40 * DAY  # the period that is known now is over, so it is not that of the next invoice
    assert add(ledger, invoice_id="in_2").expires_at is None
    assert_sound(ledger)


def test_the_period_of_the_invoice_goes_before_that_of_the_subscription(ledger: Ledger) -> None:
    subscribe(ledger)
    line = {"subscription": "sub_1", "period": {"start": BEGAN, "end": int((NOON + 59 * DAY).timestamp())}}
    open_one = invoice(None, status="open", paid=False, lines={"data": [line, {**line, "subscription": "sub_2"}]})
    assert tell(ledger, "invoice.finalized", open_one) == "applied"
    assert add(ledger).expires_at == NOON + 59 * DAY


def test_what_is_wrong_is_refused(ledger: Ledger) -> None:
    bind(ledger)
    with ledger.unchanged():
        with refused(404, "customer_not_found", customer_id="cus_2"):
            add(ledger, customer_id="cus_2")
        for wrong in (0, -1, Decimal("NaN"), Decimal("0.0000001"), None):
            with refused(422, "invalid_amount"):
                add(ledger, wrong)
        for name in ("customer_id", "invoice_id", "subscription_id"):
            with refused(400, "invalid_request", argument=name):
                add(ledger, **{"of" if name == "subscription_id" else name: ""})
    ledger.change("update credits.accounts set status = 'closed' where account_id = 'alpha'")
    with ledger.unchanged(), refused(423, "account_closed"):
        add(ledger)


def test_what_belongs_to_another_account_is_refused(ledger: Ledger) -> None:
    subscribe(ledger)
    add(ledger)
    bind(ledger, "cus_2", "beta")
    with ledger.unchanged():
        with refused(409, "customer_of_another_account", invoice_id="in_1"):
            add(ledger, customer_id="cus_2", of="sub_2")
        with refused(409, "customer_of_another_account", subscription_id="sub_1"):
            add(ledger, customer_id="cus_2", invoice_id="in_2")


def test_an_invoice_that_its_event_has_granted_brings_nothing_more(ledger: Ledger) -> None:
    subscribe(ledger)
    tell(ledger, "invoice.paid", invoice())
    assert ledger.available() == 1100
    before = ledger.table("grants")
    row = add(ledger)
    assert (row.amount, row.expires_at, row.replayed, len(row.grant_ids)) == (1000, ENDS, True, 1)
    assert (ledger.table("grants"), ledger.available()) == (before, 1100)
    assert_sound(ledger)


def test_the_event_of_an_invoice_that_was_granted_by_a_call_brings_nothing_more(ledger: Ledger) -> None:
    subscribe(ledger)
    first = add(ledger)
    assert tell(ledger, "invoice.paid", invoice()) == "applied"
    assert tell(ledger, "invoice.payment_succeeded", invoice()) == "applied"
    assert ledger.available() == 600
    assert same(first, add(ledger))
    assert_sound(ledger)


@pytest.mark.parametrize("first", ["event", "call"])
def test_an_invoice_whose_prices_say_nothing_is_left_to_the_call(ledger: Ledger, first: str) -> None:
    subscribe(ledger)
    if first == "event":
        assert tell(ledger, "invoice.paid", invoice(None)) == "applied"
    assert add(ledger).replayed is False
    assert tell(ledger, "invoice.payment_succeeded", invoice(None)) == "applied"
    assert ledger.available() == 600
    assert add(ledger).replayed is True
    assert_sound(ledger)


CALL, PAID, PAYMENT, REFUND = "call", "invoice.paid", "invoice_payment.paid", "refund.created"
PAID_BY = {
    "id": "inpay_1", "object": "invoice_payment", "invoice": "in_1", "status": "paid", "amount_paid": 1000,
    "currency": "usd", "payment": {"type": "payment_intent", "payment_intent": "pi_1"},
}  # fmt: skip
HALF = {
    "id": "re_1", "object": "refund", "charge": None, "payment_intent": "pi_1", "amount": 500, "currency": "usd",
    "status": "succeeded",
}  # fmt: skip


@pytest.mark.parametrize(
    "order",
    [
        (CALL, PAID, REFUND),
        (CALL, REFUND, PAID),
        (REFUND, CALL, PAID),
        (CALL, PAYMENT, REFUND),
        (CALL, REFUND, PAYMENT),
        (PAYMENT, CALL, REFUND),
        (REFUND, PAYMENT, CALL),
        (PAYMENT, REFUND, CALL, PAID),
    ],
    ids="-".join,
)
def test_a_refund_takes_back_what_the_call_granted(ledger: Ledger, order: tuple[str, ...]) -> None:
    subscribe(ledger)
    for step in order:
        if step == CALL:
            add(ledger)
        else:
            assert tell(ledger, step, {PAID: invoice(), PAYMENT: PAID_BY, REFUND: HALF}[step]) == "applied"
    assert ledger.available() == 100 + 250
    assert_sound(ledger)


def test_what_was_spent_before_the_refund_is_debt(ledger: Ledger) -> None:
    subscribe(ledger)
    add(ledger)
    ledger.use(600)
    tell(ledger, PAYMENT, PAID_BY)
    tell(ledger, REFUND, {**HALF, "amount": 1000})
    assert ledger.sums() == (-500, 0, 0, 500)
    assert_sound(ledger)


def test_what_is_not_used_rolls_over_as_the_plan_says(ledger: Ledger) -> None:
    ledger.change("update credits.plans set stripe_price_ids = '{price_1}', rollover = 'all' where code = 'team'")
    subscribe(ledger)
    add(ledger)
    ledger.now = ENDS
    new: Json = {
        "current_period_start": int(ENDS.timestamp()),
        "current_period_end": int((NOON + 59 * DAY).timestamp()),
    }
    assert tell(ledger, "customer.subscription.updated", subscription(**new), after=28 * DAY) == "applied"
    assert add(ledger, invoice_id="in_2").expires_at == NOON + 59 * DAY
    assert ledger.available() == 100 + 500 + 500
    ledger.now = NOON + 59 * DAY
    assert ledger.available() == 100
    assert_sound(ledger)


@pytest.mark.parametrize(
    "jobs", [[add] * 8, [add, partial(tell, event_type=PAID, shown=invoice())] * 4], ids=["calls", "event"]
)
def test_calls_and_the_event_at_once_grant_once(database: Database, jobs: list[Callable[[Ledger], Any]]) -> None:
    with committed(database) as ledger:
        ledger.open("alpha")
        subscribe(ledger)
        for month in range(1, 6):
            name = f"in_{month}"
            shown = invoice(id=name, month=month)  # invoices of one month would share its credits
            of_this = [
                partial(add, invoice_id=name) if job is add else partial(tell, event_type=PAID, shown=shown)
                for job in jobs
            ]
            results = together(database, of_this)
            assert not [one for one in results if isinstance(one, CreditsError)]
            calls = [one for one in results if not isinstance(one, str)]
            granted = ledger.table("plan_grants", "invoice_id = %s", name)
            assert len(granted) == 1
            by_call = granted[0].allowance_id == "added"
            assert {row.amount for row in calls} == {500 if by_call else 1000}
            assert sum(not row.replayed for row in calls) == by_call
        assert_sound(ledger)


# get_or_create_stripe_customer ---------------------------------------------------------------------------------------


def customer_of(ledger: Ledger, account_id: str | None = "alpha", **more: Any) -> Any:
    """The Stripe customer of an account."""
    return ledger.row("get_or_create_stripe_customer", user_id=account_id, **more)


def requests(ledger: Ledger) -> list[Any]:
    """What Stripe is asked."""
    return ledger.table("stripe_requests", "true order by request_id")


def answer(ledger: Ledger, status: int, body: Json) -> None:
    """Stripe's answer to the last request."""
    *_, last = requests(ledger)
    ledger.complete_stripe_request(last.request_id, status, json.dumps(body))


def test_stripe_is_asked_once_to_create_a_customer(ledger: Ledger) -> None:
    row = customer_of(ledger, email="alpha@example.com")
    (request,) = requests(ledger)
    assert row == ("alpha", None, "pending", request.request_id)
    assert (request.purpose, request.ref, request.account_id) == ("customer", "alpha", "alpha")
    assert (request.method, request.path, request.state, request.run_at) == ("post", "/v1/customers", "queued", NOON)
    assert request.params == {"email": "alpha@example.com", "metadata": {"account_id": "alpha"}}
    with ledger.unchanged():
        assert customer_of(ledger, email="another@example.com") == row
    assert customer_of(ledger, "beta").request_id != row.request_id


def test_the_answer_binds_the_customer(ledger: Ledger) -> None:
    pending = customer_of(ledger)
    answer(ledger, 200, customer(metadata={"account_id": "alpha"}))
    with ledger.unchanged():
        assert customer_of(ledger) == ("alpha", "cus_1", "bound", None)
    (bound,) = ledger.table("stripe_customers")
    assert (bound.account_id, bound.bound_by) == ("alpha", f"request:{pending.request_id}")


@pytest.mark.parametrize(
    ("opened", "given", "sent"), [("a@b.example", None, "a@b.example"), (None, "", None), (None, None, None)]
)
def test_the_email_is_that_of_the_account_by_default(
    ledger: Ledger, opened: str | None, given: str | None, sent: str | None
) -> None:
    ledger.open_account("gamma", email=opened)
    customer_of(ledger, "gamma", email=given)
    assert requests(ledger)[0].params.get("email") == sent


def test_a_customer_that_is_bound_already_is_answered_at_once(ledger: Ledger) -> None:
    bind(ledger)
    assert customer_of(ledger, email="new@example.com") == ("alpha", "cus_1", "bound", None)
    assert requests(ledger) == []


def test_an_email_binds_nobody(ledger: Ledger) -> None:
    ledger.open_account("gamma", email="alpha@example.com")
    tell(ledger, "customer.created", customer())
    assert customer_of(ledger, "gamma", email="alpha@example.com").status == "pending"
    assert ledger.table("stripe_customers") == []


def test_a_checkout_may_bind_one_while_the_request_waits(ledger: Ledger) -> None:
    assert customer_of(ledger).status == "pending"
    bind(ledger)
    assert customer_of(ledger) == ("alpha", "cus_1", "bound", None)


def test_a_request_that_failed_is_followed_by_another(ledger: Ledger) -> None:
    first = customer_of(ledger, email="nonsense")
    answer(ledger, 400, {"error": {"type": "invalid_request_error", "code": "email_invalid"}})
    second = customer_of(ledger, email="alpha@example.com")
    assert (second.status, second.request_id > first.request_id) == ("pending", True)
    answer(ledger, 500, {})
    assert customer_of(ledger) == second


def test_a_customer_that_was_deleted_is_not_answered(ledger: Ledger) -> None:
    bind(ledger)
    shown = {"id": "cus_1", "object": "customer", "deleted": True}
    assert tell(ledger, "customer.deleted", shown, after=MINUTE) == "applied"
    assert customer_of(ledger).status == "pending"


def test_of_several_customers_that_of_the_live_subscription_is_answered(ledger: Ledger) -> None:
    for number in (2, 1, 3):
        bind(ledger, f"cus_{number}")
        ledger.now += MINUTE
    assert customer_of(ledger).customer_id == "cus_2"
    subscribe(ledger)
    assert customer_of(ledger).customer_id == "cus_1"
    tell(ledger, "customer.subscription.deleted", subscription("canceled", ended_at=BEGAN), after=MINUTE)
    assert customer_of(ledger).customer_id == "cus_2"


@pytest.mark.parametrize(
    ("account_id", "status", "code"), [("nobody", 404, "account_not_found"), (None, 400, "invalid_request")]
)
def test_without_an_account_there_is_no_customer(
    ledger: Ledger, account_id: str | None, status: int, code: str
) -> None:
    with ledger.unchanged(), refused(status, code):
        customer_of(ledger, account_id)


def test_calls_at_once_share_one_request(database: Database) -> None:
    with committed(database) as ledger:
        ledger.open("alpha")
        rows = together(database, [customer_of] * 12)
        (request,) = requests(ledger)
        assert set(rows) == {("alpha", None, "pending", request.request_id)}


def test_the_account_is_locked_first_so_nobody_waits_for_a_request(database: Database) -> None:
    with committed(database) as ledger, database.connect() as other:
        ledger.open("alpha", 10)
        other.execute("select 1")  # begins the transaction, else the client would commit each call
        customer_of(Ledger(other, at=None))
        ledger.conn.execute("set lock_timeout = '1 s'")
        with pytest.raises(LockNotAvailable):
            ledger.spend("alpha", 1, key="k")
        other.commit()
        assert customer_of(ledger).status == "pending"


def test_calls_while_the_answer_comes_never_ask_for_a_second_customer(database: Database) -> None:
    with committed(database) as ledger:
        for number in range(8):
            account = f"alpha-{number}"
            ledger.open_account(account)
            pending = customer_of(ledger, account)
            body = json.dumps(customer(id=f"cus_{number}", metadata={"account_id": account}))

            def complete(other: Ledger, request: int = pending.request_id, body: str = body) -> None:
                other.complete_stripe_request(request, 200, body)

            rows = together(database, [complete, *[partial(customer_of, account_id=account)] * 7])[1:]
            assert {row[1:3] for row in rows} <= {(None, "pending"), (f"cus_{number}", "bound")}
            assert {row.request_id for row in rows} <= {None, pending.request_id}
            assert customer_of(ledger, account).customer_id == f"cus_{number}"
        assert len(requests(ledger)) == 8
