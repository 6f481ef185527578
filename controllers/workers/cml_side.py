"""A worker's CML: is it up, is it ours, is it licensed.

Promises that credentials go only to the CML of the status' identity (the client compares, see `sessions`), that a
registration is recorded before it is sent and is not sent again while CML works on it, and that an error is told by
its class: `trouble_of` gives the reason that people read. What is no observation (a throttled login; an open circuit,
unless somebody's call failed since the last check) counts as no failed check. At rest one question is enough most of
the time. Secrets pass through and are kept nowhere. Called by the workers' controller.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from enum import Enum, auto
from weakref import WeakKeyDictionary

from controllers.cml.client import CmlClient, Deregistration
from controllers.cml.errors import (
    CmlAuthError,
    CmlBadAnswer,
    CmlCircuitOpen,
    CmlClosed,
    CmlError,
    CmlFingerprintMismatch,
    CmlForbidden,
    CmlIdentityMismatch,
    CmlInvalid,
    CmlLoginThrottled,
    CmlNotReady,
    CmlOutcomeUnknown,
    CmlRefused,
    CmlTlsError,
    CmlUnavailable,
    CmlUnreachable,
)
from controllers.cml.models import Licensing, SystemHealth, SystemInformation, SystemStats
from controllers.cml.session import normal_identity
from controllers.cml.sessions import CmlNoAddress, CmlNoCredentials, CmlSessions, base_url
from controllers.workers.decisions import at_rest, problem, retry_of
from controllers.workers.kind import TRUST_ANNOTATION, LabWorker
from controllers.workers.phases import Reasons
from controllers.workers.settings import WorkerSettings
from controllers.workers.status import Capacity, Identity, Problem, Registration
from controllers.workers.work import Work
from lrm.crashpoints import crash_point
from lrm.secrets import SecretRefused, Secrets
from storage.clock import Clock

CRASH_POINTS = (
    "workers.license.product-set",
    "workers.license.recorded",
    "workers.license.sent",
    "workers.unlicense.recorded",
)

_UNHEARD = 15.0
"""Seconds after which a registration of which CML shows no sign is sent again; a second one takes no second seat."""
_UNDER_WAY = frozenset({"IN_PROGRESS", "RETRY", "PENDING", "REGISTERING", "COMPLETED"})
"""Registration statuses to wait on. They are free strings: an unknown one is asked to register, which CML may refuse
with 409 where it is not possible now."""
_FAILED = "FAILED"
_CONFLICT = 409

_REASONS: tuple[tuple[type[CmlError], str], ...] = (
    (CmlNotReady, Reasons.CML_NOT_READY),
    (CmlUnavailable, Reasons.UNREACHABLE),
    (CmlFingerprintMismatch, Reasons.IDENTITY_MISMATCH),
    (CmlTlsError, Reasons.TLS_REFUSED),
    (CmlIdentityMismatch, Reasons.IDENTITY_MISMATCH),
    (CmlAuthError, Reasons.CREDENTIALS_REFUSED),
    (CmlNoCredentials, Reasons.SECRET_UNAVAILABLE),
    (CmlNoAddress, Reasons.NO_ADDRESS),
    (CmlInvalid, Reasons.INVALID_SETTING),
    (CmlForbidden, Reasons.NOT_ADMIN),
)


def trouble_of(error: CmlError) -> tuple[str, str] | None:
    """Reason and message of an error; None for one that says nothing new about the CML."""
    if isinstance(error, CmlCircuitOpen | CmlLoginThrottled | CmlClosed):
        return None
    return next((reason for kind, reason in _REASONS if isinstance(error, kind)), Reasons.BAD_ANSWER), str(error)


@dataclass(frozen=True, slots=True)
class Report:
    """What a CML that is up told about itself; None is "not asked" or "did not say"."""

    identity: Identity
    licensing: Licensing
    information: SystemInformation | None = None
    health: SystemHealth | None = None
    stats: SystemStats | None = None


class LicenseStep(Enum):
    """How far a registration is."""

    DONE = auto()
    WAITING = auto()
    FAILED = auto()


class CmlSide:
    """See the module."""

    def __init__(self, sessions: CmlSessions, secrets: Secrets, settings: WorkerSettings) -> None:
        self.sessions = sessions
        self._secrets = secrets
        self._settings = settings
        self._examined: WeakKeyDictionary[CmlClient, float] = WeakKeyDictionary()
        """When a CML last answered all questions, monotonic; another machine or address has another client."""
        self._silent: WeakKeyDictionary[CmlClient, float] = WeakKeyDictionary()
        """When a health check last found a CML unreachable, monotonic."""

    async def check(self, work: Work) -> Report | None:
        """The health check's question: `ask`, and at rest what is enough there. Raises `CmlError`.

        `CmlUnreachable` too where the circuit is open, for it opened, or stayed so, by a failure since the last such
        check: whoever's call that was, it was let through in place of this one. Each failure is told once, and no
        sooner than a poll after the last.
        """
        with self._silence(self.sessions.client_for(work.worker), work.ctx.clock):
            known = work.worker.status.cml.system_info is not None
            return await (self.ask_at_rest(work) if known else self.ask(work, full=True))

    @contextmanager
    def _silence(self, client: CmlClient, clock: Clock) -> Iterator[None]:
        problem: CmlUnreachable | None = None
        try:
            yield
        except CmlCircuitOpen as error:
            last = self._silent.get(client, -math.inf)
            if client.failed_at <= last or clock.monotonic() < last + self._settings.worker_poll_interval:
                raise
            problem = CmlUnreachable(error.why)
        except CmlUnreachable as error:
            problem = error
        if problem is not None:
            self._silent[client] = clock.monotonic()
            raise problem

    async def ask_at_rest(self, work: Work) -> Report | None:
        """The same as `ask` for a worker at rest, of which the licence alone is asked most of the time.

        It is told under a session that only this CML takes, with its identity. Whatever fails, the next question is
        about everything again. Raises `CmlError`.
        """
        client = self.sessions.client_for(work.worker)
        examined = self._examined.get(client, -math.inf)
        is_due = work.ctx.clock.monotonic() >= examined + self._settings.worker_examine_interval
        if is_due or work.asked or not at_rest(work.worker):
            return await self.ask(work)
        work.ctx.check_leading()
        return await _proved(client)

    async def ask(self, work: Work, *, full: bool = False) -> Report | None:
        """Ask the CML who and how it is; None when it answers but is not ready. Raises `CmlError`."""
        work.ctx.check_leading()
        client = self.sessions.client_for(work.worker)
        information = await client.system_information()
        if not information.ready:
            return None
        report = await _proved(client)
        health, stats = None, None
        try:
            health = await client.system_health()
            stats = await client.system_stats() if full else None
        except CmlError as error:
            # It is up and ours; what it did not tell now it may tell at the next look.
            work.log.info("worker.cml_told_less", error=str(error))
        if health is not None:
            self._examined[client] = work.ctx.clock.monotonic()
        return replace(report, information=information, health=health, stats=stats)

    async def note(self, work: Work, report: Report) -> None:
        """Take a report into the status; the same again costs no write."""
        now, template = work.now, self._settings.cml_url_template

        def change(worker: LabWorker) -> None:
            cml = worker.status.cml
            before = cml.wire()
            if report.information is not None:
                cml.version, cml.ready = report.information.version or None, True
            cml.identity, cml.licensed = report.identity, report.licensing.is_licensed
            cml.failed_checks, cml.last_error = 0, None
            cml.trusted = worker.metadata.annotations.get(TRUST_ANNOTATION) or cml.trusted
            cml.api_url = base_url(worker, template)
            if report.health is not None:
                cml.health = _health(report.health)
            if report.information is not None and report.stats is not None:
                cml.system_info = _system_info(report.information, report.stats)
            worker.status.capacity = _capacity(worker.status.capacity, report.stats)
            if cml.wire() != before:
                cml.last_sync_at = now

        await work.write(change)

    async def note_error(self, work: Work, error: CmlError, *, counts: bool, most: int) -> None:
        """Record what a failed call tells of the CML, as `note_trouble`; what tells nothing new changes nothing."""
        if isinstance(error, CmlLoginThrottled):
            known = work.worker.status.cml.last_error
            if known is None or known.reason != Reasons.CREDENTIALS_REFUSED:
                # Another of those who share the session was refused less than a minute ago.
                message = "CML refuses the credentials; they are tried once a minute"
                await self.note_trouble(work, Reasons.CREDENTIALS_REFUSED, message, counts=False, most=most)
        elif trouble := trouble_of(error):
            await self.note_trouble(work, *trouble, counts=counts, most=most)

    async def note_trouble(self, work: Work, reason: str, message: str, *, counts: bool, most: int) -> None:
        """Record that a check failed; failures in a row are counted up to `most`, and then cost no more writes."""
        now = work.now

        def change(worker: LabWorker) -> None:
            cml = worker.status.cml
            known = cml.last_error
            # Nobody there is nobody there: how that shows differs from call to call.
            if not (known and known.reason == reason == Reasons.UNREACHABLE and counts and cml.failed_checks >= most):
                cml.last_error = problem(known, reason, message, now)
            if counts:
                cml.failed_checks = min(cml.failed_checks + 1, most)
            if reason == Reasons.IDENTITY_MISMATCH or cml.failed_checks >= most:
                cml.ready = False

        failed_before = work.worker.status.cml.failed_checks
        await work.write(change)
        if failed_before < most <= work.worker.status.cml.failed_checks:
            work.warn(Reasons.UNHEALTHY, f"{most} health checks in a row failed: {reason}: {message}")

    async def license(self, work: Work) -> LicenseStep:
        """One step towards a licence: look, register if nothing is under way, look again later. Raises `CmlError`."""
        work.ctx.check_leading()
        client = self.sessions.client_for(work.worker)
        licensing = await client.licensing()
        if licensing.is_licensed:
            return LicenseStep.DONE
        status = licensing.registration.status.upper()
        registration = work.worker.status.cml.registration
        sent_at = registration.sent_at if registration is not None and registration.failed is None else None
        # The failure of a token that has been replaced since says nothing: the present one is sent.
        replaced = sent_at is not None and status == _FAILED and _asked(work) != wish_of(work.worker)
        failed = status == _FAILED and work.over(sent_at, self._settings.worker_poll_interval)
        if failed and not replaced:
            why = licensing.registration.register_time.failure or "the licence service refused the registration"
            return await self.license_failed(work, Reasons.LICENSE_FAILED, why)
        began = work.worker.status.timestamps.licensing_started_at
        if not replaced and work.over(began, self._settings.worker_license_deadline):
            seen = f"registration {status or 'unknown'}, authorization {licensing.authorization.status or 'unknown'}"
            limit = f"{self._settings.worker_license_deadline:g} s"
            return await self.license_failed(work, Reasons.LICENSE_TIMEOUT, f"not licensed within {limit}: {seen}")
        if work.observe_only:
            return LicenseStep.WAITING
        due = replaced or sent_at is None or (status != _FAILED and work.over(sent_at, _UNHEARD))
        if due and status not in _UNDER_WAY:
            return await self._register(work, licensing)
        return LicenseStep.WAITING

    async def _register(self, work: Work, licensing: Licensing) -> LicenseStep:
        # What was asked goes with what is sent: each write below may bring a newer spec.
        spec, asked = work.worker.spec.cml, wish_of(work.worker)
        if spec.license_token_from is None:
            message = "spec.cml.licenseTokenFrom names no token"
            return await self.license_failed(work, Reasons.NO_LICENSE, message, asked)
        try:
            token = self._secrets.read(spec.license_token_from)
        except SecretRefused as error:
            return await self.license_failed(work, Reasons.SECRET_UNAVAILABLE, str(error), asked)
        client = self.sessions.client_for(work.worker)
        now, again = work.now, _asked(work) != asked

        def sending(worker: LabWorker) -> None:
            worker.status.cml.registration = Registration(sent_at=now, generation=asked[0], retry=asked[1])
            if again:
                worker.status.timestamps.licensing_started_at = now  # another token has a time of its own

        try:
            if spec.product_license and licensing.product_license.active != spec.product_license:
                work.ctx.check_leading()
                await client.set_product_license(spec.product_license)
                crash_point("workers.license.product-set")
            await work.write(sending)
            crash_point("workers.license.recorded")
            work.ctx.check_leading(work.ctx.creating_timeout)
            await client.register(token, timeout=work.ctx.creating_timeout)
            crash_point("workers.license.sent")
            work.log.info("worker.license_registering")
        except CmlOutcomeUnknown as error:
            work.log.warning("worker.license_outcome_unknown", error=str(error))
        except (CmlForbidden, CmlRefused, CmlInvalid) as error:
            if isinstance(error, CmlRefused) and error.status == _CONFLICT:
                return LicenseStep.WAITING  # not possible now, as one is under way
            reason = Reasons.NOT_ADMIN if isinstance(error, CmlForbidden) else Reasons.LICENSE_REFUSED
            return await self.license_failed(work, reason, str(error).replace(token, "***"), asked)
        except CmlBadAnswer as error:
            work.log.warning("worker.license_bad_answer", error=str(error))
        return LicenseStep.WAITING

    async def deregister(self, work: Work) -> Deregistration:
        """Give the licence seat back. Raises `CmlError`.

        That it was asked stands in the status before: CML answers a repetition "already", which does not tell whether
        Cisco was told the first time.
        """
        now = work.now

        def sending(worker: LabWorker) -> None:
            worker.status.cml.deregistration_sent_at = worker.status.cml.deregistration_sent_at or now

        await work.write(sending)
        crash_point("workers.unlicense.recorded")
        work.ctx.check_leading()
        outcome = await self.sessions.client_for(work.worker).deregister()
        work.log.info("worker.license_returned", outcome=outcome.value)
        return outcome

    async def license_failed(
        self, work: Work, reason: str, message: str, asked: tuple[int, str | None] | None = None
    ) -> LicenseStep:
        """Record why there is no licence, and for which wish (else the one sent): the same is not tried again."""
        now, (generation, retry) = work.now, asked or _asked(work)
        work.log.warning("worker.license_failed", reason=reason, detail=message)
        failed = Problem(reason=reason, message=message, at=now)
        record = Registration(failed=failed, generation=generation, retry=retry)
        await work.write(lambda w: setattr(w.status.cml, "registration", record))
        work.warn(reason, message)
        return LicenseStep.FAILED


async def _proved(client: CmlClient) -> Report:
    """Who the CML is and what it is licensed for. Raises `CmlError`."""
    session = await client.proven_session()
    licensing = await client.licensing()
    told = normal_identity(licensing.udi.product_uuid)
    if told != session.identity:
        # Under a session that was proved: a machine that came from a copy of ours takes its tokens too.
        raise CmlIdentityMismatch(session.identity or "", told)
    return Report(Identity(product_uuid=told, fingerprint=client.peer_fingerprint), licensing)


def wish_of(worker: LabWorker) -> tuple[int, str | None]:
    """What a person can change so that a failed registration is tried again."""
    return worker.metadata.generation, retry_of(worker)


def _asked(work: Work) -> tuple[int, str | None]:
    """The wish for which the registration under way was sent; without one, that of this reconcile's beginning."""
    sent = work.worker.status.cml.registration
    return (sent.generation, sent.retry) if sent is not None and sent.sent_at is not None else work.wish


def _health(health: SystemHealth) -> dict[str, object]:
    """What is worth keeping of a health report: verdicts, no measurements."""
    computes = health.computes.values()
    return {
        "valid": health.valid,
        "isLicensed": health.is_licensed,
        "isEnterprise": health.is_enterprise,
        "controllerValid": health.controller.valid,
        "computes": len(health.computes),
        "computesValid": sum(c.valid is True for c in computes),
    }


def _system_info(information: SystemInformation, stats: SystemStats) -> dict[str, object]:
    return {
        "version": information.version,
        "features": list(information.features),
        "computes": sorted(c.hostname for c in stats.computes.values()),
        "cpuModel": next((c.stats.cpu.model for c in stats.computes.values() if c.stats.cpu.model), ""),
    }


def _capacity(old: Capacity | None, stats: SystemStats | None) -> Capacity:
    """What the machine has; nodes and slots follow from licence and spec, wherever the status is written."""
    capacity = Capacity() if old is None else old.thaw()
    if stats is not None:
        totals = stats.totals
        capacity.cpu = totals.cpu.count or capacity.cpu
        capacity.memory = totals.memory.total or capacity.memory
        capacity.disk = totals.disk.total or capacity.disk
    return capacity
