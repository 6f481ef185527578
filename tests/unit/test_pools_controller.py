"""A pool brought to its size, whatever dies on the way: intent before effect, and nothing doubled or left behind."""

from __future__ import annotations

import asyncio
import json
import re
from collections import Counter
from datetime import timedelta

import pytest

from controllers.pools.conditions import SCALING_LIMITED
from controllers.pools.controller import CRASH_POINTS
from controllers.pools.demand import ObservedDemand
from controllers.pools.kind import LAB_WORKER_POOL, POOL_FINALIZER, POOL_LABEL, LabWorkerPool
from controllers.workers.kind import DRAIN_ANNOTATION, LAB_WORKER, WAKE_ANNOTATION, LabWorker
from controllers.workers.status import Allocation, Utilization
from equipment.pools import TEMPLATE
from equipment.pools_scene import INTERVAL, PoolScene, dying_at, pool_scene
from lrm.resource import PROTECT_ANNOTATION

NIGHT = {"start": "22:00", "end": "06:00", "workers": 2}


def limit(pool: LabWorkerPool) -> tuple[str, str]:
    found = pool.status.condition(SCALING_LIMITED)
    return (found.status, found.reason) if found else ("", "")


def decisions(pool: LabWorkerPool) -> list[tuple[str, str, int, int]]:
    return [(d.direction, d.reason, d.source, d.to) for d in pool.status.scaling_history]


async def test_a_pool_is_filled_with_workers_of_its_own_whose_names_were_written_first() -> None:
    async with pool_scene() as scene:
        await scene.make(minWorkers=3)
        await scene.clock.settle()
        pool = await scene.pool()
        made = await scene.workers()
        assert len(made) == 3
        assert pool.metadata.finalizers == [POOL_FINALIZER]
        for worker in made:
            assert re.fullmatch(r"p-[a-z0-9]{10}", worker.name)
            assert worker.metadata.labels == {POOL_LABEL: "p"}
            assert worker.metadata.annotations[DRAIN_ANNOTATION] == "true"
            assert [o.uid for o in worker.metadata.owner_references] == [pool.uid]
        planned: set[str] = set()
        for change in scene.changes:
            resource = change.item.resource
            if isinstance(resource, LabWorkerPool):
                planned |= set(resource.status.planned_names)
            elif isinstance(resource, LabWorker) and change.type == "ADDED":
                assert resource.name in planned, "made before it was planned"
        assert (pool.status.planned_names, pool.status.removing) == ([], [])
        assert decisions(pool) == [("Up", "BelowWished", 0, 3)]
        assert pool.status.last_decision is not None
        assert sorted(pool.status.last_decision.created) == [w.name for w in made]
        assert pool.status.phase == "Scaling"
        await scene.fleet()
        pool = await scene.pool()
        assert (pool.status.phase, pool.status.replicas, pool.status.ready_replicas) == ("Ready", 3, 3)
        assert limit(pool) == ("False", "NotLimited")


async def test_a_decision_about_many_tells_of_some_and_does_all() -> None:
    async with pool_scene() as scene:
        await scene.make(minWorkers=0, maxWorkers=60)
        await scene.clock.settle()
        await scene.change(replicas=60)
        await scene.fleet(rounds=4)
        assert len(await scene.workers()) == 60
        decided = (await scene.pool()).status.last_decision
        assert decided is not None
        assert (decided.to, len(decided.created)) == (60, 20)


async def test_a_pool_at_rest_is_not_written() -> None:
    async with pool_scene() as scene:
        await scene.make(minWorkers=2, policy="Hybrid")
        await scene.fleet(rounds=10)
        before = len(scene.changes)
        await scene.clock.advance(3600)
        assert scene.changes[before:] == []


