"""Decoding is tolerant, input is strict, and every mistake is told at once with its path."""

from __future__ import annotations

from datetime import UTC, datetime

import orjson
import pytest

from equipment.widget import WIDGETS, Phase, Widget, WidgetStatus, widget
from lrm.errors import Invalid, Undecodable
from lrm.model import rfc3339
from storage.base import Entry

NOW = datetime(2026, 3, 1, 12, tzinfo=UTC)


def parsed_causes(document: dict[str, object], **options: str) -> dict[str, str]:
    with pytest.raises(Invalid) as caught:
        WIDGETS.parse(document, **options)
    return {c.field: c.message for c in caught.value.causes}


def test_every_mistake_is_reported_at_once_with_its_path() -> None:
    causes = parsed_causes(
        {
            "metadata": {"name": "Bad_Name", "labels": {"a b": "x" * 64}},
            "statuz": 1,
            "spec": {"count": "many", "parts": [{"sizeGb": 0}, {"sizeGb": 1, "weight": 3}], "color": "red"},
        }
    )
    assert causes.keys() >= {"spec.labTrack", "spec.count", "spec.parts[0].sizeGb", "spec.color"}
    assert causes.keys() >= {"metadata.name", "metadata.labels", "statuz"}
    assert causes["spec.labTrack"] == "required value"


def test_unknown_fields_of_an_otherwise_good_document_are_refused_with_their_path() -> None:
    spec = {"labTrack": "t", "parts": [{"sizeGb": 1, "weight": 3}], "color": "red"}
    causes = parsed_causes({"metadata": {"name": "a", "lables": {}}, "spec": spec})
    assert causes.keys() == {"metadata.lables", "spec.color", "spec.parts[0].weight"}


def test_warn_and_ignore_drop_unknown_fields() -> None:
    document = {
        "metadata": {"name": "a"},
        "spec": {"labTrack": "t", "parts": [{"sizeGb": 1, "weight": 3}], "color": "red"},
    }
    resource, warnings = WIDGETS.parse(document, unknown="Warn")
    assert warnings == ['unknown field "spec.color"', 'unknown field "spec.parts[0].weight"']
    assert b"weight" not in WIDGETS.encode(resource)
    assert b"color" not in WIDGETS.encode(resource)
    assert WIDGETS.parse(document, unknown="Ignore")[1] == []


@pytest.mark.parametrize(
    ("name", "good"),
    [
        ("a", True),
        ("a.b-c.d", True),
        ("a" * 253, True),
        ("a" * 254, False),
        ("-a", False),
        ("a-", False),
        ("A", False),
        ("a_b", False),
        ("a..b", False),
        ("a/b", False),
        ("ä", False),
        ("a\n", False),
    ],
)
def test_names_follow_dns_1123(name: str, good: bool) -> None:
    document = {"metadata": {"name": name}, "spec": {"labTrack": "t"}}
    if good:
        assert WIDGETS.parse(document)[0].name == name
    else:
        assert "metadata.name" in parsed_causes(document)


@pytest.mark.parametrize("key", ["spec", "metadata"])
@pytest.mark.parametrize("value", [None, [], "x", 3])
def test_a_part_of_the_wrong_shape_is_a_mistake_not_a_crash(key: str, value: object) -> None:
    document: dict[str, object] = {"metadata": {"name": "a"}, "spec": {"labTrack": "t"}}
    assert parsed_causes({**document, key: value})


def test_snake_case_is_accepted_and_camel_case_is_written() -> None:
    resource, _ = WIDGETS.parse(
        {"metadata": {"name": "a"}, "spec": {"lab_track": "t", "starts_at": "2026-01-01T00:00:00+02:00"}}
    )
    stored = orjson.loads(WIDGETS.encode(resource))
    assert stored["spec"] == {"labTrack": "t", "count": 1, "parts": [], "startsAt": "2025-12-31T22:00:00Z"}


def test_a_time_without_zone_is_refused() -> None:
    causes = parsed_causes({"metadata": {"name": "a"}, "spec": {"labTrack": "t", "startsAt": "2026-01-01T00:00:00"}})
    assert "zone" in causes["spec.startsAt"]


def test_a_stored_object_round_trips_exactly_including_fields_of_a_newer_version() -> None:
    document = {
        "apiVersion": "test.neuroglia.io/v1",
        "kind": "Widget",
        "metadata": {"name": "a", "namespace": "default", "uid": "u", "generation": 3, "shard": "7"},
        "spec": {
            "labTrack": "t",
            "count": 2,
            "parts": [{"sizeGb": 4, "weight": 3.5}],
            "startsAt": "2026-01-01T00:00:00.25Z",
            "flavour": {"deep": [1, None]},
        },
        "status": {
            "observedGeneration": 1,
            "phase": "Ready",
            "conditions": [],
            "seen": 1,
            "allocations": {},
            "phaseHistory": [{"from": "Pending", "to": "Ready", "at": "2026-01-01T00:00:00Z", "reason": "r"}],
            "mood": "good",
        },
    }
    entry = Entry("/lrm/r/widgets/default/a", orjson.dumps(document), 42, 40)
    resource = WIDGETS.decode(entry)
    assert resource.metadata.resource_version == "42"
    assert resource.status.phase is Phase.READY
    again = orjson.loads(WIDGETS.encode(resource))
    document["spec"]["startsAt"] = "2026-01-01T00:00:00.250000Z"  # type: ignore[index]
    document["spec"]["flavour"] = {"deep": [1, None]}  # type: ignore[index]
    assert again == document


