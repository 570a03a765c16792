"""What is the same thing: which figures are counted, in which line, under which name."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from PIL import Image

from benchmarks.records.files import write_record
from benchmarks.records.identity import Identity
from benchmarks.report import main as report
from benchmarks.reporting.summary import Folder, headline, read_folder
from benchmarks.sweep import main

FIXED = ("fixed", "crossfit", "agreement")
BESIDE = ("status", "requested", "own_size", "where", "n", "p", "weights_sha256", "data_sha256")


def record(
    model: str = "m", weights: str | None = "", finished: str = "2026-01-01T00:00:00", **more: Any
) -> dict[str, Any]:
    """A record with a gain of 1 in three protocols. `more`: fields of the key, or of the record beside it."""
    beside = {name: more.pop(name) for name in BESIDE if name in more}
    p = beside.pop("p", 0.001)
    weights = f"w of {model}" if weights == "" else weights
    key = {"model": model, "weights": weights, "data": "val", "data_fingerprint": "aa11", "task": "single", "grid": None,
           "img_size": 96, "settings": [[0, "inf", "logits"]], "device": "cpu", "amp": "none", "seed": 0} | more  # fmt: skip
    result = {"metric": "top1", "scores": "logits", "lam": "0.1", "temperature": "inf", "baseline": 50.0, "value": 51.0,
              "gain": 1.0, "ci_low": 0.5, "ci_high": 1.5, "p_value": p, "n": 100, "test": "t"}  # fmt: skip
    about = {
        "status": "ok",
        "reason": None,
        "n": 100,
        "requested": ["1x"],
        "own_size": 96,
        "finished": finished,
    } | beside
    results = [result | {"protocol": protocol} for protocol in FIXED] if about["status"] == "ok" else []
    return {**key, **about, "key": key, "results": results}


def folder(path: Path, *records: dict[str, Any]) -> Folder:
    for number, one in enumerate(records):
        write_record(path / "records" / f"{number}.json", one)
    return read_folder(path)


def lines(found: Folder, protocol: str = "fixed") -> dict[tuple[str, ...], dict[str, int]]:
    return {name: dict(counts) for name, counts in headline(found.rows).items() if name[-1] == protocol}


def test_every_name_of_a_key_is_in_one_part() -> None:
    one, other = Identity.of(record()["key"]), Identity.of(record(weights="v")["key"])
    assert one.result != other.result and one.scores != other.scores
    for name, value in {
        "settings": [[1, "inf", "logits"]],
        "evaluation": {"version": 2},
        "kept_scores": "float16",
    }.items():
        asked = Identity.of(record(**{name: value})["key"])
        assert asked.result != one.result and asked.scores == one.scores  # other questions to the same pass
    for name in ("data_fingerprint", "tf32", "versions", "skip_bad_images", "img_size", "something_new"):
        assert Identity.of(record(**{name: "x"})["key"]).scores != one.scores


def test_two_sets_of_one_name_are_two_lines(tmp_path: Path) -> None:
    found = folder(
        tmp_path,
        record(data_fingerprint="aa11", where="/photos/a/val"),
        record(data_fingerprint="bb22", where="/photos/b/val"),
        record("n", data_fingerprint="bb22", where="/photos/b/val"),
        record(data_fingerprint="cc33", task="mosaic", grid=2, where="/photos/c/val"),
    )
    assert lines(found) == {
        ("a/val", "single", "None", "1x", "top1", "fixed"): {"better": 1},
        ("b/val", "single", "None", "1x", "top1", "fixed"): {"better": 2},
        ("c/val", "mosaic", "2", "1x", "top1", "fixed"): {"better": 1},
    }
    assert sorted({one["data"] for one in found.records}) == ["a/val", "b/val", "c/val"]


def test_what_changed_in_one_place_is_told_apart_too(tmp_path: Path) -> None:
    found = folder(
        tmp_path,
        record(data_fingerprint="aa11", where="/photos/val.zip"),
        record(data_fingerprint="bb22", where="/photos/val.zip"),
        record(data_fingerprint="aa11", where="/photos/val.zip", amp="bf16"),
    )
    assert [name[0] for name in lines(found)] == ["val (data aa11)", "val (data bb22)", "val (data aa11, amp bf16)"]


def test_replaced_weights_are_not_counted(tmp_path: Path) -> None:
    found = folder(
        tmp_path,
        record("old", "w1", "2026-01-01T00:00:00", p=0.04),
        record("old", "w2", "2026-01-02T00:00:00", p=0.04),
        record("other", p=0.04),
        record("old", "w1", "2026-01-01T00:00:00", data="second", data_fingerprint="dd44", p=0.04),
    )
    assert lines(found) == {("val", "single", "None", "1x", "top1", "fixed"): {"no evidence": 2}}
    assert [row.get("p_holm") for row in found.rows if row["protocol"] == "fixed"] == [None, 0.08, 0.08, None]
    assert {row["not_counted"] for row in found.rows if row.get("p_holm") is None} == {"other weights since"}
    assert len(found.counted) == 2


def test_a_checkpoint_is_counted_once_whatever_was_asked_of_its_scores(tmp_path: Path) -> None:
    found = folder(
        tmp_path,
        record(),
        record(kept_scores="float16", finished="2026-01-02T00:00:00"),
        record(kept_scores="float16", settings=[[2, "inf", "logits"]], finished="2026-01-03T00:00:00"),
    )
    assert lines(found) == {("val", "single", "None", "1x", "top1", "fixed"): {"better": 1}}
    # What was chosen from other settings is another question.
    assert list(lines(found, "crossfit").values()) == [{"better": 1}, {"better": 1}]
    assert len({name[0] for name in lines(found, "crossfit")}) == 2
    assert [row["not_counted"] for row in found.rows if row["protocol"] == "fixed"] == ["measured again since"] * 2 + [
        None
    ]


@pytest.mark.parametrize("words", [(["96"], ["1x"]), (["1x"], ["96"])])
def test_a_line_does_not_depend_on_the_words_for_a_size(words: tuple[list[str], list[str]], tmp_path: Path) -> None:
    """Both are at 96 pixels, which is their own size."""
    found = folder(tmp_path, record("a", requested=words[0]), record("b", requested=words[1]))
    assert {name[3]: counts for name, counts in lines(found).items()} == {"1x": {"better": 2}, "96": {"better": 2}}


def test_a_multiple_of_other_pixels_is_not_among_those(tmp_path: Path) -> None:
    two = record("b", requested=["1x"], own_size=160, img_size=160)
    found = folder(tmp_path, record("a", requested=["96"]), two, record("c", requested=["48"], img_size=48))
    assert {name[3]: counts for name, counts in lines(found).items()} == {
        "1x": {"better": 2}, "96": {"better": 1}, "48": {"better": 1}
    }  # fmt: skip


def test_another_crop_answers_its_own_request_alone(tmp_path: Path) -> None:
    """224 pixels as they are tested, with a crop of their own, are not 224 pixels."""
    tested = record("b", requested=["test"], own_size=48, test_crop_pct=1.0)
    found = folder(tmp_path, record("a", requested=["96", "test"]), tested)
    assert {name[3]: counts for name, counts in lines(found).items()} == {"96": {"better": 1}, "test": {"better": 2}}


def test_metrics_over_other_classes_are_other_lines(tmp_path: Path) -> None:
    head = record(score_classes="head") | {"score_classes": "head"}
    found = folder(tmp_path, record() | {"score_classes": "data"}, head)
    assert {name[:2]: counts for name, counts in lines(found).items()} == {
        ("val", "single"): {"better": 1}, ("val", "single (all classes)"): {"better": 1}
    }  # fmt: skip


def test_a_failure_that_was_mended_is_history(tmp_path: Path) -> None:
    mended = record("a", None, status="failed"), record("a", finished="2026-01-02T00:00:00")  # type: ignore[arg-type]
    found = folder(tmp_path, *mended, record("b", status="failed"))
    assert [(one["model"], one["status"]) for one in found.counted] == [("a", "ok"), ("b", "failed")]


def test_records_of_before_are_read(tmp_path: Path) -> None:
    """They said in one word what was asked, and not when they were written."""
    old = record(requested="1x", versions={"timm": "1.0.0"})
    del old["own_size"], old["finished"]
    oldest = record("b", img_size=128)
    del oldest["own_size"], oldest["finished"], oldest["requested"]
    cuda = record("c", device="cuda") | {"environment": {"float32_matmul_precision": "high", "cudnn_allow_tf32": True}}
    found = folder(tmp_path, old, oldest, cuda)
    assert {name[3] for name in lines(found)} == {"1x", "128"}
    assert [one["requested"] for one in found.records] == [["1x"], ["128"], ["1x"]]
    assert all(json.dumps(one["finished"]) for one in found.records)
    assert found.records[2]["key"]["tf32"] == ["high", True] and "tf32" not in found.records[0]["key"]


def test_weights_that_are_there_again_count_again(tmp_path: Path) -> None:
    """As after a training that was taken back."""
    weights = {}
    for seed in (0, 1):
        torch.manual_seed(seed)
        model = timm.create_model("test_resnet", num_classes=2)
        labels = {"label_names": ["cat", "dog"]}
        timm.models.save_for_hf(model, str(tmp_path / "model"), model_config=labels, safe_serialization=True)
        weights[seed] = (tmp_path / "model" / "model.safetensors").read_bytes()
    for index in range(8):
        path = tmp_path / "photos" / labels["label_names"][index % 2] / f"{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (40, 30), (30 * index, 99, 200)).save(path)
    arguments = ["--models", f"local-dir:{tmp_path / 'model'}", "--data", str(tmp_path / "photos"), "--workers", "0"]
    arguments += ["--out", str(tmp_path / "out"), "--device", "cpu", "--img-size", "64"]
    counted = []
    for seed in (0, 1, 0):
        (tmp_path / "model" / "model.safetensors").write_bytes(weights[seed])
        assert main(arguments) == 0
        (record,) = read_folder(tmp_path / "out").counted
        counted.append(record["weights_sha256"])
    assert counted[0] == counted[2] != counted[1]
    assert len(list((tmp_path / "out" / "records").iterdir())) == 2


def test_a_size_that_was_measured_in_other_words_is_found(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(0)
    model = timm.create_model("test_resnet", num_classes=2)
    labels = {"label_names": ["cat", "dog"]}
    timm.models.save_for_hf(model, str(tmp_path / "model"), model_config=labels, safe_serialization=True)
    for index in range(8):
        path = tmp_path / "b" / "val" / labels["label_names"][index % 2] / f"{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (40, 30), (30 * index, 99, 200)).save(path)
    shutil.copytree(tmp_path / "b", tmp_path / "a")
    data = [str(tmp_path / name / "val") for name in ("a", "b")]
    arguments = ["--models", f"local-dir:{tmp_path / 'model'}", "--out", str(tmp_path / "out"), "--device", "cpu"]
    for size in ("160", "1x"):
        assert main([*arguments, "--workers", "0", "--img-size", size, "--data", *data]) == 0
    printed = capsys.readouterr().out
    assert "a/val, single, 160, top1: log_softmax" in printed and "b/val, single, 1x, top1: log_softmax" in printed
    assert {tuple(record["requested"]) for record in read_folder(tmp_path / "out").records} == {("160", "1x")}
    assert main([*arguments, "--img-size", "96", "--data", *data, "--dry-run"]) == 0
    planned = capsys.readouterr().out
    assert "a/val" in planned and "b/val" in planned
    assert report([str(tmp_path / "out"), "--no-plots"]) == 0
    page = (tmp_path / "out" / "report" / "results.md").read_text()
    assert "| a/val, single, 1x | top1 | fixed |" in page and "| model | b/val \u00b7 single \u00b7 160/1x |" in page
    assert "a/val \\u00b7 single \\u00b7 160" in (tmp_path / "out" / "report" / "index.html").read_text()


def test_weights_under_two_names_count_once(tmp_path: Path) -> None:
    """By the hash of the loaded weights, else of the files."""
    sha = {"weights_sha256": "5a" * 32}
    found = folder(
        tmp_path,
        record("pypi:a", "file", "2026-01-01T00:00:00", p=0.04, **sha),
        record("hf-hub:timm/a", "etag", "2026-01-02T00:00:00", p=0.04, **sha),
        record("local-dir:a", "etag", "2026-01-03T00:00:00", p=0.04),
        record("b", p=0.04),
    )
    assert lines(found) == {("val", "single", "None", "1x", "top1", "fixed"): {"no evidence": 2}}
    assert {row["p_holm"] for row in found.rows if row.get("p_holm")} == {0.08}
    assert [one["model"] for one in found.counted] == ["local-dir:a", "b"]
    assert found.notes == [
        "hf-hub:timm/a has the same weights as local-dir:a and counts once with it, by the newer record.",
        "pypi:a has the same weights as local-dir:a and counts once with it, by the newer record.",
    ]


def test_weights_that_a_name_had_once_do_not_join_it(tmp_path: Path) -> None:
    """A copy of what has been trained on since is another checkpoint."""
    found = folder(
        tmp_path,
        record("a", "w1", "2026-01-01T00:00:00", weights_sha256="1"),
        record("copy", "w1", "2026-01-01T00:00:00", weights_sha256="1"),
        record("a", "w2", "2026-01-02T00:00:00", weights_sha256="2"),
    )
    assert [(one["model"], one["key"]["weights"]) for one in found.counted] == [("copy", "w1"), ("a", "w2")]
    assert found.notes == []


@pytest.mark.parametrize(("name", "older", "newer"), [
    ("evaluation", {"version": 2}, {"version": 3, "scipy": "9"}),
    ("scoring", 1, 2),
])  # fmt: skip
def test_figures_of_another_version_are_not_compared(name: str, older: Any, newer: Any, tmp_path: Path) -> None:
    """Not even with those of other checkpoints, and however late they were measured."""
    found = folder(
        tmp_path,
        record("a", "w", "2026-01-01T00:00:00", **{name: newer}),
        record("b", "v", "2026-01-02T00:00:00", **{name: older}),
        record("c", "u", "2026-01-03T00:00:00", **{name: older}),
        record("c", "u", "2026-01-03T00:00:00", **{name: older}, data_fingerprint="other pictures"),
    )
    assert [lines(found)[line] for line in lines(found)] == [{"better": 1}] * 2
    assert [one["model"] for one in found.counted] == ["a", "c"]
    (said,) = found.notes
    assert said.startswith("2 records of an older version of the sweep are left out, because they") and "b, c" in said
