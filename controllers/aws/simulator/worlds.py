"""The simulated accounts: whose a request is by the key that signs it, and what instances each account has.

An access key id of twelve digits is the number of its account, so that anybody may have as many accounts as he likes;
a key that STS gave out is of the account of its role; any other key is of the account `ACCOUNT`. One account knows
nothing of another's instances. The keys of roles are forgotten with moto, which gave them out: then they are refused.
Called by the simulator's server and its control surface.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from controllers.aws.simulator.answers import InstanceApi
from controllers.aws.simulator.cloudwatch import MetricApi
from controllers.aws.simulator.instances import ACCOUNT, Instance, Instances
from controllers.aws.simulator.wire import CloudError
from storage.clock import Clock

_ACCOUNT = re.compile(r"\d{12}")
_ROLE = re.compile(r"arn:[\w-]+:iam::(\d{12}):role/.+")
_KEY = re.compile(rb"<AccessKeyId>(\w+)</AccessKeyId>")
_TEMPORARY = "ASIA"
"""How the id of a key that STS gave out begins."""


@dataclass(frozen=True, slots=True)
class World:
    """One account."""

    account: str
    instances: Instances
    api: InstanceApi
    metrics: MetricApi


class Worlds:
    """All accounts; with a folder their instances outlive a restart."""

    def __init__(self, clock: Clock, folder: Path | None, *, delay: float, describe_lag: float) -> None:
        self._clock = clock
        self._folder = folder
        self.delay = delay
        self.describe_lag = describe_lag
        self._roles: dict[str, str] = {}
        self._all: dict[str, World] = {}
        self.of(ACCOUNT)
        for kept in sorted((folder / "accounts").glob("*")) if folder is not None else ():
            if _ACCOUNT.fullmatch(kept.name):
                self.of(kept.name)

    def close(self) -> None:
        for world in self._all.values():
            world.instances.close()

    def of(self, account: str) -> World:
        """The world of an account, empty if nobody has been there."""
        world = self._all.get(account)
        if world is None:
            folder = self._folder
            if folder is not None and account != ACCOUNT:
                folder = folder / "accounts" / account
            instances = Instances(
                self._clock, folder, account=account, delay=self.delay, describe_lag=self.describe_lag
            )
            world = World(account, instances, InstanceApi(instances), MetricApi(instances))
            self._all[account] = world
        return world

    def account_of(self, access_key: str) -> str:
        """Whose requests a key signs. Raises `CloudError` for a key of STS that is not known here."""
        if _ACCOUNT.fullmatch(access_key):
            return access_key
        if access_key.startswith(_TEMPORARY) and access_key not in self._roles:
            raise CloudError("AuthFailure", "AWS was not able to validate the provided access credentials", 401)
        return self._roles.get(access_key, ACCOUNT)

    def assumed(self, parameters: Mapping[str, str], answer: bytes) -> None:
        """Learn the key that STS gave out for a role."""
        role, key = _ROLE.fullmatch(parameters.get("RoleArn", "")), _KEY.search(answer)
        if role is not None and key is not None:
            self._roles[key[1].decode()] = role[1]

    def forget_roles(self) -> None:
        """Refuse all keys of STS from now on, as if they had expired."""
        self._roles.clear()

    def everywhere(self) -> Iterator[tuple[World, Instance]]:
        """All instances of all accounts."""
        return ((world, i) for world in list(self._all.values()) for i in world.instances.everywhere())

    def find(self, instance_id: str) -> tuple[World, Instance] | None:
        """One instance, whoever has it; ids are unique among all accounts."""
        for world in self._all.values():
            instance = world.instances.find(instance_id)
            if instance is not None:
                return world, instance
        return None

    def pace(self, *, delay: float | None = None, describe_lag: float | None = None) -> None:
        """Set how long passing states last and launches hide, in all accounts; what is not said stays."""
        self.delay = self.delay if delay is None else delay
        self.describe_lag = self.describe_lag if describe_lag is None else describe_lag
        for world in self._all.values():
            world.instances.delay, world.instances.describe_lag = self.delay, self.describe_lag
