"""The Docker Engine API as far as we use it: one call a method, each with a deadline, each failing as an `EngineError`.

Promises: nothing is tried twice; a call that was cut off by its deadline or a lost connection is `EngineUnavailable`,
and may have had its effect; at most `AT_ONCE` calls are with the engine at a time, the others wait in the order of
their coming, before their deadline begins. Whoever changes something passes `may`, called when its turn has come: the
moment to see whether one still leads. Makes no decisions: what a container is to be is `plan`'s to say.
"""

from __future__ import annotations

import asyncio
import json
import socket
import struct
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from types import TracebackType
from typing import Any, Self, TypeVar

import aiohttp
from aiodocker import Docker, DockerError
from aiodocker.containers import DockerContainer
from aiodocker.exceptions import DockerStreamError
from aiodocker.networks import DockerNetwork
from aiodocker.volumes import DockerVolume

from controllers.containers.documents import (
    INSTALLATION_LABEL,
    UID_LABEL,
    Container,
    Document,
    EngineEvent,
    EngineInfo,
    Image,
    Thing,
)
from controllers.containers.errors import EngineFailed, EngineUnavailable, of_status, plain
from storage.clock import Clock

T = TypeVar("T")

AT_ONCE = 16
"""Calls at a time. Measured: more make nothing faster, for the engine starts containers one after the other anyway."""
_STOPS_AT_ONCE = 64
"""They mostly wait for a container's own end."""
_PULLS_AT_ONCE = 8
LOGS_AT_ONCE = 64
_READ = 30.0
"""Seconds for a read."""
_CHANGE = 60.0
"""Seconds for a change that may be repeated; a start on a busy machine takes many."""
_OPEN = 10.0
_FRAME_MOST = 1024 * 1024
_LISTED = ("Id", "Labels", "Created", "State", "Status")
_WATCHED = ("start", "die", "oom", "destroy", "pause", "unpause", "health_status")

May = Callable[[], None]


def _always() -> None:
    """Nothing to ask first: it is a read."""


