"""Images that are decoded once: bit for bit those that a pass decodes itself, built by one process, safe to kill."""

import json
import multiprocessing
import os
import pickle
import re
import resource
import shutil
import time
from collections import namedtuple
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from timm.data import create_transform, resolve_input_data_config
from torchvision.transforms import Compose, Resize

from benchmarks.checkpoints.find import Checkpoint
from benchmarks.data.datasets import ImageSet
from benchmarks.data.pixels import Entry, Pixels
from benchmarks.data.sources import load_image_set
from benchmarks.scoring import software
from benchmarks.scoring.caching import cache_images, entry_of
from benchmarks.scoring.cells import Cell, Options
from benchmarks.scoring.loading import Loaded
from benchmarks.scoring.measure import load_images, run_cell
from timm_csra.evaluation.scoring import DEFAULT, PLAIN

OPTIONS = Options((PLAIN, DEFAULT), workers=0, batch_size=5)
Usage = namedtuple("Usage", "total used free")


def checkpoint(**overlay: Any) -> torch.nn.Module:
    torch.manual_seed(0)
    names = {"label_names": ["dog", "cat"], "mean": (0.1, 0.2, 0.3)}
    return timm.create_model("test_resnet", num_classes=2, pretrained_cfg_overlay={**names, **overlay}).eval()


def batches(
    data: ImageSet,
    model: torch.nn.Module,
    options: Options,
    task: str = "single",
    size: tuple[int, int] = (48, 48),
) -> list[list[torch.Tensor]]:
    """What a pass reads."""
    grid = 2 if task == "mosaic" else None
    cell = Cell(Checkpoint("timm", "test_resnet"), data, task, size, grid=grid)
    loader, preprocessing, _ = load_images(cell, Loaded(model, size), options)
    if options.cache_images:
        cache_images(loader, data, {**preprocessing, "input_size": (3, *size)}, options, grid)
    return [list(map(torch.as_tensor, batch)) for batch in loader]


def assert_equal(some: list[list[torch.Tensor]], others: list[list[torch.Tensor]]) -> None:
    assert len(some) == len(others)
    for one, other in zip(some, others, strict=True):
        for a, b in zip(one, other, strict=True):
            assert a.dtype == b.dtype and a.stride() == b.stride() and torch.equal(a, b)


def decoding_fails(*_: Any) -> None:
    raise AssertionError("an image was decoded")


@pytest.mark.parametrize("task", ["single", "mosaic"])
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic", "nearest"])
@pytest.mark.parametrize("size", [(48, 48), (40, 56)])
def test_batches_are_bit_for_bit_those_without(
    task: str, interpolation: str, size: tuple[int, int], tmp_path: Path, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, model = load_image_set(photos), checkpoint(interpolation=interpolation)
    for crop_mode, crop_pct in (("center", 0.95), ("center", 0.5), ("squash", 1.0), ("border", 0.9)):
        options = replace(OPTIONS, crop_mode=crop_mode, crop_pct=crop_pct)
        cached = replace(options, cache_images=str(tmp_path / "cache"))
        expected = batches(data, model, options, task, size)
        assert_equal(batches(data, model, cached, task, size), expected)
        with monkeypatch.context() as patch:
            patch.setattr(ImageSet, "opened", decoding_fails)
            assert_equal(batches(data, model, cached, task, size), expected)
            assert_equal(batches(data, model, replace(cached, batch_size=3), task, size), regrouped(expected, 3))


def regrouped(found: list[list[torch.Tensor]], count: int) -> list[list[torch.Tensor]]:
    whole = [torch.cat(parts) for parts in zip(*found, strict=True)]
    return [list(parts) for parts in zip(*(part.split(count) for part in whole), strict=True)]


@pytest.mark.parametrize("workers", [1, 3])
def test_processes_read_it_too(workers: int, tmp_path: Path, photos: Path) -> None:
    data, model = load_image_set(photos), checkpoint()
    cached = replace(OPTIONS, workers=workers, cache_images=str(tmp_path / "cache"))
    expected = batches(data, model, OPTIONS)
    for _ in range(2):
        assert_equal(batches(data, model, cached), expected)


def test_a_map_does_not_travel_to_other_processes(tmp_path: Path, photos: Path) -> None:
    data = load_image_set(photos)
    pixels = kept(tmp_path / "cache", data, checkpoint(), size=(480, 480))
    before = pixels.tensor(3, transform(checkpoint(), (480, 480)))
    assert len(sent := pickle.dumps(pixels)) < 1_000
    assert torch.equal(pickle.loads(sent).tensor(3, transform(checkpoint(), (480, 480))), before)


def transform(model: torch.nn.Module, size: tuple[int, int]) -> Any:
    return create_transform(**resolve_input_data_config(model, args={"input_size": (3, *size)}))


def kept(cache: Path, data: ImageSet, model: torch.nn.Module, size: tuple[int, int] = (48, 48)) -> Pixels:
    """The pixels of a cache, built where they are not there."""
    cell = Cell(Checkpoint("timm", "test_resnet"), data, "single", size)
    loader, preprocessing, _ = load_images(cell, Loaded(model, size), OPTIONS)
    options = replace(OPTIONS, cache_images=str(cache))
    cache_images(loader, data, {**preprocessing, "input_size": (3, *size)}, options)
    return loader.dataset.pixels


def entry(data: ImageSet, cache: Path = Path("cache"), grid: int | None = None, **config: Any) -> Entry:
    found = {"input_size": (3, 48, 48), "interpolation": "bicubic", "crop_pct": 0.95, "crop_mode": "center"}
    found |= {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5), **config}
    return entry_of(data, found, replace(OPTIONS, cache_images=str(cache)), 12, grid)


