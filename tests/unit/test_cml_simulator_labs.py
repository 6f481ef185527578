"""Labs as state machines: what happens when, told by a clock that only moves when it is told to."""

from __future__ import annotations

import math
from datetime import UTC, datetime

import pytest

from controllers.cml.simulator.catalog import definition
from controllers.cml.simulator.labs import Interface, Lab, Link, Node, OutOfOrderError, Pace

PACE = Pace(queued=1, boot=10, stop=2, wipe=3)
WHEN = datetime(2026, 1, 1, tzinfo=UTC)


def make_lab(*kinds: str) -> Lab:
    lab = Lab("lab", "title", "owner", WHEN, WHEN)
    for n, kind in enumerate(kinds):
        node = Node(f"n{n}", f"r{n}", definition(kind))
        node.interfaces = [Interface(f"n{n}i{slot}", node, f"eth{slot}", slot) for slot in range(2)]
        lab.nodes[node.id] = node
    return lab


def states(lab: Lab) -> list[str]:
    return [n.state for n in lab.nodes.values()]


@pytest.mark.parametrize(
    ("at", "expected", "converged", "why"),
    [
        (0, "QUEUED", False, "a start is accepted at once"),
        (0.9, "QUEUED", False, "and waits in the queue"),
        (1, "STARTED", False, "a state begins at its moment, not after it"),
        (10.9, "STARTED", False, "booting takes its time"),
        (11, "BOOTED", True, "and ends"),
        (1e6, "BOOTED", True, "for good"),
    ],
)
def test_a_started_node_passes_every_state_in_time(at: float, expected: str, converged: bool, why: str) -> None:
    lab = make_lab("iosv")
    lab.start(0, PACE)
    lab.advance(at)
    assert (states(lab), lab.converged) == ([expected], converged), why
    assert lab.state == "STARTED"


def test_since_210_a_node_is_starting_before_it_is_started() -> None:
    lab = make_lab("iosv")
    lab.start(0, Pace(queued=1, boot=10, stop=2, wipe=3, starting=True))
    lab.advance(0.5)
    assert (states(lab), lab.state) == (["STARTING"], "STARTED")
    lab.advance(1)
    assert states(lab) == ["STARTED"]


def test_changes_bear_their_own_time_however_late_one_looks() -> None:
    lab = make_lab("iosv", "unmanaged_switch")
    lab.start(5, PACE)
    lab.advance(1000)
    seen = [(c.at, c.element, c.state) for c in lab.outbox if c.verb == "state"]
    assert seen == [
        (5, "n0", "QUEUED"),
        (5, "lab", "STARTED"),
        (5, "n1", "QUEUED"),
        (6, "n0", "STARTED"),
        (6, "n1", "STARTED"),
        (6, "n1", "BOOTED"),
        (16, "n0", "BOOTED"),
    ]


def test_the_whole_order_is_enforced_and_ends_where_it_began() -> None:
    lab = make_lab("iosv")
    assert lab.removable
    lab.start(0, PACE)
    lab.advance(20)
    assert not lab.removable
    with pytest.raises(OutOfOrderError):
        lab.wipe(20, PACE)
    lab.stop(20, PACE)
    assert (states(lab), lab.state, lab.converged) == (["BOOTED"], "STARTED", False), "a stop takes time"
    with pytest.raises(OutOfOrderError):
        lab.wipe(21, PACE)
    lab.advance(22)
    assert (states(lab), lab.state, lab.converged) == (["STOPPED"], "STOPPED", True)
    assert not lab.removable, "it has disks"
    lab.wipe(22, PACE)
    assert not lab.removable, "a wipe takes time"
    lab.advance(25)
    assert (states(lab), lab.state) == (["DEFINED_ON_CORE"], "DEFINED_ON_CORE")
    assert lab.removable


def test_repeats_change_nothing() -> None:
    """A client that repeats after a lost answer must not restart what runs or prolong what ends."""
    lab = make_lab("iosv")
    lab.start(0, PACE)
    lab.advance(5)
    lab.start(5, PACE)
    lab.advance(11)
    assert states(lab) == ["BOOTED"]
    lab.stop(11, PACE)
    lab.stop(12, PACE)
    lab.advance(13)
    assert states(lab) == ["STOPPED"]
    lab.wipe(13, PACE)
    lab.wipe(15, PACE)
    lab.advance(16)
    assert lab.removable


def test_a_start_during_a_stop_is_carried_out_after_it() -> None:
    lab = make_lab("iosv")
    lab.start(0, PACE)
    lab.advance(20)
    lab.stop(20, PACE)
    lab.start(21, PACE)
    lab.advance(22)
    assert states(lab) == ["QUEUED"]
    lab.advance(33)
    assert states(lab) == ["BOOTED"]
    assert [c.state for c in lab.outbox if c.element == "n0"][-4:] == ["STOPPED", "QUEUED", "STARTED", "BOOTED"]


