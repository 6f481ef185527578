"""The typed client of controllers, garbage collection and the API: read, mutate, compare-and-swap, try again.

A change is a function that mutates a copy; on a conflict it is applied anew to what the store holds, never a stale
body. A controller's client is bound to its owner name (which status fields it may change) and to its leader's fence
(every write carries the guard). It remembers what it wrote, so that the runner can wait until the caches have it.
"""

from __future__ import annotations

import asyncio
import random
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Protocol

from lrm import writes
from lrm.errors import Fenced, ResourceConflict, ResourceExists, ResourceNotFound, Undecodable
from lrm.kind import GENERATED_LENGTH, Kind, R
from lrm.owners import Owners
from lrm.registry import Registry
from lrm.resource import AnyResource
from storage.base import Entry, Guard, Storage
from storage.clock import Clock
from storage.errors import AlreadyExists, Conflict, GuardFailed, NotFound, OutcomeUnknown

_ATTEMPTS = 12
_PAGE = 500


class Fence(Protocol):
    """What a leader's writes are tied to."""

    key: str

    def guard(self) -> Guard:
        """The guard of the current term. Raises `NotLeading` past the deadline."""
        ...

    def lost(self) -> None:
        """Called when the store has refused the guard: step down at once."""
        ...


@dataclass
class Written:
    """What one reconcile wrote: revisions by key, and whether some write's outcome is unknown."""

    revisions: dict[str, set[int]] = field(default_factory=dict)
    highest: int = 0
    unknown: bool = False

    def note(self, key: str, revision: int) -> None:
        """Remember a write that was made."""
        self.revisions.setdefault(key, set()).add(revision)
        self.highest = max(self.highest, revision)


