"""Settings of the sweep: how often it looks, and whether it may do more than report."""

from __future__ import annotations

from pydantic import Field

from lrm.settings import LrmSettings, Seconds


class SweepSettings(LrmSettings):
    """What the sweep can be told."""

    sweep_interval: Seconds = Field(
        3600.0,
        description="Seconds between looks for instances that no LabWorker claims; two looks must agree. An hour, for "
        "each asks EC2 in every region and account that was ever used.",
    )
    sweep_terminate: bool = Field(
        False, description="End such instances after two looks. Off: they are only reported, for a person to judge."
    )
    observe_only: bool = Field(False, description="Change nothing outside; status is still written.")
