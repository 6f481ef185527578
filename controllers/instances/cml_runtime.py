"""Runs lab instances on CML: imports the topology under the request's own title, starts it, and removes it again.

Promises one lab for each request on its worker, whatever dies or gets lost: before an import every title of a complete
list is read; an import without an answer is looked for, and sent again only after `late_import` seconds; what a late
one makes besides is removed, here or by `strays`. A lab counts as gone only by CML's own word to an admin. Deletion
reaches every lab of the title. A lab that runs is known from its LabRecord, and costs no call. What students change
inside a lab is theirs; so is stopping it: it is kept as it is, and started again only where its restartPolicy says so.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from controllers.cml.client import CmlClient
from controllers.cml.errors import (
    CmlBadAnswer,
    CmlCircuitOpen,
    CmlError,
    CmlInvalid,
    CmlLoginThrottled,
    CmlNotFound,
    CmlOutcomeUnknown,
    CmlRefused,
)
from controllers.cml.inventory import read_inventory
from controllers.cml.models import Lab
from controllers.cml.sessions import CmlSessions
from controllers.instances.cml_place import Away, Lost, place_of
from controllers.instances.fetches import Fetches
from controllers.instances.kind import LabInstanceRequest, Need, WorkerRef
from controllers.instances.marks import Mark, notes_for, read_mark
from controllers.instances.phases import Reasons
from controllers.instances.quantity import told_bytes, told_cores
from controllers.instances.runtime import LabFailed, NotNow, Prepared, Refused, Sighting, State, WorkerLost
from controllers.instances.settings import InstanceSettings
from controllers.instances.templates import load
from controllers.instances.topology import Topology, TopologyError
from controllers.labs.desired import DEFINED_ON_CORE, STARTED, STOPPED, WAIT, Step, next_step
from controllers.labs.kind import record_of_lab
from controllers.workers.kind import LabWorker, serving
from controllers.workers.phases import Phase
from lrm.cache import Cache
from lrm.controller import Context
from lrm.crashpoints import crash_point
from lrm.model import rfc3339

MAKING_CRASH_POINTS = ("instances.cml-importing", "instances.cml-imported", "instances.cml-started")
REMOVING_CRASH_POINTS = (
    "instances.cml-stopped",
    "instances.cml-wiped",
    "instances.cml-deleting",
    "instances.cml-deleted",
)
"""Where the making and the removing of a lab can be killed, in order."""

_AT_REST = frozenset({DEFINED_ON_CORE, STOPPED})


@dataclass(slots=True)
class _StartedAgain:
    """The last start of a lab that had been stopped."""

    not_before: float
    """When (monotonic) it may be started once more."""
    refusal: str = ""
    """CML's words, where it refused."""


