"""Which workers the command line asks for, and what it refuses."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import benchmarks.asked
import benchmarks.workers
from benchmarks.arguments import parser
from benchmarks.asked import asked_options
from benchmarks.scoring.cells import Options
from benchmarks.show import main as show
from benchmarks.workers import MOST_LOADERS, asked_answering, asked_workers


def options(*arguments: str) -> tuple[Options, list[Options]]:
    """What is asked, and each worker's part of it."""
    args = parser("").parse_args(["--models", "x", "--data", "y", *arguments])
    asked = asked_options(args, Path())
    return asked, asked_workers(args, asked)


def workers(*arguments: str) -> list[str]:
    return [worker.device for worker in options(*arguments)[1]]


def test_one_worker_for_each_device_or_job() -> None:
    assert workers("--device", "cpu") == ["cpu"]
    assert workers("--device", "cpu", "--jobs", "3") == ["cpu"] * 3
    assert workers("--devices", "cpu,cpu") == ["cpu", "cpu"]
    assert workers("--device", "cpu", "--engine", "ray") == []
    # A device that every torch has stands for an accelerator: jobs take turns on it.
    assert workers("--device", "meta") == ["meta"] * 2
    assert workers("--device", "meta", "--jobs", "3") == ["meta"] * 3
    assert workers("--device", "meta", "--jobs", "1") == ["meta"]
    assert options("--device", "meta", "--engine", "ray", "--jobs", "3")[1] == []


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--device", "cpu"], 0),
        (["--device", "cpu", "--jobs", "2", "--metric-workers", "3"], 2),  # of one device: 3 in all, rounded up
        (["--device", "meta"], 8),  # 16 cores, and two jobs
        (["--device", "meta", "--jobs", "1"], 16),
        (["--device", "meta", "--metric-workers", "0"], 0),
        (["--devices", "meta,meta:0"], 4),
    ],
)
def test_cores_compute_metrics_for_each_worker(
    arguments: list[str], expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(benchmarks.workers, "cpu_count", lambda: 16)
    args = parser("").parse_args(["--sample", *arguments])
    assert asked_answering(args, options(*arguments)[1]) == expected


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--devices", "cpu", "--jobs", "2"], "--devices and --jobs: expected one of them"),
        (["--device", "cpu", "--engine", "ray", "--metric-workers", "2"], "--metric-workers: only for --engine local"),
        (["--device", "cpu", "--address", "auto"], "--address: only for --engine ray"),
        (
            ["--device", "cpu", "--engine", "ray", "--jobs", "2", "--prefetch"],
            "--jobs, --prefetch: only for --engine local",
        ),
        (["--devices", "nonsense"], "--device nonsense: cannot be used here"),
    ],
)
def test_what_does_not_go_together(arguments: list[str], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        workers(*arguments)


@pytest.mark.parametrize(
    ("cores", "arguments", "expected"),
    [
        (2, ["--device", "cpu"], [2]),
        (1, ["--device", "cpu"], [1]),
        (16, ["--device", "cpu"], [16]),
        (256, ["--device", "cpu"], [MOST_LOADERS]),
        (16, ["--device", "cpu", "--jobs", "3"], [5, 5, 5]),
        (16, ["--devices", "meta,meta"], [8, 8, 8, 8]),  # jobs that take turns read in turn, too
        (16, ["--device", "meta"], [16, 16]),
        (2, ["--device", "cpu", "--jobs", "3"], [1, 1, 1]),
        (16, ["--devices", "meta,meta", "--workers", "0"], [0, 0, 0, 0]),
        (16, ["--device", "cpu", "--workers", "40"], [40]),
    ],
)
def test_cores_read_images_for_each_worker(
    cores: int, arguments: list[str], expected: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(benchmarks.workers, "cpu_count", lambda: cores)
    assert [worker.workers for worker in options(*arguments)[1]] == expected


def test_a_task_of_ray_reads_with_its_own_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benchmarks.workers, "cpu_count", lambda: 64)  # of the driver
    asked = ["--device", "cpu", "--engine", "ray"]
    assert options(*asked)[0].workers == 2
    assert options(*asked, "--cpus-per-cell", "8")[0].workers == 8
    assert options(*asked, "--cpus-per-cell", "8", "--workers", "3")[0].workers == 3


def test_cores_are_those_that_this_process_may_use() -> None:
    own = os.sched_getaffinity(0)
    code = "from benchmarks.workers import cpu_count; print(cpu_count())"
    one = ["taskset", "-c", str(min(own))] if shutil.which("taskset") else []
    found = subprocess.run([*one, sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert 1 <= int(found) <= (1 if one else len(own))


def test_precision_and_layout_are_those_of_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    on_cpu, _ = options("--device", "cpu")
    assert (on_cpu.amp, on_cpu.channels_last) == ("none", False)
    bf16 = ["meta"]  # devices that have it
    monkeypatch.setattr(benchmarks.asked, "precision", lambda amp, device: fake_precision(amp, device, bf16))
    (asked, (worker, _)) = options("--device", "meta")
    assert asked == worker and (asked.amp, asked.channels_last) == ("bf16", True)
    asked, _ = options("--device", "meta", "--amp", "none", "--no-channels-last")
    assert (asked.amp, asked.channels_last) == ("none", False)
    bf16.clear()
    assert options("--device", "meta")[0].amp == "none"


def fake_precision(amp: str, device: str, bf16: list[str]) -> str:
    return amp if amp != "auto" else "bf16" if device in bf16 else "none"


def test_devices_that_disagree_about_auto_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (benchmarks.asked, benchmarks.workers):
        monkeypatch.setattr(module, "precision", lambda amp, device: fake_precision(amp, device, ["meta:0"]))
    monkeypatch.setattr(benchmarks.workers, "usable_device", lambda name: name)
    monkeypatch.setattr(benchmarks.asked, "usable_device", lambda name: name)
    with pytest.raises(ValueError, match="--amp auto: found bf16 for meta:0 and none for meta:1; expected the same"):
        options("--devices", "meta:0,meta:1")
    assert {worker.amp for worker in options("--devices", "meta:0,meta:1", "--amp", "bf16")[1]} == {"bf16"}


@pytest.mark.skipif(torch.accelerator.is_available(), reason="there is an accelerator: all of them can be used")
def test_no_accelerator() -> None:
    with pytest.raises(ValueError, match="--devices all: found no accelerator; use --jobs N"):
        workers("--devices", "all")


def test_photographs_of_the_sample_by_name(capsys: pytest.CaptureFixture[str]) -> None:
    assert show(["sample:tea"]) == 2
    assert "sample:tea: no such photograph in the sample; expected one of astronaut, camera" in capsys.readouterr().err


def test_a_cache_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (file := tmp_path / "file").touch()
    for where in (file, file / "below"):
        with pytest.raises(ValueError, match=r"--cache-images .*: found the file .*file; expected a folder"):
            options("--cache-images", str(where))
    assert options("--cache-images", str(tmp_path / "a" / "b"))[0].cache_images == str(tmp_path / "a" / "b")
    assert not (tmp_path / "a").exists()
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may write everywhere
    with pytest.raises(ValueError, match=r"--cache-images .*: .* is not writable; give another folder"):
        options("--cache-images", str(tmp_path / "a"))