async def test_what_is_measured_of_a_worker_does_not_wake_its_pool_and_what_becomes_of_it_does() -> None:
    async with pool_scene() as scene:
        await scene.make(minWorkers=1)
        await scene.fleet()
        metrics = scene.client.bind(owner="metrics", fence=None)
        runner = scene.runner
        assert runner is not None
        looks = runner.stats.reconciles
        for percent in range(5):
            [worker] = await scene.workers()
            used = Utilization(cpu_percent=percent * 10.0)
            await metrics.update_status(worker, lambda w, used=used: setattr(w.status, "utilization", used))
            await scene.clock.settle()
        assert runner.stats.reconciles == looks
        await scene.phase((await scene.workers())[0], "Active")
        await scene.clock.settle()
        assert runner.stats.reconciles > looks


async def test_a_zone_that_this_machine_lacks_is_told_and_the_pool_can_still_end() -> None:
    async with pool_scene(leading=False) as scene:
        pool = (await scene.make(minWorkers=1, policy="Scheduled", schedule=[NIGHT])).thaw()
        pool.spec.time_zone = "Nowhere/At-All"  # as another machine's data had it
        key = scene.registry.key_of(pool)
        await scene.storage.update(key, LAB_WORKER_POOL.encode(pool), expected_revision=pool.revision)
        await scene.lead()
        await scene.fleet()
        assert limit(await scene.pool()) == ("True", "UnknownTimeZone")
        await scene.client.delete(await scene.pool())
        await scene.fleet()
        assert await scene.gone()


@pytest.mark.parametrize("policy", ["Scheduled", "Hybrid"])
async def test_workers_begun_for_a_window_stay_for_it_however_quick_they_were(policy: str) -> None:
    async with pool_scene() as scene:
        now = scene.clock.now()
        start, end = ((now + timedelta(minutes=m)).strftime("%H:%M") for m in (19, 199))
        cooldowns = {"upMinutes": 0, "downMinutes": 0}
        schedule = [{"start": start, "end": end, "workers": 4}]
        await scene.make(minWorkers=0, policy=policy, schedule=schedule, cooldowns=cooldowns)
        for _ in range(30):
            await scene.fleet(seconds=30, rounds=2)
            await scene.measure(cpu=1, memory=1, labs=0)
        pool = await scene.pool()
        assert pool.status.seconds_to_ready is not None
        assert pool.status.seconds_to_ready < 300, "they were quick"
        assert decisions(pool) == [("Up", "Schedule", 0, 4)]


async def test_scaled_down_the_emptiest_go_drained_and_none_with_labs() -> None:
    async with pool_scene() as scene:
        await scene.make(minWorkers=1, replicas=4)
        await scene.fleet()
        busy, *others = await scene.workers()
        await scene.place(busy, 2)
        await scene.annotate(others[0], DRAIN_ANNOTATION, "false")  # somebody took it off
        await scene.change(replicas=1)
        await scene.clock.settle()
        doomed = [w for w in await scene.workers() if w.deleting]
        assert {w.name for w in doomed} == {w.name for w in others}
        assert {w.metadata.annotations[DRAIN_ANNOTATION] for w in doomed} == {"true"}
        await scene.fleet()
        assert [w.name for w in await scene.workers()] == [busy.name]
        pool = await scene.pool()
        assert decisions(pool)[-1] == ("Down", "AboveWished", 4, 1)
        assert pool.status.last_scale_down_at is not None
        assert pool.status.phase == "Ready"


async def test_a_pool_too_large_waits_for_labs_to_end_and_says_so() -> None:
    async with pool_scene() as scene:
        await scene.make(minWorkers=0, replicas=2)
        await scene.fleet()
        for worker in await scene.workers():
            await scene.place(worker, 1)
        await scene.change(replicas=0)
        await scene.fleet()
        assert len(await scene.workers()) == 2
        assert limit(await scene.pool()) == ("True", "WorkersHostLabs")
        await scene.empty()
        await scene.clock.advance(INTERVAL + 1)  # the labs' end reaches a pool through its workers, or by then
        await scene.fleet()
        assert await scene.workers() == []
        assert limit(await scene.pool()) == ("False", "NotLimited")


