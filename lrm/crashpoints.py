"""Named moments at which a robustness test kills the process, as a power cut would.

Each call stands between two steps of which only one may have been made. In production it is one dictionary look-up;
`LRM_CRASH_AT=name` or `name:3` (the third time) ends the process there without any clean-up.
"""

from __future__ import annotations

import os

_wanted, _, _times = os.environ.get("LRM_CRASH_AT", "").partition(":")
_left = {_wanted: int(_times or 1)} if _wanted else {}

EXIT_CODE = 137
"""What a killed process reports, so that a test can tell a crash from a failure."""


def crash_point(name: str) -> None:
    """End the process here if this point was asked for."""
    if name not in _left:
        return
    _left[name] -= 1
    if _left[name] == 0:
        os._exit(EXIT_CODE)
