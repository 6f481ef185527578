"""The kinds that this daemon knows, found by model, plural or name, and where their objects live in the store."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from lrm.kind import Kind, R
from lrm.resource import AnyResource


class Registry:
    """An immutable set of kinds with unique plurals; keys are `{root}/r/{plural}/{namespace}/{name}`."""

    def __init__(self, kinds: Iterable[Kind[Any]], *, root: str = "/lrm") -> None:
        self.root = root
        self._kinds = tuple(kinds)
        self._by_plural: dict[str, Kind[Any]] = {k.plural: k for k in self._kinds}
        self._by_model: dict[type[Any], Kind[Any]] = {k.model: k for k in self._kinds}
        self._by_name: dict[str, Kind[Any]] = {k.name: k for k in self._kinds}
        if len(self._by_plural) != len(self._kinds) or len(self._by_name) != len(self._kinds):
            raise ValueError("two kinds have the same name or plural")

    def __iter__(self) -> Iterator[Kind[Any]]:
        return iter(self._kinds)

    @property
    def prefix(self) -> str:
        """The prefix of all objects; the daemon's one live watch is on it."""
        return f"{self.root}/r/"

    def of(self, model: type[R]) -> Kind[R]:
        """The kind of a model class. Raises KeyError."""
        return self._by_model[model]

    def of_object(self, resource: R) -> Kind[R]:
        """The kind of an object. Raises KeyError."""
        return self._by_model[type(resource)]

    def by_plural(self, plural: str) -> Kind[Any] | None:
        return self._by_plural.get(plural)

    def by_name(self, name: str) -> Kind[Any] | None:
        """The kind called `LabWorker`, by exact name."""
        return self._by_name.get(name)

    def key(self, kind: Kind[Any], namespace: str, name: str) -> str:
        return f"{self.prefix}{kind.plural}/{namespace}/{name}"

    def key_of(self, resource: AnyResource) -> str:
        return self.key(self.of_object(resource), resource.namespace, resource.name)

    def kind_prefix(self, kind: Kind[Any], namespace: str = "") -> str:
        """The prefix of a kind's objects, in one namespace or all."""
        return f"{self.prefix}{kind.plural}/{namespace}/" if namespace else f"{self.prefix}{kind.plural}/"

    def parse_key(self, key: str) -> tuple[Kind[Any] | None, str, str]:
        """(kind, namespace, name) of a key below the prefix; the kind is None when this daemon does not know it."""
        parts = key.removeprefix(self.prefix).split("/")
        if not key.startswith(self.prefix) or len(parts) != 3:
            return None, "", ""
        return self._by_plural.get(parts[0]), parts[1], parts[2]
