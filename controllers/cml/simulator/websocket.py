"""The push channel `/ws/ui`, which no document describes: hints that something changed, without replay.

Promises: the first frame must be `{"token", "client_uuid"}`, else the channel is closed; afterwards `{"lab_filter"}`
narrows it to one lab. A session hears of the labs that it may see. States that change by time are told when they do:
each channel looks at its machine when the next thing is due. A reader that falls `QUEUE` messages behind is closed,
as is every channel of a machine that is switched off.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

import orjson
from aiohttp import WSCloseCode, WSMsgType, web

from controllers.cml.simulator.accounts import User
from controllers.cml.simulator.labs import Lab
from controllers.cml.simulator.machine import Machine

QUEUE = 1000
AUTH_SECONDS = 10.0
SEND_SECONDS = 10.0
NOISE_SECONDS = 10.0
"""How often the load of the system is told, wanted or not."""


@dataclass(slots=True, eq=False)
class Channel:
    """One open WebSocket."""

    machine: Machine
    socket: web.WebSocketResponse
    alive: Callable[[], Awaitable[bool]]
    token: str = ""
    lab_filter: str = ""
    queue: asyncio.Queue[dict[str, Any]] = field(default_factory=lambda: asyncio.Queue(QUEUE))
    ending: int = 0
    """The close code, once it is decided that the channel ends."""

    async def run(self) -> None:
        """Talk until one side has had enough."""
        if not await self._authenticate():
            await self.socket.close(code=WSCloseCode.POLICY_VIOLATION, message=b"authentication required")
            return
        self.machine.listeners[self] = self._hear
        try:
            async with asyncio.TaskGroup() as tasks:
                reader = tasks.create_task(self._read())
                await self._write()
                # Nobody may be reading while the socket is closed, or it does not wait for the client to agree.
                reader.cancel()
        finally:
            self.machine.listeners.pop(self, None)
        await self.socket.close(code=self.ending)

    def end(self, code: int) -> None:
        """Have the channel closed with that code as soon as it can be."""
        self.ending = self.ending or code
        if not self.queue.full():
            self.queue.put_nowait({})

    async def _authenticate(self) -> bool:
        try:
            async with self.machine.clock.timeout(AUTH_SECONDS):
                first = _object(await self.socket.receive())
        except TimeoutError:
            return False
        self.token = str(first.get("token") or "") if first else ""
        return self._user() is not None

    def _user(self) -> User | None:
        return self.machine.directory.user_of(self.token, self.machine.clock.now())

    async def _read(self) -> None:
        while True:
            message = await self.socket.receive()
            if message.type in (WSMsgType.CLOSE, WSMsgType.CLOSING, WSMsgType.CLOSED, WSMsgType.ERROR):
                self.end(WSCloseCode.OK)
                return
            wanted = _object(message)
            if wanted is None:
                self.end(WSCloseCode.INVALID_TEXT)
                return
            if "lab_filter" in wanted:
                self.lab_filter = str(wanted["lab_filter"] or "")

    async def _write(self) -> None:
        clock, machine = self.machine.clock, self.machine
        noise_at = clock.monotonic() + NOISE_SECONDS
        while True:
            machine.look()
            wait = min(machine.seconds_to_next(), max(0.0, noise_at - clock.monotonic()))
            message: dict[str, Any] | None = None
            try:
                async with clock.timeout(wait):
                    message = await self.queue.get()
            except TimeoutError:
                if clock.monotonic() >= noise_at:
                    noise_at = clock.monotonic() + NOISE_SECONDS
                    message = {"event_type": "ping", "event": "", "element_type": "", "lab_id": "", "data": {}}
                    # The only question asked of the host while nobody else asks: is it still on?
                    await self.alive()
            if not machine.powered:
                self.ending = self.ending or WSCloseCode.GOING_AWAY
            elif self._user() is None:
                self.ending = self.ending or WSCloseCode.POLICY_VIOLATION
            if self.ending or (message and not await self._send(message)):
                return

    async def _send(self, message: dict[str, Any]) -> bool:
        """Send a message; False when nobody takes it any more."""
        try:
            async with self.machine.clock.timeout(SEND_SECONDS):
                await self.socket.send_str(orjson.dumps(message).decode())
        except TimeoutError:
            self.ending = WSCloseCode.TRY_AGAIN_LATER
            return False
        except ConnectionError:
            self.ending = WSCloseCode.ABNORMAL_CLOSURE
            return False
        return True

    def _hear(self, message: dict[str, Any], lab: Lab | None) -> None:
        user = self._user()
        if lab is not None and (user is None or not self.machine.rights(user, lab)):
            return
        if lab is not None and self.lab_filter not in ("", lab.id):
            return
        try:
            self.queue.put_nowait(message)
        except asyncio.QueueFull:
            self.end(WSCloseCode.TRY_AGAIN_LATER)


def _object(message: Any) -> dict[str, Any] | None:
    """The JSON object of a frame."""
    if message.type not in (WSMsgType.TEXT, WSMsgType.BINARY):
        return None
    try:
        value = orjson.loads(message.data)
    except orjson.JSONDecodeError:
        return None
    return value if isinstance(value, dict) else None
