"""The catalogue's document: read with the line of everything in it, written as YAML, and its differences as text.

What a catalogue may say is decided by SQL. Here paths become lines, and lines paths.
"""

import json
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from decimal import Decimal
from functools import partial
from pathlib import Path
from typing import Any

import psycopg
import yaml
from psycopg import Connection
from psycopg.types.json import set_json_loads

from pgcredits import db

Key = str | int
_SECTIONS = ("capabilities", "quality_levels", "models", "packages", "plans", "rates")
_KEYS = (  # the order in which a person reads them
    "capability", "quality", "model", "valid_from", "name", "description", "unit", "calls", "units", "credits", "price",
    "amount", "per", "rolling", "currency", "interval", "discount_percent", "popular", "monthly_credits",
    "trial_credits", "prices", "rollover", "rollover_cap", "seats", "is_default", "display_order", "active",
    "stripe_product_id", "stripe_price_id", "stripe_price_ids", "qualities", "limits", "capabilities",
)  # fmt: skip
_TAG = "tag:yaml.org,2002:"
_UNSTORABLE = "has a character that PostgreSQL cannot hold"
_NUMBER = re.compile(r"-?(0|[1-9][0-9]*)(\.[0-9]+)?([eE][-+]?[0-9]{1,3})?")


class CatalogError(Exception):
    """A document that cannot be read or applied, or a file that cannot be written. Each line starts with the file."""


@dataclass
class Document:
    """A document as exact JSON text, and the line of each path in it."""

    name: str
    text: str = ""
    lines: dict[tuple[Key, ...], int] = field(default_factory=dict)

    def complaint(self, path: list[Key], problem: str) -> str:
        """`catalogue.yaml:14: plans.pro.seats: problem`: the line of the path, or of the nearest part above it."""
        known = next((tuple(path[:n]) for n in range(len(path), -1, -1) if tuple(path[:n]) in self.lines), None)
        where = self.name if known is None else f"{self.name}:{self.lines[known]}"
        return ": ".join(part for part in (where, _path_text(path), problem) if part)

    def complaints(self, problems: list[dict[str, Any]]) -> str:
        """All problems of an answer of apply_catalog, from top to bottom."""
        found = [(self.complaint(one["path"], one["problem"]), one["path"]) for one in problems]
        return "\n".join(text for text, path in sorted(found, key=lambda one: (self._line(one[1]), one[0])))

    def _line(self, path: list[Key]) -> int:
        return max(self.lines.get(tuple(path[:n]), 0) for n in range(len(path) + 1))


def _path_text(path: list[Key] | tuple[Key, ...]) -> str:
    return "".join(f"[{key}]" if isinstance(key, int) else f".{key}" for key in path).removeprefix(".")


# Reading --------------------------------------------------------------------------------------------------------------


class _Loader(yaml.SafeLoader):
    """Knows null, true, false and JSON's numbers; all else is text, so no date, 010 or 1:30 becomes something else."""

    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012 - so does the class above


_Loader.add_implicit_resolver(f"{_TAG}null", re.compile(r"(~|null|Null|NULL|)$"), ["~", "n", "N", ""])
_Loader.add_implicit_resolver(f"{_TAG}bool", re.compile(r"(true|True|TRUE|false|False|FALSE)$"), list("tTfF"))
_Loader.add_implicit_resolver(f"{_TAG}float", re.compile(f"({_NUMBER.pattern})$"), list("-0123456789"))


