"""The steps from the state that a lab is in to the one that is wanted of it: a table, and nothing else.

CML wants labs stopped before they are wiped, and wiped before they are deleted. A state that is none of CML's three
is on its way to somewhere: nothing is sent, the lab is looked at again.
"""

from __future__ import annotations

from enum import StrEnum

STARTED, STOPPED, DEFINED_ON_CORE = "STARTED", "STOPPED", "DEFINED_ON_CORE"


class Step(StrEnum):
    """What can be asked of CML; the value is the reason under which the record tells of it."""

    START = "Starting"
    STOP = "Stopping"
    WIPE = "Wiping"


REACHED = True
WAIT = None

_STEPS: dict[tuple[str, str], Step | bool] = {
    (STARTED, STARTED): REACHED,
    (STARTED, STOPPED): Step.START,
    (STARTED, DEFINED_ON_CORE): Step.START,
    (STOPPED, STARTED): Step.STOP,
    (STOPPED, STOPPED): REACHED,
    # A lab that was never started, or was wiped, does not run: there is nothing to stop.
    (STOPPED, DEFINED_ON_CORE): REACHED,
    (DEFINED_ON_CORE, STARTED): Step.STOP,
    (DEFINED_ON_CORE, STOPPED): Step.WIPE,
    (DEFINED_ON_CORE, DEFINED_ON_CORE): REACHED,
}


def next_step(wanted: str, state: str) -> Step | bool | None:
    """The step to take, `REACHED`, or `WAIT` for a state that is not one to rest in."""
    return _STEPS.get((wanted, state), WAIT)
