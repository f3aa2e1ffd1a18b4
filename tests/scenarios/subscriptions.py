"""Subscriptions that begin, go on and are paid: each paid line of an invoice grants, once."""

from stripe_world import World

from scenarios import Outcome, active, bought, ended, noon, over, plan, story, trial


@story
def a_new_subscription(world: World) -> Outcome:
    """Checkout, customer, subscription, invoice and payment tell of one fact: credits once."""
    world.untold.clear()
    world.subscribe("alpha", "basic")
    return Outcome(
        1000,
        [plan(1000, "01-31", "02-28")],
        subscriptions=[active("basic", plan="basic", quantity=1, anchor_at=noon("01-31"))],
    )


@story
def a_payment_link(world: World) -> Outcome:
    """Only the session names the account."""
    world.subscribe("alpha", "basic", named="session")
    return Outcome(1000, [plan(1000, "01-31", "02-28")], subscriptions=[active("basic")])


@story
def a_subscription_without_checkout(world: World) -> Outcome:
    """Only the customer names the account, and no event tells of the customer."""
    world.subscribe("alpha", "pro", named="customer")
    return Outcome(3000, [plan(3000, "01-31", "02-28")], subscriptions=[active("pro", plan="pro")])


@story
def a_subscription_never_paid(world: World) -> Outcome:
    """The first payment fails for a day."""
    subscription = world.subscribe("alpha", "basic", paid=False)
    world.wait(hours=23)
    world.move(subscription, "incomplete_expired")
    return Outcome(0, subscriptions=[ended("basic", status="incomplete_expired")])


@story
def renewals(world: World) -> Outcome:
    """Months end on the 28th, the 31st and the 30th; what is not used ends with them."""
    subscription = world.subscribe("alpha", "basic")
    for _ in range(3):
        world.renew(subscription)
    return Outcome(
        1000,
        [over(1000, "01-31", "02-28"), over(1000, "02-28", "03-31"), over(1000, "03-31", "04-30"),
         plan(1000, "04-30", "05-31")],
        subscriptions=[active("basic", period_start=noon("04-30"), period_end=noon("05-31"), anchor_at=noon("01-31"))],
    )  # fmt: skip


@story
def a_year_month_by_month(world: World) -> Outcome:
    """One invoice a year, credits every month: the first, and the one that runs."""
    world.subscribe("alpha", "year")
    world.wait(days=100)
    return Outcome(
        1000,
        [over(1000, "01-31", "02-28"), plan(1000, "04-30", "05-31")],
        subscriptions=[active("year", plan="year", period_start=noon("01-31"), period_end=noon("2031-01-31"))],
    )


@story
def a_year_and_the_next(world: World) -> Outcome:
    """The last month of one invoice ends where the first of the next begins."""
    world.renew(world.subscribe("alpha", "year"))
    return Outcome(
        1000,
        [over(1000, "01-31", "02-28"), plan(1000, "2031-01-31", "2031-02-28")],
        subscriptions=[active("year", period_start=noon("2031-01-31"), period_end=noon("2032-01-31"))],
    )


@story
def a_year_that_ends_early(world: World) -> Outcome:
    """Months that begin after the end are not granted."""
    subscription = world.subscribe("alpha", "year")
    world.wait(days=40)
    world.cancel(subscription)
    world.wait(days=60)
    return Outcome(0, [over(1000, "01-31", "02-28")], subscriptions=[ended("year")], steady=False)


@story
def a_year_canceled_in_its_second_month(world: World) -> Outcome:
    """The month that had begun stays usable until its end."""
    subscription = world.subscribe("alpha", "year")
    world.wait(days=40)
    world.cancel(subscription)
    world.wait(days=5)
    return Outcome(1000, [over(1000, "01-31", "02-28"), plan(1000, "02-28", "03-31")], subscriptions=[ended("year")])


@story
def a_coupon_for_all_of_it(world: World) -> Outcome:
    """Nothing is paid, all is granted."""
    world.subscribe("alpha", "basic", coupon=100)
    return Outcome(1000, [plan(1000, "01-31", "02-28")], subscriptions=[active("basic")])


