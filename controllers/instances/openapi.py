"""What the endpoints of `routes` take and answer, for the OpenAPI documents."""

from __future__ import annotations

from controllers.instances.flat import PHASES, FlatInstance, NewInstance
from controllers.instances.routes import PATH
from lrm.api.operations import Answer, Content, Operation, Parameter

_NAMESPACE = Parameter("namespace", "Of the lab instance.", {"type": "string", "default": "default"})
_NAME = Parameter("name", "Of the lab instance.")
_ONE = Content(FlatInstance)
_DRY_RUN = Parameter("dryRun", "Only say what would come of it.", {"type": "string", "enum": ["All"]})
_PROPAGATION = Parameter(
    "propagationPolicy",
    "What becomes of its dependants.",
    {"type": "string", "enum": ["Background", "Foreground", "Orphan"]},
)

OPERATIONS = (
    Operation(
        "createLabInstance",
        "post",
        f"{PATH}/",
        "A new lab instance.",
        {201: Answer("It was taken.", _ONE)},
        parameters=(
            Parameter("namespace", "For a body that names none; one that names another is refused."),
            _DRY_RUN,
            Parameter("fieldManager", "Who writes it.", {"type": "string", "maxLength": 128}),
        ),
        body=Content(NewInstance),
    ),
    Operation(
        "listLabInstances",
        "get",
        f"{PATH}/",
        "All of a namespace, or of all; the filters narrow it.",
        {200: Answer("OK", Content(list[FlatInstance]))},
        refusals=(410, 422, 504),
        parameters=(
            Parameter("namespace", "Without one: of all."),
            Parameter("phase", "In which they are, whatever the case.", {"type": "string", "enum": list(PHASES)}),
            Parameter("student_email", "Whose they are, whatever the case."),
            Parameter("labelSelector", "Such as track=ccna."),
            Parameter("fieldSelector", "Such as status.phase=Running."),
            Parameter("resourceVersion", "0: as the cache has it, without asking the store."),
        ),
    ),
    Operation(
        "readLabInstance",
        "get",
        f"{PATH}/{{name}}",
        "One lab instance.",
        {200: Answer("OK", _ONE)},
        refusals=(504,),
        parameters=(_NAME, _NAMESPACE),
    ),
    Operation(
        "deleteLabInstance",
        "delete",
        f"{PATH}/{{name}}",
        "End it, clean up after it and forget it. A body is DeleteOptions, as for the resource: preconditions, dryRun.",
        {200: Answer("It is gone: its last state.", _ONE), 202: Answer("It is being cleaned up.", _ONE)},
        refusals=(408, 413, 415, 422),
        parameters=(_NAME, _NAMESPACE, _DRY_RUN, _PROPAGATION),
    ),
)
