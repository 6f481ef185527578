"""What `kubectl get` prints."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest

from equipment.api import TELESCOPE, Telescope, telescope
from lrm.api.table import age, cells, table_of
from lrm.kind import Column

NOW = datetime(2026, 5, 1, tzinfo=UTC)


@pytest.mark.parametrize(
    ("seconds", "told"),
    [
        (-5, "0s"),
        (0, "0s"),
        (119, "119s"),
        (120, "2m"),
        (125, "2m5s"),
        (599, "9m59s"),
        (600, "10m"),
        (3 * 3600 - 1, "179m"),
        (3 * 3600, "3h"),
        (3 * 3600 + 300, "3h5m"),
        (8 * 3600, "8h"),
        (48 * 3600 - 1, "47h"),
        (48 * 3600, "2d"),
        (50 * 3600, "2d2h"),
        (8 * 86400, "8d"),
        (729 * 86400, "729d"),
        (730 * 86400, "2y"),
        (800 * 86400, "2y70d"),
        (3000 * 86400, "8y"),
    ],
)
def test_ages_are_written_as_kubectl_writes_them(seconds: int, told: str) -> None:
    assert age(timedelta(seconds=seconds)) == told


def test_a_row_has_a_cell_for_each_column() -> None:
    made = Telescope.model_validate(telescope())
    made.metadata.creation_timestamp = NOW - timedelta(seconds=5)
    table = table_of(TELESCOPE, [made], None, {"resourceVersion": "1"}, NOW)
    assert [c["name"] for c in table["columnDefinitions"]] == ["Name", "Site", "Phase", "Diameter", "Age"]
    assert table["rows"][0]["cells"] == ["hubble", "orbit", "Pending", 240, "5s"]
    assert table["rows"][0]["object"]["kind"] == "PartialObjectMetadata"
    assert "spec" not in table["rows"][0]["object"]


@pytest.mark.parametrize(("seconds", "told"), [(-125, "2m5s"), (0, "0s"), (42 * 60, "in 42m"), (None, None)], ids=str)
def test_a_time_is_told_by_its_distance(seconds: int | None, told: str | None) -> None:
    column = Column("Ends", lambda _: None if seconds is None else NOW + timedelta(seconds=seconds))
    kind = replace(TELESCOPE, columns=(column,))
    assert cells(kind, Telescope.model_validate(telescope()), NOW)[1] == told


def test_an_object_without_a_birthday_has_an_unknown_age() -> None:
    table = table_of(TELESCOPE, [Telescope.model_validate(telescope())], None, {}, NOW, columns=False)
    assert table["columnDefinitions"] == []
    assert table["rows"][0]["cells"][-1] == "<unknown>"
