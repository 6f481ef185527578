"""Which lab instances without a place a pool is to have room for."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import pytest

from controllers.instances.kind import LabInstanceRequest, LabInstanceRequestSpec, Need, WorkerRef
from controllers.instances.phases import Conditions, Reasons
from controllers.pools.kind import LabWorkerPool
from controllers.pools.waiting import labs_for
from equipment.pools import NOW, a_pool
from equipment.pools_scene import INTERVAL, pool_scene
from lrm.model import rfc3339
from lrm.resource import ObjectMeta

UNTIL = NOW + timedelta(minutes=20)
"""When a worker that is begun now serves."""
SOON, LATE = UNTIL - timedelta(minutes=1), UNTIL + timedelta(minutes=1)


def a_request(name: str = "r", **spec: Any) -> LabInstanceRequest:
    document = {"labTemplate": {"topology": "nodes: []"}, "studentEmail": "s@university.edu", "durationMinutes": 60}
    wanted = LabInstanceRequestSpec.model_validate({**document, **spec})
    request = LabInstanceRequest(metadata=ObjectMeta(name=name, uid=name, creation_timestamp=NOW), spec=wanted)
    request.status.phase = "Pending"
    return request


def pool(name: str = "p", **spec: Any) -> LabWorkerPool:
    made = a_pool(policy="LabCountBased", **spec)
    made.metadata.name = made.metadata.uid = name
    return made


def waits_for(request: LabInstanceRequest, reason: str) -> LabInstanceRequest:
    request.status.set_condition(Conditions.WORKER_ASSIGNED, False, reason, "so it is", now=NOW)
    return request


def with_status(request: LabInstanceRequest, **status: Any) -> LabInstanceRequest:
    for name, value in status.items():
        setattr(request.status, name, value)
    return request


@dataclass
class Case:
    why: str
    request: LabInstanceRequest
    expected: int
    pool: dict[str, Any] = field(default_factory=dict)


PLACED = WorkerRef(kind="LabWorker", namespace="default", name="w")
CASES = [
    Case("it takes any track", a_request(), 1),
    Case("it is of the pool's track", a_request(labTrack="ccna"), 1),
    Case("it is of another track", a_request(labTrack="ccnp"), 0),
    Case("it names the pool", a_request(pool="p"), 1),
    Case("it names another pool", a_request(pool="q"), 0),
    Case("a container needs no worker", a_request(labTemplate={"image": "alpine"}), 0),
    Case("it takes two slots", with_status(a_request(), need=Need(slots=2)), 2),
    Case("it is due before a worker would be ready", a_request(scheduledStartTime=rfc3339(SOON)), 1),
    Case("it is due later", a_request(scheduledStartTime=rfc3339(LATE)), 0),
    Case("it backs off for less", with_status(a_request(), retry_at=SOON), 1),
    Case("it backs off for longer", with_status(a_request(), retry_at=LATE), 0),
    Case("its time is over before that", with_status(a_request(), started_at=NOW - timedelta(minutes=50)), 0),
    Case("it has a place", with_status(a_request(), worker_ref=PLACED), 0),
    Case("it is to be stopped", a_request(desiredPhase="Stopped"), 0),
    Case("all are full", waits_for(a_request(), Reasons.NO_CAPACITY_AVAILABLE), 1),
    Case("no worker serves", waits_for(a_request(), Reasons.NO_WORKERS_AVAILABLE), 1),
    Case("the pool has no worker yet", waits_for(a_request(pool="p"), Reasons.NO_MATCHING_POOL), 1),
    Case("a quota holds it", waits_for(a_request(), Reasons.QUOTA_EXCEEDED), 0),
    Case("no worker is large enough", waits_for(a_request(), Reasons.TOO_LARGE), 0),
    Case("a licence is missing", waits_for(a_request(), Reasons.WORKER_NOT_LICENSED), 0),
    Case("the pool does not heed load", a_request(), 0, {"policy": "Scheduled"}),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.why)
def test_what_waits_for_a_pool(case: Case) -> None:
    mine = pool()
    mine.spec.policy = case.pool.get("policy", mine.spec.policy)
    assert labs_for(mine, [mine], [case.request], UNTIL) == case.expected


def test_a_request_of_another_namespace_wants_only_workers_that_are_shared() -> None:
    request, own, shared = a_request(), pool(), pool("shared")
    request.metadata.namespace = "other"
    shared.spec.template.spec.shared = True
    assert labs_for(own, [own, shared], [request], UNTIL) == 0
    assert labs_for(shared, [own, shared], [request], UNTIL) == 1


def test_what_two_pools_could_take_counts_for_the_first_that_can_grow() -> None:
    a, b = pool("a", maxWorkers=2), pool("b", maxWorkers=2)
    requests = [a_request(f"r{n}") for n in range(3)]

    def counted() -> tuple[int, int]:
        return labs_for(a, [b, a], requests, UNTIL), labs_for(b, [b, a], requests, UNTIL)

    assert counted() == (3, 0)
    a.status.replicas = 2
    assert counted() == (0, 3)
    a.status.paused_replicas = 1
    assert counted() == (3, 0), "one of it can be woken"
    a.status.paused_replicas, b.status.replicas = 0, 2
    assert counted() == (3, 0), "neither can: it is told of once"


async def test_a_pool_grows_for_students_who_wait_and_ahead_of_those_with_a_time() -> None:
    async with pool_scene() as scene:
        cooldowns = {"upMinutes": 0, "downMinutes": 0}
        await scene.make(policy="LabCountBased", minWorkers=0, maxWorkers=3, cooldowns=cooldowns)
        await scene.fleet()
        assert await scene.workers() == []
        start = scene.clock.now() + timedelta(hours=1)
        await scene.want("later", scheduledStartTime=rfc3339(start))
        await scene.clock.advance(INTERVAL * 4)
        assert await scene.workers() == [], "it is early"
        await scene.clock.advance(39 * 60)
        assert len(await scene.workers()) == 1, "so long as a first start is taken to be before its time"
        decided = (await scene.pool()).status.last_decision
        assert decided is not None
        assert (decided.reason, scene.clock.now() < start) == ("WaitingLabs", True)
        (worker,) = await scene.workers()
        await scene.fleet()
        await scene.measure(cpu=0, memory=0, labs=0)
        await scene.clock.advance(INTERVAL * 2)
        pool = await scene.pool()
        assert pool.status.seconds_to_ready is not None
        assert scene.clock.now() + timedelta(seconds=pool.status.seconds_to_ready) < start, "it was quick"
        (same,) = await scene.workers()
        assert (same.uid, same.deleting) == (worker.uid, False), "it has room for the one who comes, and stays for him"
        await scene.client.delete(await scene.client.get(LabInstanceRequest, "default", "later"))
        await scene.clock.advance(INTERVAL * 2)
        assert all(w.deleting for w in await scene.workers()), "nobody comes any more"
