"""The plug-in of the daemons that are hurt in a trio: Gadgets, whose every controller's write can be told from others.

A Gadget's status names the term and the identity under which it was written, and a serial of each write. Every attempt
is a line in a file (`TRIO_ATTEMPTS`) that survives any kill, written when the attempt has succeeded and before the
runner hears of it: what a bookmark claims can be held against it. An event consumer does the same with every delivery
of a Gadget (`TRIO_DELIVERIES`). `TRIO_WALL` names a file whose content, a number of
seconds, is added to this process's wall time: somebody sets the machine's clock.
"""

from __future__ import annotations

import json
import os
import struct
import time
import uuid
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from lrm.consumer import Delivery, EventConsumer, Handler
from lrm.controller import Context, Controller, Result
from lrm.kind import Kind
from lrm.led import Led
from lrm.model import Model
from lrm.plugin import Plugin, PluginContext
from lrm.resource import Resource, Status
from storage.clock import SystemClock

GADGETS_LOCK = "gadgets"
RECORDER = "recorder"
"""The event consumer, its lock and its bookmark."""
FINALIZER = "test.neuroglia.io/assemble"


class GadgetSpec(Model):
    op: str
    """Names the write that made this spec; no two writes share one."""


class GadgetStatus(Status):
    seen_op: str = ""
    term: int = 0
    identity: str = ""
    serial: str = ""


class Gadget(Resource[GadgetSpec, GadgetStatus]):
    api_version: str = "test.neuroglia.io/v1"
    kind: str = "Gadget"


GADGETS: Kind[Gadget] = Kind(model=Gadget, plural="gadgets", singular="gadget", default_owner="gadgets")


class Log:
    """A file of JSON lines that several processes append to; a line is there whole or not at all."""

    def __init__(self, path: str) -> None:
        self._file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)

    def add(self, **line: Any) -> None:
        os.write(self._file, json.dumps({"at": time.monotonic(), **line}).encode() + b"\n")


class Assemble(Controller[Gadget]):
    """Follows the spec in the status, under its stamp."""

    name = "gadgets"
    lock_name = GADGETS_LOCK
    model = Gadget
    finalizer = FINALIZER
    deadline = 20.0

    def __init__(self, log: Log, identity: str) -> None:
        self._log = log
        self._identity = identity

    async def reconcile(self, resource: Gadget, ctx: Context) -> Result:
        if resource.status.seen_op != resource.spec.op:
            term = ctx.guards()[0].create_revision

            def stamp(gadget: Gadget) -> None:
                gadget.status.seen_op = gadget.spec.op
                gadget.status.term = term
                gadget.status.identity = self._identity
                gadget.status.serial = uuid.uuid4().hex

            await ctx.client.update_status(resource, stamp)
        self._attempted(resource, ctx)
        return Result.done()

    async def finalize(self, resource: Gadget, ctx: Context) -> Result:
        self._attempted(resource, ctx)
        return Result.done()

    def _attempted(self, resource: Gadget, ctx: Context) -> None:
        self._log.add(
            controller=self.name,
            identity=self._identity,
            term=ctx.guards()[0].create_revision,
            name=resource.name,
            revision=resource.revision,
        )


class SetWall:
    """Wall time as a file says it was set."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("rb", buffering=0)

    def now(self) -> datetime:
        data = os.pread(self._file.fileno(), 8, 0)
        return datetime.now(UTC) + timedelta(seconds=struct.unpack("d", data)[0])


def set_wall(path: Path, seconds: float) -> None:
    """Set the wall time of the daemon that reads this file; it differs from the machine's by so many seconds."""
    with path.open("r+b" if path.exists() else "wb", buffering=0) as file:
        file.write(struct.pack("d", seconds))


def recorder(log: Log, identity: str) -> Handler:
    """Writes each delivery down, and is through with it then."""
    process = uuid.uuid4().hex[:8]

    async def record(delivery: Delivery) -> None:
        log.add(
            identity=identity,
            process=process,
            type=delivery.type,
            namespace=delivery.namespace,
            name=delivery.name,
            revision=delivery.revision,
        )

    return record


@asynccontextmanager
async def controllers(context: PluginContext) -> AsyncIterator[Sequence[Controller[Any] | Led]]:
    identity = os.environ["LRM_INSTANCE_ID"]
    consumer = EventConsumer(
        RECORDER,
        recorder(Log(os.environ["TRIO_DELIVERIES"]), identity),
        context.storage,
        context.registry,
        context.clock,
        context.bookmarks,
        kinds=(GADGETS,),
    )
    yield Assemble(Log(os.environ["TRIO_ATTEMPTS"]), identity), consumer


plugin = Plugin(name="gadgets", kinds=(GADGETS,), controllers=controllers)

if "TRIO_WALL" in os.environ:
    _wall = SetWall(Path(os.environ["TRIO_WALL"]))
    # Every reading of wall time in the product comes through this one method, which is why it is the place to set it.
    SystemClock.now = lambda _self: _wall.now()  # type: ignore[method-assign]
