"""One look at EC2 for all workers at rest in one place, in place of one look each.

Promises ⌈W/1000⌉ DescribeInstances in each `worker_rest_interval` for W workers at rest in a region of an account, and
⌈U/1000⌉ more for U that were adopted to be observed only and need not bear our tags. What it shows may confirm a worker
and may alarm it, never more: `confirm` gives the recorded instance when it is there just as the status has it and no
other carries the worker's uid. For all else (absent, in another state, at another address, a second carrier, one
without our tags) the worker looks itself, and only that look is acted on; one that an earlier answer confirmed and the
next does not is asked to, through `hints`. A stale or failed answer costs a call or an interval, never an instance.
While EC2 refuses all calls, does not answer, or answers of another account, nobody is sent after it: `confirm` raises
that, and EC2 is asked once in a quarter of the interval. Called by the provisioner; the answers end with the term.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import structlog

from controllers.aws.ec2 import Ec2, Ec2Instance
from controllers.aws.errors import AwsAuthError, AwsError, AwsThrottled, AwsUnavailable, AwsWrongAccount
from controllers.aws.place import Place
from controllers.workers.decisions import (
    INSTALLATION_TAG,
    KEEPABLE,
    UID_TAG,
    Goal,
    addresses_of,
    goal_of,
    tags_of,
)
from controllers.workers.kind import LabWorker
from controllers.workers.phases import SERVING, Conditions, Phase
from controllers.workers.settings import WorkerSettings
from controllers.workers.turns import Crowded
from controllers.workers.work import Work
from lrm.cache import Cache
from lrm.controller import Hints, Key
from storage.base import Guard
from storage.clock import Clock

log = structlog.get_logger(__name__)

_USABLE = 2.0
"""Intervals for which an answer is believed."""
_AGAIN = 0.25
"""Intervals after a look that failed before the next one."""
_AT_ONCE = 100
"""Workers that are judged before others have their turn on the event loop."""
_TIMEOUT = 30.0
"""Seconds for all pages."""
_STS_TIMEOUT = 5.0
"""Seconds for the question whose the credentials are, while nobody at rest in the place can go on."""
_FOR_ALL = (AwsThrottled, AwsAuthError, AwsUnavailable)
"""What is not about one question: whoever asked another one would hear the same, or wait as long for nothing."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What EC2 showed of one place; `begun` is monotonic, in seconds."""

    begun: float
    instances: dict[str, Ec2Instance]
    """All of the installation that have not ended, by id, and those that are only observed."""
    carriers: Counter[str]
    """How many of them carry a uid."""

    @classmethod
    def of(cls, begun: float, found: Iterable[Ec2Instance]) -> Answer:
        instances = {instance.id: instance for instance in found}
        return cls(begun, instances, Counter(i.tags.get(UID_TAG, "") for i in instances.values()))

    def confirms(self, worker: LabWorker, installation: str, *, observed: bool) -> Ec2Instance | None:
        """The worker's instance, if nothing is to be done about it; `observed`: nothing would be done anyway."""
        ec2 = worker.status.ec2
        mine = self.instances.get(ec2.instance_id or "")
        if mine is None or (mine.state, addresses_of(mine)) != (ec2.state, (ec2.public_ip, ec2.private_ip)):
            return None
        if not worker.spec.adopts:
            alone = self.carriers[worker.uid] == 1 and mine.tags.get(UID_TAG) == worker.uid
            return mine if alone else None
        wanted = {**worker.spec.aws.tags, **tags_of(worker, installation)}
        return mine if observed or wanted.items() <= mine.tags.items() else None


@dataclass(slots=True)
class _Shared:
    """What is known of one place."""

    asking: bool = False
    later: set[Key] = field(default_factory=set)
    """Who came meanwhile, and had nothing to go on with: they are told when it has ended."""
    answer: Answer | None = None
    confirmed: set[str] = field(default_factory=set)
    """Uids of workers that the answer confirms."""
    failed: float | None = None
    """When a look failed, monotonic, while none has succeeded since."""
    refusal: AwsError | None = None
    """Why, where that is about all questions."""


