"""CML's own API document as a judge of requests and responses.

    document = CmlDocument.load_or_skip()
    document.validate_request("POST", "/labs", {}, {"title": "a"})        raises AssertionError with every problem
    document.validate_response("GET", "/labs", 200, ["90f84e38-…"])

Paths are those below `/api/v0` (a prefix up to it is dropped). A body is the parsed JSON, a `str` that was no JSON, or
None for no body at all. Where the real server is known to differ, `CORRECTIONS` says how and why: nowhere else.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator, FormatChecker

LOCATION = Path(__file__).resolve().parents[3] / "shared" / "cml" / "cml_openapi.json"
METHODS = ("get", "put", "post", "patch", "delete")
RAW_TEXT = "raw text"

_UUID = r"^[\da-f]{8}-[\da-f]{4}-4[\da-f]{3}-[89ab][\da-f]{3}-[\da-f]{12}$"


def _ref(name: str) -> dict[str, str]:
    return {"$ref": f"#/components/schemas/{name}"}


@dataclass(frozen=True, slots=True)
class Correction:
    """What the document gets wrong about one operation; `schema` replaces its 200, `request` adds to its bodies."""

    why: str
    schema: Any = None
    request: Any = None
    dates: bool = True
    """Whether `date-time` is to be believed."""
    document: Mapping[str, Any] | None = None
    """The whole operation, where the document has none."""


_MAP_OF_STATS = {"type": "object", "additionalProperties": {"type": "object"}}
_JSON_200 = "application/json"

CORRECTIONS: dict[tuple[str, str], Correction] = {
    ("GET", "/populate_lab_tiles"): Correction(
        "says LabUi per tile; captures of real servers and the schemas of 2.10 have LabInfoResponse",
        schema={
            "type": "object",
            "required": ["lab_tiles"],
            "additionalProperties": False,
            "properties": {
                "lab_tiles": {
                    "type": "object",
                    "propertyNames": {"pattern": _UUID},
                    "additionalProperties": _ref("LabInfoResponse"),
                }
            },
        },
    ),
    ("GET", "/labs/{lab_id}/simulation_stats"): Correction(
        "says lists of Node and Link; real servers answer maps of counters by id",
        schema={
            "type": "object",
            "required": ["nodes", "links"],
            "properties": {"nodes": _MAP_OF_STATS, "links": _MAP_OF_STATS},
        },
    ),
    ("GET", "/labs/{lab_id}/download"): Correction(
        "says a JSON string; real servers send the YAML itself", schema=RAW_TEXT
    ),
    ("POST", "/import"): Correction(
        "declares JSON alone; the body may be YAML text, as Cisco's own client sends it", request=RAW_TEXT
    ),
    ("GET", "/licensing"): Correction("says RFC 3339; real servers write `2026-08-20 17:25:30`", dates=False),
    ("GET", "/licensing/features"): Correction("the same dates as in GET /licensing", dates=False),
    ("GET", "/authentication"): Correction(
        "absent: the operation came with 2.10",
        document={
            "responses": {
                "200": {
                    "content": {
                        _JSON_200: {
                            "schema": {
                                "type": "object",
                                "required": ["id", "username", "admin"],
                                "properties": {
                                    "id": {"type": "string", "pattern": _UUID},
                                    "username": {"type": "string"},
                                    "admin": {"type": "boolean"},
                                },
                            }
                        }
                    }
                },
                "default": {"content": {_JSON_200: {"schema": _ref("Error")}}},
            }
        },
    ),
}


@cache
def _format_checker() -> FormatChecker:
    checker = FormatChecker(formats=())

    @checker.checks("date-time", raises=ValueError)
    def aware(value: object) -> bool:
        return not isinstance(value, str) or ("T" in value and datetime.fromisoformat(value).tzinfo is not None)

    return checker


@dataclass(slots=True)
class CmlDocument:
    """The document, and the validators made of it so far."""

    document: dict[str, Any]
    _validators: dict[str, Draft202012Validator] = field(default_factory=dict)

    @classmethod
    def load_or_skip(cls) -> CmlDocument:
        """The document; without it the test is skipped, or fails where CI is to have it."""
        if LOCATION.exists():
            return cls(_load())
        reason = "the CML API document ../shared/cml/cml_openapi.json is not on this machine"
        if os.environ.get("CI"):
            pytest.fail(f"{reason}, and CI must have it")
        pytest.skip(reason, allow_module_level=True)

    def operations(self) -> set[tuple[str, str]]:
        """Every (method, path template) of the document itself."""
        return {
            (method.upper(), template)
            for template, item in self.document["paths"].items()
            for method in item
            if method in METHODS
        }

    def template_of(self, method: str, path: str) -> str:
        """The path template that a path is of."""
        return self._operation(method, path)[0]

    def validate_request(
        self, method: str, path: str, query: Mapping[str, Any] | None = None, body: Any = None
    ) -> None:
        """Refuse what the document does not allow a client to send."""
        template, operation, params = self._operation(method, path)
        problems = self._query_problems(template, operation, params, query or {})
        declared = operation.get("requestBody")
        correction = CORRECTIONS.get((method.upper(), template))
        if body is None:
            if declared and declared.get("required"):
                problems.append("a body is required")
        elif declared is None:
            problems.append(f"no body is allowed, got {body!r:.100}")
        elif not (correction and correction.request == RAW_TEXT and isinstance(body, str)):
            schema = next(iter(declared["content"].values()))["schema"]
            problems += self._problems(f"{method} {template} request", schema, body)
        self._judge(f"request {method} {path}", problems)

    def validate_response(self, method: str, path: str, status: int, body: Any = None) -> None:
        """Refuse what the document does not allow a server to answer."""
        template, operation, _ = self._operation(method, path)
        correction = CORRECTIONS.get((method.upper(), template))
        described = operation["responses"].get(str(status))
        if described is None:
            if status < 400:
                self._judge(f"response {method} {path}", [f"status {status} is not documented"])
            described = operation["responses"]["default"]
        content = described.get("content")
        what = f"{method} {template} {status}"
        if not content:
            self._judge(f"response {what}", [] if body is None else [f"no body is documented, got {body!r:.100}"])
            return
        schema = next(iter(content.values())).get("schema", {})
        if status == 200 and correction and correction.schema is not None:
            schema = correction.schema
        if schema == RAW_TEXT:
            self._judge(f"response {what}", [] if isinstance(body, str) else ["the body is not text"])
            return
        dates = correction is None or correction.dates
        self._judge(f"response {what}", self._problems(what, schema, body, dates=dates))

    def _operation(self, method: str, path: str) -> tuple[str, Mapping[str, Any], dict[str, str]]:
        path = path.partition("/api/v0")[2] or path
        segments = path.strip("/").split("/")
        added = {t for m, t in CORRECTIONS if CORRECTIONS[m, t].document is not None}
        for template in sorted({*self.document["paths"], *added}, key=lambda t: t.count("{")):
            params = _match(template.strip("/").split("/"), segments)
            correction = CORRECTIONS.get((method.upper(), template))
            if params is None:
                continue
            if correction and correction.document is not None:
                return template, correction.document, params
            operation = self.document["paths"][template].get(method.lower())
            if operation is not None:
                return template, operation, params
        raise AssertionError(f"{method} {path} is not in the document")

    def _query_problems(
        self, template: str, operation: Mapping[str, Any], params: dict[str, str], query: Mapping[str, Any]
    ) -> list[str]:
        problems: list[str] = []
        declared = {(p["name"], p["in"]): p for p in operation.get("parameters", [])}
        for name, value in params.items():
            if (name, "path") in declared:
                schema = declared[name, "path"]["schema"]
                problems += self._problems(f"{template} path {name}", schema, _plain(value, schema))
        for name, value in query.items():
            if (name, "query") not in declared:
                problems.append(f"query parameter {name} is not documented")
                continue
            schema = declared[name, "query"]["schema"]
            problems += self._problems(f"{template} query {name}", schema, _plain(value, schema))
        problems += [
            f"query parameter {name} is required"
            for (name, where), p in declared.items()
            if where == "query" and p.get("required") and name not in query
        ]
        return problems

    def _problems(self, what: str, schema: Mapping[str, Any], value: Any, *, dates: bool = True) -> list[str]:
        validator = self._validators.get(what)
        if validator is None:
            whole = {**schema, "components": self.document["components"]}
            checker = _format_checker() if dates else None
            validator = self._validators[what] = Draft202012Validator(whole, format_checker=checker)
        return [f"{'/'.join(map(str, e.absolute_path)) or '.'}: {e.message:.300}" for e in validator.iter_errors(value)]

    @staticmethod
    def _judge(what: str, problems: list[str]) -> None:
        if problems:
            raise AssertionError(f"{what} is not as documented:\n  " + "\n  ".join(problems))


@cache
def _load() -> dict[str, Any]:
    document: dict[str, Any] = json.loads(LOCATION.read_text())
    return document


def _match(template: list[str], segments: list[str]) -> dict[str, str] | None:
    if len(template) != len(segments):
        return None
    params: dict[str, str] = {}
    for expected, given in zip(template, segments, strict=True):
        if expected.startswith("{"):
            params[expected[1:-1]] = given
        elif expected != given:
            return None
    return params


def _plain(value: Any, schema: Mapping[str, Any]) -> Any:
    """A parameter as its schema means it: in an address everything is text."""
    if not isinstance(value, str):
        return value
    kinds = {schema.get("type"), *(s.get("type") for s in schema.get("anyOf", ()))}
    if "boolean" in kinds and value.lower() in ("true", "false"):
        return value.lower() == "true"
    if "integer" in kinds and re.fullmatch(r"-?\d+", value):
        return int(value)
    return None if value == "" and "null" in kinds else value
