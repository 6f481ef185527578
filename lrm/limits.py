"""How many files a daemon may have open at once: as many as the system grants, not as many as a shell is begun with.

The usual soft limit of 1,024 is for programs that wait with `select`. A leader holds a connection or two to each CML,
and one that has no file left for etcd loses its lease. Called once, before a daemon runs.
"""

from __future__ import annotations

import resource


def raise_open_files() -> int:
    """Raise the soft limit to the hard one; the limit that holds then."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == hard:
        return soft
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    except (ValueError, OSError):
        return soft  # where the hard limit is "infinity" some systems take no such number: what was granted stays
    return hard
