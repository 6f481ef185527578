"""The table of a LabWorker's phases: what DESIGN draws, and nothing else."""

from __future__ import annotations

import pytest

from controllers.workers.kind import LAB_WORKER
from controllers.workers.phases import CML_RUNNING, SERVING, TRANSITIONS, Phase

WAYS = [
    ("Pending", "ProvisioningEC2", "a launch begins"),
    ("Pending", "Starting", "a running instance is adopted"),
    ("Pending", "Stopped", "a stopped instance is adopted"),
    ("ProvisioningEC2", "EC2Ready", "EC2 runs it"),
    ("ProvisioningEC2", "Stopping", "stopped before it served"),
    ("EC2Ready", "Starting", "CML boots"),
    ("EC2Ready", "Stopping", "stopped before it served"),
    ("Starting", "Licensing", "a licence is wanted"),
    ("Starting", "ReadyUnlicensed", "none is wanted"),
    ("Starting", "Stopping", "stopped before it served"),
    ("Licensing", "Ready", "licensed"),
    ("Licensing", "ReadyUnlicensed", "the licence failed"),
    ("ReadyUnlicensed", "Licensing", "another try"),
    ("ReadyUnlicensed", "Active", "a lab runs"),
    ("Active", "ReadyUnlicensed", "the last lab ended"),
    ("Ready", "Active", "a lab runs"),
    ("Active", "Ready", "the last lab ended"),
    ("Ready", "Draining", "taken out of service"),
    ("ReadyUnlicensed", "Draining", "taken out of service"),
    ("Active", "Draining", "taken out of service"),
    ("Draining", "Ready", "cancelled"),
    ("Draining", "ReadyUnlicensed", "cancelled"),
    ("Draining", "Unlicensing", "drained, with a licence"),
    ("Draining", "Stopping", "drained, without"),
    ("Unlicensing", "Stopping", "the seat is back"),
    ("Unlicensing", "TerminatingEC2", "the seat is back"),
    ("Stopping", "Stopped", "EC2 says so"),
    ("Stopped", "Starting", "started again"),
    ("Ready", "Stopped", "EC2 says so"),
    ("ReadyUnlicensed", "Stopped", "EC2 says so"),
    ("Active", "Stopped", "EC2 says so"),
    ("TerminatingEC2", "Terminated", "EC2 says so"),
    ("Failed", "Starting", "tried again with its instance"),
    ("Failed", "Stopping", "stopped instead"),
    ("Failed", "TerminatingEC2", "ended"),
    ("Failed", "Pending", "tried again without an instance"),
]

NO_WAYS = [
    ("Pending", "Ready", "nothing is skipped"),
    ("Pending", "EC2Ready", "nothing is skipped"),
    ("ProvisioningEC2", "Starting", "EC2Ready lies between"),
    ("Starting", "Ready", "licensed or not is decided first"),
    ("Starting", "Active", "it does not serve yet"),
    ("Draining", "Active", "a cancelled drain serves first"),
    ("Draining", "Stopped", "Stopping lies between"),
    ("Stopped", "Ready", "it boots first"),
    ("Stopping", "Starting", "a stop is not called back"),
    ("Failed", "Ready", "a failure is not forgotten"),
    ("Failed", "Stopped", "what EC2 says is looked at first"),
    ("TerminatingEC2", "Starting", "an end is not called back"),
    ("TerminatingEC2", "Unlicensing", "too late for that"),
]


@pytest.mark.parametrize(("source", "target", "why"), WAYS)
def test_these_ways_are_open(source: str, target: str, why: str) -> None:
    assert LAB_WORKER.may_follow(source, target), why


@pytest.mark.parametrize(("source", "target", "why"), NO_WAYS)
def test_these_are_not(source: str, target: str, why: str) -> None:
    assert not LAB_WORKER.may_follow(source, target), why


def test_every_phase_is_in_the_table_and_can_fail_or_end_but_for_the_final_one() -> None:
    assert set(TRANSITIONS) == {p.value for p in Phase}
    for phase, following in TRANSITIONS.items():
        if phase == "Terminated":
            assert not following
            continue
        assert following >= {"Failed", "TerminatingEC2"} - {phase}
        assert phase not in following
        assert ("Unlicensing" in following) == (phase not in {"Unlicensing", "TerminatingEC2"})


def test_every_phase_can_be_reached_and_every_phase_can_reach_the_end() -> None:
    def reach(start: str) -> set[str]:
        seen, queue = {start}, [start]
        while queue:
            for following in TRANSITIONS[queue.pop()]:
                if following not in seen:
                    seen.add(following)
                    queue.append(following)
        return seen

    assert reach("Pending") == set(TRANSITIONS)
    for phase in Phase:
        assert "Terminated" in reach(phase)


def test_cml_runs_wherever_labs_are_served() -> None:
    assert SERVING < CML_RUNNING < set(Phase)
