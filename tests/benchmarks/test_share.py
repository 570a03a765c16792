"""Records that are sent to others: what is in the files, and what is found wrong with them."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.records.files import read_records, record_path, write_record
from benchmarks.records.resampled import packed
from benchmarks.report import main as report
from benchmarks.scoring.software import EVALUATION
from benchmarks.share import main

HONEST = np.random.default_rng(0).normal(1.5, 0.51, 200)  # of a gain of 1.5, from 0.5 to 2.5


def record(model: str, size: int = 224, **more: Any) -> dict[str, Any]:
    key = {"model": model, "weights": f"of {model}", "data": "d", "task": "single", "img_size": size, "grid": None}
    key |= {"evaluation": {"version": EVALUATION}, "data_fingerprint": "aa11"}
    result = {"metric": "top1", "protocol": "fixed", "lam": "0.1", "temperature": "inf", "scores": "logits"}
    result |= {"baseline": 50.0, "value": 51.5, "gain": 1.5, "ci_low": 0.5, "ci_high": 2.5, "p_value": 0.01, "n": 4}
    about = {
        "status": "ok",
        "reason": None,
        "n": 4,
        "where": "/home/me/d",
        "requested": ["1x" if size == 224 else "2x"],
        "macs": 1.0,
        "kind": "exact",
        "head_classes": 10,
        "weights_sha256": f"of {model}",
        "environment": {"commit": "1a2b"},
        "finished": "2026-01-01T00:00:00+00:00",
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
    assert "1 records left out: 1 failed" in " ".join(streams.err.split())
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
        ([record("m", status="failed", reason="boom")], "line 1: a cell that failed (boom), expected a measured cell"),
        ([record("m") | {"task": "real"}], "line 1: task: the record and its key disagree"),
        ([record("m", traceback="/home/me/x.py")], "line 1: traceback, where: paths on a local disk"),
        ([record("m"), record("m")], "line 2: the same cell as line 1"),
        ([record("m"), record("other")], "m.jsonl: found records of 2 checkpoints, expected one"),
        ([record("n")], "m.jsonl: found the records of n, expected the name n.jsonl"),
        ([record("m") | {"key": record("m")["key"] | {"evaluation": {"version": 0}}, "evaluation": {"version": 0}}],
         f"line 1: figures of version 0, expected {EVALUATION}: measure again with this version of the sweep"),
        ([record("m") | {"key": record("m")["key"] | {"weights": None}, "weights": None}], "no hash of the weights"),
        ([record("m"), []], "line 2: found a JSON list, expected the record of a finished cell."),
        ([], "m.jsonl: found no record"),
        ([changed(record("m"), n="x")], "line 1: found a result whose n is a str"),
        ([changed(record("m"), p_value=7.0)], "line 1: found top1, fixed: a p-value of 7.0"),
        ([changed(record("m"), ci_low=1.6)], "an interval from 1.6 to 2.5, which does not contain the gain of 1.5"),
        ([changed(record("m"), gain=None, ci_low=None, ci_high=None, p_value=None)],
         "top1, fixed: found 50.0, 51.5 and a gain of None, expected all three or none"),
        ([changed(record("m"), resampled=packed(np.full(100, 1.5)))], "top1, fixed: 100 resampled gains, expected 200"),
        ([changed(record("m"), resampled=packed(HONEST + 5))], "resampled gains around 6.5"),
        ([changed(record("m"), resampled=packed(1.5 + 5 * (HONEST - 1.5)))], "resampled gains with a standard deviation"),
        ([changed(record("m"), resampled=packed(1.5 + (HONEST - 1.5) / 5))], "resampled gains with a standard deviation"),
        ([changed(record("m"), resampled=packed(HONEST), ci_low=None, ci_high=None)], "resampled gains without an interval"),
        ([record("m", status="banana")], "found the status 'banana', expected one of ok, failed, not_applicable"),
        ([record("m", results=[])], "line 1: no results, though its status is ok"),
        ([record("m", status="not_applicable")], "line 1: results, though its status is not_applicable"),
        ([record("m", head_classes=None)], "line 1: no head_classes"),
        ([record("m", kind=None)], "line 1: no kind"),
        ([record("m", weights_sha256=None)], "line 1: no weights_sha256"),
        ([record("m", requested=[])], "line 1: no requested size"),
        ([record("m", results=2 * record("m")["results"])], "line 1: top1, fixed: the same result twice"),
        ([record("m", reason="/home/me/x not found")], "line 1: reason: a path on a local disk (/home/me/x not found)"),
        ([record("local-dir:/home/me/x")], "model: a path on a local disk (local-dir:/home/me/x): start the sweep in"),
        ([record("local-dir:C:\\me\\x")], "model: a path on a local disk"),
        ([record("m", environment={"commit": "1a-dirty"})], "measured at the commit 1a-dirty, expected a commit of this repo"),
        ([record("m", finished="yesterday")], "line 1: finished 'yesterday', expected a time such as"),
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


def test_what_is_honest_has_no_fault(capsys: pytest.CaptureFixture[str]) -> None:
    """Of a whole run: every spread of resampled gains is that of its interval, as far as it has to be."""
    assert main(["--check", str(Path(__file__).parents[2] / "docs" / "evidence")]) == 0
    assert "no fault" in capsys.readouterr().out


@pytest.mark.parametrize(("gain", "faults"), [(1.5, 0), (1.6, 1)])
def test_one_cell_in_two_files_has_one_result(
    gain: float, faults: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for who, mine in (("alice", record("m")), ("bob", changed(record("m"), gain=gain, value=50 + gain))):
        (tmp_path / who).mkdir()
        (tmp_path / who / "m.jsonl").write_text(f"{json.dumps(mine | {'where': None})}\n")
    assert main(["--check", str(tmp_path)]) == faults
    said = "bob/m.jsonl, line 1: the same cell as "
    assert (said in capsys.readouterr().out) is bool(faults)


def test_a_line_that_is_no_record_loses_no_other(tmp_path: Path) -> None:
    (tmp_path / "records").mkdir()
    whole = json.dumps(record("m"))
    (tmp_path / "records" / "m.jsonl").write_text(f"{whole}\n{whole[:50]}\n{json.dumps(record('m', 448))}\n")
    warnings: list[str] = []
    assert [one["img_size"] for one in read_records(tmp_path, warnings.append)] == [224, 448]
    assert "m.jsonl, line 2: found truncated or invalid JSON" in warnings[0]


def shared(folder: Path) -> dict[str, list[Any]]:
    """The checkpoint, data and gain of each record, by file."""
    files = sorted((folder / "records").iterdir())
    lines = {file.name: map(json.loads, file.read_text().splitlines()) for file in files}
    return {
        name: [(one["model"], one["data"], one["results"][0]["gain"]) for one in records]
        for name, records in lines.items()
    }


def on(data: str, of: dict[str, Any], finished: str = "2026-01-01T00:00:00+00:00") -> dict[str, Any]:
    return of | {"data": data, "finished": finished, "key": of["key"] | {"data": data}}


def test_records_of_several_runs_and_of_before_go_into_one_file(tmp_path: Path) -> None:
    first = run(tmp_path / "first", on("a", record("m")), on("b", record("m")))
    later = changed(on("b", record("m"), "2026-01-02T00:00:00+00:00"), value=52.0, gain=2.0)
    second, third = run(tmp_path / "second", later), run(tmp_path / "third", on("c", record("m")))
    assert main([str(first), str(second), "--out", str(tmp_path / "out")]) == 0
    assert shared(tmp_path / "out") == {"m.jsonl": [("m", "a", 1.5), ("m", "b", 2.0)]}
    assert main([str(third), "--out", str(tmp_path / "out")]) == 0
    assert shared(tmp_path / "out") == {"m.jsonl": [("m", "a", 1.5), ("m", "b", 2.0), ("m", "c", 1.5)]}


def test_a_cell_that_a_run_has_twice_is_written_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    twice = run(tmp_path / "run", on("a", record("m")))
    later = changed(on("a", record("m"), "2026-01-02T00:00:00+00:00"), value=52.0, gain=2.0)
    (twice / "records" / "m.jsonl").write_text(f"{json.dumps(later)}\n")
    assert main([str(twice), "--out", str(tmp_path / "out")]) == 0
    assert shared(tmp_path / "out") == {"m.jsonl": [("m", "a", 2.0)]}
    assert "1 records left out: 1 measured again since" in " ".join(capsys.readouterr().err.split())


def test_no_two_checkpoints_share_a_file(tmp_path: Path) -> None:
    """Of names that differ in what no file name may have, or in case alone, which not every disk tells apart."""
    for out in range(2):  # in one run, and in one after the other
        names = [("timm/x", "timm_x"), ("Timm_x",)] if out else [("timm/x", "timm_x", "Timm_x")]
        for number, some in enumerate(names):
            results = run(tmp_path / f"run{out}{number}", *map(record, some))
            assert main([str(results), "--out", str(tmp_path / f"out{out}")]) == 0
        files = shared(tmp_path / f"out{out}")
        assert sorted(one[0] for found in files.values() for one in found) == ["Timm_x", "timm/x", "timm_x"]
        assert len({name.casefold() for name in files}) == 3
        assert main(["--check", str(tmp_path / f"out{out}")]) == 0


def test_a_file_with_a_line_that_is_no_record_is_not_replaced(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    results = run(tmp_path / "run", record("m"))
    (tmp_path / "out" / "records").mkdir(parents=True)
    (tmp_path / "out" / "records" / "m.jsonl").write_text("{\n")
    assert main([str(results), "--out", str(tmp_path / "out")]) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "m.jsonl, line 1: found truncated or invalid JSON" in said and "Correct or delete" in said
    assert (tmp_path / "out" / "records" / "m.jsonl").read_text() == "{\n"
