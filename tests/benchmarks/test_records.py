"""Records survive crashes and do not collide."""

import csv
import json
import os
from pathlib import Path

import pytest

from benchmarks.records.files import RecordError, read_record, read_records, record_path, write_record
from benchmarks.reporting.summary import read_folder, write_summary

KEY = {"model": "local-dir:/a/b", "data": "d", "task": "single", "img_size": 224, "seed": 0}
RESULT = {"metric": "top1", "protocol": "fixed", "lam": "0.1", "temperature": "inf", "baseline": 50.0, "value": 51.0}
RESULT |= {"gain": 1.0, "ci_low": None, "ci_high": None}
RECORD = {**KEY, "key": KEY, "status": "ok", "reason": None, "n": 4, "results": [RESULT]}


def test_path_is_readable_and_depends_on_the_whole_key(tmp_path: Path) -> None:
    path = record_path(tmp_path, KEY)
    assert path.parent == tmp_path / "records"
    assert path.name.startswith("local-dir__a_b--d--single--224--")
    assert record_path(tmp_path, dict(reversed(KEY.items()))) == path
    for changed in ({"seed": 1}, {"model": "local-dir:/a_b"}, {"img_size": "224x225"}):
        assert record_path(tmp_path, KEY | changed) != path


def test_a_crash_while_writing_keeps_the_old_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = record_path(tmp_path, KEY)
    assert read_record(path) is None
    write_record(path, RECORD)
    kept = read_record(path)
    with pytest.raises(ValueError, match="Out of range float values are not JSON compliant"):
        write_record(path, RECORD | {"n": float("nan")})

    def crash(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, "fsync", crash)
    with pytest.raises(OSError, match="disk full"):
        write_record(path, RECORD | {"n": 2})
    assert read_record(path) == kept is not None
    assert os.listdir(path.parent) == [path.name]  # no temporary file is left


def test_summary_has_a_row_for_each_result_and_for_each_cell_without(tmp_path: Path) -> None:
    finished = RECORD | {"results": [{**RESULT, "gain": 1 / 3}]}
    failed = RECORD | {"status": "failed", "reason": "boom, twice", "results": []}
    write_record(record_path(tmp_path, KEY), finished)
    write_record(record_path(tmp_path, KEY | {"seed": 1}), failed)
    path, _ = write_summary(tmp_path)
    with path.open(newline="") as file:
        first, second = sorted(csv.DictReader(file), key=lambda row: row["status"], reverse=True)
    assert first["gain"] == "0.3333"
    assert first["ci_low"] == ""
    assert first["baseline"] == "50.0000"
    assert (first["model"], first["img_size"], first["lam"]) == ("local-dir:/a/b", "224", "0.1")
    assert (second["status"], second["reason"], second["metric"]) == ("failed", "boom, twice", "")
    assert json.dumps(list(first))  # the columns that the documentation promises, in order
    promised = (
        "model,data,task,img_size,n,columns,metric,protocol,scores,lam,temperature,baseline,value,gain,ci_low,ci_high"
    )
    assert list(first)[:16] == promised.split(",")
    assert (first["scores"], second["scores"]) == ("logits", "")


def test_records_of_before_there_were_two_kinds_of_scores_are_of_logits(tmp_path: Path) -> None:
    rows = [RESULT, RESULT | {"protocol": "crossfit", "lam": "0.1;0.3"}, RESULT | {"protocol": "max_pool", "lam": ""}]
    settings = [{"lam": 0.1, "temperature": "inf", "top1": 51.0}]
    key = KEY | {"scores": None, "settings": [[0.1, "inf"]]}
    about = {"status": "ok", "n": 4, "key": key, "results": rows, "all_settings": settings}
    write_record(record_path(tmp_path, key), {**key, **about})
    (record,) = read_records(tmp_path)
    assert read_record(record_path(tmp_path, key)) == record
    assert [row["scores"] for row in record["results"]] == ["logits", "logits;logits", ""]
    assert record["all_settings"] == [settings[0] | {"scores": "logits"}]
    assert record["key"] == key
    new = KEY | {"kept_scores": None}
    rows = [row | {"scores": "log_softmax"} for row in rows]
    write_record(record_path(tmp_path, new), {**new, **about, "key": new, "results": rows, "all_settings": []})
    read = read_record(record_path(tmp_path, new))
    assert read is not None and [row["scores"] for row in read["results"]] == ["log_softmax"] * 3


