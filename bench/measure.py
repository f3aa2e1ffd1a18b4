"""Runs pgbench, reads its log of transactions, and counts the WAL."""

import os
import re
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from statistics import mean
from typing import Any

import psycopg
from cluster import HERE, BenchError, Database
from psycopg import Connection

BATCH = 1000  # requests in one spend_many


@dataclass(frozen=True)
class Operation:
    """A script, what it is called in the table, and what we hope for. One transaction of it is `makes` operations."""

    name: str
    script: str
    against: str = "floor"
    goal: float | None = None
    makes: int = 1
    before: Callable[[], None] = lambda: None


@dataclass(frozen=True)
class Sample:
    """One run of pgbench, warm-up cut off. Latencies in ms, of a whole script."""

    operations: int
    seconds: float
    latencies: list[float]
    wal_bytes: int
    image_bytes: int | None

    @property
    def rate(self) -> float:
        """Operations per second."""
        return self.operations / self.seconds


@dataclass
class Cell:
    """One line of the table: an operation with some number of clients, over all its samples."""

    operation: Operation
    clients: int
    hot: bool
    samples: list[Sample] = field(default_factory=list)
    ratios: list[float] = field(default_factory=list)

    @property
    def rate(self) -> float:
        """Operations per second."""
        return sum(s.operations for s in self.samples) / sum(s.seconds for s in self.samples)

    @property
    def spread(self) -> float:
        """How far apart the fastest and the slowest sample are, as a part of the rate: how steady the machine was."""
        rates = [s.rate for s in self.samples]
        return (max(rates) - min(rates)) / self.rate

    @property
    def ratio(self) -> float | None:
        """The rate in relation to what was measured directly before and after it."""
        return mean(self.ratios) if self.ratios else None

    @property
    def wal_bytes(self) -> float:
        """WAL per operation, without the images of full pages where they could be told apart."""
        return sum(s.wal_bytes for s in self.samples) / sum(s.operations for s in self.samples)

    @property
    def image_bytes(self) -> float | None:
        """Images of full pages per operation, in bytes: what a page costs when it first changes after a checkpoint."""
        known = [s.image_bytes for s in self.samples if s.image_bytes is not None]
        return sum(known) / sum(s.operations for s in self.samples) if len(known) == len(self.samples) else None

    def percentile(self, share: float) -> float:
        """A percentile of the latencies, in ms."""
        ordered = sorted(chain.from_iterable(s.latencies for s in self.samples))
        return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


@dataclass
class Bench:
    """Measures on one database. seconds is the length of one sample; said is told what is going on."""

    database: Database
    admin: Connection[Any]
    accounts: int
    seconds: int
    rounds: int
    warmup: int
    said: Callable[[str], None]

    def alternate(self, base: Operation, others: Sequence[Operation], clients: int, *, hot: bool = False) -> list[Cell]:
        """Measure base, then each of the others with base after it, so that a machine that drifts tells no lies."""
        first = Cell(base, clients, hot)
        cells = [Cell(other, clients, hot) for other in others]
        with suppress(psycopg.errors.InsufficientPrivilege):
            self.admin.execute("checkpoint")
        first.samples.append(self.sample(base, clients, hot=hot))
        for _ in range(self.rounds):
            for cell in cells:
                cell.samples.append(self.sample(cell.operation, clients, hot=hot))
                first.samples.append(self.sample(base, clients, hot=hot))
                cell.ratios.append(cell.samples[-1].rate / mean(s.rate for s in first.samples[-2:]))
        return [first, *cells]

    def sample(self, operation: Operation, clients: int, *, hot: bool = False) -> Sample:
        """One run of pgbench on accounts chosen at random, or (hot) on one account alone."""
        operation.before()
        self.said(f"{operation.name}, {clients} client{'s'[: clients > 1]}{', one account' if hot else ''}")
        with tempfile.TemporaryDirectory(prefix="pgcredits-bench-log-") as logs:
            command = [
                str(self.database.pgbench), "--no-vacuum", "--protocol=prepared", f"--client={clients}",
                f"--jobs={min(clients, os.cpu_count() or 1)}", f"--time={self.warmup + self.seconds}",
                "--log", f"--log-prefix={logs}/t", f"--file={HERE / operation.script}", "--define=first=1",
                f"--define=last={1 if hot else self.accounts}", f"--define=batch={BATCH}",
            ]  # fmt: skip
            with subprocess.Popen(
                command, env=os.environ | self.database.environment(), text=True,
                stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
            ) as process:  # fmt: skip
                try:
                    time.sleep(self.warmup)
                    warm, wal = time.time(), self._wal()
                    errors = process.communicate()[1]
                except BaseException:
                    process.terminate()
                    raise
            wal_bytes, image_bytes = self._wal_between(wal, self._wal())
            done = [line.split() for log in Path(logs).iterdir() for line in log.read_text().splitlines()]
        ends = [(int(t[4]) + int(t[5]) / 1e6, int(t[2]) / 1000) for t in done]
        counted = [latency for end, latency in ends if end >= warm]
        if process.returncode or not counted:
            raise BenchError(f"pgbench failed on {operation.script}:\n{errors.strip()[-2000:] or 'nothing was done'}")
        return Sample(
            operations=len(counted) * operation.makes,
            seconds=max(end for end, _ in ends) - warm,
            latencies=counted,
            wal_bytes=wal_bytes,
            image_bytes=image_bytes,
        )

    def _wal(self) -> str:
        row = self.admin.execute("select pg_current_wal_flush_lsn()::text").fetchone()
        return str(row[0]) if row else "0/0"

    def _wal_between(self, start: str, end: str) -> tuple[int, int | None]:
        """Bytes of records and of images of full pages; of everything and None where we cannot read the files."""
        if start != end and self.database.waldump and self.database.wal_folder:
            command = [
                str(self.database.waldump),
                "--stats",
                f"--path={self.database.wal_folder}",
                "-s",
                start,
                "-e",
                end,
            ]
            answer = subprocess.run(command, capture_output=True, text=True, check=False)
            if found := re.search(r"^Total +\d+ +(\d+) \[.*?\] +(\d+) \[", answer.stdout, re.MULTILINE):
                return int(found.group(1)), int(found.group(2))
        (high, low), (past_high, past_low) = ((int(part, 16) for part in lsn.split("/")) for lsn in (start, end))
        everything = ((past_high - high) << 32) + past_low - low
        return everything, None if everything else 0
