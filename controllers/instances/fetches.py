"""Fetches topologies from web servers so that a slow one holds up nobody but those who want something of it.

Promises: one fetch at a time for each address and `OF_ONE_SERVER` for each server, all in tasks of their own. Who asks
is kept for a moment at most, a few at a time, and else told `NotNow` and woken when the fetch has ended. A text is
given once, and only to who asked for it before its fetch began: nobody gets an older one than by fetching it alone.
What cannot be had now is told to all until it is tried again. Which addresses may be asked is the caller's to decide.
"""

from __future__ import annotations

import asyncio
from collections import Counter, deque
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Self
from urllib.parse import urlsplit

import structlog

from controllers.cml.fetch import FetchNotFound, FetchRefused, FetchUnavailable, fetch_text
from controllers.instances.phases import Reasons
from controllers.instances.runtime import NotNow, Refused
from controllers.instances.topology import LARGEST
from lrm.controller import Hints, Key
from storage.clock import Clock

log = structlog.get_logger(__name__)

OF_ONE_SERVER = 4
"""Fetches from one server at a time."""
AGAIN = 30.0
"""Seconds after which a server that did not answer is asked again."""
_TIMEOUT = 20.0
"""Seconds for one address."""
_MOMENT = 1.0
"""Seconds for which one who asks is kept: most servers answer sooner, and then nothing needs to be told."""
_KEPT_MOST = 8
"""Those who are kept at a time, of all the hands that the controller has."""
_TAKEN_WITHIN = 60.0
"""Seconds after which a text is dropped that nobody took: whoever asked may be gone."""
_REMEMBERED = 600.0
"""Seconds for which the trouble with an address is told to who asks while it is tried again."""

_Asker = tuple[str, str]
"""Address, and the uid of who asks."""


@dataclass(eq=False)
class _Address:
    """What is known of an address that is, or lately was, asked for."""

    url: str
    wanted: dict[str, Key] = field(default_factory=dict)
    """For whom the next fetch is, by uid."""
    served: dict[str, Key] | None = None
    """For whom the fetch in hand is; None: there is none."""
    trouble: str = ""
    """Why the last fetch came to nothing."""
    next_try: float = 0.0
    """Monotonic, after trouble."""
    fetches: int = 0
    """That have begun."""
    ended: asyncio.Event = field(default_factory=asyncio.Event)
    """Of the fetch in hand, or the next."""

    @property
    def server(self) -> str:
        return urlsplit(self.url).hostname or ""


