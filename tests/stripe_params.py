"""What Stripe's own package says of the parameters of each request: a path leads to its class of parameters."""

import ast
import re
from collections.abc import Mapping
from functools import cache
from importlib import import_module
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin

import stripe
from typing_extensions import get_type_hints, is_typeddict


def problems(method: str, path: str, given: Mapping[str, Any]) -> list[str]:
    """What is wrong with a request; nothing, if all is well. A word that Stripe does not know passes."""
    for known, pattern, module, name in addresses():
        if known == method and pattern.fullmatch(path):
            return wrong(getattr(import_module(module), name), given, path)
    return [f"{method} {path} is unknown"]


@cache
def addresses() -> list[tuple[str, re.Pattern[str], str, str]]:
    """Method, path, module and class of every request that the package can make, paths without an id in them first."""
    known: dict[tuple[str, str], tuple[str, str]] = {}
    for file in Path(stripe.__file__).parent.rglob("_*_service.py"):
        nodes = list(ast.walk(ast.parse(file.read_text())))
        imports = [node for node in nodes if isinstance(node, ast.ImportFrom)]
        modules = {name.name: node.module or "" for node in imports for name in node.names}
        for function in nodes:
            if isinstance(function, ast.FunctionDef):
                text = ast.unparse(function)
                call = re.search(r"self\._request\('(\w+)', '([^']+)'", text)
                name = re.search(r"params: [^=]*?(\w+Params)\b", text)
                if call and name:
                    known[call[1], call[2]] = modules[name[1]], name[1]
    return [
        (method, re.compile(re.sub(r"\{\w+\}", "[^/]+", path)), *where)
        for (method, path), where in sorted(known.items(), key=lambda one: "{" in one[0][1])
    ]


def wrong(kind: Any, value: Any, where: str) -> list[str]:
    """What is wrong with a value that should be of a kind."""
    origin, arms = get_origin(kind), get_args(kind)
    if origin in {Union, UnionType}:
        found = [wrong(arm, value, where) for arm in arms if "UntypedStripeObject" not in str(arm)]
        return min(found, key=lambda one: (len(one), one[:1] == [f"{where} is no word of its list"]))
    if is_typeddict(kind):
        return wrong_keys(kind, value, where)
    if origin is Literal:
        return [] if value in arms else [f"{where} is no word of its list"]
    plain: type = origin or kind
    fits = isinstance(value, plain) and (plain is bool or not isinstance(value, bool))
    if not fits:
        return [f"{where} is no {plain.__name__}"]
    parts = enumerate(value) if origin is list else value.items() if origin is dict else ()
    return [problem for name, one in parts for problem in wrong(arms[-1], one, f"{where}[{name}]")]


def wrong_keys(kind: Any, value: Any, where: str) -> list[str]:
    """What is wrong with an object of named parameters."""
    if not isinstance(value, dict):
        return [f"{where} is no object"]
    hints = get_type_hints(
        kind, localns={"Mapping": Mapping, "StripeContext": stripe.StripeContext}, include_extras=True
    )
    needed = {name for name, hint in hints.items() if "NotRequired" not in str(get_origin(hint))}
    found = [f"{where} has no {name}" for name in sorted(needed - value.keys())]
    for name, one in value.items():
        hint = hints.get(name)
        inner = get_args(hint)[0] if "Required" in str(get_origin(hint)) else hint
        found += wrong(inner, one, f"{where}.{name}") if hint else [f"{where} has an unknown {name}"]
    return found
