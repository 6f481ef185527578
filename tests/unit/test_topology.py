"""Topologies as text: what is taken, what it asks of a worker, what CML is sent, and what is refused where."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import pytest
import yaml

from controllers.instances.topology import LARGEST, LONGEST_NOTES, TopologyError, check

SMALL = """\
lab:
  version: "0.3.0"
  title: Two routers
  notes: the author's own
nodes:
- {id: n0, label: r1, node_definition: iosv, x: 0, y: 0, cpus: 2, ram: 768}
- {id: n1, label: r2, node_definition: iosv, x: 1, y: 0, configuration: "hostname r2"}
- {id: n2, label: out, node_definition: external_connector, x: 2, y: 0}
- {id: n3, label: sw, node_definition: unmanaged_switch, x: 3, y: 0}
links: []
"""


def with_nodes(*nodes: dict[str, Any]) -> str:
    return json.dumps({"lab": {"version": "0.3.0"}, "nodes": list(nodes), "links": []})


def test_a_topology_says_what_it_needs() -> None:
    """Connectors and switches are no licensed nodes; cpu and memory are of the nodes that name them."""
    found = check(SMALL)
    assert (found.title, found.nodes, found.all_nodes) == ("Two routers", 2, 4)
    assert (found.cpu, found.memory) == (2, 768 * 1024**2)
    assert found.digest == hashlib.sha256(SMALL.encode()).hexdigest()


def test_yaml_and_json_are_read_alike() -> None:
    as_json = check(json.dumps(yaml.safe_load(SMALL)))
    assert as_json.document == check(SMALL).document


def test_what_cml_gets_is_what_was_checked_with_more_notes() -> None:
    """The author's notes stay first; nothing else changes, and an alias is written out."""
    shared = SMALL.replace('configuration: "hostname r2"', 'configuration: &c "same"') + "smart_annotations: []\n"
    found = check(shared.replace("x: 2, y: 0}", "x: 2, y: 0, configuration: *c}"))
    sent = json.loads(found.to_import("made by lrm"))
    assert sent["lab"].pop("notes") == "the author's own\n\nmade by lrm"
    assert [n.get("configuration") for n in sent["nodes"]] == [None, "same", "same", None]
    again = check(json.dumps(sent))
    assert (again.nodes, again.cpu) == (found.nodes, found.cpu)


def test_notes_that_grow_too_long_are_refused() -> None:
    found = check(with_nodes())
    assert len(json.loads(found.to_import("x" * LONGEST_NOTES))["lab"]["notes"]) == LONGEST_NOTES
    with pytest.raises(TopologyError, match=r"lab\.notes"):
        check(SMALL).to_import("x" * LONGEST_NOTES)


BILLION = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{b}: &{b} [{', '.join([f'*{a}'] * 9)}]\n" for a, b in zip("abcdefg", "bcdefgh", strict=True)
)
NODE = {"id": "n0", "label": "r1", "node_definition": "iosv", "x": 0, "y": 0}


@pytest.mark.parametrize(
    ("text", "told"),
    [
        pytest.param("", "the topology: must be a mapping, and is missing", id="nothing at all"),
        pytest.param("just words", "the topology: must be a mapping, and is text", id="no mapping"),
        pytest.param("- a\n- b\n", "is a list", id="a list"),
        pytest.param("lab: {\n  nodes: [\n", "line 3, column 1", id="YAML that ends too early, and where"),
        pytest.param('{"lab": {}, "nodes": [}', "line 1, column 23", id="JSON that is broken, and where"),
        pytest.param("{lab: {}, nodes: [], links: []}", "begins like JSON", id="it would be sent as JSON"),
        pytest.param("lab: {}\nlinks: []\n", "nodes: must be a list, and is missing", id="no nodes"),
        pytest.param("lab: {}\nnodes: {a: 1}\nlinks: []\n", "nodes: must be a list, and is a mapping", id="a mapping"),
        pytest.param("nodes: []\nlinks: []\n", "lab: must be a mapping", id="no lab"),
        pytest.param("lab: {}\nnodes: []\n", "links: must be a list", id="no links"),
        pytest.param("lab: {title: 3}\nnodes: []\nlinks: []\n", "lab.title: must be text", id="a title that is none"),
        pytest.param("lab: {}\nnodes: [x]\nlinks: []\n", r"nodes\[0\]: must be a mapping", id="a node that is none"),
        pytest.param(with_nodes({"id": "n0"}), r"nodes\[0\].node_definition", id="a node of no kind"),
        pytest.param(with_nodes(NODE, {**NODE, "ram": "2G"}), r"nodes\[1\].ram: .* 1 to 1048576", id="memory as text"),
        pytest.param(with_nodes({**NODE, "cpus": 0}), r"nodes\[0\].cpus: .* 1 to 128", id="no processor"),
        pytest.param(with_nodes({**NODE, "cpus": True}), r"nodes\[0\].cpus", id="a truth value is no number"),
        pytest.param(SMALL + "---\nlab: {}\n", "more than 1 documents", id="two topologies"),
        pytest.param(SMALL + "nodes: []\n", "duplicate key 'nodes'", id="two lists of nodes: which would CML take?"),
        pytest.param("!!python/object/apply:os.system [ls]\n", "tag .* is not accepted", id="an object"),
        pytest.param(BILLION, "more than 50000 values", id="a billion laughs"),
        pytest.param("[" * 60 + "]" * 60, "deeper than 40", id="too deep"),
        pytest.param("lab: {}\n# " + "x" * LARGEST, "at most 524288", id="too large"),
        pytest.param("lab: \ud800", "UTF-8", id="half a character"),
        pytest.param(SMALL + f"annotations: [{2**70}]\n", "no form", id="a number beyond JSON's"),
        pytest.param('{"lab":' * 2000, "begins like JSON", id="JSON too deep"),
    ],
)
def test_what_is_no_topology_is_refused_with_its_place(text: str, told: str) -> None:
    with pytest.raises(TopologyError, match=told):
        check(text)


def test_what_is_told_does_not_quote_without_end() -> None:
    with pytest.raises(TopologyError) as refused:
        check("".join(f"{'k' * 100_000}: {n}\n" for n in range(2)))
    assert len(str(refused.value)) <= 500
