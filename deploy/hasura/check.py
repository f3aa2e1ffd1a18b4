"""Checks Hasura's metadata against the database, without Hasura: python deploy/hasura/check.py --dsn DSN [FOLDER].

DSN logs in as Hasura does. Prints what is wrong, one line each; exit code 1 if anything is.
"""

import argparse
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psycopg
import yaml
from psycopg import Connection
from psycopg.rows import dict_row

FOLDER = Path(__file__).with_name("metadata")
LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
WRITING = ("insert_permissions", "update_permissions", "delete_permissions")
OPERATORS = {"_eq", "_neq", "_gt", "_gte", "_lt", "_lte", "_in", "_nin", "_is_null"}
SCOPES = {"user_id": "X-Hasura-User-Id", "org_id": "X-Hasura-Org-Id"}
EXPOSED = {"v": "mutation", "s": "query", "i": "query"}

RELATION = """
select array(select a.attname::text from pg_attribute a
              where a.attrelid = c.oid and a.attnum > 0 and not a.attisdropped) as columns,
       has_schema_privilege(n.oid, 'usage') and has_table_privilege(c.oid, 'select') as readable,
       has_table_privilege(c.oid, 'insert, update, delete, truncate') as writable
  from pg_class c
  join pg_namespace n on n.oid = c.relnamespace
 where n.nspname = %s and c.relname = %s and c.relkind in ('r', 'v', 'm', 'p')
"""
FUNCTIONS = """
select p.provolatile as volatility, p.proretset as is_set, n.nspname as returns_schema, c.relname as returns_name,
       p.proargmodes is null as only_in,
       has_schema_privilege(f.oid, 'usage') and has_function_privilege(p.oid, 'execute') as granted,
       has_function_privilege('public', p.oid, 'execute') as everybodys,
       array(select (proargnames[i] || ' ' || format_type(p.proargtypes[i - 1], null))
               from generate_series(1, p.pronargs) i) as arguments
  from pg_proc p
  join pg_namespace f on f.oid = p.pronamespace
  join pg_type t on t.oid = p.prorettype
  left join pg_class c on c.oid = t.typrelid and c.relkind in ('r', 'v', 'm', 'p')
  left join pg_namespace n on n.oid = c.relnamespace
 where f.nspname = %s and p.proname = %s
"""
LOGIN = """
select r.rolsuper or r.rolbypassrls as is_above,
       array(select n.nspname::text from pg_namespace n
              where n.nspname in ('credits', 'credits_api') and has_schema_privilege(n.oid, 'usage')) as reached,
       array(select m.rolname::text from pg_roles m
              where m.rolname ~ '^credits_' and pg_has_role(m.oid, 'member')) as member_of
  from pg_roles r
 where r.rolname = current_user
"""


class UnreadableError(Exception):
    """The folder is not metadata of version 3; the text says where."""


def load(folder: Path) -> dict[str, Any]:
    """The first database of a folder of metadata, with every !include resolved."""
    if (_read(folder / "version.yaml") or {}).get("version") != 3:  # noqa: PLR2004 - the format's own number
        raise UnreadableError("version.yaml: the version is not 3")
    file = folder / "databases/databases.yaml"
    databases = _resolve(_read(file), file)
    if not isinstance(databases, list) or len(databases) != 1:
        raise UnreadableError("databases/databases.yaml: it should name one database")
    found: dict[str, Any] = databases[0]
    return found


def _read(file: Path) -> Any:
    try:
        return yaml.load(file.read_text(encoding="utf-8"), LOADER)  # noqa: S506 - both are safe, one is slow
    except (OSError, yaml.YAMLError) as error:
        raise UnreadableError(f"{file}: {error}") from error


def _resolve(value: Any, file: Path) -> Any:
    if isinstance(value, str) and value.startswith("!include "):
        target = file.parent / value.removeprefix("!include ")
        return _resolve(_read(target), target)
    if isinstance(value, list):
        return [_resolve(one, file) for one in value]
    if isinstance(value, dict):
        return {key: _resolve(one, file) for key, one in value.items()}
    return value


