"""What three daemons cost when nothing happens: requests to etcd, and processor time of each.

Requests are counted by etcd itself, as those that it has begun to answer. The time includes what a daemon does by the
clock: renewals, barriers, and after a takeover the new leader's look at all objects, spread over a minute.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from bench.report import DEFAULT_LEASE, Figure, Size
from bench.stage import Stage, at_rest, cpu_seconds, stage
from equipment.daemons import DaemonProcess
from storage.clock import SystemClock

REQUESTS = 5.0
CPU_PERCENT = 3.0
TAKEOVER_PERCENT = 10.0
"""Of a leader in its first minute, which looks at every object once; a bound of our own, no promise."""
_CLOCK = SystemClock()


@dataclass(frozen=True, slots=True)
class Window:
    """What was seen of some daemons in a stretch of time."""

    seconds: float
    requests: Counter[str]
    """By method."""
    shares: list[float]
    """Each daemon's percentage of one core, the busiest last."""
    told: str


async def idleness(size: Size) -> list[Figure]:
    """Requests per second of all, and the processor's share of the busiest; its share also after a takeover."""
    async with stage() as scene:
        await scene.fill(size.objects)
        daemons = [scene.daemon(**DEFAULT_LEASE.settings()) for _ in range(size.daemons)]
        await asyncio.gather(*(daemon.start_ready(60) for daemon in daemons))
        leader = await at_rest(daemons)
        quiet = await _watched(scene, daemons, size.window)
        leader.terminate()
        others = [daemon for daemon in daemons if daemon is not leader]
        await leader.exit_code()
        await at_rest(others)
        led = await _watched(scene, others, size.window)
    methods = ", ".join(f"{method} {count / quiet.seconds:.2f}/s" for method, count in quiet.requests.most_common())
    rate = quiet.requests.total() / quiet.seconds
    return [
        Figure("idle: etcd requests of all daemons", rate, "/s", REQUESTS, told=f"{quiet.told}; {methods or 'none'}"),
        Figure("idle: processor of the busiest daemon", quiet.shares[-1], "%", CPU_PERCENT, told=_shares(quiet)),
        Figure("takeover: processor of the new leader", led.shares[-1], "%", TAKEOVER_PERCENT, told=_shares(led)),
    ]


async def _watched(scene: Stage, daemons: Sequence[DaemonProcess], seconds: float) -> Window:
    pids = [daemon.process.pid for daemon in daemons]
    asked, used, began = await scene.etcd_requests(), [cpu_seconds(pid) for pid in pids], _CLOCK.monotonic()
    await asyncio.sleep(seconds)
    asked_after, used_after, ended = await scene.etcd_requests(), [cpu_seconds(p) for p in pids], _CLOCK.monotonic()
    shares = sorted(100 * (after - before) / (ended - began) for before, after in zip(used, used_after, strict=True))
    reconciles = len(scene.ledger.reconciles(since=began))
    told = f"{ended - began:.0f} s, {reconciles} reconciles"
    return Window(ended - began, asked_after - asked, shares, told)


def _shares(window: Window) -> str:
    return f"{window.told}; {', '.join(f'{share:.2f} %' for share in window.shares)}"
