"""The kinds and the other endpoints as OpenAPI 3.0 documents: what `kubectl apply`, `explain` and generators read.

Made from the models that requests are checked by. One document for each group and version and, as Kubernetes cuts
them, one for each first step below /api; `Operation.document` says which.
kubectl looks for a PATCH operation of the kind with a `fieldValidation` parameter; without one it will not apply.
Names are the wire's (camelCase). The documents describe what is accepted; the server's own checks go further.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from http import HTTPStatus
from typing import Any

import orjson
from pydantic import TypeAdapter
from pydantic.json_schema import JsonSchemaMode, models_json_schema

from lrm.api.discovery import SCALE, group_versions
from lrm.api.operations import OBJECTS, Content, Operation, Parameter
from lrm.kind import Kind
from lrm.registry import Registry

_PATCH_TYPES = ("application/merge-patch+json", "application/json-patch+json")
_DROPPED = frozenset({"title", "propertyNames", "prefixItems"})
"""What JSON Schema says and OpenAPI 3.0 does not know."""
_SCALE_SCHEMA = "io.k8s.api.autoscaling.v1.Scale"
_STATUS_SCHEMA = "io.k8s.apimachinery.pkg.apis.meta.v1.Status"
_REF = "#/components/schemas/{model}"
_ANY_ENDPOINT = (400, 401, 403, 404, 406, 429, 500, 503)
"""What any request may be answered: 404 where a path or what it names is not there, 503 without store or cache."""
_ANY_WRITE = (409, 504)
_ANY_BODY = (408, 413, 415, 422)
_BEARER = "BearerToken"


class OpenApi:
    """All documents, made once."""

    def __init__(self, registry: Registry, product_version: str, operations: Sequence[Operation] = ()) -> None:
        """`operations` are the endpoints that serve no kind."""
        documents: dict[str, dict[str, Any]] = {}
        for group, versions in group_versions(registry).items():
            for version in versions:
                kinds = [k for k in registry if (k.group, k.version) == (group, version)]
                documents[f"apis/{group}/{version}"] = _document(kinds, group, version)
        for path in dict.fromkeys(operation.document for operation in operations):
            document = documents.setdefault(path, {"paths": {}, "components": {"schemas": {}}})
            _describe([o for o in operations if o.document == path], document)
        frame = {"openapi": "3.0.0", "info": {"title": "Lab Resource Manager", "version": product_version}}
        for document in documents.values():
            document["components"]["securitySchemes"] = _security_schemes()
        self._documents = {
            path: orjson.dumps({**frame, **document, "security": [{_BEARER: []}]})
            for path, document in documents.items()
        }

    def index(self) -> dict[str, Any]:
        """/openapi/v3; the hash lets clients keep a document until it changes."""
        return {
            "paths": {
                path: {"serverRelativeURL": f"/openapi/v3/{path}?hash={self.etag(path)}"} for path in self._documents
            }
        }

    def document(self, path: str) -> bytes | None:
        """One document as JSON."""
        return self._documents.get(path)

    def etag(self, path: str) -> str:
        """Changes when the document does."""
        return hashlib.sha256(self._documents[path]).hexdigest()[:32].upper()


def _document(kinds: list[Kind[Any]], group: str, version: str) -> dict[str, Any]:
    prefix = ".".join([*reversed(group.split(".")), version])
    _, schemas = models_json_schema([(kind.model, "validation") for kind in kinds], by_alias=True, ref_template=_REF)
    names = {name: f"{prefix}.{name}" for name in schemas.get("$defs", {})}
    components = {names[name]: _plain(schema, names) for name, schema in schemas.get("$defs", {}).items()}
    paths: dict[str, Any] = {}
    for kind in kinds:
        name = f"{prefix}.{kind.model.__name__}"
        gvk = {"group": group, "version": version, "kind": kind.name}
        schema = components[name]
        schema["x-kubernetes-group-version-kind"] = [gvk]
        schema["required"] = [f for f in schema.get("required", ()) if f == "spec"]
        schema["properties"]["apiVersion"] = _fixed(kind.api_version, "The version of this object's form.")
        schema["properties"]["kind"] = _fixed(kind.name, "What kind of object this is.")
        listed = f"{name}List"
        components[listed] = _list_schema(kind, name, gvk)
        if kind.scale is not None:
            components[_SCALE_SCHEMA] = _scale_schema()
        paths |= _paths(kind, gvk, name, listed)
    return {"paths": paths, "components": {"schemas": components}}


def _describe(operations: Sequence[Operation], document: dict[str, Any]) -> None:
    """Add endpoints that serve no kind to a document."""
    contents: list[tuple[Content, JsonSchemaMode]] = []
    for operation in operations:
        contents += [(operation.body, "validation")] if operation.body else []
        contents += [(a.content, "serialization") for a in operation.answers.values() if a.content]
    inputs = [(content, mode, TypeAdapter(content.type)) for content, mode in contents]
    made, shared = TypeAdapter.json_schemas(inputs, by_alias=True, ref_template=_REF)
    components = document["components"]["schemas"]
    components |= {name: _plain(schema, {}) for name, schema in shared.get("$defs", {}).items()}
    components[_STATUS_SCHEMA] = _status_schema()

    def content_of(content: Content, mode: JsonSchemaMode) -> dict[str, Any]:
        schema = _plain(made[content, mode], {})
        return {media: {"schema": schema} for media in content.media}

    for operation in operations:
        answers: dict[str, Any] = {}
        for code, answer in operation.answers.items():
            answers[str(code)] = {"description": answer.description}
            if answer.content is not None:
                answers[str(code)]["content"] = content_of(answer.content, "serialization")
        writes, refusals = operation.method != "get", {*_ANY_ENDPOINT, *operation.refusals}
        refusals |= {*(_ANY_WRITE if writes else ()), *(_ANY_BODY if operation.body else ())}
        for code in sorted(refusals - operation.answers.keys()):
            answers[str(code)] = {
                "description": HTTPStatus(code).phrase,
                "content": _content(("application/json",), _STATUS_SCHEMA),
            }
        told: dict[str, Any] = {
            "operationId": operation.name,
            "summary": operation.description,
            "parameters": [_told_parameter(p, operation.path) for p in operation.parameters],
            "responses": answers,
            **operation.extensions,
        }
        if operation.body is not None:
            told["requestBody"] = {"required": True, "content": content_of(operation.body, "validation")}
        document["paths"].setdefault(operation.path, {})[operation.method] = told


def _told_parameter(parameter: Parameter, path: str) -> dict[str, Any]:
    told = {"name": parameter.name, "description": parameter.description, "schema": dict(parameter.schema)}
    if f"{{{parameter.name}}}" in path:
        return {**told, "in": "path", "required": True}
    return {**told, "in": "query"}


def _security_schemes() -> dict[str, Any]:
    what = "A token of the tokens file. Without such a file only this machine is served, and no token is asked for."
    return {_BEARER: {"type": "http", "scheme": "bearer", "description": what}}


def _status_schema() -> dict[str, Any]:
    """Kubernetes' meta/v1 Status, the part that is told."""
    text = {"type": "string"}
    cause = {"type": "object", "properties": dict.fromkeys(("reason", "message", "field"), text)}
    details = {
        **dict.fromkeys(("name", "group", "kind", "uid"), text),
        "causes": {"type": "array", "items": cause},
        "retryAfterSeconds": {"type": "integer"},
    }
    return {
        "type": "object",
        "description": "What is wrong with a request, or that a deletion is complete.",
        "required": ["status"],
        "properties": {
            **dict.fromkeys(("apiVersion", "kind", "message", "reason"), text),
            "metadata": {"type": "object"},
            "status": {"type": "string", "enum": ["Success", "Failure"]},
            "details": {"type": "object", "properties": details},
            "code": {"type": "integer"},
        },
        "x-kubernetes-group-version-kind": [{"group": "", "version": "v1", "kind": "Status"}],
    }


