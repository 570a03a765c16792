"""The scripts of `examples/`, as somebody would run them."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from torch import nn

import timm_csra
from examples.own_labels import batches, main

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Each label is a disc of its colour somewhere on grey noise."""
    folder = tmp_path / "photos"
    folder.mkdir()
    rng, rows = np.random.default_rng(0), ["file,labels"]
    rows_of_pixels, columns = np.mgrid[:96, :96]
    for index in range(80):
        pixels, labels = rng.integers(90, 120, (96, 96, 3), dtype=np.uint8), []
        for channel, name in enumerate(("red", "green", "blue")):
            if rng.random() < 0.5:
                y, x = rng.integers(12, 84, 2)
                pixels[(rows_of_pixels - y) ** 2 + (columns - x) ** 2 < 144] = 255 * np.eye(3)[channel]
                labels.append(name)
        Image.fromarray(pixels).save(folder / f"{index}.png")
        rows.append(f"{index}.png,{' '.join(labels)}")
    (folder / "labels.csv").write_text("\n".join(rows), encoding="utf-8")
    return folder


@pytest.fixture
def checkpoint(tmp_path: Path) -> str:
    torch.manual_seed(0)
    model = timm.create_model("test_resnet", num_classes=7)
    model.pretrained_cfg |= {"input_size": (3, 96, 96), "label_names": list("abcdefg")}
    timm.models.save_for_hf(model, str(tmp_path / "checkpoint"), safe_serialization=True)
    return f"local-dir:{tmp_path / 'checkpoint'}"


def test_own_labels(
    tmp_path: Path, photos: Path, checkpoint: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pushed = []

    def push(model: nn.Module, name: str) -> SimpleNamespace:
        pushed.append((model, name))
        return SimpleNamespace(commit_url=f"https://hub/{name}/commit")

    monkeypatch.setattr(timm_csra, "push_to_hub", push)
    arguments = [str(photos), "--model", checkpoint, "--out", str(tmp_path / "out")]
    model = main([*arguments, "--push", "user/colours"])
    assert pushed == [(model, "user/colours")]
    printed = capsys.readouterr().out
    assert "on held-out images  mAP" in printed and printed.endswith("https://hub/user/colours/commit\n")
    assert timm_csra.is_wrapped(model) and model.csra.scores == "logits"

    again = timm_csra.from_pretrained(tmp_path / "out")
    assert again.csra == model.csra and again.pretrained_cfg["label_names"] == ["blue", "green", "red"]
    rows = [{"file": f"{index}.png", "labels": ""} for index in range(4)]
    ((images, _),) = batches(photos, again, ["blue", "green", "red"], rows)
    for lam in (model.csra.lam, 0.2):
        model.csra.lam = again.csra.lam = lam
        with torch.inference_mode():
            assert torch.equal(again(images), model(images))


def test_the_classifier_learns_and_the_backbone_stays(tmp_path: Path, photos: Path, checkpoint: str) -> None:
    """On a backbone that was not trained at all, colours are told apart all the same."""
    model = timm_csra.unwrap(main([str(photos), "--model", checkpoint, "--out", str(tmp_path / "out")]))
    before = timm.create_model(checkpoint, pretrained=True).state_dict()
    after = {name: weight for name, weight in model.state_dict().items() if not name.startswith("fc.")}
    assert all(torch.equal(weight, before[name]) for name, weight in after.items()) and len(after) > 10
    rows = [line.split(",") for line in (photos / "labels.csv").read_text().splitlines()[1:]]
    loader = batches(
        photos, model, ["blue", "green", "red"], [dict(zip(("file", "labels"), row, strict=True)) for row in rows]
    )
    with torch.inference_mode():
        right = torch.cat([(model(images) > 0) == (targets > 0) for images, targets in loader])
    assert right.float().mean() > 0.8


@pytest.mark.parametrize(("table", "said"), [
    (None, "labels.csv: no such file; expected a table with the columns file and labels."),
    ("file,label\n0.png,cat\n", "found the columns file, label; expected file,labels."),
    ("file;labels\n0.png;cat\n", "found the columns file;labels; expected file,labels."),
    ("", "found the columns none; expected file,labels."),
    ("file,labels\n", "found 0 pictures of 0 labels; expected 12 or more pictures of two or more labels."),
    ("file,labels\n0.png,cat\n", "found 1 pictures of 1 labels; expected 12 or more pictures of two or more labels."),
    ("\ufefffile,labels\nmissing.png,cat\n", "row 2: no such picture: "),
    ('file,labels\n0.png,cat\n0.png,"cat,dog"\n', "row 3: found the labels 'cat,dog'; expected spaces between them."),
    ("file,labels\n0.png,cat,dog\n", "row 2: found ['0.png', 'cat', ['dog']]; expected a file and its labels."),
    ("file,labels\n0.png\n", "row 2: found ['0.png', None]; expected a file and its labels."),
])  # fmt: skip
def test_a_table_of_labels_that_cannot_be_used_is_refused_in_one_line(
    table: str | None, said: str, tmp_path: Path
) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "0.png")
    if table is not None:
        (tmp_path / "labels.csv").write_text(table, encoding="utf-8")
    with pytest.raises(SystemExit) as refused:
        main([str(tmp_path)])
    assert said in str(refused.value) and "\n" not in str(refused.value)


def test_what_own_labels_cannot_read_is_named_before_anything_is_trained(
    tmp_path: Path, photos: Path, checkpoint: str
) -> None:
    out = tmp_path / "a file"
    out.touch()
    for arguments, said in {
        ("--out", str(out)): "a file: found a file; expected a folder",
        ("--model", "nosuch"): "--model nosuch: Unknown model",
    }.items():
        with pytest.raises(SystemExit, match=said):
            main([str(photos), *arguments])
    file = next(photos.glob("*.png"))
    file.write_bytes(file.read_bytes()[:60])
    with pytest.raises(SystemExit, match=f"{file.name}: not read as a picture: "):
        main([str(photos), "--model", checkpoint, "--out", str(tmp_path / "out")])


SCRIPTS = sorted(path.stem for path in (ROOT / "examples").glob("*.py"))


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_script_explains_itself(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    script = pytest.importorskip(f"examples.{name}", reason="the extra examples is not installed")
    with pytest.raises(SystemExit) as stopped:
        script.main(["--help"])
    printed = capsys.readouterr().out
    assert stopped.value.code == 0 and script.__doc__.splitlines()[0] in printed
    assert f"python examples/{name}.py" in printed and "pip install" in printed


def test_the_documentation_has_every_example_and_its_command() -> None:
    page = (ROOT / "docs" / "examples.md").read_text(encoding="utf-8")
    for path in (ROOT / "examples").iterdir():
        if path.suffix in (".py", ".ipynb"):
            assert f"](../examples/{path.name})" in page and f"examples/{path.name}`" in page.replace(".py ", ".py`")
