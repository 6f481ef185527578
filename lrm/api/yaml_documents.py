"""YAML as people write manifests, safely: plain data, nothing guessed, nothing unbounded.

Scalars follow YAML 1.2's core schema, so times, `yes` and `on` stay text. Duplicate keys, unknown tags and keys that
are not scalars are refused with line and column; aliases and merge keys work, but what they unfold counts against the
same limits as if it were written out. Called by `codec` for request bodies and for the tokens file.
"""

from __future__ import annotations

import re
from typing import Any

import yaml
from yaml import events as ev

_NULL = frozenset({"", "~", "null", "Null", "NULL"})
_TRUE = frozenset({"true", "True", "TRUE"})
_FALSE = frozenset({"false", "False", "FALSE"})
_INT = re.compile(r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_STR_TAGS = frozenset({"!", "tag:yaml.org,2002:str"})
_CORE = "tag:yaml.org,2002:"

_MERGE = "<< (merge)"
"""Stands for a plain `<<` as a key; compared by identity."""

_Loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


class YamlError(ValueError):
    """The text is not YAML that is accepted here; the message says where and why."""


def load_documents(text: str, *, max_depth: int, max_nodes: int, max_documents: int) -> list[Any]:
    """Every document of a stream as plain values; empty ones (`---` at the end) are left out. Raises `YamlError`."""
    builder = _Builder(max_depth, max_nodes)
    documents: list[Any] = []
    try:
        for event in yaml.parse(text, Loader=_Loader):
            if isinstance(event, ev.DocumentStartEvent):
                builder.begin()
            elif isinstance(event, ev.DocumentEndEvent):
                if builder.root is not None:
                    documents.append(builder.root)
                if len(documents) > max_documents:
                    raise YamlError(f"more than {max_documents} documents")
            elif not isinstance(event, (ev.StreamStartEvent, ev.StreamEndEvent)):
                builder.feed(event)
    except yaml.YAMLError as error:
        raise YamlError(_told(error)) from error
    return documents


class _Open:
    """A mapping or sequence that is being read."""

    __slots__ = ("anchor", "key", "merges", "nodes", "value")

    def __init__(self, value: dict[str, Any] | list[Any], anchor: str | None, nodes: int) -> None:
        self.value = value
        self.anchor = anchor
        self.key: str | None = None
        self.merges: list[Any] = []
        self.nodes = nodes


class _Builder:
    def __init__(self, max_depth: int, max_nodes: int) -> None:
        self._max_depth, self._max_nodes = max_depth, max_nodes
        self._nodes = 0
        self.begin()

    def begin(self) -> None:
        self.root: Any = None
        self._stack: list[_Open] = []
        self._anchors: dict[str, tuple[Any, int, int]] = {}

    def feed(self, event: Any) -> None:
        if isinstance(event, ev.ScalarEvent):
            self._scalar(event)
        elif isinstance(event, ev.MappingStartEvent):
            self._open({}, event)
        elif isinstance(event, ev.SequenceStartEvent):
            self._open([], event)
        elif isinstance(event, ev.AliasEvent):
            self._alias(event)
        else:
            self._close(event)

    def _scalar(self, event: Any) -> None:
        self._count(1, event)
        top = self._stack[-1] if self._stack else None
        if top and isinstance(top.value, dict) and top.key is None:
            merge = event.value == "<<" and event.implicit[0]
            if top.merges if merge else event.value in top.value:
                raise _at(event, f"duplicate key {event.value!r}")
            top.key = _MERGE if merge else event.value
            return
        value = _resolve(event)
        self._remember(event.anchor, value, 1, 0)
        self._add(value)

    def _open(self, value: dict[str, Any] | list[Any], event: Any) -> None:
        self._count(1, event)
        if event.tag and event.tag not in (f"{_CORE}map", f"{_CORE}seq"):
            raise _at(event, f"tag {event.tag!r} is not accepted")
        if self._stack and isinstance(self._stack[-1].value, dict) and self._stack[-1].key is None:
            raise _at(event, "a key must be a plain value")
        if len(self._stack) >= self._max_depth:
            raise _at(event, f"nested deeper than {self._max_depth} levels")
        self._stack.append(_Open(value, event.anchor, self._nodes))

    def _close(self, event: Any) -> None:
        done = self._stack.pop()
        for merged in done.merges:
            for part in merged if isinstance(merged, list) else [merged]:
                if not isinstance(part, dict):
                    raise _at(event, "a merge key wants a mapping, or a list of mappings")
                done.value = {**part, **done.value} if isinstance(done.value, dict) else done.value
        self._remember(done.anchor, done.value, self._nodes - done.nodes + 1, _depth(done.value))
        self._add(done.value)

    def _alias(self, event: Any) -> None:
        if event.anchor not in self._anchors:
            raise _at(event, f"alias *{event.anchor} has no anchor before it")
        value, nodes, depth = self._anchors[event.anchor]
        self._count(nodes, event)
        if len(self._stack) + depth > self._max_depth:
            raise _at(event, f"nested deeper than {self._max_depth} levels")
        if self._stack and isinstance(self._stack[-1].value, dict) and self._stack[-1].key is None:
            raise _at(event, "a key must be a plain value")
        self._add(_copy(value))

    def _add(self, value: Any) -> None:
        if not self._stack:
            self.root = value
            return
        top = self._stack[-1]
        if isinstance(top.value, list):
            top.value.append(value)
            return
        key, top.key = top.key, None
        if key is _MERGE:
            top.merges.append(value)
        elif key is not None:
            top.value[key] = value

    def _remember(self, anchor: str | None, value: Any, nodes: int, depth: int) -> None:
        if anchor:
            self._anchors[anchor] = (value, nodes, depth)

    def _count(self, nodes: int, event: Any) -> None:
        self._nodes += nodes
        if self._nodes > self._max_nodes:
            raise _at(event, f"more than {self._max_nodes} values, aliases written out")


def _resolve(event: Any) -> Any:
    tag, text = event.tag, event.value
    if tag in _STR_TAGS or (tag is None and not event.implicit[0]):
        return text
    if tag is not None and not tag.startswith(_CORE):
        raise _at(event, f"tag {tag!r} is not accepted")
    value = _core(text, event)
    if tag is not None:
        wanted = {"null": type(None), "bool": bool, "int": int, "float": float}.get(tag.removeprefix(_CORE))
        if wanted is None or not (isinstance(value, wanted) or (wanted is float and isinstance(value, int))):
            raise _at(event, f"{text!r} is not what the tag {tag!r} says")
    return value


def _core(text: str, event: Any) -> Any:
    """YAML 1.2's core schema; infinities and NaN have no JSON form and stay text."""
    if text in _NULL:
        return None
    if text in _TRUE:
        return True
    if text in _FALSE:
        return False
    if _INT.fullmatch(text):
        if len(text) > 40:
            raise _at(event, "a number of more than 40 digits")
        return int(text, 0) if text[:2] in ("0o", "0x") else int(text)
    return float(text) if _FLOAT.fullmatch(text) else text


def _copy(value: Any) -> Any:
    match value:
        case dict():
            return {k: _copy(v) for k, v in value.items()}
        case list():
            return [_copy(v) for v in value]
    return value


def _depth(value: Any) -> int:
    match value:
        case dict():
            return 1 + max(map(_depth, value.values()), default=0)
        case list():
            return 1 + max(map(_depth, value), default=0)
    return 0


def _at(event: Any, why: str) -> YamlError:
    mark = event.start_mark
    return YamlError(f"line {mark.line + 1}, column {mark.column + 1}: {why}")


def _told(error: yaml.YAMLError) -> str:
    mark = getattr(error, "problem_mark", None)
    problem = getattr(error, "problem", None) or getattr(error, "reason", None) or "not readable as YAML"
    where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
    return f"{where}{problem}"
