"""How large a pool is to be: one pure function of the pool, its workers, their load and the time.

`decide` promises: never above `maxWorkers`, never below `minWorkers` by a decision of its own, no worker that hosts
labs is taken away, and one thing at a time. What a person says (min, max, replicas, schedule) holds at once. Load is
heeded only while no worker is on its way or leaving, outside cooldowns and within the allowed hours; it takes a worker
away only where the others can carry the whole load without asking for it back, so a constant load moves nothing twice.
Every serving worker counts, Active ones too: a pool that is busy everywhere grows when a threshold says so.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from enum import StrEnum

from controllers.pools.demand import Load, WorkerLoad
from controllers.pools.hours import soon_or_now
from controllers.pools.kind import LONGEST_LEAD, LabWorkerPool
from controllers.pools.launches import stuck_by
from controllers.workers.decisions import Goal, goal_of, is_paused
from controllers.workers.kind import LabWorker, serving
from controllers.workers.phases import Phase, Reasons
from lrm.resource import PAUSE_ANNOTATION, PROTECT_ANNOTATION

FIRST_LEAD = 20 * 60
"""Seconds that a worker takes to be ready, while none of the pool has shown it: 15 to 20 minutes are usual on metal."""

MEASURED_AFTER = 15
"""Minutes after which a worker that became ready has been measured, if it ever is: three of the metrics' intervals."""

_ENDED = frozenset({"terminated", "shutting-down", "stopped"})
"""States of an instance on which no lab runs, whatever its records say."""


class Reason(StrEnum):
    """Why the size changes, or does not although something asks for it."""

    BELOW_WISHED = "BelowWished"
    ABOVE_WISHED = "AboveWished"
    ABOVE_MAXIMUM = "AboveMaximum"
    SCHEDULE = "Schedule"
    WORKER_FAILED = "WorkerFailed"
    CPU = "CPU"
    MEMORY = "Memory"
    LABS = "Labs"
    WAITING_LABS = "WaitingLabs"
    IDLE = "Idle"
    # held back
    AT_MAXIMUM = "AtMaximum"
    COOLDOWN = "Cooldown"
    OUTSIDE_HOURS = "OutsideAllowedHours"
    HOSTS_LABS = "WorkersHostLabs"
    REPLACEMENT_LIMIT = "ReplacementLimit"
    MAX_INSTANCES = Reasons.MAX_INSTANCES
    ACCOUNT_FORBIDDEN = "AccountForbidden"
    UNKNOWN_ACCOUNT = "UnknownAccount"
    UNKNOWN_REGION = "UnknownRegion"
    AWS_AUTH_FAILED = "AWSAuthFailed"
    WRONG_ACCOUNT = "WrongAccount"
    # nothing to do
    IN_FLIGHT = "InFlight"
    SETTLED = "Settled"


class Direction(StrEnum):
    """Which way a decision goes."""

    UP = "Up"
    DOWN = "Down"
    REPLACE = "Replace"
    WAKE = "Wake"
    NONE = "None"


@dataclass(frozen=True, slots=True)
class Decision:
    """What is to be done now."""

    direction: Direction
    reason: Reason
    message: str = ""
    before: int = 0
    """Workers now: those that have not failed and are not leaving."""
    create: int = 0
    remove: tuple[str, ...] = ()
    wake: tuple[str, ...] = ()
    """Workers that idleness has stopped and that are to serve again."""
    replaced: int = 0
    """How many of the created stand for failed ones."""
    after: int = 0
    """Workers once it is done; with `acts` only."""

    @property
    def acts(self) -> bool:
        """Whether the pool changes."""
        return self.direction is not Direction.NONE

    @property
    def held(self) -> bool:
        """Whether a change is asked for that cannot be made now, for a reason that a person may want to know."""
        return not self.acts and self.reason not in (Reason.IN_FLIGHT, Reason.SETTLED)


