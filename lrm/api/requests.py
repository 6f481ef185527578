"""What a request's path and query say, checked: which object, which options. Everything wrong is a 4xx that says so."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from aiohttp import web

from lrm.api.call import API, call_of
from lrm.api.selectors import selector_of
from lrm.api.status import About, RequestError, bad_request, not_found
from lrm.errors import Cause
from lrm.fanout import Selector
from lrm.kind import Kind
from lrm.registry import Registry
from lrm.writes import Propagation

_NAME = re.compile(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*")
_NAMESPACE = re.compile(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?")
_COUNT = re.compile(r"[0-9]{1,9}")
_REVISION = re.compile(r"0|[1-9][0-9]{0,18}")
_PROPAGATION: dict[str, Propagation] = {
    "": "",
    "Background": "Background",
    "Foreground": "Foreground",
    "Orphan": "Orphan",
}
_VALIDATION = ("Strict", "Warn", "Ignore")


@dataclass(frozen=True, slots=True)
class Target:
    """What the path names; namespace or name may be empty."""

    kind: Kind[Any]
    namespace: str
    name: str

    @property
    def about(self) -> About:
        return About(self.kind.group, self.kind.plural, self.name, self.namespace)


def target_of(request: web.Request) -> Target:
    """The kind and object of the path; also what errors and the record will be about. Raises 404, 400."""
    info = request.match_info
    registry = request.app[API].registry
    kind = registry.by_plural(info["plural"])
    if kind is None or (kind.group, kind.version) != (info["group"], info["version"]):
        raise not_found()
    namespace, name = info.get("namespace", ""), info.get("name", "")
    if "namespace" in info:
        check_namespace(namespace)
    target = Target(kind, namespace, name)
    if "name" in info and (len(name) > 253 or not _NAME.fullmatch(name)):
        raise RequestError(404, "NotFound", f'{kind.plural}.{kind.group} "{name[:80]}" not found')
    call_of(request).about = target.about
    return target


def check_namespace(namespace: str) -> None:
    """Any DNS label is a namespace. Raises 400."""
    if len(namespace) > 63 or not _NAMESPACE.fullmatch(namespace):
        raise bad_request(f"{namespace[:80]!r} is not a namespace: it must be a DNS-1123 label")


def kind_of(registry: Registry, api_version: Any, name: Any) -> Kind[Any] | None:
    """The kind that a document names, None when it is not known here."""
    kind = registry.by_name(name) if isinstance(name, str) else None
    return kind if kind and kind.api_version == api_version else None


@dataclass(frozen=True, slots=True)
class WriteOptions:
    """The query of a write."""

    dry_run: bool
    field_manager: str
    validation: str
    force: bool


def write_options(request: web.Request) -> WriteOptions:
    """Raises 400, 422."""
    query = request.query
    dry_run = query.getall("dryRun", [])
    if any(value != "All" for value in dry_run):
        raise _invalid("dryRun", "the only value is All")
    validation = query.get("fieldValidation", "") or "Strict"
    if validation not in _VALIDATION:
        raise _invalid("fieldValidation", f"must be one of {', '.join(_VALIDATION)}")
    manager = query.get("fieldManager", "")
    if len(manager) > 128 or not manager.isprintable():
        raise _invalid("fieldManager", "at most 128 printable characters")
    return WriteOptions(bool(dry_run), manager, validation, boolean(request, "force"))


@dataclass(frozen=True, slots=True)
class DeleteOptions:
    """What comes in the body or the query of a DELETE."""

    dry_run: bool
    propagation: Propagation
    uid: str
    resource_version: str


def delete_options(request: web.Request, body: dict[str, Any]) -> DeleteOptions:
    """Raises 400, 422; the query wins over the body where both speak."""
    if body.get("kind", "DeleteOptions") != "DeleteOptions":
        raise bad_request(f"the body of a DELETE is a DeleteOptions, not a {str(body['kind'])[:80]}")
    preconditions = body.get("preconditions") or {}
    if not isinstance(preconditions, dict):
        raise _invalid("preconditions", "must be an object with uid and resourceVersion")
    dry = request.query.getall("dryRun", []) or body.get("dryRun") or []
    if not isinstance(dry, list) or any(value != "All" for value in dry):
        raise _invalid("dryRun", "the only value is All")
    propagation = _propagation(
        request.query.get("propagationPolicy") or body.get("propagationPolicy") or "", body.get("orphanDependents")
    )
    found: dict[str, str] = {}
    for field in ("uid", "resourceVersion"):
        value = preconditions.get(field)
        if value is not None and not isinstance(value, str):
            raise _invalid(f"preconditions.{field}", "must be a text")
        found[field] = value or ""
    return DeleteOptions(bool(dry), propagation, found["uid"], found["resourceVersion"])


def _propagation(policy: object, orphan: object) -> Propagation:
    """The policy; `orphanDependents` is what older clients send in its place."""
    if not isinstance(policy, str) or policy not in _PROPAGATION:
        raise _invalid("propagationPolicy", "must be Background, Foreground or Orphan")
    if orphan is None:
        return _PROPAGATION[policy]
    if policy or not isinstance(orphan, bool):
        raise _invalid("orphanDependents", "must be true or false, and is not given beside propagationPolicy")
    return "Orphan" if orphan else "Background"


@dataclass(frozen=True, slots=True)
class ListQuery:
    """The query of a list or watch."""

    labels: str
    fields: str
    selector: Selector | None
    limit: int
    token: str
    revision: int | None
    """None: as new as now; 0: whatever is there."""
    exact: bool
    watch: bool
    bookmarks: bool
    initial_events: bool | None
    timeout: float | None


def list_query(request: web.Request, kind: Kind[Any] | None) -> ListQuery:
    """Without a kind the selectors are left to the caller. Raises 400, 422."""
    query = request.query
    labels, fields = query.get("labelSelector", ""), query.get("fieldSelector", "")
    revision = _revision(query.get("resourceVersion", ""))
    match = query.get("resourceVersionMatch", "")
    watch = boolean(request, "watch")
    initial = boolean(request, "sendInitialEvents") if "sendInitialEvents" in query else None
    if match not in ("", "Exact", "NotOlderThan"):
        raise _invalid("resourceVersionMatch", "must be Exact or NotOlderThan")
    if match and revision is None and not initial:
        raise _invalid("resourceVersionMatch", "is forbidden unless resourceVersion is given")
    if match == "Exact" and (not revision or watch):
        raise _invalid("resourceVersionMatch", "Exact is for lists at a resourceVersion above 0")
    timeout = _number(query.get("timeoutSeconds", ""), "timeoutSeconds")
    return ListQuery(
        labels=labels,
        fields=fields,
        selector=selector_of(kind, labels, fields) if kind else None,
        limit=_number(query.get("limit", ""), "limit") or 0,
        token=query.get("continue", ""),
        revision=revision,
        exact=match == "Exact",
        watch=watch,
        bookmarks=boolean(request, "allowWatchBookmarks"),
        initial_events=initial,
        timeout=float(timeout) if timeout else None,
    )


def only_parameters(request: web.Request, *names: str) -> None:
    """Raise 400 for a parameter of the query that would be ignored: who sends it means something by it."""
    unknown = sorted(set(request.query) - set(names))
    if unknown:
        raise bad_request(f"{unknown[0][:40]!r} is no parameter here; there are {', '.join(names)}")


def boolean(request: web.Request, name: str) -> bool:
    """A flag of the query; given without a value it is on. Raises 400."""
    if name not in request.query:
        return False
    value = request.query[name].lower()
    if value in ("", "1", "true"):
        return True
    if value in ("0", "false"):
        return False
    raise bad_request(f"{name} must be true or false, not {value[:40]!r}")


def wants_watch(request: web.Request) -> bool:
    """Whether this request will stay open."""
    return request.method in ("GET", "HEAD") and request.query.get("watch", "0").lower() not in ("0", "false")


def _revision(text: str) -> int | None:
    if not text:
        return None
    if not _REVISION.fullmatch(text) or int(text) >= 2**63:
        raise bad_request(f"resourceVersion must be a number that this server gave out, not {text[:40]!r}")
    return int(text)


def _number(text: str, name: str) -> int | None:
    if not text:
        return None
    if not _COUNT.fullmatch(text):
        raise bad_request(f"{name} must be a whole number from 0, not {text[:40]!r}")
    return int(text)


def _invalid(field: str, message: str) -> RequestError:
    return RequestError(422, "Invalid", f"{field}: {message}", causes=[Cause(field, "FieldValueInvalid", message)])
