"""Which instances nobody claims: each judgement from what EC2 and the store were heard to say, alone."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from controllers.aws.ec2 import Ec2Instance
from controllers.aws.place import Place
from controllers.sweep.judge import Claims, Suspect, are_too_many, claims_of, is_suspect, sweep
from controllers.workers.claims import SWEEP_CLAIM, holding
from controllers.workers.decisions import RETAIN_TAG, UID_TAG, tags_of
from controllers.workers.kind import LabWorker

NOW = datetime(2026, 5, 1, 12, tzinfo=UTC)
NOBODY = Claims(frozenset(), frozenset())
YOUNGEST = 600.0
HERE = Place("us-east-1")


def an_instance(name: str = "i-1", *, uid: str = "gone", age: float | None = 3600, **tags: str) -> Ec2Instance:
    launched = None if age is None else NOW - timedelta(seconds=age)
    return Ec2Instance(id=name, state="running", launch_time=launched, tags={UID_TAG: uid, **tags})


def a_worker(uid: str = "u-1", **aws: Any) -> LabWorker:
    spec = {"region": "us-east-1", "aws": {"amiId": "ami-12345678", **aws}}
    return LabWorker.model_validate({"metadata": {"name": "w1", "uid": uid}, "spec": spec})


def look(before: dict[str, Suspect], *instances: Ec2Instance, claims: Claims = NOBODY) -> dict[str, Suspect]:
    return sweep(before, {HERE: instances}, claims, now=NOW, youngest=YOUNGEST)


def test_only_the_second_look_in_a_row_makes_an_orphan() -> None:
    first = look({}, an_instance())
    assert [(s.sweeps, s.is_orphan, s.since) for s in first.values()] == [(1, False, NOW)]
    second = look(first, an_instance())
    assert [(s.sweeps, s.is_orphan, s.since) for s in second.values()] == [(2, True, NOW)]
    assert look(second) == {}, "it has ended"
    claimed = look(second, an_instance(), claims=Claims(frozenset({"gone"}), frozenset()))
    assert claimed == {}
    assert not look(claimed, an_instance())["i-1"].is_orphan, "it begins anew"


def test_a_region_that_did_not_answer_neither_confirms_nor_clears() -> None:
    before = look({}, an_instance())
    assert sweep(before, {}, NOBODY, now=NOW, youngest=YOUNGEST) == before
    assert sweep(before, {Place("eu-west-1"): []}, NOBODY, now=NOW, youngest=YOUNGEST) == before


def test_another_uid_on_the_same_instance_is_another_case() -> None:
    again = look(look({}, an_instance()), an_instance(uid="adopted-and-lost"))
    assert not again["i-1"].is_orphan


@pytest.mark.parametrize(
    ("instance", "claims", "expected", "why"),
    [
        (an_instance(), NOBODY, True, "nobody names it"),
        (an_instance(uid="u-1"), claims_of([a_worker()], []), False, "a launch whose id nobody knows yet"),
        (
            an_instance("i-0123456789abcdef0"),
            claims_of([a_worker(instanceId="i-0123456789abcdef0")], []),
            False,
            "named",
        ),
        (an_instance(), claims_of([a_worker()], ["i-1"]), False, "an adoption's key stands for it"),
        (an_instance(uid=""), claims_of([a_worker()], []), True, "somebody took its uid tag away"),
        (an_instance(age=YOUNGEST - 1), NOBODY, False, "its launch may be in doubt still"),
        (an_instance(age=None), NOBODY, False, "how old it is EC2 did not say"),
    ],
)
def test_what_speaks_for_an_instance(instance: Ec2Instance, claims: Claims, expected: bool, why: str) -> None:
    assert is_suspect(instance, claims, now=NOW, youngest=YOUNGEST) is expected, why


def test_what_the_sweep_is_ending_is_told_as_taken() -> None:
    assert holding({"i-1": orjson.loads(SWEEP_CLAIM)}, [a_worker()]) == {"i-1": "the sweep, which ends it"}


def test_what_a_status_names_is_claimed_whatever_its_tags_say() -> None:
    worker = a_worker()
    worker.status.ec2.instance_id = "i-recorded"
    worker.status.ec2.surplus = ["i-surplus"]
    claims = claims_of([worker], [])
    assert claims.has(an_instance("i-recorded"))
    assert claims.has(an_instance("i-surplus"))
    assert not claims.has(an_instance("i-other"))


def test_the_tags_of_what_is_to_be_kept_say_so() -> None:
    assert RETAIN_TAG not in tags_of(a_worker(), "inst")
    assert RETAIN_TAG in tags_of(a_worker(amiId=None, instanceId="i-0123456789abcdef0"), "inst")
    worker = a_worker()
    worker.spec.deletion_policy = "Retain"
    assert RETAIN_TAG in tags_of(worker, "inst")
    (suspect,) = look({}, an_instance(**{RETAIN_TAG: "true"})).values()
    assert suspect.retained


@pytest.mark.parametrize(
    ("orphans", "found", "expected"), [(9, 9, False), (10, 10, True), (10, 19, True), (10, 20, False), (0, 0, False)]
)
def test_where_most_would_be_orphans_the_store_is_doubted(orphans: int, found: int, expected: bool) -> None:
    assert are_too_many(orphans, found) is expected


def test_a_suspect_survives_being_written_down() -> None:
    (suspect,) = look({}, an_instance()).values()
    assert Suspect.from_document(orjson.loads(orjson.dumps(suspect.document()))) == suspect


def test_a_suspect_of_a_version_that_knew_one_account_is_of_the_daemons_own() -> None:
    document = next(iter(look({}, an_instance()).values())).document()
    del document["account"]
    assert Suspect.from_document(document).place == HERE


def test_the_same_instance_id_in_another_account_is_another_case() -> None:
    there = Place(HERE.region, "training")
    before = look({}, an_instance())
    after = sweep(before, {HERE: [], there: [an_instance()]}, NOBODY, now=NOW, youngest=YOUNGEST)
    assert [(s.place, s.sweeps) for s in after.values()] == [(there, 1)]


@pytest.mark.parametrize(
    "change",
    [
        {"since": "2026-05-01T12:00:00"},
        {"since": "0001-01-01T00:00:00+14:00"},
        {"since": "9999-12-31T23:59:59-14:00"},
        {"since": None},
        {"sweeps": "many"},
        {"uid": ...},
    ],
)
def test_what_was_not_written_by_a_sweep_is_not_believed(change: dict[str, Any]) -> None:
    document = {**next(iter(look({}, an_instance()).values())).document(), **change}
    told = {name: value for name, value in document.items() if value is not ...}
    with pytest.raises((KeyError, TypeError, ValueError)):
        Suspect.from_document(told)


@given(st.lists(st.sampled_from(["seen", "claimed", "absent", "failed"]), max_size=12))
def test_an_orphan_was_seen_unclaimed_twice_with_nothing_else_but_silence_between(looks: list[str]) -> None:
    suspects: dict[str, Suspect] = {}
    in_a_row = 0
    for what in looks:
        instances = [] if what == "absent" else [an_instance()]
        claims = Claims(frozenset({"gone"}), frozenset()) if what == "claimed" else NOBODY
        found = {} if what == "failed" else {HERE: instances}
        suspects = sweep(suspects, found, claims, now=NOW, youngest=YOUNGEST)
        in_a_row = in_a_row if what == "failed" else in_a_row + 1 if what == "seen" else 0
        held = suspects.get("i-1")
        assert (held.sweeps if held else 0) == in_a_row
        if held is not None:
            assert held == replace(held, since=NOW)
