"""What every step in the life of a lab instance is made with: its runtime, its deadlines, and the one way to write.

Promises that a decision is written on exactly the state that it was made on, and that every deadline counts from a time
in the status. Steps are in `waiting`, `running` and `ends`; `controller` says which is whose turn.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime

from controllers.instances.kind import LabInstanceRequest, placed
from controllers.instances.notes import Mutate, tell
from controllers.instances.phases import WAITING, Conditions, Phase, Reasons
from controllers.instances.runtime import NotNow, Runtime
from controllers.instances.settings import InstanceSettings
from lrm.controller import Context, Result
from lrm.model import rfc3339

CRASH_POINTS = (
    "instances.prepared",
    "instances.reserved",
    "instances.placed",
    "instances.provisioned",
    "instances.running",
    "instances.ending",
    "instances.cleaned",
    "instances.ended",
)
"""Where the life of an instance can be killed, in order; what runtimes do outside has points of its own."""

LONGEST_WAIT = 600.0
"""Seconds between two looks at what waits for its time: a wall clock may be set meanwhile."""

TROUBLE_TOLD = 15.0
"""Seconds that something which has its place is held up before an event tells of it: a hiccup is none."""

RETRY_MOST = 300.0
"""Seconds between two tries of what did not work, at most."""

_BEFORE_ITS_END = WAITING | {Phase.PROVISIONING, Phase.RUNNING}

Next = LabInstanceRequest | Result
"""What a step comes to: the state to go on from, or when to look again."""


class Steps:
    """See the module."""

    def __init__(self, runtimes: Mapping[str, Runtime], settings: InstanceSettings) -> None:
        """`runtimes` by name of the runtime."""
        self.settings = settings
        self._runtimes = runtimes
        self._troubles: dict[str, set[tuple[datetime, str]]] = {}
        """By uid, of what has its place and is held up: since when, and for which reasons that was told. It is not
        stored: the next leader tells of the same trouble once more.
        """

    async def write(self, request: LabInstanceRequest, ctx: Context, mutate: Mutate) -> LabInstanceRequest:
        """Exactly on the state that was decided on: somebody may have extended or stopped it meanwhile."""
        before, ended = request.status.phase, request.status.ends_at
        # What another version has left in `ends_at` may be of an earlier life: alone it tells no extension.
        changed = request.status.observed_generation != request.metadata.generation

        def note(r: LabInstanceRequest) -> None:
            r.status.held_up_since = None  # whatever else there is to write: it went on
            mutate(r)
            r.status.observed_generation = r.metadata.generation
            r.status.ends_at = r.ends_at

        stored = await ctx.client.update_status(request, note, retry=False)
        if stored.status.held_up_since is None:
            self._troubles.pop(request.uid, None)
        if stored.status.phase != before:
            ctx.log.info("instance.phase", source=before, to=stored.status.phase)
        ends = stored.status.ends_at
        may_tell = changed and stored.status.phase in _BEFORE_ITS_END
        if may_tell and ended is not None and ends is not None and ends > ended:
            ctx.events.record(stored, "Normal", "Extended", f"it runs until {rfc3339(ends)}")
        return stored

    def runtime(self, request: LabInstanceRequest) -> Runtime:
        """Where it is made, or was. Raises `NotNow` where there is none."""
        ref = request.status.worker_ref
        # Of what failed the template may be another by now; what is outside is where it was put.
        name = request.spec.runs_in if ref is None else "Container" if ref.kind == "Engine" else "CML"
        runtime = self._runtimes.get(name)
        if runtime is None:
            raise NotNow(Reasons.ENGINE_UNAVAILABLE, "no engine is configured: set LRM_DOCKER_HOST", again=60.0)
        return runtime

    def time_is_over(self, request: LabInstanceRequest, ctx: Context) -> bool:
        """Whether it has run for as long as it may, by a clock that can be believed."""
        ends = self.ends_at(request, ctx)
        return ends is not None and ctx.clock.now() >= ends and not ctx.wall_jumped

    def ends_at(self, request: LabInstanceRequest, ctx: Context) -> datetime | None:
        """When its time is over; None before it ran, and for whoever only observes: that ends nothing."""
        return None if ctx.observe_only else request.ends_at

    def again(self, seconds: float, ctx: Context) -> Result:
        """Look again after so long; whoever only observes does nothing on time, and is in no hurry."""
        return Result.after(max(seconds, self.settings.instances_rest_interval) if ctx.observe_only else seconds)

    def left(self, request: LabInstanceRequest, ctx: Context) -> float:
        """Seconds until the deadline of the phase that it is in, by a time in its status."""
        now, status, ends = ctx.clock.now(), request.status, self.ends_at(request, ctx)
        if status.phase == Phase.RUNNING:
            return LONGEST_WAIT if ends is None else (ends - now).total_seconds()
        if status.phase == Phase.PROVISIONING:
            return _left(now, status.provisioning_started_at, self.settings.instances_provisioning_timeout)
        if placed(request):
            return _left(now, status.ending_started_at, self.settings.instances_stopping_timeout)
        return LONGEST_WAIT

    async def held_up(self, request: LabInstanceRequest, ctx: Context, error: NotNow) -> Result:
        """Say for what it waits; the phase and its deadline stay."""
        has_place, why = placed(request), (error.reason, str(error)[:1000])
        before, now = request.status.condition(Conditions.READY), ctx.clock.now()
        since = request.status.held_up_since or now

        def note(r: LabInstanceRequest) -> None:
            r.status.held_up_since = since
            tell(r, ctx, Conditions.READY, None if has_place else False, why)
            if not has_place:
                tell(r, ctx, Conditions.WORKER_ASSIGNED, False, why)

        after, held = await self.write(request, ctx, note), (now - since).total_seconds()
        if has_place:
            untold = self._tell_trouble(after, ctx, held, why)
            return self.again(max(min(error.again, untold, self.left(after, ctx)), 1.0), ctx)
        if before is None or (before.reason, before.message) != why:
            ctx.events.record(after, "Normal" if error.reason == Reasons.PREPARING else "Warning", *why)
        # What has no place has no deadline but its end: it is tried less and less often, by how long it has waited.
        again, ends = max(error.again, held), self.ends_at(request, ctx)
        left = RETRY_MOST if ends is None else (ends - now).total_seconds()
        return self.again(max(min(again, left, RETRY_MOST), 1.0), ctx)

    def _tell_trouble(self, request: LabInstanceRequest, ctx: Context, held: float, why: tuple[str, str]) -> float:
        """One event for each trouble that lasts, and each reason for it; seconds until it would be told."""
        if held < TROUBLE_TOLD:
            return TROUBLE_TOLD - held
        told = self._troubles.setdefault(request.uid, set())
        trouble = (request.status.held_up_since or ctx.clock.now(), why[0])
        if why[0] == Reasons.PREPARING or trouble in told:
            return LONGEST_WAIT
        told.add(trouble)
        ctx.events.record(request, "Warning", *why)
        return LONGEST_WAIT


def _left(now: datetime, since: datetime | None, seconds: float) -> float:
    """Seconds until a deadline that counts from a time in the status."""
    return seconds - (now - since).total_seconds() if since is not None else seconds
