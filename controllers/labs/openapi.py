"""What the endpoints of `routes` take and answer, for the OpenAPI documents."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, Field

from controllers.labs.bulk import BulkOrder
from controllers.labs.imports_kind import TITLE_MOST
from controllers.workers.addressed import WORKER, WORKERS
from controllers.workers.openapi import OF_WORKER, REGION, STALE, WAIT, Ordered, outcomes
from lrm.api.operations import Answer, Content, Operation, Parameter
from lrm.model import Timestamp

_LABS = f"{WORKER}/labs"

_LAB = Parameter("lab", "The lab's id in CML.", {"type": "string", "format": "uuid"})


class FlatLab(BaseModel):
    """A lab as it was at the last sync."""

    id: str
    title: str
    description: str
    notes: str
    state: str = Field(description="CML's word, or Missing: the last list of CML lacked it.")
    owner: str
    owner_username: str
    node_count: int | None
    link_count: int | None
    groups: list[str]
    created: Timestamp | None
    modified: Timestamp | None
    last_synced: Timestamp | None


class Refreshed(Ordered):
    """What a sync came to; the counts only of one that succeeded."""

    worker: str
    last_synced: Timestamp | None = None
    synced: int = Field(0, description="Labs that CML listed.")
    created: int = 0
    updated: int = 0
    removed: int = 0
    missing: int = Field(0, description="Records whose labs were not listed, and not yet proven gone.")


class Operated(Ordered):
    """What was done to a lab."""

    lab_id: str
    action: Literal["start", "stop", "wipe", "delete"]


class ImportedLab(Ordered):
    """A lab that was made of a topology."""

    lab_id: str | None
    title: str
    warnings: list[str]
    import_: str = Field(alias="import", description="The LabImport that tells.")


class LabResult(Ordered):
    """Of one lab."""

    lab_id: str


class BulkResults(BaseModel):
    """A result for each lab."""

    action: str
    results: list[LabResult]


class WorkerResult(Ordered):
    """Of one worker."""

    worker: str
    namespace: str


class RefreshResults(BaseModel):
    """A result for each worker."""

    action: Literal["refresh"]
    results: list[WorkerResult]


_MANY = {
    202: Answer("Each was taken.", Content(RefreshResults)),
    207: Answer("Some were not taken: see their results.", Content(RefreshResults)),
}

OPERATIONS = (
    Operation(
        "listLabs",
        "get",
        _LABS,
        "The labs as they were at the last sync; the header Age has the seconds since.",
        {200: Answer("OK", Content(list[FlatLab]))},
        refusals=(504,),
        parameters=(*OF_WORKER, STALE),
    ),
    Operation(
        "refreshLabs",
        "post",
        f"{_LABS}/refresh",
        "Sync the worker's labs now.",
        outcomes(Refreshed, "They were synced."),
        parameters=(*OF_WORKER, WAIT),
    ),
    Operation(
        "importLab",
        "post",
        f"{_LABS}/import",
        "Make a lab of a topology, at most 512 KiB. Who gives a name may ask again: 409 says that it was taken.",
        outcomes(ImportedLab, "It was made.", 201),
        parameters=(
            *OF_WORKER,
            WAIT,
            Parameter("title", "Instead of the topology's.", {"type": "string", "maxLength": TITLE_MOST}),
            Parameter("name", "Of the LabImport."),
        ),
        body=Content(dict[str, Any]),
    ),
    Operation(
        "bulkLabs",
        "post",
        f"{_LABS}/bulk",
        "One action on many labs.",
        {
            200: Answer("All were done.", Content(BulkResults)),
            202: Answer("Some are under way.", Content(BulkResults)),
            207: Answer("Some failed: see their results.", Content(BulkResults)),
        },
        parameters=(*OF_WORKER, WAIT),
        body=Content(BulkOrder),
    ),
    Operation(
        "operateLab",
        "post",
        f"{_LABS}/{{lab}}/{{action}}",
        "Start, stop or wipe a lab.",
        outcomes(Operated, "It was done."),
        parameters=(
            *OF_WORKER,
            _LAB,
            Parameter("action", "What is done.", {"type": "string", "enum": ["start", "stop", "wipe"]}),
            WAIT,
        ),
    ),
    Operation(
        "deleteLab",
        "delete",
        f"{_LABS}/{{lab}}",
        "Stop, wipe and delete a lab.",
        outcomes(Operated, "It is gone."),
        parameters=(*OF_WORKER, _LAB, WAIT),
    ),
    Operation(
        "downloadLab",
        "get",
        f"{_LABS}/{{lab}}/download",
        "A lab's topology, read from CML here and now.",
        {200: Answer("OK", Content(str, ("application/yaml",)))},
        refusals=(502, 504),
        parameters=(*OF_WORKER, _LAB, STALE),
    ),
    Operation(
        "refreshAllLabs",
        "post",
        f"{WORKERS}/labs/refresh",
        "Sync the labs of all workers.",
        _MANY,
        parameters=(Parameter("namespace", "Of the workers; without one each that the caller may write in."),),
    ),
    Operation(
        "refreshLabsOfRegion",
        "post",
        f"{WORKERS}/region/{{region}}/labs/refresh",
        "Sync the labs of a region's workers.",
        _MANY,
        parameters=(REGION, Parameter("namespace", "Of the workers; without one each that the caller may write in.")),
    ),
)
