"""Two daemons under short leases that are killed, paused and started anew at random, over one store."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

from equipment.daemons import DaemonProcess
from equipment.trio import LEASE, RENEW, RETRY
from equipment.waiting import until
from lrm.devservers import EtcdServer
from storage.base import Storage
from storage.errors import NotFound

_LEASES = {
    "LRM_LEADER": "lease",
    "LRM_LEASE_DURATION": str(LEASE),
    "LRM_RENEW_DEADLINE": str(RENEW),
    "LRM_RETRY_PERIOD": str(RETRY),
}


class Pair:
    """What can happen to them."""

    def __init__(self, daemons: list[DaemonProcess], chance: random.Random) -> None:
        self._daemons = daemons
        self._chance = chance
        self._paused: set[int] = set()

    def hurt(self) -> str:
        """One of them dies and is started again, or stops, or goes on; returns which."""
        number = self._chance.randrange(len(self._daemons))
        daemon = self._daemons[number]
        if number in self._paused:
            self._paused.remove(number)
            daemon.process.resume()
            return f"daemon {number} goes on"
        if self._chance.random() < 0.5:
            self._paused.add(number)
            daemon.process.pause()
            return f"daemon {number} paused"
        daemon.process.kill()
        daemon.start()
        return f"daemon {number} killed and started"

    def heal(self) -> None:
        """Both run."""
        for number in self._paused:
            self._daemons[number].process.resume()
        self._paused.clear()

    def last_words(self) -> str:
        """For whoever reads a failure."""
        return "\n".join(f"daemon {n}: {d.log()[-3000:]}" for n, d in enumerate(self._daemons))


async def at_rest(wrong: Callable[[], Awaitable[list[str]]], told: list[str], pair: Pair, seconds: float) -> None:
    """Until nothing is wrong any more; else fails with what is, what was done, and the daemons' last words."""
    left: list[str] = []

    async def right() -> bool:
        left[:] = await wrong()
        return not left

    try:
        await until(right, "", seconds)
    except AssertionError:
        raise AssertionError(f"{left}\nafter {told}\n{pair.last_words()}") from None


@asynccontextmanager
async def a_pair(
    folder: Path, etcd: EtcdServer, root: str, chance: random.Random, *, plugins: str, **settings: str
) -> AsyncIterator[Pair]:
    """Both started, not waited for."""
    daemons = [
        DaemonProcess(folder, endpoint=etcd.endpoint, root=root, plugins=plugins, **_LEASES, **settings)
        for _ in range(2)
    ]
    try:
        for daemon in daemons:
            daemon.start()
        yield Pair(daemons, chance)
    finally:
        for daemon in daemons:
            await daemon.end()


async def free_locks(storage: Storage, root: str) -> None:
    """Take every lock from whoever holds it: a test's own leader without a lease would hold it for ever."""
    for entry in (await storage.list(f"{root}/leader/")).entries:
        try:
            await storage.delete(entry.key, expected_revision=entry.revision)
        except NotFound:
            continue
