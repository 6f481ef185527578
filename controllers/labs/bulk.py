"""The body of a bulk order: one action on many labs. What is lost for good is asked for by name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, ValidationInfo, field_validator

from lrm.errors import Cause, Invalid

BULK_MOST = 500
"""Labs that one bulk order names; all of a worker's may be more."""
_ACTIONS = "must be start, stop, wipe or delete"
_LABS = f"must be a list of 1 to {BULK_MOST} different ids of labs, or all to start or stop them"


def _each_once(value: Any) -> Any:
    texts = isinstance(value, list) and all(isinstance(one, str) for one in value)
    return list(dict.fromkeys(value)) if texts else value


class BulkOrder(BaseModel):
    """One action on many labs of a worker."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    action: Literal["start", "stop", "wipe", "delete"]
    labs: (
        Annotated[list[str], BeforeValidator(_each_once), Field(min_length=1, max_length=BULK_MOST)] | Literal["all"]
    ) = Field(description="Their ids, or all to start or stop every lab that the worker has.")

    @field_validator("labs")
    @classmethod
    def _by_name(cls, value: list[str] | Literal["all"], info: ValidationInfo) -> list[str] | Literal["all"]:
        if value == "all" and info.data.get("action") in ("wipe", "delete"):
            raise ValueError(_LABS)
        return value


def bulk_order(body: Mapping[str, Any]) -> BulkOrder:
    """Raises `Invalid`, with one cause for each field."""
    try:
        return BulkOrder.model_validate(body)
    except ValidationError as error:
        told = {"action": _ACTIONS, "labs": _LABS}
        fields = dict.fromkeys(str(found["loc"][0]) for found in error.errors())
        unknown = "is not known: there are action and labs"
        raise Invalid("bulk order", [Cause(f, "FieldValueInvalid", told.get(f, unknown)) for f in fields]) from error
