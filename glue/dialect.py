"""PostgREST's words for reading rows: a query string, Range, Prefer and Accept become one SQL query and its parameters.

Names go into the query as quoted identifiers, values as parameters, and what is not understood is refused.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

from psycopg import sql
from starlette.requests import Request

from pgcredits.answers import Refused

JSON, OBJECT = "application/json", "application/vnd.pgrst.object+json"
ACCEPTED = {"*/*": JSON, "application/*": JSON, JSON: JSON, OBJECT: OBJECT, "application/vnd.pgrst.object": OBJECT}
MAX_DEPTH = 100  # of a body
SCALAR = "pgrst_scalar"  # the one column of a function that returns no row

COMPARED = {"eq": "=", "neq": "<>", "gt": ">", "gte": ">=", "lt": "<", "lte": "<=", "like": "like", "ilike": "ilike"}
CONSTANTS = {"null": "null", "true": "true", "false": "false", "unknown": "unknown"}
FILTER = re.compile(rf"(not\.)?({'|'.join(COMPARED)}|is|in)\.(.*)", re.DOTALL)
LISTED = re.compile(r'(?:"(?:[^"\\]|\\.)*"|[^",]*)', re.DOTALL)
STRING = re.compile(r'"(?:[^"\\]|\\.)*+"?', re.DOTALL)  # also one without an end: a body of quotes takes no longer
ORDER = re.compile(r"(\w+)(?:\.(asc|desc))?(?:\.nulls(first|last))?", re.ASCII)
NAME = re.compile(r"[A-Za-z_]\w*", re.ASCII)
Part = tuple[sql.Composed, list[Any]]


@dataclass(frozen=True)
class Reading:
    """Which rows and columns of a view, or of what a function returns."""

    singular: bool
    count: str | None
    columns: sql.Composable
    where: Part
    order: sql.Composable
    limit: int
    offset: int
    arguments: dict[str, str] = field(default_factory=dict)

    def query(self, source: Part, *, scalar: bool, counted: bool, void: bool = False) -> Part:
        """One row: how many there are (if counted), how many are shown, and they, as a JSON array."""
        condition, values = self.where
        row = sql.Identifier("_page", SCALAR) if scalar else sql.Identifier("_page")
        query = sql.SQL(
            "with src as (select s.* from ({}) s {}), page as (select {} from src s {} limit %s offset %s)"
            " select {} as total, count(*) as shown, coalesce(json_agg({}), '[]')::text as body,"
            " nullif(current_setting('response.headers', true), '') as headers,"
            " nullif(current_setting('response.status', true), '') as status,"
            " nullif(current_setting('credits.await', true), '') as awaits from page _page"
        ).format(
            source[0], condition, sql.SQL("s.*") if scalar else self.columns, self.order,
            sql.SQL("(select count(*) from src)" if counted else "null::bigint"),
            sql.SQL("null::json") if void else row,
        )  # fmt: skip
        return query, [*source[1], *values, self.limit, self.offset]


def reading(request: Request, max_rows: int, *, arguments: bool = False) -> Reading:
    """What a request asks to see. With arguments, what is no filter is one. Raises Refused."""
    given = request.query_params.multi_items()
    plain = {name: value for name, value in given if name in {"select", "order", "limit", "offset"}}
    filters = [(name, value) for name, value in given if name not in {*plain, "columns"}]
    named = {name: value for name, value in filters if not FILTER.fullmatch(value)} if arguments else {}
    parts = [_filter(name, value) for name, value in filters if name not in named]
    conditions = sql.SQL(" and ").join([part for part, _ in parts])
    limit, offset = _page(request, plain)
    counts = re.search(r"\bcount=(exact|planned|estimated)\b", ",".join(request.headers.getlist("prefer")))
    return Reading(
        singular=_accepted(request) == OBJECT,
        count=counts[1] if counts else None,
        columns=_columns(plain.get("select") or "*"),
        where=(
            sql.SQL("where {}").format(conditions) if parts else sql.Composed([]),
            [v for _, vs in parts for v in vs],
        ),
        order=_order(plain["order"]) if plain.get("order") else sql.SQL(""),
        limit=max_rows if limit is None else min(limit, max_rows),
        offset=offset,
        arguments=named,
    )


def keys(text: str) -> list[str]:
    """The keys of a body that is a JSON object. Its values are PostgreSQL's to read. Raises Refused."""
    brackets = re.sub(r"[^][{}]+", "", STRING.sub("", text))
    depth = max(accumulate((1 if one in "[{" else -1 for one in brackets), initial=0))
    try:
        if depth > MAX_DEPTH or "\0" in text:
            raise ValueError
        value = json.loads(text, parse_int=str, parse_float=str, parse_constant=_no_number)
        "".join(value if isinstance(value, dict) else ()).encode()  # half a character has no name
    except (ValueError, RecursionError) as error:
        raise _unreadable() from error
    if not isinstance(value, dict):
        raise _unreadable("The body is one JSON object: the arguments by name.")
    return list(value)


