"""What Stripe has and we have not: found, told, and repaired by the handlers of the events that never came."""

import json
from datetime import timedelta
from functools import partial
from typing import Any

import pytest
from ledger_support import DAY, HOUR, MINUTE, Ledger, assert_sound, committed, refused, session, together
from psycopg import Connection
from servers import Database
from stripe_params import problems
from stripe_world import World, answer, prepare, settle

LISTED = ["/v1/checkout/sessions", "/v1/invoices", "/v1/refunds"]


@pytest.fixture
def ledger(conn: Connection[Any]) -> Ledger:
    ledger = Ledger(conn)
    prepare(ledger, "alpha", "beta")
    return ledger


def run(ledger: Ledger, world: World, **more: Any) -> Any:
    """Let a run go on to its end, Stripe answering as the world is; how it ended."""
    ledger.now = max(ledger.now, world.moment + MINUTE)
    started = ledger.reconcile_stripe(**{"since": world.moment - 30 * DAY, **more})
    assert (started.state, started.found, started.finished_at) == ("running", 0, None)
    settle(ledger, world, HOUR)
    return ledger.get_reconciliation(run_id=started.run_id)


def gaps(ledger: Ledger, **more: Any) -> list[tuple[str, str, str]]:
    return [(gap.object_id, gap.gap, gap.state) for gap in ledger.list_stripe_gaps(**more)]


def unheard(world: World) -> tuple[str, str, str]:
    """A package, a subscription and a refund of half the package, of which nobody has told us."""
    bought = world.buy("alpha")
    world.wait(hours=1)
    subscription = world.subscribe("beta", "basic")
    world.wait(hours=1)
    return bought, world.facts[subscription]["latest_invoice"], world.refund(bought, 500)


def test_a_run_tells_what_never_arrived_and_changes_nothing(ledger: Ledger) -> None:
    world = World()
    bought, invoice, refund = unheard(world)
    with ledger.unchanged("stripe_reconciliations", "stripe_gaps", "stripe_requests", "notifications"):
        row = run(ledger, world)
    assert (row.state, row.repair, row.checked, row.found) == ("done", False, 4, 4)
    assert (row.remaining, row.foreign_objects, row.repaired, row.repairing, row.error) == (3, 1, 0, 0, None)
    assert sorted(gaps(ledger)) == [
        (bought, "purchase_missing", "open"), ("cs_2", "binding_missing", "open"), (invoice, "grant_missing", "open"),
        (refund, "refund_missing", "foreign"),  # of a payment that is not known either
    ]  # fmt: skip
    shown = {gap.object_id: gap for gap in ledger.list_stripe_gaps()}
    assert (shown[bought].account_id, shown[bought].amount, shown[bought].currency) == ("alpha", 1000, "usd")
    assert (shown[invoice].account_id, shown[refund].account_id, shown[refund].amount) == ("beta", None, 500)
    asked = ledger.table("stripe_requests", "true order by request_id")
    assert [request.path for request in asked] == LISTED
    assert [problem for request in asked for problem in problems(request.method, request.path, request.params)] == []
    assert [row.type for row in ledger.table("notifications")] == ["stripe_gaps_found"]
    first, *_ = gaps(ledger, max_rows=1)
    assert gaps(ledger, after=first[0]) == gaps(ledger)[1:]
    assert gaps(ledger, state="foreign") == [(refund, "refund_missing", "foreign")]
    with refused(400, "invalid_request", argument="state"):
        gaps(ledger, state="closed")


@pytest.mark.parametrize("shape", ["old", "new"])
def test_a_repair_ends_where_the_events_would_have(ledger: Ledger, shape: Any) -> None:
    world = World(shape)
    unheard(world)
    world.page = 1
    row = run(ledger, world, repair=True)
    assert (row.state, row.checked, row.found, row.repaired, row.remaining) == ("done", 4, 4, 4, 0)
    assert {state for _, _, state in gaps(ledger)} == {"repaired"}
    assert (ledger.available("alpha"), ledger.available("beta")) == (500, 1000)
    state = ledger.get_subscription_state("beta")
    assert (state.state, state.plan) == ("active", "basic")
    (purchase,) = ledger.table("purchases")
    assert (purchase.status, purchase.amount_refunded) == ("partially_refunded", 500)
    assert_sound(ledger)
    before = ledger.snapshot()
    for event in world.events:  # they come after all
        ledger.receive_stripe_event("default", event.payload)
    after = ledger.snapshot()
    assert all(before[name] == after[name] for name in ("entries", "grants", "purchases", "clawbacks", "allowances"))
    settle(ledger, world)
    assert_sound(ledger)
    again = run(ledger, world, repair=True)
    assert (again.state, again.checked, again.found) == ("done", 4, 0)


