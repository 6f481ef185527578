"""`lrm dev`: a real etcd, a real Redis, the plug-ins' simulators and one daemon, as children that die with us.

Everything is on 127.0.0.1 and, unless said otherwise, on free ports. `dev.json` in the data directory tells where each
part is, what environment the daemon got, and its process id, for demos and tests.
"""

from __future__ import annotations

import asyncio
import os
import shlex
import sys
import tempfile
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import AsyncExitStack
from pathlib import Path
from types import TracebackType
from typing import Self

import aiohttp
import orjson

from lrm.devservers import EtcdServer, RedisServer
from lrm.errors import only_cause
from lrm.plugin import DevPlan, DevService, Plugin
from lrm.processes import ChildProcess, ProcessError, free_port
from storage.clock import Clock, SystemClock

_READY_SECONDS = 30.0


class DevStack:
    """Starts on entering, stops in reverse order on leaving; what it started is reachable by name in `children`."""

    def __init__(
        self,
        plugins: Sequence[Plugin],
        *,
        port: int = 0,
        data_dir: Path | None = None,
        environment: Mapping[str, str] | None = None,
        simulators: Sequence[str] = (),
        clock: Clock | None = None,
    ) -> None:
        """`simulators` are further options of services, each as `NAME OPTIONS`. Raises `ProcessError` for others."""
        self._services = [s for p in plugins for s in p.dev_services]
        self._options = _by_service(simulators, [s.name for s in self._services])
        self._port = port
        self._wanted_dir = data_dir
        self._extra = dict(environment or {})
        self._clock = clock or SystemClock()
        self._stack = AsyncExitStack()
        self.children: dict[str, ChildProcess] = {}
        self.environment: dict[str, str] = {}
        """What the daemon has in its environment beside ours."""
        self.url = ""
        self.data_dir = Path()

    async def __aenter__(self) -> Self:
        async with AsyncExitStack() as stack:
            await self._start(stack)
            self._stack = stack.pop_all()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._stack.__aexit__(kind, error, trace)

    async def start_daemon(self) -> ChildProcess:
        """Start the daemon (again); it is ready when this returns."""
        argv = [sys.executable, "-m", "lrm", "serve"]
        child = self._spawn("lrm", argv, {**os.environ, **self.environment})
        await child.wait_ready(self._answers(f"{self.url}/readyz", 200), _READY_SECONDS)
        self._write_map()
        return child

    async def wait(self) -> str:
        """Wait until some child ends by itself; say which and how."""
        waits = {asyncio.create_task(c.wait(), name=name): name for name, c in self.children.items()}
        try:
            done, _ = await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in waits:
                task.cancel()
            await asyncio.gather(*waits, return_exceptions=True)
        first = done.pop()
        name = waits[first]
        tail = "\n  ".join(self.children[name].log_tail())
        return f"{name} has ended with code {first.result()}; its last lines:\n  {tail}"

    async def _start(self, stack: AsyncExitStack) -> None:
        if self._wanted_dir is None:
            self.data_dir = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="lrm-dev-")))
        else:
            self.data_dir = self._wanted_dir.resolve()
            self.data_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
        etcd = EtcdServer(self.data_dir / "etcd", clock=self._clock)
        redis = RedisServer(self.data_dir / "redis", clock=self._clock)
        plan = DevPlan({s.name: free_port() for s in self._services}, self.data_dir)
        for server in (etcd, redis):
            stack.push_async_callback(server.stop)
        for service in self._services:
            stack.push_async_callback(self._stop_child, service.name)
        try:
            async with asyncio.TaskGroup() as tasks:
                for starting in (etcd.start(), redis.start(), *(self._start_service(s, plan) for s in self._services)):
                    tasks.create_task(starting)
        except BaseExceptionGroup as group:
            raise only_cause(group) from group
        self.children |= {"etcd": etcd.process, "redis": redis.process}
        port = self._port or free_port()
        self.url = f"http://127.0.0.1:{port}"
        self.environment = {
            "LRM_ETCD_ENDPOINTS": etcd.endpoint,
            "LRM_REDIS_URL": redis.url,
            "LRM_API_PORT": str(port),
            "LRM_INSTANCE_ID": "dev",
            "LRM_LEADER": "static",  # one daemon: a restarted one need not wait for the lease of the last
        }
        for service in self._services:
            self.environment |= daemon_environment(service, plan, os.environ)
        self.environment |= self._extra
        stack.push_async_callback(self._stop_child, "lrm")
        await self.start_daemon()

    def arguments(self, service: DevService, plan: DevPlan) -> list[str]:
        """What a service is started with; of an option that is said twice the last counts, which is a person's."""
        return [*service.arguments(plan), *self._options.get(service.name, ())]

    async def _start_service(self, service: DevService, plan: DevPlan) -> None:
        argv = [sys.executable, "-m", "lrm", "simulate", service.name, *self.arguments(service, plan)]
        child = self._spawn(service.name, argv, {**os.environ, **service.environment(plan)})
        await child.wait_ready(self._answers(plan.url(service.name) + service.ready_path), _READY_SECONDS)

    def _spawn(self, name: str, argv: Sequence[str], env: Mapping[str, str]) -> ChildProcess:
        log_path = self.data_dir / "logs" / f"{name}.log"
        child = ChildProcess.start(argv, name=name, log_path=log_path, env=env, clock=self._clock)
        self.children[name] = child
        return child

    async def _stop_child(self, name: str) -> None:
        child = self.children.get(name)
        if child:
            await child.stop(grace=10.0)

    def _answers(self, url: str, status: int = 0) -> Callable[[], Awaitable[bool]]:
        async def probe() -> bool:
            try:
                async with aiohttp.ClientSession() as session, session.get(url) as reply:
                    return reply.status == status if status else reply.status < 500
            except aiohttp.ClientError:
                return False

        return probe

    def _write_map(self) -> None:
        where = {
            "url": self.url,
            "environment": self.environment,
            "pids": {name: child.pid for name, child in self.children.items()},
            "logs": {name: str(child.log_path) for name, child in self.children.items()},
        }
        path = self.data_dir / "dev.json"
        fresh = path.with_suffix(".new")
        fresh.write_bytes(orjson.dumps(where, option=orjson.OPT_INDENT_2))
        fresh.replace(path)


def daemon_environment(service: DevService, plan: DevPlan, ours: Mapping[str, str]) -> dict[str, str]:
    """What a service puts into the daemon's environment: where it is, and settings that we have not set ourselves."""
    return {name: ours.get(name, value) for name, value in service.settings.items()} | service.environment(plan)


def _by_service(simulators: Sequence[str], names: Sequence[str]) -> dict[str, list[str]]:
    options: dict[str, list[str]] = {}
    for text in simulators:
        try:
            name, *words = shlex.split(text)
        except ValueError:
            name, words = text, []
        if name not in names:
            raise ProcessError(f"{text!r} is not the options of a simulator; begin with one of {', '.join(names)}")
        options.setdefault(name, []).extend(words)
    return options


__all__ = ["DevStack", "ProcessError", "daemon_environment"]
