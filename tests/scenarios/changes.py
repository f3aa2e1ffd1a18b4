"""Plans that change: the difference for the rest of the period, once, and never more than the largest plan of it."""

from stripe_world import World

from scenarios import Outcome, active, noon, over, plan, story, trial


@story
def an_upgrade(world: World) -> Outcome:
    """Half of the month is left: half of the new plan comes, half of the old one goes."""
    subscription = world.subscribe("alpha", "basic")
    world.wait(days=14)
    world.change(subscription, "pro")
    return Outcome(
        2000,
        [plan(1000, "01-31", "02-28"), plan(1000, "02-14", "02-28")],
        subscriptions=[active("pro", plan="pro", period_start=noon("01-31"), period_end=noon("02-28"))],
    )


@story
def an_upgrade_and_a_renewal(world: World) -> Outcome:
    """The next month is the new plan's, in full."""
    subscription = world.subscribe("alpha", "basic")
    world.wait(days=14)
    world.change(subscription, "pro")
    world.renew(subscription)
    return Outcome(
        3000,
        [over(1000, "01-31", "02-28"), over(1000, "02-14", "02-28"), plan(3000, "02-28", "03-31")],
        subscriptions=[active("pro")],
    )


@story
def an_upgrade_that_begins_anew(world: World) -> Outcome:
    """The anchor moves: a whole month of the new plan, less the half of the old one that is given back."""
    subscription = world.subscribe("alpha", "basic")
    world.wait(days=14)
    world.change(subscription, "pro", reset=True)
    return Outcome(
        3500,
        [plan(1000, "01-31", "02-28"), plan(2500, "02-14", "03-14")],
        subscriptions=[active("pro", period_start=noon("02-14"), period_end=noon("03-14"))],
    )


@story
def an_upgrade_to_a_year(world: World) -> Outcome:
    """The first of its months is less what the old plan gives back."""
    subscription = world.subscribe("alpha", "basic")
    world.wait(days=14)
    world.change(subscription, "year")
    world.wait(days=30)
    return Outcome(
        1000,
        [over(1000, "01-31", "02-28"), over(500, "02-14", "03-14"), plan(1000, "03-14", "04-14")],
        subscriptions=[active("year", plan="year")],
    )


@story
def a_downgrade_is_scheduled(world: World) -> Outcome:
    """It is known what comes when the period ends; until then nothing changes."""
    subscription = world.subscribe("alpha", "pro")
    world.wait(days=10)
    world.schedule(subscription, "basic")
    return Outcome(
        3000,
        [plan(3000, "01-31", "02-28")],
        subscriptions=[active("pro", plan="pro", pending_plan="basic", pending_at=noon("02-28"))],
    )


@story
def a_downgrade_at_the_end_of_the_period(world: World) -> Outcome:
    """It is scheduled; the switch and the smaller invoice come with the next period."""
    subscription = world.subscribe("alpha", "pro")
    world.wait(days=10)
    world.schedule(subscription, "basic")
    world.renew(subscription)
    return Outcome(
        1000,
        [over(3000, "01-31", "02-28"), plan(1000, "02-28", "03-31")],
        subscriptions=[active("basic", plan="basic", pending_plan=None)],
    )


@story
def seats_up(world: World) -> Outcome:
    """Two more seats for half a month are billed with the next one, and usable in it."""
    subscription = world.subscribe("alpha", "seat", quantity=3)
    world.wait(days=14)
    world.change(subscription, quantity=5, bill="next")
    world.renew(subscription)
    return Outcome(
        600,
        [over(300, "01-31", "02-28"), plan(100, "02-14", "03-31"), plan(500, "02-28", "03-31")],
        subscriptions=[active("seat", quantity=5)],
    )


@story
def seats_down(world: World) -> Outcome:
    """What two seats give back for half a month is taken from the next one."""
    subscription = world.subscribe("alpha", "seat", quantity=5)
    world.wait(days=14)
    world.change(subscription, quantity=3, bill="next")
    world.renew(subscription)
    return Outcome(
        200, [over(500, "01-31", "02-28"), plan(200, "02-28", "03-31")], subscriptions=[active("seat", quantity=3)]
    )


@story
def down_up_down_up(world: World) -> Outcome:
    """To leave the large plan and to come back refills nothing."""
    subscription = world.subscribe("alpha", "pro")
    for price in ("basic", "pro", "basic", "pro"):
        world.wait(days=5.6)
        world.change(subscription, price)
    return Outcome(3000, [plan(3000, "01-31", "02-28")], subscriptions=[active("pro")])


@story
def down_up_down_up_billed_apart(world: World) -> Outcome:
    """Nor where the lines do not say which item they change."""
    subscription = world.subscribe("alpha", "pro")
    for price in ("basic", "pro", "basic", "pro"):
        world.wait(days=5.6)
        world.change(subscription, price, bill="apart")
    return Outcome(3000, [plan(3000, "01-31", "02-28")], subscriptions=[active("pro")])