def _unreadable(hint: str | None = None) -> Refused:
    return Refused(400, "Empty or invalid json", hint, code="PGRST102")


def _no_number(text: str) -> None:
    raise ValueError(text)


def _unknown(what: str, text: str) -> Refused:
    return Refused(400, f"failed to parse {what} ({text[:200]})", None, code="PGRST100")


def _name(text: str, what: str) -> sql.Identifier:
    if not NAME.fullmatch(text) or text in {"or", "and"}:
        raise _unknown(what, text)
    return sql.Identifier("s", text)


def _columns(text: str) -> sql.Composable:
    names = [one.strip() for one in text.split(",")]
    return sql.SQL(", ").join(sql.SQL("s.*") if name == "*" else _name(name, "select parameter") for name in names)


def _order(text: str) -> sql.Composable:
    terms: list[sql.Composable] = []
    for one in text.split(","):
        match = ORDER.fullmatch(one.strip())
        if not match:
            raise _unknown("order", text)
        ends = f" {match[2] or 'asc'}" + (f" nulls {match[3]}" if match[3] else "")
        terms.append(_name(match[1], "order") + sql.SQL(ends))
    return sql.SQL("order by ") + sql.SQL(", ").join(terms)


def _filter(name: str, value: str) -> Part:
    match = FILTER.fullmatch(value)
    if not match or "\0" in value:
        raise _unknown("filter", f"{name}={value}")
    column, operator, operand = _name(name, "filter"), match[2], match[3]
    values: Sequence[str] = []
    if operator == "is":
        wanted = operand.lower()
        if wanted not in {*CONSTANTS, "not_null"}:
            raise _unknown("filter", value)
        test: sql.Composable = sql.SQL("is not null" if wanted == "not_null" else f"is {CONSTANTS[wanted]}")
    elif operator == "in":
        values = _members(operand)
        test = (
            sql.SQL("in ({})").format(sql.SQL(", ").join(sql.SQL("%s") * len(values)))
            if values
            else sql.SQL("is null and false")
        )
    else:
        values = [operand.replace("*", "%") if operator.endswith("like") else operand]
        test = sql.SQL(f"{COMPARED[operator]} %s")
    return sql.SQL("not ({} {})" if match[1] else "({} {})").format(column, test), list(values)


def _members(text: str) -> list[str]:
    if not re.fullmatch(rf"\({LISTED.pattern}(,{LISTED.pattern})*\)", text, re.DOTALL):
        raise _unknown("filter", text)
    found = re.findall(rf"(?:^|,)({LISTED.pattern})", text[1:-1], re.DOTALL) if text != "()" else []
    return [re.sub(r"\\(.)", r"\1", one[1:-1], flags=re.DOTALL) if one[:1] == '"' else one for one in found]


def _page(request: Request, plain: dict[str, str]) -> tuple[int | None, int]:
    limit, offset = plain.get("limit"), plain.get("offset")
    if limit is None and offset is None and request.method in {"GET", "HEAD"}:
        match = re.fullmatch(r"(?:items=)?(\d{1,12})-(\d{0,12})", request.headers.get("range", ""), re.ASCII)
        if match:
            first, last = int(match[1]), match[2] and int(match[2])
            if last != "" and last < first:
                raise out_of_range(None)
            return (last - first + 1 if last != "" else None), first
    for name, text in (("limit", limit), ("offset", offset)):
        if text is not None and not re.fullmatch(r"\d{1,12}", text, re.ASCII):
            raise out_of_range(None) if text.startswith("-") else _unknown(name, text)
    return (None if limit is None else int(limit)), int(offset or 0)


def out_of_range(details: str | None) -> Refused:
    """416: there are no such rows."""
    return Refused(416, "Requested range not satisfiable", None, code="PGRST103", details=details)


def _accepted(request: Request) -> str:
    wanted = [one.strip().lower() for one in request.headers.get("accept", "*/*").split(",")]
    for one in wanted:
        kind, _, more = one.partition(";")
        if kind.strip() in ACCEPTED and "nulls=stripped" not in more:
            return ACCEPTED[kind.strip()]
    message = f"None of these media types are available: {', '.join(wanted)[:200]}"
    raise Refused(406, message, None, code="PGRST107")
