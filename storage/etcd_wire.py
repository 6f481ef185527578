"""etcd's JSON: requests from our value types, and our value types from its replies.

Pure functions; keys and values travel as base64, 64-bit integers as strings, absent means zero. Every write is one
transaction: its compares are the key's expectation and the guards, and its failure branch reads the key and the guards
at the same moment, so that a refusal says why. Called by `storage.etcd*`.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping, Sequence
from typing import Any

from storage.base import Entry, Event, Guard, prefix_end
from storage.etcd_errors import Malformed
from storage.keys import decode_key, encode_key, encode_prefix

Json = dict[str, Any]


def b64(raw: bytes) -> str:
    """Bytes as etcd's gateway takes them."""
    return base64.b64encode(raw).decode("ascii")


def key_range(prefix: str, after: str = "") -> Json:
    """`key` and `range_end` for everything below a prefix, after a key of it if one is given."""
    raw = encode_prefix(prefix)
    start = encode_key(after) + b"\0" if after else raw or b"\0"
    return {"key": b64(start), "range_end": b64(prefix_end(raw))}


def one_key(key: str) -> Json:
    """The range of one key."""
    return {"key": b64(encode_key(key))}


def put(key: str, value: bytes, *, lease: int = 0, keep_lease: bool = False) -> Json:
    """The put of a request."""
    request: Json = {"key": b64(encode_key(key)), "value": b64(value)}
    if lease:
        request["lease"] = str(lease)
    if keep_lease:
        request["ignore_lease"] = True
    return request


def create_txn(key: str, value: bytes, lease: int, guards: Sequence[Guard]) -> Json:
    """Write a key that is absent."""
    compare = {"key": b64(encode_key(key)), "target": "CREATE", "create_revision": "0"}
    return _txn(key, compare, guards, [{"request_put": put(key, value, lease=lease)}])


def update_txn(key: str, value: bytes, expected: int, guards: Sequence[Guard]) -> Json:
    """Replace a key at a revision; the success branch reads what the put keeps: create revision and lease."""
    success = [
        {"request_put": put(key, value, keep_lease=True)},
        {"request_range": {**one_key(key), "keys_only": True}},
    ]
    return _txn(key, _at(key, expected), guards, success)


def delete_txn(key: str, expected: int, guards: Sequence[Guard]) -> Json:
    """Delete a key at a revision."""
    return _txn(key, _at(key, expected), guards, [{"request_delete_range": one_key(key)}])


def consensus_txn(key: str) -> Json:
    """A read of `key` that goes through raft's log: its compare never holds, its write never happens.

    On etcds before 3.4.42 and 3.5.28 an ordinary read may be stale after the process was paused; this one cannot be,
    and it passes when the store is out of space.
    """
    return {
        "compare": [{"key": b64(encode_key(key)), "target": "VERSION", "result": "LESS", "version": "0"}],
        "success": [{"request_delete_range": one_key(key)}],
        "failure": [{"request_range": one_key(key)}],
    }


def _at(key: str, expected: int) -> Json:
    return {"key": b64(encode_key(key)), "target": "MOD", "mod_revision": str(expected)}


def _txn(key: str, compare: Json, guards: Sequence[Guard], success: list[Json]) -> Json:
    held = [
        {"key": b64(encode_key(g.key)), "target": "CREATE", "create_revision": str(g.create_revision)} for g in guards
    ]
    reads = [{"request_range": one_key(key)}]
    reads += [{"request_range": {**one_key(g.key), "keys_only": True}} for g in guards]
    return {"compare": [compare, *held], "success": success, "failure": reads}


def header_revision(reply: Mapping[str, Any]) -> int:
    """The store's revision when it answered."""
    return number(reply.get("header") or {}, "revision")


def number(fields: Mapping[str, Any], name: str) -> int:
    """A 64-bit integer, which travels as a string; absent is 0."""
    try:
        return int(fields.get(name) or 0)
    except (AttributeError, TypeError, ValueError):
        raise Malformed(f"etcd answered with a {name} that is no number") from None


def raw_bytes(fields: Mapping[str, Any], name: str) -> bytes:
    """A key or value; absent is empty."""
    try:
        return binascii.a2b_base64(fields.get(name) or "")
    except (AttributeError, TypeError, ValueError):
        raise Malformed(f"etcd answered with a {name} that is not base64") from None


def entry(kv: Mapping[str, Any]) -> Entry:
    """One key-value of a reply."""
    return Entry(
        decode_key(raw_bytes(kv, "key")),
        raw_bytes(kv, "value"),
        number(kv, "mod_revision"),
        number(kv, "create_revision"),
        number(kv, "lease"),
    )


def entries(range_reply: Mapping[str, Any]) -> list[Entry]:
    """The key-values of a range's reply."""
    kvs = range_reply.get("kvs") or ()
    if not isinstance(kvs, list | tuple):
        raise Malformed("etcd answered with keys that are no list")
    return [entry(kv) for kv in kvs]


def event(fields: Mapping[str, Any]) -> Event:
    """One event of a watch; the type is absent for a put."""
    if not isinstance(fields, Mapping):
        raise Malformed("etcd sent an event that is no object")
    changed = entry(fields.get("kv") or {})
    if not changed.revision or not changed.key:
        raise Malformed("etcd sent an event without key or revision")
    prev = fields.get("prev_kv")
    previous = entry(prev) if prev else None
    if fields.get("type") == "DELETE":
        return Event("delete", Entry(changed.key, b"", changed.revision, 0), previous)
    return Event("put", changed, previous)


def responses(reply: Mapping[str, Any]) -> list[Json]:
    """The inner replies of a transaction, in the order of its operations."""
    inner: list[Json] = []
    for response in reply.get("responses") or ():
        if not isinstance(response, Mapping) or len(response) != 1:
            raise Malformed("etcd answered a transaction with something that is no reply")
        inner += response.values()
    return inner


def refusal(reply: Mapping[str, Any], guards: Sequence[Guard]) -> tuple[Entry | None, list[Guard]]:
    """From a refused write: the key as it was at that moment, and the guards that did not hold."""
    inner = responses(reply)
    if len(inner) != 1 + len(guards):
        raise Malformed("etcd refused a write without saying how things stand")
    first, *rest = inner
    found = entries(first)
    gone = []
    for guard, state in zip(guards, rest, strict=True):
        held = entries(state)
        if not held or held[0].create_revision != guard.create_revision:
            gone.append(guard)
    return (found[0] if found else None), gone
