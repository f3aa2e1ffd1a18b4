"""Stories that Stripe tells: each plays on a World, and says what must come of it in whatever order the events come."""

from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from stripe_world import World


@dataclass(frozen=True)
class Lot:
    """A grant that has started: what came, what is left of it, and the noons between which it is usable."""

    kind: str
    amount: float
    left: float
    start: str | None = None
    end: str | None = None


@dataclass(frozen=True)
class Outcome:
    """What must come of a story. Fields of subscriptions and purchases that are not named may be anything."""

    available: float
    grants: list[Lot] = field(default_factory=list)
    debt: int = 0
    subscriptions: list[dict[str, Any]] = field(default_factory=list)
    purchases: list[str] = field(default_factory=list)
    parked: list[str] = field(default_factory=list)
    steady: bool = True  # what is spent meanwhile is missing in the end, and nothing else differs


Story = Callable[[World], Outcome]
STORIES: dict[str, Story] = {}


def story(function: Story) -> Story:
    """List a story under its name."""
    STORIES[function.__name__] = function
    return function


def bought(amount: float, left: float | None = None) -> Lot:
    """Credits that never end."""
    return Lot("purchase", amount, amount if left is None else left)


def plan(amount: float, start: str, end: str, left: float | None = None) -> Lot:
    """Credits of a plan between two days of 2030, such as 01-31."""
    return Lot("plan", amount, amount if left is None else left, noon(start), noon(end))


def trial(amount: float, start: str, end: str, left: float | None = None) -> Lot:
    """Credits of a trial."""
    return Lot("trial", amount, amount if left is None else left, noon(start), noon(end))


def over(amount: float, start: str, end: str) -> Lot:
    """Credits of a plan whose time is over."""
    return plan(amount, start, end, 0)


def noon(day: str) -> str:
    """A noon of 2030, or of the year that the day names, as UTC says it."""
    return datetime.fromisoformat(f"{day if len(day) > 5 else f'2030-{day}'}T12:00+00:00").isoformat()


def active(price: str, **more: Any) -> dict[str, Any]:
    """A subscription that goes on."""
    return {"state": "active", "status": "active", "price_id": f"price_{price}", **more}


def ended(price: str, **more: Any) -> dict[str, Any]:
    """A subscription that is over."""
    return {"state": "canceled", "price_id": f"price_{price}", **more}
