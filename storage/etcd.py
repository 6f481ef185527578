"""The contract on etcd 3.4 and later, through its JSON gateway.

Keeps the ten promises of `storage.base`. Reads are linearizable and end within `request_timeout`; a write within twice
that, settling included. Every linearizable reply is compared with what had been seen before its request: a store that
went back in time is `StoreReset`, once. Construction does no input or output; the first call connects. Not done here:
requests (`etcd_gateway`), streams (`etcd_watch`), lost replies (`etcd_writes`, `settle`). The daemon's only store.
"""

from __future__ import annotations

import builtins
import uuid
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager

from storage.base import Entry, Event, Guard, Health, Lease, Line, Page, Watch, is_barrier_key, labels_match
from storage.clock import Clock, SystemClock
from storage.errors import (
    Compacted,
    Conflict,
    FutureRevision,
    LeaseNotFound,
    NotFound,
    OutcomeUnknown,
    Unavailable,
)
from storage.etcd_errors import LostReply
from storage.etcd_gateway import Gateway, ResponseTooLarge, TlsConfig
from storage.etcd_health import DEFAULT_QUOTA_BYTES, health
from storage.etcd_watch import EtcdWatch, Liveness, Source
from storage.etcd_wire import (
    Json,
    consensus_txn,
    entries,
    header_revision,
    key_range,
    number,
    one_key,
    put,
    responses,
)
from storage.etcd_writes import Writer
from storage.keys import (
    KeyPattern,
    barrier_key,
    check_guards,
    check_limit,
    check_put,
    decode_token,
    encode_key,
    encode_prefix,
    encode_token,
)
from storage.lineage import Lineage

__all__ = ["EtcdStorage", "TlsConfig"]

_PAGE = 500
_PAGE_BYTES = 4 * 1024 * 1024
_LIST_RESTARTS = 3


