"""Reading CML's answers: JSON or nothing, and one line out of every shape in which it gives a reason.

Promises that nothing but a whole JSON text of the expected type passes as data, and that secrets the caller names
never come back in a description. Does not know which status is right for which call. Called by the transport, the
login and the typed calls.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import orjson

from controllers.cml.errors import CmlBadAnswer, CmlError, CmlForbidden, CmlNotFound, CmlNotReady, CmlRefused

_LONGEST_REASON = 500
_NOT_READY = frozenset({429, 502, 503, 504})


@dataclass(frozen=True, slots=True)
class Answer:
    """A whole HTTP answer."""

    status: int
    body: bytes = field(repr=False)

    def json(self) -> Any:
        """The body as JSON. Raises `CmlBadAnswer` for anything that is not one whole JSON text."""
        try:
            return orjson.loads(self.body)
        except orjson.JSONDecodeError:
            pass
        # Raised out here so that the parser's error, which quotes the body, does not travel along.
        raise CmlBadAnswer(self.status, f"{_kind_of(self.body)} where JSON was due")

    def mapping(self) -> dict[str, Any]:
        value = self.json()
        if not isinstance(value, dict):
            raise CmlBadAnswer(self.status, f"a JSON {_name(value)} where an object was due")
        return value

    def array(self) -> list[Any]:
        value = self.json()
        if not isinstance(value, list):
            raise CmlBadAnswer(self.status, f"a JSON {_name(value)} where an array was due")
        return value

    def string(self) -> str:
        value = self.json()
        if not isinstance(value, str):
            raise CmlBadAnswer(self.status, f"a JSON {_name(value)} where a string was due")
        return value

    def boolean(self) -> bool:
        value = self.json()
        if not isinstance(value, bool):
            raise CmlBadAnswer(self.status, f"a JSON {_name(value)} where a boolean was due")
        return value


def failure(answer: Answer, secrets: Iterable[str] = ()) -> CmlError | None:
    """The error that an answer stands for, None when it is a success; 401 is the caller's to settle first."""
    status = answer.status
    if 200 <= status < 300:
        return None
    if status in _NOT_READY:
        return CmlNotReady(status)
    if not 400 <= status < 500:
        reason = "an internal error" if status == 500 else "an unexpected status"
        return CmlBadAnswer(status, describe(answer.body, secrets) or reason)
    reason = describe(answer.body, secrets)
    if status == 404:
        # A front server's 404 page speaks of its own paths, not of CML's labs: it proves nothing.
        return CmlNotFound(reason) if _is_json_object(answer.body) else CmlBadAnswer(404, reason or "no body")
    return CmlForbidden(status, reason) if status == 403 else CmlRefused(status, reason)


def describe(body: bytes, secrets: Iterable[str] = ()) -> str:
    """CML's reason as one printable line of at most 500 characters, without any of `secrets`; empty when it has none.

    The description may be text, JSON inside text, an object or a list; the body may also be no JSON at all.
    """
    try:
        value = orjson.loads(body)
    except orjson.JSONDecodeError:
        return _kind_of(body) if body.strip() else ""
    if isinstance(value, dict):
        value = next((value[k] for k in ("description", "detail", "message") if value.get(k)), value)
    text = _flatten(_unwrap(value))
    text = _blot(text, secrets)
    text = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    return text if len(text) <= _LONGEST_REASON else text[: _LONGEST_REASON - 1] + "…"


def _blot(text: str, secrets: Iterable[str]) -> str:
    """Replace each secret, as it is and as JSON writes it."""
    forms = {f for s in secrets if s for f in (s, orjson.dumps(s).decode()[1:-1], json.dumps(s)[1:-1])}
    for form in sorted(forms, key=len, reverse=True):
        text = text.replace(form, "***")
    return text


def _unwrap(value: Any) -> Any:
    if isinstance(value, str) and value.lstrip()[:1] in {"{", "["}:
        try:
            return orjson.loads(value)
        except orjson.JSONDecodeError:
            return value
    return value


def _flatten(value: Any, depth: int = 0) -> str:
    if isinstance(value, str):
        return value
    if depth > 6 or value is None:
        return "" if value is None else "…"
    if isinstance(value, list):
        return "; ".join(filter(None, (_flatten(v, depth + 1) for v in value[:20])))
    if isinstance(value, dict):
        where = value.get("location", value.get("loc"))
        what = value.get("message", value.get("msg"))
        if isinstance(what, str):
            path = ".".join(str(p) for p in where) if isinstance(where, list) else str(where or "")
            return f"{path}: {what}" if path else what
        pairs = ((str(k), _flatten(v, depth + 1)) for k, v in list(value.items())[:20])
        return "; ".join(f"{k}: {v}" for k, v in pairs if v)
    return str(value)


def _is_json_object(body: bytes) -> bool:
    try:
        return isinstance(orjson.loads(body), dict)
    except orjson.JSONDecodeError:
        return False


def _kind_of(body: bytes) -> str:
    start = body.lstrip()[:1]
    if not start:
        return "an empty body"
    return "an HTML page" if start == b"<" else "a text that is not JSON"


def _name(value: Any) -> str:
    if value is None:
        return "null"
    names = {dict: "object", list: "array", str: "string", bool: "boolean", int: "number", float: "number"}
    return names.get(type(value), "value")
