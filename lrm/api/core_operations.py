"""What lrm's own endpoints below /api are, for the OpenAPI documents: the daemon's state, and Kubernetes' core."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from lrm.api.operations import Answer, Content, Operation, Parameter
from lrm.model import Timestamp

_DOCUMENT = dict[str, Any]
_FLAG = {"type": "boolean"}
_COUNT = {"type": "integer", "minimum": 0}
_NAMESPACE = Parameter("namespace", "A namespace.")


class _Told(BaseModel):
    """Holds at least this."""

    model_config = ConfigDict(extra="allow", use_attribute_docstrings=True)


class Readiness(_Told):
    """Whether requests should come here."""

    ready: bool
    reason: str
    """Why not."""


class DaemonHealth(_Told):
    """What the daemon depends on, each with what is wrong."""

    status: Literal["ok", "degraded", "unhealthy"]


class Leadership(_Told):
    """Every lock, who holds it, and whether that is this daemon."""

    is_leader: bool
    """Whether this daemon holds any."""
    identity: str
    locks: list[dict[str, Any]]


class BookmarksState(_Told):
    """How far each watcher has come; the totals are the one furthest behind."""

    bookmark: int | None
    current_version: int
    lag: int
    watchers: list[dict[str, Any]]


class FinalizersState(_Told):
    """How many objects wait for a finalizer, are being cleaned up by this daemon, and were let go by it so far."""

    pending: int
    processing: int
    completed: int
    controllers: list[dict[str, Any]]


_EVENT: dict[str, Any] = {"group": "", "version": "v1", "kind": "Event"}
_GVK = "x-kubernetes-group-version-kind"


class InvolvedObject(_Told):
    """What an event is about."""

    api_version: str = Field("", alias="apiVersion")
    kind: str = ""
    namespace: str = ""
    name: str = ""
    uid: str = ""
    resource_version: str = Field("", alias="resourceVersion")
    """Of the object when it was last told."""


class ToldEvent(_Told):
    """What happened to an object, told to people; similar ones are counted."""

    model_config = ConfigDict(json_schema_extra={_GVK: [_EVENT]})

    api_version: str = Field(alias="apiVersion")
    kind: str
    metadata: dict[str, Any]
    involved_object: InvolvedObject = Field(alias="involvedObject")
    type: str = ""
    """Normal, or Warning."""
    reason: str = ""
    """What happened, in one word."""
    message: str = ""
    """What happened, for people."""
    count: int = 0
    """How often it happened."""
    first_timestamp: Timestamp | None = Field(None, alias="firstTimestamp")
    last_timestamp: Timestamp | None = Field(None, alias="lastTimestamp")
    source: dict[str, str] = {}
    """Who told it, and on which host."""
    reporting_component: str = Field("", alias="reportingComponent")
    """The controller that told it."""


class ObjectList(_Told):
    """A list as Kubernetes has it."""

    kind: str
    api_version: str = Field(alias="apiVersion")
    items: list[dict[str, Any]]


class EventList(_Told):
    """Events."""

    kind: str
    api_version: str = Field(alias="apiVersion")
    items: list[ToldEvent]


def _get(
    name: str,
    path: str,
    description: str,
    type: Any = _DOCUMENT,  # noqa: A002 - as in Content
    *parameters: Parameter,
    also: dict[int, str] | None = None,
    refusals: tuple[int, ...] = (),
) -> Operation:
    answers = {code: Answer(told, Content(type)) for code, told in {200: "OK", **(also or {})}.items()}
    extensions = {_GVK: _EVENT} if type in (EventList, ToldEvent) else {}
    return Operation(
        name, "get", path, description, answers, refusals=refusals, parameters=parameters, extensions=extensions
    )


_LISTING = (
    Parameter("fieldSelector", "Such as involvedObject.name=ccna-1,type=Warning."),
    Parameter("labelSelector", "Events carry no labels."),
    Parameter("limit", "The most of one answer; `continue` of its metadata goes on.", _COUNT),
    Parameter("continue", "Where the last answer ended."),
    Parameter("resourceVersion", "Of the store's history."),
    Parameter("resourceVersionMatch", "How.", {"type": "string", "enum": ["Exact", "NotOlderThan"]}),
    Parameter("watch", "Stream what changes, one JSON object a line.", _FLAG),
    Parameter("allowWatchBookmarks", "Tell a quiet watch how far it is.", _FLAG),
    Parameter("sendInitialEvents", "Begin a watch with what there is.", _FLAG),
    Parameter("timeoutSeconds", "After which a watch ends.", _COUNT),
)
_HISTORY = (410, 422, 504)

OPERATIONS = (
    _get("getHealth", "/api/status/health", "What the daemon depends on.", DaemonHealth, also={503: "Unhealthy"}),
    _get("getReady", "/api/status/ready", "Whether requests should come here.", Readiness, also={503: "No"}),
    _get("getStatus", "/api/status/status", "What this daemon is, holds and does."),
    _get("getLeader", "/api/status/leader", "Who holds which lock.", Leadership),
    _get("getBookmarks", "/api/status/bookmarks", "How far each watcher has come.", BookmarksState),
    _get("getFinalizers", "/api/status/finalizers", "What waits to be cleaned up.", FinalizersState),
    Operation(
        "getMetrics",
        "get",
        "/api/status/metrics",
        "Measurements for Prometheus: its text format, or OpenMetrics.",
        {200: Answer("OK", Content(str, ("text/plain", "application/openmetrics-text")))},
    ),
    _get("getCoreVersions", "/api", "Discovery: the versions of the core group."),
    _get("getCoreResources", "/api/v1", "Discovery: what the core group has."),
    _get("listNamespaces", "/api/v1/namespaces", "The namespaces in use that the caller may read.", ObjectList),
    _get("readNamespace", "/api/v1/namespaces/{namespace}", "Any DNS label is a namespace.", _DOCUMENT, _NAMESPACE),
    _get("listAllEvents", "/api/v1/events", "What happened.", EventList, *_LISTING, refusals=_HISTORY),
    _get(
        "listEvents",
        "/api/v1/namespaces/{namespace}/events",
        "What happened in a namespace.",
        EventList,
        _NAMESPACE,
        *_LISTING,
        refusals=_HISTORY,
    ),
    _get(
        "readEvent",
        "/api/v1/namespaces/{namespace}/events/{name}",
        "One event.",
        ToldEvent,
        _NAMESPACE,
        Parameter("name", "Of the event."),
    ),
)
