"""What can go wrong with a resource or with a leader; each class tells whether trying again can help.

    LrmError
    ├── Invalid              one or more fields are wrong; carries every cause
    ├── Forbidden            the rules of the object or of the caller do not allow it
    ├── ResourceNotFound     the object, or this incarnation of it, does not exist
    ├── ResourceExists       an object of that name exists
    ├── ResourceConflict     the object changed meanwhile; read it again and apply the change to that
    ├── Undecodable          a stored value that this version cannot read; it is kept as it is
    ├── NotLeading           this process does not hold (or may no longer trust) the lock
    │   └── Fenced           the store refused a write because another leader has taken over
    ├── CacheBehind          the cache did not reach a revision in time; the store may be away
    ├── HistoryGone          a watch cannot go on without a gap; list again and watch from there
    ├── NotOpen              what a plug-in reads the outside with is not open yet, or no more
    ├── RetryLater           a reconcile that the world outside holds up; tried again with growing delay
    └── TerminalError        a reconcile that will not succeed until the object changes; not retried

Errors of `storage` with no meaning of their own here (`Unavailable`, `OutcomeUnknown`, `TooLarge`, …) pass through.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Cause:
    """One wrong field: its path as the user wrote it, a reason of Kubernetes' list, and a sentence."""

    field: str
    reason: str
    message: str


class LrmError(Exception):
    """Base of every error of this package."""


class Invalid(LrmError):  # noqa: N818 - the name is the field's
    """One or more fields are wrong; nothing was written."""

    def __init__(self, what: str, causes: Sequence[Cause]) -> None:
        self.what = what
        self.causes = tuple(causes)
        details = ", ".join(f"{c.field}: {c.message}" for c in self.causes)
        super().__init__(f"{what} is invalid: {details}")


class Forbidden(LrmError):  # noqa: N818 - the name is the field's
    """The rules of the object or of the caller do not allow it."""


class ResourceNotFound(LrmError):  # noqa: N818 - the name is the field's
    """The object, or this incarnation of it, does not exist."""

    def __init__(self, plural: str, name: str) -> None:
        super().__init__(f'{plural} "{name}" not found')
        self.plural = plural
        self.name = name


class ResourceExists(LrmError):  # noqa: N818 - the name is the field's
    """An object of that name exists."""

    def __init__(self, plural: str, name: str) -> None:
        super().__init__(f'{plural} "{name}" already exists')
        self.plural = plural
        self.name = name


class ResourceConflict(LrmError):  # noqa: N818 - the name is the field's
    """The object changed since it was read; read it again and apply the change to that."""

    def __init__(self, plural: str, name: str, why: str = "the object has been modified") -> None:
        super().__init__(f'operation cannot be fulfilled on {plural} "{name}": {why}; please apply your changes anew')
        self.plural = plural
        self.name = name


class Undecodable(LrmError):  # noqa: N818 - the name is the field's
    """A stored value that this version cannot read; it is kept as it is."""

    def __init__(self, key: str, why: str) -> None:
        super().__init__(f"the value of key {key} cannot be decoded: {why}")
        self.key = key


class NotLeading(LrmError):  # noqa: N818 - the name is the field's
    """This process does not hold the lock, or may no longer trust that it does."""


class Fenced(NotLeading):
    """The store refused a write: another leader has taken over. Nothing was written."""


class CacheBehind(LrmError):  # noqa: N818 - the name is the field's
    """The cache did not reach a revision in time."""


class HistoryGone(LrmError):  # noqa: N818 - the name is the field's
    """A watch cannot go on without a gap: list again and watch from that list's resourceVersion."""


class NotOpen(LrmError):  # noqa: N818 - it says what is the matter
    """What a plug-in reads the outside with is not open: the daemon is starting or stopping."""


class RetryLater(LrmError):  # noqa: N818 - it says what to do
    """A reconcile that the world outside holds up, in one sentence: no defect of ours; tried again, ever later."""


class TerminalError(LrmError):
    """A reconcile that will not succeed until the object changes; it is recorded and not retried."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


def only_cause(group: BaseExceptionGroup[BaseException]) -> BaseException:
    """The first error inside a group whose errors are all of one class; else the group."""
    errors: list[BaseException] = [group]
    for error in errors:  # grows while it is walked
        if isinstance(error, BaseExceptionGroup):
            errors += error.exceptions
    causes = [error for error in errors if not isinstance(error, BaseExceptionGroup)]
    return causes[0] if len({type(error) for error in causes}) == 1 else group
