"""Orders about a worker: what is wished of it, as anybody could write it, and what the leader makes of that.

Promises: nothing but the worker's spec and annotations is written here (start, stop and drain are `desiredPhase`, a
licence is `autoLicense` and the annotation `retry`, a refresh is `reconcile-now`); what cannot come true any more is
refused and leaves no trace; an order that another wish has replaced says so. Called by the workers' endpoints.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from controllers.labs.kind import FAILED, SUCCEEDED, SUPERSEDED, WAITING
from controllers.orders import Order, Outcome, since
from controllers.workers.decisions import Goal, goal_of, is_paused, may_license, may_retry
from controllers.workers.departure import listed_since_drain
from controllers.workers.flat import trouble_of
from controllers.workers.kind import LAB_WORKER, WAKE_ANNOTATION, LabWorker
from controllers.workers.phases import SERVING, Conditions, Phase
from controllers.workers.queries import started_labs
from lrm.api.call import Api
from lrm.api.status import RequestError
from lrm.errors import Forbidden, ResourceNotFound
from lrm.resource import RECONCILE_ANNOTATION, RETRY_ANNOTATION

Wished = Literal["Ready", "Stopped", "Draining"]

_ENDING = frozenset({Phase.TERMINATING_EC2, Phase.TERMINATED})
"""Whence no wish leads back."""
_TERMINATED = "Terminated"
"""The wish for an end, which no order takes back: whoever ordered a stop did not mean to keep the machine."""


class WorkerOrders:
    """See the module."""

    def __init__(self, api: Api) -> None:
        self._api = api
        self._client = api.client.bind(owner="", fence=None)

    async def wish(self, worker: LabWorker, phase: Wished, order_id: str) -> Order:
        """Have a worker serve, stopped, or emptied. One that failed at this very wish tries again; an idle one wakes.

        Raises 409 for one whose instance ends or is to end, `Forbidden` for one that is being deleted, and `Invalid`.
        """

        def give(w: LabWorker) -> None:
            _refuse_what_ends(w)
            if w.spec.desired_phase == phase and w.status.phase == Phase.FAILED and not may_retry(w):
                w.metadata.annotations[RETRY_ANNOTATION] = order_id
            if phase == "Ready" and is_paused(w):
                w.metadata.annotations[WAKE_ANNOTATION] = order_id
            w.spec.desired_phase = phase

        def outcome(now: LabWorker) -> Outcome | None:
            wished = now.spec.desired_phase
            if wished != phase:
                return Outcome(SUPERSEDED, f"another wish came after this: {now.name} is to be {wished}")
            # Before the leader has begun with this wish, what is there may be about to go.
            if now.status.observed_generation >= now.metadata.generation:
                reached = _serves(now) if phase == "Ready" else self._rests(now)
                if reached:
                    return Outcome(SUCCEEDED, reached)
            return _stuck(now)

        return await self._order(worker, give, outcome, self._so_far)

    async def license(self, worker: LabWorker, order_id: str) -> Order:
        """Have a worker licensed, and stay so: with `autoLicense`. What failed before is tried again.

        Raises 409 where it needs something else first, and as `wish` does.
        """
        return await self._order(worker, lambda w: _ask_for_licence(w, order_id), _licensing, self._so_far)

    async def refresh(self, worker: LabWorker, order_id: str) -> Order:
        """Have EC2, CloudWatch and CML asked about a worker, and its labs synced, now. Raises 409 once it has ended.

        It is over when the metrics are in its status. An order that another one replaces ends with that one.
        """

        def give(w: LabWorker) -> None:
            if w.status.phase == Phase.TERMINATED:
                raise _conflict(f"{w.name} is Terminated: there is nothing left to ask")
            w.metadata.annotations[RECONCILE_ANNOTATION] = order_id

        def outcome(now: LabWorker) -> Outcome | None:
            metrics, wish = now.status.metrics, now.metadata.annotations.get(RECONCILE_ANNOTATION)
            if metrics is not None and metrics.asked is not None and metrics.asked in (order_id, wish):
                sources = {"EC2": metrics.ec2, "CloudWatch": metrics.cloud_watch, "CML": metrics.cml}
                silent = [f"{name} did not tell: {s.error.message}" for name, s in sources.items() if s.error]
                return Outcome(SUCCEEDED, "; ".join(silent) or f"{now.name} was measured")
            if now.status.ec2.instance_id is None:
                return Outcome(WAITING, f"{now.name} has no instance yet")
            return None

        return await self._order(worker, give, outcome, lambda _: "")

    async def _order(
        self,
        worker: LabWorker,
        give: Callable[[LabWorker], None],
        outcome: Callable[[LabWorker], Outcome | None],
        so_far: Callable[[LabWorker], str],
    ) -> Order:
        written = await self._client.update(worker, give)
        if written is None:
            raise ResourceNotFound(LAB_WORKER.plural, worker.name)

        def present() -> LabWorker | None:
            now = self._api.cache.get(LabWorker, worker.namespace, worker.name)
            return now if now is not None and now.uid == worker.uid else None

        def look() -> Outcome | None:
            now = present()
            return outcome(now) if now is not None else Outcome(FAILED, f"the worker {worker.name} is gone")

        def told() -> str:
            now = present()
            return so_far(now) if now is not None else ""

        return Order(written, worker, since(self._api, written.revision, look), told)

    def _rests(self, now: LabWorker) -> str:
        """In words that it is stopped, or drained where that was wished; empty while it is not."""
        phase, ec2, name = now.status.phase, now.status.ec2, now.name
        if phase == Phase.STOPPED:
            return f"{name} is Stopped"
        launching = phase in (Phase.PENDING, Phase.PROVISIONING_EC2) and not now.spec.adopts
        if launching and ec2.instance_id is None and ec2.sent_at is None:
            return f"{name} is {phase}: no instance is launched until it is started"
        if now.spec.desired_phase == "Draining" and phase == Phase.DRAINING and not self._held_by(now):
            return f"{name} is drained: no lab runs on it, and none is placed there"
        return ""

    def _held_by(self, now: LabWorker) -> str:
        """What a drain waits for."""
        placed, running = len(now.status.allocations), len(started_labs(self._api.cache, now))
        if placed or running:
            return f"lab instances placed on it: {placed}, labs that run: {running}"
        return "" if listed_since_drain(now) else "its labs are not listed yet"

    def _so_far(self, now: LabWorker) -> str:
        parts = [f"{now.name} is {now.status.phase}"]
        if now.status.phase == Phase.DRAINING and (held := self._held_by(now)):
            limit = f", {now.spec.drain_timeout_minutes} min at most" if now.spec.desired_phase == "Stopped" else ""
            parts.append(f"{held}{limit}")
        if trouble := trouble_of(now):
            parts.append(trouble)
        return ": ".join(parts)


def _refuse_what_ends(worker: LabWorker) -> None:
    if worker.deleting:
        raise Forbidden("the spec of an object that is being deleted is frozen")
    if worker.status.phase in _ENDING:
        raise _conflict(f"{worker.name} is {worker.status.phase}: delete it and make another worker")
    if worker.spec.desired_phase == _TERMINATED:
        raise _conflict(f"{worker.name} is to be Terminated: to keep it, change spec.desiredPhase itself")


def _ask_for_licence(worker: LabWorker, order_id: str) -> None:
    _refuse_what_ends(worker)
    name = worker.name
    if worker.status.cml.licensed:
        return
    if worker.spec.cml.license_token_from is None:
        raise _conflict(f"{name} has no licence token: let spec.cml.licenseTokenFrom name one")
    if worker.spec.observe_only:
        raise _conflict(f"{name} is only observed (spec.observeOnly): license it in CML")
    if worker.status.phase == Phase.FAILED:
        raise _conflict(f"{name} has failed: start it first: {trouble_of(worker)}")
    if worker.status.phase == Phase.READY:
        raise _conflict(f"the CML of {name} has lost its licence while it served: stop it and start it again")
    worker.spec.auto_license = True
    if worker.status.phase != Phase.LICENSING:
        worker.metadata.annotations[RETRY_ANNOTATION] = order_id


def _licensing(now: LabWorker) -> Outcome | None:
    registration = now.status.cml.registration
    failed = registration.failed if registration is not None else None
    if now.status.cml.licensed:
        return Outcome(SUCCEEDED, f"{now.name} is licensed")
    if now.spec.desired_phase == _TERMINATED or not now.spec.wants_license:
        wished = "be Terminated" if now.spec.desired_phase == _TERMINATED else "have no licence"
        return Outcome(SUPERSEDED, f"another wish came after this: {now.name} is to {wished}")
    if failed is not None and not may_license(now):
        return Outcome(FAILED, f"{failed.reason}: {failed.message}; mend that and license {now.name} again")
    if now.status.phase == Phase.ACTIVE:
        return Outcome(WAITING, f"{now.name} is Active: it is licensed when no lab runs on it any more")
    stuck = _stuck(now)
    if stuck is None and goal_of(now) is not Goal.READY:
        return Outcome(WAITING, f"{now.name} is {now.status.phase}: it is licensed once it was started")
    return stuck


def _serves(now: LabWorker) -> str:
    """In words that it serves; empty while it does not."""
    if now.status.phase not in SERVING or goal_of(now) is not Goal.READY:
        return ""
    ready = now.status.condition(Conditions.READY)
    if ready is None or ready.status == "True":
        return f"{now.name} is {now.status.phase}"
    return f"{now.name} is {now.status.phase}, but no lab can run there: {ready.reason} {ready.message}".rstrip()


def _stuck(now: LabWorker) -> Outcome | None:
    """Why a wish is not carried out, or not by itself; None where it is."""
    failure = now.status.failure
    if now.deleting:
        return Outcome(FAILED, f"{now.name} is being deleted")
    if now.status.phase in _ENDING:
        return Outcome(FAILED, f"{now.name} is {now.status.phase}: delete it and make another worker")
    if now.status.phase == Phase.FAILED and failure is not None and not may_retry(now):
        return Outcome(FAILED, f"{now.name} failed in {failure.phase}: {trouble_of(now)}; mend that and ask again")
    if now.paused:
        return Outcome(WAITING, f"{now.name} is paused: nothing is done to it until it is not any more")
    if now.spec.observe_only:
        return Outcome(WAITING, f"{now.name} is only observed (spec.observeOnly), and is {now.status.phase}")
    return None


def _conflict(message: str) -> RequestError:
    return RequestError(409, "Conflict", message)