class CmlRuntime:
    """See the module; a `runtime.Runtime`."""

    def __init__(
        self,
        cache: Cache,
        sessions: CmlSessions,
        settings: InstanceSettings,
        *,
        fetches: Fetches,
        installation: str,
        late_import: float,
    ) -> None:
        """`late_import`: seconds for which CML may still carry out an import that it did not answer."""
        self._cache = cache
        self._sessions = sessions
        self._settings = settings
        self._fetches = fetches
        self._installation = installation
        self._late_import = late_import
        self._after_trouble = 2 * settings.instances_step_interval
        self._doubts: dict[str, float] = {}
        """Until when (monotonic) an import may still be carried out, by the request's uid. It is not stored: after a
        restart a second lab may be made, whose surplus is removed.
        """
        self._started_again: dict[str, _StartedAgain] = {}
        """By the request's uid. It is not stored: after a restart a lab may be started once more, a repeatable call."""

    async def prepare(self, request: LabInstanceRequest, ctx: Context) -> Prepared:  # noqa: ARG002 - see `Runtime`
        """What the topology needs, or the request says where that is more."""
        topology = await self._load(request)
        self._to_import(request, topology)
        return Prepared(_need(request, topology), topology.digest)

    async def provision(self, request: LabInstanceRequest, ctx: Context) -> Sighting:
        """Find or import the lab; then start it; then see whether its nodes have booted."""
        worker = self._worker(request)
        with self._asking(worker) as client:
            lab_id = request.status.cml_lab_id
            state = await _state_of(client, lab_id, ctx) if lab_id else None
            if lab_id is None or state is None:
                return await self._find_or_import(request, worker, client, ctx)
            return await self._started(worker, client, lab_id, state, ctx)

    async def look(self, request: LabInstanceRequest, ctx: Context) -> Sighting:
        """From the lab's record where that says that it runs; else CML is asked before anything is concluded.

        A lab that is there and does not run was stopped by somebody, or by a restart of its CML: it stays.
        """
        worker = self._worker(request)
        lab_id = request.status.cml_lab_id
        if lab_id is None:
            raise LabFailed(Reasons.LAB_LOST, "it is not known which lab is its own")
        running = self._running(worker, lab_id)
        if self._recorded_as_started(worker, lab_id):
            return running
        with self._asking(worker) as client:
            state = await _state_of(client, lab_id, ctx)
            if state is None:
                raise LabFailed(Reasons.LAB_LOST, f"somebody deleted its lab {lab_id} in CML")
            if state == STARTED:
                return running
            if state not in _AT_REST:
                return self._resting(State.STARTING, f"its lab {lab_id} is {state} in CML")
            return await self._stopped(request, worker, client, ctx, lab_id=lab_id, state=state)

    async def last_log(self, request: LabInstanceRequest) -> str | None:  # noqa: ARG002 - see `Runtime`
        """None: its nodes have consoles, and it has no log."""
        return None

    async def clean(self, request: LabInstanceRequest, ctx: Context) -> bool:
        """One step towards no lab of its title being left; True on a complete list that has none, or no such place."""
        ref = _ref(request)
        place = place_of(ref, self._cache)
        if isinstance(place, Lost):
            ctx.log.info("instance.lab_gone_with_its_worker", worker=ref.name, why=place.message)
            self._doubts.pop(request.uid, None)
            return True
        worker = self._worker(request)
        with self._asking(worker) as client:
            lab_id = request.status.cml_lab_id
            if lab_id is not None and not await self._remove(client, lab_id, ctx):
                return False
            left = await self._labs_of(request, worker, client, ctx)
            gone = [await self._remove(client, lab.id, ctx) for lab in left]
        if not all(gone):
            return False
        doubt = self._doubt(request, ctx)
        if doubt > 0:
            raise NotNow(Reasons.CLEANING_UP, "CML may still carry out an import that it has not answered", again=doubt)
        return True

    # The parts of it

    def _worker(self, request: LabInstanceRequest) -> LabWorker:
        """The worker, which can be asked. Raises `WorkerLost`, `NotNow`."""
        place = place_of(_ref(request), self._cache)
        if isinstance(place, Lost):
            raise WorkerLost(Reasons.WORKER_LOST, place.message)
        if isinstance(place, Away):
            raise NotNow(Reasons.WORKER_AWAY, place.message, again=self._settings.instances_rest_interval)
        if place.spec.observe_only:
            raise NotNow(Reasons.OBSERVE_ONLY, f"nothing is changed on {place.name}, which is only observed")
        return place

    @contextmanager
    def _asking(self, worker: LabWorker) -> Iterator[CmlClient]:
        """The worker's client; what its CML fails to do concludes nothing, and is told as `NotNow`."""
        try:
            yield self._sessions.client_for(worker)
        except CmlRefused as error:
            raise NotNow(Reasons.REFUSED, f"{worker.name}: {error}", again=self._after_trouble) from error
        except (CmlCircuitOpen, CmlLoginThrottled) as error:
            raise NotNow(Reasons.WORKER_AWAY, f"{worker.name}: {error.why}", again=error.retry_after) from error
        except CmlError as error:
            raise NotNow(Reasons.WORKER_AWAY, f"{worker.name}: {error}", again=self._after_trouble) from error

    async def _find_or_import(
        self, request: LabInstanceRequest, worker: LabWorker, client: CmlClient, ctx: Context
    ) -> Sighting:
        found = await self._labs_of(request, worker, client, ctx)
        own = [lab for lab in found if await self._is_of_this_try(request, client, lab, ctx)]
        # What is started is the oldest, by whoever looks; all others were never more than imported.
        kept = min(own, key=_age, default=None)
        gone = [await self._remove(client, lab.id, ctx) for lab in found if lab is not kept]
        if gone:
            ctx.log.warning("instance.surplus_labs", worker=worker.name, labs=len(gone), kept=kept and kept.id)
        if kept is not None:
            self._doubts.pop(request.uid, None)
            return Sighting(State.STARTING, "its lab was found", cml_lab_id=kept.id, again=0.0)
        if not all(gone):
            return self._starting("the lab of an earlier try is being removed")
        if self._doubt(request, ctx) > 0:
            return self._starting("CML has not answered the import: the lab is looked for")
        if worker.deleting or worker.status.phase in (Phase.DRAINING, Phase.UNLICENSING):
            raise WorkerLost(Reasons.WORKER_LOST, f"the worker {worker.name} takes no more labs: it is to end")
        if not serving(worker):
            raise NotNow(Reasons.WORKER_AWAY, f"the worker {worker.name} is {worker.status.phase}")
        return await self._import(request, worker, client, ctx)

    async def _import(
        self, request: LabInstanceRequest, worker: LabWorker, client: CmlClient, ctx: Context
    ) -> Sighting:
        text = await self._text(request)
        ctx.check_leading(ctx.creating_timeout)
        ctx.log.info("instance.importing", worker=worker.name, title=request.outside_name)
        now = ctx.clock.monotonic()
        self._doubts = {uid: until for uid, until in self._doubts.items() if until > now}
        # From here on until CML has answered: a cancelled call may be carried out too.
        self._doubts[request.uid] = now + ctx.creating_timeout + self._late_import
        crash_point("instances.cml-importing")
        try:
            made = await client.import_lab(request.outside_name, text, timeout=ctx.creating_timeout)
        except CmlOutcomeUnknown as error:
            ctx.log.warning("instance.import_unanswered", worker=worker.name, error=str(error))
            self._doubts[request.uid] = ctx.clock.monotonic() + self._late_import
            return self._starting(f"it is looked for: {error}")
        except (CmlRefused, CmlInvalid) as error:
            self._doubts.pop(request.uid, None)
            raise Refused(Reasons.REFUSED, f"the CML of {worker.name} does not take the topology: {error}") from error
        except CmlError:
            self._doubts.pop(request.uid, None)  # it was certainly not carried out
            raise
        self._doubts.pop(request.uid, None)
        crash_point("instances.cml-imported")
        warnings = "; ".join(made.warnings)[:500]
        if warnings:
            ctx.events.record(request, "Warning", "ImportWarnings", warnings)
        return Sighting(State.STARTING, warnings or "it is imported", cml_lab_id=made.id, again=0.0)

    async def _load(self, request: LabInstanceRequest) -> Topology:
        """The topology as its source has it now."""

        async def fetch(url: str) -> str:
            return await self._fetches.text(url, request.uid, (request.namespace, request.name))

        return await load(request.spec.lab_template, self._settings, fetch)

    async def _text(self, request: LabInstanceRequest) -> str:
        """What is sent. A source that has changed since it was measured is taken if its place holds it."""
        topology = await self._load(request)
        had, needs = request.status.need or Need(), _need(request, topology)
        if topology.digest != request.status.template_digest and not _fits(needs, had):
            raise Refused(
                Reasons.TEMPLATE_INVALID,
                f"the topology has changed since a place was found for it, and needs more: {needs.nodes} nodes, "
                f"{told_cores(needs.cpu)} and {told_bytes(needs.memory)}",
            )
        return self._to_import(request, topology)

    def _to_import(self, request: LabInstanceRequest, topology: Topology) -> str:
        try:
            return topology.to_import(notes_for(request, self._installation))
        except TopologyError as error:
            raise Refused(Reasons.TEMPLATE_INVALID, str(error)) from error

    async def _started(self, worker: LabWorker, client: CmlClient, lab_id: str, state: str, ctx: Context) -> Sighting:
        """Start what rests; RUNNING once nothing is on its way and every node has booted."""
        if state == STARTED:
            ctx.check_leading()
            nodes = list((await client.node_states(lab_id)).values())
            booted, resting = nodes.count("BOOTED"), sum(node in _AT_REST for node in nodes)
            settled = (booted == len(nodes) or resting > 0) and await client.converged(lab_id)
            if settled and booted == len(nodes):
                return self._running(worker, lab_id)
            message = f"{booted} of {len(nodes)} nodes booted"
            if not (settled and resting):
                return self._starting(message, lab_id)
        elif state in _AT_REST:
            message = "it is started"
        else:
            return self._starting(f"the lab is {state}", lab_id)
        ctx.check_leading()
        ctx.log.info("instance.starting", worker=worker.name, lab=lab_id)
        await client.start_lab(lab_id)
        crash_point("instances.cml-started")
        return self._starting(message, lab_id)

    async def _stopped(
        self,
        request: LabInstanceRequest,
        worker: LabWorker,
        client: CmlClient,
        ctx: Context,
        *,
        lab_id: str,
        state: str,
    ) -> Sighting:
        """What is told of a lab that was stopped; or its start, where that is wanted and was not tried just now."""
        told = f"its lab {lab_id} is {state}: it was stopped in CML, or its CML was restarted"
        ends = f"it ends at {rfc3339(request.ends_at)}" if request.ends_at else "its time goes on"
        takes = serving(worker) or worker.status.phase == Phase.DRAINING
        record = record_of_lab(self._cache, worker.namespace, worker.name, lab_id)
        if record is not None and record.deleting:
            return self._resting(State.STOPPED, f"its lab {lab_id} is being deleted, by its LabRecord {record.name}")
        if record is not None and record.spec.desired_state in _AT_REST:
            wish = f"its LabRecord {record.name} wishes for {record.spec.desired_state}"
            return self._resting(State.STOPPED, f"its lab {lab_id} is {state}: {wish}; {ends}")
        if request.spec.restart_policy != "OnFailure" or ctx.observe_only or not takes:
            return self._resting(State.STOPPED, f"{told}; start it there, {ends}")
        now, rest = ctx.clock.monotonic(), self._settings.instances_rest_interval
        last = self._started_again.get(request.uid)
        if last is None or last.not_before <= now:
            self._started_again = {uid: kept for uid, kept in self._started_again.items() if kept.not_before > now}
            last = self._started_again[request.uid] = _StartedAgain(now + rest)
            ctx.check_leading()
            ctx.log.info("instance.starting_again", worker=worker.name, lab=lab_id, state=state)
            try:
                await client.start_lab(lab_id)
            except (CmlBadAnswer, CmlRefused) as error:
                last.refusal = f": the last time {error}"
            else:
                ctx.events.record(request, "Normal", Reasons.STARTED_AGAIN, f"{told}; it is started again")
                return self._resting(State.STARTING, f"its lab {lab_id} was {state} in CML and is started again")
        return self._resting(
            State.STOPPED, f"{told}; it is started again, each {rest:.0f} s at most{last.refusal}; {ends}"
        )

    async def _labs_of(
        self, request: LabInstanceRequest, worker: LabWorker, client: CmlClient, ctx: Context
    ) -> list[Lab]:
        """Every lab of its title, from a list that has them all. Raises `NotNow` for one that may not."""
        ctx.check_leading()
        identity = worker.status.cml.identity
        inventory = await read_inventory(client, identity.product_uuid if identity else None)
        if not inventory.complete:
            client.renew_session()  # the next login may tell more
            raise NotNow(Reasons.WORKER_AWAY, f"{worker.name} tells not all its labs: {inventory.why_incomplete}")
        # A lab that CML cannot tell of now is another's if it was when it was mirrored: no title becomes ours.
        unread = [i for i in inventory.unread if self._recorded_title(worker, i) in (None, request.outside_name)]
        if unread:
            raise NotNow(Reasons.WORKER_AWAY, f"{worker.name} does not tell the titles of {len(unread)} labs")
        return [lab for lab in inventory.labs.values() if lab.title == request.outside_name]

    async def _is_of_this_try(self, request: LabInstanceRequest, client: CmlClient, lab: Lab, ctx: Context) -> bool:
        """Whether a lab was imported for this place, by us: who works in CML can write any mark, but owns what he made.

        Tiles need not tell the notes; and CML need not tell who owns a lab, or who we are.
        """
        ctx.check_leading()
        told = lab if lab.notes is not None else await client.lab(lab.id)
        if read_mark(told.notes or "") != Mark(self._installation, request.uid, request.status.attempt):
            return False
        owner, session = told.owner or lab.owner, await client.proven_session()
        return not owner or not session.user_id or owner == session.user_id

    async def _remove(self, client: CmlClient, lab_id: str, ctx: Context) -> bool:
        """The next step towards a lab's end; whether it has come."""
        state = await _state_of(client, lab_id, ctx)
        if state is None:
            return True
        step = next_step(DEFINED_ON_CORE, state)
        if step is WAIT:
            return False
        ctx.check_leading()
        ctx.log.info("instance.removing_lab", lab=lab_id, state=state)
        try:
            if step is Step.STOP:
                await client.stop_lab(lab_id)
                crash_point("instances.cml-stopped")
            elif step is Step.WIPE:
                await client.wipe_lab(lab_id)
                crash_point("instances.cml-wiped")
            else:
                crash_point("instances.cml-deleting")
                await client.delete_lab(lab_id)
                crash_point("instances.cml-deleted")
        except CmlNotFound:
            ctx.log.info("instance.lab_went_meanwhile", lab=lab_id)
        # What CML answered to the step proves little; what it says of the lab now counts.
        return await _state_of(client, lab_id, ctx) is None

    def _recorded_as_started(self, worker: LabWorker, lab_id: str) -> bool:
        record = record_of_lab(self._cache, worker.namespace, worker.name, lab_id)
        return (
            record is not None
            and not record.deleting
            and record.status.missing_since is None
            and record.status.instance_id == worker.status.ec2.instance_id
            and record.status.state == STARTED
        )

    def _recorded_title(self, worker: LabWorker, lab_id: str) -> str | None:
        record = record_of_lab(self._cache, worker.namespace, worker.name, lab_id)
        return record.status.title if record is not None else None

    def _doubt(self, request: LabInstanceRequest, ctx: Context) -> float:
        """Seconds for which an import of it may still be carried out."""
        return self._doubts.get(request.uid, 0.0) - ctx.clock.monotonic()

    def _starting(self, message: str, lab_id: str | None = None) -> Sighting:
        return Sighting(State.STARTING, message[:500], cml_lab_id=lab_id, again=self._settings.instances_step_interval)

    def _resting(self, state: State, message: str) -> Sighting:
        """Its record's next change wakes it, or the next look does."""
        return Sighting(state, message[:1000], again=self._settings.instances_rest_interval)

    def _running(self, worker: LabWorker, lab_id: str) -> Sighting:
        url = worker.status.cml.api_url
        access = f"{url.rstrip('/').removesuffix('/api/v0')}/lab/{lab_id}" if url else None
        again = self._settings.instances_rest_interval
        return Sighting(State.RUNNING, cml_lab_id=lab_id, access_url=access, again=again)


