"""What a measurement gives back, and how it is shown: a table that can be pasted into docs/benchmarks.md."""

from __future__ import annotations

import os
import platform
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from lrm.devservers import etcd_binary

CHECKOUT = Path(__file__).parents[2]


@dataclass(frozen=True, slots=True)
class LeaseTimes:
    """A daemon's election settings, in seconds."""

    lease_duration: float
    renew_deadline: float
    retry_period: float

    def settings(self) -> dict[str, str]:
        times = {f"LRM_{name.upper()}": str(getattr(self, name)) for name in self.__slots__}
        return {"LRM_LEADER": "lease", **times}


DEFAULT_LEASE = LeaseTimes(15, 10, 2)
SHORT_LEASE = LeaseTimes(5, 3, 0.5)
SHORTEST_LEASE = LeaseTimes(3, 1, 0.5)


@dataclass(frozen=True, slots=True)
class Size:
    """How much is measured; only `FULL` is what the promises are about."""

    objects: int
    daemons: int
    runs: int
    """Takeovers of each sort, and restarts are a quarter of it."""
    leases: tuple[LeaseTimes, ...]
    window: float
    """Seconds for which an idle installation is looked at."""
    operations: int
    """Writes that are timed."""
    containers: int
    """Labs that are asked for at once."""


FULL = Size(
    objects=5_000, daemons=3, runs=20, leases=(DEFAULT_LEASE, SHORT_LEASE), window=60, operations=2_000, containers=500
)
QUICK = Size(objects=1_000, daemons=3, runs=3, leases=(SHORT_LEASE,), window=15, operations=500, containers=50)
TINY = Size(objects=40, daemons=2, runs=1, leases=(SHORTEST_LEASE,), window=0.5, operations=40, containers=3)


@dataclass(frozen=True, slots=True)
class Figure:
    """One number and what it may be at most (or at least); `told` says in words what stands behind it."""

    name: str
    value: float
    unit: str
    limit: float
    better: Literal["less", "more"] = "less"
    told: str = ""

    @property
    def ratio(self) -> float:
        """The value in units of its limit."""
        return self.value / self.limit if self.limit else float(self.value > 0)

    @property
    def good(self) -> bool:
        return self.value <= self.limit if self.better == "less" else self.value >= self.limit

    def cells(self) -> tuple[str, ...]:
        sign = "≤" if self.better == "less" else "≥"
        return (
            self.name,
            f"{self.value:.3g} {self.unit}",
            f"{sign} {self.limit:g} {self.unit}",
            f"{self.ratio:.2f}",
            "PASS" if self.good else "FAIL",
            self.told,
        )


def table(figures: Sequence[Figure]) -> str:
    """A Markdown table, one row a figure."""
    rows = [("what", "value", "target", "of target", "verdict", "details"), *(f.cells() for f in figures)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["| " + " | ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)) + " |" for row in rows]
    lines.insert(1, "|" + "|".join("-" * (w + 2) for w in widths) + "|")
    return "\n".join(lines)


def machine() -> str:
    """What the numbers were measured on, in one line."""
    model = next((line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")), "")
    cpu = model.partition(":")[2].strip() or platform.machine()
    etcd = _first_line(str(etcd_binary()), "--version").rpartition(" ")[2]
    commit = _first_line("git", "-C", str(CHECKOUT), "describe", "--always", "--dirty")
    busy = os.getloadavg()[0]
    return (
        f"{cpu}, {os.cpu_count()} cores, load {busy:.1f} before; Linux {platform.release()}, "
        f"Python {platform.python_version()}, etcd {etcd}, lrm {commit or 'outside git'}"
    )


def _first_line(*argv: str) -> str:
    done = subprocess.run(argv, capture_output=True, text=True, timeout=10, check=False)
    return done.stdout.partition("\n")[0].strip()
