"""How forward passes run on an accelerator: precision and layout change nothing but digits, and a CPU keeps float32."""

from contextlib import nullcontext
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

from timm_csra.accelerators import autocast, is_convolutional, precision, to_device
from timm_csra.evaluation.scoring import DEFAULT, DEFAULT_LOG_SOFTMAX, PLAIN, score
from timm_csra.hub import weights_sha256

SETTINGS = (PLAIN, DEFAULT, DEFAULT_LOG_SOFTMAX)


def fake_cuda(monkeypatch: pytest.MonkeyPatch, supported: dict[str, bool]) -> None:
    """CUDA devices that have bfloat16 or have not; emulated, older ones have it too, and are slower with it."""
    current: list[str] = []

    def device(name: Any) -> Any:
        current[:] = [str(name)]
        return nullcontext()

    def is_bf16_supported(including_emulation: bool = True) -> bool:
        return including_emulation or supported[current[0]]

    monkeypatch.setattr(torch.cuda, "device", device)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", is_bf16_supported)


def test_auto_is_bf16_where_the_device_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_cuda(monkeypatch, {"cuda": True, "cuda:0": True, "cuda:1": False})
    monkeypatch.setattr(torch.xpu, "is_bf16_supported", lambda: True)
    for device, expected in (("cuda", "bf16"), ("cuda:0", "bf16"), ("cuda:1", "none"), ("xpu", "bf16")):
        assert precision("auto", device) == expected
    for device in ("cpu", "mps", "meta"):
        assert precision("auto", device) == "none"
    for given in ("none", "bf16", "fp16"):
        assert {precision(given, device) for device in ("cuda:1", "cpu")} == {given}


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("test_resnet", True),
        ("test_convnext", True),
        ("test_efficientnet", True),
        ("test_mambaout", True),
        ("vgg11", True),
        ("coatnet_0_rw_224", True),
        ("vit_tiny_r_s16_p8_224", True),  # a ResNet before the transformer
        ("test_vit", False),
        ("deit_tiny_patch16_224", False),
        ("swin_tiny_patch4_window7_224", False),
        ("mixer_s32_224", False),
        ("naflexvit_base_patch16_gap", False),
    ],
)
def test_a_model_is_convolutional_if_windows_overlap(name: str, expected: bool) -> None:
    with torch.device("meta"):
        assert is_convolutional(timm.create_model(name)) is expected


def model_of(name: str) -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model(name, num_classes=10).eval()


def scored(model: nn.Module, x: Tensor, device: Any = "cpu", amp_dtype: torch.dtype | None = None) -> Tensor:
    scores, _ = score(model, [(x, torch.zeros(len(x)))], SETTINGS, device=device, amp_dtype=amp_dtype)
    return torch.stack([scores.base, *scores.attention.values()])


def is_channels_last(tensor: Tensor) -> bool:
    return tensor.is_contiguous(memory_format=torch.channels_last) and not tensor.is_contiguous()


@pytest.mark.parametrize("name", ["test_resnet", "test_efficientnet", "test_convnext", "test_mambaout"])
def test_channels_last_changes_the_layout_and_no_score(name: str) -> None:
    x = torch.randn(4, 3, 96, 96)
    model = model_of(name)
    expected, hashed = scored(model, x), weights_sha256(model)
    same = to_device(model, "cpu", channels_last=True)
    assert same is model
    weights = [m.weight for m in model.modules() if isinstance(m, nn.Conv2d) and m.weight[0].shape[1:] != (1, 1)]
    assert any(is_channels_last(weight) for weight in weights)
    stem = next(m for m in model.modules() if isinstance(m, nn.Conv2d))
    assert is_channels_last(stem(x))  # of images that are not
    torch.testing.assert_close(scored(model, x), expected, atol=1e-5, rtol=1e-4)
    assert weights_sha256(model) == hashed


def test_a_transformer_stays_as_it_is() -> None:
    model = to_device(model_of("test_vit"), "cpu", channels_last=True)
    assert all(weight.is_contiguous() for weight in model.parameters())


def test_channels_last_is_off_unless_asked_for() -> None:
    model = to_device(model_of("test_resnet"), "cpu", channels_last=False)
    assert all(weight.is_contiguous() for weight in model.parameters())


@pytest.mark.parametrize("name", ["test_resnet", "test_vit"])
def test_bf16_agrees_with_float32_in_its_digits(name: str) -> None:
    x, model = torch.randn(8, 3, 160, 160), model_of(name)
    expected, found = scored(model, x), scored(model, x, amp_dtype=torch.bfloat16)
    error = (found - expected).abs().max() / expected.abs().max()
    assert 0 < error < 0.03  # bfloat16 has 8 bits: 0.4 % for each rounding


def test_autocast_is_that_of_the_device() -> None:
    x, linear = torch.randn(2, 3), nn.Linear(3, 3)
    for amp, dtype in (("none", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16)):
        with torch.inference_mode(), autocast("cpu", amp):
            assert linear(x).dtype == dtype


@pytest.mark.cuda
@pytest.mark.parametrize("name", ["test_resnet", "test_efficientnet", "test_vit"])
def test_on_a_gpu(name: str, cuda: torch.device) -> None:
    """What `--device cuda` does by default agrees with float32 on a CPU."""
    amp = precision("auto", cuda)
    assert amp == ("bf16" if torch.cuda.get_device_capability(cuda)[0] >= 8 else "none")
    x, model = torch.randn(8, 3, 160, 160), model_of(name)
    expected = scored(model, x)
    model = to_device(model, cuda, channels_last=True)
    assert any(is_channels_last(weight) for weight in model.parameters()) is is_convolutional(model)
    found = scored(model, x, cuda, torch.bfloat16 if amp == "bf16" else None)
    assert (found - expected).abs().max() / expected.abs().max() < 0.03
