"""What /metrics tells of the mirror of labs, under the names that dashboards rely on."""

from __future__ import annotations

from prometheus_client.parser import text_string_to_metric_families

from controllers.labs.measures import LabMeasures
from lrm.telemetry import Telemetry


def samples(telemetry: Telemetry) -> dict[tuple[str, str], float]:
    """(sample name, value of its only label) → value, of what is counted here."""
    found = {}
    for family in text_string_to_metric_families(telemetry.exposition()[0].decode()):
        for sample in family.samples:
            if sample.name.startswith("lrm_labs") and not sample.name.endswith(("_bucket", "_created")):
                found[sample.name, next(iter(sample.labels.values()), "")] = sample.value
    return found


def test_syncs_orphans_and_deletions_are_counted_by_how_they_ended() -> None:
    telemetry = Telemetry()
    measures = LabMeasures(telemetry.meter)
    measures.synced(0.5, created=3, updated=0, missing=1, removed=3, orphans=3)
    measures.sync_failed(0.25, "CmlTimeout")
    measures.deleted()
    measures.delete_failed()
    measures.delete_failed()
    measures.hinted()
    assert samples(telemetry) == {
        ("lrm_labs_sync_seconds_count", "synced"): 1,
        ("lrm_labs_sync_seconds_sum", "synced"): 0.5,
        ("lrm_labs_sync_seconds_count", "failed"): 1,
        ("lrm_labs_sync_seconds_sum", "failed"): 0.25,
        ("lrm_labs_sync_errors_total", "CmlTimeout"): 1,
        ("lrm_labs_changes_total", "created"): 3,
        ("lrm_labs_changes_total", "missing"): 1,
        ("lrm_labs_changes_total", "removed"): 3,
        ("lrm_labs_orphans_total", ""): 3,
        ("lrm_labs_deletes_total", "success"): 1,
        ("lrm_labs_deletes_total", "failure"): 2,
        ("lrm_labs_push_hints_total", ""): 1,
    }
