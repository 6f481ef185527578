"""One simulated CML: identity, power and boot, users, labs, licence, history. All of its time is asked of the clock.

Promises: `look()` brings everything up to this moment, and every request begins with it, so there is no task per
machine. What changed becomes events, telemetry and pushes, each at its own time. Switched off and on again it boots
anew with its labs, users, licence and product_uuid, but nothing runs and every session is over.
It does not know HTTP: `routing` and the `api_*` modules do.
"""

from __future__ import annotations

import hashlib
import itertools
import math
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any, Literal
from uuid import UUID, uuid4

from controllers.cml.simulator.accounts import Directory, User
from controllers.cml.simulator.catalog import definition
from controllers.cml.simulator.faults import Faults
from controllers.cml.simulator.labs import ACTIVE, BOOTED, Change, Interface, Lab, Link, Node, Pace
from controllers.cml.simulator.licensing import Licensing
from controllers.cml.simulator.options import Options
from storage.clock import Clock

KEPT_EVENTS = 1000
"""Events kept per lab, and telemetry per machine: CML keeps them all, a simulator of 500 machines cannot."""
KEPT_REQUESTS = 200
PERMISSIONS = ("lab_admin", "lab_edit", "lab_exec", "lab_view")
"""Each includes those after it."""

Stage = Literal["off", "refused", "bad-gateway", "not-ready", "ready"]
Listener = Callable[[dict[str, Any], Lab | None], None]


class CannotStartError(Exception):
    """No licence, no room, or no compute for what should be started."""


@dataclass(frozen=True, slots=True)
class Happening:
    """An event of a lab, as the machine remembers it."""

    lab: str
    change: Change
    when: datetime


@dataclass(slots=True)
class Load:
    """What the host reports beyond what the labs cause; None lets it be computed."""

    cpu_percent: float | None = None
    memory_percent: float | None = None


