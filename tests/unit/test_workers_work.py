"""One reconcile's hold on a worker: what it fails for, and how it judges time, over a real store."""

from __future__ import annotations

from datetime import timedelta

import structlog

from controllers.plugin import plugin
from controllers.workers.decisions import may_retry
from controllers.workers.kind import LabWorker
from controllers.workers.phases import Phase
from controllers.workers.spec import LabWorkerSpec
from controllers.workers.work import Work
from equipment.workers_world import SetClock
from lrm.cache import Cache
from lrm.client import Client
from lrm.clock import WallJumps
from lrm.controller import Context
from lrm.election import StaticElection
from lrm.events import Recorder
from lrm.registry import Registry
from lrm.resource import RETRY_ANNOTATION, ObjectMeta
from storage.memory import MemoryStorage


async def test_a_retry_asked_for_while_a_worker_fails_is_honoured_and_a_set_clock_makes_nothing_due() -> None:
    storage, clock, registry = MemoryStorage(), SetClock(), Registry(plugin.kinds)
    client = Client(storage, registry, clock)
    spec = LabWorkerSpec.model_validate({"region": "us-east-1", "aws": {"amiId": "ami-12345678"}})
    worker = await client.create(LabWorker(metadata=ObjectMeta(name="w1"), spec=spec))
    term = await StaticElection(storage, clock, root="/lrm", lock_name="workers", identity="t").acquire()
    context = Context(
        client=client.bind(owner="workers", fence=term),
        cache=Cache(storage, registry, clock),
        clock=clock,
        term=term,
        observe_only=False,
        renew_deadline=10,
        jumps=WallJumps(clock),
        bound_log=structlog.get_logger(),
        events=Recorder(None, "workers"),
    )
    work = Work(worker, context)
    await client.update(worker, lambda w: w.metadata.annotations.update({RETRY_ANNOTATION: "now"}))
    await work.settle()
    assert RETRY_ANNOTATION in work.worker.metadata.annotations, "the failing reconcile has seen the newer object"
    await work.fail("Test", "as it began")
    assert work.phase is Phase.FAILED
    assert may_retry(work.worker)

    began = work.now
    assert not work.over(began, 3600)
    clock.offset = timedelta(days=1)
    assert not work.over(began, 3600)
    await storage.aclose()
