"""Scores that are kept come back: both kinds, masked classes, and those of before there were two kinds."""

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from benchmarks.checkpoints.find import Checkpoint
from benchmarks.data.datasets import DataError, ImageSet
from benchmarks.records.files import write_record
from benchmarks.records.phases import Phases
from benchmarks.scoring.cells import Cell, Options
from benchmarks.scoring.kept import Scored, read_scores, write_scores
from benchmarks.scoring.results import results
from timm_csra.config import SCORES
from timm_csra.evaluation.scoring import DEFAULT, DEFAULT_LOG_SOFTMAX, PLAIN, Scores, settings_grid

SETTINGS = settings_grid([0.1], [0.5, 1, math.inf], SCORES, [DEFAULT_LOG_SOFTMAX])


def scored() -> Scored:
    generator = torch.Generator().manual_seed(0)

    def logits() -> torch.Tensor:
        values = torch.randn(20, 4, generator=generator)
        values[:, 3] = -math.inf  # masked
        return values

    terms = sorted({term for setting in SETTINGS for term in setting.terms})
    scores = Scores(logits(), {term: logits() for term in terms})
    return Scored(scores, torch.arange(20) % 4, {"n": 20, "groups": None})


def test_both_kinds_and_masked_classes_come_back(tmp_path: Path) -> None:
    file, given = tmp_path / "scores.safetensors", scored()
    write_scores(file, given)
    found = read_scores(file, SETTINGS)
    assert found.scores.attention.keys() == given.scores.attention.keys()
    for setting in SETTINGS:
        torch.testing.assert_close(found.scores.logits(setting), given.scores.logits(setting), rtol=0, atol=5e-3)
    assert found.facts == given.facts
    given.scores.base[0, 0] = 70_000
    with pytest.raises(DataError, match="logits beyond 65504 do not fit into float16; leave out --keep-scores"):
        write_scores(file, given)


def test_what_was_kept_before_is_of_the_logits(tmp_path: Path) -> None:
    file = tmp_path / "scores.safetensors"
    write_scores(file, scored())
    before = {
        name.replace("attention.logits.", "attention."): tensor
        for name, tensor in load_file(file).items()
        if "log_softmax" not in name
    }
    save_file(before, file, {"facts": "{}", "dtype": "float32"})
    assert list(read_scores(file, [PLAIN, DEFAULT]).scores.attention) == [("logits", t) for t in (0.5, 1.0, math.inf)]
    with pytest.raises(DataError, match=r"found scores of logits, T 0.5, 1, inf; expected --scores and --temp"):
        read_scores(file, [DEFAULT_LOG_SOFTMAX])


def test_a_masked_class_is_measured_and_recorded(tmp_path: Path) -> None:
    """Every fourth image is of the masked class: a miss, whose likelihood is infinite."""
    data = ImageSet("d", (), (), tuple("abcd"))
    cell = Cell(Checkpoint("timm", "test_resnet"), data, "single", (64, 64))
    record = results(cell, scored(), Options(tuple(SETTINGS)), Phases())
    write_record(tmp_path / "records" / "one.json", record)  # which refuses what is no JSON
    assert all(row["value"] <= 75 for row in record["results"])
    assert record["calibration"]["fixed_log_softmax"]["nll"] is None
    assert record["calibration"]["fixed_log_softmax"]["ece"] > 0
