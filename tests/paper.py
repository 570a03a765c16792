"""The paper's formula for a linear classifier after average pooling, written out; and what else tests of the examples
share."""

import io
import re
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from torch import Tensor, nn

import timm_csra

NAMES = ["red", "green", "blue", "grey", "pink"]


@torch.inference_mode()
def scores_of_locations(plain: Any, x: Tensor, kind: str) -> Tensor:
    """`(N, K, rows, columns)`."""
    features = plain.forward_features(x)
    logits = torch.einsum("nchw,kc->nkhw", features, plain.fc.weight) + plain.fc.bias[:, None, None]
    return logits.log_softmax(1) if kind == "log_softmax" else logits


@torch.inference_mode()
def scores_of_classes(plain: nn.Module, x: Tensor, lam: float, kind: str) -> Tensor:
    """`(N, K)`: the plain logits, and lam times the spatial maximum."""
    return plain(x) + lam * scores_of_locations(plain, x, kind).amax((2, 3))


def tiny(names: list[str] = NAMES) -> nn.Module:
    """A plain model of five classes whose logits differ from picture to picture."""
    torch.manual_seed(0)
    model = timm.create_model("test_resnet", num_classes=len(names), pretrained_cfg_overlay={"label_names": names})
    nn.init.normal_(model.fc.weight, std=2)
    return model.eval()


def saved(folder: Path, lam: float = 0.4, scores: str = "log_softmax") -> tuple[str, nn.Module]:
    """A folder with this model, wrapped, and the plain model."""
    timm_csra.save_pretrained(timm_csra.wrap(tiny(), lam, scores=scores), folder)
    return str(folder), tiny()


def pictures(folder: Path, count: int) -> list[Path]:
    """Coloured noise, of different sizes."""
    folder.mkdir(parents=True, exist_ok=True)
    rng, files = np.random.default_rng(0), []
    for index in range(count):
        colour = rng.integers(0, 256, 3) // 2
        pixels = rng.integers(0, 128, (150 + 7 * index, 210, 3)) + colour
        files.append(folder / f"{index}.png")
        Image.fromarray(pixels.astype(np.uint8)).save(files[-1])
    return files


@contextmanager
def refused(text: str) -> Iterator[None]:
    """Expect a command to say this on stderr and to exit with 2."""
    said = io.StringIO()
    with redirect_stderr(said), pytest.raises(SystemExit) as stopped:
        yield
    assert stopped.value.code == 2 and re.search(text, said.getvalue()), said.getvalue()
