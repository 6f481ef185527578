"""What lrm must know of a kind to keep, check and serve it; plug-ins hand over one `Kind` per kind.

A `Kind` is data and pure functions: it never looks at the store, the clock or the world.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from fnmatch import fnmatchcase
from typing import Any, Generic, TypeVar

import orjson
from pydantic import ValidationError
from pydantic_core import ErrorDetails

from lrm.errors import Cause, Invalid, Undecodable
from lrm.model import Model, unknown_fields
from lrm.resource import AnyResource, ObjectMeta, Resource, Status
from storage.base import Entry

R = TypeVar("R", bound=Resource[Any, Any])
M = TypeVar("M", bound=Model)

_SUBDOMAIN = re.compile(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*")
_LABEL = re.compile(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?")
_QUALIFIED = re.compile(r"([A-Za-z0-9][-A-Za-z0-9_.]*)?[A-Za-z0-9]")
_IGNORED_METADATA = frozenset({"managedFields", "selfLink"})
"""Metadata that Kubernetes clients send and that has no meaning here."""
_ANNOTATION_BYTES = 256 * 1024
GENERATED_LENGTH = 8
"""Characters that are put after a generateName."""


@dataclass(frozen=True, slots=True)
class Column:
    """A column of `kubectl get`; `priority` 1 is shown with `-o wide` only. `value` may return None.

    A time is shown as how long ago it was, `5m`, or how long it is until then, `in 5m`.
    """

    name: str
    value: Callable[[Any], str | int | bool | datetime | None]
    type: str = "string"
    description: str = ""
    priority: int = 0


@dataclass(frozen=True, slots=True)
class Scale:
    """How many of something an object asks for and has: what the subresource `scale` reads and sets."""

    wished: Callable[[Any], int]
    wish: Callable[[Any, int], None]
    """Changes the spec of a copy; beyond 0 to 2147483647, the kind's `validate` says what the number may be."""
    actual: Callable[[Any], int]
    selector: Callable[[Any], str]
    """The label selector that finds them."""


