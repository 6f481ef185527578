"""What is known after a refresh, and which change of it is worth a write: tables, without clock, store or world."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from controllers.metrics.measured import NOTHING, Known, Told, Trouble, learned, worth_writing
from controllers.metrics.settings import MetricsSettings
from controllers.workers.kind import LAB_WORKER, METRICS
from controllers.workers.status import (
    Checks,
    CloudWatchMeasured,
    CmlMeasured,
    Ec2Measured,
    LabWorkerStatus,
    Utilization,
    WorkerMetrics,
)

T0 = datetime(2026, 1, 1, tzinfo=UTC)
SETTINGS = MetricsSettings(metrics_refresh_interval=300)


def later(minutes: float) -> datetime:
    return T0 + timedelta(minutes=minutes)


def told(
    minutes: float = 0,
    *,
    cpu: float | None = 50,
    memory: float | None = None,
    cml: dict[str, Any] | None = None,
    asked: str | None = None,
) -> Told:
    at = later(minutes)
    return Told(
        ec2=Ec2Measured(at=at, state="running", checks=Checks(system="ok", instance="ok"), started_at=T0),
        cloud_watch=CloudWatchMeasured(at=at, cpu_percent=cpu, memory_percent=memory),
        cml=CmlMeasured(at=at, **({"cpu_percent": 20, "memory_percent": 30, "version": "2.9"} if cml is None else cml)),
        asked=asked,
    )


def known(what: Told | None = None) -> Known:
    return learned(NOTHING, what or told(), SETTINGS)


@pytest.mark.parametrize(
    ("what", "expected", "why"),
    [
        (told(cpu=50, memory=60), (50, 60), "CloudWatch has both: EC2 sees the whole machine"),
        (told(cpu=50), (50, 30), "no agent: the memory that CML tells"),
        (told(cpu=None), (20, 30), "CloudWatch has nothing yet: all is CML's"),
        (told(cpu=0, memory=0), (0, 0), "nothing in use is a value"),
        (told(cpu=50, cml={}), (50, None), "neither tells the memory: unknown"),
    ],
)
def test_a_worker_is_as_busy_as_the_first_source_says_that_knows(
    what: Told, expected: tuple[float | None, float | None], why: str
) -> None:
    utilization = known(what).utilization
    assert utilization is not None
    assert (utilization.cpu_percent, utilization.memory_percent) == expected, why


def test_where_nobody_knows_anything_there_is_no_utilization() -> None:
    assert known(told(cpu=None, cml={})).utilization is None


@pytest.mark.parametrize(
    ("after", "written", "why"),
    [
        (told(5), False, "times alone are never written"),
        (told(5, cpu=54.9), False, "less than five points"),
        (told(5, cpu=55), True, "five points up"),
        (told(5, cpu=45), True, "five points down"),
        (told(5, cpu=50, memory=31), False, "from CML's 30 to an agent's 31: the memory did not move"),
        (told(5, cpu=50, memory=35), True, "the memory moved"),
        (told(5, cpu=None, cml={}), True, "what was known is unknown"),
        (told(5, asked="x"), True, "a wish was honoured"),
        (told(5, cml={"cpu_percent": 20, "memory_percent": 30, "version": "2.10"}), True, "another version"),
        (
            told(5, cml={"cpu_percent": 90, "memory_percent": 30, "version": "2.9", "running_nodes": 7}),
            False,
            "CML's own processor is not what counts here, and the number of nodes is a gauge",
        ),
        (
            told(5, cml={"cpu_percent": 20, "memory_percent": 30, "version": "2.9", "licensed": True}),
            True,
            "it has a licence now",
        ),
    ],
)
def test_what_matters_is_written(after: Told, written: bool, why: str) -> None:
    before = known()
    assert worth_writing(before, learned(before, after, SETTINGS), SETTINGS) is written, why


def test_a_slow_drift_is_written_when_it_has_come_far_enough() -> None:
    written = now = known()
    steps = []
    for minute, cpu in enumerate((52, 54, 56), 1):
        now = learned(now, told(minute, cpu=cpu), SETTINGS)
        steps.append(worth_writing(written, now, SETTINGS))
    assert steps == [False, False, True]


def test_a_threshold_of_zero_writes_every_change_and_nothing_else() -> None:
    settings = MetricsSettings(metrics_cpu_change=0)
    assert not worth_writing(known(), known(told(1)), settings)
    assert worth_writing(known(), known(told(1, cpu=50.01)), settings)


def test_a_source_in_trouble_keeps_its_values_for_three_intervals_and_then_they_are_unknown() -> None:
    now = known(told(cml={}))
    written = []
    for minute in (5, 10, 15, 20, 25):
        trouble = Trouble("Throttled", f"attempt at minute {minute}", later(minute))
        after = learned(now, Told(ec2=None, cloud_watch=trouble), SETTINGS)
        written.append(worth_writing(now, after, SETTINGS))
        now = after
        assert now.metrics is not None
        error = now.metrics.cloud_watch.error
        assert error is not None
        assert (error.at, error.message) == (later(5), f"attempt at minute {minute}")
        assert now.metrics.cloud_watch.at == T0  # when it answered last
        cpu = now.utilization.cpu_percent if now.utilization else None
        assert cpu == (50 if minute < 20 else None)
    # Told once, with its onset; and once more when the values are given up.
    assert written == [True, False, False, True, False]
    healed = learned(now, told(30, cml={}), SETTINGS)
    assert healed.metrics is not None
    assert healed.metrics.cloud_watch.error is None
    assert worth_writing(now, healed, SETTINGS)


def test_another_trouble_is_another_one() -> None:
    first = learned(known(), Told(ec2=Trouble("Throttled", "slow down", later(5))), SETTINGS)
    second = learned(first, Told(ec2=Trouble("AWSAuthFailed", "no", later(10))), SETTINGS)
    assert worth_writing(first, second, SETTINGS)
    assert second.metrics is not None
    assert second.metrics.ec2.error is not None
    assert second.metrics.ec2.error.at == later(10)


def test_what_a_source_told_in_spite_of_its_trouble_is_taken() -> None:
    trouble = Trouble("AWSUnavailable", "no status checks", later(5), {"state": "stopping", "started_at": None})
    now = learned(known(), Told(ec2=trouble), SETTINGS)
    assert now.metrics is not None
    ec2 = now.metrics.ec2
    assert (ec2.state, ec2.started_at, ec2.at) == ("stopping", None, T0)
    assert ec2.checks == Checks(system="ok", instance="ok")
    assert worth_writing(known(), now, SETTINGS)


def test_a_source_that_was_not_asked_changes_nothing_and_one_without_an_object_forgets() -> None:
    before = known(told(cml={"version": "2.9", "cpu_percent": 1.0}))
    same = learned(before, Told(), SETTINGS)
    assert same == before
    off = learned(before, Told(cloud_watch=CloudWatchMeasured(), cml=CmlMeasured()), SETTINGS)
    assert off.utilization is None
    assert off.metrics is not None
    assert off.metrics.cml == CmlMeasured()
    assert worth_writing(before, off, SETTINGS)


def test_a_worker_without_a_machine_has_nothing_and_that_is_written_once() -> None:
    assert worth_writing(known(), NOTHING, SETTINGS)
    assert not worth_writing(NOTHING, NOTHING, SETTINGS)


def test_what_is_measured_belongs_to_the_metrics_and_to_nobody_else() -> None:
    before, after = LabWorkerStatus(), LabWorkerStatus(utilization=Utilization(cpu_percent=1), metrics=WorkerMetrics())
    assert LAB_WORKER.foreign_changes(before, after, METRICS) == []
    assert {name for name, _ in LAB_WORKER.foreign_changes(before, after, "workers")} == {"utilization", "metrics"}


def test_the_wire_names_are_those_of_the_sources() -> None:
    status = LabWorkerStatus(metrics=known().metrics)
    wire = status.wire()["metrics"]
    assert set(wire) == {"ec2", "cloudWatch", "cml"}
    assert wire["cloudWatch"] == {"at": "2026-01-01T00:00:00Z", "cpuPercent": 50.0}
