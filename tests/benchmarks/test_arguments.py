"""Which workers the command line asks for, and what it refuses."""

from pathlib import Path

import pytest
import torch

from benchmarks.arguments import parser
from benchmarks.asked import asked_options
from benchmarks.show import main as show
from benchmarks.workers import asked_workers


def workers(*arguments: str) -> list[str]:
    args = parser("").parse_args(["--models", "x", "--data", "y", *arguments])
    return [options.device for options in asked_workers(args, asked_options(args, Path()))]


def test_one_worker_for_each_device_or_job() -> None:
    assert workers("--device", "cpu") == ["cpu"]
    assert workers("--device", "cpu", "--jobs", "3") == ["cpu"] * 3
    assert workers("--devices", "cpu,cpu") == ["cpu", "cpu"]
    assert workers("--device", "cpu", "--engine", "ray") == []


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--devices", "cpu", "--jobs", "2"], "--devices and --jobs: expected one of them"),
        (["--device", "cpu", "--address", "auto"], "--address: is of --engine ray"),
        (
            ["--device", "cpu", "--engine", "ray", "--jobs", "2", "--prefetch"],
            "--jobs, --prefetch: of this machine alone",
        ),
        (["--devices", "nonsense"], "--device nonsense: cannot be used here"),
    ],
)
def test_what_does_not_go_together(arguments: list[str], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        workers(*arguments)


@pytest.mark.skipif(torch.accelerator.is_available(), reason="there is an accelerator: all of them can be used")
def test_no_accelerator() -> None:
    with pytest.raises(ValueError, match="--devices all: found no accelerator; use --jobs N"):
        workers("--devices", "all")


def test_photographs_of_the_sample_by_name(capsys: pytest.CaptureFixture[str]) -> None:
    assert show(["sample:tea"]) == 2
    assert "sample:tea: no such photograph in the sample; expected one of astronaut, camera" in capsys.readouterr().err
