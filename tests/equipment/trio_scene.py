"""One scene of a trio: load and watchers before, during and after some trouble, then peace, then the judgement.

`async with scene(trio, draw) as s: …trouble…` — on leaving, the users stop, everything must come to rest as it was
wished within a bound, and the history must break no promise.
"""

from __future__ import annotations

import asyncio
import json
import random
import time
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import redis.asyncio
from redis.exceptions import RedisError

from equipment.history import Attempt, Delivered, History, Mark, Ruled, check, facts
from equipment.load import Load
from equipment.reference import Reference
from equipment.trio import ROOT, Trio
from equipment.waiting import until
from lrm.errors import only_cause

SETTLED_SECONDS = 45.0
"""Longest time from the end of the trouble to a world that is as wished: several leases, and back-offs."""
_SERVING = {"Ready", "Active"}

RULED = (
    Ruled(f"{ROOT}/r/labworkers/", ("workers", "labs", "gc"), shared=True),
    Ruled(f"{ROOT}/r/labworkers/", ("workers",), fields=("ec2", "cml", "phase")),
    Ruled(f"{ROOT}/r/labworkers/", ("labs",), fields=("labs",)),
    Ruled(f"{ROOT}/r/labrecords/", ("labs", "gc")),
    Ruled(f"{ROOT}/claim/", ("workers",)),
    Ruled(f"{ROOT}/compactor", ("compactor",)),
)


