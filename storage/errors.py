"""Everything a store can refuse or fail to do.

    StorageError
    ├── NotFound            the key is absent (proved by a read)
    ├── AlreadyExists       create met a key; carries the current entry
    ├── Conflict            the key is not at the expected revision; carries the current entry, None when it is gone
    ├── GuardFailed         a guarded key is not in the expected incarnation; nothing was written
    ├── Compacted           the asked revision is no longer kept; carries the oldest that is
    ├── FutureRevision      the asked revision has not happened yet
    ├── StoreReset          the store's revisions fell or its epoch changed: everything known is to be read again
    ├── LeaseNotFound       the lease has expired, was revoked, or never was
    ├── TooLarge            the value or the request is over the store's limit
    ├── InvalidKey          the key is empty, too long, or outside what the store accepts
    ├── PermissionDenied    the credentials are refused
    ├── Unavailable         certainly not written; may be retried
    │   └── NoSpace         the store's quota is used up; only deletes and compaction pass
    ├── OutcomeUnknown      a write whose reply was lost and which could not be settled
    └── RedisFailed         Redis did not give or take a bookmark; nothing depends on it but where work is resumed

Whether an error may be retried is decided by its class: `Unavailable` only.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from storage.base import Entry, Guard


class StorageError(Exception):
    """Base of every error of this package."""


class NotFound(StorageError):  # noqa: N818 - the name is the contract's
    """The key is absent, proved by a linearizable read."""

    def __init__(self, key: str) -> None:
        super().__init__(f"key {key!r} does not exist")
        self.key = key


class AlreadyExists(StorageError):  # noqa: N818 - the name is the contract's
    """A create met an existing key."""

    def __init__(self, current: Entry) -> None:
        super().__init__(f"key {current.key!r} already exists at revision {current.revision}")
        self.current = current


class Conflict(StorageError):  # noqa: N818 - the name is the contract's
    """The key is not what the writer expected; `current` is None when it is gone."""

    def __init__(self, key: str, current: Entry | None) -> None:
        where = f"is at revision {current.revision}" if current else "does not exist"
        super().__init__(f"key {key!r} {where}, not as expected")
        self.key = key
        self.current = current


class GuardFailed(StorageError):  # noqa: N818 - the name is the contract's
    """A guarded key is gone or was created anew; nothing was written."""

    def __init__(self, guard: Guard) -> None:
        super().__init__(
            f"guard {guard.key!r} is no longer the incarnation created at revision {guard.create_revision}"
        )
        self.guard = guard


class Compacted(StorageError):  # noqa: N818 - the name is the contract's
    """The asked revision is no longer kept; `oldest` is the lowest that is, 0 when the store did not say."""

    def __init__(self, oldest: int) -> None:
        since = f"before revision {oldest}" if oldest else "as old as that"
        super().__init__(f"the store keeps no history {since}")
        self.oldest = oldest


class FutureRevision(StorageError):  # noqa: N818 - the name is the contract's
    """The asked revision is above the store's head and was never seen by this backend."""

    def __init__(self, asked: int, head: int) -> None:
        super().__init__(f"revision {asked} has not happened yet: the store is at {head}")
        self.asked = asked
        self.head = head


class StoreReset(StorageError):  # noqa: N818 - the name is the contract's
    """The store went back in time (restored) or began a new epoch; lists and watches must start again."""


class LeaseNotFound(StorageError):  # noqa: N818 - the name is the contract's
    """The lease has expired, was revoked, or never was."""

    def __init__(self, lease: int) -> None:
        super().__init__(f"lease {lease:x} does not exist")
        self.lease = lease


class TooLarge(StorageError):  # noqa: N818 - the name is the contract's
    """The value or the request is over the store's limit; nothing was written."""


class InvalidKey(StorageError):  # noqa: N818 - the name is the contract's
    """The key or prefix is not one that the store accepts."""


class PermissionDenied(StorageError):  # noqa: N818 - the name is the contract's
    """The store refuses these credentials or this user's rights do not reach."""


class Unavailable(StorageError):  # noqa: N818 - the name is the contract's
    """Certainly not written (or not read); may be retried."""


class NoSpace(Unavailable):
    """The store's quota is used up; puts and lease grants are refused, deletes and compaction pass."""


class OutcomeUnknown(StorageError):  # noqa: N818 - the name is the contract's
    """The write may or may not have been made, and could not be settled before the deadline."""


class RedisFailed(StorageError):  # noqa: N818 - beside the others; `RedisError` is the client library's
    """Redis is away, slow, full, read-only, or answers nonsense; what was sent may or may not have been done."""
