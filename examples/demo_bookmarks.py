"""Bookmarks: a watcher that was killed goes on where it was, without a loss; stopped cleanly, without a repeat.

The plug-in is one event consumer, used twice: `audit` and `report` write down each change of an exercise, in order,
each with a lock and a bookmark of its own. The story kills them, stops them, slows one down, and takes the history
away. Try `python examples/demo_bookmarks.py --self-contained`.
"""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import orjson
from pydantic import Field

from demo_clients import changes_in_store
from demo_plugin import API, EXERCISES, exercise
from demo_stage import Stage, Story, arguments, play
from lrm.consumer import Delivery, EventConsumer
from lrm.plugin import Plugin, PluginContext
from lrm.settings import LrmSettings, Words
from storage.clock import Clock

WATCHERS = ("audit", "report")
TIMES = {"LRM_LEASE_DURATION": "5", "LRM_RENEW_DEADLINE": "3", "LRM_RETRY_PERIOD": "0.5", "LRM_BOOKMARK_EVERY": "0.3"}


class WatcherSettings(LrmSettings):
    demo_watchers: Words = Field((), description="Which of them run in this daemon.")
    demo_deliveries: Path = Field(Path(), description="Folder with a file for each watcher: a line a delivery.")


@dataclass(frozen=True, slots=True)
class Line:
    """One delivery, as a watcher has written it down."""

    process: int
    type: str
    name: str
    revision: int


class Notebook:
    """A handler: a delivery counts as handled when it returns, so what it does must be done by then."""

    def __init__(self, folder: Path, watcher: str, clock: Clock) -> None:
        self.file = folder / f"{watcher}.jsonl"
        self.pause = folder / f"{watcher}.pause"
        self._clock = clock

    async def write(self, delivery: Delivery) -> None:
        while self.pause.exists():
            await self._clock.sleep(0.02)
        with self.file.open("ab") as file:
            file.write(orjson.dumps(Line(os.getpid(), delivery.type, delivery.name, delivery.revision)) + b"\n")
        await self._clock.sleep(0.01)  # the time that a real handler takes


@asynccontextmanager
async def consumers(context: PluginContext) -> AsyncIterator[Sequence[EventConsumer]]:
    settings: WatcherSettings = context.settings
    yield [
        EventConsumer(
            watcher,
            Notebook(settings.demo_deliveries, watcher, context.clock).write,
            context.storage,
            context.registry,
            context.clock,
            context.bookmarks,
        )
        for watcher in settings.demo_watchers
    ]


plugin = Plugin(name="watchers", kinds=(EXERCISES,), controllers=consumers, settings=WatcherSettings)


class Scene:
    """A daemon that only serves, so that writes go on, and one with the watchers, which is not spared."""

    def __init__(self, stage: Stage) -> None:
        self.stage = stage
        self.folder = stage.folder / "deliveries"
        self.folder.mkdir(parents=True, exist_ok=True)
        settings = {"LRM_PLUGINS": "demo_bookmarks", "LRM_LEADER": "lease", **TIMES}
        self.server = stage.daemon("server", **settings)
        self.watchers = stage.daemon(
            "watchers", LRM_DEMO_WATCHERS=",".join(WATCHERS), LRM_DEMO_DELIVERIES=str(self.folder), **settings
        )
        self.written = 0

    def lines(self, watcher: str, process: int = 0) -> list[Line]:
        """What a watcher has written down, in order; of one process only if that is given."""
        file = self.folder / f"{watcher}.jsonl"
        lines = file.read_bytes().split(b"\n")[:-1] if file.exists() else []
        found = [Line(**orjson.loads(line)) for line in lines]
        return [line for line in found if process in {0, line.process}]

    async def write(self, count: int) -> None:
        """Create so many exercises."""
        for n in range(self.written, self.written + count):
            (await self.server.api.post(API, json=exercise(f"e-{n}"))).raise_for_status()
        self.written += count

    async def version(self) -> int:
        """The version of the newest exercise."""
        return int((await self.server.get(f"{API}/e-{self.written - 1}"))["metadata"]["resourceVersion"])

    async def has(self, watcher: str, revision: int, process: int = 0) -> bool:
        return any(line.revision >= revision for line in self.lines(watcher, process))

    async def bookmark(self, watcher: str) -> dict[str, Any]:
        """One entry of /api/status/bookmarks, which every daemon can tell."""
        document = await self.server.get("/api/status/bookmarks")
        return next((dict(b) for b in document["watchers"] if b["watcher"] == watcher), {})

    async def restart(self) -> int:
        """Start the watchers' daemon again; its process id."""
        self.watchers.start()
        await self.watchers.ready()
        return self.watchers.process.pid


