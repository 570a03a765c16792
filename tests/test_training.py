"""Training mode: scoring the locations leaves no trace that the plain model would not have left."""

import pytest
import timm
import torch

import timm_csra
from timm_csra import UnsupportedModelError

from .families import FAMILIES, Family, create, images


def states_after_one_step(family: Family, wrapped: bool) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    model = create(family.name, drop_rate=0.4).train()
    if wrapped:
        timm_csra.wrap(model, lam=0.5)
    for module in model.modules() if family.name == "levit_128s" else ():
        if type(module).__name__ == "NormLinear":
            module.bn.eval()
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


def test_head_that_drops_alone_is_guarded_too() -> None:
    """A frozen body with a head in training mode."""
    model = timm_csra.wrap(create("test_vit", drop_rate=0.5), lam=0.5)
    model.head_drop.train()
    x = torch.randn(1, 3, 160, 160)
    torch.manual_seed(0)
    model(x)
    after = torch.get_rng_state()
    torch.manual_seed(0)
    timm_csra.unwrap(model)(x)
    assert torch.equal(torch.get_rng_state(), after)


def test_batch_norm_in_the_head_is_refused_and_named() -> None:
    family = next(family for family in FAMILIES if family.name == "levit_128s")
    model = timm_csra.wrap(create(family.name)).train()
    features = model.forward_features(images(family))
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    with pytest.raises(UnsupportedModelError, match=r"levit_128s: its head holds the batch norm `head.bn` in training"):
        model.forward_head(features)
    assert all(torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())
    model.head.eval(), model.head_dist.eval()
    model(images(family))


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
