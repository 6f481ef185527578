"""The suite's own rules hold: in CI a test that did not run has failed, elsewhere its reason is told."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]

SKIPS = {
    "a test that skips itself": "import pytest\ndef test_a(): pytest.skip('the sea is rough')\n",
    "a test with a skip mark": "import pytest\n@pytest.mark.skip(reason='the sea is rough')\ndef test_a(): pass\n",
    "a whole file": "import pytest\npytest.skip('the sea is rough', allow_module_level=True)\n",
    "a fixture that skips": (
        "import pytest\n@pytest.fixture\ndef boat(): pytest.skip('the sea is rough')\ndef test_a(boat): pass\n"
    ),
}


def _suite(folder: Path, source: str, *, ci: bool) -> subprocess.CompletedProcess[str]:
    (folder / "test_it.py").write_text(source)
    (folder / "pytest.ini").write_text("[pytest]\nmarkers = may_skip(reason): allowed\n")
    env = {key: value for key, value in os.environ.items() if key != "CI"} | ({"CI": "true"} if ci else {})
    argv = [sys.executable, "-m", "pytest", "-q", "-rs", "-p", "conftest", "-p", "no:cacheprovider", str(folder)]
    env["PYTHONPATH"] = str(TESTS)
    return subprocess.run(argv, env=env, cwd=folder, capture_output=True, text=True, timeout=60, check=False)


@pytest.mark.parametrize("source", SKIPS.values(), ids=SKIPS.keys())
def test_a_skip_is_a_failure_in_ci_that_tells_its_reason(tmp_path: Path, source: str) -> None:
    done = _suite(tmp_path, source, ci=True)
    assert done.returncode != 0
    assert "skipped in CI: " in done.stdout
    assert "the sea is rough" in done.stdout


def test_a_skip_elsewhere_passes_and_tells_its_reason(tmp_path: Path) -> None:
    done = _suite(tmp_path, SKIPS["a test that skips itself"], ci=False)
    assert done.returncode == 0, done.stdout
    assert "the sea is rough" in done.stdout
    assert "of its 1200 s" in done.stdout


def test_a_test_that_may_skip_passes_in_ci(tmp_path: Path) -> None:
    source = "import pytest\n@pytest.mark.may_skip(reason='no sea')\ndef test_a(): pytest.skip('no sea')\n"
    assert _suite(tmp_path, source, ci=True).returncode == 0
