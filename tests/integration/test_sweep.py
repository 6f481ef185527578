"""The sweep on the simulated EC2: what nobody claims is told of at the second look, and ended only by setting."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from datetime import timedelta
from typing import Any

import orjson
import pytest

from controllers.aws.ec2 import Ec2, Ec2Instance
from controllers.aws.place import Place
from controllers.sweep.settings import SweepSettings
from controllers.sweep.sweep import Sweep
from controllers.workers.claims import SWEEP_CLAIM
from controllers.workers.decisions import INSTALLATION_TAG, RETAIN_TAG, UID_TAG
from controllers.workers.kind import LabWorker
from equipment.waiting import until
from equipment.workers_world import INSTALLATION, WorkersWorld, someone_elses, tags_of, workers_world
from lrm.election import StaticElection, Term
from lrm.telemetry import Telemetry
from storage.errors import NotFound

ORPHAN = {INSTALLATION_TAG: INSTALLATION, UID_TAG: "of-a-worker-that-is-gone"}


@pytest.fixture
async def world(monkeypatch: pytest.MonkeyPatch, moto_url: str) -> AsyncIterator[WorkersWorld]:
    async with workers_world(monkeypatch, moto_url) as made:
        yield made


@asynccontextmanager
async def sweeping(
    world: WorkersWorld,
    *,
    term: Term | None = None,
    youngest: float = 0.01,
    ec2_class: type[Ec2] = Ec2,
    **settings: Any,
) -> AsyncIterator[Sweep]:
    """A sweep at work, every 0.2 s unless told."""
    values = {"sweep_interval": 0.2, **settings}
    async with ec2_class(world.clock, endpoint_url=world.shim.url) as ec2:
        made = Sweep(
            ec2,
            world.storage,
            world.cache,
            world.clock,
            SweepSettings(**values),
            installation=INSTALLATION,
            root=world.registry.root,
            youngest=youngest,
        )
        running = asyncio.create_task(made.run(term or world.term))
        try:
            yield made
        finally:
            running.cancel()
            await asyncio.wait([running])


async def swept(sweep: Sweep, times: int = 3) -> None:
    """Until it has swept some times more."""
    wanted = sweep.describe()["sweeps"] + times
    await until(lambda: sweep.describe()["sweeps"] >= wanted, "more sweeps")


def orphans(sweep: Sweep) -> list[str]:
    return [o["instanceId"] for o in sweep.describe()["orphans"]]


async def test_an_orphan_is_told_of_at_the_second_look_and_ended_only_by_setting(world: WorkersWorld) -> None:
    worker = await world.serving()
    orphan = await someone_elses(world, **ORPHAN)
    telemetry = Telemetry()
    async with sweeping(world, sweep_interval=1) as sweep:
        telemetry.observe(sweep.observe)
        await until(lambda: sweep.describe()["suspects"] == 1, "the first look")
        assert orphans(sweep) == []
        await until(lambda: orphans(sweep) == [orphan], "the second look")
        assert 'lrm_sweep_orphans{account="",region="us-east-1"} 1.0' in telemetry.exposition()[0].decode()
    async with sweeping(world, sweep_terminate=True, observe_only=True) as sweep:
        await swept(sweep)
        assert orphans(sweep) == [orphan], "what was found is not forgotten with its finder"
    assert orphan in world.live()
    refused = world.aws_fault("TerminateInstances", "server-error")
    async with sweeping(world, sweep_terminate=True) as sweep:
        await until(lambda: orphan not in world.live(), "the end of the orphan")
        assert refused.hits == 1, "what EC2 did not take is tried again at the next look"
        await until(lambda: sweep.describe()["orphans"] == [], "nothing left to tell of")
        assert sweep.describe()["ended"] == 1
        await swept(sweep)
    assert world.live() == [worker.status.ec2.instance_id]


async def test_a_launch_in_flight_is_its_workers(world: WorkersWorld) -> None:
    world.aws_fault("RunInstances", "lost-reply")
    world.aws_fault("DescribeInstances", "server-error", times=3)
    async with sweeping(world, sweep_terminate=True, sweep_interval=0.05, youngest=0.001) as sweep:
        await world.create()
        worker = await world.phase("ReadyUnlicensed")
        await swept(sweep)
        assert orphans(sweep) == []
    assert world.live() == [worker.status.ec2.instance_id]
    assert world.shim.calls["RunInstances"] == 1
    assert world.shim.calls["TerminateInstances"] == 0


async def test_what_is_adopted_or_retained_or_young_is_never_ended(world: WorkersWorld) -> None:
    adopted, claimed = await someone_elses(world, "a"), await someone_elses(world, "c", **ORPHAN)
    await world.adopt("w1", adopted)
    await world.phase("ReadyUnlicensed", name="w1")
    retaining = await world.serving("w2", deletionPolicy="Retain")
    retained = retaining.status.ec2.instance_id or ""
    marked = await someone_elses(world, "m", **ORPHAN, **{RETAIN_TAG: "true"})
    await world.storage.create(f"{world.registry.root}/claim/ec2/{claimed}", b"{}")
    async with sweeping(world, sweep_terminate=True, sweep_interval=0.05) as sweep:
        await until(lambda: orphans(sweep) == [marked], "what is kept told of")
        for name in ("w1", "w2"):
            await world.delete(name)
            await world.gone(name)
        await swept(sweep, 5)
        assert orphans(sweep) == [marked]
    async with sweeping(world, sweep_terminate=True, youngest=600) as sweep:
        young = await someone_elses(world, "y", **ORPHAN)
        await swept(sweep)
        assert orphans(sweep) == [], "the marked one is young to this sweep, too"
    assert sorted(world.live()) == sorted([adopted, claimed, retained, marked, young])


async def test_what_was_retained_and_could_not_be_unmarked_is_still_nobodys_orphan(
    monkeypatch: pytest.MonkeyPatch, moto_url: str
) -> None:
    async with workers_world(monkeypatch, moto_url) as world:
        worker, watched = await world.serving("w1"), await world.serving("w2")
        world.shorten(worker_ec2_deadline=1)
        await world.change(lambda w: setattr(w.spec, "deletion_policy", "Retain"), "w1")
        await world.change(lambda w: setattr(w.spec, "deletion_policy", "Retain"), "w2")
        await world.change(lambda w: setattr(w.spec, "observe_only", True), "w2")
        world.aws_fault("DeleteTags", "server-error", times=0)
        kept = sorted([worker.status.ec2.instance_id or "", watched.status.ec2.instance_id or ""])
        async with sweeping(world, sweep_terminate=True) as sweep:
            await swept(sweep, 1)
            for name in ("w1", "w2"):
                await world.delete(name)
                await world.gone(name)
            await swept(sweep, 4)
            assert orphans(sweep) == []
        assert all(tags_of(world, i)[INSTALLATION_TAG] == INSTALLATION for i in kept), "their marks are there"
        assert sorted(world.live()) == kept
        world.shorten(worker_ec2_deadline=60)
        again = {"aws": {"amiId": None, "keyName": None, "instanceId": kept[0]}}
        await world.create("w3", **again)
        await world.phase("ReadyUnlicensed", name="w3")


async def test_what_cannot_be_asked_or_read_proves_nothing(world: WorkersWorld) -> None:
    await world.serving()
    orphan = await someone_elses(world, **ORPHAN)
    async with sweeping(world, sweep_interval=1) as sweep:
        await until(lambda: sweep.describe()["suspects"] == 1, "the first look")
    await world.delete()
    await world.gone()
    broken = world.aws_fault("DescribeInstances", "server-error", times=0)
    async with sweeping(world, sweep_interval=1) as sweep:
        await until(lambda: "us-east-1" in sweep.describe()["regionErrors"], "a look that failed", timeout=60)
        assert (sweep.describe()["suspects"], orphans(sweep)) == (1, []), "neither confirmed nor cleared"
        world.shim.faults.remove(broken.id)
    unread = world.registry.key(world.registry.of(LabWorker), "default", "of-a-newer-lrm")
    await world.storage.create(unread, b"not an object")
    async with sweeping(world, sweep_terminate=True) as sweep:
        await until(lambda: "cannot be decoded" in sweep.error, "the value that cannot be read")
        assert orphan in world.live()
        entry = await world.storage.get(unread)
        await world.storage.delete(unread, expected_revision=entry.revision)
        await until(lambda: orphan not in world.live(), "an end, in a region where no worker is left")


async def test_by_a_clock_that_was_just_set_nothing_is_judged(world: WorkersWorld) -> None:
    await world.serving()
    await someone_elses(world, **ORPHAN)
    async with sweeping(world, sweep_interval=1, sweep_terminate=True) as sweep:
        await until(lambda: sweep.describe()["suspects"] == 1, "the first look")
        world.clock.offset = timedelta(days=1)
        await until(lambda: "clock was set" in sweep.error, "the step told of")
        assert (sweep.describe()["sweeps"], orphans(sweep)) == (1, [])


@pytest.mark.parametrize(
    "left",
    [
        b'{"regions": 7}',
        b'{"at": "0001-01-01T00:00:00+14:00", "regions": [], "suspects": []}',
        b'{"at": "9999-12-31T23:59:59-14:00", "regions": [], "suspects": []}',
    ],
)
async def test_a_state_that_cannot_be_read_is_begun_anew(world: WorkersWorld, left: bytes) -> None:
    await world.serving()
    key = f"{world.registry.root}/sweep"
    await world.storage.create(key, left)
    async with sweeping(world) as sweep:
        await swept(sweep, 1)
        assert orjson.loads((await world.storage.get(key)).value)["regions"] == ["us-east-1"]
        await sweep.drain(5)
        done = sweep.describe()["sweeps"]
        await world.looked_again(3)
        assert sweep.describe()["sweeps"] == done, "a drained one begins no sweep"


async def test_a_deposed_leader_ends_nothing(world: WorkersWorld) -> None:
    await world.serving()
    orphan = await someone_elses(world, **ORPHAN)
    election = StaticElection(world.storage, world.clock, root=world.registry.root, lock_name="sweep", identity="a")
    async with sweeping(world, term=await election.acquire()) as sweep:
        await until(lambda: orphans(sweep) == [orphan], "the orphan")
    old = await election.acquire()
    await election.acquire()
    async with sweeping(world, term=old, sweep_terminate=True):
        await asyncio.wait_for(old.wait_lost(), 10)
    assert orphan in world.live()


class Ec2WithDefects(Ec2):
    """Whatever it is asked of one region, and the first instance that it is asked for alone, hits a defect."""

    described = 0

    async def find_by_tags(self, place: Place, tags: Mapping[str, str], **how: Any) -> list[Ec2Instance]:
        if place.region == "eu-west-1":
            raise KeyError("InstanceId")
        return await super().find_by_tags(place, tags, **how)

    async def describe_instance(self, place: Place, instance_id: str) -> Ec2Instance:
        self.described += 1
        if self.described == 1:
            raise KeyError("State")
        return await super().describe_instance(place, instance_id)


async def test_a_defect_costs_the_region_or_the_turn_that_hits_it_alone(
    world: WorkersWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker = await world.serving()
    orphan = await someone_elses(world, **ORPHAN)
    state = {"at": None, "regions": ["eu-west-1", "us-east-1"], "suspects": []}
    await world.storage.create(f"{world.registry.root}/sweep", orjson.dumps(state))
    with monkeypatch.context() as patched:
        patched.setattr("controllers.sweep.sweep.sweep", None)
        async with sweeping(world, sweep_terminate=True, ec2_class=Ec2WithDefects) as sweep:
            await until(lambda: "TypeError" in sweep.error, "a turn that came to nothing")
            patched.undo()
            await until(lambda: orphan not in world.live(), "the end of the orphan, by a later turn")
            await until(lambda: sweep.error == "", "the end of that turn")
            assert "KeyError" in sweep.describe()["regionErrors"]["eu-west-1"]
    assert world.live() == [worker.status.ec2.instance_id]


async def test_nobody_adopts_an_orphan_that_is_being_ended(world: WorkersWorld) -> None:
    worker = await world.serving()
    orphan = await someone_elses(world, **ORPHAN)
    key = f"{world.registry.root}/claim/ec2/{orphan}"
    async with sweeping(world) as sweep:
        await until(lambda: orphans(sweep) == [orphan], "the orphan")
    lost = world.aws_fault("TerminateInstances", "server-error", times=0)
    async with sweeping(world, sweep_terminate=True, sweep_interval=3) as sweep:
        await until(
            lambda: "us-east-1" in sweep.describe()["regionErrors"], "an end of which nobody knows whether it came"
        )
    # Between two looks, however long the worker takes.
    await world.adopt("late", orphan)
    failed = await world.phase("Failed", name="late")
    assert failed.status.failure is not None
    assert failed.status.failure.reason == "ClaimedByAnother"
    assert "the sweep, which ends it" in failed.status.failure.message
    hits = lost.hits
    async with sweeping(world, sweep_terminate=True) as sweep:
        await swept(sweep, 1)
        assert lost.hits == hits, "a worker names it now: a person may want it"
        with pytest.raises(NotFound):
            await world.storage.get(key)
        world.shim.faults.remove(lost.id)
        assert orphans(sweep) == []
    assert sorted(world.live()) == sorted([orphan, str(worker.status.ec2.instance_id)])


async def test_the_claim_of_a_sweep_that_died_is_no_claim_to_the_next(world: WorkersWorld) -> None:
    await world.serving()
    orphan = await someone_elses(world, **ORPHAN)
    key = f"{world.registry.root}/claim/ec2/{orphan}"
    await world.storage.create(key, SWEEP_CLAIM)
    async with sweeping(world, sweep_terminate=True) as sweep:
        await until(lambda: orphan not in world.live(), "the end of the orphan")
        await swept(sweep, 1)
        with pytest.raises(NotFound):
            await world.storage.get(key)


async def test_what_ec2_refuses_to_end_can_be_adopted(world: WorkersWorld) -> None:
    await world.serving()
    orphan = await someone_elses(world, **ORPHAN)
    async with sweeping(world) as sweep:
        await until(lambda: orphans(sweep) == [orphan], "the orphan")
    world.aws_fault("TerminateInstances", "denied", times=0)
    async with sweeping(world, sweep_terminate=True, sweep_interval=3) as sweep:
        await until(lambda: "us-east-1" in sweep.describe()["regionErrors"], "the refusal")
        await world.adopt("rescued", orphan)
        await world.phase("ReadyUnlicensed", name="rescued")
