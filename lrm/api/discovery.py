"""What there is to ask for, in the forms that Kubernetes clients know: groups, versions, resources and their verbs."""

from __future__ import annotations

import platform
from collections.abc import Iterable
from importlib.metadata import version
from typing import Any

from lrm.kind import Kind
from lrm.registry import Registry

KUBERNETES = ("1", "32")
"""The Kubernetes version whose API conventions are followed; clients choose their behaviour by it."""
_VERBS = ("create", "delete", "get", "list", "patch", "update", "watch")
_READ_VERBS = ("get", "list")
_EVENT_VERBS = ("get", "list", "watch")
_STATUS_VERBS = _SCALE_VERBS = ("get", "patch", "update")
SCALE = {"group": "autoscaling", "version": "v1", "kind": "Scale"}
"""What the subresource `scale` speaks, of whatever kind it is."""


def version_info() -> dict[str, str]:
    """The answer of /version."""
    major, minor = KUBERNETES
    return {
        "major": major,
        "minor": minor,
        "gitVersion": f"v{major}.{minor}.0-lrm.{version('lrm')}",
        "gitCommit": "",
        "gitTreeState": "",
        "buildDate": "1970-01-01T00:00:00Z",
        "goVersion": "none",
        "compiler": platform.python_implementation().lower(),
        "platform": f"{platform.system().lower()}/{platform.machine()}",
        "lrmVersion": version("lrm"),
    }


def core_versions(host: str) -> dict[str, Any]:
    """/api."""
    return {
        "kind": "APIVersions",
        "versions": ["v1"],
        "serverAddressByClientCIDRs": [{"clientCIDR": "0.0.0.0/0", "serverAddress": host}],
    }


def core_resources() -> dict[str, Any]:
    """/api/v1: namespaces and events; clients take an empty list for a broken server."""
    namespaces = _resource("namespaces", "namespace", "Namespace", _READ_VERBS, ("ns",), namespaced=False)
    events = _resource("events", "event", "Event", _EVENT_VERBS, ("ev",), namespaced=True)
    return _resource_list("v1", [namespaces, events])


def group_versions(registry: Registry) -> dict[str, list[str]]:
    """Group → its versions, in order of appearance."""
    groups: dict[str, list[str]] = {}
    for kind in registry:
        versions = groups.setdefault(kind.group, [])
        if kind.version not in versions:
            versions.append(kind.version)
    return groups


def group_list(registry: Registry) -> dict[str, Any]:
    """/apis."""
    groups = [_group(group, versions) for group, versions in group_versions(registry).items()]
    return {"kind": "APIGroupList", "apiVersion": "v1", "groups": groups}


def group(registry: Registry, name: str) -> dict[str, Any] | None:
    """/apis/GROUP."""
    versions = group_versions(registry).get(name)
    return {"kind": "APIGroup", "apiVersion": "v1", **_group(name, versions)} if versions else None


def resources(registry: Registry, name: str, in_version: str) -> dict[str, Any] | None:
    """/apis/GROUP/VERSION."""
    kinds = [k for k in registry if (k.group, k.version) == (name, in_version)]
    if not kinds:
        return None
    found: list[dict[str, Any]] = []
    for kind in kinds:
        verbs = _verbs(kind)
        found.append(_resource(kind.plural, kind.singular, kind.name, verbs, kind.short_names, kind.categories))
        found.append(_resource(f"{kind.plural}/status", "", kind.name, _STATUS_VERBS))
        if kind.scale is not None:
            found.append({**_resource(f"{kind.plural}/scale", "", "", _SCALE_VERBS), **SCALE})
    return _resource_list(f"{name}/{in_version}", found)


def aggregated_core(form: str) -> dict[str, Any]:
    """/api in one answer."""
    found = [
        _aggregated("namespaces", "namespace", "", "v1", "Namespace", _READ_VERBS, ("ns",), scope="Cluster"),
        _aggregated("events", "event", "", "v1", "Event", _EVENT_VERBS, ("ev",)),
    ]
    versions = [{"version": "v1", "resources": found, "freshness": "Current"}]
    return _aggregated_list(form, [{"metadata": {"creationTimestamp": None}, "versions": versions}])


def aggregated_groups(registry: Registry, form: str) -> dict[str, Any]:
    """/apis in one answer."""
    items = [
        {
            "metadata": {"name": name, "creationTimestamp": None},
            "versions": [
                {
                    "version": v,
                    "resources": [_aggregated_kind(k) for k in registry if (k.group, k.version) == (name, v)],
                    "freshness": "Current",
                }
                for v in versions
            ],
        }
        for name, versions in group_versions(registry).items()
    ]
    return _aggregated_list(form, items)


def _verbs(kind: Kind[Any]) -> tuple[str, ...]:
    return tuple(v for v in _VERBS if v != "create" or not kind.create_refusal)


def _group(name: str, versions: Iterable[str]) -> dict[str, Any]:
    listed = [{"groupVersion": f"{name}/{v}", "version": v} for v in versions]
    return {"name": name, "versions": listed, "preferredVersion": listed[0]}


def _resource_list(group_version: str, found: list[dict[str, Any]]) -> dict[str, Any]:
    return {"kind": "APIResourceList", "apiVersion": "v1", "groupVersion": group_version, "resources": found}


def _resource(  # noqa: PLR0917 - the columns of a table
    name: str,
    singular: str,
    kind: str,
    verbs: Iterable[str],
    short: Iterable[str] = (),
    categories: Iterable[str] = (),
    *,
    namespaced: bool = True,
) -> dict[str, Any]:
    found: dict[str, Any] = {
        "name": name,
        "singularName": singular,
        "namespaced": namespaced,
        "kind": kind,
        "verbs": list(verbs),
    }
    if short:
        found["shortNames"] = list(short)
    if categories:
        found["categories"] = list(categories)
    return found


def _aggregated_kind(kind: Kind[Any]) -> dict[str, Any]:
    found = _aggregated(
        kind.plural, kind.singular, kind.group, kind.version, kind.name, _verbs(kind), kind.short_names, kind.categories
    )
    response = {"group": kind.group, "version": kind.version, "kind": kind.name}
    found["subresources"] = [{"subresource": "status", "responseKind": response, "verbs": list(_STATUS_VERBS)}]
    if kind.scale is not None:
        found["subresources"].append({"subresource": "scale", "responseKind": SCALE, "verbs": list(_SCALE_VERBS)})
    return found


def _aggregated(  # noqa: PLR0917 - the columns of a table
    plural: str,
    singular: str,
    group_name: str,
    in_version: str,
    kind: str,
    verbs: Iterable[str],
    short: Iterable[str] = (),
    categories: Iterable[str] = (),
    *,
    scope: str = "Namespaced",
) -> dict[str, Any]:
    return {
        "resource": plural,
        "responseKind": {"group": group_name, "version": in_version, "kind": kind},
        "scope": scope,
        "singularResource": singular,
        "verbs": list(verbs),
        "shortNames": list(short),
        "categories": list(categories),
    }


def _aggregated_list(form: str, items: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "kind": "APIGroupDiscoveryList",
        "apiVersion": f"apidiscovery.k8s.io/{form}",
        "metadata": {},
        "items": items,
    }
