"""Figures that belong to one version of the code that computes them.

`python -m tests.benchmarks.golden` writes those of a version that has none yet, and changes no others.
"""

import json
import math
import sys
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn

from benchmarks.checkpoints.find import Checkpoint
from benchmarks.data.classes import ClassMap
from benchmarks.data.datasets import ImageSet
from benchmarks.records.phases import Phases
from benchmarks.records.resampled import unpacked
from benchmarks.scoring import software
from benchmarks.scoring.cells import Cell, Options
from benchmarks.scoring.kept import Scored
from benchmarks.scoring.results import results
from timm_csra.config import SCORES
from timm_csra.evaluation.scoring import DEFAULT, DEFAULT_LOG_SOFTMAX, Scores, score, settings_grid

SETTINGS = settings_grid([0.1, 0.5], [1, math.inf, (1, math.inf)], SCORES, [DEFAULT, DEFAULT_LOG_SOFTMAX])
FOLDER = Path(__file__).with_name("golden")
IMAGES, CLASSES = 24, 5
MODELS = ("test_resnet", "test_vit", "test_convnext", "test_mambaout")


def waves(*shape: int, start: float) -> Tensor:
    """Numbers between -1 and 1 that look random and are the same everywhere."""
    waves = 43758.5453 * (torch.arange(math.prod(shape), dtype=torch.float64) * 12.9898 + start).sin()
    return (2 * (waves - waves.floor()) - 1).reshape(shape).float()


def evaluation() -> dict[str, Any]:
    """What is said of made-up scores, for each task, with all that can be asked."""
    terms = sorted({term for setting in SETTINGS for term in setting.terms})
    attention = {term: 3 * waves(IMAGES, CLASSES, start=place) for place, term in enumerate(terms)}
    labels = torch.arange(IMAGES) * 7 % CLASSES
    hot = (waves(IMAGES, CLASSES, start=0.3) > 0.2).to(torch.int8)
    base = 2 * waves(IMAGES, CLASSES, start=0.7) + 2 * nn.functional.one_hot(labels, CLASSES)
    chosen = {"data": "p", "reason": None, "lam": 0.2, "temperature": "inf", "scores": "log_softmax"}
    facts = {"n": IMAGES, "groups": None, "agreement": chosen}
    data = ImageSet("d", (), (), tuple("abcde"))
    found = {}
    for task, targets, asked in (
        ("single", labels, {}),
        ("real", hot, {}),
        ("multilabel", hot, {"activation": "sigmoid", "average_precision": "11-point"}),
        ("mosaic", hot, {}),
        ("mapped", hot[:, :2], {"class_map": ClassMap("m", {}, "log-probabilities")}),
    ):
        groups = [[0, 2], [1, 3, 4]] if task == "mapped" else None
        cell = Cell(Checkpoint("timm", "m"), data, "multilabel" if task == "mapped" else task, (64, 64))
        scored = Scored(Scores(base, attention), targets, facts | {"groups": groups})
        record = results(cell, scored, Options(tuple(SETTINGS), **asked), Phases())  # type: ignore[arg-type]
        found[task] = {name: record[name] for name in ("results", "all_settings", "calibration")}
        for result in found[task]["results"]:
            packed = result["resampled"]
            result["resampled"] = packed and float(unpacked(packed).std(ddof=1))
    return found


def scoring() -> dict[str, Any]:
    """Scores of made-up weights and pixels: convolutions, a class token, and heads with a norm."""
    found: dict[str, Any] = {}
    for place, name in enumerate(MODELS):
        model = timm.create_model(name, num_classes=CLASSES).eval()
        with torch.no_grad():
            for number, (parameter, weight) in enumerate(model.named_parameters()):
                if weight.ndim > 1 or parameter.endswith("bias"):  # scales stay those of the architecture
                    size = weight[0].numel() ** 0.5 if weight.ndim > 1 else 10
                    weight.copy_(waves(*weight.shape, start=number) * 3 / size)
        images = 2 * waves(2, 3, 160, 160, start=place)
        scores, _ = score(model, [(images, torch.zeros(2))], SETTINGS, columns=range(CLASSES))
        found[name] = {"base": scores.base.tolist()}
        found[name] |= {f"{kind} {T:g}": tensor.tolist() for (kind, T), tensor in sorted(scores.attention.items())}
    return found


NOW = {"evaluation": (software.EVALUATION, evaluation), "scoring": (software.SCORING, scoring)}


def main() -> int:
    for name, (version, compute) in NOW.items():
        path = FOLDER / f"{name}-{version}.json"
        if not path.exists():
            path.parent.mkdir(exist_ok=True)
            path.write_text(json.dumps(compute()))
            print(f"wrote {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
