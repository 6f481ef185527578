"""The machines of one simulator, made when first asked for and switched by what EC2 says of their hosts.

Promises: without a state URL every name is alive. With one, a machine answers only while its instance is `running`;
a new launch time is a reboot, `terminated` and 404 forget it. One question per instance at a time, believed for
`ec2_state_ttl`. A state service that cannot be asked changes nothing: a host does not go down with the cloud's API.
Not promised: machines outlive the simulator in nothing but their identity.
"""

from __future__ import annotations

import asyncio
import re
from dataclasses import dataclass, field

import aiohttp
import structlog

from controllers.cml.simulator.faults import Faults
from controllers.cml.simulator.machine import Machine
from controllers.cml.simulator.options import Options
from storage.clock import Clock

ROOT = "root"
"""The machine at the server's root; it is no EC2 instance and always alive."""

_NAME = re.compile(r"^[A-Za-z0-9][A-Za-z0-9._-]{0,62}$")
_ASK_SECONDS = 5.0

_log = structlog.get_logger(__name__)


class TooManyMachinesError(Exception):
    """The limit of instances is reached."""


@dataclass(slots=True)
class _Host:
    """What is known of the instance under a machine."""

    lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    state: str = ""
    launch: str = ""
    asked_at: float = float("-inf")


class Fleet:
    """Machines by name."""

    def __init__(self, options: Options, clock: Clock, faults: Faults) -> None:
        self.options = options
        self.clock = clock
        self.faults = faults
        self.machines: dict[str, Machine] = {}
        self._hosts: dict[str, _Host] = {}
        self._session: aiohttp.ClientSession | None = None

    @staticmethod
    def valid(name: str) -> bool:
        return bool(_NAME.match(name)) and name not in ("api", "ws")

    def machine(self, name: str) -> Machine:
        """The machine of that name, made now if there is none. Raises `TooManyMachinesError`."""
        found = self.machines.get(name)
        if found is None:
            if len(self.machines) >= self.options.max_instances:
                raise TooManyMachinesError(f"there are {len(self.machines)} machines already")
            found = self.machines[name] = Machine(name, self.options, self.clock, self.faults)
        return found

    def forget(self, name: str) -> bool:
        """Drop a machine and all it knew."""
        machine = self.machines.pop(name, None)
        if machine is None:
            return False
        machine.power_off()
        return True

    async def awake(self, name: str) -> Machine | None:
        """The machine if its host is on now; None is a host that does not answer."""
        if self._session is None or name == ROOT:
            machine = self.machine(name)
            return machine if machine.powered else None
        host = self._hosts.setdefault(name, _Host())
        async with host.lock:
            if self.clock.monotonic() - host.asked_at >= self.options.ec2_state_ttl:
                await self._ask(self._session, name, host)
        known = self.machines.get(name)
        return known if known is not None and known.powered else None

    async def _ask(self, session: aiohttp.ClientSession, name: str, host: _Host) -> None:
        try:
            async with session.get(f"{self.options.ec2_state_url.rstrip('/')}/{name}") as response:
                if response.status == 404:
                    state, launch = "terminated", ""
                else:
                    response.raise_for_status()
                    answer = await response.json(content_type=None)
                    state, launch = str(answer["state"]), str(answer.get("launch") or "")
        except (aiohttp.ClientError, TimeoutError, ValueError, KeyError, TypeError, AttributeError) as e:
            _log.warning("instance state is unknown, nothing changes", instance=name, error=repr(e))
            host.asked_at = self.clock.monotonic()
            if name not in self.machines:
                self._hosts.pop(name, None)
            return
        host.asked_at = self.clock.monotonic()
        self._switch(name, host, state, launch)

    def _switch(self, name: str, host: _Host, state: str, launch: str) -> None:
        machine = self.machines.get(name)
        if state == "running":
            relaunched = bool(host.launch) and launch != host.launch
            host.state, host.launch = state, launch
            if machine is None:
                self.machine(name)
            elif relaunched or not machine.powered:
                machine.power_off()
                machine.power_on()
            return
        host.state = state
        if state == "terminated":
            self.forget(name)
            self._hosts.pop(name, None)
        elif machine is not None:
            machine.power_off()

    async def open(self) -> None:
        if self.options.ec2_state_url:
            self._session = aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=_ASK_SECONDS))

    async def close(self) -> None:
        if self._session is not None:
            await self._session.close()
            self._session = None
        for name in list(self.machines):
            self.forget(name)
