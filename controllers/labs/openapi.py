"""What the endpoints of `routes` take and answer, for the OpenAPI documents."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from controllers.labs.bulk import BulkOrder
from controllers.labs.imports_kind import TITLE_MOST
from controllers.orders import LONGEST_WAIT
from lrm.api.operations import Answer, Content, Operation, Parameter
from lrm.model import Timestamp

_WORKERS = "/api/v1/workers"
_LABS = f"{_WORKERS}/region/{{region}}/workers/{{worker}}/labs"

_REGION = Parameter("region", "Of AWS; a worker of another region is not found.")
_NAMESPACE = Parameter("namespace", "Of the worker.", {"type": "string", "default": "default"})
_WORKER = (_REGION, Parameter("worker", "Its name, or the id of its EC2 instance."), _NAMESPACE)
_WAIT = Parameter(
    "wait",
    "Seconds to wait for the outcome; then the answer is 202. To the thousandth.",
    {"type": "number", "minimum": 0, "maximum": LONGEST_WAIT, "default": LONGEST_WAIT},
)
_LAB = Parameter("lab", "The lab's id in CML.", {"type": "string", "format": "uuid"})
_STALE = Parameter("resourceVersion", "0: as the cache has it, without asking the store.")


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


class Ordered(BaseModel):
    """What became of an order so far."""

    model_config = ConfigDict(extra="allow")

    result: Literal["Succeeded", "Failed", "Superseded", "Waiting", "Accepted"]
    message: str
    resource: str = Field("", description="Where it is told what becomes of it; also in the header Location.")


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


def _outcomes(model: Any, done: str, code: int = 200) -> Mapping[int, Answer]:
    content = Content(model)
    return {code: Answer(done, content), 202: Answer("It is under way: `resource` tells what becomes of it.", content)}


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
        parameters=(*_WORKER, _STALE),
    ),
    Operation(
        "refreshLabs",
        "post",
        f"{_LABS}/refresh",
        "Sync the worker's labs now.",
        _outcomes(Refreshed, "They were synced."),
        parameters=(*_WORKER, _WAIT),
    ),
    Operation(
        "importLab",
        "post",
        f"{_LABS}/import",
        "Make a lab of a topology, at most 512 KiB. Who gives a name may ask again: 409 says that it was taken.",
        _outcomes(ImportedLab, "It was made.", 201),
        parameters=(
            *_WORKER,
            _WAIT,
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
        parameters=(*_WORKER, _WAIT),
        body=Content(BulkOrder),
    ),
    Operation(
        "operateLab",
        "post",
        f"{_LABS}/{{lab}}/{{action}}",
        "Start, stop or wipe a lab.",
        _outcomes(Operated, "It was done."),
        parameters=(
            *_WORKER,
            _LAB,
            Parameter("action", "What is done.", {"type": "string", "enum": ["start", "stop", "wipe"]}),
            _WAIT,
        ),
    ),
    Operation(
        "deleteLab",
        "delete",
        f"{_LABS}/{{lab}}",
        "Stop, wipe and delete a lab.",
        _outcomes(Operated, "It is gone."),
        parameters=(*_WORKER, _LAB, _WAIT),
    ),
    Operation(
        "downloadLab",
        "get",
        f"{_LABS}/{{lab}}/download",
        "A lab's topology, read from CML here and now.",
        {200: Answer("OK", Content(str, ("application/yaml",)))},
        refusals=(502, 504),
        parameters=(*_WORKER, _LAB, _STALE),
    ),
    Operation(
        "refreshAllLabs",
        "post",
        f"{_WORKERS}/labs/refresh",
        "Sync the labs of all workers.",
        _MANY,
        parameters=(Parameter("namespace", "Of the workers; without one each that the caller may write in."),),
    ),
    Operation(
        "refreshLabsOfRegion",
        "post",
        f"{_WORKERS}/region/{{region}}/labs/refresh",
        "Sync the labs of a region's workers.",
        _MANY,
        parameters=(_REGION, Parameter("namespace", "Of the workers; without one each that the caller may write in.")),
    ),
)
