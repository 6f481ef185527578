"""What the engine has of ours: listed once, then kept by its event stream; changes wake the instances concerned.

Promises: an event says only that a container is to be looked at anew, so none can be misread and repeats do no harm;
a container is gone by the engine's word about it alone (its `destroy`, a 404 for its id, or a complete list without
it that was asked for after it was last seen). While the stream is down nothing is said: `EngineUnavailable`. Nothing
is polled: an engine that is silent for `_SILENCE` is asked whether it lives, and a list every `_COMPARE` seconds finds
what a stream may have lost, whatever the number of containers. Every daemon has one; only the leader's hints are heard.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, KeysView
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NoReturn

import structlog

from controllers.containers.documents import Container, EngineEvent, EngineInfo, Thing
from controllers.containers.engine import Engine
from controllers.containers.errors import EngineError, EngineNotFound, EngineUnavailable
from lrm.controller import Hints, Key
from storage.clock import Clock

log = structlog.get_logger(__name__)

_SILENCE = 30.0
_COMPARE = 300.0
_RETRY_FIRST, _RETRY_MOST = 0.2, 10.0
_AWAY_TOLD = 15.0
"""Seconds after which instances are woken to say that their engine does not answer: a restart passes unnoticed."""
_STANDS_FIRST, _STANDS_MOST, _STANDS_RECENT = 5.0, 40.0, 600.0
"""Seconds that a stream has stood before the engine is back from an absence that was told; twice as many after another
one whose end was told as recently as that. An engine that comes for moments costs its labs no writes."""
_KILLED = frozenset({137, 143, 255})
"""Exit codes of what was ended from outside: SIGKILL, SIGTERM, and nobody was there to see."""


@dataclass
class _Entry:
    """One container; `seen` is None until it was read, and once it is gone."""

    seen: Container | None = None
    number: int = 0
    """Of the read that gave `seen`; later reads have higher ones."""
    reading: int = 0
    gone: bool = False


class Mirror:
    """See the module. `run` is its one task."""

    def __init__(
        self,
        engine: Engine,
        clock: Clock,
        hints: Hints,
        waiting: Callable[[], Iterable[Key]] = tuple,
        answers: Callable[[str], None] = lambda _why: None,
    ) -> None:
        """`waiting` are those to wake, beside those with a container, when the engine answers.

        `answers` hears why the engine does not answer, each time that it was tried, and an empty text when it does.
        """
        self.why = "it has not been asked yet"
        """Why nothing is known now; empty while it is. Once instances are told it stays the same until the return."""
        self.info: EngineInfo | None = None
        """What the engine last told of its machine."""
        self._engine = engine
        self._clock = clock
        self._hints = hints
        self._waiting = waiting
        self._answers = answers
        self._entries: dict[str, _Entry] = {}
        self._of: dict[str, set[str]] = {}
        """Ids by the uid of their instance."""
        self._number = 0
        self._settling: set[str] = set()
        """Containers that are being read because of an event, and those to which another has happened since."""
        self._again: set[str] = set()
        self._starting: set[str] = set()
        self._heard_at = 0.0
        self._compared_at = 0.0
        self._current, self._away = asyncio.Event(), asyncio.Event()
        """One of the two is set."""
        self._away.set()
        self._away_since, self._told = clock.monotonic(), False
        self._stands, self._back_at = _STANDS_FIRST, -_STANDS_RECENT
        """How long the next stream has to stand where instances were told, and when they heard of a return last."""

    @property
    def current(self) -> bool:
        """Whether what it says is so."""
        return self._current.is_set()

    @property
    def patience(self) -> float:
        """Seconds for which an engine that is away may yet come back without anybody being told."""
        return 0.0 if self._told else max(0.0, _AWAY_TOLD - (self._clock.monotonic() - self._away_since))

    def ended_with_engine(self, container: Container) -> bool:
        """Whether it was killed by a restart of its engine, as far as can be seen.

        It ended before the present stream of events began, by no code of its own, and nothing of ours that ran then has
        outlived it: where something has, only the stream was cut.
        """
        if container.exit_code not in _KILLED or container.oom_killed or self.info is None:
            return False
        ended = container.finished_at
        others = (entry.seen for entry in self._entries.values() if entry.seen is not None)
        outlived = any(o.started_at < ended and o.status in ("running", "paused") for o in others)
        return ended <= self.info.now and not outlived

    async def wait_current(self) -> None:
        """Return once it knows everything."""
        await self._current.wait()

    def containers(self, uid: str) -> list[Container]:
        """An instance's containers, oldest first. Raises `EngineUnavailable` while it is not current."""
        if not self.current:
            raise EngineUnavailable(self.why)
        seen = (self._entries[container].seen for container in self._of.get(uid, ()))
        return sorted((s for s in seen if s is not None), key=lambda s: s.created)

    @property
    def ids(self) -> KeysView[str]:
        """Of the containers that it knows of."""
        return self._entries.keys()

    async def refresh(self, container: str) -> Container | None:
        """Read it from the engine now; None when it is gone. Raises `EngineError`."""
        return await self._look(container)

    @contextmanager
    def starting(self, container: str) -> Iterator[None]:
        """While it lasts, the container's start is no news: whoever starts it reads it afterwards."""
        self._starting.add(container)
        try:
            yield
        finally:
            self._starting.discard(container)

    async def run(self) -> NoReturn:
        """Follow the engine for ever, through its absences."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._tell_absences())
            pause = _RETRY_FIRST
            while True:
                began = self._clock.monotonic()
                why = ""
                try:
                    await self._follow()
                except* EngineError as group:
                    why = f"the engine does not answer: {_first(group)}"
                except* Exception as group:
                    # A defect costs this stream, not the daemon: the next one begins with a list.
                    log.exception("containers.mirror_defect")
                    why = f"what the engine said was not understood: {_first(group)!r}"
                if self.current:
                    self._lose()
                    pause = _RETRY_FIRST
                    log.warning("containers.engine_away", error=why)
                if not self._told:
                    self.why = why
                self._answers(why)
                await self._clock.sleep(max(0.0, pause - (self._clock.monotonic() - began)))
                pause = min(pause * 2, _RETRY_MOST)

    def _lose(self) -> None:
        self._current.clear()
        self._away_since, self._told = self._clock.monotonic(), False
        self._away.set()

    async def _tell_absences(self) -> NoReturn:
        """Wake those with a container once the engine is away for too long, whatever a question to it waits for."""
        while True:
            await self._away.wait()
            if self.patience > 0:
                await self._clock.sleep(self.patience)
                continue
            recent = self._clock.monotonic() - self._back_at < _STANDS_RECENT
            self._stands = min(self._stands * 2, _STANDS_MOST) if recent else _STANDS_FIRST
            self._told = True
            self._tell_all()
            await self._current.wait()

    async def _follow(self) -> None:
        """One stream, from its beginning to its end. Raises `EngineError`s, alone or in groups."""
        info = await self._engine.info()
        # From the engine's time before the list: what happens meanwhile is replayed.
        async with self._engine.events(info.now) as events, asyncio.TaskGroup() as tasks:
            self._heard_at = self._clock.monotonic()
            tasks.create_task(self._hear(events, tasks))
            await self._compare()
            if self._told:
                await self._clock.sleep(self._stands)
                self._back_at = self._clock.monotonic()
            self.info, self.why = info, ""
            self._away.clear()
            self._current.set()
            self._answers("")
            log.info("containers.engine_followed", containers=len(self._entries))
            for key in self._waiting():
                self._hints.tell(key)
            if self._told:
                self._tell_all()
            await self._guard()

    async def _hear(self, events: AsyncIterator[EngineEvent], tasks: asyncio.TaskGroup) -> NoReturn:
        async for event in events:
            self._heard_at = self._clock.monotonic()
            if event.action == "destroy":
                self._drop(event.id)
            elif event.action == "start" and event.id in self._starting:
                continue
            elif event.id in self._settling:
                self._again.add(event.id)
            else:
                self._settling.add(event.id)
                tasks.create_task(self._settle(event.id))
        raise EngineUnavailable("it has ended its stream of events")

    async def _settle(self, container: str) -> None:
        """Read it until nothing has happened to it meanwhile."""
        try:
            while True:
                self._again.discard(container)
                await self._look(container, tell=True)
                if container not in self._again:
                    return
        finally:
            self._settling.discard(container)

    async def _guard(self) -> NoReturn:
        """See that a silent engine lives, and that nothing was missed."""
        while True:
            await self._clock.sleep(_SILENCE)
            if self._clock.monotonic() - self._heard_at >= _SILENCE:
                await self._engine.ping()
            if self._clock.monotonic() - self._compared_at >= _COMPARE:
                await self._compare()

    async def _compare(self) -> None:
        """Make good whatever differs from a complete list."""
        self._number += 1
        asked = self._number
        listed = await self._engine.containers()
        present = {thing.id for thing in listed}
        for container, entry in tuple(self._entries.items()):
            # One that was read after the list was asked for may be younger than the list.
            if entry.seen is not None and entry.number < asked and container not in present:
                self._drop(container)
        async with asyncio.TaskGroup() as reads:
            for thing in listed:
                if self._differs(thing):
                    reads.create_task(self._look(thing.id, tell=True))
        self._compared_at = self._clock.monotonic()

    def _differs(self, thing: Thing) -> bool:
        entry = self._entries.get(thing.id)
        if entry is None or entry.seen is None:
            return True
        seen = entry.seen
        return seen.status != thing.state or (seen.status == "running" and seen.health != thing.health)

    async def _look(self, container: str, *, tell: bool = False) -> Container | None:
        """Read it. Raises `EngineError`s but the one that says that it is gone."""
        entry = self._entries.setdefault(container, _Entry())
        entry.reading += 1
        self._number += 1
        number = self._number
        try:
            seen = await self._engine.inspect(container)
            if not entry.gone and number > entry.number:
                self._keep(entry, seen, number, tell=tell)
        except EngineNotFound:
            self._drop(container)
        finally:
            entry.reading -= 1
            if not entry.reading and entry.seen is None:
                self._entries.pop(container, None)
        return entry.seen

    def _keep(self, entry: _Entry, seen: Container, number: int, *, tell: bool) -> None:
        before, entry.seen, entry.number = entry.seen, seen, number
        self._of.setdefault(seen.labels.uid, set()).add(seen.id)
        if tell and seen != before:
            self._hints.tell((seen.labels.namespace, seen.labels.name))

    def _drop(self, container: str) -> None:
        """It is gone for ever; a read that is under way may not bring it back."""
        entry = self._entries.get(container)
        if entry is None:
            return
        seen, entry.seen, entry.gone = entry.seen, None, True
        if not entry.reading:
            del self._entries[container]
        if seen is not None:
            ids = self._of[seen.labels.uid]
            ids.discard(container)
            if not ids:
                del self._of[seen.labels.uid]
            self._hints.tell((seen.labels.namespace, seen.labels.name))

    def _tell_all(self) -> None:
        for entry in tuple(self._entries.values()):
            if entry.seen is not None:
                self._hints.tell((entry.seen.labels.namespace, entry.seen.labels.name))


def _first(error: BaseException) -> BaseException:
    """The first error in a group that is none of others."""
    return _first(error.exceptions[0]) if isinstance(error, BaseExceptionGroup) else error