async def _state_of(client: CmlClient, lab_id: str, ctx: Context) -> str | None:
    """A lab's state, None when CML has no such lab; from whom CML may hide labs, that proves nothing: `NotNow`."""
    ctx.check_leading()
    try:
        return await client.lab_state(lab_id)
    except CmlNotFound as error:
        session = await client.proven_session()
        if session.admin is not True:
            client.renew_session()
            raise NotNow(
                Reasons.WORKER_AWAY, "the session is not proven to be an admin's: a 404 proves nothing"
            ) from error
        return None


def _ref(request: LabInstanceRequest) -> WorkerRef:
    ref = request.status.worker_ref
    if ref is None:
        raise WorkerLost(Reasons.WORKER_LOST, "it has no place")
    return ref


def _need(request: LabInstanceRequest, topology: Topology) -> Need:
    """What the request says, and never less than the topology will take: CML keeps no lab to a limit."""
    wanted = request.spec.resources
    return Need(
        cpu=max(wanted.cpu or 0, topology.cpu), memory=max(wanted.memory or 0, topology.memory), nodes=topology.nodes
    )


def _fits(needs: Need, had: Need) -> bool:
    return needs.nodes <= had.nodes and needs.cpu <= had.cpu and needs.memory <= had.memory


def _age(lab: Lab) -> tuple[float, str]:
    return lab.created.timestamp() if lab.created else 0.0, lab.id
