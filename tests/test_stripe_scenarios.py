"""Whatever the order of Stripe's events, however often they come and whatever happens in between: one final state."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from functools import partial
from itertools import permutations
from random import Random
from typing import Any

import pytest
from conftest import stop_clock
from door import Door
from ledger_support import DAY, MINUTE, NOON, Ledger, assert_sound, together, undone
from psycopg import Connection
from scenarios import STORIES, Outcome, changes, failures, purchases, refunds, subscriptions
from scenarios.chance import Chance, Rests
from servers import ONE_ENGINE, Database
from stripe_world import START, Event, Shape, World, prepare, settle, thin

ALL = (purchases, subscriptions, changes, failures, refunds)  # importing them lists their stories
SHAPES: list[Shape] = ["old", "new"]
State = dict[str, list[dict[str, Any]]]

TABLES = {  # what must be the same in the end: all but our own ids and our own times
    "accounts": "select account_id, status, plan from credits.accounts",
    "customers": "select customer_id, account_id, deleted from credits.stripe_customers",
    "subscriptions": """
      select account_id, subscription_id, state, status, plan, customer_id, price_id, quantity, anchor_at,
             period_start, period_end, trial_end, cancel_at, cancel_at_period_end, ended_at, collection_paused,
             past_due_at, pending_plan, pending_at from credits.subscriptions""",
    "items": """
      select account_id, subscription_id, item_id, price_id, product_id, quantity, period_start, period_end
        from credits.subscription_items""",
    # What came for a line and was then given to an earlier one never counted; nor did months of a longer line that
    # nobody could use, which come or do not come, as it was known then.
    "grants": """
      select g.account_id, g.kind, sum(g.amount - g.revoked + coalesce(c.taken, 0)) as amount,
             sum(g.remaining) as remaining, sum(g.held) as held, sum(g.consumed) as consumed, sum(g.owed) as owed,
             sum(g.expired + coalesce(c.taken, 0)) as gone, g.priority, g.expires_at, g.scope, g.description, g.source,
             case when g.expires_at is not null then g.effective_at end as effective_at
        from credits.grants g
        left join credits.plan_grants p using (account_id, grant_id)
        left join credits.clawbacks c using (account_id, grant_id)
       where g.status <> 'pending' and not (coalesce(p.slice > 0, false) and g.expired + g.revoked = g.amount)
       group by g.account_id, g.kind, g.priority, g.expires_at, g.scope, g.description, g.source, 14
      having sum(g.amount - g.revoked + coalesce(c.taken, 0)) > 0""",
    "balances": "select account_id, balance, held, debt from credits.balances",
    "purchases": """
      select account_id, package, quantity, credits, amount, currency, status, stripe_session_id,
             stripe_payment_intent_id, stripe_customer_id, amount_refunded, amount_disputed from credits.purchases""",
    "clawbacks": """
      select c.account_id, g.kind, g.expires_at, c.source_kind, c.source_id, c.firm, c.target, c.taken, c.owed
        from credits.clawbacks c join credits.grants g using (account_id, grant_id)
       where c.target + c.taken + c.owed > 0 and (g.expires_at is null or g.expires_at > credits.now())""",
    "open": "select event_id, status, reason from credits.stripe_events where status not in ('applied', 'ignored')",
}


def state(ledger: Ledger) -> State:
    """What came of all the events, with everything booked that is due, and the books sound."""
    for account in ledger.table("accounts"):
        ledger.book(account.account_id)
    assert_sound(ledger)
    with ledger.as_owner():
        return {name: sorted((row._asdict() for row in ledger.query(text)), key=repr) for name, text in TABLES.items()}


def living(ledger: Ledger) -> State:
    """The same without grants that are over: an invoice that comes too late takes nothing from a later one."""
    found = state(ledger)
    found["grants"] = [row for row in found["grants"] if not row["expires_at"] or row["expires_at"] > ledger.now]
    return found


def assert_same(found: State, expected: State) -> None:
    """Two states, told apart table by table."""
    for name, rows in expected.items():
        assert found[name] == rows, name


def text(value: Any) -> Any:
    """A moment as outcomes write it."""
    return value.isoformat() if isinstance(value, datetime) else value


def assert_outcome(ledger: Ledger, outcome: Outcome) -> None:
    """What came of the events is what the story says."""
    found = state(ledger)
    balance = ledger.get_balance("alpha")
    assert (balance.available, balance.debt, ledger.available("beta")) == (outcome.available, outcome.debt, 0)
    assert sorted(
        (row["kind"], row["amount"], row["remaining"], str(text(row["effective_at"])), str(text(row["expires_at"])))
        for row in found["grants"]
    ) == sorted((lot.kind, lot.amount, lot.left, str(lot.start), str(lot.end)) for lot in outcome.grants)
    for row, wanted in zip(found["subscriptions"], outcome.subscriptions, strict=bool(outcome.subscriptions)):
        assert {name: text(row[name]) for name in wanted} == wanted
    if outcome.purchases:
        assert sorted(row["status"] for row in found["purchases"]) == sorted(outcome.purchases)
    assert {row["reason"] for row in found["open"]} == set(outcome.parked)


def deliver(ledger: Ledger, *events: Event) -> None:
    """Post events. Whatever comes of one, none fails."""
    for event in events:
        outcome = ledger.receive_stripe_event("default", event.payload).outcome
        assert outcome in {"applied", "duplicate", "ignored", "parked"}, ledger.list_stripe_events(status="failed")


def replay(ledger: Ledger, *events: Event) -> None:
    """Apply stored events again."""
    for event in events:
        assert ledger.replay_stripe_event(event.event_id).outcome in {"applied", "ignored", "parked"}, event


@pytest.fixture(scope="module")
def scene(stage: Callable[..., Connection[Any]]) -> Ledger:
    """A shop with a catalogue and two accounts without credits."""
    ledger = Ledger(stage())
    prepare(ledger, "alpha", "beta")
    return ledger


@pytest.fixture
def ledger(scene: Ledger) -> Iterator[Ledger]:
    with undone(scene):
        yield scene


Order = list[list[Event]]  # the events of each act


def shuffled(events: list[Event], random: Random) -> list[Event]:
    """Any order, with every third event twice."""
    again = random.sample(events, len(events) // 3)
    return random.sample([*events, *again], len(events) + len(again))


def orders(world: World, random: Random, samples: int) -> Iterator[Order]:
    """Orders in which events may come: as they happened, the reverse, and all others if they are few, else a sample.

    The 120 orders of five events are told half in the one shape, half in the other.
    """
    acts = [act.events for act in world.acts]
    yield acts
    yield [events[::-1] for events in acts]
    if len(acts) == 1 and len(acts[0]) < 5:
        yield from ([list(events)] for events in permutations(acts[0]))
    elif len(acts) == 1 and len(acts[0]) == 5:
        drawn = random.sample(list(permutations(acts[0])), 120)  # the same in each shape: a story has its own chance
        yield from ([list(events)] for events in drawn[SHAPES.index(world.shape) :: 2])
    else:
        yield from ([shuffled(events, random) for events in acts] for _ in range(samples))


def tell(ledger: Ledger, world: World, order: Order, random: Random | None = None) -> None:
    """Deliver each act in its order. With random, half of an act, and then all that has happened, in any order."""
    told: list[Event] = []
    for act, events in zip(world.acts, order, strict=True):
        told += act.events
        if random:
            deliver(ledger, *events[: len(events) // 2])
            settle(ledger, world)
        deliver(ledger, *(shuffled(told, random) if random else events))
        settle(ledger, world)
        if act.spend:
            ledger.use(act.spend[1], act.spend[0])


def tell_in_time(ledger: Ledger, world: World) -> None:
    """Deliver each event when it happens: the clock goes with the story."""
    ledger.now = START
    for act in world.acts:
        for event in act.events:
            ledger.now = max(ledger.now, datetime.fromtimestamp(event.created, UTC))
            ledger.book()
            deliver(ledger, event)
            settle(ledger, world, patience=timedelta(0))
        if act.spend:
            settle(ledger, world)
            ledger.use(act.spend[1], act.spend[0])
    ledger.now = world.moment + MINUTE
    settle(ledger, world)


@ONE_ENGINE
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", STORIES)
def test_any_order_ends_in_one_state(ledger: Ledger, name: str, shape: Shape) -> None:
    world, random = World(shape), Random(name)
    outcome = STORIES[name](world)
    with undone(ledger):
        tell_in_time(ledger, world)
        expected = state(ledger)
        assert_outcome(ledger, outcome)
    for number, order in enumerate(orders(world, random, samples=2)):
        with undone(ledger):
            ledger.now = world.moment + MINUTE
            tell(ledger, world, order, random if number % 5 == 2 else None)
            if number % 5 == 1:
                replay(ledger, *shuffled(world.events, random))
            assert_same(state(ledger), expected)


@pytest.mark.parametrize(("rolls", "expected"), [("pro", 4000), ("basic", 1000)])
def test_the_plan_that_was_paid_says_what_rolls_over_whenever_another_is_known(
    ledger: Ledger, rolls: str, expected: int
) -> None:
    """It was the plan that the subscription had when the next invoice came."""
    ledger.change("update credits.plans set rollover = 'all' where code = %s", rolls)
    world = World("new")
    changes.a_downgrade_at_the_end_of_the_period(world)
    ledger.now = world.moment + MINUTE
    moves = [event for event in world.events if "customer.subscription.updated" in event.payload]
    others = [event for event in world.events if event not in moves]
    for order in (world.events, moves[::-1] + others, others + moves):
        with undone(ledger):
            deliver(ledger, *order)
            settle(ledger, world)
            assert ledger.available() == expected
            assert_sound(ledger)


@ONE_ENGINE
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", STORIES)
def test_gossip_and_expanded_references_change_nothing(ledger: Ledger, name: str, shape: Shape) -> None:
    world, random = World(shape, chatty=True, expanded=True), Random(name)
    outcome = STORIES[name](world)
    ledger.now = world.moment + MINUTE
    tell(ledger, world, [shuffled(act.events, random) for act in world.acts])
    assert_outcome(ledger, outcome)


@ONE_ENGINE
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", STORIES)
def test_it_is_the_same_in_a_connected_account(ledger: Ledger, name: str, shape: Shape) -> None:
    world, random = World(shape), Random(name)
    world.account = "acct_1"
    outcome = STORIES[name](world)
    ledger.set_stripe_endpoint("default", stripe_account="acct_1")
    ledger.now = world.moment + MINUTE
    tell(ledger, world, [shuffled(act.events, random) for act in world.acts])
    assert_outcome(ledger, outcome)
    assert ledger.table("stripe_requests", "stripe_account is distinct from 'acct_1'") == []


class Mixed(World):
    """Each object in another shape than before: endpoints of two versions tell of the same things."""

    chance = Random(0)

    def put(self, kind: str, object_id: str, *types: str, **facts: Any) -> str:
        """The same as ever, in whatever shape it is this time."""
        self.shape = self.chance.choice(SHAPES)
        return super().put(kind, object_id, *types, **facts)


@pytest.mark.parametrize("name", STORIES)
def test_shapes_may_be_mixed(ledger: Ledger, name: str) -> None:
    world, random = Mixed(), Random(name)
    outcome = STORIES[name](world)
    ledger.now = world.moment + MINUTE
    tell(ledger, world, [shuffled(act.events, random) for act in world.acts], random)
    assert_outcome(ledger, outcome)


class Ancient(World):
    """Until 2019-12-03 each line of a subscription had the subscription's id, on every invoice."""

    def _show_line(self, line: dict[str, Any], subscription: str, *, expand: bool) -> dict[str, Any]:
        return {**super()._show_line(line, subscription, expand=expand), "id": subscription}


