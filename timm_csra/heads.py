"""Find out how a model's head works, by running a copy of it once on a few numbers.

The copy, called the twin, is a copy of the module tree that shares every tensor with the model and has no hooks, so
running it triggers no hook and changes nothing in the model. It shows which modules run in the head, whether the head
is `pre_logits` followed by one linear layer, and whether its logits for a constant map depend on the size of the map.
"""

import inspect
import types
from dataclasses import dataclass, field, replace
from typing import Any
from weakref import WeakKeyDictionary

import torch
from timm.layers import SelectAdaptivePool2d
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.modules import module as nn_module

from .errors import UnsupportedModelError, describe
from .layouts import Head, Layout, elements


@dataclass(frozen=True)
class HeadParts:
    """The parts of a head.

    Attributes:
        inside: all submodules of the model. The model itself is not among them, since a cache of this object must not
            keep the model alive.
        modules: the modules that run in the head, with their submodules; all modules of the model where that is
            unknown.
        classifier: the linear layer or 1x1 convolution that comes last and takes `pre_logits` as its input; None where
            there is none, or where a module of the head has a hook.
        instead: replacements of the model's pooling and flattening modules, by name, with which `pre_logits` takes a
            whole map `(N, C, H, W)` at once. Used for heads with pointwise convolutions between pooling and flattening
            (MobileNetV3, GhostNet): convolving N * L maps of one location takes twice as long, which is a tenth of the
            time of the smallest models.
    """

    inside: tuple[nn.Module, ...]
    modules: tuple[nn.Module, ...]
    classifier: nn.Linear | nn.Conv2d | None = None
    instead: dict[str, nn.Module] = field(default_factory=dict)

    def evaluating(self, model: nn.Module) -> "_Evaluating":
        """Return a context manager that puts the model into eval mode while locations are scored, so that dropout is
        off and no buffer changes. All modules are switched, since a head may read the flag of a module that it does not
        call.

        A module that returns a pair of logits in distilled training stays in training mode. A model in eval mode is not
        written to, so that threads can share it.
        """
        return _Evaluating([module for module in (model, *self.inside) if module.training])


class _Evaluating:
    """Switch modules to eval mode and back. A class, since torch.compile in older torch versions does not support
    contextlib.contextmanager."""

    def __init__(self, training: list[nn.Module]) -> None:
        self.switched = [module for module in training if not getattr(module, "distilled_training", False)]

    def __enter__(self) -> None:
        for module in self.switched:
            module.training = False

    def __exit__(self, *_: Any) -> None:
        for module in self.switched:
            module.training = True


@dataclass(frozen=True)
class _Examined:
    state: tuple[Any, ...]  # of the head when it was examined; after a change it is examined again
    parts: HeadParts


# torch's global hooks, by kind; torch has no public function that lists them.
_GLOBAL_HOOKS = [
    value for name, value in vars(nn_module).items() if name.startswith("_global_") and isinstance(value, dict)
]

# Not stored in the models, because pickles, copies and unwrapped models must not contain it.
_examined: WeakKeyDictionary[nn.Module, _Examined] = WeakKeyDictionary()

# Types of attributes that a head's `forward` may depend on.
_DECIDING = frozenset((bool, int, float, str, type(None), Tensor))


def is_recorded() -> bool:
    """Return whether this call is recorded as a graph: torch.compile, torch.export, torch.jit.trace, ONNX export."""
    return torch.compiler.is_compiling() or torch.jit.is_tracing()


def parts_of(model: nn.Module, head: Head, layout: Layout, locations: tuple[Tensor, ...]) -> HeadParts:
    """Find the parts of the model's own `forward_head`, for features like `locations`, `(N, L, C)`.

    The head is not examined in a recorded graph, with tensors without values, inside torch.func transforms, or while
    torch has global hooks, which would see the twin run; all modules are then taken as modules of the head.

    Raises:
        UnsupportedModelError: the head's logits for a constant map depend on the number of its locations.
    """
    if is_recorded() or _without_values(locations) or any(_GLOBAL_HOOKS):
        return _unknown(model)
    examined = _examined.get(model)
    if examined is None or examined.state != _state(model, head, examined.parts.modules):
        parts = _examine(model, head, layout, locations)
        examined = _examined[model] = _Examined(_state(model, head, parts.modules), parts)
    if examined.parts.classifier is not None and any(map(_is_watched, examined.parts.modules)):
        return replace(examined.parts, classifier=None)
    return examined.parts


def _unknown(model: nn.Module) -> HeadParts:
    inside = _inside(model)
    return HeadParts(inside, inside)


