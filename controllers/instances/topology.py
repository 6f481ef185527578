"""Reads a CML topology as text: whether it is one, what it asks of a worker, and what is sent to CML for it.

Promises: nothing unbounded (512 KiB, 40 levels, 50,000 values with aliases written out), no object but plain data, and
one reading: what CML gets is the values that were checked and counted, as JSON, so that no other parser can find more
nodes in the same text. The shape is checked as far as it is counted by; the rest is CML's to judge. Pure; half a
megabyte of YAML takes two tenths of a second, so whoever serves others meanwhile calls it in a thread.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import orjson

from lrm.api.yaml_documents import YamlError, load_documents

LARGEST = 512 * 1024
"""Bytes of a topology, wherever it comes from."""
LONGEST_NOTES = 32768
"""Characters that CML takes for a lab's notes."""
_DEEPEST = 40
_MOST_VALUES = 50_000
_MIB = 1024 * 1024
_LONGEST_REASON = 500
"""Characters of what is told; a reason may quote what it complains of."""
_UNLICENSED = frozenset({"external_connector", "unmanaged_switch"})
"""Definitions of nodes that CML does not count against its licence."""
_CPUS, _RAM = 128, 1_048_576
"""The most that CML takes for one node: processors, and MiB."""


class TopologyError(ValueError):
    """The text is no topology that can be taken; the message says where and why."""


@dataclass(frozen=True, slots=True)
class Topology:
    """A topology that was read."""

    title: str
    """Its own; the lab bears another one."""
    nodes: int
    """That count against the licence."""
    all_nodes: int
    """With those that do not."""
    cpu: int
    """Processors of the nodes that say how many; the others' are their images' to say. 0 is unknown."""
    memory: int
    """Bytes, likewise."""
    digest: str
    """sha256 of the text, hex."""
    document: Mapping[str, Any] = field(repr=False)

    def to_import(self, notes: str) -> str:
        """JSON to import it from, with more notes after its own. Raises `TopologyError` where they grow too long."""
        lab = self.document["lab"]
        notes = "\n\n".join(part for part in (lab.get("notes"), notes) if part)
        if len(notes) > LONGEST_NOTES:
            raise TopologyError(f"lab.notes: more than {LONGEST_NOTES} characters with what is added to them")
        return orjson.dumps({**self.document, "lab": {**lab, "notes": notes}}).decode()


def check(text: str) -> Topology:
    """Read a topology, YAML or JSON. Raises `TopologyError`."""
    try:
        raw = text.encode()
    except UnicodeEncodeError:
        raise TopologyError("it is not text that can be written as UTF-8") from None
    if len(raw) > LARGEST:
        raise TopologyError(f"{len(raw)} bytes, and at most {LARGEST} are taken")
    document = _mapping(_parse(text), "the topology")
    lab = _mapping(document.get("lab"), "lab")
    for name in ("title", "notes"):
        if not isinstance(lab.get(name, ""), str | None):
            raise TopologyError(f"lab.{name}: must be text")
    nodes = [_mapping(node, f"nodes[{n}]") for n, node in enumerate(_list(document, "nodes"))]
    _list(document, "links")
    counted = sum(_definition(node, n) not in _UNLICENSED for n, node in enumerate(nodes))
    cpu = sum(_number(node, n, "cpus", _CPUS) for n, node in enumerate(nodes))
    memory = sum(_number(node, n, "ram", _RAM) for n, node in enumerate(nodes)) * _MIB
    try:
        orjson.dumps(document)
    except TypeError as error:
        raise TopologyError(f"it holds a value that JSON has no form for: {error}") from None
    digest = hashlib.sha256(raw).hexdigest()
    return Topology(lab.get("title") or "", counted, len(nodes), cpu, memory, digest, document)


def _parse(text: str) -> Any:
    if text.lstrip()[:1] == "{":
        try:
            return orjson.loads(text)
        except orjson.JSONDecodeError as error:
            where = f"line {error.lineno}, column {error.colno}"
            raise TopologyError(f"it begins like JSON and is none: {where}: {error.msg}") from None
    try:
        documents = load_documents(text, max_depth=_DEEPEST, max_nodes=_MOST_VALUES, max_documents=1)
    except YamlError as error:
        raise TopologyError(f"it is no YAML that is accepted: {error}"[:_LONGEST_REASON]) from None
    return documents[0] if documents else None


def _mapping(value: Any, what: str) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise TopologyError(f"{what}: must be a mapping, and is {_told(value)}")
    return value


def _list(document: Mapping[str, Any], name: str) -> list[Any]:
    value = document.get(name)
    if not isinstance(value, list):
        raise TopologyError(f"{name}: must be a list, and is {_told(value)}")
    return value


def _definition(node: Mapping[str, Any], position: int) -> str:
    value = node.get("node_definition")
    if not isinstance(value, str) or not value:
        raise TopologyError(f"nodes[{position}].node_definition: must be the name of a node definition")
    return value


def _number(node: Mapping[str, Any], position: int, name: str, most: int) -> int:
    value = node.get(name)
    if value is None:
        return 0
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= most:
        raise TopologyError(f"nodes[{position}].{name}: must be a whole number from 1 to {most}")
    return value


def _told(value: Any) -> str:
    match value:
        case None:
            return "missing"
        case dict():
            return "a mapping"
        case list():
            return "a list"
        case str():
            return "text"
    return "a number or a truth value"
