"""The LabRecord kind: what is refused, what is served, who may write what; and the steps towards a state."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest

from controllers.labs.desired import REACHED, WAIT, Step, next_step
from controllers.labs.flat import flat
from controllers.labs.kind import LAB_RECORD, LabRecord, LabRecordSpec, LabRecordStatus
from controllers.workers.kind import LabWorker
from controllers.workers.spec import LabWorkerSpec
from lrm import writes
from lrm.errors import Forbidden, Invalid
from lrm.resource import AnyResource, ObjectMeta

NOW = datetime(2026, 1, 1, tzinfo=UTC)
LAB = "90f84e38-a71c-4d57-8d90-00fa8a197385"


def record() -> LabRecord:
    wanted = LabRecord(metadata=ObjectMeta(name=f"w1-{LAB}"), spec=LabRecordSpec(worker_ref="w1", lab_id=LAB))
    return writes.for_create(LAB_RECORD, wanted, uid="u", now=NOW)


def changed(path: str, value: object) -> LabRecord:
    wanted = record()
    setattr(wanted.spec, path, value)
    return wanted


@pytest.mark.parametrize(("field", "wire"), [("worker_ref", "spec.workerRef"), ("lab_id", "spec.labId")])
def test_which_lab_a_record_is_of_cannot_be_changed(field: str, wire: str) -> None:
    with pytest.raises(Invalid) as refusal:
        writes.for_update(LAB_RECORD, record(), changed(field, "other"))
    assert wire in {c.field for c in refusal.value.causes}


def test_a_desired_state_is_taken_in_any_case_and_only_of_the_three() -> None:
    document = {
        "apiVersion": "lab.neuroglia.io/v1",
        "kind": "LabRecord",
        "metadata": {"name": f"w1-{LAB}"},
        "spec": {"worker_ref": "w1", "labId": LAB, "desiredState": "started"},
    }
    parsed, _ = LAB_RECORD.parse(document)
    assert parsed.spec.desired_state == "STARTED"
    with pytest.raises(Invalid) as refusal:
        LAB_RECORD.parse({**document, "spec": {"workerRef": "w1", "labId": LAB, "desiredState": "BOOTED"}})
    assert [c.field for c in refusal.value.causes] == ["spec.desiredState"]


def test_a_desired_state_raises_the_generation_and_what_is_mirrored_does_not() -> None:
    asked = writes.for_update(LAB_RECORD, record(), changed("desired_state", "STARTED"))
    assert isinstance(asked, writes.Put)
    assert asked.resource.metadata.generation == 2


@pytest.mark.parametrize(
    ("field", "value", "owner"),
    [
        ("title", "x", "labs"),
        ("state", "STARTED", "labs"),
        ("missing_lists", 3, "labs"),
        ("observed_generation", 3, "lab-records"),
    ],
)
def test_each_status_field_has_one_writer(field: str, value: object, owner: str) -> None:
    wanted = record()
    setattr(wanted.status, field, value)
    assert isinstance(writes.for_status(LAB_RECORD, record(), wanted, owner=owner), writes.Put)
    for other in {"labs", "lab-records", "workers"} - {owner}:
        with pytest.raises(Forbidden):
            writes.for_status(LAB_RECORD, record(), wanted, owner=other)


def test_users_are_told_why_they_cannot_make_one() -> None:
    assert "sync" in LAB_RECORD.create_refusal


def test_last_synced_is_served_from_the_worker_and_never_before_the_lab_was_seen() -> None:
    worker = LabWorker(metadata=ObjectMeta(name="w1"), spec=LabWorkerSpec.model_validate({"region": "us-east-1"}))
    worker.status.labs_synced_at = NOW

    def look_up(kind: str, _namespace: str, name: str) -> AnyResource | None:
        return worker if (kind, name) == ("LabWorker", "w1") else None

    present = LAB_RECORD.present
    assert present is not None
    stored = record()
    stored.status.first_seen_at = NOW - timedelta(hours=1)
    stored.seal()
    assert present(stored, look_up).status.last_synced_at == NOW
    assert present(stored, lambda *_: None).status.last_synced_at == NOW - timedelta(hours=1)
    assert stored.status.last_synced_at is None
    fresh = stored.thaw()
    fresh.status.first_seen_at = NOW + timedelta(minutes=1)
    assert present(fresh, look_up).status.last_synced_at == NOW + timedelta(minutes=1)
    missing = stored.thaw()
    missing.status.missing_since, missing.status.last_synced_at = NOW, NOW - timedelta(minutes=30)
    assert present(missing, look_up).status.last_synced_at == NOW - timedelta(minutes=30)
    unread = stored.thaw()
    unread.status.last_synced_at = NOW - timedelta(minutes=30)
    assert present(unread, look_up).status.last_synced_at == NOW - timedelta(minutes=30), "listed, but not read again"


@pytest.mark.parametrize(
    ("wanted", "state", "step", "why"),
    [
        ("STARTED", "DEFINED_ON_CORE", Step.START, "never started"),
        ("STARTED", "STOPPED", Step.START, "stopped"),
        ("STARTED", "STARTED", REACHED, "there"),
        ("STOPPED", "STARTED", Step.STOP, "runs"),
        ("STOPPED", "STOPPED", REACHED, "there"),
        ("STOPPED", "DEFINED_ON_CORE", REACHED, "does not run"),
        ("DEFINED_ON_CORE", "STARTED", Step.STOP, "stop comes first"),
        ("DEFINED_ON_CORE", "STOPPED", Step.WIPE, "then wipe"),
        ("DEFINED_ON_CORE", "DEFINED_ON_CORE", REACHED, "there"),
        ("STARTED", "QUEUED", WAIT, "on its way"),
        ("DEFINED_ON_CORE", "", WAIT, "a state that is none"),
    ],
)
def test_the_next_step(wanted: str, state: str, step: Step | bool | None, why: str) -> None:
    assert next_step(wanted, state) is step, why


def test_a_record_whose_lab_is_missing_says_so_where_its_state_stands() -> None:
    made = LabRecord(metadata=ObjectMeta(name="w1-x"), spec=LabRecordSpec(worker_ref="w1", lab_id="x"))
    state = next(column for column in LAB_RECORD.columns if column.name == "State")
    made.status.state, made.status.phase = "STARTED", "Present"
    assert state.value(made) == "STARTED"
    made.status.phase = "Missing"
    assert state.value(made) == "Missing"


def test_the_flat_form_has_each_value_under_the_key_that_clients_know() -> None:
    made = LabRecord(metadata=ObjectMeta(name="w1-x"), spec=LabRecordSpec(worker_ref="w1", lab_id="x"))
    made.status = LabRecordStatus(
        phase="Present",
        title="OSPF",
        description="areas",
        notes="day 1",
        state="STARTED",
        owner="u-1",
        owner_username="ann",
        owner_fullname="Ann Example",
        node_count=3,
        link_count=2,
        groups=["g-1"],
        cml_created_at=datetime(2026, 1, 1, tzinfo=UTC),
        modified_at=datetime(2026, 1, 2, tzinfo=UTC),
        first_seen_at=datetime(2026, 1, 3, tzinfo=UTC),
    )
    assert flat(made, datetime(2026, 1, 4, tzinfo=UTC)) == {
        "id": "x",
        "title": "OSPF",
        "description": "areas",
        "notes": "day 1",
        "state": "STARTED",
        "owner": "Ann Example",
        "owner_username": "ann",
        "node_count": 3,
        "link_count": 2,
        "created": "2026-01-01T00:00:00Z",
        "modified": "2026-01-02T00:00:00Z",
        "groups": ["g-1"],
        "last_synced": "2026-01-04T00:00:00Z",
    }
    empty = LabRecord(metadata=ObjectMeta(name="w1-x"), spec=LabRecordSpec(worker_ref="w1", lab_id="x"))
    assert [flat(empty, None)[key] for key in ("created", "modified", "last_synced", "node_count")] == [None] * 4
