"""Make docs/reference.md from the comments in a migrated database.

python docs/reference.py DSN > docs/reference.md
"""

import sys
from typing import Any

import psycopg
from psycopg import Connection

_FUNCTIONS = """
select p.proname as name, pg_get_function_arguments(p.oid) as arguments, pg_get_function_result(p.oid) as result,
       obj_description(p.oid, 'pg_proc') as comment,
       (select string_agg(format('%%s %%s', a.attname, format_type(a.atttypid, a.atttypmod)), ', ' order by a.attnum)
          from pg_type t join pg_attribute a on a.attrelid = t.typrelid and a.attnum > 0 and not a.attisdropped
         where t.oid = p.prorettype) as columns
  from pg_proc p
 where p.pronamespace = %(schema)s::regnamespace and has_function_privilege(%(role)s, p.oid, 'execute')
 order by p.proname
"""
_RELATIONS = """
select c.relname as name, obj_description(c.oid, 'pg_class') as comment,
       array_agg(array[a.attname::text, format_type(a.atttypid, a.atttypmod),
                       coalesce(col_description(c.oid, a.attnum), '')]
                 order by a.attnum) as columns
  from pg_class c join pg_attribute a on a.attrelid = c.oid and a.attnum > 0 and not a.attisdropped
 where c.relnamespace = %(schema)s::regnamespace and c.relkind in ('r', 'v')
 group by c.oid, c.relname
 order by c.relname
"""


def reference(conn: Connection[Any]) -> str:
    """The page as Markdown, of the database that conn is connected to."""
    backend = {"schema": "credits", "role": "credits_service"}
    browser = {"schema": "credits_api", "role": "credits_user"}
    lines = [
        "# Reference",
        "",
        "Made by `docs/reference.py` from the comments in the database; `\\df+ credits.*` in psql shows the same.",
        "",
        "## Functions of `credits`, for your backend",
        *_functions(conn, backend),
        "",
        "## Functions of `credits_api`, for the browser",
        *_functions(conn, browser),
        "",
        "## Views of `credits_api`, for the browser",
        *_relations(conn, browser),
        "",
        "## Tables and views of `credits`",
        "",
        "For reading along: nobody may write to a table, and `90_grants.sql` says which views a backend may read.",
        *_relations(conn, backend),
    ]
    return "\n".join(lines) + "\n"


def _functions(conn: Connection[Any], of: dict[str, str]) -> list[str]:
    lines = []
    for name, arguments, result, comment, columns in conn.execute(_FUNCTIONS, of):
        lines += ["", f"### {name}", "", "```", f"{name}({arguments})"]
        lines += [f"returns {result}"] if result else ["a procedure"]
        lines += [f"  ({columns})"] if columns else []
        lines += ["```", "", comment]
    return lines


def _relations(conn: Connection[Any], of: dict[str, str]) -> list[str]:
    lines = []
    for name, comment, columns in conn.execute(_RELATIONS, of):
        lines += ["", f"### {name}", "", comment, "", "| column | type | |", "|---|---|---|"]
        lines += [f"| `{column}` | {type_} | {text} |" for column, type_, text in columns]
    return lines


if __name__ == "__main__":
    with psycopg.connect(sys.argv[1]) as connection:
        sys.stdout.write(reference(connection))
