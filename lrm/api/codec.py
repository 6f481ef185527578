"""Bodies in and out: JSON and YAML, by content type and Accept.

What comes in is plain data that can be stored as it is: no duplicate keys, no numbers beyond 64 bits, no broken text,
bounded in size, depth and number of values. What cannot be understood is a 400 or 415 that says why, and which field it
is where that is one. Nothing here knows resources.
"""

from __future__ import annotations

import asyncio
import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import orjson
import yaml
from aiohttp import web

from lrm.api.settings import ApiSettings
from lrm.api.status import RequestError, bad_request, unsupported_media
from lrm.api.yaml_documents import YamlError, load_documents
from lrm.errors import Cause
from storage.clock import Clock

MAX_DEPTH = 64
MAX_NODES = 200_000
_THREAD_BYTES = 64 * 1024
"""Larger bodies are read and written in a thread, so that the loop goes on."""
_JSON_TYPES = frozenset({"application/json"})
_YAML_TYPES = frozenset({"application/yaml", "text/yaml", "application/x-yaml", "text/x-yaml"})
MERGE_PATCH = "application/merge-patch+json"
JSON_PATCH = "application/json-patch+json"
STRATEGIC_PATCH = "application/strategic-merge-patch+json"
APPLY_PATCH = "application/apply-patch+yaml"
_PLAIN_KEY = re.compile(r"[A-Za-z0-9_-]+")
"""Other keys are told in brackets."""


async def read_body(request: web.Request, settings: ApiSettings, clock: Clock) -> bytes:
    """The whole body. Raises 413 beyond the limit, 408 when it does not arrive, 400 when it breaks off."""
    limit = settings.max_body_bytes
    if (request.content_length or 0) > limit:
        raise _too_large(limit)
    body = bytearray()
    try:
        async with clock.timeout(settings.body_seconds):
            async for chunk in request.content.iter_any():
                body += chunk
                if len(body) > limit:
                    raise _too_large(limit)
    except TimeoutError as error:
        raise RequestError(408, "Timeout", f"the body did not arrive within {settings.body_seconds:g} s") from error
    except web.RequestPayloadError as error:
        raise bad_request("the body broke off or is not encoded as its headers say") from error
    return bytes(body)


async def read_documents(request: web.Request, settings: ApiSettings, clock: Clock) -> list[Any]:
    """Every document of a JSON or YAML body, at least one."""
    content_type = _content_type(request)
    if content_type not in _JSON_TYPES | _YAML_TYPES:
        raise unsupported_media(f"the body must be application/json or application/yaml, not {content_type!r}")
    body = await read_body(request, settings, clock)
    documents: list[Any] = await _off_loop(body, parse_documents, body, content_type, settings.max_documents)
    if not documents:
        raise bad_request("the body is empty; an object was expected")
    return documents


async def read_object(request: web.Request, settings: ApiSettings, clock: Clock) -> dict[str, Any]:
    """The one object of a JSON or YAML body."""
    documents = await read_documents(request, settings, clock)
    if len(documents) > 1:
        raise bad_request(f"one object was expected, not {len(documents)} documents")
    return as_object(documents[0])


async def read_patch(request: web.Request, settings: ApiSettings, clock: Clock) -> tuple[str, Any]:
    """The patch and its content type: merge patch or JSON patch."""
    content_type = _content_type(request)
    if content_type == APPLY_PATCH:
        raise unsupported_media(
            "server-side apply is not served yet; apply without --server-side, or send a merge patch"
        )
    if content_type not in (MERGE_PATCH, JSON_PATCH):
        raise unsupported_media(f"a patch must be {MERGE_PATCH} or {JSON_PATCH}, not {content_type!r}")
    body = await read_body(request, settings, clock)
    patch = await _off_loop(body, parse_json, body)
    return content_type, patch if content_type == JSON_PATCH else as_object(patch)


def as_object(value: Any) -> dict[str, Any]:
    """The value if it is a JSON object. Raises 400."""
    if not isinstance(value, dict):
        raise bad_request(f"an object was expected, not {_json_name(value)}")
    return value


