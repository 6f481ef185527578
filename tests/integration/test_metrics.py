"""The fleet's metrics against the simulated AWS and CML: calls counted at the servers, writes at the store."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator
from datetime import timedelta
from pathlib import Path

import pytest

from controllers.aws.simulator import AwsShim, ShimOptions
from controllers.aws.simulator.instances import ACCOUNT
from controllers.cml.simulator import Options, Simulator
from controllers.metrics.controller import FleetMetrics
from controllers.workers.kind import METRICS, LabWorker
from equipment.aws import ACCOUNTS, CLASSES_NUMBER, EXAMS_NUMBER, REGION, write_profiles
from equipment.fleet_world import FleetWorld, fleet_world, servers
from equipment.loop_lag import LoopLag
from equipment.waiting import until
from equipment.workers_world import SetClock, workers_world
from lrm.pauses import shortened

EUROPE = "eu-west-1"
FAST_CML = Options(boot_bad_gateway=0, boot_not_ready=0)


@pytest.fixture
async def shim(moto_url: str) -> AsyncIterator[AwsShim]:
    async with AwsShim.run(ShimOptions(moto_url=moto_url, delay=0)) as running:
        yield running


@pytest.fixture
async def cml() -> AsyncIterator[Simulator]:
    async with Simulator.run(FAST_CML) as running:
        yield running


@pytest.fixture
async def world(shim: AwsShim) -> AsyncIterator[FleetWorld]:
    """Workers whose CMLs are not asked."""
    async with fleet_world(shim) as made:
        yield made


@pytest.fixture
async def whole(shim: AwsShim, cml: Simulator) -> AsyncIterator[FleetWorld]:
    """Workers with CMLs."""
    async with fleet_world(shim, cml.url) as made:
        yield made


def instance_of(worker: LabWorker) -> str:
    return worker.status.ec2.instance_id or ""


@pytest.mark.parametrize("count", [1, 3, 250, 1001, pytest.param(2500, marks=pytest.mark.soak)])
async def test_a_cycle_makes_as_many_calls_as_a_region_needs_and_the_next_one_writes_nothing(
    world: FleetWorld, count: int
) -> None:
    await world.add(count)
    world.calls()
    await world.refresh()
    calls = world.calls()
    assert calls == {
        "DescribeInstances": math.ceil(count / 1000),
        "DescribeInstanceStatus": math.ceil(count / 1000),
        "GetMetricData": math.ceil(2 * count / 500),
    }
    known = [w.status for w in world.cache.all(LabWorker)]
    assert all(s.utilization is not None and s.utilization.cpu_percent == 5 for s in known)
    assert all(s.metrics is not None and s.metrics.ec2.state == "running" for s in known)
    async with world.counting() as writes:
        await world.refresh()
    assert not writes
    assert world.calls() == calls


async def test_every_source_is_told_with_its_own_time_and_memory_is_unknown_without_an_agent(
    whole: FleetWorld,
) -> None:
    one, two = await whole.add(2, cml=True)
    whole.measure(one, cpu=41.257, memory=63)
    whole.measure(two, cpu=None, memory=None)
    await whole.refresh()
    first, second = await whole.status("w0"), await whole.status("w1")
    assert first.utilization is not None
    assert (first.utilization.cpu_percent, first.utilization.memory_percent) == (41.26, 63)
    for status in (first, second):
        assert status.metrics is not None
        ec2, cloud_watch, cml = status.metrics.ec2, status.metrics.cloud_watch, status.metrics.cml
        assert (ec2.error, cloud_watch.error, cml.error) == (None, None, None)
        assert ec2.at
        assert cloud_watch.at
        assert cml.at
        assert ec2.checks is not None
        assert (ec2.state, ec2.checks.system, ec2.checks.instance) == ("running", "ok", "ok")
        assert ec2.started_at is not None
        assert (cml.version, cml.ready, cml.licensed) == ("2.9.1+build.7", True, False)
        assert cml.cpu_percent is not None
        assert cml.memory_percent is not None
    # CloudWatch has nothing of the other one: what its CML says is taken.
    assert second.metrics is not None
    assert second.utilization is not None
    assert second.metrics.cloud_watch.memory_percent is None
    assert second.utilization.memory_percent == second.metrics.cml.memory_percent


async def test_a_worker_without_a_cml_that_can_be_asked_has_unknown_memory_never_zero(world: FleetWorld) -> None:
    await world.add(1)
    await world.refresh()
    status = await world.status()
    assert status.utilization is not None
    assert status.utilization.memory_percent is None
    assert "memoryPercent" not in status.wire()["utilization"]


async def test_each_cml_is_asked_four_questions_a_cycle(whole: FleetWorld, cml: Simulator) -> None:
    workers = await whole.add(3, cml=True)
    await whole.refresh()  # the sessions begin
    asked = [cml.faults.add("delay", instance=instance_of(w), seconds=0.0) for w in workers]
    await whole.refresh()
    assert [fault.hits for fault in asked] == [4, 4, 4]


async def test_only_what_matters_is_written(whole: FleetWorld, shim: AwsShim) -> None:
    (worker,) = await whole.add(1, cml=True)
    whole.measure(worker, cpu=50, memory=60)
    await whole.refresh()
    async with whole.counting() as writes:
        for cpu, memory in ((54.9, 60), (45.1, 64.9), (50, 55.1)):
            whole.measure(worker, cpu=cpu, memory=memory)
            await whole.refresh()
    assert not writes
    async with whole.counting() as writes:
        whole.measure(worker, cpu=55, memory=60)
        await whole.refresh()
        shim.instances.impair(instance_of(worker), impaired=True)
        await whole.refresh()
        whole.measure(worker, cpu=55, memory=None)
        await whole.refresh()
    assert writes == {"MODIFIED w0": 3}


async def test_one_failing_region_holds_up_no_other(world: FleetWorld, shim: AwsShim) -> None:
    await world.add(2)
    await world.add(2, region=EUROPE, prefix="e")
    shim.faults.add({"action": "*", "fault": "dropped", "times": 0, "region": EUROPE})
    await world.refresh()
    here, there = await world.status("w0"), await world.status("e0")
    assert here.metrics is not None
    assert there.metrics is not None
    assert here.metrics.ec2.error is None
    assert there.metrics.ec2.error is not None
    assert there.metrics.ec2.error.reason == "AWSUnavailable"
    assert here.utilization is not None
    assert there.utilization is None


async def test_accounts_are_asked_apart_and_one_that_fails_holds_up_no_other(shim: AwsShim, profiles: Path) -> None:
    async with fleet_world(shim, aws_accounts=ACCOUNTS) as world:
        await world.add(3)
        await world.add(3, prefix="e", account="exams", number=EXAMS_NUMBER)
        await world.add(1, prefix="x", account="mars")
        shim.calls_in.clear()
        await world.refresh()
        actions = ("DescribeInstances", "DescribeInstanceStatus", "GetMetricData")
        assert shim.calls_in == {(n, REGION, a): 1 for n in (ACCOUNT, EXAMS_NUMBER) for a in actions}
        async with world.leading():
            told = {name: labels["account"] for name, labels in world.gauges("cml_worker_cpu_utilization").items()}
        assert told == {"w0": "", "w1": "", "w2": "", "e0": "exams", "e1": "exams", "e2": "exams"}
        shim.faults.add({"action": "*", "fault": "auth", "times": 0, "account": EXAMS_NUMBER})
        await world.refresh()
        errors = {}
        for name in ("w0", "e0", "x0"):
            metrics = (await world.status(name)).metrics
            assert metrics is not None
            errors[name] = metrics.ec2.error.reason if metrics.ec2.error else ""
        assert errors == {"w0": "", "e0": "AWSAuthFailed", "x0": "UnknownAccount"}


async def test_credentials_of_another_account_say_nothing_of_an_instance_and_buy_no_metrics_there(
    shim: AwsShim, profiles: Path
) -> None:
    write_profiles(profiles, exams=CLASSES_NUMBER)
    async with fleet_world(shim, aws_accounts=ACCOUNTS) as world:
        for worker in await world.add(3, account="exams", number=EXAMS_NUMBER):
            await world.client.update_status(worker, lambda w: setattr(w.status.ec2, "owner_id", EXAMS_NUMBER))
        await world.cache.barrier(30)
        await world.refresh()
        assert world.calls() == {"DescribeInstances": 1, "GetCallerIdentity": 1}
        for name in ("w0", "w1", "w2"):
            metrics = (await world.status(name)).metrics
            assert metrics is not None
            for source in (metrics.ec2, metrics.cloud_watch):
                assert source.error is not None
                assert source.error.reason == "WrongAccount"


async def test_without_the_right_to_cloudwatch_the_rest_goes_on(whole: FleetWorld, shim: AwsShim) -> None:
    await whole.add(2, cml=True)
    denied = {"action": "GetMetricData", "fault": "error", "code": "AccessDenied", "message": "no", "status": 403}
    fault = shim.faults.add({**denied, "times": 0})
    await whole.refresh()
    status = await whole.status()
    assert status.metrics is not None
    assert status.metrics.cloud_watch.error is not None
    assert status.metrics.cloud_watch.error.reason == "AWSAuthFailed"
    assert (status.metrics.ec2.error, status.metrics.cml.error) == (None, None)
    assert status.utilization is not None  # CML's own
    assert status.utilization.cpu_percent is not None
    async with whole.counting() as writes:
        await whole.refresh()
    assert not writes
    shim.faults.remove(fault.id)
    await whole.refresh()
    recovered = (await whole.status()).metrics
    assert recovered is not None
    assert recovered.cloud_watch.error is None


async def test_expired_credentials_are_told_and_forgotten_when_they_return(world: FleetWorld, shim: AwsShim) -> None:
    await world.add(260)
    await world.refresh()
    before = await world.status()
    expired = {"action": "*", "fault": "error", "code": "ExpiredToken", "message": "expired", "status": 403}
    fault = shim.faults.add({**expired, "times": 0})
    world.calls()
    await world.refresh()
    # The refusal is believed: neither the second chunk nor another page is asked for.
    assert world.calls() == {"DescribeInstances": 1, "GetMetricData": 1}
    status = await world.status()
    assert status.metrics is not None
    assert status.metrics.ec2.error is not None
    assert status.metrics.ec2.error.reason == "AWSAuthFailed"
    assert status.utilization == before.utilization  # the last values are kept for a while
    shim.faults.remove(fault.id)
    await world.refresh()
    status = await world.status()
    assert status.metrics is not None
    assert (status.metrics.ec2.error, status.metrics.cloud_watch.error) == (None, None)


@pytest.mark.slow
async def test_a_fleet_that_is_throttled_for_long_asks_slower_not_more_and_recovers_by_one_refresh(
    shim: AwsShim,
) -> None:
    clock = SetClock()
    async with fleet_world(shim, clock=clock, metrics_refresh_interval=300) as world:
        await world.add(10)
        await world.refresh()
        usual, before = world.calls(), await world.status()
        throttled = shim.faults.add({"action": "*", "fault": "throttle", "times": 0})
        for minutes, kept in ((0, True), (20, False)):
            clock.offset = timedelta(minutes=minutes)
            await world.refresh()
            calls, status = world.calls(), await world.status()
            assert set(calls) == {"DescribeInstances", "GetMetricData"}
            assert max(calls.values()) <= 3
            assert status.utilization == (before.utilization if kept else None), "after three intervals it is unknown"
            assert status.metrics is not None
            assert status.metrics.ec2.error is not None
            assert status.metrics.ec2.error.reason == "Throttled"
        shim.faults.remove(throttled.id)
        await world.refresh()
        assert world.calls() == usual, "nothing is made up for"
        for worker in world.cache.all(LabWorker):
            metrics = worker.status.metrics
            assert metrics is not None
            assert (metrics.ec2.error, metrics.cloud_watch.error) == (None, None)
            assert worker.status.utilization == before.utilization


async def test_an_instance_without_our_tag_and_one_that_has_vanished_are_asked_for_by_id(
    world: FleetWorld, shim: AwsShim
) -> None:
    await world.add(210)
    await world.add(2, prefix="other", marked=False)
    shim.instances.vanish(instance_of(await world.get("w1")))
    world.calls()
    await world.refresh()
    assert world.calls()["DescribeInstances"] == 2
    adopted, gone = (await world.status("other0")).metrics, (await world.status("w1")).metrics
    assert adopted is not None
    assert gone is not None
    assert adopted.ec2.state == "running"
    assert gone.ec2.error is not None
    assert gone.ec2.error.reason == "InstanceNotFound"


@pytest.mark.parametrize(
    ("counts", "calls"),  # marked; observed only; adopted and not marked yet; vanished
    [
        ((1, 1000, 0, 0), 2),  # one by tag, one by id
        ((0, 1000, 0, 0), 1),
        ((0, 201, 0, 0), 1),
        ((0, 0, 1000, 0), 2),  # that they bear no mark shows only when they are looked for
        ((0, 450, 0, 1), 4),  # EC2 refuses all for one that it does not know: three calls by filter
    ],
)
async def test_instances_without_our_mark_are_asked_for_a_thousand_at_once(
    world: FleetWorld, shim: AwsShim, counts: tuple[int, int, int, int], calls: int
) -> None:
    marked, observed, adopted, gone = counts
    await world.add(marked)
    watched = await world.add(observed, prefix="o", marked=False, observe_only=True)
    await world.add(adopted, prefix="a", marked=False)
    for worker in watched[:gone]:
        shim.instances.vanish(instance_of(worker))
    world.calls()
    await world.refresh()
    assert world.calls()["DescribeInstances"] == calls
    states = [w.status.metrics.ec2.state for w in world.cache.all(LabWorker) if w.status.metrics]
    assert len(states) == marked + observed + adopted
    assert states.count("running") == len(states) - gone


async def test_an_instance_that_has_ended_is_asked_for_until_that_is_told_and_not_again(
    world: FleetWorld, shim: AwsShim
) -> None:
    ended, vanished, *_ = await world.add(1000)
    shim.instances.terminate(ended.spec.region, [instance_of(ended)])
    shim.instances.vanish(instance_of(vanished))
    for worker in (ended, vanished):
        await world.client.update_status(worker, lambda w: setattr(w.status.ec2, "state", "terminated"))

    async def told() -> bool:
        await world.refresh()
        one, two = (await world.status("w0")).metrics, (await world.status("w1")).metrics
        lost = two is not None and two.ec2.error is not None and two.ec2.error.reason == "InstanceNotFound"
        return one is not None and one.ec2.state == "terminated" and lost

    await until(told, "that they have ended", 100)
    world.calls()
    await world.refresh()
    assert world.calls()["DescribeInstances"] == 1
    # Another machine is another matter.
    (new,) = await world.launch(1, tags={"Name": "somebody's"})

    def again(worker: LabWorker) -> None:
        worker.status.ec2.instance_id, worker.status.ec2.state = new, "running"

    await world.client.update_status(await world.get("w0"), again)
    await world.refresh()
    metrics = (await world.status("w0")).metrics
    assert metrics is not None
    assert metrics.ec2.state == "running"


async def test_status_checks_are_asked_for_by_id_where_the_region_is_full_of_others(world: FleetWorld) -> None:
    await world.launch(2000, tags={"Name": "somebody's"})
    await world.add(120)
    world.calls()
    await world.refresh()
    # Two pages are as many calls as the ids take; then ids it is.
    assert world.calls()["DescribeInstanceStatus"] == 4
    assert all(w.status.metrics and w.status.metrics.ec2.checks for w in world.cache.all(LabWorker))


async def test_a_cml_that_fails_in_part_is_told_in_part(whole: FleetWorld, cml: Simulator) -> None:
    (worker,) = await whole.add(1, cml=True)
    await whole.refresh()
    cml.faults.add("status", instance=instance_of(worker), path="/system_health", status=500)
    async with whole.counting() as writes:
        await whole.refresh()
        await whole.refresh()
    assert writes == {"MODIFIED w0": 1}
    metrics = (await whole.status()).metrics
    assert metrics is not None
    assert metrics.cml.error is not None
    assert metrics.cml.error.reason == "BadAnswer"
    assert (metrics.cml.version, metrics.cml.healthy) == ("2.9.1+build.7", True)
    cml.faults.clear()
    await whole.refresh()
    healed = (await whole.status()).metrics
    assert healed is not None
    assert healed.cml.error is None


async def test_another_cml_at_the_address_is_believed_nothing(whole: FleetWorld, cml: Simulator) -> None:
    (worker,) = await whole.add(1, cml=True)
    cml.faults.add("identity", instance=instance_of(worker))
    await whole.refresh()
    metrics = (await whole.status()).metrics
    assert metrics is not None
    assert metrics.cml.error is not None
    assert metrics.cml.error.reason == "IdentityMismatch"
    assert metrics.cml.version is None
    assert metrics.cml.cpu_percent is None


async def test_a_dead_cml_keeps_its_error_while_its_breaker_is_open_and_costs_no_writes(
    whole: FleetWorld, cml: Simulator
) -> None:
    (worker,) = await whole.add(1, cml=True)
    cml.machine(instance_of(worker)).power_off()
    for _ in range(2):  # the second one opens the breaker: five attempts in a row
        await whole.refresh()
    async with whole.counting() as writes:
        await whole.refresh()
    assert not writes
    metrics = (await whole.status()).metrics
    assert metrics is not None
    assert metrics.cml.error is not None
    assert metrics.cml.error.reason == "Unreachable"


async def test_who_asks_is_answered_at_once_and_many_share_one_batch(shim: AwsShim) -> None:
    async with fleet_world(shim, metrics_on_demand_interval=0.5) as world:
        await world.add(40)
        async with world.leading():
            world.calls()
            began = world.clock.monotonic()
            await world.ask([f"w{n}" for n in range(40)], "now")

            async def honoured() -> bool:
                found = await world.client.list(LabWorker)
                return all(w.status.metrics is not None and w.status.metrics.asked == "now" for w in found)

            await until(honoured, "every wish")
            calls = world.calls()
            assert calls["DescribeInstances"] <= 3 + (world.clock.monotonic() - began) / 0.5
            assert calls["GetMetricData"] == calls["DescribeInstances"]


async def test_who_asks_is_answered_while_a_batch_of_another_account_hangs(shim: AwsShim, profiles: Path) -> None:
    async with fleet_world(shim, aws_accounts=ACCOUNTS, metrics_on_demand_interval=0.1) as world:
        await world.add(1)
        await world.add(1, prefix="e", account="exams", number=EXAMS_NUMBER)
        async with world.leading():
            hangs = {"action": "*", "fault": "dropped", "seconds": 600, "times": 0, "account": EXAMS_NUMBER}
            fault = shim.faults.add(hangs)
            await world.ask(["e0"], "1")
            await until(lambda: fault.hits, "the batch that hangs")
            for wish in ("2", "3"):
                await world.ask(["w0"], wish)

                async def honoured(wish: str = wish) -> bool:
                    metrics = (await world.status("w0")).metrics
                    return metrics is not None and metrics.asked == wish

                await until(honoured, "the answer", timeout=15)


async def test_a_storm_of_wishes_is_spread_over_the_interval(shim: AwsShim) -> None:
    async with fleet_world(shim, metrics_on_demand_interval=3600) as world:
        await world.add(2)
        async with world.leading():
            await world.ask(["w0"], "first")
            await until(lambda: world.metrics.describe()["onDemand"] == 1, "the first")
            world.calls()
            for n in range(20):
                await world.ask(["w1"], f"again {n}")
            await world.cache.barrier(30)
            assert world.calls() == {}


async def test_a_worker_that_stops_loses_its_numbers_and_one_without_a_machine_all_that_was_measured(
    shim: AwsShim,
) -> None:
    async with fleet_world(shim, metrics_on_demand_interval=0.05) as world:
        stopped, _ = await world.add(2)
        async with world.leading():
            assert (await world.status("w0")).utilization is not None
            shim.instances.stop(stopped.spec.region, [instance_of(stopped)])

            def stop(worker: LabWorker) -> None:
                worker.status.enter("Stopped", "Test", world.clock.now())
                worker.status.ec2.state = "stopped"

            await world.client.update_status(await world.get("w0"), stop)
            await world.client.update_status(
                await world.get("w1"), lambda w: setattr(w.status.ec2, "instance_id", None)
            )

            async def cleared() -> bool:
                first, second = await world.status("w0"), await world.status("w1")
                return first.utilization is None and second.metrics is None and second.utilization is None

            await until(cleared, "the numbers to go")
            metrics = (await world.status("w0")).metrics
            assert metrics is not None
            assert metrics.ec2.state == "stopped"
            assert metrics.cloud_watch.cpu_percent is None


async def test_gauges_tell_exact_values_of_workers_that_exist_while_leading(whole: FleetWorld) -> None:
    (worker,) = await whole.add(1, cml=True)
    whole.measure(worker, cpu=50, memory=60)
    assert whole.gauges("cml_worker_status") == {}  # nobody leads
    async with whole.leading():
        whole.measure(worker, cpu=52.5, memory=60)
        await whole.refresh()
        utilization = (await whole.status()).utilization
        assert utilization is not None
        assert utilization.cpu_percent == 50
        cpu = whole.gauges("cml_worker_cpu_utilization")["w0"]
        assert cpu == {
            "worker_id": worker.uid,
            "region": "us-east-1",
            "account": "",
            "namespace": "default",
            "name": "w0",
            "value": "52.5",
        }
        assert whole.gauges("cml_worker_memory_utilization")["w0"]["value"] == "60.0"
        assert whole.gauges("cml_worker_status")["w0"]["status"] == "Ready"
        assert whole.gauges("cml_worker_labs_count")["w0"]["value"] == "3.0"
        assert whole.gauges("cml_worker_info")["w0"]["cml_version"] == "2.9.1+build.7"
        assert float(whole.gauges("cml_worker_uptime_seconds")["w0"]["value"]) >= 0
        held = await whole.client.get(LabWorker, "default", "w0")
        await whole.client.forget(held)
        await whole.cache.barrier(30)
        assert whole.gauges("cml_worker_status") == {}
        assert not whole.metrics._refresher.known
    assert whole.gauges("cml_worker_cpu_utilization") == {}


async def test_a_leader_that_was_deposed_writes_nothing_and_steps_down(world: FleetWorld) -> None:
    await world.add(3)
    entry = await world.storage.get(world.term.key)
    await world.storage.delete(world.term.key, expected_revision=entry.revision)
    async with world.counting() as writes:
        await world.metrics.run(world.term)  # returns, as the term was lost
    assert not writes


async def test_a_worker_that_cannot_be_handled_spoils_no_other_ones_refresh(
    world: FleetWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    await world.add(3)
    defect = await world.get("w1")
    # What a mistake of ours would look like.
    monkeypatch.setattr("controllers.metrics.refresh.can_be_asked", lambda w: 1 / int(w.uid != defect.uid) > 2)
    await world.refresh()
    assert [(await world.status(f"w{n}")).utilization is not None for n in range(3)] == [True, False, True]
    assert world.metrics.describe()["defects"] == 1


async def test_a_stop_does_not_wait_for_a_refresh(shim: AwsShim) -> None:
    async with fleet_world(shim) as world:
        await world.add(1)
        async with world.leading():
            shim.faults.add({"action": "*", "fault": "delay", "seconds": 30, "times": 0})
            await world.ask(["w0"], "now")
            await until(lambda: any(f["hits"] for f in shim.faults.list()), "a call that hangs")
            await world.metrics.drain(5)
            assert all(task.done() for task in world.metrics._working)


@pytest.mark.parametrize("count", [300, pytest.param(1000, marks=pytest.mark.soak)])
async def test_a_fleets_refresh_does_not_hold_the_event_loop(aws_credentials: None, tmp_path: Path, count: int) -> None:
    """A fleet at rest is refreshed and scraped, its cloud and its CMLs processes of their own."""
    async with servers(tmp_path) as (aws_url, cml_url), fleet_world(aws_url, cml_url) as world:
        await world.add(count, cml=True)
        await world.refresh()
        with shortened():
            lag = LoopLag()
            async with lag.watched():
                await world.refresh()
                world.metrics._leading = True
                text, _ = await asyncio.to_thread(world.telemetry.look())
        assert lag.held < 0.05
        assert text.count(b"cml_worker_cpu_utilization{") == count


async def test_a_worker_is_measured_when_it_begins_to_serve_and_its_metrics_wake_no_reconcile(
    monkeypatch: pytest.MonkeyPatch, moto_url: str
) -> None:
    """The whole plug-in: from a manifest to numbers in status and gauges, and back when it is stopped."""
    fast = {"metrics_refresh_interval": 3600, "metrics_on_demand_interval": 0.1}
    async with workers_world(monkeypatch, moto_url, led=[METRICS], worker_rest_interval=3600, **fast) as whole:
        worker = await whole.serving()
        await whole.until(lambda w: w.status.utilization and w.status.metrics.cml.version, "the first numbers")
        assert f'worker_id="{worker.uid}"' in whole.telemetry.exposition()[0].decode()
        workers = whole.runners[0]
        await whole.until(lambda w: w.status.labs_synced_at is not None, "the labs listed")
        await whole.at_rest()
        before = workers.stats.reconciles
        whole.shim.instances.measure(instance_of(worker), cpu=90, memory=70)
        (metrics,) = whole.others
        assert isinstance(metrics, FleetMetrics)
        await metrics._refresher.refresh([await whole.get()], whole.term)
        await whole.until(lambda w: w.status.utilization.memory_percent == 70, "the new numbers")
        await whole.cache.barrier(30)
        assert (workers.stats.reconciles, len(workers.queue), workers.queue.processing) == (before, 0, 0)
        await whole.wish("Stopped")
        await whole.phase("Stopped")
        await whole.until(lambda w: w.status.utilization is None, "the numbers to go")
