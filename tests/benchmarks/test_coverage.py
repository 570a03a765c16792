"""python -m benchmarks.coverage: the table of all architectures, and how it survives what goes wrong."""

import os
import re
from collections import Counter
from pathlib import Path

import pytest
import timm

from benchmarks import coverage
from benchmarks.coverage import main, read_rows

ROOT = Path(__file__).parents[2]
TABLE = ROOT / "docs" / "coverage.csv"


def crash(name: str) -> coverage.Row:
    if name == "test_vit2":
        os._exit(9)  # as the kernel does when memory runs out
    return coverage.measure(name)


def test_rows_resume_and_counts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "table.csv"
    arguments = ["--out", str(out), "--jobs", "1", "--models"]
    assert main([*arguments, "test_resnet,pit_ti_224,resnetv2_50x1_clip*"]) == 0
    rows = read_rows(out)
    assert list(rows) == ["pit_ti_224", "test_resnet"]
    resnet = rows["test_resnet"]
    expected = {"class": "ResNet", "classifier": "Linear", "pool": "avg", "features": "NCHW", "grid": "5x5"}
    assert expected.items() <= resnet.items()
    assert (resnet["kind"], resnet["path"], resnet["extra_macs"]) == ("exact", "general rule", str(25 * 96 * 1000))
    assert rows["pit_ti_224"]["path"] == "family adapter: class tokens alone"

    text = out.read_text().replace("general rule", "kept from before")
    out.write_text(text)
    assert main([*arguments, "test_resnet,test_convnext"]) == 0
    rows = read_rows(out)
    assert list(rows) == ["pit_ti_224", "test_convnext", "test_resnet"]  # of other patterns too
    assert rows["test_resnet"]["path"] == "kept from before"
    printed = capsys.readouterr()
    assert "2 of the 2 architectures with a classifier can be wrapped" in printed.out
    assert "1 of 2 are already in" in printed.err


def test_a_dead_process_is_one_failed_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(coverage, "measure", crash)
    out = tmp_path / "table.csv"
    arguments = ["--out", str(out), "--jobs", "2", "--models", "test_vit2,test_resnet,test_convnext"]
    assert main(arguments) == 1
    rows = read_rows(out)
    assert Counter(row["kind"] for row in rows.values()) == {"exact": 1, "nonlinear": 1, "failed": 1}
    assert "its process died" in rows["test_vit2"]["reason"]
    monkeypatch.undo()
    assert main(arguments) == 0  # failed ones are done again
    assert read_rows(out)["test_vit2"]["kind"] == "nonlinear"


def test_an_error_is_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(name: str) -> None:
        raise RuntimeError("no such thing")

    monkeypatch.setattr(timm, "create_model", broken)
    row = coverage.measure("test_resnet")
    assert (row["kind"], row["reason"]) == ("failed", "RuntimeError: no such thing")


def test_what_cannot_be_started(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--models", "no_such_model*", "--out", str(tmp_path / "table.csv")]) == 2
    other = tmp_path / "other.csv"
    other.write_text("a,b\n1,2\n")
    assert main(["--models", "test_resnet", "--out", str(other)]) == 2
    errors = re.sub(r"\s+", " ", capsys.readouterr().err)
    assert "'no_such_model*' matches none of timm's" in errors
    assert "found other columns than this version writes; choose another --out, or --fresh" in errors
    assert other.read_text() == "a,b\n1,2\n"


def test_the_table_in_docs_is_of_this_timm_and_is_counted_there() -> None:
    rows = read_rows(TABLE)
    versions = {row["timm"] for row in rows.values()}
    if versions != {timm.__version__}:
        pytest.skip(f"docs/coverage.csv is of timm {', '.join(versions)}, this is {timm.__version__}")
    assert list(rows) == timm.list_models()
    kinds = Counter(row["kind"] for row in rows.values())
    assert kinds.keys() == {"exact", "nonlinear", "token", "no classifier"}
    page = (ROOT / "docs" / "how_it_works.md").read_text()
    for kind in ("exact", "nonlinear", "token", "no classifier"):
        assert re.search(rf"\| {kind} \|.* {kinds[kind]} \|\n", page), kind
    assert f"all {sum(kinds.values()) - kinds['no classifier']} architectures with a classifier" in page
    for name in ("test_resnet", "test_mambaout", "crossvit_tiny_240"):
        assert coverage.measure(name) == rows[name]
