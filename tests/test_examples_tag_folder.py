"""`examples/tag_folder.py`: the table against the formula, and pictures that cannot be read."""

import csv
from pathlib import Path

import pytest
import torch
from PIL import Image
from timm.data import create_transform, resolve_model_data_config

import timm_csra
from examples.tag_folder import main

from .paper import NAMES, pictures, refused, saved, scores_of_classes, scores_of_locations


def rows_of(table: Path) -> list[dict[str, str]]:
    with table.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_the_table_has_the_scores_of_the_formula_and_their_places(tmp_path: Path) -> None:
    folder, plain = saved(tmp_path / "model", 0.4, "log_softmax")
    files = [*pictures(tmp_path / "photos", 3), *pictures(tmp_path / "photos" / "more, of them", 2)]
    (tmp_path / "photos" / "notes.txt").write_text("no picture")
    turned = Image.open(files[0])
    turned.getexif()[0x0112] = 6  # to be shown turned by 90 degrees
    turned.save(files[0], exif=turned.getexif())
    out = tmp_path / "tags.csv"
    assert (
        main([str(tmp_path / "photos"), "--model", folder, "--out", str(out), "--top", "3", "--batch-size", "2"]) == 0
    )

    config = resolve_model_data_config(plain) | {"crop_mode": "squash", "crop_pct": 1.0}
    opened = [Image.open(file).convert("RGB") for file in files]
    opened[0] = opened[0].rotate(-90, expand=True)
    x = torch.stack([create_transform(**config)(picture) for picture in opened])
    expected, maps = scores_of_classes(plain, x, 0.4, "log_softmax"), scores_of_locations(plain, x, "log_softmax")
    assert len({tuple(row.tolist()) for row in expected.argsort(dim=1)}) > 1, "the pictures differ"
    by_file = {file.relative_to(tmp_path / "photos").as_posix(): index for index, file in enumerate(files)}
    rows = rows_of(out)
    assert [*dict.fromkeys(row["file"] for row in rows)] == sorted(by_file) and len(rows) == 15
    for start in range(0, 15, 3):
        image = by_file[rows[start]["file"]]
        best = expected[image].topk(3)
        for row, k, score in zip(rows[start : start + 3], best.indices, best.values, strict=True):
            assert row["tag"] == NAMES[k] and float(row["score"]) == pytest.approx(score.item(), abs=1e-3)
            y, x_ = divmod(maps[image, k].argmax().item(), maps.shape[3])
            assert float(row["x"]) == pytest.approx((x_ + 0.5) / maps.shape[3], abs=1e-4)
            assert float(row["y"]) == pytest.approx((y + 0.5) / maps.shape[2], abs=1e-4)


def test_broken_pictures_are_named_and_the_others_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, _ = saved(tmp_path / "model")
    files = pictures(tmp_path / "photos", 3)
    files[0].write_bytes(files[0].read_bytes()[:200])
    (tmp_path / "photos" / "a.jpg").write_text("no picture")
    (tmp_path / "photos" / "b.jpg").write_bytes(b"")
    out = tmp_path / "tags.csv"
    assert main([str(tmp_path / "photos"), "--model", folder, "--out", str(out), "--batch-size", "1"]) == 1
    assert {row["file"] for row in rows_of(out)} == {"1.png", "2.png"}
    printed = capsys.readouterr()
    assert all(f"{tmp_path / 'photos' / name}: not read: " in printed.err for name in ("0.png", "a.jpg", "b.jpg"))
    assert printed.out == f"{out}: tags of 2 pictures; 3 could not be read\n"


def test_what_is_interrupted_leaves_the_table_of_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, _ = saved(tmp_path / "model")
    pictures(tmp_path / "photos", 4)
    out = tmp_path / "tags.csv"
    out.write_text("of before")
    calls, score_maps = [], timm_csra.score_maps

    def interrupted(*args: object, **kwargs: object) -> object:
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return score_maps(*args, **kwargs)

    monkeypatch.setattr(timm_csra, "score_maps", interrupted)
    with pytest.raises(KeyboardInterrupt):
        main([str(tmp_path / "photos"), "--model", folder, "--out", str(out), "--batch-size", "2"])
    assert out.read_text() == "of before"


def test_names_for_a_model_that_has_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, plain = saved(tmp_path / "model")
    torch.save(plain.state_dict(), tmp_path / "weights.pth")
    pictures(tmp_path / "photos", 1)
    (tmp_path / "names.txt").write_text("\n".join(["one", "two", "three", "four", "five"]))
    command = [str(tmp_path / "photos"), "--model", f"file:test_resnet@{tmp_path / 'weights.pth'}", "--lam", "0"]
    command += ["--out", str(tmp_path / "tags.csv")]
    assert main(command) == 0
    assert {row["tag"] for row in rows_of(tmp_path / "tags.csv")} == set("01234")
    assert main([*command, "--class-names", str(tmp_path / "names.txt")]) == 0
    assert {row["tag"] for row in rows_of(tmp_path / "tags.csv")} == {"one", "two", "three", "four", "five"}
    (tmp_path / "names.txt").write_text("one\ntwo\n")
    with refused("test_resnet.*: found 2 names of classes, expected 5"):
        main([*command, "--class-names", str(tmp_path / "names.txt")])


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["empty", "--model", "test_resnet"], "empty: found no pictures; expected a folder with files such as .jpg"),
        (["nowhere", "--model", "test_resnet"], "nowhere: found no such folder; expected a folder"),
        (["photos/0.png", "--model", "test_resnet"], "0.png: found a file; expected a folder"),
        (["photos", "--model", "test_resnet", "--out", "empty"], "--out empty: found a folder; expected the name of"),
        (["photos", "--model", "test_resnet", "--out", "no/t.csv"], "--out no/t.csv: found no folder that it could be"),
        (
            ["photos", "--model", "test_resnet", "--top", "0"],
            "found --top 0 --batch-size 16; expected at least 1 of each",
        ),
    ],
)
def test_wrong_arguments(arguments: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    pictures(tmp_path / "photos", 1)
    (tmp_path / "empty" / "a folder.jpg").mkdir(parents=True)
    (tmp_path / "empty" / "vectors.eps").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")
    with refused(said):
        main(arguments)


def test_a_model_that_is_not_there(tmp_path: Path) -> None:
    pictures(tmp_path / "photos", 1)
    for model, said in {
        "my-modle": "my-modle: .*an existing folder",
        "file:a@b": "found 'a', expected ARCH@PATH",
    }.items():
        with refused(said):
            main([str(tmp_path / "photos"), "--model", model])
