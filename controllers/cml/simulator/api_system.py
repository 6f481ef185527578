"""The system's own endpoints: information, health, load, computes, diagnostics, maintenance, telemetry."""

from __future__ import annotations

from typing import Any

from controllers.cml.simulator import views
from controllers.cml.simulator.api_labs import everything_diagnosed
from controllers.cml.simulator.bodies import AdmissionState, Maintenance, OptIn
from controllers.cml.simulator.catalog import CATALOG
from controllers.cml.simulator.labs import ACTIVE, QUEUED
from controllers.cml.simulator.machine import Machine
from controllers.cml.simulator.routing import Call, RefusalError, Reply, Route, ok


def information(call: Call) -> Reply:
    machine = call.machine
    document: dict[str, Any] = {
        "version": machine.options.version,
        "ready": machine.ready,
        "allow_ssh_pubkey_auth": False,
        "oui": None,
    }
    if machine.options.release >= (2, 10):
        document |= {"timeout": machine.session_timeout, "features": []}
    return ok(document)


def stats(call: Call) -> Reply:
    machine = call.machine
    use, nodes = _usage(machine), _node_counts(machine)
    totals = {name: use[name] for name in ("memory", "disk")}
    running = [n for lab in machine.labs.values() for n in lab.nodes.values() if n.active]
    dominfo = nodes | {
        "allocated_cpus": sum(n.settings.get("cpus") or n.definition.cpus for n in running),
        "allocated_memory": sum(n.settings.get("ram") or n.definition.ram for n in running) * 1024**2,
    }
    cpu = {
        "count": machine.options.cpus,
        "percent": use["percent"],
        "model": "Simulated CPU @ 4.00GHz",
        "predicted": 0,
        "load": [round(use["percent"] * machine.options.cpus / 100, 2)] * 3,
    }
    compute = {
        "hostname": machine.hostname,
        "is_controller": True,
        "stats": totals | {"cpu": cpu, "dominfo": dominfo},
    }
    return ok(
        {
            "computes": {machine.compute_id: compute},
            "all": totals | {"cpu": {"count": machine.options.cpus, "percent": use["percent"]}},
            "controller": {"disk": use["disk"]},
        }
    )


def health(call: Call) -> Reply:
    machine = call.machine
    fine, ready = machine.ready, machine.stage == "ready"
    compute = {
        "kvm_vmx_enabled": True,
        "enough_cpus": True,
        "lld_connected": ready,
        "lld_synced": ready,
        "libvirt": True,
        "fabric": True,
        "device_mux": True,
        "refplat_images_available": True,
        "docker_shim": True,
        "valid": fine,
        "admission_state": machine.admission_state,
        "is_controller": True,
        "hostname": machine.hostname,
    }
    return ok(
        {
            "valid": fine,
            "computes": {machine.compute_id: compute},
            "is_licensed": machine.licensing.licensed,
            "is_enterprise": machine.licensing.enterprise,
            "controller": {"core_connected": ready, "nodes_loaded": True, "images_loaded": True, "valid": ready},
        }
    )


def compute_hosts(call: Call) -> Reply:
    return ok([_compute(call.machine)])


def compute_host(call: Call) -> Reply:
    _check_compute(call)
    return ok(_compute(call.machine))


def change_compute_host(call: Call) -> Reply:
    call.require_admin()
    _check_compute(call)
    wanted = call.body(AdmissionState).admission_state
    order = ("UNREGISTERED", "REGISTERED", "ONLINE", "READY")
    if abs(order.index(wanted) - order.index(call.machine.admission_state)) > 1:
        raise RefusalError(409, f"A compute host does not go from {call.machine.admission_state} to {wanted}.")
    call.machine.admission_state = wanted
    return ok(_compute(call.machine))


def delete_compute_host(call: Call) -> Reply:
    call.require_admin()
    _check_compute(call)
    raise RefusalError(409, "The controller's own compute host cannot be removed.")


def compute_configuration(call: Call) -> Reply:
    return ok({"admission_state": call.machine.default_admission_state})


def change_compute_configuration(call: Call) -> Reply:
    call.require_admin()
    call.machine.default_admission_state = call.body(AdmissionState).admission_state
    return compute_configuration(call)