def test_each_year_has_its_months_also_where_its_line_has_the_id_of_the_last(ledger: Ledger) -> None:
    world = Ancient("old")
    subscription = world.subscribe("alpha", "year")
    for _ in range(2):
        world.renew(subscription)
        world.wait(days=40)
        with undone(ledger):
            tell_in_time(ledger, world)
            assert ledger.available() == 1000
            assert_sound(ledger)


@ONE_ENGINE
@pytest.mark.parametrize("name", STORIES)
def test_what_is_spent_meanwhile_is_missing_once(ledger: Ledger, name: str) -> None:
    world, random = World(), Random(name)
    outcome = STORIES[name](world)
    if not outcome.steady or len(world.acts) > 1:
        return  # what is left depends on when it is spent
    ledger.now = world.moment + MINUTE
    ledger.grant(1000, priority=99)  # so that no spend is refused
    spends = [random.choice([0, 3, 20]) for _ in world.events]
    for event, spend in zip(random.sample(world.events, len(world.events)), spends, strict=True):
        deliver(ledger, event)
        if spend:
            ledger.use(spend)
    settle(ledger, world)
    replay(ledger, *world.events)
    assert (ledger.available(), ledger.get_balance("alpha").debt) == (outcome.available + 1000 - sum(spends), 0)
    assert_sound(ledger)


