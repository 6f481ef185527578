"""Labs: list, tiles, create, change, import, export, start, stop, wipe, delete, and what happened to them."""

from __future__ import annotations

from typing import Any
from uuid import uuid4

from controllers.cml.simulator import topology, views
from controllers.cml.simulator.bodies import Associations, LabBody, LabBody210, OldGroup
from controllers.cml.simulator.labs import Lab, OutOfOrderError
from controllers.cml.simulator.machine import CannotStartError
from controllers.cml.simulator.routing import Call, InvalidInputError, RefusalError, Reply, Route, done, ok


def list_labs(call: Call) -> Reply:
    everything = call.flag("show_all")
    user = call.user
    labs = call.machine.labs.values()
    return ok([lab.id for lab in labs if lab.owner == user.id or (everything and call.rights(lab))])


def tiles(call: Call) -> Reply:
    seen = ((lab, call.rights(lab)) for lab in call.machine.labs.values())
    return Reply(200, views.tiles(call.machine, ((lab, rights) for lab, rights in seen if rights)))


def create(call: Call) -> Reply:
    given = call.optional_body(_lab_body(call))
    clock = call.machine.clock
    when = clock.now()
    lab = Lab(str(uuid4()), f"Lab at {when:%a %H:%M %p}", call.user.id, when, when)
    _apply(call, lab, given)
    call.machine.insert(lab)
    return ok(views.lab_document(call.machine, lab, call.rights(lab)))


def show(call: Call) -> Reply:
    lab = call.lab()
    return ok(views.lab_document(call.machine, lab, call.rights(lab)))


def change(call: Call) -> Reply:
    lab = call.lab("lab_edit")
    _apply(call, lab, call.body(_lab_body(call)))
    _touched(call, lab)
    return ok(views.lab_document(call.machine, lab, call.rights(lab)))


def delete(call: Call) -> Reply:
    lab = call.lab("lab_admin")
    if not lab.removable:
        raise RefusalError(
            call.machine.options.refusal_status, f"Lab {lab.id} must be stopped and wiped first, before it is removed."
        )
    call.machine.remove(lab)
    return done()


def state(call: Call) -> Reply:
    return ok(call.lab().state)


def converged(call: Call) -> Reply:
    return ok(call.lab().converged)


def start(call: Call) -> Reply:
    lab = call.lab("lab_exec")
    try:
        call.machine.start(lab)
    except CannotStartError as e:
        raise RefusalError(400, str(e)) from None
    return done()


def stop(call: Call) -> Reply:
    call.machine.stop(call.lab("lab_exec"))
    return done()


def wipe(call: Call) -> Reply:
    lab = call.lab("lab_exec")
    try:
        call.machine.wipe(lab)
    except OutOfOrderError as e:
        raise RefusalError(call.machine.options.refusal_status, str(e)) from None
    return done()


def element_states(call: Call) -> Reply:
    lab = call.lab()
    return ok(
        {
            "nodes": {n.id: n.state for n in lab.nodes.values()},
            "links": {k.id: k.state for k in lab.links.values()},
            "interfaces": {i.id: i.state for n in lab.nodes.values() for i in n.interfaces},
        }
    )


def one_tile(call: Call) -> Reply:
    lab = call.lab()
    return Reply(200, views.tile(call.machine, lab, call.rights(lab)))


def show_topology(call: Call) -> Reply:
    return ok(views.topology_document(call.machine, call.lab(), call.flag("exclude_configurations", default=None)))


def download(call: Call) -> Reply:
    """YAML as it is: the document says a JSON string, the real server does not send one."""
    lab = call.lab()
    call.machine.record("export_lab", {"lab_id": lab.id})
    text = topology.export(lab, views.topology_version(call.machine))
    return Reply(200, text.encode(), "text/yaml; charset=utf-8")


