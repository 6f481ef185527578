"""What /metrics serves: the names that dashboards and alerts rely on, for what is there now and nothing else."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from typing import Any

import pytest
from opentelemetry.metrics import Meter
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse_text

from equipment.api import served
from equipment.widget_plugin import Follow, plugin
from lrm.daemon import Daemon
from lrm.reconcile import Runner
from lrm.settings import Settings
from lrm.telemetry import Telemetry
from lrm.testing import VirtualClock
from storage.base import Health, Member
from storage.memory import MemoryStorage

OPENMETRICS = "application/openmetrics-text; version=1.0.0"


def scraped(telemetry: Telemetry) -> dict[str, dict[tuple[tuple[str, str], ...], float]]:
    """Sample name → labels → value."""
    found: dict[str, dict[tuple[tuple[str, str], ...], float]] = {}
    for family in parse_text(telemetry.exposition()[0].decode()):
        for sample in family.samples:
            found.setdefault(sample.name, {})[tuple(sorted(sample.labels.items()))] = sample.value
    return found


@pytest.fixture
def clock() -> VirtualClock:
    return VirtualClock()


@pytest.fixture
async def daemon(clock: VirtualClock) -> Daemon:
    """The whole composition, which has not begun to run."""
    return Daemon(Settings(instance_id="d1"), [plugin], clock=clock)


def runner(daemon: Daemon) -> Runner[Any]:
    follow = Runner(Follow(), daemon.client, daemon.cache, daemon.clock)
    follow.queue.add(("default", "a"))
    follow.queue.add(("default", "b"))
    follow.stats.reconciles, follow.stats.failures, follow.stats.seconds = 7, 2, 1.5
    return follow


async def test_a_daemon_tells_who_leads_what_waits_and_how_full_the_store_is(
    daemon: Daemon, clock: VirtualClock
) -> None:
    daemon.leaders.expect("widgets")
    daemon.status.led = [runner(daemon), daemon.compactor]
    full = Member("http://e1:2379", "3.5.30", db_size=900, db_size_in_use=300, quota=1000, alarms=("NOSPACE",))
    daemon.compactor.health = Health(ok=True, revision=9, members=(full, Member("http://e2:2379", error="away")))
    await clock.advance(12)
    found = scraped(daemon.telemetry)
    lock, widgets, member = (("lock", "widgets"),), (("controller", "widgets"),), (("member", "http://e1:2379"),)
    assert found["lrm_leader_absent_seconds"] == {lock: 12}
    assert found["lrm_queue_depth"] == {widgets: 2}
    assert found["lrm_queue_oldest_seconds"] == {widgets: 12}
    assert found["lrm_reconciles_total"] == {widgets: 7}
    assert found["lrm_reconcile_failures_total"] == {widgets: 2}
    assert found["lrm_reconcile_seconds_total"] == {widgets: 1.5}
    assert found["lrm_compactions_total"] == {(("controller", "compactor"),): 0}
    assert found["lrm_objects"] == {(("kind", "notes"),): 0, (("kind", "widgets"),): 0}
    assert found["lrm_cache_revision"] == {(): 0}
    assert found["lrm_cache_following"] == {(): 0}
    assert found["lrm_store_up"] == {(): 1}
    assert found["lrm_store_size_bytes"] == {member: 900}
    assert found["lrm_store_size_in_use_bytes"] == {member: 300}
    assert found["lrm_store_quota_bytes"] == {member: 1000}
    assert found["lrm_store_alarm"] == {(("alarm", "NOSPACE"), *member): 1}
    (target,) = found["target_info"]
    assert ("service_instance_id", "d1") in target


async def test_two_daemons_in_one_process_do_not_meet(daemon: Daemon, clock: VirtualClock) -> None:
    other = Daemon(Settings(instance_id="d2"), [plugin], clock=clock)
    daemon.leaders.expect("widgets")
    daemon.telemetry.meter.create_counter("lrm_things").add(1)
    assert "lrm_things_total" in scraped(daemon.telemetry)
    assert {"lrm_things_total", "lrm_leader_absent_seconds"}.isdisjoint(scraped(other.telemetry))


def test_what_belongs_to_an_object_goes_with_it() -> None:
    """And leaves no room taken: of instruments that last, OpenTelemetry keeps every label it ever saw, up to 2,000."""
    telemetry, workers = Telemetry(), {"a": 3}

    def observe(meter: Meter) -> None:
        labs = meter.create_gauge("lrm_worker_labs", description="Labs on a worker.")
        for name, count in workers.items():
            labs.set(count, {"worker": name})

    telemetry.observe(observe)
    assert scraped(telemetry)["lrm_worker_labs"] == {(("worker", "a"),): 3}
    for era in range(3):
        workers.clear()
        workers.update({f"{era}-{n}": n for n in range(1000)})
        assert len(scraped(telemetry)["lrm_worker_labs"]) == 1000
    workers.clear()
    assert "lrm_worker_labs" not in scraped(telemetry)


def test_a_fleet_of_any_size_is_told_in_full() -> None:
    """OpenTelemetry folds what exceeds 2,000 sets of labels into one, unless it is told otherwise."""
    telemetry, count = Telemetry(), 2500

    def observe(meter: Meter) -> None:
        labs = meter.create_gauge("lrm_worker_labs")
        syncs = meter.create_counter("lrm_worker_syncs")
        for n in range(count):
            labs.set(n, {"worker": str(n)})
            syncs.add(n, {"worker": str(n)})

    telemetry.observe(observe)
    found = scraped(telemetry)
    for name in ("lrm_worker_labs", "lrm_worker_syncs_total"):
        assert found[name] == {(("worker", str(n)),): n for n in range(count)}


def test_a_scrape_leaves_nothing_behind() -> None:
    telemetry = Telemetry()
    telemetry.observe(lambda meter: meter.create_gauge("lrm_depth").set(1, {"controller": "a"}))

    def objects() -> int:
        gc.collect()
        return len(gc.get_objects())

    telemetry.exposition()
    before = objects()
    for _ in range(100):
        telemetry.exposition()
    assert objects() - before < 100


def test_what_happened_stays_counted_over_scrapes() -> None:
    telemetry = Telemetry()
    calls = telemetry.meter.create_counter("lrm_calls", description="Calls.")
    calls.add(1, {"to": "ec2"})
    scraped(telemetry)
    calls.add(1, {"to": "ec2"})
    assert scraped(telemetry)["lrm_calls_total"] == {(("to", "ec2"),): 2}


def test_an_observer_that_fails_fails_the_scrape() -> None:
    """Rather than serving a page on which something is silently missing."""
    telemetry = Telemetry()

    def observe(_meter: Meter) -> None:
        raise RuntimeError("no such thing")

    telemetry.observe(observe)
    with pytest.raises(RuntimeError, match="no such thing"):
        telemetry.exposition()


def _families(body: str, content_type: str) -> Iterator[Any]:
    yield from (parse_openmetrics if "openmetrics" in content_type else parse_text)(body)


@pytest.mark.parametrize(
    ("accept", "content_type"),
    [("", "text/plain; version=0.0.4"), (f"{OPENMETRICS};q=0.9, text/plain;q=0.1", OPENMETRICS)],
    ids=["text", "openmetrics"],
)
async def test_it_is_served_in_the_format_that_is_asked_for(accept: str, content_type: str) -> None:
    async with served(MemoryStorage()) as api:
        api.api.telemetry.meter.create_counter("lrm_calls").add(4)
        answer = await api.get("/metrics", headers={"Accept": accept or None})
        assert (await api.get("/api/status/metrics", headers={"Accept": accept or None})).raw == answer.raw
    assert answer.status == 200
    assert answer.headers["Content-Type"].startswith(content_type)
    families = list(_families(answer.raw.decode(), answer.headers["Content-Type"]))
    assert 4 in [s.value for f in families for s in f.samples if s.name == "lrm_calls_total"]


def test_what_was_looked_at_is_told_as_it_was_then_whenever_it_is_put_into_text() -> None:
    telemetry, depth = Telemetry(), 1
    telemetry.observe(lambda meter: meter.create_gauge("depth").set(depth, {"queue": "a"}))
    telemetry.observe(lambda meter: meter.create_counter("runs").add(depth))
    first = telemetry.look()
    depth = 2
    second = telemetry.look()
    assert [line for line in first()[0].decode().splitlines() if line[:1] != "#"][-2:] == [
        'depth{queue="a"} 1.0',
        "runs_total 1.0",
    ]
    assert b'depth{queue="a"} 2.0' in second()[0]
