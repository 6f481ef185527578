"""What can be asked about lab instances."""

from __future__ import annotations

from controllers.instances import queries
from controllers.instances.phases import Phase
from equipment.instances_scene import instances_scene


async def test_instances_are_found_by_phase_student_and_worker() -> None:
    async with instances_scene(slots={"w1": 1}) as scene:
        await scene.make("a", studentEmail="Ann@example.edu")
        await scene.until_phase("Running")
        await scene.make("b", studentEmail="ann@example.edu")
        await scene.make("c", studentEmail="bob@example.edu")
        cache = scene.cache
        await cache.barrier(30)
        assert [r.name for r in queries.by_phase(cache, Phase.RUNNING)] == ["a"]
        assert sorted(r.name for r in queries.by_phase(cache, Phase.PENDING, "default")) == ["b", "c"]
        assert queries.by_phase(cache, Phase.PENDING, "elsewhere") == []
        assert sorted(r.name for r in queries.by_student(cache, "ANN@example.edu")) == ["a", "b"]
        assert [r.name for r in queries.on_worker(cache, "default", "w1")] == ["a"]
        assert queries.count_by_phase(cache) == {"Running": 1, "Pending": 2}
