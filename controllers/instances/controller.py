"""The life of a lab instance: waits, takes a place, is made, runs for its time, is cleaned up.

Promises: a phase is written before what it stands for is done, so that whoever comes next goes on where this leader
died; nothing is given back that may still be used; every deadline is counted from a time in the status. What a runtime
does outside is its own module's; who gets which place is the scheduler's. A request whose lab may exist somewhere has
`status.workerRef`, whatever its phase, and keeps it until its runtime has proved that nothing is left.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from datetime import timedelta
from typing import Any

from controllers.instances.kind import (
    INSTANCE_FINALIZER,
    INSTANCES,
    Failure,
    LabInstanceRequest,
    WorkerRef,
    over,
    placed,
)
from controllers.instances.notes import completing, ending, entering, note_exit, sighted, tell, time_over, timing_out
from controllers.instances.phases import Conditions, Phase, Reasons
from controllers.instances.runtime import (
    InstanceError,
    LabFailed,
    NotNow,
    Refused,
    Runtime,
    Sighting,
    State,
    WorkerLost,
)
from controllers.instances.scheduling import NoRoom, Placer, Waits
from controllers.instances.settings import InstanceSettings
from controllers.labs.kind import LabRecord
from controllers.workers.kind import LabWorker
from lrm.cache import Cache, Change
from lrm.controller import Context, Controller, Hints, Key, Result, Trigger
from lrm.crashpoints import crash_point
from lrm.model import rfc3339
from lrm.resource import RETRY_ANNOTATION

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

_STEPS_MOST = 12
"""Steps of one reconcile: a life has eight."""
_RETRY_MOST = 300.0
_LONGEST_WAIT = 600.0
"""Seconds between two looks at what waits for its time: a wall clock may be set meanwhile."""

_Next = LabInstanceRequest | Result
Mutate = Callable[[LabInstanceRequest], None]


class InstancesController(Controller[LabInstanceRequest]):
    """See the module."""

    name = INSTANCES
    lock_name = INSTANCES
    model = LabInstanceRequest
    finalizer = INSTANCE_FINALIZER
    workers = 32
    resync = 600.0

    def __init__(
        self,
        cache: Cache,
        placer: Placer,
        runtimes: Mapping[str, Runtime],
        settings: InstanceSettings,
        *,
        hints: Hints | None = None,
    ) -> None:
        """`runtimes` by name of the runtime; `hints` are what they tell of changes outside."""
        self.hints = hints
        self._cache = cache
        self._placer = placer
        self._runtimes = runtimes
        self._settings = settings

    # What wakes it

    def triggers(self) -> Sequence[Trigger]:
        """Its worker, its lab's record, and whatever may give room to those that wait."""
        return (
            Trigger(LabWorker, self._by_worker),
            Trigger(LabRecord, self._by_record),
            Trigger(LabInstanceRequest, self._placer.wakes),
        )

    def settled(self, request: LabInstanceRequest) -> bool:
        """Over, and nothing is left of it."""
        return over(request) and not placed(request) and not self._begins_again(request)

    def _by_worker(self, change: Change) -> Iterable[Key]:
        old, new = (item.resource if item else None for item in (change.old, change.new))
        if not _same_place(old, new):
            for request in self._cache.by_index(
                LabInstanceRequest, "worker", f"{change.item.namespace}/{change.item.name}"
            ):
                yield _key(request)
        yield from self._placer.wakes(change)

    def _by_record(self, change: Change) -> Iterable[Key]:
        record = change.new.resource if change.new else change.old.resource if change.old else None
        if isinstance(record, LabRecord) and record.status.title.startswith("lrm-"):
            for request in self._cache.by_index(LabInstanceRequest, "uid", record.status.title.removeprefix("lrm-")):
                yield _key(request)
        yield from self._placer.wakes(change)

    # The life

    async def reconcile(self, request: LabInstanceRequest, ctx: Context) -> Result:
        """Go on until there is something to wait for."""
        for _ in range(_STEPS_MOST):
            following = await self._step(request, ctx)
            if isinstance(following, Result):
                return following
            request = following
        return Result.after(0)

    async def finalize(self, request: LabInstanceRequest, ctx: Context) -> Result:
        """Clean up, release, let go."""
        for _ in range(_STEPS_MOST):
            if not placed(request):
                await self._placer.release(request, ctx)
                return Result.done()
            if request.status.phase in (Phase.PROVISIONING, Phase.RUNNING):
                request = await self._end(request, ctx, Phase.STOPPING, Reasons.DELETING, "it is being deleted")
                continue
            following = await self._clean_in_time(request, ctx)
            if isinstance(following, Result):
                return following
            request = following
        return Result.after(0)

    async def _step(self, request: LabInstanceRequest, ctx: Context) -> _Next:
        steps: dict[Phase | str, Callable[[LabInstanceRequest, Context], Awaitable[_Next]]] = {
            Phase.PENDING: self._pending,
            Phase.SCHEDULING: self._scheduling,
            Phase.PROVISIONING: self._provisioning,
            Phase.RUNNING: self._running,
            Phase.STOPPING: self._ending,
            Phase.TIMEOUT: self._ending,
            Phase.FAILED: self._failed,
            Phase.COMPLETED: self._completed,
        }
        step = steps.get(request.phase)
        if step is None:
            ctx.log.warning("instance.unknown_phase", phase=request.status.phase)
            return Result.done()
        try:
            return await step(request, ctx)
        except NotNow as error:
            return await self._held_up(request, ctx, error)
        except Refused as error:
            return await self._fail(request, ctx, error)
        except (WorkerLost, LabFailed) as error:
            return await self._again_or_fail(request, ctx, error)

    async def _pending(self, request: LabInstanceRequest, ctx: Context) -> _Next:
        """Wait for its time, its quota and a place; what it left elsewhere is cleaned up first."""
        if request.status.need is not None and request.status.observed_generation != request.metadata.generation:
            return await self._write(request, ctx, lambda r: setattr(r.status, "need", None))
        if request.spec.desired_phase == "Stopped":
            return await self._end(request, ctx, Phase.STOPPING, Reasons.STOP_REQUESTED, "it is not wanted any more")
        if self._time_is_over(request, ctx):
            return await self._time_out(request, ctx, Phase.STOPPING)
        if placed(request):
            return await self._clean_in_time(request, ctx)
        if request.status.need is None:
            request = await self._prepare(request, ctx)
        waits = self._not_yet(request, ctx) or await self._placer.choose(request, ctx)
        if isinstance(waits, Waits):
            return await self._wait(request, ctx, waits)
        return await self._write(request, ctx, entering(Phase.SCHEDULING, Reasons.SCHEDULED, ctx))

    async def _scheduling(self, request: LabInstanceRequest, ctx: Context) -> _Next:
        """Reserve a place, then write down which."""
        if request.spec.desired_phase == "Stopped" or request.status.need is None or ctx.observe_only:
            return await self._unschedule(request, ctx, Waits(Reasons.NOT_RUNNING, "it is not to be placed now"))
        chosen = await self._placer.choose(request, ctx)
        if isinstance(chosen, Waits):
            return await self._unschedule(request, ctx, chosen)
        try:
            await self._placer.reserve(chosen, request, ctx)
        except NoRoom as error:
            return await self._unschedule(request, ctx, Waits(Reasons.NO_CAPACITY_AVAILABLE, str(error)))
        crash_point("instances.reserved")
        placed_now = await self._take(request, ctx, chosen)
        crash_point("instances.placed")
        return placed_now

    async def _take(self, request: LabInstanceRequest, ctx: Context, place: WorkerRef) -> LabInstanceRequest:
        now, told = ctx.clock.now(), f"on {place.name}"

        def take(r: LabInstanceRequest) -> None:
            entering(Phase.PROVISIONING, Reasons.PROVISIONING, ctx)(r)
            status = r.status
            status.worker_ref = place
            status.attempt += 1
            status.provisioning_started_at = now
            status.retry_at = status.ending_started_at = None
            status.container_id = status.cml_lab_id = status.access_url = None
            status.ports = []
            status.exit_code = status.oom_killed = None
            tell(r, ctx, Conditions.WORKER_ASSIGNED, True, (Reasons.SCHEDULED, told))
            tell(r, ctx, Conditions.RESOURCES_ALLOCATED, True, (Reasons.SCHEDULED, told))
            tell(r, ctx, Conditions.READY, False, (Reasons.PROVISIONING, "it is being made"))
            status.conditions = [c for c in status.conditions if c.type != Conditions.CLEANUP_COMPLETED]

        return await self._write(request, ctx, take)

    async def _provisioning(self, request: LabInstanceRequest, ctx: Context) -> _Next:
        """One step further, within the deadline."""
        now = ctx.clock.now()
        if request.spec.desired_phase == "Stopped":
            return await self._end(request, ctx, Phase.STOPPING, Reasons.STOP_REQUESTED, "it is not wanted any more")
        if ctx.observe_only:
            return Result.after(self._settings.instances_rest_interval)
        left = self._left(request, ctx)
        if left <= 0 and not ctx.wall_jumped:
            return await self._not_in_time(request, ctx)
        seen = await self._runtime(request).provision(request, ctx)
        crash_point("instances.provisioned")
        if seen.state is State.STARTING:
            await self._write(request, ctx, sighted(seen, ctx, ready=False, reason=Reasons.PROVISIONING))
            return Result.after(min(_again(seen), max(left, 1.0)))
        if seen.state is State.ENDED:
            return await self._exited(request, ctx, seen)

        def run(r: LabInstanceRequest) -> None:
            entering(Phase.RUNNING, Reasons.RUNNING, ctx)(r)
            r.status.started_at = r.status.started_at or now
            r.status.error_message = None
            sighted(seen, ctx, ready=seen.state is State.RUNNING, reason=Reasons.RUNNING)(r)

        running = await self._write(request, ctx, run)
        ctx.events.record(running, "Normal", Reasons.RUNNING, seen.access_url or "it runs")
        crash_point("instances.running")
        return running

    async def _running(self, request: LabInstanceRequest, ctx: Context) -> _Next:
        """Until its time is over, it is asked to stop, or it ends by itself."""
        if request.spec.desired_phase == "Stopped":
            return await self._end(request, ctx, Phase.STOPPING, Reasons.STOP_REQUESTED, "it is not wanted any more")
        if self._time_is_over(request, ctx):
            return await self._time_out(request, ctx, Phase.TIMEOUT)
        left = max(self._left(request, ctx), 1.0)
        try:
            async with ctx.clock.timeout(left):
                seen = await self._runtime(request).look(request, ctx)
        except TimeoutError:
            return request  # its time is over, or nearly
        if seen.state is State.ENDED:
            return await self._exited(request, ctx, seen)
        well = seen.state is State.RUNNING
        reason = (
            Reasons.RUNNING if well else Reasons.UNHEALTHY if seen.state is State.UNHEALTHY else Reasons.NOT_RUNNING
        )
        after = await self._write(request, ctx, sighted(seen, ctx, ready=well, reason=reason))
        if request.status.observed_generation != request.metadata.generation and request.ends_at is not None:
            ctx.events.record(after, "Normal", "Extended", f"it runs until {rfc3339(request.ends_at)}")
        return Result.after(min(_again(seen), left, _LONGEST_WAIT))

    async def _ending(self, request: LabInstanceRequest, ctx: Context) -> _Next:
        """Clean up; within the deadline it is Completed, after it Failed, and cleaning up goes on."""
        if placed(request):
            return await self._clean_in_time(request, ctx)
        return await self._write(request, ctx, completing(ctx))

    async def _failed(self, request: LabInstanceRequest, ctx: Context) -> _Next:
        """Clean up; then begin anew if a person has changed what failed."""
        if placed(request):
            return await self._clean(request, ctx)
        await self._placer.release(request, ctx)
        if not self._begins_again(request):
            return Result.done()

        def anew(r: LabInstanceRequest) -> None:
            changed = r.status.failure is None or r.status.failure.generation != r.metadata.generation
            entering(Phase.PENDING, Reasons.SPEC_CHANGED if changed else Reasons.RETRY, ctx)(r)
            status = r.status
            status.need = status.failure = status.error_message = status.template_digest = None
            status.started_at = status.completed_at = status.ending_started_at = status.retry_at = None
            status.retry_count = 0
            status.conditions = [c for c in status.conditions if c.type != Conditions.TIMED_OUT]

        return await self._write(request, ctx, anew)

    async def _completed(self, request: LabInstanceRequest, ctx: Context) -> _Next:
        if placed(request):
            return await self._clean(request, ctx)
        await self._placer.release(request, ctx)
        return Result.done()

    # Parts of it

    async def _prepare(self, request: LabInstanceRequest, ctx: Context) -> LabInstanceRequest:
        prepared = await self._runtime(request).prepare(request, ctx)
        now = ctx.clock.now()

        def note(r: LabInstanceRequest) -> None:
            r.status.need = prepared.need
            r.status.template_digest = prepared.digest
            r.status.prepared_at = now

        prepared_request = await self._write(request, ctx, note)
        crash_point("instances.prepared")
        return prepared_request

    async def _clean_in_time(self, request: LabInstanceRequest, ctx: Context) -> _Next:
        """The same, until its deadline: then it is Failed, so that somebody looks."""
        final = request.status.phase in (Phase.FAILED, Phase.COMPLETED)
        if final or self._left(request, ctx) > 0 or ctx.wall_jumped or ctx.observe_only:
            return await self._clean(request, ctx)
        cleanup = request.status.condition(Conditions.CLEANUP_COMPLETED)
        message = f"not cleaned up within {self._settings.instances_stopping_timeout:.0f} s: "
        error = Refused(Reasons.STOPPING_TIMEOUT, message + (cleanup.message if cleanup else ""))
        return await self._fail(request, ctx, error)

    async def _clean(self, request: LabInstanceRequest, ctx: Context) -> _Next:
        """One step; once nothing is left the place is given back, and what was ending has ended."""
        if ctx.observe_only:
            return Result.after(self._settings.instances_rest_interval)
        try:
            done = await self._runtime(request).clean(request, ctx)
        except WorkerLost:
            done = True  # and all that was there with it
        except NotNow as error:
            return await self._not_clean(request, ctx, str(error), error.again)
        except InstanceError as error:
            return await self._not_clean(request, ctx, str(error), self._settings.instances_rest_interval)
        if not done:
            return await self._not_clean(request, ctx, "", self._settings.instances_step_interval)
        crash_point("instances.cleaned")
        ending = request.status.phase in (Phase.STOPPING, Phase.TIMEOUT)

        def cleaned(r: LabInstanceRequest) -> None:
            r.status.worker_ref = None
            r.status.access_url = None
            r.status.ports = []
            tell(r, ctx, Conditions.CLEANUP_COMPLETED, True, (Reasons.CLEANED_UP, "nothing of it is left outside"))
            tell(r, ctx, Conditions.WORKER_ASSIGNED, False, (Reasons.CLEANED_UP, "its place was given back"))
            tell(r, ctx, Conditions.RESOURCES_ALLOCATED, False, (Reasons.CLEANED_UP, "its place was given back"))
            if ending:
                completing(ctx)(r)

        after = await self._write(request, ctx, cleaned)
        if ending:
            ctx.events.record(after, "Normal", "Completed", "nothing of it is left outside")
        crash_point("instances.ended")
        await self._placer.release(request, ctx)
        return after

    async def _not_clean(self, request: LabInstanceRequest, ctx: Context, why: str, again: float) -> Result:
        def note(r: LabInstanceRequest) -> None:
            reason = Reasons.CLEANUP_FAILED if why else Reasons.CLEANING_UP
            tell(r, ctx, Conditions.CLEANUP_COMPLETED, False, (reason, why or "its lab is being removed"))

        after = await self._write(request, ctx, note)
        return Result.after(min(again, max(self._left(after, ctx), 1.0)))

    async def _exited(self, request: LabInstanceRequest, ctx: Context, seen: Sighting) -> LabInstanceRequest:
        def note(r: LabInstanceRequest) -> None:
            r.status.exit_code, r.status.oom_killed = seen.exit_code, seen.oom_killed

        request = await self._write(request, ctx, note)
        return await self._end(request, ctx, Phase.STOPPING, Reasons.EXITED, seen.message or "it ended by itself")

    async def _time_out(self, request: LabInstanceRequest, ctx: Context, phase: Phase) -> LabInstanceRequest:
        ended = await self._write(request, ctx, timing_out(request, phase, ctx))
        ctx.events.record(ended, "Normal", Reasons.DURATION_ELAPSED, time_over(ended))
        crash_point("instances.ending")
        return ended

    async def _end(
        self, request: LabInstanceRequest, ctx: Context, phase: Phase, reason: str, message: str
    ) -> LabInstanceRequest:
        ended = await self._write(request, ctx, ending(phase, ctx, (reason, message)))
        ctx.events.record(ended, "Normal", reason, message)
        crash_point("instances.ending")
        return ended

    async def _not_in_time(self, request: LabInstanceRequest, ctx: Context) -> LabInstanceRequest:
        """Its deadline for Running has passed: where its worker does not even answer, another one may do better."""
        ready, ref = request.status.condition(Conditions.READY), request.status.worker_ref
        told = ready.message if ready else ""
        message = f"not Running within {self._settings.instances_provisioning_timeout:.0f} s: {told}"
        away = ready is not None and (ready.status, ready.reason) == ("Unknown", Reasons.WORKER_AWAY)
        if away and ref is not None and ref.kind == "LabWorker":
            return await self._again_or_fail(request, ctx, WorkerLost(Reasons.WORKER_AWAY, message), abandon=True)
        return await self._fail(request, ctx, Refused(Reasons.PROVISIONING_TIMEOUT, message))

    async def _fail(self, request: LabInstanceRequest, ctx: Context, error: InstanceError) -> LabInstanceRequest:
        """Failed, with what a person must change; what is outside is cleaned up from there."""
        now, why = ctx.clock.now(), str(error)[:1000]

        def fail(r: LabInstanceRequest) -> None:
            note_exit(r, error)
            status = r.status
            status.failure = Failure(
                reason=error.reason,
                message=why,
                at=now,
                phase=status.phase,
                generation=r.metadata.generation,
                retry=r.metadata.annotations.get(RETRY_ANNOTATION),
            )
            entering(Phase.FAILED, error.reason, ctx)(r)
            status.error_message, status.completed_at, status.retry_at = why, now, None
            tell(r, ctx, Conditions.READY, False, (error.reason, why))
            if not placed(r):
                tell(r, ctx, Conditions.CLEANUP_COMPLETED, True, (Reasons.CLEANED_UP, "nothing of it is left outside"))
                if status.condition(Conditions.WORKER_ASSIGNED) is not None:
                    tell(r, ctx, Conditions.WORKER_ASSIGNED, False, (error.reason, why))

        failed = await self._write(request, ctx, fail)
        ctx.events.record(failed, "Warning", error.reason, why)
        return failed

    async def _again_or_fail(
        self, request: LabInstanceRequest, ctx: Context, error: WorkerLost | LabFailed, *, abandon: bool = False
    ) -> LabInstanceRequest:
        """Begin again after a delay, where that is wanted and can help.

        `abandon` gives its place up unseen: what may be left there is a stray, and collected when its worker is back.
        """
        spec, status, settings = request.spec, request.status, self._settings
        lost_early = isinstance(error, WorkerLost) and status.started_at is None
        wanted = lost_early or spec.restart_policy == "OnFailure"
        if not wanted or status.retry_count >= settings.instances_retries or spec.desired_phase == "Stopped":
            return await self._fail(request, ctx, error)
        delay = min(settings.instances_retry_delay * 2**status.retry_count, _RETRY_MOST)
        now, why = ctx.clock.now(), str(error)[:1000]

        def again(r: LabInstanceRequest) -> None:
            note_exit(r, error)
            entering(Phase.PENDING, error.reason, ctx)(r)
            r.status.retry_count += 1
            r.status.retry_at, r.status.error_message = now + timedelta(seconds=delay), why
            r.status.ending_started_at = now
            if abandon:
                r.status.worker_ref = None
                tell(r, ctx, Conditions.RESOURCES_ALLOCATED, False, (error.reason, why))
            tell(r, ctx, Conditions.READY, False, (error.reason, why))

        waiting = await self._write(request, ctx, again)
        if abandon:
            await self._placer.release(waiting, ctx)
        ctx.events.record(waiting, "Warning", error.reason, f"{why}; it begins again in {delay:.0f} s")
        return waiting

    async def _held_up(self, request: LabInstanceRequest, ctx: Context, error: NotNow) -> Result:
        """Say for what it waits; the phase and its deadline stay."""
        kind = Conditions.READY if placed(request) else Conditions.WORKER_ASSIGNED

        def note(r: LabInstanceRequest) -> None:
            tell(r, ctx, kind, None if placed(r) else False, (error.reason, str(error)[:1000]))

        after = await self._write(request, ctx, note)
        return Result.after(min(error.again, max(self._left(after, ctx), 1.0)))

    def _not_yet(self, request: LabInstanceRequest, ctx: Context) -> Waits | None:
        """Why it is not to have a place now, whatever is free."""
        now, status = ctx.clock.now(), request.status
        if status.retry_at is not None and now < status.retry_at:
            return Waits(Reasons.BACKING_OFF, status.error_message or "", status.retry_at)
        due = request.due_at(self._settings.instances_early_start)
        if due is not None and now < due:
            return Waits(Reasons.NOT_YET_DUE, "its time has not come", due)
        if ctx.observe_only:
            return Waits(Reasons.OBSERVE_ONLY, "nothing outside may be changed")
        return None

    async def _wait(self, request: LabInstanceRequest, ctx: Context, waits: Waits) -> Result:
        """Stay Pending, and say why; room that becomes free wakes it."""
        before = request.status.condition(Conditions.WORKER_ASSIGNED)

        def note(r: LabInstanceRequest) -> None:
            tell(r, ctx, Conditions.WORKER_ASSIGNED, False, (waits.reason, waits.message))
            tell(r, ctx, Conditions.READY, False, (waits.reason, waits.message))

        waiting = await self._write(request, ctx, note)
        if before is None or before.reason != waits.reason:
            calm = waits.reason in (Reasons.NOT_YET_DUE, Reasons.BACKING_OFF)
            ctx.events.record(waiting, "Normal" if calm else "Warning", waits.reason, waits.message)
        now = ctx.clock.now()
        # What began and lost its place waits no longer than it may run.
        times = [(at - now).total_seconds() for at in (waits.until, request.ends_at) if at is not None]
        look = _LONGEST_WAIT if waits.until is not None else self._settings.instances_rest_interval
        return Result.after(max(min([look, *times]), 1.0 if ctx.wall_jumped else 0.01))

    async def _unschedule(self, request: LabInstanceRequest, ctx: Context, waits: Waits) -> _Next:
        """Back to waiting; whatever an earlier try reserved is given back first."""
        await self._placer.release(request, ctx)

        def back(r: LabInstanceRequest) -> None:
            entering(Phase.PENDING, waits.reason, ctx)(r)
            tell(r, ctx, Conditions.WORKER_ASSIGNED, False, (waits.reason, waits.message))
            tell(r, ctx, Conditions.READY, False, (waits.reason, waits.message))

        await self._write(request, ctx, back)
        return Result.after(1.0)

    async def _write(self, request: LabInstanceRequest, ctx: Context, mutate: Mutate) -> LabInstanceRequest:
        """Exactly on the state that was decided on: somebody may have extended or stopped it meanwhile."""
        before = request.status.phase

        def note(r: LabInstanceRequest) -> None:
            mutate(r)
            r.status.observed_generation = r.metadata.generation

        stored = await ctx.client.update_status(request, note, retry=False)
        if stored.status.phase != before:
            ctx.log.info("instance.phase", source=before, to=stored.status.phase)
        return stored

    def _runtime(self, request: LabInstanceRequest) -> Runtime:
        ref = request.status.worker_ref
        # Of what failed the template may be another by now; what is outside is where it was put.
        name = request.spec.runs_in if ref is None else "Container" if ref.kind == "Engine" else "CML"
        runtime = self._runtimes.get(name)
        if runtime is None:
            raise NotNow(Reasons.ENGINE_UNAVAILABLE, "no engine is configured: set LRM_DOCKER_HOST", again=60.0)
        return runtime

    def _time_is_over(self, request: LabInstanceRequest, ctx: Context) -> bool:
        ends = request.ends_at
        return ends is not None and ctx.clock.now() >= ends and not ctx.wall_jumped and not ctx.observe_only

    def _left(self, request: LabInstanceRequest, ctx: Context) -> float:
        """Seconds until the deadline of the phase that it is in, by a time in its status."""
        now, status = ctx.clock.now(), request.status
        if status.phase == Phase.RUNNING and request.ends_at is not None:
            return (request.ends_at - now).total_seconds()
        if status.phase == Phase.PROVISIONING:
            return _left(now, status.provisioning_started_at, self._settings.instances_provisioning_timeout)
        if placed(request):
            return _left(now, status.ending_started_at, self._settings.instances_stopping_timeout)
        return _LONGEST_WAIT

    def _begins_again(self, request: LabInstanceRequest) -> bool:
        """Whether a person has changed what failed, or asked for another try."""
        failure = request.status.failure
        if request.status.phase != Phase.FAILED or failure is None:
            return False
        retry = request.metadata.annotations.get(RETRY_ANNOTATION)
        return request.metadata.generation != failure.generation or (retry is not None and retry != failure.retry)


def _key(request: LabInstanceRequest) -> Key:
    return request.namespace, request.name


def _again(seen: Sighting) -> float:
    return _LONGEST_WAIT if seen.again is None else seen.again


def _left(now: Any, since: Any, seconds: float) -> float:
    """Seconds until a deadline that counts from a time in the status."""
    return seconds - (now - since).total_seconds() if since is not None else seconds


def _same_place(old: object, new: object) -> bool:
    """Whether a change of a worker is none for the labs on it: what it measures and counts wakes nobody."""
    if not (isinstance(old, LabWorker) and isinstance(new, LabWorker)):
        return False
    return (old.status.phase, old.status.ec2.instance_id, old.deleting, old.status.cml.api_url) == (
        new.status.phase,
        new.status.ec2.instance_id,
        new.deleting,
        new.status.cml.api_url,
    )
