"""How long nobody reconciles when the leader goes: killed with -9, and stopped in order.

Three daemons, a user who changes an object every 20 ms through a survivor. The time runs from the signal to the first
reconcile that another process has finished.
"""

from __future__ import annotations

import asyncio
import statistics
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from uuid import uuid4

import aiohttp

from bench.plugin import LOCK
from bench.report import Figure, LeaseTimes, Size
from bench.stage import Mark, Stage, object_name, stage
from equipment.daemons import WIDGETS, DaemonProcess
from equipment.waiting import until
from storage.clock import SystemClock

KILL_MARGIN = 1.5
"""Seconds beyond the lease: etcd's half-second tick, a campaign, a barrier, a reconcile."""
_OBJECTS = 100
_EVERY = 0.02
_CLOCK = SystemClock()


async def takeovers(size: Size) -> list[Figure]:
    """A figure for the killed leader with each lease, and two for the graceful stop."""
    figures: list[Figure] = []
    for lease in size.leases:
        async with stage() as scene:
            await scene.fill(min(_OBJECTS, size.objects))
            daemons = [scene.daemon(**lease.settings()) for _ in range(size.daemons)]
            if lease is size.leases[0]:
                graceful = [await _graceful(scene, daemons) for _ in range(size.runs)]
                figures += _graceful_figures(graceful)
            killed = [await _killed(scene, daemons) for _ in range(size.runs)]
            figures.append(_killed_figure(killed, lease))
    return figures


def _graceful_figures(seconds: Sequence[float]) -> list[Figure]:
    told = f"{len(seconds)} runs, fastest {min(seconds):.3f} s"
    return [
        Figure("graceful stop: another reconciles (median)", statistics.median(seconds), "s", 0.3, told=told),
        Figure("graceful stop: another reconciles (worst)", max(seconds), "s", 1.0, told=told),
    ]


def _killed_figure(seconds: Sequence[float], lease: LeaseTimes) -> Figure:
    limit = lease.lease_duration + KILL_MARGIN
    in_time = sum(s <= limit for s in seconds)
    told = f"{in_time} of {len(seconds)} in time, median {statistics.median(seconds):.2f} s"
    return Figure(f"leader killed, lease {lease.lease_duration:g} s (worst)", max(seconds), "s", limit, told=told)


async def _graceful(scene: Stage, daemons: Sequence[DaemonProcess]) -> float:
    leader, standby = await _leader(daemons)
    async with _changes(standby):
        await _reconciling(scene, leader)
        began = _CLOCK.monotonic()
        leader.terminate()
        mark = await _successor(scene, leader, began)
    await leader.exit_code()
    return mark.ended - began


async def _killed(scene: Stage, daemons: Sequence[DaemonProcess]) -> float:
    leader, standby = await _leader(daemons)
    async with _changes(standby):
        await _reconciling(scene, leader)
        began = _CLOCK.monotonic()
        leader.process.kill()
        mark = await _successor(scene, leader, began)
    return mark.ended - began


async def _leader(daemons: Sequence[DaemonProcess]) -> tuple[DaemonProcess, DaemonProcess]:
    """Who leads the controller's lock, and one that does not, once all of them run."""
    ended = [daemon for daemon in daemons if daemon.child is None or daemon.child.exit_code is not None]
    await asyncio.gather(*(daemon.start_ready(60) for daemon in ended))

    async def leading() -> DaemonProcess | None:
        for daemon in daemons:
            _, answer = await daemon.request("GET", "/api/status/leader")
            if any(lock["lock_name"] == LOCK and lock["is_leader"] for lock in answer["locks"]):
                return daemon
        return None

    leader = await until(leading, "a daemon leads", timeout=60)
    return leader, next(daemon for daemon in daemons if daemon is not leader)


async def _reconciling(scene: Stage, leader: DaemonProcess) -> None:
    """Wait until the leader has taken up what is being changed: then its death interrupts something."""
    since, pid = _CLOCK.monotonic(), leader.process.pid
    await until(lambda: scene.ledger.reconciles(pid=pid, since=since), "the leader reconciles", timeout=30)


async def _successor(scene: Stage, leader: DaemonProcess, since: float) -> Mark:
    def others() -> list[Mark]:
        return [n for n in scene.ledger.reconciles(since=since) if n.pid != leader.process.pid]

    return (await until(others, "another daemon reconciles", timeout=60))[0]


@asynccontextmanager
async def _changes(daemon: DaemonProcess) -> AsyncIterator[None]:
    """Change one object after another through a daemon's API for as long as the block runs."""
    timeout = aiohttp.ClientTimeout(total=30)
    headers = {"Content-Type": "application/merge-patch+json"}

    async def change(session: aiohttp.ClientSession) -> None:
        number = 0
        while True:
            number += 1
            url = f"{daemon.url}{WIDGETS}/{object_name(number % 10)}"
            patch = {"spec": {"colour": uuid4().hex}}  # always another: what changes nothing is not written
            async with session.patch(url, json=patch, headers=headers) as reply:
                if reply.status != 200:
                    raise RuntimeError(f"a change was refused: {reply.status} {await reply.text()}")
            await asyncio.sleep(_EVERY)

    async with aiohttp.ClientSession(timeout=timeout) as session, asyncio.TaskGroup() as tasks:
        changing = tasks.create_task(change(session))
        yield
        changing.cancel()
