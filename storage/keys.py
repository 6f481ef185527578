"""What a key, a value, a guard, a pattern and a continue token may be: the same answer on every backend.

Checks raise before anything is sent. Keys are text; bytes that are not UTF-8 (another program's) survive a round trip.
A continue token is opaque to callers and carries a revision and the last key given out; it is not signed, because it
grants nothing that its holder could not ask for. Called by the backends only.
"""

from __future__ import annotations

import base64
import binascii
import re
from dataclasses import dataclass

import orjson

from storage.base import BARRIER_SEGMENT, MAX_VALUE_BYTES, Guard, is_barrier_key
from storage.errors import GuardFailed, InvalidKey, TooLarge

MAX_KEY_BYTES = 4096
"""Longest key, in bytes; the longest that lrm makes is below 700."""


def encode_key(key: str) -> bytes:
    """The key's bytes. Raises `InvalidKey` for an empty, too long or unencodable one."""
    if not key:
        raise InvalidKey("a key must not be empty")
    return encode_prefix(key)


def encode_prefix(prefix: str) -> bytes:
    """As `encode_key`, but empty means every key."""
    try:
        raw = prefix.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:
        raise InvalidKey(f"key {prefix[:100]!r} is not text that can be encoded") from None
    if len(raw) > MAX_KEY_BYTES:
        raise InvalidKey(f"key {prefix[:100]!r}… has {len(raw)} bytes, more than {MAX_KEY_BYTES}")
    if b"\0" in raw:
        raise InvalidKey(f"key {prefix[:100]!r} contains a zero byte")
    return raw


def decode_key(raw: bytes) -> str:
    """The key's text; never fails."""
    return raw.decode("utf-8", "surrogateescape")


def check_put(key: str, value: bytes) -> None:
    """Raise `InvalidKey` or `TooLarge` for a write that must not be sent."""
    encode_key(key)
    if is_barrier_key(key):
        raise InvalidKey(f"key {key!r} lies in the segment in which the backend writes its barriers")
    if len(value) > MAX_VALUE_BYTES:
        raise TooLarge(f"the value of key {key!r} has {len(value)} bytes, more than {MAX_VALUE_BYTES}")


def check_guards(guards: tuple[Guard, ...]) -> None:
    """Raise for guards that can never hold: to etcd a create revision of 0 would mean "must be absent"."""
    for guard in guards:
        encode_key(guard.key)
        if guard.create_revision < 1:
            raise GuardFailed(guard)


def check_limit(limit: int) -> None:
    """A list's limit is 0 for all, or a number of entries."""
    if limit < 0:
        raise ValueError(f"the limit of a list is 0 or more, not {limit}")


def barrier_key(prefix: str, instance: str) -> str:
    """Where the live watch on `prefix` of one daemon writes; the prefix must be a folder."""
    if not prefix.endswith("/"):
        raise InvalidKey(f"a live watch needs a prefix that ends with '/', not {prefix!r}")
    if not instance:
        raise InvalidKey("a live watch needs the name of its instance")
    return f"{prefix}{BARRIER_SEGMENT}{instance}"


@dataclass(frozen=True, slots=True)
class KeyPattern:
    """An fnmatch pattern in which `*`, `?` and `[…]` do not match `/`; `literal` is what every match begins with."""

    literal: str
    exact: bool
    regex: re.Pattern[str]

    @classmethod
    def parse(cls, pattern: str) -> KeyPattern:
        """Never fails: as in fnmatch, an unclosed bracket stands for itself."""
        literal = re.split(r"[*?[]", pattern, maxsplit=1)[0]
        return cls(literal, exact=literal == pattern, regex=re.compile(_translate(pattern), re.DOTALL))

    def matches(self, key: str) -> bool:
        return self.regex.fullmatch(key) is not None

    @property
    def shows_barriers(self) -> bool:
        """Barrier keys are listed only for a pattern that names their segment."""
        return is_barrier_key(self.literal)


def _translate(pattern: str) -> str:
    out: list[str] = []
    i = 0
    while i < len(pattern):
        char = pattern[i]
        i += 1
        if char == "*":
            out.append("[^/]*")
        elif char == "?":
            out.append("[^/]")
        elif char == "[" and (end := pattern.find("]", i + 2 if pattern[i : i + 1] == "!" else i + 1)) > 0:
            members = pattern[i:end]
            negated = members.startswith("!")
            out.append(_class(members.removeprefix("!") if negated else members, negated=negated))
            i = end + 1
        else:
            out.append(re.escape(char))
    return "".join(out)


def _class(members: str, *, negated: bool) -> str:
    """A bracket of a pattern as a regular expression; ranges keep their meaning, an inverted one is empty."""
    parts: list[str] = []
    i = 0
    while i < len(members):
        if i + 2 < len(members) and members[i + 1] == "-":
            if members[i] <= members[i + 2]:
                parts.append(f"{re.escape(members[i])}-{re.escape(members[i + 2])}")
            i += 3
        else:
            parts.append(re.escape(members[i]))
            i += 1
    inside = "".join(parts)
    if negated:
        return f"[^/{inside}]"
    return f"(?!/)[{inside}]" if inside else "(?!)"


def encode_token(revision: int, last_key: str) -> str:
    """The continue token after `last_key` of a list at `revision`."""
    raw = orjson.dumps([revision, base64.b64encode(encode_key(last_key)).decode()])
    return base64.urlsafe_b64encode(raw).decode().rstrip("=")


def decode_token(token: str, prefix: str) -> tuple[int, str]:
    """Revision and last key of a continue token. Raises `InvalidKey` unless it was given out for such a prefix."""
    try:
        raw = base64.b64decode(token + "=" * (-len(token) % 4), altchars=b"-_", validate=True)
        revision, encoded = orjson.loads(raw)
        last_key = decode_key(base64.b64decode(encoded, validate=True))
    except (binascii.Error, ValueError, TypeError):
        raise InvalidKey("the continue token is not one that this store gave out") from None
    if not isinstance(revision, int) or isinstance(revision, bool) or revision < 1 or not last_key.startswith(prefix):
        raise InvalidKey(f"the continue token was not given out for a list of {prefix!r}")
    return revision, last_key