def test_pixels_are_shared_by_what_gives_the_same_ones_alone(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = load_image_set(photos)
    first = entry(data).folder
    assert entry(load_image_set(photos)).folder == first
    assert entry(data, mean=(0.1, 0.2, 0.3), std=(1.0, 1.0, 1.0)).folder == first
    others = [
        entry(data, input_size=(3, 48, 56)),
        entry(data, interpolation="bilinear"),
        entry(data, crop_pct=0.9),
        entry(data, crop_mode="squash"),
        entry(data, crop_mode="border"),
        entry(data, crop_mode="border", mean=(0.1, 0.2, 0.3)),
        entry(data, grid=2),
        entry(data, grid=3),
        entry(data.some([0, 2, 1, *range(3, 12)])),
        entry(data.sample(11, seed=0)),
        entry(data.sample(11, seed=1)),
        entry(data, an_option_of_a_later_timm=1),
    ]
    os.utime(data.paths[3], ns=(1, 1))
    others.append(entry(load_image_set(photos)))
    for name, value in (("SCORING", 99), ("PIXELS", ("pillow",))):
        with monkeypatch.context() as patch:
            patch.setattr(software, name, value)
            others.append(entry(data))
    assert len({first, *(other.folder for other in others)}) == 1 + len(others)


def test_a_border_is_of_the_colour_of_the_checkpoint(tmp_path: Path, photos: Path) -> None:
    data, cached = load_image_set(photos), replace(OPTIONS, cache_images=str(tmp_path / "cache"), crop_mode="border")
    for mean in ((0.1, 0.2, 0.3), (0.9, 0.8, 0.7)):
        model = checkpoint(mean=mean)
        assert_equal(batches(data, model, cached), batches(data, model, replace(cached, cache_images=None)))


def test_what_it_takes_is_said_before(tmp_path: Path, photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pixels = kept(tmp_path / "cache", load_image_set(photos), checkpoint())
    said = capsys.readouterr().out
    assert said == f"{photos.name} at 48 pixels: 82.9 kB in {pixels.file.parent}, built once\n"
    array = np.load(pixels.file)
    assert array.shape == (12, 48, 48, 3) and array.dtype == np.uint8 and array.nbytes == 82_944
    about = json.loads((pixels.file.parent / "about.json").read_text())
    assert about["identity"]["where"] == str(photos) and about["unreadable"] == {}
    assert not list((tmp_path / "cache").glob("*.part"))


def test_images_that_cannot_be_read(tmp_path: Path, photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bad = sorted(photos.rglob("*.png"))[4]
    bad.write_bytes(b"no image")
    data, model = load_image_set(photos), checkpoint()
    cached = replace(OPTIONS, cache_images=str(tmp_path / "cache"))
    cell = Cell(Checkpoint("timm", "test_resnet"), data, "single", (48, 48))
    for skipped in (False, True):
        records = []
        for options in (OPTIONS, cached, cached):
            options = replace(options, skip_bad_images=skipped)
            records.append(run_cell(cell, lambda: Loaded(model, (48, 48)), options))
        assert [record["status"] for record in records] == ["ok" if skipped else "failed"] * 3
        assert skipped or re.search(f"1 of 12 images cannot be read: {bad}", records[1]["reason"])
        assert stable(records[0]) == stable(records[1]) == stable(records[2])
    (about,) = (tmp_path / "cache").glob("*/about.json")
    ((index, why),) = json.loads(about.read_text())["unreadable"].items()
    assert data.paths[int(index)] == bad and str(bad) in why
    # A disk that failed for a moment: what was not read then is tried again by each pass, as without a cache.
    monkeypatch.setattr(ImageSet, "open", lambda *_: Image.new("RGB", (60, 40)))
    assert (torch.cat([index for _, _, index in batches(data, model, cached)]) >= 0).all()


def stable(record: dict) -> dict:
    """A record without its times."""
    times = ("seconds", "phases", "finished", "traceback", "device_seconds")
    return {name: value for name, value in record.items() if name not in times}


@pytest.mark.parametrize(
    ("name", "content"),
    [("pixels.npy", None), ("pixels.npy", b""), ("pixels.npy", b"\x93NUMPY"), ("pixels.npy", "half"), ("pixels.npy", "float"),
     ("about.json", None), ("about.json", b'{"identity'), ("about.json", b"[]"), ("about.json", b'{"identity": {}, "unreadable": {}}')],
)  # fmt: skip
def test_what_somebody_has_broken_is_built_again(
    name: str, content: Any, tmp_path: Path, photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, model = load_image_set(photos), checkpoint()
    folder = kept(tmp_path / "cache", data, model).file.parent
    before, file = (folder / "pixels.npy").read_bytes(), folder / name
    if content is None:
        file.unlink()
    elif content == "half":
        file.write_bytes(before[:1000])
    elif content == "float":
        np.save(file, np.zeros((12, 48, 48, 3), dtype=np.float32))
    else:
        file.write_bytes(content)
    capsys.readouterr()
    assert kept(tmp_path / "cache", data, model).file.read_bytes() == before
    said = capsys.readouterr().err
    assert content is None or re.search(r"photos--48--.*: found .*, expected \(12, 48, 48, 3\) uint8 of photos", said)


def test_a_full_disk(tmp_path: Path, photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data, model, cache = load_image_set(photos), checkpoint(), tmp_path / "cache"
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda _: Usage(10**6, 10**6 - 80_000, 80_000))
        patch.setattr(ImageSet, "opened", decoding_fails)
        with pytest.raises(OSError, match=r"photos--48--\w+: cannot be built: found 80,000 bytes free, expected 82,944\. "
                           "Make room, give --cache-images another folder, or leave it out"):  # fmt: skip
            kept(cache, data, model)
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limit[1]))  # somebody else fills it meanwhile
    try:
        with pytest.raises(OSError, match=r"photos--48--\w+: cannot be built: .*File too large"):
            kept(cache, data, model)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert [path.suffix for path in cache.iterdir()] in ([], [".lock"])
    kept(cache, data, model)


def test_a_folder_that_cannot_be_made(tmp_path: Path, photos: Path) -> None:
    (tmp_path / "cache").write_text("")
    with pytest.raises(OSError, match=r"cache/photos--48--\w+: cannot be built: .*cache"):
        kept(tmp_path / "cache", load_image_set(photos), checkpoint())


def build_slowly(cache: Path, photos: Path, told: Path, seconds: float) -> None:
    """What a process does that is killed, or that another waits for: it tells of each photograph that it opens."""
    opened = ImageSet.opened

    def slowly(self: ImageSet, index: int) -> Any:
        with told.open("a") as file:
            file.write(f"{index}\n")
        time.sleep(seconds)
        return opened(self, index)

    ImageSet.opened = slowly  # type: ignore[method-assign]
    kept(cache, load_image_set(photos), checkpoint())


def start(*arguments: Any) -> Any:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])  # imports once
    process = context.Process(target=build_slowly, args=arguments)
    process.start()
    return process


