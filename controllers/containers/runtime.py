"""Labs in containers: one container on a network of its own, made and removed by name and label, watched by the mirror.

Promises what `instances.runtime.Runtime` asks. Exactly one: the engine lets no two containers bear one name, and what
an older attempt has left is removed before another is made. What is made carries the request's uid, and `clean` is
true only when the engine, asked anew, has nothing with that uid any more. An idle container costs no calls: `look`
reads the mirror, and the engine is asked only where the mirror has nothing. Pulls, and stops that wait for the
container's own end, go on between two steps and wake the request when they are done.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Iterable, Iterator
from contextlib import AsyncExitStack, aclosing, contextmanager
from dataclasses import replace
from functools import partial
from types import TracebackType
from typing import Self

import structlog
from opentelemetry.metrics import Meter

from controllers.containers.chores import Chores
from controllers.containers.documents import Container, EngineInfo, Image, Thing
from controllers.containers.engine import Engine
from controllers.containers.errors import (
    EngineConflict,
    EngineError,
    EngineNotFound,
    EngineRefused,
    EngineUnavailable,
)
from controllers.containers.images import Images
from controllers.containers.mirror import Mirror
from controllers.containers.plan import beyond, container_of, need_of, network_of, ports_of, url_of
from controllers.containers.words import LAST_LINES, LAST_LOG_MOST, last_lines, one_line
from controllers.instances.kind import LabInstanceRequest
from controllers.instances.phases import Conditions, Reasons
from controllers.instances.runtime import LabFailed, NotNow, Prepared, Refused, Sighting, State, WorkerLost
from controllers.instances.settings import InstanceSettings
from lrm.controller import Context, Hints, Key
from lrm.crashpoints import crash_point
from lrm.errors import NotLeading
from lrm.outside import OutsideHealth
from storage.clock import Clock

log = structlog.get_logger(__name__)

PROVISION_CRASH_POINTS = ("containers.network-created", "containers.created", "containers.started")
"""Where the making of a container can be killed, in order."""
CLEAN_CRASH_POINTS = ("containers.stopped", "containers.container-removed", "containers.network-removed")
"""Where its removal can be killed, in order."""

PARTY = "container engine"
"""Its name in the daemon's health."""
LOG_TAIL_MOST = 10_000
_LOG_MOST = 16 * 1024 * 1024
"""Bytes of a log that is not followed."""
_LAST_LOG_SECONDS = 2.0
"""For which the end of a log is waited for."""
_HEALTH_KEPT = 10.0
"""Seconds for which a lab is at least called healthy, or unhealthy: checks may come and go many times a second."""
_STOP_AGAIN = 2.0
"""Seconds until a container is asked to end once more where the engine was not reached."""
_STEP_AGAIN, _AWAY_AGAIN = 5.0, 60.0
"""Seconds until the next look at an engine that is away, and once that was told: hints are to come before."""
_SOON = 0.5
"""Seconds until the next step where nothing wakes us."""