class EtcdStorage:
    """A `Storage` on the members of one etcd cluster."""

    def __init__(
        self,
        endpoints: Sequence[str],
        *,
        root: str = "/lrm",
        instance: str = "lrm",
        clock: Clock = SystemClock(),  # noqa: B008 - a SystemClock has no state
        tls: TlsConfig | None = None,
        user: str = "",
        password: Callable[[], str] | str = "",
        request_timeout: float = 5.0,
        liveness_silence: float = 10.0,
        liveness_deadline: float = 10.0,
        quota_bytes: int = DEFAULT_QUOTA_BYTES,
    ) -> None:
        """`quota_bytes` is what members are held to have that do not tell their own (etcd before 3.6)."""
        self._gateway = Gateway(
            endpoints, clock=clock, tls=tls, user=user, password=password, request_timeout=request_timeout
        )
        self._quota_bytes = quota_bytes
        self._clock = clock
        self._instance = instance
        self._epoch_key = f"{root}/epoch"
        self._lineage = Lineage()
        self._liveness = Liveness(liveness_silence, liveness_deadline)
        self._source = Source(self._gateway, self._lineage, clock, self._liveness, self._check_history)
        self._writer = Writer(self, clock, request_timeout)
        self._watches: set[EtcdWatch] = set()

    async def get(self, key: str) -> Entry:
        found = entries(await self.read("/kv/range", one_key(key)))
        if not found:
            raise NotFound(key)
        return found[0]

    async def exists(self, key: str) -> bool:
        return number(await self.read("/kv/range", {**one_key(key), "count_only": True}), "count") > 0

    async def keys(self, pattern: str) -> list[str]:
        parsed = KeyPattern.parse(pattern)
        if parsed.exact:
            return [pattern] if pattern and await self.exists(pattern) else []
        found, _, _ = await self._collect(parsed.literal, keys_only=True)
        return [e.key for e in found if parsed.matches(e.key)]

    async def list(self, prefix: str, *, limit: int = 0, continue_token: str = "", revision: int = 0) -> Page:
        check_limit(limit)
        after = ""
        if continue_token:
            revision, after = decode_token(continue_token, prefix)
        found, at, more = await self._collect(prefix, limit=limit, revision=revision, after=after)
        return Page(tuple(found), at, encode_token(at, found[-1].key) if more else "")

    async def count(self, prefix: str) -> int:
        found, _, _ = await self._collect(prefix, keys_only=True)
        return len(found)

    async def list_with_labels(
        self, prefix: str, selector: Mapping[str, str], labels_of: Callable[[bytes], Mapping[str, str]]
    ) -> Page:
        page = await self.list(prefix)
        return Page(tuple(e for e in page.entries if labels_match(selector, labels_of(e.value))), page.revision)

    async def create(self, key: str, value: bytes, *, lease: int = 0, guards: tuple[Guard, ...] = ()) -> Entry:
        check_put(key, value)
        check_guards(guards)
        return await self._writer.create(key, value, lease, guards)

    async def update(self, key: str, value: bytes, *, expected_revision: int, guards: tuple[Guard, ...] = ()) -> Entry:
        check_put(key, value)
        check_guards(guards)
        await self._check_expectation(key, expected_revision)
        return await self._writer.update(key, value, expected_revision, guards)

    async def delete(self, key: str, *, expected_revision: int, guards: tuple[Guard, ...] = ()) -> int:
        check_guards(guards)
        await self._check_expectation(key, expected_revision)
        return await self._writer.delete(key, expected_revision, guards)

    async def set(self, key: str, value: bytes) -> int:
        check_put(key, value)
        return await self._writer.set(key, value)

    async def compare_and_swap(self, key: str, expected: bytes, new: bytes) -> Entry:
        check_put(key, new)
        deadline = self._clock.monotonic() + self._gateway.request_timeout
        while True:
            try:
                current = await self.get(key)
            except NotFound:
                raise Conflict(key, None) from None
            if current.value != expected:
                raise Conflict(key, current)
            try:
                # A value never changes at one revision, so comparing the revision compares the value; and a lost
                # reply can be settled.
                return await self._writer.update(key, new, current.revision, ())
            except Conflict:
                if self._clock.monotonic() >= deadline:
                    raise Unavailable(f"key {key!r} is written faster than it can be compared") from None

    @asynccontextmanager
    async def watch(self, prefix: str, after_revision: int, *, live: bool = False) -> AsyncIterator[Watch]:
        below = key_range(prefix)
        written = barrier_key(prefix, self._instance) if live else ""

        async def write_barrier() -> int:
            body = {"request_put": put(written, uuid.uuid4().hex.encode())}, {"request_range": one_key(self._epoch_key)}
            mark = self._lineage.mark()
            reply = await self._gateway.call("/kv/txn", {"success": list(body)}, repeatable=True)
            self._lineage.saw_epoch(mark, _value(responses(reply)[1]), header_revision(reply))
            return header_revision(reply)

        watch = EtcdWatch(self._source, below, after_revision, write_barrier if live else None)
        self._watches.add(watch)
        try:
            await watch.open()
            yield watch
        finally:
            self._watches.discard(watch)
            await watch.close()

    async def grant_lease(self, ttl: int) -> Lease:
        try:
            reply = await self._gateway.call("/lease/grant", {"TTL": str(max(ttl, 1))}, repeatable=False)
        except LostReply as lost:
            raise OutcomeUnknown(f"a lease may have been granted; it is left to expire: {lost}") from None
        return Lease(number(reply, "ID"), number(reply, "TTL"))

    async def keep_alive(self, lease: int) -> int:
        reply = await self._gateway.call("/lease/keepalive", {"ID": str(lease)}, repeatable=True)
        ttl = number(reply.get("result") or {}, "TTL")
        if ttl <= 0:
            raise LeaseNotFound(lease)
        return ttl

    async def revoke(self, lease: int) -> None:
        try:
            await self._gateway.call("/lease/revoke", {"ID": str(lease)}, repeatable=True)
        except LeaseNotFound:
            return

    @property
    def generation(self) -> int:
        return self._lineage.generation

    async def current_revision(self) -> int:
        return header_revision(await self.read("/kv/range", {**one_key(self._epoch_key), "keys_only": True}))

    async def line(self) -> Line:
        reply = await self.read("/kv/range", one_key(self._epoch_key))
        cluster_id = str(reply["header"].get("cluster_id") or "")
        epoch = (_value(reply) or b"").decode("utf-8", "backslashreplace")
        return Line(cluster_id, epoch, header_revision(reply))

    async def compact(self, revision: int) -> None:
        try:
            await self._gateway.call("/kv/compaction", {"revision": str(max(revision, 0))}, repeatable=True)
        except Compacted:
            return
        except FutureRevision:
            raise FutureRevision(revision, await self.current_revision()) from None

    async def health(self) -> Health:
        return await health(self._gateway, self._epoch_key, self.read, self._quota_bytes)

    async def aclose(self) -> None:
        """End every watch with `Unavailable` and close every connection."""
        for watch in list(self._watches):
            await watch.close()
        await self._gateway.aclose()

    async def send(self, path: str, body: Json, timeout: float) -> Json:
        """For the writer: one write through raft, whose reply shows whether the store went back."""
        mark = self._lineage.mark()
        reply = await self._gateway.call(path, body, repeatable=False, timeout=timeout)
        self._lineage.saw(mark, header_revision(reply))
        return reply

    async def read(self, path: str, body: Json) -> Json:
        """A linearizable read; a reply below what had been seen is confirmed through raft's log before it counts."""
        deadline = self._clock.monotonic() + self._gateway.request_timeout
        while True:
            mark = self._lineage.mark()
            left = deadline - self._clock.monotonic()
            reply = await self._gateway.call(path, body, repeatable=True, timeout=max(left, 0.001))
            if not self._lineage.fell(mark, header_revision(reply)):
                self._lineage.saw(mark, header_revision(reply))
                return reply
            # Old etcds can answer a read from the past after they were paused: then this passes and we read again.
            confirmed = await self._gateway.call("/kv/txn", consensus_txn(self._epoch_key), repeatable=True)
            self._lineage.saw(mark, header_revision(confirmed))
            if self._clock.monotonic() >= deadline:
                raise Unavailable("the store answers reads from its past")

    async def history(
        self, key: str, after: int, timeout: float, enough: Callable[[Event], bool]
    ) -> Sequence[Event] | None:
        """For the writer: see `etcd_writes.Cluster`."""
        seen: builtins.list[Event] = []
        watch = EtcdWatch(self._source, one_key(key), after, None)
        self._watches.add(watch)
        try:
            async with self._clock.timeout(timeout):
                await watch.open()
                async for batch in watch:
                    seen.extend(batch.events)
                    if any(enough(e) for e in batch.events):
                        break
        except TimeoutError:
            return seen
        except Compacted:
            return None
        finally:
            self._watches.discard(watch)
            await watch.close()
        return seen

    async def known_revision(self) -> int:
        """For the writer: see `etcd_writes.Cluster`."""
        return self._lineage.seen or await self.current_revision()

    async def _collect(
        self, prefix: str, *, limit: int = 0, revision: int = 0, after: str = "", keys_only: bool = False
    ) -> tuple[builtins.list[Entry], int, bool]:
        """Entries at one revision, that revision, and whether there are more; begun again when compacted under way."""
        encode_prefix(prefix)
        for _ in range(_LIST_RESTARTS):
            try:
                return await self._pages(prefix, limit, revision, after, keys_only=keys_only)
            except Compacted:
                if revision:
                    raise
        raise Unavailable(f"the list of {prefix!r} is compacted faster than it can be read")

    async def _pages(
        self, prefix: str, limit: int, revision: int, after: str, *, keys_only: bool
    ) -> tuple[builtins.list[Entry], int, bool]:
        shows_barriers = is_barrier_key(prefix)
        found: builtins.list[Entry] = []
        size = _PAGE
        while True:
            wanted = min(size, limit - len(found)) if limit else size
            body = {**key_range(prefix, after), "limit": str(wanted), "revision": str(max(revision, 0))}
            try:
                reply = await self.read("/kv/range", {**body, "keys_only": keys_only})
            except FutureRevision:
                raise FutureRevision(revision, await self.current_revision()) from None
            except ResponseTooLarge:
                if wanted == 1:
                    raise
                size = max(wanted // 8, 1)
                continue
            revision = revision if revision > 0 else header_revision(reply)
            page = entries(reply)
            found += page if shows_barriers else [e for e in page if not is_barrier_key(e.key)]
            more = bool(reply.get("more"))
            if not more or (limit and len(found) >= limit):
                return found, revision, more
            after = page[-1].key
            average = sum(len(e.value) + 200 for e in page) / len(page)
            size = max(min(_PAGE, int(_PAGE_BYTES / average)), 1)

    async def _check_history(self, after: int) -> None:
        """Prove that the store keeps everything after a revision, and that its line goes on.

        Plain ranges, because 3.5.1 refuses even a transaction that only reads when it is out of space.
        """
        past = {**one_key(self._epoch_key), "keys_only": True, "revision": str(max(after, 1))}
        try:
            await self.read("/kv/range", past)
        except FutureRevision:
            raise FutureRevision(after, await self.current_revision()) from None
        mark = self._lineage.mark()
        now = await self.read("/kv/range", one_key(self._epoch_key))
        self._lineage.saw_epoch(mark, _value(now), header_revision(now))

    async def _check_expectation(self, key: str, expected: int) -> None:
        """No key is ever at a revision below 1; etcd's compare would take 0 for "absent"."""
        encode_key(key)
        if expected >= 1:
            return
        try:
            raise Conflict(key, await self.get(key))
        except NotFound:
            raise Conflict(key, None) from None


def _value(range_reply: Mapping[str, object]) -> bytes | None:
    found = entries(range_reply)
    return found[0].value if found else None