def _inside(model: nn.Module) -> tuple[nn.Module, ...]:
    return tuple(module for module in model.modules() if module is not model)


def _without_values(tensors: tuple[Tensor, ...]) -> bool:
    fake = any(tensor.is_meta or isinstance(tensor, FakeTensor) for tensor in tensors)
    return fake or torch._C._are_functorch_transforms_active()  # there is no public function for this


def _state(model: nn.Module, head: Head, modules: tuple[nn.Module, ...]) -> tuple[Any, ...]:
    """Collect the head's modules, functions and plain attributes, to detect changes without running the head."""
    own = (getattr(head, "__func__", head), type(model), *_attributes(model), *model.children())
    parts = ((type(m), vars(m).get("forward"), *_attributes(m), *m.children()) for m in modules)
    return own + tuple(part for of_module in parts for part in of_module)


def _attributes(module: nn.Module) -> list[Any]:
    """Collect attributes that `forward` may depend on, such as a pooling type or a temperature that starts as None."""
    values = [v for name, v in vars(module).items() if type(v) in _DECIDING and name != "training"]
    return [(id(v), None if v.is_inference() else v._version) if type(v) is Tensor else v for v in values]


def _is_watched(module: nn.Module) -> bool:
    """Return whether the module has a hook that would see its calls; nn.Module has no public method for this."""
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )


def _twin(module: nn.Module, twins: dict[nn.Module, nn.Module]) -> nn.Module:
    """Copy a module tree, in eval mode, without hooks and not compiled; the copy shares the tensors. Scripted modules
    are used as they are: they cannot be copied and accept no hooks."""
    if isinstance(module, torch.jit.ScriptModule):
        return module
    if module not in twins:
        twin = twins[module] = object.__new__(type(module))  # FSDP overrides __new__
        own = {name: value for name, value in vars(module).items() if getattr(value, "__self__", None) is module}
        vars(twin).update(vars(module))
        vars(twin).update({name: types.MethodType(method.__func__, twin) for name, method in own.items()})
        vars(twin).update({name: value for name, value in vars(nn.Module()).items() if "hooks" in name})
        children = {name: child if child is None else _twin(child, twins) for name, child in module._modules.items()}
        vars(twin).update(_modules=children, training=False, _compiled_call_impl=None)
    return twins[module]


def _examine(model: nn.Module, head: Head, layout: Layout, locations: tuple[Tensor, ...]) -> HeadParts:
    if not isinstance(head, types.MethodType):  # only a method can be bound to the twin
        return _unknown(model)
    # DTensors, which FSDP gathers in hooks.
    if any(hasattr(parameter, "full_tensor") for parameter in model.parameters()):
        return _unknown(model)
    inside, twins = _inside(model), dict[nn.Module, nn.Module]()
    twin = _twin(model, twins)
    twin_head = types.MethodType(head.__func__, twin)
    called: list[nn.Module] = []
    for module, of_module in twins.items():
        of_module.register_forward_pre_hook(lambda *_, module=module: called.append(module))
    classifier = layout.classifier(model)
    stand_in = _StandIn.of(classifier)
    if stand_in is not None:
        vars(twins[classifier])["forward"] = stand_in
    with torch.inference_mode(False), torch.no_grad():  # `gave` reads `_base`, which inference tensors do not have
        # 1 + ... makes them positive, as activations do: roots and powers of them must not be NaN.
        rows = tuple(1 + _numbers(2 * branch.shape[2], branch).unflatten(0, (2, -1)) for branch in locations)
        logits = _run(model, twin_head, layout, rows)
        scripted = [module for module in inside if isinstance(module, torch.jit.ScriptModule)]
        modules = tuple(dict.fromkeys(part for module in [*called, *scripted] for part in module.modules()))
        once = stand_in is not None and called.count(classifier) == 2  # once in each of two runs
        if once and isinstance(logits, Tensor) and "pre_logits" in inspect.signature(head).parameters:
            pre_logits = layout.pre_logits(twin, twin_head, *rows)
            if pre_logits.ndim == 2 and stand_in.gave(logits) and _close(logits, stand_in(pre_logits)):  # type: ignore
                convolves = any(isinstance(m, nn.Conv2d) and m is not classifier for m in modules)
                on_map = convolves and layout.format == "NCHW"
                instead = _without_pooling(twin, twin_head, rows[0], pre_logits) if on_map else {}
                return HeadParts(inside, modules, classifier, instead)
    return HeadParts(inside, modules)


