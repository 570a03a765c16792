"""The protocol `agreement`: lam without labels, on other pictures than those measured."""

import csv
import io
import json
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from rich.console import Console
from timm.data import create_transform, resolve_data_config

import timm_csra
from benchmarks.checkpoints.downloads import Downloads
from benchmarks.checkpoints.find import Checkpoint
from benchmarks.data.calibration import with_calibration, without_measured
from benchmarks.data.datasets import ImageSet, Source
from benchmarks.data.sources import load_image_set, load_pictures
from benchmarks.engines.estimate import estimate
from benchmarks.engines.local import LocalEngine
from benchmarks.engines.run import Run
from benchmarks.engines.worker import Models
from benchmarks.report import main as report
from benchmarks.reporting.tables import print_records
from benchmarks.scoring import agreement
from benchmarks.scoring.cells import Cell, Options
from benchmarks.scoring.measure import run_cell
from benchmarks.sweep import main
from timm_csra.agreement import LAMS
from timm_csra.evaluation.scoring import DEFAULT, DEFAULT_LOG_SOFTMAX, PLAIN

from .test_survival import save

pytestmark = pytest.mark.filterwarnings("ignore:.*few to choose lam reliably", "ignore:.*the largest tried")
OPTIONS = Options((PLAIN, DEFAULT, DEFAULT_LOG_SOFTMAX), workers=0, batch_size=4)


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Ten pictures without labels."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    rng = np.random.default_rng(5)
    for index in range(10):
        Image.fromarray(rng.integers(0, 256, (40, 60, 3), dtype=np.uint8)).save(folder / f"{index}.png")
    return folder


def sweep(out: Path, models: str, data: Path, *more: str) -> tuple[int, list[dict]]:
    arguments = ["--models", models, "--data", str(data), "--out", str(out), "--workers", "0", "--device", "cpu"]
    status = main([*arguments, *more])
    return status, [json.loads(path.read_text()) for path in sorted((out / "records").glob("*.json"))]


def of(record: dict, protocol: str, metric: str) -> dict:
    return next(row for row in record["results"] if (row["protocol"], row["metric"]) == (protocol, metric))


def test_figures_are_those_of_a_wrapped_model(real_data: Path, real_weights: Path, tmp_path: Path) -> None:
    """Real checkpoint, real photographs: lam by `choose_lam`, and a model wrapped with it, in plain timm."""
    checkpoint = f"local-dir:{real_weights / 'test_efficientnet'}"
    data, others = real_data / "imagenette500", real_data / "imagewoof500"
    more = ("--limit", "120", "--scores", "logits", "--lams", "0.1", "--temperatures", "inf")
    status, (record,) = sweep(tmp_path, checkpoint, data, *more, "--calibration-data", str(others))
    assert status == 0

    model = timm.create_model(checkpoint, pretrained=True).eval()
    transform = create_transform(**resolve_data_config(model=model))

    def prepared(files: list[Path]) -> torch.Tensor:
        return torch.stack([transform(Image.open(file).convert("RGB")) for file in files])

    choice = timm_csra.choose_lam(model, prepared(sorted((others / "images").iterdir())).split(64))
    found = record["agreement"]
    assert (found["lam"], tuple(found["spread"]), found["images"]) == (choice.lam, choice.spread, choice.images)
    assert found["shares"] == {f"{lam:g}": share for lam, share in choice.agreement.items()}
    assert (found["data"], found["left_out"], found["reason"]) == ("imagewoof500", [], None)
    assert list(found["shares"]) == [f"{lam:g}" for lam in LAMS]

    with (data / "labels.csv").open(newline="") as file:
        every = list(csv.DictReader(file))
    table = [every[index] for index in sorted(np.random.default_rng(0).permutation(len(every))[:120])]
    truth = torch.tensor([model.pretrained_cfg["label_names"].index(row["synset"]) for row in table])
    x = prepared([data / row["file"] for row in table])
    with torch.inference_mode():
        plain = model(x).argmax(1) == truth
        wrapped = choice.apply(model)(x).argmax(1) == truth
    row = of(record, "agreement", "top1")
    assert (row["scores"], row["lam"], row["temperature"]) == ("log_softmax", f"{choice.lam:g}", "inf")
    assert row["baseline"] == pytest.approx(100 * plain.double().mean().item())
    assert row["value"] == pytest.approx(100 * wrapped.double().mean().item())
    assert row["ci_low"] <= row["gain"] <= row["ci_high"]
    assert row["test"] == "McNemar exact"
    # `--scores logits` was asked for: the chosen setting is not among those that crossfit and best take.
    assert {row["scores"] for row in record["all_settings"]} == {"logits"}
    assert set(of(record, "best", "top1")["scores"].split(";")) == {"logits"}
    assert "agreement" in record["calibration"]


