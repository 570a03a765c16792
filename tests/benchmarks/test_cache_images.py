"""`--cache-images` of the sweep: the same records, what it takes, and what it leaves out."""

import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import timm
from PIL import Image
from timm.data import IterableImageDataset

from benchmarks.checkpoints.find import Checkpoint
from benchmarks.data.datasets import ImageSet, Source
from benchmarks.data.sources import load_image_set
from benchmarks.scoring.caching import wanted
from benchmarks.scoring.cells import Cell
from benchmarks.scoring.loading import Loaded
from benchmarks.scoring.measure import run_cell
from benchmarks.sweep import main

from .test_pixels import OPTIONS, Usage, checkpoint, stable
from .test_sweep import sweep


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Two of one preprocessing but for the colours, and one of another size."""
    specs = []
    for name, overlay in (("a", {}), ("b", {"mean": (0.5, 0.5, 0.5)}), ("c", {"input_size": (3, 96, 96)})):
        folder = tmp_path_factory.mktemp(name)
        model = checkpoint(**{"input_size": (3, 64, 64), **overlay})
        config = {"label_names": ["dog", "cat"], "pretrained_cfg": {**model.pretrained_cfg}}
        timm.models.save_for_hf(model, str(folder), model_config=config, safe_serialization=True)
        specs.append(f"local-dir:{folder}")
    return ",".join(specs)


def test_a_sweep_gives_the_same_records_and_decodes_once(
    tmp_path: Path, photos: Path, checkpoints: str, capsys: pytest.CaptureFixture[str]
) -> None:
    how = ("--task", "single,mosaic", "--lams", "0.3", "--calibration-data", str(calibration(tmp_path)))
    cache = tmp_path / "cache"
    status, expected, _ = sweep(tmp_path / "without", checkpoints, photos, *how)
    assert status == 0
    how = (*how, "--cache-images", str(cache))
    for out in ("building", "reading"):
        capsys.readouterr()
        status, records, _ = sweep(tmp_path / out, checkpoints, photos, *how)
        assert status == 0
        assert list(map(stable, records)) == list(map(stable, expected))
        assert all("cache" in record["phases"] for record in records)
        logs = "".join(log.read_text() for log in (tmp_path / out / "logs").glob("*.log"))
        assert logs.count("built once") == (6 if out == "building" else 0)  # of each size: photos, mosaics, calibration
        said = capsys.readouterr()
        assert "caching images" in said.out
        there = "0 bytes" if out == "building" else "798.7 kB"
        assert f"{cache}: 6 sets of decoded images, 798.7 kB, of which {there} are in the cache; " in said.err
    assert len(list(cache.glob("*/pixels.npy"))) == 6


def calibration(folder: Path) -> Path:
    rng = np.random.default_rng(1)
    (folder / "objects").mkdir(exist_ok=True)
    for index in range(5):
        pixels = rng.integers(0, 256, (40, 60, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "objects" / f"{index}.png")
    return folder / "objects"


def test_what_the_cache_would_take_and_what_does_not_fit(
    tmp_path: Path, photos: Path, checkpoints: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    cache = tmp_path / "disk" / "cache"
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: Usage(10**6, 10**6 - 400_000, 400_000))
    how = ("--models", checkpoints, "--data", str(photos), "--out", str(tmp_path / "out"), "--device", "cpu")
    how = (*how, "--cache-images", str(cache))
    expected = (
        f"--cache-images {cache}: 2 sets of decoded images, 479.2 kB, of which 0 bytes are in the cache; "
        "400.0 kB are free on its disk."
    )
    assert main([*how, "--dry-run"]) == 0
    assert expected in capsys.readouterr().out
    assert main(list(how)) == 2
    assert f"{expected} Make room, give another folder, or leave it out." in capsys.readouterr().err
    assert not cache.exists()
    assert main([*how, "--rescore"]) == 2
    assert "--cache-images and --rescore: expected one of them; --rescore reads no images." in capsys.readouterr().err


def test_a_stream_is_not_cached(photos: Path) -> None:
    stream = ImageSet("stream", (), (), ("cat", "dog"), stream=Source(lambda: None, 100))  # type: ignore[arg-type]
    options = replace(OPTIONS, cache_images="/nowhere/cache")
    cells = [Cell(Checkpoint("timm", name), data, "single", (48, 48), own=(48, 48))
             for name in ("test_resnet", "test_vit") for data in (stream, load_image_set(photos))]  # fmt: skip
    found = wanted(cells, options)
    assert str(found).endswith("free on its disk. stream is a stream, which cannot be cached.")
    assert [entry.images for entry in found.entries] == [12, 12]  # test_vit has another interpolation


def test_the_images_of_a_stream_are_decoded_in_each_pass(
    tmp_path: Path, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def opened() -> IterableImageDataset:
        return SimpleNamespace(
            reader=[(Image.open(path).convert("RGB"), index % 2) for index, path in enumerate(paths)]
        )  # type: ignore[return-value]

    paths = sorted(photos.rglob("*.png"))
    data = ImageSet("wds/photos", (), (), ("cat", "dog"), stream=Source(opened, len(paths)))
    cell = Cell(Checkpoint("timm", "test_resnet"), data, "single", (48, 48))
    records = [run_cell(cell, lambda: Loaded(checkpoint(), (48, 48)), options)
               for options in (OPTIONS, replace(OPTIONS, cache_images=str(tmp_path / "cache")))]  # fmt: skip
    assert records[0]["status"] == "ok", records[0]["reason"]
    assert stable(records[0]) == stable(records[1])
    assert not (tmp_path / "cache").exists()
