"""torch.compile, torch.export and ONNX agree with eager: plain timm succeeds with each of these architectures."""

import math
from pathlib import Path

import onnxruntime
import pytest
import torch
import torch._dynamo.testing
from torch._dynamo.testing import CompileCounterWithBackend

import timm_csra

from .families import FAMILIES, Family, create, images

DYNAMIC_BATCH = ({0: torch.export.Dim("batch", min=1, max=64)},)
QUICK = ("test_resnet", "test_vit2")
families = [
    pytest.param(family, id=family.name, marks=() if family.name in QUICK else pytest.mark.slow) for family in FAMILIES
]


@pytest.fixture(autouse=True)
def fresh_compiler() -> None:
    torch._dynamo.reset()


@pytest.mark.parametrize("family", families)
@torch.no_grad()
def test_compiles_in_one_graph(family: Family) -> None:
    model = timm_csra.wrap(create(family.name), 0.3, (1, math.inf))
    x = images(family)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["test_resnet", "test_vit"])
@torch.no_grad()
def test_inductor(name: str) -> None:
    family = next(family for family in FAMILIES if family.name == name)
    model = timm_csra.wrap(create(name), 0.3, (1, math.inf))
    x = images(family)
    torch.testing.assert_close(torch.compile(model, fullgraph=True)(x), model(x), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_lam_can_change_in_a_compiled_model() -> None:
    model = timm_csra.wrap(create("test_resnet"))
    x = images(FAMILIES[0])
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    for lam in (0.1, 0.2, 0.0, 0.7, 1.0, 0.1, 0.0, 3.5, 1.0):
        model.csra.lam = lam
        torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-4)
    assert counter.frame_count <= 3  # the first, one for any lam, one for 0


@torch.no_grad()
def test_a_compiled_model_takes_any_batch_and_its_chunks_too() -> None:
    """Many classes on many locations are reduced in chunks, whose number does not depend on the batch."""
    model = timm_csra.wrap(create("test_resnet", num_classes=30_000), 0.3, (1, math.inf))
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True, dynamic=True)
    for count in (2, 3, 5):
        x = torch.randn(count, 3, 160, 160)
        torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-4)
    assert counter.frame_count == 1


@pytest.mark.parametrize("family", [family for family in FAMILIES if family.name in QUICK], ids=lambda f: f.name)
def test_compiled_training_step(family: Family) -> None:
    """Dropout in the head: the guard against side effects is traced as well."""
    model = timm_csra.wrap(create(family.name, drop_rate=0.5), 0.3)
    model.train()
    x = images(family)
    torch.compile(model, backend="aot_eager")(x).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.get_classifier().parameters())


@pytest.mark.parametrize("family", families)
@torch.no_grad()
def test_exports_with_a_dynamic_batch(family: Family) -> None:
    x = images(family)
    model = timm_csra.wrap(create(family.name), 0.3, (1, math.inf))
    program = torch.export.export(model, (x,), dynamic_shapes=DYNAMIC_BATCH)
    for count in (1, 2, 5):
        batch = images(family, count, seed=count)
        torch.testing.assert_close(program.module()(batch), model(batch), rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["test_resnet", "test_vit2", "test_mambaout"])
@torch.no_grad()
def test_onnx_runtime_agrees(name: str, tmp_path: Path) -> None:
    family = next(family for family in FAMILIES if family.name == name)
    model = timm_csra.wrap(create(name), 0.3, (1, math.inf))
    path = tmp_path / "model.onnx"
    torch.onnx.export(model, (images(family),), path, dynamo=True, dynamic_shapes=DYNAMIC_BATCH, input_names=["x"])
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    for count in (1, 3):
        batch = images(family, count, seed=count)
        (logits,) = session.run(None, {"x": batch.numpy()})
        torch.testing.assert_close(torch.from_numpy(logits), model(batch), rtol=1e-3, atol=1e-3)
