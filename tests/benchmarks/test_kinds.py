"""Every kind of head in timm, by the smallest architecture that has it, really run with random weights.

A kind of head is what `benchmarks.coverage.kind_of_head` says: architectures that agree in it run the same code from
features to logits. The table is the one in docs/, which `python -m benchmarks.coverage` wrote; that it lists what this
timm has is tested in test_coverage.py.
"""

import math
from pathlib import Path

import pytest
import timm
import torch

import timm_csra
from benchmarks.coverage import Row, kind_of_head, read_rows, smallest_of_each_kind

from ..families import Family, literal_logits, randomise, smaller

TABLE = Path(__file__).parents[2] / "docs" / "coverage.csv"


def cases() -> list[object]:
    rows = smallest_of_each_kind([row for row in read_rows(TABLE).values() if timm.is_model(row["architecture"])])
    return [pytest.param(row, id=row["architecture"]) for row in sorted(rows, key=lambda row: row["architecture"])]


def family_of(row: Row) -> Family:
    features = {"3 x NLC": "branches", "2 x NLC": "branches", "3 states, NCL": "states"}
    size = int(row["input_size"].split("x")[-1])
    if row["class"] != "VGG":  # whose head resizes maps that are smaller than its own
        size = smaller(row["architecture"], size)
    name = features.get(row["features"], row["features"])
    return Family(row["architecture"], name, int(row["prefix_tokens"]), row["kind"], size)


@pytest.mark.slow
@pytest.mark.parametrize("row", cases())
@torch.no_grad()
def test_kind_of_head(row: Row) -> None:
    family = family_of(row)
    torch.manual_seed(0)
    model = randomise(timm.create_model(family.name)).eval()
    x = torch.randn(1, 3, family.size, family.size, generator=torch.Generator().manual_seed(0))
    plain_class, attributes = type(model), set(vars(model))
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    plain = model(x)
    assert plain.std() > 0, "constant logits compare equal to anything"
    literal = literal_logits(model, family, x)
    expected = {(lam, T): literal(lam, (T,)) for lam, T in ((0.1, math.inf), (0.7, 3.0))}

    assert timm_csra.wrap(model, lam=0) is model
    assert torch.equal(model(x), plain)
    for (lam, temperature), logits in expected.items():
        model.csra.lam, model.csra.temperature = lam, temperature
        error = (model(x) - logits).abs().max() / logits.abs().max()
        assert error <= 1e-4
        assert (logits - plain).abs().max() / plain.abs().max() > 100 * error, "the term is lost in rounding"
    assert model.state_dict().keys() == state.keys()
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    timm_csra.unwrap(model)
    assert type(model) is plain_class and set(vars(model)) == attributes
    assert torch.equal(model(x), plain)


def test_kinds_are_told_apart() -> None:
    rows = list(read_rows(TABLE).values())
    smallest = smallest_of_each_kind(rows)
    kinds = {kind_of_head(row) for row in rows if row["path"]}
    assert {kind_of_head(row) for row in smallest} == kinds
    assert len(smallest) == len(kinds) > 100
    assert max(int(row["parameters"]) for row in smallest) < 250e6, "more than 1 GB of weights: too large for CI"
