"""A lab and its elements as state machines whose time is whatever the caller says it is.

Promises: nothing here waits or reads a clock. A start, stop or wipe writes down what will happen when; `advance(now)`
carries out what has become due, in order of time, each change bearing its own moment. Changes collect in `outbox`;
`version` grows with each of them, so that views can be kept until it does. The machine that owns the labs drains the
outbox and advances them before anyone looks.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Literal

from controllers.cml.simulator.catalog import Definition

DEFINED, STOPPED, STARTED, QUEUED, BOOTED = "DEFINED_ON_CORE", "STOPPED", "STARTED", "QUEUED", "BOOTED"
STARTING = "STARTING"
ACTIVE = frozenset({QUEUED, STARTING, STARTED, BOOTED})

Verb = Literal["created", "modified", "deleted", "state"]
Kind = Literal["lab", "node", "link", "interface"]


class OutOfOrderError(Exception):
    """The lab or element is not in a state that allows what was asked."""


@dataclass(frozen=True, slots=True)
class Pace:
    """How long each step takes, in seconds."""

    queued: float
    boot: float
    stop: float
    wipe: float
    starting: bool = False
    """Whether nodes are STARTING for the second half of their wait, as they are since 2.10."""


@dataclass(frozen=True, slots=True)
class Change:
    """Something that happened to an element at `at` (monotonic seconds)."""

    at: float
    kind: Kind
    verb: Verb
    element: str
    state: str = ""
    previous: str = ""


@dataclass(slots=True, eq=False)
class Interface:
    """A port of a node; it is up when its node runs and nobody has shut it."""

    id: str
    node: Node
    label: str
    slot: int | None
    mac: str | None = None
    down: bool = False

    @property
    def state(self) -> str:
        if self.node.state == DEFINED:
            return DEFINED
        return STARTED if self.node.state in (STARTED, BOOTED) and not self.down else STOPPED


@dataclass(slots=True, eq=False)
class Node:
    """A node; `settings` holds what a user gave beyond the fields here, under the API's names."""

    id: str
    label: str
    definition: Definition
    x: int = 0
    y: int = 0
    configuration: Any = None
    settings: dict[str, Any] = field(default_factory=dict)
    interfaces: list[Interface] = field(default_factory=list)
    state: str = DEFINED
    since: float = 0.0
    plan: list[tuple[float, str]] = field(default_factory=list)

    @property
    def active(self) -> bool:
        return self.state in ACTIVE

    @property
    def goal(self) -> str:
        """The state in which the node will come to rest."""
        return self.plan[-1][1] if self.plan else self.state


@dataclass(slots=True, eq=False)
class Link:
    """A link between two interfaces; it is up when both of them are and nobody has shut it."""

    id: str
    label: str
    a: Interface
    b: Interface
    down: bool = False
    condition: dict[str, Any] | None = None

    @property
    def state(self) -> str:
        if self.a.node.state == self.b.node.state == DEFINED:
            return DEFINED
        return STARTED if self.a.state == self.b.state == STARTED and not self.down else STOPPED