@dataclass(frozen=True, slots=True)
class Roster:
    """A pool's workers by what they are good for."""

    members: tuple[LabWorker, ...]
    """All that are not leaving."""
    leaving: tuple[LabWorker, ...]
    """Being deleted."""
    failed: tuple[LabWorker, ...]
    """Failed or ended, and to be replaced."""
    able: tuple[LabWorker, ...]
    """Members that make up the pool's size: all but `failed`."""
    serving: tuple[LabWorker, ...]
    starting: tuple[LabWorker, ...]
    """Wanted Ready and not there yet."""
    stuck: tuple[LabWorker, ...]
    """Those of them that something keeps from being launched: nobody knows until when."""
    asleep: tuple[LabWorker, ...]
    """Stopped by idleness."""


def roster(pool: LabWorkerPool, workers: Iterable[LabWorker], load: Load) -> Roster:
    """Sort a pool's workers.

    A failed one on which labs may still run is none to be replaced: it stays until they end. Nor is any, where the
    pool does not replace.
    """
    everyone = tuple(workers)
    members = tuple(w for w in everyone if not w.deleting)
    replaces = pool.spec.replace_failed.enabled
    failed = tuple(w for w in members if replaces and has_failed(w) and is_removable(w, load.of(w)))
    out = {w.name for w in failed}
    able = tuple(w for w in members if w.name not in out)
    return Roster(
        members=members,
        leaving=tuple(w for w in everyone if w.deleting),
        failed=failed,
        able=able,
        serving=tuple(w for w in able if serving(w)),
        starting=tuple(w for w in able if _starting(w)),
        stuck=tuple(w for w in able if _starting(w) and stuck_by(w)),
        asleep=tuple(w for w in able if is_paused(w) and not serving(w)),
    )


def has_failed(worker: LabWorker) -> bool:
    """Whether a worker serves no more and will not by itself."""
    return worker.status.phase in {Phase.FAILED, Phase.TERMINATED, Phase.TERMINATING_EC2}


def is_removable(worker: LabWorker, load: WorkerLoad) -> bool:
    """Whether the pool may end a worker: nobody forbids it, and no lab runs there or is placed there.

    One that a person has made outlive its object, or only to be observed, would leave its instance behind.
    """
    annotations = worker.metadata.annotations
    if worker.spec.retains or worker.spec.observe_only:
        return False
    if any(annotations.get(name, "false") != "false" for name in (PROTECT_ANNOTATION, PAUSE_ANNOTATION)):
        return False
    if has_failed(worker) and (worker.status.ec2.instance_id is None or worker.status.ec2.state in _ENDED):
        return True
    return not load.hosts


def lead_of(pool: LabWorkerPool) -> timedelta:
    """How long before a known need its workers are begun."""
    measured = pool.status.seconds_to_ready
    return timedelta(seconds=FIRST_LEAD if measured is None else min(measured, LONGEST_LEAD))


def decide(pool: LabWorkerPool, workers: Iterable[LabWorker], load: Load, now: datetime) -> Decision:
    """The next change of the pool, if any. Raises `UnknownTimeZone`."""
    team = roster(pool, workers, load)
    floor, why = _floor(pool, now, lead_of(pool))
    # The lead falls as soon as a worker shows how quick it is: what a longer one began stays for its window.
    kept, _ = _floor(pool, now, timedelta(seconds=LONGEST_LEAD))
    first = (
        _shrink_to(pool, team, load, kept)
        or _grow_to(team, floor, why)
        or _in_flight([w for w in team.starting if not stuck_by(w)])
    )
    if first is not None:
        return first
    replacement = _replace(pool, team, kept, now)
    if replacement is not None and replacement.acts:
        return replacement
    # One that waits for its labs may take hours; until they end it changes nothing for the others.
    by_load = _in_flight([w for w in team.leaving if not load.of(w).hosts]) or _by_load(pool, team, load, kept, now)
    if by_load is not None and by_load.acts:
        return by_load
    return replacement or by_load or _stuck(team) or Decision(Direction.NONE, Reason.SETTLED, before=len(team.able))


