"""What users of a trio do at the same time: they create, change, read, list, watch and delete Gadgets, and take note.

Each request goes to a daemon drawn by lot and is noted with its answer as the API promises it: 2xx is done, 4xx, 503
and a refused connection are certainly not written, everything else is unknown. A daemon that does not answer is left
alone for a moment, as a load balancer would do. Nothing is repeated: what a client tries again is a new request here.
"""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections import Counter
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, Literal

import aiohttp

from equipment.history import LABEL, History, Listing, Read, Stretch, Told, Write

_AWAY = (OSError, aiohttp.ClientError, TimeoutError)
_SHUN_SECONDS = 1.0
_Verb = Literal["create", "replace", "patch", "label", "delete"]
MERGE = {"Content-Type": "application/merge-patch+json"}


@dataclass(frozen=True, slots=True)
class Answer:
    """What came back; status 0 is a connection that was refused, -1 one that was lost or silent."""

    status: int
    body: Any
    daemon: str
    began: float
    ended: float

    @property
    def detail(self) -> str:
        return f"{self.status or 'no connection'} by {self.daemon}"

    @property
    def outcome(self) -> Literal["done", "refused", "unknown"]:
        if 200 <= self.status < 300:
            return "done"
        return "refused" if self.status in (0, 503) or 400 <= self.status < 500 else "unknown"

    @property
    def revision(self) -> int:
        return int(self.body.get("metadata", {}).get("resourceVersion") or 0) if isinstance(self.body, dict) else 0