@dataclass(slots=True, eq=False)
class Lab:
    """One lab: its properties, its elements by id, and what is going to happen to them."""

    id: str
    title: str
    owner: str
    created: datetime
    modified: datetime
    description: str = ""
    notes: str = ""
    nodes: dict[str, Node] = field(default_factory=dict)
    links: dict[str, Link] = field(default_factory=dict)
    associations: dict[str, dict[str, list[str]]] = field(default_factory=lambda: {"groups": {}, "users": {}})
    extras: dict[str, Any] = field(default_factory=dict)
    """Annotations, smart annotations, autostart, node staging: kept and given back as they came."""
    state: str = DEFINED
    due: float = math.inf
    version: int = 0
    outbox: list[Change] = field(default_factory=list)
    views: dict[str, tuple[int, bytes]] = field(default_factory=dict)

    def interface(self, interface_id: str) -> Interface | None:
        return next((i for n in self.nodes.values() for i in n.interfaces if i.id == interface_id), None)

    @property
    def converged(self) -> bool:
        return math.isinf(self.due)

    @property
    def removable(self) -> bool:
        """Never started, or wiped, and nothing still to come."""
        return self.converged and self.state == DEFINED and all(n.state == DEFINED for n in self.nodes.values())

    def touch(self, kind: Kind, verb: Verb, element: str, at: float, when: datetime) -> None:
        """Record an edit."""
        self.version += 1
        self.modified = when
        self.outbox.append(Change(at, kind, verb, element))

    def start(self, now: float, pace: Pace) -> None:
        for node in self.nodes.values():
            self._plan_start(node, now, pace)
        self._settle_plans(now)
        if not self.nodes:
            self._set_own(STARTED, now)

    def stop(self, now: float, pace: Pace) -> None:
        for node in self.nodes.values():
            self._plan_stop(node, now, pace)
        self._settle_plans(now)
        if not self.nodes and self.state == STARTED:
            self._set_own(STOPPED, now)

    def wipe(self, now: float, pace: Pace) -> None:
        if self.state == STARTED or any(n.active or n.goal in ACTIVE for n in self.nodes.values()):
            raise OutOfOrderError(f"Lab {self.id} must be stopped before it can be wiped.")
        for node in self.nodes.values():
            self._plan_wipe(node, now, pace)
        self._settle_plans(now)
        if not self.nodes:
            self._set_own(DEFINED, now)

    def start_node(self, node: Node, now: float, pace: Pace) -> None:
        self._plan_start(node, now, pace)
        self._settle_plans(now)

    def stop_node(self, node: Node, now: float, pace: Pace) -> None:
        self._plan_stop(node, now, pace)
        self._settle_plans(now)

    def wipe_node(self, node: Node, now: float, pace: Pace) -> None:
        if node.active or node.goal in ACTIVE:
            raise OutOfOrderError(f"Node {node.id} must be stopped before it can be wiped.")
        self._plan_wipe(node, now, pace)
        self._settle_plans(now)

    def power_cut(self, now: float) -> None:
        """The host went down: what ran is stopped, what was planned is forgotten."""
        for node in self.nodes.values():
            node.plan.clear()
            if node.active:
                self._set_node(node, STOPPED, now)
        if self.state == STARTED:
            self._set_own(STOPPED, now)
        self.due = math.inf

    def force(self, state: str, node_state: str, now: float) -> None:
        """Be in that state now, nodes and all."""
        for node in self.nodes.values():
            node.plan.clear()
            self._set_node(node, node_state, now)
        self._set_own(state, now)
        self.due = math.inf

    def advance(self, now: float) -> None:
        """Carry out everything that is due at `now`."""
        if self.due > now:
            return
        steps = [
            (at, index, node, state)
            for index, node in enumerate(self.nodes.values())
            for at, state in node.plan
            if at <= now
        ]
        steps.sort(key=lambda s: (s[0], s[1]))
        for at, _, node, state in steps:
            self._set_node(node, state, at)
            self._derive(at)
        for node in self.nodes.values():
            node.plan = [step for step in node.plan if step[0] > now]
        self._find_due()

    def forget_node(self, node: Node) -> None:
        """Take a node and its links out; the caller has seen to it that it does not run."""
        gone = [k for k, v in self.links.items() if v.a.node is node or v.b.node is node]
        for link_id in gone:
            del self.links[link_id]
        del self.nodes[node.id]
        self._find_due()

    def _plan_start(self, node: Node, now: float, pace: Pace) -> None:
        if node.goal == BOOTED:
            return
        # A start during a stop or a wipe is carried out after it.
        begin = node.plan[-1][0] if node.plan else now
        up = begin + pace.queued
        booted = up if node.definition.instant else up + pace.boot
        waiting = [(begin, QUEUED), (begin + pace.queued / 2, STARTING)] if pace.starting else [(begin, QUEUED)]
        node.plan += [*waiting, (up, STARTED), (booted, BOOTED)]

    def _plan_stop(self, node: Node, now: float, pace: Pace) -> None:
        if node.active:
            # A stop that is under way is neither prolonged by another nor followed by the start that was to follow.
            under_way = [step for step in node.plan if step[1] == STOPPED][:1]
            node.plan = under_way or [(now + pace.stop, STOPPED)]
        else:
            node.plan = [step for step in node.plan if step[1] not in ACTIVE]

    def _plan_wipe(self, node: Node, now: float, pace: Pace) -> None:
        if node.goal != DEFINED:
            begin = node.plan[-1][0] if node.plan else now
            node.plan.append((begin + pace.wipe, DEFINED))

    def _settle_plans(self, now: float) -> None:
        self._find_due()
        self.advance(now)

    def _find_due(self) -> None:
        self.due = min((n.plan[0][0] for n in self.nodes.values() if n.plan), default=math.inf)

    def _set_node(self, node: Node, state: str, at: float) -> None:
        if state == node.state:
            return
        previous, node.state, node.since = node.state, state, at
        self.version += 1
        self.outbox.append(Change(at, "node", "state", node.id, state, previous))

    def _derive(self, at: float) -> None:
        states = {n.state for n in self.nodes.values()}
        if states & ACTIVE:
            self._set_own(STARTED, at)
        elif STOPPED in states:
            self._set_own(STOPPED, at)
        elif states:
            self._set_own(DEFINED, at)

    def _set_own(self, state: str, at: float) -> None:
        if state == self.state:
            return
        previous, self.state = self.state, state
        self.version += 1
        self.outbox.append(Change(at, "lab", "state", self.id, state, previous))
