"""The composition root: what a daemon is made of, in which order it starts, and in which order it stops. Read first.

    settings → storage (etcd) → cache ⇄ fan-out → API
                          └→ election → runners → controllers (plug-ins)

It starts serving before the store answers (`/readyz` is false until the caches were filled once) and lives through
outages of etcd and Redis. A clean stop: not ready → drain the reconciles in hand → release the locks → close the API →
close everything else. A static leader that is deposed stops with `Deposed`.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import uuid
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack
from importlib.metadata import version
from typing import Any

import structlog

from lrm.api.app import Api, serve
from lrm.api.settings import ApiSettings
from lrm.cache import Cache
from lrm.client import Client
from lrm.election import StaticElection, StaticTerm
from lrm.errors import LrmError, only_cause
from lrm.fanout import Fanout
from lrm.plugin import Plugin, PluginContext
from lrm.reconcile import Controller, Runner
from lrm.registry import Registry
from lrm.secrets import Secrets
from lrm.settings import Settings
from lrm.status import DaemonStatus
from storage.base import Storage
from storage.clock import Clock, SystemClock
from storage.errors import AlreadyExists, NotFound, OutcomeUnknown, Unavailable
from storage.etcd import EtcdStorage
from storage.etcd_gateway import TlsConfig

log = structlog.get_logger(__name__)

_RETRY = 0.5


class Deposed(LrmError):  # noqa: N818 - it says what happened
    """Another daemon has taken a static lock; two static daemons must not share an installation."""


class Daemon:
    """One lrm process; `run` returns after a clean stop."""

    def __init__(self, settings: Settings, plugins: Sequence[Plugin], *, clock: Clock | None = None) -> None:
        self.settings = settings
        self.clock = clock or SystemClock()
        self.storage: Storage = _open_storage(settings, self.clock)
        self.registry = Registry((k for p in plugins for k in p.kinds), root=settings.etcd_root)
        self.cache = Cache(self.storage, self.registry, self.clock)
        self.client = Client(self.storage, self.registry, self.clock)
        self.fanout = Fanout(self.cache, self.clock)
        self.status = DaemonStatus(settings, self.storage, self.cache, self.clock)
        self.url = ""
        self._plugins = tuple(plugins)
        self._plugin_settings = {p.name: p.settings() for p in plugins}
        self._stop = asyncio.Event()

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
            routes=tuple(r for p in self._plugins for r in p.routes),
        )
        try:
            async with asyncio.TaskGroup() as tasks:
                caching = tasks.create_task(self.cache.run(), name="cache")
                async with serve(api) as site:
                    self.url = site.url
                    log.info("daemon.serving", url=site.url, version=version("lrm"), instance=self.settings.instance_id)
                    work = tasks.create_task(self._work(), name="work")
                    if ready:
                        ready.set()
                    await self._stop.wait()
                    self.status.stopping = True
                    await self._drain()
                    work.cancel()
                    await asyncio.wait([work])
                caching.cancel()
        except BaseExceptionGroup as group:
            raise only_cause(group) from group
        finally:
            await self.storage.aclose()
        log.info("daemon.stopped")

    async def _work(self) -> None:
        """Lead every lock and run its controllers, for as long as the daemon lives."""
        installation = await self._installation()
        async with AsyncExitStack() as stack:
            controllers: list[Controller[Any]] = []
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
                )
                controllers += await stack.enter_async_context(plugin.controllers(context))
            locks: dict[str, list[Runner[Any]]] = {}
            for controller in controllers:
                locks.setdefault(controller.lock_name, []).append(self._runner(controller))
            self.status.runners = [r for runners in locks.values() for r in runners]
            async with asyncio.TaskGroup() as tasks:
                for lock_name, runners in locks.items():
                    tasks.create_task(self._lead(lock_name, runners), name=f"lead {lock_name}")

    def _runner(self, controller: Controller[Any]) -> Runner[Any]:
        return Runner(
            controller,
            self.client,
            self.cache,
            self.clock,
            observe_only=self.settings.observe_only,
            renew_deadline=self.settings.renew_deadline,
        )

    async def _lead(self, lock_name: str, runners: Sequence[Runner[Any]]) -> None:
        election = StaticElection(
            self.storage, self.clock, root=self.settings.etcd_root, lock_name=lock_name, identity=self.status.identity
        )
        while True:
            term = await election.acquire()
            self.status.terms[lock_name] = term
            try:
                async with _observing(election, term), asyncio.TaskGroup() as tasks:
                    for runner in runners:
                        tasks.create_task(runner.run(term), name=f"controller {runner.controller.name}")
                if await election.succeeded(term):
                    raise Deposed(
                        f"another daemon has taken the lock {lock_name}; this one was started with LRM_LEADER=static"
                    )
                log.warning("daemon.leading_again", lock=lock_name, reason="the store no longer has this term's key")
            finally:
                self.status.terms.pop(lock_name, None)
                await election.release(term)

    async def _drain(self) -> None:
        share = self.settings.stop_timeout * 0.8
        await asyncio.gather(*(runner.drain(share) for runner in self.status.runners))

    async def _installation(self) -> str:
        """The installation's uuid, made by whichever daemon is first."""
        key = f"{self.settings.etcd_root}/installation"
        waiting = False
        while True:
            try:
                return (await self.storage.get(key)).value.decode()
            except NotFound:
                with contextlib.suppress(AlreadyExists, OutcomeUnknown, Unavailable):  # whatever it was, look again
                    await self.storage.create(key, str(uuid.uuid4()).encode())
            except Unavailable as error:
                if not waiting:
                    log.warning("daemon.waiting_for_etcd", endpoints=self.settings.etcd_endpoints, error=str(error))
                waiting = True
            await self.clock.sleep(_RETRY)


@contextlib.asynccontextmanager
async def _observing(election: StaticElection, term: StaticTerm) -> AsyncIterator[None]:
    async with asyncio.TaskGroup() as tasks:
        observer = tasks.create_task(election.observe(term), name=f"observe {term.lock_name}")
        try:
            yield
        finally:
            observer.cancel()


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
    await daemon.run()


def _give_up() -> None:
    log.error("daemon.stop_timed_out")
    os._exit(1)


def _open_storage(settings: Settings, clock: Clock) -> EtcdStorage:
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
        liveness_deadline=10.0,
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
