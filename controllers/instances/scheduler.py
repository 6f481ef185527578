"""Which lab instance gets which place: the rules, as one pure function of what is known.

Those that wait are taken in the order of their scheduled time (else creation), creation, uid; each gets the best place
that has room for it, and what it takes is gone for those after it. One that does not fit holds up nobody. Quotas are
counted in the same order. The same input gives the same answer. `places` makes the input of objects, `placing` asks.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Literal, Protocol

from controllers.instances.kind import Need, WorkerRef
from controllers.instances.phases import Reasons
from controllers.instances.quantity import told_bytes, told_cores
from controllers.instances.scheduling import Waits

Policy = Literal["BestFit", "LeastUsed", "RoundRobin"]

_CPU_SLACK = 1e-6
"""Cores by which a sum of fractions may miss what it stands for."""


class Measured(Protocol):
    """Whatever says how much of a place something takes: a need, a reservation, an amount."""

    @property
    def cpu(self) -> float: ...
    @property
    def memory(self) -> int: ...
    @property
    def slots(self) -> int: ...
    @property
    def nodes(self) -> int: ...


@dataclass(frozen=True, slots=True)
class Amount:
    """So much of everything that a place is measured in: cores, bytes, labs, CML nodes."""

    cpu: float = 0.0
    memory: int = 0
    slots: int = 0
    nodes: int = 0

    def __add__(self, other: Measured) -> Amount:
        return Amount(
            self.cpu + other.cpu, self.memory + other.memory, self.slots + other.slots, self.nodes + other.nodes
        )

    def __sub__(self, other: Measured) -> Amount:
        return Amount(
            self.cpu - other.cpu, self.memory - other.memory, self.slots - other.slots, self.nodes - other.nodes
        )

    def holds(self, need: Need) -> bool:
        """Whether a need fits in; what is not needed may be overdrawn or unknown."""
        return (
            need.slots <= self.slots
            and (need.cpu <= self.cpu + _CPU_SLACK or need.cpu == 0)
            and (need.memory <= self.memory or need.memory == 0)
            and (need.nodes <= self.nodes or need.nodes == 0)
        )


UNBOUNDED_NODES = 10**9
"""Nodes of a place where they do not count."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where labs may run: a LabWorker, or the engine."""

    ref: WorkerRef
    closed: str
    """Why no lab is placed there now, in a word; empty where labs are taken."""
    total: Amount
    """Where cpu or memory is 0 it is not known, and what needs some of it waits until it is."""
    used: Amount
    licensed_nodes: int = UNBOUNDED_NODES
    """Nodes that it could take in all with a licence; `total.nodes` says what it may take as it is."""
    shared: bool = False
    """For requests of every namespace."""
    doubtful: bool = False
    """Labs are taken, and it did not answer just now: chosen only where no other has room."""
    track: str = ""
    pools: frozenset[str] = frozenset()
    free: Amount = field(init=False)
    order: tuple[str, str] = field(init=False)
    """By which equals are told apart: namespace and name."""

    fullness: float = field(init=False)
    """0 to 1, by what is scarcest."""

    def __post_init__(self) -> None:
        free = self.total - self.used
        object.__setattr__(self, "free", free)
        object.__setattr__(self, "order", (self.ref.namespace, self.ref.name))
        object.__setattr__(self, "fullness", _fullness(self.total, free))


def _fullness(total: Amount, free: Amount) -> float:
    parts = (
        (total.slots, free.slots),
        (total.cpu, free.cpu),
        (total.memory, free.memory),
        (total.nodes, free.nodes),
    )
    return max((1 - left / whole for whole, left in parts if whole), default=0.0)


