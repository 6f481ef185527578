"""Who asks, and what they may do: bearer tokens from a file of hashes, or loopback alone where there is no file.

    viewer      reads
    manager     also writes
    controller  as manager, and writes status
    admin       everything, also forcing another controller's status

`namespaces` of a token limits all of it to those namespaces; without it a token reaches every namespace. The file is
read again when it changes; a file that cannot be read or is wrong changes nothing and is logged. Without a file,
requests must come with a loopback Host and, from a browser, from the page's own origin: then they are admin.
"""

from __future__ import annotations

import hashlib
import ipaddress
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

import structlog
from aiohttp import web
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from lrm.api.status import RequestError
from lrm.api.yaml_documents import YamlError, load_documents
from lrm.errors import LrmError
from storage.clock import Clock

log = structlog.get_logger(__name__)

_LOOK_EVERY = 1.0
"""Seconds between looks at the tokens file."""
_MAX_FILE = 4 * 1024 * 1024
_NAMED_MOST = 10
"""Namespaces of a token that a message names."""

Verb = Literal["read", "write", "status", "force"]


class TokensFileError(LrmError):
    """The tokens file cannot be read or says something wrong; the message names the place."""


class Role(StrEnum):
    """See the module."""

    VIEWER = "viewer"
    MANAGER = "manager"
    CONTROLLER = "controller"
    ADMIN = "admin"


_ALLOWED: Mapping[Role, frozenset[Verb]] = {
    Role.VIEWER: frozenset({"read"}),
    Role.MANAGER: frozenset({"read", "write"}),
    Role.CONTROLLER: frozenset({"read", "write", "status"}),
    Role.ADMIN: frozenset({"read", "write", "status", "force"}),
}


@dataclass(frozen=True, slots=True)
class Principal:
    """Someone who asks; `namespaces` None means all."""

    name: str
    role: Role
    namespaces: frozenset[str] | None = None

    def may(self, verb: Verb, namespace: str) -> bool:
        """Whether this is allowed in a namespace; "" is all namespaces at once."""
        return verb in _ALLOWED[self.role] and (self.namespaces is None or namespace in self.namespaces)

    def may_somewhere(self, verb: Verb) -> bool:
        """Whether there is a namespace in which this is allowed."""
        return verb in _ALLOWED[self.role] and self.namespaces != frozenset()

    def require(self, verb: Verb, namespace: str, what: str) -> None:
        """Raise 403 unless it is allowed; `what` names the action for people."""
        if self.may(verb, namespace):
            return
        where = f'in namespace "{namespace}"' if namespace else f"in all namespaces{self._in_which(verb)}"
        raise RequestError(403, "Forbidden", f'"{self.name}" with role {self.role} may not {what} {where}')

    def _in_which(self, verb: Verb) -> str:
        """Where it is allowed, for who asked for all namespaces at once."""
        names = sorted(self.namespaces or ()) if verb in _ALLOWED[self.role] else []
        if not names:
            return ""
        more = f" and {len(names) - _NAMED_MOST} more" if len(names) > _NAMED_MOST else ""
        told = ", ".join(names[:_NAMED_MOST]) + more
        return f", but in {told}: name one (kubectl -n {names[0]}; on other paths ?namespace={names[0]})"


ANONYMOUS = Principal("anonymous", Role.VIEWER, frozenset())
LOCAL_ADMIN = Principal("local", Role.ADMIN)


