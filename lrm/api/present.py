"""Objects on their way out: what a kind computes when served is added, and the rest goes out as it is stored.

Where nothing is computed, the stored bytes are sent with the resourceVersion spliced in, which keeps long lists cheap
and unknown fields of other versions intact.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import orjson

from lrm.cache import Cache, Item
from lrm.kind import Kind
from lrm.resource import AnyResource


class Presenter:
    """Serves objects; the cache answers what a kind asks about other objects."""

    def __init__(self, cached: Cache) -> None:
        self._cache = cached

    def shown(self, kind: Kind[Any], resource: AnyResource, revision: int = 0) -> AnyResource:
        """The object as clients see it; `revision` replaces its resourceVersion."""
        shown = kind.present(resource, self._lookup) if kind.present else resource
        if revision and shown.revision != revision:
            shown = shown.thaw()
            shown.metadata.resource_version = str(revision)
        return shown

    def document(self, kind: Kind[Any], resource: AnyResource) -> dict[str, Any]:
        """The object as JSON values."""
        return kind.document(self.shown(kind, resource))

    def raw(self, item: Item, revision: int = 0) -> bytes:
        """The object as JSON; one that cannot be decoded as its name alone."""
        revision = revision or item.entry.revision
        if item.resource is None:
            return orjson.dumps(_bare(item, revision))
        if item.kind.present is None:
            head = _head(item.kind.api_version, item.kind.name)
            if item.entry.value.startswith(head):
                return b'%b"resourceVersion":"%d",%b' % (head, revision, item.entry.value[len(head) :])
        return orjson.dumps(item.kind.document(self.shown(item.kind, item.resource, revision)))

    def _lookup(self, kind: str, namespace: str, name: str) -> AnyResource | None:
        registry = self._cache.registry
        found = registry.by_name(kind) or registry.by_plural(kind)
        item = self._cache.item(found, namespace, name) if found else None
        return item.resource if item else None


@cache
def _head(api_version: str, kind: str) -> bytes:
    """How `Kind.encode` begins every value; metadata is never empty, it has a name."""
    return orjson.dumps({"apiVersion": api_version, "kind": kind, "metadata": {}})[:-2]


def _bare(item: Item, revision: int) -> dict[str, Any]:
    metadata = {"name": item.name, "namespace": item.namespace, "resourceVersion": str(revision)}
    return {"apiVersion": item.kind.api_version, "kind": item.kind.name, "metadata": metadata}
