"""Orders about labs: intents that the endpoints write down, and what the leader makes of them, seen in the cache.

Promises: nothing but resources is written here; an order that was written is carried out whether or not anybody waits.
An outcome is told only from a cache that holds the order; that a try has failed since is one: it waits for another.
Called by the labs' endpoints.
"""

from __future__ import annotations

from collections.abc import Callable

from controllers.labs.due import asked_for, is_asked_for
from controllers.labs.homes import can_be_asked, holds_up
from controllers.labs.imports_kind import FAILED as IMPORT_FAILED
from controllers.labs.imports_kind import IMPORTED, LabImport, LabImportSpec
from controllers.labs.imports_kind import READY as IMPORT_READY
from controllers.labs.kind import (
    ENDED,
    FAILED,
    LAB_DELETED,
    REFRESH_ANNOTATION,
    SUCCEEDED,
    WAITING,
    LabRecord,
    Operation,
    Verb,
    forgets,
)
from controllers.labs.wishes import open_operation, outcome_of
from controllers.orders import Order, Outcome, since
from controllers.workers.kind import LabWorker
from controllers.workers.phases import CML_RUNNING
from lrm.api.call import Api
from lrm.errors import ResourceNotFound
from lrm.resource import ObjectMeta


class Orders:
    """See the module."""

    def __init__(self, api: Api) -> None:
        self._api = api
        self._client = api.client.bind(owner="", fence=None)

    async def refresh(self, worker: LabWorker, order_id: str, *, among_many: bool = False) -> Order:
        """Ask for a sync. An order that another one replaces ends with that one's sync, which is later.

        `among_many` spares writes: one that is asked for already is shared, though its list may be a moment old, unless
        the last try failed; of a worker that is off nothing is written, as it is synced when it serves again.
        """
        if among_many and worker.status.phase not in CML_RUNNING:
            return Order(worker, worker, lambda: awaited(worker))

        def give(w: LabWorker) -> None:
            if not among_many or not is_asked_for(w) or w.status.labs_sync_error:
                w.metadata.annotations[REFRESH_ANNOTATION] = order_id

        written = await self._client.update(worker, give)
        if written is None:
            raise ResourceNotFound("labworkers", worker.name)

        def look() -> Outcome | None:
            now = self._api.cache.get(LabWorker, worker.namespace, worker.name)
            if now is None or now.uid != worker.uid:
                return Outcome(FAILED, f"the worker {worker.name} is gone")
            if now.status.labs_asked == asked_for(now):
                return Outcome(SUCCEEDED, "")
            error = now.status.labs_sync_error
            if error and now.status.labs_tried == asked_for(now):
                return Outcome(WAITING, f"not synced yet, and tried again by itself; the last try failed: {error}")
            return awaited(now)

        def so_far() -> str:
            now = self._api.cache.get(LabWorker, worker.namespace, worker.name)
            error = now.status.labs_sync_error if now is not None else None
            return f"not synced yet; the last try failed: {error}" if error else ""

        return Order(written, worker, self._since(written.revision, look), so_far)

    async def operate(self, record: LabRecord, verb: Verb, order_id: str) -> Order:
        """Have a lab started, stopped or wiped, or share in the same that was ordered and has not ended.

        Raises `Forbidden` when it is being deleted.
        """

        def give(r: LabRecord) -> None:
            under_way = open_operation(r)
            if r.deleting or under_way is None or under_way.verb != verb:
                r.spec.operation = Operation(id=order_id, verb=verb)

        written = await self._client.update(record, give)
        if written is None or written.spec.operation is None:
            raise ResourceNotFound("labrecords", record.name)
        given = written.spec.operation.id

        def look() -> Outcome | None:
            now = self._api.cache.get(LabRecord, record.namespace, record.name)
            if now is None or now.uid != record.uid or now.deleting:
                return Outcome(FAILED, "the lab is gone, or on its way")
            told = outcome_of(now, given)
            if told is None or told.result not in ENDED | {WAITING}:
                return None
            return Outcome(told.result, told.message)

        def so_far() -> str:
            now = self._api.cache.get(LabRecord, record.namespace, record.name)
            told = outcome_of(now, given) if now is not None else None
            return told.message if told is not None else ""

        return Order(written, record, self._since(written.revision, look), so_far)

    async def delete(self, record: LabRecord) -> Order:
        """Have a lab deleted, or its record forgotten where its annotation says so. Raises `Forbidden`."""
        written = await self._client.delete(record)
        done = "Lab record forgotten; the lab stays" if forgets(record) else "Lab deleted successfully"
        if written is None:
            return Order(record, record, lambda: Outcome(SUCCEEDED, done))

        def look() -> Outcome | None:
            now = self._api.cache.get(LabRecord, record.namespace, record.name)
            if now is None or now.uid != record.uid:
                return Outcome(SUCCEEDED, done)
            told = now.status.condition(LAB_DELETED)
            return Outcome(WAITING, told.message) if told is not None and holds_up(told.reason) else None

        def so_far() -> str:
            now = self._api.cache.get(LabRecord, record.namespace, record.name)
            told = now.status.condition(LAB_DELETED) if now is not None else None
            return told.message if told is not None else ""

        return Order(written, record, self._since(written.revision, look), so_far)

    async def import_lab(self, worker: LabWorker, title: str, topology: str, *, name: str = "") -> Order:
        """Have a lab made; without a name it is given one. Raises `Invalid`, `TooLarge`, `ResourceExists`."""
        generated = None if name else f"{worker.name}-import-"
        made = await self._client.create(
            LabImport(
                metadata=ObjectMeta(name=name, generate_name=generated, namespace=worker.namespace),
                spec=LabImportSpec(worker_ref=worker.name, title=title, topology=topology),
            )
        )

        def look() -> Outcome | None:
            now = self._api.cache.get(LabImport, made.namespace, made.name)
            if now is None:
                return Outcome(FAILED, "it was withdrawn")
            told = now.status.condition(IMPORT_READY)
            message = told.message if told is not None else ""
            if now.status.phase in (IMPORTED, IMPORT_FAILED):
                return Outcome(SUCCEEDED if now.status.phase == IMPORTED else FAILED, message)
            return Outcome(WAITING, message) if told is not None and holds_up(told.reason) else None

        def so_far() -> str:
            now = self._api.cache.get(LabImport, made.namespace, made.name)
            told = now.status.condition(IMPORT_READY) if now is not None else None
            return told.message if told is not None else ""

        return Order(made, None, self._since(made.revision, look), so_far)

    def _since(self, revision: int, look: Callable[[], Outcome | None]) -> Callable[[], Outcome | None]:
        return since(self._api, revision, look)


def awaited(worker: LabWorker) -> Outcome | None:
    """What a refresh of this worker has to wait for; None where nothing is in its way."""
    if worker.paused:
        return Outcome(WAITING, f"the worker {worker.name} is paused: it is synced when it is not any more")
    away = f"the worker {worker.name} is {worker.status.phase}: it is synced when its CML can be asked"
    return None if can_be_asked(worker) else Outcome(WAITING, away)
