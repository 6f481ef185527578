"""`python -m bench`: measure what lrm promises and exit with 1 when a target is missed."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace

import uvloop

from bench.containers import containers
from bench.fleet import fleet
from bench.idle import idleness
from bench.labs import labs
from bench.report import FULL, QUICK, Figure, Size, machine, table
from bench.restart import restarts
from bench.scheduling import scheduling
from bench.takeover import takeovers
from bench.throughput import throughput
from lrm.logs import configure_logs

MEASUREMENTS: dict[str, Callable[[Size], Awaitable[list[Figure]]]] = {
    "takeover": takeovers,
    "restart": restarts,
    "idle": idleness,
    "throughput": throughput,
    "fleet": fleet,
    "containers": containers,
    "scheduling": scheduling,
    "labs": labs,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code 0: every target is met; 1: one is missed; an error is an exception."""
    options = _parser().parse_args(arguments)
    size = QUICK if options.quick else FULL
    if options.runs:
        size = replace(size, runs=options.runs)
    figures = uvloop.run(_measured(options.only or list(MEASUREMENTS), size))
    print(f"\n{machine()}\n\n{table(figures)}\n")
    missed = [figure.name for figure in figures if not figure.good]
    print(f"missed: {'; '.join(missed)}" if missed else "every target is met")
    return 1 if missed else 0


async def _measured(names: Sequence[str], size: Size) -> list[Figure]:
    figures: list[Figure] = []
    for name in names:
        print(f"{name} …", file=sys.stderr, flush=True)
        figures += await MEASUREMENTS[name](size)
    return figures


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("--only", action="append", choices=MEASUREMENTS, help="measure this alone; may be repeated")
    parser.add_argument("--quick", action="store_true", help="fewer runs and objects: for a look, not for the record")
    parser.add_argument("--runs", type=int, default=0, help="takeovers of each sort (20); restarts are a quarter of it")
    return parser


if __name__ == "__main__":
    configure_logs("console", "warning")  # what runs in this process would fill the screen
    sys.exit(main())
