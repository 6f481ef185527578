"""The instance part of EC2's API: parameters in, the content of an answer out.

Covers launching, starting, stopping, terminating, describing with filters and pages, status checks, and tags of
instances. Whether an image, a key pair and an instance type exist is asked of a `Catalogue` before; subnets, groups
and profiles are taken as given. Called by `controllers.aws.simulator.server`.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from datetime import UTC, datetime
from itertools import groupby
from typing import Any

from controllers.aws.simulator.instances import CODES, Instance, Instances, Launch
from controllers.aws.simulator.wire import CloudError, flag, items, number, structure, text, texts, tree

_PAGE = 1000
_PRIVATE = frozenset({"Action", "Version", "ClientToken", "DryRun"})
"""What does not count when two launches with one token are compared."""

Answer = dict[str, Any]


class InstanceApi:
    """Answers the actions on instances; `ACTIONS` names them."""

    def __init__(self, instances: Instances) -> None:
        self._instances = instances
        self.actions: dict[str, Callable[[str, Mapping[str, Any]], Answer]] = {
            "StartInstances": self._start,
            "StopInstances": self._stop,
            "TerminateInstances": self._terminate,
            "DescribeInstances": self._describe,
            "DescribeInstanceStatus": self._status,
            "CreateTags": self._create_tags,
            "DeleteTags": self._delete_tags,
            "DescribeTags": self._describe_tags,
        }

    def replayed(self, region: str, parameters: Mapping[str, str]) -> Answer | None:
        """The answer to a launch that was made before; None when it is a new one."""
        token = _token(parameters)
        earlier = self._instances.replay(region, token, _fingerprint(parameters))
        return self._reservation(earlier) if earlier else None

    def launch(self, region: str, parameters: Mapping[str, str]) -> Answer:
        """Launch; image, key pair and type were found to exist."""
        said = tree(parameters)
        lowest = number(said, "MinCount", 0, 1, 100_000)
        count = number(said, "MaxCount", 0, lowest, 10_000)
        tags: dict[str, str] = {}
        for specification in items(said, "TagSpecification"):
            if text(specification, "ResourceType") == "instance":
                tags |= _tags(specification)
        interface = next(iter(items(said, "NetworkInterface")), {})
        device = next(iter(items(said, "BlockDeviceMapping")), {})
        profile = structure(said, "IamInstanceProfile")
        launch = Launch(
            image_id=text(said, "ImageId"),
            instance_type=text(said, "InstanceType", "m1.small"),
            key_name=text(said, "KeyName"),
            subnet_id=text(interface, "SubnetId") or text(said, "SubnetId"),
            group_ids=tuple(texts(interface, "SecurityGroupId") or texts(said, "SecurityGroupId")),
            public_ip=flag(interface, "AssociatePublicIpAddress", default=True),
            profile=text(profile, "Arn") or text(profile, "Name"),
            root_device=text(device, "DeviceName", "/dev/sda1"),
        )
        new = self._instances.run(
            region, launch, tags, count=count, token=_token(parameters), fingerprint=_fingerprint(parameters)
        )
        return self._reservation(new)

    def _start(self, region: str, said: Mapping[str, Any]) -> Answer:
        return self._changes(self._instances.start(region, _ids(said)))

    def _stop(self, region: str, said: Mapping[str, Any]) -> Answer:
        return self._changes(self._instances.stop(region, _ids(said)))

    def _terminate(self, region: str, said: Mapping[str, Any]) -> Answer:
        return self._changes(self._instances.terminate(region, _ids(said)))

    def _describe(self, region: str, said: Mapping[str, Any]) -> Answer:
        ids = texts(said, "InstanceId")
        found = sorted(self._instances.describable(region, ids), key=lambda i: i.sequence)
        chosen = self._filtered(found, said, _FILTERS)
        page, token = _page(chosen, said, by_id=bool(ids), highest=1000)
        reservations = [self._reservation(list(group)) for _, group in groupby(page, key=lambda i: i.reservation)]
        return {"reservationSet": reservations, "nextToken": token}

    def _status(self, region: str, said: Mapping[str, Any]) -> Answer:
        ids = texts(said, "InstanceId")
        if len(ids) > 100:
            raise CloudError("InvalidParameterValue", "At most 100 instance ids can be given.")
        now = self._instances.now
        chosen = self._filtered(self._instances.describable(region, ids), said, _STATUS_FILTERS)
        if not flag(said, "IncludeAllInstances"):
            chosen = [i for i in chosen if i.state_at(now) == "running"]
        page, token = _page(chosen, said, by_id=bool(ids), highest=1000)
        statuses = []
        for instance in page:
            state = instance.state_at(now)
            check = _check(instance, now, self._instances.delay)
            reached = {"ok": "passed", "impaired": "failed", "initializing": "initializing"}.get(check)
            details = [{"name": "reachability", "status": reached}] if reached else []
            statuses.append(
                {
                    "instanceId": instance.id,
                    "availabilityZone": f"{region}a",
                    "instanceState": _state(state),
                    "systemStatus": {"status": check, "details": details},
                    "instanceStatus": {"status": check, "details": details},
                }
            )
        return {"instanceStatusSet": statuses, "nextToken": token}

    def _create_tags(self, region: str, said: Mapping[str, Any]) -> Answer:
        self._instances.tag(region, texts(said, "ResourceId"), _tags(said))
        return {"return": True}

    def _delete_tags(self, region: str, said: Mapping[str, Any]) -> Answer:
        ids = texts(said, "ResourceId")
        wanted = {text(t, "Key"): text(t, "Value") if "Value" in t else None for t in items(said, "Tag")}
        if not wanted:
            every = {key for i in self._instances.describable(region, ids) for key in i.tags}
            wanted = dict.fromkeys(every)
        self._instances.untag(region, ids, wanted)
        return {"return": True}

    def _describe_tags(self, region: str, said: Mapping[str, Any]) -> Answer:
        rows = [
            {"resourceId": i.id, "resourceType": "instance", "key": key, "value": value}
            for i in self._instances.describable(region)
            for key, value in sorted(i.tags.items())
        ]
        names = {"resource-id": "resourceId", "resource-type": "resourceType", "key": "key", "value": "value"}
        for name, matches in _filters(said):
            if name not in names:
                raise CloudError("InvalidParameterValue", f"The filter '{name}' is invalid")
            rows = [row for row in rows if matches([row[names[name]]])]
        return {"tagSet": rows}

    def _filtered(self, found: list[Instance], said: Mapping[str, Any], known: Collection[str]) -> list[Instance]:
        now = self._instances.now
        for name, matches in _filters(said):
            if name not in known and not (name.startswith("tag:") and "tag-key" in known):
                raise CloudError("InvalidParameterValue", f"The filter '{name}' is invalid")
            found = [i for i in found if matches(_values(i, name, now))]
        return found

    def _reservation(self, instances: list[Instance]) -> Answer:
        now = self._instances.now
        return {
            "reservationId": instances[0].reservation,
            "ownerId": self._instances.account,
            "groupSet": [],
            "instancesSet": [_instance(i, self._instances.account, place, now) for place, i in enumerate(instances)],
        }

    def _changes(self, changed: list[tuple[str, Instance]]) -> Answer:
        now = self._instances.now
        return {
            "instancesSet": [
                {
                    "instanceId": after.id,
                    "currentState": _state(after.state_at(now)),
                    "previousState": _state(before),
                }
                for before, after in changed
            ]
        }


def _instance(instance: Instance, account: str, place: int, now: float) -> Answer:
    launch, state = instance.launch, instance.state_at(now)
    public = instance.public_ip if state in ("running", "stopping", "shutting-down") else ""
    private = instance.private_ip if state != "terminated" else ""
    started = _time(instance.started)
    groups = [{"groupId": group, "groupName": group} for group in launch.group_ids]
    disk = {"volumeId": instance.volume, "status": "attached", "attachTime": started, "deleteOnTermination": True}
    profile = launch.profile
    if profile and not profile.startswith("arn:"):
        profile = f"arn:aws:iam::{account}:instance-profile/{profile}"
    reason = {"code": instance.reason, "message": f"{instance.reason}: User initiated shutdown"}
    return {
        "instanceId": instance.id,
        "imageId": launch.image_id,
        "instanceState": _state(state),
        "privateDnsName": f"ip-{private.replace('.', '-')}.ec2.internal" if private else "",
        "dnsName": f"ec2-{public.replace('.', '-')}.compute-1.amazonaws.com" if public else "",
        "reason": instance.transition,
        "keyName": launch.key_name or None,
        "amiLaunchIndex": place,
        "instanceType": launch.instance_type,
        "launchTime": started,
        "placement": {"availabilityZone": f"{instance.region}a", "groupName": "", "tenancy": "default"},
        "monitoring": {"state": "disabled"},
        "subnetId": launch.subnet_id or None,
        "privateIpAddress": private or None,
        "ipAddress": public or None,
        "sourceDestCheck": True,
        "groupSet": groups,
        "stateReason": reason if instance.reason else None,
        "architecture": "x86_64",
        "rootDeviceType": "ebs",
        "rootDeviceName": launch.root_device,
        "blockDeviceMapping": [{"deviceName": launch.root_device, "ebs": disk}] if state != "terminated" else [],
        "virtualizationType": "hvm",
        "clientToken": instance.token,
        "tagSet": [{"key": key, "value": value} for key, value in sorted(instance.tags.items())],
        "hypervisor": "xen",
        "iamInstanceProfile": {"arn": profile} if profile else None,
        "ebsOptimized": False,
    }


def _check(instance: Instance, now: float, delay: float) -> str:
    if instance.state_at(now) != "running":
        return "not-applicable"
    if instance.impaired:
        return "impaired"
    return "ok" if now >= instance.due + delay else "initializing"


_FILTERS: dict[str, Callable[[Instance, str], Iterable[str]]] = {
    "instance-id": lambda i, _: [i.id],
    "instance-state-name": lambda _, state: [state],
    "instance-state-code": lambda _, state: [str(CODES[state])],
    "tag-key": lambda i, _: i.tags,
    "tag-value": lambda i, _: i.tags.values(),
    "client-token": lambda i, _: [i.token],
    "instance-type": lambda i, _: [i.launch.instance_type],
    "image-id": lambda i, _: [i.launch.image_id],
    "key-name": lambda i, _: [i.launch.key_name],
    "subnet-id": lambda i, _: [i.launch.subnet_id],
    "instance.group-id": lambda i, _: i.launch.group_ids,
    "reservation-id": lambda i, _: [i.reservation],
    "availability-zone": lambda i, _: [f"{i.region}a"],
    "ip-address": lambda i, state: [i.public_ip] if state == "running" else [],
    "private-ip-address": lambda i, state: [i.private_ip] if state != "terminated" else [],
    "launch-time": lambda i, _: [_time(i.started)],
}
_STATUS_FILTERS = ("instance-state-name", "instance-state-code", "availability-zone")


def _values(instance: Instance, name: str, now: float) -> Iterable[str]:
    if name.startswith("tag:"):
        value = instance.tags.get(name[4:])
        return [] if value is None else [value]
    return _FILTERS[name](instance, instance.state_at(now))


def _filters(said: Mapping[str, Any]) -> Iterable[tuple[str, Callable[[Iterable[str]], bool]]]:
    for wish in items(said, "Filter"):
        name, values = text(wish, "Name"), texts(wish, "Value")
        if not values:
            raise CloudError("InvalidParameterValue", f"The filter '{name}' has no value")
        if len(values) > 200:
            raise CloudError("FilterLimitExceeded", "The maximum number of filter values is 200.")
        yield name, _matcher(values)


def _matcher(values: list[str]) -> Callable[[Iterable[str]], bool]:
    pattern = re.compile("|".join(f"(?:{_pattern(value)})" for value in values), re.DOTALL)
    return lambda found: any(pattern.fullmatch(value) for value in found)


def _pattern(value: str) -> str:
    r"""EC2's wildcards as a regular expression: `*` any number, `?` one character, `\` takes the next one as it is."""
    wild = {"*": ".*", "?": "."}
    parts = re.findall(r"\\.|.", value, re.DOTALL)
    return "".join(re.escape(part[-1]) if len(part) == 2 else wild.get(part, re.escape(part)) for part in parts)