class Fetches:
    """See the module."""

    def __init__(self, clock: Clock, hints: Hints) -> None:
        """`hints` wake those who were told `NotNow`."""
        self._clock = clock
        self._hints = hints
        self._group = asyncio.TaskGroup()
        self._tasks: set[asyncio.Task[None]] = set()
        self._addresses: dict[str, _Address] = {}
        self._lines: dict[str, deque[_Address]] = {}
        """Addresses that wait for their server, by server."""
        self._busy: Counter[str] = Counter()
        self._kept: set[_Asker] = set()
        self._answers: dict[_Asker, str | Refused] = {}

    async def __aenter__(self) -> Self:
        await self._group.__aenter__()
        return self

    async def __aexit__(self, *_error: object) -> None:
        for task in self._tasks:
            task.cancel()
        await self._group.__aexit__(None, None, None)

    async def text(self, url: str, uid: str, key: Key) -> str:
        """The text at an address, for the request of that uid. Raises `Refused`, and `NotNow`: then `key` is woken."""
        asker = url, uid
        if asker not in self._answers:
            address = self._ask(url, uid, key)
            await self._a_moment(address, asker)
            if asker not in self._answers:
                raise self._not_yet(address)
        answer = self._answers.pop(asker)
        if isinstance(answer, Refused):
            raise Refused(answer.reason, str(answer))
        return answer

    def _ask(self, url: str, uid: str, key: Key) -> _Address:
        """See to it that a fetch begins for the request. Raises `NotNow` where it is too early for another."""
        address = self._addresses.setdefault(url, _Address(url))
        if address.next_try > self._clock.monotonic():
            raise self._not_yet(address)
        if address.served is None or uid not in address.served:
            if address.served is None and not address.wanted:
                self._lines.setdefault(address.server, deque()).append(address)
            address.wanted[uid] = key
            self._begin(address.server)
        return address

    async def _a_moment(self, address: _Address, asker: _Asker) -> None:
        """Wait for the answer, where that is not known to take long and few others do."""
        if address.trouble or len(self._kept) >= _KEPT_MOST:
            return
        self._kept.add(asker)
        try:
            with suppress(TimeoutError):
                async with self._clock.timeout(_MOMENT):
                    while asker not in self._answers and not address.trouble:
                        await address.ended.wait()
        finally:
            self._kept.discard(asker)

    def _begin(self, server: str) -> None:
        """Fetch what waits for a server, as far as it may be asked."""
        line = self._lines.get(server, deque())
        while line and self._busy[server] < OF_ONE_SERVER:
            address = line.popleft()
            address.served, address.wanted = address.wanted, {}
            self._busy[server] += 1
            task = self._group.create_task(self._fetch(address, address.served))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
        if not line:
            self._lines.pop(server, None)

    async def _fetch(self, address: _Address, served: dict[str, Key]) -> None:
        """One fetch, and the keeping of what came of it."""
        address.fetches += 1
        number, answer = address.fetches, await self._answer(address)
        woken = dict(served)
        if answer is not None:
            address.trouble, address.next_try = "", 0.0
            self._answers |= {(address.url, uid): answer for uid in served}
        else:
            address.next_try = self._clock.monotonic() + AGAIN
            woken |= address.wanted
            address.wanted = {}
        self._end(address)
        for uid, key in woken.items():
            if (address.url, uid) not in self._kept:
                self._hints.tell(key)
        await self._clock.sleep(_REMEMBERED if answer is None else _TAKEN_WITHIN)
        for asker in [(address.url, uid) for uid in served]:
            if answer is not None and self._answers.get(asker) is answer:
                del self._answers[asker]
        if address.fetches == number and not address.wanted:
            del self._addresses[address.url]

    async def _answer(self, address: _Address) -> str | Refused | None:
        """What the server says; None where it says nothing of use now, which is `trouble` then."""
        url = address.url
        try:
            return await fetch_text(url, most=LARGEST, timeout=_TIMEOUT, clock=self._clock)
        except FetchNotFound as error:
            return Refused(Reasons.TEMPLATE_NOT_FOUND, f"{url}: {error}")
        except FetchRefused as error:
            return Refused(Reasons.TEMPLATE_INVALID, f"{url}: {error}")
        except FetchUnavailable as error:
            address.trouble = f"{url}: {error}"
        except Exception as error:
            # A defect costs this fetch, not the daemon; it is tried again like a server that is away.
            log.exception("instances.fetch_defect", url=url)
            address.trouble = f"{url}: {type(error).__name__}"
        return None

    def _end(self, address: _Address) -> None:
        """Let the next one at the server, and those who were kept go on."""
        address.served = None
        self._busy[address.server] -= 1
        if not self._busy[address.server]:
            del self._busy[address.server]
        if address.wanted:
            self._lines.setdefault(address.server, deque()).append(address)
        self._begin(address.server)
        address.ended.set()
        address.ended = asyncio.Event()

    def _not_yet(self, address: _Address) -> NotNow:
        if not address.trouble:
            return NotNow(Reasons.PREPARING, f"{address.url} is being fetched", again=AGAIN)
        left = address.next_try - self._clock.monotonic()
        return NotNow(Reasons.TOPOLOGY_UNAVAILABLE, address.trouble, again=left if left > 0 else AGAIN)
