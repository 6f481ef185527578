"""Settings of the pools' part."""

from __future__ import annotations

from pydantic import Field

from lrm.settings import LrmSettings, Seconds


class PoolSettings(LrmSettings):
    """Read from the same environment and file as the daemon's own settings."""

    pool_interval: Seconds = Field(
        30.0,
        description="Seconds between two looks at a pool to which nothing happens: its cooldowns, hours and schedule "
        "are kept to this. What happens to its workers is seen at once.",
    )
