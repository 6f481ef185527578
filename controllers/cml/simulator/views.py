"""Labs, nodes, links and people as the API shows them.

Promises: the shapes of the API document, except where the real server is known to differ from it (facts are noted at
the place). Tiles are kept as bytes per lab until the lab changes, so that a tile list costs a join.
"""

from __future__ import annotations

from collections.abc import Iterable
from datetime import datetime
from typing import Any

import orjson

from controllers.cml.simulator.accounts import Group, User
from controllers.cml.simulator.labs import (
    BOOTED,
    DEFINED,
    QUEUED,
    STARTED,
    STARTING,
    STOPPED,
    Interface,
    Lab,
    Link,
    Node,
)
from controllers.cml.simulator.machine import Happening, Machine

PROGRESS = {
    DEFINED: "Not running",
    STOPPED: "Not running",
    QUEUED: "Booting",
    STARTING: "Booting",
    STARTED: "Booting",
    BOOTED: "Booted",
}


def stamp(when: datetime) -> str:
    return when.isoformat(timespec="seconds")


def lab_document(machine: Machine, lab: Lab, rights: list[str]) -> dict[str, Any]:
    """A LabResponse."""
    owner = machine.directory.users.get(lab.owner)
    document = {
        "id": lab.id,
        "created": stamp(lab.created),
        "modified": stamp(lab.modified),
        "lab_title": lab.title,
        "lab_description": lab.description,
        "lab_notes": lab.notes,
        "owner": lab.owner,
        "owner_username": owner.username if owner else "",
        "owner_fullname": owner.fullname if owner else "",
        "state": lab.state,
        "node_count": len(lab.nodes),
        "link_count": len(lab.links),
        "groups": old_groups(lab),
        "effective_permissions": rights,
    }
    if machine.options.release >= (2, 10):
        document |= {k: lab.extras[k] for k in ("autostart", "node_staging") if k in lab.extras}
    return document


def tile(machine: Machine, lab: Lab, rights: list[str]) -> bytes:
    """A lab with its topology; remembered for those who hold every right, which is nearly everybody who asks."""
    # The owner's names are part of it and may change without the lab: they are part of what makes it stale.
    owner = machine.directory.users.get(lab.owner)
    kind = f"tile {','.join(rights)} {owner.username if owner else ''} {owner.fullname if owner else ''}"
    kept = lab.views.get(kind)
    if kept is not None and kept[0] == lab.version:
        return kept[1]
    document = lab_document(machine, lab, rights)
    document["topology"] = {
        "nodes": [node_document(machine, lab, n, operational=False, exclude=True) for n in lab.nodes.values()],
        "links": [link_document(lab, k) for k in lab.links.values()],
        "annotations": lab.extras.get("annotations", []),
        "smart_annotations": lab.extras.get("smart_annotations", []),
    }
    made = orjson.dumps(document)
    if len(lab.views) > 8:
        lab.views.clear()
    lab.views[kind] = (lab.version, made)
    return made


def tiles(machine: Machine, labs: Iterable[tuple[Lab, list[str]]]) -> bytes:
    """The answer of `GET /populate_lab_tiles`: the document's own schema for it is wrong."""
    body = b",".join(b'"%s":%s' % (lab.id.encode(), tile(machine, lab, rights)) for lab, rights in labs)
    return b'{"lab_tiles":{%s}}' % body


def old_groups(lab: Lab) -> list[dict[str, Any]]:
    """The deprecated form of a lab's groups."""
    return [
        {"id": group_id, "permission": "read_write" if set(held) & {"lab_edit", "lab_admin"} else "read_only"}
        for group_id, held in lab.associations["groups"].items()
    ]


def associations_document(lab: Lab) -> dict[str, Any]:
    return {
        kind: [{"id": held_by, "permissions": held} for held_by, held in lab.associations[kind].items()]
        for kind in ("groups", "users")
    }


def node_document(
    machine: Machine, lab: Lab, node: Node, *, operational: bool | None = None, exclude: bool | None = None
) -> dict[str, Any]:
    """A Node. `exclude` is of its configurations: True none, False all, None only the main one."""
    settings, compute = node.settings, machine.compute_id if node.active else None
    document: dict[str, Any] = {
        "id": node.id,
        "lab_id": lab.id,
        "label": node.label,
        "x": node.x,
        "y": node.y,
        "node_definition": node.definition.id,
        "image_definition": settings.get("image_definition"),
        "ram": settings.get("ram"),
        "cpus": settings.get("cpus"),
        "cpu_limit": settings.get("cpu_limit"),
        "data_volume": settings.get("data_volume"),
        "boot_disk_size": settings.get("boot_disk_size"),
        "hide_links": bool(settings.get("hide_links")),
        "tags": settings.get("tags") or [],
        "parameters": settings.get("parameters") or {},
        "pinned_compute_id": settings.get("pinned_compute_id"),
        "state": node.state,
        "boot_progress": PROGRESS[node.state],
    }
    if not exclude:
        document["configuration"] = node.configuration if exclude is False else main_configuration(node.configuration)
    if operational is not False:
        # Without the parameter the data also stands at the root, as it did before there was one.
        document |= {"compute_id": compute, "resource_pool": None, "vnc_key": None, "iol_app_id": None}
        document["serial_consoles"] = []
    if operational:
        document["operational"] = {
            "boot_disk_size": settings.get("boot_disk_size"),
            "cpu_limit": settings.get("cpu_limit") or 100,
            "cpus": settings.get("cpus") or node.definition.cpus,
            "data_volume": settings.get("data_volume"),
            "ram": settings.get("ram") or node.definition.ram or None,
            "compute_id": compute,
            "image_definition": settings.get("image_definition") or next(iter(node.definition.images), None),
            "vnc_key": None,
            "resource_pool": None,
            "iol_app_id": None,
            "serial_consoles": [],
        }
    return document


