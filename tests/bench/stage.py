"""What every measurement stands on: a real etcd and Redis, daemons as processes, many stored objects, and the notes.

Nothing here judges; it starts, fills, reads clocks and counters. Everything that it starts ends with its context.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import islice
from pathlib import Path
from uuid import uuid4

import aiohttp

from bench.plugin import FINALIZER, LOCK, READY, follow
from equipment.daemons import DaemonProcess
from equipment.etcd import Gateway, b64, scratch_dir
from equipment.waiting import until
from equipment.widget import Note, Widget, registry, widget
from lrm.devservers import EtcdServer, RedisServer
from storage.etcd import EtcdStorage

ROOT = "/lrm"
PADDING = "x" * 512
"""Brings a Widget to the size of a LabWorker at rest, some 1.2 KB."""
_TXN = 100
_TICKS = os.sysconf("SC_CLK_TCK")
_STARTED = re.compile(
    r'^grpc_server_started_total\{grpc_method="(\w+)",grpc_service="etcdserverpb[^}]*\} (\S+)', re.MULTILINE
)


@dataclass(frozen=True, slots=True)
class Mark:
    """One line of the plug-in: what a process reconciled, and the monotonic seconds at which that began and ended."""

    began: float
    ended: float
    pid: int
    what: str


class Ledger:
    """The notes of all daemons of one stage, in the order in which they were made."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._place = 0
        self._marks: list[Mark] = []

    def read(self) -> list[Mark]:
        """All notes so far."""
        if self.path.exists():
            with self.path.open("rb") as file:
                file.seek(self._place)
                new = file.read()
            whole = new[: new.rfind(b"\n") + 1]
            self._place += len(whole)
            for line in whole.splitlines():
                began, ended, pid, what = line.decode().split(" ")
                self._marks.append(Mark(float(began), float(ended), int(pid), what))
        return self._marks

    def reconciles(self, *, pid: int = 0, since: float = 0.0) -> list[Mark]:
        """Reconciles of one process or all that ended after a monotonic second."""
        return [m for m in self.read() if m.what != READY and m.ended >= since and pid in (0, m.pid)]

    def cache_ready(self, pid: int) -> float | None:
        """When a process had its cache filled."""
        return next((m.ended for m in self.read() if m.what == READY and m.pid == pid), None)


class Stage:
    """One installation: its servers, its daemons and its notes."""

    def __init__(self, folder: Path, etcd: EtcdServer, redis: RedisServer) -> None:
        self.folder = folder
        self.etcd = etcd
        self.redis = redis
        self.gateway = Gateway(etcd.endpoint)
        self.ledger = Ledger(folder / "ledger")
        self._daemons: list[DaemonProcess] = []

    def daemon(self, **settings: str) -> DaemonProcess:
        """A daemon that is not started yet; it ends with the stage."""
        daemon = DaemonProcess(
            self.folder,
            endpoint=self.etcd.endpoint,
            root=ROOT,
            plugins="bench.plugin",
            **{"LRM_REDIS_URL": self.redis.url, "LRM_BENCH_LEDGER": str(self.ledger.path), **settings},
        )
        self._daemons.append(daemon)
        return daemon

    def storage(self, instance: str = "bench") -> EtcdStorage:
        """The bench's own way to the store, the same code as the daemons'; close it."""
        return EtcdStorage([self.etcd.endpoint], root=ROOT, instance=instance)

    async def fill(self, objects: int) -> None:
        """Store so many Widgets as an installation at rest holds them: reconciled, held by the finalizer."""
        now = datetime.now(UTC)
        await self.put(settled(object_name(i), now) for i in range(objects))

    async def change(self, names: Iterable[str], count: int) -> None:
        """Let the spec of some objects differ from their status, as a write through the API does."""
        now = datetime.now(UTC)
        changed = [settled(name, now) for name in names]
        for resource in changed:
            resource.spec.count = count
            resource.metadata.generation += 1
        await self.put(changed)

    async def put(self, resources: Iterable[Widget | Note]) -> None:
        """Store objects as they are, many in one transaction."""
        rest = iter(resources)
        while puts := [_put(resource) for resource in islice(rest, _TXN)]:
            await self.gateway.call("kv/txn", {"success": puts})

    async def etcd_requests(self) -> Counter[str]:
        """Requests that etcd has begun to answer since it started, by method; those of the bench too."""
        async with (
            aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=10)) as session,
            session.get(f"{self.etcd.metrics_url}/metrics") as reply,
        ):
            return Counter({method: int(float(count)) for method, count in _STARTED.findall(await reply.text())})

    def explain(self, error: Exception) -> None:
        """Put the daemons' last lines on an error: their logs go with the stage."""
        for daemon in self._daemons:
            if daemon.child is not None:
                error.add_note("\n".join([f"{daemon.url}:", *daemon.child.log_tail(5)]))

    async def end(self) -> None:
        for daemon in self._daemons:
            await daemon.end()


@asynccontextmanager
async def stage() -> AsyncIterator[Stage]:
    """An empty installation whose servers keep their data in memory, so that no disk is measured."""
    with scratch_dir("lrm-bench-") as folder:
        async with EtcdServer(folder / "etcd") as etcd, RedisServer(folder / "redis") as redis:
            made = Stage(folder, etcd, redis)
            try:
                yield made
            except Exception as error:
                made.explain(error)
                raise
            finally:
                await made.end()


def object_name(number: int) -> str:
    return f"w{number:05d}"


def settled(name: str, now: datetime) -> Widget:
    """A Widget that has nothing to be done for it."""
    made = widget(name)
    made.metadata.uid, made.metadata.generation, made.metadata.creation_timestamp = str(uuid4()), 1, now
    made.metadata.finalizers = [FINALIZER]
    made.metadata.labels = {"track": "ccna"}
    made.metadata.annotations = {"bench/padding": PADDING}
    follow(made, now)
    return made


def cpu_seconds(pid: int) -> float:
    """What a process has used of the processor so far, in user and system mode."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].split()
    return (int(fields[11]) + int(fields[12])) / _TICKS


async def at_rest(daemons: Sequence[DaemonProcess], seconds: float = 120) -> DaemonProcess:
    """Wait until one of the daemons leads and has nothing queued or in hand, its first pass begun; which it is."""

    async def resting() -> DaemonProcess | None:
        for daemon in daemons:
            _, status = await daemon.request("GET", "/api/status/status")
            for work in status["controllers"]:
                if work["name"] == LOCK and work["reconciles"] + work["delayed"]:
                    return None if work["queued"] or work["processing"] else daemon
        return None

    return await until(resting, "a leader has reconciled what there is", timeout=seconds)


def _put(resource: Widget | Note) -> dict[str, dict[str, str]]:
    kinds = registry(ROOT)
    value = kinds.of_object(resource).encode(resource)
    return {"request_put": {"key": b64(kinds.key_of(resource)), "value": b64(value)}}
