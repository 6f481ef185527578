"""What our layers cost, each against the one below it in the same minute: absolute numbers differ between machines.

Plain HTTP to etcd's gateway is the ground; our storage stands on it, the API and the controllers on the storage. All
are measured in turn several times, and the median of each pair's ratios counts.
"""

from __future__ import annotations

import asyncio
import base64
import statistics
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from datetime import UTC, datetime

import aiohttp
import orjson

from bench.report import Figure, Size
from bench.stage import ROOT, Stage, at_rest, object_name, settled, stage
from equipment.daemons import WIDGETS
from equipment.etcd import b64
from equipment.waiting import until
from equipment.widget import Note
from storage.clock import SystemClock
from storage.etcd import EtcdStorage

NOTES = WIDGETS.replace("widgets", "notes")
"""Objects that no controller looks at: writing one is the API's work alone."""
AT_ONCE = 16
_ROUNDS = 5
_KEYS = 200
_PAGE = 500
_CLOCK = SystemClock()


@dataclass(frozen=True, slots=True)
class Pair:
    """A layer and the one that it is compared with; `least` is about half of what was measured when it was set."""

    name: str
    of: str
    to: str
    least: float


PAIRS = (
    Pair("storage: writes, one at a time", "storage write alone", "plain write alone", 0.4),
    Pair(f"storage: writes, {AT_ONCE} at once", "storage write", "plain write", 0.4),
    Pair("storage: list of all", "storage list", "plain list", 0.4),
    Pair(f"API: patches, {AT_ONCE} at once", "API patch", "storage write", 0.12),
    Pair("API: list of all", "API list", "storage list", 0.6),
    Pair("controller: reconciles that write", "reconcile", "storage write", 0.18),
)


async def throughput(size: Size) -> list[Figure]:
    """One figure a pair of layers."""
    async with stage() as scene, _session() as session:
        await scene.fill(size.objects)
        await scene.put(_note(i) for i in range(_KEYS))
        daemon = scene.daemon(LRM_LEADER="static")
        await daemon.start_ready(60)
        await at_rest([daemon])
        storage = scene.storage()
        try:
            layers = Layers(scene, session, storage, daemon.url, size)
            await layers.prepare()
            rounds = [await layers.measure(turn) for turn in range(_ROUNDS)]
        finally:
            await storage.aclose()
    return [_figure(pair, rounds) for pair in PAIRS]