@dataclass(frozen=True)
class Kind(Generic[R]):
    """One kind of resource."""

    model: type[R]
    plural: str
    singular: str
    short_names: tuple[str, ...] = ()
    categories: tuple[str, ...] = ()
    max_name: int = 253
    columns: tuple[Column, ...] = ()
    transitions: Mapping[str, frozenset[str]] = field(default_factory=dict)
    """Phase → phases that may follow it."""
    initial_phase: str = "Pending"
    default_owner: str = ""
    """The controller that owns every status field and condition not named below."""
    status_owners: Mapping[str, str] = field(default_factory=dict)
    """Wire name (or fnmatch pattern) of a top-level status field → owning controller."""
    condition_owners: Mapping[str, str] = field(default_factory=dict)
    """Condition type → owning controller."""
    indexes: Mapping[str, Callable[[R], Iterable[str]]] = field(default_factory=dict)
    """Cache index → the values under which an object is found."""
    fields: Mapping[str, Callable[[R], str]] = field(default_factory=dict)
    """Field selectors (`status.phase`, …) beside `metadata.name` and `metadata.namespace`."""
    validate: Callable[[R, R | None], Iterable[Cause]] = lambda _new, _old: ()
    """Checks beyond types, for a create (old is None) or an update: immutable fields, ranges that depend on others."""
    scale: Scale | None = None
    """For kinds with a number of replicas."""
    create_refusal: str = ""
    """Why users may not create objects of this kind; empty when they may."""
    forgotten_with_owner: bool = False
    """What is orphaned by its owner's end is removed by one delete of its key, whatever its finalizers.

    For objects that mirror what their owner had: cleaning up after them is meaningless without it. An owner that is
    deleted in the foreground keeps them until nothing else holds it, and none of them is ever marked as being deleted.
    """
    present: Callable[[R, Callable[[str, str, str], AnyResource | None]], R] | None = None
    """Computes what is served but not stored, from a cache lookup by (kind, namespace, name); returns a copy."""

    @property
    def api_version(self) -> str:
        return str(self.model.model_fields["api_version"].default)

    @property
    def group(self) -> str:
        return self.api_version.rpartition("/")[0]

    @property
    def version(self) -> str:
        return self.api_version.rpartition("/")[2]

    @property
    def name(self) -> str:
        return str(self.model.model_fields["kind"].default)

    @property
    def spec_model(self) -> type[Model]:
        return _annotation(self.model, "spec", Model)

    @property
    def status_model(self) -> type[Status]:
        return _annotation(self.model, "status", Status)

    def document(self, resource: R) -> dict[str, Any]:
        """The object as JSON values in the order that people expect, empty metadata left out."""
        wire = resource.wire()
        wire["metadata"] = {k: v for k, v in wire["metadata"].items() if v not in ({}, [], "")}
        return wire

    def encode(self, resource: R) -> bytes:
        """The value to store: compact JSON without the resourceVersion."""
        document = self.document(resource)
        document["metadata"].pop("resourceVersion", None)
        return orjson.dumps(document)

    def decode(self, entry: Entry) -> R:
        """The object of a stored entry. Raises `Undecodable`; unknown fields are kept."""
        try:
            resource = self.model.model_validate_json(entry.value)
        except ValidationError as error:
            raise Undecodable(entry.key, "; ".join(c.field + ": " + c.message for c in causes_of(error))) from error
        resource.metadata.resource_version = str(entry.revision)
        return resource

    def parse(
        self, document: Mapping[str, Any], *, unknown: str = "Strict", keep: Collection[str] = ()
    ) -> tuple[R, list[str]]:
        """An object from a user's document, its status left out, and warnings about unknown fields.

        `unknown` is Kubernetes' fieldValidation: Strict refuses unknown fields, Warn reports them, Ignore drops them.
        `keep` names those that the stored object has already: a newer version wrote them, and they stay.
        Raises `Invalid` with every cause.
        """
        wanted = {**document, "apiVersion": self.api_version, "kind": self.name, "status": {}}
        metadata = wanted.get("metadata")
        if isinstance(metadata, dict):
            wanted["metadata"] = {k: v for k, v in metadata.items() if k not in _IGNORED_METADATA and v is not None}
        causes: list[Cause] = []
        try:
            resource = self.model.model_validate(wanted)
        except ValidationError as error:
            causes = causes_of(error)
            also = [c for c in _unknown_causes(self, wanted) if c.field not in keep]
            raise Invalid(self._what(document), [*causes, *also, *_readable_metadata_causes(self, wanted)]) from error
        strangers = [f for f in unknown_fields(resource) if f not in keep]
        if strangers and unknown == "Strict":
            causes = [Cause(f, "FieldValueInvalid", f'unknown field "{f}"') for f in strangers]
        causes += metadata_causes(resource.metadata, self.max_name)
        if causes:
            raise Invalid(self._what(document), causes)
        if strangers:
            resource = self.model.model_validate(_without(wanted, strangers))
        resource.status = self.status_model(phase=self.initial_phase)
        return resource, [f'unknown field "{f}"' for f in strangers] if unknown == "Warn" else []

    def parse_status(self, document: Mapping[str, Any], current: R, *, keep: Collection[str] = ()) -> R:
        """`current` with the status of a user's document; `keep` as for `parse`. Raises `Invalid`."""
        desired = current.thaw()
        try:
            desired.status = self.status_model.model_validate(document.get("status") or {})
        except ValidationError as error:
            raise Invalid(self._what(document), causes_of(error, "status")) from error
        strangers = [
            Cause(f, "FieldValueInvalid", f'unknown field "{f}"')
            for f in unknown_fields(desired.status, "status")
            if f not in keep
        ]
        if strangers:
            raise Invalid(self._what(document), strangers)
        return desired

    def owner_of(self, status_field: str) -> str:
        """Which controller owns a top-level status field, by its wire name."""
        exact = self.status_owners.get(status_field)
        if exact is not None:
            return exact
        return next((o for p, o in self.status_owners.items() if fnmatchcase(status_field, p)), self.default_owner)

    def foreign_changes(self, old: Status, new: Status, owner: str) -> list[tuple[str, str]]:
        """The status fields (and `conditions[Type]`) that differ and belong to someone else, with their owner."""
        before, after = old.wire(), new.wire()
        names = {k for k in before.keys() | after.keys() if before.get(k) != after.get(k)} - {"conditions"}
        found = [(name, self.owner_of(name)) for name in sorted(names)]
        had = {c.type: c for c in old.conditions}
        has = {c.type: c for c in new.conditions}
        found += [
            (f"conditions[{kind}]", self.condition_owners.get(kind, self.default_owner))
            for kind in sorted(had.keys() | has.keys())
            if had.get(kind) != has.get(kind)
        ]
        return [(name, holder) for name, holder in found if holder != owner]

    def may_follow(self, before: str, after: str) -> bool:
        """Whether the transition table allows this step."""
        return after in self.transitions.get(before, frozenset())

    def _what(self, document: Mapping[str, Any]) -> str:
        metadata = document.get("metadata")
        name = metadata.get("name") or metadata.get("generateName") if isinstance(metadata, dict) else None
        return f'{self.name} "{name or ""}"'


def causes_of(error: ValidationError, root: str = "") -> list[Cause]:
    """Pydantic's errors as causes, one per field."""
    return [_cause(e, root) for e in error.errors(include_url=False, include_context=False)]


