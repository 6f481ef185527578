"""The workers' decisions, each from what is known alone."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from controllers.aws.ec2 import Ec2Instance
from controllers.failure import Failure
from controllers.workers.decisions import (
    KEEPABLE,
    Goal,
    absence_proves,
    at_rest,
    choose,
    client_token,
    goal_of,
    in_doubt,
    launch_parameters,
    may_hold_seat,
    may_license,
    may_retry,
    next_launch,
    over,
    problem,
)
from controllers.workers.departure import listed_since_drain
from controllers.workers.kind import LabWorker
from controllers.workers.phases import Conditions
from controllers.workers.status import Ec2Status, Problem, Registration

NOW = datetime(2026, 5, 1, 12, tzinfo=UTC)
STATES = ("pending", "running", "stopping", "stopped", "shutting-down", "terminated")


def a_worker(**spec: Any) -> LabWorker:
    return LabWorker.model_validate(
        {
            "metadata": {"name": "w1", "uid": "u-1", "generation": 3},
            "spec": {"region": "us-east-1", "aws": {"amiId": "ami-12345678"}, **spec},
        }
    )


def ago(seconds: float) -> datetime:
    return NOW - timedelta(seconds=seconds)


def test_a_deleting_worker_wants_to_end_whatever_its_spec_says() -> None:
    worker = a_worker(desiredPhase="Ready")
    assert goal_of(worker) is Goal.READY
    worker.metadata.deletion_timestamp = NOW
    assert goal_of(worker) is Goal.TERMINATED


def test_each_attempt_has_a_token_of_its_own_that_ec2_takes() -> None:
    tokens = {client_token(uid, n) for uid in ("a", "b") for n in range(50)}
    assert len(tokens) == 100
    assert all(len(t) <= 64 and t.isascii() for t in tokens)
    assert client_token("a", 1) == client_token("a", 1)


def next_of(worker: LabWorker) -> tuple[int, bool]:
    """The next attempt, and whether the stored copy is sent word for word."""
    attempt, parameters = next_launch(worker, "inst", now=NOW, trace_timeout=600)
    return attempt, parameters.to_json() == worker.status.ec2.launch


@pytest.mark.parametrize(
    ("sent", "spec_changed", "expected", "why"),
    [
        (5, False, (1, True), "it may have been carried out: the token finds out"),
        (5, True, (1, True), "the token knows the old parameters only"),
        (601, False, (2, False), "no trace for long: it was not made"),
        (601, True, (2, False), "no trace for long: it was not made"),
        (None, False, (1, True), "refused for certain, and asked the same again"),
        (None, True, (2, False), "refused for certain, and now something else is asked"),
    ],
)
def test_the_attempt_grows_only_where_nothing_can_come_of_the_last(
    sent: float | None, spec_changed: bool, expected: tuple[int, bool], why: str
) -> None:
    worker = a_worker()
    worker.status.ec2.attempt = 1
    worker.status.ec2.launch = launch_parameters(worker, 1, "inst").to_json()
    worker.status.ec2.sent_at = None if sent is None else ago(sent)
    if spec_changed:
        worker.spec.aws.instance_type = "m5.large"
    assert next_of(worker) == expected, why


def test_a_spent_launch_is_followed_by_the_next() -> None:
    worker = a_worker()
    worker.status.ec2.attempt = 4
    assert next_of(worker)[0] == 5


def test_a_launch_says_all_that_the_spec_says_and_carries_our_tags() -> None:
    worker = a_worker(
        aws={
            "amiId": "ami-12345678",
            "subnetId": "subnet-1",
            "securityGroupIds": ["sg-1"],
            "iops": 200,
            "volumeSizeGb": 20,
            "tags": {"course": "ccna"},
            "iamInstanceProfile": "profile",
        }
    )
    parameters = launch_parameters(worker, 1, "inst")
    assert parameters.tags == {
        "course": "ccna",
        "Name": "w1",
        "lrm/uid": "u-1",
        "lrm/installation": "inst",
        "lrm/name": "w1",
        "lrm/namespace": "default",
    }
    assert (parameters.subnet_id, parameters.security_group_ids) == ("subnet-1", ("sg-1",))
    assert (parameters.iops, parameters.volume_size_gb, parameters.iam_instance_profile) == (200, 20, "profile")


@pytest.mark.parametrize(
    ("status", "expected", "why"),
    [
        (Ec2Status(), False, "nothing was sent"),
        (Ec2Status(sent_at=ago(5)), True, "sent a moment ago, and nobody has seen it"),
        (Ec2Status(sent_at=ago(601)), False, "long enough without a trace"),
        (Ec2Status(sent_at=ago(5), instance_id="i-1"), False, "it is known"),
    ],
)
def test_a_launch_is_in_doubt_until_seen_or_long_without_trace(status: Ec2Status, expected: bool, why: str) -> None:
    assert in_doubt(status, NOW, 600) is expected, why


@pytest.mark.parametrize(
    ("status", "expected", "why"),
    [
        (Ec2Status(instance_id="i-1", first_seen_at=ago(301)), True, "all of EC2 has known it"),
        (Ec2Status(instance_id="i-1", first_seen_at=ago(299)), False, "some of EC2 may not know it yet"),
        (Ec2Status(instance_id="i-1", sent_at=ago(400)), False, "never seen: it has as long as a launch in doubt"),
        (Ec2Status(instance_id="i-1", sent_at=ago(601)), True, "never seen, and long ago"),
    ],
)
def test_not_found_is_believed_only_of_an_instance_that_was_known_for_long(
    status: Ec2Status, expected: bool, why: str
) -> None:
    assert absence_proves(status, NOW, gone_after=300, trace_timeout=600) is expected, why


def test_a_deadline_is_over_after_its_time_and_never_before_it_began() -> None:
    assert not over(None, 10, NOW)
    assert not over(ago(10), 10, NOW)
    assert over(ago(10.001), 10, NOW)


@given(st.lists(st.sampled_from(STATES), max_size=6), st.integers(min_value=0, max_value=7))
def test_one_is_kept_and_only_able_others_are_surplus(states: list[str], recorded: int) -> None:
    found = [Ec2Instance(id=f"i-{n}", state=state) for n, state in enumerate(states)]
    kept, surplus = choose(found, f"i-{recorded}")
    able = [i for i in found if i.state in KEEPABLE]
    assert (kept is None) == (not able)
    assert sorted(i.id for i in ([kept] if kept else []) + list(surplus)) == sorted(i.id for i in able)
    if kept is not None:
        wanted = next((i for i in able if i.id == f"i-{recorded}"), able[0])
        assert kept is wanted, "the recorded one, else the oldest"


def test_a_failure_is_lifted_by_a_new_generation_or_retry_alone() -> None:
    worker = a_worker()
    worker.status.failure = Failure(reason="x", message="", at=NOW, phase="Starting", generation=3, retry=None)
    assert not may_retry(worker)
    worker.metadata.annotations["lab.neuroglia.io/retry"] = "1"
    assert may_retry(worker)
    worker.metadata.annotations.clear()
    worker.metadata.generation = 4
    assert may_retry(worker)


def test_a_failed_licence_is_tried_again_for_another_wish_only() -> None:
    worker = a_worker()
    assert not may_license(worker), "none is wanted"
    worker = a_worker(cml={"licenseTokenFrom": {"env": "T"}})
    assert may_license(worker)
    failed = Problem(reason="x", message="", at=NOW)
    worker.status.cml.registration = Registration(failed=failed, generation=3, retry=None)
    assert not may_license(worker)
    worker.metadata.generation = 4
    assert may_license(worker)
    worker.spec.auto_license = False
    assert not may_license(worker)


SENT = Registration(sent_at=NOW)


@pytest.mark.parametrize(
    ("licensed", "registration", "expected", "why"),
    [
        (True, None, True, "CML says so"),
        (False, None, False, "nothing was asked for"),
        (False, SENT, True, "it may come through at any moment"),
        (False, Registration(failed=Problem(reason="LicenseTimeout", message="", at=NOW)), True, "it still may"),
        (False, Registration(failed=Problem(reason="RegistrationFailed", message="", at=NOW)), False, "CML says no"),
        (False, Registration(failed=Problem(reason="SecretUnavailable", message="", at=NOW)), False, "never sent"),
    ],
)
def test_a_seat_may_be_held_while_a_registration_can_come_through(
    licensed: bool, registration: Registration | None, expected: bool, why: str
) -> None:
    worker = a_worker()
    worker.status.cml.licensed, worker.status.cml.registration = licensed, registration
    assert may_hold_seat(worker) is expected, why


@pytest.mark.parametrize(
    ("listed", "error", "expected", "why"),
    [
        (None, None, False, "nobody knows a lab of it"),
        (ago(61), None, False, "a lab may have been started since"),
        (ago(60), None, True, "asked when the drain began"),
        (ago(1), None, True, "asked since"),
        (ago(1), "CML does not answer", False, "since then nobody knows"),
    ],
)
def test_a_drain_believes_a_list_of_labs_that_is_younger_than_itself(
    listed: datetime | None, error: str | None, expected: bool, why: str
) -> None:
    worker = a_worker()
    worker.status.timestamps.draining_started_at = ago(60)
    worker.status.labs_synced_at, worker.status.labs_sync_error = listed, error
    assert listed_since_drain(worker) is expected, why


def test_the_same_problem_keeps_its_time() -> None:
    first = problem(None, "A", "text", ago(60))
    assert problem(first, "A", "text", NOW) is first
    assert problem(first, "A", "other", NOW).at == NOW


def resting(phase: str, state: str, **spec: Any) -> LabWorker:
    """A worker of which nothing is expected."""
    worker = a_worker(**spec)
    worker.status = worker.status.model_copy(update={"phase": phase, "observed_generation": 3})
    worker.status.ec2.state, worker.status.cml.ready = state, phase != "Stopped"
    if phase == "Failed":
        worker.status.failure = Failure(reason="r", message="", at=NOW, generation=3, phase="Starting")
    return worker


RESTING = [
    ("Ready", "running", {}),
    ("ReadyUnlicensed", "running", {}),
    ("Active", "running", {}),
    ("Stopped", "stopped", {"desiredPhase": "Stopped"}),
    ("Failed", "running", {}),
    ("Terminated", "terminated", {"desiredPhase": "Terminated"}),
]


def _stir(worker: LabWorker, what: str) -> None:
    """Something that will not wait."""
    status, trouble = worker.status, Problem(reason="r", message="", at=NOW)
    match what:
        case "a new spec":
            worker.metadata.generation = 4
        case "another wish":
            worker.spec.desired_phase = "Terminated" if status.phase != "Stopped" else "Ready"
            status.observed_generation = worker.metadata.generation = 4
        case "the clock was set":
            status.set_condition(Conditions.CLOCK_STEADY, status=False, reason="r", message="", now=NOW)
        case "EC2 failed":
            status.ec2.last_error = trouble
        case "CML failed":
            status.cml.last_error, status.cml.failed_checks = trouble, 1
        case "the instance changed":
            status.ec2.state = "stopping"


@pytest.mark.parametrize(("phase", "state", "spec"), RESTING)
def test_a_worker_rests_while_nothing_is_wished_wrong_or_on_its_way(phase: str, state: str, spec: Any) -> None:
    assert at_rest(resting(phase, state, **spec))
    for what in ("a new spec", "the clock was set"):
        worker = resting(phase, state, **spec)
        _stir(worker, what)
        assert not at_rest(worker), what
    if phase != "Terminated":
        worker = resting(phase, state, **spec)
        _stir(worker, "another wish")
        assert not at_rest(worker)
    if phase not in {"Terminated", "Failed"}:
        for what in ("EC2 failed", "CML failed", "the instance changed"):
            worker = resting(phase, state, **spec)
            _stir(worker, what)
            assert not at_rest(worker), what


def test_a_worker_on_its_way_or_that_could_have_a_licence_does_not_rest() -> None:
    for phase in ("Pending", "ProvisioningEC2", "Starting", "Licensing", "Draining", "Unlicensing", "TerminatingEC2"):
        assert not at_rest(resting(phase, "running")), phase
    token = {"cml": {"licenseTokenFrom": {"env": "TOKEN"}}, "autoLicense": True}
    assert not at_rest(resting("ReadyUnlicensed", "running", **token))
    licensed = resting("ReadyUnlicensed", "running")
    licensed.status.cml.licensed = True
    assert not at_rest(licensed)