@story
def a_free_plan(world: World) -> Outcome:
    """A price of nothing grants what it says."""
    world.renew(world.subscribe("alpha", "free"))
    return Outcome(50, [over(50, "01-31", "02-28"), plan(50, "02-28", "03-31")], subscriptions=[active("free")])


@story
def calls_are_billed_afterwards(world: World) -> Outcome:
    """A metered price never grants, whatever its metadata say."""
    world.renew(world.subscribe("alpha", "basic", "calls"))
    return Outcome(1000, [over(1000, "01-31", "02-28"), plan(1000, "02-28", "03-31")])


@story
def a_setup_fee(world: World) -> Outcome:
    """A one-time price on the first invoice is a purchase that never ends."""
    world.renew(world.subscribe("alpha", "basic", "setup"))
    return Outcome(1500, [over(1000, "01-31", "02-28"), plan(1000, "02-28", "03-31"), bought(500)])


@story
def an_invoice_of_several_pages(world: World) -> Outcome:
    """The event shows two lines of four; the credits are those of all."""
    world.page = 2
    world.subscribe("alpha", "basic", "seat", "free", "setup")
    lots = [plan(1000, "01-31", "02-28"), plan(100, "01-31", "02-28"), plan(50, "01-31", "02-28"), bought(500)]
    return Outcome(1650, lots)


@story
def a_trial(world: World) -> Outcome:
    """A trial grants its own credits, not those of the plan."""
    world.subscribe("alpha", "pro", trial_days=14)
    world.wait(days=7)
    return Outcome(
        200, [trial(200, "01-31", "02-14")], subscriptions=[{"state": "trialing", "status": "trialing", "plan": "pro"}]
    )


@story
def a_trial_that_is_paid(world: World) -> Outcome:
    """The credits of the trial end with it, then the plan's first month begins."""
    world.renew(world.subscribe("alpha", "pro", trial_days=14))
    return Outcome(3000, [trial(200, "01-31", "02-14", 0), plan(3000, "02-14", "03-14")], subscriptions=[active("pro")])


@story
def a_trial_that_is_canceled(world: World) -> Outcome:
    """The credits of the trial stay as long as it would have lasted."""
    subscription = world.subscribe("alpha", "pro", trial_days=14)
    world.wait(days=5)
    world.cancel(subscription)
    return Outcome(200, [trial(200, "01-31", "02-14")], subscriptions=[ended("pro")])


@story
def a_price_that_says_no_number(world: World) -> Outcome:
    """What is said of credits and is no number is never guessed: the invoice waits for a person."""
    world.subscribe("alpha", "odd")
    return Outcome(0, subscriptions=[active("odd")], parked=["credits_malformed"])


@story
def weeks(world: World) -> Outcome:
    """A week's price grants a week's credits."""
    world.renew(world.subscribe("alpha", "week"))
    return Outcome(250.5, [over(250.5, "01-31", "02-07"), plan(250.5, "02-07", "02-14")])


@story
def a_quarter_month_by_month(world: World) -> Outcome:
    """Three months are billed at once and granted one by one."""
    world.subscribe("alpha", "quarter")
    world.wait(days=40)
    return Outcome(1000, [over(1000, "01-31", "02-28"), plan(1000, "02-28", "03-31")])


@story
def a_year_that_is_past_due(world: World) -> Outcome:
    """No month comes before the next year is paid."""
    world.renew(world.subscribe("alpha", "year"), paid=False)
    world.wait(days=40)
    return Outcome(0, [over(1000, "01-31", "02-28")], subscriptions=[{"state": "past_due"}])


@story
def a_year_that_will_end(world: World) -> Outcome:
    """To announce the end takes no month away that begins before it."""
    subscription = world.subscribe("alpha", "year")
    world.wait(days=20)
    world.cancel(subscription, at_period_end=True)
    world.wait(days=80)
    return Outcome(1000, [over(1000, "01-31", "02-28"), plan(1000, "04-30", "05-31")])
