"""Events of one sync: one by one as long as people can read them, then as sums; to all owners of what vanished."""

from __future__ import annotations

from collections import Counter

import pytest

from controllers.labs.kind import LAB_RECORD, FieldChange, LabOperation, LabRecord, LabRecordSpec
from controllers.labs.telling import MOST, Telling
from controllers.workers.kind import LAB_WORKER, LabWorker
from controllers.workers.spec import LabWorkerSpec
from equipment.widget import WIDGETS, widget
from lrm.cache import Cache
from lrm.client import Client
from lrm.events import EventType, Recorder
from lrm.registry import Registry
from lrm.resource import AnyResource, ObjectMeta
from lrm.testing import VirtualClock
from storage.memory import MemoryStorage


class Heard(Recorder):
    """What was told, in order."""

    def __init__(self) -> None:
        super().__init__(None, "labs")
        self.all: list[tuple[str, str, str]] = []

    def record(self, resource: AnyResource, type: EventType, reason: str, message: str) -> None:  # noqa: A002, ARG002
        self.all.append((f"{resource.kind} {resource.name}", reason, message))


def worker() -> LabWorker:
    spec = LabWorkerSpec.model_validate({"region": "us-east-1", "aws": {"amiId": "ami-12345678"}})
    return LabWorker(metadata=ObjectMeta(name="w1", uid="u1"), spec=spec)


def record(lab: str) -> LabRecord:
    made = LabRecord(metadata=ObjectMeta(name=f"w1-{lab}"), spec=LabRecordSpec(worker_ref="w1", lab_id=lab))
    made.status.title, made.status.state = f"Lab {lab}", "STOPPED"
    return made


@pytest.fixture
async def cache() -> Cache:
    return Cache(MemoryStorage(), Registry((LAB_WORKER, LAB_RECORD, WIDGETS)), VirtualClock())


async def test_beyond_so_many_of_a_sort_the_worker_is_told_the_sum(cache: Cache) -> None:
    heard = Heard()
    telling = Telling(heard, worker(), cache)
    for n in range(MOST + 7):
        telling.created(record(str(n)))
    telling.missing(record("lost"))
    telling.close()
    assert Counter(reason for _, reason, _ in heard.all) == {"Created": MOST, "Missing": 1, "LabsCreated": 1}
    assert heard.all[-1] == ("LabWorker w1", "LabsCreated", "7 more labs were found and have records now")


async def test_only_what_the_history_remembers_is_told(cache: Cache) -> None:
    heard = Heard()
    telling = Telling(heard, worker(), cache)
    before, after = record("a"), record("a")
    after.status.notes = "new"
    telling.changed(before, after)
    assert heard.all == []
    changes = {"state": FieldChange(old="STOPPED", new="STARTED"), "nodeCount": FieldChange(old=1, new=3)}
    entry = LabOperation(timestamp=VirtualClock().now(), changed_fields=changes)
    after.status.operation_history = [entry]
    telling.changed(before, after)
    assert heard.all == [
        ("LabRecord w1-a", "StateChanged", 'the lab "Lab a" went from STOPPED to STARTED'),
        ("LabRecord w1-a", "Updated", 'the lab "Lab a" changed: nodeCount from 1 to 3'),
    ]


async def test_whoever_owned_a_lab_that_vanished_is_told(cache: Cache) -> None:
    """Not one who has only the name of an owner that is gone."""
    heard, storage = Heard(), cache.storage
    owner = await Client(storage, cache.registry, VirtualClock()).create(widget("class"))
    other = owner.thaw()
    other.metadata.uid = "of-another-incarnation"
    await cache._relist()
    lost = record("a")
    lost.metadata.owner_references = [worker().as_owner(), owner.as_owner(), other.as_owner(controller=False)]
    Telling(heard, worker(), cache).vanished(lost, "CML says so")
    message = 'the lab "Lab a" (a) is gone from CML and was not deleted through lrm: CML says so'
    assert heard.all == [("LabWorker w1", "LabVanished", message), ("Widget class", "LabVanished", message)]
