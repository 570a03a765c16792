"""The picture that `overlay` makes, pixel by pixel."""

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("matplotlib", reason="the extra `demo` is not installed: nothing here says whether overlay works")
from matplotlib import colormaps

import timm_csra


def test_each_location_colours_its_rectangle() -> None:
    picture = Image.new("RGB", (40, 20), (10, 200, 30))
    scores = torch.tensor([[0.0, 1.0, 2.0, 4.0], [4.0, 2.0, 1.0, 0.0]])
    found = np.asarray(timm_csra.overlay(picture, scores, alpha=1.0)).astype(int)
    assert found.shape == (20, 40, 3)
    for row in range(2):
        for column in range(4):
            patch = found[10 * row : 10 * row + 10, 10 * column : 10 * column + 10].reshape(-1, 3)
            expected = np.round(255 * np.array(colormaps["inferno"](float(scores[row, column]) / 4)[:3]))
            assert abs(patch - expected).max() <= 1
    assert np.array_equal(timm_csra.overlay(picture, scores, alpha=0.0), picture)


def test_the_same_scale_for_several_maps() -> None:
    picture = Image.new("RGB", (8, 8))
    low = np.asarray(timm_csra.overlay(picture, torch.full((2, 2), 1.0), low=0, high=4, alpha=1.0))
    high = np.asarray(timm_csra.overlay(picture, torch.full((2, 2), 4.0), low=0, high=4, alpha=1.0))
    assert high.mean() > low.mean() + 50
    flat = np.asarray(timm_csra.overlay(picture, torch.full((2, 2), 3.0), alpha=1.0))
    assert len(np.unique(flat.reshape(-1, 3), axis=0)) == 1


@pytest.mark.parametrize("bad", [torch.zeros(3), torch.zeros(1, 3, 3), torch.full((2, 2), float("nan"))])
def test_what_is_no_map_is_refused(bad: torch.Tensor) -> None:
    with pytest.raises(ValueError, match=r"score_map: found \(.*\), expected finite scores \(rows, columns\)"):
        timm_csra.overlay(Image.new("RGB", (8, 8)), bad)
