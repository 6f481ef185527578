"""What the endpoints of `routes` take and answer, for the OpenAPI documents; those of the labs share the words."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from controllers.orders import LONGEST_WAIT
from controllers.workers.addressed import OF_REGION, WORKER
from controllers.workers.flat import FlatWorker
from controllers.workers.phases import Phase
from lrm.api.operations import Answer, Content, Operation, Parameter

REGION = Parameter("region", "Of AWS; a worker of another region is not found.")
OF_WORKER = (
    REGION,
    Parameter("worker", "Its name, or the id of its EC2 instance."),
    Parameter("namespace", "Of the worker.", {"type": "string", "default": "default"}),
)
WAIT = Parameter(
    "wait",
    "Seconds to wait for the outcome; then the answer is 202. To the thousandth.",
    {"type": "number", "minimum": 0, "maximum": LONGEST_WAIT, "default": LONGEST_WAIT},
)
STALE = Parameter("resourceVersion", "0: as the cache has it, without asking the store.")


class Ordered(BaseModel):
    """What became of an order so far."""

    model_config = ConfigDict(extra="allow")

    result: Literal["Succeeded", "Failed", "Superseded", "Waiting", "Accepted"]
    message: str
    resource: str = Field("", description="Where it is told what becomes of it; also in the header Location.")


class OrderedWorker(FlatWorker, Ordered):
    """A worker as it then is, and what became of the order."""

    action: Literal["start", "stop", "drain", "license", "refresh"]


def outcomes(model: Any, done: str, code: int = 200) -> Mapping[int, Answer]:
    """Done, or under way."""
    content = Content(model)
    return {code: Answer(done, content), 202: Answer("It is under way: `resource` tells what becomes of it.", content)}


OPERATIONS = (
    Operation(
        "listWorkers",
        "get",
        OF_REGION,
        "The region's workers, of a namespace or of all; the filters narrow it.",
        {200: Answer("OK", Content(list[FlatWorker]))},
        refusals=(410, 422, 504),
        parameters=(
            REGION,
            Parameter("namespace", "Without one: of all."),
            Parameter("phase", "In which they are, whatever the case.", {"type": "string", "enum": list(Phase)}),
            Parameter("labelSelector", "Such as track=ccna."),
            Parameter("fieldSelector", "Such as spec.labTrack=ccna."),
            STALE,
        ),
    ),
    Operation(
        "readWorker",
        "get",
        WORKER,
        "One worker.",
        {200: Answer("OK", Content(FlatWorker))},
        refusals=(504,),
        parameters=(*OF_WORKER, STALE),
    ),
    Operation(
        "actOnWorker",
        "post",
        f"{WORKER}/{{action}}",
        "start: have it serve; one that failed tries again, one that was stopped for idleness wakes. stop: drain it of "
        "its labs, for spec.drainTimeoutMinutes at most, then stop its instance. drain: drain it and let its instance "
        "run. license: have its CML licensed, with spec.autoLicense. refresh: ask EC2, CloudWatch and CML about it and "
        "sync its labs, and wait for the metrics. What is so already is told at once.",
        outcomes(OrderedWorker, "It is done."),
        refusals=(422,),
        parameters=(
            *OF_WORKER,
            Parameter(
                "action",
                "What is done.",
                {"type": "string", "enum": ["start", "stop", "drain", "license", "refresh"]},
            ),
            WAIT,
        ),
    ),
)
