"""Nodes, interfaces and links of a lab."""

from __future__ import annotations

from typing import Any
from uuid import uuid4

from controllers.cml.simulator import topology, views
from controllers.cml.simulator.bodies import (
    ConditionBody,
    InterfaceBody,
    InterfacePatch,
    LinkBody,
    NodeBody,
    NodePatch,
)
from controllers.cml.simulator.catalog import CATALOG
from controllers.cml.simulator.labs import Interface, Kind, Lab, Link, Node, OutOfOrderError, Verb
from controllers.cml.simulator.machine import CannotStartError
from controllers.cml.simulator.routing import Call, RefusalError, Reply, Route, done, ok


def all_nodes(call: Call) -> Reply:
    operational, exclude = call.flag("operational", default=None), call.flag("exclude_configurations", default=None)
    return ok(
        [
            views.node_document(call.machine, lab, node, operational=operational, exclude=exclude)
            for lab in call.machine.labs.values()
            if call.rights(lab)
            for node in lab.nodes.values()
        ]
    )


def nodes(call: Call) -> Reply:
    lab = call.lab()
    operational, exclude = call.flag("operational", default=None), call.flag("exclude_configurations", default=None)
    if not call.flag("data"):
        return ok(list(lab.nodes))
    return ok(
        [
            views.node_document(call.machine, lab, n, operational=operational, exclude=exclude)
            for n in lab.nodes.values()
        ]
    )


def add_node(call: Call) -> Reply:
    lab = call.lab("lab_edit")
    given = call.body(NodeBody)
    kind = CATALOG.get(given.node_definition)
    if kind is None:
        raise RefusalError(400, f"Node definition not found: {given.node_definition}")
    populate = call.flag("populate_interfaces")
    node = Node(str(uuid4()), given.label, kind, given.x, given.y)
    node.configuration, node.settings = topology.configuration_of(given), topology.node_settings(given)
    if populate:
        node.interfaces = [Interface(str(uuid4()), node, kind.label(s), s) for s in range(min(kind.ports, 4))]
    lab.nodes[node.id] = node
    _touched(call, lab, "node", "created", node.id)
    return ok({"id": node.id})


def node(call: Call) -> Reply:
    lab = call.lab()
    found = call.node(lab, missing=400)
    if call.flag("simplified"):
        return ok({"id": found.id, "label": found.label, "x": found.x, "y": found.y} | _must(found))
    operational, exclude = call.flag("operational", default=None), call.flag("exclude_configurations", default=None)
    return ok(views.node_document(call.machine, lab, found, operational=operational, exclude=exclude))


def change_node(call: Call) -> Reply:
    lab = call.lab("lab_edit")
    found = call.node(lab)
    given = call.body(NodePatch)
    found.label = given.label or found.label
    found.x = found.x if given.x is None else given.x
    found.y = found.y if given.y is None else given.y
    if "configuration" in given.model_fields_set:
        found.configuration = topology.configuration_of(given)
    found.settings |= topology.node_settings(given)
    _touched(call, lab, "node", "modified", found.id)
    return ok(found.id)


def delete_node(call: Call) -> Reply:
    lab = call.lab("lab_edit")
    found = call.node(lab)
    if found.active or found.plan:
        raise RefusalError(
            call.machine.options.refusal_status, f"Node {found.id} must be stopped before it is removed."
        )
    lab.forget_node(found)
    _touched(call, lab, "node", "deleted", found.id)
    return done()


def node_state(call: Call) -> Reply:
    found = call.node(call.lab())
    return ok({"state": found.state, "progress": views.PROGRESS[found.state]})


def node_converged(call: Call) -> Reply:
    return ok(not call.node(call.lab()).plan)


def start_node(call: Call) -> Reply:
    lab = call.lab("lab_exec")
    try:
        call.machine.start(lab, call.node(lab))
    except CannotStartError as e:
        raise RefusalError(400, str(e)) from None
    return done()


def stop_node(call: Call) -> Reply:
    lab = call.lab("lab_exec")
    call.machine.stop(lab, call.node(lab))
    return done()


def wipe_node(call: Call) -> Reply:
    lab = call.lab("lab_exec")
    try:
        call.machine.wipe(lab, call.node(lab))
    except OutOfOrderError as e:
        raise RefusalError(call.machine.options.refusal_status, str(e)) from None
    return done()


