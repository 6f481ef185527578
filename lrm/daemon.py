"""The composition root: what a daemon is made of, in which order it starts, and in which order it stops. Read first.

    settings → storage (etcd) → cache ⇄ fan-out → API
                          ├→ lease, leaders → one election per lock → what is led: runners of controllers (plug-ins), …
    Redis ── bookmarks ───┘

It starts serving before the store answers (`/readyz` is false until the caches were filled once) and lives through
outages of etcd and Redis. A clean stop: not ready → each lock drains the work in hand, saves its bookmarks and gives
its key back → the API closes → the lease is revoked → everything else. A static leader that is deposed stops with
`Deposed`.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import uuid
from collections.abc import Sequence
from contextlib import AsyncExitStack
from importlib.metadata import version
from typing import Any

import structlog

from lrm import pauses
from lrm.api.app import Api, serve
from lrm.api.settings import ApiSettings
from lrm.bookmarks import Bookmarks
from lrm.cache import Cache
from lrm.client import Client
from lrm.compactor import Compactor
from lrm.controller import Controller
from lrm.election import Election, LeaderElection, LeaseElection, StaticElection, Term
from lrm.errors import only_cause
from lrm.events import Events
from lrm.fanout import Fanout
from lrm.gc import GarbageCollector
from lrm.leaders import Leaders
from lrm.lease import DaemonLease
from lrm.led import Led
from lrm.offers import Offers
from lrm.outside import OutsideHealth
from lrm.plugin import Plugin, PluginContext
from lrm.reconcile import Runner
from lrm.registry import Registry
from lrm.secrets import Secrets
from lrm.settings import Settings
from lrm.status import DaemonStatus
from lrm.telemetry import Telemetry, observe_daemon
from storage.base import Storage
from storage.clock import Clock, SystemClock
from storage.errors import NotFound, StorageError
from storage.etcd import EtcdStorage
from storage.etcd_gateway import TlsConfig
from storage.redis_bookmarks import ProcessBookmarks, RedisBookmarks

log = structlog.get_logger(__name__)

_RETRY = 0.5
_DEAF_LIMITS = 2
"""Times the liveness deadline without a watch after which a leader gives up: another daemon may hear more."""
_LIVENESS_DEADLINE = 10.0
_LAST_EVENTS = 0.2
"""Seconds for which a lock is kept so that what was done under it is still told."""


class Daemon:
    """One lrm process; `run` returns after a clean stop."""

    def __init__(self, settings: Settings, plugins: Sequence[Plugin], *, clock: Clock | None = None) -> None:
        self.settings = settings
        self.clock = clock or SystemClock()
        self.storage: Storage = open_storage(settings, self.clock)
        self.registry = Registry((k for p in plugins for k in p.kinds), root=settings.etcd_root)
        self.cache = Cache(self.storage, self.registry, self.clock)
        self.client = Client(self.storage, self.registry, self.clock)
        self.fanout = Fanout(self.cache, self.clock)
        self.leaders = Leaders(self.storage, self.clock, root=settings.etcd_root)
        self.lease = DaemonLease(
            self.storage,
            self.clock,
            lease_duration=settings.lease_duration,
            renew_deadline=settings.renew_deadline,
            retry_period=settings.retry_period,
        )
        self.bookmark_store: RedisBookmarks | ProcessBookmarks = ProcessBookmarks()
        if settings.redis_url:
            self.bookmark_store = RedisBookmarks(settings.redis_url, self.clock, root=settings.etcd_root)
        self.bookmarks = Bookmarks(self.bookmark_store, self.storage, self.clock, every=settings.bookmark_every)
        self.compactor = Compactor(
            self.storage,
            self.cache,
            self.clock,
            root=settings.etcd_root,
            every=settings.compact_every,
            retention=settings.compact_retention,
            is_led=lambda: self.leaders.holder(Compactor.lock_name) is not None,
            compacts=settings.compact,
        )
        self.health = OutsideHealth(self.clock)
        self.status = DaemonStatus(
            settings,
            self.clock,
            storage=self.storage,
            cache=self.cache,
            leaders=self.leaders,
            bookmarks=self.bookmarks,
            outside=self.health,
        )
        self.events = Events(self.storage, self.clock, root=settings.etcd_root, instance=settings.instance_id)
        self.telemetry = Telemetry(instance=settings.instance_id)
        observe_daemon(
            self.telemetry,
            self.status,
            cache=self.cache,
            store=lambda: self.compactor.health,
            lags=self.status.bookmark_lags,
        )
        self.telemetry.observe(self.events.measure)
        self.offers = Offers()
        self.url = ""
        self._plugins = tuple(plugins)
        self._plugin_settings = {p.name: p.settings() for p in plugins}
        self._stop = asyncio.Event()
        self._leading: list[tuple[LeaderElection, asyncio.Task[None], list[Led]]] = []

    def stop(self) -> None:
        """Ask for a clean stop."""
        self._stop.set()

    async def run(self, *, ready: asyncio.Event | None = None) -> None:
        """Serve and reconcile until `stop`. Raises `Deposed`, and the API's error for a port that is taken."""
        api = Api(
            storage=self.storage,
            registry=self.registry,
            cache=self.cache,
            client=self.client,
            fanout=self.fanout,
            clock=self.clock,
            settings=_api_settings(self.settings),
            status=self.status,
            telemetry=self.telemetry,
            routes=tuple(r for p in self._plugins for r in p.routes),
            operations=tuple(o for p in self._plugins for o in p.operations),
            admission={
                model: admit
                for p in self._plugins
                for model, admit in p.admission(self._plugin_settings[p.name], self.cache, self.clock).items()
            },
            offers=self.offers,
        )
        try:
            async with asyncio.TaskGroup() as tasks:
                following = [
                    tasks.create_task(self.cache.run(), name="cache"),
                    tasks.create_task(self.leaders.run(), name="leaders"),
                    tasks.create_task(self.bookmarks.run(), name="bookmarks"),
                    tasks.create_task(self.compactor.watch(), name="store watch"),
                    tasks.create_task(self.events.run(), name="events"),
                ]
                if self.settings.leader == "lease":
                    following.append(tasks.create_task(self.lease.run(), name="lease"))
                async with serve(api) as site:
                    self.url = site.url
                    log.info("daemon.serving", url=site.url, version=version("lrm"), instance=self.settings.instance_id)
                    work = tasks.create_task(self._work(), name="work")
                    if ready:
                        ready.set()
                    await self._stop.wait()
                    self.status.stopping = True
                    await self._hand_over()
                    work.cancel()
                    await asyncio.wait([work])
                for task in reversed(following):
                    task.cancel()
                    await asyncio.wait([task])
        except BaseExceptionGroup as group:
            raise only_cause(group) from group
        finally:
            await self.storage.aclose()
            await self.bookmark_store.aclose()
        log.info("daemon.stopped")

    async def _work(self) -> None:
        """Campaign for every lock and do what it stands for, for as long as the daemon lives."""
        installation = await self._installation()
        async with AsyncExitStack() as stack:
            work: list[Controller[Any] | Led] = []
            for plugin in self._plugins:
                context = PluginContext(
                    settings=self._plugin_settings[plugin.name],
                    storage=self.storage,
                    registry=self.registry,
                    cache=self.cache,
                    clock=self.clock,
                    secrets=Secrets(self.settings.secrets_allow),
                    installation=installation,
                    root=self.settings.etcd_root,
                    bookmarks=self.bookmarks,
                    telemetry=self.telemetry,
                    health=self.health,
                    events=self.events,
                    offers=self.offers,
                )
                work += await stack.enter_async_context(plugin.controllers(context))
            self.status.led = [
                *(self._runner(w) if isinstance(w, Controller) else w for w in work),
                *self._housekeeping(),
            ]
            locks: dict[str, list[Led]] = {}
            for led in self.status.led:
                locks.setdefault(led.lock_name, []).append(led)
            async with asyncio.TaskGroup() as tasks:
                for lock_name, group in locks.items():
                    election = LeaderElection(self._election(lock_name), self.leaders, fit=self.cache.wait_following)
                    self.status.elections[lock_name] = election
                    leading = tasks.create_task(self._lead(election, group), name=f"lead {lock_name}")
                    self._leading.append((election, leading, group))

    async def _lead(self, election: LeaderElection, group: Sequence[Led]) -> None:
        async def work(term: Term) -> None:
            async with asyncio.TaskGroup() as tasks:
                running = [tasks.create_task(led.run(term), name=led.name) for led in group]
                running.append(tasks.create_task(self._mind_hearing(term), name=f"hearing of {term.lock_name}"))
                await term.wait_lost()
                for task in running:
                    task.cancel()

        await election.run(work)

    async def _mind_hearing(self, term: Term) -> None:
        """End a term in which nothing is heard of the store's changes for long, although the lease can be renewed."""
        limit = _DEAF_LIMITS * (self.settings.etcd_silence + _LIVENESS_DEADLINE)
        while self.cache.deaf_seconds < limit:
            await self.clock.sleep(max(limit - self.cache.deaf_seconds, _RETRY))
        log.error("daemon.gives_up_leading", lock=term.lock_name, deaf=limit, reason=self.cache.error)
        term.lost()

    def _housekeeping(self) -> list[Led]:
        collector = GarbageCollector(
            self.storage, self.registry, self.cache, self.client, self.clock, events=self.events
        )
        return [collector, self.compactor] if self.settings.compact else [collector]

    def _runner(self, controller: Controller[Any]) -> Runner[Any]:
        return Runner(
            controller,
            self.client,
            self.cache,
            self.clock,
            observe_only=self.settings.observe_only,
            renew_deadline=self.settings.renew_deadline,
            bookmark=self.bookmarks.of(controller.name),
            events=self.events,
        )

    def _election(self, lock_name: str) -> Election:
        identity, root = self.status.identity, self.settings.etcd_root
        if self.settings.leader == "static":
            return StaticElection(self.storage, self.clock, root=root, lock_name=lock_name, identity=identity)
        return LeaseElection(
            self.storage, self.clock, lock_name=lock_name, identity=identity, lease=self.lease, leaders=self.leaders
        )

    async def _hand_over(self) -> None:
        """Each lock on its own: drain, then give it back, so that a slow controller holds up no other's successor."""
        share = self.settings.stop_timeout * 0.8

        async def leave(election: LeaderElection, leading: asyncio.Task[None], group: Sequence[Led]) -> None:
            election.stop()
            await asyncio.gather(*(led.drain(share) for led in group))
            await self.events.flush(_LAST_EVENTS)
            leading.cancel()
            await asyncio.wait([leading])

        await asyncio.gather(*(leave(*one) for one in self._leading))

    async def _installation(self) -> str:
        """The installation's uuid, made by whichever daemon is first."""
        key = f"{self.settings.etcd_root}/installation"
        waiting = False
        while True:
            try:
                return (await self.storage.get(key)).value.decode()
            except NotFound:
                with contextlib.suppress(StorageError):  # whatever it was, look again
                    await self.storage.create(key, str(uuid.uuid4()).encode())
            except StorageError as error:
                if not waiting:
                    log.warning("daemon.waiting_for_etcd", endpoints=self.settings.etcd_endpoints, error=str(error))
                waiting = True
            await self.clock.sleep(_RETRY)


