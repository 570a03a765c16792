"""Wrap a timm model in place, by swapping its class for a cached subclass."""

import functools
import math
import warnings
from typing import Any, Literal, TypeVar, cast, overload
from weakref import WeakSet

import torch
from timm.layers import AttentionPool2d, AttentionPoolLatent
from torch import Tensor, nn

from .attention import add_attention
from .config import CSRAConfig, validate_scores
from .errors import UnsupportedModelError, describe
from .heads import is_recorded
from .layouts import Head, layout_of, overrides, spatial_features
from .locations import as_kind, location_attention, location_scores

Model = TypeVar("Model", bound=nn.Module)
_MASKS = ("patches", "patch_valid", "attn_mask")  # arguments of NaFlexViT; locations that are padding get no weight


class CSRAMixin:
    """Modifications:

    - `forward_head` adds the attention term to the logits, with the settings in `self.csra`.
    - A call of the model that did not call `forward_head` warns once.
    - Copying and pickling rebuild the subclass from the timm class.
    - `torch.jit.script` raises an error.
    """

    csra: CSRAConfig

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        outputs, model = super().__call__(*args, **kwargs), cast(nn.Module, self)  # type: ignore[misc]
        compiled = model._compiled_call_impl is not None  # by model.compile(): no Python code of forward_head runs
        if not (compiled or is_recorded()) and self.csra.lam and model not in _reached:
            _reached.add(model)
            warnings.warn(
                f"{describe(model)}: its forward did not call forward_head, so wrapping has no effect. "
                "Expected a forward like timm's: forward_head(forward_features(x)).",
                stacklevel=2,
            )
        return outputs

    def forward_head(self, x: Any = None, pre_logits: bool = False, **masks: Any) -> Any:
        model, head, lam = cast(nn.Module, self), super().forward_head, self.csra.lam  # type: ignore[misc]
        if not is_recorded():
            _reached.add(model)
        if lam == 0 or pre_logits:
            features = () if x is None else (x,)  # NaFlexViT passes its features by keyword
            return head(*features, **(masks | {"pre_logits": True} if pre_logits else masks))
        if not model.num_classes:
            raise UnsupportedModelError(_no_classifier(model))
        if unknown := masks.keys() - _MASKS:
            raise UnsupportedModelError(
                f"{describe(model)}: forward_head was called with {', '.join(sorted(unknown))}; expected no arguments "
                f"but the features, pre_logits and {', '.join(_MASKS)}, because locations are scored without others. "
                "Set what the head needs as an attribute of the model instead."
            )
        features = masks.pop("patches") if x is None else x
        # Locations first, so that an error is raised before the plain head has changed anything.
        terms = location_attention(model, head, features, self.csra.terms, _valid(model, features, masks))
        logits = head(features, **masks)
        if isinstance(logits, tuple):
            return tuple(add_attention(y, term, lam) for y, term in zip(logits, terms, strict=True))
        return add_attention(logits, terms[0], lam)

    def __prepare_scriptable__(self) -> nn.Module:
        raise UnsupportedModelError(
            f"{describe(cast(nn.Module, self))}: a wrapped model cannot be scripted by torch.jit.script (lam and "
            "temperature are read at every forward). Use torch.export.export, torch.jit.trace or torch.compile, or "
            "unwrap it first."
        )

    def __reduce_ex__(self, protocol: Any) -> Any:
        rebuild, args, *state = cast(tuple, super().__reduce_ex__(protocol))
        plain = _plain_class(type(self))
        return _rebuild, (plain, rebuild, *(plain if arg is type(self) else arg for arg in args)), *state


def _valid(model: nn.Module, features: Any, masks: dict[str, Any]) -> Tensor | None:
    """Return the mask of the locations that are not padding, `(N, L)`; None where the head got no mask for them."""
    valid = masks.get("patch_valid")
    if valid is None or valid.shape != layout_of(model, features).locations(features)[0].shape[:2]:
        return None  # the model has pooled its patches to other tokens
    return valid.bool()


# Models whose forward called `forward_head`, or that were warned about. Not stored in the models, because pickles and
# copies must not contain it.
_reached: WeakSet[nn.Module] = WeakSet()


@functools.cache
def _wrapped_class(plain: type) -> type:
    name = f"CSRA{plain.__name__}"
    doc = f"{plain.__name__} with class-specific residual attention.\n\n{CSRAMixin.__doc__}"
    return type(name, (CSRAMixin, *overrides(plain), plain), {"__doc__": doc, "__module__": __name__})


def _plain_class(wrapped: type) -> type:
    return wrapped.__bases__[-1]


