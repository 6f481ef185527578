"""The data model under every resource: camelCase on the wire, snake_case in Python, tolerant when decoding.

Fields that this version does not know are kept and written back, so that daemons of two versions can share a store;
whoever takes input from people asks `unknown_fields` and refuses them. A sealed model cannot be assigned to: caches
hand out sealed objects, and a change starts with `thaw`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from copy import deepcopy
from datetime import UTC, datetime
from enum import Enum
from functools import cache
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Self, Union, get_args, get_origin

from pydantic import AfterValidator, BaseModel, ConfigDict, PlainSerializer
from pydantic.alias_generators import to_camel


def _aware(value: datetime) -> datetime:
    if value.tzinfo is None:
        raise ValueError("a time needs a zone, as in 2026-01-31T09:00:00Z")
    try:
        return value.astimezone(UTC)
    except OverflowError:
        raise ValueError("a time must lie in the years 1 to 9999 in UTC") from None


def rfc3339(value: datetime) -> str:
    """An aware time as RFC 3339 in UTC, with microseconds only where there are some."""
    return value.astimezone(UTC).isoformat().replace("+00:00", "Z")


Timestamp = Annotated[datetime, AfterValidator(_aware), PlainSerializer(rfc3339, return_type=str, when_used="json")]
"""An aware time, RFC 3339 in UTC on the wire."""


_SEAL = "sealed"
"""Marks a shared object in its `__dict__`, beside the fields (as a cached property would): equality ignores it."""


class Model(BaseModel):
    """Base of every piece of a resource."""

    model_config = ConfigDict(
        alias_generator=to_camel,
        populate_by_name=True,
        extra="allow",
        arbitrary_types_allowed=False,
        use_attribute_docstrings=True,  # which the API tells, and with it `kubectl explain`
    )

    def __setattr__(self, name: str, value: Any) -> None:
        if _SEAL in self.__dict__:
            raise TypeError(f"{type(self).__name__} is shared and read-only; change a thaw()ed copy")
        super().__setattr__(name, value)

    def seal(self) -> Self:
        """Forbid assignment here and below, for good."""
        for part in _models(self):
            part.__dict__[_SEAL] = True
        return self

    def model_copy(self, *, update: Mapping[str, Any] | None = None, deep: bool = False) -> Self:
        """A copy that may be assigned to; without `deep` its parts are the shared ones, and stay sealed."""
        copy = super().model_copy(update=update, deep=deep)
        copy.__dict__.pop(_SEAL, None)
        return copy

    def thaw(self) -> Self:
        """A deep copy that may be changed."""
        copy = self.model_copy()
        for name in _compound(type(self)):
            copy.__dict__[name] = _thawed(copy.__dict__[name])
        unknown = copy.model_extra or {}
        for name in unknown:
            unknown[name] = _thawed(unknown[name])
        return copy

    def wire(self) -> dict[str, Any]:
        """This model as JSON values under its wire names; absent values are left out."""
        return self.model_dump(mode="json", by_alias=True, exclude_none=True)


def unknown_fields(value: Any, path: str = "") -> Iterator[str]:
    """The paths of all fields below `value` that its models do not declare."""
    match value:
        case BaseModel():
            for extra in value.model_extra or ():
                yield f"{path}.{extra}".lstrip(".")
            for name, info in type(value).model_fields.items():
                child = f"{path}.{info.alias or name}".lstrip(".")
                yield from unknown_fields(getattr(value, name), child)
        case dict():
            for key, item in value.items():
                yield from unknown_fields(item, f"{path}.{key}".lstrip("."))
        case list() | tuple():
            for i, item in enumerate(value):
                yield from unknown_fields(item, f"{path}[{i}]")


@cache
def _compound(model: type[Model]) -> tuple[str, ...]:
    """The fields with something inside: a seal or a copy passes over those that hold a text, a number or a time."""
    return tuple(name for name, info in model.model_fields.items() if not _is_scalar(info.annotation))


def _is_scalar(annotation: Any) -> bool:
    if isinstance(annotation, type):
        return issubclass(annotation, str | int | float | datetime | Enum | NoneType)
    inner = get_args(annotation)
    match get_origin(annotation):
        case origin if origin is Literal:
            return True
        case origin if origin is Annotated:
            return _is_scalar(inner[0])
        case origin if origin is Union or origin is UnionType:
            return all(_is_scalar(part) for part in inner)
        case _:
            return False


def _models(value: Any) -> Iterator[Model]:
    match value:
        case Model():
            yield value
            for name in _compound(type(value)):
                yield from _models(getattr(value, name))
        case dict():
            for item in value.values():
                yield from _models(item)
        case list() | tuple():
            for item in value:
                yield from _models(item)


def _thawed(value: Any) -> Any:
    match value:
        case Model():
            return value.thaw()
        case dict():
            return {key: _thawed(item) for key, item in value.items()}
        case list() | tuple():
            return type(value)(_thawed(item) for item in value)
        case _:
            return deepcopy(value)