class ContainerRuntime:
    """See the module. Open it with `async with`; without an engine in the settings every step says so."""

    def __init__(
        self,
        settings: InstanceSettings,
        installation: str,
        hints: Hints,
        clock: Clock,
        *,
        waiting: Callable[[], Iterable[Key]] = tuple,
        health: OutsideHealth | None = None,
    ) -> None:
        """`hints`: the instances' controller listens to them; `waiting`: who waits for an engine that answers.

        `health` is told whether it does.
        """
        self.mirror: Mirror | None = None
        self._settings = settings
        self._installation = installation
        self._hints = hints
        self._waiting = waiting
        self._health = health
        self._clock = clock
        self._engine: Engine | None = None
        self._images: Images | None = None
        self._chores = Chores()
        self._stopped: set[str] = set()
        """Containers that had their grace; what of them still lives is killed."""
        self._open = AsyncExitStack()

    async def __aenter__(self) -> Self:
        if self._settings.docker_host:
            engine = Engine(self._settings.docker_host, self._clock, self._installation)
            self._engine = await self._open.enter_async_context(engine)
            await self._open.enter_async_context(self._chores)
            self._images = Images(
                engine, self._clock, self._chores, self._hints, timeout=self._settings.docker_pull_timeout
            )
            self.mirror = Mirror(engine, self._clock, self._hints, self._waiting, self._answers)
            self._chores.begin("mirror", self.mirror.run)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._open.__aexit__(kind, error, trace)

    @property
    def engine(self) -> Engine | None:
        """The engine, None where there is none."""
        return self._engine

    def told(self) -> EngineInfo | None:
        """What the engine tells of itself; None while nothing can be placed there."""
        return self.mirror.info if self.mirror is not None and self.mirror.current else None

    def observe(self, meter: Meter) -> None:
        """Whether the engine answers; nothing where there is none."""
        if self.mirror is not None:
            up = meter.create_gauge("lrm_engine_up", description="1 while the engine for containers answers.")
            up.set(int(self.mirror.current))

    async def prepare(self, request: LabInstanceRequest, ctx: Context) -> Prepared:  # noqa: ARG002 - see `Runtime`
        """What it is limited to; the engine is not asked. Raises `Refused` for what is beyond the settings' limits."""
        for cause in beyond(request.spec, self._settings):
            raise Refused(Reasons.REFUSED, f"{cause.field}: {cause.message}")
        return Prepared(need_of(request, self._settings))

    async def provision(self, request: LabInstanceRequest, ctx: Context) -> Sighting:
        """Make and start its container, or say how it is; a hint follows whatever is waited for."""
        with _said():
            mirror = self._current()
            seen = mirror.containers(request.uid)
            _check_engine(request, mirror.info)
            older = [c for c in seen if c.labels.attempt != request.status.attempt]
            if older:
                for container in older:
                    await self._remove(Thing("container", container.id, container.labels), ctx)
                return _making(_SOON)
            if not seen:
                made = await self._make(request, ctx)
                return made if isinstance(made, Sighting) else await self._start(request, made, ctx)
            if seen[0].status == "created":
                return await self._start(request, seen[0].id, ctx)
            seen_now = await self._sighting(request, seen[0], starting=True)
            _tell_unhealthy(request, seen[0], seen_now, ctx)
            return seen_now

    async def look(self, request: LabInstanceRequest, ctx: Context) -> Sighting:
        """How it is, from the mirror. Raises `LabFailed` also when it is gone: somebody else has removed it."""
        with _said():
            engine, mirror, _ = self._opened()
            known = _told_state(request)
            if known is not None and not mirror.current and mirror.patience:
                ready = request.status.condition(Conditions.READY)
                return Sighting(known, ready.message if ready else "", again=mirror.patience)
            mine = _of_attempt(request, self._current().containers(request.uid))
            _check_engine(request, mirror.info)
            if not mine:  # the mirror may be a moment behind; the engine itself is not
                found = [await mirror.refresh(thing.id) for thing in await engine.containers(request.uid)]
                mine = _of_attempt(request, found)
            if not mine:
                _check_engine(request, await engine.info())
        if not mine:
            raise LabFailed(Reasons.CONTAINER_LOST, "somebody else has removed its container")
        seen = _damped(request, await self._sighting(request, mine[0], starting=False), ctx)
        _tell_unhealthy(request, mine[0], seen, ctx)
        return seen

    async def last_log(self, request: LabInstanceRequest) -> str | None:
        """What its container wrote last; None also while the engine does not answer, or answers late."""
        return await self._last_log(request.outside_name)

    async def clean(self, request: LabInstanceRequest, ctx: Context) -> bool:
        """One step towards the engine having nothing with its uid any more."""
        with _said(refusals=False):
            engine, _, _ = self._opened()
            things = await self._things(engine, request.uid)
            containers = [t for t in things if t.kind == "container"]
            waited_for = [c for c in containers if self._stopping(request, c, ctx)]
            if waited_for:
                return False
            for container in containers:
                await self._remove(container, ctx)
                crash_point("containers.container-removed")
            for thing in things:
                # Volumes go with their container; what is left of them is for the next step.
                if thing.kind == "network" or (thing.kind == "volume" and not containers):
                    await self._remove(thing, ctx)
                    crash_point("containers.network-removed")
            if things and await self._things(engine, request.uid):
                return False
            _check_engine(request, await engine.info())  # after the lists, for it is they that prove it
            return True

    async def logs(
        self, request: LabInstanceRequest, *, tail: int = 1000, follow: bool = False
    ) -> AsyncGenerator[bytes, None]:
        """What its container has written to its output and error, in the order of their coming.

        At most `LOG_TAIL_MOST` lines and 16 MiB of what there is; `follow` goes on until the container ends, as fast
        as it is read. The first piece is empty: the log is open. Raises `NotNow`, and `Refused` when there is no
        container.
        """
        with _said():
            engine, mirror, _ = self._opened()
            _check_engine(request, mirror.info)
            left, lines = _LOG_MOST, max(0, min(tail, LOG_TAIL_MOST))
            try:
                async with aclosing(engine.logs(request.outside_name, tail=lines, follow=follow)) as pieces:
                    async for piece in pieces:
                        yield piece
                        left -= len(piece)
                        if left <= 0 and not follow:
                            return
            except EngineNotFound as error:
                raise Refused(Reasons.NOT_RUNNING, "it has no container") from error

    # Its making

    async def _make(self, request: LabInstanceRequest, ctx: Context) -> str | Sighting:
        """The id of a container that is to be started; or what there is to wait for."""
        engine, mirror, images = self._opened()
        template, since = request.spec.lab_template, request.status.provisioning_started_at or self._clock.now()
        policy = template.pull_policy or self._settings.docker_pull
        image = await images.ready(
            template.image or "", policy, (request.namespace, request.name), since, ctx.check_leading
        )
        if image is None:
            return Sighting(State.STARTING, f"{template.image} is being pulled")
        network = await self._network(request, ctx)
        if network is None:
            return _making(_SOON)
        try:
            container = await self._create(engine, request, network, image, ctx)
        except EngineConflict:
            # Somebody was quicker: we ourselves in a call whose answer was lost, or a leader before us.
            for thing in await engine.containers(request.uid):
                await mirror.refresh(thing.id)
            if not mirror.containers(request.uid):
                raise
            return _making(0.0)
        crash_point("containers.created")
        return container

    async def _create(
        self, engine: Engine, request: LabInstanceRequest, network: str, image: Image, ctx: Context
    ) -> str:
        timeout = ctx.creating_timeout
        return await engine.create_container(
            request.outside_name,
            container_of(request, network, image, self._installation, self._settings),
            may=partial(ctx.check_leading, timeout),
            seconds=timeout,
        )

    async def _network(self, request: LabInstanceRequest, ctx: Context) -> str | None:
        """The id of its network, made if need be; None where what is in the way was just removed."""
        engine, _, _ = self._opened()
        timeout = ctx.creating_timeout
        try:
            network = await engine.create_network(
                network_of(request, self._installation, self._settings),
                may=partial(ctx.check_leading, timeout),
                seconds=timeout,
            )
        except EngineConflict:
            found = await engine.networks(request.uid)
            older = [n for n in found if n.labels.attempt != request.status.attempt]
            for thing in older:
                await self._remove(thing, ctx)
            if older:
                return None
            if not found:
                raise
            return found[0].id
        except (EngineRefused, EngineNotFound) as error:
            # Nothing of it is the request's choice: the engine has no room, such as no range of addresses left.
            raise NotNow(Reasons.NO_CAPACITY_AVAILABLE, f"no network for it: {error}", again=10.0) from error
        crash_point("containers.network-created")
        return network

    async def _start(self, request: LabInstanceRequest, container: str, ctx: Context) -> Sighting:
        engine, mirror, _ = self._opened()
        with mirror.starting(container):
            try:
                await engine.start(container, may=ctx.check_leading)
            except EngineNotFound:
                # It or its network is gone; without its network it is of no use.
                await self._remove(Thing("container", container), ctx)
                return _making(_SOON)
            except EngineRefused as error:
                if not await self._one_network(request, container, ctx):
                    raise Refused(Reasons.REFUSED, f"its container cannot be started: {error}") from error
                return _making(_SOON)
            crash_point("containers.started")
            seen = await mirror.refresh(container)
        return await self._sighting(request, seen, starting=True) if seen is not None else _making(_SOON)

    async def _one_network(self, request: LabInstanceRequest, container: str, ctx: Context) -> bool:
        """Whether there were several of its networks, and one is left: two at once can make two of one name.

        The engine then starts no container on either. The oldest stays, for everybody who looks to agree; the
        container may be for another one, and is made again.
        """
        networks = await self._opened()[0].networks(request.uid)
        if len(networks) < 2:
            return False
        await self._remove(Thing("container", container), ctx)
        for network in networks[1:]:
            await self._remove(network, ctx)
        return True

    # Its end

    def _stopping(self, request: LabInstanceRequest, container: Thing, ctx: Context) -> bool:
        """Whether it is to be waited for: it ends in its own way, for as long as the grace lasts."""
        chore, grace = ("stop", container.id), self._settings.docker_stop_grace
        if self._chores.busy(chore):
            return True
        # One that is paused cannot hear that it is to end.
        if container.state != "running" or grace == 0 or container.id in self._stopped:
            return False
        key = (request.namespace, request.name)
        self._chores.begin(chore, lambda: self._stop(container.id, grace, ctx), then=lambda: self._hints.tell(key))
        return True

    async def _stop(self, container: str, grace: float, ctx: Context) -> None:
        """Have its grace noted once it was asked to end; where nobody was reached it is asked again."""
        engine, mirror, _ = self._opened()
        began = self._clock.monotonic()
        try:
            await engine.stop(container, grace, may=ctx.check_leading)
            crash_point("containers.stopped")
        except EngineError as error:
            log.warning("containers.stop_failed", container=container, error=str(error))
            if isinstance(error, EngineUnavailable) and self._clock.monotonic() - began < grace:
                await self._clock.sleep(_STOP_AGAIN)
                return
        except NotLeading:
            log.info("containers.stop_left_to_the_next_leader", container=container)
            return
        self._stopped.intersection_update(mirror.ids)  # what others have removed comes here no more
        self._stopped.add(container)

    async def _remove(self, thing: Thing, ctx: Context) -> None:
        """Send it; what came of it the next look shows."""
        await remove(self._opened()[0], thing, ctx.check_leading)
        self._stopped.discard(thing.id)

    async def _things(self, engine: Engine, uid: str) -> list[Thing]:
        return [*await engine.containers(uid), *await engine.networks(uid), *await engine.volumes(uid)]

    # How it is

    async def _sighting(self, request: LabInstanceRequest, container: Container, *, starting: bool) -> Sighting:
        """What its container's state means. Raises `LabFailed`, and `WorkerLost` where it ended with its engine."""
        if container.status in ("exited", "dead"):
            last_log = await self._last_log(container.id)
            if self._opened()[1].ended_with_engine(container):
                message = f"its engine was restarted, and its container ended with it (exit code {container.exit_code})"
                raise WorkerLost(Reasons.ENGINE_RESTARTED, message, last_log=last_log)
            return _ended(container, last_log)
        state, message, trouble = State.STARTING, f"its container is {container.status}", ""
        if container.status == "running":
            state, message = _HEALTH[container.health]
            if state is State.UNHEALTHY and container.check_output:
                message = f"{message}: {container.check_output}"
            if starting and state is State.UNHEALTHY:
                state, trouble = State.STARTING, Reasons.UNHEALTHY  # its deadline says for how long that may be
        ports = ports_of(request, container.ports, self._settings)
        return Sighting(
            state,
            message,
            trouble,
            container_id=container.id,
            access_url=url_of(ports[0]) if ports else None,
            ports=ports,
        )

    async def _last_log(self, container: str) -> str | None:
        if self._engine is None or self.mirror is None or not self.mirror.current:
            return None
        try:
            async with self._clock.timeout(_LAST_LOG_SECONDS):
                log_end = await self._engine.last_log(container, LAST_LINES, 2 * LAST_LOG_MOST)
        except (EngineError, TimeoutError) as error:
            log.info("containers.last_log_not_read", container=container, error=str(error) or "not in time")
            return None
        return last_lines(log_end)

    def _current(self) -> Mirror:
        """The mirror. Raises `NotNow` while it knows nothing; a hint tells of the engine's return."""
        mirror = self._opened()[1]
        if not mirror.current:
            again = _STEP_AGAIN if mirror.patience else _AWAY_AGAIN
            raise NotNow(Reasons.ENGINE_UNAVAILABLE, mirror.why, again=again)
        return mirror

    def _answers(self, why: str) -> None:
        if self._health is None:
            return
        if why:
            self._health.down(PARTY, why)
        else:
            self._health.up(PARTY)

    def _opened(self) -> tuple[Engine, Mirror, Images]:
        if self._engine is None or self.mirror is None or self._images is None:
            raise NotNow(Reasons.ENGINE_UNAVAILABLE, "no engine for containers is configured", again=60.0)
        return self._engine, self.mirror, self._images


