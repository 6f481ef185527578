"""The server's TLS: a certificate that is taken anew when its files change, without losing a connection.

A renewed pair that cannot be loaded (half written, wrong key) is logged and the old one stays in use.
"""

from __future__ import annotations

import ssl
from pathlib import Path

import structlog

from storage.clock import Clock

log = structlog.get_logger(__name__)

_LOOK_EVERY = 1.0
"""Seconds between looks at the files; a look is made when a client connects."""


def server_context(cert: Path | None, key: Path | None, clock: Clock) -> ssl.SSLContext | None:
    """The context to serve with, None for plain HTTP. Raises OSError for a bad pair."""
    if cert is None:
        return None
    served = _load(cert, key)
    renewal = _Renewal(cert, key, clock, served)
    served.sni_callback = renewal.on_hello
    return served


class _Renewal:
    def __init__(self, cert: Path, key: Path | None, clock: Clock, context: ssl.SSLContext) -> None:
        self._cert = cert
        self._key = key
        self._clock = clock
        self._context = context
        self._seen = self._stamps()
        self._looked = clock.monotonic()

    def on_hello(self, connection: ssl.SSLObject | ssl.SSLSocket, _name: str | None, _context: ssl.SSLContext) -> None:
        """Called within each handshake: give it the newest certificate."""
        self._refresh()
        connection.context = self._context

    def _refresh(self) -> None:
        now = self._clock.monotonic()
        if now - self._looked < _LOOK_EVERY:
            return
        self._looked = now
        stamps = self._stamps()
        if stamps == self._seen:
            return
        try:
            self._context = _load(self._cert, self._key)
        except OSError as error:
            # Not remembered as seen: the second file of the pair may be on its way.
            log.error("tls.certificate_not_reloaded", file=str(self._cert), error=str(error))  # noqa: TRY400
            return
        self._seen = stamps
        log.info("tls.certificate_reloaded", file=str(self._cert))

    def _stamps(self) -> list[tuple[int, ...] | None]:
        return [_stamp(path) for path in (self._cert, self._key) if path is not None]


def _load(cert: Path, key: Path | None) -> ssl.SSLContext:
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_alpn_protocols(["http/1.1"])
    try:
        context.load_cert_chain(cert, key)
    except OSError as error:  # OpenSSL does not say which file it means
        raise OSError(f"certificate {cert} with key {key or cert}: {error.strerror or error}") from error
    return context


def _stamp(path: Path) -> tuple[int, ...] | None:
    try:
        stat = path.stat()
    except OSError:
        return None
    return stat.st_mtime_ns, stat.st_size, stat.st_ino
