"""torch.compile, torch.export and ONNX agree with eager: plain timm succeeds with each of these architectures."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import onnxruntime
import pytest
import torch
import torch._dynamo.testing
from onnxruntime.capi.onnxruntime_pybind11_state import Fail, InvalidArgument
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

import timm_csra

from .families import FAMILIES, Family, create, images

# The number of graphs after which the compiler gives up; torch 2.6 calls it otherwise.
GRAPHS = "recompile_limit" if hasattr(torch._dynamo.config, "recompile_limit") else "cache_size_limit"
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
def test_a_compiled_model_takes_any_batch() -> None:
    """Many classes on many locations too, which eager mode scores in parts."""
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


class Resized(NamedTuple):
    """A model for each layout of features and way of scoring; made at one size, run at another."""

    name: str
    made: int
    run: int
    arguments: dict[str, Any] = {}  # noqa: RUF012

    @property
    def model(self) -> torch.nn.Module:
        return create(self.name, **self.arguments)

    def images(self, size: int, count: int = 2) -> Tensor:
        return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(size))


DYNAMIC_VIT = {"dynamic_img_size": True}
RESIZED = [
    Resized("test_resnet", 96, 160, {"num_classes": 80}),
    Resized("test_resnet", 160, 224, {"num_classes": 21841}),  # more scores than eager mode makes at a time
    Resized("test_convnext", 96, 160),
    Resized("test_mambaout", 96, 160),
    Resized("test_vit", 160, 224, DYNAMIC_VIT),
    Resized("test_vit2", 160, 224, DYNAMIC_VIT),
    Resized("mobilenetv3_small_050", 96, 160),
    Resized("resnetv2_18", 96, 160),
    Resized("resnet50_clip", 96, 160),
    Resized("efficientvim_m1", 224, 320),
    Resized("xcit_nano_12_p16_224", 224, 256),
]
resized = pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, id=f"{case.name}-{case.run}", marks=() if case.name in QUICK else pytest.mark.slow)
        for case in RESIZED
    ],
)


REFUSALS = (
    RuntimeError,
    AssertionError,
    NotImplementedError,
    torch.onnx.errors.OnnxExporterError,
    InvalidArgument,
    Fail,
)


def plain_and_wrapped(case: Resized, record: Callable[[torch.nn.Module], Callable[[Tensor], Tensor]]) -> None:
    """What plain timm does at another size than a graph was made at, a wrapped model does: both against eager mode."""
    x = case.images(case.run, 3)
    plain = case.model
    try:
        recorded = record(plain)(x)
    except REFUSALS as e:
        pytest.skip(f"plain timm does not succeed: this did NOT run: {type(e).__name__}: {str(e).splitlines()[:1]}")
    torch.testing.assert_close(recorded, plain(x), rtol=1e-3, atol=1e-3)
    wrapped = timm_csra.wrap(plain, 0.3, (1, math.inf))
    torch._dynamo.reset()
    torch.testing.assert_close(record(wrapped)(x), wrapped(x), rtol=1e-3, atol=1e-3)


@resized
@pytest.mark.filterwarnings("ignore:.torch.jit.trace", "ignore::torch.jit.TracerWarning")
@torch.no_grad()
def test_traced_graphs_at_another_size(case: Resized) -> None:
    plain_and_wrapped(case, lambda model: torch.jit.trace(model, case.images(case.made)))


DYNAMIC = {0: torch.export.Dim("batch", min=1, max=64), 2: torch.export.Dim.AUTO, 3: torch.export.Dim.AUTO}


@resized
@torch.no_grad()
def test_exported_programs_at_another_size(case: Resized) -> None:
    plain_and_wrapped(
        case,
        lambda model: torch.export.export(model, (case.images(case.made),), dynamic_shapes=(DYNAMIC,)).module(),
    )


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, id=case.name, marks=() if case.name == "test_resnet" else pytest.mark.slow)
        for case in RESIZED
        if case.name.startswith(("test_", "resnetv2", "mobilenetv3")) and case.arguments.get("num_classes") != 21841
    ],
)
@torch._dynamo.config.patch({GRAPHS: 16})
@torch.no_grad()
def test_compiled_graphs_at_many_sizes(case: Resized) -> None:
    """As many graphs as plain timm needs, and the same logits as eager mode. Vision transformers need one for each
    size, with or without CSRA."""
    counts = []
    step = (case.run - case.made) // 2
    sizes = [case.made + step * i for i in range(12 if case.name == "test_resnet" else 4)]
    for wrapped in (False, True):
        torch._dynamo.reset()
        model = timm_csra.wrap(case.model, 0.3) if wrapped else case.model
        counter = CompileCounterWithBackend("eager")
        compiled = torch.compile(model, backend=counter, fullgraph=True, dynamic=True)
        for size in sizes:
            x = case.images(size)
            torch.testing.assert_close(compiled(x), model(x), rtol=1e-3, atol=1e-3)
        counts.append(counter.frame_count)
    assert counts[1] == counts[0]


ONNX = ("test_resnet", "test_vit2", "resnetv2_18")


@pytest.mark.slow
@pytest.mark.parametrize(
    "case", [case for case in RESIZED if case.name in ONNX], ids=lambda case: f"{case.name}-{case.run}"
)
@pytest.mark.parametrize("dynamo", [True, False], ids=["torch.export", "torchscript"])
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning", "ignore::UserWarning")
@torch.no_grad()
def test_onnx_runtime_at_another_size(case: Resized, dynamo: bool, tmp_path: Path) -> None:
    def record(model: torch.nn.Module) -> Callable[[Tensor], Tensor]:
        path = tmp_path / "model.onnx"
        names = {0: "n", 2: "h", 3: "w"}
        dynamic = {"dynamic_shapes": (DYNAMIC,)} if dynamo else {"dynamic_axes": {"x": names}}
        torch.onnx.export(model, (case.images(case.made),), path, dynamo=dynamo, input_names=["x"], **dynamic)
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        return lambda x: torch.from_numpy(session.run(None, {"x": x.numpy()})[0])

    plain_and_wrapped(case, record)