async def remove(engine: Engine, thing: Thing, may: Callable[[], None]) -> None:
    """Have it removed; that it is gone, or being removed, or still in use, is for the next look."""
    try:
        await engine.remove(thing, may=may)
    except (EngineNotFound, EngineConflict) as error:
        log.debug("containers.not_removed_now", kind=thing.kind, id=thing.id, detail=str(error))


def _ended(container: Container, last_log: str | None) -> Sighting:
    """What its exit code means. Raises `LabFailed`, in the words of the engine, else with the last of its own."""
    code = container.exit_code
    if code == 0:
        message = "its container ended by itself"
        return Sighting(
            State.ENDED, message, container_id=container.id, exit_code=0, oom_killed=False, last_log=last_log
        )
    if container.oom_killed:
        message = f"it needed more memory than it may use (exit code {code})"
        raise LabFailed(Reasons.OUT_OF_MEMORY, message, exit_code=code, oom_killed=True, last_log=last_log)
    by = _SIGNALS.get(code)
    why = container.error or ("" if by else one_line((last_log or "").rstrip().rpartition("\n")[2]))
    how = f"was {by}, most likely from outside (exit code {code})" if by else f"ended with exit code {code}"
    message = f"its container {how}" + (f": {why}" if why else "")
    raise LabFailed(Reasons.CONTAINER_FAILED, message, exit_code=code, last_log=last_log)


