"""How pushes become syncs: gathered, apart, and once more where the first look was too early."""

from __future__ import annotations

import pytest

from controllers.labs.hints import PushHints
from lrm.testing import VirtualClock

UID, KEY = "u", ("default", "w")


class Scene:
    """Hints with an interval of two seconds, on a clock that the test moves."""

    def __init__(self) -> None:
        self.clock = VirtualClock()
        self.hints = PushHints(self.clock, interval=2.0)
        self.told: list[tuple[str, str]] = []
        self.hints.listen(self.told.append)

    def hear(self) -> bool:
        return self.hints.heard(UID, KEY)

    def due_in(self) -> float | None:
        due = self.hints.due_in(UID)
        return None if due is None else round(due, 3)

    async def sync(self, *, took: float = 0.0, news: bool = True) -> None:
        self.hints.begin(UID)
        await self.clock.advance(took)
        self.hints.end(UID, news=news)


@pytest.fixture
async def scene() -> Scene:
    return Scene()


async def test_a_push_makes_a_sync_due_in_a_moment_and_wakes_the_worker_once(scene: Scene) -> None:
    assert scene.due_in() is None
    assert [scene.hear() for _ in range(5)] == [True, False, False, False, False]
    assert (scene.due_in(), scene.told) == (0.1, [KEY])
    await scene.clock.advance(0.1)
    assert scene.due_in() == 0
    await scene.sync()
    assert scene.due_in() is None


async def test_two_syncs_are_an_interval_apart(scene: Scene) -> None:
    scene.hear()
    await scene.sync()
    await scene.clock.advance(0.5)
    assert scene.hear()
    assert scene.due_in() == 1.5
    await scene.clock.advance(1.0)
    assert not scene.hear()
    assert scene.due_in() == 0.5


async def test_a_sync_that_was_due_anyway_counts_as_the_first_of_the_two(scene: Scene) -> None:
    await scene.sync()
    scene.hear()
    assert scene.due_in() == 2


async def test_a_cml_whose_lists_take_long_is_asked_the_less(scene: Scene) -> None:
    scene.hear()
    assert scene.hints.held_for(UID) == 0
    await scene.sync(took=6.0)
    assert scene.hints.held_for(UID) == 5 * 6 - 6, "also for what was not pushed"
    scene.hear()
    assert scene.due_in() == 5 * 6 - 6


async def test_a_push_during_a_sync_asks_for_another(scene: Scene) -> None:
    scene.hear()
    scene.hints.begin(UID)
    await scene.clock.advance(1.0)
    assert scene.hear()
    scene.hints.end(UID, news=True)
    assert scene.due_in() == 4.0, "five times the second that it took, from its beginning"


async def test_a_look_that_found_nothing_is_repeated_once(scene: Scene) -> None:
    scene.hear()
    await scene.sync(news=False)
    assert scene.due_in() == 3
    await scene.clock.advance(3)
    await scene.sync(news=False)
    assert scene.due_in() is None


async def test_a_poll_that_found_nothing_is_not_repeated(scene: Scene) -> None:
    await scene.sync(news=False)
    assert scene.due_in() is None


async def test_a_push_before_the_repetition_comes_first_and_has_its_own(scene: Scene) -> None:
    scene.hear()
    await scene.sync(news=False)
    await scene.clock.advance(2.5)
    assert scene.hear()
    assert scene.due_in() == 0.1
    await scene.sync(news=False)
    assert scene.due_in() == 3


async def test_what_a_failed_sync_was_asked_for_stays_due(scene: Scene) -> None:
    scene.hear()
    scene.hints.begin(UID)
    scene.hints.failed(UID)
    assert scene.due_in() == 2
    await scene.clock.advance(2)
    scene.hints.begin(UID)
    scene.hints.end(UID, news=True)
    assert scene.due_in() is None


async def test_a_failed_poll_leaves_nothing_due(scene: Scene) -> None:
    scene.hints.begin(UID)
    scene.hints.failed(UID)
    assert scene.due_in() is None


async def test_an_opened_channel_is_a_hint_only_after_a_sync_that_it_did_not_accompany(scene: Scene) -> None:
    scene.hints.opened(UID, KEY)
    assert scene.due_in() is None, "the first sync is still to come, and sees everything"
    await scene.sync()
    scene.hints.opened(UID, KEY)
    assert scene.due_in() == 2
    await scene.clock.advance(2)
    await scene.sync(news=False)
    assert scene.due_in() is None, "nothing was pushed that the list could have been too early for"


async def test_a_channel_that_is_cut_each_minute_asks_for_few_syncs_and_pushes_for_all(scene: Scene) -> None:
    await scene.sync()
    syncs = 0
    for second in range(3600):
        if second % 61 == 0:
            scene.hints.opened(UID, KEY)
        await scene.clock.advance(1)
        if scene.due_in() == 0:
            syncs += 1
            await scene.sync(news=False)
    assert 4 <= syncs <= 10
    scene.hints.opened(UID, KEY)
    assert (scene.due_in() or 0) > 60, "it is put off, not forgotten"
    assert scene.hear()
    assert (scene.due_in() or 0) <= 2


async def test_a_worker_that_is_gone_is_forgotten(scene: Scene) -> None:
    scene.hear()
    scene.hints.forget(UID)
    assert scene.due_in() is None
