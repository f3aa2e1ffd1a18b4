"""Whether parameters are what Stripe's own library says of them: names, nesting and types, recursively."""

from collections.abc import Mapping
from types import NoneType, UnionType
from typing import Any, Literal, NotRequired, Required, Union, get_args, get_origin

import stripe
from typing_extensions import get_type_hints, is_typeddict

NAMES = {"Mapping": Mapping, "StripeContext": stripe.StripeContext}  # which its types name and do not import
OPTIONS = {
    "api_key", "stripe_version", "stripe_account", "stripe_context", "max_network_retries", "idempotency_key",
    "content_type", "headers", "base",
}  # fmt: skip


def problems(wanted: Any, given: Any, path: str = "") -> list[str]:
    """What is wrong with a value of a type, each with its path."""
    origin, inner = get_origin(wanted), get_args(wanted)
    if is_typeddict(wanted):
        return _of_object(wanted, given, path)
    if origin in {NotRequired, Required}:
        return problems(inner[0], given, path)
    if origin in {Union, UnionType}:
        arms = [arm for arm in inner if "UntypedStripeObject" not in str(arm)]
        return min((problems(arm, given, path) for arm in arms), key=len)
    if origin not in {list, dict}:
        fits = given in inner if origin is Literal else type(given) is (wanted or NoneType)
        return [] if fits else [f"{path}: {given!r} is no {wanted}"]
    if not isinstance(given, origin):
        return [f"{path}: {given!r} is no {origin.__name__}"]
    parts = enumerate(given) if origin is list else given.items()
    return [found for name, one in parts for found in problems(inner[-1], one, f"{path}.{name}")]


def _of_object(wanted: Any, given: Any, path: str) -> list[str]:
    if not isinstance(given, dict):
        return [f"{path}: {given!r} is no object"]
    hints = get_type_hints(wanted, include_extras=True, localns=NAMES)
    allowed = set(hints) - (OPTIONS if not path else set())
    found = [f"{path}.{name}: missing" for name in wanted.__required_keys__ if name not in given]
    found += [f"{path}.{name}: unknown" for name in given if name not in allowed]
    for name in set(given) & allowed:
        found += problems(hints[name], given[name], f"{path}.{name}")
    return found
