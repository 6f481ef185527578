"""Topologies in CML2's own file format: reading them into labs, writing labs out again.

Promises: YAML or JSON; no unknown key, no dangling or doubled reference gets in, and a refused topology leaves
nothing behind. Ids in files are scoped (interfaces per node) and are replaced by UUIDs; written files have `n0`, `i0`,
`l0` and can be imported again. Unknown node definitions are imported with a warning, as a CML without that image does.
"""

from __future__ import annotations

import contextlib
from datetime import datetime
from typing import Any
from uuid import uuid4

import orjson
import yaml

from controllers.cml.simulator.bodies import NodeFields, Topology, Topology210, TopologyNode
from controllers.cml.simulator.catalog import CATALOG, definition
from controllers.cml.simulator.labs import Interface, Lab, Link, Node
from controllers.cml.simulator.routing import InvalidInputError, RefusalError, checked

_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
"""A large topology must not hold up every other machine."""

_SHAPE: dict[str, Any] = {
    "rotation": 0,
    "border_color": "#000000FF",
    "border_style": "",
    "color": "#FFFFFFFF",
    "thickness": 1,
    "x1": 0,
    "y1": 0,
    "z_index": 0,
}
_TEXT: dict[str, Any] = {
    "text_bold": False,
    "text_content": "",
    "text_font": "monospace",
    "text_italic": False,
    "text_size": 12,
    "text_unit": "pt",
}
_ANNOTATIONS: dict[str, dict[str, Any]] = {
    "text": _SHAPE | _TEXT,
    "rectangle": _SHAPE | {"x2": 0, "y2": 0, "border_radius": 0},
    "ellipse": _SHAPE | {"x2": 0, "y2": 0},
    "line": {k: v for k, v in _SHAPE.items() if k != "rotation"}
    | {"x2": 0, "y2": 0, "line_start": None, "line_end": None},
}


def read(text: bytes, release: tuple[int, int]) -> Topology:
    """A topology file. Raises `InvalidInputError`, or `RefusalError` where its parts do not fit together."""
    try:
        value = _parse(text)
    except (yaml.YAMLError, ValueError, RecursionError) as e:
        raise InvalidInputError([(["body"], "yaml_invalid", f"The topology cannot be read: {e}")]) from None
    topology: Topology = checked(Topology210 if release >= (2, 10) else Topology, value)
    _check_references(topology)
    return topology


def _parse(text: bytes) -> Any:
    """JSON by the fast way; all else, and what only looks like it, as YAML."""
    if text.lstrip()[:1] == b"{":
        with contextlib.suppress(orjson.JSONDecodeError):
            return orjson.loads(text)
    return yaml.load(text, Loader=_LOADER)  # noqa: S506 - a safe loader, the one in C where there is one


def build(topology: Topology, title: str, owner: str, when: datetime) -> tuple[Lab, list[str]]:
    """A lab of that topology, and the warnings to show."""
    lab = Lab(str(uuid4()), title, owner, when, when, topology.lab.description, topology.lab.notes)
    warnings: list[str] = []
    ports: dict[tuple[str, str], Interface] = {}
    for given in topology.nodes:
        if given.node_definition not in CATALOG:
            warnings.append(f"Node **{given.label}**: node definition `{given.node_definition}` is not installed.")
        node = _build_node(given)
        lab.nodes[node.id] = node
        ports |= {(given.id, i.id): port for i, port in zip(given.interfaces, node.interfaces, strict=True)}
    for link in topology.links:
        a, b = ports[link.n1, link.i1], ports[link.n2, link.i2]
        made = Link(str(uuid4()), link.label or f"{a.node.label}-{a.label}<->{b.node.label}-{b.label}", a, b)
        if link.conditioning:
            made.condition = link.conditioning.model_dump(exclude_none=True)
        lab.links[made.id] = made
    if topology.annotations:
        lab.extras["annotations"] = [_annotation(a) for a in topology.annotations]
    if topology.smart_annotations:
        lab.extras["smart_annotations"] = [
            {**a.model_dump(exclude_none=True), "id": str(uuid4())} for a in topology.smart_annotations
        ]
    for name in ("autostart", "node_staging"):
        extra = getattr(topology.lab, name, None)
        if extra is not None:
            lab.extras[name] = extra.model_dump(exclude_none=True)
    return lab, warnings