async def tell(story: Story, stage: Stage) -> None:
    """See the module. Raises `NotShown`."""
    scene = Scene(stage)
    await persisted(story, scene)
    await killed(story, scene)
    await stopped(story, scene)
    await independent(story, scene)
    await history_gone(story, scene)


async def persisted(story: Story, scene: Scene) -> None:
    story.chapter("1. Two watchers, 20 writes")
    scene.server.start()
    scene.watchers.start()
    await asyncio.gather(scene.server.ready(), scene.watchers.ready())
    for watcher in WATCHERS:
        await story.eventually(f"{watcher} has begun", partial(scene.has, watcher, 0))
        kinds = [line.type for line in scene.lines(watcher)]
        story.line(f"{watcher} begins without a bookmark: it is given {', '.join(kinds)}")
    await scene.write(20)
    version = await scene.version()
    for watcher in WATCHERS:
        bookmark = await story.eventually(f"a bookmark of {watcher} at {version}", partial(at, scene, watcher, version))
        story.claim(
            f"{watcher}: 20 deliveries, its bookmark is saved at {bookmark['bookmark']}, lag {bookmark['lag']}"
            " (/api/status/bookmarks)"
        )


async def killed(story: Story, scene: Scene) -> None:
    story.chapter("2. kill -9 in the middle of a stream of 200 writes")
    start = await scene.version()
    before = scene.watchers.process.pid
    async with asyncio.TaskGroup() as tasks:
        writing = tasks.create_task(scene.write(200))
        await story.eventually("half of the stream", lambda: many(scene, "audit", before, 20 + 60))
        scene.watchers.kill()
        done = {watcher: scene.lines(watcher, before)[-1].revision for watcher in WATCHERS}
        story.line("killed after " + ", ".join(f"{w} had {revision}" for w, revision in done.items()))
        await writing
    saved = {watcher: (await scene.bookmark(watcher))["bookmark"] for watcher in WATCHERS}
    after = await scene.restart()
    for watcher in WATCHERS:
        await caught_up(story, scene, watcher, after)
        changes = await changes_in_store(scene.stage, start, await scene.version())
        lost = set(changes) - {(line.revision, line.name) for line in scene.lines(watcher)}
        story.check(f"{watcher}: none of 200 changes was lost", len(changes) == 200 and not lost, sorted(lost)[:5])
        told = [(line.revision, line.name) for line in scene.lines(watcher, after)]
        wanted = [change for change in changes if change[0] > saved[watcher]]
        again = sum(revision <= done[watcher] for revision, _ in told)
        story.check(
            f"{watcher}: it went on after its bookmark {saved[watcher]}, in order; the {again} since then came twice",
            told == wanted,
            told[:3],
        )