def test_a_stop_during_a_boot_ends_it() -> None:
    lab = make_lab("iosv")
    lab.start(0, PACE)
    lab.advance(3)
    lab.stop(3, PACE)
    lab.advance(1000)
    assert (states(lab), lab.converged) == (["STOPPED"], True)


def test_a_stop_takes_back_a_start_that_still_waits_for_a_stop() -> None:
    lab = make_lab("iosv")
    lab.start(0, PACE)
    lab.advance(20)
    lab.stop(20, PACE)
    lab.start(21, PACE)
    lab.stop(21.5, PACE)
    lab.advance(22)
    assert (states(lab), lab.converged) == (["STOPPED"], True), "and does not prolong it"


def test_a_stop_takes_back_a_start_that_still_waits_for_a_wipe() -> None:
    lab = make_lab("iosv")
    lab.start(0, PACE)
    lab.stop(0, PACE)
    lab.advance(2)
    lab.wipe(2, PACE)
    lab.start(3, PACE)
    lab.stop(4, PACE)
    lab.advance(5)
    assert (states(lab), lab.converged) == (["DEFINED_ON_CORE"], True)


def test_a_start_during_a_wipe_waits_for_it() -> None:
    lab = make_lab("iosv")
    lab.start(0, PACE)
    lab.advance(20)
    lab.stop(20, PACE)
    lab.advance(22)
    lab.wipe(22, PACE)
    lab.start(23, PACE)
    with pytest.raises(OutOfOrderError):
        lab.wipe(24, PACE)
    lab.advance(25)
    assert states(lab) == ["QUEUED"]
    lab.advance(100)
    assert states(lab) == ["BOOTED"]


def test_a_lab_is_started_while_one_node_is() -> None:
    lab = make_lab("iosv", "iosv")
    first, second = lab.nodes.values()
    lab.start_node(first, 0, PACE)
    lab.advance(20)
    assert (states(lab), lab.state) == (["BOOTED", "DEFINED_ON_CORE"], "STARTED")
    lab.start_node(second, 20, PACE)
    lab.stop_node(first, 20, PACE)
    lab.advance(22)
    assert (states(lab), lab.state) == (["STOPPED", "STARTED"], "STARTED")
    lab.stop_node(second, 22, PACE)
    lab.advance(24)
    assert lab.state == "STOPPED"
    lab.wipe_node(first, 24, PACE)
    lab.advance(27)
    assert lab.state == "STOPPED", "the other still has a disk"
    lab.wipe_node(second, 27, PACE)
    lab.advance(30)
    assert lab.state == "DEFINED_ON_CORE"


def test_an_empty_lab_can_be_started_stopped_and_wiped_too() -> None:
    lab = make_lab()
    lab.start(0, PACE)
    assert (lab.state, lab.converged, lab.removable) == ("STARTED", True, False)
    with pytest.raises(OutOfOrderError):
        lab.wipe(0, PACE)
    lab.stop(0, PACE)
    assert lab.state == "STOPPED"
    lab.wipe(0, PACE)
    assert lab.removable


def test_links_and_interfaces_follow_their_nodes() -> None:
    lab = make_lab("iosv", "iosv")
    first, second = lab.nodes.values()
    link = lab.links["l"] = Link("l", "l", first.interfaces[0], second.interfaces[0])
    assert link.state == "DEFINED_ON_CORE"
    lab.start_node(first, 0, PACE)
    lab.advance(1)
    assert (first.interfaces[0].state, link.state) == ("STARTED", "STOPPED")
    lab.start_node(second, 1, PACE)
    lab.advance(2)
    assert link.state == "STARTED"
    first.interfaces[0].down = True
    assert link.state == "STOPPED"


def test_a_power_cut_stops_what_ran_and_forgets_what_was_planned() -> None:
    lab = make_lab("iosv", "iosv")
    first = next(iter(lab.nodes.values()))
    lab.start_node(first, 0, PACE)
    lab.power_cut(5)
    assert (states(lab), lab.state, lab.due) == (["STOPPED", "DEFINED_ON_CORE"], "STOPPED", math.inf)
    lab.advance(1000)
    assert states(lab) == ["STOPPED", "DEFINED_ON_CORE"]


def test_each_change_makes_old_views_stale() -> None:
    lab = make_lab("iosv")
    lab.start(0, PACE)
    versions = [lab.version]
    for at in (1, 11):
        lab.advance(at)
        versions.append(lab.version)
    lab.advance(12)
    assert versions[0] < versions[1] < versions[2] == lab.version
