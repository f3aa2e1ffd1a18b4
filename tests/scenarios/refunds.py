"""Money that goes back takes the credits that it bought, first the unspent ones; what was spent becomes debt."""

from stripe_world import World

from scenarios import Outcome, active, bought, over, plan, story


@story
def a_part_is_refunded(world: World) -> Outcome:
    """Three tenths of the money, three tenths of the credits."""
    world.refund(world.buy("alpha"), 300)
    return Outcome(700, [bought(1000, 700)], purchases=["partially_refunded"])


@story
def refunded_in_parts(world: World) -> Outcome:
    """Two parts, then the rest."""
    session = world.buy("alpha")
    for amount in (300, 200, None):
        world.wait(days=1)
        world.refund(session, amount)
    return Outcome(0, [bought(1000, 0)], purchases=["refunded"])


@story
def a_refund_that_fails(world: World) -> Outcome:
    """The bank sends the money back: the credits return."""
    refund = world.refund(world.buy("alpha"), 400)
    world.wait(days=2)
    world.fail_refund(refund)
    return Outcome(1000, [bought(1000)], purchases=["completed"])


@story
def one_refund_of_two_fails(world: World) -> Outcome:
    """What counts is the sum of those that did not fail."""
    session = world.buy("alpha")
    first = world.refund(session, 400)
    world.refund(session, 500)
    world.wait(days=2)
    world.fail_refund(first)
    return Outcome(500, [bought(1000, 500)], purchases=["partially_refunded"])


@story
def refunded_after_it_was_spent(world: World) -> Outcome:
    """Two hundred are left to take, eight hundred are owed."""
    session = world.buy("alpha")
    world.meanwhile(spend=("alpha", 800))
    world.refund(session)
    return Outcome(-800, [bought(1000, 0)], debt=800, purchases=["refunded"])


@story
def debt_is_paid_by_the_next_purchase(world: World) -> Outcome:
    """The next credits pay what is owed first."""
    session = world.buy("alpha")
    world.meanwhile(spend=("alpha", 800))
    world.refund(session)
    world.wait(days=1)
    world.meanwhile()
    world.buy("alpha")
    return Outcome(200, [bought(1000, 0), bought(1000, 200)], purchases=["refunded", "completed"])


@story
def a_dispute(world: World) -> Outcome:
    """While it is open, what is unspent is taken."""
    world.dispute(world.buy("alpha"))
    return Outcome(0, [bought(1000, 0)], purchases=["disputed"], steady=False)


@story
def a_dispute_after_it_was_spent(world: World) -> Outcome:
    """While it is open, nothing is owed."""
    session = world.buy("alpha")
    world.meanwhile(spend=("alpha", 800))
    world.dispute(session)
    return Outcome(0, [bought(1000, 0)], purchases=["disputed"])


@story
def a_dispute_won(world: World) -> Outcome:
    """All that was taken comes back."""
    dispute = world.dispute(world.buy("alpha"))
    world.wait(days=30)
    world.close(dispute, "won")
    return Outcome(1000, [bought(1000)], purchases=["completed"])


@story
def a_dispute_won_after_it_was_spent(world: World) -> Outcome:
    """Exactly what was taken comes back: two hundred."""
    session = world.buy("alpha")
    world.meanwhile(spend=("alpha", 800))
    dispute = world.dispute(session)
    world.wait(days=30)
    world.close(dispute, "won")
    return Outcome(200, [bought(1000, 200)], purchases=["completed"])


@story
def a_dispute_lost(world: World) -> Outcome:
    """What was taken is gone."""
    dispute = world.dispute(world.buy("alpha"))
    world.wait(days=30)
    world.close(dispute, "lost")
    return Outcome(0, [bought(1000, 0)])


@story
def a_dispute_lost_after_it_was_spent(world: World) -> Outcome:
    """Lost, it counts in full: what was spent is owed."""
    session = world.buy("alpha")
    world.meanwhile(spend=("alpha", 800))
    dispute = world.dispute(session)
    world.wait(days=30)
    world.close(dispute, "lost")
    return Outcome(-800, [bought(1000, 0)], debt=800)


@story
def a_dispute_won_late(world: World) -> Outcome:
    """Lost first, won in the end."""
    dispute = world.dispute(world.buy("alpha"))
    world.wait(days=30)
    world.close(dispute, "lost")
    world.wait(days=30)
    world.close(dispute, "won")
    return Outcome(1000, [bought(1000)], purchases=["completed"])


