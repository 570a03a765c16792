"""What ends one cell, and not the sweep: crashes, kills, too little memory, broken images, another sweep beside it."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from rich.console import Console
from timm.data import create_transform, resolve_data_config
from torch import nn

from benchmarks.checkpoints.downloads import Downloads
from benchmarks.checkpoints.find import Checkpoint
from benchmarks.data.sources import load_image_set
from benchmarks.engines.local import LocalEngine, Outcome
from benchmarks.engines.run import Run
from benchmarks.scoring.cells import Cell, Options
from benchmarks.sweep import main
from timm_csra.evaluation.scoring import DEFAULT, PLAIN

ROOT = Path(__file__).resolve().parents[2]


def save(folder: Path, seed: int = 0, **arguments: object) -> str:
    torch.manual_seed(seed)
    model = timm.create_model("test_resnet", num_classes=2, **arguments)
    timm.models.save_for_hf(model, str(folder), model_config={"label_names": ["cat", "dog"]}, safe_serialization=True)
    return f"local-dir:{folder}"


def folder(path: Path) -> str:
    path.mkdir()
    return str(path)


class Dies(Checkpoint):
    """Its process is killed while it loads."""

    def create(self, size: tuple[int, int]) -> nn.Module:
        print("last words", file=sys.stderr, flush=True)
        os.kill(os.getpid(), getattr(signal, self.id.split("/")[-1]))
        raise AssertionError("unreachable")


class Exits(Checkpoint):
    def create(self, size: tuple[int, int]) -> nn.Module:
        os._exit(7)


class Greedy(nn.Module):
    """The allocator gives up at more than four images."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if len(x) > 4:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3.00 TiB")
        return x


class NeedsMemory(Checkpoint):
    def create(self, size: tuple[int, int]) -> nn.Module:
        model = super().create(size)
        model.conv1 = nn.Sequential(Greedy(), model.conv1).eval()
        return model


class Silent(Checkpoint):
    """Logits that are not a number."""

    def create(self, size: tuple[int, int]) -> nn.Module:
        model = super().create(size)
        model.get_classifier().weight.data.fill_(float("nan"))
        return model


class Heard(LocalEngine):
    """Keeps what has come out, also where its cell is computed once more."""

    def __init__(self, options: Options) -> None:
        super().__init__([options])
        self.outcomes: list[Outcome] = []

    def poll(self, seconds: float) -> list[Outcome]:
        outcomes = super().poll(seconds)
        self.outcomes += outcomes
        return outcomes


def run(tmp_path: Path, photos: Path, checkpoint: Checkpoint, count: int = 2) -> list[dict]:
    """All records of the cells: one, or two where its process has died."""
    data = load_image_set(photos)
    cells = [Cell(checkpoint, data, "single", (64 + 32 * i,) * 2) for i in range(count)]
    options = Options((PLAIN, DEFAULT), workers=0, batch_size=12)
    out = tmp_path / "out" / type(checkpoint).__name__
    engine, run = Heard(options), Run(options, out, {}, False, Console(quiet=True))
    for _ in run.records(cells, lambda _: engine, Downloads(False, False)):
        pass
    return [outcome.record for outcome in engine.outcomes]


def said(tmp_path: Path) -> str:
    """The output of the cell of 64 pixels."""
    (log,) = (tmp_path / "out").glob("*/logs/*--64--*.log")
    return log.read_text()


@pytest.mark.parametrize("name", ["SIGSEGV", "SIGKILL"])
def test_a_dead_process_is_a_failed_record_and_is_tried_once_more(tmp_path: Path, photos: Path, name: str) -> None:
    records = run(tmp_path, photos, Dies("local-dir", folder(tmp_path / name)))
    assert [record["status"] for record in records] == ["failed"] * 4
    assert all(f"the process of this cell died of {name}" in record["reason"] for record in records)
    assert said(tmp_path).count("last words") == 2
    assert [(record["img_size"], record["attempts"]) for record in records] == [(64, 1), (64, 2), (96, 1), (96, 2)]


def test_an_exit_code_is_told(tmp_path: Path, photos: Path) -> None:
    _, record = run(tmp_path, photos, Exits("local-dir", folder(tmp_path / "x")), count=1)
    assert "ended with exit code 7" in record["reason"]