@dataclass(frozen=True, slots=True)
class Wanted:
    """A request that has no place."""

    uid: str
    namespace: str
    student: str
    runtime: str
    since: tuple[datetime, datetime, str]
    """Its rank: scheduled or else created at, created at, uid."""
    need: Need | None
    ready: bool = True
    """Whether it would take a place, in its time; if not, it still counts for quotas."""
    begins: datetime | None = None
    """Not before; its schedule, or the delay before another try."""
    ends: datetime | None = None
    """When its time is over, of one that ran before."""
    track: str = ""
    pool: str | None = None

    def is_ready(self, now: datetime) -> bool:
        """Whether it takes a place now, if there is one."""
        begun = self.begins is None or self.begins <= now
        return self.ready and begun and (self.ends is None or now < self.ends)


@dataclass(frozen=True, slots=True)
class Held:
    """What is reserved for a request already."""

    ref: WorkerRef
    amount: Amount


@dataclass(frozen=True, slots=True)
class Quota:
    """Most lab instances that wait or run, 0 for no limit; and how many have a place, which always count first."""

    per_student: int = 0
    per_namespace: int = 0
    students: Mapping[tuple[str, str], int] = field(default_factory=dict)
    """By namespace and student."""
    namespaces: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Rules:
    """What settings and earlier decisions say."""

    now: datetime
    policy: Policy = "BestFit"
    quota: Quota = field(default_factory=Quota)
    last: tuple[str, str] = ("", "")
    """For RoundRobin: the place that was chosen last."""
    held: Mapping[str, Held] = field(default_factory=dict)
    """By uid."""
    no_engine: str = "no engine for containers is configured"
    """Why there is none, where there is none."""


def plan(
    waiting: Iterable[Wanted], places: Sequence[Place], rules: Rules, asked: Collection[str]
) -> Iterator[tuple[str, WorkerRef | Waits]]:
    """Decide in order for those that wait, up to the last that is asked for: who has which place.

    Those that are asked for and have none are told why; of the others only their places are told.
    """
    left = set(asked)
    planning, count = _Planning(places, rules), _QuotaCount(rules.quota)
    for wanted in _in_order(waiting):
        if not left:
            return
        told = wanted.uid in left
        left.discard(wanted.uid)
        exceeded = count.exceeded_by(wanted)
        if exceeded is not None:
            if told:
                yield wanted.uid, exceeded
            continue
        need = wanted.need
        if need is None or not wanted.is_ready(rules.now):
            continue
        chosen = planning.place(wanted, need)
        if chosen is not None:
            yield wanted.uid, chosen
        elif told:
            yield wanted.uid, planning.why_not(wanted, need)


def who_fits(waiting: Iterable[Wanted], places: Sequence[Place], rules: Rules) -> Iterator[str]:
    """The uids of those to whom a plan for all that wait gives a place."""
    planning, count = _Planning(places, rules), _QuotaCount(rules.quota)
    for wanted in _in_order(waiting):
        need = wanted.need
        if count.exceeded_by(wanted) is not None or need is None or not wanted.is_ready(rules.now):
            continue
        if planning.place(wanted, need) is not None:
            yield wanted.uid


def _in_order(waiting: Iterable[Wanted]) -> list[Wanted]:
    return sorted(waiting, key=lambda wanted: wanted.since)


class _QuotaCount:
    """Counts requests in their order against the limits."""

    def __init__(self, quota: Quota) -> None:
        self._quota = quota
        self._students = dict(quota.students)
        self._namespaces = dict(quota.namespaces)

    def exceeded_by(self, wanted: Wanted) -> Waits | None:
        """Why it is one too many; else it counts from now on."""
        student, namespace, quota = (wanted.namespace, wanted.student), wanted.namespace, self._quota
        of_student, of_namespace = self._students.get(student, 0), self._namespaces.get(namespace, 0)
        if quota.per_student and of_student >= quota.per_student:
            who = f"{wanted.student} has {of_student} lab instances before it in {namespace}, and {quota.per_student}"
            return Waits(Reasons.QUOTA_EXCEEDED, f"{who} are allowed to a student")
        if quota.per_namespace and of_namespace >= quota.per_namespace:
            who = f"{of_namespace} lab instances come before it in {namespace}, and {quota.per_namespace}"
            return Waits(Reasons.QUOTA_EXCEEDED, f"{who} are allowed in a namespace")
        self._students[student] = of_student + 1
        self._namespaces[namespace] = of_namespace + 1
        return None