@story
def a_dispute_of_what_was_not_refunded(world: World) -> Outcome:
    """Four tenths are refunded, six tenths are lost: together all of it."""
    session = world.buy("alpha")
    world.refund(session, 400)
    world.wait(days=5)
    dispute = world.dispute(session, 600)
    world.wait(days=30)
    world.close(dispute, "lost")
    return Outcome(0, [bought(1000, 0)])


@story
def a_dispute_of_all_beside_a_refund(world: World) -> Outcome:
    """Refund and dispute together ask for more than was paid: never more than was granted is taken."""
    session = world.buy("alpha")
    world.refund(session, 400)
    dispute = world.dispute(session)
    world.wait(days=30)
    world.close(dispute, "won")
    return Outcome(600, [bought(1000, 600)], purchases=["partially_refunded"])


@story
def half_a_month_is_refunded(world: World) -> Outcome:
    """The payment of an invoice takes back what its lines granted."""
    subscription = world.subscribe("alpha", "basic")
    world.wait(days=5)
    world.refund(world.first_invoice(subscription), 500)
    return Outcome(500, [plan(1000, "01-31", "02-28", 500)], subscriptions=[active("basic")])


@story
def a_month_is_disputed(world: World) -> Outcome:
    """The grants of an invoice are disputed like a purchase; seats and setup fee alike."""
    subscription = world.subscribe("alpha", "basic", "setup")
    world.wait(days=5)
    world.close(world.dispute(world.first_invoice(subscription)), "lost")
    return Outcome(0, [plan(1000, "01-31", "02-28", 0), bought(500, 0)])


@story
def an_upgrade_is_refunded(world: World) -> Outcome:
    """Only what that invoice granted is taken."""
    subscription = world.subscribe("alpha", "basic")
    world.wait(days=14)
    world.refund(world.change(subscription, "pro"))
    return Outcome(1000, [plan(1000, "01-31", "02-28"), plan(1000, "02-14", "02-28", 0)])


@story
def a_year_is_refunded(world: World) -> Outcome:
    """The month that runs is taken, and none follows."""
    subscription = world.subscribe("alpha", "year")
    world.wait(days=10)
    world.refund(world.first_invoice(subscription))
    world.cancel(subscription)
    return Outcome(0, [plan(1000, "01-31", "02-28", 0)])


@story
def a_quarter_of_a_year_is_refunded(world: World) -> Outcome:
    """It is missing in the month that runs, and in each that follows."""
    subscription = world.subscribe("alpha", "year")
    world.wait(days=40)
    world.refund(world.first_invoice(subscription), 2500)
    return Outcome(750, [over(1000, "01-31", "02-28"), plan(1000, "02-28", "03-31", 750)])


@story
def a_refund_under_way(world: World) -> Outcome:
    """A refund counts from its first word on."""
    world.refund(world.buy("alpha"), 250, status="pending")
    return Outcome(750, [bought(1000, 750)], purchases=["partially_refunded"])


@story
def a_refund_that_only_its_charge_tells(world: World) -> Outcome:
    """An endpoint that hears of no refunds hears of charges."""
    world.untold.add("refund.created")
    world.refund(world.buy("alpha"), 250)
    return Outcome(750, [bought(1000, 750)], purchases=["partially_refunded"])


@story
def a_refunded_month_whose_payment_nobody_told(world: World) -> Outcome:
    """Which invoice a payment paid can be asked for."""
    world.untold.add("invoice_payment.paid")
    subscription = world.subscribe("alpha", "basic")
    world.wait(days=5)
    world.refund(world.first_invoice(subscription), 500)
    return Outcome(500, [plan(1000, "01-31", "02-28", 500)])


@story
def an_inquiry(world: World) -> Outcome:
    """The bank asks before any money moves: nothing is taken."""
    world.dispute(world.buy("alpha"), status="warning_needs_response")
    return Outcome(1000, [bought(1000)], purchases=["completed"])


@story
def a_dispute_that_names_only_the_charge(world: World) -> Outcome:
    """What the charge paid for is found through the charge."""
    world.close(world.dispute(world.buy("alpha"), payment_intent=None), "lost")
    return Outcome(0, [bought(1000, 0)])


@story
def a_dispute_in_another_currency(world: World) -> Outcome:
    """Amounts of two currencies are never compared: it stands for the whole charge."""
    world.close(world.dispute(world.buy("alpha"), 90, currency="jpy"), "lost")
    return Outcome(0, [bought(1000, 0)])


@story
def two_disputes_of_one_charge(world: World) -> Outcome:
    """One half is lost, the other one won."""
    session = world.buy("alpha")
    first, second = world.dispute(session, 500), world.dispute(session, 500)
    world.wait(days=20)
    world.close(first, "lost")
    world.close(second, "won")
    return Outcome(500, [bought(1000, 500)])