@dataclass
class Check:
    """One database of the metadata beside a connection of Hasura's login."""

    conn: Connection[Any]
    tables: list[Any]
    functions: list[Any]

    def problems(self) -> Iterator[str]:
        """All that is wrong, one line each."""
        yield from self._login()
        if not self.tables or not self.functions:
            yield "nothing is tracked"
        for table in self.tables:
            yield from (f"{_name(table['table'])}: {problem}" for problem in self._table(table))
        for function in self.functions:
            yield from (f"{_name(function['function'])}(): {problem}" for problem in self._function(function))

    def _login(self) -> Iterator[str]:
        (login,) = self._rows(LOGIN)
        if login["is_above"]:
            yield "the login: no right and no policy binds it"
        if login["reached"] or login["member_of"]:
            yield f"the login: reaches {', '.join(login['reached'] + login['member_of'])}"

    def _table(self, table: dict[str, Any]) -> Iterator[str]:
        found = self._rows(RELATION, table["table"]["schema"], table["table"]["name"])
        if not found:
            yield "there is no such relation"
            return
        if not found[0]["readable"]:
            yield "SELECT is not granted"
        if found[0]["writable"]:
            yield "the login may write into it"
        yield from (f"has {kind}" for kind in WRITING if table.get(kind))
        for one in table.get("select_permissions") or []:
            yield from (f"{one['role']}: {problem}" for problem in _selects(one["permission"], found[0]["columns"]))

    def _function(self, function: dict[str, Any]) -> Iterator[str]:
        candidates = self._rows(FUNCTIONS, function["function"]["schema"], function["function"]["name"])
        if len(candidates) != 1:
            yield f"there are {len(candidates)} functions of this name"
            return
        (found,) = candidates
        configuration = function.get("configuration") or {}
        if not found["granted"]:
            yield "EXECUTE is not granted"
        if found["everybodys"]:
            yield "everybody may execute it"
        if not found["only_in"]:
            yield "it has arguments that are not IN"
        if configuration.get("exposed_as") != EXPOSED[found["volatility"]]:
            yield f"exposed_as is not {EXPOSED[found['volatility']]}"
        if f"{configuration.get('session_argument')} json" not in found["arguments"]:
            yield "session_argument is none of its arguments, or no json"
        yield from self._permissions(function, {"schema": found["returns_schema"], "name": found["returns_name"]})

    def _permissions(self, function: dict[str, Any], returned: dict[str, Any]) -> Iterator[str]:
        shapes = [table for table in self.tables if table["table"] == returned]
        roles = {one["role"] for shape in shapes for one in shape.get("select_permissions") or []}
        if not shapes:
            yield f"it returns {_name(returned)}, which is not tracked"
        if not function.get("permissions"):
            yield "no role may call it"
        for one in function.get("permissions") or []:
            if one["role"] not in roles:
                yield f"{one['role']} may not select from {_name(returned)}"

    def _rows(self, query: str, *parameters: Any) -> list[dict[str, Any]]:
        with self.conn.cursor(row_factory=dict_row) as cursor:
            return cursor.execute(query.encode(), parameters or None).fetchall()


def _selects(permission: dict[str, Any], columns: list[str]) -> Iterator[str]:
    shown = permission.get("columns")
    if not isinstance(shown, list) or not shown:
        yield "columns are not listed one by one"
    else:
        yield from (f"there is no column {name}" for name in shown if name not in columns)
    yield from (f"the filter names no column: {name}" for name in _compared(permission.get("filter")) - set(columns))
    equal = dict(_demanded(permission.get("filter")))
    if equal.get("issuer") != "X-Hasura-Issuer" or all(equal.get(name) != value for name, value in SCOPES.items()):
        yield "the filter does not demand the issuer and the user or organisation of the session"
    if not isinstance(permission.get("limit"), int):
        yield "there is no limit"
    if permission.get("allow_aggregations") is not False:
        yield "allow_aggregations is not false"
    for fields in ("query_root_fields", "subscription_root_fields"):
        if permission.get(fields) != []:
            yield f"{fields} is not empty"


def _compared(filter_: Any) -> set[str]:
    """The columns that a filter speaks of, wherever in it."""
    if isinstance(filter_, list):
        return set().union(*map(_compared, filter_))
    if not isinstance(filter_, dict):
        return set()
    names = {name for name in filter_ if not name.startswith("_")}
    return names.union(*(_compared(value) for name, value in filter_.items() if name.startswith("_")))


def _demanded(filter_: Any) -> Iterator[tuple[str, Any]]:
    """What must be equal to what, whatever else a filter allows: not what stands in _or or _not."""
    for name, value in filter_.items() if isinstance(filter_, dict) else ():
        if name == "_and" and isinstance(value, list):
            for one in value:
                yield from _demanded(one)
        elif isinstance(value, dict) and "_eq" in value and set(value) <= OPERATORS:
            yield name, value["_eq"]


def _name(relation: dict[str, Any]) -> str:
    return f"{relation['schema']}.{relation['name']}"


def check(dsn: str, folder: Path = FOLDER) -> list[str]:
    """All that is wrong with a folder of metadata on a database."""
    try:
        source = load(folder)
    except UnreadableError as error:
        return [str(error)]
    with psycopg.connect(dsn) as conn:
        return list(Check(conn, source.get("tables") or [], source.get("functions") or []).problems())


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--dsn", required=True, help="the database, as Hasura's login")
    parser.add_argument("folder", nargs="?", type=Path, default=FOLDER)
    given = parser.parse_args()
    problems = check(given.dsn, given.folder)
    print("\n".join(problems) or "Hasura's metadata fits the database.")
    sys.exit(bool(problems))


if __name__ == "__main__":
    main()
