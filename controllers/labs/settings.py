"""Settings of the labs controllers: how often, how long, how much is kept."""

from __future__ import annotations

from pydantic import Field

from lrm.settings import LrmSettings, Seconds


class LabsSettings(LrmSettings):
    """Read from the same environment and file as the daemon's own settings."""

    labs_refresh_interval: Seconds = Field(
        1800.0,
        description="Seconds between two syncs of a worker's labs, spread by ±10 %; 30 min, since each list is heavy "
        "for a big CML and an annotation gets a sync at once.",
    )
    labs_drain_interval: Seconds = Field(
        60.0,
        description="Seconds between two syncs of a worker that is draining, where that is less: it waits for its labs "
        "to end, and costs money until then.",
    )
    labs_history_length: int = Field(
        50, ge=1, le=1000, description="Operations kept per lab; 50 are about 10 KB, an object may have 1 MiB."
    )
    labs_step_interval: Seconds = Field(
        2.0, description="Seconds between two looks at a lab that is being started, stopped, wiped or deleted."
    )
    labs_step_timeout: Seconds = Field(
        600.0,
        description="Seconds after which a desiredState that CML accepted but did not reach is given up; stopping a "
        "big lab takes minutes.",
    )