def test_the_batch_halves_when_memory_is_short(tmp_path: Path, photos: Path) -> None:
    path = save(tmp_path / "model").removeprefix("local-dir:")
    (record,) = run(tmp_path, photos, NeedsMemory("local-dir", path), count=1)
    assert (record["status"], record["batch_size"]) == ("ok", 3)
    (plain,) = run(tmp_path, photos, Checkpoint("local-dir", path), count=1)
    assert plain["batch_size"] == 12
    assert plain["all_settings"] == record["all_settings"]
    assert plain["key"] == record["key"]


def test_logits_that_are_no_numbers_fail(tmp_path: Path, photos: Path) -> None:
    path = save(tmp_path / "model").removeprefix("local-dir:")
    (record,) = run(tmp_path, photos, Silent("local-dir", path), count=1)
    assert record["status"] == "failed"
    assert "found NaN or infinite logits" in record["reason"]
    assert "Traceback" in said(tmp_path)


def sweep(out: Path, models: str, data: Path, *more: str) -> tuple[int, list[dict]]:
    arguments = ["--models", models, "--data", str(data), "--out", str(out), "--workers", "0", "--device", "cpu"]
    status = main([*arguments, "--img-size", "64", *more])
    return status, [json.loads(path.read_text()) for path in sorted((out / "records").glob("*.json"))]


