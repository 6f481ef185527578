"""`make bench` measures; these tests only see to it that it still can: every part once, as small as it goes."""

from __future__ import annotations

import asyncio

import pytest

from bench.__main__ import MEASUREMENTS, main
from bench.report import TINY, Figure, table
from equipment.engine import Engine


async def test_every_measurement_runs_to_its_end_and_fills_its_rows(engine: Engine) -> None:
    """All at once, which spoils the numbers: whether a target is met is for `make bench` to say."""
    parts = await asyncio.gather(*(measure(TINY) for measure in MEASUREMENTS.values()))
    assert all(parts)
    figures = [figure for part in parts for figure in part]
    assert all(figure.value >= 0 for figure in figures)
    rows = table(figures).splitlines()[2:]
    assert len(rows) == len({figure.name for figure in figures})


@pytest.mark.parametrize(
    ("figure", "ratio", "verdict", "why"),
    [
        (Figure("a", 2.0, "s", 4.0), 0.5, "PASS", "below what it may be at most"),
        (Figure("a", 4.0, "s", 4.0), 1.0, "PASS", "the limit itself is allowed"),
        (Figure("a", 4.1, "s", 4.0), 1.025, "FAIL", "above what it may be at most"),
        (Figure("a", 0.5, "s", 0.4, "more"), 1.25, "PASS", "more than it must be"),
        (Figure("a", 0.3, "s", 0.4, "more"), 0.75, "FAIL", "less than it must be"),
        (Figure("a", 0.0, "s", 0.0), 0.0, "PASS", "none where none is allowed"),
        (Figure("a", 1.0, "s", 0.0), 1.0, "FAIL", "one where none is allowed"),
    ],
)
def test_a_figure_is_judged_against_its_limit(figure: Figure, ratio: float, verdict: str, why: str) -> None:
    assert figure.ratio == pytest.approx(ratio), why
    assert f"| {verdict} " in table([figure]), why


def test_the_exit_code_says_whether_a_target_was_missed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    async def slow(_size: object) -> list[Figure]:
        return [Figure("far too slow", 2.0, "s", 1.0)]

    async def fast(_size: object) -> list[Figure]:
        return [Figure("quick enough", 1.0, "s", 1.0)]

    monkeypatch.setitem(MEASUREMENTS, "idle", fast)
    assert main(["--only", "idle"]) == 0
    monkeypatch.setitem(MEASUREMENTS, "idle", slow)
    assert main(["--only", "idle"]) == 1
    assert "missed: far too slow" in capsys.readouterr().out