@pytest.mark.parametrize("trouble", ["never listed", "the list fails"])
@pytest.mark.parametrize("policy", ["None", "CapacityBased"])
async def test_a_worker_whose_labs_are_unknown_is_not_given_up(policy: str, trouble: str) -> None:
    async with pool_scene(listing=trouble != "never listed") as scene:
        await scene.make(minWorkers=1, replicas=2, policy=policy)
        await scene.fleet()
        await scene.measure(cpu=1, memory=1, labs=0)
        if scene.listing:
            for worker in await scene.workers():
                await scene.list_labs(worker, error="Unreachable")
        await scene.change(replicas=None)
        await scene.clock.advance(3600)
        one, other = await scene.workers()
        assert [one.deleting, other.deleting] == [False, False]
        await scene.list_labs(one)
        await scene.clock.advance(3600)
        assert [w.name for w in await scene.workers() if w.deleting] == [one.name], "its labs are known: none"


async def test_a_failed_worker_is_replaced_and_then_removed() -> None:
    async with pool_scene() as scene:
        await scene.make(minWorkers=2)
        await scene.fleet()
        failed, kept = await scene.workers()
        before = len(scene.changes)
        await scene.phase(failed, "Failed")
        await scene.clock.settle()
        told = [(c.type, c.item.name) for c in scene.changes[before:] if c.kind.plural == "labworkers"]
        created = next(i for i, (kind, _) in enumerate(told) if kind == "ADDED")
        assert [name for kind, name in told[created + 1 :]] == [failed.name], "removed after its successor was made"
        await scene.fleet()
        names = {w.name for w in await scene.workers()}
        assert kept.name in names
        assert failed.name not in names
        assert len(names) == 2
        assert decisions(await scene.pool())[-1] == ("Replace", "WorkerFailed", 1, 2)


async def test_in_a_full_pool_the_failed_one_makes_room_first() -> None:
    async with pool_scene() as scene:
        await scene.make(minWorkers=2, maxWorkers=2)
        await scene.fleet()
        failed, _ = await scene.workers()
        await scene.phase(failed, "Failed")
        await scene.fleet()
        living: set[str] = set()
        for change in scene.changes:
            if change.kind.plural == "labworkers":
                resource = change.item.resource
                alive = change.type != "DELETED" and resource is not None and not resource.deleting
                (living.add if alive else living.discard)(change.item.name)
            assert len(living) <= 2
        assert len(await scene.workers()) == 2
        assert (await scene.pool()).status.phase == "Ready"


async def test_what_always_fails_is_replaced_three_times_an_hour() -> None:
    async with pool_scene() as scene:
        await scene.make(minWorkers=1)
        for _ in range(10):
            for worker in await scene.workers():
                if worker.status.phase != "Failed" and not worker.deleting:
                    await scene.phase(worker, "Failed")
            await scene.fleet(seconds=60, rounds=2)
        pool = await scene.pool()
        assert [d[0] for d in decisions(pool)] == ["Up", "Replace", "Replace", "Replace"]
        assert limit(pool) == ("True", "ReplacementLimit")
        assert (pool.status.phase, pool.status.failed_replicas) == ("Degraded", 1)
        await scene.clock.advance(3600)
        await scene.fleet()
        assert (await scene.pool()).status.phase == "Ready", "an hour later it is tried again"


async def test_a_new_template_is_for_new_workers_and_the_status_counts_the_others() -> None:
    async with pool_scene() as scene:
        await scene.make(minWorkers=2)
        await scene.fleet()
        old = await scene.workers()

        def retype(pool: LabWorkerPool) -> None:
            pool.spec.template.spec.aws.instance_type = "c5.metal"

        await scene.client.update(await scene.pool(), retype)
        await scene.fleet()
        assert [w.uid for w in await scene.workers()] == [w.uid for w in old]
        assert (await scene.pool()).status.outdated_replicas == 2
        await scene.change(replicas=3)
        await scene.fleet()
        types = Counter(w.spec.aws.instance_type for w in await scene.workers())
        assert types == {"m5zn.metal": 2, "c5.metal": 1}
        assert (await scene.pool()).status.outdated_replicas == 2


# Deletion


