"""`make bench`: how fast the ledger is on this machine, beside the least that any prepaid balance costs.

The floor is one prepared statement with one UPDATE and one INSERT. It is measured before and after everything else, so
the ratios hold also on a machine whose speed drifts. Speed is never a failure; a ledger that does not add up is.
"""

import json
import sys
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import psycopg
import typer
from cluster import (
    BenchError,
    Database,
    find_install,
    given,
    prepare,
    prepare_access,
    prepare_stream,
    private,
    settings,
)
from measure import BATCH, Bench, Cell, Operation
from plans import explain
from report import Report, Timing, machine
from rich.console import Console

from pgcredits import embedded, migrate

FLOOR = Operation("floor", "floor.sql")
SPEND = Operation("spend", "spend.sql", goal=0.5)
PAIR = Operation("reserve + settle", "reserve_settle.sql", goal=0.28)
BARE_SPEND = Operation("its writes alone", "bare_spend.sql")
BARE_PAIR = Operation("its writes alone", "bare_reserve_settle.sql")
READ = Operation("get_balance", "get_balance.sql")
PURCHASE = Operation("Stripe purchase", "purchase.sql")
LOOKUP = Operation("primary-key select", "lookup.sql")
CHECK = Operation("check_access", "check_access.sql", against="select", goal=0.35)
CHECK_LIMITED = Operation("check_access, two limits", "check_limited.sql", against="select")
USAGE = Operation("authorize_usage + settle_usage", "usage.sql")
USAGE_LIMITED = Operation("the same, two limits", "usage_limited.sql")
EVENTS = Operation("Stripe events, mixed stream", "stripe_events.sql")
MANY = Operation(f"spend_many of {BATCH}", "spend_many.sql", against="spend", goal=8, makes=BATCH)
GROUPS = ("all", "hot", "many", "other", "access", "events", "chain")
CHAIN = ("_entry_hash", "_next_hash", "_entry_text")
CONSTANTS = {"bytea": "\\x00", "text": ""}
TABLES = ("balances", "grants", "reservations")
STREAMS = 8  # clients at most that deliver events
TIMINGS = """
select coalesce(t.name, ''), count(*), percentile_cont(0.5) within group (order by t.ms),
       percentile_cont(0.99) within group (order by t.ms)
  from floor.timings t
 group by rollup (t.name)
 order by t.name nulls first
"""


def measure(bench: Bench, groups: list[str], clients: list[int]) -> list[Cell]:
    """Everything but the chain's price, which breaks the ledger and comes last."""
    cells: list[Cell] = []
    for number in clients:
        if "all" in groups:
            cells += bench.alternate(FLOOR, [SPEND, BARE_SPEND, PAIR, BARE_PAIR], number)
        if "hot" in groups:
            cells += bench.alternate(FLOOR, [SPEND, PAIR], number, hot=True)
    if "many" in groups:
        cells += bench.alternate(SPEND, [MANY], 1)
    for number in clients if "other" in groups else []:
        cells += bench.alternate(FLOOR, [READ, PURCHASE], number)
    if "access" in groups:
        bench.said("laying out a catalogue")
        prepare_access(bench.database, bench.accounts)
    for number in clients if "access" in groups else []:
        cells += bench.alternate(LOOKUP, [CHECK, CHECK_LIMITED], number)
        cells += bench.alternate(FLOOR, [USAGE, USAGE_LIMITED], number)
    return cells


def measure_events(bench: Bench, clients: list[int]) -> tuple[list[Cell], list[Timing], list[str]]:
    """The stream of events; how long each type takes, with the fewest clients; and what was not applied."""
    cells: list[Cell] = []
    timings: list[Timing] = []
    wrong: list[str] = []
    bench.said("laying out the stream of Stripe events")
    prepare_stream(bench.database, bench.accounts)
    with bench.database.connect(None) as owner:
        for number in [number for number in clients if number <= STREAMS]:
            owner.execute("truncate floor.timings")
            cells += bench.alternate(FLOOR, [EVENTS], number)
            found = owner.execute(TIMINGS).fetchall()
            timings += [Timing(number, *row) for row in (found if number == min(clients) else found[:1])]
            others = owner.execute(
                "select name, outcome, count(*) from floor.timings where outcome <> 'applied' group by 1, 2"
            )
            wrong += [f"{name} {outcome} {times} times" for name, outcome, times in others]
    return cells, timings, wrong


def measure_chain(bench: Bench, clients: list[int]) -> tuple[list[Cell], list[str]]:
    """Spends with the chain of hashes and without: the functions that compute it give constants meanwhile."""
    cells: list[Cell] = []
    with bench.database.connect("credits_owner") as owner:
        found = owner.execute(
            "select pg_get_functiondef(p.oid), p.proname, pg_get_function_arguments(p.oid), p.prorettype::regtype::text"
            "  from pg_proc p"
            " where p.proname = any (%s) and p.pronamespace = 'credits'::regnamespace and p.prokind = 'f'",
            [list(CHAIN)],
        ).fetchall()
        if not any(result == "bytea" for *_, result in found):
            return [], [f"chain of hashes: not measured, since there is none of credits.{', credits.'.join(CHAIN)}"]
        originals = ";\n".join(definition for definition, *_ in found)
        constants = ";\n".join(
            f"create or replace function credits.{name}({arguments}) returns {result}"
            f" language sql immutable as $$ select '{CONSTANTS[result]}'::{result} $$"
            for _, name, arguments, result in found
        )
        chained = Operation("spend", "spend.sql", before=lambda: execute(owner, originals))
        free = Operation("spend without hashes", "spend.sql", against="spend", before=lambda: execute(owner, constants))
        for number in sorted({min(clients), max(clients)}):
            cells += replace(bench, rounds=3 * bench.rounds).alternate(chained, [free], number)  # a small difference
    costs = [f"{100 * (1 - 1 / c.ratio):.1f} % with {c.clients} client{'s'[: c.clients > 1]}" for c in cells if c.ratio]
    return cells, [f"chain of hashes: takes off the rate of spend {', '.join(costs)}"]