def test_what_has_arrived_is_no_gap(ledger: Ledger) -> None:
    world = World()
    unheard(world)
    ledger.now = world.moment + MINUTE
    for event in world.events:
        ledger.receive_stripe_event("default", event.payload)
    settle(ledger, world)
    assert run(ledger, world).found == 0


def test_what_is_not_paid_is_no_gap(ledger: Ledger) -> None:
    world = World()
    world.buy("alpha", paid=False)
    world.abandon("alpha")
    world.subscribe("beta", "basic", paid=False)
    row = run(ledger, world, repair=True)
    assert (row.checked, row.found) == (1, 0)


def test_a_purchase_that_came_to_nothing_waits_for_a_day(ledger: Ledger) -> None:
    """What Stripe lists as paid does not tell of it, so Stripe is asked what became of each that waits."""
    world = World()
    failed, waits = world.buy("alpha", paid=False), world.buy("alpha", paid=False)
    ledger.now = world.moment
    for event in world.events:
        ledger.receive_stripe_event("default", event.payload)
    ledger.create_checkout("beta", package="starter", success_url="http://localhost:3000", key="c")
    (asked,) = ledger.table("stripe_requests")
    left = session("cs_9", status="open", payment_status="unpaid", payment_intent=None, livemode=False,
                   metadata=asked.params["metadata"])  # fmt: skip
    ledger.complete_stripe_request(asked.request_id, 200, json.dumps(left))
    world.fail_late(failed)
    world.put("checkout.session", "cs_9", **left)
    world.wait(hours=24)
    world.put("checkout.session", "cs_9", status="expired")
    ledger.now = world.moment
    assert ledger.run_job("refresh_stale_purchases").rows_done == 0
    ledger.now += HOUR
    ledger.set_stripe_endpoint("default", mode="shadow")
    assert ledger.run_job("refresh_stale_purchases").rows_done == 0
    ledger.set_stripe_endpoint("default")
    assert ledger.run_job("refresh_stale_purchases").rows_done == 3
    assert [
        problem for row in ledger.table("stripe_requests") for problem in problems(row.method, row.path, row.params)
    ] == []
    settle(ledger, world)
    found = {row.stripe_session_id: row.status for row in ledger.table("purchases")}
    assert found == {failed: "failed", waits: "processing", "cs_9": "expired"}
    assert [row.type for row in ledger.table("notifications", "type like 'payment%%'")] == ["payment_failed"]
    assert_sound(ledger)


def test_a_gap_that_the_event_closes_has_arrived(ledger: Ledger) -> None:
    world = World()
    bought = world.buy("alpha")
    run(ledger, world)
    for event in world.events:
        ledger.receive_stripe_event("default", event.payload)
    assert gaps(ledger) == [(bought, "purchase_missing", "arrived")]
    assert (ledger.get_reconciliation().repaired, ledger.get_reconciliation().remaining) == (1, 0)


@pytest.mark.parametrize("repair", [False, True])
def test_a_refund_that_goes_on_after_it_was_listed_has_arrived(ledger: Ledger, repair: bool) -> None:
    world = World(chatty=True)
    bought = world.buy("alpha")
    refund = world.refund(bought, 500, status="pending")
    ledger.now = world.moment + MINUTE
    ledger.reconcile_stripe(since=world.moment - DAY, repair=repair)
    for _ in range(3):  # three lists, of which the last one has it
        answer(ledger, world)
    assert (refund, "refund_missing") in {(name, gap) for name, gap, _ in gaps(ledger)}
    world.wait(hours=5)
    world.put("refund", refund, "refund.updated", status="succeeded")
    ledger.now = world.moment + MINUTE
    for event in world.events:
        ledger.receive_stripe_event("default", event.payload)
    settle(ledger, world)
    assert {name: state for name, _, state in gaps(ledger)}[refund] == ("repaired" if repair else "arrived")
    assert ledger.get_reconciliation().remaining == 0
    assert run(ledger, world).found == 0
    world.put("refund", refund, status="failed")
    assert (run(ledger, world).found, gaps(ledger)) == (1, [(refund, "refund_missing", "open")])


