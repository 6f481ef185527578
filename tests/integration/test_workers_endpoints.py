"""The endpoints about workers: what they answer, whom they serve, and that they only write resources."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Any

import orjson
import pytest

from controllers.aws.simulator import DEMO_AMI
from controllers.failure import Failure
from controllers.orders import Order
from controllers.plugin import plugin
from controllers.workers.flat import FlatWorker
from controllers.workers.kind import LAB_WORKER, WAKE_ANNOTATION, LabWorker
from controllers.workers.openapi import OPERATIONS
from controllers.workers.orders import WorkerOrders
from controllers.workers.routes import add_workers_routes
from controllers.workers.spec import LabWorkerSpec
from controllers.workers.status import Allocation, IdleStatus, LabWorkerStatus, Registration, WorkerMetrics
from equipment.api import Answer, Served, served, tokens_file
from equipment.waiting import until
from equipment.workers_world import BAD_TOKEN_ENV, PASSWORD_ENV, TOKEN_ENV, WorkersWorld, history, workers_world
from lrm.api.status import RequestError
from lrm.devservers import EtcdServer
from lrm.resource import PAUSE_ANNOTATION, ObjectMeta
from storage.clock import SystemClock
from storage.etcd import EtcdStorage
from storage.memory import MemoryStorage

SERVING = ("Ready", "ReadyUnlicensed")
TOKEN = {"licenseTokenFrom": {"env": TOKEN_ENV}}
REGION = "us-east-1"
NOW = SystemClock().now


def path(rest: str = "", region: str = REGION) -> str:
    return f"/api/v1/workers/region/{region}/workers{rest}"


def faces(storage: Any, **settings: Any) -> AbstractAsyncContextManager[Served]:
    return served(storage, kinds=plugin.kinds, routes=(add_workers_routes,), operations=OPERATIONS, **settings)


@pytest.fixture
async def world(monkeypatch: pytest.MonkeyPatch, moto_url: str) -> AsyncIterator[WorkersWorld]:
    async with workers_world(monkeypatch, moto_url, led=("metrics",), metrics_on_demand_interval=0.05) as made:
        yield made


@pytest.fixture
async def api(world: WorkersWorld) -> AsyncIterator[Served]:
    """Served by a daemon that leads nothing, as it were: with a cache of its own."""
    async with faces(world.storage) as api:
        yield api


@pytest.fixture
async def still() -> AsyncIterator[Served]:
    """Workers that nobody reconciles: they are as `put` has them."""
    async with faces(MemoryStorage()) as api:
        yield api


async def put(
    api: Served, name: str = "w1", phase: str = "Ready", *, namespace: str = "default", **parts: Any
) -> LabWorker:
    """A worker just so: with `status`, `annotations`, a `uid`, or `deleting`; the other parts are of its spec."""
    status = LabWorkerStatus(phase=phase, observed_generation=1)
    for key, value in parts.pop("status", {}).items():
        owner, _, field = key.rpartition(".")
        setattr(getattr(status, owner) if owner else status, field, value)
    meta = ObjectMeta(name=name, namespace=namespace, generation=1, annotations=parts.pop("annotations", {}))
    meta.uid, meta.finalizers = parts.pop("uid", f"uid-{name}"), ["test/held"]
    meta.deletion_timestamp = NOW() if parts.pop("deleting", False) else None
    spec = LabWorkerSpec.model_validate({"region": REGION, "aws": {"amiId": DEMO_AMI}, **parts})
    worker = LabWorker(metadata=meta, spec=spec, status=status)
    await api.storage.create(api.registry.key_of(worker), LAB_WORKER.encode(worker))
    await api.cache.barrier(30)
    return await api.client.get(LabWorker, namespace, name)


async def act(api: Served, action: str, worker: str = "w1", **options: Any) -> Answer:
    return await api.call("POST", path(f"/{worker}/{action}"), **options)


def asked_of(worker: LabWorker) -> tuple[int, dict[str, str]]:
    """All of a worker that people write: while it is the same, nothing was ordered."""
    return worker.metadata.generation, dict(worker.metadata.annotations)


# What is read


async def test_workers_are_listed_and_read_in_one_flat_form_without_secrets(world: WorkersWorld, api: Served) -> None:
    await world.serving(cml={"licenseTokenFrom": {"env": TOKEN_ENV}}, labTrack="ccna")
    await world.phase("Ready")
    await world.listed()
    worker = await world.until(lambda w: w.status.utilization is not None, "it measured")
    listed = await api.get(path())
    assert (listed.status, listed.warnings) == (200, [])
    [shown] = listed.body
    assert set(shown) == set(FlatWorker.model_fields)
    ec2, cml = worker.status.ec2, worker.status.cml
    known = {
        "name": "w1",
        "region": REGION,
        "lab_track": "ccna",
        "phase": "Ready",
        "ready": True,
        "accepting_labs": True,
        "instance_id": ec2.instance_id,
        "public_ip": ec2.public_ip,
        "private_ip": ec2.private_ip,
        "api_url": cml.api_url,
        "cml_version": cml.version,
        "licensed": True,
        "labs_count": 0,
        "last_error": None,
    }
    assert known.items() <= shown.items()
    assert None not in (shown["cpu_percent"], shown["memory_percent"], shown["measured_at"], shown["labs_synced_at"])
    for secret in (PASSWORD_ENV, TOKEN_ENV, "admin-secret"):
        assert secret.encode() not in listed.raw
    for name in ("w1", ec2.instance_id):
        read = await api.get(path(f"/{name}"))
        assert (read.status, read.body["uid"]) == (200, worker.uid)


async def test_the_list_is_narrowed_by_region_namespace_phase_and_selectors(still: Served) -> None:
    await put(still, "w1", labTrack="ccna")
    await put(still, "w2", "ReadyUnlicensed", namespace="other")
    await put(still, "far", region="eu-west-1")
    for rest, names in {
        "": ["w1", "w2"],
        "?namespace=other": ["w2"],
        "?namespace=default": ["w1"],
        "?phase=readyunLICENSED": ["w2"],
        "?phase=Stopped": [],
        "?fieldSelector=spec.labTrack%3Dccna": ["w1"],
        "?resourceVersion=0": ["w1", "w2"],
    }.items():
        answer = await still.get(path(rest))
        assert (answer.status, sorted(w["name"] for w in answer.body), answer.warnings) == (200, names, []), rest
    assert [w["name"] for w in (await still.get(path(region="eu-west-1"))).body] == ["far"]
    nowhere = await still.get(path(region="mars"))
    assert (nowhere.body, "no such worker in the region 'mars'" in nowhere.warnings[0]) == ([], True)
    for rest, status in {
        "?phase=READYISH": 400,
        "?colour=red": 400,
        "?dryRun=All": 400,
        "?namespace=No_Label": 400,
        "/w1?dryRun=All": 400,
        "/w2": 404,
        "/w2?namespace=other": 200,
        "/far": 404,
        "/nobody": 404,
        "/w1/start": 405,
    }.items():
        assert (await still.get(path(rest))).status == status, rest
    await still.storage.set(still.registry.key_of(await still.client.get(LabWorker, "default", "w1")), b'{"spec": 7}')
    left = await still.get(path())
    assert ([w["name"] for w in left.body], "cannot be decoded" in left.warnings[0]) == (["w2"], True)
    assert (await still.get(path("/w1"))).status == 500


async def test_what_the_cache_has_is_told_while_the_store_is_away(server_dir: Path) -> None:
    async with EtcdServer(server_dir / "etcd") as etcd:
        storage = EtcdStorage([etcd.endpoint], root="/lrm", instance="test", request_timeout=1.0)
        async with faces(storage, barrier_seconds=1.0) as api:
            await put(api, "w1")
            etcd.kill()
            for rest in ("", "/w1"):
                assert (await api.get(path(f"{rest}?resourceVersion=0"))).status == 200
                late = await api.get(path(rest))
                assert (late.status, late.body["reason"], "Retry-After" in late.headers) == (504, "Timeout", True)
            assert (await act(api, "stop")).status == 503
        await storage.aclose()


async def test_roles_hold_and_what_was_done_is_recorded(tmp_path: Path) -> None:
    tokens = [
        {"name": role, "sha256": hashlib.sha256(role.encode()).hexdigest(), "role": role, "namespaces": namespaces}
        for role, namespaces in (("viewer", None), ("manager", ["default"]), ("controller", ["other"]))
    ]
    files = {"tokens_file": tokens_file(tmp_path, *tokens), "audit_file": tmp_path / "audit.log"}
    async with faces(MemoryStorage(), **files) as api:
        before = await put(api, status=MACHINE)

        async def ask(who: str, method: str, rest: str) -> int:
            headers = {"Authorization": f"Bearer {who}"} if who else {}
            return (await api.call(method, path(rest), headers=headers)).status

        for action in ("start", "stop", "drain", "license", "refresh"):
            for who, status in (("", 401), ("viewer", 403), ("controller", 403)):
                assert (await ask(who, "POST", f"/w1/{action}?wait=0"), who, action) == (status, who, action)
        assert (await api.client.get(LabWorker, "default", "w1")).revision == before.revision
        assert [await ask("viewer", "GET", rest) for rest in ("", "/w1")] == [200, 200]
        assert [await ask("manager", "GET", rest) for rest in ("", "?namespace=default", "/w1")] == [403, 200, 200]
        assert await ask("manager", "POST", "/w1/start?wait=0") == 200
        assert await ask("manager", "POST", "/w1/stop?wait=0") == 202
    lines = [orjson.loads(line) for line in (tmp_path / "audit.log").read_bytes().splitlines()]
    done = [(e["who"], o["name"], o["note"], o["result"]) for e in lines if e["code"] < 300 for o in e["objects"]]
    assert done == [("manager", "w1", "start", "unchanged"), ("manager", "w1", "stop", "configured")]


# What is done


async def test_a_worker_is_stopped_and_started_and_what_is_so_already_is_told_at_once(
    world: WorkersWorld, api: Served
) -> None:
    worker = await world.serving()
    await world.listed()
    for action, phases in (("start", SERVING), ("stop", ("Stopped",)), ("start", SERVING)):
        answer = await act(api, action)
        assert (answer.status, answer.body["result"], answer.body["action"]) == (200, "Succeeded", action), answer.raw
        assert answer.body["phase"] in phases
        before = asked_of(await world.get())
        again = await act(api, action, worker=answer.body["instance_id"])
        assert (again.status, again.body["result"]) == (200, "Succeeded")
        assert asked_of(await world.get()) == before
    assert (await world.status()).ec2.instance_id == worker.status.ec2.instance_id


async def test_a_stop_waits_for_labs_and_says_so_and_a_start_takes_it_back(world: WorkersWorld, api: Served) -> None:
    worker = await world.serving()
    await world.listed()
    lab = world.machine(worker).add_lab("exam", nodes=1, running=True)
    answer = await act(api, "stop?wait=0")
    assert (answer.status, answer.body["result"], answer.body["desired_phase"]) == (202, "Accepted", "Stopped")
    assert answer.headers["Location"] == answer.body["resource"]
    assert answer.body["resource"].endswith("/namespaces/default/labworkers/w1")
    await world.until(lambda w: w.status.phase == "Draining" and w.status.labs_count == 1, "the lab seen")
    await world.at_rest()
    held = await act(api, "stop?wait=0.1")
    assert held.status == 202
    assert "w1 is Draining: lab instances placed on it: 0, labs that run: 1, 240 min at most" in held.body["message"]
    started = await act(api, "start")
    assert (started.status, started.body["phase"] in ("ReadyUnlicensed", "Active")) == (200, True), started.raw
    assert lab.state == "STARTED"
    waiting = asyncio.create_task(act(api, "stop"))
    await world.phase("Draining")
    world.machine(worker).force(lab, "STOPPED")
    assert (await waiting).body["phase"] == "Stopped"


async def test_a_drain_ends_when_no_lab_runs_and_leaves_the_instance(world: WorkersWorld, api: Served) -> None:
    worker = await world.serving()
    await world.listed()
    lab = world.machine(worker).add_lab("exam", nodes=1, running=True)
    asked = asyncio.create_task(act(api, "drain"))
    await world.until(lambda w: w.status.phase == "Draining" and w.status.labs_count == 1, "the lab seen")
    assert not asked.done()
    world.machine(worker).force(lab, "STOPPED")
    drained = await asked
    assert (drained.status, drained.body["phase"]) == (200, "Draining"), drained.raw
    assert "w1 is drained" in drained.body["message"]
    assert [world.state(i) for i in world.instances()] == ["running"]


async def test_the_last_of_two_wishes_at_once_holds_and_the_other_learns_of_it(
    world: WorkersWorld, api: Served
) -> None:
    worker = await world.serving()
    await world.listed()
    world.machine(worker).add_lab("exam", nodes=1, running=True)
    stop = asyncio.create_task(act(api, "stop"))
    await world.phase("Draining")
    start = await act(api, "start")
    assert start.status == 200
    lost = await stop
    assert (lost.status, lost.body["reason"]) == (409, "Conflict")
    assert "another wish came after this: w1 is to be Ready" in lost.body["message"]
    both = await asyncio.gather(*(act(api, action) for action in ("stop?wait=1", "start?wait=1", "drain?wait=1")))
    wished = (await world.get()).spec.desired_phase
    answers = dict(zip(("Stopped", "Ready", "Draining"), both, strict=True))
    assert answers[wished].status in (200, 202)
    assert {a.status for a in both} <= {200, 202, 409}


async def test_a_start_that_fails_says_why_and_the_next_one_tries_again(
    monkeypatch: pytest.MonkeyPatch, moto_url: str
) -> None:
    async with workers_world(monkeypatch, moto_url) as world, faces(world.storage) as api:
        world.aws_fault("RunInstances", "error", times=0, code="InvalidAMIID.NotFound", message="no such image")
        await world.create()
        await world.phase("Failed")
        failed = await act(api, "start")
        assert (failed.status, failed.body["reason"]) == (409, "Conflict")
        assert "no such image" in failed.body["message"]
        assert "mend that and ask again" in failed.body["message"]
        assert history(await world.get()).count("Failed") == 2, "it was tried again"
        world.shim.faults.clear()
        started = await act(api, "start")
        assert (started.status, started.body["last_error"]) == (200, None), started.raw


async def test_a_licence_is_registered_on_request_and_what_fails_is_told(world: WorkersWorld, api: Served) -> None:
    await world.serving(autoLicense=False)
    none = await act(api, "license")
    assert (none.status, "licenseTokenFrom" in none.body["message"]) == (409, True)

    def token(env: str) -> Any:
        given = LabWorkerSpec.model_validate({"region": REGION, "cml": {"licenseTokenFrom": {"env": env}}})
        return lambda w: setattr(w.spec.cml, "license_token_from", given.cml.license_token_from)

    await world.change(token(BAD_TOKEN_ENV))
    assert not (await world.get()).spec.auto_license
    refused = await act(api, "license")
    assert (refused.status, refused.body["reason"]) == (409, "Conflict"), refused.raw
    assert "license w1 again" in refused.body["message"]
    assert (await api.get(path("/w1"))).body["license_error"] is not None
    await world.change(token(TOKEN_ENV))
    before = asked_of(await world.phase("Ready"))
    done = await act(api, "license")
    assert (done.status, done.body["licensed"], done.body["license_error"]) == (200, True, None)
    assert asked_of(await world.get()) == before


async def test_a_licence_that_was_refused_once_is_tried_again_by_the_same_order(
    world: WorkersWorld, api: Served
) -> None:
    fault = world.cml_fault("status", method="POST", path="/licensing/registration", status=400, description="not now")
    await world.serving(cml=TOKEN)
    await world.until(lambda w: w.status.cml.registration and w.status.cml.registration.failed, "the refusal")
    again = await act(api, "license")
    assert (again.status, "not now" in again.body["message"]) == (409, True), again.raw
    world.cml.faults.clear(fault)
    assert (await act(api, "license")).body["phase"] == "Ready"


async def test_a_refresh_measures_now_and_says_who_did_not_tell(world: WorkersWorld, api: Served) -> None:
    worker = await world.serving()
    await world.listed()
    world.machine(worker).add_lab("new")
    first = await act(api, "refresh")
    assert (first.status, first.body["result"]) == (200, "Succeeded"), first.raw
    assert first.body["cpu_percent"] is not None
    metrics = (await world.status()).metrics
    assert metrics is not None
    assert metrics.asked == (await world.get()).metadata.annotations["lab.neuroglia.io/reconcile-now"]
    await world.until(lambda w: w.status.labs_count == 1, "its labs synced too")
    both = await asyncio.gather(*(act(api, "refresh") for _ in range(3)))
    assert [a.status for a in both] == [200] * 3
    world.aws_fault("DescribeInstances", "auth", times=0)
    told = await act(api, "refresh")
    assert (told.status, "EC2 did not tell" in told.body["message"]) == (200, True), told.raw


# What is not done, or not yet

PAUSED = {"annotations": {PAUSE_ANNOTATION: "true"}}
FAILED = {"failure": Failure(reason="BootTimeout", message="too late", at=NOW(), phase="Starting", generation=1)}
MACHINE = {"ec2.instance_id": "i-1"}
REFUSED = Registration.model_validate({"failed": {"reason": "Bad", "message": "no", "at": NOW()}, "generation": 1})
IDLE = {"status": {"idle": IdleStatus(paused_at=NOW())}, "idleDetection": {"enabled": True}}
UNSEEN = {"status": {"observed_generation": 0}}
ENDING = {"desiredPhase": "Terminated"}
OBSERVED = {"observeOnly": True, "aws": {"instanceId": "i-0123456789abcdef0"}}


@pytest.mark.parametrize(
    "case",
    [
        ("start", "Terminated", {}, 409, "make another worker", "no wish leads back"),
        ("stop", "TerminatingEC2", {}, 409, "make another worker", "nor from its end"),
        ("license", "Terminated", {}, 409, "make another worker", "nor for this"),
        ("refresh", "Terminated", {}, 409, "nothing left to ask", "nobody would answer"),
        ("stop", "Draining", ENDING, 409, "change spec.desiredPhase", "an end that was wished for is not taken back"),
        ("start", "Ready", ENDING, 409, "change spec.desiredPhase", "nor by this"),
        ("drain", "Unlicensing", ENDING, 409, "change spec.desiredPhase", "nor by this"),
        ("license", "ReadyUnlicensed", {**ENDING, "cml": TOKEN}, 409, "change spec.desiredPhase", "it has no future"),
        ("start", "Ready", {"deleting": True}, 403, "being deleted", "as the resource does"),
        ("drain", "Ready", {"deleting": True}, 403, "being deleted", "as the resource does"),
        ("refresh", "Ready", {"deleting": True, "status": MACHINE}, 202, "under way", "it may still be asked about"),
        ("stop", "Ready", OBSERVED, 422, "only observed", "as the resource does"),
        ("start", "Stopped", OBSERVED, 202, "only observed", "whoever stopped it starts it"),
        ("license", "ReadyUnlicensed", {**OBSERVED, "cml": TOKEN}, 409, "only observed", "nothing is registered"),
        ("stop", "Ready", PAUSED, 202, "paused", "it is carried out later"),
        ("start", "Ready", PAUSED, 200, "w1 is Ready", "it is so, paused or not"),
        ("start", "Ready", UNSEEN, 202, "under way: w1 is Ready", "the leader may be about to stop it still"),
        ("start", "Stopped", IDLE, 202, "under way: w1 is Stopped", "the annotation wakes it"),
        ("stop", "Draining", {"desiredPhase": "Stopped"}, 202, "its labs are not listed yet", "it tells what holds it"),
        (
            "drain",
            "Draining",
            {"desiredPhase": "Draining", "status": {"allocations": {"default/x": Allocation()}}},
            202,
            "lab instances placed on it: 1",
            "what is placed holds it",
        ),
        ("drain", "Stopped", {"desiredPhase": "Draining"}, 200, "w1 is Stopped", "nothing runs there"),
        ("stop", "Pending", {"desiredPhase": "Stopped"}, 200, "no instance is launched", "nothing is there to stop"),
        ("drain", "Failed", {"desiredPhase": "Draining", "status": FAILED}, 202, "too late", "it is tried again"),
        ("license", "Failed", {"cml": TOKEN, "status": FAILED}, 409, "start it first", "CML may be away"),
        ("license", "Active", {"cml": TOKEN}, 202, "when no lab runs", "it is not done under labs"),
        ("license", "Stopped", {"cml": TOKEN, "desiredPhase": "Stopped"}, 202, "once it was started", "CML is off"),
        ("license", "Ready", {"cml": TOKEN}, 409, "lost its licence", "its phase leads nowhere else"),
        (
            "license",
            "ReadyUnlicensed",
            {"cml": TOKEN, "status": {"cml.registration": REFUSED}},
            202,
            "under way",
            "an old failure is none of this order's",
        ),
        ("refresh", "Pending", {}, 202, "no instance yet", "there is nothing to ask yet"),
        ("start?wait=21", "Ready", {}, 400, "wait must be", "proxies give up"),
        ("start?dryRun=All", "Ready", {}, 400, "dryRun", "the resource rehearses"),
        ("start?namespace=other", "Ready", {}, 404, "not found", "it is of another namespace"),
    ],
)
async def test_what_cannot_be_done_is_refused_without_a_trace_and_what_waits_says_for_what(
    still: Served, case: tuple[str, str, dict[str, Any], int, str, str]
) -> None:
    action, phase, parts, status, said, why = case
    before = await put(still, phase=phase, **parts)
    answer = await act(still, action if "?" in action else f"{action}?wait=0")
    assert (answer.status, said in answer.body["message"]) == (status, True), (why, answer.raw)
    after = await still.client.get(LabWorker, "default", "w1")
    if status >= 400:
        assert after.revision == before.revision
    if status == 202:
        assert answer.headers["Location"].endswith("/labworkers/w1")


async def test_a_start_wakes_a_worker_that_idleness_stopped(still: Served) -> None:
    await put(still, phase="Stopped", **IDLE)
    assert (await still.get(path("/w1"))).body["idle"]
    answer = await act(still, "start?wait=0")
    assert (answer.status, answer.body["idle"], answer.body["desired_phase"]) == (202, False, "Ready")
    woken = asked_of(await still.client.get(LabWorker, "default", "w1"))
    assert (woken[0], list(woken[1])) == (1, [WAKE_ANNOTATION])
    assert (await act(still, "start?wait=0")).status == 202
    assert asked_of(await still.client.get(LabWorker, "default", "w1")) == woken, (
        "it is awake to the controller already"
    )


async def test_a_refresh_that_somebody_took_back_is_not_told_as_done(still: Served) -> None:
    worker = await put(still, status={**MACHINE, "metrics": WorkerMetrics()})
    order = await WorkerOrders(still.api).refresh(worker, "mine")
    await still.client.update(worker, lambda w: w.metadata.annotations.clear())
    await still.cache.barrier(30)
    assert order.look() is None


@pytest.mark.parametrize("order", ["wish", "license"])
async def test_an_end_that_is_wished_for_meanwhile_is_not_taken_back_and_supersedes(still: Served, order: str) -> None:
    orders = WorkerOrders(still.api)

    async def give(worker: LabWorker) -> Order:
        return await (orders.wish(worker, "Draining", "mine") if order == "wish" else orders.license(worker, "mine"))

    worker = await put(still, phase="ReadyUnlicensed", cml=TOKEN)
    given = await give(worker)
    await still.client.update(worker, lambda w: setattr(w.spec, "desired_phase", "Terminated"))
    with pytest.raises(RequestError, match="to be Terminated"):
        await give(worker)
    await still.cache.barrier(30)
    outcome = given.look()
    assert outcome is not None
    assert (outcome.result, "is to be Terminated" in outcome.message) == ("Superseded", True)
    assert still.cache.all(LabWorker)[0].spec.desired_phase == "Terminated"


async def test_an_order_whose_worker_goes_or_is_replaced_meanwhile_says_so(still: Served) -> None:
    worker = await put(still, status=MACHINE)

    async def written(revision: int) -> bool:
        return (await still.client.get(LabWorker, "default", "w1")).revision > revision

    asked = asyncio.create_task(act(still, "stop"))
    await until(lambda: written(worker.revision), "the wish")
    deleting = await still.client.delete(worker)
    assert deleting is not None
    told = await asked
    assert (told.status, "w1 is being deleted" in told.body["message"]) == (409, True)
    asked = asyncio.create_task(act(still, "refresh"))
    await until(lambda: written(deleting.revision), "the order")
    await still.client.forget(worker)
    await put(still, uid="another", status=MACHINE)
    told = await asked
    assert (told.status, "the worker w1 is gone" in told.body["message"]) == (409, True)
