"""The sweep as a user starts it: small checkpoints and images made here, and real ones where they are at hand."""

import csv
import importlib.resources
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file
from timm.data import ImageNetInfo, create_loader, resolve_data_config

import timm_csra
from benchmarks.reporting import overview
from benchmarks.sweep import main

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Thirty images of three classes."""
    root = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(0)
    for index in range(30):
        folder = root / ("cat", "dog", "fish")[index % 3]
        folder.mkdir(exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (50, 70, 3), dtype=np.uint8)).save(folder / f"{index}.png")
    return root


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_checkpoint(tmp_path_factory.mktemp("resnet"), ["dog", "fish", "cat", "bird"])


def make_checkpoint(folder: Path, labels: list[str]) -> str:
    torch.manual_seed(0)
    model = timm.create_model("test_resnet", num_classes=len(labels))
    timm.models.save_for_hf(model, str(folder), model_config={"label_names": labels}, safe_serialization=True)
    return f"local-dir:{folder}"


def sweep(out: Path, models: str, data: Path, *more: str) -> tuple[int, list[dict], list[dict]]:
    arguments = ["--models", models, "--data", str(data), "--out", str(out), "--workers", "0", "--device", "cpu", *more]
    status = main(arguments)
    records = [json.loads(path.read_text()) for path in sorted((out / "records").glob("*.json"))]
    with (out / "summary.csv").open(newline="") as file:
        return status, records, list(csv.DictReader(file))


def test_end_to_end(tmp_path: Path, photos: Path, checkpoint: str, capsys: pytest.CaptureFixture[str]) -> None:
    status, records, rows = sweep(tmp_path, checkpoint, photos, "--task", "single,mosaic", "--img-size", "64,1x")
    assert status == 0
    assert {(r["task"], r["img_size"], r["n"], r["columns"]) for r in records} == {
        (task, size, n, 3) for task, n in (("single", 30), ("mosaic", 7)) for size in (64, 160)
    }
    assert {row["metric"] for row in rows} == {"top1", "mAP", "lrap", "r_precision"}
    first = {row["protocol"]: (row["scores"], row["lam"], row["temperature"]) for row in rows[:5]}
    assert list(first) == ["fixed", "fixed_log_softmax", "log_softmax_vs_logits", "crossfit", "best"]
    assert first["fixed"] == ("logits", "0.1", "inf")
    assert first["fixed_log_softmax"] == first["log_softmax_vs_logits"] == ("log_softmax", "0.3", "inf")
    assert rows[2]["baseline"] == rows[0]["value"]
    for row in rows:
        gain = float(row["value"]) - float(row["baseline"])
        assert float(row["gain"]) == pytest.approx(gain, abs=2e-4)
        if row["protocol"] == "best":
            assert row["ci_low"] == row["ci_high"] == ""
        else:
            assert float(row["ci_low"]) <= float(row["gain"]) + 2e-4
            assert float(row["gain"]) <= float(row["ci_high"]) + 2e-4
    record = records[0]
    assert record["status"] == "ok"
    assert record["kind"] == "exact"
    assert len(record["weights_sha256"]) == 64
    assert record["environment"]["packages"]["timm"] == timm.__version__
    assert len(record["all_settings"]) == 1 + 2 * 8 * 3
    curves = [
        (r["scores"], float(r["lam"])) for r in record["results"] if r["protocol"] == "curve" and r["metric"] == "mAP"
    ]
    lams = [0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 1.0, 2.0]
    assert curves == [(scores, lam) for scores in ("logits", "log_softmax") for lam in lams]
    single = next(record for record in records if record["task"] == "single")
    assert set(single["calibration"]) == {"plain", "fixed", "fixed, logits / (1 + lam)", "fixed_log_softmax"}
    printed = capsys.readouterr().out
    assert "crossfit" in printed
    assert "4 records" in printed
    assert re.search(
        r"photos\d, mosaic 2x2, 1x, mAP: log_softmax better than logits on \d checkpoints, worse on \d,", printed
    )


@pytest.mark.parametrize(
    ("scores", "fixed", "count"),
    [("logits", {"fixed"}, 1 + 2), ("log_softmax", {"fixed", "fixed_log_softmax", "log_softmax_vs_logits"}, 1 + 1 + 2)],
)
def test_the_fixed_settings_are_always_measured(
    scores: str, fixed: set[str], count: int, tmp_path: Path, photos: Path, checkpoint: str
) -> None:
    more = ("--img-size", "64", "--scores", scores, "--lams", "0.7", "--temperatures", "5")
    status, (record,), rows = sweep(tmp_path, checkpoint, photos, *more)
    assert status == 0
    assert {row["protocol"] for row in rows} - {"crossfit", "best", "max_pool"} == fixed
    assert len(record["all_settings"]) == count


def test_a_second_run_does_only_what_is_missing(tmp_path: Path, photos: Path, checkpoint: str) -> None:
    _, _, rows = sweep(tmp_path, checkpoint, photos, "--task", "single,mosaic", "--img-size", "64")
    first, second = sorted((tmp_path / "records").iterdir())
    before = second.stat().st_mtime_ns
    first.unlink()
    _, _, again = sweep(tmp_path, checkpoint, photos, "--task", "single,mosaic", "--img-size", "64")
    assert again == rows
    assert second.stat().st_mtime_ns == before
    _, records, _ = sweep(tmp_path, checkpoint, photos, "--task", "single", "--img-size", "64", "--seed", "1")
    assert len(records) == 3  # another seed is another result


def test_a_broken_record_is_measured_again_and_another_is_left_alone(
    tmp_path: Path, photos: Path, checkpoint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    more = ("--task", "single,mosaic", "--img-size", "64")
    _, _, rows = sweep(tmp_path, checkpoint, photos, *more)
    mine, other = sorted((tmp_path / "records").iterdir())
    whole, untouched = mine.read_text(), other.stat().st_mtime_ns
    mine.write_text(whole[: len(whole) // 2])
    foreign = tmp_path / "records" / "foreign.json"
    foreign.write_text("")
    capsys.readouterr()
    again = ["--models", checkpoint, "--data", str(photos), "--out", str(tmp_path), "--device", "cpu", "--workers", "0"]
    assert main([*again, *more, "--dry-run"]) == 0
    states = capsys.readouterr().out
    assert states.count("to do") == 1 and states.count("done") == 1
    assert main([*again, *more]) == 0
    said = capsys.readouterr().err
    assert f"{mine}: found truncated or invalid JSON" in said and "It is replaced." in said
    assert f"{foreign}: found an empty file, expected the record of a finished cell. It is skipped: run" in said
    with (tmp_path / "summary.csv").open(newline="") as file:
        assert list(csv.DictReader(file)) == rows  # no times: two runs are equal
    assert other.stat().st_mtime_ns == untouched
    assert foreign.read_text() == ""


def test_a_long_sweep_prints_verdicts_and_extremes(
    tmp_path: Path, photos: Path, checkpoint: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(overview, "MANY", 3)
    other = make_checkpoint(tmp_path / "other", ["dog", "fish"])
    sweep(tmp_path / "out", f"{checkpoint},{other}", photos, "--task", "single,mosaic", "--img-size", "64")
    printed = capsys.readouterr().out
    text = " ".join(printed.split())
    assert text.index("Checkpoints by verdict") < text.index("Largest gains") < text.index("Largest losses")
    assert "r_precision fixed" in text and "max_pool" not in text  # verdicts by all metrics, and no table of all cells
    assert "2 cells not_applicable: 1 classes of the data are not among the head's: cat" in text
    assert "2 of 4 cells have a result. Each of them, gains and losses, is in" in text
    assert f"python -m benchmarks.report {tmp_path / 'out'}" in text


def test_cells_that_cannot_be_answered_are_recorded(tmp_path: Path, photos: Path, checkpoint: str) -> None:
    other = make_checkpoint(tmp_path / "other", ["dog", "fish"])
    unpooled = tmp_path / "unpooled"
    timm.models.save_for_hf(
        timm.create_model("test_resnet", num_classes=3, global_pool=""),
        str(unpooled),
        model_args={"global_pool": ""},
        model_config={"label_names": ["cat", "dog", "fish"]},
        safe_serialization=True,
    )
    models = f"{other},local-dir:{unpooled},{checkpoint}"
    status, records, rows = sweep(tmp_path / "out", models, photos, "--task", "multilabel,single", "--img-size", "224")
    assert status == 1  # one failed
    outcomes = {(r["model"], r["task"]): (r["status"], r["reason"]) for r in records}
    assert outcomes[other, "single"][0] == "not_applicable"
    assert outcomes[other, "single"][1].startswith(
        "1 classes of the data are not among the head's: cat; the head's are"
    )
    assert outcomes[other, "multilabel"][0] == "not_applicable"
    assert "needs several labels for each image: labels.csv with a column `labels`" in outcomes[other, "multilabel"][1]
    assert outcomes[checkpoint, "single"][0] == "ok"
    kind, reason = outcomes[f"local-dir:{unpooled}", "single"]
    assert kind == "failed"
    assert "UnsupportedModelError: test_resnet: found global_pool=''" in reason
    assert sum(row["metric"] == "" for row in rows) == 5


def test_corrupt_weights_and_images_fail_their_cells_alone(tmp_path: Path, photos: Path, checkpoint: str) -> None:
    broken = make_checkpoint(tmp_path / "broken", ["dog", "fish", "cat"])
    weights = tmp_path / "broken" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    data = tmp_path / "data"
    (data / "cat").mkdir(parents=True)
    (data / "cat" / "a.png").write_bytes(b"no image")
    status, records, _ = sweep(tmp_path / "out", f"{broken},{checkpoint}", photos, "--img-size", "64")
    assert status == 1
    assert sorted(record["status"] for record in records) == ["failed", "ok"]
    status, records, _ = sweep(tmp_path / "out2", checkpoint, data, "--img-size", "64")
    assert status == 1
    assert "a.png: cannot be read as an image" in records[0]["reason"]


def test_labels_csv_with_several_labels(tmp_path: Path, checkpoint: str, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "images").mkdir()
    rows = ["file,labels"]
    for index in range(12):
        Image.new("RGB", (64, 64), (index * 20, 10, 200)).save(tmp_path / "images" / f"{index}.png")
        rows.append(f"images/{index}.png,{['0', '1 2', '', '0 2'][index % 4]}")
    (tmp_path / "labels.csv").write_text("\n".join(rows))
    (tmp_path / "classes.txt").write_text("0 cat\n1 dog\n2 fish\n3 horse\n")
    status, (record,), found = sweep(tmp_path / "out", checkpoint, tmp_path, "--task", "multilabel", "--img-size", "64")
    assert status == 0
    assert {(row["metric"], row["n"]) for row in found} == {("mAP", "12"), ("lrap", "9"), ("r_precision", "9")}
    assert (record["columns"], record["n"]) == (3, 12)  # horse is declared, and unknown to the head
    assert {result["metric"] for result in record["results"]} == {"mAP", "lrap", "r_precision"}
    assert record["left_out"] == []
    counted = {result["metric"]: result["n"] for result in record["results"]}
    assert counted == {"mAP": 12, "lrap": 9, "r_precision": 9}  # three have no label
    printed = capsys.readouterr().out
    assert "the n images that count for the metric" in " ".join(printed.split())

    capsys.readouterr()
    more = ("--task", "multilabel", "--img-size", "64", "--activation", "sigmoid")
    _, (record,), _ = sweep(tmp_path / "sigmoid", checkpoint, tmp_path, *more)
    assert [(left["metric"], left["scores"]) for left in record["left_out"]] == [
        ("CF1", "log_softmax"), ("OF1", "log_softmax"),
    ]  # fmt: skip
    thresholds = [result for result in record["results"] if result["metric"] in ("CF1", "OF1")]
    assert {"fixed", "crossfit", "best", "curve"} <= {result["protocol"] for result in thresholds}
    assert {result["scores"] for result in thresholds} <= {"logits", "logits;logits", ""}
    assert all(("CF1" in row) == (row["scores"] == "logits") for row in record["all_settings"])
    assert "CF1 is left out for log_softmax: it compares each logit with 0" in capsys.readouterr().out


def test_n_of_the_task_real_is_the_number_of_images_that_count(tmp_path: Path) -> None:
    file = importlib.resources.files("timm.data") / "_info" / "imagenet_real_labels.json"
    labels = [len(found) for found in json.loads(file.read_text())]
    numbers = [i for wanted in (0, 1, 2, 3) for i in [i for i, count in enumerate(labels) if count == wanted][:5]]
    synsets = ImageNetInfo().label_names()
    folder = tmp_path / "photos" / synsets[0]
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for number in numbers:
        pixels = rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"ILSVRC2012_val_{number + 1:08d}.png")
    model = make_checkpoint(tmp_path / "model", synsets)
    _, (record,), rows = sweep(tmp_path / "out", model, folder.parent, "--task", "real", "--img-size", "64")
    assert (record["status"], record["n"]) == ("ok", 20), record["reason"]
    expected = {"top1": 15, "lrap": 10, "r_precision": 10}
    assert {result["metric"]: result["n"] for result in record["results"]} == expected
    assert {row["metric"]: int(row["n"]) for row in rows} == expected


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--models", "resnet5o", "--data", "."], "resnet5o: matches no pretrained timm model. Did you mean resnet50"),
        (["--models", "pypi:*"], "expected --models and --data, or --sample"),
        (["--models", "pypi:*", "--data", "/nowhere"], "/nowhere: no such folder"),
        (
            ["--sample", "--img-size", "big"],
            "--img-size: found 'big'; expected pixels, multiples or test, such as 224 or 1x,2x",
        ),
        (["--sample", "--img-size", "0"], "--img-size: found '0'; expected pixels, multiples or test"),
        (["--sample", "--img-size", "1x,0.0x"], "--img-size: found '1x,0.0x'; expected pixels, multiples or test"),
        (["--sample", "--lams", "a"], "--lams: found 'a'; expected numbers separated by ','"),
        (["--sample", "--device", "abacus"], "--device abacus: cannot be used here: Expected one of cpu, cuda"),
        (["--sample", "--lams", "-1"], "lam must be finite and at least 0, got -1.0"),
        (["--sample", "--scores", "logits,softmax"], "--scores: found 'softmax'; expected some of logits,log_softmax."),
        (["--sample", "--temperatures", "0"], "temperature must be positive, got 0.0"),
        (["--sample", "--task", "single"], "--sample has its own data and task"),
        (["--models", "pypi:*", "--data", ".", "--task", "detect"], "--task: found detect; expected some of single,"),
    ],
)
def test_usage_errors(arguments: list[str], text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*arguments, "--out", str(tmp_path / "out")]) == 2
    assert text in capsys.readouterr().err.replace("\n", " ")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--batch-size", "0"], "argument --batch-size: found '0'; expected a positive whole number."),
        (["--limit", "many"], "argument --limit: found 'many'; expected a positive whole number."),
        (["--workers", "-1"], "argument --workers: found '-1'; expected 0 or a positive whole number."),
        (["--crop-pct", "1.5"], "argument --crop-pct: found '1.5'; expected a share above 0, at most 1."),
        (["--crop-pct", "nan"], "argument --crop-pct: found 'nan'; expected a share above 0, at most 1."),
    ],
)
def test_numbers_that_do_not_fit(arguments: list[str], text: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["--sample", *arguments])
    assert stopped.value.code == 2
    assert text in capsys.readouterr().err


def test_out_that_is_no_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "out").write_text("mine")
    assert main(["--sample", "--out", str(tmp_path / "out")]) == 2
    assert "out: cannot be created: " in capsys.readouterr().err
    assert (tmp_path / "out").read_text() == "mine"


def test_no_hub_and_nothing_cached(tmp_path: Path, photos: Path, checkpoint: str) -> None:
    def run(models: str) -> subprocess.CompletedProcess[str]:
        # A port of this machine where nothing listens stands for a Hub that cannot be reached.
        nowhere = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path / "cache"), "COLUMNS": "400"}
        arguments = ["--models", models, "--data", str(photos), "--out", str(tmp_path / "out"), "--img-size", "64"]
        return subprocess.run(
            [sys.executable, "-m", "benchmarks.sweep", *arguments, "--workers", "0"],
            cwd=ROOT, env={**os.environ, **nowhere}, capture_output=True, text=True,
        )  # fmt: skip

    result = run("test_resnet.r160_in1k,hf-hub:user/repo")
    assert result.returncode == 2
    assert result.stdout == ""
    assert len(result.stderr.strip().splitlines()) == 1
    assert "test_resnet.r160_in1k and 1 more not cached, and the Hub cannot be reached" in result.stderr
    assert "Try --sample, --models 'pypi:*' or local-dir:PATH." in result.stderr
    assert not (tmp_path / "out").exists()

    result = run(f"test_resnet.r160_in1k,{checkpoint}")
    assert result.returncode == 1
    assert "failed: test_resnet.r160_in1k on" in result.stdout
    assert "Traceback" not in result.stderr
    statuses = sorted(json.loads(path.read_text())["status"] for path in (tmp_path / "out" / "records").iterdir())
    assert statuses == ["failed", "ok"]


def test_real_checkpoint_agrees_with_plain_timm(real_data: Path, real_weights: Path, tmp_path: Path) -> None:
    """Baseline and gain on real photographs: timm's own loader and model, and a wrapped model, image by image."""
    checkpoint, data = f"local-dir:{real_weights / 'test_resnet'}", real_data / "imagenette500"
    status, (record,), rows = sweep(tmp_path, checkpoint, data, "--limit", "200")
    assert status == 0
    assert (record["n"], record["columns"], record["img_size"]) == (200, 10, 96)

    with (data / "labels.csv").open(newline="") as file:
        every = list(csv.DictReader(file))
    table = [every[index] for index in np.random.default_rng(0).permutation(len(every))[:200]]
    model = timm.create_model(checkpoint, pretrained=True).eval()
    assert record["param_count"] == round(sum(weight.numel() for weight in model.parameters()) / 1e6, 2)
    synsets = model.pretrained_cfg["label_names"]
    truth = torch.tensor([synsets.index(row["synset"]) for row in table])
    dataset = [(Image.open(data / row["file"]).convert("RGB"), 0) for row in table]
    config = resolve_data_config(model=model)

    class Listed(torch.utils.data.Dataset):
        transform = None

        def __len__(self) -> int:
            return len(dataset)

        def __getitem__(self, index: int) -> tuple:
            return self.transform(dataset[index][0]), 0

    loader = create_loader(
        Listed(), **config, batch_size=50, num_workers=0, persistent_workers=False, use_prefetcher=False
    )
    with torch.no_grad():
        x = torch.cat([batch for batch, _ in loader])
        plain = 100 * (model(x).argmax(1) == truth).double().mean().item()
        wrapped = 100 * (timm_csra.wrap(model)(x).argmax(1) == truth).double().mean().item()
    fixed = next(row for row in rows if (row["metric"], row["protocol"]) == ("top1", "fixed"))
    assert float(fixed["baseline"]) == pytest.approx(plain)
    assert float(fixed["value"]) == pytest.approx(wrapped)
    assert plain > 75