async def test_a_deleted_pool_drains_its_workers_and_goes_last() -> None:
    async with pool_scene() as scene:
        await scene.make(minWorkers=2)
        await scene.fleet()
        busy, other = await scene.workers()
        await scene.place(busy, 1)
        await scene.client.bind(owner="instances", fence=None).update_status(
            busy, lambda w: w.status.allocations.update({"x": Allocation()})
        )
        await scene.client.delete(await scene.pool())
        await scene.fleet()
        [left] = await scene.workers()
        assert (left.name, left.deleting) == (busy.name, True)
        assert left.metadata.annotations[DRAIN_ANNOTATION] == "true"
        pool = await scene.pool()
        assert (pool.deleting, pool.status.phase, pool.status.leaving_replicas) == (True, "Deleting", 1)
        await scene.client.bind(owner="instances", fence=None).update_status(
            left, lambda w: w.status.allocations.clear()
        )
        await scene.fleet()
        assert await scene.gone()
        deleted = [c.item.name for c in scene.changes if c.type == "DELETED"]
        assert deleted == [other.name, busy.name, "p"]


async def test_a_pool_that_is_told_so_does_not_drain_even_while_it_is_draining() -> None:
    async with pool_scene() as scene:
        await scene.make(minWorkers=1)
        await scene.fleet()
        await scene.client.delete(await scene.pool())
        await scene.clock.settle()
        assert [w.metadata.annotations[DRAIN_ANNOTATION] for w in await scene.workers()] == ["true"]
        await scene.annotate(await scene.pool(), DRAIN_ANNOTATION, "false")
        await scene.clock.settle()
        assert [w.metadata.annotations[DRAIN_ANNOTATION] for w in await scene.workers()] == ["false"]


async def test_a_pool_deleted_in_the_midst_of_growth_leaves_nothing() -> None:
    async with pool_scene() as scene:
        await scene.make(minWorkers=5)
        await scene.client.delete(await scene.pool())
        await scene.fleet()
        assert await scene.gone()
        assert await scene.workers() == []


async def test_a_protected_worker_holds_its_pool() -> None:
    async with pool_scene() as scene:
        await scene.make(minWorkers=1)
        await scene.fleet()
        [worker] = await scene.workers()
        await scene.annotate(worker, PROTECT_ANNOTATION, "true")
        await scene.client.delete(await scene.pool())
        await scene.fleet()
        assert not await scene.gone()
        assert limit(await scene.pool()) == ("True", "WorkersProtected")
        await scene.annotate((await scene.workers())[0], PROTECT_ANNOTATION, "false")
        await scene.fleet()
        assert await scene.gone()


async def test_orphaned_workers_stay() -> None:
    async with pool_scene() as scene:
        await scene.make(minWorkers=2)
        await scene.fleet()
        await scene.client.delete(await scene.pool(), propagation="Orphan")
        await scene.fleet()
        assert [w.deleting for w in await scene.workers()] == [False, False]
        assert (await scene.pool()).metadata.finalizers == ["orphan"], "the collector does the rest"


# What is decided is held against the present


async def test_a_name_that_a_stranger_has_is_left_alone_and_another_is_taken() -> None:
    suffixes = iter(["taken", "free"])
    async with pool_scene(suffix=lambda: next(suffixes)) as scene:
        pool = await scene.make(minWorkers=0)
        stranger = LabWorker.model_validate(
            {"metadata": {"name": "p-taken"}, "spec": pool.spec.template.spec.model_dump(by_alias=True)}
        )
        await scene.client.create(stranger)
        await scene.clock.settle()
        await scene.change(replicas=1)
        await scene.clock.settle()
        owned = {w.name: [o.name for o in w.metadata.owner_references] for w in await scene.workers()}
        assert owned == {"p-taken": [], "p-free": ["p"]}


