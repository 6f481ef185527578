"""Brings the etcds that no wheel has into `.cache/etcd/VERSION/`: `PYTHONPATH=tests python -m equipment.fetch_etcd`.

3.4 is Debian 12's, the current 3.5 (or later) Debian testing's. What is there already is not fetched again.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

from equipment.debian import CACHE, NotHere, fetch

FOLDER = CACHE / "etcd"
SUITES = {"3.4": "bookworm", "current": "testing"}
CURRENT = (3, 5, 28)
"""The first version without the bugs that would make a test lie: stale reads after a pause, RBAC in nested writes."""


def cached(line: str) -> Path | None:
    """The newest etcd of a line ("3.4" or "current") in the cache."""
    found = [
        (version, path)
        for path in FOLDER.glob("*/etcd")
        if (version := _numbers(path.parent.name)) and _belongs(version, line)
    ]
    return max(found)[1] if found else None


def bring(line: str) -> Path:
    """The etcd of a line, fetched if need be. Raises `NotHere`."""
    if (path := cached(line)) is None:
        version = fetch(SUITES[line], {"etcd-server": ["usr/bin/etcd"]}, FOLDER)
        if (path := cached(line)) is None:
            raise NotHere(f"Debian {SUITES[line]} has etcd {version}, which is not of the line {line}")
    return path


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".")) if re.fullmatch(r"\d+(\.\d+)+", version) else ()


def _belongs(version: tuple[int, ...], line: str) -> bool:
    return version >= CURRENT if line == "current" else version[:2] == (3, 4)


def main() -> int:
    try:
        for line in SUITES:
            print(f"etcd {line}: {bring(line)}")
    except NotHere as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