_SIGNALS = {137: "killed (SIGKILL)", 143: "told to end (SIGTERM)"}
"""What a program does not end with by itself; of what lrm stops no exit code is told."""

_HEALTH = {
    "": (State.RUNNING, "it runs"),
    "healthy": (State.RUNNING, "it runs, and is healthy"),
    "starting": (State.STARTING, "it runs, and its health check has not succeeded yet"),
    "unhealthy": (State.UNHEALTHY, "it runs, and its health check fails"),
}


def _check_engine(request: LabInstanceRequest, told: EngineInfo | None) -> None:
    """Raise `NotNow` where another engine answers than the one with its place: what that has says nothing of it."""
    ref = request.status.worker_ref
    if ref is not None and ref.uid and told is not None and ref.uid != told.id:
        message = f"it is on the engine {ref.uid}, and {told.id} answers: all daemons must name the same engine"
        raise NotNow(Reasons.WORKER_AWAY, message, again=60.0)


def _of_attempt(request: LabInstanceRequest, containers: Iterable[Container | None]) -> list[Container]:
    """Those that were made for the request's present attempt."""
    return [c for c in containers if c is not None and c.labels.attempt == request.status.attempt]


def _told_state(request: LabInstanceRequest) -> State | None:
    """How it was last told to run; None where it was not."""
    ready = request.status.condition(Conditions.READY)
    if ready is not None and ready.status == "True":
        return State.RUNNING
    unhealthy = ready is not None and (ready.status, ready.reason) == ("False", Reasons.UNHEALTHY)
    return State.UNHEALTHY if unhealthy else None