# What a person says


def _floor(pool: LabWorkerPool, now: datetime, ahead: timedelta) -> tuple[int, Reason]:
    """The size that the pool must have, windows that begin within `ahead` heeded, and what says so."""
    spec, wished = pool.spec, pool.spec.wished
    if spec.policy not in ("Scheduled", "Hybrid"):
        return wished, Reason.BELOW_WISHED
    scheduled = max((w.workers for w in spec.schedule if soon_or_now(w, now, spec.time_zone, ahead)), default=0)
    scheduled = min(scheduled, spec.max_workers)
    return (scheduled, Reason.SCHEDULE) if scheduled > wished else (wished, Reason.BELOW_WISHED)


def _most(pool: LabWorkerPool, kept: int) -> int:
    """The size that the pool must not exceed: where load decides nothing, the one that it must keep."""
    return pool.spec.max_workers if pool.spec.heeds_load else kept


def _shrink_to(pool: LabWorkerPool, team: Roster, load: Load, kept: int) -> Decision | None:
    """Down to the size that is asked for, or to the maximum; as far as workers can be spared now."""
    most = _most(pool, kept)
    excess, before = len(team.members) - most, len(team.able)
    if excess <= 0 or (before < most and len(team.members) <= pool.spec.max_workers):
        return None  # the failed ones that make it too large are replaced first, and then go
    victims = _expendable(team.members, load)[:excess]
    if victims:
        reason = Reason.ABOVE_MAXIMUM if most == pool.spec.max_workers else Reason.ABOVE_WISHED
        failed = {w.name for w in team.failed}
        able_gone = sum(w.name not in failed for w in victims)
        return Decision(
            Direction.DOWN,
            reason,
            f"{len(team.members)} workers, {most} wanted: {before - able_gone} of {before} are left",
            before=before,
            after=before - able_gone,
            remove=tuple(w.name for w in victims),
        )
    if team.able and before > most:
        message = f"more than {most} workers, and those that could go host labs or are protected"
        return Decision(Direction.NONE, Reason.HOSTS_LABS, message, before=before)
    return None


def _grow_to(team: Roster, floor: int, why: Reason) -> Decision | None:
    """Up to the size that is asked for; what failed counts, it is replaced at a rate of its own."""
    short = floor - len(team.able) - len(team.failed)
    if short <= 0:
        return None
    message = f"{len(team.able)} workers, {floor} wanted"
    before = len(team.able)
    return Decision(Direction.UP, why, message, before=before, after=before + short, create=short)


def _in_flight(workers: Sequence[LabWorker]) -> Decision | None:
    if not workers:
        return None
    names = ", ".join(w.name for w in workers[:3])
    return Decision(Direction.NONE, Reason.IN_FLIGHT, f"waiting for {names}")


def _stuck(team: Roster) -> Decision | None:
    """What keeps the pool from the size that was decided already."""
    for worker in team.stuck:
        if problem := stuck_by(worker):
            message = f"{worker.name} is not launched: {problem.message}"
            return Decision(Direction.NONE, Reason(problem.reason), message, before=len(team.able))
    return None


def _replace(pool: LabWorkerPool, team: Roster, kept: int, now: datetime) -> Decision | None:
    """New workers for failed ones, the size staying what it was; the failed ones go."""
    spec, before = pool.spec, len(team.able)
    if not team.failed:
        return None
    lost = min(_most(pool, kept), len(team.members)) - before
    hour_ago = now - timedelta(hours=1)
    lately = sum(d.replaced for d in pool.status.scaling_history if d.at > hour_ago)
    allowed = min(lost, spec.replace_failed.max_per_hour - lately)
    if allowed <= 0:
        message = f"workers have failed, and {spec.replace_failed.max_per_hour} were replaced within an hour"
        return Decision(Direction.NONE, Reason.REPLACEMENT_LIMIT, message, before=before)
    gone = team.failed[:allowed] if allowed < lost else team.failed
    names = tuple(w.name for w in gone)
    return Decision(
        Direction.REPLACE,
        Reason.WORKER_FAILED,
        f"{', '.join(names[:3])}: {_failure_of(gone[0])}",
        before=before,
        after=before + allowed,
        create=allowed,
        remove=names,
        replaced=allowed,
    )