class Load:
    """`async with load.running(): …`: writers, readers and watchers, until the end of the block."""

    def __init__(self, daemons: Mapping[str, str], namespace: str, history: History, draw: random.Random) -> None:
        self._daemons = daemons
        self._path = f"/apis/test.neuroglia.io/v1/namespaces/{namespace}/gadgets"
        self._history = history
        self._draw = draw
        self._names: list[str] = []
        self._count = 0
        self._shunned: dict[str, float] = {}
        self._asking: list[asyncio.Task[None]] = []
        self._stopped = self._ended = False
        self.avoided: set[str] = set()
        """Daemons that no user asks for now."""
        self.told: Counter[str] = Counter()

    @asynccontextmanager
    async def running(self, writers: int = 3, watchers: int = 2, live: int = 10) -> AsyncIterator[None]:
        """Users come with the block; those who write go with `stop`, those who watch with the block's end."""
        timeout = aiohttp.ClientTimeout(total=4, sock_connect=1)
        async with aiohttp.ClientSession(timeout=timeout) as self._session, asyncio.TaskGroup() as tasks:
            # aiohttp sends a PUT or DELETE again by itself when its connection is lost, and tells only the second end.
            self._session._retry_connection = False
            watching = [tasks.create_task(self._watch(f"watch-{n}")) for n in range(watchers)]
            self._asking = [tasks.create_task(self._write(live)) for _ in range(writers)]
            self._asking.append(tasks.create_task(self._read()))
            try:
                yield
            finally:
                self._stopped = self._ended = True  # a cancellation may meet a time limit of aiohttp's and be lost
                for task in (*watching, *self._asking):
                    task.cancel()

    async def stop(self) -> None:
        """Ask for nothing more, and wait for the answers that are still to come."""
        self._stopped = True
        await asyncio.wait(self._asking)

    def positions(self) -> dict[str, int]:
        """How far each watcher has come."""
        return {name: stretches[-1].position for name, stretches in self._history.watchers.items() if stretches}

    async def ask(self, method: str, path: str, body: Any = None, headers: Mapping[str, str] | None = None) -> Answer:
        """One request to a daemon drawn by lot."""
        daemon = self._choose()
        url, began = self._daemons[daemon], time.monotonic()
        status, found = -1, None
        try:
            async with self._session.request(method, url + path, json=body, headers=headers) as reply:
                found = await reply.json()
                status = reply.status
        except aiohttp.ClientConnectorError:
            status = 0
        except (*_AWAY, ValueError):
            status = -1
        if status <= 0:
            self._shunned[daemon] = time.monotonic() + _SHUN_SECONDS
        elif status == 500:
            self._history.surprises.append(f"{method} {path} was answered with a 500 by {daemon}: {found}")
        return Answer(status, found, daemon, began, time.monotonic())

    def _choose(self) -> str:
        now = time.monotonic()
        allowed = [name for name in self._daemons if name not in self.avoided]
        good = [name for name in allowed if self._shunned.get(name, 0) < now]
        return self._draw.choice(good or allowed)

    async def _write(self, live: int) -> None:
        while not self._stopped:
            if len(self._names) < live and self._draw.random() < 0.5:
                await self._create()
            elif self._names:
                name, what = self._draw.choice(self._names), self._draw.random()
                if what < 0.15:
                    await self._delete(name)
                elif what < 0.45:
                    await self._replace(name)
                elif what < 0.65:
                    await self._label(name)
                else:
                    await self._patch(name)
            # The pace of the load, not a wait: with none the daemons' own work would starve beside it.
            await asyncio.sleep(self._draw.uniform(0.02, 0.12))

    async def _read(self) -> None:
        while not self._stopped:
            await asyncio.sleep(self._draw.uniform(0.05, 0.2))  # the pace of the readers
            if self._draw.random() < 0.3:
                await self._list()
            elif self._names:
                name = self._draw.choice(self._names)
                await self._get(name)

    async def _create(self) -> None:
        self._count += 1
        name, marker = f"g{self._count}", self._marker()
        answer = await self.ask("POST", self._path, {**_document(name), "spec": {"op": marker}})
        self._note("create", name, marker, answer)
        if answer.outcome != "refused":
            self._names.append(name)

    async def _replace(self, name: str) -> None:
        """Read, change, and write back what was read: the resourceVersion is the precondition."""
        if (found := await self._get(name)) is None:
            return
        marker = self._marker()
        document = {**found, "spec": {"op": marker}}
        answer = await self.ask("PUT", f"{self._path}/{name}", document)
        self._note("replace", name, marker, answer, expected=int(found["metadata"]["resourceVersion"]))

    async def _patch(self, name: str) -> None:
        marker = self._marker()
        answer = await self.ask("PATCH", f"{self._path}/{name}", {"spec": {"op": marker}}, MERGE)
        self._note("patch", name, marker, answer)

    async def _label(self, name: str) -> None:
        marker = self._marker()
        answer = await self.ask("PATCH", f"{self._path}/{name}", {"metadata": {"labels": {LABEL: marker}}}, MERGE)
        self._note("label", name, marker, answer)

    async def _delete(self, name: str) -> None:
        answer = await self.ask("DELETE", f"{self._path}/{name}")
        self._note("delete", name, "", answer)
        if answer.outcome == "done" or answer.status == 404:
            self._names = [other for other in self._names if other != name]

    async def _get(self, name: str) -> dict[str, Any] | None:
        answer = await self.ask("GET", f"{self._path}/{name}")
        if answer.status == 200:
            read = Read(name, answer.began, answer.ended, answer.revision, answer.body["spec"]["op"], answer.detail)
            self._history.reads.append(read)
            return dict(answer.body)
        if answer.status == 404:
            self._history.reads.append(Read(name, answer.began, answer.ended, 0, detail=answer.detail))
        return None

    async def _list(self) -> int:
        """The revision of a consistent list; 0 when none was answered."""
        answer = await self.ask("GET", self._path)
        if answer.status != 200:
            return 0
        items = {i["metadata"]["name"]: int(i["metadata"]["resourceVersion"]) for i in answer.body["items"]}
        self._history.listings.append(Listing(answer.began, answer.ended, answer.revision, items, answer.detail))
        return answer.revision

    def _note(self, verb: _Verb, name: str, marker: str, answer: Answer, *, expected: int = 0) -> None:
        self.told[answer.outcome] += 1
        revision = answer.revision if answer.outcome == "done" else 0
        write = Write(verb, name, marker, answer.began, answer.ended, answer.outcome, revision, expected, answer.detail)
        self._history.writes.append(write)

    def _marker(self) -> str:
        self._count += 1
        return f"op{self._count}"

    async def _watch(self, name: str) -> None:
        """List, then watch; go on elsewhere from the last event when a connection ends, list again after a 410."""
        stretches = self._history.watchers.setdefault(name, [])
        listed = False
        while not self._ended:
            if not listed:
                revision = await self._list()
                if not revision:
                    await asyncio.sleep(0.1)  # no daemon answers: asked again in a moment
                    continue
                stretches.append(Stretch(revision, listed=True))
                listed = True
            elif stretches[-1].told or stretches[-1].through:
                stretches.append(Stretch(stretches[-1].position))
            listed = await self._follow(stretches[-1])

    async def _follow(self, stretch: Stretch) -> bool:
        """One connection; False when the history is gone and a list is needed."""
        daemon = self._choose()
        query = f"?watch=1&resourceVersion={stretch.after}&allowWatchBookmarks=true&timeoutSeconds=60"
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=1, sock_read=3)
        try:
            async with self._session.get(self._daemons[daemon] + self._path + query, timeout=timeout) as reply:
                if reply.status != 200:
                    self._shunned[daemon] = time.monotonic() + _SHUN_SECONDS
                    await asyncio.sleep(0.1)  # asked again elsewhere in a moment
                    return reply.status != 410
                async for line in reply.content:
                    if not line.endswith(b"\n"):
                        break  # cut in the middle of an event
                    if not _take(stretch, json.loads(line)):
                        return False
        except _AWAY:
            self._shunned[daemon] = time.monotonic() + _SHUN_SECONDS
            await asyncio.sleep(0.02)
        return True


def _take(stretch: Stretch, event: Mapping[str, Any]) -> bool:
    """Note one line of a watch; False when it says that the history is gone."""
    if event["type"] == "ERROR":
        return bool(event["object"].get("code") != 410)
    revision = int(event["object"]["metadata"]["resourceVersion"])
    if event["type"] == "BOOKMARK":
        stretch.through = max(stretch.through, revision)
    else:
        stretch.told.append(
            Told(event["type"], event["object"]["metadata"]["name"], revision, event["object"]["spec"]["op"])
        )
    return True


def _document(name: str) -> dict[str, Any]:
    return {"apiVersion": "test.neuroglia.io/v1", "kind": "Gadget", "metadata": {"name": name}}
