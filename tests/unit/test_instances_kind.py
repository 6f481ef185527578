"""What a lab instance may ask for, and what may change when."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import pytest

from controllers.instances.kind import LAB_INSTANCE_REQUEST, LabInstanceRequest
from controllers.instances.phases import FINAL, PLACED, TRANSITIONS, WAITING, Phase
from controllers.instances.places import wanted_of
from controllers.instances.quantity import told_bytes, told_cores
from lrm.errors import Invalid
from lrm.writes import Put, for_create, for_update

NOW = datetime(2026, 3, 1, 9, tzinfo=UTC)
BASE: dict[str, Any] = {"labTemplate": "lab:1", "studentEmail": "ann@example.edu", "durationMinutes": 60}
TOPOLOGY = {"topology": "nodes: []"}


def request(**spec: Any) -> LabInstanceRequest:
    document = {"metadata": {"name": "a"}, "spec": {**BASE, **spec}}
    parsed, _ = LAB_INSTANCE_REQUEST.parse({k: v for k, v in document.items() if v is not None})
    return for_create(LAB_INSTANCE_REQUEST, parsed, uid="u", now=NOW)


@pytest.mark.parametrize(
    ("spec", "field"),
    [
        pytest.param({"studentEmail": "ann"}, "spec.studentEmail", id="no address"),
        pytest.param({"studentEmail": "a b@example.edu"}, "spec.studentEmail", id="a space"),
        pytest.param({"studentEmail": "ann@example"}, "spec.studentEmail", id="no domain"),
        pytest.param({"durationMinutes": 0}, "spec.durationMinutes", id="no time"),
        pytest.param({"durationMinutes": -1}, "spec.durationMinutes", id="less than no time"),
        pytest.param({"durationMinutes": 10**9}, "spec.durationMinutes", id="for two thousand years"),
        pytest.param({"durationMinutes": 1.5}, "spec.durationMinutes", id="half a minute"),
        pytest.param({"durationMinutes": True}, "spec.durationMinutes", id="no number"),
        pytest.param({"durationMinutes": 7 * 24 * 60 + 1}, "spec.durationMinutes", id="more than a week"),
        pytest.param({"labTemplate": {}}, "spec.labTemplate", id="of nothing"),
        pytest.param({"labTemplate": {"image": "a", **TOPOLOGY}}, "spec.labTemplate", id="of two things"),
        pytest.param({"labTemplate": {**TOPOLOGY, "ports": [80]}}, "spec.labTemplate", id="a topology with ports"),
        pytest.param({"labTemplate": "-rm"}, "spec.labTemplate.image", id="an image that looks like an option"),
        pytest.param({"labTemplate": "a b"}, "spec.labTemplate.image", id="an image with a space"),
        pytest.param({"labTemplate": "a/../../b"}, "spec.labTemplate.image", id="an image with steps up"),
        pytest.param({"labTemplate": "a/.."}, "spec.labTemplate.image", id="a step up at its end"),
        pytest.param({"labTemplate": "a//b"}, "spec.labTemplate.image", id="a step to nothing"),
        pytest.param({"labTemplate": "a/"}, "spec.labTemplate.image", id="a slash at its end"),
        pytest.param({"labTemplate": "a:"}, "spec.labTemplate.image", id="a tag of nothing"),
        pytest.param({"labTemplate": {"image": "a", "ports": [0]}}, "spec.labTemplate.ports", id="no port"),
        pytest.param({"labTemplate": {"image": "a", "ports": [80, 80]}}, "spec.labTemplate.ports", id="a port twice"),
        pytest.param({"labTemplate": {"topologyFile": "x"}}, "spec.labTemplate.topologyFile", id="a relative path"),
        pytest.param({"labTemplate": {"topologyUrl": "ftp://x/y"}}, "spec.labTemplate.topologyUrl", id="ftp"),
        pytest.param({"labTemplate": {"topologyUrl": "http://u:p@x/y"}}, "spec.labTemplate.topologyUrl", id="a login"),
        pytest.param({"runtime": "CML"}, "spec.runtime", id="an image on CML"),
        pytest.param({"labTemplate": TOPOLOGY, "runtime": "Container"}, "spec.runtime", id="a topology on an engine"),
        pytest.param({"labTrack": "ccna"}, "spec.labTrack", id="a container with a track"),
        pytest.param({"environment": {"A": "x\x1by"}}, "spec.environment", id="an escape sequence"),
        pytest.param({"environment": {"A": "x\ny"}}, "spec.environment", id="a second line"),
        pytest.param({"environment": {"A": "x\ty"}}, "spec.environment", id="a tab"),
        pytest.param({"environment": {"A": "x\x9b31my"}}, "spec.environment", id="an escape sequence of one character"),
        pytest.param({"environment": {"A": "x\u202ey"}}, "spec.environment", id="text turned around"),
        pytest.param({"environment": {"A": "x\u2028y"}}, "spec.environment", id="a second line of another kind"),
        pytest.param({"environment": {"A": "x\x00y"}}, "spec.environment", id="an end of a C string"),
        pytest.param({"environment": {"A\n": "x"}}, "spec.environment", id="a name with a second line"),
        pytest.param({"environment": {"A=B": "x"}}, "spec.environment", id="a name with ="),
        pytest.param({"environment": {"A": "x" * 40_000}}, "spec.environment", id="too much"),
        pytest.param({"resources": {"cpu": "1x"}}, "spec.resources.cpu", id="no quantity"),
        pytest.param({"resources": {"cpu": 0}}, "spec.resources.cpu", id="no cpu"),
        pytest.param({"resources": {"cpu": "9m"}}, "spec.resources.cpu", id="less cpu than a kernel takes"),
        pytest.param({"resources": {"cpu": 0.00001}}, "spec.resources.cpu", id="hardly any cpu"),
        pytest.param({"resources": {"memory": "1Ki"}}, "spec.resources.memory", id="less than an engine takes"),
        pytest.param({"resources": {"memory": "100m"}}, "spec.resources.memory", id="a part of a byte"),
        pytest.param({"scheduledStartTime": "2026-03-01T10:00:00"}, "spec.scheduledStartTime", id="no zone"),
        pytest.param({"scheduledStartTime": "0001-01-01T00:00:00Z"}, "spec.scheduledStartTime", id="no year of ours"),
        pytest.param({"scheduledStartTime": "9999-12-31T23:59:59Z"}, "spec.scheduledStartTime", id="nor is this"),
        pytest.param({"privileged": True}, "spec.privileged", id="there is no such flag"),
    ],
)
def test_what_cannot_be_is_refused_with_its_field(spec: dict[str, Any], field: str) -> None:
    with pytest.raises(Invalid) as refused:
        request(**spec)
    assert field in [cause.field for cause in refused.value.causes]


@pytest.mark.parametrize(
    ("said", "cpu", "memory"),
    [
        ({"cpu": "500m", "memory": "256Mi"}, 0.5, 256 * 1024**2),
        ({"cpu": 2, "memory": 10**9}, 2.0, 10**9),
        ({"cpu": "1.5", "memory": "1G"}, 1.5, 10**9),
        ({"cpu": "10m", "memory": "6Mi"}, 0.01, 6 * 1024**2),
    ],
)
def test_resources_are_quantities_as_kubernetes_writes_them(said: dict[str, Any], cpu: float, memory: int) -> None:
    resources = request(resources=said).spec.resources
    assert (resources.cpu, resources.memory) == (cpu, memory)


@pytest.mark.parametrize(
    ("amount", "told"),
    [
        (512, "512 bytes"),
        (1536, "1.5 KiB"),
        (256 * 1024**2, "256 MiB"),
        (1000 * 1024**2, "1000 MiB"),
        (10**9, "953.67 MiB"),
        (1024**3, "1 GiB"),
        (100 * 1024**3, "100 GiB"),
        (1536 * 1024**2, "1.5 GiB"),
        (64 * 1024**4, "64 TiB"),
    ],
)
def test_bytes_are_told_as_people_write_them(amount: int, told: str) -> None:
    assert told_bytes(amount) == told


@pytest.mark.parametrize(
    ("amount", "told"),
    [
        (1, "1 core"),
        (2.0, "2 cores"),
        (0.5, "0.5 cores"),
        (1000.0, "1000 cores"),
        (1e-4, "0.0001 cores"),
        (0.1 + 0.2, "0.3 cores"),
    ],
)
def test_cores_are_told_as_people_write_them(amount: float, told: str) -> None:
    assert told_cores(amount) == told


def test_a_text_alone_is_an_image_and_says_where_it_runs() -> None:
    assert request().spec.lab_template.image == "lab:1"
    assert request().spec.runs_in == "Container"
    assert request(labTemplate=TOPOLOGY).spec.runs_in == "CML"


@pytest.mark.parametrize(
    "image", ["a", "python:3.11-alpine", "registry.example.com:5000/team/lab__x:1.0_a", f"a/b@sha256:{'0' * 64}"]
)
def test_images_are_named_as_everywhere(image: str) -> None:
    assert request(labTemplate=image).spec.lab_template.image == image


def test_an_address_is_found_whatever_its_case() -> None:
    made = request(studentEmail="Ann@Example.EDU")
    assert list(LAB_INSTANCE_REQUEST.indexes["student"](made)) == ["ann@example.edu"]


STARTED = {"started_at": NOW}


@pytest.mark.parametrize(
    ("phase", "status", "change", "field"),
    [
        pytest.param("Pending", {}, {"labTemplate": "lab:2"}, "", id="while it waits all may change"),
        pytest.param("Pending", {}, {"durationMinutes": 10}, "", id="its time too"),
        pytest.param("Pending", STARTED, {"labTemplate": "lab:2"}, "spec.labTemplate", id="not while it begins again"),
        pytest.param("Provisioning", {}, {"labTemplate": "lab:2"}, "spec.labTemplate", id="not on its way"),
        pytest.param("Running", STARTED, {"environment": {"A": "1"}}, "spec.environment", id="not while it runs"),
        pytest.param("Running", STARTED, {"durationMinutes": 90}, "", id="an extension"),
        pytest.param("Running", STARTED, {"durationMinutes": 30}, "spec.durationMinutes", id="no shortening"),
        pytest.param("Running", STARTED, {"desiredPhase": "Stopped"}, "", id="stopping"),
        pytest.param("Timeout", STARTED, {"durationMinutes": 90}, "spec.durationMinutes", id="an extension too late"),
        pytest.param("Stopping", STARTED, {"durationMinutes": 90}, "spec.durationMinutes", id="also when stopped"),
        pytest.param("Completed", STARTED, {"durationMinutes": 90}, "spec", id="what is over is over"),
        pytest.param("Failed", STARTED, {"labTemplate": "lab:2", "durationMinutes": 5}, "", id="what failed is mended"),
    ],
)
def test_what_may_change_when(phase: str, status: dict[str, Any], change: dict[str, Any], field: str) -> None:
    old = request()
    old.status.phase = phase
    for key, value in status.items():
        setattr(old.status, key, value)
    new = request(**change)
    if not field:
        assert isinstance(for_update(LAB_INSTANCE_REQUEST, old, new), Put)
        return
    with pytest.raises(Invalid) as refused:
        for_update(LAB_INSTANCE_REQUEST, old, new)
    assert [cause.field for cause in refused.value.causes] == [field]


def test_a_wish_to_stop_is_not_taken_back() -> None:
    old, new = request(desiredPhase="Stopped"), request()
    old.status.phase = "Stopping"
    with pytest.raises(Invalid, match="create another one"):
        for_update(LAB_INSTANCE_REQUEST, old, new)


@pytest.mark.parametrize(
    ("stored", "due", "ends"),
    [
        ("0001-01-01T00:04:00Z", "0001-01-01T00:00:00Z", "2026-03-01T10:00:00Z"),
        ("9999-12-31T23:30:00Z", "9999-12-31T23:25:00Z", "9999-12-31T23:59:59.999999Z"),
    ],
)
def test_any_time_that_is_stored_already_can_be_worked_with(stored: str, due: str, ends: str) -> None:
    old = request()
    old.spec.scheduled_start_time, old.status.started_at = datetime.fromisoformat(stored), NOW
    begins = wanted_of(old, 300).begins
    assert (begins, old.due_at(300), old.ends_at) == (*[datetime.fromisoformat(due)] * 2, datetime.fromisoformat(ends))
    longer = old.thaw()
    longer.spec.duration_minutes = 90
    assert isinstance(for_update(LAB_INSTANCE_REQUEST, old, longer), Put), "what it has kept it may keep"


def test_every_phase_stands_in_the_table_and_every_way_ends() -> None:
    phases = {p.value for p in Phase}
    assert set(TRANSITIONS) == phases
    assert set(Phase) == WAITING | PLACED | FINAL
    for source, targets in TRANSITIONS.items():
        assert targets <= phases - {source}
        assert ("Failed" in targets) == (source not in ("Completed", "Failed"))
    assert TRANSITIONS["Completed"] == frozenset()
    assert "Running" not in TRANSITIONS["Pending"] | TRANSITIONS["Scheduling"], "nothing runs without a place"
