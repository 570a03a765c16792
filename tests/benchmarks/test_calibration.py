"""Pictures that lam is chosen by: what also stands among those measured is found by content, and left out."""

import shutil
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from benchmarks.data.calibration import with_calibration, without_measured
from benchmarks.data.datasets import Calibration, ImageSet
from benchmarks.data.sources import load_image_set, load_pictures


def compared(data: ImageSet, pictures: ImageSet) -> Calibration:
    (images,) = without_measured(with_calibration([data], pictures))
    assert images.calibration is not None
    return images.calibration


def names(calibration: Calibration) -> list[str]:
    return [Path(name).name for name in calibration.left_out]


def smooth(rng: np.random.Generator) -> Image.Image:
    """Noise at every pixel, unlike a photograph, does not survive a change of size."""
    return Image.fromarray(rng.integers(0, 256, (4, 6, 3), dtype=np.uint8)).resize((60, 40))


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    for index in range(12):
        folder = tmp_path / "photos" / ("cat", "dog")[index % 2]
        folder.mkdir(parents=True, exist_ok=True)
        smooth(rng).save(folder / f"{index}.png")
    return tmp_path / "photos"


@pytest.fixture
def pictures(photos: Path, tmp_path: Path) -> Path:
    """Three copies under other names, and two that are nowhere else."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    shutil.copy(photos / "cat" / "0.png", folder / "copy.png")
    with Image.open(photos / "dog" / "3.png") as image:
        image.resize((240, 160)).save(folder / "larger.png")
        image.resize((45, 45)).save(folder / "square.jpg")
    rng = np.random.default_rng(1)
    for name in ("0.png", "other.png"):
        smooth(rng).save(folder / name)
    return folder


def test_copies_are_left_out_whatever_their_name_and_size(photos: Path, pictures: Path) -> None:
    given = load_pictures(pictures)
    found = compared(load_image_set(photos), given)
    assert sorted(names(found)) == ["copy.png", "larger.png", "square.jpg"]
    assert sorted(path.name for path in found.pictures.paths) == ["0.png", "other.png"]  # another one is called 0.png
    assert found.reason is None
    assert found.fingerprint == given.fingerprint
    assert found.pictures.labels == given.labels[:2]
    few = compared(load_image_set(photos).some([0]), given)
    assert names(few) == ["copy.png"]  # where this one alone is measured


@pytest.mark.parametrize("kind", ["zip", "tar"])
def test_archives_on_either_side(kind: str, photos: Path, pictures: Path, tmp_path: Path) -> None:
    for name, folder in (("measured", photos), ("given", pictures)):
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        if kind == "zip":
            with zipfile.ZipFile(tmp_path / f"{name}.zip", "w") as archive:
                for file in files:
                    archive.write(file, f"all/{file.relative_to(folder)}")
        else:
            with tarfile.open(tmp_path / f"{name}.tar", "w") as archive:
                for file in files:
                    archive.add(file, f"all/{file.relative_to(folder)}")
    found = compared(load_image_set(tmp_path / f"measured.{kind}"), load_pictures(tmp_path / f"given.{kind}"))
    assert sorted(names(found)) == ["copy.png", "larger.png", "square.jpg"]
    for index, path in enumerate(found.pictures.paths):  # indices into the archive moved along
        with Image.open(pictures / path.name) as image:
            assert found.pictures.open(index).tobytes() == image.convert("RGB").tobytes()


def test_nothing_left_and_pictures_that_cannot_be_read(photos: Path, pictures: Path) -> None:
    data = load_image_set(photos)
    assert compared(data, load_pictures(photos)).reason == "all 12 pictures of photos are among those measured"
    (pictures / "broken.png").write_text("no picture")
    (photos / "cat" / "broken.png").write_text("no picture")
    found = compared(load_image_set(photos), load_pictures(pictures))
    assert "broken.png" in [path.name for path in found.pictures.paths]  # the pass over the pictures will name it


def test_real_photographs(real_data: Path) -> None:
    """One photograph of the ImageNet validation set is in two sets, in other sizes and with other bytes."""
    dogs, others = (load_image_set(real_data / name) for name in ("imagewoof500", "in1k_val107"))
    found = compared(others, load_pictures(real_data / "imagewoof500"))
    assert names(found) == ["ILSVRC2012_val_00000077.JPEG"]
    assert len(found.pictures) == 499
    assert names(compared(dogs, load_pictures(real_data / "in1k_val107"))) == names(found)
    assert names(compared(load_image_set(real_data / "coco256"), load_pictures(real_data / "imagewoof500"))) == []