def node_interfaces(call: Call) -> Reply:
    lab = call.lab()
    found = call.node(lab)
    if not call.flag("data"):
        return ok([i.id for i in found.interfaces])
    operational = call.flag("operational", default=None)
    return ok([views.interface_document(lab, i, operational=operational) for i in found.interfaces])


def node_addresses(call: Call) -> Reply:
    return ok({"name": call.node(call.lab()).label, "interfaces": {}})


def lab_interfaces(call: Call) -> Reply:
    lab = call.lab()
    operational = call.flag("operational", default=None)
    return ok(
        [views.interface_document(lab, i, operational=operational) for n in lab.nodes.values() for i in n.interfaces]
    )


def add_interface(call: Call) -> Reply:
    """Without a slot the first free one, as an object; with one every slot up to it, as a list."""
    lab = call.lab("lab_edit")
    given = call.body(InterfaceBody)
    owner = lab.nodes.get(given.node)
    if owner is None:
        raise RefusalError(404, f"Node not found: {given.node}")
    by_slot = {i.slot: i for i in owner.interfaces if i.slot is not None}
    if given.slot is None:
        wanted = [next(s for s in range(len(by_slot) + 1) if s not in by_slot)]
    else:
        wanted = [*range(given.slot + 1)]
    if wanted[-1] >= owner.definition.ports:
        raise RefusalError(400, f"Node {owner.label} has {owner.definition.ports} slots, not {wanted[-1] + 1}.")
    for slot in wanted:
        if slot not in by_slot:
            made = Interface(str(uuid4()), owner, owner.definition.label(slot), slot)
            if slot == wanted[-1]:
                made.mac = given.mac_address
            by_slot[slot] = made
            owner.interfaces.append(made)
            _touched(call, lab, "interface", "created", made.id)
    documents = [views.interface_document(lab, by_slot[s]) for s in wanted]
    return ok(documents[0] if given.slot is None else documents)


def interface(call: Call) -> Reply:
    lab = call.lab()
    return ok(views.interface_document(lab, call.interface(lab), operational=call.flag("operational", default=None)))


def change_interface(call: Call) -> Reply:
    lab = call.lab("lab_edit")
    found = call.interface(lab)
    found.mac = call.body(InterfacePatch).mac_address
    _touched(call, lab, "interface", "modified", found.id)
    return ok(views.interface_document(lab, found))


def delete_interface(call: Call) -> Reply:
    lab = call.lab("lab_edit")
    found = call.interface(lab, missing=400)
    if found.node.active:
        raise RefusalError(400, f"Node {found.node.id} runs: its interfaces cannot be removed.")
    found.node.interfaces.remove(found)
    for link in [k for k in lab.links.values() if found in (k.a, k.b)]:
        del lab.links[link.id]
        _touched(call, lab, "link", "deleted", link.id)
    _touched(call, lab, "interface", "deleted", found.id)
    return done()


def interface_state(call: Call) -> Reply:
    found = call.interface(call.lab(), missing=400)
    return ok({"label": found.label, "state": found.state})


def start_interface(call: Call) -> Reply:
    return _shut_interface(call, down=False)


def stop_interface(call: Call) -> Reply:
    return _shut_interface(call, down=True)


def links(call: Call) -> Reply:
    lab = call.lab()
    if not call.flag("data"):
        return ok(list(lab.links))
    return ok([views.link_document(lab, k) for k in lab.links.values()])


def add_link(call: Call) -> Reply:
    lab = call.lab("lab_edit")
    given = call.body(LinkBody)
    ends = [lab.interface(given.src_int), lab.interface(given.dst_int)]
    a, b = ends
    if a is None or b is None:
        raise RefusalError(404, f"Interface not found: {given.dst_int if a else given.src_int}")
    if a is b:
        raise RefusalError(400, "A link needs two interfaces.")
    if any(k.a in ends or k.b in ends for k in lab.links.values()):
        raise RefusalError(400, "One of the interfaces is connected already.")
    made = Link(str(uuid4()), f"{a.node.label}-{a.label}<->{b.node.label}-{b.label}"[:128], a, b)
    lab.links[made.id] = made
    _touched(call, lab, "link", "created", made.id)
    return ok({"id": made.id})


