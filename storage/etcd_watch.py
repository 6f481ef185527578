"""A watch on etcd that survives its streams: every change once, in order, whole revisions, or an error.

One task per open watch reads the stream, joins fragments, drops what was delivered before, and resumes on another
member when a stream is lost or stalls. A silent live watch writes its barrier and condemns the stream when that does
not come back; a failed write condemns nothing. A silent watch without barriers is opened anew. The consumer's buffer is
bounded: a slow one stops the reading, nothing else. Called by `storage.etcd`; ends with its context.
"""

from __future__ import annotations

import asyncio
import random
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass

import structlog

from storage.barrier import Barriers
from storage.base import Batch, Event, is_barrier_key
from storage.clock import Clock
from storage.errors import Compacted, PermissionDenied, StorageError, StoreReset, Unavailable
from storage.etcd_errors import LostReply, Malformed, NotDone, TokenRefused, classify
from storage.etcd_gateway import Gateway
from storage.etcd_stream import StreamLost, WatchStream
from storage.etcd_wire import Json, event, number
from storage.lineage import Lineage

log = structlog.get_logger(__name__)

_BUFFER_BYTES = 4 * 1024 * 1024
_BACKOFF_FIRST, _BACKOFF_MAX = 0.05, 2.0
_RECHECK_SECONDS = 2.0
"""Pause after a barrier that could not be written."""
_TICK = 0.001
"""A timer may fire this early: its time was computed another way than the one it is compared with."""


@dataclass(frozen=True, slots=True)
class Liveness:
    """After `silence` seconds without a byte a barrier is written; `deadline` seconds later it must have come back."""

    silence: float
    deadline: float

    def __post_init__(self) -> None:
        if self.silence <= 0 or self.deadline <= 0:
            raise ValueError("liveness_silence and liveness_deadline are positive numbers of seconds")

    def patience(self) -> float:
        """The silence to bear this time: a little less, and not the same for every daemon."""
        return self.silence * random.uniform(0.75, 0.9)  # noqa: S311 - spreads the writes of many daemons


@dataclass(frozen=True, slots=True)
class Source:
    """What a watch needs of its backend."""

    gateway: Gateway
    lineage: Lineage
    clock: Clock
    liveness: Liveness
    check: Callable[[int], Awaitable[None]]
    """A linearizable read at a revision: raises `Compacted`, `FutureRevision`, `StoreReset`."""


