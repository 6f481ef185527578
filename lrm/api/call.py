"""One request on its way: who asks, about what, and what is to be told and recorded at its end."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from aiohttp import web

from lrm.admission import Admission
from lrm.api.audit import Touched
from lrm.api.auth import Principal
from lrm.api.operations import Operation
from lrm.api.settings import ApiSettings
from lrm.api.status import About
from lrm.cache import Cache
from lrm.client import Client
from lrm.fanout import Fanout
from lrm.offers import Offers
from lrm.registry import Registry
from lrm.telemetry import Telemetry
from storage.base import Storage
from storage.clock import Clock


class StatusSource(Protocol):
    """What the daemon says about itself."""

    def live(self) -> tuple[bool, str]:
        """Whether the process works, and why not."""
        ...

    def ready(self) -> tuple[bool, str]:
        """Whether requests should come here, and why not."""
        ...

    def leader(self) -> Mapping[str, Any]:
        """Which locks this daemon holds."""
        ...

    async def bookmarks(self) -> Mapping[str, Any]:
        """How far each watcher has come."""
        ...

    def finalizers(self) -> Mapping[str, Any]:
        """What waits to be cleaned up."""
        ...

    async def health(self) -> Mapping[str, Any]:
        """What it depends on; `status` is ok, degraded or unhealthy."""
        ...

    async def status(self) -> Mapping[str, Any]:
        """What it is and does."""
        ...


@dataclass(frozen=True)
class Api:
    """What the API is built from."""

    storage: Storage
    registry: Registry
    cache: Cache
    client: Client
    """Unfenced; each request takes one of its own by `bind`."""
    fanout: Fanout
    clock: Clock
    settings: ApiSettings
    status: StatusSource
    telemetry: Telemetry = field(default_factory=Telemetry)
    """What /metrics serves."""
    routes: Sequence[Callable[[web.Application, Api], None]] = ()
    """Plug-ins' own endpoints: authenticated, recorded, and their errors answered as `Status`. A handler that acts in
    a namespace calls `call_of(request).principal.require(...)`."""
    operations: Sequence[Operation] = ()
    """What those are, for the OpenAPI documents."""
    admission: Admission = field(default_factory=dict)
    """What plug-ins say about objects that people want to store."""
    offers: Offers = field(default_factory=Offers)
    """What plug-ins' routes read the outside with."""


Request = web.Request
Response = web.Response
"""For what helps endpoints and serves nothing by itself."""

API: web.AppKey[Api] = web.AppKey("api")


@dataclass
class Call:
    """See the module."""

    request_id: str
    principal: Principal
    about: About = field(default_factory=About)
    warnings: list[str] = field(default_factory=list)
    touched: list[Touched] = field(default_factory=list)

    def warn(self, text: str) -> None:
        """Tell the client something that is no error; kubectl prints it."""
        if text not in self.warnings:
            self.warnings.append(text)


CALL: web.RequestKey[Call] = web.RequestKey("call", Call)


def call_of(request: web.Request) -> Call:
    """The state of this request, for handlers."""
    return request[CALL]


def warning_header(text: str) -> str:
    """A warning as RFC 7234 writes it: one quoted ASCII line."""
    plain = text.encode("ascii", "backslashreplace").decode().replace("\\", "\\\\").replace('"', '\\"')
    return f'299 - "{" ".join(plain.split())[:500]}"'