def maintenance(call: Call) -> Reply:
    return ok({"maintenance_mode": call.machine.maintenance, "notice": None, "resolved_notice": None})


def change_maintenance(call: Call) -> Reply:
    call.require_admin()
    given = call.body(Maintenance)
    if given.notice is not None:
        raise RefusalError(404, f"System notice not found: {given.notice}")
    if given.maintenance_mode is not None:
        call.machine.maintenance = given.maintenance_mode
        call.machine.record("maintenance_state_change", {"maintenance_mode": given.maintenance_mode})
    return maintenance(call)


def diagnostics(call: Call) -> Reply:
    category = call.params["category"]
    if category not in _DIAGNOSTICS:
        raise RefusalError(400, f"There are no diagnostics of {category!r}.")
    call.require_admin()
    return ok(_DIAGNOSTICS[category](call))


def telemetry(call: Call) -> Reply:
    return ok({"opt_in": call.machine.opt_in, "show_modal": call.machine.opt_in is None})


def change_telemetry(call: Call) -> Reply:
    call.require_admin()
    call.machine.opt_in = call.body(OptIn).opt_in
    return telemetry(call)


def telemetry_events(call: Call) -> Reply:
    """The whole history: there is no filter and no page."""
    return ok(list(call.machine.telemetry))


def nothing(_: Call) -> Reply:
    """Of things that a CML can have and this one has none of."""
    return ok([])


def _usage(machine: Machine) -> dict[str, Any]:
    """Load as the running nodes cause it, unless somebody set it."""
    o = machine.options
    running = [n for lab in machine.labs.values() for n in lab.nodes.values() if n.active]
    cpus = sum(n.settings.get("cpus") or n.definition.cpus for n in running)
    ram = sum(n.settings.get("ram") or n.definition.ram for n in running) * 1024**2
    percent = machine.load.cpu_percent
    share = machine.load.memory_percent
    used = min(o.memory_bytes, 4 * 1024**3 + ram) if share is None else int(o.memory_bytes * share / 100)
    disk = min(o.disk_bytes, 60 * 1024**3 + len(running) * 1024**3)
    return {
        "percent": round(min(100.0, 1.5 + 40.0 * cpus / o.cpus), 2) if percent is None else percent,
        "memory": {"used": used, "free": o.memory_bytes - used, "total": o.memory_bytes},
        "disk": {"used": disk, "free": o.disk_bytes - disk, "total": o.disk_bytes},
    }


def _node_counts(machine: Machine) -> dict[str, int]:
    nodes = [n for lab in machine.labs.values() for n in lab.nodes.values()]
    return {
        "total_nodes": len(nodes),
        "total_orphans": 0,
        "running_nodes": sum(n.active for n in nodes),
        "running_orphans": 0,
    }


def _compute(machine: Machine) -> dict[str, Any]:
    document = {
        "id": machine.compute_id,
        "server_address": "127.0.0.1",
        "hostname": machine.hostname,
        "is_simulator": True,
        "is_connector": True,
        "admission_state": machine.admission_state,
        "node_counts": _node_counts(machine),
        "is_connected": machine.stage == "ready",
        "is_synced": machine.stage == "ready",
    }
    if machine.options.release < (2, 10):
        document["nodes"] = [n.id for lab in machine.labs.values() for n in lab.nodes.values() if n.active]
    return document


def _check_compute(call: Call) -> None:
    if call.params["compute_id"] != call.machine.compute_id:
        raise RefusalError(404, f"Compute host not found: {call.params['compute_id']}")