class EtcdWatch:
    """One open watch of a key range; `write_barrier` makes it a live one."""

    def __init__(
        self, source: Source, key_range: Json, after: int, write_barrier: Callable[[], Awaitable[int]] | None
    ) -> None:
        self._source = source
        self._clock = source.clock
        self._range = key_range
        self._mark = source.lineage.mark()
        self._position = max(after, 0)
        """Every revision up to here was queued whole."""
        self._pending: list[Event] = []
        self._write = write_barrier
        self._barriers = Barriers(self._write_barrier, self._clock, self._position) if write_barrier else None
        self._owed: deque[tuple[int, float]] = deque(maxlen=64)
        self._queue: deque[tuple[Batch, int]] = deque()
        self._queued_bytes = 0
        self._news = asyncio.Event()
        self._room = asyncio.Event()
        self._ended: BaseException | None = None
        self._task: asyncio.Task[None] | None = None
        self._stream: WatchStream | None = None
        self._lost_at: float | None = None
        self.dropped = 0
        """Events that came again or from before the start."""
        self.resumed = 0
        """How often the stream was replaced."""

    async def open(self) -> None:
        """Open the first stream; raises what opening can raise, `Unavailable` when no member gives a stream in time."""
        self._source.lineage.listen(self.end)
        try:
            try:
                async with self._clock.timeout(self._source.gateway.request_timeout):
                    stream = await self._open_somewhere(self._source.gateway.preferred)
            except TimeoutError:
                raise Unavailable("no member of the store opened a watch in time") from None
        except BaseException:
            self._source.lineage.forget(self.end)
            raise
        self._stream = stream
        if self._ended:
            await self.close()
            raise self._ended
        self._task = asyncio.create_task(self._run(stream), name="etcd-watch")

    async def close(self) -> None:
        """End the task and every waiter; nothing is left when this returns."""
        self.end(Unavailable("the watch was closed"))
        if self._task:
            await asyncio.wait({self._task})
        if self._stream:
            self._stream.close()  # A task that was cancelled before its first step has not closed it.

    def end(self, error: BaseException) -> None:
        """Let consumer and barriers hear `error`. What is queued is still delivered, unless it is of a former line."""
        if self._ended is None:
            self._ended = error
            if isinstance(error, StoreReset):
                self._queue.clear()
            if self._barriers:
                self._barriers.end(
                    error if isinstance(error, StorageError) else Unavailable(f"the watch died: {error}")
                )
        self._source.lineage.forget(self.end)
        self._news.set()
        if self._task and self._task is not asyncio.current_task():
            self._task.cancel()

    def __aiter__(self) -> AsyncIterator[Batch]:
        return self

    async def __anext__(self) -> Batch:
        while not self._queue:
            if self._ended:
                raise self._ended
            self._news.clear()
            await self._news.wait()
        batch, size = self._queue.popleft()
        self._queued_bytes -= size
        self._room.set()
        if self._barriers:
            self._barriers.delivered(batch.revision)
        return batch

    @property
    def lost_seconds(self) -> float:
        return 0.0 if self._lost_at is None else self._clock.monotonic() - self._lost_at

    async def barrier(self, timeout: float = 3.0) -> int:
        if self._barriers is None:
            raise RuntimeError("only a live watch has a barrier")
        return await self._barriers.wait(timeout)

    async def _run(self, stream: WatchStream) -> None:
        """Read streams until the watch ends; every error but the loss of a stream is the watch's end."""
        try:
            backoff = _BACKOFF_FIRST
            while True:
                position, began = self._position, self._clock.monotonic()
                try:
                    await self._read(stream)
                except (StreamLost, Malformed, TokenRefused, PermissionDenied) as lost:
                    # A refusal too is only proved by opening another stream.
                    reason = str(lost)
                finally:
                    stream.close()
                self._lost_at = self._clock.monotonic()
                self._pending.clear()  # A revision that was not complete comes again whole.
                self.resumed += 1
                tell = log.info if self._barriers else log.debug  # Without barriers a silent stream is lost by design.
                tell("watch_stream_lost", reason=reason, position=self._position, resumed=self.resumed)
                if self._position > position or self._clock.monotonic() - began > _BACKOFF_MAX:
                    backoff = _BACKOFF_FIRST
                else:
                    await self._clock.sleep(backoff * random.uniform(0.5, 1.0))  # noqa: S311 - spreads retries
                    backoff = min(backoff * 2, _BACKOFF_MAX)
                stream = self._stream = await self._open_somewhere(self._source.gateway.after(stream.endpoint))
                self._lost_at = None
        except Exception as error:  # noqa: BLE001 - the consumer raises it: a watch must not fall silent
            self.end(error)

    async def _read(self, stream: WatchStream) -> None:
        """Queue what a stream brings, until it is lost."""
        while True:
            if self._queued_bytes >= _BUFFER_BYTES:
                await self._until_room()
                stream.touch()
            self._take(await self._next(stream))

    async def _until_room(self) -> None:
        while self._queued_bytes >= _BUFFER_BYTES:
            self._room.clear()
            await self._room.wait()

    async def _next(self, stream: WatchStream) -> Json:
        """The stream's next response, with a look at its liveness whenever it is silent."""
        patience = self._source.liveness.patience()
        while True:
            condemned = self._condemned_at(stream)
            due = stream.heard + patience if condemned is None else condemned
            try:
                async with self._clock.timeout(max(due - self._clock.monotonic(), 0.0)):
                    return await stream.next()
            except TimeoutError:
                patience = await self._on_silence(stream, patience)

    def _condemned_at(self, stream: WatchStream) -> float | None:
        """When the stream is given up because a barrier that was written has not come; None while none is owed."""
        if self._owed:
            return max(self._owed[0][1], stream.heard) + self._source.liveness.deadline
        if self._barriers is None:
            return stream.heard + self._source.liveness.silence + self._source.liveness.deadline
        return None

    async def _on_silence(self, stream: WatchStream, patience: float) -> float:
        """Write a barrier, or give the stream up; returns the silence to bear from `heard` on."""
        now = self._clock.monotonic()
        condemned = self._condemned_at(stream)
        if condemned is not None:
            if now + _TICK >= condemned:
                raise StreamLost(f"{stream.endpoint} was silent for {now - stream.heard:.3g} s")
            return patience
        if self._barriers and now + _TICK >= stream.heard + patience:
            try:
                await self._barriers.write_or_join()
            except StoreReset:
                raise
            except StorageError as error:
                # Proves nothing about the stream: the store may be down, or out of space.
                log.debug("watch_check_failed", error=str(error))
                return self._clock.monotonic() - stream.heard + min(_RECHECK_SECONDS, self._source.liveness.silence)
        return patience

    async def _write_barrier(self) -> int:
        if self._write is None:
            raise RuntimeError("only a live watch writes barriers")
        # Its deadline runs from here: the time that a write loses at a member cut off from its peers is silence too.
        began = self._clock.monotonic()
        revision = await self._write()
        if revision > self._position and len(self._owed) < (self._owed.maxlen or 0):
            self._owed.append((revision, began))
        return revision

    def _take(self, result: Json) -> None:
        """Queue every whole revision of a response; the last one of a fragment may go on in the next."""
        self._raise_if_cancelled(result)
        for fields in result.get("events") or ():
            happened = event(fields)
            revision = happened.entry.revision
            if revision <= self._position:
                self.dropped += 1
                continue
            if self._pending and revision != self._pending[0].entry.revision:
                if revision < self._pending[0].entry.revision:
                    raise StreamLost(f"revision {revision} came after {self._pending[0].entry.revision}")
                self._flush()
            self._pending.append(happened)
        if self._pending and not result.get("fragment"):
            self._flush()

    def _flush(self) -> None:
        revision = self._pending[0].entry.revision
        events = tuple(e for e in self._pending if not is_barrier_key(e.entry.key))
        size = 200 + sum(len(e.entry.value) + (len(e.previous.value) if e.previous else 0) + 200 for e in events)
        self._pending.clear()
        self._position = revision
        while self._owed and self._owed[0][0] <= revision:
            self._owed.popleft()
        self._source.lineage.delivered(self._mark, revision)
        self._queue.append((Batch(revision, events), size))
        self._queued_bytes += size
        self._news.set()

    def _raise_if_cancelled(self, result: Json) -> None:
        """What etcd's cancelling of a watch means."""
        if not result.get("canceled"):
            return
        if oldest := number(result, "compact_revision"):
            raise Compacted(oldest)
        reason = str(result.get("cancel_reason") or "etcd gave no reason")
        error = classify(0, reason)
        raise StreamLost(reason) if isinstance(error, LostReply | NotDone) else error

    async def _open_somewhere(self, endpoint: str) -> WatchStream:
        """A stream after our position from one member or the next, with backoff, until cancelled or refused."""
        backoff = _BACKOFF_FIRST
        tries = 0
        while True:
            try:
                return await self._open_with_token(endpoint)
            except (StreamLost, Malformed, Unavailable) as error:
                log.debug("watch_not_opened", endpoint=endpoint, error=str(error))
            tries += 1
            endpoint = self._source.gateway.after(endpoint)
            if tries % len(self._source.gateway.endpoints) == 0:
                await self._clock.sleep(backoff * random.uniform(0.5, 1.0))  # noqa: S311 - spreads retries
                backoff = min(backoff * 2, _BACKOFF_MAX)

    async def _open_with_token(self, endpoint: str) -> WatchStream:
        """Until 3.5 etcd calls an expired token of a watch "permission denied": with a user, ask once more."""
        gateway = self._source.gateway
        token = gateway.token
        try:
            return await self._open(endpoint)
        except TokenRefused:
            pass
        except PermissionDenied:
            if not gateway.has_user:
                raise
        try:
            await gateway.renew_token(token)
            return await self._open(endpoint)
        except (NotDone, LostReply) as error:
            raise StreamLost(str(error)) from None
        except TokenRefused as error:
            raise PermissionDenied(f"the store refuses the watch: {error}") from None

    async def _open(self, endpoint: str) -> WatchStream:
        """Open a stream and, once etcd has registered it, prove that nothing after our position is missing."""
        create = {**self._range, "start_revision": str(self._position + 1), "fragment": True, "prev_kv": True}
        stream = await WatchStream.open(self._source.gateway, endpoint, create, self._clock)
        try:
            async with self._clock.timeout(self._source.gateway.request_timeout):
                created = await stream.next()
            self._raise_if_cancelled(created)
            await self._source.check(self._position)
        except TimeoutError:
            stream.close()
            raise StreamLost(f"{endpoint} registered no watch in time") from None
        except BaseException:
            stream.close()
            raise
        stream.touch()
        return stream
