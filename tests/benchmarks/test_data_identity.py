"""Data are the same where they are in the same place with the same content, and not because of their name."""

import json
import os
import shutil
import tarfile
import zipfile
from pathlib import Path

import datasets
import numpy as np
import pytest
import timm
import torch
import webdataset
from PIL import Image
from safetensors.torch import load_file

import benchmarks.workers
from benchmarks.data.sources import load_image_set
from benchmarks.sweep import main


def pictures(root: Path, seed: int, count: int = 4) -> Path:
    """The names do not depend on the seed, and neither do the sizes of the files."""
    rng = np.random.default_rng(seed)
    for index in range(count):
        file = root / ("cat", "dog")[index % 2] / f"{index}.bmp"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (20, 30, 3), dtype=np.uint8)).save(file)
        os.utime(file, (seed, seed))
    return root


def shards(root: Path, seed: int, count: int = 12, number: int = 3) -> Path:
    root.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    names = [f"val-{shard:04}.tar" for shard in range(number)]
    for shard, name in enumerate(names):
        with webdataset.TarWriter(str(root / name)) as writer:
            for index in range(shard, count, number):
                pixels = rng.integers(0, 256, (20, 30, 3), dtype=np.uint8)
                writer.write({"__key__": f"{index:04}", "png": pixels, "cls": str(index % 2).encode()})
    split = {"name": "validation", "filenames": names, "num_samples": count}
    split["shard_lengths"] = [len(range(shard, count, number)) for shard in range(number)]
    (root / "_info.json").write_text(json.dumps({"splits": {"validation": split}}))
    return root


def archive(path: Path, folder: Path) -> Path:
    path.parent.mkdir(exist_ok=True)
    if path.suffix == ".zip":
        with zipfile.ZipFile(path, "w") as file:
            for picture in sorted(folder.rglob("*.bmp")):  # with one date, which says nothing
                file.writestr(str(picture.relative_to(folder)), picture.read_bytes())
    else:
        with tarfile.open(path, "w") as tar:
            tar.add(folder, "photos")
    return path


def hub_dataset(root: Path, folder: Path) -> Path:
    files = sorted(folder.rglob("*.bmp"))
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["cat", "dog"])})
    rows = {"image": [Image.open(file) for file in files], "label": [int(file.parent.name == "dog") for file in files]}
    (root / "data").mkdir(parents=True, exist_ok=True)
    table = root / "data" / "validation-00000-of-00001.parquet"
    datasets.Dataset.from_dict(rows, features=features).to_parquet(str(table))
    card = {"dataset_info": {"splits": [{"name": "validation", "num_bytes": 1, "num_examples": 4}]}}
    (root / "README.md").write_text(f"---\n{json.dumps(card)}\n---\n")
    return root


def load(kind: str, root: Path, seed: int) -> str:
    """The fingerprint of data whose name, files' names and labels do not depend on the seed."""
    folder, spec, data_dir = pictures(root / "photos", seed), "", None
    if kind in ("zip", "tar"):
        spec = str(archive(root / f"photos.{kind}", folder))
        shutil.rmtree(folder)
    elif kind == "folder":
        spec = str(folder)
    elif kind == "torch":
        (root / "all").mkdir(exist_ok=True)
        shutil.rmtree(root / "all", ignore_errors=True)
        shutil.copytree(folder, root / "all" / "validation")
        spec, data_dir = "torch/image_folder", str(root / "all")
    elif kind == "wds":
        shutil.rmtree(root / "shards", ignore_errors=True)
        spec, data_dir = "wds/x", str(shards(root / "shards", seed))
    elif kind in ("hfds", "hfids"):
        spec, data_dir = f"{kind}/{hub_dataset(root / 'set', folder)}", str(root.parent / "cache")
    return load_image_set(spec, data_dir=data_dir).fingerprint


@pytest.mark.parametrize("kind", ["folder", "zip", "tar", "torch", "wds", "hfds", "hfids"])
def test_other_pictures_of_the_same_names_are_other_data(kind: str, tmp_path: Path) -> None:
    first = load(kind, tmp_path / "a", 1)
    if kind in ("folder", "zip", "torch"):
        assert load(kind, tmp_path / "a", 1) == first, "the same once more"
    assert load(kind, tmp_path / "a", 2) != first, "other pictures in the same place"
    assert load(kind, tmp_path / "b", 1) != first, "another place"