_Group = tuple[str, str, str, str | None]


class _Planning:
    """The places while a plan fills them."""

    def __init__(self, places: Sequence[Place], rules: Rules) -> None:
        self._places = places
        self._free = [place.free for place in places]
        self._full = [place.fullness for place in places]
        self._rules = rules
        self._last = rules.last
        self._groups: dict[_Group, list[int]] = {}
        self._refused: dict[_Group, list[Need]] = {}
        """Needs for which there was no room: within a plan room only shrinks."""

    def place(self, wanted: Wanted, need: Need) -> WorkerRef | None:
        """Where it goes; its room is taken."""
        position = self._kept(wanted, need)
        if position is None:
            group = _group(wanted)
            refused = self._refused.setdefault(group, [])
            if any(_at_least(need, other) for other in refused):
                return None
            position = self._best(self._members(group), need)
            if position is None:
                refused.append(need)
                return None
            self._fill(position, self._free[position] - need)
        place = self._places[position]
        self._last = place.order
        return place.ref

    def _kept(self, wanted: Wanted, need: Need) -> int | None:
        """The place that is reserved for it, while it can be there."""
        held = self._rules.held.get(wanted.uid)
        if held is None:
            return None
        for position in self._members(_group(wanted)):
            place = self._places[position]
            if place.ref == held.ref and not place.closed:
                free = self._free[position] + held.amount
                if free.holds(need):
                    self._fill(position, free - need)
                    return position
        return None

    def _members(self, group: _Group) -> list[int]:
        """The places that may take its requests, whether they do now or not."""
        if group not in self._groups:
            self._groups[group] = [i for i, place in enumerate(self._places) if _suits(place, group)]
        return self._groups[group]

    def _best(self, members: Iterable[int], need: Need) -> int | None:
        places, free, full = self._places, self._free, self._full
        fitting = [i for i in members if free[i].holds(need) and not places[i].closed]
        if not fitting:
            return None
        match self._rules.policy:
            case "RoundRobin":
                return min(fitting, key=lambda i: (places[i].doubtful, places[i].order <= self._last, places[i].order))
            case "LeastUsed":
                return min(fitting, key=lambda i: (places[i].doubtful, full[i], places[i].order))
            case "BestFit":
                return min(fitting, key=lambda i: (places[i].doubtful, -full[i], places[i].order))

    def _fill(self, position: int, free: Amount) -> None:
        self._free[position] = free
        self._full[position] = _fullness(self._places[position].total, free)

    def why_not(self, wanted: Wanted, need: Need) -> Waits:
        """Why it has no place: the reason that tells best what would help."""
        if wanted.runtime == "Container":
            return self._why_no_engine(need)
        visible = self._members(("CML", wanted.namespace, "", None))
        if not visible:
            return Waits(Reasons.NO_WORKERS_AVAILABLE, f"no worker serves the namespace {wanted.namespace}")
        pooled = self._members(("CML", wanted.namespace, "", wanted.pool))
        if not pooled:
            return Waits(Reasons.NO_MATCHING_POOL, f"no worker belongs to the pool {wanted.pool}")
        members = [self._places[i] for i in self._members(_group(wanted))]
        what = f" of the track {wanted.track}" if wanted.track else ""
        if not members:
            return Waits(Reasons.NO_MATCHING_TRACK, f"no worker has the track {wanted.track}")
        serving = [place for place in members if not place.closed]
        if not serving:
            return Waits(Reasons.NO_WORKERS_AVAILABLE, f"no worker{what} serves: {_counted(p.closed for p in members)}")
        return _why_not_among(serving, need, what)

    def _why_no_engine(self, need: Need) -> Waits:
        engines = [place for place in self._places if place.ref.kind == "Engine" and not place.closed]
        if not engines:
            return Waits(Reasons.ENGINE_UNAVAILABLE, self._rules.no_engine)
        if not any(place.total.holds(need) for place in engines):
            told = f"the engine could not take {_told(need)} even when empty; {_most(engines, need)}"
            return Waits(Reasons.TOO_LARGE, told)
        return Waits(Reasons.NO_CAPACITY_AVAILABLE, f"the engine has no room for {_told(need)}")


