"""Where a template's topology is read from: the request itself, a file or an address, both only as settings allow.

Promises: a file is judged by where it really is, links followed, and opened just there, whatever is moved meanwhile; an
address by its parsed parts; so neither `..` nor a look-alike host gets around the list. 512 KiB at most; nothing but a
whole text comes back. Reading is in a thread, since a file may lie on a share; addresses are fetched by `fetches`.
Called by the CML runtime; admission asks what may be named.
"""

from __future__ import annotations

import asyncio
import os
import posixpath
import stat
from collections.abc import Awaitable, Callable, Iterable
from fnmatch import fnmatchcase
from pathlib import Path
from urllib.parse import SplitResult, unquote, urlsplit

from controllers.instances.kind import LabTemplate
from controllers.instances.phases import Reasons
from controllers.instances.runtime import NotNow, Refused
from controllers.instances.settings import InstanceSettings
from controllers.instances.topology import LARGEST, Topology, TopologyError, check

Fetch = Callable[[str], Awaitable[str]]
"""The text at an address that may be asked; raises `Refused` and `NotNow`."""

_AGAIN = 30.0
"""Seconds after which a file that could not be read is tried again."""
_FOLDER = getattr(os, "O_PATH", os.O_RDONLY) | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
"""To pass through a folder; with `O_PATH`, also one whose names may not be read."""
_PORTS = {"http": 80, "https": 443}


async def load(template: LabTemplate, settings: InstanceSettings, fetch: Fetch) -> Topology:
    """The topology that a template names. Raises `Refused` with a reason of templates, and `NotNow`."""
    text = await _text(template, settings, fetch)
    try:
        return await asyncio.to_thread(check, text)
    except TopologyError as error:
        raise Refused(Reasons.TEMPLATE_INVALID, f"{_told(template)} is no topology: {error}") from None


def file_allowed(name: str, globs: Iterable[str]) -> bool:
    """Whether a file may be named, by its text alone, `..` resolved; `*` does not cross `/`.

    The file system is not asked, which may be a share that hangs: where links lead is judged by `load`.
    """
    return name.startswith("/") and _listed(posixpath.normpath(name), globs)


def url_allowed(url: str, beginnings: Iterable[str]) -> bool:
    """Whether an address may be named: scheme, host and port of one that is listed, and its path or one below it."""
    if not url.isascii() or not url.isprintable() or " " in url:
        return False  # parsers differ about these
    parts = _split(url)
    if parts is None or parts.fragment or not _plain(parts.path):
        return False
    listed = [entry for entry in map(_split, beginnings) if entry is not None]
    return any(_server(entry) == _server(parts) and _below(parts.path or "/", entry.path) for entry in listed)


async def _text(template: LabTemplate, settings: InstanceSettings, fetch: Fetch) -> str:
    if template.topology is not None:
        return template.topology
    if template.topology_file is not None:
        return await asyncio.to_thread(_read, template.topology_file, settings.topology_files)
    if template.topology_url is not None:
        if not url_allowed(template.topology_url, settings.topology_urls):
            raise Refused(Reasons.TEMPLATE_FORBIDDEN, f"{template.topology_url} is not among LRM_TOPOLOGY_URLS")
        return await fetch(template.topology_url)
    raise Refused(Reasons.TEMPLATE_INVALID, "the template names no topology")


def _read(name: str, globs: Iterable[str]) -> str:
    """A regular file, opened at the place that was judged; a pipe or a device would never end."""
    try:
        real = Path(name).resolve()
        if not _listed(str(real), globs):
            leads = " leads elsewhere, to what" if file_allowed(name, globs) else ""
            raise Refused(Reasons.TEMPLATE_FORBIDDEN, f"the file {name}{leads} is not among LRM_TOPOLOGY_FILES")
        handle = _open(real)
        try:
            if not stat.S_ISREG(os.fstat(handle).st_mode):
                raise Refused(Reasons.TEMPLATE_INVALID, f"{name} is not a regular file")
            with open(handle, "rb", closefd=False) as file:
                raw = file.read(LARGEST + 1)
        finally:
            os.close(handle)
    except (FileNotFoundError, NotADirectoryError):
        raise Refused(Reasons.TEMPLATE_NOT_FOUND, f"there is no file {name} where lrm runs") from None
    except (PermissionError, RuntimeError) as error:
        raise Refused(Reasons.TEMPLATE_NOT_FOUND, f"the file {name} cannot be read: {type(error).__name__}") from None
    except OSError as error:
        raise NotNow(
            Reasons.TOPOLOGY_UNAVAILABLE, f"the file {name} cannot be read now: {error.strerror}", again=_AGAIN
        ) from None
    if len(raw) > LARGEST:
        raise Refused(Reasons.TEMPLATE_INVALID, f"the file {name} has more than {LARGEST} bytes")
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise Refused(Reasons.TEMPLATE_INVALID, f"the file {name} is not UTF-8") from None


def _open(real: Path) -> int:
    """A handle of what lies at a resolved path: no step follows a link that was put there since it was judged."""
    *folders, name = real.parts[1:] or (".",)
    at = os.open(real.anchor, _FOLDER)
    try:
        for folder in folders:
            inner = os.open(folder, _FOLDER, dir_fd=at)
            os.close(at)
            at = inner
        return os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=at)
    finally:
        os.close(at)


def _listed(path: str, globs: Iterable[str]) -> bool:
    return any(_matches(path, glob) for glob in globs if glob.startswith("/"))


def _matches(path: str, glob: str) -> bool:
    parts, globs = path.split("/"), glob.split("/")
    return len(parts) == len(globs) and all(fnmatchcase(p, g) for p, g in zip(parts, globs, strict=True))


def _split(url: str) -> SplitResult | None:
    """An address's parts; None for one that is not http, names a user, or cannot be parsed."""
    try:
        parts = urlsplit(url)
        if parts.scheme not in _PORTS or not parts.hostname or "@" in parts.netloc or parts.port == 0:
            return None
    except ValueError:
        return None
    return parts


def _server(parts: SplitResult) -> tuple[str, str | None, int]:
    return parts.scheme, parts.hostname, parts.port or _PORTS[parts.scheme]


def _plain(path: str) -> bool:
    """Whether a server will see the path that was judged: no step up, however it is written.

    However often a server, and what stands before it, decode it; some drop what follows a `;` in a step.
    """
    seen = path
    while (decoded := unquote(seen)) != seen:
        seen = decoded
    return "\\" not in seen and not any(step.partition(";")[0] in (".", "..") for step in seen.split("/"))


def _below(path: str, beginning: str) -> bool:
    return path == beginning or path.startswith(beginning if beginning.endswith("/") else f"{beginning}/")


def _told(template: LabTemplate) -> str:
    return template.topology_file or template.topology_url or "labTemplate.topology"