def test_r_precision_had_another_name(tmp_path: Path) -> None:
    """And which images count for a metric was not said."""
    every = ("mAP", "lrap", "recall_at_k")
    rows = [RESULT | {"metric": metric} for metric in every]
    settings = [{"lam": 0.1, "temperature": "inf", "lrap": 51.0, "recall_at_k": 52.0}]
    before = RECORD | {"task": "multilabel", "results": rows, "all_settings": settings}
    write_record(record_path(tmp_path, KEY), before)
    (record,) = read_records(tmp_path)
    assert {row["metric"]: row["n"] for row in record["results"]} == {"mAP": 4, "lrap": None, "r_precision": None}
    assert record["all_settings"][0]["r_precision"] == 52.0
    assert "recall_at_k" not in json.dumps(record)
    path, _ = write_summary(tmp_path)
    rows = list(csv.DictReader(path.open(newline="")))
    assert [(row["metric"], row["n"]) for row in rows] == [("mAP", "4"), ("lrap", ""), ("r_precision", "")]
    write_record(record_path(tmp_path, KEY), before | {"results": [RESULT | {"metric": "lrap", "n": 3}]})
    (record,) = read_records(tmp_path)
    assert [row["n"] for row in record["results"]] == [3]


def without(name: str, **changes: object) -> str:
    return json.dumps({key: value for key, value in (RECORD | changes).items() if key != name})


BROKEN = {
    "empty": ("", "an empty file"),
    "cut": (json.dumps(RECORD)[:-9], r"truncated or invalid JSON \(Expecting .*line 1 column"),
    "no text": (b"\xff\xfe\x00", "truncated or invalid JSON"),
    "not JSON": (json.dumps(RECORD | {"n": float("nan")}), r"truncated or invalid JSON \(NaN is not JSON\)"),
    "a list": ("[]", "a JSON list"),
    "nothing": ("null", "a JSON NoneType"),
    "an object": ("{}", "a record without status"),
    "no key": (without("key"), "a record without key"),
    "no results": (without("results"), "a record without results"),
    "other results": (without("", results={"top1": 1}), "a record whose results is a dict"),
    "a word as a result": (without("", results=["top1"]), "a result that is a str"),
    "no gain": (without("", results=[{k: v for k, v in RESULT.items() if k != "gain"}]), "a result without gain"),
    "a gain in words": (without("", results=[RESULT | {"gain": "1.0"}]), "a result whose gain is a str"),
    "no fixed": (without("", results=[RESULT | {"protocol": "best"}]), "results of top1 without the protocol fixed"),
    "phases": (without("", phases=None), "a record whose phases is a NoneType"),
    "settings": (without("", all_settings=[1]), "one of all_settings that is a int"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_what_is_no_record_is_named_and_left_out(case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content, found = BROKEN[case]
    write_record(record_path(tmp_path, KEY), RECORD)
    broken = tmp_path / "records" / "aaa.json"
    broken.write_bytes(content if isinstance(content, bytes) else content.encode())
    before = broken.read_bytes()
    with pytest.raises(RecordError, match=rf"aaa.json: found {found}.*, expected the record of a finished cell\."):
        read_record(broken)
    folder = read_folder(tmp_path)
    (line,) = capsys.readouterr().err.splitlines()
    assert str(broken) in line
    assert "It is skipped: run the same sweep again to measure its cell again, or delete it." in line
    assert [record["status"] for record in folder.records] == ["ok"]
    assert len(folder.rows) == 1
    assert broken.read_bytes() == before


def test_two_runs_of_the_same_thing_have_equal_summaries(tmp_path: Path) -> None:
    texts = set()
    for run in ("one", "two"):
        took = {"seconds": 12.5, "phases": {"model": 9.0}, "cost": {"ratio": 1.03}} if run == "two" else {}
        write_record(record_path(tmp_path / run, KEY), RECORD | took)
        path, _ = write_summary(tmp_path / run)
        texts.add(path.read_text())
    assert len(texts) == 1