def read(file: str) -> Document:
    """Read a document from a file, or from standard input (`-`); JSON is YAML. Raises CatalogError."""
    document = Document("<stdin>" if file == "-" else file)
    try:
        content = sys.stdin.buffer.read() if file == "-" else Path(file).read_bytes()
        root = yaml.compose(content.decode("utf-8-sig"), Loader=_Loader)
        if root is None:
            raise CatalogError(f"{document.name}: the document is empty")
        document.text = _json(root, (), document, ())
    except OSError as error:
        raise CatalogError(f"{document.name}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise CatalogError(f"{document.name}: is not a text in UTF-8") from error
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        said = ", ".join(part for part in (error.context, error.problem) if part)
        raise CatalogError(f"{document.name}:{mark.line + 1 if mark else 1}: {said}") from error
    except yaml.YAMLError as error:
        raise CatalogError(f"{document.name}: {' '.join(str(error).split())}") from error
    except RecursionError as error:
        raise CatalogError(f"{document.name}: is nested too deeply") from error
    return document


def _json(node: yaml.Node, path: tuple[Key, ...], document: Document, above: tuple[yaml.Node, ...]) -> str:
    document.lines.setdefault(path, node.start_mark.line + 1)
    if any(node is one for one in above):
        raise CatalogError(document.complaint(list(path), "contains itself"))
    above = (*above, node)
    if isinstance(node, yaml.MappingNode):
        members = (
            f"{json.dumps(key)}: {_json(value, (*path, key), document, above)}"
            for key, value in _members(node, path, document)
        )
        return f"{{{', '.join(members)}}}"
    if isinstance(node, yaml.SequenceNode):
        return f"[{', '.join(_json(value, (*path, n), document, above) for n, value in enumerate(node.value))}]"
    if node.tag == f"{_TAG}null":
        return "null"
    if node.tag == f"{_TAG}bool" and node.value.lower() in ("true", "false"):
        return str(node.value).lower()
    if not _storable(node.value):
        raise CatalogError(document.complaint(list(path), _UNSTORABLE))
    number = node.tag in (f"{_TAG}float", f"{_TAG}int") and _NUMBER.fullmatch(node.value)
    return node.value if number else json.dumps(node.value)


def _members(node: yaml.MappingNode, path: tuple[Key, ...], document: Document) -> Iterator[tuple[str, yaml.Node]]:
    seen: dict[str, int] = {}
    for key, value in node.value:
        line = key.start_mark.line + 1
        if not isinstance(key, yaml.ScalarNode):
            raise CatalogError(f"{document.name}:{line}: {_path_text(path)}: a key is a text")
        if not _storable(key.value):
            raise CatalogError(f"{document.name}:{line}: {_path_text(path)}: {_UNSTORABLE}")
        document.lines[*path, key.value] = line
        if key.value in seen:
            first = f"is given twice, first in line {seen[key.value]}"
            raise CatalogError(document.complaint([*path, key.value], first))
        seen[key.value] = line
        yield key.value, value


def _storable(text: str) -> bool:
    """Whether PostgreSQL can hold a text: no NUL, and no half of a character that is written as two."""
    try:
        return "\0" not in text.encode("utf-16", "surrogatepass").decode("utf-16")
    except UnicodeDecodeError:
        return False


# Applying -------------------------------------------------------------------------------------------------------------


def apply(conn: Connection[Any], document: Document, *, dry_run: bool) -> list[str]:
    """Apply a document, or say what that would change; each difference as a line. Raises CatalogError."""
    try:
        changes = _call(conn, "apply_catalog", catalog=document.text, dry_run=dry_run)
    except psycopg.Error as error:
        if error.diag.message_primary != "invalid_catalog":
            raise
        problems = json.loads(error.diag.message_detail or "{}").get("problems", [])
        raise CatalogError(document.complaints(problems)) from error
    return [_difference(**change) for change in changes]


def _difference(change: str, path: str, before: Any, after: Any) -> str:
    head = f"{change:<11}  {path}"
    if change == "changed":
        return f"{head}: {short(before)} -> {short(after)}"
    value = after if change == "added" else before
    if change == "deactivated" or (isinstance(value, dict) and not path.startswith("rates.")):
        return head
    return f"{head}: {short(value)}"


def short(value: Any) -> str:
    """A value in one line, as YAML."""
    text = _dumped(value, default_flow_style=True, width=sys.maxsize)
    return text.removesuffix("...\n").strip()


def _call(conn: Connection[Any], function: str, **arguments: Any) -> list[db.Row]:
    set_json_loads(partial(json.loads, parse_float=Decimal), conn)  # numbers stay what they are
    return db.call(conn, function, **arguments)


# Writing --------------------------------------------------------------------------------------------------------------


class _Dumper(yaml.SafeDumper):
    def increase_indent(self, flow: bool = False, indentless: bool = False) -> None:  # noqa: ARG002 - always
        super().increase_indent(flow, indentless=False)

    def ignore_aliases(self, data: Any) -> bool:  # noqa: ARG002 - equal parts are written twice, not referred to
        return True


def _decimal(dumper: yaml.SafeDumper, value: Decimal) -> yaml.ScalarNode:
    return dumper.represent_scalar(f"{_TAG}float", format(value, "f"))


def _text(dumper: yaml.SafeDumper, value: str) -> yaml.ScalarNode:
    breaks = any(mark in value for mark in "\x85\u2028\u2029")  # which YAML would fold, unless they are escaped
    return dumper.represent_scalar(f"{_TAG}str", value, style='"' if breaks else None)


_Dumper.add_representer(Decimal, _decimal)
_Dumper.add_representer(str, _text)
# What our own reader takes for a number is quoted where it is a text, beside what YAML 1.1 takes for one.
_Dumper.add_implicit_resolver(f"{_TAG}float", re.compile(f"({_NUMBER.pattern})$"), list("-0123456789"))


def export(conn: Connection[Any]) -> str:
    """The stored catalogue as YAML: sections apart, records in their order of display, keys in that of reading."""
    (row,) = _call(conn, "get_catalog")
    catalog = row["get_catalog"]
    ranks = {
        section: {code: record.get("display_order", 0) for code, record in catalog[section].items()}
        for section in _SECTIONS
        if section != "rates"
    }
    ranks["qualities"] = ranks["quality_levels"]
    return "\n".join(_dumped({section: _arranged(section, catalog[section], ranks)}) for section in _SECTIONS)


def write(file: str, text: str) -> None:
    """Write a text to a file, or to standard output (`-`). Raises CatalogError."""
    if file == "-":
        sys.stdout.write(text)
        return
    try:
        Path(file).write_text(text, encoding="utf-8")
    except OSError as error:
        raise CatalogError(f"{file}: cannot be written: {error.strerror}") from error


def _arranged(name: str, value: Any, ranks: dict[str, dict[str, int]]) -> Any:
    if isinstance(value, list):
        return [_arranged("", one, ranks) for one in value]
    if not isinstance(value, dict):
        return value
    if name in ranks:
        keys = sorted(value, key=lambda code: (ranks[name].get(code, 0), code))
        return {code: _arranged("", value[code], ranks) for code in keys}
    keys = sorted(value, key=lambda key: (_KEYS.index(key) if key in _KEYS else len(_KEYS), key))
    return {key: _arranged(key, value[key], ranks) for key in keys}


def _dumped(value: Any, **options: Any) -> str:
    options = {"default_flow_style": False, "width": 120, **options}
    return str(yaml.dump(value, Dumper=_Dumper, allow_unicode=True, sort_keys=False, **options))