def thinned(events: list[Event], random: Random) -> list[Event]:
    """The same, half of them thin. Since when a subscription is past due, only a snapshot of that time can tell."""
    return [
        thin(event) if random.random() < 0.5 and not event.type.startswith("customer.subscription") else event
        for event in events
    ]


@ONE_ENGINE
@pytest.mark.parametrize("seed", range(30))
def test_stories_made_by_chance_end_in_one_state(ledger: Ledger, seed: int) -> None:
    world, random = World(SHAPES[seed % 2]), Random(seed)
    story, steps = (Rests, 6) if seed % 5 == 4 else (Chance, 12)
    story(world, random).play(steps)
    expected: State = {}
    for number, order in enumerate(orders(world, random, samples=2)):
        with undone(ledger):
            ledger.now = world.moment + MINUTE
            tell(ledger, world, [thinned(events, random) for events in order] if number == 3 else order)
            expected = expected or living(ledger)
            assert_same(living(ledger), expected)
    with undone(ledger):
        tell_in_time(ledger, world)
        assert_same(living(ledger), expected)


# Many at once, and faults --------------------------------------------------------------------------------------------


class Committed(Ledger):
    """A ledger whose calls are committed, with one clock for all connections."""

    @property
    def now(self) -> datetime:
        """The engine's time; assigning it is time travel for everybody."""
        return self._now

    @now.setter
    def now(self, at: datetime) -> None:
        self._now = at
        stop_clock(self.conn, at)