async def test_a_worker_that_came_to_host_labs_before_it_was_removed_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    async with pool_scene() as scene:
        await scene.make(minWorkers=1, replicas=2)
        await scene.fleet()
        dying_at(monkeypatch, "pools.decided")
        await scene.change(replicas=1)
        await scene.clock.settle()
        assert scene.dead
        doomed = (await scene.pool()).status.removing
        for worker in await scene.workers():
            if worker.name in doomed:
                await scene.place(worker, 1)
        await scene.stop()
        await scene.lead()
        await scene.fleet()
        [left] = await scene.workers()
        assert left.name in doomed, "the other one went in its place"


async def test_a_maximum_lowered_before_names_became_workers_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    async with pool_scene() as scene:
        dying_at(monkeypatch, "pools.decided")
        await scene.make(minWorkers=1, replicas=5)
        await scene.clock.settle()
        assert scene.dead
        await scene.stop()
        await scene.change(replicas=2, max_workers=2)
        await scene.lead()
        await scene.fleet()
        assert sum(c.type == "ADDED" and c.kind.plural == "labworkers" for c in scene.changes) == 2
        assert len(await scene.workers()) == 2


@pytest.mark.parametrize("between", ["another spec", "two minutes", "observe-only"])
async def test_a_removal_that_a_dead_leader_left_is_dropped_when_it_may_not_be_wished_any_more(
    between: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with pool_scene() as scene:
        await scene.make(minWorkers=0, replicas=3)
        await scene.fleet()
        before = [w.uid for w in await scene.workers()]
        dying_at(monkeypatch, "pools.decided")
        await scene.change(replicas=1)
        await scene.clock.settle()
        assert scene.dead
        await scene.stop()
        if between == "another spec":
            await scene.change(replicas=3)
        scene.observe_only = between == "observe-only"
        await scene.clock.advance(120 if between == "two minutes" else 1)
        await scene.lead()
        await scene.fleet()
        pool = await scene.pool()
        assert (pool.status.planned_names, pool.status.removing) == ([], [])
        if between == "two minutes":
            assert decisions(pool) == [("Up", "BelowWished", 0, 3), *[("Down", "AboveWished", 3, 1)] * 2], "anew"
        else:
            assert [w.uid for w in await scene.workers()] == before


async def test_names_that_were_planned_for_another_spec_are_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    async with pool_scene() as scene:
        await scene.make(minWorkers=0)
        await scene.clock.settle()
        dying_at(monkeypatch, "pools.created", 2)
        await scene.change(replicas=5)
        await scene.clock.settle()
        assert scene.dead
        await scene.stop()
        await scene.change(replicas=2)
        await scene.lead()
        await scene.fleet()
        assert sum(c.type == "ADDED" and c.kind is LAB_WORKER for c in scene.changes) == 2
        assert (await scene.pool()).status.planned_names == []


async def test_nothing_is_made_while_only_observing() -> None:
    async with pool_scene(observe_only=True) as scene:
        await scene.make(minWorkers=2)
        await scene.fleet()
        assert await scene.workers() == []
        pool = await scene.pool()
        assert limit(pool) == ("True", "ObserveOnly")
        assert decisions(pool) == []


async def test_a_clock_that_was_set_holds_decisions_back() -> None:
    async with pool_scene() as scene:
        await scene.make(minWorkers=1, policy="Hybrid")
        await scene.fleet()
        scene.clock.jump_wall(7 * 3600)
        await scene.change(replicas=2)
        await scene.fleet()
        assert len(await scene.workers()) == 1
        assert limit(await scene.pool()) == ("True", "ClockJumped")
        await scene.clock.advance(90)
        assert len(await scene.workers()) == 2


async def test_a_template_whose_workers_are_refused_is_told_and_the_next_spec_is_heard() -> None:
    async with pool_scene(leading=False) as scene:
        pool = (await scene.make(minWorkers=2)).thaw()
        pool.spec.template.metadata.annotations["lab.neuroglia.io/snooze-until"] = "tomorrow"  # as an older rule let it
        await scene.storage.update(
            scene.registry.key_of(pool), LAB_WORKER_POOL.encode(pool), expected_revision=pool.revision
        )
        await scene.lead()
        await scene.fleet()
        await scene.clock.advance(500)
        pool = await scene.pool()
        assert (limit(pool), pool.status.planned_names) == (("True", "WorkerRefused"), [])
        assert len(decisions(pool)) == 1, "it is not tried all the time"
        await scene.clock.advance(300)
        assert len(decisions(await scene.pool())) == 2, "but again"
        await scene.change(min_workers=0)
        await scene.clock.advance(1)
        assert limit(await scene.pool()) == ("False", "NotLimited")

        def mend(pool: LabWorkerPool) -> None:
            pool.spec.min_workers = 2
            pool.spec.template.metadata.annotations.clear()

        await scene.client.update(await scene.pool(), mend)
        await scene.fleet()
        assert len(await scene.workers()) == 2


async def rewrite(scene: PoolScene, name: str, desired_phase: str) -> None:
    """Another version has written a worker."""
    key = scene.registry.kind_prefix(LAB_WORKER, "default") + name
    entry = await scene.storage.get(key)
    assert entry is not None
    document = json.loads(entry.value)
    document["spec"]["desiredPhase"] = desired_phase
    await scene.storage.update(key, json.dumps(document).encode(), expected_revision=entry.revision)


async def test_while_a_worker_cannot_be_read_none_is_launched_in_its_place_and_no_pool_goes() -> None:
    async with pool_scene() as scene:
        await scene.make(minWorkers=2)
        await scene.fleet()
        one, other = await scene.workers()
        for worker in (one, other):
            await rewrite(scene, worker.name, "Hibernated")
        await scene.clock.advance(2 * INTERVAL)
        assert sum(c.type == "ADDED" and c.kind is LAB_WORKER for c in scene.changes) == 2
        assert limit(await scene.pool()) == ("True", "UndecodableWorker")
        await rewrite(scene, one.name, "Ready")
        await scene.client.delete(await scene.pool())
        await scene.fleet()
        assert not await scene.gone(), "the other one may be its own"
        assert limit(await scene.pool()) == ("True", "UndecodableWorker")
        await rewrite(scene, other.name, "Ready")
        await scene.fleet()
        assert await scene.gone()
        assert await scene.workers() == []


# Whoever dies, and whatever reply is lost


async def story(scene: PoolScene) -> None:
    """Up to three, one fails, down to one, and the end: every kind of write is made."""
    for spec in ({"replicas": 3}, None, {"replicas": 1}):
        if spec is None:
            serving = [w for w in await scene.workers() if not w.deleting and w.status.phase != "Failed"]
            if serving:
                await scene.phase(serving[0], "Failed")
        else:
            await scene.change(**spec)
        await live(scene)
    await scene.client.delete(await scene.pool())
    await live(scene)


async def live(scene: PoolScene) -> None:
    """Time passes; who has died is followed by another."""
    for _ in range(3):
        await scene.fleet(seconds=5)
        if scene.dead:
            await scene.stop()
            await scene.lead()


def judge(scene: PoolScene) -> None:
    """Nobody can see that something died: so many workers as ever, each name once, and nothing left."""
    workers = [c for c in scene.changes if c.kind.plural == "labworkers"]
    born = Counter(c.item.name for c in workers if c.type == "ADDED")
    assert set(born.values()) == {1}, "a name was given twice"
    assert len(born) == 4, "three, and one in place of the failed one"
    assert {c.item.name for c in workers if c.type == "DELETED"} == set(born)
    assert [c.item.name for c in scene.changes if c.type == "DELETED"][-1] == "p"
    last = max((c for c in scene.changes if c.kind.plural == "labworkerpools"), key=lambda c: c.revision)
    pool = last.item.resource
    assert isinstance(pool, LabWorkerPool)
    assert decisions(pool) == [
        ("Up", "BelowWished", 0, 3),
        ("Replace", "WorkerFailed", 2, 3),
        ("Down", "AboveWished", 3, 1),
    ]


@pytest.mark.parametrize("time", [1, 2])
@pytest.mark.parametrize("point", sorted(set(CRASH_POINTS) - {"pools.woken"}))
async def test_killed_between_any_two_writes_nothing_is_doubled_or_left(
    point: str, time: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with pool_scene() as scene:
        dying_at(monkeypatch, point, time)
        await scene.make(minWorkers=0)
        await scene.clock.settle()
        starts = scene.running
        await story(scene)
        assert scene.running is not starts, "it did not die"
        judge(scene)


@pytest.mark.parametrize("point", [None, "pools.decided", "pools.woken", "pools.carried-out"])
async def test_under_load_one_that_idleness_has_stopped_is_woken_once_whoever_dies(
    point: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with pool_scene() as scene:
        template = {"spec": {**TEMPLATE["spec"], "idleDetection": {"enabled": True}}}
        await scene.make(policy="LabCountBased", replicas=2, template=template)
        await scene.fleet()
        await scene.clock.advance(1800)  # the cooldown is over
        busy, sleeper = await scene.workers()
        await scene.doze(sleeper)
        await scene.clock.settle()
        assert (await scene.pool()).status.paused_replicas == 1
        if point is not None:
            dying_at(monkeypatch, point)
        await scene.place(busy, 20)
        await live(scene)
        assert decisions(await scene.pool()) == [("Up", "BelowWished", 0, 2)], "all is full, and nobody waits"
        await scene.want("late")
        await live(scene)
        woken = {
            c.item.resource.metadata.annotations[WAKE_ANNOTATION]
            for c in scene.changes
            if c.item.resource is not None and WAKE_ANNOTATION in c.item.resource.metadata.annotations
        }
        assert len(woken) == 1, "the word was given once"
        assert len(await scene.workers()) == 2
        pool = await scene.pool()
        assert decisions(pool) == [("Up", "BelowWished", 0, 2), ("Wake", "Labs", 2, 2)]
        assert pool.status.last_decision is not None
        assert pool.status.last_decision.woken == [sleeper.name]
        assert (pool.status.phase, pool.status.waking) == ("Scaling", [])


@pytest.mark.parametrize("lost", range(1, 15))
async def test_a_lost_reply_to_any_write_changes_nothing(lost: int) -> None:
    async with pool_scene() as scene:
        scene.storage.lose = lost
        await scene.make(minWorkers=0)
        await scene.clock.settle()
        await story(scene)
        assert scene.storage.lose == 0, "fewer writes than that were made"
        judge(scene)


async def test_a_leader_that_is_cut_off_creates_nothing_more(monkeypatch: pytest.MonkeyPatch) -> None:
    async with pool_scene() as scene:
        dying_at(monkeypatch, "pools.decided")
        await scene.make(minWorkers=2)
        await scene.clock.settle()
        old, scene.running = scene.running, None
        await scene.lead()
        await scene.fleet()
        assert old is not None
        await asyncio.wait([old])
        assert isinstance(old.exception(), BaseException)
        assert len(await scene.workers()) == 2


# What a worker carries


async def test_the_load_is_what_is_placed_counted_and_measured() -> None:
    async with pool_scene() as scene:
        pool = await scene.make(minWorkers=3)
        await scene.fleet()
        idle, labs, placed = await scene.workers()
        await scene.place(labs, 2)
        await scene.client.bind(owner="instances", fence=None).update_status(
            placed, lambda w: w.status.allocations.update({"x": Allocation()})
        )
        await scene.client.bind(owner="metrics", fence=None).update_status(
            placed, lambda w: setattr(w.status, "utilization", Utilization(cpu_percent=25, memory_percent=None))
        )
        await scene.clock.settle()
        team = scene.cache.all(LabWorker)
        now = scene.clock.now()
        load = ObservedDemand(scene.cache).load(pool, team, now=now, until=now, horizon=now)
        found = [load.of(next(w for w in team if w.name == n.name)) for n in (idle, labs, placed)]
        assert [(w.hosts, w.labs, w.cpu, w.memory, w.free) for w in found] == [
            (False, None, None, None, 20),
            (True, 2, None, None, 18),
            (True, 1, 0.25, None, 19),
        ]
        assert load.waiting == 0
