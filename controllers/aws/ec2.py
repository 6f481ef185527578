"""EC2 for controllers: asyncio's face over boto3, whose calls run in a few threads.

Promises: nothing blocks the event loop; every call ends by its `timeout` (seconds, on the given clock) and raises one
of `controllers.aws.errors`; no error, missing page or broken answer is told as "nothing there". A creating call
(`run_instance`) and a repeatable write (start, stop, terminate, tags) are tried once; reads are retried by botocore.
After a timeout `AwsUnavailable` means that nothing was sent, and nothing will be; `AwsOutcomeUnknown` that it was.
Does not promise that EC2 is of one mind: for seconds after a launch a describe may not know the instance, and a look by
tag may not find it. Endpoint and credentials are boto3's own business (AWS_ENDPOINT_URL, AWS_PROFILE, …).
Called by the workers' controllers; one object per daemon, closed at its end.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Collection, Iterable, Mapping
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import boto3
import botocore.loaders
import botocore.session
from botocore.config import Config

from controllers.aws.errors import (
    AwsBadInput,
    AwsError,
    AwsOutcomeUnknown,
    AwsServerError,
    AwsUnavailable,
    Ec2NotFound,
    Effect,
    from_botocore,
    no_answer,
)
from controllers.aws.instance import LIVE_STATES, Ec2Instance, InstanceChecks, described, instance_of
from controllers.aws.launch import LaunchParameters
from controllers.aws.threads import Abandoned, Threads, Ticket
from storage.clock import Clock

if TYPE_CHECKING:
    from mypy_boto3_ec2 import EC2Client

__all__ = ["LIVE_STATES", "Ec2", "Ec2Instance", "InstanceChecks", "LaunchParameters"]

CREATE_TIMEOUT = 6.0
"""The longest that a creating call may take, seconds: a leader's lease must outlive it."""
READ_TIMEOUT = 20.0
WRITE_TIMEOUT = 60.0

_FILTER_VALUES = 200  # EC2's limit of values in one filter
_STATUS_IDS = 100  # EC2's limit of ids in one DescribeInstanceStatus
_PAGE_SIZE = 1000  # EC2's largest page
_MAX_PAGES = 1000
_IN_FLIGHT = 8  # calls at once