def export(lab: Lab, version: str) -> str:
    """The lab as YAML that can be imported again."""
    names = {node.id: f"n{n}" for n, node in enumerate(lab.nodes.values())}
    ports = {i.id: f"i{n}" for node in lab.nodes.values() for n, i in enumerate(node.interfaces)}
    document: dict[str, Any] = {
        "lab": {
            "version": version,
            "title": lab.title,
            "description": lab.description,
            "notes": lab.notes,
        },
        "nodes": [_export_node(node, names, ports) for node in lab.nodes.values()],
        "links": [
            {
                "id": f"l{n}",
                "n1": names[link.a.node.id],
                "n2": names[link.b.node.id],
                "i1": ports[link.a.id],
                "i2": ports[link.b.id],
                "label": link.label[:128],
            }
            | ({"conditioning": link.condition} if link.condition else {})
            for n, link in enumerate(lab.links.values())
        ],
        "annotations": [{k: v for k, v in a.items() if k != "id"} for a in lab.extras.get("annotations", [])],
        "smart_annotations": [
            {k: v for k, v in a.items() if k != "id"} for a in lab.extras.get("smart_annotations", [])
        ],
    }
    document["lab"] |= {k: lab.extras[k] for k in ("autostart", "node_staging") if k in lab.extras}
    return yaml.safe_dump(document, sort_keys=False, allow_unicode=True)


def node_settings(fields: NodeFields) -> dict[str, Any]:
    """What was given of a node beyond its place, label and configuration."""
    own = {"x", "y", "label", "node_definition", "configuration", "id", "interfaces"}
    return fields.model_dump(exclude=own, exclude_none=True)


def configuration_of(fields: NodeFields) -> Any:
    return fields.model_dump(include={"configuration"})["configuration"]


def _build_node(given: TopologyNode) -> Node:
    kind = definition(given.node_definition)
    node = Node(str(uuid4()), given.label, kind, given.x, given.y, configuration_of(given), node_settings(given))
    for n, port in enumerate(given.interfaces):
        slot = None if port.type == "loopback" else (n if port.slot is None else port.slot)
        label = port.label or (f"Loopback{n}" if slot is None else kind.label(slot))
        node.interfaces.append(Interface(str(uuid4()), node, label, slot, port.mac_address))
    return node


def _export_node(node: Node, names: dict[str, str], ports: dict[str, str]) -> dict[str, Any]:
    document: dict[str, Any] = {
        "id": names[node.id],
        "label": node.label,
        "node_definition": node.definition.id,
        "x": node.x,
        "y": node.y,
    }
    document |= {k: v for k, v in node.settings.items() if k != "pinned_compute_id"}
    if node.configuration is not None:
        document["configuration"] = node.configuration
    document["interfaces"] = [
        {"id": ports[i.id], "label": i.label, "type": "loopback" if i.slot is None else "physical"}
        | ({} if i.slot is None else {"slot": i.slot})
        | ({"mac_address": i.mac} if i.mac else {})
        for i in node.interfaces
    ]
    return document


def _annotation(given: dict[str, Any]) -> dict[str, Any]:
    kind = given.get("type")
    if kind not in _ANNOTATIONS:
        raise InvalidInputError([(["body", "annotations"], "union_tag_invalid", f"No annotation is a {kind!r}")])
    unknown = given.keys() - _ANNOTATIONS[kind].keys() - {"type"}
    if unknown:
        raise InvalidInputError(
            (["body", "annotations", key], "extra_forbidden", "Extra inputs are not permitted")
            for key in sorted(unknown)
        )
    return {**_ANNOTATIONS[kind], **given, "id": str(uuid4())}


def _check_references(topology: Topology) -> None:
    ports = _ports(topology)
    links: set[str] = set()
    used: set[tuple[str, str]] = set()
    for link in topology.links:
        if link.id in links:
            raise RefusalError(400, f"Duplicate link id: {link.id}")
        links.add(link.id)
        for end in ((link.n1, link.i1), (link.n2, link.i2)):
            if end not in ports:
                raise RefusalError(400, f"Link {link.id}: there is no interface {end[1]} on node {end[0]}")
            if end in used:
                raise RefusalError(400, f"Link {link.id}: interface {end[1]} of node {end[0]} is connected already")
            used.add(end)


def _ports(topology: Topology) -> set[tuple[str, str]]:
    """Every interface as (node, interface), each of them once."""
    nodes: set[str] = set()
    ports: set[tuple[str, str]] = set()
    for node in topology.nodes:
        if node.id in nodes:
            raise RefusalError(400, f"Duplicate node id: {node.id}")
        nodes.add(node.id)
        slots = [p.slot for p in node.interfaces if p.slot is not None]
        own = {(node.id, p.id) for p in node.interfaces}
        if len(own) < len(node.interfaces) or len(set(slots)) < len(slots):
            raise RefusalError(400, f"Duplicate interface or slot of node {node.id}")
        ports |= own
    return ports
