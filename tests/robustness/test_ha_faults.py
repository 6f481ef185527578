"""A trio of daemons under load while one thing after another fails: every promise is held against what has happened.

`README.md` beside this file says for each fault what must hold and what it has found. A random sequence prints its
seed; `LRM_TEST_SEED=n pytest tests/robustness/test_ha_faults.py -k random` repeats it.
"""

from __future__ import annotations

import asyncio
import os
import random
from collections.abc import AsyncIterator
from typing import Any

import pytest
import pytest_asyncio

from equipment.aws import SharedMoto
from equipment.etcd import binary, scratch_dir
from equipment.trio import Trio
from equipment.trio_faults import AT_ONCE, FAULTS
from equipment.trio_scene import scene

pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.timeout(240), pytest.mark.slow]

SAMPLE = {
    "leader-daemon-killed",
    "leader-daemon-paused-past-its-lease",
    "leader-daemon-paused-in-a-launch",
    "wall-clock-of-the-leader-set",
    "etcd-leader-killed",
    "etcd-leader-cut-off-from-its-peers",
    "replies-of-etcd-lost",
    "writes-to-etcd-late",
    "history-compacted",
    "leader-daemon-cut-off-from-etcd",
    "leader-daemon-cut-off-from-cml",
    "redis-killed",
    "redis-full",
}


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def trio(shared_moto: SharedMoto) -> AsyncIterator[Trio]:
    with scratch_dir("lrm-trio-") as folder:
        async with Trio(folder, binary("current"), await shared_moto.url()) as world:
            yield world


def _faults() -> list[Any]:
    return [name if name in SAMPLE else pytest.param(name, marks=pytest.mark.soak) for name in FAULTS]


@pytest.mark.parametrize("fault", _faults())
async def test_every_promise_holds_through(trio: Trio, fault: str) -> None:
    async with scene(trio, random.Random(fault)) as s:
        await FAULTS[fault](s)


def _seeds() -> list[Any]:
    if "LRM_TEST_SEED" in os.environ:
        return [int(os.environ["LRM_TEST_SEED"])]
    return [1, *(pytest.param(seed, marks=pytest.mark.soak) for seed in range(2, 9))]


@pytest.mark.parametrize("seed", _seeds())
async def test_every_promise_holds_through_random_trouble(trio: Trio, seed: int) -> None:
    """Four faults, one after the other, in one scene."""
    draw = random.Random(seed)
    names = draw.sample(sorted(FAULTS), 4)
    print(f"LRM_TEST_SEED={seed}: {', '.join(names)}")
    async with scene(trio, draw) as s:
        for name in names:
            await FAULTS[name](s)


@pytest.mark.parametrize("seed", _seeds())
async def test_every_promise_holds_through_random_trouble_of_two_kinds_at_once(trio: Trio, seed: int) -> None:
    """Three times: a daemon's trouble and the store's at the same moment, in one scene."""
    draw = random.Random(seed)
    pairs = [(draw.choice(AT_ONCE["daemon"]), draw.choice(AT_ONCE["store"])) for _ in range(3)]
    print(f"LRM_TEST_SEED={seed}: {', '.join(' with '.join(pair) for pair in pairs)}")
    async with scene(trio, draw) as s:
        for pair in pairs:
            async with asyncio.TaskGroup() as both:
                for name in pair:
                    both.create_task(FAULTS[name](s))
