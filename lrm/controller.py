"""What whoever writes a controller writes against: the controller itself, what it may use, and what it answers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Generic

from lrm.cache import Cache, Change
from lrm.client import Client
from lrm.clock import WallJumps
from lrm.election import Term
from lrm.errors import Fenced
from lrm.events import Recorder
from lrm.kind import R
from storage.base import Guard
from storage.clock import Clock
from storage.errors import GuardFailed

Key = tuple[str, str]
"""(namespace, name) of an object of the controller's kind."""

_CREATING_MOST = 6.0
"""The longest that a call may take which creates something outside, seconds: it must fit into a leader's lease."""


@dataclass(frozen=True, slots=True)
class Result:
    """What a reconcile says about its next time; build it with `done` or `after`."""

    again: float | None = None

    @classmethod
    def done(cls) -> Result:
        """Nothing to do until something changes (or the resync comes round)."""
        return cls()

    @classmethod
    def after(cls, seconds: float) -> Result:
        """Look again after so many seconds, or earlier if something changes."""
        return cls(seconds)


@dataclass(frozen=True, slots=True)
class Trigger:
    """Another kind whose changes concern objects of the controller's kind."""

    model: type[Any]
    keys: Callable[[Change], Iterable[Key]]


class Context:
    """What one reconcile may use."""

    def __init__(
        self,
        *,
        client: Client,
        cache: Cache,
        clock: Clock,
        term: Term,
        observe_only: bool,
        renew_deadline: float,
        jumps: WallJumps,
        bound_log: Any,
        events: Recorder,
    ) -> None:
        self.client = client
        self.cache = cache
        self.clock = clock
        self.observe_only = observe_only
        """True when nothing outside may be changed; status is still written."""
        self.log = bound_log
        self.events = events
        """For what people should hear of: `ctx.events.record(resource, "Warning", "LaunchRefused", "…")`."""
        self._term = term
        self._renew_deadline = renew_deadline
        self._jumps = jumps

    @property
    def creating_timeout(self) -> float:
        """Seconds that a call which creates something outside may take."""
        return min(_CREATING_MOST, self._renew_deadline / 2)

    @property
    def wall_jumped(self) -> bool:
        """Whether wall time was set lately: what a deadline in a status says is then held back (`lrm.clock`)."""
        return self._jumps.lately()

    def check_leading(self, needs: float = 0.0) -> None:
        """Stand before every call to the outside. Raises `NotLeading`."""
        self._term.check(needs)

    def guards(self) -> tuple[Guard, ...]:
        """The leader's guard, for a write that is not a resource's. Raises `NotLeading`."""
        return (self._term.guard(),)

    def fenced(self, error: GuardFailed) -> Fenced:
        """What to raise when the store has refused such a write: this term has ended."""
        self._term.lost()
        return Fenced(f"no longer leading: {error.guard.key} has another holder")


class Hints:
    """Keys that something outside the store asks to be looked at now: a push of a CML, an event of an engine.

    A hint that nobody listens to is lost, and may be: whoever begins to lead looks at everything.
    """

    def __init__(self) -> None:
        self._listeners: list[Callable[[Key], None]] = []

    def tell(self, key: Key) -> None:
        """Have an object reconciled now, wherever the controller runs."""
        for listener in tuple(self._listeners):
            listener(key)

    def listen(self, listener: Callable[[Key], None]) -> Callable[[], None]:
        """Hear every hint; returns what ends that."""
        self._listeners.append(listener)
        return lambda: self._listeners.remove(listener)


class Controller(ABC, Generic[R]):
    """One kind's reconcile logic; subclasses set the attributes and write `reconcile`."""

    name: str
    """Unique."""
    owner: str = ""
    """As whom it writes status fields; empty: its name."""
    lock_name: str
    """Controllers that share a lock are led together."""
    model: type[R]
    finalizer: str = ""
    """Held on every object of the kind by this controller; empty when it has nothing to clean up."""
    workers: int = 4
    deadline: float = 120.0
    """Seconds for one reconcile."""
    resync: float = 600.0
    """Seconds after which an object is looked at again even if nothing happened, ±10 %."""

    hints: Hints | None = None
    """Where something outside the store asks for a look."""
    poll: float = 60.0
    """Seconds over which a new leader spreads its first look at objects that are settled."""

    def triggers(self) -> Sequence[Trigger]:
        """Changes of other kinds that concern this one."""
        return ()

    def wakes(self, change: Change) -> bool:  # noqa: ARG002 - for subclasses
        """Whether a change of an own object is worth a reconcile."""
        return True

    def settled(self, resource: R) -> bool:  # noqa: ARG002 - for subclasses
        """Whether an object needs nothing before `poll` seconds have passed, if it has not changed meanwhile.

        True only where no deadline and no wish of the object can be missed by that.
        """
        return False

    @abstractmethod
    async def reconcile(self, resource: R, ctx: Context) -> Result:
        """Make the world match one step further. `resource` is shared and read-only."""

    async def finalize(self, resource: R, ctx: Context) -> Result:  # noqa: ARG002 - for subclasses
        """Clean up; `Result.done()` lets the finalizer go."""
        return Result.done()
