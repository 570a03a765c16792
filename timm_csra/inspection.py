"""Describe what wrapping does to a model: its kind of head, its grid of locations, and the cost of scoring them."""

import copy
from dataclasses import dataclass
from typing import Any

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from .config import CSRAConfig
from .errors import UnsupportedModelError, describe
from .layouts import Head, layout_of, spatial_features
from .locations import location_scores
from .patching import check_supported, is_wrapped, plain_head

_KINDS = {
    "exact": "linear after average pooling: the mean of the per-location logits is the plain logit, as in the paper",
    "nonlinear": "a norm, a hidden layer, an activation or another pooling: the plain logit differs from the mean of "
    "the per-location logits",
    "token": "class token or attention pooling: patch tokens were not trained to be classified, gains may be absent",
}
# Figures of docs/results.md, of seven ImageNet-1k checkpoints.
_SEVERAL = (
    "not wrapped. For pictures of several objects: if the model was trained with softmax cross entropy, use "
    'wrap(model, lam=0.3, scores="log_softmax") (it gained 2 to 4 points of mAP on mosaics, 0.5 on COCO); if it was '
    "trained with a sigmoid for each class, use wrap(model, lam=0.1) (measured on small heads alone). For pictures of "
    "one object each: leave the model plain (no gain, up to 1.4 points lost). timm_csra.tune measures the gain on "
    "labelled pictures of your own"
)
_ADVICE = {
    "exact": _SEVERAL,
    "nonlinear": f"{_SEVERAL}. One checkpoint with such a head and 1,000 classes was measured: on mosaics it gained "
    "0.6 to 4.5 points of mAP, on COCO it lost 1.2, or 3.4 on logits",
    "token": "not wrapped. The class token or the attention pooling decides, so leave the model plain, unless "
    "timm_csra.tune measures a gain on labelled pictures (one ViT was measured: no gain on mosaics, 1 point of mAP on "
    "COCO)",
}


@dataclass(frozen=True)
class Explanation:
    """Result of `explain`; `str()` gives a readable summary.

    Attributes:
        architecture: timm's name of the architecture, else the class name.
        input_size: size of the images that the figures are for, `(C, H, W)`.
        kind: `exact`, `nonlinear` or `token`; None where the model cannot be wrapped.
        features: shape of the output of `forward_features`, in timm's notation: `NCHW`, `NHWC`, `NLC`, or several.
        prefix_tokens: number of class, distillation and register tokens; they are not locations.
        path: how locations are scored: `general rule`, or `family adapter` with its name.
        grid: rows and columns of locations, or None where the locations form no grid.
        locations: number of locations, L.
        num_classes: number of classes, K.
        macs: multiply-accumulates of the plain model for one image.
        extra_macs: multiply-accumulates that scoring the locations adds.
        extra_parameters: always 0.
        settings: the settings of a wrapped model, or None.
        unsupported: why the model cannot be wrapped, or None.
    """

    architecture: str
    input_size: tuple[int, int, int] | None = None
    kind: str | None = None
    features: str | None = None
    prefix_tokens: int = 0
    path: str | None = None
    grid: tuple[int, int] | None = None
    locations: int = 0
    num_classes: int = 0
    macs: int = 0
    extra_macs: int = 0
    extra_parameters: int = 0
    settings: CSRAConfig | None = None
    unsupported: str | None = None

    def __str__(self) -> str:
        if self.unsupported:
            return f"{self.architecture}: cannot be wrapped\n  {self.unsupported}"
        grid = f"{self.grid[0]} x {self.grid[1]}" if self.grid else f"{self.locations} (no grid)"
        share = f"{100 * self.extra_macs / self.macs:.2f} %" if self.macs else "n/a"
        assert self.kind is not None and self.input_size is not None
        return (
            f"{self.architecture}: can be wrapped\n"
            f"  kind              {self.kind} ({_KINDS[self.kind]})\n"
            f"  locations         {grid} for an input of {'x'.join(map(str, self.input_size))}\n"
            f"  scored by         {self.path}\n"
            f"  classes           {self.num_classes}\n"
            f"  extra parameters  {self.extra_parameters}\n"
            f"  extra MACs        {self.extra_macs / 1e6:.2f} M beside the model's {self.macs / 1e6:.1f} M ({share})\n"
            f"  settings          {self.settings or _ADVICE[self.kind]}"
        )


def explain(model: nn.Module, input_size: int | tuple[int, ...] | None = None) -> Explanation:
    """Describe what `wrap` would do, or did, to this model. The model is not changed, and needs no images.

    Args:
        model: plain or wrapped, on any device, including the meta device.
        input_size: pixels as `S`, `(H, W)` or `(C, H, W)`; None for the model's own.

    Returns:
        An `Explanation`. For a model that cannot be wrapped, its `unsupported` gives the reason.

    Raises:
        ValueError: `input_size` is not a size, or the model cannot run on it.

    Example:
        >>> import timm
        >>> explain(timm.create_model('test_resnet')).kind
        'exact'
    """
    try:
        check_supported(model)
    except UnsupportedModelError as error:
        return Explanation(describe(model), unsupported=str(error))
    size = _input_size(model, input_size)
    try:
        return _explain(model, size)
    except UnsupportedModelError as error:
        return Explanation(describe(model), size, unsupported=str(error))
    except (AssertionError, RuntimeError) as error:
        if input_size is None:
            raise
        raise ValueError(f"{describe(model)}: cannot run on {'x'.join(map(str, size))}: {error}") from error


