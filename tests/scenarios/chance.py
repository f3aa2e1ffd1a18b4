"""Stories nobody thought of: whatever can happen next happens by chance."""

from collections.abc import Callable
from random import Random
from typing import Literal

from stripe_world import World


class Chance:
    """An account to which things happen."""

    def __init__(self, world: World, random: Random) -> None:
        self.world, self.random = world, random
        self.subscription = ""
        self.owed = ""  # the invoice that failed
        self.paid: list[str] = []
        self.refunds: list[str] = []
        self.disputes: list[str] = []

    def play(self, steps: int) -> None:
        """So many things happen, some in the same second."""
        for _ in range(steps):
            self.pass_time()
            self.random.choice(self.possible())()

    def pass_time(self) -> None:
        """Hours or days pass."""
        self.wait(self.random.choice([0, 0, 1, 30, 100, 200]))

    def wait(self, hours: int) -> None:
        """So many hours pass, but no period of a subscription ends unseen."""
        if self.subscription:
            left = (self.world.facts[self.subscription]["end"] - self.world.now) // 3600 - 1
            hours = max(0, min(hours, left))
        self.world.wait(hours=hours)

    def possible(self) -> list[Callable[[], None]]:
        """What can happen now."""
        can: list[Callable[[], None]] = [self.buy, self.buy_slowly]
        if not self.subscription:
            can += [self.subscribe, self.subscribe]
        else:
            known = self.world.facts[self.subscription]
            resting = known["pause_collection"]
            if self.owed:
                can += [self.recover, self.recover, self.give_up]
            elif known["cancel_at_period_end"]:
                can += [self.finish, self.uncancel]
            elif known["status"] == "trialing":
                can += [self.renew, self.cancel]
            else:
                can += [self.renew, self.renew, self.cancel, self.cancel_later, self.pause_or_resume]
                can += [] if resting else [self.change, self.change, self.change_later]
        can += [self.refund] if self.paid else []
        can += [self.dispute] if self.paid else []
        can += [self.fail_refund] if self.refunds else []
        can += [self.close, self.close] if self.disputes else []
        return can

    def buy(self) -> None:
        self.paid.append(self.world.buy("alpha"))

    def buy_slowly(self) -> None:
        session = self.world.buy("alpha", paid=False)
        self.wait(20)
        (self.world.pay_late if self.random.random() < 0.5 else self.world.fail_late)(session)

    def subscribe(self) -> None:
        prices = self.random.choice(
            [["basic"], ["pro"], ["seat"], ["week"], ["basic", "seat", "calls"], ["pro", "setup"]]
        )
        self.subscription = self.world.subscribe(
            "alpha",
            *prices,
            quantity=self.random.randint(1, 3),
            trial_days=self.random.choice([0, 0, 14]),
            coupon=self.random.choice([0, 0, 0, 50, 100]),
            named=self.random.choice(["everywhere", "session", "customer"]),
        )
        self.remember(self.world.first_invoice(self.subscription))

    def renew(self) -> None:
        paid = self.random.random() < 0.7
        invoice = self.world.renew(self.subscription, paid=paid)
        if invoice and not paid and self.world.facts[invoice]["amount_due"]:
            self.owed = invoice
        elif invoice:
            self.remember(invoice)

    def remember(self, invoice: str) -> None:
        """What was paid by a charge can be refunded."""
        if self.world.facts[invoice]["payment_intent"]:
            self.paid.append(invoice)

    def change(self) -> None:
        price = self.random.choice(["basic", "pro", "seat"])
        quantity, reset = self.random.randint(1, 3), self.random.random() < 0.2
        self.remember(self.world.change(self.subscription, price, quantity=quantity, reset=reset))

    def change_later(self) -> None:
        self.world.change(self.subscription, quantity=self.random.randint(1, 4), bill="next")

    def recover(self) -> None:
        self.world.pay(self.owed)
        self.remember(self.owed)
        self.owed = ""

    def give_up(self) -> None:
        self.world.move(self.subscription, "unpaid")
        self.world.wait(hours=1)
        self.cancel()

    def cancel(self) -> None:
        self.world.cancel(self.subscription)
        self.subscription = self.owed = ""

    def cancel_later(self) -> None:
        self.world.cancel(self.subscription, at_period_end=True)

    def uncancel(self) -> None:
        self.world.uncancel(self.subscription)

    def finish(self) -> None:
        self.world.finish(self.subscription)
        self.subscription = ""

    def pause_or_resume(self) -> None:
        resting = self.world.facts[self.subscription]["pause_collection"]
        (self.world.resume_collection if resting else self.world.pause_collection)(self.subscription)

    def refund(self) -> None:
        paid = self.random.choice(self.paid)
        charge = self.world.charge_of(paid)
        left = charge["amount"] - charge["amount_refunded"]
        if left:
            self.refunds.append(self.world.refund(paid, max(1, left * self.random.randint(1, 4) // 4)))

    def fail_refund(self) -> None:
        self.world.fail_refund(self.refunds.pop())

    def dispute(self) -> None:
        paid = self.random.choice(self.paid)
        part = self.random.choice([None, None, self.world.charge_of(paid)["amount"] // 3])
        self.disputes.append(self.world.dispute(paid, part))

    def close(self) -> None:
        self.world.close(self.disputes.pop(), self.random.choice(["won", "lost", "prevented"]))


class Years(Chance):
    """The same with years, which are paid out month by month, and with more rest: weeks pass, a subscription sleeps."""

    def pass_time(self) -> None:
        super().pass_time()
        if self.random.random() < 0.4 and self.lasts(hours=1100):
            self.world.wait(hours=1000)

    def lasts(self, hours: int) -> bool:
        """Whether the subscription's period goes on for so long."""
        return bool(self.subscription) and self.world.facts[self.subscription]["end"] - self.world.now > hours * 3600

    def possible(self) -> list[Callable[[], None]]:
        known = self.world.facts.get(self.subscription, {"status": ""})
        if known["status"] == "paused":
            return [self.wake, self.wake, self.cancel, self.buy, *([self.refund] if self.paid else [])]
        rests = known["status"] == "active" and not self.owed and not known["cancel_at_period_end"]
        return super().possible() + ([self.sleep, self.waver, self.change_years] if rests else [])

    def subscribe(self) -> None:
        prices = self.random.choice([["year"], ["year", "calls"], ["large_year"], ["quarter"], ["basic"]])
        self.subscription = self.world.subscribe("alpha", *prices, coupon=self.random.choice([0, 0, 50]))
        self.remember(self.world.first_invoice(self.subscription))

    def change_years(self) -> None:
        price = self.random.choice(["year", "large_year"])
        bill: Literal["now", "apart"] = self.random.choice(["now", "apart"])
        self.remember(self.world.change(self.subscription, price, quantity=self.random.randint(1, 3), bill=bill))

    def waver(self) -> None:
        """A payment is missing for a while."""
        self.world.move(self.subscription, "past_due")
        self.world.wait(hours=self.random.choice([0, 50, 300]) if self.lasts(hours=400) else 0)
        self.world.move(self.subscription, "active")

    def sleep(self) -> None:
        self.world.pause(self.subscription)

    def wake(self) -> None:
        self.remember(self.world.resume(self.subscription))


class Rests(Chance):
    """A year that rests now and then. Some of what is told of it says nothing new."""

    def pass_time(self) -> None:
        self.wait(self.random.choice([1, 50, 200, 300, 400]))

    def possible(self) -> list[Callable[[], None]]:
        return [self.pause_or_resume, self.move, self.move] if self.subscription else [self.subscribe]

    def subscribe(self) -> None:
        self.subscription = self.world.subscribe("alpha", self.random.choice(["year", "quarter"]))

    def move(self) -> None:
        self.world.move(self.subscription, self.random.choice(["active", "past_due", "unpaid", "paused"]))