class Ec2Looks:
    """See the module; used on one event loop."""

    def __init__(self, ec2: Ec2, settings: WorkerSettings, installation: str) -> None:
        self.hints = Hints()
        """Workers that should look themselves now."""
        self._ec2 = ec2
        self._interval = settings.worker_rest_interval
        self._installation = installation
        self._term: tuple[Guard, ...] = ()
        self._places: dict[Place, _Shared] = {}
        self._changed: dict[str, float] = {}
        """When something of a worker was last changed in EC2, by uid, while an answer may be older than that."""

    @contextmanager
    def changing(self, work: Work) -> Iterator[None]:
        """Surround every change of a worker's instances: no answer that was begun before its end is believed of it."""
        try:
            yield
        finally:
            now = work.ctx.clock.monotonic()
            recent = {uid: at for uid, at in self._changed.items() if at > now - self._interval * _USABLE}
            self._changed = {**recent, work.worker.uid: now}

    async def confirm(self, work: Work) -> Ec2Instance | None:
        """The worker's instance if a shared look confirms it; None: look yourself.

        Raises `AwsError` where EC2 can be asked nothing, `Crowded` where somebody asks now, and `NotLeading`.
        """
        worker = work.worker
        if work.asked or not rests(worker):
            return None
        answer = await self._answer(worker.spec.place, work)
        changed = self._changed.get(worker.uid)
        if answer is None or (changed is not None and answer.begun <= changed):
            return None
        return answer.confirms(worker, self._installation, observed=work.observe_only)

    async def _answer(self, place: Place, work: Work) -> Answer | None:
        """The present answer of a place; looks if it is time to."""
        clock, term = work.ctx.clock, work.ctx.guards()
        if term != self._term:
            # Another leader may have changed what this one has not heard of.
            self._term, self._places, self._changed = term, {}, {}
        shared = self._places.setdefault(place, _Shared())
        if self._due(shared, clock) and not shared.asking:
            shared.asking = True
            try:
                await self._look(place, shared, work)
            finally:
                shared.asking = False
                later, shared.later = shared.later, set()
                for key in sorted(later):
                    self.hints.tell(key)
        if self._usable(shared, clock):
            return shared.answer
        if shared.refusal is not None:
            raise shared.refusal.with_traceback(None)
        if shared.asking:
            # Nobody waits here: a place that hangs would have them all.
            shared.later.add((work.worker.namespace, work.worker.name))
            raise Crowded
        return None

    def _due(self, shared: _Shared, clock: Clock) -> bool:
        if shared.failed is not None:
            return clock.monotonic() >= shared.failed + self._interval * _AGAIN
        return shared.answer is None or clock.monotonic() >= shared.answer.begun + self._interval

    def _usable(self, shared: _Shared, clock: Clock) -> bool:
        return shared.answer is not None and clock.monotonic() < shared.answer.begun + self._interval * _USABLE

    async def _look(self, place: Place, shared: _Shared, work: Work) -> None:
        clock = work.ctx.clock
        begun = clock.monotonic()
        work.ctx.check_leading()
        try:
            answer = Answer.of(begun, await self._ask(place, work))
            await self._check_account(place, answer, work)
        except AwsError as error:
            if shared.failed is None:
                log.warning("workers.shared_look_failed", place=str(place), error=str(error))
            shared.failed, shared.refusal = clock.monotonic(), error if isinstance(error, _FOR_ALL) else None
        except Exception:
            # A mistake here costs calls, not all the workers of the place.
            log.exception("workers.shared_look_defect", place=str(place))
            shared.failed, shared.refusal = clock.monotonic(), None
        else:
            shared.answer, shared.failed, shared.refusal = answer, None, None
            await self._alarm(place, shared, answer, work)

    async def _ask(self, place: Place, work: Work) -> list[Ec2Instance]:
        tags = {INSTALLATION_TAG: self._installation}
        found = await self._ec2.find_by_tags(place, tags, states=KEEPABLE, timeout=_TIMEOUT)
        shown = {instance.id for instance in found}
        # What is only observed need not bear our tags, so it is asked for by id, 1,000 a call.
        ids = [i for i in self._observed(place, work) if i not in shown]
        return [*found, *(await self._ec2.describe_fleet(place, ids, {}, unmarked=ids)).values()]

    async def _check_account(self, place: Place, answer: Answer, work: Work) -> None:
        """Raise `AwsWrongAccount` where an answer shows nobody's instance, and is of none of their accounts.

        Else each would look for itself, and then ask this.
        """
        owners: set[str] = set()
        for some in _in_turns(_at(work.ctx.cache, place)):
            for worker in some:
                ec2 = worker.status.ec2
                if ec2.owner_id is not None and rests(worker):
                    if ec2.instance_id in answer.instances:
                        return
                    owners.add(ec2.owner_id)
            await work.ctx.clock.sleep(0)
        wrong: AwsWrongAccount | None = None
        for owner in sorted(owners):
            work.ctx.check_leading()
            try:
                await self._ec2.check_owner(place, owner, timeout=_STS_TIMEOUT)
            except AwsWrongAccount as error:
                wrong = error
            except AwsError as error:
                log.info("workers.account_not_known", place=str(place), error=str(error))
                return  # no word on the account: what the answer shows stands
            else:
                return
        if wrong is not None:
            raise wrong

    def _observed(self, place: Place, work: Work) -> list[str]:
        """The instances of workers at rest that were adopted and are only observed."""
        return [
            w.status.ec2.instance_id
            for w in _at(work.ctx.cache, place)
            if w.spec.adopts and _is_observed(w, work) and w.status.ec2.instance_id and rests(w)
        ]

    async def _alarm(self, place: Place, shared: _Shared, answer: Answer, work: Work) -> None:
        """Have those look themselves whom the answer before confirmed, and this one does not."""
        confirmed: set[str] = set()
        for some in _in_turns(_at(work.ctx.cache, place)):
            for worker in some:
                if not rests(worker):
                    continue
                if answer.confirms(worker, self._installation, observed=_is_observed(worker, work)) is not None:
                    confirmed.add(worker.uid)
                elif worker.uid in shared.confirmed and worker.uid != work.worker.uid:
                    self.hints.tell((worker.namespace, worker.name))
            await work.ctx.clock.sleep(0)
        shared.confirmed = confirmed


def rests(worker: LabWorker) -> bool:
    """Whether all that is expected of EC2 is that the instance stays as it is."""
    status, goal = worker.status, goal_of(worker)
    surplus = status.condition(Conditions.SURPLUS_INSTANCES)
    if surplus is not None and surplus.status == "True":
        return False
    if status.phase in SERVING:
        return goal is Goal.READY and status.ec2.state == "running"
    return status.phase == Phase.STOPPED and goal in (Goal.STOPPED, Goal.DRAINING) and status.ec2.state == "stopped"


def _is_observed(worker: LabWorker, work: Work) -> bool:
    """Whether nothing of a worker may be changed, as `work.observe_only` says of its own."""
    return work.ctx.observe_only or worker.spec.observe_only


def _at(cache: Cache, place: Place) -> list[LabWorker]:
    return [w for w in cache.by_index(LabWorker, "region", place.region) if w.spec.place == place]


def _in_turns(workers: Sequence[LabWorker]) -> Iterable[Sequence[LabWorker]]:
    return (workers[start : start + _AT_ONCE] for start in range(0, len(workers), _AT_ONCE))
