"""What has happened, by etcd's own word: every revision below a root, from a plain watch past all of our own code.

It asks another member when one goes, and goes on after the last whole revision. Where etcd tells what was there before,
that is held against what was told so far, so that a watch of etcd's that loses something is found out too.
"""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import Sequence
from typing import Any

import aiohttp

from equipment.etcd import Gateway, b64
from equipment.history import Change
from equipment.waiting import until
from storage.base import is_barrier_key


class Reference:
    """Fill `changes` while `run` runs; `state` is what was there at `base`."""

    def __init__(self, endpoints: Sequence[str], root: str) -> None:
        self._endpoints = list(endpoints)
        self._prefix = f"{root}/"
        self._latest: dict[str, Change] = {}
        self.base = 0
        self.seen = 0
        self.state: dict[str, Change] = {}
        self.changes: list[Change] = []
        self.ended = False
        self.failure = ""
        """Why nothing more can be told; a test that goes on without its reference shows nothing."""

    async def begin(self) -> None:
        """Learn what is there now."""
        body = {"key": b64(self._prefix), "range_end": b64(self._prefix[:-1] + "0")}
        answer = await self._any("kv/range", body)
        self.base = self.seen = int(answer["header"]["revision"])
        for kv in answer.get("kvs", ()):
            change = self._change({"kv": kv})
            self.state[change.key] = self._latest[change.key] = change

    async def run(self) -> None:
        """Follow until cancelled, or until what follows is no longer to be had (`failure`)."""
        turn = 0
        while not self.failure and not self.ended:
            try:
                await self._follow(self._endpoints[turn % len(self._endpoints)])
            except (OSError, aiohttp.ClientError, TimeoutError):
                turn += 1  # this member is gone: the next one
                await asyncio.sleep(0.05)

    async def reach(self, revision: int, timeout: float = 30.0) -> None:
        """Wait until everything up to a revision that is below the root has been told."""
        await until(lambda: self.seen >= revision or self.failure, f"the reference at {revision}", timeout)
        assert not self.failure, self.failure

    async def mark(self) -> int:
        """Write something of no meaning and wait until it was told: everything before it was, too."""
        body = {"key": b64(f"{self._prefix}mark"), "value": b64("")}
        revision = int((await self._any("kv/put", body))["header"]["revision"])
        await self.reach(revision)
        return revision

    async def _any(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        """Ask one member after the other until one answers."""

        async def ask() -> dict[str, Any]:
            for endpoint in self._endpoints:
                try:
                    return await Gateway(endpoint, timeout=2).call(path, body)
                except (OSError, aiohttp.ClientError, TimeoutError, RuntimeError):
                    continue  # dead, paused or without a leader: the next one
            return {}

        return await until(ask, f"an answer of any etcd to {path}", 60)

    async def _follow(self, endpoint: str) -> None:
        start = {"key": b64(self._prefix), "range_end": b64(self._prefix[:-1] + "0"), "fragment": True, "prev_kv": True}
        body = {"create_request": {**start, "start_revision": str(self.seen + 1)}}
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=2, sock_read=10)
        async with (
            aiohttp.ClientSession(timeout=timeout, read_bufsize=2**22) as session,
            session.post(f"{endpoint}/v3/watch", json=body) as reply,
        ):
            buffer, pending = b"", []
            async for data in reply.content.iter_any():
                *lines, buffer = (buffer + data).split(b"\n")
                for line in lines:
                    document = json.loads(line)
                    if "result" not in document:
                        raise aiohttp.ClientError(f"etcd ended the watch: {document}")
                    result = document["result"]
                    if result.get("canceled"):
                        if "compact_revision" in result:
                            self.failure = f"etcd no longer has what followed {self.seen}: {result}"
                        raise aiohttp.ClientError(f"etcd ended the watch: {document}")
                    pending += result.get("events", ())
                    if not result.get("fragment"):
                        self._take(pending)
                        pending = []

    def _take(self, events: Sequence[dict[str, Any]]) -> None:
        for event in events:
            change = self._change(event)
            self.seen = max(self.seen, change.revision)
            if not is_barrier_key(change.key):
                self._latest[change.key] = change
                self.changes.append(change)

    def _change(self, event: dict[str, Any]) -> Change:
        kv, told = event["kv"], event.get("prev_kv")
        key = base64.b64decode(kv["key"]).decode()
        before = self._latest.get(key)
        there = before is not None and before.value is not None
        return Change(
            revision=int(kv["mod_revision"]),
            key=key,
            value=None if event.get("type") == "DELETE" else base64.b64decode(kv.get("value", "")),
            create_revision=int(kv.get("create_revision", 0)),
            previous=before.value if before else None,
            # A compaction may take away what was there before; otherwise it must be what was told last.
            previous_revision=int(told["mod_revision"]) if told else (before.revision if before and there else 0),
        )