class Ec2:
    """The client; used on one event loop, by any number of tasks."""

    def __init__(self, clock: Clock, *, endpoint_url: str | None = None, profile: str | None = None) -> None:
        self._clock = clock
        self._endpoint_url = endpoint_url
        self._profile = profile
        self._threads = Threads(_IN_FLIGHT, "ec2")
        self._current = threading.local()
        self._clients_lock = threading.Lock()
        self._parsing = threading.Lock()
        self._session: boto3.Session | None = None
        self._clients: dict[tuple[str, Effect], EC2Client] = {}

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Take no more calls and close idle connections; calls whose callers have left end by their socket timeout."""
        self._threads.close()
        for client in list(self._clients.values()):
            client.close()

    async def describe_instance(self, region: str, instance_id: str, *, timeout: float = READ_TIMEOUT) -> Ec2Instance:
        """One instance. Raises `Ec2NotFound` only when EC2 says that it does not exist."""
        request = {"InstanceIds": [_checked(instance_id)]}
        answer = await self._call(Effect.READ, region, "DescribeInstances", request, timeout)
        for instance in described(answer, region):
            if instance.id == instance_id:
                return instance
        raise AwsServerError(
            "NoAnswer", f"neither {instance_id} nor an error", operation="DescribeInstances", region=region
        )

    async def describe_instances(
        self, region: str, instance_ids: Iterable[str], *, timeout: float = READ_TIMEOUT
    ) -> dict[str, Ec2Instance]:
        """Those of the instances that exist, by id; an id that is missing was in no page of a complete answer."""
        # By filter and not by InstanceIds: one unknown id there would make EC2 refuse to describe all the others.
        wanted = sorted({_checked(instance_id) for instance_id in instance_ids})
        found: dict[str, Ec2Instance] = {}
        deadline = self._clock.monotonic() + timeout
        for some in _chunks(wanted, _FILTER_VALUES):
            filters = [{"Name": "instance-id", "Values": some}]
            found |= {i.id: i async for i in self._described(region, filters, deadline) if i.id in some}
        return found

    async def find_by_tags(
        self,
        region: str,
        tags: Mapping[str, str],
        *,
        states: Collection[str] = LIVE_STATES,
        timeout: float = READ_TIMEOUT,
    ) -> list[Ec2Instance]:
        """Every instance that carries all these tags and is in one of these states, oldest launch first, all pages."""
        if not tags or not states:
            raise ValueError("find_by_tags without a tag or a state would mean every instance of the account, or none")
        if any("\\" in value for value in tags.values()):
            raise ValueError("find_by_tags: EC2's filters cannot be trusted with a backslash")
        filters = [{"Name": f"tag:{key}", "Values": [value]} for key, value in sorted(tags.items())]
        filters.append({"Name": "instance-state-name", "Values": sorted(states)})
        deadline = self._clock.monotonic() + timeout
        # EC2 reads * and ? in values as wildcards, so what it finds is checked here again.
        found = {
            i.id: i
            async for i in self._described(region, filters, deadline)
            if i.state in states and tags.items() <= i.tags.items()
        }
        return sorted(found.values(), key=lambda i: (i.launch_time.timestamp() if i.launch_time else 0.0, i.id))

    async def instance_status(
        self, region: str, instance_ids: Iterable[str], *, timeout: float = READ_TIMEOUT
    ) -> dict[str, InstanceChecks]:
        """The status checks of those of the instances that exist, by id."""
        wanted = sorted({_checked(instance_id) for instance_id in instance_ids})
        deadline = self._clock.monotonic() + timeout
        checks: dict[str, InstanceChecks] = {}
        for some in _chunks(wanted, _STATUS_IDS):
            try:
                checks |= await self._status(region, some, deadline)
            except Ec2NotFound:
                # One unknown id makes EC2 refuse them all: ask for those that exist.
                known = await self.describe_instances(region, some, timeout=deadline - self._clock.monotonic())
                if known:
                    checks |= await self._status(region, sorted(known), deadline)
        return checks

    async def run_instance(
        self, region: str, parameters: LaunchParameters, *, timeout: float = CREATE_TIMEOUT
    ) -> Ec2Instance:
        """Launch one instance, trying once, for at most 6 s. After `AwsOutcomeUnknown`, look by tag before anything."""
        operation = "RunInstances"
        deadline = self._clock.monotonic() + min(timeout, CREATE_TIMEOUT)
        try:
            answer = await self._call(
                Effect.CREATING, region, operation, dict(parameters.request()), min(timeout, CREATE_TIMEOUT)
            )
        except AwsBadInput as error:
            if error.code != "InvalidParameterDependency" or not parameters.sends_iops:
                raise
            return await self._launched_after_all(region, parameters, error, deadline)
        instances = answer.get("Instances") or []
        if len(instances) != 1 or not instances[0].get("InstanceId"):
            raise AwsOutcomeUnknown("NoAnswer", "the answer names no instance", operation=operation, region=region)
        return instance_of(instances[0])

    async def start(self, region: str, instance_id: str, *, timeout: float = WRITE_TIMEOUT) -> str:
        """Start a stopped instance and return the state it is in now; one that runs stays as it is."""
        return await self._change(region, instance_id, "StartInstances", "StartingInstances", timeout)

    async def stop(self, region: str, instance_id: str, *, timeout: float = WRITE_TIMEOUT) -> str:
        """Stop an instance and return the state it is in now; one that is stopped stays as it is."""
        return await self._change(region, instance_id, "StopInstances", "StoppingInstances", timeout)

    async def terminate(self, region: str, instance_id: str, *, timeout: float = WRITE_TIMEOUT) -> str:
        """Terminate an instance and return the state it is in now; one that has ended is fine until EC2 forgets it."""
        return await self._change(region, instance_id, "TerminateInstances", "TerminatingInstances", timeout)

    async def create_tags(
        self, region: str, instance_id: str, tags: Mapping[str, str], *, timeout: float = WRITE_TIMEOUT
    ) -> None:
        """Add or overwrite tags; the others stay."""
        request = {
            "Resources": [_checked(instance_id)],
            "Tags": [{"Key": key, "Value": value} for key, value in sorted(tags.items())],
        }
        await self._call(Effect.REPEATABLE, region, "CreateTags", request, timeout)

    async def _launched_after_all(
        self, region: str, parameters: LaunchParameters, refusal: AwsBadInput, deadline: float
    ) -> Ec2Instance:
        """The instance of a launch that was refused too late.

        EC2 cannot miss Iops in a request that has them. Moto does, as it loses them on the way to the volume, and has
        launched the instance by then; it must not go astray. (Moto cannot filter by client token.)
        """
        if not parameters.tags:
            raise refusal
        left = deadline - self._clock.monotonic()
        try:
            found = await self.find_by_tags(region, parameters.tags, timeout=left)
        except AwsError as error:
            raise AwsOutcomeUnknown(
                refusal.code, f"refused, but perhaps launched: {error}", operation="RunInstances", region=region
            ) from error
        mine = [instance for instance in found if instance.client_token == parameters.client_token]
        if not mine:
            raise refusal
        return mine[-1]

    async def delete_tags(
        self, region: str, instance_id: str, keys: Iterable[str], *, timeout: float = WRITE_TIMEOUT
    ) -> None:
        """Remove tags, whatever their values; those that are not there are fine."""
        tags = [{"Key": key} for key in sorted(keys)]
        if not tags:
            raise ValueError("delete_tags without a key would mean every tag of the instance")
        request = {"Resources": [_checked(instance_id)], "Tags": tags}
        await self._call(Effect.REPEATABLE, region, "DeleteTags", request, timeout)

    async def _change(self, region: str, instance_id: str, operation: str, answers: str, timeout: float) -> str:
        request = {"InstanceIds": [_checked(instance_id)]}
        answer = await self._call(Effect.REPEATABLE, region, operation, request, timeout)
        for change in answer.get(answers) or ():
            if change.get("InstanceId") == instance_id and change.get("CurrentState"):
                return str(change["CurrentState"].get("Name", ""))
        raise AwsServerError("NoAnswer", f"the answer lacks {instance_id}", operation=operation, region=region)

    async def _status(self, region: str, instance_ids: list[str], deadline: float) -> dict[str, InstanceChecks]:
        request = {"InstanceIds": instance_ids, "IncludeAllInstances": True}
        checks: dict[str, InstanceChecks] = {}
        async for page in self._pages(region, "DescribeInstanceStatus", request, "InstanceStatuses", deadline):
            for status in page["InstanceStatuses"]:
                checks[status["InstanceId"]] = InstanceChecks(
                    state=str((status.get("InstanceState") or {}).get("Name", "")),
                    system=str((status.get("SystemStatus") or {}).get("Status", "")),
                    instance=str((status.get("InstanceStatus") or {}).get("Status", "")),
                )
        return checks

    async def _described(
        self, region: str, filters: list[dict[str, Any]], deadline: float
    ) -> AsyncIterator[Ec2Instance]:
        request = {"Filters": filters, "MaxResults": _PAGE_SIZE}
        async for page in self._pages(region, "DescribeInstances", request, "Reservations", deadline):
            for instance in described(page, region):
                yield instance

    async def _pages(
        self, region: str, operation: str, request: dict[str, Any], part: str, deadline: float
    ) -> AsyncIterator[dict[str, Any]]:
        """Every page of a read, each with `part` in it; raises rather than end early."""
        token, seen = "", set[str]()
        for _ in range(_MAX_PAGES):
            more = {"NextToken": token} if token else {}
            answer = await self._call(
                Effect.READ, region, operation, request | more, deadline - self._clock.monotonic()
            )
            if part not in answer:
                raise AwsServerError("NoAnswer", f"the answer lacks {part}", operation=operation, region=region)
            yield answer
            token = str(answer.get("NextToken") or "")
            if not token:
                return
            if token in seen:
                break
            seen.add(token)
        raise AwsServerError("EndlessPages", "the pages do not come to an end", operation=operation, region=region)

    async def _call(
        self, effect: Effect, region: str, operation: str, request: Mapping[str, Any], timeout: float
    ) -> dict[str, Any]:
        ticket = Ticket()

        def work() -> dict[str, Any]:
            self._current.ticket = ticket
            try:
                client = self._client(region, effect)
                answer: dict[str, Any] = _METHODS[operation](client)(**request)
            except Abandoned:
                raise
            except Exception as error:  # noqa: BLE001 - urllib3's and socket's own get through botocore
                # Mapped here, in the thread, so that nothing of botocore ever reaches a task.
                raise from_botocore(error, effect, operation=operation, region=region, sent=ticket.sent) from None
            finally:
                self._end_parse()
            return answer

        if timeout <= 0:
            raise AwsUnavailable("DeadlineExceeded", "no time was left to ask", operation=operation, region=region)
        try:
            async with self._clock.timeout(timeout):
                answer = await self._threads.run(work)
        except TimeoutError:
            if ticket.abandon():
                raise no_answer(
                    effect, "DeadlineExceeded", f"no answer within {timeout:.3g} s", operation=operation, region=region
                ) from None
            raise AwsUnavailable(
                "DeadlineExceeded", f"not sent within {timeout:.3g} s", operation=operation, region=region
            ) from None
        except asyncio.CancelledError:
            ticket.abandon()
            raise
        if not answer.get("ResponseMetadata", {}).get("RequestId"):
            # botocore takes any XML for an answer, of a captive portal too, with nothing in it.
            kind: type[AwsError] = AwsOutcomeUnknown if effect is Effect.CREATING else AwsServerError
            raise kind("NoAnswer", "the answer is not from EC2", operation=operation, region=region)
        return answer

    def _client(self, region: str, effect: Effect) -> EC2Client:
        """The client of a region for calls of this class. Runs in a thread: making the first one takes 0.3 s."""
        with self._clients_lock:
            client = self._clients.get((region, effect))
            if client is None:
                if self._session is None:
                    core = botocore.session.Session()
                    core.register_component("data_loader", _LOADER)
                    self._session = boto3.Session(profile_name=self._profile, botocore_session=core)
                client = self._session.client(
                    "ec2", region_name=region, endpoint_url=self._endpoint_url, config=_CONFIGS[effect]
                )
                client.meta.events.register("before-send.ec2", self._before_send)
                client.meta.events.register("before-parse.ec2", self._begin_parse)
                client.meta.events.register("response-received.ec2", self._end_parse)
                self._clients[region, effect] = client
            return client

    def _before_send(self, **_: Any) -> None:
        """Called by botocore before each attempt, in the calling thread; returning None lets it go on."""
        ticket: Ticket = self._current.ticket
        ticket.begin_send()

    def _begin_parse(self, **_: Any) -> None:
        """Called by botocore before it parses an answer: eight parsing threads would keep the event loop waiting."""
        self._parsing.acquire()
        self._current.parses = True

    def _end_parse(self, **_: Any) -> None:
        if getattr(self._current, "parses", False):
            self._current.parses = False
            self._parsing.release()


_LOADER = botocore.loaders.create_loader()
"""Reads and keeps botocore's description of EC2: 0.2 s and many megabytes, once per process."""


