"""Figures of other software are other figures; what is asked of the same scores needs no forward pass."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image

from benchmarks.arguments import parser
from benchmarks.asked import asked_options
from benchmarks.checkpoints.find import Checkpoint
from benchmarks.data.datasets import ImageSet
from benchmarks.records.files import record_path
from benchmarks.scoring import software
from benchmarks.scoring.cells import Cell, Options
from benchmarks.scoring.kept import scores_file
from benchmarks.sweep import main
from timm_csra.evaluation.scoring import DEFAULT, PLAIN

from .golden import FOLDER, NOW


@pytest.mark.parametrize("name", NOW)
def test_figures_change_with_their_version_alone(name: str) -> None:
    version, compute = NOW[name]
    path = FOLDER / f"{name}-{version}.json"
    say = f"raise {name.upper()} in benchmarks/scoring/software.py, then run python -m tests.benchmarks.golden"
    assert path.is_file(), say
    found, expected = (dict(flat(figures)) for figures in (compute(), json.loads(path.read_text())))
    assert found.keys() == expected.keys(), say
    differ = [where for where, value in expected.items() if not same(found[where], value)]
    assert not differ, f"{len(differ)} figures are not those of version {version}, such as {differ[0]}: {say}"


def flat(figures: Any, where: str = "") -> list[tuple[str, Any]]:
    if isinstance(figures, (dict, list)):
        items = figures.items() if isinstance(figures, dict) else enumerate(figures)
        return [pair for name, value in items for pair in flat(value, f"{where}/{name}")]
    return [(where, figures)]


def same(found: Any, expected: Any) -> bool:
    if isinstance(found, float) and isinstance(expected, (int, float)):
        return bool(np.isclose(found, expected, rtol=1e-3, atol=1e-3))
    return bool(found == expected)


def cell(tmp_path: Path) -> Cell:
    file = tmp_path / "weights.bin"
    file.write_bytes(b"weights")
    return Cell(Checkpoint("local-dir", str(tmp_path)), ImageSet("d", (), (), ("a",)), "single", (64, 64))


@pytest.mark.parametrize("package", ["pillow", "torchvision", "numpy", "torch", "timm"])
def test_a_pass_depends_on_what_decodes_and_computes(
    package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options, of = Options((PLAIN, DEFAULT), kept_scores="scores"), cell(tmp_path)
    before = record_path(tmp_path, of.key(options)), scores_file(of, options)
    versions = software.versions
    monkeypatch.setattr(software, "versions", lambda *names: {**versions(*names), **({package: "99"} if package in names else {})})  # fmt: skip
    after = record_path(tmp_path, of.key(options)), scores_file(of, options)
    assert before[0] != after[0] and before[1] != after[1]


@pytest.mark.parametrize("package", ["torchmetrics", "scipy", "statsmodels", "EVALUATION"])
def test_an_answer_depends_on_what_evaluates_and_its_pass_does_not(
    package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options, of = Options((PLAIN, DEFAULT), kept_scores="scores"), cell(tmp_path)
    before = record_path(tmp_path, of.key(options)), scores_file(of, options)
    versions = software.versions
    monkeypatch.setattr(software, "versions", lambda *names: {**versions(*names), **({package: "99"} if package in names else {})})  # fmt: skip
    if package == "EVALUATION":
        monkeypatch.setattr(software, "EVALUATION", software.EVALUATION + 1)
    after = record_path(tmp_path, of.key(options)), scores_file(of, options)
    assert before[0] != after[0] and before[1] == after[1]


def test_tf32_is_another_pass_on_cuda_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cuda, cpu = (Options((PLAIN, DEFAULT), device=device, kept_scores="scores") for device in ("cuda:0", "cpu"))
    of = cell(tmp_path)
    before = of.identity(cuda), of.identity(cpu)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", not torch.backends.cudnn.allow_tf32)
    convolutions = of.identity(cuda)
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: "high")
    both = of.identity(cuda)
    assert len({before[0].scores, convolutions.scores, both.scores}) == 3
    assert of.identity(cpu) == before[1]
    assert both.compared != before[0].compared  # and is not compared with the other


def test_new_evaluation_code_answers_from_kept_scores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = timm.create_model("test_resnet", num_classes=2)
    labels = {"label_names": ["cat", "dog"]}
    timm.models.save_for_hf(model, str(tmp_path / "model"), model_config=labels, safe_serialization=True)
    for index in range(8):
        folder = tmp_path / "photos" / labels["label_names"][index % 2]
        folder.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (40, 30), (30 * index, 200 - 20 * index, 99)).save(folder / f"{index}.png")
    out = tmp_path / "out"
    arguments = ["--models", f"local-dir:{tmp_path / 'model'}", "--data", str(tmp_path / "photos"), "--out", str(out)]
    arguments += ["--device", "cpu", "--workers", "0", "--img-size", "64"]
    assert main([*arguments, "--keep-scores"]) == 0
    monkeypatch.setattr(software, "EVALUATION", 99)
    assert main([*arguments, "--rescore"]) == 0
    records = [json.loads(path.read_text()) for path in (out / "records").glob("*.json")]
    versions = {record["key"]["evaluation"]["version"]: record for record in records}
    assert versions.keys() == {software.EVALUATION, NOW["evaluation"][0]}
    assert "model" in versions[NOW["evaluation"][0]]["phases"] and "model" not in versions[99]["phases"]
    assert len(list((out / "scores").iterdir())) == 1


NAMES = """
    model weights data data_fingerprint task img_size grid settings crop_mode crop_pct seed device amp activation
    average_precision class_map skip_bad_images kept_scores rivals tf32 versions scoring evaluation
"""


def test_the_key_of_a_cell_on_a_cpu_has_the_names_that_it_always_had(tmp_path: Path) -> None:
    """Records made on a CPU before there were `--amp auto` and channels_last are found again."""
    asked = asked_options(parser("").parse_args(["--device", "cpu"]), Path())
    key = cell(tmp_path).key(asked)
    assert list(key) == NAMES.split()
    assert (key["device"], key["amp"]) == ("cpu", "none")


def test_the_record_of_a_cell_on_a_cpu_has_the_name_that_it_always_had(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(software, "versions", lambda *packages: dict.fromkeys(packages, "1.0"))
    monkeypatch.setattr(software, "SCORING", 1)
    monkeypatch.setattr(software, "EVALUATION", 1)
    checkpoint = SimpleNamespace(name="one", fingerprint="1234")
    of = Cell(checkpoint, ImageSet("d", (), (), ("a",)), "single", (64, 64))  # type: ignore[arg-type]
    asked = replace(asked_options(parser("").parse_args(["--device", "cpu"]), Path()), settings=(PLAIN, DEFAULT))
    name = "one--d--single--64--1fcba76a91c12511.json"  # before there was `--amp auto`
    assert record_path(Path("out"), of.key(asked)) == Path("out", "records", name)


def test_precision_and_layout_are_in_the_key_of_an_accelerator(tmp_path: Path) -> None:
    of, plain = cell(tmp_path), Options((PLAIN, DEFAULT), device="meta")
    ways = [plain, replace(plain, amp="bf16"), replace(plain, channels_last=True)]
    keys = [of.key(options) for options in ways]
    assert [(key["amp"], key.get("channels_last")) for key in keys] == [("none", None), ("bf16", None), ("none", True)]
    assert len({of.identity(options).scores for options in ways}) == 3
    assert len({of.identity(options).compared for options in ways}) == 3