def test_broken_images_are_named_or_left_out(tmp_path: Path, photos: Path) -> None:
    model = save(tmp_path / "model")
    whole = (photos / "cat" / "0.png").read_bytes()
    (photos / "cat" / "0.png").write_bytes(whole[: len(whole) // 2])
    (photos / "dog" / "1.png").write_bytes(b"no image")
    status, (record,) = sweep(tmp_path / "out", model, photos)
    assert (status, record["status"]) == (1, "failed")
    assert "2 of 12 images cannot be read: " in record["reason"]
    assert "cat/0.png: cannot be read as an image" in record["reason"]
    assert "dog/1.png: cannot be read as an image" in record["reason"]
    assert "skip them with --skip-bad-images" in record["reason"]

    status, (record,) = sweep(tmp_path / "skipped", model, photos, "--skip-bad-images")
    assert (status, record["status"], record["n"]) == (0, "ok", 10)
    assert [Path(name).name for name in record["bad_images"]] == ["0.png", "1.png"]
    for path in (photos / "cat" / "0.png", photos / "dog" / "1.png"):
        path.unlink()
    _, (without,) = sweep(tmp_path / "without", model, photos)
    assert without["all_settings"] == record["all_settings"]


def test_what_has_failed_is_done_again_only_when_asked(tmp_path: Path, photos: Path) -> None:
    model = save(tmp_path / "model")
    broken = photos / "cat" / "0.png"
    whole, state = broken.read_bytes(), broken.stat()

    def replace(content: bytes) -> None:  # by what has the same size and time: nothing tells that it is mended later
        broken.write_bytes(content)
        os.utime(broken, ns=(state.st_atime_ns, state.st_mtime_ns))

    replace(whole[:-40] + bytes(40))
    assert sweep(tmp_path / "out", model, photos)[0] == 1
    replace(whole)
    assert sweep(tmp_path / "out", model, photos)[0] == 1
    status, (record,) = sweep(tmp_path / "out", model, photos, "--retry-failed")
    assert (status, record["status"]) == (0, "ok")


def command_line(out: Path, models: str, photos: Path, *more: str) -> list[str]:
    given = ["--models", models, "--data", str(photos), "--out", str(out), "--workers", "0", "--device", "cpu"]
    return [*given, "--task", "single,mosaic", *more]


def start(*given: Any) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "benchmarks.sweep", *command_line(*given)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


def done(out: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in (out / "records").glob("[!.]*.json")}


@pytest.mark.slow
def test_killed_at_random_moments_the_table_is_the_same(tmp_path: Path, photos: Path) -> None:
    models = ",".join(save(tmp_path / f"model{seed}", seed) for seed in range(2))
    sizes = ("--img-size", "64,96,128,160")
    uninterrupted, killed = tmp_path / "uninterrupted", tmp_path / "killed"
    assert main(command_line(uninterrupted, models, photos, *sizes)) == 0
    rng = random.Random(0)
    before: dict[str, int] = {}
    for _ in range(2):
        process = start(killed, models, photos, *sizes)
        deadline = time.monotonic() + 120
        wanted = len(before) + rng.randint(1, 4)
        while len(done(killed)) < wanted:
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.01)
        time.sleep(0.3 * rng.random())
        process.send_signal(signal.SIGKILL)
        process.wait()
        after = done(killed)
        assert before.items() <= after.items(), "a finished cell was done again"
        assert all(json.loads((killed / "records" / name).read_text())["status"] == "ok" for name in after)
        before = after
    assert 0 < len(before) < 16
    assert main(command_line(killed, models, photos, *sizes)) == 0
    assert before.items() <= done(killed).items()
    assert len(done(killed)) == 16
    assert (killed / "summary.csv").read_text() == (uninterrupted / "summary.csv").read_text()


@pytest.mark.slow
def test_two_sweeps_share_a_folder(tmp_path: Path, photos: Path) -> None:
    models = ",".join(save(tmp_path / f"model{seed}", seed) for seed in range(2))
    alone, shared = tmp_path / "alone", tmp_path / "shared"
    assert main(command_line(alone, models, photos, "--img-size", "64,96")) == 0
    both = [start(shared, models, photos, "--img-size", "64,96") for _ in range(2)]
    told = [process.communicate(timeout=300)[1].decode() for process in both]
    assert [process.returncode for process in both] == [0, 0], told
    measured = sum(text.count(": ok, ") for text in told)
    assert measured == 8, "each cell is measured once, by one of them"
    assert (shared / "summary.csv").read_text() == (alone / "summary.csv").read_text()


def test_kept_scores_answer_new_settings_without_a_forward_pass(tmp_path: Path, photos: Path) -> None:
    model = save(tmp_path / "model")
    out = tmp_path / "out"
    assert sweep(out, model, photos, "--task", "mosaic,single", "--keep-scores")[0] == 0
    weights = tmp_path / "model" / "model.safetensors"
    whole = weights.read_bytes()
    fresh_status, fresh = sweep(tmp_path / "fresh", model, photos, "--task", "mosaic,single", "--lams", "0,0.1,0.7")
    assert fresh_status == 0

    image = photos / "cat" / "0.png"
    state = image.stat()
    image.write_bytes(bytes(len(image.read_bytes())))  # a forward pass would fail
    os.utime(image, ns=(state.st_atime_ns, state.st_mtime_ns))
    arguments = ("--task", "mosaic,single", "--lams", "0,0.1,0.7", "--rescore")
    status, records = sweep(out, model, photos, *arguments)
    assert status == 0
    rescored = {record["task"]: record for record in records if record["key"]["kept_scores"] == "float16"}
    assert weights.read_bytes() == whole
    for expected in fresh:
        found = rescored[expected["task"]]
        assert len(found["all_settings"]) == len(expected["all_settings"]) == 1 + 2 * 2 * 3 + 1
        for a, b in zip(found["all_settings"], expected["all_settings"], strict=True):
            assert a.pop("scores") == b.pop("scores")
            assert a == pytest.approx(b, abs=100 / 12 + 1e-6)  # half precision may turn one near-tie of 12 images
        assert found["preprocessing"] == expected["preprocessing"]
    status, records = sweep(out, model, photos, "--temperatures", "2", "--rescore")
    assert status == 1
    (failed,) = (record for record in records if record["status"] == "failed")
    assert (
        "found scores of log_softmax, T 1, 5, inf; logits, T 1, 5, inf; expected --scores and --temperatures among them"
        in failed["reason"]
    )
    status, (record,) = sweep(tmp_path / "none", model, photos, "--rescore")
    assert "run the cell with --keep-scores first" in record["reason"]


def test_dry_run_says_what_would_run(tmp_path: Path, photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = save(tmp_path / "model")
    arguments = [
        "--models",
        f"{model},pypi:tf_efficientnet_lite0",
        "--data",
        str(photos),
        "--out",
        str(tmp_path / "out"),
    ]
    arguments += ["--task", "single,mosaic", "--img-size", "64", "--device", "cpu", "--workers", "0"]
    assert main([*arguments, "--dry-run"]) == 0
    printed = capsys.readouterr().out
    assert (printed.count("to do"), printed.count("12  not applicable")) == (2, 1)
    assert "2 cells not applicable: 2 classes of the data are not among the head's: cat; dog; " in printed
    assert "mosaic 2x2" in printed
    assert "2 cells, 15 images" in printed
    assert "T multiply-accumulates: about" in printed
    assert not (tmp_path / "out").exists()
    sweep(tmp_path / "out", model, photos)
    capsys.readouterr()
    main([*arguments, "--dry-run"])
    printed = capsys.readouterr().out
    assert (printed.count("to do"), printed.count("done")) == (1, 1)


def test_all_models_on_a_cpu_are_asked_for(
    tmp_path: Path, photos: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("timm.list_models", lambda *_, **__: ["test_resnet.r160_in1k"])
    monkeypatch.setattr("benchmarks.sweep._unavailable", lambda _: {})
    monkeypatch.setattr("benchmarks.checkpoints.find.etag", lambda *_: ("a hash", None))
    monkeypatch.setattr("benchmarks.checkpoints.hub.unreachable_hub", lambda: "no network here")
    for name, synset in (("cat", "n02123045"), ("dog", "n02099601")):
        (photos / name).rename(photos / synset)
    arguments = ["--models", "all", "--data", str(photos), "--out", str(tmp_path / "out"), "--device", "cpu"]
    assert main(arguments) == 2
    told = " ".join(capsys.readouterr().err.split())
    assert "1 cells, 12 images" in told
    assert "No accelerator was found. Use --yes to confirm without a terminal." in told
    assert not (tmp_path / "out").exists()


def test_rivals_are_measured_at_their_cost(tmp_path: Path, photos: Path) -> None:
    model = save(tmp_path / "model")
    status, records = sweep(tmp_path / "out", model, photos, "--rivals")
    assert status == 0
    asked, record, larger = sorted(records, key=lambda record: record["img_size"])
    assert [one["img_size"] for one in (asked, record, larger)] == [64, 160, 320]  # 160 is the checkpoint's own
    for other in (asked, larger):
        assert not any(result["protocol"].startswith("five") for result in other["results"])
        assert other["rival_macs"] == {}
    assert record["rival_macs"] == dict.fromkeys(("five_crops_mean", "five_crops_max"), 5 * record["macs"])
    found = {r["protocol"]: r["value"] for r in record["results"] if r["metric"] == "top1"}
    # By hand: prepared for 1.25 times the size, four corners and the centre, plain model.
    plain = timm.create_model(model, pretrained=True).eval()
    config = resolve_data_config(model=plain) | {"input_size": (3, 200, 200)}
    transform = create_transform(**config)
    hits = {"five_crops_mean": [], "five_crops_max": []}
    for index, path in enumerate(sorted(photos.rglob("*.png"))):
        x = transform(Image.open(path).convert("RGB"))
        corners = [(0, 0), (0, 40), (40, 0), (40, 40), (20, 20)]
        with torch.no_grad():
            logits = plain(torch.stack([x[:, top : top + 160, left : left + 160] for top, left in corners]))
        truth = int(path.parent.name == "dog")
        hits["five_crops_mean"].append(logits.mean(0).argmax().item() == truth)
        hits["five_crops_max"].append(logits.max(0).values.argmax().item() == truth)
        assert index < 12
    for name, values in hits.items():
        assert found[name] == pytest.approx(100 * np.mean(values))


def test_sizes_that_a_model_cannot_take(tmp_path: Path, photos: Path) -> None:
    """DeiT is rebuilt and its positions resized; CrossViT's two grids do not fit, nor LeViT's attention biases."""
    names = {"crossvit_tiny_240": "not_applicable", "levit_128s": "not_applicable", "deit_tiny_patch16_224": "ok"}
    for name in names:
        timm.models.save_for_hf(
            timm.create_model(name, num_classes=2),
            str(tmp_path / name),
            model_config={"label_names": ["cat", "dog"]},
            safe_serialization=True,
        )
    models = ",".join(f"local-dir:{tmp_path / name}" for name in names)
    arguments = ["--models", models, "--data", str(photos), "--out", str(tmp_path / "out"), "--workers", "0"]
    assert main([*arguments, "--device", "cpu", "--img-size", "288", "--limit", "4", "--time-plain"]) == 0
    records = [json.loads(path.read_text()) for path in (tmp_path / "out" / "records").glob("*.json")]
    assert {record["model"].rsplit("/")[-1]: record["status"] for record in records} == names
    reasons = {record["model"].rsplit("/")[-1]: record["reason"] for record in records}
    assert reasons["crossvit_tiny_240"].startswith("the model cannot be built for 288 pixels: ")
    assert "weights do not fit the model built for another size than its own: size mis" in reasons["levit_128s"]
    cost = next(record["cost"] for record in records if record["status"] == "ok")
    assert cost["ratio"] == pytest.approx(cost["score_seconds"] / (sum(cost["plain_seconds"]) / 2))
