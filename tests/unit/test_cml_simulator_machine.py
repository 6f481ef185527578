"""One simulated CML: boot, power, sessions, limits, rights, history."""

from __future__ import annotations

import base64
import hmac
import json
import math
from typing import Any

import pytest

from controllers.cml.simulator.accounts import Group, User
from controllers.cml.simulator.faults import Faults
from controllers.cml.simulator.labs import Lab
from controllers.cml.simulator.machine import CannotStartError, Machine
from controllers.cml.simulator.options import Account, Options
from lrm.testing import VirtualClock

BOOT = Options(boot_refused=1, boot_bad_gateway=2, boot_not_ready=3, accounts=(Account("student", "s"),))
READY = Options(boot_bad_gateway=0, boot_not_ready=0, accounts=(Account("student", "s"),))


def make_machine(options: Options = READY) -> tuple[Machine, VirtualClock]:
    clock = VirtualClock()
    return Machine("i-1", options, clock, Faults()), clock


def student(machine: Machine) -> User:
    user = machine.directory.named("student")
    assert user is not None
    return user


async def test_a_machine_boots_in_stages_and_again_after_a_power_cycle() -> None:
    machine, clock = make_machine(BOOT)
    stages: list[str] = [machine.stage]
    for _ in range(6):
        await clock.advance(1)
        stages.append(machine.stage)
    assert stages == ["refused", *["bad-gateway"] * 2, *["not-ready"] * 3, "ready"]
    machine.power_off()
    assert machine.stage == "off"
    await clock.advance(100)
    machine.power_on()
    assert (machine.stage, machine.boots) == ("refused", 2)


async def test_a_power_cycle_keeps_labs_licence_and_identity_and_ends_what_ran() -> None:
    machine, clock = make_machine()
    lab = machine.add_lab("kept", nodes=2, running=True)
    machine.licensing.register("token", clock.monotonic(), clock.now(), again=False)
    await clock.advance(10)
    machine.look()
    token = machine.directory.open_session(machine.admin, clock.now())
    identity = machine.product_uuid
    machine.power_off()
    machine.power_on()
    assert (lab.state, {n.state for n in lab.nodes.values()}) == ("STOPPED", {"STOPPED"})
    assert machine.labs == {lab.id: lab}
    assert machine.licensing.licensed
    assert machine.product_uuid == identity
    assert machine.directory.user_of(token, clock.now()) is None


def test_identity_belongs_to_the_instance_and_not_to_the_process() -> None:
    first, _ = make_machine()
    second, _ = make_machine()
    other = Machine("i-2", READY, VirtualClock(), Faults())
    assert first.product_uuid == second.product_uuid != other.product_uuid


async def test_tokens_end_at_their_time_and_sooner_on_demand() -> None:
    machine, clock = make_machine(Options(token_seconds=60))
    directory = machine.directory
    first, second = (directory.open_session(machine.admin, clock.now()) for _ in range(2))
    assert first != second
    directory.close_session(first)
    assert directory.user_of(first, clock.now()) is None
    assert directory.user_of(second, clock.now()) is machine.admin
    await clock.advance(59)
    assert directory.user_of(second, clock.now()) is machine.admin
    await clock.advance(1)
    assert directory.user_of(second, clock.now()) is None
    third = directory.open_session(machine.admin, clock.now())
    assert directory.close_sessions() == 1
    assert directory.user_of(third, clock.now()) is None


def test_a_token_is_a_jwt_that_says_when_it_ends() -> None:
    machine, clock = make_machine(Options(token_seconds=60))
    token = machine.directory.open_session(machine.admin, clock.now())
    head, body, signature = token.encode().split(b".")
    claims = json.loads(base64.urlsafe_b64decode(body + b"=="))
    assert json.loads(base64.urlsafe_b64decode(head + b"==")) == {"typ": "JWT", "alg": "HS256"}
    assert (claims["iss"], claims["sub"]) == ("com.cisco.virl", machine.admin.id)
    assert claims["exp"] - claims["iat"] == 60
    expected = hmac.new(machine.directory.key, head + b"." + body, "sha256").digest()
    assert base64.urlsafe_b64decode(signature + b"=") == expected


async def test_expired_sessions_do_not_pile_up() -> None:
    machine, clock = make_machine(Options(token_seconds=60))
    for _ in range(100):
        machine.directory.open_session(machine.admin, clock.now())
        await clock.advance(30)
    assert len(machine.directory.sessions) <= 2


