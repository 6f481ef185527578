"""What the instances' controller asks of a runtime, and what a runtime may answer.

A runtime makes one request's lab in its place, tells how it is, and removes it. It writes no resource: what it learns,
the controller records. Every call takes one step and returns; waiting is done by looking again. Every step may be
repeated after a crash or a lost reply: a runtime looks for what bears the request's uid before it makes anything, and
calls `ctx.check_leading()` before each call to the outside (with the seconds a creating one may take).

    InstanceError
    ├── Refused        it can never run like this: the request becomes Failed
    ├── WorkerLost     its place is gone for good: it begins again elsewhere, or becomes Failed
    ├── LabFailed      it ran, or was being started, and ended by a failure of its own
    └── NotNow         the outside does not answer, or is busy: nothing is concluded, and it is asked again
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, field
from typing import Protocol

from controllers.instances.kind import LabInstanceRequest, Need, PublishedPort
from lrm.controller import Context


class InstanceError(Exception):
    """Base; `reason` is one of `phases.Reasons`, `last_log` the last that its lab has written, if that is known."""

    def __init__(self, reason: str, message: str, *, last_log: str | None = None) -> None:
        super().__init__(message)
        self.reason = reason
        self.last_log = last_log


class Refused(InstanceError):  # noqa: N818 - it says what happened
    """It can never run like this."""


class WorkerLost(InstanceError):  # noqa: N818 - it says what happened
    """Its place is gone for good, and whatever was made there; or ended under it."""


class LabFailed(InstanceError):  # noqa: N818 - it says what happened
    """It ended by a failure of its own."""

    def __init__(
        self,
        reason: str,
        message: str,
        *,
        exit_code: int | None = None,
        oom_killed: bool = False,
        last_log: str | None = None,
    ) -> None:
        super().__init__(reason, message, last_log=last_log)
        self.exit_code = exit_code
        self.oom_killed = oom_killed


class NotNow(InstanceError):  # noqa: N818 - it says what happened
    """Nothing is known or can be done now; look again after so many seconds."""

    def __init__(self, reason: str, message: str, *, again: float = 5.0) -> None:
        super().__init__(reason, message)
        self.again = again


class State(enum.Enum):
    """How a lab is."""

    STARTING = "starting"
    """Being made or started; look again."""
    RUNNING = "running"
    """It can be worked with."""
    UNHEALTHY = "unhealthy"
    """It runs, and its own health check fails."""
    STOPPED = "stopped"
    """It is there, whole, and does not run: somebody stopped it. It keeps its place and its time."""
    ENDED = "ended"
    """It ended by itself, without a failure."""


@dataclass(frozen=True)
class Prepared:
    """What is known of a request before it has a place."""

    need: Need
    digest: str | None = None
    """sha256 of a topology, hex."""


@dataclass(frozen=True)
class Sighting:
    """How the lab is, and what it is called outside."""

    state: State
    message: str = ""
    trouble: str = ""
    """Of what is starting: why it does not come on, one of `phases.Reasons`; empty while it does."""
    container_id: str | None = None
    cml_lab_id: str | None = None
    access_url: str | None = None
    ports: list[PublishedPort] = field(default_factory=list)
    exit_code: int | None = None
    oom_killed: bool | None = None
    last_log: str | None = None
    """Of what has ended: the last that it has written."""
    again: float | None = None
    """Seconds after which to look again; None: a hint or the cache tells of every change."""


class Runtime(Protocol):
    """One way to run labs. Each call raises `InstanceError`s, and `NotLeading`."""

    async def prepare(self, request: LabInstanceRequest, ctx: Context) -> Prepared:
        """What it needs; reads the template. Nothing is made."""
        ...

    async def provision(self, request: LabInstanceRequest, ctx: Context) -> Sighting:
        """One step towards Running in `status.workerRef`."""
        ...

    async def look(self, request: LabInstanceRequest, ctx: Context) -> Sighting:
        """How it is, in phase Running; makes nothing, but starts what is stopped where its restartPolicy asks for it.

        What somebody took away is `LabFailed`.
        """
        ...

    async def last_log(self, request: LabInstanceRequest) -> str | None:
        """The last that its lab has written, bounded and printable; None where that cannot be had within a moment.

        Raises none of the errors above: an end never waits for it.
        """
        ...

    async def clean(self, request: LabInstanceRequest, ctx: Context) -> bool:
        """One step towards nothing being left in `status.workerRef`; True once that is proved, or the place is gone."""
        ...
