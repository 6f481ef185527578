"""What a write does to an object: the rules of generation, status, finalizers and deletion, as pure functions.

Each takes the state that the store holds and what is wanted, and returns what to store (`Put`), that the key is to be
deleted (`Remove`), or that there is nothing to write (`Unchanged`). The API and the controllers' client both stand on
them, so an object follows the same rules whoever writes it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from itertools import pairwise
from typing import Any, Generic, Literal

import orjson

from lrm.errors import Cause, Forbidden, Invalid
from lrm.kind import Kind, R, metadata_causes
from lrm.model import Model
from lrm.resource import PROTECT_ANNOTATION, AnyResource

ORPHAN_FINALIZER = "orphan"
"""Holds a deleted owner until its dependants no longer refer to it; they stay. The garbage collector's."""
FOREGROUND_FINALIZER = "foregroundDeletion"
"""Holds a deleted owner until its dependants that block it are gone. The garbage collector's."""

Propagation = Literal["", "Background", "Foreground", "Orphan"]
"""What a deletion means for dependants; empty leaves it to the finalizers that are there, else Background."""

_POLICY_FINALIZER = {"Orphan": ORPHAN_FINALIZER, "Foreground": FOREGROUND_FINALIZER}


@dataclass(frozen=True, slots=True)
class Put(Generic[R]):
    """Store this state."""

    resource: R


@dataclass(frozen=True, slots=True)
class Remove:
    """Delete the key: deletion was asked for and the last finalizer is gone."""


@dataclass(frozen=True, slots=True)
class Unchanged:
    """Nothing differs; the object keeps its resourceVersion."""


Decision = Put[R] | Remove | Unchanged


def for_create(kind: Kind[R], wanted: R, *, uid: str, now: datetime, with_status: bool = False) -> R:
    """A new object: generation 1, the kind's initial phase, a uid of its own. Raises `Invalid`.

    Its status is empty, or with `with_status` the wanted one: a field's owner is protected against others' changes,
    and of what is only now made nobody has anything to lose. The phase must be the initial one all the same.
    """
    new = wanted.thaw()
    meta = new.metadata
    meta.uid, meta.generation, meta.resource_version = uid, 1, ""
    meta.creation_timestamp, meta.deletion_timestamp, meta.deletion_grace_period_seconds = now, None, None
    if not with_status:
        new.status = kind.status_model(phase=kind.initial_phase)
    elif new.status.phase != kind.initial_phase:
        raise Invalid(
            f'{kind.name} "{new.name}"',
            [Cause("status.phase", "FieldValueInvalid", f"a new object is {kind.initial_phase}")],
        )
    _refuse(kind, new, [*metadata_causes(new.metadata, kind.max_name), *kind.validate(new, None)])
    return new


def for_update(kind: Kind[R], current: R, wanted: R) -> Decision[R]:
    """Spec, labels, annotations, finalizers and owners from `wanted`; all else stays. Raises `Invalid`, `Forbidden`."""
    new = current.thaw()
    new.spec = wanted.spec.thaw()
    source = wanted.metadata.thaw()
    new.metadata.labels, new.metadata.annotations = source.labels, source.annotations
    new.metadata.finalizers = list(dict.fromkeys(source.finalizers))
    new.metadata.owner_references = source.owner_references
    spec_moved = new.spec.wire() != current.spec.wire()
    if current.deleting:
        added = sorted(set(new.metadata.finalizers) - set(current.metadata.finalizers))
        if added:
            raise Forbidden(f"no finalizer can be added to an object that is being deleted: {', '.join(added)}")
        if spec_moved:
            raise Forbidden("the spec of an object that is being deleted is frozen")
        if not new.metadata.finalizers:
            return Remove()
    if spec_moved:
        new.metadata.generation = current.metadata.generation + 1
    if _same(kind, current, new):
        return Unchanged()
    _refuse(kind, new, [*metadata_causes(new.metadata, kind.max_name), *kind.validate(new, current)])
    return Put(new)


def for_status(kind: Kind[R], current: R, wanted: R, *, owner: str, force: bool = False) -> Decision[R]:
    """The status from `wanted`; all else stays.

    Raises `Forbidden` when a field of another owner changed (unless `force`), and `Invalid` for a phase change that
    the kind's table does not allow.
    """
    if _wire_bytes(wanted.status) == _wire_bytes(current.status):
        return Unchanged()
    new = current.thaw()
    new.status = wanted.status.thaw()
    foreign = kind.foreign_changes(current.status, new.status, owner)
    if foreign and not force:
        listed = ", ".join(f"status.{name} (owned by {holder or 'nobody'})" for name, holder in foreign)
        raise Forbidden(f'"{owner}" may not change {listed}')
    _refuse(kind, new, list(_phase_causes(kind, current, new)))
    return Put(new)


def for_delete(kind: Kind[R], current: R, *, now: datetime, propagation: Propagation = "") -> Decision[R]:
    """Mark an object as being deleted, or remove it when nothing holds it. Raises `Forbidden` when protected.

    A `propagation` that is said replaces what an earlier deletion said, as in Kubernetes.
    """
    if current.metadata.annotations.get(PROTECT_ANNOTATION, "false") != "false":
        raise Forbidden(f'{kind.name} "{current.name}" is protected: remove the annotation {PROTECT_ANNOTATION} first')
    finalizers = _under_policy(current.metadata.finalizers, propagation)
    if not finalizers:
        return Remove()
    new = current.thaw()
    new.metadata.finalizers = finalizers
    if not current.deleting:
        new.metadata.deletion_timestamp = now
        new.metadata.deletion_grace_period_seconds = 0
    return Unchanged() if _same(kind, current, new) else Put(new)


def waits_for_dependants(resource: AnyResource) -> bool:
    """Whether an object is being deleted in the foreground: it goes after its dependants."""
    return resource.deleting and FOREGROUND_FINALIZER in resource.metadata.finalizers


def _under_policy(finalizers: Sequence[str], propagation: Propagation) -> list[str]:
    if not propagation:
        return list(finalizers)
    wanted = _POLICY_FINALIZER.get(propagation)
    kept = [f for f in finalizers if f == wanted or f not in _POLICY_FINALIZER.values()]
    return kept if wanted is None or wanted in kept else [*kept, wanted]


def _same(kind: Kind[R], a: R, b: R) -> bool:
    return kind.encode(a) == kind.encode(b)


def _wire_bytes(part: Model) -> bytes:
    return orjson.dumps(part.wire())


def _refuse(kind: Kind[R], new: R, causes: list[Cause]) -> None:
    if causes:
        raise Invalid(f'{kind.name} "{new.name}"', causes)


def _phase_causes(kind: Kind[Any], current: AnyResource, new: AnyResource) -> Iterator[Cause]:
    before, after = str(current.status.phase), str(new.status.phase)
    if before == after and len(new.status.phase_history) <= len(current.status.phase_history):
        return
    last_known = current.status.phase_history[-1:] if current.status.phase_history else []
    steps = new.status.phase_history
    if last_known and last_known[0] in steps:
        steps = steps[len(steps) - steps[::-1].index(last_known[0]) :]
    path = [before, *(s.to for s in steps)] if steps else [before, after]
    if path[-1] != after:
        yield Cause("status.phaseHistory", "FieldValueInvalid", f"its last entry must lead to {after}")
    for source, target in pairwise(path):
        if not kind.may_follow(source, target):
            message = f"{source} cannot be followed by {target}"
            yield Cause("status.phase", "FieldValueInvalid", message)
