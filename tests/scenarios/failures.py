"""Payments that fail, subscriptions that rest or end."""

from stripe_world import World

from scenarios import Outcome, active, ended, noon, over, plan, story

FIRST, SECOND = ("01-31", "02-28"), ("02-28", "03-31")


@story
def past_due(world: World) -> Outcome:
    """The new period has begun, its money has not come: nothing is granted."""
    world.renew(world.subscribe("alpha", "basic"), paid=False)
    return Outcome(0, [over(1000, *FIRST)], subscriptions=[{"state": "past_due", "status": "past_due"}])


@story
def a_recovery(world: World) -> Outcome:
    """The second attempt succeeds three days later."""
    invoice = world.renew(world.subscribe("alpha", "basic"), paid=False)
    world.wait(days=3)
    world.fail(invoice)
    world.wait(days=3)
    world.pay(invoice)
    return Outcome(1000, [over(1000, *FIRST), plan(1000, *SECOND)], subscriptions=[active("basic")])


@story
def unpaid(world: World) -> Outcome:
    """Stripe gives up and keeps the subscription."""
    subscription = world.subscribe("alpha", "basic")
    world.renew(subscription, paid=False)
    world.wait(days=14)
    world.move(subscription, "unpaid")
    return Outcome(0, [over(1000, *FIRST)], subscriptions=[{"state": "unpaid", "status": "unpaid"}])


@story
def paid_after_all(world: World) -> Outcome:
    """The invoice of an unpaid subscription is paid by hand: its month is granted as far as it is left."""
    subscription = world.subscribe("alpha", "basic")
    invoice = world.renew(subscription, paid=False)
    world.wait(days=14)
    world.move(subscription, "unpaid")
    world.wait(days=2)
    world.pay(invoice)
    return Outcome(1000, [over(1000, *FIRST), plan(1000, *SECOND)], subscriptions=[active("basic")])


@story
def canceled_for_want_of_money(world: World) -> Outcome:
    """Stripe gives up and ends the subscription."""
    subscription = world.subscribe("alpha", "basic")
    world.renew(subscription, paid=False)
    world.wait(days=14)
    world.cancel(subscription)
    return Outcome(0, [over(1000, *FIRST)], subscriptions=[ended("basic", status="canceled")])


@story
def collection_rests(world: World) -> Outcome:
    """A month is not billed and not granted, the next one is."""
    subscription = world.subscribe("alpha", "basic")
    world.wait(days=10)
    world.pause_collection(subscription)
    world.renew(subscription)
    world.wait(days=10)
    world.resume_collection(subscription)
    world.renew(subscription)
    return Outcome(
        1000,
        [over(1000, *FIRST), plan(1000, "03-31", "04-30")],
        subscriptions=[active("basic", collection_paused=False)],
    )


@story
def collection_still_rests(world: World) -> Outcome:
    """While it rests, what was granted stays usable until its end."""
    subscription = world.subscribe("alpha", "basic")
    world.wait(days=10)
    world.pause_collection(subscription)
    return Outcome(
        1000, [plan(1000, *FIRST)], subscriptions=[{"status": "active", "collection_paused": True}]
    )  # fmt: skip


@story
def a_year_that_rests_in_its_second_month(world: World) -> Outcome:
    """The month had begun, and stays."""
    subscription = world.subscribe("alpha", "year")
    world.wait(days=35)
    world.pause_collection(subscription)
    world.wait(days=5)
    world.move(subscription, "past_due")
    return Outcome(
        1000,
        [over(1000, *FIRST), plan(1000, *SECOND)],
        subscriptions=[{"state": "past_due", "collection_paused": True}],
    )


@story
def asleep(world: World) -> Outcome:
    """A paused subscription says so."""
    subscription = world.subscribe("alpha", "basic")
    world.wait(days=10)
    world.pause(subscription)
    return Outcome(1000, [plan(1000, *FIRST)], subscriptions=[{"state": "paused", "status": "paused"}])


@story
def awake_again(world: World) -> Outcome:
    """A new period begins when it wakes."""
    subscription = world.subscribe("alpha", "basic")
    world.wait(days=10)
    world.pause(subscription)
    world.wait(days=40)
    world.resume(subscription)
    return Outcome(
        1000,
        [over(1000, *FIRST), plan(1000, "03-22", "04-22")],
        subscriptions=[active("basic", period_start=noon("03-22"), period_end=noon("04-22"))],
    )


@story
def canceling(world: World) -> Outcome:
    """It ends with its period, and its credits are usable until then."""
    subscription = world.subscribe("alpha", "basic")
    world.wait(days=10)
    world.cancel(subscription, at_period_end=True)
    return Outcome(
        1000,
        [plan(1000, *FIRST)],
        subscriptions=[
            {"state": "canceling", "status": "active", "cancel_at_period_end": True, "cancel_at": noon("02-28")}
        ],
    )


@story
def canceled_at_the_end_of_the_period(world: World) -> Outcome:
    """The end that was announced."""
    subscription = world.subscribe("alpha", "basic")
    world.wait(days=10)
    world.cancel(subscription, at_period_end=True)
    world.finish(subscription)
    return Outcome(0, [over(1000, *FIRST)], subscriptions=[ended("basic", status="canceled")])


@story
def a_change_of_mind(world: World) -> Outcome:
    """The announced end is taken back, and the subscription goes on."""
    subscription = world.subscribe("alpha", "basic")
    world.cancel(subscription, at_period_end=True)
    world.uncancel(subscription)
    world.renew(subscription)
    return Outcome(
        1000,
        [over(1000, *FIRST), plan(1000, *SECOND)],
        subscriptions=[active("basic", cancel_at_period_end=False, cancel_at=None)],
    )


@story
def canceled_at_once(world: World) -> Outcome:
    """What was granted stays usable until the end of its period."""
    subscription = world.subscribe("alpha", "basic")
    world.wait(days=10)
    world.cancel(subscription)
    return Outcome(1000, [plan(1000, *FIRST)], subscriptions=[ended("basic", status="canceled")])


@story
def a_second_subscription(world: World) -> Outcome:
    """Canceled, and subscribed anew: two subscriptions, and each grants its own."""
    world.cancel(world.subscribe("alpha", "basic"))
    world.wait(days=1)
    world.subscribe("alpha", "pro")
    return Outcome(
        4000, [plan(1000, *FIRST), plan(3000, "02-01", "03-01")], subscriptions=[ended("basic"), active("pro")]
    )