def parse_documents(body: bytes, content_type: str, max_documents: int) -> list[Any]:
    """All documents of a body. Raises 400."""
    if content_type in _JSON_TYPES:
        return [parse_json(body)] if body.strip() else []
    try:
        documents = load_documents(_text(body), max_depth=MAX_DEPTH, max_nodes=MAX_NODES, max_documents=max_documents)
    except YamlError as error:
        raise bad_request(f"the body is not accepted as YAML: {error}") from error
    for index, document in enumerate(documents):
        _check(document, f"[{index}]" if len(documents) > 1 else "")
    return documents


def parse_json(body: bytes) -> Any:
    """One JSON value. Raises 400."""
    try:
        value = json.loads(_text(body), object_pairs_hook=_object, parse_constant=_constant)
    except RecursionError as error:
        raise bad_request(f"the body is nested deeper than {MAX_DEPTH} levels") from error
    except ValueError as error:
        raise bad_request(f"the body is not accepted as JSON: {error}") from error
    _check(value)
    return value


Form = Literal["json", "yaml", "table", "partial", "discovery"]


@dataclass(frozen=True, slots=True)
class Accepted:
    """The form that the client likes best of those that are offered; `version` is the discovery's."""

    form: Form
    version: str = ""


def negotiate(request: web.Request, offered: Sequence[Form] = ("json", "yaml")) -> Accepted:
    """Choose by the Accept header. Raises 406."""
    header = request.headers.get("Accept", "").strip() or "*/*"
    ranked = sorted(enumerate(header.split(",")), key=lambda part: (-_quality(part[1]), part[0]))
    for _, part in ranked:
        accepted = _accepted(part)
        if accepted and accepted.form in offered and _quality(part) > 0:
            return accepted
    raise RequestError(406, "NotAcceptable", f"offered are application/json and application/yaml, not {header[:200]!r}")


async def respond(
    accepted: Accepted, document: Any, *, status: int = 200, headers: dict[str, str] | None = None
) -> web.Response:
    """A document as JSON, or as YAML where that was asked for; bytes are JSON already."""
    raw = document if isinstance(document, bytes) else orjson.dumps(document)
    if accepted.form != "yaml":
        return web.Response(body=raw, status=status, headers=headers, content_type="application/json")
    text = await _off_loop(raw, to_yaml, raw)
    return web.Response(body=text, status=status, headers=headers, content_type="application/yaml")


def to_yaml(raw: bytes) -> bytes:
    """JSON as YAML."""
    dumper = getattr(yaml, "CSafeDumper", yaml.SafeDumper)
    text: str = yaml.dump(orjson.loads(raw), Dumper=dumper, sort_keys=False, allow_unicode=True, width=120)
    return text.encode()


async def _off_loop(body: bytes, work: Any, *args: Any) -> Any:
    return await asyncio.to_thread(work, *args) if len(body) > _THREAD_BYTES else work(*args)


def _content_type(request: web.Request) -> str:
    if "Content-Type" not in request.headers:
        raise unsupported_media("the request has a body and no Content-Type")
    return request.content_type.lower()


def _accepted(part: str) -> Accepted | None:
    media, *rest = (piece.strip() for piece in part.split(";"))
    params = dict(p.split("=", 1) for p in rest if "=" in p)
    if media in _YAML_TYPES:
        return Accepted("yaml")
    if media not in ("application/json", "*/*", "application/*"):
        return None
    if "as" not in params:
        return Accepted("json")
    return _SHAPES.get((params["as"], params.get("g", ""), params.get("v", "")))


_SHAPES = {
    ("Table", "meta.k8s.io", "v1"): Accepted("table"),
    ("PartialObjectMetadata", "meta.k8s.io", "v1"): Accepted("partial"),
    ("PartialObjectMetadataList", "meta.k8s.io", "v1"): Accepted("partial"),
    ("APIGroupDiscoveryList", "apidiscovery.k8s.io", "v2"): Accepted("discovery", "v2"),
    ("APIGroupDiscoveryList", "apidiscovery.k8s.io", "v2beta1"): Accepted("discovery", "v2beta1"),
}


