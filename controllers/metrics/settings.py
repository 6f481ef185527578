"""Settings of the fleet's metrics: how often, how much at once, and which change is worth a write."""

from __future__ import annotations

from pydantic import Field

from lrm.settings import LrmSettings, Seconds


class MetricsSettings(LrmSettings):
    """Read from the same environment and file as the daemon's own settings."""

    metrics_refresh_interval: Seconds = Field(
        300.0,
        description="Seconds between two refreshes of all workers' metrics, spread by ±10 %; 5 min is how often EC2 "
        "itself tells CloudWatch.",
    )
    metrics_on_demand_interval: Seconds = Field(
        5.0,
        description="Seconds between two refreshes that somebody asked for at least; whoever asks meanwhile shares the "
        "next one.",
    )
    metrics_cpu_change: float = Field(
        5.0, ge=0, le=100, description="Percentage points by which a processor's use must move to be written to status."
    )
    metrics_memory_change: float = Field(
        5.0, ge=0, le=100, description="Percentage points by which a memory's use must move to be written to status."
    )
    metrics_cml_at_once: int = Field(
        16, ge=1, le=256, description="CMLs that are asked at once; each is asked four questions, one after the other."
    )