def execute(conn: psycopg.Connection[Any], text: str) -> None:
    """Execute a statement whose result nobody wants."""
    conn.execute(text.encode())


def hot_updates(conn: psycopg.Connection[Any]) -> dict[str, tuple[int, int]]:
    """All updates so far, and those that were HOT."""
    rows = conn.execute(
        "select relname, n_tup_upd, n_tup_hot_upd from pg_stat_user_tables"
        " where schemaname = 'credits' and relname = any (%s)",
        [list(TABLES)],
    ).fetchall()
    return {name: (updates, hot) for name, updates, hot in rows}


def main(
    *,
    seconds: Annotated[int, typer.Option(min=1, help="Seconds per line and round, after the warm-up.")] = 10,
    rounds: Annotated[int, typer.Option(min=1, help="How often everything alternates with the floor.")] = 1,
    warmup: Annotated[int, typer.Option(min=1, help="Seconds of each run that do not count.")] = 2,
    quick: Annotated[bool, typer.Option("--quick", help="3 seconds, 1 of warm-up: to try things out.")] = False,
    accounts: Annotated[int, typer.Option(min=1)] = 1000,
    clients: Annotated[str, typer.Option(help="Numbers of clients.")] = "1,8,16",
    only: Annotated[str, typer.Option(help=f"Some of {','.join(GROUPS)}.")] = ",".join(GROUPS),
    install: Annotated[str | None, typer.Option(help="Folder with bin/postgres, or 'packaged'.")] = None,
    data: Annotated[Path | None, typer.Option(help="Where the private server's folder is made.")] = None,
    dsn: Annotated[str | None, typer.Option(help="An empty database to use instead of a private server.")] = None,
    home: Annotated[Path, typer.Option(help="A checkout whose migrations/ and sql/ are measured.")] = migrate.HOME,
    to_json: Annotated[Path | None, typer.Option("--json", help="Write the findings to this file.")] = None,
    to_markdown: Annotated[Path | None, typer.Option("--markdown", help="The same, as Markdown.")] = None,
    plans: Annotated[Path | None, typer.Option(help="Measure nothing; write the plans of the hot statements.")] = None,
) -> None:
    """Measure the ledger on a private PostgreSQL server that is made for it and removed afterwards."""
    console = Console() if sys.stdout.isatty() else Console(width=120)
    if quick:
        seconds, warmup = 3, 1
    groups, numbers = only.split(","), [int(number) for number in clients.split(",")]
    if unknown := set(groups) - set(GROUPS):
        raise BenchError(f"--only knows {', '.join(GROUPS)}, not {', '.join(sorted(unknown))}")
    where: AbstractContextManager[Database] = nullcontext(given(dsn)) if dsn else private(find_install(install), data)
    with console.status("starting the server") as status, where as database:
        status.update(f"installing pgcredits, filling {accounts:,} accounts")
        prepare(database, accounts, home)
        if plans:
            prepare_stream(database, accounts)
            plans.write_text(explain(database))
            console.print(f"The plans are in {plans}")
            return
        with database.admin() as admin:
            bench = Bench(database, admin, accounts, seconds, rounds, warmup, status.update)
            before = hot_updates(admin)
            cells = measure(bench, groups, numbers)
            after = hot_updates(admin)
            event_cells, timings, wrong = measure_events(bench, numbers) if "events" in groups else ([], [], [])
            status.update("audit()")
            with database.connect() as conn:
                wrong += [str(row) for row in conn.execute("select a from credits.audit() a limit 20").fetchall()]
            chain_cells, chain = measure_chain(bench, numbers) if "chain" in groups else ([], [])
            report = Report(
                machine(),
                settings(database),
                {
                    "place": database.where,
                    "method": f"{accounts:,} accounts with 3 grants, pgbench -M prepared on the same machine,"
                    f" {rounds} x {seconds} s a line after {warmup} s of warm-up, a checkpoint before each group."
                    " Latencies are of a whole script: of both calls of a pair, of one batch of spend_many",
                },
                cells + event_cells + chain_cells,
                timings,
                {name: (after[name][0] - before[name][0], after[name][1] - before[name][1]) for name in TABLES},
                wrong,
                chain,
            )
    report.print(console)
    if to_json:
        to_json.write_text(json.dumps(report.json(), indent=2) + "\n")
    if to_markdown:
        to_markdown.write_text(report.markdown())
    if wrong:
        raise typer.Exit(1)


if __name__ == "__main__":
    try:
        typer.run(main)
    except (BenchError, embedded.EmbeddedError, migrate.DeployError, psycopg.Error) as error:
        sys.exit(f"bench: {error}")
