"""What a LabWorkerPool may say, and what its workers are made like."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any
from zoneinfo import ZoneInfo

import pytest

from controllers.pools.conditions import SCALING_LIMITED, observe, tell_limit
from controllers.pools.controller import new_suffix
from controllers.pools.decisions import lead_of, roster
from controllers.pools.demand import Load
from controllers.pools.hours import UnknownTimeZone, Window, local_time, soon_or_now
from controllers.pools.kind import (
    LAB_WORKER_POOL,
    POOL_LABEL,
    TEMPLATE_ANNOTATION,
    LabWorkerPool,
    new_worker,
    seconds_to_ready,
    template_hash,
)
from controllers.workers.kind import DRAIN_ANNOTATION, LAB_WORKER, LabWorker
from equipment.pools import NOW, TEMPLATE, a_pool, a_worker, workers
from lrm import writes
from lrm.errors import Invalid


def created(**spec: Any) -> LabWorkerPool:
    return writes.for_create(LAB_WORKER_POOL, a_pool(**spec), uid="u-1", now=NOW)


def template(**spec: Any) -> dict[str, Any]:
    return {"spec": {**TEMPLATE["spec"], **spec}}


def test_the_defaults_are_those_of_the_design() -> None:
    spec = created().spec
    assert (spec.min_workers, spec.max_workers, spec.replicas, spec.policy) == (1, 10, None, "None")
    limits = spec.thresholds
    assert (limits.cpu_up, limits.cpu_down, limits.memory_up, limits.memory_down) == (0.75, 0.30, 0.80, 0.40)
    assert (limits.labs_up, limits.labs_down) == (15, 3)
    assert (spec.cooldowns.up_minutes, spec.cooldowns.down_minutes) == (10, 20)
    assert (spec.replace_failed.enabled, spec.replace_failed.max_per_hour) == (True, 3)


@pytest.mark.parametrize(
    ("spec", "field", "why"),
    [
        ({"labTrack": ""}, "spec.labTrack", "a pool is of a track"),
        ({"minWorkers": 3, "maxWorkers": 2}, "spec.maxWorkers", "the bounds cross"),
        ({"replicas": 11}, "spec.replicas", "more than the maximum"),
        ({"minWorkers": 2, "replicas": 1}, "spec.replicas", "fewer than the minimum"),
        ({"minWorkers": -1}, "spec.minWorkers", "there is no such number of workers"),
        ({"policy": "Guess"}, "spec.policy", "no such policy"),
        ({"thresholds": {"cpuUp": 0.3, "cpuDown": 0.3}}, "spec.thresholds.cpuDown", "both ways at once"),
        ({"thresholds": {"labsDown": 15}}, "spec.thresholds.labsDown", "both ways at once"),
        ({"timeZone": "Mars/Olympus"}, "spec.timeZone", "nobody knows its hours"),
        ({"timeZone": "../../etc/passwd"}, "spec.timeZone", "not a name"),
        ({"schedule": [{"start": "08:00", "end": "25:00", "workers": 1}]}, "spec.schedule[0].end", "no such hour"),
        ({"schedule": [{"start": "08:00", "end": "9:00", "workers": 11}]}, "spec.schedule[0].end", "two digits"),
        ({"schedule": [{"start": "08:00", "end": "09:00", "workers": 11}]}, "spec.schedule[0].workers", "too many"),
        ({"template": template(aws={})}, "spec.template.spec.aws.amiId", "a worker needs an image"),
        (
            {"template": template(aws={"instanceId": "i-0123456789abcdef0"})},
            "spec.template.spec.aws.instanceId",
            "one instance cannot be many workers",
        ),
        ({"template": template(labTrack="ccnp")}, "spec.template.spec.labTrack", "another track"),
        ({"template": template(desiredPhase="Stopped")}, "spec.template.spec.desiredPhase", "it would never be ready"),
        (
            {"template": template(deletionPolicy="Retain")},
            "spec.template.spec.deletionPolicy",
            "instances would be left",
        ),
        (
            {"template": {**TEMPLATE, "metadata": {"labels": {"a b": "c"}}}},
            "spec.template.metadata.labels",
            "not a label",
        ),
        (
            {"template": {**TEMPLATE, "metadata": {"annotations": {"lab.neuroglia.io/snooze-until": "tomorrow"}}}},
            "spec.template.metadata.annotations",
            "every worker would be refused",
        ),
    ],
)
def test_what_cannot_be_is_refused_with_its_field(spec: dict[str, Any], field: str, why: str) -> None:
    with pytest.raises(Invalid) as caught:
        created(**spec)
    assert field in {cause.field for cause in caught.value.causes}, why


def test_a_worker_is_made_from_the_template_and_is_the_pools_own() -> None:
    pool = created(template={**template(maxConcurrentLabs=7, account="exams"), "metadata": {"labels": {"a": "b"}}})
    worker = writes.for_create(LAB_WORKER, new_worker(pool, "p-1", drains=DRAIN_ANNOTATION), uid="w", now=NOW)
    assert (worker.name, worker.namespace, worker.spec.lab_track) == ("p-1", "default", "ccna")
    assert (worker.spec.max_concurrent_labs, worker.spec.account) == (7, "exams")
    assert worker.metadata.labels == {"a": "b", POOL_LABEL: "p"}
    assert worker.metadata.annotations == {DRAIN_ANNOTATION: "true", TEMPLATE_ANNOTATION: template_hash(pool)}
    [owner] = worker.metadata.owner_references
    assert (owner.kind, owner.uid, owner.controller, owner.block_owner_deletion) == ("LabWorkerPool", "u-1", True, True)
    assert pool.spec.template.spec.lab_track == "", "the template itself is not touched"


def test_a_template_may_say_that_its_workers_do_not_drain() -> None:
    pool = created(template={**TEMPLATE, "metadata": {"annotations": {DRAIN_ANNOTATION: "false"}}})
    assert new_worker(pool, "x", drains=DRAIN_ANNOTATION).metadata.annotations[DRAIN_ANNOTATION] == "false"


def test_the_template_has_another_hash_when_new_workers_would_differ_and_only_then() -> None:
    same = template_hash(created())
    assert template_hash(created(maxWorkers=3, policy="Hybrid")) == same
    said = template(maxConcurrentLabs=20, account="")
    assert template_hash(created(template=said)) == same, "defaults that are said"
    others = [created(labTrack="ccnp"), created(template=template(shared=True))]
    others.append(created(template=template(account="exams")))
    assert same not in {template_hash(p) for p in others}


def test_suffixes_make_names_and_do_not_come_again() -> None:
    suffixes = {new_suffix() for _ in range(10_000)}
    assert len(suffixes) == 10_000
    assert all(len(s) == 10 and s.isalnum() and s == s.lower() for s in suffixes)


def test_what_a_person_asks_for_stays_within_bounds_that_came_later() -> None:
    pool = created(replicas=4)
    pool.spec.max_workers = 2
    assert pool.spec.wished == 2
    assert created(minWorkers=2).spec.wished == 2


@pytest.mark.parametrize(
    ("window", "local", "inside", "why"),
    [
        (("08:00", "18:00", ""), "Wed 08:00", True, "the start belongs to it"),
        (("08:00", "18:00", ""), "Wed 18:00", False, "the end does not"),
        (("08:00", "24:00", ""), "Wed 23:59", True, "to the end of the day"),
        (("22:00", "06:00", ""), "Wed 23:00", True, "before midnight"),
        (("22:00", "06:00", ""), "Wed 05:59", True, "after midnight"),
        (("22:00", "06:00", ""), "Wed 06:00", False, "over"),
        (("22:00", "06:00", ""), "Wed 12:00", False, "at noon"),
        (("22:00", "06:00", "Fri"), "Sat 05:00", True, "the night that began on Friday"),
        (("22:00", "06:00", "Fri"), "Fri 05:00", False, "the night that began on Thursday"),
        (("22:00", "06:00", "Sun"), "Mon 01:00", True, "across the week's end"),
        (("08:00", "18:00", "Mon"), "Wed 12:00", False, "another day"),
        (("09:00", "09:00", ""), "Wed 03:00", True, "round the clock"),
    ],
)
def test_windows_hold_across_midnight_and_belong_to_the_day_they_start(
    window: tuple[str, str, str], local: str, inside: bool, why: str
) -> None:
    start, end, day = window
    it = Window.model_validate({"start": start, "end": end} | ({"days": [day]} if day else {}))
    name, clock = local.split()
    hour, minute = (int(part) for part in clock.split(":"))
    moment = datetime(2026, 5, 4, hour, minute, tzinfo=UTC) + timedelta(
        days=["Mon", "Tue", "Wed", "Thu", "Fri", "Sat", "Sun"].index(name)
    )
    assert it.holds(moment) is inside, why


def test_windows_are_of_a_zone_and_can_be_seen_coming() -> None:
    window = Window(start="08:00", end="18:00")
    seven_in_zurich = datetime(2026, 7, 1, 7, 0, tzinfo=ZoneInfo("Europe/Zurich")).astimezone(UTC)
    assert local_time(seven_in_zurich, "Europe/Zurich").hour == 7
    assert not soon_or_now(window, seven_in_zurich, "Europe/Zurich", timedelta(minutes=59))
    assert soon_or_now(window, seven_in_zurich, "Europe/Zurich", timedelta(minutes=60))
    assert not soon_or_now(window, seven_in_zurich, "UTC", timedelta(minutes=60))
    with pytest.raises(UnknownTimeZone, match="Europe/Zurich"):
        local_time(NOW, "Nowhere/At-All")


def started(*steps: tuple[str, float], first: str = "Pending") -> LabWorker:
    """A worker that came to phases, each so many seconds after it was made."""
    worker = a_worker("w")
    born = worker.metadata.creation_timestamp
    assert born is not None
    worker.status.phase = first
    for phase, seconds in steps:
        worker.status.enter(phase, "x", born + timedelta(seconds=seconds))
    return worker


def ready_after(seconds: float, *, first: str = "Pending") -> LabWorker:
    return started(("ProvisioningEC2", 0), ("Ready", seconds), ("Active", seconds + 5), first=first)


def test_a_first_start_is_measured_while_the_history_tells_of_it() -> None:
    assert seconds_to_ready(ready_after(900.4)) == 900
    assert seconds_to_ready(ready_after(900, first="Stopped")) is None, "its beginning is forgotten"
    assert seconds_to_ready(a_worker("w")) is None


def test_a_first_start_is_measured_from_its_launch_and_an_hour_at_most() -> None:
    waited = started(("ProvisioningEC2", 7200), ("Starting", 7300), ("ReadyUnlicensed", 8000))
    assert seconds_to_ready(waited) == 800, "it waited for two hours"
    again = started(
        ("ProvisioningEC2", 0), ("Failed", 900), ("Pending", 5000), ("ProvisioningEC2", 5001), ("Ready", 5601)
    )
    assert seconds_to_ready(again) == 600
    mended = started(("ProvisioningEC2", 0), ("Starting", 60), ("Failed", 900), ("Starting", 5000), ("Ready", 5600))
    assert seconds_to_ready(mended) is None, "a person mended it"
    assert seconds_to_ready(ready_after(86400)) == 3600
    assert lead_of(a_pool(status={"secondsToReady": 86400})) == timedelta(hours=1), "stored by another version"


@pytest.mark.parametrize(
    ("phases", "counts", "phase", "ready"),
    [
        ((), (0, 0, 0, 0, 0), "Degraded", ("False", "TooFewServing")),
        (("Ready", "Active"), (2, 2, 0, 0, 0), "Ready", ("True", "EnoughServing")),
        (("Ready", "Starting"), (2, 1, 1, 0, 0), "Scaling", ("False", "Starting")),
        (("Ready", "ReadyUnlicensed", "Leaving"), (2, 2, 0, 0, 1), "Scaling", ("True", "EnoughServing")),
        (("Ready", "Failed"), (2, 1, 0, 1, 0), "Degraded", ("False", "TooFewServing")),
        (("Ready", "Stopped"), (2, 1, 0, 0, 0), "Degraded", ("False", "TooFewServing")),
        (("Ready", "Asleep"), (2, 1, 0, 0, 0), "Ready", ("False", "Paused")),
    ],
)
def test_the_status_tells_the_workers(
    phases: tuple[str, ...], counts: tuple[int, ...], phase: str, ready: tuple[str, str]
) -> None:
    pool = a_pool(minWorkers=2)
    observe(pool, roster(pool, workers(*phases), Load()), NOW)
    status = pool.status
    assert counts == (
        status.replicas,
        status.ready_replicas,
        status.starting_replicas,
        status.failed_replicas,
        status.leaving_replicas,
    )
    condition = status.condition("Ready")
    assert condition is not None
    assert (status.phase, (condition.status, condition.reason)) == (phase, ready)
    assert status.selector == f"{POOL_LABEL}=p"
    assert status.outdated_replicas == counts[0], "none of them was made from this template"


def test_looking_again_changes_nothing() -> None:
    pool, team = a_pool(minWorkers=2), workers("Ready", "Starting")
    observe(pool, roster(pool, team, Load()), NOW)
    tell_limit(pool, "AtMaximum", "enough", NOW)
    before = pool.wire()
    observe(pool, roster(pool, team, Load()), NOW + timedelta(hours=1))
    tell_limit(pool, "AtMaximum", "enough", NOW + timedelta(hours=1))
    assert pool.wire() == before
    limit = pool.status.condition(SCALING_LIMITED)
    assert limit is not None
    assert (limit.status, limit.reason) == ("True", "AtMaximum")


def test_the_slowest_first_start_is_remembered_when_its_worker_is_gone() -> None:
    pool = a_pool()
    observe(pool, roster(pool, [ready_after(700), ready_after(900)], Load()), NOW)
    assert pool.status.seconds_to_ready == 900
    observe(pool, roster(pool, [], Load()), NOW)
    assert pool.status.seconds_to_ready == 900


def test_scale_shows_the_wish_and_sets_replicas() -> None:
    scale, pool = LAB_WORKER_POOL.scale, a_pool(minWorkers=2)
    assert scale is not None
    assert (scale.wished(pool), scale.actual(pool), scale.selector(pool)) == (2, 0, f"{POOL_LABEL}=p")
    scale.wish(pool, 5)
    assert (pool.spec.replicas, scale.wished(pool)) == (5, 5)
