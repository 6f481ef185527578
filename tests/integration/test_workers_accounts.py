"""Workers in several AWS accounts side by side: each lives in its own, and nothing is believed of the wrong one."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Any

import orjson
import pytest

from controllers.aws.ec2 import Ec2
from controllers.aws.simulator import ShimOptions
from controllers.aws.simulator.instances import ACCOUNT
from controllers.imports.kind import LabWorkerImport, LabWorkerImportSpec
from controllers.workers.decisions import INSTALLATION_TAG, UID_TAG
from controllers.workers.kind import LabWorker
from controllers.workers.phases import Reasons
from equipment.aws import (
    ACCOUNTS,
    CLASSES_NUMBER,
    EXAMS,
    EXAMS_NUMBER,
    HERE,
    PARTNER_NUMBER,
    REGION,
    launch,
    write_profiles,
)
from equipment.waiting import until
from equipment.workers_world import INSTALLATION, PASSWORD_ENV, WorkersWorld, condition, workers_world
from lrm.errors import Invalid
from lrm.resource import ObjectMeta
from storage.memory import MemoryStorage

OF_EXAMS = ACCOUNTS["exams"].model_copy(update={"namespaces": ("exams",)})
"""The same account, for the namespace of that name alone."""


def three_accounts(
    monkeypatch: pytest.MonkeyPatch, moto_url: str, **settings: Any
) -> AbstractAsyncContextManager[WorkersWorld]:
    return workers_world(monkeypatch, moto_url, **{"aws_accounts": ACCOUNTS, **settings})


@pytest.fixture
async def world(monkeypatch: pytest.MonkeyPatch, moto_url: str, profiles: Path) -> AsyncIterator[WorkersWorld]:
    async with three_accounts(monkeypatch, moto_url) as made:
        yield made


def live(world: WorkersWorld) -> dict[str, str]:
    """The account of each instance that costs money."""
    found = world.shim.worlds.everywhere()
    return {i.id: w.account for w, i in found if i.state_at(w.instances.now) not in ("terminated", "shutting-down")}


def instance_of(worker: LabWorker) -> str:
    return worker.status.ec2.instance_id or ""


def trouble(worker: LabWorker) -> str:
    error = worker.status.ec2.last_error
    return error.reason if error else ""


def an_import(**spec: Any) -> LabWorkerImport:
    return LabWorkerImport(metadata=ObjectMeta(name="old"), spec=LabWorkerImportSpec(region=REGION, **spec))


async def import_waits(world: WorkersWorld, reason: str) -> bool:
    found = (await world.client.get(LabWorkerImport, "default", "old")).status
    ready = found.condition("Ready")
    return found.phase == "Pending" and ready is not None and ready.reason == reason


async def test_workers_of_one_region_live_in_their_accounts_and_end_there(world: WorkersWorld) -> None:
    accounts = {"w1": "", "w2": "exams", "w3": "partner"}
    workers = [await world.serving(name, account=account) for name, account in accounts.items()]
    numbers = dict(zip(map(instance_of, workers), (ACCOUNT, EXAMS_NUMBER, PARTNER_NUMBER), strict=True))
    assert live(world) == numbers
    assert [w.status.ec2.owner_id for w in workers] == list(numbers.values())
    await world.wish("Stopped", "w2")
    await world.phase("Stopped", name="w2")
    for name in accounts:
        await world.delete(name)
        await world.gone(name)
    assert live(world) == {}


async def test_what_happens_to_one_account_concerns_no_worker_of_another(world: WorkersWorld) -> None:
    await world.serving()
    await world.serving("w2", account="exams")
    expired = {"fault": "error", "code": "RequestExpired", "status": 400, "account": EXAMS_NUMBER}
    fault = world.shim.faults.add({"action": "*", "times": 0, **expired})
    there = await world.until(lambda w: trouble(w) == "AWSAuthFailed", "the refusal", "w2")
    assert there.status.phase == "ReadyUnlicensed", "a refusal is no word on the instance"
    hits = fault.hits
    await until(lambda: fault.hits > hits + 1, "more refusals")
    here = await world.get()
    assert (trouble(here), condition(here, "Ready")[0]) == ("", "True")
    third = await world.serving("w3")
    assert live(world)[instance_of(third)] == ACCOUNT
    world.shim.faults.clear()
    await world.until(lambda w: not trouble(w), "the recovery", "w2")


async def test_accounts_that_hang_keep_nobody_from_launching_in_another(world: WorkersWorld) -> None:
    numbers = {"exams": EXAMS_NUMBER, "classes": CLASSES_NUMBER, "partner": PARTNER_NUMBER}
    for name in numbers:
        await world.create(name, account=name)
    for name in numbers:
        await world.phase("ReadyUnlicensed", name=name)
    hanging = {"action": "*", "fault": "dropped", "seconds": 600, "times": 0}
    faults = [world.shim.faults.add({**hanging, "account": number}) for number in numbers.values()]
    await until(lambda: all(fault.hits for fault in faults), "calls that hang")
    await world.create()
    # One after the other, for the 20 s that a read may take, they would hold its first look at the limit up for 60.
    await world.phase("ReadyUnlicensed")


async def test_an_account_that_the_settings_lack_is_told_and_taken_when_they_have_it(
    monkeypatch: pytest.MonkeyPatch, moto_url: str, profiles: Path
) -> None:
    storage = MemoryStorage()
    async with workers_world(monkeypatch, moto_url, storage=storage) as world:
        await world.create(account="exams")
        await world.create("w2", account="mars")
        for name, account in (("w1", "exams"), ("w2", "mars")):
            refused = await world.until(lambda w: trouble(w) == "UnknownAccount", "the refusal", name)
            assert refused.status.phase == "Pending"
            error = refused.status.ec2.last_error
            assert error is not None
            assert f"'{account}' (LRM_AWS_ACCOUNTS)" in error.message
            assert condition(refused, "EC2Provisioned") == ("False", "UnknownAccount")
        await world.looked_again(5)
        await world.delete("w2")
        await world.gone("w2")
        assert live(world) == {}
    async with three_accounts(monkeypatch, moto_url, storage=storage) as world:
        worker = await world.phase("ReadyUnlicensed")
        assert live(world) == {instance_of(worker): EXAMS_NUMBER}
    await storage.aclose()


async def test_a_worker_of_a_region_that_may_not_be_named_waits_and_can_be_deleted(world: WorkersWorld) -> None:
    await world.create(region="aa-abc-1")
    refused = await world.until(lambda w: trouble(w) == "UnknownRegion", "the refusal")
    assert refused.status.phase == "Pending"
    await world.change(lambda w: setattr(w.spec, "region", REGION))
    await world.phase("ReadyUnlicensed")
    await world.create("w2", region="aa-abc-1")
    await world.until(lambda w: trouble(w) == "UnknownRegion", "the refusal", "w2")
    await world.delete("w2")
    await world.gone("w2")


async def test_an_account_that_a_namespace_may_not_name_is_not_touched_by_it(
    monkeypatch: pytest.MonkeyPatch, moto_url: str, profiles: Path
) -> None:
    async with three_accounts(monkeypatch, moto_url, aws_accounts={**ACCOUNTS, "exams": OF_EXAMS}) as world:
        async with Ec2(world.clock, ACCOUNTS, endpoint_url=world.shim.url) as ec2:
            theirs = (await ec2.run_instance(EXAMS, launch("theirs"))).id
            before = (await ec2.describe_instance(EXAMS, theirs)).tags
            calls = world.shim.calls.copy()
            await world.adopt("w1", theirs, account="exams", deletionPolicy="Terminate")
            await world.create("w2", account="exams")
            await world.client.create(an_import(account="exams", instance_ids=[theirs]))
            for name in ("w1", "w2"):
                refused = await world.until(lambda w: trouble(w) == "AccountForbidden", "the refusal", name)
                assert refused.status.phase == "Pending"
                await world.looked_again(3)
                await world.delete(name)
                await world.gone(name)
            await until(lambda: import_waits(world, "AccountForbidden"), "the import's refusal")
            assert world.shim.calls == calls, "nobody was asked"
            assert (await ec2.describe_instance(EXAMS, theirs)).tags == before
        assert live(world) == {theirs: EXAMS_NUMBER}


async def test_a_name_may_be_corrected_until_there_is_an_instance(world: WorkersWorld) -> None:
    await world.create(account="exmas")
    await world.until(lambda w: trouble(w) == "UnknownAccount", "the refusal")
    await world.change(lambda w: setattr(w.spec, "account", "exams"))
    worker = await world.phase("ReadyUnlicensed")
    assert live(world) == {instance_of(worker): EXAMS_NUMBER}
    with pytest.raises(Invalid, match=r"spec\.account"):
        await world.change(lambda w: setattr(w.spec, "account", "classes"))


@pytest.mark.parametrize(
    "wrong",
    [
        ({"aws_accounts": {}}, EXAMS_NUMBER, "UnknownAccount"),
        ({}, CLASSES_NUMBER, "WrongAccount"),
        ({"aws_accounts": {"exams": OF_EXAMS}}, EXAMS_NUMBER, "AccountForbidden"),
    ],
    ids=["the-name-is-gone", "the-name-means-another-account", "the-namespace-may-not-name-it"],
)
async def test_nothing_is_believed_gone_that_is_looked_for_in_the_wrong_account(
    monkeypatch: pytest.MonkeyPatch, moto_url: str, profiles: Path, wrong: tuple[dict[str, Any], str, str]
) -> None:
    settings, key, told = wrong
    storage = MemoryStorage()
    options: dict[str, Any] = {
        "storage": storage,
        "shim_options": ShimOptions(moto_url=moto_url, data_dir=profiles.parent / "aws", delay=0.05),
        "worker_gone_after": 0.1,
        "worker_trace_timeout": 0.1,
    }
    async with three_accounts(monkeypatch, moto_url, **options) as world:
        await world.serving(account="exams")
        running = live(world)
    write_profiles(profiles, exams=key)
    async with three_accounts(monkeypatch, moto_url, **options | settings) as world:
        await world.until(lambda w: trouble(w) == told, "the doubt")
        await world.looked_again(5)
        assert (await world.get()).status.phase == "ReadyUnlicensed"
        await world.delete()
        await world.phase("TerminatingEC2")
        await world.looked_again(5)
        assert trouble(await world.get()) == told, "nor is it let go"
        assert live(world) == running
    write_profiles(profiles, exams=EXAMS_NUMBER)
    async with three_accounts(monkeypatch, moto_url, **options) as world:
        await world.gone()
        assert live(world) == {}
    await storage.aclose()


async def test_the_limit_on_instances_is_one_for_all_accounts(
    monkeypatch: pytest.MonkeyPatch, moto_url: str, profiles: Path
) -> None:
    async with three_accounts(monkeypatch, moto_url, max_instances=1) as world:
        first = await world.serving(account="exams")
        await world.create("w2")
        await world.until(lambda w: trouble(w) == Reasons.MAX_INSTANCES, "the brake", "w2")
        assert live(world) == {instance_of(first): EXAMS_NUMBER}


async def test_instances_of_an_account_are_imported_from_it(world: WorkersWorld) -> None:
    theirs, ours = ({"track": "ccna"} for _ in range(2))
    async with Ec2(world.clock, ACCOUNTS, endpoint_url=world.shim.url) as ec2:
        wanted = await ec2.run_instance(EXAMS, launch("theirs", tags=theirs))
        await ec2.run_instance(HERE, launch("ours", tags=ours))
    template = {"spec": {"labTrack": "ccna", "cml": {"passwordFrom": {"env": PASSWORD_ENV}}}}
    spec = {"region": REGION, "account": "exams", "tags": {"track": "ccna"}, "template": template}
    of = LabWorkerImport(metadata=ObjectMeta(name="old"), spec=LabWorkerImportSpec.model_validate(spec))
    await world.client.create(of)
    name = f"old-{wanted.id.removeprefix('i-')}"

    async def done() -> LabWorkerImport | None:
        found = await world.client.get(LabWorkerImport, "default", "old")
        return found if found.status.phase == "Done" else None

    assert [one.instance_id for one in (await until(done, "the import")).status.imported] == [wanted.id]
    worker = await world.phase("ReadyUnlicensed", name=name)
    assert (worker.spec.account, worker.status.ec2.owner_id) == ("exams", EXAMS_NUMBER)


async def test_an_import_from_an_account_that_the_settings_lack_waits_for_it(world: WorkersWorld) -> None:
    await world.client.create(an_import(account="mars", tags={"track": "ccna"}))
    await until(lambda: import_waits(world, "UnknownAccount"), "the refusal")


async def test_orphans_of_every_account_are_found_and_ended_where_they_are(
    monkeypatch: pytest.MonkeyPatch, moto_url: str, profiles: Path
) -> None:
    swept = {"sweep_interval": 0.2, "sweep_terminate": True, "worker_trace_timeout": 0.01}
    async with three_accounts(monkeypatch, moto_url, led=["sweep"], **swept) as world:
        worker = await world.serving()
        await world.serving("w2", account="exams")
        tags = {INSTALLATION_TAG: INSTALLATION, UID_TAG: "of-a-worker-that-is-gone"}
        async with Ec2(world.clock, ACCOUNTS, endpoint_url=world.shim.url) as ec2:
            orphan = (await ec2.run_instance(EXAMS, launch("orphan", tags=tags))).id
        await world.delete("w2")
        await world.gone("w2")
        await until(lambda: orphan not in live(world), "the end of the orphan")
        assert live(world) == {instance_of(worker): ACCOUNT}
        state = orjson.loads((await world.storage.get(f"{world.registry.root}/sweep")).value)
        assert (state["regions"], state["accounts"]) == ([REGION], {"exams": [REGION]})


async def test_the_state_of_a_sweep_that_knew_one_account_is_read(
    monkeypatch: pytest.MonkeyPatch, moto_url: str, profiles: Path
) -> None:
    storage = MemoryStorage()
    # Of a time when any region could be named.
    old = {"at": None, "regions": [REGION, "aa-abc-1"], "suspects": []}
    await storage.create("/lrm/sweep", orjson.dumps(old))
    async with three_accounts(
        monkeypatch, moto_url, storage=storage, led=["sweep"], sweep_interval=0.2, max_instances=1
    ) as world:
        [sweep] = world.others
        await until(lambda: sweep.describe()["sweeps"] > 0, "a sweep")
        assert (sweep.describe()["regions"], sweep.describe()["regionErrors"]) == ([REGION], {})
        await world.create("typo", account="patner")
        await world.create(account="partner")
        await until(lambda: sweep.describe()["regions"] == ["us-east-1", "partner/us-east-1"], "the new place")
        assert sweep.describe()["error"] == ""
    await storage.aclose()
