"""The plans of the statements inside the hot functions, as auto_explain sees them."""

import re
from typing import Any

import psycopg
from cluster import BenchError, Database

VERBS = {
    "spend": "select * from credits.spend('acct_{n}', 1, key => 'plan_{n}')",
    "reserve": "select * from credits.reserve('acct_{n}', 2, 'plan_{n}')",
    "settle": "select * from credits.settle('acct_{n}', 'plan_{n}', 1)",
    "get_balance": "select * from credits.get_balance('acct_{n}')",
    "spend_many": "select * from credits.spend_many((select jsonb_agg(jsonb_build_object("
    "'account_id', 'acct_' || i, 'amount', 1, 'key', 'plan_{n}_' || i)) from generate_series(1, 100) i))",
}
EVENTS = ("customer.subscription.updated", "invoice.paid", "charge.succeeded", "refund.created")
EVENT = """select credits.receive_stripe_event('plan', floor.event_of(s.payload, 1000000 + {{n}}, 100))
  from (select s.payload from floor.stream s where s.shape = 'new' and s.name = '{event}' order by s.step limit 1) s"""
WARM = 10  # after five calls PL/pgSQL decides whether a plan may be generic
SWITCHES = ("log_analyze", "log_buffers", "log_wal", "log_timing", "log_nested_statements")


def explain(database: Database) -> str:
    """Call each verb until its plans are settled, then once more and keep the plan of every statement inside."""
    parts = ["Plans with EXPLAIN (ANALYZE, BUFFERS, WAL) of each statement, in the order in which they end.\n"]
    with database.admin() as conn:
        try:
            conn.execute("load 'auto_explain'")
            for switch in SWITCHES:
                conn.execute(f"set auto_explain.{switch} = on".encode())
            conn.execute("set auto_explain.log_level = 'notice'")
        except (psycopg.errors.InsufficientPrivilege, psycopg.errors.UndefinedFile) as error:
            raise BenchError(f"auto_explain cannot be loaded here: {error}") from error
        for verb, call in (VERBS | {event: EVENT.format(event=event) for event in EVENTS}).items():
            for n in range(1, WARM + 1):
                conn.execute(call.format(n=n).encode())
            parts += [f"\n{'=' * 100}\n{verb}: {call.format(n=WARM + 1)}\n{'=' * 100}\n", *_caught(conn, call)]
    return "\n".join(parts)


def _caught(conn: psycopg.Connection[Any], call: str) -> list[str]:
    texts: list[str] = []

    def keep(notice: psycopg.errors.Diagnostic) -> None:
        within = re.search(r"^(PL/pgSQL|SQL) function .*$", notice.context or "", re.MULTILINE)
        place = within.group() if within else "the call itself"
        texts.append(f"--- {len(texts) + 1}: {place}\n{notice.message_primary}\n")

    conn.add_notice_handler(keep)
    conn.execute("set auto_explain.log_min_duration = 0")
    conn.execute(call.format(n=WARM + 1).encode())
    conn.remove_notice_handler(keep)  # switching off is a statement too
    conn.execute("set auto_explain.log_min_duration = -1")
    return texts