@pytest.fixture
def shop(database: Database) -> Iterator[Committed]:
    """A shop with a catalogue, and two accounts without credits, committed."""
    with database.connect(autocommit=True) as conn:
        ledger = Committed(conn, at=None)
        ledger.now = NOON
        prepare(ledger, "alpha", "beta")
        yield ledger


MANY = ["a_new_subscription", "an_upgrade", "a_payment_link", "seats_up", "refunded_in_parts", "a_dispute_won_late",
        "half_a_month_is_refunded", "an_invoice_of_several_pages", "a_purchase_by_bank_transfer"]  # fmt: skip


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("threads", [2, 8])
def test_workers_on_the_same_events_at_once_end_in_the_same_state(
    shop: Committed, database: Database, threads: int, shape: Shape
) -> None:
    world = World(shape, chatty=True)
    for name in MANY:
        STORIES[name](world)
    shop.now = world.moment + MINUTE
    with undone(shop):
        tell(shop, world, [world.events])
        expected = state(shop)

    def work(on: Ledger, seed: int) -> None:
        for event in shuffled(world.events, Random(seed)):
            on.receive_stripe_event("default", event.payload)

    assert together(database, [partial(work, seed=seed) for seed in range(threads)]) == [None] * threads
    settle(shop, world)
    assert_same(state(shop), expected)


@contextmanager
def broken(ledger: Ledger, event_type: str) -> Iterator[None]:
    """The handler of a type of event does half of its work and fails."""
    with ledger.as_owner():
        (works,) = ledger.query(
            "select h.handler as name, pg_get_functiondef(format('credits.%%I', h.handler)::regproc) as text "
            "from credits.stripe_handlers h where h.event_type = %s",
            event_type,
        )
    ledger.change(
        f"create or replace function credits.{works.name}(notice credits.stripe_notice) returns credits.handler_result "
        "language plpgsql as $$ begin perform credits._grant('alpha', 5, 'bonus', key => 'half', fingerprint => '{}'); "
        "perform 1 / 0; return null; end $$"
    )
    yield
    ledger.change(works.text)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", MANY)
