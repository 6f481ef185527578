"""Brings a kubectl that is new enough into `.cache/kubectl/VERSION/`, where the machine has none.

`PYTHONPATH=tests python -m equipment.fetch_kubectl`; Debian stable's is 1.20, so it is Debian testing's.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

from equipment.debian import CACHE, NotHere, fetch

FOLDER = CACHE / "kubectl"
OLDEST = (1, 27)


def bring() -> Path:
    """A kubectl of at least 1.27: from PATH, from the cache, else fetched. Raises `NotHere`."""
    places = [shutil.which("kubectl"), *map(str, sorted(FOLDER.glob("*/kubectl")))]
    for place in filter(None, places):
        if _version(place) >= OLDEST:
            return Path(place)
    version = fetch("testing", {"kubectl": ["usr/bin/kubectl"]}, FOLDER)
    return FOLDER / version / "kubectl"


def _version(program: str) -> tuple[int, int]:
    """What it says it is; (0, 0) for one that says nothing, which is then not used."""
    done = subprocess.run(
        [program, "version", "--client", "-o", "json"], capture_output=True, text=True, timeout=30, check=False
    )
    if done.returncode != 0:
        return (0, 0)
    version = json.loads(done.stdout)["clientVersion"]
    return int(version["major"]), int(version["minor"].rstrip("+"))


def main() -> int:
    try:
        print(f"kubectl: {bring()}")
    except NotHere as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