def test_no_more_gaps_are_looked_into_than_are_shown(ledger: Ledger) -> None:
    """Each costs a millisecond, and of an account of Stripe's that others share there may be thousands."""
    run(ledger, World())
    ledger.change(
        "insert into credits.stripe_gaps (run_id, kind, object_id, gap, object, found_at) "
        "select r.run_id, 'checkout.session', 'cs_' || i, 'purchase_missing', jsonb_build_object('id', 'cs_' || i), "
        "credits.now() from credits.stripe_reconciliations r, generate_series(101, 400) i"
    )
    ledger.change("create temp sequence looks")
    ledger.change(
        "create or replace function credits._gap_in(kind text, object jsonb) returns text language sql as "
        "$$ select 'purchase_missing' where nextval('pg_temp.looks') > 0 $$"
    )
    shown = ledger.list_stripe_gaps(max_rows=10, after="cs_299")
    assert [gap.object_id for gap in shown] == [f"cs_{number}" for number in range(300, 310)]
    with ledger.as_owner():
        assert ledger.query("select last_value as looks from looks") == [(10,)]


def test_objects_of_others_are_told_as_such(ledger: Ledger) -> None:
    world = World()
    world.put(
        "checkout.session", "cs_9", **session("cs_9", customer="cus_9", metadata={}, client_reference_id="order 7")
    )
    world.put(
        "checkout.session",
        "cs_8",
        **session("cs_8", customer="cus_8", metadata={"account_id": "nobody", "package": "starter"}),
    )
    row = run(ledger, world, repair=True)
    assert gaps(ledger) == [("cs_8", "purchase_missing", "repairing"), ("cs_9", "purchase_missing", "foreign")]
    assert row.foreign_objects == 1
    assert ledger.table("stripe_customers") == []
    ledger.open("nobody")
    settle(ledger, world, DAY)
    assert ledger.available("nobody") == 1000
    assert ledger.get_reconciliation().repaired == 1


def test_a_purchase_that_differs_is_left_to_a_person(ledger: Ledger) -> None:
    world = World()
    world.buy("alpha")
    for event in world.events:
        ledger.receive_stripe_event("default", event.payload)
    ledger.change("update credits.purchases set amount = 999")
    row = run(ledger, world, repair=True)
    assert gaps(ledger) == [("cs_1", "purchase_differs", "open")]
    assert (row.remaining, len(ledger.table("stripe_requests", "purpose = 'retrieve'"))) == (1, 0)


def test_nothing_is_repaired_that_no_endpoint_would_apply(ledger: Ledger) -> None:
    world = World()
    world.buy("alpha")
    ledger.set_stripe_endpoint("shadow", mode="shadow")
    row = run(ledger, world, repair=True)
    assert (row.remaining, [gap.reason for gap in ledger.list_stripe_gaps()]) == (1, ["shadow"])
    ledger.set_stripe_endpoint("default", livemode=True)
    assert [gap.reason for gap in ledger.list_stripe_gaps()] == ["livemode_mismatch"]
    run(ledger, world, repair=True)
    assert ledger.available("alpha") == 0
    ledger.set_stripe_endpoint("test", livemode=False)
    assert run(ledger, world, repair=True).repaired == 1
    assert ledger.available("alpha") == 1000


def test_what_was_seen_in_shadow_is_left_to_a_replay(ledger: Ledger) -> None:
    """Another handler has granted it, and the balances that were brought in have it."""
    world = World()
    ledger.set_stripe_endpoint("default", mode="shadow")
    bought, invoice, refund = unheard(world)
    for event in world.events:
        ledger.receive_stripe_event("default", event.payload)
    ledger.set_stripe_endpoint("default", mode="live")
    missed = world.buy("alpha")
    row = run(ledger, world, repair=True)
    assert (row.found, row.repaired, row.remaining, row.foreign_objects) == (5, 1, 3, 1)
    assert {gap.object_id: (gap.state, gap.reason) for gap in ledger.list_stripe_gaps()} == {
        bought: ("open", "shadow"), "cs_2": ("open", "shadow"), invoice: ("open", "shadow"),
        missed: ("repaired", None), refund: ("foreign", None),
    }  # fmt: skip
    assert (ledger.available("alpha"), ledger.available("beta")) == (1000, 0)
    (event,) = ledger.table("stripe_events", "object_id = %s and type = 'checkout.session.completed'", bought)
    assert ledger.replay_stripe_event(event.event_id).outcome == "applied"
    assert ledger.available("alpha") == 2000
    assert (bought, "purchase_missing", "arrived") in gaps(ledger)
    ledger.change("update credits.stripe_events set payload = null, archived_at = received_at")  # as time goes by
    assert (run(ledger, world, repair=True).repaired, ledger.available("beta")) == (0, 0)


