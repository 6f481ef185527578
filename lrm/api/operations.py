"""What an endpoint takes and answers, as data: a plug-in brings it beside its routes, and OpenAPI documents are made
of it.

Bodies and answers are given as pydantic types, so that the model which a handler goes by is the one that is described.
What every endpoint may answer (no token, no right, too many requests, a defect) need not be said of each.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Method = Literal["get", "post", "put", "patch", "delete"]

OBJECTS = ("application/json", "application/yaml")
"""What bodies and answers are written in, unless something else is said."""
_TEXT: Mapping[str, Any] = {"type": "string"}


@dataclass(frozen=True, slots=True)
class Parameter:
    """One of the path or of the query: the path's are those that it names in braces."""

    name: str
    description: str
    schema: Mapping[str, Any] = field(default_factory=lambda: _TEXT)
    """OpenAPI 3.0's."""


@dataclass(frozen=True, slots=True)
class Content:
    """A body, of a request or of an answer."""

    type: Any
    """A pydantic model, or any type that pydantic has a schema for."""
    media: tuple[str, ...] = OBJECTS


@dataclass(frozen=True, slots=True)
class Answer:
    """What is told where it worked."""

    description: str
    content: Content | None = None


@dataclass(frozen=True, slots=True)
class Operation:
    """One method of one path."""

    name: str
    """Unique among all; what generated clients call it."""
    method: Method
    path: str
    """As the router has it, its parameters in braces and without their patterns."""
    description: str
    answers: Mapping[int, Answer]
    refusals: tuple[int, ...] = ()
    """Codes of the errors that are this one's; each is answered with a `Status`."""
    parameters: tuple[Parameter, ...] = ()
    body: Content | None = None
    extensions: Mapping[str, Any] = field(default_factory=dict)
    """OpenAPI's x-…, as kubectl looks for them."""

    @property
    def document(self) -> str:
        """The document that holds it, as Kubernetes cuts them: api/v1, apis/GROUP/VERSION, api/lab-instances."""
        parts = self.path.strip("/").split("/")
        return "/".join(parts[: 3 if parts[0] == "apis" else 2])
