"""What a refresh of a whole fleet costs: calls to AWS, time, writes, how long the event loop is held, and memory.

All workers are in one region and serve; the simulated AWS and the CMLs, which speak https, are processes of their own.
The first refresh makes every session with a CML and writes every worker, the next ones find a fleet at rest. Two
memories are told: what Python has allocated for what is known, and by how much the process has grown for each worker
whose CML has been asked, with its client, its TLS connection (still open) and all that the system's allocator keeps.
"""

from __future__ import annotations

import gc
import math
import os
import time
import tracemalloc
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from bench.report import Figure, Size
from controllers.workers.kind import LabWorker
from equipment.certificates import make
from equipment.etcd import scratch_dir
from equipment.fleet_world import FleetWorld, calls_of, fleet_world, servers
from equipment.loop_lag import LoopLag
from lrm.pauses import shortened
from storage.clock import SystemClock

SECONDS = 30.0
LAG_MS = 50.0
KILOBYTES = 20.0
GROWTH_KILOBYTES = 100.0
"""A bound of our own: a set of roots for each client would be 850 more."""
WORKERS_OF_OBJECTS = 5
"""One worker for so many objects of the other measurements: 1,000 in full."""
_CLOCK = SystemClock()


async def fleet(size: Size) -> list[Figure]:
    """A first refresh, two at rest, and one under the eyes of the memory's accountant."""
    count = size.objects // WORKERS_OF_OBJECTS
    with scratch_dir("lrm-bench-") as folder, _credentials():
        certificates = make(folder / "certificates")
        async with (
            servers(folder, certificates.server) as (aws_url, cml_url),
            fleet_world(aws_url, cml_url, ca_file=str(certificates.ca)) as world,
        ):
            workers = await world.add(count, cml=True)
            # What there is once, such as EC2's client, comes with the first tenth.
            some = max(1, count // 10)
            first, spent_first, _ = await _timed(world, workers[:some])
            before = _resident()
            rest, spent_rest, _ = await _timed(world, workers[some:])
            first, spent_first, grown = first + rest, spent_first + spent_rest, _resident() - before
            with shortened():
                await calls_of(aws_url)
                written = world.metrics.describe()["written"]
                again, spent, lag = await _timed(world)
                calls = await calls_of(aws_url)
                written = world.metrics.describe()["written"] - written
            kilobytes = await _memory(world) / count / 1024
    limits = {
        "DescribeInstances": math.ceil(count / 1000),
        "DescribeInstanceStatus": math.ceil(count / 1000),
        "GetMetricData": math.ceil(2 * count / 500),
    }
    told = f"{count} workers"
    return [
        *(Figure(f"fleet: {name} a refresh", calls.get(name, 0), "calls", most) for name, most in limits.items()),
        Figure(
            "fleet: the first refresh",
            first,
            "s",
            SECONDS,
            told=f"{told}, every login and write, {spent_first:.1f} s of a core",
        ),
        Figure(
            "fleet: a refresh at rest",
            again,
            "s",
            SECONDS,
            told=f"{told}, four questions to each CML, {spent:.1f} s of a core",
        ),
        Figure("fleet: writes of a refresh at rest", written, "writes", 0),
        Figure("fleet: event loop held", lag.held * 1e3, "ms", LAG_MS, told=f"by the wall {lag.wall * 1e3:.0f} ms"),
        Figure("fleet: memory of what is known", kilobytes, "KB a worker", KILOBYTES),
        Figure(
            "fleet: growth of the process by the first refresh",
            max(0.0, grown) / (count - some) / 1024,
            "KB a worker",
            GROWTH_KILOBYTES,
            told=f"its client and an open TLS connection too; over {count - some} workers",
        ),
    ]


async def _timed(world: FleetWorld, workers: Sequence[LabWorker] = ()) -> tuple[float, float, LoopLag]:
    """Seconds by the clock and of the processor, and how the loop was held."""
    lag, began, used = LoopLag(), _CLOCK.monotonic(), time.process_time()
    async with lag.watched():
        await world.refresh(workers)
    return _CLOCK.monotonic() - began, time.process_time() - used, lag


def _resident() -> float:
    """Bytes of this process that are in memory, garbage aside."""
    gc.collect()
    return float(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


async def _memory(world: FleetWorld) -> float:
    """Bytes that live after a refresh and did not before, when nothing was known."""
    world.metrics._refresher.known.clear()
    gc.collect()
    tracemalloc.start()
    try:
        await world.refresh()
        gc.collect()
        return float(tracemalloc.get_traced_memory()[0])
    finally:
        tracemalloc.stop()


@contextmanager
def _credentials() -> Iterator[None]:
    """Credentials of no account, whatever the machine has."""
    before = dict(os.environ)
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        del os.environ[name]
    os.environ |= {
        "AWS_ACCESS_KEY_ID": "bench",
        "AWS_SECRET_ACCESS_KEY": "bench",
        "AWS_EC2_METADATA_DISABLED": "true",
        "AWS_CONFIG_FILE": "/dev/null",
        "AWS_SHARED_CREDENTIALS_FILE": "/dev/null",
        "NO_PROXY": "127.0.0.1",
    }
    try:
        yield
    finally:
        os.environ.clear()
        os.environ |= before
