"""Records that are sent to others: what is in the files, and what is found wrong with them."""

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.records.files import read_records, record_path, write_record
from benchmarks.report import main as report
from benchmarks.scoring.software import EVALUATION
from benchmarks.share import main


def record(model: str, size: int = 224, **more: Any) -> dict[str, Any]:
    key = {"model": model, "weights": "1a", "data": "d", "task": "single", "img_size": size, "grid": None}
    key["evaluation"] = {"version": EVALUATION}
    result = {"metric": "top1", "protocol": "fixed", "lam": "0.1", "temperature": "inf", "scores": "logits"}
    result |= {"baseline": 50.0, "value": 51.5, "gain": 1.5, "ci_low": 0.5, "ci_high": 2.5, "p_value": 0.01, "n": 4}
    about = {
        "status": "ok",
        "reason": None,
        "n": 4,
        "where": "/home/me/d",
        "requested": ["1x" if size == 224 else "2x"],
        "macs": 1.0,
    }
    return {**key, "key": key, **about, "results": [result], **more}


def run(folder: Path, *records: dict[str, Any]) -> Path:
    for one in records:
        write_record(record_path(folder, one["key"]), one)
    return folder


def test_a_file_for_each_checkpoint_serves_as_the_records_did(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    records = [record("local-dir:a/b"), record("local-dir:a/b", 448), record("two")]
    failed = record("two", 448, status="failed", reason="boom", results=[], traceback="/home/me/x.py")
    results = run(tmp_path / "results", *records, failed)
    assert main([str(results), "--out", str(tmp_path / "shared")]) == 0
    streams = capsys.readouterr()
    assert streams.out.startswith("2 files, 0.0 MB: no fault")
    assert "1 records left out, of cells that failed or that later ones replace" in " ".join(streams.err.split())
    files = sorted((tmp_path / "shared" / "records").iterdir())
    assert [file.name for file in files] == ["local-dir_a_b.jsonl", "two.jsonl"]
    assert [len(file.read_text().splitlines()) for file in files] == [2, 1]
    assert "/home/me" not in "".join(file.read_text() for file in files)
    for folder in ("results", "shared"):
        assert report([str(tmp_path / folder), "--no-plots"]) == 0
    first, second = (tmp_path / folder / "report" / "results.csv" for folder in ("results", "shared"))
    assert first.read_text() == second.read_text()
    assert main(["--check", str(tmp_path / "shared")]) == 0
    assert main([str(tmp_path / "nothing"), "--out", str(tmp_path / "shared")]) == 2
    assert main(["--check", str(tmp_path / "nothing")]) == 2


def changed(of: dict[str, Any], **result: Any) -> dict[str, Any]:
    return of | {"results": [of["results"][0] | result]}


@pytest.mark.parametrize(
    ("lines", "fault"),
    [
        ([changed(record("m"), gain=2.0)], "line 1: top1, fixed: a gain of 2.0, expected 51.5 - 50.0"),
        ([changed(record("m"), value=151.5, gain=101.5)], "line 1: top1, fixed: found 50.0 and 151.5, expected percent"),
        ([changed(record("m"), ci_low=3.0)], "line 1: top1, fixed: an interval from 3.0 to 2.5"),
        ([record("m", status="failed", reason="boom")], "line 1: a cell that failed (boom), expected what was measured"),
        ([record("m") | {"task": "real"}], "line 1: task: the record and its key disagree"),
        ([record("m", traceback="/home/me/x.py")], "line 1: traceback, where: places on somebody's disk"),
        ([record("m"), record("m")], "line 2: the same cell as line 1"),
        ([record("m"), record("other")], "m.jsonl: found records of 2 checkpoints, expected one"),
        ([record("n")], "m.jsonl: found the records of n, expected the name n.jsonl"),
        ([record("m") | {"key": record("m")["key"] | {"evaluation": {"version": 0}}, "evaluation": {"version": 0}}],
         f"line 1: figures of version 0, expected {EVALUATION}: measure again with this version of the sweep"),
        ([record("m") | {"key": record("m")["key"] | {"weights": None}, "weights": None}], "no hash of the weights"),
        ([record("m"), []], "line 2: found a JSON list, expected the record of a finished cell."),
        ([], "m.jsonl: found no record"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said(
    tmp_path: Path, lines: list[Any], fault: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "records" / "m.jsonl"
    path.parent.mkdir()
    path.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    assert main(["--check", str(path)]) == 1
    assert fault in capsys.readouterr().out


def test_a_line_that_is_no_record_loses_no_other(tmp_path: Path) -> None:
    (tmp_path / "records").mkdir()
    whole = json.dumps(record("m"))
    (tmp_path / "records" / "m.jsonl").write_text(f"{whole}\n{whole[:50]}\n{json.dumps(record('m', 448))}\n")
    warnings: list[str] = []
    assert [one["img_size"] for one in read_records(tmp_path, warnings.append)] == [224, 448]
    assert "m.jsonl, line 2: found no whole JSON" in warnings[0]
