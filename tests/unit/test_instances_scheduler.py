"""Who gets which place: order, filters, scores, quotas and reasons, against a planner that is too plain to be wrong."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from controllers.instances.kind import Need, WorkerRef
from controllers.instances.phases import Reasons
from controllers.instances.places import ENGINE
from controllers.instances.scheduler import Amount, Held, Place, Quota, Rules, Wanted, plan, who_fits
from controllers.instances.scheduling import Waits

NOON = datetime(2026, 1, 1, 12, tzinfo=UTC)
GIB = 1024**3
BIG = Amount(cpu=8, memory=32 * GIB, slots=4, nodes=20)


def place(name: str, namespace: str = "default", **traits: Any) -> Place:
    """A worker with room for four labs, 20 nodes, 8 cores and 32 GiB."""
    ref = WorkerRef(kind="LabWorker", namespace=namespace, name=name, uid=f"u-{name}", instance_id="i-1")
    return Place(**{"ref": ref, "closed": "", "total": BIG, "used": Amount(), "licensed_nodes": 200, **traits})


def engine(**traits: Any) -> Place:
    return Place(**{"ref": ENGINE, "closed": "", "total": Amount(4, 8 * GIB, 10, 10**9), "used": Amount(), **traits})


def wanted(uid: str, minute: int = 0, need: Need | None = None, **traits: Any) -> Wanted:
    """A CML lab of one core, 1 GiB and 2 nodes, asked for so many minutes after noon."""
    at = NOON + timedelta(minutes=minute)
    lab = {
        "uid": uid,
        "namespace": "default",
        "student": f"{uid}@x.edu",
        "runtime": "CML",
        "since": (at, at, uid),
        "need": need or Need(cpu=1, memory=GIB, nodes=2),
    }
    return Wanted(**{**lab, **traits})


def decide(
    waiting: Sequence[Wanted], places: Sequence[Place], rules: Rules | None = None
) -> dict[str, WorkerRef | Waits]:
    return dict(plan(waiting, places, rules or Rules(NOON), [w.uid for w in waiting]))


def told(decision: WorkerRef | Waits) -> str:
    """The name of the place, or the reason why there is none."""
    return decision.name if isinstance(decision, WorkerRef) else decision.reason


def names(decisions: Mapping[str, WorkerRef | Waits]) -> dict[str, str]:
    return {uid: told(decision) for uid, decision in decisions.items()}


FULL = {"used": BIG}
UNLICENSED = {"total": replace(BIG, nodes=5)}


@pytest.mark.parametrize(
    ("places", "lab", "outcome", "why"),
    [
        ([place("w")], {}, "w", "a worker with room in its own namespace"),
        ([], {}, Reasons.NO_WORKERS_AVAILABLE, "there is no worker at all"),
        ([place("w", "other")], {}, Reasons.NO_WORKERS_AVAILABLE, "another namespace's worker is not its own"),
        ([place("w", "other", shared=True)], {}, "w", "unless it is shared"),
        ([place("w", track="ccna")], {"track": "ccna"}, "w", "its track"),
        ([place("w", track="ccna")], {}, "w", "no track is every track"),
        ([place("w", track="ccnp")], {"track": "ccna"}, Reasons.NO_MATCHING_TRACK, "another track"),
        ([place("w")], {"pool": "p"}, Reasons.NO_MATCHING_POOL, "of no pool"),
        ([place("w", pools=frozenset({"p"}))], {"pool": "p"}, "w", "its pool"),
        (
            [place("w", pools=frozenset({"p"}), track="a"), place("v", track="b")],
            {"pool": "p", "track": "b"},
            Reasons.NO_MATCHING_TRACK,
            "the pool's workers have another track",
        ),
        ([place("w", closed="Starting")], {}, Reasons.NO_WORKERS_AVAILABLE, "it does not serve yet"),
        (
            [place("w", track="ccna", closed="Draining"), place("v", track="ccnp")],
            {"track": "ccna"},
            Reasons.NO_WORKERS_AVAILABLE,
            "the one of its track does not serve: another one that does is no help",
        ),
        ([place("w", **FULL)], {}, Reasons.NO_CAPACITY_AVAILABLE, "it could, and is full"),
        (
            [place("w", used=Amount(slots=4))],
            {"need": Need()},
            Reasons.NO_CAPACITY_AVAILABLE,
            "a lab that needs nothing needs a slot",
        ),
        ([place("w", used=Amount(cpu=7.5))], {}, Reasons.NO_CAPACITY_AVAILABLE, "half a core is left, and one needed"),
        ([place("w", used=Amount(cpu=sum([0.1] * 70)))], {}, "w", "ten sums of a tenth are one core"),
        ([place("w", used=Amount(memory=32 * GIB))], {}, Reasons.NO_CAPACITY_AVAILABLE, "no memory is left"),
        ([place("w", used=Amount(nodes=19))], {}, Reasons.NO_CAPACITY_AVAILABLE, "one node is left, and two needed"),
        (
            [place("w", **FULL), place("v", **UNLICENSED)],
            {"need": Need(nodes=6)},
            Reasons.NO_CAPACITY_AVAILABLE,
            "a licensed one is full",
        ),
        ([place("w", **UNLICENSED)], {"need": Need(nodes=6)}, Reasons.WORKER_NOT_LICENSED, "a licence would do"),
        ([place("w", **UNLICENSED)], {"need": Need(nodes=201)}, Reasons.TOO_LARGE, "a licence would not do"),
        (
            [place("w", **UNLICENSED)],
            {"need": Need(nodes=6, cpu=9)},
            Reasons.TOO_LARGE,
            "a licence alone would not do",
        ),
        (
            [place("w", **UNLICENSED, used=Amount(nodes=3))],
            {"need": Need(nodes=5)},
            Reasons.NO_CAPACITY_AVAILABLE,
            "it would fit without a licence, were the place empty",
        ),
        ([place("w")], {"need": Need(cpu=9)}, Reasons.TOO_LARGE, "more cores than any worker has"),
        (
            [place("w", total=replace(BIG, cpu=0), used=Amount(cpu=1))],
            {},
            Reasons.NO_CAPACITY_AVAILABLE,
            "what is not known is not there",
        ),
        (
            [place("w", total=replace(BIG, cpu=0), used=Amount(cpu=1))],
            {"need": Need(memory=GIB)},
            "w",
            "what is not known and not needed plays no part",
        ),
        ([place("w")], {"runtime": "Container"}, Reasons.ENGINE_UNAVAILABLE, "a worker runs no containers"),
        ([engine()], {}, Reasons.NO_WORKERS_AVAILABLE, "an engine runs no CML labs"),
        ([engine()], {"runtime": "Container"}, "docker", "the engine"),
        (
            [engine(used=Amount(cpu=3.5))],
            {"runtime": "Container"},
            Reasons.NO_CAPACITY_AVAILABLE,
            "the engine is full",
        ),
        ([engine()], {"runtime": "Container", "need": Need(cpu=5)}, Reasons.TOO_LARGE, "larger than the engine"),
    ],
)
def test_a_place_is_where_everything_fits_and_else_the_reason_says_what_would_help(
    places: list[Place], lab: dict[str, Any], outcome: str, why: str
) -> None:
    assert told(decide([wanted("a", **lab)], places)["a"]) == outcome, why


@pytest.mark.parametrize(
    ("need", "told", "most"),
    [
        (Need(cpu=1.5, memory=100 * GIB, nodes=1), "1.5 cores, 100 GiB, 1 node", "the most is 32 GiB"),
        (Need(cpu=9, nodes=300), "9 cores, 300 nodes", "the most is 8 cores, 200 nodes"),
        (Need(memory=32 * GIB, cpu=6), "6 cores, 32 GiB", "none has enough of each"),
    ],
)
def test_what_is_too_large_is_told_the_most_as_people_write_it(need: Need, told: str, most: str) -> None:
    places = [
        place("v", total=replace(BIG, cpu=4)),
        place("w", **(UNLICENSED if need.nodes else {"total": replace(BIG, memory=GIB)})),
    ]
    waits = decide([wanted("a", need=need)], places)["a"]
    assert isinstance(waits, Waits)
    reason = f"no worker that serves could take {told} even when empty; {most}; it waits for a larger one"
    assert (waits.reason, waits.message) == (Reasons.TOO_LARGE, reason)


def test_what_is_too_large_for_the_engine_is_told_the_most_too() -> None:
    waits = decide([wanted("a", runtime="Container", need=Need(cpu=1000))], [engine()])["a"]
    assert isinstance(waits, Waits)
    assert waits.message == "the engine could not take 1000 cores even when empty; the most is 4 cores"


def test_the_scheduled_time_goes_before_creation_and_creation_before_the_uid() -> None:
    one_slot = [place("w", total=replace(BIG, slots=1))]
    early, late = NOON - timedelta(hours=1), NOON
    young_but_planned_early = wanted("z", since=(early, late, "z"))
    older = wanted("b", since=(late, early, "b"))
    same_age = wanted("a", since=(late, early, "a"))
    assert told(decide([older, same_age, young_but_planned_early], one_slot)["z"]) == "w"
    assert told(decide([older, same_age], one_slot)["a"]) == "w"
    assert told(decide([older, wanted("a", since=(late, late, "a"))], one_slot)["b"]) == "w"


def test_what_one_takes_is_gone_for_the_next_and_what_does_not_fit_holds_up_nobody() -> None:
    lab = Need(cpu=3)
    decisions = decide(
        [wanted("a", 0, lab), wanted("b", 1, Need(cpu=9)), wanted("c", 2, lab), wanted("d", 3, lab)], [place("w")]
    )
    assert names(decisions) == {
        "a": "w",
        "b": Reasons.TOO_LARGE,
        "c": "w",
        "d": Reasons.NO_CAPACITY_AVAILABLE,
    }


def test_one_that_is_not_ready_takes_no_room() -> None:
    one_slot = [place("w", total=replace(BIG, slots=1))]
    assert names(decide([wanted("a", 0, ready=False), wanted("b", 1)], one_slot)) == {"b": "w"}


def test_best_fit_takes_the_fullest_and_leaves_empty_places_empty() -> None:
    places = [
        place("half", used=Amount(cpu=4, slots=2)),
        place("fuller", used=Amount(cpu=6, slots=1)),
        place("small", total=replace(BIG, cpu=1)),
        place("full", used=Amount(cpu=8, slots=1)),
    ]
    assert told(decide([wanted("a")], places)["a"]) == "fuller"


def test_least_used_takes_the_emptiest_by_what_is_scarcest_there() -> None:
    places = [
        place("cores", used=Amount(cpu=4, slots=1)),
        place("nodes", used=Amount(nodes=17, slots=1)),
        place("memory", used=Amount(memory=12 * GIB, slots=1)),
    ]
    assert told(decide([wanted("a")], places, Rules(NOON, "LeastUsed"))["a"]) == "memory"


def test_round_robin_goes_on_from_the_last_and_begins_again() -> None:
    places = [place("w2"), place("w1"), place("w3", used=BIG), place("w4")]
    rules = Rules(NOON, "RoundRobin", last=("default", "w1"))
    labs = [wanted(uid, n) for n, uid in enumerate("abcd")]
    assert list(names(decide(labs, places, rules)).values()) == ["w2", "w4", "w1", "w2"]


@pytest.mark.parametrize("policy", ["BestFit", "LeastUsed", "RoundRobin"])
def test_a_doubtful_place_is_taken_only_where_no_other_has_room(policy: Any) -> None:
    used = Amount(slots=3 if policy == "BestFit" else 0)
    places = [place("a", used=used, doubtful=True), place("b", used=Amount(slots=2), track="t")]
    rules = Rules(NOON, policy)
    assert names(decide([wanted("x"), wanted("y"), wanted("z")], places, rules)) == {"x": "b", "y": "b", "z": "a"}


def test_a_reservation_of_its_own_is_kept_while_it_can_be() -> None:
    mine = place("mine", used=BIG)
    free = place("free", used=Amount(slots=1))
    held = Rules(NOON, held={"a": Held(mine.ref, Amount(cpu=1, memory=GIB, slots=1, nodes=2))})
    assert told(decide([wanted("a")], [mine, free], held)["a"]) == "mine"
    assert told(decide([wanted("a")], [replace(mine, closed="Draining"), free], held)["a"]) == "free"
    assert told(decide([wanted("a", need=Need(cpu=2))], [mine, free], held)["a"]) == "free"
    moved = replace(mine, ref=mine.ref.model_copy(update={"instance_id": "i-2"}))
    assert told(decide([wanted("a")], [moved, free], held)["a"]) == "free"


def test_those_that_run_count_first_and_then_those_that_wait_oldest_first() -> None:
    ann = {"student": "ann@x.edu"}
    quota = Quota(per_student=3, students={("default", "ann@x.edu"): 1})
    labs = [wanted("d", 3, **ann), wanted("c", 2, **ann), wanted("a", 0, **ann), wanted("bob", 4)]
    assert names(decide(labs, [place("w")], Rules(NOON, quota=quota))) == {
        "a": "w",
        "c": "w",
        "d": Reasons.QUOTA_EXCEEDED,
        "bob": "w",
    }


@pytest.mark.parametrize(
    ("first", "why"),
    [
        ({"ready": False}, "one whose time or retry has not come"),
        ({"need": Need(cpu=99)}, "one that does not fit anywhere"),
    ],
)
def test_one_that_waits_counts_for_the_quota_whatever_it_waits_for(first: dict[str, Any], why: str) -> None:
    ann = {"student": "ann@x.edu"}
    labs = [wanted("a", 0, **ann, **first), wanted("b", 1, **ann)]
    decisions = decide(labs, [place("w")], Rules(NOON, quota=Quota(per_student=1)))
    assert told(decisions["b"]) == Reasons.QUOTA_EXCEEDED, why


def test_a_quota_is_a_students_in_a_namespace_or_a_namespaces() -> None:
    ann = {"student": "ann@x.edu"}
    shared = [place("w", shared=True)]
    labs = [wanted("a", 0, **ann), wanted("b", 1, **ann, namespace="other")]
    assert names(decide(labs, shared, Rules(NOON, quota=Quota(per_student=1)))) == {"a": "w", "b": "w"}
    labs = [wanted("a", 0), wanted("b", 1), wanted("c", 2, namespace="other")]
    rules = Rules(NOON, quota=Quota(per_namespace=3, namespaces={"default": 2}))
    assert names(decide(labs, shared, rules)) == {"a": "w", "b": Reasons.QUOTA_EXCEEDED, "c": "w"}


def test_more_run_than_a_lowered_quota_allows_and_none_is_promised_more() -> None:
    quota = Quota(per_student=1, students={("default", "ann@x.edu"): 3})
    decisions = decide([wanted("a", student="ann@x.edu")], [place("w")], Rules(NOON, quota=quota))
    assert told(decisions["a"]) == Reasons.QUOTA_EXCEEDED


def test_who_is_not_asked_for_takes_room_before_and_is_told_no_reason() -> None:
    labs = [wanted("a", 0), wanted("b", 1, Need(cpu=99)), wanted("c", 2), wanted("d", 3)]
    one_slot = [place("w", total=replace(BIG, slots=1))]
    assert names(dict(plan(labs, one_slot, Rules(NOON), ["c"]))) == {"a": "w", "c": Reasons.NO_CAPACITY_AVAILABLE}


# Against a plain planner

AMOUNTS = st.builds(
    Amount, st.sampled_from([0, 1, 2, 4]), st.sampled_from([0, 4, 8]), st.integers(0, 3), st.integers(0, 6)
)
NEEDS = st.builds(
    Need,
    cpu=st.sampled_from([0, 0.5, 1, 3]),
    memory=st.sampled_from([0, 1, 5]),
    nodes=st.integers(0, 4),
    slots=st.just(1),
)


@st.composite
def all_places(draw: st.DrawFn) -> list[Place]:
    found = [
        place(
            f"w{n}",
            draw(st.sampled_from(["default", "other"])),
            total=draw(AMOUNTS),
            used=draw(st.one_of(st.just(Amount()), AMOUNTS)),
            closed=draw(st.sampled_from(["", "", "", "Starting"])),
            doubtful=draw(st.booleans()),
            shared=draw(st.booleans()),
            track=draw(st.sampled_from(["", "t"])),
            pools=frozenset(draw(st.sampled_from([(), ("p",)]))),
        )
        for n in range(draw(st.integers(0, 5)))
    ]
    return [*found, *draw(st.sampled_from([[], [engine(total=Amount(2, 6, 3, 10**9))]]))]


@st.composite
def all_waiting(draw: st.DrawFn) -> list[Wanted]:
    return [
        wanted(
            f"r{n}",
            draw(st.integers(0, 3)),
            draw(NEEDS),
            namespace=draw(st.sampled_from(["default", "other"])),
            student=draw(st.sampled_from(["ann", "bob"])),
            runtime=draw(st.sampled_from(["CML", "CML", "Container"])),
            track=draw(st.sampled_from(["", "", "t"])),
            pool=draw(st.sampled_from([None, None, "p"])),
            ready=draw(st.sampled_from([True, True, True, False])),
            begins=draw(st.sampled_from([None, None, NOON, NOON + timedelta(seconds=1)])),
            ends=draw(st.sampled_from([None, None, NOON, NOON + timedelta(seconds=1)])),
        )
        for n in range(draw(st.integers(0, 8)))
    ]


RULES = st.builds(
    Rules,
    st.just(NOON),
    st.sampled_from(["BestFit", "LeastUsed", "RoundRobin"]),
    st.builds(Quota, st.integers(0, 3), st.integers(0, 4), st.just({("default", "ann"): 1}), st.just({"default": 1})),
)


def may_take(lab: Wanted, where: Place, free: Amount) -> bool:
    """The rules once more, one by one."""
    need = lab.need
    assert need is not None
    room = all(
        getattr(need, what) == 0 or getattr(need, what) <= getattr(free, what)
        for what in ("cpu", "memory", "nodes", "slots")
    )
    if where.closed or not room:
        return False
    if where.ref.kind == "Engine" or lab.runtime == "Container":
        return where.ref.kind == "Engine" and lab.runtime == "Container"
    near = where.shared or where.ref.namespace == lab.namespace
    return near and lab.track in ("", where.track) and (lab.pool is None or lab.pool in where.pools)


@settings(max_examples=400, deadline=None)
@given(all_waiting(), all_places(), RULES, st.randoms())
def test_a_plan_overdraws_nothing_leaves_out_nothing_that_fits_and_keeps_the_quotas(
    waiting: list[Wanted], places: list[Place], rules: Rules, chance: Any
) -> None:
    decisions = decide(waiting, places, rules)
    free = {p.ref.name: p.free for p in places}
    where = {p.ref.name: p for p in places}
    students, namespaces = dict(rules.quota.students), dict(rules.quota.namespaces)
    for lab in sorted(waiting, key=lambda w: w.since):
        student, namespace = (lab.namespace, lab.student), lab.namespace
        decision = decisions.get(lab.uid)
        beyond = (0 < rules.quota.per_student <= students.get(student, 0)) or (
            0 < rules.quota.per_namespace <= namespaces.get(namespace, 0)
        )
        if beyond:
            assert isinstance(decision, Waits)
            assert decision.reason == Reasons.QUOTA_EXCEEDED
            continue
        students[student] = students.get(student, 0) + 1
        namespaces[namespace] = namespaces.get(namespace, 0) + 1
        if not lab.ready or lab.begins not in (None, NOON) or lab.ends == NOON:
            assert decision is None
        elif isinstance(decision, WorkerRef):
            assert may_take(lab, where[decision.name], free[decision.name])
            free[decision.name] -= lab.need  # type: ignore[operator]
        else:
            assert isinstance(decision, Waits)
            assert decision.reason != Reasons.QUOTA_EXCEEDED
            assert not any(may_take(lab, p, free[p.ref.name]) for p in places)
    assert set(who_fits(waiting, places, rules)) == {u for u, d in decisions.items() if isinstance(d, WorkerRef)}
    shuffled = list(waiting)
    chance.shuffle(shuffled)
    assert decide(shuffled, places, rules) == decisions
    for lab in waiting:
        alone = dict(plan(waiting, places, rules, [lab.uid]))
        assert alone.get(lab.uid) == decisions.get(lab.uid)


def placed_in(decisions: Iterable[WorkerRef | Waits]) -> int:
    return sum(isinstance(decision, WorkerRef) for decision in decisions)


def test_five_hundred_equal_labs_fill_the_places_and_the_rest_waits() -> None:
    places = [place(f"w{n}") for n in range(50)]
    decisions = decide([wanted(f"r{n:03}", n) for n in range(500)], places)
    assert placed_in(decisions.values()) == 200
    assert [uid for uid, d in decisions.items() if isinstance(d, WorkerRef)] == [f"r{n:03}" for n in range(200)]