def test_killed_it_leaves_nothing_that_is_read(tmp_path: Path, photos: Path) -> None:
    cache, told = tmp_path / "cache", tmp_path / "told"
    process = start(cache, photos, told, 0.3)
    while not (told.exists() and len(told.read_text().split()) >= 7):  # one batch is written, another begun
        time.sleep(0.02)
    process.kill()
    process.join()
    assert [path.suffix for path in cache.iterdir() if path.is_dir()] == [".part"]
    data, model = load_image_set(photos), checkpoint()
    assert_equal(batches(data, model, replace(OPTIONS, cache_images=str(cache))), batches(data, model, OPTIONS))
    assert not list(cache.glob("*.part"))


def test_processes_that_want_the_same_build_it_once(tmp_path: Path, photos: Path) -> None:
    cache, told = tmp_path / "cache", tmp_path / "told"
    processes = [start(cache, photos, told, 0.1) for _ in range(3)]
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert sorted(map(int, told.read_text().split())) == list(range(12))


def test_a_transform_that_makes_no_tensor(tmp_path: Path, photos: Path) -> None:
    cell = Cell(Checkpoint("timm", "test_resnet"), load_image_set(photos), "single", (48, 48))
    loader, *_ = load_images(cell, Loaded(checkpoint(), (48, 48)), OPTIONS)
    loader.dataset.transform = Compose([Resize(48)])
    with pytest.raises(
        ValueError, match=r"(?s)--cache-images: found the transform Compose\(.*expected one with ToTensor"
    ):
        entry(cell.data, tmp_path).get(loader.dataset, 4, 0)