class Scene:
    """See the module."""

    def __init__(self, trio: Trio, draw: random.Random) -> None:
        self.trio = trio
        self.draw = draw
        self._began = time.monotonic()
        self._stamps = self._looked_at = 0
        self.over = False
        """Set by a test that has judged the scene itself, before it took the store away."""
        self.namespace = f"s{uuid.uuid4().hex[:8]}"
        self.workers: list[str] = []
        self.prefix = f"{ROOT}/r/gadgets/{self.namespace}/"
        self.reference = Reference(trio.cluster.endpoints, ROOT)
        self.history = History(self.prefix, f"{ROOT}/leader/", ruled=RULED)
        urls = {node.name: node.process.url for node in trio.nodes.values()}
        self.load = Load(urls, self.namespace, self.history, draw)

    async def progress(self, writes: int = 8, stamps: int = 4, timeout: float = 40.0) -> None:
        """Wait for so many more acknowledged writes, and so many more by the gadgets' controller."""
        goal = self.load.told["done"] + writes, self.stamps() + stamps

        def reached() -> bool:
            return self.load.told["done"] >= goal[0] and self.stamps() >= goal[1]

        what = f"{writes} writes and {stamps} by the controller"
        try:
            await until(reached, what, timeout)
        except AssertionError as error:
            now = self.load.told["done"], self.stamps()
            raise AssertionError(f"{error}; wanted {goal}, it is {now}, told {self.load.told}") from None

    def stamps(self) -> int:
        """How often the gadgets' controller has written a status; each change is looked at once."""
        for change in self.reference.changes[self._looked_at :]:
            self._looked_at += 1
            ours = change.value is not None and change.key.startswith(self.prefix)
            if ours and facts(change.value).serial != facts(change.previous).serial:
                self._stamps += 1
        return self._stamps

    async def end(self) -> None:
        """Peace, some more work, and the users go; in the end the workers, too, and nothing is left of them."""
        await self.trio.heal()
        await self.progress()
        await self.load.stop()
        await self.settle()
        if self.workers:
            for name in self.workers:
                await self.trio.delete_worker(name)
            await self._until_nothing(self.world_without_workers, "nothing left of the workers")

    async def post_worker(self) -> str:
        """A worker more, which goes when the scene ends."""
        name = f"w{len(self.workers)}-{self.namespace}"
        self.workers.append(name)
        await self.trio.post_worker(name)
        return name

    async def worker_ready(self, name: str) -> None:
        """Wait until a worker serves; then students begin two labs there."""
        found: list[dict[str, Any]] = []

        async def ready() -> bool:
            workers = await self.trio.stored(f"{ROOT}/r/labworkers/")
            found[:] = [w for key, w in workers.items() if key.endswith(f"/{name}")]
            return bool(found) and found[0]["status"].get("phase") == "Ready"

        try:
            await until(ready, f"{name} Ready", 60)
        except AssertionError as error:
            raise AssertionError(f"{error}: {found}") from None
        machine = self.trio.cml.machine(found[0]["status"]["ec2"]["instanceId"])
        for title in ("OSPF", "BGP"):
            machine.add_lab(title)

    async def settle(self) -> None:
        """Until every gadget and the worker are as wished, and each watcher has heard of it."""

        async def gadgets() -> str:
            found = await self.trio.stored(self.prefix)
            behind = [
                key
                for key, g in found.items()
                if g["status"].get("seenOp") != g["spec"]["op"] or g["metadata"].get("deletionTimestamp")
            ]
            return ", ".join(behind)

        await self._until_nothing(gadgets, "every gadget as wished")
        await self._until_nothing(self.world_outside, "the world outside as wished")
        await self._until_nothing(self._disagreement, "every daemon of one mind with the store")
        await self.reference.mark()
        theirs = [c.revision for c in self.reference.changes if c.key.startswith(self.prefix)]
        last = theirs[-1] if theirs else self.reference.base
        await until(lambda: all(p >= last for p in self.load.positions().values()), f"every watcher at {last}")
        await until(lambda: any(d.revision >= last for d in self.deliveries()), f"the event consumer at {last}")

    async def _until_nothing(self, left: Any, what: str) -> None:
        seen = [""]

        async def nothing() -> bool:
            seen[0] = await left()
            return not seen[0]

        try:
            await until(nothing, what, SETTLED_SECONDS)
        except AssertionError as error:
            raise AssertionError(f"{error}: {seen[0][:3000]}") from None

    async def _disagreement(self) -> str:
        """What a daemon's consistent list says otherwise than the store, of every gadget that ever was."""
        wanted = {tuple(key.split("/")[-2:]) for key in await self.trio.keys(f"{ROOT}/r/gadgets/")}
        for node in self.trio.nodes.values():
            status, listed = await node.ask("GET", "/apis/test.neuroglia.io/v1/gadgets")
            if status != 200:
                return f"{node.name} answers {status}"
            found = {(g["metadata"]["namespace"], g["metadata"]["name"]) for g in listed["items"]}
            if found != wanted:
                return f"{node.name} has {sorted(found ^ wanted)} otherwise"
        return ""

    async def world_without_workers(self) -> str:
        """What is left of this scene's workers, in the store or outside."""
        left = [key for key in await self.trio.keys(f"{ROOT}/r/labworkers/") if key.endswith(tuple(self.workers))]
        return ", ".join(left) or await self.world_outside()

    async def world_outside(self) -> str:
        """What is not as it should be: one instance per worker that is to be, none else, and records of its labs."""
        workers = await self.trio.stored(f"{ROOT}/r/labworkers/")
        records = await self.trio.stored(f"{ROOT}/r/labrecords/")
        wrong: list[str] = []
        claimed: dict[str, str] = {}
        labs: set[tuple[str, str]] = set()
        for key, worker in workers.items():
            phase = worker["status"].get("phase")
            if phase not in _SERVING or worker["metadata"].get("deletionTimestamp"):
                wrong.append(f"{key} is {phase}: {json.dumps(worker['status'])[:1500]}")
                continue
            instance = worker["status"]["ec2"]["instanceId"]
            claimed[instance] = worker["metadata"]["uid"]
            labs |= {(worker["metadata"]["name"], lab) for lab in self.trio.cml.machine(instance).labs}
        if (live := self.trio.live()) != claimed:
            wrong.append(f"instances {live} live, claimed are {claimed}")
        recorded = {(r["spec"]["workerRef"], r["spec"]["labId"]) for r in records.values()}
        if recorded != labs:
            wrong.append(f"records {sorted(recorded)} of labs {sorted(labs)}")
        return "; ".join(wrong)

    async def judge(self) -> None:
        """Hold the whole history against the promises."""
        history, reference = self.history, self.reference
        await reference.mark()
        history.base, history.state, history.changes = reference.base, reference.state, reference.changes
        history.attempts = attempts(self.trio)
        history.deliveries = self.deliveries()
        told = self.load.told
        assert told["done"] > 20, f"the load was none: {told}"
        gadgets = [mark for mark in history.marks if mark.watcher == history.watcher_of_gadgets]
        assert gadgets, "no bookmark was seen"
        assert gadgets[-1].revision > reference.base, f"the bookmark stands still: {gadgets[-1]}"
        broken = check(history)
        assert not broken, "\n".join(broken)

    def deliveries(self) -> list[Delivered]:
        """What the event consumers of all daemons have written down about this scene's gadgets."""
        return [
            Delivered(d["at"], d["identity"], d["process"], d["type"], d["name"], d["revision"])
            for d in _lines(self.trio.deliveries)
            if d["namespace"] == self.namespace or (d["type"] == "RESYNC" and d["at"] > self._began)
        ]

    async def sample_bookmarks(self) -> None:
        """Look into Redis several times a second, past every link; Redis may be away."""
        client = redis.asyncio.Redis.from_url(self.trio.redis.url, socket_timeout=1, socket_connect_timeout=1)
        try:
            while not self.reference.ended:
                try:
                    await self._sample(client)
                except (RedisError, OSError, TimeoutError):
                    await client.connection_pool.disconnect()  # it is away: what was there is seen when it is back
                await asyncio.sleep(0.1)
        finally:
            await client.aclose()

    def _epoch(self) -> str:
        """Which line of history the store is on."""
        found = self.reference.state.get(f"{ROOT}/epoch")
        return (found.value or b"").decode() if found else ""

    async def _sample(self, client: redis.asyncio.Redis) -> None:
        era = self.trio.redis_era
        keys = sorted(await client.keys("lrm:bookmark:*"))
        values = await client.mget(keys) if keys else []
        for key, value in zip(keys, values, strict=True):
            document = json.loads(value) if value is not None else {}
            # One that was read while Redis died is of no certain era; one of another line is nobody's any more.
            if era == self.trio.redis_era and document.get("epoch") == self._epoch():
                mark = Mark(
                    key.decode().rpartition(":")[2], document["revision"], document["term"], time.monotonic(), era
                )
                self.history.marks.append(mark)


def attempts(trio: Trio) -> list[Attempt]:
    """What the controllers have written down of themselves, all daemons together."""
    return [Attempt(a["at"], a["term"], a["name"], a["revision"], a["identity"]) for a in _lines(trio.attempts)]


def _lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


@asynccontextmanager
async def scene(trio: Trio, draw: random.Random) -> AsyncIterator[Scene]:
    """Healthy at the beginning, under load when the block begins, at rest and judged when it ends."""
    await trio.heal()
    found = Scene(trio, draw)
    await found.reference.begin()
    try:
        async with asyncio.TaskGroup() as tasks:
            helpers = [tasks.create_task(found.reference.run()), tasks.create_task(found.sample_bookmarks())]
            try:
                async with found.load.running():
                    await found.progress()
                    yield found
                    if not found.over:
                        await found.end()
                if not found.over:
                    await found.judge()
            finally:
                found.reference.ended = True  # a cancellation may meet a time limit of a client's and be lost
                for helper in helpers:
                    helper.cancel()
    except BaseExceptionGroup as group:
        raise only_cause(group) from None
