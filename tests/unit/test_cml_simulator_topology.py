"""Topologies: what is read, what is refused, and that what is written can be read again."""

from __future__ import annotations

import copy
import json
from datetime import UTC, datetime
from typing import Any

import pytest
import yaml

from controllers.cml.simulator import topology
from controllers.cml.simulator.labs import Lab
from controllers.cml.simulator.routing import RefusalError

WHEN = datetime(2026, 1, 1, tzinfo=UTC)
GOOD: dict[str, Any] = {
    "lab": {"version": "0.3.0", "title": "t", "notes": "n"},
    "nodes": [
        {
            "id": "n0",
            "label": "r0",
            "x": 1,
            "y": 2,
            "node_definition": "iosv",
            "ram": 1024,
            "tags": ["a"],
            "configuration": [{"name": "c", "content": "hostname r0"}],
            "interfaces": [
                {"id": "i0", "type": "loopback", "label": "Loopback0"},
                {"id": "i1", "type": "physical", "slot": 1, "mac_address": "52:54:00:00:00:01"},
            ],
        },
        {
            "id": "n1",
            "label": "r1",
            "x": 0,
            "y": 0,
            "node_definition": "alpine",
            "configuration": "x: ß",
            "interfaces": [{"id": "i0", "type": "physical", "slot": 0}],
        },
    ],
    "links": [{"id": "l0", "n1": "n0", "i1": "i1", "n2": "n1", "i2": "i0", "conditioning": {"latency": 3}}],
    "annotations": [{"type": "rectangle", "x1": 3}],
    "smart_annotations": [{"tag": "a"}],
}


def build(document: Any, release: tuple[int, int] = (2, 9)) -> tuple[Lab, list[str]]:
    read = topology.read(yaml.safe_dump(document).encode(), release)
    return topology.build(read, "t", "owner", WHEN)


def changed(path: str, value: Any) -> Any:
    """The good topology with one thing put or, with `...`, taken away."""
    document = copy.deepcopy(GOOD)
    at: Any = document
    *way, last = [int(p) if p.isdigit() else p for p in path.split(".")]
    for step in way:
        at = at[step]
    if value is ...:
        del at[last]
    elif isinstance(at, list) and last == len(at):
        at.append(value)
    else:
        at[last] = value
    return document


def test_what_is_written_can_be_read_again_and_is_the_same() -> None:
    first, warnings = build(GOOD)
    assert warnings == []
    text = topology.export(first, "0.3.0")
    second, _ = topology.build(topology.read(text.encode(), (2, 9)), "t", "owner", WHEN)
    assert topology.export(second, "0.3.0") == text
    assert not first.nodes.keys() & second.nodes.keys(), "every import has ids of its own"
    (link,) = second.links.values()
    assert (link.a.node.label, link.b.node.label, link.condition) == ("r0", "r1", {"latency": 3})
    r0, r1 = second.nodes.values()
    assert (r0.settings, r0.configuration) == ({"ram": 1024, "tags": ["a"]}, [{"name": "c", "content": "hostname r0"}])
    assert [(i.slot, i.mac) for i in r0.interfaces] == [(None, None), (1, "52:54:00:00:00:01")]
    assert r1.configuration == "x: ß"


def test_json_and_yaml_that_looks_like_it_are_both_read() -> None:
    for text in (json.dumps(GOOD), yaml.safe_dump(GOOD, default_flow_style=True)):
        assert text[0] == "{"
        assert len(topology.read(text.encode(), (2, 9)).nodes) == 2


def test_an_unknown_image_is_a_warning() -> None:
    lab, warnings = build(changed("nodes.1.node_definition", "exotic"))
    assert len(lab.nodes) == 2
    assert "exotic" in warnings[0]


def test_a_newer_file_needs_a_newer_server() -> None:
    newer = changed("lab.version", "0.3.1")
    with pytest.raises(RefusalError, match="0\\.3\\.0"):
        build(newer)
    build(newer, (2, 10))


@pytest.mark.parametrize(
    ("path", "value", "named", "why"),
    [
        ("lab", ..., "lab", "a part is missing"),
        ("nodes", ..., "nodes", "even an empty lab lists its nodes"),
        ("lab.version", "9.9.9", "version", "an unknown version"),
        ("lab.colour", "red", "colour", "an unknown key"),
        ("nodes.0.colour", "red", "colour", "an unknown key further in"),
        ("nodes.0.x", "1", "x", "text is not a number"),
        ("nodes.0.x", 15001, "x", "off the canvas"),
        ("nodes.0.label", "", "label", "an empty label"),
        ("nodes.0.id", 0, "id", "a number is not an id"),
        ("nodes.1.id", "n0", "n0", "two nodes with one id"),
        ("nodes.0.interfaces.1.id", "i0", "n0", "two interfaces with one id"),
        ("nodes.0.interfaces.0", {"id": "i9", "type": "physical", "slot": 1}, "n0", "two interfaces in one slot"),
        ("nodes.0.interfaces.1.mac_address", "zz", "mac_address", "no such address"),
        ("links.0.i1", "i7", "i7", "a link to no interface"),
        ("links.0.n2", "n7", "n7", "a link to no node"),
        ("links.1", {"id": "l1", "n1": "n0", "i1": "i1", "n2": "n0", "i2": "i0"}, "i1", "an interface linked twice"),
        ("links.0.i2", ..., "i2", "a link with one end"),
        ("annotations.0.type", "cloud", "cloud", "an unknown annotation"),
        ("annotations.0.text_size", 3, "text_size", "a key of another kind of annotation"),
        ("lab.title", "x" * 65, "title", "a title too long"),
        ("annotations.0.x1", [1], "x1", "a list for a number"),
        ("smart_annotations.0.colour", "red", "colour", "an unknown key"),
        ("nodes.0.parameters", {"a": [1]}, "parameters", "a list for a value"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(path: str, value: Any, named: str, why: str) -> None:
    with pytest.raises(RefusalError) as refused:
        build(changed(path, value))
    assert refused.value.status == 400
    assert named in refused.value.description, why


@pytest.mark.parametrize(
    "text",
    [b"", b"- a", b"a: [", b"\xff\xfe\x00", b"lab: !!python/object:os.system {}", b"null", b"[" * 5000, b"&a [*a]"],
)
def test_what_is_no_topology_at_all_is_refused(text: bytes) -> None:
    with pytest.raises(RefusalError) as refused:
        topology.read(text, (2, 9))
    assert refused.value.status == 400
