"""Idle workers: when nobody uses one it is stopped, and a person starts it again.

What people did is told by CML's telemetry, and a lab that runs or a lab instance that is placed counts too. The pause
is a word in the status (`status.idle.pausedAt`), which `goal_of` takes for the wish to be stopped; the way down is that
of every other stop. Nothing is concluded from silence: no answer, an empty history, labs that could not be listed and
a wall clock that was set all leave the worker up. How long nobody did anything is measured by lrm's own clock: CML's
stamps only tell that something is new.

The functions are pure; `IdleDetector` is their place in the workers' controller.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import UTC, datetime

from controllers.cml.errors import CmlError
from controllers.cml.models import TelemetryEvent
from controllers.workers.cml_side import CmlSide, trouble_of
from controllers.workers.decisions import Goal, goal_of, is_paused, over, problem
from controllers.workers.kind import SNOOZE_ANNOTATION, WAKE_ANNOTATION, LabWorker, snooze_annotation
from controllers.workers.phases import SERVING, Phase, Reasons
from controllers.workers.settings import WorkerSettings
from controllers.workers.spec import IdleDetection
from controllers.workers.status import IdleStatus
from controllers.workers.work import Work, enter

FOREVER = datetime.max.replace(tzinfo=UTC)
_OWN_DOING = "user_activity"
"""The category in which lrm's own logins would show, if CML tells who was active."""


@dataclass(frozen=True, slots=True)
class Activity:
    """What CML's telemetry tells of people: how many of their events it has, and the latest, by CML's clock."""

    user_events: int = 0
    latest_at: datetime | None = None

    def is_news_to(self, idle: IdleStatus) -> bool:
        """Whether something was done since `idle` was written. An event without a readable time counts as one more."""
        if self.user_events > idle.user_events:
            return True
        return self.latest_at is not None and (idle.latest_event_at is None or self.latest_at > idle.latest_event_at)


def activity_of(events: Iterable[TelemetryEvent], rule: IdleDetection, own_account: str) -> Activity | None:
    """What people did, by a rule; None when CML told nothing of anything, for then it may not be keeping telemetry.

    What lrm's own account did counts, but for its mere presence: it looks in all the time.
    """
    known = False
    stamps: list[datetime | None] = []
    for event in events:
        known = True
        own = event.category == _OWN_DOING and own_account in (event.data.get("username"), event.data.get("user"))
        if event.category in rule.categories and not own:
            stamps.append(event.timestamp)
    if not known:
        return None
    return Activity(len(stamps), max((s for s in stamps if s is not None), default=None))


def snoozed_until(worker: LabWorker) -> datetime | None:
    """Until when idleness must not stop the worker: the later of what spec and annotation say.

    An annotation that cannot be read holds for ever: somebody wanted the worker to stay.
    """
    try:
        asked = snooze_annotation(worker)
    except ValueError:
        return FOREVER
    return max((t for t in (asked, worker.spec.idle_detection.snooze_until) if t is not None), default=None)


def noted(idle: IdleStatus | None, seen: Activity, now: datetime) -> IdleStatus:
    """The record after a look; one that brings nothing new is as it was. The first look counts as activity."""
    new = IdleStatus() if idle is None else idle.thaw()
    if idle is None or idle.last_activity_at is None or seen.is_news_to(idle):
        new.last_activity_at = now
    new.user_events, new.latest_event_at, new.last_error = seen.user_events, seen.latest_at, None
    return new


def quiet_since(worker: LabWorker) -> datetime | None:
    """Since when nobody is known to have used the worker; None when that is not known.

    The last change of phase counts: it was started then, or its last lab stopped.
    """
    idle, steps = worker.status.idle, worker.status.phase_history
    if idle is None or idle.last_activity_at is None or not steps:
        return None
    return max(idle.last_activity_at, steps[-1].at)


def is_kept_up(worker: LabWorker, now: datetime, *, runs_labs: bool) -> bool:
    """Whether the worker stays up whatever CML's telemetry says; `now` is the time by which deadlines are judged."""
    rule, status = worker.spec.idle_detection, worker.status
    if not rule.enabled or status.phase not in SERVING or goal_of(worker) is not Goal.READY or status.allocations:
        return True
    if rule.rule == "NoRunningLabs" and runs_labs:
        return True
    until = snoozed_until(worker)
    return until is not None and now < until


def is_idle(worker: LabWorker, now: datetime, *, runs_labs: bool) -> bool:
    """Whether the worker is to be stopped, if CML was asked just now what people did.

    Where labs count they must have been listed since anybody did anything: what could not be listed may run.
    """
    rule, listed_at, since = worker.spec.idle_detection, worker.status.labs_synced_at, quiet_since(worker)
    if since is None or is_kept_up(worker, now, runs_labs=runs_labs):
        return False
    if rule.rule == "NoRunningLabs" and (listed_at is None or listed_at < since or worker.status.labs_sync_error):
        return False
    return over(since, rule.timeout_minutes * 60, now)


def stops_only_empty(worker: LabWorker) -> bool:
    """Whether a worker drains for nothing but a pause that a running lab disproves: then no drain's time is over."""
    paused = goal_of(worker) is Goal.STOPPED and worker.spec.desired_phase == "Ready"
    return paused and worker.spec.idle_detection.rule == "NoRunningLabs"


