"""What the daemon says about itself under /api/status, /livez and /readyz."""

from __future__ import annotations

import uuid
from importlib.metadata import version
from typing import Any

from lrm.bookmarks import Bookmarks
from lrm.cache import Cache
from lrm.election import LeaderElection
from lrm.gc import GarbageCollector
from lrm.leaders import Leaders
from lrm.led import Led
from lrm.model import rfc3339
from lrm.outside import OutsideHealth
from lrm.reconcile import Runner
from lrm.settings import Settings
from storage.base import Health, Storage
from storage.clock import Clock
from storage.errors import RedisFailed
from storage.redis_health import redis_error

_PROBE_SECONDS = 2.0
"""How long etcd and Redis are waited for; probes give up after some seconds."""


class DaemonStatus:
    """Filled by the daemon as it goes; asked by the API."""

    def __init__(
        self,
        settings: Settings,
        clock: Clock,
        *,
        storage: Storage,
        cache: Cache,
        leaders: Leaders,
        bookmarks: Bookmarks,
        outside: OutsideHealth,
    ) -> None:
        self.identity = f"{settings.instance_id}-{uuid.uuid4().hex[:8]}"
        """Unique to this process."""
        self.leaders = leaders
        self.elections: dict[str, LeaderElection] = {}
        """By lock, once the daemon campaigns."""
        self.led: list[Led] = []
        """All that this daemon does while it leads."""
        self.stopping = False
        self._settings = settings
        self._storage = storage
        self._cache = cache
        self._bookmarks = bookmarks
        self._outside = outside
        self._clock = clock
        self._started = clock.now()

    def live(self) -> tuple[bool, str]:
        """True while the loop runs: a reconcile worker that dies ends the process."""
        return True, ""

    def ready(self) -> tuple[bool, str]:
        """Caches were filled once and the daemon is not stopping; an outage of etcd later does not change it."""
        if self.stopping:
            return False, "the daemon is stopping"
        if not self._cache.synced:
            return False, f"the caches are not filled yet: {self._cache.error}"
        return True, ""

    async def health(self) -> dict[str, Any]:
        """etcd, Redis, the caches, plug-ins' parties outside, and what is wrong; ok, degraded or unhealthy."""
        store = await self._store_health()
        redis = await self._redis_error()
        problems = [] if store.ok else ["etcd does not answer"]
        problems += [f"cache: {self._cache.error}"] if self._cache.error else []
        notes = [*store.notes, *([f"redis: {redis}; bookmarks are not saved"] if redis else [])]
        notes += self._outside.notes
        return {
            "status": "unhealthy" if problems else "degraded" if notes else "ok",
            "problems": problems,
            "notes": notes,
            "etcd": {
                "ok": store.ok,
                "revision": store.revision,
                "clusterId": store.cluster_id,
                "members": [
                    {
                        "endpoint": m.endpoint,
                        "version": m.version,
                        "leader": m.leader,
                        "dbSizeBytes": m.db_size,
                        "dbSizeInUseBytes": m.db_size_in_use,
                        "dbQuotaBytes": m.quota,
                        "alarms": list(m.alarms),
                        "error": m.error,
                    }
                    for m in store.members
                ],
            },
            "redis": {"ok": not redis, "error": redis, "used": bool(self._settings.redis_url)},
            "outside": self._outside.describe(),
            "cache": {"synced": self._cache.synced, "revision": self._cache.revision, "error": self._cache.error},
        }

    async def _redis_error(self) -> str:
        """Why bookmarks are not saved; empty where they are, and where no Redis is used."""
        if not self._settings.redis_url:
            return ""
        return await redis_error(self._settings.redis_url, self._clock) or self._bookmarks.error

    async def _store_health(self) -> Health:
        """In time for a probe: an etcd that hangs is told before the probe gives up."""
        try:
            async with self._clock.timeout(_PROBE_SECONDS):
                return await self._storage.health()
        except TimeoutError:
            return Health(ok=False, revision=0, notes=(f"etcd did not answer within {_PROBE_SECONDS:g} s",))

    async def status(self) -> dict[str, Any]:
        """What this daemon is, holds and does."""
        return {
            "version": version("lrm"),
            "instance": self._settings.instance_id,
            "identity": self.identity,
            "startedAt": rfc3339(self._started),
            "stopping": self.stopping,
            "leader": self.leader(),
            "resources": self._cache.counts(),
            "undecodable": self._cache.undecodable,
            "controllers": [led.describe() for led in self.led],
        }

    def leader(self) -> dict[str, Any]:
        """Every lock, who holds it, and whether that is this daemon; `is_leader` is true when it holds any."""
        locks, deaf = [self._lock(name) for name in self.leaders.locks], self.leaders.deaf_seconds
        return {
            "is_leader": any(lock["is_leader"] for lock in locks),
            "identity": self.identity,
            "error": self.leaders.error or (f"the store is not heard for {deaf:.0f} s" if deaf > 1 else ""),
            "locks": locks,
        }

    async def bookmarks(self) -> dict[str, Any]:
        """How far each watcher has come, whoever leads it; the totals are the one furthest behind."""
        current = self._cache.revision
        watchers = {w: b.describe(current) for w, b in self._bookmarks.followed.items()}
        try:
            async with self._clock.timeout(_PROBE_SECONDS):
                saved = await self._bookmarks.store.all()
        except (RedisFailed, TimeoutError) as error:
            saved, problem = {}, str(error) or f"redis did not tell all bookmarks within {_PROBE_SECONDS:g} s"
        else:
            problem = ""
        for name, bookmark in saved.items():
            watchers.setdefault(name, self._bookmarks.of(name).describe(current, bookmark))
        revisions = [w["bookmark"] for w in watchers.values() if w["bookmark"] is not None]
        return {
            "bookmark": min(revisions, default=None),
            "current_version": current,
            "lag": max(0, current - min(revisions, default=current)),
            "error": problem or self._bookmarks.error,
            "watchers": [watchers[name] for name in sorted(watchers)],
        }

    def bookmark_lags(self) -> dict[str, int]:
        """By watcher that this daemon leads: the revisions between its bookmark and the cache."""
        described = (b.describe(self._cache.revision) for b in self._bookmarks.followed.values())
        return {w["watcher"]: w["lag"] for w in described if w["lag"] is not None}

    def finalizers(self) -> dict[str, Any]:
        """How many objects wait for a finalizer, are being cleaned up by this daemon, and were let go by it so far."""
        controllers = [
            led.finalizers()
            for led in self.led
            if isinstance(led, GarbageCollector) or (isinstance(led, Runner) and led.controller.finalizer)
        ]
        totals = {key: sum(c[key] for c in controllers) for key in ("pending", "processing", "completed")}
        return {**totals, "controllers": controllers}

    def _lock(self, name: str) -> dict[str, Any]:
        holder, election = self.leaders.holder(name), self.elections.get(name)
        return {
            "lock_name": name,
            "is_leader": election is not None and election.is_leader,
            "holder": holder.identity if holder else None,
            "term": holder.term if holder else None,
            "acquired_at": holder.acquired if holder else None,
            "seconds_without_leader": round(self.leaders.absent_seconds(name), 3),
        }
