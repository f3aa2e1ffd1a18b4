"""A catalogue for tests, and changes of it."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
from client import CreditsError

CATALOG: dict[str, Any] = {
    "capabilities": {
        "chapter": {"name": "Chapter", "description": "One of a book.", "unit": "words", "display_order": 2},
        "outline": {"name": "Outline", "display_order": 1},
    },
    "quality_levels": {"draft": {"name": "Draft", "display_order": 1}, "best": {"name": "Best", "display_order": 2}},
    "models": {"small": {"name": "Small"}, "large": {"name": "Large"}},
    "packages": {
        "starter": {"name": "Starter", "credits": 1000, "price": 999, "currency": "usd"},
        "bulk": {"name": "Bulk", "credits": 0.5, "price": 1, "currency": "eur", "stripe_price_id": "price_bulk"},
    },
    "plans": {
        "pro": {
            "name": "Professional",
            "monthly_credits": 100,
            "qualities": {"draft": ["small"], "best": ["large", "small"]},
            "limits": [{"calls": 100, "per": "minute"}],
            "capabilities": {
                "outline": None,
                "chapter": {
                    "qualities": {"best": ["large"]},
                    "limits": [{"calls": 10, "per": "minute"}, {"units": 100000, "per": "month"}],
                },
            },
        },
        "free": {
            "name": "Free", "is_default": True, "stripe_price_ids": ["price_free"], "capabilities": {"outline": {}},
        },
    },
    "rates": [
        {"capability": "outline", "price": 50},
        {"capability": "chapter", "quality": "best", "model": "large", "price": {"credits": 1, "block": 10}},
    ],
}  # fmt: skip


class Gone:
    """Says that a value is to be taken away."""

    def __repr__(self) -> str:
        return "gone"


GONE = Gone()


def changed(*changes: tuple[str, Any]) -> dict[str, Any]:
    """The catalogue with values set (or GONE) at paths such as plans.pro.limits.0.per."""
    catalog = copy.deepcopy(CATALOG)
    for path, value in changes:
        *above, last = (int(part) if part.isdecimal() else part for part in path.split("."))
        target: Any = catalog
        for part in above:
            target = target[part]
        if value is GONE:
            del target[last]
        elif isinstance(target, list) and last == len(target):
            target.append(value)
        else:
            target[last] = value
    return catalog


def problems_of(action: Callable[[], Any]) -> dict[str, str]:
    """What is wrong by its path, as apply_catalog says it."""
    with pytest.raises(CreditsError) as caught:
        action()
    assert (caught.value.status, caught.value.code) == (400, "invalid_catalog"), caught.value
    assert caught.value.hint
    return {".".join(map(str, one["path"])): one["problem"] for one in caught.value.detail["problems"]}