async def stopped(story: Story, scene: Scene) -> None:
    story.chapter("3. SIGTERM in the middle of another 100")
    start = await scene.version()
    before = scene.watchers.process.pid
    count = len(scene.lines("audit", before))
    async with asyncio.TaskGroup() as tasks:
        writing = tasks.create_task(scene.write(100))
        await story.eventually("a part of the stream", lambda: many(scene, "audit", before, count + 30))
        code = await scene.watchers.stop()
        await writing
    story.check(f"it stopped cleanly after {len(scene.lines('audit', before)) - count} of them", code == 0, code)
    after = await scene.restart()
    for watcher in WATCHERS:
        await caught_up(story, scene, watcher, after)
        wanted = await changes_in_store(scene.stage, start, await scene.version())
        seen = [(line.revision, line.name) for line in scene.lines(watcher) if line.revision > start]
        story.check(f"{watcher}: each of 100 changes exactly once, in order", seen == wanted, len(seen))


async def independent(story: Story, scene: Scene) -> None:
    story.chapter("4. report is held up, audit is not")
    pause = scene.folder / "report.pause"
    pause.touch()
    await scene.write(30)
    version = await scene.version()
    ahead = await story.eventually("audit at the newest version", lambda: at(scene, "audit", version))
    behind = await scene.bookmark("report")
    for name, entry in (("audit", ahead), ("report", behind)):
        story.line(f"{name}: bookmark {entry['bookmark']}, lag {entry['lag']}")
    story.check("audit is ahead, and report does not hold it up", behind["bookmark"] < ahead["bookmark"], behind)
    pause.unlink()
    await story.eventually("report at the newest version", lambda: at(scene, "report", version))
    story.claim("report has caught up, with a bookmark of its own")


async def history_gone(story: Story, scene: Scene) -> None:
    story.chapter("5. etcd's history is compacted while the watchers are down")
    code = await scene.watchers.stop()
    story.line(f"stopped with exit code {code}")
    await scene.write(10)
    for n in range(5):
        (await scene.server.api.delete(f"{API}/e-{n}")).raise_for_status()
    storage = scene.stage.storage()
    try:
        head = await storage.current_revision()
        await storage.compact(head)
    finally:
        await storage.aclose()
    story.line(f"10 created and 5 deleted meanwhile; compacted at {head}: the changes before are no longer kept")
    process = await scene.restart()
    present = sorted(e["metadata"]["name"] for e in (await scene.server.get(API))["items"])
    for watcher in WATCHERS:
        await story.eventually(f"{watcher} told of all", partial(many, scene, watcher, process, 1 + len(present)))
        first, *rest = scene.lines(watcher, process)
        told = [line.name for line in rest if line.type == "SYNC"]
        story.check(f"{watcher}: told of the gap, first of all", first.type == "RESYNC", first)
        story.check(
            f"{watcher}: then the current state, each of {len(present)} once", sorted(told) == present, len(told)
        )
    await scene.write(1)
    for watcher in WATCHERS:
        await story.eventually(f"a live change at {watcher}", partial(many, scene, watcher, process, 2 + len(present)))
        lines = scene.lines(watcher, process)
        live = [f"{line.type} {line.name}" for line in lines[1 + len(present) :]]
        resyncs = [line.type for line in lines].count("RESYNC")
        story.check(
            f"{watcher}: then live again ({', '.join(live)}), after exactly one RESYNC",
            live == [f"ADDED e-{scene.written - 1}"] and resyncs == 1,
            f"{resyncs} RESYNCs",
        )


async def at(scene: Scene, watcher: str, version: int) -> dict[str, Any] | None:
    """The watcher's entry, once its bookmark is at a version."""
    bookmark = await scene.bookmark(watcher)
    return bookmark if (bookmark.get("bookmark") or 0) >= version else None


async def many(scene: Scene, watcher: str, process: int, count: int) -> bool:
    return len(scene.lines(watcher, process)) >= count


async def caught_up(story: Story, scene: Scene, watcher: str, process: int) -> None:
    version = await scene.version()
    await story.eventually(f"{watcher} at {version}", lambda: scene.has(watcher, version, process))


if __name__ == "__main__":
    title, _, _ = (__doc__ or "").partition("\n")
    sys.exit(play(title, tell, arguments(__doc__ or "").parse_args()))
