"""From a request to a handler and back: the route table, strict reading of input, and CML's error shapes.

Promises: handlers are plain functions from `Call` to `Reply`; they never wait, so each is atomic against all others.
A refused body, query or id is a 400 whose description holds `Input validation failed` as a JSON string; every other
refusal is `{"code", "description"}`. An endpoint that CML has and this simulator does not is a 501, so that nobody
takes silence for agreement. HTTP itself is the server's business.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar
from urllib.parse import unquote

import orjson
from pydantic import BaseModel, ValidationError

from controllers.cml.simulator.accounts import User
from controllers.cml.simulator.bodies import UUID4
from controllers.cml.simulator.labs import Interface, Lab, Link, Node
from controllers.cml.simulator.machine import Machine

B = TypeVar("B", bound=BaseModel)
_ID = re.compile(UUID4)
Access = Literal["anyone", "user", "admin"]
_TRUE, _FALSE = frozenset({"true", "1", "yes", "on", "t", "y"}), frozenset({"false", "0", "no", "off", "f", "n"})


@dataclass(frozen=True, slots=True)
class Reply:
    """An answer."""

    status: int
    body: bytes = b""
    content_type: str = "application/json"


class RefusalError(Exception):
    """A request that is not carried out."""

    def __init__(self, status: int, description: str) -> None:
        super().__init__(description)
        self.status = status
        self.description = description

    def reply(self) -> Reply:
        return Reply(self.status, orjson.dumps({"code": self.status, "description": self.description}))


class InvalidInputError(RefusalError):
    """Input that does not fit the document."""

    def __init__(self, problems: Iterable[tuple[list[str | int], str, str]]) -> None:
        listed = [{"location": where, "type": kind, "message": message} for where, kind, message in problems]
        super().__init__(400, orjson.dumps({"Input validation failed": listed}).decode())


@dataclass(slots=True)
class Call:
    """One request to one machine."""

    machine: Machine
    method: str
    path: str
    query: Mapping[str, str]
    raw: bytes = b""
    content_type: str = ""
    token: str = ""
    found_user: User | None = None
    params: dict[str, str] = field(default_factory=dict)

    @property
    def user(self) -> User:
        if self.found_user is None:
            raise RefusalError(401, "Authentication required.")
        return self.found_user

    @property
    def admin(self) -> bool:
        return self.machine.admin_rights(self.user)

    def body(self, model: type[B]) -> B:
        """The JSON body, strictly as the model says."""
        if self.content_type and "json" not in self.content_type:
            raise InvalidInputError([(["body"], "content_type", "Input should be application/json")])
        try:
            value = orjson.loads(self.raw)
        except orjson.JSONDecodeError as e:
            raise InvalidInputError([(["body", e.pos], "json_invalid", "JSON decode error")]) from None
        return checked(model, value)

    def optional_body(self, model: type[B]) -> B:
        return self.body(model) if self.raw.strip() else checked(model, {})

    def flag(self, name: str, default: bool | None = False) -> bool | None:
        """A boolean of the query; an empty one is the default, as `null` is."""
        text = self.query.get(name, "").lower()
        if text in ("", "null", "none"):
            return default
        if text in _TRUE or text in _FALSE:
            return text in _TRUE
        raise InvalidInputError([(["query", name], "bool_parsing", "Input should be a valid boolean")])

    def rights(self, lab: Lab) -> list[str]:
        """What this session may do with a lab, the most first."""
        return self.machine.rights(self.user, lab)

    def lab(self, permission: str = "lab_view") -> Lab:
        """The lab of the path. One that the session may not see does not exist for it."""
        lab_id = self.params["lab_id"]
        lab = self.machine.labs.get(lab_id)
        rights = self.rights(lab) if lab else []
        if lab is None or not rights:
            raise RefusalError(404, f"Lab not found: {lab_id}")
        if permission not in rights:
            raise RefusalError(403, f"Permission {permission} on lab {lab_id} is required.")
        return lab

    def node(self, lab: Lab, missing: int = 404) -> Node:
        node_id = self.params["node_id"]
        if node_id not in lab.nodes:
            raise RefusalError(missing, f"Node not found: {node_id}")
        return lab.nodes[node_id]

    def link(self, lab: Lab) -> Link:
        link_id = self.params["link_id"]
        if link_id not in lab.links:
            raise RefusalError(404, f"Link not found: {link_id}")
        return lab.links[link_id]

    def interface(self, lab: Lab, missing: int = 404) -> Interface:
        interface = lab.interface(self.params["interface_id"])
        if interface is None:
            raise RefusalError(missing, f"Interface not found: {self.params['interface_id']}")
        return interface

    def check_access(self, access: Access) -> None:
        """Whether the session reaches far enough for the operation."""
        if access != "anyone" and self.found_user is None:
            raise RefusalError(401, "Authentication required: the token is missing, wrong or expired.")
        if access == "admin":
            self.require_admin()

    def require_admin(self) -> None:
        if not self.admin:
            raise RefusalError(403, "Access is denied: administrator rights are required.")


Handler = Callable[[Call], Reply]


@dataclass(frozen=True, slots=True)
class Route:
    """One operation; `{name}` segments become parameters, and those ending in `_id` must be UUIDs."""

    method: str
    template: str
    handler: Handler
    access: Access = "user"
    since: tuple[int, int] = (0, 0)


class RouteTable:
    """Finds the route of a request."""

    def __init__(self, routes: Iterable[Route], unsimulated: Iterable[tuple[str, str]]) -> None:
        self._by_length: dict[int, list[tuple[tuple[str, ...], dict[str, Route]]]] = {}
        self.routes = tuple(routes)
        for route in self.routes:
            self._methods(route.template).setdefault(route.method, route)
        for method, template in unsimulated:
            self._methods(template).setdefault(method, Route(method, template, _not_simulated))
        for candidates in self._by_length.values():
            candidates.sort(key=lambda c: sum(s.startswith("{") for s in c[0]))

    def _methods(self, template: str) -> dict[str, Route]:
        segments = tuple(template.strip("/").split("/"))
        candidates = self._by_length.setdefault(len(segments), [])
        for known, methods in candidates:
            if known == segments:
                return methods
        methods = {}
        candidates.append((segments, methods))
        return methods

    def find(self, method: str, path: str, release: tuple[int, int]) -> tuple[Route, dict[str, str]]:
        """The route and the parameters of its path. Raises a 404, a 405 or a 400 refusal."""
        segments = path.strip("/").split("/")
        seen = False
        for pattern, methods in self._by_length.get(len(segments), ()):
            params = _matched(pattern, segments)
            if params is None:
                continue
            route = methods.get(method)
            if route is not None and release >= route.since:
                return route, params
            seen = seen or any(release >= r.since for r in methods.values())
        raise RefusalError(405, "Method Not Allowed") if seen else RefusalError(404, "Not Found")


def check_ids(params: Mapping[str, str]) -> None:
    """Ids that cannot be ids are invalid input, not missing things."""
    wrong = [name for name, value in params.items() if name.endswith("_id") and not _ID.match(value)]
    if wrong:
        raise InvalidInputError(
            (["path", name], "string_pattern_mismatch", f"String should match pattern '{UUID4}'") for name in wrong
        )


def checked(model: type[B], value: Any) -> B:
    """A value as that model, or a refusal that names each problem."""
    try:
        return model.model_validate(value)
    except ValidationError as e:
        raise InvalidInputError((["body", *p["loc"]], p["type"], p["msg"]) for p in e.errors()) from None


def ok(value: Any, status: int = 200) -> Reply:
    return Reply(status, orjson.dumps(value))


def done() -> Reply:
    """Carried out, nothing to say."""
    return Reply(204)


def _matched(pattern: tuple[str, ...], segments: list[str]) -> dict[str, str] | None:
    params: dict[str, str] = {}
    for expected, given in zip(pattern, segments, strict=True):
        if expected.startswith("{"):
            params[expected[1:-1]] = unquote(given)
        elif expected != given:
            return None
    return params


def _not_simulated(call: Call) -> Reply:
    raise RefusalError(501, f"{call.method} {call.path} exists in CML and is not simulated.")
