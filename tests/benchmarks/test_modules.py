"""Every module of timm's models, by its smallest architecture, run with random weights: that neither the layout of a
convolutional model nor the size of the images before changes its scores."""

from pathlib import Path

import pytest
import timm
import torch
from torch import Tensor, nn

from benchmarks.coverage import Row, read_rows
from timm_csra.accelerators import in_channels_last, is_convolutional
from timm_csra.evaluation.scoring import DEFAULT, PLAIN, score

from ..families import smaller

TABLE = Path(__file__).parents[2] / "docs" / "coverage.csv"
MOST_MACS = 2.5e9  # of an image; modules that have only larger ones are left out


def cases() -> list[object]:
    rows = read_rows(TABLE)
    found = []
    for module in timm.list_modules():
        listed = [rows[name] for name in timm.list_models(module=module) if name in rows and rows[name]["macs"]]
        if listed and float((row := min(listed, key=lambda row: float(row["macs"])))["macs"]) < MOST_MACS:
            found.append(pytest.param(row, id=f"{module}-{row['architecture']}"))
    return found


def scored(model: nn.Module, x: Tensor) -> Tensor:
    scores, _ = score(model, [(x, torch.zeros(len(x)))], (PLAIN, DEFAULT))
    return torch.stack([scores.base, *scores.attention.values()])


def images(row: Row, factor: int = 1) -> Tensor:
    sides = (factor * smaller(row["architecture"], int(side)) for side in row["input_size"].split("x")[-2:])
    return torch.randn(1, 3, *sides, generator=torch.Generator().manual_seed(0))


def model_of(row: Row) -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model(row["architecture"]).eval()


@pytest.mark.slow
@pytest.mark.parametrize("row", cases())
def test_channels_last_changes_no_score(row: Row) -> None:
    model, x = model_of(row), images(row)
    if not is_convolutional(model):
        pytest.skip("it is not convolutional, and its layout stays")
    expected = scored(model, x)
    found = scored(in_channels_last(model), x)
    assert (found - expected).abs().max() <= 1e-3 * expected.abs().max()


@pytest.mark.slow
@pytest.mark.parametrize("row", cases())
def test_a_model_that_has_seen_another_size_gives_the_same_scores(row: Row) -> None:
    if timm.get_pretrained_cfg(row["architecture"]).fixed_input_size:
        pytest.skip("it is built for each size")
    model = model_of(row)
    scored(model, images(row, 2))
    x = images(row)
    torch.testing.assert_close(scored(model, x), scored(model_of(row), x), rtol=0, atol=0)


def test_most_modules_are_here() -> None:
    assert len(cases()) >= 55
