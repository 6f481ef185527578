"""What is measured of the mirror of labs: one place for the meters of the sync, of the push and of the deletions.

What happens is counted as it happens; label values are few and fixed, reasons are the names of error classes. What is
now (records by worker, open channels) `LabsPush.observe` tells at each scrape.
"""

from __future__ import annotations

from opentelemetry.metrics import Meter, NoOpMeter

_SYNC_SECONDS = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)


class LabMeasures:
    """The instruments, served as `lrm_labs_…`; without a meter nothing is kept."""

    def __init__(self, meter: Meter | None = None) -> None:
        meter = meter or NoOpMeter("labs")
        self._syncs = meter.create_histogram(
            "lrm_labs_sync",
            "s",
            "Time of one sync of one worker, by result.",
            explicit_bucket_boundaries_advisory=_SYNC_SECONDS,
        )
        self._errors = meter.create_counter("lrm_labs_sync_errors", description="Syncs that failed, by reason.")
        self._changes = meter.create_counter("lrm_labs_changes", description="Records that syncs wrote, by change.")
        self._orphans = meter.create_counter(
            "lrm_labs_orphans", description="Records that a complete list lacked, counted at each such list."
        )
        self._hints = meter.create_counter("lrm_labs_push_hints", description="Pushes that made a sync due.")
        self._deletes = meter.create_counter("lrm_labs_deletes", description="Deletions of labs in CML, by result.")

    def synced(self, seconds: float, *, created: int, updated: int, missing: int, removed: int, orphans: int) -> None:
        """A sync came to its end."""
        self._syncs.record(seconds, {"result": "synced"})
        for change, count in (("created", created), ("updated", updated), ("missing", missing), ("removed", removed)):
            if count:
                self._changes.add(count, {"change": change})
        if orphans:
            self._orphans.add(orphans)

    def sync_failed(self, seconds: float, reason: str) -> None:
        """A sync was given up; `reason` is one word of few."""
        self._syncs.record(seconds, {"result": "failed"})
        self._errors.add(1, {"reason": reason})

    def hinted(self) -> None:
        """CML has pushed that something changed."""
        self._hints.add(1)

    def deleted(self) -> None:
        """A lab that lrm was to delete is gone from CML."""
        self._deletes.add(1, {"result": "success"})

    def delete_failed(self) -> None:
        """A try to delete a lab has failed; it is made again."""
        self._deletes.add(1, {"result": "failure"})
