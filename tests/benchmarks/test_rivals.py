"""Running the plain model beside the wrapped one leaves no trace in a data set that keeps its images."""

import pytest
import timm
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from benchmarks.data.classes import Alignment
from benchmarks.scoring import rivals
from benchmarks.scoring.cells import Options
from timm_csra.evaluation.scoring import PLAIN

OPTIONS = Options((PLAIN,), batch_size=5, workers=0)


class Kept(Dataset):
    """Makes each image once, and keeps it."""

    def __init__(self) -> None:
        self.tensors: dict[int, Tensor] = {}

    def __len__(self) -> int:
        return 2

    def image(self, index: int) -> Image.Image:
        return Image.new("RGB", (80, 80), (index, 100, 200))

    def __getitem__(self, index: int) -> Tensor:
        return self.tensors.setdefault(index, torch.rand(3, 64, 64))


def trained_on(tensors: list[Tensor]) -> None:
    weight = torch.ones((), requires_grad=True)
    torch.stack([(weight * tensor).sum() for tensor in tensors]).sum().backward()
    assert weight.grad is not None


def test_what_is_timed() -> None:
    images = Kept()
    model = timm.create_model("test_resnet", num_classes=3).eval()
    rivals.plain_seconds(model, ((images[index][None],) for index in range(2)), OPTIONS)
    trained_on(list(images.tensors.values()))


def test_what_is_cropped(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Tensor] = []

    class Keeping(rivals.FiveCrops):
        def __getitem__(self, index: int) -> tuple[Tensor, int]:
            crops, index = super().__getitem__(index)
            made.append(crops)
            return crops, index

    monkeypatch.setattr(rivals, "FiveCrops", Keeping)
    model = timm.create_model("test_resnet", num_classes=3).eval()
    alignment = Alignment((0, 2), {0: 0, 1: 1})
    found = rivals.five_crops(model, (64, 64), Kept(), {}, alignment, OPTIONS)
    assert {name: tuple(logits.shape) for name, logits in found.items()} == {
        "five_crops_mean": (2, 2),
        "five_crops_max": (2, 2),
    }
    trained_on(made)
