"""The refresh of the labs of many workers at once: what it writes, and what it costs where nothing is to be had."""

from __future__ import annotations

from collections import Counter
from collections.abc import AsyncIterator, Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, cast

import orjson
import pytest

from controllers.labs.due import is_asked_for
from controllers.labs.imports_kind import LAB_IMPORT
from controllers.labs.kind import LAB_RECORD, REFRESH_ANNOTATION
from controllers.labs.openapi import OPERATIONS
from controllers.labs.routes import add_labs_routes
from controllers.workers.kind import LAB_WORKER, LabWorker
from controllers.workers.spec import LabWorkerSpec
from controllers.workers.status import Identity, LabWorkerStatus
from equipment.api import Answer, Served, served
from lrm.resource import RECONCILE_ANNOTATION, ObjectMeta
from storage.errors import OutcomeUnknown, StorageError, Unavailable
from storage.memory import MemoryStorage

MANY = 450
THEN = datetime(2026, 1, 1, tzinfo=UTC)


class Store(MemoryStorage):
    """One that can go away for whoever writes."""

    away: StorageError | None = None
    tried = 0

    async def update(self, *args: Any, **options: Any) -> Any:
        self.tried += 1
        if self.away is not None:
            raise self.away
        return await super().update(*args, **options)


@pytest.fixture
async def api(tmp_path: Path) -> AsyncIterator[Served]:
    """Nobody syncs: orders stay as they are until the test takes them."""
    kinds = (LAB_WORKER, LAB_RECORD, LAB_IMPORT)
    async with served(
        Store(), routes=(add_labs_routes,), kinds=kinds, operations=OPERATIONS, audit_file=tmp_path / "audit"
    ) as api:
        for n in range(MANY):
            await add(api, f"w{n:03}", "Ready" if n % 3 else "Stopped")
        await api.cache.barrier(30)
        yield api


async def add(api: Served, name: str, phase: str) -> None:
    status = LabWorkerStatus(phase=phase)
    status.cml.identity = Identity(product_uuid="uuid")
    worker = LabWorker(
        metadata=ObjectMeta(name=name, namespace="default", uid=f"uid-{name}", finalizers=["test/held"]),
        spec=LabWorkerSpec.model_validate({"region": "us-east-1", "aws": {"amiId": "ami-12345678"}}),
        status=status,
    )
    await api.storage.create(api.registry.key_of(worker), LAB_WORKER.encode(worker))


async def refresh_all(api: Served) -> tuple[Answer, Counter[str], int]:
    """The answer, how many workers have which result, and how many writes were tried."""
    store = cast("Store", api.storage)
    before = store.tried
    answer = await api.call("POST", "/api/v1/workers/labs/refresh")
    return answer, Counter(r["result"] for r in answer.body["results"]), store.tried - before


async def change(api: Served, name: str, mutate: Callable[[LabWorkerStatus], None]) -> None:
    worker = await api.client.get(LabWorker, "default", name)
    await api.client.update_status(worker, lambda w: mutate(w.status), force=True)
    await api.cache.barrier(30)


async def test_what_is_asked_for_already_and_what_is_off_is_not_written(api: Served) -> None:
    off, on = MANY // 3, MANY - MANY // 3
    answer, results, writes = await refresh_all(api)
    assert (answer.status, results, writes) == (202, {"Accepted": on, "Waiting": off}, on)
    assert answer.body["results"][0]["message"] == "the worker w000 is Stopped: it is synced when its CML can be asked"
    workers = api.cache.all(LabWorker)
    assert Counter(tuple(w.metadata.annotations) for w in workers) == {(): off, (REFRESH_ANNOTATION,): on}, (
        "the labs' sync alone is asked for"
    )
    assert Counter(is_asked_for(w) for w in workers) == {False: off, True: on}
    answer, results, writes = await refresh_all(api)
    assert (answer.status, results, writes) == (202, {"Accepted": on, "Waiting": off}, 0)

    def synced(status: LabWorkerStatus) -> None:
        status.labs_synced_at = THEN
        status.labs_asked = api.cache.all(LabWorker)[1].metadata.annotations[REFRESH_ANNOTATION]

    await change(api, "w001", synced)
    await change(api, "w002", lambda s: setattr(s, "labs_sync_error", "CML is broken"))
    assert (await refresh_all(api))[2] == 2, "one is to be synced once more, and one tried again at once"


async def test_what_was_written_is_on_record_in_lines_of_a_bounded_length(api: Served, tmp_path: Path) -> None:
    await refresh_all(api)
    await refresh_all(api)
    lines = [orjson.loads(line) for line in (tmp_path / "audit").read_bytes().splitlines()]
    assert [len(line["objects"]) for line in lines] == [200, 100, 1]
    assert len({line["request"] for line in lines}) == 2
    written = {o["name"] for line in lines[:2] for o in line["objects"]}
    assert written == {w.name for w in api.cache.all(LabWorker) if w.metadata.annotations}
    assert lines[2]["objects"] == [{"plural": "labworkers"}], "nothing was written the second time"


@pytest.mark.parametrize("away", [Unavailable("no answer"), OutcomeUnknown("no answer in time")])
async def test_a_store_that_is_away_is_not_asked_for_each_worker(api: Served, away: StorageError) -> None:
    cast("Store", api.storage).away = away
    answer, results, tries = await refresh_all(api)
    assert (answer.status, 1 <= tries <= 8) == (207, True)
    assert results["Failed"] >= MANY - MANY // 3
    unasked = [r for r in answer.body["results"] if r["message"].startswith("not asked, since the store was away")]
    assert len(unasked) >= MANY - MANY // 3 - 8


async def test_a_refresh_of_one_worker_is_of_what_is_there_when_it_is_asked_for(api: Served) -> None:
    """One under way may have read its list before: this one is not shared."""
    path = "/api/v1/workers/region/us-east-1/workers/w001/labs/refresh?wait=0"
    orders = set()
    for _ in range(2):
        assert (await api.call("POST", path)).status == 202
        await api.cache.barrier(30)
        [worker] = (w for w in api.cache.all(LabWorker) if w.name == "w001")
        orders.add(worker.metadata.annotations[REFRESH_ANNOTATION])
    assert len(orders) == 2
    assert RECONCILE_ANNOTATION not in worker.metadata.annotations