def is_lifted(worker: LabWorker, now: datetime, *, runs_labs: bool = False) -> bool:
    """Whether a pause has ended: by a person's word, by use, or because the spec wishes something else by itself.

    `runs_labs`: a lab is known to run now, which is use where labs count.
    """
    idle = worker.status.idle
    if idle is None or idle.paused_at is None:
        return False
    if not is_paused(worker) or worker.spec.desired_phase != "Ready":
        return True
    if runs_labs and worker.spec.idle_detection.rule == "NoRunningLabs":
        return True
    if idle.last_activity_at is not None and idle.last_activity_at > idle.paused_at:
        return True
    until = snoozed_until(worker)
    return until is not None and now < until


class IdleDetector:
    """Looks at CML's telemetry now and then, pauses workers and lets them go again."""

    def __init__(self, cml: CmlSide, settings: WorkerSettings) -> None:
        self._cml = cml
        self._interval = settings.worker_idle_interval
        self._asked: dict[str, float] = {}
        """When CML was last asked, monotonic, by worker uid; a new leader asks once more."""

    async def lift(self, work: Work, runs_labs: Callable[[], bool] = lambda: False) -> None:
        """End a pause that is lifted, and forget everything where the detection is switched off."""
        # By a clock that was just set no snooze is believed to last.
        now = FOREVER if work.ctx.wall_jumped else work.now

        def change(worker: LabWorker) -> None:
            if not worker.spec.idle_detection.enabled:
                worker.status.idle = None
            elif worker.status.idle is not None and is_lifted(worker, now, runs_labs=runs_labs()):
                worker.status.idle.paused_at = worker.status.idle.wake = None

        before = work.worker.status.idle
        if before is None:
            return
        await work.write(change)
        after = work.worker.status.idle
        if before.paused_at is not None and (after is None or after.paused_at is None):
            work.log.info("worker.idle_pause_lifted")

    async def pause_if_idle(self, work: Work, runs_labs: Callable[[], bool]) -> bool:
        """Ask CML, if it is time to, and pause the worker if nobody uses it; whether it was paused."""
        if work.worker.spec.idle_detection.enabled and (unread := _unreadable_snooze(work.worker)):
            await self._note_trouble(work, Reasons.INVALID_SETTING, unread)
            return False
        if work.observe_only or is_kept_up(work.worker, work.due_by, runs_labs=runs_labs()):
            return False
        if not await self._look(work):
            return False
        now, due_by = work.now, work.due_by

        def pause(worker: LabWorker) -> None:
            # Judged on what the store then holds: an instance that was placed meanwhile keeps the worker up.
            if worker.status.idle is None or not is_idle(worker, due_by, runs_labs=runs_labs()):
                return
            worker.status.idle.paused_at = now
            worker.status.idle.wake = worker.metadata.annotations.get(WAKE_ANNOTATION)
            enter(worker, Phase.DRAINING, Reasons.IDLE, now)

        await work.write(pause)
        return is_paused(work.worker)

    async def reconsider(self, work: Work, runs_labs: Callable[[], bool]) -> None:
        """While a paused worker drains: a lab that runs ends the pause where labs count, and whoever uses it again."""
        if is_paused(work.worker):
            await self.lift(work, runs_labs)
        if is_paused(work.worker) and await self._look(work):
            await self.lift(work, runs_labs)

    async def _look(self, work: Work) -> bool:
        """Ask CML what people did and note it; whether it answered just now. The same again costs no write."""
        minutes = work.worker.spec.idle_detection.timeout_minutes
        interval, now = min(self._interval, minutes * 60 / 4), work.ctx.clock.monotonic()
        asked = self._asked.get(work.worker.uid)
        if asked is not None and now - asked < interval:
            return False
        # What is older than the interval says nothing, whoever's it is.
        self._asked = {uid: at for uid, at in self._asked.items() if now - at < self._interval}
        self._asked[work.worker.uid] = now
        rule, account = work.worker.spec.idle_detection, work.worker.spec.cml.username
        work.ctx.check_leading()
        try:
            seen = activity_of(await self._cml.sessions.client_for(work.worker).telemetry_events(), rule, account)
        except CmlError as error:
            if trouble := trouble_of(error):
                await self._note_trouble(work, *trouble)
            return False
        if seen is None:
            await self._note_trouble(work, Reasons.NO_TELEMETRY, "CML told of no event at all: its use is not known")
            return False
        at, told = work.now, seen

        def note(worker: LabWorker) -> None:
            worker.status.idle = noted(worker.status.idle, told, at)

        await work.write(note)
        return True

    async def _note_trouble(self, work: Work, reason: str, message: str) -> None:
        now = work.now

        def note(worker: LabWorker) -> None:
            idle = worker.status.idle or IdleStatus()
            idle.last_error = problem(idle.last_error, reason, message, now)
            worker.status.idle = idle

        await work.write(note)


def _unreadable_snooze(worker: LabWorker) -> str:
    try:
        snooze_annotation(worker)
    except ValueError:
        return f"the annotation {SNOOZE_ANNOTATION} is no time: write 2026-01-31T09:00:00Z; until then it is kept up"
    return ""
