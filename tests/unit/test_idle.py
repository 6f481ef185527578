"""When a worker is idle, and when a pause ends: each from what is known alone."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from controllers.cml.models import TelemetryEvent
from controllers.workers.conditions import refresh
from controllers.workers.decisions import Goal, goal_of
from controllers.workers.idle import (
    FOREVER,
    Activity,
    activity_of,
    is_idle,
    is_kept_up,
    is_lifted,
    noted,
    quiet_since,
    snoozed_until,
    stops_only_empty,
)
from controllers.workers.kind import SNOOZE_ANNOTATION, WAKE_ANNOTATION, LabWorker, validate
from controllers.workers.spec import IdleDetection
from controllers.workers.status import Allocation, IdleStatus, Problem
from lrm.model import rfc3339

NOW = datetime(2026, 5, 1, 12, tzinfo=UTC)
NO_TIME = datetime.min.replace(tzinfo=UTC)
"""What deadlines are judged by just after the wall clock was set."""


def ago(minutes: float) -> datetime:
    return NOW - timedelta(minutes=minutes)


def a_worker(**detection: Any) -> LabWorker:
    """An unused worker: up for 90 min, not used for 70, its labs listed a minute ago; 60 min make it idle."""
    worker = LabWorker.model_validate(
        {
            "metadata": {"name": "w1", "uid": "u-1", "generation": 3},
            "spec": {
                "region": "us-east-1",
                "aws": {"amiId": "ami-12345678"},
                "idleDetection": {"enabled": True, **detection},
            },
        }
    )
    status = worker.status
    status.phase = "Starting"
    status.enter("ReadyUnlicensed", "Serving", ago(90))
    status.idle = IdleStatus(last_activity_at=ago(70), user_events=4, latest_event_at=ago(75))
    status.labs_synced_at = ago(1)
    return worker


def event(category: str, minutes: float | None = 5, **data: Any) -> TelemetryEvent:
    return TelemetryEvent(category=category, timestamp=None if minutes is None else ago(minutes), data=data)


Change = Callable[[LabWorker], None]


def _sets(path: str, value: Any) -> Change:
    *parts, last = path.split(".")

    def change(worker: LabWorker) -> None:
        target: Any = worker
        for part in parts:
            target = getattr(target, part)
        setattr(target, last, value)

    return change


def _annotates(key: str, value: str) -> Change:
    return lambda worker: worker.metadata.annotations.update({key: value})


def _places(worker: LabWorker) -> None:
    worker.status.allocations["instance"] = Allocation()


KEEPS_UP: list[tuple[str, Change]] = [
    ("it is not asked for", _sets("spec.idle_detection.enabled", False)),
    ("somebody did something 59 min ago", _sets("status.idle.last_activity_at", ago(59))),
    ("nobody has looked yet", _sets("status.idle", None)),
    ("CML was never heard", _sets("status.idle.last_activity_at", None)),
    ("its last lab ended, or it was started, half an hour ago", lambda w: w.status.enter("Ready", "x", ago(30))),
    ("it is on its way down already", lambda w: w.status.enter("Draining", "x", ago(80))),
    ("it wishes something else by itself", _sets("spec.desired_phase", "Draining")),
    ("it is being deleted", _sets("metadata.deletion_timestamp", NOW)),
    ("a lab instance is placed on it", _places),
    ("the spec's snooze lasts", _sets("spec.idle_detection.snooze_until", NOW + timedelta(minutes=1))),
    ("the annotation's snooze lasts", _annotates(SNOOZE_ANNOTATION, rfc3339(NOW + timedelta(minutes=1)))),
    ("somebody snoozed it with a slip of the pen", _annotates(SNOOZE_ANNOTATION, "tomorrow")),
    ("its labs were never listed", _sets("status.labs_synced_at", None)),
    ("its labs were not listed since it was used", _sets("status.labs_synced_at", ago(71))),
    ("its labs could not be listed", _sets("status.labs_sync_error", "CML does not answer")),
]


def test_a_worker_that_nobody_uses_is_idle() -> None:
    assert is_idle(a_worker(), NOW, runs_labs=False)


@pytest.mark.parametrize(("why", "change"), KEEPS_UP, ids=[why for why, _ in KEEPS_UP])
def test_a_worker_is_not_idle_when(why: str, change: Change) -> None:
    worker = a_worker()
    change(worker)
    assert not is_idle(worker, NOW, runs_labs=False), why


def test_a_snooze_that_is_over_holds_nothing() -> None:
    worker = a_worker(snoozeUntil=rfc3339(ago(1)))
    worker.metadata.annotations[SNOOZE_ANNOTATION] = rfc3339(ago(2))
    assert is_idle(worker, NOW, runs_labs=False)


def test_just_after_the_clock_was_set_nothing_is_idle() -> None:
    assert not is_idle(a_worker(), NO_TIME, runs_labs=False)


def test_running_labs_count_only_where_the_rule_says_so() -> None:
    assert not is_idle(a_worker(), NOW, runs_labs=True)
    by_people = a_worker(rule="NoUserActivity")
    assert is_idle(by_people, NOW, runs_labs=True)
    by_people.status.labs_synced_at = None
    assert is_idle(by_people, NOW, runs_labs=True), "what labs do is not asked"
    _places(by_people)
    assert not is_idle(by_people, NOW, runs_labs=True), "an instance of a student's keeps it up under every rule"


@pytest.mark.parametrize(
    ("events", "expected", "why"),
    [
        ([], None, "a CML that tells nothing may not be keeping telemetry at all"),
        ([event("system_stats")], Activity(0, None), "the machine's own events are nobody's doing"),
        ([event("start_lab", 9), event("stop_node", 5)], Activity(2, ago(5)), "the latest counts, in any order"),
        ([event("stop_node", 5), event("start_lab", 9)], Activity(2, ago(5)), "the latest counts, in any order"),
        ([event("start_lab", None)], Activity(1, None), "an event without a readable time is one"),
        ([event("user_activity", 1, username="admin")], Activity(0, None), "that is lrm itself, looking in"),
        ([event("user_activity", 1, username="alice")], Activity(1, ago(1)), "somebody is there"),
        ([event("user_activity", 1)], Activity(1, ago(1)), "who it was is not told: it may be somebody"),
        ([event("start_lab", 1, username="admin")], Activity(1, ago(1)), "what lrm does there, somebody asked for"),
    ],
)
def test_what_people_did_is_read_from_the_telemetry(
    events: list[TelemetryEvent], expected: Activity | None, why: str
) -> None:
    assert activity_of(events, IdleDetection(), "admin") == expected, why


def test_the_rule_names_the_categories_that_count() -> None:
    rule = IdleDetection(categories=["maintenance_state_change"])
    assert activity_of([event("start_lab"), event("maintenance_state_change", 3)], rule, "") == Activity(1, ago(3))


@pytest.mark.parametrize(
    ("seen", "moves", "why"),
    [
        (Activity(4, ago(75)), False, "nothing is new"),
        (Activity(5, ago(75)), True, "one more, although CML's clock was set back"),
        (Activity(4, ago(10)), True, "a later one, although the oldest was dropped"),
        (Activity(3, ago(75)), False, "CML has dropped an old one"),
        (Activity(0, None), False, "CML has dropped them all"),
        (Activity(4, None), False, "no time can be read any more"),
    ],
)
def test_only_something_new_moves_the_last_activity(seen: Activity, moves: bool, why: str) -> None:
    before = a_worker().status.idle
    after = noted(before, seen, NOW)
    assert after.last_activity_at == (NOW if moves else ago(70)), why
    assert (after.user_events, after.latest_event_at) == (seen.user_events, seen.latest_at)
    assert noted(after, seen, NOW + timedelta(hours=1)) == after, "the same again is no change"


def test_the_first_look_counts_as_activity_and_an_answer_clears_the_trouble() -> None:
    assert noted(None, Activity(4, ago(900)), NOW).last_activity_at == NOW
    trouble = IdleStatus(last_error=Problem(reason="Unreachable", message="", at=NOW))
    after = noted(trouble, Activity(), NOW)
    assert (after.last_activity_at, after.last_error) == (NOW, None)


def test_quiet_begins_with_the_last_change_of_phase_or_the_last_activity() -> None:
    worker = a_worker()
    assert quiet_since(worker) == ago(70)
    worker.status.enter("Active", "Serving", ago(50))
    assert quiet_since(worker) == ago(50)


def test_the_later_snooze_holds() -> None:
    worker = a_worker()
    assert snoozed_until(worker) is None
    worker.spec.idle_detection.snooze_until = ago(5)
    worker.metadata.annotations[SNOOZE_ANNOTATION] = rfc3339(ago(3))
    assert snoozed_until(worker) == ago(3)
    worker.metadata.annotations[SNOOZE_ANNOTATION] = "2026-05-01T09:00:00"
    assert snoozed_until(worker) == FOREVER, "a time without its zone could be any"


def paused() -> LabWorker:
    worker = a_worker()
    assert worker.status.idle is not None
    worker.status.idle.paused_at = ago(10)
    return worker


def test_a_pause_is_the_wish_to_be_stopped_and_no_stronger_than_another() -> None:
    worker = paused()
    assert goal_of(worker) is Goal.STOPPED
    worker.spec.desired_phase = "Draining"
    assert goal_of(worker) is Goal.DRAINING
    worker.spec.desired_phase = "Ready"
    worker.metadata.deletion_timestamp = NOW
    assert goal_of(worker) is Goal.TERMINATED


LIFTS: list[tuple[str, Change]] = [
    ("a new value of the annotation", _annotates(WAKE_ANNOTATION, "1")),
    ("a snooze", _annotates(SNOOZE_ANNOTATION, rfc3339(NOW + timedelta(hours=1)))),
    ("a snooze in the spec", _sets("spec.idle_detection.snooze_until", NOW + timedelta(hours=1))),
    ("no detection any more", _sets("spec.idle_detection.enabled", False)),
    ("its use, while it drains", _sets("status.idle.last_activity_at", ago(9))),
    ("another wish", _sets("spec.desired_phase", "Stopped")),
]


def test_a_word_counts_at_once_whoever_leads() -> None:
    worker = paused()
    worker.metadata.annotations[WAKE_ANNOTATION] = "1"
    assert goal_of(worker) is Goal.READY
    del worker.metadata.annotations[WAKE_ANNOTATION]
    worker.spec.idle_detection.enabled = False
    assert goal_of(worker) is Goal.READY


@pytest.mark.parametrize(("why", "change"), LIFTS, ids=[why for why, _ in LIFTS])
def test_a_pause_is_lifted_by(why: str, change: Change) -> None:
    worker = paused()
    assert not is_lifted(worker, NOW)
    change(worker)
    assert is_lifted(worker, NOW), why


def test_a_lab_that_runs_lifts_a_pause_where_labs_count_and_no_drain_runs_out_under_it() -> None:
    worker = paused()
    assert is_lifted(worker, NOW, runs_labs=True)
    assert stops_only_empty(worker)
    worker.metadata.deletion_timestamp = NOW
    assert not stops_only_empty(worker), "a deletion waits no longer than it was told to"
    worker.metadata.deletion_timestamp = None
    worker.spec.desired_phase = "Stopped"
    assert not stops_only_empty(worker), "somebody wants it stopped"
    worker.spec.desired_phase = "Ready"
    worker.spec.idle_detection.rule = "NoUserActivity"
    assert not is_lifted(worker, NOW, runs_labs=True)
    assert not stops_only_empty(worker)
    assert not stops_only_empty(a_worker())


def test_a_pause_is_not_lifted_by_other_changes_nor_by_the_word_that_was_there() -> None:
    worker = paused()
    assert worker.status.idle is not None
    worker.spec.max_concurrent_labs = 3
    worker.metadata.generation = 4
    worker.metadata.annotations[WAKE_ANNOTATION] = "old"
    worker.status.idle.wake = "old"
    worker.metadata.annotations[SNOOZE_ANNOTATION] = rfc3339(ago(1))
    assert not is_lifted(worker, NOW)
    del worker.metadata.annotations[WAKE_ANNOTATION]
    assert is_lifted(worker, NOW), "taking the word away is a word too"


def test_the_condition_appears_with_the_first_pause_and_says_what_to_do() -> None:
    worker = a_worker()
    refresh(worker, NOW)
    assert worker.status.condition("Idle") is None
    worker = paused()
    refresh(worker, NOW)
    told = worker.status.condition("Idle")
    assert told is not None
    assert (told.status, told.reason) == ("True", "Idle")
    assert WAKE_ANNOTATION in told.message
    assert worker.status.idle is not None
    worker.status.idle.paused_at = None
    refresh(worker, NOW)
    told = worker.status.condition("Idle")
    assert told is not None
    assert (told.status, told.reason) == ("False", "InUse")


def test_a_snooze_that_is_no_time_is_refused_and_one_that_is_stored_is_in_nobodys_way() -> None:
    worker, old = a_worker(), a_worker()
    worker.metadata.annotations[SNOOZE_ANNOTATION] = "tomorrow"
    (cause,) = validate(worker, old)
    assert cause.field == "metadata.annotations"
    assert list(validate(worker, None))
    old.metadata.annotations[SNOOZE_ANNOTATION] = "tomorrow"
    assert not list(validate(worker, old))


@given(
    phase=st.sampled_from(["Ready", "ReadyUnlicensed", "Active", "Stopped", "Starting", "Failed"]),
    placed=st.booleans(),
    snoozed=st.booleans(),
    activity=st.integers(0, 200),
    step=st.integers(0, 200),
    runs=st.booleans(),
    rule=st.sampled_from(["NoRunningLabs", "NoUserActivity"]),
)
def test_whatever_comes_together_an_idle_worker_is_kept_up_by_nothing(
    *, phase: str, placed: bool, snoozed: bool, activity: int, step: int, runs: bool, rule: str
) -> None:
    worker = a_worker(rule=rule)
    assert worker.status.idle is not None
    worker.status.enter("Stopping", "x", ago(300))
    worker.status.enter(phase, "x", ago(step))
    worker.status.idle.last_activity_at = ago(activity)
    if placed:
        _places(worker)
    if snoozed:
        worker.spec.idle_detection.snooze_until = NOW + timedelta(hours=1)
    if is_idle(worker, NOW, runs_labs=runs):
        assert not is_kept_up(worker, NOW, runs_labs=runs)
        assert not placed
        assert not snoozed
        assert min(activity, step) > 60
        assert phase in ("Ready", "ReadyUnlicensed", "Active")
        assert rule == "NoUserActivity" or not runs