def _damped(request: LabInstanceRequest, seen: Sighting, ctx: Context) -> Sighting:
    """The same, or the health that was told less than `_HEALTH_KEPT` ago: each change costs a write."""
    ready, told = request.status.condition(Conditions.READY), _told_state(request)
    if ready is None or told is None or seen.state not in (State.RUNNING, State.UNHEALTHY):
        return seen
    age = (ctx.clock.now() - ready.last_transition_time).total_seconds()
    if told is seen.state is State.UNHEALTHY:
        return replace(seen, message=ready.message)  # what a check says may differ each time
    if told is seen.state or not 0 <= age < _HEALTH_KEPT:
        return seen
    return replace(seen, state=told, message=ready.message, again=_HEALTH_KEPT - age)


def _tell_unhealthy(request: LabInstanceRequest, container: Container, seen: Sighting, ctx: Context) -> None:
    """One event when its check begins to fail, not one for each check."""
    ready = request.status.condition(Conditions.READY)
    known = ready is not None and ready.message == seen.message
    if container.health == "unhealthy" and seen.state is not State.RUNNING and not known:
        ctx.events.record(request, "Warning", Reasons.UNHEALTHY, seen.message)


def _making(again: float) -> Sighting:
    return Sighting(State.STARTING, "its container is being made", again=again)


@contextmanager
def _said(*, refusals: bool = True) -> Iterator[None]:
    """What the engine's errors mean for an instance; without `refusals` nothing is for good."""
    try:
        yield
    except EngineUnavailable as error:
        raise NotNow(Reasons.ENGINE_UNAVAILABLE, str(error)) from error
    except EngineRefused as error:
        if refusals:
            raise Refused(Reasons.REFUSED, str(error)) from error
        raise NotNow(Reasons.REFUSED, str(error)) from error
    except EngineError as error:
        raise NotNow(Reasons.ENGINE_FAILED, str(error)) from error
