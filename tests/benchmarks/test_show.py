"""The picture of the README, and what cannot be shown."""

from pathlib import Path

import pytest
import timm
from PIL import Image

from benchmarks.show import main


def test_the_picture_of_the_readme(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--out", str(tmp_path / "new" / "effect.png")]) == 0
    with Image.open(tmp_path / "new" / "effect.png") as picture:
        assert picture.width > 800
        assert len(picture.convert("RGB").getcolors(maxcolors=10**7)) > 10_000
    plain, wrapped, _ = capsys.readouterr().out.splitlines()
    assert plain.startswith("plain    tiger cat, tabby")
    assert wrapped.startswith("wrapped  tabby")


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
        ([str(photo), "--model", "resnet5o"], "resnet5o: matches no pretrained timm model"),
    ):
        assert main([*arguments, *out]) == 2
        assert text in capsys.readouterr().err