@story
def one_of_two_items_is_billed_apart(world: World) -> Outcome:
    """The other item keeps its own: what the whole subscription may grant is the sum."""
    subscription = world.subscribe("alpha", "basic", "seat")
    world.change(subscription, "pro", bill="apart")
    return Outcome(3100, [plan(amount, "01-31", "02-28") for amount in (1000, 100, 2000)])


@story
def an_upgrade_at_the_last_minute(world: World) -> Outcome:
    """Its lines come to nothing: that is no trial."""
    subscription = world.subscribe("alpha", "basic")
    world.wait(days=28, minutes=-5)
    world.change(subscription, "pro")
    return Outcome(1000, [plan(1000, "01-31", "02-28")], subscriptions=[active("pro")])


@story
def from_free_to_paid(world: World) -> Outcome:
    """What a free plan gives back costs nothing, and is taken from what the new one grants all the same."""
    subscription = world.subscribe("alpha", "free")
    world.wait(days=14)
    world.change(subscription, "pro")
    return Outcome(1525, [plan(50, "01-31", "02-28"), plan(1475, "02-14", "02-28")], subscriptions=[active("pro")])


@story
def seats_of_a_trial(world: World) -> Outcome:
    """To change a trial and to change it back refills nothing."""
    subscription = world.subscribe("alpha", "pro", trial_days=14)
    for quantity in (2, 1, 2):
        world.wait(days=2)
        world.change_trial(subscription, quantity=quantity)
    return Outcome(400, [trial(200, "01-31", "02-14"), trial(200, "02-02", "02-14")])


@story
def from_a_year_to_a_larger_one(world: World) -> Outcome:
    """Each month that follows is the larger one's, whichever invoice came first."""
    subscription = world.subscribe("alpha", "year")
    world.wait(days=14)
    world.change(subscription, "large_year", reset=False)
    world.wait(days=30)
    return Outcome(
        3000,
        [over(1000, "01-31", "02-28"), over(1000, "02-14", "02-28"), plan(3000, "02-28", "03-31")],
        subscriptions=[active("large_year")],
    )


@story
def up_down_up(world: World) -> Outcome:
    """Together the changes never grant more than the large plan: the last one only what is missing to it."""
    subscription = world.subscribe("alpha", "basic")
    world.wait(days=7)
    world.change(subscription, "pro")
    world.wait(days=7)
    world.change(subscription, "basic")
    world.change(subscription, "pro")
    return Outcome(
        3000,
        [plan(1000, "01-31", "02-28"), plan(1500, "02-07", "02-28"), plan(500, "02-14", "02-28")],
        subscriptions=[active("pro")],
    )


@story
def up_down_up_and_a_refund(world: World) -> Outcome:
    """A refund takes what that very change granted, which the cap had cut to five hundred."""
    subscription = world.subscribe("alpha", "basic")
    world.wait(days=7)
    world.change(subscription, "pro")
    world.wait(days=7)
    world.change(subscription, "basic")
    last = world.change(subscription, "pro")
    world.wait(hours=1)
    world.refund(last)
    return Outcome(
        2500,
        [plan(1000, "01-31", "02-28"), plan(1500, "02-07", "02-28"), plan(500, "02-14", "02-28", 0)],
        subscriptions=[active("pro")],
    )


@story
def from_a_quarter_to_a_month(world: World) -> Outcome:
    """The months of the quarter that had not begun never come."""
    world.wait(days=1)
    subscription = world.subscribe("alpha", "quarter")
    world.wait(days=14)
    world.change(subscription, "pro")
    world.renew(subscription)
    return Outcome(
        3000,
        [over(1000, "02-01", "03-01"), over(2500, "02-15", "03-15"), plan(3000, "03-15", "04-15")],
        subscriptions=[active("pro", period_start=noon("03-15"))],
        steady=False,
    )


@story
def from_a_year_to_a_month_at_once(world: World) -> Outcome:
    """What the year would have granted later leaves room for what the month grants."""
    subscription = world.subscribe("alpha", "year")
    world.change(subscription, "pro")
    world.renew(subscription)
    return Outcome(
        3000,
        [over(1000, "01-31", "02-28"), over(2000, "01-31", "02-28"), plan(3000, "02-28", "03-31")],
        subscriptions=[active("pro")],
        steady=False,
    )


@story
def from_a_refunded_year_to_a_month(world: World) -> Outcome:
    """A month of the year that should not have come is taken back, whatever a refund had taken of it."""
    world.wait(days=1)
    subscription = world.subscribe("alpha", "year")
    world.wait(days=14)
    world.refund(world.first_invoice(subscription), 2500)
    world.change(subscription, "pro")
    world.renew(subscription)
    return Outcome(
        3000,
        [over(1000, "02-01", "03-01"), over(2500, "02-15", "03-15"), plan(3000, "03-15", "04-15")],
        subscriptions=[active("pro")],
        steady=False,
    )
