"""What a LabWorker may say, what is fixed when, and what its status tells about itself."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime
from typing import Any

import pytest

from controllers.plugin import plugin
from controllers.workers import queries
from controllers.workers.conditions import refresh
from controllers.workers.kind import LAB_WORKER, TRUST_ANNOTATION, LabWorker
from controllers.workers.phases import Phase
from controllers.workers.settings import WorkerSettings
from controllers.workers.status import Allocation, Capacity, Problem
from controllers.workers.work import enter
from lrm import writes
from lrm.cache import Cache
from lrm.client import Client
from lrm.errors import Forbidden, Invalid
from lrm.registry import Registry
from lrm.resource import ObjectMeta
from storage.clock import SystemClock
from storage.memory import MemoryStorage

NOW = datetime(2026, 5, 1, 12, tzinfo=UTC)
AWS = {"amiId": "ami-12345678"}


def parse(name: str = "w1", **spec: Any) -> LabWorker:
    wanted = {"region": "us-east-1", "aws": AWS, **spec}
    return LAB_WORKER.parse({"metadata": {"name": name}, "spec": wanted})[0]


def created(**spec: Any) -> LabWorker:
    return writes.for_create(LAB_WORKER, parse(**spec), uid="u-1", now=NOW)


def test_the_defaults_are_those_of_the_design() -> None:
    spec = parse().spec
    aws, cml = spec.aws, spec.cml
    assert (aws.instance_type, aws.volume_size_gb, aws.volume_type, aws.iops) == ("m5zn.metal", 500, "io1", 10000)
    assert aws.assign_public_ip
    assert (cml.username, cml.tls.verify) == ("admin", True)
    assert (cml.max_nodes_unlicensed, cml.max_nodes_licensed) == (5, 200)
    assert (spec.desired_phase, spec.drain_timeout_minutes, spec.max_concurrent_labs) == ("Ready", 240, 20)
    assert spec.deletion_policy is None
    assert not spec.retains
    assert parse(aws={"instanceId": "i-0123456789abcdef0"}).spec.retains, "what was adopted is kept"
    assert not parse(aws={"instanceId": "i-0123456789abcdef0"}, deletionPolicy="Terminate").spec.retains


@pytest.mark.parametrize(
    ("spec", "field"),
    [
        ({"region": "mars"}, "spec.region"),
        ({"region": None}, "spec.region"),
        ({"account": "Exams"}, "spec.account"),
        ({"aws": {}}, "spec.aws.amiId"),
        ({"aws": {"amiId": "img-1"}}, "spec.aws.amiId"),
        ({"aws": {"instanceId": "i-xyz"}}, "spec.aws.instanceId"),
        ({"aws": {**AWS, "volumeSizeGb": 0}}, "spec.aws.volumeSizeGb"),
        ({"aws": {**AWS, "volumeType": "floppy"}}, "spec.aws.volumeType"),
        ({"aws": {**AWS, "iops": 1}}, "spec.aws.iops"),
        ({"aws": {**AWS, "tags": {"lrm/uid": "x"}}}, "spec.aws.tags"),
        ({"aws": {**AWS, "tags": {"aws:x": "x"}}}, "spec.aws.tags"),
        ({"aws": {**AWS, "tags": {f"k{n}": "" for n in range(41)}}}, "spec.aws.tags"),
        ({"cml": {"passwordFrom": {"env": "A", "file": "/b"}}}, "spec.cml.passwordFrom"),
        ({"cml": {"password": "secret"}}, "spec.cml.password"),
        ({"cml": {"apiBaseUrl": "https://user:pw@host"}}, "spec.cml.apiBaseUrl"),
        ({"cml": {"apiBaseUrl": "ftp://host"}}, "spec.cml.apiBaseUrl"),
        ({"cml": {"productLicense": "a b"}}, "spec.cml.productLicense"),
        ({"cml": {"tls": {"fingerprint": "12:34"}}}, "spec.cml.tls.fingerprint"),
        ({"cml": {"tls": {"verify": False, "caFile": "/ca.pem"}}}, "spec.cml.tls"),
        ({"desiredPhase": "Active"}, "spec.desiredPhase"),
        ({"deletionPolicy": "Keep"}, "spec.deletionPolicy"),
        ({"drainTimeoutMinutes": -1}, "spec.drainTimeoutMinutes"),
        ({"idleDetection": {"snoozeUntil": "0001-01-01T00:00:00+14:00"}}, "spec.idleDetection.snoozeUntil"),
        ({"colour": "blue"}, "spec.colour"),
    ],
)
def test_a_wrong_field_is_refused_by_its_path(spec: dict[str, Any], field: str) -> None:
    with pytest.raises(Invalid) as refused:
        created(**spec)
    assert field in [c.field for c in refused.value.causes]
    assert "secret" not in str(refused.value)


def test_a_name_has_63_characters_at_most() -> None:
    parse("a" * 63)
    with pytest.raises(Invalid, match=r"metadata\.name"):
        parse("a" * 64)


@pytest.mark.parametrize(
    ("instance", "sent", "fixed"), [(None, False, False), (None, True, True), ("i-0123456789abcdef0", False, True)]
)
def test_spec_aws_is_fixed_once_an_instance_exists_or_may(instance: str | None, sent: bool, fixed: bool) -> None:
    current = created()
    current.metadata.resource_version = "5"
    current.status.ec2.instance_id, current.status.ec2.sent_at = instance, NOW if sent else None
    for change, field in (
        (lambda w: setattr(w.spec.aws, "ami_id", "ami-87654321"), "spec.aws.amiId"),
        (lambda w: setattr(w.spec, "region", "eu-west-1"), "spec.region"),
        (lambda w: setattr(w.spec, "account", "exams"), "spec.account"),
    ):
        wanted = current.thaw()
        change(wanted)
        if not fixed:
            assert isinstance(writes.for_update(LAB_WORKER, current, wanted), writes.Put)
            continue
        with pytest.raises(Invalid) as refused:
            writes.for_update(LAB_WORKER, current, wanted)
        assert [c.field for c in refused.value.causes] == [field]
    tagged = current.thaw()
    tagged.spec.aws.tags["course"] = "ccna"
    assert isinstance(writes.for_update(LAB_WORKER, current, tagged), writes.Put)


@pytest.mark.parametrize(
    ("owner", "change", "allowed"),
    [
        ("workers", lambda s: setattr(s.cml, "version", "2.9"), True),
        ("workers", lambda s: setattr(s, "labs_count", 3), False),
        ("workers", lambda s: s.allocations.update(u=Allocation()), False),
        ("labs", lambda s: setattr(s, "labs_count", 3), True),
        ("labs", lambda s: setattr(s, "labs_sync_error", "x"), True),
        ("labs", lambda s: setattr(s.ec2, "state", "terminated"), False),
        ("labs", lambda s: s.set_condition("LabsSynced", True, "Synced", "", now=NOW), True),
        ("labs", lambda s: s.set_condition("Ready", True, "x", "", now=NOW), False),
        ("instances", lambda s: s.allocations.update(u=Allocation()), True),
        ("instances", lambda s: s.enter("ProvisioningEC2", "x", NOW), False),
    ],
)
def test_each_part_of_the_status_has_one_owner(owner: str, change: Any, allowed: bool) -> None:
    current = created()
    wanted = current.thaw()
    change(wanted.status)
    if allowed:
        assert isinstance(writes.for_status(LAB_WORKER, current, wanted, owner=owner), writes.Put)
    else:
        with pytest.raises(Forbidden, match="owned by"):
            writes.for_status(LAB_WORKER, current, wanted, owner=owner)


def a_ready_worker() -> LabWorker:
    worker = created()
    for phase in (Phase.STARTING, Phase.READY_UNLICENSED):
        enter(worker, phase, "x", NOW)
    worker.status.ec2.instance_id, worker.status.ec2.state = "i-0123456789abcdef0", "running"
    worker.status.cml.ready, worker.status.cml.version = True, "2.9.1"
    worker.status.capacity = Capacity(cpu=8)
    refresh(worker, NOW)
    return worker


def told(worker: LabWorker) -> dict[str, str]:
    return {c.type: f"{c.status}/{c.reason}" for c in worker.status.conditions}


def test_conditions_follow_from_the_status_and_do_not_move_by_themselves() -> None:
    worker = a_ready_worker()
    assert told(worker) == {
        "EC2Provisioned": "True/InstanceRunning",
        "CMLReady": "True/CMLReady",
        "Licensed": "False/NoLicenseWanted",
        "HealthCheckPassed": "True/Healthy",
        "CapacityAvailable": "True/CapacityLeft",
        "Ready": "True/Unlicensed",
        "AcceptingLabs": "True/Serving",
    }
    before = LAB_WORKER.encode(worker)
    refresh(worker, datetime(2027, 1, 1, tzinfo=UTC))
    assert LAB_WORKER.encode(worker) == before


@pytest.mark.parametrize(
    ("change", "expected", "why"),
    [
        (lambda s: setattr(s.cml, "failed_checks", 2), {"HealthCheckPassed": "True/Healthy"}, "twice is not thrice"),
        (
            lambda s: (
                setattr(s.cml, "failed_checks", 3),
                setattr(s.cml, "ready", False),
                setattr(s.cml, "last_error", Problem(reason="Unreachable", message="", at=NOW)),
            ),
            {
                "HealthCheckPassed": "False/Unreachable",
                "CMLReady": "False/Unreachable",
                "Ready": "False/Unreachable",
                "AcceptingLabs": "False/NotServing",
            },
            "three in a row is an outage",
        ),
        (
            lambda s: setattr(s.cml, "last_error", Problem(reason="IdentityMismatch", message="other", at=NOW)),
            {"CMLIdentityMismatch": "True/IdentityMismatch", "Ready": "False/IdentityMismatch"},
            "one foreign answer is enough",
        ),
        (
            lambda s: setattr(s.ec2, "last_error", Problem(reason="Throttled", message="slow", at=NOW)),
            {"EC2Provisioned": "True/InstanceRunning", "Ready": "True/Unlicensed"},
            "an error of EC2's is no word on the instance",
        ),
        (lambda s: setattr(s.ec2, "state", "stopping"), {"Ready": "False/InstanceNotRunning"}, "it is going down"),
        (
            lambda s: s.allocations.update({str(n): Allocation() for n in range(20)}),
            {"CapacityAvailable": "False/Full", "AcceptingLabs": "False/Full", "Ready": "True/Unlicensed"},
            "full is not broken",
        ),
    ],
)
def test_conditions_tell_what_changed(change: Any, expected: dict[str, str], why: str) -> None:
    worker = a_ready_worker()
    change(worker.status)
    refresh(worker, NOW)
    assert told(worker).items() >= expected.items(), why


def test_a_mismatch_tells_how_the_other_cml_is_taken() -> None:
    worker = a_ready_worker()
    worker.status.cml.last_error = Problem(reason="IdentityMismatch", message="it is another", at=NOW)
    for pinned, needs_more in ((None, False), ("ab" * 32, True)):
        worker.spec.cml.tls.fingerprint = pinned
        refresh(worker, NOW)
        told = worker.status.condition("CMLIdentityMismatch")
        assert told is not None
        assert told.message.startswith("it is another; ")
        assert TRUST_ANNOTATION in told.message
        assert ("spec.cml.tls.fingerprint" in told.message) is needs_more


def test_columns_fields_and_indexes_read_any_worker() -> None:
    for worker in (created(), a_ready_worker()):
        for column in LAB_WORKER.columns:
            column.value(worker)
        assert LAB_WORKER.fields["spec.labTrack"](worker) == ""
        assert list(LAB_WORKER.indexes["phase"](worker)) == [worker.status.phase]


async def test_queries_find_workers_by_track_phase_and_readiness() -> None:
    storage, clock = MemoryStorage(), SystemClock()
    registry = Registry(plugin.kinds)
    client = Client(storage, registry, clock, owner="workers")
    for name, track in (("a", "ccna"), ("b", "ccna"), ("c", "ccnp")):
        wanted = parse(name, labTrack=track)
        made = await client.create(LabWorker(metadata=ObjectMeta(name=name), spec=wanted.spec))
        if name == "c":
            continue

        def serve(worker: LabWorker, name: str = name) -> None:
            ready = a_ready_worker()
            worker.status = ready.status
            if name == "b":
                enter(worker, Phase.DRAINING, "x", NOW)
                refresh(worker, NOW)

        await client.update_status(made, serve)
    cache = Cache(storage, registry, clock)
    running = asyncio.create_task(cache.run())
    try:
        await cache.wait_synced()

        def names(found: list[LabWorker]) -> list[str]:
            return [w.name for w in found]

        assert names(queries.by_track(cache, "ccna")) == ["a", "b"]
        assert names(queries.by_phase(cache, Phase.PENDING)) == ["c"]
        assert names(queries.active(cache)) == ["a", "b"]
        assert names(queries.ready(cache)) == ["a"]
        assert names(queries.draining(cache)) == ["b"]
        assert queries.by_track(cache, "ccna", "elsewhere") == []
        assert queries.count_by_phase(cache) == {"ReadyUnlicensed": 1, "Draining": 1, "Pending": 1}
        assert queries.count_by_track(cache) == {"ccna": 2, "ccnp": 1}
    finally:
        running.cancel()
        await asyncio.wait([running])
        await storage.aclose()


def test_a_url_template_with_an_unknown_part_is_refused_at_start() -> None:
    with pytest.raises(ValueError, match="knows instance_id"):
        WorkerSettings(cml_url_template="https://{host}")
    assert WorkerSettings(cml_url_template="http://x/{instance_id}/{name}").cml_url_template
