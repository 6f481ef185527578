"""A socket before an engine that counts what is asked through it, and can go away, fall silent and come back."""

from __future__ import annotations

import asyncio
import re
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

_REQUEST = re.compile(rb"(?:^|\n|})(GET|POST|DELETE|HEAD|PUT) (/\S*) HTTP/1\.1\r\n")
_ID = re.compile(r"[0-9a-f]{64}|lrm-[0-9a-f-]{36}")


class EngineProxy:
    """See the module; `host` is what to give as the engine's."""

    def __init__(self, path: Path, upstream: str) -> None:
        self.host = f"unix://{path}"
        self.asked: Counter[str] = Counter()
        """Method and path, without the API's version, ids as `*`."""
        self._path = path
        self._upstream = upstream.removeprefix("unix://")
        self._flowing = asyncio.Event()
        self._flowing.set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._server: asyncio.AbstractServer | None = None

    async def open(self) -> None:
        """Listen (again)."""
        self._server = await asyncio.start_unix_server(self._serve, self._path)

    async def close(self) -> None:
        """End every connection and refuse new ones."""
        if self._server is not None:
            self._server.close()
            self._server = None
        self._path.unlink(missing_ok=True)
        self.cut()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def cut(self) -> None:
        """End every connection; new ones are taken."""
        for task in tuple(self._tasks):
            task.cancel()

    def freeze(self) -> None:
        """Pass nothing more from the engine on, and say nothing."""
        self._flowing.clear()

    def thaw(self) -> None:
        self._flowing.set()

    def streams(self) -> int:
        """How often its events were listened to."""
        return sum(count for asked, count in self.asked.items() if asked == "GET /events")

    def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.get_running_loop().create_task(self._pass_on(reader, writer))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _pass_on(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        engine_reader, engine_writer = await asyncio.open_unix_connection(self._upstream)
        try:
            async with asyncio.TaskGroup() as tasks:
                back = tasks.create_task(self._back(engine_reader, writer))
                while data := await reader.read(65536):
                    for method, path in _REQUEST.findall(data):
                        plain = re.sub(r"^/v[\d.]+", "", path.decode().partition("?")[0])
                        self.asked[f"{method.decode()} {_ID.sub('*', plain)}"] += 1
                    engine_writer.write(data)
                    await engine_writer.drain()
                back.cancel()
        except* OSError:
            pass  # one of the two has gone, and so has the connection
        finally:
            writer.close()
            engine_writer.close()

    async def _back(self, engine: asyncio.StreamReader, client: asyncio.StreamWriter) -> None:
        while data := await engine.read(65536):
            await self._flowing.wait()
            client.write(data)
            await client.drain()
        client.close()


@asynccontextmanager
async def engine_proxy(folder: Path, upstream: str) -> AsyncIterator[EngineProxy]:
    proxy = EngineProxy(folder / "engine.sock", upstream)
    await proxy.open()
    try:
        yield proxy
    finally:
        await proxy.close()
