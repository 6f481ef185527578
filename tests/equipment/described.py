"""Whether every answer is one that the OpenAPI documents tell of: its code, its type, and the form of its body.

A `Described` stands among the routes of a served application; `check()` says at the end what was told wrongly. What is
served for kinds, whose documents name one code and else a Status, is not looked at, nor are kubectl's tables.
"""

from __future__ import annotations

from typing import Any

import orjson
from aiohttp import web
from openapi_schema_validator import OAS30Validator

from lrm.api import core_operations
from lrm.api.call import Api
from lrm.api.openapi import OpenApi
from lrm.api.operations import Operation

_MOST = 32 * 1024
"""Bytes of a body that is looked at: it is done on the server's event loop, which tests measure."""


class Described:
    """See the module."""

    def __init__(self) -> None:
        self.looked_at = 0
        self._wrong: list[str] = []
        self._told: dict[tuple[str, str], tuple[dict[str, Any], dict[str, Any]]] = {}
        """By method and path: the operation, and the document that it is in."""

    def __call__(self, app: web.Application, api: Api) -> None:
        operations = (*core_operations.OPERATIONS, *api.operations)
        documents = documents_of(api, operations)
        for o in operations:
            document = documents[o.document]
            self._told[o.method, o.path.rstrip("/")] = document["paths"][o.path][o.method], document
        app.on_response_prepare.append(self._look)

    def check(self) -> None:
        """Raise for answers that are not as described."""
        if self._wrong:
            raise AssertionError("\n".join(dict.fromkeys(self._wrong)))

    async def _look(self, request: web.Request, response: web.StreamResponse) -> None:
        resource = request.match_info.route.resource
        place = request.method.lower(), resource.canonical.rstrip("/") if resource is not None else ""
        if place not in self._told:
            return
        operation, document = self._told[place]
        self.looked_at += 1
        answer = operation["responses"].get(str(response.status))
        if answer is None:
            self._wrong.append(f"{place}: {response.status} is not described")
            return
        media = answer.get("content", {}).get(response.content_type)
        body = response.body if isinstance(response, web.Response) else None
        if media is None:
            self._wrong.append(f"{place}: {response.status} is not described as {response.content_type}")
        elif response.content_type == "application/json" and isinstance(body, bytes) and len(body) < _MOST:
            if "as=" in request.headers.get("Accept", ""):
                return
            schema = {**media["schema"], "components": document["components"]}
            errors = OAS30Validator(schema).iter_errors(orjson.loads(body))
            self._wrong += [f"{place}: {response.status}: {e.json_path}: {e.message}" for e in errors]


def documents_of(api: Api, operations: tuple[Operation, ...]) -> dict[str, dict[str, Any]]:
    """Every OpenAPI document, by its path below the index."""
    openapi = OpenApi(api.registry, "1", operations)
    return {path: orjson.loads(openapi.document(path) or b"") for path in openapi.index()["paths"]}