def link(call: Call) -> Reply:
    lab = call.lab()
    return ok(views.link_document(lab, call.link(lab)))


def delete_link(call: Call) -> Reply:
    lab = call.lab("lab_edit")
    found = call.link(lab)
    del lab.links[found.id]
    _touched(call, lab, "link", "deleted", found.id)
    return done()


def link_converged(call: Call) -> Reply:
    found = call.link(call.lab())
    return ok(not (found.a.node.plan or found.b.node.plan))


def start_link(call: Call) -> Reply:
    return _shut_link(call, down=False)


def stop_link(call: Call) -> Reply:
    return _shut_link(call, down=True)


def condition(call: Call) -> Reply:
    return ok(call.link(call.lab()).condition or {})


def set_condition(call: Call) -> Reply:
    lab = call.lab("lab_edit")
    found = call.link(lab)
    found.condition = (found.condition or {"enabled": True}) | call.body(ConditionBody).model_dump(exclude_none=True)
    _touched(call, lab, "link", "modified", found.id)
    return ok(found.condition)


def clear_condition(call: Call) -> Reply:
    lab = call.lab("lab_edit")
    found = call.link(lab)
    found.condition = None
    _touched(call, lab, "link", "modified", found.id)
    return done()


def _must(node: Node) -> dict[str, Any]:
    """What a Node cannot be without."""
    return {"node_definition": node.definition.id, "cpus": node.settings.get("cpus"), "state": node.state}


def _shut_interface(call: Call, *, down: bool) -> Reply:
    lab = call.lab("lab_exec")
    found = call.interface(lab, missing=400)
    found.down = down
    _touched(call, lab, "interface", "modified", found.id)
    return done()


def _shut_link(call: Call, *, down: bool) -> Reply:
    lab = call.lab("lab_exec")
    found = call.link(lab)
    found.down = down
    _touched(call, lab, "link", "modified", found.id)
    return done()


def _touched(call: Call, lab: Lab, kind: Kind, verb: Verb, element: str) -> None:
    clock = call.machine.clock
    lab.touch(kind, verb, element, clock.monotonic(), clock.now())
    call.machine.look()


_LAB, _NODE = "/labs/{lab_id}", "/labs/{lab_id}/nodes/{node_id}"
_PORT, _LINK = "/labs/{lab_id}/interfaces/{interface_id}", "/labs/{lab_id}/links/{link_id}"

ROUTES = (
    Route("GET", "/nodes", all_nodes),
    Route("GET", f"{_LAB}/nodes", nodes),
    Route("POST", f"{_LAB}/nodes", add_node),
    Route("GET", _NODE, node),
    Route("PATCH", _NODE, change_node),
    Route("DELETE", _NODE, delete_node),
    Route("GET", f"{_NODE}/state", node_state),
    Route("GET", f"{_NODE}/check_if_converged", node_converged),
    Route("PUT", f"{_NODE}/state/start", start_node),
    Route("PUT", f"{_NODE}/state/stop", stop_node),
    Route("PUT", f"{_NODE}/wipe_disks", wipe_node),
    Route("GET", f"{_NODE}/interfaces", node_interfaces),
    Route("GET", f"{_NODE}/layer3_addresses", node_addresses),
    Route("GET", f"{_LAB}/interfaces", lab_interfaces, since=(2, 10)),
    Route("POST", f"{_LAB}/interfaces", add_interface),
    Route("GET", _PORT, interface),
    Route("PATCH", _PORT, change_interface),
    Route("DELETE", _PORT, delete_interface),
    Route("GET", f"{_PORT}/state", interface_state),
    Route("PUT", f"{_PORT}/state/start", start_interface),
    Route("PUT", f"{_PORT}/state/stop", stop_interface),
    Route("GET", f"{_LAB}/links", links),
    Route("POST", f"{_LAB}/links", add_link),
    Route("GET", _LINK, link),
    Route("DELETE", _LINK, delete_link),
    Route("GET", f"{_LINK}/check_if_converged", link_converged),
    Route("PUT", f"{_LINK}/state/start", start_link),
    Route("PUT", f"{_LINK}/state/stop", stop_link),
    Route("GET", f"{_LINK}/condition", condition),
    Route("PATCH", f"{_LINK}/condition", set_condition),
    Route("DELETE", f"{_LINK}/condition", clear_condition),
)
