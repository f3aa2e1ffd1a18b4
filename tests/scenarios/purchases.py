"""Packages of credits, bought at once."""

from stripe_world import World

from scenarios import Outcome, bought, story


@story
def a_purchase(world: World) -> Outcome:
    """The card pays at once."""
    world.buy("alpha")
    return Outcome(1000, [bought(1000)], purchases=["completed"])


@story
def a_purchase_by_bank_transfer(world: World) -> Outcome:
    """The checkout is complete today, the money comes later."""
    session = world.buy("alpha", paid=False)
    world.wait(days=2)
    world.pay_late(session)
    return Outcome(1000, [bought(1000)], purchases=["completed"])


@story
def a_bank_transfer_that_fails(world: World) -> Outcome:
    """The checkout is complete, the money never comes."""
    session = world.buy("alpha", paid=False)
    world.wait(days=2)
    world.fail_late(session)
    return Outcome(0, purchases=["failed"])


@story
def a_bank_transfer_under_way(world: World) -> Outcome:
    """Nothing is granted before the money is there."""
    world.buy("alpha", paid=False)
    return Outcome(0, purchases=["processing"])


@story
def a_checkout_left_alone(world: World) -> Outcome:
    """The first checkout expires, the second is paid."""
    world.abandon("alpha")
    world.buy("alpha")
    return Outcome(1000, [bought(1000)], purchases=["expired", "completed"])


@story
def a_stranger_pays(world: World) -> Outcome:
    """A customer of one account never pays for another, and is never bound anew."""
    world.buy("alpha")
    world.meanwhile()
    world.buy("beta", customer="cus_alpha")
    return Outcome(1000, [bought(1000)], purchases=["completed"], parked=["customer_of_another_account"])
