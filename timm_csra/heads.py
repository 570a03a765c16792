"""How a model's head works, found out by running a twin of it once on a few numbers.

The twin is a copy of the tree of modules that shares every tensor and has no hooks: no hook sees it run, and it leaves
nothing in the model. It shows which modules run in the head, whether the head is its `pre_logits` followed by one
linear layer, and whether its logits of a constant map depend on the size of the map.
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
    """What is known of a head.

    Attributes:
        inside: all modules of the model, without itself: what is kept of a model must not keep it.
        modules: those that run in the head, with what they hold; all where that is not known.
        classifier: the linear layer or 1x1 convolution that comes last and whose inputs `pre_logits` gives, where no
            hook is in the head; else None.
        instead: what to put in the place of the model's own pooling and flattening, by name, for `pre_logits` of a
            whole map `(N, C, H, W)` at once, where they lie before and after pointwise convolutions (MobileNetV3,
            GhostNet): a convolution of N * L maps of one location takes twice as long, which is a tenth of the
            smallest models.
    """

    inside: tuple[nn.Module, ...]
    modules: tuple[nn.Module, ...]
    classifier: nn.Linear | nn.Conv2d | None = None
    instead: dict[str, nn.Module] = field(default_factory=dict)

    def evaluating(self, model: nn.Module) -> "_Evaluating":
        """Put what is in training into eval, so that no dropout acts and no buffer changes while locations are scored:
        all of the model, since a head may read the flag of a module that it does not call.

        A module that gives a pair of logits in distilled training keeps its flag. Nothing is written where nothing is
        in training: threads may share a model in eval.
        """
        return _Evaluating([module for module in (model, *self.inside) if module.training])


class _Evaluating:
    """A class, since the compiler of older versions of torch takes no contextlib.contextmanager."""

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
    state: tuple[Any, ...]  # what the head was made of: another state asks for another look
    parts: HeadParts


# Of torch, by kind; there is no public way to ask for them.
_GLOBAL_HOOKS = [
    value for name, value in vars(nn_module).items() if name.startswith("_global_") and isinstance(value, dict)
]

# Not in the models: pickles, copies and unwrapped models must not hold it.
_examined: WeakKeyDictionary[nn.Module, _Examined] = WeakKeyDictionary()


_DECIDING = frozenset((bool, int, float, str, type(None), Tensor))


def is_recorded() -> bool:
    """Whether this call becomes a graph (torch.compile, torch.export, torch.jit.trace and both ONNX exporters)."""
    return torch.compiler.is_compiling() or torch.jit.is_tracing()


def parts_of(model: nn.Module, head: Head, layout: Layout, locations: tuple[Tensor, ...]) -> HeadParts:
    """Find the parts of `model`'s own `forward_head`, on the kind of features that `locations` `(N, L, C)` are of.

    Recorded graphs, tensors without values, and transforms of torch.func get no answer but all modules, and a hook on
    every module (a global one) forbids the twin.

    Raises:
        UnsupportedModelError: what the head says of a constant map depends on the number of its locations.
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
    return fake or torch._C._are_functorch_transforms_active()  # which has no public name


def _state(model: nn.Module, head: Head, modules: tuple[nn.Module, ...]) -> tuple[Any, ...]:
    """The head's modules, functions and plain attributes, as far as they can be told apart without running them."""
    own = (getattr(head, "__func__", head), type(model), *_attributes(model), *model.children())
    parts = ((type(m), vars(m).get("forward"), *_attributes(m), *m.children()) for m in modules)
    return own + tuple(part for of_module in parts for part in of_module)


def _attributes(module: nn.Module) -> list[Any]:
    """What a `forward` may decide by: a temperature that is None at first, how to pool."""
    values = [v for name, v in vars(module).items() if type(v) in _DECIDING and name != "training"]
    return [(id(v), None if v.is_inference() else v._version) if type(v) is Tensor else v for v in values]


def _is_watched(module: nn.Module) -> bool:
    """Whether a hook would see this module's calls (nn.Module has no public way to ask)."""
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )


def _twin(module: nn.Module, twins: dict[nn.Module, nn.Module]) -> nn.Module:
    """Copy a tree of modules, in eval mode, without hooks, and not compiled; tensors are shared. What has been scripted
    cannot be copied, and takes no hook."""
    if isinstance(module, torch.jit.ScriptModule):
        return module
    if module not in twins:
        twin = twins[module] = object.__new__(type(module))  # classes of FSDP make something else of __new__
        own = {name: value for name, value in vars(module).items() if getattr(value, "__self__", None) is module}
        vars(twin).update(vars(module))
        vars(twin).update({name: types.MethodType(method.__func__, twin) for name, method in own.items()})
        vars(twin).update({name: value for name, value in vars(nn.Module()).items() if "hooks" in name})
        children = {name: child if child is None else _twin(child, twins) for name, child in module._modules.items()}
        vars(twin).update(_modules=children, training=False, _compiled_call_impl=None)
    return twins[module]


