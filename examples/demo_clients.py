"""Two clients of a deployment, as anybody would write them: each goes on with another instance when one stops."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import suppress
from itertools import cycle
from typing import Any

import httpx
import orjson

from demo_plugin import API, exercise
from demo_stage import Daemon, NotShown, Stage


class Stream:
    """Creates exercises and moves them on, through whichever instance answers."""

    def __init__(self, daemons: Sequence[Daemon]) -> None:
        self.acknowledged: dict[str, int] = {}
        self.writes = self.refused = 0
        self._daemons = daemons
        self._ending = False

    def end(self) -> None:
        """Let `run` return when the write in hand is acknowledged: cancelled, it would have an unknown outcome."""
        self._ending = True

    async def run(self) -> None:
        n = 0
        while not self._ending:
            await self._write("POST", API, f"stream-{n}", 1, exercise(f"stream-{n}"))
            if n >= 5:
                name = f"stream-{n - 5}"
                await self._write("PATCH", f"{API}/{name}", name, 2, {"spec": {"step": 2}})
            n += 1
            await asyncio.sleep(0.05)

    async def _write(self, method: str, path: str, name: str, step: int, body: dict[str, Any]) -> None:
        """Until it is acknowledged; 409 to a repeated create means that the first one was made."""
        headers = {"Content-Type": "application/merge-patch+json"} if method == "PATCH" else {}
        for attempt in range(200):
            running = [d for d in self._daemons if d.running]
            try:
                instance = running[(self.writes + attempt) % len(running)]
                reply = await instance.api.request(method, path, json=body, headers=headers)
            except httpx.TransportError:
                pass
            else:
                if reply.is_success or (reply.status_code == 409 and attempt and method == "POST"):
                    self.acknowledged[name] = step
                    self.writes += 1
                    return
            self.refused += 1
            await asyncio.sleep(0.02)
        raise NotShown(f"a write of {name} that some instance takes")


class Watcher:
    """When the connection ends, it goes on with another instance, from the last version seen."""

    def __init__(self, daemons: Sequence[Daemon], after: int) -> None:
        self.seen: list[tuple[int, str]] = []
        """Version and name of each change, as they came."""
        self.opened = 0
        self._daemons = daemons
        self._after = after

    async def run(self) -> None:
        """Ends only by cancellation. Raises `NotShown` when an instance cannot go on from where another one was."""
        for instance in cycle(self._daemons):
            with suppress(httpx.TransportError):
                await self._follow(instance)
            await asyncio.sleep(0.02)

    async def reached(self, version: int) -> bool:
        return self._after >= version

    async def _follow(self, instance: Daemon) -> None:
        query = {"watch": "true", "resourceVersion": str(self._after), "timeoutSeconds": "60"}
        async with instance.api.stream("GET", API, params=query, timeout=httpx.Timeout(5, read=70)) as reply:
            if reply.status_code == 503:
                return  # it is not ready yet
            self.opened += 1
            async for line in reply.raise_for_status().aiter_lines():
                event = orjson.loads(line)
                if event["type"] == "ERROR":
                    raise NotShown(f"a watch that goes on where it was: {event['object']['message']}")
                metadata = event["object"]["metadata"]
                self._after = int(metadata["resourceVersion"])
                self.seen.append((self._after, metadata["name"]))


async def changes_in_store(stage: Stage, after: int, until: int) -> list[tuple[int, str]]:
    """The truth to compare with: revision and name of every change of an exercise, from etcd's own history."""
    storage = stage.storage()
    found: list[tuple[int, str]] = []
    try:
        async with storage.watch(f"{stage.root}/r/exercises/", after) as watch:
            async for batch in watch:
                found += [(batch.revision, event.entry.key.rpartition("/")[2]) for event in batch.events]
                if batch.revision >= until:
                    break
    finally:
        await storage.aclose()
    return [change for change in found if change[0] <= until]
