"""The life of a lab instance: waits, takes a place, is made, runs for its time, is cleaned up.

Promises: a phase is written before what it stands for is done, so that whoever comes next goes on where this leader
died; nothing is given back that may still be used; every deadline is counted from a time in the status. What is done in
each phase is in `waiting`, `running` and `ends`; what a runtime does outside is its own module's. A request whose lab
may exist somewhere has `status.workerRef`, whatever its phase, until its runtime has proved that nothing is left.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence

from controllers.instances.ends import Ends, begins_again
from controllers.instances.kind import INSTANCE_FINALIZER, INSTANCES, LabInstanceRequest, over, placed
from controllers.instances.phases import Phase, Reasons
from controllers.instances.running import Running
from controllers.instances.runtime import LabFailed, NotNow, Refused, Runtime, WorkerLost
from controllers.instances.scheduling import Placer
from controllers.instances.settings import InstanceSettings
from controllers.instances.steps import Next, Steps
from controllers.instances.waiting import Waiting
from controllers.labs.kind import LabRecord
from controllers.workers.kind import LabWorker
from lrm.cache import Cache, Change
from lrm.controller import Context, Controller, Hints, Key, Result, Trigger

_STEPS_MOST = 12
"""Steps of one reconcile: a life has eight."""


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
        self._steps = Steps(runtimes, settings)
        self._ends = Ends(self._steps, placer)
        waiting, running = Waiting(self._steps, self._ends, placer), Running(self._steps, self._ends)
        self._by_phase: dict[Phase | str, Callable[[LabInstanceRequest, Context], Awaitable[Next]]] = {
            Phase.PENDING: waiting.pending,
            Phase.SCHEDULING: waiting.scheduling,
            Phase.PROVISIONING: running.provisioning,
            Phase.RUNNING: running.running,
            Phase.STOPPING: self._ends.ending,
            Phase.TIMEOUT: self._ends.ending,
            Phase.FAILED: self._ends.failed,
            Phase.COMPLETED: self._ends.completed,
        }

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
        return over(request) and not placed(request) and not begins_again(request)

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
        if isinstance(record, LabRecord):
            # Its title alone would tell before its lab is known; its student may give it another one.
            for index, value in (("uid", record.status.title.removeprefix("lrm-")), ("lab", record.spec.lab_id)):
                yield from map(_key, self._cache.by_index(LabInstanceRequest, index, value))
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
                request = await self._ends.end(request, ctx, Reasons.DELETING, "it is being deleted")
                continue
            following = await self._ends.clean_in_time(request, ctx)
            if isinstance(following, Result):
                return following
            request = following
        return Result.after(0)

    async def _step(self, request: LabInstanceRequest, ctx: Context) -> Next:
        step = self._by_phase.get(request.phase)
        if step is None:
            ctx.log.warning("instance.unknown_phase", phase=request.status.phase)
            return Result.done()
        try:
            return await step(request, ctx)
        except NotNow as error:
            return await self._steps.held_up(request, ctx, error)
        except Refused as error:
            return await self._ends.fail(request, ctx, error)
        except (WorkerLost, LabFailed) as error:
            return await self._ends.again_or_fail(request, ctx, error)


def _key(request: LabInstanceRequest) -> Key:
    return request.namespace, request.name


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
