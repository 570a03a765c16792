"""What is asked of those who contribute: workflows, issue forms and hooks, of which nothing else here makes use."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
FORMS = [path for path in sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml")) if path.stem != "config"]


@pytest.mark.parametrize(("schema", "files"), [("github-workflows", WORKFLOWS), ("github-issue-forms", FORMS)])
def test_github_understands_the_files_for_it(schema: str, files: list[Path]) -> None:
    pytest.importorskip("check_jsonschema", reason="the extra dev is not installed")
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", f"vendor.{schema}", *files]
    said = subprocess.run(command, capture_output=True, text=True)
    assert files and said.returncode == 0, said.stdout


def test_the_hooks_run_the_linters_of_ci() -> None:
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"][0]["hooks"]
    linters = re.findall(r"^(?:ruff .*|mypy)$", (ROOT / ".ci" / "run").read_text(), flags=re.MULTILINE)
    assert len(linters) == 3
    assert set(linters) <= {hook["entry"] for hook in hooks}


def test_every_python_that_is_declared_is_tested() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    declared = {name.rpartition(" ")[2] for name in project["classifiers"] if re.search(r":: 3\.\d+$", name)}
    jobs = yaml.safe_load((ROOT / ".github" / "workflows" / "tests.yml").read_text())["jobs"]
    assert declared <= set(jobs["library"]["strategy"]["matrix"]["python"])
    assert project["requires-python"] == f">={min(declared, key=lambda version: int(version.split('.')[1]))}"
