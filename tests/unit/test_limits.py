"""A daemon takes all the open files that it may have."""

from __future__ import annotations

import subprocess
import sys

_LOWERED = """
import resource
from lrm.limits import raise_open_files
resource.setrlimit(resource.RLIMIT_NOFILE, ({soft}, 512))
print(raise_open_files(), *resource.getrlimit(resource.RLIMIT_NOFILE))
"""


def _limits_after(soft: int) -> list[str]:
    code = [sys.executable, "-c", _LOWERED.format(soft=soft)]
    return subprocess.run(code, capture_output=True, text=True, check=True, timeout=60).stdout.split()


def test_the_soft_limit_becomes_the_hard_one() -> None:
    assert _limits_after(256) == ["512", "512", "512"]


def test_a_limit_that_is_as_high_as_it_can_be_stays() -> None:
    assert _limits_after(512) == ["512", "512", "512"]
