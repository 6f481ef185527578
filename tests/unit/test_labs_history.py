"""How a lab's data enters its record: what is history, what is refreshed, what is no change at all."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from controllers.cml.models import Lab
from controllers.labs.history import first_status, is_news, mark_listed, mark_missing, observe
from controllers.labs.kind import LAB_RECORD, LabRecord, LabRecordSpec, LabRecordStatus
from lrm.resource import ObjectMeta
from storage.base import Entry

START = datetime(2026, 1, 1, tzinfo=UTC)
LATER = START + timedelta(minutes=30)
TOLD: dict[str, Any] = {
    "id": "90f84e38-a71c-4d57-8d90-00fa8a197385",
    "lab_title": "OSPF",
    "lab_description": "areas",
    "lab_notes": "notes",
    "state": "STOPPED",
    "owner": "user-1",
    "owner_username": "alice",
    "owner_fullname": "Alice A.",
    "node_count": 3,
    "link_count": 2,
    "groups": [{"id": "g2"}, {"id": "g1"}],
    "created": "2026-08-20 17:25:30",
    "modified": "2026-08-20T17:25:30+00:00",
}


def told(**changes: Any) -> Lab:
    return Lab.model_validate({**TOLD, **changes})


def status_of(lab: Lab) -> LabRecordStatus:
    return first_status(lab, instance_id="i-1", now=START)


def seen(status: LabRecordStatus, lab: Lab, *, keep: int = 50, now: datetime = LATER) -> LabRecordStatus:
    after = status.thaw()
    observe(after, lab, instance_id="i-1", now=now, keep=keep)
    return after


def test_a_new_status_has_everything_and_no_history() -> None:
    wire = status_of(told()).wire()
    assert wire.pop("conditions")[0]["type"] == "Ready"
    assert wire == {
        "observedGeneration": 1,
        "phase": "Present",
        "phaseHistory": [],
        "title": "OSPF",
        "description": "areas",
        "notes": "notes",
        "state": "STOPPED",
        "owner": "user-1",
        "ownerUsername": "alice",
        "ownerFullname": "Alice A.",
        "nodeCount": 3,
        "linkCount": 2,
        "groups": ["g1", "g2"],
        "cmlCreatedAt": "2026-08-20T17:25:30Z",
        "modifiedAt": "2026-08-20T17:25:30Z",
        "instanceId": "i-1",
        "firstSeenAt": "2026-01-01T00:00:00Z",
        "missingLists": 0,
        "operationHistory": [],
        "pastOperations": [],
    }


def test_the_same_again_is_no_news() -> None:
    status = status_of(told())
    assert not is_news(status, told(groups=[{"id": "g1"}, {"id": "g2"}]), "i-1")
    assert seen(status, told()) == status


@pytest.mark.parametrize(
    ("field", "value", "name", "old"),
    [
        ("state", "STARTED", "state", "STOPPED"),
        ("lab_title", "BGP", "title", "OSPF"),
        ("node_count", 0, "nodeCount", 3),
        ("link_count", 5, "linkCount", 2),
    ],
)
def test_a_remembered_field_makes_one_entry(field: str, value: Any, name: str, old: Any) -> None:
    after = seen(status_of(told()), told(**{field: value}))
    (entry,) = after.operation_history
    assert entry.timestamp == LATER
    assert (entry.previous_state, entry.new_state) == ("STOPPED", after.state)
    assert {k: (v.old, v.new) for k, v in entry.changed_fields.items()} == {name: (old, value)}


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("lab_description", ""),
        ("lab_notes", "other"),
        ("owner", "user-2"),
        ("owner_fullname", "Bob"),
        ("groups", []),
        ("modified", "2027-01-01T00:00:00+00:00"),
    ],
)
def test_other_fields_are_refreshed_without_an_entry(field: str, value: Any) -> None:
    before = status_of(told())
    assert is_news(before, told(**{field: value}), "i-1")
    after = seen(before, told(**{field: value}))
    assert after != before
    assert after.operation_history == []


def test_what_cml_does_not_tell_keeps_its_value() -> None:
    silent = {k: None for k in TOLD if k not in {"id", "state", "groups"}}
    assert not is_news(status_of(told()), told(**silent), "i-1")


def test_learning_a_count_for_the_first_time_is_not_a_change() -> None:
    after = seen(status_of(told(node_count=None)), told())
    assert (after.node_count, after.operation_history) == (3, [])


def test_the_history_is_a_ring() -> None:
    status = status_of(told(node_count=0))
    for n in range(1, 8):
        status = seen(status, told(node_count=n), keep=3, now=START + timedelta(minutes=n))
    assert [e.changed_fields["nodeCount"].new for e in status.operation_history] == [5, 6, 7]


def test_missing_and_back_again() -> None:
    status = status_of(told())
    mark_missing(status, 1, seen=START, now=LATER)
    assert (status.phase, status.missing_since, status.last_synced_at) == ("Missing", LATER, START)
    mark_missing(status, 2, seen=LATER, now=LATER + timedelta(minutes=30))
    assert (status.missing_since, status.last_synced_at, status.missing_lists) == (LATER, START, 2)
    assert is_news(status, told(), "i-1"), "the same data, but it is there again"
    back = seen(status, told(), now=LATER + timedelta(minutes=60))
    assert (back.phase, back.missing_since, back.last_synced_at, back.missing_lists) == ("Present", None, None, 0)
    assert back.operation_history == []


def test_listed_again_without_its_data_it_is_present_but_was_last_seen_when_it_was() -> None:
    status = status_of(told())
    mark_missing(status, 1, seen=START, now=LATER)
    mark_listed(status, now=LATER + timedelta(minutes=30))
    assert (status.phase, status.missing_since, status.missing_lists, status.missing_counted_at) == (
        "Present",
        None,
        0,
        None,
    )
    assert status.last_synced_at == START, "its data are as old as before"
    missing = status.thaw()
    mark_missing(missing, 1, seen=LATER, now=LATER + timedelta(minutes=60))
    assert missing.last_synced_at == START
    assert is_news(status, told(), "i-1"), "the same data, but read again"
    assert seen(status, told()).last_synced_at is None


def test_a_lone_surrogate_which_no_json_takes_is_replaced_once_and_is_then_no_news() -> None:
    lab = told(lab_title="bad \ud800 title", groups=["g\udfff"])
    status = status_of(lab)
    assert (status.title, status.groups) == ("bad ? title", ["g?"])
    assert not is_news(status, lab, "i-1")


texts = st.one_of(st.none(), st.integers(), st.text(st.characters(), max_size=80), st.lists(st.text(max_size=3)))


@settings(deadline=None)
@given(st.fixed_dictionaries({k: texts for k in TOLD if k != "id"}))
def test_whatever_cml_tells_can_be_stored_read_and_is_then_no_news(values: dict[str, Any]) -> None:
    """Control characters, lone surrogates, numbers and lists where texts were due."""
    lab = told(**values)
    made = LabRecord(
        metadata=ObjectMeta(name=f"w1-{lab.id}"),
        spec=LabRecordSpec(worker_ref="w1", lab_id=lab.id),
        status=status_of(lab),
    )
    stored = LAB_RECORD.encode(made)
    json.loads(stored)
    read = LAB_RECORD.decode(Entry("k", stored, 1, 1))
    assert not is_news(read.status, lab, "i-1")
