"""Random sequences of operations on a lab, held against what must be true after each of them."""

from __future__ import annotations

import contextlib
import itertools
from datetime import UTC, datetime

from hypothesis import given, settings
from hypothesis import strategies as st

from controllers.cml.simulator.catalog import definition
from controllers.cml.simulator.labs import ACTIVE, Lab, Node, OutOfOrderError, Pace

WHEN = datetime(2026, 1, 1, tzinfo=UTC)
PACE = Pace(queued=1, boot=4, stop=2, wipe=1)
NEXT = {
    "DEFINED_ON_CORE": {"QUEUED"},
    "QUEUED": {"STARTED", "STOPPED"},
    "STARTED": {"BOOTED", "STOPPED"},
    "BOOTED": {"STOPPED"},
    "STOPPED": {"QUEUED", "DEFINED_ON_CORE"},
}
OPERATIONS = st.tuples(
    st.sampled_from(["start", "stop", "wipe", "start_node", "stop_node", "wipe_node", "look", "power_cut"]),
    st.integers(0, 2),
    st.floats(0, 5),
)


@settings(max_examples=300, deadline=None)
@given(st.lists(OPERATIONS, max_size=25))
def test_no_sequence_leads_to_an_impossible_state(operations: list[tuple[str, int, float]]) -> None:
    """Nodes move only along their arrows, the lab's state follows them, time never runs back, and all comes to rest."""
    lab = Lab("lab", "t", "o", WHEN, WHEN)
    for n in range(3):
        lab.nodes[str(n)] = Node(str(n), f"r{n}", definition("unmanaged_switch" if n == 2 else "iosv"))
    now = 0.0
    for name, which, wait in operations:
        now += wait
        lab.advance(now)
        node = lab.nodes[str(which)]
        with contextlib.suppress(OutOfOrderError):
            if name == "power_cut":
                lab.power_cut(now)
            elif name.endswith("_node"):
                getattr(lab, name)(node, now, PACE)
            elif name != "look":
                getattr(lab, name)(now, PACE)
        _check(lab)
    lab.advance(now + 1000)
    assert lab.converged
    lab.stop(now + 1000, PACE)
    lab.advance(now + 2000)
    lab.wipe(now + 2000, PACE)
    lab.advance(now + 3000)
    assert lab.removable, "from anywhere the documented order leads to a lab that can be removed"
    _check(lab)


def _check(lab: Lab) -> None:
    states = {n.state for n in lab.nodes.values()}
    expected = "STARTED" if states & ACTIVE else "STOPPED" if "STOPPED" in states else "DEFINED_ON_CORE"
    assert lab.state == expected
    assert lab.converged == (not any(n.plan for n in lab.nodes.values()))
    assert [c.at for c in lab.outbox] == sorted(c.at for c in lab.outbox)
    for node_id in lab.nodes:
        moves = [c for c in lab.outbox if c.element == node_id]
        assert all(c.state in NEXT[c.previous] for c in moves)
        assert all(a.state == b.previous for a, b in itertools.pairwise(moves))
