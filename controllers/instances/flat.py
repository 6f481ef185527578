"""A lab instance as course tools post and read it: one flat object, fields in snake_case, phases in capitals.

`NewInstance` says which fields may be posted. Their rules are those of the LabInstanceRequest's spec, by which they are
checked when the resource is made of them: what spec and flat form share is declared there alone.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, create_model

from controllers.instances.kind import LabInstanceRequest, LabInstanceRequestSpec, LabTemplate
from controllers.instances.phases import Phase
from lrm.errors import Cause, Invalid
from lrm.model import Timestamp, rfc3339
from lrm.resource import Condition

PHASES = tuple(phase.upper() for phase in Phase)
_SHARED = {
    flat: LabInstanceRequestSpec.model_fields[flat]
    for flat in ("lab_template", "student_email", "duration_minutes", "scheduled_start_time", "environment")
}
"""The spec's fields that are posted, under their Python names."""
_FLAT = {f"spec.{info.alias}": flat for flat, info in _SHARED.items()} | {"metadata.name": "name"}
_PATH = re.compile(r"\b(?:spec|metadata)\.\w+(?:[.\[]\w+\]?)*")
_FIELDS: dict[str, Any] = {
    flat: (
        str | LabTemplate if flat == "lab_template" else info.rebuild_annotation(),
        ... if info.is_required() else info.get_default(call_default_factory=True),
    )
    for flat, info in _SHARED.items()
}
"""A template may be the text of an image alone."""

NewInstance: type[BaseModel] = create_model(
    "NewInstance",
    __config__=ConfigDict(extra="forbid"),
    __doc__="What is posted for a new lab instance.",
    name=(str, Field("", description="A DNS-1123 subdomain; without one it is given one.")),
    namespace=(str, "default"),
    **_FIELDS,
)


class FlatInstance(BaseModel):
    """A lab instance; what is not known is null."""

    name: str
    namespace: str
    uid: str
    resource_version: str
    created_at: Timestamp | None
    lab_template: str
    runtime: str
    student_email: str
    duration_minutes: int
    scheduled_start_time: Timestamp | None
    environment: dict[str, str]
    phase: str = Field(json_schema_extra={"enum": list(PHASES)})
    worker: str | None
    container_id: str | None
    cml_lab_id: str | None
    access_url: str | None
    started_at: Timestamp | None
    ends_at: Timestamp | None
    completed_at: Timestamp | None
    error_message: str | None
    retry_count: int
    resource_allocation: dict[str, float] | None = Field(description="cpu in cores, memory in bytes, nodes, slots.")
    conditions: list[Condition]


def flat_of(request: LabInstanceRequest) -> dict[str, Any]:
    """A `FlatInstance`."""
    meta, spec, status = request.metadata, request.spec, request.status
    template, need = spec.lab_template, status.need
    return {
        "name": meta.name,
        "namespace": meta.namespace,
        "uid": meta.uid,
        "resource_version": meta.resource_version,
        "created_at": _time(meta.creation_timestamp),
        "lab_template": template.image or template.topology_file or template.topology_url or "inline",
        "runtime": spec.runs_in,
        "student_email": spec.student_email,
        "duration_minutes": spec.duration_minutes,
        "scheduled_start_time": _time(spec.scheduled_start_time),
        "environment": dict(spec.environment),
        "phase": status.phase.upper(),
        "worker": status.worker_ref.name if status.worker_ref else None,
        "container_id": status.container_id,
        "cml_lab_id": status.cml_lab_id,
        "access_url": status.access_url,
        "started_at": _time(status.started_at),
        "ends_at": _time(request.ends_at),
        "completed_at": _time(status.completed_at),
        "error_message": status.error_message,
        "retry_count": status.retry_count,
        "resource_allocation": need.wire() if need is not None else None,
        "conditions": [c.wire() for c in status.conditions],
    }


def document_of(body: Mapping[str, Any], namespace: str) -> dict[str, Any]:
    """The resource that a posted body means. Raises `Invalid` for fields that `NewInstance` does not have."""
    strangers = sorted(set(body) - set(NewInstance.model_fields))
    if strangers:
        raise Invalid("lab instance", [Cause(f, "FieldValueInvalid", f'unknown field "{f}"') for f in strangers])
    metadata: dict[str, Any] = {"namespace": namespace}
    metadata |= {"name": body["name"]} if body.get("name") else {"generateName": "lab-"}
    spec = {info.alias: body[flat] for flat, info in _SHARED.items() if body.get(flat) is not None}
    return {"metadata": metadata, "spec": spec}


def flat_path(path: str, body: Mapping[str, Any]) -> str:
    """A field of the resource under the name that it has in a posted body, where it has one."""
    for wire, flat in _FLAT.items():
        if path == wire or path.startswith((f"{wire}.", f"{wire}[")):
            return flat if isinstance(body.get(flat), str) else flat + path[len(wire) :]
    return path


def flat_text(text: str, body: Mapping[str, Any]) -> str:
    """What is told of a resource, with its fields under the names that they have in a posted body."""
    return _PATH.sub(lambda match: flat_path(match[0], body), text)


def _time(value: Any) -> str | None:
    return rfc3339(value) if value is not None else None