def _input_size(model: nn.Module, requested: int | tuple[int, ...] | None) -> tuple[int, int, int]:
    channels, height, width = _own_input_size(model)
    if requested is None:
        return channels, height, width
    sizes = tuple(requested) if isinstance(requested, (tuple, list)) else (requested, requested)
    if len(sizes) not in (2, 3) or not all(type(size) is int and size > 0 for size in sizes):
        raise ValueError(f"input_size: found {requested!r}; expected pixels such as 224, (H, W) or (C, H, W).")
    *channel, height, width = sizes
    return channel[0] if channel else channels, height, width


def _own_input_size(model: Any) -> tuple[int, int, int]:
    if hasattr(timm.models, "get_model_input_config"):
        return timm.models.get_model_input_config(model)["input_size"]
    # timm < 1.0.31: the size of the patch embedding, which may differ from the checkpoint's, else the checkpoint's.
    channels, *size = getattr(model, "pretrained_cfg", {}).get("input_size", (3, 224, 224))
    height, width = getattr(getattr(model, "patch_embed", None), "img_size", None) or size
    convolutions = (module.in_channels for module in model.modules() if isinstance(module, nn.Conv2d))
    return next(convolutions, channels), height, width


def _skeleton(model: nn.Module, mode: FakeTensorMode) -> nn.Module:
    """Copy the model in eval mode, with weights that have shapes but no values: the copy takes no memory, runs at no
    cost, and cannot change the model (some attention modules cache their biases)."""
    tensors = [leaf for module in model.modules() for leaf in tree_leaves(vars(module)) if isinstance(leaf, Tensor)]
    fakes = {id(t): mode.from_tensor(t if isinstance(t, nn.Parameter) else t.detach()) for t in tensors}
    return copy.deepcopy(model, fakes).eval()


@torch.inference_mode(False)
@torch.enable_grad()  # the flop counter and `_kind` need gradients, even where the caller has disabled them
def _explain(model: nn.Module, size: tuple[int, int, int]) -> Explanation:
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    model = _skeleton(model, mode)
    head = plain_head(model)
    weight = next(model.parameters())
    with mode:
        images = torch.empty(1, *size, dtype=weight.dtype, device=weight.device)
        with FlopCounterMode(display=False) as plain:
            features = spatial_features(model, images)
            with _HeadRecorder(model) as recorder:
                head(features)
        layout = layout_of(model, features)
        shapes = [tuple(part.shape) for part in (features if isinstance(features, (list, tuple)) else [features])]
        grid = layout.grid(model, features, size[1:])
    kind = _kind(model, head, shapes, recorder)  # computes with values: raises for heads that cannot be wrapped
    with mode, FlopCounterMode(display=False) as extra:
        scores = location_scores(model, head, features)
    return Explanation(
        architecture=describe(model),
        input_size=size,
        kind=kind,
        features=layout.format,
        prefix_tokens=layout.prefix_tokens,
        path=f"family adapter: {layout.adapter}" if layout.adapter else "general rule",
        grid=grid,
        locations=scores[0].shape[1],
        num_classes=scores[0].shape[2],
        macs=plain.get_total_flops() // 2,
        extra_macs=extra.get_total_flops() // 2,
        settings=copy.copy(model.csra) if is_wrapped(model) else None,  # type: ignore[arg-type]
    )


class _HeadRecorder(TorchFunctionMode):
    """Record which parameters and buffers a head uses, and whether it computes an attention."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        tensors = [*model.named_parameters(), *model.named_buffers()]
        self._names = {id(tensor): name for name, tensor in tensors}
        self.used: set[str] = set()
        self.attends = False

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        used = {self._names[id(leaf)] for leaf in tree_leaves((args, kwargs)) if id(leaf) in self._names}
        self.used |= used
        # A softmax of a weight mixes branches; it is not an attention.
        self.attends |= func in _ATTENTION and not (func in _SOFTMAX and used)
        return func(*args, **kwargs)


_SOFTMAX = (F.softmax, torch.softmax, Tensor.softmax)
_ATTENTION = (F.scaled_dot_product_attention, F.multi_head_attention_forward, *_SOFTMAX)


class _Call(nn.Module):
    """A head as a module, so that `functional_call` can run it on other weights."""

    def __init__(self, model: nn.Module, head: Head) -> None:
        super().__init__()
        self.model = model
        self._head = head

    def forward(self, features: Any) -> tuple[Tensor, tuple[Tensor, ...]]:
        logits = self._head(features)
        return (logits if isinstance(logits, Tensor) else logits[0]), location_scores(self.model, self._head, features)


def _kind(model: nn.Module, head: Head, shapes: list[tuple[int, ...]], recorder: _HeadRecorder) -> str:
    """Find the kind of a head by running it on random features in float64, with random weights in place of its own: a
    head initialised with zeros, or on the meta device, would show nothing."""
    if recorder.attends:
        return "token"
    generator = torch.Generator().manual_seed(0)
    weights: dict[str, Tensor] = {}
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if name in recorder.used:
            # Buffers in a head are running means and variances: positive values suit both.
            uniform = torch.rand(tensor.shape, generator=generator, dtype=torch.float64, device="cpu")
            weights[f"model.{name}"] = 2 * uniform - 1 if isinstance(tensor, nn.Parameter) else uniform + 0.5
    parts = [
        torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu", requires_grad=True)
        for shape in shapes
    ]
    features = parts[0] if len(parts) == 1 else parts
    call = _Call(model, head)
    logits, scores = torch.func.functional_call(call, weights, (features,))
    gradients = torch.autograd.grad(logits.sum(), parts, materialize_grads=True)
    where = layout_of(model, features).locations(gradients[0] if len(parts) == 1 else gradients)
    if not any(branch.any() for branch in where):
        return "token"
    return "exact" if torch.allclose(logits, scores[0].mean(1), rtol=1e-9, atol=1e-9) else "nonlinear"