class TokenEntry(BaseModel):
    """One entry of the tokens file."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = Field(min_length=1)
    sha256: str = Field(pattern=r"^[0-9a-fA-F]{64}$")
    role: Role
    namespaces: tuple[str, ...] | None = None


_ENTRIES = TypeAdapter(list[TokenEntry])


class Tokens:
    """The tokens file: the last good content of it."""

    def __init__(self, path: Path, clock: Clock) -> None:
        """Read the file. Raises `TokensFileError`: a daemon does not start without knowing whom to trust."""
        self._path = path
        self._clock = clock
        self._seen = self._stamp()
        self._looked = clock.monotonic()
        self._by_digest = self._read()
        self.error = ""

    def find(self, token: str) -> Principal | None:
        """Whose token it is. Compares digests of the whole, so timing tells nothing of a stored one."""
        self._refresh()
        return self._by_digest.get(_digest(token))

    def _refresh(self) -> None:
        now = self._clock.monotonic()
        if now - self._looked < _LOOK_EVERY:
            return
        self._looked = now
        stamp = self._stamp()
        if stamp == self._seen:
            return
        self._seen = stamp
        try:
            self._by_digest, self.error = self._read(), ""
        except TokensFileError as error:
            self.error = str(error)
            log.error("auth.tokens_not_reloaded", file=str(self._path), error=self.error)  # noqa: TRY400 - told in full
            return
        log.info("auth.tokens_reloaded", file=str(self._path), tokens=len(self._by_digest))

    def _stamp(self) -> tuple[int, ...] | None:
        try:
            stat = self._path.stat()
        except OSError:
            return None
        return stat.st_mtime_ns, stat.st_size, stat.st_ino

    def _read(self) -> dict[str, Principal]:
        try:
            if self._path.stat().st_size > _MAX_FILE:
                raise TokensFileError(f"{self._path} is larger than {_MAX_FILE} bytes")
            text = self._path.read_text(encoding="utf-8")
            documents = load_documents(text, max_depth=8, max_nodes=200_000, max_documents=1)
            entries = _ENTRIES.validate_python(documents[0] if documents else [])
        except (OSError, UnicodeDecodeError, YamlError) as error:
            raise TokensFileError(f"{self._path} cannot be read: {error}") from error
        except ValidationError as error:
            told = "; ".join(
                f"{'.'.join(str(part) for part in e['loc'])}: {e['msg']}"
                for e in error.errors(include_url=False, include_input=False, include_context=False)
            )
            raise TokensFileError(f"{self._path} is not a list of name, sha256, role, namespaces: {told}") from error
        found: dict[str, Principal] = {}
        for entry in entries:
            digest = entry.sha256.lower()
            if digest in found:
                raise TokensFileError(f"{self._path} has one token twice, for {found[digest].name} and {entry.name}")
            limit = None if entry.namespaces is None or "*" in entry.namespaces else frozenset(entry.namespaces)
            found[digest] = Principal(entry.name, entry.role, limit)
        return found


class Authenticator:
    """Turns a request into a principal."""

    def __init__(self, tokens: Tokens | None) -> None:
        self.tokens = tokens

    def principal(self, request: web.Request) -> Principal:
        """Raises 401, or 403 where only this machine is served."""
        if self.tokens is None:
            _only_local(request)
            return LOCAL_ADMIN
        scheme, _, token = request.headers.get("Authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not token.strip():
            raise _unauthorized("a bearer token is required")
        principal = self.tokens.find(token.strip())
        if principal is None:
            raise _unauthorized("the bearer token is not known")
        return principal


def is_loopback(host: str) -> bool:
    """Whether a host name or address can only mean this machine."""
    name = host.strip("[]").lower().rstrip(".")
    if name == "localhost":
        return True
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False


def _only_local(request: web.Request) -> None:
    """Refuse what a foreign web page could make a browser send: other Hosts (DNS rebinding) and other Origins."""
    host = request.headers.get("Host", "")
    try:
        name = urlsplit(f"//{host}").hostname or ""
    except ValueError:
        name = ""
    if not is_loopback(name):
        raise RequestError(403, "Forbidden", f"without a tokens file only loopback is served, not Host {host[:100]!r}")
    origin = request.headers.get("Origin")
    if origin is not None and origin.lower() != f"{request.scheme}://{host}".lower():
        raise RequestError(403, "Forbidden", f"requests from the origin {origin[:100]!r} are refused")
    if request.headers.get("Sec-Fetch-Site", "none") not in ("none", "same-origin"):
        raise RequestError(403, "Forbidden", "requests from other web sites are refused")


def _unauthorized(message: str) -> RequestError:
    return RequestError(401, "Unauthorized", message, headers={"WWW-Authenticate": 'Bearer realm="lrm"'})


def _digest(token: str) -> str:
    return hashlib.sha256(token.encode("utf-8", "surrogateescape")).hexdigest()