def _page(
    found: list[Instance], said: Mapping[str, Any], *, by_id: bool, highest: int
) -> tuple[list[Instance], str | None]:
    """One page of what was found, and the token of the next one."""
    if by_id and "MaxResults" in said:
        raise CloudError(
            "InvalidParameterCombination", "The parameter instancesSet cannot be used with the parameter maxResults"
        )
    if by_id:
        return found, None
    size = number(said, "MaxResults", _PAGE, 5, highest)
    after = _opened(text(said, "NextToken"), said)
    rest = [i for i in found if i.sequence > after]
    if len(rest) <= size:
        return rest, None
    return rest[:size], base64.urlsafe_b64encode(f"{rest[size - 1].sequence}.{_query(said)}".encode()).decode()


def _opened(token: str, said: Mapping[str, Any]) -> int:
    if not token:
        return 0
    try:
        sequence, query = base64.b64decode(token.encode(), altchars=b"-_", validate=True).decode().split(".")
        if query == _query(said):
            return int(sequence)
    except (ValueError, binascii.Error) as error:
        raise CloudError("InvalidNextToken", "The token cannot be read") from error
    raise CloudError("InvalidNextToken", "The token is one of another query")


def _query(said: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(said.get("Filter", []), sort_keys=True).encode()).hexdigest()[:16]


