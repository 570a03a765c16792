"""Training mode: scoring the locations leaves no trace that the plain model would not have left."""

import copy
from collections.abc import Callable

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import timm_csra

from .families import FAMILIES, Family, create, images


def states_after_one_step(family: Family, wrapped: bool) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    model = create(family.name, drop_rate=0.4).train()
    if wrapped:
        timm_csra.wrap(model, lam=0.5)
    torch.manual_seed(5)
    model(images(family))
    return dict(model.named_buffers()), torch.get_rng_state()


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_buffers_and_random_state_are_those_of_the_plain_model(family: Family) -> None:
    plain_buffers, plain_random = states_after_one_step(family, wrapped=False)
    buffers, random = states_after_one_step(family, wrapped=True)
    assert torch.equal(random, plain_random)
    assert buffers.keys() == plain_buffers.keys()
    assert all(torch.equal(buffers[name], plain_buffers[name]) for name in buffers)


def dropouts_in_training(model: nn.Module) -> None:
    """Monte Carlo dropout: the whole model in eval, but for these."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.train()


class Composite(nn.Module):
    """A head layer with dropout inside of functions, and given by position."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(96, 3, dropout=0.5, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        rows = x.mean((2, 3))
        attended = self.attention(rows[:, None], rows[:, None], rows[:, None], need_weights=False)[0][:, 0]
        p = 0.5 if self.training else 0.0
        q = rows[:, None]
        return (
            F.scaled_dot_product_attention(q, q, q, None, p)[:, 0] + attended + F.feature_alpha_dropout(rows, p, True)
        )


def composite() -> nn.Module:
    model = create("test_resnet")
    torch.manual_seed(0)
    model.global_pool = Composite().eval()
    return model


class Pooling(nn.Module):
    def pooled(self, x: Tensor) -> Tensor:
        return F.dropout(x.mean((2, 3)), 0.5, self.training)


class ByAMethod(timm.models.ResNet):
    """Never calls its pooling, and no hook sees it run."""

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        x = self.pooling.pooled(x)
        return x if pre_logits else self.fc(x)


def by_a_method() -> nn.Module:
    model = create("test_resnet")
    model.__class__, model.pooling = ByAMethod, Pooling().eval()
    return model


ALONE: dict[str, tuple[Callable[[], nn.Module], Callable[[nn.Module], object]]] = {
    "a head in training": (lambda: create("test_vit", drop_rate=0.5), lambda model: model.head_drop.train()),
    "below the first level": (lambda: create("test_byobnet", drop_rate=0.5), lambda model: model.head.drop.train()),
    "Monte Carlo": (lambda: create("test_convnext", drop_rate=0.5), dropouts_in_training),
    "the flag of the model": (
        lambda: create("test_efficientnet", drop_rate=0.5),
        lambda model: setattr(model, "training", True),
    ),
    "inside of functions": (composite, lambda model: model.global_pool.train()),
    "a module that is not called": (by_a_method, lambda model: model.pooling.train()),
    "a batch norm": (lambda: create("levit_128s"), lambda model: model.head.train()),
}


@pytest.mark.parametrize("case", ALONE)
@pytest.mark.parametrize("called_before", [False, True])
def test_whatever_is_in_training_is_left_as_the_plain_model_leaves_it(case: str, called_before: bool) -> None:
    build, switch = ALONE[case]
    size = 224 if case == "a batch norm" else 160
    x = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1))
    found = []
    for wrapped in (False, True):
        model = build()
        if wrapped:
            timm_csra.wrap(model, lam=0.5)
            if called_before:
                model(x)
        switch(model)
        flags = [module.training for module in model.modules()]
        torch.manual_seed(0)
        model(x)
        assert [module.training for module in model.modules()] == flags
        found.append((torch.get_rng_state(), dict(model.named_buffers())))
    (random, buffers), (random_of_wrapped, buffers_of_wrapped) = found
    assert torch.equal(random_of_wrapped, random)
    assert all(torch.equal(buffers_of_wrapped[name], buffer) for name, buffer in buffers.items())


@torch.no_grad()
def test_locations_are_scored_by_running_statistics() -> None:
    """What the scores of a batch norm in training are, since each image has its own number of locations."""
    family = next(family for family in FAMILIES if family.name == "levit_128s")
    model = create(family.name)
    features = model.forward_features(images(family))
    expected = torch.stack([model.forward_head(features[:, j : j + 1]) for j in range(features.shape[1])], 1).amax(1)
    model.head.train(), model.head_dist.train()
    base = copy.deepcopy(model).forward_head(features)
    timm_csra.wrap(model, lam=0.5)
    torch.testing.assert_close(model.forward_head(features), base + 0.5 * expected, rtol=1e-4, atol=1e-4)


def test_flags_are_restored_where_the_head_fails() -> None:
    model = timm_csra.wrap(create("test_resnet", drop_rate=0.5)).train()
    features = model.forward_features(torch.randn(2, 3, 96, 96))
    with pytest.raises(RuntimeError):
        model.forward_head(features[:, :5])
    assert all(module.training for module in model.modules())


def test_nothing_is_written_in_eval(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that threads may share a model."""
    model = timm_csra.wrap(create("test_byobnet"))
    model(torch.randn(1, 3, 96, 96))
    written: list[str] = []
    monkeypatch.setattr(nn.Module, "__setattr__", lambda self, name, value: written.append(name))
    model(torch.randn(1, 3, 96, 96))
    assert not written


@pytest.mark.parametrize("name", ["deit_tiny_distilled_patch16_224", "levit_128s"])
def test_distilled_training_gets_the_term_on_each_element(name: str) -> None:
    family = next(family for family in FAMILIES if family.name == name)
    model = create(name)
    model.distilled_training = True
    x = images(family)
    features = model.forward_features(x)
    heads = (model.head, model.head_dist)
    if name == "levit_128s":
        base = [head(features.mean(1)) for head in heads]
        scores = [torch.stack([head(features[:, j]) for j in range(features.shape[1])], 1) for head in heads]
    else:
        base = [head(features[:, i]) for i, head in enumerate(heads)]
        scores = [head(features[:, 2:]) for head in heads]
    timm_csra.wrap(model, lam=0.5)
    model.training = True  # the model alone, so that nothing inside it becomes random
    outputs = model.forward_head(features)
    assert isinstance(outputs, tuple) and len(outputs) == 2
    for output, b, s in zip(outputs, base, scores, strict=True):
        torch.testing.assert_close(output, b + 0.5 * s.amax(1), rtol=1e-4, atol=1e-4)


def test_fine_tuning_a_wrapped_model_learns() -> None:
    torch.manual_seed(0)
    model = timm_csra.wrap(
        timm.create_model("test_resnet", num_classes=2), lam=0.2, temperature=(1, float("inf"))
    ).train()
    x = torch.randn(8, 3, 64, 64)
    x[4:, :, 16:32, 16:32] += 3
    y = torch.arange(8) // 4
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
    losses = []
    for _ in range(8):
        loss = torch.nn.functional.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