class Client:
    """Reads and writes resources; cheap to make, so that each reconcile has its own `written`."""

    def __init__(
        self,
        storage: Storage,
        registry: Registry,
        clock: Clock,
        *,
        owner: str = "",
        fence: Fence | None = None,
        new_uid: Callable[[], str] = lambda: str(uuid.uuid4()),
    ) -> None:
        self._storage = storage
        self._registry = registry
        self._owners = Owners(storage, registry)
        self._clock = clock
        self._owner = owner
        self._fence = fence
        self._new_uid = new_uid
        self.written = Written()

    def bind(self, *, owner: str, fence: Fence | None) -> Client:
        """A client for one reconcile of one controller."""
        return Client(self._storage, self._registry, self._clock, owner=owner, fence=fence, new_uid=self._new_uid)

    async def get(self, model: type[R], namespace: str, name: str) -> R:
        """One object from the store. Raises `ResourceNotFound`, `Undecodable`."""
        kind = self._registry.of(model)
        try:
            entry = await self._storage.get(self._registry.key(kind, namespace, name))
        except NotFound as error:
            raise ResourceNotFound(kind.plural, name) from error
        return kind.decode(entry)

    async def list(self, model: type[R], namespace: str = "", *, whole: bool = False) -> list[R]:
        """All objects of a kind at one revision, from the store.

        What cannot be decoded is left out; for who decides by what is absent (`whole`) it raises `Undecodable`.
        """
        kind, found, token = self._registry.of(model), [], ""
        while True:
            page = await self._storage.list(
                self._registry.kind_prefix(kind, namespace), limit=_PAGE, continue_token=token
            )
            for entry in page.entries:
                try:
                    found.append(kind.decode(entry))
                except Undecodable:
                    if whole:
                        raise
            token = page.continue_token
            if not token:
                return found

    async def create(self, resource: R, *, guards: tuple[Guard, ...] = (), with_status: bool = False) -> R:
        """Store a new object, under further guards if given; `with_status` in one write with what is observed of it.

        Each owner that it names must exist and not be deleting, and is guarded, so that no child is born after its
        owner's end; an owner whose key is in `guards` is the caller's to have judged.
        Raises `ResourceExists`, `Invalid`, `Fenced`, and the store's `GuardFailed` for one of `guards`.
        """
        kind = self._registry.of_object(resource)
        new = writes.for_create(kind, resource, uid=self._new_uid(), now=self._clock.now(), with_status=with_status)
        if not new.metadata.name:
            new.metadata.name = f"{new.metadata.generate_name}{uuid.UUID(new.uid).hex[:GENERATED_LENGTH]}"
            new.metadata.generate_name = None
        key = self._registry.key_of(new)
        owners = await self._owners.guards(new, guarded=guards)
        with self._noting():
            try:
                entry = await self._storage.create(key, kind.encode(new), guards=self._guards((*guards, *owners)))
            except AlreadyExists as error:
                raise ResourceExists(kind.plural, new.name) from error
            except GuardFailed as error:
                if error.guard in owners:
                    raise self._owners.vanished(new, error.guard) from error
                raise self._fenced(error) from error
        return self._stored(new, entry)

    async def check_owners(self, new: AnyResource, old: AnyResource | None = None) -> None:
        """Raise `Invalid` for what `create`, or `update` of `old`, would refuse of the owners that are named."""
        await self._owners.guards(new, old)

    async def update(self, resource: R, mutate: Callable[[R], None], *, retry: bool = True) -> R | None:
        """Change spec, labels, annotations, finalizers or owners; None when the change removed the object.

        Owners that the change adds are checked and guarded as in `create`, and must not close a circle.
        With `retry` False the change holds for exactly this resourceVersion, else `ResourceConflict`.
        """
        kind = self._registry.of_object(resource)

        def decide(current: R) -> writes.Decision[R]:
            wanted = current.thaw()
            mutate(wanted)
            return writes.for_update(kind, current, wanted)

        return await self._swap(kind, resource, decide, retry=retry)

    async def update_status(
        self, resource: R, mutate: Callable[[R], None], *, retry: bool = True, force: bool = False
    ) -> R:
        """Change status fields that this client's owner owns. Raises `Forbidden` for another's, `Invalid`, …"""
        kind = self._registry.of_object(resource)

        def decide(current: R) -> writes.Decision[R]:
            wanted = current.thaw()
            mutate(wanted)
            return writes.for_status(kind, current, wanted, owner=self._owner, force=force)

        stored = await self._swap(kind, resource, decide, retry=retry)
        if stored is None:
            raise ResourceNotFound(kind.plural, resource.name)
        return stored

    async def delete(self, resource: R, *, propagation: writes.Propagation = "", retry: bool = True) -> R | None:
        """Ask for deletion; None when the object is gone, else its state with a deletionTimestamp.

        With `retry` False it holds for exactly this resourceVersion, else `ResourceConflict`.
        """
        kind = self._registry.of_object(resource)

        def decide(current: R) -> writes.Decision[R]:
            return writes.for_delete(kind, current, now=self._clock.now(), propagation=propagation)

        return await self._swap(kind, resource, decide, retry=retry)

    async def add_finalizer(self, resource: R, finalizer: str) -> R:
        """Hold an object; it must not be deleting. Raises `Forbidden`, `ResourceNotFound`."""
        held = await self.update(resource, lambda r: _append(r.metadata.finalizers, finalizer))
        if held is None:
            raise ResourceNotFound(self._registry.of_object(resource).plural, resource.name)
        return held

    async def remove_finalizer(self, resource: R, finalizer: str) -> R | None:
        """Let an object go; None when that was the last hold on an object that is being deleted."""

        def drop(r: R) -> None:
            r.metadata.finalizers = [f for f in r.metadata.finalizers if f != finalizer]

        return await self.update(resource, drop)

    async def forget(self, resource: AnyResource, *, retry: bool = True) -> None:
        """Delete the key whatever its finalizers, while it is this incarnation; being gone already is fine.

        With `retry` False only in exactly this state, else `ResourceConflict`.
        """
        kind = self._registry.of_object(resource)

        def decide(_current: AnyResource) -> writes.Decision[AnyResource]:
            return writes.Remove()

        try:
            await self._swap(kind, resource, decide, retry=retry)
        except ResourceNotFound:
            return

    async def _swap(
        self, kind: Kind[R], resource: R, decide: Callable[[R], writes.Decision[R]], *, retry: bool
    ) -> R | None:
        key, current = self._registry.key_of(resource), resource
        for attempt in range(_ATTEMPTS):
            decision = decide(current)
            new = decision.resource if isinstance(decision, writes.Put) else None
            owners = await self._owners.guards(new, current) if new is not None else ()
            try:
                with self._noting():
                    return await self._apply(kind, key, current, decision, owners)
            except Conflict as error:
                if error.current is None:
                    raise ResourceNotFound(kind.plural, resource.name) from error
                fresh = kind.decode(error.current)
                if fresh.uid != resource.uid:
                    raise ResourceNotFound(kind.plural, resource.name) from error
                if not retry:
                    raise ResourceConflict(kind.plural, resource.name) from error
                current = fresh
            except GuardFailed as error:
                if new is not None and error.guard in owners:
                    raise self._owners.vanished(new, error.guard) from error
                raise self._fenced(error) from error
            await self._clock.sleep(random.uniform(0, 0.01 * attempt))  # noqa: S311 - spreads writers, keeps no secret
        raise ResourceConflict(kind.plural, resource.name, f"it changed {_ATTEMPTS} times in a row")

    async def _apply(
        self, kind: Kind[R], key: str, current: R, decision: writes.Decision[R], owners: tuple[Guard, ...]
    ) -> R | None:
        match decision:
            case writes.Unchanged():
                return current
            case writes.Remove():
                revision = await self._storage.delete(key, expected_revision=current.revision, guards=self._guards())
                self.written.note(key, revision)
                return None
            case writes.Put(resource=new):
                entry = await self._storage.update(
                    key, kind.encode(new), expected_revision=current.revision, guards=self._guards(owners)
                )
                return self._stored(new, entry)

    def _guards(self, more: tuple[Guard, ...] = ()) -> tuple[Guard, ...]:
        return (self._fence.guard(), *more) if self._fence else more

    def _fenced(self, error: GuardFailed) -> Exception:
        if self._fence is None or error.guard.key != self._fence.key:
            return error
        self._fence.lost()
        return Fenced(f"{self._owner} no longer leads: {error.guard.key} has another holder")

    @contextmanager
    def _noting(self) -> Iterator[None]:
        try:
            yield
        except (OutcomeUnknown, asyncio.CancelledError):
            self.written.unknown = True
            raise

    def _stored(self, new: R, entry: Entry) -> R:
        new.metadata.resource_version = str(entry.revision)
        self.written.note(entry.key, entry.revision)
        return new


def _append(names: list[str], name: str) -> None:
    if name not in names:
        names.append(name)
