"""JSON merge patch (RFC 7396) and JSON patch (RFC 6902) over plain JSON values.

Both give a new document and leave the old one alone. A patch that cannot be applied to this document is a 422, one
that is not a patch at all a 400. What a JSON patch builds up by copying is bounded.
"""

from __future__ import annotations

import copy
import re
from typing import Any

from lrm.api.codec import JSON_PATCH, MAX_DEPTH, MAX_NODES
from lrm.api.status import RequestError, bad_request
from lrm.errors import Cause

_MAX_OPERATIONS = 1_000
_INDEX = re.compile(r"0|[1-9][0-9]{0,8}")


def apply_patch(content_type: str, patch: Any, document: dict[str, Any]) -> dict[str, Any]:
    """The patched document. Raises 400, 422."""
    if content_type == JSON_PATCH:
        patched = _json_patch(document, patch)
        if not isinstance(patched, dict):
            raise _unfit("", "the patch leaves something that is not an object")
        return patched
    merged: dict[str, Any] = _merge(document, patch)
    return merged


def _merge(target: Any, patch: Any) -> Any:
    if not isinstance(patch, dict):
        return patch
    merged = dict(target) if isinstance(target, dict) else {}
    for key, value in patch.items():
        if value is None:
            merged.pop(key, None)
        else:
            merged[key] = _merge(merged.get(key), value)
    return merged


def _json_patch(document: Any, patch: Any) -> Any:
    if not isinstance(patch, list) or not all(isinstance(step, dict) for step in patch):
        raise bad_request("a JSON patch is a list of operations")
    if len(patch) > _MAX_OPERATIONS:
        raise RequestError(413, "RequestEntityTooLarge", f"a JSON patch has at most {_MAX_OPERATIONS} operations")
    holder = {"": copy.deepcopy(document)}
    budget = MAX_NODES
    for number, step in enumerate(patch):
        budget -= _step(holder, step, f"[{number}]", budget)
    return holder.get("")


def _step(holder: dict[str, Any], step: dict[str, Any], where: str, budget: int) -> int:
    """Apply one operation; returns how many values it copied."""
    operation = step.get("op")
    path = _pointer(step, "path", where)
    match operation:
        case "add" | "replace" | "test" if "value" not in step:
            raise bad_request(f"{where}: {operation} wants a value")
        case "add":
            _put(holder, path, copy.deepcopy(step["value"]), where)
        case "replace":
            _read(holder, path, where)
            _take(holder, path, where)
            _put(holder, path, copy.deepcopy(step["value"]), where)
        case "remove":
            _take(holder, path, where)
        case "move":
            _move(holder, path, _pointer(step, "from", where), where)
        case "copy":
            return _copied(holder, path, _read(holder, _pointer(step, "from", where), where), where, budget)
        case "test":
            _test(holder, path, step, where)
        case _:
            raise bad_request(f"{where}: {str(operation)[:40]!r} is not an operation of JSON patch")
    return 0


def _move(holder: dict[str, Any], path: list[str], source: list[str], where: str) -> None:
    if path[: len(source)] == source and path != source:
        raise _unfit(where, "nothing can be moved into itself")
    _put(holder, path, _take(holder, source, where), where)


def _test(holder: dict[str, Any], path: list[str], step: dict[str, Any], where: str) -> None:
    if not _equal(_read(holder, path, where), step["value"]):
        raise _unfit(where, f"the test of {step['path']!r} failed")


def _copied(holder: dict[str, Any], path: list[str], value: Any, where: str, budget: int) -> int:
    size = _size(value)
    if size > budget or len(path) + _depth(value) > MAX_DEPTH:
        raise RequestError(413, "RequestEntityTooLarge", f"{where}: the patch copies too much")
    _put(holder, path, copy.deepcopy(value), where)
    return size


def _pointer(step: dict[str, Any], name: str, where: str) -> list[str]:
    """A JSON pointer below the holder."""
    text = step.get(name)
    if not isinstance(text, str) or (text and not text.startswith("/")) or text.count("/") > MAX_DEPTH:
        raise bad_request(f"{where}: {name} must be a JSON pointer, as in /metadata/labels/track")
    return [part.replace("~1", "/").replace("~0", "~") for part in text.split("/")]


def _parent(holder: Any, path: list[str], where: str) -> Any:
    place = holder
    for part in path[:-1]:
        place = _child(place, part, path, where)
    return place


def _child(place: Any, part: str, path: list[str], where: str) -> Any:
    if isinstance(place, dict) and part in place:
        return place[part]
    if isinstance(place, list) and _INDEX.fullmatch(part) and int(part) < len(place):
        return place[int(part)]
    raise _unfit(where, f"there is nothing at {'/'.join(path)!r}")


def _read(holder: Any, path: list[str], where: str) -> Any:
    return _child(_parent(holder, path, where), path[-1], path, where)


def _take(holder: Any, path: list[str], where: str) -> Any:
    parent = _parent(holder, path, where)
    value = _child(parent, path[-1], path, where)
    if isinstance(parent, list):
        del parent[int(path[-1])]
    else:
        del parent[path[-1]]
    return value


def _put(holder: Any, path: list[str], value: Any, where: str) -> None:
    parent = _parent(holder, path, where)
    last = path[-1]
    if isinstance(parent, dict):
        parent[last] = value
    elif isinstance(parent, list) and last == "-":
        parent.append(value)
    elif isinstance(parent, list) and _INDEX.fullmatch(last) and int(last) <= len(parent):
        parent.insert(int(last), value)
    else:
        raise _unfit(where, f"nothing can be put at {'/'.join(path)!r}")


def _equal(a: Any, b: Any) -> bool:
    """As JSON: true is not 1."""
    if isinstance(a, bool) is not isinstance(b, bool):
        return False
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(_equal(a[k], b[k]) for k in a)
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(_equal(x, y) for x, y in zip(a, b, strict=True))
    return bool(a == b)


def _size(value: Any) -> int:
    children = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return 1 + sum(map(_size, children))


def _depth(value: Any) -> int:
    children = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return 1 + max(map(_depth, children), default=0)


def _unfit(where: str, why: str) -> RequestError:
    causes = [Cause(where, "FieldValueInvalid", why)] if where else []
    return RequestError(
        422, "Invalid", f"the patch cannot be applied{': ' + where if where else ''}: {why}", causes=causes
    )
