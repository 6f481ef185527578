"""A served API with kinds of its own, over the memory store or a real etcd, and a small client for it.

Telescopes are plain objects with everything a kind can declare; Sightings are made by the system alone and have a
field that is computed when they are served.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import aiohttp
import orjson
from pydantic import Field

from equipment.described import Described
from lrm.admission import Admission
from lrm.api.app import Api, serve
from lrm.api.operations import Operation
from lrm.api.settings import ApiSettings
from lrm.cache import Cache
from lrm.client import Client
from lrm.errors import Cause
from lrm.fanout import Fanout, RingLimits
from lrm.kind import Column, Kind
from lrm.model import Model
from lrm.offers import Offers
from lrm.registry import Registry
from lrm.resource import AnyResource, Resource, Status
from storage.base import Storage
from storage.clock import Clock, SystemClock

GROUP = "astro.example.io/v1"


class Mirror(Model):
    """What collects the light."""

    diameter_cm: int = Field(ge=1, le=10_000)
    coating: Literal["Silver", "Gold"] = "Silver"


class Eyepiece(Model):
    focal_mm: float = Field(gt=0)
    brand_name: str = ""


class TelescopeSpec(Model):
    """What an observatory wants."""

    site: str
    mirror: Mirror
    eyepieces: list[Eyepiece] = Field(default_factory=list)
    tags: dict[str, str] = Field(default_factory=dict)
    note: str | None = None
    magnification: Annotated[int, Field(gt=0, lt=1000)] | None = None
    tracking: bool = False


class TelescopeStatus(Status):
    """What is seen."""

    phase: str = "Pending"
    azimuth: float | None = None
    cloud_cover: int = 0


class Telescope(Resource[TelescopeSpec, TelescopeStatus]):
    """Looks at the sky."""

    api_version: str = GROUP
    kind: str = "Telescope"
    status: TelescopeStatus = Field(default_factory=TelescopeStatus)


class SightingSpec(Model):
    """Which telescope saw something."""

    telescope: str


class SightingStatus(Status):
    """What it saw."""

    brightness: float | None = None
    seen_from: str | None = None


class Sighting(Resource[SightingSpec, SightingStatus]):
    """Something seen; made by the system."""

    api_version: str = GROUP
    kind: str = "Sighting"
    status: SightingStatus = Field(default_factory=SightingStatus)


def _site_stays(new: Telescope, old: Telescope | None) -> Iterable[Cause]:
    if old and old.spec.site != new.spec.site:
        yield Cause("spec.site", "FieldValueForbidden", "is immutable")


def _seen_from(sighting: Sighting, lookup: Callable[[str, str, str], AnyResource | None]) -> Sighting:
    telescope = lookup("Telescope", sighting.namespace, sighting.spec.telescope)
    shown = sighting.thaw()
    shown.status.seen_from = telescope.spec.site if isinstance(telescope, Telescope) else None
    return shown


TELESCOPE: Kind[Telescope] = Kind(
    model=Telescope,
    plural="telescopes",
    singular="telescope",
    short_names=("tel",),
    categories=("all",),
    max_name=63,
    columns=(
        Column("Site", lambda t: t.spec.site),
        Column("Phase", lambda t: t.status.phase),
        Column("Diameter", lambda t: t.spec.mirror.diameter_cm, type="integer", priority=1),
    ),
    transitions={"Pending": frozenset({"Ready"}), "Ready": frozenset({"Pending"})},
    default_owner="telescopes",
    status_owners={"cloudCover": "weather"},
    condition_owners={"Dark": "weather"},
    fields={"spec.site": lambda t: t.spec.site, "status.phase": lambda t: t.status.phase},
    validate=_site_stays,
)
SIGHTING: Kind[Sighting] = Kind(
    model=Sighting,
    plural="sightings",
    singular="sighting",
    default_owner="sightings",
    create_refusal="they appear when something is seen",
    present=_seen_from,
)


def telescope(name: str = "hubble", site: str = "orbit", **more: Any) -> dict[str, Any]:
    """A document; `more` goes to the metadata."""
    return {
        "apiVersion": GROUP,
        "kind": "Telescope",
        "metadata": {"name": name, **more},
        "spec": {"site": site, "mirror": {"diameterCm": 240}},
    }


@dataclass
class FixedStatus:
    """What a daemon would say."""

    alive: bool = True
    is_ready: bool = True
    state: str = "ok"

    def live(self) -> tuple[bool, str]:
        return self.alive, "a worker has died"

    def ready(self) -> tuple[bool, str]:
        return self.is_ready, "" if self.is_ready else "the caches are not filled"

    def leader(self) -> Mapping[str, Any]:
        return {"is_leader": False, "identity": "test", "locks": []}

    async def bookmarks(self) -> Mapping[str, Any]:
        return {"bookmark": None, "current_version": 0, "lag": 0, "watchers": []}

    def finalizers(self) -> Mapping[str, Any]:
        return {"pending": 0, "processing": 0, "completed": 0, "controllers": []}

    async def health(self) -> Mapping[str, Any]:
        return {"status": self.state}

    async def status(self) -> Mapping[str, Any]:
        return {"identity": "test"}


class JumpingClock(SystemClock):
    """The machine's clock, whose monotonic time can be moved on at once: for what is looked at now and then."""

    def __init__(self) -> None:
        self._ahead = 0.0

    def jump(self, seconds: float) -> None:
        self._ahead += seconds

    def monotonic(self) -> float:
        return super().monotonic() + self._ahead


