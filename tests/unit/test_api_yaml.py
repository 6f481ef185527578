"""YAML in: plain data by the 1.2 core schema, and everything that is refused, with its place."""

from __future__ import annotations

import math
from typing import Any

import orjson
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from lrm.api.yaml_documents import YamlError, load_documents


def load(text: str, **limits: int) -> list[Any]:
    return load_documents(text, **{"max_depth": 20, "max_nodes": 1000, "max_documents": 5, **limits})


@pytest.mark.parametrize(
    ("text", "value", "why"),
    [
        ("yes", "yes", "1.2 knows true and false only"),
        ("on", "on", "1.2 knows true and false only"),
        ("True", True, "core schema"),
        ("false", False, "core schema"),
        ("~", None, "core schema"),
        ('"~"', "~", "quoted is text"),
        ("2026-01-31T09:00:00Z", "2026-01-31T09:00:00Z", "times stay as they are written"),
        ("2026-01-31", "2026-01-31", "dates too"),
        ("12:30:45", "12:30:45", "1.1 would make this a number to base 60"),
        ("0755", 755, "no octal without 0o"),
        ("0o17", 15, "octal"),
        ("0x1F", 31, "hexadecimal"),
        ("-3", -3, "integer"),
        ("1_000", "1_000", "no underscores in 1.2"),
        ("1e3", 1000.0, "float"),
        (".5", 0.5, "float"),
        (".inf", ".inf", "infinity has no JSON form"),
        ("=", "=", "1.1 has a type for this"),
        ("!!str 5", "5", "said to be text"),
        ("!!int 5", 5, "said to be a number"),
        ("!!float 5", 5, "an integer is a number too"),
        ("! 5", "5", "non-specific tag"),
        ("|\n  a\n  b\n", "a\nb\n", "block text"),
    ],
)
def test_scalars_follow_the_core_schema(text: str, value: Any, why: str) -> None:
    found = load(f"v: {text}")
    assert found == [{"v": value}], why
    assert type(found[0]["v"]) is type(value), why


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("a: 1\na: 2", "line 2, column 1: duplicate key 'a'"),
        ("a: {b: 1, b: 2}", "duplicate key 'b'"),
        ("a: [1, 2", "line 2, column 1: did not find expected"),
        ("a: *x", "undefined alias|no anchor"),
        ("a: !!python/object:os.system {}", "tag"),
        ("a: !!timestamp 2026-01-01", "not what the tag"),
        ("a: !Ref b", "tag '!Ref' is not accepted"),
        ("? [a]\n: 1", "a key must be a plain value"),
        ("? {a: 1}\n: 1", "a key must be a plain value"),
        ("x: &a k\n? *a\n: 1", "a key must be a plain value"),
        ("<<: 5", "a merge key wants a mapping"),
        ("a: \x01", "not allowed|special characters|control"),
        ("[" * 40, "deeper than 20|did not find|expected"),
        ("- " * 30 + "a", "deeper than 20"),
        ("a: " + "9" * 41, "more than 40 digits"),
        ("---\na\n" * 6, "more than 5 documents"),
        ("\n".join(f"- {i}" for i in range(2000)), "more than 1000 values"),
        ("a: &a [*a]", "no anchor|undefined"),
        ("%YAML 3.0\n---\na: 1", "version|incompatible"),
    ],
)
def test_what_is_not_accepted_is_told_with_its_place(text: str, told: str) -> None:
    with pytest.raises(YamlError, match=told):
        load(text)


def test_a_bomb_of_aliases_counts_as_what_it_unfolds_to() -> None:
    lines = ["a0: &a0 [x,x,x,x,x,x,x,x,x,x]"]
    lines += [f"a{i}: &a{i} [{','.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 9)]
    with pytest.raises(YamlError, match="aliases written out"):
        load("\n".join(lines), max_nodes=200_000)


def test_aliases_cannot_hide_depth() -> None:
    lines = ["a0: &a0 {k: v}"] + [f"a{i}: &a{i} {{k: *a{i - 1}}}" for i in range(1, 30)]
    with pytest.raises(YamlError, match="deeper than 20"):
        load("\n".join(lines))


def test_aliases_and_merge_keys_share_nothing() -> None:
    """What is written once and used twice is two values, so that changing one leaves the other."""
    [found] = load("base: &b {x: {y: 1}, z: 2}\none: {<<: *b, z: 3}\ntwo: *b\nthree: {<<: [*b, {w: 5}], q: 1}")
    assert found["one"] == {"x": {"y": 1}, "z": 3}
    assert found["three"] == {"x": {"y": 1}, "z": 2, "w": 5, "q": 1}
    found["one"]["x"]["y"] = 9
    assert found["two"] == found["base"] == {"x": {"y": 1}, "z": 2}


def test_a_quoted_merge_key_is_a_key() -> None:
    assert load('"<<": 5') == [{"<<": 5}]


def test_documents_are_kept_apart_and_empty_ones_left_out() -> None:
    assert load("a: 1\n---\n---\n# only a comment\n---\nb: 2\n---\n") == [{"a": 1}, {"b": 2}]
    with pytest.raises(YamlError):
        load("a: &x 1\n---\nb: *x")


def test_keys_are_the_text_that_is_written() -> None:
    assert load("1: a\ntrue: b\n~: c") == [{"1": "a", "true": "b", "~": "c"}]


_json = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**63 - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=["Cs", "Cc"])),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(st.characters(categories=["L", "N"])), inner, max_size=4)
    ),
    max_leaves=20,
)


@given(_json)
def test_json_is_yaml(value: Any) -> None:
    """Every JSON text means the same as YAML."""
    text = orjson.dumps({"v": value}).decode()
    [found] = load(text, max_depth=50, max_nodes=10_000)
    assert _close(found["v"], value)


@given(_json)
def test_what_pyyaml_writes_is_read_back(value: Any) -> None:
    """`kubectl get -o yaml`, changed and sent again, is the same data; 1.1's writer quotes what it must."""
    text = yaml.safe_dump({"v": value}, allow_unicode=True)
    [found] = load(text, max_depth=50, max_nodes=10_000)
    assert _close(found["v"], value)


def _close(a: Any, b: Any) -> bool:
    if isinstance(a, float) or isinstance(b, float):
        return math.isclose(a, b, rel_tol=1e-12)
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(map(_close, a, b))
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(_close(a[k], b[k]) for k in a)
    return bool(a == b and type(a) is type(b))