def _plain(value: Any, names: dict[str, str]) -> Any:
    """JSON Schema 2020-12 as OpenAPI 3.0 has it."""
    if isinstance(value, list):
        return [_plain(v, names) for v in value]
    if not isinstance(value, dict):
        return value
    schema = _without_null({k: v for k, v in value.items() if k not in _DROPPED})
    if "const" in schema:
        schema["enum"] = [schema.pop("const")]
    for bound, limit in (("exclusiveMinimum", "minimum"), ("exclusiveMaximum", "maximum")):
        if bound in schema:
            schema[limit], schema[bound] = schema[bound], True
    for part in ("anyOf", "oneOf", "allOf", "items", "additionalProperties"):
        if part in schema:
            schema[part] = _plain(schema[part], names)
    if "properties" in schema:
        schema["properties"] = {k: _plain(v, names) for k, v in schema["properties"].items()}
        if schema.get("additionalProperties") is True:
            del schema["additionalProperties"]  # kept when stored, refused from people
    return _reference(schema, names) if "$ref" in schema else schema


def _without_null(schema: dict[str, Any]) -> dict[str, Any]:
    """An optional value: OpenAPI 3.0 says `nullable` where JSON Schema offers null among the types."""
    for choice in ("anyOf", "oneOf"):
        options = schema.get(choice)
        if not options or {"type": "null"} not in options:
            continue
        left = [option for option in options if option != {"type": "null"}]
        beside = {k: v for k, v in schema.items() if k != choice and (k, v) != ("default", None)}
        inner = {k: v for k, v in left[0].items() if k not in _DROPPED} if len(left) == 1 else {choice: left}
        return {**inner, **beside, "nullable": True}
    return schema