def _examine(model: nn.Module, head: Head, layout: Layout, locations: tuple[Tensor, ...]) -> HeadParts:
    if not isinstance(head, types.MethodType):  # a function that is no method of a model cannot be run on a twin
        return _unknown(model)
    if any(hasattr(parameter, "full_tensor") for parameter in model.parameters()):  # DTensors, which hooks put together
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
    with torch.inference_mode(False), torch.no_grad():  # whose tensors know what they are views of
        # 1 + ...: roots and powers of features that an activation has made positive must not be NaN.
        rows = tuple(1 + _numbers(2 * branch.shape[2], branch).unflatten(0, (2, -1)) for branch in locations)
        logits = _run(model, twin_head, layout, rows)
        scripted = [module for module in inside if isinstance(module, torch.jit.ScriptModule)]
        modules = tuple(dict.fromkeys(part for module in [*called, *scripted] for part in module.modules()))
        once = stand_in is not None and called.count(classifier) == 2  # in two runs
        if once and isinstance(logits, Tensor) and "pre_logits" in inspect.signature(head).parameters:
            pre_logits = layout.pre_logits(twin, twin_head, *rows)
            if pre_logits.ndim == 2 and stand_in.gave(logits) and _close(logits, stand_in(pre_logits)):  # type: ignore
                convolves = any(isinstance(m, nn.Conv2d) and m is not classifier for m in modules)
                on_map = convolves and layout.format == "NCHW"
                instead = _without_pooling(twin, twin_head, rows[0], pre_logits) if on_map else {}
                return HeadParts(inside, modules, classifier, instead)
    return HeadParts(inside, modules)


def _without_pooling(model: nn.Module, head: Head, rows: Tensor, pre_logits: Tensor) -> dict[str, nn.Module]:
    """Find modules with which a map of two locations gives the `pre_logits` of each; none where it does not."""
    instead: dict[str, nn.Module] = {}
    for name, child in model.named_children():
        if isinstance(child, SelectAdaptivePool2d):
            instead[name] = SelectAdaptivePool2d(pool_type="")
        elif isinstance(child, nn.Flatten):
            instead[name] = nn.Identity()
    try:
        whole = on_whole_map(model, head, instead, rows.t()[None, :, :, None])
    except Exception:  # in whatever words the rest of the head says that it takes no map
        return {}
    return instead if _close(whole, pre_logits.t()[None, :, :, None]) else {}


def on_whole_map(model: nn.Module, head: Head, instead: dict[str, nn.Module], features: Tensor) -> Tensor:
    """Compute the `pre_logits` of every location of a map `(N, C, H, W)`, by the head without its pooling."""
    view = object.__new__(type(model))
    vars(view).update(vars(model))
    vars(view)["_modules"] = {**model._modules, **instead}
    return types.MethodType(head.__func__, view)(features, pre_logits=True)  # type: ignore[attr-defined]


def _run(model: nn.Module, head: Head, layout: Layout, rows: tuple[Tensor, ...]) -> Any:
    """Run a head on two constant maps; UnsupportedModelError where the first depends on its size, or on the second."""
    expected = (
        "Expected a pooling that turns a constant map into its constant, whatever its size (a mean, a maximum, an "
        "attention), and no use of other images in eval: otherwise a single location has no score. Replace that part "
        "of the head."
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
            f"{describe(model)}: its head gives a constant map of 2x2 locations other logits than one such location. "
            f"{expected}"
        )
    return two


class _StandIn:
    """A linear layer of rank one in the place of the last one, whose own weights may be zero."""

    def __init__(self, classes: int, dim: int) -> None:
        self.classes = classes
        self.dim = dim  # of the features
        self.outputs: list[Tensor] = []

    def gave(self, logits: Tensor) -> bool:
        """Whether these are its own output or a view of it, untouched: nothing comes after it, however little that does
        as yet (a temperature of 1, a branch that starts at zero, a bound that was not reached)."""
        return any((logits is out or logits._base is out) and out._version == 0 for out in self.outputs)

    @classmethod
    def of(cls, classifier: Any) -> "_StandIn | None":
        """For a linear layer, or a convolution that is one at every place; None for other modules."""
        if isinstance(classifier, nn.Linear):
            return cls(classifier.out_features, -1)
        if isinstance(classifier, nn.Conv2d):
            sizes = (classifier.kernel_size, classifier.stride, classifier.padding, classifier.groups)
            return cls(classifier.out_channels, 1) if sizes == ((1, 1), (1, 1), (0, 0), 1) else None
        return None

    def __call__(self, x: Tensor) -> Tensor:
        features = x.movedim(self.dim, -1)
        # 1 + ...: a shift of all features at once must not cancel.
        projected = features @ (1 + _numbers(features.shape[-1], x)) / features.shape[-1] ** 0.5
        logits = (projected[..., None] * _numbers(self.classes, x)).movedim(-1, self.dim)
        self.outputs.append(logits.clone(memory_format=torch.contiguous_format))
        return self.outputs[-1]


def _numbers(count: int, like: Tensor) -> Tensor:
    """Numbers between -1 and 1, without use of a random state, in the dtype and on the device of `like`."""
    return torch.arange(count, device=like.device).float().cos().to(like.dtype)


def _close(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are equal but for rounding, relative to the largest finite element."""
    if a.shape != b.shape:
        return False
    scale = torch.where(b.isfinite(), b, 0).abs().amax()
    return torch.allclose(a, b, rtol=0, atol=float(scale) * torch.finfo(b.dtype).eps ** 0.5, equal_nan=True)
