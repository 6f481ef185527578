"""What the endpoints of `routes` answer, for the OpenAPI documents."""

from __future__ import annotations

from controllers.instances.kind import LAB_INSTANCE_REQUEST
from lrm.api.operations import Answer, Content, Operation, Parameter

_RESOURCES = f"/apis/{LAB_INSTANCE_REQUEST.api_version}/namespaces/{{namespace}}/{LAB_INSTANCE_REQUEST.plural}"
_LINES = {"type": "integer", "minimum": 0, "maximum": 999_999_999, "default": 1000}


def _log(name: str, path: str, namespace: Parameter) -> Operation:
    return Operation(
        name,
        "get",
        path,
        "What a container has written; a lab on CML has consoles, and no log.",
        {200: Answer("OK; of a container that is gone the last lines.", Content(str, ("text/plain",)))},
        refusals=(504,),
        parameters=(
            Parameter("name", "Of the lab instance."),
            namespace,
            Parameter("tailLines", "The last lines at most.", _LINES),
            Parameter("tail", "Another name of tailLines.", _LINES),
            Parameter("follow", "Go on with what is written.", {"type": "boolean", "default": False}),
        ),
    )


OPERATIONS = (
    _log(
        "readLabInstanceLog",
        "/api/lab-instances/{name}/log",
        Parameter("namespace", "Of the lab instance.", {"type": "string", "default": "default"}),
    ),
    _log(
        "readLabInstanceRequestLog",
        f"{_RESOURCES}/{{name}}/log",
        Parameter("namespace", "Of the lab instance."),
    ),
)
