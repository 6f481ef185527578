"""Existing instances become workers: by id, AMI and tag, many at once, and none of them twice."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest

from controllers.aws.simulator import DEMO_AMI
from controllers.imports.kind import LabWorkerImport, LabWorkerImportSpec
from controllers.workers.kind import LabWorker
from equipment.waiting import until
from equipment.workers_world import (
    PASSWORD_ENV,
    REGION,
    WorkersWorld,
    claims,
    someone_elses,
    tags_of,
    unreadable,
    workers_world,
)
from lrm.resource import RECONCILE_ANNOTATION, ObjectMeta

TEMPLATE = {"spec": {"labTrack": "ccna", "cml": {"passwordFrom": {"env": PASSWORD_ENV}}}}


@pytest.fixture
async def world(monkeypatch: pytest.MonkeyPatch, moto_url: str) -> AsyncIterator[WorkersWorld]:
    async with workers_world(monkeypatch, moto_url) as made:
        yield made


async def post(world: WorkersWorld, name: str = "old", **spec: Any) -> LabWorkerImport:
    """An import as a user would make it."""
    document = {"region": REGION, "template": TEMPLATE, **spec}
    return await world.client.create(
        LabWorkerImport(metadata=ObjectMeta(name=name), spec=LabWorkerImportSpec.model_validate(document))
    )


async def ended(world: WorkersWorld, name: str = "old", wish: str | None = None) -> LabWorkerImport:
    """The import once it was carried out, or given up, for this value of the annotation."""
    seen: list[LabWorkerImport] = []

    async def over() -> bool:
        seen[:] = [await world.client.get(LabWorkerImport, "default", name)]
        return seen[0].status.phase in ("Done", "Failed") and seen[0].status.asked == wish

    await until(over, f"the end of import {name}")
    return seen[0]


async def several(world: WorkersWorld, count: int, **tags: str) -> list[str]:
    return [await someone_elses(world, f"token-{number}", **tags) for number in range(count)]


def name_of(instance_id: str, prefix: str = "old") -> str:
    return f"{prefix}-{instance_id.removeprefix('i-')}"


async def test_instances_with_a_tag_become_workers_that_serve_and_leave_them_as_they_were(world: WorkersWorld) -> None:
    ids = await several(world, 2, track="ccna")
    await someone_elses(world, "another", track="ccnp")
    await post(world, tags={"track": "ccna"}, namePrefix="lab")
    done = await ended(world)
    assert (done.status.phase, done.status.found, done.status.planned) == ("Done", 2, [])
    assert {(one.instance_id, one.worker) for one in done.status.imported} == {(i, name_of(i, "lab")) for i in ids}
    for instance_id in ids:
        worker = await world.phase("ReadyUnlicensed", name=name_of(instance_id, "lab"))
        assert worker.status.ec2.instance_id == instance_id
        assert worker.spec.lab_track == "ccna"
        assert not worker.metadata.owner_references
    await world.client.delete(done)
    for instance_id in ids:
        await world.delete(name_of(instance_id, "lab"))
        await world.gone(name_of(instance_id, "lab"))
    assert set(ids) <= set(world.live())
    assert all(tags_of(world, i) == {"track": "ccna"} for i in ids)
    assert await claims(world) == {}


async def test_instances_of_an_ami_are_found_and_those_with_a_worker_are_left_alone(world: WorkersWorld) -> None:
    free = await someone_elses(world)
    own = (await world.serving()).status.ec2.instance_id
    await post(world, amiId=DEMO_AMI)
    done = await ended(world)
    assert [one.instance_id for one in done.status.imported] == [free]
    assert [(one.instance_id, one.reason) for one in done.status.skipped] == [(own, "HasWorker: default/w1")]
    condition = done.status.condition("Ready")
    assert condition is not None
    assert (condition.status, "1 of 2 instances" in condition.message) == ("True", True)


async def test_a_repeat_is_asked_for_by_annotation_and_makes_what_is_new(world: WorkersWorld) -> None:
    first = await someone_elses(world, track="ccna")
    await post(world, tags={"track": "ccna"})
    await ended(world)
    second = await someone_elses(world, "second", track="ccna")
    async with world.counting() as writes:
        await world.looked_again(3)
    assert "labworkerimports MODIFIED" not in writes, "an import that was carried out is left alone"

    def ask(of: LabWorkerImport) -> None:
        of.metadata.annotations[RECONCILE_ANNOTATION] = "1"

    await world.client.update(await ended(world), ask)
    again = await ended(world, wish="1")
    assert {one.instance_id for one in again.status.imported} == {first, second}
    assert {w.name for w in await world.client.list(LabWorker)} == {name_of(first), name_of(second)}


async def test_two_imports_at_once_make_one_worker_for_each_instance(world: WorkersWorld) -> None:
    ids = await several(world, 3, track="ccna")
    await asyncio.gather(
        post(world, "by-tag", tags={"track": "ccna"}),
        post(world, "by-id", instanceIds=ids),
        post(world, "by-ami", amiId=DEMO_AMI),
    )
    done = [await ended(world, name) for name in ("by-tag", "by-id", "by-ami")]
    workers = await world.client.list(LabWorker)
    assert sorted(w.spec.aws.instance_id or "" for w in workers) == sorted(ids)
    assert sum(len(one.status.imported) for one in done) == 3
    assert {s.reason.partition(":")[0] for one in done for s in one.status.skipped} == {"HasWorker"}
    for worker in workers:
        await world.phase("ReadyUnlicensed", name=worker.name)
    assert await claims(world) == {w.spec.aws.instance_id: w.uid for w in workers}


async def test_an_import_that_ec2_holds_up_says_why_and_goes_on_when_it_can(world: WorkersWorld) -> None:
    instance_id = await someone_elses(world)
    struck = world.aws_fault("DescribeInstances", "auth", times=0)
    await post(world, instanceIds=[instance_id])

    async def told() -> bool:
        seen = (await world.client.get(LabWorkerImport, "default", "old")).status.condition("Ready")
        return seen is not None and seen.reason == "AWSAuthFailed"

    await until(told, "the reason")
    world.shim.faults.remove(struck.id)
    assert (await ended(world)).status.imported[0].instance_id == instance_id


async def test_nothing_is_imported_while_a_worker_cannot_be_read(world: WorkersWorld) -> None:
    own = (await world.serving()).status.ec2.instance_id
    async with unreadable(world, "w1"):
        await post(world, amiId=DEMO_AMI)

        async def told() -> bool:
            seen = (await world.client.get(LabWorkerImport, "default", "old")).status.condition("Ready")
            return seen is not None and (seen.status, seen.reason) == ("False", "UndecodableWorker")

        await until(told, "the reason")
        assert await world.client.list(LabWorker) == []
    done = await ended(world)
    assert [(one.instance_id, one.reason) for one in done.status.skipped] == [(own, "HasWorker: default/w1")]
    assert [w.name for w in await world.client.list(LabWorker)] == ["w1"]


async def test_the_claims_are_read_in_pages_however_many_instances_are_found(
    world: WorkersWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = await several(world, 4, track="ccna")
    for number, instance_id in enumerate(ids[:2]):
        await world.adopt(f"w{number}", instance_id)
        await world.phase("ReadyUnlicensed", name=f"w{number}")
    read: list[str] = []
    get, listed = world.storage.get, world.storage.list

    async def count_get(key: str, **how: Any) -> Any:
        read.append(key)
        return await get(key, **how)

    async def count_list(prefix: str, **how: Any) -> Any:
        read.append(prefix)
        return await listed(prefix, **how)

    monkeypatch.setattr(world.storage, "get", count_get)
    monkeypatch.setattr(world.storage, "list", count_list)
    await post(world, tags={"track": "ccna"}, limit=1)
    done = await ended(world)
    assert {s.reason.partition(":")[0] for s in done.status.skipped} == {"HasWorker", "LimitReached"}
    assert len(done.status.imported) == 1
    new = done.status.imported[0].instance_id
    claimed = [key for key in read if "/claim/ec2/" in key and not key.endswith(new)]
    assert len(claimed) == 1, claimed


async def test_what_ec2_does_not_know_is_told(world: WorkersWorld) -> None:
    unknown = "i-0123456789abcdef0"
    await post(world, instanceIds=[unknown])
    done = await ended(world)
    assert (done.status.phase, done.status.found) == ("Done", 0)
    assert [(s.instance_id, s.reason) for s in done.status.skipped] == [(unknown, "NotFound")]


async def test_imported_workers_can_be_observed_only(world: WorkersWorld) -> None:
    instance_id = await someone_elses(world, owner="alice")
    template = {"spec": {**TEMPLATE["spec"], "observeOnly": True}}
    await post(world, instanceIds=[instance_id], template=template)
    await ended(world)
    await world.phase("ReadyUnlicensed", name=name_of(instance_id))
    assert tags_of(world, instance_id) == {"owner": "alice"}
