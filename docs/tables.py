"""Fill in the parts of the manual that are rows of a migrated database: between <!-- rows: NAME --> and <!-- end -->.

python docs/tables.py DSN
"""

import re
import sys
from pathlib import Path
from typing import Any

import psycopg
from psycopg import Connection

ROOT = Path(__file__).resolve().parents[1]
PAGES = (
    "README.md",
    *(f"docs/{name}.md" for name in ("concepts", "jobs", "notifications", "operations", "stripe", "subscriptions")),
)
BLOCK = re.compile(r"(<!-- rows: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)
UNASKED = r"^((object|answer|failed|again)\.|v2\.core\.event$)"  # answers to our own requests, and thin events


def filled(page: str, conn: Connection[Any]) -> str:
    """The page with each of its blocks made anew."""
    return BLOCK.sub(lambda found: found[1] + BLOCKS[found[2]](conn) + "\n" + found[3], page)


def diagram(conn: Connection[Any]) -> str:
    """The states of a subscription and the moves between them, for Mermaid. No subscription is where it begins."""
    moves = conn.execute(
        "select case t.from_state when 'none' then '[*]' else t.from_state end, t.to_state"
        "  from credits.subscription_transitions t"
        "  join credits.subscription_states f on f.state = t.from_state"
        "  join credits.subscription_states s on s.state = t.to_state"
        " order by f.state <> 'none', f.rank, s.rank"
    ).fetchall()
    ends = conn.execute("select s.state, '[*]' from credits.subscription_states s where s.terminal order by s.rank")
    lines = [f"    {before} --> {after}" for before, after in [*moves, *ends]]
    return "\n".join(["```mermaid", "stateDiagram-v2", *lines, "```"])


def states(conn: Connection[Any]) -> str:
    """What each state allows."""
    rows = conn.execute(
        "select format('`%s`', s.state), case when s.may_spend then 'yes' else 'no' end,"
        "       case when s.may_receive then 'yes' else 'no' end, s.summary"
        "  from credits.subscription_states s order by s.rank"
    )
    return _table(("state", "may spend", "credits go on", ""), rows)


def moves(conn: Connection[Any]) -> str:
    """The moves that are foreseen, by what they call."""
    rows = conn.execute(
        "select t.effect, format('`%s`', t.to_state), string_agg(format('`%s`', t.from_state), ', ' order by f.rank)"
        "  from credits.subscription_transitions t"
        "  join credits.subscription_states f on f.state = t.from_state"
        "  join credits.subscription_states s on s.state = t.to_state"
        " group by t.effect, t.to_state, s.rank order by s.rank, t.effect"
    )
    return _table(("to", "from", "effect"), [(to, before, f"`{effect}`") for effect, to, before in rows])


def kinds(conn: Connection[Any]) -> str:
    """The kinds of entries, and between which accounts of the books they move credits."""
    rows = conn.execute(
        "select format('`%s`', k.kind), k.debit, k.credit, k.summary from credits.entry_kinds k"
        " order by k.debit = 'customer_debt', 'customer_credits' in (k.credit, k.debit) desc, k.kind"
    )
    return _table(("kind", "debit", "credit", ""), rows)


def notifications(conn: Connection[Any]) -> str:
    """The kinds of notifications, and who gets an e-mail."""
    rows = conn.execute(
        "select format('`%s`', k.kind), k.audience, k.summary from credits.notification_kinds k"
        " order by k.audience, k.kind"
    )
    return _table(("kind", "for", "when"), rows)


def settings(conn: Connection[Any]) -> str:
    """The settings, with the values that they come with."""
    rows = conn.execute(
        "select format('`%s`', s.name), coalesce(s.value #>> '{}', 'null'), s.summary from credits.settings s"
        " order by s.name"
    )
    return _table(("setting", "default", ""), rows)


def events(conn: Connection[Any]) -> str:
    """What is done with each type of event."""
    rows = conn.execute(
        "select format('`%%s.`', t.family), string_agg(format('`%%s`', t.name), ', ' order by t.name), t.summary"
        r"  from (select regexp_replace(h.event_type, '\.\w+$', '') as family, h.summary,"
        r"               substring(h.event_type from '\w+$') as name"
        "          from credits.stripe_handlers h where h.event_type !~ %s) t"
        " group by t.family, t.summary order by t.family",
        [UNASKED],
    )
    return _table(("family", "types", "what it does"), rows)


def jobs(conn: Connection[Any]) -> str:
    """The jobs as they come."""
    rows = conn.execute(
        "select format('`%s`', j.name), format('`%s`', j.schedule), coalesce(j.batch_size::text, ''), j.summary"
        "  from credits.jobs j order by j.name"
    )
    return _table(("job", "when", "batch", "does"), rows)


def _table(heads: tuple[str, ...], rows: Any) -> str:
    lines = [heads, ("---",) * len(heads), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


BLOCKS = {
    "diagram": diagram, "states": states, "moves": moves, "kinds": kinds, "notifications": notifications,
    "settings": settings, "events": events,
    "jobs": jobs,
}  # fmt: skip


if __name__ == "__main__":
    with psycopg.connect(sys.argv[1]) as connection:
        for path in (ROOT / page for page in PAGES):
            path.write_text(filled(path.read_text(), connection))
