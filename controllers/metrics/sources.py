"""The three sources of a fleet's metrics, each asked in its cheapest way, none of which raises: EC2, CloudWatch, CML.

For W workers of a place (a region of an account) whose instances exist and bear our mark a refresh makes ⌈W/1000⌉
DescribeInstances, ⌈W/1000⌉ DescribeInstanceStatus and ⌈2W/500⌉ GetMetricData; what others cost `Ec2.describe_fleet`
says. Where EC2 shows no instance of an account, one GetCallerIdentity tells whether it could. Each CML is asked four
questions through the session that all of lrm shares, with its breaker and its identity rules. An error is told as
`Trouble`, of the source and the worker that it concerns; after the first refusal for credentials or rate nothing more
is asked of that source there. Called by the refresh.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

from controllers.aws.cloudwatch import METRICS_MOST, CloudWatch, Metric, cpu, memory
from controllers.aws.ec2 import Ec2, Ec2Instance, InstanceChecks
from controllers.aws.errors import AwsError
from controllers.aws.place import Place
from controllers.cml.errors import CmlAuthError, CmlError, CmlIdentityMismatch, CmlTlsError, CmlUnavailable
from controllers.cml.models import Licensing, Space, SystemHealth, SystemInformation, SystemStats
from controllers.cml.sessions import CmlNoAddress, CmlNoCredentials, CmlSessions
from controllers.metrics.measured import Trouble
from controllers.workers.cml_side import trouble_of
from controllers.workers.decisions import INSTALLATION_TAG
from controllers.workers.kind import LabWorker
from controllers.workers.provisioning import reason_of
from controllers.workers.status import Checks, CloudWatchMeasured, CmlMeasured, Ec2Measured
from storage.clock import Clock

RUNNING, TERMINATED = "running", "terminated"
INSTANCE_NOT_FOUND, WRONG_ACCOUNT = "InstanceNotFound", "WrongAccount"
_PAIRS_A_CALL = METRICS_MOST // 2
_HOPELESS = (CmlUnavailable, CmlAuthError, CmlIdentityMismatch, CmlTlsError, CmlNoAddress, CmlNoCredentials)
"""After one of these a CML is asked nothing more in this refresh."""


class Sources:
    """See the module."""

    def __init__(
        self, ec2: Ec2, cloud_watch: CloudWatch, sessions: CmlSessions, clock: Clock, *, installation: str, at_once: int
    ) -> None:
        self._ec2 = ec2
        self._cloud_watch = cloud_watch
        self._sessions = sessions
        self._clock = clock
        self._tags = {INSTALLATION_TAG: installation}
        self._places = asyncio.Semaphore(at_once)

    async def ec2(
        self, place: Place, owners: Mapping[str, str | None], unmarked: Collection[str] = ()
    ) -> dict[str, Ec2Measured | Trouble]:
        """State and status checks of instances, by id; `unmarked` are those that are known to lack our tags.

        `owners` has the number of the account that each instance was seen in, if it was.
        """
        ids = sorted(owners)
        try:
            found = await self._ec2.describe_fleet(place, ids, self._tags, unmarked=unmarked)
        except AwsError as error:
            return dict.fromkeys(ids, self._aws_trouble(error))
        trouble: Trouble | None = None
        checks: Mapping[str, InstanceChecks] = {}
        try:
            checks = await self._ec2.checks_of_running(place, (i.id for i in found.values() if i.state == RUNNING))
        except AwsError as error:
            trouble = self._aws_trouble(error)
        seen = {instance.owner for instance in found.values()}
        doubts = await self._doubts(place, {o for i, o in owners.items() if o and i not in found} - seen)
        told = {i: self._instance(i, found.get(i), checks.get(i), trouble) for i in ids}
        return told | {i: doubts[o] for i, o in owners.items() if i not in found and o in doubts}

    async def _doubts(self, place: Place, owners: Collection[str]) -> dict[str, Trouble]:
        """Why it proves nothing that EC2 shows no instance of these accounts, by number, where it does not."""
        doubts: dict[str, Trouble] = {}
        for owner in sorted(owners):
            try:
                await self._ec2.check_owner(place, owner)
            except AwsError as error:
                doubts[owner] = self._aws_trouble(error)
        return doubts

    async def cloud_watch(self, place: Place, instance_ids: Iterable[str]) -> dict[str, CloudWatchMeasured | Trouble]:
        """Processor and memory of running instances, by id."""
        ids = sorted(set(instance_ids))
        told: dict[str, CloudWatchMeasured | Trouble] = {}
        for start in range(0, len(ids), _PAIRS_A_CALL):
            some = ids[start : start + _PAIRS_A_CALL]
            metrics = [metric for i in some for metric in (cpu(i), memory(i))]
            try:
                values = await self._cloud_watch.latest(place, metrics)
            except AwsError as error:
                return told | dict.fromkeys(ids[start:], self._aws_trouble(error))
            told |= {i: self._percentages(values, i) for i in some}
        return told

    async def cml(self, worker: LabWorker) -> CmlMeasured | Trouble | None:
        """What a worker's CML tells of itself; None when asking it now would prove nothing."""
        async with self._places:
            told: dict[str, Any] = {}
            trouble: Trouble | None = None
            try:
                client = self._sessions.client_for(worker)
                # The numbers first: their session proves whose they are.
                questions: Sequence[Callable[[], Awaitable[Any]]] = (
                    client.system_stats,
                    client.system_health,
                    client.licensing,
                    client.system_information,
                )
                for question in questions:
                    try:
                        told |= _fields(await question())
                    except _HOPELESS:
                        raise
                    except CmlError as error:
                        trouble = trouble or self._cml_trouble(error)
            except CmlError as error:
                trouble = self._cml_trouble(error)
                if trouble is None and not told:
                    return None
            if trouble is None:
                return CmlMeasured(**told, at=self._clock.now())
            return Trouble(trouble.reason, trouble.message, trouble.at, told)

    def _instance(
        self, instance_id: str, instance: Ec2Instance | None, checks: InstanceChecks | None, trouble: Trouble | None
    ) -> Ec2Measured | Trouble:
        if instance is None:
            return Trouble(INSTANCE_NOT_FOUND, f"EC2 shows no instance {instance_id}", self._clock.now())
        told = {"state": instance.state, "started_at": instance.launch_time if instance.state == RUNNING else None}
        if trouble is not None:
            return Trouble(trouble.reason, trouble.message, trouble.at, told)
        seen = Checks(system=checks.system, instance=checks.instance) if checks is not None else None
        return Ec2Measured(**told, checks=seen, at=self._clock.now())

    def _percentages(self, values: Mapping[Metric, float], instance_id: str) -> CloudWatchMeasured:
        return CloudWatchMeasured(
            cpu_percent=_rounded(values.get(cpu(instance_id))),
            memory_percent=_rounded(values.get(memory(instance_id))),
            at=self._clock.now(),
        )

    def _aws_trouble(self, error: AwsError) -> Trouble:
        return Trouble(reason_of(error), str(error), self._clock.now())

    def _cml_trouble(self, error: CmlError) -> Trouble | None:
        found = trouble_of(error)
        return Trouble(*found, self._clock.now()) if found is not None else None


def _fields(answer: SystemStats | SystemHealth | Licensing | SystemInformation) -> dict[str, Any]:
    """What an answer of CML says, by field of `CmlMeasured`; what it does not say is unknown."""
    match answer:
        case SystemStats():
            totals, computes = answer.totals, answer.computes
            return {
                "cpu_percent": _rounded(totals.cpu.percent),
                "memory_percent": _share(totals.memory),
                "disk_percent": _share(totals.disk),
                "running_nodes": answer.running_nodes if computes else None,
            }
        case SystemHealth():
            return {"healthy": answer.valid}
        case Licensing():
            return {"licensed": answer.is_licensed}
        case SystemInformation():
            return {"version": answer.version or None, "ready": answer.ready}


def _share(space: Space) -> float | None:
    """Used of total, percent; None where either was not told."""
    if space.used is None or not space.total:
        return None
    return _rounded(100 * space.used / space.total)


def _rounded(percent: float | None) -> float | None:
    return None if percent is None else round(min(max(percent, 0.0), 100.0), 2)