def test_records_tables_summary_and_page(
    tmp_path: Path, photos: Path, pictures: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (pictures / "copy.png").write_bytes((photos / "cat" / "0.png").read_bytes())
    model, out = save(tmp_path / "model"), tmp_path / "out"
    more = ("--task", "single,mosaic", "--img-size", "64")
    given = (*more, "--calibration-data", str(pictures))
    status, without = sweep(out, model, photos, *more)
    assert "agreement" not in capsys.readouterr().out
    status, records = sweep(out, model, photos, *given)
    assert status == 0
    told = capsys.readouterr().out
    assert "agreement: log_softmax, T inf, lam chosen without labels on other pictures; its intervals treat" in told
    assert f"agreement on photos: lam chosen on 10 pictures of pictures, which are few: use at least 200; 1 left out, which are also measured: {pictures / 'copy.png'}." in told  # fmt: skip
    before = [record for record in records if "calibration_data" not in record["key"]]
    assert before == without and len(records) == 4  # of other names
    for record in (record for record in records if "calibration_data" in record["key"]):
        assert record["agreement"]["left_out"] == [str(pictures / "copy.png")]
        protocols = [row["protocol"] for row in record["results"]]
        assert protocols[:4] == ["fixed", "fixed_log_softmax", "log_softmax_vs_logits", "agreement"]
        same = next(one for one in before if one["task"] == record["task"])
        others = [row for row in record["results"] if row["protocol"] != "agreement"]
        assert others == same["results"]  # nothing else has moved
    with (out / "summary.csv").open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["protocol"] == "agreement"]
    assert {row["metric"] for row in rows} == {"top1", "mAP", "lrap", "r_precision"} and len(rows) == 4
    # The classes of these few mosaics have too few positives for an interval of mAP.
    assert all(bool(row["verdict"] and row["p_holm"] and row["ci_low"]) == (row["metric"] != "mAP") for row in rows)

    assert report([str(out), "--no-plots"]) == 0
    page, text = ((out / "report" / name).read_text() for name in ("index.html", "results.md"))
    assert "its intervals treat that lam as fixed" in page
    assert "agreement on photos: lam chosen on 10 pictures" in page
    assert "| log_softmax_vs_logits | agreement | crossfit |" in text
    (lam,) = {record["agreement"]["lam"] for record in records if record["agreement"]}
    assert text.count(f", lam {lam:g} |") == 4
    with (out / "report" / "results.csv").open(newline="") as file:
        assert {"gain_agreement", "agreement_low", "agreement_high", "agreement_lam"} <= set(next(csv.reader(file)))

    (pictures / "9.png").unlink()
    assert len(sweep(out, model, photos, *given)[1]) == 6  # other pictures, other records