def import_lab(call: Call) -> Reply:
    """Not idempotent, as in CML: titles are not unique, and each call makes a lab."""
    title = call.query.get("title")
    if title is not None and not 1 <= len(title) <= 64:
        raise InvalidInputError([(["query", "title"], "string_length", "String should have 1 to 64 characters")])
    machine = call.machine
    given = topology.read(call.raw, machine.options.release)
    when = machine.clock.now()
    name = title or given.lab.title or f"Lab at {when:%a %H:%M %p}"
    lab, warnings = topology.build(given, name, call.user.id, when)
    machine.insert(lab)
    machine.record("import_lab", {"lab_id": lab.id, "nodes": len(lab.nodes)})
    return ok({"id": lab.id, "warnings": warnings})


def events(call: Call) -> Reply:
    lab = call.lab()
    machine = call.machine
    return ok([views.event_document(machine, e) for e in machine.events.get(lab.id, ())])


def simulation_stats(call: Call) -> Reply:
    """Maps by id, where the document says lists: the real server answers so."""
    lab = call.lab()
    now = call.machine.clock.monotonic()
    nodes = {
        n.id: {
            "cpu_usage": 5.0 * (n.definition.cpus or 1),
            "block0_rd_bytes": 4096 * int(now - n.since),
            "block0_wr_bytes": 1024 * int(now - n.since),
        }
        for n in lab.nodes.values()
        if n.active
    }
    links = {
        k.id: {"readbytes": 0, "readpackets": 0, "writebytes": 0, "writepackets": 0}
        for k in lab.links.values()
        if k.state == "STARTED"
    }
    return ok({"nodes": nodes, "links": links})


def layer3_addresses(call: Call) -> Reply:
    call.lab()
    return ok({})


def clear_layer3_addresses(call: Call) -> Reply:
    call.lab("lab_exec")
    return done()


def nothing_listed(call: Call) -> Reply:
    """Of things that a lab can have and that are not simulated beyond having none."""
    call.lab()
    return ok([])


def drawn_annotations(call: Call) -> Reply:
    return ok(call.lab().extras.get("annotations", []))


def smart_annotations(call: Call) -> Reply:
    return ok(call.lab().extras.get("smart_annotations", []))


def associations(call: Call) -> Reply:
    return ok(views.associations_document(call.lab()))


def set_associations(call: Call) -> Reply:
    lab = call.lab("lab_admin")
    _associate(call, lab, call.body(Associations))
    _touched(call, lab)
    return ok(views.associations_document(lab))


def groups(call: Call) -> Reply:
    return ok(views.old_groups(call.lab()))


def find_node(call: Call) -> Reply:
    wanted = call.params["search_query"]
    return ok(next((n.id for n in call.lab().nodes.values() if n.label == wanted), None))


def find_nodes_by_tag(call: Call) -> Reply:
    wanted = call.params["search_query"]
    return ok([n.id for n in call.lab().nodes.values() if wanted in (n.settings.get("tags") or [])])


def _lab_body(call: Call) -> type[LabBody]:
    return LabBody210 if call.machine.options.release >= (2, 10) else LabBody


def _apply(call: Call, lab: Lab, given: LabBody) -> None:
    """Write what was given into the lab, after all of it was found good."""
    if given.owner is not None and given.owner != lab.owner:
        call.require_admin()
        if given.owner not in call.machine.directory.users:
            raise RefusalError(400, f"User not found: {given.owner}")
    if given.associations is not None:
        _associate(call, lab, given.associations)
    if given.groups is not None:
        _associate_old(call, lab, given.groups)
    lab.owner = given.owner or lab.owner
    lab.title = given.title or lab.title
    lab.description = lab.description if given.description is None else given.description
    lab.notes = lab.notes if given.notes is None else given.notes
    for name in ("autostart", "node_staging"):
        extra = getattr(given, name, None)
        if extra is not None:
            lab.extras[name] = extra.model_dump(exclude_none=True)