@pytest.mark.parametrize("value", [b"", b"{", b"[]", b'{"spec": {}}', b"\xff\xfe", b'{"metadata":{"name":1}}'])
def test_a_value_that_cannot_be_decoded_names_its_key(value: bytes) -> None:
    with pytest.raises(Undecodable, match="/lrm/r/widgets/default/a"):
        WIDGETS.decode(Entry("/lrm/r/widgets/default/a", value, 2, 2))


def test_sealed_objects_cannot_be_changed_and_thawed_copies_can() -> None:
    shared = widget(parts=[{"sizeGb": 1}]).seal()
    for part, field in ((shared.spec, "count"), (shared.metadata, "name"), (shared.spec.parts[0], "size_gb")):
        with pytest.raises(TypeError, match="read-only"):
            setattr(part, field, 5)
    copy = shared.thaw()
    copy.spec.parts[0].size_gb = 9
    assert shared.spec.parts[0].size_gb == 1


def test_a_thawed_copy_shares_nothing_that_can_be_changed() -> None:
    written_by_a_newer_version = {"sizeGb": 1, "tray": {"slots": [1]}}
    shared = widget(parts=[written_by_a_newer_version]).seal()
    before = WIDGETS.encode(shared)
    copy = shared.thaw()
    copy.metadata.labels["a"] = "b"
    copy.metadata.finalizers.append("test/f")
    copy.status.allocations["u"] = 1
    copy.spec.parts[0].model_extra["tray"]["slots"].append(2)  # type: ignore[index]
    copy.spec.parts.append(copy.spec.parts[0])
    assert WIDGETS.encode(shared) == before
    assert copy.spec.parts[0].wire() == {"sizeGb": 1, "tray": {"slots": [1, 2]}}
    assert copy.spec.parts[0].thaw() == copy.spec.parts[0]


def test_a_shallow_copy_may_be_changed_while_its_parts_stay_shared() -> None:
    shared = widget().seal()
    copy = shared.model_copy()
    copy.status = shared.status.model_copy(update={"seen": 4})
    assert (copy.status.seen, shared.status.seen) == (4, 0)
    with pytest.raises(TypeError, match="read-only"):
        copy.spec.count = 2


def test_a_condition_keeps_its_time_while_its_status_stays() -> None:
    status = WidgetStatus()
    later = datetime(2026, 3, 2, tzinfo=UTC)
    status.set_condition("Ready", status=False, reason="Booting", message="", now=NOW)
    status.set_condition("Ready", status=False, reason="Licensing", message="x", now=later)
    ready = status.condition("Ready")
    assert ready
    assert (ready.reason, ready.last_transition_time) == ("Licensing", NOW)
    status.set_condition("Ready", status=True, reason="Ready", message="", now=later)
    ready = status.condition("Ready")
    assert ready
    assert ready.last_transition_time == later
    assert len(status.conditions) == 1


def test_phase_history_keeps_the_last_fifty() -> None:
    status = WidgetStatus()
    for i in range(60):
        status.enter(Phase.READY if i % 2 == 0 else Phase.FAILED, f"r{i}", NOW)
    assert len(status.phase_history) == 50
    assert status.phase_history[-1].reason == "r59"
    assert rfc3339(status.phase_history[0].at) == "2026-03-01T12:00:00Z"


def test_foreign_changes_name_field_and_owner() -> None:
    old, new = Widget.model_validate(widget().wire()).status, widget().status
    new.seen = 1
    new.allocations = {"u": 1}
    new.set_condition("Allocated", status=True, reason="R", message="", now=NOW)
    assert WIDGETS.foreign_changes(old, new, "widgets") == [
        ("allocations", "allocator"),
        ("conditions[Allocated]", "allocator"),
    ]
    assert WIDGETS.foreign_changes(old, new, "allocator") == [("seen", "widgets")]


def test_a_sealed_object_equals_its_copy_and_is_stored_the_same() -> None:
    shared = widget(parts=[{"sizeGb": 1}]).seal()
    assert shared == shared.thaw()
    assert WIDGETS.encode(shared) == WIDGETS.encode(shared.thaw())
    shared_status, copy = shared.status, shared.thaw().status
    assert WIDGETS.foreign_changes(shared_status, copy, "nobody") == []
