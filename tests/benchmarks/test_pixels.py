"""Images that are decoded once: bit for bit those that a pass decodes itself, built by one process, safe to kill."""

import importlib.resources
import json
import multiprocessing
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from collections import namedtuple
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image

from benchmarks.checkpoints.find import Checkpoint
from benchmarks.data.datasets import ImageSet
from benchmarks.data.pixels import Entry
from benchmarks.data.presented import Photographs
from benchmarks.data.sources import load_image_set
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
    return list(loader)


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
    from timm.data import create_transform, resolve_input_data_config

    return create_transform(**resolve_input_data_config(model, args={"input_size": (3, *size)}))


def kept(cache: Path, data: ImageSet, model: torch.nn.Module, size: tuple[int, int] = (48, 48)) -> Any:
    cell = Cell(Checkpoint("timm", "test_resnet"), data, "single", size)
    loader, preprocessing, _ = load_images(cell, Loaded(model, size), OPTIONS)
    options = replace(OPTIONS, cache_images=str(cache))
    cache_images(loader, data, {**preprocessing, "input_size": (3, *size)}, options)
    return loader.dataset.pixels
