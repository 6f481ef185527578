"""CML's answers as models and as reasons: whatever is sent, nothing raises and nothing is made up."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel

from controllers.cml import models
from controllers.cml.answers import describe
from controllers.cml.models import Lab, Licensing, SystemHealth, SystemInformation, SystemStats, is_lab_id, parse_time

MODELS: list[type[BaseModel]] = [
    models.SystemInformation,
    models.SystemStats,
    models.SystemHealth,
    models.Licensing,
    models.Lab,
    models.NodeState,
    models.ImportResult,
    models.TelemetryEvent,
]
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=10),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=10), inner, max_size=3),
    max_leaves=10,
)


def test_the_warnings_of_an_import_are_text() -> None:
    told = ["Node **R 1**: image `a*b` **is** missing.", "2 ** 3 ** 4", "** no", "**a*b**", None]
    made = models.ImportResult.model_validate({"id": "1", "warnings": told})
    assert made.warnings == ("Node R 1: image `a*b` is missing.", "2 ** 3 ** 4", "** no", "**a*b**")


def field_names(model: type[BaseModel], seen: frozenset[type] = frozenset()) -> set[str]:
    names: set[str] = set()
    for name, field in model.model_fields.items():
        names.add(field.alias or name)
        for inner in [field.annotation, *getattr(field.annotation, "__args__", ())]:
            if isinstance(inner, type) and issubclass(inner, BaseModel) and inner not in seen:
                names |= field_names(inner, seen | {inner})
    return names


@pytest.mark.parametrize("model", MODELS, ids=lambda m: m.__name__)
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_no_object_makes_a_model_raise(model: type[BaseModel], data: st.DataObject) -> None:
    names = st.sampled_from(sorted(field_names(model)))
    nested = st.recursive(JSON, lambda inner: st.dictionaries(names, inner, max_size=6), max_leaves=20)
    value = data.draw(st.dictionaries(names, nested, max_size=8))
    model.model_validate(value)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("2026-08-20T17:25:30+00:00", datetime(2026, 8, 20, 17, 25, 30, tzinfo=UTC)),
        ("2026-08-20T17:25:30Z", datetime(2026, 8, 20, 17, 25, 30, tzinfo=UTC)),
        ("2026-08-20 17:25:30", datetime(2026, 8, 20, 17, 25, 30, tzinfo=UTC)),
        ("2026-08-20T19:25:30+02:00", datetime(2026, 8, 20, 17, 25, 30, tzinfo=UTC)),
        (" 2026-08-20T17:25:30.123456 ", datetime(2026, 8, 20, 17, 25, 30, 123456, tzinfo=UTC)),
        (1787246730, datetime(2026, 8, 20, 17, 25, 30, tzinfo=UTC)),
        ("", None),
        ("yesterday", None),
        ("0001-01-01T00:00:00+14:00", None),
        ("9999-12-31T23:59:59-14:00", None),
        (1e300, None),
        (float("nan"), None),
        (True, None),
        (None, None),
        ({}, None),
    ],
)
def test_times_are_read_in_both_formats_and_never_raise(text: Any, expected: datetime | None) -> None:
    assert parse_time(text) == expected


def test_readiness_is_true_only_when_cml_says_true() -> None:
    assert SystemInformation.model_validate({"version": "2.9.1+build.7", "ready": True, "oui": None}).ready
    for value in (1, "true", None, [True]):
        assert not SystemInformation.model_validate({"ready": value}).ready
    assert not SystemInformation.model_validate({}).ready


@pytest.mark.parametrize(
    ("registration", "authorization", "licensed"),
    [
        ("COMPLETED", "IN_COMPLIANCE", True),
        ("COMPLETED", "OUT_OF_COMPLIANCE", False),
        ("COMPLETED", "EVAL", False),
        ("IN_PROGRESS", "IN_COMPLIANCE", False),
        ("completed", "IN_COMPLIANCE", False),
        ("", "", False),
    ],
)
def test_only_completed_and_in_compliance_is_licensed(registration: str, authorization: str, licensed: bool) -> None:
    told = {"registration": {"status": registration}, "authorization": {"status": authorization}}
    found = Licensing.model_validate(told)
    assert found.is_licensed is licensed
    assert found.registration.status == registration


def test_what_cml_did_not_tell_of_a_lab_is_none_and_an_empty_text_is_an_empty_text() -> None:
    lab = Lab.model_validate({"id": "x", "lab_title": "t", "state": "QUEUED", "lab_notes": "", "groups": None})
    assert (lab.title, lab.notes, lab.description, lab.owner_fullname, lab.node_count) == ("t", "", None, None, None)
    assert (lab.state, lab.is_settled, lab.groups) == ("QUEUED", False, ())


def test_groups_are_read_as_ids_and_as_objects() -> None:
    assert Lab.model_validate({"groups": ["a", {"id": "b", "permission": "read_only"}, 5]}).groups == ("a", "b")


def test_stats_are_read_from_floats_and_with_parts_missing() -> None:
    stats = SystemStats.model_validate(
        {
            "all": {"cpu": {"count": 8.0, "percent": 12.5}, "memory": {"used": 1.5e9, "total": 4e9, "free": None}},
            "computes": {
                "a": {"hostname": "h", "stats": {"dominfo": {"running_nodes": 3, "running_orphans": None}}},
                "b": None,
                "c": {"stats": {"dominfo": {"running_nodes": 4.0}}},
            },
        }
    )
    assert (stats.totals.cpu.count, stats.totals.cpu.percent) == (8, 12.5)
    assert (stats.totals.memory.used, stats.totals.memory.free, stats.totals.disk.total) == (1500000000, None, None)
    assert stats.running_nodes == 7


def test_health_keeps_apart_false_and_not_told() -> None:
    health = SystemHealth.model_validate({"valid": None, "is_licensed": False, "computes": {"a": {"valid": "yes"}}})
    assert (health.valid, health.is_licensed, health.computes["a"].valid) == (None, False, None)


@pytest.mark.parametrize(
    ("body", "expected", "why"),
    [
        (b'{"code": 404, "description": "Lab not found: x"}', "Lab not found: x", "the documented shape"),
        (
            orjson.dumps(
                {
                    "code": 400,
                    "description": orjson.dumps(
                        {"Input validation failed": [{"location": ["query", "title"], "message": "too long"}]}
                    ).decode(),
                }
            ),
            "Input validation failed: query.title: too long",
            "validation errors are JSON inside text",
        ),
        (b'{"description": {"a": "b"}}', "a: b", "an object"),
        (b'{"description": ["a", "b"]}', "a; b", "a list"),
        (b'{"detail": [{"loc": ["body", "x"], "msg": "bad"}]}', "body.x: bad", "the framework's own shape"),
        (b'{"description": "{not json"}', "{not json", "text that looks like JSON"),
        (b'"plain"', "plain", "a JSON string"),
        (b"<html>secret</html>", "an HTML page", "a page is not quoted"),
        (b"Traceback: secret", "a text that is not JSON", "nor is other text"),
        (b"", "", "nothing"),
        (b'{"description": "a\\nb\\u0000\\u001b[31mc"}', "a b [31mc", "one printable line"),
        (b'{"description": "the token hush is wrong"}', "the token *** is wrong", "secrets are blotted out"),
    ],
)
def test_a_reason_is_one_line_in_every_shape_cml_uses(body: bytes, expected: str, why: str) -> None:
    assert describe(body, ["hush", ""]) == expected, why


@settings(deadline=None)
@given(JSON)
def test_any_json_is_described_in_one_line_of_bounded_length(value: Any) -> None:
    text = describe(orjson.dumps(value, option=orjson.OPT_NON_STR_KEYS) if _fits(value) else b"")
    assert len(text) <= 500
    assert "\n" not in text


def _fits(value: Any) -> bool:
    """Whether orjson writes it: it refuses huge integers and lone surrogates."""
    try:
        orjson.dumps(value)
    except TypeError:
        return False
    return True


@pytest.mark.parametrize("value", ["", "x", 7, None, "0" * 36, "90F84E38-A71C-4D57-8D90-00FA8A197385", ["90f84e38"]])
def test_what_is_not_a_lowercase_uuid_is_no_labs_id(value: Any) -> None:
    assert not is_lab_id(value)