def _reference(schema: dict[str, Any], names: dict[str, str]) -> dict[str, Any]:
    """A reference stands alone in OpenAPI 3.0: what is said beside it needs an allOf."""
    name = schema["$ref"].rpartition("/")[2]
    reference = {"$ref": f"#/components/schemas/{names.get(name, name)}"}
    beside = {k: v for k, v in schema.items() if k != "$ref"}
    return {**beside, "allOf": [reference]} if beside else reference


def _fixed(value: str, description: str) -> dict[str, Any]:
    return {"type": "string", "description": description, "enum": [value]}


def _list_schema(kind: Kind[Any], name: str, gvk: dict[str, str]) -> dict[str, Any]:
    metadata = {
        "type": "object",
        "properties": {
            "resourceVersion": {"type": "string"},
            "continue": {"type": "string"},
            "remainingItemCount": {"type": "integer", "format": "int64"},
        },
    }
    return {
        "type": "object",
        "description": f"A list of {kind.plural}.",
        "required": ["items"],
        "properties": {
            "apiVersion": {"type": "string"},
            "kind": {"type": "string"},
            "metadata": metadata,
            "items": {"type": "array", "items": {"$ref": f"#/components/schemas/{name}"}},
        },
        "x-kubernetes-group-version-kind": [{**gvk, "kind": f"{kind.name}List"}],
    }


def _scale_schema() -> dict[str, Any]:
    """Kubernetes' autoscaling/v1 Scale, the part that is served."""
    count = {"type": "integer", "format": "int32", "minimum": 0}
    metadata = {name: {"type": "string"} for name in ("name", "namespace", "uid", "resourceVersion")}
    status = {"replicas": count, "selector": {"type": "string"}}
    return {
        "type": "object",
        "description": "How many replicas an object asks for and has.",
        "properties": {
            "apiVersion": {"type": "string"},
            "kind": {"type": "string"},
            "metadata": {"type": "object", "properties": metadata},
            "spec": {"type": "object", "properties": {"replicas": count}},
            "status": {"type": "object", "properties": status},
        },
        "x-kubernetes-group-version-kind": [SCALE],
    }