def _failure_of(worker: LabWorker) -> str:
    failure = worker.status.failure
    return failure.reason if failure is not None else str(worker.status.phase)


# What the load says


@dataclass(frozen=True, slots=True)
class _Measure:
    """One kind of load, over all serving workers."""

    reason: Reason
    up: float
    down: float
    known: tuple[float, ...]
    newcomers: int
    """Workers that are ready since a moment ago and not measured yet: there is room on them."""
    unknown: int
    """Others that nothing is known of."""

    @property
    def average(self) -> float:
        return sum(self.known) / (len(self.known) + self.newcomers)

    def asks_for_more(self) -> bool:
        return self.average >= self.up

    def allows_one_less(self, left: int) -> bool:
        """Whether it is low, known of every worker, and would not ask for more on so many workers."""
        if self.newcomers or self.unknown or self.average >= self.down:
            return False
        total = sum(self.known)
        return total / left < self.up if left else total == 0 or self.reason is not Reason.LABS


def _measures(pool: LabWorkerPool, team: Roster, load: Load, now: datetime) -> list[_Measure]:
    """What the policy looks at, of that which anyone knows."""
    policy, limits = pool.spec.policy, pool.spec.thresholds
    new = [_within(w.status.timestamps.ready_at, MEASURED_AFTER, now) for w in team.serving]
    each = [load.of(w) for w in team.serving]

    def measure(reason: Reason, up: float, down: float, values: Sequence[float | None]) -> _Measure:
        missing = [fresh for fresh, value in zip(new, values, strict=True) if value is None]
        known = tuple(v for v in values if v is not None)
        return _Measure(reason, up, down, known, newcomers=sum(missing), unknown=len(missing) - sum(missing))

    found: list[_Measure] = []
    if policy in ("CapacityBased", "Hybrid"):
        found.append(measure(Reason.CPU, limits.cpu_up, limits.cpu_down, [w.cpu for w in each]))
        found.append(measure(Reason.MEMORY, limits.memory_up, limits.memory_down, [w.memory for w in each]))
    if policy in ("LabCountBased", "Hybrid"):
        found.append(measure(Reason.LABS, limits.labs_up, limits.labs_down, [w.labs for w in each]))
    return [m for m in found if m.known]


def _by_load(pool: LabWorkerPool, team: Roster, load: Load, kept: int, now: datetime) -> Decision | None:
    if not pool.spec.heeds_load:
        return None
    measures = _measures(pool, team, load, now)
    return _grow(pool, team, load, measures, now) or _shrink(pool, team, load, measures, kept, now)


def _grow(  # noqa: PLR0911 - each way out is a reason
    pool: LabWorkerPool, team: Roster, load: Load, measures: Sequence[_Measure], now: datetime
) -> Decision | None:
    wishes = [*_more_by_measures(measures), *_more_by_waiting(pool, team, load)]
    if not wishes:
        return None
    free = sum(load.of(w).free for w in team.serving)
    if team.asleep and free >= load.waiting:
        return None  # nobody waits for one that is woken, and idleness would stop it again
    if not team.asleep and (stuck := _stuck(team)):
        return stuck  # so would the next one be
    more, reason, message = max(wishes, key=lambda w: w[0])
    before = len(team.able)
    room = pool.spec.max_workers - len(team.members)
    if room <= 0 and not team.asleep:
        return Decision(Direction.NONE, Reason.AT_MAXIMUM, "load asks for more workers than maxWorkers", before=before)
    if _within(pool.status.last_scale_up_at, pool.spec.cooldowns.up_minutes, now):
        held = "load asks for more workers, soon after the last growth"
        return Decision(Direction.NONE, Reason.COOLDOWN, held, before=before)
    if not pool.spec.may_grow(now):
        return Decision(Direction.NONE, Reason.OUTSIDE_HOURS, "load asks for more workers", before=before)
    if team.asleep:  # sooner there than a new one, and no more expensive
        wake = tuple(w.name for w in team.asleep[:more])
        return Decision(Direction.WAKE, reason, message, before=before, after=before, wake=wake)
    create = min(more, room)
    return Decision(Direction.UP, reason, message, before=before, after=before + create, create=create)


