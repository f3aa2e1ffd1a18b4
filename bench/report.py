"""What the benchmark found, as a table, as JSON and as Markdown."""

import os
import platform
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from measure import Cell
from rich.console import Console
from rich.table import Table

GOAL = 5  # ms inside the database for one event at the median
TIMES = ("event", "clients", "events", "p50 ms", "p99 ms", "goal")
HEADINGS = ("", "clients", "per second", "p50 ms", "p99 ms", "WAL B", "+ images", "ratio", "goal")
LEFT = {0, 7, 8}


@dataclass(frozen=True)
class Timing:
    """How long the database took for a type of event, or for all if it has no name: in ms, without the commit.

    With several clients that includes waiting for each other and for a processor.
    """

    clients: int
    name: str
    events: int
    p50: float
    p99: float


@dataclass(frozen=True)
class Report:
    """The findings. hot maps a table to its updates and how many of them were HOT; audit holds what is wrong.

    timings are of Stripe's events; chain says what the chain of hashes costs.
    """

    machine: dict[str, str]
    server: dict[str, str]
    method: dict[str, str]
    cells: list[Cell]
    timings: list[Timing]
    hot: dict[str, tuple[int, int]]
    audit: list[str]
    chain: list[str]

    def facts(self) -> list[tuple[str, str]]:
        """Where and how it was measured."""
        settings = ", ".join(f"{name} {value}" for name, value in self.server.items() if name != "version")
        return [
            ("machine", ", ".join(f"{name} {value}" for name, value in self.machine.items())),
            ("server", f"{self.server['version']}; {settings}"),
            *self.method.items(),
        ]

    def findings(self) -> list[str]:
        """What the table does not show."""
        shares = (
            f"{table} {100 * hot / updates:.1f} % of {updates:,}" if updates else f"{table} no updates"
            for table, (updates, hot) in self.hot.items()
        )
        wrong = f"wrong: {'; '.join(self.audit)}" if self.audit else "audit(): empty: every invariant holds"
        return [f"HOT updates: {'; '.join(shares)}", *self.chain, wrong]

    def rows(self) -> list[tuple[str, ...]]:
        """The table's lines, as text."""
        return [_row(cell) for cell in self.cells]

    def print(self, console: Console) -> None:
        """For people at a terminal."""
        for name, value in self.facts():
            console.print(f"[bold]{name}[/]: {value}", highlight=False)
        table = Table()
        for number, heading in enumerate(HEADINGS):
            table.add_column(heading, justify="left" if number in LEFT else "right", no_wrap=True)
        for cell, row in zip(self.cells, self.rows(), strict=True):
            table.add_row(*row, style="dim" if cell.operation.name == "floor" else "")
        console.print(table)
        if self.timings:
            times = Table(title="Database time of one event")
            for number, heading in enumerate(TIMES):
                times.add_column(heading, justify="right" if 0 < number < len(TIMES) - 1 else "left", no_wrap=True)
            for timing in self.timings:
                times.add_row(*_times(timing))
            console.print(times)
        for finding in self.findings():
            console.print(finding, highlight=False)

    def markdown(self) -> str:
        """For docs/."""
        lines = [f"- {name}: {value}" for name, value in self.facts()]
        lines += ["", _piped(HEADINGS), _piped("---" if n in LEFT else "---:" for n in range(len(HEADINGS)))]
        lines += [_piped(row) for row in self.rows()]
        if self.timings:
            lines += ["", "Database time of one event:", ""]
            lines += [_piped(TIMES), _piped("---:" if 0 < n < len(TIMES) - 1 else "---" for n in range(len(TIMES)))]
            lines += [_piped(_times(timing)) for timing in self.timings]
        lines += ["", *(f"- {finding}" for finding in self.findings())]
        return "\n".join(lines) + "\n"

    def json(self) -> dict[str, Any]:
        """For programs."""
        return {
            "machine": self.machine,
            "server": self.server,
            "method": self.method,
            "cells": [
                {
                    "operation": c.operation.name,
                    "accounts": "one" if c.hot else "all",
                    "clients": c.clients,
                    "per_second": round(c.rate, 1),
                    "spread": round(c.spread, 3),
                    "p50_ms": c.percentile(0.5),
                    "p99_ms": c.percentile(0.99),
                    "wal_bytes_per_operation": round(c.wal_bytes, 1),
                    "image_bytes_per_operation": None if c.image_bytes is None else round(c.image_bytes, 1),
                    "ratio": c.ratio,
                    "ratio_to": c.operation.against if c.ratios else None,
                    "goal": c.operation.goal,
                    "samples_per_second": [round(s.rate, 1) for s in c.samples],
                }
                for c in self.cells
            ],
            "events": [asdict(timing) for timing in self.timings],
            "hot_updates": {table: {"updates": all_, "hot": hot} for table, (all_, hot) in self.hot.items()},
            "audit": self.audit,
        }


def machine() -> dict[str, str]:
    """Cores, processor and memory, where the system tells."""
    about = {"cores": str(os.cpu_count()), "processor": platform.processor() or platform.machine()}
    for file, key, name in (("/proc/cpuinfo", "model name", "processor"), ("/proc/meminfo", "MemTotal", "memory")):
        lines = Path(file).read_text().splitlines() if Path(file).exists() else []
        value = next((line.split(":", 1)[1].strip() for line in lines if line.startswith(key)), None)
        if value:
            about[name] = f"{int(value.split()[0]) / 2**20:.0f} GB" if name == "memory" else value
    return about | {"system": f"{platform.system()} {platform.release()}"}


def _row(cell: Cell) -> tuple[str, ...]:
    goal, ratio = cell.operation.goal, cell.ratio
    against = f"{ratio:.2f} x {cell.operation.against}" if ratio else f"varied by {100 * cell.spread:.0f} %"
    mark = "" if goal is None or ratio is None else f"{'✓' if ratio >= goal else '✗'} {goal:g}"
    return (
        f"{cell.operation.name}{', one account' if cell.hot else ''}",
        str(cell.clients),
        f"{cell.rate:,.0f}",
        f"{cell.percentile(0.5):.2f}",
        f"{cell.percentile(0.99):.2f}",
        f"{cell.wal_bytes:,.0f}",
        "" if cell.image_bytes is None else f"{cell.image_bytes:,.0f}",
        against,
        mark,
    )


def _times(timing: Timing) -> tuple[str, ...]:
    mark = "" if timing.name or timing.clients > 1 else f"{'✓' if timing.p50 <= GOAL else '✗'} {GOAL} ms"
    return (
        timing.name or "all",
        str(timing.clients),
        f"{timing.events:,}",
        f"{timing.p50:.2f}",
        f"{timing.p99:.2f}",
        mark,
    )


def _piped(parts: Any) -> str:
    return f"| {' | '.join(parts)} |"
