"""Records survive crashes and do not collide."""

import csv
import json
import os
from pathlib import Path

import pytest

from benchmarks.records.files import read_record, read_records, record_path, write_record
from benchmarks.reporting.summary import write_summary

KEY = {"model": "local-dir:/a/b", "data": "d", "task": "single", "img_size": 224, "seed": 0}
RESULT = {"metric": "top1", "protocol": "fixed", "lam": "0.1", "temperature": "inf", "baseline": 50.0, "value": 51.0}


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
    write_record(path, {"n": 1})
    with pytest.raises(ValueError, match="Out of range float values are not JSON compliant"):
        write_record(path, {"n": float("nan")})

    def crash(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, "fsync", crash)
    with pytest.raises(OSError, match="disk full"):
        write_record(path, {"n": 2})
    assert read_record(path) == {"n": 1}
    assert os.listdir(path.parent) == [path.name]  # no temporary file is left


def test_summary_has_a_row_for_each_result_and_for_each_cell_without(tmp_path: Path) -> None:
    finished = {**KEY, "status": "ok", "n": 4, "results": [{**RESULT, "gain": 1 / 3, "ci_low": None}]}
    failed = {**KEY, "status": "failed", "reason": "boom, twice", "results": []}
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
    write_record(record_path(tmp_path, key), {**key, "key": key, "results": rows, "all_settings": settings})
    (record,) = read_records(tmp_path)
    assert read_record(record_path(tmp_path, key)) == record
    assert [row["scores"] for row in record["results"]] == ["logits", "logits;logits", ""]
    assert record["all_settings"] == [settings[0] | {"scores": "logits"}]
    assert record["key"] == key
    new = KEY | {"kept_scores": None}
    rows = [row | {"scores": "log_softmax"} for row in rows]
    write_record(record_path(tmp_path, new), {**new, "key": new, "results": rows, "all_settings": []})
    read = read_record(record_path(tmp_path, new))
    assert read is not None and [row["scores"] for row in read["results"]] == ["log_softmax"] * 3