def _config(connect: float, read: float, **retries: Any) -> Config:
    return Config(
        connect_timeout=connect,
        read_timeout=read,
        retries=retries,  # type: ignore[arg-type]  # the stub knows no keyword form
        max_pool_connections=_IN_FLIGHT,
        user_agent_extra="lrm",
    )


_CONFIGS = {
    Effect.READ: _config(4, 15, mode="adaptive", total_max_attempts=3),
    Effect.CREATING: _config(2, CREATE_TIMEOUT, mode="standard", total_max_attempts=1),
    Effect.REPEATABLE: _config(4, WRITE_TIMEOUT, mode="standard", total_max_attempts=1),
}

_METHODS: dict[str, Callable[[EC2Client], Callable[..., Any]]] = {
    "DescribeInstances": lambda client: client.describe_instances,
    "DescribeInstanceStatus": lambda client: client.describe_instance_status,
    "RunInstances": lambda client: client.run_instances,
    "StartInstances": lambda client: client.start_instances,
    "StopInstances": lambda client: client.stop_instances,
    "TerminateInstances": lambda client: client.terminate_instances,
    "CreateTags": lambda client: client.create_tags,
    "DeleteTags": lambda client: client.delete_tags,
}


def _checked(instance_id: str) -> str:
    if not instance_id:
        raise ValueError("an instance id is needed: EC2 takes none for all")
    return instance_id


def _chunks(ids: list[str], size: int) -> Iterable[list[str]]:
    return (ids[start : start + size] for start in range(0, len(ids), size))
