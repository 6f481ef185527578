"""A TCP connection that can be cut as a network is: bytes stop, nobody is told, and they flow again when it heals.

It can also tell who connects: peers of a cluster reach a member through one address, and cutting one of them off means
to stop what comes from it alone. The kernel's own tables say which process holds the other end.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Self


def _nobody(_port: int) -> str:
    return ""


class _Connection:
    """One carried connection; its gate is shut while it is cut."""

    def __init__(self, port: int) -> None:
        self.port = port
        self.gate = asyncio.Event()
        self.gate.set()
        self.origin: str | None = None


class TcpLink:
    """Listens on a port of 127.0.0.1 and carries bytes to another one; `origin_of` names who connects from a port."""

    def __init__(self, target_port: int, *, port: int = 0, origin_of: Callable[[int], str] = _nobody) -> None:
        self._target_port = target_port
        self._origin_of = origin_of
        self.port = port
        self.delay = 0.0
        """Seconds by which bytes come later, in each direction: a slow network, or a slow server."""
        self._server: asyncio.Server | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._connections: set[_Connection] = set()
        self._cut: set[str] = set()
        self._cut_all = False

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", self.port)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._server is not None:
            self._server.close()
        for task in tuple(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def cut(self, origin: str = "") -> None:
        """From now on bytes (of one origin, else all) stay where they are; connecting still works, and is of no use."""
        if origin:
            self._cut.add(origin)
        else:
            self._cut_all = True
        for connection in self._connections:
            self._set_gate(connection)

    def heal(self) -> None:
        """Carry everything, also what was kept back."""
        self._cut.clear()
        self._cut_all = False
        for connection in self._connections:
            self._set_gate(connection)

    def _set_gate(self, connection: _Connection) -> None:
        if self._cut and connection.origin is None:
            # Asked only when it matters: peers of a dead member connect many times a second, and asking is slow.
            connection.origin = self._origin_of(connection.port)
        if self._cut_all or connection.origin in self._cut:
            connection.gate.clear()
        else:
            connection.gate.set()

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.get_running_loop().create_task(self._serve(reader, writer), name="tcp-link")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connection = _Connection(writer.get_extra_info("peername")[1])
        self._connections.add(connection)
        try:
            self._set_gate(connection)
            await connection.gate.wait()
            far_reader, far_writer = await asyncio.open_connection("127.0.0.1", self._target_port)
            try:
                async with asyncio.TaskGroup() as group:
                    group.create_task(self._carry(reader, far_writer, connection.gate), name="tcp-link")
                    group.create_task(self._carry(far_reader, writer, connection.gate), name="tcp-link")
            finally:
                far_writer.close()
        except* OSError:
            pass  # either end has gone: the other one sees its connection end
        finally:
            self._connections.discard(connection)
            writer.close()
            with suppress(OSError):
                await writer.wait_closed()

    async def _carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, gate: asyncio.Event) -> None:
        while data := await reader.read(65_536):
            if self.delay:
                await asyncio.sleep(self.delay)  # what comes meanwhile goes together, so that nothing piles up
            await gate.wait()
            writer.write(data)
            await writer.drain()
        await gate.wait()
        writer.write_eof()


def holder_of(port: int, pids: dict[str, int]) -> str:
    """Which of the named processes holds the connected socket 127.0.0.1:`port`; empty when none does (Linux)."""
    address = f"0100007F:{port:04X}"
    rows = (line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:])
    inodes = {row[9] for row in rows if row[1] == address}
    for name, pid in pids.items():
        with suppress(FileNotFoundError, ProcessLookupError):
            for descriptor in Path(f"/proc/{pid}/fd").iterdir():
                with suppress(FileNotFoundError):
                    target = str(descriptor.readlink())
                    if target.startswith("socket:[") and target[8:-1] in inodes:
                        return name
    return ""
