"""EC2 for controllers: instances looked for, launched, changed and ended.

Promises what `calls` does, and: no error, missing page or broken answer is told as "nothing there". A creating call
(`run_instance`) and a repeatable write (start, stop, terminate, tags) are tried once; reads are retried.
Does not promise that EC2 is of one mind: for seconds after a launch a describe may not know the instance, and a look by
tag may not find it. Called by the workers' controllers and the fleet's metrics; one object per daemon, closed at its
end.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Collection, Iterable, Mapping
from types import TracebackType
from typing import Any, Self

from controllers.aws.accounts import Accounts, accounts_of
from controllers.aws.calls import CREATE_TIMEOUT, READ_TIMEOUT, WRITE_TIMEOUT, AwsCalls
from controllers.aws.errors import (
    AwsBadInput,
    AwsError,
    AwsOutcomeUnknown,
    AwsServerError,
    AwsWrongAccount,
    Ec2NotFound,
    Effect,
)
from controllers.aws.instance import LIVE_STATES, Ec2Instance, InstanceChecks, described, instance_of
from controllers.aws.launch import LaunchParameters
from controllers.aws.place import Place
from controllers.aws.settings import AwsAccount
from storage.clock import Clock

__all__ = ["LIVE_STATES", "Ec2", "Ec2Instance", "InstanceChecks", "LaunchParameters"]

_FILTER_VALUES = 200  # EC2's limit of values in one filter
_STATUS_IDS = 100  # EC2's limit of ids in one DescribeInstanceStatus
_PAGE_SIZE = 1000  # EC2's largest page


class Ec2:
    """The client; used on one event loop, by any number of tasks."""

    def __init__(
        self,
        clock: Clock,
        accounts: Accounts | Mapping[str, AwsAccount] | None = None,
        *,
        endpoint_url: str | None = None,
    ) -> None:
        """`accounts`: those that all services share, or by name, beside the one of the daemon's own credentials."""
        self._clock = clock
        self._accounts = accounts_of(accounts, clock, endpoint_url)
        self._calls = AwsCalls("ec2", clock, self._accounts)
        self._sts = AwsCalls("sts", clock, self._accounts)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Take no more calls and close idle connections; calls whose callers have left end by their socket timeout."""
        self._calls.close()
        self._sts.close()
        self._accounts.close()

    def knows(self, place: Place) -> bool:
        """Whether the settings say what the place's account is and take its region; else nobody is ever asked there."""
        return self._accounts.knows(place)

    def check_named(self, place: Place, namespace: str) -> None:
        """Raise `AwsAccountForbidden` where the settings do not let objects of the namespace name the account."""
        self._accounts.check_named(place, namespace)

    async def check_owner(self, place: Place, owner: str, *, timeout: float = READ_TIMEOUT) -> None:
        """Raise `AwsWrongAccount` unless the credentials for the place are those of the account numbered `owner`.

        Where they are another's, what is not seen with them proves nothing.
        """
        operation = "GetCallerIdentity"
        answer = await self._sts.call(Effect.READ, place, operation, {}, timeout)
        account = str(answer.get("Account") or "")
        if not account:
            raise AwsServerError("NoAnswer", "the answer names no account", operation=operation, place=place)
        if account != owner:
            self._sts.renew_credentials(place)
            message = f"the credentials are those of account {account}, and not of {owner}"
            raise AwsWrongAccount("WrongAccount", message, operation=operation, place=place)

    async def describe_instance(self, place: Place, instance_id: str, *, timeout: float = READ_TIMEOUT) -> Ec2Instance:
        """One instance. Raises `Ec2NotFound` only when EC2 says that it does not exist."""
        request = {"InstanceIds": [_checked(instance_id)]}
        answer = await self._calls.call(Effect.READ, place, "DescribeInstances", request, timeout)
        for instance in described(answer, place):
            if instance.id == instance_id:
                return instance
        raise AwsServerError(
            "NoAnswer", f"neither {instance_id} nor an error", operation="DescribeInstances", place=place
        )

    async def describe_instances(
        self, place: Place, instance_ids: Iterable[str], *, timeout: float = READ_TIMEOUT
    ) -> dict[str, Ec2Instance]:
        """Those of the instances that exist, by id; an id that is missing was in no page of a complete answer."""
        # By filter and not by InstanceIds: one unknown id there would make EC2 refuse to describe all the others.
        wanted = sorted({_checked(instance_id) for instance_id in instance_ids})
        found: dict[str, Ec2Instance] = {}
        deadline = self._clock.monotonic() + timeout
        for some in _chunks(wanted, _FILTER_VALUES):
            filters = [{"Name": "instance-id", "Values": some}]
            found |= {i.id: i async for i in self._described(place, filters, deadline) if i.id in some}
        return found

    async def describe_fleet(
        self,
        place: Place,
        instance_ids: Iterable[str],
        tags: Mapping[str, str],
        *,
        unmarked: Collection[str] = (),
        timeout: float = READ_TIMEOUT,
    ) -> dict[str, Ec2Instance]:
        """The same for many instances in few calls; `unmarked` are those of them that are known to lack `tags`.

        Up to 200 take one call. Else the pages of all that live and carry `tags`, 1,000 a call, unless all are
        unmarked; and by id what those did not show: 1,000 a call, or one more and 200 a call where one is unknown.
        """
        wanted = {_checked(instance_id) for instance_id in instance_ids}
        deadline = self._clock.monotonic() + timeout
        found: dict[str, Ec2Instance] = {}
        if len(wanted) > _FILTER_VALUES and wanted.difference(unmarked):
            carriers = await self.find_by_tags(place, tags, timeout=timeout)
            found = {i.id: i for i in carriers if i.id in wanted}
        for some in _chunks(sorted(wanted - found.keys()), _PAGE_SIZE):
            found |= await self._described_at_once(place, some, deadline)
        return found

    async def find_by_tags(
        self,
        place: Place,
        tags: Mapping[str, str],
        *,
        states: Collection[str] = LIVE_STATES,
        timeout: float = READ_TIMEOUT,
    ) -> list[Ec2Instance]:
        """Every instance that carries all these tags and is in one of these states, oldest launch first, all pages."""
        if not tags:
            raise ValueError("find_by_tags without a tag would mean every instance of the account")
        return await self.find(place, tags=tags, states=states, timeout=timeout)

    async def find(
        self,
        place: Place,
        *,
        tags: Mapping[str, str] | None = None,
        image_id: str = "",
        states: Collection[str] = LIVE_STATES,
        timeout: float = READ_TIMEOUT,
    ) -> list[Ec2Instance]:
        """Every instance with all these tags, of this AMI, in one of these states, oldest launch first, all pages."""
        tags = tags or {}
        if not (tags or image_id) or not states:
            raise ValueError("find without a tag or an AMI would mean every instance of the account, or none")
        if any("\\" in value for value in tags.values()):
            raise ValueError("find: EC2's filters cannot be trusted with a backslash")
        filters = [{"Name": f"tag:{key}", "Values": [value]} for key, value in sorted(tags.items())]
        filters += [{"Name": "image-id", "Values": [image_id]}] if image_id else []
        filters.append({"Name": "instance-state-name", "Values": sorted(states)})
        deadline = self._clock.monotonic() + timeout
        # EC2 reads * and ? in values as wildcards, so what it finds is checked here again.
        found = {
            i.id: i
            async for i in self._described(place, filters, deadline)
            if i.state in states and tags.items() <= i.tags.items() and image_id in ("", i.image_id)
        }
        return sorted(found.values(), key=lambda i: (i.launch_time.timestamp() if i.launch_time else 0.0, i.id))

    async def instance_status(
        self, place: Place, instance_ids: Iterable[str], *, timeout: float = READ_TIMEOUT
    ) -> dict[str, InstanceChecks]:
        """The status checks of those of the instances that exist, by id."""
        wanted = sorted({_checked(instance_id) for instance_id in instance_ids})
        deadline = self._clock.monotonic() + timeout
        checks: dict[str, InstanceChecks] = {}
        for some in _chunks(wanted, _STATUS_IDS):
            try:
                checks |= await self._status(place, some, deadline)
            except Ec2NotFound:
                # One unknown id makes EC2 refuse them all: ask for those that exist.
                known = await self.describe_instances(place, some, timeout=deadline - self._clock.monotonic())
                if known:
                    checks |= await self._status(place, sorted(known), deadline)
        return checks

    async def checks_of_running(
        self, place: Place, instance_ids: Iterable[str], *, timeout: float = READ_TIMEOUT
    ) -> dict[str, InstanceChecks]:
        """The status checks of those of the instances that run, by id, in as few calls as can be.

        EC2 takes 100 ids a call. More are read from the pages of all that runs there, 1,000 a call, unless
        the account has so much else there that ids take fewer.
        """
        wanted = {_checked(instance_id) for instance_id in instance_ids}
        deadline = self._clock.monotonic() + timeout
        checks: dict[str, InstanceChecks] = {}
        if len(wanted) > _STATUS_IDS:
            request, calls = {"MaxResults": _PAGE_SIZE}, 0
            async for page in self._calls.pages(place, "DescribeInstanceStatus", request, "InstanceStatuses", deadline):
                checks |= {i: c for i, c in _checks_in(page) if i in wanted}
                calls += 1
                if not page.get("NextToken"):
                    return checks
                if calls >= len(wanted) / _STATUS_IDS:
                    break
        rest = await self.instance_status(place, wanted - checks.keys(), timeout=deadline - self._clock.monotonic())
        return checks | {i: c for i, c in rest.items() if c.state == "running"}

    async def run_instance(
        self, place: Place, parameters: LaunchParameters, *, timeout: float = CREATE_TIMEOUT
    ) -> Ec2Instance:
        """Launch one instance, trying once, for at most 6 s. After `AwsOutcomeUnknown`, look by tag before anything."""
        operation = "RunInstances"
        deadline = self._clock.monotonic() + min(timeout, CREATE_TIMEOUT)
        try:
            answer = await self._calls.call(
                Effect.CREATING, place, operation, dict(parameters.request()), min(timeout, CREATE_TIMEOUT)
            )
        except AwsBadInput as error:
            if error.code != "InvalidParameterDependency" or not parameters.sends_iops:
                raise
            return await self._launched_after_all(place, parameters, error, deadline)
        instances = answer.get("Instances") or []
        if len(instances) != 1 or not instances[0].get("InstanceId"):
            raise AwsOutcomeUnknown("NoAnswer", "the answer names no instance", operation=operation, place=place)
        return instance_of(instances[0], str(answer.get("OwnerId") or ""))

    async def start(self, place: Place, instance_id: str, *, timeout: float = WRITE_TIMEOUT) -> str:
        """Start a stopped instance and return the state it is in now; one that runs stays as it is."""
        return await self._change(place, instance_id, "StartInstances", "StartingInstances", timeout)

    async def stop(self, place: Place, instance_id: str, *, timeout: float = WRITE_TIMEOUT) -> str:
        """Stop an instance and return the state it is in now; one that is stopped stays as it is."""
        return await self._change(place, instance_id, "StopInstances", "StoppingInstances", timeout)

    async def terminate(self, place: Place, instance_id: str, *, timeout: float = WRITE_TIMEOUT) -> str:
        """Terminate an instance and return the state it is in now; one that has ended is fine until EC2 forgets it."""
        return await self._change(place, instance_id, "TerminateInstances", "TerminatingInstances", timeout)

    async def create_tags(
        self, place: Place, instance_id: str, tags: Mapping[str, str], *, timeout: float = WRITE_TIMEOUT
    ) -> None:
        """Add or overwrite tags; the others stay."""
        request = {
            "Resources": [_checked(instance_id)],
            "Tags": [{"Key": key, "Value": value} for key, value in sorted(tags.items())],
        }
        await self._calls.call(Effect.REPEATABLE, place, "CreateTags", request, timeout)

    async def _launched_after_all(
        self, place: Place, parameters: LaunchParameters, refusal: AwsBadInput, deadline: float
    ) -> Ec2Instance:
        """The instance of a launch that was refused too late.

        EC2 cannot miss Iops in a request that has them. Moto does, as it loses them on the way to the volume, and has
        launched the instance by then; it must not go astray. (Moto cannot filter by client token.)
        """
        if not parameters.tags:
            raise refusal
        left = deadline - self._clock.monotonic()
        try:
            found = await self.find_by_tags(place, parameters.tags, timeout=left)
        except AwsError as error:
            raise AwsOutcomeUnknown(
                refusal.code, f"refused, but perhaps launched: {error}", operation="RunInstances", place=place
            ) from error
        mine = [instance for instance in found if instance.client_token == parameters.client_token]
        if not mine:
            raise refusal
        return mine[-1]

    async def delete_tags(
        self, place: Place, instance_id: str, keys: Iterable[str], *, timeout: float = WRITE_TIMEOUT
    ) -> None:
        """Remove tags, whatever their values; those that are not there are fine."""
        tags = [{"Key": key} for key in sorted(keys)]
        if not tags:
            raise ValueError("delete_tags without a key would mean every tag of the instance")
        request = {"Resources": [_checked(instance_id)], "Tags": tags}
        await self._calls.call(Effect.REPEATABLE, place, "DeleteTags", request, timeout)

    async def _change(self, place: Place, instance_id: str, operation: str, answers: str, timeout: float) -> str:
        request = {"InstanceIds": [_checked(instance_id)]}
        answer = await self._calls.call(Effect.REPEATABLE, place, operation, request, timeout)
        for change in answer.get(answers) or ():
            if change.get("InstanceId") == instance_id and change.get("CurrentState"):
                return str(change["CurrentState"].get("Name", ""))
        raise AwsServerError("NoAnswer", f"the answer lacks {instance_id}", operation=operation, place=place)

    async def _status(self, place: Place, instance_ids: list[str], deadline: float) -> dict[str, InstanceChecks]:
        request = {"InstanceIds": instance_ids, "IncludeAllInstances": True}
        checks: dict[str, InstanceChecks] = {}
        async for page in self._calls.pages(place, "DescribeInstanceStatus", request, "InstanceStatuses", deadline):
            checks |= _checks_in(page)
        return checks

    async def _described_at_once(self, place: Place, ids: list[str], deadline: float) -> dict[str, Ec2Instance]:
        """Those of up to 1,000 instances that exist."""
        if len(ids) > _FILTER_VALUES:
            request = {"InstanceIds": ids}
            pages = self._calls.pages(place, "DescribeInstances", request, "Reservations", deadline)
            try:
                return {i.id: i async for page in pages for i in described(page, place) if i.id in ids}
            except Ec2NotFound:
                pass  # of one at least, and EC2 describes none then: a filter leaves out what it does not know
        return await self.describe_instances(place, ids, timeout=deadline - self._clock.monotonic())

    async def _described(
        self, place: Place, filters: list[dict[str, Any]], deadline: float
    ) -> AsyncIterator[Ec2Instance]:
        request = {"Filters": filters, "MaxResults": _PAGE_SIZE}
        async for page in self._calls.pages(place, "DescribeInstances", request, "Reservations", deadline):
            for instance in described(page, place):
                yield instance


def _checks_in(page: Mapping[str, Any]) -> Iterable[tuple[str, InstanceChecks]]:
    for status in page["InstanceStatuses"]:
        yield (
            status["InstanceId"],
            InstanceChecks(
                state=str((status.get("InstanceState") or {}).get("Name", "")),
                system=str((status.get("SystemStatus") or {}).get("Status", "")),
                instance=str((status.get("InstanceStatus") or {}).get("Status", "")),
            ),
        )


def _checked(instance_id: str) -> str:
    if not instance_id:
        raise ValueError("an instance id is needed: EC2 takes none for all")
    return instance_id


def _chunks(ids: list[str], size: int) -> Iterable[list[str]]:
    return (ids[start : start + size] for start in range(0, len(ids), size))