def _ids(said: Mapping[str, Any]) -> list[str]:
    ids = texts(said, "InstanceId")
    if not ids:
        raise CloudError("MissingParameter", "The request must contain the parameter InstanceId")
    return ids


def _tags(said: Mapping[str, Any]) -> dict[str, str]:
    tags = [(text(tag, "Key"), text(tag, "Value")) for tag in items(said, "Tag")]
    if len(dict(tags)) != len(tags):
        raise CloudError(
            "InvalidParameterValue", "Duplicate tag keys found. Please note that Tag keys are case insensitive."
        )
    return dict(tags)


def _token(parameters: Mapping[str, str]) -> str:
    token = text(parameters, "ClientToken")
    if len(token) > 64 or not token.isascii():
        raise CloudError("InvalidParameterValue", "ClientToken may have at most 64 ASCII characters")
    return token


def _fingerprint(parameters: Mapping[str, str]) -> str:
    said = sorted((key, value) for key, value in parameters.items() if key not in _PRIVATE)
    return hashlib.sha256(json.dumps(said).encode()).hexdigest()


def _state(name: str) -> Answer:
    return {"code": CODES[name], "name": name}


def _time(at: float) -> str:
    return datetime.fromtimestamp(at, UTC).strftime("%Y-%m-%dT%H:%M:%S.000Z")