class Layers:
    """The same work on each layer; every method returns how much of it was done in a second."""

    def __init__(
        self, scene: Stage, session: aiohttp.ClientSession, storage: EtcdStorage, url: str, size: Size
    ) -> None:
        self._scene = scene
        self._session = session
        self._storage = storage
        self._url = url
        self._size = size
        self._plain: list[int] = []
        self._stored: list[int] = []
        self._written = 0

    async def prepare(self) -> None:
        """Create the keys that are written."""
        for i in range(_KEYS):
            self._plain.append((await self._storage.create(f"/bench/plain/{i}", _value(0))).revision)
            self._stored.append((await self._storage.create(f"/bench/storage/{i}", _value(0))).revision)

    async def measure(self, turn: int) -> dict[str, float]:
        """One round of everything, per second."""
        many = max(self._size.operations // _ROUNDS, 1)
        few = max(many // 4, 1)
        return {
            "plain write alone": await _rate(few, 1, self._plain_write),
            "storage write alone": await _rate(few, 1, self._storage_write),
            "plain write": await _rate(many, AT_ONCE, self._plain_write),
            "storage write": await _rate(many, AT_ONCE, self._storage_write),
            "API patch": await _rate(many, AT_ONCE, self._patch),
            "plain list": await _rate(1, 1, self._plain_list),
            "storage list": await _rate(1, 1, self._storage_list),
            "API list": await _rate(1, 1, self._api_list),
            "reconcile": await self._reconciles(min(many, self._size.objects), turn),
        }

    async def _plain_write(self, number: int) -> None:
        """A compare-and-swap as short as it can be said."""
        place = number % _KEYS
        key = b64(f"/bench/plain/{place}")
        body = {
            "compare": [{"key": key, "target": "MOD", "mod_revision": str(self._plain[place])}],
            "success": [{"request_put": {"key": key, "value": b64(_value(number))}}],
        }
        reply = await self._post("kv/txn", body)
        if not reply.get("succeeded"):
            raise RuntimeError(f"a compare-and-swap failed: {reply}")
        self._plain[place] = int(reply["header"]["revision"])

    async def _storage_write(self, number: int) -> None:
        place = number % _KEYS
        key = f"/bench/storage/{place}"
        entry = await self._storage.update(key, _value(number), expected_revision=self._stored[place])
        self._stored[place] = entry.revision

    async def _patch(self, number: int) -> None:
        self._written += 1
        patch = {"spec": {"colour": f"c{self._written}"}}
        headers = {"Content-Type": "application/merge-patch+json"}
        url = f"{self._url}{NOTES}/{_note(number % _KEYS).name}"
        async with self._session.patch(url, data=orjson.dumps(patch), headers=headers) as reply:
            _expect(reply.status, 200, await reply.read())

    async def _plain_list(self, _number: int) -> None:
        prefix = f"{ROOT}/r/widgets/"
        body = {"key": b64(prefix), "range_end": b64(prefix[:-1] + "0"), "limit": str(_PAGE)}
        found = 0
        while True:
            reply = await self._post("kv/range", body)
            found += len(reply["kvs"])
            if not reply.get("more"):
                break
            last = base64.b64decode(reply["kvs"][-1]["key"]).decode()
            body |= {"key": b64(last + "\0"), "revision": reply["header"]["revision"]}
        _expect(found, self._size.objects)

    async def _storage_list(self, _number: int) -> None:
        _expect(len((await self._storage.list(f"{ROOT}/r/widgets/")).entries), self._size.objects)

    async def _api_list(self, _number: int) -> None:
        async with self._session.get(self._url + WIDGETS) as reply:
            _expect(len(orjson.loads(await reply.read())["items"]), self._size.objects)

    async def _reconciles(self, objects: int, turn: int) -> float:
        """Change so many specs at a stroke; the status of each is written once."""
        names = {object_name(i) for i in range(objects)}
        began = _CLOCK.monotonic()
        await self._scene.change(sorted(names), count=turn + 2)

        def all_done() -> bool:
            return names <= {m.what for m in self._scene.ledger.reconciles(since=began)}

        await until(all_done, "all changed objects are reconciled", timeout=120)
        marks = self._scene.ledger.reconciles(since=began)
        return len(marks) / (marks[-1].ended - marks[0].began)

    async def _post(self, path: str, body: dict[str, object]) -> dict[str, object]:
        async with self._session.post(f"{self._scene.etcd.endpoint}/v3/{path}", data=orjson.dumps(body)) as reply:
            raw = await reply.read()
            _expect(reply.status, 200, raw)
            return orjson.loads(raw)


def _figure(pair: Pair, rounds: list[dict[str, float]]) -> Figure:
    ratio = statistics.median(one[pair.of] / one[pair.to] for one in rounds)
    ours, theirs = (statistics.median(one[layer] for one in rounds) for layer in (pair.of, pair.to))
    told = f"{pair.of} {ours:,.3g}/s, {pair.to} {theirs:,.3g}/s"
    return Figure(pair.name, ratio, "times", pair.least, "more", told)


async def _rate(operations: int, at_once: int, work: Callable[[int], Awaitable[None]]) -> float:
    """Operations per second with so many under way."""
    numbers = iter(range(operations))

    async def go() -> None:
        for number in numbers:
            await work(number)

    began = _CLOCK.monotonic()
    async with asyncio.TaskGroup() as tasks:
        for _ in range(at_once):
            tasks.create_task(go())
    return operations / (_CLOCK.monotonic() - began)


def _session() -> aiohttp.ClientSession:
    return aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=60))


def _value(number: int) -> bytes:
    return b"%016d" % number + b"v" * 1200


def _note(number: int) -> Note:
    made = settled(object_name(number), datetime.now(UTC))
    return Note(metadata=made.metadata, spec=made.spec, status=made.status)


def _expect(found: int, wanted: int, told: bytes = b"") -> None:
    if found != wanted:
        raise RuntimeError(f"{found} instead of {wanted} {told[:500]!r}")