def _rebuild(plain: type, rebuild: Any, *args: Any) -> Any:
    """Unpickle a wrapped model: a pickle names the timm class alone, and the subclass is made from it."""
    return rebuild(*(_wrapped_class(plain) if arg is plain else arg for arg in args))


def is_wrapped(model: nn.Module) -> bool:
    """Return whether this model is wrapped; a container of a wrapped model is not."""
    return isinstance(model, CSRAMixin)


def wrap(
    model: Model, lam: float = 0.1, temperature: float | tuple[float, ...] = math.inf, scores: str = "logits"
) -> Model:
    """Add class-specific residual attention to a timm classifier, in place, without retraining and without new weights.

    The logits become `base_c + lam * att_c` with `att_c = sum_j softmax_j(T * s_c(j)) * s_c(j)` (for T = inf, the
    maximum over locations j). `s_c(j)` is the logit, or log-probability, of class c that the model's own head computes
    from a feature map in which every location equals location j (Zhu & Wu, ICCV 2021, arXiv 2108.02456). `state_dict`,
    `isinstance` and the data config stay as they are.

    Args:
        model: a timm classifier. Wrapping a wrapped model replaces its settings.
        lam: weight of the attention term, finite and >= 0. With 0 only the model's own head runs.
        temperature: the paper's T, positive or `inf`. With a tuple, the attention terms of its values are averaged.
        scores: `logits`, the paper's formula, for classifiers trained with a sigmoid for each class (multi-label
            heads, timm's BCE recipes such as `a1_in1k`); or `log_softmax`, with `lam=0.3`, for classifiers trained with
            softmax cross entropy, as most of timm's. Softmax training does not determine an offset common to all logits
            of a location, but a maximum over locations compares these offsets; log-probabilities have none. See
            `docs/results.md` for measurements.

    Returns:
        The same object. `model.csra` holds the settings; `model.csra.lam = 0.3` takes effect at the next forward.

    Raises:
        UnsupportedModelError: `model` is not a timm classifier, has no classifier or no pooling, or is a container of
            a timm model.
        TypeError, ValueError: a setting has the wrong type or is out of range.

    Example:
        >>> import timm, timm_csra
        >>> model = timm_csra.wrap(timm.create_model('test_resnet').eval(), lam=0.3, scores="log_softmax")
        >>> model(torch.randn(2, 3, 160, 160)).shape
        torch.Size([2, 1000])
    """
    config = CSRAConfig(lam, temperature, scores)
    check_supported(model)
    if not is_wrapped(model):
        model.__class__ = _wrapped_class(cast(type, type(model)))
    model.csra = config  # type: ignore[assignment]
    return model


def unwrap(model: Model) -> Model:
    """Undo `wrap`, in place: restore the timm class and remove the settings. A plain model is returned as it is.

    Raises:
        TypeError: the model's class has been changed since `wrap` (by a parametrization or FSDP).
    """
    if is_wrapped(model):
        plain = cast(Any, _plain_class(type(model)))
        if issubclass(plain, CSRAMixin):
            raise TypeError(
                f"{describe(model)}: found the class {type(model).__name__}, expected {plain.__name__} as wrap left "
                "it. Undo what has changed the class since (a parametrization, FSDP), then unwrap."
            )
        model.__class__ = plain
        del model.csra
    return model


def plain_head(model: nn.Module) -> Head:
    """Return the model's own `forward_head`, whether the model is wrapped or not."""
    return super(CSRAMixin, model).forward_head if is_wrapped(model) else model.forward_head  # type: ignore


