"""Long lists page by page, straight from the store at one revision: what fits is chosen before the limit counts.

A continue token says where the next page begins and to which list it belongs; one of another list is refused. When the
revision is no longer kept the store says `Compacted`, which is told as 410. Called by the lists of kinds and of events.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import orjson

from lrm.api.status import bad_request
from storage.base import Entry, Storage
from storage.clock import Clock

T = TypeVar("T")

_PAGE = 500
"""Entries read from the store at once."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where a page begins: after `key`, which lies on the store's own page `page`, at a revision (0: the newest)."""

    revision: int = 0
    key: str = ""
    page: str = ""

    def token(self, fingerprint: str) -> str:
        """The continue token of a list."""
        raw = orjson.dumps([self.revision, self.key, self.page, fingerprint])
        return base64.urlsafe_b64encode(raw).decode().rstrip("=")


@dataclass(frozen=True, slots=True)
class Pages(Generic[T]):
    """What was chosen, and where to go on if there is more."""

    found: list[T]
    revision: int
    next: Place | None = None


def fingerprint(*said: Any) -> str:
    """What tells one list from another: its path and selectors."""
    return hashlib.sha256(orjson.dumps(said)).hexdigest()[:16]


def place_of(token: str, of_list: str) -> Place:
    """The place of a continue token of the list with this fingerprint. Raises 400."""
    try:
        raw = base64.b64decode(token + "=" * (-len(token) % 4), altchars=b"-_", validate=True)
        revision, key, page, belongs_to = orjson.loads(raw)
    except (binascii.Error, ValueError, TypeError):
        raise bad_request("the continue token is not one that this server gave out") from None
    typed = isinstance(revision, int) and isinstance(key, str) and isinstance(page, str)
    if not typed or isinstance(revision, bool) or not 0 < revision < 2**63:
        raise bad_request("the continue token is not one that this server gave out")
    if belongs_to != of_list:
        raise bad_request("the continue token belongs to another list: its selectors and path must stay the same")
    return Place(revision, key, page)


async def read_pages(
    storage: Storage, prefix: str, place: Place, limit: int, choose: Callable[[Entry], T | None], *, clock: Clock
) -> Pages[T]:
    """Up to `limit` (0: all) of what `choose` makes of the entries below a prefix, beginning at `place`.

    The event loop is given back after every 500 entries.
    """
    revision, page_token, last = place.revision, place.page, ""
    found: list[T] = []
    while True:
        page = await storage.list(prefix, limit=_PAGE, continue_token=page_token, revision=revision)
        for entry in page.entries:
            chosen = choose(entry) if entry.key > place.key else None
            if chosen is None:
                continue
            if limit and len(found) == limit:
                return Pages(found, page.revision, Place(page.revision, last, page_token))
            found.append(chosen)
            last = entry.key
        page_token, revision = page.continue_token, page.revision
        if not page_token:
            return Pages(found, page.revision)
        await clock.sleep(0)