async def test_the_licence_decides_how_many_nodes_may_run() -> None:
    machine, clock = make_machine(Options(boot_bad_gateway=0, boot_not_ready=0, nodes_unlicensed=3, nodes_licensed=6))
    labs = [machine.add_lab(str(n), nodes=2) for n in range(4)]
    machine.start(labs[0])
    with pytest.raises(CannotStartError, match="unlicensed limit of 3"):
        machine.start(labs[1])
    assert labs[1].state == "DEFINED_ON_CORE", "all or nothing"
    machine.start(labs[1], next(iter(labs[1].nodes.values())))
    machine.start(labs[0])  # A repeat starts nothing new, so it is not refused at the limit.
    machine.licensing.register("token", clock.monotonic(), clock.now(), again=False)
    await clock.advance(10)
    machine.look()
    machine.start(labs[1])
    machine.start(labs[2])
    with pytest.raises(CannotStartError, match="limit of 6"):
        machine.start(labs[3])
    machine.stop(labs[0])
    await clock.advance(1)
    machine.look()
    machine.start(labs[3])


async def test_nothing_starts_before_a_compute_is_ready() -> None:
    machine, clock = make_machine(BOOT)
    lab = machine.add_lab("early", nodes=1)
    await clock.advance(4)
    with pytest.raises(CannotStartError):
        machine.start(lab)
    await clock.advance(2)
    machine.start(lab)


@pytest.mark.parametrize(
    ("held", "expected", "why"),
    [
        ([], [], "a stranger sees nothing"),
        (["lab_view"], ["lab_view"], "what was given"),
        (["lab_edit"], ["lab_edit", "lab_exec", "lab_view"], "and what that includes"),
        (["lab_view", "lab_admin"], ["lab_admin", "lab_edit", "lab_exec", "lab_view"], "the most counts"),
    ],
)
def test_rights_come_from_ownership_users_and_groups(held: list[str], expected: list[str], why: str) -> None:
    machine, clock = make_machine()
    user = student(machine)
    lab = machine.add_lab("of the admin")
    lab.associations["users"][user.id] = held
    assert machine.rights(user, lab) == expected, why
    del lab.associations["users"][user.id]
    group = Group("g", "g", clock.now(), clock.now(), members=[user.id])
    machine.directory.groups["g"] = group
    user.groups = ["g"]
    lab.associations["groups"]["g"] = held
    assert machine.rights(user, lab) == expected, why
    own = machine.add_lab("own", owner=user.id)
    assert machine.rights(user, own)[0] == "lab_admin"
    assert machine.rights(machine.admin, own)[0] == "lab_admin"


def test_an_administrator_that_is_none_sees_only_its_own() -> None:
    machine, _ = make_machine()
    theirs = machine.add_lab("theirs", owner=student(machine).id)
    fault = machine.faults.add("not-admin")
    assert machine.rights(machine.admin, theirs) == []
    machine.faults.clear(fault)
    assert machine.rights(machine.admin, theirs)


async def test_history_and_pushes_tell_of_changes_at_their_time() -> None:
    machine, clock = make_machine()
    heard: list[tuple[dict[str, Any], Lab | None]] = []
    machine.listeners["test"] = lambda message, lab: heard.append((message, lab))
    lab = machine.add_lab("told", nodes=1)
    machine.start(lab)
    assert machine.seconds_to_next() == pytest.approx(0.5)
    await clock.advance(100)
    machine.look()
    assert math.isinf(machine.seconds_to_next())
    began = clock.now().timestamp() - 100
    events = [(e.change.verb, e.change.state, e.when.timestamp() - began) for e in machine.events[lab.id]]
    assert events == [
        ("created", "", 0),
        ("state", "QUEUED", 0),
        ("state", "STARTED", 0),
        ("state", "STARTED", 0.5),
        ("state", "BOOTED", 2.5),
    ]
    assert [(m["event_type"], m["event"]) for m, _ in heard if m] == [
        ("lab_event", "created"),
        ("state_change", "QUEUED"),
        ("lab_event", "state"),
        ("state_change", "STARTED"),
        ("state_change", "BOOTED"),
    ]
    machine.remove(lab)
    assert heard[-1][0]["event"] == "deleted"
    assert lab.id not in machine.events
    categories = [e["category"] for e in machine.telemetry]
    assert categories == ["start_lab", "queue_node", "start_node", "boot_node"]