def metadata_causes(meta: ObjectMeta, max_name: int) -> list[Cause]:
    """What Kubernetes' rules for names, labels and annotations say against the metadata."""
    found = list(_name_causes(meta, max_name))
    if not _LABEL.fullmatch(meta.namespace) or len(meta.namespace) > 63:
        found.append(
            Cause("metadata.namespace", "FieldValueInvalid", f"must be a DNS-1123 label, not {meta.namespace!r}")
        )
    for key, value in meta.labels.items():
        found += _qualified("metadata.labels", key)
        if len(value) > 63 or (value and not _QUALIFIED.fullmatch(value)):
            found.append(
                Cause(f"metadata.labels.{key}", "FieldValueInvalid", f"not a valid label value: {value[:80]!r}")
            )
    for key in meta.annotations:
        found += _qualified("metadata.annotations", key)
    if sum(len(k) + len(v.encode()) for k, v in meta.annotations.items()) > _ANNOTATION_BYTES:
        found.append(Cause("metadata.annotations", "FieldValueTooLong", f"at most {_ANNOTATION_BYTES} bytes in all"))
    for i, name in enumerate(meta.finalizers):
        found += _qualified(f"metadata.finalizers[{i}]", name)
    return found


def _name_causes(meta: ObjectMeta, max_name: int) -> Iterable[Cause]:
    rule = "a lowercase DNS-1123 subdomain of at most {} characters, not {!r}"
    longest = max_name - GENERATED_LENGTH
    if meta.name:
        if not _SUBDOMAIN.fullmatch(meta.name) or len(meta.name) > max_name:
            yield Cause("metadata.name", "FieldValueInvalid", "must be " + rule.format(max_name, meta.name[:80]))
    elif not meta.generate_name:
        yield Cause("metadata.name", "FieldValueRequired", "name or generateName is required")
    elif not _SUBDOMAIN.fullmatch(meta.generate_name + "0") or len(meta.generate_name) > longest:
        told = "must begin " + rule.format(longest, meta.generate_name[:80])
        yield Cause("metadata.generateName", "FieldValueInvalid", told)


def _qualified(path: str, key: str) -> list[Cause]:
    prefix, _, name = key.rpartition("/")
    good = len(name) <= 63 and _QUALIFIED.fullmatch(name) and (not prefix or _SUBDOMAIN.fullmatch(prefix))
    if good and ("/" not in key or prefix) and len(prefix) <= 253:
        return []
    return [Cause(path, "FieldValueInvalid", f"{key[:80]!r} must be a qualified name, as in example.com/name")]


def _cause(error: ErrorDetails, root: str) -> Cause:
    path = root
    for part in error["loc"]:
        path += f"[{part}]" if isinstance(part, int) else f".{part}"
    missing = error["type"] == "missing"
    message = "required value" if missing else error["msg"].removeprefix("Value error, ")
    return Cause(path.lstrip("."), "FieldValueRequired" if missing else "FieldValueInvalid", message)


def _readable_metadata_causes(kind: Kind[Any], document: Mapping[str, Any]) -> list[Cause]:
    """The same of a document whose other parts do not validate; a metadata of wrong types was told already."""
    try:
        meta = ObjectMeta.model_validate(document.get("metadata"))
    except ValidationError:
        return []
    return metadata_causes(meta, kind.max_name)


def _unknown_causes(kind: Kind[Any], document: Mapping[str, Any]) -> list[Cause]:
    """Unknown fields of a document that does not validate, so that all errors are told at once."""
    top = {"apiVersion", "kind", "metadata", "spec", "status"}
    found = [Cause(f, "FieldValueInvalid", f'unknown field "{f}"') for f in document if f not in top]
    for part, model in (("metadata", kind.model.model_fields["metadata"].annotation), ("spec", kind.spec_model)):
        value = document.get(part)
        if isinstance(value, dict) and isinstance(model, type) and issubclass(model, Model):
            found += [Cause(f, "FieldValueInvalid", f'unknown field "{f}"') for f in _strangers(model, value, part)]
    return found


def _strangers(model: type[Model], value: Mapping[str, Any], path: str) -> Iterable[str]:
    known: dict[str, Any] = {}
    for name, info in model.model_fields.items():
        known[name] = known[info.alias or name] = info.annotation
    for key, item in value.items():
        if key not in known:
            yield f"{path}.{key}"
            continue
        for inner in _model_types(known[key]):
            if isinstance(item, dict):
                yield from _strangers(inner, item, f"{path}.{key}")


def _model_types(annotation: Any) -> Sequence[type[Model]]:
    if isinstance(annotation, type):
        return (annotation,) if issubclass(annotation, Model) else ()
    return [m for a in getattr(annotation, "__args__", ()) for m in _model_types(a)][:1]


def _without(document: Mapping[str, Any], paths: Sequence[str]) -> dict[str, Any]:
    copy: dict[str, Any] = orjson.loads(orjson.dumps(document))
    for path in paths:
        *parents, last = re.findall(r"[^.\[\]]+", path)
        place: Any = copy
        for part in parents:
            place = place[int(part)] if isinstance(place, list) else place.get(part)
            if place is None:
                break
        if isinstance(place, dict):
            place.pop(last, None)
    return copy


def _annotation(model: type[Any], name: str, base: type[M]) -> type[M]:
    annotation = model.model_fields[name].annotation
    if not (isinstance(annotation, type) and issubclass(annotation, base)):
        raise TypeError(f"{model.__name__}.{name} must be a {base.__name__}")
    return annotation
