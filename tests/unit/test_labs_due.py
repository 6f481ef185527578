"""When a worker's labs are due for a sync."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest

from controllers.labs.controller import _concerns
from controllers.labs.due import apart, apart_if_many, asked_for, at_rest, due_in, interval_of
from controllers.labs.kind import REFRESH_ANNOTATION, LabOperation, LabRecord, LabRecordSpec
from controllers.labs.settings import LabsSettings
from controllers.metrics.controller import _asks
from controllers.workers.controller import _concerning
from controllers.workers.kind import LabWorker
from controllers.workers.spec import IdleDetection, LabWorkerSpec
from controllers.workers.status import Allocation
from lrm.resource import RECONCILE_ANNOTATION, ObjectMeta

NOW = datetime(2026, 1, 1, 12, tzinfo=UTC)
HOUR = 3600.0


def ago(seconds: float) -> datetime:
    return NOW - timedelta(seconds=seconds)


def worker(
    *, synced: datetime | None, asked: str | None = None, honoured: str | None = None, ready: datetime | None = None
) -> LabWorker:
    made = LabWorker(
        metadata=ObjectMeta(name="w1", uid="u1", annotations={RECONCILE_ANNOTATION: asked} if asked else {}),
        spec=LabWorkerSpec.model_validate({"region": "us-east-1"}),
    )
    made.status.labs_synced_at, made.status.labs_asked = synced, honoured
    if ready:
        made.status.set_condition("Ready", status=True, reason="Serving", message="", now=ready)
    return made


def draining(*, since: datetime) -> LabWorker:
    made = worker(synced=ago(5))
    made.status.phase = "Draining"
    made.status.timestamps.draining_started_at = since
    return made


def record(reached: datetime | None, *, status: bool = True) -> LabRecord:
    made = LabRecord(metadata=ObjectMeta(name="w1-x"), spec=LabRecordSpec(worker_ref="w1", lab_id="x"))
    if reached:
        made.status.set_condition("DesiredState", status, "Reached", "", now=reached)
    return made


def missing(*, deleting: bool = False) -> LabRecord:
    made = record(None)
    made.status.phase, made.metadata.deletion_timestamp = "Missing", NOW if deleting else None
    return made


@pytest.mark.parametrize(
    ("subject", "records", "first", "why"),
    [
        (worker(synced=None), [], False, "it was never synced"),
        (worker(synced=ago(1)), [], True, "this process has not synced it yet"),
        (worker(synced=ago(2 * HOUR)), [], False, "the interval is over"),
        (worker(synced=ago(1), asked="a"), [], False, "it is asked for"),
        (worker(synced=ago(1), asked="b", honoured="a"), [], False, "it is asked for again"),
        (worker(synced=ago(5), ready=ago(1)), [], False, "the worker became Ready since"),
        (draining(since=ago(1)), [], False, "it drains since, and waits for labs that nobody may have seen"),
        (worker(synced=ago(5)), [record(ago(1))], False, "a desiredState was reached since"),
        (worker(synced=ago(-HOUR)), [], False, "the last sync lies in the future: the clock was set back"),
    ],
)
def test_it_is_due_now(subject: LabWorker, records: list[LabRecord], first: bool, why: str) -> None:
    assert due_in(subject, records, interval=HOUR, now=NOW, first=first) == 0, why


@pytest.mark.parametrize(
    ("subject", "records", "why"),
    [
        (worker(synced=ago(1), asked="a", honoured="a"), [], "the wish was honoured"),
        (worker(synced=ago(1), honoured="a"), [], "the annotation was taken away"),
        (worker(synced=ago(1), ready=ago(5)), [], "it was Ready before"),
        (worker(synced=ago(1)), [record(None), record(ago(5))], "reached before"),
        (worker(synced=ago(5)), [record(ago(1), status=False)], "given up, not reached"),
    ],
)
def test_it_can_wait(subject: LabWorker, records: list[LabRecord], why: str) -> None:
    assert 0.85 * HOUR < due_in(subject, records, interval=HOUR, now=NOW) < 1.1 * HOUR, why


@pytest.mark.parametrize(
    ("subject", "records"),
    [(worker(synced=ago(5), ready=ago(-20)), []), (worker(synced=ago(5)), [record(ago(-20)), record(ago(-1200))])],
    ids=["ready", "reached"],
)
def test_a_turn_that_lies_in_the_future_is_due_when_its_time_comes(
    subject: LabWorker, records: list[LabRecord]
) -> None:
    assert due_in(subject, records, interval=HOUR, now=NOW) == 20
    assert due_in(subject, records, interval=HOUR, now=NOW + timedelta(seconds=20)) == 0


def test_what_has_turned_waits_while_the_cml_is_given_time() -> None:
    turned = [record(ago(1))]
    assert due_in(worker(synced=ago(5)), turned, interval=HOUR, now=NOW, held=8) == 8
    assert due_in(worker(synced=ago(5), asked="a"), turned, interval=HOUR, now=NOW, held=8) == 0, "who asks is answered"
    assert due_in(worker(synced=ago(2 * HOUR)), turned, interval=HOUR, now=NOW, held=8) == 0, (
        "nor is the interval longer"
    )


def test_a_turn_that_lies_far_in_the_future_puts_nothing_off() -> None:
    assert due_in(worker(synced=ago(2 * HOUR), ready=ago(-99 * HOUR)), [], interval=HOUR, now=NOW) == 0


@pytest.mark.parametrize(("interval", "least"), [(1800.0, 1.0), (2.0, 1.0), (1.0, 0.9), (0.1, 0.09)])
def test_two_syncs_are_a_second_apart_or_an_interval_at_its_shortest(interval: float, least: float) -> None:
    assert apart(interval) == pytest.approx(least)


@pytest.mark.parametrize(("interval", "least"), [(1800.0, 54.0), (60.0, 54.0), (2.0, 1.8)])
def test_where_most_labs_are_missing_lists_count_that_are_a_minute_apart(interval: float, least: float) -> None:
    assert apart_if_many(interval) == pytest.approx(least)


def test_the_interval_is_spread_by_a_tenth_and_the_same_whenever_asked() -> None:
    waits = []
    for n in range(200):
        one = worker(synced=ago(0))
        one.metadata.uid = f"u{n}"
        waits.append(due_in(one, [], interval=HOUR, now=NOW))
        assert waits[-1] == due_in(one, [], interval=HOUR, now=NOW)
    assert 0.9 * HOUR <= min(waits) < 0.92 * HOUR
    assert 1.08 * HOUR < max(waits) <= 1.1 * HOUR


@pytest.mark.parametrize(
    ("subject", "records", "expected", "why"),
    [
        (worker(synced=ago(9 * HOUR)), [], True, "that its time has come is noticed in the course of the poll"),
        (worker(synced=ago(9), asked="1", honoured="1", ready=ago(60)), [record(ago(10))], True, "all of it was seen"),
        (worker(synced=None), [], False, "never synced"),
        (worker(synced=ago(9), asked="2", honoured="1"), [], False, "somebody asks"),
        (worker(synced=ago(9), ready=ago(5)), [], False, "Ready since then"),
        (worker(synced=ago(9)), [record(None), record(ago(5))], False, "a lab has got where it was wanted"),
        (worker(synced=ago(9)), [record(None), missing()], False, "a lab may be gone"),
        (worker(synced=ago(9)), [missing(deleting=True)], True, "its deletion sees to it"),
    ],
)
def test_a_new_leader_takes_its_time_only_where_nothing_is_asked(
    subject: LabWorker, records: list[LabRecord], expected: bool, why: str
) -> None:
    assert at_rest(subject, records) is expected, why


def lab(
    state: str = "STOPPED", *, seen: float = 99 * HOUR, changed: float = 99 * HOUR, phase: str = "Present"
) -> LabRecord:
    """A record: seconds since it was first seen, and since it changed last."""
    made = record(None)
    made.status.state, made.status.phase, made.status.first_seen_at = state, phase, ago(seen)
    made.status.operation_history = [LabOperation(timestamp=ago(changed))]
    return made


def serving(**changes: object) -> LabWorker:
    """A worker that is Ready for days."""
    made = worker(synced=ago(60), ready=ago(99 * HOUR))
    for name, value in changes.items():
        setattr(made.status, name, value)
    return made


def watched_for_idleness() -> LabWorker:
    made = serving()
    made.spec.idle_detection = IdleDetection(enabled=True)
    return made


NEVER_READY = worker(synced=ago(60))
BUSY, QUIET, DRAINS = 1800.0, 7200.0, 60.0


@pytest.mark.parametrize(
    ("subject", "records", "interval", "why"),
    [
        (serving(), [lab(), lab("DEFINED_ON_CORE")], QUIET, "nothing runs, and nothing has happened for hours"),
        (serving(), [], QUIET, "it never had a lab since it serves"),
        (serving(), [lab(), lab("STARTED")], BUSY, "a lab runs"),
        (serving(), [lab("SOMETHING_NEW")], BUSY, "a lab is in a state that is not known to be rest"),
        (serving(), [lab(changed=HOUR)], BUSY, "a lab changed an hour ago"),
        (serving(), [lab(seen=HOUR)], BUSY, "a lab is new"),
        (serving(), [lab(), lab(phase="Missing")], 60.0, "a lab may be gone: the next list decides"),
        (serving(labs_sync_error="the list is HTML"), [lab()], BUSY, "the last sync failed"),
        (serving(allocations={"u": Allocation()}), [lab()], BUSY, "a lab instance is placed on it"),
        (worker(synced=ago(60), ready=ago(HOUR)), [lab()], BUSY, "it came to serve an hour ago"),
        (NEVER_READY, [], BUSY, "nothing is known of it"),
        (watched_for_idleness(), [lab()], BUSY, "an old list would keep it from being stopped when it is idle"),
        (draining(since=ago(9 * HOUR)), [lab()], DRAINS, "it waits for its labs"),
    ],
)
def test_a_worker_on_which_nobody_works_is_asked_less_often(
    subject: LabWorker, records: list[LabRecord], interval: float, why: str
) -> None:
    assert interval_of(subject, records, LabsSettings(), NOW) == interval, why


def test_the_interval_for_quiet_workers_shortens_none() -> None:
    settings = LabsSettings(labs_refresh_interval=4 * HOUR)
    assert interval_of(serving(), [lab()], settings, NOW) == 4 * HOUR


def test_a_quiet_worker_is_looked_at_again_when_something_is_placed_there() -> None:
    """Its next sync was planned for a quiet worker; what changes that must wake it."""
    assert _concerns(serving(allocations={"u": Allocation()})) != _concerns(serving())
    assert _concerns(serving(labs_count=7)) == _concerns(serving()), "what a sync writes wakes nobody"


def test_a_wish_for_the_labs_alone_is_heard_by_their_sync_alone() -> None:
    """Beside the wish that all hear, whichever of the two is newer; the value of that alone is as it always was."""
    one, both = worker(synced=ago(1), asked="a", honoured="a"), worker(synced=ago(1), asked="a", honoured="a")
    both.metadata.annotations[REFRESH_ANNOTATION] = "b"
    assert (due_in(one, [], interval=HOUR, now=NOW) > 0, due_in(both, [], interval=HOUR, now=NOW)) == (True, 0)
    assert (at_rest(one, []), at_rest(both, []), asked_for(one)) == (True, False, "a")
    assert _concerns(both) != _concerns(one)
    assert _concerning(both) == _concerning(one), "the workers' controller asks nobody for that"
    assert not _asks(one, both), "nor do the metrics"
    both.status.labs_asked = asked_for(both)
    assert at_rest(both, [])
    both.metadata.annotations[RECONCILE_ANNOTATION] = "c"
    assert not at_rest(both, [])
