"""What is said of a worker that had an instance's place."""

from __future__ import annotations

import pytest

from controllers.instances.cml_place import Away, Lost, place_of
from controllers.instances.kind import WorkerRef
from equipment.placing_scene import placing_scene


@pytest.mark.parametrize("deleted", [True, False])
async def test_a_worker_that_ends_is_lost_and_a_deleted_one_is_called_so(deleted: bool) -> None:
    async with placing_scene(lead=False) as scene:
        worker = await scene.worker("w")
        if deleted:
            worker = await scene.client.update(worker, lambda w: w.metadata.finalizers.append("example.com/held"))
            await scene.client.delete(worker)
            worker = await scene.get_worker("w")
        for phase in ("Draining", "Unlicensing", "TerminatingEC2"):
            worker = await scene.set_worker(worker, lambda w, p=phase: w.status.enter(p, "Test", scene.clock.now()))
        ref = WorkerRef(kind="LabWorker", namespace="default", name="w", uid=worker.uid)
        lost = "the worker w was deleted" if deleted else "the worker w is being terminated"
        assert place_of(ref, scene.cache) == Lost(lost)


@pytest.mark.parametrize("wish", ["Terminated", "Stopped", "deletion"])
async def test_a_worker_is_lost_from_its_unlicensing_on_where_it_ends_then(wish: str) -> None:
    """Its CML may be dead, and its seat waited for; one that is to be stopped comes back."""
    async with placing_scene(lead=False) as scene:
        worker = await scene.worker("w")
        if wish == "deletion":
            worker = await scene.client.update(worker, lambda w: w.metadata.finalizers.append("example.com/held"))
            await scene.client.delete(worker)
            worker = await scene.get_worker("w")
        else:
            worker = await scene.client.update(worker, lambda w: setattr(w.spec, "desired_phase", wish))
        for phase in ("Draining", "Unlicensing"):
            worker = await scene.set_worker(worker, lambda w, p=phase: w.status.enter(p, "Test", scene.clock.now()))
        ref = WorkerRef(kind="LabWorker", namespace="default", name="w", uid=worker.uid)
        assert isinstance(place_of(ref, scene.cache), Away if wish == "Stopped" else Lost)
