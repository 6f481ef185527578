"""Events: what happened to an object, told to people beside its status (`kubectl describe`, `kubectl get events`).

Telling is best effort and costs its caller nothing: `record` never waits, never raises, and a store that is slow, full
or away only lets the oldest untold events be dropped and counted. One task writes them. The same again within ten
minutes becomes a count, and so do more than ten messages for one reason; an event is kept for a day from when it was
first told, whatever becomes of its object. What a leader tells is written under its term's guard: one that was deposed
misleads nobody. Nothing is decided by events. Controllers get a `Recorder` in their context; `lrm.api.events` serves.
"""

from __future__ import annotations

import asyncio
import uuid
from collections import OrderedDict, deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime
from typing import TYPE_CHECKING, Literal

import orjson
import structlog

from lrm.errors import NotLeading
from lrm.model import rfc3339
from lrm.resource import AnyResource
from storage.base import Entry, Guard, Storage
from storage.clock import Clock
from storage.errors import (
    AlreadyExists,
    Conflict,
    GuardFailed,
    LeaseNotFound,
    OutcomeUnknown,
    StorageError,
    StoreReset,
    Unavailable,
)

if TYPE_CHECKING:
    from opentelemetry.metrics import Meter

    from lrm.client import Fence

log = structlog.get_logger(__name__)

EventType = Literal["Normal", "Warning"]

KEPT_SECONDS = 24 * 3600
"""For so long an event is kept at least."""
WINDOW_SECONDS = 600.0
"""What comes again within it is counted with what it repeats; also the age at which a lease is shared no more."""
SIMILAR_MOST = 10
"""Messages of one object, component, type and reason in the window that are told one by one; then they are combined."""
LEASE_EVENTS_MOST = 1000
"""Events that end with one lease."""
_STORY_SECONDS = 6 * 3600.0
"""After so long a count begins anew: it would end with its first event's lease while it still goes on."""
_QUEUE_MOST = 5000
_GROUPS_MOST = 4096
_RETRY, _RETRY_MOST = 0.5, 10.0
_MESSAGE_MOST, _REASON_MOST = 1024, 128
_STEM_MOST = 253 - 21
COMBINED = "(combined from similar events): "


def events_prefix(root: str, namespace: str = "", about: str = "") -> str:
    """The prefix of all events, of a namespace's, or of those about objects whose name begins with `about` and a dot.

    The latter holds every event about the object `about`, and perhaps others.
    """
    below = f"{root}/events/"
    if not namespace:
        return below
    return f"{below}{namespace}/{_stem(about)}" if about else f"{below}{namespace}/"


def _stem(name: str) -> str:
    """How the names of events about an object begin; what follows sorts them by time."""
    return f"{name[:_STEM_MOST].rstrip('-.')}."


@dataclass(frozen=True, slots=True)
class _About:
    """Who tells what of which object: events that differ only in their message are similar."""

    component: str
    type: EventType
    reason: str
    api_version: str
    kind: str
    namespace: str
    name: str
    uid: str


@dataclass(eq=False)
class _Series:
    """One event: the first time it happened, and how often until now."""

    about: _About
    message: str
    first: datetime
    last: datetime
    revision: str
    """The resourceVersion of the object when it was last told."""
    guards: tuple[Guard, ...]
    uid: str
    count: int = 0
    queued: bool = False
    stored: tuple[str, int] | None = None
    """Key and revision of what the store has of it."""

    @property
    def name(self) -> str:
        """Unique, and by time among those of one object."""
        return f"{_stem(self.about.name)}{int(self.first.timestamp() * 1_000_000):014x}{self.uid[:6]}"


@dataclass
class _Group:
    """Similar events of one stretch of time."""

    begun: float
    last: float
    told: dict[str, _Series] = field(default_factory=dict)
    """By message."""
    combined: _Series | None = None


@dataclass
class Stats:
    """Counters since the process began."""

    recorded: int = 0
    """Happenings that were told to `record`; several may become one write."""
    written: int = 0
    dropped: int = 0
    """Events given up: too many waited, their term had ended, or the store refused them."""


class Recorder:
    """Tells the events of one component; with a fence (a term) only while that lasts."""

    def __init__(self, events: Events | None, component: str, fence: Fence | None = None) -> None:
        """Without `events` nothing is told."""
        self._events = events
        self._component = component
        self._fence = fence

    def record(self, resource: AnyResource, type: EventType, reason: str, message: str) -> None:  # noqa: A002 - the field's name
        """Tell people that something happened to an object; `reason` is one stable word. Never waits, never raises."""
        if self._events is not None:
            self._events.record(resource, type, reason, message, component=self._component, fence=self._fence)