def test_a_folder_is_the_same_from_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = load_image_set(pictures(tmp_path / "photos", 1))
    (tmp_path / "link").symlink_to(tmp_path / "photos")
    monkeypatch.chdir(tmp_path)
    assert {load_image_set(spec).fingerprint for spec in ("photos", "link", "./photos/")} == {found.fingerprint}
    file = tmp_path / "photos" / "cat" / "0.bmp"
    os.utime(file, (2, 2))
    assert load_image_set("photos").fingerprint != found.fingerprint


@pytest.fixture
def checkpoint(tmp_path: Path) -> str:
    torch.manual_seed(0)
    model = timm.create_model("test_resnet", num_classes=2)
    labels = {"label_names": ["cat", "dog"]}
    timm.models.save_for_hf(model, str(tmp_path / "model"), model_config=labels, safe_serialization=True)
    return f"local-dir:{tmp_path / 'model'}"


def sweep(out: Path, *arguments: str) -> list[dict]:
    assert main(["--out", str(out), "--device", "cpu", "--img-size", "64", "--batch-size", "4", *arguments]) == 0
    return [json.loads(path.read_text()) for path in sorted((out / "records").glob("*.json"))]


def test_two_places_are_two_records_with_scores_of_their_own(
    tmp_path: Path, checkpoint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ("--models", checkpoint, "--data", "wds/x", "--workers", "0", "--keep-scores", "--data-dir")
    for name in ("A", "B"):
        sweep(tmp_path / "out", *arguments, str(shards(tmp_path / name, ord(name))))
    records = sweep(tmp_path / "out", *arguments, str(tmp_path / "A"))
    assert len(records) == 2
    kept = [load_file(file)["base"] for file in (tmp_path / "out" / "scores").iterdir()]
    assert len(kept) == 2 and not torch.equal(*kept)
    printed = capsys.readouterr().out
    assert "wds/x:validation (A)" in printed and "wds/x:validation (B)" in printed
    status = main(["--models", checkpoint, "--data", "wds/x", "--data-dir", str(shards(tmp_path / "C", 7)), "--rescore",
                   "--out", str(tmp_path / "out"), "--device", "cpu", "--img-size", "64"])  # fmt: skip
    assert status == 1
    assert "run the cell with --keep-scores first, on the same data" in capsys.readouterr().out


@pytest.mark.parametrize("kind", ["stream", "folder"])
def test_figures_do_not_depend_on_how_many_processes_read_images(
    kind: str, tmp_path: Path, checkpoint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The halves of crossfit, and with them all its figures, hang on the order of the images, which a stream gives in
    another one for every number of processes."""
    monkeypatch.setattr(benchmarks.workers, "cpu_count", lambda: 9)  # more than shards
    if kind == "stream":
        data = ["--data", "wds/x", "--data-dir", str(shards(tmp_path / "shards", 3, count=30, number=5))]
    else:
        data = ["--data", str(pictures(tmp_path / "photos", 3, count=30)), "--task", "single,mosaic"]
    found = []
    for workers in ("0", "1", "3", "default"):
        out, told = tmp_path / workers, [] if workers == "default" else ["--workers", workers]
        records = sweep(out, "--models", checkpoint, *data, *told, "--keep-scores")
        assert [record["n"] for record in records] == ([30] if kind == "stream" else [7, 30])
        scores = {file.name: load_file(file) for file in (out / "scores").iterdir()}
        found.append(({record["task"]: (record["key"], record["results"]) for record in records}, scores))
    for results, scores in found[1:]:
        assert results == found[0][0]
        assert scores.keys() == found[0][1].keys()
        for name, kept in scores.items():
            assert torch.equal(kept["targets"], found[0][1][name]["targets"])
            torch.testing.assert_close(kept["base"], found[0][1][name]["base"], rtol=0, atol=2e-3)