def _more_by_measures(measures: Sequence[_Measure]) -> Iterable[tuple[int, Reason, str]]:
    for measure in measures:
        if measure.asks_for_more():
            many = len(measure.known) + measure.newcomers
            # Labs are placed where there is room, and so many workers hold them; a share of a machine may be a peak.
            more = math.floor(sum(measure.known) / measure.up) + 1 - many if measure.reason is Reason.LABS else 1
            message = f"{measure.average:.2f} on average of {many} workers, the limit is {measure.up:g}"
            yield more, measure.reason, message


def _more_by_waiting(pool: LabWorkerPool, team: Roster, load: Load) -> Iterable[tuple[int, Reason, str]]:
    free = sum(load.of(w).free for w in team.serving)
    slots = pool.spec.template.spec.max_concurrent_labs
    if load.waiting > free and slots > 0:
        more = math.ceil((load.waiting - free) / slots)
        yield more, Reason.WAITING_LABS, f"{load.waiting} labs want a place, and {free} are free"


def _shrink(  # noqa: PLR0911, PLR0917 - each way out is a reason to keep all
    pool: LabWorkerPool, team: Roster, load: Load, measures: Sequence[_Measure], kept: int, now: datetime
) -> Decision | None:
    before = len(team.able)
    if before <= kept or not measures:
        return None
    victim = next(iter(_expendable(team.able, load)), None)
    if victim is None:
        return None
    left = [w for w in team.serving if w.name != victim.name]
    if not all(m.allows_one_less(len(left)) for m in measures):
        return None
    coming = max(load.waiting, load.expected)
    if coming and coming + (load.of(victim).labs or 0) > sum(load.of(w).free for w in left):
        return None
    changes = (pool.status.last_scale_up_at, pool.status.last_scale_down_at)
    if any(_within(at, pool.spec.cooldowns.down_minutes, now) for at in changes):
        return None
    if not pool.spec.may_shrink(now):
        return None
    message = f"{before - 1} workers carry what there is, and nothing is on {victim.name}"
    return Decision(Direction.DOWN, Reason.IDLE, message, before=before, after=before - 1, remove=(victim.name,))


def _expendable(workers: Iterable[LabWorker], load: Load) -> list[LabWorker]:
    """Workers that may be taken away, the one that is missed least first."""

    def cost(worker: LabWorker) -> tuple[int, int, float, str]:
        known = load.of(worker)
        return _worth(worker), known.labs or 0, known.cpu or 0.0, worker.name

    return sorted((w for w in workers if is_removable(w, load.of(w))), key=cost)


def _worth(worker: LabWorker) -> int:
    """Kept from launching, failed, not launched yet, on its way, out of service, serving: so they are given up."""
    if stuck_by(worker):
        return 0
    if has_failed(worker):
        return 1
    if _starting(worker):
        ec2 = worker.status.ec2
        return 2 if ec2.instance_id is None and ec2.sent_at is None else 3
    return 5 if serving(worker) else 4


def _starting(worker: LabWorker) -> bool:
    return goal_of(worker) is Goal.READY and not serving(worker) and not has_failed(worker)


def _within(since: datetime | None, minutes: int, now: datetime) -> bool:
    return since is not None and now - since < timedelta(minutes=minutes)