class Events:
    """A daemon's events; `run` writes what `record` takes."""

    def __init__(
        self,
        storage: Storage,
        clock: Clock,
        *,
        root: str,
        instance: str = "",
        new_uid: Callable[[], str] = lambda: str(uuid.uuid4()),
    ) -> None:
        """`instance` is told as the source's host."""
        self.stats = Stats()
        self._storage = storage
        self._clock = clock
        self._root = root
        self._instance = instance
        self._new_uid = new_uid
        self._groups: OrderedDict[_About, _Group] = OrderedDict()
        self._queue: deque[_Series] = deque()
        self._news = asyncio.Event()
        self._idle = asyncio.Event()
        self._idle.set()
        self._lease: int | None = None
        self._lease_until = 0.0
        self._lease_left = 0
        self._in_trouble = False

    def recorder(self, component: str, fence: Fence | None = None) -> Recorder:
        """A recorder of one component."""
        return Recorder(self, component, fence)

    def record(
        self,
        resource: AnyResource,
        type: EventType,  # noqa: A002 - the field's name
        reason: str,
        message: str,
        *,
        component: str,
        fence: Fence | None = None,
    ) -> None:
        """See `Recorder.record`."""
        self.stats.recorded += 1
        try:
            guards = (fence.guard(),) if fence is not None else ()
        except NotLeading:
            self.stats.dropped += 1
            return
        about = _About(
            component,
            type,
            reason[:_REASON_MOST],
            resource.api_version,
            resource.kind,
            resource.namespace,
            resource.name,
            resource.uid,
        )
        series, now = self._series(about, _cut(message)), self._clock.now()
        series.first = series.first if series.count else now
        series.count += 1
        series.last, series.revision, series.guards = now, resource.metadata.resource_version, guards
        self._enqueue(series)

    async def run(self) -> None:
        """Write, for ever; ends only by cancellation."""
        while True:
            while not self._queue:
                self._idle.set()
                self._news.clear()
                await self._news.wait()
            series = self._queue.popleft()
            series.queued = False
            await self._deliver(series)

    async def flush(self, seconds: float) -> None:
        """Return when everything told has been written or given up, or after so many seconds."""
        with suppress(TimeoutError):
            async with self._clock.timeout(seconds):
                await self._idle.wait()

    def measure(self, meter: Meter) -> None:
        """An observer for `Telemetry.observe`."""
        meter.create_gauge("lrm_events_queued", description="Events that wait to be written.").set(len(self._queue))
        for name, count, text in (
            ("lrm_events_recorded", self.stats.recorded, "Happenings told; several may become one write."),
            ("lrm_events_written", self.stats.written, "Writes of events."),
            ("lrm_events_dropped", self.stats.dropped, "Events given up."),
        ):
            meter.create_counter(name, description=text).add(count)

    def _series(self, about: _About, message: str) -> _Series:
        """The event that this one repeats or is combined with, else a new one."""
        now = self._clock.monotonic()
        group = self._groups.get(about)
        if group is None or now - group.last > WINDOW_SECONDS or now - group.begun > _STORY_SECONDS:
            group = self._groups[about] = _Group(begun=now, last=now)
        group.last = now
        self._groups.move_to_end(about)
        oldest = next(iter(self._groups.values()))
        if len(self._groups) > _GROUPS_MOST or now - oldest.last > WINDOW_SECONDS:
            self._groups.popitem(last=False)
        series = group.told.get(message)
        if series is None and len(group.told) < SIMILAR_MOST:
            series = group.told[message] = self._new_series(about, message)
        if series is None:
            series = group.combined = group.combined or self._new_series(about, "")
            series.message = _cut(COMBINED + message)
        return series

    def _new_series(self, about: _About, message: str) -> _Series:
        now = self._clock.now()
        return _Series(about, message, first=now, last=now, revision="", guards=(), uid=self._new_uid())

    def _enqueue(self, series: _Series) -> None:
        if series.queued:
            return
        if len(self._queue) >= _QUEUE_MOST:
            self._queue.popleft().queued = False
            self.stats.dropped += 1
        series.queued = True
        self._queue.append(series)
        self._idle.clear()
        self._news.set()

    async def _deliver(self, series: _Series) -> None:
        """Write one event; while the store is away again and again, for what waits behind it has no better luck."""
        delay = _RETRY
        while True:
            count = series.count
            try:
                await self._write(series)
            except (Unavailable, StoreReset) as error:
                self._tell(series, error)
                await self._clock.sleep(delay)
                delay = min(delay * 2, _RETRY_MOST)
                continue
            except StorageError as error:
                # Refused, or nobody knows. What happens from now on is a new event.
                if not isinstance(error, GuardFailed):
                    self._tell(series, error)
                self.stats.dropped += 1
                self._begin_anew(series, told=count)
            except Exception:
                # One event's mistake must not end the telling of all, and with it the daemon.
                log.exception("events.failed", reason=series.about.reason)
                self.stats.dropped += 1
                self._begin_anew(series, told=count)
            else:
                self.stats.written += 1
                self._in_trouble = False
            return

    async def _write(self, series: _Series) -> None:
        if series.stored is not None:
            key, revision = series.stored
            try:
                entry = await self._storage.update(
                    key, self._encode(series), expected_revision=revision, guards=series.guards
                )
            except Conflict:
                self._begin_anew(series)  # it has ended with its lease
            else:
                series.stored = key, entry.revision
                return
        key, value = f"{events_prefix(self._root, series.about.namespace)}{series.name}", self._encode(series)
        try:
            entry = await self._create(key, value, series.guards)
        except AlreadyExists as error:
            if error.current.value != value:
                raise
            entry = error.current  # from a try whose answer said nothing
        series.stored = key, entry.revision

    async def _create(self, key: str, value: bytes, guards: tuple[Guard, ...]) -> Entry:
        try:
            return await self._storage.create(key, value, lease=await self._shared_lease(), guards=guards)
        except LeaseNotFound:
            self._lease = None
            return await self._storage.create(key, value, lease=await self._shared_lease(), guards=guards)

    async def _shared_lease(self) -> int:
        """The lease for one more event. Raises `Unavailable`."""
        now = self._clock.monotonic()
        if self._lease is None or now >= self._lease_until or self._lease_left <= 0:
            try:
                granted = await self._storage.grant_lease(KEPT_SECONDS + int(WINDOW_SECONDS))
            except OutcomeUnknown as error:
                raise Unavailable(f"no lease is known to have been granted: {error}") from error
            self._lease, self._lease_until, self._lease_left = granted.id, now + WINDOW_SECONDS, LEASE_EVENTS_MOST
        self._lease_left -= 1
        return self._lease

    def _begin_anew(self, series: _Series, told: int = 0) -> None:
        """Another event goes on where this one cannot; it counts what was not told, or the last time alone."""
        series.count = series.count - told if told else 1
        series.first, series.uid, series.stored = series.last, self._new_uid(), None

    def _encode(self, series: _Series) -> bytes:
        about = series.about
        involved = {
            "apiVersion": about.api_version,
            "kind": about.kind,
            "namespace": about.namespace,
            "name": about.name,
            "uid": about.uid,
            "resourceVersion": series.revision,
        }
        return orjson.dumps(
            {
                "apiVersion": "v1",
                "kind": "Event",
                "metadata": {
                    "name": series.name,
                    "namespace": about.namespace,
                    "uid": series.uid,
                    "creationTimestamp": _seconds(series.first),
                },
                "involvedObject": {k: v for k, v in involved.items() if v},
                "reason": about.reason,
                "message": series.message,
                "source": {"component": about.component, "host": self._instance},
                "firstTimestamp": _seconds(series.first),
                "lastTimestamp": _seconds(series.last),
                "count": series.count,
                "type": about.type,
                "eventTime": None,
                "reportingComponent": about.component,
                "reportingInstance": self._instance,
            }
        )

    def _tell(self, series: _Series, error: StorageError) -> None:
        """Log the beginning of a trouble, not each of its events."""
        if not self._in_trouble:
            log.warning("events.not_written", reason=series.about.reason, error=str(error), waiting=len(self._queue))
        self._in_trouble = True


def _seconds(time: datetime) -> str:
    """Kubernetes' `Time` has no fractions; its clients refuse none, but print them badly."""
    return rfc3339(time.replace(microsecond=0))


def _cut(message: str) -> str:
    """What can be stored of a message: half a surrogate pair cannot."""
    message = message.encode("utf-8", "replace").decode()
    return message if len(message) <= _MESSAGE_MOST else f"{message[: _MESSAGE_MOST - 1]}…"
