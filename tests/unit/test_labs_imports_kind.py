"""The LabImport kind: what may change when, and when there is something to do."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import pytest
from pydantic import ValidationError

from controllers.labs.imports_kind import (
    IMPORT_ANNOTATION,
    LAB_IMPORT,
    LabImport,
    LabImportSpec,
    ended,
    is_reserved,
    waits_to_be_asked,
)
from lrm import writes
from lrm.errors import Invalid
from lrm.resource import ObjectMeta

NOW = datetime(2026, 1, 1, tzinfo=UTC)
UID = "90f84e38-a71c-4d57-8d90-00fa8a197385"


def order(**spec: Any) -> LabImport:
    values = {"worker_ref": "w1", "title": "BGP", "topology": "lab: {}", **spec}
    wanted = LabImport(metadata=ObjectMeta(name="one"), spec=LabImportSpec(**values))
    return writes.for_create(LAB_IMPORT, wanted, uid=UID, now=NOW)


def changed(current: LabImport, **spec: Any) -> writes.Decision[LabImport]:
    wanted = current.thaw()
    for name, value in spec.items():
        setattr(wanted.spec, name, value)
    return writes.for_update(LAB_IMPORT, current, wanted)


def test_what_is_kept_may_go_to_another_worker_until_it_is_sent_and_its_time_may_change_always() -> None:
    kept = order(held=True)
    assert isinstance(changed(kept, worker_ref="w2", title="BGP again"), writes.Put)
    kept.status.sent_at = NOW
    assert isinstance(changed(kept, ttl_seconds=60), writes.Put)
    for spec in ({"worker_ref": "w2"}, {"title": "other"}, {"topology": "lab: {x: 1}"}):
        with pytest.raises(Invalid, match="is fixed"):
            changed(kept, **spec)


def test_one_that_is_held_waits_for_the_annotation() -> None:
    kept = order(held=True)
    assert not waits_to_be_asked(order())
    for value, waits in (("false", True), ("true", False), ("now", False)):
        kept.metadata.annotations[IMPORT_ANNOTATION] = value
        assert waits_to_be_asked(kept) is waits
    kept.metadata.annotations.clear()
    kept.status.sent_at = NOW
    assert not waits_to_be_asked(kept), "CML may have the lab"


def test_one_that_failed_begins_anew_when_its_spec_changes() -> None:
    failed = order()
    assert not ended(failed)
    failed.status.phase, failed.status.observed_generation = "Failed", 1
    assert ended(failed)
    failed.metadata.generation = 2
    assert not ended(failed)
    failed.status.phase = "Imported"
    assert ended(failed)


@pytest.mark.parametrize("title", [f"lrm-{UID}", f"lrm-import-{UID}"])
def test_nobody_takes_titles_by_which_lrm_finds_its_own(title: str) -> None:
    assert is_reserved(title)
    assert not is_reserved(f"Copy of {title}")
    with pytest.raises(Invalid, match=r"spec\.title"):
        order(title=title)


def test_a_title_that_a_terminal_would_obey_is_refused_and_one_that_is_stored_stays_readable() -> None:
    for title in ("bell \x07", "clear \x1b[2J", "two\nlines", "c1 \x9b", "del \x7f"):
        with pytest.raises(Invalid, match=r"spec\.title"):
            order(title=title)
    assert order(title="Ärger 😀 zero\u200bwidth").spec.title
    stored = order().thaw()
    stored.spec.title = "bell \x07"
    changed(stored, ttl_seconds=5)


@pytest.mark.parametrize("spec", [{"topology": " \n"}, {"topology": "é" * 300_000}, {"title": ""}, {"ttl_seconds": 0}])
def test_what_makes_no_sense_is_refused(spec: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        order(**spec)
