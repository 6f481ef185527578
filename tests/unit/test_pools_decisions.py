"""How large a pool is to be: each rule from a table, and what holds whatever happens from random stories."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from controllers.aws.errors import (
    AwsAccountForbidden,
    AwsAuthError,
    AwsError,
    AwsUnknownAccount,
    AwsUnknownRegion,
    AwsWrongAccount,
)
from controllers.aws.place import Place
from controllers.pools.conditions import limit_of
from controllers.pools.decisions import Decision, Direction, Reason, decide, is_removable
from controllers.pools.demand import Load, WorkerLoad
from controllers.pools.hours import UnknownTimeZone
from controllers.pools.kind import LabWorkerPool, Policy, ScalingDecision
from controllers.pools.launches import LASTING
from controllers.workers.kind import WAKE_ANNOTATION, LabWorker
from controllers.workers.provisioning import reason_of
from equipment.pools import NOW, a_pool, a_worker, asleep, evenly, workers

BUSY = {"hosts": True}
FULL = {"cpu": 0.9, "labs": 20}


@dataclass
class Case:
    why: str
    phases: Sequence[str]
    spec: dict[str, Any]
    expected: tuple[str, str, int, Sequence[str]]
    """Direction, reason, how many to create, whom to remove or wake."""
    load: dict[str, Any] = field(default_factory=dict)
    status: dict[str, Any] = field(default_factory=dict)


def minutes_ago(minutes: float) -> Any:
    return NOW - timedelta(minutes=minutes)


def replaced(many: int, minutes: float) -> dict[str, Any]:
    at = minutes_ago(minutes)
    return {"at": at, "direction": "Replace", "reason": "x", "from": 0, "to": many, "replaced": many}


CAPACITY, LABS, HYBRID = {"policy": "CapacityBased"}, {"policy": "LabCountBased"}, {"policy": "Hybrid"}
NIGHT = {"start": "22:00", "end": "06:00"}
NOON = {"start": "11:00", "end": "13:00"}
UP, DOWN, REPLACE, WAKE, NONE = "Up", "Down", "Replace", "Wake", "None"

CASES = [
    # what a person says
    Case("an empty pool is filled at once", (), {"minWorkers": 3}, (UP, "BelowWished", 3, ())),
    Case("as many as are wished is enough", ("Ready", "Active"), {"replicas": 2}, (NONE, "Settled", 0, ())),
    Case("more are wished", ("Ready",), {"replicas": 3}, (UP, "BelowWished", 2, ())),
    Case("more are wished while one starts", ("Starting",), {"replicas": 3}, (UP, "BelowWished", 2, ())),
    Case("a deleted worker is made up for", ("Ready", "Leaving"), {"replicas": 2}, (UP, "BelowWished", 1, ())),
    Case("fewer are wished", ("Ready",) * 3, {"replicas": 1}, (DOWN, "AboveWished", 0, ("w0", "w1"))),
    Case("not launched ones go first", ("Ready", "Starting", "Pending"), {}, (DOWN, "AboveWished", 0, ("w2", "w1"))),
    Case("then those out of service", ("Ready", "Stopped"), {}, (DOWN, "AboveWished", 0, ("w1",))),
    Case("none that hosts labs", ("Active", "Active"), {}, (NONE, "WorkersHostLabs", 0, ()), load=BUSY),
    Case("the maximum was lowered", ("Ready",) * 3, {**CAPACITY, "maxWorkers": 2}, (DOWN, "AboveMaximum", 0, ("w0",))),
    Case("the policy leaves the size above the floor to load", ("Ready",) * 3, CAPACITY, (NONE, "Settled", 0, ())),
    Case("nothing is wanted of an empty pool", (), {"minWorkers": 0}, (NONE, "Settled", 0, ())),
    # schedules
    Case(
        "a window asks for more",
        ("Ready",),
        {"policy": "Scheduled", "schedule": [{**NOON, "workers": 4}]},
        (UP, "Schedule", 3, ()),
    ),
    Case(
        "so does one that begins before a new worker is ready",
        ("Ready",),
        {"policy": "Hybrid", "schedule": [{"start": "12:10", "end": "13:00", "workers": 2}]},
        (UP, "Schedule", 1, ()),
    ),
    Case(
        "a quick pool waits",
        ("Ready",),
        {"policy": "Hybrid", "schedule": [{"start": "12:10", "end": "13:00", "workers": 2}]},
        (NONE, "Settled", 0, ()),
        status={"secondsToReady": 300},
    ),
    Case(
        "it is another hour in the pool's zone",
        ("Ready",),
        {"policy": "Scheduled", "timeZone": "Asia/Tokyo", "schedule": [{**NOON, "workers": 4}]},
        (NONE, "Settled", 0, ()),
    ),
    Case(
        "the window is over",
        ("Ready",) * 2,
        {"policy": "Scheduled", "schedule": [{**NIGHT, "workers": 2}]},
        (DOWN, "AboveWished", 0, ("w0",)),
    ),
    Case(
        "never above the maximum",
        (),
        {"policy": "Scheduled", "maxWorkers": 5, "schedule": [{**NOON, "workers": 5}, {**NOON, "workers": 3}]},
        (UP, "Schedule", 5, ()),
    ),
    # failed ones
    Case("a failed one is replaced", ("Ready", "Failed"), {"replicas": 2}, (REPLACE, "WorkerFailed", 1, ("w1",))),
    Case("an ended one too", ("Terminated",), {}, (REPLACE, "WorkerFailed", 1, ("w0",))),
    Case("also under load policies", ("Ready", "Failed"), CAPACITY, (REPLACE, "WorkerFailed", 1, ("w1",))),
    Case("not while one starts", ("Starting", "Failed"), {"replicas": 2}, (NONE, "InFlight", 0, ())),
    Case(
        "three an hour",
        ("Failed",) * 5,
        {"replicas": 5},
        (REPLACE, "WorkerFailed", 1, ("w0",)),
        status={"scalingHistory": [replaced(2, 59), replaced(9, 61)]},
    ),
    Case(
        "and then no more",
        ("Failed",),
        {},
        (NONE, "ReplacementLimit", 0, ()),
        status={"scalingHistory": [replaced(3, 59)]},
    ),
    Case(
        "load is heeded all the same",
        ("Active", "Failed"),
        CAPACITY,
        (UP, "CPU", 1, ()),
        load={"cpu": 0.9},
        status={"scalingHistory": [replaced(3, 59)]},
    ),
    Case(
        "also where it asks for less",
        ("Ready", "Ready", "Failed"),
        CAPACITY,
        (DOWN, "Idle", 0, ("w0",)),
        load={"cpu": 0.1, "memory": 0.1},
        status={"scalingHistory": [replaced(3, 59)]},
    ),
    # what keeps workers from being launched, and a person must mend: each reason below
    Case(
        "one that it holds is given up first",
        ("Failed", "Pending", "MaxInstancesReached", "Ready"),
        {"replicas": 3, "maxWorkers": 3, **CAPACITY},
        (DOWN, "AboveMaximum", 0, ("w2",)),
    ),
    Case(
        "and is not on its way",
        ("Ready", "MaxInstancesReached"),
        CAPACITY,
        (DOWN, "Idle", 0, ("w1",)),
        load={"cpu": 0.1},
    ),
    Case(
        "load makes no further one",
        ("Active", "MaxInstancesReached"),
        CAPACITY,
        (NONE, "MaxInstancesReached", 0, ()),
        load={"cpu": 0.9},
    ),
    Case("only for what is wished", ("Ready", "Failed"), {"replicas": 1}, (DOWN, "AboveWished", 0, ("w1",))),
    Case("all failed ones go", ("Failed",) * 3, {"replicas": 2}, (REPLACE, "WorkerFailed", 2, ("w0", "w1", "w2"))),
    Case("not where the pool is told so", ("Failed",), {"replaceFailed": {"enabled": False}}, (NONE, "Settled", 0, ())),
    # load: capacity
    Case("CPU is over the limit", ("Active",), CAPACITY, (UP, "CPU", 1, ()), load={"cpu": 0.75, **BUSY}),
    Case("memory is", ("Active",), CAPACITY, (UP, "Memory", 1, ()), load={"cpu": 0.1, "memory": 0.8, **BUSY}),
    Case(
        "all are busy and none is over a limit",
        ("Active",) * 3,
        CAPACITY,
        (NONE, "Settled", 0, ()),
        load={"cpu": 0.74, "memory": 0.79, **BUSY},
    ),
    Case(
        "no more than the maximum",
        ("Active",) * 2,
        {**CAPACITY, "maxWorkers": 2},
        (NONE, "AtMaximum", 0, ()),
        load={"cpu": 0.9, **BUSY},
    ),
    Case("labs are not looked at", ("Active",), CAPACITY, (NONE, "Settled", 0, ()), load={"labs": 99, **BUSY}),
    Case("CPU and memory are low", ("Ready",) * 2, CAPACITY, (DOWN, "Idle", 0, ("w0",)), load={"cpu": 0.1}),
    Case(
        "CPU is low and memory is not",
        ("Ready",) * 2,
        CAPACITY,
        (NONE, "Settled", 0, ()),
        load={"cpu": 0.1, "memory": 0.5},
    ),
    Case("what is unknown is not idle", ("Ready",) * 2, CAPACITY, (NONE, "Settled", 0, ())),
    Case(
        "one less would be over the limit",
        ("Ready",) * 2,
        {**CAPACITY, "thresholds": {"cpuUp": 0.5, "cpuDown": 0.45}},
        (NONE, "Settled", 0, ()),
        load={"cpu": 0.4},
    ),
    Case(
        "never below the minimum",
        ("Ready",) * 2,
        {**CAPACITY, "minWorkers": 2},
        (NONE, "Settled", 0, ()),
        load={"cpu": 0.0},
    ),
    Case(
        "nor below replicas", ("Ready",) * 2, {**CAPACITY, "replicas": 2}, (NONE, "Settled", 0, ()), load={"cpu": 0.0}
    ),
    Case(
        "to nothing, where that is allowed",
        ("Ready",),
        {**CAPACITY, "minWorkers": 0},
        (DOWN, "Idle", 0, ("w0",)),
        load={"cpu": 0.1},
    ),
    Case(
        "none that hosts labs for load either",
        ("Active",) * 2,
        CAPACITY,
        (NONE, "Settled", 0, ()),
        load={"cpu": 0.1, **BUSY},
    ),
    # load: labs
    Case("as many labs as one more worker holds", ("Active",), LABS, (UP, "Labs", 1, ()), load={"labs": 15, **BUSY}),
    Case("as many as three more hold", ("Active",), LABS, (UP, "Labs", 3, ()), load={"labs": 45, **BUSY}),
    Case("few labs", ("Ready",) * 3, LABS, (DOWN, "Idle", 0, ("w0",)), load={"labs": 2}),
    Case("labs not counted yet", ("Ready",) * 3, LABS, (NONE, "Settled", 0, ()), load={"cpu": 0.0}),
    Case(
        "the last one with a lab stays",
        ("Ready",),
        {**LABS, "minWorkers": 0},
        (NONE, "Settled", 0, ()),
        load={"labs": 1},
    ),
    # load: hybrid, and what waits
    Case(
        "any limit is enough for growth",
        ("Active",),
        HYBRID,
        (UP, "Labs", 1, ()),
        load={"cpu": 0.1, "labs": 16, **BUSY},
    ),
    Case("all must be low", ("Ready",) * 2, HYBRID, (NONE, "Settled", 0, ()), load={"cpu": 0.1, "labs": 5}),
    Case("labs wait and there is room", ("Ready",), HYBRID, (NONE, "Settled", 0, ()), load={"labs": 4, "waiting": 16}),
    Case(
        "labs wait and there is none", ("Ready",), HYBRID, (UP, "WaitingLabs", 1, ()), load={"labs": 4, "waiting": 17}
    ),
    Case("many wait", (), {**LABS, "minWorkers": 0}, (UP, "WaitingLabs", 3, ()), load={"waiting": 50}),
    Case(
        "no size can hold them",
        (),
        {**LABS, "minWorkers": 0, "maxWorkers": 2},
        (UP, "WaitingLabs", 2, ()),
        load={"waiting": 50},
    ),
    Case("its room is wanted", ("Ready",) * 2, LABS, (NONE, "Settled", 0, ()), load={"labs": 0, "waiting": 21}),
    Case("or will be soon", ("Ready",) * 2, LABS, (NONE, "Settled", 0, ()), load={"labs": 0, "expected": 21}),
    Case(
        "the schedule alone decides",
        ("Ready",),
        {"policy": "Scheduled"},
        (NONE, "Settled", 0, ()),
        load={"waiting": 99},
    ),
    # those that idleness has stopped
    Case(
        "one asleep is woken for labs that wait, before a new one is made",
        ("Active", "Asleep"),
        CAPACITY,
        (WAKE, "WaitingLabs", 0, ("w1",)),
        load={**FULL, "waiting": 21},
    ),
    Case(
        "none while there is room, nor is a new one made: idleness would stop it again",
        ("Active", "Asleep"),
        HYBRID,
        (NONE, "Settled", 0, ()),
        load={"cpu": 0.9, "labs": 15},
    ),
    Case(
        "nor while all is full and nobody waits: it would be the same, each idle time",
        ("Active", "Asleep"),
        HYBRID,
        (NONE, "Settled", 0, ()),
        load=FULL,
    ),
    Case(
        "but for labs that wait",
        ("Active", "Asleep"),
        HYBRID,
        (WAKE, "WaitingLabs", 0, ("w1",)),
        load={"labs": 14, "waiting": 7},
    ),
    Case(
        "as many as are needed",
        ("Active", "Asleep", "Asleep", "Asleep"),
        LABS,
        (WAKE, "WaitingLabs", 0, ("w1", "w2")),
        load={"labs": 20, "waiting": 25},
    ),
    Case(
        "also at the maximum",
        ("Active", "Asleep"),
        {**CAPACITY, "maxWorkers": 2},
        (WAKE, "CPU", 0, ("w1",)),
        load={**FULL, "waiting": 1},
    ),
    Case(
        "not right after growth",
        ("Active", "Asleep"),
        CAPACITY,
        (NONE, "Cooldown", 0, ()),
        load={**FULL, "waiting": 1},
        status={"lastScaleUpAt": minutes_ago(5)},
    ),
    Case("sleep is no failure, nor on its way", ("Asleep",), {"replicas": 1}, (NONE, "Settled", 0, ())),
    Case("one asleep is given up first", ("Ready", "Asleep"), {"replicas": 1}, (DOWN, "AboveWished", 0, ("w1",))),
    # one thing at a time, cooldowns, hours
    Case("one is on its way", ("Active", "Starting"), CAPACITY, (NONE, "InFlight", 0, ()), load={"cpu": 0.9, **BUSY}),
    Case("one is leaving", ("Ready", "Ready", "Leaving"), CAPACITY, (NONE, "InFlight", 0, ()), load={"cpu": 0.1}),
    Case(
        "one that leaves waits for its labs for hours",
        ("Active", "Leaving"),
        CAPACITY,
        (UP, "CPU", 1, ()),
        load={"cpu": 0.9, **BUSY},
    ),
    Case(
        "the last growth was just now",
        ("Active",),
        CAPACITY,
        (NONE, "Cooldown", 0, ()),
        load={"cpu": 0.9, **BUSY},
        status={"lastScaleUpAt": minutes_ago(9.9)},
    ),
    Case(
        "it was long enough ago",
        ("Active",),
        CAPACITY,
        (UP, "CPU", 1, ()),
        load={"cpu": 0.9, **BUSY},
        status={"lastScaleUpAt": minutes_ago(10), "lastScaleDownAt": minutes_ago(1)},
    ),
    Case(
        "it shrank just now",
        ("Ready",) * 2,
        CAPACITY,
        (NONE, "Settled", 0, ()),
        load={"cpu": 0.1},
        status={"lastScaleDownAt": minutes_ago(19.9)},
    ),
    Case(
        "it grew just now",
        ("Ready",) * 2,
        CAPACITY,
        (NONE, "Settled", 0, ()),
        load={"cpu": 0.1},
        status={"lastScaleUpAt": minutes_ago(19.9), "lastScaleDownAt": minutes_ago(60)},
    ),
    Case(
        "what a person says knows no cooldown",
        ("Ready",),
        {"replicas": 2},
        (UP, "BelowWished", 1, ()),
        status={"lastScaleUpAt": minutes_ago(0)},
    ),
    Case(
        "growth is for the night",
        ("Active",),
        {**CAPACITY, "allowedHours": {"scaleUp": NIGHT}},
        (NONE, "OutsideAllowedHours", 0, ()),
        load={"cpu": 0.9, **BUSY},
    ),
    Case(
        "there it is night",
        ("Active",),
        {**CAPACITY, "allowedHours": {"scaleUp": NIGHT}, "timeZone": "Pacific/Auckland"},
        (UP, "CPU", 1, ()),
        load={"cpu": 0.9, **BUSY},
    ),
    Case(
        "shrinking is for the night",
        ("Ready",) * 2,
        {**CAPACITY, "allowedHours": {"scaleDown": NIGHT}},
        (NONE, "Settled", 0, ()),
        load={"cpu": 0.1},
    ),
    Case(
        "the floor knows no hours",
        (),
        {**CAPACITY, "allowedHours": {"scaleUp": NIGHT}},
        (UP, "BelowWished", 1, ()),
    ),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.why)
def test_each_rule(case: Case) -> None:
    team = workers(*case.phases)
    decision = decide(a_pool(**case.spec, status=case.status), team, evenly(team, **case.load), NOW)
    got = (str(decision.direction), str(decision.reason), decision.create, (*decision.remove, *decision.wake))
    assert got == (*case.expected[:3], tuple(case.expected[3])), (case.why, decision)
    assert decision.acts == (case.expected[0] != NONE)


@pytest.mark.parametrize("reason", sorted(LASTING))
def test_a_worker_that_cannot_be_launched_is_told_of_and_holds_up_nothing_but_growth(reason: str) -> None:
    def told(*phases: str, load: dict[str, Any], **spec: Any) -> tuple[str, str]:
        team = workers(*phases)
        decision = decide(a_pool(**spec), team, evenly(team, **load), NOW)
        return decision.direction.value, limit_of(decision)[0]

    assert told("Active", reason, load={"labs": 20, "waiting": 40, **BUSY}, **LABS) == (NONE, reason)
    assert told("Active", reason, load={"labs": 5, **BUSY}, **LABS) == (NONE, reason), "the size is not reached"
    assert told("Ready", reason, load={}, minWorkers=2) == (NONE, reason), "nor is it where a person says it"
    assert told("Active", reason, "Asleep", load={**FULL, "waiting": 41, **BUSY}, **LABS) == (WAKE, "")
    assert told("Ready", reason, load={"labs": 0}, **LABS) == (DOWN, "")
    recent = {"lastScaleUpAt": minutes_ago(1)}
    assert told("Active", reason, load={"labs": 20, **BUSY}, status=recent, **LABS) == (NONE, reason), "no cooldown's"


@pytest.mark.parametrize(
    "error", [AwsAccountForbidden, AwsAuthError, AwsUnknownAccount, AwsUnknownRegion, AwsWrongAccount]
)
def test_what_a_worker_says_of_an_account_that_it_cannot_use_is_known_as_lasting(error: type[AwsError]) -> None:
    assert reason_of(error("x", "so it is", place=Place("us-east-1", "exams"))) in LASTING


def test_a_zone_that_this_machine_does_not_know_decides_nothing() -> None:
    pool = a_pool(policy="Scheduled", schedule=[{**NOON, "workers": 2}])
    pool.spec.time_zone = "Nowhere/At-All"  # as another machine's data had it
    with pytest.raises(UnknownTimeZone):
        decide(pool, workers("Ready"), Load(), NOW)


def test_a_new_worker_that_is_not_measured_yet_has_room_and_one_that_never_is_says_nothing() -> None:
    team = workers("Active", "Ready")
    for policy, load, reason in (
        (CAPACITY, WorkerLoad(hosts=True, cpu=0.9), Reason.CPU),
        (LABS, WorkerLoad(hosts=True, labs=15), Reason.LABS),
    ):
        team[1].status.timestamps.ready_at = minutes_ago(5)
        assert decide(a_pool(**policy), team, Load({"w0": load}), NOW).reason is Reason.SETTLED
        team[1].status.timestamps.ready_at = minutes_ago(16)
        assert decide(a_pool(**policy), team, Load({"w0": load}), NOW).reason is reason


def test_the_emptiest_idle_worker_goes() -> None:
    team = workers("Ready", "Ready", "Active", "Ready")
    load = Load(
        {
            "w0": WorkerLoad(hosts=False, labs=2, cpu=0.2),
            "w1": WorkerLoad(hosts=False, labs=0, cpu=0.2),
            "w2": WorkerLoad(hosts=True, labs=0, cpu=0.0),
            "w3": WorkerLoad(hosts=False, labs=0, cpu=0.1),
        }
    )
    assert decide(a_pool(**CAPACITY), team, load, NOW).remove == ("w3",)


@pytest.mark.parametrize("annotation", ["lab.neuroglia.io/protect", "lab.neuroglia.io/paused"])
def test_a_worker_that_is_protected_or_paused_stays(annotation: str) -> None:
    kept = a_worker("w0", annotations={annotation: "true"})
    decision = decide(a_pool(replicas=1), [kept, a_worker("w1")], Load(), NOW)
    assert decision.remove == ("w1",)
    assert not is_removable(a_worker("w0", "Failed", annotations={annotation: "true"}), WorkerLoad(hosts=False))


@pytest.mark.parametrize("spec", [{"observe_only": True}, {"deletion_policy": "Retain"}])
def test_a_worker_whose_instance_would_be_left_behind_stays(spec: dict[str, Any]) -> None:
    kept = a_worker("w0")
    for name, value in spec.items():
        setattr(kept.spec, name, value)
    assert decide(a_pool(replicas=1), [kept, a_worker("w1")], Load(), NOW).remove == ("w1",)


def test_a_failed_worker_whose_labs_may_still_run_stays_and_counts() -> None:
    alive = a_worker("w0", "Failed", ec2={"state": "running", "instanceId": "i-0123456789abcdef0"})
    decision = decide(a_pool(), [alive], evenly([alive], hosts=True), NOW)
    assert (decision.direction, decision.reason) == (Direction.NONE, Reason.SETTLED)
    over = a_worker("w0", "Failed")  # its instance has ended: what the records say of its labs is over too
    assert decide(a_pool(), [over], evenly([over], hosts=True), NOW).remove == ("w0",)


def test_one_that_was_just_woken_is_on_its_way() -> None:
    woken = asleep("w1", annotations={WAKE_ANNOTATION: "now"})
    team = [a_worker("w0", "Active"), woken]
    assert decide(a_pool(**CAPACITY), team, evenly(team, cpu=0.9), NOW).reason is Reason.IN_FLIGHT


def test_a_decision_counts_the_workers_that_are_left() -> None:
    team = workers("Ready", "Ready", "Failed", "Ready")
    decision = decide(a_pool(replicas=1), team, Load(), NOW)
    assert (decision.before, decision.after, decision.remove) == (3, 1, ("w2", "w0", "w1"))


# Stories


@dataclass
class Story:
    """A pool whose decisions are carried out at once; its workers start, fail, fill and empty by chance."""

    pool: LabWorkerPool
    team: list[LabWorker] = field(default_factory=list)
    hosting: set[str] = field(default_factory=set)
    now: Any = NOW
    made: int = 0
    taken: list[Decision] = field(default_factory=list)

    def load(self, cpu: float | None = None, labs: int | None = None, waiting: int = 0, expected: int = 0) -> Load:
        """The whole load, shared by all that serve."""
        serving = [w for w in self.team if w.status.phase in ("Ready", "Active") and not w.deleting]
        share = None if cpu is None or not serving else min(1.0, cpu / len(serving))
        each, rest = divmod(labs or 0, len(serving)) if serving else (0, 0)
        told = {w.name: WorkerLoad(w.name in self.hosting, None, 20, None, None) for w in self.team}
        for i, worker in enumerate(serving):
            count = None if labs is None else each + (i < rest)
            told[worker.name] = WorkerLoad(worker.name in self.hosting, count, 20, share, share)
        return Load(told, waiting, max(waiting, expected))

    def decide(self, load: Load) -> Decision:
        """Decide and carry out, as the controller does."""
        before = {w.name for w in self.team if not w.deleting}
        decision = decide(self.pool, self.team, load, self.now)
        spec = self.pool.spec
        for worker in self.team:
            if worker.name in decision.remove:
                assert not load.of(worker).hosts or worker.status.phase == "Failed", "labs were taken away"
                assert not worker.deleting
                worker.metadata.deletion_timestamp = self.now
        for _ in range(decision.create):
            self.team.append(a_worker(f"n{self.made}", "Pending"))
            self.made += 1
        members = [w for w in self.team if not w.deleting]
        assert not decision.create or len(members) <= spec.max_workers, "above the maximum"
        able = sum(w.status.phase != "Failed" for w in members)
        was_able = sum(w.status.phase != "Failed" for w in self.team if w.name in before)
        assert not decision.remove or able >= min(spec.min_workers, was_able), "below the minimum"
        if decision.acts:
            self.remember(decision)
        return decision

    def remember(self, decision: Decision) -> None:
        status = self.pool.status
        self.taken.append(decision)
        if decision.direction is Direction.UP:
            status.last_scale_up_at = self.now
        if decision.direction is Direction.DOWN:
            status.last_scale_down_at = self.now
        status.decided(
            ScalingDecision.model_validate(
                {
                    "at": self.now,
                    "direction": decision.direction.value,
                    "reason": decision.reason.value,
                    "from": decision.before,
                    "to": decision.after,
                    "replaced": decision.replaced,
                }
            )
        )

    def pass_time(self, minutes: float, *, arriving: bool = True) -> None:
        """What was on its way arrives, unless it is slow; what was leaving is gone."""
        self.now += timedelta(minutes=minutes)
        self.team = [w for w in self.team if not w.deleting]
        if not arriving:
            return
        for worker in self.team:
            if worker.status.phase == "Pending":
                worker.status.phase = "Ready"
                worker.status.timestamps.ready_at = self.now


BOUNDS = st.tuples(st.integers(0, 4), st.integers(0, 4)).map(lambda b: (b[0], b[0] + b[1]))
POLICIES: st.SearchStrategy[Policy] = st.sampled_from(["None", "CapacityBased", "LabCountBased", "Scheduled", "Hybrid"])


@settings(max_examples=60, deadline=None)
@given(
    policy=st.sampled_from(["CapacityBased", "LabCountBased", "Hybrid"]),
    bounds=BOUNDS,
    cpu=st.floats(0, 6),
    labs=st.integers(0, 80),
    limits=st.tuples(st.floats(0.05, 1), st.floats(0, 0.95), st.integers(0, 6)),
    wanted=st.just((0, 0)) | st.tuples(st.integers(0, 60), st.integers(0, 60)),
)
def test_a_constant_load_settles_and_nothing_moves_again(
    *,
    policy: str,
    bounds: tuple[int, int],
    cpu: float,
    labs: int,
    limits: tuple[float, float, int],
    wanted: tuple[int, int],
) -> None:
    up, share, start = limits
    story = Story(
        a_pool(
            policy=policy,
            minWorkers=bounds[0],
            maxWorkers=bounds[1],
            thresholds={"cpuUp": up, "cpuDown": up * share, "memoryUp": up, "memoryDown": up * share},
        )
    )
    story.team = [a_worker(f"w{i}") for i in range(start)]
    for _ in range(start + bounds[1] + 3):
        story.decide(story.load(cpu, labs, *wanted))
        story.pass_time(30)
    settled = len(story.taken)
    for _ in range(10):
        assert not story.decide(story.load(cpu, labs, *wanted)).acts, story.taken
        story.pass_time(30)
    assert len(story.taken) == settled
    moves = [d.direction for d in story.taken if d.reason not in (Reason.BELOW_WISHED, Reason.ABOVE_MAXIMUM)]
    assert moves in ([Direction.UP] * len(moves), [Direction.DOWN] * len(moves)), "it went both ways"


EVENTS = st.sampled_from(
    [*["time"] * 5, *["fail"] * 3, "slow", "fill", "empty", "delete", "scale", "bounds", "policy", "retire"]
)
CPU = st.sampled_from([None, 0.0, 0.1, 5.0]) | st.floats(0, 5)


@settings(max_examples=80, deadline=None)
@given(data=st.data(), policy=POLICIES, bounds=BOUNDS, events=st.lists(EVENTS, min_size=10, max_size=40))
def test_whatever_happens_bounds_hold_labs_stay_and_replacements_are_few(
    data: st.DataObject, policy: str, bounds: tuple[int, int], events: list[str]
) -> None:
    story = Story(a_pool(policy=policy, minWorkers=bounds[0], maxWorkers=bounds[1]))
    spec = story.pool.spec
    for event in events:
        members = [w for w in story.team if not w.deleting]
        one = data.draw(st.sampled_from(members), label="worker") if members else None
        if event in ("time", "slow"):
            story.pass_time(data.draw(st.sampled_from([0.5, 12, 45])), arriving=event == "time")
        elif event == "scale":
            spec.replicas = data.draw(st.none() | st.integers(spec.min_workers, spec.max_workers))
        elif event == "bounds":
            spec.min_workers, spec.max_workers = data.draw(BOUNDS)
        elif event == "policy":
            spec.policy = data.draw(POLICIES)
        elif event == "fail" and one is not None:
            one.status.phase, one.status.ec2.state = "Failed", "terminated"
        elif event == "retire" and one is not None and one.status.phase == "Ready":
            one.status.phase, one.spec.desired_phase = "Stopped", "Stopped"
        elif event == "fill" and one is not None:
            story.hosting.add(one.name)
        elif event == "empty" and one is not None:
            story.hosting.discard(one.name)
        elif event == "delete" and one is not None:
            one.metadata.deletion_timestamp = story.now
        cpu, labs = data.draw(CPU), data.draw(st.sampled_from([None, 0, 3, 60]))
        was = [w.status.phase for w in story.team if not w.deleting]
        load = story.load(cpu, labs, data.draw(st.sampled_from([0, 0, 40])))
        decision = story.decide(load)
        if decision.reason in (Reason.CPU, Reason.MEMORY, Reason.LABS, Reason.WAITING_LABS, Reason.IDLE):
            assert "Pending" not in was, "a decision by load while one was on its way"
        if decision.direction is Direction.REPLACE:
            hour_ago = story.now - timedelta(hours=1)
            lately = [d.replaced for d in story.pool.status.scaling_history if d.at > hour_ago]
            assert sum(lately) <= spec.replace_failed.max_per_hour


@settings(max_examples=60, deadline=None)
@given(
    policy=POLICIES,
    bounds=BOUNDS,
    phases=st.lists(st.sampled_from(["Ready", "Active", "Failed", "Pending"]), max_size=8),
)
def test_what_a_person_asks_for_is_reached_and_then_left_alone(
    policy: str, bounds: tuple[int, int], phases: list[str]
) -> None:
    story = Story(a_pool(policy=policy, minWorkers=bounds[0], maxWorkers=bounds[1]), workers(*phases))
    for _ in range(12):
        story.decide(story.load())
        story.pass_time(61)
    members = [w for w in story.team if not w.deleting]
    assert bounds[0] <= len(members) <= bounds[1]
    assert "Failed" not in {w.status.phase for w in members}
    assert not story.decide(story.load()).acts
