"""Images: there, or pulled as the policy says; one pull at a time for each image, however many wait for it.

A pull runs on while whoever wants it looks again, and wakes them at its end. What a registry refuses is refused to all
who wanted the image then; where it could not be asked, the pull is tried again with growing delay, and given up after
some tries. Whoever comes later begins anew: what failed yesterday says nothing of today.
"""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime

import structlog

from controllers.containers.chores import Chores
from controllers.containers.documents import Image
from controllers.containers.engine import Engine
from controllers.containers.errors import EngineError, EngineNotFound, EngineRefused
from controllers.instances.phases import Reasons
from controllers.instances.runtime import NotNow, Refused
from lrm.controller import Hints, Key
from storage.clock import Clock

log = structlog.get_logger(__name__)

TRIES = 4
"""Pulls that may fail for one instance where nothing definite was said."""
_REMEMBERED = 1000
"""Images whose last pulls are known."""
_NOT_FOUND = re.compile(r"manifest unknown|name unknown|not found|does not exist|no such image", re.IGNORECASE)
_DENIED = re.compile(
    r"denied|unauthorized|authentication required|forbidden|no basic auth|no matching manifest|unsupported",
    re.IGNORECASE,
)


@dataclass
class _Pulls:
    """What is known of one image's pulls."""

    pulled_at: datetime | None = None
    failed_at: list[datetime] = field(default_factory=list)
    """Since the last one that succeeded; the latest few."""
    failure: EngineError | None = None
    next_try: float = 0.0
    """Monotonic."""
    waiting: set[Key] = field(default_factory=set)


class Images:
    """See the module."""

    def __init__(
        self, engine: Engine, clock: Clock, chores: Chores, hints: Hints, *, timeout: float, retry: float = 5.0
    ) -> None:
        """`timeout`: seconds for one pull; `retry`: seconds before the second try, doubled each time."""
        self._engine = engine
        self._clock = clock
        self._chores = chores
        self._hints = hints
        self._timeout = timeout
        self._retry = retry
        self._pulls: OrderedDict[str, _Pulls] = OrderedDict()

    async def ready(self, name: str, policy: str, key: Key, since: datetime, may: Callable[[], None]) -> Image | None:
        """The image, or None while it is being pulled; `key` is woken then. `since`: when the instance got its place.

        Raises `Refused`, `NotNow`, `EngineError`.
        """
        pulls = self._pulls.get(name) or _Pulls()
        if policy != "Always" or (pulls.pulled_at is not None and pulls.pulled_at >= since):
            try:
                return await self._engine.image(name)
            except EngineNotFound as error:
                if policy == "Never":
                    raise Refused(Reasons.IMAGE_NOT_FOUND, f"{error}, and it is not to be pulled") from error
        self._check(name, pulls, since)
        may()
        pulls.waiting.add(key)
        self._remember(name, pulls)
        self._chores.begin(("pull", name), lambda: self._pull(name, pulls), then=lambda: self._wake(pulls))
        return None

    def _check(self, name: str, pulls: _Pulls, since: datetime) -> None:
        """Raise what the pulls of late say to an instance that wanted the image then."""
        failed = [at for at in pulls.failed_at if at >= since]
        if pulls.failure is None or not failed or self._chores.busy(("pull", name)):
            return
        message = f"{name} cannot be pulled: {pulls.failure}"
        definite = refusal_of(pulls.failure)
        if definite is not None:
            raise Refused(definite, message)
        if len(failed) >= TRIES:
            raise Refused(Reasons.IMAGE_PULL_FAILED, f"{message}; given up after {TRIES} tries")
        left = pulls.next_try - self._clock.monotonic()
        if left > 0:
            raise NotNow(Reasons.IMAGE_PULL_FAILED, message, again=left)

    async def _pull(self, name: str, pulls: _Pulls) -> None:
        log.info("containers.pulling", image=name)
        try:
            await self._engine.pull(name, self._timeout)
        except EngineError as error:
            pulls.failure = error
            pulls.failed_at = [*pulls.failed_at[-(TRIES - 1) :], self._clock.now()]
            pulls.next_try = self._clock.monotonic() + self._retry * 2 ** (len(pulls.failed_at) - 1)
            log.warning("containers.pull_failed", image=name, error=str(error))
        else:
            pulls.failure, pulls.failed_at = None, []
            pulls.pulled_at = self._clock.now()
            log.info("containers.pulled", image=name)

    def _wake(self, pulls: _Pulls) -> None:
        waiting, pulls.waiting = pulls.waiting, set()
        for key in sorted(waiting):
            self._hints.tell(key)

    def _remember(self, name: str, pulls: _Pulls) -> None:
        self._pulls[name] = pulls
        self._pulls.move_to_end(name)
        while len(self._pulls) > _REMEMBERED:
            self._pulls.popitem(last=False)


def refusal_of(error: EngineError) -> str | None:
    """The reason for which this image can never be pulled, or None where that was not said."""
    text = str(error)
    if isinstance(error, EngineNotFound) or _NOT_FOUND.search(text):
        return Reasons.IMAGE_NOT_FOUND
    if isinstance(error, EngineRefused) or _DENIED.search(text):
        return Reasons.IMAGE_PULL_FAILED
    return None
