"""Settings of the labs controllers: how often, how long, how much is kept."""

from __future__ import annotations

from typing import Annotated

from pydantic import BeforeValidator, Field

from lrm.settings import LrmSettings, Seconds, parse_duration


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
    labs_idle_interval: Seconds = Field(
        7200.0,
        description="Seconds between two syncs of a worker on which no lab runs and none has changed for as long, "
        "where that is more: nobody works there, and a push or an annotation gets a sync at once.",
    )
    labs_push: bool = Field(
        True, description="Listen to the push channel of each CML, for a sync as soon as a lab changes."
    )
    labs_push_interval: Seconds = Field(
        0.5,
        description="Seconds between two syncs of a worker for pushes at least; where its lists take long it is more.",
    )
    labs_history_length: int = Field(
        50, ge=1, le=1000, description="Operations kept per lab; 50 are about 10 KB, an object may have 1 MiB."
    )
    labs_step_interval: Seconds = Field(
        2.0, description="Seconds between two looks at a lab that is being started, stopped, wiped or deleted."
    )
    labs_step_timeout: Seconds = Field(
        600.0,
        description="Seconds after which a state that CML was asked for and did not reach is given up; stopping a "
        "big lab takes minutes.",
    )
    labs_topology_retention: Annotated[float, BeforeValidator(parse_duration)] = Field(
        0.0,
        ge=0,
        le=366 * 24 * 3600,
        description="Seconds for which the topology of a lab that is deleted here is kept as a LabImport, to be "
        "imported again; 0 keeps none, since each takes up to 512 KiB of the store and of every daemon's memory.",
    )
    labs_import_ttl: Seconds = Field(
        3600.0, description="Seconds for which a LabImport stays after its end, where it does not say so itself."
    )
    labs_import_settle: Seconds = Field(
        60.0,
        description="Seconds for which an import without an answer is looked for before it is sent again; CML's front "
        "server gives a request up after as long.",
    )
