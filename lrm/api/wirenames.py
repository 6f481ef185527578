"""snake_case on input: documents and merge patches are brought to the wire's names before anything looks at them.

Only names of models are changed; keys of labels, tags and other maps are data. A field given under both names is
refused. Called by the handlers that take bodies.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin

from lrm.errors import Cause, Invalid
from lrm.kind import Kind
from lrm.model import Model


def to_wire(kind: Kind[Any], document: Mapping[str, Any]) -> dict[str, Any]:
    """The document under its wire names. Raises `Invalid` for a field that is given twice."""
    causes: list[Cause] = []
    converted = _model(kind.model, document, "", causes)
    if causes:
        raise Invalid(kind.name, causes)
    return converted


def _model(model: type[Model], value: Mapping[str, Any], path: str, causes: list[Cause]) -> dict[str, Any]:
    wire_of = {name: info.alias or name for name, info in model.model_fields.items()}
    annotation_of = {info.alias or name: info.annotation for name, info in model.model_fields.items()}
    found: dict[str, Any] = {}
    for key, item in value.items():
        wire = wire_of.get(key, key)
        here = f"{path}.{wire}".lstrip(".")
        if wire in found:
            causes.append(Cause(here, "FieldValueDuplicate", f"given twice, as {wire} and in snake_case"))
        found[wire] = _value(annotation_of.get(wire), item, here, causes)
    return found


def _value(annotation: Any, value: Any, path: str, causes: list[Cause]) -> Any:
    match value:
        case dict():
            model = _find(annotation, _is_model)
            if model is not None:
                return _model(model, value, path, causes)
            mapping = _find(annotation, lambda a: _origin(a) is dict)
            inner = get_args(mapping)[1] if mapping is not None else None
            return {k: _value(inner, v, f"{path}.{k}", causes) for k, v in value.items()}
        case list():
            listed = _find(annotation, lambda a: _origin(a) in (list, tuple))
            inner = get_args(listed)[0] if listed is not None else None
            return [_value(inner, v, f"{path}[{i}]", causes) for i, v in enumerate(value)]
    return value


def _find(annotation: Any, wanted: Any) -> Any:
    """The first part of an annotation that fits, looking through unions and `Annotated`."""
    if wanted(annotation):
        return annotation
    origin = _origin(annotation)
    if origin is Annotated:
        return _find(get_args(annotation)[0], wanted)
    if origin in (Union, UnionType):
        return next((f for a in get_args(annotation) if (f := _find(a, wanted)) is not None), None)
    return None


def _origin(annotation: Any) -> Any:
    return get_origin(annotation)


def _is_model(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, Model)