def _why_not_among(serving: Sequence[Place], need: Need, what: str) -> Waits:
    able = [place for place in serving if place.total.holds(need)]
    if able:
        told = f"{len(able)} of {len(serving)} workers{what} could take {_told(need)}, and have no room"
        return Waits(Reasons.NO_CAPACITY_AVAILABLE, told)
    silent = [place for place in serving if _unknown_is_needed(place, need)]
    if silent:
        told = f"{silent[0].ref.name} has not told its cpu and memory yet"
        return Waits(Reasons.NO_CAPACITY_AVAILABLE, told)
    unlicensed = [place for place in serving if _with_license(place).holds(need)]
    if unlicensed:
        most = max(place.total.nodes for place in unlicensed)
        told = f"it has {need.nodes} nodes, and {unlicensed[0].ref.name} takes {most} without a licence"
        return Waits(Reasons.WORKER_NOT_LICENSED, told)
    told = f"no worker{what} that serves could take {_told(need)} even when empty; {_most(serving, need)}"
    return Waits(Reasons.TOO_LARGE, f"{told}; it waits for a larger one")


def _most(places: Sequence[Place], need: Need) -> str:
    """The most that any of the places has, a licence included, of what none has enough of."""
    totals = [_with_license(place) for place in places]
    cpu, memory = max(total.cpu for total in totals), max(total.memory for total in totals)
    nodes, slots = max(total.nodes for total in totals), max(total.slots for total in totals)
    parts = [
        (need.cpu > cpu + _CPU_SLACK, told_cores(cpu)),
        (need.memory > memory, told_bytes(memory)),
        (need.nodes > nodes, _nodes(nodes)),
        (need.slots > slots, f"{slots} labs"),
    ]
    most = ", ".join(told for is_less, told in parts if is_less)
    return f"the most is {most}" if most else "none has enough of each"


def _group(wanted: Wanted) -> _Group:
    return wanted.runtime, wanted.namespace, wanted.track, wanted.pool


def _suits(place: Place, group: _Group) -> bool:
    runtime, namespace, track, pool = group
    if place.ref.kind == "Engine":
        return runtime == "Container"
    return (
        runtime == "CML"
        and (place.shared or place.ref.namespace == namespace)
        and (not track or place.track == track)
        and (pool is None or pool in place.pools)
    )


def _at_least(need: Need, other: Need) -> bool:
    """Whether a need is met nowhere where the other is not."""
    return (
        need.cpu >= other.cpu
        and need.memory >= other.memory
        and need.slots >= other.slots
        and need.nodes >= other.nodes
    )


def _unknown_is_needed(place: Place, need: Need) -> bool:
    total = place.total
    return (need.cpu > 0 and not total.cpu) or (need.memory > 0 and not total.memory)


def _with_license(place: Place) -> Amount:
    total = place.total
    return Amount(total.cpu, total.memory, total.slots, max(total.nodes, place.licensed_nodes))


def _counted(words: Iterable[str]) -> str:
    """As in "2 Starting, 1 Stopped"."""
    counts: dict[str, int] = {}
    for word in words:
        counts[word] = counts.get(word, 0) + 1
    return ", ".join(f"{count} {word}" for word, count in sorted(counts.items()))


def _nodes(count: int) -> str:
    return f"{count} {'node' if count == 1 else 'nodes'}"


def _told(need: Need) -> str:
    parts: list[tuple[bool, Callable[[], str]]] = [
        (need.cpu > 0, lambda: told_cores(need.cpu)),
        (need.memory > 0, lambda: told_bytes(need.memory)),
        (need.nodes > 0, lambda: _nodes(need.nodes)),
    ]
    return ", ".join(tell() for is_asked, tell in parts if is_asked) or "another lab"
