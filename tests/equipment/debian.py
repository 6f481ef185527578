"""Programs out of Debian packages, unpacked into a folder of our own: nothing of the system changes.

The mirror is the one that this machine's apt is configured with, read when it is needed. Needs apt-get, dpkg and the
Debian archive keyring, no rights. `NotHere` says why a program is not to be had.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

CACHE = Path(__file__).parents[2] / ".cache"
_KEYRING = Path("/usr/share/keyrings/debian-archive-keyring.gpg")


class NotHere(Exception):  # noqa: N818 - it reads as the sentence that it is
    """A program that cannot be had on this machine, and why."""


def mirror() -> str:
    """The first Debian archive among the sources of this machine's apt."""
    folder = Path("/etc/apt")
    sources = [folder / "sources.list", *sorted(folder.glob("sources.list.d/*.list"))]
    found: list[str] = []
    for path in filter(Path.is_file, sources):
        found += re.findall(r"^deb\s+(?:\[[^\]]*\]\s+)?(\S+)", path.read_text(), re.MULTILINE)
    for path in sorted(folder.glob("sources.list.d/*.sources")):
        for line in re.findall(r"^URIs:(.*)$", path.read_text(), re.MULTILINE):
            found += line.split()
    for address in found:
        if address.rstrip("/").endswith("/debian"):
            return address
    raise NotHere("apt on this machine knows no Debian archive")


def fetch(suite: str, packages: Mapping[str, Sequence[str]], folder: Path) -> str:
    """Put files out of a suite's packages (name → paths inside) into `folder`/VERSION; return the version.

    The version is the upstream one of the first package. Two runs may do this at once: the folder appears whole or not
    at all.
    """
    first = next(iter(packages))
    for tool in ("apt-get", "dpkg"):
        if shutil.which(tool) is None:
            raise NotHere(f"{first} comes from Debian packages, and {tool} is not here")
    if not _KEYRING.exists():
        raise NotHere(f"{first} comes from Debian packages, and {_KEYRING} is not here")
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".fetch-") as name:
        work = Path(name)
        for part in ("lists/partial", "cache/archives/partial", "unpacked", "programs"):
            (work / part).mkdir(parents=True)
        (work / "sources.list").write_text(f"deb [signed-by={_KEYRING}] {mirror()} {suite} main\n")
        (work / "status").touch()
        options = {
            "Dir::Etc::sourcelist": work / "sources.list",
            "Dir::Etc::sourceparts": "-",
            "Dir::State::Lists": work / "lists",
            "Dir::State::status": work / "status",  # what is installed here must not decide what is downloaded
            "Dir::Cache": work / "cache",
            "Acquire::Retries": "2",
            "Acquire::http::Timeout": "20",
            "APT::Sandbox::User": "",  # the folder need not be readable for apt's own user
        }
        apt = ["apt-get", "-q", *(word for key, value in options.items() for word in ("-o", f"{key}={value}"))]
        _run([*apt, "update"], work)
        _run([*apt, "download", *packages], work)
        for archive in work.glob("*.deb"):
            _run(["dpkg", "-x", str(archive), str(work / "unpacked")], work)
        for path in (path for paths in packages.values() for path in paths):
            shutil.copy2(work / "unpacked" / path, work / "programs")
        archive = next(work.glob(f"{first}_*.deb"))
        version = re.split(r"[-+]", archive.name.split("_")[1].rpartition("%3a")[2])[0]
        if not (folder / version).exists():
            (work / "programs").rename(folder / version)
        return version


def _run(argv: list[str], cwd: Path) -> None:
    done = subprocess.run(argv, cwd=cwd, capture_output=True, text=True, timeout=300, check=False)
    # apt-get update calls an archive that it could not reach a warning, and goes on with nothing.
    if done.returncode != 0 or "Failed to fetch" in done.stderr:
        raise NotHere(f"{argv[0]} {argv[-1]} failed: {(done.stderr or done.stdout).strip()[-600:]}")