def _diagnose_computes(call: Call) -> dict[str, Any]:
    machine = call.machine
    use = _usage(machine)
    ready = machine.stage == "ready"
    return {
        machine.compute_id: {
            "identifier": machine.hostname,
            "host_address": "127.0.0.1",
            "hostname": machine.hostname,
            "link_driver": "l2-udp",
            "kvm_vmx_enabled": True,
            "is_controller": True,
            "is_connector": True,
            "is_simulator": True,
            "readiness": dict.fromkeys(
                ("libvirt", "fabric", "device_mux", "refplat_images_available", "docker_shim"), ready
            ),
            "lld_consistency": {"missing_nodes": [], "orphaned_nodes": []},
            "nodes": {},
            "links": {},
            "interfaces": {},
            "fabric": [],
            "statistics": {
                "cpu": {
                    "count": machine.options.cpus,
                    "percent": use["percent"],
                    "model": "Simulated CPU @ 4.00GHz",
                    "predicted": 0,
                    "load": [0.0, 0.0, 0.0],
                },
                "memory": use["memory"],
                "disk": use["disk"],
                "dominfo": _node_counts(machine) | {"allocated_cpus": 0, "allocated_memory": 0},
            },
            "admission_state": machine.admission_state,
        }
    }


def _diagnose_labs(call: Call) -> dict[str, Any]:
    now = call.machine.clock.monotonic()
    return {lab.id: everything_diagnosed(lab, now) for lab in call.machine.labs.values()}


def _diagnose_events(call: Call) -> dict[str, Any]:
    machine = call.machine
    return {
        lab_id: [views.event_document(machine, e) for e in machine.events.get(lab_id, ())] for lab_id in machine.labs
    }


def _diagnose_queue(call: Call) -> list[dict[str, Any]]:
    return [
        {
            "id": n.id,
            "lab_id": lab.id,
            "label": n.label,
            "node_definition": n.definition.id,
            "cpus": n.settings.get("cpus"),
            "x": n.x,
            "y": n.y,
        }
        for lab in call.machine.labs.values()
        for n in lab.nodes.values()
        if n.state == QUEUED
    ]


def _diagnose_licensing(call: Call) -> dict[str, Any]:
    machine = call.machine
    own = sum(
        n.definition.licensed and n.state in ACTIVE
        for lab in machine.labs.values()
        if lab.owner == call.user.id
        for n in lab.nodes.values()
    )
    return {
        "quota": machine.node_limit,
        "started": machine.running_nodes(),
        "user_quota": None,
        "user_started": own,
    }


def _diagnose_startup(call: Call) -> dict[str, bool]:
    ready = call.machine.stage == "ready"
    return {
        "licensing_loaded": True,
        "core_driver_connected": ready,
        "node_definitions_loaded": True,
        "lld_connected": ready,
        "lld_synced": ready,
        "system_ready": call.machine.ready,
    }


_DIAGNOSTICS = {
    "computes": _diagnose_computes,
    "labs": _diagnose_labs,
    "lab_events": _diagnose_events,
    "node_launch_queue": _diagnose_queue,
    "services": lambda _: {"dispatcher": True, "termws": True},
    "node_definitions": lambda _: [{"id": d.id, "images": list(d.images)} for d in CATALOG.values()],
    "user_list": lambda call: [views.user_document(call.machine, u) for u in call.machine.directory.users.values()],
    "licensing": _diagnose_licensing,
    "startup_scheduler": _diagnose_startup,
}

_COMPUTE = "/system/compute_hosts/{compute_id}"

ROUTES = (
    Route("GET", "/system_information", information, "anyone"),
    Route("GET", "/system_stats", stats),
    Route("GET", "/system_health", health),
    Route("GET", "/system/compute_hosts", compute_hosts),
    Route("GET", "/system/compute_hosts/configuration", compute_configuration),
    Route("PATCH", "/system/compute_hosts/configuration", change_compute_configuration),
    Route("GET", _COMPUTE, compute_host),
    Route("PATCH", _COMPUTE, change_compute_host),
    Route("DELETE", _COMPUTE, delete_compute_host),
    Route("GET", "/system/maintenance_mode", maintenance, "anyone"),
    Route("PATCH", "/system/maintenance_mode", change_maintenance),
    Route("GET", "/diagnostics/{category}", diagnostics),
    Route("GET", "/telemetry", telemetry),
    Route("PUT", "/telemetry", change_telemetry),
    Route("GET", "/telemetry/events", telemetry_events),
    Route("GET", "/resource_pools", nothing),
    Route("GET", "/resource_pool_usage", nothing),
    Route("GET", "/system/notices", nothing),
    Route("GET", "/lab_repos", nothing),
)
