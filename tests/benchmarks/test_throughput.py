"""How well a sweep overlaps reading, forward passes and metrics, and what the command says of it."""

import json
import subprocess
import sys
from typing import Any

import pytest

from benchmarks.throughput import main

from .test_survival import ROOT


def measured(*arguments: str) -> dict[str, Any]:
    """What the last line of the command's output says; a process of its own, whose workers are forked from a server."""
    command = [sys.executable, "-m", "benchmarks.throughput", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.slow
def test_a_real_sweep_says_what_each_step_takes() -> None:
    size = ("--checkpoints", "2", "--batches", "6", "--batch-size", "4", "--workers", "1", "--device", "cpu")
    found = measured(*size, "--model", "test_resnet")
    assert (found["images"], found["checkpoints"], found["batch_size"], found["workers"]) == (48, 2, 4, 1)
    assert 0 < found["busy_share"] < 1
    assert found["images_per_second"] == pytest.approx(found["images"] / found["seconds"], rel=0.01)
    assert found["phases"]["model"] > 0 and found["phases"]["metrics"] > 0
    assert set(found["alone_ms_per_image"]) == {
        "decode",
        "copy to the device",
        "forward",
        "forward, attention, copy back",
        "metrics and intervals",
        "disk",
    }


def test_what_cannot_be_measured(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--fake", "4ms", "--device", "abacus"]) == 2
    assert "benchmarks.throughput: --device abacus: cannot be used here" in capsys.readouterr().err
    assert main(["--model", "nosuch"]) == 2
    assert "benchmarks.throughput: --model nosuch: timm has no such architecture." in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["--fake", "4"])
    assert "--fake: found '4'; expected a time with its unit, such as 4ms" in capsys.readouterr().err


@pytest.mark.benchmark
def test_the_device_works_while_others_read_and_compute() -> None:
    """Reading, forward passes and metrics of the same length: in turn the device can work half of the time, since
    loaders always read beside it. A ratio, and longer waits than in the documentation, because a busy machine adds to
    every batch what it takes Python to hand it over."""
    size = ("--fake", "8ms", "--batches", "100")
    in_turn = measured(*size, "--jobs", "1", "--metric-workers", "0", "--checkpoints", "4")["busy_share"]
    assert in_turn < 0.55
    ratio = 0.0
    for _ in range(5):
        ratio = max(ratio, measured(*size)["busy_share"] / in_turn)
        if ratio >= 1.75:
            break
    assert ratio >= 1.75  # 1.7 with only the jobs or only the metrics beside each other, 2.0 with both