def main_configuration(configuration: Any) -> Any:
    """The first of several configuration files, by its content alone."""
    if isinstance(configuration, list):
        configuration = configuration[0] if configuration else None
    return configuration.get("content") if isinstance(configuration, dict) else configuration


def link_document(lab: Lab, link: Link) -> dict[str, Any]:
    return {
        "id": link.id,
        "lab_id": lab.id,
        "label": link.label,
        "state": link.state,
        "link_capture_key": "",
        "interface_a": link.a.id,
        "interface_b": link.b.id,
        "node_a": link.a.node.id,
        "node_b": link.b.node.id,
    }


def interface_document(lab: Lab, interface: Interface, *, operational: bool | None = None) -> dict[str, Any]:
    document: dict[str, Any] = {
        "id": interface.id,
        "lab_id": lab.id,
        "node": interface.node.id,
        "label": interface.label,
        "slot": interface.slot,
        "type": "loopback" if interface.slot is None else "physical",
        "mac_address": interface.mac,
        "is_connected": any(interface in (k.a, k.b) for k in lab.links.values()),
        "state": interface.state,
    }
    if operational:
        document["operational"] = {"mac_address": interface.mac, "device_name": None}
    return document


def topology_document(machine: Machine, lab: Lab, exclude: bool | None) -> dict[str, Any]:
    """The topology with this server's ids; not what import takes: `topology.export` is."""
    nodes = []
    for node in lab.nodes.values():
        document = {
            key: value
            for key, value in node_document(machine, lab, node, operational=False, exclude=exclude).items()
            if key not in ("lab_id", "state", "boot_progress", "pinned_compute_id")
        }
        document["interfaces"] = [
            {
                "id": i.id,
                "node": node.id,
                "label": i.label,
                "type": "loopback" if i.slot is None else "physical",
                "mac_address": i.mac,
            }
            | ({} if i.slot is None else {"slot": i.slot})
            for i in node.interfaces
        ]
        nodes.append(document)
    links = [link_document(lab, k) | ({"conditioning": k.condition} if k.condition else {}) for k in lab.links.values()]
    return {
        "lab": {
            "version": topology_version(machine),
            "title": lab.title,
            "description": lab.description,
            "notes": lab.notes,
            "owner": lab.owner,
        },
        "nodes": nodes,
        "links": links,
        "annotations": lab.extras.get("annotations", []),
        "smart_annotations": lab.extras.get("smart_annotations", []),
    }


def topology_version(machine: Machine) -> str:
    return "0.3.1" if machine.options.release >= (2, 10) else "0.3.0"


def event_document(machine: Machine, event: Happening) -> dict[str, Any]:
    """An event of a lab; 2.10 writes other words than the document of 2.9."""
    change = event.change
    data = {"state": change.state} if change.verb == "state" else {}
    previous = {"state": change.previous} if change.verb == "state" else {}
    if machine.options.release >= (2, 10):
        verb = "state" if change.verb == "state" else change.verb.upper()
        kind = change.kind.capitalize()
    else:
        verb = {"created": "ADD", "deleted": "REMOVE", "modified": "CHANGE", "state": "STATE_CHANGED"}[change.verb]
        kind = change.kind.upper()
    return {
        "lab_id": event.lab,
        "event": verb,
        "element_type": kind,
        "element_id": change.element,
        "data": data,
        "previous": previous,
        "timestamp": event.when.isoformat(),
    }


def user_document(machine: Machine, user: User) -> dict[str, Any]:
    return {
        "id": user.id,
        "username": user.username,
        "fullname": user.fullname,
        "description": user.description,
        "email": user.email,
        "admin": user.admin,
        "groups": user.groups,
        "associations": [
            {"id": lab.id, "permissions": lab.associations["users"][user.id]}
            for lab in machine.labs.values()
            if user.id in lab.associations["users"]
        ],
        "resource_pool": None,
        "opt_in": user.opt_in,
        "tour_version": user.tour_version,
        "created": stamp(user.created),
        "modified": stamp(user.modified),
        "directory_dn": "",
        "labs": [lab.id for lab in machine.labs.values() if lab.owner == user.id],
        "pubkey_info": None,
    }


def group_document(machine: Machine, group: Group) -> dict[str, Any]:
    return {
        "id": group.id,
        "name": group.name,
        "description": group.description,
        "members": group.members,
        "labs": [
            {"id": lab.id, "permission": g["permission"]}
            for lab in machine.labs.values()
            for g in old_groups(lab)
            if g["id"] == group.id
        ],
        "associations": [
            {"id": lab.id, "permissions": lab.associations["groups"][group.id]}
            for lab in machine.labs.values()
            if group.id in lab.associations["groups"]
        ],
        "created": stamp(group.created),
        "modified": stamp(group.modified),
        "directory_dn": "",
        "directory_exists": None,
    }