def test_what_was_not_paid_yet_in_shadow_is_repaired(ledger: Ledger) -> None:
    """Nobody else has granted it: its payment came after the switch, and its event was lost."""
    world = World(chatty=True)
    ledger.set_stripe_endpoint("default", mode="shadow")
    invoice = world.facts[world.subscribe("beta", "basic", paid=False)]["latest_invoice"]
    for event in world.events:
        ledger.receive_stripe_event("default", event.payload)
    assert ledger.table("stripe_events", "object_id = %s and reason = 'shadow'", invoice)
    ledger.set_stripe_endpoint("default", mode="live")
    world.pay(invoice)
    assert (run(ledger, world, repair=True).repaired, ledger.available("beta")) == (1, 1000)


def test_one_run_at_a_time_and_the_window_is_a_setting(ledger: Ledger) -> None:
    ledger.change("update credits.settings set value = '\"5 days\"' where name = 'reconcile_window'")
    first = ledger.reconcile_stripe()
    assert (first.since, first.repair) == (ledger.now - 5 * DAY, False)
    assert ledger.reconcile_stripe(repair=True, since=ledger.now - DAY) == first
    settle(ledger, World())
    assert ledger.get_reconciliation().state == "done"
    assert ledger.reconcile_stripe(repair=True).run_id > first.run_id
    settle(ledger, World())
    ledger.now += 91 * DAY
    ledger.reconcile_stripe()
    assert len(ledger.table("stripe_reconciliations")) == 1


def test_a_list_that_stripe_refuses_ends_the_run(ledger: Ledger) -> None:
    started = ledger.reconcile_stripe()
    (request,) = ledger.claim_stripe_requests()
    body = json.dumps({"error": {"type": "invalid_request_error", "code": "parameter_unknown"}})
    ledger.complete_stripe_request(request.request_id, 400, body)
    row = ledger.get_reconciliation(run_id=started.run_id)
    assert (row.state, row.error) == ("failed", "/v1/checkout/sessions 400 invalid_request_error parameter_unknown")
    assert "reconciliation_failed" in {told.type for told in ledger.table("notifications")}
    assert ledger.reconcile_stripe().run_id > started.run_id


def test_a_page_counts_once(ledger: Ledger) -> None:
    """An answer that is brought twice, or that comes when the run is over, changes nothing."""
    world = World()
    world.buy("alpha")
    ledger.now = world.moment + MINUTE
    ledger.reconcile_stripe(since=world.moment - DAY)
    (request,) = ledger.claim_stripe_requests()
    body = json.dumps(world.get(request.path, request.params, world.now)[1])
    for _ in range(3):
        ledger.complete_stripe_request(request.request_id, 200, body)
    assert (ledger.get_reconciliation().checked, ledger.get_reconciliation().found) == (1, 1)
    assert len(ledger.table("stripe_requests")) == 2
    ledger.change("update credits.stripe_reconciliations set state = 'done', finished_at = started_at")
    answer(ledger, world)
    assert len(ledger.table("stripe_requests")) == 2


def test_a_run_that_is_not_known_and_a_future_are_refused(ledger: Ledger) -> None:
    with ledger.unchanged():
        with refused(404, "reconciliation_not_found", run_id=None):
            ledger.get_reconciliation()
        with refused(404, "reconciliation_not_found", run_id=7):
            ledger.list_stripe_gaps(run_id=7)
        with refused(400, "invalid_request", argument="since"):
            ledger.reconcile_stripe(since=ledger.now + timedelta(seconds=1))


def test_repairs_and_their_events_at_once_grant_once(database: Database) -> None:
    with committed(database) as ledger:
        prepare(ledger, "alpha", "beta")
        world = World()
        unheard(world)
        ledger.reconcile_stripe(repair=True)

        def bring(request: Any, on: Ledger) -> None:
            on.complete_stripe_request(
                request.request_id, 200, json.dumps(world.get(request.path, request.params, 2**40)[1])
            )

        def tell(payload: str, on: Ledger) -> None:
            on.receive_stripe_event("default", payload)

        requests = []
        while ledger.get_reconciliation().state == "running":
            for request in ledger.claim_stripe_requests():
                if request.path in LISTED:
                    bring(request, ledger)
                else:
                    requests.append(request)
        assert len(requests + ledger.claim_stripe_requests()) == 5
        together(
            database,
            [*(partial(bring, one) for one in requests), *(partial(tell, one.payload) for one in world.events)],
        )
        for _ in range(5):
            for request in ledger.table("stripe_requests", "state = 'queued'"):
                bring(request, ledger)
            ledger.change(
                "update credits.stripe_events set next_attempt_at = credits.now() where status in ('parked', 'failed')"
            )
            ledger.process_stripe_events()
        (granted,) = ledger.table("grants", "account_id = 'beta'")  # its month is still to come
        assert (ledger.available("alpha"), granted.amount) == (500, 1000)
        assert ledger.get_reconciliation().repaired == 4
        assert_sound(ledger)