class Engine:
    """One engine. Open it with `async with`."""

    def __init__(self, host: str, clock: Clock, installation: str) -> None:
        """`host` as DOCKER_HOST has it; `installation` is what all of ours is labelled with."""
        self.host = host
        self._clock = clock
        self._installation = installation
        self._turns = asyncio.Semaphore(AT_ONCE)
        self._stops = asyncio.Semaphore(_STOPS_AT_ONCE)
        self._pulls = asyncio.Semaphore(_PULLS_AT_ONCE)
        self._followers = asyncio.Semaphore(LOGS_AT_ONCE)
        self._docker: Docker | None = None
        self._log_docker: Docker | None = None

    async def __aenter__(self) -> Self:
        self._docker = Docker(self.host)
        # Students who follow their logs hold connections for hours: they have a pool of their own.
        self._log_docker = Docker(self.host)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for docker in (self._docker, self._log_docker):
            if docker is not None:
                await docker.close()

    # Reads

    async def ping(self) -> None:
        """Return if it lives."""
        await self._call(lambda d: d.version(), seconds=_OPEN)

    async def info(self) -> EngineInfo:
        """The machine and its clock."""
        return await self._read(lambda d: d.system.info(), EngineInfo.of)

    async def containers(self, uid: str = "") -> list[Thing]:
        """All containers of this installation, or of one request, whatever their state."""
        wanted = json.dumps({"label": self._labels(uid)})

        async def ask(docker: Docker) -> list[DockerContainer]:
            return await docker.containers.list(all=1, filters=wanted)

        listed = await self._call(ask, seconds=_READ)
        with _sense():
            return [Thing.container({key: c[key] for key in _LISTED}) for c in listed]

    async def networks(self, uid: str = "") -> list[Thing]:
        """All networks of this installation, or of one request, oldest first."""
        listed = await self._call(lambda d: d.networks.list(filters={"label": self._labels(uid)}), seconds=_READ)
        with _sense():
            return sorted((Thing.network(n) for n in listed), key=lambda n: (n.created, n.id))

    async def volumes(self, uid: str = "") -> list[Thing]:
        """All volumes of this installation, or of one request."""
        listed = await self._call(lambda d: d.volumes.list(filters={"label": self._labels(uid)}), seconds=_READ)
        with _sense():
            return [Thing.volume(v) for v in listed["Volumes"] or ()]

    async def inspect(self, container: str) -> Container:
        """One container by id or name."""
        return await self._read(lambda d: d.containers.container(container).show(), Container.of)

    async def image(self, name: str) -> Image:
        """An image that the engine has. Raises `EngineNotFound`."""
        return await self._read(lambda d: d.images.inspect(name), Image.of)

    async def last_log(self, container: str, lines: int, most: int) -> bytes:
        """The end of what it has written: so many lines, and about so many bytes, at most."""

        async def ask(docker: Docker) -> bytes:
            wanted = {"stdout": "1", "stderr": "1", "tail": str(lines), "follow": "0"}
            if docker.api_version == "auto":
                await docker.version()  # by which the library finds out
            async with docker.session.get(
                f"{docker.docker_host}/{docker.api_version}/containers/{container}/logs", params=wanted
            ) as response:
                if response.status != 200:
                    raise of_status(response.status, (await response.text())[:1000])
                end = b""
                while (data := await _frame(response.content)) is not None:
                    end = (end + data)[-most:]
                return end

        return await self._call(ask, seconds=_READ)

    # Changes

    async def create_network(self, document: Document, *, may: May, seconds: float) -> str:
        """Its id. Raises `EngineConflict` when there is one of that name."""

        async def create(docker: Docker) -> DockerNetwork:
            return await docker.networks.create(dict(document))

        return str((await self._call(create, seconds=seconds, may=may)).id)

    async def create_container(self, name: str, document: Document, *, may: May, seconds: float) -> str:
        """Its id. Raises `EngineConflict` when there is one of that name, `EngineRefused` for what cannot be."""

        async def create(docker: Docker) -> DockerContainer:
            return await docker.containers.create(document, name=name)

        return str((await self._call(create, seconds=seconds, may=may)).id)

    async def start(self, container: str, *, may: May) -> None:
        """Start it; one that runs already is left as it is."""
        await self._call(lambda d: d.containers.container(container).start(), seconds=_CHANGE, may=may)

    async def stop(self, container: str, grace: float, *, may: May) -> None:
        """Ask it to end, and kill it `grace` seconds later; one that has ended is left as it is."""

        async def stop(docker: Docker) -> None:
            await docker.containers.container(container).stop(t=round(grace))

        await self._call(stop, seconds=grace + _CHANGE, may=may, turns=self._stops)

    async def remove(self, thing: Thing, *, may: May) -> None:
        """Remove it; of a container also its processes and the volumes without a name."""

        async def remove(docker: Docker) -> None:
            if thing.kind == "container":
                await docker.containers.container(thing.id).delete(force=True, v=True)
            elif thing.kind == "network":
                await DockerNetwork(docker, thing.id).delete()
            else:
                await DockerVolume(docker, thing.id).delete()

        await self._call(remove, seconds=_CHANGE, may=may)

    async def pull(self, image: str, seconds: float) -> None:
        """Return when the engine has it anew from its registry."""

        async def pull(docker: Docker) -> None:
            progress: AsyncIterator[Mapping[str, Any]] = docker.images.pull(image, stream=True)
            async for _ in progress:
                pass

        await self._call(pull, seconds=seconds, turns=self._pulls)

    # Streams

    @asynccontextmanager
    async def events(self, since: float) -> AsyncIterator[AsyncIterator[EngineEvent]]:
        """What happens to containers of this installation, from the engine's time `since` on, until the stream ends."""
        chosen = {"type": ["container"], "label": self._labels(""), "event": list(_WATCHED)}
        async with self._stream(
            self._docker, "events", {"since": f"{since:.6f}", "filters": json.dumps(chosen)}
        ) as response:
            yield self._events(response)

    async def _events(self, response: aiohttp.ClientResponse) -> AsyncIterator[EngineEvent]:
        lines = aiter(response.content)
        while True:
            with _translated(), _sense():
                line = await anext(lines, b"")
                event = EngineEvent.of(json.loads(line)) if line else None
            if event is None:
                return
            yield event

    async def logs(self, container: str, *, tail: int, follow: bool) -> AsyncGenerator[bytes, None]:
        """What it has written, its last `tail` lines, and with `follow` what it writes until it ends.

        The first piece is empty: the log is open, even if it is silent. Raises `EngineUnavailable` also when too many
        are being read already.
        """
        if self._followers.locked():
            raise EngineUnavailable(f"{LOGS_AT_ONCE} logs are being read; try again")
        wanted = {"stdout": "1", "stderr": "1", "tail": str(tail), "follow": "1" if follow else "0"}
        async with (
            self._followers,
            self._stream(self._log_docker, f"containers/{container}/logs", wanted) as response,
        ):
            yield b""
            while True:
                with _translated():
                    data = await _frame(response.content)
                if data is None:
                    return
                yield data

    @asynccontextmanager
    async def _stream(
        self, docker: Docker | None, path: str, parameters: Mapping[str, str]
    ) -> AsyncIterator[aiohttp.ClientResponse]:
        """An answer whose body comes as it comes."""
        if docker is None:
            raise EngineUnavailable("it is not open")
        with _translated():
            async with self._clock.timeout(_OPEN):
                if docker.api_version == "auto":
                    await docker.version()  # by which the library finds out
                response = await docker.session.get(
                    f"{docker.docker_host}/{docker.api_version}/{path}",
                    params=parameters,
                    timeout=aiohttp.ClientTimeout(),
                )
        try:
            if response.status != 200:
                with _translated():
                    raise of_status(response.status, (await response.text())[:1000])
            keep_alive(response.connection.transport if response.connection else None)
            yield response
        finally:
            response.close()

    # One call

    def _labels(self, uid: str) -> list[str]:
        ours = f"{INSTALLATION_LABEL}={self._installation}"
        return [ours, f"{UID_LABEL}={uid}"] if uid else [ours]

    async def _read(self, ask: Callable[[Docker], Awaitable[Any]], read: Callable[[Any], T]) -> T:
        document = await self._call(ask, seconds=_READ)
        with _sense():
            return read(document)

    async def _call(
        self,
        ask: Callable[[Docker], Awaitable[T]],
        *,
        seconds: float,
        may: May = _always,
        turns: asyncio.Semaphore | None = None,
    ) -> T:
        if self._docker is None:
            raise EngineUnavailable("it is not open")
        async with turns or self._turns:
            may()
            with _translated(), _sense():
                async with self._clock.timeout(seconds):
                    return await ask(self._docker)