def test_one_pass_serves_the_tasks_of_a_checkpoint_and_size(
    tmp_path: Path, photos: Path, pictures: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, more = load_image_set(photos), load_image_set(photos).some(range(6))
    images = without_measured(with_calibration([data, more], load_pictures(pictures)))
    checkpoint = Checkpoint("local-dir", save(tmp_path / "model").removeprefix("local-dir:"))
    cells = [Cell(checkpoint, one, task, (s, s), grid=grid) for s in (64, 96) for one in images for task, grid in (("single", None), ("mosaic", 2))]  # fmt: skip
    sizes = []
    choose_lam = timm_csra.choose_lam

    def counting(model: torch.nn.Module, loader: object, **settings: object) -> object:
        sizes.append(cells[len(records)].size)
        return choose_lam(model, loader, **settings)

    monkeypatch.setattr(agreement.timm_csra, "choose_lam", counting)
    here, records = Models("cpu"), []
    for cell in cells:
        records.append(run_cell(cell, partial(here.get, cell), OPTIONS))
    assert {record["status"] for record in records} == {"ok"}
    assert sizes == [(64, 64), (96, 96)]
    assert all(record["agreement"]["images"] == 10 for record in records)
    assert f"{estimate(cells, OPTIONS)}".startswith("8 cells, 44 images and 20 calibration pictures, ")


def test_workers_do_as_this_process(tmp_path: Path, photos: Path, pictures: Path) -> None:
    (data,) = without_measured(with_calibration([load_image_set(photos)], load_pictures(pictures)))
    checkpoint = Checkpoint("local-dir", save(tmp_path / "model").removeprefix("local-dir:"))
    cells = [Cell(checkpoint, data, "single", (64, 64)), Cell(checkpoint, data, "mosaic", (64, 64), grid=2)]
    here, told = Models("cpu"), Console(file=io.StringIO())
    threads = torch.get_num_threads()
    run = Run(OPTIONS, tmp_path / "out", {}, False, told)
    there = [r for _, r in run.records(cells, lambda _: LocalEngine([OPTIONS]), Downloads(False, False))]
    assert torch.get_num_threads() == threads
    for cell, record in zip(cells, there, strict=True):
        expected = run_cell(cell, partial(here.get, cell), OPTIONS)
        assert record["agreement"] == expected["agreement"]
        assert record["results"] == expected["results"]


def test_kept_scores_keep_the_choice(tmp_path: Path, photos: Path, pictures: Path) -> None:
    model, out = save(tmp_path / "model"), tmp_path / "out"
    given = ("--img-size", "64", "--calibration-data", str(pictures), "--scores", "logits")
    _, (first,) = sweep(out, model, photos, *given, "--keep-scores")
    _, records = sweep(out, model, photos, *given, "--rescore", "--lams", "0.7")
    (again,) = (record for record in records if record["key"]["kept_scores"])
    assert again["agreement"] == first["agreement"]
    row, before = of(again, "agreement", "top1"), of(first, "agreement", "top1")
    assert row["lam"] == before["lam"]
    assert row["value"] == pytest.approx(before["value"], abs=100 / 12 + 1e-6)  # half precision may turn a near-tie
    _, records = sweep(out, model, photos, "--img-size", "64", "--scores", "logits", "--rescore", "--lams", "0.9")
    assert all(record["status"] == "ok" for record in records)  # without the protocol
    (pictures / "9.png").unlink()
    _, records = sweep(out, model, photos, *given, "--rescore")
    (failed,) = (record for record in records if record["status"] == "failed")
    assert "--calibration-data: found lam chosen on other pictures, of pictures with the kept scores; expected" in failed["reason"]  # fmt: skip
    out = tmp_path / "unchosen"
    sweep(out, model, photos, "--img-size", "64", "--keep-scores")
    _, records = sweep(out, model, photos, "--img-size", "64", "--rescore", "--calibration-data", str(pictures))
    (failed,) = (record for record in records if record["status"] == "failed")
    assert "found no lam chosen without labels with the kept scores; expected lam chosen on" in failed["reason"]


def test_what_cannot_be_compared_is_left_out_with_the_reason(photos: Path, pictures: Path) -> None:
    stream = ImageSet("wds/x:val", (), (), (), stream=Source(lambda: None, 0))  # type: ignore[arg-type,return-value]
    (images,) = without_measured(with_calibration([stream], load_pictures(pictures)))
    found = agreement.choose(images.calibration, None, OPTIONS)  # type: ignore[arg-type]  # no model is needed
    assert found is not None and found["reason"].startswith("a stream has no list of its pictures")
    assert agreement.setting_of(found) is None
    cell = Cell(Checkpoint("timm", "test_resnet"), images, "single", (64, 64))
    assert cell.scored_settings(OPTIONS) == list(OPTIONS.settings)
    told = io.StringIO()
    row = {"metric": "top1", "protocol": "fixed", "scores": "logits", "lam": "0.1", "temperature": "inf"}
    row |= {"baseline": 50.0, "gain": 1.0, "ci_low": None, "ci_high": None, "n": 3}
    record = {"model": "m", "data": "d", "task": "single", "img_size": 64, "n": 3, "status": "ok", "results": [row]}
    print_records([record | {"agreement": found}], Console(file=told, width=300))
    assert "agreement on d: left out, a stream has no list of its pictures to compare" in told.getvalue()


def test_refused_pictures(tmp_path: Path, photos: Path, pictures: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = save(tmp_path / "model")
    arguments = ["--models", model, "--data", str(photos), "--workers", "0", "--img-size", "64", "--device", "cpu"]
    out = ["--out", str(tmp_path / "out")]
    assert main([*arguments, *out, "--calibration-data", "wds/x"]) == 2
    assert "wds/x: a stream has no list of its pictures" in capsys.readouterr().err
    assert main([*arguments, *out, "--calibration-data", str(pictures), "--dry-run"]) == 0
    assert "1 cells, 12 images and 10 calibration pictures, " in capsys.readouterr().out
    (pictures / "broken.png").write_text("no picture")
    status, (record,) = sweep(tmp_path / "out", model, photos, "--img-size", "64", "--calibration-data", str(pictures))
    assert status == 1
    assert "1 of 11 images cannot be read: " in record["reason"] and "broken.png" in record["reason"]
    more = ("--img-size", "64", "--calibration-data", str(pictures), "--skip-bad-images")
    status, (record,) = sweep(tmp_path / "skipped", model, photos, *more)
    assert status == 0
    assert record["agreement"]["images"] == 10
    assert record["agreement"]["bad_images"] == [str(pictures / "broken.png")]