def test_ten_classes_on_dogs_are_not_applicable(real_data: Path, real_weights: Path, tmp_path: Path) -> None:
    models = f"local-dir:{real_weights / 'test_vit3'}"
    status, (record,), _ = sweep(tmp_path, models, real_data / "imagewoof500", "--limit", "20")
    assert (status, record["status"]) == (1, "not_applicable")
    assert "classes of the data are not among the head's: n02" in record["reason"]


@pytest.mark.cuda
def test_a_sweep_on_a_gpu_says_how_it_computed_and_agrees_with_a_cpu(
    tmp_path: Path, photos: Path, checkpoint: str, cuda: torch.device
) -> None:
    amp = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "none"
    ways = [
        ("cpu", [], ("none", None)),
        ("default", ["--device", "cuda"], (amp, True)),
        ("float32", ["--device", "cuda", "--amp", "none", "--no-channels-last"], ("none", None)),
    ]
    found = []
    for name, more, expected in ways:
        _, records, _ = sweep(tmp_path / name, checkpoint, photos, "--img-size", "64,96", "--keep-scores", *more)
        assert [(record["key"]["amp"], record["key"].get("channels_last")) for record in records] == [expected] * 2
        files = sorted((tmp_path / name / "scores").iterdir())  # of 64 pixels, then of 96
        found.append([load_file(file)["base"] for file in files])
    for of_a_gpu in found[1:]:
        for logits, expected in zip(of_a_gpu, found[0], strict=True):
            assert (logits - expected).abs().max() <= 0.03 * expected.abs().max()