async def _frame(stream: aiohttp.StreamReader) -> bytes | None:
    """The next piece of a log; None at its end. The engine puts 8 bytes before each: which stream, and its length."""
    try:
        _, length = struct.unpack(">BxxxL", await stream.readexactly(8))
        if length > _FRAME_MOST:
            raise EngineUnavailable(f"a piece of {length} bytes is no log's")
        return await stream.readexactly(length)
    except asyncio.IncompleteReadError:
        return None


def keep_alive(transport: asyncio.BaseTransport | None) -> None:
    """Have the kernel notice when the other end of a silent stream is gone; a local socket's cannot be unnoticed."""
    connected: socket.socket | None = transport.get_extra_info("socket") if transport else None
    if connected is not None and connected.family != socket.AF_UNIX:
        connected.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for option, value in ((socket.TCP_KEEPIDLE, 15), (socket.TCP_KEEPINTVL, 5), (socket.TCP_KEEPCNT, 3)):
            connected.setsockopt(socket.IPPROTO_TCP, option, value)


@contextmanager
def _translated() -> Iterator[None]:
    """No exception of a library leaves here."""
    try:
        yield
    except DockerStreamError as error:
        raise EngineFailed(error.message) from error
    except DockerError as error:
        # The library calls a connection that could not be made 900.
        raise of_status(error.status, str(error.message)) from error
    except TimeoutError as error:
        raise EngineUnavailable("the engine has not answered in time") from error
    except (aiohttp.ClientError, OSError) as error:
        raise EngineUnavailable(f"the engine cannot be reached: {plain(error)}") from error


@contextmanager
def _sense() -> Iterator[None]:
    """What is not an engine's answer is none."""
    try:
        yield
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise EngineUnavailable(f"no answer of an engine: {error!r}") from error
