"""The README is run: its shell blocks, in order, in one shell; `make test` is this suite itself."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from equipment.engine import Engine
from lrm.processes import free_port

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"^```sh\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


def environment() -> dict[str, str]:
    ours = {k: v for k, v in os.environ.items() if not k.startswith(("LRM_", "AWS_", "KUBE"))}
    return {**ours, "PATH": f"{Path(sys.executable).parent}:{ours['PATH']}", "KUBECONFIG": os.devnull}


def test_it_opens_with_the_two_commands() -> None:
    assert [line.split("#")[0].strip() for line in BLOCKS[0].splitlines()] == ["make demo", "make test"]


def test_every_make_target_that_it_names_exists() -> None:
    named = set(re.findall(r"`make (\w+)`", README)) | {"demo", "test"}
    targets = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert named <= targets


def test_the_demos_that_it_names_are_those_that_test_demos_plays() -> None:
    named = re.findall(r"^python examples/demo_(\w+)\.py --self-contained$", README, re.MULTILINE)
    suite = (ROOT / "tests" / "integration" / "test_demos.py").read_text()
    played = re.findall(r'\("(\w+)", \d+\)', suite)
    assert sorted(named) == sorted(played)


def test_every_file_that_it_links_to_exists() -> None:
    links = re.findall(r"\]\(([^)#:]+)\)", README)
    assert links
    assert [link for link in links if not (ROOT / link).exists()] == []


@pytest.mark.timeout(300)
def test_every_command_does_what_it_should(tmp_path: Path, kubectl_program: Path) -> None:
    port = free_port()
    script = "\n".join(block for block in BLOCKS[1:])
    assert "kubectl" in script
    script = script.replace("8000", str(port)).replace("/tmp/lrm-try", str(tmp_path / "try"))
    script = script.replace(". .venv/bin/activate\n", "")  # the suite runs in that environment, wherever it is
    script = re.sub(
        r"^(lrm dev .*) &$",
        r"\1 >/dev/null & dev=$!; trap 'kill $dev; wait $dev || true' EXIT",
        script,
        flags=re.MULTILINE,
    )
    env = environment()
    env["PATH"] = f"{kubectl_program.parent}:{env['PATH']}"
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-x", "-c", script],
        cwd=ROOT,
        env=env,
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, f"{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    assert "labworker.lab.neuroglia.io/ccna-1 condition met" in done.stdout
    assert 'labworker.lab.neuroglia.io "ccna-1" deleted' in done.stdout


def test_every_setting_that_it_names_exists() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "lrm", "config", "show"],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    known = {f"LRM_{name.upper()}" for name in re.findall(r"^(\w+):", done.stdout, re.MULTILINE)} | {"LRM_CONFIG"}
    assert set(re.findall(r"`(LRM_[A-Z_]+)`", README)) <= known


@pytest.mark.timeout(300)
def test_the_demo_shows_all_its_claims(engine: Engine) -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "examples" / "demo.py")],
        env={**environment(), "LRM_DOCKER_HOST": engine.host, "LRM_DEMO_IMAGE": engine.busybox_image},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert "all 15 claims were observed" in done.stdout
