"""Borders that import-linter cannot see: it knows packages of others only as a whole."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = ("storage", "lrm", "controllers")
DRAWS_A_TREE = {"errors.py", "base.py"}
"""Modules whose docstring is the drawing of an error tree, or the list of the store's promises."""
MAY_SERVE = re.compile(r"lrm/api/.*|controllers/\w+/(routes\.py|simulator/.*)")


def sources() -> Iterator[tuple[str, ast.Module]]:
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            yield path.relative_to(ROOT).as_posix(), ast.parse(path.read_text())


def imports(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def test_only_the_api_routes_and_simulators_serve_http() -> None:
    serving = {path for path, tree in sources() if any(name.startswith("aiohttp.web") for name in imports(tree))}
    assert serving, "the API serves HTTP, so this test looks in the wrong place"
    assert {path for path in serving if not MAY_SERVE.fullmatch(path)} == set()


def test_every_module_says_in_at_most_twelve_lines_what_it_promises() -> None:
    wrong = {}
    for path, tree in sources():
        docstring = ast.get_docstring(tree)
        long = len((docstring or "").splitlines()) > 12 and Path(path).name not in DRAWS_A_TREE
        if docstring is None or long:
            wrong[path] = docstring
    assert wrong == {}


@pytest.mark.parametrize("folder", ["storage", "lrm", "controllers", "examples"])
def test_no_file_speaks_of_a_folder_of_one_machine(folder: str) -> None:
    homes = re.compile(r"/(home|root|work|Users)/\w")
    found = [p.name for p in (ROOT / folder).rglob("*.py") if homes.search(p.read_text())]
    assert found == []
