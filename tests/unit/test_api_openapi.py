"""The OpenAPI document: valid, in the wire's names, and what kubectl looks for."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import orjson
import pytest
from openapi_spec_validator import OpenAPIV30SpecValidator

from controllers.plugin import plugin
from equipment.api import SIGHTING, TELESCOPE
from lrm.api.openapi import OpenApi
from lrm.registry import Registry

PATH = "apis/astro.example.io/v1"
ONE = f"/{PATH}/namespaces/{{namespace}}/telescopes/{{name}}"


@pytest.fixture(scope="module")
def document() -> dict[str, Any]:
    raw = OpenApi(Registry([TELESCOPE, SIGHTING]), "1.2.3").document(PATH)
    assert raw is not None
    found: dict[str, Any] = orjson.loads(raw)
    return found


def _schemas(value: Any) -> Iterator[dict[str, Any]]:
    if isinstance(value, dict):
        yield value
        for inner in value.values():
            yield from _schemas(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _schemas(inner)


def test_it_is_valid_openapi_3_0(document: dict[str, Any]) -> None:
    assert [e.message for e in OpenAPIV30SpecValidator(document).iter_errors()] == []


def test_so_is_that_of_the_products_own_kinds_in_the_wires_names() -> None:
    openapi = OpenApi(Registry(plugin.kinds), "1")
    assert openapi.index()["paths"]
    for path in openapi.index()["paths"]:
        own = orjson.loads(openapi.document(path) or b"")
        assert [e.message for e in OpenAPIV30SpecValidator(own).iter_errors()] == []
        _assert_wire_names(own)


def test_nothing_of_json_schemas_newer_language_is_left(document: dict[str, Any]) -> None:
    """The parser of kubectl fails on a number where OpenAPI 3.0 has a boolean, and on null as a type."""
    for schema in _schemas(document["components"]["schemas"]):
        assert isinstance(schema.get("exclusiveMinimum", True), bool | dict)
        assert schema.get("type") != "null"
        assert "const" not in schema
        assert "$defs" not in schema


def test_names_are_the_wires_alone(document: dict[str, Any]) -> None:
    _assert_wire_names(document)


def _assert_wire_names(document: dict[str, Any]) -> None:
    for schema in _schemas(document["components"]["schemas"]):
        for name in schema.get("properties", ()):
            assert re.fullmatch(r"[a-z][a-zA-Z0-9]*", name), name


def test_every_kind_can_be_patched_with_field_validation(document: dict[str, Any]) -> None:
    for plural, kind in (("telescopes", "Telescope"), ("sightings", "Sighting")):
        patch = document["paths"][f"/{PATH}/namespaces/{{namespace}}/{plural}/{{name}}"]["patch"]
        assert patch["x-kubernetes-group-version-kind"] == {"group": "astro.example.io", "version": "v1", "kind": kind}
        assert "fieldValidation" in [p["name"] for p in patch["parameters"]]
        assert "application/merge-patch+json" in patch["requestBody"]["content"]


def test_a_kind_that_users_may_not_create_has_no_post(document: dict[str, Any]) -> None:
    assert "post" in document["paths"][f"/{PATH}/namespaces/{{namespace}}/telescopes"]
    assert "post" not in document["paths"][f"/{PATH}/namespaces/{{namespace}}/sightings"]


def test_the_schema_says_what_the_model_says(document: dict[str, Any]) -> None:
    schemas = document["components"]["schemas"]
    spec = schemas["io.example.astro.v1.TelescopeSpec"]
    assert spec["required"] == ["site", "mirror"]
    assert spec["properties"]["note"] == {"type": "string", "nullable": True}
    number = spec["properties"]["magnification"]
    assert number == {
        "type": "integer",
        "minimum": 0,
        "exclusiveMinimum": True,
        "maximum": 1000,
        "exclusiveMaximum": True,
        "nullable": True,
    }
    assert schemas["io.example.astro.v1.Mirror"]["properties"]["coating"]["enum"] == ["Silver", "Gold"]
    telescope = schemas["io.example.astro.v1.Telescope"]
    assert telescope["required"] == ["spec"]
    assert telescope["properties"]["kind"]["enum"] == ["Telescope"]


def test_the_index_changes_with_the_document() -> None:
    one, two = OpenApi(Registry([TELESCOPE]), "1"), OpenApi(Registry([TELESCOPE, SIGHTING]), "1")
    assert one.index() == OpenApi(Registry([TELESCOPE]), "1").index()
    assert one.index() != two.index()
    assert one.document("apis/other/v1") is None


def test_every_field_of_what_a_lab_instance_may_ask_for_is_described() -> None:
    raw = OpenApi(Registry(plugin.kinds), "1").document("apis/lab.neuroglia.io/v1")
    schemas = orjson.loads(raw or b"")["components"]["schemas"]
    (name,) = (n for n in schemas if n.endswith(".LabInstanceRequestSpec"))
    fields = dict(_fields(schemas, schemas[name], "spec"))
    assert "spec.labTemplate.healthCheck.intervalSeconds" in fields
    assert [path for path, field in fields.items() if not field.get("description")] == []


def _fields(schemas: dict[str, Any], schema: dict[str, Any], path: str) -> Iterator[tuple[str, dict[str, Any]]]:
    for name, field in schema.get("properties", {}).items():
        yield f"{path}.{name}", field
        for inner in (field, *field.get("allOf", ())):
            if "$ref" in inner:
                yield from _fields(schemas, schemas[inner["$ref"].rpartition("/")[2]], f"{path}.{name}")
