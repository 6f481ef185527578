"""Merge patch and JSON patch, by the examples of their RFCs and by what could hurt."""

from __future__ import annotations

import copy
from typing import Any

import jsonpatch
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lrm.api.codec import JSON_PATCH, MERGE_PATCH
from lrm.api.patches import apply_patch
from lrm.api.status import RequestError


@pytest.mark.parametrize(
    ("document", "patch", "result"),
    [
        ({"a": "b"}, {"a": "c"}, {"a": "c"}),
        ({"a": "b"}, {"b": "c"}, {"a": "b", "b": "c"}),
        ({"a": "b"}, {"a": None}, {}),
        ({"a": "b", "b": "c"}, {"a": None}, {"b": "c"}),
        ({"a": ["b"]}, {"a": "c"}, {"a": "c"}),
        ({"a": {"b": "c"}}, {"a": {"b": "d", "c": None}}, {"a": {"b": "d"}}),
        ({"a": [{"b": "c"}]}, {"a": [1]}, {"a": [1]}),
        ({"e": None}, {"a": 1}, {"e": None, "a": 1}),
        ({}, {"a": {"bb": {"ccc": None}}}, {"a": {"bb": {}}}),
        ({"a": 1}, {"a": {"b": None}}, {"a": {}}),
    ],
)
def test_merge_patch(document: dict[str, Any], patch: Any, result: dict[str, Any]) -> None:
    """RFC 7396, appendix A."""
    before = copy.deepcopy(document)
    assert apply_patch(MERGE_PATCH, patch, document) == result
    assert document == before


@pytest.mark.parametrize(
    ("document", "patch", "result"),
    [
        ({"a": [1]}, [{"op": "add", "path": "/a/-", "value": 2}], {"a": [1, 2]}),
        ({"a": [1, 3]}, [{"op": "add", "path": "/a/1", "value": 2}], {"a": [1, 2, 3]}),
        ({"a": 1}, [{"op": "replace", "path": "/a", "value": None}], {"a": None}),
        ({"a": [1, 2]}, [{"op": "replace", "path": "/a/0", "value": 9}], {"a": [9, 2]}),
        ({"a": {"b": 1}}, [{"op": "move", "from": "/a/b", "path": "/c"}], {"a": {}, "c": 1}),
        ({"a": {"b": 1}}, [{"op": "copy", "from": "/a", "path": "/c"}], {"a": {"b": 1}, "c": {"b": 1}}),
        ({"x/y": 1, "~": 2}, [{"op": "remove", "path": "/x~1y"}, {"op": "remove", "path": "/~0"}], {}),
        ({"a": 1}, [{"op": "test", "path": "/a", "value": 1.0}], {"a": 1}),
        ({"a": 1}, [{"op": "replace", "path": "", "value": {"b": 2}}], {"b": 2}),
    ],
)
def test_json_patch(document: dict[str, Any], patch: Any, result: dict[str, Any]) -> None:
    before = copy.deepcopy(document)
    assert apply_patch(JSON_PATCH, patch, document) == result
    assert document == before


@pytest.mark.parametrize(
    ("patch", "code"),
    [
        ({"op": "add"}, 400),
        (["add"], 400),
        ([{"op": "grow", "path": "/a"}], 400),
        ([{"op": "add", "path": "a", "value": 1}], 400),
        ([{"op": "add", "path": "/a"}], 400),
        ([{"op": "add", "path": 5, "value": 1}], 400),
        ([{"op": "move", "path": "/a"}], 400),
        ([{"op": "remove", "path": "/nothing"}], 422),
        ([{"op": "replace", "path": "/nothing", "value": 1}], 422),
        ([{"op": "test", "path": "/a", "value": True}], 422),
        ([{"op": "test", "path": "/l", "value": [1, 3]}], 422),
        ([{"op": "add", "path": "/l/5", "value": 1}], 422),
        ([{"op": "add", "path": "/l/01", "value": 1}], 422),
        ([{"op": "add", "path": "/a/b", "value": 1}], 422),
        ([{"op": "move", "from": "/d", "path": "/d/e"}], 422),
        ([{"op": "remove", "path": ""}], 422),
        ([{"op": "remove", "path": ""}, {"op": "add", "path": "/a", "value": 1}], 422),
        ([{"op": "replace", "path": "", "value": [1]}], 422),
        ([{"op": "test", "path": "/a", "value": 1}] * 1001, 413),
        ([{"op": "copy", "from": "/d", "path": "/d/x"}] * 200, 413),
        ([{"op": "copy", "from": "/l", "path": "/l/-"}] * 900, 413),
    ],
)
def test_a_json_patch_that_does_not_fit_is_refused_and_changes_nothing(patch: Any, code: int) -> None:
    document = {"a": 1, "l": [1, 2], "d": {"e": {}}}
    before = copy.deepcopy(document)
    with pytest.raises(RequestError) as refused:
        apply_patch(JSON_PATCH, patch, document)
    assert refused.value.code == code
    assert document == before


_values = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 5) | st.text("ab/~", max_size=2),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text("ab/~0", max_size=2), inner, max_size=3),
    max_leaves=8,
)
_objects = st.dictionaries(st.text("ab/~0", max_size=2), _values, max_size=4)


@given(_objects, _objects)
def test_a_json_patch_made_by_another_library_leads_where_that_says(
    before: dict[str, Any], after: dict[str, Any]
) -> None:
    patch = jsonpatch.make_patch(before, after).patch
    assert apply_patch(JSON_PATCH, patch, before) == after