def _paths(kind: Kind[Any], gvk: dict[str, str], one: str, many: str) -> dict[str, Any]:
    base = f"/apis/{kind.group}/{kind.version}"
    everywhere = f"{base}/{kind.plural}"
    inside = f"{base}/namespaces/{{namespace}}/{kind.plural}"
    object_path = f"{inside}/{{name}}"
    namespace, name = _path_parameter("namespace"), _path_parameter("name")
    writing = [_parameter("dryRun"), _parameter("fieldManager"), _parameter("fieldValidation")]
    listing = [
        *(_parameter(p) for p in ("labelSelector", "fieldSelector", "resourceVersion", "resourceVersionMatch")),
        *(_parameter(p) for p in ("continue",)),
        _parameter("limit", "integer"),
        _parameter("watch", "boolean"),
        _parameter("allowWatchBookmarks", "boolean"),
        _parameter("timeoutSeconds", "integer"),
    ]

    def operation(verb: str, action: str, result: str, params: list[Any], body: Iterable[str] = ()) -> dict[str, Any]:
        code = "201" if action == "post" else "200"
        told: dict[str, Any] = {
            "operationId": f"{verb}{kind.name}",
            "tags": [kind.plural],
            "parameters": params,
            "responses": {
                code: {"description": "OK", "content": _content(OBJECTS, result)},
                "default": {"description": "A Status that says what is wrong."},
            },
            "x-kubernetes-action": action,
            "x-kubernetes-group-version-kind": SCALE if result == _SCALE_SCHEMA else gvk,
        }
        if body:
            kinds = tuple(body)
            schema = result if kinds == OBJECTS else ""
            told["requestBody"] = {"required": action != "delete", "content": _content(kinds, schema)}
        return told

    collection: dict[str, Any] = {"parameters": [namespace], "get": operation("list", "list", many, listing)}
    if not kind.create_refusal:
        collection["post"] = operation("create", "post", one, writing, OBJECTS)
    paths = {
        everywhere: {"get": operation("listAll", "list", many, listing)},
        inside: collection,
        object_path: {
            "parameters": [namespace, name],
            "get": operation("read", "get", one, [_parameter("resourceVersion")]),
            "put": operation("replace", "put", one, writing, OBJECTS),
            "patch": operation("patch", "patch", one, writing, _PATCH_TYPES),
            "delete": operation(
                "delete", "delete", one, [_parameter("dryRun"), _parameter("propagationPolicy")], ("application/json",)
            ),
        },
        f"{object_path}/status": {
            "parameters": [namespace, name],
            "get": operation("readStatusOf", "get", one, []),
            "put": operation("replaceStatusOf", "put", one, writing, OBJECTS),
            "patch": operation("patchStatusOf", "patch", one, writing, _PATCH_TYPES),
        },
    }
    if kind.scale is not None:
        paths[f"{object_path}/scale"] = {
            "parameters": [namespace, name],
            "get": operation("readScaleOf", "get", _SCALE_SCHEMA, []),
            "put": operation("replaceScaleOf", "put", _SCALE_SCHEMA, writing, OBJECTS),
            "patch": operation("patchScaleOf", "patch", _SCALE_SCHEMA, writing, _PATCH_TYPES),
        }
    return paths


def _content(types: Iterable[str], component: str) -> dict[str, Any]:
    schema = {"$ref": f"#/components/schemas/{component}"} if component else {"type": "object"}
    return {media: {"schema": schema} for media in types}


def _parameter(name: str, schema: str = "string") -> dict[str, Any]:
    return {"name": name, "in": "query", "schema": {"type": schema}}


def _path_parameter(name: str) -> dict[str, Any]:
    return {"name": name, "in": "path", "required": True, "schema": {"type": "string"}}