@dataclass(slots=True, eq=False)
class Machine:
    """A CML controller with one compute host: itself."""

    name: str
    options: Options
    clock: Clock
    faults: Faults
    directory: Directory = field(init=False)
    licensing: Licensing = field(init=False)
    admin: User = field(init=False)
    pace: Pace = field(init=False)
    product_uuid: str = field(init=False)
    compute_id: str = field(init=False)
    powered: bool = True
    booted_at: float = field(init=False)
    boots: int = 1
    admission_state: str = "READY"
    default_admission_state: str = "READY"
    maintenance: bool = False
    session_timeout: int = 3600
    opt_in: bool | None = None
    load: Load = field(default_factory=Load)
    labs: dict[str, Lab] = field(default_factory=dict)
    events: dict[str, deque[Happening]] = field(default_factory=dict)
    telemetry: deque[dict[str, Any]] = field(default_factory=lambda: deque(maxlen=KEPT_EVENTS))
    log: deque[dict[str, Any]] = field(default_factory=lambda: deque(maxlen=KEPT_REQUESTS))
    counts: Counter[str] = field(default_factory=Counter)
    listeners: dict[object, Listener] = field(default_factory=dict)

    def __post_init__(self) -> None:
        now, when = self.clock.monotonic(), self.clock.now()
        o = self.options
        self.product_uuid = identity(self.name, "product")
        self.compute_id = identity(self.name, "compute")
        self.directory = Directory(o.token_seconds)
        self.admin = self.directory.add(o.username, o.password, when, admin=True, fullname="Administrator")
        for account in o.accounts:
            self.directory.add(account.username, account.password, when, admin=account.admin)
        self.licensing = Licensing(o.registration, self.product_uuid, self.hostname)
        self.pace = Pace(o.node_queued, o.node_boot, o.node_stop, o.node_wipe, starting=o.release >= (2, 10))
        self.booted_at = now
        for n in range(o.seed_labs):
            self.add_lab(f"Seeded lab {n + 1}", nodes=o.seed_nodes, running=n % 2 == 0)

    @property
    def hostname(self) -> str:
        return f"cml-{self.name}"[:64]

    @property
    def stage(self) -> Stage:
        """How far the machine has come since it was switched on."""
        if not self.powered:
            return "off"
        age, o = self.clock.monotonic() - self.booted_at, self.options
        if age < o.boot_refused:
            return "refused"
        if age < o.boot_refused + o.boot_bad_gateway:
            return "bad-gateway"
        return "not-ready" if age < o.boot_refused + o.boot_bad_gateway + o.boot_not_ready else "ready"

    @property
    def ready(self) -> bool:
        """At least one compute host can start nodes."""
        return self.stage == "ready" and self.admission_state == "READY"

    def power_off(self) -> None:
        if not self.powered:
            return
        self.look()
        self.powered = False
        self.directory.close_sessions()
        for lab in self.labs.values():
            lab.power_cut(self.clock.monotonic())
            lab.outbox.clear()
        self.push({})

    def power_on(self) -> None:
        if not self.powered:
            self.powered, self.booted_at, self.boots = True, self.clock.monotonic(), self.boots + 1

    def look(self) -> None:
        """Let everything happen that is due by now."""
        now, when = self.clock.monotonic(), self.clock.now()
        for lab in self.labs.values():
            if lab.due <= now:
                lab.advance(now)
            if lab.outbox:
                self._publish(lab, now, when)
        licensing = self.licensing
        licensing.stuck = self.faults.active("registration-stuck", self.name)
        licensing.ssms_reachable = not self.faults.active("ssms-unreachable", self.name)
        for word in licensing.advance(now, when):
            self.record("license_info", {"status": word})

    def seconds_to_next(self) -> float:
        """How long until something is due by itself; infinite when nothing is."""
        due = min((lab.due for lab in self.labs.values()), default=math.inf)
        return max(0.0, due - self.clock.monotonic())

    def record(self, category: str, data: dict[str, Any], when: datetime | None = None) -> None:
        """Write a telemetry event."""
        stamp = (when or self.clock.now()).isoformat()
        self.telemetry.append({"category": category, "timestamp": stamp, "data": data})

    def push(self, message: dict[str, Any], lab: Lab | None = None) -> None:
        """Hand a message to every open WebSocket, of a lab only to those who may see it; an empty one only wakes."""
        for listener in list(self.listeners.values()):
            listener(message, lab)

    def rights(self, user: User, lab: Lab) -> list[str]:
        """What a user may do with a lab, the most first."""
        if self.admin_rights(user) or lab.owner == user.id:
            return list(PERMISSIONS)
        held = set(lab.associations["users"].get(user.id, ()))
        for group_id in user.groups:
            held.update(lab.associations["groups"].get(group_id, ()))
        ranks = [PERMISSIONS.index(p) for p in held]
        return list(PERMISSIONS[min(ranks) :]) if ranks else []

    def admin_rights(self, user: User) -> bool:
        """Whether the session counts as an administrator's; a fault may take that away."""
        return user.admin and not self.faults.active("not-admin", self.name)

    def running_nodes(self) -> int:
        """Nodes that count against the licence and run or are about to."""
        return sum(
            1
            for lab in self.labs.values()
            for n in lab.nodes.values()
            if n.definition.licensed and (n.state in ACTIVE or n.goal in ACTIVE)
        )

    @property
    def node_limit(self) -> int:
        return self.options.nodes_licensed if self.licensing.licensed else self.options.nodes_unlicensed

    def start(self, lab: Lab, node: Node | None = None) -> None:
        """Start a lab or one node of it. Raises `CannotStartError`."""
        wanted = [node] if node else list(lab.nodes.values())
        new = sum(1 for n in wanted if n.definition.licensed and n.goal not in ACTIVE)
        if new and not self.ready:
            raise CannotStartError("No compute host is ready to start nodes.")
        if new and self.running_nodes() + new > self.node_limit:
            kind = "licensed" if self.licensing.licensed else "unlicensed"
            raise CannotStartError(
                f"Licensing issue: {self.running_nodes()} nodes run and {new} more would exceed the {kind} limit "
                f"of {self.node_limit}."
            )
        now = self.clock.monotonic()
        if node:
            lab.start_node(node, now, self.pace)
        else:
            lab.start(now, self.pace)
            self.record("start_lab", {"lab_id": lab.id})
        self._planned()

    def stop(self, lab: Lab, node: Node | None = None) -> None:
        """Stop a lab or one node of it."""
        now = self.clock.monotonic()
        if node:
            lab.stop_node(node, now, self.pace)
        else:
            lab.stop(now, self.pace)
            self.record("stop_lab", {"lab_id": lab.id})
        self._planned()

    def wipe(self, lab: Lab, node: Node | None = None) -> None:
        """Wipe a lab or one node of it. Raises `OutOfOrderError`."""
        now = self.clock.monotonic()
        if node:
            lab.wipe_node(node, now, self.pace)
        else:
            lab.wipe(now, self.pace)
        self._planned()

    def insert(self, lab: Lab) -> None:
        """Take a complete lab in and tell of it."""
        self.labs[lab.id] = lab
        lab.outbox.insert(0, Change(self.clock.monotonic(), "lab", "created", lab.id))
        self.look()

    def remove(self, lab: Lab) -> None:
        """Take a lab out, whatever its state: whether that is allowed is the API's question."""
        del self.labs[lab.id]
        self.events.pop(lab.id, None)
        self.push(_lab_message(lab, Change(self.clock.monotonic(), "lab", "deleted", lab.id)), lab)

    def add_lab(
        self,
        title: str,
        *,
        nodes: int = 0,
        running: bool = False,
        owner: str = "",
        description: str = "",
        notes: str = "",
    ) -> Lab:
        """A lab out of nothing: a chain of `nodes` small routers, booted if `running`. No limits are asked."""
        when = self.clock.now()
        lab = Lab(str(uuid4()), title, owner or self.admin.id, when, when, description, notes)
        router = definition("iosv")
        state = BOOTED if running else "DEFINED_ON_CORE"
        for n in range(nodes):
            node = Node(str(uuid4()), f"r{n}", router, x=n * 80, state=state, since=self.clock.monotonic())
            node.interfaces = [Interface(str(uuid4()), node, router.label(s), s) for s in range(2)]
            lab.nodes[node.id] = node
        chain = list(lab.nodes.values())
        for a, b in itertools.pairwise(chain):
            link = Link(str(uuid4()), f"{a.label}-{b.label}", a.interfaces[1], b.interfaces[0])
            lab.links[link.id] = link
        if running:
            lab.state = "STARTED"
        self.insert(lab)
        return lab

    def force(self, lab: Lab, state: str) -> None:
        """Bring a lab into a state at once, past every rule."""
        node_state = {"STARTED": BOOTED}.get(state, state)
        lab.force(state, node_state, self.clock.monotonic())
        self.look()

    def _planned(self) -> None:
        """Something will happen sooner than anybody thought: whoever waits for the next thing must look again."""
        self.look()
        self.push({})

    def _publish(self, lab: Lab, now: float, when: datetime) -> None:
        history = self.events.get(lab.id)
        if history is None:
            history = self.events[lab.id] = deque(maxlen=KEPT_EVENTS)
        for change in lab.outbox:
            at = when - timedelta(seconds=now - change.at)
            history.append(Happening(lab.id, change, at))
            category = _TELEMETRY.get(change.state) if change.kind == "node" and change.verb == "state" else None
            if category:
                self.record(category, {"lab_id": lab.id, "node_id": change.element}, at)
            if self.listeners:
                self.push(_lab_message(lab, change), lab)
        lab.outbox.clear()


_TELEMETRY = {
    "QUEUED": "queue_node",
    "STARTED": "start_node",
    "BOOTED": "boot_node",
    "STOPPED": "stop_node",
    "DEFINED_ON_CORE": "wipe_node",
}


def identity(name: str, what: str) -> str:
    """A UUID4-shaped id that is the same each time this instance is simulated, by whichever process."""
    return str(UUID(bytes=hashlib.sha256(f"{what} of {name}".encode()).digest()[:16], version=4))


def _lab_message(lab: Lab, change: Change) -> dict[str, Any]:
    """A push message, in the shapes that the web interface receives."""
    message: dict[str, Any] = {"lab_id": lab.id, "element_id": change.element, "data": {}}
    if change.kind == "lab":
        message |= {"event_type": "lab_event", "event": change.verb, "element_type": "lab"}
        if change.verb == "state":
            message["data"] = {"state": change.state}
        elif change.verb == "modified":
            message["data"] = {"title": lab.title, "description": lab.description, "notes": lab.notes}
        return message
    if change.verb == "state":
        return message | {"event_type": "state_change", "event": change.state, "element_type": change.kind}
    return message | {"event_type": "lab_element_event", "event": change.verb, "element_type": change.kind}