def _quality(part: str) -> float:
    for piece in part.split(";")[1:]:
        name, _, value = piece.strip().partition("=")
        if name == "q":
            try:
                return float(value)
            except ValueError:
                return 0.0
    return 1.0


def _text(body: bytes) -> str:
    try:
        return body.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise bad_request(f"the body is not UTF-8: {error.reason} at byte {error.start}") from error


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"duplicate key {twice[:100]!r}")
    return found


def _constant(name: str) -> Any:
    raise ValueError(f"{name} is not a JSON number")


def _check(root: Any, where: str = "") -> None:
    """Refuse what could not be stored and given back as it is; not recursive, so depth cannot hurt.

    `where` is the path of `root`. Raises 400 with the field as its cause.
    """
    nodes, level = 0, [root]
    for _ in range(MAX_DEPTH):
        below: list[Any] = []
        for value in level:
            nodes += 1
            _check_leaf(value, root, where)
            if isinstance(value, dict):
                for key in value:
                    _check_leaf(key, root, where)
                below += value.values()
            elif isinstance(value, list):
                below += value
        if nodes > MAX_NODES:
            raise bad_request(f"the body has more than {MAX_NODES} values")
        level = below
    if any(isinstance(value, (dict, list)) for value in level):
        raise bad_request(f"the body is nested deeper than {MAX_DEPTH} levels")
    for value in level:
        _check_leaf(value, root, where)


def _check_leaf(value: Any, root: Any, where: str) -> None:
    why = _unstorable(value)
    if why:
        field = where + "".join(_steps_to(value, root))
        field = field.removeprefix(".")
        raise bad_request(f"{field or 'the body'}: {why}", [Cause(field, "FieldValueInvalid", why)])


def _unstorable(value: Any) -> str:
    """Why a value or key cannot be stored; empty when it can, or is no leaf."""
    if isinstance(value, str):
        if not value.isascii() and any("\ud800" <= char <= "\udfff" for char in value):
            return "must not have half a surrogate pair in a text"
        if "\0" in value:
            return "must not have a zero character in a text"
    elif isinstance(value, float):
        if not math.isfinite(value):
            return "must not be a number that is too large"
    elif isinstance(value, int) and not -(2**63) <= value < 2**63:
        return "must not be an integer beyond 64 bits"
    return ""


class _Step(NamedTuple):
    """One step of the way to a value: a key or an index, and the step before it."""

    value: Any
    key: str | int
    before: _Step | None


def _steps_to(leaf: Any, root: Any) -> list[str]:
    """The path of a value or key of the body, a text for each step; looked for only when it is refused.

    Ways share their beginnings, so that long keys with many values below them cost nothing.
    """
    level = [_Step(root, "", None)]
    while level:
        below: list[_Step] = []
        for step in level:
            if step.value is leaf:
                return _told(step)
            if isinstance(step.value, dict):
                below += (_Step(value, key, step) for key, value in step.value.items())
                named = next((key for key in step.value if key is leaf), None)
                if named is not None:
                    return _told(_Step(leaf, named, step))
            elif isinstance(step.value, list):
                below += (_Step(value, index, step) for index, value in enumerate(step.value))
        level = below
    return []


def _told(step: _Step) -> list[str]:
    told: list[str] = []
    while step.before is not None:
        key = step.key[:80] if isinstance(step.key, str) else step.key
        if isinstance(key, str) and _PLAIN_KEY.fullmatch(key):
            told.append(f".{key}")
        else:
            told.append(f"[{key if isinstance(key, int) or key.isprintable() else ascii(key)}]")
        step = step.before
    return told[::-1]


def _json_name(value: Any) -> str:
    names = {type(None): "null", bool: "a boolean", int: "a number", float: "a number", str: "a text", list: "a list"}
    return names.get(type(value), type(value).__name__)


def _too_large(limit: int) -> RequestError:
    return RequestError(413, "RequestEntityTooLarge", f"the body is larger than {limit} bytes")