def test_a_handler_that_fails_loses_nothing_and_recovers(ledger: Ledger, name: str, shape: Shape) -> None:
    world, random = World(shape), Random(name)
    outcome = STORIES[name](world)
    ledger.now = world.moment + MINUTE
    for event in shuffled(world.events, random):
        if random.random() < 0.5:
            with broken(ledger, event.type):
                assert ledger.receive_stripe_event("default", event.payload).outcome in {"failed", "duplicate"}
        else:
            ledger.receive_stripe_event("default", event.payload)
    settle(ledger, world)
    assert_outcome(ledger, outcome)


def test_the_endpoint_answers_2xx_exactly_when_the_event_is_stored(shop: Committed, database: Database) -> None:
    world, random = World(chatty=True), Random(7)
    outcome = STORIES["an_upgrade"](world)
    shop.now = world.moment + MINUTE
    lost = {event.event_id for event in random.sample(world.events, 5)}
    shop.change(
        "create function credits._refuse() returns trigger language plpgsql as $$ begin raise 'disk full'; end $$; "
        "create trigger refuse before insert on credits.stripe_events for each row "
        f"when (new.event_id = any ('{{{','.join(lost)}}}')) execute function credits._refuse()"
    )
    with Door(database.dsn) as door:
        with broken(shop, "invoice.paid"):
            for event in shuffled(world.events, random):
                answer = door.post(event.payload.encode())
                assert (answer.status_code < 300) == (event.event_id not in lost), answer.text
        assert {row.event_id for row in shop.table("stripe_events")} == {e.event_id for e in world.events} - lost
        assert shop.table("stripe_events", "status = 'failed'")
        shop.change("drop trigger refuse on credits.stripe_events")
        for event in world.events:  # Stripe posts again what was not acknowledged, and anything else at will
            assert door.post(event.payload.encode()).status_code == 200
    settle(shop, world)
    assert_outcome(shop, outcome)


# Three years ---------------------------------------------------------------------------------------------------------


def three_years(world: World) -> None:
    """An account's life: a small plan, a larger one, a year at once, and the end."""
    subscription = world.subscribe("alpha", "basic")
    for month in range(12):
        if month == 3:
            world.wait(days=9)
            world.change(subscription, "pro")
        if month in {2, 5, 9}:
            world.wait(days=3)
            session = world.buy("alpha")
            world.wait(days=4)
            world.refund(session, 250)
        failed = month == 6
        invoice = world.renew(subscription, paid=not failed)
        if failed:
            world.wait(days=4)
            world.pay(invoice)
    world.wait(days=2)
    world.change(subscription, "year")
    world.wait(days=200)
    world.close(world.dispute(world.buy("alpha")), "won")
    world.renew(subscription)
    world.wait(days=100)
    world.cancel(subscription, at_period_end=True)
    world.finish(subscription)
    world.wait(days=1)


@pytest.mark.parametrize("shape", SHAPES)
def test_three_years_of_an_account(ledger: Ledger, shape: Shape) -> None:
    world, random = World(shape, chatty=True), Random(3)
    three_years(world)
    events = world.events
    while ledger.now < world.moment:
        ledger.now += 5 * DAY
        due = [event for event in events if event.created <= ledger.now.timestamp()]
        events = events[len(due) :]
        deliver(ledger, *shuffled(due, random))
        settle(ledger, world, patience=timedelta(0))
        amount = random.randint(0, 500)
        if 0 < amount <= ledger.available():
            ledger.use(amount)
    settle(ledger, world)
    ledger.book()
    months = [
        row.amount for row in ledger.table("grants", "kind = 'plan' and status <> 'pending' order by effective_at")
    ]
    assert (
        months[:4] + months[5:] == [1000] * 4 + [3000] * 9 + [1000] * 23
    )  # the new plan gave less than the old took back
    assert 0 < months[4] < 2000
    spent = -sum(entry.amount for entry in ledger.history("alpha", max_rows=1000, kinds=["spend"]))
    assert spent > 10000
    (subscription,) = ledger.table("subscriptions")
    assert (subscription.state, ledger.row("get_subscription_state", account_id="alpha").state) == (
        "canceled",
        "canceled",
    )
    assert {row.status for row in ledger.table("purchases")} == {"partially_refunded", "completed"}
    proof = ledger.prove_balance("alpha")
    assert proof.ok
    with undone(ledger):
        replay(ledger, *shuffled(world.events, random))
        assert ledger.sums() == (proof.balance, 0, proof.balance, 0)
    assert_sound(ledger)
