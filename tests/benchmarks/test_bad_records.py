"""No line of a file of records, whatever is in it, ends a report or a check in a traceback."""

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from benchmarks.records.files import read_records
from benchmarks.report import main as report
from benchmarks.share import main as share

EVIDENCE = Path(__file__).parents[2] / "docs" / "evidence"
MISSING = object()
VALUES = (MISSING, None, "x", -1, 0.5, 10**400, True, [[1], {}], {"x": "y"}, "1e999")


def honest(data: str = "imagewoof500") -> dict[str, Any]:
    """A record of the evidence, with one metric and one point of its curves."""
    with (EVIDENCE / "records" / "pypi_tf_efficientnet_lite0.jsonl").open(encoding="utf-8") as file:
        for record in map(json.loads, file):
            if (record["status"], record["data"], record["task"], record["img_size"]) == ("ok", data, "mosaic", 224):
                of_map = [row for row in record["results"] if row["metric"] == "mAP"]
                curve = [row for row in of_map if row["protocol"] == "curve"][:1]
                results = [row for row in of_map if row["protocol"] != "curve"]
                key = record["key"] | {"settings": record["settings"][:1]}
                record |= {"results": results + curve, "all_settings": record["all_settings"][:1], "key": key}
                return record | {"settings": record["settings"][:1]}
    raise LookupError(data)


def named(record: dict[str, Any], model: str) -> dict[str, Any]:
    copied = copy.deepcopy(record)
    about = {"model": model, "weights": f"w of {model}"}
    return {**copied, **about, "weights_sha256": f"sha of {model}", "key": {**copied["key"], **about}}


def line(record: Any) -> str:
    return json.dumps(record).replace('"1e999"', "1e999")  # what Python reads as infinity


def spoiled(record: dict[str, Any]) -> Iterator[Any]:
    """With one field missing, or of another type or value, at every place."""
    agreement = {"left_out": ["a"], "reason": None, "images": 3, "data": "d", "fingerprint": "f"}
    record = record | {"agreement": agreement, "left_out": [{"metric": "mAP", "scores": "logits", "reason": "why"}]}
    curve = len(record["results"]) - 1
    rows = [("results", 0), ("results", curve), ("all_settings", 0), ("left_out", 0)]
    for place in [(), ("key",), ("key", "evaluation"), ("environment",), ("agreement",), ("phases",), *rows]:
        for name in dict.fromkeys([*_at(record, place), "never heard of"]):
            for value in VALUES:
                mine = named(record, "-".join(map(str, (*place, name, VALUES.index(value)))))
                where = _at(mine, place)
                where.pop(name, None) if value is MISSING else where.__setitem__(name, value)
                yield mine
    yield from VALUES[1:]


def _at(record: Any, place: tuple[Any, ...]) -> Any:
    for step in place:
        record = record[step]
    return record


@pytest.mark.slow
def test_no_line_ends_a_report_or_a_check_in_a_traceback(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "records").mkdir()
    lines = [line(named(honest(), name)) for name in ("good", "better")]
    lines += map(line, spoiled(honest()))
    (tmp_path / "records" / "all.jsonl").write_bytes(
        b"\n".join([*map(str.encode, lines), b"\xff\xfe", b'{"a": 1', b""])
    )
    (tmp_path / "records" / "folder.jsonl").mkdir()
    (tmp_path / "records" / "folder.json").mkdir()
    said: list[str] = []
    read = read_records(tmp_path, said.append)
    assert {"good", "better"} <= {record["model"] for record in read}
    assert any("all.jsonl, line" in one and "a result whose gain is a str" in one for one in said)
    assert any("folder.jsonl: found an unreadable file (Is a directory)" in one for one in said)
    assert len(read) + len(said) == len(lines) + 4
    assert share(["--check", str(tmp_path)]) == 1
    # Figures of a thousand checkpoints take half a minute; 11 shares no factor with the number of values.
    assert len(VALUES) % 11
    (tmp_path / "records" / "all.jsonl").write_text("\n".join(lines[:2] + lines[2::11]))
    assert report([str(tmp_path), "--no-plots"]) == 0
    capsys.readouterr()


@pytest.mark.parametrize(("change", "found"), [
    ({"n": "x"}, "a result whose n is a str"),
    ({"p_value": "x"}, "a result whose p_value is a str"),
    ({"p_value": 7.0}, "mAP, fixed: a p-value of 7.0, expected a gain and 0 to 1"),
    ({"gain": None}, "mAP, fixed: an interval without a gain"),
    ({"lam": "abc"}, "mAP, fixed: lam 'abc', expected numbers"),
    ({"resampled": "not base64!"}, "mAP, fixed: resampled gains that cannot be read"),
    ({"resampled": "AH4AfgB+"}, "mAP, fixed: resampled gains that are fewer than two, or not finite"),
])  # fmt: skip
def test_a_line_that_cannot_be_used_is_named_and_left_out(
    change: dict[str, Any], found: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = named(honest(), "bad")
    bad["results"][0] |= change
    (tmp_path / "records").mkdir()
    (tmp_path / "records" / "r.jsonl").write_text(f"{line(named(honest(), 'good'))}\n{line(bad)}\n")
    said: list[str] = []
    assert [record["model"] for record in read_records(tmp_path, said.append)] == ["good"]
    assert f"r.jsonl, line 2: found {found}" in said[0] and said[0].endswith("It is skipped.")
    assert share(["--check", str(tmp_path)]) == 1
    assert f"line 2: found {found}" in capsys.readouterr().out
