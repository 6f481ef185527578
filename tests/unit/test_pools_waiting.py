"""Which lab instances without a place a pool is to have room for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import pytest

from controllers.instances.kind import LabInstanceRequest, LabInstanceRequestSpec, Need, WorkerRef
from controllers.instances.phases import Conditions, Reasons
from controllers.pools.conditions import SCALING_LIMITED
from controllers.pools.kind import LabWorkerPool
from controllers.pools.launches import BRAKE, LASTING
from controllers.pools.waiting import labs_for, labs_kept_for, rivals_of
from controllers.workers.kind import LabWorker
from controllers.workers.status import Problem
from equipment.pools import NOW, a_pool, workers
from equipment.pools_scene import INTERVAL, pool_scene
from lrm.model import rfc3339
from lrm.resource import PAUSE_ANNOTATION, ObjectMeta

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


def wanted(
    pools: list[LabWorkerPool], requests: list[LabInstanceRequest], pending: Sequence[LabWorker] = ()
) -> dict[str, int]:
    """By pool, so many slots; `pending` workers are those Pending."""
    rivals = rivals_of(pools, pending, NOW)
    return {p.name: labs_for(p, rivals, requests, UNTIL) for p in pools}


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
    assert wanted([mine], [case.request]) == {"p": case.expected}


def test_a_request_of_another_namespace_wants_only_workers_that_are_shared() -> None:
    request, own, shared = a_request(), pool(), pool("shared")
    request.metadata.namespace = "other"
    shared.spec.template.spec.shared = True
    assert wanted([own, shared], [request]) == {"p": 0, "shared": 1}


@dataclass
class Rivalry:
    why: str
    counts_for: str
    a: dict[str, Any] = field(default_factory=dict)
    """How `a`, which comes first, differs from a pool that can grow."""
    b: dict[str, Any] = field(default_factory=dict)


FULL, ASLEEP = {"replicas": 2}, {"replicas": 2, "paused_replicas": 1}
NIGHT, NOON = ({"scaleUp": {"start": f"{n}:00", "end": f"{n + 2}:00"}} for n in (20, 11))
RIVALRIES = [
    Rivalry("both can grow", "a"),
    Rivalry("one is full", "b", a=FULL),
    Rivalry("one of it can be woken", "a", a=ASLEEP),
    Rivalry("neither can: it is told of once", "a", a=FULL, b=FULL),
    Rivalry("a person has paused it", "b", a={"paused": True}),
    Rivalry("nor does it tell of anything then", "b", a={"paused": True}, b=FULL),
    Rivalry("it is not its hour", "b", a={"hours": NIGHT}),
    Rivalry("it is", "a", a={"hours": NOON}),
    Rivalry("nor is one woken then", "b", a={"hours": NIGHT, **ASLEEP}),
    Rivalry("nobody here knows its hours", "b", a={"hours": NOON, "zone": "Nowhere/At-All"}),
    *(Rivalry(f"one of it is stuck: {r}", "b", a={"stuck": r}) for r in sorted(LASTING - {BRAKE})),
    Rivalry("one of it is stuck and another sleeps", "a", a={"stuck": "UnknownAccount", **ASLEEP}),
    Rivalry("the limit on instances holds all", "a", a={"stuck": BRAKE}),
    Rivalry("but not those who only sleep", "b", a={"stuck": BRAKE}, b=ASLEEP),
]


@pytest.mark.parametrize("case", RIVALRIES, ids=lambda case: case.why)
def test_what_two_pools_could_take_counts_for_the_first_that_can_grow_now(case: Rivalry) -> None:
    pending: list[LabWorker] = []

    def rival(name: str, *, paused: bool = False, hours: Any = None, stuck: str = "", **status: Any) -> LabWorkerPool:
        zone = status.pop("zone", "UTC")
        made = pool(name, maxWorkers=2, allowedHours=hours or {})
        made.spec.time_zone = zone
        made.metadata.annotations[PAUSE_ANNOTATION] = str(paused).lower()
        made.status = made.status.model_copy(update=status)
        for worker in workers(stuck) if stuck else ():
            worker.metadata.owner_references[0].uid = name
            pending.append(worker)
        return made

    pools = [rival("b", **case.b), rival("a", **case.a)]
    requests = [a_request(f"r{n}") for n in range(3)]
    assert wanted(pools, requests, pending) == {"a": 0, "b": 0, case.counts_for: 3}


def test_a_pool_keeps_the_stuck_worker_because_of_which_requests_count_for_another() -> None:
    """Given up, it would be made again as soon as it is gone, and be stuck again."""
    a, b = pool("a", maxWorkers=2), pool("b", maxWorkers=2)
    (stuck,) = workers("UnknownAccount")
    stuck.metadata.owner_references[0].uid = "a"
    rivals = rivals_of([a, b], [stuck], NOW)
    kept = [labs_kept_for(p, rivals, [a_request(), a_request("other", labTrack="ccnp")], UNTIL) for p in (a, b)]
    assert kept == [1, 1]


@pytest.mark.parametrize("trouble", ["paused", "UnknownAccount"])
async def test_a_pool_that_cannot_grow_leaves_the_students_to_another_and_says_why(trouble: str) -> None:
    async with pool_scene() as scene:
        for name in ("a", "b"):
            await scene.make(name, policy="LabCountBased", minWorkers=0, maxWorkers=3)
        await scene.clock.settle()
        if trouble == "paused":
            await scene.annotate(await scene.pool("a"), PAUSE_ANNOTATION, "true")
        await scene.want("r")
        await scene.clock.advance(INTERVAL)
        if trouble != "paused":
            (worker,) = await scene.workers()
            problem = Problem(reason=trouble, message="the settings do not know it", at=scene.clock.now())
            await scene.workers_client.update_status(worker, lambda w: setattr(w.status.ec2, "last_error", problem))
            await scene.clock.advance(INTERVAL)
        await scene.clock.advance(INTERVAL * 4)
        names = [w.metadata.owner_references[0].name for w in await scene.workers() if not w.status.ec2.last_error]
        assert names == ["b"]
        if trouble != "paused":
            limited = (await scene.pool("a")).status.condition(SCALING_LIMITED)
            assert limited is not None
            assert (limited.status, limited.reason) == ("True", trouble)
            assert "the settings do not know it" in limited.message


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