async def run_daemon(settings: Settings, plugins: Sequence[Plugin]) -> None:
    """Run until SIGTERM or SIGINT; the second signal ends the process at once."""
    daemon = Daemon(settings, plugins)
    loop = asyncio.get_running_loop()

    def on_signal() -> None:
        if daemon.status.stopping:
            os._exit(130)
        log.info("daemon.stopping", timeout=settings.stop_timeout)
        daemon.status.stopping = True
        daemon.stop()
        loop.call_later(settings.stop_timeout, _give_up)

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, on_signal)
    settling = loop.create_task(_settle(daemon.cache), name="settle")
    try:
        await daemon.run()
    finally:
        settling.cancel()


async def _settle(cache: Cache) -> None:
    """Tell Python's collector, once the caches are full, that they are there to stay."""
    await cache.wait_synced()
    pauses.shorten()


def _give_up() -> None:
    log.error("daemon.stop_timed_out")
    os._exit(1)


def open_storage(settings: Settings, clock: Clock) -> EtcdStorage:
    """The store that the settings name; nothing is connected yet."""
    tls = None
    if settings.etcd_ca or settings.etcd_cert:
        tls = TlsConfig(ca=settings.etcd_ca, cert=settings.etcd_cert, key=settings.etcd_key)
    return EtcdStorage(
        settings.etcd_endpoints,
        root=settings.etcd_root,
        instance=settings.instance_id,
        clock=clock,
        tls=tls,
        user=settings.etcd_user,
        password=settings.etcd_password,
        request_timeout=settings.etcd_timeout,
        liveness_silence=settings.etcd_silence,
        liveness_deadline=_LIVENESS_DEADLINE,
        quota_bytes=settings.etcd_quota_bytes,
    )


def _api_settings(settings: Settings) -> ApiSettings:
    return ApiSettings(
        host=settings.api_host,
        port=settings.api_port,
        tls_cert=settings.tls_cert,
        tls_key=settings.tls_key,
        tokens_file=settings.auth_tokens_file,
        audit_file=settings.audit_file,
        max_body_bytes=settings.max_body_bytes,
    )
