"""Which server a client will talk to: chain, private CA, pinned leaf, or first use.

The leaf is compared inside the handshake of every connection (an `SSLObject` whose `do_handshake` ends with the
check), so neither a request byte nor even the client's Finished message leaves on a connection with another leaf.
An earlier probe connection would prove something about that connection only. Uses nothing private of httpx.
Does not check revocation, and a `verify: false` without a known leaf trusts whatever answers the first login.
Called by the transport.
"""

from __future__ import annotations

import hashlib
import ipaddress
import re
import ssl
from dataclasses import dataclass

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

    def context(self) -> ssl.SSLContext:
        """A client context under this guard; reads CA files, so call it in a thread."""
        if self._policy.checks_chain:
            context = ssl.create_default_context(cafile=self._policy.ca_file or None)
        else:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
            context.check_hostname = False
            context.verify_mode = ssl.CERT_NONE
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        guard = self

        class GuardedObject(ssl.SSLObject):
            def do_handshake(self) -> None:
                super().do_handshake()
                guard.check(self.getpeercert(binary_form=True))

        context.sslobject_class = GuardedObject
        return context


def is_loopback(host: str) -> bool:
    """Whether a host name is this machine by itself, without asking a resolver."""
    if host.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
