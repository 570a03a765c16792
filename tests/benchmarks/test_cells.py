"""How images become tensors: by timm and the checkpoint, and by nothing else."""

import itertools
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from timm.data import create_transform, resolve_model_data_config

from benchmarks.checkpoints.find import Checkpoint
from benchmarks.data.datasets import ImageSet, tilings
from benchmarks.data.presented import mosaic
from benchmarks.scoring.cells import Cell, Options
from benchmarks.scoring.loading import Loaded
from benchmarks.scoring.measure import load_images
from timm_csra.evaluation.scoring import DEFAULT, PLAIN


@pytest.fixture
def data(tmp_path: Path) -> ImageSet:
    rng = np.random.default_rng(0)
    for index in range(8):
        pixels = rng.integers(0, 256, (20 + 9 * index, 60, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((150, 200)).save(tmp_path / f"{index}.png")
    paths = tuple(sorted(tmp_path.glob("*.png")))
    return ImageSet("photos", paths, tuple((index % 2,) for index in range(8)), ("cat", "dog"))


@pytest.fixture
def model() -> torch.nn.Module:
    overlay = {"label_names": ["dog", "cat"], "crop_pct": 0.8, "interpolation": "bilinear", "mean": (0.1, 0.2, 0.3)}
    return timm.create_model("test_resnet", num_classes=2, pretrained_cfg_overlay=overlay).eval()


def load(data: ImageSet, model: torch.nn.Module, task: str, **options: object) -> torch.Tensor:
    cell = Cell(Checkpoint("timm", "test_resnet"), data, task, (96, 96), grid=2 if task == "mosaic" else None)
    how = Options((PLAIN, DEFAULT), workers=0, batch_size=3, **options)  # type: ignore
    loader, _, alignment = load_images(cell, Loaded(model, (96, 96)), how)
    assert alignment.columns == (0, 1)
    return torch.cat([images for images, _, _ in loader])


def test_single_photographs_are_prepared_as_timm_does(data: ImageSet, model: torch.nn.Module) -> None:
    config = resolve_model_data_config(model, args={"input_size": (3, 96, 96)})
    assert (config["crop_pct"], config["interpolation"]) == (0.8, "bilinear")
    for options in ({}, {"crop_pct": 0.5}, {"crop_mode": "squash", "crop_pct": 1.0}, {"crop_mode": "border"}):
        transform = create_transform(**{**config, **options})
        expected = torch.stack([transform(Image.open(path)) for path in data.paths])
        assert torch.equal(load(data, model, "single", **options), expected)


@pytest.mark.parametrize("options", [{}, {"crop_pct": 0.5, "crop_mode": "center"}])
def test_mosaics_are_not_cropped_again(data: ImageSet, model: torch.nn.Module, options: dict) -> None:
    expected = []
    for group in tilings(data, 2, seed=0):
        tiles = [Image.open(data.paths[index]) for index in group]
        pixels = np.asarray(mosaic(tiles, 2, (96, 96), Image.Resampling.BILINEAR)).transpose(2, 0, 1) / 255
        mean, std = np.array([[[0.1]], [[0.2]], [[0.3]]]), np.array(model.pretrained_cfg["std"])[:, None, None]
        expected.append(torch.from_numpy((pixels - mean) / std).float())
    torch.testing.assert_close(load(data, model, "mosaic", **options), torch.stack(expected))


@pytest.mark.parametrize(("workers", "expected"), [(0, 0), (2, 2), (8, 3)])
def test_a_batch_is_read_by_one_process(data: ImageSet, model: torch.nn.Module, workers: int, expected: int) -> None:
    cell = Cell(Checkpoint("timm", "test_resnet"), data, "single", (96, 96))
    how = Options((PLAIN, DEFAULT), workers=workers, batch_size=3)
    assert load_images(cell, Loaded(model, (96, 96)), how)[0].num_workers == expected


def test_images_are_counted_as_they_are_loaded(data: ImageSet, model: torch.nn.Module) -> None:
    every = itertools.combinations(range(6), 4)
    for tiled, count in ((data, 2), (replace(data, tilings=tuple(every)), 15)):
        cell = Cell(Checkpoint("timm", "test_resnet"), tiled, "mosaic", (96, 96), grid=2)
        assert cell.images == len(load(tiled, model, "mosaic")) == count
        assert replace(cell, task="single", grid=None).images == len(load(tiled, model, "single")) == 8
