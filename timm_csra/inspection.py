"""What wrapping means for one model: its kind of head, its grid of locations, and what scoring them costs."""

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
    "exact": "linear after average pooling: the mean of the location scores is the plain logit, as in the paper",
    "nonlinear": "a norm, a hidden layer, an activation or another pooling makes the plain logit differ from that mean",
    "token": "class token or attention pooling: patch tokens were not trained to be classified, gains may be absent",
}
# With the evidence of docs/results.md, seven ImageNet-1k checkpoints.
_SEVERAL = (
    "not wrapped. Pictures of several objects, weights trained with softmax cross entropy: "
    'wrap(model, lam=0.3, scores="log_softmax") (mosaics gained 2 to 4 points of mAP, COCO 0.5); with a sigmoid for '
    "each class: wrap(model, lam=0.1) (small heads alone were measured). One object each: leave it plain (no gain, up "
    "to 1.4 points lost). timm_csra.tune decides on labelled pictures"
)
_ADVICE = {
    "exact": _SEVERAL,
    "nonlinear": f"{_SEVERAL}; of heads such as this one with 1,000 classes, one was measured, whose mosaics gained "
    "0.6 to 4.5 points and COCO lost 3.4 on logits",
    "token": "not wrapped. A class token or attention pooling decides: leave it plain, unless timm_csra.tune finds a "
    "gain on labelled pictures (of one ViT, mosaics did not gain; COCO gained 1 point of mAP)",
}


@dataclass(frozen=True)
class Explanation:
    """What `explain` found; `str()` of it is meant to be read.

    Attributes:
        architecture: timm's name of the architecture, else the class name.
        input_size: images the figures are for, `(C, H, W)`.
        kind: `exact`, `nonlinear` or `token`; None where the model cannot be wrapped.
        features: what `forward_features` returns, in timm's letters: `NCHW`, `NHWC`, `NLC`, or several of them.
        prefix_tokens: tokens before the locations (class, distillation, registers), which are no locations.
        path: how locations are scored: `general rule`, or `family adapter` with the family.
        grid: rows and columns of locations, or None where they form none.
        locations: number of locations L.
        num_classes: K.
        macs: multiply-accumulates of the plain model for one image.
        extra_macs: those that scoring the locations adds.
        extra_parameters: always 0.
        settings: those that the model is wrapped with, or None.
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
    """Say what `wrap` would do, or does, to this model. Nothing is computed on real images and nothing is changed.

    Args:
        model: plain or wrapped, on any device (the meta device too).
        input_size: pixels as `S`, `(H, W)` or `(C, H, W)`; None for the model's own.

    Returns:
        An `Explanation`. A model that cannot be wrapped gives one whose `unsupported` says why; it raises nothing.

    Raises:
        ValueError: an `input_size` that is none, or that the model does not take.

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
    # timm < 1.0.31: the checkpoint's size, or that of the patch embedding where the model was built for another one.
    channels, *size = getattr(model, "pretrained_cfg", {}).get("input_size", (3, 224, 224))
    height, width = getattr(getattr(model, "patch_embed", None), "img_size", None) or size
    convolutions = (module.in_channels for module in model.modules() if isinstance(module, nn.Conv2d))
    return next(convolutions, channels), height, width


def _skeleton(model: nn.Module, mode: FakeTensorMode) -> nn.Module:
    """A copy in eval mode whose weights have shapes and no values: it takes no memory, runs at no cost, and leaves no
    trace in the model (attention caches its biases in some)."""
    tensors = [leaf for module in model.modules() for leaf in tree_leaves(vars(module)) if isinstance(leaf, Tensor)]
    fakes = {id(t): mode.from_tensor(t if isinstance(t, nn.Parameter) else t.detach()) for t in tensors}
    return copy.deepcopy(model, fakes).eval()


@torch.inference_mode(False)
@torch.enable_grad()  # whatever the caller has set: the flop counter and the kind need gradients
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
    kind = _kind(model, head, shapes, recorder)  # with numbers: what cannot be wrapped is refused here
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
    """Which parameters and buffers a head uses, and whether it attends."""

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
        self.attends |= func in _ATTENTION and not (func in _SOFTMAX and used)  # a softmax of a weight mixes branches
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
    """Try the head on random features in float64, with random weights in place of its own: a head that starts at
    zero, or has no weights yet (meta device), says nothing otherwise."""
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
