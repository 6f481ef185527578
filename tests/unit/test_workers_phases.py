"""The table of a LabWorker's phases: what DESIGN draws, and nothing else."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest

from controllers.plugin import plugin
from controllers.workers.kind import LAB_WORKER, WORKERS, LabWorker
from controllers.workers.phases import CML_RUNNING, SERVING, TRANSITIONS, Phase
from controllers.workers.spec import LabWorkerSpec
from controllers.workers.work import enter
from lrm.client import Client
from lrm.errors import Invalid
from lrm.registry import Registry
from lrm.resource import ObjectMeta
from lrm.testing import VirtualClock
from storage.memory import MemoryStorage

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
    ("Licensing", "Draining", "taken out of service before it was licensed"),
    ("ReadyUnlicensed", "Licensing", "another try"),
    ("ReadyUnlicensed", "Ready", "a licence that came late, or by hand"),
    ("ReadyUnlicensed", "Active", "a lab runs"),
    ("Active", "ReadyUnlicensed", "the last lab ended"),
    ("Ready", "Active", "a lab runs"),
    ("Active", "Ready", "the last lab ended"),
    ("Ready", "Draining", "taken out of service"),
    ("ReadyUnlicensed", "Draining", "taken out of service"),
    ("Active", "Draining", "taken out of service"),
    ("Draining", "Ready", "cancelled"),
    ("Draining", "ReadyUnlicensed", "cancelled"),
    ("Draining", "Stopping", "drained, without a licence"),
    ("Unlicensing", "Stopping", "the seat is back"),
    ("Stopping", "Stopped", "EC2 says so"),
    ("Stopped", "Starting", "started again"),
    ("Ready", "Stopped", "EC2 says so"),
    ("ReadyUnlicensed", "Stopped", "EC2 says so"),
    ("Active", "Stopped", "EC2 says so"),
    ("TerminatingEC2", "Terminated", "EC2 says so"),
    ("Failed", "Starting", "tried again with its instance"),
    ("Failed", "Stopping", "stopped instead"),
    ("Failed", "Pending", "tried again without an instance"),
]
LIVING = [p.value for p in Phase if p != Phase.TERMINATED]
EVERYWHERE = [
    *((phase, "Failed", "whatever it was doing can fail") for phase in LIVING if phase != "Failed"),
    *((phase, "TerminatingEC2", "whatever it was doing, it can be ended") for phase in LIVING),
    *((phase, "Unlicensing", "every way out passes where a seat can be given back") for phase in LIVING),
]
TOO_LATE = {("TerminatingEC2", "Unlicensing"), ("TerminatingEC2", "TerminatingEC2"), ("Unlicensing", "Unlicensing")}
OPEN = {(a, b): why for a, b, why in (*WAYS, *EVERYWHERE) if (a, b) not in TOO_LATE}
NO_WAYS = {
    ("Pending", "Ready"): "nothing is skipped",
    ("Pending", "EC2Ready"): "nothing is skipped",
    ("ProvisioningEC2", "Starting"): "EC2Ready lies between",
    ("Starting", "Ready"): "licensed or not is decided first",
    ("Starting", "Active"): "it does not serve yet",
    ("Draining", "Active"): "a cancelled drain serves first",
    ("Draining", "Stopped"): "Stopping lies between",
    ("Unlicensing", "Ready"): "a seat that is given back is not called back",
    ("Stopped", "Ready"): "it boots first",
    ("Stopping", "Starting"): "a stop is not called back",
    ("Failed", "Ready"): "a failure is not forgotten",
    ("Failed", "Stopped"): "what EC2 says is looked at first",
    ("TerminatingEC2", "Starting"): "an end is not called back",
    ("TerminatingEC2", "Unlicensing"): "too late for that",
    ("Terminated", "Pending"): "the end is final",
}


@pytest.mark.parametrize("source", [p.value for p in Phase])
async def test_every_way_that_is_drawn_is_open_and_every_other_one_is_refused_by_the_store(source: str) -> None:
    """All pairs: a status that takes a way which is not drawn is never written."""
    storage, clock = MemoryStorage(), VirtualClock()
    client = Client(storage, Registry(plugin.kinds), clock).bind(owner=WORKERS, fence=None)
    for target in Phase:
        spec = LabWorkerSpec.model_validate({"region": "us-east-1", "aws": {"amiId": "ami-12345678"}})
        made = LabWorker(metadata=ObjectMeta(name=f"to-{target.value.lower()}"), spec=spec)
        created = await client.create(made)
        # The store as it is found: no way leads to some phases within a test.
        entry = await storage.get(f"/lrm/r/labworkers/default/{created.name}")
        await storage.set(entry.key, entry.value.replace(b'"phase":"Pending"', f'"phase":"{source}"'.encode()))
        worker = await client.get(LabWorker, "default", created.name)
        assert worker.status.phase == source

        def go(w: LabWorker, target: Phase = target) -> None:
            enter(w, target, "Test", datetime(2026, 1, 1, tzinfo=UTC))

        why = OPEN.get((source, target.value), NO_WAYS.get((source, target.value), "it is not drawn"))
        if source == target.value:
            after = await client.update_status(worker, go)
            assert not after.status.phase_history, "to stay is no step"
        elif (source, target.value) in OPEN:
            after = await client.update_status(worker, go)
            assert (after.status.phase, len(after.status.phase_history)) == (target.value, 1), why
        else:
            with pytest.raises(Invalid):
                await client.update_status(worker, go)
            assert (await client.get(LabWorker, "default", worker.name)).status.phase == source, why
    await storage.aclose()


def test_the_table_is_the_drawing() -> None:
    assert {(a, b) for a, following in TRANSITIONS.items() for b in following} == set(OPEN)
    assert not set(NO_WAYS) & set(OPEN)
    for (source, target), why in NO_WAYS.items():
        assert not LAB_WORKER.may_follow(source, target), why


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
