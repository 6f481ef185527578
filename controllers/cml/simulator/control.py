"""The control surface `/_sim/…`, which is no part of CML: what a CML user, a cloud or bad luck does behind lrm's back.

    GET    /_sim/instances                        GET | PATCH | DELETE /_sim/instances/{name}
    POST   /_sim/instances/{name}/reboot          POST /_sim/instances/{name}/expire-tokens
    GET    /_sim/instances/{name}/requests        (total, counts, the last 200)         DELETE resets them
    POST   /_sim/instances/{name}/labs            {title, count, nodes, running, owner, description, notes}
    PATCH | DELETE /_sim/instances/{name}/labs/{lab}       {title, description, notes, state}, past every rule
    GET    /_sim/counters                         GET | POST | DELETE /_sim/faults        DELETE /_sim/faults/{id}

PATCH of an instance takes {powered, cpu_percent, memory_percent}. Naming an instance makes it, except for reading.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Annotated, Any, Literal, TypeVar

import orjson
from aiohttp import web
from pydantic import Field

from controllers.cml.simulator.bodies import Body, Description, Notes, Title
from controllers.cml.simulator.faults import Kind
from controllers.cml.simulator.fleet import Fleet, TooManyMachinesError
from controllers.cml.simulator.labs import Lab
from controllers.cml.simulator.machine import Machine
from controllers.cml.simulator.routing import RefusalError, checked
from controllers.cml.simulator.views import lab_document

B = TypeVar("B", bound=Body)
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class _InstancePatch(Body):
    powered: bool | None = None
    cpu_percent: Annotated[float, Field(ge=0, le=100)] | None = None
    memory_percent: Annotated[float, Field(ge=0, le=100)] | None = None


class _NewLabs(Body):
    title: Title = "Lab"
    count: Annotated[int, Field(ge=1, le=10_000)] = 1
    nodes: Annotated[int, Field(ge=0, le=1000)] = 0
    running: bool = False
    owner: str | None = None
    """A user name."""
    description: Description = ""
    notes: Notes = ""


class _LabPatch(Body):
    title: Title | None = None
    description: Description | None = None
    notes: Notes | None = None
    state: Literal["DEFINED_ON_CORE", "STOPPED", "STARTED"] | None = None


class _NewFault(Body):
    kind: Kind
    instance: str = "*"
    method: str = "*"
    path: str = "*"
    times: Annotated[int, Field(ge=1)] | None = None
    status: Annotated[int, Field(ge=200, le=599)] = 500
    description: str = ""
    seconds: Annotated[float, Field(ge=0, le=3600)] = 0.0
    product_uuid: str = ""


class Control:
    """Handlers of the control surface."""

    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet

    def routes(self) -> list[web.RouteDef]:
        one, lab = "/_sim/instances/{name}", "/_sim/instances/{name}/labs/{lab}"
        table: list[tuple[str, str, Handler]] = [
            ("GET", "/_sim/instances", self._list),
            ("GET", one, self._show),
            ("PATCH", one, self._change),
            ("DELETE", one, self._forget),
            ("POST", f"{one}/reboot", self._reboot),
            ("POST", f"{one}/expire-tokens", self._expire),
            ("GET", f"{one}/requests", self._requests),
            ("DELETE", f"{one}/requests", self._reset_requests),
            ("POST", f"{one}/labs", self._add_labs),
            ("PATCH", lab, self._change_lab),
            ("DELETE", lab, self._delete_lab),
            ("GET", "/_sim/counters", self._counters),
            ("GET", "/_sim/faults", self._faults),
            ("POST", "/_sim/faults", self._add_fault),
            ("DELETE", "/_sim/faults", self._clear_faults),
            ("DELETE", "/_sim/faults/{id}", self._clear_fault),
        ]
        return [web.route(method, path, _guarded(handler)) for method, path, handler in table]

    def _known(self, request: web.Request) -> Machine:
        machine = self._fleet.machines.get(request.match_info["name"])
        if machine is None:
            raise RefusalError(404, f"There is no instance {request.match_info['name']}.")
        machine.look()
        return machine

    def _made(self, request: web.Request) -> Machine:
        name = request.match_info["name"]
        if not self._fleet.valid(name):
            raise RefusalError(400, f"{name!r} is not the name of an instance.")
        try:
            machine = self._fleet.machine(name)
        except TooManyMachinesError as e:
            raise RefusalError(507, str(e)) from None
        machine.look()
        return machine

    def _lab(self, request: web.Request) -> tuple[Machine, Lab]:
        machine = self._known(request)
        lab = machine.labs.get(request.match_info["lab"])
        if lab is None:
            raise RefusalError(404, f"Lab not found: {request.match_info['lab']}")
        return machine, lab

    async def _list(self, _: web.Request) -> web.StreamResponse:
        return _json([_summary(m) for m in self._fleet.machines.values()])

    async def _show(self, request: web.Request) -> web.StreamResponse:
        machine = self._known(request)
        rights: list[str] = []
        labs = [lab_document(machine, lab, rights) for lab in machine.labs.values()]
        return _json(_summary(machine) | {"lab_documents": labs})

    async def _change(self, request: web.Request) -> web.StreamResponse:
        given = await _body(request, _InstancePatch)
        machine = self._made(request)
        if given.powered is not None:
            (machine.power_on if given.powered else machine.power_off)()
        if "cpu_percent" in given.model_fields_set:
            machine.load.cpu_percent = given.cpu_percent
        if "memory_percent" in given.model_fields_set:
            machine.load.memory_percent = given.memory_percent
        return _json(_summary(machine))

    async def _forget(self, request: web.Request) -> web.StreamResponse:
        self._known(request)
        self._fleet.forget(request.match_info["name"])
        return web.Response(status=204)

    async def _reboot(self, request: web.Request) -> web.StreamResponse:
        machine = self._made(request)
        machine.power_off()
        machine.power_on()
        return _json(_summary(machine))

    async def _expire(self, request: web.Request) -> web.StreamResponse:
        return _json({"expired": self._known(request).directory.close_sessions()})

    async def _requests(self, request: web.Request) -> web.StreamResponse:
        machine = self._known(request)
        return _json({"total": machine.counts.total(), "counts": dict(machine.counts), "log": list(machine.log)})

    async def _reset_requests(self, request: web.Request) -> web.StreamResponse:
        machine = self._known(request)
        machine.counts.clear()
        machine.log.clear()
        return web.Response(status=204)

    async def _add_labs(self, request: web.Request) -> web.StreamResponse:
        given = await _body(request, _NewLabs)
        machine = self._made(request)
        owner = machine.directory.named(given.owner) if given.owner else machine.admin
        if owner is None:
            raise RefusalError(400, f"There is no user {given.owner}.")
        made = [
            machine.add_lab(
                given.title if given.count == 1 else f"{given.title[:56]} {n + 1}",
                nodes=given.nodes,
                running=given.running,
                owner=owner.id,
                description=given.description,
                notes=given.notes,
            )
            for n in range(given.count)
        ]
        return _json([lab.id for lab in made], 201)

    async def _change_lab(self, request: web.Request) -> web.StreamResponse:
        given = await _body(request, _LabPatch)
        machine, lab = self._lab(request)
        lab.title = given.title or lab.title
        lab.description = lab.description if given.description is None else given.description
        lab.notes = lab.notes if given.notes is None else given.notes
        if given.model_fields_set - {"state"}:
            lab.touch("lab", "modified", lab.id, machine.clock.monotonic(), machine.clock.now())
        if given.state is not None:
            machine.force(lab, given.state)
        machine.look()
        return _json(lab_document(machine, lab, []))

    async def _delete_lab(self, request: web.Request) -> web.StreamResponse:
        machine, lab = self._lab(request)
        machine.remove(lab)
        return web.Response(status=204)

    async def _counters(self, _: web.Request) -> web.StreamResponse:
        return _json({m.name: {"total": m.counts.total(), **m.counts} for m in self._fleet.machines.values()})

    async def _faults(self, _: web.Request) -> web.StreamResponse:
        return _json([f.document() for f in self._fleet.faults.faults.values()])

    async def _add_fault(self, request: web.Request) -> web.StreamResponse:
        given = await _body(request, _NewFault)
        fault = self._fleet.faults.add(given.kind, **given.model_dump(exclude={"kind"}))
        return _json(fault.document(), 201)

    async def _clear_faults(self, request: web.Request) -> web.StreamResponse:
        return _json({"cleared": self._fleet.faults.clear(instance=request.query.get("instance", ""))})

    async def _clear_fault(self, request: web.Request) -> web.StreamResponse:
        text = request.match_info["id"]
        if not text.isdecimal() or not self._fleet.faults.clear(int(text)):
            raise RefusalError(404, f"There is no fault {text}.")
        return web.Response(status=204)


def _guarded(handler: Handler) -> Handler:
    async def run(request: web.Request) -> web.StreamResponse:
        try:
            return await handler(request)
        except RefusalError as e:
            reply = e.reply()
            return web.Response(status=reply.status, body=reply.body, content_type=reply.content_type)

    return run


async def _body(request: web.Request, model: type[B]) -> B:
    raw = await request.read()
    try:
        value = orjson.loads(raw or b"{}")
    except orjson.JSONDecodeError as e:
        raise RefusalError(400, f"The body is not JSON: {e}") from None
    return checked(model, value)


def _json(value: Any, status: int = 200) -> web.Response:
    return web.Response(status=status, body=orjson.dumps(value), content_type="application/json")


def _summary(machine: Machine) -> dict[str, Any]:
    return {
        "name": machine.name,
        "stage": machine.stage,
        "powered": machine.powered,
        "boots": machine.boots,
        "product_uuid": machine.product_uuid,
        "labs": len(machine.labs),
        "licensed": machine.licensing.licensed,
        "sessions": len(machine.directory.sessions),
        "websockets": len(machine.listeners),
        "requests": machine.counts.total(),
    }