@overload
def score_maps(model: nn.Module, x: Tensor, scores: str = ..., *, return_logits: Literal[False] = ...) -> Tensor: ...
@overload
def score_maps(
    model: nn.Module, x: Tensor, scores: str = ..., *, return_logits: Literal[True]
) -> tuple[Tensor, Tensor]: ...
def score_maps(
    model: nn.Module, x: Tensor, scores: str = "logits", *, return_logits: bool = False
) -> Tensor | tuple[Tensor, Tensor]:
    """Compute the class scores of every location, for a wrapped or plain timm classifier; `lam` does not matter.

    Args:
        model: a timm classifier, in eval mode.
        x: images as the model takes them, `(N, 3, H, W)`.
        scores: `logits`, or `log_softmax` for log-probabilities over the K classes.
        return_logits: also return the logits of `model(x)`, from the same pass through the backbone.

    Returns:
        `(N, K, rows, columns)`: the score of class k at each location, which the model's own head computes from a
        feature map in which every location equals that one. For a head that is linear after average pooling, the mean
        of the per-location logits is the plain logit. With `return_logits` a pair: these maps, and the logits `(N, K)`.

    Raises:
        UnsupportedModelError: the model cannot be wrapped, or its locations form no grid.
        TypeError: `x` is not a tensor of images (NaFlexViT's patches of several grids form no map).
        ValueError: `scores` is not a known kind.

    Example:
        >>> import timm, timm_csra
        >>> maps = timm_csra.score_maps(timm.create_model('test_resnet').eval(), torch.randn(2, 3, 160, 160))
        >>> maps.shape
        torch.Size([2, 1000, 5, 5])
    """
    check_supported(model)
    kind = validate_scores(scores)
    if not isinstance(x, Tensor) or x.ndim != 4:
        found = f"a tensor {tuple(x.shape)}" if isinstance(x, Tensor) else f"a {type(x).__name__}"
        raise TypeError(f"{describe(model)}: found {found}, expected images (N, C, H, W).")
    features = spatial_features(model, x)
    elements = location_scores(model, plain_head(model), features)
    mean_scores: Tensor = as_kind(kind, elements[0] if len(elements) == 1 else torch.stack(elements).mean(0))
    grid = layout_of(model, features).grid(model, features, (x.shape[-2], x.shape[-1]))
    if grid is None:
        raise UnsupportedModelError(
            f"{describe(model)}: {mean_scores.shape[1]} locations form no grid of rows and columns for an input of "
            f"{x.shape[-2]}x{x.shape[-1]} pixels. Use an input whose size is a multiple of the model's patch size."
        )
    maps = mean_scores.transpose(1, 2).unflatten(2, grid)
    if not return_logits:
        return maps
    reached = model in _reached  # by its own forward, which is not called here
    logits = cast(Tensor, cast(Any, model).forward_head(features))  # last, as a head may change the features in place
    if not reached:
        _reached.discard(model)
    return maps, logits


def check_supported(model: Any) -> None:
    """Raise UnsupportedModelError for a model that cannot be wrapped, as far as this shows without running it."""
    if not _is_timm_classifier(model):
        raise UnsupportedModelError(
            f"{type(model).__name__} is not a timm classifier: expected a module with forward_features, forward_head "
            f"and num_classes. {_where_to_look(model)}"
        )
    if not model.num_classes:
        raise UnsupportedModelError(_no_classifier(model))
    if "forward_head" in vars(model):
        raise UnsupportedModelError(
            f"{describe(model)}: found a forward_head set on the instance, which hides the one of the wrapped class. "
            "Define it in a subclass of the model instead, or delete it: del model.forward_head."
        )
    head = getattr(model, "head", None)
    if "" in pool_types(model):
        raise UnsupportedModelError(
            f"{describe(model)}: found global_pool='', a head that does not pool; expected logits (N, K). "
            "Create the model with pooling, e.g. timm.create_model(..., global_pool='avg')."
        )
    if elsewhere := [name for name, module in model.named_modules() if _has_positions(module) and module is not head]:
        raise UnsupportedModelError(
            f"{describe(model)}: found an attention pool with a position embedding, `{elsewhere[0]}`; expected none "
            "except `model.head`, because its score of a location depends on the position. Use a pooling without "
            "position embedding."
        )


def pool_types(model: nn.Module) -> list[str]:
    """Return the pooling types of a timm classifier (`avg`, `token`, ...) that its head and the model itself name."""
    head = getattr(model, "head", None)
    pools = (getattr(head, "global_pool", None), getattr(head, "pool_type", None), getattr(model, "global_pool", None))
    named = (getattr(pool, "pool_type", pool) for pool in pools)
    return [pool for pool in named if isinstance(pool, str)]


def _has_positions(module: nn.Module) -> bool:
    pools = (AttentionPool2d, AttentionPoolLatent)
    return isinstance(module, pools) and getattr(module, "pos_embed", None) is not None


def _is_timm_classifier(model: Any) -> bool:
    # Methods are looked up on the class: a compiled model forwards attributes to the model inside it.
    methods = all(hasattr(type(model), name) for name in ("forward_features", "forward_head"))
    return isinstance(model, nn.Module) and methods and hasattr(model, "num_classes")


def _where_to_look(model: Any) -> str:
    modules = model.named_modules() if isinstance(model, nn.Module) else ()
    inner = next((path for path, module in modules if _is_timm_classifier(module)), None)
    if inner is None:
        return "Use a model from timm.create_model(...)."
    simple = all(part.isidentifier() for part in inner.split("."))
    return f"It contains one: wrap({f'model.{inner}' if simple else f'model.get_submodule({inner!r})'}) instead."


def _no_classifier(model: nn.Module) -> str:
    return (
        f"{describe(model)}: found num_classes={model.num_classes}, no classifier; expected one that can score every "
        "location. Create the model with num_classes > 0, or call model.reset_classifier(num_classes) before wrap."
    )
