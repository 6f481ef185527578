"""`EtcdStorageBackend`: the store under the names and shapes of the original design, whose values are dictionaries.

A thin adapter over any `Storage`, for code written against those names. Names are relative to a prefix. Absence is an
answer here (None, False), as those signatures say; every other failure is raised. Values are JSON objects, compared as
objects and not as bytes. It adds no promise and takes none away. Called by other teams' code and by tests.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import orjson

from storage.base import Entry, Event, Storage
from storage.errors import AlreadyExists, Compacted, Conflict, NotFound, StorageError, StoreReset

Value = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Change:
    """What a watch callback is given; a deletion has no value, a `resync` tells that earlier changes were missed."""

    type: Literal["put", "delete", "resync"]
    name: str
    value: Value | None
    revision: int


class EtcdStorageBackend:
    """Resources by name below `prefix`."""

    def __init__(self, storage: Storage, prefix: str) -> None:
        if not prefix.endswith("/"):
            raise ValueError(f"the prefix of a storage backend ends with '/', not {prefix!r}")
        self._storage = storage
        self._prefix = prefix

    async def exists(self, name: str) -> bool:
        return await self._storage.exists(self._prefix + name)

    async def get(self, name: str) -> Value | None:
        """The value, or None when there is none."""
        try:
            return _decode(await self._storage.get(self._prefix + name))
        except NotFound:
            return None

    async def set(self, name: str, value: Value) -> int:
        """Write whatever is there; the revision."""
        return await self._storage.set(self._prefix + name, _encode(value))

    async def delete(self, name: str) -> bool:
        """Delete whatever is there; whether there was something."""
        while True:
            try:
                entry = await self._storage.get(self._prefix + name)
                await self._storage.delete(entry.key, expected_revision=entry.revision)
            except NotFound:
                return False
            except Conflict:
                continue  # Somebody wrote in between: it is the newer value that is to be deleted.
            return True

    async def keys(self, pattern: str = "*") -> list[str]:
        """Names that match, in order."""
        return [key.removeprefix(self._prefix) for key in await self._storage.keys(self._prefix + pattern)]

    async def list_with_labels(self, label_selector: Mapping[str, str]) -> list[Value]:
        """The values whose `metadata.labels` contain all of the selector."""
        page = await self._storage.list_with_labels(self._prefix, label_selector, _labels)
        return [_decode(entry) for entry in page.entries]

    async def compare_and_swap(self, name: str, expected: Value | None, new: Value) -> bool:
        """Write `new` if the value is `expected` (None: absent); whether it was."""
        key = self._prefix + name
        while True:
            try:
                if expected is None:
                    await self._storage.create(key, _encode(new))
                    return True
                current = await self._storage.get(key)
                if _decode(current) != expected:
                    return False
                await self._storage.update(key, _encode(new), expected_revision=current.revision)
            except (NotFound, AlreadyExists):
                return False
            except Conflict:
                continue  # Written in between, perhaps with the same value: look again.
            return True

    async def watch(self, callback: Callable[[Change], Awaitable[None]], key_prefix: str = "") -> None:
        """Call back for every change from now on, in order, until cancelled.

        When the store no longer keeps what was missed, the callback hears of a `resync`: read everything again.
        """
        after = await self._storage.current_revision()
        while True:
            try:
                async with self._storage.watch(self._prefix + key_prefix, after) as watch:
                    async for batch in watch:
                        for event in batch.events:
                            await callback(self._change(event))
                        after = batch.revision
            except (Compacted, StoreReset):
                after = await self._storage.current_revision()
                await callback(Change("resync", "", None, after))

    def _change(self, event: Event) -> Change:
        name = event.entry.key.removeprefix(self._prefix)
        value = None if event.kind == "delete" else _decode(event.entry)
        return Change(event.kind, name, value, event.entry.revision)


def _encode(value: Value) -> bytes:
    return orjson.dumps(value, option=orjson.OPT_SORT_KEYS)


def _decode(entry: Entry) -> Value:
    try:
        value = orjson.loads(entry.value)
    except orjson.JSONDecodeError as error:
        raise StorageError(f"the value of key {entry.key!r} is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise StorageError(f"the value of key {entry.key!r} is not a JSON object")
    return value


def _labels(raw: bytes) -> Mapping[str, str]:
    metadata = _decode(Entry("", raw, 0, 0)).get("metadata")
    labels = metadata.get("labels") if isinstance(metadata, dict) else None
    return labels if isinstance(labels, dict) else {}