def _without_pooling(model: nn.Module, head: Head, rows: Tensor, pre_logits: Tensor) -> dict[str, nn.Module]:
    """Find the replacements with which `pre_logits` takes a whole map, see `HeadParts.instead`; return none where a map
    of two locations does not give the `pre_logits` of both."""
    instead: dict[str, nn.Module] = {}
    for name, child in model.named_children():
        if isinstance(child, SelectAdaptivePool2d):
            instead[name] = SelectAdaptivePool2d(pool_type="")
        elif isinstance(child, nn.Flatten):
            instead[name] = nn.Identity()
    try:
        whole = on_whole_map(model, head, instead, rows.t()[None, :, :, None])
    except Exception:  # other parts of the head may refuse a map with any kind of error
        return {}
    return instead if _close(whole, pre_logits.t()[None, :, :, None]) else {}


def on_whole_map(model: nn.Module, head: Head, instead: dict[str, nn.Module], features: Tensor) -> Tensor:
    """Compute the `pre_logits` of every location of a map `(N, C, H, W)`, with the pooling replaced by `instead`."""
    view = object.__new__(type(model))
    vars(view).update(vars(model))
    vars(view)["_modules"] = {**model._modules, **instead}
    return types.MethodType(head.__func__, view)(features, pre_logits=True)  # type: ignore[attr-defined]


def _run(model: nn.Module, head: Head, layout: Layout, rows: tuple[Tensor, ...]) -> Any:
    """Run a head on two constant maps in one batch, and return its logits.

    Raises:
        UnsupportedModelError: the logits of the first map depend on its size, or on the second map.
    """
    expected = (
        "Expected a pooling that turns a constant map of any size into its constant (a mean, a maximum, an attention), "
        "and no use of other images in eval mode: otherwise a single location has no score. Replace that part of the "
        "head."
    )
    try:
        two = head(layout.constant_maps(*rows))
        larger = head(layout.constant_maps(*(branch[:1] for branch in rows), places=4))
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        raise UnsupportedModelError(
            f"{describe(model)}: its head cannot run on maps of one and of 2x2 locations: {error}. {expected}"
        ) from error
    pairs = zip(elements(two), elements(larger), strict=True)
    if not all(len(a) == 2 and _close(a[:1], b) for a, b in pairs):
        raise UnsupportedModelError(
            f"{describe(model)}: its head returned other logits for a constant map of 2x2 locations than for one "
            f"location of it. {expected}"
        )
    return two


class _StandIn:
    """A linear layer of rank one that replaces the last layer, since the weights of the last layer may be zero."""

    def __init__(self, classes: int, dim: int) -> None:
        self.classes = classes
        self.dim = dim  # the dimension of the channels
        self.outputs: list[Tensor] = []

    def gave(self, logits: Tensor) -> bool:
        """Return whether these logits are its own output or an unmodified view of it. Comparing values would miss an
        operation after it that has no effect yet (a temperature of 1, a branch that starts at zero, a clamp)."""
        return any((logits is out or logits._base is out) and out._version == 0 for out in self.outputs)

    @classmethod
    def of(cls, classifier: Any) -> "_StandIn | None":
        """Make one for a linear layer or a 1x1 convolution; return None for other modules."""
        if isinstance(classifier, nn.Linear):
            return cls(classifier.out_features, -1)
        if isinstance(classifier, nn.Conv2d):
            sizes = (classifier.kernel_size, classifier.stride, classifier.padding, classifier.groups)
            return cls(classifier.out_channels, 1) if sizes == ((1, 1), (1, 1), (0, 0), 1) else None
        return None

    def __call__(self, x: Tensor) -> Tensor:
        features = x.movedim(self.dim, -1)
        # 1 + ... so that the weights do not sum to zero, which would hide a shift of all features.
        projected = features @ (1 + _numbers(features.shape[-1], x)) / features.shape[-1] ** 0.5
        logits = (projected[..., None] * _numbers(self.classes, x)).movedim(-1, self.dim)
        self.outputs.append(logits.clone(memory_format=torch.contiguous_format))
        return self.outputs[-1]


def _numbers(count: int, like: Tensor) -> Tensor:
    """Return fixed numbers between -1 and 1, in the dtype and on the device of `like`; no random state is used."""
    return torch.arange(count, device=like.device).float().cos().to(like.dtype)


def _close(a: Tensor, b: Tensor) -> bool:
    """Return whether two tensors are equal up to rounding, relative to the largest finite element."""
    if a.shape != b.shape:
        return False
    scale = torch.where(b.isfinite(), b, 0).abs().amax()
    return torch.allclose(a, b, rtol=0, atol=float(scale) * torch.finfo(b.dtype).eps ** 0.5, equal_nan=True)
