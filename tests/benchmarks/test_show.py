"""The picture of the README, and what cannot be shown."""

from pathlib import Path

import pytest
import timm
import torch
from PIL import Image

import benchmarks.show
import timm_csra
from benchmarks.checkpoints import find
from benchmarks.data import sample
from benchmarks.data.datasets import open_image
from benchmarks.data.presented import mosaic
from benchmarks.show import main
from timm_csra.config import SCORES
from timm_csra.evaluation.scoring import score


def test_the_picture_of_the_readme(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--out", str(tmp_path / "new" / "effect.png")]) == 0
    with Image.open(tmp_path / "new" / "effect.png") as picture:
        assert picture.width > 800
        assert len(picture.convert("RGB").getcolors(maxcolors=10**7)) > 10_000
    plain, logits, log_softmax, classes, _ = capsys.readouterr().out.splitlines()
    assert plain.startswith("plain       tiger cat, tabby")
    assert logits.startswith("logits      tabby")
    assert classes == "Classes of the head by imagenet-1k, by the number of classes."
    model = find.find_checkpoints("pypi:tf_efficientnet_lite0")[0].create((224, 224))
    tiles = [open_image(sample.path_of(photo)) for photo in sample.PHOTOGRAPHS[:4]]
    config = timm.data.resolve_model_data_config(model, args={"crop_mode": "squash", "crop_pct": 1.0})
    picture = mosaic(tiles, 2, (224, 224), Image.Resampling.BICUBIC)
    x = timm.data.create_transform(**config)(picture)[None]
    with torch.inference_mode():
        top = timm_csra.wrap(model, lam=0.3, scores="log_softmax")(x)[0].topk(6).indices.tolist()
    synsets = timm.data.ImageNetInfo()
    told = [name.strip() for name in log_softmax.removeprefix("log_softmax").split(",")]
    names = [synsets.index_to_description(index).lower() for index in top]
    assert all(name.lower() in whole for name, whole in zip(told, names, strict=True))


def test_precision_is_that_of_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = []

    def scored(*args: object, **kwargs: object) -> object:
        found.append(score(*args, **kwargs))  # type: ignore[arg-type]
        return found[-1]

    monkeypatch.setattr(benchmarks.show, "score", scored)
    for amp in ("auto", "none", "bf16"):
        out = ["--out", str(tmp_path / f"{amp}.png")]
        assert main(["sample:coffee", "--device", "cpu", "--amp", amp, *out]) == 0
    auto, none, bf16 = (scores.base for scores, _ in found)
    assert torch.equal(auto, none)
    assert 0 < (bf16 - none).abs().max() < 0.1 * none.abs().max()


def test_the_maps_are_those_of_the_scores_that_were_asked_for(tmp_path: Path) -> None:
    pictures = []
    for scores in SCORES:
        assert main(["sample:coffee", "--scores", scores, "--out", str(tmp_path / f"{scores}.png")]) == 0
        pictures.append((tmp_path / f"{scores}.png").read_bytes())
    assert pictures[0] != pictures[1]


def test_few_classes_and_what_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, arguments in (("fine", {}), ("unpooled", {"global_pool": ""})):
        timm.models.save_for_hf(
            timm.create_model("test_resnet", num_classes=3, **arguments),
            str(tmp_path / name),
            model_args=arguments,
            safe_serialization=True,
        )
    photo = tmp_path / "photo.png"
    Image.new("RGB", (30, 20)).save(photo)
    out = ["--out", str(tmp_path / "out.png")]
    assert main([str(photo), "--model", f"local-dir:{tmp_path / 'fine'}", *out]) == 0
    assert (tmp_path / "out.png").is_file()
    for arguments, text in (
        ([str(photo), "--model", f"local-dir:{tmp_path / 'unpooled'}"], "test_resnet: found global_pool=''"),
        ([str(tmp_path / "gone.png")], "gone.png: cannot be read as an image"),
        ([str(photo), "--lam", "-1"], "lam must be finite and at least 0, got -1.0"),
        ([str(photo), "--lam-log-softmax", "-2"], "lam must be finite and at least 0, got -2.0"),
        ([str(photo), "--model", "resnet5o"], "resnet5o: matches no pretrained timm model"),
        (
            [str(photo), "--model", f"local-dir:{tmp_path / 'fine'},local-dir:{tmp_path / 'unpooled'}"],
            "found 2 checkpoints; expected one.",
        ),
    ):
        assert main([*arguments, *out]) == 2
        assert text in capsys.readouterr().err


def test_the_file_that_is_named_is_the_one_that_is_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, file in (("plain", "plain.png"), ("with.dots.jpg", "with.dots.jpg")):
        assert main(["sample:coffee", "--out", str(tmp_path / "new" / name)]) == 0
        assert capsys.readouterr().out.splitlines()[-1] == f"written to {tmp_path / 'new' / file}"
        with Image.open(tmp_path / "new" / file) as picture:
            assert picture.width > 800
    assert {path.name for path in (tmp_path / "new").iterdir()} == {"plain.png", "with.dots.jpg"}


def test_no_picture_can_be_written_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder.png").mkdir()
    for out, text in (
        (tmp_path, f"--out {tmp_path}: found a folder; expected a file to write, such as {tmp_path / 'effect.jpg'}."),
        (tmp_path / "folder", f"--out {tmp_path / 'folder.png'}: found a folder; expected a file"),
        (tmp_path / "file" / "effect.jpg", f"--out {tmp_path / 'file' / 'effect.jpg'}: cannot be written: "),
        (tmp_path / "effect.txt", f"--out {tmp_path / 'effect.txt'}: found .txt; expected one of ."),
    ):
        before = sorted(tmp_path.parent.rglob("*"))
        assert main(["sample:coffee", "--out", str(out)]) == 2
        assert text in capsys.readouterr().err
        assert sorted(tmp_path.parent.rglob("*")) == before