@dataclass
class Answer:
    """One reply, read to its end."""

    status: int
    headers: Mapping[str, str]
    raw: bytes
    warnings: list[str] = field(default_factory=list)

    @property
    def body(self) -> Any:
        return orjson.loads(self.raw)

    @property
    def causes(self) -> dict[str, str]:
        """Field → message."""
        return {c["field"]: c["message"] for c in self.body["details"]["causes"]}


@dataclass
class Served:
    """A running API and what it stands on."""

    url: str
    api: Api
    storage: Storage
    registry: Registry
    cache: Cache
    client: Client
    fanout: Fanout
    session: aiohttp.ClientSession
    status: FixedStatus

    async def call(self, method: str, path: str, body: Any = None, **options: Any) -> Answer:
        """One request; a body that is not bytes or text goes as JSON."""
        headers = {k: v for k, v in options.pop("headers", {}).items() if v is not None}
        if body is not None and not isinstance(body, (bytes, str)):
            body = orjson.dumps(body)
        if body is not None and not {"Content-Type", "content-type"} & headers.keys():
            headers["Content-Type"] = options.pop("content_type", "application/json")
        async with self.session.request(method, self.url + path, data=body, headers=headers, **options) as reply:
            return Answer(reply.status, reply.headers, await reply.read(), reply.headers.getall("Warning", []))

    async def get(self, path: str, **options: Any) -> Answer:
        return await self.call("GET", path, **options)

    async def post(self, path: str, body: Any, **options: Any) -> Answer:
        return await self.call("POST", path, body, **options)

    async def merge(self, path: str, body: Any, **options: Any) -> Answer:
        return await self.call("PATCH", path, body, content_type="application/merge-patch+json", **options)

    async def make(self, name: str = "hubble", namespace: str = "default", **more: Any) -> dict[str, Any]:
        """A telescope that surely exists afterwards."""
        answer = await self.post(path_of(namespace=namespace), telescope(name, **more))
        assert answer.status == 201, answer.raw
        made: dict[str, Any] = answer.body
        return made

    @asynccontextmanager
    async def watch(self, path: str, **params: str) -> AsyncIterator[WatchReader]:
        """A watch that is surely answered."""
        timeout = aiohttp.ClientTimeout(total=None)
        query = {"watch": "true", **params}
        async with self.session.get(self.url + path, params=query, timeout=timeout) as reply:
            assert reply.status == 200, await reply.read()
            yield WatchReader(reply)


class WatchReader:
    """The lines of a watch."""

    def __init__(self, reply: aiohttp.ClientResponse) -> None:
        self.reply = reply
        self._rest = b""

    async def next(self, timeout: float = 30.0) -> dict[str, Any]:
        """The next event; fails when the stream ends or nothing comes."""
        async with asyncio.timeout(timeout):
            while b"\n" not in self._rest:
                chunk = await self.reply.content.readany()
                assert chunk, "the watch ended"
                self._rest += chunk
        line, _, self._rest = self._rest.partition(b"\n")
        event: dict[str, Any] = orjson.loads(line)
        return event

    async def take(self, count: int) -> list[tuple[str, str]]:
        """The next events, each as its type and name."""
        return [told(await self.next()) for _ in range(count)]

    async def ended(self, timeout: float = 30.0) -> bytes:
        """What is left until the server ends the stream."""
        async with asyncio.timeout(timeout):
            return self._rest + await self.reply.content.read()


def told(event: dict[str, Any]) -> tuple[str, str]:
    return event["type"], event["object"].get("metadata", {}).get("name", "")


def path_of(name: str = "", *, namespace: str = "default", plural: str = "telescopes", sub: str = "") -> str:
    """The path of a collection, an object, or its subresource; without a namespace of all."""
    where = f"/namespaces/{namespace}" if namespace else ""
    return f"/apis/{GROUP}{where}/{plural}" + (f"/{name}" if name else "") + (f"/{sub}" if sub else "")


@asynccontextmanager
async def served(
    storage: Storage,
    *,
    root: str = "/lrm",
    clock: Clock | None = None,
    limits: RingLimits | None = None,
    bookmark_seconds: float = 15.0,
    routes: Sequence[Callable[..., None]] = (),
    kinds: Sequence[Kind[Any]] = (TELESCOPE, SIGHTING),
    wait_synced: bool = True,
    operations: Sequence[Operation] = (),
    admission: Admission | None = None,
    offers: Offers | None = None,
    **settings: Any,
) -> AsyncIterator[Served]:
    """The API of the test kinds on a free port."""
    clock = clock or SystemClock()
    registry = Registry(kinds, root=root)
    cache = Cache(storage, registry, clock)
    fanout = Fanout(cache, clock, limits=limits or RingLimits(), bookmark_seconds=bookmark_seconds)
    client = Client(storage, registry, clock)
    status = FixedStatus()
    described = Described()
    api = Api(
        storage=storage,
        registry=registry,
        cache=cache,
        client=client,
        fanout=fanout,
        clock=clock,
        settings=ApiSettings(port=0, **settings),
        status=status,
        routes=(*routes, described),
        operations=tuple(operations),
        admission=admission or {},
        offers=offers or Offers(),
    )
    caching = asyncio.create_task(cache.run())
    try:
        if wait_synced:
            async with asyncio.timeout(30):
                await cache.wait_synced()
        async with serve(api) as site, aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
            yield Served(site.url, api, storage, registry, cache, client, fanout, session, status)
        described.check()
    finally:
        caching.cancel()
        with suppress(asyncio.CancelledError):
            await caching


def tokens_file(folder: Path, *entries: dict[str, Any]) -> Path:
    """A tokens file."""
    path = folder / "tokens.yaml"
    path.write_bytes(orjson.dumps(list(entries)))
    return path
