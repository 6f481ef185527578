"""What a daemon does first after a restart: what has changed meanwhile, before all that was settled.

A daemon at rest with many objects is stopped, some of them are changed in the store, and it is started again. The time
runs from the moment when its cache holds all objects to the last of the changed ones reconciled.
"""

from __future__ import annotations

from bench.report import Figure, Size
from bench.stage import Mark, Stage, at_rest, object_name, stage
from equipment.daemons import DaemonProcess
from equipment.waiting import until

CHANGED = 10
WITHIN = 1.0


async def restarts(size: Size) -> list[Figure]:
    """How long the changed ones took, and how many others came before them."""
    seconds: list[float] = []
    strangers: list[int] = []
    async with stage() as scene:
        await scene.fill(size.objects)
        daemon = scene.daemon(**size.leases[-1].settings())
        await daemon.start_ready(60)
        for run in range(max(1, size.runs // 4)):
            took, before = await _restarted(scene, daemon, size.objects, run)
            seconds.append(took)
            strangers.append(before)
    told = f"{len(seconds)} restarts with {size.objects} objects, fastest {min(seconds):.3f} s"
    return [
        Figure(f"restart: {CHANGED} changed are reconciled (worst)", max(seconds), "s", WITHIN, told=told),
        Figure("restart: others begun before them", max(strangers), "objects", 0, told=told),
    ]


async def _restarted(scene: Stage, daemon: DaemonProcess, objects: int, run: int) -> tuple[float, int]:
    await at_rest([daemon])
    daemon.terminate()
    await daemon.exit_code(60)
    changed = {object_name(i * objects // CHANGED + run) for i in range(CHANGED)}
    await scene.change(sorted(changed), count=run + 2)
    await daemon.start_ready(60)
    pid = daemon.process.pid

    def marks() -> dict[str, Mark]:
        return {m.what: m for m in reversed(scene.ledger.reconciles(pid=pid))}

    await until(lambda: changed <= marks().keys(), "the changed objects are reconciled", timeout=60)
    ready = scene.ledger.cache_ready(pid)
    if ready is None:
        raise RuntimeError("the daemon reconciled before its cache was filled")
    first = marks()
    last_begun = max(first[name].began for name in changed)
    before = {name for name, mark in first.items() if mark.began < last_begun} - changed
    return max(first[name].ended for name in changed) - ready, len(before)
