"""Which server a client will talk to: chain, private CA, pinned leaf, or first use.

The leaf is compared inside the handshake of every connection (an `SSLObject` whose `do_handshake` ends with the
check), so neither a request byte nor even the client's Finished message leaves on a connection with another leaf.
An earlier probe connection would prove something about that connection only. Uses nothing private of httpx.
Roots take most of a megabyte and 25 ms of a core, so clients with the same CA file share one context; the guard is
each client's own, and a connection that is begun outside of `LeafGuard.watching` fails.
Does not check revocation, and a `verify: false` without a known leaf trusts whatever answers the first login.
Called by the transport.
"""

from __future__ import annotations

import hashlib
import ipaddress
import re
import ssl
import stat
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Self
from weakref import WeakValueDictionary

from controllers.cml.errors import CmlInvalid

_FINGERPRINT = re.compile(r"[0-9a-f]{64}")


def normal_fingerprint(text: str) -> str:
    """A sha256 fingerprint as 64 lowercase hex digits; takes colons, spaces and openssl's or ssh's prefix."""
    bare = re.sub(r"^(sha-?256 fingerprint=|sha-?256[:=])", "", text.strip().lower())
    bare = re.sub(r"[:\s]", "", bare)
    if not _FINGERPRINT.fullmatch(bare):
        raise CmlInvalid(f"{text[:100]!r} is not the sha256 fingerprint of a certificate (64 hex digits)")
    return bare


@dataclass(frozen=True, slots=True)
class TlsPolicy:
    """A worker's TLS rules.

    `fingerprint` (set by a person) must be the leaf's; it is stronger than a chain, which is then not asked for.
    Without it: `verify` asks for a chain and the host name, against `ca_file` or the system's roots.
    `known` is the leaf recorded at an earlier login. With `verify` a new leaf with a good chain replaces it; without,
    it is a pin, unless `trust_new`. With nothing to compare, the leaf of the first login stays pinned for the client.
    """

    verify: bool = True
    ca_file: str = ""
    fingerprint: str = ""
    known: str = ""
    trust_new: bool = False

    def __post_init__(self) -> None:
        for name in ("fingerprint", "known"):
            if getattr(self, name):
                object.__setattr__(self, name, normal_fingerprint(getattr(self, name)))
        if self.ca_file and not self.verify:
            raise CmlInvalid("a CA file says nothing when the chain is not verified: drop ca_file or set verify")

    @property
    def checks_chain(self) -> bool:
        """Whether a handshake without a verifying chain fails."""
        return self.verify and not self.fingerprint

    @property
    def pin(self) -> str:
        """The leaf that every connection must show; empty when there is none yet."""
        if self.fingerprint:
            return self.fingerprint
        return "" if self.verify or self.trust_new else self.known


class LeafRefusedError(ssl.SSLError):
    """Ends a handshake; the transport turns it into `CmlFingerprintMismatch`."""

    def __init__(self, expected: str, observed: str) -> None:
        super().__init__(1, "the leaf certificate is not the pinned one")
        self.expected = expected
        self.observed = observed


class LeafGuard:
    """Compares the leaf of each handshake, and pins the first one once credentials are about to be sent."""

    def __init__(self, policy: TlsPolicy) -> None:
        self._policy = policy
        self._pin = policy.pin
        self._armed = False
        self.observed: str | None = None
        """Fingerprint of the last leaf that was let through."""

    @property
    def armed(self) -> bool:
        """Whether credentials may have been sent: before that a booting CML may still change its certificate."""
        return self._armed

    def arm(self) -> None:
        """From now on the first leaf seen is the only one, unless a chain vouches for each."""
        self._armed = True

    def check(self, leaf: bytes | None) -> None:
        """Let a finished handshake through, or raise `LeafRefusedError`."""
        observed = hashlib.sha256(leaf).hexdigest() if leaf else ""
        if self._pin and observed != self._pin:
            raise LeafRefusedError(self._pin, observed)
        if self._armed and not self._pin and not self._policy.checks_chain:
            self._pin = observed
        self.observed = observed

    @contextmanager
    def watching(self) -> Iterator[None]:
        """The connections that this task begins meanwhile are this guard's."""
        token = _WATCHING.set(self)
        try:
            yield
        finally:
            _WATCHING.reset(token)


_WATCHING: ContextVar[LeafGuard] = ContextVar("the guard of connections that are begun here")


class _GuardedObject(ssl.SSLObject):
    """One connection's TLS. Made outside of `watching` it is a LookupError: there is no unguarded handshake."""

    _guard: LeafGuard

    def __new__(cls) -> Self:
        # Taken here and not in the handshake, parts of which run where the event loop reads.
        made = super().__new__(cls)
        made._guard = _WATCHING.get()
        return made

    def do_handshake(self) -> None:
        super().do_handshake()
        self._guard.check(self.getpeercert(binary_form=True))


def unchecked_context() -> ssl.SSLContext:
    """The guarded context of all clients that ask for no chain."""
    return _shared(None)


def chain_context(ca_file: str) -> ssl.SSLContext:
    """The guarded context of all clients that ask for a chain to this file's authorities, "" for the system's.

    A file that has changed is read for those who come later. Reads files, so call it in a thread; raises OSError and
    ValueError.
    """
    path = ca_file or ssl.get_default_verify_paths().cafile
    if path is None:
        return _shared(("",))
    seen = Path(path).stat()
    if not stat.S_ISREG(seen.st_mode):
        raise OSError("not a regular file")
    return _shared((ca_file, seen.st_mtime_ns, seen.st_size, seen.st_ino))


_contexts: WeakValueDictionary[tuple[str | int, ...] | None, ssl.SSLContext] = WeakValueDictionary()
"""By what was read, for as long as some client uses it."""
_adding = threading.Lock()


def _shared(authorities: tuple[str | int, ...] | None) -> ssl.SSLContext:
    known = _contexts.get(authorities)
    if known is not None:
        return known
    # Not under the lock: a file system that hangs holds up its own clients only.
    if authorities is None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    else:
        context = ssl.create_default_context(cafile=str(authorities[0]) or None)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.sslobject_class = _GuardedObject
    with _adding:
        return _contexts.setdefault(authorities, context)


def is_loopback(host: str) -> bool:
    """Whether a host name is this machine by itself, without asking a resolver."""
    if host.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