def _associate(call: Call, lab: Lab, given: Associations) -> None:
    directory = call.machine.directory
    missing = [a.id for a in given.groups if a.id not in directory.groups]
    missing += [a.id for a in given.users if a.id not in directory.users]
    if missing:
        raise RefusalError(400, f"Not found: {', '.join(missing)}")
    lab.associations["groups"] = {a.id: [*a.permissions] for a in given.groups if a.permissions}
    lab.associations["users"] = {a.id: [*a.permissions] for a in given.users if a.permissions}


def _associate_old(call: Call, lab: Lab, given: list[OldGroup]) -> None:
    missing = [g.id for g in given if g.id not in call.machine.directory.groups]
    if missing:
        raise RefusalError(400, f"Not found: {', '.join(missing)}")
    old: dict[str, list[str]] = {"read_only": ["lab_view"], "read_write": ["lab_admin"]}
    lab.associations["groups"] = {g.id: old[g.permission] for g in given}


def _touched(call: Call, lab: Lab) -> None:
    clock = call.machine.clock
    lab.touch("lab", "modified", lab.id, clock.monotonic(), clock.now())
    call.machine.look()


def everything_diagnosed(lab: Lab, now: float) -> dict[str, Any]:
    """A lab as `GET /diagnostics/labs` shows it: states without titles."""
    return {
        "created": views.stamp(lab.created),
        "allocated": lab.state != "DEFINED_ON_CORE",
        "nodes": {
            n.id: {
                "label": n.label,
                "state": n.state,
                "state_times": {s: int(now - n.since) if n.state == s else 0 for s in ("QUEUED", "STARTED", "BOOTED")},
            }
            for n in lab.nodes.values()
        },
        "links": {k.id: {"state": k.state, "interface_a": k.a.id, "interface_b": k.b.id} for k in lab.links.values()},
        "interfaces": {
            i.id: {"label": i.label, "state": i.state, "node": n.id} | ({} if i.slot is None else {"slot": i.slot})
            for n in lab.nodes.values()
            for i in n.interfaces
        },
    }


ROUTES = (
    Route("GET", "/labs", list_labs),
    Route("POST", "/labs", create),
    Route("GET", "/populate_lab_tiles", tiles),
    Route("POST", "/import", import_lab),
    Route("GET", "/labs/{lab_id}", show),
    Route("PATCH", "/labs/{lab_id}", change),
    Route("DELETE", "/labs/{lab_id}", delete),
    Route("GET", "/labs/{lab_id}/state", state),
    Route("GET", "/labs/{lab_id}/check_if_converged", converged),
    Route("PUT", "/labs/{lab_id}/start", start),
    Route("PUT", "/labs/{lab_id}/stop", stop),
    Route("PUT", "/labs/{lab_id}/wipe", wipe),
    Route("GET", "/labs/{lab_id}/lab_element_state", element_states),
    Route("GET", "/labs/{lab_id}/tile", one_tile),
    Route("GET", "/labs/{lab_id}/topology", show_topology),
    Route("GET", "/labs/{lab_id}/download", download),
    Route("GET", "/labs/{lab_id}/events", events),
    Route("GET", "/labs/{lab_id}/simulation_stats", simulation_stats),
    Route("GET", "/labs/{lab_id}/layer3_addresses", layer3_addresses),
    Route("DELETE", "/labs/{lab_id}/layer3_addresses", clear_layer3_addresses, since=(2, 10)),
    Route("GET", "/labs/{lab_id}/resource_pools", nothing_listed),
    Route("GET", "/labs/{lab_id}/connector_mappings", nothing_listed),
    Route("GET", "/labs/{lab_id}/annotations", drawn_annotations),
    Route("GET", "/labs/{lab_id}/smart_annotations", smart_annotations),
    Route("GET", "/labs/{lab_id}/associations", associations),
    Route("PATCH", "/labs/{lab_id}/associations", set_associations),
    Route("GET", "/labs/{lab_id}/groups", groups),
    Route("GET", "/labs/{lab_id}/find/node/label/{search_query}", find_node),
    Route("GET", "/labs/{lab_id}/find_all/node/tag/{search_query}", find_nodes_by_tag),
)
