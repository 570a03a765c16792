"""The folders of the harness: which imports which, and the list of its commands."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
BELOW = {
    "records": set(),
    "data": set(),
    "checkpoints": set(),
    "scoring": {"records", "data", "checkpoints"},
    "reporting": {"records", "checkpoints"},
    "engines": {"records", "data", "checkpoints", "scoring"},
}


def test_every_folder_is_in_the_table() -> None:
    assert {file.parent.name for file in BENCHMARKS.glob("*/__init__.py")} == set(BELOW)


@pytest.mark.parametrize("package", BELOW)
def test_packages_import_only_from_below(package: str) -> None:
    for file in (BENCHMARKS / package).glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.level:
                above = node.level == 2 and (node.module or "").split(".")[0] not in BELOW[package]
                assert not above, f"{file.name} of {package} imports from {node.module}"
            modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            modules += [str(node.module)] if isinstance(node, ast.ImportFrom) and not node.level else []
            assert not any(module.split(".")[0] == "benchmarks" for module in modules), file


def test_the_commands_are_listed() -> None:
    said = subprocess.run([sys.executable, "-m", "benchmarks"], capture_output=True, text=True, check=True).stdout
    for command in ("sweep", "tune", "show", "report", "overhead", "coverage"):
        assert f"python -m benchmarks.{command}\n" in said
    assert "argument" not in said


def test_a_command_ends_without_a_search_for_cycles() -> None:
    """Handlers run in reverse: the one that looks is the last."""
    look = "import atexit, gc; atexit.register(lambda: print(gc.get_freeze_count() > 0)); import benchmarks"
    assert subprocess.run([sys.executable, "-c", look], capture_output=True, text=True).stdout == "True\n"
