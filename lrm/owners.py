"""Whom an object belongs to, read from the store: kind and name find the owner's key, its uid decides.

Promises: an owner is said to be gone only when a linearizable read shows no such key, or another uid at it; a kind
that this daemon does not know and a value that it cannot decode are `UNKNOWN`, which proves nothing. Whoever adds an
owner to an object gets guards on the owners' keys, so that nothing is born to an owner that has ended meanwhile.
Two writers that each close one half of a circle at the same moment are not seen; the garbage collector bears circles.
Called by the client for every write that adds owners, and by the garbage collector.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import Enum, auto
from typing import Any

from lrm.errors import Cause, Invalid, Undecodable
from lrm.kind import Kind
from lrm.registry import Registry
from lrm.resource import AnyResource, OwnerReference
from lrm.writes import waits_for_dependants
from storage.base import Guard, Storage
from storage.errors import NotFound

MOST_ANCESTORS = 100
"""Owners above an object that are read, at most, to see that it is not its own ancestor."""


class Standing(Enum):
    """What a reference leads to."""

    ALIVE = auto()
    """The owner exists; it may be being deleted, in the background."""
    WAITING = auto()
    """The owner is being deleted and goes only after its dependants."""
    GONE = auto()
    """There is no such key, or another incarnation has it."""
    UNKNOWN = auto()
    """Its kind is not known here, or its value cannot be decoded."""


@dataclass(frozen=True, slots=True)
class Owner:
    """An owner as one read showed it; `resource` and `guard` where it is alive or waiting."""

    standing: Standing
    resource: AnyResource | None = None
    guard: Guard | None = None


class Owners:
    """See the module."""

    def __init__(self, storage: Storage, registry: Registry) -> None:
        self._storage = storage
        self._registry = registry

    async def find(self, namespace: str, reference: OwnerReference) -> Owner:
        """The owner that an object of this namespace refers to, as the store has it now."""
        kind = kind_of(self._registry, reference)
        if kind is None:
            return Owner(Standing.UNKNOWN)
        try:
            entry = await self._storage.get(self._registry.key(kind, namespace, reference.name))
            resource = kind.decode(entry)
        except NotFound:
            return Owner(Standing.GONE)
        except Undecodable:
            return Owner(Standing.UNKNOWN)
        if resource.uid != reference.uid:
            return Owner(Standing.GONE)
        standing = Standing.WAITING if waits_for_dependants(resource) else Standing.ALIVE
        return Owner(standing, resource, Guard(entry.key, entry.create_revision))

    async def guards(
        self, new: AnyResource, old: AnyResource | None = None, *, guarded: Iterable[Guard] = ()
    ) -> tuple[Guard, ...]:
        """Guards on the owners that `new` has and `old` had not. Raises `Invalid` for owners it may not be given.

        An owner must exist, must not be being deleted, and must not be among the object's own dependants. One whose
        key is `guarded` already is left out. A reference that begins to block its owner counts as a new one.
        """
        had = {_claim(r) for r in old.metadata.owner_references} if old is not None else set()
        had |= {(*claim[:-1], False) for claim in had}
        left_out = {guard.key for guard in guarded}
        found: dict[Guard, None] = {}
        added: list[AnyResource] = []
        causes: list[Cause] = []
        for i, reference in enumerate(new.metadata.owner_references):
            kind = kind_of(self._registry, reference)
            if _claim(reference) in had or (
                kind and self._registry.key(kind, new.namespace, reference.name) in left_out
            ):
                continue
            owner = await self.find(new.namespace, reference)
            if owner.resource is None or owner.guard is None:
                causes.append(_cause(i, _unfound(reference, new.namespace, kind, owner.standing)))
            elif owner.resource.deleting:
                causes.append(_cause(i, f"{reference.kind} {reference.name} is being deleted: nothing may join it"))
            else:
                found[owner.guard] = None
                added.append(owner.resource)
        if added and old is not None and not causes:
            causes += await self._circle(new, added)
        if causes:
            raise Invalid(f'{new.kind} "{new.name}"', causes)
        return tuple(found)

    def vanished(self, new: AnyResource, guard: Guard) -> Invalid:
        """What to raise when a guard of `guards` has failed: that owner ended while the object was being written."""
        keys = [
            self._registry.key(kind, new.namespace, reference.name) if kind else ""
            for reference in new.metadata.owner_references
            for kind in (kind_of(self._registry, reference),)
        ]
        return Invalid(f'{new.kind} "{new.name}"', [_cause(keys.index(guard.key), "this owner has just ended")])

    async def _circle(self, new: AnyResource, added: Sequence[AnyResource]) -> Iterable[Cause]:
        """The cause against an object that would be its own ancestor, or whose ancestors are too many to tell."""
        known = {owner.uid for owner in added}
        above, field = list(added), "metadata.ownerReferences"
        for owner in above:  # grows while it is walked
            if owner.uid == new.uid:
                return [Cause(field, "FieldValueInvalid", "an object cannot belong to one of its own dependants")]
            for reference in owner.metadata.owner_references:
                if reference.uid in known:
                    continue
                known.add(reference.uid)
                if len(known) > MOST_ANCESTORS:
                    return [Cause(field, "FieldValueInvalid", f"there are more than {MOST_ANCESTORS} owners above it")]
                further = await self.find(new.namespace, reference)
                if further.resource is not None:
                    above.append(further.resource)
        return ()


def kind_of(registry: Registry, reference: OwnerReference) -> Kind[Any] | None:
    """The kind that a reference names, in whatever version of its group; None when it is not known here."""
    kind = registry.by_name(reference.kind)
    return kind if kind is not None and kind.group == reference.api_version.rpartition("/")[0] else None


def _claim(reference: OwnerReference) -> tuple[str, str, str, str, bool]:
    """What a reference says of an owner that has to be true."""
    blocks = bool(reference.block_owner_deletion)
    return reference.api_version, reference.kind, reference.name, reference.uid, blocks


def _unfound(reference: OwnerReference, namespace: str, kind: Kind[Any] | None, standing: Standing) -> str:
    if kind is None:
        return f"there is no kind {reference.kind[:80]!r} in {reference.api_version[:80]!r}"
    if standing is Standing.UNKNOWN:
        return f"{reference.kind} {reference.name[:80]} cannot be decoded by this version"
    return f"there is no {reference.kind} {reference.name[:80]!r} with this uid in the namespace {namespace}"


def _cause(index: int, message: str) -> Cause:
    return Cause(f"metadata.ownerReferences[{index}]", "FieldValueInvalid", message)
